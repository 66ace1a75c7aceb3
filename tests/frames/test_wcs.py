"""WCS of frames: the same as astropy's, carried verbatim, or None with the reason."""

import warnings
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import wcs_to_celestial_frame
from helpers import Write

from stampworker.errors import FrameMismatch
from stampworker.frames import FrameStore, on_grid, sky_to_pixel

SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 1e-5, "A_1_1": -2e-6}
SIP |= {"B_0_2": 3e-6, "B_2_0": 1e-6, "AP_ORDER": 1, "BP_ORDER": 1, "AP_1_0": 1e-7, "BP_0_1": 1e-7}
TPV = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_0": 1e-5, "PV1_1": 1.001, "PV2_1": 0.999, "PV1_4": 2e-3}
TNX = {"CTYPE1": "RA---TNX", "CTYPE2": "DEC--TNX"}
for axis, name, cor in ((1, "ra", "lng"), (2, "dec", "lat")):
    text = f'wtype=tnx axtype={name} {cor}cor = "3. 2. 2. 1. -0.1 0.1 -0.1 0.1 1e-4 2e-3 3e-3 4e-3 "'
    TNX |= {f"WAT{axis}_001": text[:68], f"WAT{axis}_002": text[68:]}
PC = {"PC1_1": 0.9, "PC1_2": 0.1, "PC2_1": -0.1, "PC2_2": 0.9, "CDELT1": -7e-5, "CDELT2": 7e-5}
CROTA = {"CDELT1": -7e-5, "CDELT2": 7e-5, "CROTA2": 12.0}
LINEAR = ("CD1_1", "CD1_2", "CD2_1", "CD2_2")


@pytest.mark.parametrize("kind", ["cd", "sip", "tpv", "tnx", "pc", "crota", "galactic", "three axes", "equinox", "sin"])
def test_same_sky_as_astropy(
    write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any], kind: str
) -> None:
    """Positions are those that astropy gets from the whole header, also with the cards of a stamp, CRPIX moved."""
    if kind in ("pc", "crota"):
        sky = {k: v for k, v in sky.items() if k not in LINEAR}
    more: dict[str, dict[str, Any]] = {"sip": SIP, "tpv": TPV, "tnx": TNX, "pc": PC, "crota": CROTA}
    more["galactic"] = {"CTYPE1": "GLON-CAR", "CTYPE2": "GLAT-CAR"}
    more["three axes"] = {"WCSAXES": 3, "CTYPE3": "FREQ", "CRVAL3": 1e9, "CDELT3": 1e6, "CUNIT3": "Hz", "CD3_3": 1.0}
    more["equinox"] = {"RADESYS": "FK5", "EQUINOX": 1975.0}
    more["sin"] = {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN", "PV2_1": 0.01, "PV2_2": -0.02, "LONPOLE": 170.0}
    path = write("a.fits", pixels, **(sky | more.get(kind, {})), MJD__OBS=57000.0, DATE__OBS="2014-12-09", GAIN=1.0)
    frame = store.open(str(path))
    assert frame.wcs is not None
    assert frame.wcs_problem is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = WCS(fits.getheader(path)).celestial
        x, y = np.array([0, 40.2, 82, 5]), np.array([0, 30.1, 60, 55])
        want = truth.all_pix2world(x, y, 0)
        np.testing.assert_allclose(frame.wcs.all_pix2world(x, y, 0), want, rtol=0, atol=1e-11)
        header = fits.Header.fromstring("".join(frame.wcs_cards()))
        header["CRPIX1"] -= 7
        header["CRPIX2"] -= -3
        np.testing.assert_allclose(WCS(header).all_pix2world(x - 7, y + 3, 0), want, rtol=0, atol=1e-11)
    raw = fits.getheader(path).tostring()
    assert frame.wcs_cards()
    assert all(len(card) == 80 and card in raw for card in frame.wcs_cards())
    assert not any(card.startswith(("GAIN", "NAXIS", "CTYPE3", "CD3_3", "WCSAXES")) for card in frame.wcs_cards())


@pytest.mark.parametrize(
    ("cards", "problem"),
    [
        ({"CPDIS1": "LOOKUP", "DP1.EXTVER": 1.0}, "CPDIS1: lookup-table distortions"),
        ({"D2IMDIS1": "LOOKUP"}, "D2IMDIS1: lookup-table distortions"),
        ({"CQDIS2": "LOOKUP"}, "CQDIS2: lookup-table distortions"),
        ({"DP1.EXTVER": 1.0}, "DP1: lookup-table distortions"),
        (SIP | {"B_ORDER": 40_000}, "B_ORDER is '40000', wanted at most 9"),
        (
            {"CTYPE1": "RA---TNX", "WAT1_001": 'wtype=tnx lngcor = "3. 66 40000 0.'},
            "WAT1: a correction of .* 0 to 20",
        ),
        ({"CTYPE1": "RA---TNX", "WAT1_001": 'wtype=tnx lngcor = "3. 6', "WAT1_002": "66666 3 0 0"}, "WAT1: a corr"),
        ({"CTYPE1": "RA---TAB", "CTYPE2": "DEC--TAB"}, "CTYPE1: lookup-table distortions"),
        ({"CTYPE1": "X", "CTYPE2": "Y"}, "no celestial WCS"),
        ({"CD1_1": 0.0, "CD1_2": 0.0, "CD2_1": 0.0, "CD2_2": 0.0}, "singular WCS: every CD"),
        ({"CD1_1": 1e-5, "CD1_2": 1e-5, "CD2_1": 1e-5, "CD2_2": 1e-5}, "(?i)singular"),
        ({"CRVAL1": "12:00:00"}, "CRVAL1 is \"'12:00:00'\", wanted a number"),
        ({"CTYPE1": 5}, "CTYPE1 is '5', wanted a string"),
        ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "WCS"),
        ({"CUNIT1": "parsec"}, "WCS"),
    ],
)
def test_no_usable_wcs(
    write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any], cards: dict[str, Any], problem: str
) -> None:
    """A WCS that is singular, unreadable, not celestial or made of lookup tables is None; the pixels can be read."""
    frame = store.open(str(write("a.fits", pixels, **(sky | cards))))
    assert frame.wcs is None
    assert frame.wcs_cards() == []
    with pytest.raises(ValueError, match=problem):
        raise ValueError(frame.wcs_problem)
    np.testing.assert_array_equal(frame[0:61, 0:83], pixels)


