"""Enrichment: alerts in, packets out. It knows nothing of Kafka.

For each group of alerts with the same frames::

    1 resolve.Resolver       which frames show the candidate
    2 frames.FrameStore      the planes, each read by the section
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.stats import mad_std
from astropy.table import Table
from numpy.typing import NDArray
from pydantic import ValidationError

from stampworker.config import EnrichSettings, FitSettings, Settings
from stampworker.cutouts import adjust_cutout, compare_point_source, get_cutout, is_artefact
from stampworker.errors import AlertError, FrameError, FrameMismatch
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import CUTOUT_KEYS, METRICS, Packet, Stamp, StampWriter
from stampworker.formats.rejects import Reject
from stampworker.formats.tables import from_table, results_table
from stampworker.frames import Frame, FrameKey, FrameStore, PlaneKind, on_grid, sky_to_pixel
from stampworker.frames.urls import file_url
from stampworker.resolve import ALERT_ONLY, Resolver, load_resolver

log = logging.getLogger(__name__)

_Opened = Mapping[FrameKey, Future[Frame]]
_KINDS: dict[str, PlaneKind] = {"mask": "mask", "error": "error", "variance": "variance"}
_VERSION = version("stampworker")
# A pixel position beyond this is on no detector, and the corner of a section must be an integer.
_FARTHEST_PIXEL = 1e9


@dataclass(frozen=True)
class _FrameSet:
    """The frames of a group of alerts, all on the science frame's grid."""

    planes: dict[str, Frame]
    writers: dict[str, StampWriter]
    header_gain: float | None

    @property
    def science(self) -> Frame:
        return self.planes["science"]


@dataclass(frozen=True)
class _Candidate:
    """An alert with its pixel position on the science frame, and the first pixel of its stamp."""

    index: int
    alert: Alert
    x: float
    y: float
    x1: int
    y1: int


@dataclass
class _Group:
    """Alerts with the same frames; once these are open, the candidates whose position is known."""

    urls: dict[str, str]
    alerts: dict[int, Alert] = field(default_factory=dict)
    is_open: bool = False
    frames: _FrameSet | None = None
    candidates: list[_Candidate] = field(default_factory=list)


@dataclass
class Prefetched:
    """A batch whose frames are open as far as there is room for them, with the results so far by index."""

    groups: list[_Group]
    results: dict[int, Packet | Reject]


