/* Multi-head latent attention in the absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and appendix C): keys
   and values are the cached latents. The context is cut into segments at fixed positions; each is summed by itself and
   the sums are joined in order, so that threads can share one sequence's context without a trace in the bits. */

typedef struct {
    const Attention *attention;
    const AttentionTile *tile;
    Bundle bundles[TILE_LINES / PANEL];
    int64_t num_bundles, padded; /* padded: floats of a copied key */
    float *copies;               /* [2][SPAN][padded], of keys whose widths do not fill vectors */
    float *joined;               /* [lines][part_width] */
} Absorbed;

static void line_of(const AttentionTile *tile, int64_t line, int64_t *row, int64_t *head)
{
    *row = tile->row + line / tile->num_heads;
    *head = tile->head + line % tile->num_heads;
}

static Absorbed open_absorbed(const Attention *a, const AttentionTile *tile, float *scratch)
{
    const int64_t num_lines = tile->num_rows * tile->num_heads, width = a->latent_width + a->rope_width;
    const int64_t out_width = round_up(a->latent_width, PANEL);
    Absorbed s = {.attention = a, .tile = tile, .padded = attend_padded(a)};
    float *scores = scratch;
    s.copies = scores + SPAN * PANEL;
    s.joined = s.copies + 2 * SPAN * s.padded;
    float *next = s.joined + num_lines * attend_part_width(a);
    for (int64_t line = 0; line < num_lines; line += PANEL) {
        const int64_t count = num_lines - line < PANEL ? num_lines - line : PANEL;
        const float *latents[PANEL], *ropes[PANEL];
        for (int64_t i = 0, row, head; i < count; i++) {
            line_of(tile, line + i, &row, &head);
            latents[i] = a->latent + row * a->latent_strides[0] + head * a->latent_strides[1];
            ropes[i] = a->rope + row * a->rope_strides[0] + head * a->rope_strides[1];
        }
        Bundle *b = &s.bundles[s.num_bundles++];
        next = open_bundle(b, count, width, out_width, scores, next);
        load_queries(b, latents, 0, a->latent_width);
        load_queries(b, ropes, a->latent_width, a->rope_width);
    }
    return s;
}

/* Where the keys of the span from `start` on lie. Those of a width that does not fill vectors are copied, to one of two
   places, so that values may be read beyond their end. */
static void find_keys(const Absorbed *s, int64_t start, int64_t num_keys, int place, const float **keys)
{
    const Attention *a = s->attention;
    const int64_t width = a->latent_width + a->rope_width;
    const int32_t *table = a->at.tables + a->at.row_seq[s->tile->row] * a->at.max_blocks;
    for (int64_t j = 0; j < num_keys; j++) {
        const int64_t position = start + j;
        keys[j] = a->at.cache + (table[position / KEY_BLOCK] * (int64_t)KEY_BLOCK + position % KEY_BLOCK) * width;
        if (a->latent_width % PANEL) {
            float *copy = s->copies + (place * SPAN + j) * s->padded;
            memcpy(copy, keys[j], width * sizeof(float));
            keys[j] = copy;
        }
    }
}

static int64_t last_position(const Attention *a, const AttentionTile *tile)
{
    const int32_t *positions = a->at.positions + tile->row;
    int64_t last = 0;
    for (int64_t i = 0; i < tile->num_rows; i++)
        last = positions[i] > last ? positions[i] : last;
    return last;
}

/* The sums over one segment's keys, in the bundles. Its first span's keys are in `keys`, as are afterwards those of the
   next segment, unless that begins at `limit`. */
static void sum_segment(const Absorbed *s, int64_t segment, int64_t limit, const float *keys[2][SPAN], int *turn)
{
    const Attention *a = s->attention;
    const int64_t end = (segment + 1) * SEGMENT;
    for (int64_t i = 0; i < s->num_bundles; i++)
        reset_bundle(&s->bundles[i]);
    for (int64_t start = segment * SEGMENT; start < end && start < limit; start += SPAN, *turn ^= 1) {
        const float **now = keys[*turn], **ahead = keys[*turn ^ 1];
        const int64_t num_ahead = limit - start - SPAN < SPAN ? limit - start - SPAN : SPAN;
        if (num_ahead > 0)
            find_keys(s, start + SPAN, num_ahead, *turn ^ 1, ahead);
        for (int64_t j = num_ahead > 0 ? num_ahead : 0; j < SPAN; j++)
            ahead[j] = now[0];
        for (int64_t i = 0; i < s->num_bundles; i++) {
            const Bundle *b = &s->bundles[i];
            for (int64_t line = 0, row, head; line < b->num_lines; line++) {
                line_of(s->tile, i * PANEL + line, &row, &head);
                b->seen[line] = seen_of(a->at.positions[row], start);
            }
            attend_span(b, now, now, ahead, a->scale);
        }
    }
}

