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

/* Tiles of rows of one sequence times groups of heads; where these are too few to keep the threads busy, times the
   segments of their contexts, a range of them at a time. */
typedef struct {
    const Attention *attention;
    const int64_t *first_rows; /* of each tile of rows, and the end */
    int64_t num_tiles, heads_at_once, head_groups, num_segments, num_ranges;
    int64_t tile_parts; /* floats of a tile for each segment */
    float *parts;
} AttentionJob;

#define RANGES 4 /* of segments of one sequence, for each thread */

static AttentionTile tile_of(const AttentionJob *j, int64_t index)
{
    const int64_t tile = index / j->head_groups, head = index % j->head_groups * j->heads_at_once;
    const int64_t left = j->attention->num_heads - head;
    return (AttentionTile){j->first_rows[tile], j->first_rows[tile + 1] - j->first_rows[tile], head,
                           left < j->heads_at_once ? left : j->heads_at_once};
}

static void attention_task(const void *argument, int64_t index, void *scratch)
{
    const AttentionJob *j = argument;
    const AttentionTile t = tile_of(j, index);
    op_table()->attend(j->attention, &t, scratch);
}

static Segments segments_of(const AttentionJob *j, int64_t tile, int64_t first, int64_t stop)
{
    return (Segments){first, stop, j->tile_parts, j->parts + (tile * j->num_segments + first) * j->tile_parts};
}

static void segment_task(const void *argument, int64_t index, void *scratch)
{
    const AttentionJob *j = argument;
    const int64_t tile = index / j->num_ranges, range = index % j->num_ranges;
    const AttentionTile t = tile_of(j, tile);
    const Segments s = segments_of(j, tile, j->num_segments * range / j->num_ranges,
                                   j->num_segments * (range + 1) / j->num_ranges);
    op_table()->attend_segments(j->attention, &t, &s, scratch);
}

static void join_task(const void *argument, int64_t index, void *scratch)
{
    const AttentionJob *j = argument;
    const AttentionTile t = tile_of(j, index);
    const Segments s = segments_of(j, index, 0, j->num_segments);
    (void)scratch;
    op_table()->join_segments(j->attention, &t, &s);
}

/* First row of each tile of at most `most` rows of one sequence, and the end, where wanted; returns how many there are. */
static int64_t cut_rows(const Paging *at, int64_t most, int64_t *first_rows)
{
    int64_t num_tiles = 0;
    for (int64_t t = 0, first = 0; t < at->num_rows; t++) {
        if (t > 0 && at->row_seq[t] == at->row_seq[t - 1] && t - first < most)
            continue;
        first = t;
        if (first_rows)
            first_rows[num_tiles] = t;
        num_tiles++;
    }
    if (first_rows)
        first_rows[num_tiles] = at->num_rows;
    return num_tiles;
}

/* Heads are shared out only where there is nothing else: each group of them reads all keys. `most` gets the rows of a
   tile. */
static AttentionJob plan_attention(const Attention *a, int64_t *most)
{
    AttentionJob j = {.attention = a, .heads_at_once = a->num_heads, .num_segments = 1, .num_ranges = 1};
    const int64_t threads = pool_num_threads();
    int64_t last = 0;
    if (j.heads_at_once > TILE_LINES)
        j.heads_at_once = TILE_LINES;
    *most = TILE_LINES / j.heads_at_once < a->at.num_rows ? TILE_LINES / j.heads_at_once : a->at.num_rows;
    j.num_tiles = cut_rows(&a->at, *most, NULL);
    j.head_groups = (a->num_heads + j.heads_at_once - 1) / j.heads_at_once;
    for (int64_t t = 0; t < a->at.num_rows; t++)
        last = a->at.positions[t] > last ? a->at.positions[t] : last;
    if (threads > 1 && j.num_tiles * j.head_groups < 2 * threads) {
        j.num_segments = last / SEGMENT + 1;
        j.num_ranges = j.num_segments < RANGES * threads ? j.num_segments : RANGES * threads;
    }
    while (j.heads_at_once > 4 && j.num_tiles * j.num_segments * j.head_groups < threads) {
        j.heads_at_once = (j.heads_at_once + 1) / 2;
        j.head_groups = (a->num_heads + j.heads_at_once - 1) / j.heads_at_once;
    }
    j.tile_parts = *most * j.heads_at_once * attend_part_width(a);
    return j;
}

const char *op_attention(const Attention *a)
{
    const char *wrong = check_paging(&a->at);
    if (wrong || a->at.num_rows == 0)
        return wrong;
    int64_t most;
    AttentionJob job = plan_attention(a, &most);
    const int64_t tiles = job.num_tiles * job.head_groups, list = round_up(job.num_tiles + 1, 8);
    const int64_t parts = job.num_segments == 1 ? 0 : tiles * job.num_segments * job.tile_parts;
    int64_t *first_rows = pool_buffer(0, list * (int64_t)sizeof(int64_t) + parts * (int64_t)sizeof(float));
    if (!first_rows || pool_reserve(attend_scratch(a) * (int64_t)sizeof(float)) != 0)
        return out_of_memory;
    cut_rows(&a->at, most, first_rows);
    job.first_rows = first_rows;
    job.parts = (float *)(first_rows + list);
    if (job.num_segments == 1) {
        pool_run(attention_task, &job, tiles, 0);
        return NULL;
    }
    pool_run(segment_task, &job, tiles * job.num_ranges, 0);
    pool_run(join_task, &job, tiles, 1);
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
