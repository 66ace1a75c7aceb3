"""Kafka clients: how they are built, what their errors mean, and how a batch is published.

Two promises, one interface (`Publisher`):

- `ExactlyOnce`: records and next offsets in one transaction;
- `AtLeastOnce`: records first, then offsets, for brokers without transactions.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from stampworker.config import Settings, nearest
from stampworker.errors import BrokerUnavailable, ConfigError, ProducerFenced, PublishError, TransactionAborted

log = logging.getLogger(__name__)
_client_log = logging.getLogger("stampworker.librdkafka")

Headers = Sequence[tuple[str, str | bytes | None]]
Partition = tuple[str, int]
"""Topic and number of a partition."""

_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED)
_CONTACT_S = 15.0
_LEAST_CALL_S = 1.0
_PAUSE_S = 0.1
# A topic's limit is compared with a batch of records, which adds a header of 61 bytes and some 30 bytes a record. The
# client counts neither when it takes a record.
_FRAMING = 128
_LEAST_LIMIT = 1000  # message.max.bytes cannot be less
# The promise depends on these properties; a user's value would break it silently.
_CONSUMER = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",
}
_PRODUCER = {"enable.idempotence": True}
_RESERVED = (*_CONSUMER, *_PRODUCER, "group.id", "transactional.id", "transaction.timeout.ms")
# Common properties, to suggest the nearest name; librdkafka knows hundreds and cannot list them.
_COMMON = (
    *("bootstrap.servers", "client.id", "client.rack", "security.protocol", "debug", "log_level"),
    *("sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password", "sasl.oauthbearer.config"),
    *("ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.key.password"),
    *("group.protocol", "group.instance.id", "session.timeout.ms", "heartbeat.interval.ms", "max.poll.interval.ms"),
    *("fetch.min.bytes", "fetch.max.bytes", "fetch.wait.max.ms", "max.partition.fetch.bytes", "queued.min.messages"),
    *("compression.type", "linger.ms", "batch.size", "message.max.bytes", "queue.buffering.max.messages"),
    *("partition.assignment.strategy", "socket.timeout.ms", "topic.metadata.refresh.interval.ms"),
)
# [kafka] serves both clients, and each would warn of the other's properties.
_CONSUMER_ONLY = re.compile(
    r"(group|session|heartbeat|fetch|queued|auto\.offset|partition\.assignment|coordinator|max\.poll)\..*|check\.crcs"
)
_PRODUCER_ONLY = re.compile(
    r"(batch|compression|queue\.buffering|linger|message\.timeout|retries|retry\.backoff|acks|partitioner|sticky)\b.*"
)


class Record(NamedTuple):
    """One record to publish."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class RecordTooLarge(PublishError):
    """A record, the one at ``index`` of those that were to be published, is larger than its topic takes."""

    def __init__(self, problem: str, index: int) -> None:
        super().__init__(problem)
        self.index = index


def partition_of(message: Message) -> Partition:
    """Return the topic and the partition of a message."""
    return str(message.topic()), int(message.partition() or 0)


def offset_of(message: Message) -> int:
    """Return the offset of a message."""
    offset = message.offset()
    if offset is None:
        raise PublishError(f"the consumer gave a record of {message.topic()} without an offset")
    return offset


def consumer(settings: Settings) -> Consumer:
    """Build the consumer of a worker: it commits nothing by itself, and reports the ends of partitions.

    Raises
    ------
    ConfigError
        librdkafka refuses a property.
    """
    own = {**_CONSUMER, "group.id": settings.worker.group}
    if settings.kafka.get("group.protocol") != "consumer":  # with which the broker assigns
        own["partition.assignment.strategy"] = "cooperative-sticky"
    return cast(Consumer, _build(Consumer, settings, own, _PRODUCER_ONLY))


def producer(settings: Settings, *, transactional: bool, largest: int | None = None) -> Producer:
    """Build the producer of a worker, for records of up to ``largest`` bytes; see `consumer`."""
    own: dict[str, Any] = {**_PRODUCER, "linger.ms": 5}
    if largest is not None:
        own["message.max.bytes"] = largest
        # The broker compares a topic's limit with a whole batch of records.
        own["batch.size"] = min(largest, 1_000_000)
    if transactional:
        own["transactional.id"] = settings.worker.transactional_id()
        own["transaction.timeout.ms"] = int(settings.worker.transaction_timeout_s * 1000)
    return cast(Producer, _build(Producer, settings, own, _CONSUMER_ONLY))


