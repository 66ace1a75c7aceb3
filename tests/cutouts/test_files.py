from __future__ import annotations

import json
import string
import warnings
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.utils.masked import Masked
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stampworker.cutouts import get_cutout, load_cutout, write_cutout

REFERENCE = Path(__file__).parents[1] / "reference"
STDPIPE_FILE = REFERENCE / "cutout_stdpipe.fits"
IMAGE = np.arange(35, dtype="f4").reshape(5, 7)


def store(tmp_path: Path, meta: dict[str, Any]) -> Path:
    path = tmp_path / "cutout.fits"
    write_cutout({"image": IMAGE, "meta": meta}, path)
    return path


def round_trip(tmp_path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = load_cutout(store(tmp_path, meta))["meta"]
    return loaded


def assert_same(found: Any, wanted: Any) -> None:
    """Compare value and type; NaN equals NaN, and Time to the bit."""
    assert type(found) is type(wanted)
    if wanted is np.ma.masked:
        return
    if isinstance(wanted, Masked | np.ma.MaskedArray):
        assert_same(found.mask, wanted.mask)
        assert_same(found.filled(0), wanted.filled(0))
    elif isinstance(wanted, u.Quantity):
        assert found.unit == wanted.unit
        assert_same(found.value, wanted.value)
    elif isinstance(wanted, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(found, wanted)
    elif isinstance(wanted, Time):
        assert (found.scale, found.format, found.shape) == (wanted.scale, wanted.format, wanted.shape)
        assert np.array_equal(found.jd1, wanted.jd1)
        assert np.array_equal(found.jd2, wanted.jd2)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, dict):
        assert_same(list(found.items()), list(wanted.items()))
    else:
        assert repr(found) == repr(wanted)


VALUES = {
    "none": None,
    "true": True,
    "int": 12345678901234567890123,
    "huge_int": 10**400,
    "float": 1.2345678901234567e-305,
    "third": -1 / 3,
    "zero": -0.0,
    "nan": np.nan,
    "inf": np.inf,
    "minus_inf": -np.inf,
    "empty": "",
    "blanks": "  two  ",
    "long": "of more than sixty-eight characters, 'quoted' & cut here and there, " * 5 + "&",
    "unicode": "Größe 5σ ☄",
    "lines": "one\ntwo\ttabbed\0",
    "spells_nan": "NaN",
    "spells_inf": "-Inf",
    "spells_array": "array([1, 2])",
    "bytes": b"\0\xff",
    "list": [1, 2.5, None, "a", [True, -np.inf]],
    "empty_list": [],
    "tuple": (1.0, "b"),
    "dict": {"a": 1, "B": [2, {"c": np.nan}], 3: None},
    "float64": np.float64(0.1),
    "nan64": np.float64("nan"),
    "float32": np.float32(0.1),
    "int16": np.int16(-3),
    "uint64": np.uint64(2**64 - 1),
    "bool_": np.bool_(True),
    "str_": np.str_("name"),
    "no_str_": np.str_(""),
    "datetime64": np.datetime64("2026-11-24T01:02:03.123456789"),
    "complex": np.complex64(1 - 2j),
    "array": np.array([[1.5, np.nan, np.inf], [-np.inf, 0.1, 3]]),
    "swapped": np.array([1, 2], dtype=">i2"),
    "many": np.arange(5000),
    "no_rows": np.zeros((0, 3), "f4"),
    "scalar_array": np.array(5),
    "strings": np.array(["g", "r'", "größer"]),
    "bools": np.array([True, False]),
    "masked": np.ma.masked,
    "masked_array": np.ma.MaskedArray([1, 2, 3], [True, False, False]),
    "quantity": 3.5 * u.arcsec,
    "quantities": np.array([1, 2], "f4") * u.Unit("erg / (s cm2 Angstrom)"),
    "masked_quantity": Masked(3.5 * u.mJy, mask=True),
    "unmasked_quantity": Masked(3.5 * u.mJy, mask=False),
    "masked_quantities": Masked([1.0, 2.0] * u.mJy, mask=[True, False]),
    "masked_number": Masked(np.array(3), mask=True),
    "masked_numbers": Masked(np.array([1.0, 2.0]), mask=[False, True]),
    "time": Time(2460000.123456789, 1.2345e-7, format="jd", scale="tai"),
    "other_time": Time("2026-11-24T01:02:03.123456789", scale="tdb"),
    "times": Time([61368.25, 61369.5], format="mjd"),
    "ut1": Time(61368.25, format="mjd", scale="ut1"),
    "datetime": datetime(2026, 11, 24, 1, 2, 3, 456789),
    "aware": datetime(2026, 11, 24, 1, 2, 3, tzinfo=timezone(timedelta(hours=-3))),
    "utc": datetime(2026, 11, 24, tzinfo=UTC),
}
NAMES = ["x", "objectId", "aVeryLongName", "a name with blanks", "größe", "a=b/c'd", "", "e" * 100, "simple", "naxis"]
NAMES += ["naxis3", "bitpix", "end", "comment", "history", "continue", "hierarch", "extname", "bzero", "checksum"]
NAMES += ["DP1.EXTVER", "swmeta", "stampwrk", "2mass", "mag-auto", "_private", "adjust_dx", "adjust_dy", "time", "Time"]


@pytest.mark.parametrize("name", VALUES)
def test_value_survives(tmp_path: Path, name: str) -> None:
    """A value is read back with its type, under its own name and as the field ``time``."""
    meta = round_trip(tmp_path, {"value": VALUES[name], "a_longer_name": VALUES[name], "time": VALUES[name]})
    assert list(meta) == ["value", "a_longer_name", "time"]
    for found in meta.values():
        assert_same(found, VALUES[name])


def test_names_survive(tmp_path: Path) -> None:
    """Any name is read back, in order: long, mixed case, keywords, and two names that differ in case only."""
    meta = {name: i for i, name in enumerate([*NAMES, *(name.upper() for name in NAMES if name != name.upper())])}
    assert list(round_trip(tmp_path, meta).items()) == list(meta.items())


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=200)
    | st.text(string.printable, max_size=200)
    | st.text("'& /\"x", min_size=60, max_size=300)
    | st.datetimes(datetime(1980, 1, 1), datetime(2030, 1, 1))
)
arrays = hnp.arrays(
    hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.unicode_string_dtypes(min_len=1),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
times = st.builds(
    lambda jd1, jd2, scale: Time(jd1, jd2, format="jd", scale=scale),
    st.integers(2445000, 2461000),
    st.floats(-1, 1),
    st.sampled_from(["utc", "tai", "tt", "tdb", "ut1"]),
)
values = (
    scalars
    | arrays
    | times
    | st.lists(scalars, max_size=4)
    | arrays.map(lambda array: array.flat[0] if array.size else 0)
)


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=80) | st.from_regex(r"[A-Za-z_]\w{0,11}", fullmatch=True), values, max_size=5))
def test_any_metadata_survives(tmp_path: Path, meta: dict[str, Any]) -> None:
    """Any names and values are read back, in order, with their types."""
    assert_same(round_trip(tmp_path, meta), meta)


