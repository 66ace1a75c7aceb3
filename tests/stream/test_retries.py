"""Alerts that are tried again, in the real loop on librdkafka's cluster in memory; a real broker's tests are beside."""

from __future__ import annotations

import itertools
import math
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Message, TopicPartition
from helpers.mock_cluster import MockCluster
from helpers.night import STAR, write_night

from stampworker.config import Settings, WorkerSettings, load
from stampworker.errors import (
    ConfigError,
    FrameCorrupt,
    FrameMissing,
    FrameRefused,
    FrameUnavailable,
    TransactionAborted,
)
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.stream.intake import DelayedRecords
from stampworker.stream.kafka import AtLeastOnce, Record
from stampworker.stream.outcomes import ERRORS_PREFIX, HEADERS_PREFIX, RETRY_PREFIX, Attempt
from stampworker.stream.worker import Worker

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="module")
def cluster() -> MockCluster:
    """Start one cluster for all tests."""
    return MockCluster()


@pytest.fixture
def settings(cluster: MockCluster) -> MakeSettings:
    """Return settings of topics and a group of their own; an alert waits for half a second."""

    def make(**more: object) -> Settings:
        topics = {f"worker.{name}_topic": cluster.topic(name) for name in ("input", "packet", "reject", "retry")}
        flags = {
            "kafka.bootstrap.servers": cluster.address,
            "kafka.log_level": "0",
            "kafka.fetch.wait.max.ms": "20",
            "worker.guarantee": "at-least-once",
            "worker.group": uuid.uuid4().hex,
            "worker.deadline_s": 10,
            "worker.batch_s": 0.05,
            "worker.retry_delay_s": 0.5,
            "frames.frame_roots": "/",
            "enrich.radius": 5,
            **topics,
            **{name.replace("__", "."): value for name, value in more.items()},
        }
        return load(flags=flags)

    return make


@pytest.fixture
def frames(tmp_path: Path) -> dict[str, str]:
    """Write one set of frames."""
    (tmp_path / "here").mkdir()
    return write_night(tmp_path / "here", planes=("science", "template", "difference"))


def late(frames: dict[str, str], folder: Path) -> dict[str, str]:
    """Return the same frames in a folder that they have not come to yet."""
    return {plane: str(folder / Path(url).name) for plane, url in frames.items()}


def arrive(frames: dict[str, str], folder: Path) -> None:
    """Let them come, each at once."""
    folder.mkdir()
    for url in frames.values():
        path = Path(url.removeprefix("file://"))
        shutil.copy(path, folder / "part")
        (folder / "part").rename(folder / path.name)


def alert(name: str, frames: dict[str, str]) -> Alert:
    return Alert(name, name, *STAR, fwhm=3.0, frames=frames)


@contextmanager
def running(settings: Settings, **more: Any) -> Iterator[Worker]:
    """Run a worker in a thread; at the end it must stop without an error."""
    worker = Worker(settings, **more)
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(worker.run)
        try:
            yield worker
        finally:
            worker.stop()
        ended.result(30)


def wait_until(condition: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def headers_of(message: Message) -> dict[str, bytes]:
    headers: Any = message.headers() or []
    return {name: value for name, value in headers if isinstance(value, bytes)}


@pytest.mark.slow
def test_late_frames_make_a_packet_and_keep_back_no_other_alert(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], tmp_path: Path
) -> None:
    """The alerts behind one with a late frame go on; when the frame has come, so does its packet, as from the first."""
    made = settings()
    folder = tmp_path / "there"
    waits, goes_on = alert("waits", late(frames, folder)), alert("goes on", frames)
    cluster.produce(made.worker.input_topic[0], [encode(waits), encode(goes_on)])
    with running(made) as worker:
        wait_until(lambda: worker.totals.packets == 1 and worker.totals.retries >= 2)
        (first,) = cluster.read(made.worker.packet_topic, 1)
        assert Packet.read(first.value() or b"").alert_id == "goes on"
        assert HEADERS_PREFIX + "attempt" not in headers_of(first)
        arrive(frames, folder)
        wait_until(lambda: worker.totals.packets == 2)
    totals = worker.totals
    assert totals.rejects == 0
    assert totals.alerts == totals.packets + totals.retries
    (second,) = (
        m for m in cluster.read(made.worker.packet_topic, 2) if Packet.read(m.value() or b"").alert_id == "waits"
    )
    headers = headers_of(second)
    assert headers[HEADERS_PREFIX + "input.topic"] == made.worker.input_topic[0].encode()
    assert headers[HEADERS_PREFIX + "input.offset"] == b"0"
    assert headers[HEADERS_PREFIX + "attempt"] == str(totals.retries + 1).encode()
    retries = cluster.read(made.worker.retry_topic or "", totals.retries)
    assert len(retries) == totals.retries
    assert {(r.key(), r.value()) for r in retries} == {(b"key", encode(waits))}


