/* The Python module: checks arguments, widens the planes, and fits without the interpreter's lock. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "core.h"

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
            PyErr_SetString(PyExc_ValueError,
                            "wanted contiguous planes of one shape, float32 or float64, and a mask of bytes");
            return 0;
        }
    }
    return 1;
}

/* Pixels of one axis with |x - size / 2 + 0.5| <= inner / 2. */
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

static void run(const Py_buffer views[BUFFERS], double inner, Work *s, Result *result)
{
    s->ny = views[IMAGE].shape[0], s->nx = views[IMAGE].shape[1];
    span(s->ny, inner, &s->y0, &s->h);
    span(s->nx, inner, &s->x0, &s->w);
    s->form.reach = (int)larger(ceil(s->form.max_shift), 1) + 1, s->form.count = 2 * s->form.reach + 1;
    s->form.stride = (s->form.count + LANES - 1) / LANES * LANES;
    s->slab = (s->h + LANES - 1) / LANES, s->stride = s->nx + 2 * s->form.reach;
    void *block;
    if (!allocate(s, &block)) {
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
    Py_buffer views[BUFFERS] = {{0}};
    Work work = {0};
    Result r = {0};
    double inner;
    int width = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOOOdddppO|i", &objects[IMAGE], &objects[TEMPLATE], &objects[ERR], &objects[MASK],
                          &inner, &work.form.max_shift, &work.form.max_scale, &work.fit_bg, &work.normalize,
                          &objects[ADJUSTED], &width))
        return NULL;
    if (!(work.form.max_shift >= 0 && work.form.max_shift <= LARGEST_SHIFT && work.form.max_scale >= 1 &&
          work.form.max_scale <= LARGEST_SCALE && inner >= 0))
        PyErr_SetString(PyExc_ValueError, "max_shift, max_scale or inner is out of range");
    else if (!(work.correlate = choose_correlate(width)))
        PyErr_SetString(PyExc_ValueError, "this machine has no vectors of that width");
    else if (view(objects, views)) {
        Py_BEGIN_ALLOW_THREADS;
        run(views, inner, &work, &r);
        Py_END_ALLOW_THREADS;
        const char *failures[] = {"", "no_signal", "too_few_pixels"};
        if (r.failure == NO_MEMORY)
            PyErr_NoMemory();
        else if (r.failure != FITTED)
            answer = Py_BuildValue("(sn)", failures[r.failure], (Py_ssize_t)r.npix);
        else
            answer = Py_BuildValue("(sn(ddddd)(ddddi(dd)(ddd)d(dd))(dd(ddd)))", "", (Py_ssize_t)r.npix, r.bg, r.offset,
                                   r.tbg, r.chi2_0, r.chi2, r.best.u, r.best.v, r.best.chi2, r.best.scale,
                                   r.best.scale_at_bound, r.best.gu, r.best.gv, r.best.huu, r.best.huv, r.best.hvv,
                                   r.best.square, r.best.scale_u, r.best.scale_v, work.form.weight_sum,
                                   work.form.template_mean, r.template_sums[0], r.template_sums[1], r.template_sums[2]);
    }
    for (int i = 0; i < BUFFERS; i++)
        PyBuffer_Release(&views[i]); /* does nothing for one that there is not */
    return answer;
}

static PyMethodDef methods[] = {
    {"fit", adjust_fit, METH_VARARGS,
     "fit(image, template, err, mask, inner, max_shift, max_scale, fit_bg, normalize, adjusted)\n--\n\n"
     "The arguments of adjust.fit_of, or why there is no fit, and the pixels; fills `adjusted`."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_adjust", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__adjust(void) { return PyModuleDef_Init(&module); }
