"""FITS structure from raw header blocks: HDUs, their axes, and the position of their data.

Layout: FITS standard 4.0 (Pence et al. 2010, A&A 524, A42; IAU FITS Working Group 2018). The structural keywords are
read here and not through astropy for three reasons: the size of a header is limited, a damaged card elsewhere in the
header does no harm, and it is ten times faster. A header of 500 cards takes 0.13 ms here and 1.2 ms in astropy::

    SETUP="from astropy.io import fits; from stampworker.frames.fits.header import values_of
    raw = fits.Header([(f'KEY{i}', i) for i in range(500)]).tostring().encode()"
    python -m timeit -s "$SETUP" "values_of(raw)['KEY7']"
    python -m timeit -s "$SETUP" "fits.Header.fromstring(raw)['KEY7']"
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from stampworker.errors import FrameCorrupt, FrameRefused, FrameUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK = 2880
CARD = 80
MAX_HDUS = 10_000
"""An HDU takes at least 2880 bytes, so a hostile file could hold millions."""
MAX_HEADERS = 32
"""All headers of a file together may be as long as so many headers: 20 MB of gzip can hold 300 MB of headers."""

_FIRST_READ = 8 * BLOCK
_INTEGER = re.compile(rb"\s*([+-]?\d{1,19})\s*(?:/|$)")
_REAL = re.compile(rb"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[EeDd][+-]?\d+)?)\s*(?:/|$)")
_TEXT = re.compile(rb"\s*'((?:[^']|'')*)'")
_PRINTABLE = frozenset(string.printable.encode())
_FOREIGN = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x1f\x9d": "compress",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class Bytes(Protocol):
    """What headers are read from: a `stampworker.frames.io.sources.Source`, or the first bytes of a file."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""


