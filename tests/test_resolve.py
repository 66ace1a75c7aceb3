"""Resolvers: the URLs that an alert's fields give, and those that they cannot give."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from helpers.night import NOISE, SHAPE, STAR, alert_record, night_header, night_planes, write_night
from hypothesis import example, given
from hypothesis import strategies as st

import stampworker
from stampworker.config import EnrichSettings, FrameSettings, ResolveSettings, Settings
from stampworker.enrich import Enricher, enrich_table
from stampworker.errors import AlertError, ConfigError, FrameError, FrameMissing, FrameRefused
from stampworker.formats.alerts import Alert, decode, encode, from_record
from stampworker.formats.packets import Packet
from stampworker.formats.rejects import Reject
from stampworker.frames import FrameStore
from stampworker.frames.store import split_fragment
from stampworker.frames.urls import parse, parse_root
from stampworker.resolve import ALERT_ONLY, LAYOUTS, Resolver, load_resolver

DATA = Path(__file__).parents[2] / "shared" / "data"
ALERT = Alert(
    "a-1",
    "obj 1",
    x=1.5,
    y=2.0,
    ra=10.25,
    dec=-3.0,
    mjd=61368.75,
    fwhm=3.5,
    extra={"night": "20261124", "visit": 4711, "ccd": 7.0, "band": "r", "deep": True, "bad": float("nan"), "empty": ""},
)
STDWEB = {
    "science": "sub_image",
    "template": "sub_template",
    "difference": "sub_diff",
    "convolved": "sub_conv",
    "error": "sub_ediff",
    "mask": "sub_mask",
}


def template(text: str, *, alert: Alert = ALERT, root: str = "") -> str:
    """Fill a template of the science plane."""
    settings = ResolveSettings(resolver="template", root=root, templates={"science": text})
    return load_resolver(settings).frames(alert)["science"]


def with_extra(**extra: Any) -> Alert:
    """Return an alert with a position and some fields."""
    return Alert("a", x=STAR[0], y=STAR[1], extra=extra)


# Templates


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("{night}/{visit}-{ccd:02d}_diff.fits.fz", "20261124/4711-07_diff.fits.fz"),
        ("{alertId}/{objectId}/{x}_{ra:.1f}_{dec:+05.1f}.fits", "a-1/obj 1/1.5_10.2_-03.0.fits"),
        ("{mjd:.1f}{mjdScale}.fits", "61368.8utc.fits"),
        ("{mjd:%Y/%m%d}/{visit:>06}.fits", "2026/1124/004711.fits"),
        ("{mjd:%Y%jT%H}{band}.fits", "2026328T18r.fits"),
        ("{{literal}}/{deep}.fits", "{literal}/True.fits"),
        ("/abs/{night}.fits#{ccd:d}", "/abs/20261124.fits#7"),
        ("{night}.fits#SCI,{ccd:d}", "20261124.fits#SCI,7"),
        ("same.fits", "same.fits"),
        ("https://h:8080/p/{objectId}.fits?n={objectId}&v={visit}#{band}", "https://h:8080/p/obj%201.fits?n=obj%201"),
        ("s3://bucket/{objectId}/{night}.fits", "s3://bucket/obj 1/20261124.fits"),
        ("abfs://container/{objectId}/{night}.fits", "abfs://container/obj 1/20261124.fits"),
        ("memory://Night/{objectId}.fits", "memory://Night/obj 1.fits"),
        ("file:///d/{objectId}.fits", "file:///d/obj%201.fits"),
    ],
)
def test_template_is_filled_from_the_alert(text: str, url: str) -> None:
    """Fields of the alert and keys of its extra fill a template, with format specifications and dates."""
    assert template(text).startswith(url)
    assert not text.startswith("https") or template(text) == url + "&v=4711#r"


@pytest.mark.parametrize(
    ("text", "root", "url"),
    [
        ("{root}/{night}.fits", "", "20261124.fits"),
        ("{root}/{night}.fits", "/", "/20261124.fits"),
        ("{root}/{night}.fits", "/data/", "/data/20261124.fits"),
        ("{root}/{night}.fits", "sub/{band}", "sub/r/20261124.fits"),
        ("{root}/{night}.fits", "https://h/p", "https://h/p/20261124.fits"),
        ("{root}/{night}.fits", "https://h", "https://h/20261124.fits"),
        ("{root}/{night}.fits", "s3://b/{objectId}/", "s3://b/obj 1/20261124.fits"),
    ],
)
def test_root_stands_before_the_template(text: str, root: str, url: str) -> None:
    """The root is a folder or a URL prefix, with or without a final slash; its fields are filled, too."""
    assert template(text, root=root) == url


@pytest.mark.parametrize(
    ("mjd", "scale", "date"),
    [
        (61368.0, "utc", "20261124"),
        (61367.99999, "utc", "20261123"),
        (61368.0, "ut1", "20261124"),
        (61368.0002, "tai", "20261123"),  # 17 s after midnight, TAI
        (61368.0005, "tai", "20261124"),
        (61368.0007, "tt", "20261123"),  # 60 s, TT
        (61368.0009, "tdb", "20261124"),
    ],
)
def test_dates_are_utc(mjd: float, scale: str, date: str) -> None:
    """A date in a name is that of the exposure in UTC, whatever the scale of mjd."""
    assert template("{mjd:%Y%m%d}.fits", alert=Alert("a", mjd=mjd, mjd_scale=scale)) == f"{date}.fits"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{nihgt}.fits",
            r"template of 'science': found no 'nihgt'; the nearest known is 'night'; there are alertId, obj",
        ),
        ("{gain}.fits", r"found no 'gain'; .*there are alertId, .*fwhm, night, visit, ccd, band"),
        ("{bad}.fits", r"found nan for \{bad\}: wanted a finite number"),
        ("{empty}.fits", r"'empty' is '', wanted text without"),
        ("{band:02d}.fits", r"found 'r' for \{band:02d\}: Unknown format code 'd'"),
        ("{x:d}.fits", r"found 1.5 for \{x:d\}: Unknown format code 'd'"),
        ("{ra:.1%}.fits", r"'ra' is '1025.0%', wanted text without # \? %"),
    ],
)
def test_what_an_alert_lacks_is_said(text: str, message: str) -> None:
    """The error names the plane, the field, the value found and the known fields."""
    with pytest.raises(AlertError, match=message):
        template(text)
    with pytest.raises(AlertError, match=r"template of 'science': found 1e\+300 for \{mjd:%Y\}"):
        template("{mjd:%Y}", alert=Alert("a", mjd=1e300))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{night", r"resolve\.templates\.science: '\{night': expected '}'"),
        ("night}", "Single '}'"),
        ("{night.real}.fits", r"found \{night\.real\}, wanted the plain name"),
        ("{extra[night]}.fits", r"found \{extra\[night\]\}, wanted the plain name"),
        ("{}.fits", r"found \{\}, wanted the plain name"),
        ("{0}.fits", r"found \{0\}, wanted the plain name"),
        ("{extra}.fits", "found {extra}, wanted one value"),
        ("{night!r}.fits", "found a conversion or a nested field"),
        ("{ccd:0{visit}d}.fits", "found a conversion or a nested field"),
        ("{visit:%Y}.fits", "a date, which only mjd is"),
        ("{mjd:%Y%Q}.fits", "found an unknown part of a date"),
        ("a/{root}/b.fits", r"wanted \{root\} at the very first"),
        ("{root}{night}.fits", r"wanted a slash after \{root\}"),
        ("{root}/../{night}.fits", r"wanted a path without the folders \. and \.\."),
        ("./{night}.fits", r"wanted a path without the folders \. and \.\."),
        ("", "wanted a path"),
        ("{root}/", "wanted a path"),
        ("ftp://h/{night}.fits", "scheme 'ftp', wanted a path or a URL: file:, http:"),
        ("https://{night}.h/x.fits", "with fields only after the host"),
        ("https:{night}", "with fields only after the host"),
        ("s3://{night}/x.fits", "with fields only after the host"),
        ("file:{night}", "with fields only after the host"),
        ("https://u:hunter2@h/{x.y}", "wanted the plain name"),
    ],
)
def test_malformed_templates_are_refused_at_start(text: str, message: str) -> None:
    """Malformed templates are refused at once, with attributes, indices and conversions; no secret is shown."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_resolver(ResolveSettings(resolver="template", templates={"science": text}))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("value", ["a#1", "a?b", "50%", "%2e%2e", "a\\b", "a\nb", "\0", "/etc", "a/", "a//b", "\x85"])
