"""From stored numbers to pixel values: BSCALE, BZERO, BLANK, byte order, and the rule for masks.

The rule for masks: integers keep their bits, unsigned ones included, and an undefined pixel (BLANK) becomes 1. Floats
and scaled integers become 0 where the value is 0, and 1 where it is anything else, NaN or undefined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stampworker.frames.fits.header import Cards

STORED: dict[int, np.dtype[Any]] = {
    8: np.dtype("u1"),
    16: np.dtype(">i2"),
    32: np.dtype(">i4"),
    64: np.dtype(">i8"),
    -32: np.dtype(">f4"),
    -64: np.dtype(">f8"),
}
"""BITPIX to the numbers in the file."""

_UNSIGNED = {(8, -128.0): "i1", (16, 2.0**15): "u2", (32, 2.0**31): "u4", (64, 2.0**63): "u8"}

Convert = Callable[["NDArray[Any]"], "NDArray[Any]"]


def converter(cards: Cards, bitpix: int, *, mask: bool) -> tuple[np.dtype[Any], Convert]:
    """Return the dtype of the plane and the function that converts stored numbers to pixel values.

    Parameters
    ----------
    cards : Cards
        Header with BSCALE, BZERO and BLANK.
    bitpix : int
        BITPIX of the image (ZBITPIX of a compressed one).
    mask : bool
        The plane is a mask; see the rule above.

    Returns
    -------
    dtype : dtype
        float32; float64 for 64-bit floats and integers of more than 24 bits; for a mask an integer.
    convert : callable
        Takes an array of stored numbers, any byte order and strides; returns a new C-contiguous array of ``dtype``.

    Notes
    -----
    Scaling is done in the plane's dtype, multiplication first, as astropy does it: the values are the same bits.
    Unsigned 64-bit integers are rounded once, from the integer.
    """
    scale, zero = cards.real("BSCALE", 1.0), cards.real("BZERO", 0.0)
    blank = cards.integer("BLANK", low=None) if bitpix > 0 and "BLANK" in cards.values else None
    if mask:
        return _mask_converter(bitpix, scale, zero, blank)
    dtype = np.dtype("f4" if bitpix in (8, 16, -32) else "f8")
    if blank is None and scale == 1 and zero == 0:
        return dtype, lambda stored: stored.astype(dtype)
    # As floats: after adding 2^63, all small numbers would be rounded to the same one.
    integers = _unsigned(bitpix, scale, zero) if bitpix == 64 else None

    def convert(stored: NDArray[Any]) -> NDArray[Any]:
        values = (stored if integers is None else integers(stored)).astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile BSCALE gives infinities, not warnings
            if scale != 1:
                values *= dtype.type(scale)
            if zero != 0 and integers is None:
                values += dtype.type(zero)
        if blank is not None:
            values[stored == blank] = np.nan
        return values

    return dtype, convert


def _unsigned(bitpix: int, scale: float, zero: float) -> Convert | None:
    """Return the conversion to integers if BZERO is that of the unsigned convention (for bytes: signed), else None."""
    name = _UNSIGNED.get((bitpix, zero)) if scale == 1 else None
    if name is None:
        return None
    native = STORED[bitpix].newbyteorder("=")
    # Adding the convention's offset flips the sign bit.
    sign = np.array(1 << (bitpix - 1), f"u{bitpix // 8}").view(native)[()]
    return lambda stored: (stored.astype(native) ^ sign).view(name)


def _mask_converter(bitpix: int, scale: float, zero: float, blank: int | None) -> tuple[np.dtype[Any], Convert]:
    unsigned = _unsigned(bitpix, scale, zero)
    if bitpix < 0 or not (unsigned or (scale == 1 and zero == 0)):

        def flag(stored: NDArray[Any]) -> NDArray[Any]:
            with np.errstate(over="ignore", invalid="ignore"):
                bad = ~(stored.astype(np.float64) * scale + zero == 0)
            if blank is not None:
                bad |= stored == blank
            return np.asarray(bad, np.uint8)

        return np.dtype("u1"), flag

    native = STORED[bitpix].newbyteorder("=")

    def keep(stored: NDArray[Any]) -> NDArray[Any]:
        values = stored.astype(native) if unsigned is None else unsigned(stored)
        if blank is not None:
            values[stored == blank] = 1
        return values

    return np.dtype(_UNSIGNED[bitpix, zero]) if unsigned else native, keep
