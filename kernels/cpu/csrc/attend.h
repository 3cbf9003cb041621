/* Attention of many queries: softmax(scale q k^T) v in bfloat16, without a mask. Included by a set's file, which defines
 *
 *   SET(name), TARGET, as for rows.h
 *   COLUMNS            columns of 16 queries that are worked on at once
 *   BEGIN, END         what comes before the first product and after the last
 *   pack_keys(t, keys, to), pack_values(t, values, to)
 *                      write all keys and values of a head in the form that the set reads, zeros up to a multiple of 32
 *   SCORES(t, keys, n, queries, sums)
 *                      writes the products of block n of keys with the queries
 *   VALUES(t, values, n, count, d, weights, begin, sums)
 *                      adds the weighted values of `count` blocks from n on to block d of 32 columns of the sums, which
 *                      are zero at the beginning
 *
 * All of it is transposed: the scores of a block are S^T = K Q^T, a query in each lane, so that their largest, their sum
 * and the factor of what came before stand in lanes of a register and nothing is added across one. The weights P^T then
 * stand nearly as the right factor of O^T = V^T P^T is read, two keys side by side. Keys and values are packed once for
 * all queries of a head.
 *
 * What stands in the buffers: queries and weights in pieces of 1024 bytes, one for 32 numbers of 16 queries, two numbers
 * side by side: row p holds numbers 2p and 2p + 1 of each; scores and sums in float32, 32 rows of 16 queries after each
 * other, for each column of a block.
 *
 * Sums and softmax are float32, weights are rounded to bfloat16 before they multiply values. A query's result depends on
 * no other query: not on which stand beside it, nor on how many there are.
 */
#include "transpose.h"

#define BLOCKS 4 /* of 32 keys, whose scores are weighed in a turn */
#define QUERIES (16 * COLUMNS)
#define KEYS (32 * BLOCKS)
#define PIECE_BYTES 1024
#define LOG2_E 1.44269504f

/* Bytes of what a thread needs: keys, values, queries, scores and weights of two turns, sums. */
static long keys_bytes(const Attend *t) { return round_up(t->K, 32) * t->D * 2; }
static long queries_bytes(const Attend *t) { return QUERIES * t->D * 2; }
static long sums_bytes(const Attend *t) { return t->D * QUERIES * 4; }
static long SET(attend_bytes)(const Attend *t) {
  return 2 * keys_bytes(t) + queries_bytes(t) + 2 * KEYS * QUERIES * (4 + 2) + sums_bytes(t);
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

/* 16 queries become D / 32 pieces. */
INLINE TARGET void pack_queries(const Attend *t, const uint16_t *queries, long count, char *to) {
  for (long d = 0; d < t->D; d += 32, to += COLUMNS * PIECE_BYTES) {
    __m512i r[16];
    for (int q = 0; q < 16; q++)
      r[q] = q < count ? _mm512_loadu_si512(queries + q * t->q_row + d) : _mm512_setzero_si512();
    transpose(r);
    for (int p = 0; p < 16; p++) _mm512_store_si512(to + 64 * p, r[p]);
  }
}

/* Where a column of block n stands: 32 rows of 16. */
INLINE float *column_of(float *blocks, long n, long column) { return blocks + (n * COLUMNS + column) * 512; }

/* Rows from `count` on are of no key: their weight becomes zero. */
INLINE TARGET void hide_rows(float *scores, long count) {
  for (long r = count; r % 32; r++)
    for (long c = 0; c < COLUMNS; c++)
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

/* Weighs the scores of block n for the 16 queries of a column; writes their weights in pairs. */
INLINE TARGET void weigh(const Attend *t, float *scores, long n, long column, char *weights, Known *known) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                               21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512 scale = _mm512_set1_ps(t->scale * LOG2_E), shift = _mm512_mul_ps(known->largest, scale);
  __m512 sum = _mm512_setzero_ps(), rest = sum;
  const float *row = column_of(scores, n, column);
  char *to = weights + (COLUMNS * n + column) * PIECE_BYTES;
  for (int p = 0; p < 16; p++) {
    const __m512 one = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 32 * p), scale, shift));
    const __m512 two = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(row + 32 * p + 16), scale, shift));
    sum = _mm512_add_ps(sum, one);
    rest = _mm512_add_ps(rest, two);
    _mm512_store_si512(to + 64 * p, _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(two, one)));
  }
  known->total = _mm512_add_ps(known->total, _mm512_add_ps(sum, rest));
}

