"""Crops and cutouts.

Names, arguments and documented behaviour are those of ``stdpipe.cutouts`` (STDPipe, S. Karpov), so code written for it
works here.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping
from operator import index
from typing import Any

import numpy as np
from astropy.coordinates import Latitude, Longitude
from astropy.io import fits
from astropy.table import Row
from astropy.time import Time
from astropy.units import Quantity, pix
from astropy.wcs import WCS

from stampworker.cutouts.keywords import PIXEL_AXIS, SIP_COEFFICIENT, is_lookup, wcs_version

_MODES: dict[str, Any] = {"sum": np.sum, "mean": np.mean, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}


def crop_image(data: Any, x1: int, y1: int, width: int, height: int, header: fits.Header | None = None) -> Any:
    """Crop a rectangle that may hang over the edge of the frame.

    Parameters
    ----------
    data : array_like, shape (ny, nx)
        One plane: an array, or anything with ``shape``, ``dtype`` and ``data[y0:y1, x0:x1]``, such as a frame or the
        ``section`` of a FITS HDU, which read only what is sliced. It is sliced once, and not at all if the rectangle is
        completely outside.
    x1, y1 : int
        Lower-left pixel of the rectangle, 0-based; may be negative.
    width, height : int
        Size in pixels, at least 1.
    header : astropy.io.fits.Header, optional
        Header of ``data``; never modified.

    Returns
    -------
    cropped : ndarray, shape (height, width)
        A contiguous copy; dtype (byte order included) and units of ``data``. Outside the frame: NaN in float planes, 0
        in integer planes, False in boolean planes.
    cropped_header : astropy.io.fits.Header
        Returned only with ``header``: ``CRPIX1`` less ``x1``, ``CRPIX2`` less ``y1``, in alternative WCS's too, so each
        pixel keeps its sky position. ``CROP_X1, CROP_X2, CROP_Y1, CROP_Y2`` name the half-open rectangle, 0-based.

    Raises
    ------
    ValueError
        ``data`` is not 2-D, ``width`` or ``height`` is below 1, or ``header`` has a lookup-table distortion
        or a CRPIX that is not a number.

    Notes
    -----
    Moving CRPIX is exact for linear, SIP and TPV solutions, which measure from it (Greisen & Calabretta 2002,
    A&A 395, 1061; Shupe et al. 2005, ASPC 347, 491). It is not for lookup-table distortions (CPDIS, D2IMDIS), whose
    tables are indexed by the pixels of the whole frame; they are refused.

    Examples
    --------
    >>> import numpy as np
    >>> plane = np.arange(12).reshape(3, 4)
    >>> crop_image(plane, x1=1, y1=0, width=2, height=2)
    array([[1, 2],
           [5, 6]])

    A rectangle that hangs over the edge is filled up, here with NaN:

    >>> crop_image(plane.astype(float), x1=3, y1=2, width=2, height=2)
    array([[11., nan],
           [nan, nan]])
    """
    if not hasattr(data, "shape"):
        data = np.asarray(data)
    if len(data.shape) != 2:
        raise ValueError(f"data: found the shape {tuple(data.shape)}, wanted two axes (y, x)")
    if width < 1 or height < 1:
        raise ValueError(f"width, height: found {width}, {height}, wanted at least 1")
    x1, y1, width, height = index(x1), index(y1), index(width), index(height)
    ny, nx = data.shape
    xa, xb = max(x1, 0), min(x1 + width, nx)
    ya, yb = max(y1, 0), min(y1 + height, ny)
    inside = data[ya:yb, xa:xb] if xa < xb and ya < yb else np.empty((0, 0), data.dtype)
    if inside.shape == (height, width):
        cropped = np.array(inside, order="C")
    else:
        cropped = np.full((height, width), np.nan if inside.dtype.kind in "fc" else 0, inside.dtype)
        if inside.size:
            cropped[ya - y1 : yb - y1, xa - x1 : xb - x1] = inside
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
        The position is in its middle pixel. See `crop_image`.
    cropped_header : astropy.io.fits.Header
        Returned only with ``header``.

    Raises
    ------
    ValueError
        The position is masked or not finite, or ``r0`` is negative or not finite; and as `crop_image`.
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
        With at least ``x`` and ``y``, pixels (a Quantity too), 0-based.
    radius : float
        Half-size, pixels; the cutout is ``2·ceil(radius) + 1`` square with the candidate in its middle pixel.
    header : astropy.io.fits.Header, optional
        Header of ``image``; never modified.
    wcs : astropy.wcs.WCS, optional
        WCS of ``image``, never modified; it replaces the header's.
    time : astropy.time.Time, datetime or str, optional
        Time of the observation, for ``meta``.
    filename, name : str, optional
        For ``meta``. The default name is the J2000 designation of ``ra`` and ``dec`` (degrees).
    **kwargs : array_like, shape (ny, nx)
        Further planes: ``mask, diff, template, convolved, err``, ... Anything that is not 2-D is left out.

    Returns
    -------
    cutout : dict
        ``image`` and the further planes, all copies; ``header`` and ``wcs`` of the cutout, if given (``wcs`` also if
        the header has one), in which every pixel has its sky position in the frame; ``meta``, a dict of all fields of
        the candidate and ``time``, ``filename`` and ``name``.

    Raises
    ------
    KeyError
        The candidate has no ``x`` or ``y``.
    ValueError
        A plane's shape is not the image's, ``wcs`` has a lookup-table distortion; and as `crop_image_centered`.
    TypeError
        ``x`` or ``y`` is not a number, or has another unit.

    Examples
    --------
    >>> import numpy as np
    >>> rows, columns = np.mgrid[:100, :120]  # each pixel holds its own y, or its own x
    >>> cutout = get_cutout(columns, {"x": 40.2, "y": 30.7}, radius=5, diff=rows)
    >>> cutout["image"].shape
    (11, 11)
    >>> print(cutout["image"][5, 5], cutout["diff"][5, 5])  # the middle pixel is the one nearest to the candidate
    40 31
    """
    x1, y1, side = _square(candidate["x"], candidate["y"], radius)
    cutout: dict[str, Any] = {"image": crop_image(image, x1, y1, side, side)}
    shape = _shape(image)
    for plane, data in kwargs.items():
        plane_shape = _shape(data)
        if len(plane_shape) != 2:
            continue
        if plane_shape != shape:
            raise ValueError(f"{plane}: found the shape {plane_shape}, wanted {shape}, the image's")
        cutout[plane] = crop_image(data, x1, y1, side, side)
    if wcs is not None:
        cutout["wcs"] = _shift_wcs(wcs, x1, y1, side)
    if header is not None:
        frame_header = header if wcs is None else _replace_wcs(header, wcs)
        cutout["header"] = _crop_header(frame_header, x1, y1, side, side)
        if wcs is None and has_wcs(header):
            cutout["wcs"] = WCS(cutout["header"])
    cutout["meta"] = _meta(candidate, time, filename, name)
    return cutout


