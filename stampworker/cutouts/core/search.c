/* The search: a grid of shifts, and Newton's method from its local minima; see search.py. */
#include "core.h"

#include <float.h>

/* The constants of search.py. */
enum { FINE = LANES, MAX_STEPS = 200 };
static const double CLOSE = 1e-5, LONGEST_STEP = 0.5, SHORTEST_STEP = 1e-9, ROUNDING = 1e-13;

typedef double Lanes __attribute__((vector_size(64), aligned(8), may_alias)); /* LANES of them */

/* Set the chi2 and derivatives of a minimum from those of the square of the moved template, `tt`, and of its product
 * with the image, `p`: value, u, v, uu, uv, vv. */
static void find_scale(const QuadraticForm *form, const double tt[6], const double p[6], Minimum *at)
{
    const double low = 1 / form->max_scale, high = form->max_scale, best = tt[0] > 0 ? p[0] / tt[0] : high;
    const double scale = clip(best, low, high);
    at->scale = scale, at->square = tt[0], at->scale_at_bound = !(low < best && best < high);
    at->chi2 = form->image_square - scale * (2 * p[0] - scale * tt[0]);
    at->gu = scale * (scale * tt[1] - 2 * p[1]), at->gv = scale * (scale * tt[2] - 2 * p[2]);
    at->huu = scale * (scale * tt[3] - 2 * p[3]);
    at->huv = scale * (scale * tt[4] - 2 * p[4]);
    at->hvv = scale * (scale * tt[5] - 2 * p[5]);
    if (!at->scale_at_bound) {
        const double su = (p[1] - scale * tt[1]) / tt[0], sv = (p[2] - scale * tt[2]) / tt[0];
        at->scale_u = su, at->scale_v = sv;
        at->huu -= 2 * tt[0] * su * su, at->huv -= 2 * tt[0] * su * sv, at->hvv -= 2 * tt[0] * sv * sv;
    }
}

/* The sum of planes by their weights at a move, and its derivatives by u, v, uu, uv and vv. */
void sum_moved(const QuadraticForm *form, const double *planes, double u, double v, double sums[6])
{
    double X[3][4], Y[3][4];
    const int column = bspline_weights(u, form->reach, X), row = bspline_weights(v, form->reach, Y);
    memset(sums, 0, 6 * sizeof *sums);
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 4; i++) {
            const double q = planes[(row + t) * form->count + column + i];
            sums[0] += Y[0][t] * X[0][i] * q, sums[1] += Y[0][t] * X[1][i] * q, sums[2] += Y[1][t] * X[0][i] * q;
            sums[3] += Y[0][t] * X[2][i] * q, sums[4] += Y[1][t] * X[1][i] * q, sums[5] += Y[2][t] * X[0][i] * q;
        }
}

/* chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale. */
static Minimum evaluate(const QuadraticForm *form, double u, double v)
{
    double X[3][4], Y[3][4], pairs[3][4][4], tt[6] = {0}, p[6];
    const int column = bspline_weights(u, form->reach, X), row = bspline_weights(v, form->reach, Y);
    for (int i = 0; i < 4; i++)
        for (int j = i; j < 4; j++) {
            pairs[0][i][j] = X[0][i] * X[0][j];
            pairs[1][i][j] = X[1][i] * X[0][j] + X[0][i] * X[1][j];
            pairs[2][i][j] = X[2][i] * X[0][j] + 2 * X[1][i] * X[1][j] + X[0][i] * X[2][j];
        }
    for (int a = 0; a < 4; a++)
        for (int t = 0; t + a < 4; t++) {
            double h[3] = {0};
            const double twice = a ? 2 : 1; /* of planes (j, k) and (j + a, k'), in either order */
            for (int i = 0; i < 4; i++)
                for (int j = i; j < 4; j++) {
                    const double gram = *gram_at(form, a, j - i, row + t, column + i);
                    for (int order = 0; order < 3; order++)
                        h[order] += pairs[order][i][j] * gram;
                }
            double y0 = twice * Y[0][t] * Y[0][t + a], y1 = twice * (Y[1][t] * Y[0][t + a] + Y[0][t] * Y[1][t + a]);
            double y2 = twice * (Y[2][t] * Y[0][t + a] + 2 * Y[1][t] * Y[1][t + a] + Y[0][t] * Y[2][t + a]);
            tt[0] += y0 * h[0], tt[1] += y0 * h[1], tt[2] += y1 * h[0];
            tt[3] += y0 * h[2], tt[4] += y1 * h[1], tt[5] += y2 * h[0];
        }
    sum_moved(form, form->projection, u, v, p);
    Minimum here = {.u = u, .v = v};
    find_scale(form, tt, p, &here);
    return here;
}

