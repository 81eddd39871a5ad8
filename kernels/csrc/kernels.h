/* Shapes and tables shared by the instruction-set variants (isa_*.c), the drivers (ops*.c) and the Python module. */
#ifndef MOEMESH_KERNELS_H
#define MOEMESH_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define PANEL 32      /* output columns of one weight panel */
#define ROW_CHUNK 96  /* most rows one task carries through a panel */
#define KEY_BLOCK 32  /* positions of one block of the latent cache */

enum { KIND_F32, KIND_BF16, KIND_F16, KIND_FP8, KIND_INT8, KIND_PAIRS, NUM_KINDS };
enum { METHOD_GREEDY, METHOD_GROUP_LIMITED_GREEDY, METHOD_NOAUX_TC };

/* A weight matrix [num_out, num_in] in panels [num_panels][num_in][32]. Every field is 8 bytes wide: Python fills this
   struct as an int64 tensor (kernels/panels.py, same order). bfloat16 and fp8 panels hold column i at place 2i and
   column 16 + i at place 2i + 1, so that one load and one shift or mask give two vectors of neighbouring columns.
   KIND_PAIRS is bfloat16 too, of the arithmetic bf16x3: [num_panels][num_in / 2][32][2], two neighbouring k of a column
   beside each other, as tiles of AMX want them. num_in / num_shards is then a multiple of PAIR_STEP. */
typedef struct {
    const uint8_t *panels;
    const float *scales; /* fp8 and int8: [num_panels][scale blocks][scale_width] */
    int64_t kind, num_out, num_in, num_shards;
    int64_t panel_stride; /* bytes from one panel to the next */
    int64_t scale_stride; /* floats from the scales of one panel to the next */
    int64_t block_cols;   /* fp8, int8: columns (k) under one scale */
    int64_t block_phase;  /* fp8, int8: columns of the first scale block that lie before column 0 of this matrix */
    int64_t scale_width;  /* fp8, int8: 1 = one scale for the panel, 32 = one for each of its columns */
} Matrix;

/* All experts of one layer; the matrices are those of expert 0, the strides lead to the next expert. */
typedef struct {
    Matrix gate, up, down;
    int64_t num_experts, data_stride /* bytes */, scale_stride /* floats */;
} Experts;

/* Panels [first, first + count) of a matrix: the columns of one product. Or of two matrices that differ in their weights
   alone, gate and up: the columns of swiglu of both products. */
typedef struct {
    const Matrix *matrices;
    int64_t num_matrices, first, count;
    int stream; /* the result is too large to stay in a cache */
} Panels;

/* One layer of multi-head latent attention on one rank (kernels/mla.py fills it, same order). Without query_down the
   query is the hidden state itself; biases may be NULL. */
typedef struct {
    const Matrix *query_down;
    const float *query_down_bias, *query_norm;
    const Matrix *latent_down;
    const float *latent_down_bias, *latent_norm;
    const Matrix *query_up, *key_up, *value_up; /* the last two: one matrix for each head */
    const Matrix *key_expand; /* latent to key by heads, for rows of the expanded form; may be NULL */
    int64_t num_heads, latent_width, interleave;
    double eps, scale;
    const Matrix *const *outputs;
    int64_t num_outputs;
} Mla;

/* Where the rows of a micro-batch stand (kernels/layout.py). */
typedef struct {
    const int32_t *positions;
    const float *cosine, *sine; /* [num_rows][rope width / 2] */
    const int64_t *slots;       /* place in the cache that each row is written to */
    const int32_t *row_seq, *tables;
    const int32_t *expanded_until; /* by sequence: positions before it take the expanded form; NULL: none does */
    int64_t num_rows, num_seqs, max_blocks;
} MlaBatch;

/* Spans of sequences, to be laid out as rows (kernels/layout.py). */
typedef struct {
    const int32_t *spans; /* of each: first position, number of positions, expanded_until, number of blocks, blocks */
    int64_t num_spans, max_blocks, num_rows, expands;
    const float *cosine, *sine; /* [num_positions][half] */
    int64_t num_positions, half;
} Layout;

/* One layer of a rank that has all of it (kernels/layers.py fills it, same order). `experts` and what belongs to the gate
   are 0 in a dense layer; `ffn` is the dense network there, elsewhere the shared expert (NULL where there is none). */
typedef struct {
    const float *input_norm;
    const Mla *attention;
    const float *output_bias; /* may be NULL */
    float *cache;
    const float *ffn_norm;
    const Experts *ffn, *experts;
    const int32_t *place_of; /* [num_experts] place of each in `experts` */
    int64_t *counts;         /* [num_experts] gets 1 for each choice; may be NULL */
    const Matrix *gate;
    const float *gate_bias;
    int64_t num_experts, num_groups, topk_groups, top_k, softmax, method, normalize;
    double scale;
} Layer;

