from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import astropy
import numpy as np
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.time import Time
from astropy.utils import minversion
from astropy.utils.masked import Masked
from astropy.wcs import WCS, DistortionLookupTable
from hypothesis import given
from hypothesis import strategies as st

from stampworker.cutouts import crop_image, crop_image_centered, get_cutout

REFERENCE = json.loads((Path(__file__).parents[1] / "reference/cutouts.json").read_text())
DTYPES = ["f4", ">f4", "f8", "f2", "i2", ">i4", "u1", "u8", "bool"]
PLANE = np.random.default_rng(3).integers(1, 100, (61, 83))
SIP = {
    "A_ORDER": 2,
    "A_2_0": 3e-6,
    "A_1_1": -2e-6,
    "A_0_2": 1e-6,
    "B_ORDER": 3,
    "B_2_0": -1e-6,
    "B_0_2": 4e-6,
    "B_3_0": 2e-8,
    "AP_ORDER": 2,
    "AP_0_0": 0.01,
    "AP_1_0": 1e-5,
    "AP_2_0": -3e-6,
    "BP_ORDER": 2,
    "BP_0_2": -4e-6,
}


class Plane:
    """A stand-in for a frame: no array, but slices of one, which it counts and remembers."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.slices: list[tuple[slice, slice]] = []

    def __getitem__(self, section: tuple[slice, slice]) -> np.ndarray:
        self.slices.append(section)
        return self.data[section]


def as_ctype(header: fits.Header, ctype: str, cards: dict[str, Any]) -> fits.Header:
    header["CTYPE1"], header["CTYPE2"] = f"RA---{ctype}", f"DEC--{ctype}"
    header.update(cards)
    return header


def assert_same_sky(wcs: WCS, whole: WCS, x1: int, y1: int, side: int = 7) -> None:
    """Check that each pixel of a crop has its sky position in the frame, to a microarcsecond."""
    y, x = np.mgrid[:side, :side]
    found = np.array(wcs.all_pix2world(x, y, 0))
    wanted = np.array(whole.all_pix2world(x + x1, y + y1, 0))
    assert np.abs(wanted[:, 0, 0] - wanted[:, -1, -1]).min() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-10)


@given(
    st.integers(-100, 200), st.integers(-100, 200), st.integers(1, 120), st.integers(1, 120), st.sampled_from(DTYPES)
)
def test_crop_equals_slice_of_padded_plane(x1: int, y1: int, width: int, height: int, dtype: str) -> None:
    """A crop is the slice of a plane with a wide border of NaN, 0 or False, in the same dtype and byte order."""
    data = PLANE.astype(dtype)
    padded = np.pad(data, 400, constant_values=np.nan if data.dtype.kind == "f" else 0)
    cropped = crop_image(data, x1, y1, width, height)
    assert cropped.dtype == data.dtype
    assert cropped.flags.c_contiguous
    np.testing.assert_array_equal(cropped, padded[y1 + 400 : y1 + 400 + height, x1 + 400 : x1 + 400 + width])


@pytest.mark.parametrize("wrap", [np.asarray, np.asfortranarray, np.ndarray.tolist, Plane])
def test_crop_is_contiguous_copy_of_anything_that_slices(wrap: Any) -> None:
    """Arrays in either order, lists and objects that only slice give the same crop, which shares no memory."""
    data = PLANE.astype(float)
    wrapped = wrap(data)
    cropped = crop_image(wrapped, 10, 20, 5, 7)
    assert cropped.flags.c_contiguous
    assert not np.shares_memory(cropped, data)
    if isinstance(wrapped, np.ndarray):
        assert not np.shares_memory(cropped, wrapped)
    np.testing.assert_array_equal(cropped, data[20:27, 10:15])


def test_crop_of_whole_rows_is_a_copy() -> None:
    """A change of the cutout does not change the frame, even if the slice is contiguous."""
    data = PLANE.astype(float)
    assert not np.shares_memory(crop_image(data, 0, 10, 83, 5), data)
    assert not np.shares_memory(crop_image(data, 0, 0, 83, 61), data)


@pytest.mark.parametrize(
    ("corner", "sections"),
    [
        ((10, 20), [(slice(20, 25), slice(10, 14))]),
        ((-2, 58), [(slice(58, 61), slice(0, 2))]),
        ((83, 20), []),
        ((10, -5), []),
    ],
)
def test_crop_reads_its_section_once(corner: tuple[int, int], sections: list[Any]) -> None:
    """Only the overlap is sliced, once; for a rectangle outside the frame nothing is read."""
    plane = Plane(PLANE.astype("f4"))
    crop_image(plane, *corner, 4, 5)
    assert plane.slices == sections


def test_crop_of_fits_section(tmp_path: Path) -> None:
    """An HDU's section of scaled integers is padded with NaN and is never read as a whole."""
    path = tmp_path / "scaled.fits"
    hdu = fits.ImageHDU(PLANE.astype("i2"))
    hdu.header["BSCALE"], hdu.header["BZERO"] = 0.5, 10
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path)
    with fits.open(path, do_not_scale_image_data=False) as hdus:
        wanted = crop_image(hdus[1].data, -2, -1, 5, 4)
    with fits.open(path) as hdus:
        found = get_cutout(hdus[1].section, {"x": 0, "y": 0}, 2, mask=hdus[1].section)
        np.testing.assert_array_equal(crop_image(hdus[1].section, -2, -1, 5, 4), wanted)
        assert hdus[1]._data_loaded is False
    assert np.isnan(found["image"][0]).all()
    np.testing.assert_array_equal(found["mask"], found["image"])


