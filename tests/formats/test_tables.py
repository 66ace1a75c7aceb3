"""Tables of candidates: every format, rows as alerts, alerts as rows, results beside them."""

import json
import math

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.masked import Masked
from helpers.night import alert_record

from stampworker.errors import AlertError
from stampworker.formats.alerts import Alert, decode, encode
from stampworker.formats.files import read_alerts
from stampworker.formats.tables import from_table, is_table, masked_column

FRAMES = {"science": "s.fits", "difference": "file:///d.fits#SCI,2"}


def test_rows_become_alerts():
    """Columns named as a field fill that field, all others go to extra; the order is that of the rows."""
    table = Table({"x": [1.5, 2.5], "y": [3, 4], "fwhm": [2.0, 3.0], "flag": [True, False], "band": ["r", "i"]})
    table["count"] = np.array([7, 8], np.int16)
    made = from_table(table, FRAMES, source="c.ecsv")
    assert made[0] == Alert(
        "c.ecsv-0", x=1.5, y=3.0, fwhm=2.0, extra={"flag": True, "band": "r", "count": 7}, frames=FRAMES
    )
    assert [alert.alert_id for alert in made] == ["c.ecsv-0", "c.ecsv-1"]
    assert {type(value) for value in made[0].extra.values()} == {bool, str, int}
    encode(made[0])


def test_identifiers():
    """The identifier is alertId, else id, if its column is complete and unique; else it is file and row."""
    table = Table({"x": [1.0, 2.0], "y": [1.0, 2.0], "id": [11, 12]})
    assert [alert.alert_id for alert in from_table(table, FRAMES)] == ["11", "12"]
    assert from_table(table, FRAMES)[0].extra == {"id": 11}
    table["alertId"] = ["p", "q"]
    assert [alert.alert_id for alert in from_table(table, FRAMES)] == ["p", "q"]
    table["alertId"] = ["p", "p"]
    assert [alert.alert_id for alert in from_table(table, FRAMES)] == ["11", "12"]
    assert [a.alert_id for a in from_table(table, FRAMES, columns={"id": "x"})] == ["1.0", "2.0"]
    for ids in ([5, 5], MaskedColumn([5, 6], mask=[False, True]), [5.0, math.nan], ["", "b"]):
        table["alertId"] = table["id"] = ids
        assert [alert.alert_id for alert in from_table(table, FRAMES, source="t")] == ["t-0", "t-1"]


def test_bytes_are_text():
    """Bytes, as in FITS tables, are read as text."""
    table = Table(
        {"id": np.array([b"a1", b"b2"]), "x": [1.0, 2.0], "y": [1.0, 2.0], "objectId": np.array([b"o", b"p"])}
    )
    first = from_table(table, FRAMES)[0]
    assert (first.alert_id, first.object_id) == ("a1", "o")


def test_columns_by_other_names():
    """A field comes from the column that ``columns`` names; that column is not in extra as well."""
    table = Table({"X_IMAGE": [10.0], "Y_IMAGE": [20.0], "x": [0.0], "NUMBER": [5], "FLUX": [2.0]})
    columns = {"x": "X_IMAGE", "y": "Y_IMAGE", "id": "NUMBER"}
    alert = from_table(table, FRAMES, columns=columns, pixel_origin=1)[0]
    assert (alert.alert_id, alert.x, alert.y, alert.extra) == ("5", 9.0, 19.0, {"id": 5, "FLUX": 2.0})
    with pytest.raises(AlertError, match="found no column 'X_IMGE' for 'x'; the nearest known is 'X_IMAGE'"):
        from_table(table, FRAMES, columns={"x": "X_IMGE", "y": "Y_IMAGE"})
    with pytest.raises(AlertError, match="'fhwm' is not a column that is looked for; the nearest known is 'fwhm'"):
        from_table(table, FRAMES, columns=columns | {"fhwm": "FLUX"})
    swapped = from_table(Table({"x": [1.0], "y": [2.0]}), FRAMES, columns={"x": "y", "y": "x"})[0]
    assert (swapped.x, swapped.y, swapped.extra) == (2.0, 1.0, {})


def test_absent_entries_are_absent():
    """A masked or NaN entry is absent, in plain and in quantity tables."""
    table = Table({"ra": [1.0, 2.0], "dec": [3.0, 4.0], "x": MaskedColumn([5.0, 6.0], mask=[True, False])})
    table["y"] = [math.nan, 6.0]
    table["mag"] = MaskedColumn([1.0, 2.0], mask=[True, False])
    for kind in (Table, QTable):
        columns = kind(table, copy=True)
        if kind is QTable:
            columns["mag"].unit = u.mag
        first, second = from_table(columns, FRAMES)
        assert (first.x, first.y, first.ra, first.extra) == (None, None, 1.0, {})
        assert (second.x, second.extra) == (6.0, {"mag": 2.0})


