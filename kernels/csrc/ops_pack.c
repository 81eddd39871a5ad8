/* Reading of weights, packing into panels, and what benchmarks need to know about the memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ops.h"
#include "pool.h"

#define VECTOR 16 /* bytes; a tile of 16 / element_bytes columns and as many k is transposed in registers */

typedef struct {
    const uint8_t *source;
    uint8_t *panels;
    int64_t row_bytes, num_out, num_in, element_bytes, panel_stride;
    int interleave, refuse_nan;
    _Atomic int *found_nan;
} Pack;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__(a)){__VA_ARGS__})
#endif

/* Transposes n vectors of n elements: log2(n) times the first half is interleaved with the second. */
#define DEFINE_TRANSPOSE(bytes, type, low, high)                                                      \
    typedef type Vector##bytes __attribute__((vector_size(VECTOR), aligned(1), may_alias));           \
    static void transpose##bytes(const uint8_t *const *from, uint8_t *to, int64_t stride)             \
    {                                                                                                 \
        enum { n = VECTOR / bytes };                                                                  \
        Vector##bytes v[n], w[n];                                                                     \
        for (int i = 0; i < n; i++)                                                                   \
            v[i] = *(const Vector##bytes *)from[i];                                                   \
        for (int step = 1; step < n; step *= 2) {                                                     \
            for (int i = 0; i < n / 2; i++) {                                                         \
                w[2 * i] = SHUFFLE(v[i], v[i + n / 2], low);                                          \
                w[2 * i + 1] = SHUFFLE(v[i], v[i + n / 2], high);                                     \
            }                                                                                         \
            for (int i = 0; i < n; i++)                                                               \
                v[i] = w[i];                                                                          \
        }                                                                                             \
        for (int i = 0; i < n; i++)                                                                   \
            *(Vector##bytes *)(to + i * stride) = v[i];                                               \
    }
#define PAIRS(...) __VA_ARGS__
DEFINE_TRANSPOSE(4, uint32_t, PAIRS(0, 4, 1, 5), PAIRS(2, 6, 3, 7))
DEFINE_TRANSPOSE(2, uint16_t, PAIRS(0, 8, 1, 9, 2, 10, 3, 11), PAIRS(4, 12, 5, 13, 6, 14, 7, 15))
DEFINE_TRANSPOSE(1, uint8_t, PAIRS(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                 PAIRS(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))

static void transpose(int64_t element_bytes, const uint8_t *const *from, uint8_t *to, int64_t stride)
{
    if (element_bytes == 4)
        transpose4(from, to, stride);
    else if (element_bytes == 2)
        transpose2(from, to, stride);
    else
        transpose1(from, to, stride);
}

static int has_nan(const uint8_t *fp8, int64_t n)
{
    int found = 0;
    for (int64_t i = 0; i < n; i++)
        found |= (fp8[i] & 0x7F) == 0x7F;
    return found;
}

/* Column of the weight at each place of a panel row; see Matrix. */
static int64_t column_at(const Pack *p, int place) { return p->interleave ? place / 2 + place % 2 * 16 : place; }

/* One tile of k, all 32 places; what lies past the last k is read from padded copies and not kept. */
static void pack_tile(const Pack *p, const uint8_t *const *columns, int64_t k, uint8_t *target)
{
    const int64_t size = p->element_bytes, n = VECTOR / size, left = p->num_in - k, stride = PANEL * size;
    uint8_t padded[VECTOR][VECTOR] = {{0}}, whole[VECTOR * PANEL];
    for (int64_t place = 0; place < PANEL; place += n) {
        const uint8_t *from[VECTOR];
        for (int64_t i = 0; i < n; i++) {
            from[i] = columns[place + i] + k * size;
            if (left < n)
                from[i] = memcpy(padded[i], from[i], left * size);
        }
        transpose(size, from, (left < n ? whole : target) + place * size, stride);
    }
    if (left < n)
        memcpy(target, whole, left * stride);
}

static void pack_task(const void *argument, int64_t panel, void *scratch)
{
    const Pack *p = argument;
    const int64_t row = p->num_in * p->element_bytes, n = VECTOR / p->element_bytes;
    const uint8_t *columns[PANEL];
    uint8_t *target = p->panels + panel * p->panel_stride, *zeros = scratch;
    memset(zeros, 0, row);
    for (int place = 0; place < PANEL; place++) {
        const int64_t column = panel * PANEL + column_at(p, place);
        columns[place] = column < p->num_out ? p->source + column * p->row_bytes : zeros;
        if (p->refuse_nan && has_nan(columns[place], row))
            atomic_store(p->found_nan, 1);
    }
    for (int64_t k = 0; k < p->num_in; k += n)
        pack_tile(p, columns, k, target + k * PANEL * p->element_bytes);
}

const char *op_pack(const void *source, int64_t row_bytes, int64_t num_out, int64_t num_in, int64_t element_bytes,
                    int interleave, int refuse_nan, void *panels, int64_t panel_stride)
{
    _Atomic int found_nan = 0;
    Pack p = {source, panels, row_bytes, num_out, num_in, element_bytes, panel_stride, interleave, refuse_nan,
              &found_nan};
    if (pool_reserve(num_in * element_bytes) != 0)
        return out_of_memory;
    pool_run(pack_task, &p, (num_out + PANEL - 1) / PANEL, num_out * num_in < (1 << 15));
    return found_nan ? "the fp8 weight contains NaN" : NULL;
}

typedef struct {
    const Quantize *q;
    _Atomic int *found_infinite;
} QuantizeJob;

#define QUANTIZE_ROWS 16 /* rows of one task */

static void quantize_task(const void *argument, int64_t index, void *scratch)
{
    const QuantizeJob *job = argument;
    const int64_t stop = (index + 1) * QUANTIZE_ROWS;
    (void)scratch;
    for (int64_t row = index * QUANTIZE_ROWS; row < (stop < job->q->num_rows ? stop : job->q->num_rows); row++)
        if (!op_table()->quantize(job->q, row))
            atomic_store(job->found_infinite, 1);
}

const char *op_quantize(const Quantize *q)
{
    _Atomic int found_infinite = 0;
    QuantizeJob job = {q, &found_infinite};
    pool_run(quantize_task, &job, (q->num_rows + QUANTIZE_ROWS - 1) / QUANTIZE_ROWS,
             q->num_rows * q->num_in < (1 << 15));
    return found_infinite ? "the weight to quantize contains NaN or infinity" : NULL;
}

void op_advise_huge_pages(void *start, int64_t bytes)
{
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + bytes) / page * page;
    if (last > first)
        madvise((void *)first, last - first, MADV_HUGEPAGE); /* advice: a refusal costs nothing but speed */
#else
    (void)start;
    (void)bytes;
#endif
}

typedef struct {
    int file;
    int64_t offset, bytes;
    uint8_t *target;
    _Atomic int64_t *done;
    _Atomic int *error;
} FileRead;

#define FILE_PIECE (1 << 17) /* bytes of one task */

static void file_task(const void *argument, int64_t index, void *scratch)
{
    const FileRead *r = argument;
    const int64_t end = (index + 1) * FILE_PIECE, stop = end < r->bytes ? end : r->bytes;
    (void)scratch;
    for (int64_t at = index * FILE_PIECE; at < stop;) {
        const ssize_t got = pread(r->file, r->target + at, stop - at, r->offset + at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            atomic_store(r->error, errno);
        if (got <= 0)
            return;
        atomic_fetch_add(r->done, got);
        at += got;
    }
}

int64_t op_read_file(int file, int64_t offset, int64_t bytes, void *target)
{
    _Atomic int64_t done = 0;
    _Atomic int error = 0;
    FileRead r = {file, offset, bytes, target, &done, &error};
    pool_run(file_task, &r, (bytes + FILE_PIECE - 1) / FILE_PIECE, 0);
    return error ? -error : done;
}

#define PRIME 0x9E3779B185EBCA87u
#define SUM_WORDS (1 << 14) /* of one task */
#define SUM_LANES 8

typedef struct {
    const uint8_t *start;
    int64_t bytes;
    uint64_t *sums;
} Checksum;

static uint64_t power(uint64_t exponent)
{
    uint64_t result = 1, base = PRIME;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1)
            result *= base;
    return result;
}

static uint64_t word_at(const uint8_t *at, int64_t bytes)
{
    uint64_t word = 0;
    memcpy(&word, at, bytes);
    return word;
}

/* Vectors of SSE2 multiply 64 bits in six steps, which takes longer than one multiplication after the other. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
static void checksum_task(const void *argument, int64_t block, void *scratch)
{
    const Checksum *c = argument;
    const uint64_t stride = power(SUM_LANES);
    const int64_t begin = block * SUM_WORDS * 8, whole = (block + 1) * SUM_WORDS * 8;
    const int64_t end = whole < c->bytes ? whole : c->bytes;
    uint64_t lane[SUM_LANES] = {0}, sum = 0;
    int64_t at = begin;
    (void)scratch;
    for (; at + SUM_LANES * 8 <= end; at += SUM_LANES * 8)
        for (int i = 0; i < SUM_LANES; i++)
            lane[i] = lane[i] * stride + word_at(c->start + at + i * 8, 8);
    for (int i = 0; i < SUM_LANES; i++)
        sum = sum * PRIME + lane[i];
    for (; at < end; at += 8)
        sum = sum * PRIME + word_at(c->start + at, end - at < 8 ? end - at : 8);
    c->sums[block] = sum;
}

const char *op_checksum(const void *start, int64_t bytes, uint64_t *result)
{
    const int64_t blocks = (bytes + SUM_WORDS * 8 - 1) / (SUM_WORDS * 8);
    Checksum c = {start, bytes, pool_buffer(0, (blocks + 1) * 8)};
    if (!c.sums)
        return out_of_memory;
    pool_run(checksum_task, &c, blocks, 0);
    *result = 0;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t left = bytes - block * SUM_WORDS * 8;
        *result = *result * power(left < SUM_WORDS * 8 ? (left + 7) / 8 : SUM_WORDS) + c.sums[block];
    }
    *result = *result * PRIME + (uint64_t)bytes;
    return NULL;
}

static int64_t load_one(FileWeight *w)
{
    const int64_t bytes = w->num_out * w->num_in * w->element_bytes;
    void *buffer = pool_buffer(1, bytes);
    if (!buffer)
        return FILE_NO_MEMORY;
    const int64_t done = op_read_file((int)w->file, w->offset, bytes, buffer);
    if (done < bytes)
        return done < 0 ? -done : FILE_ENDS_EARLY;
    if (op_checksum(buffer, bytes, &w->checksum))
        return FILE_NO_MEMORY;
    const char *wrong = op_pack(buffer, w->num_in * w->element_bytes, w->num_out, w->num_in, w->element_bytes,
                                (int)w->interleave, (int)w->refuse_nan, w->panels, w->panel_stride);
    return !wrong ? 0 : wrong == out_of_memory ? FILE_NO_MEMORY : FILE_HAS_NAN;
}

void op_load(FileWeight *weights, int64_t num_weights)
{
    for (int64_t i = 0; i < num_weights; i++)
        weights[i].outcome = load_one(&weights[i]);
}

typedef struct {
    const uint64_t *start;
    int64_t words;
    _Atomic uint64_t *sum;
} Read;

#define READ_WORDS (1 << 14)

static void read_task(const void *argument, int64_t block, void *scratch)
{
    const Read *r = argument;
    const int64_t stop = (block + 1) * READ_WORDS;
    uint64_t a[32] = {0}, sum = 0;
    (void)scratch;
    for (int64_t i = block * READ_WORDS; i + 32 <= (stop < r->words ? stop : r->words); i += 32) {
        for (int j = 0; j < 32; j += 8)
            __builtin_prefetch(r->start + i + j + 256);
        for (int j = 0; j < 32; j++)
            a[j] += r->start[i + j];
    }
    for (int j = 0; j < 32; j++)
        sum += a[j];
    atomic_fetch_add(r->sum, sum);
}

uint64_t op_read_all(const void *start, int64_t bytes)
{
    _Atomic uint64_t sum = 0;
    Read r = {start, bytes / 8, &sum};
    pool_run(read_task, &r, (r.words + READ_WORDS - 1) / READ_WORDS, 0);
    return sum;
}
