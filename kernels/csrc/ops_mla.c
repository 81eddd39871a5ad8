/* Drivers of a layer of multi-head latent attention: everything on either side of the exchange of projected rows. They
   are made of the other drivers, so that their bits are those of the single operations.

   A projected row is the compressed query (or the hidden state), the normalised latent and the rotated key. */
#include <string.h>

#include "ops.h"
#include "pool.h"

#define ABSORBED_ROWS 128 /* at a time, so that the caches hold their queries in latent form and what comes of them */

static int64_t query_width(const Mla *m) { return m->query_up->num_in; }
static int64_t key_width(const Mla *m) { return m->latent_down->num_out; }
static int64_t rope_width(const Mla *m) { return key_width(m) - m->latent_width; }

static void add_bias(float *y, const float *bias, int64_t num_rows, int64_t n)
{
    for (int64_t i = 0; bias && i < num_rows * n; i++)
        y[i] += bias[i % n];
}

typedef struct {
    const Mla *mla;
    const float *query, *keys; /* query: projected down, or the hidden state */
    float *rows;
} Norm;

static void norm_task(const void *argument, int64_t row, void *scratch)
{
    const Norm *n = argument;
    const Mla *m = n->mla;
    const int64_t width = query_width(m), latent = m->latent_width;
    const float *query = n->query + row * width, *key = n->keys + row * key_width(m);
    float *out = n->rows + row * (width + key_width(m));
    (void)scratch;
    if (m->query_down)
        op_table()->rms_norm(query, m->query_norm, out, width, (float)m->eps);
    else
        memcpy(out, query, width * sizeof(float));
    op_table()->rms_norm(key, m->latent_norm, out + width, latent, (float)m->eps);
    memcpy(out + width + latent, key + latent, rope_width(m) * sizeof(float));
}

const char *op_mla_project(const Mla *m, const MlaBatch *b, int64_t first_row, int64_t num_rows, const float *x,
                           float *rows)
{
    const int64_t width = query_width(m) + key_width(m), half = rope_width(m) / 2;
    float *keys = pool_buffer(1, (num_rows * width + 1) * (int64_t)sizeof(float));
    if (!keys)
        return out_of_memory;
    float *query = keys + num_rows * key_width(m);
    if (first_row < 0 || first_row + num_rows > b->num_rows)
        return "the rows lie outside their batch";
    const char *wrong = op_linear(m->latent_down, x, num_rows, keys);
    if (!wrong && m->query_down)
        wrong = op_linear(m->query_down, x, num_rows, query);
    if (wrong)
        return wrong;
    add_bias(keys, m->latent_down_bias, num_rows, key_width(m));
    if (m->query_down)
        add_bias(query, m->query_down_bias, num_rows, query_width(m));
    Norm norm = {m, m->query_down ? query : x, keys, rows};
    pool_run(norm_task, &norm, num_rows, num_rows * width <= (1 << 15));
    return op_rope(rows + width - rope_width(m), width, 0, num_rows, 1, rope_width(m), b->cosine + first_row * half,
                   b->sine + first_row * half, (int)m->interleave);
}

static const char *write_cache(const Mla *m, const MlaBatch *b, const float *rows, float *cache, int64_t num_blocks)
{
    const int64_t keys = key_width(m), width = query_width(m) + keys;
    for (int64_t t = 0; t < b->num_rows; t++) {
        if (b->slots[t] < 0 || b->slots[t] >= num_blocks * KEY_BLOCK)
            return "a slot lies outside the cache";
        memcpy(cache + b->slots[t] * keys, rows + (t + 1) * width - keys, keys * sizeof(float));
    }
    return NULL;
}

/* Rows of one form of attention: queries [num_rows][heads][plain + rope width], and what becomes of them. */
typedef struct {
    float *query, *values;
    const int32_t *row_seq, *positions;
    int64_t num_rows;
} Rows;

/* Intermediate results of op_mla_attend, one after the other in the workspace. `some_*` hold the rows of the absorbed
   form where others lie between them. */
typedef struct {
    float *query, *latent, *attended, *values, *some_query, *some_values;
    int32_t *some_row_seq, *some_positions;
} Stages;

static int64_t query_head(const Mla *m) { return m->query_up->num_out / m->num_heads; }

static int reserve_stages(const Mla *m, const MlaBatch *b, Stages *s)
{
    const int64_t query = m->query_up->num_out, latent = m->num_heads * m->latent_width;
    const int64_t values = m->num_heads * m->value_up->num_out, some = b->expanded_until != NULL;
    const int64_t per_row[] = {query, latent, latent, values, some * query, some * values, some, some};
    const int64_t at_once = b->num_rows < ABSORBED_ROWS ? b->num_rows : ABSORBED_ROWS;
    const int64_t num_rows[] = {b->num_rows, at_once, at_once, b->num_rows, b->num_rows, b->num_rows, b->num_rows,
                                b->num_rows};
    float *stages[8];
    int64_t floats = 0;
    for (int i = 0; i < 8; i++)
        floats += round_up(num_rows[i] * per_row[i], 16);
    float *at = pool_buffer(1, floats * (int64_t)sizeof(float));
    for (int i = 0; at && i < 8; i++) {
        stages[i] = at;
        at += round_up(num_rows[i] * per_row[i], 16);
    }
    if (at)
        *s = (Stages){stages[0], stages[1], stages[2], stages[3], stages[4], stages[5], (int32_t *)stages[6],
                      (int32_t *)stages[7]};
    return at != NULL;
}

