"""Enrichment: alerts in, packets out. It knows nothing of Kafka.

For each group of alerts with the same frames::

    1 resolve.Resolver       which frames show the candidate
    2 frames.open            the planes, each read by the section
    3 frames.on_grid         every plane on the science frame's pixels
    4 cutouts.get_cutout     the planes around one candidate
    5 cutouts.adjust_cutout  shift and scale the convolved template
    6 packets.StampWriter    the planes as FITS
"""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS, NoConvergence
from numpy.typing import NDArray
from pydantic import ValidationError

from stampworker.config import EnrichSettings, FitSettings, Settings, VerdictSettings
from stampworker.cutouts import adjust_cutout, compare_point_source, get_cutout, is_artefact
from stampworker.errors import AlertError, FrameError, FrameMismatch
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import CUTOUT_KEYS, METRICS, Packet, Stamp, StampWriter
from stampworker.formats.rejects import Reject
from stampworker.formats.tables import from_table, results_table
from stampworker.frames import Frame, FrameKey, FrameStore, PlaneKind, celestial_frame, on_grid
from stampworker.frames.urls import scheme_of
from stampworker.resolve import ALERT_ONLY, Resolver, load_resolver

log = logging.getLogger(__name__)

_Ready = Mapping[FrameKey, Future[Frame]]
_NONE_READY: _Ready = {}
_KINDS: dict[str, PlaneKind] = {"mask": "mask", "error": "error", "variance": "variance"}
_VERSION = version("stampworker")
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
# The normal approximation to a position is lost far outside any detector; and a section's corner must be an integer.
_FARTHEST_PIXEL = 1e9


@dataclass(frozen=True)
class _FrameSet:
    """The frames of a group of alerts, all on the science frame's grid."""

    planes: dict[str, Frame]
    writers: dict[str, StampWriter]
    header_gain: float | None
    by_sky: bool

    @property
    def science(self) -> Frame:
        return self.planes["science"]


@dataclass
class _Group:
    """Alerts with the same frames."""

    urls: dict[str, str]
    members: list[int]
    opened: _FrameSet | Exception | None = None


@dataclass
class Prepared:
    """A batch whose frames are open as far as there is room for them; made by `prepare`, for `complete`."""

    alerts: Sequence[Alert | AlertError]
    groups: list[_Group]
    results: dict[int, Packet | Reject]
    by_sky: bool


def make_packets(
    alerts: Sequence[Alert | AlertError], store: FrameStore, settings: Settings, resolver: Resolver | None = None
) -> list[Packet | Reject]:
    """Make a packet, or a reject, of each alert.

    Parameters
    ----------
    alerts : sequence of Alert or AlertError
        A batch; alerts with the same frames are worked on together. An error stands for an alert that could not be
        decoded.
    store : FrameStore
        Where frames are opened.
    settings : Settings
        ``enrich``, ``fit``, ``verdict`` and, where no resolver is given, ``resolve``.
    resolver : Resolver, optional
        Gives the frames that alerts do not name; who makes many batches loads it once.

    Returns
    -------
    results : list of Packet or Reject
        In the order of the alerts.

    Raises
    ------
    ConfigError
        The settings' resolver cannot be loaded.
    """
    return complete(prepare(alerts, store, settings, resolver), store, settings)


def prepare(
    alerts: Sequence[Alert | AlertError], store: FrameStore, settings: Settings, resolver: Resolver | None = None
) -> Prepared:
    """Do what waits for disks and servers: find and open the frames of a batch, and fetch what its stamps need.

    It may run in another thread while `complete` works on the batch before.

    Parameters
    ----------
    alerts, store, settings, resolver
        As for `make_packets`.

    Returns
    -------
    prepared : Prepared

    Raises
    ------
    ConfigError
        The settings' resolver cannot be loaded.
    """
    resolver = resolver or load_resolver(settings.resolve)
    prepared = _grouped(alerts, resolver)
    _open_groups(prepared.groups, prepared, store, settings)  # the others when their turn comes
    return prepared


