"""Fit the convolved template to the image by a small shift, a scale and, on demand, one background offset.

``adjust_cutout`` is the public function. The work is done by a core, a function from arrays to numbers: ``fit_numpy``
below is its specification and runs everywhere; ``_adjust.c`` does the same faster where it could be compiled. ``CORE``
says which is used.

How the global minimum is found
-------------------------------
A cubic spline moved by a constant is a sum of its coefficients with weights that depend on the shift alone. So the
moved template is a weighted sum of (2 ceil(max_shift) + 3)² planes, the coefficients moved by whole pixels, and chi2
is a quadratic form in those weights: with the weighted Gram matrix of the planes and their projections on the image at
hand, chi2 and its exact derivatives cost the same at every shift, whatever the size of the stamp. Scale and offset
follow in closed form within their bounds. Every local minimum of a quarter-pixel grid that may hold the global one is
then polished by Newton's method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import ceil, floor, inf, isfinite, nan, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter, spline_filter
from scipy.special import chdtrc

_compiled: Callable[..., tuple[Any, ...]] | None
try:
    from stampworker.cutouts._adjust import fit as _compiled
except ImportError:  # installed without a compiler
    _compiled = None

Plane = NDArray[Any]
Floats = NDArray[np.float64]

NATIVE = (np.dtype(np.float32), np.dtype(np.float64))
LARGEST_SHIFT = 16  # the Gram matrix grows with the fourth power: 1225² at 16 pixels
HUGE = 1e50  # float64 values beyond it, and errors below its inverse, would overflow when squared; no float32 is
FLAT = 1e-6  # a template that varies by less than this part of its values is constant: 16 times the rounding of float32
STEP = 0.25  # of the grid: chi2 is made of cubic splines with knots a pixel apart, so it cannot wiggle faster
FILL_LAYERS = (
    3  # rings of pixels around good ones that are filled; the spline forgets a factor 0.27 a pixel, 0.27³ = 2 %
)
CLOSE = 1e-5  # pixels: Newton's method squares its error, so a step this short ends at 1e-10
LONGEST_STEP = 0.5  # pixels, half of a cell
MOST_STEPS = 50
BLOCK = 1 << 19  # bytes of weighted planes at a time: half a second-level cache

NO_SIGNAL, TOO_FEW_PIXELS = "no_signal", "too_few_pixels"
PARAMETERS = ("dx", "dy", "scale", "bg")


class Fit(NamedTuple):
    """What a core returns: numbers in the planes' units, pixels and chi2.

    ``failure`` is empty for a fit. Errors are NaN where there are none; ``at_bound`` is a sum of bits: 1 dx, 2 dy, 4
    scale.
    """

    failure: str
    npix: int = 0
    at_bound: int = 0
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
    ``((image - bg - scale * (shift(convolved, dx, dy) - tbg)) / err)²``.

    Parameters
    ----------
    cutout : dict
        As ``get_cutout`` makes it. Planes ``image``, ``convolved`` and ``err``, shape (ny, nx), any real dtype, in the
        same units, and optionally ``mask``, where anything but 0 is bad. On success the plane ``adjusted`` is added.
        ``meta`` receives the results below; results of an earlier fit are removed first.
    max_shift : float, optional
        Bound of ``|dx|`` and of ``|dy|``, pixels, 0 to 16.
    max_scale : float, optional
        ``scale`` is kept within ``1 / max_scale`` and ``max_scale``; at least 1.
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
        lies at a bound; and after False why: ``no_signal`` (the template is constant) or ``too_few_pixels`` (fewer
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
      same pixels; ``adjust_df``: pixels less parameters (3, with ``fit_bg`` 4); ``adjust_pval``: the chance of a
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
    """
    image, template, err, mask = planes_of(cutout)
    _check(max_shift, max_scale, inner)
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
    _report(meta, fit, fit_bg)
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
        plane = np.asarray(cutout[name])
        _check_shape(name, plane, planes[0].shape if planes else None)
        planes.append(plane if plane.dtype in NATIVE and plane.flags.c_contiguous else _converted(name, plane))
    mask = cutout.get("mask")
    if mask is not None:
        mask = np.asarray(mask)
        _check_shape("mask", mask, planes[0].shape)
        mask = np.ascontiguousarray(mask if mask.dtype == bool else mask != 0).view(np.uint8)
    return planes[0], planes[1], planes[2], mask