def test_units_are_converted():
    """Angles are converted to degrees and times to days; an error names a unit that cannot be converted."""
    table = QTable({"ra": [1, 2] * u.hourangle, "dec": [60, 120] * u.arcmin, "mjd": [24, 48] * u.hour})
    first = from_table(table, FRAMES)[0]
    assert (first.ra, first.dec, first.mjd) == pytest.approx((15.0, 1.0, 1.0))
    plain = Table({"x": [3.0], "y": [4.0], "flux": [5.0]}, units={"x": u.pix, "y": u.pix, "flux": u.Jy})
    assert from_table(plain, FRAMES, pixel_origin=1)[0].x == 2.0
    assert from_table(plain, FRAMES)[0].extra == {"flux": 5.0}
    plain["fwhm"] = [1.0] * u.arcsec
    with pytest.raises(AlertError, match="table: column 'fwhm' has the unit 'arcsec', wanted pix"):
        from_table(plain, FRAMES)


def test_masked_quantities_are_absent():
    """A masked entry of a quantity is absent."""
    table = QTable({"x": [1.0, 2.0], "y": [1.0, 2.0], "mag": Masked([20.0, 21.0] * u.mag, mask=[True, False])})
    made = from_table(table, FRAMES)
    assert (made[0].extra, made[1].extra) == ({}, {"mag": 21.0})


def test_odd_columns_go_to_extra_as_text():
    """Arrays, coordinates and integers beyond 64 bits become text in extra."""
    table = Table({"x": [1.0], "y": [2.0], "hash": np.array([2**64 - 1], np.uint64), "apertures": [[1.0, 2.0]]})
    table["place"] = SkyCoord([10] * u.deg, [20] * u.deg)
    table["frames"], table["extra"] = ["f"], ["e"]
    alert = from_table(table, FRAMES)[0]
    assert isinstance(alert, Alert)
    assert alert.extra["hash"] == "18446744073709551615"
    assert alert.extra["apertures"] == "[1. 2.]"
    assert set(alert.extra) == {"hash", "apertures", "place"}
    assert decode(encode(alert)) == alert


def test_a_bad_row_costs_one_row():
    """A bad row gives its error at its position, with its id."""
    table = Table({"id": ["a", "b", "c"], "x": ["1", "2", "3"], "y": [1.0, 2.0, 3.0]})
    made = from_table(table, FRAMES)
    assert [type(alert) for alert in made] == [AlertError] * 3
    assert "x: found '1'" in str(made[0])
    table["x"] = [1.0, math.nan, 3.0]
    made = from_table(table, FRAMES)
    assert [type(alert) for alert in made] == [Alert, AlertError, Alert]
    assert made[1].alert_id == "b"
    boolean = from_table(Table({"x": [True], "y": [1.0]}), FRAMES, pixel_origin=1)
    assert "x: found True" in str(boolean[0])


def test_tables_that_do_not_serve():
    """No positions, an unknown plane, or both error and variance are one error for the table; no frames are none."""
    with pytest.raises(AlertError, match=r"t: found the columns RA, flux; wanted x, y or ra, dec"):
        from_table(Table({"RA": [1.0], "flux": [2.0]}), FRAMES, source="t")
    table = Table({"x": [1.0], "y": [2.0]})
    assert from_table(table, {})[0].frames == {}
    with pytest.raises(AlertError, match="no plane is called 'diff'"):
        from_table(table, {"science": "s", "diff": "d"})
    with pytest.raises(AlertError, match="both error and variance"):
        from_table(table, {"science": "s", "error": "e", "variance": "v"})
    with pytest.raises(ValueError, match="pixel_origin: found 2, wanted 0 or 1"):
        from_table(table, FRAMES, pixel_origin=2)


