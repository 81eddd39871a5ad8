/* The Python module kernels._native. Addresses come in as integers from the Python side, which has checked shapes and
   dtypes; every operation releases the GIL and raises ValueError with what the driver found wrong. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>

#include <stdatomic.h>
#include <time.h>

#include "ops.h"
#include "pool.h"

#define MAX_ARGUMENTS 24

typedef union {
    int64_t i;
    void *p;
    double f;
} Value;

/* kinds: one letter per argument, i integer, p address, f float */
static int parse(PyObject *const *args, Py_ssize_t num_args, const char *kinds, Value *values)
{
    if (num_args != (Py_ssize_t)strlen(kinds)) {
        PyErr_Format(PyExc_TypeError, "%zd arguments given, %zd expected", num_args, (Py_ssize_t)strlen(kinds));
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_args; i++) {
        if (kinds[i] == 'f')
            values[i].f = PyFloat_AsDouble(args[i]);
        else
            values[i].i = PyLong_AsLongLong(args[i]);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static PyObject *answer(const char *wrong)
{
    if (!wrong)
        Py_RETURN_NONE;
    PyErr_SetString(wrong == out_of_memory ? PyExc_MemoryError : PyExc_ValueError, wrong);
    return NULL;
}

static _Atomic int64_t nanoseconds; /* spent in operations since the process began */

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* A Python function whose arguments v[0..] are of `kinds` and whose work is `call`. */
#define OPERATION(name, kinds, call)                                                            \
    static PyObject *py_##name(PyObject *module, PyObject *const *args, Py_ssize_t num_args)    \
    {                                                                                           \
        Value v[MAX_ARGUMENTS];                                                                 \
        const char *wrong;                                                                      \
        (void)module;                                                                           \
        if (parse(args, num_args, kinds, v) != 0)                                               \
            return NULL;                                                                        \
        Py_BEGIN_ALLOW_THREADS                                                                  \
        pool_enter();                                                                           \
        const int64_t start = now();                                                            \
        wrong = call;                                                                           \
        atomic_fetch_add(&nanoseconds, now() - start);                                          \
        pool_leave();                                                                           \
        Py_END_ALLOW_THREADS                                                                    \
        return answer(wrong);                                                                   \
    }

static const char *run_route(const Value *v)
{
    Route r = {v[0].p, v[1].p, v[2].p, v[3].p, v[4].i, v[5].i, v[6].i, v[7].i, v[8].i, v[9].i, v[10].i, v[11].i,
               (float)v[12].f};
    return op_route(&r);
}

static const char *run_attention(const Value *v)
{
    Attention a = {{v[2].p, v[3].p, v[4].p, v[5].p, v[11].i, v[15].i, v[16].i, v[17].i}, v[0].p, v[1].p, v[6].p,
                   {v[7].i, v[8].i}, {v[9].i, v[10].i}, v[12].i, v[13].i, v[14].i, (float)v[18].f};
    return op_attention(&a);
}

static const char *run_expanded_attention(const Value *v)
{
    Expanded e = {{v[3].p, v[4].p, v[5].p, v[6].p, v[10].i, v[13].i, v[14].i, v[15].i}, NULL, v[1].p, v[2].p,
                  v[0].p, v[7].p, {v[8].i, v[9].i}, v[11].i, v[12].i, (float)v[16].f};
    return op_expanded_attention(&e);
}

static const char *run_gate(const Value *v)
{
    Route r = {NULL, v[2].p, v[3].p, v[4].p, v[6].i, v[7].i, v[8].i, v[9].i, v[10].i, v[11].i, v[12].i, v[13].i,
               (float)v[14].f};
    return op_gate(v[0].p, v[1].p, &r, v[5].p);
}

static const char *run_grouped_ffn(const Value *v)
{
    Slots slots = {v[3].p, v[4].p, v[5].p, v[7].i, 1, v[6].i};
    return op_grouped_ffn(v[0].p, v[1].p, v[2].i, &slots, v[8].p);
}

static const char *run_score(const Value *v)
{
    Scoring s = {v[0].p, v[1].p, v[2].p, v[4].i, v[5].i, v[6].p, v[7].p, v[8].p, v[9].p};
    return op_score(&s, v[3].i);
}

static const char *run_lay_out(const Value *v)
{
    Layout l = {v[0].p, v[1].i, v[2].i, v[3].i, v[4].i, v[5].p, v[6].p, v[7].i, v[8].i};
    return op_lay_out(&l, v[9].p);
}

static const char *run_quantize(const Value *v)
{
    Quantize q = {v[0].p, v[1].i, v[2].i, v[3].i, v[4].i, v[5].i, v[6].p, v[7].p};
    return op_quantize(&q);
}

OPERATION(linear, "ppip", op_linear(v[0].p, v[1].p, v[2].i, v[3].p))
OPERATION(heads, "pipiiip", op_heads(v[0].p, v[1].i, v[2].p, v[3].i, v[4].i, v[5].i, v[6].p))
OPERATION(grouped_ffn, "ppipppiip", run_grouped_ffn(v))
OPERATION(rms_norm, "pppiif", op_rms_norm(v[0].p, v[1].p, v[2].p, v[3].i, v[4].i, (float)v[5].f))
OPERATION(add_rms_norm, "ppppiif", op_add_rms_norm(v[0].p, v[1].p, v[2].p, v[3].p, v[4].i, v[5].i, (float)v[6].f))
OPERATION(sample, "pppii", op_sample(v[0].p, v[1].p, v[2].p, v[3].i, v[4].i))
OPERATION(score, "pppiiipppp", run_score(v))
OPERATION(normed_linear, "pppiipfp",
          op_normed_linear(v[0].p, v[1].p, v[2].p, v[3].i, v[4].i, v[5].p, (float)v[6].f, v[7].p))
OPERATION(sample_rows, "pppiipfppip",
          op_sample_rows(v[0].p, v[1].p, v[2].p, v[3].i, v[4].i, v[5].p, (float)v[6].f, v[7].p, v[8].p, v[9].i,
                         v[10].p))
OPERATION(rope, "piiiiippi",
          op_rope(v[0].p, v[1].i, v[2].i, v[3].i, v[4].i, v[5].i, v[6].p, v[7].p, (int)v[8].i))
OPERATION(route, "ppppiiiiiiiif", run_route(v))
OPERATION(gate, "ppppppiiiiiiiif", run_gate(v))
OPERATION(plan_slots, "piipiipp", op_plan_slots(v[0].p, v[1].i, v[2].i, v[3].p, v[4].i, v[5].i, v[6].p, v[7].p))
OPERATION(combine, "pippppiii",
          op_combine(v[0].p, v[1].i, v[2].p, v[3].p, v[4].p, v[5].p, v[6].i, v[7].i, v[8].i))
OPERATION(tree_add, "pipi", op_tree_add(v[0].p, v[1].i, v[2].p, v[3].i))
OPERATION(attention, "pppppppiiiiiiiiiiif", run_attention(v))
OPERATION(expanded_attention, "ppppppppiiiiiiiif", run_expanded_attention(v))
OPERATION(mla_project, "ppiipp", op_mla_project(v[0].p, v[1].p, v[2].i, v[3].i, v[4].p, v[5].p))
OPERATION(mla_attend, "ppppip", op_mla_attend(v[0].p, v[1].p, v[2].p, v[3].p, v[4].i, v[5].p))
OPERATION(lay_out, "piiiippiip", run_lay_out(v))
OPERATION(embed, "piiipip", op_embed(v[0].p, v[1].i, v[2].i, v[3].i, v[4].p, v[5].i, v[6].p))
OPERATION(reserve_layers, "pi", op_reserve_layers(v[0].p, v[1].i))
OPERATION(layers, "pppp", op_layers(v[0].p, v[1].p, v[2].p, v[3].p))
OPERATION(mla, "ppppip", op_mla(v[0].p, v[1].p, v[2].p, v[3].p, v[4].i, v[5].p))
OPERATION(pack, "piiiiiipi",
          op_pack(v[0].p, v[1].i, v[2].i, v[3].i, v[4].i, (int)v[5].i, (int)v[6].i, v[7].p, v[8].i))
OPERATION(quantize, "piiiiipp", run_quantize(v))
OPERATION(advise_huge_pages, "pi", (op_advise_huge_pages(v[0].p, v[1].i), (const char *)NULL))
OPERATION(load, "pi", (op_load(v[0].p, v[1].i), (const char *)NULL))
OPERATION(checksum, "pip", op_checksum(v[0].p, v[1].i, v[2].p))
OPERATION(read_all, "pip", (*(uint64_t *)v[2].p = op_read_all(v[0].p, v[1].i), (const char *)NULL))

/* Raises OSError, and EOFError where the file ends too early. */
static PyObject *py_read_file(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    Value v[MAX_ARGUMENTS];
    int64_t done;
    (void)module;
    if (parse(args, num_args, "iiip", v) != 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    pool_enter();
    done = op_read_file((int)v[0].i, v[1].i, v[2].i, v[3].p);
    pool_leave();
    Py_END_ALLOW_THREADS
    if (done < 0) {
        errno = (int)-done;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (done < v[2].i)
        return PyErr_Format(PyExc_EOFError, "%lld of %lld bytes are there", (long long)done, (long long)v[2].i);
    Py_RETURN_NONE;
}

static PyObject *py_select(PyObject *module, PyObject *name)
{
    const char *isa = name == Py_None ? NULL : PyUnicode_AsUTF8(name);
    (void)module;
    if (!isa && name != Py_None)
        return NULL;
    pool_enter();
    const char *wrong = op_select(isa);
    pool_leave();
    return answer(wrong);
}

static PyObject *py_isa(PyObject *module, PyObject *none)
{
    (void)module;
    (void)none;
    return PyUnicode_FromString(op_table() ? op_table()->name : "");
}

static PyObject *py_set_num_threads(PyObject *module, PyObject *number)
{
    const long n = PyLong_AsLong(number);
    (void)module;
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 1 || n > MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "num_threads is %ld; give 1 to %d", n, MAX_THREADS);
    Py_BEGIN_ALLOW_THREADS
    pool_set_num_threads((int)n);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_work_aside(PyObject *module, PyObject *on)
{
    const int truth = PyObject_IsTrue(on);
    (void)module;
    if (truth < 0)
        return NULL;
    pool_work_aside(truth);
    Py_RETURN_NONE;
}

static PyObject *py_num_threads(PyObject *module, PyObject *none)
{
    (void)module;
    (void)none;
    return PyLong_FromLong(pool_num_threads());
}

static PyObject *py_nanoseconds(PyObject *module, PyObject *none)
{
    (void)module;
    (void)none;
    return PyLong_FromLongLong(atomic_load(&nanoseconds));
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(linear), FAST(heads), FAST(grouped_ffn), FAST(rms_norm), FAST(add_rms_norm), FAST(sample),
    FAST(score), FAST(normed_linear), FAST(sample_rows), FAST(rope), FAST(route), FAST(gate),
    FAST(plan_slots), FAST(combine), FAST(tree_add), FAST(attention), FAST(expanded_attention), FAST(mla_project),
    FAST(mla_attend), FAST(mla), FAST(lay_out), FAST(embed), FAST(layers), FAST(reserve_layers),
    FAST(pack), FAST(quantize), FAST(read_file), FAST(advise_huge_pages), FAST(read_all), FAST(checksum), FAST(load),
    {"select", py_select, METH_O, NULL}, {"isa", py_isa, METH_NOARGS, NULL},
    {"set_num_threads", py_set_num_threads, METH_O, NULL}, {"num_threads", py_num_threads, METH_NOARGS, NULL},
    {"work_aside", py_work_aside, METH_O, NULL},
    {"nanoseconds", py_nanoseconds, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels._native", NULL, -1, methods,
                                        NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    op_select(NULL); /* no variant: isa() is empty and the Python side stays with its reference */
    return PyModule_Create(&definition);
}
