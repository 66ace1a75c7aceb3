"""A small survey night with known truth: frames, alerts, and what each candidate really is.

Each frame is drawn once as a noiseless sky seen through the template's PSF. The science frame is that sky through the
matching kernel, with what changed in between; so stationary stars subtract to the noise, and whatever is left was put
there on purpose. Then both get their noise, and from there on everything is made as a pipeline makes it: the convolved
frame from the noisy template, the difference from the two, positions and S/N of the candidates from the difference.

What is idealised: the kernel is exact, the background is flat, and the error plane comes from the expected counts
rather than from the observed ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage, optimize, special
from tqdm import tqdm

from stampworker.errors import ConfigError

Array = NDArray[np.float64]

SHARES: Mapping[str, float] = {
    "transient-sky": 0.27,
    "transient-galaxy": 0.27,
    "dipole": 0.18,
    "scale-error": 0.14,
    "cosmic-ray": 0.05,
    "edge": 0.05,
    "masked": 0.04,
}
"""Classes of candidates, and how the candidates are shared out among them."""

MASK_BITS: Mapping[str, int] = {"saturated": 1, "bleed": 2, "template saturated": 4}
"""Bits of the mask plane."""

CELL = (
    44  # one candidate a cell: with the jitter, nearest neighbours are 34 pixels apart, outside the middle of a stamp
)
JITTER = 5.0
MARGIN = 40  # the sky is drawn this much larger than the frame: sources beyond the edge, and no edge in the convolution
CLEAR = 15.0  # field sources keep this far from a candidate

GAIN = 1.6  # electrons per adu
READ_NOISE = 7.0  # electrons
SKY = 400.0  # adu
SATURATION = 60_000.0  # adu
EXPOSURES = 20  # in the template: its noise is a few thousandths of the science frame's, and so is what it correlates
TEMPLATE_SCALE = 1 / 46.0  # template units per science adu
TEMPLATE_SKY = 3.1  # template units
STARS, GALAXIES = 400, 150  # per 1000 × 1000 pixels

# The template's PSF: a core, and a halo that one Gaussian would lack.
_PSF = ((0.87, 0.95), (0.13, 2.0))  # share, sigma in pixels
_HALF = 15  # half-size of the box in which a star is drawn, pixels
_REACH = 7  # half-size of the matching kernel, pixels


@dataclass(frozen=True)
class Night:
    """Files of a simulated night.

    Parameters
    ----------
    directory : Path
        The night's folder; frames in alerts are relative to it.
    frames : tuple of Path
        A folder per frame, with ``science.fits``, ``template.fits``, ``convolved.fits``, ``difference.fits``,
        ``error.fits`` and ``mask.fits``.
    alerts : Path
        ``alerts.jsonl``: one alert a line, schema ``stampworker.alert``.
    candidates : Path
        ``candidates.ecsv``: the same detections as a table (id, frame, x, y, ra, dec, mjd, fwhm, snr).
    truth : Path
        ``truth.ecsv``: what each candidate is, see `simulate`.
    """

    directory: Path
    frames: tuple[Path, ...]
    alerts: Path
    candidates: Path
    truth: Path


@dataclass
class _Source:
    """One candidate to be: what it is, where, and what it is made of."""

    kind: str
    case: str
    x: float  # on the science frame
    y: float
    snr: float  # wanted
    dx: float = math.nan
    dy: float = math.nan
    scale: float = math.nan
    flux: float = math.nan
    host: dict[str, float] = field(default_factory=dict)
    pixels: tuple[NDArray[Any], NDArray[Any], Array] | None = None  # of a cosmic ray: x, y, adu


@dataclass
class _Sky:
    """Noiseless planes in science adu without background, seen through the template's PSF; with margins."""

    static: Array
    template_only: Array
    science_only: Array


