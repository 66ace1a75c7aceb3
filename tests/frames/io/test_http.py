"""Frames over HTTP from a server that serves well, badly, late or not at all."""

from __future__ import annotations

import gc
import gzip
import logging
import posixpath
import re
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from helpers import web_server as web
from helpers.web_server import WebServer
from hypothesis import given
from hypothesis import strategies as st

from stampworker import enrich_table
from stampworker.config import FrameSettings, Settings
from stampworker.enrich import Reject, make_packets
from stampworker.errors import ConfigError, FrameCorrupt, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import Packet
from stampworker.frames import FrameKey, FrameStore
from stampworker.frames.io.failures import Memory
from stampworker.frames.io.http import _PlainSocket, forbidden
from stampworker.frames.urls import parse, parse_root

ALL = (slice(None), slice(None))
Open = Callable[..., FrameStore]


@pytest.fixture
def server(write: Callable[..., Path], pixels: np.ndarray) -> Iterator[WebServer]:
    """Serve ``/data/a.fits``, and ``/secret.fits`` beside the root."""
    with WebServer() as running:
        running.files["/data/a.fits"] = running.files["/secret.fits"] = write("a.fits", pixels).read_bytes()
        running.files["/data/a.fits.gz"] = gzip.compress(running.files["/data/a.fits"])
        yield running


