"""The verdict on a fit: artefact of the subtraction or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_artefact(
    meta: Mapping[str, Any],
    *,
    p_value: float = 0.01,
    chi2_ratio: float = 0.33,
    min_scale: float = 0.8,
    max_scale: float = 1.2,
    needed: float = 16.3,
) -> bool:
    """Tell whether a small shift and scale of the template explain the candidate, so that it is an artefact.

    Two things are asked. The adjustment explains the residual: ``adjust_pval > p_value`` or
    ``adjust_chi2 < chi2_ratio * adjust_chi2_0``, with the scale within ``min_scale`` and ``max_scale``. And it was
    needed: ``adjust_chi2_0 - adjust_chi2 > needed``, else a faint transient on empty sky would be called an artefact
    for being faint.

    Parameters
    ----------
    meta : mapping
        ``meta`` of a cutout after ``adjust_cutout``, with its ``adjust_*`` entries.
    p_value : float, optional
        A fit with a larger p-value explains the residual.
    chi2_ratio : float, optional
        So does one whose chi2 is below this part of the chi2 before.
    min_scale, max_scale : float, optional
        Scales outside, or at, these are no artefact.
    needed : float, optional
        Least fall of chi2: three parameters of pure noise make 16.3 once in a thousand.

    Returns
    -------
    bool

    Raises
    ------
    KeyError
        ``meta`` has no fit.
    """
    chi2, chi2_0 = meta["adjust_chi2"], meta["adjust_chi2_0"]
    explained = meta["adjust_pval"] > p_value or chi2 < chi2_ratio * chi2_0
    return bool(explained and min_scale < meta["adjust_scale"] < max_scale and chi2_0 - chi2 > needed)