def test_empty_table_is_no_alerts():
    """A table without rows gives no alerts."""
    assert from_table(Table({"x": [], "y": []}), FRAMES) == []


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, None], "i"), ([1.5, 2], "f"), ([None, True], "b"), (["a", 1], "U"), ([None, None], "U"), ([True, 1], "U")],
)
def test_masked_column_has_one_type(values, kind):
    """Scalars of one type keep it, integers and floats become floats, other mixtures text; None is masked."""
    column = masked_column(values)
    assert column.dtype.kind == kind
    assert [value is None for value in values] == list(column.mask)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("c.ecsv", "ascii.ecsv"),
        ("c.vot", "votable"),
        ("c.xml", "votable"),
        ("C.FITS", "fits"),
        ("c.fit", "fits"),
        ("c.csv", "ascii.csv"),
        ("c.tsv", "ascii.tab"),
    ],
)
def test_tables_of_every_format(tmp_path, name, form):
    """ECSV, VOTable, FITS, CSV and tabs give the same candidates; an empty cell is an absent value."""
    table = Table(
        {
            "id": ["p", "q"],
            "x": [1.5, 2.5],
            "y": [3.5, 4.5],
            "n": [1, 2],
            "fwhm": np.ma.array([2.0, 9], mask=[False, True]),
        }
    )
    table.write(tmp_path / name, format=form)
    assert is_table(tmp_path / name)
    alerts, read = read_alerts(tmp_path / name, frames=FRAMES)
    assert read.colnames == table.colnames
    assert [(a.alert_id, a.x, a.y, a.fwhm) for a in alerts] == [("p", 1.5, 3.5, 2.0), ("q", 2.5, 4.5, None)]
    assert alerts[0].extra == {"id": "p", "n": 1}
    assert all(alert.frames == FRAMES for alert in alerts)


def test_tables_take_options(tmp_path):
    """Frames, columns and the pixel origin come from the options; rows without id are named after the file."""
    path = tmp_path / "sex.csv"
    path.write_text("X_IMAGE,Y_IMAGE\n10,20.5\n")
    columns = {"x": "X_IMAGE", "y": "Y_IMAGE"}
    alerts, _ = read_alerts(path, frames=FRAMES, columns=columns, pixel_origin=1)
    assert [(a.alert_id, a.x, a.y) for a in alerts] == [("sex.csv-0", 9.0, 19.5)]
    assert read_alerts(path, columns=columns)[0][0].frames == {}
    path.write_text("")
    with pytest.raises(AlertError, match=r"sex\.csv: found the columns none; wanted x, y or ra, dec"):
        read_alerts(path, frames=FRAMES)


def test_fields_become_columns(tmp_path):
    """The table of JSON alerts has their fields and extra, masked if an alert has none; mixed types become text."""
    records = [
        alert_record(FRAMES, alertId="a", extra={"snr": 5, "band": "r", "x": -1.0}),
        alert_record(FRAMES, alertId="b", fwhm=2.0, extra={"snr": 5.5, "band": 3}),
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    table = read_alerts(tmp_path / "a.json")[1]
    assert list(table["snr"]) == [5.0, 5.5]
    assert list(table["band"]) == ["r", "3"]
    assert list(table["fwhm"].mask) == [True, False]
    assert list(table["x"]) == [41.3, 41.3]


SEXTRACTOR = """# 1 NUMBER Running object number
# 2 X_IMAGE Object position along x [pixel]
# 3 Y_IMAGE Object position along y [pixel]
# 4 FWHM_IMAGE FWHM assuming a gaussian core [pixel]
 1 10.5 20.25 4.5
 2 30.0 40.0 5.5
"""


def test_sextractor_catalogues(tmp_path):
    """SExtractor's ASCII_HEAD and FITS_LDAC are read; the candidates of FITS_LDAC are in its second table."""
    (tmp_path / "head.cat").write_text(SEXTRACTOR)
    candidates = Table({"NUMBER": [1, 2], "X_IMAGE": [10.5, 30.0], "Y_IMAGE": [20.25, 40.0], "FWHM_IMAGE": [4.5, 5.5]})
    hdus = [fits.PrimaryHDU(), fits.BinTableHDU(Table({"Field Header Card": ["x"]}), name="LDAC_IMHEAD")]
    fits.HDUList([*hdus, fits.BinTableHDU(candidates, name="LDAC_OBJECTS")]).writeto(tmp_path / "two.ldac")
    columns = {"x": "X_IMAGE", "y": "Y_IMAGE", "fwhm": "FWHM_IMAGE"}
    for name in ("head.cat", "two.ldac"):
        alerts, _ = read_alerts(tmp_path / name, frames={"science": "s.fits"}, columns=columns, pixel_origin=1)
        assert [(a.x, a.y, a.fwhm) for a in alerts] == [(9.5, 19.25, 4.5), (29.0, 39.0, 5.5)]
        assert [a.extra["NUMBER"] for a in alerts] == [1, 2]
