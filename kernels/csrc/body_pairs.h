/* Products of the arithmetic bf16x3, over pairs (KIND_PAIRS). An activation is the sum of three bfloat16 numbers: its
   upper 8 significant bits, the next 8, and the rest. Each part is multiplied with the bfloat16 weights, exactly, and
   added up as TDPBF16PS does it (Intel SDM, volume 2): of PAIR_STEP k the even ones and the odd ones in a chain of fused
   multiply-adds each, from zero; then the sum of both chains is added to the result. Subnormal numbers are zero in all
   of this. A step adds the upper part first, then the middle one, then the lower. NaN and infinities give NaN: infinity
   less itself is among their parts. */

/* Parts of a slice of the rows: [block][step][3][block_rows][PAIR_STEP], bfloat16 for tiles, else float32 in blocks of
   one row. A cell is what is summed at a time: two blocks on tiles, or the only one; else all rows. */
typedef struct {
    void *parts;
    int64_t num_steps, block_rows, num_blocks, cell_rows, num_cells;
} PairRows;

#include "pairs_fma.h"
#if defined(HAVE_TILES)
#include "pairs_tiles.h"
#define ON_TILES(num_rows) ((num_rows) > 1) /* one waits for memory, which vectors read more evenly */
#else
#define ON_TILES(num_rows) 0
#endif

/* Rows beyond the last are those of the last again: blocks are of one size, and nobody looks at what comes of them. */
#define DEFINE_SPLIT_ROWS(NAME, TYPE, SPLIT_STEP)                                                           \
    static void NAME(const PairRows *r, const float *const *rows, int64_t num_rows, int64_t k)              \
    {                                                                                                       \
        TYPE *to = r->parts;                                                                                \
        for (int64_t first = 0; first < r->num_blocks * r->block_rows; first += r->block_rows)              \
            for (int64_t step = 0; step < r->num_steps; step++, to += 3 * r->block_rows * PAIR_STEP)        \
                for (int64_t i = 0; i < r->block_rows; i++) {                                               \
                    const float *x = rows[first + i < num_rows ? first + i : num_rows - 1];                 \
                    SPLIT_STEP(x + k + step * PAIR_STEP, to + i * PAIR_STEP, r->block_rows * PAIR_STEP);    \
                }                                                                                           \
    }
DEFINE_SPLIT_ROWS(split_rows, float, split_step)
#if defined(HAVE_TILES)
DEFINE_SPLIT_ROWS(split_rows_for_tiles, uint16_t, split_step_for_tiles)
#endif

/* The sums of whole shards that wait before this one are added to it. */
static void join_waiting(const Tile *t, int64_t num_rows)
{
    for (int64_t i = 0; i < num_rows * PANEL; i += VL) {
        float *place = t->acc + i;
        vf value = load(place);
        for (int64_t level = 0; level < t->num_waiting; level++) {
            place -= t->slot;
            value = load(place) + value;
        }
        store(place, value);
    }
}

/* One cell times a slice [k, stop) of a panel; sums: [level][cell_rows][PANEL]. It fetches its portion of what lies
   `ahead` bytes further on. */
static void add_to_cell(const PairRows *r, int64_t cell, const Matrix *m, int64_t panel, int64_t ahead, int64_t k,
                        int64_t stop, float *sums)
{
    for (Stretch s = {.end = k}; s.end < stop && next_stretch(m, stop - s.end, &s);) {
        Tile t = {.count = s.end - s.k, .acc_stride = PANEL, .first = (int)s.first, .num_waiting = s.num_waiting,
                  .slot = r->cell_rows * PANEL};
        t.acc = sums + s.depth * t.slot;
        t.weights = m->panels + panel * m->panel_stride + s.k * weight_step(KIND_PAIRS);
        t.ahead = t.weights + ahead;
#if defined(HAVE_TILES)
        if (ON_TILES(r->cell_rows))
            add_on_tiles(&t, r, cell, (s.k - k) / PAIR_STEP);
#endif
        if (!ON_TILES(r->cell_rows))
            add_rows(&t, r, (s.k - k) / PAIR_STEP);
        if (t.num_waiting)
            join_waiting(&t, r->cell_rows);
    }
}

