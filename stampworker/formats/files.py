"""Alerts in files: JSON, Avro containers, wire format, and tables of candidates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astropy.io import fits
from astropy.table import Table

from stampworker.errors import AlertError
from stampworker.formats.alerts import Alert, decode, decode_container, from_record, from_table, masked_column

_TABLES = {  # ending: format of astropy's reader
    ".ecsv": "ascii.ecsv",
    ".vot": "votable",
    ".xml": "votable",
    ".votable": "votable",
    ".fits": "fits",
    ".fit": "fits",
    ".csv": "ascii.csv",
    ".tsv": "ascii.tab",
    ".cat": "ascii.sextractor",
    ".ldac": "fits",
}


@dataclass(frozen=True)
class TableOptions:
    """How a table of candidates becomes alerts; see `stampworker.formats.alerts.from_table`.

    Attributes
    ----------
    frames : mapping
        Plane → URL, for every row.
    columns : mapping
        Name of ours → name of the column.
    pixel_origin : {0, 1}
        What the table calls the first pixel.
    """

    frames: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    pixel_origin: int = 0


def is_table(path: Path) -> bool:
    """Tell by its ending whether a file is a table of candidates."""
    return path.suffix.lower() in _TABLES


def read_alerts(
    path: Path, options: TableOptions | None = None, schema_folder: Path | None = None
) -> tuple[list[Alert | AlertError], Table]:
    """Read every alert of a file.

    Parameters
    ----------
    path : Path
        A table (ECSV, VOTable, FITS, CSV, by its ending), or alerts: one JSON object, a list, one object a line, an
        Avro object container, or one alert in Confluent wire format.
    options : TableOptions, optional
        For tables: the frames and columns.
    schema_folder : Path, optional
        Folder of ``<schema id>.avsc``, for wire format.

    Returns
    -------
    alerts : list of Alert or AlertError
        In the file's order; the error where one cannot be read.
    table : astropy.table.Table
        A row for each: the table's own columns, or the alerts' fields.

    Raises
    ------
    AlertError
        The file as a whole cannot be read.
    """
    if is_table(path):
        return _read_table(path, options or TableOptions())
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise AlertError(f"{path}: {exc.strerror}") from exc
    try:
        alerts = _read_alerts(data, schema_folder)
    except AlertError as exc:
        raise AlertError(f"{path}: {exc}") from exc
    return alerts, _fields_table(alerts)


def _read_table(path: Path, options: TableOptions) -> tuple[list[Alert | AlertError], Table]:
    if not path.is_file():
        raise AlertError(f"{path}: found no such file, wanted a table of candidates")
    kind = _TABLES[path.suffix.lower()]
    try:
        options_of_kind = {"hdu": _ldac_objects(path)} if kind == "fits" else {}
        table = Table.read(path, format=kind, **options_of_kind)
    except Exception as exc:  # astropy's readers raise many kinds of error
        raise AlertError(f"{path}: found no table: {type(exc).__name__}: {str(exc)[:200]}") from exc
    alerts = from_table(
        table, options.frames, columns=options.columns, pixel_origin=options.pixel_origin, source=path.name
    )
    return alerts, table


def _ldac_objects(path: Path) -> int:
    """Return the HDU of the candidates: SExtractor's FITS_LDAC has another table before them."""
    with fits.open(path) as hdus:
        names = [hdu.name for hdu in hdus]
    return names.index("LDAC_OBJECTS") if "LDAC_OBJECTS" in names else 1


def _read_alerts(data: bytes, schema_folder: Path | None) -> list[Alert | AlertError]:
    if data[:4] == b"Obj\x01":
        return [_or_error(from_record, record) for record in decode_container(data)]
    if data[:1] == b"\x00":
        return [_or_error(lambda wire: decode(wire, schema_folder), data)]
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError) as exc:
        lines = [line for line in data.splitlines() if line.strip()]
        # Of a list or an object over several lines that is cut off, no line is an object, or it begins as a list.
        if data.lstrip()[:1] == b"[" or not any(map(_is_object, lines)):
            raise AlertError(f"found neither JSON nor an Avro container: {exc}") from exc
        return [_or_error(decode, line) for line in lines]
    return [_or_error(from_record, record) for record in (whole if isinstance(whole, list) else [whole])]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _or_error(read: Any, source: Any) -> Alert | AlertError:
    try:
        if not isinstance(source, bytes | Mapping):
            raise AlertError(f"found {type(source).__name__}, wanted one alert: an object of fields")
        made: Alert = read(source)
    except AlertError as exc:
        return exc
    return made


def _fields_table(alerts: Sequence[Alert | AlertError]) -> Table:
    """Return the alerts' fields as a table; columns that no alert fills are left out."""
    rows = []
    for alert in alerts:
        record: dict[str, Any] = {"alertId": alert.alert_id or ""}
        if isinstance(alert, Alert):
            record = alert.to_record()
        extra = record.pop("extra", {})
        record.pop("frames", None)
        rows.append({k: v for k, v in extra.items() if k not in record} | record)
    names = list(dict.fromkeys(name for row in rows for name in row))
    used = [n for n in names if any(row.get(n) is not None for row in rows)]
    return Table({name: masked_column([row.get(name) for row in rows]) for name in used})
