"""Stamps made at random, for the tests of the fit."""

from __future__ import annotations

from typing import Any

import numpy as np


def field(seed: int, shape: tuple[int, int], signal: float = 1.0) -> tuple[Any, Any, Any]:
    """Image, template and err: stars that have moved, and noise in both planes; without signal only noise."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    dx, dy, width = *rng.uniform(-2.2, 2.2, 2), rng.uniform(0.8, 2.0)
    places = [(rng.uniform(0, shape[1]), rng.uniform(0, shape[0]), 10 ** rng.uniform(1, 3)) for _ in range(4)]

    def draw(mx: float, my: float) -> Any:
        return sum(f * np.exp(-((xx - x - mx) ** 2 + (yy - y - my) ** 2) / (2 * width**2)) for x, y, f in places)

    image = signal * draw(dx, dy) * rng.uniform(0.9, 1.1)
    err = np.sqrt(25 + image / 3)
    return image + 100 + rng.normal(0, 1, shape) * err, signal * draw(0, 0) + 80 + rng.normal(0, 2, shape), err


def trail(seed: int) -> tuple[Any, Any, Any]:
    """Image, template and err of a bright trail that has moved across itself, with hot pixels: a valley of minima."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:16, :17]
    angle, moved, width = rng.uniform(0, np.pi), rng.uniform(-1, 1), rng.uniform(0.4, 1)
    across = (x - 8) * np.cos(angle) + (y - 8) * np.sin(angle)
    image, template = (300 * np.exp(-((across - m) ** 2) / (2 * width**2)) for m in (moved, 0))
    err = np.sqrt(25 + image / 3)
    image, template = image + 100 + rng.normal(0, 1, err.shape) * err, template + 80
    for plane in (image, template):
        plane[rng.integers(16), rng.integers(17)] += 1000 * rng.integers(0, 2)
    return image, template, err
