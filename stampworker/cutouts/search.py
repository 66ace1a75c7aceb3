"""The search of the fit in numpy: the shift and scale at which chi2 is lowest within the bounds.

chi2 is evaluated on a grid of shifts, an eighth of a pixel apart. Newton's method, inside the bounds, starts on both
sides of every local minimum of the grid that can compete: two minima less than two points apart show up as one. The
scale follows in closed form at each shift.

Nothing proves that no minimum is lower. ``tests/reference/proven_minimum.py`` has a proof, and a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil, copysign, floor, inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FINE = 8  # intervals of the grid on a pixel
CLOSE = 1e-5  # pixels: Newton's method squares its error, so a step this short ends at 1e-10
NEAR = 1e-3  # pixels: no two minima are that close
LONGEST_STEP = 0.5  # pixels, half of a cell of the spline
SHORTEST_STEP = 1e-9  # pixels
MAX_STEPS = 200
ROUNDING = 1e-13  # of the image's square, to which chi2 is rounded where it is small beside it

# A shift at a fraction f of a cell: weights of the cell's four planes, shape (4, 4), and products of two weights,
# (7, 16), as polynomials in f.
_WEIGHTS = np.array(((1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1))) / 6
_PAIRS = np.array([np.convolve(one, other) for one in _WEIGHTS.T for other in _WEIGHTS.T]).T


# Of f ** 0 to f ** 6 and their first two derivatives.
_EXPONENTS = np.maximum(np.arange(7) - np.arange(3)[:, None], 0).astype(float)
_FACTORS = np.array(((1, 1, 1, 1, 1, 1, 1), (0, 1, 2, 3, 4, 5, 6), (0, 0, 2, 6, 12, 20, 30)), float)


class QuadraticForm(NamedTuple):
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
        row, along = bspline_weights(v, self.reach)
        column, across = bspline_weights(u, self.reach)
        total = along @ self.sums[row : row + 4, column : column + 4] @ across.T
        return float(total[0, 0]), float(total[0, 1]), float(total[1, 0])


class Minimum(NamedTuple):
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


def bspline_weights(at: float, reach: int) -> tuple[int, Floats]:
    """First of the four planes that a move by ``at`` needs; their weights and two derivatives, shape (3, 4)."""
    first, powers = _powers(at, reach)
    return first, powers[:, :4] @ _WEIGHTS


def _powers(at: float, reach: int) -> tuple[int, Floats]:
    """First plane of a move's cell; powers 0 to 6 of the fraction of the cell and two derivatives, shape (3, 7)."""
    cell = min(floor(at), reach - 2)  # the upper end is in the last cell
    return cell - 1 + reach, _FACTORS * (at - cell) ** _EXPONENTS


def global_minimum(form: QuadraticForm, max_shift: float, max_scale: float) -> Minimum:
    """Return the lowest minimum of chi2 that is found within the bounds of ``adjust_cutout``.

    No lower minimum was proven in 20 000 random fits and 3000 bright trails with hot pixels;
    ``STAMPWORKER_TEST_LONG=1 python -m pytest -s tests/cutouts/test_adjust_minimum.py`` compares.
    """
    search = _Search(form, max_shift, max_scale, {})
    starts, chi2 = search.fill_grid()
    rounding = ROUNDING * form.image_square
    found: list[Minimum] = []
    limit, last = float(chi2.min()), len(starts) - 1
    for j, i, least, is_flat_in_x in _competing_minima(chi2):
        if least > limit:
            continue
        for step in (-1, 1):
            x, y = (i + step, j) if is_flat_in_x else (i, j + step)
            found.append(search.descend(starts[min(max(x, 0), last)], starts[min(max(y, 0), last)], found))
            limit = min(limit, found[-1].chi2 - rounding)
    return min(found, key=lambda minimum: minimum.chi2)


def _competing_minima(chi2: Floats) -> Iterator[tuple[int, int, float, bool]]:
    """Yield row and column of local minima of a grid, how low chi2 can be near them, and if it rises less in x than y.

    Near a point chi2 can be lower by the largest rise to a neighbour. A point on an edge may have a lower neighbour
    inside.
    """
    padded = np.full((chi2.shape[0] + 2, chi2.shape[1] + 2), inf)
    padded[1:-1, 1:-1] = chi2
    pairs: Floats = np.array(((padded[1:-1, :-2], padded[1:-1, 2:]), (padded[:-2, 1:-1], padded[2:, 1:-1])))
    low, high = pairs.min(1), pairs.max(1)
    is_minimum = ((chi2 <= low) | (high == inf)).all(0)
    least = chi2 - np.maximum(np.where(high < inf, high, low).max(0) - chi2, 0)
    for j, i in np.argwhere(is_minimum & (least <= chi2.min())).tolist():
        yield j, i, float(least[j, i]), bool(low[0, j, i] < low[1, j, i])


