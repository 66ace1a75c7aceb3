"""The worker: alerts from Kafka in, packets to Kafka out.

The promise, exactly once:

1. Poll a batch and make its packets. The group's metadata is captured with the batch.
2. Begin a transaction and publish packets, retries and rejects.
3. Add the next offsets, with the group's metadata.
4. Commit.

A rebalance or an error before step 4 aborts the transaction; then every assigned partition is set back to its committed
offset, and the batch is read again. Three batches are under way at a time, each in a thread of its own: one is being
published (steps 2 to 4), one is computed, and of the one behind it frames are opened and fetched. When a transaction
aborts, those behind it are thrown away with it, because they lie behind the one that is read again.

An alert whose frames may still come goes to the retry topic, where the group's workers wait until it is due, and
never blocks the alerts behind it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from stampworker.config import Settings
from stampworker.enrich import Prepared, complete, prepare
from stampworker.errors import AlertError, PublishError, TransactionAborted
from stampworker.formats.alerts import Alert, decode
from stampworker.formats.packets import STAMP_FIELDS, Packet
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore
from stampworker.resolve import load_resolver
from stampworker.stream.kafka import (
    AtLeastOnce,
    ExactlyOnce,
    Publisher,
    Record,
    RecordTooLarge,
    check_topics,
    committed,
    consumer,
    message_limit,
)
from stampworker.stream.outcomes import Attempt, Outcome, Retry, attempt_of, next_attempt, record_of
from stampworker.stream.retries import Place, WaitingRoom

log = logging.getLogger(__name__)

# A poll is this long at most, so that signals are answered promptly.
_SLICE_S = 0.2
_CALL_S = 10.0
_SEEK_S = 5.0
# Leaving the group takes a moment; without a broker it may take for ever.
_CLOSE_S = 15.0


@dataclass
class Totals:
    """What a worker has done; ``alerts = packets + retries + rejects`` at every commit, each attempt being counted."""

    alerts: int = 0
    packets: int = 0
    retries: int = 0
    rejects: int = 0
    batches: int = 0
    aborts: int = 0


@dataclass
class _Batch:
    """Alerts as read, and what it takes to commit them."""

    messages: list[Message] = field(default_factory=list)
    next_offsets: dict[Place, int] = field(default_factory=dict)
    size_bytes: int = 0
    started: float = 0.0
    metadata: object = None
    attempts: list[Attempt] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    poll_s: float = 0.0
    enrich_s: float = 0.0

    def add(self, message: Message) -> None:
        if not self.messages:
            self.started = time.monotonic()
        self.messages.append(message)
        self.size_bytes += len(message.value() or b"")
        # A committed offset names the next record to read, hence the + 1.
        self.next_offsets[_place(message)] = _offset(message) + 1

    def offsets(self) -> list[TopicPartition]:
        return [TopicPartition(topic, partition, offset) for (topic, partition), offset in self.next_offsets.items()]


class Worker:
    """Reads alerts, enriches them and publishes packets until it is stopped, or until the input ends.

    Parameters
    ----------
    settings : Settings
    drained : bool, optional
        End where the partitions ended when they were assigned first.
    ends : mapping of (topic, partition) to int, optional
        Offsets at which to end instead, not included.
    replay : str, optional
        Name of a replay, for the packets' header.
    on_batch : callable, optional
        Called with the `Totals` after each commit.

    Raises
    ------
    ConfigError
        The resolver cannot be loaded.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        drained: bool = False,
        ends: Mapping[Place, int] | None = None,
        replay: str | None = None,
        on_batch: Callable[[Totals], None] | None = None,
    ) -> None:
        self.totals = Totals()
        self._settings = settings
        self._resolver = load_resolver(settings.resolve)
        self._drained = drained or ends is not None
        self._ends: dict[Place, int] = dict(ends or {})
        self._ends_given = ends is not None
        self._replay = replay
        self._on_batch = on_batch
        self._stop = threading.Event()
        self._assigned: set[Place] = set()
        self._seen_assignment = False
        self._ended: set[Place] = set()
        self._first: dict[Place, int] = {}
        self._largest: int | None = None
        self._behind = False  # what was polled since the last commit must be read again
        self._filling = _Batch()
        self._ready: tuple[_Batch, Future[Prepared]] | None = None  # polled, while its frames are opened
        self._pending: tuple[_Batch, Future[float]] | None = None
        self._failure: Exception | None = None
        self._consumer: Consumer
        self._publisher: Publisher

    def stop(self) -> None:
        """Let the worker finish its batch and end; safe from any thread and from a signal handler."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    def run(self) -> Totals:
        """Run the loop.

        Returns
        -------
        totals : Totals

        Raises
        ------
        ConfigError
            A frame root or a topic is not there, or librdkafka refuses a property.
        BrokerUnavailable
            No broker answers.
        ProducerFenced
            Another worker took this worker's slot.
        PublishError
            Publishing cannot go on.
        """
        try:
            with FrameStore(self._settings.frames) as store:  # first: what is wrong with its roots is told at once
                self._connect()
                try:
                    with ThreadPoolExecutor(1, "ahead") as ahead, ThreadPoolExecutor(1, "publish") as publish:
                        while not self._finished():
                            self._turn(store, ahead, publish)
                        self._settle()
                    self._raise_failure()
                finally:
                    # Committed first, closed after: closing hands the partitions on.
                    self._close_consumer()
                    self._publisher.close()
        except KafkaException as exc:
            raise PublishError(f"kafka: {exc.args[0].str()}") from exc
        return self.totals

    def _connect(self) -> None:
        worker = self._settings.worker
        transactional = worker.guarantee == "exactly-once"
        retries = [worker.retry_topic] if worker.retry_topic is not None else []
        outputs = [worker.packet_topic, worker.reject_topic, *retries]
        check_topics(self._settings, [*worker.input_topic, *(outputs if transactional else retries)])
        self._consumer = consumer(self._settings)
        self._waiting = WaitingRoom[Message](self._consumer)
        if transactional:
            self._largest = self._limit()
            self._publisher = ExactlyOnce(self._settings, self._largest)
        else:
            self._publisher = AtLeastOnce(self._settings, self._consumer)
        self._publisher.start()
        self._consumer.subscribe(
            [*worker.input_topic, *retries],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
        log.info("group %s slot %s: %s", worker.group, worker.slot_number(), worker.guarantee)

    def _close_consumer(self) -> None:
        # In a thread that the process does not wait for: the call has no time limit of its own.
        thread = threading.Thread(target=self._consumer.close, name="close", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)
        if thread.is_alive():
            log.warning("the consumer did not close within %g s; its partitions are free after its session", _CLOSE_S)

    def _limit(self) -> int | None:
        """Return the bytes of the largest record that the output topics take; warn where a packet may be larger."""
        worker, enrich = self._settings.worker, self._settings.enrich
        topics = [
            topic for topic in (worker.packet_topic, worker.retry_topic, worker.reject_topic) if topic is not None
        ]
        limits = [message_limit(self._settings, topic) for topic in topics]
        largest = min((limit for limit in limits if limit is not None), default=None)
        packet = len(STAMP_FIELDS) * (2 * math.ceil(enrich.radius) + 1) ** 2 * 4
        if largest is not None and packet > largest:
            log.warning(
                "the topics take records of up to %d bytes; a packet with stamps of radius %g has up to %d before "
                "compression, and one that is too large is rejected",
                *(largest, enrich.radius, packet),
            )
        return largest

    def _turn(self, store: FrameStore, ahead: ThreadPoolExecutor, publish: ThreadPoolExecutor) -> None:
        """Read a batch, and work on the one before while the last one commits; then hand that to the publisher."""
        is_closed = self._poll_batch()
        ready, self._ready = self._ready, None
        if is_closed and not self._behind:
            batch, self._filling = self._filling, _Batch()
            alerts = [self._decode(message) for message in batch.messages]
            self._ready = batch, ahead.submit(prepare, alerts, store, self._settings, self._resolver)
        if ready is not None and not self._behind:
            self._enrich(*ready, store)
        self._settle()
        self._raise_failure()
        if self._behind:
            self._filling, self._ready = _Batch(), None
            self._rewind()
        elif ready is not None:
            self._pending = ready[0], publish.submit(self._publish, ready[0])

    # -- reading ------------------------------------------------------------------------------------------------

    def _poll_batch(self) -> bool:
        """Poll until the batch is full by count, bytes or time, the input ends, or nothing comes; tell if it is closed.

        While another batch waits to be worked on, only what is there at once is taken; the rest in the next turn.
        """
        batch, began = self._filling, time.monotonic()
        patience = 0.0 if self._ready is not None else _SLICE_S
        is_closed = False
        while not self._stop.is_set() and not self._behind and not is_closed:
            message = self._next_message(patience)
            if message is not None and self._take(message):
                batch.add(message)
            is_closed = self._is_closed(batch)
            if self._input_ended() or (message is None and (not batch.messages or not patience)):
                break
        # Captured now, never refreshed: with the metadata of a later generation the offsets of a batch that another
        # worker reads again would be accepted.
        if is_closed := bool(batch.messages) and (is_closed or self._stop.is_set()):
            batch.metadata = self._consumer.consumer_group_metadata()
        batch.poll_s += time.monotonic() - began
        return is_closed

    def _is_closed(self, batch: _Batch) -> bool:
        limits = self._settings.worker
        return bool(batch.messages) and (
            len(batch.messages) >= limits.batch_count
            or batch.size_bytes >= limits.batch_bytes
            or time.monotonic() - batch.started >= limits.batch_s
            or self._input_ended()
        )

    def _next_message(self, patience_s: float) -> Message | None:
        """Return what comes next: a retry that is due, or what is polled unless it is a retry that is not."""
        message = self._waiting.take()
        if message is not None:
            return message
        message = self._consumer.poll(patience_s)
        if message is None or message.error() is not None:
            return message
        self._first.setdefault(_place(message), _offset(message))
        # No longer than the delay: a clock that is ahead, here or where it was written, must not hold the partition.
        wait_s = min(self._attempt(message).due_s - time.time(), self._settings.worker.retry_delay_s)
        if wait_s > 0 and not self._is_beyond(message):
            self._waiting.keep(_place(message), wait_s, message)
            return None
        return message

    def _is_beyond(self, message: Message) -> bool:
        """Tell whether a message lies at or behind the end of a drained worker's input."""
        return self._drained and _offset(message) >= self._end(_place(message))

    def _attempt(self, message: Message) -> Attempt:
        try:
            return attempt_of(message, self._settings.worker.retry_topic)
        except ValueError as exc:
            log.warning("%s partition %d offset %d: %s; taken as an alert", *_place(message), _offset(message), exc)
            return attempt_of(message, None)

    def _take(self, message: Message) -> bool:
        """Tell whether a message is an alert to work on."""
        error = message.error()
        if error is not None:
            self._polled_error(message, error)
            return False
        if self._drained and _offset(message) + 1 >= self._end(_place(message)):
            self._ended.add(_place(message))
        return not self._is_beyond(message)

    def _polled_error(self, message: Message, error: KafkaError) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            # Commit markers take offsets too, so the last alert may lie well before the end; only this event tells.
            if self._is_beyond(message):
                self._ended.add(_place(message))
        elif error.fatal() or error.code() == KafkaError._FATAL:  # the client marks none of its messages as fatal
            raise PublishError(f"the consumer cannot go on: {error.str()}")
        else:
            log.warning("%s: %s", message.topic() or "consumer", error.str())

    def _end(self, place: Place) -> int:
        if place not in self._ends:
            if self._ends_given:
                return 0  # not part of the range
            low_high = self._consumer.get_watermark_offsets(TopicPartition(*place), timeout=_CALL_S)
            self._ends[place] = low_high[1]
        return self._ends[place]

    def _input_ended(self) -> bool:
        return self._drained and self._seen_assignment and self._assigned <= self._ended

    def _finished(self) -> bool:
        if self._failure is not None:
            return False
        if self._behind:
            return self._stop.is_set()  # the next owner begins at the committed offsets, so nothing need be set back
        if self._ready is not None or self._filling.messages:
            return False
        return self._stop.is_set() or (self._input_ended() and self._pending is None)

    # -- enriching ----------------------------------------------------------------------------------------------

    def _enrich(self, batch: _Batch, prepared: Future[Prepared], store: FrameStore) -> None:
        """Work on a batch: what becomes of each alert, and the record that it leaves as."""
        started = time.monotonic()
        results = complete(prepared.result(), store, self._settings)
        batch.attempts = [self._attempt(message) for message in batch.messages]
        batch.outcomes = [self._outcome(*pair) for pair in zip(batch.attempts, results, strict=True)]
        batch.records = [self._record(batch, place) for place in range(len(batch.messages))]
        batch.enrich_s = time.monotonic() - started

    def _decode(self, message: Message) -> Alert | AlertError:
        try:
            return decode(message.value() or b"", self._settings.alerts.schema_folder)
        except AlertError as exc:
            return exc

    def _outcome(self, attempt: Attempt, result: Packet | Reject) -> Outcome:
        if isinstance(result, Packet):
            return result
        following = next_attempt(attempt, result.error, self._settings.worker, time.time())
        return Retry(result.alert_id, result.error, following) if following is not None else result

    def _record(self, batch: _Batch, place: int) -> Record:
        attempt, outcome = batch.attempts[place], batch.outcomes[place]
        if not isinstance(outcome, Packet):
            level, name = (logging.INFO, "retry") if isinstance(outcome, Retry) else (logging.WARNING, "reject")
            log.log(
                level,
                "%s topic=%s partition=%d offset=%d alert=%s attempt=%d error=%s: %s",
                *(name, attempt.topic, attempt.partition, attempt.offset, outcome.alert_id, attempt.number),
                *(type(outcome.error).__name__, outcome.error),
            )
        return record_of(batch.messages[place], attempt, outcome, self._settings.worker, self._replay)

    # -- publishing ---------------------------------------------------------------------------------------------

    def _publish(self, batch: _Batch) -> float:
        """Publish and commit one batch, in the publisher's thread; return the seconds that it took."""
        started = time.monotonic()
        while True:
            try:
                self._publisher.publish(batch.records, batch.offsets(), batch.metadata)
            except RecordTooLarge as exc:
                self._set_aside(batch, exc)
            else:
                return time.monotonic() - started

    def _set_aside(self, batch: _Batch, exc: RecordTooLarge) -> None:
        """Replace a packet that its topic refuses by a reject."""
        outcome = batch.outcomes[exc.place]
        if not isinstance(outcome, Packet):
            raise PublishError(f"not even the reject can be published: {exc}") from exc
        batch.outcomes[exc.place] = Reject(outcome.alert_id, "publish", exc)
        batch.records[exc.place] = self._record(batch, exc.place)

    def _settle(self) -> None:
        """Wait for the batch that is being published; note whether it must be read again."""
        if self._pending is None:
            return
        batch, future = self._pending
        self._pending = None
        try:
            publish_s = future.result()
        except TransactionAborted as exc:
            self.totals.aborts += 1
            self._behind = True
            log.warning("aborted batch of %d alerts, reading it again: %s", len(batch.messages), exc)
            if exc.too_large:
                self._learn_limits(exc)
        except PublishError as exc:
            self._failure = exc
        else:
            self._count(batch, publish_s)

    def _learn_limits(self, problem: TransactionAborted) -> None:
        """Ask for the topics' limits again: one was lowered while the worker ran."""
        before, self._largest = self._largest, self._limit()
        if self._largest is None or (before is not None and self._largest >= before):
            raise PublishError(f"a topic refuses records that its limit should allow: {problem}") from problem
        log.warning("records of up to %d bytes are taken from now on", self._largest)
        self._publisher.resize(self._largest)

    def _count(self, batch: _Batch, publish_s: float) -> None:
        alerts, packets, retries, rejects = (
            sum(isinstance(outcome, kind) for outcome in batch.outcomes) for kind in (object, Packet, Retry, Reject)
        )
        self.totals.alerts += alerts
        self.totals.packets += packets
        self.totals.retries += retries
        self.totals.rejects += rejects
        self.totals.batches += 1
        log.info(
            "batch alerts=%d packets=%d retries=%d rejects=%d bytes_in=%d bytes_out=%d poll_s=%.3f enrich_s=%.3f "
            "publish_s=%.3f",
            *(alerts, packets, retries, rejects, batch.size_bytes),
            *(sum(len(r.value or b"") for r in batch.records), batch.poll_s, batch.enrich_s, publish_s),
        )
        if self._on_batch is not None:
            self._on_batch(self.totals)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- assignment ---------------------------------------------------------------------------------------------

    def _on_assign(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._seen_assignment = True
        places = {(p.topic, p.partition) for p in partitions}
        self._assigned |= places
        self._forget(places)
        log.info("assigned %s", _listed(places))

    def _on_revoke(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        # The generation is still ours inside this callback, so what is being published can be committed now, and the
        # next owner starts behind it. What was polled since belongs to the next owner.
        try:
            self._settle()
        finally:
            self._unassign(partitions)
        log.info("revoked %s", _listed({(p.topic, p.partition) for p in partitions}))

    def _on_lost(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._unassign(partitions)
        log.warning("lost %s", _listed({(p.topic, p.partition) for p in partitions}))

    def _unassign(self, partitions: Sequence[TopicPartition]) -> None:
        places = {(p.topic, p.partition) for p in partitions}
        self._assigned -= places
        self._forget(places)
        self._behind = True

    def _forget(self, places: set[Place]) -> None:
        self._ended -= places
        self._waiting.dismiss(places)
        for place in places:
            self._first.pop(place, None)

    def _rewind(self) -> None:
        """Set the partitions that were read back to their committed offsets, or to where reading began."""
        self._behind = False
        self._waiting.dismiss(self._assigned)
        # The others stand where they began: one that is not fetched yet cannot be set back, and one at its end would
        # not report that again.
        wanted = [TopicPartition(*place) for place in sorted(self._assigned & self._first.keys())]
        for found in self._committed(wanted):
            place = found.topic, found.partition
            if found.offset == OFFSET_INVALID:
                found.offset = self._first[place]
            self._ended.discard(place)
            self._seek(found)

    def _committed(self, wanted: list[TopicPartition]) -> list[TopicPartition]:
        deadline = time.monotonic() + self._settings.worker.deadline_s
        while wanted:
            try:
                return committed(self._consumer, wanted, _CALL_S)
            except KafkaException as exc:
                if time.monotonic() > deadline:
                    raise PublishError(f"committed offsets cannot be read: {exc.args[0].str()}") from exc
                log.warning("committed offsets: %s; trying again", exc.args[0].str())
                time.sleep(_SLICE_S)
        return []

    def _seek(self, to: TopicPartition) -> None:
        deadline = time.monotonic() + _SEEK_S
        while True:
            try:
                self._consumer.seek(to)
            except KafkaException as exc:
                # Between assignment and the first fetch a partition cannot be set back yet.
                if exc.args[0].code() != KafkaError._STATE or time.monotonic() > deadline:
                    raise PublishError(f"{to.topic} {to.partition} cannot be set back: {exc.args[0].str()}") from exc
                time.sleep(_SLICE_S / 10)
            else:
                return


def _place(message: Message) -> Place:
    return str(message.topic()), int(message.partition() or 0)


def _offset(message: Message) -> int:
    offset = message.offset()
    if offset is None:
        raise PublishError(f"the consumer gave a record of {message.topic()} without an offset")
    return offset


def _listed(places: set[Place]) -> str:
    return ", ".join(f"{topic} {partition}" for topic, partition in sorted(places)) or "nothing"
