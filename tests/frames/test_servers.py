"""The same pixels from disk, nginx (with and without ranges) and an S3 gateway; what they move; their faults."""

from __future__ import annotations

import gzip
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from real_servers import Gateway, Nginx

from stampworker.config import FrameSettings
from stampworker.errors import FrameError, FrameMissing, FrameUnavailable
from stampworker.frames import FrameStore

pytestmark = pytest.mark.server

ALL = (slice(None), slice(None))
STAMP = (slice(1500, 1563), slice(700, 763))
KINDS = ("ranges", "norange", "tls", "s3")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of frames: ``bucket/wide.fits`` and others of each storage."""
    folder = tmp_path_factory.mktemp("tree") / "bucket"
    folder.mkdir()
    rng = np.random.default_rng(17)
    wide = rng.normal(100, 5, (3080, 3072)).astype("f4")
    fits.PrimaryHDU(wide).writeto(folder / "wide.fits")
    small = wide[:300, :200]
    sky = fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -1e-4, "CDELT2": 1e-4, "CRVAL1": 150.0})
    fits.PrimaryHDU(small, sky).writeto(folder / "plain.fits")
    (folder / "plain.fits.gz").write_bytes(gzip.compress((folder / "plain.fits").read_bytes()))
    fits.PrimaryHDU(small.astype("u2"), sky).writeto(folder / "night 1+2.fits")
    several = [fits.PrimaryHDU(), fits.ImageHDU(small, sky, name="SCI"), fits.ImageHDU(small.astype("i4"), name="MASK")]
    fits.HDUList(several).writeto(folder / "several.fits")
    for name, tile in (("rows", (1, 3072)), ("squares", (128, 128))):
        hdu = fits.CompImageHDU(wide, sky, compression_type="RICE_1", tile_shape=tile, quantize_method=1)
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(folder / f"{name}.fits.fz")
    return folder


@pytest.fixture(scope="module")
def nginx(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """Start nginx on the folder."""
    with Nginx(tree, tmp_path_factory.mktemp("nginx")) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Start an S3 gateway on the folder above."""
    with Gateway(tree.parent, tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrameStore]:
    """Open a store on one of `KINDS`, whose root holds the folder's frames."""
    settings: dict[str, Any] = {}
    if request.param == "s3":
        server = request.getfixturevalue("gateway")
        settings, root = {"s3_endpoint": server.url}, "s3://bucket/"
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
    else:
        server = request.getfixturevalue("nginx")
        root = {"ranges": server.url, "norange": server.url + "norange/", "tls": server.tls_url}[request.param]
        monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    with FrameStore(FrameSettings(frame_roots=(root,), **settings)) as store:
        yield store


@pytest.fixture
def disk(tree: Path) -> Iterator[FrameStore]:
    """Open a store on the folder itself."""
    with FrameStore(FrameSettings(frame_roots=(str(tree),))) as store:
        yield store


@pytest.mark.parametrize("remote", KINDS, indirect=True)
@pytest.mark.parametrize(
    "name",
    ["wide.fits", "plain.fits", "plain.fits.gz", "night 1+2.fits", "several.fits#sci", "several.fits#MASK,1",
     "rows.fits.fz", "squares.fits.fz"],
)  # fmt: skip
def test_same_pixels_as_from_disk(remote: FrameStore, disk: FrameStore, name: str) -> None:
    """Pixels, header and WCS are those of the file, stamp by stamp and whole, wherever it lies."""
    for mask in (False, True):
        there, here = remote.open(name, mask=mask), disk.open(name, mask=mask)
        for section in ((slice(200, 263), slice(90, 153)), ALL):
            np.testing.assert_array_equal(there[section], here[section])
        assert there.dtype == here.dtype
        assert there.header.tostring() == here.header.tostring()
        assert there.wcs_cards() == here.wcs_cards()


@pytest.mark.parametrize("remote", KINDS, indirect=True)
def test_odd_frames_as_from_disk(remote: FrameStore, disk: FrameStore, odd: Path, tree: Path) -> None:
    """Damaged and unusual frames give the pixels, or the error and the message, that they give from disk."""
    shutil.copytree(odd, tree, dirs_exist_ok=True)
    failed = 0
    for path in sorted(odd.glob("*.f*")):
        here, there = pixels_or_problem(disk, path.name), pixels_or_problem(remote, path.name)
        np.testing.assert_array_equal(there, here)
        failed += isinstance(here, tuple)
    assert failed > 3


