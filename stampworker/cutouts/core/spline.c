/* Cubic B-splines with mirrored edges (Unser, Aldroubi & Eden 1993, IEEE Trans. Signal Process. 41, 821). */
#include "core.h"

/* Coefficients down the columns of a plane, but for the gain of 6: one recursion down and one up. Both begin with the
 * sum over the mirrored signal, of which HORIZON terms are enough: z³² = 5e-19. */
HOT static void prefilter(double *restrict a, Index rows, Index columns)
{
    enum { HORIZON = 32 };
    const double z = sqrt(3.0) - 2;
    if (rows < 2)
        return;
    const Index horizon = rows < HORIZON ? rows : HORIZON;
    double start[HORIZON], powers[2 * HORIZON + 1] = {1}; /* pow() rounds differently from machine to machine */
    for (Index i = 1; i <= 2 * horizon; i++)
        powers[i] = z * powers[i - 1];
    for (Index i = 0; i < horizon; i++)
        start[i] = z / (1 - powers[2 * horizon]) * (powers[i] + (rows <= HORIZON ? powers[2 * rows - 1 - i] : 0));
    for (Index x = 0; x < columns; x++)
        a[x] *= 1 + start[0];
    for (Index y = 1; y < horizon; y++)
        for (Index x = 0; x < columns; x++)
            a[x] += start[y] * a[y * columns + x];
    for (Index y = 1; y < rows; y++)
        for (Index x = 0; x < columns; x++)
            a[y * columns + x] += z * a[(y - 1) * columns + x];
    double *last = a + (rows - 1) * columns;
    for (Index x = 0; x < columns; x++)
        last[x] *= z / (z - 1);
    for (Index y = rows - 2; y >= 0; y--)
        for (Index x = 0; x < columns; x++)
            a[y * columns + x] = z * (a[(y + 1) * columns + x] - a[y * columns + x]);
}

static void transpose(const double *restrict from, double *restrict to, Index rows, Index columns)
{
    for (Index y0 = 0; y0 < rows; y0 += LANES)
        for (Index x = 0; x < columns; x++)
            for (Index y = y0; y < y0 + LANES && y < rows; y++)
                to[x * rows + y] = from[y * columns + x];
}

/* Index of an axis continued by mirroring about the outer edges of the outermost pixels. */
static Index mirrored(Index i, Index size)
{
    i = ((i % (2 * size)) + 2 * size) % (2 * size);
    return i < size ? i : 2 * size - 1 - i;
}

/* Subtract the template's background, and make its coefficients with `reach` more pixels on each side. */
void make_coefficients(Work *s, double tbg)
{
    const Index size = s->ny * s->nx, reach = s->form.reach;
    Index left[MAX_REACH], right[MAX_REACH];
    double gain = (s->ny > 1 ? 6.0 : 1.0) * (s->nx > 1 ? 6.0 : 1.0), *a = s->scratch, *b = s->line;
    for (Index i = 0; i < size; i++) {
        s->template[i] -= tbg;
        a[i] = gain * s->template[i];
    }
    prefilter(a, s->ny, s->nx);
    transpose(a, b, s->ny, s->nx);
    prefilter(b, s->nx, s->ny);
    transpose(b, a, s->nx, s->ny);
    for (Index x = 0; x < reach; x++)
        left[x] = mirrored(x - reach, s->nx), right[x] = mirrored(s->nx + x, s->nx);
    for (Index y = 0; y < s->ny + 2 * reach; y++) {
        const double *from = a + mirrored(y - reach, s->ny) * s->nx;
        double *to = s->padded + y * s->stride;
        memcpy(to + reach, from, (size_t)s->nx * sizeof(double));
        for (Index x = 0; x < reach; x++)
            to[x] = from[left[x]], to[reach + s->nx + x] = from[right[x]];
    }
}

/* Return the first of the four planes that a move by `at` needs; make their weights and two derivatives. */
int bspline_weights(double at, int reach, double weights[3][4])
{
    double cell = smaller(floor(at), reach - 2), f = at - cell, g = 1 - f; /* the upper end is in the last cell */
    const double all[3][4] = {
        {g * g * g / 6, (4 - 3 * f * f * (2 - f)) / 6, (4 - 3 * g * g * (2 - g)) / 6, f * f * f / 6},
        {-g * g / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f * f / 2},
        {g, 3 * f - 2, 3 * g - 2, f},
    };
    memcpy(weights, all, sizeof all);
    return (int)cell - 1 + reach;
}

/* The image less a constant and the scaled, moved template, into s->scratch. */
HOT void subtract_moved(const Work *s, const Minimum *best, double constant)
{
    double X[3][4], Y[3][4];
    const int column = bspline_weights(best->u, s->form.reach, X), row = bspline_weights(best->v, s->form.reach, Y);
    for (Index y = 0; y < s->ny; y++) {
        const double *restrict from = s->padded + (y + row) * s->stride, *restrict image = s->image + y * s->nx;
        double *restrict line = s->line, *restrict after = s->scratch + y * s->nx;
        const Index apart = s->stride;
        for (Index x = 0; x < s->nx + 2 * s->form.reach; x++)
            line[x] = Y[0][0] * from[x] + Y[0][1] * from[x + apart] + Y[0][2] * from[x + 2 * apart] +
                      Y[0][3] * from[x + 3 * apart];
        line += column;
        for (Index x = 0; x < s->nx; x++) {
            double moved = X[0][0] * line[x] + X[0][1] * line[x + 1] + X[0][2] * line[x + 2] + X[0][3] * line[x + 3];
            after[x] = image[x] - constant - best->scale * moved;
        }
    }
}
