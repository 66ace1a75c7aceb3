/* Which pixels are fitted, the fill of bad ones, and backgrounds. */
#include "core.h"

/* Sum of a[i] b[i], or of a[i] where b is NULL. */
HOT double dot(const double *restrict a, const double *restrict b, Index n)
{
    double lanes[LANES] = {0};
    Index i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane] += b ? a[i + lane] * b[i + lane] : a[i + lane];
    for (; i < n; i++)
        lanes[i % LANES] += b ? a[i] * b[i] : a[i];
    return total(lanes);
}

static void insertion_sort(double *a, Index n)
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

/* The k-th smallest of n values, which are overwritten: Hoare's quickselect. The pivot is the quantile of a sample. */
static double quickselect(double *a, Index n, Index k)
{
    enum { SAMPLE = 32 };
    while (n > SAMPLE) {
        double sample[SAMPLE];
        for (Index i = 0; i < SAMPLE; i++)
            sample[i] = a[i * n / SAMPLE];
        insertion_sort(sample, SAMPLE);
        const double pivot = sample[k * SAMPLE / n];
        const Index below = count_below(a, n, pivot);
        const int is_low = k < below;
        if (!is_low) {
            const Index upto = count_below(a, n, nextafter(pivot, INFINITY));
            if (k < upto)
                return pivot;
            k -= upto;
        }
        Index kept = 0;
        for (Index i = 0; i < n; i++) { /* without branches on values */
            double value = a[i];
            a[kept] = value;
            kept += is_low ? value < pivot : value > pivot;
        }
        n = kept;
    }
    insertion_sort(a, n);
    return a[k];
}

/* 2.5 median - 1.5 mean of the good values; `values` and `copy` are memory for as many. */
double background(const double *plane, const unsigned char *bad, Index size, double *values, double *copy)
{
    Index n = 0;
    for (Index i = 0; bad && i < size; i++) {
        values[n] = plane[i];
        n += !bad[i];
    }
    const double *good = bad ? values : plane;
    n = bad ? n : size;
    memcpy(copy, good, (size_t)n * sizeof(double));
    double median = quickselect(copy, n, (n - 1) / 2);
    if (n % 2 == 0) { /* the mean of the two in the middle */
        memcpy(copy, good, (size_t)n * sizeof(double));
        median = (median + quickselect(copy, n, n / 2)) / 2;
    }
    return 2.5 * median - 1.5 * (dot(good, NULL, n) / (double)n);
}

/* Mark values that cannot be used; return whether there is any. */
HOT int mark_bad(const double *restrict plane, const unsigned char *restrict mask, Index size,
                 unsigned char *restrict bad)
{
    unsigned char any = 0;
    for (Index i = 0; i < size; i++) {
        bad[i] = (mask && mask[i]) | !(fabs(plane[i]) < HUGE_VALUE);
        any |= bad[i];
    }
    return any;
}

/* Take out the pixels of the box that the bad template pixel (y, x) can reach. */
static void leave_out_around(Work *s, Index y, Index x)
{
    const Index reach = s->form.reach;
    Index bottom = y - reach - s->y0, left = x - reach - s->x0, edge = 2 * reach + 1;
    for (Index j = bottom < 0 ? 0 : bottom; j < bottom + edge && j < s->h; j++)
        for (Index i = left < 0 ? 0 : left; i < left + edge && i < s->w; i++)
            s->weight[j * s->w + i] = 0;
}

/* Make 1 / err² in the box, 0 for pixels that leave the fit; return how many stay. */
HOT Index weigh(Work *s, int any_bad_template)
{
    Index count = 0;
    for (Index y = 0; y < s->h; y++) {
        const double *restrict err = s->err + (y + s->y0) * s->nx + s->x0;
        const unsigned char *restrict bad = s->bad_image + (y + s->y0) * s->nx + s->x0;
        double *restrict weight = s->weight + y * s->w;
        for (Index x = 0; x < s->w; x++) {
            int use = (err[x] > 1 / HUGE_VALUE) & (err[x] < HUGE_VALUE) & !bad[x];
            weight[x] = use ? 1 / (err[x] * err[x]) : 0;
        }
    }
    for (Index at = 0; any_bad_template && at < s->ny * s->nx; at++)
        if (s->bad_template[at])
            leave_out_around(s, at / s->nx, at % s->nx);
    for (Index i = 0; i < s->h * s->w; i++)
        count += s->weight[i] > 0;
    return count;
}

/* Return whether the template is constant wherever the fit reads it; mostly one row shows that it is not. */
int is_flat(const Work *s)
{
    const Index reach = s->form.reach;
    double low = INFINITY, high = -INFINITY;
    for (Index y = s->y0 - reach; y < s->y0 + s->h + reach; y++) {
        for (Index x = s->x0 - reach; x < s->x0 + s->w + reach; x++) {
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

enum { UNKNOWN = FILL_LAYERS + 1 };

/* Set a pixel of the template to the mean of those around it that are of lower rings; return whether there was any. */
static int fill_pixel(Work *s, const unsigned char *ring, Index at, int limit)
{
    Index y = at / s->nx, x = at % s->nx, count = 0;
    double total = 0;
    for (Index j = y ? y - 1 : 0; j <= y + 1 && j < s->ny; j++)
        for (Index i = x ? x - 1 : 0; i <= x + 1 && i < s->nx; i++)
            if (ring[j * s->nx + i] < limit) {
                total += s->template[j * s->nx + i];
                count++;
            }
    if (count)
        s->template[at] = total / (double)count;
    return count > 0;
}

/* Fill bad pixels of the template with the mean of the known ones around them, ring by ring, the rest with a value. */
void fill(Work *s, double value)
{
    unsigned char *ring = (unsigned char *)s->scratch; /* 0 for good pixels */
    const Index size = s->ny * s->nx;
    for (Index at = 0; at < size; at++)
        ring[at] = s->bad_template[at] ? UNKNOWN : 0;
    for (int layer = 1; layer <= FILL_LAYERS; layer++)
        for (Index at = 0; at < size; at++)
            if (ring[at] == UNKNOWN && fill_pixel(s, ring, at, layer))
                ring[at] = (unsigned char)layer;
    for (Index at = 0; at < size; at++)
        if (ring[at] == UNKNOWN)
            s->template[at] = value;
}
