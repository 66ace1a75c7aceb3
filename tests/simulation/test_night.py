"""The simulated night: its frames and truth, the same bytes for the same seed, and the results of the fit."""

import filecmp
import json
import math

import numpy as np
import pytest
from astropy.io import fits
from astropy.nddata import Cutout2D
from astropy.table import Table
from astropy.wcs import WCS

from stampworker.cutouts import adjust_cutout, is_artefact
from stampworker.errors import ConfigError
from stampworker.simulation.candidates import SHARES, capacity
from stampworker.simulation.confusion import BINNED, confusion, recovery
from stampworker.simulation.night import MASK_BITS, simulate

PLANES = ("science", "template", "convolved", "difference", "error", "mask")


class Loaded:
    """A night with everything read back from its files."""

    def __init__(self, night):
        self.night = night
        self.alerts = [json.loads(line) for line in night.alerts.read_text().splitlines()]
        self.truth = Table.read(night.truth)
        self.frames = [{p: fits.getdata(folder / f"{p}.fits") for p in PLANES} for folder in night.frames]

    def frame_of(self, alert):
        """Planes of the frame set that the alert names."""
        folder = alert["frames"]["science"].split("/")[0]
        return self.frames[[f.name for f in self.night.frames].index(folder)]

    def truth_of(self, alert):
        """Row of the truth."""
        return self.truth[self.truth["alertId"] == alert["alertId"]][0]


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    return Loaded(simulate(tmp_path_factory.mktemp("night"), frames=2, size=512, candidates=120, seed=5))


def near(truth, shape, reach=20):
    """Pixels within ``reach`` of a candidate."""
    y, x = np.indices(shape)
    found = np.zeros(shape, bool)
    for row in truth:
        found |= np.hypot(x - row["x"], y - row["y"]) < reach
    return found


def test_planes_fit_together(night):
    """Every plane has the science frame's shape, and the difference is science minus convolved."""
    for planes in night.frames:
        assert {plane.shape for plane in planes.values()} == {(512, 512)}
        assert {name: plane.dtype.newbyteorder("=") for name, plane in planes.items()} == {
            name: np.dtype("u1" if name == "mask" else "f4") for name in PLANES
        }
        expected = planes["science"].astype(float) - planes["convolved"]
        assert np.allclose(planes["difference"], expected, atol=0.01)


def test_error_plane_is_honest(night):
    """Away from candidates and masked pixels the difference scatters by the error plane, on sky and on stars."""
    for folder, planes in zip(night.night.frames, night.frames, strict=True):
        quiet = (planes["mask"] == 0) & ~near(night.truth[night.truth["frame"] == folder.name], planes["mask"].shape)
        pull = planes["difference"].astype(float) / planes["error"]
        bright = quiet & (planes["convolved"] > 800)
        assert bright.sum() > 200
        assert abs(pull[quiet].mean()) < 4 / math.sqrt(quiet.sum())
        assert pull[quiet].std() == pytest.approx(1, abs=0.01)
        assert pull[bright].std() == pytest.approx(1, abs=4 / math.sqrt(2 * bright.sum()))
        assert np.abs(pull[quiet]).max() < 6


def test_template_noise_correlates_little(night):
    """Neighbouring pixels of the difference are independent to 2 %: the template is deep."""
    planes = night.frames[0]
    quiet = (planes["mask"] == 0) & ~near(night.truth[night.truth["frame"] == "frame-01"], planes["mask"].shape)
    pull = np.where(quiet, planes["difference"].astype(float) / planes["error"], 0)
    both = quiet[:, 1:] & quiet[:, :-1]
    assert abs(np.sum(pull[:, 1:] * pull[:, :-1]) / both.sum()) < 0.02


def test_template_has_another_psf_scale_and_background(night):
    """Template and science differ by seeing, flux scale and background; the headers say so."""
    folder = night.night.frames[0]
    science, template = (fits.getheader(folder / f"{name}.fits") for name in ("science", "template"))
    assert template["FWHM"] < 0.9 * science["FWHM"]
    assert (science["BUNIT"], template["BUNIT"]) == ("adu", "electron/s")
    assert template["GAIN"] > 100 * science["GAIN"]
    planes = night.frames[0]
    assert np.median(planes["template"]) < 0.02 * np.median(planes["science"])
    assert np.median(planes["convolved"]) == pytest.approx(np.median(planes["science"]), rel=0.01)


