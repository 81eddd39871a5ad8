/* The kernels for any 64-bit machine with fused multiply-add: four lanes of the compiler's vector extension.
   This is the variant of ARM (NEON); x86 builds it too, so that tests can hold it against the others. */
#if defined(__x86_64__) || defined(__aarch64__)
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma"))), apply_to = function)
#else
#pragma GCC target("fma")
#endif
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif
#include <stdint.h>
#include <string.h>

#define VL 4
#define MAX_TILE_ROWS 6
#define STRIPS_AT_ONCE(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline vf splat(float x) { return (vf){x, x, x, x}; }
static inline vf fused(vf a, vf b, vf c)
{
#if defined(__x86_64__)
    return (vf)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}
static inline void stream(float *p, vf v) { memcpy(p, &v, sizeof v); }
static inline void end_stream(void) {}
static inline vi load_words(const void *p)
{
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline vf load_i8(const void *p)
{
    int8_t b[4];
    memcpy(b, p, sizeof b);
    return (vf){b[0], b[1], b[2], b[3]};
}

/* float16 bits to float32: move the fields into place and correct the exponent by a multiplication, which is exact,
   also for subnormals. Infinities and NaN take the float32 exponent 255 instead. */
static inline vf widen_f16(vi h)
{
    vi magnitude = (h & 0x7FFF) << 13, special = (magnitude >= 0x7C00 << 13) & 0x7F800000;
    vf value = (vf)magnitude * splat(0x1p112f);
    return (vf)(((vi)value | special) | (h & 0x8000) << 16);
}
static inline vf load_f16(const void *p)
{
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return widen_f16((vi){h[0], h[1], h[2], h[3]});
}
static inline void load_fp8(const void *p, vf *low, vf *high)
{
    uint16_t w[4];
    memcpy(w, p, sizeof w);
    vi v = {w[0], w[1], w[2], w[3]};
    *low = widen_f16((v & 0x80) << 8 | (v & 0x7F) << 7);
    *high = widen_f16((v & 0x8000) | (v & 0x7F00) >> 1);
}

static inline void sum_lanes4(vf a[4][4], float *out)
{
    for (int i = 0; i < 4; i++) {
        vf s = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
        out[i] = (s[0] + s[1]) + (s[2] + s[3]);
    }
}

#define TABLE kernels_generic
#define TABLE_NAME "generic"
#include "body.h"
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
#endif
