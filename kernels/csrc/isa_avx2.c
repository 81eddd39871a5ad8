/* The kernels for AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#include <stdint.h>

#define VL 8
#define MAX_TILE_ROWS 6
#define STRIPS_AT_ONCE(rows) ((rows) <= 3 ? 2 : 1)

typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));

static inline vf splat(float x) { return _mm256_set1_ps(x); }
static inline vf fused(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline void stream(float *p, vf v) { _mm256_stream_ps(p, v); }
static inline void end_stream(void) { _mm_sfence(); }
static inline vi load_words(const void *p) { return (vi)_mm256_loadu_si256((const __m256i *)p); }
static inline vf load_i8(const void *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vf load_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

/* See isa_avx512.c. */
static inline void load_fp8(const void *p, vf *low, vf *high)
{
    const __m128i mask = _mm_set1_epi16((short)0xBF80);
    __m128i w = _mm_loadu_si128((const __m128i *)p);
    *low = _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(w, 8), 1), mask));
    *high = _mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(w, 1), mask));
}

static inline __m128 fold(vf a, vf b)
{
    __m256 half = _mm256_add_ps(a, b);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static inline void sum_lanes4(vf a[4][2], float *out)
{
    __m128 left = _mm_hadd_ps(fold(a[0][0], a[0][1]), fold(a[1][0], a[1][1]));
    __m128 right = _mm_hadd_ps(fold(a[2][0], a[2][1]), fold(a[3][0], a[3][1]));
    _mm_storeu_ps(out, _mm_hadd_ps(left, right));
}

#define TABLE kernels_avx2
#define TABLE_NAME "avx2"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
