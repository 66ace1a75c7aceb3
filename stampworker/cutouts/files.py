"""Cutouts in files: FITS, a plane per extension, the metadata in the primary header.

The layout is that of STDPipe's ``write_cutout``, so each package reads the other's files. Two cards mark a file that
stampworker wrote::

    STAMPWRK  the version of these rules; adjust_dx is along x
    SWMETA    JSON: all metadata and the planes' dtypes, exactly

The JSON is needed because FITS has no type for an array or a time, cuts floats to 20 characters and ignores the case of
names. The other cards show the metadata to people and to STDPipe. If a card was edited later, its new value counts.
"""

from __future__ import annotations

import ast
import base64
import datetime
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.time import Time
from astropy.units import Quantity
from astropy.utils.masked import Masked
from astropy.wcs import WCS

from stampworker.cutouts.crop import has_wcs
from stampworker.cutouts.keywords import CHECKSUMS, SCALING, STRUCTURE

_MARK = "STAMPWRK"
_META = "SWMETA"
_VERSION = 1
_NOT_PLANES = ("meta", "header", "wcs")
_KEYWORD = re.compile(r"[A-Za-z0-9_-]{1,40}")  # leaves room for a number on the card
_STORED = {"bool": "uint16", "float16": "float32"}  # dtypes that FITS does not have
_NUMBERS = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
_ATOMIC_SCALES = ("utc", "tai", "tt", "tcg", "tdb", "tcb")  # ut1 would need tables from the network
_MAX_SHOWN = 1000  # elements of an array that a card spells out
_NUMPY_KINDS = "biufcSUmM"
_NO_CARD = object()


def write_cutout(cutout: Mapping[str, Any], filename: str | Path) -> None:
    """Write a cutout to a FITS file; an existing file is replaced.

    Parameters
    ----------
    cutout : dict
        Planes (2-D arrays), ``meta``, and optionally ``header`` and ``wcs``, as `get_cutout` makes it. Anything else is
        left out.
    filename : str or Path
        Path of the file.

    Raises
    ------
    ValueError
        A value of ``meta`` or the dtype of a plane cannot be stored, or two names of planes differ in case only.

    Notes
    -----
    ``meta`` keeps values and types: None, bool, int, float, str, bytes, list, tuple, dict, numpy scalars and arrays,
    masked ones too (numpy's and astropy's), Quantity, datetime and Time (except its location). A masked Time is read
    back as ``np.ma.masked``. STDPipe reads what FITS can hold, and gets infinities, NaN, times (ISO, UTC) and arrays (a
    literal) as strings. Boolean planes are stored as 16-bit integers. Header and WCS are stored with the planes, and
    are lost without planes.
    """
    planes = {name: np.asarray(p) for name, p in cutout.items() if name not in _NOT_PLANES and np.ndim(p) == 2}
    if len({name.upper() for name in planes}) < len(planes):
        raise ValueError(f"cutout: found the planes {', '.join(planes)}, wanted names that differ in more than case")
    meta = cutout.get("meta", {})
    primary = fits.PrimaryHDU()
    primary.header.extend((card for _, card in _cards(meta).values()), end=True)
    primary.header[_MARK] = (_VERSION, "stampworker's; adjust_dx is along x")
    primary.header[_META] = _to_json(meta, {name: plane.dtype.str for name, plane in planes.items()})
    header = _plane_header(cutout)
    hdus = [primary, *(fits.ImageHDU(_storable(n, p), header=header, name=n) for n, p in planes.items())]
    fits.HDUList(hdus).writeto(filename, overwrite=True, output_verify="silentfix")


def load_cutout(filename: str | Path) -> dict[str, Any]:
    """Read a cutout from a FITS file that `write_cutout` of stampworker or of STDPipe wrote.

    Parameters
    ----------
    filename : str or Path
        Path of the file.

    Returns
    -------
    cutout : dict
        As `stampworker.cutouts.get_cutout` makes it: planes in native byte order, ``header`` of the first plane if
        there is one, ``wcs`` if that header has one. From a file of STDPipe, names of metadata are lower case, ``mask``
        is boolean, and ``adjust_dx`` and ``adjust_dy`` are swapped, so that ``adjust_dx`` is always along x (columns).

    Raises
    ------
    OSError
        There is no such file, or it is not FITS.
    ValueError
        A later version of these rules wrote the file, or it is damaged.
    """
    try:
        with fits.open(filename, memmap=False) as hdus:
            return _read(hdus, filename)
    except (fits.VerifyError, KeyError, TypeError, MemoryError) as exc:
        raise ValueError(f"{filename}: is damaged: {exc}") from exc