/* Rows [start, stop): what lies between the queries and the values is several times as wide as they are. */
static const char *attend_some(const Mla *m, const MlaBatch *b, const Rows *rows, int64_t start, int64_t stop,
                               const Stages *s, const float *cache, int64_t num_blocks)
{
    const int64_t head = query_head(m), plain = head - rope_width(m), stride = m->num_heads * head;
    const int64_t latent = m->latent_width, num_rows = stop - start;
    const float *query = rows->query + start * stride;
    const char *wrong = op_heads(m->key_up, m->num_heads, query, stride, head, num_rows, s->latent);
    Attention a = {{cache, b->tables, rows->row_seq + start, rows->positions + start, num_rows, num_blocks,
                    b->num_seqs, b->max_blocks},
                   s->latent, query + plain, s->attended, {m->num_heads * latent, latent}, {stride, head},
                   m->num_heads, latent, rope_width(m), (float)m->scale};
    if (!wrong)
        wrong = op_attention(&a);
    return wrong ? wrong
                 : op_heads(m->value_up, m->num_heads, s->attended, m->num_heads * latent, latent, num_rows,
                            rows->values + start * m->num_heads * m->value_up->num_out);
}

static const char *attend_absorbed(const Mla *m, const MlaBatch *b, const Rows *rows, const Stages *s,
                                   const float *cache, int64_t num_blocks)
{
    const char *wrong = NULL;
    for (int64_t start = 0; !wrong && start < rows->num_rows; start += ABSORBED_ROWS) {
        const int64_t left = rows->num_rows - start;
        const int64_t stop = start + (left < ABSORBED_ROWS ? left : ABSORBED_ROWS);
        wrong = attend_some(m, b, rows, start, stop, s, cache, num_blocks);
    }
    return wrong;
}

static const char *attend_expanded(const Mla *m, const MlaBatch *b, const Rows *rows, const float *cache,
                                   int64_t num_blocks)
{
    const int64_t head = query_head(m);
    Expanded e = {{cache, b->tables, rows->row_seq, rows->positions, rows->num_rows, num_blocks, b->num_seqs,
                   b->max_blocks},
                  b->expanded_until, m->key_expand, m->value_up, rows->query, rows->values, {m->num_heads * head, head},
                  m->num_heads, rope_width(m), (float)m->scale};
    return op_expanded_attention(&e);
}

/* The rows of the absorbed form alone, in order; `all` themselves where there are no others. */
static Rows absorbed_rows(const Mla *m, const MlaBatch *b, const Rows *all, const Stages *s)
{
    const int64_t width = m->query_up->num_out;
    Rows some = {s->some_query, s->some_values, s->some_row_seq, s->some_positions, 0};
    for (int64_t t = 0; t < all->num_rows; t++) {
        if (all->positions[t] < b->expanded_until[all->row_seq[t]])
            continue;
        memcpy(some.query + some.num_rows * width, all->query + t * width, width * sizeof(float));
        s->some_row_seq[some.num_rows] = all->row_seq[t];
        s->some_positions[some.num_rows++] = all->positions[t];
    }
    return some.num_rows == all->num_rows ? *all : some;
}

static const char *attend_by_form(const Mla *m, const MlaBatch *b, const Rows *all, const Stages *s,
                                  const float *cache, int64_t num_blocks)
{
    const int64_t width = m->num_heads * m->value_up->num_out;
    const char *wrong = attend_expanded(m, b, all, cache, num_blocks);
    if (wrong)
        return wrong;
    const Rows some = absorbed_rows(m, b, all, s);
    wrong = attend_absorbed(m, b, &some, s, cache, num_blocks);
    for (int64_t t = 0, next = 0; next < some.num_rows && some.values != all->values; t++)
        if (all->positions[t] >= b->expanded_until[all->row_seq[t]])
            memcpy(all->values + t * width, some.values + next++ * width, width * sizeof(float));
    return wrong;
}

const char *op_mla_attend(const Mla *m, const MlaBatch *b, const float *rows, float *cache, int64_t num_blocks,
                          float *out)
{
    Stages s;
    const int64_t value_width = m->num_heads * m->value_up->num_out, head = query_head(m);
    if (!reserve_stages(m, b, &s))
        return out_of_memory;
    const char *wrong = write_cache(m, b, rows, cache, num_blocks);
    if (!wrong)
        wrong = op_heads(m->query_up, 1, rows, query_width(m) + key_width(m), 0, b->num_rows, s.query);
    if (wrong)
        return wrong;
    op_rope(s.query + head - rope_width(m), m->num_heads * head, head, b->num_rows, m->num_heads, rope_width(m),
            b->cosine, b->sine, (int)m->interleave);
    const Rows all = {s.query, s.values, b->row_seq, b->positions, b->num_rows};
    wrong = b->expanded_until ? attend_by_form(m, b, &all, &s, cache, num_blocks)
                              : attend_absorbed(m, b, &all, &s, cache, num_blocks);
    const float *columns = s.values;
    for (int64_t i = 0; !wrong && i < m->num_outputs; i++) {
        const Matrix *output = m->outputs[i];
        wrong = op_heads(output, 1, columns, value_width, 0, b->num_rows, out + i * b->num_rows * output->num_out);
        columns += output->num_in;
    }
    return wrong;
}

const char *op_mla(const Mla *m, const MlaBatch *b, const float *x, float *cache, int64_t num_blocks, float *out)
{
    float *rows = pool_buffer(2, (b->num_rows * (query_width(m) + key_width(m)) + 1) * (int64_t)sizeof(float));
    if (!rows)
        return out_of_memory;
    const char *wrong = op_mla_project(m, b, 0, b->num_rows, x, rows);
    return wrong ? wrong : op_mla_attend(m, b, rows, cache, num_blocks, out);
}