def test_small_integers_do_not_overflow() -> None:
    """Corners and sizes may be numpy's small integers, without overflow."""
    data = np.zeros((400, 400))
    data[240:260, 250:281] = 1
    rectangle: Any = (np.uint8(250), np.uint8(240), np.uint8(31), np.uint8(20))
    assert crop_image(data, *rectangle).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((np.zeros(5), 0, 0, 1, 1), r"data: found the shape \(5,\), wanted two axes"),
        ((np.zeros((2, 3, 4)), 0, 0, 1, 1), r"data: found the shape \(2, 3, 4\)"),
        ((np.zeros((5, 5)), 0, 0, 0, 1), "width, height: found 0, 1, wanted at least 1"),
        ((np.zeros((5, 5)), 0, 0, 1, -3), "width, height: found 1, -3"),
    ],
)
def test_crop_refuses_wrong_arguments(arguments: tuple[Any, ...], match: str) -> None:
    """The error about a plane that is not 2-D, or about an empty rectangle, names the argument."""
    with pytest.raises(ValueError, match=match):
        crop_image(*arguments)


@pytest.mark.parametrize(("position", "pixel"), [(10.5, 11), (11.5, 12), (-0.5, 0), (-1.5, -1), (10.499, 10), (0, 0)])
def test_halves_are_rounded_up(position: float, pixel: int) -> None:
    """A position on the border of two pixels belongs to the upper one, on both axes, even or odd."""
    y, x = np.mgrid[-50:50, -50:50]
    for function in (crop_image_centered, lambda d, x, y, r: get_cutout(d, {"x": x, "y": y}, r)["image"]):
        assert function(x, position + 50, 20, 3)[3, 3] == pixel
        assert function(y, 20, position + 50, 3)[3, 3] == pixel


def test_float32_position_is_rounded_in_double_precision() -> None:
    """A float32 just below a half stays in its pixel."""
    x: Any = np.nextafter(np.float32(0.5), np.float32(0))
    y: Any = np.float32(1)
    assert crop_image_centered(np.arange(9.0).reshape(3, 3), x, y, 0)[0, 0] == 3