/* Make a step `d` within the bounds; return whether it is Newton's. It only descends where a curvature is negative. */
static int newton_step(const Minimum *here, double max_shift, double d[2])
{
    const double size = larger(larger(fabs(here->huu), fabs(here->huv)), fabs(here->hvv));
    d[0] = d[1] = 0;
    if (!(size > 0 && size < INFINITY))
        return 1;
    /* Squares of the curvature may be beyond any double. */
    double g[2] = {here->gu / size, here->gv / size}, h[3] = {here->huu / size, here->huv / size, here->hvv / size};
    const double at[2] = {here->u, here->v};
    for (int axis = 0; axis < 2; axis++)
        if (fabs(at[axis]) >= max_shift && g[axis] * at[axis] <= 0) /* held by its bound */
            g[axis] = 0, h[2 * axis] = 1, h[1] = 0;
    const double smallest = (h[0] + h[2] - sqrt((h[0] - h[2]) * (h[0] - h[2]) + 4 * h[1] * h[1])) / 2;
    const int is_newtons = smallest > 1e-9;
    if (!is_newtons) {
        const double raised = larger(-2 * smallest, 1e-3);
        h[0] += raised, h[2] += raised;
    }
    const double determinant = h[0] * h[2] - h[1] * h[1];
    d[0] = (h[1] * g[1] - h[2] * g[0]) / determinant, d[1] = (h[1] * g[0] - h[0] * g[1]) / determinant;
    const double room[2] = {copysign(max_shift, d[0]) - at[0], copysign(max_shift, d[1]) - at[1]};
    const int axis = fabs(d[0] * room[1]) > fabs(d[1] * room[0]) ? 0 : 1, other = 1 - axis; /* passed first */
    if (fabs(d[axis]) > fabs(room[axis])) { /* to the lowest point of the parabola on that bound */
        d[axis] = room[axis];
        d[other] = clip(-(g[other] + h[1] * d[axis]) / h[2 * other], -max_shift - at[other], max_shift - at[other]);
    }
    const double excess = larger(larger(fabs(d[0]), fabs(d[1])) / LONGEST_STEP, 1);
    d[0] /= excess, d[1] /= excess;
    return is_newtons;
}

/* Keep a shift within its bound; one that misses it by rounding is at it. */
static double within(double at, double bound) { return fabs(at) >= bound * (1 - 1e-12) ? copysign(bound, at) : at; }

/* Newton's method within the bounds; a step is halved until it does not lead up. */
static Minimum descend(const QuadraticForm *form, double u, double v)
{
    const double bound = form->max_shift;
    Minimum here = evaluate(form, within(u, bound), within(v, bound)), there;
    for (int n = 0; n < MAX_STEPS; n++) {
        double d[2];
        int is_last = newton_step(&here, bound, d) && larger(fabs(d[0]), fabs(d[1])) < CLOSE;
        double limit = here.chi2 + is_last * ROUNDING * form->image_square; /* rounding may say that it leads up */
        for (;; d[0] /= 2, d[1] /= 2) {
            if (!is_last && larger(fabs(d[0]), fabs(d[1])) < SHORTEST_STEP)
                return here;
            there = evaluate(form, within(here.u + d[0], bound), within(here.v + d[1], bound));
            if (there.chi2 <= limit)
                break;
            is_last = 0, limit = here.chi2;
        }
        here = there;
        if (is_last)
            break;
    }
    return here;
}

/* Points on a side of the grid: FINE in each cell of the spline, and a margin of one cell where chi2 is infinite. */
static Index grid_side(const QuadraticForm *form) { return 2 * form->reach * FINE; }

/* Doubles that the grid needs. */
Index grid_size(const QuadraticForm *form) { return grid_side(form) * grid_side(form); }

