"""The publishers' table of errors, and how the clients are configured; without a broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from helpers.mock_cluster import PRODUCE, MockCluster

import stampworker.stream.kafka
from stampworker.config import Settings, load
from stampworker.errors import ConfigError, ProducerFenced, PublishError, TransactionAborted
from stampworker.stream.kafka import (
    AtLeastOnce,
    ExactlyOnce,
    Record,
    RecordTooLarge,
    check_topics,
    committed,
    consumer,
    producer,
    publish_all,
)

RECORD = Record("packets", b"key", b"value")


def error(code: int, **flags: bool) -> KafkaException:
    return KafkaException(KafkaError(code, "injected", **flags))


class ScriptedProducer:
    """A transactional producer that notes its calls and fails at those that are scripted."""

    def __init__(self, calls: list[str], script: dict[str, list[BaseException]]) -> None:
        self.calls, self.script = calls, script

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.script.get(name):
            raise self.script[name].pop(0)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: self._call(name)


Scripted = Callable[..., tuple[ExactlyOnce, list[str]]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Make a publisher whose producers share one script: method → errors of its next calls; and their calls."""

    def make(
        settings: Settings | None = None, clock: Callable[[], float] = time.monotonic, **script: list[BaseException]
    ) -> tuple[ExactlyOnce, list[str]]:
        calls: list[str] = []
        monkeypatch.setattr(stampworker.stream.kafka, "_PAUSE_S", 0.001)
        made: Any = ScriptedProducer
        publisher = ExactlyOnce(settings or Settings(), make_producer=lambda *_, **__: made(calls, script), clock=clock)
        return publisher, calls

    return make


def publish(publisher: ExactlyOnce | AtLeastOnce, records: Sequence[Record] = (RECORD,)) -> None:
    publisher.publish(records, [TopicPartition("alerts", 0, 1)], b"metadata")


def test_transaction_in_order(scripted: Scripted) -> None:
    """Begin, produce, offsets, commit."""
    publisher, calls = scripted()
    publish(publisher)
    assert [c for c in calls if c != "poll"] == [
        "begin_transaction",
        "produce",
        "send_offsets_to_transaction",
        "commit_transaction",
    ]


@pytest.mark.parametrize("step", ["produce", "send_offsets_to_transaction", "commit_transaction"])
def test_error_that_asks_for_an_abort_aborts(scripted: Scripted, step: str) -> None:
    """An abortable error ends the transaction and asks for the batch to be read again."""
    publisher, calls = scripted(**{step: [error(KafkaError.ILLEGAL_GENERATION, txn_requires_abort=True)]})
    with pytest.raises(TransactionAborted, match="injected") as caught:
        publish(publisher)
    assert calls[-1] == "abort_transaction"
    assert not caught.value.too_large


def test_retriable_error_repeats_the_same_call(scripted: Scripted) -> None:
    """A retriable error repeats that call and no other."""
    publisher, calls = scripted(commit_transaction=[error(KafkaError._TIMED_OUT, retriable=True)] * 3)
    publish(publisher)
    assert calls.count("commit_transaction") == 4
    assert calls.count("begin_transaction") == 1


def test_retries_end_at_the_deadline_with_a_new_producer(scripted: Scripted) -> None:
    """A call that never answers ends at the deadline: the outcome is not known, and a new producer settles it."""
    settings = load(flags={"worker.deadline_s": 0.05})
    publisher, calls = scripted(settings, commit_transaction=[error(KafkaError._TIMED_OUT, retriable=True)] * 10_000)
    began = time.monotonic()
    with pytest.raises(TransactionAborted, match="injected"):
        publish(publisher)
    assert time.monotonic() - began < 5
    assert calls[-1] == "init_transactions"
    # Each repetition waits: an error that comes at once does not become a busy loop.
    assert 1 < calls.count("commit_transaction") < 60


@pytest.mark.parametrize("step", ["begin_transaction", "commit_transaction"])
def test_fatal_error_ends_the_publisher(scripted: Scripted, step: str) -> None:
    """A fatal error is no abort: nothing can go on."""
    publisher, _ = scripted(**{step: [error(KafkaError._FATAL, fatal=True)]})
    with pytest.raises(PublishError, match="the producer cannot go on: injected") as caught:
        publish(publisher)
    assert type(caught.value) is PublishError


@pytest.mark.parametrize("code", [KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH])
def test_fenced_producer_names_its_slot(scripted: Scripted, code: int) -> None:
    """Fenced within the transaction's time: another worker has the slot."""
    publisher, _ = scripted(commit_transaction=[error(code, fatal=True)])
    with pytest.raises(ProducerFenced, match=r"another worker took the transactional id 'stampworker-\d+'"):
        publish(publisher)


