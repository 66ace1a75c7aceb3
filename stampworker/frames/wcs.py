"""The celestial WCS of a frame: its cards verbatim, and the astropy WCS made of them alone.

Both come from the same cards, so what a stamp carries (these cards, CRPIX moved) is what the frame's positions were
computed with. Linear, SIP, TPV, TNX and every projection of WCSLIB measure from CRPIX and survive the move. Lookup
tables (CPDIS, DQ, D2IMDIS, -TAB) do not and live in other HDUs: a frame that has them has no usable WCS here, and says
why; its pixels serve alerts that give x, y.
"""

from __future__ import annotations

import math
import re
import threading
import warnings

import numpy as np
from astropy.coordinates import BaseCoordinateFrame, SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, NoConvergence
from astropy.wcs import WcsError as AstropyWcsError
from astropy.wcs.utils import wcs_to_celestial_frame

from stampworker.errors import FrameMismatch
from stampworker.frames.fits.header import Hdu, describe, parse_real, parse_text, split_cards

_TEXT = re.compile(r"CTYPE[12]|CUNIT[12]|RADESYS|RADECSYS|WAT[12]_\d{3}")
_REAL = re.compile(
    r"(CRVAL|CRPIX|CDELT|CROTA)[12]|(CD|PC)[12]_[12]|PC00[12]00[12]|PV[12]_\d{1,2}|LONPOLE|LATPOLE|EQUINOX|EPOCH"
    r"|[AB]P?_(ORDER|DMAX)|[AB]P?_\d_\d"
)
# As text it is no number to astropy, which takes ICRS instead: the same sky, so long as J2000 is meant.
_J2000 = re.compile(r"\s*J?2000(\.0*)?", re.IGNORECASE)
_LOOKUP = re.compile(r"(CPDIS|CQDIS|DP|DQ|CPERR|CQERR|DVERR|D2IMDIS|D2IMARR|AXISCORR)\d?")
# Whatever the header claims, astropy makes a table of a SIP's order², WCSLIB of a TNX's, and go through it.
_MAX_ORDER = 9
_MAX_TNX = 20
_TNX = re.compile(r"(?:lng|lat)cor\s*=\s*\"?([^\"]*)", re.IGNORECASE)
# Warnings are silenced for the whole process while a WCS is made; one at a time, so that the filters are put back.
_LOCK = threading.Lock()


def wcs_cards(hdu: Hdu) -> tuple[list[str], str | None]:
    """Return the cards of the celestial WCS, verbatim, and what is wrong with them.

    Parameters
    ----------
    hdu : Hdu
        An image.

    Returns
    -------
    cards : list of str, 80 characters each
        Of the primary WCS's first two axes, in the header's order.
    problem : str or None
        Why they make no usable WCS.
    """
    cards: list[str] = []
    problem = None
    seen: set[str] = set()
    for card in split_cards(hdu.cards):
        keyword = card[:8].rstrip().decode("latin-1")
        if card[8:9] != b"=" or keyword in seen:
            continue
        text, real = _TEXT.fullmatch(keyword), _REAL.fullmatch(keyword)
        if _is_lookup(card):
            problem = problem or f"{keyword}: lookup-table distortions cannot be carried by a stamp"
        if not (text or real):
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
    if linear and not any(linear):  # which WCSLIB takes for the unit matrix
        problem = problem or "singular WCS: every CDi_j is 0"
    return cards, problem


def _problem(keyword: str, value: bytes, wanted: str) -> str | None:
    """Return what is wrong with a card."""
    if wanted == "string":
        return None if parse_text(value) is not None else f"{keyword} is {describe(value)}, wanted a string"
    number = parse_real(value)
    if number is None:
        harmless = _empty(value) or (keyword in ("EQUINOX", "EPOCH") and _J2000.fullmatch(parse_text(value) or ""))
        return None if harmless else f"{keyword} is {describe(value)}, wanted a number"
    if keyword.endswith("_ORDER") and number > _MAX_ORDER:
        return f"{keyword} is {describe(value)}, wanted at most {_MAX_ORDER}"
    return None