@pytest.mark.parametrize(("radius", "side"), [(0, 1), (0.1, 3), (1, 3), (30.2, 63), (31, 63)])
def test_side_is_odd(radius: float, side: int) -> None:
    """The square has 2·ceil(radius) + 1 pixels a side, whatever the edge."""
    assert crop_image_centered(PLANE, 80.2, 3, radius).shape == (side, side)


@pytest.mark.parametrize(
    ("x", "y", "radius", "match"),
    [
        (np.nan, 1, 3, "x, y: found nan, 1, wanted finite"),
        (1, np.inf, 3, "x, y: found 1, inf"),
        (np.ma.masked, 1, 3, "x, y: found --, 1"),
        (1, 1, -1, "radius: found -1, wanted a number that is not negative"),
        (1, 1, np.nan, "radius: found nan"),
    ],
)
def test_positions_must_be_numbers(x: Any, y: Any, radius: float, match: str) -> None:
    """The error about a masked or non-finite position, or a negative radius, names the argument."""
    with pytest.raises(ValueError, match=match):
        get_cutout(PLANE, {"x": x, "y": y}, radius)


@pytest.mark.parametrize("case", REFERENCE["crops"], ids=lambda c: f"{c['dtype']}-{c['x']}-{c['y']}-{c['r']}")
def test_crop_is_the_references(case: dict[str, Any]) -> None:
    """Pixels and cards equal those of the independent code, also at edges and partly outside the frame."""
    data = (np.arange(7)[:, None] * 100.0 + np.arange(10)).astype(case["dtype"])
    header = fits.Header([("CTYPE1", "RA---TAN"), ("CTYPE2", "DEC--TAN"), ("CRPIX1", 4.5), ("CRPIX2", 3.25)])
    crop, cropped_header = crop_image_centered(data, case["x"], case["y"], case["r"], header=header)
    wanted = np.array(case["crop"], dtype=float if case["dtype"] == "f4" else None)
    np.testing.assert_array_equal(crop, wanted)
    assert {name: cropped_header[name] for name in case["cards"]} == case["cards"]


@pytest.mark.parametrize(
    ("ctype", "cards"),
    [
        ("TAN", {}),
        ("TAN-SIP", SIP),
        ("TPV", {"PV1_0": 0, "PV1_1": 1.001, "PV1_4": 0.02, "PV2_1": 0.999, "PV2_5": -0.03}),
        ("ZPN", {"PV2_1": 1.0, "PV2_3": 20.0}),
    ],
)
@pytest.mark.parametrize(("x1", "y1"), [(30, 40), (-3, 57), (79, -2)])
def test_header_keeps_each_pixel_on_the_sky(frame: Any, ctype: str, cards: dict[str, Any], x1: int, y1: int) -> None:
    """Linear, SIP and TPV solutions survive a crop, over the edge too; the given header does not change."""
    header = as_ctype(frame.header, ctype, cards)
    before = header.tostring()
    _, cropped = crop_image(frame.data, x1, y1, 7, 7, header=header)
    assert_same_sky(WCS(cropped), WCS(header), x1, y1)
    assert header.tostring() == before
    assert (cropped["NAXIS1"], cropped["NAXIS2"], cropped["OBJECT"]) == (7, 7, "test field")


def test_header_without_crpix(frame: Any) -> None:
    """A missing CRPIX counts as 0, and the crop has the moved one."""
    del frame.header["CRPIX1"], frame.header["CRPIX2"]
    _, cropped = crop_image(frame.data, 30, 40, 7, 7, header=frame.header)
    assert_same_sky(WCS(cropped), WCS(frame.header), 30, 40)


def test_repeated_card_does_not_stay_behind(frame: Any) -> None:
    """If a header has CRPIX twice, both are moved: WCS reads the last one, Header the first one."""
    frame.header.append(("CRPIX1", 12.5), end=True)
    cutout = get_cutout(frame.data, {"x": 33, "y": 43}, 3, header=frame.header)
    assert_same_sky(cutout["wcs"], WCS(frame.header), 30, 40)
    assert [cutout["header"]["CRPIX1", copy] for copy in (0, 1)] == [10.25, -17.5]