def test_transaction_that_outlived_its_time_is_read_again(scripted: Scripted) -> None:
    """A broker that was away for longer than the transaction's time fences, too; the worker goes on all the same."""
    times = iter(range(0, 10_000, 11))
    publisher, calls = scripted(
        clock=lambda: float(next(times)), commit_transaction=[error(KafkaError._FENCED, fatal=True)]
    )
    with pytest.raises(TransactionAborted, match=r"over worker\.transaction_timeout_s: injected"):
        publish(publisher)
    assert calls[-2:] == ["purge", "init_transactions"]


def test_abort_that_fails_makes_a_new_producer(scripted: Scripted) -> None:
    """An abort without an answer is settled by a new producer under the same id."""
    publisher, calls = scripted(
        commit_transaction=[error(KafkaError.UNKNOWN_MEMBER_ID, txn_requires_abort=True)],
        abort_transaction=[error(KafkaError._TIMED_OUT)],
    )
    with pytest.raises(TransactionAborted, match="injected"):
        publish(publisher)
    assert calls[-3:] == ["abort_transaction", "purge", "init_transactions"]


def test_new_producer_that_cannot_start_ends_the_publisher(scripted: Scripted) -> None:
    """Without a new producer nothing can go on."""
    publisher, _ = scripted(
        commit_transaction=[error(KafkaError._TIMED_OUT)], init_transactions=[error(KafkaError._FENCED)]
    )
    with pytest.raises(PublishError, match="no new producer: injected"):
        publish(publisher)


def test_id_that_cannot_be_taken_is_named(scripted: Scripted) -> None:
    """A start that fails says which id, and why."""
    publisher, _ = scripted(init_transactions=[error(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED)])
    with pytest.raises(PublishError, match=r"the transactional id 'stampworker-\d+' cannot be taken: injected"):
        publisher.start()


def test_full_queue_is_polled_and_goes_on(scripted: Scripted) -> None:
    """A full queue does not harm the transaction."""
    publisher, calls = scripted(produce=[BufferError(), BufferError()])
    publish(publisher)
    assert calls.count("produce") == 3
    assert calls[-1] == "commit_transaction"


def test_queue_that_stays_full_aborts_the_transaction(scripted: Scripted) -> None:
    """At the deadline the transaction is ended, not left open for readers to wait for."""
    settings = load(flags={"worker.deadline_s": 0.05})
    publisher, calls = scripted(settings, produce=[BufferError()] * 1_000_000)
    with pytest.raises(TransactionAborted, match="stayed full"):
        publish(publisher)
    assert calls[-1] == "abort_transaction"


def test_record_too_large_aborts_and_says_which(scripted: Scripted) -> None:
    """A record that the client refuses is named by its place, and the transaction is ended."""
    publisher, calls = scripted()
    sizes = iter([None, None, error(KafkaError.MSG_SIZE_TOO_LARGE)])

    def produce(*_args: object, **_kwargs: object) -> None:
        if (problem := next(sizes)) is not None:
            raise problem

    publisher._producer.produce = produce  # type: ignore[method-assign]
    with pytest.raises(RecordTooLarge, match="'packets': found 5 bytes: injected") as caught:
        publish(publisher, [RECORD] * 5)
    assert caught.value.index == 2
    assert calls[-1] == "abort_transaction"


def test_batch_that_the_topic_refuses_for_its_size_is_marked(scripted: Scripted) -> None:
    """The abort says that the topic refused the size, because the same batch would be refused again."""
    publisher, _ = scripted(commit_transaction=[error(KafkaError.MSG_SIZE_TOO_LARGE, txn_requires_abort=True)])
    with pytest.raises(TransactionAborted, match="injected") as caught:
        publish(publisher)
    assert caught.value.too_large


# -- at-least-once, on the mock cluster -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> MockCluster:
    return MockCluster()


@pytest.fixture
def settings(cluster: MockCluster) -> Settings:
    flags = {"kafka.bootstrap.servers": cluster.address, "kafka.log_level": "0", "worker.group": uuid.uuid4().hex}
    return load(flags={**flags, "worker.deadline_s": 5})


def at_least_once(settings: Settings) -> tuple[AtLeastOnce, Any]:
    reader = consumer(settings)
    return AtLeastOnce(settings, reader), reader


def test_at_least_once_commits_behind_the_records(cluster: MockCluster, settings: Settings) -> None:
    """Records are delivered, then the offsets are committed."""
    topic = cluster.topic()
    publisher, reader = at_least_once(settings)
    publisher.publish([Record(topic, b"k", b"v", [("h", b"1")])], [TopicPartition(topic, 0, 1)], None)
    assert [m.value() for m in cluster.read(topic, 1)] == [b"v"]
    assert committed(reader, [TopicPartition(topic, 0)], 5)[0].offset == 1
    publisher.close()
    reader.close()


def test_at_least_once_marks_what_the_topic_refuses_for_its_size(cluster: MockCluster, settings: Settings) -> None:
    """A topic that refuses a size would refuse it again: the abort says so, and nothing is committed."""
    topic = cluster.topic()
    publisher, reader = at_least_once(settings)
    cluster.fail_next(PRODUCE, KafkaError.MSG_SIZE_TOO_LARGE)
    with pytest.raises(TransactionAborted, match="not published") as caught:
        publisher.publish([Record(topic, b"k", b"v")], [TopicPartition(topic, 0, 1)], None)
    assert caught.value.too_large
    assert committed(reader, [TopicPartition(topic, 0)], 5)[0].offset < 0
    publisher.close()
    reader.close()


