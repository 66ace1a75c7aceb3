"""Alerts in files: every form, and what a file that is none of them ends in."""

import io
import json

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from helpers.night import alert_record
from hypothesis import given
from hypothesis import strategies as st

from stampworker.errors import AlertError, UnknownSchema
from stampworker.formats.alerts import Alert, encode, from_record
from stampworker.formats.files import TableOptions, is_table, read_alerts
from stampworker.formats.schema import ALERT, parsed_schema, schema_text

FRAMES = {"science": "s.fits"}
RECORDS = [alert_record(FRAMES, alertId=f"a{n}", x=float(n)) for n in range(3)]
ALERTS = [from_record(record) for record in RECORDS]


def container(records, codec="null"):
    """Return an object container of many records."""
    out = io.BytesIO()
    fastavro.writer(out, parsed_schema(*ALERT), records, codec=codec)
    return out.getvalue()


FORMS = {
    "object.json": (json.dumps(RECORDS[0]).encode(), 1),
    "pretty.json": (json.dumps(RECORDS[0], indent=2).encode(), 1),
    "list.json": (json.dumps(RECORDS, indent=2).encode(), 3),
    "lines.jsonl": ("\n".join(map(json.dumps, RECORDS)).encode(), 3),
    "crlf.ndjson": ("\r\n\r\n".join(map(json.dumps, RECORDS)).encode() + b"\r\n\n", 3),
    "bom.json": (b"\xef\xbb\xbf" + json.dumps(RECORDS[0]).encode(), 1),
    "one.avro": (encode(ALERTS[0]), 1),
    "many.avro": (container(RECORDS), 3),
    "deflate.avro": (container(RECORDS, "deflate"), 3),
    "no ending": (json.dumps(RECORDS[:2]).encode(), 2),
    "empty list.json": (b"[]", 0),
    "empty.avro": (container([]), 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_told_by_its_content(tmp_path, name):
    """Objects, lists, lines and containers give the same alerts, and a table with a row for each."""
    data, count = FORMS[name]
    (tmp_path / name).write_bytes(data)
    alerts, table = read_alerts(tmp_path / name)
    assert alerts == ALERTS[:count]
    assert len(table) == count
    if count:
        assert list(table["alertId"]) == [alert.alert_id for alert in ALERTS[:count]]
        assert "frames" not in table.colnames
        assert "ra" not in table.colnames


def test_wire_format(tmp_path):
    """One alert in wire format, with the folder of its schema."""
    body = io.BytesIO()
    fastavro.schemaless_writer(body, parsed_schema(*ALERT), ALERTS[0].to_record())
    path = tmp_path / "alert.bin"
    path.write_bytes(b"\0\0\0\0\x05" + body.getvalue())
    (tmp_path / "5.avsc").write_text(schema_text(*ALERT))
    assert read_alerts(path, None, tmp_path)[0] == ALERTS[:1]
    (error,) = read_alerts(path)[0]
    assert type(error) is UnknownSchema


def test_a_bad_alert_costs_one_alert(tmp_path):
    """Its error stands in its place, in lists, lines and containers; the table has a row for it, too."""
    bad = alert_record(FRAMES, alertId="bad", fwhm=-1)
    records = [RECORDS[0], bad, RECORDS[2]]
    files = {
        "l.json": json.dumps([RECORDS[0], bad, 7, RECORDS[2]]).encode(),
        "l.jsonl": "\n".join(map(json.dumps, records)).replace("-1}", "-1").encode(),
        "c.avro": container(records),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        alerts, table = read_alerts(tmp_path / name)
        assert (alerts[0], alerts[-1]) == (ALERTS[0], ALERTS[2])
        assert all(isinstance(alert, AlertError) for alert in alerts[1:-1])
        assert len(table) == len(alerts)
    assert alerts[1].alert_id == "bad"
    (tmp_path / "first.jsonl").write_text("{broken\n" + json.dumps(RECORDS[0]))
    assert [type(alert) for alert in read_alerts(tmp_path / "first.jsonl")[0]] == [AlertError, Alert]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "found neither JSON nor an Avro container"),
        (b"hello", "found neither JSON nor an Avro container"),
        (b"hello\nworld\n", "found neither JSON nor an Avro container"),
        (json.dumps(RECORDS, indent=1).encode()[:-40], "found neither JSON nor an Avro container"),
        (("[" + ",\n".join(map(json.dumps, RECORDS))).encode(), "found neither JSON nor an Avro container"),
        (json.dumps(RECORDS[0], indent=1).encode()[:-10], "found neither JSON nor an Avro container"),
        (b"[" * 100_000, "found neither JSON nor an Avro container: maximum recursion"),
        (b"9" * 5000, "found neither JSON nor an Avro container: Exceeds the limit"),
        (b"\x89PNG\r\n\x1a\n\xff", "found neither JSON nor an Avro container"),
        (container(RECORDS)[:-20], "Avro container: "),
        (b"Obj\x01", "Avro container: "),
    ],
)
def test_file_that_is_none_of_them(tmp_path, data, message):
    """A file as a whole that cannot be read is one error that names the file; a list that is cut off is one."""
    path = tmp_path / "alerts.json"
    path.write_bytes(data)
    with pytest.raises(AlertError, match=rf"alerts\.json: {message}"):
        read_alerts(path)


