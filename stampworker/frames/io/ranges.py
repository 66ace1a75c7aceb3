"""Remote files, read by ranges; whole where that is the only way.

A protocol (HTTP, a bucket, fsspec's memory) is a `Remote`: the first bytes of a file, a range of it, all of it. Blocks
that were fetched stay within the store's memory budget: stamps of a batch that share rows are fetched once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stampworker.errors import FrameCorrupt, FrameRefused
from stampworker.frames.io.sources import GZIP_MAGIC, CachedBytes, FetchTask, Source

if TYPE_CHECKING:
    from stampworker.frames.cache import CacheBudget

FIRST_BYTES = 1 << 16
"""Bytes asked for at first: magic, the headers of most frames."""

# Ranges are widened to blocks; 63 rows of 3072 float32 are 47 of these, so the widening costs at most 4 %.
_BLOCK = 1 << 14
_GAP = 4  # blocks; ranges this near are fetched with what is between them: cheaper than a second request
_RUN = 256  # blocks, 4 MiB; longer runs are fetched in pieces, at the same time


class FirstRead(NamedTuple):
    """The first answer about a file of ``size`` bytes.

    ``data`` are the first `FIRST_BYTES` bytes, or the whole file if it is shorter or the server serves no ranges.
    """

    data: bytearray
    size: int


class Remote(Protocol):
    """One remote file."""

    @property
    def changed(self) -> bool:
        """Whether the file was seen to be another one than when it was opened."""

    def open(self) -> FirstRead:
        """Ask for the first `FIRST_BYTES` bytes."""

    def read_range(self, offset: int, length: int) -> bytes:
        """Return bytes of the file that was opened; `FrameUnavailable` if it is another one now."""

    def read_all(self) -> bytearray:
        """Return all bytes of the file that was opened; `FrameUnavailable` if it is another one now."""


class RangedFile(Source):
    """A remote file read by ranges; ``budget`` bounds the blocks that are kept."""

    def __init__(self, remote: Remote, first_read: FirstRead, budget: CacheBudget) -> None:
        self.size = first_read.size
        self.nbytes = 0
        self.last_used = budget.clock()
        self._remote, self._budget = remote, budget
        self._lock = threading.Lock()
        self._blocks: dict[int, bytes] = {}
        self._keep(0, bytes(first_read.data))  # whole blocks, FIRST_BYTES being a multiple

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on, with at most one request."""
        self.last_used = self._budget.clock()
        wanted = _block_range(offset, length)
        kept = self._blocks  # blocks are added to it, never taken out
        missing = [index for index in wanted if index not in kept]
        fetched = self._fetch(missing[0], missing[-1]) if missing else {}
        joined = b"".join(fetched[index] if index in fetched else kept[index] for index in wanted)
        start = offset - wanted.start * _BLOCK
        return joined[start : start + length]

    def fetch_tasks(self, spans: Iterable[tuple[int, int]]) -> list[FetchTask]:
        """Return one task for each request that fetches spans of bytes (offset and length) before they are read.

        None if there is no room to keep the bytes.
        """
        self.last_used = self._budget.clock()  # the blocks that are kept already must stay, too
        blocks = {index for offset, length in spans if length for index in _block_range(offset, length)}
        runs: list[list[int]] = []
        for index in sorted(blocks.difference(self._blocks)):
            if runs and index - runs[-1][1] <= _GAP and index - runs[-1][0] < _RUN:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        sizes = [(last + 1 - first) * _BLOCK for first, last in runs]
        if not self._budget.fits(self, sum(sizes)):
            return []
        return [FetchTask(size, partial(self._fetch, *run)) for size, run in zip(sizes, runs, strict=True)]

    def release(self) -> None:
        """Forget the blocks."""
        with self._lock:
            self._blocks, self.nbytes = {}, 0

    def _fetch(self, first: int, last: int) -> dict[int, bytes]:
        start = first * _BLOCK
        data = self._remote.read_range(start, min((last + 1) * _BLOCK, self.size) - start)
        self.last_used = self._budget.clock()
        self._keep(first, data)
        return dict(enumerate(_split(data), first))

    def _keep(self, first: int, data: bytes) -> None:
        if not self._budget.fits(self, len(data)):
            self.release()
        if self._budget.fits(self, len(data)):
            with self._lock:
                for i, block in enumerate(_split(data), first):
                    self.nbytes += len(block) if i not in self._blocks else 0
                    self._blocks[i] = block
            self._budget.evict(self)


def _block_range(offset: int, length: int) -> range:
    return range(offset // _BLOCK, -(-(offset + length) // _BLOCK))


def _split(data: bytes) -> Iterator[bytes]:
    return (data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK))


def open_remote(remote: Remote, url: str, budget: CacheBudget, limit: int) -> Source:
    """Return a source over a remote file: by ranges, or whole if it is small, gzip, or the server has no ranges.

    ``url`` names it in messages, ``limit`` is the size in bytes of the largest gzip file that is read: what one alert
    may cost.
    """
    first_read = remote.open()
    if first_read.size == 0:
        raise FrameCorrupt(url, "the file is empty, wanted FITS")
    if len(first_read.data) == first_read.size:
        return CachedBytes(remote.read_all, url, budget, first_read.data)
    if first_read.data[:2] == GZIP_MAGIC:
        if first_read.size > limit:
            problem = f"above the {limit} that one alert may cost (frames.max_alert_bytes)"
            raise FrameRefused(url, f"gzip of {first_read.size} bytes, {problem}")
        return CachedBytes(remote.read_all, url, budget)
    return RangedFile(remote, first_read, budget)


def check_length(url: str, length: int, limit: int) -> None:
    """Refuse to ask for more than ``limit`` bytes at once."""
    if length > limit:
        raise FrameRefused(url, f"{length} bytes at once, above the {limit} allowed (frames.max_download_bytes)")


def collect(chunks: Iterable[bytes], limit: int, url: str, end: float = math.inf) -> bytearray:
    """Join chunks of a body; refuse more than ``limit`` bytes, raise `TimeoutError` after ``end``."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > limit:
            raise FrameRefused(url, f"more than the {limit} bytes allowed (frames.max_download_bytes)")
        if time.monotonic() > end:
            raise TimeoutError("the total time is over")
    return data
