/* Tests of kernels/cpu in C alone, for processors that are emulated: every instruction set that the machine executes,
 * on odd sizes, unaligned starts, tiny and huge rows, zeros and subnormals, against sums in double.
 *
 * Prints a line for each set: "neon: 65 products, 9 attentions, 5 activations, 6 convolutions, 27 norms, rotations and gates" or
 * "neon_bf16: not executed here".
 * Exit code 1 if a result is beyond its bound, or if a deliberate mistake stays within it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "covo.h"

static const char *TYPES[] = {"bfloat16", "float16", "float32", "int8"};
static const double EPSILON[] = {0x1p-8, 0x1p-11, 0x1p-24}; /* of one rounding */
static int faults;
static uint64_t state;

static double uniform(void) { /* in (-1, 1), xorshift */
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (double)(int64_t)state / 0x1p63;
}

static double normal(void) {
  double sum = 0;
  for (int i = 0; i < 12; i++) sum += uniform();
  return sum / 2;
}

static double at(const void *from, long i, int type) {
  return type == INT8 ? ((const int8_t *)from)[i] : get(from, i, type);
}

static void set(void *to, long i, int type, double value) {
  if (type == INT8) ((int8_t *)to)[i] = (int8_t)fmax(-128, fmin(127, rint(value * 40)));
  else put(to, i, type, (float)value);
}

/* Memory for elements that starts where no vector does. */
static void *unaligned(long count, int type) { return (char *)malloc((size_t)(count + 2) * 4) + bytes_of(type); }
static void release(void *memory, int type) { free((char *)memory - bytes_of(type)); }

static int product(int i, int x_type, int weight_type, long M, long N, long K) {
  void *x = unaligned(M * K, x_type), *w = unaligned(N * K, weight_type), *bias = unaligned(N, x_type);
  void *y = unaligned(M * N, x_type);
  float *scale = malloc((size_t)N * 4);
  for (long m = 0; m < M; m++)
    for (long k = 0; k < K; k++)
      set(x, m * K + k, x_type, normal() * (m == 0 ? 1e-3 : m == 1 ? 50 : m == 3 ? 0 : m == 4 ? 1e-7 : 1));
  for (long n = 0; n < N; n++) {
    for (long k = 0; k < K; k++) set(w, n * K + k, weight_type, n == 2 ? 0 : normal());
    set(bias, n, x_type, normal());
    scale[n] = (float)(uniform() * uniform() / 64);
  }
  const int served = covo_linear(i, 3, x, x_type, w, weight_type, weight_type == INT8 ? scale : NULL, bias, y, M, N, K);
  double worst = 0, least_mistake = 0;
  for (long m = 0; m < M; m++)
    for (long n = 0; n < N; n++) {
      double sum = 0, size = 0, factor = weight_type == INT8 ? scale[n] : 1, last = 0;
      for (long k = 0; k < K; k++) {
        last = at(x, m * K + k, x_type) * at(w, n * K + k, weight_type);
        sum += last;
        size += fabs(last);
      }
      const double exact = sum * factor + at(bias, n, x_type), found = at(y, m * N + n, x_type);
      /* Sums of K products in float32: K roundings at worst, their square root typically; twice that; subnormals. */
      const double bound = EPSILON[x_type] * fabs(exact) + 2 * (sqrt(K) + 4) * 0x1p-24 * (size * fabs(factor) + fabs(exact)) +
                           (x_type == FLOAT16 ? 0x1p-25 : 0) + 0x1p-120;
      worst = fmax(worst, fabs(found - exact) / bound);
      if (fabs(last * factor) > 0) least_mistake = fmax(least_mistake, fabs(found - exact + last * factor) / bound);
    }
  if (worst > 1 || served < i || (M > 1 && N > 1 && K < 2000 && least_mistake <= 1)) {
    printf("%s, served by %s: x %s, weights %s, %ld x %ld x %ld: %.3g of the bound, without the last column %.3g\n",
           covo_set_name(i), covo_set_name(served), TYPES[x_type], TYPES[weight_type], M, N, K, worst, least_mistake);
    faults++;
  }
  release(x, x_type), release(w, weight_type), release(bias, x_type), release(y, x_type), free(scale);
  return 1;
}

