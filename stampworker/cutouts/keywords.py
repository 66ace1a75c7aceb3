"""Which FITS keywords belong to a WCS, and which describe how an HDU is stored.

FITS standard 4.0, sections 4.4, 7, 8 and 10; SIP: Shupe et al. 2005, ASPC 347, 491; distortions: Calabretta et al. 2004
(a draft), where a record is ``DP1`` in the raw card and ``DP1.EXTVER`` in astropy; TNX, TPV, D2IM: as astropy has them.
"""

from __future__ import annotations

import re

SCALING = ("BSCALE", "BZERO", "BLANK")
"""How stored numbers become pixel values."""
CHECKSUMS = ("CHECKSUM", "DATASUM")
"""Sums over the bytes of an HDU."""

CELESTIAL_TEXT = re.compile(r"CTYPE[12]|CUNIT[12]|RADESYS|RADECSYS|WAT[12]_\d{3}")
"""Strings of the primary WCS's first two axes."""
CELESTIAL_NUMBER = re.compile(
    r"(CRVAL|CRPIX|CDELT|CROTA)[12]|(CD|PC)[12]_[12]|PC00[12]00[12]|PV[12]_\d{1,2}|LONPOLE|LATPOLE|EQUINOX|EPOCH"
    r"|[AB]P?_(ORDER|DMAX|\d_\d)"
)
"""Numbers of the primary WCS's first two axes; SIP polynomials up to the order 9 that the convention allows."""
SIP_COEFFICIENT = re.compile(r"[AB]P?_(\d+)_(\d+)")
"""Coefficients of a SIP polynomial and their two powers."""
PIXEL_AXIS = re.compile(r"(?:CTYPE|CRPIX|CRVAL|CDELT)[12]([A-Z]?)|(?:CD|PC)\d+_[12]([A-Z]?)")
"""Keywords that show that a WCS describes the pixels of a plane; the letter of that WCS."""

_WCS = re.compile(  # the letter of an alternative WCS, such as CRPIX1A, ends the keywords of the first group
    r"(?:(?:CTYPE|CUNIT|CRVAL|CRPIX|CDELT|CNAME|CRDER|CSYER)\d+|(?:CD|PC|PV|PS)\d+_\d+|(?:C[PQ](?:DIS|ERR)|D[PQ])\d"
    r"|WCSAXES|WCSNAME|LONPOLE|LATPOLE|RADESYS|EQUINOX|DVERR)([A-Z]?)(?:\..+)?"
    r"|CROTA\d+|PC\d{6}|WAT\d_\d{3}|[AB]P?_(?:ORDER|DMAX|\d+_\d+)|D2IM(?:DIS|ERR)?\d(?:\..+)?|AXISCORR|RADECSYS|EPOCH"
)
# The distortion's own size (CPERR, DVERR, ...) turns nothing on. Records (DP, DQ) do: without CPDIS nobody reads them.
_LOOKUP = re.compile(r"(?:C[PQ]DIS|D[PQ])\d([A-Z]?)(?:\..+)?|D2IMDIS\d|AXISCORR")
_DISTORTION = re.compile(rf"{_LOOKUP.pattern}|C[PQ]ERR\d|DVERR|D2IM(?:ERR)?\d(?:\..+)?")

_LAYOUT = r"SIMPLE|XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|GROUPS|EXTEND|" + "|".join(CHECKSUMS)
_TABLE = (
    r"TFIELDS|THEAP|T(?:TYPE|FORM|UNIT|DIM|NULL|SCAL|ZERO|DISP|BCOL)\d+"
    r"|Z(?:IMAGE|CMPTYPE|BITPIX|NAXIS\d*|TILE\d+|NAME\d+|VAL\d+|QUANTIZ|DITHER0|BLANK|SCALE|ZERO|MASKCMP)"
    r"|Z(?:SIMPLE|EXTEND|BLOCKED|TENSION|PCOUNT|GCOUNT|HECKSUM|DATASUM)"
)
STRUCTURE = re.compile(  # the empty keyword is that of a blank card
    rf"{_LAYOUT}|{'|'.join(SCALING)}|EXTNAME|EXTVER|EXTLEVEL|INHERIT|END|COMMENT|HISTORY|CONTINUE|HIERARCH|"
)
"""Structure of one HDU, and cards that are not ``keyword = value``."""
NOT_INHERITED = re.compile(rf"{STRUCTURE.pattern}|BLOCKED|NEXTEND|DATAMAX|DATAMIN|{_TABLE}")
"""Keywords that describe one HDU and no other."""
COMPRESSION_TABLE = re.compile(rf"{_LAYOUT}|{_TABLE}")
"""Keywords of the table that holds a compressed image, which are not the image's."""


def wcs_version(keyword: str) -> str | None:
    """Return which WCS a keyword belongs to: empty for the primary one, else the letter; None for no WCS."""
    match = _WCS.fullmatch(keyword)
    return None if match is None else match[1] or ""


def is_lookup(keyword: str, *, primary: bool = False) -> bool:
    """Return True if a keyword means a lookup-table distortion, of any WCS or of the primary one only."""
    match = _LOOKUP.fullmatch(keyword)
    return match is not None and not (primary and match[1])


def is_celestial(keyword: str) -> bool:
    """Return True if a keyword says where the primary WCS's first two axes are on the sky."""
    return any(pattern.fullmatch(keyword) for pattern in (CELESTIAL_TEXT, CELESTIAL_NUMBER, _DISTORTION))
