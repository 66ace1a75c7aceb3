"""Incoming alerts: bytes or records in, `Alert` out."""

from __future__ import annotations

import io
import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from astropy import units as u
from astropy.table import MaskedColumn, Row, Table
from fastavro.schema import SchemaParseException

from stampworker.config import PLANES, nearest
from stampworker.errors import AlertError, UnknownSchema
from stampworker.formats.schema import ALERT, parsed_schema, write_container

Scalar = str | int | float | bool

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "stampworker.packet")
_TIME_SCALES = ("utc", "tai", "tdb", "tt", "tcb", "tcg", "ut1")
FIELDS = {  # field of the schema: attribute
    "alertId": "alert_id",
    "objectId": "object_id",
    "x": "x",
    "y": "y",
    "ra": "ra",
    "dec": "dec",
    "mjd": "mjd",
    "mjdScale": "mjd_scale",
    "fwhm": "fwhm",
    "gain": "gain",
    "extra": "extra",
    "frames": "frames",
}
_NUMBERS = ("x", "y", "ra", "dec", "mjd", "fwhm", "gain")
_COLUMNS = ("id", *(name for name in FIELDS if name not in ("extra", "frames")))
_UNITS = {"x": u.pix, "y": u.pix, "ra": u.deg, "dec": u.deg, "mjd": u.day, "fwhm": u.pix}


