"""Crops and cutouts.

Names, arguments and documented behaviour are those of ``stdpipe.cutouts`` (STDPipe, S. Karpov): code written for it works
here.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.coordinates import Angle
from astropy.io import fits
from astropy.table import Row
from astropy.time import Time
from astropy.wcs import WCS

_MODES = ("sum", "mean", "and", "or")
_WCS_CARD = re.compile(
    r"(CTYPE|CUNIT|CRVAL|CRPIX|CDELT|CROTA|CNAME|CRDER|CSYER)\d+$|(CD|PC)\d+_\d+$|P[VS]\d+_\d+$|[AB]P?_(ORDER|DMAX|\d+_\d+)$"
    r"|(WCSAXES|WCSNAME|LONPOLE|LATPOLE|RADESYS|EQUINOX)$"
)
_LOOKUP_CARD = re.compile(r"(CPDIS|CQDIS|D2IMDIS|DQ|DP)\d")


def crop_image(data: Any, x1: int, y1: int, width: int, height: int, header: fits.Header | None = None) -> Any:
    """Crop a rectangle that may hang over the edge of the frame.

    Parameters
    ----------
    data : array_like, shape (ny, nx)
        One plane: an array, or anything with ``shape``, ``dtype`` and ``data[y0:y1, x0:x1]``, such as a frame that
        reads only what is sliced.
    x1, y1 : int
        Lower-left pixel of the rectangle, 0-based; may be negative.
    width, height : int
        Size in pixels, at least 1.
    header : astropy.io.fits.Header, optional
        Header of ``data``; never modified.

    Returns
    -------
    cropped : ndarray, shape (height, width)
        A copy; dtype and units of ``data``. Outside the frame: NaN in float planes, 0 in integer planes, False in
        boolean planes.
    cropped_header : astropy.io.fits.Header
        Returned only with ``header``: ``CRPIX1`` less ``x1``, ``CRPIX2`` less ``y1``, so each pixel keeps its place on
        the sky. ``CROP_X1, CROP_X2, CROP_Y1, CROP_Y2`` name the half-open rectangle, 0-based.

    Raises
    ------
    ValueError
        ``data`` is not 2-D, ``width`` or ``height`` is below 1, or ``header`` has a lookup-table distortion.

    Notes
    -----
    Moving CRPIX is exact for linear, SIP and TPV solutions, which measure from it (Greisen & Calabretta 2002,
    A&A 395, 1061; Shupe et al. 2005, ASPC 347, 491). It is not for lookup-table distortions (CPDIS, D2IMDIS), whose
    tables are indexed by the pixels of the whole frame; they are refused.
    """
    if len(data.shape) != 2:
        raise ValueError(f"data: found the shape {tuple(data.shape)}, wanted two axes (y, x)")
    if width < 1 or height < 1:
        raise ValueError(f"width, height: found {width}, {height}, wanted at least 1")
    ny, nx = data.shape
    xa, xb = max(x1, 0), min(x1 + width, nx)
    ya, yb = max(y1, 0), min(y1 + height, ny)
    if xb - xa == width and yb - ya == height:
        cropped = np.array(data[ya:yb, xa:xb])
    else:
        cropped = np.full((height, width), np.nan if data.dtype.kind in "fc" else 0, dtype=data.dtype)
        if xa < xb and ya < yb:
            cropped[ya - y1 : yb - y1, xa - x1 : xb - x1] = data[ya:yb, xa:xb]
    if header is None:
        return cropped
    return cropped, _crop_header(header, x1, y1, width, height)


def crop_image_centered(data: Any, x0: float, y0: float, r0: float, header: fits.Header | None = None) -> Any:
    """Crop the square of ``2·ceil(r0) + 1`` pixels around the pixel nearest to a position.

    Parameters
    ----------
    data : array_like, shape (ny, nx)
        One plane; see `crop_image`.
    x0, y0 : float
        The position, pixels, 0-based; halves are rounded up.
    r0 : float
        Half-size, pixels, not negative.
    header : astropy.io.fits.Header, optional
        Header of ``data``; never modified.

    Returns
    -------
    cropped : ndarray, shape (2·ceil(r0) + 1, 2·ceil(r0) + 1)
        The position lies in its middle pixel. See `crop_image`.
    cropped_header : astropy.io.fits.Header
        Returned only with ``header``.

    Raises
    ------
    ValueError
        The position is not finite, or ``r0`` is negative or not finite; and as `crop_image`.
    """
    x1, y1, side = _square(x0, y0, r0)
    return crop_image(data, x1, y1, side, side, header)


def get_cutout(
    image: Any,
    candidate: Mapping[str, Any] | Row,
    radius: float,
    header: fits.Header | None = None,
    wcs: WCS | None = None,
    time: Time | datetime.datetime | str | None = None,
    filename: str | None = None,
    name: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Cut all planes around one candidate.

    Parameters
    ----------
    image : array_like, shape (ny, nx)
        The science plane; see `crop_image`.
    candidate : mapping or astropy.table.Row
        With at least ``x`` and ``y``, pixels, 0-based.
    radius : float
        Half-size, pixels; the cutout is ``2·ceil(radius) + 1`` square with the candidate in its middle pixel.
    header : astropy.io.fits.Header, optional
        Header of ``image``.
    wcs : astropy.wcs.WCS, optional
        WCS of ``image``; it wins over the header's.
    time : astropy.time.Time, datetime or str, optional
        Time of the observation, for ``meta``.
    filename, name : str, optional
        For ``meta``. Without a name it is made of ``ra`` and ``dec`` (degrees) as a J2000 designation.
    **kwargs : array_like, shape (ny, nx)
        Further planes: ``mask, diff, template, convolved, err``, ... What is not 2-D is left out.

    Returns
    -------
    cutout : dict
        ``image`` and the further planes; ``header`` and ``wcs`` of the cutout, where they are known; ``meta``, a dict
        of all fields of the candidate and ``time``, ``filename`` and ``name``.

    Raises
    ------
    KeyError
        The candidate has no ``x`` or ``y``.
    ValueError
        As `crop_image_centered`.
    """
    x1, y1, side = _square(candidate["x"], candidate["y"], radius)
    cutout: dict[str, Any] = {"image": crop_image(image, x1, y1, side, side)}
    for plane, data in kwargs.items():
        if data is not None and np.ndim(data) == 2:
            cutout[plane] = crop_image(np.asarray(data) if isinstance(data, list) else data, x1, y1, side, side)
    if header is not None:
        cutout["header"] = _crop_header(header, x1, y1, side, side)
    if wcs is not None:
        cutout["wcs"] = _shift_wcs(wcs, x1, y1)
        if header is not None:
            _replace_wcs(cutout["header"], cutout["wcs"])
    elif header is not None:
        cutout["wcs"] = WCS(cutout["header"])
    cutout["meta"] = _meta(candidate, time, filename, name)
    return cutout