def simulate(
    directory: str | Path,
    *,
    frames: int = 1,
    size: int = 1024,
    candidates: int = 60,
    seed: int = 1,
    progress: bool = False,
) -> Night:
    """Write a survey night with known truth.

    Parameters
    ----------
    directory : str or Path
        Folder to write; made where absent, must be empty.
    frames : int
        Number of frames (pointings), each with its own template, seeing and WCS.
    size : int
        Side of a frame, pixels; at least 256.
    candidates : int
        Candidates of all frames together; `capacity` says how many fit.
    seed : int
        The same seed and sizes give the same bytes.
    progress : bool
        Show a progress bar where standard error is a terminal.

    Returns
    -------
    night : Night

    Raises
    ------
    ConfigError
        ``directory`` is not empty.
    ValueError
        ``frames``, ``size``, ``candidates`` or ``seed`` is out of range.

    Notes
    -----
    Classes (``class`` in the truth) and what their S/N (``snr``) is: S/N = sqrt(Σ (signal / error)²) over the pixels,
    where signal is the noiseless difference that the candidate leaves and error the error plane. For a point source
    that is the S/N of the matched filter; for a dipole or a scale error that of its residual.

    - ``transient-sky``, ``transient-galaxy``: point sources of S/N 3 to 100, evenly in log. A galaxy has a half-light
      radius of 1 to 3 FWHM, 0.3 to 10 times the transient's flux, and the transient anywhere within that radius.
    - ``dipole``: a star that stands (``dx``, ``dy``) further on the science frame than on the template, by 0.1 to
      0.9 pixel, residual S/N 5 to 100.
    - ``scale-error``: a star ``scale`` times as bright as the template says, off by 2 to 15 % either way, residual
      S/N 5 to 100 as far as an unsaturated star allows.
    - ``cosmic-ray``: a hit or short track on the science frame, not masked, S/N 5 to 100.
    - ``edge``: transients at half-integer positions, at the frame's edge, over it and wholly off it (``case``).
    - ``masked``: saturated stars (mask not 0 in the middle of the stamp).

    Positions and ``extra.snr`` of the alerts are measured on the difference (the highest |S/N| of the matched filter
    within a FWHM), so they have a detection's errors; a dipole's lies on its stronger lobe. Those of ``edge`` and
    ``masked`` candidates are given.
    """
    _check(frames, size, candidates, seed)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ConfigError(f"{directory}: is not empty; a night is written to a new folder")
    kinds = _share_out(candidates, np.random.default_rng([seed, 0]))
    alerts: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    folders = []
    with tqdm(total=candidates, desc="simulate", unit="candidate", disable=None if progress else True) as bar:
        for number, share in enumerate(np.array_split(np.array(kinds, dtype=object), frames), start=1):
            folder = directory / f"frame-{number:02d}"
            folder.mkdir()
            folders.append(folder)
            rows = _simulate_frame(folder, list(share), size, number, np.random.default_rng([seed, number]))
            for alert, facts in rows:
                name = f"sim{seed}-{len(alerts) + 1:05d}"
                alerts.append({"alertId": name, "objectId": f"SIM{seed}-{len(alerts) + 1:05d}", **alert})
                rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in facts.items()}
                truth.append({"alertId": name, "frame": folder.name, **rounded})
            bar.update(len(share))
    night = Night(
        directory, tuple(folders), directory / "alerts.jsonl", directory / "candidates.ecsv", directory / "truth.ecsv"
    )
    _write_tables(night, alerts, truth)
    return night


def capacity(size: int) -> int:
    """Return how many candidates fit on one frame without one entering another's neighbourhood.

    Parameters
    ----------
    size : int
        Side of the frame, pixels.

    Returns
    -------
    number : int
    """
    return max(0, (size - 2 * MARGIN) // CELL) ** 2


def _check(frames: int, size: int, candidates: int, seed: int) -> None:
    if frames < 1:
        raise ValueError(f"frames: found {frames}, wanted at least 1")
    if size < 256:
        raise ValueError(f"size: found {size}, wanted at least 256 pixels")
    if seed < 0:
        raise ValueError(f"seed: found {seed}, wanted 0 or more")
    if not 1 <= candidates <= frames * capacity(size):
        raise ValueError(
            f"candidates: found {candidates}, wanted 1 to {frames * capacity(size)} "
            f"({capacity(size)} on each of {frames} frames of {size} × {size} pixels)"
        )


def _share_out(number: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Class and place in the class's range of S/N (0 to 1) of every candidate, shuffled: ids tell nothing."""
    exact = np.array(list(SHARES.values())) * number
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: number - counts.sum()]] += 1
    all_of_them = [
        (kind, float((i + rng.random()) / count))
        for kind, count in zip(SHARES, counts, strict=True)
        for i in rng.permutation(count)
    ]
    return [all_of_them[i] for i in rng.permutation(len(all_of_them))]


# ---------------------------------------------------------------------------------------------------- one frame


