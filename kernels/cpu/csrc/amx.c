/* AMX: tiles of 16 rows of 64 bytes. The weights are the left operand, as they lie in memory: y^T = W x^T. What has to be
 * packed is x, which is small: pairs of columns side by side. Products of bfloat16 pairs are added to float32 sums like
 * those of AVX-512 BF16: two roundings to nearest, subnormal numbers count as zero.
 *
 * int8 weights: for few rows of 16-bit x, x becomes whole numbers of 23 bits below its row's largest element, in three
 * digits of 8 bits, and the sums of int8 products are exact; otherwise blocks of weights become bfloat16, which is exact.
 */
#include "amx.h"

#ifdef __x86_64__
#include <sys/syscall.h>
#include <unistd.h>

#define DIGITS 3
#define ROWS_OF_DIGITS 5   /* rows of x whose digits fit into the 16 columns of a tile */
#define MAX_DIGIT_ROWS 10  /* from there on converted weights cost less */
#define PAIR 32            /* rows of x in one pair of tiles: for those a thread takes few rows of the weights at once */
#define BLOCK_N 256        /* rows of the weights whose sums stay in the second cache for ... */
#define BLOCK_M 768        /* ... that many rows of x, and ... */
#define BLOCK_X (1 << 20)  /* ... that many bytes of them, as many columns as that is */
#define BLOCK_K 256        /* columns that several tiles of x take from the first cache */

static int amx_here(void) {
  /* ARCH_REQ_XCOMP_PERM for tile data: Linux gives a process the state on demand. Then CPUID 7: AMX_BF16, _TILE, _INT8. */
  unsigned a = 7, b, c = 0, d;
  if (!AVX512_BF16.here()) return 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  if ((d >> 22 & 1 & d >> 24 & d >> 25) == 0) return 0;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

INLINE int by_digits(const Linear *t) {
  return t->weight_type == INT8 && t->x_type != FLOAT32 && t->M <= MAX_DIGIT_ROWS && t->K <= 65536;
}

static TARGET int has_infinite(const Linear *t);

static int amx_serves(const Linear *t) {
  if (!t->K) return 0;
  if (by_digits(t)) return !has_infinite(t);
  return t->x_type == BFLOAT16 && (t->weight_type == BFLOAT16 || t->weight_type == INT8);
}

/* Rows of x that one tile holds, and its columns: the digits of a row, or the row itself. */
INLINE long tile_rows(const Linear *t) { return smaller(t->M, by_digits(t) ? ROWS_OF_DIGITS : 16); }
INLINE long tile_cols(const Linear *t) { return tile_rows(t) * (by_digits(t) ? DIGITS : 1); }
INLINE long tiles_of_x(const Linear *t) { return (t->M + tile_rows(t) - 1) / tile_rows(t); }
INLINE long tile_depth(const Linear *t) { return by_digits(t) ? 64 : 32; } /* columns of the weights in a tile */
INLINE long depth(const Linear *t) { return (t->K + tile_depth(t) - 1) / tile_depth(t); }
INLINE long tile_bytes(const Linear *t) { return 64 * tile_cols(t); }

/* Tiles stand in pairs, [pairs, depth, 2], so that the multiplying loop reads them one after the other. Behind them, the
 * unit of each row's digits. */
static long amx_prepared_bytes(const Linear *t) {
  return round_up(tiles_of_x(t), 2) * depth(t) * tile_bytes(t) + (t->M + 16) * 4;
}
INLINE char *tile_of_x(const Linear *t, long tile, long k) {
  return (char *)t->prepared + ((tile / 2 * depth(t) + k) * 2 + tile % 2) * tile_bytes(t);
}
INLINE float *digit_units(const Linear *t) {
  return (float *)((char *)t->prepared + round_up(tiles_of_x(t), 2) * depth(t) * tile_bytes(t));
}

static long amx_units(const Linear *t) { return tiles_of_x(t); }
static long amx_step(const Linear *t, int threads) { return (void)threads, t->M > PAIR ? BLOCK_N : 64; }

/* Of the sums of a block, and of 32 rows of weights that are not read where they lie. */
static long amx_scratch_bytes(const Linear *t) {
  return amx_step(t, 1) * smaller(round_up(t->M, 32), BLOCK_M) * 4 + 32 * BLOCK_K * 2;
}

/* The mask of what is left from k on of a row of K elements, of at most 32. */
INLINE uint32_t rest(long k, long K) { return K - k >= 32 ? ~0u : K <= k ? 0 : (1u << (K - k)) - 1; }

/* Packs 16 rows of bfloat16 x from m on: row p of a tile holds columns 2p and 2p + 1 of each. */
static TARGET void pack_pairs(const Linear *t, long tile) {
  const long K = t->K, cols = tile_cols(t), m0 = tile * tile_rows(t);
  const uint16_t *x = (const uint16_t *)t->x + m0 * K;
  for (long k = 0; k < depth(t); k++) {
    char *to = tile_of_x(t, tile, k);
    __m512i r[16];
    for (int m = 0; m < 16; m++)
      r[m] = m0 + m < t->M && m < cols ? _mm512_maskz_loadu_epi16(rest(32 * k, K), x + m * K + 32 * k)
                                       : _mm512_setzero_si512();
    if (cols == 1) {
      _mm512_storeu_si512(to, r[0]);
      continue;
    }
    transpose(r);
    for (int p = 0; p < 16; p++) _mm512_mask_storeu_epi32(to + 4 * cols * p, (__mmask16)((1 << cols) - 1), r[p]);
  }
}

INLINE TARGET __m512 load_x(const Linear *t, long at, __mmask16 mask) {
  __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)t->x + at);
  return t->x_type == FLOAT16 ? _mm512_cvtph_ps(bits)
                              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* Packs rows of 16-bit x as digits: q = x / unit, |q| <= 2^22, q = ((d0 << 8) + d1 << 8) + d2; a tile's column holds one
 * digit of a row, its row p the columns 4p to 4p + 3 of x. */
