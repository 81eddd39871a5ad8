/* Products of the arithmetic bf16x3, over pairs (KIND_PAIRS). An activation is the sum of three bfloat16 numbers: its
   upper 8 significant bits, the next 8, and the rest. Each part is multiplied with the bfloat16 weights, exactly, and
   added up as TDPBF16PS does it (Intel SDM, volume 2): of PAIR_STEP k the even ones and the odd ones in a chain of fused
   multiply-adds each, from zero; then the sum of both chains is added to the result. Subnormal numbers are zero in all
   of this. A step adds the upper part first, then the middle one, then the lower. NaN and infinities give NaN: infinity
   less itself is among their parts. */

/* Parts of a slice of the rows: [block][step][3][block_rows][PAIR_STEP], bfloat16 for tiles, else float32 in blocks of
   one row. */
typedef struct {
    void *parts;
    int64_t num_steps, block_rows, num_blocks;
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
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t column = 0; column < PANEL; column += VL) {
            float *place = t->acc + r * t->acc_stride + column;
            vf value = load(place);
            for (int64_t i = 0; i < t->num_waiting; i++) {
                place -= t->slot;
                value = load(place) + value;
            }
            store(place, value);
        }
}

/* One column of panels times a slice [k, stop) of the rows. */
static void pair_column(const Panels *p, int64_t column, const PairRows *rows, int64_t k, int64_t stop, float *acc,
                        int64_t num_rows)
{
    const int64_t num_columns = p->count * p->num_matrices;
    for (Stretch s = {.end = k}; s.end < stop && next_stretch(p->matrices, stop - s.end, &s);) {
        Tile t = tile_of(p, column, &s, rows->num_blocks * rows->block_rows, acc);
        t.ahead = t.weights + PREFETCH_BYTES;
        if (num_rows > 2 * TILE_ROWS && column + 1 < num_columns)
            t.ahead = tile_of(p, column + 1, &s, num_rows, acc).weights;
#if defined(HAVE_TILES)
        if (ON_TILES(num_rows))
            add_on_tiles(&t, rows, (s.k - k) / PAIR_STEP);
#endif
        if (!ON_TILES(num_rows))
            add_rows(&t, rows, (s.k - k) / PAIR_STEP);
        if (t.num_waiting)
            join_waiting(&t, num_rows);
    }
}

static void pairs_gemm(const Panels *p, const float *const *rows, int64_t num_rows, float *acc)
{
    const int64_t num_in = p->matrices->num_in, slice = pair_slice(num_rows), padded = pair_rows(num_rows);
    PairRows r = {.num_blocks = ON_TILES(num_rows) ? pair_blocks(num_rows) : padded};
    r.block_rows = padded / r.num_blocks;
    r.parts = (void *)round_up((int64_t)(acc + gemm_sums(p, num_rows)), 64);
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
        for (int64_t column = 0; column < p->count * p->num_matrices; column++)
            pair_column(p, column, &r, k, stop, acc, num_rows);
    }
#if defined(HAVE_TILES)
    if (ON_TILES(num_rows))
        close_tiles();
#endif
}
