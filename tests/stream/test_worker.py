"""The loop's shape, without a broker: what a batch is, how the loop ends, and what it does with errors.

The cluster is librdkafka's, in memory and at-least-once; the promise itself is tested on a real broker.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition
from helpers.mock_cluster import MockCluster, make_fatal
from helpers.night import STAR, write_night

import stampworker.stream.intake
from stampworker.config import Settings, load
from stampworker.enrich import Enricher
from stampworker.errors import ConfigError, ProducerFenced, PublishError, TransactionAborted
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.stream.intake import Batch, Intake, PartitionsRevoked
from stampworker.stream.kafka import AtLeastOnce, Record
from stampworker.stream.outcomes import ERRORS_PREFIX, Item
from stampworker.stream.worker import MakePublisher, Worker


@pytest.fixture(scope="module")
def cluster() -> MockCluster:
    """Start one cluster for all tests."""
    return MockCluster()


@pytest.fixture(scope="module")
def alerts(tmp_path_factory: pytest.TempPathFactory) -> list[Alert]:
    """Return a few alerts of one tiny night."""
    frames = write_night(tmp_path_factory.mktemp("night"), planes=("science", "template", "difference"))
    x, y = STAR
    return [Alert(f"a{n}", f"o{n}", x + n / 8, y, fwhm=3.0, frames=frames) for n in range(7)]


@pytest.fixture
def settings(cluster: MockCluster) -> Callable[..., Settings]:
    """Return settings of topics and a group of their own."""

    def make(**more: object) -> Settings:
        topics = {f"worker.{name}_topic": cluster.topic(name) for name in ("input", "packet", "reject")}
        flags = {
            "kafka.bootstrap.servers": cluster.address,
            "kafka.log_level": "0",
            "kafka.fetch.wait.max.ms": "20",
            "worker.guarantee": "at-least-once",
            "worker.group": uuid.uuid4().hex,
            "worker.deadline_s": 10,
            "frames.frame_roots": "/",
            "enrich.radius": 5,
            **topics,
            **{name.replace("__", "."): value for name, value in more.items()},
        }
        return load(flags=flags)

    return make


class Flaky(AtLeastOnce):
    """Fails at its first batches, by the errors that are listed."""

    def __init__(self, settings: Settings, reader: Consumer, errors: list[Exception]) -> None:
        super().__init__(settings, reader)
        self.errors = errors

    def publish(self, records: Sequence[Record], offsets: Sequence[TopicPartition], metadata: object) -> None:
        """Fail, or publish."""
        if self.errors:
            raise self.errors.pop(0)
        super().publish(records, offsets, metadata)


def fails_with(*errors: Exception) -> MakePublisher:
    """Return what makes a publisher that raises these errors, one a batch, and then publishes."""
    return lambda settings, reader, _largest: Flaky(settings, reader, list(errors))


def send(cluster: MockCluster, settings: Settings, alerts: Sequence[Alert], partition: int = 0) -> None:
    cluster.produce(settings.worker.input_topic[0], [encode(a) for a in alerts], partition)


def packet_ids(cluster: MockCluster, settings: Settings, number: int) -> list[str]:
    return sorted(Packet.read(m.value() or b"").alert_id for m in cluster.read(settings.worker.packet_topic, number))


@pytest.mark.slow
def test_drained_worker_publishes_each_alert_and_logs_each_batch(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert], caplog: pytest.LogCaptureFixture
) -> None:
    """Packets and rejects add up to the alerts; a batch is closed by count; one log line each, with stage times."""
    made = settings(worker__batch_count=3)
    send(cluster, made, alerts)
    cluster.produce(made.worker.input_topic[0], [b"no alert"])
    with caplog.at_level(logging.INFO, "stampworker.stream.worker"):
        totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets, totals.rejects, totals.batches, totals.aborts) == (8, 7, 1, 3, 0)
    assert packet_ids(cluster, made, 7) == [a.alert_id for a in alerts]
    (reject,) = cluster.read(made.worker.reject_topic, 1)
    assert (reject.key(), reject.value()) == (b"key", b"no alert")
    assert dict(reject.headers() or [])[ERRORS_PREFIX + "stage"] == b"decode"
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("batch ")]
    assert [line.split()[1:5] for line in lines] == [
        ["alerts=3", "packets=3", "retries=0", "rejects=0"],
        ["alerts=3", "packets=3", "retries=0", "rejects=0"],
        ["alerts=2", "packets=1", "retries=0", "rejects=1"],
    ]
    for line in lines:
        names = [part.split("=")[0] for part in line.split()[5:]]
        assert names == ["bytes_in", "bytes_out", "poll_s", "enrich_s", "publish_s"]


@pytest.mark.parametrize("what", ["packet", "reject"])
def test_header_whose_name_is_no_text(
    cluster: MockCluster,
    settings: Callable[..., Settings],
    alerts: list[Alert],
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """Any client can write one, and ours cannot read it: the alert leaves like others, without headers."""
    made = settings()
    value = encode(alerts[0]) if what == "packet" else b"no alert"
    cluster.produce_with_header(made.worker.input_topic[0], value, b"\xff\xfe")
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets, totals.rejects) == (1, what == "packet", what == "reject")
    assert "a header's name is not UTF-8" in caplog.text


def test_worker_finds_frames_that_alerts_do_not_name(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert]
) -> None:
    """The settings' resolver serves the stream; an alert that it cannot serve is rejected with its stage."""
    folder = alerts[0].frames["science"].rpartition("/")[0]
    templates = {plane: f"{folder}/{{{plane}}}.fits" for plane in ("science", "difference")}
    made = settings(resolve__resolver="template", resolve__templates=templates)
    named: dict[str, Any] = {plane: plane for plane in templates}
    bare = [replace(alert, frames={}, extra=named) for alert in alerts[:2]] + [replace(alerts[2], frames={})]
    send(cluster, made, bare)
    totals = Worker(made, drained=True).run()
    assert (totals.alerts, totals.packets, totals.rejects) == (3, 2, 1)
    found = [Packet.read(m.value() or b"") for m in cluster.read(made.worker.packet_topic, 2)]
    assert {packet.packet_id for packet in found} == {alert.packet_id() for alert in bare[:2]}
    assert {packet.frames["difference"] for packet in found} == {f"file://{alerts[0].frames['difference']}"}
    (reject,) = cluster.read(made.worker.reject_topic, 1)
    headers: dict[str, Any] = dict(reject.headers() or [])
    assert headers[ERRORS_PREFIX + "stage"] == b"frames"
    assert b"template of 'science': found no 'science'" in headers[ERRORS_PREFIX + "exception.message"]


