/* Multi-head latent attention in the absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C) with
   online softmax (Milakov and Gimelshein, arXiv 1805.02867) over key blocks of 32 positions, in order. A line is one
   (row, head); what it computes depends on its own query and keys alone. */

typedef struct {
    int64_t width, out_width; /* floats of one query or key, and of one output, in scratch */
    float *query, *out, *weights, *top, *total, *keys;
} Lines;

static Lines lines_of(const Attention *a, int64_t num_lines, float *scratch)
{
    Lines l = {.width = attend_width(a), .out_width = round_up(a->latent_width, PANEL)};
    l.query = scratch;
    l.out = l.query + num_lines * l.width;
    l.weights = l.out + num_lines * l.out_width;
    l.top = l.weights + num_lines * KEY_BLOCK;
    l.total = l.top + num_lines * 16;
    l.keys = l.total + num_lines * 16;
    return l;
}

static void load_queries(const Attention *a, const AttentionTile *tile, Lines *l)
{
    for (int64_t i = 0; i < tile->num_rows * tile->num_heads; i++) {
        const int64_t row = tile->row + i / tile->num_heads, head = tile->head + i % tile->num_heads;
        float *query = l->query + i * l->width;
        memcpy(query, a->latent + row * a->latent_strides[0] + head * a->latent_strides[1], a->latent_width * 4);
        memcpy(query + a->latent_width, a->rope + row * a->rope_strides[0] + head * a->rope_strides[1],
               a->rope_width * 4);
        memset(query + a->latent_width + a->rope_width, 0, (l->width - a->latent_width - a->rope_width) * 4);
        memset(l->out + i * l->out_width, 0, l->out_width * 4);
        l->top[i] = -INFINITY;
        l->total[i] = 0.0f;
    }
}

/* Keys of widths that do not fill vectors are copied into padded scratch. */
static const float *keys_of(const Attention *a, int64_t block, Lines *l, int64_t *stride)
{
    const int64_t width = a->latent_width + a->rope_width;
    const float *keys = a->at.cache + block * KEY_BLOCK * width;
    *stride = width;
    if (width % 16 == 0 && a->latent_width % PANEL == 0)
        return keys;
    for (int64_t j = 0; j < KEY_BLOCK; j++) {
        memcpy(l->keys + j * l->width, keys + j * width, width * 4);
        memset(l->keys + j * l->width + width, 0, (l->width - width) * 4);
    }
    *stride = l->width;
    return l->keys;
}

/* Products of `rows` queries with DOT_KEYS keys: 16 virtual lanes along the vectors, a strip of them at a time so that
   the accumulators fit in registers. */
INLINE void dot_tile(const int rows, const float *query, int64_t query_stride, const float *keys, int64_t key_stride,
                     int64_t width, float *out)
{
    vf lanes[DOT_ROWS * DOT_KEYS + 3][NUM_STRIPS]; /* up to 3 unused: sums are taken by fours */
    for (int s = 0; s < NUM_STRIPS; s++) {
        vf acc[DOT_ROWS][DOT_KEYS];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < DOT_KEYS; j++)
                acc[r][j] = splat(0.0f);
        for (int64_t i = s * VL; i < width; i += 16) {
            vf key[DOT_KEYS];
            for (int j = 0; j < DOT_KEYS; j++)
                key[j] = load(keys + j * key_stride + i);
            for (int r = 0; r < rows; r++) {
                vf q = load(query + r * query_stride + i);
                for (int j = 0; j < DOT_KEYS; j++)
                    acc[r][j] = fused(q, key[j], acc[r][j]);
            }
        }
        for (int i = 0; i < DOT_ROWS * DOT_KEYS + 3; i++)
            lanes[i][s] = i < rows * DOT_KEYS ? acc[i / DOT_KEYS][i % DOT_KEYS] : splat(0.0f);
    }
    for (int first = 0; first < rows * DOT_KEYS; first += 4) {
        float sums[4];
        sum_lanes4(lanes + first, sums);
        for (int i = first; i < first + 4 && i < rows * DOT_KEYS; i++)
            out[i / DOT_KEYS * KEY_BLOCK + i % DOT_KEYS] = sums[i - first];
    }
}

/* scores[num_lines][32]; columns from num_keys (rounded up to DOT_KEYS) on are left as they are. */
static void dot_block(const Lines *l, int64_t line, int64_t num_lines, const float *keys, int64_t stride,
                      int64_t width, int64_t num_keys)
{
    const int64_t stop = line + num_lines;
    for (; line < stop; line += DOT_ROWS)
        for (int64_t j = 0; j < num_keys; j += DOT_KEYS) {
            const float *query = l->query + line * l->width, *key = keys + j * stride;
            float *out = l->weights + line * KEY_BLOCK + j;
            if (stop - line >= DOT_ROWS)
                dot_tile(DOT_ROWS, query, l->width, key, stride, width, out);
            else
                for (int64_t r = 0; r < stop - line; r++)
                    dot_tile(1, query + r * l->width, l->width, key, stride, width, out + r * KEY_BLOCK);
        }
}

