/* The quadratic form: Gram matrix of the moved planes, and their projections on the image. */
#include "core.h"

#define WIDTH 2
#define TARGET
#include "correlate.h"
#ifdef X86
#define WIDTH 4
#define TARGET __attribute__((target("avx2")))
#include "correlate.h"
#define WIDTH 8
#define TARGET __attribute__((target("avx512f")))
#include "correlate.h"
#endif

/* The widest that this machine has (0), or the one wanted; NULL where the machine does not have it. */
Correlate *choose_correlate(int width)
{
#ifdef X86
    if ((width == 0 || width == 8) && __builtin_cpu_supports("avx512f"))
        return correlate_8;
    if ((width == 0 || width == 4) && __builtin_cpu_supports("avx2"))
        return correlate_4;
#endif
    return width == 0 || width == 2 ? correlate_2 : NULL;
}

/* out[y][x] = a[y][x] b[y][x] */
HOT static void multiply(const double *restrict a, const double *restrict b, Index stride, double *restrict out,
                         Index out_stride, Index rows, Index width)
{
    for (Index y = 0; y < rows; y++)
        for (Index x = 0; x < width; x++)
            out[y * out_stride + x] = a[y * stride + x] * b[y * stride + x];
}

/* Lay rows out so that the eight lanes of a vector hold the same place of eight slabs of rows: then a plane moved in x
 * or y is read in whole vectors. Each slab has as many rows more as the planes move; rows that do not exist are 0. */
static void interleave(const double *from, Index stride, Index available, Index slab, Index rows, Index columns,
                       double *to)
{
    for (int lane = 0; lane < LANES; lane++)
        for (Index y = 0; y < rows; y++) {
            const double *line = from + (lane * slab + y) * stride;
            double *out = to + y * columns * LANES + lane;
            const int exists = lane * slab + y < available;
            for (Index x = 0; x < columns; x++)
                out[x * LANES] = exists ? line[x] : 0;
        }
}

/* The image less its background in the box, times the weights, and sums. Where an offset is fitted, image and template
 * are first freed of their weighted means. */
HOT static void prepare_sums(Work *s, double bg)
{
    QuadraticForm *form = &s->form;
    const Index size = s->h * s->w, reach = form->reach;
    const double *restrict weight = s->weight;
    double *restrict residual = s->residual, *restrict weighted = s->weighted, template_sum = 0;
    const double *unmoved = s->padded + (s->y0 + reach) * s->stride + s->x0 + reach;
    for (Index y = 0; y < s->h; y++) {
        const double *restrict image = s->image + (y + s->y0) * s->nx + s->x0;
        for (Index x = 0; x < s->w; x++)
            residual[y * s->w + x] = image[x] - bg;
    }
    form->weight_sum = dot(weight, NULL, size);
    if (s->fit_bg) {
        for (Index y = 0; y < s->h; y++)
            template_sum += dot(weight + y * s->w, unmoved + y * s->stride, s->w);
        form->image_mean = dot(weight, residual, size) / form->weight_sum;
        form->template_mean = template_sum / form->weight_sum;
        for (Index i = 0; i < size; i++)
            residual[i] -= form->image_mean;
        for (Index i = 0; i < (s->ny + 2 * reach) * s->stride; i++)
            s->padded[i] -= form->template_mean;
    }
    for (Index i = 0; i < size; i++)
        weighted[i] = weight[i] * residual[i];
    form->image_sum = dot(weighted, NULL, size);
    form->image_square = dot(weighted, residual, size);
}

/* What remains of the form after the best offset. */
static void subtract_offset(QuadraticForm *form)
{
    const int count = form->count;
    const double *sums = form->sums;
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++)
            for (int j = 0; j + a < count; j++)
                for (int k = 0; k + b < count; k++) {
                    const double *one = sums + j * count + k, *other = one + a * count;
                    double product = one[0] * (other[b] / form->weight_sum);
                    if (b)
                        product += one[b] * (other[0] / form->weight_sum);
                    *gram_at(form, a, b, j, k) -= product;
                }
    for (int i = 0; i < count * count; i++)
        form->projection[i] -= sums[i] * (form->image_sum / form->weight_sum);
    form->image_square -= form->image_sum * form->image_sum / form->weight_sum;
}

void make_form(Work *s, double bg)
{
    QuadraticForm *form = &s->form;
    const int count = form->count;
    const Index slab = s->slab, rows = slab + count - 1, columns = s->w + count - 1, wide = BLOCK + count - 1;
    prepare_sums(s, bg);
    interleave(s->padded + s->y0 * s->stride + s->x0, s->stride, s->ny + 2 * form->reach - s->y0, slab, rows, columns,
               s->planes);
    interleave(s->weight, s->w, s->h, slab, slab, s->w, s->weights);
    interleave(s->weighted, s->w, s->h, slab, slab, s->w, s->weights_image);
    for (Index x = 0; x < s->w; x += BLOCK) {
        const Index width = x + BLOCK < s->w ? BLOCK : s->w - x;
        const double *planes = s->planes + x * LANES, *weights = s->weights + x * LANES;
        s->correlate(s->weights_image + x * LANES, s->w, planes, columns, slab, width, count, count, form->projection,
                     count);
        if (s->fit_bg)
            s->correlate(weights, s->w, planes, columns, slab, width, count, count, form->sums, count);
        for (int a = 0; a < 4; a++)
            for (int b = a ? -3 : 0; b < 4; b++) {
                const int left = b < 0 ? -b : 0, right = b > 0 ? b : 0, nk = count - left - right;
                multiply(planes + left * LANES, planes + (a * columns + right) * LANES, columns * LANES, s->product,
                         wide * LANES, rows - a, (width + nk - 1) * LANES);
                s->correlate(weights, s->w, s->product, wide, slab, width, count - a, nk,
                             gram_at(form, a, left + right, 0, 0), form->stride);
            }
    }
    for (Index i = count * form->stride; i < 4 * count * form->stride; i++)
        form->gram[i] *= 2; /* a = 0: both orders of columns are the same */
    if (s->fit_bg)
        subtract_offset(form);
}
