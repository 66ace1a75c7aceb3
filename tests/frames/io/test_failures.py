"""Failures are remembered: how long, and of what."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Callable

import pytest
from helpers import web_server as web
from helpers.web_server import Open, WebServer

from stampworker.config import FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.errors import FrameMissing, FrameUnavailable
from stampworker.formats.alerts import Alert
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore
from stampworker.frames.io.failures import FailureCache

ALL = (slice(None), slice(None))


@pytest.mark.slow
@pytest.mark.parametrize(("code", "header"), [(429, {}), (429, {"Retry_After": "9"}), (503, {"Retry_After": "9"})])
def test_busy_server_is_left_alone(
    server: WebServer, open_store: Open, code: int, header: dict[str, str], age_failures: Callable[[float], None]
) -> None:
    """After 429, or 503 with Retry-After, nothing at all is asked of the server until the time is over."""
    server.behaviours["/data/a.fits"] = web.first(web.status(code, **header))
    server.files["/data/b.fits"] = server.files["/data/a.fits"]
    store = open_store(failure_ttl_s=5.0)
    for name in ("a.fits", "b.fits", "a.fits"):
        with pytest.raises(FrameUnavailable, match=f"{name}: the server says {code}"):
            store.open(name)
    age_failures(5.1)
    if header:
        with pytest.raises(FrameUnavailable, match=r"to try again after 9 s .*asked again in 3\.[89]"):
            store.open("b.fits")
        age_failures(4.0)
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_slow_frame_is_not_a_slow_server(
    server: WebServer, open_store: Open, scheme: str, age_failures: Callable[[float], None]
) -> None:
    """One that is not answered in time is left alone, the others are read; after three in succession all are left."""
    folder, root = ("/data", f"{server.url}data/") if scheme == "http" else ("/b/data", "s3://b/data/")
    given = {"s3_endpoint": server.url.rstrip("/"), "s3_anonymous": True}
    names = [f"{i}.fits" for i in range(6)]
    for name in (*names, "ok.fits", "ok2.fits", "other.fits"):
        server.files[f"{folder}/{name}"] = server.files["/data/a.fits"]
    server.behaviours |= {f"{folder}/{name}": web.silence for name in names}
    store = open_store(root, failure_ttl_s=60.0, read_s=0.3, **given)
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
    age_failures(61.0)
    for name in ("other.fits", *names):
        assert store.open(name).shape == (61, 83)


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
            results = Enricher(Settings(frames=frames), store).packets(alerts)
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 2 << 20
            assert all(isinstance(result, Reject) for result in results)
            assert {type(result.error) for result in results if isinstance(result, Reject)} == {FrameUnavailable}
    finally:
        tracemalloc.stop()


def test_failures_are_forgotten() -> None:
    """What is over leaves at the end of a batch, not only when it is asked for; the oldest gives way to the newest."""
    memory = FailureCache(0.0)
    for i in range(5):
        memory.note(i, FrameMissing("http://h/a", "404"))
    memory.note("busy", FrameUnavailable("http://h/a", "429"), 60.0)
    memory.sweep()
    assert list(memory._known) == ["busy"]
    memory = FailureCache(60.0)
    for i in range(10_050):
        memory.note(i, FrameMissing("http://h/a", "404"))
    assert len(memory._known) == 10_000
    memory.check("http://h/a", 49)
    with pytest.raises(FrameMissing, match=r"http://h/b: 404 \(0.0 s ago; asked again in 60.0 s\)"):
        memory.check("http://h/b", 10_049)
