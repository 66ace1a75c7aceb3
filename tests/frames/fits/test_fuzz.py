"""Hostile files: any header, any cut, any flipped byte gives pixels or a typed error, quickly and in little memory.

``STAMPWORKER_TEST_LONG=1`` tries two thousand examples of each instead of sixty. Every example may take 5 seconds of
the processor and 200 MB; the system itself holds it to both, so that one which asks for more fails there and then.
"""

import contextlib
import faulthandler
import gzip
import io
import os
import re
import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stampworker.config import FrameSettings
from stampworker.errors import FrameError
from stampworker.frames import Frame, FrameStore, on_grid
from stampworker.frames.fits import plain

LONG = os.environ.get("STAMPWORKER_TEST_LONG") == "1"
EXAMPLES = settings(
    max_examples=2000 if LONG else 60,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
    phases=[Phase.generate],  # the examples are small as they are, and one that hangs would be tried for minutes
)
MEMORY = 200 << 20
SECONDS = 5.0
GZIPPED = st.sampled_from([False, False, True])


@contextlib.contextmanager
def bounds(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fail if the block takes more processor time or additional memory than allowed."""

    def stop(number: int, at: object) -> None:
        raise AssertionError(f"no end after {seconds:g} s")

    status = Path("/proc/self/status").read_text()
    kilobytes = re.search(r"VmData:\s+(\d+)", status)
    assert kilobytes
    taken = 1024 * int(kilobytes[1])
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + memory, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    # Compiled code heeds no signal: where that does not end, the process does, and says where it was.
    faulthandler.dump_traceback_later(20 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGPROF, handler)


def _image() -> np.ndarray:
    return np.random.default_rng(9).normal(100, 9, (40, 30)).astype("f4")


def _bytes(hdus: fits.HDUList) -> bytes:
    buffer = io.BytesIO()
    hdus.writeto(buffer)
    return buffer.getvalue()


SKY = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 5.0, "CDELT1": -1e-4, "CDELT2": 1e-4}
SKY |= {"CRPIX1": 15.0, "CRPIX2": 20.0}
SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-5, "B_0_2": 1e-5}
TPV = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.01, "PV2_1": 0.99, "PV1_4": 3.0, "EQUINOX": 2000.0}
TNX: dict[str, Any] = {"CTYPE1": "RA---TNX", "CTYPE2": "DEC--TNX"}
for axis, name, cor in ((1, "ra", "lng"), (2, "dec", "lat")):
    text = f'wtype=tnx axtype={name} {cor}cor = "3. 2. 2. 1. -0.1 0.1 -0.1 0.1 1e-4 2e-3 3e-3 4e-3 "'
    TNX |= {f"WAT{axis}_001": text[:68], f"WAT{axis}_002": text[68:]}


def _seeds() -> dict[str, bytes]:
    header = fits.Header(SKY | {"BSCALE": 2.0, "BZERO": 1.0})
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
    lossless = fits.CompImageHDU(image, fits.Header(SKY), compression_type="GZIP_2", quantize_level=0)
    seeds["lossless"] = _bytes(fits.HDUList([fits.PrimaryHDU(), lossless]))
    first = fits.PrimaryHDU()
    first.header.update({"GAIN": 2.0, "BUNIT": "adu", **SKY})
    seeds["inherit"] = _bytes(fits.HDUList([first, fits.ImageHDU(image, fits.Header({"INHERIT": True}))]))
    return seeds


SEEDS = _seeds()
DISTORTIONS: dict[str, dict[str, Any]] = {"tan": {}, "sip": SIP, "tpv": TPV, "tnx": TNX}
SKIES = {
    name: _bytes(fits.HDUList([fits.PrimaryHDU(_image(), fits.Header(SKY | more))]))
    for name, more in DISTORTIONS.items()
}
KEYWORDS = [
    *("SIMPLE", "XTENSION", "BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "PCOUNT", "GCOUNT", "BSCALE", "BZERO", "BLANK"),
    *("CRVAL1", "CTYPE1", "CRPIX1", "CDELT1", "CD1_1", "EXTNAME", "EXTVER", "GROUPS", "INHERIT", "END"),
    *("TFIELDS", "TFORM1", "TFORM2", "TTYPE1", "THEAP", "ZIMAGE", "ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZNAXIS2"),
    *("ZTILE1", "ZTILE2", "ZCMPTYPE", "ZVAL1", "ZVAL2", "ZNAME1", "ZQUANTIZ", "ZDITHER0", "ZBLANK", "ZSCALE"),
]
NUMBERS = [
    *("0", "1", "-1", "2", "3", "8", "16", "64", "-32", "-64", "255", "999", "2147483647", "2147483648", "-2147483648"),
    *("9223372036854775807", "1E400", "1D5", "nan", "1e-300", "40", "41", "100000"),
]
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(["T", "F", "''", "'IMAGE'", "'BINTABLE'", "'RICE_1'", "'GZIP_1'", "'PLIO_1'", "'HCOMPRESS_1'"]),
    st.sampled_from(["'1PB(9)'", "'1QB'", "'1QJ'", "'9D'", "'RA---TAB'", "'RA---TPV'", "'SUBTRACTIVE_DITHER_2'", "'x"]),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.text(max_size=20),
)


CODECS = ("RICE_1", "RICE_ONE", "GZIP_1", "GZIP_2", "PLIO_1", "HCOMPRESS_1", "NOCOMPRESS")
FORMS = (
    "1PB(9)",
    "1QB",
    "1PI",
    "1PJ",
    "1PE",
    "1PK",
    "1QD",
    "PB",
    "0PB",
    "2PB",
    "1PB(2147483647)",
    "1D",
    "1E",
    "1J",
    "9B",
)
COLUMNS = ("COMPRESSED_DATA", "GZIP_COMPRESSED_DATA", "UNCOMPRESSED_DATA", "ZSCALE", "ZZERO", "ZBLANK")
SIZES = st.one_of(st.integers(0, 70), st.integers(0, 10**5), st.sampled_from(NUMBERS)).map(str)


def _texts(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f"'{text}'" for text in texts])


TILING: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys(("ZNAXIS1", "ZNAXIS2", "ZTILE1", "ZTILE2", "THEAP", "PCOUNT", "NAXIS1", "NAXIS2"), SIZES),
    **dict.fromkeys(("ZVAL1", "ZVAL2"), st.sampled_from([*NUMBERS, "4", "32", "256", "257", "0.5"])),
    **dict.fromkeys(("ZNAME1", "ZNAME2"), _texts("BLOCKSIZE", "BYTEPIX", "SCALE", "SMOOTH")),
    **dict.fromkeys(("TFORM1", "TFORM2", "TFORM3"), _texts(*FORMS)),
    **dict.fromkeys(("TTYPE1", "TTYPE2", "TTYPE3"), _texts(*COLUMNS)),
    **dict.fromkeys(("ZSCALE", "ZZERO", "ZBLANK", "ZDITHER0", "BLANK"), st.sampled_from(NUMBERS)),
    "ZNAXIS": st.sampled_from(["0", "1", "2", "3", "4"]),
    "ZBITPIX": st.sampled_from(["8", "16", "32", "64", "-32", "-64"]),
    "ZCMPTYPE": _texts(*CODECS),
    "ZQUANTIZ": _texts("NO_DITHER", "SUBTRACTIVE_DITHER_1", "SUBTRACTIVE_DITHER_2"),
    "TFIELDS": st.sampled_from(["0", "1", "2", "3", "999"]),
}
_REALS = st.one_of(st.floats().map(repr), st.sampled_from(NUMBERS))
HEAVENS: dict[str, st.SearchStrategy[str]] = {
    **dict.fromkeys([f"{name}{i}" for name in ("CRVAL", "CRPIX", "CDELT", "CROTA") for i in "12"], _REALS),
    **dict.fromkeys([f"{name}{ij}" for name in ("CD", "PC") for ij in ("1_1", "1_2", "2_1", "2_2")], _REALS),
    **dict.fromkeys(["PV1_0", "PV1_1", "PV2_2", "PV2_39", "A_2_0", "A_9_9", "B_0_2", "AP_1_0", "LONPOLE"], _REALS),
    **dict.fromkeys(["LATPOLE", "EQUINOX", "MJD-OBS"], _REALS),
    **dict.fromkeys(["A_ORDER", "B_ORDER", "AP_ORDER", "BP_ORDER"], SIZES),
    **dict.fromkeys(
        ["WAT1_001", "WAT2_001"],
        st.tuples(SIZES, SIZES, SIZES).map(
            lambda n: f"'wtype=tnx lngcor = \"{n[0]} {n[1]} {n[2]} 1. 0. 1. 0. 1. 1e-4\"'"
        ),
    ),
    "CTYPE1": _texts("RA---TAN", "RA---TAN-SIP", "RA---TPV", "RA---TNX", "RA---ZPN", "GLON-AIT", "RA---TAB", "LINEAR"),
    "CTYPE2": _texts(
        "DEC--TAN", "DEC--TAN-SIP", "DEC--TPV", "DEC--TNX", "DEC--ZPN", "GLAT-AIT", "DEC--COE", "RA---TAN"
    ),
    "CUNIT1": _texts("deg", "rad", "arcsec", "Hz", "", "10**400 deg"),
    "RADESYS": _texts("ICRS", "FK4", "FK5", "GAPPT", "nonsense"),
}


def _changes(values: dict[str, st.SearchStrategy[str]]) -> st.SearchStrategy[list[tuple[str, str, int]]]:
    one = st.sampled_from(sorted(values)).flatmap(lambda key: st.tuples(st.just(key), values[key], st.integers(0, 3)))
    return st.lists(one, min_size=1, max_size=6)


def with_cards(raw: bytes, changes: list[tuple[str, str, int]]) -> bytes:
    """Replace cards; add those whose keyword is not there, if the block has room."""
    data = bytearray(raw)
    for keyword, value, skip in changes:
        card = f"{keyword:8}= {value}".encode("latin-1", "replace")[:80].ljust(80)
        places = [i for i in range(0, len(data), 80) if bytes(data[i : i + 9]) == card[:9]]
        at = places[skip % len(places)] if places else data.rfind(b"END" + b" " * 77)
        if at >= 0 and places:
            data[at : at + 80] = card
        elif at >= 0 and bytes(data[at + 80 : at + 160]).strip() == b"":
            data[at : at + 160] = card + b"END".ljust(80)
    return bytes(data)


def try_everything(good: Frame, data: bytes, gzipped: bool = False) -> None:
    """Open, slice, ask for header and WCS, resample; anything but a `FrameError` is a failure."""
    limits = FrameSettings(frame_roots=("/",), cache_bytes=16 << 20, max_decompressed_bytes=32 << 20)
    with tempfile.NamedTemporaryFile(suffix=".fits") as file, FrameStore(limits) as store, bounds(SECONDS):
        file.write(gzip.compress(data, 1) if gzipped else data)
        file.flush()
        for mask, fragment in ((False, ""), (True, "#1"), (False, "#2")):
            with contextlib.suppress(FrameError):
                try_frame(good, store.open(file.name + fragment, mask=mask), mask)


def try_frame(good: Frame, frame: Frame, mask: bool) -> None:
    """Use everything that a frame offers; bring it onto the grid of the good one."""
    ny, nx = frame.shape
    assert len(frame.header) > 0
    assert (frame.wcs is None) == (frame.wcs_problem is not None)
    assert not re.search("memory|alloc", frame.wcs_problem or "", re.IGNORECASE)  # the 200 MB, which it survives
    assert all(len(card) == 80 for card in frame.wcs_cards())
    y, x = max(ny - 9, 0), max(nx - 12, 0)
    for section in (frame[0:9, 0:12], frame[y:ny, x:nx]):
        assert section.shape == (min(ny, 9), min(nx, 12))
        assert section.dtype == frame.dtype
    on_grid(frame, good, "mask" if mask else "image")[0:9, 0:12]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Frame:
    """Return the science frame whose grid all others are brought onto."""
    path = tmp_path_factory.mktemp("good") / "good.fits"
    path.write_bytes(SEEDS["plain"])
    with FrameStore(FrameSettings(frame_roots=(str(path.parent),))) as store:
        frame = store.open(str(path))
    assert frame.wcs is not None
    return frame


@pytest.mark.parametrize("take", [lambda: bytearray(MEMORY), lambda: np.empty(MEMORY, "u1"), lambda: b"x" * MEMORY])
def test_memory_is_bounded(good: Frame, monkeypatch: pytest.MonkeyPatch, take: Any) -> None:
    """A reader that allocates 200 MB, used or not, fails."""
    monkeypatch.setattr(plain.PlainImage, "read", lambda *_: take())
    with pytest.raises(MemoryError):
        try_everything(good, SEEDS["plain"])


def test_time_is_bounded(good: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that does not end fails."""
    monkeypatch.setattr(plain.PlainImage, "read", lambda *_: any(False for _ in iter(int, 1)))
    monkeypatch.setitem(globals(), "SECONDS", 0.1)
    with pytest.raises(AssertionError, match=r"no end after 0\.1 s"):
        try_everything(good, SEEDS["plain"])


@pytest.mark.slow
@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.sampled_from(KEYWORDS), VALUES, st.integers(0, 3)), min_size=1, max_size=4),
    GZIPPED,
)
def test_any_header(good: Frame, seed: str, changes: list[tuple[str, str, int]], gzipped: bool) -> None:
    """Replaced or added cards of structure, WCS and compression cause no crash and no hang."""
    try_everything(good, with_cards(SEEDS[seed], changes), gzipped)


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(
    st.sampled_from(sorted(set(SEEDS) - {"plain", "mef", "inherit"})),
    _changes(TILING),
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(-2, 10**5) | st.sampled_from([2**31 - 1, -(2**31)])), max_size=3
    ),
    GZIPPED,
)
def test_any_tiling(
    good: Frame, seed: str, changes: list[tuple[str, str, int]], words: list[tuple[int, int]], gzipped: bool
) -> None:
    """Any values in a compressed image's table, descriptors of tiles and codec settings cause no crash and no hang."""
    data = bytearray(with_cards(SEEDS[seed], changes))
    table = 5760 + max(data[5760:].find(b"END" + b" " * 77), 0)
    start = -(-table // 2880) * 2880
    for at, number in words:
        data[start + 4 * at : start + 4 * at + 4] = number.to_bytes(4, "big", signed=True)
    try_everything(good, bytes(data), gzipped)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::erfa.ErfaWarning")  # of astropy, about hostile numbers
@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(st.sampled_from(sorted(SKIES)), _changes(HEAVENS))
def test_any_wcs(good: Frame, seed: str, changes: list[tuple[str, str, int]]) -> None:
    """Any WCS, distortions of any order included, causes no crash and no hang."""
    try_everything(good, with_cards(SKIES[seed], changes))


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(st.sampled_from(sorted(SEEDS)), st.integers(0, 10**6), GZIPPED)
def test_any_cut(good: Frame, seed: str, length: int, gzipped: bool) -> None:
    """A file cut anywhere, also before or after gzip, gives pixels or a typed error."""
    whole = gzip.compress(SEEDS[seed], 1) if gzipped and length % 2 else SEEDS[seed]
    try_everything(good, whole[: length % len(whole)], gzipped and not length % 2)


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=30),
    st.booleans(),
    GZIPPED,
)
def test_any_bytes(good: Frame, seed: str, flips: list[tuple[int, int]], in_data: bool, gzipped: bool) -> None:
    """Bytes overwritten anywhere, or only in the data, cause no crash, also inside the decoders."""
    data = bytearray(gzip.compress(SEEDS[seed], 1) if gzipped else SEEDS[seed])
    start = min(5760, len(data) // 2) if in_data else 0
    for at, value in flips:
        data[start + at % (len(data) - start)] = value
    try_everything(good, bytes(data))


@pytest.mark.timeout(3600 if LONG else 60)
@EXAMPLES
@given(st.binary(max_size=9000), GZIPPED)
def test_noise(good: Frame, data: bytes, gzipped: bool) -> None:
    """Noise is never FITS."""
    try_everything(good, b"SIMPLE  =                    T".ljust(80) + data, gzipped)