/* chi2 at a v and at all u of the grid, from the first cell on. X are the weights of the planes at a cell's points. */
HOT static void fill_line(const QuadraticForm *form, const Lanes X[4], double v, double *restrict chi2)
{
    const double low = 1 / form->max_scale, high = form->max_scale;
    double Y[3][4], squares[4][MAX_PLANES], products[MAX_PLANES] = {0}; /* contracted in v, by lag of columns */
    const int row = bspline_weights(v, form->reach, Y);
    for (int t = 0; t < 4; t++)
        for (int k = 0; k < form->count; k++)
            products[k] += Y[0][t] * form->projection[(row + t) * form->count + k];
    for (int b = 0; b < 4; b++)
        for (int k = 0; k < form->stride; k += LANES) {
            Lanes sum = {0};
            for (int a = 0; a < 4; a++)
                for (int t = 0; t + a < 4; t++)
                    sum += (a ? 2 : 1) * Y[0][t] * Y[0][t + a] * *(const Lanes *)gram_at(form, a, b, row + t, k);
            *(Lanes *)(squares[b] + k) = sum;
        }
    for (int column = 0; column + 2 < form->count; column++, chi2 += FINE) { /* planes beyond the last one are 0 */
        Lanes square = {0}, product = {0};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            product += X[i] * products[column + i];
#pragma GCC unroll 4
            for (int b = 0; i + b < 4; b++)
                square += X[i] * X[i + b] * squares[b][column + i];
        }
        for (int i = 0; i < FINE; i++) {
            const double scale = clip(product[i] / larger(square[i], DBL_MIN), low, high);
            chi2[i] = form->image_square - scale * (2 * product[i] - scale * square[i]);
        }
    }
}

/* Evaluate chi2 at the points -half to half of both axes. Return the lowest. */
static double fill_grid(const QuadraticForm *form, Index half, double *middle)
{
    Lanes X[4];
    double lowest = INFINITY;
    for (int i = 0; i < FINE; i++) {
        double weights[3][4];
        bspline_weights((double)i / FINE, 2, weights);
        for (int k = 0; k < 4; k++)
            X[k][i] = weights[0][k];
    }
    for (Index i = 0; i < grid_size(form); i++)
        form->grid[i] = INFINITY;
    for (Index j = -half; j <= half; j++) {
        double *line = middle + j * grid_side(form);
        fill_line(form, X, (double)j / FINE, line - (form->reach - 1) * FINE);
        line[-half - 1] = line[half + 1] = INFINITY;
        for (Index i = -half; i <= half; i++)
            lowest = smaller(lowest, line[i]);
    }
    return lowest;
}

/* How low chi2 can be near a local minimum of the grid: lower by the largest rise to a neighbour. Infinite where a
 * neighbour on an axis is lower, except for the inner neighbour of a point on an edge. */
static double least_around(const double *at, Index side)
{
    double rise = 0;
    for (Index step = 1; step <= side; step += side - 1) {
        const double low = smaller(at[-step], at[step]), high = larger(at[-step], at[step]);
        if (low < *at && high < INFINITY)
            return INFINITY;
        rise = larger(rise, (high < INFINITY ? high : low) - *at);
    }
    return *at - rise;
}

/* Where Newton's method starts for a point of an axis: an end of the grid stands for the bound. */
static double start(Index i, Index half, double bound)
{
    return i <= -half ? -bound : i >= half ? bound : (double)i / FINE;
}

/* The lowest minimum that Newton's method finds from both sides of those local minima of the grid that can compete. */
Minimum global_minimum(const QuadraticForm *form)
{
    const double bound = form->max_shift, rounding = ROUNDING * form->image_square;
    const Index half = (Index)(bound * FINE), side = grid_side(form);
    double *middle = form->grid + side / 2 * (side + 1), limit = fill_grid(form, half, middle);
    Minimum best = {.chi2 = INFINITY};
    for (Index j = -half; j <= half; j++)
        for (Index i = -half; i <= half; i++) {
            const double *at = middle + j * side + i;
            if (!(least_around(at, side) <= limit))
                continue;
            const int x = smaller(at[-1], at[1]) < smaller(at[-side], at[side]), y = !x; /* the axis that rises less */
            for (int step = -1; step <= 1; step += 2) {
                const Minimum found = descend(form, start(i + x * step, half, bound), start(j + y * step, half, bound));
                if (found.chi2 < best.chi2)
                    best = found;
                limit = smaller(limit, found.chi2 - rounding);
            }
        }
    return best;
}
