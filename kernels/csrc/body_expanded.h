/* Multi-head latent attention in the expanded form (DeepSeek-V2, arXiv 2405.04434, section 2.1): the latents of the
   context are turned into this head's keys and values, a span at a time, and all lines (rows of this head) go through
   them. Keys are not cut into segments: there are enough rows and heads to share out. */

typedef struct {
    const Expanded *expanded;
    const AttentionTile *tile;
    int64_t key_width, out_width;
    float *keys, *values, *product; /* [SPAN][key_width], [SPAN][out_width], scratch of panel_gemm */
    float *scores, *first;          /* first: the bundles' memory */
} Expansion;

static Expansion open_expansion(const Expanded *e, const AttentionTile *tile, float *scratch)
{
    Expansion x = {.expanded = e, .tile = tile, .key_width = e->key->num_out + e->rope_width,
                   .out_width = expanded_width(e)};
    x.keys = scratch;
    x.values = x.keys + SPAN * x.key_width;
    x.product = x.values + SPAN * x.out_width;
    x.scores = x.product + expanded_product(e);
    x.first = x.scores + SPAN * PANEL;
    return x;
}

/* The bundle of rows from `row` of the tile on, at `memory`; returns the end of its memory. */
static float *find_bundle(const Expansion *x, int64_t row, float *memory, Bundle *b)
{
    const int64_t left = x->tile->num_rows - row;
    return open_bundle(b, left < PANEL ? left : PANEL, x->key_width, x->out_width, x->scores, memory);
}

/* to[num_keys][stride] = latents times the matrix of one head. */
static void expand(const Expansion *x, const Matrix *m, const float *const *latents, int64_t num_keys, float *to,
                   int64_t stride)
{
    const Panels all = {m, 1, 0, (m->num_out + PANEL - 1) / PANEL, 0};
    float *out[SPAN];
    for (int64_t j = 0; j < num_keys; j++)
        out[j] = to + j * stride;
    panel_gemm(&all, latents, num_keys, out, x->product);
}

static void expand_span(const Expansion *x, int64_t start, int64_t num_keys)
{
    const Expanded *e = x->expanded;
    const int64_t latent = e->key->num_in, width = latent + e->rope_width;
    const int32_t *table = e->at.tables + e->at.row_seq[x->tile->row] * e->at.max_blocks;
    const float *latents[SPAN];
    for (int64_t j = 0; j < num_keys; j++) {
        const int64_t position = start + j;
        latents[j] = e->at.cache + (table[position / KEY_BLOCK] * (int64_t)KEY_BLOCK + position % KEY_BLOCK) * width;
        memcpy(x->keys + j * x->key_width + e->key->num_out, latents[j] + latent, e->rope_width * sizeof(float));
    }
    expand(x, e->key + x->tile->head, latents, num_keys, x->keys, x->key_width);
    expand(x, e->value + x->tile->head, latents, num_keys, x->values, x->out_width);
}

static void begin_bundles(const Expansion *x)
{
    const Expanded *e = x->expanded;
    float *memory = x->first;
    Bundle b;
    for (int64_t row = 0; row < x->tile->num_rows; row += PANEL) {
        const float *queries[PANEL];
        memory = find_bundle(x, row, memory, &b);
        for (int64_t i = 0; i < b.num_lines; i++)
            queries[i] = e->query + (x->tile->row + row + i) * e->query_strides[0] +
                         x->tile->head * e->query_strides[1];
        load_queries(&b, queries, 0, x->key_width);
        reset_bundle(&b);
    }
}

static void attend_expanded(const Expanded *e, const AttentionTile *tile, float *scratch)
{
    const Expansion x = open_expansion(e, tile, scratch);
    const int32_t *positions = e->at.positions + tile->row;
    const float *keys[SPAN], *values[SPAN];
    int64_t last = 0;
    for (int64_t i = 0; i < tile->num_rows; i++)
        last = positions[i] > last ? positions[i] : last;
    for (int64_t j = 0; j < SPAN; j++) {
        keys[j] = x.keys + j * x.key_width;
        values[j] = x.values + j * x.out_width;
    }
    begin_bundles(&x);
    Bundle b;
    for (int64_t start = 0; start <= last; start += SPAN) {
        float *memory = x.first;
        expand_span(&x, start, last + 1 - start < SPAN ? last + 1 - start : SPAN);
        for (int64_t row = 0; row < tile->num_rows; row += PANEL) {
            memory = find_bundle(&x, row, memory, &b);
            for (int64_t i = 0; i < b.num_lines; i++)
                b.seen[i] = seen_of(positions[row + i], start);
            attend_span(&b, keys, values, NULL, e->scale);
        }
    }
    float *memory = x.first;
    for (int64_t row = 0; row < tile->num_rows; row += PANEL) {
        memory = find_bundle(&x, row, memory, &b);
        for (int64_t i = 0; i < b.num_lines; i++)
            store_line(e->out + ((tile->row + row + i) * e->num_heads + tile->head) * e->value->num_out,
                       b.out + i * b.out_width, b.total[i], e->value->num_out);
    }
}
