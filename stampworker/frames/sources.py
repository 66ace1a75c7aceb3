"""Sources of bytes below the FITS reading: a mapped file, a file read by position, bytes made once and kept.

A source has ``size``, ``whole``, ``read(offset, length)`` and, where its bytes lie in memory, ``pixels(...)``: an array
over them without a copy. Remote files read by ranges are in `stampworker.frames.remote`.

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
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError

from stampworker.errors import FrameCorrupt, FrameRefused, FrameUnavailable
from stampworker.frames.allowance import end_within
from stampworker.frames.header import Extent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stampworker.frames.budget import Budget

# isal's type stubs call the class an instance.
INFLATE_ERRORS: tuple[type[Exception], ...] = (IsalError, zlib.error)  # type: ignore[assignment]
GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 16
_INFLATE_STEP = 1 << 20
_MEMBER_STEP = 1 << 12
_MADV_POPULATE_READ = 22  # absent from the mmap module


@dataclass(frozen=True)
class Fetch:
    """Something to be done ahead of reading.

    Attributes
    ----------
    size : int
        Bytes that it brings into memory.
    run : callable
        Does it; what it returns is of no use. Several may run at the same time.
    """

    size: int
    run: Callable[[], object]


class Source(Protocol):
    """Bytes that can be read anywhere.

    Attributes
    ----------
    size : int
        How many there are.
    whole : int
        Bytes that had to be downloaded or decompressed before any could be read.
    """

    size: int
    whole: int

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on; the caller stays within ``size``."""
        ...

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return an array over the image at ``offset`` whose rows ``first:last`` may be touched, or None."""
        ...


class MappedFile:
    """A local file in the address space.

    Parameters
    ----------
    fd : int
        Open descriptor; still the caller's to close.
    url : str
        Name for messages.

    Raises
    ------
    OSError
        The file cannot be mapped, or not without the risk of SIGBUS.
    """

    whole = 0

    def __init__(self, fd: int, url: str) -> None:
        self.size = os.fstat(fd).st_size
        self._url = url
        self._map = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        self._length = self._map.size  # asks the file, not the map
        self._seen = bytearray(self.size // _CHUNK + 1)
        self._images: dict[int, NDArray[Any]] = {}  # an HDU has one shape and one type
        self._populate(0, 1)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on.

        Raises
        ------
        FrameUnavailable
            The file shrank since it was opened, or cannot be read.
        """
        self._touch(offset, offset + length)
        return self._map[offset : offset + length]

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return the image at ``offset`` as an array over the map; only rows ``first:last`` may be touched."""
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


class PositionedFile:
    """A local file read by position, where it cannot be mapped safely.

    Parameters
    ----------
    fd : int
        Open descriptor; a duplicate is kept, the caller's is the caller's to close.
    url : str
        Name for messages.
    """

    whole = 0

    def __init__(self, fd: int, url: str) -> None:
        self._file = os.fdopen(os.dup(fd), "rb", buffering=0)
        self.size = os.fstat(fd).st_size
        self._url = url

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on.

        Raises
        ------
        FrameUnavailable
            The file shrank since it was opened, or cannot be read.
        """
        parts: list[bytes] = []
        while length > 0:
            try:
                part = os.pread(self._file.fileno(), length, offset)
            except OSError as exc:
                raise FrameUnavailable(self._url, f"bytes {offset}:{offset + length}: {exc.strerror}") from exc
            if not part:
                raise FrameUnavailable(self._url, f"the file shrank from {self.size} to {offset} bytes while open")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return None: the bytes do not lie in memory."""
        return None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def open_file(fd: int, url: str) -> Source:
    """Return a source over an open, regular, non-empty local file."""
    try:
        return MappedFile(fd, url)
    except OSError:  # no map, or no MADV_POPULATE_READ
        return PositionedFile(fd, url)


class Kept:
    """Bytes that are made as a whole, a gzip file decompressed or a body downloaded, and kept within a budget.

    They are made again when they were dropped.

    Parameters
    ----------
    make : callable
        Returns the bytes; its errors are raised as they are.
    url : str
        Name for messages.
    budget : Budget
        Where the bytes are accounted.
    data : bytearray, optional
        The bytes, where they have been made already.
    packed : int, optional
        Bytes that they are made from and that were had whole, too.
    """

    def __init__(
        self, make: Callable[[], bytearray], url: str, budget: Budget, data: bytearray | None = None, packed: int = 0
    ) -> None:
        self._make, self._url, self._budget = make, url, budget
        self._lock = threading.Lock()
        self._data = data
        self.held = 0 if data is None else len(data)
        self.used = budget.tick()
        if data is not None:
            budget.settle(self)
        self.size = len(self._content() if data is None else data)
        self.whole = packed + self.size

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return bytes(memoryview(self._content())[offset : offset + length])

    def pixels(
        self, offset: int, shape: tuple[int, int], dtype: np.dtype[Any], first: int, last: int
    ) -> NDArray[Any] | None:
        """Return the image at ``offset`` as an array over the bytes; the caller does not keep it."""
        return np.frombuffer(self._content(), dtype, shape[0] * shape[1], offset).reshape(shape)

    def fetches(self) -> list[Fetch]:
        """Return what makes the bytes again where they were dropped; those that are here are to stay for a batch."""
        self.used = self._budget.tick()
        return [] if self._data is not None else [Fetch(self.size, self._content)]

    def release(self) -> None:
        """Forget the bytes."""
        self._data, self.held = None, 0

    def _content(self) -> bytearray:
        self.used = self._budget.tick()
        data = self._data
        if data is None:
            with self._lock:
                data = self._data
                if data is None:
                    data = self._make()
                    if len(data) != getattr(self, "size", len(data)):
                        raise FrameUnavailable(self._url, f"{len(data)} bytes, {self.size} when it was opened")
                    self._data, self.held = data, len(data)
                    self._budget.settle(self)
        return data


@dataclass(frozen=True)
class InflateLimits:
    """What decompressing a file may take.

    Attributes
    ----------
    size : int
        Largest decompressed size, bytes.
    setting : str
        What that limit is called.
    max_header_bytes : int
        See `stampworker.frames.header.walk`.
    seconds : float
        Longest time; less where less is left to the alert.
    """

    size: int
    setting: str
    max_header_bytes: int
    seconds: float


def inflate(packed: Source, url: str, limits: InflateLimits) -> bytearray:
    """Decompress a gzip file of one or several members, as far as its HDUs go.

    Parameters
    ----------
    packed : Source
        The gzip bytes.
    url : str
        Name for messages.
    limits : InflateLimits
        When to give up.

    Returns
    -------
    data : bytearray
        What follows the last HDU is cut off, or there in part.

    Raises
    ------
    FrameCorrupt
        The stream is damaged or ends early.
    FrameRefused
        It decompresses to more than the limit, or its headers say so, or it takes too long.
    FrameUnavailable
        Something else has taken the alert's time.
    """
    data = bytearray()
    extent, wanted, due = Extent(limits.max_header_bytes), 0, 0
    began, end = time.monotonic(), end_within(limits.seconds)
    offset, pending, step = 0, b"", _MEMBER_STEP
    stream = isal_zlib.decompressobj(wbits=31)
    while True:
        if not pending:
            pending = packed.read(offset, min(step, packed.size - offset))
            offset, step = offset + len(pending), min(2 * step, _INFLATE_STEP)
        if stream.eof:
            if not pending.startswith(GZIP_MAGIC):  # zeros that pad the file to a block, as tapes and archives do
                return data
            stream = isal_zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(pending, min(_INFLATE_STEP, limits.size + 1 - len(data)))
        except INFLATE_ERRORS as exc:
            raise FrameCorrupt(url, f"damaged gzip stream after {len(data)} decompressed bytes: {exc}") from exc
        if not (part or pending or stream.eof):
            raise FrameCorrupt(url, f"the gzip stream ends early, after {packed.size} bytes ({len(data)} decompressed)")
        data += part
        if len(data) >= due:
            wanted = extent.end(data)
            if wanted + _INFLATE_STEP < len(data):
                return data
            due = max(wanted, len(data)) + _INFLATE_STEP
        _check_limits(url, limits, max(len(data), wanted), began, end)
        pending = stream.unconsumed_tail
        if stream.eof:
            # Read again in small steps: a stream copies what it leaves over, and members may have 20 bytes.
            offset, pending, step = offset - len(stream.unused_data), b"", _MEMBER_STEP


def _check_limits(url: str, limits: InflateLimits, size: int, began: float, end: float) -> None:
    if size > limits.size:
        raise FrameRefused(url, f"decompresses to more than the {limits.size} bytes allowed (frames.{limits.setting})")
    now = time.monotonic()
    if now <= end:
        return
    problem = f"not decompressed after {now - began:.1f} s, with {limits.seconds:g} s for all (frames.total_s)"
    # Of what the alert has, most was spent elsewhere, where it may be shorter the next time.
    raise (FrameRefused if now - began > limits.seconds / 2 else FrameUnavailable)(url, problem)
