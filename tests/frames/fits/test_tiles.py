"""Tile-compressed frames: astropy's pixels for every codec; damage is an error, never a crash."""

import contextlib
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits

from stampworker.config import FrameSettings
from stampworker.errors import FrameCorrupt, FrameError, FrameRefused
from stampworker.frames import FrameStore
from stampworker.frames.fits import tiles

SECTIONS = [(slice(0, 61), slice(0, 83)), (slice(5, 36), slice(20, 51)), (slice(58, 61), slice(79, 83))]
FLOATS = [
    {"compression_type": "RICE_1", "quantize_method": 1, "dither_seed": 77},
    {"compression_type": "RICE_1", "quantize_method": 2, "dither_seed": 10_000},
    {"compression_type": "RICE_1", "quantize_method": -1},
    {"compression_type": "GZIP_1", "quantize_method": 1, "dither_seed": 3},
    {"compression_type": "GZIP_2", "quantize_method": 1, "dither_seed": 3},
    {"compression_type": "GZIP_1", "quantize_level": 0},
    {"compression_type": "GZIP_2", "quantize_level": 0},
    {"compression_type": "HCOMPRESS_1", "quantize_method": 1, "dither_seed": 9, "tile_shape": (19, 26)},
    {"compression_type": "NOCOMPRESS", "quantize_level": 0},
]
INTEGERS = ["RICE_1", "GZIP_1", "GZIP_2", "PLIO_1", "HCOMPRESS_1", "NOCOMPRESS"]


def pack(path: Path, data: np.ndarray, **settings: Any) -> Path:
    """Write a tile-compressed image in extension 1."""
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, name="SCI", **settings)]).writeto(path)
    return path


def assert_as_astropy(store: FrameStore, path: Path) -> None:
    frame = store.open(str(path))
    with fits.open(path) as hdus:
        for section in SECTIONS:
            got, want = frame[section], hdus[1].section[section]
            assert got.dtype.isnative
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, want.astype(got.dtype))


@pytest.mark.parametrize("tile", [None, (16, 16), (61, 83), (7, 83), (1, 40)])
@pytest.mark.parametrize("settings", FLOATS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_floats(
    tmp_path: Path, store: FrameStore, pixels: np.ndarray, settings: dict[str, Any], tile: Any, dtype: str
) -> None:
    """Quantised, dithered and lossless floats with NaN have astropy's bits, for any shape of tile."""
    if tile is not None and settings["compression_type"] != "HCOMPRESS_1":
        settings = {**settings, "tile_shape": tile}
    if settings["compression_type"] == "HCOMPRESS_1":
        pixels = np.nan_to_num(pixels, nan=100.0)
    assert_as_astropy(store, pack(tmp_path / "a.fits.fz", pixels.astype(dtype), **settings))


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4"])
def test_integers(tmp_path: Path, store: FrameStore, codec: str, dtype: str) -> None:
    """Integers, unsigned too, are exact; as a mask they stay integers."""
    data = np.random.default_rng(5).integers(0, 250, (61, 83)).astype(dtype)
    if codec == "PLIO_1" and dtype == "u2":
        pytest.skip("PLIO holds no negative numbers, which the unsigned convention needs")
    tile = (19, 26) if codec == "HCOMPRESS_1" else (10, 30)
    path = pack(tmp_path / "a.fits.fz", data, compression_type=codec, tile_shape=tile)
    for section in SECTIONS:
        np.testing.assert_array_equal(store.open(str(path))[section], data[section])
        mask = store.open(str(path), mask=True)[section]
        assert mask.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(mask, data[section])


def test_blank_integers(tmp_path: Path, store: FrameStore) -> None:
    """Undefined integers of a compressed image are NaN."""
    data = np.random.default_rng(5).integers(-9, 9, (61, 83)).astype("i2")
    hdu = fits.CompImageHDU(data, compression_type="RICE_1")
    hdu.header["BLANK"] = -3
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "a.fits.fz")
    got = store.open("a.fits.fz")[0:61, 0:83]
    np.testing.assert_array_equal(got, np.where(data == -3, np.nan, data))
    assert np.isnan(got).any()


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4"])
def test_scaled_integers(tmp_path: Path, store: FrameStore, codec: str, dtype: str) -> None:
    """A compressed image with BSCALE, BZERO and BLANK has astropy's bits."""
    data = np.random.default_rng(5).integers(0, 50, (61, 83)).astype(dtype)
    tile = (19, 26) if codec == "HCOMPRESS_1" else (10, 30)
    path = pack(tmp_path / "a.fits.fz", data, compression_type=codec, tile_shape=tile)
    raw = path.read_bytes()
    end = raw.rindex(b"END" + b" " * 77)
    cards = [f"{name:8}= {value:>20}".ljust(80) for name, value in (("BSCALE", 0.1), ("BZERO", -31.7), ("BLANK", 7))]
    more = "".join([*cards, "END".ljust(80)]).encode()
    assert not raw[end + 80 : end + len(more)].strip()
    path.write_bytes(raw[:end] + more + raw[end + len(more) :])
    got, want = store.open(str(path))[0:61, 0:83], fits.getdata(path, 1)
    assert got.dtype == want.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.isnan(got), data == 7)


