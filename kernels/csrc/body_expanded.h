/* Multi-head latent attention in the expanded form (DeepSeek-V2, arXiv 2405.04434, section 2.1): the latents of the
   context are turned into this head's keys and values, SPAN at a time, and all queries go through them with online
   softmax. What a query computes depends on its own keys alone: each of its sums runs over them in order. */

typedef struct {
    const Expanded *expanded;
    int64_t row, key_width, out_width; /* row: of the batch, at place 0 */
    float *keys;   /* [SPAN / PANEL][key_width][PANEL]: a panel for each 32 keys */
    float *values; /* [out_width / PANEL][SPAN][PANEL]: a panel for each 32 columns */
    float *product, *scores; /* [SPAN][PANEL], [SPAN_QUERIES][SPAN] */
    float *out, *top, *total; /* one for each query of the task */
} Span;

static Span span_of(const Expanded *e, const AttentionTile *tile, float *scratch)
{
    Span s = {.expanded = e, .row = tile->row, .key_width = e->key->num_out + e->rope_width,
              .out_width = expanded_width(e)};
    s.keys = scratch;
    s.values = s.keys + SPAN * s.key_width;
    s.product = s.values + SPAN * s.out_width;
    s.scores = s.product + SPAN * PANEL;
    s.out = s.scores + SPAN * SPAN_QUERIES;
    s.top = s.out + tile->num_rows * s.out_width;
    s.total = s.top + tile->num_rows;
    memset(s.out, 0, tile->num_rows * s.out_width * sizeof(float));
    for (int64_t i = 0; i < tile->num_rows; i++) {
        s.top[i] = -INFINITY;
        s.total[i] = 0.0f;
    }
    return s;
}

/* Columns of `rows` keys, at rows[j][column], become rows of their panels. */
static void turn_keys(const Span *s, const float *const *rows, int64_t num_keys, int64_t num_columns, int64_t at)
{
    for (int64_t j = 0; j < num_keys; j++) {
        float *to = s->keys + (j / PANEL * s->key_width + at) * PANEL + j % PANEL;
        for (int64_t column = 0; column < num_columns; column++)
            to[column * PANEL] = rows[j][column];
    }
}

/* Keys and values of positions [start, start + num_keys). */
static void expand_span(const Span *s, const int32_t *table, int64_t head, int64_t start, int64_t num_keys)
{
    const Expanded *e = s->expanded;
    const int64_t latent = e->key->num_in, width = latent + e->rope_width;
    const float *latents[SPAN], *columns[SPAN];
    Matrix key = *e->key, value = *e->value;
    key.panels += head * e->key_head_bytes;
    value.panels += head * e->value_head_bytes;
    for (int64_t j = 0; j < num_keys; j++) {
        const int64_t position = start + j;
        latents[j] = e->at.cache + (table[position / KEY_BLOCK] * (int64_t)KEY_BLOCK + position % KEY_BLOCK) * width;
        columns[j] = s->product + j * PANEL;
    }
    for (int64_t column = 0; column < key.num_out; column += PANEL) {
        panel_gemm(&key, column / PANEL, latents, num_keys, s->product, NULL);
        turn_keys(s, columns, num_keys, key.num_out - column < PANEL ? key.num_out - column : PANEL, column);
    }
    for (int64_t j = 0; j < num_keys; j++)
        columns[j] = latents[j] + latent;
    turn_keys(s, columns, num_keys, e->rope_width, key.num_out);
    for (int64_t column = 0; column < s->out_width; column += PANEL)
        panel_gemm(&value, column / PANEL, latents, num_keys, s->values + column * SPAN, NULL);
}

/* Adds the weighted values of keys [from, seen[i]) to each of num_rows queries: those that all of them see together,
   the others by halves, so that every query meets exactly its own keys. */