static PairRows open_pairs(const Panels *p, int64_t num_rows, float *scratch)
{
    PairRows r = {.num_blocks = pair_blocks(num_rows), .num_cells = 1, .cell_rows = pair_rows(num_rows)};
    if (!ON_TILES(num_rows))
        r.num_blocks = r.cell_rows;
    r.block_rows = r.cell_rows / r.num_blocks;
    if (ON_TILES(num_rows) && r.num_blocks > 2) {
        r.num_cells = r.num_blocks / 2;
        r.cell_rows = 2 * r.block_rows;
    }
    r.parts = (void *)round_up((int64_t)(scratch + gemm_sums(p, num_rows)), 64);
    return r;
}

/* The rows of a cell's sums of panel j to where they belong. */
static void put_cell(const Panels *p, const PairRows *r, int64_t j, int64_t cell, int64_t num_rows, const float *sums,
                     float *const *out)
{
    const int64_t first = cell * r->cell_rows, left = num_rows - first, count = left < r->cell_rows ? left : r->cell_rows;
    const float *second = sums + num_levels(p->matrices) * r->cell_rows * PANEL;
    for (int64_t row = 0; row < count; row++)
        put_columns(p, j, sums + row * PANEL, second + row * PANEL, out[first + row]);
}

/* One slice [k, stop) of all cells. On tiles, where K is not cut in slices, each cell is put away at once and the next
   has its place; else they are kept apart. */
static void pairs_slice(const Panels *p, const PairRows *r, int64_t k, int64_t stop, int64_t num_rows, float *const *out,
                        float *scratch)
{
    const int64_t num_in = p->matrices->num_in, sums = num_levels(p->matrices) * r->cell_rows * PANEL;
    const int64_t num_cells = p->count * r->num_cells, ahead = r->num_cells > 1 ? 2 * PREFETCH_BYTES : PREFETCH_BYTES;
    const int apart = k > 0 || stop < num_in || !ON_TILES(num_rows);
    for (int64_t i = 0; i < num_cells; i++) {
        float *at = scratch + (apart ? i * p->num_matrices * sums : 0);
        for (const Matrix *m = p->matrices; m < p->matrices + p->num_matrices; m++)
            add_to_cell(r, i % r->num_cells, m, p->first + i / r->num_cells, ahead, k, stop,
                        at + (m - p->matrices) * sums);
        if (!apart)
            put_cell(p, r, i / r->num_cells, i % r->num_cells, num_rows, at, out);
    }
    for (int64_t i = 0; apart && stop == num_in && i < num_cells; i++)
        put_cell(p, r, i / r->num_cells, i % r->num_cells, num_rows, scratch + i * p->num_matrices * sums, out);
}

static void pairs_gemm(const Panels *p, const float *const *rows, int64_t num_rows, float *const *out, float *scratch)
{
    const int64_t num_in = p->matrices->num_in, slice = pair_slice(num_rows);
    PairRows r = open_pairs(p, num_rows, scratch);
#if defined(HAVE_TILES)
    if (ON_TILES(num_rows))
        open_tiles(r.block_rows);
#endif
    for (int64_t k = 0; k < num_in; k += slice) {
        const int64_t stop = k + slice < num_in ? k + slice : num_in;
        r.num_steps = (stop - k) / PAIR_STEP;
#if defined(HAVE_TILES)
        if (ON_TILES(num_rows))
            split_rows_for_tiles(&r, rows, num_rows, k);
#endif
        if (!ON_TILES(num_rows))
            split_rows(&r, rows, num_rows, k);
        pairs_slice(p, &r, k, stop, num_rows, out, scratch);
    }
#if defined(HAVE_TILES)
    if (ON_TILES(num_rows))
        close_tiles();
#endif
}
