"""Failures of remote files and servers, remembered for a while."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable
from typing import TypeVar

from stampworker.errors import FrameError

E = TypeVar("E", bound=FrameError)

_MOST_REMEMBERED = 10_000
# A server, not only one of its files, is slow after this many waits in vain without an answer in between.
_SLOW_FILES = 3


class FailureCache:
    """Failures that are not asked about again for a while, so that a burst of alerts asks once.

    They are remembered for ``seconds``, unless the server asks for longer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        # Not the errors themselves: their tracebacks hold the bodies that were being read.
        self._known: dict[Hashable, tuple[float, float, type[FrameError], str]] = {}
        self._late: dict[Hashable, set[Hashable]] = {}
        self._answered: dict[Hashable, float] = {}

    def note(self, key: Hashable, error: E, seconds: float | None = None) -> E:
        """Remember a failure of a URL or of a whole server, for ``seconds`` at least, and return it."""
        now = time.monotonic()
        until = now + max(seconds or 0.0, self._seconds)
        with self._lock:
            self._known.pop(key, None)
            if len(self._known) >= _MOST_REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = now, until, type(error), error.problem
        return error

    def note_late(self, server: Hashable, key: Hashable, error: E, since: float) -> E:
        """Remember that no answer came in time: of a URL, and of its server after `_SLOW_FILES` of them in succession.

        ``since`` is when the question was asked, on the monotonic clock. The error is returned.
        """
        self.note(key, error)
        with self._lock:
            if self._answered.get(server, -math.inf) >= since:
                return error
            late = self._late.setdefault(server, set())
            if len(late) < _SLOW_FILES:
                late.add(key)
            is_slow = len(late) >= _SLOW_FILES
        return self.note(server, error) if is_slow else error

    def note_answer(self, server: Hashable) -> None:
        """Remember that a server gave an answer in time."""
        with self._lock:
            self._answered[server] = time.monotonic()
            self._late.pop(server, None)

    def sweep(self) -> None:
        """Forget the failures whose time is over; call it once a batch."""
        now = time.monotonic()
        with self._lock:
            self._known = {key: known for key, known in self._known.items() if known[1] > now}

    def check(self, display_url: str, *keys: Hashable) -> None:
        """Raise the failure that is remembered under one of the keys, with ``display_url`` as its URL."""
        now = time.monotonic()
        for key in keys:
            with self._lock:
                known = self._known.get(key)
                if known is not None and known[1] <= now:
                    del self._known[key]
                    known = None
            if known is not None:
                noted, until, kind, problem = known
                raise kind(display_url, f"{problem} ({now - noted:.1f} s ago; asked again in {until - now:.1f} s)")
