"""The wait of the alerts that are tried again.

All wait equally long, so the first record of a partition of the retry topic is due first, and waiting for it keeps
back none that could go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Generic, TypeVar

from confluent_kafka import Consumer, TopicPartition

Place = tuple[str, int]
"""Topic and partition."""

Kept = TypeVar("Kept")


class WaitingRoom(Generic[Kept]):
    """Keeps the first record of each partition until it is due; the partition is paused meanwhile.

    Parameters
    ----------
    reader : Consumer
    """

    def __init__(self, reader: Consumer) -> None:
        self._reader = reader
        self._kept: dict[Place, tuple[float, Kept]] = {}

    def keep(self, place: Place, wait_s: float, record: Kept) -> None:
        """Keep a record for some seconds; nothing more is read from its partition."""
        # What was fetched beyond it is dropped and fetched again, from the next record on.
        self._reader.pause([TopicPartition(*place)])
        self._kept[place] = time.monotonic() + wait_s, record

    def take(self) -> Kept | None:
        """Return a record that is due, if any, and let its partition go on."""
        now = time.monotonic()
        for place, (due, record) in self._kept.items():
            if due <= now:
                self.dismiss([place])
                return record
        return None

    def dismiss(self, places: Iterable[Place]) -> None:
        """Forget what is kept of partitions that are set back or go to another worker."""
        kept = [place for place in places if self._kept.pop(place, None) is not None]
        if kept:
            self._reader.resume([TopicPartition(*place) for place in kept])