def _simulate_frame(
    folder: Path, kinds: Sequence[tuple[str, float]], size: int, number: int, rng: np.random.Generator
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Draw and write one frame set; return its candidates as (alert, truth), sorted by y as a detector finds them."""
    kernel = _kernel(rng)
    psf = _convolve(_star(0.0, 0.0), kernel)
    fwhm = _fwhm(psf)
    sources = [_design(kind, place, psf, kernel, fwhm, rng) for kind, place in kinds]
    _place(sources, size, rng)
    sky = _Sky(*(np.zeros((size + 2 * MARGIN,) * 2) for _ in range(3)))
    _draw_field(sky.static, sources, rng)
    for source in sources:
        _draw(sky, source)
    planes = _observe(sky, sources, kernel, rng)
    clean = _clean_difference(sky, sources, kernel)
    header = _header(number, size, fwhm)
    _write_frames(folder, planes, header)
    rows = []
    for source in sorted(sources, key=lambda s: (s.y, s.x)):
        alert = _alert(source, planes, psf, header)
        alert["frames"] = {name: f"{folder.name}/{name}.fits" for name in planes}
        rows.append((alert, _facts(source, clean, planes["error"], fwhm)))
    return rows


def _kernel(rng: np.random.Generator) -> list[tuple[float, Array, Array]]:
    """Draw the PSF-matching kernel: (weight, profile along x, profile along y), a core and a faint halo, sum 1."""
    x = np.arange(-_REACH, _REACH + 1)
    parts = []
    for weight, low, high in ((0.93, 0.65, 1.0), (0.07, 1.7, 2.0)):
        profiles = [_pixel_gaussian(x, 0.0, sigma) for sigma in rng.uniform(low, high, 2)]
        parts.append((weight, profiles[0] / profiles[0].sum(), profiles[1] / profiles[1].sum()))
    return parts


def _convolve(plane: Array, kernel: Sequence[tuple[float, Array, Array]]) -> Array:
    """Convolve a plane that is zero outside with a kernel that is a sum of separable parts."""
    result = np.zeros_like(plane)
    for weight, along_x, along_y in kernel:
        rows = ndimage.convolve1d(plane, along_x, axis=1, mode="constant")
        result += weight * ndimage.convolve1d(rows, along_y, axis=0, mode="constant")
    return result


def _squared(kernel: Sequence[tuple[float, Array, Array]]) -> list[tuple[float, Array, Array]]:
    """Return the kernel that carries variances: the square of the kernel, pixel by pixel."""
    return [(w1 * w2, x1 * x2, y1 * y2) for w1, x1, y1 in kernel for w2, x2, y2 in kernel]


def _pixel_gaussian(x: NDArray[Any], centre: float, sigma: float) -> Array:
    """Integrate a unit Gaussian over each pixel."""
    edge = (np.append(x - 0.5, x[-1] + 0.5) - centre) / (sigma * math.sqrt(2))
    return np.asarray(0.5 * np.diff(special.erf(edge)))


def _star(dx: float, dy: float) -> Array:
    """Draw a unit star in the template's PSF, (dx, dy) off the middle of its box."""
    x = np.arange(-_HALF, _HALF + 1)
    image = np.zeros((x.size, x.size))
    for share, sigma in _PSF:
        image += share * np.outer(_pixel_gaussian(x, dy, sigma), _pixel_gaussian(x, dx, sigma))
    return image


def _galaxy(shape: Mapping[str, float], dx: float, dy: float, half: int) -> Array:
    """Draw a unit Sérsic galaxy in the template's PSF, (dx, dy) off the middle of its box."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    cos, sin = math.cos(shape["angle"]), math.sin(shape["angle"])
    along, across = (x - dx) * cos + (y - dy) * sin, (y - dy) * cos - (x - dx) * sin
    image = np.zeros(x.shape)
    for weight, width in _sersic(shape["index"]):
        for share, sigma in _PSF:
            # A pixel's own width adds 1/12 to the variance.
            a2 = (width * shape["radius"]) ** 2 + sigma**2 + 1 / 12
            b2 = (width * shape["radius"] * shape["axis_ratio"]) ** 2 + sigma**2 + 1 / 12
            norm = weight * share / (2 * math.pi * math.sqrt(a2 * b2))
            image += norm * np.exp(-0.5 * (along**2 / a2 + across**2 / b2))
    return image


@cache
def _sersic(index: float) -> tuple[tuple[float, float], ...]:
    """Write a Sérsic profile as a sum of Gaussians: (share of the flux, sigma / half-light radius).

    Such sums convolve exactly with a PSF that is a sum of Gaussians (Hogg & Lang 2013, PASP 125, 719); the shares are
    fitted here, out to four half-light radii.
    """
    radius = np.linspace(0.02, 4, 400)
    b = special.gammaincinv(2 * index, 0.5)
    profile = np.exp(-b * radius ** (1 / index))
    sigma = np.geomspace(0.05, 1.8, 9)
    # Weighted by radius: rings of equal width count by their area, near enough.
    shares, _ = optimize.nnls(
        radius[:, None] * np.exp(-0.5 * (radius[:, None] / sigma) ** 2) / (2 * np.pi * sigma**2), radius * profile
    )
    shares /= shares.sum()
    return tuple((float(w), float(s)) for w, s in zip(shares, sigma, strict=True) if w > 1e-4)


def _fwhm(psf: Array) -> float:
    """Measure the FWHM from the area above half the peak, pixels."""
    fine = ndimage.zoom(psf, 10, order=3)
    return float(2 * math.sqrt(np.count_nonzero(fine > fine.max() / 2) / 100 / math.pi))


def _add(plane: Array, x: float, y: float, draw: Any, half: int, flux: float) -> None:
    """Add a source at (x, y) of the frame to a plane with margins."""
    column, row = math.floor(x + 0.5), math.floor(y + 0.5)
    left, low = column + MARGIN - half, row + MARGIN - half
    x0, x1 = max(left, 0), min(left + 2 * half + 1, plane.shape[1])
    y0, y1 = max(low, 0), min(low + 2 * half + 1, plane.shape[0])
    if x0 < x1 and y0 < y1:
        image = draw(x - column, y - row)
        plane[y0:y1, x0:x1] += flux * image[y0 - low : y1 - low, x0 - left : x1 - left]


def _add_star(plane: Array, x: float, y: float, flux: float) -> None:
    _add(plane, x, y, _star, _HALF, flux)


def _add_galaxy(plane: Array, x: float, y: float, flux: float, shape: Mapping[str, float]) -> None:
    half = math.ceil(5 * shape["radius"]) + 8
    _add(plane, x, y, lambda dx, dy: _galaxy(shape, dx, dy, half), half, flux)


# ------------------------------------------------------------------------------------------------ the candidates


def _design(
    kind: str, place: float, psf: Array, kernel: list[tuple[float, Array, Array]], fwhm: float, rng: np.random.Generator
) -> _Source:
    """Decide what a candidate is made of; its flux is what gives the S/N that its place in the range asks for."""
    low = 3.0 if kind.startswith("transient") else 5.0
    source = _Source(kind, "", math.nan, math.nan, low * (100 / low) ** place)
    brightest = 0.8 * SATURATION / _star(0, 0).max()  # unsaturated on the template too
    light = signal = psf
    if kind == "transient-galaxy":
        source.host = _host(fwhm, rng)
        light = psf + source.host["ratio"] * _convolve(
            _galaxy(source.host, -source.host["dx"], -source.host["dy"], _HALF), kernel
        )
    elif kind == "dipole":
        shift, angle = rng.uniform(0.1, 0.9), rng.uniform(0, 2 * math.pi)
        source.dx, source.dy, source.scale = shift * math.cos(angle), shift * math.sin(angle), 1.0
        signal = psf - _convolve(_star(-source.dx, -source.dy), kernel)
    elif kind == "scale-error":
        # A small error needs a bright star: draw among those that can leave the residual that is wanted.
        least = min(max(0.02, source.snr / 700), 0.14)
        source.dx, source.dy = 0.0, 0.0
        source.scale = 1 + rng.choice([-1, 1]) * math.exp(rng.uniform(math.log(least), math.log(0.15)))
        signal = psf * (source.scale - 1)
        light = psf * max(source.scale, 1.0)
    elif kind == "cosmic-ray":
        signal = light = _track(rng)
        rows, columns = np.nonzero(signal)
        source.pixels = (columns, rows, signal[rows, columns])
    elif kind == "masked":
        source.flux = brightest * 10 ** rng.uniform(0.5, 1.3)
        return source
    source.flux = _flux_for(source.snr, signal, light, brightest)
    return source


def _host(fwhm: float, rng: np.random.Generator) -> dict[str, float]:
    """Draw a host galaxy around a transient; (dx, dy) leads from the galaxy's centre to the transient."""
    shape = {
        "radius": rng.uniform(1, 3) * fwhm,
        "axis_ratio": rng.uniform(0.3, 1),
        "angle": rng.uniform(0, math.pi),
        "index": float(rng.choice([1.0, 1.5, 2.5])),
        "ratio": math.exp(rng.uniform(math.log(0.3), math.log(10))),
    }
    along, azimuth = math.sqrt(rng.random()) * shape["radius"], rng.uniform(0, 2 * math.pi)
    a, b = along * math.cos(azimuth), along * math.sin(azimuth) * shape["axis_ratio"]
    cos, sin = math.cos(shape["angle"]), math.sin(shape["angle"])
    return shape | {"dx": a * cos - b * sin, "dy": a * sin + b * cos}


def _track(rng: np.random.Generator) -> Array:
    """Draw a cosmic ray's track, one to six pixels, in a star's box; sum 1."""
    image = np.zeros((2 * _HALF + 1,) * 2)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0, 5)
    for t in np.arange(0, length + 0.5, 0.5):
        image[_HALF + math.floor(t * math.sin(angle) + 0.5), _HALF + math.floor(t * math.cos(angle) + 0.5)] += (
            rng.uniform(0.5, 1)
        )
    return np.asarray(image / image.sum())