@pytest.mark.parametrize("root", ["", "/data", "https://h/p", "s3://b/p", "file:///data"])
def test_values_that_could_mean_something_else_are_refused(root: str, value: str) -> None:
    """An alert is rejected if a field has a URL's mark, a control character or an empty folder."""
    for text in ("{root}/{night}/x.fits", "{root}/x.fits#{night}", "{root}/{night}.fits"):
        with pytest.raises(AlertError, match=r"template of 'science': 'night' is .* wanted text without"):
            template(text, root=root, alert=with_extra(night=value))


@pytest.mark.parametrize(
    ("text", "value"),
    [("{n}/x.fits", ".."), ("a/{n}/x.fits", "b/../c"), ("a/.{n}", "."), ("{n}.", "."), ("{n}", "./b")],
)
def test_values_cannot_leave_their_folder(text: str, value: str) -> None:
    """A value cannot leave its folder by .. or by a dot beside one of the template."""
    for root in ("", "https://h/p/", "s3://b/"):
        with pytest.raises(AlertError, match=r"found the folder \. or \.\. in "):
            template(f"{{root}}/{text}", root=root, alert=with_extra(n=value))


@pytest.mark.parametrize("value", ["file:", "https:", "S3:x", "http:b"])
def test_values_cannot_make_a_url_of_a_path(value: str) -> None:
    """A relative template stays a path."""
    with pytest.raises(AlertError, match="wanted a path and no URL"):
        template("{n}/etc/passwd", alert=with_extra(n=value))
    assert template("d/{n}/x", alert=with_extra(n=value)) == f"d/{value}/x"


HARD = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("./\\#?%@:;&=+,~ \n\0eEfF2")), min_size=0, max_size=12
)
ROOTS = ("", "nights", "/data/nights", "https://host:8443/nights", "s3://bucket/nights", "file:///data/nights")
TWO = {
    "science": "{root}/v{a}/{b}-{c}_sci.fits#{d}",
    "difference": "{root}/v{a}/{b}-{c}_diff.fits#{d}",
    "mask": "{root}/v{a}/{b}-{c}_sci.fits#m{d}",
}
LOADED = {root: load_resolver(ResolveSettings(resolver="template", root=root, templates=TWO)) for root in ROOTS}


