"""The search of the fit in numpy: the shift and scale at which chi2 is lowest, in the whole of the bounds.

In each cell of the spline, a pixel wide, the square t of the moved template and its product p with the image are
polynomials of the shift, of degree 6 and 3 along each axis, and chi2 at the best scale is the least over s of
``image² - 2 s p + s² t``: a minimum of functions that are linear in p and t, hence concave in them.

Written in Bernstein's form on a box, a polynomial is at every place a mean of its coefficients (Cargo & Shisha 1966,
J. Res. NBS 70B, 79). So chi2 is nowhere in the box below the least of its values at the pairs of coefficients. Boxes
whose bound is not below the chi2 that is known are left out. Newton's method finds that chi2, and what remains around
it is as a rule so small that the form is convex there (`_Search.is_convex`): then there is no other minimum. Where it
is not, the boxes are divided, which sharpens the bound with the square of their side.
"""

from __future__ import annotations

from bisect import bisect_right as bisect
from functools import lru_cache
from itertools import pairwise
from math import ceil, comb, floor, inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CLOSE = 1e-5  # pixels: Newton's method squares its error, so a step this short ends at 1e-10
LONGEST_STEP = 0.5  # pixels, half of a cell
SHORTEST_STEP = 1e-9  # pixels
MOST_STEPS = 50
PARTS = 4  # of a box's side: boxes are a pixel wide, then a quarter, then a sixteenth, ...
TOGETHER = 9  # boxes that are divided as one rectangle; where more remain, each is by itself
MOST_DIVISIONS = 5  # of a rectangle: to a thousandth of a pixel
MOST_SINGLE = 2  # of boxes by themselves
MOST_MINIMA = 64  # of a valley without end
TOLERANCE = 1e-7  # of chi2; a difference that no one can see is not looked for
NEGLIGIBLE = 1e-20  # of the template's largest square
ROUNDING = 1e-13  # of the image's square, to which chi2 is rounded where it is small beside it
DEGREE = 6  # of the square of the moved template, along an axis of a cell
POINTS = DEGREE + 1  # its coefficients