def _flux_for(snr: float, signal: Array, light: Array, brightest: float) -> float:
    """Find the flux, adu, at which the signal reaches the S/N; the brightest where even that does not."""
    noise = (SKY + (READ_NOISE**2) / GAIN) / GAIN

    def excess(log_flux: float) -> float:
        flux = math.exp(log_flux)
        return math.log(flux**2 * float(np.sum(signal**2 / (noise + flux * light / GAIN))) / snr**2)

    if excess(math.log(brightest)) <= 0:
        return brightest
    return math.exp(optimize.brentq(excess, math.log(1e-3), math.log(brightest), xtol=1e-6))


def _place(sources: Sequence[_Source], size: int, rng: np.random.Generator) -> None:
    """Give each candidate a cell of its own, or a place at the edge of the frame."""
    side = (size - 2 * MARGIN) // CELL
    cells = rng.permutation(side * side)
    at_edge = [s for i, s in enumerate(s for s in sources if s.kind == "edge") if i % 4]
    for source, cell in zip(sources, cells, strict=False):
        row, column = divmod(int(cell), side)
        source.x = MARGIN + CELL * (column + 0.5) + rng.uniform(-JITTER, JITTER)
        source.y = MARGIN + CELL * (row + 0.5) + rng.uniform(-JITTER, JITTER)
        if source.kind == "edge":
            source.case = "half-integer position"
            source.x, source.y = math.floor(source.x) + 0.5, math.floor(source.y) + 0.5
    for i, source in enumerate(at_edge):
        inset, source.case = ((0.3, "at the edge"), (-4.0, "over the edge"), (-60.0, "off the frame"))[i % 3]
        turn, along = divmod(4 * (i + 0.4) / len(at_edge), 1)
        across, along = (inset if turn < 2 else size - 1 - inset), along * size
        source.x, source.y = (across, along) if turn % 2 else (along, across)