@given(st.sampled_from(ROOTS), HARD, HARD, HARD, HARD)
@example("https://host:8443/nights", "a", "b", "c@d:e", "SCI,2")
@example("", "/..", "..", ".", "0")
@example("", "ttp:", "x", "y", "1")
@example("s3://bucket/nights", "a/b", "é ☃", "+&=", "1")
def test_values_change_nothing_but_their_place(root: str, a: str, b: str, c: str, d: str) -> None:
    """Root, folders, file ending and HDU are the template's; each value is complete and at its position."""
    try:
        found = LOADED[root].frames(with_extra(a=a, b=b, c=c, d=d))
    except AlertError as exc:
        str(exc).encode()
        return
    assert len(set(found.values())) == len(found) == 3
    for plane, end in (("science", "_sci.fits"), ("difference", "_diff.fits"), ("mask", "_sci.fits")):
        url = found[plane]
        file, fragment = split_fragment(url)
        assert fragment == ("m" if plane == "mask" else "") + d
        wanted = f"/v{a}/{b}-{c}{end}"
        if root.startswith(("https", "file")):
            parts, before = urlsplit(url), urlsplit(root)
            assert (parts.scheme, parts.netloc, parts.query) == (before.scheme, before.netloc, "")
            path, base = unquote(parts.path), before.path
        else:
            path, base = file if root else "/" + file, root
        assert path == base + wanted
        if "://" not in root:
            assert os.path.normpath(path) == path
        elif not root.startswith("file"):
            assert_beneath(file, root)


def assert_beneath(url: str, root: str) -> None:
    """Assert that the store puts a URL beneath the root, or refuses it."""
    try:
        address = parse(url)
    except FrameRefused:
        return
    assert address.beneath(parse_root(root))


@pytest.mark.parametrize("root", ["", "{folder}", "url", "file"])
def test_odd_values_address_the_file_of_that_name(tmp_path: Path, root: str) -> None:
    """Blanks, letters of other alphabets and harmless marks name the same file by path and by URL."""
    odd = "é ☃ a+b&c=d@e:f,g;~'(1)"
    folder = tmp_path / "nights" / odd / "deep"
    write_night(folder, planes=("science",))
    prefix = {"": "", "{folder}": "{folder}", "url": "localhost", "file": "file://" + str(tmp_path / "nights")}[root]
    prefix = "file://localhost" + str(tmp_path / "nights") if root == "url" else prefix
    text = "{root}/{n}/science.fits#{hdu}" if root != "{folder}" else "{root}/deep/science.fits"
    url = template(text, root=prefix, alert=with_extra(n=f"{odd}/deep", folder=odd, hdu=0))
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path / "nights"),))) as store:
        assert store.open(url).shape == SHAPE


# What the alert names, and what the resolver gives


def test_default_is_what_the_alert_names() -> None:
    """By default the frames are those of the alert; an error without science names the resolver and no URL."""
    alert = from_record(alert_record({"science": "s", "mask": "m"}))
    assert load_resolver(ResolveSettings()) is ALERT_ONLY
    assert ALERT_ONLY.frames(alert) is alert.frames
    with pytest.raises(AlertError, match=r"^frames: found none, wanted at least science; the resolver is 'alert'$"):
        ALERT_ONLY.frames(Alert("a"))
    with pytest.raises(AlertError, match=r"^frames: found mask, wanted at least science") as caught:
        ALERT_ONLY.frames(Alert("a", frames={"mask": "http://u:pw@h/m"}))
    assert "pw" not in str(caught.value)
    with pytest.raises(AlertError, match="found both error and variance, wanted one; the resolver is 'alert'"):
        ALERT_ONLY.frames(Alert("a", frames={"science": "s", "error": "e", "variance": "v"}))


def test_the_alert_wins_plane_by_plane() -> None:
    """The resolver adds the planes that the alert does not name, but no variance to an error."""
    resolver = load_resolver(ResolveSettings(resolver="stdweb", root="task"))
    resolved = {plane: f"task/{name}.fits" for plane, name in STDWEB.items()}
    assert resolver.frames(Alert("a")) == resolved
    for own in ({"mask": "m.fits"}, {"science": "s", "error": "e"}, {"template": "t"}):
        assert resolver.frames(Alert("a", frames=own)) == resolved | own
    resolved.pop("error")
    assert resolver.frames(Alert("a", frames={"variance": "v"})) == resolved | {"variance": "v"}


def test_fields_are_wanted_only_where_a_plane_is() -> None:
    """An alert that names a plane may lack the fields of that plane's template."""
    templates = {"science": "{night}.fits", "error": "{nothing}.fits"}
    resolver = load_resolver(ResolveSettings(resolver="template", templates=templates))
    for own in ({"error": "e"}, {"variance": "v"}):
        assert resolver.frames(Alert("a", extra={"night": "n"}, frames=own)) == {"science": "n.fits"} | own
    named = {"science": "s", "difference": "d", "template": "t"}
    assert load_resolver(ResolveSettings(resolver="ztf")).frames(Alert("a", frames=named)) == named