typedef struct {
    const Layer *layers;
    int64_t num_layers, hidden, num_blocks; /* num_blocks: of each layer's cache */
    double eps;
    const uint8_t *embedding; /* [num_ids][hidden] of `kind` */
    int64_t kind, num_ids;
} Stack;

typedef struct {
    const float *logits, *bias; /* bias may be NULL */
    int32_t *ids;
    float *weights;
    int64_t num_rows, num_experts, num_groups, topk_groups, top_k, softmax, method, normalize;
    float scale;
} Route;

/* How one row is sampled (kernels/sampling.py fills it, same order). Temperature 0: the best, without a draw. */
typedef struct {
    double temperature, top_p, min_p, repetition, frequency, presence;
    double random; /* in [0, 1) */
    int64_t top_k;
    const int32_t *tokens; /* prompt, then output */
    int64_t num_prompt, num_tokens;
    const int32_t *masked;
    int64_t num_masked;
    const int32_t *bias_ids;
    const double *bias;
    int64_t num_bias;
} Draw;

enum { NOT_FINITE = -1, NO_TOKEN = -2 }; /* in place of a sampled token */

typedef struct {
    const float *logits; /* [num_rows][vocab] */
    const int64_t *tokens, *num_top;
    int64_t vocab, most_top;
    float *logprob; /* NaN where the row's logits are not finite */
    int64_t *rank, *top_ids;
    float *top_logprobs; /* [num_rows][most_top] like top_ids */
} Scoring;

/* Where the rows of an attention call stand: row t is position positions[t] of sequence row_seq[t], whose cache blocks
   tables[row_seq[t]] names. */
typedef struct {
    const float *cache; /* [num_blocks][KEY_BLOCK][latent width + rope width] */
    const int32_t *tables, *row_seq, *positions;
    int64_t num_rows, num_blocks, num_seqs, max_blocks;
} Paging;

/* The absorbed form: keys and values are the latents themselves. */
typedef struct {
    Paging at;
    const float *latent, *rope;
    float *out;
    int64_t latent_strides[2], rope_strides[2]; /* floats: row, head */
    int64_t num_heads, latent_width, rope_width;
    float scale;
} Attention;

/* The expanded form: keys and values are computed from the latents, those of head h by key[h] and value[h]. A query is
   the part that meets such a key, then the rotated part. */
typedef struct {
    Paging at;
    const int32_t *until; /* only rows before position until[row_seq[t]]; NULL: all */
    const Matrix *key, *value;
    const float *query;
    float *out; /* [num_rows][num_heads][value width] */
    int64_t query_strides[2]; /* floats: row, head */
    int64_t num_heads, rope_width;
    float scale;
} Expanded;

/* One piece of attention work: heads [head, head + num_heads) of rows [row, row + num_rows), all of one sequence. */
typedef struct {
    int64_t row, num_rows, head, num_heads;
} AttentionTile;

/* Segments [first, stop) of a tile's context, and what becomes of them: parts[stop - first][stride]. */
typedef struct {
    int64_t first, stop, stride;
    float *parts;
} Segments;

/* A weight [..., num_in] that becomes int8 with a scale for each `block` elements of a row, the last block shorter. */
typedef struct {
    const uint8_t *source; /* of `kind`: float32, bfloat16 or float16 */
    int64_t kind, row_bytes, num_rows, num_in, block;
    int8_t *values;
    float *scales;
} Quantize;

/* The leaf functions that exist once per instruction set. All variants give the same bits. */
typedef struct {
    const char *name;
    void (*panel_gemm)(const Panels *p, const float *const *rows, int64_t num_rows, float *const *out, float *scratch);
    void (*rms_norm)(const float *x, const float *weight, float *y, int64_t n, float eps);
    void (*rope)(float *x, int64_t half, const float *cosine, const float *sine, int interleave);
    void (*log_softmax)(const float *x, float *y, int64_t n);
    int64_t (*argmax)(const float *x, int64_t n);
    void (*widen)(int64_t kind, const void *p, float *y, int64_t n);
    void (*exp_doubles)(const double *x, double *y, int64_t n); /* x is at most 0 */
    void (*route)(const Route *r, int64_t row, float *scratch);
    void (*combine)(const float *rows, const int32_t *slots, const float *weights, int64_t top_k, const float *base,
                    float *y, int64_t n);
    int (*quantize)(const Quantize *q, int64_t row);
    void (*tree_add)(const float *const *parts, int64_t num_parts, float *y, int64_t start, int64_t stop);
    void (*attend)(const Attention *a, const AttentionTile *tile, float *scratch);
    void (*attend_segments)(const Attention *a, const AttentionTile *tile, const Segments *range, float *scratch);
    void (*join_segments)(const Attention *a, const AttentionTile *tile, const Segments *range);
    void (*attend_expanded)(const Expanded *e, const AttentionTile *tile, float *scratch); /* one head */
} KernelTable;

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

