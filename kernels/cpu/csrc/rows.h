/* The functions of one instruction set with vectors: included by a set's file, which defines
 *
 *   SET(name)          the name of a function of this set
 *   TARGET             the attribute that lets the compiler use the set
 *   VECTOR, LANES      a vector of float32 and its length
 *   ZERO, LOAD(p), STORE(p, v), BROADCAST(f), FMA(a, b, c) = a * b + c, SUM(v)
 *   LOAD_BFLOAT16(p), LOAD_FLOAT16(p), LOAD_INT8(p)   LANES weights as float32
 *   GROUP              rows of x that are multiplied at once, up to 6: SUMS = 4 * GROUP sums have to fit into the registers
 *   and, if the set has products of bfloat16 pairs:
 *   DOT_LANES          bfloat16 numbers of a vector, DOT_VECTOR its type, LOAD_DOT(p), DOT(sums, x, w)
 *   LOAD_INT8_DOT(p)   if there is one: DOT_LANES weights of 8 bits as bfloat16, which is exact
 * and, if there is a better way than four times SUM:
 *   ADD_SUMS(to, a, b, c, d)   adds the sums of four vectors to to[4]
 *
 * Every sum of a product has LANES partial sums, to each of which the columns are added in order, and which are added up
 * every PIECE columns: a row of the result depends neither on the other rows, nor on where the work is cut, nor on the
 * number of threads.
 */
/* How far before their use, in bytes of a row, weights are asked for: the second cache first, then the first one. Asked
 * for the first one alone, memory and arithmetic took turns: it has few places for what it waits for. */
#define FAR_AHEAD 2048
#define AHEAD 384
#define WIDEST 8   /* rows of the weights that are read side by side, if there are registers for the sums */
#define SUMS (4 * GROUP)
#define PIECE 2048 /* columns after which the partial sums are added up; that much of the rows stays in the first cache */
#define PAD 32     /* elements: rows of prepared x are filled with zeros up to a multiple */

#ifndef ADD_SUMS
#define ADD_SUMS(to, a, b, c, d) ((to)[0] += SUM(a), (to)[1] += SUM(b), (to)[2] += SUM(c), (to)[3] += SUM(d))
#endif

/* Calls a function whose last argument, how many rows it works on, is a constant, at most MOST. */
#define OF_HEIGHT(high, MOST, FUNCTION, ...)                                                                           \
  switch (high) {                                                                                                      \
    case 1: FUNCTION(__VA_ARGS__, 1); break;                                                                           \
    case 2: FUNCTION(__VA_ARGS__, (MOST) < 2 ? 1 : 2); break;                                                          \
    case 3: FUNCTION(__VA_ARGS__, (MOST) < 3 ? 1 : 3); break;                                                          \
    case 4: FUNCTION(__VA_ARGS__, (MOST) < 4 ? 1 : 4); break;                                                          \
    case 5: FUNCTION(__VA_ARGS__, (MOST) < 5 ? 1 : 5); break;                                                          \
    case 6: FUNCTION(__VA_ARGS__, (MOST) < 6 ? 1 : 6); break;                                                          \
  }

/* Adds to totals[M, WIDEST] the products of columns [k, end) of WIDE rows of the weights from n on with HIGH rows of x from
 * m on; STEP columns at once. Behind the end of these rows, those from `next` on are asked for. */
