/* The drivers of a whole stack of layers, for a rank that needs nobody's help with them, and of what comes before and
   after: embedding and laying out rows, the head and sampling. They are made of the other drivers, so that their bits
   are those of the single operations. */
#include <string.h>

#include "ops.h"
#include "pool.h"

/* Results between the operations of a layer, one after the other in the workspace; all layers use the same. */
typedef struct {
    float *normed, *added, *shared, *weights; /* three [rows][hidden], then [rows][top k] */
    int32_t *ids;
} Stages;

static int reserve_stages(const Stack *s, int64_t num_rows, Stages *stages)
{
    int64_t top_k = 0;
    for (int64_t i = 0; i < s->num_layers; i++)
        if (s->layers[i].experts && s->layers[i].top_k > top_k)
            top_k = s->layers[i].top_k;
    const int64_t row = round_up(num_rows * s->hidden, 16), choices = round_up(num_rows * top_k, 16);
    float *at = pool_buffer(3, (3 * row + choices) * (int64_t)sizeof(float) + choices * (int64_t)sizeof(int32_t));
    if (!at)
        return 0;
    *stages = (Stages){at, at + row, at + 2 * row, at + 3 * row, (int32_t *)(at + 3 * row + choices)};
    return 1;
}

static const char *attend(const Stack *s, const Layer *l, const MlaBatch *b, const Stages *stages)
{
    const char *wrong = op_mla(l->attention, b, stages->normed, l->cache, s->num_blocks, stages->added);
    for (int64_t i = 0; !wrong && l->output_bias && i < b->num_rows * s->hidden; i++)
        stages->added[i] += l->output_bias[i % s->hidden];
    return wrong;
}

static const char *whole_ffn(const Experts *ffn, const float *x, int64_t num_rows, float *y)
{
    const Slots all = {.num_slots = num_rows, .top_k = 1};
    return op_grouped_ffn(ffn, x, num_rows, &all, y);
}

static const char *feed_forward(const Layer *l, int64_t num_rows, const Stages *stages)
{
    if (!l->experts)
        return whole_ffn(l->ffn, stages->normed, num_rows, stages->added);
    Route route = {NULL, l->gate_bias, stages->ids, stages->weights, num_rows, l->num_experts, l->num_groups,
                   l->topk_groups, l->top_k, l->softmax, l->method, l->normalize, (float)l->scale};
    const Slots slots = {NULL, stages->ids, l->place_of, num_rows * l->top_k, l->top_k, l->num_experts};
    const char *wrong = op_gate(l->gate, stages->normed, &route, l->counts);
    if (!wrong && l->ffn)
        wrong = whole_ffn(l->ffn, stages->normed, num_rows, stages->shared);
    return wrong ? wrong
                 : op_moe(l->experts, stages->normed, num_rows, &slots, stages->weights,
                          l->ffn ? stages->shared : NULL, stages->added);
}

static void raise_to(int64_t *most, int64_t value) { *most = value > *most ? value : *most; }

const char *op_reserve_layers(const Stack *s, int64_t num_rows)
{
    int64_t floats[BUFFER_LEVELS] = {0};
    for (const Layer *l = s->layers; l < s->layers + s->num_layers; l++) {
        const Mla *m = l->attention;
        const int64_t queries = m->query_up->num_out, values = m->num_heads * m->value_up->num_out;
        const Experts *ffn = l->experts ? l->experts : l->ffn;
        const int64_t slots = num_rows * (l->experts ? l->top_k : 1);
        raise_to(&floats[0], slots * (ffn->up.num_out + 1));
        raise_to(&floats[1], num_rows * (queries + values));
        raise_to(&floats[1], l->experts ? slots * s->hidden : 0);
        raise_to(&floats[2], num_rows * (m->query_up->num_in + m->latent_down->num_out));
        raise_to(&floats[3], num_rows * (3 * s->hidden + 2 * l->top_k));
    }
    for (int level = 0; level < BUFFER_LEVELS; level++) {
        void *buffer = pool_buffer(level, floats[level] * (int64_t)sizeof(float));
        if (!buffer)
            return out_of_memory;
        memset(buffer, 0, floats[level] * sizeof(float));
    }
    return NULL;
}

