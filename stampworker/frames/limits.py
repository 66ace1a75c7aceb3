"""What one alert may cost, in time and in bytes: limits on all that a thread does inside a ``with``.

Bytes are counted by need, not by what is in memory already, so that an alert is refused, or not, whatever was read
before it: a section of a remote frame costs its rows, one of a compressed frame its tiles, compressed and decoded; a
frame that must be had whole (gzip, or a server without ranges) costs all that, once an alert. Rows of plain local files
are free: they are in the address space, and bounded by the stamp's radius.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from stampworker.errors import FrameRefused


class _Limits(threading.local):
    end: float | None = None
    limit: int | None = None
    spent: int = 0
    counted: frozenset[object] = frozenset()


_current = _Limits()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End every request of this thread inside the block within ``seconds``; of two limits the earlier one counts."""
    before = _current.end
    end = time.monotonic() + seconds
    _current.end = end if before is None else min(end, before)
    try:
        yield
    finally:
        _current.end = before


def end_within(seconds: float) -> float:
    """Return when a request that begins now must have ended, on the monotonic clock."""
    end = time.monotonic() + seconds
    return end if _current.end is None else min(end, _current.end)


@contextlib.contextmanager
def byte_limit(size: int) -> Iterator[None]:
    """Refuse what this thread would read or decompress inside the block beyond ``size`` bytes."""
    _current.limit, _current.spent, _current.counted = size, 0, frozenset()
    try:
        yield
    finally:
        _current.limit = None


def count(url: str, size: int, source: object, bytes_upfront: int) -> None:
    """Count a section against the limit that holds here, if any.

    Parameters
    ----------
    url : str
        Name for messages.
    size : int
        Bytes that the section needs.
    source : object
        The file that it is of.
    bytes_upfront : int
        Bytes of the file that are needed for any section; counted once inside a limit.

    Raises
    ------
    FrameRefused
        With these the limit is passed.
    """
    if _current.limit is None:
        return
    if source not in _current.counted:
        _current.counted |= {source}
        _current.spent += bytes_upfront
    _current.spent += size
    if _current.spent > _current.limit:
        raise FrameRefused(
            url,
            f"with this section {_current.spent} bytes to be read and decompressed, above the {_current.limit} that "
            "one alert may cost (frames.max_alert_bytes)",
        )
