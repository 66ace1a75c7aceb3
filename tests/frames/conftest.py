"""Seeded frames, 61 rows by 83 columns so that swapped axes show."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from helpers import Write

from stampworker.config import FrameSettings
from stampworker.frames import FrameStore

SKY: dict[str, Any] = {
    "CTYPE1": "RA---TAN",
    "CTYPE2": "DEC--TAN",
    "CUNIT1": "deg",
    "CUNIT2": "deg",
    "CRVAL1": 150.1,
    "CRVAL2": 2.2,
    "CRPIX1": 40.3,
    "CRPIX2": 31.7,
    "CD1_1": -7.3e-5,
    "CD1_2": 4.0e-6,
    "CD2_1": 5.0e-6,
    "CD2_2": 7.2e-5,
    "RADESYS": "ICRS",
}


@pytest.fixture
def sky() -> dict[str, Any]:
    """Give the WCS keywords of a science frame: 0.26 arcsec pixels, slightly rotated and sheared."""
    return dict(SKY)


@pytest.fixture
def pixels() -> np.ndarray:
    """Give noise, a gradient and two NaN."""
    rng = np.random.default_rng(61)
    y, x = np.mgrid[:61, :83]
    data = (rng.normal(100, 5, (61, 83)) + 0.3 * x - 0.2 * y).astype("f4")
    data[7, 11] = data[50, 80] = np.nan
    return data


@pytest.fixture
def stars() -> np.ndarray:
    """Give Gaussian stars (sigma 2 pixels) on a flat sky, smooth enough to be resampled with errors below 0.1 %."""
    rng = np.random.default_rng(83)
    y, x = np.mgrid[:61, :83]
    data = np.full((61, 83), 50.0)
    for x0, y0, flux in zip(rng.uniform(5, 78, 25), rng.uniform(5, 56, 25), rng.uniform(500, 5000, 25), strict=True):
        data += flux * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / 8) / (8 * np.pi)
    return data.astype("f4")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes an image HDU with further cards and returns the file's path."""

    def write(name: str, data: np.ndarray | None, /, **cards: Any) -> Path:
        hdu = fits.PrimaryHDU(data)
        for keyword, value in cards.items():
            hdu.header[keyword.replace("__", "-")] = value
        path = tmp_path / name
        hdu.writeto(path)
        return path

    return write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FrameStore]:
    """Give a store whose root is the test's own folder."""
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),))) as store:
        yield store


@pytest.fixture
def odd(shared_data: Path) -> Path:
    """Give the folder of damaged and unusual frames, if there is one beside the checkout."""
    return shared_data / "odd"
