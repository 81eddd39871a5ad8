/* Drivers of a layer of multi-head latent attention: everything on either side of the exchange of projected rows. They
   are made of the other drivers, so that their bits are those of the single operations.

   A projected row is the compressed query (or the hidden state), the normalised latent and the rotated key. */
#include <string.h>

#include "ops.h"
#include "pool.h"

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

/* Intermediate results of op_mla_attend, one after the other in the workspace. */
typedef struct {
    float *query, *latent, *attended, *values;
} Stages;

static int reserve_stages(const Mla *m, int64_t num_rows, Stages *s)
{
    const int64_t per_head[] = {m->query_up->num_out / m->num_heads, m->latent_width, m->latent_width,
                                m->value_up->num_out};
    float **const stages[] = {&s->query, &s->latent, &s->attended, &s->values};
    int64_t floats = 0;
    for (int i = 0; i < 4; i++)
        floats += round_up(num_rows * m->num_heads * per_head[i], 16);
    float *at = pool_buffer(1, floats * (int64_t)sizeof(float));
    for (int i = 0; at && i < 4; i++) {
        *stages[i] = at;
        at += round_up(num_rows * m->num_heads * per_head[i], 16);
    }
    return at != NULL;
}

static const char *attend_rows(const Mla *m, const MlaBatch *b, const Stages *s, const float *cache,
                               int64_t num_blocks)
{
    const int64_t head = m->query_up->num_out / m->num_heads, plain = head - rope_width(m);
    const int64_t stride = m->num_heads * head, latent = m->latent_width;
    op_rope(s->query + plain, stride, head, b->num_rows, m->num_heads, rope_width(m), b->cosine, b->sine,
            (int)m->interleave);
    const char *wrong =
        op_heads(m->key_up, m->num_heads, m->key_head_bytes, s->query, stride, head, b->num_rows, s->latent);
    Attention a = {s->latent, s->query + plain, cache, b->tables, b->row_seq, b->positions, s->attended,
                   {m->num_heads * latent, latent}, {stride, head}, b->num_rows, m->num_heads, latent, rope_width(m),
                   num_blocks, b->num_seqs, b->max_blocks, (float)m->scale};
    return wrong ? wrong : op_attention(&a);
}

const char *op_mla_attend(const Mla *m, const MlaBatch *b, const float *rows, float *cache, int64_t num_blocks,
                          float *out)
{
    Stages s;
    const int64_t value_width = m->num_heads * m->value_up->num_out;
    if (!reserve_stages(m, b->num_rows, &s))
        return out_of_memory;
    const char *wrong = write_cache(m, b, rows, cache, num_blocks);
    if (!wrong)
        wrong = op_heads(m->query_up, 1, 0, rows, query_width(m) + key_width(m), 0, b->num_rows, s.query);
    if (!wrong)
        wrong = attend_rows(m, b, &s, cache, num_blocks);
    if (!wrong)
        wrong = op_heads(m->value_up, m->num_heads, m->value_head_bytes, s.attended, m->num_heads * m->latent_width,
                         m->latent_width, b->num_rows, s.values);
    const float *columns = s.values;
    for (int64_t i = 0; !wrong && i < m->num_outputs; i++) {
        const Matrix *output = m->outputs[i];
        wrong = op_heads(output, 1, 0, columns, value_width, 0, b->num_rows, out + i * b->num_rows * output->num_out);
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