static TARGET void pack_digits(const Linear *t, long tile) {
  const long K = t->K, cols = tile_cols(t), m0 = tile * tile_rows(t);
  for (long m = m0; m < smaller(m0 + tile_rows(t), t->M); m++) {
    __m512 most = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 16)
      most = _mm512_max_ps(most, _mm512_abs_ps(load_x(t, m * K + k, (__mmask16)rest(k, K))));
    int exponent = 0;
    frexpf(_mm512_reduce_max_ps(most), &exponent);
    digit_units(t)[m] = ldexpf(1, exponent - 22);
    /* 2^(22 - exponent) in two factors: one alone can lie beyond float32. */
    const __m512 half = _mm512_set1_ps(ldexpf(1, (22 - exponent) / 2));
    const __m512 other = _mm512_set1_ps(ldexpf(1, 22 - exponent - (22 - exponent) / 2));
    for (long k = 0; k < depth(t); k++) {
      int8_t digits[DIGITS][64];
      for (int i = 0; i < 64; i += 16) {
        const __mmask16 mask = (__mmask16)rest(64 * k + i, K);
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(load_x(t, m * K + 64 * k + i, mask), half), other);
        __m512i q = _mm512_cvtps_epi32(scaled);
        for (int d = DIGITS - 1; d >= 0; d--) { /* the lowest byte, signed; what is left is divided by 256 */
          const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24);
          _mm_storeu_si128((__m128i *)(digits[d] + i), _mm512_cvtepi32_epi8(low));
          q = _mm512_srai_epi32(_mm512_sub_epi32(q, low), 8);
        }
      }
      char *to = tile_of_x(t, tile, k) + (m - m0) * DIGITS * 4;
      for (int p = 0; p < 16; p++)
        for (int d = 0; d < DIGITS; d++) memcpy(to + 4 * (cols * p + d), digits[d] + 4 * p, 4);
    }
  }
}

/* Whether a row of x holds an infinity or a NaN, which have no digits. */
static TARGET int has_infinite(const Linear *t) {
  const long count = t->M * t->K;
  for (long i = 0; i < count; i += 16) {
    const __mmask16 mask = (__mmask16)rest(i, count);
    if (_mm512_fpclass_ps_mask(load_x(t, i, mask), 0x99)) return 1;
  }
  return 0;
}