def pixels_or_problem(store: FrameStore, name: str) -> np.ndarray | tuple[str, str]:
    """Return the pixels, or the error's class and what it says."""
    try:
        return store.open(name)[ALL]
    except FrameError as exc:
        return type(exc).__name__, exc.problem


@pytest.mark.parametrize("remote", KINDS, indirect=True)
def test_missing_as_from_disk(remote: FrameStore) -> None:
    """What is not there is missing."""
    with pytest.raises(FrameMissing, match=r"none\.fits: "):
        remote.open("none.fits")


@pytest.mark.parametrize("remote", ["ranges", "tls"], indirect=True)
@pytest.mark.parametrize(
    ("name", "share", "requests"), [("wide.fits", 0.025, 2), ("rows.fits.fz", 0.05, 3), ("squares.fits.fz", 0.05, 5)]
)
def test_what_a_stamp_moves(
    remote: FrameStore, nginx: Nginx, tree: Path, name: str, share: float, requests: int
) -> None:
    """A stamp of 63 × 63 pixels moves its rows or tiles, the headers and the tiles' table, counted by the server."""
    before = len(nginx.moved())
    frame = remote.open(name)
    assert frame[STAMP].shape == (63, 63)
    moved = nginx.moved()[before:]
    assert sum(size for _, size in moved) < share * (tree / name).stat().st_size
    assert {status for status, _ in moved} == {206}
    assert len(moved) <= requests


def test_twenty_stamps_need_one_open(nginx: Nginx) -> None:
    """Twenty stamps of a frame: one beginning, and each row at most once."""
    before = len(nginx.moved())
    rng = np.random.default_rng(20)
    with FrameStore(FrameSettings(frame_roots=(nginx.url,))) as store:
        for y, x in rng.integers(0, 3000, (20, 2)):
            assert store.open("wide.fits")[y : y + 63, x : x + 63].shape == (63, 63)
    moved = nginx.moved()[before:]
    assert len(moved) <= 21
    assert sum(size for _, size in moved) < 20 * 0.025 * 3080 * 3072 * 4


def test_without_ranges_the_file_moves_once(nginx: Nginx, tree: Path) -> None:
    """A server without ranges sends a frame once, for all its stamps."""
    before = len(nginx.moved())
    with FrameStore(FrameSettings(frame_roots=(nginx.url + "norange/",))) as store:
        for y in range(0, 2000, 100):
            assert store.open("wide.fits")[y : y + 63, :63].shape == (63, 63)
    [(status, size)] = nginx.moved()[before:]
    assert status == 200
    assert size - (tree / "wide.fits").stat().st_size < 1000


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_server_that_goes_away(tree: Path, tmp_path: Path, fault: str) -> None:
    """A server stopped or frozen for a while: unavailable in time; when it is back, the pixels, by the same frame."""
    settings: dict[str, Any] = {"connect_s": 0.3, "read_s": 0.3, "total_s": 0.5, "failure_age_s": 0.2}
    with Nginx(tree, tmp_path) as server, FrameStore(FrameSettings(frame_roots=(server.url,), **settings)) as store:
        frame = store.open("wide.fits")
        wanted = frame[100:163, 5:68]
        back: Callable[[], None]
        if fault == "stopped":
            server.stop()
            back, problem = server.start, "no connection to .*: Connection refused"
        else:
            server.send(signal.SIGSTOP)
            back, problem = (lambda: server.send(signal.SIGCONT)), r"no answer for read_s \(0\.3 s\)"
        start = time.monotonic()
        for i in range(20):
            with pytest.raises(FrameUnavailable, match=problem):
                frame[500 : 510 + i, 5:9]
            with pytest.raises(FrameUnavailable, match=problem):
                store.open("plain.fits")
        assert time.monotonic() - start < 6
        np.testing.assert_array_equal(frame[100:163, 5:68], wanted)  # is here already
        back()
        time.sleep(0.3)
        with fits.open(tree / "wide.fits") as hdus:
            np.testing.assert_array_equal(frame[500:510, 5:9], hdus[0].data[500:510, 5:9])
        assert store.open("plain.fits").shape == (300, 200)


def test_certificate_that_is_not_trusted(nginx: Nginx, caplog: pytest.LogCaptureFixture) -> None:
    """A certificate that nobody signed makes a frame unavailable, and the log says so."""
    untrusted = pytest.raises(FrameUnavailable, match=r"no connection to localhost:.*certificate verify failed")
    with FrameStore(FrameSettings(frame_roots=(nginx.tls_url,))) as store, untrusted:
        store.open("plain.fits")
    assert "certificate not trusted" in caplog.text
