/* Attention of many queries with AMX: softmax(scale q k^T) v in bfloat16, without a mask.
 *
 * All of it is transposed: the scores of a block are S^T = K Q^T, a query in each column, so that their largest, their
 * sum and the factor of what came before stand in lanes of a register and nothing is added across one. The weights P^T
 * then stand nearly as the right factor of O^T = V^T P^T is read, two keys side by side. Keys and values are packed into
 * tiles once for all queries of a head.
 *
 * Sums and softmax are float32, weights are rounded to bfloat16 before they multiply values. A query's result depends on
 * no other query: not on which stand beside it in a tile, nor on how many there are.
 */
#include "amx.h"

#ifdef __x86_64__
#define QUERIES 32 /* columns of two tiles */
#define BLOCKS 4   /* of 32 keys, whose scores are weighed in a turn: they stay in the first cache */
#define KEYS (32 * BLOCKS)
#define TILE 1024  /* bytes */
#define LOG2_E 1.44269504f

INLINE long tiles_of(long count, long size) { return (count + size - 1) / size; }

/* Bytes of what a thread needs: keys, values, queries, scores and weights of two turns, sums. */
static long keys_bytes(const Attend *t) { return tiles_of(t->K, 32) * 2 * (t->D / 32) * TILE; }
static long queries_bytes(const Attend *t) { return 2 * t->D / 32 * TILE; }
static long sums_bytes(const Attend *t) { return t->D * QUERIES * 4; }
long amx_attend_bytes(const Attend *t) {
  return 2 * keys_bytes(t) + queries_bytes(t) + 2 * KEYS * QUERIES * (4 + 2) + sums_bytes(t);
}

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
      for (int p = 0; p < 16; p++) {
        __m512i pair[2];
        for (int i = 0; i < 2; i++) {
          const long row = k + 2 * p + i;
          pair[i] = row < t->K ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + row * t->v_row + d)))
                               : _mm512_setzero_si512();
        }
        r[p] = _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16));
      }
      transpose(r);
      for (int p = 0; p < 16; p++) _mm512_store_si512(to + 64 * p, r[p]);
    }
}

/* 16 queries become D / 32 tiles of pairs: row p of a tile holds columns 2p and 2p + 1 of each. */
INLINE TARGET void pack_queries(const Attend *t, const uint16_t *queries, long count, char *to) {
  for (long d = 0; d < t->D; d += 32, to += 2 * TILE) {
    __m512i r[16];
    for (int q = 0; q < 16; q++)
      r[q] = q < count ? _mm512_loadu_si512(queries + q * t->q_row + d) : _mm512_setzero_si512();
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

/* 2^x for x up to 127, relative error 3e-6; 0 for minus infinity, and a NaN stays one. */
INLINE TARGET __m512 exp2_of(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x - floor(x) */
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.0135341677f), f, _mm512_set1_ps(0.0520114609f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.241442757f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693003835f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.00000259f));
  return _mm512_scalef_ps(y, x); /* y 2^floor(x) */
}

/* Where a tile column of block n stands: 32 rows of 16. Four tiles make a block, two for each column. */
INLINE float *column_of(float *tiles, long n, long column) { return tiles + n * 1024 + column * 512; }

/* Rows from `count` on are of no key: their weight becomes zero. */
INLINE TARGET void hide_rows(float *scores, long count) {
  for (long r = count; r % 32; r++)
    for (long c = 0; c < 2; c++)
      _mm512_store_ps(column_of(scores, r / 32, c) + r % 32 * 16, _mm512_set1_ps(-INFINITY));
}

/* What is known of 16 queries, of all keys until now. factor: of all sums before the last block. */
typedef struct {
  __m512 largest, total, factor;
} Known;

/* Takes `blocks` times 32 keys into account: before they are weighed, while sums are still relative to what was largest. */
INLINE TARGET void meet(const Attend *t, float *scores, long column, long blocks, Known *known) {
  __m512 most = known->largest, other = most;
  for (long n = 0; n < blocks; n++) {
    const float *row = column_of(scores, n, column);
    for (int r = 0; r < 512; r += 32) {
      most = _mm512_max_ps(_mm512_load_ps(row + r), most);
      other = _mm512_max_ps(_mm512_load_ps(row + r + 16), other);
    }
  }
  most = _mm512_max_ps(most, other);
  known->factor = exp2_of(_mm512_mul_ps(_mm512_sub_ps(known->largest, most), _mm512_set1_ps(t->scale * LOG2_E)));
  known->largest = most;
  known->total = _mm512_mul_ps(known->total, known->factor);
}

