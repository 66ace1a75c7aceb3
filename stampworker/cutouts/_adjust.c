/* The fit of adjust.py in C: the same search for the same minimum, several times faster.
 *
 * fit_numpy() in adjust.py is the specification, and a test holds the two to the same answer; what the formulas mean is said
 * there. Here is what differs:
 *
 * - The Gram matrix of the moved coefficient planes is needed only where two planes meet in one cell of the spline, up to three
 *   pixels apart. It is kept by lag: gram[a][b + 3][j][k] belongs to the planes (j, k) and (j + a, k + b), and is the correlation
 *   of the weights with one product plane, c[y][x] c[y + a][x + b].
 * - Sums run in eight lanes in a fixed order, and the compiler may not fuse multiplication and addition (-ffp-contract=off):
 *   every clone below, SSE2 to AVX-512, gives the same bits, so the same input gives the same packet on any x86-64 machine.
 * - Boxes are divided into halves along each axis, not quarters, and the last step of Newton's method is evaluated.
 *
 * No state is kept between calls, and the interpreter's lock is released during the fit.
 */
#ifndef AT_ONCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#endif
#if defined(X86) && defined(__gnu_linux__) && !defined(__clang__) && !defined(ONE_CLONE)
#define HOT __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define HOT
#endif
#define INLINE static inline __attribute__((always_inline))

typedef ptrdiff_t Index;
typedef double Lanes __attribute__((vector_size(64), aligned(8), may_alias)); /* LANES of them */
typedef void Correlate(const double *, Index, const double *, Index, Index, Index, int, int, double *, Index);

/* The constants of adjust.py and search.py. */
static const double HUGE_VALUE = 1e50, FLAT = 1e-6, CLOSE = 1e-5, LONGEST_STEP = 0.5, SHORTEST_STEP = 1e-9;
static const double TOLERANCE = 1e-7, ROUNDING = 1e-13, NEGLIGIBLE = 1e-20, SAME = 1e-4;
enum { FILL_LAYERS = 3, MOST_STEPS = 200, LARGEST_SHIFT = 16, LARGEST_SCALE = 1000, MOST_PLANES = 2 * LARGEST_SHIFT + 3, POINTS = 7 };
enum { TOGETHER = 9, MOST_HALVINGS = 10, MOST_SINGLE = 4, REMEMBERED = 64 }; /* halves, where search.py divides by four */
enum { LANES = 8, BLOCK = 24, HORIZON = 32 }; /* BLOCK columns of a product and its weights are near the first-level cache */
enum { FITTED, NO_SIGNAL, TOO_FEW_PIXELS, NO_MEMORY };

/* Bernstein coefficients of a polynomial of the move in a box: rows by v, lanes by u; the last lane is the one before it again. */
typedef double Coefficients[POINTS][LANES];

/* A rectangle of moves with the form in it, and what its coefficients say. */
typedef struct {
    double u, v, width, height;
    Coefficients square, product;
    double bound, corner, corner_u, corner_v, least, most; /* the lowest corner and its place; range of the scales */
} Box;

/* Boxes side by side: `rows` of `columns`, which are part of rows of `stride`. */
typedef struct {
    Box *boxes;
    int rows, columns, stride;
} Grid;

typedef struct {
    Correlate *correlate;
    Index ny, nx;         /* of the planes */
    Index y0, x0, h, w;   /* the fitted box */
    Index stride;         /* of the padded coefficients */
    int reach, count;     /* count = 2 reach + 1 planes on an axis */
    double max_shift, max_scale;
    int fit_bg, normalize;
    Index slab;           /* rows of the box that one lane holds */
    double *image, *template, *err, *scratch, *scratch2, *padded, *weight, *weighted, *residual;
    double *planes, *weights, *weights_image, *product; /* interleaved */
    unsigned char *bad_image, *bad_template, *undefined;
    double *gram, *projection, *sums;
    Box *boxes;
    double image_square, image_sum, weight_sum, image_mean, template_mean;
} Work;

typedef struct {
    double u, v, chi2, scale, gu, gv, huu, huv, hvv, square, slope_u, slope_v, sum, sum_u, sum_v;
    int free;
} Value;

typedef struct {
    double negligible, limit; /* below the limit lies what is of interest */
    int count;
    Value best, minima[REMEMBERED];
} Search;

typedef struct {
    int failure, at_bound;
    Index npix;
    double bg, tbg, dx, dy, scale, chi2_0, chi2, errors[4];
} Result;

static inline double smaller(double a, double b) { return a < b ? a : b; }
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline int usable(double err) { return err > 1 / HUGE_VALUE && err < HUGE_VALUE; }

/* ---- Backgrounds ---------------------------------------------------------------------------------------------------- */

static void sort(double *a, Index n)
{
    for (Index i = 1; i < n; i++) {
        double value = a[i];
        Index j = i;
        for (; j > 0 && a[j - 1] > value; j--)
            a[j] = a[j - 1];
        a[j] = value;
    }
}

HOT static Index count_below(const double *a, Index n, double limit)
{
    Index count = 0;
    for (Index i = 0; i < n; i++)
        count += a[i] < limit;
    return count;
}

/* The k-th smallest of n values, which are overwritten. A sorted sample brackets it, and what lies within the bracket is kept,
 * until there is no more than can be sorted. Limits are closed; nextafter leaves a value itself out, so each pass drops one. */
static double kth(double *a, Index n, Index k)
{
    enum { SAMPLE = 32, MARGIN = 4 };
    while (n > SAMPLE) {
        double sample[SAMPLE];
        for (Index i = 0; i < SAMPLE; i++)
            sample[i] = a[i * n / SAMPLE];
        sort(sample, SAMPLE);
        Index middle = k * SAMPLE / n;
        double low = sample[middle < MARGIN ? 0 : middle - MARGIN];
        double high = sample[middle + MARGIN < SAMPLE ? middle + MARGIN : SAMPLE - 1];
        Index below = count_below(a, n, low), upto = count_below(a, n, nextafter(high, INFINITY));
        if (below <= k && k < upto && upto - below == n) { /* nothing would be dropped: split at the middle of the sample */
            low = high = sample[middle];
            below = count_below(a, n, low), upto = count_below(a, n, nextafter(high, INFINITY));
        }
        if (k < below)
            high = nextafter(low, -INFINITY), low = -INFINITY;
        else if (k >= upto)
            low = nextafter(high, INFINITY), high = INFINITY, k -= upto;
        else if (low == high)
            return low;
        else
            k -= below;
        Index kept = 0;
        for (Index i = 0; i < n; i++) {
            double value = a[i];
            a[kept] = value;
            kept += (value >= low) & (value <= high);
        }
        n = kept;
    }
    sort(a, n);
    return a[k];
}