def downscale_image(image: Any, scale: int = 1, mode: str = "sum", header: fits.Header | None = None) -> Any:
    """Combine blocks of pixels into one pixel each.

    Parameters
    ----------
    image : array_like, shape (ny, nx)
        See `crop_image`. Rows and columns beyond a multiple of ``scale`` are left out.
    scale : int, optional
        Pixels along each side of a block, at least 1.
    mode : {"sum", "mean", "and", "or"}, optional
        What a block becomes; the last two combine the bits of integers, or booleans.
    header : astropy.io.fits.Header, optional
        Header of ``image``; never modified.

    Returns
    -------
    downscaled : ndarray, shape (ny // scale, nx // scale)
        One pixel per block; sums of integers may have a wider dtype, means are floats.
    downscaled_header : astropy.io.fits.Header
        Returned only with ``header``: the centre of each block keeps its sky position.

    Raises
    ------
    ValueError
        ``image`` is not 2-D, ``scale`` is not a whole number from 1 to the shorter side, ``mode`` is unknown or does
        not suit the dtype, or ``header`` has a lookup-table distortion or a WCS card that is not a number.

    Notes
    -----
    In pixels ``scale`` times as big, CRPIX becomes ``(CRPIX - 0.5) / scale + 0.5``; CD, or else CDELT, grows by
    ``scale``; and a coefficient of the SIP polynomials of degree n by ``scale``^(n - 1).
    """
    if mode not in _MODES:
        raise ValueError(f"mode: found {mode!r}, wanted one of {', '.join(_MODES)}")
    data = image if hasattr(image, "shape") else np.asarray(image)
    if len(data.shape) != 2:
        raise ValueError(f"image: found the shape {tuple(data.shape)}, wanted two axes (y, x)")
    if scale != int(scale) or not 1 <= scale <= min(data.shape):
        raise ValueError(f"scale: found {scale!r}, wanted a whole number from 1 to {min(data.shape)}")
    if mode in ("and", "or") and data.dtype.kind not in "biu":
        raise ValueError(f"mode: found {mode!r} for {data.dtype}, which joins bits of integers or booleans only")
    scale = int(scale)
    ny, nx = data.shape[0] // scale, data.shape[1] // scale
    blocks = np.asarray(data[: ny * scale, : nx * scale]).reshape(ny, scale, nx, scale)
    downscaled = _MODES[mode](blocks, axis=(1, 3))
    if header is None:
        return downscaled
    return downscaled, _downscale_header(header, scale, nx, ny)