const char *op_layers(const Stack *s, const MlaBatch *b, const int32_t *ids, float *x)
{
    Stages stages;
    if (b->num_rows == 0)
        return NULL;
    if (!reserve_stages(s, b->num_rows, &stages))
        return out_of_memory;
    const char *wrong = op_embed(s->embedding, s->kind, s->num_ids, s->hidden, ids, b->num_rows, x);
    for (const Layer *l = s->layers; !wrong && l < s->layers + s->num_layers; l++) {
        const float eps = (float)s->eps;
        wrong = l == s->layers
                    ? op_rms_norm(x, l->input_norm, stages.normed, b->num_rows, s->hidden, eps)
                    : op_add_rms_norm(x, stages.added, l->input_norm, stages.normed, b->num_rows, s->hidden, eps);
        if (!wrong)
            wrong = attend(s, l, b, &stages);
        if (!wrong)
            wrong = op_add_rms_norm(x, stages.added, l->ffn_norm, stages.normed, b->num_rows, s->hidden, eps);
        if (!wrong)
            wrong = feed_forward(l, b->num_rows, &stages);
    }
    const float *const sum[] = {x, stages.added};
    return wrong ? wrong : op_tree_add(sum, 2, x, b->num_rows * s->hidden);
}

const char *op_normed_linear(const Matrix *m, const float *x, const int64_t *index, int64_t num_index, int64_t num_rows,
                             const float *weight, float eps, float *y)
{
    const int64_t n = m->num_in;
    float *rows = pool_buffer(1, (2 * num_index * n + 1) * (int64_t)sizeof(float)), *normed = rows + num_index * n;
    if (!rows)
        return out_of_memory;
    for (int64_t i = 0; i < num_index; i++) {
        if (index[i] < 0 || index[i] >= num_rows)
            return "index points outside the rows of x";
        memcpy(rows + i * n, x + index[i] * n, n * sizeof(float));
    }
    const char *wrong = op_rms_norm(rows, weight, normed, num_index, n, eps);
    return wrong ? wrong : op_linear(m, normed, num_index, y);
}

const char *op_sample_rows(const Matrix *m, const float *x, const int64_t *index, int64_t num_index, int64_t num_rows,
                           const float *weight, float eps, float *logits, const Draw *draws, int64_t num_draws,
                           int64_t *tokens)
{
    const char *wrong = op_normed_linear(m, x, index, num_index, num_rows, weight, eps, logits);
    return wrong ? wrong : op_sample(logits, draws, tokens, num_draws, m->num_out);
}

const char *op_embed(const uint8_t *table, int64_t kind, int64_t num_ids, int64_t n, const int32_t *ids, int64_t num_rows,
                     float *x)
{
    const int64_t row_bytes = n * (kind == KIND_F32 ? 4 : 2);
    for (int64_t row = 0; row < num_rows; row++) {
        if (ids[row] < 0 || ids[row] >= num_ids)
            return "a token lies outside the vocabulary";
        op_table()->widen(kind, table + ids[row] * row_bytes, x + row * n, n);
    }
    return NULL;
}

/* The tables lie behind the struct that points at them, in the order of kernels/layout.py. */
const char *op_lay_out(const Layout *l, MlaBatch *b)
{
    int64_t *slots = (int64_t *)(b + 1), row = 0;
    int32_t *positions = (int32_t *)(slots + l->num_rows), *row_seq = positions + l->num_rows;
    int32_t *tables = row_seq + l->num_rows, *until = tables + l->num_spans * l->max_blocks;
    float *cosine = (float *)(until + l->num_spans), *sine = cosine + l->num_rows * l->half;
    const int64_t bytes = l->half * (int64_t)sizeof(float);
    const int32_t *span = l->spans;
    *b = (MlaBatch){positions, cosine, sine, slots, row_seq, tables, l->expands ? until : NULL, l->num_rows,
                    l->num_spans, l->max_blocks};
    for (int32_t i = 0; i < l->num_spans; i++, span += 4 + span[3]) {
        const int64_t stop = (int64_t)span[0] + span[1], num_blocks = span[3];
        const int32_t *blocks = span + 4;
        if (span[0] < 0 || stop > l->num_positions || stop > num_blocks * KEY_BLOCK)
            return "a position lies outside its block table, or beyond the angles";
        until[i] = span[2];
        for (int64_t at = 0; at < l->max_blocks; at++)
            tables[i * l->max_blocks + at] = at < num_blocks ? blocks[at] : 0;
        for (int64_t position = span[0]; position < stop; position++, row++) {
            positions[row] = (int32_t)position;
            row_seq[row] = i;
            slots[row] = (int64_t)blocks[position / KEY_BLOCK] * KEY_BLOCK + position % KEY_BLOCK;
            memcpy(cosine + row * l->half, l->cosine + position * l->half, bytes);
            memcpy(sine + row * l->half, l->sine + position * l->half, bytes);
        }
    }
    return NULL;
}
