"""What all tests share: real frames, a seeded frame whose sides differ, and the profile of hypothesis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

# Programs, and what tests import: nothing in these folders is a test, nor has examples.
collect_ignore = ["benchmarks", "helpers", "reference", "servers", "oldest.py", "samples.py", "study.py"]

# Shared machines stall for seconds, so no example has a deadline. What CI finds must be found again on the next run.
# A test that hypothesis repeats may share a fixture that it does not change.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# The tests' servers are on this machine, so no proxy is used. Deleting the variables here reaches obstore, too.
for _name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)


def real_data(folder: Path) -> Path:
    """Return a folder of real data; where there is none skip, or fail under STAMPWORKER_TEST_DATA_REQUIRED."""
    if not folder.is_dir():
        problem = f"no real data: found no folder {folder.parent.name}/{folder.name} beside the checkout"
        (pytest.fail if "STAMPWORKER_TEST_DATA_REQUIRED" in os.environ else pytest.skip)(problem)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real alerts and frames beside the checkout."""
    folder = (Path(__file__).parents[1] / "../shared/data").resolve()
    return real_data(folder)


class SeededFrame(NamedTuple):
    """A frame in memory."""

    data: NDArray[np.float32]
    header: fits.Header
    wcs: WCS


@pytest.fixture
def frame() -> SeededFrame:
    """Return a frame of 61 rows and 83 columns, seeded noise, with a rotated TAN WCS whose pixels are not square."""
    data = np.random.default_rng(20261124).normal(100, 5, (61, 83)).astype(np.float32)
    header = fits.PrimaryHDU(data).header
    header["OBJECT"] = "test field"
    header["EXPTIME"] = 30.5
    header["BUNIT"] = "adu"
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CUNIT1"], header["CUNIT2"] = "deg", "deg"
    header["CRVAL1"], header["CRVAL2"] = 150.25, -33.5
    header["CRPIX1"], header["CRPIX2"] = 40.25, 33.75
    header["CD1_1"], header["CD1_2"] = -1.4e-4, 0.3e-4
    header["CD2_1"], header["CD2_2"] = 0.2e-4, 1.5e-4
    header["RADESYS"] = "ICRS"
    return SeededFrame(data, header, WCS(header))
