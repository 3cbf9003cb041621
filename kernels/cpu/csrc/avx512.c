/* AVX-512 without products of bfloat16. */
#include "covo.h"

#ifdef __x86_64__
#include <immintrin.h>

#define SET(name) avx512_##name
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c")))
#include "avx512.inc.h"

static int avx512_here(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

#include "rows.h"

const Set AVX512 = SET_OF_VECTORS("avx512", NULL);
#endif
