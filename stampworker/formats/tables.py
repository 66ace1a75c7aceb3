"""Tables of candidates: read them, make alerts of their rows, add the results, write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units as u
from astropy.io import fits
from astropy.table import Column, MaskedColumn, Table, vstack

from stampworker.config import nearest
from stampworker.errors import AlertError, brief
from stampworker.formats.alerts import FIELDS, Alert, check_frames, from_record, is_scalar
from stampworker.formats.packets import METRICS, Packet
from stampworker.formats.rejects import Reject

_FORMATS = {  # ending: astropy's name of the format
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
WRITTEN = (".ecsv", ".vot", ".xml", ".fits", ".csv")
"""Endings of the tables that `write_tables` writes."""

_COLUMNS = ("id", *(name for name in FIELDS if name not in ("extra", "frames")))
_UNITS = {"x": u.pix, "y": u.pix, "ra": u.deg, "dec": u.deg, "mjd": u.day, "fwhm": u.pix}
_METRIC_TYPES: dict[str, type] = {"adjust_df": int, "adjust_bound": str}  # all others are floats


def is_table(path: Path) -> bool:
    """Return True if a file's ending is that of a table of candidates."""
    return path.suffix.lower() in _FORMATS


def read_table(path: Path) -> Table:
    """Read a table of candidates: ECSV, VOTable, FITS, CSV, TSV or a SExtractor catalogue; the ending names the format.

    A file that does not exist or cannot be read is an AlertError.
    """
    if not path.is_file():
        raise AlertError(f"{path}: found no such file, wanted a table of candidates")
    form = _FORMATS[path.suffix.lower()]
    try:
        if form != "fits":
            return Table.read(path, format=form)
        with fits.open(path) as hdus:  # SExtractor's FITS_LDAC has another table before the candidates
            hdu = "LDAC_OBJECTS" if "LDAC_OBJECTS" in hdus else 1
        return Table.read(path, format=form, hdu=hdu)
    except Exception as exc:  # astropy's readers raise many kinds of error
        raise AlertError(f"{path}: found no table: {brief(exc)}") from exc


def from_table(
    table: Table,
    frames: Mapping[str, str],
    *,
    columns: Mapping[str, str] | None = None,
    pixel_origin: int = 0,
    source: str = "table",
) -> list[Alert | AlertError]:
    """Make an alert of each row of a table of candidates.

    Parameters
    ----------
    table : astropy.table.Table
        One row per candidate, with ``x, y`` (pixels) or ``ra, dec`` (degrees, ICRS). Optional columns: ``objectId,
        mjd, mjdScale, fwhm, gain``. All other columns go to ``extra``. A masked or NaN entry is absent. ``alertId``
        comes from the column ``alertId`` or ``id`` if its values are unique, else it is ``<source>-<row>``.
    frames : mapping
        Plane → URL or path, for every row.
    columns : mapping, optional
        Field of an alert → name of its column, if it differs, such as ``{"x": "X_IMAGE", "y": "Y_IMAGE"}``.
    pixel_origin : {0, 1}, optional
        Number of the table's first pixel: 1 for SExtractor and FITS.
    source : str, optional
        Name of the table, for ``alertId`` and for error messages.

    Returns
    -------
    alerts : list of Alert or AlertError
        One per row, in order; the error if a row does not make an alert.

    Raises
    ------
    AlertError
        The table has no positions, lacks a column that ``columns`` names, or has a column whose unit cannot be
        converted; or ``frames`` are not those of an alert.
    ValueError
        ``pixel_origin`` is neither 0 nor 1.

    Notes
    -----
    A column with a unit is converted: ``ra, dec`` to degrees, ``mjd`` to days; ``x, y, fwhm`` must be pixels.
    """
    if pixel_origin not in (0, 1):
        raise ValueError(f"pixel_origin: found {pixel_origin!r}, wanted 0 or 1")
    check_frames(frames)
    names = _column_names(table, columns or {}, source)
    renamed = {column for name, column in names.items() if name != column}
    values = {
        name: _field_values(table, name, column, pixel_origin, source)
        for name, column in names.items()
        if name not in ("alertId", "frames", "extra") and not (name == column and column in renamed)
    }
    alerts: list[Alert | AlertError] = []
    for row, alert_id in enumerate(_row_ids(table, names, source)):
        present = {name: column[row] for name, column in values.items() if column[row] is not None}
        record = {name: value for name, value in present.items() if name in FIELDS}
        extra = {name: value for name, value in present.items() if name not in FIELDS}
        try:
            alerts.append(from_record(record | {"alertId": alert_id, "extra": extra, "frames": frames}))
        except AlertError as exc:
            alerts.append(AlertError(str(exc), exc.alert_id or alert_id))
    return alerts


def _column_names(table: Table, columns: Mapping[str, str], source: str) -> dict[str, str]:
    """Return the column of each field; a column without a field is its own."""
    for name in columns:
        if name not in _COLUMNS:
            raise AlertError(f"{source}: {name!r} is not a column that is looked for{nearest(name, _COLUMNS)}")
    names = {name: name for name in table.colnames} | dict(columns)
    for name, column in names.items():
        if column not in table.colnames:
            raise AlertError(f"{source}: found no column {column!r} for {name!r}{nearest(column, table.colnames)}")
    if not {"x", "y"} <= names.keys() and not {"ra", "dec"} <= names.keys():
        raise AlertError(f"{source}: found the columns {', '.join(table.colnames) or 'none'}; wanted x, y or ra, dec")
    return names


