"""Resolvers: from an alert to the URLs of the frames that it does not name.

A resolver is a function from an alert to a mapping of planes to URLs. What the alert names itself wins, plane by plane;
an error that it names stands against a variance that is resolved, and the other way round. What may be read stays
`frame_roots`' business.

Most archives need no code, but *templates*, one a plane, in the syntax of `str.format`::

    {root}/{mjd:%Y%m%d}/{visit}-{ccd:02d}_diff.fits.fz#1

``root`` is the setting, everything else a field of the alert by its name in the schema, or of its ``extra``. A date's
specification makes the UTC date of ``mjd``. What a field holds never changes what is addressed but where it stands: it
cannot leave its folder, begin a query or name an HDU; an alert whose field tries to is rejected. Slashes inside stay.

A package adds a resolver by an entry point of the group ``stampworker.resolvers``, whose name is what the setting
``resolve.resolver`` then takes::

    [project.entry-points."stampworker.resolvers"]
    mysurvey = "mysurvey.frames:make_resolver"

It is called once, at start, with the `ResolveSettings`, and gives the resolver::

    def make_resolver(settings):
        def resolve(alert):
            if "visit" not in alert.extra:
                raise AlertError("extra: found no 'visit', wanted the number of the exposure")
            return {"science": f"{settings.root}/{alert.extra['visit']}.fits"}

        return resolve

An AlertError or FrameError of it rejects the alert; so does any other exception, which is logged with its traceback.
A ConfigError of the factory stops the worker before it reads anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from importlib.metadata import entry_points
from string import Formatter
from typing import Any
from urllib.parse import quote

from astropy.time import Time

from stampworker.config import ResolveSettings, nearest
from stampworker.errors import AlertError, ConfigError, shown
from stampworker.formats.alerts import FIELDS, Alert, Scalar, check_frames, check_urls
from stampworker.frames.urls import REMOTE, WEB, scheme_of, without_credentials

GROUP = "stampworker.resolvers"
"""Entry points of other packages' resolvers."""

Find = Callable[[Alert], Mapping[str, str]]
"""A resolver: alert → plane → URL or path, with an optional ``#HDU``."""

_NOISE = {"error": "variance", "variance": "error"}
# Of a URL, what must stand before the first field.
_FIXED = re.compile(r"file:(//(localhost)?)?/|[a-z][a-z0-9]*://[^/?#]+/", re.IGNORECASE)
_DATE = re.compile(r"%[A-Za-z]")
_MJD_0 = datetime(1858, 11, 17)  # UTC, as every date here
# In a value: what has a meaning in a path or URL, or none in a file's name; and what makes an empty folder.
_REFUSED = re.compile(r"[\x00-\x1f\x7f-\x9f\\#?%\ud800-\udfff]|^/|/$|//|^$")
_ZTF_NAME = re.compile(
    r"(?:.*/)?ztf_(?P<exposure>(?P<year>[0-9]{4})(?P<monthday>[0-9]{4})(?P<fraction>[0-9]{6}))"
    r"_(?P<field>(?P<fieldprefix>[0-9]{3})[0-9]{3})_(?P<filter>z[gri])_c(?P<ccd>[0-9]{2})_o_q(?P<quadrant>[1-4])"
    r"_scimrefdiffimg\.fits(?:\.fz)?"
)
_ZTF_EXPOSURE = (
    "{root}/sci/{year}/{monthday}/{fraction}/ztf_{exposure}_{field}_{filter}_c{ccd}_o_q{quadrant}_"  # one quadrant's
)
_ZTF_REFERENCE = (
    "{root}/ref/{fieldprefix}/field{field}/{filter}/ccd{ccd}/q{quadrant}/"
    "ztf_{field}_{filter}_c{ccd}_q{quadrant}_refimg.fits"
)


def _nothing(_alert: Alert) -> dict[str, str]:
    return {}


def _ztf_fields(alert: Alert) -> Mapping[str, str]:
    """Take the name of ZTF's difference image apart."""
    name = alert.extra.get("pdiffimfilename")
    match = _ZTF_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        wanted = "ztf_<yyyymmddffffff>_<field>_<filter>_c<ccd>_o_q<quadrant>_scimrefdiffimg.fits"
        raise AlertError(f"extra.pdiffimfilename: found {shown(name)}, wanted {wanted}")
    return match.groupdict()