static int attention(int i, int type, long B, long H, long G, long D, const long *lengths) {
  const long K_max = 600, R = H / G;
  void *q = unaligned(B * H * D, type), *k = unaligned(B * G * K_max * D, type), *v = unaligned(B * G * K_max * D, type);
  void *out = unaligned(B * H * D, type);
  const double scale = 1 / sqrt(D);
  double *weights = malloc(K_max * sizeof *weights), worst = 0, mistake = 0;
  for (long j = 0; j < B * H * D; j++) set(q, j, type, normal() * (j / D % H == 0 ? 20 : 1));
  for (long j = 0; j < B * G * K_max * D; j++) set(k, j, type, normal()), set(v, j, type, normal());
  covo_decode_attention(i, 3, q, k, v, lengths, out, type, B, H, G, K_max, D, (float)scale);
  for (long h = 0; h < B * H; h++) {
    const long row = (h / H * G + h % H / R) * K_max, length = lengths[h / H];
    double largest = -INFINITY, total = 0;
    for (long r = 0; r < length; r++) {
      weights[r] = 0;
      for (long d = 0; d < D; d++) weights[r] += at(q, h * D + d, type) * at(k, (row + r) * D + d, type) * scale;
      largest = fmax(largest, weights[r]);
    }
    for (long r = 0; r < length; r++) total += weights[r] = exp(weights[r] - largest);
    for (long d = 0; d < D; d++) {
      double exact = 0, found = at(out, h * D + d, type);
      for (long r = 0; r < length; r++) exact += weights[r] / total * at(v, (row + r) * D + d, type);
      const double bound = EPSILON[type] * fabs(exact) + 1e-4;
      const double last = weights[length - 1] / total * at(v, (row + length - 1) * D + d, type);
      worst = fmax(worst, fabs(found - exact) / bound);
      mistake = fmax(mistake, fabs(found - exact + last) / bound);
    }
  }
  if (worst > 1 || mistake <= 1) {
    printf("%s: attention %s, %ld x %ld / %ld x %ld: %.3g of the bound, without the last row %.3g\n", covo_set_name(i),
           TYPES[type], B, H, G, D, worst, mistake);
    faults++;
  }
  release(q, type), release(k, type), release(v, type), release(out, type), free(weights);
  return 1;
}

/* The doubled signal: sample 2t + 1 sees x[t - 2 .. t + 3] through the even taps, 2t sees x[t - 3 .. t + 2] through the odd
 * ones; between the edges of what is known of x. */
static double doubled(const Snake *t, const float *x, long at, double alpha, double inverse_beta) {
  const long i = at < 0 ? 0 : at > 2 * t->N - 1 ? 2 * t->N - 1 : at;
  double y = 0;
  for (int j = 0; j < 6; j++) {
    long n = i / 2 + j - (i % 2 ? 2 : 3);
    n = n < 0 ? 0 : n >= t->N ? t->N - 1 : n;
    y += 2.0 * t->up[(i % 2 ? 10 : 11) - 2 * j] * x[n];
  }
  return y + sin(alpha * y) * sin(alpha * y) * inverse_beta;
}

static int snake(int i, long N, int starts, int ends) {
  enum { C = 3, ROWS = 6 };
  float *x = malloc((size_t)(ROWS * N) * 4), *y = malloc((size_t)(ROWS * N) * 4), taps[24], alpha[C], inverse_beta[C];
  for (long j = 0; j < ROWS * N; j++) x[j] = (float)normal();
  for (int j = 0; j < 24; j++) taps[j] = (float)uniform();
  for (int c = 0; c < C; c++) alpha[c] = (float)(1 + c), inverse_beta[c] = (float)uniform();
  const Snake t = {x, alpha, inverse_beta, taps, taps + 12, y, ROWS, C, N, starts, ends};
  covo_snake(i, 3, &t);
  const long length = snake_length(&t);
  double worst = 0, mistake = 0;
  for (long r = 0; r < ROWS; r++)
    for (long n = 0; n < length; n++) {
      double exact = 0, size = 0, last = 0;
      for (int j = 0; j < 12; j++) {
        last = t.down[j] * doubled(&t, x + r * N, 2 * (n + (starts ? 0 : SNAKE_CONTEXT)) + j - 5, alpha[r % C],
                                   inverse_beta[r % C]);
        exact += last;
        size += fabs(last);
      }
      /* each of the twelve is off by the roundings of its six products, times what the sine makes of them */
      const double bound = 0x1p-24 * (64 * (1 + 2 * alpha[r % C]) + 32 * size), found = y[r * length + n];
      worst = fmax(worst, fabs(found - exact) / bound);
      mistake = fmax(mistake, fabs(found - exact + last) / bound);
    }
  if (worst > 1 || mistake <= 1) {
    printf("%s: snake of %ld, %d %d: %.3g of the bound, without the last tap %.3g\n", covo_set_name(i), N, starts, ends,
           worst, mistake);
    faults++;
  }
  free(x), free(y);
  return 1;
}

