"""What the verdict calls an artefact in simulated stamps, by class and signal to noise.

    python tests/reference/verdict_study.py [--n 400] [--seed 1]

Stamps of 41 × 41 pixels: Moffat stars (beta 3.5), exponential galaxies seen through the same star, Poisson noise, a
template with faint noise that is smooth on the scale of the star; fits as in enrichment (max_shift 1, max_scale 1.1, a
box of two FWHM). The signal to noise is that of the noiseless residual, sqrt(sum((residual / err)²)). Dipoles and scale
errors are stars or galaxies; a dipole is centred on the stronger of its lobes, as a detection would be.
"""

from __future__ import annotations

import argparse
from math import ceil, floor
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from stampworker.cutouts import adjust_cutout, compare_point_source, is_artefact

SIZE = 63
MIDDLE = SIZE // 2
YY, XX = np.mgrid[0:SIZE, 0:SIZE].astype(float)
RULES = {
    "STDWeb's alone": {"min_delta_chi2": -np.inf, "max_point_delta_chi2": np.inf},
    "two conditions": {"max_point_delta_chi2": np.inf},
    "is_artefact": {},
}


def star(x: float, y: float, fwhm: float) -> Any:
    """Moffat profile of unit sum."""
    width = fwhm / (2 * np.sqrt(2 ** (1 / 3.5) - 1))
    profile = (1 + ((XX - x) ** 2 + (YY - y) ** 2) / width**2) ** -3.5
    return profile / profile.sum()


def galaxy(x: float, y: float, fwhm: float, rng: np.random.Generator) -> Any:
    """Inclined exponential disc of unit sum, seen through the star's profile."""
    scale, ratio, angle = rng.uniform(1.0, 4.0), rng.uniform(0.3, 1.0), rng.uniform(0, np.pi)
    along = (XX - x) * np.cos(angle) + (YY - y) * np.sin(angle)
    across = (YY - y) * np.cos(angle) - (XX - x) * np.sin(angle)
    disc = np.exp(-np.hypot(along, across / ratio) / scale)
    seen = np.fft.irfft2(np.fft.rfft2(disc) * np.fft.rfft2(np.fft.ifftshift(star(MIDDLE, MIDDLE, fwhm))), disc.shape)
    return seen / seen.sum()


def scene(kind: str, snr: float, rng: np.random.Generator) -> dict[str, Any]:
    """One cutout of a class whose residual has the signal to noise wanted."""
    fwhm, sky = rng.uniform(2.5, 5.0), rng.uniform(5, 15)
    cx, cy = MIDDLE + rng.uniform(-0.5, 0.5, 2)  # the candidate
    flux = sky * fwhm**2 * 10 ** rng.uniform(1.0, 2.2)
    on_star = rng.random() < 0.6
    if kind == "transient on empty sky":
        host = np.zeros((SIZE, SIZE))
    elif kind == "transient on a galaxy":
        x, y = np.array([cx, cy]) + rng.normal(0, 1.0, 2)
        host = flux * galaxy(x, y, fwhm, rng)
    else:
        host = flux * (star(cx, cy, fwhm) if on_star else galaxy(cx, cy, fwhm, rng))
    if kind == "dipole":
        angle = rng.uniform(0, 2 * np.pi)
        step = rng.uniform(0.1, 0.7)
        unit = shift(host, (step * np.sin(angle), step * np.cos(angle)), order=5, mode="nearest") - host
    elif kind == "scale error":
        unit = host * rng.choice([-1.0, 1.0]) * 0.05
    else:
        unit = star(cx, cy, fwhm) * rng.choice([-1.0, 1.0], p=[0.2, 0.8])
    if kind in ("dipole", "scale error"):  # the host is as bright as the signal to noise asks
        gain = brightness(host, unit, sky, snr)
        host, residual = host * gain, unit * gain
    else:
        residual = unit * brightness(np.zeros_like(host), unit, sky, snr, host)
    variance = sky**2 + np.clip(host + residual, 0, None) / 3
    image = host + residual + rng.normal(0, 1, host.shape) * np.sqrt(variance) + 100
    noise = gaussian_filter(rng.normal(0, 1, host.shape), fwhm / 2.355)
    convolved = host + noise * 0.3 * sky / 3 + 80
    if kind == "dipole":
        seen = gaussian_filter(residual, fwhm / 2.355)
        cy, cx = np.unravel_index(np.argmax(np.abs(seen)), seen.shape)
    x0, y0 = floor(cx + 0.5) - 20, floor(cy + 0.5) - 20
    cut = (slice(y0, y0 + 41), slice(x0, x0 + 41))
    x, y = (float(c) + rng.normal(0, 0.5 * fwhm / 2.355 / snr) for c in (cx, cy))
    planes = {"image": image, "convolved": convolved, "err": np.sqrt(variance)}
    meta = {"x": 1000 + x, "y": 1000 + y, "fwhm": fwhm}
    return {**{name: plane[cut].astype("f4") for name, plane in planes.items()}, "meta": meta}


def brightness(host: Any, unit: Any, sky: float, snr: float, ground: Any = 0.0) -> float:
    """Factor of host and residual that gives the residual its signal to noise, by bisection in the logarithm."""
    low, high = -6.0, 9.0
    for _ in range(50):
        middle = (low + high) / 2
        gain = 10**middle
        variance = sky**2 + np.clip(ground + gain * (host + unit), 0, None) / 3
        if np.sqrt((gain**2 * unit**2 / variance).sum()) < snr:
            low = middle
        else:
            high = middle
    return float(10**low)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(f"called artefact, per cent of {args.n}".ljust(38) + "".join(f"{name:>18s}" for name in RULES))
    for kind in ("transient on empty sky", "transient on a galaxy", "dipole", "scale error"):
        spans = ((5, 5), (7, 7), (10, 10), (20, 20), (40, 40)) if "transient" in kind else ((5, 10), (10, 100))
        for low, high in spans:
            rng = np.random.default_rng([args.seed, low, len(kind)])
            called = dict.fromkeys(RULES, 0)
            fitted = 0
            for _ in range(args.n):
                cutout = scene(kind, np.exp(rng.uniform(np.log(low), np.log(high))), rng)
                box = max(7, ceil(2 * cutout["meta"]["fwhm"]) // 2 * 2 + 1)
                if adjust_cutout(cutout, max_shift=1, max_scale=1.1, inner=box):
                    fitted += 1
                    compare_point_source(cutout, cutout["meta"]["fwhm"], max_shift=1, max_scale=1.1, inner=box)
                    for name, thresholds in RULES.items():
                        called[name] += is_artefact(cutout["meta"], **thresholds)
            span = f"{low}" if low == high else f"{low}-{high}"
            rates = "".join(f"{100 * called[name] / args.n:18.1f}" for name in RULES)
            unfitted = "" if fitted == args.n else f"   ({args.n - fitted} without a fit)"
            print(f"{kind}, S/N {span}".ljust(38) + rates + unfitted)


if __name__ == "__main__":
    main()
