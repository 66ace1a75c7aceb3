"""The proven minimum of chi2: the oracle that a test compares the search of both cores with.

With the square t of the moved template and its product p with the image, both polynomials of the move in each cell of
the spline, chi2 at the best scale is the least over s of ``image² - 2 s p + s² t``: a minimum of functions that are
linear in p and t, hence concave in them.

In each cell, a pixel wide, t and p have degree 6 and 3 along each axis. On a box a polynomial in Bernstein's form is at
every place a mean of its coefficients, and its derivatives are means of theirs, which are differences (Farouki 2012,
Comput. Aided Geom. Des. 29, 379). So chi2 is nowhere in a box below the least of its values at the pairs of
coefficients (Cargo & Shisha 1966, J. Res. NBS 70B, 79). Boxes whose bound is not below the chi2 that is known are left
out. Newton's method finds that chi2. What remains around it is mostly so small that chi2 can be shown to have no other
minimum there (`_Search.is_settled`). Else the boxes are divided: the bound sharpens with the square of their side.

Nothing here uses the search of the package, only its quadratic form.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise
from math import ceil, comb, inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stampworker.cutouts.search import Minimum, QuadraticForm

Floats = NDArray[np.float64]

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
DEGREE = 6  # of the square of the moved template, along an axis of a cell
POINTS = DEGREE + 1  # its coefficients
PARTS = 4  # of a box's side: boxes are a pixel wide, then a quarter, then a sixteenth, ...

_SPLINE = np.array(((1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1))) / 6  # powers of the four taps


def proven_minimum(form: QuadraticForm, max_shift: float, max_scale: float) -> Minimum:
    """Return chi2 at its global minimum.

    Parameters
    ----------
    form : QuadraticForm
        Of the planes within reach of ``max_shift``.
    max_shift, max_scale : float
        Bounds, as in ``adjust_cutout``.

    Returns
    -------
    Minimum

    Notes
    -----
    The minimum is proved to be the lowest, but for rounding and 1e-7 of chi2, where the search ends by itself, as on
    stars. Where chi2 is nearly the same along a line, or small beside the squares of image and template and
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

    def __init__(self, form: QuadraticForm, max_shift: float, max_scale: float) -> None:
        self.image_square, self.max_shift, self.max_scale = form.image_square, max_shift, max_scale
        self.cells = cells_of(form.gram, form.projection, max_shift or 1.0)
        whole = ceil(max_shift) or 1.0
        # Where the bounds cut a cell, its slopes are those of the whole of it: what is left may be any narrow.
        self.whole = self.cells if max_shift in (0, whole) else cells_of(form.gram, form.projection, whole)
        self.here = Expansion(inf, inf, 0.0, 0.0, form.gram)  # around the last move; there is none
        self.negligible = float(self.cells.forms[0].max()) * NEGLIGIBLE
        self.minima: list[Minimum] = []
        self.best: Minimum
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
        """Return True if a minimum in a grid is shown to be the lowest there.

        With a = 1 / scale and ``L = image² - chi2`` at the minimum, chi2 is lower where
        ``R = L a² - 2 a p + t < 0``. R is 0 at the minimum and does not fall from there. So it is nowhere below 0 if it
        is convex in shift and a together; along an axis on whose bound the minimum is, it may be monotonic instead.
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

    def derivatives(self, forms: Floats, one: Minimum) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Return coefficients of R's derivatives by u, v, uu, uv and vv, over L, the latter with a following the shift.

        R is convex in shift and a if ``t'' - 2 a p'' - 2 p' p'ᵀ / L`` is positive definite. That is linear in a, so
        need only be seen at both bounds of the scale, and only at the one where the minimum is if R rises from there
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
        """Return True if a box touches a minimum, or nearly, with the scale free, or at one bound, in both."""
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

    def after(self, here: Minimum, du: float, dv: float) -> Minimum:
        """Return what a step so short leads to, as its parabola has it; what scale and curvatures bend is left out."""
        u, v = _within(here.u + du, self.max_shift), _within(here.v + dv, self.max_shift)
        scale = here.scale + here.scale_slope[0] * du + here.scale_slope[1] * dv
        if not (here.scale_at_bound or 1 / self.max_scale < scale < self.max_scale):
            return self.evaluate(u, v)
        (gu, gv), (huu, huv, hvv) = here.gradient, here.hessian
        chi2 = here.chi2 + (gu * du + gv * dv) / 2
        gradient = (gu + huu * du + huv * dv, gv + huv * du + hvv * dv)
        return Minimum(u, v, chi2, scale, here.scale_at_bound, gradient, *here[6:])

    def evaluate(self, u: float, v: float) -> Minimum:
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
        return Minimum(
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


def _step(here: Minimum, max_shift: float) -> tuple[float, float, bool]:
    """Return a step within the bounds, and whether it is Newton's: where the curvature is negative it only descends."""
    (huu, huv, hvv), (gu, gv) = here.hessian, here.gradient
    determinant = huu * hvv - huv * huv
    if determinant > 1e-9 * (huu + hvv) * (huu + hvv) and huu > 0:
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


