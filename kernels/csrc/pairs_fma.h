/* The same sums without tiles: each row is a block. */

#define PAIR_BLOCKS(num_rows) pair_rows(num_rows)
#define PAIR_ROWS (MAX_TILE_ROWS / 3) /* rows whose six chains each stay in registers */

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

static void open_pairs(int64_t block_rows) { (void)block_rows; }
static void close_pairs(void) {}

/* One step of `rows` rows for VL columns at w. */
INLINE void pair_step(const int rows, const uint8_t *w, const float *parts, int64_t row_parts, vf acc[PAIR_ROWS])
{
    vf even[PAIR_ROWS][3], odd[PAIR_ROWS][3];
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < 3; part++)
            even[r][part] = odd[r][part] = splat(0.0f);
    for (int64_t k = 0; k < PAIR_STEP; k += 2, w += 2 * PANEL * 2) {
        const vi words = load_words(w);
        const vf first = (vf)(words << 16), second = (vf)(words & (int32_t)0xFFFF0000);
        for (int r = 0; r < rows; r++)
            for (int part = 0; part < 3; part++) {
                const float *x = parts + r * row_parts + part * PAIR_STEP + k;
                even[r][part] = fused(splat(x[0]), first, even[r][part]);
                odd[r][part] = fused(splat(x[1]), second, odd[r][part]);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < 3; part++)
            acc[r] = acc[r] + (even[r][part] + odd[r][part]);
}

INLINE void add_rows(const int rows, const Tile *t, const float *parts, int64_t row_parts, float *acc)
{
    for (int64_t column = 0; column < PANEL; column += VL) {
        const uint8_t *w = t->weights + column * 4;
        const float *x = parts;
        vf sums[PAIR_ROWS];
        for (int r = 0; r < rows; r++)
            sums[r] = t->first ? splat(0.0f) : load(acc + r * t->acc_stride + column);
        for (int64_t k = 0; k < t->count; k += PAIR_STEP, w += PAIR_STEP * PANEL * 2, x += 3 * PAIR_STEP)
            pair_step(rows, w, x, row_parts, sums);
        for (int r = 0; r < rows; r++)
            store(acc + r * t->acc_stride + column, sums[r]);
    }
}

/* t->acc += rows times 32 columns, from `step` of the slice on; never inlined, as it runs in another mode. */
static __attribute__((noinline)) void add_all_rows(const Tile *t, const PairRows *r, int64_t step)
{
    const int64_t row_parts = r->num_steps * 3 * PAIR_STEP;
    const float *parts = r->parts + step * 3 * PAIR_STEP;
    int64_t row = 0;
    for (; row + PAIR_ROWS <= r->num_blocks; row += PAIR_ROWS)
        add_rows(PAIR_ROWS, t, parts + row * row_parts, row_parts, t->acc + row * t->acc_stride);
    for (; row < r->num_blocks; row++)
        add_rows(1, t, parts + row * row_parts, row_parts, t->acc + row * t->acc_stride);
}

static void add_pairs(const Tile *t, const PairRows *r, int64_t step)
{
    const uint64_t before = flush_subnormals();
    add_all_rows(t, r, step);
    restore_subnormals(before);
}
