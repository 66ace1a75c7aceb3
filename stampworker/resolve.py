"""Resolvers: from an alert to the URLs of the frames that it does not name.

A resolver is a function from an alert to a mapping of planes to URLs. A frame that the alert names has priority, plane
by plane; ``error`` and ``variance`` count as one plane. The setting `frame_roots` still decides what may be read.

Most archives need no code: one *template* of a URL per plane (science, difference, ...) is enough, written in the
syntax of `str.format`::

    {root}/{mjd:%Y%m%d}/{visit}-{ccd:02d}_diff.fits.fz#1

``root`` is the setting; every other name is a field of the alert, as in its schema, or a key of its ``extra``. A date
format gives the UTC date of ``mjd``. The value of a field may have slashes, but it cannot leave its folder, begin a
query or name an HDU: an alert with such a value is rejected.

A package adds a resolver by an entry point of the group ``stampworker.resolvers``. Its name is a value of the setting
``resolve.resolver``::

    [project.entry-points."stampworker.resolvers"]
    mysurvey = "mysurvey.frames:make_resolver"

The entry point is a function that is called once, at the start, with the `ResolveSettings`. It returns the resolver::

    def make_resolver(settings):
        def resolve(alert):
            if "visit" not in alert.extra:
                raise AlertError("extra: found no 'visit', wanted the number of the exposure")
            return {"science": f"{settings.root}/{alert.extra['visit']}.fits"}

        return resolve

If the resolver raises an exception, the alert is rejected. The traceback is logged too, except for AlertError and
FrameError. A ConfigError of ``make_resolver`` stops the worker before it reads anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from importlib.metadata import entry_points
from string import Formatter
from typing import Any, NamedTuple
from urllib.parse import quote

from astropy.time import Time

from stampworker.config import ResolveSettings, nearest
from stampworker.errors import AlertError, ConfigError, shown
from stampworker.formats.alerts import FIELDS, Alert, Scalar, check_frames, check_urls
from stampworker.frames.urls import REMOTE, WEB, scheme_of, without_credentials

GROUP = "stampworker.resolvers"
"""Group of the entry points of other packages' resolvers."""

Find = Callable[[Alert], Mapping[str, str]]
"""A resolver: alert → plane → URL or path, with an optional ``#HDU``."""

_NOISE = {"error": "variance", "variance": "error"}
# The part of a URL that must come before the first field.
_FIXED = re.compile(r"file:(//(localhost)?)?/|[a-z][a-z0-9]*://[^/?#]+/", re.IGNORECASE)
_DOTS = re.compile(r"(^|/)\.\.?(/|\Z)")
_DATE = re.compile(r"%[A-Za-z]")
_MJD_0 = datetime(1858, 11, 17)  # UTC, like every date in this module
# Refused in a value: characters with a meaning in a path or URL, or without one in a file's name; and empty folders.
_REFUSED = re.compile(r"[\x00-\x1f\x7f-\x9f\\#?%\ud800-\udfff]|^/|/$|//|^$")
_ZTF_NAME = re.compile(
    r"(?:.*/)?ztf_(?P<exposure>(?P<year>[0-9]{4})(?P<monthday>[0-9]{4})(?P<fraction>[0-9]{6}))"
    r"_(?P<field>(?P<fieldprefix>[0-9]{3})[0-9]{3})_(?P<filter>z[gri])_c(?P<ccd>[0-9]{2})_o_q(?P<quadrant>[1-4])"
    r"_scimrefdiffimg\.fits(?:\.fz)?"
)
_ZTF_EXPOSURE = "{root}/sci/{year}/{monthday}/{fraction}/ztf_{exposure}_{field}_{filter}_c{ccd}_o_q{quadrant}_"
_ZTF_REFERENCE = (
    "{root}/ref/{fieldprefix}/field{field}/{filter}/ccd{ccd}/q{quadrant}/"
    "ztf_{field}_{filter}_c{ccd}_q{quadrant}_refimg.fits"
)


def _ztf_fields(alert: Alert) -> Mapping[str, str]:
    """Return the parts of the name of ZTF's difference image."""
    name = alert.extra.get("pdiffimfilename")
    match = _ZTF_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        wanted = "ztf_<yyyymmddffffff>_<field>_<filter>_c<ccd>_o_q<quadrant>_scimrefdiffimg.fits"
        raise AlertError(f"extra.pdiffimfilename: found {shown(name)}, wanted {wanted}")
    return match.groupdict()


