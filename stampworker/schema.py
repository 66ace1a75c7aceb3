"""The Avro schemas that stampworker speaks; their only source is the folder ``schemas/``."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import fastavro

ALERT = ("stampworker.alert", "1.0")
PACKET = ("stampworker.packet", "1.0")


@cache
def schema_text(name: str, version: str) -> str:
    """Return a schema as compact JSON, docs included.

    Parameters
    ----------
    name : str
        ``stampworker.alert`` or ``stampworker.packet``.
    version : str
        ``<major>.<minor>``.

    Returns
    -------
    text : str
    """
    text = files("stampworker").joinpath("schemas", name, version, f"{name}.avsc").read_text(encoding="utf-8")
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


@cache
def parsed_schema(name: str, version: str) -> Any:
    """Return a schema parsed by fastavro; see `schema_text`."""
    return fastavro.parse_schema(json.loads(schema_text(name, version)))