static void add_values(const Span *s, int64_t place, int64_t num_rows, const float *const *weights,
                       const int64_t *seen, int64_t from)
{
    int64_t common = seen[0];
    for (int64_t i = 1; i < num_rows; i++)
        common = seen[i] < common ? seen[i] : common;
    for (int64_t column = 0; common > from && column < s->out_width; column += PANEL) {
        Tile t = {.rows = weights, .k = from, .count = common - from,
                  .weights = (const uint8_t *)(s->values + column * SPAN + from * PANEL),
                  .acc = s->out + place * s->out_width + column, .acc_stride = s->out_width};
        run_tiles(KIND_F32, t, num_rows);
    }
    if (num_rows == 1)
        return;
    const int64_t half = num_rows / 2;
    from = common > from ? common : from;
    for (int64_t i = 0; i < num_rows; i++)
        if (seen[i] > from) {
            add_values(s, place, half, weights, seen, from);
            add_values(s, place + half, num_rows - half, weights + half, seen + half, from);
            return;
        }
}

/* Queries [place, place + num_rows) take in the first seen[i] keys of the span. */
static void attend_span(const Span *s, int64_t head, int64_t place, int64_t num_rows, const int64_t *seen)
{
    const Expanded *e = s->expanded;
    const float *queries[SPAN_QUERIES], *weights[SPAN_QUERIES];
    int64_t most = 0;
    for (int64_t i = 0; i < num_rows; i++) {
        queries[i] = e->query + (s->row + place + i) * e->query_strides[0] + head * e->query_strides[1];
        weights[i] = s->scores + i * SPAN;
        most = seen[i] > most ? seen[i] : most;
    }
    for (int64_t key = 0; key < most; key += PANEL) {
        Tile t = {.rows = queries, .count = s->key_width, .weights = (const uint8_t *)(s->keys + key * s->key_width),
                  .acc = s->scores + key, .acc_stride = SPAN, .first = 1};
        run_tiles(KIND_F32, t, num_rows);
    }
    for (int64_t i = 0; i < num_rows; i++) {
        float shrink = soften(s->scores + i * SPAN, seen[i], e->scale, s->top + place + i, s->total + place + i);
        if (shrink != 1.0f)
            scale_line(s->out + (place + i) * s->out_width, s->out_width, shrink);
    }
    add_values(s, place, num_rows, weights, seen, 0);
}

static void store_queries(const Span *s, int64_t head, int64_t num_rows)
{
    const Expanded *e = s->expanded;
    const int64_t width = e->value->num_out;
    for (int64_t i = 0; i < num_rows; i++) {
        float *out = e->out + ((s->row + i) * e->num_heads + head) * width;
        for (int64_t c = 0; c < width; c++)
            out[c] = s->out[i * s->out_width + c] / s->total[i];
    }
}

static void attend_expanded(const Expanded *e, const AttentionTile *tile, float *scratch)
{
    const Span s = span_of(e, tile, scratch);
    const int32_t *positions = e->at.positions + tile->row;
    const int32_t *table = e->at.tables + e->at.row_seq[tile->row] * e->at.max_blocks;
    int64_t last = 0, seen[SPAN_QUERIES];
    for (int64_t i = 0; i < tile->num_rows; i++)
        last = positions[i] > last ? positions[i] : last;
    for (int64_t start = 0; start <= last; start += SPAN) {
        expand_span(&s, table, tile->head, start, last + 1 - start < SPAN ? last + 1 - start : SPAN);
        for (int64_t i = 0, count; i < tile->num_rows; i += count ? count : 1) {
            for (count = 0; count < SPAN_QUERIES && i + count < tile->num_rows; count++) {
                const int64_t keys = positions[i + count] + 1 - start;
                if (keys <= 0)
                    break;
                seen[count] = keys < SPAN ? keys : SPAN;
            }
            if (count)
                attend_span(&s, tile->head, i, count, seen);
        }
    }
    store_queries(&s, tile->head, tile->num_rows);
}
