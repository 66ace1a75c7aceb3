"""Cutouts in files: FITS, a plane per extension, the metadata in the primary header.

The layout is that of STDPipe's ``write_cutout``, so that each reads the other's files. Two cards mark a file as ours::

    STAMPWRK  the version of these rules
    SWTYPES   JSON: what each value was before FITS made a string of it

Without them the file is STDPipe's, whose ``adjust_dx`` is the shift along rows: then the two shifts are swapped on
loading.
"""

from __future__ import annotations

import ast
import datetime
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS

_MARK = "STAMPWRK"
_TYPES = "SWTYPES"
_VERSION = 1
_STRUCTURE = ("SIMPLE", "BITPIX", "NAXIS", "EXTEND", "COMMENT", "HISTORY", "", "CHECKSUM", "DATASUM", _MARK, _TYPES)
_NUMBERS = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}


def write_cutout(cutout: dict[str, Any], filename: str | Path) -> None:
    """Write a cutout to a FITS file; an existing file is replaced.

    Parameters
    ----------
    cutout : dict
        Planes (2-D arrays), ``meta``, and optionally ``header`` and ``wcs``, as `get_cutout` makes it.
    filename : str or Path
        Of the file.

    Raises
    ------
    ValueError
        A value of ``meta`` cannot be kept, or the cutout has no planes.

    Notes
    -----
    Boolean planes are stored as 16-bit integers. Values of ``meta`` that FITS has no type for are stored as strings:
    infinities, NaN, times (ISO), and lists and arrays as a Python literal.
    """
    planes = {k: v for k, v in cutout.items() if k not in ("meta", "header", "wcs") and np.ndim(v) == 2}
    if not planes:
        raise ValueError(f"cutout: found no planes among {', '.join(map(repr, cutout)) or 'nothing'}")
    primary = fits.PrimaryHDU()
    types: dict[str, str] = {}
    for name, value in cutout.get("meta", {}).items():
        text, kind = _to_card(name, value)
        _set(primary.header, name, text)
        if kind or name != name.lower():
            types[name] = kind
    primary.header[_MARK] = (_VERSION, "written by stampworker; adjust_dx is along x")
    primary.header[_TYPES] = json.dumps(types)
    header = cutout.get("header")
    if header is None and cutout.get("wcs") is not None:
        header = cutout["wcs"].to_header(relax=True)
    hdus: list[Any] = [primary]
    for name, plane in planes.items():
        data = np.asarray(plane)
        hdus.append(fits.ImageHDU(data.astype(np.uint16) if data.dtype == bool else data, header=header, name=name))
    fits.HDUList(hdus).writeto(filename, overwrite=True)


def load_cutout(filename: str | Path) -> dict[str, Any]:
    """Read a cutout from a FITS file of `write_cutout`, ours or STDPipe's.

    Parameters
    ----------
    filename : str or Path
        Of the file.

    Returns
    -------
    cutout : dict
        As `stampworker.cutouts.get_cutout` makes it; ``mask`` is boolean. In a file of STDPipe ``adjust_dx`` and
        ``adjust_dy`` are swapped, so that ``adjust_dx`` is always along x (columns).

    Raises
    ------
    OSError
        There is no such file, or it is not FITS.
    ValueError
        The file was written by a later version of these rules.
    """
    with fits.open(filename, memmap=False) as hdus:
        head = hdus[0].header
        version = head.get(_MARK)
        if version is not None and version > _VERSION:
            raise ValueError(f"{filename}: found {_MARK} {version}, wanted at most {_VERSION}")
        cutout: dict[str, Any] = {"meta": _load_meta(head)}
        for hdu in hdus[1:]:
            if hdu.data is None:
                continue
            name = hdu.name.lower()
            data = np.ascontiguousarray(hdu.data, dtype=hdu.data.dtype.newbyteorder("="))
            cutout[name] = data.astype(bool) if name == "mask" else data
            if "header" not in cutout:
                cutout["header"] = hdu.header.copy()
    if "header" in cutout:
        cutout["wcs"] = WCS(cutout["header"])
    meta = cutout["meta"]
    if version is None and {"adjust_dx", "adjust_dy"} <= meta.keys():
        meta["adjust_dx"], meta["adjust_dy"] = meta["adjust_dy"], meta["adjust_dx"]
    return cutout