static TARGET void amx_prepare(const Linear *t, long first, long last) {
  for (long tile = first; tile < last; tile++) by_digits(t) ? pack_digits(t, tile) : pack_pairs(t, tile);
}

/* 32 rows of the weights from n on, of which depth k0 to k1: where they lie, or a copy filled up with zeros. */
typedef struct {
  const char *rows;
  long stride;
} Weights;

static TARGET Weights weights(const Linear *t, long n, long k0, long k1, int in_place, char *copy) {
  const long bytes = bytes_of(t->weight_type), columns = tile_depth(t), stride = 64 * (k1 - k0);
  const char *from = (const char *)t->weight + (n * t->K + k0 * columns) * bytes;
  if (in_place) return (Weights){from, t->K * bytes};
  memset(copy, 0, (size_t)(32 * stride));
  for (long r = 0; r < smaller(32, t->N - n); r++) {
    const long count = smaller((k1 - k0) * columns, t->K - k0 * columns);
    const char *row = from + r * t->K * bytes;
    if (t->weight_type == BFLOAT16 || by_digits(t)) memcpy(copy + r * stride, row, (size_t)(count * bytes));
    else
      for (long k = 0; k < count; k += 32) {
        const __m256i w = _mm256_maskz_loadu_epi8(rest(k, count), row + k);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(w)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(w, 1)));
        _mm512_storeu_si512(copy + r * stride + 2 * k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
  }
  return (Weights){copy, stride};
}

INLINE TARGET void write_row(const Linear *t, long m, long n, __m512 sum) {
  const __mmask16 mask = (__mmask16)rest(n, t->N);
  if (t->scale) sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, t->scale + n));
  if (t->bias) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)t->bias + n);
    sum = _mm512_add_ps(sum, t->x_type == FLOAT16
                                 ? _mm512_cvtph_ps(bits)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
  if (t->y_type == FLOAT32) {
    _mm512_mask_storeu_ps((float *)t->y + m * t->y_stride + n, mask, sum);
    return;
  }
  const __m256i rounded = t->x_type == FLOAT16 ? _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                               : (__m256i)_mm512_cvtneps_pbh(sum);
  _mm256_mask_storeu_epi16((uint16_t *)t->y + m * t->y_stride + n, mask, rounded);
}

/* Writes the results of one tile of x with 16 rows of the weights. sums: [16 rows of the weights, columns of x]. */
INLINE TARGET void write_tile(const Linear *t, long tile, long n, const float *sums) {
  const long m0 = tile * tile_rows(t), count = smaller(tile_rows(t), t->M - m0);
  if (n >= t->N) return;
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
  transpose(r);
  for (long m = 0; m < count; m++) {
    if (!by_digits(t)) {
      write_row(t, m0 + m, n, (__m512)r[m]);
      continue;
    }
    const __m512 base = _mm512_set1_ps(256);
    __m512 sum = _mm512_cvtepi32_ps(r[DIGITS * m]);
    for (int d = 1; d < DIGITS; d++) sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(r[DIGITS * m + d]));
    write_row(t, m0 + m, n, _mm512_mul_ps(sum, _mm512_set1_ps(digit_units(t)[m0 + m])));
  }
}

/* Adds two by two tiles of products from k0 to k1; SECOND: there is a second tile of x. */
#define ADD_TILES(PRODUCT, SECOND)                                                                                     \
  for (long k = k0; k < k1; k++, x += 2 * width, upper += 64, lower += 64) {                                           \
    _tile_loadd(6, x, row);                                                                                            \
    _tile_loadd(4, upper, w.stride);                                                                                   \
    PRODUCT(0, 4, 6);                                                                                                  \
    _tile_loadd(5, lower, w.stride);                                                                                   \
    PRODUCT(1, 5, 6);                                                                                                  \
    if (SECOND) {                                                                                                      \
      _tile_loadd(7, x + width, row);                                                                                  \
      PRODUCT(2, 4, 7);                                                                                                \
      PRODUCT(3, 5, 7);                                                                                                \
    }                                                                                                                  \
  }

