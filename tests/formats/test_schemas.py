"""The schemas, their docs, and the samples that every later version must read."""

import dataclasses
import io
import json
import re
from typing import IO, Any

import fastavro
import numpy as np
import pytest
from samples import ALERT_FOLDER, PACKET_FOLDER, SCHEMAS, sample_alert, sample_packet

from stampworker.formats import files, schema
from stampworker.formats.alerts import Alert, decode, encode, from_record
from stampworker.formats.packets import METRICS, STAMP_FIELDS, Packet
from stampworker.formats.packets import encode as encode_packet

FILES = sorted(SCHEMAS.glob("*/*/*.avsc"))
NAMES = [f"{file.stem}-{file.parent.name}" for file in FILES]
UNITS = {
    "none",
    "deg",
    "d",
    "pixel",
    "BUNIT",
    "electron/unit",
    "BUNIT of the stamp",
    "BUNIT of the science stamp",
}


def fields(part, path=()):
    """Yield every field of a schema at every level, with its path."""
    if isinstance(part, list):
        for branch in part:
            yield from fields(branch, path)
    elif isinstance(part, dict) and part.get("type") == "record":
        for field in part["fields"]:
            yield (*path, field["name"]), field
            yield from fields(field["type"], (*path, field["name"]))
    elif isinstance(part, dict):
        yield from fields(part.get("items", part.get("values", part["type"])), path)


def records(part):
    """Yield every record of a schema."""
    if isinstance(part, list):
        for branch in part:
            yield from records(branch)
    elif isinstance(part, dict):
        if part.get("type") == "record":
            yield part
        for field in part.get("fields", ()):
            yield from records(field["type"])


def version_of(text):
    """Return a version as a pair of numbers."""
    major, minor = text.split(".")
    return int(major), int(minor)


def without(text, names):
    """Return a schema without some of its top fields."""
    loaded = json.loads(text)
    return loaded | {"fields": [field for field in loaded["fields"] if field["name"] not in names]}


def only_record(file: IO[bytes], reader_schema: Any = None) -> Any:
    """Return the one record of a container, as fastavro reads it."""
    (record,) = fastavro.reader(file, reader_schema=reader_schema)
    return record


def resolve(writer, reader, record):
    """Return a record as a reader with another schema sees it."""
    out = io.BytesIO()
    fastavro.writer(out, fastavro.parse_schema(writer), [record])
    return only_record(io.BytesIO(out.getvalue()), fastavro.parse_schema(reader))


def test_every_version_has_a_schema_and_a_sample():
    """Each schema has a sample beside it and names its version; the current versions are the newest."""
    assert {f.parent.parent.name for f in FILES} == {"stampworker.alert", "stampworker.packet"}
    for name, current in (schema.ALERT, schema.PACKET):
        assert current == max((f.parent.name for f in FILES if f.stem == name), key=version_of)
    for file in FILES:
        assert file.stem == file.parent.parent.name
        assert (file.parent / "sample.avro").is_file()
        loaded = json.loads(file.read_text(encoding="utf-8"))
        assert loaded["version"] == file.parent.name
        assert f"{loaded['namespace']}.{loaded['name']}" == file.stem


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_field_says_what_it_is_and_its_unit(file):
    """At every level, a field has a doc that ends in its unit in brackets, and a record has a doc."""
    loaded = json.loads(file.read_text(encoding="utf-8"))
    found = list(fields(loaded))
    assert len(found) > 10
    for path, field in found:
        match = re.fullmatch(r"\S.{8,} \[([^][]+)\]", field.get("doc", ""))
        assert match, (path, field.get("doc"))
        assert match[1] in UNITS, path
    assert all(record.get("doc") for record in records(loaded))


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_optional_fields_default_to_null(file):
    """An optional field has null as first type and as default, at every level; a map or a list is empty by default."""
    for path, field in fields(json.loads(file.read_text(encoding="utf-8"))):
        kind = field["type"]
        if isinstance(kind, list):
            assert (kind[0], field["default"]) == ("null", None), path
            assert len(kind) == 2, path
        elif "default" in field:
            assert field["default"] in ("utc", {}, [], False), path


@pytest.mark.parametrize("written", FILES, ids=NAMES)
def test_versions_keep_the_promise(written):
    """A newer version of an alert reads the sample; so does every version of a packet with the same major number."""
    version = version_of(written.parent.name)
    for file in FILES:
        reader = version_of(file.parent.name)
        is_promised = reader >= version if file.stem == "stampworker.alert" else reader[0] == version[0]
        if file.stem == written.stem and is_promised:
            with (written.parent / "sample.avro").open("rb") as sample:
                record = only_record(sample, json.loads(file.read_text(encoding="utf-8")))
            assert record["alertId"] == sample_alert()["alertId"]


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_samples_of_every_version_are_read(file):
    """The current code reads what each version wrote."""
    data = (file.parent / "sample.avro").read_bytes()
    read = decode(data) if file.stem == "stampworker.alert" else Packet.read(data)
    assert read.alert_id == sample_alert()["alertId"]


def test_alert_schema_is_that_of_the_interface():
    """Names and types of an alert's fields are those of the interface, and `Alert` has an attribute for each."""
    loaded = json.loads((ALERT_FOLDER / "stampworker.alert.avsc").read_text(encoding="utf-8"))
    kinds = {field["name"]: field["type"] for field in loaded["fields"]}
    double = ["null", "double"]
    assert kinds == {
        "alertId": "string",
        "objectId": ["null", "string"],
        **dict.fromkeys(("x", "y", "ra", "dec", "mjd", "fwhm", "gain"), double),
        "mjdScale": "string",
        "extra": {"type": "map", "values": ["string", "long", "double", "boolean"]},
        "frames": {"type": "map", "values": "string"},
    }
    assert set(kinds) == set(Alert("a").to_record())
    assert len(kinds) == len(dataclasses.fields(Alert))