class Enricher:
    """Makes packets of alerts.

    Parameters
    ----------
    settings : Settings
        ``enrich``, ``fit``, ``verdict``, ``frames`` and, where no resolver is given, ``resolve``.
    store : FrameStore
        Opens the frames.
    resolver : Resolver, optional
        Finds the frames that alerts do not name; by default the one that the settings name.

    Raises
    ------
    ConfigError
        The resolver that the settings name cannot be loaded.
    """

    def __init__(self, settings: Settings, store: FrameStore, resolver: Resolver | None = None) -> None:
        self._settings, self._store = settings, store
        self._resolver = resolver or load_resolver(settings.resolve)
        self._radius = math.ceil(settings.enrich.radius)
        self._thresholds = settings.verdict.model_dump()
        self._adjust_settings = settings.fit.model_dump(exclude={"fwhm"}) | {
            f"artefact_{name}": value for name, value in self._thresholds.items()
        }

    def packets(self, alerts: Sequence[Alert | AlertError]) -> list[Packet | Reject]:
        """Make a packet, or a reject, of each alert.

        Parameters
        ----------
        alerts : sequence of Alert or AlertError
            A batch: alerts with the same frames are enriched together. An error is an alert that could not be decoded.

        Returns
        -------
        results : list of Packet or Reject
            In the order of the alerts.
        """
        return self.enrich(self.prefetch(alerts))

    def stream(self, batches: Iterable[Sequence[Alert | AlertError]]) -> Iterator[list[Packet | Reject]]:
        """Yield the results of batches; the frames of one batch are opened while the one before is enriched."""
        with ThreadPoolExecutor(1, "prefetch") as thread:
            current: Future[Prefetched] | None = None
            for batch in batches:
                upcoming = thread.submit(self.prefetch, batch)
                if current is not None:
                    yield self.enrich(current.result())
                current = upcoming
            if current is not None:
                yield self.enrich(current.result())

    def prefetch(self, alerts: Sequence[Alert | AlertError]) -> Prefetched:
        """Do what waits for disks and servers: find and open the frames of a batch, and fetch what its stamps need.

        It may run in another thread while `enrich` works on the batch before.

        """
        groups: dict[tuple[tuple[str, str], ...], _Group] = {}
        results: dict[int, Packet | Reject] = {}
        for index, alert in enumerate(alerts):
            if isinstance(alert, AlertError):
                results[index] = Reject(alert.alert_id, "decode", alert)
                continue
            fault = f"alert {alert.alert_id}: unexpected error of the resolver {self._resolver.name!r}"
            with _rejecting({index: alert}, "frames", fault, results):
                urls = tuple(sorted(self._resolver.frames(alert).items()))
                groups.setdefault(urls, _Group(dict(urls))).alerts[index] = alert
        prefetched = Prefetched(list(groups.values()), results)
        self._open_groups(prefetched.groups, results)
        return prefetched

    def enrich(self, prefetched: Prefetched) -> list[Packet | Reject]:
        """Make the packets and rejects of a batch, in the order of the alerts; its frames are released on the way."""
        results = prefetched.results
        for number, group in enumerate(prefetched.groups):
            if not group.is_open:
                self._open_groups(prefetched.groups[number:], results)
            frames, group.frames = group.frames, None
            if frames is None:  # every alert of the group is a reject
                continue
            for candidate in group.candidates:
                index, alert = candidate.index, candidate.alert
                fault = f"alert {alert.alert_id}: unexpected error"
                with self._store.allowance(), _rejecting({index: alert}, "enrich", fault, results):
                    results[index] = self._packet(candidate, frames)
        self._store.evict_unused()
        return [results[index] for index in sorted(results)]

    def _open_groups(self, groups: list[_Group], results: dict[int, Packet | Reject]) -> None:
        """Open the frames of the first groups, as many as may be open but at least one, and fetch what stamps need.

        Waiting for servers is shared: all of these frames are opened, then fetched, at the same time.
        """
        chosen: list[_Group] = []
        wanted: dict[FrameKey, None] = {}
        for group in groups:
            more = wanted | dict.fromkeys(FrameKey(url, plane == "mask") for plane, url in group.urls.items())
            if chosen and len(more) > self._settings.frames.max_open_frames:
                break
            chosen.append(group)
            wanted = more
        opened = self._store.open_many(wanted)
        for group in chosen:
            self._open_group(group, opened, results)
        side = 2 * self._radius + 1
        self._store.prefetch_sections(
            (group.frames.planes.values(), [(c.y1, c.y1 + side, c.x1, c.x1 + side) for c in group.candidates])
            for group in chosen
            if group.frames is not None
        )

    def _open_group(self, group: _Group, opened: _Opened, results: dict[int, Packet | Reject]) -> None:
        """Open the frames of a group and locate its candidates; what fails is a reject."""
        group.is_open = True
        with _rejecting(group.alerts, "frames", f"frames {', '.join(group.urls)}: unexpected error", results):
            planes = _open_planes(group.urls, self._store, opened)
            group.frames = _FrameSet(planes, _writers(planes, self._settings.enrich.gzip), _gain(planes["science"]))
        if group.frames is None:
            return
        for index, alert in group.alerts.items():
            with _rejecting({index: alert}, "enrich", f"alert {alert.alert_id}: unexpected error", results):
                x, y = self._position(alert, group.frames.science)
                # Halves round up.
                x1, y1 = math.floor(x + 0.5) - self._radius, math.floor(y + 0.5) - self._radius
                group.candidates.append(_Candidate(index, alert, x, y, x1, y1))

    def _position(self, alert: Alert, science: Frame) -> tuple[float, float]:
        """Return x, y of the candidate on the science frame, pixels, 0-based."""
        by_sky = self._resolver.by_sky and alert.ra is not None and science.wcs is not None
        if alert.x is not None and alert.y is not None and not by_sky:
            (x, y), found = (alert.x, alert.y), f"x {alert.x}, y {alert.y}"
        elif alert.ra is None or alert.dec is None:
            raise AlertError("found no position, wanted x and y, or ra and dec")
        elif science.wcs is None:
            why = f"no usable WCS ({science.wcs_problem}), and alert {alert.alert_id!r} gives ra, dec only"
            raise FrameMismatch(science.url, why)
        else:
            (x, y), found = (
                sky_to_pixel(science.wcs, alert.ra, alert.dec, science.url),
                f"ra {alert.ra}, dec {alert.dec}",
            )
        if not (abs(x) < _FARTHEST_PIXEL and abs(y) < _FARTHEST_PIXEL):
            raise AlertError(f"position: found {found}, wanted one that the science frame's pixel grid can hold")
        return x, y

    def _packet(self, candidate: _Candidate, frames: _FrameSet) -> Packet:
        """Cut, derive, fit, assemble."""
        alert, settings = candidate.alert, self._settings
        for plane in settings.enrich.required_planes:
            if plane not in frames.planes:
                raise AlertError(f"frames: found no {plane!r}, which enrich.required_planes wants")
        cutout = _cut(candidate, frames, self._radius)
        every_flag = cutout.get("mask")
        if every_flag is not None and settings.enrich.mask_ignore_flags:
            cutout["mask"] = (every_flag.astype("i8") & ~settings.enrich.mask_ignore_flags) != 0
        origins = _derive(cutout, alert.gain or frames.header_gain)
        fwhm = alert.fwhm or settings.fit.fwhm
        inner = settings.fit.inner or _fit_box(fwhm, 2 * self._radius + 1)
        status = _fit(cutout, settings.fit, inner, candidate, frames.science.shape)
        is_fitted = status in ("ok", "at_bound")
        artefact = self._verdict(cutout, inner, fwhm) if is_fitted else None
        meta = cutout["meta"]
        return Packet(
            packet_id=alert.packet_id(),
            alert_id=alert.alert_id,
            object_id=alert.object_id,
            candidate={
                "x": candidate.x,
                "y": candidate.y,
                "ra": alert.ra,
                "dec": alert.dec,
                "mjd": alert.mjd,
                "mjdScale": alert.mjd_scale,
                "fwhm": alert.fwhm,
                "extra": alert.extra,
            },
            frames={plane: frame.url for plane, frame in frames.planes.items()},
            stamps=_stamps(cutout | {"mask": every_flag}, frames, candidate, is_fitted),
            metrics={name: meta[name] for name in METRICS if is_fitted and meta.get(name) is not None},
            adjust_status=status,
            adjust_artefact=artefact,
            adjust_settings=self._adjust_settings | {"inner": inner},
            convolved_origin=origins.get("convolved"),
            err_origin=origins.get("err"),
            resampled_planes=tuple(sorted(plane for plane, frame in frames.planes.items() if frame.resampled)),
            worker_version=_VERSION,
        )

    def _verdict(self, cutout: dict[str, Any], inner: int, fwhm: float) -> bool:
        """Return True if a fitted candidate is an artefact; only then does it pay to try a point source, too."""
        meta, settings = cutout["meta"], self._settings
        if not is_artefact(meta, **self._thresholds):
            return False
        # The template may be scaled as far as an artefact may be, not only as far as the fit. Otherwise a star whose
        # scale is off by more than the fit allows would look like a point source.
        max_scale = settings.verdict.max_scale
        compare_point_source(cutout, fwhm, max_shift=settings.fit.max_shift, max_scale=max_scale, inner=inner)
        return is_artefact(meta, **self._thresholds)