def test_row_with_masked_columns_survives(tmp_path: Path) -> None:
    """A cutout of a table's row keeps each field, and masked fields stay masked."""
    table = Table(
        {"x": [3.0], "y": [2.0], "mag": [1.5], "band": ["g"], "obs": Time(["2026-11-24T01:02:03"])}, masked=True
    )
    table["mag"].mask = True
    cutout = get_cutout(IMAGE, table[0], 1)
    path = tmp_path / "row.fits"
    write_cutout(cutout, path)
    assert_same(load_cutout(path)["meta"], cutout["meta"])


def test_masked_time_is_masked(tmp_path: Path) -> None:
    """A masked time is read back as masked."""
    times = Time(["2026-11-24", "2026-11-25"])
    times[1] = np.ma.masked
    meta = round_trip(tmp_path, {"first": times[0], "second": times[1]})
    assert meta["first"].isot == "2026-11-24T00:00:00.000"
    assert meta["second"] is np.ma.masked


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"where": SkyCoord(1, 2, unit="deg")}, "meta: 'where' cannot be kept: found SkyCoord, wanted a number"),
        ({"things": np.array([object()])}, "meta: 'things' cannot be kept: found an array of object"),
        ({"nested": [1, {2}]}, "meta: 'nested' cannot be kept: found set"),
        ({7: 1}, "meta: found the name 7, wanted a string"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path: Path, meta: dict[Any, Any], match: str) -> None:
    """The error about a value of another type names it, and no file is written."""
    with pytest.raises(ValueError, match=match):
        store(tmp_path, meta)
    assert not list(tmp_path.iterdir())


