/* The fit: from planes to shift, scale, offset, errors and the adjusted plane. */
#include "core.h"

#include <stdint.h>
#include <stdlib.h>

/* All memory of a fit is one block, which the caller frees. Return 0 where there is none. */
int allocate(Work *s, void **block)
{
    QuadraticForm *form = &s->form;
    const Index size = s->ny * s->nx, count = form->count, squared = count * count, gram = 16 * count * form->stride;
    const Index h = s->h > 0 ? s->h : 0, w = s->w > 0 ? s->w : 0, rows = s->slab + count, weights = (s->slab + 1) * w;
    const Index line = s->nx + 2 * form->reach, padded = (s->ny + 2 * form->reach) * s->stride;
    const struct {
        double **place;
        Index size;
    } parts[] = {
        {&s->planes, rows * (w + count) * LANES}, /* interleaved ones first, at whole vectors */
        {&s->weights, weights * LANES},
        {&s->weights_image, weights * LANES},
        {&s->product, rows * (BLOCK + count) * LANES},
        {&form->gram, gram},
        {&form->projection, squared},
        {&form->sums, squared},
        {&form->grid, grid_size(form)},
        {&s->weight, h * w},
        {&s->weighted, h * w},
        {&s->residual, h * w},
        {&s->padded, padded},
        {&s->image, size},
        {&s->template, size},
        {&s->err, size},
        {&s->scratch, size},
        {&s->line, size > 2 * line ? size : 2 * line},
    };
    const int number = sizeof parts / sizeof parts[0];
    Index total = LANES;
    for (int i = 0; i < number; i++)
        total += parts[i].size;
    *block = malloc((size_t)total * sizeof(double) + 3 * (size_t)size);
    if (!*block)
        return 0;
    double *next = (double *)((char *)*block + (64 - (uintptr_t)*block % 64) % 64);
    for (int i = 0; i < number; i++)
        *parts[i].place = next, next += parts[i].size;
    s->bad_image = (unsigned char *)next, s->bad_template = s->bad_image + size, s->undefined = s->bad_template + size;
    memset(form->gram, 0, (size_t)(gram + 2 * squared) * sizeof(double)); /* with projection and sums */
    return 1;
}

/* Weighted sum of the moved template, less its mean, and the sum's derivatives by u and v. */
static void template_sums(const QuadraticForm *form, const Minimum *at, double sums[3])
{
    double X[3][4], Y[3][4];
    const int column = bspline_weights(at->u, form->reach, X), row = bspline_weights(at->v, form->reach, Y);
    sums[0] = sums[1] = sums[2] = 0;
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < 4; i++) {
            const double plane = form->sums[(row + t) * form->count + column + i];
            sums[0] += Y[0][t] * X[0][i] * plane, sums[1] += Y[0][t] * X[1][i] * plane;
            sums[2] += Y[1][t] * X[0][i] * plane;
        }
}

/* chi2 before and after, over the fitted pixels. */
HOT static void sum_squares(const Work *s, double bg, Result *result)
{
    double *restrict line = s->line, *restrict square = s->line + s->w;
    for (Index y = 0; y < s->h; y++) {
        const Index at = (y + s->y0) * s->nx + s->x0;
        const double *restrict image = s->image + at, *restrict template = s->template + at;
        const double *restrict after = s->scratch + at, *weight = s->weight + y * s->w;
        for (Index x = 0; x < s->w; x++) {
            double before = image[x] - bg - template[x];
            line[x] = before * before;
            square[x] = after[x] * after[x];
        }
        result->chi2_0 += dot(weight, line, s->w);
        result->chi2 += dot(weight, square, s->w);
    }
}

