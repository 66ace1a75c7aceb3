"""The candidates of the simulated night: what each is, where it is, how bright it is, and the light that it adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from stampworker.simulation import sky
from stampworker.simulation.sky import GAIN, HALF, MARGIN, READ_NOISE, SATURATION, SKY, Array, Kernel, Scene

SHARES: Mapping[str, float] = {
    "transient-sky": 0.27,
    "transient-galaxy": 0.27,
    "dipole": 0.18,
    "scale-error": 0.14,
    "cosmic-ray": 0.05,
    "edge": 0.05,
    "masked": 0.04,
}
"""Classes of candidates, and the share of each."""

# Side of a cell, pixels. Each candidate has a cell of its own. Despite the jitter, the next candidate is at least 34
# pixels away, outside the middle of a stamp.
CELL = 44
JITTER = 5.0  # pixels


@dataclass
class Source:
    """A candidate before it is detected: its class, its position and what it is made of."""

    kind: str
    case: str
    x: float  # on the science frame
    y: float
    snr: float  # the wanted one
    dx: float = math.nan
    dy: float = math.nan
    scale: float = math.nan
    flux: float = math.nan
    host: dict[str, float] = field(default_factory=dict)
    pixels: tuple[NDArray[Any], NDArray[Any], Array] | None = None  # of a cosmic ray: x, y, share of the flux

    def draw(self, scene: Scene) -> None:
        """Add the flux of a candidate to the noiseless planes; `draw_track` adds a cosmic ray to the exposure."""
        x, y, flux = self.x, self.y, self.flux
        if self.kind == "dipole":
            sky.add_star(scene.science_only, x, y, flux)
            sky.add_star(scene.template_only, x - self.dx, y - self.dy, flux)
        elif self.kind == "scale-error":
            sky.add_star(scene.science_only, x, y, flux * self.scale)
            sky.add_star(scene.template_only, x, y, flux)
        elif self.kind == "masked":
            sky.add_star(scene.static, x, y, flux)
        elif self.kind != "cosmic-ray":
            sky.add_star(scene.science_only, x, y, flux)
            if self.host:
                host = self.host
                sky.add_galaxy(scene.static, x - host["dx"], y - host["dy"], flux * host["ratio"], host)

    def draw_track(self, plane: Array, margin: int) -> None:
        """Add the charge of a cosmic ray to a plane; other sources have none."""
        if self.pixels is not None:
            columns, rows, share = self.pixels
            column, row = (math.floor(centre + 0.5) - HALF + margin for centre in (self.x, self.y))
            np.add.at(plane, (rows + row, columns + column), self.flux * share)

    def truth(self, clean: Array, error: NDArray[Any], fwhm: float) -> dict[str, Any]:
        """Return the truth about a candidate; S/N from the noiseless difference and the error plane."""
        box = sky.box_around(clean.shape, self.x, self.y, HALF)
        snr = math.nan if self.kind == "masked" else float(np.sqrt(np.sum((clean[box] / error[box]) ** 2)))
        host = self.host
        return {
            "class": self.kind,
            "snr": snr,
            **{name: getattr(self, name) for name in ("case", "x", "y", "flux", "dx", "dy", "scale")},
            "hostRatio": host.get("ratio", math.nan),
            "hostRadius": host.get("radius", math.nan) / fwhm,
            "hostOffset": math.hypot(host.get("dx", math.nan), host.get("dy", math.nan)),
        }


def capacity(size: int) -> int:
    """Return how many candidates fit on one frame with a side of ``size`` pixels, each with a cell for itself."""
    return max(0, (size - 2 * MARGIN) // CELL) ** 2


def share_out(number: int, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draw the class of every candidate and its rank in that class's range of S/N, 0 to 1; in random order."""
    exact = np.array(list(SHARES.values())) * number
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: number - counts.sum()]] += 1
    kinds = [
        (kind, float((i + rng.random()) / count))
        for kind, count in zip(SHARES, counts, strict=True)
        for i in rng.permutation(count)
    ]
    return [kinds[i] for i in rng.permutation(number)]


def design(kind: str, rank: float, psf: Array, kernel: Kernel, fwhm: float, rng: np.random.Generator) -> Source:
    """Decide what a candidate is made of. Its rank (0 to 1) gives the S/N, and the S/N gives the flux."""
    low = 3.0 if kind.startswith("transient") else 5.0
    source = Source(kind, "", math.nan, math.nan, low * (100 / low) ** rank)
    brightest = 0.8 * SATURATION / sky.star(0, 0).max()  # unsaturated on the template too
    light = signal = psf
    if kind == "transient-galaxy":
        source.host = _host(fwhm, rng)
        light = psf + source.host["ratio"] * sky.convolve(
            sky.galaxy(source.host, -source.host["dx"], -source.host["dy"], HALF), kernel
        )
    elif kind == "dipole":
        shift, angle = rng.uniform(0.1, 0.9), rng.uniform(0, 2 * math.pi)
        source.dx, source.dy, source.scale = shift * math.cos(angle), shift * math.sin(angle), 1.0
        signal = psf - sky.convolve(sky.star(-source.dx, -source.dy), kernel)
    elif kind == "scale-error":
        # A small error leaves little of a star: draw only errors that can give the wanted residual.
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
    shape = sky.draw_shape(rng.uniform(1, 3) * fwhm, rng)
    shape["ratio"] = math.exp(rng.uniform(math.log(0.3), math.log(10)))
    along, azimuth = math.sqrt(rng.random()) * shape["radius"], rng.uniform(0, 2 * math.pi)
    a, b = along * math.cos(azimuth), along * math.sin(azimuth) * shape["axis_ratio"]
    cos, sin = math.cos(shape["angle"]), math.sin(shape["angle"])
    return shape | {"dx": a * cos - b * sin, "dy": a * sin + b * cos}


def _track(rng: np.random.Generator) -> Array:
    """Draw a cosmic ray's track, one to six pixels, in a star's box; sum 1."""
    image = np.zeros((2 * HALF + 1,) * 2)
    angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0, 5)
    for t in np.arange(0, length + 0.5, 0.5):
        image[HALF + math.floor(t * math.sin(angle) + 0.5), HALF + math.floor(t * math.cos(angle) + 0.5)] += (
            rng.uniform(0.5, 1)
        )
    return np.asarray(image / image.sum())


def _flux_for(snr: float, signal: Array, light: Array, brightest: float) -> float:
    """Find the flux, adu, at which the signal has the S/N; at most the brightest."""
    noise = (SKY + (READ_NOISE**2) / GAIN) / GAIN

    def excess(log_flux: float) -> float:
        flux = math.exp(log_flux)
        return math.log(flux**2 * float(np.sum(signal**2 / (noise + flux * light / GAIN))) / snr**2)

    if excess(math.log(brightest)) <= 0:
        return brightest
    return math.exp(optimize.brentq(excess, math.log(1e-3), math.log(brightest), xtol=1e-6))


def place_sources(sources: Sequence[Source], size: int, rng: np.random.Generator) -> None:
    """Give each candidate its position: in a cell of its own, or at the edge of the frame."""
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
