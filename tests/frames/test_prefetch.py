"""The frames of a batch are opened and fetched while the batch before is computed."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import web_server as web
from helpers.web_server import WebServer

from stampworker.config import EnrichSettings, FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.errors import FrameUnavailable
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import Packet, encode
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore, regrid
from stampworker.frames.fits.tiles import TiledImage

NIGHT = 4  # sets of frames


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    """Serve some sets of frames, which are larger than the first request."""
    rng = np.random.default_rng(5)
    with WebServer() as running:
        for number in range(NIGHT):
            for plane in ("science", "difference"):
                fits.PrimaryHDU(rng.normal(0, 3, (500, 300)).astype("f4")).writeto(tmp_path / "f.fits", overwrite=True)
                running.files[f"/{number}-{plane}.fits"] = (tmp_path / "f.fits").read_bytes()
        yield running


def settings_of(server: WebServer, **frames: object) -> Settings:
    made = {"frame_roots": (server.url,), "total_s": 40.0, "read_s": 20.0, **frames}
    return Settings(enrich=EnrichSettings(radius=9), frames=FrameSettings.model_validate(made))


def batch(number: int) -> list[Alert]:
    """Return a few alerts of one set of frames."""
    frames = {plane: f"{number}-{plane}.fits" for plane in ("science", "difference")}
    return [Alert(f"{number}/{y}", x=150.0, y=float(y), fwhm=3.0, frames=frames) for y in (60, 240, 470)]


def test_what_was_prepared_is_computed_without_another_request(server: WebServer) -> None:
    """All that packets need is in memory before they are made, also when a batch has ended meanwhile."""
    settings = settings_of(server)
    with FrameStore(settings.frames) as store:
        first = Enricher(settings, store).prefetch(batch(0))
        second = Enricher(settings, store).prefetch(batch(1))
        asked = len(server.requests)
        made = Enricher(settings, store).enrich(first) + Enricher(settings, store).enrich(second)
        assert len(server.requests) == asked
    with FrameStore(settings.frames) as store:
        at_once = Enricher(settings, store).packets(batch(0) + batch(1))
    assert [encode(p) for p in made if isinstance(p, Packet)] == [encode(p) for p in at_once if isinstance(p, Packet)]
    assert len(made) == len(at_once) == 6


def meet(paths: Iterable[str], number: int) -> dict[str, web.Behaviour]:
    """Let requests wait until so many of them wait at the same time.

    The limit only ends a test that fails: on a busy machine, the threads of a batch may begin seconds apart.
    """
    barrier = threading.Barrier(number)

    def wait(handler: web.Handler) -> None:
        barrier.wait(20)
        web.serve(handler)

    return dict.fromkeys(paths, wait)


def test_sets_of_frames_are_opened_and_fetched_together(server: WebServer) -> None:
    """Sets of frames are opened at the same time, and then what the stamps need is fetched at the same time."""
    settings = settings_of(server)
    alerts = [alert for number in range(NIGHT) for alert in batch(number)[:1]]
    server.behaviours |= meet(server.files, 2 * NIGHT)
    with FrameStore(settings.frames) as store:
        made = Enricher(settings, store).packets(alerts)
    assert len(server.requests) == 4 * NIGHT
    assert all(isinstance(result, Packet) for result in made)


def test_a_compressed_mask_is_set_up_once(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is opened ahead as a mask, not as an image first."""
    tiles = fits.CompImageHDU(np.zeros((500, 300), "i2"), compression_type="RICE_1")
    fits.HDUList([fits.PrimaryHDU(), tiles]).writeto(tmp_path / "mask")
    server.files["/mask.fits"] = (tmp_path / "mask").read_bytes()
    settings = settings_of(server)
    opened: list[bool] = []

    def tiled(*args: Any, mask: bool, **kwargs: Any) -> TiledImage:
        opened.append(mask)
        return TiledImage(*args, mask=mask, **kwargs)

    monkeypatch.setattr("stampworker.frames.store.TiledImage", tiled)
    alert = Alert("1", x=150.0, y=60.0, fwhm=3.0, frames={"science": "0-science.fits", "mask": "mask.fits"})
    with FrameStore(settings.frames) as store:
        assert isinstance(Enricher(settings, store).packets([alert])[0], Packet)
    assert opened == [True]


def test_what_fails_while_the_others_open_is_not_asked_again(server: WebServer) -> None:
    """A frame that cannot be opened is requested once per batch, even if failures are not remembered that long."""
    server.behaviours["/1-difference.fits"] = web.status(503)
    settings = settings_of(server, failure_ttl_s=0.0)
    with FrameStore(settings.frames) as store:
        Enricher(settings, store).packets(batch(0) + batch(1))
    assert [path for path, _ in server.requests].count("/1-difference.fits") == 1