def _draw_field(plane: Array, sources: Sequence[_Source], rng: np.random.Generator) -> None:
    """Add stars (a power law in flux, up to saturated ones) and galaxies, clear of the candidates."""
    low, high = -MARGIN, plane.shape[0] - MARGIN
    million = plane.size / 1e6
    taken = np.array([(s.x, s.y) for s in sources])

    def distance(x: float, y: float) -> float:
        return float(np.hypot(*(taken - (x, y)).T).min())

    # dN/dF ~ F^-1.6 between S/N of about 4 and thirty times saturation, by inversion.
    faint, bright, slope = 400.0, 1.5e7, 0.6
    count = rng.poisson(STARS * million)
    draws = rng.random(count) * (faint**-slope - bright**-slope) + bright**-slope
    for flux, (x, y) in zip(draws ** (-1 / slope), rng.uniform(low, high, (count, 2)), strict=True):
        # A saturated star's trails and halo reach further.
        if distance(x, y) > (CLEAR if flux < 2e5 else 40.0):
            _add_star(plane, x, y, flux)
    for x, y in rng.uniform(low, high, (rng.poisson(GALAXIES * million), 2)):
        shape = {
            "radius": float(np.clip(rng.lognormal(math.log(2.5), 0.5), 1, 8)),
            "axis_ratio": rng.uniform(0.3, 1),
            "angle": rng.uniform(0, math.pi),
            "index": float(rng.choice([1.0, 1.5, 2.5])),
        }
        flux = 600.0 * rng.random() ** (-1 / 1.2) * shape["radius"] / 2.5
        if distance(x, y) > CLEAR + 2 * shape["radius"]:
            _add_galaxy(plane, x, y, min(flux, 1e5), shape)