def test_planes_are_chosen() -> None:
    """The settings choose a subset of a layout's planes, and add planes by templates."""
    some = load_resolver(ResolveSettings(resolver="stdweb", planes=("science", "mask")))
    assert some.frames(Alert("a")) == {"science": "sub_image.fits", "mask": "sub_mask.fits"}
    settings = ResolveSettings(resolver="stdweb", templates={"mask": "{root}/mask.fits", "variance": "v.fits"})
    with pytest.raises(AlertError, match="found both error and variance, wanted one; the resolver is 'stdweb'"):
        load_resolver(settings).frames(Alert("a"))
    changed = settings.model_copy(update={"planes": ("science", "variance", "mask")})
    wanted = {"science": "sub_image.fits", "variance": "v.fits", "mask": "mask.fits"}
    assert load_resolver(changed).frames(Alert("a")) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolver": "sdtweb"}, "no resolver is called 'sdtweb'; the nearest known is 'stdweb'; there are alert, "),
        (
            {"resolver": "stdweb", "planes": ["variance"]},
            "the resolver 'stdweb' has no template of 'variance'; it has sc",
        ),
        ({"resolver": "template"}, "resolve.templates: found none, wanted some"),
        (
            {"resolver": "template", "planes": ["mask"]},
            "no template of 'mask'; it has none, and resolve.templates gives",
        ),
        ({"templates": {"science": "s"}}, "the resolver 'alert' uses none, wanted resolve.resolver = 'template'"),
        (
            {"resolver": "template", "root": "/d", "templates": {"mask": "m"}},
            "resolve.root: set, and no template begins",
        ),
        ({"resolver": "stdweb", "root": "https://h/?a=b"}, "resolve.root: found a query or a fragment"),
        ({"resolver": "stdweb", "root": "a/../b"}, r"wanted a path without the folders \. and \.\."),
    ],
)
def test_settings_that_do_not_serve(settings: dict[str, Any], message: str) -> None:
    """Wrong settings are an error when the resolver is loaded, before any alert."""
    with pytest.raises(ConfigError, match=message):
        load_resolver(ResolveSettings(**settings))


def test_a_frame_of_each_layout_has_a_plane_of_ours() -> None:
    """Layouts name known planes and can be loaded."""
    for name, layout in LAYOUTS.items():
        assert set(layout.planes) <= set(layout.templates)
        if layout.templates:
            load_resolver(ResolveSettings(resolver=name, planes=tuple(layout.templates)))


# From alerts to packets


def run(alerts: list[Alert], root: Path, **sections: Any) -> list[Packet | Reject]:
    """Make packets of alerts with frames beneath a root."""
    settings = Settings(**{"enrich": EnrichSettings(radius=9)} | sections)
    with FrameStore(FrameSettings(frame_roots=(str(root),))) as store:
        return Enricher(settings, store).packets(alerts)


def test_packets_of_resolved_frames(tmp_path: Path) -> None:
    """Packets have the resolved URLs and the ids of their alerts; each frame is opened once."""
    named = write_night(tmp_path / "n1" / "d")
    write_night(tmp_path / "n2" / "d", seed=8)
    resolve = ResolveSettings(
        resolver="template", templates={p: f"{{root}}/{{n}}/d/{p}.fits" for p in ("science", "difference", "mask")}
    )
    alerts = [Alert(f"a{i}", x=STAR[0], y=STAR[1], extra={"n": f"n{1 + i % 2}"}) for i in range(4)]
    alerts.append(Alert("lost", x=1.0, y=1.0))
    alerts.append(Alert("late", x=1.0, y=1.0, extra={"n": "n3"}))
    alerts.append(Alert("own", x=STAR[0], y=STAR[1], frames={p: named[p] for p in ("science", "difference", "mask")}))
    made = run(alerts, tmp_path, resolve=resolve)
    assert [type(r) for r in made] == [Packet] * 4 + [Reject] * 2 + [Packet]
    assert [r.alert_id for r in made] == [a.alert_id for a in alerts]
    for alert, packet in zip(alerts, made, strict=True):
        if isinstance(packet, Packet):
            assert packet.packet_id == alert.packet_id() == decode(encode(alert)).packet_id()
            night = alert.extra.get("n", "n1")
            assert packet.frames["difference"] == f"file://{tmp_path}/{night}/d/difference.fits"
    own, resolved = made[6], made[0]
    assert isinstance(own, Packet)
    assert isinstance(resolved, Packet)
    assert own.frames == resolved.frames
    assert own.metrics == resolved.metrics
    lost, late = made[4], made[5]
    assert isinstance(lost, Reject)
    assert (lost.stage, type(lost.error)) == ("frames", AlertError)
    assert isinstance(late, Reject)
    assert (late.stage, type(late.error)) == ("frames", FrameMissing)


def test_frame_roots_hold_for_resolved_frames(tmp_path: Path) -> None:
    """A resolver does not widen what may be read."""
    write_night(tmp_path / "secret", planes=("science",))
    (tmp_path / "open").mkdir()
    resolve = ResolveSettings(
        resolver="template", root=str(tmp_path / "secret"), templates={"science": "{root}/{n}.fits"}
    )
    (made,) = run([with_extra(n="science")], tmp_path / "open", resolve=resolve)
    assert isinstance(made, Reject)
    assert type(made.error) is FrameRefused


