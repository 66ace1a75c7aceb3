"""The command line without Kafka: files to files, settings, exit codes."""

import io
import json
import os
import subprocess
import sys

import fastavro
import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import MaskedColumn, QTable, Table
from astropy.time import Time
from helpers.night import NOISE, STAR, alert_record, night_planes, write_night

import stampworker
from stampworker.cli import main
from stampworker.cutouts import load_cutout
from stampworker.formats.alerts import encode as encode_alert
from stampworker.formats.alerts import from_record
from stampworker.formats.packets import METRICS, Packet
from stampworker.formats.packets import encode as encode_packet
from stampworker.formats.schema import ALERT, parsed_schema

PLANES = ("science", "template", "difference", "mask")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Remove the user's settings from the environment."""
    for name in os.environ:
        if name.startswith("STAMPWORKER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def night(tmp_path):
    """Return a folder with frames; the alerts of a test go beside them."""
    write_night(tmp_path / "night", planes=PLANES)
    return tmp_path / "night"


def alerts(count=3, **fields):
    """Return records of alerts that name frames beside them."""
    frames = {plane: f"{plane}.fits" for plane in PLANES}
    return [alert_record(frames, alertId=f"a{n}", x=STAR[0] + n, **fields) for n in range(count)]


def lines(path):
    """Return the objects of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def enrich(*arguments):
    """Run the command in this process and return its exit code."""
    return main(["enrich", *map(str, arguments), "--radius", "5"])


def packets(folder):
    """Return the packets of a folder by alert."""
    found = [Packet.read_file(path) for path in sorted(folder.glob("*.avro"))]
    assert [f"{packet.packet_id}.avro" for packet in found] == sorted(path.name for path in folder.glob("*.avro"))
    return {packet.alert_id: packet for packet in found}


# Alert files


@pytest.mark.parametrize("form", ["object", "list", "lines", "container"])
def test_alert_files_of_every_form(night, tmp_path, capsys, form):
    """Each candidate gives a packet, named by its packet id; frames are beside the alert file by default."""
    path, records = night / "alerts", alerts(1 if form == "object" else 3)
    if form == "container":
        out = io.BytesIO()
        fastavro.writer(out, parsed_schema(*ALERT), [from_record(record).to_record() for record in records])
        path.write_bytes(out.getvalue())
    else:
        text = (
            "\n".join(map(json.dumps, records))
            if form == "lines"
            else json.dumps(records if form == "list" else records[0])
        )
        path.write_text(text)
    assert enrich(path, "--to", tmp_path / "out") == 0
    found = packets(tmp_path / "out")
    assert set(found) == {record["alertId"] for record in records}
    assert all(
        packet.packet_id == from_record(r).packet_id()
        for packet, r in zip(map(found.get, sorted(found)), records, strict=True)
    )
    assert found["a0"].stamps["science"].data.shape == (11, 11)
    assert lines(tmp_path / "out" / "rejects.jsonl") == []
    assert (
        capsys.readouterr().out == f"{len(records)} alerts, {len(records)} packets, 0 rejects in {tmp_path / 'out'}\n"
    )


def test_each_alert_leaves_as_packet_or_reject(night, tmp_path, capsys):
    """A reject is a line of rejects.jsonl, its reason is printed, and the exit code is 0."""
    good = alerts(1)[0]
    records = [
        good,
        good | {"alertId": "typo", "frames": {"science": "scince.fits"}},
        good | {"alertId": "outside", "frames": {"science": "../../etc/passwd"}},
        good | {"alertId": "wide", "fwhm": -1},
        good | {"alertId": "é ☃", "frames": {"science": "☃.fits"}},
        {"alertId": 5},
    ]
    (night / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{broken\n")
    assert enrich(night / "a.jsonl", "--to", tmp_path / "out") == 0
    assert set(packets(tmp_path / "out")) == {"a0"}
    rejects = lines(tmp_path / "out" / "rejects.jsonl")
    assert all(list(line) == ["alertId", "stage", "error", "message"] for line in rejects)
    assert [(r["alertId"], r["stage"], r["error"]) for r in rejects] == [
        ("typo", "frames", "FrameMissing"),
        ("outside", "frames", "FrameRefused"),
        ("wide", "decode", "AlertError"),
        ("é ☃", "frames", "FrameMissing"),
        (None, "decode", "AlertError"),
        (None, "decode", "AlertError"),
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("7 alerts, 1 packets, 6 rejects in ")
    assert "3 AlertError, such as: alert 'wide': fwhm: found -1, wanted a number above 0" in out[1]
    assert "scince.fits: no such file" in out[2]


def test_names_that_are_not_utf8_can_be_rejected(night, tmp_path):
    """A missing frame whose name is not UTF-8 is rejected like any other."""
    record = alerts(1)[0] | {"frames": {"science": "file:///%FF%FE.fits"}}
    (night / "a.json").write_text(json.dumps(record))
    assert enrich(night / "a.json", "--to", tmp_path / "out", "--frame-root", "/") == 0
    (reject,) = lines(tmp_path / "out" / "rejects.jsonl")
    assert reject["error"] in ("FrameMissing", "FrameRefused")


def test_json_output(night, tmp_path, capsys):
    """With --json the counts are an object, and nothing else is on standard output."""
    (night / "a.json").write_text(json.dumps([*alerts(2), alerts(1, fwhm=-1)[0]]))
    assert enrich(night / "a.json", "--to", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"alerts": 3, "packets": 2, "rejects": 1, "errors": {"AlertError": 1}}


def test_no_alerts_is_done(night, tmp_path, capsys):
    """An empty list is no error, and still a table."""
    (night / "a.json").write_text("[]")
    assert enrich(night / "a.json", "--to", tmp_path / "out", "--table", tmp_path / "t.ecsv") == 0
    assert "0 alerts" in capsys.readouterr().out
    assert len(Table.read(tmp_path / "t.ecsv")) == 0


def test_relative_frames_lie_beside_their_own_alert_file(tmp_path):
    """Alert files in two folders name frames beside them, and neither can read the other's folder."""
    for seed, name in ((1, "one"), (2, "two")):
        write_night(tmp_path / name, planes=PLANES, seed=seed)
        record = alerts(1)[0] | {"alertId": name}
        (tmp_path / name / "a.json").write_text(json.dumps(record))
    sly = alerts(1)[0] | {"alertId": "sly", "frames": {"science": str(tmp_path / "one" / "science.fits")}}
    (tmp_path / "two" / "b.json").write_text(json.dumps(sly))
    files = [tmp_path / "one" / "a.json", tmp_path / "two" / "a.json", tmp_path / "two" / "b.json"]
    assert enrich(*files, "--to", tmp_path / "out", "--table", tmp_path / "t.csv") == 0
    found = packets(tmp_path / "out")
    for name in ("one", "two"):
        assert found[name].frames["science"] == f"file://{tmp_path / name / 'science.fits'}"
    assert not np.array_equal(found["one"].stamps["science"].data, found["two"].stamps["science"].data)
    assert [line["error"] for line in lines(tmp_path / "out" / "rejects.jsonl")] == ["FrameRefused"]
    table = Table.read(tmp_path / "t.csv")
    assert list(table["alertId"]) == ["one", "two", "sly"]


def test_frame_root(night, tmp_path, capsys):
    """--frame-root replaces the alert file's folder and is repeatable; relative paths start at the first."""
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "a.json"
    absolute = alerts(1)[0] | {"alertId": "abs", "frames": {"science": str(night / "science.fits")}}
    path.write_text(json.dumps([alerts(1)[0], absolute]))
    assert enrich(path, "--to", tmp_path / "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["errors"] == {"FrameMissing": 1, "FrameRefused": 1}
    roots = ("--frame-root", night, "--frame-root", tmp_path / "elsewhere")
    assert enrich(path, "--to", tmp_path / "out", *roots, "--json") == 0
    assert json.loads(capsys.readouterr().out)["packets"] == 2
    assert enrich(path, "--to", tmp_path / "swapped", *roots[2:], *roots[:2], "--json") == 0
    assert json.loads(capsys.readouterr().out)["packets"] == 1


def test_cutouts(night, tmp_path):
    """--cutouts writes the file of write_cutout beside each packet."""
    (night / "a.json").write_text(json.dumps(alerts(2, extra={"snr": 7.5, "name": "one"})))
    assert enrich(night / "a.json", "--to", tmp_path / "out", "--cutouts") == 0
    for packet in packets(tmp_path / "out").values():
        cutout = load_cutout(tmp_path / "out" / f"{packet.packet_id}.fits")
        assert np.array_equal(cutout["image"], packet.stamps["science"].data)
        assert np.array_equal(cutout["adjusted"], packet.stamps["adjusted"].data)
        assert cutout["meta"] == packet.to_cutout()["meta"]
        assert cutout["meta"]["snr"] == 7.5


def test_folder_must_be_empty_or_absent(night, tmp_path, capsys):
    """A file, and a folder that is not empty, are refused without a change; an empty folder is used."""
    (night / "a.json").write_text(json.dumps(alerts(1)))
    before = sorted(night.iterdir())
    for name in (night, night / "a.json"):
        assert enrich(night / "a.json", "--to", name) == 2
        assert "is there and not empty, wanted a folder that is empty or absent" in capsys.readouterr().err
    assert sorted(night.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert enrich(night / "a.json", "--to", tmp_path / "empty") == 0
    assert enrich(night / "a.json", "--to", tmp_path / "deep" / "er") == 0
    assert enrich(night / "a.json", "--to", tmp_path / "empty") == 2


@pytest.mark.parametrize("content", [None, b"no alerts", b"Obj\x01"])
def test_alert_file_that_cannot_be_read(tmp_path, capsys, content):
    """A missing file, or one of no known form, ends the command before anything is written."""
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert enrich(tmp_path / "a.json", "--to", tmp_path / "out") == 1
    assert "stampworker: AlertError: " in (err := capsys.readouterr().err)
    assert "a.json: " in err
    assert not (tmp_path / "out").exists()


# Tables of candidates

FORMATS = {"ecsv": "ascii.ecsv", "vot": "votable", "fits": "fits", "csv": "ascii.csv"}


def candidates(**columns):
    """Return a table: on the star, without a position, off the frame, and beside the star."""
    places = {"x": [STAR[0], np.nan, -99.0, 40.0], "y": [STAR[1], 3.0, 3.0, 30.0]}
    return Table(
        {"id": ["p", "q", "r", "s"], **places, "mag": MaskedColumn([20.0, 21, 22, 23], mask=[0, 0, 0, 1])} | columns
    )


def flags(night, *planes):
    """Return the flags that name frames."""
    return [part for plane in ("science", *planes) for part in (f"--{plane}", night / f"{plane}.fits")]


@pytest.mark.parametrize("form", FORMATS)
def test_tables_in_and_out(night, tmp_path, form):
    """Each row of a table in any format gives a packet or a reject, and a row of a table in any format."""
    path = tmp_path / f"c.{form}"
    candidates().write(path, format=FORMATS[form])
    result = tmp_path / f"t.{form.upper() if form == 'csv' else form}"
    assert enrich(path, *flags(night, "difference", "mask"), "--to", tmp_path / "out", "--table", result) == 0
    found = packets(tmp_path / "out")
    assert set(found) == {"p", "r", "s"}
    assert [line["alertId"] for line in lines(tmp_path / "out" / "rejects.jsonl")] == ["q"]
    table = Table.read(result, format=FORMATS[form])
    assert table.colnames[:4] == ["id", "x", "y", "mag"]
    assert [str(value) for value in table["alertId"]] == ["p", "q", "r", "s"]
    assert str(table["packetId"][0]) == found["p"].packet_id
    assert str(table["reject"][1]).startswith("AlertError: alert 'q': ")
    assert str(table["adjust_status"][2]) == "off_frame"
    assert float(table["adjust_dx"][0]) == found["p"].metrics["adjust_dx"]
    assert int(table["adjust_df"][0]) == found["p"].metrics["adjust_df"]
    assert str(table["adjust_artefact"][0]) == "True"
    for name in ("adjust_dx", "adjust_chi2", "adjust_df", "mag"):
        masked = np.ma.getmaskarray(np.ma.asarray(table[name])) | np.isnan(
            np.ma.filled(table[name].astype(float), np.nan)
        )
        assert list(masked) == ([False, False, False, True] if name == "mag" else [False, True, True, False]), name


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_tables_without_one_fit(night, tmp_path, form):
    """Empty columns and a table of rejects alone can be written in every format."""
    for name, rows in (("packets", candidates()[2:3]), ("rejects", candidates()[1:2])):
        rows.write(tmp_path / f"{name}.ecsv")
        out = tmp_path / f"{name}.{form}.out.{form}"
        assert enrich(tmp_path / f"{name}.ecsv", *flags(night), "--to", tmp_path / f"{name}.d", "--table", out) == 0
        table = Table.read(out, format=FORMATS[form])
        assert len(table) == 1
        assert set(METRICS) <= set(table.colnames)


def test_columns_origin_and_units(night, tmp_path, capsys):
    """Positions come from columns of other names, 1-based, or from the sky in any unit."""
    pixels = Table({"NUMBER": [7], "X_IMAGE": [STAR[0] + 1], "Y_IMAGE": [STAR[1] + 1]})
    pixels.write(tmp_path / "sex.csv")
    named = ("--columns", "x=X_IMAGE, y=Y_IMAGE,id=NUMBER", "--pixel-origin", "1")
    assert enrich(tmp_path / "sex.csv", *flags(night), *named, "--to", tmp_path / "one") == 0
    first = packets(tmp_path / "one")["7"]
    assert (first.candidate["x"], first.candidate["y"]) == pytest.approx(STAR)
    ra, dec = first.stamps["science"].wcs.all_pix2world(STAR[0] - 36, STAR[1] - 26, 0)
    sky = QTable({"ra": [float(ra)] * u.deg, "dec": [float(dec)] * u.deg})
    sky["ra"] = sky["ra"].to(u.hourangle)
    sky.write(tmp_path / "sky.ecsv")
    assert enrich(tmp_path / "sky.ecsv", *flags(night), "--to", tmp_path / "two") == 0
    second = packets(tmp_path / "two")["sky.ecsv-0"]
    assert (second.candidate["x"], second.candidate["y"]) == pytest.approx(STAR, abs=1e-5)
    capsys.readouterr()
    for wrong, message, code in (
        ("x=X_IMGE,y=Y_IMAGE", "found no column 'X_IMGE' for 'x'; the nearest known is 'X_IMAGE'", 1),
        ("X_IMAGE", "--columns: found 'X_IMAGE', wanted name=COLUMN", 2),
        ("", "found the columns NUMBER, X_IMAGE, Y_IMAGE; wanted x, y or ra, dec", 1),
    ):
        assert enrich(tmp_path / "sex.csv", *flags(night), "--columns", wrong, "--to", tmp_path / "no") == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_frames_of_flags_are_relative_to_the_working_directory(night, tmp_path, monkeypatch):
    """A flag may name a file in any folder, and an HDU of it."""
    (tmp_path / "else" / "where").mkdir(parents=True)
    candidates().write(tmp_path / "else" / "where" / "c.ecsv")
    monkeypatch.chdir(night)
    assert enrich("../else/where/c.ecsv", "--science", "science.fits#0", "--to", "../out") == 0
    assert packets(tmp_path / "out")["p"].frames == {"science": f"file://{night}/science.fits#0"}


@pytest.mark.parametrize("plane", ["science", "mask"])
def test_frame_of_a_flag_that_cannot_be_read(night, tmp_path, capsys, plane):
    """A frame of a flag that cannot be read ends the command with code 1 before anything is written."""
    candidates().write(tmp_path / "c.ecsv")
    given = {"science": night / "science.fits"} | {plane: night / "typo.fits"}
    named = [part for name, path in given.items() for part in (f"--{name}", path)]
    assert enrich(tmp_path / "c.ecsv", *named, "--to", tmp_path / "out") == 1
    assert (
        capsys.readouterr().err
        == f"stampworker: FrameMissing: file://{night}/typo.fits: no such file (No such file or directory)\n"
    )
    assert not (tmp_path / "out").exists()


def test_frames_of_flags_that_do_not_fit(tmp_path, capsys):
    """Two frames without a common grid are named, before anything is written."""
    candidates().write(tmp_path / "c.ecsv")
    for name, shape in (("science", (40, 50)), ("template", (4, 5))):
        fits.writeto(tmp_path / f"{name}.fits", np.ones(shape, np.float32))
    assert enrich(tmp_path / "c.ecsv", *flags(tmp_path, "template"), "--to", tmp_path / "out") == 1
    assert "FrameMismatch: " in (err := capsys.readouterr().err)
    assert "template.fits" in err
    assert "science.fits" in err
    assert not (tmp_path / "out").exists()


def test_wrong_usage_of_tables(night, tmp_path, capsys):
    """Missing or needless flags of frames, and a table of unknown format, are wrong usage."""
    candidates().write(tmp_path / "c.ecsv")
    (night / "a.json").write_text(json.dumps(alerts(1)))
    table = tmp_path / "c.ecsv"
    for arguments, message in (
        ([table], "a table names no frames, wanted at least --science FILE, or --resolver NAME"),
        ([table, "--template", night / "template.fits"], "wanted at least --science FILE"),
        ([night / "a.json", *flags(night)], "--science and the like name the frames of a table"),
        ([table, *flags(night), "--error", "e.fits", "--variance", "v.fits"], "--error, --variance: found both"),
        ([table, *flags(night), "--table", "t.xlsx"], "--table: found 't.xlsx', wanted a name that ends in .ecsv"),
        ([table, *flags(night), "--table", tmp_path / "no" / "t.csv"], "--table: found no folder"),
        (
            [table, *flags(night), "--set", "enrich.radus=3"],
            "enrich.radus is not a setting; the nearest known is 'radius'",
        ),
        ([table, *flags(night), "--set", "radius"], "--set: found 'radius', wanted section.key=value"),
        ([table, *flags(night), "--level", "LOUD"], "log.level: found 'LOUD'"),
    ):
        assert enrich(*arguments, "--to", tmp_path / "out") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert enrich(table, *flags(night), "--to", tmp_path / "out", "--table", tmp_path / "out" / "t.csv") == 0
    assert len(Table.read(tmp_path / "out" / "t.csv")) == 4


def test_tables_and_alerts_together(night, tmp_path):
    """A table and alert files in one call make one table of results."""
    candidates().write(night / "c.ecsv")
    (night / "a.json").write_text(json.dumps(alerts(2, extra={"mag": "bright"})))
    out = tmp_path / "t.ecsv"
    assert enrich(night / "c.ecsv", night / "a.json", *flags(night), "--to", tmp_path / "out", "--table", out) == 0
    table = Table.read(out)
    assert list(table["alertId"]) == ["p", "q", "r", "s", "a0", "a1"]
    assert [str(value) for value in table["mag"].filled("-")] == ["20.0", "21.0", "22.0", "-", "bright", "bright"]


def test_tables_hold_what_their_format_can(night, tmp_path):
    """A table with coordinates, times, arrays and text that is not ASCII can be written."""
    rows = Table({"x": [40.0, 41.0], "y": [30.0, 30.0], "apertures": [[1, 2], [3, 4]], "name": ["ü☃", "b"]})
    rows["place"] = SkyCoord([1, 2] * u.deg, [3, 4] * u.deg)
    rows["time"] = Time([60000, 60001], format="mjd")
    rows.write(tmp_path / "c.ecsv")
    for form in FORMATS:
        out = tmp_path / f"t.{form}"
        assert enrich(tmp_path / "c.ecsv", *flags(night), "--to", tmp_path / form, "--table", out) == 0
        table = Table.read(out, format=FORMATS[form])
        assert list(table["adjust_status"]) == ["no_convolved"] * 2
        assert str(table["name"][0]) == ("\\xfc\\u2603" if form == "fits" else "ü☃")
        assert {"place", "time"} <= set(table.colnames)


def test_publish_says_what_is_wrong_before_it_asks_a_broker(night, tmp_path, capsys):
    """A table, or one bad alert in a file, is an error that names it, before a broker is asked."""
    candidates().write(tmp_path / "c.ecsv")
    assert main(["publish", str(tmp_path / "c.ecsv")]) == 2
    assert "c.ecsv: a table of candidates names no frames" in capsys.readouterr().err
    (night / "a.json").write_text(json.dumps([*alerts(1), alerts(1, fwhm=-1)[0]]))
    assert main(["publish", str(night / "a.json")]) == 1
    assert "a.json: alert 'a0': fwhm: found -1" in capsys.readouterr().err


# Resolvers

TASK = {"science": "image", "template": "template", "difference": "diff", "convolved": "conv", "error": "ediff"}


@pytest.fixture
def task(tmp_path):
    """Return the folder of an STDWeb task, with its table of candidates."""
    folder = tmp_path / "task"
    named = write_night(folder, planes=(*TASK, "mask"))
    for plane, path in named.items():
        os.rename(path, folder / f"sub_{TASK.get(plane, plane)}.fits")
    candidates()[[0, 2]].write(folder / "candidates.vot", format="votable")
    return folder


def test_stdweb_folder_needs_nothing_else(task, tmp_path, monkeypatch):
    """The resolver finds the frames of a task's folder; frames of flags have priority and may be anywhere."""
    assert enrich(task / "candidates.vot", "--resolver", "stdweb", "--to", tmp_path / "out") == 0
    found = packets(tmp_path / "out")
    assert set(found) == {"p", "r"}
    names = {plane: f"file://{task}/sub_{name}.fits" for plane, name in (TASK | {"mask": "mask"}).items()}
    assert found["p"].frames == names
    assert (found["p"].adjust_status, found["p"].err_origin) == ("ok", "error")
    write_night(tmp_path / "other", planes=("mask",))
    monkeypatch.chdir(tmp_path / "other")
    flags = ("--resolver", "stdweb", "--mask", "mask.fits#0")
    assert enrich(task / "candidates.vot", *flags, "--to", tmp_path / "two") == 0
    assert packets(tmp_path / "two")["p"].frames == names | {"mask": f"file://{tmp_path}/other/mask.fits#0"}


def test_frame_of_a_flag_beside_a_resolver_that_cannot_be_read(task, tmp_path, capsys):
    """A frame of a flag that cannot be read ends the command before anything is written, with a resolver, too."""
    flags = ("--resolver", "stdweb", "--mask", tmp_path / "typo.fits")
    assert enrich(task / "candidates.vot", *flags, "--to", tmp_path / "out") == 1
    assert "FrameMissing: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resolver_of_the_settings(task, tmp_path, monkeypatch, capsys):
    """The root may have fields; templates come from a file or the environment, and flags override them."""
    rows = candidates()[:1]
    rows["task"] = ["task"]
    rows.write(tmp_path / "c.ecsv")
    (tmp_path / "s.toml").write_text(
        '[resolve]\nresolver = "template"\nroot = "{task}"\n[resolve.templates]\nscience = "{root}/sub_image.fits"\n'
    )
    assert enrich(tmp_path / "c.ecsv", "--config", tmp_path / "s.toml", "--to", tmp_path / "one") == 0
    assert packets(tmp_path / "one")["p"].frames == {"science": f"file://{task}/sub_image.fits"}
    monkeypatch.setenv("STAMPWORKER_RESOLVE_PLANES", "science,mask")
    monkeypatch.setenv("STAMPWORKER_RESOLVE_TEMPLATES", '{"mask": "{root}/sub_mask.fits#0"}')
    arguments = ("--resolver", "stdweb", "--resolver-root", "{task}", "--to", tmp_path / "two")
    assert enrich(tmp_path / "c.ecsv", *arguments) == 0
    wanted = {"science": f"file://{task}/sub_image.fits", "mask": f"file://{task}/sub_mask.fits#0"}
    assert packets(tmp_path / "two")["p"].frames == wanted
    assert enrich(tmp_path / "c.ecsv", *arguments[:2], "--to", tmp_path / "three", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["errors"] == {"FrameMissing": 1}


def test_alerts_without_frames(night, tmp_path, capsys):
    """Alerts without frames are rejected without a resolver, and become packets with one."""
    records = [{k: v for k, v in record.items() if k != "frames"} for record in alerts(2)]
    (night / "a.json").write_text(json.dumps(records))
    assert enrich(night / "a.json", "--to", tmp_path / "none") == 0
    rejects = lines(tmp_path / "none" / "rejects.jsonl")
    assert [(r["alertId"], r["stage"], r["error"]) for r in rejects] == [
        (f"a{n}", "frames", "AlertError") for n in (0, 1)
    ]
    assert rejects[0]["message"] == "frames: found none, wanted at least science; the resolver is 'alert'"
    templates = 'resolve.templates={"science": "{root}/science.fits"}'
    assert enrich(night / "a.json", "--to", tmp_path / "out", "--resolver", "template", "--set", templates) == 0
    assert set(packets(tmp_path / "out")) == {"a0", "a1"}


@pytest.mark.parametrize("command", [["enrich", "c.ecsv", "--to", "out"], ["run"], ["replay", "a", "--to-topic", "b"]])
def test_resolver_that_does_not_serve_is_wrong_usage(command, tmp_path, monkeypatch, capsys):
    """A resolver that cannot be loaded ends the command before a file is written or a broker is asked."""
    monkeypatch.chdir(tmp_path)
    candidates().write("c.ecsv")
    command += ["--frame-root", str(tmp_path)]
    for arguments, message in (
        (["--resolver", "zft"], "resolve.resolver: no resolver is called 'zft'; the nearest known is 'ztf'"),
        (["--resolver", "stdweb", "--set", "resolve.planes=variance"], "has no template of 'variance'"),
        (["--resolver", "stdweb", "--set", "resolve.planes=tempalte"], "no plane is called 'tempalte'; the nearest"),
        (
            ["--resolver", "stdweb", "--resolver-root", "{a.b}"],
            "resolve.templates.science: '{a.b}/sub_image.fits': found",
        ),
        (["--resolver", "template", "--set", 'resolve.templates={"science": "{night"}'], "'{night': expected '}'"),
        (["--resolver", "template", "--set", "resolve.templates={night}"], "a table is written"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Settings


def test_precedence(tmp_path, monkeypatch, capsys):
    """File, environment, --set and a setting's own flag: each overrides the one before."""
    path = tmp_path / "s.toml"
    path.write_text('[enrich]\nradius = 10\n[fit]\nfwhm = 4\n[worker]\ngroup = "file"\nslot = 1\n')
    monkeypatch.setenv("STAMPWORKER_ENRICH_RADIUS", "20")
    monkeypatch.setenv("STAMPWORKER_WORKER_GROUP", "environment")
    assert main(["config", "--config", str(path), "--set", "worker.group=flag"]) == 0
    out = capsys.readouterr().out
    assert "radius = 20.0" in out
    assert "fwhm = 4.0" in out
    assert 'group = "flag"' in out
    monkeypatch.setenv("STAMPWORKER_CONFIG", str(path))
    assert main(["config"]) == 0
    assert "slot = 1\n" in capsys.readouterr().out
    monkeypatch.setenv("STAMPWORKER_CONFIG", str(tmp_path / "absent.toml"))
    assert main(["config"]) == 2
    assert "absent.toml" in capsys.readouterr().err


def test_settings_reach_the_packets(night, tmp_path, monkeypatch):
    """Settings are used and are in the packet; --radius overrides the others."""
    monkeypatch.setenv("STAMPWORKER_FIT_INNER", "9")
    monkeypatch.setenv("STAMPWORKER_ENRICH_RADIUS", "20")
    (night / "a.json").write_text(json.dumps(alerts(1)))
    assert (
        enrich(night / "a.json", "--to", tmp_path / "out", "--set", "enrich.gzip=false", "--set", "fit.fit_bg=yes") == 0
    )
    packet = packets(tmp_path / "out")["a0"]
    assert (packet.adjust_settings["inner"], packet.adjust_settings["fit_bg"]) == (9, True)
    assert packet.stamps["science"].data.shape == (11, 11)
    assert packet.stamps["science"].file_name.endswith(".fits")


def test_secrets_are_masked(tmp_path, monkeypatch, capsys):
    """No secret is printed, by ``config`` or in an error."""
    path = tmp_path / "s.toml"
    path.write_text('[kafka]\n"sasl.password" = "hunter2"\n"ssl.key.password" = "hunter3"\n')
    monkeypatch.setenv("STAMPWORKER_KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET", "hunter4")
    assert main(["config", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.count('"********"') == 3
    assert main(["config", "--config", str(path), "--set", "enrich.radius=-1"]) == 2
    assert main(["config", "--set", "kafka.sasl.password hunter5"]) == 2
    assert "hunter" not in out + capsys.readouterr().err


def test_usage_errors_exit_2(capsys):
    """No command, an unknown one, and missing arguments are wrong usage."""
    for arguments in ([], ["enrihc"], ["enrich"], ["enrich", "a.json"], ["show"], ["--nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    assert "usage: stampworker" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["enrich", "run", "publish", "replay", "show", "simulate", "demo", "config"])
def test_every_command_has_help(command, capsys):
    """Each command of the interface is there and explains itself."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: stampworker {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_broker_that_does_not_answer_exits_1(capsys, monkeypatch, tmp_path):
    """A broker that does not answer is a failure, not wrong usage: it may answer later."""
    monkeypatch.setattr("stampworker.stream.kafka._CONTACT_S", 0.5)
    monkeypatch.setenv("STAMPWORKER_FRAMES_FRAME_ROOTS", str(tmp_path))
    nobody = ["--set", "kafka.bootstrap.servers=127.0.0.1:1", "--set", "kafka.log_level=0"]
    for arguments in (["run", *nobody], ["replay", "a", "--to-topic", "b", *nobody]):
        assert main(arguments) == 1
        assert "BrokerUnavailable: no answer from 127.0.0.1:1 within 0.5 s" in capsys.readouterr().err


def test_run_and_replay_need_frame_roots(capsys):
    """Without frame roots, run and replay end before a broker is asked."""
    for arguments in (["run"], ["replay", "a", "--to-topic", "b"]):
        assert main(arguments) == 2
        assert "frames.frame_roots: found nothing" in capsys.readouterr().err


# Packets


@pytest.fixture
def packet(night, tmp_path):
    """Return the file of a packet with NaN in extra, which JSON does not have."""
    (night / "a.json").write_text(json.dumps(alerts(1, extra={"snr": float("nan"), "band": "r"}, objectId="o☃")))
    assert enrich(night / "a.json", "--to", tmp_path / "p") == 0
    (path,) = (tmp_path / "p").glob("*.avro")
    return path


def test_show_prints_a_packet(packet, capsys):
    """The text has the identifiers, verdict, metrics and planes."""
    capsys.readouterr()
    assert main(["show", str(packet)]) == 0
    out = capsys.readouterr().out
    made = Packet.read_file(packet)
    for text in (made.packet_id, "a0", "o☃", "science", "difference", "ok", "chi2", "dx"):
        assert text in out


def test_show_json(packet, capsys):
    """The JSON has the record without the stamps' bytes, with their shapes, for any JSON reader."""
    capsys.readouterr()
    assert main(["show", str(packet), "--json"]) == 0

    def refuse(word):
        raise AssertionError(word)

    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    made = Packet.read_file(packet)
    assert shown["packetId"] == made.packet_id
    assert shown["candidate"]["extra"] == {"snr": None, "band": "r"}
    assert shown["adjust_dx"] == made.metrics["adjust_dx"]
    assert shown["stamps"] == {plane: [11, 11] for plane in made.stamps}
    assert not any(name.startswith("cutout") for name in shown)


def test_show_draws(packet, tmp_path, capsys):
    """--png writes a picture."""
    assert main(["show", str(packet), "--png", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_show_what_is_no_packet(night, tmp_path, capsys):
    """A missing file, an alert and junk are named, with exit code 1."""
    (tmp_path / "junk.avro").write_bytes(b"junk")
    (tmp_path / "alert.avro").write_bytes(encode_alert(from_record(alerts(1)[0])))
    for name in ("absent.avro", "junk.avro", "alert.avro"):
        assert main(["show", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err


@pytest.mark.slow
def test_simulated_night_through_enrich(tmp_path, capsys):
    """``enrich`` reads the alerts that ``simulate`` writes."""
    assert main(["simulate", str(tmp_path / "sim"), "--size", "256", "--candidates", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"directory": str(tmp_path / "sim"), "alerts": 6}
    (path,) = (tmp_path / "sim").glob("*.json*")
    assert enrich(path, "--to", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["packets"] == 6
    assert main(["simulate", str(tmp_path / "sim")]) == 2
    assert "empty" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_process(night, tmp_path):
    """``python -m stampworker`` is the command; without a terminal nothing but the result is printed."""
    (night / "a.json").write_text(json.dumps(alerts(2)))
    command = [sys.executable, "-m", "stampworker", "enrich", str(night / "a.json"), "--to", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"2 alerts, 2 packets, 0 rejects in {tmp_path / 'out'}\n"
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.avro")}
    for packet in packets(tmp_path / "out").values():
        assert first[f"{packet.packet_id}.avro"] == encode_packet(packet)
        assert packet.worker_version == stampworker.__version__


def test_enrich_does_not_depend_on_the_batch(night, tmp_path, monkeypatch):
    """An alert gives the same bytes alone and among others."""
    monkeypatch.setattr("stampworker.cli._CHUNK", 2)
    records = alerts(5)
    (night / "all.json").write_text(json.dumps(records))
    assert enrich(night / "all.json", "--to", tmp_path / "all") == 0
    for n, record in enumerate(records):
        (night / "one.json").write_text(json.dumps(record))
        assert enrich(night / "one.json", "--to", tmp_path / f"{n}") == 0
        (path,) = (tmp_path / f"{n}").glob("*.avro")
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()


def test_noise_of_the_night_is_that_of_its_frames():
    """The noise of these tests' frames is their scatter."""
    planes = night_planes()
    residual = planes["difference"][:20]
    assert residual.std() == pytest.approx(NOISE, rel=0.1)
