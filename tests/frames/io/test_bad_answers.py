"""Answers of a server that fails, breaks off, or sends something other than FITS."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import web_server as web
from helpers.web_server import Open, WebServer

from stampworker.errors import FrameCorrupt, FrameError, FrameMissing, FrameUnavailable

ALL = (slice(None), slice(None))


@pytest.mark.parametrize("code", [404, 410])
def test_missing(server: WebServer, open_store: Open, code: int, age_failures: Callable[[float], None]) -> None:
    """404 and 410 are missing; a burst asks once, and a later alert asks again and finds the frame."""
    server.behaviours["/data/a.fits"] = web.first(web.status(code))
    store = open_store(failure_ttl_s=5.0)
    for _ in range(30):
        with pytest.raises(FrameMissing, match=f"a.fits: the server says {code}"):
            store.open("a.fits")
    assert len(server.requests) == 1
    age_failures(5.1)
    assert store.open("a.fits").shape == (61, 83)


@pytest.mark.parametrize("code", [401, 403])
def test_access_denied_is_loud(
    server: WebServer, open_store: Open, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """401 and 403 are unavailable, and the log says at ERROR where credentials come from."""
    server.behaviours["/data/a.fits"] = web.status(code)
    with caplog.at_level(logging.ERROR), pytest.raises(FrameUnavailable, match=f"says {code} .*credentials come from"):
        open_store().open("a.fits")
    assert "netrc" in caplog.text
    assert caplog.records[0].levelname == "ERROR"


@pytest.mark.parametrize("code", [400, 408, 418, 500, 502, 503, 504, 204, 304])
def test_failing_server(server: WebServer, open_store: Open, code: int) -> None:
    """Any other status is unavailable, and the next frame of the server is asked for."""
    server.behaviours["/data/bad.fits"] = web.status(code)
    store = open_store(failure_ttl_s=5.0)
    with pytest.raises(FrameUnavailable, match=f"the server says {code}"):
        store.open("bad.fits")
    assert store.open("a.fits").shape == (61, 83)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (web.reset, "the connection failed: Connection reset by peer"),
        (web.hang_up, r"the answer ends after 1\d+ of 2\d+ bytes"),
        (web.garbage, "the connection failed: "),
        (lambda handler: handler.answer(206, b"x" * 10), "206 with Content-Range ''"),
        (lambda handler: handler.answer(206, b"x" * 10, Content_Range="bytes 5-14/20"), "is 'bytes 5-14/20'"),
        (lambda handler: handler.answer(206, b"x" * 10, Content_Range="bytes 0-9/20"), "wanted bytes 0-65535"),
        (lambda handler: handler.answer(206, b"x" * 10, Content_Range="bytes 0-9/*"), "wanted bytes 0-65535"),
        (lambda handler: handler.answer(206, b"x" * 10, Content_Range="bytes 0-8/9"), "answer of 10 bytes, wanted 9"),
    ],
)  # fmt: skip
def test_broken_answers(server: WebServer, open_store: Open, behaviour: web.Behaviour, problem: str) -> None:
    """A reset, a body shorter than its length, nonsense: unavailable; the next time the frame is read."""
    server.behaviours["/data/a.fits"] = web.first(behaviour)
    store = open_store()
    with pytest.raises(FrameUnavailable, match=problem):
        store.open("a.fits")
    assert store.open("a.fits").shape == (61, 83)


@pytest.mark.parametrize("last", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"])
def test_kept_connection_that_was_closed(server: WebServer, open_store: Open, pixels: np.ndarray, last: bytes) -> None:
    """A server may close a kept connection, with a last word or without: the next frame is read on a new one."""
    server.files["/data/b.fits"] = server.files["/data/a.fits"]

    def serve_and_close(handler: web.Handler) -> None:
        web.serve(handler)
        handler.send(last)
        handler.close_connection = True

    server.behaviours["/data/a.fits"] = serve_and_close
    store = open_store()
    store.open("a.fits")
    time.sleep(0.05)
    np.testing.assert_array_equal(store.open("b.fits")[ALL], pixels)


def test_kept_connection_that_closes_at_the_request(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """A kept connection may close just when a request is sent: it is sent again, once, on a new one."""
    server.files["/data/b.fits"] = server.files["/data/a.fits"]

    def hang_up(handler: web.Handler) -> None:
        handler.close_connection = True

    server.behaviours["/data/b.fits"] = web.first(hang_up)
    store = open_store()
    store.open("a.fits")
    np.testing.assert_array_equal(store.open("b.fits")[ALL], pixels)
    assert [path for path, _ in server.requests] == ["/data/a.fits", "/data/b.fits", "/data/b.fits"]


@pytest.mark.parametrize(
    ("body", "problem"),
    [(b"<html>not found</html>", "HDU 0 begins with '<html>"), (b"", "the file is empty"), (b"SIMPLE  = ", "END card")],
)
@pytest.mark.parametrize("how", [web.serve, web.without_ranges])
def test_bodies_that_are_not_fits(
    server: WebServer, open_store: Open, body: bytes, problem: str, how: web.Behaviour
) -> None:
    """A page with status 200, nothing, half a header: corrupt."""
    server.files["/data/a.fits"] = body
    server.behaviours["/data/a.fits"] = how
    with pytest.raises(FrameCorrupt, match=rf"a\.fits: .*{problem}"):
        open_store().open("a.fits")


def test_truncated_file(server: WebServer, open_store: Open) -> None:
    """A file that is shorter than its header says is corrupt when it is opened."""
    server.files["/data/a.fits"] = server.files["/data/a.fits"][:10_000]
    with pytest.raises(FrameCorrupt, match="truncated: the data of HDU 0"):
        open_store().open("a.fits")


def test_no_connection_is_leaked(server: WebServer, open_store: Open) -> None:
    """Two hundred good and bad answers leave one connection, and none after the store is closed."""
    server.behaviours |= {
        "/data/r.fits": web.reset,
        "/data/e.fits": web.status(500),
        "/data/x.fits": web.redirect("/x"),
    }
    store = open_store(remote_ttl_s=0.0)
    for _ in range(50):
        store.open("a.fits")
        for name in ("r.fits", "e.fits", "x.fits"):
            with pytest.raises(FrameError, match=name):
                store.open(name)
    assert connections(server) <= 2
    store.close()
    assert connections(server) == 0


def connections(server: WebServer) -> int:
    """Count this process's client sockets to the server."""
    remote = f"0100007F:{server.server_port:04X}"
    return sum(line.split()[2:4] == [remote, "01"] for line in Path("/proc/self/net/tcp").read_text().splitlines())