static TARGET void add_tiles(const Linear *t, Weights w, long tile, long k0, long k1, int second, float *sums) {
  const long width = tile_bytes(t), row = 4 * tile_cols(t);
  const char *x = tile_of_x(t, tile, k0), *upper = w.rows, *lower = w.rows + 16 * w.stride;
  if (k0) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (second) {
      _tile_loadd(2, sums + 512, 64);
      _tile_loadd(3, sums + 768, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (by_digits(t)) {
    if (second) ADD_TILES(_tile_dpbssd, 1)
    else ADD_TILES(_tile_dpbssd, 0)
  } else {
    if (second) ADD_TILES(_tile_dpbf16ps, 1)
    else ADD_TILES(_tile_dpbf16ps, 0)
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (second) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

/* 32 rows of the weights are read side by side from end to end, or as far as x stays in the second cache: short pieces of
 * rows come from memory at half the rate. Where several pairs of tiles of x wait for them, all take a few columns before
 * the next ones are read: those are in the first cache then, and what follows is on its way meanwhile. */
static TARGET void amx_multiply(const Linear *t, long first, long last, long next, void *scratch) {
  (void)next;
  const long all = depth(t), tiles = tiles_of_x(t), block_m = BLOCK_M / 16;
  const int as_they_lie = (t->weight_type == BFLOAT16 || by_digits(t)) && t->K % tile_depth(t) == 0;
  const int in_place = as_they_lie && (last - first) % 32 == 0;
  char *copy = scratch;
  float *sums = (float *)(copy + 32 * BLOCK_K * 2);
  configure((int)tile_cols(t));
  for (long m0 = 0; m0 < tiles; m0 += block_m) {
    const long m1 = smaller(m0 + block_m, tiles), pairs = (m1 - m0 + 1) / 2;
    const long pieces = (2 * pairs * tile_bytes(t) * all + BLOCK_X - 1) / BLOCK_X, few = BLOCK_K / 32;
    const long wide = round_up((all + pieces - 1) / pieces, few), step = in_place && pairs == 1 ? wide : few;
    for (long from = 0; from < all; from += wide) {
      const long to = smaller(from + wide, all);
      for (long n = first; n < last; n += 32)
        for (long k0 = from; k0 < to; k0 += step) {
          const long k1 = smaller(k0 + step, to);
          const Weights w = weights(t, n, k0, k1, in_place, copy);
          for (long m = m0; m < m1; m += 2) {
            float *block = sums + ((n - first) / 32 * pairs + (m - m0) / 2) * 1024;
            const int second = m + 1 < m1;
            add_tiles(t, w, m, k0, k1, second, block);
            if (k1 < all) continue;
            write_tile(t, m, n, block);
            write_tile(t, m, n + 16, block + 256);
            if (second) {
              write_tile(t, m + 1, n, block + 512);
              write_tile(t, m + 1, n + 16, block + 768);
            }
          }
        }
    }
  }
  _tile_release();
}

static void amx_weigh(const Attention *t, const void *values, long count, float *scores, float *sums) {
  AVX512.weigh(t, values, count, scores, sums);
}

/* What is computed row by row needs no tiles. */
static void amx_snake(const void *job, long row) { AVX512.snake(job, row); }
static void amx_winograd_signal(const void *job, long row) { AVX512.winograd_signal(job, row); }
static void amx_winograd_results(const void *job, long row) { AVX512.winograd_results(job, row); }
static void amx_norm(const void *job, long row) { AVX512.norm(job, row); }
static void amx_rotary(const void *job, long row) { AVX512.rotary(job, row); }
static void amx_gate(const void *job, long row) { AVX512.gate(job, row); }

const Set AMX = {.name = "amx", .here = amx_here, .serves = amx_serves, .prepared_bytes = amx_prepared_bytes,
                 .prepare = amx_prepare, .units = amx_units, .step = amx_step, .scratch_bytes = amx_scratch_bytes,
                 .multiply = amx_multiply, .weigh = amx_weigh, .attends = &AMX_ATTENDS, .snake = amx_snake,
                 .winograd_signal = amx_winograd_signal, .winograd_results = amx_winograd_results,
                 .norm = amx_norm, .rotary = amx_rotary, .gate = amx_gate};
#endif