def complete(prepared: Prepared, store: FrameStore, settings: Settings) -> list[Packet | Reject]:
    """Make the packets and rejects of a batch.

    Parameters
    ----------
    prepared : Prepared
        What `prepare` returned; its frames are let go of one after another.
    store, settings
        As for `make_packets`.

    Returns
    -------
    results : list of Packet or Reject
        In the order of the alerts.
    """
    results, alerts = prepared.results, prepared.alerts
    for place, group in enumerate(prepared.groups):
        if group.opened is None:
            _open_groups(prepared.groups[place:], prepared, store, settings)
        opened, group.opened = group.opened, None
        for i in group.members:
            alert = alerts[i]
            if isinstance(opened, Exception):
                results[i] = Reject(alert.alert_id, "frames", opened)
            elif isinstance(alert, Alert) and opened is not None:  # as they all are
                with store.allowance():
                    results[i] = _packet_or_reject(alert, opened, settings)
    store.evict_unused()
    return [results[i] for i in range(len(alerts))]


def _grouped(alerts: Sequence[Alert | AlertError], resolver: Resolver) -> Prepared:
    groups: dict[tuple[tuple[str, str], ...], _Group] = {}
    results: dict[int, Packet | Reject] = {}
    for i, alert in enumerate(alerts):
        found = _frames_or_reject(alert, resolver)
        if isinstance(found, Reject):
            results[i] = found
        else:
            key = tuple(sorted(found.items()))
            groups.setdefault(key, _Group(dict(key), [])).members.append(i)
    return Prepared(alerts, list(groups.values()), results, resolver.by_sky)


def _open_groups(groups: list[_Group], prepared: Prepared, store: FrameStore, settings: Settings) -> None:
    """Open the frames of the first groups, as many as may be open but one group at least, and fetch what stamps need.

    What waits for servers is done for all of them together.
    """
    chosen: list[_Group] = []
    wanted: dict[FrameKey, None] = {}
    for group in groups:
        more = wanted | dict.fromkeys(FrameKey(url, plane == "mask") for plane, url in group.urls.items())
        if chosen and len(more) > settings.frames.max_open_frames:
            break
        chosen.append(group)
        wanted = more
    ready = store.open_many(wanted)
    for group in chosen:
        _open_group(group, ready, store, settings.enrich, prepared.by_sky)
    radius = math.ceil(settings.enrich.radius)
    store.prefetch_sections(
        (group.opened.planes.values(), _boxes(_alerts_of(group, prepared), group.opened, radius))
        for group in chosen
        if isinstance(group.opened, _FrameSet)
    )


def _open_group(group: _Group, ready: _Ready, store: FrameStore, settings: EnrichSettings, by_sky: bool) -> None:
    try:
        group.opened = _open(group.urls, store, settings, by_sky, ready)
    except Exception as exc:
        if not isinstance(exc, FrameError):  # a fault of ours; see _packet_or_reject
            log.exception("frames %s: unexpected error", ", ".join(group.urls))
        group.opened = _without_locals(exc)


def _alerts_of(group: _Group, prepared: Prepared) -> list[Alert]:
    return [alert for i in group.members if isinstance(alert := prepared.alerts[i], Alert)]


def _frames_or_reject(alert: Alert | AlertError, resolver: Resolver) -> Mapping[str, str] | Reject:
    if isinstance(alert, AlertError):
        return Reject(alert.alert_id, "decode", alert)
    try:
        return resolver.frames(alert)
    except Exception as exc:
        if not isinstance(exc, AlertError | FrameError):  # a fault of the resolver, perhaps of another package's
            log.exception("alert %s: unexpected error of the resolver %r", alert.alert_id, resolver.name)
        return Reject(alert.alert_id, "frames", exc)


def _packet_or_reject(alert: Alert, frames: _FrameSet, settings: Settings) -> Packet | Reject:
    try:
        return _make_packet(alert, frames, settings)
    except FrameError as exc:
        return Reject(alert.alert_id, "frames", _without_locals(exc))
    except AlertError as exc:
        return Reject(alert.alert_id, "enrich", exc)
    except Exception as exc:
        # A fault of ours must cost one alert, which is kept with its traceback, not stop the stream again and again.
        log.exception("alert %s: unexpected error", alert.alert_id)
        return Reject(alert.alert_id, "enrich", exc)


def _without_locals(exc: Exception) -> Exception:
    """Return an error that is kept: its traceback refers to no body, or decompressed frame, that came in part."""
    chained: BaseException | None = exc
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__cause__ or chained.__context__
    return exc