def test_at_least_once_ends_with_its_producer(settings: Settings) -> None:
    """A producer that takes nothing any more ends the publisher by one of our errors."""
    calls: list[str] = []
    script: dict[str, list[BaseException]] = {"produce": [error(KafkaError._FATAL, fatal=True)]}
    made: Any = ScriptedProducer(calls, script)
    reader: Any = None
    with pytest.raises(PublishError, match="the producer cannot go on: injected"):
        publish(AtLeastOnce(settings, reader, make_producer=lambda *_, **__: made))


def test_records_that_are_not_delivered_are_counted(cluster: MockCluster, settings: Settings) -> None:
    """Publishing outside of transactions says how many records were not delivered, and why."""
    cluster.fail_next(PRODUCE, KafkaError.MSG_SIZE_TOO_LARGE)
    with pytest.raises(PublishError, match="1 records not delivered: Broker: Message size too large"):
        publish_all(settings, [Record(cluster.topic(), b"k", b"v")])


def test_unknown_offsets_are_not_taken_for_none() -> None:
    """A partition whose committed offset could not be read raises: starting over would double what was committed."""
    place = TopicPartition("alerts", 0)

    class Reader:
        def committed(self, places: list[Any], timeout: float) -> list[Any]:
            class Found:
                topic, partition, offset = place.topic, place.partition, -1001
                error = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT, "unstable")

            return [Found()]

    with pytest.raises(KafkaException, match="unstable"):
        committed(Reader(), [place], 1)  # type: ignore[arg-type]


# -- configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["enable.auto.commit", "auto.offset.reset", "transactional.id", "isolation.level", "enable.idempotence"]
)
def test_property_that_the_promise_hangs_on_is_refused(name: str) -> None:
    """What the worker must set itself cannot be set, on any client."""
    made = load(flags={f"kafka.{name}": "false"})
    for build in (lambda: consumer(made), lambda: producer(made, transactional=False)):
        with pytest.raises(ConfigError, match=rf"'{name}' is the worker's own to set, found 'false'"):
            build()


def test_unknown_property_is_refused_by_name() -> None:
    """What librdkafka does not know comes out as a ConfigError that names it."""
    with pytest.raises(ConfigError, match=r'No such configuration property: "no\.such"'):
        consumer(load(flags={"kafka.no.such": "1"}))


def test_each_client_gets_its_own_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumer properties don't reach the producer, nor the other way; shared ones reach both."""
    seen: list[dict[str, Any]] = []
    for name in ("Consumer", "Producer"):
        monkeypatch.setattr(stampworker.stream.kafka, name, lambda values, logger: seen.append(values))
    names = ("session.timeout.ms", "fetch.min.bytes", "linger.ms", "compression.type", "security.protocol")
    made = load(flags={f"kafka.{name}": "7" for name in names})
    consumer(made)
    producer(made, transactional=True, largest=5000)
    assert {name for name in names if name in seen[0]} == {"session.timeout.ms", "fetch.min.bytes", "security.protocol"}
    assert {name for name in names if name in seen[1]} == {"linger.ms", "compression.type", "security.protocol"}
    assert seen[0]["isolation.level"] == "read_committed"
    assert seen[0]["auto.offset.reset"] == "earliest"
    assert (seen[1]["transactional.id"], seen[1]["message.max.bytes"]) == (made.worker.transactional_id(), 5000)


def test_broker_assigns_where_it_can() -> None:
    """With the broker's own group protocol no strategy is named, which librdkafka would refuse."""
    consumer(load(flags={"kafka.group.protocol": "consumer", "kafka.log_level": "0"})).close()


def test_topics_are_checked(cluster: MockCluster, settings: Settings) -> None:
    """Partitions are counted; a missing topic, a pattern and a missing address are named."""
    topic = cluster.topic()
    assert check_topics(settings, [topic]) == {topic: 4}
    with pytest.raises(ConfigError, match="found no topic 'nowhere'"):
        check_topics(settings, ["nowhere"])
    with pytest.raises(ConfigError, match=r"found the pattern '\^a'"):
        check_topics(settings, ["^a"])
    with pytest.raises(ConfigError, match=r"kafka\.bootstrap\.servers: found nothing"):
        check_topics(load(flags={"kafka.bootstrap.servers": ""}), [topic])


def test_unknown_property_names_the_nearest() -> None:
    """A slip in [kafka] is a ConfigError that names what was meant."""
    with pytest.raises(ConfigError, match=r"bootstrap\.server.*the nearest known is 'bootstrap\.servers'"):
        stampworker.stream.kafka.admin(load(flags={"kafka.bootstrap.server": "localhost:1"}))
