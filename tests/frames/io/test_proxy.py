"""Frames through a proxy of the environment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import web_server as web
from helpers.web_server import WebServer

from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameUnavailable
from stampworker.frames import FrameStore

ALL = (slice(None), slice(None))


@pytest.fixture
def proxy(write: Callable[..., Path], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Start a proxy that has the frames of servers that nobody else finds, and name it with a password."""
    with WebServer() as running:
        content = write("a.fits", pixels).read_bytes()
        for folder in ("http://frames.invalid:8080/data", "http://127.0.0.1:9/data", "http://s3.invalid/bucket"):
            running.files[f"{folder}/a.fits"] = content
        monkeypatch.setenv("HTTP_PROXY", running.url.replace("http://", "http://jane:hunter2@"))
        monkeypatch.setenv("HTTPS_PROXY", running.url.removeprefix("http://"))
        yield running


def open_frame(root: str, **settings: Any) -> np.ndarray:
    """Return the pixels of ``a.fits`` beneath a root."""
    with FrameStore(FrameSettings(frame_roots=(root,), connect_s=1.0, read_s=1.0, total_s=2.0, **settings)) as store:
        return store.open("a.fits")[ALL]


@pytest.mark.parametrize("root", ["http://frames.invalid:8080/data/", "http://127.0.0.1:9/data/"])
def test_http(proxy: WebServer, pixels: np.ndarray, root: str) -> None:
    """The proxy is asked by the whole URL, with the name and password of its own URL; no host is looked up."""
    np.testing.assert_array_equal(open_frame(root), pixels)
    assert proxy.requests == [(f"{root}a.fits", "bytes=0-65535")]
    assert proxy.headers[0]["Proxy-Authorization"] == "Basic amFuZTpodW50ZXIy"
    assert proxy.headers[0]["Host"] == root.split("/")[2]


def test_buckets(proxy: WebServer, pixels: np.ndarray) -> None:
    """Buckets are asked for through the proxy, too."""
    frame = open_frame("s3://bucket/", s3_endpoint="http://s3.invalid", s3_anonymous=True)
    np.testing.assert_array_equal(frame, pixels)
    assert [path for path, _ in proxy.requests] == ["http://s3.invalid/bucket/a.fits"]


def test_exceptions(proxy: WebServer, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NO_PROXY names is asked directly."""
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    with WebServer() as server:
        server.files["/data/a.fits"] = proxy.files["http://127.0.0.1:9/data/a.fits"]
        np.testing.assert_array_equal(open_frame(f"{server.url}data/"), pixels)
        assert "Proxy-Authorization" not in server.headers[0]
    assert proxy.requests == []


@pytest.mark.parametrize("code", [403, 407, 502])
def test_proxy_that_refuses(proxy: WebServer, code: int, caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that lets nothing through makes frames unavailable, over TLS, too; its password is not shown."""
    proxy.behaviours["http://frames.invalid/a.fits"] = web.status(code)
    with caplog.at_level(logging.DEBUG), pytest.raises(FrameUnavailable, match=f"the server says {code}") as caught:
        open_frame("http://frames.invalid/")
    assert ("HTTP_PROXY" in caplog.text) == (code == 407)
    problem = (
        rf"no connection to frames\.invalid:443 through the proxy 127\.0\.0\.1:\d+: Tunnel connection failed: {code} "
    )
    proxy.tunnel = web.status(code)
    with pytest.raises(FrameUnavailable, match=problem):
        open_frame("https://frames.invalid/")
    assert proxy.requests[-1][0] == "frames.invalid:443"
    assert "hunter2" not in caplog.text + str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("how", [web.silence, web.garbage, web.drip_headers])
def test_proxy_that_fails(proxy: WebServer, how: web.Behaviour) -> None:
    """Silence, nonsense and drips of a proxy end in time."""
    proxy.tunnel = how
    with pytest.raises(FrameUnavailable, match=r"no connection to frames\.invalid:443 through the proxy"):
        open_frame("https://frames.invalid/")


def test_proxy_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is not there is named."""
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    with pytest.raises(FrameUnavailable, match=r"invalid:80 through the proxy 127\.0\.0\.1:9: Connection refused"):
        open_frame("http://frames.invalid/")


@pytest.mark.parametrize("url", ["socks5://jane:hunter2@h:1080", "https://h:3128", "http://h:99999", "http://"])
def test_proxies_that_cannot_be(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is not HTTP's or no URL stops the start, but only where frames come over HTTP."""
    monkeypatch.setenv("ALL_PROXY", url)
    with pytest.raises(ConfigError, match=r"HTTPS?_PROXY: ") as caught:
        FrameStore(FrameSettings(frame_roots=("http://frames.invalid/",)))
    assert "hunter2" not in str(caught.value)
    FrameStore(FrameSettings(frame_roots=("/tmp",))).close()