def _draw(sky: _Sky, source: _Source) -> None:
    """Add a candidate to the planes that show it; a cosmic ray is no light, see `_observe`."""
    x, y, flux = source.x, source.y, source.flux
    if source.kind == "dipole":
        _add_star(sky.science_only, x, y, flux)
        _add_star(sky.template_only, x - source.dx, y - source.dy, flux)
    elif source.kind == "scale-error":
        _add_star(sky.science_only, x, y, flux * source.scale)
        _add_star(sky.template_only, x, y, flux)
    elif source.kind == "masked":
        _add_star(sky.static, x, y, flux)
    elif source.kind != "cosmic-ray":
        _add_star(sky.science_only, x, y, flux)
        if source.host:
            host = source.host
            _add_galaxy(sky.static, x - host["dx"], y - host["dy"], flux * host["ratio"], host)


# ------------------------------------------------------------------------------------------------- the exposure


def _observe(
    sky: _Sky, sources: Sequence[_Source], kernel: list[tuple[float, Array, Array]], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Expose both frames, saturate them, and subtract: the planes of one frame set, without margins."""
    light = _convolve(sky.static + sky.science_only, kernel)
    science_variance = (SKY + light + READ_NOISE**2 / GAIN) / GAIN
    electrons = rng.poisson(GAIN * (SKY + light)) + rng.normal(0, READ_NOISE, light.shape)
    science = electrons / GAIN
    for source in sources:
        if source.pixels is not None:
            columns, rows, share = source.pixels
            column, row = (math.floor(c + 0.5) - _HALF + MARGIN for c in (source.x, source.y))
            np.add.at(science, (rows + row, columns + column), source.flux * share)
    deep = sky.static + sky.template_only
    template_variance = (SKY + deep + READ_NOISE**2 / GAIN) / GAIN / EXPOSURES
    template = deep + rng.normal(0, 1, deep.shape) * np.sqrt(template_variance)
    lost = deep > SATURATION
    template[lost] = SATURATION
    mask = _saturate(science)
    mask[_grow(lost, _REACH)] |= MASK_BITS["template saturated"]
    convolved = _convolve(template, kernel) + SKY
    inside = (slice(MARGIN, -MARGIN),) * 2
    return {
        "science": science[inside].astype(np.float32),
        "template": (template[inside] * TEMPLATE_SCALE + TEMPLATE_SKY).astype(np.float32),
        "convolved": convolved[inside].astype(np.float32),
        "difference": (science - convolved)[inside].astype(np.float32),
        # The template's share goes through the square of the kernel; what it correlates between pixels is left out,
        # being below 1 % of the variance on the sky.
        "error": np.sqrt(science_variance + _convolve(template_variance, _squared(kernel)))[inside].astype(np.float32),
        "mask": mask[inside],
    }


def _saturate(science: Array) -> NDArray[np.uint8]:
    """Clip full pixels in place, let their charge bleed along the columns, and return the mask."""
    mask = np.zeros(science.shape, np.uint8)
    full = science > SATURATION
    mask[full] = MASK_BITS["saturated"]
    labels, _ = ndimage.label(full, np.ones((3, 3)))
    for region in ndimage.find_objects(labels):
        rows = region[0]
        for column in range(region[1].start, region[1].stop):
            excess = float(np.sum(np.maximum(science[rows, column] - SATURATION, 0)))
            reach = math.ceil(min(excess / SATURATION, 24) / 2)
            if reach:
                trail = slice(max(rows.start - reach, 0), rows.stop + reach)
                science[trail, column] = np.maximum(science[trail, column], 0.97 * SATURATION)
                mask[trail, column] |= MASK_BITS["bleed"]
    # The neighbours of full pixels are not linear any more.
    near = _grow(mask > 0, 1)
    mask[near & (mask == 0)] = MASK_BITS["saturated"]
    np.minimum(science, SATURATION, out=science)
    return mask


def _grow(plane: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    return np.asarray(ndimage.maximum_filter(plane, 2 * reach + 1))


def _clean_difference(sky: _Sky, sources: Sequence[_Source], kernel: list[tuple[float, Array, Array]]) -> Array:
    """Return the noiseless difference: what the candidates leave, without margins."""
    clean = _convolve(sky.science_only - sky.template_only, kernel)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    for source in sources:
        if source.pixels is not None:
            columns, rows, share = source.pixels
            column, row = (math.floor(c + 0.5) - _HALF for c in (source.x, source.y))
            np.add.at(clean, (rows + row, columns + column), source.flux * share)
    return clean


def _box(shape: tuple[int, int], x: float, y: float, half: int) -> tuple[slice, slice]:
    """Return the part of a box around (x, y) that lies on the frame, as [y, x]."""
    column, row = math.floor(x + 0.5), math.floor(y + 0.5)
    return (
        slice(max(row - half, 0), max(min(row + half + 1, shape[0]), 0)),
        slice(max(column - half, 0), max(min(column + half + 1, shape[1]), 0)),
    )


def _detect(x: float, y: float, planes: Mapping[str, NDArray[Any]], psf: Array) -> tuple[float, float, float]:
    """Measure where |S/N| of the matched filter is highest within a FWHM, and the S/N there, as a pipeline would."""
    box = _box(planes["error"].shape, x, y, 2 * _HALF)
    weight = np.where(planes["mask"][box] == 0, planes["error"][box].astype(float) ** -2, 0)
    core = psf[_HALF - 6 : _HALF + 7, _HALF - 6 : _HALF + 7][::-1, ::-1]
    signal = ndimage.convolve(weight * planes["difference"][box], core, mode="constant")
    noise = np.sqrt(ndimage.convolve(weight, core**2, mode="constant"))
    snr = np.divide(signal, noise, out=np.zeros_like(signal), where=noise > 0)
    rows, columns = np.indices(snr.shape)
    away = np.hypot(columns + box[1].start - x, rows + box[0].start - y)
    row, column = np.unravel_index(np.argmax(np.where(away <= _fwhm(psf), np.abs(snr), -1)), snr.shape)
    peak = snr[row - 1 : row + 2, column - 1 : column + 2]
    dx, dy = (_vertex(*np.abs(line)) for line in (peak[1], peak[:, 1]))
    return float(column + box[1].start + dx), float(row + box[0].start + dy), float(snr[row, column])


def _vertex(left: float, middle: float, right: float) -> float:
    """Return where the parabola through three points has its top, between −0.5 and 0.5."""
    curvature = 2 * middle - left - right
    return float(np.clip(0.5 * (right - left) / curvature, -0.5, 0.5)) if curvature > 0 else 0.0


# --------------------------------------------------------------------------------------------------- the files


def _header(number: int, size: int, fwhm: float) -> fits.Header:
    """Write the header that the planes of a frame set share: TAN WCS with east to the left, exposure, detector."""
    header = fits.Header()
    angle, step = math.radians(1.7 * number), 1.01 / 3600
    mjd = 61368.0625 + 90 / 86400 * number
    start = Time(mjd - 30 / 86400, format="mjd", scale="utc")
    wcs = {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CUNIT1": "deg",
        "CUNIT2": "deg",
        "CRVAL1": 150.1 + 0.6 * number,
        "CRVAL2": 2.2 - 0.1 * number,
        "CRPIX1": size / 2 + 3.25,
        "CRPIX2": size / 2 - 7.5,
        "CD1_1": -step * math.cos(angle),
        "CD1_2": step * math.sin(angle),
        "CD2_1": step * math.sin(angle),
        "CD2_2": step * math.cos(angle),
        "RADESYS": "ICRS",
    }
    for key, value in wcs.items():
        header[key] = value
    header["OBJECT"] = f"field {number:03d}"
    header["INSTRUME"] = "simulated"
    header["FILTER"] = "r"
    header["EXPTIME"] = (60.0, "[s]")
    header["TIMESYS"] = "UTC"
    header["DATE-OBS"] = (start.isot, "start of the exposure")
    header["MJD-OBS"] = (start.mjd, "[d] start of the exposure")
    header["MJD"] = (mjd, "[d] middle of the exposure")
    header["FWHM"] = (round(fwhm, 3), "[pixel] of the science PSF")
    return header


def _plane_header(name: str, common: fits.Header) -> fits.Header:
    header = common.copy()
    if name == "mask":
        for meaning, bit in MASK_BITS.items():
            header[f"MASK{bit}"] = (meaning, f"value {bit}")
        return header
    if name == "template":
        header["BUNIT"] = "electron/s"
        header["NCOMBINE"] = (EXPOSURES, "exposures in this co-add")
        header["EXPTIME"] = (60.0 * EXPOSURES, "[s] of all exposures")
        header["MJD"] = (header["MJD"] - 40.5, "[d] middle of the exposures")
        header["FWHM"] = (round(_fwhm(_star(0, 0)), 3), "[pixel] of the template PSF")
        for key in ("DATE-OBS", "MJD-OBS"):
            del header[key]
        # Electrons per unit for Poisson noise: a co-add of many exposures on another flux scale.
        header["GAIN"] = (GAIN * EXPOSURES / TEMPLATE_SCALE, "electrons per unit")
        header["SATURATE"] = (SATURATION * TEMPLATE_SCALE + TEMPLATE_SKY, "[electron/s]")
        return header
    header["BUNIT"] = "adu"
    header["GAIN"] = (GAIN, "[electron/adu]")
    header["RDNOISE"] = (READ_NOISE, "[electron]")
    if name == "science":
        header["SATURATE"] = (SATURATION, "[adu]")
    return header


def _write_frames(folder: Path, planes: Mapping[str, NDArray[Any]], header: fits.Header) -> None:
    for name, plane in planes.items():
        fits.PrimaryHDU(plane, _plane_header(name, header)).writeto(folder / f"{name}.fits")


def _alert(source: _Source, planes: Mapping[str, NDArray[Any]], psf: Array, header: fits.Header) -> dict[str, Any]:
    """Return what a detection pipeline says of the candidate."""
    x, y, extra = source.x, source.y, {}
    if source.kind not in ("edge", "masked"):
        x, y, snr = _detect(x, y, planes, psf)
        extra = {"snr": round(snr, 3)}
    if source.case != "half-integer position":
        x, y = round(x, 4), round(y, 4)
    ra, dec = WCS(header).all_pix2world(x, y, 0)
    return {
        "x": x,
        "y": y,
        "ra": round(float(ra), 7),
        "dec": round(float(dec), 7),
        "mjd": header["MJD"],
        "mjdScale": "utc",
        "fwhm": header["FWHM"],
        "gain": GAIN,
        "extra": extra,
    }


def _facts(source: _Source, clean: Array, error: NDArray[Any], fwhm: float) -> dict[str, Any]:
    """Return the truth about a candidate; S/N from the noiseless difference and the error plane."""
    box = _box(clean.shape, source.x, source.y, _HALF)
    snr = math.nan if source.kind == "masked" else float(np.sqrt(np.sum((clean[box] / error[box]) ** 2)))
    host = source.host
    return {
        "class": source.kind,
        "case": source.case,
        "x": source.x,
        "y": source.y,
        "snr": snr,
        "flux": source.flux,
        "dx": source.dx,
        "dy": source.dy,
        "scale": source.scale,
        "hostRatio": host.get("ratio", math.nan),
        "hostRadius": host.get("radius", math.nan) / fwhm,
        "hostOffset": math.hypot(host.get("dx", math.nan), host.get("dy", math.nan)),
    }


_TRUTH: Mapping[str, tuple[Any, str]] = {
    "alertId": (None, "of the alert"),
    "frame": (None, "folder of the frame set"),
    "class": (None, "what the candidate is"),
    "case": (None, "which edge case"),
    "x": (u.pix, "true column on the science frame, 0-based"),
    "y": (u.pix, "true row on the science frame, 0-based"),
    "snr": (None, "sqrt(sum((signal / error)^2)) of the noiseless difference"),
    "flux": (u.adu, "of the transient, the star on the template, or the cosmic ray"),
    "dx": (u.pix, "shift along x from template to science"),
    "dy": (u.pix, "shift along y from template to science"),
    "scale": (None, "flux on the science frame over flux on the matched template"),
    "hostRatio": (None, "flux of the galaxy over flux of the transient"),
    "hostRadius": (None, "half-light radius of the galaxy over the FWHM"),
    "hostOffset": (u.pix, "transient from the galaxy's centre"),
}


def _write_tables(night: Night, alerts: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    lines = [json.dumps(alert, ensure_ascii=False, allow_nan=False) for alert in alerts]
    night.alerts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = Table(rows=[tuple(row[name] for name in _TRUTH) for row in truth], names=list(_TRUTH))
    for name, (unit, meaning) in _TRUTH.items():
        facts[name].info.unit = unit
        facts[name].info.description = meaning
    facts.write(night.truth, format="ascii.ecsv")
    columns: dict[str, list[Any]] = {"id": [a["alertId"] for a in alerts], "frame": [row["frame"] for row in truth]}
    columns |= {name: [a[name] for a in alerts] for name in ("x", "y", "ra", "dec", "mjd", "fwhm")}
    columns["snr"] = [a["extra"].get("snr", math.nan) for a in alerts]
    table = Table(columns)
    for name, unit in {"x": u.pix, "y": u.pix, "ra": u.deg, "dec": u.deg, "mjd": u.d, "fwhm": u.pix}.items():
        table[name].info.unit = unit
    table.write(night.candidates, format="ascii.ecsv")
