/* Drivers: they check indices, cut an operation into tasks and run them on the pool. Each returns NULL or what is
   wrong. Arguments were checked for shape and dtype by the Python side. The caller holds the pool. */
#ifndef MOEMESH_OPS_H
#define MOEMESH_OPS_H

#include "kernels.h"

extern const char out_of_memory[]; /* returned as it is, so that it can be told from other answers */

const char *op_select(const char *isa); /* best variant of this machine if isa is NULL */
const KernelTable *op_table(void);      /* NULL: no variant runs here */

const char *op_linear(const Matrix *m, const float *x, int64_t num_rows, float *y);
/* y = rms_norm(x[index]) W^T: the head of the rows that want logits. */
const char *op_normed_linear(const Matrix *m, const float *x, const int64_t *index, int64_t num_index, int64_t num_rows,
                             const float *weight, float eps, float *y);
/* y[row][head] = m[head] times row * row_stride + head * head_stride of x. */
const char *op_heads(const Matrix *m, int64_t num_heads, const float *x, int64_t row_stride, int64_t head_stride,
                     int64_t num_rows, float *y);
/* Which row goes to which expert. Slot s: row slot_rows[s], or s / top_k if that is NULL; expert place_of[experts[s]],
   or experts[s] if there is no place_of, or 0 if there are no experts. */
typedef struct {
    const int32_t *slot_rows, *experts, *place_of;
    int64_t num_slots, top_k, num_places; /* num_places: length of place_of */
} Slots;

const char *op_grouped_ffn(const Experts *e, const float *x, int64_t num_x_rows, const Slots *slots, float *y);
/* y = base + weighted sum of each row's top_k experts, as op_grouped_ffn and op_combine give it. */
const char *op_moe(const Experts *e, const float *x, int64_t num_rows, const Slots *slots, const float *weights,
                   const float *base, float *y);
const char *op_rms_norm(const float *x, const float *weight, float *y, int64_t num_rows, int64_t n, float eps);
const char *op_add_rms_norm(float *x, const float *y, const float *weight, float *out, int64_t num_rows, int64_t n,
                            float eps); /* x += y, out = rms_norm(x) */
/* tokens[row]: the sampled id, NOT_FINITE or NO_TOKEN. */
const char *op_sample(const float *logits, const Draw *draws, int64_t *tokens, int64_t num_rows, int64_t vocab);
/* Both at once: logits of all rows of the index, tokens of the first num_draws of them. */
const char *op_sample_rows(const Matrix *m, const float *x, const int64_t *index, int64_t num_index, int64_t num_rows,
                           const float *weight, float eps, float *logits, const Draw *draws, int64_t num_draws,
                           int64_t *tokens);
const char *op_score(const Scoring *s, int64_t num_rows);
const char *op_rope(float *x, int64_t row_stride, int64_t head_stride, int64_t num_rows, int64_t num_heads,
                    int64_t width, const float *cosine, const float *sine, int interleave);
const char *op_route(const Route *r);
/* Sets r->logits = x W^T; counts[num_experts] (may be NULL) gets 1 for each choice of an expert. */
const char *op_gate(const Matrix *weight, const float *x, Route *r, int64_t *counts);
/* plan[5][S] and counts[2][num_ranks]: see kernels/slots.py. */
const char *op_plan_slots(const int32_t *ids, int64_t num_tokens, int64_t top_k, const int32_t *rank_of,
                          int64_t num_experts, int64_t num_ranks, int32_t *plan, int32_t *counts);
/* slots NULL: row t takes rows t * top_k and on. */
const char *op_combine(const float *rows, int64_t num_slots, const int32_t *slots, const float *weights,
                       const float *base, float *y, int64_t num_rows, int64_t top_k, int64_t n);
const char *op_tree_add(const float *const *parts, int64_t num_parts, float *y, int64_t n);
const char *op_attention(const Attention *a);
const char *op_expanded_attention(const Expanded *e);
const char *op_mla_project(const Mla *m, const MlaBatch *b, int64_t first_row, int64_t num_rows, const float *x,
                           float *rows);
const char *op_mla_attend(const Mla *m, const MlaBatch *b, const float *rows, float *cache, int64_t num_blocks,
                          float *out);
/* x[row] = table[ids[row]] in float32; the table is of a kind that has no scales. */
const char *op_embed(const uint8_t *table, int64_t kind, int64_t num_ids, int64_t n, const int32_t *ids, int64_t num_rows,
                     float *x);
const char *op_lay_out(const Layout *l, MlaBatch *b); /* what b points at comes to lie behind it */
/* Both at once, where no peer has rows of its own. */
const char *op_mla(const Mla *m, const MlaBatch *b, const float *x, float *cache, int64_t num_blocks, float *out);

/* Embedding and all layers, one after the other: x [num_rows][hidden] are the hidden states after the last of them. */
const char *op_layers(const Stack *s, const MlaBatch *b, const int32_t *ids, float *x);
/* Takes about the memory that this needs for so many rows, and touches it: pages that the system has yet to provide
   make a first step take twice as long. */
const char *op_reserve_layers(const Stack *s, int64_t num_rows);

/* Copies rows [num_out][num_in] of element_bytes (row stride in bytes) into panels; see Matrix for `interleave`.
   With refuse_nan the elements are fp8 e4m3, whose NaN the kernels could not tell from a number. */
const char *op_pack(const void *source, int64_t row_bytes, int64_t num_out, int64_t num_in, int64_t element_bytes,
                    int interleave, int refuse_nan, void *panels, int64_t panel_stride);
const char *op_quantize(const Quantize *q);
void op_advise_huge_pages(void *start, int64_t bytes);
/* Reads bytes of a file from an offset to memory, all threads together: how many were there, or -errno. */
int64_t op_read_file(int file, int64_t offset, int64_t bytes, void *target);
/* The polynomial of the bytes as 64-bit words, the last one filled with zeros, and of their number; modulo 2^64. */
const char *op_checksum(const void *start, int64_t bytes, uint64_t *result);
/* A weight that lies in a file, and the panels that it belongs into. `outcome` is 0, an errno, or one of those below. */
typedef struct {
    int64_t file, offset, num_out, num_in, element_bytes, interleave, refuse_nan;
    void *panels;
    int64_t panel_stride, outcome;
    uint64_t checksum;
} FileWeight;
enum { FILE_ENDS_EARLY = -1, FILE_HAS_NAN = -2, FILE_NO_MEMORY = -3 };
void op_load(FileWeight *weights, int64_t num_weights);
uint64_t op_read_all(const void *start, int64_t bytes); /* reads memory as fast as it goes, for benchmarks */

#endif
