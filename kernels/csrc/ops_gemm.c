/* Drivers of the matrix products. */
#include <string.h>

#include "ops.h"
#include "pool.h"

#define SMALL_WORK (1 << 16) /* multiply-adds (and, by the same number, weights) not worth waking a worker for */
#define MOST_PANELS 8        /* panels of one task; */
#define MOST_PAIR_PANELS 16  /* more for pairs, as each task cuts its rows into their parts */
#define STREAMED (1 << 22)   /* numbers of a result that no cache keeps until they are read */
#define TASKS_PER_THREAD 4   /* where there are as many panels */

static int64_t most_panels(const Matrix *m) { return m->kind == KIND_PAIRS ? MOST_PAIR_PANELS : MOST_PANELS; }

static int is_small(int64_t num_rows, int64_t num_weights) { return num_rows * num_weights <= SMALL_WORK; }

/* Panels of one task: enough that rows are written in long pieces and that few tasks are claimed, as long as there
   are tasks for all threads. */
static int64_t panels_at_once(int64_t num_panels, int64_t num_units, int64_t most)
{
    const int64_t fair = num_panels * num_units / (TASKS_PER_THREAD * pool_num_threads());
    const int64_t at_once = fair < 1 ? 1 : fair < most ? fair : most;
    return at_once < num_panels ? at_once : num_panels;
}

/* Group `index` of panels, at_once each. */
static Panels group_of(const Matrix *m, int64_t num_matrices, int64_t index, int64_t at_once)
{
    const int64_t left = (m->num_out + PANEL - 1) / PANEL - index * at_once;
    return (Panels){m, num_matrices, index * at_once, left < at_once ? left : at_once, 0};
}

static int64_t num_groups(const Matrix *m, int64_t at_once)
{
    return ((m->num_out + PANEL - 1) / PANEL + at_once - 1) / at_once;
}

/* One product per head, with matrix[head]; a plain linear layer is the case of one head. */
typedef struct {
    const Matrix *matrix;
    const float *x;
    float *y;
    int64_t num_heads, row_stride, head_stride, num_rows, at_once, num_groups, num_chunks;
} Product;

static void product_task(const void *argument, int64_t index, void *scratch)
{
    const Product *p = argument;
    const int64_t chunk = index % p->num_chunks, unit = index / p->num_chunks;
    const int64_t group = unit % p->num_groups, head = unit / p->num_groups;
    const int64_t start = p->num_rows * chunk / p->num_chunks, stop = p->num_rows * (chunk + 1) / p->num_chunks;
    const float *rows[ROW_CHUNK];
    float *out[ROW_CHUNK];
    const Matrix *m = p->matrix + head;
    const Panels panels = group_of(m, 1, group, p->at_once);
    for (int64_t r = start; r < stop; r++) {
        rows[r - start] = p->x + r * p->row_stride + head * p->head_stride;
        out[r - start] = p->y + (r * p->num_heads + head) * m->num_out + panels.first * PANEL;
    }
    op_table()->panel_gemm(&panels, rows, stop - start, out, scratch);
}