@pytest.fixture
def open_store(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Return a function that opens a store with the server's ``data/`` as its root and short times."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    stores: list[FrameStore] = []

    def open_store(*roots: str, **settings: Any) -> FrameStore:
        given = {"connect_s": 0.5, "read_s": 0.3, "total_s": 0.6, "failure_ttl_s": 0.0} | settings
        stores.append(FrameStore(FrameSettings(frame_roots=roots or (f"{server.url}data/",), **given)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def url_of(server: WebServer, path: str = "data/a.fits") -> str:
    return server.url + path


@pytest.mark.parametrize("how", [web.serve, web.without_ranges, web.without_length, web.in_chunks])
@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz"])
def test_same_pixels(server: WebServer, open_store: Open, pixels: np.ndarray, how: web.Behaviour, name: str) -> None:
    """With ranges or without, with a length or without, plain or gzip: the pixels of the file."""
    server.behaviours[f"/data/{name}"] = how
    store = open_store()
    frame = store.open(url_of(server, f"data/{name}"))
    np.testing.assert_array_equal(frame[ALL], pixels)
    np.testing.assert_array_equal(frame[5:9, 70:90], pixels[5:9, 70:90])
    assert frame.url == url_of(server, f"data/{name}")
    assert store.open(url_of(server, f"data/{name}")) is frame


def test_relative_paths_start_at_the_first_root(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """A relative path, and one with a blank, is looked for beneath a first root that is a URL."""
    server.files["/data/night%201/b.fits"] = server.files["/data/a.fits"]
    store = open_store()
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    frame = store.open("night 1/b.fits#0")
    np.testing.assert_array_equal(frame[ALL], pixels)
    assert frame.url == url_of(server, "data/night%201/b.fits#0")


def wide(path: Path, shape: tuple[int, int], **how: Any) -> np.ndarray:
    """Write a frame of noise, plain or tile-compressed."""
    data = np.random.default_rng(3).normal(100, 5, shape).astype("f4")
    hdus = [fits.PrimaryHDU(), fits.CompImageHDU(data, **how)] if how else [fits.PrimaryHDU(data)]
    fits.HDUList(hdus).writeto(path)
    return data if not how else fits.getdata(path)


def test_a_stamp_moves_its_rows(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """63 × 63 pixels of 3080 × 3072 float32 move less than 2.5 % of the frame, in two requests; again: nothing."""
    data = wide(tmp_path / "wide.fits", (3080, 3072))
    content = server.files["/data/wide.fits"] = (tmp_path / "wide.fits").read_bytes()
    store = open_store(total_s=10.0, read_s=10.0)
    frame = store.open(url_of(server, "data/wide.fits"))
    np.testing.assert_array_equal(frame[1500:1563, 700:763], data[1500:1563, 700:763])
    assert server.sent < 0.025 * len(content)
    assert len(server.requests) == 2
    sent = server.sent
    np.testing.assert_array_equal(frame[1500:1563, 2000:2063], data[1500:1563, 2000:2063])
    assert store.open(url_of(server, "data/wide.fits"), mask=True).shape == (3080, 3072)
    assert server.sent == sent
    np.testing.assert_array_equal(frame[1540:1603, 5:9], data[1540:1603, 5:9])
    assert server.sent - sent < 42 * 3072 * 4 + 2 * 16384


@pytest.mark.parametrize("tile", [(1, 700), (64, 64)])
def test_tiles_alone_are_moved(server: WebServer, open_store: Open, tmp_path: Path, tile: tuple[int, int]) -> None:
    """Of a tile-compressed frame move the headers, the table of tiles and the tiles that a stamp touches."""
    data = wide(tmp_path / "a.fz", (800, 700), compression_type="RICE_1", tile_shape=tile, quantize_method=1)
    content = server.files["/data/a.fz"] = (tmp_path / "a.fz").read_bytes()
    frame = open_store(total_s=10.0, read_s=10.0).open(url_of(server, "data/a.fz"))
    np.testing.assert_array_equal(frame[500:531, 300:331], data[500:531, 300:331])
    assert server.sent < 0.35 * len(content)
    np.testing.assert_array_equal(frame[ALL], data)


def test_twenty_stamps_need_one_open(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """A frame is asked for once, however many stamps are cut, and by however many threads at once."""
    store = open_store()
    frames: list[object] = []
    threads = [threading.Thread(target=lambda: frames.append(store.open("a.fits"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    frame = store.open("a.fits")
    for x in range(20):
        np.testing.assert_array_equal(frame[10:20, x : x + 9], pixels[10:20, x : x + 9])
    assert len(server.requests) == 1
    assert frames == [frame] * 8


def test_prefetch_opens_at_once(server: WebServer, open_store: Open) -> None:
    """Frames are opened several at a time, the bad among them left to open(), which does not ask for them again."""
    names = [f"{i}.fits" for i in range(6)]
    together = threading.Barrier(6)

    def meet(handler: web.Handler) -> None:
        together.wait(5)
        web.serve(handler)

    for name in names:
        server.files[f"/data/{name}"] = server.files["/data/a.fits"]
        server.behaviours[f"/data/{name}"] = meet
    store = open_store(failure_ttl_s=5.0, prefetch_threads=8, total_s=10.0, read_s=10.0)
    bad = ["none.fits", "../secret.fits"]
    ready = store.open_many(FrameKey(name, False) for name in [*names, *names, *bad, "/etc/hostname"])
    assert list(ready) == [(name, False) for name in names + bad]
    assert [type(future.exception()) for future in ready.values()] == [type(None)] * 6 + [FrameMissing, FrameRefused]
    assert len(server.requests) == 7
    for name in names:
        assert store.open(name) is ready[name, False].result()
    with pytest.raises(FrameMissing, match=r"the server says 404 Not Found \(.* s ago; asked again in"):
        store.open("none.fits")
    assert len(server.requests) == 7


def test_sections_are_fetched_together(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """What a batch of stamps needs comes beforehand: near rows in one request, far ones at a time, none twice."""
    data = wide(tmp_path / "b.fits", (3000, 400))
    tiled = wide(tmp_path / "c.fz", (800, 700), compression_type="RICE_1", tile_shape=(64, 64), quantize_method=1)
    for name in ("b.fits", "c.fz"):
        server.files[f"/data/{name}"] = (tmp_path / name).read_bytes()
    store = open_store(total_s=10.0, read_s=10.0)
    frame, tiles = store.open("b.fits"), store.open("c.fz")
    opened = len(server.requests)
    together = threading.Barrier(2)

    def meet(handler: web.Handler) -> None:
        together.wait(5)
        web.serve(handler)

    server.behaviours["/data/b.fits"] = meet
    boxes = [(500, 531, 5, 36), (510, 541, 90, 121), (560, 591, 0, 31), (2000, 2031, 5, 36), (2990, 3021, -5, 26)]
    store.prefetch_sections([([frame], boxes[:4])])
    assert len(server.requests) == opened + 2
    server.behaviours.clear()
    store.prefetch_sections([([frame], [*boxes, (-40, -9, 0, 31)])])
    store.prefetch_sections([([tiles], [(100, 131, 300, 331), (90, 121, 310, 341)])])
    asked = len(server.requests)
    assert asked <= opened + 6
    for y0, y1, x0, x1 in boxes:
        section = np.s_[y0:y1, max(x0, 0) : x1]
        np.testing.assert_array_equal(frame[section], data[section])
    np.testing.assert_array_equal(tiles[100:131, 300:331], tiled[100:131, 300:331])
    np.testing.assert_array_equal(tiles[90:121, 310:341], tiled[90:121, 310:341])
    assert len(server.requests) == asked
    server.behaviours["/data/b.fits"] = web.status(500)
    store.prefetch_sections([([frame], [(1000, 1031, 0, 31)])])
    with pytest.raises(FrameUnavailable, match="the server says 500"):
        frame[1000:1031, 0:31]


def test_no_more_is_fetched_than_can_be_kept(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """Sections that would not fit into the cache are left to be read one by one."""
    data = wide(tmp_path / "b.fits", (1000, 400))
    server.files["/data/b.fits"] = (tmp_path / "b.fits").read_bytes()
    store = open_store(cache_bytes=300_000, total_s=10.0)
    frame = store.open("b.fits")
    store.prefetch_sections([([frame], [(0, 1000, 0, 400)])])
    assert len(server.requests) == 1
    np.testing.assert_array_equal(frame[ALL], data)


def test_prefetch_leaves_room(server: WebServer, open_store: Open) -> None:
    """No more is opened beforehand than stays open."""
    for i in range(6):
        server.files[f"/data/{i}.fits"] = server.files["/data/a.fits"]
    store = open_store(max_open_frames=3)
    store.open_many(FrameKey(f"{i}.fits", False) for i in range(6))
    assert {path for path, _ in server.requests} == {"/data/0.fits", "/data/1.fits", "/data/2.fits"}


@pytest.mark.parametrize("names", [["\udce9.fits"], ["\udce9.fits", "a.fits"]])
def test_prefetch_never_fails(open_store: Open, names: list[str]) -> None:
    """Not even by what no frame should be called: it is one alert's to fail, when the frame is opened."""
    store = open_store()
    store.open_many(FrameKey(name, False) for name in names)
    with pytest.raises(FrameRefused, match=r"'\\udce9\.fits': half of a character"):
        store.open(names[0])


@pytest.mark.parametrize(
    "path",
    [
        "secret.fits",
        "data/../secret.fits",
        "data/%2e%2e/secret.fits",
        "data/.%2E/secret.fits",
        "data/%252e%252e/secret.fits",
        "data/%25252e%25252e/secret.fits",
        "data/..%2fsecret.fits",
        "data/..;x/secret.fits",
        "data/./a.fits",
        "data/..%5csecret.fits",
        "data%2fa.fits",
        "database/a.fits",
        "data/a.fits\r\nX: y",
        "data/a\tb",
        "data/a\\b",
        "data/%00",
        "",
    ],
)
def test_urls_outside_the_root(server: WebServer, open_store: Open, path: str) -> None:
    """Parents in any disguise, neighbours whose names begin alike and characters that split requests are refused."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|in the path|encoded|control characters"):
        open_store().open(url_of(server, path))
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:PORT/data/a.fits",
        "http://127.0.0.1/data/a.fits",
        "http://localhost:PORT/data/a.fits",
        "http://127.1:PORT/data/a.fits",
        "http://2130706433:PORT/data/a.fits",
        "http://127.0.0.1:PORT@example.org/data/a.fits",
        "http://example.org/data/a.fits",
        "http:///data/a.fits",
        "http://[::1/data",
        "http://127.0.0.1:99999/data/a.fits",
        "http://exämple.org/data/a.fits",
        "s3://data/a.fits",
        "ftp://127.0.0.1:PORT/data/a.fits",
        "http:/data/a.fits",
    ],
)
def test_other_hosts(server: WebServer, open_store: Open, url: str) -> None:
    """Another host, another spelling of the same one, another port or scheme is refused."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|no host|not a URL|scheme|ASCII"):
        open_store().open(url.replace("PORT", str(server.server_port)))
    assert server.requests == []


@pytest.mark.parametrize(
    "root",
    [
        "az://container/x",
        "gs://u:hunter2@bucket/",
        "abfs://container@account.dfs.core.windows.net/",
        "ftp://host/",
        "https://u:hunter2@host/",
        "https://host/?key=hunter2",
        "https://",
        "http://h/../x",
    ],
)
def test_roots_that_cannot_be(root: str) -> None:
    """A root of an unknown scheme, with credentials, or that is no URL stops the start, and shows no secret."""
    with pytest.raises(ConfigError, match=r"frames\.frame_roots: ") as caught:
        FrameStore(FrameSettings(frame_roots=(root,)))
    assert "hunter2" not in str(caught.value)


def test_redirects(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """Within the roots they are followed; to elsewhere, to another scheme, round and round they are not."""
    with WebServer() as other:
        other.files["/x/a.fits"] = server.files["/data/a.fits"]
        server.behaviours |= {
            "/data/1.fits": web.redirect("a.fits", 301),
            "/data/2.fits": web.redirect("/data/1.fits", 308),
            "/data/out.fits": web.redirect("/secret.fits"),
            "/data/up.fits": web.redirect("../secret.fits"),
            "/data/hidden.fits": web.redirect("%2e%2e/secret.fits"),
            "/data/other.fits": web.redirect(f"{other.url}x/a.fits?token=hunter2"),
            "/data/file.fits": web.redirect("file:///etc/hostname"),
            "/data/none.fits": lambda handler: handler.answer(302),
            "/data/round.fits": web.redirect("round.fits"),
        }
        store = open_store()
        for name in ("1.fits", "2.fits"):
            frame = store.open(name)
            np.testing.assert_array_equal(frame[ALL], pixels)
            assert frame.url == url_of(server, f"data/{name}")
        for name in ("out", "up", "other"):
            with pytest.raises(FrameRefused, match=rf"{name}\.fits: redirects to .*outside the frame roots") as caught:
                store.open(f"{name}.fits")
            assert "hunter2" not in str(caught.value)
        for name in ("file", "none"):
            with pytest.raises(FrameRefused, match=r"redirects to .*wanted http: or https:"):
                store.open(f"{name}.fits")
        with pytest.raises(FrameRefused, match=r"'%2e%2e' in the path"):
            store.open("hidden.fits")
        with pytest.raises(FrameUnavailable, match="more than 5 redirects"):
            store.open("round.fits")
        assert other.requests == []
        both = open_store(f"{server.url}data/", f"{other.url}x/")
        np.testing.assert_array_equal(both.open("other.fits")[ALL], pixels)
        assert "/secret.fits" not in {path for path, _ in server.requests}


@pytest.mark.parametrize("to", ["http://[", "//[", "http://[::1", "//127.0.0.1:99999/", "/secret.fits", "ftp://h/x"])
def test_redirects_to_nonsense(server: WebServer, open_store: Open, to: str) -> None:
    """What is no URL is refused like what lies elsewhere, and a burst asks once."""
    server.behaviours["/data/1.fits"] = web.redirect(to)
    store = open_store(failure_ttl_s=5.0)
    for _ in range(3):
        with pytest.raises(
            FrameRefused, match=r"/data/1\.fits: redirects to .*(not a URL|outside the frame|wanted http:)"
        ):
            store.open("1.fits")
    assert len(server.requests) == 1


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
    ],
)
def test_names_of_forbidden_addresses(open_store: Open, monkeypatch: pytest.MonkeyPatch, ip: str) -> None:
    """A name that resolves to loopback, link-local, nowhere or many is refused, however the address is dressed."""
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
    monkeypatch.setattr("stampworker.frames.io.http.forbidden", lambda ip: None if ip == "127.0.0.1" else forbidden(ip))
    name = f"http://frames.example:{server.server_port}/"
    store = open_store(name)
    np.testing.assert_array_equal(store.open(name + "data/a.fits")[ALL], pixels)
    assert asked == ["frames.example"]
    assert server.headers[0]["Host"] == f"frames.example:{server.server_port}"
    for address in ("10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1"):
        assert forbidden(address) is None


@pytest.mark.parametrize("code", [404, 410])
def test_missing(server: WebServer, open_store: Open, code: int) -> None:
    """404 and 410 are missing; a burst asks once, and a later alert asks again and finds the frame."""
    server.behaviours["/data/a.fits"] = web.first(web.status(code))
    store = open_store(failure_ttl_s=0.2)
    for _ in range(30):
        with pytest.raises(FrameMissing, match=f"a.fits: the server says {code}"):
            store.open("a.fits")
    assert len(server.requests) == 1
    time.sleep(0.25)
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


@pytest.mark.slow
@pytest.mark.parametrize(("code", "header"), [(429, {}), (429, {"Retry_After": "1"}), (503, {"Retry_After": "1"})])
def test_busy_server_is_left_alone(server: WebServer, open_store: Open, code: int, header: dict[str, str]) -> None:
    """After 429, or 503 with Retry-After, nothing at all is asked of the server until the time is over."""
    server.behaviours["/data/a.fits"] = web.first(web.status(code, **header))
    server.files["/data/b.fits"] = server.files["/data/a.fits"]
    store = open_store(failure_ttl_s=0.3)
    for name in ("a.fits", "b.fits", "a.fits"):
        with pytest.raises(FrameUnavailable, match=f"{name}: the server says {code}"):
            store.open(name)
    time.sleep(0.4)
    if header:
        with pytest.raises(FrameUnavailable, match=r"to try again after 1 s .*asked again in 0"):
            store.open("b.fits")
        time.sleep(0.7)
    assert len(server.requests) == 1
    assert store.open("b.fits").shape == store.open("a.fits").shape == (61, 83)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", (7, 7)), ("0", (0, 0)), ("99999999999", (300, 300)), ("soon", None), ("-3", None), ("٣", None),
     ("Fri, 01 Jan 2100 00:00:00 GMT", (300, 300)), ("Fri, 01 Jan 1999 00:00:00 GMT", (0, 0))],
)  # fmt: skip
def test_retry_after(server: WebServer, open_store: Open, value: str, seconds: tuple[float, float] | None) -> None:
    """Retry-After counts as seconds or a date, five minutes at most; what is neither is passed over."""
    server.behaviours["/data/a.fits"] = lambda handler: handler.answer(
        503, Retry_After=value.encode().decode("latin-1")
    )
    store = open_store()
    with pytest.raises(FrameUnavailable, match="the server says 503") as caught:
        store.open("a.fits")
    found = re.search(r"to try again after (\S+) s", str(caught.value))
    assert (float(found[1]) if found else None) == (seconds[0] if seconds else None)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (web.silence, r"no answer for read_s \(0\.3 s\)"),
        (web.drip, r"no end of the answer within total_s \(0\.6 s\)"),
        (web.drip_headers, r"no answer within total_s \(0\.6 s\)"),
    ],
)
def test_slow_server_costs_the_alert(
    server: WebServer, open_store: Open, behaviour: web.Behaviour, problem: str
) -> None:
    """Silence, a byte now and then, a header without end: unavailable in time, and the next 50 alerts at once."""
    server.behaviours["/data/a.fits"] = behaviour
    server.files["/data/a.fits"] += bytes(100_000)
    store = open_store(failure_ttl_s=5.0)
    start = time.monotonic()
    for i in range(50):
        with pytest.raises(FrameUnavailable, match=problem):
            store.open("a.fits" if i % 2 else f"a.fits#{i}")
    assert time.monotonic() - start < 1.5
    assert len(server.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_slow_frame_is_not_a_slow_server(server: WebServer, open_store: Open, scheme: str) -> None:
    """One that is not answered in time is left alone, the others are read; after three in succession all are left."""
    folder, root = ("/data", f"{server.url}data/") if scheme == "http" else ("/b/data", "s3://b/data/")
    given = {"s3_endpoint": server.url.rstrip("/"), "s3_anonymous": True}
    names = [f"{i}.fits" for i in range(6)]
    for name in (*names, "ok.fits", "ok2.fits", "other.fits"):
        server.files[f"{folder}/{name}"] = server.files["/data/a.fits"]
    server.behaviours |= {f"{folder}/{name}": web.silence for name in names}
    store = open_store(root, failure_ttl_s=0.6, read_s=0.1, **given)
    for name in (names[0], names[0], names[1]):
        with pytest.raises(FrameUnavailable, match=f"{name}: no"):
            store.open(name)
    assert store.open("ok.fits").shape == (61, 83)
    for name in (*names[2:], "ok2.fits"):
        with pytest.raises(FrameUnavailable, match=f"{name}: no"):
            store.open(name)
    silent = [f"{folder}/{name}" for name in names]
    assert [path for path, _ in server.requests] == [*silent[:2], f"{folder}/ok.fits", *silent[2:5]]
    server.behaviours.clear()
    time.sleep(0.6)
    for name in ("other.fits", *names):
        assert store.open(name).shape == (61, 83)


def test_slow_section_costs_the_alert(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """A server that becomes slow after the frame was opened is unavailable in time, too; then the pixels come."""
    data = wide(tmp_path / "b.fits", (300, 200))
    server.files["/data/b.fits"] = (tmp_path / "b.fits").read_bytes()
    store = open_store()
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
    assert open_store(total_s=10.0).open("m.fits").shape == (5, 7)

    def sleepy(handler: web.Handler) -> None:
        time.sleep(0.1)
        web.serve(handler)

    server.behaviours["/data/m.fits"] = sleepy
    start = time.monotonic()
    with pytest.raises(FrameUnavailable, match=r"within total_s \(0\.6 s\)"):
        open_store().open("m.fits")
    assert 0.5 < time.monotonic() - start < 1.0


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
    monkeypatch.setattr(store._web, "_connect", lambda *args: _PlainSocket(fileno=near.detach()))
    with far:
        far.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        with pytest.raises(FrameMissing, match="404"):
            store.open(url + "a.fits")
        assert f"\r\nHost: {host}\r\n" in far.recv(4096).decode()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"Content_Range": "bytes */5760"}, FrameUnavailable),
        ({}, FrameUnavailable),
        ({"Content_Range": "bytes */0"}, FrameCorrupt),
    ],
)
def test_range_that_cannot_be(
    server: WebServer, open_store: Open, said: dict[str, str], error: type[FrameError]
) -> None:
    """A server that refuses the first range of a file says that it is empty, or is mistaken, which may pass."""
    server.behaviours["/data/a.fits"] = web.status(416, **said)
    with pytest.raises(error, match=r"a\.fits: (the file is empty|status 416 with Content-Range)"):
        open_store().open("a.fits")


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


def test_download_limits(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """A body above max_download_bytes is refused: unread where its length is said, cut off where it is not."""
    wide(tmp_path / "b.fits", (500, 400))
    server.files["/data/b.fits"] = (tmp_path / "b.fits").read_bytes()
    server.files["/data/b.fits.gz"] = gzip.compress(server.files["/data/b.fits"])
    server.behaviours |= {
        "/data/b.fits": web.without_ranges,
        "/data/c.fits": lambda handler: handler.answer(200, length=10**15),
        "/data/endless.fits": web.endless,
    }
    store = open_store(max_download_bytes=100_000, total_s=5.0)
    for name in ("b.fits", "b.fits.gz", "c.fits"):
        with pytest.raises(FrameRefused, match=r"above the 100000 allowed \(frames\.max_download_bytes\)"):
            store.open(name)
    with pytest.raises(FrameRefused, match="more than the 100000 bytes allowed"):
        store.open("endless.fits")
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


@pytest.mark.parametrize("how", [web.serve, web.without_ranges])
def test_what_is_kept_is_bounded(server: WebServer, open_store: Open, tmp_path: Path, how: web.Behaviour) -> None:
    """What came from servers stays within cache_bytes, is fetched again when needed, and goes after a batch."""
    planes = []
    for i in range(4):
        planes.append(wide(tmp_path / f"{i}.fits", (200, 300)) + 0)
        server.files[f"/data/{i}.fits"] = (tmp_path / f"{i}.fits").read_bytes()
        server.behaviours[f"/data/{i}.fits"] = how
    store = open_store(cache_bytes=600_000, total_s=5.0)
    for i in (0, 1, 2, 3, 0, 3):
        np.testing.assert_array_equal(store.open(f"{i}.fits")[ALL], planes[i])
        assert store.cached_bytes <= 600_000
    store.evict_unused()
    store.evict_unused()
    assert store.cached_bytes == 0
    np.testing.assert_array_equal(store.open("2.fits")[20:40, 5:9], planes[2][20:40, 5:9])


@pytest.mark.parametrize("name", ["b.fits", "b.fits.gz"])
def test_file_that_changes(server: WebServer, open_store: Open, tmp_path: Path, name: str) -> None:
    """A file replaced while it is open is unavailable where its bytes would mix, and read anew at the next open."""
    old = wide(tmp_path / "b.fits", (400, 200))
    raw = (tmp_path / "b.fits").read_bytes()
    fits.PrimaryHDU(old + 1).writeto(tmp_path / "new.fits")
    new = (tmp_path / "new.fits").read_bytes()
    pack = gzip.compress if name.endswith(".gz") else bytes
    server.files[f"/data/{name}"] = pack(raw)
    store = open_store(total_s=5.0)
    frame = store.open(name)
    server.files[f"/data/{name}"] = pack(new)
    server.behaviours[f"/data/{name}"] = lambda handler: web.serve(handler, etag='"2"')
    store.evict_unused()
    store.evict_unused()
    with pytest.raises(FrameUnavailable, match="another one than when it was opened"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open(name)[300:320, 5:9], old[300:320, 5:9] + 1)


def test_ranges_that_cease(server: WebServer, open_store: Open, tmp_path: Path) -> None:
    """A server that stops serving ranges makes an open frame unavailable; the next open takes the file whole."""
    data = wide(tmp_path / "b.fits", (400, 200))
    server.files["/data/b.fits"] = (tmp_path / "b.fits").read_bytes()
    store = open_store(total_s=5.0)
    frame = store.open("b.fits")
    server.behaviours["/data/b.fits"] = web.without_ranges
    with pytest.raises(FrameUnavailable, match="status 200 to a range"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open("b.fits")[300:320, 5:9], data[300:320, 5:9])


def test_old_frames_are_opened_anew(
    server: WebServer, open_store: Open, write: Callable[..., Path], pixels: np.ndarray
) -> None:
    """After remote_ttl_s nothing that is kept is used."""
    store = open_store(remote_ttl_s=0.2)
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    server.files["/data/a.fits"] = write("b.fits", pixels + 1).read_bytes()
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    time.sleep(0.25)
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels + 1)


@pytest.mark.parametrize(
    "query",
    [
        "X-Amz-Signature=hunter2",
        "sv=1&sig=hunter2",
        "a=1&access_token=hunter2",
        "user=me&pwd=hunter2",
        "jwt=hunter2",
        "ticket=hunter2",
        "a=eyJhbGciOiJIUzI1NiJ9.hunter2",
    ],
)
def test_credentials_are_used_and_not_shown(
    server: WebServer, open_store: Open, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A name, a password and a signed query go to the server, and into no URL, message or log."""
    path = f"/data/a.fits?{query}"
    store = open_store()
    given = server.url.replace("http://", "http://jane:hunter2@") + path[1:]
    caplog.set_level(logging.DEBUG)
    assert store.open(given).url == url_of(server)
    assert server.requests[0][0] == path
    assert server.headers[0]["Authorization"] == "Basic amFuZTpodW50ZXIy"
    for behaviour in (web.status(403), web.status(404), web.status(503), web.reset, web.redirect("/x"), web.garbage):
        server.behaviours[path + "&n=1"] = behaviour
        with pytest.raises(FrameError, match=rf"^{re.escape(url_of(server))}: ") as caught:
            store.open(given + "&n=1")
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(store.open(given))


@pytest.mark.parametrize(
    "url",
    [
        "s3://b/p/a?X-Amz-Signature=hunter2",
        "simplecache::https://jane:hunter2@host/x",
        "//jane:hunter2@host/x",
        "file://jane:hunter2@host/x",
        "http://jane:12/hunter2@host/x",
        "http://jane:12/hunt#hunter2@host/x",
        "http://jane:12/hunter2#er@host/x",
        "http://jane:12/hunter2%2f@host/x",
        "http:jane:hunter2@host/x",
        "s3:jane:hunter2@b/p/a",
        "https:///jane:hunter2@host/x",
        "s3://jane/hunter2@b/p/a",
        "ftp://jane:hunter2@host/x",
        "http://jane:hunter2@h:x/",
    ],
)
def test_refused_urls_show_no_credentials(open_store: Open, url: str) -> None:
    """Also where they stand where none are looked for: in odd URLs, in a key, in what a password cuts in two."""
    for store in (open_store(), open_store("s3://b/q/", "/tmp", s3_anonymous=True)):
        with pytest.raises(FrameRefused, match=r"outside|wanted|encoded|not a URL|no host") as caught:
            store.open(url)
        assert "hunter2" not in str(caught.value)
        assert "jane" not in str(caught.value)


def test_other_queries_are_kept(server: WebServer, open_store: Open) -> None:
    """A query that only says which file is meant belongs to the frame's URL."""
    query = "?id=7&ccd=3&design=2&passband=r&author=x&keyword=y"
    assert open_store().open(url_of(server) + query).url == url_of(server) + query
    assert server.requests[0][0] == "/data/a.fits" + query


def test_time_that_an_alert_has_spent_is_not_the_servers(server: WebServer, open_store: Open) -> None:
    """An alert whose time is over says so; the server is asked by others, and not blamed."""
    store = open_store(total_s=0.2)
    with store.allowance():
        time.sleep(0.25)
        with pytest.raises(FrameUnavailable, match=r"no time is left of total_s \(0\.2 s\)"):
            store.open("a.fits")
    assert store.open("a.fits").shape


def test_netrc(
    server: WebServer,
    open_store: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Credentials for a host come from the netrc file; one that cannot be read is said in the log."""
    store = open_store(remote_ttl_s=0.0)
    store.open("a.fits")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login jane password hunter2\n")
    store.open("a.fits")
    (tmp_path / "netrc").write_text("machine")
    store.open("a.fits")
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == [None, "Basic amFuZTpodW50ZXIy", None]
    assert "netrc cannot be used" in caplog.text


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


def test_s3_root_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library an s3: root stops the start and names the extra."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'stampworker\[s3\]'"):
        FrameStore(FrameSettings(frame_roots=("s3://bucket/",)))


PIECES = [*".;?@:% \t\\/", "..", "a", "é", "data", "2e", "%2e", "%2E", "%25", "%2f", "%5c", "%c0%ae"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.sampled_from(["http", "s3", "abfs", "memory"]))
def test_no_url_leaves_its_root(path: str, scheme: str) -> None:
    """Whatever follows the root: the URL is refused, or what is asked for lies beneath, however often it is decoded."""
    start = f"{scheme}://{'' if scheme == 'memory' else 'host/'}data/"
    root = parse_root(start)
    try:
        address = parse(start + path)
    except FrameRefused:
        return
    if not address.beneath(root):
        return
    asked = address.target.partition("?")[0] if scheme == "http" else "/" + address.target
    for _ in range(5):
        resolved = posixpath.normpath(re.sub(r";[^/]*", "", asked.replace("\\", "/")))
        assert resolved == "/data" or resolved.startswith("/data/")
        asked = unquote(asked, errors="surrogateescape")


def test_table_with_frames_of_a_server(server: WebServer, pixels: np.ndarray) -> None:
    """A call names its frames by URL, signed or not; no root is needed, and what lies beside stays refused."""
    table = Table({"x": [40.0], "y": [30.0]})
    science = url_of(server) + "?X-Amz-Signature=hunter2#0"
    _, packets = enrich_table(table, frames={"science": science}, radius=4)
    assert isinstance(packets[0], Packet)
    np.testing.assert_array_equal(packets[0].stamps["science"].data, pixels[26:35, 36:45])
    assert packets[0].frames == {"science": url_of(server) + "#0"}
    with FrameStore(FrameSettings(), allowed=[science]) as store, pytest.raises(FrameRefused, match="outside"):
        store.open(url_of(server, "secret.fits"))


@pytest.mark.slow
@pytest.mark.parametrize("age", [0.0, 60.0])
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_failures_do_not_hold_bodies(server: WebServer, scheme: str, age: float) -> None:
    """What is remembered of a failure, and the rejects of a batch, do not hold the part of the body that had come."""
    half = bytes(2 << 20)

    def break_off(handler: web.Handler) -> None:
        handler.answer(200, half, length=4 << 20, ETag='"1"', Last_Modified="Tue, 24 Nov 2026 01:00:00 GMT")
        handler.close_connection = True

    root = f"{server.url}data/" if scheme == "http" else "s3://bucket/data/"
    endpoint = server.url.rstrip("/")
    frames = FrameSettings(frame_roots=(root,), s3_endpoint=endpoint, s3_anonymous=True, failure_ttl_s=age)
    for i in range(3):
        server.behaviours[f"/{'bucket/' if scheme == 's3' else ''}data/{i}.fits"] = break_off
    alerts = [Alert(str(i), x=5.0, y=5.0, frames={"science": f"{i}.fits"}) for i in range(3)]
    tracemalloc.start()
    try:
        with FrameStore(frames) as store:
            results = make_packets(alerts, store, Settings(frames=frames))
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2 << 20
            assert all(isinstance(result, Reject) for result in results)
            assert {type(result.error) for result in results if isinstance(result, Reject)} == {FrameUnavailable}
    finally:
        tracemalloc.stop()


def test_failures_are_forgotten() -> None:
    """What is over leaves at the end of a batch, not only when it is asked for; the oldest gives way to the newest."""
    memory = Memory(0.0)
    for i in range(5):
        memory.note(i, FrameMissing("http://h/a", "404"))
    memory.note("busy", FrameUnavailable("http://h/a", "429"), 60.0)
    memory.sweep()
    assert list(memory._known) == ["busy"]
    memory = Memory(60.0)
    for i in range(10_050):
        memory.note(i, FrameMissing("http://h/a", "404"))
    assert len(memory._known) == 10_000
    memory.check("http://h/a", 49)
    with pytest.raises(FrameMissing, match=r"http://h/b: 404 \(0.0 s ago; asked again in 60.0 s\)"):
        memory.check("http://h/b", 10_049)
