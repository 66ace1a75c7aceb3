/* Correlation of weights with a plane, WIDTH doubles at a time. form.c includes this once for each width of vectors;
 * WIDTH is defined there, and TARGET, the attribute of the instructions. */
#define JOIN(name, n) name##_##n
#define NAME(name, n) JOIN(name, n)
#define Vector NAME(Vector, WIDTH)
typedef double Vector __attribute__((vector_size(8 * WIDTH), may_alias));

/* out[k] += sum over y and x of weight[y][x] plane[y][x + k], for nk <= 7: the sums stay in registers. Vectors narrower
 * than the lanes take several turns; the sums are the same to the last bit. */
TARGET static inline __attribute__((always_inline)) void NAME(line, WIDTH)(const int nk, const double *weight,
                                                                           Index wide, const double *plane,
                                                                           Index stride, Index rows, Index width,
                                                                           double *out)
{
    double lanes[7][LANES];
    for (int lane = 0; lane < LANES; lane += WIDTH) {
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

/* out[j][k] += sum over y and x of weight[y][x] plane[y + j][x + k] for all j < nj and k < nk; interleaved planes,
 * whose strides count groups of lanes. */
TARGET static void NAME(correlate, WIDTH)(const double *weight, Index wide, const double *plane, Index stride,
                                          Index rows, Index width, int nj, int nk, double *out, Index out_stride)
{
    for (int j = 0; j < nj; j++)
        for (int k = 0, count; k < nk; k += count) {
            const double *p = plane + (j * stride + k) * LANES;
            double *o = out + j * out_stride + k;
            count = nk - k > 10 ? 7 : nk - k > 7 ? (nk - k) / 2 : nk - k;
#pragma GCC unroll 6
            for (int n = 2; n <= 7; n++) /* unrolled: the compiler makes one of each */
                if (n == count)
                    NAME(line, WIDTH)(n, weight, wide, p, stride, rows, width, o);
        }
}

#undef Vector
#undef NAME
#undef JOIN
#undef TARGET
#undef WIDTH