def has_wcs(header: fits.Header) -> bool:
    """Return True if a header gives its pixels positions, on the sky or in any other system."""
    return any(PIXEL_AXIS.fullmatch(name) for name in header)


def _shape(data: Any) -> tuple[int, ...]:
    # A section of a FITS HDU has a shape but no ndim; numpy would read all of it to find out.
    return tuple(data.shape) if hasattr(data, "shape") else np.shape(data)


def _square(x0: Any, y0: Any, r0: float) -> tuple[int, int, int]:
    """Return the lower-left pixel and the side of the square around a position; halves are rounded up."""
    x, y = _coordinate(x0), _coordinate(y0)
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"x, y: found {x0}, {y0}, wanted finite numbers")
    if not (math.isfinite(r0) and r0 >= 0):
        raise ValueError(f"radius: found {r0}, wanted a number that is not negative")
    half = math.ceil(r0)
    # In double precision: a half added to a float32 may be rounded to the next pixel.
    return math.floor(float(x) + 0.5) - half, math.floor(float(y) + 0.5) - half, 2 * half + 1


def _coordinate(value: Any) -> Any:
    """Return a number of pixels without its unit; NaN where it is masked."""
    if _is_masked(value):
        return math.nan
    return value.value if isinstance(value, Quantity) and value.unit == pix else value


def _is_masked(value: Any) -> bool:
    # The field of a row: numpy's constant, or astropy's Masked, whose hidden number float() would return.
    return isinstance(value, np.ndarray) and bool(np.any(getattr(value, "mask", False)))


def _crop_header(header: fits.Header, x1: int, y1: int, width: int, height: int) -> fits.Header:
    cropped = _change_pixels(header, width, height, 1, (-x1, -y1))
    cropped["CROP_X1"], cropped["CROP_X2"] = x1, x1 + width
    cropped["CROP_Y1"], cropped["CROP_Y2"] = y1, y1 + height
    return cropped


def _change(header: fits.Header, name: str, default: float, factor: float, offset: float = 0) -> None:
    """Change a number in every card of this name: of several cards, some readers take the first, some the last."""
    cards = header.count(name) if name in header else 0
    if not cards:
        header[name] = default * factor + offset
    for card in range(cards):
        value = header[name, card]
        if not isinstance(value, int | float):
            raise ValueError(f"header: found {name} = {value!r}, wanted a number")
        header[name, card] = value * factor + offset


def _versions(header: fits.Header) -> list[str]:
    """Return the letters of the WCS's of a header; the primary WCS has an empty one."""
    return sorted({match[1] or match[2] or "" for match in map(PIXEL_AXIS.fullmatch, header) if match})