PLANES = ["f4", ">f4", "f8", "f2", "u1", "i1", "i2", "u2", "i4", ">u4", "i8", "u8", "bool"]


def test_planes_survive(tmp_path: Path, frame: Any) -> None:
    """Planes keep values and dtypes, in native byte order; an integer mask keeps its bits."""
    planes = {f"plane{i}Of": np.abs(frame.data).astype(dtype) for i, dtype in enumerate(PLANES)}
    path = tmp_path / "planes.fits"
    cutout = get_cutout(frame.data, {"x": 81, "y": 3}, 4, mask=planes["plane4Of"], **planes)
    write_cutout(cutout, path)
    loaded = load_cutout(path)
    assert loaded.keys() - {"header"} == cutout.keys()
    for name in cutout.keys() - {"meta"}:
        assert loaded[name].dtype == cutout[name].dtype.newbyteorder("=")
        assert loaded[name].flags.c_contiguous
        assert loaded[name].flags.writeable
        np.testing.assert_array_equal(loaded[name], cutout[name])


@pytest.mark.parametrize("with_header", [True, False])
def test_header_and_wcs_survive(tmp_path: Path, frame: Any, with_header: bool) -> None:
    """The loaded WCS gives the same sky positions as the cutout's, with a header or with a WCS alone."""
    cutout = get_cutout(frame.data, {"x": 81, "y": 3}, 4, wcs=frame.wcs, header=frame.header if with_header else None)
    write_cutout(cutout, tmp_path / "sky.fits")
    loaded = load_cutout(tmp_path / "sky.fits")
    y, x = np.mgrid[:9, :9]
    wanted = frame.wcs.all_pix2world(x + 77, y - 1, 0)
    for wcs in (loaded["wcs"], WCS(loaded["header"])):
        np.testing.assert_allclose(wcs.all_pix2world(x, y, 0), wanted, rtol=0, atol=3e-10)
    assert loaded["header"].get("BUNIT") == ("adu" if with_header else None)


def test_header_is_the_first_planes(tmp_path: Path, frame: Any) -> None:
    """The loaded header is the science plane's, whichever planes follow."""
    cutout = get_cutout(frame.data, {"x": 81, "y": 3}, 4, header=frame.header, mask=frame.data > 100)
    write_cutout(cutout, tmp_path / "two.fits")
    header = load_cutout(tmp_path / "two.fits")["header"]
    assert (header["EXTNAME"], header["BITPIX"], header.get("BZERO")) == ("IMAGE", -32, None)


def test_plane_that_was_stored_anew(tmp_path: Path) -> None:
    """A plane that STDPipe or someone else stored again as another dtype keeps that dtype."""
    path = tmp_path / "anew.fits"
    write_cutout({"image": IMAGE.astype("f2"), "mask": IMAGE.astype("i2"), "diff": IMAGE > 3}, path)
    with fits.open(path, mode="update") as hdus:
        for name in ("IMAGE", "MASK", "DIFF"):
            hdus[name] = fits.ImageHDU(IMAGE.astype("f8") + 0.1, name=name)
    loaded = load_cutout(path)
    for name in ("image", "mask", "diff"):
        np.testing.assert_array_equal(loaded[name], IMAGE.astype("f8") + 0.1, strict=True)