def _open(
    urls: Mapping[str, str], store: FrameStore, settings: EnrichSettings, by_sky: bool, ready: _Ready
) -> _FrameSet:
    planes = _open_planes(urls, store, ready)
    return _FrameSet(planes, _writers(planes, settings.gzip), _gain(planes["science"]), by_sky)


def _open_planes(urls: Mapping[str, str], store: FrameStore, ready: _Ready = _NONE_READY) -> dict[str, Frame]:
    """Open frames and bring them onto the science frame's grid."""

    def opened(plane: str) -> Frame:
        key = FrameKey(urls[plane], plane == "mask")
        # What failed a moment ago is not asked for once more.
        return ready[key].result() if key in ready else store.open(key.url, mask=key.is_mask)

    science = opened("science")
    planes = {"science": science}
    for plane in urls:
        if plane != "science":
            planes[plane] = on_grid(opened(plane), science, kind=_KINDS.get(plane, "image"))
    return planes


def _writers(planes: Mapping[str, Frame], gzip: bool) -> dict[str, StampWriter]:
    """Make the writers of all stamps; a derived plane has the science plane's grid and unit."""
    science = planes["science"]
    writers = {}
    for plane in ("science", "template", "difference", "convolved", "error", "mask", "adjusted"):
        frame = planes.get(plane, science)
        cards = science.wcs_cards() or frame.wcs_cards()
        writers[plane] = StampWriter(plane, cards, None if plane == "mask" else frame.bunit, gzip)
    return writers


def _gain(science: Frame) -> float | None:
    try:
        gain = science.header.get("GAIN")
    except fits.VerifyError:  # a card that is not FITS
        return None
    usable = isinstance(gain, int | float) and not isinstance(gain, bool) and math.isfinite(gain) and gain > 0
    return float(gain) if usable else None


def _make_packet(alert: Alert, frames: _FrameSet, settings: Settings) -> Packet:
    for plane in settings.enrich.required_planes:
        if plane not in frames.planes:
            raise AlertError(f"frames: found no {plane!r}, which enrich.required_planes wants")
    x, y = _position(alert, frames)
    radius = math.ceil(settings.enrich.radius)
    x1, y1 = _corner(x, y, radius)
    others: dict[str, Any] = {CUTOUT_KEYS.get(p, p): frame for p, frame in frames.planes.items() if p != "science"}
    on_one_grid = {plane: frame for plane, frame in others.items() if not frame.resampled}
    cutout = get_cutout(frames.science, {"x": x, "y": y}, radius, **on_one_grid)
    side = 2 * radius + 1
    for plane, frame in others.items():
        if frame.resampled:  # it may have data where the stamp hangs over the science frame's edge
            cutout[plane] = frame.window(y1, y1 + side, x1, x1 + side)
    if "mask" in cutout:
        _mask_off_frame(cutout["mask"], x1, y1, frames.science.shape)
    every_bit = cutout.get("mask")
    if every_bit is not None and settings.enrich.mask_ignore_flags:
        cutout["mask"] = (every_bit.astype("i8") & ~settings.enrich.mask_ignore_flags) != 0
    origins = _derive_planes(cutout, alert.gain or frames.header_gain)
    fit = _fit_settings(alert, settings.fit, 2 * radius + 1)
    status = _adjust(cutout, fit, (x1, y1), frames.science.shape)
    fitted = status in ("ok", "at_bound")
    artefact = _verdict(cutout, fit, settings.verdict, alert.fwhm or settings.fit.fwhm) if fitted else None
    metrics = {name: cutout["meta"][name] for name in METRICS if fitted and cutout["meta"].get(name) is not None}
    return Packet(
        packet_id=alert.packet_id(),
        alert_id=alert.alert_id,
        object_id=alert.object_id,
        candidate={
            "x": x,
            "y": y,
            "ra": alert.ra,
            "dec": alert.dec,
            "mjd": alert.mjd,
            "mjdScale": alert.mjd_scale,
            "fwhm": alert.fwhm,
            "extra": alert.extra,
        },
        frames={plane: frame.url for plane, frame in frames.planes.items()},
        stamps=_stamps(cutout | {"mask": every_bit}, frames, alert.alert_id, (x1, y1), fitted),
        metrics=metrics,
        adjust_status=status,
        adjust_artefact=artefact,
        adjust_settings={
            **fit.model_dump(exclude={"fwhm"}),
            **{f"artefact_{name}": value for name, value in settings.verdict},
        },
        convolved_origin=origins.get("convolved"),
        err_origin=origins.get("err"),
        resampled_planes=tuple(sorted(plane for plane, frame in frames.planes.items() if frame.resampled)),
        worker_version=_VERSION,
    )