def test_what_is_fetched_ahead_is_bounded_in_sum(server: WebServer) -> None:
    """All frames together fill half of the cache; the rest is read when it is sliced, and the packets are the same."""
    alerts = [alert for number in range(NIGHT) for alert in batch(number)]
    settings = settings_of(server, cache_bytes=1_000_000)
    with FrameStore(settings.frames) as store:
        sent = len(server.files) * 65536
        prepared = Enricher(settings, store).prefetch(alerts)
        assert sent + 300_000 < server.sent < sent + 500_000
        made = Enricher(settings, store).enrich(prepared)
        assert store.cached_bytes <= 1_000_000
    assert all(isinstance(result, Packet) for result in made)


@pytest.mark.parametrize("how", [web.serve, web.without_ranges])
def test_what_was_prepared_outlasts_the_end_of_the_batch_before(server: WebServer, how: web.Behaviour) -> None:
    """Data fetched for the next batch survive the end of this one; data that no batch uses are released."""
    server.behaviours |= dict.fromkeys(server.files, how)
    settings = settings_of(server)
    with FrameStore(settings.frames) as store:
        for number in (0, 1):
            Enricher(settings, store).packets(batch(number))
        before = Enricher(settings, store).prefetch(batch(2))
        server.requests.clear()
        again = Enricher(settings, store).prefetch(batch(0)[1:])
        asked = len(server.requests)
        Enricher(settings, store).enrich(before)
        Enricher(settings, store).enrich(again)
        assert len(server.requests) == asked
        Enricher(settings, store).prefetch(batch(3))
        store.evict_unused()
        assert store.cached_bytes > 0
        store.evict_unused()
        assert store.cached_bytes == 0


@pytest.mark.parametrize("plane", ["template", "mask"])
def test_planes_on_another_grid_are_fetched_ahead(
    server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str
) -> None:
    """What the stamps need of other grids is fetched in few requests; a section that cannot be mapped costs nothing.

    Stamps of which the other frame shows nothing, and those that need too many of its pixels, are not fetched.
    """
    monkeypatch.setattr(regrid, "_MAX_PIXELS", 2000)
    sky = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 5.0, "CRPIX1": 150.0}
    grids = {"science": (1e-4, (500, 300)), plane: (1.1e-4, (400, 300)), "fine": (5e-5, (500, 300))}
    for name, (scale, shape) in grids.items():
        data = np.random.default_rng(7).normal(0, 3, shape).astype("i2" if name == "mask" else "f4")
        header = fits.Header(sky | {"CD1_1": -scale, "CD2_2": scale, "CRPIX2": shape[0] / 2})
        fits.PrimaryHDU(data, header).writeto(tmp_path / name)
        server.files[f"/{name}.fits"] = (tmp_path / name).read_bytes()
    settings = settings_of(server)
    frames = {"science": "science.fits", plane: f"{plane}.fits"}
    alerts = [Alert(str(y), x=150.0, y=float(y), fwhm=3.0, frames=frames) for y in (9, 100, 240, 380, 490)]
    alerts.append(
        Alert("fine", x=150.0, y=240.0, fwhm=3.0, frames={"science": "science.fits", "template": "fine.fits"})
    )
    with FrameStore(settings.frames) as store:
        prepared = Enricher(settings, store).prefetch(alerts)
        asked = [path for path, _ in server.requests]
        assert asked.count(f"/{plane}.fits") <= 4
        assert asked.count("/fine.fits") == 1
        made = Enricher(settings, store).enrich(prepared)
        assert len(server.requests) == len(asked)
    *packets, refused = made
    assert [packet.resampled_planes for packet in packets if isinstance(packet, Packet)] == [(plane,)] * 5
    assert isinstance(refused, Reject)
    assert "wanted at most" in str(refused.error)


def test_no_more_frames_are_opened_ahead_than_may_be_open(server: WebServer) -> None:
    """Frame sets beyond max_open_frames are opened when their turn comes, and computed ones are released."""
    settings = settings_of(server, max_open_frames=4)
    alerts = [alert for number in range(NIGHT) for alert in batch(number)]
    with FrameStore(settings.frames) as store:
        prepared = Enricher(settings, store).prefetch(alerts)
        assert {path[1] for path, _ in server.requests} == {"0", "1"}
        server.behaviours |= meet(server.files, 4)
        made = Enricher(settings, store).enrich(prepared)
        assert [group.frames for group in prepared.groups] == [None] * NIGHT
    assert [result.alert_id for result in made] == [alert.alert_id for alert in alerts]
    assert all(isinstance(result, Packet) for result in made)


