"""Planes on other grids, compared with positions and pixels computed independently."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from helpers import Write
from scipy.ndimage import map_coordinates

from stampworker.config import FrameSettings
from stampworker.errors import FrameMismatch
from stampworker.frames import Frame, FrameStore, PlaneKind, Regridded, on_grid, regrid

ALL = (slice(0, 61), slice(0, 83))
FLUX = 3000.0
STARS = [(150.1003, 2.1997), (150.0985, 2.2011), (150.1012, 2.2006)]


def scene(cards: dict[str, Any], shape: tuple[int, int], arcsec: float = 1.2) -> np.ndarray:
    """Paint known stars on any grid, flux per pixel, from the sky position and area of each pixel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wcs = WCS(fits.Header(cards))
        y, x = np.mgrid[: shape[0], : shape[1]]
        sky = wcs.pixel_to_world(x, y).icrs
        right, up = wcs.pixel_to_world(x + 0.5, y).icrs, wcs.pixel_to_world(x, y + 0.5).icrs
    cos = np.cos(sky.dec.rad)
    a, b = (right.ra - sky.ra).arcsec * 2 * cos, (right.dec - sky.dec).arcsec * 2
    c, d = (up.ra - sky.ra).arcsec * 2 * cos, (up.dec - sky.dec).arcsec * 2
    area = np.abs(a * d - b * c)
    data = np.zeros(shape)
    for ra, dec in STARS:
        r = sky.separation(SkyCoord(ra, dec, unit="deg")).arcsec
        data += FLUX * np.exp(-0.5 * (r / arcsec) ** 2) / (2 * np.pi * arcsec**2)
    return (data * area).astype("f4")


def turned(sky: dict[str, Any], degrees: float, arcsec: float, x: float, y: float) -> dict[str, Any]:
    """Return a grid about the same centre, turned and scaled, its CRPIX at 1-based x, y."""
    c, s, p = np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), arcsec / 3600
    return sky | {"CD1_1": -p * c, "CD1_2": p * s, "CD2_1": p * s, "CD2_2": p * c, "CRPIX1": x, "CRPIX2": y}


SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2, "A_2_0": 4e-4, "B_1_1": -3e-4}
TPV = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_1": 1.01, "PV2_1": 0.99, "PV1_4": 3.0}
GALACTIC = {"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN", "CRVAL1": 236.8137, "CRVAL2": 42.1026}
B1950 = {"RADESYS": "FK4", "EQUINOX": 1950.0, "CRVAL1": 149.4537, "CRVAL2": 2.4405}
SWAPPED = {"CTYPE1": "DEC--TAN", "CTYPE2": "RA---TAN", "CRVAL1": 2.2, "CRVAL2": 150.1, "CUNIT1": "deg"}


@pytest.mark.parametrize(
    "other", [{}, SIP, TPV, GALACTIC, B1950, SWAPPED], ids=["tan", "sip", "tpv", "galactic", "b1950", "swapped"]
)
def test_flux_and_place(write: Write, store: FrameStore, sky: dict[str, Any], other: dict[str, Any]) -> None:
    """Stars of a turned, coarser, distorted grid have the positions and fluxes that they have on the science grid."""
    science = store.open(str(write("s.fits", scene(sky, (61, 83)), **sky)))
    cards = turned(sky, 25, 0.4, 35.2, 44.9) | other
    frame = on_grid(store.open(str(write("t.fits", scene(cards, (95, 70)), **cards))), science)
    assert isinstance(frame, Regridded)
    assert frame.resampled
    assert (frame.shape, frame.dtype, frame.ndim) == ((61, 83), np.float32, 2)
    got, want = frame[ALL], science[ALL]
    assert got.flags.c_contiguous
    good = np.isfinite(got)
    assert good.mean() > 0.5
    peak = want.max()
    np.testing.assert_allclose(got[good], want[good], atol=0.004 * peak)
    assert got[good].sum() == pytest.approx(want[good].sum(), rel=2e-3)
    np.testing.assert_allclose(frame[20:35, 30:50], got[20:35, 30:50], rtol=1e-6)
    assert frame.wcs is science.wcs
    assert frame.wcs_cards() == science.wcs_cards()
    assert frame.header["CRPIX1"] == sky["CRPIX1"]
    assert frame.url.endswith("/t.fits")


