"""Packets: the same bytes every time, stamps that any FITS reader opens, and reading them back."""

import dataclasses
import gzip
import io
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import fastavro
import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from helpers.night import NOISE, PLANES, SHAPE, STAR, WCS_KINDS, alert_record, write_night
from hypothesis import given
from hypothesis import strategies as st

from stampworker.config import EnrichSettings, FrameSettings, Settings
from stampworker.cutouts import get_cutout, load_cutout, write_cutout
from stampworker.enrich import Enricher
from stampworker.formats.alerts import from_record
from stampworker.formats.packets import METRICS, STAMP_FIELDS, Packet, Stamp, StampWriter, encode, read_packets
from stampworker.formats.schema import PACKET, parsed_schema
from stampworker.frames import FrameStore

HERE = Path(__file__).parent
RADIUS = 6
GIVEN = tuple(plane for plane in PLANES if plane != "variance")


def make(folder, alert, **enrich):
    """Make the packet of one alert from the frames of a folder."""
    with FrameStore(FrameSettings(frame_roots=(str(folder),))) as store:
        (packet,) = Enricher(Settings(enrich=EnrichSettings(radius=RADIUS, **enrich)), store).packets(
            [from_record(alert)]
        )
    assert isinstance(packet, Packet), packet.error
    return packet


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Return the folder and the frames of a night."""
    folder = tmp_path_factory.mktemp("night")
    return folder, write_night(folder, planes=GIVEN)


@pytest.fixture(scope="module")
def packet(night):
    """Return a packet with every plane and every field."""
    folder, frames = night
    fields = {
        "objectId": "o/1",
        "ra": 150.2,
        "dec": -33.5,
        "mjd": 60000.25,
        "mjdScale": "tai",
        "fwhm": 3.5,
        "gain": 1.5,
    }
    return make(folder, alert_record(frames, extra={"snr": 7.5, "n": 3, "ok": True, "band": "r"}, **fields))


def open_plainly(stamp):
    """Open a stamp with gzip and astropy alone."""
    with fits.open(io.BytesIO(gzip.decompress(stamp.content))) as hdus:
        hdus.verify("exception")
        assert len(hdus) == 1
        return np.array(hdus[0].data), hdus[0].header.copy()


MAKE = """
import sys
sys.path[:0] = sys.argv[1].split(':')
from pathlib import Path
from test_packets import *
sys.stdout.buffer.write(encode(make(Path(sys.argv[2]), json.loads(sys.argv[3]))))
"""


@pytest.mark.slow
def test_same_alert_frames_and_settings_give_the_same_bytes(night):
    """Every byte is the same in a second call and in other processes with other hash seeds."""
    folder, frames = night
    alert = alert_record(frames, extra=dict.fromkeys("abcdefgh", 1))
    here = encode(make(folder, alert))
    assert encode(make(folder, alert)) == here
    for seed in ("1", "2"):
        command = [sys.executable, "-c", MAKE, f"{HERE.parent}:{HERE}", str(folder), json.dumps(alert)]
        run = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
        assert run.stdout == here


def test_packet_id_is_the_alerts_and_nothing_elses(night):
    """Settings and frames' pixels do not change the id; the alert does."""
    folder, frames = night
    alert = alert_record(frames)
    ids = {make(folder, alert).packet_id, make(folder, alert, gzip=False).packet_id, from_record(alert).packet_id()}
    assert len(ids) == 1
    assert uuid.UUID(ids.pop()).version == 5
    assert make(folder, alert | {"x": 40.0}).packet_id != from_record(alert).packet_id()


def test_no_clock_or_host_is_in_a_packet(night, packet):
    """The sync marker is the packet's id, the gzip headers have no time and no name, the stamps no date."""
    data = encode(packet)
    assert data.endswith(uuid.UUID(packet.packet_id).bytes)
    for stamp in packet.stamps.values():
        assert stamp.content[:4] == b"\x1f\x8b\x08\0"
        assert stamp.content[4:8] == b"\0\0\0\0"
        assert not {"DATE", "CHECKSUM", "DATASUM"} & set(stamp.header)


