/* The search: two grids of shifts, and Newton's method from the local minima of the fine one; see search.py. */
#include "core.h"

/* The constants of search.py; PAIRS of four planes with themselves and each other. */
enum { COARSE = 4, FINER = 4, MAX_STEPS = 200, PAIRS = 10 };
static const double CLOSE = 1e-5, LONGEST_STEP = 0.5, SHORTEST_STEP = 1e-9, ROUNDING = 1e-13, SLACK = 0.5;

typedef double Lanes __attribute__((vector_size(64), aligned(8), may_alias)); /* LANES of them */

/* Intervals of the coarse grid. */
typedef struct {
    Index left, right, bottom, top;
} Rectangle;

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

/* chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale. */
static Minimum evaluate(const QuadraticForm *form, double u, double v)
{
    double X[3][4], Y[3][4], pairs[3][4][4], tt[6] = {0}, p[6] = {0};
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
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 4; i++) {
            const double q = form->projection[(row + t) * form->count + column + i];
            p[0] += Y[0][t] * X[0][i] * q, p[1] += Y[0][t] * X[1][i] * q, p[2] += Y[1][t] * X[0][i] * q;
            p[3] += Y[0][t] * X[2][i] * q, p[4] += Y[1][t] * X[1][i] * q, p[5] += Y[2][t] * X[0][i] * q;
        }
    Minimum here = {.u = u, .v = v};
    find_scale(form, tt, p, &here);
    return here;
}

/* Bring a step that passes a bound to the lowest place of its parabola within the bounds, which is on that bound. */
static void stop_at_bounds(const Minimum *here, double max_shift, const double g[2], const double h[3], double d[2])
{
    const double at[2] = {here->u, here->v}, to[2] = {here->u + d[0], here->v + d[1]};
    double least = INFINITY;
    for (int axis = 0; axis < 2; axis++) {
        if (!(fabs(to[axis]) > max_shift))
            continue;
        const int other = 1 - axis;
        double held[2];
        held[axis] = copysign(max_shift, to[axis]) - at[axis];
        held[other] =
            clip(-(g[other] + h[1] * held[axis]) / h[2 * other], -max_shift - at[other], max_shift - at[other]);
        double chi2 = held[0] * (g[0] + h[0] * held[0] / 2 + h[1] * held[1]) + held[1] * (g[1] + h[2] * held[1] / 2);
        if (chi2 < least)
            least = chi2, d[0] = held[0], d[1] = held[1];
    }
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
    if (fabs(here->u) >= max_shift && g[0] * here->u <= 0) /* held by its bound */
        g[0] = 0, h[0] = 1, h[1] = 0;
    if (fabs(here->v) >= max_shift && g[1] * here->v <= 0)
        g[1] = 0, h[2] = 1, h[1] = 0;
    const double smallest = (h[0] + h[2] - sqrt((h[0] - h[2]) * (h[0] - h[2]) + 4 * h[1] * h[1])) / 2;
    const int is_newtons = smallest > 1e-9;
    if (!is_newtons) {
        const double raised = larger(-2 * smallest, 1e-3);
        h[0] += raised, h[2] += raised;
    }
    const double determinant = h[0] * h[2] - h[1] * h[1];
    d[0] = (h[1] * g[1] - h[2] * g[0]) / determinant, d[1] = (h[1] * g[0] - h[0] * g[1]) / determinant;
    stop_at_bounds(here, max_shift, g, h, d);
    const double excess = larger(fabs(d[0]), fabs(d[1])) / LONGEST_STEP;
    if (excess > 1)
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

/* A shift of a grid along an axis: the first of its four planes, their weights, and products of two weights. */
typedef struct {
    double at, weights[4], pairs[PAIRS];
    int first;
} Point;

/* chi2[(j + 1) * stride + i + 1] is chi2 at u[i] and v[j]; it is infinite around the grid. */
typedef struct {
    Index columns, rows, stride;
    Point *u, *v;
    double *chi2;
} Grid;

static Index intervals(const QuadraticForm *form) { return 2 * (Index)ceil(form->max_shift * COARSE); }

/* Doubles that the finest grid needs. */
Index grid_size(const QuadraticForm *form)
{
    const Index n = intervals(form) * FINER + 1;
    return 2 * n * (Index)(sizeof(Point) / sizeof(double)) + (n + 2) * (n + 2);
}

/* Make the points from `from` to `to` of an axis whose coarse intervals are divided by `parts`. */
static void lay_out(const QuadraticForm *form, Index parts, Index from, Index to, Point *points)
{
    const Index half = intervals(form) / 2 * parts;
    for (Index i = from; i <= to; i++, points++) {
        double weights[3][4];
        points->at = form->max_shift * ((double)(i - half) / (double)half);
        points->first = bspline_weights(points->at, form->reach, weights);
        memcpy(points->weights, weights[0], sizeof points->weights);
        for (int k = 0, pair = 0; k < 4; k++)
            for (int l = k; l < 4; l++)
                points->pairs[pair++] = weights[0][k] * weights[0][l];
    }
}

/* chi2 at one shift v and all u of a grid. */
HOT static void fill_line(const QuadraticForm *form, const Grid *grid, const Point *v, double *restrict chi2)
{
    const double low = 1 / form->max_scale, high = form->max_scale;
    double squares[4][MAX_PLANES], products[MAX_PLANES] = {0}; /* contracted in v, by lag of columns */
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < form->count; k++)
            products[k] += v->weights[j] * form->projection[(v->first + j) * form->count + k];
    for (int b = 0; b < 4; b++)
        for (int k = 0; k < form->stride; k += LANES) {
            Lanes sum = {0};
            for (int j = 0, pair = 0; j < 4; j++)
                for (int a = 0; a < 4 - j; a++, pair++)
                    sum += (a ? 2 : 1) * v->pairs[pair] * *(const Lanes *)gram_at(form, a, b, v->first + j, k);
            *(Lanes *)(squares[b] + k) = sum;
        }
    for (Index i = 0; i < grid->columns; i++) {
        const Point *u = grid->u + i;
        double square = 0, product = 0;
#pragma GCC unroll 4
        for (int k = 0, pair = 0; k < 4; k++) {
            product += u->weights[k] * products[u->first + k];
#pragma GCC unroll 4
            for (int b = 0; k + b < 4; b++)
                square += u->pairs[pair++] * squares[b][u->first + k];
        }
        const double scale = clip(square > 0 ? product / square : high, low, high);
        chi2[i] = form->image_square - scale * (2 * product - scale * square);
    }
}