def test_tiles_that_do_not_quantise(tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """Tiles of constant or infinite value, stored without loss in another column, are read as well."""
    pixels[20:30] = 7.25
    pixels[40:42, 5] = 1e30
    assert_as_astropy(store, pack(tmp_path / "a.fits.fz", pixels, compression_type="RICE_1", dither_seed=5))


def test_header_of_the_image(tmp_path: Path, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any]) -> None:
    """The header is the image's, without the cards of the table of tiles, and so is the WCS."""
    cards = {"GAIN": 2.0, "BUNIT": "nJy", "SPARE1": 1, "SPARE2": 1, "SPARE3": 1}
    hdu = fits.CompImageHDU(pixels, fits.Header(sky | cards), name="SCI")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "a.fits.fz")
    raw = (tmp_path / "a.fits.fz").read_bytes()
    for spare, keyword in ((b"SPARE1  =", b"EXTEND  ="), (b"SPARE2  =", b"TBCOL1  ="), (b"SPARE3  =", b"ZBLOCKED=")):
        raw = raw.replace(spare, keyword)
    (tmp_path / "a.fits.fz").write_bytes(raw)
    frame = store.open("a.fits.fz#sci")
    header = frame.header
    assert (header["BITPIX"], header["NAXIS"], header["NAXIS1"], header["NAXIS2"]) == (-32, 2, 83, 61)
    assert header["GAIN"] == 2.0
    assert frame.bunit == "nJy"
    assert not [k for k in header if k.startswith(("Z", "TFORM", "TTYPE", "TBCOL", "TFIELDS", "PCOUNT", "EXTEND"))]
    want = fits.getheader(tmp_path / "a.fits.fz", 1)
    assert {k: header[k] for k in sky} == {k: want[k] for k in sky}
    assert frame.wcs is not None
    assert frame.wcs.wcs.crpix[0] == sky["CRPIX1"]


def test_decoded_tiles_are_kept_within_bounds(tmp_path: Path, pixels: np.ndarray) -> None:
    """Decoded tiles of all frames are kept within cache_bytes; the least recently used are evicted first."""
    paths = [pack(tmp_path / f"{i}.fits.fz", pixels + i, tile_shape=(16, 16), dither_seed=1) for i in range(4)]
    limit = 2 * pixels.nbytes + 5000
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), cache_bytes=limit)) as store:
        frames = [store.open(str(path)) for path in paths]
        first = frames[0][0:61, 0:83]
        assert store.cached_bytes == pixels.nbytes
        for frame in frames * 2:
            frame[0:61, 0:83]
            assert store.cached_bytes <= limit
        np.testing.assert_array_equal(frames[0][0:61, 0:83], first)
        store.evict_unused()
        frames[3][0:5, 0:5]
        store.evict_unused()
        assert 0 < store.cached_bytes < pixels.nbytes + 5000
        store.evict_unused()
        assert store.cached_bytes == 0
        np.testing.assert_array_equal(frames[0][0:61, 0:83], first)


