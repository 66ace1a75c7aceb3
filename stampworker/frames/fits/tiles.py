"""Tile-compressed images: only the tiles that a section touches are decoded.

The tile codecs are the compiled functions that astropy takes from CFITSIO
(``astropy.io.fits.hdu.compressed._compression``, the same from astropy 6.1 to 8.0). They are called here, not through
``CompImageHDU.section``, for two reasons. Speed: for a stamp over 63 row tiles ``section`` takes 2.9 ms and this module
1 ms (``python tests/benchmarks/bench_frames.py``, row "RICE rows, int16"). Safety: these functions trust the header and
the stream, so a hostile file makes them read outside their buffers; this module checks every number before they get it.
A test compares with ``section`` for every codec, so a change in astropy is noticed.

Format: FITS standard 4.0, section 10; dithering: Pence, Seaman & White 2009, PASP 121, 414.
"""

from __future__ import annotations

import math
import re
import struct
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from astropy.io.fits.hdu.compressed import _compression
from isal import isal_zlib

from stampworker.errors import FrameCorrupt, FrameRefused
from stampworker.frames.fits.gunzip import InflateError
from stampworker.frames.fits.header import Cards, Hdu, bitpix_of, parse_text
from stampworker.frames.fits.scaling import STORED, converter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stampworker.frames.cache import CacheBudget
    from stampworker.frames.fits.section import Section
    from stampworker.frames.io.sources import Source

_TFORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])")
_WIDTH = {"L": 1, "B": 1, "I": 2, "J": 4, "K": 8, "A": 1, "E": 4, "D": 8, "C": 8, "M": 16, "P": 8, "Q": 16}
_NUMBER = {"B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}
_NUMBERS = ("ZSCALE", "ZZERO", "ZBLANK")
_DITHERS = {"": 0, "NONE": 0, "NO_DITHER": 0, "SUBTRACTIVE_DITHER_1": 1, "SUBTRACTIVE_DITHER_2": 2}
_MAX_TILE_BYTES = 1 << 30  # the codecs count bytes in C ints
_LARGE = 32 << 20  # bytes; malloc keeps such blocks outside of its heap, so copying them would save nothing
# The RICE decoder reads beyond the stream: up to the next byte that is not 0, and one block more.
_PAD = b"\xff" * 4096

_DECODE_ERRORS = (ValueError, _compression.CfitsioException, InflateError)

Decode = Callable[["NDArray[np.uint8]", tuple[int, int]], "NDArray[Any]"]


class _Heap(NamedTuple):
    """One column of tiles: first byte in the file and number of bytes of each tile."""

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]


