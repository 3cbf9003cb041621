/* What lies between the products of a decoder layer, a row at a time: norms, rotary positions, gates. Plain loops that the
 * compiler makes vectors of: included by rows.h. All is computed in float32; a result is rounded once, but for what
 * interface.py rounds on the way.
 */

/* Calls a function whose last argument, the element type, is a constant. */
#define OF_TYPE(type, FUNCTION, ...)                                                                                   \
  switch (type) {                                                                                                      \
    case BFLOAT16: FUNCTION(__VA_ARGS__, BFLOAT16); break;                                                             \
    case FLOAT16: FUNCTION(__VA_ARGS__, FLOAT16); break;                                                               \
    case FLOAT32: FUNCTION(__VA_ARGS__, FLOAT32); break;                                                               \
  }

INLINE float SET(rounded)(float value, const int type) {
  return type == FLOAT32 ? value : type == BFLOAT16 ? from_bfloat16(to_bfloat16(value)) : from_float16(to_float16(value));
}

/* Squares are added to 16 partial sums, element by element, which are added up at the end. */
INLINE TARGET void SET(norm_of)(const Norm *t, long row, const int type) {
  const long C = t->C, whole = C / 16 * 16, first = row * C;
  const void *summed = t->residual ? t->summed : t->x;
  float squares[16] = {0};
  if (t->residual)
    for (long c = first; c < first + C; c++) put(t->summed, c, type, get(t->x, c, type) + get(t->residual, c, type));
  for (long c = 0; c < whole; c += 16)
    for (int j = 0; j < 16; j++) {
      const float value = get(summed, first + c + j, type);
      squares[j] += value * value;
    }
  for (long c = whole; c < C; c++) squares[c - whole] += get(summed, first + c, type) * get(summed, first + c, type);
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) squares[j] += squares[j + half];
  const float scale = 1 / sqrtf(squares[0] / (float)C + t->eps);
  for (long c = 0; c < C; c++)
    put(t->normed, first + c, type, SET(rounded)(get(summed, first + c, type) * scale, type) * get(t->weight, c, type));
}

static TARGET void SET(norm)(const void *job, long row) { OF_TYPE(((const Norm *)job)->type, SET(norm_of), job, row) }

INLINE void SET(rotate)(void *restrict y, const void *restrict x, const void *restrict cosines, const void *restrict sines,
                        long half, const int type) {
  for (long d = 0; d < half; d++) {
    const float low = get(x, d, type), high = get(x, d + half, type);
    put(y, d, type, low * get(cosines, d, type) - high * get(sines, d, type));
    put(y, d + half, type, high * get(cosines, d + half, type) + low * get(sines, d + half, type));
  }
}

INLINE TARGET void SET(rotary_of)(const Rotary *t, long row, const int type) {
  const long b = row / t->S, s = row % t->S, bytes = bytes_of(type), angle = (b * t->angle_batch + s * t->D) * bytes;
  const char *x = (const char *)t->x + (b * t->x_batch + s * t->x_row) * bytes;
  char *y = (char *)t->y + row * t->H * t->D * bytes;
  for (long h = 0; h < t->H; h++, x += t->x_head * bytes, y += t->D * bytes)
    SET(rotate)(y, x, (const char *)t->cosines + angle, (const char *)t->sines + angle, t->D / 2, type);
}

static TARGET void SET(rotary)(const void *job, long row) { OF_TYPE(((const Rotary *)job)->type, SET(rotary_of), job, row) }

INLINE void SET(open)(void *restrict y, const void *restrict gates, const void *restrict ups, long F, const int type) {
  for (long f = 0; f < F; f++) {
    const float gate = get(gates, f, type), least = gate < -87.0f ? -87.0f : gate; /* a NaN stays one */
    const float top = gate < -87.0f ? 0.0f * gate - 87.0f : gate;                   /* and -inf becomes one */
    put(y, f, type, top / (1 + SET(exponential)(-least)) * get(ups, f, type));
  }
}

INLINE TARGET void SET(gate_of)(const Gate *t, long row, const int type) {
  const long bytes = t->F * bytes_of(type);
  const char *gates = (const char *)t->gate_up + 2 * row * bytes;
  SET(open)((char *)t->y + row * bytes, gates, gates + bytes, t->F, type);
}

static TARGET void SET(gate)(const void *job, long row) { OF_TYPE(((const Gate *)job)->type, SET(gate_of), job, row) }
