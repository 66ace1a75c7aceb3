"""Plain FITS images: a section is a slice of the file's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stampworker.frames.fits.header import Cards, Hdu, bitpix_of
from stampworker.frames.fits.scaling import STORED, converter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from stampworker.frames.fits.section import Section
    from stampworker.frames.io.sources import Source


class PlainImage:
    """Pixels of an uncompressed 2-D image whose data are inside the source."""

    def __init__(self, source: Source, hdu: Hdu, url: str, *, mask: bool) -> None:
        if hdu.plane is None:
            raise ValueError(f"{hdu} is not a 2-D image")
        cards = Cards(hdu.values, url, str(hdu))
        bitpix = bitpix_of(cards, "BITPIX")
        self.shape = hdu.plane
        self.dtype, self._convert = converter(cards, bitpix, mask=mask)
        self._source, self._offset, self._stored = source, hdu.offset, STORED[bitpix]
        self._stride = self.shape[1] * self._stored.itemsize

    def byte_ranges(self, sections: Iterable[Section]) -> list[tuple[int, int]]:
        """Return offset and length of the bytes that sections inside the image need."""
        return [(self._offset + y0 * self._stride, (y1 - y0) * self._stride) for y0, y1, _, _ in sections]

    def bytes_needed(self, section: Section) -> int:
        """Return how many bytes must be read for a section inside the image."""
        return (section[1] - section[0]) * self._stride

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return rows ``y0:y1``, columns ``x0:x1`` of the image; only these rows are read."""
        pixels = self._source.pixels(self._offset, self.shape, self._stored, y0, y1)
        if pixels is not None:
            # Copy first, then convert: converting strided rows directly is 1.5 times slower.
            return self._convert(pixels[y0:y1, x0:x1].copy())
        raw = self._source.read(self._offset + y0 * self._stride, (y1 - y0) * self._stride)
        return self._convert(np.frombuffer(raw, self._stored).reshape(y1 - y0, self.shape[1])[:, x0:x1])