def test_packet_schema_is_that_of_the_interface():
    """Names of a packet's fields; each plane is null or file name and data."""
    loaded = json.loads((PACKET_FOLDER / "stampworker.packet.avsc").read_text(encoding="utf-8"))
    names = {field["name"] for field in loaded["fields"]}
    planes = ("Science", "Template", "Difference", "Convolved", "Error", "Mask", "Adjusted")
    metrics = ("chi2_0", "chi2", "df", "pval", "dx", "dy", "scale", "bg", "tbg", "status", "artefact")
    assert names >= {f"cutout{plane}" for plane in planes} | {f"adjust_{metric}" for metric in metrics}
    assert names >= {"packetId", "alertId", "objectId", "candidate", "frames", "adjustSettings", "workerVersion"}
    assert names >= {"convolvedOrigin", "errOrigin", "resampledPlanes", *STAMP_FIELDS.values(), *METRICS}
    inside = {path[1] for path, _ in fields(loaded) if path[0] == "candidate" and len(path) == 2}
    assert inside == {"x", "y", "ra", "dec", "mjd", "mjdScale", "fwhm", "extra"}
    settings = {path[1] for path, _ in fields(loaded) if path[0] == "adjustSettings" and len(path) == 2}
    assert settings >= {"max_shift", "max_scale", "inner", "fit_bg"}


def test_embedded_schema_is_the_file():
    """A container has the whole schema, docs included."""
    for file in FILES:
        name = (file.stem, file.parent.name)
        assert json.loads(schema.schema_text(*name)) == json.loads(file.read_text(encoding="utf-8"))


def test_alert_samples_are_one_alert():
    """The sample is the same alert in JSON and in Avro, for fastavro alone and for `decode`."""
    with (ALERT_FOLDER / "sample.avro").open("rb") as file:
        record = only_record(file)
    plain = json.loads((ALERT_FOLDER / "sample.json").read_text(encoding="utf-8"))
    assert record == plain
    alert = from_record(sample_alert())
    assert decode((ALERT_FOLDER / "sample.avro").read_bytes()) == alert
    assert decode((ALERT_FOLDER / "sample.json").read_bytes()) == alert
    assert encode(alert) == (ALERT_FOLDER / "sample.avro").read_bytes()
    assert files.read_alerts(ALERT_FOLDER / "sample.json")[0] == [alert]
    assert all(value is not None for value in record.values())


def test_packet_sample_is_what_is_made_today(tmp_path):
    """The sample packet of this version has the stamps and, to rounding, the metrics of today's code."""
    kept = Packet.read_file(PACKET_FOLDER / "sample.avro")
    made = sample_packet(tmp_path)
    for plane in STAMP_FIELDS:
        assert np.allclose(kept.stamps[plane].data, made.stamps[plane].data, rtol=1e-5, atol=1e-4), plane
        assert repr(kept.stamps[plane].header) == repr(made.stamps[plane].header), plane
    same = {name: value for name, value in kept.metrics.items() if not isinstance(value, str)}
    assert {name: made.metrics[name] for name in same} == pytest.approx(same, rel=1e-6, abs=1e-9)
    blank: dict[str, Any] = {"stamps": {}, "metrics": {}, "worker_version": ""}
    assert dataclasses.replace(kept, **blank) == dataclasses.replace(made, **blank)
    assert kept.adjust_status == "ok"
    assert kept.stamps["science"].data.shape == (11, 11)


def test_packet_sample_is_read_by_fastavro_alone():
    """Any Avro reader finds every plane, every metric and the verdict."""
    with (PACKET_FOLDER / "sample.avro").open("rb") as file:
        record = only_record(file)
    assert record["alertId"] == sample_alert()["alertId"]
    assert record["candidate"]["extra"] == sample_alert()["extra"]
    assert all(set(record[name]) == {"fileName", "stampData"} for name in STAMP_FIELDS.values())
    assert isinstance(record["adjust_artefact"], bool)
    assert all(record[f"adjust_{name}"] is not None for name in ("chi2_0", "chi2", "df", "pval", "dx", "dy", "scale"))
    packet = Packet.read_file(PACKET_FOLDER / "sample.avro")
    assert packet.to_record() == record
    assert Packet.read(encode_packet(packet)) == packet


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_older_readers_and_writers_resolve(file):
    """A version without the optional fields and this version read each other's records."""
    text = file.read_text(encoding="utf-8")
    now = json.loads(text)
    with (file.parent / "sample.avro").open("rb") as sample:
        record = only_record(sample)
    optional = {field["name"] for field in now["fields"] if "default" in field} - set(STAMP_FIELDS.values())
    lean = without(text, optional)
    assert len(optional) > 5
    seen = resolve(now, lean, record)
    assert seen == {name: value for name, value in record.items() if name not in optional}
    back = resolve(lean, now, seen)
    defaults = {field["name"]: field["default"] for field in now["fields"] if field["name"] in optional}
    assert back == record | defaults


def test_writers_of_later_versions_are_read():
    """A field of a later version is ignored."""
    text = (PACKET_FOLDER / "stampworker.packet.avsc").read_text(encoding="utf-8")
    later = json.loads(text)
    later["fields"].append({"name": "adjust_new", "type": ["null", "double"], "doc": "Later. [none]", "default": None})
    with (PACKET_FOLDER / "sample.avro").open("rb") as sample:
        record = only_record(sample)
    out = io.BytesIO()
    fastavro.writer(out, fastavro.parse_schema(later), [record | {"adjust_new": 1.0}])
    assert Packet.read(out.getvalue()) == Packet.read_file(PACKET_FOLDER / "sample.avro")