@pytest.mark.parametrize("keyword", ["CPERR1", "CQERR2", "DVERR", "D2IMERR1", "CPDIS1A"])
@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
def test_no_distortion_of_the_primary_wcs(
    write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any], keyword: str
) -> None:
    """The size of a distortion that is not there, or a distortion of another WCS, costs no WCS."""
    path = write("a.fits", pixels, **(sky | {keyword: "LOOKUP" if keyword == "CPDIS1A" else 0.1}))
    frame = store.open(str(path))
    assert frame.wcs is not None
    want = WCS(fits.getheader(path)).all_pix2world([3.0, 70.0], [5.0, 50.0], 0)
    np.testing.assert_allclose(frame.wcs.all_pix2world([3.0, 70.0], [5.0, 50.0], 0), want, rtol=0, atol=1e-11)


SYSTEMS: dict[str, dict[str, Any]] = {
    "icrs": {},
    "fk5": {"RADESYS": "FK5", "EQUINOX": 2000.0},
    "fk5 1975": {"RADESYS": "FK5", "EQUINOX": 1975.0},
    "fk4": {"RADESYS": "FK4", "EQUINOX": 1950.0},
    "icrs with an equinox": {"RADESYS": "ICRS", "EQUINOX": 1975.0},
    "galactic": {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"},
    "latitude first": {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.2, "CRVAL2": 150.1},
    "sip": SIP,
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_sky_to_pixel(system: str, sky: dict[str, Any]) -> None:
    """An ICRS position gets the pixel that astropy's high-level interface gives, in every system in use."""
    wcs = WCS(fits.Header(sky | SYSTEMS[system]))
    there = wcs.pixel_to_world(12.25, 47.5).icrs
    got = sky_to_pixel(wcs, float(there.ra.deg), float(there.dec.deg), "a.fits")
    assert [type(value) for value in got] == [float, float]
    # FK5 J2000 counts as ICRS: 23 mas, a tenth of a pixel here.
    assert got == pytest.approx((12.25, 47.5), abs=0.1 if system == "fk5" else 1e-3)


def test_fk5_counts_as_icrs(sky: dict[str, Any]) -> None:
    """A header that says FK5 J2000 gives the very same pixel as one that says ICRS."""
    icrs, fk5 = (WCS(fits.Header(sky | SYSTEMS[name])) for name in ("icrs", "fk5"))
    assert sky_to_pixel(icrs, 150.1001, 2.1999, "a.fits") == sky_to_pixel(fk5, 150.1001, 2.1999, "a.fits")


@pytest.mark.parametrize(
    ("cards", "found"),
    [({"CTYPE1": "ELON-TAN", "CTYPE2": "ELAT-TAN"}, "ELON ICRS"), ({"RADESYS": "GAPPT"}, "RA-- GAPPT")],
)
def test_sky_to_pixel_in_unknown_systems(sky: dict[str, Any], cards: dict[str, Any], found: str) -> None:
    """An ICRS position is not taken for one in another system; the frame and its system are named."""
    with pytest.raises(FrameMismatch, match=f"a.fits: a WCS in {found}, wanted RA or GLON in a system in use"):
        sky_to_pixel(WCS(fits.Header(sky | cards)), 150.1, 2.2, "a.fits")


@pytest.mark.parametrize("cards", [{}, SIP, {"CTYPE1": "RA---SIN", "CTYPE2": "DEC--SIN"}])
def test_sky_to_pixel_off_the_projection(sky: dict[str, Any], cards: dict[str, Any]) -> None:
    """A position on the other side of the sky has no pixel."""
    assert np.isnan(sky_to_pixel(WCS(fits.Header(sky | cards)), 330.1, -2.2, "a.fits")).all()


def test_sky_to_pixel_where_the_distortion_does_not_converge(sky: dict[str, Any]) -> None:
    """A position that a wild distortion reaches from no pixel has none."""
    wild = sky | SIP | {"A_2_0": 5.0, "B_0_2": -7.0}
    assert np.isnan(sky_to_pixel(WCS(fits.Header(wild)), 150.2, 2.3, "a.fits")).all()


@pytest.mark.parametrize("keyword", ["EQUINOX", "EPOCH"])
@pytest.mark.parametrize("radesys", [{}, {"RADESYS": "FK5"}, {"RADESYS": "ICRS"}])
def test_equinox_as_text(
    write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any], keyword: str, radesys: dict[str, Any]
) -> None:
    """With J2000 written as text the WCS is the one that astropy reads; another equinox as text is a problem."""
    del sky["RADESYS"]
    for i, text in enumerate(["2000.0", "J2000", " j2000.000", "2000"]):
        path = write(f"{i}.fits", pixels, **(sky | radesys | {keyword: text}))
        frame = store.open(str(path))
        assert frame.wcs is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = WCS(fits.getheader(path))
            assert frame.wcs.wcs.compare(truth.wcs)
            assert wcs_to_celestial_frame(frame.wcs).is_equivalent_frame(wcs_to_celestial_frame(truth))
        moved = store.open(str(write(f"moved{i}.fits", pixels, **(sky | {"CRPIX1": 47.3, keyword: 2000.0}))))
        assert on_grid(moved, frame).resampled
    frame = store.open(str(write("b.fits", pixels, **(sky | radesys | {keyword: "B1950"}))))
    assert (frame.wcs, frame.wcs_problem) == (None, f"{keyword} is \"'B1950   '\", wanted a number")


def test_plane_across_the_sky_axes(write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any]) -> None:
    """If the first axis is dropped, the WCS of axes 1 and 2 is not the plane's."""
    frame = store.open(str(write("a.fits", pixels.reshape(61, 83, 1), **sky)))
    assert frame.shape == (61, 83)
    assert frame.wcs is None
    assert "not the first two axes" in str(frame.wcs_problem)


def test_made_once(write: Write, store: FrameStore, pixels: np.ndarray, sky: dict[str, Any]) -> None:
    """Header and WCS are parsed once per frame."""
    frame = store.open(str(write("a.fits", pixels, **sky)))
    assert frame.wcs is frame.wcs
    assert frame.header is frame.header
