"""Intake: closed batches of alerts from Kafka, and the way back to what was committed.

It owns the consumer: polling, the assignment, retries that are not due yet, the ends of a drained worker's input, and
the rewind after a batch that does not count.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from stampworker.config import Settings
from stampworker.errors import PublishError, TransactionAborted
from stampworker.stream.kafka import Partition, committed, consumer, offset_of, partition_of
from stampworker.stream.outcomes import Attempt, Item

log = logging.getLogger(__name__)

# A poll is this long at most, so that signals are answered promptly.
_POLL_S = 0.2
_CALL_S = 10.0
_SEEK_S = 5.0
# Leaving the group takes a moment; without a broker the call may never return.
_CLOSE_S = 15.0


class PartitionsRevoked(Exception):
    """Partitions went to another worker: what was polled since the last commit must be read again."""


@dataclass
class Batch:
    """Alerts in the order of reading, and what it takes to commit them."""

    items: list[Item] = field(default_factory=list)
    next_offsets: dict[Partition, int] = field(default_factory=dict)
    size_bytes: int = 0  # of the alerts
    started: float = 0.0  # when the first alert was read, on the monotonic clock
    metadata: object = None  # of the group, when the batch was closed
    poll_s: float = 0.0
    enrich_s: float = 0.0

    def add(self, item: Item) -> None:
        """Append an alert."""
        if not self.items:
            self.started = time.monotonic()
        self.items.append(item)
        self.size_bytes += len(item.message.value() or b"")
        # A committed offset names the next record to read, hence the + 1.
        self.next_offsets[partition_of(item.message)] = offset_of(item.message) + 1

    def offsets(self) -> list[TopicPartition]:
        """Return the offsets to commit."""
        return [TopicPartition(topic, partition, offset) for (topic, partition), offset in self.next_offsets.items()]


class DelayedRecords:
    """Holds the first record of each partition of the retry topic until it is due; the partition is paused meanwhile.

    All records wait equally long, so the first one of a partition is due first, and waiting for it delays no other.
    """

    def __init__(self, reader: Consumer) -> None:
        self._reader = reader
        self._held: dict[Partition, tuple[float, Item]] = {}

    def hold(self, partition: Partition, wait_s: float, item: Item) -> None:
        """Hold a record for some seconds; nothing more is read from its partition."""
        # What was fetched beyond it is dropped and fetched again, from the next record on.
        self._reader.pause([TopicPartition(*partition)])
        self._held[partition] = time.monotonic() + wait_s, item

    def pop_due(self) -> Item | None:
        """Return a record that is due and resume its partition; None where none is due."""
        now = time.monotonic()
        for partition, (due, item) in self._held.items():
            if due <= now:
                self.drop([partition])
                return item
        return None

    def drop(self, partitions: Iterable[Partition]) -> None:
        """Forget the records of partitions that are rewound or go to another worker."""
        held = [partition for partition in partitions if self._held.pop(partition, None) is not None]
        if held:
            self._reader.resume([TopicPartition(*partition) for partition in held])


class Intake:
    """Reads alerts and closes batches.

    Once ``stop`` is set, what was read is closed as a batch, and nothing more is read. A ``drained`` intake reads to
    where the partitions ended when their first record was seen; or to ``ends``, which are not included, and then it
    reads no other partitions. ``before_revoke`` is called before partitions go to another worker, while what is being
    published can still be committed.
    """

    def __init__(
        self,
        settings: Settings,
        stop: threading.Event,
        *,
        drained: bool = False,
        ends: Mapping[Partition, int] | None = None,
        before_revoke: Callable[[], None] = lambda: None,
    ) -> None:
        self.consumer = consumer(settings)
        self._worker = settings.worker
        self._stop = stop
        self._drained = drained or ends is not None
        self._ends: dict[Partition, int] = dict(ends or {})
        self._ends_given = ends is not None
        self._before_revoke = before_revoke
        self._delayed = DelayedRecords(self.consumer)
        self._filling = Batch()
        self._assigned: set[Partition] = set()
        self._seen_assignment = False
        self._ended: set[Partition] = set()
        self._first: dict[Partition, int] = {}  # where reading began, for partitions without a committed offset
        self._noted: Exception | None = None  # of a callback, raised when the poll has returned

    def subscribe(self) -> None:
        """Join the group."""
        worker = self._worker
        topics = [*worker.input_topic, *([worker.retry_topic] if worker.retry_topic is not None else [])]
        self.consumer.subscribe(topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    @property
    def has_ended(self) -> bool:
        """True if a drained worker's input has been read to its end."""
        return self._drained and self._seen_assignment and self._assigned <= self._ended

    @property
    def is_empty(self) -> bool:
        """True if no alert waits for its batch to be closed."""
        return not self._filling.items

    def poll_batch(self, *, wait: bool) -> Batch | None:
        """Poll until a batch is closed (by count, bytes, time or the end of the input); return None if it is not yet.

        With ``wait`` it waits for alerts; without, it reads only what is there at once, and the next call the rest.

        Raises
        ------
        PartitionsRevoked
            Partitions went to another worker.
        TransactionAborted, PublishError
            What ``before_revoke`` raised; `PublishError` also where the consumer cannot go on.
        """
        batch, began = self._filling, time.monotonic()
        while not self._stop.is_set():  # polled at least once: the client counts the time between two polls
            came = self._read(batch, _POLL_S if wait else 0.0)
            if self.has_ended or self._is_full(batch) or not (came or (batch.items and wait)):
                break
        batch.poll_s += time.monotonic() - began
        if not batch.items or not (self._stop.is_set() or self.has_ended or self._is_full(batch)):
            return None
        # Captured now, never refreshed: with the metadata of a later generation the offsets of a batch that another
        # worker reads again would be accepted.
        batch.metadata = self.consumer.consumer_group_metadata()
        self._filling = Batch()
        return batch

    def discard(self) -> None:
        """Forget what was read and is not in a batch yet."""
        self._filling = Batch()
        self._delayed.drop(self._assigned)

    def rewind(self) -> None:
        """Discard what was read, and set partitions back to their committed offsets, or to where reading began.

        Raises
        ------
        PublishError
            The committed offsets cannot be read, or a partition cannot be set back.
        """
        self.discard()
        # Other partitions are where they began. One that is not fetched yet cannot be set back, and one at its end
        # would not report its end again.
        wanted = [TopicPartition(*partition) for partition in sorted(self._assigned & self._first.keys())]
        for found in self._committed(wanted):
            partition = found.topic, found.partition
            if found.offset == OFFSET_INVALID:
                found.offset = self._first[partition]
            self._ended.discard(partition)
            self._seek(found)

    def close(self) -> None:
        """Leave the group, within a time limit."""
        # In a thread that the process does not wait for: the call has no time limit of its own.
        thread = threading.Thread(target=self.consumer.close, name="close", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)
        if thread.is_alive():
            log.warning("the consumer did not close within %g s; its partitions are free after its session", _CLOSE_S)

    # -- reading ------------------------------------------------------------------------------------------------

    def _is_full(self, batch: Batch) -> bool:
        limits = self._worker
        return bool(batch.items) and (
            len(batch.items) >= limits.batch_count
            or batch.size_bytes >= limits.batch_bytes
            or time.monotonic() - batch.started >= limits.batch_s
        )

    def _read(self, batch: Batch, wait_s: float) -> bool:
        """Read what comes next: a retry that is due, or what is polled. Return False if nothing came."""
        due = self._delayed.pop_due()
        if due is not None:
            self._accept(due, batch)
            return True
        message = self.consumer.poll(wait_s)
        if message is not None:
            self._take(message, batch)
        # A callback runs inside the poll, which may return a message all the same: the rewind must know of that, too.
        if self._noted is not None:
            noted, self._noted = self._noted, None
            raise noted
        return message is not None

    def _take(self, message: Message, batch: Batch) -> None:
        """Add what was polled to the batch, unless it is an event or a retry that is not due."""
        error = message.error()
        if error is not None:
            self._on_error(message, error)
            return
        self._first.setdefault(partition_of(message), offset_of(message))
        item = Item(message, Attempt.from_message(message, self._worker.retry_topic))
        if not self._is_held(item):
            self._accept(item, batch)

    def _is_held(self, item: Item) -> bool:
        """Return True if a retry is not due yet, and hold it."""
        # No longer than the delay: a clock that is ahead, here or where it was written, must not hold the partition.
        wait_s = min(item.attempt.due_s - time.time(), self._worker.retry_delay_s)
        if wait_s <= 0 or self._is_beyond(item.message):
            return False
        self._delayed.hold(partition_of(item.message), wait_s, item)
        return True

    def _accept(self, item: Item, batch: Batch) -> None:
        """Add an alert to the batch, unless it is beyond the end of a drained worker's input."""
        message = item.message
        if self._drained and offset_of(message) + 1 >= self._end(partition_of(message)):
            self._ended.add(partition_of(message))
        if not self._is_beyond(message):
            batch.add(item)

    def _on_error(self, message: Message, error: KafkaError) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            # Commit markers take offsets too, so the last alert may be well before the end; only this event tells.
            if self._is_beyond(message):
                self._ended.add(partition_of(message))
        elif error.fatal() or error.code() == KafkaError._FATAL:  # the client marks none of its messages as fatal
            raise PublishError(f"the consumer cannot go on: {error.str()}")
        else:
            log.warning("%s: %s", message.topic() or "consumer", error.str())

    def _is_beyond(self, message: Message) -> bool:
        """Return True if a message is at or beyond the end of a drained worker's input."""
        return self._drained and offset_of(message) >= self._end(partition_of(message))

    def _end(self, partition: Partition) -> int:
        if partition not in self._ends:
            if self._ends_given:
                return 0  # not part of the range
            _, self._ends[partition] = self.consumer.get_watermark_offsets(TopicPartition(*partition), timeout=_CALL_S)
        return self._ends[partition]

    # -- assignment ---------------------------------------------------------------------------------------------

    def _on_assign(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._seen_assignment = True
        assigned = {(p.topic, p.partition) for p in partitions}
        self._assigned |= assigned
        self._forget(assigned)
        log.info("assigned %s", _listed(assigned))

    def _on_revoke(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        # The generation is still this worker's inside this callback, so what is being published can be committed now,
        # and the next owner starts behind it. What was polled since belongs to the next owner.
        try:
            self._before_revoke()
        except Exception as exc:  # the client would lose it: poll_batch raises it
            log.debug("while partitions are revoked", exc_info=True)
            self._unassign(partitions, exc)
        else:
            self._unassign(partitions, PartitionsRevoked())
        log.info("revoked %s", _listed({(p.topic, p.partition) for p in partitions}))

    def _on_lost(self, _consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        self._seen_assignment = False  # nothing is assigned now, but the input has not ended: the client joins again
        self._unassign(partitions, PartitionsRevoked())
        log.warning("lost %s", _listed({(p.topic, p.partition) for p in partitions}))

    def _unassign(self, partitions: Sequence[TopicPartition], noted: Exception) -> None:
        revoked = {(p.topic, p.partition) for p in partitions}
        self._assigned -= revoked
        self._forget(revoked)
        # Several callbacks may run inside one poll: an error that ends the worker outlives a reason to start over.
        if self._noted is None or isinstance(self._noted, TransactionAborted | PartitionsRevoked):
            self._noted = noted

    def _forget(self, partitions: set[Partition]) -> None:
        self._ended -= partitions
        self._delayed.drop(partitions)
        for partition in partitions:
            self._first.pop(partition, None)

    # -- rewinding ----------------------------------------------------------------------------------------------

    def _committed(self, wanted: list[TopicPartition]) -> list[TopicPartition]:
        deadline = time.monotonic() + self._worker.deadline_s
        while wanted:
            try:
                return committed(self.consumer, wanted, _CALL_S)
            except KafkaException as exc:
                if time.monotonic() > deadline:
                    raise PublishError(f"committed offsets cannot be read: {exc.args[0].str()}") from exc
                log.warning("committed offsets: %s; trying again", exc.args[0].str())
                time.sleep(_POLL_S)
        return []

    def _seek(self, to: TopicPartition) -> None:
        deadline = time.monotonic() + _SEEK_S
        while True:
            try:
                self.consumer.seek(to)
            except KafkaException as exc:
                # Between assignment and the first fetch a partition cannot be set back yet.
                if exc.args[0].code() != KafkaError._STATE or time.monotonic() > deadline:
                    raise PublishError(f"{to.topic} {to.partition} cannot be set back: {exc.args[0].str()}") from exc
                time.sleep(_POLL_S / 10)
            else:
                return


def _listed(partitions: set[Partition]) -> str:
    return ", ".join(f"{topic} {partition}" for topic, partition in sorted(partitions)) or "nothing"
