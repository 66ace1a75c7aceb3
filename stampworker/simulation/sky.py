"""The sky of the simulated night: stars and galaxies through a PSF, the matching kernel, the noise of the camera."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, special

Array = NDArray[np.float64]
Kernel = Sequence[tuple[float, Array, Array]]
"""A sum of separable parts: weight, profile along x, profile along y."""

MARGIN = 40  # the sky is drawn this much larger than the frame: sources beyond the edge, and no edge in the convolution
HALF = 15  # half-size of the box in which a star is drawn, pixels
REACH = 7  # half-size of the matching kernel, pixels

GAIN = 1.6  # electrons per adu
READ_NOISE = 7.0  # electrons
SKY = 400.0  # adu
SATURATION = 60_000.0  # adu

CLEAR = 15.0  # field sources keep this far from a candidate, pixels
STARS, GALAXIES = 400, 150  # per 1000 × 1000 pixels

# The template's PSF: a core, and a halo that one Gaussian would lack.
_PSF = ((0.87, 0.95), (0.13, 2.0))  # share, sigma in pixels


def noise_variance(light: Array) -> Array:
    """Return the variance of one exposure with this light, both in adu: Poisson noise of light and sky, read noise."""
    return (SKY + light + READ_NOISE**2 / GAIN) / GAIN


@dataclass
class Scene:
    """Noiseless planes in science adu without background, seen through the template's PSF; with margins."""

    static: Array
    template_only: Array
    science_only: Array


def draw_kernel(rng: np.random.Generator) -> Kernel:
    """Draw the kernel that matches the template's PSF to the science frame's: a core and a faint halo, sum 1."""
    x = np.arange(-REACH, REACH + 1)
    parts = []
    for weight, low, high in ((0.93, 0.65, 1.0), (0.07, 1.7, 2.0)):
        profiles = [_pixel_gaussian(x, 0.0, sigma) for sigma in rng.uniform(low, high, 2)]
        parts.append((weight, profiles[0] / profiles[0].sum(), profiles[1] / profiles[1].sum()))
    return parts


def convolve(plane: Array, kernel: Kernel) -> Array:
    """Convolve a plane with a kernel; outside, the plane is zero."""
    result = np.zeros_like(plane)
    for weight, along_x, along_y in kernel:
        rows = ndimage.convolve1d(plane, along_x, axis=1, mode="constant")
        result += weight * ndimage.convolve1d(rows, along_y, axis=0, mode="constant")
    return result


def squared(kernel: Kernel) -> Kernel:
    """Return the kernel that carries variances: the square of the kernel, pixel by pixel."""
    return [(w1 * w2, x1 * x2, y1 * y2) for w1, x1, y1 in kernel for w2, x2, y2 in kernel]


def _pixel_gaussian(x: NDArray[Any], centre: float, sigma: float) -> Array:
    """Integrate a unit Gaussian over each pixel."""
    edge = (np.append(x - 0.5, x[-1] + 0.5) - centre) / (sigma * math.sqrt(2))
    return np.asarray(0.5 * np.diff(special.erf(edge)))


def star(dx: float, dy: float) -> Array:
    """Draw a unit star in the template's PSF, (dx, dy) from the middle of its box."""
    x = np.arange(-HALF, HALF + 1)
    image = np.zeros((x.size, x.size))
    for share, sigma in _PSF:
        image += share * np.outer(_pixel_gaussian(x, dy, sigma), _pixel_gaussian(x, dx, sigma))
    return image


def galaxy(shape: Mapping[str, float], dx: float, dy: float, half: int) -> Array:
    """Draw a unit Sérsic galaxy in the template's PSF, (dx, dy) from the middle of its box."""
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


