"""Packets as pictures and as text: every pixel at its position and in its colour, for any packet."""

import sys
import uuid

import numpy as np
import pytest
from matplotlib import image as png

from stampworker.errors import ConfigError
from stampworker.formats.packets import Packet, StampWriter
from stampworker.viewer.picture import COLUMNS, describe, picture

NO_DATA, NO_PLANE = (72, 104, 168), (238, 238, 238)
FIT = {
    "adjust_chi2_0": 381.25,
    "adjust_chi2": 52.0,
    "adjust_df": 46,
    "adjust_pval": 0.25,
    "adjust_dx": -0.1,
    "adjust_dy": 0.42,
    "adjust_scale": 0.982,
}


def packet(planes, number=1, metrics=FIT, status="ok", artefact=True):
    return Packet(
        packet_id=str(uuid.UUID(int=number)),
        alert_id=f"alert-{number}",
        object_id=None,
        candidate={"x": 100.5, "y": 20.25, "ra": 150.1234567, "dec": -2.5, "mjd": 61368.25, "extra": {"snr": 7.5}},
        frames={"science": "file:///night/science.fits"},
        stamps={name: StampWriter(name, (), "adu").write("alert", data, 0, 0) for name, data in planes.items()},
        metrics=metrics,
        adjust_status=status,
        adjust_artefact=artefact,
        adjust_settings={"max_shift": 1.0, "fit_bg": False},
        convolved_origin="frame",
        err_origin="error",
        worker_version="0.1.0",
    )


@pytest.fixture
def planes():
    rng = np.random.default_rng(4)
    made = {name: rng.normal(0, 1, (31, 31)).astype("f4") for name in COLUMNS}
    return made | {"mask": np.zeros((31, 31), "u1")}


def stamps_of(path):
    """Cut the drawn stamps of a picture of one packet, each as an array of red, green, blue, first row lowest."""
    pixels = np.rint(255 * png.imread(path)[:, :, :3]).astype(int)
    zoom = 252 // 31
    cell = 31 * zoom
    cut = {}
    for column, name in enumerate(COLUMNS):
        left, top = 6 + 196 + column * (cell + 6), 26
        drawn = pixels[top : top + cell, left : left + cell][::-1]
        cut[name] = drawn[zoom // 2 :: zoom, zoom // 2 :: zoom]
        # Every pixel of the stamp is a square of one colour.
        assert np.array_equal(drawn[:zoom, :zoom], np.broadcast_to(drawn[0, 0], (zoom, zoom, 3)))
    return cut


def test_stamps_are_neither_flipped_nor_turned(planes, tmp_path):
    """A bright pixel low on the left, at x 4, y 2, is drawn there, white; a negative one at x 20, y 2, black."""
    for name in COLUMNS:
        planes[name][2, 4] = 100
    planes["difference"][2, 20] = -100
    picture([packet(planes)], tmp_path / "one.png")
    for name, drawn in stamps_of(tmp_path / "one.png").items():
        assert np.array_equal(drawn[2, 4], (255, 255, 255)), name
        bright = np.argwhere(drawn.min(axis=2) > 250)
        assert bright.tolist() == [[2, 4]], name
    assert np.array_equal(stamps_of(tmp_path / "one.png")["difference"][2, 20], (0, 0, 0))


def test_greys_follow_the_values(planes, tmp_path):
    """A brighter pixel is drawn brighter; zero of the difference is middle grey."""
    planes["difference"][:] = np.linspace(-8, 8, 31 * 31).reshape(31, 31)
    picture([packet(planes)], tmp_path / "one.png")
    drawn = stamps_of(tmp_path / "one.png")
    difference = drawn["difference"][:, 30, 0]
    assert np.all(np.diff(difference) > 0)
    assert abs(int(drawn["difference"][15, 14, 0]) - 127) <= 3
    order = np.argsort(planes["science"][:10].ravel())
    assert np.all(np.diff(drawn["science"][:10, :, 0].ravel()[order]) >= 0)


def test_difference_and_adjusted_share_a_stretch(planes, tmp_path):
    """The same value is the same grey in difference and adjusted, science and convolved; the template has its own."""
    planes["difference"][4:7, 24:27] = 50
    planes["adjusted"][4, 25] = 25
    planes["convolved"] = planes["science"] * 0.1
    planes["template"] = planes["science"] * 1000 + 5e5
    picture([packet(planes)], tmp_path / "one.png")
    drawn = stamps_of(tmp_path / "one.png")
    assert drawn["difference"][4, 25, 0] == 255
    assert 185 <= drawn["adjusted"][4, 25, 0] <= 197
    assert drawn["convolved"][:10, :, 0].std() < 0.3 * drawn["science"][:10, :, 0].std()
    assert np.abs(drawn["template"][:10] - drawn["science"][:10]).max() <= 1


def test_pixels_without_data_and_masked_ones_are_coloured(planes, tmp_path):
    """NaN and infinite pixels are blue, masked ones tinted, and grey stays grey elsewhere."""
    planes["science"][0:3, :] = np.nan
    planes["science"][29, 3] = np.inf
    planes["mask"][25:28, 25:28] = 4
    picture([packet(planes)], tmp_path / "one.png")
    drawn = stamps_of(tmp_path / "one.png")["science"]
    blue = np.all(drawn == NO_DATA, axis=2)
    assert blue[0:3].all()
    assert blue[29, 3]
    assert blue.sum() == 3 * 31 + 1
    tinted = drawn[25:28, 25:28]
    assert np.all(tinted[..., 0] > tinted[..., 2] + 20)
    assert np.ptp(drawn[5:10, 20:], axis=2).max() == 0


def test_masked_pixels_do_not_set_the_stretch(planes, tmp_path):
    """A saturated star under the mask leaves the rest of the stamp visible."""
    picture([packet(planes)], tmp_path / "without.png")
    for name in COLUMNS:
        planes[name][25:28, 25:28] = 60_000
    planes["mask"][25:28, 25:28] = 1
    picture([packet(planes)], tmp_path / "with.png")
    without, with_star = (stamps_of(tmp_path / f"{name}.png")["science"][:10] for name in ("without", "with"))
    assert np.abs(without - with_star).max() <= 12


def test_planes_that_are_absent(planes, tmp_path):
    """Planes that a packet lacks are light grey."""
    picture([packet({"science": planes["science"]}, metrics={}, artefact=None)], tmp_path / "one.png")
    drawn = stamps_of(tmp_path / "one.png")
    assert np.all(drawn["template"] == NO_PLANE)
    assert np.all(drawn["adjusted"] == NO_PLANE)
    assert drawn["science"].std() > 10


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan, np.inf])
def test_flat_stamps_can_be_drawn(planes, tmp_path, value):
    """Planes of one value or of none can be drawn, with every pixel masked or not."""
    flat = {name: np.full((31, 31), value, "f4") for name in COLUMNS}
    masked = flat | {"mask": np.ones((31, 31), "u1")}
    picture([packet(flat), packet(masked)], tmp_path / "flat.png")
    assert png.imread(tmp_path / "flat.png").shape[0] > 500