@contextlib.contextmanager
def _rejecting(
    alerts: Mapping[int, Alert], stage: str, fault: str, results: dict[int, Packet | Reject]
) -> Iterator[None]:
    """Reject alerts for an exception of the block, of whatever kind: no alert may stop the stream.

    ``fault`` is the log's line where the exception is a fault of the code or of another package's resolver.
    """
    try:
        yield
    except Exception as exc:
        if isinstance(exc, FrameError):
            stage = "frames"
        elif not isinstance(exc, AlertError):
            log.exception(fault)
        # A reject is kept for a while. The local variables of its traceback, bodies and decompressed frames, are not.
        chained: BaseException | None = exc
        seen: set[int] = set()  # an exception may be raised from itself
        while chained is not None and id(chained) not in seen:
            seen.add(id(chained))
            traceback.clear_frames(chained.__traceback__)
            chained = chained.__cause__ or chained.__context__
        results |= {index: Reject(alert.alert_id, stage, exc) for index, alert in alerts.items()}


def _open_planes(urls: Mapping[str, str], store: FrameStore, opened: _Opened | None = None) -> dict[str, Frame]:
    """Open frames and bring them onto the science frame's grid."""

    def frame(plane: str) -> Frame:
        key = FrameKey(urls[plane], plane == "mask")
        if opened is not None and key in opened:
            return opened[key].result()  # raises what opening it raised, without asking a server again
        return store.open(key.url, mask=key.is_mask)

    science = frame("science")
    others = (plane for plane in urls if plane != "science")
    return {"science": science} | {p: on_grid(frame(p), science, kind=_KINDS.get(p, "image")) for p in others}


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
    """Return GAIN of the header, electrons per unit; None where it is no number above 0."""
    try:
        gain = science.header.get("GAIN")
    except fits.VerifyError:  # a card that is not FITS
        return None
    usable = isinstance(gain, int | float) and not isinstance(gain, bool) and math.isfinite(gain) and gain > 0
    return float(gain) if usable else None


