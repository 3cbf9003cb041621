/* What the two files of AMX share: how tiles are laid out, and sixteen registers transposed. */
#ifndef AMX_H
#define AMX_H
#include "covo.h"

#ifdef __x86_64__
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16,amx-int8")))

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Tiles;

/* Tiles 0 to 3: sums [16, cols]; 4 and 5: weights [16, 64 bytes]; 6 and 7: x, 16 rows of cols times 4 bytes. */
INLINE TARGET void configure(int cols) {
  Tiles t = {.palette = 1};
  for (int i = 0; i < 8; i++) {
    t.rows[i] = 16;
    t.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * cols);
  }
  _tile_loadconfig(&t);
}

/* Of amx_attention.c. */
long amx_attend_bytes(const Attend *t);
void amx_attend(const Attend *t, long b, long h, long first, long last, int pack, void *scratch);

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
#endif
