"""Pixels of plain and gzipped FITS: dtypes, scaling, undefined values, masks, HDUs."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from helpers import Write

from stampworker.errors import FrameCorrupt, FrameRefused
from stampworker.frames import FrameStore

ANY = (slice(3, 40), slice(17, 70))


@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i2", "i4", "i8"])
def test_dtype_of_planes(write: Write, store: FrameStore, pixels: np.ndarray, dtype: str) -> None:
    """Floats keep their width; integers become float32 up to 24 bits, float64 beyond."""
    data = np.nan_to_num(pixels).astype(dtype)
    frame = store.open(str(write("a.fits", data)))
    assert frame.dtype == {"f4": "f4", "f8": "f8", "u1": "f4", "i2": "f4", "i4": "f8", "i8": "f8"}[dtype]
    assert frame.shape == (61, 83)
    got = frame[ANY]
    assert got.dtype == frame.dtype
    assert got.flags.c_contiguous
    assert got.flags.writeable
    np.testing.assert_array_equal(got, data[ANY])


@pytest.mark.parametrize(("dtype", "bzero"), [("i2", 2.0**15), ("i4", 2.0**31)])
def test_unsigned_with_blank(write: Write, store: FrameStore, dtype: str, bzero: float) -> None:
    """BLANK works with the unsigned convention, where astropy ignores it."""
    stored = np.random.default_rng(8).integers(-500, 500, (61, 83)).astype(dtype)
    path = write("a.fits", stored, BLANK=-7)
    with fits.open(path, mode="update", do_not_scale_image_data=True) as hdus:
        hdus[0].header["BZERO"] = bzero
    want = stored + bzero
    want[stored == -7] = np.nan
    assert (stored == -7).any()
    np.testing.assert_array_equal(store.open(str(path))[0:61, 0:83], want)


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "i8"])
@pytest.mark.parametrize("codec", ["", "GZIP_1", "GZIP_2", "NOCOMPRESS"])
def test_wide_integers_as_astropy(tmp_path: Path, store: FrameStore, dtype: str, codec: str) -> None:
    """Unsigned and 64-bit integers, small and large, are the float next to astropy's integer."""
    info = np.iinfo(dtype)
    rng = np.random.default_rng(64)
    data = rng.integers(info.min, info.max, (61, 83), dtype=dtype, endpoint=True)
    data[:30] = rng.integers(1, 2000, (30, 83))
    path = tmp_path / "a.fits"
    image = fits.CompImageHDU(data, compression_type=codec) if codec else fits.ImageHDU(data)
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    frame = store.open(str(path))
    want = fits.getdata(path, 1)[ANY]
    assert np.unique(want).size > 500
    np.testing.assert_array_equal(frame[ANY], want.astype(frame.dtype))


def test_undefined_unsigned_integers(write: Write, store: FrameStore) -> None:
    """Among unsigned integers of 64 bits too, the stored number BLANK is NaN, and no other number is."""
    data = np.random.default_rng(64).integers(1, 2000, (61, 83)).astype("u8")
    path = write("a.fits", data, BLANK=7 - 2**63)
    got = store.open(str(path))[0:61, 0:83]
    assert (data == 7).any()
    np.testing.assert_array_equal(got, np.where(data == 7, np.nan, data))


@pytest.mark.parametrize(
    ("dtype", "scale", "zero"), [("i2", 0.1, -31.7), ("i4", 3e-5, 1e3), ("u1", 2.5, 0), ("f4", 2, 1)]
)
def test_scaled_as_astropy(write: Write, store: FrameStore, dtype: str, scale: float, zero: float) -> None:
    """Scaled numbers have the same bits as astropy's, in a section and in the whole image."""
    path = write("a.fits", np.random.default_rng(8).integers(0, 200, (61, 83)).astype(dtype))
    with fits.open(path, mode="update", do_not_scale_image_data=True) as hdus:
        hdus[0].header["BSCALE"], hdus[0].header["BZERO"] = scale, zero
    want = fits.getdata(path)
    got = store.open(str(path))
    assert got.dtype == want.dtype.newbyteorder("=")
    np.testing.assert_array_equal(got[ANY], want[ANY])


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_masks_stay_integers(write: Write, store: FrameStore, dtype: str) -> None:
    """A mask's flags are the file's, signed and unsigned, up to the highest bit."""
    info = np.iinfo(dtype)
    mask = np.random.default_rng(8).integers(info.min, info.max, (61, 83), dtype=dtype, endpoint=True)
    frame = store.open(str(write("m.fits", mask)), mask=True)
    assert frame.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(frame[ANY], mask[ANY])


