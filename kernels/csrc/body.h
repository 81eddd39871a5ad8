/* The kernels themselves, compiled once per instruction set. The including file gives VL lanes (vf, vi) and the few
   operations that the vector extension lacks. Rules that keep every variant equal to the bit: lanes run over outputs,
   or over 16 virtual lanes added in one fixed tree; a product that is added is always fused; -ffp-contract=off. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#define NUM_STRIPS (16 / VL) /* vectors in 16 virtual lanes; a panel has two such halves */
#define INLINE static inline __attribute__((always_inline))

typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE vf load(const float *p) { return (vf) * (const vfu *)p; }
INLINE void store(float *p, vf v) { *(vfu *)p = (vfu)v; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return pick((vi)(a > b), a, b); }

INLINE float sum16(const vf lanes[NUM_STRIPS])
{
    vf four[4][NUM_STRIPS] = {{splat(0)}};
    float out[4];
    for (int s = 0; s < NUM_STRIPS; s++) {
        four[0][s] = lanes[s];
        four[1][s] = four[2][s] = four[3][s] = lanes[s];
    }
    sum_lanes4(four, out);
    return out[0];
}

INLINE float max16(const vf lanes[NUM_STRIPS])
{
    float best = -INFINITY;
    for (int s = 0; s < NUM_STRIPS; s++)
        for (int i = 0; i < VL; i++)
            best = lanes[s][i] > best ? lanes[s][i] : best;
    return best;
}

/* 16 floats from p, of which only n exist; the others read as `fill`. */
INLINE const float *padded16(const float *p, int64_t n, float fill, float buffer[16])
{
    if (n >= 16)
        return p;
    for (int i = 0; i < 16; i++)
        buffer[i] = i < n ? p[i] : fill;
    return buffer;
}

/* exp, about 1 ulp: Cephes expf (Moshier), with the power of two applied in two halves so that the whole range,
   subnormals and overflow included, needs no special case. NaN stays NaN. */
INLINE vf vexp(vf x)
{
    const vf magic = splat(12582912.0f);
    x = pick((vi)(x < splat(-104.0f)), splat(-104.0f), x);
    x = pick((vi)(x > splat(89.0f)), splat(89.0f), x);
    vf t = fused(x, splat(1.44269504088896341f), magic), n = t - magic;
    vf r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
    vf p = fused(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fused(p, r, splat(8.3334519073e-3f));
    p = fused(p, r, splat(4.1665795894e-2f));
    p = fused(p, r, splat(1.6666665459e-1f));
    p = fused(p, r, splat(5.0000001201e-1f));
    p = fused(p, r * r, r) + splat(1.0f);
    vi power = (vi)t - (vi)magic, half = power >> 1;
    return p * (vf)((half + 127) << 23) * (vf)((power - half + 127) << 23);
}

INLINE float exp_one(float x) { return vexp(splat(x))[0]; }

/* Subnormal operands and results are zero from here on, until the mode is restored. */
INLINE uint64_t flush_subnormals(void)
{
    uint64_t before;
#if defined(__x86_64__)
    before = _mm_getcsr();
    _mm_setcsr((uint32_t)before | 0x8040);
#else
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | 1 << 24) : "memory");
#endif
    return before;
}

INLINE void restore_subnormals(uint64_t before)
{
#if defined(__x86_64__)
    _mm_setcsr((uint32_t)before);
#else
    __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory");
#endif
}

#include "body_rows.h"
#include "body_gemm.h"
#include "body_quantize.h"
#include "body_sample.h"
#include "body_route.h"
#include "body_attention.h"
#include "body_absorbed.h"
#include "body_expanded.h"

const KernelTable TABLE = {
    .name = TABLE_NAME,
    .panel_gemm = panel_gemm,
    .rms_norm = rms_norm,
    .rope = rope,
    .log_softmax = log_softmax,
    .argmax = argmax,
    .widen = widen,
    .exp_doubles = exp_doubles,
    .route = route,
    .combine = combine,
    .quantize = quantize,
    .tree_add = tree_add,
    .attend = attend,
    .attend_segments = attend_segments,
    .join_segments = join_segments,
    .attend_expanded = attend_expanded,
};
