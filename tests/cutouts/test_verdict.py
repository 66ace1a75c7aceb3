"""The verdict asks two things: the fit explains the residual, and it was needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stampworker.cutouts import adjust_cutout, compare_point_source, is_artefact


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
    assert not is_artefact(fitted(), min_delta_chi2=460.0)


def test_point_source_that_explains_it_better_is_no_artefact() -> None:
    """Where a point source beats the adjustment clearly, the candidate is a transient."""
    assert not is_artefact(fitted(point_delta_chi2=13.0))
    assert is_artefact(fitted(point_delta_chi2=11.0))
    assert is_artefact(fitted(point_delta_chi2=13.0), max_point_delta_chi2=15.0)


def disc(x: float, y: float, width: float) -> Any:
    """Return a round profile of unit height on 31 × 33 pixels."""
    yy, xx = np.mgrid[0:31, 0:33]
    return np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * width**2))


def cutout_of(image: Any, template: Any, **meta: float) -> dict[str, Any]:
    """Return a cutout with noise of 1 around a background of 20."""
    noise = np.random.default_rng(8).normal(0, 1, image.shape)
    return {"image": image + 20 + noise, "convolved": template + 10, "err": np.ones(image.shape), "meta": meta}


def test_transient_on_a_galaxy_is_a_point_source() -> None:
    """A galaxy that moves and brightens imitates a transient on it; a point source at the right place fits better."""
    galaxy = 300 * disc(17.0, 15.5, 3.5)
    cutout = cutout_of(galaxy + 12 * disc(16.4, 14.8, 1.3), galaxy, x=716.4, y=14.8)
    assert adjust_cutout(cutout, max_shift=1, inner=9)
    assert is_artefact(cutout["meta"], chi2_ratio=0.99)
    gain = compare_point_source(cutout, 3.06, max_shift=1, inner=9)
    assert gain is not None
    assert gain > 6
    assert cutout["meta"]["adjust_point_delta_chi2"] == gain
    assert not is_artefact(cutout["meta"], chi2_ratio=0.99)
    assert gain > (compare_point_source({**cutout, "meta": {"x": 16.0, "y": 15.0}}, 3.06, max_shift=1, inner=9) or 0)


def test_dipole_is_no_point_source() -> None:
    """The shift of a star is explained by the shift, and stays an artefact."""
    cutout = cutout_of(300 * disc(16.3, 15.2, 1.5), 300 * disc(16.0, 15.0, 1.5), x=16.0, y=15.0)
    assert adjust_cutout(cutout, max_shift=1, inner=9)
    gain = compare_point_source(cutout, 3.5, max_shift=1, inner=9)
    assert gain is not None
    assert gain < -100
    assert is_artefact(cutout["meta"])


def test_no_comparison_without_a_fit() -> None:
    """A constant template cannot be weighed: None, and nothing stays in meta."""
    cutout = cutout_of(300 * disc(16.0, 15.0, 1.5), np.zeros((31, 33)), adjust_point_delta_chi2=3.0)
    assert compare_point_source(cutout, 3.5) is None
    assert "adjust_point_delta_chi2" not in cutout["meta"]
    with pytest.raises(ValueError, match=r"fwhm is nan"):
        compare_point_source(cutout, float("nan"))


def test_no_fit_is_said() -> None:
    """Without a fit there is no verdict."""
    with pytest.raises(KeyError, match="adjust_chi2"):
        is_artefact({"adjust_status": "no_signal"})


def test_weighing_wants_what_the_fit_wants() -> None:
    """Arguments out of range are named as by adjust_cutout; a cutout needs no meta."""
    cutout = cutout_of(300 * disc(16.3, 15.2, 1.5), 300 * disc(16.0, 15.0, 1.5))
    for name, value in (("max_shift", 99), ("max_shift", -1), ("max_scale", 0.5), ("inner", -3), ("max_scale", np.nan)):
        with pytest.raises(ValueError, match=rf"{name} is {value}, wanted"):
            compare_point_source(cutout, 3.0, **{name: value})
    for fwhm in ("3", 0, np.inf, None):
        with pytest.raises(ValueError, match=r"fwhm is .*, wanted more than 0 pixels"):
            compare_point_source(cutout, fwhm)  # type: ignore[arg-type]
    del cutout["meta"]
    assert compare_point_source(cutout, 3.0) == cutout["meta"]["adjust_point_delta_chi2"]
