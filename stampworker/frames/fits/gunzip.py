"""gzip files: decompressed as far as their HDUs go, within limits of size and time."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal import isal_zlib
from isal.igzip_lib import IsalError

from stampworker.errors import FrameCorrupt, FrameRefused, FrameUnavailable
from stampworker.frames.fits.header import Extent
from stampworker.frames.io.sources import GZIP_MAGIC
from stampworker.frames.limits import end_within

if TYPE_CHECKING:
    from stampworker.frames.io.sources import Source

# isal's type stubs call the class an instance.
INFLATE_ERRORS: tuple[type[Exception], ...] = (IsalError, zlib.error)  # type: ignore[assignment]
_INFLATE_STEP = 1 << 20
_MEMBER_STEP = 1 << 12


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
        See `stampworker.frames.fits.header.iter_hdus`.
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
