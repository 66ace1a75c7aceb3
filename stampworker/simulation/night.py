"""A small survey night with known truth: frames, alerts, and what each candidate really is.

Each frame is drawn once as a noiseless sky seen through the template's PSF. The science frame is that sky convolved
with the matching kernel, plus what changed since. So stationary stars subtract to the noise, and only the candidates
are left. Then both frames get their noise, and the rest is made as a pipeline makes it: the convolved frame from the
noisy template, the difference from the two, the candidates' positions and S/N from the difference.

Three things are idealised: the kernel is exact, the background is flat, and the error plane comes from the expected
counts instead of the observed ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from stampworker.errors import ConfigError
from stampworker.simulation import sky
from stampworker.simulation.candidates import Source, capacity, design, place_sources, share_out
from stampworker.simulation.sky import GAIN, HALF, MARGIN, REACH, READ_NOISE, SATURATION, SKY, Array, Kernel, Scene

MASK_BITS: Mapping[str, int] = {"saturated": 1, "bleed": 2, "template saturated": 4}
"""Bits of the mask plane."""

EXPOSURES = 20  # in the template; so its noise, and the correlation that the kernel makes of it, hardly matters
TEMPLATE_SCALE = 1 / 46.0  # template units per science adu
TEMPLATE_SKY = 3.1  # template units


@dataclass(frozen=True)
class Night:
    """Files of a simulated night."""

    directory: Path  # frames in alerts are relative to it
    frames: tuple[Path, ...]  # a folder per frame: science.fits, template, convolved, difference, error and mask
    alerts: Path  # one alert per line, schema stampworker.alert
    candidates: Path  # the same detections as a table (id, frame, x, y, ra, dec, mjd, fwhm, snr)
    truth: Path  # what each candidate is, see `simulate`


def simulate(
    directory: str | Path,
    *,
    frames: int = 1,
    size: int = 1024,
    candidates: int = 60,
    seed: int = 1,
    progress: bool = False,
) -> Night:
    """Write a survey night with known truth to a folder that is empty (else ConfigError) or absent.

    Each frame (pointing) has its own template, seeing and WCS, and a side of ``size`` pixels, at least 256. The
    candidates, those of all frames together, are at most `capacity` per frame. The same seed and sizes give the same
    bytes. A number out of range is a ValueError.

    The S/N (``snr`` in the truth) is sqrt(Σ (signal / error)²) over the pixels, with the noiseless difference that the
    candidate leaves and the error plane. For a point source this is the S/N of the matched filter; for a dipole or a
    scale error it is that of the residual. The classes (``class``) are:

    - ``transient-sky``, ``transient-galaxy``: point sources of S/N 3 to 100, evenly in log. A galaxy has a half-light
      radius of 1 to 3 FWHM, 0.3 to 10 times the transient's flux, and the transient anywhere within that radius.
    - ``dipole``: a star that moved by (``dx``, ``dy``) between template and science frame, 0.1 to 0.9 pixel; residual
      S/N 5 to 100.
    - ``scale-error``: a star ``scale`` times as bright as on the template, 2 to 15 % brighter or fainter; residual S/N
      5 to 100 as far as an unsaturated star allows.
    - ``cosmic-ray``: a hit or short track on the science frame, not masked, S/N 5 to 100.
    - ``edge``: transients at half-integer positions, at the frame's edge, over it and entirely off it (``case``).
    - ``masked``: saturated stars (mask not 0 in the middle of the stamp).

    Positions and ``extra.snr`` of the alerts are measured on the difference, at the highest |S/N| of the matched filter
    within a FWHM, so they have a detection's errors; a dipole is detected on its stronger lobe. Alerts of ``edge`` and
    ``masked`` candidates have the true position.
    """
    _check(frames, size, candidates, seed)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ConfigError(f"{directory}: is not empty; a night is written to a new folder")
    kinds = share_out(candidates, np.random.default_rng([seed, 0]))
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


def _check(frames: int, size: int, candidates: int, seed: int) -> None:
    for name, value, least in (("frames", frames, 1), ("size", size, 256), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}: found {value}, wanted at least {least}")
    if not 1 <= candidates <= frames * capacity(size):
        raise ValueError(
            f"candidates: found {candidates}, wanted 1 to {frames * capacity(size)} "
            f"({capacity(size)} on each of {frames} frames of {size} × {size} pixels)"
        )


def _simulate_frame(
    folder: Path, kinds: Sequence[tuple[str, float]], size: int, number: int, rng: np.random.Generator
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Draw and write one frame set; return its candidates as (alert, truth), sorted by y as a detector finds them."""
    kernel = sky.draw_kernel(rng)
    psf = sky.convolve(sky.star(0.0, 0.0), kernel)
    fwhm = sky.fwhm_of(psf)
    sources = [design(kind, rank, psf, kernel, fwhm, rng) for kind, rank in kinds]
    place_sources(sources, size, rng)
    scene = Scene(*(np.zeros((size + 2 * MARGIN,) * 2) for _ in range(3)))
    sky.draw_field(scene.static, np.array([(source.x, source.y) for source in sources]), rng)
    for source in sources:
        source.draw(scene)
    planes = _observe(scene, sources, kernel, rng)
    clean = _clean_difference(scene, sources, kernel)
    header = _header(number, size, fwhm)
    for name, plane in planes.items():
        fits.PrimaryHDU(plane, _plane_header(name, header)).writeto(folder / f"{name}.fits")
    rows = []
    for source in sorted(sources, key=lambda s: (s.y, s.x)):
        alert = _alert(source, planes, psf, header)
        alert["frames"] = {name: f"{folder.name}/{name}.fits" for name in planes}
        rows.append((alert, source.truth(clean, planes["error"], fwhm)))
    return rows


