/* Matrix products over panels. Each output element is one chain of fused multiply-adds over k in ascending order,
   whatever the number of rows, so a row's result does not depend on its company. */

#define SLICE 512           /* k per pass over many rows: so much of a panel stays in the L1 or L2 cache */
#define PREFETCH_BYTES 2048

typedef struct {
    const float *const *rows;
    int64_t k, count; /* first k and how many */
    const uint8_t *weights; /* at k */
    float *acc;
    int64_t acc_stride;
    int first; /* start from zero rather than from acc */
    const float *scale;
    int64_t scale_width;
    int64_t num_waiting, slot; /* so many finished sums, `slot` floats apart before acc, are to be added to this one */
    const uint8_t *ahead; /* what to prefetch meanwhile, ahead_step bytes for each k */
    int64_t ahead_step;
} Tile;
typedef void (*TileFunction)(const Tile *t);

INLINE int is_scaled(int64_t kind) { return kind == KIND_FP8 || kind == KIND_INT8; }

INLINE void load_pair(const int kind, const uint8_t *w, int strip, vf *low, vf *high)
{
    if (kind == KIND_BF16) {
        vi words = load_words(w + strip * VL * 4);
        *low = (vf)(words << 16);
        *high = (vf)(words & (int32_t)0xFFFF0000);
    } else if (kind == KIND_F16) {
        *low = load_f16(w + strip * VL * 2);
        *high = load_f16(w + 32 + strip * VL * 2);
    } else if (kind == KIND_FP8) {
        load_fp8(w + strip * VL * 2, low, high);
    } else if (kind == KIND_INT8) {
        *low = load_i8(w + strip * VL);
        *high = load_i8(w + 16 + strip * VL);
    } else {
        *low = load((const float *)w + strip * VL);
        *high = load((const float *)w + 16 + strip * VL);
    }
}

/* Bytes of one k of a panel. */
INLINE int64_t weight_step(const int64_t kind)
{
    return PANEL * (kind == KIND_F32 ? 4 : is_scaled(kind) ? 1 : 2);
}

/* The sum over one scale block joins the result by one multiplication with the scale (256: see load_fp8). */
INLINE void finish(const int kind, const Tile *t, float *place, int column, vf value)
{
    if (is_scaled(kind)) {
        vf scale = t->scale_width == 1 ? splat(t->scale[0]) : load(t->scale + column);
        if (kind == KIND_FP8)
            scale = scale * splat(256.0f);
        value = fused(value, scale, t->first ? splat(0.0f) : load(place));
    }
    for (int64_t i = 0; i < t->num_waiting; i++) {
        place -= t->slot;
        value = load(place) + value;
    }
    store(place, value);
}

/* One k of a tile. */
INLINE void tile_step(const int kind, const int rows, const int strips, const uint8_t *w, int strip,
                      const float *const *x, int64_t k, vf acc[MAX_TILE_ROWS][4][2])
{
    vf low[4], high[4];
    for (int s = 0; s < strips; s++)
        load_pair(kind, w, strip + s, &low[s], &high[s]);
    for (int r = 0; r < rows; r++) {
        vf factor = splat(x[r][k]);
        for (int s = 0; s < strips; s++) {
            acc[r][s][0] = fused(factor, low[s], acc[r][s][0]);
            acc[r][s][1] = fused(factor, high[s], acc[r][s][1]);
        }
    }
}

/* `rows` rows times `strips` pairs of vectors, the accumulators in registers. */
INLINE void tile_pass(const int kind, const int rows, const int strips, const Tile *t, int strip)
{
    vf acc[MAX_TILE_ROWS][4][2];
    const float *x[MAX_TILE_ROWS];
    const int scaled = is_scaled(kind), resume = !scaled && !t->first;
    const int plain = !scaled && t->num_waiting == 0;
    for (int r = 0; r < rows; r++) {
        x[r] = t->rows[r] + t->k;
        for (int s = 0; s < strips; s++) {
            const float *place = t->acc + r * t->acc_stride + (strip + s) * VL;
            acc[r][s][0] = resume ? load(place) : splat(0.0f);
            acc[r][s][1] = resume ? load(place + 16) : splat(0.0f);
        }
    }
    const uint8_t *w = t->weights, *ahead = t->ahead;
    const int64_t step = weight_step(kind), count = t->count;
    for (int64_t k = 0; k < count; k++, w += step, ahead += t->ahead_step) {
        if (strip == 0)
            __builtin_prefetch(ahead, 0, 3);
        tile_step(kind, rows, strips, w, strip, x, k, acc);
    }
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < strips; s++) {
            int column = (strip + s) * VL;
            float *place = t->acc + r * t->acc_stride + column;
            if (plain) {
                store(place, acc[r][s][0]);
                store(place + 16, acc[r][s][1]);
                continue;
            }
            finish(kind, t, place, column, acc[r][s][0]);
            finish(kind, t, place + 16, column + 16, acc[r][s][1]);
        }
}

