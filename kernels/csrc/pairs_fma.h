/* The same sums by fused multiply-adds; each row is a block. */

#define PAIR_ROWS (MAX_TILE_ROWS / 3) /* rows times vectors of columns whose six chains each stay in registers */

/* PAIR_STEP values of a row to their three parts, `stride` apart. */
INLINE void split_step(const float *x, float *to, int64_t stride)
{
    for (int i = 0; i < PAIR_STEP; i += VL) {
        vf left = load(x + i);
        for (int part = 0; part < 3; part++) {
            const vf upper = (vf)((vi)left & (int32_t)0xFFFF0000);
            store(to + part * stride + i, upper);
            left = left - upper;
        }
    }
}

/* One step of `rows` rows for `width` vectors of columns at w; as many lines are fetched `ahead` bytes further on. */
INLINE void pair_step(const int rows, const int width, const uint8_t *w, int64_t ahead, const float *parts,
                      int64_t row_parts, vf acc[PAIR_ROWS][2])
{
    vf even[PAIR_ROWS][2][3], odd[PAIR_ROWS][2][3];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 3 * width; i++)
            even[r][i / 3][i % 3] = odd[r][i / 3][i % 3] = splat(0.0f);
    for (int64_t k = 0; k < PAIR_STEP; k += 2, w += 2 * PANEL * 2)
        for (int v = 0; v < width; v++) {
            const vi words = load_words(w + v * VL * 4);
            const vf first = (vf)(words << 16), second = (vf)(words & (int32_t)0xFFFF0000);
            __builtin_prefetch(w + v * VL * 4 + ahead, 0, 3);
            for (int r = 0; r < rows; r++)
                for (int part = 0; part < 3; part++) {
                    const float *x = parts + r * row_parts + part * PAIR_STEP + k;
                    even[r][v][part] = fused(splat(x[0]), first, even[r][v][part]);
                    odd[r][v][part] = fused(splat(x[1]), second, odd[r][v][part]);
                }
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 3 * width; i++)
            acc[r][i % width] = acc[r][i % width] + (even[r][i % width][i / width] + odd[r][i % width][i / width]);
}

INLINE void add_some_rows(const int rows, const int width, const Tile *t, const float *parts, int64_t row_parts,
                          float *acc)
{
    for (int64_t column = 0; column < PANEL; column += width * VL) {
        const uint8_t *w = t->weights + column * 4;
        const float *x = parts;
        vf sums[PAIR_ROWS][2];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < width; v++)
                sums[r][v] = t->first ? splat(0.0f) : load(acc + r * t->acc_stride + column + v * VL);
        for (int64_t k = 0; k < t->count; k += PAIR_STEP, w += PAIR_STEP * PANEL * 2, x += 3 * PAIR_STEP)
            pair_step(rows, width, w, t->ahead - t->weights, x, row_parts, sums);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < width; v++)
                store(acc + r * t->acc_stride + column + v * VL, sums[r][v]);
    }
}

/* t->acc += rows times 32 columns, from `step` of the slice on; never inlined, as it runs in another mode. */
static __attribute__((noinline)) void add_rows_flushed(const Tile *t, const PairRows *r, int64_t step)
{
    const int64_t row_parts = r->num_steps * 3 * PAIR_STEP;
    const float *parts = (const float *)r->parts + step * 3 * PAIR_STEP;
    int64_t row = 0;
    for (; row + PAIR_ROWS <= r->num_blocks; row += PAIR_ROWS)
        add_some_rows(PAIR_ROWS, 1, t, parts + row * row_parts, row_parts, t->acc + row * t->acc_stride);
    for (; PAIR_ROWS > 2 && row + PAIR_ROWS / 2 <= r->num_blocks; row += PAIR_ROWS / 2)
        add_some_rows(PAIR_ROWS / 2, 2, t, parts + row * row_parts, row_parts, t->acc + row * t->acc_stride);
    for (; row < r->num_blocks; row++)
        add_some_rows(1, 2, t, parts + row * row_parts, row_parts, t->acc + row * t->acc_stride);
}

static void add_rows(const Tile *t, const PairRows *r, int64_t step)
{
    const uint64_t before = flush_subnormals();
    add_rows_flushed(t, r, step);
    restore_subnormals(before);
}