#define DEFINE_ROWS(NAME, ELEMENT, X_ELEMENT, X_VECTOR, STEP, LOAD_X, LOAD_WEIGHT, ADD)                                \
  INLINE TARGET void SET(NAME##_block)(const Linear *t, long n, long next, long m, long k, long end, float *totals,    \
                                       const int WIDE, const int HIGH) {                                               \
    const long K = t->K, size = sizeof(ELEMENT), line = 64 / size, row = round_up(K, PAD);                             \
    const long far = (t->M > GROUP ? PIECE * size : FAR_AHEAD) / size;                                                 \
    const ELEMENT *w = (const ELEMENT *)t->weight + n * K, *after = (const ELEMENT *)t->weight + (next - 1) * K;       \
    const X_ELEMENT *x = (const X_ELEMENT *)t->prepared + m * row;                                                     \
    VECTOR sums[WIDEST][GROUP];                                                                                        \
    for (int r = 0; r < WIDE; r++)                                                                                     \
      for (int g = 0; g < HIGH; g++) sums[r][g] = ZERO;                                                                \
    for (; k + line <= end; k += line) {                                                                               \
      const ELEMENT *ahead = (k + far < K ? w : after) + k + far;                                                      \
      for (int r = 0; r < WIDE; r++) {                                                                                 \
        __builtin_prefetch(ahead + r * K, 0, 1);                                                                       \
        __builtin_prefetch(w + r * K + k + AHEAD / size, 0, 3);                                                        \
      }                                                                                                                \
      for (int i = 0; i < line; i += STEP) {                                                                           \
        X_VECTOR xs[GROUP];                                                                                            \
        for (int g = 0; g < HIGH; g++) xs[g] = LOAD_X(x + g * row + k + i);                                            \
        for (int r = 0; r < WIDE; r++) {                                                                               \
          X_VECTOR ws = LOAD_WEIGHT(w + r * K + k + i);                                                                \
          for (int g = 0; g < HIGH; g++) sums[r][g] = ADD(sums[r][g], xs[g], ws);                                      \
        }                                                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
    for (; k < end; k += STEP) /* what is left of a row; past its end stand zeros */                                   \
      for (int r = 0; r < WIDE; r++) {                                                                                 \
        ELEMENT rest[STEP] = {0};                                                                                      \
        memcpy(rest, w + r * K + k, (size_t)smaller(STEP, end - k) * sizeof(ELEMENT));                                 \
        X_VECTOR ws = LOAD_WEIGHT(rest);                                                                               \
        for (int g = 0; g < HIGH; g++) sums[r][g] = ADD(sums[r][g], LOAD_X(x + g * row + k), ws);                      \
      }                                                                                                                \
    for (int g = 0; g < HIGH; g++) {                                                                                   \
      float *to = totals + WIDEST * (m + g);                                                                           \
      int r = 0;                                                                                                       \
      for (; r + 4 <= WIDE; r += 4) ADD_SUMS(to + r, sums[r][g], sums[r + 1][g], sums[r + 2][g], sums[r + 3][g]);      \
      for (; r < WIDE; r++) to[r] += SUM(sums[r][g]);                                                                  \
    }                                                                                                                  \
  }                                                                                                                    \
  INLINE TARGET void SET(NAME##_wide)(const Linear *t, long n, long next, float *totals, const int WIDE) {             \
    memset(totals, 0, (size_t)(WIDEST * t->M) * 4);                                                                    \
    for (long k = 0; k < t->K; k += PIECE) {                                                                           \
      const long end = smaller(k + PIECE, t->K);                                                                       \
      for (long m = 0; m < t->M; m += GROUP)                                                                           \
        OF_HEIGHT(smaller(GROUP, t->M - m), WIDE > 4 ? SUMS / WIDE : GROUP, SET(NAME##_block), t, n, next, m, k, end,  \
                  totals, WIDE);                                                                                       \
    }                                                                                                                  \
    for (long m = 0; m < t->M; m++)                                                                                    \
      for (int r = 0; r < WIDE; r++) finish(t, m, n + r, totals[WIDEST * m + r]);                                      \
  }                                                                                                                    \
  static TARGET __attribute__((noinline)) void SET(NAME##_rows)(const Linear *t, long n, long last, long next,         \
                                                                float *totals) {                                       \
    WHILE_WIDE(8, NAME)                                                                                                \
    WHILE_WIDE(6, NAME)                                                                                                \
    WHILE_WIDE(4, NAME)                                                                                                \
    WHILE_WIDE(1, NAME)                                                                                                \
  }

/* Rows [n, last) as long as there are WIDE of them, and registers. */
#define WHILE_WIDE(WIDE, NAME)                                                                                         \
  for (; n + WIDE <= last && (WIDE <= 4 || t->M * WIDE <= SUMS); n += WIDE)                                            \
    SET(NAME##_wide)(t, n, n + WIDE < last ? n + WIDE : next, totals, WIDE);

#define MULTIPLY_ADD(sums, x, w) FMA(x, w, sums)
DEFINE_ROWS(bfloat16, uint16_t, float, VECTOR, LANES, LOAD, LOAD_BFLOAT16, MULTIPLY_ADD)
DEFINE_ROWS(float16, uint16_t, float, VECTOR, LANES, LOAD, LOAD_FLOAT16, MULTIPLY_ADD)
DEFINE_ROWS(float32, float, float, VECTOR, LANES, LOAD, LOAD, MULTIPLY_ADD)
DEFINE_ROWS(int8, int8_t, float, VECTOR, LANES, LOAD, LOAD_INT8, MULTIPLY_ADD)
#ifdef DOT
DEFINE_ROWS(dot, uint16_t, uint16_t, DOT_VECTOR, DOT_LANES, LOAD_DOT, LOAD_DOT, DOT)
#endif
#ifdef LOAD_INT8_DOT
DEFINE_ROWS(int8_dot, int8_t, uint16_t, DOT_VECTOR, DOT_LANES, LOAD_DOT, LOAD_INT8_DOT, DOT)
#endif

static int SET(serves)(const Linear *t) { return t->x_type != INT8; }

typedef void Rows(const Linear *t, long n, long last, long next, float *totals);

/* The function that multiplies these types as pairs of bfloat16, NULL without one. */
INLINE Rows *SET(dots)(const Linear *t) {
  if (t->x_type != BFLOAT16) return NULL;
#ifdef DOT
  if (t->weight_type == BFLOAT16) return SET(dot_rows);
#endif
#ifdef LOAD_INT8_DOT
  if (t->weight_type == INT8) return SET(int8_dot_rows);
#endif
  return NULL;
}

static long SET(prepared_bytes)(const Linear *t) { return t->M * round_up(t->K, PAD) * (SET(dots)(t) ? 2 : 4); }
static long SET(units)(const Linear *t) { return t->M; }

/* Up to 48 rows; fewer where all threads have equally many of them then. */
static long SET(step)(const Linear *t, int threads) {
  const long turns = (t->N + 48L * threads - 1) / (48L * threads);
  return round_up((t->N + turns * threads - 1) / (turns * threads), 4);
}

static long SET(scratch_bytes)(const Linear *t) { return WIDEST * t->M * 4; }

static TARGET void SET(prepare)(const Linear *t, long first, long last) {
  const long K = t->K, row = round_up(K, PAD);
  for (long m = first; m < last; m++) {
    if (SET(dots)(t)) {
      uint16_t *to = (uint16_t *)t->prepared + m * row;
      memcpy(to, (const uint16_t *)t->x + m * K, (size_t)K * 2);
      memset(to + K, 0, (size_t)(row - K) * 2);
      continue;
    }
    float *to = (float *)t->prepared + m * row;
    if (t->x_type == FLOAT32) memcpy(to, (const float *)t->x + m * K, (size_t)K * 4);
    else {
      const uint16_t *from = (const uint16_t *)t->x + m * K;
      long k = 0;
      for (; k + LANES <= K; k += LANES)
        STORE(to + k, t->x_type == BFLOAT16 ? LOAD_BFLOAT16(from + k) : LOAD_FLOAT16(from + k));
      for (; k < K; k++) to[k] = get(from, k, t->x_type);
    }
    memset(to + K, 0, (size_t)(row - K) * 4);
  }
}

static void SET(multiply)(const Linear *t, long first, long last, long next, void *totals) {
  Rows *const dots = SET(dots)(t);
  if (dots) {
    dots(t, first, last, next, totals);
    return;
  }
  switch (t->weight_type) {
    case BFLOAT16: SET(bfloat16_rows)(t, first, last, next, totals); break;
    case FLOAT16: SET(float16_rows)(t, first, last, next, totals); break;
    case FLOAT32: SET(float32_rows)(t, first, last, next, totals); break;
    case INT8: SET(int8_rows)(t, first, last, next, totals); break;
  }
}

/* e^x for x <= 87 within two roundings: 2^n e^r, |r| <= ln(2) / 2, by the series to the sixth power; below -87 as there. A
 * plain loop over it is made of vectors by the compiler. */
INLINE float SET(exponential)(float x) {
  x = x < -87.0f ? -87.0f : x; /* a NaN stays one */
  float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23: its last bit is worth 1 */
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  int32_t power = ((int32_t)n + 127) << 23;
  float two;
  memcpy(&two, &power, 4);
  return e * two;
}

/* Adds the weighted values of `count` rows to sums[HIGH, D]. */
#define DEFINE_VALUES(NAME, ELEMENT, LOAD_VALUE)                                                                       \
  INLINE TARGET void SET(NAME##_values)(const ELEMENT *values, const float *weights, float *sums, long D, long count,  \
                                        const int HIGH) {                                                              \
    for (long d = 0; d < D; d += 4 * LANES) {                                                                          \
      VECTOR s[GROUP][4];                                                                                              \
      for (int g = 0; g < HIGH; g++)                                                                                   \
        for (int i = 0; i < 4; i++) s[g][i] = d + i * LANES < D ? LOAD(sums + g * (D + 2) + d + i * LANES) : ZERO;     \
      for (long row = 0; row < count; row++)                                                                           \
        for (int i = 0; i < 4; i++) {                                                                                  \
          if (d + i * LANES >= D) break;                                                                               \
          VECTOR v = LOAD_VALUE(values + row * D + d + i * LANES);                                                     \
          for (int g = 0; g < HIGH; g++) s[g][i] = FMA(BROADCAST(weights[g * CHUNK + row]), v, s[g][i]);               \
        }                                                                                                              \
      for (int g = 0; g < HIGH; g++)                                                                                   \
        for (int i = 0; i < 4; i++)                                                                                    \
          if (d + i * LANES < D) STORE(sums + g * (D + 2) + d + i * LANES, s[g][i]);                                   \
    }                                                                                                                  \
  }                                                                                                                    \
  static TARGET void SET(NAME##_weigh)(const Attention *t, const ELEMENT *values, const float *weights, float *sums,   \
                                       long count) {                                                                   \
    const long D = t->D, R = t->H / t->G, block = 32; /* rows whose values stay in the first cache */                  \
    for (long row = 0; row < count; row += block)                                                                      \
      for (long r = 0; r < R; r += GROUP) {                                                                            \
        const ELEMENT *v = values + row * D;                                                                           \
        const float *w = weights + r * CHUNK + row;                                                                    \
        float *s = sums + r * (D + 2);                                                                                 \
        const long rows = smaller(block, count - row);                                                                 \
        OF_HEIGHT(smaller(GROUP, R - r), GROUP, SET(NAME##_values), v, w, s, D, rows);                                 \
      }                                                                                                                \
  }
DEFINE_VALUES(bfloat16, uint16_t, LOAD_BFLOAT16)
DEFINE_VALUES(float16, uint16_t, LOAD_FLOAT16)
DEFINE_VALUES(float32, float, LOAD)

static TARGET void SET(weigh)(const Attention *t, const void *values, long count, float *scores, float *sums) {
  const long D = t->D, R = t->H / t->G;
  for (long r = 0; r < R; r++) {
    float *s = scores + r * CHUNK, *to = sums + r * (D + 2);
    float largest[16], total[16] = {0}; /* partial results, for vectors */
    for (long i = count; i < round_up(count, 16); i++) s[i] = -INFINITY; /* weighs 1e-38: nothing, beside at least 1 */
    memcpy(largest, s, sizeof largest);
    for (long i = 16; i < count; i += 16)
      for (int j = 0; j < 16; j++) largest[j] = largest[j] < s[i + j] ? s[i + j] : largest[j];
    for (int j = 1; j < 16; j++) largest[0] = largest[0] < largest[j] ? largest[j] : largest[0];
    for (long i = 0; i < count; i += 16)
      for (int j = 0; j < 16; j++) total[j] += s[i + j] = SET(exponential)((s[i + j] - largest[0]) * t->scale);
    for (int j = 1; j < 16; j++) total[0] += total[j];
    memset(to, 0, (size_t)D * 4);
    to[D] = largest[0] * t->scale;
    to[D + 1] = total[0];
  }
  switch (t->type) {
    case BFLOAT16: SET(bfloat16_weigh)(t, values, scores, sums, count); break;
    case FLOAT16: SET(float16_weigh)(t, values, scores, sums, count); break;
    case FLOAT32: SET(float32_weigh)(t, values, scores, sums, count); break;
  }
}

#include "layer.h"
#include "snake.h"
#include "winograd.h"

#define SET_OF_VECTORS(NAME, ATTENDS)                                                                                  \
  {.name = NAME, .here = SET(here), .serves = SET(serves), .prepared_bytes = SET(prepared_bytes),                      \
   .prepare = SET(prepare), .units = SET(units), .step = SET(step), .scratch_bytes = SET(scratch_bytes),               \
   .asks_ahead = 1, .multiply = SET(multiply), .weigh = SET(weigh), .attends = ATTENDS, .snake = SET(snake),          \
   .winograd_signal = SET(winograd_signal), .winograd_results = SET(winograd_results), .norm = SET(norm),              \
   .rotary = SET(rotary), .gate = SET(gate)}