def _converted(name: str, plane: Plane) -> Plane:
    if plane.dtype.kind not in "fiub":
        raise ValueError(f"plane {name!r} has dtype {plane.dtype}, wanted real numbers")
    return np.ascontiguousarray(plane, np.float32 if plane.dtype.str[1:] == "f4" else np.float64)


def _check_shape(name: str, plane: Plane, wanted: tuple[int, ...] | None) -> None:
    if plane.ndim != 2 or plane.size == 0:
        raise ValueError(f"plane {name!r} has shape {plane.shape}, wanted two axes of at least one pixel")
    if wanted is not None and plane.shape != wanted:
        raise ValueError(f"plane {name!r} has shape {plane.shape}, plane 'image' {wanted}")


def _check(max_shift: float, max_scale: float, inner: float | None) -> None:
    if not 0 <= max_shift <= LARGEST_SHIFT:
        raise ValueError(f"max_shift is {max_shift!r}, wanted 0 to {LARGEST_SHIFT}")
    if not 1 <= max_scale < HUGE:
        raise ValueError(f"max_scale is {max_scale!r}, wanted at least 1")
    if inner is not None and not inner >= 0:
        raise ValueError(f"inner is {inner!r}, wanted None or at least 0")


def _report(meta: dict[str, Any], fit: Fit, fit_bg: bool) -> None:
    df = fit.npix - (4 if fit_bg else 3)
    meta["adjust_chi2_0"] = fit.chi2_0
    meta["adjust_chi2"] = fit.chi2
    meta["adjust_df"] = df
    meta["adjust_pval"] = float(chdtrc(df, fit.chi2))
    meta["adjust_dx"] = fit.dx
    meta["adjust_dy"] = fit.dy
    meta["adjust_scale"] = fit.scale
    meta["adjust_bg"] = fit.bg
    meta["adjust_tbg"] = fit.tbg
    meta["adjust_dx_err"] = fit.dx_err if isfinite(fit.dx_err) else None
    meta["adjust_dy_err"] = fit.dy_err if isfinite(fit.dy_err) else None
    meta["adjust_scale_err"] = fit.scale_err if isfinite(fit.scale_err) else None
    meta["adjust_bg_err"] = fit.bg_err if isfinite(fit.bg_err) else None
    meta["adjust_status"] = "at_bound" if fit.at_bound else "ok"
    meta["adjust_bound"] = ",".join(p for i, p in enumerate(PARAMETERS) if fit.at_bound >> i & 1) or None


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
    """Fit, and fill ``adjusted``: the specification of the core.

    Parameters
    ----------
    image, template, err : ndarray, shape (ny, nx), float32 or float64, native and contiguous
    mask : ndarray of uint8, shape (ny, nx), or None
        0 is good.
    inner : float
        Width of the fitted box, pixels; 0 for the whole stamp.
    max_shift, max_scale, fit_bg, normalize
        As in ``adjust_cutout``.
    adjusted : ndarray, shape (ny, nx), float32 or float64
        Overwritten where there is a fit.

    Returns
    -------
    Fit
    """
    reach = _reach(max_shift)
    image, template, err = (plane.astype(np.float64, copy=False) for plane in (image, template, err))
    good_image, good_template = _good(image, mask), _good(template, mask)
    box, weight = _weights(err, good_image, good_template, inner, reach)
    npix = int(np.count_nonzero(weight))
    if npix < (5 if fit_bg else 4):
        return Fit(TOO_FEW_PIXELS, npix)
    if _flat(template, good_template, box, reach):
        return Fit(NO_SIGNAL, npix)
    bg, tbg = _background(image, good_image), _background(template, good_template)
    undefined = (
        None if good_image is None and good_template is None else ~(np.abs(image) < HUGE) | ~(np.abs(template) < HUGE)
    )
    residual = image - bg if good_image is None else np.where(np.abs(image) < HUGE, image - bg, 0.0)
    template = template - tbg if good_template is None else _filled(template, good_template, tbg) - tbg
    coefficients = spline_filter(template, 3, np.float64, "reflect")
    padded = coefficients.take(_mirrored(image.shape[0], reach), 0).take(_mirrored(image.shape[1], reach), 1)
    form = _quadratic_form(padded, residual[box], weight, box, reach, fit_bg)
    best = _lowest(form, max_shift, max_scale)
    template_sums = form.template_sums(best.u, best.v) if fit_bg else (0.0, 0.0, 0.0)
    bg_offset = form.offset(best.scale, template_sums[0]) if fit_bg else 0.0
    after = residual - bg_offset - best.scale * _moved(padded, best.u, best.v, reach)
    chi2_0 = float((weight * (residual[box] - template[box]) ** 2).sum())
    chi2 = float((weight * after[box] ** 2).sum())
    at_bound = int(abs(best.u) >= max_shift) | int(abs(best.v) >= max_shift) << 1 | int(best.scale_at_bound) << 2
    errors = _errors(form, best, at_bound, template_sums if fit_bg else None)
    if normalize:
        np.divide(after, err, out=after, where=_usable(err))
        after[~_usable(err)] = np.nan
    if undefined is not None:
        after[undefined] = np.nan
    adjusted[:] = after
    return Fit("", npix, at_bound, bg + bg_offset, tbg, 0.0 - best.u, 0.0 - best.v, best.scale, chi2_0, chi2, *errors)


