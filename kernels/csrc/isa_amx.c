/* The kernels for AVX-512 with tiles (AMX-TILE, AMX-BF16). */
#include "kernels.h"
#if defined(HAVE_AMX)
#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16")
#endif
#include "vectors_avx512.h"

#define HAVE_TILES 1
#define TABLE kernels_amx
#define TABLE_NAME "amx"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