/* Sums run in eight lanes, so that they are the same whatever the machine's vectors. */
INLINE double total(const double lanes[LANES])
{
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

/* Sum of a[i] b[i]. */
HOT static double dot(const double *restrict a, const double *restrict b, Index n)
{
    double lanes[LANES] = {0};
    Index i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += a[i + lane] * b[i + lane];
    for (; i < n; i++)
        lanes[i % LANES] += a[i] * b[i];
    return total(lanes);
}

HOT static double sum(const double *a, Index n)
{
    double lanes[LANES] = {0};
    Index i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += a[i + lane];
    for (; i < n; i++)
        lanes[i % LANES] += a[i];
    return total(lanes);
}

/* 2.5 median - 1.5 mean of the good values. */
static double background(const double *plane, const unsigned char *bad, Index size, double *values, double *copy)
{
    Index n = 0;
    if (!bad)
        values = (double *)plane, n = size;
    else
        for (Index i = 0; i < size; i++) {
            values[n] = plane[i];
            n += !bad[i];
        }
    memcpy(copy, values, (size_t)n * sizeof(double));
    Index half = (n - 1) / 2;
    double median = kth(copy, n, half), next = INFINITY;
    if (n % 2 == 0) { /* the mean of the two in the middle */
        if (count_below(values, n, nextafter(median, INFINITY)) > half + 1)
            next = median;
        else
            for (Index i = 0; i < n; i++)
                if (values[i] > median)
                    next = smaller(next, values[i]);
        median = (median + next) / 2;
    }
    return 2.5 * median - 1.5 * (sum(values, n) / (double)n);
}

/* ---- Pixels --------------------------------------------------------------------------------------------------------- */

/* Mark values that cannot be used; whether there is any. */
HOT static int mark_bad(const double *restrict plane, const unsigned char *restrict mask, Index size, unsigned char *restrict bad)
{
    unsigned char any = 0;
    for (Index i = 0; i < size; i++)
        bad[i] = !(fabs(plane[i]) < HUGE_VALUE);
    for (Index i = 0; mask && i < size; i++)
        bad[i] |= mask[i] != 0;
    for (Index i = 0; i < size; i++)
        any |= bad[i];
    return any;
}

/* 1 / err² in the box, 0 for pixels that leave the fit; how many stay. */
HOT static Index weigh(Work *s, int any_bad_template)
{
    for (Index y = 0; y < s->h; y++) {
        const double *restrict err = s->err + (y + s->y0) * s->nx + s->x0;
        const unsigned char *restrict bad = s->bad_image + (y + s->y0) * s->nx + s->x0;
        double *restrict weight = s->weight + y * s->w;
        for (Index x = 0; x < s->w; x++) {
            int use = (err[x] > 1 / HUGE_VALUE) & (err[x] < HUGE_VALUE) & !bad[x];
            weight[x] = use ? 1 / (err[x] * err[x]) : 0;
        }
    }
    if (any_bad_template)
        for (Index y = 0; y < s->ny; y++)
            for (Index x = 0; x < s->nx; x++) {
                if (!s->bad_template[y * s->nx + x])
                    continue;
                Index bottom = y - s->reach - s->y0, left = x - s->reach - s->x0, edge = 2 * s->reach + 1;
                for (Index j = bottom < 0 ? 0 : bottom; j < bottom + edge && j < s->h; j++)
                    for (Index i = left < 0 ? 0 : left; i < left + edge && i < s->w; i++)
                        s->weight[j * s->w + i] = 0;
            }
    Index count = 0;
    for (Index i = 0; i < s->h * s->w; i++)
        count += s->weight[i] > 0;
    return count;
}

/* Whether the template is constant wherever the fit reads it; the first row or two tell, as a rule. */
static int is_flat(const Work *s)
{
    double low = INFINITY, high = -INFINITY;
    for (Index y = s->y0 - s->reach; y < s->y0 + s->h + s->reach; y++) {
        for (Index x = s->x0 - s->reach; x < s->x0 + s->w + s->reach; x++) {
            if (y < 0 || x < 0 || y >= s->ny || x >= s->nx || s->bad_template[y * s->nx + x])
                continue;
            low = smaller(low, s->template[y * s->nx + x]);
            high = larger(high, s->template[y * s->nx + x]);
        }
        if (high - low > FLAT * larger(fabs(low), fabs(high)))
            return 0;
    }
    return 1;
}

/* Fill bad pixels of the template with the mean of the known ones around them, ring by ring, the rest with a value. */
static void fill(Work *s, double value)
{
    enum { UNKNOWN = 1, NEW = 2 };
    unsigned char *state = (unsigned char *)s->scratch; /* 0 known; the marks of bad pixels are needed later */
    Index size = s->ny * s->nx;
    memcpy(state, s->bad_template, (size_t)size);
    for (int layer = 0; layer < FILL_LAYERS; layer++) {
        for (Index at = 0; at < size; at++) {
            if (state[at] != UNKNOWN)
                continue;
            Index y = at / s->nx, x = at % s->nx, count = 0;
            double total = 0;
            for (Index j = y ? y - 1 : 0; j <= y + 1 && j < s->ny; j++)
                for (Index i = x ? x - 1 : 0; i <= x + 1 && i < s->nx; i++)
                    if (!state[j * s->nx + i]) {
                        total += s->template[j * s->nx + i];
                        count++;
                    }
            if (count) {
                s->template[at] = total / (double)count;
                state[at] = NEW;
            }
        }
        for (Index at = 0; at < size; at++)
            if (state[at] == NEW)
                state[at] = 0;
    }
    for (Index at = 0; at < size; at++)
        if (state[at])
            s->template[at] = value;
}

/* ---- The spline ----------------------------------------------------------------------------------------------------- */

/* Cubic B-spline coefficients down the columns of a plane whose edges are mirrored, but for the gain of 6: one recursion down
 * and one up. Both begin with the sum over the mirrored signal, of which HORIZON terms are all that counts: z³² = 5e-19. */
HOT static void prefilter(double *restrict a, Index rows, Index columns)
{
    const double z = sqrt(3.0) - 2;
    if (rows < 2)
        return;
    Index horizon = rows < HORIZON ? rows : HORIZON;
    double start[HORIZON], powers[2 * HORIZON + 1] = {1}; /* pow() of the C library rounds differently from machine to machine */
    for (Index i = 1; i <= 2 * horizon; i++)
        powers[i] = z * powers[i - 1];
    const int shorter = rows <= HORIZON;
    for (Index i = 0; i < horizon; i++)
        start[i] = z / (1 - powers[2 * horizon]) * (powers[i] + (shorter ? powers[2 * rows - 1 - i] : 0));
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

/* Coefficients of the template less its background, with `reach` more pixels on each side. */
static void make_coefficients(Work *s, double tbg)
{
    Index size = s->ny * s->nx, left[MOST_PLANES], right[MOST_PLANES];
    double gain = (s->ny > 1 ? 6.0 : 1.0) * (s->nx > 1 ? 6.0 : 1.0), *a = s->scratch, *b = s->scratch2;
    for (Index i = 0; i < size; i++) {
        s->template[i] -= tbg;
        a[i] = gain * s->template[i];
    }
    prefilter(a, s->ny, s->nx);
    transpose(a, b, s->ny, s->nx);
    prefilter(b, s->nx, s->ny);
    transpose(b, a, s->nx, s->ny);
    for (Index x = 0; x < s->reach; x++)
        left[x] = mirrored(x - s->reach, s->nx), right[x] = mirrored(s->nx + x, s->nx);
    for (Index y = 0; y < s->ny + 2 * s->reach; y++) {
        const double *from = a + mirrored(y - s->reach, s->ny) * s->nx;
        double *to = s->padded + y * s->stride;
        memcpy(to + s->reach, from, (size_t)s->nx * sizeof(double));
        for (Index x = 0; x < s->reach; x++)
            to[x] = from[left[x]], to[s->reach + s->nx + x] = from[right[x]];
    }
}

/* First of the four planes that a move by `at` needs, their weights and two derivatives. */
static int taps(double at, int reach, double weights[3][4])
{
    double cell = smaller(floor(at), reach - 2), f = at - cell, g = 1 - f;
    const double all[3][4] = {
        {g * g * g / 6, (4 - 3 * f * f * (2 - f)) / 6, (4 - 3 * g * g * (2 - g)) / 6, f * f * f / 6},
        {-g * g / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f * f / 2},
        {g, 3 * f - 2, 3 * g - 2, f},
    };
    memcpy(weights, all, sizeof all);
    return (int)cell - 1 + reach;
}

/* ---- The quadratic form --------------------------------------------------------------------------------------------- */

/* The file reads itself once for each width of vectors: the part at its end makes a correlate_N of N doubles at a time. */
#define AT_ONCE 2
#define TARGET
#include "_adjust.c"
#ifdef X86
#define AT_ONCE 4
#define TARGET __attribute__((target("avx2")))
#include "_adjust.c"
#define AT_ONCE 8
#define TARGET __attribute__((target("avx512f")))
#include "_adjust.c"
#endif

/* The widest that this machine has, or the one wanted; NULL where that cannot be had. */
static Correlate *choose_correlate(int at_once)
{
#ifdef X86
    if ((at_once == 0 || at_once == 8) && __builtin_cpu_supports("avx512f"))
        return correlate_8;
    if ((at_once == 0 || at_once == 4) && __builtin_cpu_supports("avx2"))
        return correlate_4;
#endif
    return at_once == 0 || at_once == 2 ? correlate_2 : NULL;
}

/* out[y][x] = a[y][x] b[y][x] */
HOT static void multiply(const double *restrict a, const double *restrict b, Index stride, double *restrict out, Index out_stride,
                         Index rows, Index width)
{
    for (Index y = 0; y < rows; y++)
        for (Index x = 0; x < width; x++)
            out[y * out_stride + x] = a[y * stride + x] * b[y * stride + x];
}

/* Lay rows out so that the eight lanes of a vector hold the same place of eight slabs of rows: then a plane moved in x or y is read
 * at whole vectors. Each slab has as many rows more as the planes move; rows that do not exist are 0. */
static void interleave(const double *from, Index stride, Index available, Index slab, Index rows, Index columns, double *to)
{
    for (int lane = 0; lane < LANES; lane++)
        for (Index y = 0; y < rows; y++) {
            const double *line = from + (lane * slab + y) * stride;
            double *out = to + y * columns * LANES + lane;
            if (lane * slab + y < available)
                for (Index x = 0; x < columns; x++)
                    out[x * LANES] = line[x];
            else
                for (Index x = 0; x < columns; x++)
                    out[x * LANES] = 0;
        }
}

INLINE double *gram_at(const Work *s, int a, int b, Index j, Index k)
{
    return s->gram + ((a * 7 + b + 3) * s->count + j) * s->count + k;
}

/* The image less its background in the box, times the weights, and sums. The weighted means leave both sides where an offset is
 * fitted. */
HOT static void prepare_sums(Work *s, double bg)
{
    const Index size = s->h * s->w;
    const double *restrict weight = s->weight;
    double *restrict residual = s->residual, *restrict weighted = s->weighted, template_sum = 0;
    const double *near = s->padded + (s->y0 + s->reach) * s->stride + s->x0 + s->reach;
    for (Index y = 0; y < s->h; y++) {
        const double *restrict image = s->image + (y + s->y0) * s->nx + s->x0;
        for (Index x = 0; x < s->w; x++)
            residual[y * s->w + x] = image[x] - bg;
    }
    s->weight_sum = sum(weight, size);
    if (s->fit_bg) {
        for (Index y = 0; y < s->h; y++)
            template_sum += dot(weight + y * s->w, near + y * s->stride, s->w);
        s->image_mean = dot(weight, residual, size) / s->weight_sum;
        s->template_mean = template_sum / s->weight_sum;
        for (Index i = 0; i < size; i++)
            residual[i] -= s->image_mean;
        for (Index i = 0; i < (s->ny + 2 * s->reach) * s->stride; i++)
            s->padded[i] -= s->template_mean;
    }
    for (Index i = 0; i < size; i++)
        weighted[i] = weight[i] * residual[i];
    s->image_sum = sum(weighted, size);
    s->image_square = dot(weighted, residual, size);
}

static void make_form(Work *s)
{
    int count = s->count;
    Index slab = s->slab, rows = slab + count - 1, columns = s->w + count - 1, first = s->y0 * s->stride + s->x0;
    interleave(s->padded + first, s->stride, s->ny + 2 * s->reach - s->y0, slab, rows, columns, s->planes);
    interleave(s->weight, s->w, s->h, slab, slab, s->w, s->weights);
    interleave(s->weighted, s->w, s->h, slab, slab, s->w, s->weights_image);
    const Index wide = BLOCK + count - 1;
    for (Index x = 0; x < s->w; x += BLOCK) {
        Index width = x + BLOCK < s->w ? BLOCK : s->w - x;
        const double *planes = s->planes + x * LANES, *weights = s->weights + x * LANES, *image = s->weights_image + x * LANES;
        s->correlate(image, s->w, planes, columns, slab, width, count, count, s->projection, count);
        if (s->fit_bg)
            s->correlate(weights, s->w, planes, columns, slab, width, count, count, s->sums, count);
        for (int a = 0; a < 4; a++)
            for (int b = a ? -3 : 0; b < 4; b++) {
                int left = b < 0 ? -b : 0, right = b > 0 ? b : 0, nk = count - left - right;
                multiply(planes + left * LANES, planes + (a * columns + right) * LANES, columns * LANES, s->product, wide * LANES,
                         rows - a, (width + nk - 1) * LANES);
                s->correlate(weights, s->w, s->product, wide, slab, width, count - a, nk, gram_at(s, a, b, 0, left), count);
            }
    }
    for (int b = 1; b < 4; b++) /* a = 0 holds each pair twice */
        for (int j = 0; j < count; j++)
            for (int k = b; k < count; k++)
                *gram_at(s, 0, -b, j, k) = *gram_at(s, 0, b, j, k - b);
    if (!s->fit_bg)
        return;
    for (int a = 0; a < 4; a++) /* what remains after the best offset */
        for (int b = -3; b < 4; b++)
            for (int j = 0; j + a < count; j++)
                for (int k = b < 0 ? -b : 0; k < count && k + b < count; k++)
                    *gram_at(s, a, b, j, k) -= s->sums[j * count + k] * (s->sums[(j + a) * count + k + b] / s->weight_sum);
    for (int i = 0; i < count * count; i++)
        s->projection[i] -= s->sums[i] * (s->image_sum / s->weight_sum);
    s->image_square -= s->image_sum * s->image_sum / s->weight_sum;
}

/* ---- The search ----------------------------------------------------------------------------------------------------- */

/* chi2 and its derivatives at a move of the template by -u in x and -v in y, with the best scale. */
static Value evaluate(const Work *s, double u, double v)
{
    double X[3][4], Y[3][4], pairs[3][4][4], tt[6] = {0}, p[6] = {0}, sums[3] = {0}; /* 1, u, v, uu, uv, vv */
    int column = taps(u, s->reach, X), row = taps(v, s->reach, Y);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            pairs[0][i][j] = X[0][i] * X[0][j];
            pairs[1][i][j] = X[1][i] * X[0][j] + X[0][i] * X[1][j];
            pairs[2][i][j] = X[2][i] * X[0][j] + 2 * X[1][i] * X[1][j] + X[0][i] * X[2][j];
        }
    for (int a = 0; a < 4; a++)
        for (int t = 0; t + a < 4; t++) {
            double h[3] = {0}, twice = a ? 2 : 1; /* planes (j, k), (j + a, k') stand for the pair the other way round too */
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) {
                    double gram = *gram_at(s, a, j - i, row + t, column + i);
                    h[0] += pairs[0][i][j] * gram;
                    h[1] += pairs[1][i][j] * gram;
                    h[2] += pairs[2][i][j] * gram;
                }
            double y0 = twice * Y[0][t] * Y[0][t + a], y1 = twice * (Y[1][t] * Y[0][t + a] + Y[0][t] * Y[1][t + a]);
            double y2 = twice * (Y[2][t] * Y[0][t + a] + 2 * Y[1][t] * Y[1][t + a] + Y[0][t] * Y[2][t + a]);
            tt[0] += y0 * h[0], tt[1] += y0 * h[1], tt[2] += y1 * h[0];
            tt[3] += y0 * h[2], tt[4] += y1 * h[1], tt[5] += y2 * h[0];
        }
    for (int t = 0; t < 4; t++) {
        const double *q = s->projection + (row + t) * s->count + column, *sum = s->sums + (row + t) * s->count + column;
        for (int i = 0; i < 4; i++) {
            p[0] += Y[0][t] * X[0][i] * q[i], p[1] += Y[0][t] * X[1][i] * q[i], p[2] += Y[1][t] * X[0][i] * q[i];
            p[3] += Y[0][t] * X[2][i] * q[i], p[4] += Y[1][t] * X[1][i] * q[i], p[5] += Y[2][t] * X[0][i] * q[i];
            sums[0] += Y[0][t] * X[0][i] * sum[i], sums[1] += Y[0][t] * X[1][i] * sum[i];
            sums[2] += Y[1][t] * X[0][i] * sum[i];
        }
    }
    double low = 1 / s->max_scale, high = s->max_scale, best = tt[0] > 0 ? p[0] / tt[0] : high;
    double scale = smaller(larger(best, low), high);
    Value value = {.u = u, .v = v, .scale = scale, .square = tt[0], .free = low < best && best < high};
    value.chi2 = s->image_square - scale * (2 * p[0] - scale * tt[0]);
    value.gu = scale * (scale * tt[1] - 2 * p[1]), value.gv = scale * (scale * tt[2] - 2 * p[2]);
    value.huu = scale * (scale * tt[3] - 2 * p[3]);
    value.huv = scale * (scale * tt[4] - 2 * p[4]);
    value.hvv = scale * (scale * tt[5] - 2 * p[5]);
    if (value.free) {
        double su = (p[1] - scale * tt[1]) / tt[0], sv = (p[2] - scale * tt[2]) / tt[0];
        value.slope_u = su, value.slope_v = sv;
        value.huu -= 2 * tt[0] * su * su, value.huv -= 2 * tt[0] * su * sv, value.hvv -= 2 * tt[0] * sv * sv;
    }
    value.sum = sums[0], value.sum_u = sums[1], value.sum_v = sums[2];
    return value;
}