def test_no_wcs_where_there_was_none(tmp_path: Path) -> None:
    """A cutout without header is read back without WCS."""
    assert "wcs" not in load_cutout(store(tmp_path, {}))


def test_header_of_scaled_integers_scales_nothing(tmp_path: Path, frame: Any) -> None:
    """BSCALE, BZERO and BLANK of the frame's file do not change the planes, which are physical values."""
    frame.header.update({"BITPIX": 16, "BSCALE": 0.5, "BZERO": 1000, "BLANK": -32768, "CHECKSUM": "0"})
    cutout = get_cutout(
        frame.data, {"x": 20, "y": 30}, 4, header=frame.header, mask=frame.data > 100, count=frame.data.astype("i2")
    )
    write_cutout(cutout, tmp_path / "scaled.fits")
    loaded = load_cutout(tmp_path / "scaled.fits")
    for name in ("image", "mask", "count"):
        assert loaded[name].dtype == cutout[name].dtype
        np.testing.assert_array_equal(loaded[name], cutout[name])
    assert cutout["header"]["BSCALE"] == 0.5


def test_cutout_without_planes(tmp_path: Path) -> None:
    """Metadata alone is a cutout: no plane, no header, no WCS."""
    for filename in (tmp_path / "ours.fits", tmp_path / "bare.fits"):
        write_cutout({"meta": {"x": 1}}, filename)
    with fits.open(tmp_path / "bare.fits", mode="update") as hdus:
        del hdus[0].header["STAMPWRK"], hdus[0].header["SWMETA"]
    assert load_cutout(tmp_path / "ours.fits") == {"meta": {"x": 1}}
    assert load_cutout(tmp_path / "bare.fits") == {"meta": {"x": 1}}


def test_file_is_replaced(tmp_path: Path) -> None:
    """An existing file is replaced; a path may be a string."""
    store(tmp_path, {"old": 1})
    assert round_trip(tmp_path, {"new": 2}) == {"new": 2}
    assert load_cutout(str(tmp_path / "cutout.fits"))["meta"] == {"new": 2}


@pytest.mark.parametrize(
    ("planes", "match"),
    [
        (
            {"diff": IMAGE, "DIFF": IMAGE},
            "cutout: found the planes diff, DIFF, wanted names that differ in more than case",
        ),
        ({"power": IMAGE.astype(complex)}, "power: found complex128, wanted a dtype that FITS has"),
        ({"names": IMAGE.astype(str)}, "names: found <U32, wanted a dtype"),
    ],
)
def test_wrong_planes_are_refused(tmp_path: Path, planes: dict[str, Any], match: str) -> None:
    """The error names planes that FITS cannot tell apart, or cannot store."""
    with pytest.raises(ValueError, match=match):
        write_cutout(planes, tmp_path / "wrong.fits")


def test_stdpipe_file_is_read() -> None:
    """Planes, header and metadata of a file that STDPipe wrote: lower case, boolean mask, arrays, dx along x."""
    loaded = load_cutout(STDPIPE_FILE)
    wanted = json.loads((REFERENCE / "cutouts.json").read_text())["planes"]
    assert loaded.keys() == {"image", "mask", "template", "err", "header", "wcs", "meta"}
    for name, plane in wanted.items():
        assert loaded[name].dtype == (bool if name == "mask" else np.dtype("=f4"))
        np.testing.assert_array_equal(loaded[name], np.array(plane, dtype=float))
    assert loaded["wcs"].wcs.crpix.tolist() == [40.25 - 66, 33.75 - 55]
    meta = loaded["meta"]
    assert (meta["x"], meta["id"], meta["mag_calib"], meta["flags"]) == (70.3, 12345678901234, 19.123456789, 3)
    assert (meta["good"], meta["bad"], meta["nothing"], meta["magerr"]) == (True, False, None, 0.25)
    assert np.isnan(meta["nan"])
    assert meta["inf"] == np.inf
    assert (meta["name"], meta["filename"]) == ("J100024.00-332400.0", "frame.fits")
    assert meta["note"] == "a string that goes on and on, longer than the sixty-eight characters of one card"
    assert_same(meta["counts"], np.array([1, 2, 3]))
    assert_same(meta["fluxes"], np.array([1.5, np.nan, np.inf]))
    assert_same(meta["narrow"], np.array([0.1, 2.5], "f4"))
    assert_same(meta["bands"], np.array(["g", "r'"]))
    assert_same(meta["list"], np.array([1, 2.5]))
    assert_same(meta["empty"], np.zeros((0, 3)))
    assert meta["many"].startswith("array([   0,    1,")  # it wrote no more than that
    assert meta["time"] == Time("2026-11-24T01:02:03.456")


