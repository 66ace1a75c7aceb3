"""What one alert may cost, in time and in bytes: limits on what a thread does inside a ``with`` block.

The bytes of a section are counted whether they are in memory or not, so that the same alert is always refused or always
accepted. A section of a remote frame costs its rows. A section of a compressed frame costs its tiles, compressed and
decoded. A frame that must be read as a whole (gzip, or a server without ranges) costs its whole size, once per alert.
Rows of plain local files are free: they are mapped, and the radius of a stamp limits them.
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
    """End every request of this thread in the block within ``seconds``; of nested limits the earliest counts."""
    before = _current.end
    end = time.monotonic() + seconds
    _current.end = end if before is None else min(end, before)
    try:
        yield
    finally:
        _current.end = before


def end_within(seconds: float) -> float:
    """Return when a request that begins now must end, on the monotonic clock."""
    end = time.monotonic() + seconds
    return end if _current.end is None else min(end, _current.end)


@contextlib.contextmanager
def byte_limit(size: int) -> Iterator[None]:
    """Refuse sections of this thread in the block once they need more than ``size`` bytes together."""
    _current.limit, _current.spent, _current.counted = size, 0, frozenset()
    try:
        yield
    finally:
        _current.limit = None


def count(url: str, size: int, source: object, bytes_upfront: int) -> None:
    """Count a section of ``size`` bytes against the limit of the current block, if there is one.

    What any section of its file needs, ``bytes_upfront``, is counted once per block. Raises `FrameRefused` beyond it.
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