def test_stamps_of_any_shape_and_type(planes, tmp_path):
    """Stamps that are not square, are doubles, have no mask or have different sizes can be drawn."""
    wide = {name: np.arange(11 * 25.0).reshape(11, 25) for name in COLUMNS}
    picture([packet(wide), packet(planes)], tmp_path / "odd.png")
    assert png.imread(tmp_path / "odd.png").shape[1] > 1000


@pytest.mark.slow
def test_many_rows_stay_a_page(planes, tmp_path):
    """Sixty rows are laid out in blocks, about as high as wide, with stamps as large as in a few rows."""
    packets = [packet(planes, number) for number in range(1, 61)]
    picture(packets, tmp_path / "many.png", [f"class {p.alert_id}" for p in packets])
    height, width, _ = png.imread(tmp_path / "many.png").shape
    assert 0.6 < width / height < 1.7
    assert height < 4000
    picture(packets[:3], tmp_path / "few.png")
    few_height, few_width, _ = png.imread(tmp_path / "few.png").shape
    assert width == pytest.approx(round(width / few_width) * few_width, rel=0.02)
    assert few_height < 500


def test_same_packets_same_picture(planes, tmp_path):
    """The file has no time: a second one has the same bytes, and another label changes them."""
    for name, label in (("a", "dipole"), ("b", "dipole"), ("c", "cost $5 and $6")):
        picture([packet(planes)], tmp_path / name, [label])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_wrong_numbers_are_refused(planes, tmp_path):
    """No packets, a wrong number of labels and too many packets are refused by name."""
    one = packet(planes)
    with pytest.raises(ValueError, match="packets: found none"):
        picture([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="labels: found 2, wanted one for each of 1 packets"):
        picture([one], tmp_path / "x.png", ["a", "b"])
    with pytest.raises(ValueError, match=r"packets: found 5000, a picture of \d+ × \d+"):
        picture([one] * 5000, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(planes, tmp_path, monkeypatch):
    """Without matplotlib the error names the extra to install."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'stampworker\[viewer\]'"):
        picture([packet(planes)], tmp_path / "x.png")


def test_description_names_every_field(planes):
    """The text has the identifiers, candidate, metrics, verdict, settings and a line for each stamp."""
    planes["science"][0, :5] = np.nan
    planes["mask"][0, :7] = 1
    text = describe(packet(planes))
    lines = {line.split()[0]: line.split(maxsplit=1)[-1] for line in text.splitlines()}
    assert lines["alertId"] == "alert-1"
    assert lines["objectId"] == "–"
    assert lines["ra"] == "150.1234567 deg"
    assert lines["x"] == "100.5 pixel"
    assert lines["mjd"] == "61368.25 d"
    assert lines["extra.snr"] == "7.5"
    assert lines["adjust_artefact"] == "yes"
    assert lines["adjust_chi2_0"] == "381.25"
    assert lines["adjust_dx"] == "-0.1 pixel"
    assert lines["max_shift"] == "1"
    assert lines["science"].split() == ["31", "×", "31", "float32", "adu", "5", "file:///night/science.fits"]
    assert lines["mask"].split() == ["31", "×", "31", "uint8", "adu", "7", "masked", "–"]


def test_description_without_fit():
    """A packet without stamps or fit is described too."""
    text = describe(packet({}, metrics={}, status="off_frame", artefact=None))
    assert "off_frame" in text
    assert "adjust_artefact  –" in text