def test_alerts_point_where_the_wcs_does(night):
    """x, y and ra, dec of an alert agree in every plane's WCS; no header has the time of writing."""
    for alert in night.alerts:
        for name in ("science", "mask"):
            header = fits.getheader(night.night.directory / alert["frames"][name])
            assert "DATE" not in header
            x, y = WCS(header).all_world2pix(alert["ra"], alert["dec"], 0)
            assert (float(x), float(y)) == pytest.approx((alert["x"], alert["y"]), abs=2e-3)


def test_every_class_is_there(night):
    """The classes have their shares, and neither alert nor table names the class."""
    names, counts = np.unique(night.truth["class"], return_counts=True)
    found = dict(zip(names.tolist(), counts.tolist(), strict=True))
    assert all(abs(found[name] - 120 * share) <= 1 for name, share in SHARES.items())
    text = night.night.alerts.read_text() + night.night.candidates.read_text()
    assert not any(name in text for name in (*SHARES, "host", "scale", "truth"))


def test_one_candidate_still_makes_a_night(tmp_path):
    """The smallest night is one candidate."""
    found = Loaded(simulate(tmp_path / "new", size=256, candidates=1))
    assert len(found.alerts) == len(found.truth) == 1


def test_truth_keeps_its_promises(night):
    """S/N, shifts, scales and hosts are within the documented ranges, and shifts along x differ from those along y."""
    truth = {kind: night.truth[night.truth["class"] == kind] for kind in SHARES}
    for kind in ("transient-sky", "transient-galaxy"):
        assert 2.8 < truth[kind]["snr"].min() < 5
        assert 60 < truth[kind]["snr"].max() < 105
    dipoles = truth["dipole"]
    shift = np.hypot(dipoles["dx"], dipoles["dy"])
    assert np.all((shift >= 0.1) & (shift <= 0.9))
    assert np.all(dipoles["dx"] != dipoles["dy"])
    assert np.all(np.abs(truth["scale-error"]["scale"] - 1).round(4) <= 0.15)
    assert np.all(np.abs(truth["scale-error"]["scale"] - 1) > 0.019)
    hosts = truth["transient-galaxy"]
    assert np.all((hosts["hostRadius"] >= 1) & (hosts["hostRadius"] <= 3))
    fwhm = max(alert["fwhm"] for alert in night.alerts)
    assert np.all(hosts["hostOffset"] <= hosts["hostRadius"] * fwhm)
    assert hosts["hostOffset"].max() > fwhm


def test_measured_snr_is_that_of_the_truth(night):
    """The S/N that a matched filter measures on the difference scatters around the true one by one."""
    pulls = []
    for alert in night.alerts:
        row = night.truth_of(alert)
        if row["class"] in ("transient-sky", "transient-galaxy") and row["snr"] > 10:
            pulls.append(alert["extra"]["snr"] - row["snr"])
            assert math.hypot(alert["x"] - row["x"], alert["y"] - row["y"]) < 1
    assert len(pulls) > 30
    # The filter sits on whole pixels: it loses up to 3 % off the middle of one.
    assert abs(np.median(pulls)) < 1.5
    assert np.std(pulls) < 2


def test_candidates_keep_their_distance(night):
    """No candidate is in the middle of another's stamp."""
    for folder in ("frame-01", "frame-02"):
        rows = night.truth[night.truth["frame"] == folder]
        distance = np.hypot(rows["x"][:, None] - rows["x"], rows["y"][:, None] - rows["y"])
        assert np.min(distance + 1e6 * np.eye(len(rows))) > 33


def test_edge_cases(night):
    """There are candidates at half-integer positions, at the edge, over it and off it, each at its stated position."""
    cases: dict[str, list[tuple[float, float]]] = {}
    for row in night.truth[night.truth["class"] == "edge"]:
        cases.setdefault(row["case"], []).append((row["x"], row["y"]))
    assert set(cases) == {"half-integer position", "at the edge", "over the edge", "off the frame"}
    assert all(x % 1 == y % 1 == 0.5 for x, y in cases["half-integer position"])
    inside = {case: [min(x, y, 511 - x, 511 - y) for x, y in places] for case, places in cases.items()}
    assert all(0 <= d < 1 for d in inside["at the edge"])
    assert all(-31 < d < 0 for d in inside["over the edge"])
    assert all(d < -32 for d in inside["off the frame"])


def test_saturated_stars_are_masked_and_cosmic_rays_are_not(night):
    """The mask marks saturated stars and their trails, and only those."""
    bits = set()
    for alert in night.alerts:
        row, planes = night.truth_of(alert), night.frame_of(alert)
        y, x = math.floor(row["y"] + 0.5), math.floor(row["x"] + 0.5)
        if row["class"] == "masked":
            bits |= set(np.unique(planes["mask"][y - 15 : y + 16, x - 15 : x + 16]).tolist())
            assert planes["mask"][y, x] & MASK_BITS["saturated"]
            assert planes["science"][y - 1 : y + 2, x - 1 : x + 2].max() > 55_000
        elif row["class"] != "edge":
            assert planes["mask"][y - 3 : y + 4, x - 3 : x + 4].max() == 0
    assert all(any(value & bit for value in bits) for bit in MASK_BITS.values())