def _cut(candidate: _Candidate, frames: _FrameSet, radius: int) -> dict[str, Any]:
    """Cut the planes around a candidate; off the frame they are NaN and the mask is 1."""
    x1, y1, side = candidate.x1, candidate.y1, 2 * radius + 1
    others: dict[str, Any] = {CUTOUT_KEYS.get(p, p): frame for p, frame in frames.planes.items() if p != "science"}
    on_one_grid = {plane: frame for plane, frame in others.items() if not frame.resampled}
    cutout = get_cutout(frames.science, {"x": candidate.x, "y": candidate.y}, radius, **on_one_grid)
    for plane, frame in others.items():
        if frame.resampled:  # it may have data where the stamp extends beyond the science frame
            cutout[plane] = frame.window(y1, y1 + side, x1, x1 + side)
    if "mask" in cutout:
        mask, (ny, nx) = cutout["mask"], frames.science.shape
        mask[: max(-y1, 0)] = 1
        mask[:, : max(-x1, 0)] = 1
        mask[max(ny - y1, 0) :] = 1
        mask[:, max(nx - x1, 0) :] = 1
    return cutout


def _derive(cutout: dict[str, Any], gain: float | None) -> dict[str, str]:
    """Add the planes ``convolved`` and ``err`` that the fit needs and no frame has; return where they come from."""
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
    sigma = mad_std(values) if values.size else np.nan
    variance = np.where(np.isfinite(image), sigma**2, np.nan).astype(image.dtype)
    if gain is None or not values.size:
        return np.sqrt(variance), "background"
    # The sky's own Poisson noise is in sigma already, so only what is above the sky counts.
    variance += np.clip(image - np.median(image[good]), 0, None) / gain
    return np.sqrt(variance).astype(image.dtype, copy=False), "background+poisson"