class _Search(NamedTuple):
    """chi2 within the bounds."""

    form: QuadraticForm
    max_shift: float
    max_scale: float
    cells: dict[tuple[int, int], Floats]

    def fill_grid(self) -> tuple[list[float], Floats]:
        """Return where Newton's method starts for a point of an axis, and chi2 on the grid, shape (N, N)."""
        starts, weights, pairs = _axis(self.max_shift, self.form.reach)
        gram = self.form.gram.transpose(0, 2, 1, 3).reshape(pairs.shape[1], -1)
        square = np.maximum(pairs @ gram @ pairs.T, np.finfo(np.float64).tiny)
        product = weights @ self.form.projection @ weights.T
        scale = np.minimum(np.maximum(product, square / self.max_scale), square * self.max_scale) / square
        return starts, self.form.image_square - scale * (2 * product - scale * square)

    def expand_cell(self, row: int, column: int) -> Floats:
        """Return the moved template's square and product with the image in a cell, as polynomials, shape (2, 7, 7)."""
        if (row, column) not in self.cells:
            j, k = slice(row, row + 4), slice(column, column + 4)
            pairs = self.form.gram[j, k, j, k].transpose(0, 2, 1, 3).reshape(16, 16)
            self.cells[row, column] = cell = np.zeros((2, 7, 7))
            cell[0], cell[1, :4, :4] = _PAIRS @ pairs @ _PAIRS.T, _WEIGHTS @ self.form.projection[j, k] @ _WEIGHTS.T
        return self.cells[row, column]

    def evaluate(self, u: float, v: float) -> Minimum:
        """Return chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale."""
        row, along = _powers(v, self.form.reach)
        column, across = _powers(u, self.form.reach)
        squares, products = (along @ self.expand_cell(row, column) @ across.T).tolist()
        (square, square_u, square_uu), (square_v, square_uv, _), (square_vv, _, _) = squares
        (product, product_u, product_uu), (product_v, product_uv, _), (product_vv, _, _) = products
        low, high = 1 / self.max_scale, self.max_scale
        best = product / square if square > 0 else high
        scale, su, sv = min(max(best, low), high), 0.0, 0.0
        if free := low < best < high:
            su, sv = (product_u - scale * square_u) / square, (product_v - scale * square_v) / square
        huu = scale * (scale * square_uu - 2 * product_uu) - 2 * square * su * su
        huv = scale * (scale * square_uv - 2 * product_uv) - 2 * square * su * sv
        hvv = scale * (scale * square_vv - 2 * product_vv) - 2 * square * sv * sv
        gradient = (scale * (scale * square_u - 2 * product_u), scale * (scale * square_v - 2 * product_v))
        chi2 = self.form.image_square - scale * (2 * product - scale * square)
        return Minimum(u, v, chi2, scale, not free, gradient, (huu, huv, hvv), square, (su, sv))

    def descend(self, u: float, v: float, known: list[Minimum]) -> Minimum:
        """Find a minimum by Newton's method within the bounds, a known one where the way leads there.

        A step is halved until it does not lead up.
        """
        here = self.evaluate(_within(u, self.max_shift), _within(v, self.max_shift))
        for _ in range(MAX_STEPS):
            du, dv, is_newtons = newton_step(here, self.max_shift)
            for minimum in known if is_newtons else ():
                if abs(minimum.u - here.u - du) < NEAR and abs(minimum.v - here.v - dv) < NEAR:
                    return minimum
            is_last = is_newtons and max(abs(du), abs(dv)) < CLOSE
            limit = here.chi2 + is_last * ROUNDING * self.form.image_square  # rounding may say that it leads up
            while is_last or max(abs(du), abs(dv)) >= SHORTEST_STEP:
                there = self.evaluate(_within(here.u + du, self.max_shift), _within(here.v + dv, self.max_shift))
                if there.chi2 <= limit:
                    break
                du, dv, is_last, limit = du / 2, dv / 2, False, here.chi2
            else:
                break
            here = there
            if is_last:
                break
        return here


@lru_cache(maxsize=16)
def _axis(max_shift: float, reach: int) -> tuple[list[float], Floats, Floats]:
    """Return starts on an axis of N points, weights of the planes, shape (N, L), and of their pairs, (N, L²).

    Newton's method starts at the points; an end of the grid stands for the bound.
    """
    half = floor(max_shift * FINE)
    points = [i / FINE for i in range(-half, half + 1)]
    weights = np.zeros((len(points), 2 * reach + 1))
    for line, at in zip(weights, points, strict=True):
        first, four = bspline_weights(at, reach)
        line[first : first + 4] = four[0]
    points[0], points[-1] = -max_shift, max_shift
    return points, weights, (weights[:, :, None] * weights[:, None, :]).reshape(len(points), -1)


def _within(at: float, bound: float) -> float:
    """Keep a shift within its bound; one that misses it by rounding is at it."""
    if abs(at) >= bound * (1 - 1e-12):
        return bound if at > 0 else -bound
    return at


def newton_step(here: Minimum, max_shift: float) -> tuple[float, float, bool]:
    """Return a step within the bounds, and whether it is Newton's: it only descends where a curvature is negative."""
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
    d = [(huv * gv - hvv * gu) / determinant, (huv * gu - huu * gv) / determinant]
    at, room = here[:2], (copysign(max_shift, d[0]) - here.u, copysign(max_shift, d[1]) - here.v)
    axis = 0 if abs(d[0] * room[1]) > abs(d[1] * room[0]) else 1  # the bound that it passes first
    if abs(d[axis]) > abs(room[axis]):  # to the lowest point of the parabola on that bound
        d[axis], other = room[axis], 1 - axis
        lowest = -((gu, gv)[other] + huv * d[axis]) / (huu, hvv)[other]
        d[other] = min(max(lowest, -max_shift - at[other]), max_shift - at[other])
    excess = max(abs(d[0]), abs(d[1]), LONGEST_STEP) / LONGEST_STEP
    return d[0] / excess, d[1] / excess, is_newtons