@pytest.mark.slow
def test_attempts_are_apart_by_the_delay(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], tmp_path: Path
) -> None:
    """Each attempt comes no sooner than the delay says; none comes when the patience is at its end: then a reject."""
    made = settings(worker__retry_missing_for_s=1.7)
    cluster.produce(made.worker.input_topic[0], [encode(alert("waits", late(frames, tmp_path / "there")))])
    with running(made) as worker:
        wait_until(lambda: worker.totals.rejects == 1)
    retries = worker.totals.retries
    assert 1 <= retries <= 3
    assert (worker.totals.alerts, worker.totals.packets) == (retries + 1, 0)
    due = [headers_of(r) for r in cluster.read(made.worker.retry_topic or "", retries)]
    times = [float(headers[RETRY_PREFIX + "due_s"]) for headers in due]
    assert all(after - before >= 0.5 for before, after in itertools.pairwise(times))
    assert times[-1] - float(due[0][RETRY_PREFIX + "since_s"]) <= 1.7
    assert [int(headers[RETRY_PREFIX + "number"]) for headers in due] == list(range(2, retries + 2))
    (reject,) = cluster.read(made.worker.reject_topic, 1)
    headers = headers_of(reject)
    assert headers[ERRORS_PREFIX + "attempt"] == str(retries + 1).encode()
    assert headers[ERRORS_PREFIX + "topic"] == made.worker.input_topic[0].encode()
    assert headers[ERRORS_PREFIX + "exception.class.name"] == b"stampworker.errors.FrameMissing"
    assert all(name.startswith(ERRORS_PREFIX) for name in headers)


@pytest.mark.slow
def test_drained_worker_leaves_what_is_not_of_its_input(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], tmp_path: Path
) -> None:
    """A drained worker ends with an alert put in the retry topic; the next one waits until it is due, and ends too."""
    made = settings(kafka__session__timeout__ms=1000, kafka__heartbeat__interval__ms=200)  # until which the group stays
    folder = tmp_path / "there"
    cluster.produce(made.worker.input_topic[0], [encode(alert("waits", late(frames, folder)))])
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets, totals.rejects) == (totals.retries, 0, 0)
    assert totals.retries >= 1
    arrive(frames, folder)
    again = Worker(made, drained=True).run()
    assert (again.alerts, again.packets, again.rejects) == (1, 1, 0)


@pytest.mark.slow
def test_what_waits_is_not_lost_when_a_batch_is_read_again(
    cluster: MockCluster,
    settings: MakeSettings,
    frames: dict[str, str],
    tmp_path: Path,
) -> None:
    """Batches that abort while an alert waits set every partition back; the alert waits again, and leaves once."""
    aborts = 3

    class Flaky(AtLeastOnce):
        def publish(self, records: Sequence[Record], offsets: Sequence[TopicPartition], metadata: object) -> None:
            nonlocal aborts
            if aborts and all(record.topic == made.worker.packet_topic for record in records):
                aborts -= 1
                raise TransactionAborted("injected")
            super().publish(records, offsets, metadata)

    made = settings(worker__retry_delay_s=2)
    folder = tmp_path / "there"
    cluster.produce(made.worker.input_topic[0], [encode(alert("waits", late(frames, folder)))])
    with running(made, publisher=lambda settings, reader, _largest: Flaky(settings, reader)) as worker:
        wait_until(lambda: worker.totals.retries == 1)
        arrive(frames, folder)
        cluster.produce(made.worker.input_topic[0], [encode(alert(f"{n}", frames)) for n in range(3)])
        wait_until(lambda: worker.totals.packets == 4)
    assert (aborts, worker.totals.aborts) == (0, 3)
    made_ids = [Packet.read(m.value() or b"").alert_id for m in cluster.read(made.worker.packet_topic, 4)]
    assert sorted(made_ids) == ["0", "1", "2", "waits"]


