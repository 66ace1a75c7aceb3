"""The verdict on a fit: artefact of the subtraction or not."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, isfinite
from numbers import Real
from typing import Any

import numpy as np

from stampworker.cutouts.adjust import check_arguments, core, fitted_pixels, planes_of

SIGMA_PER_FWHM = 0.42466  # of a Gaussian: 1 / sqrt(8 ln 2)


def is_artefact(
    meta: Mapping[str, Any],
    *,
    p_value: float = 0.01,
    chi2_ratio: float = 0.33,
    min_scale: float = 0.8,
    max_scale: float = 1.2,
    min_delta_chi2: float = 16.3,
    max_point_delta_chi2: float = 12.0,
) -> bool:
    """Return True if a small shift and scale of the template explain the candidate: then it is an artefact.

    An artefact meets three conditions:

    - The adjustment explains the residual: ``adjust_pval > p_value`` or ``adjust_chi2 < chi2_ratio * adjust_chi2_0``,
      and the scale is between ``min_scale`` and ``max_scale``.
    - The adjustment was needed: ``adjust_chi2_0 - adjust_chi2 > min_delta_chi2``. Without this condition a faint
      transient on empty sky would be an artefact because it is faint.
    - A point source does not explain it better: ``adjust_point_delta_chi2 <= max_point_delta_chi2``, where
      ``compare_point_source`` has set it. Without this condition a transient on a galaxy would be an artefact whenever
      a galaxy that moves and brightens imitates it.

    Parameters
    ----------
    meta : mapping
        ``meta`` of a cutout after ``adjust_cutout``, with its ``adjust_*`` entries.
    p_value : float, optional
        A fit with a larger p-value explains the residual.
    chi2_ratio : float, optional
        So does one whose chi2 is below this part of the chi2 before.
    min_scale, max_scale : float, optional
        With a scale at or beyond these, the candidate is no artefact.
    min_delta_chi2 : float, optional
        Least fall of chi2: three parameters of pure noise make 16.3 once in a thousand.
    max_point_delta_chi2 : float, optional
        A point source that lowers chi2 by more than this below the adjustment's speaks for a transient. The default is
        the least even number that costs none of the 3 328 dipoles and scale errors among 10 400 simulated candidates
        (``python tests/study.py --set verdict.max_point_delta_chi2=…``, seeds 11 to 13, of 2 600, 2 600 and 5 200).

    Returns
    -------
    bool
        True where the candidate meets all three conditions.

    Raises
    ------
    KeyError
        ``meta`` has no fit.

    Notes
    -----
    The first question is STDPipe's and STDWeb's (S. Karpov): p-value above 1e-5 or chi2 below 0.3 of chi2 before,
    scale within 0.8 and 1.2 in the documentation of STDPipe; p-value above 0.01 or chi2 below 0.33 in STDWeb, whose
    thresholds are the defaults here. ``tests/reference/verdict_study.py`` prints what each question is worth in
    simulated stamps.

    Examples
    --------
    >>> fit = {"adjust_chi2_0": 900.0, "adjust_chi2": 210.0, "adjust_pval": 0.35, "adjust_scale": 1.02}
    >>> is_artefact(fit)
    True

    It is none where a point source explains the candidate better:

    >>> is_artefact(fit | {"adjust_point_delta_chi2": 40.0})
    False
    """
    chi2, chi2_0 = meta["adjust_chi2"], meta["adjust_chi2_0"]
    explained = meta["adjust_pval"] > p_value or chi2 < chi2_ratio * chi2_0
    delta_chi2 = meta.get("adjust_point_delta_chi2")
    point = delta_chi2 is not None and delta_chi2 > max_point_delta_chi2
    return bool(
        explained and min_scale < meta["adjust_scale"] < max_scale and chi2_0 - chi2 > min_delta_chi2 and not point
    )


def compare_point_source(
    cutout: dict[str, Any],
    fwhm: float,
    *,
    max_shift: float = 2,
    max_scale: float = 1.1,
    inner: float | None = None,
) -> float | None:
    """Compare a point source at the candidate's place with the shift and scale of the template.

    Both models get a free background offset, so that an estimate spoilt by the wings of a bright star favours neither,
    and the same pixels. It costs about two fits, and ``is_artefact`` can do without: ask it of a candidate that would
    be an artefact.

    Parameters
    ----------
    cutout : dict
        As for ``adjust_cutout``. The source is a Gaussian in the pixel ``(nx // 2, ny // 2)``, at the fraction of a
        pixel that ``x`` and ``y`` of ``meta`` give. ``meta["adjust_point_delta_chi2"]`` is set, or removed where the
        template cannot be fitted.
    fwhm : float
        Of the star's profile on the science frame, pixels. An error of 40 % costs little.
    max_shift, max_scale, inner
        As given to ``adjust_cutout``.

    Returns
    -------
    float or None
        chi2 of template and offset (four parameters) less chi2 of point source and offset (two): above 0 where the
        point source is the better of the two. None where the template cannot be fitted.

    Raises
    ------
    KeyError, ValueError
        As in ``adjust_cutout``; ``ValueError`` also where ``fwhm`` is not above 0.
    """
    if not (isinstance(fwhm, Real) and isfinite(fwhm) and fwhm > 0):
        raise ValueError(f"fwhm is {fwhm!r}, wanted more than 0 pixels")
    check_arguments(max_shift, max_scale, inner)
    image, template, err, mask = planes_of(cutout)
    meta = cutout.setdefault("meta", {})
    meta.pop("adjust_point_delta_chi2", None)
    fit = core(image, template, err, mask, inner or 0.0, max_shift, max_scale, True, False, np.empty(image.shape))
    if fit.failure:
        return None
    box, weight = fitted_pixels(image, template, err, mask, inner or 0.0, max_shift)
    along, across = (
        np.exp(-0.5 * ((np.arange(size)[span] - size // 2 - _fraction(meta.get(name))) / (SIGMA_PER_FWHM * fwhm)) ** 2)
        for name, size, span in zip("yx", image.shape, box, strict=True)
    )
    use = weight > 0
    residual = (image[box].astype(float) - template[box])[use]
    profile, weight = np.outer(along, across)[use], weight[use]
    residual, profile = (plane - np.average(plane, weights=weight) for plane in (residual, profile))
    square = float((weight * profile**2).sum())
    fall = float((weight * profile * residual).sum()) ** 2 / square if square > 0 else 0.0
    delta_chi2 = fit.chi2 - (float((weight * residual**2).sum()) - fall)
    meta["adjust_point_delta_chi2"] = delta_chi2
    return delta_chi2


def _fraction(position: Any) -> float:
    """Return the distance of a position from the middle of its pixel, -0.5 to 0.5; 0 if it is not known."""
    try:
        position = float(position)
    except (TypeError, ValueError):
        return 0.0
    return position - floor(position + 0.5) if isfinite(position) else 0.0