@pytest.mark.parametrize("value", ["12.5", None])
def test_card_that_is_no_number_is_named(frame: Any, value: Any) -> None:
    """The error about a CRPIX that is no number names the card."""
    frame.header["CRPIX2"] = value
    with pytest.raises(ValueError, match=f"header: found CRPIX2 = {value!r}, wanted a number"):
        crop_image(frame.data, 30, 40, 7, 7, header=frame.header)


def test_alternative_wcs_follows(frame: Any) -> None:
    """An alternative WCS is moved like the primary one."""
    for name in ("CTYPE", "CRVAL", "CRPIX"):
        for axis in "12":
            frame.header[f"{name}{axis}B"] = frame.header[name + axis]
    frame.header["CRPIX1B"], frame.header["CDELT1B"], frame.header["CDELT2B"] = 12.5, -1e-4, 2e-4
    _, cropped = crop_image(frame.data, 30, 40, 7, 7, header=frame.header)
    assert_same_sky(WCS(cropped, key="B"), WCS(frame.header, key="B"), 30, 40)


def test_header_without_wcs() -> None:
    """A header without WCS gets none, and the cutout neither."""
    header = fits.Header([("OBJECT", "M 31")])
    cutout = get_cutout(PLANE, {"x": 20, "y": 30}, 3, header=header)
    assert "wcs" not in cutout
    assert "CRPIX1" not in cutout["header"]
    assert cutout["header"]["CROP_X1"] == 17


@pytest.mark.parametrize("card", ["CPDIS1", "CQDIS2", "D2IMDIS1", "CPDIS2A", "DP1.EXTVER"])
def test_lookup_tables_in_a_header_are_refused(frame: Any, card: str) -> None:
    """The error about a lookup-table distortion, or about a record of one, names the card."""
    frame.header[card] = 1.0 if "." in card else "LOOKUP"
    with pytest.raises(ValueError, match=f"header: found {card}, a lookup-table distortion"):
        crop_image(frame.data, 3, 4, 5, 5, header=frame.header)
    with pytest.raises(ValueError, match=f"header: found {card}"):
        get_cutout(frame.data, {"x": 20, "y": 30}, 3, header=frame.header)


@pytest.mark.parametrize("attribute", ["cpdis1", "cpdis2", "det2im1", "det2im2"])
def test_lookup_tables_in_a_wcs_are_refused(frame: Any, attribute: str) -> None:
    """A given WCS with a lookup-table distortion is refused."""
    setattr(frame.wcs, attribute, DistortionLookupTable(np.ones((4, 4), "f4"), (1, 1), (1, 1), (20, 20)))
    with pytest.raises(ValueError, match="wcs: found a lookup-table distortion"):
        get_cutout(frame.data, {"x": 20, "y": 30}, 3, wcs=frame.wcs)


def other_wcs(sip: bool) -> WCS:
    """Return a WCS that is not the frame's, PC and CDELT, with a date of its own."""
    header = fits.Header([("NAXIS", 2), ("NAXIS1", 83), ("NAXIS2", 61)])
    header.update({"CRVAL1": 10.0, "CRVAL2": 60.0, "CRPIX1": 12.0, "CRPIX2": 50.5, "CDELT1": -2e-4, "CDELT2": 3e-4})
    header.update(
        {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8, "DATE-OBS": "2000-01-01", "MJD-OBS": 51544.0}
    )
    return WCS(as_ctype(header, "TAN-SIP" if sip else "TAN", SIP if sip else {}))


