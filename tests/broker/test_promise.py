"""The worker's promise, on a real broker: each alert leaves once, as a packet or as a reject, whatever happens."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from astropy.io import fits
from astropy.table import Table
from confluent_kafka import KafkaError, KafkaException, Producer
from helpers.chain import Chain, MakeChain
from helpers.worker_process import WorkerProcess, environment
from servers.kafka_broker import KafkaBroker, Record

import stampworker.stream.kafka
import stampworker.stream.worker
from stampworker.config import load
from stampworker.errors import ProducerFenced
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.stream.outcomes import ERRORS_PREFIX, HEADERS_PREFIX
from stampworker.stream.replay import Bound, replay
from stampworker.stream.worker import Totals, Worker

HELPERS = Path(__file__).parents[1] / "helpers"
StartWorker = Callable[..., WorkerProcess]


def drain(chain: Chain, **more: object) -> Totals:
    return Worker(chain.settings(**more), drained=True).run()


def real_alerts(data: Path) -> tuple[list[Alert], list[Path]]:
    """Every candidate of the frame sets."""
    files = {
        "science": "science",
        "template": "template",
        "difference": "difference",
        "convolved": "convolved",
        "error": "err",
        "mask": "mask",
    }
    alerts = []
    for table in sorted(data.rglob("candidates.ecsv")):
        folder = table.parent
        if not (folder / "convolved.fits").exists():
            continue
        frames = {plane: (folder / f"{name}.fits").resolve().as_uri() for plane, name in files.items()}
        shape = fits.getdata(folder / "science.fits").shape
        assert len(shape) == 2
        for n, row in enumerate(Table.read(table)):
            name = f"{folder.parent.name}-{folder.name}-{n}"
            alerts.append(Alert(name, f"obj{n}", float(row["x"]), float(row["y"]), fwhm=3.0, frames=frames))
    return alerts, [data.resolve()]


def test_real_candidates_each_once_as_enrich_makes_them(
    make_chain: MakeChain, night: tuple[list[Alert], list[Path]]
) -> None:
    """Every real candidate (of a simulated night where there are none) comes out once, with the bytes of `enrich`."""
    data = Path(__file__).parents[3] / "shared" / "data"
    assert data.is_dir() or "STAMPWORKER_TEST_DATA_REQUIRED" not in os.environ
    alerts, roots = real_alerts(data) if data.is_dir() else night
    chain = make_chain(alerts, roots)
    totals = drain(chain, worker__batch_count=50)
    assert (totals.alerts, totals.packets, totals.rejects) == (len(alerts), len(alerts), 0)
    chain.check()
    assert sum(offset for offset in chain.broker.committed(chain.group, chain.input).values() if offset > 0) == len(
        alerts
    )


def test_packet_records_say_where_they_come_from(make_chain: MakeChain) -> None:
    """The key is the object's; the headers name schema, version and the alert's record."""
    chain = make_chain()
    drain(chain)
    sent = {(r.partition, r.offset): r for r in chain.broker.read_all(chain.input)}
    for record in chain.check():
        headers = dict(record.headers)
        assert headers[HEADERS_PREFIX + "schema"] == b"stampworker.packet 1.0"
        assert headers[HEADERS_PREFIX + "input.topic"] == chain.input.encode()
        place = int(headers[HEADERS_PREFIX + "input.partition"]), int(headers[HEADERS_PREFIX + "input.offset"])
        assert sent[place].key == record.key == Packet.read(record.value or b"").key.encode()
        assert HEADERS_PREFIX + "replay" not in headers


def test_two_workers_share_the_topic(make_chain: MakeChain, start_worker: StartWorker) -> None:
    """Two workers in one group: each alert once, and both had some."""
    chain = make_chain(partitions=4)
    workers = [start_worker(chain.options(worker__slot=slot, worker__batch_count=2)) for slot in (0, 1)]
    wait_for_packets(chain, len(chain.alerts))
    chain.send()  # again, now that both have joined
    wait_for_packets(chain, 2 * len(chain.alerts))
    for worker in workers:
        worker.terminate()
        assert worker.wait() == 0
        assert "batch alerts=" in worker.log
    records = chain.broker.read_all(chain.packets)
    origins = [origin(record) for record in records]
    assert len(origins) == len(set(origins)) == 2 * len(chain.alerts)


def origin(record: Record) -> tuple[bytes, bytes]:
    headers = dict(record.headers)
    return headers[HEADERS_PREFIX + "input.partition"], headers[HEADERS_PREFIX + "input.offset"]


def wait_for_packets(chain: Chain, number: int, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while len(found := chain.broker.read_all(chain.packets)) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} packets after {timeout} s"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("after-begin_transaction", 2),
        ("after-produce", 17),
        ("before-send_offsets_to_transaction", 2),
        ("after-send_offsets_to_transaction", 2),
        ("before-commit_transaction", 3),
        ("after-commit_transaction", 2),
    ],
)
def test_killed_at_every_step_each_alert_once(
    make_chain: MakeChain, start_worker: StartWorker, step: str, number: int
) -> None:
    """One of two workers dies by SIGKILL at a step of its transaction; the other finishes: each alert once."""
    chain = make_chain(partitions=4)
    dying = subprocess.run(
        [sys.executable, str(HELPERS / "dying_worker.py"), step, str(number), "run"],
        env=environment(chain.options(worker__slot=0)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert dying.returncode == -signal.SIGKILL, dying.stderr
    other = start_worker(chain.options(worker__slot=1))
    wait_for_packets(chain, len(chain.alerts))
    other.terminate()
    assert other.wait() == 0
    chain.check()


def test_one_of_two_running_workers_is_killed_in_its_transaction(
    make_chain: MakeChain, start_worker: StartWorker, night: tuple[list[Alert], list[Path]]
) -> None:
    """Both share the topic; one dies by SIGKILL with a transaction open; the other takes over: each alert once."""
    chain = replace(make_chain([], partitions=4), alerts=night[0])
    other = start_worker(chain.options(worker__slot=1, worker__batch_count=2))
    other.wait_for("assigned")
    dying = subprocess.Popen(
        [sys.executable, str(HELPERS / "dying_worker.py"), "before-commit_transaction", "2", "run"],
        env=environment(chain.options(worker__slot=0, worker__batch_count=2)),
        stderr=subprocess.DEVNULL,
    )
    try:
        other.wait_for("revoked")  # the dying one has joined
        chain.send()
        assert dying.wait(60) == -signal.SIGKILL
    finally:
        dying.kill()
        dying.wait()
    wait_for_packets(chain, len(chain.alerts))
    other.terminate()
    assert other.wait() == 0
    assert len({origin(record)[0] for record in chain.check()}) == 4


def test_killed_worker_restarted_in_its_slot_ends_its_transaction(make_chain: MakeChain) -> None:
    """The restarted worker aborts what it left open, so readers wait for no time-out, and each alert comes once."""
    chain = make_chain()
    subprocess.run(
        [sys.executable, str(HELPERS / "dying_worker.py"), "before-commit_transaction", "2", "run"],
        env=environment(chain.options(worker__transaction_timeout_s=600)),
        capture_output=True,
        timeout=60,
        check=False,
    )
    hidden = chain.broker.read_all(chain.packets, isolation="read_uncommitted")
    assert len(hidden) > len(chain.broker.read_all(chain.packets))
    drain(chain)
    chain.check()


class FailingProducer(Producer):
    """Fails at the commits that are listed: by an error that asks for an abort, or after the commit by silence."""

    commits = 0
    abort_at: tuple[int, ...] = ()
    silent_at: tuple[int, ...] = ()

    def commit_transaction(self, *args: Any) -> None:
        """Commit, or fail."""
        FailingProducer.commits += 1
        if FailingProducer.commits in FailingProducer.abort_at:
            raise KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID, "injected", txn_requires_abort=True))
        super().commit_transaction(*args)
        if FailingProducer.commits in FailingProducer.silent_at:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "injected"))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingProducer]:
    monkeypatch.setattr(FailingProducer, "commits", 0)
    monkeypatch.setattr(stampworker.stream.kafka, "Producer", FailingProducer)
    return FailingProducer


def test_aborted_batch_is_read_again(
    make_chain: MakeChain, failing: type[FailingProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an abort the batch and the one behind it are read again: nothing lost, nothing twice, in order."""
    chain = make_chain(partitions=2)
    monkeypatch.setattr(failing, "abort_at", (1, 3, 4, 6))
    totals = drain(chain)
    assert (totals.aborts, totals.packets) == (4, len(chain.alerts))
    records = chain.check()
    assert len(chain.broker.read_all(chain.packets, isolation="read_uncommitted")) > len(records)
    for partition in (b"0", b"1"):
        offsets = [
            int(o) for r in sorted(records, key=lambda r: r.timestamp or 0) for p, o in [origin(r)] if p == partition
        ]
        assert offsets == sorted(offsets)