def _change_pixels(
    header: fits.Header, width: int, height: int, factor: float, offsets: tuple[float, float]
) -> fits.Header:
    """Return a copy of a header for a plane of another size, whose CRPIX is multiplied and moved."""
    for name in header:
        if is_lookup(name):
            raise ValueError(f"header: found {name}, a lookup-table distortion, which cannot follow a change of pixels")
    changed = header.copy()
    changed["NAXIS1"], changed["NAXIS2"] = width, height
    for version in _versions(header):
        for axis, offset in enumerate(offsets, 1):
            _change(changed, f"CRPIX{axis}{version}", 0.0, factor, offset)  # a WCS without CRPIX has it at 0
    return changed


def _shift_wcs(wcs: WCS, x1: int, y1: int, side: int) -> WCS:
    """Return the WCS of the square of pixels from ``x1, y1`` on."""
    if wcs.cpdis1 is not None or wcs.cpdis2 is not None or wcs.det2im1 is not None or wcs.det2im2 is not None:
        raise ValueError("wcs: found a lookup-table distortion, which cannot follow a change of pixels")
    shifted = wcs.deepcopy()
    shift = np.zeros(shifted.naxis)
    shift[:2] = x1, y1
    shifted.wcs.crpix = shifted.wcs.crpix - shift
    if shifted.sip is not None:
        # astropy keeps a second copy of CRPIX with the SIP polynomials, whose origin it is.
        sip = shifted.sip
        shifted.sip = type(sip)(sip.a, sip.b, sip.ap, sip.bp, sip.crpix - shift[:2])
    if shifted.pixel_shape is not None:
        shifted.pixel_shape = (side, side, *shifted.pixel_shape[2:])
    return shifted


def _replace_wcs(header: fits.Header, wcs: WCS) -> fits.Header:
    """Return a copy of a header with another primary WCS; alternative ones (CRPIX1A) stay."""
    replaced = fits.Header([card for card in header.cards if wcs_version(card.keyword) != ""])
    # WCS cards only: a WCS also has dates, which may be those of the frame that it was measured on.
    replaced.extend((card for card in wcs.to_header(relax=True).cards if wcs_version(card.keyword) == ""), end=True)
    return replaced


def _downscale_header(header: fits.Header, scale: int, nx: int, ny: int) -> fits.Header:
    """Return the header for blocks of pixels: CRPIX, pixel size and SIP polynomials in new pixels."""
    out = _change_pixels(header, nx, ny, 1 / scale, (0.5 - 0.5 / scale,) * 2)
    for version in _versions(header):
        # CD or CDELT has the size of a pixel; if a header has both, CD counts.
        sizes = [name for name in header if re.fullmatch(rf"CD\d+_[12]{version}", name)]
        for name in dict.fromkeys(sizes or (f"CDELT1{version}", f"CDELT2{version}")):
            _change(out, name, 1.0, scale)
    for name in dict.fromkeys(header):
        if powers := SIP_COEFFICIENT.fullmatch(name):
            _change(out, name, 0.0, float(scale) ** (int(powers[1]) + int(powers[2]) - 1))
    return out


def _meta(candidate: Mapping[str, Any] | Row, time: Any, filename: str | None, name: str | None) -> dict[str, Any]:
    meta = {field: candidate[field] for field in candidate.keys()}  # noqa: SIM118 (a Row iterates over its values)
    if time is not None:
        meta["time"] = Time(time)
    if filename is not None:
        meta["filename"] = filename
    if name is not None:
        meta["name"] = name
    elif "name" not in meta and _is_known(meta.get("ra")) and _is_known(meta.get("dec")):
        meta["name"] = j2000_name(meta["ra"], meta["dec"])
    return meta


def _is_known(value: Any) -> bool:
    return value is not None and not _is_masked(value) and (isinstance(value, str) or bool(np.isfinite(value)))


def j2000_name(ra: float, dec: float) -> str:
    """Return the designation ``JHHMMSS.ss±DDMMSS.s`` of an ICRS position in degrees, rounded as STDPipe rounds it."""
    hours = Longitude(ra, "deg").to_string(unit="hour", sep="", precision=2, pad=True)
    degrees = Latitude(dec, "deg").to_string(unit="deg", sep="", precision=1, pad=True, alwayssign=True)
    return f"J{hours}{degrees}"
