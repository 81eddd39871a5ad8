/* Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over spans of SPAN keys, in order, for both forms of
   attention. A line is one query, of one row and head. Up to 32 lines make a bundle and are the lanes of its vectors:
   no sum runs across lanes, each is one chain over a line's own keys in order, whatever its neighbours see. */

typedef struct {
    int64_t num_lines, lanes; /* lanes: 16 or 32; those beyond num_lines see no key */
    int64_t width, out_width; /* of a query; of an output, a multiple of PANEL */
    float *query;             /* [width][lanes] */
    float *scores;            /* [SPAN][lanes], then weights */
    float *out;               /* [num_lines][out_width] */
    float *top, *total;       /* [lanes] */
    int32_t *seen;            /* [lanes]: how many keys of the span */
} Bundle;

/* Takes the next bundle out of scratch; `scores` is shared by all. Returns the end of what it took. */
static float *open_bundle(Bundle *b, int64_t num_lines, int64_t width, int64_t out_width, float *scores, float *scratch)
{
    *b = (Bundle){.num_lines = num_lines, .lanes = round_up(num_lines, 16), .width = width, .out_width = out_width,
                  .scores = scores, .query = scratch};
    b->out = b->query + width * b->lanes;
    b->top = b->out + num_lines * out_width;
    b->total = b->top + b->lanes;
    b->seen = (int32_t *)(b->total + b->lanes);
    return (float *)(b->seen + b->lanes);
}

static void reset_bundle(const Bundle *b)
{
    memset(b->out, 0, b->num_lines * b->out_width * sizeof(float));
    for (int64_t i = 0; i < b->lanes; i++) {
        b->top[i] = -INFINITY;
        b->total[i] = 0.0f;
        b->seen[i] = 0;
    }
}

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