const char *op_heads(const Matrix *m, int64_t num_heads, const float *x, int64_t row_stride, int64_t head_stride,
                     int64_t num_rows, float *y)
{
    if (num_rows == 0)
        return NULL;
    Product p = {m, x, y, num_heads, row_stride, head_stride, num_rows,
                 .num_chunks = (num_rows + ROW_CHUNK - 1) / ROW_CHUNK};
    p.at_once = panels_at_once((m->num_out + PANEL - 1) / PANEL, num_heads * p.num_chunks, most_panels(m));
    p.num_groups = num_groups(m, p.at_once);
    const Panels panels = group_of(m, 1, 0, p.at_once);
    const int64_t most_rows = num_rows < ROW_CHUNK ? num_rows : ROW_CHUNK;
    if (pool_reserve(gemm_scratch(&panels, most_rows) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    pool_run(product_task, &p, num_heads * p.num_groups * p.num_chunks,
             is_small(num_rows, num_heads * m->num_out * m->num_in));
    return NULL;
}

const char *op_linear(const Matrix *m, const float *x, int64_t num_rows, float *y)
{
    return op_heads(m, 1, x, m->num_in, 0, num_rows, y);
}

/* Both halves of the grouped FFN, over slots sorted by expert. starts[i] is the first (chunk of slots) of the i-th
   expert that has slots. */
typedef struct {
    const Experts *experts;
    const Slots *slots;
    const float *x;
    float *middle, *y;
    int64_t *offsets, *busy, *starts; /* [E + 1], [E], [E + 1] */
    int32_t *order;                   /* [S] slot at each place of the sorted order */
    int64_t at_once, num_groups, num_busy, width;
} Ffn;

typedef struct {
    int64_t expert, group, first, count; /* places [first, first + count) */
} FfnTask;

static FfnTask locate(const Ffn *f, int64_t index)
{
    int64_t low = 0, high = f->num_busy;
    while (high - low > 1) { /* tasks of an expert lie together: its groups of panels, and within one its chunks */
        int64_t middle = (low + high) / 2;
        if (f->starts[middle] * f->num_groups <= index)
            low = middle;
        else
            high = middle;
    }
    const int64_t expert = f->busy[low], chunks = f->starts[low + 1] - f->starts[low];
    const int64_t within = index - f->starts[low] * f->num_groups, chunk = within % chunks;
    const int64_t slots = f->offsets[expert + 1] - f->offsets[expert];
    const int64_t start = slots * chunk / chunks, stop = slots * (chunk + 1) / chunks;
    return (FfnTask){expert, within / chunks, f->offsets[expert] + start, stop - start};
}

static Matrix of_expert(const Experts *e, const Matrix *m, int64_t expert)
{
    Matrix mine = *m;
    mine.panels += expert * e->data_stride;
    mine.scales += expert * e->scale_stride;
    return mine;
}

static int64_t row_of(const Slots *s, int64_t slot) { return s->slot_rows ? s->slot_rows[slot] : slot / s->top_k; }

static void up_task(const void *argument, int64_t index, void *scratch)
{
    const Ffn *f = argument;
    const FfnTask t = locate(f, index);
    const float *rows[ROW_CHUNK];
    float *out[ROW_CHUNK];
    const Matrix both[] = {of_expert(f->experts, &f->experts->gate, t.expert),
                           of_expert(f->experts, &f->experts->up, t.expert)};
    const Panels panels = group_of(both, 2, t.group, f->at_once);
    for (int64_t i = 0; i < t.count; i++) {
        rows[i] = f->x + row_of(f->slots, f->order[t.first + i]) * both->num_in;
        out[i] = f->middle + (t.first + i) * f->width + panels.first * PANEL;
    }
    op_table()->panel_gemm(&panels, rows, t.count, out, scratch);
}

static void down_task(const void *argument, int64_t index, void *scratch)
{
    const Ffn *f = argument;
    const FfnTask t = locate(f, index);
    const float *rows[ROW_CHUNK];
    float *out[ROW_CHUNK];
    const Matrix down = of_expert(f->experts, &f->experts->down, t.expert);
    Panels panels = group_of(&down, 1, t.group, f->at_once);
    panels.stream = f->slots->num_slots * down.num_out >= STREAMED;
    for (int64_t i = 0; i < t.count; i++) {
        rows[i] = f->middle + (t.first + i) * f->width;
        out[i] = f->y + f->order[t.first + i] * down.num_out + panels.first * PANEL;
    }
    op_table()->panel_gemm(&panels, rows, t.count, out, scratch);
}

/* Sorts the slots by expert, keeping their order within one; lists the experts that have any. */
static const char *sort_slots(Ffn *f, int64_t num_x_rows)
{
    const Slots *s = f->slots;
    const int64_t num_experts = f->experts->num_experts;
    int64_t *next = f->starts; /* until the order is known */
    memset(f->offsets, 0, (num_experts + 1) * sizeof(int64_t));
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < s->num_slots; i++) {
            int64_t expert = s->experts ? s->experts[i] : 0;
            if (s->place_of)
                expert = expert >= 0 && expert < s->num_places ? s->place_of[expert] : -1;
            if (expert < 0 || expert >= num_experts)
                return "a slot names an expert that is not here";
            if (row_of(s, i) < 0 || row_of(s, i) >= num_x_rows)
                return "slot_rows points outside the rows of x";
            if (pass == 0)
                f->offsets[expert + 1]++;
            else
                f->order[next[expert]++] = (int32_t)i;
        }
        for (int64_t e = 0; pass == 0 && e < num_experts; e++) {
            next[e] = f->offsets[e];
            f->offsets[e + 1] += f->offsets[e];
        }
    }
    return NULL;
}

