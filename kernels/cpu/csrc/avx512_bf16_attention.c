/* Attention of many queries with products of bfloat16 pairs, see attend.h. */
#include "covo.h"

#ifdef __x86_64__
#define SET(name) avx512_bf16_##name
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")))
#define COLUMNS 3 /* eight rows of 48 queries are 24 registers of sums */
#define BEGIN
#define END
#define SCORES(t, keys, n, queries, sums)                                                                              \
  add_products(keys + (n) * 32 * t->D * 2, t->D * 2, 4, queries, t->D / 32, 1, sums)
#define VALUES(t, values, n, count, d, weights, begin, sums)                                                           \
  add_products(values + ((n) * 16 * t->D + d * 32) * 4, 4, t->D * 4, weights, count, begin, sums)
#include "transpose.h"

/* Rows as they are. */
INLINE TARGET void pack_keys(const Attend *t, const uint16_t *keys, char *to) {
  for (long k = 0; k < round_up(t->K, 32); k++)
    for (long d = 0; d < t->D; d += 32, to += 64)
      _mm512_store_si512(to, k < t->K ? _mm512_loadu_si512(keys + k * t->k_row + d) : _mm512_setzero_si512());
}

/* Each pair of rows becomes one, their numbers side by side. */
INLINE TARGET void pack_values(const Attend *t, const uint16_t *values, char *to) {
  for (long k = 0; k < round_up(t->K, 32); k += 2)
    for (long d = 0; d < t->D; d += 16, to += 64) _mm512_store_si512(to, two_rows(values + d, t->v_row, k, t->K));
}

/* Adds the products of 32 rows of the left, `row` bytes apart, and the pieces of the right to sums[COLUMNS, 32, 16]. A
 * pair of the left's numbers is multiplied with that of each query; the next one is `next` bytes on. */
INLINE TARGET void add_products(const char *left, long row, long next, const char *right, long depth, int begin,
                                float *sums) {
  for (int r = 0; r < 32; r += 8, left += 8 * row) {
    __m512 s[8][COLUMNS];
    for (int i = 0; i < 8; i++)
      for (int c = 0; c < COLUMNS; c++)
        s[i][c] = begin ? _mm512_setzero_ps() : _mm512_load_ps(sums + c * 512 + (r + i) * 16);
    const char *pairs = left, *queries = right;
    for (long k = 0; k < depth; k++, queries += COLUMNS * 1024)
      for (int p = 0; p < 16; p++, pairs += next) {
        __m512bh q[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) q[c] = (__m512bh)_mm512_load_si512(queries + c * 1024 + p * 64);
        for (int i = 0; i < 8; i++) {
          int pair;
          memcpy(&pair, pairs + i * row, 4);
          for (int c = 0; c < COLUMNS; c++) s[i][c] = _mm512_dpbf16_ps(s[i][c], (__m512bh)_mm512_set1_epi32(pair), q[c]);
        }
      }
    for (int i = 0; i < 8; i++)
      for (int c = 0; c < COLUMNS; c++) _mm512_store_ps(sums + c * 512 + (r + i) * 16, s[i][c]);
  }
}

#include "attend.h"

const Attends AVX512_BF16_ATTENDS = ATTENDS;
#endif