def test_a_resolver_that_fails_costs_the_alert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any exception of a resolver is a reject; other than AlertError and FrameError it is logged with its traceback."""
    write_night(tmp_path, planes=("science",))
    answers: dict[str, Any] = {
        "good": {"science": "science.fits"},
        "alert": AlertError("no such visit"),
        "frame": FrameMissing("butler:4711", "not there yet"),
        "fault": KeyError("visit"),
        "list": ["science.fits"],
        "plane": {"science": "science.fits", "diffrence": "d"},
        "path": {"science": Path("science.fits")},
        "empty": {"science": ""},
        "bytes": {"science": os.fsdecode(b"\xe9.fits")},
        "none": {},
        "both": {"science": "science.fits", "error": "e", "variance": "v"},
    }

    def find(alert: Alert) -> Any:
        answer = answers[alert.alert_id]
        if isinstance(answer, Exception):
            raise answer
        return answer

    alerts = [Alert(name, x=1.0, y=1.0) for name in answers]
    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),))) as store, caplog.at_level(logging.WARNING):
        made = Enricher(Settings(), store, Resolver("mine", find)).packets(alerts)
    assert isinstance(made[0], Packet)
    problems = {r.alert_id: str(r.error) for r in made if isinstance(r, Reject) and r.stage == "frames"}
    assert problems == {
        "alert": "no such visit",
        "frame": "butler:4711: not there yet",
        "fault": "'visit'",
        "list": "frames: found list, wanted a map of plane to URL; the resolver is 'mine'",
        "plane": "frames: no plane is called 'diffrence'; the nearest known is 'difference'; the resolver is 'mine'",
        "path": "frames.science: found PosixPath, wanted a URL or path; the resolver is 'mine'",
        "empty": "frames.science: found '', wanted a URL or path; the resolver is 'mine'",
        "bytes": "frames.science: found '\\udce9.fits', wanted a URL or path; the resolver is 'mine'",
        "none": "frames: found none, wanted at least science; the resolver is 'mine'",
        "both": "frames: found both error and variance, wanted one; the resolver is 'mine'",
    }
    (record,) = caplog.records
    assert record.getMessage() == "alert fault: unexpected error of the resolver 'mine'"
    assert record.exc_info is not None


def test_exception_that_is_its_own_cause_is_a_reject(tmp_path: Path) -> None:
    """A resolver may raise an exception from itself; the alert is rejected like any other."""

    def find(alert: Alert) -> Any:
        try:
            raise OSError("no butler")
        except OSError as exc:
            raise exc from exc

    with FrameStore(FrameSettings(frame_roots=(str(tmp_path),))) as store:
        (made,) = Enricher(Settings(), store, Resolver("mine", find)).packets([Alert("a", x=1.0, y=1.0)])
    assert isinstance(made, Reject)
    assert str(made.error) == "no butler"


def test_table_of_candidates_by_a_resolver(tmp_path: Path) -> None:
    """In Python, too, a table needs no frames if a resolver finds them; given frames have priority."""
    for plane, path in write_night(tmp_path / "task").items():
        if plane in STDWEB:
            Path(path).rename(tmp_path / "task" / f"{STDWEB[plane]}.fits")
    table = Table({"x": [STAR[0]], "y": [STAR[1]]})
    settings = Settings(
        resolve=ResolveSettings(resolver="stdweb"), frames=FrameSettings(frame_roots=(str(tmp_path / "task"),))
    )
    _, (packet,) = enrich_table(table, radius=5, settings=settings)
    assert isinstance(packet, Packet)
    assert packet.frames == {plane: f"file://{tmp_path}/task/{name}.fits" for plane, name in STDWEB.items()}
    assert (packet.convolved_origin, packet.err_origin, packet.adjust_status) == ("frame", "error", "ok")
    other = write_night(tmp_path / "other", planes=("mask",))["mask"]
    _, (packet,) = enrich_table(table, {"mask": other}, 5, settings=settings)
    assert isinstance(packet, Packet)
    assert packet.frames["mask"] == f"file://{other}"
    with pytest.raises(FrameMissing, match=r"typo\.fits"):
        enrich_table(table, {"mask": tmp_path / "typo.fits"}, 5, settings=settings)
    with pytest.raises(AlertError, match="frames: found none, wanted at least science, or a resolver"):
        enrich_table(table)


# STDWeb and ZTF


@pytest.mark.skipif(not DATA.is_dir(), reason="no real frames beside the checkout")
@pytest.mark.parametrize("epoch", ["e0046", "e0124"])
def test_real_frames_in_an_stdweb_folder(tmp_path: Path, epoch: str) -> None:
    """The packets of a task's folder equal those of the same frames named one by one."""
    source = DATA / "saao_kb13475" / epoch
    names = {"error": "err"}
    for plane, name in STDWEB.items():
        (tmp_path / f"{name}.fits").symlink_to(source / f"{names.get(plane, plane)}.fits")
    table = Table.read(source / "candidates.ecsv")[:8]
    settings = Settings(
        resolve=ResolveSettings(resolver="stdweb"), frames=FrameSettings(frame_roots=(str(tmp_path), str(source)))
    )
    found, made = enrich_table(table, radius=15, settings=settings)
    named, wanted = enrich_table(table, {p: source / f"{names.get(p, p)}.fits" for p in STDWEB}, radius=15)
    assert set(found["adjust_status"]) <= {"ok", "at_bound"}
    for one, other in zip(made, wanted, strict=True):
        assert isinstance(one, Packet)
        assert isinstance(other, Packet)
        # The position comes from the sky, and agrees with the pixels to a hundredth of a micropixel.
        assert set(one.metrics) == set(other.metrics)
        for name, value in other.metrics.items():
            assert one.metrics[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), name
        assert {p: s.content for p, s in one.stamps.items()} == {p: s.content for p, s in other.stamps.items()}
    assert list(found["adjust_artefact"]) == list(named["adjust_artefact"])


