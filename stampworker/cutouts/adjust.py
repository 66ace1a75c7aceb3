"""Fit the convolved template to the image by a small shift, a scale and, on demand, one background offset.

``adjust_cutout`` is the public function. The work is done by a core, a function from arrays to numbers: ``fit_numpy``
below is its specification and runs everywhere; ``core/*.c`` do the same faster where they could be compiled. ``CORE``
says which is used.

How the minimum is found
------------------------
A cubic spline moved by a constant is a sum of its coefficients with weights that depend on the shift alone. So the
moved template is a weighted sum of (2 ceil(max_shift) + 3)² planes, the coefficients moved by whole pixels, and chi2
is a quadratic form in those weights: with the weighted Gram matrix of the planes and their projections on the image at
hand, chi2 and its exact derivatives cost the same at every shift, whatever the size of the stamp. Scale and offset
follow in closed form within their bounds. ``search.py`` finds the shift of the lowest chi2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import compress
from math import ceil, floor, inf, isfinite, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve, maximum_filter
from scipy.special import chdtrc

from stampworker.cutouts.search import Minimum, QuadraticForm, bspline_weights, global_minimum, reach_of

_compiled: Callable[..., tuple[Any, ...]] | None
try:
    from stampworker.cutouts._adjust import fit as _compiled
except ImportError:  # installed without a compiler
    _compiled = None

Plane = NDArray[Any]
Floats = NDArray[np.float64]

NATIVE = (np.dtype(np.float32), np.dtype(np.float64))
LARGEST_SHIFT = 16  # the Gram matrix grows with the fourth power: 1225² at 16 pixels
LARGEST_SCALE = 1000  # the template's square is rounded, and chi2 to that times the square of the scale
HUGE = 1e50  # float64 values beyond it, and errors below its inverse, would overflow when squared; no float32 is
FLAT = 1e-6  # a template that varies by less than this part of its values is constant: 16 times the rounding of float32
FILL_LAYERS = 3  # rings of pixels around good ones that are filled; an error falls to 0.27 of it a pixel, 0.27³ = 2 %
BLOCK = 1 << 21  # bytes of weighted planes at a time: few enough to stay in a cache, enough for few calls

PARAMETERS = ("dx", "dy", "scale")


class Fit(NamedTuple):
    """What a core returns: numbers in the planes' units, pixels and chi2.

    ``failure`` is empty for a fit. Errors are NaN where there are none; ``at_bound`` names parameters.
    """

    failure: str
    npix: int = 0
    at_bound: str = ""
    bg: float = 0.0
    tbg: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    chi2_0: float = 0.0
    chi2: float = 0.0
    dx_err: float = np.nan
    dy_err: float = np.nan
    scale_err: float = np.nan
    bg_err: float = np.nan


METRICS = tuple(f"adjust_{name}" for name in Fit._fields[3:])


def adjust_cutout(
    cutout: dict[str, Any],
    max_shift: float = 2,
    max_scale: float = 1.1,
    inner: float | None = None,
    normalize: bool = False,
    fit_bg: bool = False,
    verbose: bool | Callable[..., Any] = False,
) -> bool:
    """Fit shift and scale of the convolved template to the image: the global minimum of chi2 within the bounds.

    Minimises the sum over the fitted pixels of
    ``((image - bg - scale * (shift(convolved, dx, dy) - tbg)) / err)²``. All shifts within the bounds are searched; on
    rare stamps with several minima a slightly lower one is missed (`search.global_minimum` says how rare).

    Parameters
    ----------
    cutout : dict
        As ``get_cutout`` makes it. Planes ``image``, ``convolved`` and ``err``, shape (ny, nx), any real dtype, in the
        same units, and optionally ``mask``, where anything but 0 is bad. On success the plane ``adjusted`` is added.
        ``meta`` receives the results below; results of an earlier fit are removed first.
    max_shift : float, optional
        Bound of ``|dx|`` and of ``|dy|``, pixels, 0 to 16.
    max_scale : float, optional
        ``scale`` is kept within ``1 / max_scale`` and ``max_scale``, 1 to 1000.
    inner : float, optional
        Fit only the pixels of a central box of this width, pixels: those with ``|x - nx/2 + 0.5| <= inner / 2`` and
        the same in y. None or 0: the whole stamp. The backgrounds are always estimated from the whole stamp.
    normalize : bool, optional
        Divide ``adjusted`` by ``err``.
    fit_bg : bool, optional
        Fit one background offset too; ``adjust_bg`` carries it and ``adjust_tbg`` stays the estimate, since only
        ``bg - scale * tbg`` can be told.
    verbose : bool or callable, optional
        Print, or hand to the callable, a line about the result.

    Returns
    -------
    bool
        True where there is a fit. ``meta["adjust_status"]`` says which kind: ``ok``, or ``at_bound`` where the minimum
        is at a bound; and after False why: ``no_signal`` (the template is constant) or ``too_few_pixels`` (fewer
        usable pixels than parameters plus one).

    Raises
    ------
    KeyError
        A plane is missing.
    ValueError
        A plane is not 2-D, not of real numbers or not of the image's shape, or an argument is out of its range; the
        message names it.

    Notes
    -----
    Written to ``meta`` as Python numbers, strings or None:

    - ``adjust_dx``, ``adjust_dy``: the shift applied to the template, pixels, along columns (x) and rows (y);
      ``adjust_scale``; ``adjust_bg``, ``adjust_tbg``: backgrounds of image and template, by default the estimates
      2.5 median - 1.5 mean of the unmasked finite pixels.
    - ``adjust_chi2`` at the minimum and ``adjust_chi2_0`` at no shift, scale 1 and the estimated backgrounds, over the
      same pixels; ``adjust_df``: pixels less parameters (dx, dy, scale, with ``fit_bg`` an
      offset; none whose bounds leave it no room); ``adjust_pval``: the chance of a
      larger chi2.
    - ``adjust_dx_err``, ``adjust_dy_err``, ``adjust_scale_err``, ``adjust_bg_err``: one sigma, from the curvature of
      chi2 at the minimum, all free parameters together; None for a parameter at a bound, one not fitted, or where the
      data do not determine it. They account for ``err`` as independent noise of the image, not for noise of the
      template. Without ``fit_bg`` the estimated backgrounds count as known; stars bias the estimates, and with them
      the scale.
    - ``adjust_status``, and ``adjust_bound``: the parameters at a bound, such as ``"dx"`` or ``"dy,scale"``, else None.

    The shift is the interpolation by cubic B-splines with mirrored edges of ``scipy.ndimage.shift(order=3,
    mode='reflect')``. Pixels that are masked, not finite, or whose ``err`` is not above 0 leave the fit. A template
    pixel that is masked or not finite is filled from its neighbours, and takes out every pixel within
    ``ceil(max_shift) + 1`` in x and y: those whose sum can hold its spline coefficient. Farther pixels feel only the
    tail of the prefilter, at most 4 % of the error of the filled value. The set of fitted pixels does not depend on
    the shift.

    ``adjusted`` is ``image - bg - scale * shift(convolved - tbg)`` on the whole stamp, in the image's dtype where that
    is float32, else float64. It is NaN where image or template is not finite and, with ``normalize``, where ``err`` is
    not above 0; at masked pixels it is the image less the filled template.

    The method is that of ``adjust_cutout`` in STDPipe (S. Karpov, https://github.com/karpov-sv/stdpipe); splines:
    Unser, Aldroubi & Eden 1993, IEEE Trans. Signal Process. 41, 821.

    Examples
    --------
    A star on the image that is moved and 5 % brighter than on the template:

    >>> import numpy as np
    >>> y, x = np.mgrid[-15:16, -15:16]
    >>> template = 1000 * np.exp(-(x**2 + y**2) / 8)
    >>> image = 1050 * np.exp(-((x - 0.3) ** 2 + (y + 0.2) ** 2) / 8)
    >>> cutout = {"image": image, "convolved": template, "err": np.full(image.shape, 10.0)}
    >>> adjust_cutout(cutout)
    True
    >>> meta = cutout["meta"]
    >>> print(f"{meta['adjust_dx']:.2f} {meta['adjust_dy']:.2f} {meta['adjust_scale']:.2f}")
    0.30 -0.20 1.05
    """
    image, template, err, mask = planes_of(cutout)
    check_arguments(max_shift, max_scale, inner)
    meta = cutout.setdefault("meta", {})
    for key in [key for key in meta if isinstance(key, str) and key.startswith("adjust_")]:
        del meta[key]
    cutout.pop("adjusted", None)
    adjusted = np.empty(image.shape, np.float32 if image.dtype == np.float32 else np.float64)
    fit = core(image, template, err, mask, inner or 0.0, max_shift, max_scale, bool(fit_bg), bool(normalize), adjusted)
    if fit.failure:
        meta["adjust_status"] = fit.failure
        _say(verbose, f"no adjustment: {fit.failure}, {fit.npix} usable pixels")
        return False
    _report(meta, fit, fit.npix - _parameters(max_shift, max_scale, fit_bg))
    cutout["adjusted"] = adjusted
    if verbose:
        _say(
            verbose,
            f"adjustment: dx {fit.dx:.3f} dy {fit.dy:.3f} scale {fit.scale:.4f} bg {fit.bg:.4g} tbg {fit.tbg:.4g}, "
            f"chi2 {fit.chi2_0:.2f} -> {fit.chi2:.2f}, df {meta['adjust_df']}, p {meta['adjust_pval']:.2g}, "
            f"{meta['adjust_status']}",
        )
    return True


def planes_of(cutout: Mapping[str, Any]) -> tuple[Plane, Plane, Plane, Plane | None]:
    """Image, template, err as contiguous native float32 or float64, and the mask as bytes or None."""
    planes: list[Plane] = []
    for name in ("image", "convolved", "err"):
        if cutout.get(name) is None:
            raise KeyError(f"the cutout has no plane {name!r}")
        plane = np.asarray(cutout[name]) if type(cutout[name]) is np.ndarray else _array(name, cutout[name])
        _check_shape(name, plane, planes[0].shape if planes else None)
        if plane.dtype not in NATIVE or not plane.flags.c_contiguous:
            if plane.dtype.kind not in "fiub":
                raise ValueError(f"plane {name!r} has dtype {plane.dtype}, wanted real numbers")
            plane = np.ascontiguousarray(plane, np.float32 if plane.dtype.str[1:] == "f4" else np.float64)
        planes.append(plane)
    mask = cutout.get("mask")
    if mask is not None:
        mask = mask if type(mask) is np.ndarray else np.ma.filled(mask, 1)
        _check_shape("mask", mask, planes[0].shape)
        mask = np.ascontiguousarray(mask if mask.dtype == bool else mask != 0).view(np.uint8)
    return planes[0], planes[1], planes[2], mask


def _array(name: str, plane: Any) -> Plane:
    """Return an array; what a masked array has masked is no number."""
    if isinstance(plane, np.ma.MaskedArray) and plane.dtype.kind in "fiub":
        return np.ma.filled(plane.astype(np.result_type(plane.dtype, np.float32)), np.nan)
    try:
        return np.asarray(plane)
    except ValueError as exc:  # rows of different lengths
        raise ValueError(f"plane {name!r}: {exc}") from exc


def _check_shape(name: str, plane: Plane, wanted: tuple[int, ...] | None) -> None:
    if plane.ndim != 2 or plane.size == 0:
        raise ValueError(f"plane {name!r} has shape {plane.shape}, wanted two axes of at least one pixel")
    if wanted is not None and plane.shape != wanted:
        raise ValueError(f"plane {name!r} has shape {plane.shape}, plane 'image' {wanted}")


def check_arguments(max_shift: float, max_scale: float, inner: float | None) -> None:
    """Raise the ValueError that names an argument out of its range."""
    for name, value, least, most, wanted in (
        ("max_shift", max_shift, 0, LARGEST_SHIFT, f"0 to {LARGEST_SHIFT}"),
        ("max_scale", max_scale, 1, LARGEST_SCALE, f"1 to {LARGEST_SCALE}"),
        ("inner", inner or 0, 0, inf, "None or at least 0"),
    ):
        try:
            if least <= value <= most:
                continue
        except (TypeError, ValueError):
            pass
        raise ValueError(f"{name} is {value!r}, wanted {wanted}")


def _parameters(max_shift: float, max_scale: float, fit_bg: bool) -> int:
    """Count what is fitted: a bound that leaves no room leaves no parameter."""
    return 2 * (max_shift > 0) + (max_scale > 1) + bool(fit_bg)


def _report(meta: dict[str, Any], fit: Fit, df: int) -> None:
    meta.update(adjust_df=df, adjust_pval=float(chdtrc(df, fit.chi2)))
    meta.update(zip(METRICS, [value if isfinite(value) else None for value in fit[3:]], strict=True))
    meta.update(adjust_status="at_bound" if fit.at_bound else "ok", adjust_bound=fit.at_bound or None)


def _say(verbose: bool | Callable[..., Any], line: str) -> None:
    if verbose:
        (verbose if callable(verbose) else print)(line)


# The numpy core.


def fit_numpy(
    image: Plane,
    template: Plane,
    err: Plane,
    mask: NDArray[np.uint8] | None,
    inner: float,
    max_shift: float,
    max_scale: float,
    fit_bg: bool,
    normalize: bool,
    adjusted: Plane,
) -> Fit:
    """Fit, and fill ``adjusted``: the specification of a core.

    The planes have one shape (ny, nx) and are contiguous; those of numbers are native float32 or float64. The mask is 0
    where a pixel is good. ``inner`` is 0 for the whole stamp; the other arguments are those of ``adjust_cutout``.
    """
    reach = reach_of(max_shift)
    image, template, err = (plane.astype(np.float64, copy=False) for plane in (image, template, err))
    good_image, good_template = _good(image, mask), _good(template, mask)
    box, root = _root_weights(err, good_image, good_template, inner, reach)
    npix = int(np.count_nonzero(root))
    if npix <= _parameters(max_shift, max_scale, fit_bg):
        return Fit("too_few_pixels", npix)
    if _flat(template, good_template, box, reach):
        return Fit("no_signal", npix)
    bg, tbg = _background(image, good_image), _background(template, good_template)
    undefined: Any = ()  # mostly every pixel is good, and indexing with a plane of flags takes a while
    residual = image - bg
    if not (good_image.all() and good_template.all()):
        undefined = ~(np.abs(image) < HUGE) | ~(np.abs(template) < HUGE)
        residual[undefined] = 0.0
    template = _filled(template, good_template, tbg) - tbg
    padded = _prefilter(image.shape[0], reach) @ template @ _prefilter(image.shape[1], reach).T
    weighted = residual[box] * root
    form = _quadratic_form(padded, weighted, root, box, reach, fit_bg)
    best = global_minimum(form, max_shift, max_scale)
    after, bg_offset, template_sums = (
        residual - best.scale * _moved(padded, best.u, best.v, reach),
        0.0,
        (0.0, 0.0, 0.0),
    )
    if fit_bg:
        template_sums = form.template_sums(best.u, best.v)
        bg_offset = form.image_mean - best.scale * form.template_mean
        bg_offset += (form.image_sum - best.scale * template_sums[0]) / form.weight_sum
        after -= bg_offset
    chi2_0, chi2 = _square(weighted - template[box] * root), _square(after[box] * root)
    if normalize:
        np.divide(after, err, out=after, where=_usable(err))
        after[~_usable(err)] = np.nan
    if len(undefined):
        after[undefined] = np.nan
    adjusted[:] = after
    sums = (form.weight_sum, form.template_mean, template_sums)
    return _fit_of(max_shift, fit_bg, npix, (bg, bg_offset, tbg, chi2_0, chi2), best, sums)


def fitted_pixels(
    image: Plane, template: Plane, err: Plane, mask: NDArray[np.uint8] | None, inner: float, max_shift: float
) -> tuple[tuple[slice, slice], Floats]:
    """Return the fitted box as slices (y, x), and 1 / err² in it, 0 for pixels that leave the fit."""
    image, template, err = (plane.astype(np.float64, copy=False) for plane in (image, template, err))
    box, root = _root_weights(err, _good(image, mask), _good(template, mask), inner, reach_of(max_shift))
    return box, root * root


def _good(plane: Floats, mask: NDArray[np.uint8] | None) -> NDArray[np.bool_]:
    """Return where a plane has a usable value."""
    good: NDArray[np.bool_] = np.abs(plane) < HUGE
    return good if mask is None else good & (mask == 0)


def _square(plane: Floats) -> float:
    """Sum of squares, of any size without a warning."""
    return float(np.vdot(plane, plane))


def _usable(err: Floats) -> NDArray[np.bool_]:
    return (err > 1 / HUGE) & (err < HUGE)


def _root_weights(
    err: Floats, good_image: NDArray[np.bool_], good_template: NDArray[np.bool_], inner: float, reach: int
) -> tuple[tuple[slice, slice], Floats]:
    """Return the box as slices (y, x), and 1 / err in it, 0 for pixels that leave the fit."""
    box = (_span(err.shape[0], inner), _span(err.shape[1], inner))
    use = _usable(err[box]) & good_image[box]
    if not good_template.all():
        use &= ~maximum_filter(~good_template, 2 * reach + 1, mode="constant")[box]
    return box, 1 / np.where(use, err[box], np.inf)


def _span(size: int, inner: float) -> slice:
    """Pixels of one axis with ``|x - size / 2 + 0.5| <= inner / 2``."""
    if not inner or inner >= size:
        return slice(0, size)
    return slice(ceil((size - 1 - inner) / 2), floor((size - 1 + inner) / 2) + 1)


def _background(plane: Floats, good: NDArray[np.bool_]) -> float:
    """SExtractor's estimate of the mode (Bertin & Arnouts 1996, A&AS 117, 393)."""
    values = _chosen(plane, good)
    middle = [(values.size - 1) // 2, values.size // 2]
    median = np.partition(values, middle)[middle].mean()  # numpy.median looks for NaN too
    return float(2.5 * median - 1.5 * values.mean())


def _chosen(plane: Floats, good: NDArray[np.bool_]) -> Floats:
    """Return the good pixels of a plane; mostly that is all of them, and choosing them takes longer than the test."""
    return plane.ravel() if good.all() else plane[good]


def _flat(template: Floats, good: NDArray[np.bool_], box: tuple[slice, slice], reach: int) -> bool:
    """Return True if the template is constant wherever the fit reads it."""
    reached = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
    values = _chosen(template[reached], good[reached])
    low, high = values.min(), values.max()
    return bool(high - low <= FLAT * max(abs(low), abs(high)))


def _filled(template: Floats, good: NDArray[np.bool_], value: float) -> Floats:
    """Fill bad pixels from their neighbours, ring by ring, and beyond a few rings with ``value``."""
    if good.all():
        return template
    values, known, window = np.where(good, template, 0.0), good.astype(float), np.ones((3, 3))
    for _ in range(FILL_LAYERS):
        total, count = (convolve(plane, window, mode="constant") for plane in (values, known))
        new = (known == 0) & (count > 0)
        values[new] = total[new] / count[new]
        known[new] = 1.0
    return np.where(known > 0, values, value)


@lru_cache(maxsize=16)
def _prefilter(size: int, reach: int) -> Floats:
    """Return what turns an axis of pixels into coefficients, with ``reach`` more at either end: (size + 2 reach, size).

    Ends are mirrored about the outermost pixels' outer edges.
    """
    spline = (4 * np.eye(size) + np.eye(size, k=1) + np.eye(size, k=-1)) / 6
    spline[0, 0] += 1 / 6
    spline[-1, -1] += 1 / 6
    index = np.arange(-reach, size + reach) % (2 * size)
    inverse = np.asarray(np.linalg.inv(spline), np.float64)
    return inverse[np.minimum(index, 2 * size - 1 - index)]


def _quadratic_form(
    padded: Floats, weighted: Floats, root: Floats, box: tuple[slice, slice], reach: int, fit_bg: bool
) -> QuadraticForm:
    """Gram matrix and projections of the moved planes, in blocks of rows that stay in the cache.

    ``weighted`` and ``root`` are the residual image over its errors, and 1 / err, in the box.
    """
    ny, nx = root.shape
    size = 2 * reach + 1
    weight_sum = image_mean = template_mean = 0.0
    if fit_bg:
        unmoved = padded[reach:, reach:][box]
        weight_sum = _square(root)
        image_mean = float(np.vdot(weighted, root)) / weight_sum
        template_mean = float(np.vdot(unmoved * root, root)) / weight_sum
        weighted, padded = weighted - image_mean * root, padded - template_mean
    # sliding_window_view makes the same views, in the time of a third of the form of a small box.
    first_pixel = box[0].start * padded.strides[0] + box[1].start * padded.strides[1]
    views = np.ndarray((size, size, ny, nx), np.float64, padded, first_pixel, padded.strides + padded.strides)
    count = size * size
    rows = ceil(ny / ceil(8 * (count + 1) * ny * nx / BLOCK))
    memory = np.empty((count + 1, rows, nx))
    total, sums = np.zeros((count + 1, count + 1)), np.zeros(count + 1)
    for first in range(0, ny, rows):
        some = root[first : first + rows]
        block = memory[:, : len(some)]
        np.multiply(views[:, :, first : first + rows], some, out=block[:-1].reshape(size, size, *some.shape))
        block[-1] = weighted[first : first + rows]
        flat = block.reshape(count + 1, -1)
        total += flat @ flat.T
        if fit_bg:
            sums += flat @ some.ravel()
    if fit_bg:  # what remains after the best offset
        total -= np.outer(sums, sums / weight_sum)
    gram, projection = total[:-1, :-1].reshape(size, size, size, size), total[:-1, -1].reshape(size, size)
    squares = (float(total[-1, -1]), float(sums[-1]), weight_sum, image_mean, template_mean)
    return QuadraticForm(gram, projection, sums[:-1].reshape(size, size), *squares, reach)


def _fit_of(
    max_shift: float, fit_bg: bool, npix: int, numbers: tuple[float, ...], best: Minimum, sums: tuple[Any, ...]
) -> Fit:
    """Return what a core has found, with bounds and errors; ``sums`` are those of ``_errors``."""
    bg, bg_offset, tbg, chi2_0, chi2 = numbers
    held = (abs(best.u) >= max_shift, abs(best.v) >= max_shift, best.scale_at_bound)
    at_bound = ",".join(compress(PARAMETERS, held))
    errors = _errors(best, [not bound for bound in held], fit_bg, sums)
    return Fit("", npix, at_bound, bg + bg_offset, tbg, 0.0 - best.u, 0.0 - best.v, best.scale, chi2_0, chi2, *errors)


def _errors(
    best: Minimum, free: list[bool], fit_bg: bool, sums: tuple[float, float, tuple[float, float, float]]
) -> tuple[float, float, float, float]:
    """One sigma of dx, dy, scale and bg from the curvature of chi2; NaN at a bound or where it is not positive.

    The hessian is that of chi2 with scale and offset at their best, so twice its inverse is the covariance of the
    shifts. Scale and offset add the variance they have at a fixed shift. ``sums`` are those of the weights, of the
    template's mean and of the moved template.
    """
    free_u, free_v, free_scale = free
    weight_sum, template_mean, template_sums = sums
    size = max(map(abs, best.hessian))
    size = size if 0 < size < inf else inf
    huu, hvv = best.hessian[0] / size if free_u else 1.0, best.hessian[2] / size if free_v else 1.0
    huv = best.hessian[1] / size if free_u and free_v else 0.0
    determinant = huu * hvv - huv * huv
    if not (huu > 0 and hvv > 0 and determinant > 1e-12 * huu * hvv):
        return nan, nan, nan, nan
    divisor = determinant * size / 2
    cuu, cuv, cvv = free_u * hvv / divisor, -huv / divisor, free_v * huu / divisor

    def carried(by_u: float, by_v: float) -> float:
        return by_u * by_u * cuu + 2 * by_u * by_v * cuv + by_v * by_v * cvv

    own = 1 / best.square if free_scale else 0.0
    scale_err = sqrt(own + carried(*best.scale_slope)) if free_scale else nan
    bg_err = nan
    if fit_bg:
        by_scale = -template_mean - template_sums[0] / weight_sum
        by_u, by_v = (
            by_scale * slope - best.scale * total / weight_sum
            for slope, total in zip(best.scale_slope, template_sums[1:], strict=True)
        )
        bg_err = sqrt(1 / weight_sum + by_scale * by_scale * own + carried(by_u, by_v))
    return sqrt(cuu) if free_u else nan, sqrt(cvv) if free_v else nan, scale_err, bg_err


def _moved(padded: Floats, u: float, v: float, reach: int) -> Floats:
    """Move the spline by -u in x and -v in y, shape (ny, nx)."""
    row, along = bspline_weights(v, reach)
    column, across = bspline_weights(u, reach)
    ny, nx = padded.shape[0] - 2 * reach, padded.shape[1] - 2 * reach
    rows = sum(weight * padded[row + i : row + i + ny] for i, weight in enumerate(along[0]))
    # A sum that runs on from row to row is faster; the columns where it does so are not used.
    flat = np.correlate(np.ravel(rows), across[0])
    return np.ndarray((ny, nx), np.float64, flat, column * flat.itemsize, padded.strides)


def fit_compiled(*args: Any) -> Fit:
    """Fit as ``fit_numpy`` does, in C: the same arguments, the same answer to rounding, and errors to 1e-5 of them."""
    if _compiled is None:
        raise ImportError("stampworker.cutouts._adjust was not compiled")
    failure, npix, *found = _compiled(*args)
    if failure:
        return Fit(failure, npix)
    numbers, best, sums = found
    return _fit_of(args[5], args[7], npix, numbers, Minimum(*best), sums)


core: Callable[..., Fit] = fit_compiled if _compiled else fit_numpy
CORE = "c" if _compiled else "numpy"