#define PAIR_STEP 32 /* k that one instruction on tiles takes in */
#define TILE_ROWS 16

/* Rows times pairs: blocks of equally many rows, an even number of blocks where one is not enough. */
static inline int64_t pair_blocks(int64_t num_rows) { return num_rows <= TILE_ROWS ? 1 : (num_rows + 31) / 32 * 2; }
static inline int64_t pair_rows(int64_t num_rows) { return round_up(num_rows, pair_blocks(num_rows)); }
/* k whose parts of the rows are held at a time, so that they stay in the L2 cache. */
static inline int64_t pair_slice(int64_t num_rows)
{
    return num_rows <= TILE_ROWS ? 2048 : 1024;
}

/* Scratch of panel_gemm: sums of all rows and columns, the rows gemm_stride floats apart (not a power of two, so that
   they do not fall into the same sets of a cache); where K is cut in shards, as much again for each level of their tree.
   For pairs: sums of as many rows as fill the blocks, then the three parts of a slice of each row. */
static inline int64_t gemm_stride(const Panels *p) { return p->num_matrices * p->count * PANEL + 16; }
static inline int64_t num_levels(const Matrix *m)
{
    int64_t levels = 1;
    for (int64_t shards = m->num_shards; shards > 1; shards /= 2)
        levels++;
    return levels;
}
static inline int64_t gemm_sums(const Panels *p, int64_t num_rows)
{
    const int64_t levels = num_levels(p->matrices);
    if (p->matrices->kind != KIND_PAIRS)
        return levels * num_rows * gemm_stride(p);
    return levels * pair_rows(num_rows) * PANEL * p->num_matrices * p->count;
}
static inline int64_t gemm_scratch(const Panels *p, int64_t num_rows)
{
    const int64_t slice = pair_slice(num_rows), most = pair_slice(1), num_in = p->matrices->num_in;
    const int64_t parts = 3 * pair_rows(num_rows) * (num_in < slice ? num_in : slice) + 16;
    const int64_t parts_of_few = 3 * TILE_ROWS * (num_in < most ? num_in : most) + 16; /* they take longer slices */
    return gemm_sums(p, num_rows) +
           (p->matrices->kind != KIND_PAIRS ? 0 : parts > parts_of_few ? parts : parts_of_few);
}

/* Floats of scratch that route and attend need. */
static inline int64_t route_scratch(int64_t num_experts) { return 4 * round_up(num_experts, 16); }

#define SPAN 128      /* keys that a query takes in at a time, from a multiple of SPAN on */
#define SEGMENT 256   /* keys of the absorbed form that are summed by themselves, from a multiple of SEGMENT on */
#define TILE_LINES 64 /* (row, head) pairs of the absorbed form that go through the keys together, at most */
static inline int64_t bundle_scratch(int64_t num_lines, int64_t width, int64_t out_width)
{
    const int64_t lanes = round_up(num_lines, 16);
    return lanes * (width + 3) + num_lines * out_width;
}
static inline int64_t attend_part_width(const Attention *a) { return round_up(a->latent_width, PANEL) + 16; }
static inline int64_t attend_padded(const Attention *a)
{
    const int64_t whole = a->latent_width + a->rope_width, values = round_up(a->latent_width, PANEL);
    return a->latent_width % PANEL == 0 ? 0 : whole > values ? whole : values;
}
static inline int64_t attend_scratch(const Attention *a)
{
    const int64_t out_width = round_up(a->latent_width, PANEL);
    return SPAN * (PANEL + 2 * attend_padded(a)) + TILE_LINES * attend_part_width(a) +
           bundle_scratch(TILE_LINES, a->latent_width + a->rope_width, out_width);
}
static inline int64_t expanded_width(const Expanded *e) { return round_up(e->value->num_out, PANEL); }
static inline int64_t expanded_product(const Expanded *e)
{
    const int64_t key = gemm_scratch(&(Panels){e->key, 1, 0, (e->key->num_out + PANEL - 1) / PANEL, 0}, SPAN);
    const int64_t value = gemm_scratch(&(Panels){e->value, 1, 0, (e->value->num_out + PANEL - 1) / PANEL, 0}, SPAN);
    return key > value ? key : value;
}
static inline int64_t expanded_scratch(const Expanded *e, int64_t rows)
{
    const int64_t key_width = e->key->num_out + e->rope_width;
    return SPAN * (key_width + expanded_width(e) + PANEL) + expanded_product(e) +
           bundle_scratch(round_up(rows, PANEL), key_width, expanded_width(e));
}

#if defined(__x86_64__)
extern const KernelTable kernels_avx512, kernels_avx2;
#endif
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAVE_AMX 1 /* the compiler knows its instructions, and the system can be asked for its registers */
extern const KernelTable kernels_amx;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
#define HAVE_GENERIC 1
extern const KernelTable kernels_generic;
#endif

#endif
