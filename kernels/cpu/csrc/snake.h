/* The anti-aliased activation of one channel, in plain loops that the compiler makes vectors of: included by rows.h.
 *
 * Polyphase, as native.anti_aliased_snake says: the doubled rate is two phases of the old one. Element i of both comes from
 * x[i .. i + 5], element i of the result from elements i .. i + 5 of both; outside of the signal the doubled one holds its
 * first (even) and its last (odd) sample. Loops go over multiples of 16: what is left of one would be rounded otherwise, and
 * a result would depend on where the signal is cut.
 */
#define SAMPLES 256   /* of the result in a turn: all stays in the first cache */
#define EXACT_TO 1e5f /* arguments up to which sine_squared is within a few roundings of theirs */

/* sin(x)^2: x less the nearest multiple of pi, in three parts of which the first two multiply without rounding where
 * the machine has fused products, and in PORTABLE up to 2.6e4, then the series of the sine to the 13th power, off by 7e-10. */
INLINE float SET(sine_squared)(float x) {
  const float shifted = x * 0.318309886f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23: its last bit is worth 1 */
  const float r = ((x - n * 3.140625f) - n * 9.67502594e-4f) - n * 1.50995799e-7f, s = r * r;
  float sine = 1.0f / 6227020800;
  sine = sine * s - 1.0f / 39916800;
  sine = sine * s + 1.0f / 362880;
  sine = sine * s - 1.0f / 5040;
  sine = sine * s + 1.0f / 120;
  sine = sine * s - 1.0f / 6;
  sine = r + r * s * sine;
  return sine * sine;
}

/* to[i] = a sum of six taps and from[i .. i + 5], added to what is there if `add`. */
INLINE void SET(six_taps)(float *restrict to, const float *restrict from, const float *taps, long count, const int add) {
  const float a = taps[0], b = taps[1], c = taps[2], d = taps[3], e = taps[4], f = taps[5];
  for (long i = 0; i < count; i++) {
    const float sum = a * from[i] + b * from[i + 1] + c * from[i + 2] + d * from[i + 3] + e * from[i + 4] + f * from[i + 5];
    to[i] = add ? to[i] + sum : sum;
  }
}

INLINE void SET(bend)(float *phase, long count, float alpha, float inverse_beta) {
  const float exact_to = EXACT_TO;
  int32_t largest = 0, bound; /* as whole numbers floats without a sign have their order, and a NaN is the largest */
  memcpy(&bound, &exact_to, 4);
  for (long i = 0; i < count; i++) {
    const float argument = phase[i] * alpha;
    int32_t bits;
    memcpy(&bits, &argument, 4);
    bits &= 0x7fffffff;
    largest = largest < bits ? bits : largest;
  }
  if (largest <= bound)
    for (long i = 0; i < count; i++) phase[i] += SET(sine_squared)(phase[i] * alpha) * inverse_beta;
  else
    for (long i = 0; i < count; i++) {
      const float sine = sinf(phase[i] * alpha);
      phase[i] += sine * sine * inverse_beta;
    }
}

static TARGET void SET(snake)(const void *job, long row) {
  const Snake *t = job;
  const long length = snake_length(t), elements = length + 5, before = t->starts ? SNAKE_CONTEXT : 0;
  const float *x = t->x + row * t->N, alpha = t->alpha[row % t->C], inverse_beta = t->inverse_beta[row % t->C];
  float taps[4][6], wide[SAMPLES + 32], even[SAMPLES + 16], odd[SAMPLES + 16], result[SAMPLES];
  for (int j = 0; j < 6; j++) {
    taps[0][j] = 2 * t->up[11 - 2 * j];
    taps[1][j] = 2 * t->up[10 - 2 * j];
    taps[2][j] = t->down[2 * j + 1];
    taps[3][j] = t->down[2 * j];
  }
  for (long first = 0; first < length; first += SAMPLES) {
    const long count = smaller(SAMPLES, length - first), end = first + count + 5, more = round_up(count + 5, 16);
    const float *from = x + first - before;
    if (first < before || first - before + more + 5 > t->N) { /* copies of its edges stand around the signal */
      for (long i = 0; i < more + 5; i++) {
        const long at = first - before + i;
        wide[i] = x[at < 0 ? 0 : smaller(at, t->N - 1)];
      }
      from = wide;
    }
    SET(six_taps)(even, from, taps[0], more, 0);
    SET(six_taps)(odd, from, taps[1], more, 0);
    SET(bend)(even, more, alpha, inverse_beta);
    SET(bend)(odd, more, alpha, inverse_beta);
    if (t->starts)
      for (long i = first; i < 3; i++) odd[i] = even[2], even[i] = even[2];
    if (t->ends)
      for (long i = elements - 3; i < end; i++) {
        even[i - first] = odd[elements - 3 - first];
        odd[i - first] = odd[elements - 3 - first];
      }
    SET(six_taps)(result, even, taps[2], round_up(count, 16), 0);
    SET(six_taps)(result, odd, taps[3], round_up(count, 16), 1);
    memcpy(t->y + row * length + first, result, (size_t)count * 4);
  }
}