def test_float_and_scaled_masks(write: Write, store: FrameStore) -> None:
    """In a float mask, NaN and any number except 0 is bad; in an integer mask, an undefined pixel is bad."""
    floats = np.zeros((61, 83), "f4")
    floats[1, 2], floats[3, 4], floats[5, 6] = np.nan, -0.5, np.inf
    got = store.open(str(write("f.fits", floats)), mask=True)
    assert got.dtype.kind == "u"
    np.testing.assert_array_equal(got[0:61, 0:83], ~(floats == 0))
    blank = np.zeros((61, 83), "i2")
    blank[9, 9], blank[8, 8] = -1, 4
    flags = store.open(str(write("b.fits", blank, BLANK=-1)), mask=True)[0:61, 0:83]
    np.testing.assert_array_equal(flags != 0, blank != 0)


def test_slices(write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """Slices are cut at the edges like an array's; an empty one is empty; steps are an error."""
    frame = store.open(str(write("a.fits", pixels)))
    np.testing.assert_array_equal(frame[55:99, 80:99], pixels[55:99, 80:99])
    assert frame[10:10, 5:9].shape == (0, 4)
    assert frame[70:80, 5:9].shape == (0, 4)
    with pytest.raises(ValueError, match="steps of 1, not 2, 1"):
        frame[0:10:2, 0:5]


def test_axes_of_length_one(write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """Axes of length 1 are dropped; a cube is corrupt, and the message has its shape."""
    for i, shape in enumerate([(1, 61, 83), (1, 1, 61, 83), (61, 1, 83)]):
        frame = store.open(str(write(f"{i}.fits", pixels.reshape(shape))))
        np.testing.assert_array_equal(frame[ANY], pixels[ANY])
    with pytest.raises(FrameCorrupt, match=r"cube.fits: HDU 0 \(PRIMARY\) has shape \(2, 61, 83\), wanted a 2-D image"):
        store.open(str(write("cube.fits", np.stack([pixels, pixels]))))


@pytest.fixture
def mef(tmp_path: Path, pixels: np.ndarray) -> Path:
    """Write an empty primary HDU, a table, SCI 1, ERR and SCI 2."""
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(5))], name="CAT")
    images = [
        fits.ImageHDU(pixels * factor, name=name, ver=ver)
        for name, ver, factor in [("SCI", 1, 1), ("Err", 1, 2), ("SCI", 2, 3)]
    ]
    path = tmp_path / "mef.fits"
    fits.HDUList([fits.PrimaryHDU(), table, *images]).writeto(path)
    return path


@pytest.mark.parametrize(
    ("fragment", "factor"),
    [("", 1), ("#sci", 1), ("#ERR", 2), ("#err", 2), ("#SCI,2", 3), ("#sci,1", 1), ("#2", 1), ("#4", 3), ("#%53CI", 1)],
)
def test_fragments(mef: Path, store: FrameStore, pixels: np.ndarray, fragment: str, factor: int) -> None:
    """A fragment is a name in any case, name and version, or a number; without one the first image is taken."""
    frame = store.open(mef.as_uri() + fragment)
    np.testing.assert_array_equal(frame[ANY], pixels[ANY] * factor)
    assert frame.url.startswith(mef.as_uri())
    assert ("#" in frame.url) == bool(fragment)


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("#1", r"HDU 1 \(CAT\) is a table, wanted a 2-D image"),
        ("#0", r"HDU 0 \(PRIMARY\) is empty, wanted a 2-D image"),
        ("#SCI,3", "no HDU 'SCI,3' among 5: .*HDU 2 .SCI.: an image"),
        ("#9", "no HDU '9' among 5"),
        ("#nope", "no HDU 'nope' among 5"),
    ],
)
def test_wrong_fragments(mef: Path, store: FrameStore, fragment: str, problem: str) -> None:
    """A fragment that names no image is corrupt; the message lists the HDUs."""
    with pytest.raises(FrameCorrupt, match=problem):
        store.open(f"{mef}{fragment}")