def _read(hdus: fits.HDUList, filename: str | Path) -> dict[str, Any]:
    head = hdus[0].header
    kept, dtypes = _from_json(head, filename)
    cutout: dict[str, Any] = {"meta": _load_meta(head, kept)}
    names = {name.upper(): name for name in dtypes}
    for hdu in hdus[1:]:
        if not hdu.is_image or hdu.data is None:
            continue
        name = names.get(hdu.name.upper(), hdu.name.lower())
        cutout[name] = _restore(name, hdu.data, dtypes)
        if "header" not in cutout:
            cutout["header"] = hdu.header.copy()
    if "header" in cutout and has_wcs(cutout["header"]):
        cutout["wcs"] = WCS(cutout["header"])
    return cutout


def _plane_header(cutout: Mapping[str, Any]) -> fits.Header | None:
    header = cutout.get("header")
    if header is None:
        return None if cutout.get("wcs") is None else cutout["wcs"].to_header(relax=True)
    header = header.copy()
    for name in SCALING + CHECKSUMS:  # they describe how the original file stored its numbers
        header.remove(name, ignore_missing=True, remove_all=True)
    return header


def _storable(name: str, plane: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if plane.dtype.name in _STORED:
        return plane.astype(_STORED[plane.dtype.name])
    if plane.dtype.kind not in "iuf" or plane.dtype.itemsize > 8:
        raise ValueError(f"{name}: found {plane.dtype}, wanted a dtype that FITS has")
    return plane


def _restore(name: str, plane: np.ndarray[Any, Any], dtypes: Mapping[str, np.dtype[Any]]) -> np.ndarray[Any, Any]:
    """Undo `_storable`, in native byte order; a plane that someone stored again as another dtype keeps that dtype."""
    dtype = plane.dtype
    if name not in dtypes:
        dtype = np.dtype(bool) if name == "mask" else dtype
    elif _STORED.get(dtypes[name].name) == dtype.name:
        dtype = dtypes[name]
    return np.ascontiguousarray(plane, dtype=dtype.newbyteorder("="))


# Metadata: the cards, for people and STDPipe


def _cards(meta: Mapping[str, Any]) -> dict[str, tuple[str, fits.Card]]:
    """Return, by keyword, name and card of each value that a card can show; of names that differ in case, the first."""
    cards: dict[str, tuple[str, fits.Card]] = {}
    for name, value in meta.items():
        if not isinstance(name, str):
            raise ValueError(f"meta: found the name {name!r}, wanted a string")
        keyword = name.upper()
        if keyword not in cards and (card := _card(keyword, _plain(keyword, value))) is not None:
            cards[keyword] = name, card
    return cards


def _card(keyword: str, plain: Any) -> fits.Card | None:
    if plain is _NO_CARD or not _KEYWORD.fullmatch(keyword) or _is_reserved(keyword):
        return None
    card = fits.Card(keyword if len(keyword) <= 8 else f"HIERARCH {keyword}", plain)
    try:
        text = str(card)
    except ValueError:  # longer than a card, without a continuation
        return None
    # FITS drops blanks at the end, and astropy reads some long strings with quotes or ampersands back as other strings.
    # No string is better than a wrong one.
    return None if isinstance(plain, str) and fits.Card.fromstring(text).value != plain else card


def _is_reserved(keyword: str) -> bool:
    """Return True if a card of this name would not be metadata."""
    return keyword in (_MARK, _META) or STRUCTURE.fullmatch(keyword) is not None


def _plain(keyword: str, value: Any) -> Any:
    """Return a value as STDPipe would write it, or `_NO_CARD` if STDPipe could not read it."""
    value = _without_unit(value)
    if isinstance(value, datetime.datetime):
        utc = value if value.tzinfo is None else value.astimezone(datetime.UTC)
        return utc.replace(tzinfo=None).isoformat(timespec="microseconds")
    if isinstance(value, Time):
        return _plain_time(value)
    if isinstance(value, str):
        is_plain = value.isascii() and value.isprintable() and value not in _NUMBERS and not value.startswith("array(")
        return value if is_plain and (keyword != "TIME" or _is_time(value)) else _NO_CARD
    if keyword == "TIME":  # STDPipe converts any value of this card to a Time
        return _NO_CARD
    if value is None or value is np.ma.masked:
        return None
    if isinstance(value, int | float):
        return _plain_number(value)
    return _plain_array(value) if isinstance(value, list | tuple | np.ndarray) else _NO_CARD


def _without_unit(value: Any) -> Any:
    """Return a value without its unit and numpy's or astropy's own types of a scalar."""
    if isinstance(value, Masked):
        value = np.ma.MaskedArray(np.asarray(value.unmasked), value.mask)[()]
    if isinstance(value, Quantity):
        value = value.value
    if isinstance(value, np.generic):
        value = str(value) if value.dtype.kind in "mM" else value.item()
    return value


def _plain_number(value: float) -> Any:
    if isinstance(value, int):  # astropy cuts off the digits that a card has no room for
        return value if abs(value) < 10**20 else _NO_CARD
    return value if math.isfinite(value) else {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}[str(value)]


def _plain_time(time: Time) -> Any:
    if not time.isscalar or time.mask or time.scale not in _ATOMIC_SCALES:
        return _NO_CARD
    return Time(time.unmasked.utc, precision=9).to_value("fits")  # STDPipe reads it as UTC


def _is_time(text: str) -> bool:
    try:
        Time(text)
    except ValueError:
        return False
    return True


def _plain_array(value: Any) -> Any:
    """Write a list or an array as a literal, which STDPipe evaluates."""
    try:
        array = np.asarray(np.ma.filled(value))
    except (ValueError, TypeError):  # rows of different lengths, objects
        return _NO_CARD
    if array.dtype.kind not in "biufU" or array.size > _MAX_SHOWN:
        return _NO_CARD
    text = f"array({_literal(array.tolist())}, dtype='{array.dtype.str}')"
    return text if text.isascii() else _NO_CARD


def _literal(item: Any) -> str:
    if isinstance(item, list):
        return f"[{', '.join(map(_literal, item))}]"
    text = repr(item)
    return text.replace("inf", "np.inf").replace("nan", "np.nan") if isinstance(item, float) else text


def _load_meta(head: fits.Header, kept: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata: from the JSON, and from the cards that STDPipe wrote or someone edited."""
    written = _cards(kept)
    meta, foreign = dict(kept), set()
    for card in head.cards:
        keyword = card.keyword.upper()
        if _is_reserved(keyword):
            continue
        name, kept_card = written.get(keyword, (keyword.lower(), None))
        value = _from_plain(card)
        # Compare texts, because NaN is not equal to NaN, and True is equal to 1.
        if kept_card is None or repr(value) != repr(_from_plain(fits.Card.fromstring(str(kept_card)))):
            meta[name] = value
            foreign.add(name)
    if {"adjust_dx", "adjust_dy"} <= foreign:
        meta["adjust_dx"], meta["adjust_dy"] = meta["adjust_dy"], meta["adjust_dx"]
    return meta


def _from_plain(card: fits.Card) -> Any:
    """Undo `_plain`, as far as the form of the card allows."""
    value = card.value
    if isinstance(value, fits.card.Undefined):
        return None
    if not isinstance(value, str):
        return value
    if card.keyword == "TIME":
        return Time(value) if _is_time(value) else value
    if value.startswith("array("):
        return _read_array(value)
    return _NUMBERS.get(value, value)


def _read_array(text: str) -> Any:
    """Return the array that a text describes, without evaluating it; any other text is returned as it is."""
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and len(call.args) == 1):
            return text
        options: dict[str, Any] = {str(option.arg): _read_node(option.value) for option in call.keywords}
        shape = options.pop("shape", None)  # numpy prints it for an empty array
        array = np.array(_read_node(call.args[0]), **options)
        if array.dtype.kind not in _NUMPY_KINDS:
            return text
        return array if shape is None else array.reshape(shape)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text


def _read_node(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and node.value is not Ellipsis:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_read_node(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_read_node(node.operand)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if name in ("nan", "inf"):
        return float(name)
    if name in np.sctypeDict:  # numpy prints dtype=float32
        return name
    raise ValueError(f"found {ast.dump(node)}, wanted a number, a string or a list of them")


# Metadata: the JSON, exact


def _to_json(meta: Mapping[str, Any], dtypes: dict[str, str]) -> str:
    encoded = {}
    for name, value in meta.items():
        try:
            encoded[name] = _encode(value)
        except TypeError as exc:
            raise ValueError(f"meta: {name!r} cannot be kept: {exc}") from exc
    text = json.dumps({"meta": encoded, "planes": dtypes}, separators=(",", ":"), allow_nan=False)
    # astropy cannot read back quotes and ampersands from a string that continues over several cards, nor blanks where
    # one card ends.
    for character in "'& ":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _from_json(head: fits.Header, filename: str | Path) -> tuple[dict[str, Any], dict[str, np.dtype[Any]]]:
    """Return the metadata and the dtypes of planes from the JSON; both empty for a file of STDPipe."""
    if _MARK not in head:
        return {}, {}
    if head[_MARK] > _VERSION:
        raise ValueError(f"{filename}: found {_MARK} {head[_MARK]}, wanted at most {_VERSION}")
    try:
        document = json.loads(head[_META])
        meta = {name: _decode(value) for name, value in document["meta"].items()}
        return meta, {name: _dtype(dtype) for name, dtype in document["planes"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ValueError(f"{filename}: {_META} is damaged: {exc}") from exc


def _encode(value: Any) -> Any:
    """Return a value for JSON: as it is, or with its type as ``[type, value, ...]``."""
    if isinstance(value, np.ndarray | np.generic):
        return _encode_numpy(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else ["float", repr(value)]
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [_encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[_encode(key), _encode(item)] for key, item in value.items()]]
    if isinstance(value, datetime.datetime):
        return ["datetime", value.isoformat(), value.fold]
    if isinstance(value, Time):
        return _encode_time(value)
    raise TypeError(f"found {type(value).__name__}, wanted a number, a string, a time or a list or array of them")


def _encode_numpy(value: np.ndarray[Any, Any] | np.generic) -> Any:
    if value is np.ma.masked:
        return ["masked"]
    if isinstance(value, Masked):
        return ["Masked", _encode(value.unmasked), _encode(value.mask)]
    if isinstance(value, Quantity):
        return ["quantity", _encode(value.value), value.unit.to_string()]
    if isinstance(value, np.ma.MaskedArray):
        return ["masked array", _encode(value.data), _encode(np.ma.getmaskarray(value))]
    if isinstance(value, np.float64):
        return ["float64", repr(float(value))]
    if value.dtype.kind not in _NUMPY_KINDS:
        raise TypeError(f"found an array of {value.dtype}")
    kind = "scalar" if isinstance(value, np.generic) else "array"
    return [kind, value.dtype.str, value.shape, base64.b64encode(value.tobytes()).decode()]


def _encode_time(value: Time) -> Any:
    if np.any(value.mask):
        if value.isscalar:
            return ["masked"]
        raise TypeError("found an array of times with masked ones")
    value = value.unmasked
    return ["time", _encode(np.asarray(value.jd1)), _encode(np.asarray(value.jd2)), value.scale, value.format]


def _decode(value: Any) -> Any:
    """Undo `_encode`."""
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind not in _DECODERS:
        raise ValueError(f"found the type {kind!r}, wanted one of {', '.join(_DECODERS)}")
    return _DECODERS[kind](*parts)


def _decode_array(dtype: str, shape: list[int], text: str) -> np.ndarray[Any, Any]:
    return np.ndarray(tuple(shape), _dtype(dtype), buffer=base64.b64decode(text)).copy()


def _dtype(text: str) -> np.dtype[Any]:
    """Return a dtype without pointers: an object array made from the bytes of a file would follow them."""
    dtype = np.dtype(text)
    if dtype.kind not in _NUMPY_KINDS:
        raise ValueError(f"found the dtype {text!r}, wanted a plain one")
    return dtype


def _decode_time(jd1: Any, jd2: Any, scale: str, form: str) -> Time:
    time = Time(_decode(jd1), _decode(jd2), format="jd", scale=scale)
    time.format = form
    return time


_DECODERS: dict[str, Any] = {
    "float": float,
    "float64": np.float64,
    "scalar": lambda *parts: _decode_array(*parts)[()],
    "array": _decode_array,
    "masked": lambda: np.ma.masked,
    "masked array": lambda data, mask: np.ma.MaskedArray(_decode(data), _decode(mask)),
    "Masked": lambda data, mask: Masked(_decode(data), mask=_decode(mask)),
    "quantity": lambda data, unit: Quantity(_decode(data), unit),
    "bytes": base64.b64decode,
    "list": lambda items: [_decode(item) for item in items],
    "tuple": lambda items: tuple(_decode(item) for item in items),
    "dict": lambda items: {_decode(key): _decode(item) for key, item in items},
    "datetime": lambda text, fold: datetime.datetime.fromisoformat(text).replace(fold=fold),
    "time": _decode_time,
}
