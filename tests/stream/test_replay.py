"""Where a replay begins and ends, and what it refuses; without a broker."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from stampworker.config import Settings, load
from stampworker.errors import ConfigError
from stampworker.stream.replay import Bound, _offset, parse_bound, replay


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("0", Bound(offset=0)),
        ("1234567", Bound(offset=1234567)),
        ("2026-01-31T23:15:00", Bound(time=datetime(2026, 1, 31, 23, 15, tzinfo=UTC))),
        ("2026-01-31T23:15:00Z", Bound(time=datetime(2026, 1, 31, 23, 15, tzinfo=UTC))),
        ("2026-01-31T23:15:00.25+02:00", Bound(time=datetime(2026, 1, 31, 21, 15, 0, 250_000, tzinfo=UTC))),
        ("2026-01-31", Bound(time=datetime(2026, 1, 31, tzinfo=UTC))),
    ],
)
def test_bound_is_an_offset_or_a_time(text: str, bound: Bound) -> None:
    """Digits are an offset; anything else is a time, UTC where it names no zone."""
    assert parse_bound(text) == bound


@pytest.mark.parametrize("text", ["", "-1", "1.5", "yesterday", "2026-13-01"])
def test_bound_that_is_neither_is_refused(text: str) -> None:
    """What is neither is named, with an example of what is wanted."""
    with pytest.raises(ConfigError, match="wanted an offset or a time such as"):
        parse_bound(text)


@pytest.mark.parametrize(
    ("to_topic", "what"),
    [
        ("alerts", "the topic that is replayed"),
        ("packets", "the live packets' topic"),
        ("rejects", "the topic of rejects"),
        ("retries", "the topic of retries"),
    ],
)
def test_replay_into_a_topic_in_use_is_refused(to_topic: str, what: str) -> None:
    """Packets never go to the topic that is read, nor where the live worker would read or write them."""
    settings = load(flags={"worker.retry_topic": "retries"})
    with pytest.raises(ConfigError, match=f"found '{to_topic}', {what}"):
        replay(settings, "alerts", to_topic, run="r")


@pytest.mark.parametrize(("start", "end"), [("9", "3"), ("3", "3"), ("2026-01-02T00:00:00", "2026-01-01T00:00:00")])
def test_range_that_ends_before_it_begins_is_refused(start: str, end: str) -> None:
    """Such a range is a slip, not an empty replay."""
    with pytest.raises(ConfigError, match="ends before it begins"):
        replay(Settings(), "alerts", "again", run="r", start=parse_bound(start), end=parse_bound(end))


class Reader:
    """Knows one record, by its time."""

    def __init__(self, offset: int) -> None:
        self.asked: list[int] = []
        self.offset = offset

    def offsets_for_times(self, places: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        """Note the milliseconds asked for."""
        self.asked.append(places[0].offset)
        return [TopicPartition(places[0].topic, places[0].partition, self.offset)]


def offset(bound: Bound, reader: Any = None) -> int:
    return _offset(reader, TopicPartition("alerts", 0), bound, default=3, low=3, high=9)


@pytest.mark.parametrize(("given", "found"), [(0, 3), (5, 5), (100, 9)])
def test_offset_is_held_within_what_the_topic_keeps(given: int, found: int) -> None:
    """An offset that is gone, or not there yet, is the nearest one that is."""
    assert offset(Bound(offset=given)) == found


def test_no_bound_is_the_default() -> None:
    """Without a bound the whole partition counts."""
    assert offset(Bound()) == 3


@pytest.mark.parametrize(("found", "expected"), [(5, 5), (-1, 9)])
def test_time_behind_the_last_record_is_the_end(found: int, expected: int) -> None:
    """A time after every record is the end of the partition."""
    assert offset(Bound(time=datetime(2026, 1, 1, tzinfo=UTC)), Reader(found)) == expected


@pytest.mark.parametrize("microseconds", [0, 1, 999, 1000, 1001, 122_999, 123_000, 123_001, 999_999])
def test_time_is_the_first_millisecond_at_or_after_it(microseconds: int) -> None:
    """Kafka's times are whole milliseconds: none before the bound is taken, in any zone, whatever floats make of it."""
    moment = datetime(2026, 1, 31, 23, 15, 7, tzinfo=timezone(timedelta(hours=2)))
    reader = Reader(5)
    offset(Bound(time=moment + timedelta(microseconds=microseconds)), reader)
    whole = int(moment.timestamp()) * 1000
    assert reader.asked == [whole + (microseconds + 999) // 1000]
