"""A limit on the memory of decompressed and downloaded data, with least-recently-used eviction."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Protocol


class Evictable(Protocol):
    """Something that holds ``nbytes`` bytes of data, last used, or fetched for use, at the clock's ``last_used``."""

    nbytes: int
    last_used: int

    def release(self) -> None:
        """Forget the data; it can be decompressed or downloaded again."""


class CacheBudget:
    """Keep the bytes of all evictables together within a limit by releasing the least recently used ones.

    The evictable that is in use is not released, so a single frame above the limit still works.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._evictables: weakref.WeakSet[Evictable] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._last_eviction = 0
        self.clock = itertools.count(1).__next__

    @property
    def nbytes(self) -> int:
        """Bytes held now by all evictables."""
        with self._lock:
            return sum(evictable.nbytes for evictable in self._evictables)

    def evict(self, user: Evictable) -> None:
        """Count what ``user`` holds now, and release others until all are within the limit."""
        with self._lock:
            self._evictables.add(user)
            others = sorted((e for e in self._evictables if e is not user), key=lambda e: e.last_used)
            total = user.nbytes + sum(other.nbytes for other in others)
            for other in others:
                if total <= self._limit:
                    return
                total -= other.nbytes
                other.release()

    def fits(self, user: Evictable, size: int) -> bool:
        """Return True if ``user`` alone stays within the limit with ``size`` bytes more."""
        return user.nbytes + size <= self._limit

    def evict_unused(self) -> None:
        """Release what was neither used nor fetched for use since the last call.

        Data that was fetched ahead for the next batch survives the call at the end of this batch.
        """
        with self._lock:
            for evictable in self._evictables:
                if evictable.last_used <= self._last_eviction:
                    evictable.release()
            self._last_eviction = self.clock()