def _position(alert: Alert, frames: _FrameSet) -> tuple[float, float]:
    """Return x, y of the candidate on the science frame, pixels, 0-based."""
    science = frames.science
    by_sky = frames.by_sky and alert.ra is not None and science.wcs is not None
    if alert.x is not None and alert.y is not None and not by_sky:
        x, y = alert.x, alert.y
    elif alert.ra is None or alert.dec is None:
        raise AlertError("found no position, wanted x and y, or ra and dec")
    elif science.wcs is None:
        why = f"no usable WCS ({science.wcs_problem}), and alert {alert.alert_id!r} gives ra, dec only"
        raise FrameMismatch(science.url, why)
    else:
        lon, lat = _lon_lat(science.url, science.wcs, alert.ra, alert.dec)
        x, y = _pixel(science.wcs, lon, lat)
    if not (abs(x) < _FARTHEST_PIXEL and abs(y) < _FARTHEST_PIXEL):
        pixels = alert.x is not None and not by_sky
        where = f"x {x}, y {y}" if pixels else f"ra {alert.ra}, dec {alert.dec}"
        raise AlertError(f"position: found {where}, wanted one that the science frame's pixel grid can hold")
    return x, y


def _corner(x: float, y: float, radius: int) -> tuple[int, int]:
    """Return the first pixel of the stamp around a position; halves round up."""
    return math.floor(x + 0.5) - radius, math.floor(y + 0.5) - radius


def _boxes(alerts: Sequence[Alert], frames: _FrameSet, radius: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``y0, y1, x0, x1`` of each alert's stamp; one without a position is told of when its packet is made."""
    side = 2 * radius + 1
    for alert in alerts:
        with contextlib.suppress(AlertError, FrameError):
            x1, y1 = _corner(*_position(alert, frames), radius)
            yield y1, y1 + side, x1, x1 + side


def _lon_lat(url: str, wcs: WCS, ra: float, dec: float) -> tuple[float, float]:
    """Return a place in ICRS in the system of a WCS, degrees."""
    if _is_equatorial(wcs):
        return ra, dec
    system = celestial_frame(wcs)
    if system is None:
        found = f"{wcs.wcs.ctype[wcs.wcs.lng][:4]} {wcs.wcs.radesys}".strip()
        problem = f"a WCS in {found}, wanted RA or GLON in a system in use for an alert that gives ra, dec only"
        raise FrameMismatch(url, problem)
    sky = SkyCoord(ra, dec, unit="deg").transform_to(system).spherical
    return float(sky.lon.deg), float(sky.lat.deg)


def _pixel(wcs: WCS, lon: float, lat: float) -> tuple[float, float]:
    """Return the pixel of a place in the system of a WCS; NaN where the projection has none."""
    world = (lon, lat) if wcs.wcs.lng < wcs.wcs.lat else (lat, lon)
    # Without distortions first: where that has no answer, neither has the iteration.
    x, y = (float(value) for value in wcs.wcs_world2pix(*world, 0))
    if not (math.isfinite(x) and math.isfinite(y)):
        return math.nan, math.nan
    try:
        x, y = (float(value) for value in wcs.all_world2pix(*world, 0))
    except NoConvergence:
        return math.nan, math.nan
    return x, y


def _is_equatorial(wcs: WCS) -> bool:
    """Tell whether a WCS is in ICRS or in FK5 J2000, as good as ICRS: 23 mas, less than headers can be trusted."""
    system = wcs.wcs.radesys.strip() in ("", "ICRS", "FK5") and not abs(wcs.wcs.equinox - 2000) > 0
    return bool(system and wcs.wcs.ctype[wcs.wcs.lng].startswith("RA--"))


def _mask_off_frame(mask: NDArray[Any], x1: int, y1: int, shape: tuple[int, int]) -> None:
    """Set to 1 what lies off the frame, where a cropped integer plane is 0."""
    mask[: max(-y1, 0)] = 1
    mask[:, : max(-x1, 0)] = 1
    mask[max(shape[0] - y1, 0) :] = 1
    mask[:, max(shape[1] - x1, 0) :] = 1


def _derive_planes(cutout: dict[str, Any], gain: float | None) -> dict[str, str]:
    """Add the planes ``convolved`` and ``err`` that the fit needs and no frame has; say where they come from."""
    origins = {}
    if "convolved" in cutout:
        origins["convolved"] = "frame"
    elif "diff" in cutout:
        cutout["convolved"] = cutout["image"] - cutout["diff"]
        origins["convolved"] = "science-difference"
    if "err" in cutout:
        origins["err"] = "error"
    elif "variance" in cutout:
        variance = cutout.pop("variance")
        cutout["err"] = np.sqrt(np.where(variance >= 0, variance, np.nan))
        origins["err"] = "variance"
    elif "convolved" in cutout:
        cutout["err"], origins["err"] = _noise(cutout, gain)
    return origins


def _noise(cutout: Mapping[str, Any], gain: float | None) -> tuple[NDArray[Any], str]:
    """Estimate the 1-sigma noise of a cutout: robust scatter of the difference, Poisson noise of the sources."""
    image = cutout["image"]
    good = np.isfinite(image)
    if "mask" in cutout:
        good &= cutout["mask"] == 0
    plane = cutout.get("diff", image)
    values = plane[good & np.isfinite(plane)]
    sigma = _MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))) if values.size else np.nan
    variance = np.where(np.isfinite(image), sigma**2, np.nan).astype(image.dtype)
    if gain is None or not values.size:
        return np.sqrt(variance), "background"
    # The sky's own Poisson noise is in sigma already, so only what is above the sky counts.
    variance += np.clip(image - np.median(image[good]), 0, None) / gain
    return np.sqrt(variance).astype(image.dtype, copy=False), "background+poisson"