def _tnx_problem(hdu: Hdu) -> str | None:
    """Return what is wrong with the orders of a TNX or ZPX: the second and third numbers of a correction."""
    for axis in "12":
        pieces = sorted(keyword for keyword in hdu.values if re.fullmatch(rf"WAT{axis}_\d{{3}}", keyword))
        text = "".join(parse_text(hdu.values[piece]) or "" for piece in pieces)
        for numbers in _TNX.findall(text):
            for number in numbers.split()[:4]:
                order = parse_real(number.encode("latin-1"))
                if order is None or not 0 <= order <= _MAX_TNX:
                    return f"WAT{axis}: a correction of {numbers.split()[:4]}, wanted orders of 0 to {_MAX_TNX}"
    return None


def is_celestial_card(keyword: str) -> bool:
    """Say whether a card belongs to the primary WCS's first two axes."""
    return any(pattern.fullmatch(keyword) for pattern in (_TEXT, _REAL, _LOOKUP))


def lookup_cards(hdu: Hdu) -> list[bytes]:
    """Return the celestial WCS's cards where lookup tables are among them, else nothing."""
    cards = [card for card in split_cards(hdu.cards) if is_celestial_card(card[:8].rstrip().decode("latin-1"))]
    return cards if any(map(_is_lookup, cards)) else []


def _is_lookup(card: bytes) -> bool:
    keyword = card[:8].rstrip().decode("latin-1")
    return _LOOKUP.fullmatch(keyword) is not None or (re.match(rb"CTYPE[12] *= *'[^']*-TAB", card) is not None)


def _empty(value: bytes) -> bool:
    return not value.split(b"/")[0].strip()


def make_wcs(cards: list[str], shape: tuple[int, int]) -> tuple[WCS | None, str | None]:
    """Return the celestial WCS that the cards give, or None and why there is none.

    Parameters
    ----------
    cards : list of str
        See `wcs_cards`.
    shape : tuple of int
        (ny, nx) of the image.

    Returns
    -------
    wcs : astropy.wcs.WCS or None
    problem : str or None
    """
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
    """Return astropy's coordinate frame of a WCS, None where there is none: ecliptic, RADESYS or EQUINOX out of use.

    Of the other systems astropy takes some for equatorial ones.
    """
    if wcs.wcs.ctype[wcs.wcs.lng][:4] not in ("RA--", "GLON"):
        return None
    try:
        return wcs_to_celestial_frame(wcs)
    except ValueError:
        return None


def sky_to_pixel(wcs: WCS, ra: float, dec: float, url: str) -> tuple[float, float]:
    """Return x, y of an ICRS position, 0-based; NaN where the projection has none."""
    system = wcs.wcs.radesys.strip() in ("", "ICRS", "FK5") and not abs(wcs.wcs.equinox - 2000) > 0
    lon, lat = ra, dec
    if not (system and wcs.wcs.ctype[wcs.wcs.lng].startswith("RA--")):
        frame = celestial_frame(wcs)
        if frame is None:
            found = f"{wcs.wcs.ctype[wcs.wcs.lng][:4]} {wcs.wcs.radesys}".strip()
            problem = f"a WCS in {found}, wanted RA or GLON in a system in use for an alert that gives ra, dec only"
            raise FrameMismatch(url, problem)
        sky = SkyCoord(ra, dec, unit="deg").transform_to(frame).spherical
        lon, lat = float(sky.lon.deg), float(sky.lat.deg)
    world = (lon, lat) if wcs.wcs.lng < wcs.wcs.lat else (lat, lon)
    x, y = (float(value) for value in wcs.wcs_world2pix(*world, 0))
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.nan, math.nan
    try:
        x, y = (float(value) for value in wcs.all_world2pix(*world, 0))
    except NoConvergence:
        return math.nan, math.nan
    return x, y