def test_stamps_need_nothing_of_ours(night, packet):
    """Each is one HDU with the plane's name and unit, the frame's dtype, and its pixels around the target."""
    folder, _ = night
    x0, y0 = (int(np.floor(value + 0.5)) for value in STAR)
    assert set(packet.stamps) == set(STAMP_FIELDS)
    for plane, stamp in packet.stamps.items():
        data, header = open_plainly(stamp)
        frame, frame_header = fits.getdata(folder / f"{'science' if plane == 'adjusted' else plane}.fits", header=True)
        assert header["EXTNAME"] == plane
        assert header.get("BUNIT") == frame_header.get("BUNIT")
        assert data.dtype.newbyteorder("=") == frame.dtype.newbyteorder("=")
        if plane != "adjusted":
            wanted = frame[y0 - RADIUS : y0 + RADIUS + 1, x0 - RADIUS : x0 + RADIUS + 1]
            assert np.array_equal(data, wanted)
        assert stamp.data.dtype.isnative
        assert np.array_equal(stamp.data, data)
        assert stamp.file_name == f"a-1_{plane}.fits.gz"


def test_plain_stamps(night, packet):
    """Without gzip a stamp is the same FITS file, plain."""
    folder, frames = night
    plain = make(folder, alert_record(frames), gzip=False)
    for plane, stamp in plain.stamps.items():
        assert stamp.file_name == f"a-1_{plane}.fits"
        assert stamp.content.startswith(b"SIMPLE  =")
        assert gzip.decompress(packet.stamps[plane].content) == stamp.content


@pytest.mark.parametrize("kind", WCS_KINDS)
@pytest.mark.parametrize("place", [STAR, (10.5, 12.5), (2.0, 59.5), (81.9, -3.2)])
def test_stamps_have_the_frames_wcs(tmp_path, kind, place):
    """Every pixel of every stamp, also off the frame, has the sky position that the frame's WCS gives it."""
    frames = write_night(tmp_path, wcs=kind, planes=("science", "difference", "mask"))
    frame = WCS(fits.getheader(frames["science"]))
    x, y = place
    packet = make(tmp_path, alert_record(frames, x=x, y=y))
    rows, columns = np.indices((2 * RADIUS + 1, 2 * RADIUS + 1))
    x1, y1 = np.floor(x + 0.5) - RADIUS, np.floor(y + 0.5) - RADIUS
    wanted = frame.all_pix2world(columns + x1, rows + y1, 0)
    for plane, stamp in packet.stamps.items():
        found = WCS(open_plainly(stamp)[1])
        assert list(found.wcs.ctype) == list(frame.wcs.ctype), plane
        assert np.allclose(found.all_pix2world(columns, rows, 0), wanted, atol=1e-9, rtol=0), plane
        assert np.allclose(stamp.wcs.all_pix2world(columns, rows, 0), wanted, atol=1e-9, rtol=0), plane


def test_wcs_keywords_are_the_frames_to_the_letter(tmp_path):
    """All but CRPIX are the frame's cards verbatim, so that no digit is lost."""
    frames = write_night(tmp_path, wcs="TPV", planes=("science",))
    with fits.open(frames["science"], mode="update") as hdus:
        hdus[0].header.append(fits.Card.fromstring("LONPOLE =  1.800000000000000001D2 / a comment"), end=True)
    cards = [str(card) for card in make(tmp_path, alert_record(frames)).stamps["science"].header.cards]
    wanted = [str(card) for card in fits.getheader(frames["science"]).cards]
    kept = [
        card for card in wanted if card[:8].rstrip().rstrip("0123456789_") in ("CTYPE", "CUNIT", "CRVAL", "CD", "PV")
    ]
    assert len(kept) > 15
    assert set(kept) <= set(cards)
    assert any(card.startswith("LONPOLE =  1.800000000000000001D2") for card in cards)


def test_frame_without_wcs_gives_stamps_without(tmp_path):
    """A frame without a WCS gives stamps without a WCS."""
    packet = make(tmp_path, alert_record(write_night(tmp_path, wcs=None, planes=("science", "difference"))))
    for stamp in packet.stamps.values():
        assert stamp.wcs is None
        assert not any(name.startswith(("CTYPE", "CRPIX", "CD")) for name in stamp.header)
    assert "wcs" not in packet.to_cutout()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        *((kind, kind) for kind in ("f4", "f8", "u1", "i2", "i4", "i8")),
        *(("?", "u1"), ("u2", "i4"), ("i1", "i4"), ("u4", "i8"), (">f4", "f4"), (">i2", "i2")),
    ],
)
def test_every_type_has_one_in_fits(given, kept):
    """Types that FITS lacks become the next larger integer."""
    data = np.arange(12).reshape(3, 4).astype(given)
    stamp = StampWriter("science", [], None).write("a", data, 0, 0)
    assert stamp.data.dtype == np.dtype(kept)
    assert np.array_equal(stamp.data, data)
    assert open_plainly(stamp)[0].shape == (3, 4)