/* Scores become weights exp(score - top), those after the first num_keys zero up to a multiple of KEY_BLOCK; returns by
   what the sums so far are to be multiplied. Subnormal weights become zero too: beside a weight of 1 they are nothing,
   and products with them take several times as long. */
static float soften(float *weights, int64_t num_keys, float scale, float *top, float *total)
{
    const int64_t stop = round_up(num_keys, KEY_BLOCK);
    for (int64_t j = 0; j < num_keys; j++)
        weights[j] *= scale;
    for (int64_t j = num_keys; j < stop; j++)
        weights[j] = -INFINITY;
    const float block_top = row_max(weights, stop), new_top = block_top > *top ? block_top : *top;
    const float shrink = *top == new_top ? 1.0f : exp_one(*top - new_top);
    vf lanes[NUM_STRIPS];
    for (int s = 0; s < NUM_STRIPS; s++)
        lanes[s] = splat(0.0f);
    for (int64_t j = 0; j < stop; j += 16)
        for (int s = 0; s < NUM_STRIPS; s++) {
            vf weight = vexp(load(weights + j + s * VL) - splat(new_top));
            weight = pick((vi)(weight < splat(0x1p-126f)), splat(0.0f), weight);
            store(weights + j + s * VL, weight);
            lanes[s] = lanes[s] + weight;
        }
    *total = *total * shrink + sum16(lanes);
    *top = new_top;
    return shrink;
}

static void scale_line(float *out, int64_t n, float factor)
{
    for (int64_t i = 0; i < n; i += VL)
        store(out + i, load(out + i) * splat(factor));
}

/* Lines [line, line + num_lines) take in the first num_keys keys of one block. */
static void attend_block(const Attention *a, const Lines *l, int64_t line, int64_t num_lines, const float *keys,
                         int64_t stride, int64_t num_keys)
{
    const float *rows[ROW_CHUNK];
    const int64_t width = round_up(a->latent_width + a->rope_width, 16);
    dot_block(l, line, num_lines, keys, stride, width, num_keys);
    for (int64_t i = 0; i < num_lines; i++) {
        const int64_t at = line + i;
        rows[i] = l->weights + at * KEY_BLOCK;
        float shrink = soften(l->weights + at * KEY_BLOCK, num_keys, a->scale, l->top + at, l->total + at);
        if (shrink != 1.0f)
            scale_line(l->out + at * l->out_width, l->out_width, shrink);
    }
    for (int64_t column = 0; column < l->out_width; column += PANEL) {
        Tile t = {.rows = rows, .count = num_keys, .weights = (const uint8_t *)(keys + column), .stride = stride,
                  .acc = l->out + line * l->out_width + column, .acc_stride = l->out_width};
        run_tiles(KIND_STRIDED, t, num_lines);
    }
}

static void store_lines(const Attention *a, const AttentionTile *tile, const Lines *l)
{
    for (int64_t i = 0; i < tile->num_rows * tile->num_heads; i++) {
        const int64_t row = tile->row + i / tile->num_heads, head = tile->head + i % tile->num_heads;
        float *out = a->out + (row * a->num_heads + head) * a->latent_width;
        for (int64_t c = 0; c < a->latent_width; c++)
            out[c] = l->out[i * l->out_width + c] / l->total[i];
    }
}

/* Rows that see a whole block go through it together; a row that sees part of it goes alone, so that it meets exactly
   its own keys whatever its neighbours see. */
static void attend(const Attention *a, const AttentionTile *tile, float *scratch)
{
    Lines l = lines_of(a, tile->num_rows * tile->num_heads, scratch);
    const int32_t *positions = a->at.positions + tile->row;
    const int32_t *table = a->at.tables + a->at.row_seq[tile->row] * a->at.max_blocks;
    int64_t last = 0, stride;
    load_queries(a, tile, &l);
    for (int64_t i = 0; i < tile->num_rows; i++)
        last = positions[i] > last ? positions[i] : last;
    for (int64_t block = 0; block * KEY_BLOCK <= last; block++) {
        const float *keys = keys_of(a, table[block], &l, &stride);
        for (int64_t i = 0, next; i < tile->num_rows; i = next) {
            int64_t seen = positions[i] + 1 - block * KEY_BLOCK;
            next = i + 1;
            if (seen <= 0)
                continue;
            while (seen >= KEY_BLOCK && next < tile->num_rows && positions[next] + 1 - block * KEY_BLOCK >= KEY_BLOCK)
                next++;
            attend_block(a, &l, i * tile->num_heads, (next - i) * tile->num_heads, keys, stride,
                         seen < KEY_BLOCK ? seen : KEY_BLOCK);
        }
    }
    store_lines(a, tile, &l);
}