@dataclass(frozen=True, slots=True)
class Alert:
    """A candidate detection and the frames that show it.

    Attributes
    ----------
    alert_id : str
        The sender's identifier.
    object_id : str or None
        The object's identifier.
    x, y : float or None
        Pixels on the science frame, 0-based; None: from ``ra``, ``dec``.
    ra, dec : float or None
        Degrees, ICRS.
    mjd : float or None
        Middle of the exposure, days, in the scale ``mjd_scale``.
    mjd_scale : str
        ``utc``, ``tai``, ...
    fwhm : float or None
        Of the PSF on the science frame, pixels.
    gain : float or None
        Electrons per unit of the science frame.
    extra : dict of str to str, int, float or bool
        Anything else about the candidate.
    frames : dict of str to str
        Plane → URL or path; those that are not named may come from a resolver.
    """

    alert_id: str
    object_id: str | None = None
    x: float | None = None
    y: float | None = None
    ra: float | None = None
    dec: float | None = None
    mjd: float | None = None
    mjd_scale: str = "utc"
    fwhm: float | None = None
    gain: float | None = None
    extra: dict[str, Scalar] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Key of the packet's Kafka record: the object, or the alert where no object is named."""
        return self.object_id if self.object_id is not None else self.alert_id

    def to_record(self) -> dict[str, Any]:
        """Return the alert as a record of the schema ``stampworker.alert``."""
        return {name: getattr(self, attribute) for name, attribute in FIELDS.items()}

    def packet_id(self) -> str:
        """Return the UUID (version 5) of the alert's content: no clock, offset or host is in it."""
        content = json.dumps(self.to_record(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return str(uuid.uuid5(_NAMESPACE, content))


def from_record(record: Mapping[str, Any]) -> Alert:
    """Check a record of the schema ``stampworker.alert`` and make an `Alert` of it.

    Parameters
    ----------
    record : mapping
        Fields by the schema's names; those that may be null may be absent.

    Returns
    -------
    alert : Alert

    Raises
    ------
    AlertError
        A field is unknown, missing or not what is wanted.
    """
    for name in record:
        if name not in FIELDS:
            known = nearest(str(name), FIELDS)
            raise AlertError(f"{_shown(name)} is not a field of an alert{known}; other values go to 'extra'")
    alert_id = record.get("alertId")
    if not isinstance(alert_id, str) or not alert_id or not is_text(alert_id):
        raise AlertError(f"alertId: found {_shown(alert_id)}, wanted a string that is not empty")
    try:
        values = {name: _number(name, record.get(name)) for name in _NUMBERS}
        alert = Alert(
            alert_id=alert_id,
            object_id=_string("objectId", record.get("objectId")),
            mjd_scale=_time_scale(record.get("mjdScale")),
            extra=_extra(record.get("extra")),
            frames=_frames(record.get("frames")),
            **values,
        )
        _check_position(alert)
    except AlertError as exc:
        raise AlertError(f"alert {alert_id!r}: {exc}", alert_id) from None
    return alert


def decode(data: bytes, schema_folder: Path | None = None) -> Alert:
    r"""Read one alert from bytes: JSON, an Avro object container, or Confluent wire format.

    Parameters
    ----------
    data : bytes
        One alert. The first bytes tell the form: ``Obj\x01`` a container, 0 the wire format, else JSON.
    schema_folder : Path, optional
        Folder of ``<schema id>.avsc``, the writers' schemas of the wire format.

    Returns
    -------
    alert : Alert

    Raises
    ------
    UnknownSchema
        No schema of that id is in the folder, or no folder is set.
    AlertError
        The bytes cannot be decoded, or the alert is not what is wanted.
    """
    if data[:4] == b"Obj\x01":
        records = decode_container(data)
        if len(records) != 1:
            raise AlertError(f"Avro container: found {len(records)} alerts, wanted 1 in a message")
        return from_record(records[0])
    if data[:1] == b"\x00":
        return from_record(_decode_wire(data, schema_folder))
    return from_record(_decode_json(data))


def encode(alert: Alert) -> bytes:
    """Return an alert as an Avro object container of one record.

    The same alert gives the same bytes: the container's sync marker comes from the content.
    """
    return write_container(*ALERT, alert.to_record(), uuid.UUID(alert.packet_id()).bytes)


def decode_container(data: bytes) -> list[dict[str, Any]]:
    """Read the records of an Avro object container, resolved to our schema of an alert.

    Raises
    ------
    AlertError
        The container cannot be read, or its schema is not that of an alert.
    """
    try:
        reader = fastavro.reader(io.BytesIO(data), reader_schema=parsed_schema(*ALERT))
        return list(reader)  # type: ignore[arg-type]
    except Exception as exc:  # malformed bytes end in many kinds of error, and fastavro's have no common base
        raise AlertError(f"Avro container: {_brief(exc)}; wanted {' '.join(ALERT)}") from exc


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
        One row a candidate, with ``x, y`` (pixels) or ``ra, dec`` (degrees, ICRS); any of ``objectId, mjd, mjdScale,
        fwhm, gain`` where there is such a column; all others go to ``extra``. A masked or NaN entry is absent.
        ``alertId`` is the column ``alertId`` or ``id`` where its values are unique, else ``<source>-<row>``.
    frames : mapping
        Plane → URL or path, for every row.
    columns : mapping, optional
        Name of ours → name of the column, such as ``{"x": "X_IMAGE", "y": "Y_IMAGE"}``.
    pixel_origin : {0, 1}, optional
        What the table calls the first pixel: 1 for SExtractor and FITS.
    source : str, optional
        Where the table comes from, for ``alertId``.

    Returns
    -------
    alerts : list of Alert or AlertError
        In the order of the rows; the error where a row does not make an alert.

    Raises
    ------
    AlertError
        The table lacks a column that is named, has no positions or a column in a unit that is not an angle, a time or
        pixels where that is wanted; or the frames are not those of an alert.
    ValueError
        ``pixel_origin`` is neither 0 nor 1.

    Notes
    -----
    Where a column has a unit it is converted: ``ra, dec`` to degrees, ``mjd`` to days; ``x, y, fwhm`` must be pixels.
    """
    if pixel_origin not in (0, 1):
        raise ValueError(f"pixel_origin: found {pixel_origin!r}, wanted 0 or 1")
    _frames(dict(frames))
    for our in columns or {}:
        if our not in _COLUMNS:
            raise AlertError(f"{source}: {our!r} is not a column that is looked for{nearest(our, _COLUMNS)}")
    names = {name: name for name in table.colnames} | dict(columns or {})
    for our, its in names.items():
        if its not in table.colnames:
            raise AlertError(f"{source}: found no column {its!r} for {our!r}{nearest(its, table.colnames)}")
    if not {"x", "y"} <= names.keys() and not {"ra", "dec"} <= names.keys():
        raise AlertError(f"{source}: found the columns {', '.join(table.colnames) or 'none'}; wanted x, y or ra, dec")
    ids = _row_ids(table, names, source)
    factors = {our: _factor(table, our, its, source) for our, its in names.items() if our in _UNITS}
    made: list[Alert | AlertError] = []
    for row, alert_id in zip(table, ids, strict=True):
        try:
            record = _row_record(row, alert_id, names, factors, pixel_origin)
            made.append(from_record(record | {"frames": dict(frames)}))
        except AlertError as exc:
            made.append(AlertError(str(exc), exc.alert_id or alert_id))
    return made


def masked_column(values: Sequence[Any], kind: type | None = None) -> MaskedColumn:
    """Return scalars as a table's column, masked where they are None.

    Parameters
    ----------
    values : sequence
        Scalars or None.
    kind : type, optional
        Of the column; by default the values' own, float where integers and floats mix, else text.
    """
    if kind is None:
        kinds = {type(value) for value in values if value is not None}
        kind = kinds.pop() if len(kinds) == 1 else float if kinds == {int, float} else str
    missing = [value is None for value in values]
    return MaskedColumn([kind() if value is None else kind(value) for value in values], mask=missing)


def _row_ids(table: Table, names: Mapping[str, str], source: str) -> list[str]:
    for name in ("alertId", "id"):
        if name in names:
            ids = [_scalar(value) for value in table[names[name]]]
            if None not in ids and "" not in ids and len(set(map(str, ids))) == len(ids):
                return [str(value) for value in ids]
    return [f"{source}-{row}" for row in range(len(table))]


def _factor(table: Table, our: str, its: str, source: str) -> float:
    """Return what turns a column into our unit; a column without one is taken to be in it."""
    unit = getattr(table[its], "unit", None)
    if unit is None or unit == u.dimensionless_unscaled:
        return 1.0
    try:
        return float(unit.to(_UNITS[our]))
    except (u.UnitConversionError, AttributeError, TypeError):
        raise AlertError(f"{source}: column {its!r} has the unit {str(unit)!r}, wanted {_UNITS[our]}") from None


def _row_record(
    row: Row, alert_id: str, names: Mapping[str, str], factors: Mapping[str, float], pixel_origin: int
) -> dict[str, Any]:
    record: dict[str, Any] = {"alertId": alert_id}
    extra: dict[str, Any] = {}
    renamed = {its for our, its in names.items() if our != its}
    for our, its in names.items():
        value = _scalar(row[its])
        if value is None or our in ("alertId", "frames", "extra") or (our == its and its in renamed):
            continue
        if our in factors and isinstance(value, int | float) and not isinstance(value, bool):
            value = value * factors[our] - (pixel_origin if our in ("x", "y") else 0)
        if our in ("objectId", "mjdScale"):
            value = str(value)
        (record if our in FIELDS else extra)[our] = value
    return record | {"extra": extra}


def _scalar(value: Any) -> Any:
    """Return a table's entry as a Python scalar; None where it is masked or NaN; text where it is neither."""
    if value is None or np.ma.is_masked(value) or np.all(getattr(value, "mask", False)):
        return None
    value = getattr(value, "value", value)  # a Quantity's number, a Time's representation
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and math.isnan(value):
        return None
    return value if isinstance(value, Scalar) and not _is_too_long(value) else str(value)


def _is_too_long(value: object) -> bool:
    """Tell whether a number is an integer that Avro's long cannot hold."""
    return isinstance(value, int) and not -(1 << 63) <= value < 1 << 63


def _decode_wire(data: bytes, schema_folder: Path | None) -> dict[str, Any]:
    if len(data) < 6:
        raise AlertError(f"wire format: found {len(data)} bytes, wanted a 5-byte prefix and a body")
    schema_id = int.from_bytes(data[1:5], "big")
    if schema_folder is None:
        raise UnknownSchema(f"wire format: schema id {schema_id}, and no alerts.schema_folder is set")
    body = io.BytesIO(data)
    body.seek(5)
    writer_schema = _writer_schema(schema_folder, schema_id)
    try:
        record = fastavro.schemaless_reader(body, writer_schema, parsed_schema(*ALERT))
    except Exception as exc:  # as above
        raise AlertError(f"wire format, schema id {schema_id}: {_brief(exc)}") from exc
    if body.tell() != len(data):
        raise AlertError(
            f"wire format, schema id {schema_id}: {len(data) - body.tell()} bytes after the alert, wanted 0"
        )
    return _mapping(record)


@lru_cache(maxsize=256)
def _writer_schema(folder: Path, schema_id: int) -> Any:
    path = folder / f"{schema_id}.avsc"
    try:
        return fastavro.parse_schema(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UnknownSchema(f"wire format: schema id {schema_id}, and there is no {path}") from None
    except (OSError, ValueError, SchemaParseException) as exc:
        raise AlertError(f"wire format: schema id {schema_id}, {path}: {_brief(exc)}") from exc


def _decode_json(data: bytes) -> dict[str, Any]:
    try:
        return _mapping(json.loads(data))
    except (ValueError, RecursionError) as exc:  # not JSON, not UTF-8, a number of more than 4300 digits
        start = bytes(data[:20])
        raise AlertError(f"found {start!r}…, wanted JSON, an Avro container or wire format: {_brief(exc)}") from exc


def _mapping(record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise AlertError(f"found {type(record).__name__}, wanted one alert: an object of fields")
    return record


def _brief(exc: BaseException) -> str:
    """Return the kind and the first 200 characters of a foreign error, which may quote whole schemas."""
    return f"{type(exc).__name__}: {str(exc)[:200]}"


def _shown(value: object) -> str:
    """Return at most 200 characters of a value that may be anything."""
    return ascii(value)[:200]


def is_text(value: str) -> bool:
    """Tell whether a string can be written as UTF-8: JSON may escape half of a surrogate pair."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AlertError(f"{name}: found {_shown(value)}, wanted a finite number")
    if (name in ("fwhm", "gain") and value <= 0) or (name == "dec" and abs(value) > 90):
        raise AlertError(f"{name}: found {value!r}, wanted {'-90 to 90' if name == 'dec' else 'a number above 0'}")
    return float(value)


def _string(name: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and is_text(value)):
        return value
    raise AlertError(f"{name}: found {_shown(value)}, wanted a string")


def _time_scale(value: object) -> str:
    scale = "utc" if value is None else str(value).lower()
    if scale not in _TIME_SCALES:
        raise AlertError(f"mjdScale: found {_shown(value)}, wanted one of {', '.join(_TIME_SCALES)}")
    return scale


def _extra(value: object) -> dict[str, Scalar]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AlertError(f"extra: found {type(value).__name__}, wanted a map of scalars")
    for name, item in value.items():
        _key("extra", name)
        if not isinstance(item, Scalar) or _is_too_long(item) or (isinstance(item, str) and not is_text(item)):
            raise AlertError(
                f"extra.{name}: found {_shown(item)}, wanted a string, a double, a 64-bit integer or a boolean"
            )
    return value


def _key(field_name: str, name: object) -> None:
    if not isinstance(name, str) or not is_text(name):
        raise AlertError(f"{field_name}: found the name {_shown(name)}, wanted a string")


def _frames(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AlertError(f"frames: found {_shown(value)}, wanted a map of plane to URL")
    for plane, url in value.items():
        if plane not in PLANES:
            raise AlertError(f"frames: no plane is called {_shown(plane)}{nearest(str(plane), PLANES)}")
        if not isinstance(url, str) or not url or not is_text(url):
            raise AlertError(f"frames.{plane}: found {_shown(url)}, wanted a URL or path")
    if "error" in value and "variance" in value:
        raise AlertError("frames: found both error and variance, wanted one of them")
    return value


def _check_position(alert: Alert) -> None:
    for a, b in (("x", "y"), ("ra", "dec")):
        if (getattr(alert, a) is None) != (getattr(alert, b) is None):
            raise AlertError(f"{a}, {b}: found {getattr(alert, a)}, {getattr(alert, b)}, wanted both or neither")
    if alert.x is None and alert.ra is None:
        raise AlertError("found no position, wanted x and y, or ra and dec")