def test_header_has_the_science_wcs_only(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """The header keeps no WCS of the frame's own pixels: neither its name nor an alternative one."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    own = {"WCSNAME": "own", "CTYPE1A": "LINEAR", "CRPIX1A": 7.0, "CDELT1A": 2.0, "CRDER1": 1e-5}
    frame = on_grid(store.open(str(write("t.fits", np.zeros((50, 50), "f4"), **sky, **own, FILTER="r"))), science)
    assert not set(own) & set(frame.header)
    assert frame.header["FILTER"] == "r"


@pytest.mark.parametrize(
    ("bunit", "per_area"),
    [
        *[("adu", False), ("nJy", False), ("electron/s", False), ("deg", False), ("", False)],
        *[("MJy/sr", True), ("adu / arcsec**2", True), ("mag arcsec-2", True), ("W m-2 sr-1", True), ("Jy/beam", True)],
    ],
)
def test_unit_decides_about_the_area(
    write: Write, store: FrameStore, sky: dict[str, Any], bunit: str, per_area: bool
) -> None:
    """Values scale with the ratio of pixel areas unless BUNIT says per solid angle; errors too, a variance twice."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **turned(sky, 0, 0.2, 41, 31))))
    other = store.open(str(write("t.fits", np.full((61, 83), 7, "f4"), **turned(sky, 0, 0.3, 41, 31), BUNIT=bunit)))
    ratio = 1 if per_area else (0.2 / 0.3) ** 2
    for kind, power in (("image", 1), ("error", 1), ("variance", 2)):
        got = on_grid(other, science, kind)[25:35, 30:40]  # type: ignore[arg-type]
        np.testing.assert_allclose(got, 7 * ratio**power, rtol=1e-5)


def test_same_grid_is_the_frame_itself(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """Grids that differ by 0.005 pixels are one, by 0.02 pixels are not; one grid may be written in other keywords."""
    data = np.zeros((61, 83), "f4")
    science = store.open(str(write("s.fits", data, **sky)))
    pc = {k.replace("CD", "PC"): v for k, v in sky.items() if k.startswith("CD")} | {"CDELT1": 1.0, "CDELT2": 1.0}
    near = store.open(str(write("near.fits", data, **(sky | {"CRPIX1": 40.305}))))
    far = store.open(str(write("far.fits", data, **(sky | {"CRPIX1": 40.32}))))
    other = store.open(str(write("pc.fits", data, **({k: v for k, v in sky.items() if k[:2] != "CD"} | pc))))
    none = store.open(str(write("none.fits", data)))
    for frame in (science, near, other, none):
        assert on_grid(frame, science) is frame
    assert on_grid(near, none) is near
    assert on_grid(far, science).resampled


@pytest.mark.parametrize("lacking", ["science", "other"])
def test_shape_without_wcs(write: Write, store: FrameStore, sky: dict[str, Any], lacking: str) -> None:
    """A frame of another shape is a mismatch if either frame has no WCS; the message has both files and shapes."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **({} if lacking == "science" else sky))))
    other = store.open(str(write("t.fits", np.zeros((60, 80), "f4"), **(sky if lacking == "science" else {}))))
    for _ in range(2):
        with pytest.raises(FrameMismatch, match=r"t\.fits: shape \(60, 80\), wanted \(61, 83\) as .*s\.fits has"):
            on_grid(other, science)


@pytest.mark.parametrize("which", ["science", "other"])
@pytest.mark.parametrize("cards", [{"CTYPE1": "ELON-TAN", "CTYPE2": "ELAT-TAN"}, {"RADESYS": "GAPPT"}])
def test_unknown_systems_are_not_compared(
    write: Write, store: FrameStore, sky: dict[str, Any], which: str, cards: dict[str, Any]
) -> None:
    """An ecliptic or unknown system is not compared with an equatorial one."""
    data = np.zeros((61, 83), "f4")
    strange = sky | cards
    science = store.open(str(write("s.fits", data, **(strange if which == "science" else sky))))
    other = store.open(str(write("t.fits", data, **(sky if which == "science" else strange))))
    with pytest.raises(
        FrameMismatch, match=r"cannot be compared with that of .*s\.fits: the WCS of .* wanted RA or GLON"
    ):
        on_grid(other, science)
    alike = store.open(str(write("u.fits", data, **(strange | {"CRPIX1": 99.0}))))
    assert on_grid(alike, other if which == "other" else science).resampled


def test_lookup_tables_are_not_compared(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """Frames with the same lookup-table distortions are on one grid; with other ones they are a mismatch."""
    data = np.zeros((61, 83), "f4")
    tables = sky | {"CPDIS1": "LOOKUP"}
    science, other = (store.open(str(write(f"{n}.fits", data, **tables))) for n in "st")
    plain = store.open(str(write("p.fits", data, **sky)))
    moved = store.open(str(write("m.fits", data, **(tables | {"CRPIX1": 45.0}))))
    detector, other_detector = (
        store.open(str(write(f"d{n}.fits", data, **(sky | {"D2IMDIS1": "LOOKUP", "D2IM1.EXTVER": float(n)}))))
        for n in (1, 2)
    )
    assert on_grid(other, science) is other
    for frame in (plain, moved):
        with pytest.raises(FrameMismatch, match=r"cannot be compared with that of .*s\.fits.*CPDIS1: lookup-table"):
            on_grid(frame, science)
    with pytest.raises(FrameMismatch, match="D2IMDIS1: lookup-table"):
        on_grid(detector, other_detector)


def all_sky(projection: str, centre: float) -> tuple[dict[str, Any], np.ndarray]:
    """Return the cards of an all-sky map of degrees, and a pattern on the sky, flux per pixel."""
    cards = {"CTYPE1": f"RA---{projection}", "CTYPE2": f"DEC--{projection}", "CRVAL1": centre, "CRVAL2": 0.0}
    cards |= {"CRPIX1": 180.5, "CRPIX2": 90.5, "CDELT1": -1.0, "CDELT2": 1.0, "RADESYS": "ICRS"}
    y, x = np.mgrid[:180, :360]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ra, dec = WCS(fits.Header(cards)).all_pix2world(x, y, 0)
    return cards, 100 + 20 * np.cos(np.radians(3 * ra)) + np.nan_to_num(dec)


@pytest.mark.parametrize(("projection", "side", "share"), [("CAR", 61, 0.9), ("CAR", 15, 0.6), ("AIT", 61, 0.6)])
def test_across_the_edge_of_a_map(
    write: Write, store: FrameStore, sky: dict[str, Any], projection: str, side: int, share: float
) -> None:
    """A stamp across the edge of an all-sky map is right on both sides, and NaN only where the map has no data."""
    about = turned(sky, 20, 900.0, 41, 31) | {"CRVAL1": 180.0, "CRVAL2": 5.0}
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **about)))
    got, want = (
        on_grid(store.open(str(write(f"{centre}.fits", data, **cards))), science)
        for centre, (cards, data) in ((i, all_sky(projection, i)) for i in (0, 180))
    )
    part = (slice(30 - side // 2, 31 + side // 2), slice(40 - side // 2, 41 + side // 2))
    values, truth = got[part], want[part]
    there = np.isfinite(values)
    assert there.mean() > share
    assert np.isfinite(truth).all()
    columns = np.nonzero(there)[1]
    assert columns.min() < side // 3 < 2 * side // 3 <= columns.max()
    np.testing.assert_allclose(values[there], truth[there], rtol=1e-3)


def test_window_over_the_edge(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """A window over the science frame's edge has data where the other frame has some."""
    science = store.open(str(write("s.fits", scene(sky, (61, 83)), **sky)))
    wide = sky | {"CRPIX1": sky["CRPIX1"] + 20.5, "CRPIX2": sky["CRPIX2"] + 10.5}
    other = store.open(str(write("t.fits", scene(wide, (81, 123)), **wide)))
    frame = on_grid(other, science)
    assert isinstance(frame, Regridded)
    got = frame.window(-12, 20, -5, 30)
    assert got.shape == (32, 35)
    np.testing.assert_array_equal(np.isfinite(got), np.broadcast_to(np.arange(-12, 20)[:, None] >= -10, got.shape))
    np.testing.assert_allclose(got[12:, 5:], frame[0:20, 0:30], rtol=1e-6)


def mask_of_a_pixel(value: int) -> np.ndarray:
    mask = np.zeros((61, 83), "i2")
    mask[30, 40] = value
    return mask


@pytest.mark.parametrize(("dx", "dy", "reach"), [(0.5, 0.5, (4, 4)), (0.0, 0.4, (4, 1)), (3.0, -2.0, (1, 1))])
def test_masks_and_holes_grow_alike(
    write: Write, store: FrameStore, sky: dict[str, Any], dx: float, dy: float, reach: tuple[int, int]
) -> None:
    """A bad pixel makes 4 pixels bad along a shifted axis, and 1 pixel along an aligned axis."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    cards = sky | {"CRPIX1": sky["CRPIX1"] + dx, "CRPIX2": sky["CRPIX2"] + dy}
    image = np.ones((61, 83), "f4")
    image[30, 40] = np.nan
    holes = np.isnan(on_grid(store.open(str(write("t.fits", image, **cards))), science)[5:56, 5:78])
    mask = on_grid(store.open(str(write("m.fits", mask_of_a_pixel(8), **cards)), mask=True), science, "mask")[
        5:56, 5:78
    ]
    assert mask.dtype == np.int16
    assert set(np.unique(mask)) == {0, 8}
    np.testing.assert_array_equal(mask == 8, holes)
    rows, columns = np.nonzero(holes)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == reach
    assert rows.mean() + 5 == pytest.approx(30 - dy, abs=0.51)
    assert columns.mean() + 5 == pytest.approx(40 - dx, abs=0.51)


def test_beyond_the_other_frame(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """Outside the other frame, planes are NaN and masks 1, also if it is elsewhere on the sky."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    corner = sky | {"CRPIX1": sky["CRPIX1"] - 50, "CRPIX2": sky["CRPIX2"] - 40}
    away = sky | {"CRVAL1": 330.0, "CRVAL2": -40.0}
    for i, (cards, share) in enumerate([(corner, 33 * 21), (away, 0)]):
        image = on_grid(store.open(str(write(f"t{i}.fits", np.ones((61, 83), "f4"), **cards))), science)[ALL]
        mask = on_grid(store.open(str(write(f"m{i}.fits", np.zeros((61, 83), "u1"), **cards)), mask=True), science)[ALL]
        assert np.isfinite(image).sum() == share
        np.testing.assert_array_equal(mask, ~np.isfinite(image))
        assert not np.isfinite(image[:40, :50]).any()


def test_kinds_of_interpolation(write: Write, store: FrameStore, stars: np.ndarray, sky: dict[str, Any]) -> None:
    """Images are interpolated by cubic splines, errors linearly."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    cards = sky | {"CRPIX1": sky["CRPIX1"] + 2.3, "CRPIX2": sky["CRPIX2"] - 1.6}
    other = store.open(str(write("t.fits", stars, **cards)))
    y, x = np.mgrid[20:40, 20:60].astype(float)
    orders: dict[PlaneKind, Literal[1, 3]] = {"image": 3, "error": 1}
    for kind, order in orders.items():
        want = map_coordinates(stars.astype("f8"), [y - 1.6, x + 2.3], order=order, mode="mirror")
        np.testing.assert_allclose(on_grid(other, science, kind)[20:40, 20:60], want, rtol=3e-6)


def test_a_hole_does_not_ring(write: Write, store: FrameStore, stars: np.ndarray, sky: dict[str, Any]) -> None:
    """Beside a hole, the interpolated image is the same as without the hole, to the noise of a sky pixel."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    cards = sky | {"CRPIX1": sky["CRPIX1"] + 0.5}
    holed = stars.copy()
    holed[28:33, 38:44] = np.nan
    whole, got = (
        on_grid(store.open(str(write(f"{i}.fits", data, **cards))), science)[ALL]
        for i, data in enumerate((stars, holed))
    )
    beside = np.isfinite(got) & np.isfinite(whole)
    assert (~np.isfinite(got[25:36, 34:48])).any()
    assert np.abs(got - whole)[beside].max() < 0.03 * np.ptp(stars[20:40, 30:50])


def test_only_the_needed_section_is_read(
    write: Write, store: FrameStore, sky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stamp reads its own footprint on the other frame, with the spline's margin."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **sky)))
    cards = sky | {"CRPIX1": sky["CRPIX1"] + 500.5, "CRPIX2": sky["CRPIX2"] + 300.5}
    other = store.open(str(write("t.fits", np.zeros((700, 1100), "f4"), **cards)))
    asked: list[tuple[int, int, int, int]] = []
    read: Callable[..., np.ndarray] = other._read
    monkeypatch.setattr(other, "_read", lambda *box: (asked.append(box), read(*box))[1])
    on_grid(other, science)[20:31, 40:51]
    assert asked == [(300 + 20 - 12, 300 + 31 + 13, 500 + 40 - 12, 500 + 51 + 13)]


def test_far_smaller_pixels_are_refused(write: Write, store: FrameStore, sky: dict[str, Any]) -> None:
    """A section that needs too many pixels of the other frame is refused before it is read."""
    science = store.open(str(write("s.fits", np.zeros((61, 83), "f4"), **turned(sky, 0, 100.0, 41, 31))))
    other = store.open(str(write("t.fits", np.zeros((4500, 4500), "u1"), **turned(sky, 0, 0.5, 2250, 2250))))
    with pytest.raises(FrameMismatch, match="wanted at most 16777216 pixels"):
        on_grid(other, science)[ALL]


def test_decision_is_kept_and_let_go(
    write: Write, store: FrameStore, sky: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two frames are compared once, and the stored answer does not keep them alive."""
    science, other = (store.open(str(write(f"{n}.fits", np.zeros((61, 83), "f4"), **sky))) for n in "st")
    compared: list[Frame] = []
    compare = regrid._compare
    monkeypatch.setattr(regrid, "_compare", lambda a, b: (compared.append(a), compare(a, b))[1])
    gc.collect()
    before = len(regrid._one_grid)
    for _ in range(3):
        assert on_grid(other, science) is other
    assert len(compared) == 1
    assert len(regrid._one_grid) == before + 1
    store.close()
    compared.clear()
    del science, other
    gc.collect()
    assert len(regrid._one_grid) == before


def test_example_grids(odd: Path) -> None:
    """Resampled example templates agree with an independent interpolation of the whole frame."""
    store = FrameStore(FrameSettings(frame_roots=(str(odd),)))
    science = store.open("base_science.fits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        here = WCS(fits.getheader(odd / "base_science.fits"))
        y, x = np.mgrid[0:200, 0:200]
        for name in ("template_other_grid.fits", "template_native_grid.fits"):
            there = WCS(fits.getheader(odd / name))
            data = fits.getdata(odd / name).astype("f8")
            px, py = there.all_world2pix(*here.all_pix2world(x, y, 0), 0)
            ratio = abs(np.linalg.det(here.pixel_scale_matrix) / np.linalg.det(there.pixel_scale_matrix))
            want = map_coordinates(data, [py, px], order=3, mode="mirror") * ratio
            inside = (px > 3) & (py > 3) & (px < data.shape[1] - 4) & (py < data.shape[0] - 4)
            got = on_grid(store.open(name), science)[0:200, 0:200]
            np.testing.assert_allclose(got[inside], want[inside], rtol=2e-3)
            assert not np.isfinite(got[(px < -1) | (py < -1) | (px > data.shape[1]) | (py > data.shape[0])]).any()
