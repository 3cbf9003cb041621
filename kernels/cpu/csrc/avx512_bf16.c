/* AVX-512 with products of bfloat16 pairs (vdpbf16ps): two products are added to a float32 sum, each with one rounding
 * to nearest; subnormal inputs and sums count as zero (below 1.2e-38). */
#include "covo.h"

#ifdef __x86_64__
#include <immintrin.h>

#define SET(name) avx512_bf16_##name
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma,f16c")))
#include "avx512.inc.h"
#define DOT_VECTOR __m512bh
#define DOT_LANES 32
#define LOAD_DOT(p) ((__m512bh)_mm512_loadu_si512(p))
#define DOT(sums, x, w) _mm512_dpbf16_ps(sums, x, w)
#define LOAD_INT8_DOT(p) _mm512_cvtne2ps_pbh(LOAD_INT8((p) + 16), LOAD_INT8(p))

/* Attention has instructions of AVX512DQ. */
static int avx512_bf16_here(void) {
  return AVX512.here() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
}

#include "rows.h"

const Set AVX512_BF16 = SET_OF_VECTORS("avx512_bf16", &AVX512_BF16_ATTENDS);
#endif