/* Weighs the scores of block n for the 16 queries of a tile column; writes their weights in pairs. */
INLINE TARGET void weigh(const Attend *t, float *scores, long n, long column, char *weights, Known *known) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 scale = _mm512_set1_ps(t->scale * LOG2_E), shift = _mm512_mul_ps(known->largest, scale);
  __m512 sum = _mm512_setzero_ps(), rest = sum;
  const float *row = column_of(scores, n, column);
  char *to = weights + (2 * n + column) * TILE;
  for (int p = 0; p < 16; p++) {
    const __m512 one = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 32 * p), scale, shift));
    const __m512 two = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 32 * p + 16), scale, shift));
    sum = _mm512_add_ps(sum, one);
    rest = _mm512_add_ps(rest, two);
    _mm512_store_si512(to + 64 * p, _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(two, one)));
  }
  known->total = _mm512_add_ps(known->total, _mm512_add_ps(sum, rest));
}

/* Multiplies the sums of 16 queries: D / 32 blocks of four tiles, as for the scores. */
INLINE TARGET void scale_sums(const Attend *t, float *sums, long column, __m512 factor) {
  if (_mm512_cmp_ps_mask(factor, _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) return;
  for (long n = 0; n < t->D / 32; n++) {
    float *row = column_of(sums, n, column);
    for (int r = 0; r < 512; r += 16) _mm512_store_ps(row + r, _mm512_mul_ps(_mm512_load_ps(row + r), factor));
  }
}

INLINE TARGET void write_queries(const Attend *t, float *sums, long column, __m512 total, long count, uint16_t *out) {
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), total);
  for (long d = 0; d < t->D; d += 16) {
    __m512i r[16];
    const float *row = column_of(sums, d / 32, column) + d % 32 * 16;
    for (int i = 0; i < 16; i++) r[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(row + 16 * i), inverse);
    transpose(r);
    for (long q = 0; q < count; q++)
      _mm256_storeu_si256((__m256i *)(out + q * t->H * t->D + d), (__m256i)_mm512_cvtneps_pbh((__m512)r[q]));
  }
}

TARGET void amx_attend(const Attend *t, long b, long h, long first, long last, int pack, void *scratch) {
  const long depth = t->D / 32, all = tiles_of(t->K, 32);
  char *keys = scratch, *values = keys + keys_bytes(t), *queries = values + keys_bytes(t);
  float *first_scores = (float *)(queries + queries_bytes(t)), *scores[2] = {first_scores, first_scores + KEYS * QUERIES};
  char *first_weights = (char *)(scores[1] + KEYS * QUERIES);
  char *weights[2] = {first_weights, first_weights + KEYS * QUERIES * 2};
  float *sums = (float *)(weights[1] + KEYS * QUERIES * 2);
  if (pack) {
    pack_keys(t, t->k + b * t->k_batch + h * t->k_head, keys);
    pack_values(t, t->v + b * t->v_batch + h * t->v_head, values);
  }
  configure(16);
  for (long s = first; s < last; s += QUERIES) {
    const uint16_t *from = t->q + b * t->q_batch + h * t->q_head + s * t->q_row;
    uint16_t *out = t->out + ((b * t->S + s) * t->H + h) * t->D;
    const long count[2] = {smaller(16, last - s), smaller(16, last - s - 16)};
    Known known[2];
    for (int c = 0; c < 2; c++) {
      pack_queries(t, from + 16 * c * t->q_row, count[c], queries + c * TILE);
      known[c] = (Known){_mm512_set1_ps(-INFINITY), _mm512_setzero_ps(), _mm512_setzero_ps()};
    }
    /* Turn k weighs the scores of block k of KEYS keys. Beside it, piece by piece, for tiles and vectors work at the same
     * time: the products of block k + 1 with the queries, and those of block k - 1 with its values. */
    for (long k = -1, blocks = 0, before; k * BLOCKS < all + BLOCKS; k++) {
      const long next = smaller(BLOCKS, all - (k + 1) * BLOCKS);
      before = blocks;
      blocks = smaller(BLOCKS, all - k * BLOCKS);
      if (k < 0) blocks = 0;
      for (int c = 0; c < 2 && blocks > 0; c++) meet(t, scores[k & 1], c, blocks, &known[c]);
      for (long n = 0; n < BLOCKS || n < depth; n++) {
        if (n < next)
          add_products(keys + ((k + 1) * BLOCKS + n) * 2 * depth * TILE, TILE, depth * TILE, queries, depth, 1,
                       scores[~k & 1] + n * 1024);
        for (int c = 0; c < 2 && n < blocks; c++) weigh(t, scores[k & 1], n, c, weights[k & 1], &known[c]);
        if (n < depth && k > 0)
          add_products(values + ((k - 1) * BLOCKS * depth + n) * 2 * TILE, 2 * depth * TILE, TILE, weights[~k & 1], before,
                       k == 1, sums + n * 1024);
      }
      if (next > 0 && t->K < (k + 2) * KEYS) hide_rows(scores[~k & 1], t->K - (k + 1) * KEYS);
      for (int c = 0; c < 2 && k > 0 && blocks > 0; c++) scale_sums(t, sums, c, known[c].factor);
    }
    for (int c = 0; c < 2; c++) write_queries(t, sums, c, known[c].total, count[c], out + 16 * c * t->H * t->D);
  }
  _tile_release();
}
#endif