#define DEFINE_TILE(KIND, ROWS)                                                              \
    static void tile_##KIND##_##ROWS(const Tile *t)                                          \
    {                                                                                        \
        for (int strip = 0; strip < NUM_STRIPS; strip += STRIPS_AT_ONCE(ROWS))               \
            tile_pass(KIND, ROWS, STRIPS_AT_ONCE(ROWS), t, strip);                           \
    }
#define EACH_ROWS_TO_6(M, KIND) M(KIND, 1) M(KIND, 2) M(KIND, 3) M(KIND, 4) M(KIND, 5) M(KIND, 6)
#if MAX_TILE_ROWS == 12
#define EACH_ROWS(M, KIND) \
    EACH_ROWS_TO_6(M, KIND) M(KIND, 7) M(KIND, 8) M(KIND, 9) M(KIND, 10) M(KIND, 11) M(KIND, 12)
#else
#define EACH_ROWS(M, KIND) EACH_ROWS_TO_6(M, KIND)
#endif
#define NAME_TILE(KIND, ROWS) tile_##KIND##_##ROWS,

EACH_ROWS(DEFINE_TILE, KIND_F32)
EACH_ROWS(DEFINE_TILE, KIND_BF16)
EACH_ROWS(DEFINE_TILE, KIND_F16)
EACH_ROWS(DEFINE_TILE, KIND_FP8)
EACH_ROWS(DEFINE_TILE, KIND_INT8)

static const TileFunction tiles[NUM_KINDS][MAX_TILE_ROWS] = {
    {EACH_ROWS(NAME_TILE, KIND_F32)},
    {EACH_ROWS(NAME_TILE, KIND_BF16)},
    {EACH_ROWS(NAME_TILE, KIND_F16)},
    {EACH_ROWS(NAME_TILE, KIND_FP8)},
    {EACH_ROWS(NAME_TILE, KIND_INT8)},
};

/* Runs one tile description over num_rows rows, in blocks of nearly equal size. */
static void run_tiles(int64_t kind, Tile t, int64_t num_rows)
{
    int64_t num_blocks = (num_rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    t.ahead_step /= num_blocks; /* the prefetches are spread over all of them */
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t rows = num_rows / num_blocks + (block < num_rows % num_blocks);
        tiles[kind][rows - 1](&t);
        t.rows += rows;
        t.acc += rows * t.acc_stride;
        t.ahead += t.count * t.ahead_step;
    }
}

/* A stretch of k that is summed in one go. K is cut in num_shards pieces whose sums are added in a balanced binary
   tree by a binary counter: `depth` finished sums wait while a piece is summed up, and num_waiting of them are added
   to it at its end. */
typedef struct {
    int64_t k, end, first, depth, num_waiting, block;
} Stretch;

static int next_stretch(const Matrix *m, int64_t longest, Stretch *s)
{
    if (s->end == m->num_in)
        return 0;
    const int64_t piece = m->num_in / m->num_shards, index = s->end / piece, piece_end = (index + 1) * piece;
    s->k = s->end;
    s->first = s->k % piece == 0;
    s->block = is_scaled(m->kind) ? (s->k + m->block_phase) / m->block_cols : 0;
    const int64_t block_end = is_scaled(m->kind) ? (s->block + 1) * m->block_cols - m->block_phase : piece_end;
    s->end = s->k + longest < piece_end ? s->k + longest : piece_end;
    s->end = block_end < s->end ? block_end : s->end;
    s->depth = __builtin_popcountll(index);
    s->num_waiting = s->end == piece_end ? __builtin_ctzll(index + 1) : 0;
    return 1;
}