@pytest.mark.parametrize("corner", [0, -31, 123456, 10**9])
@pytest.mark.parametrize("crpix", ["33.75", "-1.5E-7", "1234567.123456789", "4.2D+01", "0", "1e22"])
def test_crpix_is_moved_exactly(crpix, corner):
    """CRPIX minus the corner is read back as the nearest double."""
    cards = [f"CRPIX1  = {crpix:>20}".ljust(80), f"CRPIX2  = {crpix:>20}".ljust(80)]
    header = StampWriter("science", cards, None).write("a", np.zeros((2, 2), "f4"), corner, -corner).header
    value = float(crpix.replace("D", "E"))
    assert (header["CRPIX1"], header["CRPIX2"]) == (value - corner, value + corner)
    assert all(len(str(card)) == 80 for card in header.cards)


def test_odd_names_and_units():
    """Slashes do not make folders of a file name; a unit that is not ASCII, or has quotes, still makes a FITS file."""
    data = np.zeros((2, 2), "f4")
    assert StampWriter("mask", [], None).write("a/../b", data, 0, 0).file_name == "a_.._b_mask.fits.gz"
    assert open_plainly(StampWriter("science", [], "10^-7 µJy").write("a", data, 0, 0))[1]["BUNIT"] == "10^-7 ?Jy"
    assert open_plainly(StampWriter("science", [], "d'oh").write("a", data, 0, 0))[1]["BUNIT"] == "d'oh"
    with pytest.raises(ValueError, match=r"BUNIT: found 'xxx.*wanted a string that fits one FITS card"):
        StampWriter("science", [], "x" * 80)


def test_packet_comes_back(packet):
    """An encoded packet is read as the same packet, and its record fits the schema."""
    assert Packet.read(encode(packet)) == packet
    (record,) = fastavro.reader(io.BytesIO(encode(packet)))
    assert record == packet.to_record()
    assert fastavro.validate(record, parsed_schema(*PACKET))
    assert packet.key == "o/1"
    assert dataclasses.replace(packet, object_id=None).key == packet.alert_id
    assert packet.candidate == {
        **{"x": STAR[0], "y": STAR[1], "ra": 150.2, "dec": -33.5, "mjd": 60000.25, "mjdScale": "tai", "fwhm": 3.5},
        "extra": {"snr": 7.5, "n": 3, "ok": True, "band": "r"},
    }


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))
maybe = st.none() | finite
packets = st.builds(
    Packet,
    packet_id=st.uuids().map(str),
    alert_id=text,
    object_id=st.none() | text,
    candidate=st.fixed_dictionaries(
        {"x": finite, "y": finite, "ra": maybe, "dec": maybe, "mjd": maybe, "mjdScale": text, "fwhm": maybe}
        | {
            "extra": st.dictionaries(
                text, st.one_of(text, finite, st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1))
            )
        }
    ),
    frames=st.dictionaries(text, text, max_size=3),
    stamps=st.dictionaries(st.sampled_from(list(STAMP_FIELDS)), st.builds(Stamp, file_name=text, content=st.binary())),
    metrics=st.dictionaries(
        st.sampled_from([name for name in METRICS if name not in ("adjust_df", "adjust_bound")]), finite
    ),
    adjust_status=text,
    adjust_artefact=st.none() | st.booleans(),
    adjust_settings=st.just(
        {"max_shift": 1.0, "max_scale": 1.1, "inner": 7, "fit_bg": False}
        | {
            f"artefact_{name}": 0.5
            for name in ("p_value", "chi2_ratio", "min_scale", "max_scale", "min_delta_chi2", "max_point_delta_chi2")
        }
    ),
    convolved_origin=st.none() | text,
    err_origin=st.none() | text,
    resampled_planes=st.lists(text, max_size=2).map(tuple),
    worker_version=text,
)


@given(packets)
def test_any_packet_comes_back(packet):
    """Any packet survives its encoding, and its second encoding has the same bytes."""
    data = encode(packet)
    again = Packet.read(data)
    assert again == packet
    assert encode(again) == data


