/* Tiles of AMX: 0 to 3 are sums (two blocks of rows by 32 columns), 4 and 5 weights, 6 and 7 rows. Their intrinsics
   say nothing to the compiler of the memory they read: hence MEMORY_SETTLED. */

#define PAIR_LINES 32 /* cache lines that 32 columns of a step take */
#define MEMORY_SETTLED() __asm__ volatile("" ::: "memory")

/* The upper halves of 32 words. */
INLINE void store_upper(uint16_t *to, vf first, vf second)
{
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second));
}

/* PAIR_STEP values of a row to their three parts, `stride` apart. */
INLINE void split_step_for_tiles(const float *x, uint16_t *to, int64_t stride)
{
    vf first = load(x), second = load(x + VL);
    for (int part = 0; part < 3; part++, to += stride) {
        store_upper(to, first, second);
        first = first - (vf)((vi)first & (int32_t)0xFFFF0000);
        second = second - (vf)((vi)second & (int32_t)0xFFFF0000);
    }
}

static void open_tiles(int64_t block_rows)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = tile == 4 || tile == 5 ? TILE_ROWS : (uint8_t)block_rows;
    }
    MEMORY_SETTLED();
    _tile_loadconfig(&config);
}

static void close_tiles(void) { _tile_release(); }

/* The i-th of eight portions of a step's lines ahead. They lie between the tiles' own loads, which would wait for many
   at a time. */
INLINE void fetch_lines(const uint8_t *ahead, int i)
{
    for (int line = 0; line < PAIR_LINES / 8; line++)
        __builtin_prefetch(ahead + (i * (PAIR_LINES / 8) + line) * 64, 0, 3);
}

/* One block of rows. */
static void add_one_block(const Tile *t, const uint16_t *parts, int64_t part_stride, float *acc)
{
    const int64_t stride = t->acc_stride * sizeof(float);
    const uint8_t *w = t->weights, *ahead = t->ahead;
    _tile_zero(0);
    _tile_zero(1);
    if (!t->first) {
        _tile_loadd(0, acc, stride);
        _tile_loadd(1, acc + 16, stride);
    }
    for (int64_t k = 0; k < t->count; k += PAIR_STEP, w += PAIR_LINES * 64, ahead += PAIR_LINES * 64) {
        fetch_lines(ahead, 0);
        _tile_loadd(4, w, 128);
        fetch_lines(ahead, 1);
        _tile_loadd(5, w + 64, 128);
        for (int part = 0; part < 3; part++, parts += part_stride) {
            fetch_lines(ahead, 2 + 2 * part);
            _tile_loadd(6, parts, 64);
            _tile_dpbf16ps(0, 6, 4);
            fetch_lines(ahead, 3 + 2 * part);
            _tile_dpbf16ps(1, 6, 5);
        }
    }
    _tile_stored(0, acc, stride);
    _tile_stored(1, acc + 16, stride);
}

/* Two blocks of rows, `far` parts and `far_acc` sums apart. Portions [first, last) of each step's lines are fetched. */
INLINE void add_two_blocks(const Tile *t, const uint16_t *parts, int64_t part_stride, int64_t far, float *acc,
                           int64_t far_acc, int first, int last)
{
    const int64_t stride = t->acc_stride * sizeof(float);
    const uint8_t *w = t->weights, *ahead = t->ahead;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (!t->first) {
        _tile_loadd(0, acc, stride);
        _tile_loadd(1, acc + 16, stride);
        _tile_loadd(2, acc + far_acc, stride);
        _tile_loadd(3, acc + far_acc + 16, stride);
    }
    for (int64_t k = 0; k < t->count; k += PAIR_STEP, w += PAIR_LINES * 64, ahead += PAIR_LINES * 64) {
        _tile_loadd(4, w, 128);
        _tile_loadd(5, w + 64, 128);
        for (int part = 0; part < 3; part++, parts += part_stride) {
            for (int i = first + (last - first) * part / 3; i < first + (last - first) * (part + 1) / 3; i++)
                fetch_lines(ahead, i);
            _tile_loadd(6, parts, 64);
            _tile_loadd(7, parts + far, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(1, 6, 5);
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, acc, stride);
    _tile_stored(1, acc + 16, stride);
    _tile_stored(2, acc + far_acc, stride);
    _tile_stored(3, acc + far_acc + 16, stride);
}

/* t->acc += a cell times 32 columns, from `step` of the slice on. */
static void add_on_tiles(const Tile *t, const PairRows *r, int64_t cell, int64_t step)
{
    const int64_t part = r->block_rows * PAIR_STEP, block = r->num_steps * 3 * part;
    const uint16_t *parts = (const uint16_t *)r->parts + step * 3 * part + 2 * cell * block;
    MEMORY_SETTLED();
    if (r->num_blocks == 1)
        add_one_block(t, parts, part, t->acc);
    else if (r->num_cells == 1)
        add_two_blocks(t, parts, part, block, t->acc, r->block_rows * PANEL, 0, 8);
    else
        add_two_blocks(t, parts, part, block, t->acc, r->block_rows * PANEL, (int)(8 * cell / r->num_cells),
                       (int)(8 * (cell + 1) / r->num_cells));
    MEMORY_SETTLED();
}