/* A convolution of four taps in double between the two transforms. */
static int winograd(int i, long N, long dilation) {
  enum { C = 3, ROWS = 6 };
  static const double VALUES[POINTS][4] = {{1, 0, 0, 0}, {2, 2, 2, 2}, {4, -4, 4, -4}, {8, 4, 2, 1}, {16, -8, 4, -2},
                                           {4, 8, 16, 32}, {0, 0, 0, 1}};
  static const double SHARES[POINTS] = {1, 3, 9, 9, 15, 45, 1};
  const long L = N + 3 * dilation, tiles = (N + 4 * dilation - 1) / (4 * dilation) * dilation;
  float *x = malloc((size_t)(ROWS * L) * 4), *y = malloc((size_t)(ROWS * N) * 4), bias[C];
  float *products = malloc((size_t)(ROWS * POINTS * tiles) * 4);
  double taps[C][4];
  for (long j = 0; j < ROWS * L; j++) x[j] = (float)normal();
  for (int c = 0; c < C; c++) {
    bias[c] = (float)normal();
    for (int k = 0; k < 4; k++) taps[c][k] = normal();
  }
  covo_winograd_signal(i, 3, &(Winograd){x, products, NULL, ROWS / C, C, L, tiles, dilation});
  for (long j = 0; j < ROWS * POINTS * tiles; j++) {
    const long c = j / tiles % C, q = j / tiles / C % POINTS;
    const double *v = VALUES[q], *w = taps[c];
    products[j] = (float)(products[j] * (v[0] * w[0] + v[1] * w[1] + v[2] * w[2] + v[3] * w[3]) / SHARES[q]);
  }
  covo_winograd_results(i, 3, &(Winograd){y, products, bias, ROWS / C, C, N, tiles, dilation});
  double worst = 0, mistake = 0;
  for (long r = 0; r < ROWS; r++)
    for (long n = 0; n < N; n++) {
      const double *w = taps[r % C], last = w[3] * x[r * L + n + 3 * dilation];
      const float *from = x + r * L + n;
      const double exact = bias[r % C] + w[0] * from[0] + w[1] * from[dilation] + w[2] * from[2 * dilation] + last;
      const double size = fabs(w[0]) + fabs(w[1]) + fabs(w[2]) + fabs(w[3]);
      /* the transforms round up to seven terms each, at most 41 times the largest sample, 6, and the taps */
      const double bound = 0x1p-24 * 16 * 41 * 6 * (size + fabs(bias[r % C])), found = y[r * N + n];
      const double off = fabs(found - exact) / bound, without = fabs(found - exact + last) / bound;
      worst = worst < off ? off : worst; /* no fmax: gcc 12 fails for Arm over two of them in such a loop */
      mistake = mistake < without ? without : mistake;
    }
  if (worst > 1 || mistake <= 1) {
    printf("%s: convolution of %ld, dilation %ld: %.3g of the bound, without the last tap %.3g\n", covo_set_name(i), N,
           dilation, worst, mistake);
    faults++;
  }
  free(x), free(y), free(products);
  return 1;
}

static float *numbers(long count, double size) {
  float *x = malloc((size_t)count * 4);
  for (long j = 0; j < count; j++) x[j] = (float)(normal() * size);
  return x;
}

static void *as_type(const float *from, long count, int type) {
  void *to = unaligned(count, type);
  for (long j = 0; j < count; j++) set(to, j, type, from[j]);
  return to;
}

