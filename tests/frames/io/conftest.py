"""A web server with frames, a store on it, and a clock that can be set forward."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import Write
from helpers.web_server import Open, ServeNoise, WebServer

from stampworker.config import FrameSettings
from stampworker.frames import FrameStore
from stampworker.frames.io import failures


@pytest.fixture
def server(write: Write, pixels: np.ndarray) -> Iterator[WebServer]:
    """Serve ``/data/a.fits``, and ``/secret.fits`` beside the root."""
    with WebServer() as running:
        running.files["/data/a.fits"] = running.files["/secret.fits"] = write("a.fits", pixels).read_bytes()
        running.files["/data/a.fits.gz"] = gzip.compress(running.files["/data/a.fits"])
        yield running


@pytest.fixture
def open_store(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Return a function that opens a store with the server's ``data/`` as its root, and long times."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    stores: list[FrameStore] = []

    def open_store(*roots: str, **settings: Any) -> FrameStore:
        given = {"connect_s": 5.0, "read_s": 5.0, "total_s": 10.0, "failure_ttl_s": 0.0} | settings
        stores.append(FrameStore(FrameSettings(frame_roots=roots or (f"{server.url}data/",), **given)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def serve_noise(server: WebServer, tmp_path: Path) -> ServeNoise:
    """Return a function that serves a frame of noise beneath ``data/``, plain or tile-compressed."""

    def serve_noise(name: str, shape: tuple[int, int], **how: Any) -> np.ndarray:
        data = np.random.default_rng(3).normal(100, 5, shape).astype("f4")
        hdus = [fits.PrimaryHDU(), fits.CompImageHDU(data, **how)] if how else [fits.PrimaryHDU(data)]
        fits.HDUList(hdus).writeto(tmp_path / name)
        server.files[f"/data/{name}"] = (tmp_path / name).read_bytes()
        return data if not how else fits.getdata(tmp_path / name)

    return serve_noise


@pytest.fixture
def age_failures(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the clock of remembered failures forward, in seconds."""
    ahead = [0.0]
    monkeypatch.setattr(failures, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0]))

    def age(seconds: float) -> None:
        ahead[0] += seconds

    return age