def admin(settings: Settings) -> AdminClient:
    """Build an admin client; see `consumer`."""
    return cast(AdminClient, _build(AdminClient, settings, {}, _CONSUMER_ONLY))


def _build(client: Callable[..., Any], settings: Settings, own: Mapping[str, Any], not_for_it: re.Pattern[str]) -> Any:
    for name in _RESERVED:
        if name in settings.kafka:
            raise ConfigError(f"kafka: {name!r} is the worker's own to set, found {settings.kafka[name]!r}")
    shared = {name: value for name, value in settings.kafka.items() if not not_for_it.fullmatch(name)}
    try:
        return client({**own, **shared}, logger=_client_log)
    except KafkaException as exc:
        unknown = [name for name in shared if f'"{name}"' in exc.args[0].str()]
        hint = nearest(unknown[0], _COMMON) if unknown else ""
        raise ConfigError(f"kafka: {exc.args[0].str()}{hint}") from exc


def check_topics(settings: Settings, topics: Sequence[str]) -> dict[str, int]:
    """Return the number of partitions of each topic.

    Raises
    ------
    ConfigError
        No broker is named, a topic is a pattern, or a topic does not exist.
    BrokerUnavailable
        No broker answers.
    """
    servers = settings.kafka.get("bootstrap.servers")
    if not servers:
        raise ConfigError("kafka.bootstrap.servers: found nothing, wanted host:port of a broker")
    for topic in topics:
        if topic.startswith("^"):  # a pattern to librdkafka
            raise ConfigError(f"kafka: found the pattern {topic!r}, wanted the name of a topic")
    try:
        known = admin(settings).list_topics(timeout=_CONTACT_S).topics
    except KafkaException as exc:
        raise BrokerUnavailable(f"no answer from {servers} within {_CONTACT_S:g} s: {exc.args[0].str()}") from exc
    for topic in topics:
        if topic not in known:
            raise ConfigError(f"kafka: found no topic {topic!r} at {servers}; create it first")
    return {topic: len(known[topic].partitions) for topic in topics}


def committed(reader: Consumer, partitions: Sequence[TopicPartition], timeout: float) -> list[TopicPartition]:
    """Return the group's committed offsets; ``OFFSET_INVALID`` where none is committed.

    Raises
    ------
    KafkaException
        A partition's offset is not known now, which is not the same as none.
    """
    found = reader.committed(list(partitions), timeout=timeout)
    for partition in found:
        if partition.error is not None:
            raise KafkaException(partition.error)
    return found


def message_limit(settings: Settings, topic: str) -> int | None:
    """Return the size of the largest record that a topic takes, bytes; None where the broker does not say."""
    resource = ConfigResource(ResourceType.TOPIC, topic)
    client = admin(settings)  # the answer arrives only while the client exists
    try:
        entries = client.describe_configs([resource], request_timeout=_CONTACT_S)[resource].result()
    except KafkaException as exc:
        log.warning("topic %s: the broker does not say its limits: %s", topic, exc.args[0].str())
        return None
    return max(int(entries["max.message.bytes"].value) - _FRAMING, _LEAST_LIMIT)


def publish_all(settings: Settings, records: Iterable[Record]) -> None:
    """Publish records outside of any transaction, and wait until the broker has them.

    Raises
    ------
    PublishError
        A record was not delivered.
    """
    deadline = time.monotonic() + settings.worker.deadline_s
    to = producer(settings, transactional=False)
    try:
        failed = _produce_all(to, records, deadline)
    except KafkaException as exc:
        raise PublishError(exc.args[0].str()) from exc
    left = to.flush(settings.worker.deadline_s)
    if left or failed:
        reason = failed[0].str() if failed else f"no answer within {settings.worker.deadline_s:g} s"
        raise PublishError(f"{left + len(failed)} records not delivered: {reason}")


