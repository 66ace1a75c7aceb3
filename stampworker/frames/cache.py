"""Bounded memory for decompressed data: who holds how much, and who gives way."""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Protocol


class Evictable(Protocol):
    """Something that keeps ``nbytes`` bytes of data, which were used, or fetched for use, at time ``last_used``."""

    nbytes: int
    last_used: int

    def release(self) -> None:
        """Forget the data; it can be decompressed again."""
        ...


class CacheBudget:
    """Keep the bytes of all holders below a limit by releasing the least recently used.

    The one that is being used is never released for itself, so a single frame above the limit still serves.

    Parameters
    ----------
    limit : int
        Bytes in all.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._holders: weakref.WeakSet[Evictable] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        self._mark = 0
        self.clock = self._clock.__next__

    @property
    def nbytes(self) -> int:
        """Bytes held by all, now."""
        with self._lock:
            return sum(holder.nbytes for holder in self._holders)

    def evict(self, user: Evictable) -> None:
        """Account what ``user`` holds now; release others until the limit is kept."""
        with self._lock:
            self._holders.add(user)
            others = sorted((one for one in self._holders if one is not user), key=lambda one: one.last_used)
            total = user.nbytes + sum(holder.nbytes for holder in others)
            for holder in others:
                if total <= self._limit:
                    return
                total -= holder.nbytes
                holder.release()

    def fits(self, user: Evictable, size: int) -> bool:
        """Say whether ``user`` may hold ``size`` bytes more without passing the limit by itself."""
        return user.nbytes + size <= self._limit

    def evict_unused(self) -> None:
        """Release what was not used, or made ready for use, since the last call.

        What is prepared for the batch that follows while one is computed outlasts the call that ends this one, and goes
        with the next unless it was used meanwhile.
        """
        with self._lock:
            for holder in self._holders:
                if holder.last_used <= self._mark:
                    holder.release()
            self._mark = self.clock()
