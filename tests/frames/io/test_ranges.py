"""Frames over HTTP by range requests: the pixels of the file, and no more bytes than a stamp needs."""

from __future__ import annotations

import gzip
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from helpers import Write
from helpers import web_server as web
from helpers.web_server import Open, ServeNoise, WebServer

from stampworker.errors import FrameCorrupt, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames import FrameKey

ALL = (slice(None), slice(None))


@pytest.mark.parametrize("how", [web.serve, web.without_ranges, web.without_length, web.in_chunks])
@pytest.mark.parametrize("name", ["a.fits", "a.fits.gz"])
def test_same_pixels(server: WebServer, open_store: Open, pixels: np.ndarray, how: web.Behaviour, name: str) -> None:
    """With ranges or without, with a length or without, plain or gzip: the pixels of the file."""
    server.behaviours[f"/data/{name}"] = how
    store = open_store()
    frame = store.open(server.url_of(f"data/{name}"))
    np.testing.assert_array_equal(frame[ALL], pixels)
    np.testing.assert_array_equal(frame[5:9, 70:90], pixels[5:9, 70:90])
    assert frame.url == server.url_of(f"data/{name}")
    assert store.open(server.url_of(f"data/{name}")) is frame


def test_relative_paths_start_at_the_first_root(server: WebServer, open_store: Open, pixels: np.ndarray) -> None:
    """A relative path, and one with a blank, is looked for beneath a first root that is a URL."""
    server.files["/data/night%201/b.fits"] = server.files["/data/a.fits"]
    store = open_store()
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    frame = store.open("night 1/b.fits#0")
    np.testing.assert_array_equal(frame[ALL], pixels)
    assert frame.url == server.url_of("data/night%201/b.fits#0")


def test_a_stamp_moves_its_rows(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """63 × 63 pixels of 3080 × 3072 float32 move less than 2.5 % of the frame, in two requests; again: nothing."""
    data = serve_noise("wide.fits", (3080, 3072))
    content = server.files["/data/wide.fits"]
    store = open_store()
    frame = store.open(server.url_of("data/wide.fits"))
    np.testing.assert_array_equal(frame[1500:1563, 700:763], data[1500:1563, 700:763])
    assert server.sent < 0.025 * len(content)
    assert len(server.requests) == 2
    sent = server.sent
    np.testing.assert_array_equal(frame[1500:1563, 2000:2063], data[1500:1563, 2000:2063])
    assert store.open(server.url_of("data/wide.fits"), mask=True).shape == (3080, 3072)
    assert server.sent == sent
    np.testing.assert_array_equal(frame[1540:1603, 5:9], data[1540:1603, 5:9])
    assert server.sent - sent < 42 * 3072 * 4 + 2 * 16384


@pytest.mark.parametrize("tile", [(1, 700), (64, 64)])
def test_tiles_alone_are_moved(
    server: WebServer, open_store: Open, serve_noise: ServeNoise, tile: tuple[int, int]
) -> None:
    """Of a tile-compressed frame move the headers, the table of tiles and the tiles that a stamp touches."""
    data = serve_noise("a.fz", (800, 700), compression_type="RICE_1", tile_shape=tile, quantize_method=1)
    content = server.files["/data/a.fz"]
    frame = open_store().open(server.url_of("data/a.fz"))
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
    store = open_store(failure_ttl_s=5.0, prefetch_threads=8)
    bad = ["none.fits", "../secret.fits"]
    ready = store.open_many(FrameKey(name, False) for name in [*names, *names, *bad, "/etc/hostname"])
    assert list(ready) == [(name, False) for name in names + bad]
    assert [type(future.exception()) for future in ready.values()] == [type(None)] * 6 + [FrameMissing, FrameRefused]
    assert len(server.requests) == 7
    for name in names:
        assert store.open(name) is ready[FrameKey(name, False)].result()
    with pytest.raises(FrameMissing, match=r"the server says 404 Not Found \(.* s ago; asked again in"):
        store.open("none.fits")
    assert len(server.requests) == 7


def test_sections_are_fetched_together(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """What a batch of stamps needs comes beforehand: near rows in one request, far ones at a time, none twice."""
    data = serve_noise("b.fits", (3000, 400))
    tiled = serve_noise("c.fz", (800, 700), compression_type="RICE_1", tile_shape=(64, 64), quantize_method=1)
    store = open_store()
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


def test_no_more_is_fetched_than_can_be_kept(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """Sections that would not fit into the cache are left to be read one by one."""
    data = serve_noise("b.fits", (1000, 400))
    store = open_store(cache_bytes=300_000)
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


def test_ranges_that_cease(server: WebServer, open_store: Open, serve_noise: ServeNoise) -> None:
    """A server that stops serving ranges makes an open frame unavailable; the next open takes the file whole."""
    data = serve_noise("b.fits", (400, 200))
    store = open_store()
    frame = store.open("b.fits")
    server.behaviours["/data/b.fits"] = web.without_ranges
    with pytest.raises(FrameUnavailable, match="status 200 to a range"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open("b.fits")[300:320, 5:9], data[300:320, 5:9])


@pytest.mark.parametrize("name", ["b.fits", "b.fits.gz"])
def test_file_that_changes(
    server: WebServer, open_store: Open, serve_noise: ServeNoise, tmp_path: Path, name: str
) -> None:
    """A file replaced while it is open is unavailable where bytes would mix; the next open reads the new one."""
    old = serve_noise("b.fits", (400, 200))
    raw = server.files["/data/b.fits"]
    fits.PrimaryHDU(old + 1).writeto(tmp_path / "new.fits")
    new = (tmp_path / "new.fits").read_bytes()
    pack = gzip.compress if name.endswith(".gz") else bytes
    server.files[f"/data/{name}"] = pack(raw)
    store = open_store()
    frame = store.open(name)
    server.files[f"/data/{name}"] = pack(new)
    server.behaviours[f"/data/{name}"] = lambda handler: web.serve(handler, etag='"2"')
    store.evict_unused()
    store.evict_unused()
    with pytest.raises(FrameUnavailable, match="another one than when it was opened"):
        frame[300:320, 5:9]
    np.testing.assert_array_equal(store.open(name)[300:320, 5:9], old[300:320, 5:9] + 1)


def test_old_frames_are_opened_again(server: WebServer, open_store: Open, write: Write, pixels: np.ndarray) -> None:
    """After remote_ttl_s nothing that is kept is used."""
    store = open_store(remote_ttl_s=0.2)
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    server.files["/data/a.fits"] = write("b.fits", pixels + 1).read_bytes()
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels)
    time.sleep(0.25)
    np.testing.assert_array_equal(store.open("a.fits")[ALL], pixels + 1)


@pytest.mark.parametrize("how", [web.serve, web.without_ranges])
def test_what_is_kept_is_bounded(
    server: WebServer, open_store: Open, serve_noise: ServeNoise, how: web.Behaviour
) -> None:
    """What came from servers stays within cache_bytes, is fetched again when needed, and goes after a batch."""
    planes = []
    for i in range(4):
        planes.append(serve_noise(f"{i}.fits", (200, 300)))
        server.behaviours[f"/data/{i}.fits"] = how
    store = open_store(cache_bytes=600_000)
    for i in (0, 1, 2, 3, 0, 3):
        np.testing.assert_array_equal(store.open(f"{i}.fits")[ALL], planes[i])
        assert store.cached_bytes <= 600_000
    store.evict_unused()
    store.evict_unused()
    assert store.cached_bytes == 0
    np.testing.assert_array_equal(store.open("2.fits")[20:40, 5:9], planes[2][20:40, 5:9])