def test_gzip(write: Write, tmp_path: Path, store: FrameStore, pixels: np.ndarray) -> None:
    """Gzip is recognised by its first bytes, not by its name; several members and zero padding are read."""
    raw = write("a.fits", pixels).read_bytes()
    half = len(raw) // 2
    packed = {"a.fits.gz": gzip.compress(raw), "plainly.fits": gzip.compress(raw)}
    packed["two.gz"] = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
    packed["padded.gz"] = gzip.compress(raw) + bytes(500)
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(store.open(name)[ANY], pixels[ANY])


def test_header_is_astropys(write: Write, store: FrameStore, pixels: np.ndarray) -> None:
    """The header is astropy's; unprintable bytes do no harm."""
    path = write("a.fits", pixels, BUNIT="adu", GAIN=1.7, OBSERVER="Abcde")
    path.write_bytes(path.read_bytes().replace(b"Abcde", b"Ab\xe9\x00e"))
    frame = store.open(str(path))
    assert frame.bunit == "adu"
    assert frame.header["GAIN"] == 1.7
    assert frame.header["OBSERVER"] == "Ab??e"
    assert frame.header["NAXIS2"] == 61


def damage(path: Path, old: bytes, new: bytes) -> str:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new.ljust(len(old)), 1))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"BITPIX  =                  -32", b"BITPIX  =                   17", "BITPIX is 17, wanted 8, 16"),
        (b"NAXIS1  =                   83", b"NAXIS1  =                  -83", "NAXIS1 is -83, wanted 0 to any"),
        (b"NAXIS1  =                   83", b"NAXIS1  =                 83.5", "NAXIS1 is '83.5', wanted an integer"),
        (b"NAXIS2  =                   61", b"NAXIS3  =                   61", "NAXIS2 is missing, wanted an integer"),
        (b"NAXIS   =                    2", b"NAXIS   =                 2000", "NAXIS is 2000, wanted 0 to 999"),
        (b"NAXIS2  =                   61", b"NAXIS2  =           9999999999", "truncated|max_axis"),
        (b"BSCALE  =                  2.0", b"BSCALE  =                  abc", "BSCALE is 'abc', wanted a number"),
    ],
)
def test_damaged_keywords(
    write: Write, store: FrameStore, pixels: np.ndarray, old: bytes, new: bytes, problem: str
) -> None:
    """The message about a wrong structural keyword names it, the value found and the value wanted."""
    path = write("bad.fits", pixels, BSCALE=2.0)
    with pytest.raises((FrameCorrupt, FrameRefused), match=rf"bad.fits: HDU 0.*({problem})"):
        store.open(damage(path, old, new))


@pytest.mark.parametrize("magic", [b"BZh9", b"\xfd7zXZ\0", b"PK\x03\x04"])
def test_other_compressions_are_named(tmp_path: Path, store: FrameStore, magic: bytes) -> None:
    """A file compressed by something other than gzip is corrupt, and the message names the format."""
    (tmp_path / "a.fits").write_bytes(magic + bytes(5000))
    with pytest.raises(FrameCorrupt, match="-compressed, wanted FITS, gzip or tile compression"):
        store.open("a.fits")


@pytest.mark.parametrize("packed", [False, True])
def test_truncated_anywhere(write: Write, tmp_path: Path, store: FrameStore, pixels: np.ndarray, packed: bool) -> None:
    """A file cut at any byte is corrupt: opening it fails, whatever is sliced."""
    raw = write("a.fits", pixels).read_bytes()
    end = 2880 + pixels.nbytes if not packed else None
    data = gzip.compress(raw) if packed else raw
    path = tmp_path / "cut.fits"
    for length in sorted({*range(0, (end or len(data)) - 1, 731), (end or len(data)) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(FrameCorrupt, match=r"cut\.fits: "):
            store.open("cut.fits")
    path.write_bytes(data[: end or len(data)])
    np.testing.assert_array_equal(store.open("cut.fits")[ANY], pixels[ANY])