static double clip(double at, double low, double high) { return smaller(larger(at, low), high); }

/* A step within the bounds, and whether it is Newton's: where the curvature is negative it only descends. */
static int step(const Value *here, double max_shift, double *du, double *dv)
{
    double size = larger(larger(fabs(here->huu), fabs(here->huv)), fabs(here->hvv));
    *du = *dv = 0;
    if (!(size > 0 && size < INFINITY))
        return 1;
    /* Squares of the curvature may be beyond any double. */
    double gu = here->gu / size, gv = here->gv / size, huu = here->huu / size, huv = here->huv / size, hvv = here->hvv / size;
    if (fabs(here->u) >= max_shift && gu * here->u <= 0) /* held by its bound */
        gu = 0, huu = 1, huv = 0;
    if (fabs(here->v) >= max_shift && gv * here->v <= 0)
        gv = 0, hvv = 1, huv = 0;
    double spread = sqrt((huu - hvv) * (huu - hvv) + 4 * huv * huv), smallest = (huu + hvv - spread) / 2;
    const int is_newtons = smallest > 1e-9;
    if (!is_newtons) {
        double raised = larger(-2 * smallest, 1e-3);
        huu += raised, hvv += raised;
    }
    double determinant = huu * hvv - huv * huv, least = INFINITY;
    double to_u = here->u + (huv * gv - hvv * gu) / determinant, to_v = here->v + (huv * gu - huu * gv) / determinant;
    *du = to_u - here->u, *dv = to_v - here->v;
    for (int axis = 0; axis < 2; axis++) { /* the lowest place of the parabola is then on a bound that is passed */
        double to = axis ? to_v : to_u, u, v;
        if (!(fabs(to) > max_shift))
            continue;
        double held = copysign(max_shift, to) - (axis ? here->v : here->u);
        if (axis)
            v = held, u = clip(-(gu + huv * held) / huu, -max_shift - here->u, max_shift - here->u);
        else
            u = held, v = clip(-(gv + huv * held) / hvv, -max_shift - here->v, max_shift - here->v);
        double chi2 = u * (gu + huu * u / 2 + huv * v) + v * (gv + hvv * v / 2);
        if (chi2 < least)
            least = chi2, *du = u, *dv = v;
    }
    double excess = larger(fabs(*du), fabs(*dv)) / LONGEST_STEP;
    if (excess > 1)
        *du /= excess, *dv /= excess;
    return is_newtons;
}