/* Multiplies the sums of 16 queries: D / 32 blocks, as of the scores. */
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

static TARGET void SET(attend)(const Attend *t, long b, long h, long first, long last, int pack, void *scratch) {
  const long depth = t->D / 32, all = round_up(t->K, 32) / 32;
  char *keys = scratch, *values = keys + keys_bytes(t), *queries = values + keys_bytes(t);
  float *first_scores = (float *)(queries + queries_bytes(t)), *scores[2] = {first_scores, first_scores + KEYS * QUERIES};
  char *first_weights = (char *)(scores[1] + KEYS * QUERIES);
  char *weights[2] = {first_weights, first_weights + KEYS * QUERIES * 2};
  float *sums = (float *)(weights[1] + KEYS * QUERIES * 2);
  if (pack) {
    pack_keys(t, t->k + b * t->k_batch + h * t->k_head, keys);
    pack_values(t, t->v + b * t->v_batch + h * t->v_head, values);
  }
  BEGIN;
  for (long s = first; s < last; s += QUERIES) {
    const uint16_t *from = t->q + b * t->q_batch + h * t->q_head + s * t->q_row;
    uint16_t *out = t->out + ((b * t->S + s) * t->H + h) * t->D;
    Known known[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      pack_queries(t, from + 16 * c * t->q_row, last - s - 16 * c, queries + c * PIECE_BYTES);
      known[c] = (Known){_mm512_set1_ps(-INFINITY), _mm512_setzero_ps(), _mm512_setzero_ps()};
    }
    /* Turn k weighs the scores of block k of KEYS keys. Beside it, piece by piece, for tiles and vectors work at the same
     * time: the products of block k + 1 with the queries, and those of block k - 1 with its values. */
    for (long k = -1, blocks = 0, before; k * BLOCKS < all + BLOCKS; k++) {
      const long next = smaller(BLOCKS, all - (k + 1) * BLOCKS);
      before = blocks;
      blocks = smaller(BLOCKS, all - k * BLOCKS);
      if (k < 0) blocks = 0;
      for (int c = 0; c < COLUMNS && blocks > 0; c++) meet(t, scores[k & 1], c, blocks, &known[c]);
      for (long n = 0; n < BLOCKS || n < depth; n++) {
        if (n < next)
          SCORES(t, keys, (k + 1) * BLOCKS + n, queries, column_of(scores[~k & 1], n, 0));
        for (int c = 0; c < COLUMNS && n < blocks; c++) weigh(t, scores[k & 1], n, c, weights[k & 1], &known[c]);
        if (n < depth && k > 0)
          VALUES(t, values, (k - 1) * BLOCKS, before, n, weights[~k & 1], k == 1, column_of(sums, n, 0));
      }
      if (next > 0 && t->K < (k + 2) * KEYS) hide_rows(scores[~k & 1], t->K - (k + 1) * KEYS);
      for (int c = 0; c < COLUMNS && k > 0 && blocks > 0; c++) scale_sums(t, sums, c, known[c].factor);
    }
    for (int c = 0; c < COLUMNS && s + 16 * c < last; c++)
      write_queries(t, sums, c, known[c].total, smaller(16, last - s - 16 * c), out + 16 * c * t->H * t->D);
  }
  END;
}

#define ATTENDS {.step = QUERIES, .bytes = SET(attend_bytes), .attend = SET(attend)}
