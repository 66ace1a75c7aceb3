"""``INHERIT = T``: what an extension takes from the primary header, and what it does not."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from stampworker.config import FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import Packet
from stampworker.frames import Frame, FrameStore

ALL = (slice(0, 61), slice(0, 83))
LONG = "what was seen that night " * 9
PRIMARY: dict[str, Any] = {
    "GAIN": 1.7,
    "BUNIT": "adu",
    "FILTER": "r",
    "EXPTIME": 30.0,
    "MJD-OBS": 57000.25,
    "CHECKSUM": "abcdefgh",
    "BSCALE": 2.0,
    "BZERO": 7.0,
    "ZBLOCKED": True,
    "NOTE": LONG,
    "HIERARCH ESO INS NAME": "VST",
    "HIERARCH ESO INS ID": "primary's",
    "RA": 150.0,
}
EXTENSION: dict[str, Any] = {"INHERIT": True, "EXPTIME": 45.0, "HIERARCH ESO INS ID": "extension's"}

Make = Callable[..., Frame]


@pytest.fixture(params=["plain", "compressed"])
def make(request: pytest.FixtureRequest, tmp_path: Path, pixels: np.ndarray) -> Make:
    """Return a function that writes a primary header and an image extension, and opens the extension."""

    def make(primary: dict[str, Any], extension: dict[str, Any], data: np.ndarray | None = None) -> Frame:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fits.verify.VerifyWarning)
            first = fits.PrimaryHDU(data)
            first.header["HISTORY"] = "of the primary header"
            first.header.update(primary)
            header = fits.Header(extension)
            if request.param == "plain":
                hdu: Any = fits.ImageHDU(pixels, header, name="SCI")
            else:
                hdu = fits.CompImageHDU(pixels, header, name="SCI", quantize_level=0, compression_type="GZIP_2")
            path = tmp_path / "mef.fits"
            fits.HDUList([first, hdu]).writeto(path, overwrite=True)
        store = FrameStore(FrameSettings(frame_roots=(str(tmp_path),)))
        return store.open(f"{path}#SCI")

    return make


def test_keywords_of_the_primary_header(make: Make, pixels: np.ndarray) -> None:
    """An extension inherits the keywords of an empty primary HDU that it lacks; pixels are read without them."""
    frame = make(PRIMARY, EXTENSION)
    header = frame.header
    assert (header["GAIN"], header["FILTER"], header["MJD-OBS"]) == (1.7, "r", 57000.25)
    assert (header["BUNIT"], frame.bunit) == ("adu", "adu")
    assert header["NOTE"] == LONG.strip()
    assert (header["ESO INS NAME"], header["ESO INS ID"]) == ("VST", "extension's")
    assert (header["EXPTIME"], header["EXTNAME"], header["NAXIS"], header["NAXIS1"]) == (45.0, "SCI", 2, 83)
    for keyword in ("SIMPLE", "EXTEND", "CHECKSUM", "BSCALE", "BZERO", "ZBLOCKED", "HISTORY"):
        assert keyword not in header
    assert len(set(header)) == len(header)
    np.testing.assert_array_equal(frame[ALL], pixels)


@pytest.mark.parametrize(
    ("inherit", "primary_has_data"), [({}, False), ({"INHERIT": False}, False), ({"INHERIT": True}, True)]
)
def test_nothing_without_inherit(
    make: Make, pixels: np.ndarray, inherit: dict[str, Any], primary_has_data: bool
) -> None:
    """Nothing is inherited without INHERIT = T, or if the primary header describes its own image."""
    frame = make({"GAIN": 1.7, "BUNIT": "adu"}, inherit, pixels if primary_has_data else None)
    assert "GAIN" not in frame.header
    assert frame.bunit is None


def test_a_whole_wcs_is_inherited(make: Make, sky: dict[str, Any], pixels: np.ndarray) -> None:
    """An extension without any WCS card inherits the primary header's WCS."""
    frame = make(sky | {"EQUINOX": 2000.0}, {"INHERIT": True})
    assert frame.wcs is not None
    want = WCS(fits.Header(sky)).all_pix2world([3.0, 70.0], [5.0, 50.0], 0)
    np.testing.assert_allclose(frame.wcs.all_pix2world([3.0, 70.0], [5.0, 50.0], 0), want, rtol=0, atol=1e-11)
    assert frame.header["CRPIX1"] == sky["CRPIX1"]


@pytest.mark.parametrize("own", ["wcs", "equinox"])
def test_a_wcs_is_never_mixed(make: Make, sky: dict[str, Any], own: str) -> None:
    """An extension with any WCS card inherits no other; its WCS is the one that astropy reads, or none."""
    pointing = {"CRVAL1": 10.0, "CRVAL2": -30.0, "EQUINOX": 1950.0, "RADESYS": "FK4", "A_ORDER": 2, "A_2_0": 1e-3}
    pointing |= {"CTYPE1A": "RA---TAN", "WCSAXES": 3, "CD1_1": 1.0, "CTYPE3": "FREQ", "CRVAL3": 1e9, "CUNIT3": "Hz"}
    pointing |= {"WCSNAME": "mosaic", "CRDER1": 1e-4, "PS1_0": "table", "D2IMERR1": 0.1}
    cards = {k: v for k, v in sky.items() if k != "RADESYS"} if own == "wcs" else {"EQUINOX": 2000.0}
    frame = make(pointing | {"GAIN": 2.0}, {"INHERIT": True} | cards)
    assert frame.header["GAIN"] == 2.0
    assert set(pointing) & set(frame.header) <= set(cards)
    if own == "wcs":
        assert frame.wcs is not None
        want = WCS(fits.Header(cards)).all_pix2world([3.0], [5.0], 0)
        np.testing.assert_allclose(frame.wcs.all_pix2world([3.0], [5.0], 0), want, rtol=0, atol=1e-11)
    else:
        assert frame.wcs is None


def test_inherited_lookup_tables_are_no_usable_wcs(make: Make, sky: dict[str, Any]) -> None:
    """An inherited WCS with lookup tables is no usable WCS."""
    frame = make(sky | {"CPDIS1": "LOOKUP"}, {"INHERIT": True})
    assert frame.wcs is None
    assert "CPDIS1: lookup-table" in str(frame.wcs_problem)


@pytest.mark.parametrize(("inherit", "origin"), [(True, "background+poisson"), (False, "background")])
def test_inherited_gain_and_unit_reach_the_packet(make: Make, sky: dict[str, Any], inherit: bool, origin: str) -> None:
    """With the primary header's gain the noise has a Poisson part, and the stamps have its unit."""
    frame = make({"GAIN": 1.7, "BUNIT": "adu"}, sky | {"INHERIT": inherit})
    path = frame.url.removeprefix("file://")
    frames = {"science": path, "difference": path}
    with FrameStore(FrameSettings(frame_roots=("/",))) as store:
        (packet,) = Enricher(Settings(), store).packets([Alert("a", x=40.0, y=30.0, frames=frames)])
    assert isinstance(packet, Packet)
    assert packet.err_origin == origin
    assert packet.stamps["science"].header.get("BUNIT") == ("adu" if inherit else None)