def test_same_seed_same_bytes(tmp_path):
    """The same seed gives the same files to the byte; another seed does not."""
    first, again, other = (
        simulate(tmp_path / name, size=256, candidates=12, seed=seed) for name, seed in (("a", 8), ("b", 8), ("c", 9))
    )
    names = [str(p.relative_to(first.directory)) for p in first.directory.rglob("*") if p.is_file()]
    assert len(names) == 9
    assert filecmp.cmpfiles(first.directory, again.directory, names, shallow=False) == (names, [], [])
    assert not filecmp.cmp(first.frames[0] / "science.fits", other.frames[0] / "science.fits", shallow=False)


def test_folder_must_be_empty(tmp_path):
    """A folder that is not empty is refused."""
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        simulate(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames: found 0"),
        ({"size": 100}, "size: found 100, wanted at least 256"),
        ({"candidates": 0}, "candidates: found 0"),
        ({"size": 256, "candidates": 17}, "candidates: found 17, wanted 1 to 16"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_sizes_out_of_range(tmp_path, arguments, message):
    """Arguments out of range are refused before anything is written."""
    with pytest.raises(ValueError, match=message):
        simulate(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_capacity_is_what_fits(tmp_path):
    """A frame takes as many candidates as `capacity` returns."""
    assert capacity(256) == 16
    assert len(Loaded(simulate(tmp_path / "full", size=256, candidates=16)).alerts) == 16


def cut_and_fit(alert, planes):
    """Cut the planes with astropy, fit as enrichment does, and judge."""
    centre = math.floor(alert["x"] + 0.5), math.floor(alert["y"] + 0.5)
    names = {"science": "image", "convolved": "convolved", "error": "err", "mask": "mask"}
    cutout = {
        key: Cutout2D(planes[name], centre, 63, mode="partial", fill_value=1 if name == "mask" else np.nan).data
        for name, key in names.items()
    }
    inner = max(math.ceil(2 * alert["fwhm"]) | 1, 7)
    if not adjust_cutout(cutout, max_shift=1, max_scale=1.1, inner=inner):
        return cutout["meta"] | {"adjust_artefact": None}
    return cutout["meta"] | {"adjust_artefact": is_artefact(cutout["meta"])}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    found = Loaded(simulate(tmp_path_factory.mktemp("judged"), size=1024, candidates=440, seed=11))
    inside = [a for a in found.alerts if found.truth_of(a)["case"] not in ("over the edge", "off the frame")]
    results = {alert["alertId"]: cut_and_fit(alert, found.frame_of(alert)) for alert in inside}
    return found.truth[[name in results for name in found.truth["alertId"]]], results


@pytest.mark.slow
def test_fit_recovers_the_injected_shifts_and_scales(judged):
    """The fit recovers shifts of dipoles to 0.05 pixel without bias, and scales to 1 %."""
    figures = recovery(*judged)
    assert figures["dipoles"] > 50
    assert figures["scale_errors"] > 15
    assert figures["shift"] < 0.05
    assert abs(figures["dx_bias"]) < 0.01
    assert abs(figures["dy_bias"]) < 0.01
    assert figures["scale"] < 0.01


def called(table, kind, *bins):
    rows = table[(table["class"] == kind) & np.isin(table["snr"], bins)]
    assert rows["number"].sum() >= 20
    return rows["artefact"].sum() / rows["number"].sum(), rows["stdweb"].sum() / rows["number"].sum()


@pytest.mark.slow
def test_verdicts_on_the_night(judged):
    """Dipoles and scale errors are called artefacts, transients are not; STDWeb's rule alone loses faint transients."""
    table = confusion(*judged)
    assert set(BINNED) < set(table["class"])
    ours, theirs = called(table, "transient-sky", "below 5", "5 to 10")
    assert ours <= 0.03
    assert theirs > 0.2
    assert called(table, "transient-sky", "10 to 20", "20 and more")[0] <= 0.02
    assert called(table, "transient-galaxy", "5 to 10")[0] <= 0.35
    assert called(table, "transient-galaxy", "20 and more")[0] <= 0.08
    assert called(table, "dipole", "10 to 20", "20 and more")[0] >= 0.95
    assert called(table, "scale-error", "10 to 20", "20 and more")[0] >= 0.95
