/* Matrix products over panels. Each output element is one chain of fused multiply-adds over k in ascending order,
   whatever the number of rows, so a row's result does not depend on its company. */

#define K_BLOCK 512 /* k per pass over the rows: the slice of the panel stays in the L1/L2 cache */
#define KIND_STRIDED NUM_KINDS /* float32 whose rows lie `stride` floats apart: the cache in attention */
#define PREFETCH_BYTES 2048

typedef struct {
    const float *const *rows;
    int64_t k, count; /* first k and how many */
    const uint8_t *weights; /* at k */
    int64_t stride; /* floats, KIND_STRIDED only */
    float *acc;
    int64_t acc_stride;
    int first; /* start from zero rather than from acc */
    const float *scale;
    int64_t scale_width;
} Tile;
typedef void (*TileFunction)(const Tile *t);

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
    } else {
        *low = load((const float *)w + strip * VL);
        *high = load((const float *)w + 16 + strip * VL);
    }
}

INLINE int64_t weight_step(const int kind, const Tile *t)
{
    if (kind == KIND_STRIDED)
        return t->stride * 4;
    return PANEL * (kind == KIND_F32 ? 4 : kind == KIND_FP8 ? 1 : 2);
}

/* fp8: the sum over one scale block joins the result by one multiplication with the scale (256: see load_fp8). */
INLINE void finish(const int kind, const Tile *t, float *place, int column, vf value)
{
    if (kind == KIND_FP8) {
        vf scale = t->scale_width == 1 ? splat(t->scale[0]) : load(t->scale + column);
        value = fused(value, scale * splat(256.0f), t->first ? splat(0.0f) : load(place));
    }
    store(place, value);
}

/* `rows` rows times `strips` pairs of vectors, the accumulators in registers. */
INLINE void tile_pass(const int kind, const int rows, const int strips, const Tile *t, int strip)
{
    vf acc[MAX_TILE_ROWS][4][2];
    const float *x[MAX_TILE_ROWS];
    const int resume = kind != KIND_FP8 && !t->first;
    for (int r = 0; r < rows; r++) {
        x[r] = t->rows[r] + t->k;
        for (int s = 0; s < strips; s++) {
            const float *place = t->acc + r * t->acc_stride + (strip + s) * VL;
            acc[r][s][0] = resume ? load(place) : splat(0.0f);
            acc[r][s][1] = resume ? load(place + 16) : splat(0.0f);
        }
    }
    const uint8_t *w = t->weights;
    const int64_t step = weight_step(kind, t), count = t->count;
    for (int64_t k = 0; k < count; k++, w += step) {
        if (rows <= 4 && strip == 0) {
            __builtin_prefetch(w + PREFETCH_BYTES, 0, 3);
            if (kind == KIND_F32)
                __builtin_prefetch(w + PREFETCH_BYTES + 64, 0, 3);
        }
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
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < strips; s++) {
            int column = (strip + s) * VL;
            float *place = t->acc + r * t->acc_stride + column;
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
EACH_ROWS(DEFINE_TILE, KIND_STRIDED)

static const TileFunction tiles[NUM_KINDS + 1][MAX_TILE_ROWS] = {
    {EACH_ROWS(NAME_TILE, KIND_F32)},
    {EACH_ROWS(NAME_TILE, KIND_BF16)},
    {EACH_ROWS(NAME_TILE, KIND_F16)},
    {EACH_ROWS(NAME_TILE, KIND_FP8)},
    {EACH_ROWS(NAME_TILE, KIND_STRIDED)},
};

/* Runs one tile description over num_rows rows, in blocks of nearly equal size. */
static void run_tiles(int64_t kind, Tile t, int64_t num_rows)
{
    int64_t num_blocks = (num_rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t rows = num_rows / num_blocks + (block < num_rows % num_blocks);
        tiles[kind][rows - 1](&t);
        t.rows += rows;
        t.acc += rows * t.acc_stride;
    }
}

/* acc[num_rows][32] = rows times one panel. K is cut in num_shards pieces whose sums are added in a balanced binary
   tree by a binary counter: `stack` holds log2(num_shards) sums that wait for their right-hand neighbour. */
static void panel_gemm(const Matrix *m, int64_t panel, const float *const *rows, int64_t num_rows, float *acc,
                       float *stack)
{
    static const int64_t bytes[NUM_KINDS] = {4, 2, 2, 1};
    const int64_t piece = m->num_in / m->num_shards, size = num_rows * PANEL;
    int64_t depth = 0;
    for (int64_t k = 0, end; k < m->num_in; k = end) {
        const int64_t piece_end = (k / piece + 1) * piece;
        const int64_t block = m->kind == KIND_FP8 ? (k + m->block_phase) / m->block_cols : 0;
        end = m->kind == KIND_FP8 ? (block + 1) * m->block_cols - m->block_phase : k + K_BLOCK;
        end = end < piece_end ? end : piece_end;
        Tile t = {rows, k, end - k, m->panels + panel * m->panel_stride + k * PANEL * bytes[m->kind], 0, acc, PANEL,
                  k % piece == 0, m->scales + panel * m->scale_stride + block * m->scale_width, m->scale_width};
        run_tiles(m->kind, t, num_rows);
        if (end != piece_end || m->num_shards == 1)
            continue;
        for (int64_t counter = end / piece; counter % 2 == 0; counter /= 2) {
            depth--;
            for (int64_t i = 0; i < size; i += VL)
                store(acc + i, load(stack + depth * size + i) + load(acc + i));
        }
        if (end != m->num_in)
            memcpy(stack + depth++ * size, acc, size * sizeof(float));
    }
}
