"""Hostile files: any header, any cut, any flipped byte gives pixels or a typed error, quickly and in little memory.

``STAMPWORKER_TEST_LONG=1`` tries two thousand examples of each instead of sixty.
"""

import contextlib
import gzip
import io
import os
import resource
import tempfile
import time

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stampworker.config import FrameSettings
from stampworker.errors import FrameError
from stampworker.frames import FrameStore, on_grid

LONG = os.environ.get("STAMPWORKER_TEST_LONG") == "1"
EXAMPLES = settings(
    max_examples=2000 if LONG else 60,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
MEMORY = 200 << 20


def _image() -> np.ndarray:
    return np.random.default_rng(9).normal(100, 9, (40, 30)).astype("f4")


def _bytes(hdus: fits.HDUList) -> bytes:
    buffer = io.BytesIO()
    hdus.writeto(buffer)
    return buffer.getvalue()


def _seeds() -> dict[str, bytes]:
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 5.0, "CDELT1": -1e-4, "CDELT2": 1e-4}
    header = fits.Header(sky | {"CRPIX1": 15.0, "CRPIX2": 20.0, "BSCALE": 2.0, "BZERO": 1.0})
    image = _image()
    whole = image.astype("i4")
    seeds = {"plain": _bytes(fits.HDUList([fits.PrimaryHDU(image, header)]))}
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(5))])
    seeds["mef"] = _bytes(fits.HDUList([fits.PrimaryHDU(), table, fits.ImageHDU(image, header), fits.ImageHDU(image)]))
    codecs = {"RICE_1": (8, 30), "GZIP_2": (8, 8), "PLIO_1": (8, 8), "HCOMPRESS_1": (8, 10)}
    for codec, tile in codecs.items():
        packed = fits.CompImageHDU(whole, compression_type=codec, tile_shape=tile)
        seeds[codec] = _bytes(fits.HDUList([fits.PrimaryHDU(), packed]))
    floats = fits.CompImageHDU(image, compression_type="RICE_1", quantize_method=1, dither_seed=3)
    seeds["float"] = _bytes(fits.HDUList([fits.PrimaryHDU(), floats]))
    return seeds | {"gzip": gzip.compress(seeds["plain"])}


SEEDS = _seeds()
KEYWORDS = ["SIMPLE", "XTENSION", "BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "PCOUNT", "GCOUNT", "BSCALE", "BZERO", "BLANK"]
KEYWORDS += [
    "CRVAL1",
    "CTYPE1",
    "CRPIX1",
    "CDELT1",
    "CD1_1",
    "PV1_1",
    "A_ORDER",
    "A_0_2",
    "EXTNAME",
    "EXTVER",
    "GROUPS",
]
KEYWORDS += ["TFIELDS", "TFORM1", "TFORM2", "TTYPE1", "THEAP", "ZIMAGE", "ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZNAXIS2"]
KEYWORDS += [
    "ZTILE1",
    "ZTILE2",
    "ZCMPTYPE",
    "ZVAL1",
    "ZVAL2",
    "ZNAME1",
    "ZQUANTIZ",
    "ZDITHER0",
    "ZBLANK",
    "ZSCALE",
    "END",
]
NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "8",
    "16",
    "64",
    "-32",
    "-64",
    "255",
    "999",
    "2147483647",
    "2147483648",
    "-2147483648",
]
NUMBERS += ["9223372036854775807", "1E400", "1D5", "nan", "1e-300", "40", "41", "100000"]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(["T", "F", "''", "'IMAGE'", "'BINTABLE'", "'RICE_1'", "'GZIP_1'", "'PLIO_1'", "'HCOMPRESS_1'"]),
    st.sampled_from(["'1PB(9)'", "'1QB'", "'1QJ'", "'9D'", "'RA---TAB'", "'RA---TPV'", "'SUBTRACTIVE_DITHER_2'", "'x"]),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.text(max_size=20),
)


def try_everything(data: bytes) -> None:
    """Open, slice, ask for header and WCS, resample; anything but a `FrameError` is a failure."""
    limits = FrameSettings(frame_roots=("/",), cache_bytes=16 << 20, max_decompressed_bytes=32 << 20)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".fits") as file, FrameStore(limits) as store:
        file.write(data)
        file.flush()
        for mask, fragment in ((False, ""), (True, "#1"), (False, "#2")):
            with contextlib.suppress(FrameError):
                frame = store.open(file.name + fragment, mask=mask)
                ny, nx = frame.shape
                assert len(frame.header) > 0
                assert (frame.wcs is None) == (frame.wcs_problem is not None)
                assert all(len(card) == 80 for card in frame.wcs_cards())
                y, x = max(ny - 9, 0), max(nx - 12, 0)
                for section in (frame[0:9, 0:12], frame[y:ny, x:nx]):
                    assert section.shape == (min(ny, 9), min(nx, 12))
                    assert section.dtype == frame.dtype
                on_grid(frame, GOOD, "mask" if mask else "image")[0:9, 0:12]
    assert time.monotonic() - started < 5


@pytest.fixture(autouse=True)
def little_memory(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Fail where a test took more than 200 MB."""
    global GOOD
    path = tmp_path_factory.mktemp("good") / "good.fits"
    path.write_bytes(SEEDS["plain"])
    with FrameStore(FrameSettings(frame_roots=(str(path.parent),))) as store:
        GOOD = store.open(str(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.sampled_from(KEYWORDS), VALUES, st.integers(0, 3)), min_size=1, max_size=4),
)
def test_any_header(seed: str, changes: list[tuple[str, str, int]]) -> None:
    """Cards replaced or added, structural ones, of the WCS and of the compression, lead to no crash and no hang."""
    data = bytearray(gzip.decompress(SEEDS[seed]) if seed == "gzip" else SEEDS[seed])
    for keyword, value, skip in changes:
        card = f"{keyword:8}= {value}".encode("latin-1", "replace")[:80].ljust(80)
        places = [i for i in range(0, len(data), 80) if bytes(data[i : i + 9]) == card[:9]]
        at = places[skip % len(places)] if places else data.find(b"END" + b" " * 77)
        if at >= 0 and places:
            data[at : at + 80] = card
        elif at >= 0 and bytes(data[at + 80 : at + 160]).strip() == b"":
            data[at : at + 160] = card + b"END".ljust(80)
    try_everything(gzip.compress(bytes(data)) if seed == "gzip" else bytes(data))


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(st.sampled_from(sorted(SEEDS)), st.integers(0, 10**6))
def test_any_cut(seed: str, length: int) -> None:
    """A file cut anywhere is pixels or a typed error."""
    try_everything(SEEDS[seed][: length % len(SEEDS[seed])])


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=30),
    st.booleans(),
)
def test_any_bytes(seed: str, flips: list[tuple[int, int]], in_data: bool) -> None:
    """Bytes overwritten anywhere, or in the data alone, lead to no crash, also inside the decoders."""
    data = bytearray(SEEDS[seed])
    start = min(5760, len(data) // 2) if in_data else 0
    for at, value in flips:
        data[start + at % (len(data) - start)] = value
    try_everything(bytes(data))


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(st.binary(max_size=9000))
def test_noise(data: bytes) -> None:
    """Noise is never FITS."""
    try_everything(b"SIMPLE  =                    T".ljust(80) + data)