@dataclass(frozen=True)
class Layout:
    """How an archive lays out its frames.

    Attributes
    ----------
    templates : mapping
        Plane → template.
    planes : tuple of str
        Those that are taken where the settings name none.
    derive : callable, optional
        From an alert to fields that templates may use besides the alert's own, over which they stand.
    by_sky : bool
        See `Resolver`.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    planes: tuple[str, ...] = ()
    derive: Callable[[Alert], Mapping[str, Scalar]] | None = None
    by_sky: bool = False


LAYOUTS = {
    "template": Layout(),
    # The reference is a co-add on its own grid. Bits 1 and 11 of mskimg mark detected sources (ZTF Science Data System
    # Explanatory Supplement): to use it, name it among the planes and set enrich.mask_ignore_flags to 2050, their sum.
    "ztf": Layout(
        {
            "science": _ZTF_EXPOSURE + "sciimg.fits",
            "template": _ZTF_REFERENCE,
            "difference": _ZTF_EXPOSURE + "scimrefdiffimg.fits.fz",
            "mask": _ZTF_EXPOSURE + "mskimg.fits",
        },
        ("science", "template", "difference"),
        _ztf_fields,
    ),
    # Of an image that STDWeb splits (above its sub_size) the folder keeps the last part only, and x, y of a candidate
    # are those on its own part: only ra, dec say where it lies. Its ZOGY leaves neither sub_conv nor sub_ediff.
    "stdweb": Layout(
        {
            "science": "{root}/sub_image.fits",
            "template": "{root}/sub_template.fits",
            "difference": "{root}/sub_diff.fits",
            "convolved": "{root}/sub_conv.fits",
            "error": "{root}/sub_ediff.fits",
            "mask": "{root}/sub_mask.fits",
        },
        ("science", "template", "difference", "convolved", "error", "mask"),
        by_sky=True,
    ),
}
"""The layouts that are built in, by the resolver's name."""


@dataclass(frozen=True)
class Resolver:
    """Gives the frames of alerts, made by `load_resolver`, or of a function of one's own.

    Attributes
    ----------
    name : str
        For messages.
    find : callable
        From an alert to a mapping of planes to URLs; it may leave out what the alert names.
    planes : tuple of str
        Those that are taken of what it finds; by default all.
    by_sky : bool
        Whether a candidate's ``ra, dec`` stand over its ``x, y``, which are not those on the science frame.
    """

    name: str
    find: Find
    planes: tuple[str, ...] = ()
    by_sky: bool = False

    def frames(self, alert: Alert) -> Mapping[str, str]:
        """Return the URLs of all frames of an alert: those that it names, and those that are found.

        Parameters
        ----------
        alert : Alert

        Returns
        -------
        frames : mapping
            Plane → URL or path; ``science`` is among them.

        Raises
        ------
        AlertError
            The alert lacks what is needed to find them, or they are not frames of an alert.
        """
        found = self.find(alert) or {}
        try:
            check_urls(found)
            taken = [plane for plane in self.planes or found if plane in found and not _is_named(plane, alert.frames)]
            frames = {**alert.frames, **{plane: found[plane] for plane in taken}} if taken else alert.frames
            if "science" not in frames:
                # Not the values: a URL may hold credentials.
                raise AlertError(f"frames: found {', '.join(frames) or 'none'}, wanted at least science")
            check_frames(frames)
        except AlertError as exc:
            raise AlertError(f"{exc}; the resolver is {self.name!r}") from None
        return frames


ALERT_ONLY = Resolver("alert", _nothing)
"""The default: frames are what the alert names."""


def load_resolver(settings: ResolveSettings) -> Resolver:
    """Make the resolver that the settings name.

    Parameters
    ----------
    settings : ResolveSettings

    Returns
    -------
    resolver : Resolver

    Raises
    ------
    ConfigError
        There is no such resolver, or it cannot be loaded; a template is malformed; or a plane has none.
    """
    if settings.resolver == ALERT_ONLY.name:
        if settings.templates:
            raise ConfigError("resolve.templates: the resolver 'alert' uses none, wanted resolve.resolver = 'template'")
        return ALERT_ONLY
    layout = LAYOUTS.get(settings.resolver)
    if layout is None:
        return Resolver(settings.resolver, _installed(settings), settings.planes)
    return Resolver(settings.resolver, _layout(layout, settings), settings.planes, layout.by_sky)


def _is_named(plane: str, named: Mapping[str, str]) -> bool:
    """Tell whether an alert names a plane, or the other form of the same noise."""
    return plane in named or _NOISE.get(plane) in named