@dataclass(frozen=True, eq=False)
class Hdu:
    """One header and data unit."""

    index: int  # 0 is the primary HDU
    name: str  # EXTNAME in capitals, PRIMARY for an unnamed primary HDU
    version: int  # EXTVER
    kind: Literal["image", "tiled", "table", "other"]  # tiled: a tile-compressed image
    axes: tuple[int, ...]  # lengths, slowest first as an array has them; of a tiled image, the image's
    cards: bytes  # without END; empty after `without_cards`
    values: dict[str, bytes]  # see `values_of`
    start: int  # first byte of the header
    offset: int  # first byte of the data
    size: int  # bytes of the data, without padding

    def __str__(self) -> str:
        return f"HDU {self.index} ({self.name})" if self.name else f"HDU {self.index}"

    @property
    def end(self) -> int:
        """First byte of the next HDU."""
        return self.offset + -(-self.size // BLOCK) * BLOCK

    def without_cards(self) -> Hdu:
        """Return the HDU without its cards, which may be many megabytes; `reload` reads them again."""
        return replace(self, cards=b"", values={})

    @property
    def plane(self) -> tuple[int, int] | None:
        """(ny, nx) of the image, axes of length 1 dropped if there are more than two; None if it is not 2-D."""
        axes = list(self.axes)
        while len(axes) > 2 and 1 in axes:
            axes.remove(1)
        return (axes[0], axes[1]) if len(axes) == 2 and self.kind in ("image", "tiled") else None

    @property
    def empty(self) -> bool:
        """True if it holds no data."""
        return not self.axes or 0 in self.axes


def describe(value: bytes) -> str:
    """Return a card's value as text for a message."""
    text = value.split(b"/")[0].strip()[:40].decode("latin-1")
    return repr(text) if text.isprintable() else ascii(text)


class Cards:
    """Typed values of one header; errors name the file and the HDU, and say what was found and what was wanted."""

    def __init__(self, values: dict[str, bytes], url: str, hdu: str) -> None:
        self.values, self.url, self.hdu = values, url, hdu

    def corrupt(self, problem: str) -> FrameCorrupt:
        """Return an error about this HDU."""
        return FrameCorrupt(self.url, f"{self.hdu}: {problem}")

    def integer(self, keyword: str, default: int | None = None, low: int | None = 0, high: int | None = None) -> int:
        """Return an integer from ``low`` to ``high``; raise `FrameCorrupt` for anything else."""
        value = self.values.get(keyword)
        if value is None:
            if default is None:
                raise self.corrupt(f"{keyword} is missing, wanted an integer")
            return default
        match = _INTEGER.match(value)
        real = int(match[1]) if match else parse_real(value)
        number = 0 if real is None else int(real)
        if number != real:
            raise self.corrupt(f"{keyword} is {describe(value)}, wanted an integer")
        if not -(1 << 63) <= number < 1 << 63:
            raise self.corrupt(f"{keyword} is {describe(value)}, wanted an integer of 64 bits")
        if (low is not None and number < low) or (high is not None and number > high):
            raise self.corrupt(f"{keyword} is {number}, wanted {low} to {'any' if high is None else high}")
        return number

    def real(self, keyword: str, default: float) -> float:
        """Return a real number; raise `FrameCorrupt` for anything else."""
        value = self.values.get(keyword)
        if value is None:
            return default
        number = parse_real(value)
        if number is None:
            raise self.corrupt(f"{keyword} is {describe(value)}, wanted a number")
        return number

    def text(self, keyword: str, default: str = "") -> str:
        """Return a string without trailing blanks; ``default`` if it is missing or not a string."""
        value = self.values.get(keyword)
        text = None if value is None else parse_text(value)
        return default if text is None else text

    def flag(self, keyword: str) -> bool:
        """Return True if the keyword is T."""
        return self.values.get(keyword, b"").split(b"/")[0].strip() == b"T"


def parse_real(value: bytes) -> float | None:
    """Return a card's value as a number; None if it is not a finite number."""
    match = _REAL.match(value)
    number = float(match[1].upper().replace(b"D", b"E")) if match else math.inf
    return number if math.isfinite(number) else None


def parse_text(value: bytes) -> str | None:
    """Return a card's value as a string without trailing blanks; None if it is not a string."""
    match = _TEXT.match(value)
    return match[1].replace(b"''", b"'").rstrip().decode("latin-1") if match else None


def split_cards(cards: bytes) -> Iterator[bytes]:
    """Yield the 80-byte cards of a header."""
    return (cards[i : i + CARD] for i in range(0, len(cards), CARD))


def values_of(cards: bytes) -> dict[str, bytes]:
    """Return a dict from each keyword to the text after ``=`` on its first card, the comment included."""
    text = cards.decode("latin-1")
    starts = range(len(cards) - CARD, -1, -CARD)  # backwards, so that the first card of a keyword is kept
    return {text[i : i + 8].rstrip(): cards[i + 9 : i + CARD] for i in starts if text[i + 8] == "="}


def iter_hdus(source: Bytes, url: str, max_header_bytes: int, known: Sequence[Hdu] = ()) -> Iterator[Hdu]:
    """Yield the HDUs of a FITS file after the known ones, reading headers only.

    ``max_header_bytes`` limits the header of one HDU; all together may have `MAX_HEADERS` times as many bytes. Raises
    `FrameCorrupt` if the file is not FITS, or a header is damaged or cut off; `FrameRefused` if headers are above the
    limit or there are more than `MAX_HDUS`.
    """
    last = known[-1] if known else None
    headers = sum(hdu.offset - hdu.start for hdu in known)
    while last is None or last.end < source.size:
        start, index = (0, 0) if last is None else (last.end, last.index + 1)
        if index >= MAX_HDUS:
            raise FrameRefused(url, f"more than {MAX_HDUS} HDUs")
        cards, offset = _read_cards(source, url, index, start, max_header_bytes)
        headers += offset - start
        if headers > MAX_HEADERS * max_header_bytes:
            raise FrameRefused(
                url, f"{headers} bytes of headers up to HDU {index}, above {MAX_HEADERS} times max_header_bytes"
            )
        last = _parse(cards, url, index, start, offset)
        yield last


def reload(source: Bytes, url: str, hdu: Hdu, max_header_bytes: int) -> Hdu:
    """Return an HDU with its cards read again; raise `FrameUnavailable` if the file has another HDU there now."""
    cards, offset = _read_cards(source, url, hdu.index, hdu.start, max_header_bytes)
    again = _parse(cards, url, hdu.index, hdu.start, offset)
    if (again.kind, again.axes, again.offset, again.size) != (hdu.kind, hdu.axes, hdu.offset, hdu.size):
        raise FrameUnavailable(url, f"{hdu} has another header than when the file was opened")
    return again


def _read_cards(source: Bytes, url: str, index: int, offset: int, limit: int) -> tuple[bytes, int]:
    """Return the cards before END, and the first byte of the data."""
    raw = source.read(offset, min(_FIRST_READ, source.size - offset))
    _check_magic(raw, url, index)
    searched = 0
    while True:
        at = raw.find(b"END     ", searched)
        while at >= 0 and at % CARD:
            at = raw.find(b"END     ", at + 1)
        if at >= 0:
            return raw[:at], offset + -(-(at + CARD) // BLOCK) * BLOCK
        searched = len(raw) - len(raw) % CARD
        more = min(len(raw), source.size - offset - len(raw))
        if more == 0:
            raise FrameCorrupt(url, f"HDU {index}: the file ends after {len(raw)} bytes of header, wanted an END card")
        if len(raw) >= limit:
            if _PRINTABLE.issuperset(raw[-CARD:]):
                raise FrameRefused(url, f"HDU {index}: header above {limit} bytes (max_header_bytes)")
            raise FrameCorrupt(url, f"HDU {index}: no END card in the first {len(raw)} bytes")
        raw += source.read(offset + len(raw), more)


def _check_magic(raw: bytes, url: str, index: int) -> None:
    wanted = b"XTENSION=" if index else b"SIMPLE  ="
    if raw.startswith(wanted):
        return
    if not raw:
        raise FrameCorrupt(url, "the file is empty, wanted FITS")
    for magic, name in _FOREIGN.items():
        if not index and raw.startswith(magic):
            raise FrameCorrupt(url, f"the file is {name}-compressed, wanted FITS, gzip or tile compression")
    raise FrameCorrupt(url, f"HDU {index} begins with {raw[:20].decode('latin-1')!a}, wanted {wanted.decode()!r}")


def _parse(raw: bytes, url: str, index: int, start: int, offset: int) -> Hdu:
    values = values_of(raw)
    cards = Cards(values, url, f"HDU {index}")
    bitpix = bitpix_of(cards, "BITPIX")
    axes = axes_of(cards, "NAXIS")
    groups = cards.flag("GROUPS") and len(axes) > 0 and axes[-1] == 0
    pixels = math.prod(axes[:-1] if groups else axes) if axes else 0
    pcount, gcount = cards.integer("PCOUNT", 0), cards.integer("GCOUNT", 1)
    size = abs(bitpix) // 8 * gcount * (pcount + pixels) if axes else 0
    xtension = cards.text("XTENSION", "IMAGE")
    kind: Literal["image", "tiled", "table", "other"] = "other"
    if xtension in ("IMAGE", "IUEIMAGE") and not groups:
        kind = "image"
    elif xtension in ("BINTABLE", "A3DTABLE") and cards.flag("ZIMAGE"):
        kind, axes = "tiled", axes_of(cards, "ZNAXIS")
    elif xtension in ("BINTABLE", "A3DTABLE", "TABLE"):
        kind = "table"
    name = cards.text("EXTNAME").strip().upper() or ("" if index else "PRIMARY")
    version = cards.integer("EXTVER", 1, low=None)
    return Hdu(index, name, version, kind, axes, raw, values, start, offset, size)


def bitpix_of(cards: Cards, keyword: str) -> int:
    """Return BITPIX or ZBITPIX, checked."""
    bitpix = cards.integer(keyword, low=None)
    if bitpix not in (8, 16, 32, 64, -32, -64):
        raise cards.corrupt(f"{keyword} is {bitpix}, wanted 8, 16, 32, 64, -32 or -64")
    return bitpix


def axes_of(cards: Cards, keyword: str) -> tuple[int, ...]:
    """Return the lengths of the axes that NAXIS or ZNAXIS gives, slowest first."""
    return tuple(cards.integer(f"{keyword}{i}") for i in range(cards.integer(keyword, high=999), 0, -1))


def find(hdus: Iterator[Hdu], fragment: str, url: str) -> Hdu:
    """Return the HDU that the fragment of a URL names, or without one the first that holds a 2-D image.

    A fragment is EXTNAME in any case, ``NAME,ver`` or a number. Raises `FrameCorrupt` if no HDU has this name or
    number, or it is not a 2-D image; the ``plane`` of the result is not None.
    """
    others: list[str] = []
    for hdu in hdus:
        if _named(hdu, fragment):
            if hdu.kind in ("image", "tiled") and not hdu.empty and (fragment or len(hdu.axes) > 1):
                if hdu.plane is None:
                    raise FrameCorrupt(url, f"{hdu} has shape {hdu.axes}, wanted a 2-D image")
                return hdu
            if fragment:
                raise FrameCorrupt(url, f"{hdu} is {_what(hdu)}, wanted a 2-D image")
        others.append(f"{hdu}: {_what(hdu)}")
    wanted = f"no HDU {fragment!r}" if fragment else "no HDU holds a 2-D image"
    raise FrameCorrupt(url, f"{wanted} among {len(others)}: {'; '.join(others[:10])}")


def _named(hdu: Hdu, fragment: str) -> bool:
    if not fragment:
        return True
    if fragment.isascii() and fragment.isdigit():
        return str(hdu.index) == (fragment.lstrip("0") or "0")
    name, comma, version = fragment.rpartition(",")
    if comma and re.fullmatch(r"\s*-?\d{1,9}\s*", version):
        return hdu.name == name.strip().upper() and hdu.version == int(version)
    return hdu.name == fragment.strip().upper()


def _what(hdu: Hdu) -> str:
    if hdu.kind in ("image", "tiled"):
        return f"an image of shape {hdu.axes}" if not hdu.empty else "empty"
    return "a table" if hdu.kind == "table" else "neither image nor table"
