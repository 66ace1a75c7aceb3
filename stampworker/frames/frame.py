"""A frame: one plane of pixels with its header and its WCS, sliced like an array."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from astropy.io import fits

from stampworker.cutouts.keywords import COMPRESSION_TABLE
from stampworker.frames.fits.header import CARD, Hdu, parse_text, split_cards
from stampworker.frames.fits.section import Section
from stampworker.frames.io.ranges import RangedFile
from stampworker.frames.io.sources import CachedBytes, FetchTask, Source
from stampworker.frames.limits import count
from stampworker.frames.wcs import CelestialWcs, celestial_wcs, lookup_cards

if TYPE_CHECKING:
    from astropy.wcs import WCS
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_PRINTABLE = bytes(c if 32 <= c < 127 else ord("?") for c in range(256))
_CONVENTIONAL_CARD = re.compile(rb"(?=[A-Z0-9_-]* *= ).{8}= |(COMMENT|HISTORY|CONTINUE|HIERARCH) |        ")


class Pixels(Protocol):
    """The reader of one HDU's pixels; sections are inside the image."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return rows ``y0:y1``, columns ``x0:x1``."""

    def byte_ranges(self, sections: Iterable[Section]) -> list[tuple[int, int]]:
        """Return offset and length of the bytes that sections need."""

    def bytes_needed(self, section: Section) -> int:
        """Return how many bytes must be read and decompressed for a section."""


@dataclass(frozen=True, eq=False)
class Image:
    """One HDU of a file; frames that name it in different ways share its pixels, header and WCS."""

    hdu: Hdu  # with the cards it inherits
    pixels: Pixels
    source: Source
    url: str

    @cached_property
    def celestial(self) -> CelestialWcs:
        """The celestial WCS, its cards, and why there is none."""
        celestial = celestial_wcs(self.hdu, self.pixels.shape)
        if celestial.problem is not None:
            log.info("%s: %s: no usable WCS: %s", self.url, self.hdu, celestial.problem)
        return celestial

    @cached_property
    def header(self) -> fits.Header:
        """The image's header for astropy; of a compressed image, the cards of the table are the image's."""
        hdu = self.hdu
        # astropy warns at every access to a card that follows no convention.
        cards = [card for card in split_cards(hdu.cards.translate(_PRINTABLE)) if _CONVENTIONAL_CARD.match(card)]
        if hdu.kind == "tiled":
            cards = [card for card in cards if not COMPRESSION_TABLE.fullmatch(card[:8].rstrip().decode())]
            bitpix = hdu.values["ZBITPIX"].split(b"/")[0].decode("latin-1").strip()
            layout = {"XTENSION": "'IMAGE   '", "BITPIX": bitpix, "NAXIS": len(hdu.axes)}
            layout |= {f"NAXIS{i}": n for i, n in enumerate(reversed(hdu.axes), 1)}
            cards[:0] = [f"{name:8}= {value:>20}".ljust(CARD).encode() for name, value in layout.items()]
        return fits.Header.fromstring(b"".join(cards) + b"END".ljust(CARD))


class Frame:
    """One plane of pixels with its header; slicing reads only what is sliced.

    `FrameStore.open` makes it. It stays readable after the store was closed.

    Attributes
    ----------
    url : str
        Absolute, with its fragment, without credentials.
    shape : tuple of int
        (ny, nx).
    dtype : dtype
        float32 or float64; an integer for a mask. Native byte order.
    resampled : bool
        False: the pixels are the file's, not interpolated.
    is_fetched : bool
        Bytes of the file come from a server, or are decompressed.
    is_whole : bool
        The file is downloaded or decompressed as a whole.
    """

    ndim = 2
    resampled = False

    def __init__(self, url: str, image: Image) -> None:
        self._image, self._pixels, self._source = image, image.pixels, image.source
        self.url, self.shape, self.dtype = url, image.pixels.shape, image.pixels.dtype
        self._ny, self._nx = self.shape
        self.is_whole = isinstance(image.source, CachedBytes)
        self.is_fetched = self.is_whole or isinstance(image.source, RangedFile)
        # Rows of plain local files are free, so no time is spent on counting them.
        self._is_free = image.hdu.kind == "image" and not self.is_fetched

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
            The section is above ``max_download_bytes`` or, inside `FrameStore.allowance`, above what is left of that.
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

    def section_for(self, section: Section) -> tuple[Frame, Section] | None:
        """Return which frame, and which section inside it, is read for a section that may hang over the edge.

        None if there is nothing to fetch beforehand.
        """
        y0, y1, x0, x1 = section
        inside = max(y0, 0), min(y1, self._ny), max(x0, 0), min(x1, self._nx)
        is_empty = inside[0] >= inside[1] or inside[2] >= inside[3]
        return None if is_empty or not self.is_fetched else (self, inside)

    def fetch_tasks(self, sections: Iterable[Section]) -> list[FetchTask]:
        """Return the tasks that bring what sections inside the image need into memory before they are sliced."""
        if isinstance(self._source, RangedFile):
            return self._source.fetch_tasks(self._pixels.byte_ranges(sections))
        return self._source.fetch_tasks() if isinstance(self._source, CachedBytes) else []

    def bytes_needed(self, section: Section) -> int:
        """Return how many bytes must be read and decompressed for a section inside the image."""
        return self._source.bytes_upfront + self._pixels.bytes_needed(section)

    @property
    def bunit(self) -> str | None:
        """BUNIT of the header, or inherited."""
        return parse_text(self._image.hdu.values.get("BUNIT", b"")) or None

    @property
    def header(self) -> fits.Header:
        """The image's header, unprintable characters replaced by ``?``. Shared: copy it before a change.

        Cards that an extension inherits come last, see `stampworker.frames.fits.inherit`.
        """
        return self._image.header

    @property
    def wcs(self) -> WCS | None:
        """Celestial WCS, None if there is no usable one, see `wcs_problem`. Shared: copy it before a change."""
        return self._image.celestial.wcs

    @property
    def wcs_problem(self) -> str | None:
        """Why there is no usable WCS; None if there is one."""
        return self._image.celestial.problem

    def wcs_cards(self) -> list[str]:
        """Return the celestial WCS's cards as in the header, 80 characters each; none without a usable WCS."""
        return list(self._image.celestial.cards)

    def lookup_cards(self) -> list[bytes]:
        """Return the cards of the WCS if lookup-table distortions are among them, else nothing."""
        return lookup_cards(self._image.hdu)