@pytest.mark.parametrize("sip", [False, True])
@pytest.mark.parametrize("with_header", [False, True])
def test_given_wcs_is_shifted(frame: Any, sip: bool, with_header: bool) -> None:
    """With a given WCS the cutout's pixels keep the sky positions it gives, with a header or without."""
    wcs = other_wcs(sip)
    before, header_before = wcs.to_header_string(relax=True), frame.header.tostring()
    cutout = get_cutout(
        frame.data, {"x": 80.5, "y": 3.5}, 3, wcs=wcs, header=as_ctype(frame.header, "TAN", {}) if with_header else None
    )
    assert_same_sky(cutout["wcs"], wcs, 78, 1)
    assert cutout["wcs"].pixel_shape == (7, 7)
    assert wcs.to_header_string(relax=True) == before
    assert wcs.pixel_shape == (83, 61)
    assert ("header" in cutout) == with_header
    if with_header:
        assert_same_sky(WCS(cutout["header"]), wcs, 78, 1)
        assert frame.header.tostring() == header_before


def test_given_wcs_replaces_the_headers(frame: Any) -> None:
    """A given WCS replaces all of the header's own, lookup tables included; nothing else changes."""
    header = as_ctype(frame.header, "TAN-SIP", {**SIP, "CPDIS1": "LOOKUP", "DP1.EXTVER": 1.0, "D2IMDIS1": "LOOKUP"})
    header.append(("CRVAL1", 7.0), end=True)  # a second card of one name
    cutout = get_cutout(frame.data, {"x": 20, "y": 30}, 3, wcs=other_wcs(sip=False), header=header)
    left = set(cutout["header"])
    assert not {"CD1_1", "A_ORDER", "A_2_0", "BP_0_2", "CPDIS1", "DP1.EXTVER", "D2IMDIS1"} & left
    assert cutout["header"].count("CRVAL1") == 1
    assert cutout["header"]["CRVAL1"] == 10
    assert cutout["header"]["EXPTIME"] == 30.5
    assert "MJD-OBS" not in left
    assert cutout["header"]["BUNIT"] == "adu"


@pytest.mark.filterwarnings("ignore:.*PC00:astropy.wcs.FITSFixedWarning")
def test_given_wcs_replaces_old_forms(frame: Any) -> None:
    """A given WCS also replaces a matrix in the old form PC001001 and the sizes of distortions."""
    header = as_ctype(frame.header, "TAN", {"DVERR": 0.5, "CPERR1": 0.5, "D2IMERR1": 0.5})
    for keyword in [keyword for keyword in header if keyword.startswith("CD")]:
        del header[keyword]
    header.update({"CDELT1": -7e-5, "CDELT2": 7e-5, "PC001001": 0.8, "PC001002": 0.6, "PC002001": -0.6})
    given = as_ctype(header, "TAN", {"CRPIX1A": 3.0})
    wcs = WCS(fits.Header({"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CDELT1": -2e-4, "CDELT2": 2e-4}))
    cutout = get_cutout(frame.data, {"x": 20, "y": 30}, 3, wcs=wcs, header=given)
    assert not {"PC001001", "PC001002", "PC002001", "DVERR", "CPERR1", "D2IMERR1"} & set(cutout["header"])
    assert "CRPIX1A" in cutout["header"]
    assert_same_sky(WCS(cutout["header"]), wcs, 17, 27)


def test_cutout_has_every_plane(frame: Any) -> None:
    """Each 2-D array is a plane, on the image's pixels; None and other shapes are left out."""
    mask = frame.data > 105
    cutout = get_cutout(
        frame.data, {"x": 81, "y": 2}, 3, mask=mask, err=frame.data / 2, flags=Plane(PLANE), none=None, row=[1, 2]
    )
    assert set(cutout) == {"image", "mask", "err", "flags", "meta"}
    np.testing.assert_array_equal(cutout["image"][1:, :5], frame.data[:6, 78:])
    np.testing.assert_array_equal(cutout["mask"][1:, :5], mask[:6, 78:])
    np.testing.assert_array_equal(cutout["flags"][1:, :5], PLANE[:6, 78:])
    np.testing.assert_array_equal(cutout["err"], cutout["image"] / 2)
    assert np.isnan(cutout["image"][0]).all()
    assert not cutout["mask"][0].any()
    assert not cutout["flags"][:, 5:].any()


