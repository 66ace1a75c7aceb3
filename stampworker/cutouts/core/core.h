/* The fit of adjust.py in C: fit_numpy() is the specification, and a test compares the two. What differs:
 *
 * - The Gram matrix is kept by lag, only for pairs of planes that share a cell of the spline: gram_at(form, a, b, j, k)
 *   is the sum of the entries whose planes have the rows j and j + a, and the columns k and k + b in either order.
 * - Sums run in eight lanes in a fixed order, and the compiler may not fuse multiplication and addition
 *   (-ffp-contract=off): every clone, SSE2 to AVX-512, gives the same bits, and every machine the same packets.
 *
 * module.c binds fit() to Python; fit.c fits; pixels.c selects pixels and estimates backgrounds; spline.c interpolates;
 * form.c and correlate.h make the quadratic form; search.c finds its minimum. No state is kept between calls.
 */
#ifndef STAMPWORKER_CORE_H
#define STAMPWORKER_CORE_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86
#endif
#if defined(X86) && defined(__gnu_linux__) && !defined(__clang__) && !defined(ONE_CLONE)
#define HOT __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define HOT
#endif

typedef ptrdiff_t Index;
typedef void Correlate(const double *, Index, const double *, Index, Index, Index, int, int, double *, Index);

static const double HUGE_VALUE = 1e50, FLAT = 1e-6; /* of adjust.py */
enum { LARGEST_SHIFT = 16, LARGEST_SCALE = 1000, FILL_LAYERS = 3 };
enum { LANES = 8, BLOCK = 24 }; /* BLOCK columns of a product and its weights almost fit the first-level cache */
enum { MAX_REACH = LARGEST_SHIFT + 1, MAX_PLANES = (2 * MAX_REACH + LANES) / LANES * LANES }; /* whole lanes */
enum { FITTED, NO_SIGNAL, TOO_FEW_PIXELS, NO_MEMORY };

/* chi2 as a quadratic form in the weights of the moved planes, and the bounds; see search.py. */
typedef struct {
    int reach, count; /* count = 2 reach + 1 planes on an axis */
    int stride;       /* of the Gram matrix: whole lanes */
    double max_shift, max_scale;
    double *gram, *projection, *sums;
    double image_square, image_sum, weight_sum, image_mean, template_mean;
    double *grid; /* grid_size() doubles for the search */
} QuadraticForm;

/* chi2 at one shift with the best scale, and derivatives by u = -dx and v = -dy. */
typedef struct {
    double u, v, chi2, scale, gu, gv, huu, huv, hvv;
    double square, scale_u, scale_v; /* of the moved template; of the best scale, while it is free */
    int scale_at_bound;
} Minimum;

/* Planes are (ny, nx), `weight` and `residual` (h, w), which is the fitted box at (y0, x0). */
typedef struct {
    Correlate *correlate;
    QuadraticForm form;
    Index ny, nx, y0, x0, h, w;
    Index stride; /* of the padded coefficients */
    Index slab;   /* rows of the box in one lane */
    int fit_bg, normalize;
    double *image, *template, *err, *scratch, *line, *padded, *weight, *weighted, *residual;
    double *planes, *weights, *weights_image, *product; /* interleaved */
    unsigned char *bad_image, *bad_template, *undefined;
} Work;

typedef struct {
    int failure;
    Index npix;
    double bg, offset, tbg, chi2_0, chi2, template_sums[6];
    Minimum best;
} Result;

static inline double smaller(double a, double b) { return a < b ? a : b; }
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline double clip(double at, double low, double high) { return smaller(larger(at, low), high); }
static inline int usable(double err) { return err > 1 / HUGE_VALUE && err < HUGE_VALUE; }

static inline double total(const double lanes[LANES])
{
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

static inline double *gram_at(const QuadraticForm *form, int a, int b, Index j, Index k)
{
    return form->gram + ((a * 4 + b) * form->count + j) * form->stride + k;
}

/* pixels.c */
int mark_bad(const double *plane, const unsigned char *mask, Index size, unsigned char *bad);
Index weigh(Work *s, int any_bad_template);
int is_flat(const Work *s);
void fill(Work *s, double value);
double background(const double *plane, const unsigned char *bad, Index size, double *values, double *copy);
double dot(const double *a, const double *b, Index n);

/* spline.c */
int bspline_weights(double at, int reach, double weights[3][4]);
void make_coefficients(Work *s, double tbg);
void subtract_moved(const Work *s, const Minimum *best, double constant);

/* form.c */
Correlate *choose_correlate(int width);
void make_form(Work *s, double bg);

/* search.c */
Index grid_size(const QuadraticForm *form);
void sum_moved(const QuadraticForm *form, const double *planes, double u, double v, double sums[6]);
Minimum global_minimum(const QuadraticForm *form);

/* fit.c */
int allocate(Work *s, void **block);
void fit(Work *s, const unsigned char *mask, void *adjusted, Index item, Result *result);

#endif
