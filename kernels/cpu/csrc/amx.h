/* What the two files of AMX share: how tiles are laid out. */
#ifndef AMX_H
#define AMX_H
#include "covo.h"

#ifdef __x86_64__
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c,amx-tile,amx-bf16,amx-int8")))
#include "transpose.h"

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

#endif
#endif