def _set(header: fits.Header, name: str, value: Any) -> None:
    try:
        keyword = name if len(name) <= 8 and name.isidentifier() else f"HIERARCH {name}"
        header[keyword] = value
        str(header.cards[keyword])  # a card that cannot be written is found here, with its name
    except (ValueError, TypeError) as exc:
        raise ValueError(f"meta: {name!r} cannot be kept in FITS, found {value!r}: {exc}") from exc


def _to_card(name: str, value: Any) -> tuple[Any, str]:
    """Return a value as FITS has it, and what it was where that does not tell."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value, ""
    if isinstance(value, float):
        return (value, "") if math.isfinite(value) else (_spell(value), "float")
    if isinstance(value, str):
        plain = value.isascii() and value.isprintable() and value == value.rstrip() and value not in _NUMBERS
        return (value, "str") if plain and not value.startswith("array(") else (json.dumps(value), "json")
    if isinstance(value, datetime.datetime):
        return Time(value).to_value("fits"), "datetime"
    if isinstance(value, Time):
        return Time(value, precision=9).to_value("fits"), f"time {value.scale}"
    if np.ma.isMaskedArray(value) and value.shape == ():
        return None, ""
    try:
        return _spell_array(np.ma.filled(value)), _array_kind(value)
    except (TypeError, ValueError) as exc:
        raise ValueError(f"meta: {name!r} cannot be kept in FITS, found {type(value).__name__}: {exc}") from exc


def _spell(value: float) -> str:
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def _array_kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "tuple" if isinstance(value, tuple) else f"array {value.dtype.str}"


def _spell_array(value: Any) -> str:
    """Write a list or an array as the literal ``array([...])``, which STDPipe reads too."""
    items = np.asarray(value)
    if items.dtype.kind not in "biufSU":
        raise TypeError(f"an array of {items.dtype} has no literal")
    if items.dtype.kind in "SU" and not all(str(item).isascii() for item in items.ravel()):
        raise ValueError("FITS has ASCII only")
    return f"array({items.tolist()!r})"


def _load_meta(head: fits.Header) -> dict[str, Any]:
    types: dict[str, str] = json.loads(head.get(_TYPES, "{}"))
    names = {name.upper(): name for name in types}
    meta: dict[str, Any] = {}
    for card in head.cards:
        if card.keyword in _STRUCTURE or card.keyword.startswith("NAXIS"):
            continue
        name = names.get(card.keyword.upper(), card.keyword.lower())
        value = None if isinstance(card.value, fits.card.Undefined) else card.value
        meta[name] = _from_card(name, value, types.get(name) if _MARK in head else None)
    return meta


def _from_card(name: str, value: Any, kind: str | None) -> Any:
    """Undo `_to_card`; without a kind the value's own form tells, as in STDPipe's files."""
    if not isinstance(value, str):
        return value
    if kind == "str":
        return value
    if kind == "json":
        return json.loads(value)
    if kind == "datetime":
        return Time(value).to_datetime()
    if kind is not None and kind.startswith("time "):
        return Time(value, scale=kind.removeprefix("time "))
    if value in _NUMBERS:
        return _NUMBERS[value]
    if value.startswith("array("):
        return _read_array(value, kind)
    return Time(value) if name == "time" else value


def _read_array(text: str, kind: str | None) -> Any:
    """Read ``array([...])`` without running it; text that is no such literal is left as it is."""
    inside = text.removeprefix("array(").rstrip().removesuffix(")")
    dtype: str | None = None
    if kind is None and ", dtype=" in inside:  # numpy's own way to print one that is not of the default type
        inside, _, dtype = inside.rpartition(", dtype=")
    try:
        # A literal has no nan and no inf; the standard library's JSON has both.
        items = ast.literal_eval(inside) if "nan" not in inside and "inf" not in inside else _with_nan(inside)
    except (ValueError, SyntaxError):
        return text
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    return np.array(items, dtype=kind.removeprefix("array ") if kind else dtype)


def _with_nan(inside: str) -> Any:
    spelled = inside.replace("nan", "NaN").replace("inf", "Infinity")
    return json.loads(spelled)