_SPLINE = np.array(((1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1))) / 6  # powers of the four taps


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
    The last boxes are a sixteenth of a pixel wide. One that touches a minimum that was found, has its scale in the
    same range, and is no lower at its corners, is taken for that minimum's own neighbourhood, where nothing better
    could be shown.
    """
    search = _Search(form, max_shift, max_scale)
    if not max_shift:
        return search.evaluate(0.0, 0.0)
    search.look(search.cells)
    return search.best


class _Grid(NamedTuple):
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

    def part(self, top: int, bottom: int, left: int, right: int) -> _Grid:
        """Return the boxes of rows from ``top`` until ``bottom`` and columns from ``left`` until ``right``."""
        forms = self.forms[:, POINTS * top : POINTS * bottom, POINTS * left : POINTS * right]
        return _Grid(self.v[top : bottom + 1], self.u[left : right + 1], forms)

    def divided(self) -> _Grid:
        """Divide each box into `PARTS` along each axis."""
        forms = _both_ways(_division(len(self.v) - 1), self.forms, _division(len(self.u) - 1))
        return _Grid(_divided(self.v), _divided(self.u), forms)

    def holds(self, one: Value) -> bool:
        """Say whether a minimum lies here."""
        return self.v[0] <= one.v <= self.v[-1] and self.u[0] <= one.u <= self.u[-1]


class _Search:
    """What is known of chi2."""

    def __init__(self, form: Form, max_shift: float, max_scale: float) -> None:
        self.image_square, self.max_shift, self.max_scale = form.image_square, max_shift, max_scale
        self.cells = _cells(form, max_shift or 1.0)
        self.cell = _Cell(inf, inf, 0.0, 0.0, form.gram)  # of the last move; none
        self.negligible = float(self.cells.forms[0].max()) * NEGLIGIBLE
        self.minima: list[Value] = []
        self.best: Value
        self.limit = inf  # a chi2 below it is of interest

    def look(self, grid: _Grid, divisions: int = 0) -> None:
        """Find what is lower in a grid than what is known."""
        chi2, scale = self.measure(grid.forms)
        if not self.minima:
            self.polish(*grid.place(*divmod(int(chi2.argmin()), chi2.shape[1])))
        left = self.left(grid, chi2)
        if left is None or self.is_settled(left):
            return
        corners = _boxes(chi2)[:, ::DEGREE, :, ::DEGREE].ravel()
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
                elif len(self.minima) < MOST_MINIMA and not self.knows(box, _boxes(scale)[row, :, column]):
                    lowest = _boxes(chi2)[row, ::DEGREE, column, ::DEGREE].argmin()
                    self.polish(*box.corner(int(lowest)))

    def left(self, grid: _Grid, chi2: Floats) -> _Grid | None:
        """Return the rectangle around the boxes where chi2 may be of interest, and around the best where it is here."""
        rows, columns = (chi2 < self.limit).nonzero()
        if not rows.size:
            return None
        top, bottom = rows.item(0) // POINTS, rows.item(-1) // POINTS
        left, right = int(columns.min()) // POINTS, int(columns.max()) // POINTS
        best = self.best
        if grid.holds(best):
            row, column = _interval(grid.v, best.v), _interval(grid.u, best.u)
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

    def is_settled(self, grid: _Grid) -> bool:
        """Say whether a minimum that lies in a grid is shown to be the lowest there.

        With a = 1 / scale and ``L = image² - chi2`` at the minimum, chi2 is lower where
        ``R = L a² - 2 a p + t < 0``. R is 0 at the minimum and does not fall from there. So it is nowhere below 0 if it
        is convex in shift and a together; along an axis on whose bound the minimum lies, it may be monotonic instead.
        Splines and their slopes go on from cell to cell: what is convex in each cell is so in all.
        """
        one = self.best
        if not grid.holds(one) or not one.chi2 < self.image_square:
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
        planes = parts.dot(forms.reshape(2, -1)).reshape(-1, rows, columns)
        planes = _both_ways(_derivatives(rows // POINTS), planes, _derivatives(columns // POINTS))
        u, v = planes[:, :rows, columns:-columns], planes[:, rows:-rows, :columns]
        uu, uv = planes[:, :rows, -columns:], planes[:, rows:-rows, columns:-columns]
        vv = planes[:, -rows:, :columns]
        if len(parts) == 1:
            return u, v, uu, uv, vv
        (p_u, p_v), u, v = (u[2], v[2]), u[:2], v[:2]
        return u, v, uu[:2] - p_u * p_u, uv[:2] - p_u * p_v, vv[:2] - p_v * p_v

    def knows(self, box: _Grid, scale: Floats) -> bool:
        """Say whether a box touches a minimum, or nearly, with the scale free, or at one bound, in both."""
        (v, top), (u, right) = box.v, box.u
        least, most = scale.min(), scale.max()
        free = 1 / self.max_scale < least and most < self.max_scale
        for one in self.minima:
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
        self.minima.append(here)
        if len(self.minima) == 1 or here.chi2 < self.best.chi2:
            self.best = here
            self.limit = here.chi2 * (1 - TOLERANCE) - ROUNDING * self.image_square

    def after(self, here: Value, du: float, dv: float) -> Value:
        """Return what a step so short leads to, as its parabola has it; curvatures are as they were."""
        u, v = _within(here.u + du, self.max_shift), _within(here.v + dv, self.max_shift)
        scale = here.scale + here.scale_slope[0] * du + here.scale_slope[1] * dv
        if not (here.scale_at_bound or 1 / self.max_scale < scale < self.max_scale):
            return self.evaluate(u, v)
        chi2 = here.chi2 + (here.gradient[0] * du + here.gradient[1] * dv) / 2
        return Value(u, v, chi2, scale, *here[4:])

    def evaluate(self, u: float, v: float) -> Value:
        """chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale."""
        low_v, low_u, height, width, table = self.cell
        if not (low_v <= v <= low_v + height and low_u <= u <= low_u + width):
            low_v, low_u, height, width, table = self.cell = _cell(self.cells, u, v)
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


def _interval(edges: list[float], at: float) -> int:
    """Return the number of the interval; the upper end belongs to the last."""
    return min(bisect(edges, at), len(edges) - 1) - 1


def _boxes(plane: Floats) -> Floats:
    """Return a plane of coefficients by row of boxes, row in the box, column of boxes and column in the box."""
    rows, columns = plane.shape
    return plane.reshape(rows // POINTS, POINTS, columns // POINTS, POINTS)


def _by_bound(chi2: Floats) -> list[tuple[float, int, int]]:
    """Return boxes' bounds, rows and columns, the lowest bound first."""
    bounds: list[list[float]] = _boxes(chi2).min((1, 3)).tolist()
    return sorted((bound, row, column) for row, line in enumerate(bounds) for column, bound in enumerate(line))


def _cells(form: Form, max_shift: float) -> _Grid:
    """Return the spline's cells within the bounds."""
    edges, squares, products = _functionals(max_shift)
    planes = form.sums.shape[0]
    gram = form.gram.transpose(0, 2, 1, 3).reshape(planes * planes, planes * planes)
    forms = np.empty((2, len(squares), len(squares)))
    np.dot(squares.dot(gram), squares.T, out=forms[0])
    np.dot(products.dot(form.projection), products.T, out=forms[1])
    return _Grid(edges, edges, forms)


@lru_cache(maxsize=16)
def _functionals(max_shift: float) -> tuple[list[float], Floats, Floats]:
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
    reach = reach_of(max_shift)
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


class _Cell(NamedTuple):
    """A cell of the spline for `_Search.evaluate`."""

    v: float  # least
    u: float
    height: float
    width: float
    table: Floats  # (7, 126): powers of v; square or product, its derivatives by v, those by u, powers of u


def _cell(cells: _Grid, u: float, v: float) -> _Cell:
    """Return the cell of a move."""
    row, column = _interval(cells.v, v), _interval(cells.u, u)
    (low_v, high_v), (low_u, high_u), forms = cells.part(row, row + 1, column, column + 1)
    by_v, by_u = _expansion(high_v - low_v), _expansion(high_u - low_u)
    made = _both_ways(by_v, forms, by_u).reshape(2, 3, POINTS, 3 * POINTS).transpose(2, 0, 1, 3)
    return _Cell(low_v, low_u, high_v - low_v, high_u - low_u, made.reshape(POINTS, -1))


@lru_cache(maxsize=64)
def _expansion(width: float) -> Floats:
    """Return what turns coefficients on an interval into powers of the place in it, of two derivatives too, (21, 7)."""
    return np.concatenate([_POWERS, _SLOPES @ _POWERS / width, _SLOPES @ _SLOPES @ _POWERS / width**2])


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
