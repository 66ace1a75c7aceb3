"""Sources of bytes below the FITS reading: a mapped file, a file read by position, bytes made once and kept.

Remote files read by ranges are in `stampworker.frames.io.ranges`.

Why files are mapped: a 63 × 63 stamp from a mapped frame takes 4 µs, 63 positioned reads 40 µs, one read of its rows
60 µs and more. What speaks against a map is SIGBUS, which kills the process when a mapped page cannot be read. Hence,
before any access: the file's length is asked again, so a file that was truncated meanwhile is an error; and pages that
are touched for the first time are asked for by ``MADV_POPULATE_READ``, which gives an errno where access would give the
signal (a bad disk, a stale network file). What remains is a truncation inside the few microseconds of one copy: the
process dies, its batch is read again by the next one, and then the file's length tells. Where the kernel has no
``MADV_POPULATE_READ`` (before Linux 5.14, other systems) files are read by position.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from stampworker.errors import FrameUnavailable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stampworker.frames.cache import CacheBudget

GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 16
_MADV_POPULATE_READ = 22  # absent from the mmap module


class FetchTask(NamedTuple):
    """A task that brings ``size`` bytes into memory before they are read; tasks may run at the same time."""

    size: int
    run: Callable[[], object]


class Source(Protocol):
    """Bytes that can be read anywhere: ``size`` of them.

    ``bytes_upfront`` of a file had to be downloaded or decompressed before any could be read.
    """

    size: int
    bytes_upfront: int = 0

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on; the caller stays within ``size``.

        `FrameUnavailable` where the file is another one than when it was opened, or cannot be read.
        """

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return an array over the image at ``offset`` whose rows ``first:last`` may be touched, without a copy.

        None where the bytes are not in memory.
        """
        return None


class MappedFile(Source):
    """A local file in the address space; ``url`` names it in messages, ``fd`` is still the caller's to close.

    `OSError` where it cannot be mapped, or not without the risk of SIGBUS.
    """

    def __init__(self, fd: int, url: str) -> None:
        self.size = os.fstat(fd).st_size
        self._url = url
        self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._length = self._map.size  # asks the file, not the map
        self._seen = bytearray(self.size // _CHUNK + 1)
        self._images: dict[int, NDArray[Any]] = {}  # an HDU has one shape and one type
        self._populate(0, 1)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        self._touch(offset, offset + length)
        return self._map[offset : offset + length]

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return the image at ``offset`` as an array over the map."""
        image = self._images.get(offset)
        if image is None:
            image = np.frombuffer(self._map, dtype, shape[0] * shape[1], offset).reshape(shape)
            self._images[offset] = image
        stride = shape[1] * dtype.itemsize
        self._touch(offset + first * stride, offset + last * stride)
        return image

    def _touch(self, start: int, stop: int) -> None:
        if self._length() < self.size:
            raise FrameUnavailable(self._url, f"the file shrank from {self.size} to {self._length()} bytes while open")
        if self._seen.find(0, start // _CHUNK, stop // _CHUNK + 1) >= 0:
            try:
                self._populate(start // _CHUNK, stop // _CHUNK + 1)
            except OSError as exc:
                raise FrameUnavailable(self._url, f"bytes {start}:{stop}: {exc.strerror}") from exc

    def _populate(self, first: int, last: int) -> None:
        start, stop = first * _CHUNK, min(last * _CHUNK, self.size)
        self._map.madvise(_MADV_POPULATE_READ, start, stop - start)
        self._seen[first:last] = b"\1" * (last - first)


class PositionedFile(Source):
    """A local file read by position, where it cannot be mapped safely; a duplicate of ``fd`` is kept."""

    def __init__(self, fd: int, url: str) -> None:
        self.size, self._url, self._fd = os.fstat(fd).st_size, url, os.dup(fd)
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        parts: list[bytes] = []
        while length > 0:
            try:
                part = os.pread(self._fd, length, offset)
            except OSError as exc:
                raise FrameUnavailable(self._url, f"bytes {offset}:{offset + length}: {exc.strerror}") from exc
            if not part:
                raise FrameUnavailable(self._url, f"the file shrank from {self.size} to {offset} bytes while open")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)


def open_file(fd: int, url: str) -> Source:
    """Return a source over an open, regular, non-empty local file."""
    try:
        return MappedFile(fd, url)
    except OSError:  # no map, or no MADV_POPULATE_READ
        return PositionedFile(fd, url)


class CachedBytes(Source):
    """Bytes that are made as a whole, a gzip file decompressed or a body downloaded, and kept within a budget.

    ``make`` is called again when they were dropped; ``data`` are the bytes if they have been made already. ``packed``
    is the number of bytes that they are made from, if those were read whole, too.
    """

    def __init__(
        self,
        make: Callable[[], bytearray],
        url: str,
        budget: CacheBudget,
        data: bytearray | None = None,
        packed: int = 0,
    ) -> None:
        self._make, self._url, self._budget = make, url, budget
        self._lock = threading.Lock()
        self._data: bytearray | None = make() if data is None else data
        self.size = self.nbytes = len(self._data)
        self.bytes_upfront = packed + self.size
        self.last_used = budget.clock()
        budget.evict(self)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return bytes(memoryview(self._content())[offset : offset + length])

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return the image at ``offset`` as an array over the bytes; the caller does not keep it."""
        return np.frombuffer(self._content(), dtype, shape[0] * shape[1], offset).reshape(shape)

    def fetch_tasks(self) -> list[FetchTask]:
        """Return the task that makes dropped bytes again; bytes that are kept stay for a batch."""
        self.last_used = self._budget.clock()
        return [] if self._data is not None else [FetchTask(self.size, self._content)]

    def release(self) -> None:
        """Forget the bytes."""
        self._data, self.nbytes = None, 0

    def _content(self) -> bytearray:
        self.last_used = self._budget.clock()
        with self._lock:
            data = self._data
            if data is None:
                data = self._make()
                if len(data) != self.size:
                    raise FrameUnavailable(self._url, f"{len(data)} bytes, {self.size} when it was opened")
                self._data, self.nbytes = data, len(data)
                self._budget.evict(self)
        return data
