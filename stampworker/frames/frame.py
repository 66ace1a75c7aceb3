"""A frame: one plane of pixels with its header and its WCS, sliced like an array."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from astropy.io import fits

from stampworker.frames.fits.header import CARD, Hdu, parse_text, split_cards
from stampworker.frames.fits.section import Section
from stampworker.frames.io.ranges import RangedFile
from stampworker.frames.io.sources import CachedBytes, FetchTask, Source
from stampworker.frames.limits import count
from stampworker.frames.wcs import lookup_cards, make_wcs, wcs_cards

if TYPE_CHECKING:
    from astropy.wcs import WCS
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_ASCII = bytes(c if 32 <= c < 127 else ord("?") for c in range(256))
_CARD = re.compile(rb"(?=[A-Z0-9_-]* *= ).{8}= |(COMMENT|HISTORY|CONTINUE|HIERARCH) |        ")
_TABLE_CARDS = ("TFIELDS", "THEAP", "PCOUNT", "GCOUNT", "BITPIX", "NAXIS", "CHECKSUM", "DATASUM", "SIMPLE", "XTENSION")
_TABLE_INDEXED = ("TTYPE", "TFORM", "TUNIT", "TDIM", "TNULL", "TSCAL", "TZERO", "TDISP")


class Pixels(Protocol):
    """What reads the pixels of one HDU."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return rows ``y0:y1``, columns ``x0:x1``, all inside the image."""
        ...

    def byte_ranges(self, boxes: Iterable[Section]) -> list[tuple[int, int]]:
        """Return offset and length of the bytes that boxes, all inside the image, need."""
        ...

    def bytes_needed(self, box: Section) -> int:
        """Return how many bytes a box inside the image needs to be read and decompressed."""
        ...


class Image:
    """One HDU, of which the frames that name it, in whatever way, share the pixels, the header and the WCS.

    Parameters
    ----------
    hdu : Hdu
        With what it inherits.
    pixels : Pixels
        Of the HDU.
    source : Source
        The file.
    url : str
        The file's, for messages.
    """

    def __init__(self, hdu: Hdu, pixels: Pixels, source: Source, url: str) -> None:
        self.hdu, self.pixels, self.source = hdu, pixels, source
        self._url = url
        self._lock = threading.Lock()
        self._header: fits.Header | None = None
        self._sky: tuple[WCS | None, list[str], str | None] | None = None

    def header(self) -> fits.Header:
        """Return the header, made once."""
        with self._lock:
            if self._header is None:
                self._header = _header(self.hdu)
            return self._header

    def sky(self) -> tuple[WCS | None, list[str], str | None]:
        """Return the celestial WCS, its cards, and why there is none, found once."""
        with self._lock:
            if self._sky is None:
                cards, problem = wcs_cards(self.hdu)
                wcs = None
                if problem is None:
                    wcs, problem = make_wcs(cards, self.pixels.shape)
                if problem is not None:
                    log.info("%s: %s: no usable WCS: %s", self._url, self.hdu, problem)
                self._sky = wcs, cards if wcs is not None else [], problem
            return self._sky