def test_plane_of_another_shape_is_refused(frame: Any) -> None:
    """The error about a plane of another shape names it."""
    with pytest.raises(ValueError, match=r"err: found the shape \(60, 83\), wanted \(61, 83\), the image's"):
        get_cutout(frame.data, {"x": 20, "y": 30}, 3, err=frame.data[:60])


def test_cutout_wcs_from_header(frame: Any) -> None:
    """With a header alone the cutout's WCS is the header's."""
    cutout = get_cutout(frame.data, {"x": 20.5, "y": 30.5}, 3, header=frame.header)
    assert_same_sky(cutout["wcs"], frame.wcs, 18, 28)
    assert_same_sky(WCS(cutout["header"]), frame.wcs, 18, 28)


def test_candidate_without_position() -> None:
    """A candidate must have x and y."""
    with pytest.raises(KeyError, match="x"):
        get_cutout(PLANE, {"ra": 1, "dec": 2}, 3)


def test_meta_keeps_every_field_of_a_dict() -> None:
    """All fields are kept as they are, in order; the candidate does not change."""
    candidate = {"x": 20, "y": np.float32(30.5), "flux": None, "tags": ["a"], "objectId": "ZTF"}
    before = copy.deepcopy(candidate)
    meta = get_cutout(PLANE, candidate, 3)["meta"]
    assert meta == before == candidate
    assert list(meta) == list(before)
    assert type(meta["y"]) is np.float32


def test_meta_keeps_every_column_of_a_row() -> None:
    """A row's columns are kept, arrays and strings included, and masked values stay masked."""
    table = Table(
        {"x": [20.0, 30.0], "y": [30.0, 20.0], "mag": [19.5, 20.5], "id": ["a", "b"], "aper": [[1.0, 2.0], [3.0, 4.0]]},
        masked=True,
    )
    table["mag"].mask = [True, False]
    first, second = (get_cutout(PLANE, row, 3)["meta"] for row in table)
    assert list(first) == table.colnames
    assert first["mag"] is np.ma.masked
    assert (second["mag"], second["id"], second["aper"].tolist()) == (20.5, "b", [3.0, 4.0])


def test_position_of_a_qtable() -> None:
    """Columns in pixels and without unit are positions; the fields keep their units."""
    table = QTable({"x": [20.5, 1] * u.pix, "y": [30.4, 1] * u.dimensionless_unscaled})
    cutout = get_cutout(PLANE, table[0], 0)
    assert cutout["image"][0, 0] == PLANE[30, 21]
    assert cutout["meta"]["x"] == 20.5 * u.pix


def test_position_with_another_unit_is_refused() -> None:
    """A position in units of angle is refused."""
    with pytest.raises(TypeError, match="only dimensionless scalar quantities"):
        get_cutout(PLANE, {"x": 20.5 * u.deg, "y": 30.4}, 3)


@pytest.mark.parametrize("unit", [u.pix, None])
def test_masked_column_of_a_qtable_is_masked(unit: Any) -> None:
    """The hidden number of a masked value is used neither as a position nor for the name."""
    place = Masked([20.5, 10.0], mask=[True, False])
    place = place if unit is None else place * unit
    first, second = QTable({"x": place, "y": place})
    with pytest.raises(ValueError, match=r"x, y: found .*wanted finite numbers"):
        get_cutout(PLANE, first, 3)
    assert get_cutout(PLANE, second, 0)["image"][0, 0] == PLANE[10, 10]
    named = QTable({"x": [1], "y": [1], "ra": Masked([20.5], mask=True) * u.deg, "dec": [1] * u.deg})[0]
    assert "name" not in get_cutout(PLANE, named, 1)["meta"]


