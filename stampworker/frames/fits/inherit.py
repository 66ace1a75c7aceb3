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

from stampworker.cutouts.keywords import NOT_INHERITED, wcs_version
from stampworker.frames.fits.header import Cards, Hdu, split_cards, values_of


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
    has_wcs = any(wcs_version(keyword) is not None for keyword in own)
    taken: list[bytes] = []
    inherits = False
    for card in split_cards(primary.cards):
        keyword = _keyword(card)
        if keyword != "CONTINUE":  # of a long string, it goes where the string goes
            mixes_wcs = has_wcs and wcs_version(keyword) is not None
            inherits = not (keyword in own or NOT_INHERITED.fullmatch(keyword) or mixes_wcs)
        if inherits:
            taken.append(card)
    cards = hdu.cards + b"".join(taken)
    return dataclasses.replace(hdu, cards=cards, values=values_of(cards))


def _keyword(card: bytes) -> str:
    """Return a card's keyword; of the HIERARCH convention, all before the equals sign."""
    keyword = card.partition(b"=")[0] if card.startswith(b"HIERARCH ") else card[:8]
    return keyword.rstrip().decode("latin-1")
