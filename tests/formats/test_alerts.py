"""Alerts: every form that comes in, and what is refused."""

import dataclasses
import io
import json
import math
import subprocess
import sys
import uuid
from importlib.resources import files
from typing import Any

import fastavro
import pytest
from helpers.night import alert_record
from hypothesis import example, given
from hypothesis import strategies as st

from stampworker.config import PLANES
from stampworker.errors import AlertError, UnknownSchema
from stampworker.formats.alerts import Alert, decode, decode_container, encode, from_record
from stampworker.formats.schema import ALERT, parsed_schema

FRAMES = {"science": "s.fits", "difference": "file:///d.fits#SCI,2"}

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(text, finite, st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1))
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
alerts = st.builds(
    Alert,
    alert_id=text.filter(bool),
    object_id=st.none() | text,
    x=finite,
    y=finite,
    mjd=st.none() | finite,
    mjd_scale=st.sampled_from(["utc", "tai", "tdb", "tt"]),
    fwhm=st.none() | positive,
    gain=st.none() | positive,
    extra=st.dictionaries(text, scalars, max_size=4),
    frames=st.dictionaries(st.sampled_from(PLANES[:5]), text.filter(bool)).map(lambda d: {"science": "s"} | d),
)


def wire(record, schema_id=100, schema=None):
    """Return a record in Confluent wire format."""
    out = io.BytesIO()
    out.write(b"\0" + schema_id.to_bytes(4, "big"))
    fastavro.schemaless_writer(out, schema or parsed_schema(*ALERT), record)
    return out.getvalue()


@pytest.fixture
def schema_folder(tmp_path):
    """Return a folder with the schema of an alert as number 100."""
    (tmp_path / "100.avsc").write_text(json.dumps(fastavro.schema.load_schema(schema_path())))
    return tmp_path


def schema_path():
    return str(files("stampworker").joinpath("schemas", ALERT[0], ALERT[1], f"{ALERT[0]}.avsc"))


@given(alerts)
def test_alerts_survive_json_and_avro(alert):
    """An encoded alert decodes to the same alert and the same packet id, from JSON and from Avro."""
    data = encode(alert)
    assert decode(data) == alert
    assert encode(alert) == data
    as_json = json.dumps(alert.to_record()).encode()
    assert decode(as_json) == alert
    assert decode(as_json).packet_id() == decode(data).packet_id() == alert.packet_id()


@pytest.mark.slow
@given(alerts)
def test_types_of_extra_survive(alert):
    """A long stays a long, a double a double and a boolean a boolean."""
    kinds = {name: type(value) for name, value in alert.extra.items()}
    assert {name: type(value) for name, value in decode(encode(alert)).extra.items()} == kinds


def test_avro_is_read_by_fastavro_alone():
    """An encoded alert is an object container with the full schema, docs included."""
    reader = fastavro.reader(io.BytesIO(encode(from_record(alert_record(FRAMES, objectId="o")))))
    assert list(reader) == [from_record(alert_record(FRAMES, objectId="o")).to_record()]
    assert "doc" in json.dumps(reader.writer_schema)


def test_packet_id_depends_on_the_content_only():
    """The order of fields, the form and omitted defaults do not change the id; every field does."""
    base = alert_record(FRAMES, ra=1.0, dec=2.0, extra={"a": 1, "b": 2.5})
    same = {name: base[name] for name in reversed(base)} | {
        "extra": {"b": 2.5, "a": 1},
        "mjdScale": "UTC",
        "gain": None,
    }
    assert from_record(base).packet_id() == from_record(same).packet_id()
    assert uuid.UUID(from_record(base).packet_id()).version == 5
    changes = {
        "alertId": "a-2",
        "objectId": "o",
        "x": 1.5,
        "y": 1.5,
        "ra": 1.5,
        "dec": 1.5,
        "mjd": 60000.0,
        "mjdScale": "tai",
        "fwhm": 2.0,
        "gain": 1.5,
        "extra": {"a": 1, "b": 2.25},
        "frames": {"science": "t.fits"},
    }
    ids = {from_record(base | {name: value}).packet_id() for name, value in changes.items()}
    assert len(ids | {from_record(base).packet_id()}) == len(changes) + 1 == len(dataclasses.fields(Alert)) + 1