static void list_busy(Ffn *f)
{
    f->num_busy = 0;
    f->starts[0] = 0;
    for (int64_t e = 0; e < f->experts->num_experts; e++) {
        const int64_t slots = f->offsets[e + 1] - f->offsets[e];
        if (slots == 0)
            continue;
        f->busy[f->num_busy] = e;
        f->starts[f->num_busy + 1] = f->starts[f->num_busy] + (slots + ROW_CHUNK - 1) / ROW_CHUNK;
        f->num_busy++;
    }
}

const char *op_grouped_ffn(const Experts *e, const float *x, int64_t num_x_rows, const Slots *slots, float *y)
{
    const int64_t width = round_up(e->up.num_out, PANEL), hidden = e->down.num_out, num_slots = slots->num_slots;
    const int64_t middle_bytes = round_up(num_slots * width * (int64_t)sizeof(float), 64);
    const int64_t most_rows = num_slots < ROW_CHUNK ? num_slots : ROW_CHUNK;
    const Panels ups = {&e->gate, 2, 0, most_panels(&e->gate) / 2, 0};
    const Panels downs = {&e->down, 1, 0, most_panels(&e->down), 0};
    const int64_t up_scratch = gemm_scratch(&ups, most_rows), down_scratch = gemm_scratch(&downs, most_rows);
    const int64_t lists = (3 * e->num_experts + 2) * (int64_t)sizeof(int64_t) + num_slots * (int64_t)sizeof(int32_t);
    char *buffer = pool_buffer(0, middle_bytes + lists);
    if (!buffer || pool_reserve((up_scratch > down_scratch ? up_scratch : down_scratch) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    Ffn f = {.experts = e, .slots = slots, .x = x, .middle = (float *)buffer, .y = y, .width = width};
    f.offsets = (int64_t *)(buffer + middle_bytes);
    f.busy = f.offsets + e->num_experts + 1;
    f.starts = f.busy + e->num_experts;
    f.order = (int32_t *)(f.starts + e->num_experts + 1);
    const char *wrong = sort_slots(&f, num_x_rows);
    if (wrong || num_slots == 0)
        return wrong;
    list_busy(&f);
    const int64_t chunks = f.starts[f.num_busy];
    const int alone = is_small(num_slots, 3 * width * hidden);
    f.at_once = panels_at_once(width / PANEL, chunks, most_panels(&e->gate) / 2);
    f.num_groups = num_groups(&e->up, f.at_once);
    pool_run(up_task, &f, chunks * f.num_groups, alone);
    f.at_once = panels_at_once((hidden + PANEL - 1) / PANEL, chunks, most_panels(&e->down));
    f.num_groups = num_groups(&e->down, f.at_once);
    pool_run(down_task, &f, chunks * f.num_groups, alone);
    return NULL;
}

const char *op_moe(const Experts *e, const float *x, int64_t num_rows, const Slots *slots, const float *weights,
                   const float *base, float *y)
{
    const int64_t hidden = e->down.num_out;
    float *answers = pool_buffer(1, (slots->num_slots * hidden + 1) * (int64_t)sizeof(float));
    if (!answers)
        return out_of_memory;
    const char *wrong = op_grouped_ffn(e, x, num_rows, slots, answers);
    return wrong ? wrong
                 : op_combine(answers, slots->num_slots, NULL, weights, base, y, num_rows, slots->top_k, hidden);
}

const char *op_gate(const Matrix *weight, const float *x, Route *r, int64_t *counts)
{
    float *logits = pool_buffer(1, (r->num_rows * r->num_experts + 1) * (int64_t)sizeof(float));
    if (!logits)
        return out_of_memory;
    const char *wrong = op_linear(weight, x, r->num_rows, logits);
    r->logits = logits;
    if (!wrong)
        wrong = op_route(r);
    for (int64_t i = 0; !wrong && counts && i < r->num_rows * r->top_k; i++)
        counts[r->ids[i]]++;
    return wrong;
}