def test_a_record_that_no_worker_put_there_is_an_alert(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """What somebody else has sent to the retry topic is worked on at once, with a warning."""
    made = settings()
    cluster.produce(made.worker.retry_topic or "", [encode(alert("a", frames))])
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets) == (1, 1)
    assert "KeyError 'topic'; taken as an alert" in caplog.text


def waiting_headers(due_s: float, since_s: float = 1.0) -> list[tuple[str, str | bytes | None]]:
    """Return the headers of a second attempt."""
    return list(Attempt("elsewhere", 1, 2, 3, number=2, since_s=since_s, due_s=due_s).headers())


def test_clock_that_was_ahead_does_not_hold_a_partition(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str]
) -> None:
    """No alert waits longer than the delay, however far ahead the time of its next attempt lies."""
    made = settings()
    headers = waiting_headers(time.time() + 3600)
    cluster.produce(made.worker.retry_topic or "", [encode(alert("a", frames))], headers=headers)
    began = time.monotonic()
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets) == (1, 1)
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize("headers", [waiting_headers(math.inf), waiting_headers(0.0, since_s=math.nan)])
def test_times_that_are_not_finite_are_no_workers(
    cluster: MockCluster,
    settings: MakeSettings,
    frames: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    headers: list[tuple[str, str | bytes | None]],
) -> None:
    """Such a record would wait, or be tried again, without end: it is taken as an alert."""
    made = settings()
    cluster.produce(made.worker.retry_topic or "", [encode(alert("a", frames))], headers=headers)
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets) == (1, 1)
    assert "wanted finite ones; taken as an alert" in caplog.text


def test_what_comes_while_the_last_alert_waits_is_left(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drained worker ends where a partition ended when it saw its first record, not when that was due."""
    made = settings()
    topic = made.worker.retry_topic or ""
    hold = DelayedRecords.hold

    def hold_and_send(*args: Any) -> None:
        hold(*args)
        cluster.produce(topic, [encode(alert("late", frames))])

    monkeypatch.setattr(DelayedRecords, "hold", hold_and_send)
    cluster.produce(topic, [encode(alert("a", frames))], headers=waiting_headers(time.time() + 3600))
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets) == (1, 1)


def test_without_a_retry_topic_a_missing_frame_is_a_reject_at_once(
    cluster: MockCluster, settings: MakeSettings, frames: dict[str, str], tmp_path: Path
) -> None:
    """Retries are off unless there is a topic for them."""
    made = settings()
    made = made.model_copy(update={"worker": made.worker.model_copy(update={"retry_topic": None})})
    cluster.produce(made.worker.input_topic[0], [encode(alert("a", late(frames, tmp_path / "there")))])
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.retries, totals.rejects) == (1, 0, 1)


@pytest.mark.parametrize(
    ("error", "tried_for"),
    [
        (FrameMissing("u", "gone"), 60),
        (FrameUnavailable("u", "down"), 120),
        (FrameRefused("u", "no"), 0),
        (FrameCorrupt("u", "bad"), 0),
        (ValueError("ours"), 0),
    ],
)
def test_what_can_heal_is_tried_for_as_long_as_the_settings_say(error: Exception, tried_for: int) -> None:
    """A missing frame and an unavailable one have their own patience; nothing else is tried again."""
    settings = WorkerSettings(retry_topic="r", retry_delay_s=10, retry_missing_for_s=60, retry_unavailable_for_s=120)
    attempt, now = Attempt("t", 1, 2, 3), 1000.0
    while (following := attempt.following(error, settings, now)) is not None:
        assert following == replace(attempt, number=attempt.number + 1, since_s=1000.0, due_s=now + 10)
        attempt, now = following, following.due_s
    assert now == 1000 + tried_for


def test_first_attempt_in_the_future_is_now() -> None:
    """The clock of the worker that tried first may be ahead: an alert is not tried for longer on that account."""
    settings = WorkerSettings(retry_topic="r", retry_delay_s=10, retry_missing_for_s=60)
    following = Attempt("t", 1, 2, 3, 2, since_s=9000.0).following(FrameMissing("u", "gone"), settings, 1000.0)
    assert following is not None
    assert following.since_s == 1000.0


@pytest.mark.parametrize("other", ["packet_topic", "reject_topic", "input_topic"])
def test_retry_topic_is_one_of_its_own(other: str) -> None:
    """A retry topic that is any other of the worker's is refused."""
    with pytest.raises(ConfigError, match="retry_topic"):
        load(flags={"worker.retry_topic": "one", f"worker.{other}": "one"})
