/* The kernels for CPUs: what the files of this folder share.
 *
 * Letters: M rows of x, N rows of the weights (columns of the result), K columns of both.
 * One function per instruction set, chosen at run time; a set is a row of the table in covo.c.
 */
#ifndef COVO_H
#define COVO_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { BFLOAT16, FLOAT16, FLOAT32, INT8 }; /* element types, as library.py numbers them */

INLINE long smaller(long a, long b) { return a < b ? a : b; }
INLINE long round_up(long n, long step) { return (n + step - 1) / step * step; }
INLINE long bytes_of(int type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

/* y[M, N] = (x[M, K] . weight[N, K]^T) * scale[N] + bias[N], sums in float32, rounded once. All rows are contiguous and
 * may start at any element. bias is of x's type; scale and bias may be NULL. prepared: x in the form that the set reads,
 * see Set. */
typedef struct {
  const void *x, *weight, *bias;
  const float *scale;
  void *y, *prepared;
  long M, N, K;
  int x_type, weight_type, y_type;
  long y_stride; /* elements from one row of y to the next */
} Linear;

/* out[B, H, D]: attention of one query a slot. caches: [B_max, G, K_max, D]; lengths[B]: valid rows. */
typedef struct {
  const void *query, *keys, *values;
  const long *lengths;
  void *out;
  float *partial; /* [B, G, chunks, H / G, D + 2]: sums of weighted values, largest score, sum of weights */
  long B, H, G, K_max, D, chunks;
  float scale;
  int type;
} Attention;

#define CHUNK 256 /* rows of the cache that one piece of attention reads: the same for any number of threads */

/* out[B, S, H, D]: attention of S queries to all K keys, bfloat16; D a multiple of 32. A row of D elements is contiguous,
 * those of a batch, a row and a head are as many elements apart as said; out is contiguous. */
typedef struct {
  const uint16_t *q, *k, *v;
  uint16_t *out;
  long B, S, K, H, D;
  long q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head;
  float scale;
} Attend;

/* y[rows, L] = Kernels.anti_aliased_snake of interface.py, float32: x[rows, N], alpha[C], inverse_beta[C], 12 taps each. L
 * is N, less SNAKE_CONTEXT for each side on which the signal goes on. */
typedef struct {
  const float *x, *alpha, *inverse_beta, *up, *down;
  float *y;
  long rows, C, N;
  int starts, ends;
} Snake;

#define SNAKE_CONTEXT 5

INLINE long snake_length(const Snake *t) { return t->N - SNAKE_CONTEXT * (!t->starts + !t->ends); }

/* A convolution by Winograd's way, see winograd.h, float32: signal[B, C, N] and products[B, POINTS, C, tiles]. tiles is a
 * multiple of dilation, which is at most MOST_DILATION. The signal is read and the products are written, or the other way
 * round, then with bias[C], which may be NULL; N is at most 4 * tiles when it is written. */
typedef struct {
  float *signal, *products;
  const float *bias;
  long B, C, N, tiles, dilation;
} Winograd;

#define POINTS 7
#define MOST_DILATION 16

/* summed[rows, C] = x + residual, normed[rows, C] = Kernels.rms_norm of that with weight[C]; of x itself if residual is NULL,
 * and nothing is written to summed then. All are of one type. */
typedef struct {
  const void *x, *residual, *weight;
  void *normed, *summed;
  long rows, C;
  float eps;
  int type;
} Norm;

/* y[B, S, H, D] = Kernels.rotary of x; all are of one type, D is even. A row of D elements is contiguous, those of a batch, a
 * row and a head of x are as many elements apart as said, those of a batch of cosines and sines, too; all else is contiguous. */
typedef struct {
  const void *x, *cosines, *sines;
  void *y;
  long B, S, H, D;
  long x_batch, x_row, x_head, angle_batch;
  int type;
} Rotary;

/* y[rows, F] = Kernels.swiglu of gate_up[rows, 2F]. */
typedef struct {
  const void *gate_up;
  void *y;
  long rows, F;
  int type;
} Gate;

/* The weights of a product, see Linear. */
typedef struct {
  const void *weight, *bias;
  const float *scale;
  long type;
} ProductWeights;

/* A layer of Qwen2: norms[C], products, and its caches [B_max, G, K_max, D]. */
typedef struct {
  const void *norm, *post_norm;
  ProductWeights qkv, o, gate_up, down;
  void *keys, *values;
} Layer;

/* x[B, C]: one more token in each of the slots 0 .. B - 1, cosines and sines[B, D] of its position, lengths[B]: valid rows, its
 * own included, which are written to the caches. out and residual[B, C], whose sum goes on: the last layer's feed-forward
 * output, and the stream before it. */
typedef struct {
  const Layer *layers;
  const void *x, *cosines, *sines;
  const long *lengths;
  void *out, *residual;
  long num_layers, B, C, H, G, D, F, K_max;
  float eps, scale;
  int type;
} Decoder;

/* How a set attends. A unit of the work is the queries [first, last) of head h, first a multiple of `step`. */
typedef struct {
  long step;
  long (*bytes)(const Attend *); /* of a thread's scratch memory */
  /* pack: whether the scratch memory does not hold this head's keys and values yet */
  void (*attend)(const Attend *, long b, long h, long first, long last, int pack, void *scratch);
} Attends;

/* Works on one row of a job, which is one of the structs above. */
typedef void Row(const void *job, long row);

/* What an instruction set can do. A function of a set is called only on a machine that has it. */
typedef struct {
  const char *name;
  int (*here)(void);                           /* whether this machine and its system execute the set */
  int (*serves)(const Linear *);               /* whether it multiplies these types */
  long (*prepared_bytes)(const Linear *);      /* of x in the form that the set reads */
  void (*prepare)(const Linear *, long, long); /* write that form of units [first, last) */
  long (*units)(const Linear *);               /* how many units that is */
  long (*step)(const Linear *, int threads);   /* rows of the weights that a thread takes at once */
  long (*scratch_bytes)(const Linear *);       /* of a thread */
  int asks_ahead; /* whether multiply() asks for rows that follow the last one: threads take those early then */
  /* rows [first, last) of the weights; the thread goes on with row `next`, if the set asks ahead */
  void (*multiply)(const Linear *, long first, long last, long next, void *scratch);
  /* The weighted values of `count` rows of a cache, and of what they are relative to, into sums[H / G, D + 2].
   * scores[H / G, CHUNK]: products of queries and keys, overwritten. */
  void (*weigh)(const Attention *, const void *values, long count, float *scores, float *sums);
  const Attends *attends; /* attention of many queries, NULL without it */
  Row *snake;                             /* of a Snake */
  Row *winograd_signal, *winograd_results; /* of a Winograd: B * C rows */
  Row *norm, *rotary, *gate;              /* of a Norm, a Rotary (B * S rows), a Gate */
} Set;

extern const Attends AMX_ATTENDS, AVX512_BF16_ATTENDS;
extern const Set AMX, AVX512_BF16, AVX512, AVX2, NEON_BF16, NEON, PORTABLE;

INLINE float from_bfloat16(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

/* Rounds to nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

INLINE float from_float16(uint16_t bits) {
  /* The exponent is moved by a product, which is exact and gives subnormals their value. */
  uint32_t wide = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
  float value;
  memcpy(&value, &wide, 4);
  value *= 0x1p112f;
  memcpy(&wide, &value, 4);
  wide = sign | ((bits & 0x7c00) == 0x7c00 ? 0x7f800000 | (uint32_t)(bits & 0x3ff) << 13 : wide);
  memcpy(&value, &wide, 4);
  return value;
}

/* Rounds to nearest, ties to even; from 65520 on infinity. */
INLINE uint16_t to_float16(float value) {
  uint32_t bits, size, small, half;
  memcpy(&bits, &value, 4);
  size = bits & 0x7fffffff;
  memcpy(&value, &size, 4);
  value += 0.5f; /* a subnormal of float16: its last bit is worth 2^-24, as that of 0.5 in float32 */
  memcpy(&small, &value, 4);
  half = (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
  half = size < 0x38800000 ? small - 0x3f000000 : half;
  half = size >= 0x477ff000 ? 0x7c00 : half;
  half = size > 0x7f800000 ? 0x7e00 : half;
  return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)half;
}

INLINE float get(const void *from, long i, int type) {
  if (type == FLOAT32) return ((const float *)from)[i];
  return type == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[i]) : from_float16(((const uint16_t *)from)[i]);
}