def test_stdpipe_shifts_are_swapped() -> None:
    """STDPipe's adjust_dx is along rows: it was written with 0.25 and -0.75, and dx along x is -0.75."""
    head = fits.getheader(STDPIPE_FILE)
    assert (head["adjust_dx"], head["adjust_dy"]) == (0.25, -0.75)
    meta = load_cutout(STDPIPE_FILE)["meta"]
    assert (meta["adjust_dx"], meta["adjust_dy"]) == (-0.75, 0.25)


def test_swapped_shifts_stay_swapped(tmp_path: Path) -> None:
    """Shifts of STDPipe that stampworker has read and written are not swapped again."""
    loaded = load_cutout(STDPIPE_FILE)
    write_cutout(loaded, tmp_path / "again.fits")
    again = load_cutout(tmp_path / "again.fits")
    assert_same(again["meta"], loaded["meta"])
    np.testing.assert_array_equal(again["mask"], loaded["mask"])


def test_our_files_are_marked(tmp_path: Path) -> None:
    """A card marks a file of stampworker, and its shifts are not swapped."""
    path = store(tmp_path, {"adjust_dx": 0.25, "adjust_dy": -0.75})
    assert fits.getheader(path)["STAMPWRK"] == 1
    assert load_cutout(path)["meta"] == {"adjust_dx": 0.25, "adjust_dy": -0.75}


def test_shifts_of_a_later_fit_of_stdpipe_are_swapped(tmp_path: Path) -> None:
    """If STDPipe fits and writes a copy of a stampworker file, marks included, its shifts are swapped."""
    path = store(tmp_path, {"adjust_dx": 0.25, "adjust_dy": -0.75, "adjust_df": 30})
    with fits.open(path, mode="update") as hdus:
        hdus[0].header.update({"HIERARCH adjust_dx": 0.5, "HIERARCH adjust_dy": -0.125})
    assert load_cutout(path)["meta"] == {"adjust_dx": -0.125, "adjust_dy": 0.5, "adjust_df": 30}


def test_changed_and_new_cards_count(tmp_path: Path) -> None:
    """Cards that someone edits or adds in a stampworker file are read."""
    path = store(tmp_path, {"objectId": "old", "flag": True, "list": [1, 2], "mag": np.float32(0.1), "nan": np.nan})
    with fits.open(path, mode="update") as hdus:
        hdus[0].header.update({"OBJECTID": "new", "FLAG": 1, "CLASS": "SN Ia"})
    meta = load_cutout(path)["meta"]
    assert_same(
        meta, {"objectId": "new", "flag": 1, "list": [1, 2], "mag": np.float32(0.1), "nan": np.nan, "class": "SN Ia"}
    )