class Grid(NamedTuple):
    """Boxes that fill a rectangle of moves, R rows of C."""

    v: list[float]  # (R + 1,): their edges
    u: list[float]  # (C + 1,)
    forms: Floats  # (2, 7 R, 7 C): coefficients of the moved template's square, and of its product with the image

    def place(self, row: int, column: int) -> tuple[float, float]:
        """Return u and v of a coefficient."""
        (i, over_v), (j, over_u) = divmod(row, POINTS), divmod(column, POINTS)
        v, u = self.v, self.u
        return u[j] + (u[j + 1] - u[j]) * (over_u / DEGREE), v[i] + (v[i + 1] - v[i]) * (over_v / DEGREE)

    def corner(self, at: int) -> tuple[float, float]:
        """Return u and v of a corner of a box, by its number along rows of corners."""
        row, column = divmod(at, 2 * len(self.u) - 2)
        return self.u[(column + 1) // 2], self.v[(row + 1) // 2]

    def part(self, top: int, bottom: int, left: int, right: int) -> Grid:
        """Return the boxes of rows from ``top`` until ``bottom`` and columns from ``left`` until ``right``."""
        forms = self.forms[:, POINTS * top : POINTS * bottom, POINTS * left : POINTS * right]
        return Grid(self.v[top : bottom + 1], self.u[left : right + 1], forms)

    def divided(self) -> Grid:
        """Divide each box into `PARTS` along each axis."""
        forms = _both_ways(_division(len(self.v) - 1), self.forms, _division(len(self.u) - 1))
        return Grid(_divided(self.v), _divided(self.u), forms)

    def holds(self, u: float, v: float) -> bool:
        """Return True if a move is here."""
        return self.v[0] <= v <= self.v[-1] and self.u[0] <= u <= self.u[-1]

    def box(self, u: float, v: float) -> tuple[int, int]:
        """Return the row and column of the box of a move here; upper edges belong to the next box."""
        rows, columns = len(self.v) - 1, len(self.u) - 1
        return min(bisect_right(self.v, v), rows) - 1, min(bisect_right(self.u, u), columns) - 1

    def expanded(self, u: float, v: float) -> Expansion:
        """Return the polynomials in the box of a move."""
        row, column = self.box(u, v)
        (low_v, high_v), (low_u, high_u), forms = self.part(row, row + 1, column, column + 1)
        by_v, by_u = _expansion(high_v - low_v), _expansion(high_u - low_u)
        made = _both_ways(by_v, forms, by_u).reshape(2, 3, POINTS, 3 * POINTS).transpose(2, 0, 1, 3)
        return Expansion(low_v, low_u, high_v - low_v, high_u - low_u, made.reshape(POINTS, -1))


class Expansion(NamedTuple):
    """The polynomials of one box in powers of the place in it, which runs from 0 to 1."""

    v: float  # least
    u: float
    height: float
    width: float
    table: Floats  # (7, 126): powers of v; square or product, its derivatives by v, those by u, powers of u


def cells_of(gram: Floats, projection: Floats, max_shift: float) -> Grid:
    """Return the spline's cells within the bounds.

    Parameters
    ----------
    gram : ndarray, shape (L, L, L, L)
        Products of the moved coefficient planes (j, k) and (j', k').
    projection : ndarray, shape (L, L)
        Their products with the image.
    max_shift : float
        Bound of the moves, pixels, at most (L - 3) / 2.
    """
    planes = len(projection)
    edges, squares, products = _functionals(max_shift, planes // 2)
    pairs = gram.transpose(0, 2, 1, 3).reshape(planes * planes, planes * planes)
    forms = np.empty((2, len(squares), len(squares)))
    np.dot(squares.dot(pairs), squares.T, out=forms[0])
    np.dot(products.dot(projection), products.T, out=forms[1])
    return Grid(edges, edges, forms)


def with_derivatives(planes: Floats) -> Floats:
    """Return coefficients and, beside and below them, those of derivatives: (K, 7 R, 7 C) becomes (K, 21 R, 21 C).

    Of rows the first third are values, the second slopes by v, the last curvatures; of columns the same by u. Slopes
    are by the place in the box, whatever its width.
    """
    _, rows, columns = planes.shape
    return _both_ways(_derivatives(rows // POINTS), planes, _derivatives(columns // POINTS))


def by_box(plane: Floats) -> Floats:
    """Return a plane of coefficients by row of boxes, row in the box, column of boxes and column in the box."""
    rows, columns = plane.shape
    return plane.reshape(rows // POINTS, POINTS, columns // POINTS, POINTS)


@lru_cache(maxsize=16)
def _functionals(max_shift: float, reach: int) -> tuple[list[float], Floats, Floats]:
    """Return what makes Bernstein coefficients of the form in the N cells of each axis.

    Returns
    -------
    edges : list, length N + 1
        Of the cells, cut at the bounds.
    squares : ndarray, shape (7 N, L²)
        From pairs of planes; ``squares @ gram @ squares.T`` has the coefficients of the moved template's square.
    products : ndarray, shape (7 N, L)
        From planes.
    """
    cells = range(-ceil(max_shift), ceil(max_shift))
    edges = [min(max(float(edge), -max_shift), max_shift) for edge in (*cells, ceil(max_shift))]
    squares = np.zeros((len(cells), POINTS, 2 * reach + 1, 2 * reach + 1))
    products = np.zeros((len(cells), POINTS, 2 * reach + 1))
    for i, cell in enumerate(cells):
        taps = _bernstein(edges[i] - cell, edges[i + 1] - cell)
        four = slice(cell - 1 + reach, cell + 3 + reach)
        squares[i, :, four, four] = _multiply(taps, taps)
        products[i, :, four] = _multiply(taps, np.ones((4, 1)))[:, :, 0]
    return edges, squares.reshape(len(cells) * POINTS, -1), products.reshape(len(cells) * POINTS, -1)


def _bernstein(a: float, b: float) -> Floats:
    """Return the Bernstein coefficients, (4, 4), of the four taps on the part ``a`` to ``b`` of a cell."""
    part = np.array([[comb(k, j) * a ** (k - j) * (b - a) ** j if k >= j else 0.0 for k in range(4)] for j in range(4)])
    coefficients = np.array([[comb(i, k) / comb(3, k) for k in range(4)] for i in range(4)])
    return np.asarray(coefficients @ part @ _SPLINE)


def _multiply(one: Floats, other: Floats) -> Floats:
    """Return the coefficients, (7, M, N), of the products of cubics, (4, M) and (4, N)."""
    made = np.zeros((POINTS, one.shape[1], other.shape[1]))
    for i in range(4):
        for j in range(4):
            made[i + j] += comb(3, i) * comb(3, j) / comb(DEGREE, i + j) * np.outer(one[i], other[j])
    return made


def _both_ways(by_rows: Floats, planes: Floats, by_columns: Floats) -> Floats:
    """Return ``by_rows @ planes @ by_columns.T``, for which small products of stacks take longer."""
    count, rows, columns = planes.shape
    turned: Floats = planes.reshape(-1, columns).dot(by_columns.T)
    return by_rows @ turned.reshape(count, rows, -1)


def _divided(edges: list[float]) -> list[float]:
    """Return the edges of the parts of intervals."""
    inner = [low + (high - low) * (part / PARTS) for low, high in pairwise(edges) for part in range(PARTS)]
    return [*inner, edges[-1]]


@lru_cache(maxsize=64)
def _division(boxes: int) -> Floats:
    """Return what turns the coefficients on intervals into those on their parts, shape (7 PARTS N, 7 N)."""
    places = np.linspace(0, 1, POINTS)

    def values(x: Floats) -> Floats:
        return np.array([comb(DEGREE, i) * x**i * (1 - x) ** (DEGREE - i) for i in range(POINTS)]).T

    one = np.concatenate([np.linalg.solve(values(places), values((part + places) / PARTS)) for part in range(PARTS)])
    return np.kron(np.eye(boxes), one)


@lru_cache(maxsize=64)
def _derivatives(boxes: int) -> Floats:
    """Return what turns the coefficients on N intervals into themselves, of slopes and of curvatures, (21 N, 7 N).

    By the place in the interval, whatever its width, and as of polynomials of the same degree.
    """
    slope = np.diag([2.0 * i - DEGREE for i in range(POINTS)])
    slope += np.diag([float(DEGREE - i) for i in range(DEGREE)], 1) - np.diag([i + 1.0 for i in range(DEGREE)], -1)
    return np.concatenate([np.kron(np.eye(boxes), one) for one in (np.eye(POINTS), slope, slope @ slope)])


_POWERS = np.array(  # row k: shares of the coefficients in the k-th power
    [
        [comb(DEGREE, k) * comb(k, i) * (-1.0) ** (k - i) if i <= k else 0.0 for i in range(POINTS)]
        for k in range(POINTS)
    ]
)
_SLOPES = np.diag(np.arange(1.0, POINTS), 1)  # of powers


@lru_cache(maxsize=64)
def _expansion(width: float) -> Floats:
    """Return what turns coefficients on an interval into powers of the place in it, of two derivatives too, (21, 7)."""
    return np.concatenate([_POWERS, _SLOPES @ _POWERS / width, _SLOPES @ _SLOPES @ _POWERS / width**2])
