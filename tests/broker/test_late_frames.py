"""Alerts whose frames are late, on a real broker: each becomes one packet, whatever dies meanwhile."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from helpers.chain import Chain, MakeChain
from helpers.worker_process import WorkerProcess
from servers.kafka_broker import KafkaBroker, free_port

from stampworker.formats.alerts import Alert
from stampworker.stream.outcomes import HEADERS_PREFIX
from stampworker.stream.worker import Worker

StartWorker = Callable[..., WorkerProcess]
Night = tuple[list[Alert], list[Path]]
DOWN_S = 30.0 if os.environ.get("STAMPWORKER_TEST_LONG") else 8.0


def wait_until(condition: Callable[[], bool], timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def moved(alerts: list[Alert], root: str) -> list[Alert]:
    """Return the alerts with their frames, which they name from the night's folder on, in another place."""
    return [replace(a, frames={plane: f"{root}/{name}" for plane, name in a.frames.items()}) for a in alerts]


def late_chain(make_chain: MakeChain, night: Night, folder: Path) -> tuple[Chain, str]:
    """Return a chain in which the frames of every second alert are in a folder that is not there yet."""
    alerts, (here,) = night
    chain = make_chain(
        [*moved(alerts[::2], str(folder)), *moved(alerts[1::2], str(here))], [folder.parent], partitions=4
    )
    return chain, chain.broker.create_topic(4, "retries")


def test_two_workers_one_killed_while_alerts_wait(
    make_chain: MakeChain, start_worker: StartWorker, night: Night, tmp_path: Path
) -> None:
    """Frames come while alerts wait, after one worker was killed and another has joined: each alert once."""
    folder = tmp_path / "late"
    chain, retries = late_chain(make_chain, night, folder)
    options = {"worker__retry_topic": retries, "worker__retry_delay_s": 2}
    first, second = (start_worker(chain.options(worker__slot=slot, **options)) for slot in (0, 1))
    wait_until(lambda: len(chain.broker.read_all(retries)) >= len(chain.alerts) // 2)
    wait_until(lambda: len(chain.broker.read_all(chain.packets)) == len(chain.alerts) // 2)
    first.kill()
    third = start_worker(chain.options(worker__slot=2, **options))
    third.wait_for("assigned")
    shutil.copytree(night[1][0], tmp_path / "part")
    (tmp_path / "part").rename(folder)
    wait_until(lambda: len(chain.broker.read_all(chain.packets)) == len(chain.alerts))
    for worker in (second, third):
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    records = chain.check()
    attempts = [int(dict(r.headers).get(HEADERS_PREFIX + "attempt", b"1")) for r in records]
    assert sum(attempt > 1 for attempt in attempts) == len(chain.alerts) // 2
    assert {dict(r.headers)[HEADERS_PREFIX + "input.topic"] for r in records} == {chain.input.encode()}
    assert chain.broker.read_all(chain.rejects) == []


def test_alerts_read_are_packets_retries_and_rejects(
    make_chain: MakeChain, broker: KafkaBroker, night: Night, tmp_path: Path
) -> None:
    """What never comes is rejected when its time is over, and the totals add up."""
    chain, retries = late_chain(make_chain, night, tmp_path / "never")
    settings = chain.settings(
        worker__retry_topic=retries, worker__retry_delay_s=1, worker__retry_missing_for_s=2.5, worker__batch_s=0.1
    )
    worker = Worker(settings)
    thread = threading.Thread(target=worker.run)
    thread.start()
    half = len(chain.alerts) // 2
    try:
        wait_until(lambda: worker.totals.rejects == half)
    finally:
        worker.stop()
        thread.join(30)
    totals = worker.totals
    assert totals.packets == half
    assert totals.alerts == totals.packets + totals.retries + totals.rejects
    assert len(broker.read_all(retries)) == totals.retries >= half
    sent = sorted((r.key, r.value) for r in broker.read_all(chain.input))
    left = [*broker.read_all(chain.rejects)]
    packets = {dict(r.headers)[HEADERS_PREFIX + "input.offset"] for r in broker.read_all(chain.packets)}
    assert packets
    assert {(r.key, r.value) for r in left} <= set(sent)
    assert len({(r.key, r.value) for r in left}) == half


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def serving(folder: Path, port: int) -> Iterator[None]:
    """Serve a folder; SO_REUSEADDR lets the port be taken again at once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_frame_server_that_is_down_costs_no_alert(
    make_chain: MakeChain, start_worker: StartWorker, night: Night
) -> None:
    """A server of frames goes down, comes back, flaps and stays: each alert is one packet, and none is rejected."""
    port = free_port()
    alerts = moved(night[0], f"http://127.0.0.1:{port}")
    chain = replace(make_chain(alerts, partitions=2), roots=[f"http://127.0.0.1:{port}/"])
    retries = chain.broker.create_topic(2, "retries")
    options = {
        "worker__retry_topic": retries,
        "worker__retry_delay_s": 1.5,
        "frames__failure_ttl_s": 0.5,
        "frames__connect_s": 1,
        "frames__remote_ttl_s": 0.2,
    }
    started = time.monotonic()
    worker = start_worker(chain.options(**options))
    wait_until(lambda: len(chain.broker.read_all(retries)) >= len(alerts))
    for _ in range(2):  # too short for any of them to be read in whole
        with serving(night[1][0], port):
            time.sleep(0.05)
        time.sleep(0.3)
    time.sleep(max(started + DOWN_S - time.monotonic(), 0))
    with serving(night[1][0], port), socket.create_connection(("127.0.0.1", port)):
        wait_until(lambda: len(chain.broker.read_all(chain.packets)) >= len(alerts))
        worker.terminate()
        assert worker.wait() == 0
        chain.check()
    assert chain.broker.read_all(chain.rejects) == []