def draw_shape(radius: float, rng: np.random.Generator) -> dict[str, float]:
    """Draw the shape of a galaxy with a half-light radius in pixels: axis ratio, position angle, Sérsic index."""
    return {
        "radius": radius,
        "axis_ratio": rng.uniform(0.3, 1),
        "angle": rng.uniform(0, math.pi),
        "index": float(rng.choice([1.0, 1.5, 2.5])),
    }


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
    # Weighted by radius, because the area of a ring is proportional to it.
    shares, _ = optimize.nnls(
        radius[:, None] * np.exp(-0.5 * (radius[:, None] / sigma) ** 2) / (2 * np.pi * sigma**2), radius * profile
    )
    shares /= shares.sum()
    return tuple((float(w), float(s)) for w, s in zip(shares, sigma, strict=True) if w > 1e-4)


def fwhm_of(psf: Array) -> float:
    """Measure the FWHM from the area above half the peak, pixels."""
    fine = ndimage.zoom(psf, 10, order=3)
    return float(2 * math.sqrt(np.count_nonzero(fine > fine.max() / 2) / 100 / math.pi))


def _add(plane: Array, x: float, y: float, image: Callable[[float, float], Array], half: int, flux: float) -> None:
    """Add a source at (x, y) of the frame to a plane with margins."""
    column, row = math.floor(x + 0.5), math.floor(y + 0.5)
    left, low = column + MARGIN - half, row + MARGIN - half
    x0, x1 = max(left, 0), min(left + 2 * half + 1, plane.shape[1])
    y0, y1 = max(low, 0), min(low + 2 * half + 1, plane.shape[0])
    if x0 < x1 and y0 < y1:
        drawn = image(x - column, y - row)
        plane[y0:y1, x0:x1] += flux * drawn[y0 - low : y1 - low, x0 - left : x1 - left]


def add_star(plane: Array, x: float, y: float, flux: float) -> None:
    """Add a star at (x, y) of the frame to a plane with margins; flux in adu."""
    _add(plane, x, y, star, HALF, flux)


def add_galaxy(plane: Array, x: float, y: float, flux: float, shape: Mapping[str, float]) -> None:
    """Add a galaxy at (x, y) of the frame to a plane with margins; flux in adu."""
    half = math.ceil(5 * shape["radius"]) + 8
    _add(plane, x, y, lambda dx, dy: galaxy(shape, dx, dy, half), half, flux)


def draw_field(plane: Array, candidates: Array, rng: np.random.Generator) -> None:
    """Add stars, a power law in flux up to saturated ones, and galaxies to a plane with margins; flux in adu.

    They keep clear of the candidates: positions x, y on the frame, shape (n, 2).
    """
    low, high = -MARGIN, plane.shape[0] - MARGIN
    million = plane.size / 1e6

    def distance(x: float, y: float) -> float:
        return float(np.hypot(*(candidates - (x, y)).T).min())

    # dN/dF ~ F^-1.6 between S/N of about 4 and thirty times saturation, by inversion.
    faint, bright, slope = 400.0, 1.5e7, 0.6
    count = rng.poisson(STARS * million)
    draws = rng.random(count) * (faint**-slope - bright**-slope) + bright**-slope
    for flux, (x, y) in zip(draws ** (-1 / slope), rng.uniform(low, high, (count, 2)), strict=True):
        # A saturated star's trails and halo reach further.
        if distance(x, y) > (CLEAR if flux < 2e5 else 40.0):
            add_star(plane, x, y, flux)
    for x, y in rng.uniform(low, high, (rng.poisson(GALAXIES * million), 2)):
        shape = draw_shape(float(np.clip(rng.lognormal(math.log(2.5), 0.5), 1, 8)), rng)
        flux = 600.0 * rng.random() ** (-1 / 1.2) * shape["radius"] / 2.5
        if distance(x, y) > CLEAR + 2 * shape["radius"]:
            add_galaxy(plane, x, y, min(flux, 1e5), shape)


def box_around(shape: tuple[int, int], x: float, y: float, half: int) -> tuple[slice, slice]:
    """Return the part of a box around (x, y) that is on the frame, as slices [y, x]."""
    column, row = math.floor(x + 0.5), math.floor(y + 0.5)
    return (
        slice(max(row - half, 0), max(min(row + half + 1, shape[0]), 0)),
        slice(max(column - half, 0), max(min(column + half + 1, shape[1]), 0)),
    )
