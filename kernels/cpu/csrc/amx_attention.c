/* Attention of many queries with tiles, see attend.h. */
#include "amx.h"

#ifdef __x86_64__
#define SET(name) amx_##name
#define COLUMNS 2 /* of two tiles */
#define TILE 1024 /* bytes */
#define BEGIN configure(16)
#define END _tile_release()
#define SCORES(t, keys, n, queries, sums)                                                                              \
  add_products(keys + (n) * 2 * (t->D / 32) * TILE, TILE, t->D / 32 * TILE, queries, t->D / 32, 1, sums)
#define VALUES(t, values, n, count, d, weights, begin, sums)                                                           \
  add_products(values + ((n) * (t->D / 32) + d) * 2 * TILE, 2 * (t->D / 32) * TILE, TILE, weights, count, begin, sums)

/* 16 rows of D columns become D / 32 tiles, each 16 rows of 64 bytes; rows past the last are zero. */
INLINE TARGET void pack_keys(const Attend *t, const uint16_t *keys, char *to) {
  for (long k = 0; k < round_up(t->K, 32); k++)
    for (long d = 0; d < t->D; d += 32) {
      char *row = to + (k / 16 * (t->D / 32) + d / 32) * TILE + k % 16 * 64;
      _mm512_store_si512(row, k < t->K ? _mm512_loadu_si512(keys + k * t->k_row + d) : _mm512_setzero_si512());
    }
}

/* 32 rows of D columns become D / 16 tiles: row d of a tile holds the 32 numbers of column d. */
INLINE TARGET void pack_values(const Attend *t, const uint16_t *values, char *to) {
  for (long k = 0; k < t->K; k += 32)
    for (long d = 0; d < t->D; d += 16, to += TILE) {
      __m512i r[16];
      for (int p = 0; p < 16; p++) r[p] = two_rows(values + d, t->v_row, k + 2 * p, t->K);
      transpose(r);
      for (int p = 0; p < 16; p++) _mm512_store_si512(to + 64 * p, r[p]);
    }
}

/* Four tiles [32 rows of the left, 32 columns of the right] of sums over `depth` pairs of tiles, added to what is there. */
INLINE TARGET void add_products(const char *left, long left_step, long lower, const char *right, long depth, int begin,
                                float *sums) {
  if (begin) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (long k = 0; k < depth; k++, left += left_step, right += 2 * TILE) {
    _tile_loadd(6, right, 64);
    _tile_loadd(4, left, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, left + lower, 64);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(7, right + TILE, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

#include "attend.h"

const Attends AMX_ATTENDS = ATTENDS;
#endif