def fitted_pixels(
    image: Plane, template: Plane, err: Plane, mask: NDArray[np.uint8] | None, inner: float, max_shift: float
) -> tuple[tuple[slice, slice], Floats]:
    """Return the fitted box as slices (y, x), and 1 / err² in it, 0 for pixels that leave the fit."""
    image, template, err = (plane.astype(np.float64, copy=False) for plane in (image, template, err))
    return _weights(err, _good(image, mask), _good(template, mask), inner, _reach(max_shift))


class Form(NamedTuple):
    """chi2 as a quadratic form in the weights of the L² moved coefficient planes, L = 2 reach + 1.

    Where an offset is fitted, both sides are freed of their weighted means and the form is what remains after the
    offset's best value: fitting the offset then costs nothing more.
    """

    gram: Floats  # (L, L, L, L): planes (j, k) and (j', k'), weighted by 1 / err²
    projection: Floats  # (L, L): on the image less its background
    sums: Floats  # (L, L): of the planes
    image_square: float
    image_sum: float
    weight_sum: float
    image_mean: float
    template_mean: float
    reach: int
    cells: dict[tuple[int, int], Floats]  # what `_polynomials` made so far

    def template_sums(self, u: float, v: float) -> tuple[float, float, float]:
        """Weighted sum of the moved template, less its mean, and the sum's derivatives by u and v."""
        row, along = _taps(v, self.reach)
        column, across = _taps(u, self.reach)
        total = along @ self.sums[row : row + 4, column : column + 4] @ across.T
        return float(total[0, 0]), float(total[0, 1]), float(total[1, 0])

    def offset(self, scale: float, template_sum: float) -> float:
        """Best background offset at a scale and a shift."""
        return self.image_mean - scale * self.template_mean + (self.image_sum - scale * template_sum) / self.weight_sum


class Value(NamedTuple):
    """chi2 at one shift with the best scale, and derivatives by u = -dx and v = -dy."""

    u: float
    v: float
    chi2: float
    scale: float
    scale_at_bound: bool
    gradient: tuple[float, float]
    hessian: tuple[float, float, float]  # uu, uv, vv
    square: float  # weighted sum of squares of the moved template
    scale_slope: tuple[float, float]  # of the best scale by u and v, while it is free


def _reach(max_shift: float) -> int:
    """Pixels from a pixel to the outermost coefficient in its sum: a cubic B-spline is 0 from two pixels on."""
    return max(ceil(max_shift), 1) + 1


def _good(plane: Floats, mask: NDArray[np.uint8] | None) -> NDArray[np.bool_] | None:
    """Where a plane has a usable value; None for everywhere."""
    good: NDArray[np.bool_] = np.abs(plane) < HUGE
    if mask is not None:
        good &= mask == 0
    return None if good.all() else good


def _usable(err: Floats) -> NDArray[np.bool_]:
    return (err > 1 / HUGE) & (err < HUGE)


def _weights(
    err: Floats,
    good_image: NDArray[np.bool_] | None,
    good_template: NDArray[np.bool_] | None,
    inner: float,
    reach: int,
) -> tuple[tuple[slice, slice], Floats]:
    """Return the box as slices (y, x), and 1 / err² in it, 0 for pixels that leave the fit."""
    box = (_span(err.shape[0], inner), _span(err.shape[1], inner))
    use = _usable(err[box])
    if good_image is not None:
        use &= good_image[box]
    if good_template is not None:
        use &= ~maximum_filter(~good_template, 2 * reach + 1, mode="constant")[box]
    return box, 1 / np.square(np.where(use, err[box], np.inf))


