"""What an extension with ``INHERIT = T`` takes from the primary header: FITS standard 4.0, 4.4.2.6 and appendix K.

Multi-extension files of DECam, DES, HST and IRAF have keywords that describe all extensions (GAIN, FILTER, MJD-OBS,
BUNIT) only in a primary header without data. astropy and CFITSIO leave the inheritance to their callers.

By the standard, the extension's own keywords come first, and mandatory keywords are not inherited. Three more rules:

- Inherit only from a primary HDU without axes, as the standard recommends: other keywords may describe its own image.
- Inherit nothing about the storage of numbers (BSCALE, BZERO, BLANK, columns, compression): the extension's own header
  alone says how its pixels are read.
- Inherit a WCS as a whole or not at all. A primary header has the telescope's pointing (CRVAL, EQUINOX) or the WCS of a
  mosaic; mixed with an extension's CD matrix, it would give a WCS that nobody wrote. An extension with any WCS card of
  its own has the WCS that astropy reads.
"""

from __future__ import annotations

import dataclasses

from stampworker.cutouts.keywords import NOT_INHERITED, wcs_version
from stampworker.frames.fits.header import Cards, Hdu, split_cards, values_of


def with_inherited(hdu: Hdu, primary: Hdu) -> Hdu:
    """Return the HDU; if it inherits, with the primary header's cards after its own.

    The result is for keywords only: the given HDU describes the pixels.
    """
    if hdu.index == 0 or primary.axes or not Cards(hdu.values, "", "").flag("INHERIT"):
        return hdu
    own = {_keyword(card) for card in split_cards(hdu.cards)}
    has_wcs = any(wcs_version(keyword) is not None for keyword in own)
    taken: list[bytes] = []
    inherits = False
    for card in split_cards(primary.cards):
        keyword = _keyword(card)
        if keyword != "CONTINUE":  # it follows the card whose long string it continues
            mixes_wcs = has_wcs and wcs_version(keyword) is not None
            inherits = not (keyword in own or NOT_INHERITED.fullmatch(keyword) or mixes_wcs)
        if inherits:
            taken.append(card)
    cards = hdu.cards + b"".join(taken)
    return dataclasses.replace(hdu, cards=cards, values=values_of(cards))


def _keyword(card: bytes) -> str:
    """Return a card's keyword; in the HIERARCH convention, all before the equals sign."""
    keyword = card.partition(b"=")[0] if card.startswith(b"HIERARCH ") else card[:8]
    return keyword.rstrip().decode("latin-1")