def test_cards_tell_people_and_stdpipe(tmp_path: Path) -> None:
    """Cards show what FITS and STDPipe can read; a value that they would misread has no card."""
    meta = {name: VALUES[name] for name in ("none", "true", "nan", "inf", "minus_inf", "int16", "masked", "array")}
    meta |= {"time": Time("2026-11-24T00:00:37.5", scale="tai"), "aware": VALUES["aware"]}
    hidden = {
        name: VALUES[name] for name in ("unicode", "spells_nan", "spells_array", "blanks", "dict", "many", "ut1", "int")
    }
    head = fits.getheader(store(tmp_path, meta | hidden))
    shown = {card.keyword: card.value for card in head.cards[4:-2]}
    assert isinstance(shown.pop("NONE"), fits.card.Undefined)
    assert isinstance(shown.pop("MASKED"), fits.card.Undefined)
    assert shown == {
        "TRUE": True,
        "NAN": "NaN",
        "INF": "Inf",
        "MINUS_INF": "-Inf",
        "INT16": -3,
        "ARRAY": "array([[1.5, np.nan, np.inf], [-np.inf, 0.1, 3.0]], dtype='<f8')",
        "TIME": "2026-11-24T00:00:00.500000000",  # UTC, which is what STDPipe takes it for
        "AWARE": "2026-11-24T04:02:03.000000",
    }
    assert list(head)[:4] == ["SIMPLE", "BITPIX", "NAXIS", "EXTEND"]  # which STDPipe passes over by their number


@pytest.mark.parametrize("value", ["next week", 5.0, None])
def test_time_that_is_none_has_no_card(tmp_path: Path, value: Any) -> None:
    """The card TIME holds times only, because STDPipe converts any value of it to a Time."""
    assert "TIME" not in fits.getheader(store(tmp_path, {"time": value}))


def foreign_file(tmp_path: Path, cards: dict[str, Any]) -> Path:
    path = tmp_path / "foreign.fits"
    primary = fits.PrimaryHDU()
    primary.header.update(cards)
    fits.HDUList([primary, fits.ImageHDU(IMAGE, name="IMAGE")]).writeto(path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "array([open('{path}', 'w')])",
        "array(__import__('os').mkdir('{path}'))",
        "array([1], dtype=open('{path}', 'w'))",
        "array(lambda: 0)",
        "array([1, ...])",
        "array(",
        "array([1] * 10 ** 9)",
        "array(1, 2)",
        "array([1], shape=(7,))",
        "array([1], dtype=object)",
        "array([[1], [2, 3]])",
        "array(x.y)",
        "array([-'a'])",
    ],
)
def test_text_is_never_run(tmp_path: Path, text: str) -> None:
    """A string that only looks like an array stays a string; nothing in it is executed."""
    text = text.format(path=(tmp_path / "made").name)
    assert load_cutout(foreign_file(tmp_path, {"VALUE": text}))["meta"] == {"value": text}
    assert not Path((tmp_path / "made").name).exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("array([1, -2])", np.array([1, -2])),
        ("array([ 1.5e3,  nan, -inf])", np.array([1500, np.nan, -np.inf])),
        ("array([ True, False])", np.array([True, False])),
        ("array([[1, 2], [3, 4]], dtype=int16)", np.array([[1, 2], [3, 4]], "i2")),
        ("array(5.)", np.array(5.0)),
        ("array([np.nan, np.inf])", np.array([np.nan, np.inf])),
    ],
)
def test_text_of_an_array_is_an_array(tmp_path: Path, text: str, wanted: np.ndarray) -> None:
    """Arrays as numpy prints them are read, NaN and infinities included."""
    assert_same(load_cutout(foreign_file(tmp_path, {"VALUE": text}))["meta"]["value"], wanted)


def test_text_in_place_of_a_time_is_text(tmp_path: Path) -> None:
    """A TIME that is no time stays a string."""
    assert load_cutout(foreign_file(tmp_path, {"TIME": "next week"}))["meta"] == {"time": "next week"}