def _span(size: int, inner: float) -> slice:
    """Pixels of one axis with ``|x - size / 2 + 0.5| <= inner / 2``."""
    if not inner or inner >= size:
        return slice(0, size)
    return slice(ceil((size - 1 - inner) / 2), floor((size - 1 + inner) / 2) + 1)


def _background(plane: Floats, good: NDArray[np.bool_] | None) -> float:
    """SExtractor's estimate of the mode (Bertin & Arnouts 1996, A&AS 117, 393)."""
    values = plane.ravel() if good is None else plane[good]
    half = values.size // 2
    if values.size % 2:
        median = np.partition(values, half)[half]
    else:
        median = np.partition(values, (half - 1, half))[half - 1 : half + 1].mean()
    return float(2.5 * median - 1.5 * values.mean())


def _flat(template: Floats, good: NDArray[np.bool_] | None, box: tuple[slice, slice], reach: int) -> bool:
    """Whether the template is constant wherever the fit reads it."""
    reached = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
    values = template[reached] if good is None else template[reached][good[reached]]
    low, high = values.min(), values.max()
    return bool(high - low <= FLAT * max(abs(low), abs(high)))


def _filled(template: Floats, good: NDArray[np.bool_], value: float) -> Floats:
    """Fill bad pixels from their neighbours, ring by ring, and beyond a few rings with ``value``."""
    ny, nx = template.shape
    planes = np.zeros((2, ny + 2, nx + 2))
    values, known = planes[:, 1:-1, 1:-1]
    values[good], known[good] = template[good], 1.0
    for _ in range(FILL_LAYERS):
        rows = planes[:, :-2] + planes[:, 1:-1] + planes[:, 2:]
        total, count = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
        new = (known == 0) & (count > 0)
        values[new] = total[new] / count[new]
        known[new] = 1.0
    return np.where(known > 0, values, value)