INLINE void put(void *to, long i, int type, float value) {
  if (type == FLOAT32) ((float *)to)[i] = value;
  else ((uint16_t *)to)[i] = type == BFLOAT16 ? to_bfloat16(value) : to_float16(value);
}

/* The sum of row m and column n is complete: scale, add the bias, round. */
INLINE void finish(const Linear *t, long m, long n, float sum) {
  if (t->scale) sum *= t->scale[n];
  if (t->bias) sum += get(t->bias, n, t->x_type);
  put(t->y, m * t->y_stride + n, t->y_type, sum);
}

/* Runs work(job) once in each of `threads` threads and returns when all have. */
void covo_parallel(void (*work)(void *), void *job, int threads);

/* The functions that library.py calls. i: the number of a set; those that return one say which has served, -1: no memory. */
#define EXPORT __attribute__((visibility("default")))

const char *covo_set_name(int i);
int covo_set_here(int i);
const char *covo_sources(void);
void covo_use_team(void (*team)(void (*)(void *), void *, unsigned, unsigned));
int covo_linear(int i, int threads, const void *x, int x_type, const void *weight, int weight_type, const float *scale,
                const void *bias, void *y, long M, long N, long K);
int covo_decode_attention(int i, int threads, const void *query, const void *keys, const void *values, const long *lengths,
                          void *out, int type, long B, long H, long G, long K_max, long D, float scale);
int covo_attends(int i);
int covo_attention(int i, int threads, const Attend *t);
void covo_snake(int i, int threads, const Snake *t);
void covo_winograd_signal(int i, int threads, const Winograd *t);
void covo_winograd_results(int i, int threads, const Winograd *t);
void covo_norm(int i, int threads, const Norm *t);
void covo_rotary(int i, int threads, const Rotary *t);
void covo_gate(int i, int threads, const Gate *t);
int covo_decoder(int i, int threads, const Decoder *t);

#endif
