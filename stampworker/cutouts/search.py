"""The search of the fit in numpy: the shift and scale at which chi2 is lowest, in the whole of the bounds.

With the square t of the moved template and its product p with the image, both polynomials of the move in each cell of
the spline, chi2 at the best scale is the least over s of ``image² - 2 s p + s² t``: a minimum of functions that are
linear in p and t, hence concave in them.

So chi2 is nowhere in a box below the least of its values at the pairs of Bernstein coefficients, of which p and t are
means there (Cargo & Shisha 1966, J. Res. NBS 70B, 79). Boxes whose bound is not below the chi2 that is known are left
out. Newton's method finds that chi2, and what remains around it is as a rule so small that chi2 can be shown to have no
other minimum there (`_Search.is_settled`). Else the boxes are divided, which sharpens the bound with the square of
their side.
"""

from __future__ import annotations

from math import ceil, floor, inf, sqrt
from typing import NamedTuple

import numpy as np

from stampworker.cutouts.boxes import DEGREE, POINTS, Expansion, Floats, Grid, by_box, cells_of, with_derivatives

CLOSE = 1e-5  # pixels: Newton's method squares its error, so a step this short ends at 1e-10
LONGEST_STEP = 0.5  # pixels, half of a cell
SHORTEST_STEP = 1e-9  # pixels
MOST_STEPS = 200
SAME = 1e-4  # pixels: minima closer than this are one
TOGETHER = 9  # boxes that are divided as one rectangle; where more remain, each is by itself
MOST_DIVISIONS = 5  # of a rectangle: to a thousandth of a pixel
MOST_SINGLE = 2  # of boxes by themselves
REMEMBERED = 64  # of the minima found, the last ones
TOLERANCE = 1e-7  # of chi2; a difference that no one can see is not looked for
NEGLIGIBLE = 1e-20  # of the template's largest square
ROUNDING = 1e-13  # of the image's square, to which chi2 is rounded where it is small beside it


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

    def template_sums(self, u: float, v: float) -> tuple[float, float, float]:
        """Weighted sum of the moved template, less its mean, and the sum's derivatives by u and v."""
        row, along = taps(v, self.reach)
        column, across = taps(u, self.reach)
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


def reach_of(max_shift: float) -> int:
    """Pixels from a pixel to the outermost coefficient in its sum: a cubic B-spline is 0 from two pixels on."""
    return max(ceil(max_shift), 1) + 1


def taps(at: float, reach: int) -> tuple[int, Floats]:
    """First of the four planes that a move by ``at`` needs; their weights and two derivatives, shape (3, 4)."""
    cell = min(floor(at), reach - 2)  # the upper end belongs to the last cell
    f = at - cell
    g = 1 - f
    weights = (
        (g * g * g / 6, (4 - 3 * f * f * (2 - f)) / 6, (4 - 3 * g * g * (2 - g)) / 6, f * f * f / 6),
        (-g * g / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f * f / 2),
        (g, 3 * f - 2, 3 * g - 2, f),
    )
    return cell - 1 + reach, np.array(weights)


def lowest(form: Form, max_shift: float, max_scale: float) -> Value:
    """Return chi2 at its global minimum.

    Parameters
    ----------
    form : Form
        Of the planes within reach of ``max_shift``.
    max_shift, max_scale : float
        Bounds, as in ``adjust_cutout``.

    Returns
    -------
    Value

    Notes
    -----
    The minimum is proved to be the lowest, but for rounding and 1e-7 of chi2, where the search ends by itself, as it
    does on stars. Where chi2 is nearly the same along a line, or small beside the squares of image and template and
    has many minima, it ends at boxes of a thousandth of a pixel, and of a sixteenth where more than nine are left: one
    that touches a minimum that was found, has its scale in the same range, and is no lower at its corners, is taken for
    that minimum's own neighbourhood; from all others Newton's method begins once more.
    """
    search = _Search(form, max_shift, max_scale)
    if not max_shift:
        return search.evaluate(0.0, 0.0)
    search.look(search.cells)
    return search.best


