"""Polynomials of the move, on boxes side by side: the square of the moved template, and its product with the image.

In each cell of the spline, a pixel wide, both are polynomials of the move, of degree 6 and 3 along each axis. On a box
a polynomial in Bernstein's form is at every place a mean of its coefficients, and so are its derivatives of theirs,
which are differences (Farouki 2012, Comput. Aided Geom. Des. 29, 379). Both are kept as of degree 6.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise
from math import ceil, comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DEGREE = 6  # of the square of the moved template, along an axis of a cell
POINTS = DEGREE + 1  # its coefficients
PARTS = 4  # of a box's side: boxes are a pixel wide, then a quarter, then a sixteenth, ...

_SPLINE = np.array(((1, 4, 1, 0), (-3, 0, 3, 0), (3, -6, 3, 0), (-1, 3, -3, 1))) / 6  # powers of the four taps


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
        """Say whether a move lies here."""
        return self.v[0] <= v <= self.v[-1] and self.u[0] <= u <= self.u[-1]

    def box(self, u: float, v: float) -> tuple[int, int]:
        """Return the row and column of the box of a move that lies here; upper edges belong to the next box."""
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