def _fit_settings(alert: Alert, fit: FitSettings, stamp: int) -> FitSettings:
    """Choose the fitted box for the alert's PSF, at most the whole stamp, unless the settings do."""
    if fit.inner is not None:
        return fit
    side = max(math.ceil(min(2 * (alert.fwhm or fit.fwhm), stamp)), 7)
    return fit.model_copy(update={"inner": min(side + 1 - side % 2, stamp)})


def _adjust(cutout: dict[str, Any], fit: FitSettings, corner: tuple[int, int], shape: tuple[int, int]) -> str:
    """Fit the convolved template to a cutout; return the status."""
    ny, nx = cutout["image"].shape
    x1, y1 = corner
    if x1 >= shape[1] or y1 >= shape[0] or x1 + nx <= 0 or y1 + ny <= 0:
        return "off_frame"
    if "convolved" not in cutout:
        return "no_convolved"
    adjust_cutout(cutout, max_shift=fit.max_shift, max_scale=fit.max_scale, inner=fit.inner, fit_bg=fit.fit_bg)
    return str(cutout["meta"]["adjust_status"])


def _verdict(cutout: dict[str, Any], fit: FitSettings, verdict: VerdictSettings, fwhm: float) -> bool:
    """Judge a fitted cutout; the point source is weighed only where it can matter, for it costs two fits."""
    thresholds = verdict.model_dump()
    if not is_artefact(cutout["meta"], **thresholds):
        return False
    # The template may be scaled as far as an artefact may be, not only as far as the fit: else a star whose scale is
    # off by more than the fit allows would leave a point source.
    compare_point_source(cutout, fwhm, max_shift=fit.max_shift, max_scale=verdict.max_scale, inner=fit.inner)
    return is_artefact(cutout["meta"], **thresholds)


def _stamps(
    cutout: Mapping[str, Any], frames: _FrameSet, alert_id: str, corner: tuple[int, int], fitted: bool
) -> dict[str, Stamp]:
    stamps = {}
    for plane, writer in frames.writers.items():
        data = cutout.get(CUTOUT_KEYS.get(plane, plane))
        if data is None or (plane == "adjusted" and not fitted):
            continue
        if plane == "adjusted":
            data = data.astype(cutout["image"].dtype, copy=False)
        stamps[plane] = writer.write(alert_id, data, *corner)
    return stamps