class _Search:
    """What is known of chi2."""

    def __init__(self, form: Form, max_shift: float, max_scale: float) -> None:
        self.image_square, self.max_shift, self.max_scale = form.image_square, max_shift, max_scale
        self.cells = cells_of(form.gram, form.projection, max_shift or 1.0)
        whole = ceil(max_shift) or 1.0
        # Where the bounds cut a cell, its slopes are those of the whole of it: what is left may be any narrow.
        self.whole = self.cells if max_shift in (0, whole) else cells_of(form.gram, form.projection, whole)
        self.here = Expansion(inf, inf, 0.0, 0.0, form.gram)  # around the last move; there is none
        self.negligible = float(self.cells.forms[0].max()) * NEGLIGIBLE
        self.minima: list[Value] = []
        self.best: Value
        self.limit = inf  # a chi2 below it is of interest

    def look(self, grid: Grid, divisions: int = 0) -> None:
        """Find what is lower in a grid than what is known."""
        chi2, scale = self.measure(grid.forms)
        if not self.minima:
            self.polish(*grid.place(*divmod(int(chi2.argmin()), chi2.shape[1])))
        left = self.left(grid, chi2)
        if left is None or self.is_settled(left):
            return
        corners = by_box(chi2)[:, ::DEGREE, :, ::DEGREE].ravel()
        if corners.min() < self.limit:
            self.polish(*grid.corner(int(corners.argmin())))
            left = self.left(grid, chi2)
        if left and divisions < MOST_DIVISIONS and left.forms[0].size <= TOGETHER * POINTS * POINTS:
            self.look(left.divided(), divisions + 1)
            return
        for bound, row, column in _by_bound(chi2):
            if bound < self.limit:
                box = grid.part(row, row + 1, column, column + 1)
                if divisions < MOST_SINGLE:
                    self.look(box.divided(), divisions + 1)
                elif not self.knows(box, by_box(scale)[row, :, column]):
                    lowest = by_box(chi2)[row, ::DEGREE, column, ::DEGREE].argmin()
                    self.polish(*box.corner(int(lowest)))

    def left(self, grid: Grid, chi2: Floats) -> Grid | None:
        """Return the rectangle around the boxes where chi2 may be of interest, and around the best where it is here."""
        rows, columns = (chi2 < self.limit).nonzero()
        if not rows.size:
            return None
        top, bottom = rows.item(0) // POINTS, rows.item(-1) // POINTS
        left, right = int(columns.min()) // POINTS, int(columns.max()) // POINTS
        best = self.best
        if grid.holds(best.u, best.v):
            row, column = grid.box(best.u, best.v)
            top, bottom, left, right = min(top, row), max(bottom, row), min(left, column), max(right, column)
        return grid.part(top, bottom + 1, left, right + 1)

    def measure(self, forms: Floats) -> tuple[Floats, Floats]:
        """Return chi2 at pairs of coefficients, true at the corners of boxes, and the best scale of each pair."""
        square, product = forms[0], forms[1]
        low, high = 1 / self.max_scale, self.max_scale
        # A coefficient of the square may be negative; then the best scale is the bound on the product's side.
        middle = (low + high) / 2
        scale = product - middle * square
        scale /= np.maximum(square, self.negligible)
        scale += middle
        np.maximum(scale, low, out=scale)
        np.minimum(scale, high, out=scale)
        chi2 = product + product
        chi2 -= scale * square
        chi2 *= scale
        np.subtract(self.image_square, chi2, out=chi2)
        return chi2, scale

    def is_settled(self, grid: Grid) -> bool:
        """Say whether a minimum that lies in a grid is shown to be the lowest there.

        With a = 1 / scale and ``L = image² - chi2`` at the minimum, chi2 is lower where
        ``R = L a² - 2 a p + t < 0``. R is 0 at the minimum and does not fall from there. So it is nowhere below 0 if it
        is convex in shift and a together; along an axis on whose bound the minimum lies, it may be monotonic instead.
        Splines and their slopes go on from cell to cell: what is convex in each cell is so in all.
        """
        one = self.best
        du, dv, is_newtons = _step(one, self.max_shift)
        fall = -(one.gradient[0] * du + one.gradient[1] * dv) / 2  # to where Newton's method would end
        rounding = ROUNDING * (self.image_square + one.scale * one.scale * one.square)
        if not (is_newtons and fall <= TOLERANCE * one.chi2 + rounding < self.image_square - one.chi2):
            return False
        if not grid.holds(one.u, one.v):
            return False
        u, v, uu, uv, vv = self.derivatives(grid.forms, one)
        held_u = abs(one.u) >= self.max_shift and one.gradient[0] * one.u < 0
        held_v = abs(one.v) >= self.max_shift and one.gradient[1] * one.v < 0
        if not held_u and not held_v:
            return bool(uu.min() > 0 and (uu * vv - uv * uv).min() > 0)
        along_u = (u * one.u).max() < 0 if held_u else uu.min() > 0
        along_v = (v * one.v).max() < 0 if held_v else vv.min() > 0
        return bool(along_u and along_v)

    def derivatives(self, forms: Floats, one: Value) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Return coefficients of R's derivatives by u, v, uu, uv and vv, over L, the latter with a following the shift.

        R is convex in shift and a if ``t'' - 2 a p'' - 2 p' p'ᵀ / L`` is positive definite. That is linear in a, so
        need only be seen at both bounds of the scale, and only at the one where the minimum lies if R rises from there
        everywhere. Of polynomials in Bernstein's form, and of matrices of them, all values are means of the
        coefficients, and the square of a mean is at most the mean of squares.
        """
        gain, low, high = self.image_square - one.chi2, 1 / self.max_scale, self.max_scale
        parts = np.array(((1.0, -2 * low), (1.0, -2 * high), (0.0, sqrt(2.0)))) / gain
        if one.scale == high and (low == high or forms[1].max() <= gain * low):
            parts = parts[:1]
        elif one.scale == low and forms[1].min() >= gain * high:
            parts = parts[1:2]
        _, rows, columns = forms.shape
        planes = with_derivatives(parts.dot(forms.reshape(2, -1)).reshape(-1, rows, columns))
        u, v = planes[:, :rows, columns:-columns], planes[:, rows:-rows, :columns]
        uu, uv = planes[:, :rows, -columns:], planes[:, rows:-rows, columns:-columns]
        vv = planes[:, -rows:, :columns]
        if len(parts) == 1:
            return u, v, uu, uv, vv
        (p_u, p_v), u, v = (u[2], v[2]), u[:2], v[:2]
        return u, v, uu[:2] - p_u * p_u, uv[:2] - p_u * p_v, vv[:2] - p_v * p_v

    def knows(self, box: Grid, scale: Floats) -> bool:
        """Say whether a box touches a minimum, or nearly, with the scale free, or at one bound, in both."""
        (v, top), (u, right) = box.v, box.u
        least, most = scale.min(), scale.max()
        free = 1 / self.max_scale < least and most < self.max_scale
        for one in self.minima[-REMEMBERED:]:
            near = abs(2 * one.v - v - top) <= 3 * (top - v) and abs(2 * one.u - u - right) <= 3 * (right - u)
            if near and (least == most == one.scale if one.scale_at_bound else free):
                return True
        return False

    def polish(self, u: float, v: float) -> None:
        """Find a minimum by Newton's method within the bounds."""
        here = self.evaluate(_within(u, self.max_shift), _within(v, self.max_shift))
        for _ in range(MOST_STEPS):
            du, dv, is_newtons = _step(here, self.max_shift)
            longest = max(abs(du), abs(dv))
            if is_newtons and longest < CLOSE:
                here = self.after(here, du, dv)
                break
            while longest >= SHORTEST_STEP:
                there = self.evaluate(_within(here.u + du, self.max_shift), _within(here.v + dv, self.max_shift))
                if there.chi2 <= here.chi2:
                    break
                du, dv, longest = du / 2, dv / 2, longest / 2
            else:
                break
            here = there
        if not any(abs(one.u - here.u) < SAME and abs(one.v - here.v) < SAME for one in self.minima[-REMEMBERED:]):
            self.minima.append(here)
        limit = here.chi2 * (1 - TOLERANCE) - ROUNDING * self.image_square
        if limit < self.limit:
            self.best, self.limit = here, limit

    def after(self, here: Value, du: float, dv: float) -> Value:
        """Return what a step so short leads to, as its parabola has it; what scale and curvatures bend is left out."""
        u, v = _within(here.u + du, self.max_shift), _within(here.v + dv, self.max_shift)
        scale = here.scale + here.scale_slope[0] * du + here.scale_slope[1] * dv
        if not (here.scale_at_bound or 1 / self.max_scale < scale < self.max_scale):
            return self.evaluate(u, v)
        (gu, gv), (huu, huv, hvv) = here.gradient, here.hessian
        chi2 = here.chi2 + (gu * du + gv * dv) / 2
        gradient = (gu + huu * du + huv * dv, gv + huv * du + hvv * dv)
        return Value(u, v, chi2, scale, here.scale_at_bound, gradient, *here[6:])

    def evaluate(self, u: float, v: float) -> Value:
        """chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale."""
        low_v, low_u, height, width, table = self.here
        if not (low_v <= v <= low_v + height and low_u <= u <= low_u + width):
            low_v, low_u, height, width, table = self.here = self.whole.expanded(u, v)
        f, g = (v - low_v) / height, (u - low_u) / width
        f2, g2 = f * f, g * g
        f3, g3 = f2 * f, g2 * g
        powers = np.array(((1.0, f, f2, f3, f2 * f2, f3 * f2, f3 * f3), (1.0, g, g2, g3, g2 * g2, g3 * g2, g3 * g3)))
        values: list[float] = powers[0].dot(table).reshape(-1, POINTS).dot(powers[1]).tolist()
        square, square_u, square_uu, square_v, square_uv, _, square_vv, _, _ = values[:9]
        cross, cross_u, cross_uu, cross_v, cross_uv, _, cross_vv, _, _ = values[9:]
        low, high = 1 / self.max_scale, self.max_scale
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
            self.image_square - scale * (2 * cross - scale * square),
            scale,
            not free,
            (scale * (scale * square_u - 2 * cross_u), scale * (scale * square_v - 2 * cross_v)),
            (huu, huv, hvv),
            square,
            slope,
        )


