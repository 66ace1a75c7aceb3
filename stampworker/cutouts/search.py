"""The search of the fit in numpy: the shift and scale at which chi2 is lowest, in the whole of the bounds.

In each cell of the spline, a pixel wide, the square t of the moved template and its product p with the image are
polynomials of the shift, of degree 6 and 3 along each axis, and chi2 at the best scale is the least over s of
``image² - 2 s p + s² t``: a minimum of functions that are linear in p and t, hence concave in them.

Written in Bernstein's form on a box, a polynomial is at every place a mean of its coefficients (Cargo & Shisha 1966,
J. Res. NBS 70B, 79). So chi2 is nowhere in the box below the least of its values at the pairs of coefficients. Boxes
whose bound is not below the chi2 that is known are left out; the others are divided, which sharpens the bound with the
square of their side. What remains is polished by Newton's method.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, comb, floor, inf, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CLOSE = 1e-5  # pixels: Newton's method squares its error, so a step this short ends at 1e-10
LONGEST_STEP = 0.5  # pixels, half of a cell
SHORTEST_STEP = 1e-9  # pixels
MOST_STEPS = 50
PARTS = 4  # of a box's side: boxes are a pixel wide, then a quarter, then a sixteenth
AT_ONCE = 64  # of the smallest boxes; memory for more is better saved
TOLERANCE = 1e-7  # of chi2; a difference that no one can see is not looked for
NEGLIGIBLE = 1e-20  # of the template's largest square
ROUNDING = 1e-13  # of the image's square, to which chi2 is rounded where it is small beside it
POINTS = 7  # coefficients of a polynomial of degree 6

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
    cells: dict[tuple[int, int], Floats]  # what `_polynomials` made so far

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
    first, f = _cell(at, reach)
    g = 1 - f
    weights = (
        (g * g * g / 6, (4 - 3 * f * f * (2 - f)) / 6, (4 - 3 * g * g * (2 - g)) / 6, f * f * f / 6),
        (-g * g / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f * f / 2),
        (g, 3 * f - 2, 3 * g - 2, f),
    )
    return first, np.array(weights)


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
    same range, and is no lower at its corners, is taken for that minimum's own neighbourhood.
    """
    if not max_shift:
        return _evaluate(form, 0.0, 0.0, max_scale)
    scales = _Scales(1 / max_scale, max_scale, float(form.gram.max()) * NEGLIGIBLE)
    boxes = _measure(form, *_cells(form, max_shift), scales)
    boxes = _divide(form, boxes, boxes.bound <= boxes.corner.min(), scales)
    best = _polish(form, *_lowest_corner(boxes, int(boxes.corner.argmin())), max_shift, max_scale)
    found = [best]
    left = np.flatnonzero(boxes.bound < _limit(form, best))
    for first in range(0, left.size, AT_ONCE):
        small = _divide(form, boxes, left[first : first + AT_ONCE], scales)
        for at in small.bound.argsort().tolist():
            if small.bound[at] >= _limit(form, best):
                break
            if small.corner[at] < _limit(form, best) or not any(_belongs(small, at, one, scales) for one in found):
                found.append(_polish(form, *_lowest_corner(small, at), max_shift, max_scale))
                best = min(best, found[-1], key=_chi2)
    return best


class _Scales(NamedTuple):
    """Bounds of the scale, and a square of the template beside which nothing is to be seen."""

    low: float
    high: float
    negligible: float


class _Boxes(NamedTuple):
    """Rectangles of moves, K of them."""

    places: Floats  # (K, 4): least v, least u, height, width
    forms: Floats  # (2, K, 7, 7): coefficients of the moved template's square, and of its product with the image
    scale: Floats  # (K, 7, 7): best at each pair of coefficients
    chi2: Floats  # (K, 7, 7): with it; true at the corners
    bound: Floats  # (K,): below it chi2 is nowhere in the box
    corner: Floats  # (K,): the lowest chi2 at a corner


