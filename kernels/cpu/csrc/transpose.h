/* How rows are laid out anew, for the sets with vectors of 512 bits: included where TARGET is defined. */
#ifndef TRANSPOSE_H
#define TRANSPOSE_H
#include "covo.h"

#include <immintrin.h>

/* 16 numbers of rows k and k + 1 of K, side by side; rows past the last are zero. */
INLINE TARGET __m512i two_rows(const uint16_t *rows, long stride, long k, long K) {
  __m512i pair[2];
  for (long i = 0; i < 2; i++)
    pair[i] = k + i < K ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows + (k + i) * stride)))
                        : _mm512_setzero_si512();
  return _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16));
}

/* Transposes 16 rows of 16 elements of 32 bits. */
INLINE TARGET void transpose(__m512i *r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#endif