def test_packet_id_is_that_of_ever():
    """The id of a known alert is the same in every release, because readers join on it."""
    assert from_record(alert_record({"science": "s.fits"})).packet_id() == "8c71df51-aa5a-5472-b957-d75b6b629369"


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process():
    """The bytes of an alert do not depend on the process or its hash seed."""
    code = (
        "import sys; from stampworker.formats.alerts import *;"
        "a = Alert('a', x=1.0, y=2.0, extra={'k': 1, 'l': 'm'}, frames={'science': 's', 'mask': 'm'});"
        "sys.stdout.buffer.write(encode(a))"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    alert = Alert("a", x=1.0, y=2.0, extra={"k": 1, "l": "m"}, frames={"science": "s", "mask": "m"})
    assert made == {encode(alert)}


def test_key_is_the_object_else_the_alert():
    """Records of one object share a key."""
    assert from_record(alert_record(FRAMES, objectId="o")).key == "o"
    assert from_record(alert_record(FRAMES)).key == "a-1"


def test_integers_stand_for_doubles():
    """An integer in JSON is read as a number."""
    alert = decode(json.dumps(alert_record(FRAMES, x=3, y=4, gain=2)).encode())
    assert (alert.x, alert.y, alert.gain) == (3.0, 4.0, 2.0)
    assert {type(value) for value in (alert.x, alert.y, alert.gain)} == {float}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no alertId": ({"alertId": None}, "alertId: found None, wanted a string that is not empty"),
    "empty alertId": ({"alertId": ""}, "alertId: found ''"),
    "number as alertId": ({"alertId": 5}, "alertId: found 5"),
    "half a surrogate pair": ({"alertId": "\ud800"}, r"alertId: found '\\ud800'"),
    "surrogate in the object": ({"objectId": "a\udfff"}, r"objectId: found 'a\\udfff'"),
    "surrogate in extra": ({"extra": {"a": "\ud800"}}, r"extra.a: found '\\ud800'"),
    "surrogate in a name": ({"extra": {"\ud800": 1}}, r"extra: found the name '\\ud800'"),
    "surrogate in a URL": ({"frames": {"science": "\ud800"}}, r"frames.science: found '\\ud800'"),
    "number as objectId": ({"objectId": 5}, "objectId: found 5, wanted a string"),
    "text as x": ({"x": "3"}, "x: found '3', wanted a finite number"),
    "boolean as x": ({"x": True}, "x: found True"),
    "NaN": ({"x": math.nan}, "x: found nan"),
    "infinite": ({"mjd": math.inf}, "mjd: found inf"),
    "an integer beyond doubles": ({"x": 10**400}, "x: found 1000"),
    "x without y": ({"y": None}, "x, y: found 41.3, None, wanted both or neither"),
    "ra without dec": ({"ra": 1.0}, "ra, dec: found 1.0, None"),
    "no position": ({"x": None, "y": None}, "found no position"),
    "dec": ({"ra": 1.0, "dec": 90.1}, "dec: found 90.1, wanted -90 to 90"),
    "fwhm": ({"fwhm": 0}, "fwhm: found 0, wanted a number above 0"),
    "gain": ({"gain": -1.0}, "gain: found -1.0, wanted a number above 0"),
    "time scale": ({"mjdScale": "gps"}, "mjdScale: found 'gps', wanted one of utc, tai"),
    "extra": ({"extra": [1]}, "extra: found list, wanted a map"),
    "null in extra": ({"extra": {"a": None}}, "extra.a: found None"),
    "a list in extra": ({"extra": {"a": [1]}}, r"extra.a: found \[1\]"),
    "too long an integer": ({"extra": {"a": 1 << 63}}, "extra.a: found 9223372036854775808, wanted"),
    "frames that are no map": ({"frames": ["s"]}, "frames: found list, wanted a map"),
    "unknown plane": ({"frames": {"science": "s", "tempalte": "t"}}, "no plane is called 'tempalte'.*'template'"),
    "empty URL": ({"frames": {"science": ""}}, "frames.science: found ''"),
    "error and variance": (
        {"frames": {"science": "s", "error": "e", "variance": "v"}},
        "frames: found both error and variance",
    ),
    "unknown field": (
        {"fwmh": 3},
        "'fwmh' is not a field of an alert; the nearest known is 'fwhm'; other values go to",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_an_alert_is_said(case):
    """The message names the field, the value found and the value wanted, and the alert if its id could be read."""
    changes, message = BAD[case]
    record = alert_record(FRAMES) | changes
    with pytest.raises(AlertError, match=message) as caught:
        from_record(record)
    assert "pw" not in str(caught.value)
    if "alertId" not in changes and case != "unknown field":
        assert caught.value.alert_id == "a-1"
        assert str(caught.value).startswith("alert 'a-1': ")
    str(caught.value).encode()


def test_fields_that_may_be_null_may_be_absent_or_null():
    """The shortest alert is an id and a position; a resolver may find its frames."""
    short = from_record({"alertId": "a", "ra": 1.0, "dec": -2.0})
    assert from_record(short.to_record()) == short
    assert (short.x, short.mjd_scale, short.extra, short.frames) == (None, "utc", {}, {})
    assert from_record(dict.fromkeys(short.to_record()) | {"alertId": "a", "ra": 1.0, "dec": -2.0}) == short
    assert decode(encode(short)) == short


def test_container_of_several_is_not_a_message():
    """A Kafka record is one alert."""
    out = io.BytesIO()
    fastavro.writer(out, parsed_schema(*ALERT), [alert_record(FRAMES)] * 2)
    with pytest.raises(AlertError, match="found 2 alerts, wanted 1 in a message"):
        decode(out.getvalue())
    assert len(decode_container(out.getvalue())) == 2


def test_wire_format(schema_folder):
    """Byte 0, four bytes of schema id, an Avro body; the writer's schema comes from the folder."""
    alert = from_record(alert_record(FRAMES, fwhm=2.5))
    data = wire(alert.to_record())
    assert decode(data, schema_folder) == alert
    with pytest.raises(UnknownSchema, match=r"schema id 100, and no alerts\.schema_folder is set"):
        decode(data)
    with pytest.raises(UnknownSchema, match=r"schema id 101, and there is no .*101\.avsc"):
        decode(wire(alert.to_record(), 101), schema_folder)
    with pytest.raises(AlertError, match="2 bytes after the alert, wanted 0"):
        decode(data + b"ab", schema_folder)
    with pytest.raises(AlertError, match="schema id 100: "):
        decode(data[:-3], schema_folder)
    with pytest.raises(AlertError, match="found 5 bytes"):
        decode(data[:5], schema_folder)
    (schema_folder / "102.avsc").write_text('{"type": "rekord"}')
    with pytest.raises(AlertError, match=r"102\.avsc: UnknownType"):
        decode(wire(alert.to_record(), 102), schema_folder)


def test_older_and_newer_writers_are_read(schema_folder):
    """Alerts of a writer without the optional fields, and of one with an unknown field, are read."""
    schema = json.loads((schema_folder / "100.avsc").read_text())
    fields = {field["name"]: field for field in schema["fields"]}
    older = schema | {"fields": [fields[name] for name in ("alertId", "x", "y", "frames")]}
    newer = schema | {"fields": [*schema["fields"], {"name": "colour", "type": "float", "default": 0.0}]}
    record = alert_record(FRAMES)
    for number, changed in ((7, older), (8, newer)):
        (schema_folder / f"{number}.avsc").write_text(json.dumps(changed))
        data = wire(record | {"colour": 1.0}, number, fastavro.parse_schema(changed))
        assert decode(data, schema_folder) == from_record(record)
        out = io.BytesIO()
        fastavro.writer(out, fastavro.parse_schema(changed), [record | {"colour": 1.0}])
        assert decode(out.getvalue()) == from_record(record)


@given(st.binary(max_size=300))
@example(b"")
@example(b"\0")
@example(b"\0\0\0\0\x64\x02")
@example(b"Obj\x01")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 5000)
@example(b'{"alertId":"a","x":1e999,"y":0,"frames":{"science":"s"}}')
@example(b'{"alertId":"\\ud800","x":1,"y":0,"frames":{"science":"s"}}')
@example(b"null")
@example(b"\xff\xfe{")
def test_malformed_bytes_end_in_alert_error(schema_folder, data):
    """Any bytes give an alert or an AlertError whose text can be written."""
    for start in (b"", b"Obj\x01", b"\0\0\0\0\x64", b'{"alertId": "a", "x": '):
        try:
            decode(start + data, schema_folder)
        except AlertError as exc:
            str(exc).encode()


@given(st.data())
def test_damaged_alerts_end_in_alert_error(schema_folder, data):
    """A good alert with lost or changed bytes gives an alert or an AlertError, too."""
    record = alert_record(FRAMES, extra={"a": 1.5, "b": "c"})
    whole = data.draw(
        st.sampled_from(
            [encode(from_record(record)), wire(from_record(record).to_record()), json.dumps(record).encode()]
        )
    )
    where = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:where] + data.draw(st.binary(max_size=4)) + whole[where + data.draw(st.integers(0, 4)) :]
    try:
        decode(changed, schema_folder)
    except AlertError as exc:
        str(exc).encode()
