/* AMX's instructions in plain C, for processors with AVX-512 BF16 and without tiles: included before each file of
 * kernels/cpu/csrc, see tests/isa.sh. What they compute is from Intel's manual (Software Developer's Manual, volume 2);
 * sums of bfloat16 pairs are added one after the other, subnormal numbers are kept, which a processor does not. */
#ifdef __x86_64__
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

/* What amx.c asks the processor and the system. */
static inline int(amx_here)(void) { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq"); }
#define amx_here(nothing) __attribute__((unused)) asked_of_the_processor(nothing)

static __thread uint8_t emulated_tiles[8][16][64], emulated_rows[8], emulated_bytes_of_row[8];

/* Palette, start, 14 reserved, 16 widths of 16 bits, 16 heights. */
static inline void emulated_configure(const void *from) {
  const uint8_t *bytes = (const uint8_t *)from;
  for (int i = 0; i < 8; i++) emulated_bytes_of_row[i] = bytes[16 + 2 * i], emulated_rows[i] = bytes[48 + i];
  memset(emulated_tiles, 0, sizeof emulated_tiles);
}
static inline void emulated_load(int to, const void *from, long stride) {
  memset(emulated_tiles[to], 0, sizeof emulated_tiles[to]);
  for (int r = 0; r < emulated_rows[to]; r++)
    memcpy(emulated_tiles[to][r], (const char *)from + r * stride, emulated_bytes_of_row[to]);
}
static inline void emulated_store(int from, void *to, long stride) {
  for (int r = 0; r < emulated_rows[from]; r++)
    memcpy((char *)to + r * stride, emulated_tiles[from][r], emulated_bytes_of_row[from]);
}
static inline float emulated_bfloat16(const uint8_t *from) {
  uint32_t wide = (uint32_t)from[1] << 24 | (uint32_t)from[0] << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
static inline void emulated_add(int sums, int left, int right, int whole_numbers) {
  for (int m = 0; m < emulated_rows[sums]; m++)
    for (int k = 0; k < emulated_bytes_of_row[left] / 4; k++)
      for (int n = 0; n < emulated_bytes_of_row[sums] / 4; n++) {
        const uint8_t *a = emulated_tiles[left][m] + 4 * k, *b = emulated_tiles[right][k] + 4 * n;
        uint8_t *sum = emulated_tiles[sums][m] + 4 * n;
        int32_t whole;
        float real;
        memcpy(&whole, sum, 4);
        memcpy(&real, sum, 4);
        if (whole_numbers) {
          for (int i = 0; i < 4; i++) whole += (int8_t)a[i] * (int8_t)b[i];
          memcpy(sum, &whole, 4);
        } else {
          for (int i = 0; i < 4; i += 2) real += emulated_bfloat16(a + i) * emulated_bfloat16(b + i);
          memcpy(sum, &real, 4);
        }
      }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(from) emulated_configure(from)
#define _tile_release() memset(emulated_rows, 0, sizeof emulated_rows)
#define _tile_zero(to) memset(emulated_tiles[to], 0, sizeof emulated_tiles[to])
#define _tile_loadd(to, from, stride) emulated_load(to, from, stride)
#define _tile_stored(from, to, stride) emulated_store(from, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_add(sums, left, right, 0)
#define _tile_dpbssd(sums, left, right) emulated_add(sums, left, right, 1)
#endif