/* A part of a line: the sum of its weighted values, its largest score, the sum of its weights (0: it sees no key).
   joined += part, each brought to the larger of their largest scores. */
static void join_part(float *joined, const float *sum, float part_top, float part_total, int64_t out_width)
{
    float *top = joined + out_width, *total = top + 1;
    const float new_top = part_top > *top ? part_top : *top;
    const float old = exp_one(*top - new_top), new = exp_one(part_top - new_top);
    if (part_total == 0.0f)
        return;
    for (int64_t i = 0; i < out_width; i += VL)
        store(joined + i, fused(load(sum + i), splat(new), load(joined + i) * splat(old)));
    *top = new_top;
    *total = *total * old + part_total * new;
}

/* What the bundles hold becomes the parts, or is joined to them. */
static void take_parts(const Absorbed *s, float *parts, int join)
{
    const int64_t width = attend_part_width(s->attention);
    for (int64_t i = 0; i < s->num_bundles; i++) {
        const Bundle *b = &s->bundles[i];
        for (int64_t line = 0; line < b->num_lines; line++) {
            float *part = parts + (i * PANEL + line) * width;
            const float *sum = b->out + line * b->out_width;
            if (join) {
                join_part(part, sum, b->top[line], b->total[line], b->out_width);
                continue;
            }
            memcpy(part, sum, b->out_width * sizeof(float));
            part[b->out_width] = b->top[line];
            part[b->out_width + 1] = b->total[line];
        }
    }
}

static void store_parts(const Attention *a, const AttentionTile *tile, const float *parts)
{
    const int64_t width = attend_part_width(a), total = round_up(a->latent_width, PANEL) + 1;
    for (int64_t line = 0, row, head; line < tile->num_rows * tile->num_heads; line++) {
        line_of(tile, line, &row, &head);
        store_line(a->out + (row * a->num_heads + head) * a->latent_width, parts + line * width,
                   parts[line * width + total], a->latent_width);
    }
}

/* Segments [first, stop) of the context: each to parts of its own, or all joined in the first of them. */
static void sum_segments(const Absorbed *s, int64_t first, int64_t stop, float *parts, int64_t stride)
{
    const float *keys[2][SPAN];
    const int64_t length = last_position(s->attention, s->tile) + 1, start = first * SEGMENT;
    const int64_t limit = length < stop * SEGMENT ? length : stop * SEGMENT;
    int turn = 0;
    if (start >= limit)
        return;
    find_keys(s, start, limit - start < SPAN ? limit - start : SPAN, 0, keys[0]);
    for (int64_t segment = first; segment * SEGMENT < limit; segment++) {
        sum_segment(s, segment, limit, keys, &turn);
        take_parts(s, parts + (segment - first) * stride, stride == 0 && segment > first);
    }
}

static void attend(const Attention *a, const AttentionTile *tile, float *scratch)
{
    const Absorbed s = open_absorbed(a, tile, scratch);
    sum_segments(&s, 0, last_position(a, tile) / SEGMENT + 1, s.joined, 0);
    store_parts(a, tile, s.joined);
}

/* The same in two steps: the parts of some segments, [segment][stride], and those of all segments joined. */
static void attend_segments(const Attention *a, const AttentionTile *tile, const Segments *range, float *scratch)
{
    const Absorbed s = open_absorbed(a, tile, scratch);
    sum_segments(&s, range->first, range->stop, range->parts, range->stride);
}

static void join_segments(const Attention *a, const AttentionTile *tile, const Segments *range)
{
    const int64_t width = attend_part_width(a), out_width = round_up(a->latent_width, PANEL);
    const int64_t num_lines = tile->num_rows * tile->num_heads, num_segments = last_position(a, tile) / SEGMENT + 1;
    for (int64_t segment = 1; segment < num_segments; segment++)
        for (int64_t line = 0; line < num_lines; line++) {
            const float *part = range->parts + segment * range->stride + line * width;
            join_part(range->parts + line * width, part, part[out_width], part[out_width + 1], out_width);
        }
    store_parts(a, tile, range->parts);
}
