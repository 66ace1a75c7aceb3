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

void fit(Work *s, const unsigned char *mask, void *adjusted, Index item, Result *result)
{
    const QuadraticForm *form = &s->form;
    const Index size = s->ny * s->nx;
    const int any_image = mark_bad(s->image, mask, size, s->bad_image);
    const int any_template = mark_bad(s->template, mask, size, s->bad_template), any = any_image | any_template;
    result->failure = TOO_FEW_PIXELS;
    result->npix = s->h > 0 && s->w > 0 ? weigh(s, any_template) : 0;
    if (result->npix <= 2 * (form->max_shift > 0) + (form->max_scale > 1) + s->fit_bg)
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
    make_coefficients(s, result->tbg);
    make_form(s, result->bg);
    result->best = global_minimum(form);
    if (s->fit_bg) {
        sum_moved(form, form->sums, result->best.u, result->best.v, result->template_sums);
        result->offset = form->image_mean - result->best.scale * form->template_mean +
                         (form->image_sum - result->best.scale * result->template_sums[0]) / form->weight_sum;
    }
    subtract_moved(s, &result->best, result->bg + result->offset + result->best.scale * form->template_mean);
    sum_squares(s, result->bg, result);
    finish(s, any ? s->undefined : NULL, adjusted, item);
}