def test_candidates_of_other_parts_of_an_stdweb_task(tmp_path: Path) -> None:
    """For an image in parts, whose frames are the last part's, ra, dec give the position; x, y only without them."""
    planes, header = night_planes(), night_header("SIP")
    part = header.copy()
    part["CRPIX1"] -= 30  # the last part begins at column 30
    for plane, name in STDWEB.items():
        data = planes[plane][:, 30:]
        hdu = fits.CompImageHDU(data.astype("u1"), part) if plane == "mask" else fits.PrimaryHDU(data, part)
        hdu.writeto(tmp_path / f"{name}.fits")  # as STDWeb: the mask is compressed
    ra, dec = (float(v) for v in WCS(header).all_pix2world(*STAR, 0))
    far_ra, far_dec = (float(v) for v in WCS(header).all_pix2world(3.0, 30.0, 0))
    alerts = [
        Alert("this", x=STAR[0] - 30, y=STAR[1], ra=ra, dec=dec),
        Alert("other", x=20.0, y=30.0, ra=far_ra, dec=far_dec),
        Alert("both", x=STAR[0], y=STAR[1], ra=ra, dec=dec),
        Alert("pixels", x=STAR[0] - 30, y=STAR[1]),
    ]
    made = run(alerts, tmp_path, resolve=ResolveSettings(resolver="stdweb"))
    found = {r.alert_id: r for r in made if isinstance(r, Packet)}
    assert {name: packet.adjust_status for name, packet in found.items()} == {
        **dict.fromkeys(("this", "both", "pixels"), "ok"),
        "other": "off_frame",
    }
    for name in ("this", "both", "pixels"):
        place = found[name].candidate["x"], found[name].candidate["y"]
        assert place == pytest.approx((STAR[0] - 30, STAR[1]), abs=1e-5)
        assert found[name].metrics["adjust_dx"] == pytest.approx(0.3, abs=0.02)
    bare = planes["science"][:, 30:]
    fits.writeto(tmp_path / "sub_image.fits", bare, overwrite=True)
    (packet,) = run(alerts[:1], tmp_path, resolve=ResolveSettings(resolver="stdweb", planes=("science",)))
    assert isinstance(packet, Packet)
    assert packet.candidate["x"] == STAR[0] - 30
    nowhere = Alert("nowhere", x=1.0, y=1.0, ra=ra + 170, dec=-dec)
    fits.writeto(tmp_path / "sub_image.fits", bare, part, overwrite=True)
    (lost,) = run([nowhere], tmp_path, resolve=ResolveSettings(resolver="stdweb", planes=("science",)))
    assert isinstance(lost, Reject)
    assert f"position: found ra {ra + 170}, dec {-dec}, wanted one that" in str(lost.error)


ZTF_NAME = "ztf_20181129252836_000346_zg_c10_o_q2_scimrefdiffimg.fits"
ZTF_PATHS = {
    "science": "sci/2018/1129/252836/ztf_20181129252836_000346_zg_c10_o_q2_sciimg.fits",
    "template": "ref/000/field000346/zg/ccd10/q2/ztf_000346_zg_c10_q2_refimg.fits",
    "difference": "sci/2018/1129/252836/ztf_20181129252836_000346_zg_c10_o_q2_scimrefdiffimg.fits.fz",
    "mask": "sci/2018/1129/252836/ztf_20181129252836_000346_zg_c10_o_q2_mskimg.fits",
}


@pytest.mark.parametrize("name", [ZTF_NAME, ZTF_NAME + ".fz", "/ztf/archive/sci/2018/1129/252836/" + ZTF_NAME])
def test_ztf_archive(name: str) -> None:
    """The name of the difference image gives the URLs of science frame and reference, and of the mask on demand."""
    alert = with_extra(pdiffimfilename=name)
    found = load_resolver(ResolveSettings(resolver="ztf", root="https://irsa.example/ztf/products/")).frames(alert)
    assert found == {
        p: f"https://irsa.example/ztf/products/{ZTF_PATHS[p]}" for p in ("science", "template", "difference")
    }
    assert load_resolver(ResolveSettings(resolver="ztf", planes=tuple(ZTF_PATHS))).frames(alert) == ZTF_PATHS


@pytest.mark.parametrize(
    "name",
    [
        None,
        5,
        "",
        ZTF_NAME + "\n",
        "x" + ZTF_NAME,
        ZTF_NAME.replace("2018", "\u0662018"),
        ZTF_NAME.replace("_q2", "_q5"),
        ZTF_NAME.replace("zg", "zz"),
        ZTF_NAME.replace("scimrefdiffimg", "sciimg"),
        "/ztf/../" + "ztf_..",
    ],
)
def test_names_that_are_not_ztfs(name: Any) -> None:
    """The error shows the name found and the form wanted."""
    alert = with_extra() if name is None else with_extra(pdiffimfilename=name)
    with pytest.raises(AlertError, match=r"extra\.pdiffimfilename: found .*, wanted ztf_<yyyymmddffffff>_<field>_"):
        load_resolver(ResolveSettings(resolver="ztf")).frames(alert)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real alerts beside the checkout")