class TiledImage:
    """Pixels of a tile-compressed 2-D image.

    ``budget`` limits the decoded tiles that are kept. Raises `FrameCorrupt` if the table does not describe the image or
    points outside of its heap, and `FrameRefused` if a decoded tile has more than ``limit`` bytes.
    """

    def __init__(self, source: Source, hdu: Hdu, url: str, *, mask: bool, budget: CacheBudget, limit: int) -> None:
        cards = Cards(hdu.values, url, str(hdu))
        if hdu.plane is None:
            raise ValueError(f"{hdu} is not a 2-D image")
        self.shape = hdu.plane
        self._source, self._url, self._hdu, self._budget = source, url, str(hdu), budget
        self._bitpix = bitpix_of(cards, "ZBITPIX")
        self._native = STORED[self._bitpix].newbyteorder("=")
        self._tile = _tile_shape(cards, hdu)
        self._across = -(-self.shape[1] // self._tile[1])
        tiles = self._across * -(-self.shape[0] // self._tile[0])
        size = self._tile[0] * self._tile[1] * 8
        if size > min(limit, _MAX_TILE_BYTES):
            raise FrameRefused(url, f"{hdu}: tiles of {self._tile} pixels, above max_decompressed_bytes ({limit})")
        self._heaps, self._numbers = _read_table(source, hdu, cards, tiles)
        self._quantised = self._bitpix < 0 and "ZSCALE" in self._numbers
        if self._quantised and "ZZERO" not in self._numbers:
            raise cards.corrupt("ZSCALE without ZZERO")
        self._dither, self._seed = _dither(cards) if self._quantised else (0, 1)
        self._codec = _codec(cards, self._bitpix, "i" if self._quantised or self._bitpix > 0 else "f")
        self.dtype, self._convert = converter(cards, self._bitpix, mask=mask)
        self._lock = threading.Lock()
        self._decoded: dict[int, NDArray[Any]] = {}
        self.nbytes = 0
        self.last_used = 0

    def release(self) -> None:
        """Forget the decoded tiles."""
        with self._lock:
            self._decoded, self.nbytes = {}, 0

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return rows ``y0:y1``, columns ``x0:x1`` of the image; raise `FrameCorrupt` if a tile cannot be decoded."""
        values = np.empty((y1 - y0, x1 - x0), self.dtype)
        height, width = self._tile
        for index, tile in self._tiles(self._touched((y0, y1, x0, x1))).items():
            row, column = divmod(index, self._across)
            y, x = row * height - y0, column * width - x0  # of the tile's first pixel in the section
            part = tile[max(-y, 0) : y1 - y0 - y, max(-x, 0) : x1 - x0 - x]
            values[max(y, 0) : y + height, max(x, 0) : x + width] = part
        return values

    def byte_ranges(self, sections: Iterable[Section]) -> list[tuple[int, int]]:
        """Return offset and length of the tiles that sections inside the image need."""
        offsets, lengths = self._heaps["COMPRESSED_DATA"]
        tiles = sorted({index for section in sections for index in self._touched(section)})
        return [(int(offsets[index]), int(lengths[index])) for index in tiles]

    def bytes_needed(self, section: Section) -> int:
        """Return the bytes of the tiles that a section inside the image needs, compressed and decoded."""
        rows, columns = self._rows_columns(section)
        packed = 0
        for heap in self._heaps.values():
            lengths = heap.lengths.reshape(-1, self._across)
            packed += int(lengths[rows.start : rows.stop, columns.start : columns.stop].sum())
        return packed + len(rows) * len(columns) * self._tile[0] * self._tile[1] * self.dtype.itemsize

    def _rows_columns(self, section: Section) -> tuple[range, range]:
        """Return the rows and columns of tiles that a section touches."""
        (y0, y1, x0, x1), (height, width) = section, self._tile
        return range(y0 // height, -(-y1 // height)), range(x0 // width, -(-x1 // width))

    def _touched(self, section: Section) -> list[int]:
        """Return the indices of the tiles that a section touches."""
        rows, columns = self._rows_columns(section)
        return [row * self._across + column for row in rows for column in columns]

    def _section_of(self, index: int) -> Section:
        """Return the section that a tile holds."""
        row, column = divmod(index, self._across)
        (ny, nx), (height, width) = self.shape, self._tile
        y, x = row * height, column * width
        return y, min(y + height, ny), x, min(x + width, nx)

    def _tiles(self, indices: list[int]) -> dict[int, NDArray[Any]]:
        self.last_used = self._budget.clock()
        kept = self._decoded  # `release` replaces it
        missing = [index for index in indices if index not in kept]
        if not missing:
            return {index: kept[index] for index in indices}
        fresh = dict(zip(missing, self._decode(missing), strict=True))
        self._keep(fresh)
        return {index: fresh[index] if index in fresh else kept[index] for index in indices}

    def _keep(self, fresh: dict[int, NDArray[Any]]) -> None:
        size = sum(tile.nbytes for tile in fresh.values())
        if not self._budget.fits(self, size):
            self.release()
        with self._lock:
            # Another thread may have decoded the same tiles.
            new = {index: tile for index, tile in fresh.items() if index not in self._decoded}
            size = sum(tile.nbytes for tile in new.values())
            if not self._budget.fits(self, size):
                return
            self._decoded.update(_in_one_piece(new))
            self.nbytes += size
        self._budget.evict(self)

    def _decode(self, indices: list[int]) -> list[NDArray[Any]]:
        """Decode tiles, with one read if they are close together in the file."""
        offsets, lengths = (column[indices] for column in self._heaps["COMPRESSED_DATA"])
        start = int(offsets.min())
        length = int((offsets + lengths).max()) - start
        together = length <= 2 * int(lengths.sum()) + (1 << 16)
        block = self._bytes(start, length) if together else None
        decoded = []
        for index, offset, size in zip(indices, offsets.tolist(), lengths.tolist(), strict=True):
            if size == 0:
                tile = self._fallback(index)
            else:
                stream = self._bytes(offset, size)[:size] if block is None else block[offset - start :][:size]
                tile = self._values(index, self._run(self._codec, stream, index))
            decoded.append(self._convert(tile))
        return decoded

    def _bytes(self, offset: int, length: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._source.read(offset, length) + _PAD, np.uint8)

    def _run(self, codec: Decode, stream: NDArray[np.uint8], index: int) -> NDArray[Any]:
        top, bottom, left, right = self._section_of(index)
        try:
            return codec(stream, (bottom - top, right - left))
        except _DECODE_ERRORS as exc:
            raise self._corrupt(index, f": {exc}") from exc

    def _corrupt(self, index: int, problem: str) -> FrameCorrupt:
        top, bottom, left, right = self._section_of(index)
        tile = f"tile {index} (rows {top}:{bottom}, columns {left}:{right})"
        return FrameCorrupt(self._url, f"{self._hdu}: {tile}{problem}")

    def _values(self, index: int, stored: NDArray[Any]) -> NDArray[Any]:
        """Return a tile's numbers before BSCALE: integers, or the floats that the quantised integers stand for."""
        if not self._quantised:
            return stored if self._bitpix < 0 else stored.astype(self._native, copy=False)
        scale, zero = (float(self._numbers[name][index]) for name in ("ZSCALE", "ZZERO"))
        blank = int(self._numbers["ZBLANK"][index]) if "ZBLANK" in self._numbers else None
        if not self._dither:
            values = stored * scale
            values += zero
            if blank is not None:
                values[stored == blank] = np.nan
            return values.astype(self._native, copy=False)
        undo = _compression.unquantize_float_c if self._bitpix == -32 else _compression.unquantize_double_c
        numbers = np.ascontiguousarray(stored, stored.dtype.newbyteorder("="))
        info = np.iinfo(numbers.dtype)
        checked = (1, blank) if blank is not None and info.min <= blank <= info.max else (0, 0)
        quantisation = scale, zero, self._dither, *checked, math.nan, numbers.itemsize
        floats = undo(numbers.tobytes(), index + self._seed, numbers.size, *quantisation)
        return np.frombuffer(floats, self._native).reshape(numbers.shape)

    def _fallback(self, index: int) -> NDArray[Any]:
        """Decode a tile that was stored without loss in another column, because quantising it would lose too much."""
        for name, codec in _LOSSLESS.items():
            heap = self._heaps.get(name)
            if heap is not None and heap.lengths[index]:
                raw = np.frombuffer(self._source.read(int(heap.offsets[index]), int(heap.lengths[index])), np.uint8)
                return self._run(partial(codec, kind="i" if self._bitpix > 0 else "f"), raw, index)
        raise self._corrupt(index, " has no data")


def _in_one_piece(tiles: dict[int, NDArray[Any]]) -> dict[int, NDArray[Any]]:
    """Copy tiles into one allocation: thousands of small ones would fragment the heap when they are freed."""
    small = {index: tile for index, tile in tiles.items() if tile.nbytes < _LARGE}
    if not small:
        return tiles
    pixels = np.concatenate([tile.ravel() for tile in small.values()])
    copies, start = dict(tiles), 0
    for index, tile in small.items():
        copies[index] = pixels[start : start + tile.size].reshape(tile.shape)
        start += tile.size
    return copies


def _tile_shape(cards: Cards, hdu: Hdu) -> tuple[int, int]:
    """Return (rows, columns) of a tile; along the dropped axes its length is 1."""
    n = len(hdu.axes)
    tile = [cards.integer(f"ZTILE{i}", hdu.axes[-1] if i == 1 else 1, low=1) for i in range(n, 0, -1)]
    sides = [min(side, axis) for side, axis in zip(tile, hdu.axes, strict=True)]
    axes = list(hdu.axes)
    while len(axes) > 2:
        drop = axes.index(1)
        del axes[drop], sides[drop]
    return sides[0], sides[1]


def _read_table(source: Source, hdu: Hdu, cards: Cards, tiles: int) -> tuple[dict[str, _Heap], dict[str, NDArray[Any]]]:
    """Return the checked columns of tiles, and the numbers of each tile by their column or keyword."""
    width, rows = cards.integer("NAXIS1"), cards.integer("NAXIS2")
    if rows < tiles:
        raise cards.corrupt(f"{rows} tiles, wanted {tiles} for an image of shape {hdu.axes}")
    heap_start = cards.integer("THEAP", width * rows)
    columns = _columns(cards, width)
    if "COMPRESSED_DATA" not in columns:
        raise cards.corrupt(f"no column COMPRESSED_DATA among {', '.join(columns)}")
    table = np.frombuffer(source.read(hdu.offset, width * tiles), np.uint8).reshape(tiles, width)
    heaps: dict[str, _Heap] = {}
    numbers: dict[str, NDArray[Any]] = {}
    for name, (start, code, item) in columns.items():
        if name == "COMPRESSED_DATA" or name in _LOSSLESS:
            heap = _heap(table, start, code, item, hdu, cards, heap_start)
            if heap.lengths.any() or name == "COMPRESSED_DATA":  # empty columns would cost memory for each open frame
                heaps[name] = heap
        elif name in _NUMBERS and code in _NUMBER:
            raw = np.ascontiguousarray(table[:, start : start + _WIDTH[code]])
            numbers[name] = raw.view(_NUMBER[code])[:, 0]
    for name in _NUMBERS:  # a keyword gives the same number for every tile
        keyword = "BLANK" if name == "ZBLANK" and name not in cards.values else name
        if name not in numbers and keyword in cards.values:
            number = cards.integer(keyword, low=None) if name == "ZBLANK" else cards.real(keyword, 0.0)
            numbers[name] = np.broadcast_to(number, tiles)
    return heaps, numbers


def _columns(cards: Cards, width: int) -> dict[str, tuple[int, str, str]]:
    """Return name to (first byte, type, type of the array's numbers) of the table's columns."""
    columns: dict[str, tuple[int, str, str]] = {}
    start = 0
    for i in range(1, cards.integer("TFIELDS", high=999) + 1):
        form = cards.text(f"TFORM{i}")
        match = _TFORM.match(form)
        if match is None:
            raise cards.corrupt(f"TFORM{i} is {form!r}, wanted the type of a column")
        count, code = int(match[1] or 1), match[2]
        columns.setdefault(cards.text(f"TTYPE{i}").upper(), (start, code, form[match.end() : match.end() + 1]))
        start += -(-count // 8) if code == "X" else count * _WIDTH[code]
        if start > width:
            break
    if start != width:
        raise cards.corrupt(f"columns of {start} bytes in rows of {width} (NAXIS1)")
    return columns


def _heap(table: NDArray[np.uint8], start: int, code: str, item: str, hdu: Hdu, cards: Cards, heap_start: int) -> _Heap:
    if code not in "PQ" or item not in _NUMBER:
        raise cards.corrupt(f"the tiles are in a column of type {code}{item}, wanted P or Q of numbers")
    pointer = ">i4" if code == "P" else ">i8"
    pairs = np.ascontiguousarray(table[:, start : start + _WIDTH[code]]).view(pointer).astype(np.int64)
    itemsize = _WIDTH[item]
    counts, offsets = pairs[:, 0], pairs[:, 1]
    heap_size = hdu.size - heap_start
    bad = (counts < 0) | (offsets < 0) | (offsets > heap_size) | (counts > (heap_size - offsets) // itemsize)
    bad &= counts != 0
    if heap_size < 0 or bad.any():
        tile = int(np.argmax(bad))
        wanted = f"wanted within {max(heap_size, 0)} bytes"
        raise cards.corrupt(f"tile {tile} has {counts[tile]} numbers from byte {offsets[tile]} on, {wanted}")
    return _Heap(np.where(counts == 0, 0, offsets) + hdu.offset + heap_start, counts * itemsize)


def _dither(cards: Cards) -> tuple[int, int]:
    name = cards.text("ZQUANTIZ").strip().upper()
    if name not in _DITHERS:
        raise cards.corrupt(f"ZQUANTIZ is {name!r}, wanted one of {', '.join(filter(None, _DITHERS))}")
    return _DITHERS[name], cards.integer("ZDITHER0", 1, low=1, high=10_000)


def _settings(cards: Cards) -> dict[str, int]:
    settings: dict[str, int] = {}
    for i in range(1, 100):
        name = parse_text(cards.values.get(f"ZNAME{i}", b""))
        if name is None:
            break
        if name.strip().upper() in ("BLOCKSIZE", "BYTEPIX", "SCALE", "SMOOTH"):
            value = cards.real(f"ZVAL{i}", 0.0)
            if not 0 <= value < 1 << 31:  # the codecs take C ints
                raise cards.corrupt(f"ZVAL{i} is {value:g}, wanted 0 to {(1 << 31) - 1}")
            settings[name.strip().upper()] = int(value)
    return settings


def _codec(cards: Cards, bitpix: int, kind: str) -> Decode:
    """Return the function that decodes a tile's stream to integers (kind i) or, without loss, to floats (f)."""
    name = cards.text("ZCMPTYPE").strip().upper()
    if name in ("GZIP_1", "GZIP_2"):
        return partial(_gunzip, kind=kind, shuffled=name == "GZIP_2")
    if name == "NOCOMPRESS":
        return partial(_as_numbers, kind=kind)
    if kind == "f":
        raise cards.corrupt(f"floats in {name} without ZSCALE")
    settings = _settings(cards)
    if name in ("RICE_1", "RICE_ONE"):
        block, width = settings.get("BLOCKSIZE", 32), settings.get("BYTEPIX", 4)
        if not 1 <= block <= 256 or width not in (1, 2, 4):
            raise cards.corrupt(f"RICE blocks of {block} numbers of {width} bytes, wanted 16 or 32 of 1, 2 or 4")
        return partial(_rice, block=block, width=width)
    if name == "PLIO_1":
        return _plio
    if name == "HCOMPRESS_1":
        return partial(_hcompress, scale=settings.get("SCALE", 0), smooth=settings.get("SMOOTH", 0))
    raise cards.corrupt(f"ZCMPTYPE is {name!r}, wanted RICE_1, GZIP_1, GZIP_2, PLIO_1, HCOMPRESS_1 or NOCOMPRESS")


def _rice(stream: NDArray[np.uint8], shape: tuple[int, int], block: int, width: int) -> NDArray[Any]:
    n, start_bits = shape[0] * shape[1], {1: 3, 2: 4, 4: 5}[width]
    if stream.size < width or n > (stream.size * 8 // start_bits + 1) * block:
        raise ValueError(f"{stream.size} bytes of RICE cannot hold {n} pixels")
    pixels = _compression.decompress_rice_1_c(stream, block, width, n)
    return np.frombuffer(pixels, {1: "u1", 2: "i2", 4: "i4"}[width], n).reshape(shape)


def _plio(stream: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[Any]:
    words = np.ascontiguousarray(stream[: stream.size // 2 * 2]).view(">i2").astype("i2")
    if words.size < 4:
        raise ValueError(f"{stream.size} bytes, wanted a PLIO line list")
    # In the old form, word 3 is positive and is the length; else words 4 and 5 are, and word 2 is the header's length.
    if words[2] > 0:
        first, length = 4, int(words[2])
    elif words.size >= 7:
        first, length = int(words[1]) + 1, (int(words[4]) << 15) + int(words[3])
    else:
        raise ValueError(f"{words.size} words, wanted a PLIO line list")
    if first < 1 or length > words.size or length < 0:
        raise ValueError(f"a PLIO line list of {length} words in {words.size}")
    padded = np.concatenate([words, np.zeros(2, "i2")])
    n = shape[0] * shape[1]
    return np.frombuffer(_compression.decompress_plio_1_c(padded.tobytes(), n), "i4", n).reshape(shape)


def _hcompress(stream: NDArray[np.uint8], shape: tuple[int, int], scale: int, smooth: int) -> NDArray[Any]:
    if stream.size < 25 or bytes(stream[:2]) != b"\xdd\x99":
        raise ValueError("not an HCOMPRESS stream")
    found = struct.unpack(">ii", stream[2:10].tobytes())
    planes = stream[22:25].tolist()
    if found != shape or min(shape) < 4 or max(planes) > 64:
        raise ValueError(f"an HCOMPRESS stream of {found} pixels in {planes} bit planes, wanted {shape}")
    # The decoder reads beyond a stream that ends early: in each quadrant (the second number of planes is for two of
    # them) at most 2 bits per pixel and plane, then a sign per pixel.
    n = shape[0] * shape[1]
    padded = stream.tobytes() + bytes(n * (planes[0] + 2 * planes[1] + planes[2] + 2) // 16 + 4096)
    pixels = _compression.decompress_hcompress_1_c(padded, *shape, scale, smooth, 8)
    return np.frombuffer(pixels, "i4", n).reshape(shape)


def _gunzip(stream: NDArray[np.uint8], shape: tuple[int, int], kind: str, shuffled: bool = False) -> NDArray[Any]:
    n = shape[0] * shape[1]
    stage = isal_zlib.decompressobj(wbits=31)
    raw = np.frombuffer(stage.decompress(stream.tobytes(), 8 * n + 1), np.uint8)
    if raw.size > 8 * n or not stage.eof:
        found = "over" if raw.size > 8 * n else "only"
        raise ValueError(f"a gzip stream of {found} {raw.size} bytes for {shape} pixels")
    if shuffled:
        raw = raw[: raw.size // n * n].reshape(raw.size // n, n).T.ravel()
    return _as_numbers(raw, shape, kind)


def _as_numbers(raw: NDArray[np.uint8], shape: tuple[int, int], kind: str) -> NDArray[Any]:
    """Return bytes as big-endian numbers; their number per pixel gives the type, which may differ from BITPIX."""
    n = shape[0] * shape[1]
    types = {n: "u1", 2 * n: ">i2", 4 * n: f">{kind}4", 8 * n: f">{kind}8"}
    if raw.size not in types:
        raise ValueError(f"{raw.size} bytes for {shape} pixels")
    return raw.view(types[raw.size]).reshape(shape)


_LOSSLESS: dict[str, Callable[..., NDArray[Any]]] = {"GZIP_COMPRESSED_DATA": _gunzip, "UNCOMPRESSED_DATA": _as_numbers}