def enrich_table(
    table: Table,
    frames: Mapping[str, str | Path] | None = None,
    radius: float | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    pixel_origin: int = 0,
    settings: Settings | None = None,
) -> tuple[Table, list[Packet | Reject]]:
    """Cut out and adjust every candidate of a table on one set of frames.

    Parameters
    ----------
    table : astropy.table.Table
        One row a candidate, with ``x, y`` (pixels, 0-based) or ``ra, dec`` (degrees, ICRS); see
        `stampworker.formats.alerts.from_table`.
    frames : mapping, optional
        Plane (``science``, ``template``, ``difference``, ``convolved``, ``error``, ``variance``, ``mask``) → FITS file,
        relative to the working directory, or URL (``https:``, ``s3:``, ``memory:``, ...), with an optional ``#HDU``.
        Those that are not named are the resolver's.
    radius : float, optional
        Half-size of a stamp, pixels; by default the settings', which is 31 where nothing else is set.
    columns : mapping, optional
        Name of ours → name of the column, such as ``{"x": "X_IMAGE", "y": "Y_IMAGE"}``.
    pixel_origin : {0, 1}, optional
        What the table calls the first pixel.
    settings : Settings, optional
        ``enrich``, ``fit``, ``verdict``, ``resolve``, and of ``frames`` the limits and, for a resolver, the roots.

    Returns
    -------
    table : astropy.table.Table
        A copy with the metrics; see `results_table`.
    packets : list of Packet or Reject
        One a row.

    Raises
    ------
    AlertError
        The table has no positions, or the frames are not those of an alert; see
        `stampworker.formats.alerts.from_table`.
    ConfigError
        The settings' resolver cannot be loaded.
    FrameError
        A frame cannot be read, or does not fit the science frame: that is wrong for every row.
    ValueError
        ``radius`` or ``pixel_origin`` is out of range.
    """
    if not isinstance(table, Table):
        raise ValueError(f"table: found {type(table).__name__}, wanted an astropy Table; Table.read reads a file")
    wanted = settings or Settings()
    if radius is not None:
        try:
            enrich = EnrichSettings.model_validate(wanted.enrich.model_dump() | {"radius": radius})
        except ValidationError as exc:
            raise ValueError(f"radius: found {radius!r}; {exc.errors()[0]['msg']}") from None
        wanted = wanted.model_copy(update={"enrich": enrich})
    resolver = load_resolver(wanted.resolve)
    files = frames or {}
    if resolver is ALERT_ONLY and "science" not in files:
        raise AlertError(f"frames: found {', '.join(files) or 'none'}, wanted at least science, or a resolver")
    urls = {plane: file_url(path) for plane, path in files.items()}
    alerts = from_table(table, urls, columns=columns, pixel_origin=pixel_origin)
    with FrameStore(wanted.frames, allowed=urls.values()) as store:
        check_frames(urls, store)
        results = make_packets(alerts, store, wanted, resolver)
    return results_table(table, results), results


def check_frames(urls: Mapping[str, str], store: FrameStore) -> None:
    """Open the frames that serve a whole table, before any work is done on it.

    Parameters
    ----------
    urls : mapping
        Plane → URL.
    store : FrameStore
        Keeps them open.

    Raises
    ------
    FrameError
        A frame cannot be read, or does not fit the science frame, where that is among them.
    """
    if "science" in urls:
        _open_planes(urls, store)
    else:
        for plane, url in urls.items():
            store.open(url, mask=plane == "mask")


def file_url(path: str | Path) -> str:
    """Return the ``file:`` URL of a FITS file, with the ``#HDU`` that may follow its path; a URL as it is."""
    if scheme_of(str(path)) is not None:
        return str(path)
    file, fragment = _split_hdu(path)
    return file.resolve().as_uri() + (f"#{quote(fragment, safe=',')}" if fragment else "")


def _split_hdu(path: str | Path) -> tuple[Path, str]:
    """Split ``FILE#HDU``; a file whose own name has the mark is taken as a whole."""
    file, mark, fragment = str(path).rpartition("#")
    return (Path(file), fragment) if mark and not Path(path).exists() else (Path(path), "")