def _layout(layout: Layout, settings: ResolveSettings) -> Find:
    texts = {**layout.templates, **settings.templates}
    planes = settings.planes or (*layout.planes, *settings.templates)
    for plane in planes:
        if plane not in texts:
            raise ConfigError(
                f"resolve.planes: the resolver {settings.resolver!r} has no template of {plane!r}; "
                f"it has {', '.join(texts) or 'none, and resolve.templates gives none'}"
            )
    if not planes:
        raise ConfigError(
            'resolve.templates: found none, wanted some, such as { science = "{root}/{visit}.fits" }, '
            f"for the resolver {settings.resolver!r}"
        )
    made = [_Template(plane, texts[plane], settings.root) for plane in dict.fromkeys(planes)]
    if settings.root and not any(texts[template.plane].startswith("{root}") for template in made):
        raise ConfigError("resolve.root: set, and no template begins with {root}/")

    def find(alert: Alert) -> dict[str, str]:
        wanted = [template for template in made if not _is_named(template.plane, alert.frames)]
        if not wanted:
            return {}
        fields = layout.derive(alert) if layout.derive else {}
        return {template.plane: template.fill(alert, fields) for template in wanted}

    return find


def _installed(settings: ResolveSettings) -> Find:
    """Make the resolver of an entry point."""
    name = settings.resolver
    points = list(entry_points(group=GROUP))
    chosen = {point.value: point for point in points if point.name == name}
    if not chosen:
        known = sorted({ALERT_ONLY.name, *LAYOUTS, *(point.name for point in points)})
        raise ConfigError(
            f"resolve.resolver: no resolver is called {name!r}{nearest(name, known)}; there are {', '.join(known)}"
        )
    if len(chosen) > 1:
        raise ConfigError(f"resolve.resolver: several packages call theirs {name!r}: {', '.join(sorted(chosen))}")
    (point,) = chosen.values()
    try:
        find: object = point.load()(settings)
    except ConfigError:
        raise
    except Exception as exc:  # of others' code
        problem = f"{type(exc).__name__}: {exc}"
        raise ConfigError(f"resolve.resolver: {name!r} ({point.value}) cannot be loaded: {problem}") from exc
    if not callable(find):
        raise ConfigError(
            f"resolve.resolver: {name!r} ({point.value}) gave {type(find).__name__}, wanted a function of an alert"
        )
    return find


@dataclass(frozen=True, slots=True)
class _Hole:
    """A place in a template that a field fills."""

    name: str
    spec: str


