/* Drivers of what is done row by row, and of routing. */
#define _GNU_SOURCE
#include <string.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops.h"
#include "pool.h"

#define SMALL_WORK (1 << 15) /* elements not worth waking a worker for */

const char out_of_memory[] = "out of memory for kernel scratch";

static const KernelTable *table;

#if defined(HAVE_AMX)
/* Whether the processor multiplies bfloat16 on tiles and the system lets this process use them; once it does, all its
   threads may. */
static int has_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, TILE = 1 << 24, BF16 = 1 << 22 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & BF16))
        return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static const KernelTable *variant(const char *isa)
{
#if defined(HAVE_AMX)
    if (strcmp(isa, "amx") == 0 && variant("avx512") && has_tiles())
        return &kernels_amx;
#endif
#if defined(__x86_64__)
    if (strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("f16c"))
        return &kernels_avx512;
    if (strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return &kernels_avx2;
    if (strcmp(isa, "generic") == 0 && __builtin_cpu_supports("fma"))
        return &kernels_generic;
#elif defined(HAVE_GENERIC)
    if (strcmp(isa, "generic") == 0)
        return &kernels_generic;
#endif
    return NULL;
}

const char *op_select(const char *isa)
{
    static const char *const names[] = {"amx", "avx512", "avx2", "generic"};
    const KernelTable *found = isa ? variant(isa) : NULL;
    for (int i = 0; !isa && !found && i < 4; i++)
        found = variant(names[i]);
    if (!found)
        return "this processor does not run that instruction set";
    table = found;
    return NULL;
}

const KernelTable *op_table(void) { return table; }

typedef struct {
    const float *x, *weight;
    float *y, *sum; /* sum: x, to be changed */
    int64_t n;
    float eps;
} Rows;

static void rms_norm_task(const void *argument, int64_t row, void *scratch)
{
    const Rows *r = argument;
    (void)scratch;
    table->rms_norm(r->x + row * r->n, r->weight, r->y + row * r->n, r->n, r->eps);
}

static void add_rms_norm_task(const void *argument, int64_t row, void *scratch)
{
    const Rows *r = argument;
    float *sum = r->sum + row * r->n;
    (void)scratch;
    for (int64_t i = 0; i < r->n; i++)
        sum[i] += r->x[row * r->n + i];
    table->rms_norm(sum, r->weight, r->y + row * r->n, r->n, r->eps);
}

static const char *run_rows(PoolTask task, const Rows *r, int64_t num_rows)
{
    pool_run(task, r, num_rows, num_rows * r->n <= SMALL_WORK);
    return NULL;
}

const char *op_rms_norm(const float *x, const float *weight, float *y, int64_t num_rows, int64_t n, float eps)
{
    return run_rows(rms_norm_task, &(Rows){.x = x, .weight = weight, .y = y, .n = n, .eps = eps}, num_rows);
}

const char *op_add_rms_norm(float *x, const float *y, const float *weight, float *out, int64_t num_rows, int64_t n,
                            float eps)
{
    Rows r = {.x = y, .weight = weight, .y = out, .sum = x, .n = n, .eps = eps};
    return run_rows(add_rms_norm_task, &r, num_rows);
}

typedef struct {
    float *x;
    const float *cosine, *sine;
    int64_t row_stride, head_stride, num_heads, half;
    int interleave;
} Rope;

static void rope_task(const void *argument, int64_t row, void *scratch)
{
    const Rope *r = argument;
    const float *cosine = r->cosine + row * r->half, *sine = r->sine + row * r->half;
    (void)scratch;
    for (int64_t head = 0; head < r->num_heads; head++)
        table->rope(r->x + row * r->row_stride + head * r->head_stride, r->half, cosine, sine, r->interleave);
}

const char *op_rope(float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows, int64_t num_heads,
                    int64_t width, const float *cosine, const float *sine, int interleave)
{
    const Rope r = {x, cosine, sine, row_stride, head_stride, num_heads, width / 2, interleave};
    pool_run(rope_task, &r, num_rows, num_rows * num_heads * width <= SMALL_WORK);
    return NULL;
}

static void route_task(const void *argument, int64_t row, void *scratch) { table->route(argument, row, scratch); }

const char *op_route(const Route *r)
{
    if (pool_reserve(route_scratch(r->num_experts) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    pool_run(route_task, r, r->num_rows, r->num_rows * r->num_experts * (r->top_k + 4) <= SMALL_WORK);
    return NULL;
}

typedef struct {
    const float *rows, *weights, *base;
    const int32_t *slots;
    float *y;
    int64_t top_k, n;
} Combine;

static void combine_task(const void *argument, int64_t row, void *scratch)
{
    const Combine *c = argument;
    const int64_t at = row * c->top_k;
    int32_t *in_order = scratch; /* without slots */
    for (int64_t k = 0; !c->slots && k < c->top_k; k++)
        in_order[k] = (int32_t)k;
    table->combine(c->slots ? c->rows : c->rows + at * c->n, c->slots ? c->slots + at : in_order, c->weights + at,
                   c->top_k, c->base ? c->base + row * c->n : NULL, c->y + row * c->n, c->n);
}

const char *op_combine(const float *rows, int64_t num_slots, const int32_t *slots, const float *weights,
                       const float *base, float *y, int64_t num_rows, int64_t top_k, int64_t n)
{
    for (int64_t i = 0; slots && i < num_rows * top_k; i++)
        if (slots[i] < 0 || slots[i] >= num_slots)
            return "slot_index points outside the answered rows";
    if (pool_reserve(top_k * (int64_t)sizeof(int32_t)) != 0)
        return out_of_memory;
    Combine c = {rows, weights, base, slots, y, top_k, n};
    pool_run(combine_task, &c, num_rows, num_rows * top_k * n <= SMALL_WORK);
    return NULL;
}

typedef struct {
    const float *const *parts;
    float *y;
    int64_t num_parts, n;
} TreeAdd;

static void tree_add_task(const void *argument, int64_t block, void *scratch)
{
    const TreeAdd *t = argument;
    const int64_t start = block * SMALL_WORK, stop = start + SMALL_WORK;
    (void)scratch;
    table->tree_add(t->parts, t->num_parts, t->y, start, stop < t->n ? stop : t->n);
}

const char *op_tree_add(const float *const *parts, int64_t num_parts, float *y, int64_t n)
{
    TreeAdd t = {parts, y, num_parts, n};
    pool_run(tree_add_task, &t, (n + SMALL_WORK - 1) / SMALL_WORK, 0);
    return NULL;
}