def test_frame_root_that_is_not_there_is_told_before_the_broker_is_asked(settings: Callable[..., Settings]) -> None:
    """What is wrong on this side is said at once, also where no broker answers."""
    nowhere = settings(frames__frame_roots="/nowhere", kafka__bootstrap__servers="127.0.0.1:1")
    with pytest.raises(ConfigError, match="'/nowhere', which is no folder"):
        Worker(nowhere).run()


def test_worker_that_has_no_resolver_does_not_begin(settings: Callable[..., Settings]) -> None:
    """It is said when the worker is made, not at the first alert."""
    with pytest.raises(ConfigError, match="no resolver is called 'absent'"):
        Worker(settings(resolve__resolver="absent"))


def test_aborted_batch_is_read_again_beside_partitions_at_their_end(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert]
) -> None:
    """An abort sets back what was read only: partitions without alerts, at their end, do not keep it from ending."""
    made = settings(worker__batch_count=4)
    send(cluster, made, alerts)
    flaky = fails_with(TransactionAborted("injected"), TransactionAborted("injected again"))
    worker = Worker(made, drained=True, publisher=flaky)
    watchdog = threading.Timer(20, worker.stop)
    watchdog.start()
    totals = worker.run()
    assert not worker.stopping, "the worker never found the end of its input"
    watchdog.cancel()
    assert (totals.aborts, totals.alerts, totals.packets) == (2, 7, 7)
    assert packet_ids(cluster, made, 7) == [a.alert_id for a in alerts]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"worker__batch_bytes": 1}, {"worker__batch_s": 1e-9}])
