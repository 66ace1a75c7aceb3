"""Which addresses are connected to, and how a host is found."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from helpers.web_server import Open, WebServer
from urllib3.connection import HTTPConnection

from stampworker.errors import FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.connections import forbidden

ALL = (slice(None), slice(None))


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "169.254.169.254",
        "fe80::1%2",
        "0.0.0.0",
        "::",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "224.0.0.1",
        "ff02::1",
        "fd00:ec2::254",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
        "::ffff:168.63.129.16",
    ],
)
def test_names_of_forbidden_addresses(open_store: Open, monkeypatch: pytest.MonkeyPatch, ip: str) -> None:
    """A name for loopback, link-local, no host, many hosts or a cloud's metadata is refused, however it is written."""
    found = [(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert forbidden(ip) is not None
    store = open_store("http://frames.example/")
    with pytest.raises(FrameRefused, match=rf"host 'frames\.example' is at {re.escape(ip)}, an? .* address: only"):
        store.open("http://frames.example/a.fits")


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_an_address_is_opened_to_the_urls_that_name_it(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, ip: str
) -> None:
    """A root on loopback lets its own URLs lead there, in any spelling of the address, and no name of another root."""
    found = [(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    host = "[0:0:0:0:0:0:0:1]" if ":" in ip else ip
    store = open_store("http://frames.example/", f"http://{host}/", "http://localhost/")
    with pytest.raises(FrameRefused, match=r"host 'frames\.example' is at .* a loopback address"):
        store.open("http://frames.example/a.fits")
    for name in (host, "localhost"):
        with pytest.raises(FrameUnavailable, match=r"no connection to .*: Connection refused"):
            store.open(f"http://{name}/a.fits")


def test_the_checked_address_is_connected_to(
    server: WebServer, open_store: Open, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several addresses only those that may be are tried, and a name is resolved once for a connection."""
    answers = [["169.254.1.1", "127.0.0.1"], ["169.254.1.1"]]
    asked: list[str] = []

    def resolve(host: str, port: int, **kwargs: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers[len(asked) - 1]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(
        "stampworker.frames.io.connections.forbidden", lambda ip: None if ip == "127.0.0.1" else forbidden(ip)
    )
    name = f"http://frames.example:{server.server_port}/"
    store = open_store(name)
    np.testing.assert_array_equal(store.open(name + "data/a.fits")[ALL], pixels)
    assert asked == ["frames.example"]
    assert server.headers[0]["Host"] == f"frames.example:{server.server_port}"
    for address in ("10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1"):
        assert forbidden(address) is None


def test_server_that_is_down(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """A server that is down is unavailable for that long; when it is back the frame is read."""
    with WebServer() as other:
        port, url = other.server_port, other.url
    store = open_store(url)
    with pytest.raises(FrameUnavailable, match=f"no connection to 127.0.0.1:{port}: Connection refused"):
        store.open("a.fits")
    with WebServer(port) as other:
        other.files["/a.fits"] = server.files["/data/a.fits"]
        np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)


def test_unknown_host(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without an address is unavailable: names come and go."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(FrameUnavailable, match=r"host 'frames\.example' is not found: Name or service not known"):
        open_store("http://frames.example/").open("a.fits")


def test_slow_lookup(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that does not answer costs connect_s, and a bounded number of threads that wait for it."""
    answer = threading.Event()

    def resolve(*args: Any, **kwargs: Any) -> list[Any]:
        answer.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    store = open_store("http://frames.example/", connect_s=0.02)
    start = time.monotonic()
    try:
        for i in range(20):
            with pytest.raises(FrameUnavailable, match=r"'frames\.example' is not found within connect_s \(0\.02 s\)"):
                store.open(f"http://frames.example/{i}.fits")
        assert time.monotonic() - start < 1.5
        assert sum(thread.name == "lookup" for thread in threading.enumerate()) == 16
    finally:
        answer.set()
    for thread in threading.enumerate():
        if thread.name == "lookup":
            thread.join()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://frames.example/", "frames.example"),
        ("https://frames.example/", "frames.example"),
        ("https://frames.example:80/", "frames.example:80"),
        ("http://frames.example:443/", "frames.example:443"),
        ("http://[::1]/", "[::1]"),
    ],
)
def test_host_header(monkeypatch: pytest.MonkeyPatch, open_store: Open, url: str, host: str) -> None:
    """A server is called by its name, without the port that its scheme has anyway."""
    near, far = socket.socketpair()
    store = open_store(url)

    def connect(connection: HTTPConnection) -> None:
        connection.sock = near
        connection.is_verified = True

    monkeypatch.setattr("stampworker.frames.io.connections._Connection.connect", connect)
    with near, far:
        far.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        with pytest.raises(FrameMissing, match="404"):
            store.open(url + "a.fits")
        assert f"\r\nHost: {host}\r\n" in far.recv(4096).decode()