class Frame:
    """One plane of pixels with its header; slicing reads only what is sliced.

    Made by `FrameStore.open`. It stays readable as long as it is referred to, also when the store has closed.

    Attributes
    ----------
    url : str
        Absolute, without credentials, the fragment kept.
    shape : tuple of int
        (ny, nx).
    dtype : dtype
        float32 or float64; an integer for a mask. Native byte order.
    resampled : bool
        False: the pixels are the file's.
    is_fetched : bool
        The file's bytes come from a server, or are decompressed as a whole.
    is_whole : bool
        They come, or are decompressed, as a whole.
    """

    ndim = 2
    resampled = False

    def __init__(self, url: str, image: Image) -> None:
        pixels, source = image.pixels, image.source
        self.url = url
        self.shape = pixels.shape
        self.dtype = pixels.dtype
        self._ny, self._nx = pixels.shape
        self._pixels, self._source = pixels, source
        self.is_whole = isinstance(source, CachedBytes)
        self.is_fetched = self.is_whole or isinstance(source, RangedFile)
        # Rows of plain local files are free, and cost no time to count.
        self._is_free = image.hdu.kind == "image" and not self.is_fetched
        self._image = image

    def __repr__(self) -> str:
        return f"<Frame {self.url} {self.shape} {self.dtype}>"

    def __getitem__(self, index: tuple[slice, slice]) -> NDArray[Any]:
        """Return ``frame[y0:y1, x0:x1]``: a new C-contiguous array of the frame's dtype, cut at the frame's edges.

        Raises
        ------
        FrameCorrupt
            A tile of a compressed frame cannot be decoded.
        FrameUnavailable
            The file cannot be read, or changed since it was opened.
        FrameMissing
            A remote file is gone.
        FrameRefused
            The section is above ``max_download_bytes``; or, inside `FrameStore.allowance`, above what is left of it.
        """
        rows, columns = index
        y0, y1, y_step = rows.indices(self._ny)
        x0, x1, x_step = columns.indices(self._nx)
        if y_step != 1 or x_step != 1:
            raise ValueError(f"a frame is sliced with steps of 1, not {y_step}, {x_step}")
        if y1 <= y0 or x1 <= x0:
            return np.empty((max(y1 - y0, 0), max(x1 - x0, 0)), self.dtype)
        return self._read(y0, y1, x0, x1)

    def _read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        if not self._is_free:
            count(self.url, self._pixels.bytes_needed((y0, y1, x0, x1)), self._source, self._source.bytes_upfront)
        return self._pixels.read(y0, y1, x0, x1)

    def section_for(self, box: Section) -> tuple[Frame, Section] | None:
        """Return the frame that is read for a box, which may hang over the edge, and what is read of it.

        None where there is nothing to fetch beforehand.
        """
        y0, y1, x0, x1 = box
        inside = max(y0, 0), min(y1, self._ny), max(x0, 0), min(x1, self._nx)
        is_empty = inside[0] >= inside[1] or inside[2] >= inside[3]
        return None if is_empty or not self.is_fetched else (self, inside)

    def fetch_tasks(self, boxes: Iterable[Section]) -> list[FetchTask]:
        """Return what `FrameStore.prefetch_sections` does so that boxes, all inside the image, are here when sliced."""
        if isinstance(self._source, RangedFile):
            return self._source.fetch_tasks(self._pixels.byte_ranges(boxes))
        return self._source.fetch_tasks() if isinstance(self._source, CachedBytes) else []

    def bytes_needed(self, box: Section) -> int:
        """Return how many bytes a box inside the image needs to be read and decompressed."""
        return self._source.bytes_upfront + self._pixels.bytes_needed(box)

    @property
    def bunit(self) -> str | None:
        """BUNIT of the header, or inherited."""
        return parse_text(self._image.hdu.values.get("BUNIT", b"")) or None

    @property
    def header(self) -> fits.Header:
        """The image's header; what is not printable in it reads as ``?``.

        The cards that an extension inherits come last, see `stampworker.frames.fits.inherit`. Shared: copy before a
        change.
        """
        return self._image.header()

    @property
    def wcs(self) -> WCS | None:
        """Celestial WCS, None where there is no usable one (`wcs_problem` says why). Shared: copy before a change."""
        return self._image.sky()[0]

    @property
    def wcs_problem(self) -> str | None:
        """Why there is no usable WCS; None where there is one."""
        return self._image.sky()[2]

    def wcs_cards(self) -> list[str]:
        """Return the celestial WCS's cards as in the header, 80 characters each; none without a usable WCS."""
        return list(self._image.sky()[1])

    def lookup_cards(self) -> list[bytes]:
        """Return the WCS's cards where lookup-table distortions are among them, else nothing."""
        return lookup_cards(self._image.hdu)


def _header(hdu: Hdu) -> fits.Header:
    """Return the image's header for astropy, the cards of a compression table translated to the image's."""
    # astropy warns at every access to a card that follows no convention.
    cards = [card for card in split_cards(hdu.cards.translate(_ASCII)) if _CARD.match(card)]
    if hdu.kind != "tiled":
        return fits.Header.fromstring(b"".join(cards) + b"END".ljust(CARD))
    cards = [card for card in cards if not _of_table(card[:8].rstrip().decode())]
    head = [("XTENSION", "'IMAGE   '"), ("BITPIX", hdu.values["ZBITPIX"].split(b"/")[0].decode("latin-1").strip())]
    head += [("NAXIS", str(len(hdu.axes)))] + [(f"NAXIS{i + 1}", str(n)) for i, n in enumerate(reversed(hdu.axes))]
    first = [f"{name:8}= {value:>20}".ljust(CARD).encode() for name, value in head]
    return fits.Header.fromstring(b"".join(first + cards) + b"END".ljust(CARD))


def _of_table(keyword: str) -> bool:
    base = keyword.rstrip("0123456789")
    if keyword in _TABLE_CARDS or base == "NAXIS" or base in _TABLE_INDEXED:
        return True
    compression = ("ZIMAGE", "ZCMPTYPE", "ZMASKCMP", "ZQUANTIZ", "ZBLANK", "ZSCALE", "ZZERO", "ZTENSION", "ZSIMPLE")
    more = ("ZBITPIX", "ZEXTEND", "ZBLOCKED", "ZPCOUNT", "ZGCOUNT", "ZHECKSUM", "ZDATASUM", "ZDITHER")
    return keyword in compression or base in (*more, "ZNAXIS", "ZTILE", "ZNAME", "ZVAL")