/* One sigma of dx, dy, scale and bg from the curvature; NaN where there is none. See _errors() in adjust.py. */
static void find_errors(const Work *s, const Minimum *best, const double sums[3], Result *result)
{
    const QuadraticForm *form = &s->form;
    const int free_u = !(result->at_bound & DX_AT_BOUND), free_v = !(result->at_bound & DY_AT_BOUND);
    const int free_scale = !(result->at_bound & SCALE_AT_BOUND);
    const double size = larger(larger(fabs(best->huu), fabs(best->huv)), fabs(best->hvv));
    const double huu = best->huu / size, huv = best->huv / size, hvv = best->hvv / size;
    const double determinant = huu * hvv - huv * huv;
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
    const double own = free_scale ? 1 / best->square : 0, su = best->scale_u, sv = best->scale_v;
    if (free_u)
        errors[0] = sqrt(cuu);
    if (free_v)
        errors[1] = sqrt(cvv);
    if (free_scale)
        errors[2] = sqrt(own + su * su * cuu + 2 * su * sv * cuv + sv * sv * cvv);
    if (s->fit_bg) {
        const double weight = form->weight_sum, by_scale = -form->template_mean - sums[0] / weight;
        const double by_u = by_scale * su - best->scale * sums[1] / weight;
        const double by_v = by_scale * sv - best->scale * sums[2] / weight;
        errors[3] = sqrt(1 / weight + by_scale * by_scale * own + by_u * by_u * cuu + 2 * by_u * by_v * cuv +
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

/* Find the minimum, and report it; `undefined` marks pixels to blank, or is NULL. */
static void minimize(Work *s, const unsigned char *undefined, void *adjusted, Index item, Result *result)
{
    const QuadraticForm *form = &s->form;
    double sums[3] = {0}, offset = 0;
    make_coefficients(s, result->tbg);
    make_form(s, result->bg);
    const Minimum best = global_minimum(form);
    if (s->fit_bg) {
        template_sums(form, &best, sums);
        offset = form->image_mean - best.scale * form->template_mean +
                 (form->image_sum - best.scale * sums[0]) / form->weight_sum;
    }
    subtract_moved(s, &best, result->bg + offset + best.scale * form->template_mean);
    sum_squares(s, result->bg, result);
    result->at_bound = (fabs(best.u) >= form->max_shift ? DX_AT_BOUND : 0) |
                       (fabs(best.v) >= form->max_shift ? DY_AT_BOUND : 0) | (best.scale_at_bound ? SCALE_AT_BOUND : 0);
    find_errors(s, &best, sums, result);
    result->bg += offset;
    result->dx = 0 - best.u, result->dy = 0 - best.v, result->scale = best.scale;
    finish(s, undefined, adjusted, item);
}

void fit(Work *s, const unsigned char *mask, void *adjusted, Index item, Result *result)
{
    const Index size = s->ny * s->nx;
    const int any_image = mark_bad(s->image, mask, size, s->bad_image);
    const int any_template = mark_bad(s->template, mask, size, s->bad_template), any = any_image | any_template;
    result->failure = TOO_FEW_PIXELS;
    result->npix = s->h > 0 && s->w > 0 ? weigh(s, any_template) : 0;
    if (result->npix <= 2 * (s->form.max_shift > 0) + (s->form.max_scale > 1) + s->fit_bg)
        return;
    result->failure = NO_SIGNAL;
    if (is_flat(s))
        return;
    result->failure = FITTED;
    result->bg = background(s->image, any_image ? s->bad_image : NULL, size, s->scratch, s->line);
    result->tbg = background(s->template, any_template ? s->bad_template : NULL, size, s->scratch, s->line);
    for (Index i = 0; any && i < size; i++) {
        s->undefined[i] = !(fabs(s->image[i]) < HUGE_VALUE) | !(fabs(s->template[i]) < HUGE_VALUE);
        if (s->undefined[i])
            s->image[i] = 0; /* of weight 0; NaN would spread */
    }
    if (any_template)
        fill(s, result->tbg);
    minimize(s, any ? s->undefined : NULL, adjusted, item, result);
}
