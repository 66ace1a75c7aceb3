"""A tiny night for tests: seven FITS frames of 61 rows and 83 columns, seeded, with one star that moved.

The star stands at `STAR` on the science frame and 0.3, -0.2 pixels from there on the template; the rest is noise of
sigma `NOISE`. ``python tests/samples.py`` makes the sample files of ``schemas/`` from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

SHAPE = (61, 83)
STAR = (41.3, 30.7)
NOISE = 2.0
SKY = 100.0
PLANES = ("science", "template", "difference", "convolved", "error", "variance", "mask")
WCS_KINDS = ("CD", "PC", "SIP", "TPV")


def write_night(
    folder: Path, *, wcs: str | None = "CD", planes: tuple[str, ...] = PLANES, seed: int = 7
) -> dict[str, str]:
    """Write the frames of a night.

    Parameters
    ----------
    folder : Path
        Made where it is absent.
    wcs : {"CD", "PC", "SIP", "TPV", None}
        How the headers write the WCS; None: they have none.
    planes : tuple of str
        Which to write.
    seed : int
        Of the noise.

    Returns
    -------
    frames : dict
        Plane → path, as an alert has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for plane, data in night_planes(seed).items():
        if plane in planes:
            fits.writeto(folder / f"{plane}.fits", data, night_header(wcs, plane), overwrite=True)
    return {plane: str(folder / f"{plane}.fits") for plane in planes}


def night_planes(seed: int = 7) -> dict[str, np.ndarray[Any, Any]]:
    """Return the pixels of every plane."""
    random = np.random.default_rng(seed)
    x, y = STAR
    science = SKY + star(x, y) + random.normal(0, NOISE, SHAPE)
    convolved = SKY + star(x - 0.3, y + 0.2)
    mask = np.zeros(SHAPE, np.int16)
    mask[5:8, 70:75] = 4
    made = {
        "science": science,
        "template": (convolved - SKY) / 10,
        "difference": science - convolved,
        "convolved": convolved,
        "error": np.full(SHAPE, NOISE),
        "variance": np.full(SHAPE, NOISE**2),
    }
    return {plane: data.astype(np.float32) for plane, data in made.items()} | {"mask": mask}


def star(x: float, y: float, flux: float = 3000.0, sigma: float = 1.5) -> np.ndarray[Any, Any]:
    """Return a Gaussian star on no background."""
    rows, columns = np.indices(SHAPE)
    return flux / (2 * np.pi * sigma**2) * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))


def night_header(wcs: str | None, plane: str = "science") -> fits.Header:
    """Return a header with a WCS of the given kind, rotated, its pixels not square."""
    header = fits.Header()
    if plane != "mask":
        header["BUNIT"] = "electron/s" if plane == "template" else "adu**2" if plane == "variance" else "adu"
    if wcs is None:
        return header
    projection = {"SIP": "TAN-SIP", "TPV": "TPV"}.get(wcs, "TAN")
    header["CTYPE1"], header["CTYPE2"] = f"RA---{projection}", f"DEC--{projection}"
    header["CUNIT1"], header["CUNIT2"] = "deg", "deg"
    header["CRVAL1"], header["CRVAL2"] = 150.25, -33.5
    header["CRPIX1"], header["CRPIX2"] = 40.25, 33.75
    matrix = {"1_1": -1.4e-4, "1_2": 0.3e-4, "2_1": 0.2e-4, "2_2": 1.5e-4}
    if wcs == "PC":
        header["CDELT1"], header["CDELT2"] = -1.4e-4, 1.5e-4
        matrix = {"1_1": 1.0, "1_2": -0.2, "2_1": 0.1, "2_2": 1.0}
    for place, value in matrix.items():
        header[("PC" if wcs == "PC" else "CD") + place] = value
    if wcs == "SIP":
        header["A_ORDER"], header["B_ORDER"], header["AP_ORDER"], header["BP_ORDER"] = 2, 2, 2, 2
        header["A_2_0"], header["B_1_1"], header["AP_2_0"], header["BP_1_1"] = 2e-5, -3e-5, -2e-5, 3e-5
    if wcs == "TPV":
        for axis in (1, 2):
            header[f"PV{axis}_0"], header[f"PV{axis}_1"], header[f"PV{axis}_2"] = 1e-6, 1.001, 2e-4
            header[f"PV{axis}_4"] = 3e-2
    header["RADESYS"] = "ICRS"
    return header


def alert_record(frames: dict[str, str], **fields: Any) -> dict[str, Any]:
    """Return an alert on the star as a record of the schema, with other fields on demand; None leaves one out."""
    record: dict[str, Any] = {"alertId": "a-1", "x": STAR[0], "y": STAR[1], "frames": frames} | fields
    return {name: value for name, value in record.items() if value is not None}
