"""Frames in buckets, from a server of our own that needs no credentials and misbehaves on purpose."""

from __future__ import annotations

import gzip
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import web_server as web
from astropy.io import fits
from pydantic import ValidationError
from web_server import WebServer

from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameCorrupt, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames import FrameStore

ALL = (slice(None), slice(None))
KEY = "/bucket/night/a.fits"
Open = Callable[..., FrameStore]


@pytest.fixture
def server(write: Callable[..., Path], pixels: np.ndarray) -> Iterator[WebServer]:
    """Serve ``s3://bucket/night/a.fits`` and a file beside the root."""
    with WebServer() as running:
        content = write("a.fits", pixels).read_bytes()
        running.files |= {KEY: content, f"{KEY}.gz": gzip.compress(content), "/bucket/secret.fits": content}
        yield running


@pytest.fixture
def open_store(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Return a function that opens a store with ``s3://bucket/night/`` as its root and short times."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    stores: list[FrameStore] = []

    def open_store(**settings: Any) -> FrameStore:
        given = {"connect_s": 0.5, "read_s": 0.4, "total_s": 0.6, "failure_age_s": 0.0, "s3_anonymous": True}
        given |= {"s3_endpoint": server.url, "frame_roots": ("s3://bucket/night/",)}
        stores.append(FrameStore(FrameSettings(**given | settings)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz"])
def test_same_pixels(server: WebServer, open_store: Open, pixels: np.ndarray, name: str) -> None:
    """By URL and by a path beneath the first root: the pixels of the file; one request opens it."""
    store = open_store()
    frame = store.open(f"s3://bucket/night/{name}#0")
    np.testing.assert_array_equal(frame[ALL], pixels)
    np.testing.assert_array_equal(store.open(name)[5:9, 70:90], pixels[5:9, 70:90])
    assert frame.url == f"s3://bucket/night/{name}#0"
    assert server.requests[0] == (f"/bucket/night/{name}", "bytes=0-65535")
    assert len(server.requests) == 1


def test_endpoint_of_the_environment(
    server: WebServer, open_store: Open, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoint and credentials come from the environment; one that is no address stops the start, as a setting too."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.rstrip("/"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "jane")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    np.testing.assert_array_equal(open_store(s3_endpoint=None, s3_anonymous=False).open("a.fits")[ALL], pixels)
    assert server.headers[0]["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=jane/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "hunter2")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL: not an address, wanted"):
        open_store(s3_endpoint=None)
    with pytest.raises(ValidationError, match="s3_endpoint"):
        open_store(s3_endpoint="nowhere")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/secret.fits", "s3://bucket/night/../secret.fits", "s3://bucket/night/%2e%2e/secret.fits",
     "s3://bucket/nights/a.fits", "s3://other/night/a.fits", "s3://bucket/night//a.fits", "../secret.fits",
     "s3://bucket", "s3:bucket/night/a.fits"],
)  # fmt: skip
def test_outside_the_root(server: WebServer, open_store: Open, url: str) -> None:
    """Other buckets and prefixes, parents and empty folders are refused, and nothing is asked."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|in the path|empty folder|no host"):
        open_store().open(url)
    assert server.requests == []


def test_missing(server: WebServer, open_store: Open) -> None:
    """A key that is not there is missing; a burst asks once, later it is found."""
    store = open_store(failure_age_s=0.2)
    for _ in range(20):
        with pytest.raises(FrameMissing, match=r"s3://bucket/night/b\.fits: no such bucket or key"):
            store.open("b.fits")
    assert len(server.requests) == 1
    server.files["/bucket/night/b.fits"] = server.files[KEY]
    time.sleep(0.25)
    assert store.open("b.fits").shape == (61, 83)


@pytest.mark.parametrize("code", [401, 403])
def test_access_denied_is_loud(
    server: WebServer, open_store: Open, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """401 and 403 are unavailable (buckets say so of what is missing), and the log names what to look at."""
    server.behaviours[KEY] = web.status(code)
    with caplog.at_level(logging.ERROR), pytest.raises(FrameUnavailable, match="access denied"):
        open_store().open("a.fits")
    assert "AWS_ACCESS_KEY_ID" in caplog.text
    assert "frames.s3_endpoint" in caplog.text


@pytest.mark.parametrize(
    "behaviour",
    [
        web.status(500),
        web.status(503),
        web.status(429),
        web.silence,
        web.drip,
        web.drip_headers,
        web.reset,
        web.garbage,
    ],
)
def test_failing_server(server: WebServer, open_store: Open, behaviour: web.Behaviour) -> None:
    """Failures, silence, drips, resets and nonsense are unavailable in time; the next alerts do not wait."""
    server.behaviours[KEY] = behaviour
    server.files[KEY] += bytes(100_000)
    store = open_store(failure_age_s=5.0)
    start = time.monotonic()
    for _ in range(30):
        with pytest.raises(FrameUnavailable, match=r"^s3://bucket/night/a\.fits: "):
            store.open("a.fits")
    assert time.monotonic() - start < 1.5
    assert len(server.requests) == 1


def test_server_that_is_down(server: WebServer, open_store: Open) -> None:
    """No server at the endpoint: unavailable, for every key."""
    with WebServer() as other:
        url = other.url
    store = open_store(s3_endpoint=url, failure_age_s=5.0)
    with pytest.raises(FrameUnavailable, match="error sending request"):
        store.open("a.fits")
    with pytest.raises(FrameUnavailable, match=r"b\.fits: .*asked again in"):
        store.open("b.fits")


def test_bad_bodies_and_limits(server: WebServer, open_store: Open) -> None:
    """A page is corrupt, so is an empty object; a gzip file above max_download_bytes is refused."""
    server.files |= {
        "/bucket/night/page": b"<html>",
        "/bucket/night/big.gz": gzip.compress(bytes(100), mtime=0) + bytes(200_000),
    }
    server.files["/bucket/night/empty"] = b""
    store = open_store(max_download_bytes=100_000)
    with pytest.raises(FrameCorrupt, match="HDU 0 begins with '<html>'"):
        store.open("page")
    with pytest.raises(FrameCorrupt, match="the file is empty"):
        store.open("empty")
    with pytest.raises(FrameRefused, match="bytes at once, above the 100000 allowed"):
        store.open("big.gz")


def test_object_that_changes(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """An object replaced while it is open is unavailable where its bytes would mix, and read anew at the next open."""
    data = np.random.default_rng(5).normal(size=(400, 200)).astype("f4")
    for i in range(2):
        fits.PrimaryHDU(data + i).writeto(tmp_path / f"{i}.fits")
    server.files[KEY] = (tmp_path / "0.fits").read_bytes()
    store = open_store()
    frame = store.open("a.fits")
    server.files[KEY] = (tmp_path / "1.fits").read_bytes()
    server.behaviours[KEY] = lambda handler: web.serve(handler, etag='"2"')
    with pytest.raises(FrameUnavailable, match="another one than when it was opened"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open("a.fits")[300:320, 5:9], data[300:320, 5:9] + 1)
