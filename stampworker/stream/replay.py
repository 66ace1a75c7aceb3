"""Replay: a retained topic through the same worker, into another topic.

A replay is a consumer group of its own, set to where the range begins, and a worker that ends where the range ends. So
it keeps the worker's promise, and running an interrupted replay again under the same name resumes it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaException, TopicPartition

from stampworker.config import Settings
from stampworker.errors import BrokerUnavailable, ConfigError
from stampworker.resolve import load_resolver
from stampworker.stream.kafka import Partition, check_topics, committed, consumer
from stampworker.stream.worker import Totals, Worker

_CALL_S = 15.0
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Bound:
    """Where a range begins or ends, in every partition.

    Attributes
    ----------
    offset : int or None
        An offset, ...
    time : datetime.datetime or None
        ... or the first record at or after a time, with its time zone.
    """

    offset: int | None = None
    time: datetime.datetime | None = None


def parse_bound(text: str) -> Bound:
    """Read a bound: an offset, or a time in ISO 8601, UTC where it names no zone.

    Raises
    ------
    ConfigError
        It is neither.
    """
    if text.isdecimal():
        return Bound(offset=int(text))
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"found {text!r}, wanted an offset or a time such as 2026-01-31T23:15:00") from None
    return Bound(time=time if time.tzinfo else time.replace(tzinfo=datetime.UTC))


def replay(
    settings: Settings,
    topic: str,
    to_topic: str,
    *,
    run: str,
    start: Bound | None = None,
    end: Bound | None = None,
    on_worker: Callable[[Worker], None] | None = None,
) -> Totals:
    """Send the alerts of a range of a topic through the worker again.

    Parameters
    ----------
    settings : Settings
        As for the worker; input, packet topic and group are replaced.
    topic, to_topic : str
        Where alerts are read from, and where packets go.
    run : str
        Name of the replay: of its group and of the packets' header. Running it again under the same name resumes it.
    start, end : Bound, optional
        The range, half open; by default all that the topic holds now.
    on_worker : callable, optional
        Called with the worker before it runs, so that it can be stopped.

    Returns
    -------
    totals : Totals
        What was done.

    Raises
    ------
    ConfigError
        A topic is not there, the packets would go to a topic that is in use, the range ends before it begins, or the
        resolver cannot be loaded.
    BrokerUnavailable
        No broker answers.
    """
    live = {topic: "the topic that is replayed", settings.worker.packet_topic: "the live packets' topic"}
    live[settings.worker.reject_topic] = "the topic of rejects"
    if settings.worker.retry_topic is not None:
        live[settings.worker.retry_topic] = "the topic of retries"
    if to_topic in live:
        raise ConfigError(f"--to-topic: found {to_topic!r}, {live[to_topic]}; wanted one of its own")
    _check_range(start or Bound(), end or Bound())
    load_resolver(settings.resolve)  # as the worker will; before the group is set to the range
    group = f"{settings.worker.group}-replay-{run}"
    worker_settings = settings.worker.model_copy(
        update={"input_topic": (topic,), "packet_topic": to_topic, "group": group, "retry_topic": None}
    )
    settings = settings.model_copy(update={"worker": worker_settings})
    ends = _prepare(settings, topic, start or Bound(), end or Bound())
    worker = Worker(settings, ends=ends, replay=run)
    if on_worker is not None:
        on_worker(worker)
    return worker.run()


def _check_range(start: Bound, end: Bound) -> None:
    backwards = start.offset is not None and end.offset is not None and start.offset >= end.offset
    if backwards or (start.time is not None and end.time is not None and start.time >= end.time):
        raise ConfigError("--from, --until: found a range that ends before it begins")


def _prepare(settings: Settings, topic: str, start: Bound, end: Bound) -> dict[Partition, int]:
    """Set the group to the start of the range, unless the replay has begun already; return where the range ends."""
    count = check_topics(settings, [topic])[topic]
    reader = consumer(settings)
    try:
        ends: dict[Partition, int] = {}
        partitions = [TopicPartition(topic, number) for number in range(count)]
        begun = {p.partition for p in committed(reader, partitions, _CALL_S) if p.offset != OFFSET_INVALID}
        starts = []
        for partition in partitions:
            low, high = reader.get_watermark_offsets(partition, timeout=_CALL_S)
            first = _offset(reader, partition, start, low, low, high)
            ends[topic, partition.partition] = _offset(reader, partition, end, high, low, high)
            if partition.partition not in begun:
                starts.append(TopicPartition(topic, partition.partition, first))
        if starts:
            reader.commit(offsets=starts, asynchronous=False)
    except KafkaException as exc:
        raise BrokerUnavailable(f"the range of {topic!r} cannot be found: {exc.args[0].str()}") from exc
    finally:
        reader.close()
    return ends


def _offset(reader: Consumer, partition: TopicPartition, bound: Bound, default: int, low: int, high: int) -> int:
    if bound.offset is not None:
        return min(max(bound.offset, low), high)
    if bound.time is None:
        return default
    # The first millisecond at or after the time; as a float it would be off by one now and then.
    milliseconds = -((_EPOCH - bound.time) // datetime.timedelta(milliseconds=1))
    found = reader.offsets_for_times(
        [TopicPartition(partition.topic, partition.partition, milliseconds)], timeout=_CALL_S
    )[0]
    return found.offset if found.offset >= 0 else high