def _limit(form: Form, best: Value) -> float:
    """Below what a bound must lie to be of interest."""
    return best.chi2 * (1 - TOLERANCE) - ROUNDING * form.image_square


def _cells(form: Form, max_shift: float) -> tuple[Floats, Floats]:
    """Places and forms of the spline's cells within the bounds."""
    places, squares, products = _functionals(max_shift)
    planes = form.sums.shape[0]
    gram = form.gram.transpose(0, 2, 1, 3).reshape(planes * planes, planes * planes)
    forms = np.array((squares @ gram @ squares.T, products @ form.projection @ products.T))
    return places, _apart(forms[:, None], len(squares) // POINTS)


def _apart(forms: Floats, parts: int) -> Floats:
    """Return parts of boxes, (2, K, 7 parts, 7 parts), as boxes, (2, K parts², 7, 7)."""
    return forms.reshape(2, -1, parts, POINTS, parts, POINTS).swapaxes(3, 4).reshape(2, -1, POINTS, POINTS)


def _measure(form: Form, places: Floats, forms: Floats, scales: _Scales) -> _Boxes:
    """Evaluate chi2 at the coefficients of boxes."""
    square, product = forms
    # A coefficient of the square may be negative; then the best scale is the bound on the product's side.
    middle = (scales.low + scales.high) / 2
    scale = product - middle * square
    scale /= np.maximum(square, scales.negligible)
    scale += middle
    np.maximum(scale, scales.low, out=scale)
    np.minimum(scale, scales.high, out=scale)
    chi2 = product + product
    chi2 -= scale * square
    chi2 *= scale
    np.subtract(form.image_square, chi2, out=chi2)
    bound = chi2.reshape(-1, POINTS * POINTS).min(1)
    corner = chi2[:, :: POINTS - 1, :: POINTS - 1].reshape(-1, 4).min(1)
    return _Boxes(places, forms, scale, chi2, bound, corner)


def _divide(form: Form, boxes: _Boxes, chosen: NDArray[Any], scales: _Scales) -> _Boxes:
    """Divide the chosen boxes into `PARTS` along each axis."""
    places = (boxes.places[chosen] @ _PLACES).reshape(-1, 4)
    forms = _DIVISION @ boxes.forms[:, chosen] @ _DIVISION.T
    return _measure(form, places, _apart(forms, PARTS), scales)


def _lowest_corner(boxes: _Boxes, at: int) -> tuple[float, float]:
    """Return u and v of the lowest corner of a box."""
    row, column = divmod(int(boxes.chi2[at, :: POINTS - 1, :: POINTS - 1].argmin()), 2)
    v, u, height, width = boxes.places[at].tolist()
    return u + column * width, v + row * height


def _belongs(boxes: _Boxes, at: int, value: Value, scales: _Scales) -> bool:
    """Say whether a box touches a minimum, or nearly, with the scale free, or at one bound, in all of it and there."""
    v, u, height, width = boxes.places[at].tolist()
    if abs(value.v - v - height / 2) > 1.5 * height or abs(value.u - u - width / 2) > 1.5 * width:
        return False
    least, most = boxes.scale[at].min(), boxes.scale[at].max()
    if value.scale_at_bound:
        return bool(least == most == value.scale)
    return bool(scales.low < least and most < scales.high)


def _chi2(value: Value) -> float:
    return value.chi2


@lru_cache(maxsize=16)
def _functionals(max_shift: float) -> tuple[Floats, Floats, Floats]:
    """Return what makes Bernstein coefficients of the form in the N cells of each axis.

    Returns
    -------
    places : ndarray, shape (N², 4)
        Least v and u of the cells, heights and widths, cut at the bounds.
    squares : ndarray, shape (7 N, L²)
        From pairs of planes; ``squares @ gram @ squares.T`` has the coefficients of the moved template's square.
    products : ndarray, shape (7 N, L)
        From planes.
    """
    reach = reach_of(max_shift)
    cells = np.arange(-ceil(max_shift), ceil(max_shift))
    edges = np.clip(np.append(cells, ceil(max_shift)), -max_shift, max_shift).astype(float)
    squares = np.zeros((cells.size, POINTS, 2 * reach + 1, 2 * reach + 1))
    products = np.zeros((cells.size, POINTS, 2 * reach + 1))
    for i, cell in enumerate(cells.tolist()):
        taps = _bernstein(edges[i] - cell, edges[i + 1] - cell)
        four = slice(cell - 1 + reach, cell + 3 + reach)
        squares[i, :, four, four] = _multiply(taps, taps)
        products[i, :, four] = _multiply(taps, np.ones((4, 1)))[:, :, 0]
    along = np.array((edges[:-1], np.diff(edges)))
    rows, columns = along.repeat(cells.size, 1), np.tile(along, cells.size)
    places = np.array((rows[0], columns[0], rows[1], columns[1])).T
    return places, squares.reshape(cells.size * POINTS, -1), products.reshape(cells.size * POINTS, -1)


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
            made[i + j] += comb(3, i) * comb(3, j) / comb(6, i + j) * np.outer(one[i], other[j])
    return made


def _division() -> Floats:
    """Return what turns the coefficients on an interval into those on its parts, shape (7 PARTS, 7)."""
    places = np.linspace(0, 1, POINTS)

    def values(x: Floats) -> Floats:
        return np.array([comb(6, i) * x**i * (1 - x) ** (6 - i) for i in range(POINTS)]).T

    return np.concatenate([np.linalg.solve(values(places), values((part + places) / PARTS)) for part in range(PARTS)])


def _parts() -> Floats:
    """Return what turns the place of a box into those of its parts, shape (4, 4 PARTS²)."""
    made = np.zeros((4, PARTS, PARTS, 4))
    made[0, :, :, 0] = made[1, :, :, 1] = 1
    made[2, :, :, 0] = np.arange(PARTS)[:, None] / PARTS
    made[3, :, :, 1] = np.arange(PARTS) / PARTS
    made[2, :, :, 2] = made[3, :, :, 3] = 1 / PARTS
    return made.reshape(4, -1)


_DIVISION, _PLACES = _division(), _parts()


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
    both = np.einsum("ia,kc->ikac", _SPLINE, _SPLINE)
    one_axis = np.zeros((7, 4, 4))
    for i in range(4):
        for k in range(4):
            one_axis[i + k] += both[i, k]
    squares = np.einsum("mac,nbd->mnabcd", one_axis, one_axis).reshape(49, 256)
    products = np.zeros((7, 7, 4, 4))
    products[:4, :4] = np.einsum("ia,jb->ijab", _SPLINE, _SPLINE)
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


def _polish(form: Form, u: float, v: float, max_shift: float, max_scale: float) -> Value:
    """Newton's method within the bounds."""
    here = _evaluate(form, u, v, max_scale)
    for _ in range(MOST_STEPS):
        du, dv, is_newtons = _step(here, max_shift)
        is_last = is_newtons and max(abs(du), abs(dv)) < CLOSE
        # Of a step so short, rounding may say that it leads up.
        limit = here.chi2 + (ROUNDING * form.image_square if is_last else 0.0)
        while True:
            there = _evaluate(form, _within(here.u + du, max_shift), _within(here.v + dv, max_shift), max_scale)
            if there.chi2 <= limit:
                break
            du, dv, is_last = du / 2, dv / 2, False
            if max(abs(du), abs(dv)) < SHORTEST_STEP:
                return here
        here = there
        if is_last:
            break
    return here


def _within(at: float, bound: float) -> float:
    """Keep a shift within its bound; one that misses it by rounding is at it."""
    if abs(at) >= bound * (1 - 1e-12):
        return bound if at > 0 else -bound
    return at


def _step(here: Value, max_shift: float) -> tuple[float, float, bool]:
    """Return a step within the bounds, and whether it is Newton's: where the curvature is negative it only descends."""
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