def downscale_image(image: Any, scale: int = 1, mode: str = "sum", header: fits.Header | None = None) -> Any:
    """Join blocks of pixels.

    Parameters
    ----------
    image : array_like, shape (ny, nx)
        Rows and columns beyond a multiple of ``scale`` are left out.
    scale : int, optional
        Pixels along each side of a block, at least 1.
    mode : {"sum", "mean", "and", "or"}, optional
        What a block becomes; the last two join the bits of integers, or booleans.
    header : astropy.io.fits.Header, optional
        Header of ``image``; never modified.

    Returns
    -------
    downscaled : ndarray, shape (ny // scale, nx // scale)
    downscaled_header : astropy.io.fits.Header
        Returned only with ``header``: each block's centre has the place on the sky that it had before.

    Raises
    ------
    ValueError
        ``image`` is not 2-D, ``scale`` is below 1 or above its sides, or there is no such ``mode``.
    """
    if mode not in _MODES:
        raise ValueError(f"mode: found {mode!r}, wanted one of {', '.join(_MODES)}")
    data = np.asarray(image)
    if data.ndim != 2:
        raise ValueError(f"image: found the shape {data.shape}, wanted two axes (y, x)")
    if scale != int(scale) or not 1 <= scale <= min(data.shape):
        raise ValueError(f"scale: found {scale!r}, wanted a whole number from 1 to {min(data.shape)}")
    scale = int(scale)
    ny, nx = data.shape[0] // scale, data.shape[1] // scale
    blocks = data[: ny * scale, : nx * scale].reshape(ny, scale, nx, scale)
    if mode in ("and", "or"):
        join = np.bitwise_and if mode == "and" else np.bitwise_or
        downscaled = join.reduce(join.reduce(blocks, axis=3), axis=1)
    else:
        downscaled = blocks.sum(axis=(1, 3)) if mode == "sum" else blocks.mean(axis=(1, 3))
    if header is None:
        return downscaled
    return downscaled, _downscale_header(header, scale, nx, ny)


def _square(x0: float, y0: float, r0: float) -> tuple[int, int, int]:
    """Return the lower-left pixel and the side of the square around a position; halves are rounded up."""
    if not (math.isfinite(x0) and math.isfinite(y0)):
        raise ValueError(f"x, y: found {x0}, {y0}, wanted finite numbers")
    if not (math.isfinite(r0) and r0 >= 0):
        raise ValueError(f"radius: found {r0}, wanted a number that is not negative")
    half = math.ceil(r0)
    return math.floor(x0 + 0.5) - half, math.floor(y0 + 0.5) - half, 2 * half + 1


