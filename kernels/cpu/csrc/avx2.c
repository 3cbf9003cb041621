/* AVX2 with FMA and F16C: bfloat16 is float32 shifted by 16 bits. */
#include "covo.h"

#ifdef __x86_64__
#include <immintrin.h>

#define SET(name) avx2_##name
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define VECTOR __m256
#define LANES 8
#define ZERO _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define BROADCAST(f) _mm256_set1_ps(f)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM(v) avx2_sum(v)
#define EIGHT(p) _mm_loadu_si128((const __m128i *)(p))
#define LOAD_BFLOAT16(p) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(EIGHT(p)), 16))
#define LOAD_FLOAT16(p) _mm256_cvtph_ps(EIGHT(p))
#define LOAD_INT8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define GROUP 2

/* Every processor with AVX2 has F16C, too; clang cannot ask for it. */
static int avx2_here(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

INLINE TARGET float avx2_sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#include "rows.h"

const Set AVX2 = SET_OF_VECTORS("avx2", NULL);
#endif
