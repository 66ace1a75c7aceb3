"""What one alert may cost in bytes: what it needs is counted, and refused before anything is read."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import web_server as web
from helpers.web_server import WebServer

from stampworker.config import EnrichSettings, FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.errors import FrameRefused
from stampworker.formats.alerts import Alert
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore

LIMIT = 100_000
TOO_MUCH = rf"above the {LIMIT} that one alert may cost \(frames\.max_alert_bytes\)"
Open = Callable[..., FrameStore]


@pytest.fixture
def data() -> np.ndarray:
    """Give 600 rows of 800 bytes: half a megabyte."""
    return np.random.default_rng(9).normal(100, 5, (600, 200)).astype("f4")


@pytest.fixture
def folder(tmp_path: Path, data: np.ndarray) -> Path:
    """Write the frame plain, as gzip, in tiles, and two small planes in one gzip file."""
    fits.PrimaryHDU(data).writeto(tmp_path / "a.fits")
    (tmp_path / "a.fits.gz").write_bytes(gzip.compress((tmp_path / "a.fits").read_bytes()))
    tiles = fits.CompImageHDU(data, compression_type="RICE_1", tile_shape=(50, 200), quantize_method=1)
    fits.HDUList([fits.PrimaryHDU(), tiles]).writeto(tmp_path / "a.fits.fz")
    small = [fits.PrimaryHDU(data[:50]), fits.ImageHDU(data[50:100])]
    fits.HDUList(small).writeto(tmp_path / "two.fits")
    (tmp_path / "two.fits.gz").write_bytes(gzip.compress((tmp_path / "two.fits").read_bytes()))
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[WebServer]:
    """Serve the folder."""
    with WebServer() as running:
        running.files |= {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
        yield running


@pytest.fixture
def open_store(folder: Path, server: WebServer) -> Iterator[Open]:
    """Return a function that opens a store on the folder or on the server, with 100 kB an alert."""
    stores: list[FrameStore] = []

    def open_store(remote: bool, **settings: Any) -> FrameStore:
        root = server.url if remote else str(folder)
        stores.append(FrameStore(FrameSettings(**{"frame_roots": (root,), "max_alert_bytes": LIMIT} | settings)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def test_ranges(server: WebServer, open_store: Open, data: np.ndarray) -> None:
    """The rows of all planes are counted together, whether they are in memory or not; each alert starts at zero."""
    store = open_store(remote=True)
    frame = store.open("a.fits")
    np.testing.assert_array_equal(frame[:, :], data)  # no alert, no limit
    for _ in range(2):
        with store.allowance():
            np.testing.assert_array_equal(frame[100:160, 5:9], data[100:160, 5:9])
            np.testing.assert_array_equal(frame[500:560, 5:9], data[500:560, 5:9])
            with pytest.raises(FrameRefused, match=rf"a\.fits: with this section 100800 bytes .* {TOO_MUCH}"):
                frame[300:306, 5:9]


def test_refused_before_it_is_read(server: WebServer, open_store: Open) -> None:
    """A section above the limit is requested neither beforehand nor when it is sliced."""
    store = open_store(remote=True)
    frames = [store.open("a.fits"), store.open("a.fits.fz")]
    asked = len(server.requests)
    store.prefetch_sections([(frames, [(300, 360, 0, 60), (100, 500, 0, 60)])])
    assert len(server.requests) == asked
    for frame in frames:
        with store.allowance(), pytest.raises(FrameRefused, match=TOO_MUCH):
            frame[200:400, 0:60]
    assert len(server.requests) == asked
    store.prefetch_sections([(frames, [(300, 320, 0, 60)])])
    assert len(server.requests) == asked + 2


@pytest.mark.parametrize("remote", [False, True])
def test_tiles(open_store: Open, remote: bool) -> None:
    """Tiles are counted, compressed and decoded, in memory or not: 40 kB decoded each, not the rows of the section."""
    store = open_store(remote=remote)
    frame = store.open("a.fits.fz")
    for _ in range(2):
        with store.allowance():
            assert frame[49:51, 5:9].shape == (2, 4)
            with pytest.raises(FrameRefused, match=TOO_MUCH):
                frame[0:1, 5:9]


@pytest.mark.parametrize("remote", [False, True])
def test_gzip(open_store: Open, remote: bool) -> None:
    """A gzip file is counted as a whole, once per alert, however many of its planes are read."""
    store = open_store(remote=remote, max_alert_bytes=600_000)
    planes = [store.open("two.fits.gz#0"), store.open("two.fits.gz#1")]
    rows = store.open("a.fits.fz")
    with store.allowance():
        for plane in planes * 2:
            assert plane[0:31, 0:31].shape == (31, 31)
        assert rows[0:250, :].shape == (250, 200)
        with pytest.raises(FrameRefused, match=r"above the 600000 that one alert may cost"):
            rows[0:250, :]


def test_gzip_above_the_limit(server: WebServer, open_store: Open) -> None:
    """A gzip file that is too large for any alert is neither downloaded nor decompressed."""
    with pytest.raises(FrameRefused, match=r"than the 100000 bytes allowed \(frames\.max_alert_bytes\)"):
        open_store(remote=False).open("a.fits.gz")
    with pytest.raises(FrameRefused, match=rf"gzip of \d+ bytes, {TOO_MUCH}"):
        open_store(remote=True).open("a.fits.gz")
    assert server.sent == 1 << 16


def test_without_ranges(server: WebServer, open_store: Open) -> None:
    """A file that the server sends as a whole is counted as a whole."""
    server.behaviours["/a.fits"] = web.without_ranges
    store = open_store(remote=True)
    frame = store.open("a.fits")
    with store.allowance(), pytest.raises(FrameRefused, match=TOO_MUCH):
        frame[0:1, 0:1]


def test_plain_files_are_free(open_store: Open, data: np.ndarray) -> None:
    """Rows of a plain local file are not counted."""
    store = open_store(remote=False)
    with store.allowance():
        np.testing.assert_array_equal(store.open("a.fits")[:, :], data)


def test_an_alert_that_costs_too_much(server: WebServer, open_store: Open) -> None:
    """An alert whose planes together are above the limit is rejected before they are read; the next one works."""
    for plane in ("science", "difference"):
        server.files[f"/{plane}.fits"] = server.files["/a.fits"]
    store = open_store(remote=True, max_alert_bytes=70_000)
    alerts = [
        Alert(alert_id="small", x=100.0, y=20.0, frames={"science": "science.fits"}),
        Alert(alert_id="large", x=100.0, y=400.0, frames={"science": "science.fits", "difference": "difference.fits"}),
        Alert(alert_id="other", x=100.0, y=400.0, frames={"science": "science.fits"}),
    ]
    results = Enricher(Settings(enrich=EnrichSettings(radius=31)), store).packets(alerts)
    assert isinstance(results[1], Reject)
    assert isinstance(results[1].error, FrameRefused)
    assert "max_alert_bytes" in str(results[1].error)
    assert [r.alert_id for r in results if not isinstance(r, Reject)] == ["small", "other"]
    assert ("/difference.fits", "bytes=0-65535") in server.requests
    assert [ranges for path, ranges in server.requests if path == "/difference.fits"] == ["bytes=0-65535"]
