"""The verdict asks two things: the fit explains the residual, and it was needed."""

from __future__ import annotations

from typing import Any

import pytest

from stampworker.cutouts import is_artefact


def fitted(**changes: float) -> dict[str, Any]:
    """Return the metrics of a clear dipole, but for the changes."""
    meta = {"adjust_chi2_0": 500.0, "adjust_chi2": 45.0, "adjust_pval": 0.5, "adjust_scale": 1.02}
    return {**meta, **{f"adjust_{key}": value for key, value in changes.items()}}


def test_dipole_is_an_artefact() -> None:
    """A large residual that vanishes is an artefact."""
    assert is_artefact(fitted())


def test_residual_that_stays_is_none() -> None:
    """A residual that stays significant and large is no artefact."""
    assert not is_artefact(fitted(chi2=300.0, pval=1e-20))


def test_much_smaller_residual_is_an_artefact_even_if_significant() -> None:
    """Bright stars leave a significant remainder: a fall to less than a third suffices."""
    assert is_artefact(fitted(chi2=160.0, pval=1e-9))
    assert not is_artefact(fitted(chi2=170.0, pval=1e-9))


def test_faint_candidate_on_empty_sky_is_none() -> None:
    """Where there was little to explain, the adjustment was not needed and says nothing."""
    assert not is_artefact(fitted(chi2_0=60.0, chi2=45.0))


@pytest.mark.parametrize("scale", [0.8, 1.2, 0.5, 3.0])
def test_scale_out_of_range_is_none(scale: float) -> None:
    """A scale far from one is a change of flux and no artefact."""
    assert not is_artefact(fitted(scale=scale))


def test_thresholds_are_arguments() -> None:
    """Each threshold can be moved across the value that it judges."""
    assert not is_artefact(fitted(), p_value=0.6, chi2_ratio=0.05)
    assert not is_artefact(fitted(), min_scale=1.03)
    assert not is_artefact(fitted(), max_scale=1.01)
    assert not is_artefact(fitted(), needed=460.0)


def test_no_fit_is_said() -> None:
    """Without a fit there is no verdict."""
    with pytest.raises(KeyError, match="adjust_chi2"):
        is_artefact({"adjust_status": "no_signal"})