class Layout(NamedTuple):
    """The layout of an archive's frames."""

    templates: Mapping[str, str]  # of each plane
    planes: tuple[str, ...] = ()  # those that are used if the settings name none
    # From an alert to more fields for the templates. They replace fields of the alert with the same name.
    derive: Callable[[Alert], Mapping[str, Scalar]] = lambda _alert: {}
    by_sky: bool = False  # see `Resolver`


LAYOUTS = {
    "template": Layout({}),
    # The reference is a co-add on its own grid. Bits 1 and 11 of mskimg mark detected sources (ZTF Science Data System
    # Explanatory Supplement). To use the mask, add it to resolve.planes and set enrich.mask_ignore_flags to 2050, the
    # sum of the two.
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
    # STDWeb splits an image above its sub_size and keeps only the last part in the folder. A candidate's x, y are those
    # on its own part, so only ra, dec give its position. STDWeb's ZOGY writes neither sub_conv nor sub_ediff.
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
"""Resolver → its built-in layout."""


@dataclass(frozen=True)
class Resolver:
    """Finds the frames of alerts. `load_resolver` makes one from the settings; a function of your own makes another.

    Attributes
    ----------
    name : str
        The resolver's name, for messages.
    find : callable
        From an alert to a mapping of planes to URLs. It may leave out the planes that the alert names.
    planes : tuple of str
        The planes that are taken from the result of ``find``; by default all.
    by_sky : bool
        Whether a candidate's ``ra, dec`` give its position, because its ``x, y`` are not on the science frame.
    """

    name: str
    find: Find
    planes: tuple[str, ...] = ()
    by_sky: bool = False

    def frames(self, alert: Alert) -> Mapping[str, str]:
        """Return the URLs of all frames of an alert: those that it names and those that the resolver finds.

        Parameters
        ----------
        alert : Alert
            The alert, with or without frames.

        Returns
        -------
        frames : mapping
            Plane → URL or path, at least of ``science``.

        Raises
        ------
        AlertError
            The alert lacks a field that the resolver needs, or the frames are wrong: no science frame, an unknown
            plane, or both ``error`` and ``variance``.
        """
        found = self.find(alert) or {}
        try:
            check_urls(found)
            taken = [plane for plane in self.planes or found if plane in found and not _is_named(plane, alert.frames)]
            frames = {**alert.frames, **{plane: found[plane] for plane in taken}} if taken else alert.frames
            if "science" not in frames:
                # The message has no URLs: they may have credentials.
                raise AlertError(f"frames: found {', '.join(frames) or 'none'}, wanted at least science")
            check_frames(frames)
        except AlertError as exc:
            raise AlertError(f"{exc}; the resolver is {self.name!r}") from None
        return frames


ALERT_ONLY = Resolver("alert", lambda _alert: {})
"""The default: it finds no frames, so the alert must name them."""


def load_resolver(settings: ResolveSettings) -> Resolver:
    """Make the resolver that the settings name.

    Parameters
    ----------
    settings : ResolveSettings
        Name of the resolver, planes, templates and root.

    Returns
    -------
    resolver : Resolver
        The resolver with its planes.

    Raises
    ------
    ConfigError
        The resolver does not exist or cannot be loaded, a template is malformed, or a plane has none.
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
    """Return True if an alert names a plane; ``error`` and ``variance`` are two forms of the same plane."""
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
        fields = layout.derive(alert) if wanted else {}
        return {template.plane: template.fill(alert, fields) for template in wanted}

    return find


def _installed(settings: ResolveSettings) -> Find:
    """Make the resolver of another package's entry point."""
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
    except Exception as exc:  # another package may raise anything
        problem = f"{type(exc).__name__}: {exc}"
        raise ConfigError(f"resolve.resolver: {name!r} ({point.value}) cannot be loaded: {problem}") from exc
    if not callable(find):
        raise ConfigError(
            f"resolve.resolver: {name!r} ({point.value}) gave {type(find).__name__}, wanted a function of an alert"
        )
    return find


class _Template:
    """A parsed template of one plane; ConfigError if it is malformed."""

    def __init__(self, plane: str, text: str, root: str) -> None:
        self.plane = plane
        full = self._with_root(text, root)
        try:
            parsed = list(Formatter().parse(full))
        except ValueError as exc:
            raise self._malformed(full, str(exc)) from None
        scheme = self._scheme(parsed[0][0] if parsed else "", full)
        self._is_path = scheme is None
        self._is_encoded = scheme == "file" or scheme in WEB  # a bucket's key is not
        self._pieces: list[tuple[str, str | None, str]] = []  # text, and the field after it with its specification
        for literal, name, spec, conversion in parsed:
            if name is not None:
                self._check(full, name, spec or "", conversion)
            self._pieces.append((literal, name, spec or ""))
        sample = "".join(literal if name is None else f"{literal}x" for literal, name, _ in self._pieces)
        path = sample.partition("#")[0]
        if not path.strip("/") or _DOTS.search(path):
            raise self._malformed(full, "wanted a path without the folders . and ..")

    def fill(self, alert: Alert, fields: Mapping[str, Scalar]) -> str:
        """Return the URL of an alert's frame."""
        url = "".join(
            [
                literal if name is None else literal + self._value(name, spec, alert, fields)
                for literal, name, spec in self._pieces
            ]
        )
        path = url.partition("#")[0]  # a value has no #, so it is the template's
        if _DOTS.search(path):
            problem = "found the folder . or .. in {}, wanted names"
        elif self._is_path and scheme_of(path) is not None:
            problem = "found {}, wanted a path and no URL"
        else:
            return url
        raise self._wrong(problem.format(shown(without_credentials(path))))

    def _with_root(self, text: str, root: str) -> str:
        """Insert the root; its fields become fields of the template."""
        if not text.startswith("{root}"):
            return text
        rest = text.removeprefix("{root}")
        if not rest.startswith("/"):
            raise self._malformed(text, "wanted a slash after {root}")
        if "?" in root or "#" in root:
            raise ConfigError("resolve.root: found a query or a fragment, wanted a folder or URL prefix")
        return root.rstrip("/") + rest if root else rest.lstrip("/")

    def _scheme(self, start: str, full: str) -> str | None:
        """Return the scheme of a URL, None for a path. In a URL, fields are allowed only after the host."""
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
            raise self._malformed(full, f"found {{{name}}}, wanted one value; write a key of extra alone")
        if conversion or "{" in spec:
            raise self._malformed(full, f"{{{name}}}: found a conversion or a nested field, wanted {{{name}:spec}}")
        if _DATE.search(spec):
            if name != "mjd":
                raise self._malformed(full, f"{{{name}:{spec}}}: a date, which only mjd is")
            if _REFUSED.search(format(_MJD_0, spec)):
                raise self._malformed(full, f"{{{name}:{spec}}}: found an unknown part of a date")

    def _malformed(self, text: str, problem: str) -> ConfigError:
        return ConfigError(f"resolve.templates.{self.plane}: {without_credentials(text)!r}: {problem}")

    def _wrong(self, problem: str) -> AlertError:
        return AlertError(f"template of {self.plane!r}: {problem}")

    def _value(self, name: str, spec: str, alert: Alert, fields: Mapping[str, Scalar]) -> str:
        """Return the text that replaces a field."""
        value = fields[name] if name in fields else _field(alert, name)
        if value is None:
            raise self._wrong(f"found no {name!r}{_what_there_is(name, alert, fields)}")
        try:
            text = _formatted(value, spec, alert)
        except (ValueError, TypeError, OverflowError) as exc:
            found = f"{shown(value)} for {{{name}{':' * bool(spec)}{spec}}}"
            raise self._wrong(f"found {found}: {exc}") from None
        if _REFUSED.search(text):
            wanted = "text without # ? % \\, control characters and empty folders"
            raise self._wrong(f"{name!r} is {shown(text)}, wanted {wanted}")
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
            value = int(value)  # many tables turn integers into floats if some are missing
    return format(value, spec)


@lru_cache(maxsize=1024)  # all alerts of an exposure have the same date
def _date(mjd: float, scale: str) -> datetime:
    # UT1 is within a second of UTC; the exact difference is measured, not computed.
    utc = mjd if scale in ("utc", "ut1") else float(Time(mjd, format="mjd", scale=scale).utc.mjd)
    return _MJD_0 + timedelta(days=utc)


def _what_there_is(name: str, alert: Alert, fields: Mapping[str, Scalar]) -> str:
    own = [known for known in FIELDS if known not in ("extra", "frames") and _field(alert, known) is not None]
    known = [*fields, *own, *(key for key in alert.extra if key not in FIELDS)]
    return f"{nearest(name, known)}; there are {', '.join(known)[:300]}"