def _observe(
    scene: Scene, sources: Sequence[Source], kernel: Kernel, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Expose both frames, saturate them and subtract them; return the planes of a frame set, without margins."""
    light = sky.convolve(scene.static + scene.science_only, kernel)
    electrons = rng.poisson(GAIN * (SKY + light)) + rng.normal(0, READ_NOISE, light.shape)
    science = electrons / GAIN
    for source in sources:
        source.draw_track(science, MARGIN)
    deep = scene.static + scene.template_only
    template_variance = sky.noise_variance(deep) / EXPOSURES
    template = deep + rng.normal(0, 1, deep.shape) * np.sqrt(template_variance)
    lost = deep > SATURATION
    template[lost] = SATURATION
    mask = _saturate(science)
    mask[_grow(lost, REACH)] |= MASK_BITS["template saturated"]
    convolved = sky.convolve(template, kernel) + SKY
    # The template's variance goes through the square of the kernel. Its correlation between pixels is left out: it is
    # below 1 % of the variance on the sky.
    variance = sky.noise_variance(light) + sky.convolve(template_variance, sky.squared(kernel))
    inside = (slice(MARGIN, -MARGIN),) * 2
    return {
        "science": science[inside].astype(np.float32),
        "template": (template[inside] * TEMPLATE_SCALE + TEMPLATE_SKY).astype(np.float32),
        "convolved": convolved[inside].astype(np.float32),
        "difference": (science - convolved)[inside].astype(np.float32),
        "error": np.sqrt(variance)[inside].astype(np.float32),
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


def _clean_difference(scene: Scene, sources: Sequence[Source], kernel: Kernel) -> Array:
    """Return the noiseless difference that the candidates leave, without margins."""
    clean = sky.convolve(scene.science_only - scene.template_only, kernel)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    for source in sources:
        source.draw_track(clean, 0)
    return clean


def _detect(x: float, y: float, planes: Mapping[str, NDArray[Any]], psf: Array) -> tuple[float, float, float]:
    """Return x, y and S/N of the highest |S/N| of the matched filter within a FWHM, as a pipeline measures them."""
    box = sky.box_around(planes["error"].shape, x, y, 2 * HALF)
    weight = np.where(planes["mask"][box] == 0, planes["error"][box].astype(float) ** -2, 0)
    core = psf[HALF - 6 : HALF + 7, HALF - 6 : HALF + 7][::-1, ::-1]
    signal = ndimage.convolve(weight * planes["difference"][box], core, mode="constant")
    noise = np.sqrt(ndimage.convolve(weight, core**2, mode="constant"))
    snr = np.divide(signal, noise, out=np.zeros_like(signal), where=noise > 0)
    rows, columns = np.indices(snr.shape)
    away = np.hypot(columns + box[1].start - x, rows + box[0].start - y)
    row, column = np.unravel_index(np.argmax(np.where(away <= sky.fwhm_of(psf), np.abs(snr), -1)), snr.shape)
    peak = snr[row - 1 : row + 2, column - 1 : column + 2]
    dx, dy = (_vertex(*np.abs(line)) for line in (peak[1], peak[:, 1]))
    return float(column + box[1].start + dx), float(row + box[0].start + dy), float(snr[row, column])


def _vertex(left: float, middle: float, right: float) -> float:
    """Return the top of the parabola through three points, between −0.5 and 0.5 from the middle one."""
    curvature = 2 * middle - left - right
    return float(np.clip(0.5 * (right - left) / curvature, -0.5, 0.5)) if curvature > 0 else 0.0


def _header(number: int, size: int, fwhm: float) -> fits.Header:
    """Write the header that the planes of a frame set share: TAN WCS with east to the left, exposure, detector."""
    angle, step = math.radians(1.7 * number), 1.01 / 3600
    mjd = 61368.0625 + 90 / 86400 * number
    start = Time(mjd - 30 / 86400, format="mjd", scale="utc")
    header = fits.Header()
    header.update(
        {
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
            "OBJECT": f"field {number:03d}",
            "INSTRUME": "simulated",
            "FILTER": "r",
            "EXPTIME": (60.0, "[s]"),
            "TIMESYS": "UTC",
            "DATE-OBS": (start.isot, "start of the exposure"),
            "MJD-OBS": (start.mjd, "[d] start of the exposure"),
            "MJD": (mjd, "[d] middle of the exposure"),
            "FWHM": (round(fwhm, 3), "[pixel] of the science PSF"),
        }
    )
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
        header["FWHM"] = (round(sky.fwhm_of(sky.star(0, 0)), 3), "[pixel] of the template PSF")
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


def _alert(source: Source, planes: Mapping[str, NDArray[Any]], psf: Array, header: fits.Header) -> dict[str, Any]:
    """Return the alert that a detection pipeline sends, without its frames."""
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
    units, meanings = ({name: about[i] for name, about in _TRUTH.items()} for i in (0, 1))
    columns: dict[str, list[Any]] = {name: [row[name] for row in truth] for name in _TRUTH}
    Table(columns, units=units, descriptions=meanings).write(night.truth, format="ascii.ecsv")
    columns = {"id": [a["alertId"] for a in alerts], "frame": [row["frame"] for row in truth]}
    columns |= {name: [a[name] for a in alerts] for name in ("x", "y", "ra", "dec", "mjd", "fwhm")}
    columns["snr"] = [a["extra"].get("snr", math.nan) for a in alerts]
    units = {"x": u.pix, "y": u.pix, "ra": u.deg, "dec": u.deg, "mjd": u.d, "fwhm": u.pix}
    Table(columns, units=units).write(night.candidates, format="ascii.ecsv")