/* to[4][stride] = the transpose of rows[4][4 from k on] */
INLINE void turn4(const float *const *rows, int64_t k, float *to, int64_t stride)
{
    v4 row[4], half[4];
    for (int i = 0; i < 4; i++)
        row[i] = *(const v4 *)(rows[i] + k);
    for (int i = 0; i < 2; i++) {
        half[i] = SHUFFLE(row[2 * i], row[2 * i + 1], 0, 4, 1, 5);
        half[2 + i] = SHUFFLE(row[2 * i], row[2 * i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; i++) {
        *(v4 *)(to + 2 * i * stride) = SHUFFLE(half[2 * i], half[2 * i + 1], 0, 1, 4, 5);
        *(v4 *)(to + (2 * i + 1) * stride) = SHUFFLE(half[2 * i], half[2 * i + 1], 2, 3, 6, 7);
    }
}

/* queries[i] has the values of line i from `at` on. */
static void load_queries(const Bundle *b, const float *const *queries, int64_t at, int64_t count)
{
    const int64_t lanes = b->lanes, whole = count / 4 * 4;
    float *to = b->query + at * lanes;
    for (int64_t i = 0; i < lanes; i++)
        if (i % 4 == 0 && i + 4 <= b->num_lines) {
            for (int64_t k = 0; k < whole; k += 4)
                turn4(queries + i, k, to + k * lanes + i, lanes);
        } else if (i >= b->num_lines / 4 * 4) {
            for (int64_t k = 0; k < whole; k++)
                to[k * lanes + i] = i < b->num_lines ? queries[i][k] : 0.0f;
        }
    for (int64_t k = whole; k < count; k++)
        for (int64_t i = 0; i < lanes; i++)
            to[k * lanes + i] = i < b->num_lines ? queries[i][k] : 0.0f;
}

/* Scores of `rows` keys for 16 lanes; run_tiles has 32. */
INLINE void score_pass(const int rows, const Bundle *b, const float *const *keys, const float *const *ahead,
                       float *scores)
{
    const int64_t fetched = b->width - b->out_width / 2;
    vf acc[MAX_TILE_ROWS][NUM_STRIPS];
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < NUM_STRIPS; s++)
            acc[r][s] = splat(0.0f);
    for (int64_t k = 0; k < b->width; k++) {
        vf query[NUM_STRIPS];
        for (int s = 0; s < NUM_STRIPS; s++)
            query[s] = load(b->query + k * 16 + s * VL);
        if (ahead && k < fetched && k % 16 < rows)
            for (int64_t r = k % 16; r < rows; r += 16)
                __builtin_prefetch(ahead[r] + k / 16 * 16, 0, 2);
        for (int r = 0; r < rows; r++) {
            vf key = splat(keys[r][k]);
            for (int s = 0; s < NUM_STRIPS; s++)
                acc[r][s] = fused(key, query[s], acc[r][s]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < NUM_STRIPS; s++)
            store(scores + r * 16 + s * VL, acc[r][s]);
}

/* out[rows][2 * VL columns] += weights of `rows` lines for keys [first, stop), times their values. */
INLINE void value_pass(const int rows, const Bundle *b, int64_t line, const float *const *values,
                       const float *const *ahead, int64_t column, int64_t first, int64_t stop)
{
    const int64_t fetched = b->width - b->out_width / 2 + column / 2;
    vf acc[MAX_TILE_ROWS][2];
    float *out = b->out + line * b->out_width + column;
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < 2; s++)
            acc[r][s] = load(out + r * b->out_width + s * VL);
    const float *weights = b->scores + first * b->lanes + line;
    for (int64_t k = first; k < stop; k++, weights += b->lanes) {
        if (ahead && line == 0 && column % PANEL == 0)
            __builtin_prefetch(ahead[k] + fetched, 0, 2);
        vf low = load(values[k] + column), high = load(values[k] + column + VL);
        for (int r = 0; r < rows; r++) {
            vf weight = splat(weights[r]);
            acc[r][0] = fused(weight, low, acc[r][0]);
            acc[r][1] = fused(weight, high, acc[r][1]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int s = 0; s < 2; s++)
            store(out + r * b->out_width + s * VL, acc[r][s]);
}

typedef void (*ScoreFunction)(const Bundle *b, const float *const *keys, const float *const *ahead, float *scores);
typedef void (*ValueFunction)(const Bundle *b, int64_t line, const float *const *values, const float *const *ahead,
                              int64_t column, int64_t first, int64_t stop);
#define DEFINE_PASSES(PREFIX, ROWS)                                                                                \
    static void PREFIX##_score_##ROWS(const Bundle *b, const float *const *keys, const float *const *ahead,        \
                                      float *scores)                                                               \
    {                                                                                                              \
        score_pass(ROWS, b, keys, ahead, scores);                                                                  \
    }                                                                                                              \
    static void PREFIX##_value_##ROWS(const Bundle *b, int64_t line, const float *const *values,                   \
                                      const float *const *ahead, int64_t column, int64_t first, int64_t stop)      \
    {                                                                                                              \
        value_pass(ROWS, b, line, values, ahead, column, first, stop);                                             \
    }
#define NAME_SCORE(PREFIX, ROWS) PREFIX##_score_##ROWS,
#define NAME_VALUE(PREFIX, ROWS) PREFIX##_value_##ROWS,
EACH_ROWS(DEFINE_PASSES, pass)
static const ScoreFunction score_passes[MAX_TILE_ROWS] = {EACH_ROWS(NAME_SCORE, pass)};
static const ValueFunction value_passes[MAX_TILE_ROWS] = {EACH_ROWS(NAME_VALUE, pass)};

/* The size of the first of the nearly equal blocks that `rows` rows are cut into. */
static int64_t next_rows(int64_t rows) { return rows / ((rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS); }

static void score_keys(const Bundle *b, const float *const *keys, const float *const *ahead, int64_t num_keys)
{
    if (b->lanes == PANEL) {
        Tile t = {.rows = keys, .count = b->width, .weights = (const uint8_t *)b->query, .acc = b->scores,
                  .acc_stride = PANEL, .first = 1, .ahead = (const uint8_t *)b->query};
        run_tiles(KIND_F32, t, num_keys);
        return;
    }
    for (int64_t key = 0, rows; key < num_keys; key += rows) {
        rows = next_rows(num_keys - key);
        score_passes[rows - 1](b, keys + key, ahead ? ahead + key : NULL, b->scores + key * 16);
    }
}

static void scale_line(float *out, int64_t n, float factor)
{
    for (int64_t i = 0; i < n; i += VL)
        store(out + i, load(out + i) * splat(factor));
}

/* Scores become weights exp(score - top); what was summed so far is multiplied so that it fits. Keys that a line does
   not see weigh nothing, whatever they hold. Subnormal weights become zero too: beside a weight of 1 they are nothing,
   and products with them take several times as long. */
static void soften(const Bundle *b, int64_t num_keys, float scale)
{
    float factors[PANEL];
    for (int64_t lane = 0; lane < b->lanes; lane += VL) {
        vi seen;
        memcpy(&seen, b->seen + lane, sizeof seen);
        vf old_top = load(b->top + lane), top = old_top, sum = splat(0.0f);
        for (int64_t j = 0; j < num_keys; j++) {
            float *place = b->scores + j * b->lanes + lane;
            vf score = load(place) * splat(scale);
            store(place, score);
            top = larger(pick((vi)(seen > (int32_t)j), score, splat(-INFINITY)), top);
        }
        vf shrink = pick((vi)(old_top == top), splat(1.0f), vexp(old_top - top));
        for (int64_t j = 0; j < num_keys; j++) {
            float *place = b->scores + j * b->lanes + lane;
            vf weight = vexp(load(place) - top);
            weight = pick((vi)(seen > (int32_t)j) & ~(vi)(weight < splat(0x1p-126f)), weight, splat(0.0f));
            store(place, weight);
            sum = sum + weight;
        }
        store(b->total + lane, load(b->total + lane) * shrink + sum);
        store(b->top + lane, top);
        store(factors + lane, shrink);
    }
    for (int64_t i = 0; i < b->num_lines; i++)
        if (factors[i] != 1.0f)
            scale_line(b->out + i * b->out_width, b->out_width, factors[i]);
}

/* Adds the weighted values of keys [from, seen) to lines [line, line + num_lines): those that all of them see together,
   the others by halves, so that every line meets exactly its own. */
static void add_values(const Bundle *b, int64_t line, int64_t num_lines, const float *const *values,
                       const float *const *ahead, int64_t from)
{
    int64_t fewest = b->seen[line], most = fewest;
    for (int64_t i = line + 1; i < line + num_lines; i++) {
        fewest = b->seen[i] < fewest ? b->seen[i] : fewest;
        most = b->seen[i] > most ? b->seen[i] : most;
    }
    for (int64_t column = 0; fewest > from && column < b->out_width; column += 2 * VL)
        for (int64_t i = 0, rows; i < num_lines; i += rows) {
            rows = next_rows(num_lines - i);
            value_passes[rows - 1](b, line + i, values, ahead, column, from, fewest);
        }
    if (most <= from || most == fewest)
        return;
    from = fewest > from ? fewest : from;
    add_values(b, line, num_lines / 2, values, ahead, from);
    add_values(b, line + num_lines / 2, num_lines - num_lines / 2, values, ahead, from);
}

/* The lines of a bundle take in the keys and values of one span, of which each sees the first `seen`. `ahead`: SPAN keys
   that are fetched meanwhile, since they come next, or NULL. */
static void attend_span(const Bundle *b, const float *const *keys, const float *const *values,
                        const float *const *ahead, float scale)
{
    int64_t most = 0;
    for (int64_t i = 0; i < b->num_lines; i++)
        most = b->seen[i] > most ? b->seen[i] : most;
    if (most == 0)
        return;
    score_keys(b, keys, ahead, most);
    soften(b, most, scale);
    add_values(b, 0, b->num_lines, values, ahead, 0);
}

static int32_t seen_of(int32_t position, int64_t start)
{
    const int64_t seen = position + 1 - start;
    return (int32_t)(seen < 0 ? 0 : seen < SPAN ? seen : SPAN);
}

static void store_line(float *out, const float *sum, float total, int64_t n)
{
    for (int64_t c = 0; c < n; c++)
        out[c] = sum[c] / total;
}