def test_real_ztf_alerts_resolve() -> None:
    """Each real alert gives a URL in the archive's form, in the folder of its field."""
    resolver = load_resolver(ResolveSettings(resolver="ztf", planes=tuple(ZTF_PATHS)))
    paths = sorted((DATA / "ztf_alerts").glob("*.avro"))
    assert len(paths) == 120
    for path in paths:
        with path.open("rb") as file:
            record: Any = next(fastavro.reader(file))
        candidate = record["candidate"]
        name = candidate["pdiffimfilename"]
        found = resolver.frames(with_extra(pdiffimfilename=name))
        # rcid counts quadrants from 0, four a CCD.
        ccd, quadrant = candidate["rcid"] // 4 + 1, candidate["rcid"] % 4 + 1
        band = {1: "zg", 2: "zr", 3: "zi"}[candidate["fid"]]
        folder, _, file_name = found["difference"].rpartition("/")
        assert file_name == name + ".fz"
        assert folder == f"sci/{name[4:8]}/{name[8:12]}/{name[12:18]}"
        # The fraction of the day is the start of the exposure, as is jd.
        assert abs(candidate["jd"] - 0.5 - int(candidate["jd"] - 0.5) - int(name[12:18]) / 1e6) < 1e-3
        reference = f"field{candidate['field']:06d}/{band}/ccd{ccd:02d}/q{quadrant}"
        stem = f"ztf_{candidate['field']:06d}_{band}_c{ccd:02d}_q{quadrant}_refimg.fits"
        assert found["template"] == f"ref/{candidate['field']:06d}"[:7] + f"/{reference}/{stem}"
        assert found["science"] == f"{folder}/{name.replace('scimrefdiffimg', 'sciimg')}"
        assert found["mask"] == f"{folder}/{name.replace('scimrefdiffimg', 'mskimg')}"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return a folder like ZTF's archive: compressed difference, reference on its own grid, mask with sources."""
    planes = night_planes()
    for path in ZTF_PATHS.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    fits.writeto(tmp_path / ZTF_PATHS["science"], planes["science"], night_header("TPV"))
    compressed = fits.CompImageHDU(planes["difference"], night_header("TPV"))
    fits.HDUList([fits.PrimaryHDU(), compressed]).writeto(tmp_path / ZTF_PATHS["difference"])
    header = night_header("TPV")
    header["CRPIX1"], header["CRPIX2"] = header["CRPIX1"] + 20.3, header["CRPIX2"] + 11.6
    fits.writeto(tmp_path / ZTF_PATHS["template"], np.full((90, 130), 7, np.float32), header)
    mask = np.zeros(SHAPE, np.int16)
    x, y = (round(v) for v in STAR)
    mask[y - 4 : y + 5, x - 4 : x + 5] = 2 | 2048  # a source was detected here
    mask[y + 2, x + 3] |= 256  # and is saturated there
    fits.writeto(tmp_path / ZTF_PATHS["mask"], mask, night_header("TPV"))
    return tmp_path


def test_ztf_archive_through_the_chain(archive: Path) -> None:
    """The name of the difference image alone gives a packet with a fit; the reference is resampled onto the grid."""
    alert = with_extra(pdiffimfilename=ZTF_NAME)
    (packet,) = run([alert], archive, resolve=ResolveSettings(resolver="ztf"))
    assert isinstance(packet, Packet), packet
    assert packet.frames == {p: f"file://{archive}/{ZTF_PATHS[p]}" for p in ("science", "template", "difference")}
    assert (packet.adjust_status, packet.resampled_planes) == ("ok", ("template",))
    assert packet.metrics["adjust_dx"] == pytest.approx(0.3, abs=0.02)


def test_ztf_masks_with_bits_to_ignore(archive: Path) -> None:
    """Ignored mask bits keep no pixel out of the fit; the mask's stamp still has them."""
    alert = with_extra(pdiffimfilename=ZTF_NAME)
    resolve = ResolveSettings(resolver="ztf", planes=tuple(ZTF_PATHS))

    def made(ignore: int) -> Packet:
        (packet,) = run([alert], archive, resolve=resolve, enrich=EnrichSettings(radius=9, mask_ignore_flags=ignore))
        assert isinstance(packet, Packet), packet
        return packet

    assert made(0).adjust_status == "too_few_pixels"
    packet, every = made(2050), made(2050 | 256)
    assert packet.adjust_status == every.adjust_status == "ok"
    assert packet.metrics["adjust_dx"] == pytest.approx(0.3, abs=0.02)
    # One bad pixel also removes its neighbours in the template.
    assert packet.metrics["adjust_df"] < every.metrics["adjust_df"] == 7**2 - 3
    assert packet.stamps["mask"].content == made(0).stamps["mask"].content
    assert {0, 2050, 2306} == set(np.unique(packet.stamps["mask"].data))


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "i8"])
def test_bits_are_ignored_in_masks_of_every_type(tmp_path: Path, kind: str) -> None:
    """A mask of any integer type whose bits are all ignored gives the noise and fit without a mask."""
    frames = write_night(tmp_path, planes=("science", "difference"))
    mask = np.zeros(SHAPE, kind)
    mask[25:37, 36:47], mask[:, 60:] = 64, 1
    fits.writeto(tmp_path / "mask.fits", mask)
    alerts = [Alert("a", x=x, y=STAR[1], gain=1.5, frames=frames) for x in (STAR[0], 2.0)]
    masked = [Alert("a", x=a.x, y=a.y, gain=1.5, frames=frames | {"mask": str(tmp_path / "mask.fits")}) for a in alerts]
    bare = run(alerts, tmp_path)
    ignored = run(masked, tmp_path, enrich=EnrichSettings(radius=9, mask_ignore_flags=65))
    for one, other in zip(bare, ignored, strict=True):
        assert isinstance(one, Packet)
        assert isinstance(other, Packet)
        assert one.adjust_status == other.adjust_status == ("ok" if one.candidate["x"] == STAR[0] else "no_signal")
        assert one.metrics == other.metrics
        assert one.stamps["error"].content == other.stamps["error"].content
    kept = run(masked, tmp_path)[0]
    assert isinstance(kept, Packet)
    assert kept.adjust_status == "too_few_pixels"
    assert NOISE * 0.8 < np.nanmedian(kept.stamps["error"].data) < NOISE * 1.3