/* Evaluate chi2 on a rectangle of the coarse grid, whose intervals are divided by `parts`. Return where it is lowest.
 */
static double *fill_grid(const QuadraticForm *form, Index parts, const Rectangle *part, Grid *grid)
{
    const Index columns = (part->right - part->left) * parts + 1, rows = (part->top - part->bottom) * parts + 1;
    *grid = (Grid){.columns = columns, .rows = rows, .stride = columns + 2, .u = (Point *)form->grid};
    grid->v = grid->u + columns, grid->chi2 = (double *)(grid->v + rows);
    lay_out(form, parts, part->left * parts, part->right * parts, grid->u);
    lay_out(form, parts, part->bottom * parts, part->top * parts, grid->v);
    for (Index i = 0; i < (rows + 2) * grid->stride; i++)
        grid->chi2[i] = INFINITY;
    double *lowest = grid->chi2 + grid->stride + 1;
    for (Index j = 0; j < rows; j++) {
        double *line = grid->chi2 + (j + 1) * grid->stride + 1;
        fill_line(form, grid, grid->v + j, line);
        for (Index i = 0; i < columns; i++)
            if (line[i] < *lowest)
                lowest = line + i;
    }
    return lowest;
}

/* Newton's method from a point of a grid. */
static Minimum descend_from(const QuadraticForm *form, const Grid *grid, const double *point)
{
    const Index at = point - grid->chi2;
    return descend(form, grid->u[at % grid->stride - 1].at, grid->v[at / grid->stride - 1].at);
}

/* The rectangle around the cells of the coarse grid where chi2 can be below a limit: those whose lowest corner is above
 * it by at most half the difference of their corners. */
static Rectangle find_rectangle(const Grid *grid, double limit)
{
    const Index stride = grid->stride;
    Rectangle part = {.left = grid->columns, .bottom = grid->rows};
    for (Index j = 0; j + 1 < grid->rows; j++)
        for (Index i = 0; i + 1 < grid->columns; i++) {
            const double *a = grid->chi2 + (j + 1) * stride + i + 1, *b = a + stride;
            const double low = smaller(smaller(a[0], a[1]), smaller(b[0], b[1]));
            const double high = larger(larger(a[0], a[1]), larger(b[0], b[1]));
            if (low - SLACK * (high - low) > limit)
                continue;
            part.left = i < part.left ? i : part.left, part.right = i + 1 > part.right ? i + 1 : part.right;
            part.bottom = j < part.bottom ? j : part.bottom, part.top = j + 1;
        }
    return part;
}

/* Return the largest rise from a point of a grid to a neighbour along an axis, or -1 where one is lower. */
static double rise_around(const double *at, Index stride)
{
    const double around[4] = {at[-1], at[1], at[-stride], at[stride]};
    double rise = 0;
    for (int i = 0; i < 4; i++) {
        if (around[i] < *at)
            return -1;
        rise = around[i] < INFINITY ? larger(rise, around[i] - *at) : rise;
    }
    return rise;
}

/* The lowest minimum that Newton's method finds from the local minima of the fine grid. One that is higher than the
 * best by more than its rise to a neighbour can not be lower. */
Minimum global_minimum(const QuadraticForm *form)
{
    if (!form->max_shift)
        return evaluate(form, 0, 0);
    const Index n = intervals(form);
    const double rounding = ROUNDING * form->image_square;
    Grid grid;
    const double *lowest = fill_grid(form, 1, &(Rectangle){0, n, 0, n}, &grid);
    const Rectangle part = find_rectangle(&grid, *lowest);
    lowest = fill_grid(form, FINER, &part, &grid);
    Minimum best = descend_from(form, &grid, lowest);
    for (Index j = 0; j < grid.rows; j++)
        for (Index i = 0; i < grid.columns; i++) {
            const double *at = grid.chi2 + (j + 1) * grid.stride + i + 1, rise = rise_around(at, grid.stride);
            if (rise < 0 || at == lowest || !(*at - rise < best.chi2 - rounding))
                continue;
            const Minimum found = descend_from(form, &grid, at);
            if (found.chi2 < best.chi2)
                best = found;
        }
    return best;
}
