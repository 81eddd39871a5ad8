/* Drivers of attention over the paged latent cache, in both forms. */
#include "ops.h"
#include "pool.h"

static const char *check_paging(const Paging *at)
{
    int64_t checked = 0; /* blocks of the table of the row before */
    for (int64_t t = 0; t < at->num_rows; t++) {
        if (at->row_seq[t] < 0 || at->row_seq[t] >= at->num_seqs)
            return "row_seq names a sequence without a block table";
        if (at->positions[t] < 0 || at->positions[t] / KEY_BLOCK >= at->max_blocks)
            return "a position lies outside its block table";
        const int32_t *blocks = at->tables + at->row_seq[t] * at->max_blocks;
        if (t == 0 || at->row_seq[t] != at->row_seq[t - 1])
            checked = 0;
        for (; checked <= at->positions[t] / KEY_BLOCK; checked++)
            if (blocks[checked] < 0 || blocks[checked] >= at->num_blocks)
                return "a block table names a block outside the cache";
    }
    return NULL;
}

#define TILE_LINES 64 /* (row, head) pairs that go through the keys together */

typedef struct {
    const Attention *attention;
    const int64_t *first_rows; /* of each tile, and the end */
    int64_t heads_at_once, head_groups;
} AttentionJob;

static void attention_task(const void *argument, int64_t index, void *scratch)
{
    const AttentionJob *j = argument;
    const int64_t tile = index / j->head_groups, group = index % j->head_groups, heads = j->attention->num_heads;
    const int64_t head = group * j->heads_at_once, left = heads - head;
    const AttentionTile t = {j->first_rows[tile], j->first_rows[tile + 1] - j->first_rows[tile], head,
                             left < j->heads_at_once ? left : j->heads_at_once};
    op_table()->attend(j->attention, &t, scratch);
}

static int64_t cut_rows(const Paging *at, int64_t most, int64_t *first_rows)
{
    int64_t num_tiles = 0;
    for (int64_t t = 0; t < at->num_rows; t++)
        if (t == 0 || at->row_seq[t] != at->row_seq[t - 1] || t - first_rows[num_tiles - 1] >= most)
            first_rows[num_tiles++] = t;
    first_rows[num_tiles] = at->num_rows;
    return num_tiles;
}

const char *op_attention(const Attention *a)
{
    const char *wrong = check_paging(&a->at);
    if (wrong || a->at.num_rows == 0)
        return wrong;
    int64_t *first_rows = pool_buffer(0, (a->at.num_rows + 1) * (int64_t)sizeof(int64_t));
    int64_t heads = a->num_heads < TILE_LINES ? a->num_heads : TILE_LINES;
    if (!first_rows || pool_reserve(attend_scratch(a, TILE_LINES) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    const int64_t num_tiles = cut_rows(&a->at, TILE_LINES / heads, first_rows);
    while (heads > 4 && num_tiles * ((a->num_heads + heads - 1) / heads) < pool_num_threads())
        heads = (heads + 1) / 2;
    AttentionJob job = {a, first_rows, heads, (a->num_heads + heads - 1) / heads};
    pool_run(attention_task, &job, num_tiles * job.head_groups, 0);
    return NULL;
}

#define FEWEST_QUERIES 64 /* for which a task expands the context once more, to keep further threads busy */

typedef struct {
    const Expanded *expanded;
    const int64_t *runs; /* first row and end of each run of rows of one sequence */
    int64_t parts;       /* tasks of one head of a run */
} ExpandedJob;

static void expanded_task(const void *argument, int64_t index, void *scratch)
{
    const ExpandedJob *j = argument;
    const int64_t part = index % j->parts, unit = index / j->parts;
    const int64_t run = unit / j->expanded->num_heads, first = j->runs[2 * run], rows = j->runs[2 * run + 1] - first;
    const int64_t start = rows * part / j->parts, stop = rows * (part + 1) / j->parts;
    const AttentionTile t = {first + start, stop - start, unit % j->expanded->num_heads, 1};
    if (stop > start)
        op_table()->attend_expanded(j->expanded, &t, scratch);
}

/* Runs of neighbouring rows of one sequence that take the expanded form; `longest` gets the rows of the longest. */
static int64_t find_runs(const Expanded *e, int64_t *runs, int64_t *longest)
{
    const Paging *at = &e->at;
    int64_t num_runs = 0;
    *longest = 0;
    for (int64_t t = 0; t < at->num_rows; t++) {
        if (e->until && at->positions[t] >= e->until[at->row_seq[t]])
            continue;
        if (num_runs == 0 || runs[2 * num_runs - 1] != t || at->row_seq[t] != at->row_seq[t - 1])
            runs[2 * num_runs++] = t;
        runs[2 * num_runs - 1] = t + 1;
        const int64_t rows = t + 1 - runs[2 * num_runs - 2];
        *longest = rows > *longest ? rows : *longest;
    }
    return num_runs;
}

const char *op_expanded_attention(const Expanded *e)
{
    const char *wrong = check_paging(&e->at);
    int64_t longest, *runs = pool_buffer(0, (2 * e->at.num_rows + 1) * (int64_t)sizeof(int64_t));
    if (wrong || !runs)
        return wrong ? wrong : out_of_memory;
    const int64_t units = find_runs(e, runs, &longest) * e->num_heads;
    int64_t parts = 1;
    while (units * parts < 2 * pool_num_threads() && longest / (2 * parts) >= FEWEST_QUERIES)
        parts *= 2;
    if (pool_reserve(expanded_scratch(e, (longest + parts - 1) / parts) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    ExpandedJob job = {e, runs, parts};
    pool_run(expanded_task, &job, units * parts, 0);
    return NULL;
}