/* Keep a shift within its bound; one that misses it by rounding is at it. */
static double within(double at, double bound) { return fabs(at) >= bound * (1 - 1e-12) ? copysign(bound, at) : at; }

/* Newton's method within the bounds. */
static Value polish(const Work *s, double u, double v)
{
    Value here = evaluate(s, within(u, s->max_shift), within(v, s->max_shift)), there;
    for (int n = 0; n < MOST_STEPS; n++) {
        double du, dv;
        int is_last = step(&here, s->max_shift, &du, &dv) && larger(fabs(du), fabs(dv)) < CLOSE;
        double limit = here.chi2 + (is_last ? ROUNDING * s->image_square : 0); /* rounding may say that it leads up */
        for (;; du /= 2, dv /= 2) {
            if (!is_last && larger(fabs(du), fabs(dv)) < SHORTEST_STEP)
                return here;
            there = evaluate(s, within(here.u + du, s->max_shift), within(here.v + dv, s->max_shift));
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

/* Weights of the four taps, by powers of the fraction, times 6. */
static const double SPLINE[4][4] = {{1, -3, 3, -1}, {4, 0, -6, 3}, {1, 3, 3, -3}, {0, 0, 0, 1}};
/* Share of the product of Bernstein coefficients i and l of two cubics in coefficient i + l of their product. */
static const double SHARE[4][4] = {{1, 0.5, 0.2, 0.05}, {0.5, 0.6, 0.45, 0.2}, {0.2, 0.45, 0.6, 0.5}, {0.05, 0.2, 0.5, 1}};

/* What makes Bernstein coefficients of the form on one axis of a cell; the last lane is the one before it again. */
typedef struct {
    double from, to;
    int first; /* of the four planes */
    double pairs[4][4][LANES], singles[4][LANES];
} Axis;

static void make_axis(const Work *s, int cell, Axis *axis)
{
    double taps[4][4];
    axis->from = larger(cell, -s->max_shift), axis->to = smaller(cell + 1, s->max_shift);
    axis->first = cell - 1 + s->reach;
    double a = axis->from - cell, b = axis->to - cell;
    for (int i = 0; i < 4; i++) { /* a coefficient is the polar form at as many ends as its number says */
        double x = i > 0 ? b : a, y = i > 1 ? b : a, z = i > 2 ? b : a;
        for (int k = 0; k < 4; k++) {
            const double *c = SPLINE[k];
            taps[i][k] = (c[0] + c[1] * (x + y + z) / 3 + c[2] * (x * y + y * z + z * x) / 3 + c[3] * (x * y * z)) / 6;
        }
    }
    memset(axis->pairs, 0, sizeof axis->pairs);
    memset(axis->singles, 0, sizeof axis->singles);
    for (int i = 0; i < 4; i++)
        for (int l = 0; l < 4; l++)
            for (int j = 0; j < 4; j++) {
                axis->singles[j][i + l] += SHARE[i][l] * taps[i][j];
                for (int k = 0; k < 4; k++)
                    axis->pairs[j][k][i + l] += SHARE[i][l] * (taps[i][j] * taps[l][k]);
            }
    for (int j = 0; j < 4; j++) {
        axis->singles[j][POINTS] = axis->singles[j][POINTS - 1];
        for (int k = 0; k < 4; k++)
            axis->pairs[j][k][POINTS] = axis->pairs[j][k][POINTS - 1];
    }
}

/* The cells of one column: the form is contracted in x for each row of planes, then in y for each cell. */
HOT static void fill_column(const Work *s, const Axis *axes, int cells, const Axis *across, Box *boxes)
{
    Lanes lags[4][MOST_PLANES], cross[MOST_PLANES];
    for (int j = 0; j < s->count; j++) {
        cross[j] = (Lanes){0};
        for (int k = 0; k < 4; k++)
            cross[j] += *(const Lanes *)across->singles[k] * s->projection[j * s->count + across->first + k];
        for (int a = 0; a < 4; a++) {
            Lanes sum = {0};
            for (int k = 0; k < 4 && j + a < s->count; k++)
                for (int l = 0; l < 4; l++)
                    sum += *(const Lanes *)across->pairs[k][l] * *gram_at(s, a, l - k, j, across->first + k);
            lags[a][j] = sum;
        }
    }
    for (int i = 0; i < cells; i++) {
        const Axis *along = &axes[i];
        Box *box = &boxes[i * cells];
        box->v = along->from, box->height = along->to - along->from;
        box->u = across->from, box->width = across->to - across->from;
        for (int m = 0; m < POINTS; m++) {
            Lanes square = {0}, product = {0};
            for (int t = 0; t < 4; t++) {
                const int plane = along->first + t;
                product += along->singles[t][m] * cross[plane];
                for (int a = 0; t + a < 4; a++)
                    square += (a ? 2 : 1) * along->pairs[t][t + a][m] * lags[a][plane];
            }
            *(Lanes *)box->square[m] = square, *(Lanes *)box->product[m] = product;
        }
    }
}

/* chi2 at a pair of coefficients with their best scale. The square may be negative; then the best is the bound on the product's side. */
INLINE double best_chi2(const Work *s, double square, double product, double negligible, double *scale)
{
    const double low = 1 / s->max_scale, high = s->max_scale, middle = (low + high) / 2;
    double best = (product - middle * square) / larger(square, negligible) + middle;
    *scale = smaller(larger(best, low), high);
    return s->image_square - *scale * (2 * product - *scale * square);
}

/* chi2 at the coefficients of a box: in the box it is nowhere below the least. Also the range of their best scales. */
HOT static void measure(const Work *s, Box *box, double negligible)
{
    double bound[LANES], least[LANES], most[LANES];
    Coefficients chi2;
    for (int lane = 0; lane < LANES; lane++)
        bound[lane] = INFINITY, least[lane] = s->max_scale, most[lane] = 1 / s->max_scale;
    for (int m = 0; m < POINTS; m++)
        for (int lane = 0; lane < LANES; lane++) {
            double scale, value = best_chi2(s, box->square[m][lane], box->product[m][lane], negligible, &scale);
            chi2[m][lane] = value;
            bound[lane] = smaller(bound[lane], value);
            least[lane] = smaller(least[lane], scale), most[lane] = larger(most[lane], scale);
        }
    for (int lane = 1; lane < LANES; lane++) {
        bound[0] = smaller(bound[0], bound[lane]);
        least[0] = smaller(least[0], least[lane]), most[0] = larger(most[0], most[lane]);
    }
    box->bound = bound[0], box->least = least[0], box->most = most[0];
    box->corner = INFINITY;
    for (int row = 0; row < 2; row++)
        for (int column = 0; column < 2; column++) {
            double value = chi2[row * (POINTS - 1)][column * (POINTS - 1)];
            if (value < box->corner) {
                box->corner = value;
                box->corner_u = box->u + column * box->width, box->corner_v = box->v + row * box->height;
            }
        }
}

/* The lower and the upper half of each column of coefficients: de Casteljau's averages. */
HOT static void halve(const Coefficients from, Coefficients low, Coefficients high)
{
    memcpy(high, from, POINTS * sizeof *from);
    for (int i = 0; i < POINTS; i++) {
        memcpy(low[i], high[0], sizeof *low);
        for (int m = 0; m < POINTS - 1 - i; m++)
            for (int lane = 0; lane < LANES; lane++)
                high[m][lane] = (high[m][lane] + high[m + 1][lane]) / 2;
    }
}

/* Rows become columns, and the last lane again the one before it. */
static void turn(const Coefficients from, Coefficients to)
{
    for (int m = 0; m < POINTS; m++)
        for (int lane = 0; lane < LANES; lane++)
            to[m][lane] = from[lane < POINTS ? lane : POINTS - 1][m];
}

static void halve_columns(const Coefficients from, Coefficients low, Coefficients high)
{
    Coefficients turned, turned_low, turned_high;
    turn(from, turned);
    halve(turned, turned_low, turned_high);
    turn(turned_low, low);
    turn(turned_high, high);
}

/* Divide a box into halves of its width, or of its height. */
static void divide(const Box *box, int in_x, Box *first, Box *second)
{
    first->u = box->u, first->v = box->v;
    first->width = in_x ? box->width / 2 : box->width, first->height = in_x ? box->height : box->height / 2;
    second->width = first->width, second->height = first->height;
    second->u = in_x ? box->u + first->width : box->u, second->v = in_x ? box->v : box->v + first->height;
    void (*const split)(const Coefficients, Coefficients, Coefficients) = in_x ? halve_columns : halve;
    split(box->square, first->square, second->square);
    split(box->product, first->product, second->product);
}

/* Divide all boxes of a grid in both axes, into memory from `boxes` on. */
static Grid quarter(Grid grid, Box *boxes)
{
    Grid divided = {boxes, 2 * grid.rows, 2 * grid.columns, 2 * grid.columns};
    Box half[2];
    for (int row = 0; row < grid.rows; row++)
        for (int column = 0; column < grid.columns; column++) {
            divide(&grid.boxes[row * grid.stride + column], 0, &half[0], &half[1]);
            for (int i = 0; i < 2; i++) {
                Box *to = &boxes[(2 * row + i) * divided.stride + 2 * column];
                divide(&half[i], 1, to, to + 1);
            }
        }
    return divided;
}

static void polish_from(const Work *s, double u, double v, Search *found)
{
    Value value = polish(s, u, v);
    if (value.chi2 < found->best.chi2) {
        found->best = value;
        found->limit = value.chi2 * (1 - TOLERANCE) - ROUNDING * s->image_square;
    }
    for (int i = 0; i < REMEMBERED && i < found->count; i++)
        if (fabs(found->minima[i].u - value.u) < SAME && fabs(found->minima[i].v - value.v) < SAME)
            return;
    found->minima[found->count++ % REMEMBERED] = value;
}

/* Slopes along a box, by the place in it, and as of a polynomial of the same degree. */
HOT static void slope_in_v(const Coefficients from, Coefficients to)
{
    enum { DEGREE = POINTS - 1 };
    for (int m = 0; m < POINTS; m++) {
        const double *before = from[m ? m - 1 : 0], *after = from[m < DEGREE ? m + 1 : DEGREE];
        for (int lane = 0; lane < LANES; lane++)
            to[m][lane] = (2 * m - DEGREE) * from[m][lane] + (DEGREE - m) * after[lane] - m * before[lane];
    }
}

HOT static void slope_in_u(const Coefficients from, Coefficients to)
{
    static const double own[LANES] = {-6, -4, -2, 0, 2, 4, 6, 0}, next[LANES] = {6, 5, 4, 3, 2, 1, 0, 0};
    static const double last[LANES] = {0, 1, 2, 3, 4, 5, 6, 0};
    for (int m = 0; m < POINTS; m++) {
        const double *row = from[m];
        double padded[LANES + 2] = {0};
        memcpy(padded + 1, row, sizeof *from);
        for (int lane = 0; lane < LANES; lane++)
            to[m][lane] = own[lane] * row[lane] + next[lane] * padded[lane + 2] - last[lane] * padded[lane];
        to[m][LANES - 1] = to[m][LANES - 2];
    }
}

/* R and its derivatives in a box: whether it is convex, or monotonic along an axis on whose bound the minimum lies. */
HOT static int is_convex(const Box *box, const double *ends, int count, double gain, double held_u, double held_v)
{
    Coefficients t_u, t_v, t_uu, t_uv, t_vv, p_u, p_v, p_uu, p_uv, p_vv;
    slope_in_u(box->square, t_u), slope_in_v(box->square, t_v);
    slope_in_u(t_u, t_uu), slope_in_v(t_u, t_uv), slope_in_v(t_v, t_vv);
    slope_in_u(box->product, p_u), slope_in_v(box->product, p_v);
    slope_in_u(p_u, p_uu), slope_in_v(p_u, p_uv), slope_in_v(p_v, p_vv);
    const double part = count > 1 ? 2 / gain : 0; /* for a that follows the shift */
    double least_uu[LANES], least_vv[LANES], least[LANES], most_u[LANES], most_v[LANES];
    for (int lane = 0; lane < LANES; lane++)
        least_uu[lane] = least_vv[lane] = least[lane] = INFINITY, most_u[lane] = most_v[lane] = -INFINITY;
    for (int end = 0; end < count; end++) {
        const double twice = 2 * ends[end];
        for (int m = 0; m < POINTS; m++)
            for (int lane = 0; lane < LANES; lane++) {
                double pu = p_u[m][lane], pv = p_v[m][lane];
                double uu = (t_uu[m][lane] - twice * p_uu[m][lane] - part * pu * pu) / gain;
                double uv = (t_uv[m][lane] - twice * p_uv[m][lane] - part * pu * pv) / gain;
                double vv = (t_vv[m][lane] - twice * p_vv[m][lane] - part * pv * pv) / gain;
                least_uu[lane] = smaller(uu, least_uu[lane]), least_vv[lane] = smaller(vv, least_vv[lane]);
                least[lane] = smaller(uu * vv - uv * uv, least[lane]);
                most_u[lane] = larger((t_u[m][lane] - twice * pu) * held_u, most_u[lane]);
                most_v[lane] = larger((t_v[m][lane] - twice * pv) * held_v, most_v[lane]);
            }
    }
    int convex = 1;
    for (int lane = 0; lane < LANES; lane++) {
        convex &= held_u != 0 ? most_u[lane] < 0 : least_uu[lane] > 0;
        convex &= held_v != 0 ? most_v[lane] < 0 : least_vv[lane] > 0;
        convex &= held_u != 0 || held_v != 0 || least[lane] > 0;
    }
    return convex;
}

static int holds(const Grid *grid, const Value *one)
{
    const Box *first = grid->boxes, *last = &first[(grid->rows - 1) * grid->stride + grid->columns - 1];
    return one->u > first->u - 1e-12 && one->v > first->v - 1e-12 && one->u < last->u + last->width + 1e-12 &&
           one->v < last->v + last->height + 1e-12;
}

/* Whether the best minimum lies in a grid and is shown to be the lowest there; see search.py. */
static int is_settled(const Work *s, const Grid *grid, const Value *best)
{
    const double gain = s->image_square - best->chi2, low = 1 / s->max_scale, high = s->max_scale;
    const double rounding = ROUNDING * (s->image_square + best->scale * best->scale * best->square);
    double du, dv;
    if (!step(best, s->max_shift, &du, &dv) || !holds(grid, best))
        return 0;
    double fall = -(best->gu * du + best->gv * dv) / 2; /* to where Newton's method would end */
    if (!(fall <= TOLERANCE * best->chi2 + rounding && TOLERANCE * best->chi2 + rounding < gain))
        return 0;
    double held_u = fabs(best->u) >= s->max_shift && best->gu * best->u < 0 ? best->u : 0;
    double held_v = fabs(best->v) >= s->max_shift && best->gv * best->v < 0 ? best->v : 0;
    double ends[2] = {low, high}, least = INFINITY, most = -INFINITY;
    int count = 2;
    if (!best->free) { /* if R rises from the bound where the minimum lies, that end is all that matters */
        for (int row = 0; row < grid->rows; row++)
            for (int column = 0; column < grid->columns; column++)
                for (int m = 0; m < POINTS; m++)
                    for (int lane = 0; lane < LANES; lane++) {
                        double product = grid->boxes[row * grid->stride + column].product[m][lane];
                        least = smaller(least, product), most = larger(most, product);
                    }
        if (best->scale == high && (low == high || most <= gain * low))
            count = 1;
        else if (best->scale == low && least >= gain * high)
            ends[0] = high, count = 1;
    }
    for (int row = 0; row < grid->rows; row++)
        for (int column = 0; column < grid->columns; column++)
            if (!is_convex(&grid->boxes[row * grid->stride + column], ends, count, gain, held_u, held_v))
                return 0;
    return 1;
}

/* The rectangle around the boxes where chi2 may be below the limit, and, if there are any, around the best minimum too. */
static Grid what_is_left(Grid grid, const Search *found)
{
    int top = grid.rows, bottom = -1, left = grid.columns, right = -1;
    for (int pass = 0; pass < 2 && (!pass || bottom >= 0); pass++)
        for (int row = 0; row < grid.rows; row++)
            for (int column = 0; column < grid.columns; column++) {
                const Grid box = {&grid.boxes[row * grid.stride + column], 1, 1, grid.stride};
                if (pass ? !holds(&box, &found->best) : !(box.boxes->bound < found->limit))
                    continue;
                top = row < top ? row : top, bottom = row > bottom ? row : bottom;
                left = column < left ? column : left, right = column > right ? column : right;
            }
    if (bottom < 0)
        return (Grid){grid.boxes, 0, 0, grid.stride};
    return (Grid){&grid.boxes[top * grid.stride + left], bottom - top + 1, right - left + 1, grid.stride};
}

/* Whether a box touches a minimum that was found, or nearly, with the scale free, or at one bound, in all of it and there. */
static int belongs(const Work *s, const Box *box, const Search *found)
{
    for (int i = 0; i < REMEMBERED && i < found->count; i++) {
        const Value *value = &found->minima[i];
        if (fabs(value->u - box->u - box->width / 2) > 1.5 * box->width || fabs(value->v - box->v - box->height / 2) > 1.5 * box->height)
            continue;
        if (value->free ? 1 / s->max_scale < box->least && box->most < s->max_scale
                        : box->least == value->scale && box->most == value->scale)
            return 1;
    }
    return 0;
}

/* Begin where the coefficients are lowest. */
static void polish_lowest(const Work *s, const Box *box, Search *found)
{
    double least = INFINITY, u = 0, v = 0, scale;
    for (int m = 0; m < POINTS; m++)
        for (int lane = 0; lane < POINTS; lane++) {
            double chi2 = best_chi2(s, box->square[m][lane], box->product[m][lane], found->negligible, &scale);
            if (chi2 < least)
                least = chi2, u = box->u + box->width * lane / (POINTS - 1), v = box->v + box->height * m / (POINTS - 1);
        }
    polish_from(s, u, v, found);
}

/* Find what is lower in a grid than what is known; memory for divided boxes begins at `next`. */
static void look(const Work *s, Grid grid, int halvings, Box *next, Search *found)
{
    Box *lowest = grid.boxes, *first = grid.boxes;
    for (int row = 0; row < grid.rows; row++)
        for (int column = 0; column < grid.columns; column++) {
            Box *box = &grid.boxes[row * grid.stride + column];
            measure(s, box, found->negligible);
            if (box->corner < lowest->corner)
                lowest = box;
            if (box->bound < first->bound)
                first = box;
        }
    if (!found->count)
        polish_lowest(s, first, found);
    Grid left = what_is_left(grid, found);
    if (!left.rows || is_settled(s, &left, &found->best))
        return;
    if (lowest->corner < found->limit) {
        polish_from(s, lowest->corner_u, lowest->corner_v, found);
        left = what_is_left(grid, found);
    }
    if (halvings < MOST_HALVINGS && left.rows * left.columns <= TOGETHER) {
        if (left.rows)
            look(s, quarter(left, next), halvings + 1, next + 4 * TOGETHER, found);
        return;
    }
    for (;;) { /* box by box, the lowest bound first */
        Grid box = {grid.boxes, 1, 1, grid.stride};
        for (int row = 0; row < grid.rows; row++)
            for (int column = 0; column < grid.columns; column++)
                if (grid.boxes[row * grid.stride + column].bound < box.boxes->bound)
                    box.boxes = &grid.boxes[row * grid.stride + column];
        if (!(box.boxes->bound < found->limit))
            return;
        box.boxes->bound = INFINITY;
        if (halvings < MOST_SINGLE)
            look(s, quarter(box, next), halvings + 1, next + 4 * TOGETHER, found);
        else if (!belongs(s, box.boxes, found))
            polish_from(s, box.boxes->corner_u, box.boxes->corner_v, found);
    }
}

/* The global minimum; see search.py. */
static Value lowest(const Work *s)
{
    Search found = {.best = {.chi2 = INFINITY}, .limit = INFINITY};
    int cells = 2 * (int)ceil(s->max_shift);
    if (!cells)
        return evaluate(s, 0, 0);
    Axis axes[2 * LARGEST_SHIFT];
    for (int i = 0; i < cells; i++)
        make_axis(s, i - cells / 2, &axes[i]);
    for (int i = 0; i < cells; i++)
        fill_column(s, axes, cells, &axes[i], s->boxes + i);
    for (int i = 0; i < s->count * s->count; i++)
        found.negligible = larger(found.negligible, NEGLIGIBLE * gram_at(s, 0, 0, 0, 0)[i]);
    look(s, (Grid){s->boxes, cells, cells, cells}, 0, s->boxes + cells * cells, &found);
    return found.best;
}

/* ---- The result ----------------------------------------------------------------------------------------------------- */

/* The image less everything, into s->scratch. */
HOT static void subtract(const Work *s, const Value *best, double constant)
{
    double X[3][4], Y[3][4];
    int column = taps(best->u, s->reach, X), row = taps(best->v, s->reach, Y);
    for (Index y = 0; y < s->ny; y++) {
        const double *restrict from = s->padded + (y + row) * s->stride, *restrict image = s->image + y * s->nx;
        double *restrict line = s->scratch2, *restrict after = s->scratch + y * s->nx;
        const Index apart = s->stride;
        for (Index x = 0; x < s->nx + 2 * s->reach; x++)
            line[x] = Y[0][0] * from[x] + Y[0][1] * from[x + apart] + Y[0][2] * from[x + 2 * apart] + Y[0][3] * from[x + 3 * apart];
        line += column;
        for (Index x = 0; x < s->nx; x++) {
            double moved = X[0][0] * line[x] + X[0][1] * line[x + 1] + X[0][2] * line[x + 2] + X[0][3] * line[x + 3];
            after[x] = image[x] - constant - best->scale * moved;
        }
    }
}

/* chi2 before and after, over the fitted pixels. */
HOT static void sum_squares(const Work *s, double bg, Result *result)
{
    double *restrict line = s->scratch2, *restrict square = s->scratch2 + s->w;
    for (Index y = 0; y < s->h; y++) {
        const Index at = (y + s->y0) * s->nx + s->x0;
        const double *restrict image = s->image + at, *restrict template = s->template + at, *restrict after = s->scratch + at;
        const double *weight = s->weight + y * s->w;
        for (Index x = 0; x < s->w; x++) {
            double before = image[x] - bg - template[x];
            line[x] = before * before;
            square[x] = after[x] * after[x];
        }
        result->chi2_0 += dot(weight, line, s->w);
        result->chi2 += dot(weight, square, s->w);
    }
}

/* One sigma of dx, dy, scale and bg from the curvature; NaN where there is none. */
static void find_errors(const Work *s, const Value *best, Result *result)
{
    int free_u = !(result->at_bound & 1), free_v = !(result->at_bound & 2), free_scale = !(result->at_bound & 4);
    double size = larger(larger(fabs(best->huu), fabs(best->huv)), fabs(best->hvv));
    double huu = best->huu / size, huv = best->huv / size, hvv = best->hvv / size, determinant = huu * hvv - huv * huv;
    double cuu = 0, cuv = 0, cvv = 0, *errors = result->errors;
    errors[0] = errors[1] = errors[2] = errors[3] = NAN;
    if ((free_u && !(huu > 0)) || (free_v && !(hvv > 0)) || (free_u && free_v && !(determinant > 1e-12 * huu * hvv)))
        return;
    if (free_u && free_v)
        cuu = 2 * hvv / determinant / size, cuv = -2 * huv / determinant / size, cvv = 2 * huu / determinant / size;
    else if (free_u)
        cuu = 2 / huu / size;
    else if (free_v)
        cvv = 2 / hvv / size;
    double own = free_scale ? 1 / best->square : 0, su = best->slope_u, sv = best->slope_v;
    if (free_u)
        errors[0] = sqrt(cuu);
    if (free_v)
        errors[1] = sqrt(cvv);
    if (free_scale)
        errors[2] = sqrt(own + su * su * cuu + 2 * su * sv * cuv + sv * sv * cvv);
    if (s->fit_bg) {
        double by_scale = -s->template_mean - best->sum / s->weight_sum;
        double by_u = by_scale * su - best->scale * best->sum_u / s->weight_sum;
        double by_v = by_scale * sv - best->scale * best->sum_v / s->weight_sum;
        errors[3] = sqrt(1 / s->weight_sum + by_scale * by_scale * own + by_u * by_u * cuu + 2 * by_u * by_v * cuv +
                         by_v * by_v * cvv);
    }
}

/* Divide by err, blank what is undefined, and write. */
HOT static void finish(const Work *s, const unsigned char *undefined, void *adjusted, Index item)
{
    const Index size = s->ny * s->nx;
    double *restrict value = s->scratch;
    for (Index i = 0; s->normalize && i < size; i++)
        value[i] = usable(s->err[i]) ? value[i] / s->err[i] : NAN;
    for (Index i = 0; undefined && i < size; i++)
        if (undefined[i])
            value[i] = NAN;
    if (item == sizeof(double))
        memcpy(adjusted, value, (size_t)size * sizeof(double));
    else {
        float *restrict out = adjusted;
        for (Index i = 0; i < size; i++)
            out[i] = (float)value[i];
    }
}

/* ---- The whole fit -------------------------------------------------------------------------------------------------- */

static void span(Index size, double inner, Index *first, Index *length)
{
    *first = 0, *length = size;
    if (!(inner > 0) || inner >= (double)size)
        return;
    *first = (Index)ceil(((double)(size - 1) - inner) / 2);
    *length = (Index)floor(((double)(size - 1) + inner) / 2) + 1 - *first;
}

static void widen(const Py_buffer *from, double *restrict to, Index size)
{
    if (from->itemsize == sizeof(double))
        memcpy(to, from->buf, (size_t)size * sizeof(double));
    else
        for (Index i = 0; i < size; i++)
            to[i] = ((const float *)from->buf)[i];
}

/* All memory of a fit is one block; NULL where there is none. */
static void *allocate(Work *s)
{
    Index size = s->ny * s->nx, cells = 2 * (Index)ceil(s->max_shift), squared = (Index)s->count * s->count;
    Index h = s->h > 0 ? s->h : 0, w = s->w > 0 ? s->w : 0, rows = s->slab + s->count, line = s->nx + 2 * s->reach;
    const Index planes = rows * (w + s->count) * LANES, weights = (s->slab + 1) * w * LANES, product = rows * (BLOCK + s->count) * LANES;
    const Index boxes = (cells * cells + MOST_HALVINGS * 4 * TOGETHER) * (Index)(sizeof(Box) / sizeof(double));
    const Index padded = (s->ny + 2 * s->reach) * s->stride;
    struct {
        double **place;
        Index size;
    } parts[] = {{&s->planes, planes}, {&s->weights, weights}, {&s->weights_image, weights},
                 {&s->product, product}, {&s->gram, 28 * squared}, {&s->projection, squared}, {&s->sums, squared},
                 {&s->weight, h * w}, {&s->weighted, h * w}, {&s->residual, h * w}, {&s->padded, padded}, {&s->image, size}, {&s->template, size},
                 {&s->err, size}, {&s->scratch, size}, {&s->scratch2, size > 2 * line ? size : 2 * line}};
    const int count = sizeof parts / sizeof parts[0];
    Index total = LANES + boxes;
    for (int i = 0; i < count; i++)
        total += parts[i].size;
    char *block = malloc((size_t)total * sizeof(double) + 3 * (size_t)size);
    if (!block)
        return NULL;
    double *next = (double *)(block + (64 - (uintptr_t)block % 64) % 64);
    for (int i = 0; i < count; i++)
        *parts[i].place = next, next += parts[i].size;
    s->boxes = (Box *)next, next += boxes;
    s->bad_image = (unsigned char *)next, s->bad_template = s->bad_image + size, s->undefined = s->bad_template + size;
    memset(s->gram, 0, (size_t)(30 * squared) * sizeof(double)); /* with projection and sums */
    return block;
}

static void fit(Work *s, const unsigned char *mask, void *adjusted, Index item, Result *result)
{
    Index size = s->ny * s->nx;
    int any_image = mark_bad(s->image, mask, size, s->bad_image);
    int any_template = mark_bad(s->template, mask, size, s->bad_template), any = any_image | any_template;
    result->failure = TOO_FEW_PIXELS;
    result->npix = s->h > 0 && s->w > 0 ? weigh(s, any_template) : 0;
    if (result->npix <= 2 * (s->max_shift > 0) + (s->max_scale > 1) + s->fit_bg)
        return;
    result->failure = NO_SIGNAL;
    if (is_flat(s))
        return;
    result->failure = FITTED;
    result->bg = background(s->image, any_image ? s->bad_image : NULL, size, s->scratch, s->scratch2);
    result->tbg = background(s->template, any_template ? s->bad_template : NULL, size, s->scratch, s->scratch2);
    for (Index i = 0; any && i < size; i++) {
        s->undefined[i] = !(fabs(s->image[i]) < HUGE_VALUE) | !(fabs(s->template[i]) < HUGE_VALUE);
        if (s->undefined[i])
            s->image[i] = 0; /* of weight 0; NaN would spread */
    }
    if (any_template)
        fill(s, result->tbg);
    make_coefficients(s, result->tbg);
    prepare_sums(s, result->bg);
    make_form(s);
    Value best = lowest(s);
    double offset = 0;
    if (s->fit_bg)
        offset = s->image_mean - best.scale * s->template_mean + (s->image_sum - best.scale * best.sum) / s->weight_sum;
    subtract(s, &best, result->bg + offset + best.scale * s->template_mean);
    sum_squares(s, result->bg, result);
    result->at_bound = (fabs(best.u) >= s->max_shift) | (fabs(best.v) >= s->max_shift) << 1 | !best.free << 2;
    find_errors(s, &best, result);
    result->bg += offset;
    result->dx = 0 - best.u, result->dy = 0 - best.v, result->scale = best.scale;
    finish(s, any ? s->undefined : NULL, adjusted, item);
}

/* ---- Python --------------------------------------------------------------------------------------------------------- */

enum { IMAGE, TEMPLATE, ERR, ADJUSTED, MASK, BUFFERS };

/* Views of the arrays; 0 and an exception where one is not what adjust.py promises. */
static int view(PyObject *const objects[BUFFERS], Py_buffer views[BUFFERS])
{
    for (int i = 0; i < BUFFERS; i++) {
        if (i == MASK && objects[i] == Py_None)
            continue;
        int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (i == ADJUSTED ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(objects[i], &views[i], flags) < 0)
            return 0;
        const Py_buffer *v = &views[i];
        int floats = v->format && (!strcmp(v->format, "f") || !strcmp(v->format, "d"));
        if (v->ndim != 2 || v->len == 0 || v->shape[0] != views[0].shape[0] || v->shape[1] != views[0].shape[1] ||
            (i == MASK ? v->itemsize != 1 : !floats)) {
            PyErr_SetString(PyExc_ValueError, "wanted contiguous planes of one shape, float32 or float64, and a mask of bytes");
            return 0;
        }
    }
    return 1;
}

static void run(const Py_buffer views[BUFFERS], double inner, Work *s, Result *result)
{
    s->ny = views[IMAGE].shape[0], s->nx = views[IMAGE].shape[1];
    span(s->ny, inner, &s->y0, &s->h);
    span(s->nx, inner, &s->x0, &s->w);
    s->reach = (int)larger(ceil(s->max_shift), 1) + 1, s->count = 2 * s->reach + 1;
    s->slab = (s->h + LANES - 1) / LANES, s->stride = s->nx + 2 * s->reach;
    void *block = allocate(s);
    if (!block) {
        result->failure = NO_MEMORY;
        return;
    }
    widen(&views[IMAGE], s->image, s->ny * s->nx);
    widen(&views[TEMPLATE], s->template, s->ny * s->nx);
    widen(&views[ERR], s->err, s->ny * s->nx);
    fit(s, views[MASK].obj ? views[MASK].buf : NULL, views[ADJUSTED].buf, views[ADJUSTED].itemsize, result);
    free(block);
}

static PyObject *adjust_fit(PyObject *module, PyObject *args)
{
    PyObject *objects[BUFFERS], *answer = NULL;
    Py_buffer views[BUFFERS];
    Work work;
    Result r;
    double inner;
    int at_once = 0;
    (void)module;
    memset(views, 0, sizeof views);
    memset(&work, 0, sizeof work);
    memset(&r, 0, sizeof r);
    if (!PyArg_ParseTuple(args, "OOOOdddppO|i", &objects[IMAGE], &objects[TEMPLATE], &objects[ERR], &objects[MASK], &inner,
                          &work.max_shift, &work.max_scale, &work.fit_bg, &work.normalize, &objects[ADJUSTED], &at_once))
        return NULL;
    if (!(work.max_shift >= 0 && work.max_shift <= LARGEST_SHIFT && work.max_scale >= 1 && work.max_scale <= LARGEST_SCALE &&
          inner >= 0))
        PyErr_SetString(PyExc_ValueError, "max_shift, max_scale or inner is out of range");
    else if (!(work.correlate = choose_correlate(at_once)))
        PyErr_SetString(PyExc_ValueError, "this machine has no vectors of that width");
    else if (view(objects, views)) {
        Py_BEGIN_ALLOW_THREADS
        run(views, inner, &work, &r);
        Py_END_ALLOW_THREADS
        const char *failures[] = {"", "no_signal", "too_few_pixels"};
        if (r.failure == NO_MEMORY)
            PyErr_NoMemory();
        else if (r.failure != FITTED)
            answer = Py_BuildValue("(sn)", failures[r.failure], (Py_ssize_t)r.npix);
        else
            answer = Py_BuildValue("(sniddddddddddd)", "", (Py_ssize_t)r.npix, r.at_bound, r.bg, r.tbg, r.dx, r.dy, r.scale, r.chi2_0,
                                   r.chi2, r.errors[0], r.errors[1], r.errors[2], r.errors[3]);
    }
    for (int i = 0; i < BUFFERS; i++)
        if (views[i].obj)
            PyBuffer_Release(&views[i]);
    return answer;
}

static PyMethodDef methods[] = {
    {"fit", adjust_fit, METH_VARARGS,
     "fit(image, template, err, mask, inner, max_shift, max_scale, fit_bg, normalize, adjusted)\n--\n\n"
     "The fields of adjust.Fit, as fit_numpy returns them; fills `adjusted`."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_adjust", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__adjust(void) { return PyModuleDef_Init(&module); }

/* ---- Read once for each width of vectors ------------------------------------------------------------------------------ */

#else
#define JOIN(name, n) name##_##n
#define NAME(name, n) JOIN(name, n)
#define Vector NAME(Vector, AT_ONCE)
typedef double Vector __attribute__((vector_size(8 * AT_ONCE), may_alias));

/* out[k] += sum over y and x of weight[y][x] plane[y][x + k], for nk <= 7: the sums stay in registers. Vectors narrower than the
 * lanes take several turns; the sums are the same to the last bit. */
TARGET INLINE void NAME(line, AT_ONCE)(const int nk, const double *weight, Index wide, const double *plane, Index stride,
                                       Index rows, Index width, double *out)
{
    double lanes[7][LANES];
    for (int lane = 0; lane < LANES; lane += AT_ONCE) {
        Vector sum[7] = {{0}};
        for (Index row = 0; row < rows; row++) {
            const double *w = weight + row * wide * LANES + lane, *p = plane + row * stride * LANES + lane;
            for (Index x = 0; x < width; x++) {
                const Vector by = *(const Vector *)(w + x * LANES);
#pragma GCC unroll 7
                for (int k = 0; k < nk; k++)
                    sum[k] += by * *(const Vector *)(p + (x + k) * LANES);
            }
        }
#pragma GCC unroll 7
        for (int k = 0; k < nk; k++)
            memcpy(&lanes[k][lane], &sum[k], sizeof(Vector));
    }
    for (int k = 0; k < nk; k++)
        out[k] += total(lanes[k]);
}

/* out[j][k] += sum over y and x of weight[y][x] plane[y + j][x + k] for all j < nj and k < nk; interleaved planes, whose strides
 * count groups of lanes. */
TARGET static void NAME(correlate, AT_ONCE)(const double *weight, Index wide, const double *plane, Index stride, Index rows,
                                            Index width, int nj, int nk, double *out, Index out_stride)
{
    for (int j = 0; j < nj; j++)
        for (int k = 0, count; k < nk; k += count) {
            const double *p = plane + (j * stride + k) * LANES;
            double *o = out + j * out_stride + k;
            count = nk - k > 10 ? 7 : nk - k > 7 ? (nk - k) / 2 : nk - k;
            switch (count) { /* the compiler makes one of each */
            case 7: NAME(line, AT_ONCE)(7, weight, wide, p, stride, rows, width, o); break;
            case 6: NAME(line, AT_ONCE)(6, weight, wide, p, stride, rows, width, o); break;
            case 5: NAME(line, AT_ONCE)(5, weight, wide, p, stride, rows, width, o); break;
            case 4: NAME(line, AT_ONCE)(4, weight, wide, p, stride, rows, width, o); break;
            case 3: NAME(line, AT_ONCE)(3, weight, wide, p, stride, rows, width, o); break;
            default: NAME(line, AT_ONCE)(2, weight, wide, p, stride, rows, width, o); break;
            }
        }
}

#undef Vector
#undef NAME
#undef JOIN
#undef TARGET
#undef AT_ONCE
#endif
