"""The table of verdicts against the truth."""

import math

import pytest
from astropy.table import Table

from stampworker.simulation.confusion import confusion, format_confusion, recovery, stdweb_rule

FIT = {"adjust_chi2_0": 100.0, "adjust_chi2": 50.0, "adjust_pval": 0.5, "adjust_scale": 1.0}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, True),
        ({"adjust_pval": 0.01}, False),
        ({"adjust_pval": 0.0, "adjust_chi2": 32.9}, True),
        ({"adjust_pval": 0.0, "adjust_chi2": 33.0}, False),
        ({"adjust_scale": 1.2}, False),
        ({"adjust_scale": 0.8}, False),
        ({"adjust_scale": 1.19}, True),
        ({"adjust_chi2": None}, False),
    ],
)
def test_stdweb_rule(changes, verdict):
    """A p-value above 0.01 or chi2 below a third, with the scale inside 0.8 to 1.2; no fit, no artefact."""
    assert stdweb_rule(FIT | changes) is verdict


@pytest.fixture
def truth():
    rows = [
        ("a", "dipole", 12.0, 0.3, -0.1, 1.0),
        ("b", "dipole", 15.0, 0.5, 0.2, 1.0),
        ("c", "dipole", 7.0, 0.5, 0.2, 1.0),
        ("d", "transient-sky", 5.0, math.nan, math.nan, math.nan),
        ("e", "masked", math.nan, math.nan, math.nan, math.nan),
        ("f", "scale-error", 30.0, 0.0, 0.0, 1.05),
    ]
    return Table(rows=rows, names=("alertId", "class", "snr", "dx", "dy", "scale"))


@pytest.fixture
def results():
    fitted = FIT | {"adjust_dx": 0.0, "adjust_dy": 0.0}
    return {
        "a": fitted | {"adjust_dx": 0.33, "adjust_dy": -0.14, "adjust_artefact": True},
        "b": fitted | {"adjust_dx": 0.5, "adjust_dy": 0.3, "adjust_artefact": False},
        "c": fitted | {"adjust_artefact": True},
        "d": fitted | {"adjust_artefact": False},
        "e": {"adjust_artefact": None},
        "f": fitted | {"adjust_scale": 1.03, "adjust_artefact": True},
    }


def test_counts_by_class_and_bin(truth, results):
    """Verdicts are counted by class and S/N; a bin holds its lower edge; classes without S/N are one row."""
    assert [tuple(row) for row in confusion(truth, results)] == [
        ("transient-sky", "5 to 10", 1, 1, 0, 1),
        ("dipole", "5 to 10", 1, 1, 1, 1),
        ("dipole", "10 to 20", 2, 2, 1, 2),
        ("scale-error", "20 and more", 1, 1, 1, 1),
        ("masked", "all", 1, 0, 0, 0),
    ]


def test_missing_result_is_an_error(truth, results):
    """A candidate without a result is an error."""
    del results["c"]
    with pytest.raises(KeyError, match="c"):
        confusion(truth, results)


def test_text_is_an_aligned_table(truth, results):
    """The text is a Markdown table with aligned columns and shares in per cent."""
    lines = format_confusion(confusion(truth, results)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("-", "").replace(" ", "") == "|||:|:|:|:|"
    assert lines[4].split("|")[1:-1] == [
        " dipole          ",
        " 10 to 20    ",
        "          2 ",
        "      2 ",
        "      50.0 % ",
        "             100.0 % ",
    ]


def test_recovery_is_of_strong_residuals(truth, results):
    """Shifts are compared for dipoles above the S/N limit, scales for scale errors."""
    figures = recovery(truth, results)
    assert figures["dipoles"] == 2
    assert figures["shift"] == pytest.approx((0.05 + 0.1) / 2)
    assert figures["dx_bias"] == pytest.approx(0.015)
    assert figures["dy_bias"] == pytest.approx((0.1 - 0.04) / 2)
    assert figures["scale"] == pytest.approx(0.02)
    assert recovery(truth, results, min_snr=7)["dipoles"] == 3


def test_recovery_of_nothing_is_nan(truth, results):
    """The figures are NaN if there is nothing to compare."""
    figures = recovery(truth, results, min_snr=1000)
    assert figures["dipoles"] == 0
    assert math.isnan(figures["shift"])
    assert math.isnan(figures["scale"])
