"""The Avro schemas of alerts and packets; their only source is the folder ``schemas/``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import fastavro

ALERT = ("stampworker.alert", "1.0")
PACKET = ("stampworker.packet", "1.0")


@cache
def schema_text(name: str, version: str) -> str:
    """Return the schema of a name and a version ``<major>.<minor>`` as JSON without blanks, docs included."""
    text = files("stampworker").joinpath("schemas", name, version, f"{name}.avsc").read_text(encoding="utf-8")
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


@cache
def parsed_schema(name: str, version: str) -> Any:
    """Return a schema parsed by fastavro; see `schema_text`."""
    return fastavro.parse_schema(json.loads(schema_text(name, version)))


def write_container(name: str, version: str, record: Mapping[str, Any], marker: bytes) -> bytes:
    """Write one record as an uncompressed Avro object container, with a sync marker of 16 bytes.

    The same arguments give the same bytes in every process. fastavro's own container writer does not: it orders the
    attributes of the embedded schema by hash, which differs between processes. So fastavro writes the values only.

    References
    ----------
    Apache Avro 1.11 specification, "Object Container Files".
    """
    out, body = io.BytesIO(), io.BytesIO()
    fastavro.schemaless_writer(body, parsed_schema(name, version), record)
    out.write(_header(name, version) + marker)
    fastavro.schemaless_writer(out, "long", 1)  # records in the block
    fastavro.schemaless_writer(out, "bytes", body.getvalue())
    out.write(marker)
    return out.getvalue()


@cache
def _header(name: str, version: str) -> bytes:
    out = io.BytesIO()
    meta = {"avro.codec": b"null", "avro.schema": schema_text(name, version).encode()}
    fastavro.schemaless_writer(out, {"type": "map", "values": "bytes"}, meta)
    return b"Obj\x01" + out.getvalue()