def _mirrored(size: int, reach: int) -> NDArray[np.intp]:
    """Return an axis' indices with ``reach`` more at either end, mirrored about the outermost pixels' outer edges."""
    index = np.arange(-reach, size + reach) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def _quadratic_form(
    padded: Floats, residual: Floats, weight: Floats, box: tuple[slice, slice], reach: int, fit_bg: bool
) -> Form:
    """Gram matrix and projections of the moved planes, in blocks of rows that stay in the cache."""
    ny, nx = residual.shape
    size = 2 * reach + 1
    near = np.ascontiguousarray(padded[box[0].start : box[0].stop + 2 * reach, box[1].start : box[1].stop + 2 * reach])
    image_mean = template_mean = 0.0
    if fit_bg:
        image_mean = float((weight * residual).sum() / weight.sum())
        template_mean = float((weight * near[reach:-reach, reach:-reach]).sum() / weight.sum())
        residual, near = residual - image_mean, near - template_mean
    root = np.sqrt(weight)
    # sliding_window_view makes the same views, in the time of a third of the form of a small box.
    views = np.ndarray((size, size, ny, nx), np.float64, near, 0, near.strides + near.strides)
    count = size * size
    rows = max(1, BLOCK // (8 * nx * (count + 2)))
    total = np.zeros((count + 2, count + 2))
    for first in range(0, ny, rows):
        last = min(first + rows, ny)
        block = np.empty((count + 2, last - first, nx))
        np.multiply(views[:, :, first:last], root[first:last], out=block[:-2].reshape(size, size, last - first, nx))
        np.multiply(residual[first:last], root[first:last], out=block[-2])
        block[-1] = root[first:last]
        flat = block.reshape(count + 2, -1)
        total += flat @ flat.T
    sums, image_sum, weight_sum = total[:-2, -1], float(total[-2, -1]), float(total[-1, -1])
    gram, projection, image_square = total[:-2, :-2], total[:-2, -2], float(total[-2, -2])
    if fit_bg:
        gram = gram - np.outer(sums, sums / weight_sum)
        projection = projection - sums * (image_sum / weight_sum)
        image_square -= image_sum**2 / weight_sum
    return Form(
        gram.reshape(size, size, size, size),
        projection.reshape(size, size),
        sums.reshape(size, size),
        image_square,
        image_sum,
        weight_sum,
        image_mean,
        template_mean,
        reach,
        {},
    )


def _taps(at: float, reach: int) -> tuple[int, Floats]:
    """First of the four planes that a move by ``at`` needs; their weights and two derivatives, shape (3, 4)."""
    first, f = _cell(at, reach)
    g = 1 - f
    weights = (
        (g * g * g / 6, (4 - 3 * f * f * (2 - f)) / 6, (4 - 3 * g * g * (2 - g)) / 6, f * f * f / 6),
        (-g * g / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f * f / 2),
        (g, 3 * f - 2, 3 * g - 2, f),
    )
    return first, np.array(weights)


@lru_cache(maxsize=16)
def _grid(max_shift: float) -> tuple[Floats, Floats, Floats]:
    """Points of the grid on one axis, the weights of all planes there, (n, L), and products of these, (n, L²)."""
    reach = _reach(max_shift)
    points = np.linspace(-max_shift, max_shift, 2 * ceil(max_shift / STEP) + 1)
    weights = np.zeros((points.size, 2 * reach + 1))
    for row, at in zip(weights, points, strict=True):
        first, taps = _taps(float(at), reach)
        row[first : first + 4] = taps[0]
    return points, weights, (weights[:, :, None] * weights[:, None, :]).reshape(points.size, -1)


def _lowest(form: Form, max_shift: float, max_scale: float) -> Value:
    """Find the global minimum: polish each local minimum of the grid that may get below the best point of the grid."""
    points, weights, products = _grid(max_shift)
    size = weights.shape[1]
    square = products @ form.gram.transpose(0, 2, 1, 3).reshape(size * size, size * size) @ products.T
    cross = weights @ form.projection @ weights.T
    scale = np.clip(cross / np.maximum(square, np.finfo(float).tiny), 1 / max_scale, max_scale)
    chi2 = form.image_square - scale * (2 * cross - scale * square)
    lowest = chi2.min()
    best: Value | None = None
    for at in np.flatnonzero(chi2 <= minimum_filter(chi2, 3, mode="nearest")).tolist():
        row, column = divmod(at, points.size)
        if chi2[row, column] - _possible_drop(chi2, row, column) <= lowest:
            found = _polish(form, _start(form, points, chi2, row, column, max_scale), max_shift, max_scale)
            if best is None or found.chi2 < best.chi2:
                best = found
    if best is None:
        raise AssertionError("the lowest point of the grid is one of its local minima")
    return best


def _start(form: Form, points: Floats, chi2: Floats, row: int, column: int, max_scale: float) -> Value:
    """Evaluate where parabolas through a local minimum of the grid have theirs, or else at the point itself."""
    u, v = (float(points[at]) + _vertex(points, line, at) for line, at in ((chi2[row], column), (chi2[:, column], row)))
    start = _evaluate(form, u, v, max_scale)
    if start.chi2 <= chi2[row, column]:
        return start
    return _evaluate(form, float(points[column]), float(points[row]), max_scale)


def _vertex(points: Floats, line: Floats, at: int) -> float:
    """Return how far from the point ``at`` the parabola through it and its neighbours is lowest."""
    if not 0 < at < line.size - 1:
        return 0.0
    before, here, after = line[at - 1 : at + 2].tolist()
    bend = before - 2 * here + after
    return float(points[1] - points[0]) * (before - after) / (2 * bend) if bend > 0 else 0.0


def _possible_drop(chi2: Floats, row: int, column: int) -> float:
    """How far below a local minimum of the grid the minimum between its points may lie.

    A parabola with its vertex within half a step drops by at most an eighth of the second difference on each axis.
    Four times that allows for what a parabola leaves out.
    """
    drop = 0.0
    for line, at in ((chi2[:, column], row), (chi2[row], column)):
        rises = [float(line[i] - line[at]) for i in (at - 1, at + 1) if 0 <= i < line.size]
        drop += sum(rises) / max(len(rises), 1)
    return drop


def _polynomials(form: Form, row: int, column: int) -> Floats:
    """Square of the moved template and product with the image in one cell, shape (7, 14).

    Both are polynomials in the move's fractions, of degree 6 and 3: rows are powers along y, columns powers along x of
    the one and then of the other.
    """
    rows, columns = slice(row, row + 4), slice(column, column + 4)
    made = np.empty((7, 2, 7))
    made[:, 0] = (_SQUARES @ form.gram[rows, columns, rows, columns].ravel()).reshape(7, 7)
    made[:, 1] = (_PRODUCTS @ form.projection[rows, columns].ravel()).reshape(7, 7)
    return made.reshape(7, 14)


def _powers_of_squares() -> tuple[Floats, Floats]:
    """Return what turns the four by four planes of a cell, squared (256) and single (16), into coefficients (49)."""
    spline = np.array(((1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1))) / 6  # a tap's, by powers
    both = np.einsum("ia,kc->ikac", spline, spline)
    one_axis = np.zeros((7, 4, 4))
    for i in range(4):
        for k in range(4):
            one_axis[i + k] += both[i, k]
    squares = np.einsum("mac,nbd->mnabcd", one_axis, one_axis).reshape(49, 256)
    products = np.zeros((7, 7, 4, 4))
    products[:4, :4] = np.einsum("ia,jb->ijab", spline, spline)
    return squares, products.reshape(49, 16)


_SQUARES, _PRODUCTS = _powers_of_squares()


def _powers(f: float) -> Floats:
    """Powers 0 to 6 of a fraction, and two derivatives, shape (3, 7)."""
    f2 = f * f
    f3, f4 = f2 * f, f2 * f2
    return np.array(
        (
            (1.0, f, f2, f3, f4, f4 * f, f3 * f3),
            (0.0, 1.0, 2 * f, 3 * f2, 4 * f3, 5 * f4, 6 * f4 * f),
            (0.0, 0.0, 2.0, 6 * f, 12 * f2, 20 * f3, 30 * f4),
        )
    )


def _cell(at: float, reach: int) -> tuple[int, float]:
    """First of the four planes that a move by ``at`` needs, and the move's fraction in their cell."""
    cell = min(floor(at), reach - 2)  # the upper end belongs to the last cell
    return cell - 1 + reach, at - cell


def _evaluate(form: Form, u: float, v: float, max_scale: float) -> Value:
    """chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale."""
    (column, f), (row, g) = _cell(u, form.reach), _cell(v, form.reach)
    coefficients = form.cells.get((row, column))
    if coefficients is None:
        coefficients = form.cells[row, column] = _polynomials(form, row, column)
    table = (_powers(g) @ coefficients).reshape(6, 7) @ _powers(f).T
    values: list[list[float]] = table.tolist()  # by v, the square before the product with the image; by u
    (square, square_u, square_uu), (cross, cross_u, cross_uu) = values[:2]
    (square_v, square_uv, _), (cross_v, cross_uv, _) = values[2:4]
    square_vv, cross_vv = values[4][0], values[5][0]
    low, high = 1 / max_scale, max_scale
    best = cross / square if square > 0 else high
    scale = min(max(best, low), high)
    huu = scale * (scale * square_uu - 2 * cross_uu)
    huv = scale * (scale * square_uv - 2 * cross_uv)
    hvv = scale * (scale * square_vv - 2 * cross_vv)
    slope = (0.0, 0.0)
    free = low < best < high
    if free:
        slope = ((cross_u - scale * square_u) / square, (cross_v - scale * square_v) / square)
        huu -= 2 * square * slope[0] * slope[0]
        huv -= 2 * square * slope[0] * slope[1]
        hvv -= 2 * square * slope[1] * slope[1]
    return Value(
        u,
        v,
        form.image_square - scale * (2 * cross - scale * square),
        scale,
        not free,
        (scale * (scale * square_u - 2 * cross_u), scale * (scale * square_v - 2 * cross_v)),
        (huu, huv, hvv),
        square,
        slope,
    )


def _polish(form: Form, here: Value, max_shift: float, max_scale: float) -> Value:
    """Newton's method inside the box."""
    for _ in range(MOST_STEPS):
        du, dv = _step(here, max_shift)
        while True:
            u = min(max(here.u + du, -max_shift), max_shift)
            v = min(max(here.v + dv, -max_shift), max_shift)
            is_last = max(abs(u - here.u), abs(v - here.v)) < CLOSE
            there = _evaluate(form, u, v, max_scale)
            if is_last or there.chi2 <= here.chi2:  # of a step so short only rounding says that it leads up
                break
            du, dv = du / 2, dv / 2
        here = there
        if is_last:
            break
    return here


def _step(here: Value, max_shift: float) -> tuple[float, float]:
    """Newton's step among the shifts that are not held by a bound, downhill also where the curvature is negative."""
    size = max(map(abs, here.hessian))
    if not 0 < size < inf:
        return 0.0, 0.0
    # Squares of the curvature may be beyond any float.
    huu, huv, hvv = (curvature / size for curvature in here.hessian)
    gu, gv = (slope / size for slope in here.gradient)
    held_u = abs(here.u) >= max_shift and gu * here.u <= 0
    held_v = abs(here.v) >= max_shift and gv * here.v <= 0
    if held_u:
        gu, huu, huv = 0.0, 1.0, 0.0
    if held_v:
        gv, hvv, huv = 0.0, 1.0, 0.0
    smallest = (huu + hvv - sqrt((huu - hvv) * (huu - hvv) + 4 * huv * huv)) / 2
    if smallest <= 1e-9:
        raised = max(-2 * smallest, 1e-3)
        huu, hvv = huu + raised, hvv + raised
    determinant = huu * hvv - huv * huv
    du, dv = (huv * gv - hvv * gu) / determinant, (huv * gu - huu * gv) / determinant
    long = max(abs(du), abs(dv)) / LONGEST_STEP
    return (du / long, dv / long) if long > 1 else (du, dv)


def _errors(
    form: Form, best: Value, at_bound: int, template_sums: tuple[float, float, float] | None
) -> tuple[float, float, float, float]:
    """One sigma of dx, dy, scale and bg from the curvature of chi2; NaN at a bound or where it is not positive.

    The hessian is that of chi2 with scale and offset at their best, so twice its inverse is the covariance of the
    shifts. Scale and offset add the variance they have at a fixed shift.
    """
    free_u, free_v, free_scale = not at_bound & 1, not at_bound & 2, not at_bound & 4
    size = max(map(abs, best.hessian))
    huu, huv, hvv = (curvature / size for curvature in best.hessian) if 0 < size < inf else (0.0, 0.0, 0.0)
    determinant = huu * hvv - huv * huv
    cuu = cuv = cvv = 0.0
    if (free_u and not huu > 0) or (free_v and not hvv > 0):
        return nan, nan, nan, nan
    if free_u and free_v:
        if not determinant > 1e-12 * huu * hvv:
            return nan, nan, nan, nan
        cuu, cuv, cvv = (2 * entry / determinant / size for entry in (hvv, -huv, huu))
    elif free_u:
        cuu = 2 / huu / size
    elif free_v:
        cvv = 2 / hvv / size

    def carried(by_u: float, by_v: float) -> float:
        return by_u * by_u * cuu + 2 * by_u * by_v * cuv + by_v * by_v * cvv

    own = 1 / best.square if free_scale else 0.0
    scale_err = sqrt(own + carried(*best.scale_slope)) if free_scale else nan
    bg_err = nan
    if template_sums is not None:
        by_scale = -form.template_mean - template_sums[0] / form.weight_sum
        by_u, by_v = (
            by_scale * slope - best.scale * total / form.weight_sum
            for slope, total in zip(best.scale_slope, template_sums[1:], strict=True)
        )
        bg_err = sqrt(1 / form.weight_sum + by_scale * by_scale * own + carried(by_u, by_v))
    return sqrt(cuu) if free_u else nan, sqrt(cvv) if free_v else nan, scale_err, bg_err


def _moved(padded: Floats, u: float, v: float, reach: int) -> Floats:
    """Move the spline by -u in x and -v in y: four rows, then four columns; shape (ny, nx)."""
    row, along = _taps(v, reach)
    column, across = _taps(u, reach)
    ny, nx = padded.shape[0] - 2 * reach, padded.shape[1] - 2 * reach
    rows = np.multiply(padded[row : row + ny], along[0, 0])
    for tap in range(1, 4):
        rows += padded[row + tap : row + tap + ny] * along[0, tap]
    moved: Floats = np.multiply(rows[:, column : column + nx], across[0, 0])
    for tap in range(1, 4):
        moved += rows[:, column + tap : column + tap + nx] * across[0, tap]
    return moved


def fit_compiled(*args: Any) -> Fit:
    """Fit as ``fit_numpy`` does, in C: the same arguments, and the same answer to rounding."""
    if _compiled is None:
        raise ImportError("stampworker.cutouts._adjust was not compiled")
    return Fit(*_compiled(*args))


core: Callable[..., Fit] = fit_compiled if _compiled else fit_numpy
CORE = "c" if _compiled else "numpy"