def test_tiles_that_threads_decode_at_once(tmp_path: Path, store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that several threads decode at the same time are kept and counted once."""
    data = np.random.default_rng(4).integers(0, 99, (200, 300)).astype("i4")
    frame = store.open(str(pack(tmp_path / "a.fits.fz", data, tile_shape=(1, 300))))
    meet = threading.Barrier(4, timeout=30)
    decode = tiles.TiledImage._decode
    monkeypatch.setattr(tiles.TiledImage, "_decode", lambda *given: (decode(*given), meet.wait())[0])
    with ThreadPoolExecutor(4) as threads:
        for part in threads.map(lambda i: frame[10 * i : 100 + 10 * i, :], range(4)):
            assert part.shape == (100, 300)
    assert store.cached_bytes == 130 * 300 * 8
    decoder = frame._pixels
    assert isinstance(decoder, tiles.TiledImage)
    assert sum(tile.nbytes for tile in decoder._decoded.values()) == 130 * 300 * 8
    np.testing.assert_array_equal(frame[0:130, :], data[:130])


def test_a_large_tile_is_not_copied_to_be_kept(tmp_path: Path, store: FrameStore) -> None:
    """A large tile is in memory twice while it is decoded, as stored and as final numbers, not three times."""
    path = pack(tmp_path / "a.fits.fz", np.zeros((2200, 2200), "i4"), tile_shape=(2200, 2200))
    frame = store.open(str(path))
    tracemalloc.start()
    try:
        assert frame[5:9, 5:9].shape == (4, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.cached_bytes == 2200 * 2200 * 8
    assert peak < 1.6 * store.cached_bytes


def test_no_cache_at_all(tmp_path: Path, pixels: np.ndarray) -> None:
    """With cache_bytes 0, frames are read and nothing is kept."""
    path = pack(tmp_path / "a.fits.fz", pixels, dither_seed=1)
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),), cache_bytes=0)) as store:
        np.testing.assert_array_equal(store.open(str(path))[0:61, 0:83], fits.getdata(path, 1))
        assert store.cached_bytes == 0


@pytest.mark.parametrize(("bitpix", "code"), [(8, "B"), (16, "I"), (32, "J"), (-32, "E"), (-64, "D")])
def test_tiles_that_were_not_compressed(tmp_path: Path, store: FrameStore, bitpix: int, code: str) -> None:
    """Tiles in the column of uncompressed ones have the image's numbers as they are."""
    data = np.random.default_rng(8).integers(0, 99, (6, 9)).astype(fits.column.FITS2NUMPY[code])
    packed = fits.Column("COMPRESSED_DATA", "1PB()", array=[np.zeros(0, "u1")] * 6)
    hdu = fits.BinTableHDU.from_columns([packed, fits.Column("UNCOMPRESSED_DATA", f"1P{code}()", array=list(data))])
    image = {"ZIMAGE": True, "ZCMPTYPE": "GZIP_1", "ZBITPIX": bitpix, "ZNAXIS": 2, "ZNAXIS1": 9, "ZNAXIS2": 6}
    hdu.header.update(image)
    hdu.writeto(tmp_path / "a.fits")
    np.testing.assert_array_equal(store.open("a.fits#1")[0:6, 2:9], data[:, 2:])


def test_a_scale_without_a_zero_is_an_error(tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """Quantised floats need both numbers; a file with one of them is not opened."""
    path = pack(tmp_path / "a.fits.fz", pixels, dither_seed=1)
    path.write_bytes(path.read_bytes().replace(b"'ZZERO   '", b"'OTHER   '"))
    with pytest.raises(FrameCorrupt, match=r"a\.fits\.fz: HDU 1 .*: ZSCALE without ZZERO"):
        store.open(str(path))


def test_only_touched_tiles_are_read(tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """A damaged tile is an error only for sections that touch it, and the message names it."""
    path = pack(tmp_path / "a.fits.fz", pixels, compression_type="GZIP_1", quantize_level=0)
    raw = bytearray(path.read_bytes())
    at = [i for i in range(len(raw) - 2) if raw[i : i + 3] == b"\x1f\x8b\x08"]
    raw[at[30] : at[30] + 3] = b"???"
    path.write_bytes(raw)
    frame = store.open(str(path))
    np.testing.assert_array_equal(frame[0:30, 0:83], pixels[0:30])
    np.testing.assert_array_equal(frame[31:61, 0:83], pixels[31:])
    with pytest.raises(FrameCorrupt, match=r"HDU 1 \(SCI\): tile 30 \(rows 30:31, columns 0:83\): "):
        frame[28:33, 4:9]


def test_truncated_anywhere(tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """A compressed file cut at any byte is corrupt when it is opened."""
    raw = pack(tmp_path / "a.fits.fz", pixels, dither_seed=1).read_bytes()
    with fits.open(tmp_path / "a.fits.fz", disable_image_compression=True) as hdus:
        header = hdus[1].header
        end = hdus.fileinfo(1)["datLoc"] + header["NAXIS1"] * header["NAXIS2"] + header["PCOUNT"]
    for length in [*range(2880, end, 997), end - 1]:
        (tmp_path / "cut.fits.fz").write_bytes(raw[:length])
        with pytest.raises(FrameCorrupt, match=r"cut\.fits\.fz: "):
            store.open("cut.fits.fz")


def edit(path: Path, **cards: Any) -> str:
    """Change cards of the compression table in place."""
    raw = path.read_bytes()
    for keyword, value in cards.items():
        at = raw.index(f"{keyword:8}=".encode())
        text = f"'{value}'" if isinstance(value, str) else f"{value:>20}"
        raw = raw[:at] + f"{keyword:8}= {text}".ljust(80).encode() + raw[at + 80 :]
    path.write_bytes(raw)
    return str(path)


@pytest.mark.parametrize(
    ("cards", "problem"),
    [
        ({"ZCMPTYPE": "LZMA"}, "ZCMPTYPE is 'LZMA', wanted RICE_1"),
        ({"ZDITHER0": -5}, "ZDITHER0 is -5, wanted 1 to 10000"),
        ({"ZQUANTIZ": "SUBTRACTIVE_DITHER_9"}, "ZQUANTIZ is 'SUBTRACTIVE_DITHER_9', wanted"),
        ({"ZBITPIX": 7}, "ZBITPIX is 7, wanted"),
        ({"ZTILE1": 0}, "ZTILE1 is 0, wanted 1"),
        ({"ZVAL1": 100_000}, "RICE blocks of 100000"),
        ({"ZVAL2": 3}, "numbers of 3 bytes"),
        ({"ZNAXIS2": 9999}, "61 tiles, wanted 9999"),
        ({"TFORM1": "1PZ(9)"}, "column of type PZ"),
        ({"PCOUNT": 500}, "tile .* wanted within 500 bytes"),
        ({"NAXIS1": 12}, "columns of .* bytes in rows of 12|truncated"),
    ],
)
def test_hostile_headers(
    tmp_path: Path, store: FrameStore, pixels: np.ndarray, cards: dict[str, Any], problem: str
) -> None:
    """Numbers that a decoder cannot survive are found before it gets them."""
    path = pack(tmp_path / "bad.fits.fz", pixels, quantize_method=1, dither_seed=4)
    with pytest.raises(FrameCorrupt, match=rf"bad.fits.fz: .*({problem})"):
        store.open(edit(path, **cards))


def test_giant_tile_is_refused(tmp_path: Path, store: FrameStore) -> None:
    """One tile of 10^10 pixels is refused before memory is allocated; a smaller wrong size fails at the tile."""
    data = np.zeros((61, 83), "i4")
    path = pack(tmp_path / "a.fits.fz", data, compression_type="RICE_1", tile_shape=(61, 83))
    with pytest.raises(FrameRefused, match="above max_decompressed_bytes"):
        store.open(edit(path, ZNAXIS1=100_000, ZNAXIS2=100_000, ZTILE1=100_000, ZTILE2=100_000))
    frame = store.open(edit(path, ZNAXIS1=9000, ZNAXIS2=9000, ZTILE1=9000, ZTILE2=9000))
    with pytest.raises(FrameCorrupt, match="bytes of RICE cannot hold 81000000 pixels"):
        frame[0:5, 0:5]


@pytest.mark.parametrize("codec", ["RICE_1", "PLIO_1", "HCOMPRESS_1", "GZIP_2"])
def test_damaged_streams_do_not_crash(tmp_path: Path, codec: str) -> None:
    """Random bytes instead of tiles give wrong pixels or a typed error, in every codec."""
    rng = np.random.default_rng(13)
    data = rng.integers(0, 100, (61, 83)).astype("i4")
    path = pack(tmp_path / "a.fits.fz", data, compression_type=codec, tile_shape=(19, 26))
    raw = path.read_bytes()
    with fits.open(path, disable_image_compression=True) as hdus:
        heap = hdus.fileinfo(1)["datLoc"] + hdus[1].header["NAXIS1"] * hdus[1].header["NAXIS2"]
        size = hdus[1].header["PCOUNT"]
    for i in range(60):
        bad = bytearray(raw)
        for at in rng.integers(heap, heap + size, 1 + i):
            bad[at] = rng.choice([0, 255, int(rng.integers(256))])
        (tmp_path / f"bad{i}.fz").write_bytes(bad)
        with FrameStore(FrameSettings(frame_roots=(str(tmp_path),))) as store, contextlib.suppress(FrameError):
            assert store.open(f"bad{i}.fz")[0:61, 0:83].shape == (61, 83)
