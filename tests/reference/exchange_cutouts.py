"""Check that STDPipe reads what write_cutout writes, and that its own copy comes back whole.

Three steps in two environments, by hand when files.py changes (last with STDPipe 0.4.1, astropy 8.0.2: it holds)::

    python tests/reference/exchange_cutouts.py write FILE         # with stampworker
    python tests/reference/exchange_cutouts.py read FILE COPY     # with stdpipe
    python tests/reference/exchange_cutouts.py compare FILE COPY  # with stampworker
"""

import sys
import warnings
from datetime import datetime
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.time import Time

FRAME = np.arange(61 * 83, dtype="f4").reshape(61, 83)
META = {
    "x": 70.5,
    "y": 58.5,
    "ra": 150.1,
    "dec": -33.4,
    "none": None,
    "flag": np.bool_(True),
    "id": np.int64(2**53 + 1),
    "nan": np.nan,
    "inf": np.inf,
    "ninf": -np.inf,
    "adjust_dx": 0.25,
    "adjust_dy": -0.75,
    "objectId": "ZTF",
    "long": "it is long " * 20 + "!",
    "bad": "array(broken",
    "umlaut": "Größe",
    "array": np.array([1.5, np.nan, np.inf, -np.inf], dtype=">f4"),
    "list": [1, 2, 3],
    "when": datetime(2026, 11, 24, 1, 2, 3, 456789),
    "time": Time(61368.25, format="mjd", scale="tai"),
}


def write(path):
    from stampworker.cutouts import get_cutout, write_cutout

    header = fits.PrimaryHDU(FRAME).header
    header.update(
        {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRPIX1": 40.0, "CRPIX2": 30.0, "CD1_1": -1e-4, "CD2_2": 1e-4}
    )
    write_cutout(get_cutout(FRAME, META, 3, header=header, mask=FRAME % 7 == 0, err=FRAME.astype("f8")), path)


def read(path, copy):
    from stdpipe.cutouts import load_cutout, write_cutout

    warnings.simplefilter("ignore")  # long names of cards
    cutout = load_cutout(path)
    meta = cutout["meta"]
    assert cutout["image"][3, 3] == FRAME[59, 71]
    assert cutout["mask"].dtype == bool
    assert np.array_equal(cutout["mask"][:5], FRAME[56:61, 68:75] % 7 == 0)
    assert cutout["err"].dtype == ">f8"
    assert cutout["wcs"].wcs.crpix.tolist() == [-28.0, -26.0]
    assert meta["nan"] != meta["nan"]
    assert meta["inf"] == np.inf
    assert (meta["adjust_dx"], meta["adjust_dy"], meta["id"], meta["flag"]) == (0.25, -0.75, 2**53 + 1, True)
    assert meta["long"] == META["long"]
    assert np.array_equal(meta["array"], META["array"], equal_nan=True)
    assert meta["list"].tolist() == [1, 2, 3]
    assert abs(meta["time"] - META["time"]).sec < 1e-6
    assert not {"bad", "umlaut"} & meta.keys()  # which it could not read
    write_cutout(cutout, copy)


def compare(path, copy):
    from stampworker.cutouts import load_cutout

    ours, theirs = load_cutout(path), load_cutout(copy)
    assert ours.keys() == theirs.keys()
    assert repr(ours["meta"]) == repr(theirs["meta"])
    assert ours["meta"]["time"] == META["time"]
    assert all(np.array_equal(ours[plane], theirs[plane], equal_nan=True) for plane in ("image", "mask", "err"))


commands: dict[str, Any] = {"write": write, "read": read, "compare": compare}
commands[sys.argv[1]](*sys.argv[2:])
print("it holds")