def _fit_box(fwhm: float, stamp: int) -> int:
    """Return the side of the fitted box, pixels: two FWHM, odd, at least 7, at most the stamp."""
    side = max(math.ceil(min(2 * fwhm, stamp)), 7)
    return min(side + 1 - side % 2, stamp)


def _fit(cutout: dict[str, Any], fit: FitSettings, inner: int, candidate: _Candidate, shape: tuple[int, int]) -> str:
    """Fit the convolved template to a cutout; return the status."""
    ny, nx = cutout["image"].shape
    x1, y1 = candidate.x1, candidate.y1
    if x1 >= shape[1] or y1 >= shape[0] or x1 + nx <= 0 or y1 + ny <= 0:
        return "off_frame"
    if "convolved" not in cutout:
        return "no_convolved"
    adjust_cutout(cutout, max_shift=fit.max_shift, max_scale=fit.max_scale, inner=inner, fit_bg=fit.fit_bg)
    return str(cutout["meta"]["adjust_status"])


def _stamps(cutout: Mapping[str, Any], frames: _FrameSet, candidate: _Candidate, is_fitted: bool) -> dict[str, Stamp]:
    stamps = {}
    for plane, writer in frames.writers.items():
        data = cutout.get(CUTOUT_KEYS.get(plane, plane))
        if data is None or (plane == "adjusted" and not is_fitted):
            continue
        if plane == "adjusted":
            data = data.astype(cutout["image"].dtype, copy=False)
        stamps[plane] = writer.write(candidate.alert.alert_id, data, candidate.x1, candidate.y1)
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
        `stampworker.formats.tables.from_table`.
    frames : mapping, optional
        Plane (``science``, ``template``, ``difference``, ``convolved``, ``error``, ``variance``, ``mask``) → FITS file,
        relative to the working directory, or URL (``https:``, ``s3:``, ``memory:``, ...), with an optional ``#HDU``.
        The resolver finds the planes that are not named.
    radius : float, optional
        Half-size of a stamp, pixels; by default the settings', which is 31 where nothing else is set.
    columns : mapping, optional
        Name of the alert's field → name of the column, such as ``{"x": "X_IMAGE", "y": "Y_IMAGE"}``.
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
        `stampworker.formats.tables.from_table`.
    ConfigError
        The settings' resolver cannot be loaded.
    FrameError
        A frame cannot be read, or does not fit the science frame. The frames serve every row.
    ValueError
        ``radius`` or ``pixel_origin`` is out of range.

    Examples
    --------
    A star that is 0.3 pixels further right on the science frame than on the template is an artefact of the subtraction:

    >>> import tempfile
    >>> import numpy as np
    >>> from astropy.io import fits
    >>> from astropy.table import Table
    >>> y, x = np.mgrid[:80, :100]
    >>> noise = np.random.default_rng(1).normal(0, 3, (2, 80, 100))
    >>> template = 1000 * np.exp(-((x - 50) ** 2 + (y - 40) ** 2) / 8)
    >>> science = 1000 * np.exp(-((x - 50.3) ** 2 + (y - 40) ** 2) / 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     frames = {"science": f"{folder}/science.fits", "template": f"{folder}/template.fits"}
    ...     frames["difference"] = f"{folder}/difference.fits"
    ...     fits.writeto(frames["science"], science + noise[0])
    ...     fits.writeto(frames["template"], template + noise[1])
    ...     fits.writeto(frames["difference"], science - template + noise[0])
    ...     table, packets = enrich_table(Table({"x": [50.3], "y": [40.0]}), frames, radius=15)
    >>> print(f"{table['adjust_dx'][0]:.1f} {table['adjust_artefact'][0]}")
    0.3 True
    >>> packets[0].stamps["science"].data.shape
    (31, 31)
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
        results = Enricher(wanted, store, resolver).packets(alerts)
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