def test_what_cannot_be_opened_ahead_costs_its_alerts_only(server: WebServer) -> None:
    """A set whose server fails is rejected with the server's error; the others become packets."""
    server.behaviours["/1-difference.fits"] = web.status(503)
    settings = settings_of(server)
    with FrameStore(settings.frames) as store:
        made = Enricher(settings, store).packets(batch(0) + batch(1) + batch(2))
    assert [isinstance(result, Reject) for result in made] == [False] * 3 + [True] * 3 + [False] * 3
    assert all("503" in str(result.error) for result in made if isinstance(result, Reject))


def tried_again(alerts: list[Alert], store: FrameStore, settings: Settings, most: int) -> list[list[Packet | Reject]]:
    """Return the results of attempts; each takes the alerts that are left, after the failures were forgotten."""
    attempts: list[list[Packet | Reject]] = []
    while alerts and len(attempts) < most:
        attempts.append(Enricher(settings, store).packets(alerts))
        alerts = [alert for alert, result in zip(alerts, attempts[-1], strict=True) if isinstance(result, Reject)]
        time.sleep(settings.frames.failure_ttl_s)
    return attempts


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        web.status(500),
        web.status(503, Retry_After="0"),
        web.reset,
        web.refuse,
        web.hang_up,
        web.garbage,
        web.silence,
        web.drip,
    ],
)
def test_flapping_server(server: WebServer, fault: web.Behaviour) -> None:
    """If every second request fails, each alert becomes a packet or is tried again, and soon all are packets."""
    settings = settings_of(server, read_s=0.1, total_s=0.15, failure_ttl_s=0.05)
    server.behaviours |= dict.fromkeys(server.files, web.in_turn(fault, web.serve))
    alerts = [alert for number in range(2) for alert in batch(number)]
    with FrameStore(settings.frames) as store:
        attempts = tried_again(alerts, store, settings, 30)
    results = [result for attempt in attempts for result in attempt]
    rejects = [result.error for result in results if isinstance(result, Reject)]
    assert rejects
    assert {type(error) for error in rejects} == {FrameUnavailable}
    packets = [result for result in results if isinstance(result, Packet)]
    assert sorted(packet.alert_id for packet in packets) == sorted(alert.alert_id for alert in alerts)
    server.behaviours.clear()
    with FrameStore(settings_of(server).frames) as store:
        calm = {
            packet.alert_id: packet
            for packet in Enricher(settings, store).packets(alerts)
            if isinstance(packet, Packet)
        }
    assert all(encode(packet) == encode(calm[packet.alert_id]) for packet in packets)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["down", "silent"])
def test_server_that_is_away_for_a_while(server: WebServer, how: str) -> None:
    """While a server is down, batches end at once and every alert is tried again; later all become packets."""
    alerts = [alert for number in range(NIGHT) for alert in batch(number)]
    with contextlib.ExitStack() as running:
        other = running.enter_context(WebServer())
        other.behaviours = dict.fromkeys(server.files, web.silence)
        if how == "down":
            running.close()
        settings = settings_of(other, read_s=0.2, failure_ttl_s=0.3, prefetch_threads=2)
        store = running.enter_context(FrameStore(settings.frames))
        start = time.monotonic()
        for _ in range(10):
            results = Enricher(settings, store).packets(alerts)
            assert [type(result.error) for result in results if isinstance(result, Reject)] == [FrameUnavailable] * 12
        assert time.monotonic() - start < 2.5
        if how == "down":
            other = running.enter_context(WebServer(other.server_port))
        other.behaviours, other.files = {}, server.files
        time.sleep(0.3)
        assert all(isinstance(result, Packet) for result in Enricher(settings, store).packets(alerts))


def test_slow_frames_cost_their_alerts_only(server: WebServer) -> None:
    """A few slow files do not make a server count as slow if it answers other requests meanwhile."""
    names = [f"/{i}.fits" for i in range(16)]
    server.files |= dict.fromkeys(names, server.files["/0-science.fits"])
    silent = names[1:15:2]
    server.behaviours |= dict.fromkeys(silent, web.silence)
    settings = settings_of(server, read_s=0.4)
    alerts = [Alert(name, x=150.0, y=240.0, fwhm=3.0, frames={"science": name[1:]}) for name in names]
    with FrameStore(settings.frames) as store:
        made = Enricher(settings, store).packets(alerts)
    assert [result.alert_id for result in made if isinstance(result, Reject)] == silent
