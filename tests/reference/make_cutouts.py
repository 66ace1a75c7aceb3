"""Make cutouts.json and cutout_stdpipe.fits: what STDPipe makes of names, crops, blocks of pixels and files.

Run in an environment of its own with stdpipe (0.4.1 made the files here; numpy 2.4.6, astropy 8.0.2)::

    python tests/reference/make_cutouts.py

The tests compare exactly, floats of the file's metadata to 1e-14 (FITS cuts them to 20 characters). Positions are no
halves: STDPipe rounds those to even.
"""

import json
import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.time import Time
from stdpipe.cutouts import crop_image_centered, downscale_image, get_cutout, write_cutout
from stdpipe.utils import make_jname

HERE = Path(__file__).parent
PLACES = [
    (10.68458, 41.26917),
    (0.0, 0.0),
    (1e-9, -1e-9),
    (1e-5, 1e-5),
    (2.0833e-5, -1.3888e-5),
    (359.9999, -0.0001),
    (359.99999, 0.00001),
    (359.9999999, -0.00001),
    (360.0, 12.0),
    (-0.25, 5.0),
    (83.633, -5.3911),
    (83.633, -0.0003),
    (12.49999, -0.99999),
    (15.2499999, 29.9999999),  # 59.99 s and 59.9 arcsec that round up to the next minute
    (15.249979, 29.999986),
    (15.24995, 29.99998),
    (15.249958333, -29.9999861),
    (15.0, 89.9999999),
    (179.99999, -89.999999),
    (266.41683, -29.00781),
    (123.456789, -45.678912),
]


def ramp(ny, nx):
    """Return values that tell their pixel."""
    return np.arange(ny)[:, None] * 100.0 + np.arange(nx)


def names():
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, 60), np.degrees(np.arcsin(rng.uniform(-1, 1, 60)))
    places = [*PLACES, *np.transpose([ra, dec]).tolist()]
    wide = [[ra, dec, "float64", make_jname(ra, dec)] for ra, dec in places]
    return wide + [[ra, dec, "float32", make_jname(np.float32(ra), np.float32(dec))] for ra, dec in places[:12]]


def crops():
    header = fits.Header([("CTYPE1", "RA---TAN"), ("CTYPE2", "DEC--TAN"), ("CRPIX1", 4.5), ("CRPIX2", 3.25)])
    found = []
    for dtype in ("f4", "i2", "bool"):
        for x, y, r in [(4.2, 3.4, 2), (0.1, 0.2, 1.5), (8.4, 5.7, 2), (-1.2, 3.0, 2), (30.0, 3.0, 1), (4.6, 2.7, 0.4)]:
            crop, head = crop_image_centered(ramp(7, 10).astype(dtype), x, y, r, header=header)
            cards = {name: head[name] for name in ("NAXIS1", "NAXIS2", "CRPIX1", "CRPIX2", *CROP)}
            found.append({"dtype": dtype, "x": x, "y": y, "r": r, "crop": plain(crop), "cards": cards})
    return found


CROP = ("CROP_X1", "CROP_X2", "CROP_Y1", "CROP_Y2")


def plain(array):
    """Return nested lists with null for NaN."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [[None if np.isnan(value) else value for value in row] for row in array.tolist()]


def blocks():
    image = (ramp(7, 11) * 7 % 64).astype("i4")
    return [
        {"scale": scale, "mode": mode, "blocks": downscale_image(image, scale, mode).tolist()}
        for scale in (1, 2, 3)
        for mode in ("sum", "mean", "and", "or")
    ]


def cutout_file():
    rng = np.random.default_rng(2)
    ny, nx = 61, 83
    planes = {name: rng.normal(50, 3, (ny, nx)).astype("f4") for name in ("image", "template", "err")}
    header = fits.PrimaryHDU(planes["image"]).header
    header.update({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.25, "CRVAL2": -33.5})
    header.update({"CRPIX1": 40.25, "CRPIX2": 33.75, "CD1_1": -1.4e-4, "CD1_2": 3e-5, "CD2_1": 2e-5, "CD2_2": 1.5e-4})
    candidate = {
        "x": 70.3,
        "y": 58.6,
        "ra": 150.1,
        "dec": -33.4,
        "id": 12345678901234,
        "mag_calib": 19.123456789,
        "magErr": np.float32(0.25),
        "flags": np.int16(3),
        "good": True,
        "bad": np.bool_(False),
        "nothing": None,
        "nan": np.nan,
        "inf": np.inf,
        "counts": np.array([1, 2, 3]),
        "fluxes": np.array([1.5, np.nan, np.inf]),
        "narrow": np.array([0.1, 2.5], dtype="f4"),
        "bands": np.array(["g", "r'"]),
        "list": [1, 2.5],
        "empty": np.zeros((0, 3)),
        "many": np.arange(2000),  # numpy prints it with an ellipsis: lost
        "note": "a string that goes on and on, longer than the sixty-eight characters of one card",
        "adjust_dx": 0.25,
        "adjust_dy": -0.75,
    }
    mask = planes["err"] > 53
    cutout = get_cutout(
        planes["image"],
        candidate,
        4,
        header=header,
        mask=mask,
        template=planes["template"],
        err=planes["err"],
        time=Time("2026-11-24T01:02:03.456"),
        filename="frame.fits",
    )
    write_cutout(cutout, HERE / "cutout_stdpipe.fits")
    return {name: plain(cutout[name].astype("f8")) for name in ("image", "mask", "template", "err")}


warnings.simplefilter("ignore")  # long names of cards
results = {"names": names(), "crops": crops(), "blocks": blocks(), "planes": cutout_file()}
NEXT = ",\n"
parts = [f'"{part}": [\n{NEXT.join(map(json.dumps, rows))}\n]' for part, rows in results.items() if part != "planes"]
parts.append(f'"planes": {json.dumps(results["planes"])}')
(HERE / "cutouts.json").write_text("{\n" + NEXT.join(parts) + "\n}\n")