def test_batch_is_closed_by_bytes_and_by_time(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert], limit: dict[str, object]
) -> None:
    """A batch is closed at its number of bytes, and at its age, whatever the count allows."""
    made = settings(**limit)
    send(cluster, made, alerts[:3])
    assert Worker(made, drained=True).run().batches == 3


def test_frames_are_opened_while_the_batch_before_is_computed(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch but the last is computed only after the frames of the next have been opened, in another thread."""
    made = settings(worker__batch_count=2)
    send(cluster, made, alerts)
    opened = threading.Semaphore(0)
    threads = set()

    prefetch, enrich = Enricher.prefetch, Enricher.enrich

    def spy_prefetch(*args: Any) -> Any:
        threads.add(threading.current_thread())
        prefetched = prefetch(*args)
        opened.release()
        return prefetched

    left = [4]  # batches

    def spy_enrich(*args: Any) -> Any:
        left[0] -= 1
        assert opened.acquire(timeout=10)  # this batch's
        if left[0]:
            assert opened.acquire(timeout=10), "the next batch's frames are not opened yet"
            opened.release()
        return enrich(*args)

    monkeypatch.setattr(Enricher, "prefetch", spy_prefetch)
    monkeypatch.setattr(Enricher, "enrich", spy_enrich)
    worker = Worker(made, drained=True)
    totals = worker.run()
    assert (totals.packets, totals.batches, left) == (7, 4, [0])
    assert threading.current_thread() not in threads


def test_stop_publishes_what_was_read(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is stopped within a batch publishes it, and ends without an error."""
    made = settings(worker__batch_s=600)
    send(cluster, made, alerts)
    worker = Worker(made)
    accept = Intake._accept

    def stop_at_the_fifth(intake: Intake, item: Item, batch: Batch) -> None:
        if item.message.offset() == 4:
            worker.stop()
        accept(intake, item, batch)

    monkeypatch.setattr(Intake, "_accept", stop_at_the_fifth)
    totals = worker.run()
    assert (totals.alerts, totals.batches) == (5, 1)
    assert cluster.committed(made.worker.group, made.worker.input_topic[0]) == 5


@pytest.mark.parametrize("error", [PublishError("injected"), RuntimeError("injected")])
def test_publisher_that_cannot_go_on_ends_the_worker(
    cluster: MockCluster,
    settings: Callable[..., Settings],
    alerts: list[Alert],
    error: Exception,
) -> None:
    """An error of the publisher's thread, foreseen or not, ends the worker with that error; nothing is committed."""
    made = settings()
    send(cluster, made, alerts)
    with pytest.raises(type(error), match="injected"):
        Worker(made, drained=True, publisher=fails_with(error)).run()
    assert cluster.committed(made.worker.group, made.worker.input_topic[0]) == OFFSET_INVALID


def test_fatal_error_of_the_consumer_ends_the_worker(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that reads no more (its static identity taken by another, say) ends the worker: it never idles."""
    monkeypatch.setattr(stampworker.stream.intake, "_CLOSE_S", 0.5)  # such a consumer never closes
    on_assign = Intake._on_assign

    def then_fail(intake: Intake, consumer: Consumer, partitions: Any) -> None:
        on_assign(intake, consumer, partitions)
        make_fatal(intake.consumer)

    monkeypatch.setattr(Intake, "_on_assign", then_fail)
    worker = Worker(settings())
    watchdog = threading.Timer(15, worker.stop)
    watchdog.start()
    with pytest.raises(PublishError, match="the consumer cannot go on: Fatal error"):
        worker.run()
    watchdog.cancel()


def test_error_of_the_client_is_one_of_ours(
    cluster: MockCluster, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client raises where nothing else is foreseen comes out as a PublishError, with its reason."""

    def fail(*_: object) -> int:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no watermarks"))

    worker = Worker(settings(), drained=True)
    monkeypatch.setattr(Intake, "_end", fail)
    with pytest.raises(PublishError, match="kafka: no watermarks"):
        worker.run()


def test_consumer_that_never_closes_does_not_keep_the_worker(
    cluster: MockCluster, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Closing the consumer is bounded in time."""
    released = threading.Event()

    class Hanging:
        def close(self) -> None:
            released.wait(30)

    monkeypatch.setattr(stampworker.stream.intake, "_CLOSE_S", 0.1)
    intake = Intake(Settings(), threading.Event())
    intake.consumer = Hanging()  # type: ignore[assignment]
    began = time.monotonic()
    intake.close()
    released.set()
    assert time.monotonic() - began < 5
    assert "did not close within 0.1 s" in caplog.text


def test_given_ends_leave_the_rest_alone(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert]
) -> None:
    """With ends given, alerts from there on and partitions that are not named are left unread."""
    made = settings()
    send(cluster, made, alerts, partition=0)
    send(cluster, made, alerts, partition=1)
    totals = Worker(made, ends={(made.worker.input_topic[0], 0): 3}).run()
    assert totals.alerts == 3
    assert packet_ids(cluster, made, 3) == ["a0", "a1", "a2"]


def test_two_input_topics(cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert]) -> None:
    """A worker reads all of its input topics."""
    made = settings(worker__input_topic=",".join(both := [cluster.topic("one"), cluster.topic("two")]))
    for topic, part in zip(both, (alerts[:3], alerts[3:]), strict=True):
        cluster.produce(topic, [encode(a) for a in part])
    assert Worker(made, drained=True).run().packets == 7


def test_pattern_of_topics_is_refused(settings: Callable[..., Settings]) -> None:
    """A pattern, which librdkafka would take, is refused by name."""
    with pytest.raises(ConfigError, match=r"found the pattern '\^alerts\.\*', wanted the name of a topic"):
        Worker(settings(worker__input_topic="^alerts.*"), drained=True).run()


def test_stop_after_an_abort_commits_nothing_behind_it(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert]
) -> None:
    """A batch aborts while the worker stops: what was read behind it must not be committed in its place."""
    made = settings(worker__batch_count=3, worker__batch_s=600)  # two batches, and an alert that waits for a third
    send(cluster, made, alerts)

    class Stopping(AtLeastOnce):
        def publish(self, *args: Any) -> None:
            if worker.stopping:
                super().publish(*args)
            time.sleep(0.5)  # until the alert that waits is read
            worker.stop()
            raise TransactionAborted("injected")

    worker = Worker(made, publisher=lambda made, reader, _largest: Stopping(made, reader))
    totals = worker.run()
    assert (totals.aborts, totals.packets) == (1, 0)
    assert cluster.committed(made.worker.group, made.worker.input_topic[0]) == OFFSET_INVALID


@pytest.mark.slow
def test_lost_partitions_are_read_again_only_after_what_is_being_published(
    cluster: MockCluster, settings: Callable[..., Settings], alerts: list[Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions are lost while a batch is being published: its commit counts before the offsets are asked for."""
    made = settings(worker__batch_count=3)
    send(cluster, made, alerts)
    publishing = threading.Event()

    class Slow(AtLeastOnce):
        def publish(self, *args: Any) -> None:
            publishing.set()
            time.sleep(0.5)
            super().publish(*args)

    read = Intake._read
    lost: list[Intake] = []

    def lose_once(intake: Intake, batch: Batch, wait_s: float) -> bool:
        if publishing.is_set() and not lost:
            lost.append(intake)
            raise PartitionsRevoked
        return read(intake, batch, wait_s)

    monkeypatch.setattr(Intake, "_read", lose_once)
    worker = Worker(made, drained=True, publisher=lambda made, reader, _largest: Slow(made, reader))
    totals = worker.run()
    assert lost
    assert (totals.alerts, totals.packets) == (7, 7)
    assert packet_ids(cluster, made, 7) == [a.alert_id for a in alerts]


class FakeMessage:
    """A record of the topic ``alerts``, or the end of a partition."""

    def __init__(self, partition: int, offset: int, error: KafkaError | None = None) -> None:
        self._partition, self._offset, self._error = partition, offset, error

    def __getattr__(self, name: str) -> Callable[[], Any]:
        values = {"topic": "alerts", "partition": self._partition, "offset": self._offset, "error": self._error}
        return lambda: {**values, "value": b"{}", "timestamp": (1, 0), "headers": None}[name]


class RevokingConsumer:
    """A consumer whose poll takes partition 0 away and returns a message, in one call."""

    def __init__(self, intake: Intake, message: FakeMessage) -> None:
        self.intake, self.message = intake, message
        self.sought: list[tuple[int, int]] = []

    def poll(self, _timeout: float) -> Any:
        """Revoke, and return the message."""
        self.intake._on_revoke(self, [TopicPartition("alerts", 0)])  # type: ignore[arg-type]
        return self.message

    def committed(self, partitions: list[TopicPartition], **_: object) -> list[TopicPartition]:
        """Return that nothing is committed."""
        return [TopicPartition(p.topic, p.partition, OFFSET_INVALID) for p in partitions]

    def seek(self, to: TopicPartition) -> None:
        """Note where a partition is set back to."""
        self.sought.append((to.partition, to.offset))

    def get_watermark_offsets(self, *_: object, **__: object) -> tuple[int, int]:
        """Return the same for every partition."""
        return 0, 7


def revoked_while_reading(message: FakeMessage) -> tuple[Intake, RevokingConsumer]:
    """Poll a message in the call that takes another partition away, and start over."""
    intake = Intake(Settings(), threading.Event(), drained=True)
    fake = RevokingConsumer(intake, message)
    intake.consumer = fake  # type: ignore[assignment]
    intake._on_assign(fake, [TopicPartition("alerts", 0), TopicPartition("alerts", 1)])  # type: ignore[arg-type]
    with pytest.raises(PartitionsRevoked):
        intake.poll_batch(wait=True)
    intake.rewind()
    return intake, fake


def test_first_alert_of_a_partition_survives_a_revocation_in_the_same_poll() -> None:
    """An alert that is returned by the poll in which another partition is revoked is read again, not skipped."""
    intake, fake = revoked_while_reading(FakeMessage(1, 5))
    assert fake.sought == [(1, 5)]
    assert intake.is_empty


def test_end_of_a_partition_survives_a_revocation_in_the_same_poll() -> None:
    """The event that a partition is at its end comes once: it counts although another partition is revoked."""
    intake, fake = revoked_while_reading(FakeMessage(1, 7, KafkaError(KafkaError._PARTITION_EOF)))
    assert fake.sought == []
    assert intake.has_ended


class IdleConsumer(RevokingConsumer):
    """A consumer whose poll calls what it is given, and returns nothing."""

    def __init__(self, *callbacks: Callable[[], object]) -> None:
        self.callbacks, self.polls = callbacks, 0

    def poll(self, _timeout: float) -> Any:
        """Call the callbacks."""
        self.polls += 1
        for callback in self.callbacks:
            callback()


def test_error_of_the_publisher_outlives_another_callback_of_the_same_poll() -> None:
    """A worker that was fenced while partitions were revoked ends with that error, although others are lost then."""

    def fenced() -> None:
        raise ProducerFenced("injected")

    intake = Intake(Settings(), threading.Event(), drained=True, before_revoke=fenced)
    zero, one = TopicPartition("alerts", 0), TopicPartition("alerts", 1)
    reader: Any = IdleConsumer(lambda: intake._on_revoke(reader, [zero]), lambda: intake._on_lost(reader, [one]))
    intake.consumer = reader
    intake._on_assign(reader, [zero, one])
    with pytest.raises(ProducerFenced, match="injected"):
        intake.poll_batch(wait=True)


def test_drained_worker_that_loses_all_partitions_has_not_ended() -> None:
    """Without an assignment, after the session expired, a drained worker waits until it has joined again."""
    intake = Intake(Settings(), threading.Event(), drained=True)
    reader: Any = None
    intake._on_assign(reader, [TopicPartition("alerts", 0)])
    intake._on_lost(reader, [TopicPartition("alerts", 0)])
    assert not intake.has_ended


def test_batch_that_is_old_already_is_polled_for_before_it_is_closed() -> None:
    """However long the batch before took, every turn polls: else the group takes the worker for dead."""
    intake = Intake(Settings(), threading.Event())
    reader: Any = IdleConsumer()
    intake.consumer = reader
    reader.consumer_group_metadata = lambda: b"metadata"
    message: Any = FakeMessage(0, 3)
    intake._take(message, intake._filling)
    intake._filling.started -= 60
    batch = intake.poll_batch(wait=True)
    assert batch is not None
    assert (reader.polls, len(batch.items), batch.metadata) == (1, 1, b"metadata")