def _row_ids(table: Table, names: Mapping[str, str], source: str) -> list[str]:
    for name in ("alertId", "id"):
        if name in names:
            ids = [_scalar(value) for value in table[names[name]]]
            if None not in ids and "" not in ids and len(set(map(str, ids))) == len(ids):
                return [str(value) for value in ids]
    return [f"{source}-{row}" for row in range(len(table))]


def _field_values(table: Table, name: str, column: str, pixel_origin: int, source: str) -> list[Any]:
    """Return a field's value in each row, in the alert's unit; a column without a unit has it already."""
    values = [_scalar(value) for value in table[column]]
    if name in ("objectId", "mjdScale"):
        return [None if value is None else str(value) for value in values]
    if name not in _UNITS:
        return values
    unit = getattr(table[column], "unit", None) or u.dimensionless_unscaled
    factor = 1.0
    if unit != u.dimensionless_unscaled:
        try:
            factor = float(unit.to(_UNITS[name]))
        except (u.UnitConversionError, AttributeError, TypeError):
            raise AlertError(f"{source}: column {column!r} has the unit {str(unit)!r}, wanted {_UNITS[name]}") from None
    origin = pixel_origin if name in ("x", "y") else 0
    return [value * factor - origin if type(value) in (int, float) else value for value in values]


def _scalar(value: Any) -> Any:
    """Return an entry of a table as a Python scalar: None if masked or NaN; a value that is no scalar becomes text."""
    if value is None or np.ma.is_masked(value) or np.all(getattr(value, "mask", False)):
        return None
    value = getattr(value, "value", value)  # the number of a Quantity, the representation of a Time
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if is_scalar(value) else str(value)


def alerts_table(alerts: Sequence[Alert | AlertError]) -> Table:
    """Return the fields of alerts as a table with a row per alert; an error gives a row with its ``alertId`` alone.

    The keys of ``extra`` are columns; ``frames`` and the columns that no alert fills are left out.
    """
    rows = []
    for alert in alerts:
        record: dict[str, Any] = {"alertId": alert.alert_id or ""}
        if isinstance(alert, Alert):
            record = alert.to_record()
            del record["frames"]
        rows.append(record.pop("extra", {}) | record)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Table({name: masked_column(values) for name, values in columns.items() if set(values) != {None}})


def results_table(table: Table, results: Iterable[Packet | Reject]) -> Table:
    """Return a copy of a table of candidates with the results of its rows.

    The columns are ``alertId``, ``packetId``, ``adjust_*`` (masked without a fit) and ``reject``: the reason why a row
    has no packet, else empty.
    """
    listed = list(results)
    packets = [result if isinstance(result, Packet) else None for result in listed]
    out = table.copy()
    out["alertId"] = [result.alert_id or "" for result in listed]
    out["packetId"] = [packet.packet_id if packet else "" for packet in packets]
    for name in METRICS:
        values = [packet.metrics.get(name) if packet else None for packet in packets]
        out[name] = masked_column(values, _METRIC_TYPES.get(name, float))
    out["adjust_status"] = masked_column([packet and packet.adjust_status for packet in packets], str)
    out["adjust_artefact"] = masked_column([packet and packet.adjust_artefact for packet in packets], bool)
    out["reject"] = [f"{type(r.error).__name__}: {r.error}" if isinstance(r, Reject) else "" for r in listed]
    return out


def masked_column(values: Sequence[Any], kind: type | None = None) -> MaskedColumn:
    """Return scalars as a column, masked where they are None.

    By default its type is that of the values: float if integers and floats mix, text if other types mix or all are
    None.
    """
    if kind is None:
        kinds = {type(value) for value in values if value is not None}
        kind = kinds.pop() if len(kinds) == 1 else float if kinds == {int, float} else str
    missing = [value is None for value in values]
    return MaskedColumn([kind() if value is None else kind(value) for value in values], mask=missing)


def write_tables(path: Path, tables: Sequence[Table]) -> None:
    """Write tables to one file, one below the other; its ending, one of `WRITTEN`, names the format.

    The tables are modified: a column of different types becomes text, and so do the columns that the format cannot
    hold.
    """
    form = _FORMATS[path.suffix.lower()]
    for name in dict.fromkeys(name for table in tables for name in table.colnames):
        columns = [table[name] for table in tables if name in table.colnames and isinstance(table[name], Column)]
        if len({{"i": "f", "u": "f", "S": "U"}.get(column.dtype.kind, column.dtype.kind) for column in columns}) > 1:
            for table in tables:
                if name in table.colnames:
                    table[name] = _text_column(table[name])
    joined = vstack(tables, metadata_conflicts="silent")
    _fit_format(joined, form)
    joined.write(path, format=form, overwrite=True)


def _fit_format(table: Table, form: str) -> None:
    """Make text of the columns that a format cannot hold, and ASCII of the text in FITS; ECSV holds everything."""
    for name in table.colnames:
        column = table[name]
        is_plain = isinstance(column, Column | u.Quantity)
        if (form in ("votable", "ascii.csv") and not is_plain) or (form == "ascii.csv" and column.ndim > 1):
            table[name] = [str(value) for value in column]
        elif form == "fits" and is_plain and column.dtype.kind == "U":
            table[name] = _text_column(column, _ascii)
        if form == "fits":
            table.rename_column(name, _ascii(name))


def _text_column(column: Column, text: Callable[[Any], str] = str) -> MaskedColumn:
    return masked_column([None if value is None else text(value) for value in column.tolist()], str)


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