# Other packages


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, name: str = "mysurvey", points: str = "") -> None:
    """Write a package as pip installs it, and add its folder to the path of this process."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = points or f"{name} = {name}:make_resolver"
    (info / "entry_points.txt").write_text(f"[stampworker.resolvers]\n{points}\n")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


CODE = """
from stampworker import AlertError

def make_resolver(settings):
    def resolve(alert):
        if "visit" not in alert.extra:
            raise AlertError("extra: found no 'visit'")
        folder = f"{settings.root}/{alert.extra['visit']}"
        return {plane: f"{folder}/{plane}.fits" for plane in ("science", "difference", "mask")}
    return resolve
"""


def test_resolver_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver of an installed package is made once from the settings, which choose among its planes."""
    install(tmp_path / "site", monkeypatch, CODE)
    resolver = load_resolver(ResolveSettings(resolver="mysurvey", root="/data", planes=("science", "mask")))
    assert resolver.frames(with_extra(visit=3)) == {"science": "/data/3/science.fits", "mask": "/data/3/mask.fits"}
    with pytest.raises(AlertError, match="found no 'visit'"):
        resolver.frames(with_extra())
    with pytest.raises(
        ConfigError, match=r"nearest known is 'mysurvey'; there are alert, mysurvey, stdweb, template, zt"
    ):
        load_resolver(ResolveSettings(resolver="mysuvrey"))


@pytest.mark.slow
def test_resolver_of_another_package_in_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command finds the resolver of an installed package."""
    install(tmp_path / "site", monkeypatch, CODE)
    write_night(tmp_path / "night" / "4711", planes=("science", "difference", "mask"))
    record = {"alertId": "a", "x": STAR[0], "y": STAR[1], "extra": {"visit": 4711}}
    (tmp_path / "night" / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"extra": {}}))
    command = [sys.executable, "-m", "stampworker", "enrich", str(tmp_path / "night" / "a.jsonl"), "--json"]
    command += ["--to", str(tmp_path / "out"), "--resolver", "mysurvey", "--resolver-root", str(tmp_path / "night")]
    paths = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"alerts": 2, "packets": 1, "rejects": 1, "errors": {"AlertError": 1}}
    (reject,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["message"] == "extra: found no 'visit'"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import absent_module",
            r"'mysurvey' \(mysurvey:make_resolver\) cannot be loaded: ModuleNotFoundError: No mod",
        ),
        ("", "cannot be loaded: AttributeError"),
        ("def make_resolver(settings): raise OSError('no butler')", "cannot be loaded: OSError: no butler"),
        ("def make_resolver(settings): return None", "gave NoneType, wanted a function of an alert"),
        ("make_resolver = 5", "cannot be loaded: TypeError"),
        (
            "import stampworker\ndef make_resolver(settings): raise stampworker.ConfigError('root: found none')",
            "^root: found none$",
        ),
    ],
)
def test_resolver_of_another_package_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    """Any exception of the factory is a ConfigError that names the package's object."""
    install(tmp_path, monkeypatch, code)
    with pytest.raises(ConfigError, match=message):
        load_resolver(ResolveSettings(resolver="mysurvey"))


def test_two_packages_with_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages with a resolver of the same name are an error; a built-in resolver is never replaced."""
    install(tmp_path / "one", monkeypatch, CODE, "one", "mine = one:make_resolver\nztf = one:make_resolver")
    install(tmp_path / "two", monkeypatch, CODE, "two", "mine = two:make_resolver")
    with pytest.raises(ConfigError, match="several packages call theirs 'mine': one:make_resolver, two:make_resolver"):
        load_resolver(ResolveSettings(resolver="mine"))
    assert "science" in load_resolver(ResolveSettings(resolver="ztf")).frames(with_extra(pdiffimfilename=ZTF_NAME))


def test_public_names() -> None:
    """A resolver can be made from a function in Python."""
    assert stampworker.Resolver is Resolver
    assert stampworker.load_resolver is load_resolver
    assert issubclass(FrameMissing, FrameError)
