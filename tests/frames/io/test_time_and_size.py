"""Limits on the time and the bytes that a server of frames may take."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from helpers import web_server as web
from helpers.web_server import Open, ServeNoise, WebServer

from stampworker.errors import FrameRefused, FrameUnavailable
from stampworker.frames.limits import time_limit

ALL = (slice(None), slice(None))
SHORT = {"connect_s": 0.5, "read_s": 0.3, "total_s": 0.6}


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (web.silence, r"no answer for read_s \(0\.3 s\)"),
        (web.drip, r"no end of the answer within total_s \(0\.6 s\)"),
        (web.drip_headers, r"no answer within total_s \(0\.6 s\)"),
        (web.drip_chunks, r"no end of the answer within total_s \(0\.6 s\)"),
    ],
)
def test_slow_server_costs_the_alert(
    server: WebServer, open_store: Open, behaviour: web.Behaviour, problem: str
) -> None:
    """Silence, a byte now and then, a header without end: unavailable in time, and the next 50 alerts at once."""
    server.behaviours["/data/a.fits"] = behaviour
    server.files["/data/a.fits"] += bytes(100_000)
    store = open_store(failure_ttl_s=5.0, **SHORT)
    start = time.monotonic()
    for i in range(50):
        with pytest.raises(FrameUnavailable, match=problem):
            store.open("a.fits" if i % 2 else f"a.fits#{i}")
    assert time.monotonic() - start < 1.5
    assert len(server.requests) == 1


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03\x3f\xff"])
def test_slow_handshake_costs_the_alert(open_store: Open, said: bytes) -> None:
    """A server that is silent in the TLS handshake, or drips, is unavailable in time, and the next alerts at once."""
    over = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(said)
            while said and not over.wait(0.05):
                connection.sendall(b"x")
            over.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        root = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        store = open_store(root, failure_ttl_s=5.0, connect_s=0.3, total_s=0.6)
        start = time.monotonic()
        try:
            for i in range(50):
                with pytest.raises(FrameUnavailable, match=r"no connection to .* within connect_s \(0\.3 s\)"):
                    store.open(f"{i}.fits")
            assert time.monotonic() - start < 1.2
        finally:
            over.set()
            thread.join()


def test_slow_section_costs_the_alert(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """A server that becomes slow after the frame was opened is unavailable in time, too; then the pixels come."""
    data = serve_noise("b.fits", (300, 200))
    store = open_store(**SHORT)
    frame = store.open("b.fits")
    server.behaviours["/data/b.fits"] = web.first(web.drip)
    start = time.monotonic()
    with pytest.raises(FrameUnavailable, match="no end of the answer within total_s"), store.allowance():
        frame[200:230, 5:9]
    assert time.monotonic() - start < 1.2
    np.testing.assert_array_equal(frame[200:230, 5:9], data[200:230, 5:9])


@pytest.mark.slow
def test_slow_headers_cost_the_alert(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """Opening a file of many HDUs, each answer in time, ends within the total time."""
    spectra = [fits.ImageHDU(np.zeros(30_000, "f4")) for _ in range(20)]
    fits.HDUList([fits.PrimaryHDU(), *spectra, fits.ImageHDU(np.zeros((5, 7), "f4"))]).writeto(tmp_path / "m.fits")
    server.files["/data/m.fits"] = (tmp_path / "m.fits").read_bytes()
    assert open_store().open("m.fits").shape == (5, 7)

    def sleepy(handler: web.Handler) -> None:
        time.sleep(0.1)
        web.serve(handler)

    server.behaviours["/data/m.fits"] = sleepy
    start = time.monotonic()
    with pytest.raises(FrameUnavailable, match=r"within total_s \(0\.6 s\)"):
        open_store(**SHORT).open("m.fits")
    assert 0.5 < time.monotonic() - start < 1.0


def test_time_that_an_alert_has_spent_is_not_the_servers(server: WebServer, open_store: Open) -> None:
    """An alert whose time is over says so; the server is asked by others, and not blamed."""
    store = open_store(failure_ttl_s=5.0)
    with time_limit(0.0), pytest.raises(FrameUnavailable, match=r"no time is left of total_s \(10 s\)"):
        store.open("a.fits")
    assert store.open("a.fits").shape == (61, 83)
    assert len(server.requests) == 1


def test_download_limits(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """A body above max_download_bytes is refused: unread where its length is said, cut off where it is not."""
    serve_noise("b.fits", (500, 400))
    server.files["/data/b.fits.gz"] = gzip.compress(server.files["/data/b.fits"])
    server.behaviours |= {
        "/data/b.fits": web.without_ranges,
        "/data/c.fits": lambda handler: handler.answer(200, length=10**15),
        "/data/endless.fits": web.endless,
        "/data/below.fits": web.chunk_below_zero,
    }
    store = open_store(max_download_bytes=100_000)
    for name in ("b.fits", "b.fits.gz", "c.fits"):
        with pytest.raises(FrameRefused, match=r"above the 100000 allowed \(frames\.max_download_bytes\)"):
            store.open(name)
    for name in ("endless.fits", "below.fits"):
        with pytest.raises(FrameRefused, match="more than the 100000 bytes allowed"):
            store.open(name)
    server.behaviours.clear()
    frame = store.open("b.fits")
    assert frame[10:30, 5:9].shape == (20, 4)
    with pytest.raises(FrameRefused, match=r"bytes at once, above the 100000 allowed"):
        frame[ALL]


def test_bomb(server: WebServer, open_store: Open) -> None:
    """A gzip bomb from a server is refused as one from disk is."""
    server.files["/data/a.fits.gz"] = gzip.compress(bytes(20_000_000))
    with pytest.raises(FrameRefused, match="decompresses to more than the 1000000 bytes allowed"):
        open_store(max_decompressed_bytes=1_000_000).open("a.fits.gz")