def _by_bound(chi2: Floats) -> list[tuple[float, int, int]]:
    """Return boxes' bounds, rows and columns, the lowest bound first."""
    bounds: list[list[float]] = by_box(chi2).min((1, 3)).tolist()
    return sorted((bound, row, column) for row, line in enumerate(bounds) for column, bound in enumerate(line))


def _within(at: float, bound: float) -> float:
    """Keep a shift within its bound; one that misses it by rounding is at it."""
    if abs(at) >= bound * (1 - 1e-12):
        return bound if at > 0 else -bound
    return at


def _step(here: Value, max_shift: float) -> tuple[float, float, bool]:
    """Return a step within the bounds, and whether it is Newton's: where the curvature is negative it only descends."""
    (huu, huv, hvv), (gu, gv) = here.hessian, here.gradient
    determinant = huu * hvv - huv * huv
    if determinant > 1e-9 * (huu + hvv) * (huu + hvv) and huu > 0:  # as a rule
        du, dv = (huv * gv - hvv * gu) / determinant, (huv * gu - huu * gv) / determinant
        if abs(here.u + du) < max_shift > abs(here.v + dv) and abs(du) < LONGEST_STEP > abs(dv):
            return du, dv, True
    size = max(map(abs, here.hessian))
    if not 0 < size < inf:
        return 0.0, 0.0, True
    # Squares of the curvature may be beyond any float.
    huu, huv, hvv = (curvature / size for curvature in here.hessian)
    gu, gv = (slope / size for slope in here.gradient)
    if abs(here.u) >= max_shift and gu * here.u <= 0:  # held by its bound
        gu, huu, huv = 0.0, 1.0, 0.0
    if abs(here.v) >= max_shift and gv * here.v <= 0:
        gv, hvv, huv = 0.0, 1.0, 0.0
    smallest = (huu + hvv - sqrt((huu - hvv) * (huu - hvv) + 4 * huv * huv)) / 2
    is_newtons = smallest > 1e-9
    if not is_newtons:
        raised = max(-2 * smallest, 1e-3)
        huu, hvv = huu + raised, hvv + raised
    determinant = huu * hvv - huv * huv
    du, dv = (huv * gv - hvv * gu) / determinant, (huv * gu - huu * gv) / determinant
    beyond_u, beyond_v = abs(here.u + du) > max_shift, abs(here.v + dv) > max_shift
    if beyond_u or beyond_v:  # the lowest place of the parabola is then on a bound that is passed
        steps = []
        if beyond_u:
            held = (max_shift if here.u + du > 0 else -max_shift) - here.u
            steps.append((held, min(max(-(gv + huv * held) / hvv, -max_shift - here.v), max_shift - here.v)))
        if beyond_v:
            held = (max_shift if here.v + dv > 0 else -max_shift) - here.v
            steps.append((min(max(-(gu + huv * held) / huu, -max_shift - here.u), max_shift - here.u), held))
        du, dv = min(steps, key=lambda d: d[0] * (gu + huu * d[0] / 2 + huv * d[1]) + d[1] * (gv + hvv * d[1] / 2))
    long = max(abs(du), abs(dv)) / LONGEST_STEP
    return (du / long, dv / long, False) if long > 1 else (du, dv, is_newtons)
