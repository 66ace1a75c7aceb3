"""Alerts in files: every form, and files of no known form."""

import io
import json

import fastavro
import pytest
from helpers.night import alert_record
from hypothesis import given
from hypothesis import strategies as st

from stampworker.errors import AlertError, UnknownSchema
from stampworker.formats.alerts import Alert, encode, from_record
from stampworker.formats.files import read_alerts
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
    assert read_alerts(path, tmp_path)[0] == ALERTS[:1]
    (error,) = read_alerts(path)[0]
    assert type(error) is UnknownSchema


def test_a_bad_alert_costs_one_alert(tmp_path):
    """A bad alert in a list, in lines or in a container gives its error at its position; the table has a row for it."""
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
    # Not by the data: fastavro orders a schema by hash, and two processes of one run would name the cases differently.
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_file_that_is_none_of_them(tmp_path, data, message):
    """A file that cannot be read as a whole, or a list that is cut off, gives one error with the file's name."""
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
        read_alerts(tmp_path / "absent.ecsv")


@pytest.mark.slow
@given(st.binary(max_size=200))
def test_any_bytes_are_alerts_or_an_error(tmp_path, data):
    """Any content of a file gives alerts, each read or with its error, or an AlertError."""
    for start in (b"", b"Obj\x01", b"\0", b"[{", b'{"alertId": "a"}\n'):
        (tmp_path / "a").write_bytes(start + data)
        try:
            alerts, table = read_alerts(tmp_path / "a")
        except AlertError as exc:
            str(exc).encode()
        else:
            assert len(table) == len(alerts)
