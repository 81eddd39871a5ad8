/* One row of a weight becomes int8 with a scale for each block: scale = largest magnitude / 127, value = weight / scale
   rounded to nearest even. The loops over a block are plain C, which the compiler makes vectors of. */

#define QUANTIZE_BLOCK 256 /* most elements under one scale */

typedef union {
    float value[QUANTIZE_BLOCK];
    int32_t bits[QUANTIZE_BLOCK];
} Block;

INLINE void widen_block(const int64_t kind, const uint8_t *p, int64_t n, Block *out)
{
    uint16_t halves[QUANTIZE_BLOCK];
    if (kind == KIND_F32) {
        memcpy(out->value, p, n * sizeof(float));
        return;
    }
    memcpy(halves, p, n * sizeof(uint16_t));
    if (kind == KIND_BF16)
        for (int64_t i = 0; i < n; i++)
            out->bits[i] = (int32_t)((uint32_t)halves[i] << 16);
    else
        for (int64_t i = 0; i < n; i += VL) /* what follows the last is converted for nothing */
            store(out->value + i, load_f16(halves + i));
}

/* Bits of the largest magnitude: floats without their signs order as their bits do, infinity and NaN last. */
INLINE int32_t largest(const Block *b, int64_t n)
{
    int32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = b->bits[i] & INT32_MAX;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

INLINE float quantize_block(Block *b, int64_t n, int32_t top_bits, int8_t *values)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: the last bits of a sum with it are the other, rounded */
    float top;
    memcpy(&top, &top_bits, sizeof top);
    const float scale = top / 127.0f > FLT_MIN ? top / 127.0f : FLT_MIN; /* so that no quotient is above 127 */
    for (int64_t i = 0; i < n; i++)
        b->value[i] = b->value[i] / scale + magic;
    for (int64_t i = 0; i < n; i++)
        values[i] = (int8_t)b->bits[i];
    return scale;
}

/* Whether the row holds finite numbers only; if not, what is written means nothing. */
static int quantize(const Quantize *q, int64_t row)
{
    const int64_t num_blocks = (q->num_in + q->block - 1) / q->block, size = q->kind == KIND_F32 ? 4 : 2;
    int finite = 1;
    for (int64_t i = 0; i < num_blocks; i++) {
        const int64_t k = i * q->block, n = q->num_in - k < q->block ? q->num_in - k : q->block;
        Block block;
        widen_block(q->kind, q->source + row * q->row_bytes + k * size, n, &block);
        const int32_t top = largest(&block, n);
        q->scales[row * num_blocks + i] = quantize_block(&block, n, top, q->values + row * q->num_in + k);
        finite &= top < 0x7F800000;
    }
    return finite;
}
