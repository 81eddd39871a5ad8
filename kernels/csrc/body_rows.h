/* Operations on single rows. Sums run over 16 virtual lanes (element i belongs to lane i % 16). */

#define LOG_SUM_BLOCK 1024 /* elements per partial sum of log_softmax: keeps the rounding error small for long rows */

/* silu(gate) * up; n is a multiple of 16. */
static void swiglu(const float *gate, const float *up, float *out, int64_t n)
{
    for (int64_t i = 0; i < n; i += VL) {
        vf g = load(gate + i);
        store(out + i, g / (splat(1.0f) + vexp(-g)) * load(up + i));
    }
}

static void rms_norm(const float *x, const float *weight, float *y, int64_t n, float eps)
{
    vf lanes[NUM_STRIPS] = {{0}};
    float buffer[16];
    for (int64_t i = 0; i < n; i += 16) {
        const float *p = padded16(x + i, n - i, 0.0f, buffer);
        for (int s = 0; s < NUM_STRIPS; s++)
            lanes[s] = fused(load(p + s * VL), load(p + s * VL), lanes[s]);
    }
    const float factor = 1.0f / sqrtf(sum16(lanes) / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        y[i] = weight[i] * (x[i] * factor);
}

/* Rotary embedding (Su et al., arXiv 2104.09864): pair i is (2i, 2i+1) if interleave, else (i, half + i). */
INLINE void rotate(float *restrict x, int64_t half, const float *restrict cosine, const float *restrict sine,
                   const int64_t step, const int64_t other)
{
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i * step], second = x[i * step + other];
        x[i * step] = first * cosine[i] - second * sine[i];
        x[i * step + other] = second * cosine[i] + first * sine[i];
    }
}

static void rope(float *x, int64_t half, const float *cosine, const float *sine, int interleave)
{
    if (interleave)
        rotate(x, half, cosine, sine, 2, 1);
    else
        rotate(x, half, cosine, sine, 1, half);
}

static float row_max(const float *x, int64_t n)
{
    vf lanes[NUM_STRIPS];
    float buffer[16];
    for (int s = 0; s < NUM_STRIPS; s++)
        lanes[s] = splat(-INFINITY);
    for (int64_t i = 0; i < n; i += 16) {
        const float *p = padded16(x + i, n - i, -INFINITY, buffer);
        for (int s = 0; s < NUM_STRIPS; s++)
            lanes[s] = larger(load(p + s * VL), lanes[s]);
    }
    return max16(lanes);
}

static float sum_exp(const float *x, int64_t n, float shift)
{
    vf total[NUM_STRIPS] = {{0}}, part[NUM_STRIPS] = {{0}};
    float buffer[16];
    for (int64_t i = 0; i < n; i += 16) {
        const float *p = padded16(x + i, n - i, -INFINITY, buffer);
        for (int s = 0; s < NUM_STRIPS; s++)
            part[s] += vexp(load(p + s * VL) - splat(shift));
        if (i % LOG_SUM_BLOCK == LOG_SUM_BLOCK - 16)
            for (int s = 0; s < NUM_STRIPS; s++) {
                total[s] += part[s];
                part[s] = splat(0.0f);
            }
    }
    for (int s = 0; s < NUM_STRIPS; s++)
        total[s] += part[s];
    return sum16(total);
}

static void log_softmax(const float *x, float *y, int64_t n)
{
    const float top = row_max(x, n);
    /* In double: one rounding at the end, and libm's log is right to the last float bit on every machine. */
    const double log_sum = (double)top + log((double)sum_exp(x, n, top));
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)((double)x[i] - log_sum);
}

/* Lowest index of the largest element; a NaN counts as the largest (as in torch). */
static int64_t argmax(const float *x, int64_t n)
{
    vi nan = {0};
    for (int64_t i = 0; i + VL <= n; i += VL)
        nan |= (vi)(load(x + i) != load(x + i));
    int any_nan = 0;
    for (int i = 0; i < VL; i++)
        any_nan |= nan[i];
    for (int64_t i = n - n % VL; i < n; i++)
        any_nan |= x[i] != x[i];
    const float top = any_nan ? 0.0f : row_max(x, n);
    for (int64_t i = 0; i < n; i++)
        if (any_nan ? x[i] != x[i] : x[i] == top)
            return i;
    return 0;
}

static void combine(const float *rows, const int32_t *slots, const float *weights, int64_t top_k, const float *base,
                    float *y, int64_t n)
{
    for (int64_t i = 0; i < n; i += VL) {
        const int whole = n - i >= VL;
        for (int64_t j = i; j < (whole ? i + 1 : n); j++) {
            vf acc = !base ? splat(0.0f) : whole ? load(base + j) : splat(base[j]);
            for (int64_t k = 0; k < top_k; k++) {
                const float *row = rows + slots[k] * n + j;
                acc = fused(splat(weights[k]), whole ? load(row) : splat(*row), acc);
            }
            if (whole)
                store(y + j, acc);
            else
                y[j] = acc[0];
        }
    }
}

/* Elements [start, stop) of the sum of num_parts (a power of two, at most 2^15) arrays in a balanced binary tree. */
static void tree_add(const float *const *parts, int64_t num_parts, float *y, int64_t start, int64_t stop)
{
    for (int64_t i = start; i < stop; i += VL) {
        const int whole = stop - i >= VL;
        for (int64_t j = i; j < (whole ? i + 1 : stop); j++) {
            vf stack[16], sum = splat(0.0f);
            int depth = 0;
            for (int64_t p = 0; p < num_parts; p++) {
                sum = whole ? load(parts[p] + j) : splat(parts[p][j]);
                for (int64_t counter = p + 1; counter % 2 == 0; counter /= 2)
                    sum = stack[--depth] + sum;
                stack[depth++] = sum;
            }
            if (whole)
                store(y + j, sum);
            else
                y[j] = sum[0];
        }
    }
}

/* The values of an embedding row, of a kind other than fp8, in float32. */
static void widen(int64_t kind, const void *p, float *y, int64_t n)
{
    if (kind == KIND_F32)
        memcpy(y, p, n * sizeof(float));
    for (int64_t i = 0; kind == KIND_BF16 && i < n; i++) {
        const uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
        memcpy(y + i, &bits, sizeof(bits));
    }
    for (int64_t i = 0; kind == KIND_F16 && i < n; i += VL) {
        uint16_t half[VL] = {0};
        const int64_t left = n - i < VL ? n - i : VL;
        memcpy(half, (const uint16_t *)p + i, left * sizeof(uint16_t));
        const vf wide = load_f16(half);
        memcpy(y + i, &wide, left * sizeof(float));
    }
}