class Publisher(Protocol):
    """Publishes batches; `publish` returns when the batch is committed."""

    def start(self) -> None:
        """Prepare to publish; called once."""

    def publish(self, records: Sequence[Record], offsets: Sequence[TopicPartition], metadata: object) -> None:
        """Publish records and commit the next offsets to read.

        Raises
        ------
        TransactionAborted
            Nothing of the batch counts: read again from the last commit.
        RecordTooLarge
            One record is too large. Nothing of the batch counts.
        ProducerFenced
            Another worker took this worker's slot.
        PublishError
            Publishing cannot go on.
        """

    def resize(self, largest: int) -> None:
        """Take records of up to ``largest`` bytes from now on; never call it while a batch is being published."""

    def close(self) -> None:
        """Disconnect from the broker."""


class ExactlyOnce:
    """Records of up to ``largest`` bytes, and offsets, in one transaction.

    ``make_producer`` has the arguments of `producer`; ``clock`` returns monotonic time in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        largest: int | None = None,
        *,
        make_producer: Callable[..., Producer] = producer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._largest = settings, largest
        self._make_producer, self._clock = make_producer, clock
        self._producer = make_producer(settings, transactional=True, largest=largest)

    def start(self) -> None:
        """Take the transactional id: the worker that had it is fenced, and its open transaction is aborted."""
        try:
            self._until(self._producer.init_transactions, self._clock() + self._settings.worker.deadline_s)
        except KafkaException as exc:
            who = self._settings.worker.transactional_id()
            raise PublishError(f"the transactional id {who!r} cannot be taken: {exc.args[0].str()}") from exc

    def publish(self, records: Sequence[Record], offsets: Sequence[TopicPartition], metadata: object) -> None:
        """See `Publisher.publish`."""
        deadline = self._clock() + self._settings.worker.deadline_s
        try:
            # 2. Begin a transaction and publish packets, retries and rejects.
            self._producer.begin_transaction()
            for index, record in enumerate(records):
                _produce(self._producer, record, index, deadline, self._clock)
            # 3. Add the next offsets, with the group's metadata as it was when the batch was read.
            self._until(lambda s: self._producer.send_offsets_to_transaction(list(offsets), metadata, s), deadline)
            # 4. Commit.
            self._until(self._producer.commit_transaction, deadline)
        except (RecordTooLarge, TransactionAborted):  # of `_produce`: the transaction is still open
            self._abort(deadline)
            raise
        except KafkaException as exc:
            self._after(exc.args[0], deadline)

    def resize(self, largest: int) -> None:
        """See `Publisher.resize`."""
        self._largest = largest
        self._replace(self._clock() + self._settings.worker.deadline_s)

    def close(self) -> None:
        """Disconnect; the broker, or the next worker in this slot, aborts an open transaction."""
        try:
            self._producer.purge()
            self._producer.flush(_LEAST_CALL_S)
        except KafkaException as exc:  # a fenced producer has nothing to flush
            log.info("closing the producer: %s", exc.args[0].str())

    def _until(self, call: Callable[[float], object], deadline: float) -> None:
        """Repeat one call while its error is retriable, until it succeeds or the deadline has passed."""
        while True:
            left = deadline - self._clock()
            try:
                call(max(left, _LEAST_CALL_S))
            except KafkaException as exc:
                if not exc.args[0].retriable() or left <= 0:
                    raise
                log.warning("%s; trying again for %.0f s", exc.args[0].str(), left)
                time.sleep(_PAUSE_S)  # the error may have come at once
            else:
                return

    def _after(self, error: KafkaError, deadline: float) -> None:
        """Raise the one exception that says what to do about a failed transaction."""
        if error.code() in _FENCED or (error.fatal() and error.code() == KafkaError.INVALID_PRODUCER_EPOCH):
            self._unless_too_slow(error, deadline)
            who = self._settings.worker.transactional_id()
            raise ProducerFenced(f"another worker took the transactional id {who!r}: {error.str()}") from None
        if error.fatal():
            raise PublishError(f"the producer cannot go on: {error.str()}")
        if error.txn_requires_abort():
            self._abort(deadline)
        else:
            # It is not known whether the commit succeeded: a new producer under the same id ends it either way.
            self._replace(deadline)
        raise TransactionAborted(error.str(), too_large=error.code() == KafkaError.MSG_SIZE_TOO_LARGE)

    def _unless_too_slow(self, error: KafkaError, deadline: float) -> None:
        """Raise `TransactionAborted` if the broker may have ended the transaction for its age: that looks like fencing.

        If another worker did take the id, the new producer fences that worker, which stops: one of the two is left.
        """
        worker = self._settings.worker
        age = self._clock() - (deadline - worker.deadline_s)
        if age >= worker.transaction_timeout_s:
            self._replace(deadline)
            raise TransactionAborted(f"open for {age:.1f} s, over worker.transaction_timeout_s: {error.str()}")

    def _abort(self, deadline: float) -> None:
        try:
            self._until(self._producer.abort_transaction, deadline)
        except KafkaException as exc:
            if exc.args[0].code() in _FENCED:
                self._after(exc.args[0], deadline)
            self._replace(deadline)

    def _replace(self, deadline: float) -> None:
        log.warning("making a new producer for %s", self._settings.worker.transactional_id())
        self._producer.purge()
        self._producer = self._make_producer(self._settings, transactional=True, largest=self._largest)
        try:
            self._until(self._producer.init_transactions, max(deadline, self._clock() + _CONTACT_S))
        except KafkaException as exc:
            raise PublishError(f"no new producer: {exc.args[0].str()}") from exc


class AtLeastOnce:
    """Records first, then the offsets, which ``reader`` commits: a crash in between publishes a batch twice."""

    def __init__(
        self, settings: Settings, reader: Consumer, *, make_producer: Callable[..., Producer] = producer
    ) -> None:
        self._settings, self._consumer, self._make_producer = settings, reader, make_producer
        self._producer = make_producer(settings, transactional=False)

    def start(self) -> None:
        """Do nothing."""

    def publish(self, records: Sequence[Record], offsets: Sequence[TopicPartition], metadata: object) -> None:
        """See `Publisher.publish`; ``metadata`` is not used."""
        deadline = time.monotonic() + self._settings.worker.deadline_s
        try:
            failed = _produce_all(self._producer, records, deadline)
        except KafkaException as exc:
            raise PublishError(f"the producer cannot go on: {exc.args[0].str()}") from exc
        left = self._producer.flush(max(deadline - time.monotonic(), _LEAST_CALL_S))
        if left or failed:
            self._producer.purge()
            reason = failed[0].str() if failed else f"{left} records not delivered"
            too_large = any(error.code() == KafkaError.MSG_SIZE_TOO_LARGE for error in failed)
            raise TransactionAborted(f"not published: {reason}", too_large=too_large)
        try:
            self._consumer.commit(offsets=list(offsets), asynchronous=False)
        except KafkaException as exc:
            raise TransactionAborted(f"offsets not committed: {exc.args[0].str()}") from exc

    def resize(self, largest: int) -> None:
        """See `Publisher.resize`."""
        self._producer = self._make_producer(self._settings, transactional=False, largest=largest)

    def close(self) -> None:
        """Disconnect."""
        self._producer.flush(_LEAST_CALL_S)


def make_publisher(settings: Settings, reader: Consumer, largest: int | None) -> Publisher:
    """Return the publisher that ``worker.guarantee`` names, for records of up to ``largest`` bytes."""
    if settings.worker.guarantee == "exactly-once":
        return ExactlyOnce(settings, largest)
    return AtLeastOnce(settings, reader)


def _produce_all(to: Producer, records: Iterable[Record], deadline: float) -> list[KafkaError]:
    """Queue records outside of a transaction; the list receives the errors of delivery until the flush returns."""
    failed: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: object) -> None:
        if error is not None:
            failed.append(error)

    for index, record in enumerate(records):
        _produce(to, record, index, deadline, delivered=delivered)
    return failed


def _produce(
    to: Producer,
    record: Record,
    index: int,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    delivered: Callable[..., None] | None = None,
) -> None:
    """Queue one record; wait for space in the client's queue until the deadline."""
    while True:
        try:
            to.produce(record.topic, record.value, record.key, headers=list(record.headers), on_delivery=delivered)
        except BufferError:
            # The client's queue is full. The transaction is intact, and polling empties the queue.
            if clock() > deadline:
                raise TransactionAborted("the producer's queue stayed full until the deadline") from None
            to.poll(0.1)
        except KafkaException as exc:
            if exc.args[0].code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise
            size = len(record.value or b"")
            raise RecordTooLarge(f"topic {record.topic!r}: found {size} bytes: {exc.args[0].str()}", index) from exc
        else:
            to.poll(0)
            return