def test_meta_of_the_call() -> None:
    """Time, filename and name of the call win over the candidate's."""
    candidate = {"x": 20, "y": 30, "ra": 1.0, "dec": 2.0, "filename": "old.fits", "name": "old", "time": "never"}
    meta = get_cutout(PLANE, candidate, 3, time="2026-11-24T01:02:03", filename="new.fits", name="new")["meta"]
    assert (meta["filename"], meta["name"], meta["time"].isot) == ("new.fits", "new", "2026-11-24T01:02:03.000")
    assert get_cutout(PLANE, candidate, 3)["meta"] == candidate


@pytest.mark.parametrize("time", [Time(61368.5, format="mjd"), datetime(2026, 11, 24, 12), "2026-11-24 12:00:00"])
def test_time_of_the_call(time: Any) -> None:
    """A time may be a Time, a datetime or a string."""
    assert get_cutout(PLANE, {"x": 20, "y": 30}, 3, time=time)["meta"]["time"] == Time("2026-11-24T12:00:00")


@pytest.mark.skipif(not minversion(astropy, "8"), reason="seconds from 59.99 on become 60 before astropy 8")
@pytest.mark.parametrize(("ra", "dec", "dtype", "name"), REFERENCE["names"])
def test_name_is_the_references(ra: float, dec: float, dtype: str, name: str) -> None:
    """The J2000 designation is that of the independent code: signs, carries of 59.99 s, both sides of 0 h, the pole."""
    place = np.array([ra, dec], dtype=dtype)
    assert get_cutout(PLANE, {"x": 1, "y": 1, "ra": place[0], "dec": place[1]}, 1)["meta"]["name"] == name


def test_name_of_a_quantity() -> None:
    """A sky position in any unit gives the name."""
    row = QTable({"x": [1], "y": [1], "ra": [0.25] * u.rad, "dec": [-300] * u.arcmin})[0]
    assert get_cutout(PLANE, row, 1)["meta"]["name"] == "J005717.75-050000.0"


@pytest.mark.parametrize("place", [{}, {"ra": 1.0}, {"ra": None, "dec": 1.0}, {"ra": np.nan, "dec": 1.0}])
def test_no_name_without_place(place: dict[str, Any]) -> None:
    """Without a sky position there is no name."""
    assert "name" not in get_cutout(PLANE, {"x": 1, "y": 1, **place}, 1)["meta"]


def test_no_name_of_a_masked_place() -> None:
    """With a masked sky position there is no name."""
    assert "name" not in get_cutout(PLANE, {"x": 1, "y": 1, "ra": np.ma.masked, "dec": 3.0}, 1)["meta"]


@pytest.mark.filterwarnings("ignore::astropy.wcs.FITSFixedWarning")
@pytest.mark.parametrize("name", ["decam_mini/stack", "jwst_a2744", "saao_kb13475/e0124"])
def test_real_frames(shared_data: Path, name: str) -> None:
    """Cutouts of real candidates equal the frame's pixels and keep their sky positions."""
    folder = shared_data / name
    if not folder.is_dir():
        pytest.skip(f"no real data: found no {name}")
    with fits.open(folder / "science.fits") as hdus:
        data, header = hdus[0].data, hdus[0].header
        whole = WCS(header)
        table = Table.read(folder / "candidates.ecsv")
        for row in table[:10]:
            cutout = get_cutout(hdus[0].section, row, 3, header=header)
            x, y = int(np.floor(row["x"] + 0.5)), int(np.floor(row["y"] + 0.5))
            assert cutout["image"][3, 3] == data[y, x]
            np.testing.assert_allclose(
                cutout["wcs"].all_pix2world(3, 3, 0), whole.all_pix2world(x, y, 0), rtol=0, atol=1e-9
            )
            assert set(table.colnames) <= set(cutout["meta"])
