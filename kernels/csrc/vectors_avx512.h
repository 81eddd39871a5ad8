/* Vectors of AVX-512 (F, BW, VL, DQ), for the variants that have it. */
#include <immintrin.h>
#include <stdint.h>

#define VL 16
#define MAX_TILE_ROWS 12
#define STRIPS_AT_ONCE(rows) 1

typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));

static inline vf splat(float x) { return _mm512_set1_ps(x); }
static inline vf fused(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline void stream(float *p, vf v) { _mm512_stream_ps(p, v); }
static inline void end_stream(void) { _mm_sfence(); }
static inline vi load_words(const void *p) { return (vi)_mm512_loadu_si512(p); }
static inline vf load_i8(const void *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vf load_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* Bytes 2i and 2i+1 of p are fp8 e4m3; as float16 bits (sign, exponent and mantissa moved) they are the value / 256. */
static inline void load_fp8(const void *p, vf *low, vf *high)
{
    const __m256i mask = _mm256_set1_epi16((short)0xBF80);
    __m256i w = _mm256_loadu_si256((const __m256i *)p);
    *low = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 1), mask));
    *high = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(w, 1), mask));
}

static inline __m128 fold(vf a)
{
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Four sums of 16 lanes: i + (i+8), then + 4, then ((0+1) + (2+3)). Every variant adds in this order. */
static inline void sum_lanes4(vf a[4][1], float *out)
{
    __m128 left = _mm_hadd_ps(fold(a[0][0]), fold(a[1][0])), right = _mm_hadd_ps(fold(a[2][0]), fold(a[3][0]));
    _mm_storeu_ps(out, _mm_hadd_ps(left, right));
}