class _Template:
    """A template of one plane, checked and taken apart.

    Parameters
    ----------
    plane : str
    text : str
        As in the settings.
    root : str
        What ``{root}`` stands for.

    Raises
    ------
    ConfigError
        It is malformed.
    """

    def __init__(self, plane: str, text: str, root: str) -> None:
        self.plane = plane
        self._where = f"template of {plane!r}"
        full = self._with_root(text, root)
        try:
            parsed = list(Formatter().parse(full))
        except ValueError as exc:
            raise self._malformed(full, str(exc)) from None
        scheme = self._scheme(parsed[0][0] if parsed else "", full)
        self._is_path = scheme is None
        self._is_encoded = scheme == "file" or scheme in WEB  # a key is not
        self._path: list[str | _Hole] = []
        self._fragment: list[str | _Hole] = []
        into = self._path
        for literal, name, spec, conversion in parsed:
            before, mark, after = literal.partition("#")
            into.append(before)
            if mark:
                into = self._fragment
                into.append(mark + after)
            if name is not None:
                self._check(full, name, spec or "", conversion)
                into.append(_Hole(name, spec or ""))
        sample = "".join(piece if isinstance(piece, str) else "x" for piece in self._path)
        if not sample.strip("/") or not {".", ".."}.isdisjoint(sample.split("/")):
            raise self._malformed(full, "wanted a path without the folders . and ..")

    def fill(self, alert: Alert, fields: Mapping[str, Scalar]) -> str:
        """Return the URL of an alert's frame."""
        path = "".join([p if isinstance(p, str) else self._value(p, alert, fields) for p in self._path])
        fragment = "".join([p if isinstance(p, str) else self._value(p, alert, fields) for p in self._fragment])
        if ("/." in path or path[:1] == ".") and not {".", ".."}.isdisjoint(path.split("/")):
            problem = "found the folder . or .. in {}, wanted names"
        elif self._is_path and scheme_of(path) is not None:
            problem = "found {}, wanted a path and no URL"
        else:
            return path + fragment
        raise AlertError(f"{self._where}: {problem.format(shown(without_credentials(path)))}")

    def _with_root(self, text: str, root: str) -> str:
        """Put the root in, so that its own fields are filled like the others."""
        if not text.startswith("{root}"):
            return text
        rest = text.removeprefix("{root}")
        if not rest.startswith("/"):
            raise self._malformed(text, "wanted a slash after {root}")
        if "?" in root or "#" in root:
            raise ConfigError("resolve.root: found a query or a fragment, wanted a folder or URL prefix")
        return root.rstrip("/") + rest if root else rest.lstrip("/")

    def _scheme(self, start: str, full: str) -> str | None:
        """Return the scheme of a URL, None of a path; of a URL, no field may stand before the path."""
        scheme = scheme_of(start)
        if scheme not in (None, "file", *REMOTE):
            raise self._malformed(full, f"scheme {scheme!r}, wanted a path or a URL: file:, {':, '.join(REMOTE)}:")
        if scheme is not None and not _FIXED.match(start):
            raise self._malformed(full, "wanted scheme://host/path, with fields only after the host")
        return scheme

    def _check(self, full: str, name: str, spec: str, conversion: str | None) -> None:
        if name == "root":
            raise self._malformed(full, "wanted {root} at the very first")
        if not name or name.isdigit() or not {".", "["}.isdisjoint(name):
            raise self._malformed(full, f"found {{{name}}}, wanted the plain name of a field")
        if name in ("extra", "frames"):
            raise self._malformed(full, f"found {{{name}}}, wanted one value; the keys of extra stand by themselves")
        if conversion or "{" in spec:
            raise self._malformed(full, f"{{{name}}}: found a conversion or a nested field, wanted {{{name}:spec}}")
        if _DATE.search(spec):
            if name != "mjd":
                raise self._malformed(full, f"{{{name}:{spec}}}: a date, which only mjd is")
            if _REFUSED.search(format(_MJD_0, spec)):
                raise self._malformed(full, f"{{{name}:{spec}}}: found an unknown part of a date")

    def _malformed(self, text: str, problem: str) -> ConfigError:
        return ConfigError(f"resolve.templates.{self.plane}: {without_credentials(text)!r}: {problem}")

    def _value(self, hole: _Hole, alert: Alert, fields: Mapping[str, Scalar]) -> str:
        """Return what fills a hole."""
        name, spec = hole.name, hole.spec
        value = fields[name] if name in fields else _field(alert, name)
        if value is None:
            raise AlertError(f"{self._where}: found no {name!r}{_what_there_is(name, alert, fields)}")
        try:
            text = _formatted(value, spec, alert)
        except (ValueError, TypeError, OverflowError) as exc:
            found = f"{shown(value)} for {{{name}{':' * bool(spec)}{spec}}}"
            raise AlertError(f"{self._where}: found {found}: {exc}") from None
        if _REFUSED.search(text):
            raise AlertError(
                f"{self._where}: {name!r} is {shown(text)}, wanted text without # ? % \\, control characters "
                "and empty folders"
            )
        return quote(text) if self._is_encoded else text


def _field(alert: Alert, name: str) -> Any:
    attribute = FIELDS.get(name)
    return alert.extra.get(name) if attribute is None else getattr(alert, attribute)


def _formatted(value: Scalar, spec: str, alert: Alert) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("wanted a finite number")
        if _DATE.search(spec):
            return format(_date(value, alert.mjd_scale), spec)
        if spec.endswith("d") and value.is_integer():
            value = int(value)  # many writers have no integers beside missing values
    return format(value, spec)


@lru_cache(maxsize=1024)  # the alerts of an exposure share it
def _date(mjd: float, scale: str) -> datetime:
    # UT1, which only measurements tell from UTC, is within a second of it.
    utc = mjd if scale in ("utc", "ut1") else float(Time(mjd, format="mjd", scale=scale).utc.mjd)
    return _MJD_0 + timedelta(days=utc)


def _what_there_is(name: str, alert: Alert, fields: Mapping[str, Scalar]) -> str:
    own = [known for known in FIELDS if known not in ("extra", "frames") and _field(alert, known) is not None]
    known = [*fields, *own, *(key for key in alert.extra if key not in FIELDS)]
    return f"{nearest(name, known)}; there are {', '.join(known)[:300]}"
