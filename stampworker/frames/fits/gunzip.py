"""gzip files: decompressed up to the end of their HDUs, within limits of size and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isal import isal_zlib
from isal.igzip_lib import IsalError

from stampworker.errors import FrameCorrupt, FrameRefused, FrameUnavailable
from stampworker.frames.fits.header import Hdu, iter_hdus
from stampworker.frames.io.sources import GZIP_MAGIC
from stampworker.frames.limits import end_within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stampworker.config import FrameSettings
    from stampworker.frames.io.sources import Source

InflateError: type[Exception] = IsalError  # type: ignore[assignment]  # whose stub calls the class an instance
_INFLATE_STEP = 1 << 20
_MEMBER_STEP = 1 << 12


def inflate(packed: Source, url: str, settings: FrameSettings) -> bytearray:
    """Decompress a gzip file of one or several members, up to the end of its HDUs or a little further.

    Raises `FrameCorrupt` if the stream is damaged or ends early; `FrameRefused` if the file decompresses to more than
    the limits, or its headers say so; and if it takes more than ``total_s``, `FrameRefused` or, where most of the time
    went elsewhere, `FrameUnavailable`.
    """
    data, hdus, wanted, due = bytearray(), list[Hdu](), 0, 0
    limit, setting = min((getattr(settings, name), name) for name in ("max_decompressed_bytes", "max_alert_bytes"))
    began, end = time.monotonic(), end_within(settings.total_s)
    for part in _decompress(packed, url, limit):
        data += part
        if len(data) >= due:
            wanted = _end_of_hdus(data, hdus, limit, settings.max_header_bytes)
            if wanted + _INFLATE_STEP < len(data):
                return data
            due = max(wanted, len(data)) + _INFLATE_STEP
        if max(len(data), wanted) > limit:
            raise FrameRefused(url, f"decompresses to more than the {limit} bytes allowed (frames.{setting})")
        now = time.monotonic()
        if now > end:
            problem = (
                f"not decompressed after {now - began:.1f} s, with {settings.total_s:g} s for all (frames.total_s)"
            )
            # If most of the time went elsewhere, there may be more of it next time.
            raise (FrameRefused if now - began > settings.total_s / 2 else FrameUnavailable)(url, problem)
    return data


def _decompress(packed: Source, url: str, limit: int) -> Iterator[bytes]:
    """Yield what a gzip file decompresses to, in parts, at most one byte more than ``limit``."""
    offset, pending, step, total = 0, b"", _MEMBER_STEP, 0
    stream = isal_zlib.decompressobj(wbits=31)
    while True:
        if not pending:
            pending = packed.read(offset, min(step, packed.size - offset))
            offset, step = offset + len(pending), min(2 * step, _INFLATE_STEP)
        if stream.eof:
            if not pending.startswith(GZIP_MAGIC):  # zeros pad the file to a block, on tapes and in archives
                return
            stream = isal_zlib.decompressobj(wbits=31)
        try:
            part = stream.decompress(pending, min(_INFLATE_STEP, limit + 1 - total))
        except InflateError as exc:
            raise FrameCorrupt(url, f"damaged gzip stream after {total} decompressed bytes: {exc}") from exc
        if not (part or pending or stream.eof):
            raise FrameCorrupt(url, f"the gzip stream ends early, after {packed.size} bytes ({total} decompressed)")
        total += len(part)
        yield part
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
