"""How an alert leaves the worker: as the record of a packet, a retry or a reject."""

from __future__ import annotations

import logging
import math
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from confluent_kafka import Message

from stampworker.config import WorkerSettings
from stampworker.errors import FrameMissing, FrameUnavailable
from stampworker.formats.packets import Packet, encode
from stampworker.formats.rejects import Reject
from stampworker.formats.schema import PACKET
from stampworker.stream.kafka import Headers, Record, offset_of, partition_of

log = logging.getLogger(__name__)

HEADERS_PREFIX = "stampworker."
ERRORS_PREFIX = HEADERS_PREFIX + "errors."
RETRY_PREFIX = HEADERS_PREFIX + "retry."

# The topics of rejects and retries must take the alert and these headers.
_LONGEST_HEADER = 8_000  # characters
# A direct call of the method would not notice that the client returns a value and sets an error at the same time.
_call_headers = cast(Callable[[Message], Headers | None], operator.methodcaller("headers"))
_STAGES = {  # stage of a reject: the code that rejected it, for the header class.name
    "decode": "stampworker.formats.alerts.decode",
    "frames": "stampworker.frames.FrameStore",
    "enrich": "stampworker.enrich.Enricher",
    "publish": "stampworker.stream.kafka.Publisher",
}


@dataclass(frozen=True)
class Attempt:
    """One attempt to make a packet of an alert.

    Attributes
    ----------
    topic, partition, offset, timestamp_ms : str, int
        Of the record that the alert was first read from.
    number : int
        1 for the first attempt.
    since_s : float
        When the first attempt failed, seconds since 1970; 0 for the first attempt.
    due_s : float
        When the attempt may be made, seconds since 1970; 0 for the first attempt.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    number: int = 1
    since_s: float = 0.0
    due_s: float = 0.0

    @classmethod
    def from_message(cls, message: Message, retry_topic: str | None) -> Attempt:
        """Return which attempt at its alert a record is: the first one, unless it comes from the retry topic.

        A record of the retry topic that no worker put there is taken as a first attempt, with a warning.
        """
        topic, partition = partition_of(message)
        first = cls(topic, partition, offset_of(message), message.timestamp()[1])
        if topic != retry_topic:
            return first
        values = {name.removeprefix(RETRY_PREFIX): _text(value) for name, value in _headers_of(message)}
        try:
            origin = values["topic"]
            numbers = [int(values[name]) for name in ("partition", "offset", "timestamp_ms", "number")]
            times = [float(values[name]) for name in ("since_s", "due_s")]
            if not all(map(math.isfinite, times)):
                raise ValueError(f"since_s, due_s: found {times}, wanted finite ones")
            return cls(origin, *numbers, *times)
        except (KeyError, ValueError) as exc:
            log.warning(
                "%s partition %d offset %d: the headers %s* of a retry: %s %s; taken as an alert",
                *(topic, partition, first.offset, RETRY_PREFIX, type(exc).__name__, exc),
            )
            return first

    def headers(self) -> Headers:
        """Return the headers that `from_message` reads."""
        return [(RETRY_PREFIX + name, str(value)) for name, value in vars(self).items()]

    def following(self, error: Exception, settings: WorkerSettings, now_s: float) -> Attempt | None:
        """Return the attempt that follows one that failed with ``error``; ``now_s`` is in seconds since 1970.

        None where the failure cannot heal, or no time is left for it to.
        """
        patience = {FrameMissing: settings.retry_missing_for_s, FrameUnavailable: settings.retry_unavailable_for_s}
        limit = next((limit for kind, limit in patience.items() if isinstance(error, kind)), 0.0)
        # A first attempt in the future was made by another clock: it must not prolong the patience.
        since, due = min(self.since_s or now_s, now_s), now_s + settings.retry_delay_s
        if settings.retry_topic is None or due > since + limit:
            return None
        return replace(self, number=self.number + 1, since_s=since, due_s=due)


@dataclass(frozen=True)
class Retry:
    """An alert whose frames may still come: why the last attempt failed, and the next one."""

    alert_id: str | None
    error: Exception
    attempt: Attempt


Outcome = Packet | Retry | Reject


@dataclass
class Item:
    """One alert on its way through the worker; it has an outcome and a record once it is enriched."""

    message: Message
    attempt: Attempt
    outcome: Outcome = field(init=False, repr=False)
    record: Record = field(init=False, repr=False)

    def to_record(self, settings: WorkerSettings, run: str | None = None) -> Record:
        """Return the record to publish; a retry and a reject keep key, value and headers of the alert byte for byte.

        ``run`` is the name of a replay, for the packets' header.
        """
        outcome, message = self.outcome, self.message
        is_first = self.attempt.number == 1
        original = [pair for pair in _headers_of(message) if is_first or not pair[0].startswith(RETRY_PREFIX)]
        if isinstance(outcome, Packet):
            headers = _packet_headers(outcome, self.attempt, run)
            return Record(settings.packet_topic, outcome.key.encode(), encode(outcome), headers)
        if isinstance(outcome, Retry):
            headers = [*original, *outcome.attempt.headers()]
            return Record(str(settings.retry_topic), message.key(), message.value(), headers)
        headers = [*original, *_error_headers(self.attempt, outcome)]
        return Record(settings.reject_topic, message.key(), message.value(), headers)


def _packet_headers(packet: Packet, attempt: Attempt, run: str | None) -> Headers:
    values = {
        "schema": " ".join(PACKET),
        "version": packet.worker_version,
        "input.topic": attempt.topic,
        "input.partition": str(attempt.partition),
        "input.offset": str(attempt.offset),
    }
    if attempt.number > 1:
        values["attempt"] = str(attempt.number)
    if run is not None:
        values["replay"] = run
    return [(HEADERS_PREFIX + name, value) for name, value in values.items()]


def _error_headers(attempt: Attempt, reject: Reject) -> Headers:
    """Say why an alert was rejected, in the manner of Kafka Connect's dead-letter headers."""
    error = reject.error
    values: Mapping[str, Any] = {
        "topic": attempt.topic,
        "partition": attempt.partition,
        "offset": attempt.offset,
        "timestamp": attempt.timestamp_ms,
        "stage": reject.stage,
        "class.name": _STAGES[reject.stage],
        "exception.class.name": f"{type(error).__module__}.{type(error).__name__}",
        "exception.message": str(error)[:_LONGEST_HEADER],
        "exception.stacktrace": "".join(traceback.format_exception(error))[-_LONGEST_HEADER:],
        "attempt": attempt.number,
    }
    return [(ERRORS_PREFIX + name, str(value)) for name, value in values.items()]


def _headers_of(message: Message) -> Headers:
    """Return a message's headers; none, with a warning, where the client cannot read them."""
    try:
        return _call_headers(message) or []
    except SystemError:
        # The client cannot return a header's name that is not UTF-8: the first call fails, and every later call returns
        # a list with a null pointer in it, which kills the process.
        message.set_headers([])
        log.warning(
            "%s partition %s offset %s: a header's name is not UTF-8; the record goes on without headers",
            *(message.topic(), message.partition(), message.offset()),
        )
        return []


def _text(value: str | bytes | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
