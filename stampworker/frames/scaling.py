"""From stored numbers to pixel values: BSCALE, BZERO, BLANK, byte order, and what a mask is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stampworker.frames.header import Cards

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
    """Return the dtype of the plane and the function that makes pixel values of stored numbers.

    Parameters
    ----------
    cards : Cards
        Header with BSCALE, BZERO and BLANK.
    bitpix : int
        BITPIX of the image (ZBITPIX of a compressed one).
    mask : bool
        Whether the plane is a mask: integers stay as they are, anything else becomes 0 (good) and 1 (bad: not zero, NaN
        or undefined).

    Returns
    -------
    dtype : dtype
        float32; float64 for 64-bit floats and integers of more than 24 bits; for a mask an integer.
    convert : callable
        Array of stored numbers, any byte order and strides, to a new C-contiguous array of ``dtype``.

    Notes
    -----
    Scaling is done in the plane's dtype, multiplication first, as astropy does it: the values are the same bits.
    """
    scale, zero = cards.real("BSCALE", 1.0), cards.real("BZERO", 0.0)
    blank = cards.integer("BLANK", low=None) if bitpix > 0 and "BLANK" in cards.values else None
    if mask:
        return _mask_converter(bitpix, scale, zero, blank)
    dtype = np.dtype("f4" if bitpix in (8, 16, -32) else "f8")
    if blank is None and scale == 1 and zero == 0:
        return dtype, lambda stored: stored.astype(dtype)

    def convert(stored: NDArray[Any]) -> NDArray[Any]:
        values = stored.astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile BSCALE gives infinities, not warnings
            if scale != 1:
                values *= dtype.type(scale)
            if zero != 0:
                values += dtype.type(zero)
        if blank is not None:
            values[stored == blank] = np.nan
        return values

    return dtype, convert


def _mask_converter(bitpix: int, scale: float, zero: float, blank: int | None) -> tuple[np.dtype[Any], Convert]:
    unsigned = _UNSIGNED.get((bitpix, zero)) if scale == 1 else None
    if bitpix < 0 or not (unsigned or (scale == 1 and zero == 0)):

        def flag(stored: NDArray[Any]) -> NDArray[Any]:
            with np.errstate(over="ignore", invalid="ignore"):
                bad = ~(stored.astype(np.float64) * scale + zero == 0)
            if blank is not None:
                bad |= stored == blank
            return np.asarray(bad, np.uint8)

        return np.dtype("u1"), flag

    native = STORED[bitpix].newbyteorder("=")
    dtype = np.dtype(unsigned) if unsigned else native
    # The offset of the unsigned convention is the sign bit: adding it is flipping it.
    sign = np.array(1 << (bitpix - 1), f"u{bitpix // 8}").view(native)[()] if unsigned else None

    def keep(stored: NDArray[Any]) -> NDArray[Any]:
        values = stored.astype(native)
        if sign is not None:
            values = (values ^ sign).view(dtype)
        if blank is not None:
            values[stored == blank] = 1
        return values

    return dtype, keep
