"""The celestial WCS of a frame, and positions on it.

A frame's WCS has two forms: its cards, verbatim, and the astropy WCS made of exactly these cards. A stamp carries the
cards with CRPIX moved, so its sky is the one that the frame's positions were computed with. Linear, SIP, TPV and TNX
solutions and every projection of WCSLIB measure from CRPIX and survive the move. Lookup tables (CPDIS, DP, D2IMDIS,
-TAB) do not, and they are in other HDUs: a frame that has them has no usable WCS here, and ``problem`` says why. Its
pixels still serve alerts that give x, y.
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy.coordinates import BaseCoordinateFrame, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, NoConvergence
from astropy.wcs import WcsError as AstropyWcsError
from astropy.wcs.utils import wcs_to_celestial_frame

from stampworker.cutouts.keywords import CELESTIAL_NUMBER, CELESTIAL_TEXT, is_celestial, is_lookup
from stampworker.errors import FrameMismatch
from stampworker.frames.fits.header import Hdu, describe, parse_real, parse_text, split_cards

if TYPE_CHECKING:
    from numpy.typing import NDArray

# astropy does not read an equinox given as text and takes ICRS instead: the same sky if J2000 is meant.
_J2000 = re.compile(r"\s*J?2000(\.0*)?", re.IGNORECASE)
# Whatever the header claims: astropy makes a table of order² coefficients of a SIP, WCSLIB of a TNX, and evaluates it.
_MAX_ORDER = 9
_MAX_TNX_ORDER = 20
_TNX = re.compile(r"(?:lng|lat)cor\s*=\s*\"?([^\"]*)", re.IGNORECASE)
# The filters of warnings are the process's: one thread at a time changes them and puts them back.
_LOCK = threading.Lock()


class CelestialWcs(NamedTuple):
    """The celestial WCS of an image, or why there is no usable one.

    It is made of ``cards``, those of the primary WCS's first two axes: 80 characters each, verbatim, in the header's
    order; none without a usable WCS.
    """

    wcs: WCS | None
    cards: list[str]
    problem: str | None


def celestial_wcs(hdu: Hdu, shape: tuple[int, int]) -> CelestialWcs:
    """Return the celestial WCS of an image of a shape (ny, nx), from its own and inherited cards."""
    cards, problem = _select_cards(hdu)
    wcs, problem = _make_wcs(cards, shape) if problem is None else (None, problem)
    return CelestialWcs(wcs, cards if problem is None else [], problem)


def _select_cards(hdu: Hdu) -> tuple[list[str], str | None]:
    """Return the cards of the celestial WCS, and why they make no usable one."""
    cards: list[str] = []
    problem = None
    seen: set[str] = set()
    for card in split_cards(hdu.cards):
        keyword = card[:8].rstrip().decode("latin-1")
        if card[8:9] != b"=" or keyword in seen:
            continue
        text, number = CELESTIAL_TEXT.fullmatch(keyword), CELESTIAL_NUMBER.fullmatch(keyword)
        if _is_lookup(card):
            problem = problem or f"{keyword}: lookup-table distortions cannot be carried by a stamp"
        if not (text or number):
            continue
        seen.add(keyword)
        problem = problem or _problem(keyword, card[9:], "string" if text else "number")
        cards.append(card.decode("latin-1"))
    problem = problem or _tnx_problem(hdu)
    if not cards:
        problem = problem or "the header has no WCS"
    if hdu.plane != hdu.axes[-2:]:
        problem = problem or f"the plane is not the first two axes of shape {hdu.axes}"
    linear = [parse_real(hdu.values[keyword]) for keyword in seen if keyword.startswith("CD") and "_" in keyword]
    if linear and not any(linear):  # WCSLIB takes that for the unit matrix
        problem = problem or "singular WCS: every CDi_j is 0"
    return cards, problem


def _problem(keyword: str, value: bytes, wanted: str) -> str | None:
    """Return what is wrong with a card."""
    if wanted == "string":
        return None if parse_text(value) is not None else f"{keyword} is {describe(value)}, wanted a string"
    number = parse_real(value)
    if number is None:
        is_empty = not value.split(b"/")[0].strip()
        harmless = is_empty or (keyword in ("EQUINOX", "EPOCH") and _J2000.fullmatch(parse_text(value) or ""))
        return None if harmless else f"{keyword} is {describe(value)}, wanted a number"
    if keyword.endswith("_ORDER") and number > _MAX_ORDER:
        return f"{keyword} is {describe(value)}, wanted at most {_MAX_ORDER}"
    return None


def _tnx_problem(hdu: Hdu) -> str | None:
    """Return what is wrong with the orders of a TNX or ZPX, the second and third numbers of a correction."""
    for axis in "12":
        pieces = sorted(keyword for keyword in hdu.values if re.fullmatch(rf"WAT{axis}_\d{{3}}", keyword))
        text = "".join(parse_text(hdu.values[piece]) or "" for piece in pieces)
        for correction in _TNX.findall(text):
            numbers = correction.split()[:4]
            orders = [parse_real(number.encode("latin-1")) for number in numbers]
            if not all(order is not None and 0 <= order <= _MAX_TNX_ORDER for order in orders):
                return f"WAT{axis}: a correction of {numbers}, wanted orders of 0 to {_MAX_TNX_ORDER}"
    return None


def lookup_cards(hdu: Hdu) -> list[bytes]:
    """Return the celestial WCS's cards if lookup tables are among them, else nothing."""
    cards = [card for card in split_cards(hdu.cards) if is_celestial(card[:8].rstrip().decode("latin-1"))]
    return cards if any(map(_is_lookup, cards)) else []


