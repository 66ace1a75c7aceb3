"""A web server in a thread, which serves well or misbehaves on purpose."""

from __future__ import annotations

import itertools
import re
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

import numpy as np

from stampworker.frames import FrameStore

Behaviour = Callable[["Handler"], None]
Open = Callable[..., FrameStore]
"""The fixture ``open_store``: opens a store on the server; takes roots and settings."""
ServeNoise = Callable[..., np.ndarray]
"""The fixture ``serve_noise``: serves a frame of noise by name and shape, and returns its pixels."""


class Handler(BaseHTTPRequestHandler):
    """One connection; each request goes to the behaviour of its path."""

    protocol_version = "HTTP/1.1"
    server: WebServer

    def do_GET(self) -> None:
        """Note the request and behave."""
        if self.server.decodes:
            self.path = unquote(self.path)
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Range")))
            self.server.headers.append({name.title(): value for name, value in self.headers.items()})
        self.server.behaviours.get(self.path, serve)(self)

    def do_HEAD(self) -> None:
        """Say how long a file is."""
        self.path = unquote(self.path) if self.server.decodes else self.path
        status, length = (404, 0) if self.content is None else (200, len(self.content))
        self.answer(status, length=length, Last_Modified="Tue, 24 Nov 2026 01:00:00 GMT", ETag='"1"')

    def do_CONNECT(self) -> None:
        """Note the request and do as a proxy."""
        with self.server.lock:
            self.server.requests.append((self.path, None))
        self.server.tunnel(self)

    @property
    def content(self) -> bytes | None:
        """The file that is asked for."""
        return self.server.files.get(self.path.partition("?")[0])

    def answer(self, status: int, body: bytes = b"", /, length: int | None = None, **headers: str) -> None:
        """Send an answer; ``length`` is what it says of itself where that is not the truth."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.send(body)

    def send(self, body: bytes) -> None:
        """Send bytes of a body, counted before the client has them."""
        with self.server.lock:
            self.server.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


class WebServer(ThreadingHTTPServer):
    """Files by path on 127.0.0.1; ``behaviours`` has, by path, what is done instead of `serve`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, Behaviour] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.tunnel: Behaviour = status(403)
        self.sent = 0
        self.decodes = False  # a client of buckets may encode more of a key than it must
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def url_of(self, path: str = "data/a.fits") -> str:
        """Return the URL of a path."""
        return self.url + path

    def __exit__(self, *exc: object) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def __enter__(self) -> Self:
        return self

    def handle_error(self, *args: Any) -> None:
        """Say nothing: clients hang up on purpose."""


def serve(handler: Handler, etag: str = '"1"') -> None:
    """Serve a file or a range of it, as a good server (or bucket) does."""
    about: dict[str, Any] = {"ETag": etag, "Last_Modified": "Tue, 24 Nov 2026 01:00:00 GMT"}
    content = handler.content
    if content is None:
        handler.answer(404)
        return
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if match is None:
        handler.answer(200, content, **about)
        return
    start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
    if start >= len(content):
        handler.answer(416, Content_Range=f"bytes */{len(content)}")
        return
    if handler.headers.get("If-Match", etag) != etag:
        handler.answer(412)
        return
    handler.answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(content)}", **about)


def without_ranges(handler: Handler) -> None:
    """Serve the whole file whatever is asked for."""
    handler.answer(200, handler.content or b"")


def without_length(handler: Handler) -> None:
    """Serve the whole file until the connection closes."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.send(handler.content or b"")


def in_chunks(handler: Handler) -> None:
    """Serve the whole file in chunks."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    content = handler.content or b""
    for i in range(0, len(content), 10_000):
        part = content[i : i + 10_000]
        handler.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    handler.send(b"0\r\n\r\n")


def endless(handler: Handler) -> None:
    """Serve zeros without end, in chunks."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.stopping.is_set():
        handler.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def status(code: int, **headers: Any) -> Behaviour:
    """Answer a status and no file."""
    return lambda handler: handler.answer(code, b"no", **headers)


def silence(handler: Handler) -> None:
    """Take the request and say nothing."""
    handler.server.stopping.wait(20)


def drip(handler: Handler) -> None:
    """Send a byte of the file now and then."""
    start, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
    handler.send_response(206)
    handler.send_header("Content-Length", str(last + 1 - start))
    handler.send_header("Content-Range", f"bytes {start}-{last}/{len(handler.content or b'')}")
    handler.end_headers()
    while not handler.server.stopping.wait(0.05):
        handler.send(b"S")


def drip_headers(handler: Handler) -> None:
    """Send a byte of an endless header now and then."""
    handler.send(b"HTTP/1.1 206 Partial Content\r\nX-Long: ")
    while not handler.server.stopping.wait(0.05):
        handler.send(b"x")


def drip_chunks(handler: Handler) -> None:
    """Send the size of a chunk, a digit now and then, and no chunk."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.stopping.wait(0.05):
        handler.send(b"0")


def chunk_below_zero(handler: Handler) -> None:
    """Serve zeros without end as a chunk of a negative size."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.send(b"-2\r\n")
    while not handler.server.stopping.is_set():
        handler.send(bytes(0x10000))


def reset(handler: Handler) -> None:
    """Send half an answer, then cut the connection with a reset."""
    handler.answer(206, b"SIMPLE", length=65536, Content_Range="bytes 0-65535/1000000")
    refuse(handler)


def refuse(handler: Handler) -> None:
    """Cut the connection with a reset, without a word."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.rfile.close()
    handler.connection.close()


def hang_up(handler: Handler) -> None:
    """Send half of what the header announces, then close."""
    content = handler.content or b""
    handler.answer(200, content[: len(content) // 2], length=len(content))
    handler.close_connection = True


def garbage(handler: Handler) -> None:
    """Answer something that is not HTTP."""
    handler.send(b"\x00\x01\x02 go away\r\n\r\n")
    handler.close_connection = True


def redirect(to: str, code: int = 302) -> Behaviour:
    """Send the client elsewhere."""
    return lambda handler: handler.answer(code, Location=to)


def first(behaviour: Behaviour, times: int = 1, then: Behaviour = serve) -> Behaviour:
    """Misbehave some times, then do otherwise."""
    left = [times]

    def choose(handler: Handler) -> None:
        left[0] -= 1
        (behaviour if left[0] >= 0 else then)(handler)

    return choose


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """Flap: behave in one way at a request, in the next way at the next one, and start over."""
    turns = itertools.cycle(behaviours)
    lock = threading.Lock()

    def choose(handler: Handler) -> None:
        with lock:
            behaviour = next(turns)
        behaviour(handler)

    return choose