def test_commit_without_an_answer_counts_once(
    make_chain: MakeChain, failing: type[FailingProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that happened and was never confirmed: a new producer, the broker's offsets, nothing twice."""
    chain = make_chain(partitions=2)
    monkeypatch.setattr(failing, "silent_at", (2,))
    totals = drain(chain)
    assert totals.aborts == 1
    chain.check()


def test_broker_killed_and_restarted_under_the_worker(make_chain: MakeChain, start_worker: StartWorker) -> None:
    """The broker dies and comes back while the worker works: each alert once."""
    chain = make_chain()
    worker = start_worker(chain.options(worker__batch_count=3))
    worker.wait_for("batch alerts=")
    chain.broker.kill()
    time.sleep(1)
    chain.broker.start_again()
    chain.send()
    wait_for_packets(chain, 2 * len(chain.alerts))
    worker.terminate()
    assert worker.wait() == 0
    origins = [origin(record) for record in chain.broker.read_all(chain.packets)]
    assert len(origins) == len(set(origins)) == 2 * len(chain.alerts)


def test_rejects_keep_the_record_and_say_why(make_chain: MakeChain, night: tuple[list[Alert], list[Path]]) -> None:
    """What can't be decoded or read goes to the rejects byte for byte, with the reason, in the same transaction."""
    lost = Alert("lost", x=1.0, y=2.0, frames={"science": "no-such-frame.fits"})
    outside = Alert("outside", x=1.0, y=2.0, frames={"science": Path(__file__).as_uri()})
    chain = make_chain(night[0][:5])
    bad = [
        Record(b"neither JSON nor Avro", b"key", (("own", b"header"), ("own", b"again"))),
        Record(None, b"tombstone"),
        Record(encode(lost), b"lost"),
        Record(encode(outside), b"outside"),
    ]
    chain.broker.produce(chain.input, bad)
    totals = drain(chain)
    assert (totals.alerts, totals.packets, totals.rejects) == (9, 5, 4)
    chain.check()
    rejects = chain.broker.read_all(chain.rejects)
    assert {(r.key, r.value) for r in rejects} == {(r.key, r.value) for r in bad}
    reasons = {}
    for record in rejects:
        headers = {name: value.decode() for name, value in record.headers if name.startswith(ERRORS_PREFIX)}
        reasons[record.key] = headers[ERRORS_PREFIX + "stage"], headers[ERRORS_PREFIX + "exception.class.name"]
        assert headers[ERRORS_PREFIX + "topic"] == chain.input
        assert headers[ERRORS_PREFIX + "exception.message"] in headers[ERRORS_PREFIX + "exception.stacktrace"]
        assert {"partition", "offset", "timestamp", "class.name", "attempt"} <= {
            name.removeprefix(ERRORS_PREFIX) for name in headers
        }
    assert reasons == {
        b"key": ("decode", "stampworker.errors.AlertError"),
        b"tombstone": ("decode", "stampworker.errors.AlertError"),
        b"lost": ("frames", "stampworker.errors.FrameMissing"),
        b"outside": ("frames", "stampworker.errors.FrameRefused"),
    }
    first = next(r for r in rejects if r.key == b"key")
    assert first.headers[:2] == (("own", b"header"), ("own", b"again"))


def median_size(broker: KafkaBroker, night: tuple[list[Alert], list[Path]]) -> int:
    """Size of the night's packets that half of them exceed."""
    sizes = [len(value) for value in Chain(broker, *night, "a", "b", "c").expected().values()]
    return int(statistics.median(sizes))


def test_packet_over_the_topic_limit_is_rejected(
    make_chain: MakeChain, broker: KafkaBroker, night: tuple[list[Alert], list[Path]]
) -> None:
    """Packets that the topic refuses are set aside; the others go on, and nothing repeats without end."""
    limit = median_size(broker, night)
    chain = make_chain(**{"max.message.bytes": str(limit)})
    over = sum(len(value) > limit - 300 for value in chain.expected().values())  # key, headers and framing have some
    totals = drain(chain)
    assert totals.packets + totals.rejects == len(chain.alerts)
    assert 0 < totals.rejects < len(chain.alerts)
    assert totals.rejects == pytest.approx(over, abs=3)
    assert len(chain.broker.read_all(chain.packets)) == totals.packets
    assert len(chain.broker.read_all(chain.rejects)) == totals.rejects


def test_limit_that_was_lowered_costs_the_large_packets_only(
    make_chain: MakeChain,
    broker: KafkaBroker,
    night: tuple[list[Alert], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A topic that takes less than it did: the limits are asked for again, and only what is too large is rejected."""
    chain = make_chain(night[0][:12], **{"max.message.bytes": str(median_size(broker, night))})
    limits = iter([1_000_000, 1_000_000])  # as they were at the start
    real = stampworker.stream.kafka.message_limit
    monkeypatch.setattr(
        "stampworker.stream.worker.message_limit", lambda settings, topic: next(limits, None) or real(settings, topic)
    )
    totals = drain(chain)
    assert 1 <= totals.aborts <= 3
    assert totals.packets + totals.rejects == len(chain.alerts)
    assert 0 < totals.rejects < len(chain.alerts)
    packets = {Packet.read(r.value or b"").alert_id for r in chain.broker.read_all(chain.packets)}
    rejects = chain.broker.read_all(chain.rejects)
    assert (len(packets), len(rejects)) == (totals.packets, totals.rejects)
    sizes = {alert_id: len(value) for alert_id, value in chain.expected().items()}
    assert max(sizes[a] for a in packets) <= min(size for a, size in sizes.items() if a not in packets)


def test_sigterm_finishes_the_batch(make_chain: MakeChain, start_worker: StartWorker) -> None:
    """SIGTERM: what was read is committed, exit 0; the next worker does the rest."""
    chain = make_chain()
    worker = start_worker(chain.options(worker__batch_count=3))
    worker.wait_for("batch alerts=")
    worker.terminate()
    assert worker.wait() == 0
    assert "finishing the batch" in worker.log
    drain(chain)
    chain.check()


def test_second_sigterm_drops_the_batch(make_chain: MakeChain, start_worker: StartWorker) -> None:
    """A second SIGTERM ends the worker at once, exit 1; nothing is lost or doubled."""
    chain = make_chain()
    worker = start_worker(chain.options(worker__batch_count=1000, worker__batch_s=600))
    worker.wait_for("assigned")
    worker.terminate()
    worker.terminate()
    assert worker.wait() in (0, 1)
    drain(chain)
    chain.check()


def test_same_slot_fences_the_older_worker(make_chain: MakeChain) -> None:
    """A worker whose slot another one takes stops, and says which."""
    chain = make_chain()
    settings = chain.settings(worker__batch_count=1000, worker__batch_s=2)
    old = Worker(settings)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            old.run()
        except ProducerFenced as exc:
            failures.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(2)
    newer = stampworker.stream.kafka.ExactlyOnce(settings)
    newer.start()
    chain.send()
    thread.join(60)
    assert not thread.is_alive()
    assert len(failures) == 1
    assert f"{chain.group}-0" in str(failures[0])


def test_drained_mode_ends_behind_transaction_markers(make_chain: MakeChain) -> None:
    """An input topic whose last records are commit markers and aborted alerts still ends."""
    chain = make_chain([])
    for commit in (True, False):
        with chain.broker.transaction(f"{chain.input}-source") as producer:
            producer.produce(chain.input, b"never valid", b"k")
            producer.flush(30)
            if commit:
                producer.commit_transaction(30)
            else:
                producer.abort_transaction(30)
    totals = drain(chain)
    assert (totals.alerts, totals.rejects) == (1, 1)


def test_drained_mode_ends_on_an_empty_topic(make_chain: MakeChain) -> None:
    """Nothing to read is an end, too."""
    chain = make_chain([])
    assert drain(chain).alerts == 0


def test_replay_gives_the_same_values(make_chain: MakeChain) -> None:
    """A replay of the topic publishes the same values elsewhere; the group of the live worker is not moved."""
    chain = make_chain()
    drain(chain)
    before = chain.broker.committed(chain.group, chain.input)
    again = chain.broker.create_topic(2, "again")
    totals = replay(chain.settings(), chain.input, again, run="one")
    assert totals.packets == len(chain.alerts)
    records = chain.check(again)
    assert {dict(r.headers)[HEADERS_PREFIX + "replay"] for r in records} == {b"one"}
    assert chain.broker.committed(chain.group, chain.input) == before
    # The same name goes on where it stopped: at the end.
    assert replay(chain.settings(), chain.input, again, run="one").alerts == 0


def test_replay_of_a_range_of_offsets_and_times(make_chain: MakeChain) -> None:
    """A range by offsets or times takes the records within it, half open."""
    chain = make_chain(partitions=1)
    topic = chain.broker.create_topic(1, "again")
    totals = replay(chain.settings(), chain.input, topic, run="offsets", start=Bound(offset=5), end=Bound(offset=12))
    assert totals.packets == 7
    assert [int(origin(r)[1]) for r in chain.broker.read_all(topic)] == list(range(5, 12))
    stamps = sorted({r.timestamp or 0 for r in chain.broker.read_all(chain.input)})
    sent = chain.broker.read_all(chain.input)
    middle = stamps[len(stamps) // 2]
    start = Bound(time=datetime.fromtimestamp(middle / 1000, UTC))
    totals = replay(chain.settings(), chain.input, topic, run="times", start=start)
    assert totals.packets == sum((r.timestamp or 0) >= middle for r in sent)


def test_configuration_that_breaks_the_promise_is_refused(
    make_chain: MakeChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A property that the promise hangs on cannot be set, and a missing topic is named."""
    chain = make_chain([])
    with pytest.raises(stampworker.ConfigError, match=r"'enable.auto.commit' is the worker's own"):
        drain(chain, **{"kafka.enable.auto.commit": "true"})
    with pytest.raises(stampworker.ConfigError, match="found no topic 'nowhere'"):
        drain(chain, worker__packet_topic="nowhere")
    monkeypatch.setattr(stampworker.stream.kafka, "_CONTACT_S", 1.0)
    with pytest.raises(stampworker.BrokerUnavailable, match=r"no answer from 127\.0\.0\.1:1 within"):
        Worker(load(flags={"kafka.bootstrap.servers": "127.0.0.1:1", "kafka.log_level": "0"}), drained=True).run()