/* Norms, rotary positions and gates of `rows` rows of 2 * half elements: what they give is compared with double. */
static int layer(int i, int type, long rows, long half) {
  const long size = 2 * half, count = rows * size;
  float *values = numbers(count, 3), *others = numbers(count, 1), *ones = numbers(size, 1);
  void *x = as_type(values, count, type), *other = as_type(others, count, type), *weight = as_type(ones, size, type);
  void *y = unaligned(count, type), *summed = unaligned(count, type);
  const double eps = EPSILON[type] + 0x1p-20;
  double worst[3] = {0}, mistake[3] = {0};
  covo_norm(i, 3, &(Norm){x, other, weight, y, summed, rows, size, 1e-6f, type});
  for (long j = 0; j < count; j++) {
    double squares = 0;
    for (long c = 0; c < size; c++) squares += at(summed, j / size * size + c, type) * at(summed, j / size * size + c, type);
    const double sum = at(x, j, type) + at(other, j, type), w = at(weight, j % size, type);
    const double exact = at(summed, j, type) / sqrt(squares / size + 1e-6) * w, bound = 3 * eps * fabs(exact) + 1e-6;
    const double off = fabs(at(y, j, type) - exact) / bound, plain = fabs(at(y, j, type) - exact / w) / bound;
    const double unsummed = fabs(at(summed, j, type) - sum) / (eps * fabs(sum) + 1e-6);
    worst[0] = worst[0] < off ? off : worst[0];
    worst[0] = worst[0] < unsummed ? unsummed : worst[0];
    mistake[0] = mistake[0] < plain ? plain : mistake[0];
  }
  covo_rotary(i, 3, &(Rotary){x, other, summed, y, 1, rows, 1, size, count, size, size, 0, type});
  for (long j = 0; j < count; j++) {
    const long low = j % size < half, pair = low ? j + half : j - half;
    const double turned = at(x, pair, type) * at(summed, j, type), kept = at(x, j, type) * at(other, j, type);
    const double exact = low ? kept - turned : kept + turned, bound = eps * (fabs(exact) + fabs(kept)) + 1e-6;
    const double off = fabs(at(y, j, type) - exact) / bound, turned_back = fabs(at(y, j, type) - kept) / bound;
    worst[1] = worst[1] < off ? off : worst[1];
    mistake[1] = mistake[1] < turned_back ? turned_back : mistake[1];
  }
  covo_gate(i, 3, &(Gate){x, y, rows, half, type});
  for (long j = 0; j < rows * half; j++) {
    const double gate = at(x, j / half * size + j % half, type), up = at(x, j / half * size + half + j % half, type);
    const double exact = gate / (1 + exp(-gate)) * up, bound = 2 * eps * fabs(exact) + 1e-6;
    const double off = fabs(at(y, j, type) - exact) / bound, open = fabs(at(y, j, type) - gate * up) / bound;
    worst[2] = worst[2] < off ? off : worst[2];
    mistake[2] = mistake[2] < open ? open : mistake[2];
  }
  for (int kind = 0; kind < 3; kind++)
    if (!(worst[kind] <= 1) || mistake[kind] <= 1) {
      printf("%s: %s %s, %ld x %ld: %.3g of the bound, with a mistake %.3g\n", covo_set_name(i),
             (const char *[]){"norm", "rotary", "gate"}[kind], TYPES[type], rows, size, worst[kind], mistake[kind]);
      faults++;
    }
  free(values), free(others), free(ones);
  release(x, type), release(other, type), release(weight, type), release(y, type), release(summed, type);
  return 3;
}

int main(void) {
  static const long SIZES[][3] = {{1, 5, 7},     {1, 64, 64},  {2, 33, 100},  {3, 62, 130}, {4, 54, 700},
                                  {5, 65, 1000}, {8, 9, 5001}, {10, 31, 64},  {11, 40, 333}, {16, 64, 96},
                                  {33, 70, 520}, {70, 40, 130}, {2, 1, 31}};
  static const int PAIRS[][2] = {{BFLOAT16, BFLOAT16}, {FLOAT16, FLOAT16}, {BFLOAT16, INT8}, {FLOAT16, INT8},
                                 {FLOAT32, INT8}};
  for (int i = 0; covo_set_name(i); i++) {
    if (!covo_set_here(i)) {
      printf("%s: not executed here\n", covo_set_name(i));
      continue;
    }
    int products = 0, attentions = 0;
    state = 88172645463325252u;
    for (unsigned s = 0; s < sizeof SIZES / sizeof *SIZES; s++)
      for (unsigned p = 0; p < sizeof PAIRS / sizeof *PAIRS; p++)
        products += product(i, PAIRS[p][0], PAIRS[p][1], SIZES[s][0], SIZES[s][1], SIZES[s][2]);
    for (int type = BFLOAT16; type <= FLOAT32; type++) {
      attentions += attention(i, type, 1, 28, 4, 128, (const long[]){300});
      attentions += attention(i, type, 3, 9, 3, 64, (const long[]){17, 513, 256});
      attentions += attention(i, type, 2, 5, 1, 32, (const long[]){1, 40});
    }
    int snakes = snake(i, 1, 1, 1) + snake(i, 20, 1, 0) + snake(i, 300, 0, 1) + snake(i, 600, 0, 0) + snake(i, 513, 1, 1);
    int convolutions = winograd(i, 1, 1) + winograd(i, 1050, 1) + winograd(i, 127, 3) + winograd(i, 1111, 5) +
                       winograd(i, 3000, 16) + winograd(i, 40, 2);
    int layers = 0;
    for (int type = BFLOAT16; type <= FLOAT32; type++)
      layers += layer(i, type, 1, 17) + layer(i, type, 5, 64) + layer(i, type, 40, 700);
    printf("%s: %d products, %d attentions, %d activations, %d convolutions, %d norms, rotations and gates\n",
           covo_set_name(i), products, attentions, snakes, convolutions, layers);
  }
  if (faults) printf("%d faults\n", faults);
  return faults != 0;
}
