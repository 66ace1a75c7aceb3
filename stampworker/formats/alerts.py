"""Incoming alerts: from bytes or records to `Alert`."""

from __future__ import annotations

import io
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import fastavro
from fastavro.schema import SchemaParseException

from stampworker.config import PLANES, nearest
from stampworker.errors import AlertError, UnknownSchema, brief, shown
from stampworker.formats.schema import ALERT, parsed_schema, write_container

Scalar = str | int | float | bool

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_OID, "stampworker.packet")
_TIME_SCALES = ("utc", "tai", "tdb", "tt", "tcb", "tcg", "ut1")
_NUMBERS = ("x", "y", "ra", "dec", "mjd", "fwhm", "gain")


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
        Position on the science frame, pixels, 0-based; None if ``ra``, ``dec`` give it.
    ra, dec : float or None
        Position on the sky, degrees, ICRS.
    mjd : float or None
        Middle of the exposure, days, in the scale ``mjd_scale``.
    mjd_scale : str
        Time scale of ``mjd``: ``utc``, ``tai``, ``tdb``, ``tt``, ``tcb``, ``tcg`` or ``ut1``.
    fwhm : float or None
        FWHM of the PSF on the science frame, pixels.
    gain : float or None
        Electrons per unit of the science frame.
    extra : dict of str to str, int, float or bool
        All other information about the candidate.
    frames : dict of str to str
        Plane → URL or path. A resolver may add other planes.
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
        """Key of the packet's Kafka record: ``object_id``, or ``alert_id`` if that is None."""
        return self.object_id if self.object_id is not None else self.alert_id

    def to_record(self) -> dict[str, Any]:
        """Return the alert as a record of the schema ``stampworker.alert``."""
        return {name: getattr(self, attribute) for name, attribute in FIELDS.items()}

    def packet_id(self) -> str:
        """Return the UUID (version 5) of the alert's content: the same alert has the same id in every release."""
        content = json.dumps(self.to_record(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return str(uuid.uuid5(_NAMESPACE, content))


def _field_name(attribute: str) -> str:
    first, *others = attribute.split("_")
    return first + "".join(map(str.capitalize, others))


FIELDS = {_field_name(attribute.name): attribute.name for attribute in fields(Alert)}
"""Field of the schema → attribute: ``alertId`` → ``alert_id``."""


def from_record(record: Mapping[str, Any]) -> Alert:
    """Check a record of the schema ``stampworker.alert`` and make an `Alert` of it.

    Fields that may be null may be absent. AlertError: a field is unknown or missing, or its value is not allowed.
    """
    if not isinstance(record, Mapping):
        raise AlertError(f"found {type(record).__name__}, wanted one alert: an object of fields")
    for name in record:
        if name not in FIELDS:
            known = nearest(str(name), FIELDS)
            raise AlertError(f"{shown(name)} is not a field of an alert{known}; other values go to 'extra'")
    alert_id = record.get("alertId")
    if not alert_id or not is_text(alert_id):
        raise AlertError(f"alertId: found {shown(alert_id)}, wanted a string that is not empty")
    object_id, extra, frames = (record.get(name) for name in ("objectId", "extra", "frames"))
    try:
        values: dict[str, Any] = {name: _number(name, record.get(name)) for name in _NUMBERS}
        values["mjd_scale"] = _time_scale(record.get("mjdScale"))
        if object_id is not None and not is_text(object_id):
            raise AlertError(f"objectId: found {shown(object_id)}, wanted a string")
        if extra is not None:
            _check_extra(extra)
        if frames is not None:
            check_frames(frames)
        alert = Alert(alert_id, object_id, extra=extra or {}, frames=dict(frames or {}), **values)
        _check_position(alert)
    except AlertError as exc:
        raise AlertError(f"alert {alert_id!r}: {exc}", alert_id) from None
    return alert


def decode(data: bytes, schema_folder: Path | None = None) -> Alert:
    r"""Read one alert from bytes: an Avro container if they begin with ``Obj\x01``, wire format if with 0, else JSON.

    The folder has the files ``<schema id>.avsc``, the writers' schemas of the wire format; without the one that is
    needed, UnknownSchema is raised. Other bytes that cannot be decoded, or a wrong field, are an AlertError.
    """
    if data[:4] == b"Obj\x01":
        records = decode_container(data)
        if len(records) != 1:
            raise AlertError(f"Avro container: found {len(records)} alerts, wanted 1 in a message")
        return from_record(records[0])
    if data[:1] == b"\x00":
        return from_record(_decode_wire(data, schema_folder))
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as exc:  # not JSON, not UTF-8, a number of more than 4300 digits
        start = bytes(data[:20])
        raise AlertError(f"found {start!r}…, wanted JSON, an Avro container or wire format: {brief(exc)}") from exc
    return from_record(record)


def encode(alert: Alert) -> bytes:
    """Return an alert as an Avro object container of one record.

    The same alert gives the same bytes, because the container's sync marker is made from the content.
    """
    return write_container(*ALERT, alert.to_record(), uuid.UUID(alert.packet_id()).bytes)


def decode_container(data: bytes) -> list[dict[str, Any]]:
    """Read the records of an Avro container in the schema ``stampworker.alert``; AlertError if they do not resolve."""
    try:
        reader = fastavro.reader(io.BytesIO(data), reader_schema=parsed_schema(*ALERT))
        return list(reader)  # type: ignore[arg-type]
    except Exception as exc:  # malformed bytes raise many kinds of errors, and fastavro's have no common base
        raise AlertError(f"Avro container: {brief(exc)}; wanted {' '.join(ALERT)}") from exc


def _decode_wire(data: bytes, schema_folder: Path | None) -> Any:
    if len(data) < 6:
        raise AlertError(f"wire format: found {len(data)} bytes, wanted a 5-byte prefix and a body")
    schema_id = int.from_bytes(data[1:5], "big")
    if schema_folder is None:
        raise UnknownSchema(f"wire format: schema id {schema_id}, and no alerts.schema_folder is set")
    body = io.BytesIO(data[5:])
    writer_schema = _writer_schema(schema_folder, schema_id)
    try:
        record = fastavro.schemaless_reader(body, writer_schema, parsed_schema(*ALERT))
    except Exception as exc:  # as above
        raise AlertError(f"wire format, schema id {schema_id}: {brief(exc)}") from exc
    if rest := body.read():
        raise AlertError(f"wire format, schema id {schema_id}: {len(rest)} bytes after the alert, wanted 0")
    return record


@lru_cache(maxsize=256)
def _writer_schema(folder: Path, schema_id: int) -> Any:
    path = folder / f"{schema_id}.avsc"
    try:
        return fastavro.parse_schema(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UnknownSchema(f"wire format: schema id {schema_id}, and there is no {path}") from None
    except (OSError, ValueError, SchemaParseException) as exc:
        raise AlertError(f"wire format: schema id {schema_id}, {path}: {brief(exc)}") from exc


def is_text(value: object) -> bool:
    """Return True if a value is a string that UTF-8 can hold; JSON may escape half of a surrogate pair."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    )


def is_scalar(value: object) -> bool:
    """Return True if ``extra`` can hold a value: a string, a double, a boolean or a 64-bit integer."""
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, float) or is_text(value)


def check_urls(frames: object) -> None:
    """Raise AlertError unless frames are a mapping of known planes to URLs or paths."""
    if not isinstance(frames, Mapping):
        raise AlertError(f"frames: found {type(frames).__name__}, wanted a map of plane to URL")
    for plane, url in frames.items():
        if plane not in PLANES:
            raise AlertError(f"frames: no plane is called {shown(plane)}{nearest(str(plane), PLANES)}")
        if not url or not is_text(url):
            found = shown(url) if isinstance(url, str) else type(url).__name__
            raise AlertError(f"frames.{plane}: found {found}, wanted a URL or path")


def check_frames(frames: Mapping[str, str]) -> None:
    """Raise AlertError as `check_urls` does, and if frames name both ``error`` and ``variance``."""
    check_urls(frames)
    if "error" in frames and "variance" in frames:
        raise AlertError("frames: found both error and variance, wanted one")


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise AlertError(f"{name}: found {shown(value)}, wanted a finite number")
    if (name in ("fwhm", "gain") and value <= 0) or (name == "dec" and abs(value) > 90):
        raise AlertError(f"{name}: found {value!r}, wanted {'-90 to 90' if name == 'dec' else 'a number above 0'}")
    return float(value)


def _time_scale(value: object) -> str:
    scale = "utc" if value is None else str(value).lower()
    if scale not in _TIME_SCALES:
        raise AlertError(f"mjdScale: found {shown(value)}, wanted one of {', '.join(_TIME_SCALES)}")
    return scale


def _check_extra(extra: object) -> None:
    if not isinstance(extra, dict):
        raise AlertError(f"extra: found {type(extra).__name__}, wanted a map of scalars")
    for name, value in extra.items():
        if not is_text(name):
            raise AlertError(f"extra: found the name {shown(name)}, wanted a string")
        if not is_scalar(value):
            raise AlertError(
                f"extra.{name}: found {shown(value)}, wanted a string, a double, a 64-bit integer or a boolean"
            )


def _check_position(alert: Alert) -> None:
    for a, b in (("x", "y"), ("ra", "dec")):
        if (getattr(alert, a) is None) != (getattr(alert, b) is None):
            raise AlertError(f"{a}, {b}: found {getattr(alert, a)}, {getattr(alert, b)}, wanted both or neither")
    if alert.x is None and alert.ra is None:
        raise AlertError("found no position, wanted x and y, or ra and dec")
