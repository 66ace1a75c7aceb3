"""How an alert leaves the worker: as the record of a packet, a retry or a reject."""

from __future__ import annotations

import logging
import math
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from confluent_kafka import Message

from stampworker.config import WorkerSettings
from stampworker.errors import FrameMissing, FrameUnavailable
from stampworker.formats.packets import Packet, encode
from stampworker.formats.rejects import Reject
from stampworker.formats.schema import PACKET
from stampworker.stream.kafka import Headers, Record

log = logging.getLogger(__name__)

HEADERS_PREFIX = "stampworker."
ERRORS_PREFIX = HEADERS_PREFIX + "errors."
RETRY_PREFIX = HEADERS_PREFIX + "retry."

# The topics of rejects and retries must take the alert and these headers.
_LONGEST_HEADER = 8_000
# The interpreter's own fast calls do not notice that the client both fails and returns.
_headers_of = cast(Callable[[Message], Headers | None], operator.methodcaller("headers"))
_STAGES = {  # stage of a reject: what was at work, for the header class.name
    "decode": "stampworker.formats.alerts.decode",
    "frames": "stampworker.frames.FrameStore",
    "enrich": "stampworker.enrich.make_packets",
    "publish": "stampworker.stream.kafka.Publisher",
}


@dataclass(frozen=True)
class Attempt:
    """One try at an alert.

    Attributes
    ----------
    topic, partition, offset, timestamp_ms : str, int
        Of the record that brought the alert first.
    number : int
        1 at first.
    since_s : float
        When the first attempt failed, seconds since 1970; 0 at first.
    due_s : float
        Not to be made before this time; 0 at first.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    number: int = 1
    since_s: float = 0.0
    due_s: float = 0.0

    def headers(self) -> Headers:
        """Return the headers that tell `attempt_of` all this."""
        return [(RETRY_PREFIX + name, str(value)) for name, value in vars(self).items()]


@dataclass(frozen=True)
class Retry:
    """An alert whose frames may still come, and its next attempt."""

    alert_id: str | None
    error: Exception
    attempt: Attempt


Outcome = Packet | Retry | Reject


def attempt_of(message: Message, retry_topic: str | None) -> Attempt:
    """Tell which try at its alert a record is; one of another topic than that of retries is the first.

    Raises
    ------
    ValueError
        The record lies in the retry topic, and no worker has put it there: its headers are not those of an attempt.
    """
    topic = str(message.topic())
    if topic != retry_topic:
        return Attempt(topic, message.partition() or 0, message.offset() or 0, message.timestamp()[1])
    values = {name.removeprefix(RETRY_PREFIX): _text(value) for name, value in _given(message)}
    try:
        first = values["topic"]
        numbers = [int(values[name]) for name in ("partition", "offset", "timestamp_ms", "number")]
        times = [float(values[name]) for name in ("since_s", "due_s")]
        if not all(map(math.isfinite, times)):
            raise ValueError(f"since_s, due_s: found {times}, wanted finite ones")
        return Attempt(first, *numbers, *times)
    except (KeyError, ValueError) as exc:
        raise ValueError(f"the headers {RETRY_PREFIX}* of a retry: {type(exc).__name__} {exc}") from None


def next_attempt(attempt: Attempt, error: Exception, settings: WorkerSettings, now_s: float) -> Attempt | None:
    """Return the try that follows a failed one; None where the failure cannot heal, or no time is left for it to."""
    patience = {FrameMissing: settings.retry_missing_for_s, FrameUnavailable: settings.retry_unavailable_for_s}
    limit = next((limit for kind, limit in patience.items() if isinstance(error, kind)), 0.0)
    # A first attempt that lies in the future is another clock's: it must not make the patience longer for ever.
    since, due = min(attempt.since_s or now_s, now_s), now_s + settings.retry_delay_s
    if settings.retry_topic is None or due > since + limit:
        return None
    return replace(attempt, number=attempt.number + 1, since_s=since, due_s=due)


def record_of(
    message: Message, attempt: Attempt, outcome: Outcome, settings: WorkerSettings, run: str | None = None
) -> Record:
    """Make the record that an alert leaves as.

    Parameters
    ----------
    message : Message
        What was read: a retry and a reject keep its key, value and headers byte for byte.
    attempt : Attempt
        The try that it was.
    outcome : Packet, Retry or Reject
    settings : WorkerSettings
        Topics.
    run : str, optional
        Name of the replay, for the packets' header.

    Returns
    -------
    record : Record
    """
    original = [pair for pair in _given(message) if attempt.number == 1 or not pair[0].startswith(RETRY_PREFIX)]
    if isinstance(outcome, Packet):
        return Record(settings.packet_topic, outcome.key.encode(), encode(outcome), _headers(outcome, attempt, run))
    if isinstance(outcome, Retry):
        headers = [*original, *outcome.attempt.headers()]
        return Record(str(settings.retry_topic), message.key(), message.value(), headers)
    headers = [*original, *_error_headers(attempt, outcome)]
    return Record(settings.reject_topic, message.key(), message.value(), headers)


def _headers(packet: Packet, attempt: Attempt, run: str | None) -> Headers:
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


def _given(message: Message) -> Headers:
    try:
        return _headers_of(message) or []
    except SystemError:
        # The client cannot give a name that is not UTF-8: it fails once, and from then on gives a list with a hole in
        # it that kills the process.
        message.set_headers([])
        log.warning(
            "%s partition %s offset %s: a header's name is not UTF-8; the record goes on without headers",
            *(message.topic(), message.partition(), message.offset()),
        )
        return []


def _text(value: str | bytes | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
