/* The kernels for AVX-512 (F, BW, VL, DQ). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include "vectors_avx512.h"

#define TABLE kernels_avx512
#define TABLE_NAME "avx512"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
