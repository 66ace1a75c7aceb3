"""The same pixels from disk, nginx (with and without ranges) and three vendors' buckets; what moves; faults."""

from __future__ import annotations

import contextlib
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
from servers.frame_servers import Azurite, Bucket, FakeGoogle, Gateway, Nginx, Proxy, Relay

from stampworker.config import FrameSettings
from stampworker.errors import FrameError, FrameMissing, FrameUnavailable
from stampworker.frames import FrameStore

pytestmark = pytest.mark.server

ALL = (slice(None), slice(None))
STAMP = (slice(1500, 1563), slice(700, 763))
BUCKETS = {"s3": Gateway, "gs": FakeGoogle, "abfs": Azurite}
KINDS = ("ranges", "norange", "tls", *BUCKETS)


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
def buckets(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Bucket]]:
    """Return a function that starts the server of a scheme's buckets, once, with the folder as its bucket."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Bucket] = {}

        def start(scheme: str) -> Bucket:
            if scheme not in running:
                running[scheme] = stack.enter_context(BUCKETS[scheme](tree.parent, tmp_path_factory.mktemp(scheme)))
            running[scheme].fill(tree)
            return running[scheme]

        yield start


@pytest.fixture
def remote(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrameStore]:
    """Open a store on one of `KINDS`, whose root holds the folder's frames."""
    settings: dict[str, Any] = {}
    if request.param in BUCKETS:
        server = request.getfixturevalue("buckets")(request.param)
        settings, root = server.settings, server.root
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
    """Pixels, header and WCS are those of the file, stamp by stamp and whole, from every kind of server."""
    for mask in (False, True):
        there, here = remote.open(name, mask=mask), disk.open(name, mask=mask)
        for section in ((slice(200, 263), slice(90, 153)), ALL):
            np.testing.assert_array_equal(there[section], here[section])
        assert there.dtype == here.dtype
        assert there.header.tostring() == here.header.tostring()
        assert there.wcs_cards() == here.wcs_cards()


@pytest.fixture(scope="module")
def names(shared_data: Path, tree: Path) -> list[str]:
    """Copy the damaged and unusual frames into the folder."""
    shutil.copytree(shared_data / "odd", tree, dirs_exist_ok=True)
    return sorted(path.name for path in (shared_data / "odd").glob("*.f*"))


@pytest.mark.parametrize("remote", KINDS, indirect=True)
def test_odd_frames_as_from_disk(names: list[str], remote: FrameStore, disk: FrameStore) -> None:
    """Damaged and unusual frames give the pixels, or the error and the message, that they give from disk."""
    failed = 0
    for name in names:
        here, there = pixels_or_problem(disk, name), pixels_or_problem(remote, name)
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


@pytest.mark.parametrize("remote", BUCKETS, indirect=True)
@pytest.mark.parametrize(("name", "share"), [("wide.fits", 0.025), ("rows.fits.fz", 0.05), ("squares.fits.fz", 0.05)])
def test_what_a_stamp_moves_from_a_bucket(
    remote: FrameStore, buckets: Callable[[str], Bucket], tree: Path, name: str, share: float, request: Any
) -> None:
    """A stamp of 63 × 63 pixels of an object moves as little, counted on the wire between."""
    scheme = request.node.callspec.params["remote"]
    server = buckets(scheme)
    with Relay(server.port) as relay:
        endpoint = server.settings[f"{scheme}_endpoint"].replace(str(server.port), str(relay.port))
        settings = FrameSettings(frame_roots=(server.root,), **server.settings | {f"{scheme}_endpoint": endpoint})
        with FrameStore(settings) as store:
            assert store.open(name)[STAMP].shape == (63, 63)
        assert 63 * 63 < relay.moved < share * (tree / name).stat().st_size


def test_twenty_stamps_need_one_open(nginx: Nginx) -> None:
    """Twenty stamps of a frame: one first, and each row at most once."""
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
    settings: dict[str, Any] = {"connect_s": 0.3, "read_s": 0.3, "total_s": 0.5, "failure_ttl_s": 0.2}
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
                store.open(("plain.fits", "plain.fits.gz")[i % 2])
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


def test_proxy(nginx: Nginx, disk: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS the server itself is spoken to, through what a proxy connects."""
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://jane:hunter2@127.0.0.1:{proxy.port}")
        with FrameStore(FrameSettings(frame_roots=(nginx.tls_url,))) as store:
            for name in ("wide.fits", "plain.fits.gz"):
                np.testing.assert_array_equal(store.open(name)[ALL], disk.open(name)[ALL])
    assert [head.split()[:2] for head in proxy.heads] == [["CONNECT", f"localhost:{nginx.tls_port}"]]
    assert "Proxy-Authorization: Basic amFuZTpodW50ZXIy" in proxy.heads[0]
    assert proxy.moved > 63 * 3072 * 4