static Tile tile_of(const Panels *p, int64_t column, const Stretch *s, int64_t num_rows, float *acc)
{
    const Matrix *m = p->matrices + column % p->num_matrices;
    const int64_t panel = p->first + column / p->num_matrices;
    Tile t = {.k = s->k, .count = s->end - s->k, .acc_stride = gemm_stride(p), .first = (int)s->first};
    t.weights = m->panels + panel * m->panel_stride + s->k * weight_step(m->kind);
    t.slot = num_rows * t.acc_stride;
    t.acc = acc + s->depth * t.slot + column * PANEL;
    t.scale = is_scaled(m->kind) ? m->scales + panel * m->scale_stride + s->block * m->scale_width : NULL;
    t.scale_width = m->scale_width;
    t.num_waiting = s->num_waiting;
    return t;
}

/* Many rows: a slice of a panel stays in the L1 cache for all of them, and the next one is fetched meanwhile. */
static void gemm_by_slices(const Panels *p, const float *const *rows, int64_t num_rows, float *acc)
{
    const Matrix *m = p->matrices;
    const int64_t num_columns = p->count * p->num_matrices;
    for (Stretch s = {0}; next_stretch(m, SLICE, &s);)
        for (int64_t column = 0; column < num_columns; column++) {
            Tile t = tile_of(p, column, &s, num_rows, acc);
            Stretch next = s;
            t.rows = rows;
            t.ahead = t.weights;
            t.ahead_step = weight_step(m->kind);
            if (column + 1 < num_columns || next_stretch(m, SLICE, &next))
                t.ahead = tile_of(p, (column + 1) % num_columns, &next, num_rows, acc).weights;
            run_tiles(m->kind, t, num_rows);
        }
}

/* Panel j of a row of the result; `second` is read for gate and up alone. */
INLINE void put_columns(const Panels *p, int64_t j, const float *first, const float *second, float *out)
{
    const int64_t left = p->matrices->num_out - (p->first + j) * PANEL;
    out += j * PANEL;
    if (p->num_matrices == 2) {
        swiglu(first, second, out, PANEL);
    } else if (left < PANEL) {
        memcpy(out, first, left * sizeof(float));
    } else if (p->stream && (uintptr_t)out % sizeof(vf) == 0) {
        for (int64_t i = 0; i < PANEL; i += VL)
            stream(out + i, load(first + i));
    } else {
        for (int64_t i = 0; i < PANEL; i += VL)
            store(out + i, load(first + i));
    }
}

#include "body_pairs.h"

static void plain_gemm(const Panels *p, const float *const *rows, int64_t num_rows, float *acc)
{
    if (num_rows > MAX_TILE_ROWS) {
        gemm_by_slices(p, rows, num_rows, acc);
        return;
    }
    for (int64_t column = 0; column < p->count * p->num_matrices; column++)
        for (Stretch s = {0}; next_stretch(p->matrices, p->matrices->num_in, &s);) {
            Tile t = tile_of(p, column, &s, num_rows, acc);
            t.rows = rows;
            t.ahead = t.weights + PREFETCH_BYTES;
            t.ahead_step = weight_step(p->matrices->kind);
            tiles[p->matrices->kind][num_rows - 1](&t);
        }
}

static void put_rows(const Panels *p, int64_t num_rows, const float *acc, float *const *out)
{
    for (int64_t row = 0; row < num_rows; row++, acc += gemm_stride(p))
        for (int64_t j = 0; j < p->count; j++) {
            const float *first = acc + j * p->num_matrices * PANEL;
            put_columns(p, j, first, first + PANEL, out[row]);
        }
}

/* out[row] gets the columns of Panels, out[row][0] the first of them; those of gate and up are padded to whole panels. */
static void panel_gemm(const Panels *p, const float *const *rows, int64_t num_rows, float *const *out, float *scratch)
{
    if (p->matrices->kind == KIND_PAIRS) {
        pairs_gemm(p, rows, num_rows, out, scratch);
    } else {
        plain_gemm(p, rows, num_rows, scratch);
        put_rows(p, num_rows, scratch, out);
    }
    if (p->stream)
        end_stream();
}
