"""gzip files: decompressed up to the end of their HDUs, within limits of size and time."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal import isal_zlib
from isal.igzip_lib import IsalError

from stampworker.errors import FrameCorrupt, FrameRefused, FrameUnavailable
from stampworker.frames.fits.header import Hdu, iter_hdus
from stampworker.frames.io.sources import GZIP_MAGIC
from stampworker.frames.limits import end_within

if TYPE_CHECKING:
    from stampworker.config import FrameSettings
    from stampworker.frames.io.sources import Source

# isal's type stubs call the class an instance.
INFLATE_ERRORS: tuple[type[Exception], ...] = (IsalError, zlib.error)  # type: ignore[assignment]
_INFLATE_STEP = 1 << 20
_MEMBER_STEP = 1 << 12


def inflate(packed: Source, url: str, settings: FrameSettings) -> bytearray:
    """Decompress a gzip file of one or several members, up to the end of its HDUs.

    Parameters
    ----------
    packed : Source
        The gzip bytes.
    url : str
        Name for messages.
    settings : FrameSettings
        ``max_decompressed_bytes``, ``max_alert_bytes``, ``max_header_bytes`` and ``total_s``.

    Returns
    -------
    data : bytearray
        The HDUs; of what follows them, nothing or a part.

    Raises
    ------
    FrameCorrupt
        The stream is damaged or ends early.
    FrameRefused
        The file decompresses to more than the limit, or its headers say so, or it takes too long.
    FrameUnavailable
        The alert has no time left, most of which went elsewhere.
    """
    data, hdus, wanted, due = bytearray(), list[Hdu](), 0, 0
    limit, setting = min((getattr(settings, name), name) for name in ("max_decompressed_bytes", "max_alert_bytes"))
    began, end = time.monotonic(), end_within(settings.total_s)
    offset, pending, step = 0, b"", _MEMBER_STEP
    stream = isal_zlib.decompressobj(wbits=31)
    while True:
        if not pending:
            pending = packed.read(offset, min(step, packed.size - offset))
            offset, step = offset + len(pending), min(2 * step, _INFLATE_STEP)
        if stream.eof:
            if not pending.startswith(GZIP_MAGIC):  # zeros pad the file to a block, on tapes and in archives
                return data
            stream = isal_zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(pending, min(_INFLATE_STEP, limit + 1 - len(data)))
        except INFLATE_ERRORS as exc:
            raise FrameCorrupt(url, f"damaged gzip stream after {len(data)} decompressed bytes: {exc}") from exc
        if not (part or pending or stream.eof):
            raise FrameCorrupt(url, f"the gzip stream ends early, after {packed.size} bytes ({len(data)} decompressed)")
        data += part
        if len(data) >= due:
            wanted = _end_of_hdus(data, hdus, limit, settings.max_header_bytes)
            if wanted + _INFLATE_STEP < len(data):
                return data
            due = max(wanted, len(data)) + _INFLATE_STEP
        if max(len(data), wanted) > limit:
            raise FrameRefused(url, f"decompresses to more than the {limit} bytes allowed (frames.{setting})")
        _check_time(url, settings.total_s, began, end)
        pending = stream.unconsumed_tail
        if stream.eof:
            # Read the rest again, in small steps: a stream copies its unused bytes, and members may have 20 bytes.
            offset, pending, step = offset - len(stream.unused_data), b"", _MEMBER_STEP


@dataclass
class _FirstBytes:
    """The first bytes of a file of at most ``size``; a read that begins beyond them raises EOFError."""

    data: bytearray
    size: int

    def read(self, offset: int, length: int) -> bytes:
        if offset >= len(self.data):
            raise EOFError
        return bytes(memoryview(self.data)[offset : offset + length])


def _end_of_hdus(data: bytearray, hdus: list[Hdu], limit: int, max_header_bytes: int) -> int:
    """Return how many bytes of a file are needed, as far as its first bytes show; extend the list of its HDUs.

    A header that is damaged or above a limit ends what is needed: `iter_hdus` goes no further later, and says why.
    """
    try:
        for hdu in iter_hdus(_FirstBytes(data, limit), "", max_header_bytes, hdus.copy()):
            hdus.append(hdu.without_cards())
    except EOFError:
        return max(len(data), hdus[-1].end if hdus else 0)
    except (FrameCorrupt, FrameRefused):
        pass
    return hdus[-1].end if hdus else 0


def _check_time(url: str, seconds: float, began: float, end: float) -> None:
    now = time.monotonic()
    if now <= end:
        return
    problem = f"not decompressed after {now - began:.1f} s, with {seconds:g} s for all (frames.total_s)"
    # If most of the time went elsewhere, there may be more of it next time.
    raise (FrameRefused if now - began > seconds / 2 else FrameUnavailable)(url, problem)
