/* Convolutions by Winograd's way, F(4, 4): four results of four taps with seven products instead of sixteen. Plain loops
 * that the compiler makes vectors of: included by rows.h.
 *
 * Sources: S. Winograd, Arithmetic Complexity of Computations (1980); Lavin and Gray, arXiv 1509.09308. The points are 0, 1,
 * -1, 1/2, -1/2, 2 and infinity, rows are scaled by powers of two; winograd.py has the matrix of the weights.
 * A tile is four results that lie a dilation D apart: number D * j + p has those at 4 * D * j + D * i + p, i < 4, p < D. More
 * taps than four are several times four, a tile apart, so that one transformed signal serves all of them.
 */
#define TURN 256 /* tiles in a turn: all stays in the first cache */

/* phases[i][D * j + p] = x[4 * D * j + D * i + p] for `count` of j: x has `left` samples, then zeros follow. */
INLINE void SET(deal)(float phases[4][TURN + MOST_DILATION], const float *x, long left, long count, const long D) {
  const long whole = smaller(count, left < 0 ? 0 : left / (4 * D));
  for (long j = 0; j < whole; j++)
    for (int i = 0; i < 4; i++)
      for (long p = 0; p < D; p++) phases[i][D * j + p] = x[4 * D * j + D * i + p];
  for (long j = whole; j < count; j++)
    for (int i = 0; i < 4; i++)
      for (long p = 0; p < D; p++) {
        const long at = 4 * D * j + D * i + p;
        phases[i][D * j + p] = at < left ? x[at] : 0;
      }
}

/* y[4 * D * j + D * i + p] = phases[i][D * j + p] for `count` of j, as far as y has room: `left` samples. */
INLINE void SET(collect)(float *y, const float phases[4][TURN + MOST_DILATION], long left, long count, const long D) {
  const long whole = smaller(count, left / (4 * D));
  for (long j = 0; j < whole; j++)
    for (int i = 0; i < 4; i++)
      for (long p = 0; p < D; p++) y[4 * D * j + D * i + p] = phases[i][D * j + p];
  for (long j = whole; j < count; j++)
    for (int i = 0; i < 4; i++)
      for (long p = 0; p < D; p++) {
        const long at = 4 * D * j + D * i + p;
        if (at < left) y[at] = phases[i][D * j + p];
      }
}

INLINE TARGET void SET(signal_of)(const Winograd *t, long row, const long D) {
  const long apart = t->C * t->tiles, turn = TURN / D * D;
  const float *x = t->signal + row * t->N;
  float *tile = t->products + (row / t->C * POINTS * t->C + row % t->C) * t->tiles;
  float phases[4][TURN + MOST_DILATION];
  for (long first = 0; first < t->tiles; first += turn, tile += turn) {
    const long count = smaller(turn, t->tiles - first);
    SET(deal)(phases, x + 4 * first, t->N - 4 * first, count / D + 1, D); /* a tile reaches into the next of its p */
    for (long i = 0; i < count; i++) {
      const float a = phases[0][i], b = phases[1][i], c = phases[2][i], d = phases[3][i];
      const float e = phases[0][i + D], f = phases[1][i + D], g = phases[2][i + D];
      tile[i] = 0.25f * a - 0.125f * b - 1.25f * c + 0.625f * d + e - 0.5f * f;
      tile[i + apart] = 1.125f * d - 0.25f * b - 0.125f * c + 0.5f * (e - f);
      tile[i + 2 * apart] = 0.125f * b - 0.1875f * c - 0.4375f * d + 0.75f * e - 0.25f * f;
      tile[i + 3 * apart] = 0.5f * (b + f) + 0.75f * (c - e) - d;
      tile[i + 4 * apart] = 0.5f * (f - b) + 1.25f * (c - e);
      tile[i + 5 * apart] = 0.25f * b - 1.25f * d + f;
      tile[i + 6 * apart] = 0.125f * c - 0.25f * b + 1.25f * d - 0.625f * e - f + 0.5f * g;
    }
  }
}

INLINE TARGET void SET(results_of)(const Winograd *t, long row, const long D) {
  const long apart = t->C * t->tiles, turn = TURN / D * D;
  const float bias = t->bias ? t->bias[row % t->C] : 0;
  float *y = t->signal + row * t->N;
  const float *tile = t->products + (row / t->C * POINTS * t->C + row % t->C) * t->tiles;
  float phases[4][TURN + MOST_DILATION];
  for (long first = 0; first < t->tiles; first += turn, tile += turn) {
    const long count = smaller(turn, t->tiles - first);
    for (long i = 0; i < count; i++) {
      const float a = tile[i], b = tile[i + apart], c = tile[i + 2 * apart], d = tile[i + 3 * apart];
      const float e = tile[i + 4 * apart], f = tile[i + 5 * apart], g = tile[i + 6 * apart];
      phases[0][i] = bias + 4 * (a + d) + 2 * (b + c + e) + 0.5f * f;
      phases[1][i] = bias + 2 * (b - c + d) - e + f;
      phases[2][i] = bias + 2 * (b + c + f) + d + 0.5f * e;
      phases[3][i] = bias + 2 * (b - c + g) + 0.5f * d - 0.25f * e + 4 * f;
    }
    SET(collect)(y + 4 * first, phases, t->N - 4 * first, count / D, D);
  }
}

/* The distances that are known when this is compiled are those of BigVGAN. */
#define AT_DILATION(FUNCTION, t, row)                                                                                  \
  switch ((t)->dilation) {                                                                                             \
    case 1: FUNCTION(t, row, 1); break;                                                                                \
    case 3: FUNCTION(t, row, 3); break;                                                                                \
    case 5: FUNCTION(t, row, 5); break;                                                                                \
    default: FUNCTION(t, row, (t)->dilation);                                                                          \
  }
static TARGET void SET(winograd_signal)(const void *job, long row) {
  const Winograd *t = job;
  AT_DILATION(SET(signal_of), t, row)
}
static TARGET void SET(winograd_results)(const void *job, long row) {
  const Winograd *t = job;
  AT_DILATION(SET(results_of), t, row)
}
