"""Alerts in files: JSON, Avro containers, Confluent wire format, and tables of candidates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from astropy.table import Table

from stampworker.errors import AlertError
from stampworker.formats.alerts import Alert, decode, decode_container, from_record
from stampworker.formats.tables import alerts_table, from_table, is_table, read_table


def read_alerts(
    path: Path, schema_folder: Path | None = None, **table_options: Any
) -> tuple[list[Alert | AlertError], Table]:
    """Read every alert of a file, or the error if one cannot be read, and a table with a row per alert.

    The file is a table, recognised by its ending and returned as read, or it has alerts, recognised by their content:
    one JSON object, a list, one object per line, an Avro object container, or one alert in Confluent wire format, whose
    schema is in the folder. The options ``frames``, ``columns`` and ``pixel_origin`` are those of `from_table`. An
    AlertError is raised if the file as a whole cannot be read.
    """
    if is_table(path):
        table = read_table(path)
        return from_table(table, **{"frames": {}, **table_options}, source=path.name), table
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise AlertError(f"{path}: {exc.strerror}") from exc
    try:
        alerts = _read_alerts(data, schema_folder)
    except AlertError as exc:
        raise AlertError(f"{path}: {exc}") from exc
    return alerts, alerts_table(alerts)


def _read_alerts(data: bytes, schema_folder: Path | None) -> list[Alert | AlertError]:
    if data[:4] == b"Obj\x01":
        return [_or_error(from_record, record) for record in decode_container(data)]
    if data[:1] == b"\x00":
        return [_or_error(lambda wire: decode(wire, schema_folder), data)]
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError) as exc:
        lines = [line for line in data.splitlines() if line.strip()]
        # A list or an object that is cut off is no file of lines: it begins with a bracket, or no line is an object.
        if data.lstrip()[:1] == b"[" or not any(map(_is_object, lines)):
            raise AlertError(f"found neither JSON nor an Avro container: {exc}") from exc
        return [_or_error(decode, line) for line in lines]
    return [_or_error(from_record, record) for record in (whole if isinstance(whole, list) else [whole])]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _or_error(read: Callable[[Any], Alert], source: object) -> Alert | AlertError:
    try:
        return read(source)
    except AlertError as exc:
        return exc