def test_cutout_of_a_packet_is_that_of_the_frames(night, packet):
    """A cutout has the planes under the names of get_cutout, header and WCS of the stamp, candidate and metrics."""
    folder, _ = night
    cutout = packet.to_cutout()
    names = {"image": "science", "diff": "difference", "err": "error", "template": "template", "convolved": "convolved"}
    loaded = {plane: fits.getdata(folder / f"{file}.fits") for plane, file in (names | {"mask": "mask"}).items()}
    header = fits.getheader(folder / "science.fits")
    x, y = STAR
    candidate = {"x": x, "y": y, "ra": 150.2, "dec": -33.5}
    wanted = get_cutout(loaded.pop("image"), candidate, RADIUS, header=header, **loaded)
    for plane in (*names, "mask"):
        assert np.array_equal(cutout[plane], wanted[plane]), plane
        assert cutout[plane].dtype.newbyteorder("=") == wanted[plane].dtype.newbyteorder("="), plane
    assert cutout["wcs"].wcs.compare(wanted["wcs"].wcs, tolerance=1e-12)
    assert cutout["header"]["BUNIT"] == "adu"
    meta = cutout["meta"]
    assert wanted["meta"].items() <= meta.items()
    assert meta["name"] == "J100048.00-333000.0"
    assert packet.metrics.items() <= meta.items()
    assert (meta["id"], meta["snr"], meta["band"], meta["mjd"]) == ("a-1", 7.5, "r", 60000.25)
    assert (meta["adjust_status"], meta["adjust_artefact"]) == (packet.adjust_status, packet.adjust_artefact)


def test_cutout_is_a_copy(packet):
    """Changing a cutout does not change its packet."""
    first = packet.to_cutout()
    first["image"][:] = 0
    first["header"]["BUNIT"] = "x"
    first["wcs"].wcs.crval = 0, 0
    second = packet.to_cutout()
    assert second["image"].max() > 10 * NOISE
    assert second["header"]["BUNIT"] == "adu"
    assert second["wcs"].wcs.crval[0] == 150.25


def test_extra_does_not_hide_the_candidate(packet):
    """A key x in extra does not replace the position x."""
    extra = {"x": -1.0, "adjust_dx": 9.0, "name": "mine"}
    meta = dataclasses.replace(packet, candidate=packet.candidate | {"extra": extra}).to_cutout()["meta"]
    assert (meta["x"], meta["adjust_dx"], meta["name"]) == (STAR[0], packet.metrics["adjust_dx"], "mine")


def test_cutout_survives_a_file(packet, tmp_path):
    """write_cutout writes the result of to_cutout, and load_cutout reads it back."""
    cutout = packet.to_cutout()
    write_cutout(cutout, tmp_path / "c.fits")
    again = load_cutout(tmp_path / "c.fits")
    assert again["meta"] == cutout["meta"]
    assert {name: type(value) for name, value in again["meta"].items()} == {
        name: type(value) for name, value in cutout["meta"].items()
    }
    for plane, data in cutout.items():
        if isinstance(data, np.ndarray):
            assert np.array_equal(again[plane], data, equal_nan=True), plane
            assert again[plane].dtype == data.dtype, plane
    assert again["wcs"].wcs.compare(cutout["wcs"].wcs, tolerance=1e-12)


def test_what_is_not_a_packet_is_said(packet, tmp_path):
    """Empty, foreign and damaged bytes, and containers of none or two packets, give an error that names them."""
    for data in (b"", b"Obj\x01", b"\0\0\0\0\1abc", encode(packet)[:-100]):
        with pytest.raises(ValueError, match=f"found no Avro container of {' '.join(PACKET)}"):
            Packet.read(data)
    out = io.BytesIO()
    foreign = {"type": "record", "name": "alert", "namespace": "ztf", "fields": [{"name": "a", "type": "int"}]}
    fastavro.writer(out, foreign, [{"a": 1}])
    with pytest.raises(ValueError, match=f"found an Avro container of 'ztf.alert', wanted {' '.join(PACKET)}"):
        Packet.read(out.getvalue())
    for count in (0, 2):
        out = io.BytesIO()
        fastavro.writer(out, parsed_schema(*PACKET), [packet.to_record()] * count)
        assert len(read_packets(out.getvalue())) == count
        with pytest.raises(ValueError, match=f"found a container of {count} packets, wanted 1"):
            Packet.read(out.getvalue())
    (tmp_path / "p.avro").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"p\.avro: data: found no Avro container"):
        Packet.read_file(tmp_path / "p.avro")
    (tmp_path / "p.avro").write_bytes(encode(packet))
    assert Packet.read_file(str(tmp_path / "p.avro")) == packet


@given(st.binary(max_size=100), st.data())
def test_damaged_packets_end_in_value_error(packet, junk, data):
    """Any bytes give a packet or a ValueError."""
    whole = encode(packet)
    where = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (junk, b"Obj\x01" + junk, whole[:where] + junk + whole[where + len(junk) :]):
        try:
            Packet.read(damaged)
        except ValueError as exc:
            str(exc).encode()


def test_shape_of_the_night():
    """The frames of these tests are not square, so swapped axes are noticed."""
    assert SHAPE[0] != SHAPE[1]