def _is_lookup(card: bytes) -> bool:
    keyword = card[:8].rstrip().decode("latin-1")
    return is_lookup(keyword, primary=True) or re.match(rb"CTYPE[12] *= *'[^']*-TAB", card) is not None


def _make_wcs(cards: list[str], shape: tuple[int, int]) -> tuple[WCS | None, str | None]:
    """Return the WCS that the cards give, or None and why they give none."""
    header = fits.Header.fromstring("NAXIS   =                    2".ljust(80) + "".join(cards))
    try:
        with _LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wcs = WCS(header)
            wcs.wcs.set()
    except (AstropyWcsError, ValueError, KeyError, TypeError, MemoryError, fits.VerifyError) as exc:
        return None, f"unreadable WCS: {str(exc).strip().splitlines()[-1] if str(exc).strip() else type(exc).__name__}"
    if not wcs.has_celestial or wcs.wcs.lng < 0:
        return None, f"no celestial WCS: CTYPE {', '.join(wcs.wcs.ctype)}"
    with np.errstate(over="ignore", invalid="ignore"):
        matrix = wcs.pixel_scale_matrix
        regular = np.isfinite(matrix).all() and abs(np.linalg.det(matrix)) > 1e-9 * np.sum(matrix**2)
    if not regular:
        return None, f"singular WCS: matrix {matrix.tolist()}"
    wcs.array_shape = shape
    return wcs, None


def celestial_frame(wcs: WCS) -> BaseCoordinateFrame | None:
    """Return astropy's coordinate frame of a WCS; None for ecliptic axes, or where RADESYS or EQUINOX is not in use.

    astropy would take some of the other systems for equatorial ones.
    """
    if wcs.wcs.ctype[wcs.wcs.lng][:4] not in ("RA--", "GLON"):
        return None
    try:
        return wcs_to_celestial_frame(wcs)
    except ValueError:
        return None


def sky_system(wcs: WCS) -> tuple[str, str]:
    """Return the first four letters of the longitude's CTYPE, and the reference system with its equinox.

    FK5 J2000 is as good as ICRS and both are called J2000: they differ by 23 mas, less than headers can be trusted.
    """
    axis, system = wcs.wcs.ctype[wcs.wcs.lng][:4], wcs.wcs.radesys.strip() or "FK5"
    if system == "ICRS" or (system == "FK5" and not abs(wcs.wcs.equinox - 2000) > 0):  # without EQUINOX it is NaN
        return axis, "J2000"
    return axis, f"{system} {wcs.wcs.equinox}"


def sky_to_pixel(wcs: WCS, ra: float, dec: float, url: str) -> tuple[float, float]:
    """Return the pixel of a sky position.

    Parameters
    ----------
    wcs : astropy.wcs.WCS
        Celestial; see `stampworker.frames.Frame.wcs`.
    ra, dec : float
        Degrees, ICRS.
    url : str
        Name of the frame for messages.

    Returns
    -------
    x, y : float
        Pixels, 0-based; NaN where the projection, or its distortion, has no pixel for the position.

    Raises
    ------
    FrameMismatch
        The WCS is in a system that ICRS cannot be converted to.
    """
    lon, lat = ra, dec
    if sky_system(wcs) != ("RA--", "J2000"):
        system = celestial_frame(wcs)
        if system is None:
            found = f"{wcs.wcs.ctype[wcs.wcs.lng][:4]} {wcs.wcs.radesys}".strip()
            problem = f"a WCS in {found}, wanted RA or GLON in a system in use for an alert that gives ra, dec only"
            raise FrameMismatch(url, problem)
        lon, lat = _lon_lat(SkyCoord(ra, dec, unit="deg"), system)
    world = _in_axis_order(wcs, lon, lat)
    # Without distortions first: if the projection has no pixel, the iteration has none either.
    if not np.isfinite(wcs.wcs_world2pix(*world, 0)).all():
        return math.nan, math.nan
    try:
        x, y = (float(value) for value in wcs.all_world2pix(*world, 0))
    except NoConvergence:
        return math.nan, math.nan
    return x, y


def pixel_to_pixel(wcs: WCS, other: WCS, x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the x and y on ``other`` of positions on ``wcs``, pixels, 0-based; NaN where there are none."""
    world = wcs.all_pix2world(x, y, 0)
    lon, lat = world[wcs.wcs.lng], world[wcs.wcs.lat]
    if sky_system(wcs) != sky_system(other):
        lon, lat = _lon_lat(SkyCoord(lon, lat, unit="deg", frame=celestial_frame(wcs)), celestial_frame(other))
    other_x, other_y = other.all_world2pix(*_in_axis_order(other, lon, lat), 0, tolerance=1e-6, quiet=True)
    return other_x, other_y


def _lon_lat(sky: SkyCoord, system: BaseCoordinateFrame | None) -> tuple[Any, Any]:
    converted = sky.transform_to(system).spherical
    return converted.lon.deg, converted.lat.deg


def _in_axis_order(wcs: WCS, lon: Any, lat: Any) -> tuple[Any, Any]:
    return (lon, lat) if wcs.wcs.lng < wcs.wcs.lat else (lat, lon)
