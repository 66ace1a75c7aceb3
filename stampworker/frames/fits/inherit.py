"""What an extension with ``INHERIT = T`` takes from the primary header: FITS standard 4.0, 4.4.2.6 and appendix K.

DECam, DES, HST and IRAF's multi-extension files write once, in a primary header without data, what holds for all their
extensions: GAIN, FILTER, MJD-OBS, BUNIT. astropy and CFITSIO leave it to their callers to look there.

Three rules beyond the standard's, that the extension's own keywords come first and mandatory ones are not inherited:

- Only from a primary HDU without axes, as the standard recommends: else its keywords describe its own image.
- Nothing that says how numbers are stored (BSCALE, BZERO, BLANK, columns, compression): pixels are read by the
  extension's own header alone.
- The WCS as a whole or not at all: a primary header has the telescope's pointing, its CRVAL and EQUINOX, or the WCS of
  a mosaic, and an extension's CD matrix with that CRPIX is a WCS that nobody wrote. An extension with any celestial
  card of its own has the WCS that astropy reads.
"""

from __future__ import annotations

import dataclasses
import re

from stampworker.frames.fits.header import Cards, Hdu, split_cards, values_of
from stampworker.frames.wcs import is_celestial_card

_OWN = re.compile(
    r"|COMMENT|HISTORY|CONTINUE|SIMPLE|XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|GROUPS|EXTEND|BLOCKED|NEXTEND|INHERIT"
    r"|EXTNAME|EXTVER|EXTLEVEL|CHECKSUM|DATASUM|BSCALE|BZERO|BLANK|DATAMAX|DATAMIN|TFIELDS|THEAP"
    r"|T(TYPE|FORM|UNIT|DIM|NULL|SCAL|ZERO|DISP|BCOL)\d+|Z(IMAGE|CMPTYPE|BITPIX|NAXIS\d*|TILE\d+|NAME\d+|VAL\d+)"
    r"|Z(QUANTIZ|DITHER0|BLANK|SCALE|ZERO|MASKCMP|SIMPLE|EXTEND|TENSION|PCOUNT|GCOUNT|HECKSUM|DATASUM)"
)


def with_inherited(hdu: Hdu, primary: Hdu) -> Hdu:
    """Return the HDU, and where it inherits, with the primary header's cards after its own.

    Parameters
    ----------
    hdu : Hdu
        An image.
    primary : Hdu
        The first HDU of the same file.

    Returns
    -------
    hdu : Hdu
        For keywords; the pixels are described by the one that was given.
    """
    if hdu.index == 0 or primary.axes or not Cards(hdu.values, "", "").flag("INHERIT"):
        return hdu
    own = {_keyword(card) for card in split_cards(hdu.cards)}
    own_wcs = any(map(_of_wcs, own))
    taken: list[bytes] = []
    inherits = False
    for card in split_cards(primary.cards):
        keyword = _keyword(card)
        if keyword != "CONTINUE":  # of a long string, it goes where the string goes
            inherits = not (keyword in own or _OWN.fullmatch(keyword) or (own_wcs and _of_wcs(keyword)))
        if inherits:
            taken.append(card)
    cards = hdu.cards + b"".join(taken)
    return dataclasses.replace(hdu, cards=cards, values=values_of(cards))


def _keyword(card: bytes) -> str:
    """Return a card's keyword; of the HIERARCH convention, all before the equals sign."""
    keyword = card.partition(b"=")[0] if card.startswith(b"HIERARCH ") else card[:8]
    return keyword.rstrip().decode("latin-1")


def _of_wcs(keyword: str) -> bool:
    """Say whether a keyword belongs to a celestial WCS, the primary one or, by its last letter, another."""
    return keyword.startswith("WCSAXES") or is_celestial_card(keyword) or is_celestial_card(keyword[:-1])
