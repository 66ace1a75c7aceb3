"""The worker: alerts from Kafka in, packets to Kafka out.

The promise, exactly once:

1. Poll a batch and make its packets. The group's metadata is captured with the batch.
2. Begin a transaction and publish packets, retries and rejects.
3. Add the next offsets, with the group's metadata.
4. Commit.

A rebalance or an error before step 4 aborts the transaction; then every assigned partition is set back to its committed
offset, and the batch is read again. Three batches are under way at a time, each in a thread of its own: one is being
published (steps 2 to 4), one is enriched, and the frames of the next one are opened and fetched. An abort discards the
batches behind the aborted one too, because they are read again after it.

An alert whose frames may still come goes to the retry topic, where the group's workers hold it until it is due. It
never blocks the alerts behind it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaException

from stampworker.config import Settings
from stampworker.enrich import Enricher, Prefetched
from stampworker.errors import AlertError, PublishError, TransactionAborted
from stampworker.formats.alerts import Alert, decode
from stampworker.formats.packets import STAMP_FIELDS, Packet
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore
from stampworker.resolve import load_resolver
from stampworker.stream.intake import Batch, Intake, PartitionsRevoked
from stampworker.stream.kafka import (
    Partition,
    Publisher,
    RecordTooLarge,
    check_topics,
    make_publisher,
    message_limit,
)
from stampworker.stream.outcomes import Item, Retry

log = logging.getLogger(__name__)

MakePublisher = Callable[[Settings, Consumer, int | None], Publisher]


@dataclass
class Totals:
    """What a worker has done; at every commit ``alerts = packets + retries + rejects``. Each attempt counts.

    Attributes
    ----------
    alerts, packets, retries, rejects : int
        Numbers of alerts read, and of those that became a packet, a retry or a reject.
    batches, aborts : int
        Numbers of batches committed and aborted.
    """

    alerts: int = 0
    packets: int = 0
    retries: int = 0
    rejects: int = 0
    batches: int = 0
    aborts: int = 0


class Worker:
    """Reads alerts, enriches them and publishes packets until it is stopped, or until the input ends.

    Parameters
    ----------
    settings : Settings
        Every section.
    drained : bool, optional
        End where the partitions ended when they were assigned first.
    ends : mapping of (topic, partition) to int, optional
        Offsets at which to end instead, not included.
    replay : str, optional
        Name of a replay, for the packets' header.
    on_batch : callable, optional
        Called with the `Totals` after each commit.
    publisher : callable, optional
        Makes the `Publisher` of settings, consumer and largest record; by default what ``worker.guarantee`` names.

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
        ends: Mapping[Partition, int] | None = None,
        replay: str | None = None,
        on_batch: Callable[[Totals], None] = lambda totals: None,
        publisher: MakePublisher = make_publisher,
    ) -> None:
        self.totals = Totals()
        self._settings = settings
        self._resolver = load_resolver(settings.resolve)
        self._drained, self._ends, self._replay = drained, ends, replay
        self._on_batch, self._make_publisher = on_batch, publisher
        self._stop = threading.Event()
        self._largest: int | None = None  # bytes of a record
        self._publishing: tuple[Batch, Future[float]] | None = None
        self._intake: Intake
        self._publisher: Publisher
        self._enricher: Enricher
        self._prefetch_thread: ThreadPoolExecutor
        self._publish_thread: ThreadPoolExecutor

    def stop(self) -> None:
        """Let the worker finish its batch and end; safe from any thread and from a signal handler."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """True if the worker was told to stop."""
        return self._stop.is_set()

    def run(self) -> Totals:
        """Run the loop.

        Returns
        -------
        totals : Totals
            What was done.

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
            with FrameStore(self._settings.frames) as store:  # first: what is wrong with its roots is said at once
                self._enricher = Enricher(self._settings, store, self._resolver)
                self._connect()
                try:
                    with (
                        ThreadPoolExecutor(1, "prefetch") as self._prefetch_thread,
                        ThreadPoolExecutor(1, "publish") as self._publish_thread,
                    ):
                        self._loop()
                finally:
                    # Committed first, closed after: closing hands the partitions on.
                    self._intake.close()
                    self._publisher.close()
        except KafkaException as exc:
            raise PublishError(f"kafka: {exc.args[0].str()}") from exc
        return self.totals

    def _loop(self) -> None:
        """Read a batch, enrich the one before while the last one commits, then publish it."""
        intake = self._intake
        prefetching: tuple[Batch, Future[Prefetched]] | None = None
        while not self._is_done(prefetching is not None):
            try:
                polled = intake.poll_batch(wait=prefetching is None)
                upcoming = self._prefetch(polled) if polled else None
                if prefetching:
                    self._enrich(*prefetching)
                self._wait_for_commit()
            except (TransactionAborted, PartitionsRevoked):
                prefetching = upcoming = None
                self._start_over()
                continue
            if prefetching:
                self._publishing = prefetching[0], self._publish_thread.submit(self._publish, prefetching[0])
            prefetching = upcoming
        with suppress(TransactionAborted):  # which is logged; the next owner of the partitions reads the batch again
            self._wait_for_commit()

    def _start_over(self) -> None:
        """Go back to what was committed, and discard what was polled since."""
        with suppress(TransactionAborted):
            self._wait_for_commit()  # partitions may be lost while a batch is being published
        if self._stop.is_set():
            self._intake.discard()  # the next owner of the partitions begins at the committed offsets
        else:
            self._intake.rewind()

    def _is_done(self, is_prefetching: bool) -> bool:
        if is_prefetching or not self._intake.is_empty:
            return False
        return self._stop.is_set() or (self._intake.has_ended and self._publishing is None)

    # -- the start ----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        worker = self._settings.worker
        transactional = worker.guarantee == "exactly-once"
        retries = [worker.retry_topic] if worker.retry_topic is not None else []
        outputs = [worker.packet_topic, worker.reject_topic, *retries]
        check_topics(self._settings, [*worker.input_topic, *(outputs if transactional else retries)])
        self._intake = Intake(
            self._settings,
            self._stop,
            drained=self._drained,
            ends=self._ends,
            before_revoke=self._wait_for_commit,
        )
        self._largest = self._limit() if transactional else None
        self._publisher = self._make_publisher(self._settings, self._intake.consumer, self._largest)
        self._publisher.start()
        self._intake.subscribe()
        log.info("group %s slot %s: %s", worker.group, worker.slot_number(), worker.guarantee)

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

    # -- enriching ----------------------------------------------------------------------------------------------

    def _prefetch(self, batch: Batch) -> tuple[Batch, Future[Prefetched]]:
        alerts = [self._decode(item) for item in batch.items]
        return batch, self._prefetch_thread.submit(self._enricher.prefetch, alerts)

    def _decode(self, item: Item) -> Alert | AlertError:
        try:
            return decode(item.message.value() or b"", self._settings.alerts.schema_folder)
        except AlertError as exc:
            return exc

    def _enrich(self, batch: Batch, prefetched: Future[Prefetched]) -> None:
        """Make the outcome of each alert of a batch, and the record to publish."""
        started = time.monotonic()
        results = self._enricher.enrich(prefetched.result())
        for item, result in zip(batch.items, results, strict=True):
            self._conclude(item, result)
        batch.enrich_s = time.monotonic() - started

    def _conclude(self, item: Item, result: Packet | Reject) -> None:
        """Set an alert's outcome (a reject that may still heal becomes a retry) and its record."""
        worker, attempt = self._settings.worker, item.attempt
        item.outcome = result
        if isinstance(result, Reject):
            following = attempt.following(result.error, worker, time.time())
            if following is not None:
                item.outcome = Retry(result.alert_id, result.error, following)
            level, name = (logging.WARNING, "reject") if following is None else (logging.INFO, "retry")
            log.log(
                level,
                "%s topic=%s partition=%d offset=%d alert=%s attempt=%d error=%s: %s",
                *(name, attempt.topic, attempt.partition, attempt.offset, result.alert_id, attempt.number),
                *(type(result.error).__name__, result.error),
            )
        item.record = item.to_record(worker, self._replay)

    # -- publishing ---------------------------------------------------------------------------------------------

    def _publish(self, batch: Batch) -> float:
        """Publish and commit one batch, in the publisher's thread; return the seconds that it took."""
        started = time.monotonic()
        while True:
            try:
                self._publisher.publish([item.record for item in batch.items], batch.offsets(), batch.metadata)
            except RecordTooLarge as exc:
                item = batch.items[exc.index]
                if not isinstance(item.outcome, Packet):
                    raise PublishError(f"not even the reject can be published: {exc}") from exc
                self._conclude(item, Reject(item.outcome.alert_id, "publish", exc))
            else:
                return time.monotonic() - started

    def _wait_for_commit(self) -> None:
        """Wait for the batch that is being published, and count it.

        Raises
        ------
        TransactionAborted
            The batch must be read again.
        PublishError
            Publishing cannot go on.
        """
        if self._publishing is None:
            return
        (batch, future), self._publishing = self._publishing, None
        try:
            publish_s = future.result()
        except TransactionAborted as exc:
            self.totals.aborts += 1
            log.warning("aborted batch of %d alerts, reading it again: %s", len(batch.items), exc)
            if exc.too_large:
                self._learn_limits(exc)
            raise
        self._count(batch, publish_s)

    def _learn_limits(self, problem: TransactionAborted) -> None:
        """Ask for the topics' limits again: one was lowered while the worker ran."""
        before, self._largest = self._largest, self._limit()
        if self._largest is None or (before is not None and self._largest >= before):
            raise PublishError(f"a topic refuses records that its limit should allow: {problem}") from problem
        log.warning("records of up to %d bytes are taken from now on", self._largest)
        self._publisher.resize(self._largest)

    def _count(self, batch: Batch, publish_s: float) -> None:
        alerts, packets, retries, rejects = (
            sum(isinstance(item.outcome, kind) for item in batch.items) for kind in (object, Packet, Retry, Reject)
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
            *(sum(len(item.record.value or b"") for item in batch.items), batch.poll_s, batch.enrich_s, publish_s),
        )
        self._on_batch(self.totals)