def _crop_header(header: fits.Header, x1: int, y1: int, width: int, height: int) -> fits.Header:
    _refuse_lookup_tables(header)
    cropped = header.copy()
    cropped["NAXIS1"], cropped["NAXIS2"] = width, height
    # CRPIX is 0 by default, so it must be written where the header has a WCS without it.
    for axis, start in (("1", x1), ("2", y1)):
        if "CRPIX" + axis in cropped or "CTYPE" + axis in cropped:
            cropped["CRPIX" + axis] = cropped.get("CRPIX" + axis, 0.0) - start
    cropped["CROP_X1"], cropped["CROP_X2"] = x1, x1 + width
    cropped["CROP_Y1"], cropped["CROP_Y2"] = y1, y1 + height
    return cropped


def _refuse_lookup_tables(header: fits.Header) -> None:
    for name in header:
        if _LOOKUP_CARD.match(name):
            raise ValueError(f"header: found {name}, a lookup-table distortion, which cannot follow a crop")


def _shift_wcs(wcs: WCS, x1: int, y1: int) -> WCS:
    """Return the WCS of the pixels from ``x1, y1`` on."""
    if wcs.cpdis1 is not None or wcs.cpdis2 is not None or wcs.det2im1 is not None or wcs.det2im2 is not None:
        raise ValueError("wcs: found a lookup-table distortion, which cannot follow a crop")
    shifted = wcs.deepcopy()
    shifted.wcs.crpix = shifted.wcs.crpix - np.array([x1, y1])
    if shifted.sip is not None:
        # astropy keeps a second copy of CRPIX with the SIP polynomials, which are measured from it.
        sip = shifted.sip
        shifted.sip = type(sip)(sip.a, sip.b, sip.ap, sip.bp, shifted.wcs.crpix)
    if shifted.pixel_shape is not None:
        shifted.pixel_shape = None
    return shifted


def _replace_wcs(header: fits.Header, wcs: WCS) -> None:
    """Write a WCS over the one of a header."""
    for name in [name for name in header if _WCS_CARD.match(name)]:
        del header[name]
    header.update(wcs.to_header(relax=True))


def _downscale_header(header: fits.Header, scale: int, nx: int, ny: int) -> fits.Header:
    """Return the header of blocks of pixels: CRPIX, the pixel's size and the SIP polynomials are in new pixels."""
    _refuse_lookup_tables(header)
    out = header.copy()
    out["NAXIS1"], out["NAXIS2"] = nx, ny
    for axis in ("1", "2"):
        if "CRPIX" + axis in out or "CTYPE" + axis in out:
            out["CRPIX" + axis] = (out.get("CRPIX" + axis, 0.0) - 0.5) / scale + 0.5
    # One of CD and CDELT carries the size of a pixel; where a header has both, CD is what counts.
    linear = [name for name in out if re.match(r"CD\d_\d$", name)]
    for name in linear or [name for name in ("CDELT1", "CDELT2") if name in out]:
        out[name] = out[name] * scale
    if not linear and "CTYPE1" in out:
        for name in ("CDELT1", "CDELT2"):
            out.setdefault(name, float(scale))
    for name in list(out):
        power = re.match(r"[AB]P?_(\d+)_(\d+)$", name)
        if power:
            out[name] = out[name] * float(scale) ** (int(power[1]) + int(power[2]) - 1)
    return out


def _meta(candidate: Mapping[str, Any] | Row, time: Any, filename: str | None, name: str | None) -> dict[str, Any]:
    meta = {field: candidate[field] for field in candidate.keys()}  # noqa: SIM118 (a Row iterates over its values)
    if time is not None:
        meta["time"] = Time(time)
    if filename is not None:
        meta["filename"] = filename
    if name is not None:
        meta["name"] = name
    elif "name" not in meta and _is_number(meta.get("ra")) and _is_number(meta.get("dec")):
        meta["name"] = j2000_name(float(meta["ra"]), float(meta["dec"]))
    return meta


def _is_number(value: Any) -> bool:
    return value is not None and not np.ma.is_masked(value) and np.isreal(value) and bool(np.isfinite(value))


def j2000_name(ra: float, dec: float) -> str:
    """Return the designation of a place on the sky, ``JHHMMSS.ss±DDMMSS.s``, rounded as STDPipe rounds it.

    Parameters
    ----------
    ra, dec : float
        Degrees, ICRS.
    """
    hours = Angle(ra, "deg").to_string(unit="hour", sep="", precision=2, pad=True)
    degrees = Angle(dec, "deg").to_string(unit="deg", sep="", precision=1, pad=True, alwayssign=True)
    return f"J{hours}{degrees}"