@pytest.mark.parametrize(
    ("document", "match"),
    [
        ("{", "SWMETA is damaged: Expecting"),
        ("[]", "SWMETA is damaged"),
        ('{"meta":{}}', "SWMETA is damaged: 'planes'"),
        ('{"meta":{"a":["eval","1"]},"planes":{}}', "SWMETA is damaged: found the type 'eval', wanted one of float"),
        (
            '{"meta":{"a":["array","O",[1],"AAAAAAAAAAA="]},"planes":{}}',
            "SWMETA is damaged: found the dtype 'O', wanted a plain",
        ),
        (
            '{"meta":{"a":["array","f4,O",[1],"AAAAAAAAAAAAAAAAAAAA"]},"planes":{}}',
            "SWMETA is damaged: found the dtype 'f4,O'",
        ),
        ('{"meta":{"a":["array","f4",[99],"AAAA"]},"planes":{}}', "SWMETA is damaged"),
        ('{"meta":{},"planes":{"image":"O"}}', "SWMETA is damaged: found the dtype 'O'"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, document: str, match: str) -> None:
    """The error about damaged or malicious metadata names the file."""
    path = foreign_file(tmp_path, {"STAMPWRK": 1, "SWMETA": document})
    with pytest.raises(ValueError, match=rf"foreign\.fits: {match}"):
        load_cutout(path)


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    """A damaged file gives an error that names it, or what can still be read."""
    path = store(tmp_path, {"objectId": "a", "note": "long " * 30, "fluxes": np.arange(5.0)})
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(0, len(whole) - 2880)] = rng.integers(32, 127)
        path.write_bytes(damaged[: rng.choice([2880, 4000, len(whole)], p=[0.1, 0.1, 0.8])])
        with warnings.catch_warnings(action="ignore"):
            try:
                load_cutout(path)
            except (OSError, ValueError) as exc:
                errors.append(str(exc))
    assert any("cutout.fits: is damaged: Unparsable card" in error for error in errors)


def test_damaged_card_is_refused(tmp_path: Path) -> None:
    """The error about an invalid card names the file."""
    path = store(tmp_path, {"magnitude": 1.5})
    path.write_bytes(path.read_bytes().replace(b"HIERARCH MAGNITUDE = 1.5", b"HIERARCH MAGNITUDE = '.5"))
    with (
        pytest.raises(ValueError, match=r"cutout\.fits: is damaged: Unparsable card \(MAGNITUDE\)"),
        warnings.catch_warnings(action="ignore"),
    ):
        load_cutout(path)


def test_later_version_is_refused(tmp_path: Path) -> None:
    """A file with a later version of the rules is refused."""
    with pytest.raises(ValueError, match=r"foreign\.fits: found STAMPWRK 2, wanted at most 1"):
        load_cutout(foreign_file(tmp_path, {"STAMPWRK": 2}))


def test_missing_file(tmp_path: Path) -> None:
    """A file that does not exist is an OSError."""
    with pytest.raises(FileNotFoundError, match=r"nothing\.fits"):
        load_cutout(tmp_path / "nothing.fits")


@pytest.mark.filterwarnings("ignore")
def test_stdpipe_reads_our_files(tmp_path: Path) -> None:
    """STDPipe's load_cutout reads all files of stampworker, with any names and values."""
    stdpipe = pytest.importorskip("stdpipe.cutouts", reason="STDPipe is not installed (extra: bench)")
    rng = np.random.default_rng(4)
    data = rng.normal(size=(5, 7)).astype("f4")
    header = fits.Header([("CTYPE1", "RA---TAN"), ("CTYPE2", "DEC--TAN"), ("CRPIX1", 3.25), ("CRPIX2", 4.5)])
    meta = {name: i for i, name in enumerate(NAMES)} | VALUES | {"x": 1.5, "y": 2.0, "story": VALUES["long"] + "."}
    cutout = get_cutout(data, meta, 2, header=header, mask=data > 0, diff=data.astype("f8"))
    write_cutout(cutout, tmp_path / "ours.fits")
    theirs = stdpipe.load_cutout(tmp_path / "ours.fits")
    assert theirs["mask"].dtype == bool
    assert theirs["wcs"].wcs.crpix.tolist() == [3.25, 4.5]
    for plane in ("image", "mask", "diff"):
        np.testing.assert_array_equal(theirs[plane], cutout[plane])
    read = theirs["meta"]
    for name in ("none", "true", "nan", "inf", "third", "int16", "bool_", "array", "swapped", "bools"):
        np.testing.assert_array_equal(read[name], VALUES[name])
    assert read["story"] == meta["story"]
    assert read["minus_inf"] == "-Inf"  # for which STDPipe has no spelling
    assert abs(read["time"] - VALUES["time"]).sec < 1e-6