def test_file_that_is_not_there(tmp_path):
    """A missing file and a folder are named."""
    with pytest.raises(AlertError, match=r"absent\.json: No such file"):
        read_alerts(tmp_path / "absent.json")
    with pytest.raises(AlertError, match="Is a directory"):
        read_alerts(tmp_path)
    with pytest.raises(AlertError, match=r"absent\.ecsv: found no such file"):
        read_alerts(tmp_path / "absent.ecsv", TableOptions(FRAMES))


@pytest.mark.slow
@given(st.binary(max_size=200))
def test_any_bytes_are_alerts_or_an_error(tmp_path, data):
    """Whatever a file holds, the answer is alerts, each read or with its error, or an AlertError."""
    for start in (b"", b"Obj\x01", b"\0", b"[{", b'{"alertId": "a"}\n'):
        (tmp_path / "a").write_bytes(start + data)
        try:
            alerts, table = read_alerts(tmp_path / "a")
        except AlertError as exc:
            str(exc).encode()
        else:
            assert len(table) == len(alerts)


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
        {"id": ["p", "q"], "x": [1.5, 2.5], "y": [3.5, 4.5], "n": [1, 2], "fwhm": np.ma.array([2.0, 9], mask=[0, 1])}
    )
    table.write(tmp_path / name, format=form)
    assert is_table(tmp_path / name)
    alerts, read = read_alerts(tmp_path / name, TableOptions(FRAMES))
    assert read.colnames == table.colnames
    assert [(a.alert_id, a.x, a.y, a.fwhm) for a in alerts] == [("p", 1.5, 3.5, 2.0), ("q", 2.5, 4.5, None)]
    assert alerts[0].extra == {"id": "p", "n": 1}
    assert all(alert.frames == FRAMES for alert in alerts)


def test_tables_take_options(tmp_path):
    """Frames, columns and the pixel origin come from the options; rows without id are named after the file."""
    path = tmp_path / "sex.csv"
    path.write_text("X_IMAGE,Y_IMAGE\n10,20.5\n")
    columns = {"x": "X_IMAGE", "y": "Y_IMAGE"}
    alerts, _ = read_alerts(path, TableOptions(FRAMES, columns, 1))
    assert [(a.alert_id, a.x, a.y) for a in alerts] == [("sex.csv-0", 9.0, 19.5)]
    assert read_alerts(path, TableOptions(columns=columns))[0][0].frames == {}
    path.write_text("")
    with pytest.raises(AlertError, match=r"sex\.csv: found the columns none; wanted x, y or ra, dec"):
        read_alerts(path, TableOptions(FRAMES))


def test_fields_become_columns(tmp_path):
    """The table of JSON alerts has their fields and extra, masked where an alert has none; types that mix are text."""
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
    """Its ASCII_HEAD and its FITS_LDAC, whose candidates stand in the second table, with pixels from 1."""
    (tmp_path / "head.cat").write_text(SEXTRACTOR)
    candidates = Table({"NUMBER": [1, 2], "X_IMAGE": [10.5, 30.0], "Y_IMAGE": [20.25, 40.0], "FWHM_IMAGE": [4.5, 5.5]})
    hdus = [fits.PrimaryHDU(), fits.BinTableHDU(Table({"Field Header Card": ["x"]}), name="LDAC_IMHEAD")]
    fits.HDUList([*hdus, fits.BinTableHDU(candidates, name="LDAC_OBJECTS")]).writeto(tmp_path / "two.ldac")
    columns = {"x": "X_IMAGE", "y": "Y_IMAGE", "fwhm": "FWHM_IMAGE"}
    for name in ("head.cat", "two.ldac"):
        alerts, _ = read_alerts(tmp_path / name, TableOptions({"science": "s.fits"}, columns, pixel_origin=1))
        assert [(a.x, a.y, a.fwhm) for a in alerts] == [(9.5, 19.25, 4.5), (29.0, 39.0, 5.5)]
        assert [a.extra["NUMBER"] for a in alerts] == [1, 2]
