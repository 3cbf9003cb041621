/* All layers of a decoder for one more token a slot, in one call. Between products, which read hundreds of megabytes, a call
 * from Python finds nothing of itself in any cache, and takes 50 microseconds instead of 10. */
#include "covo.h"

#include <stdlib.h>

/* Writes y[M, N] of x[M, K], both of one type. */
static int multiply(int i, int threads, const void *x, const ProductWeights *w, void *y, long M, long N, long K, int type) {
  return covo_linear(i, threads, x, type, w->weight, w->type, w->scale, w->bias, y, M, N, K);
}

/* Writes the keys and values of the last valid row of each slot. k: [B, G, D]; qkv: [B, (H + 2G) * D]. */
static void write_rows(const Decoder *t, const Layer *layer, const char *k, const char *qkv) {
  const long size = t->D * bytes_of(t->type), G = t->G, width = t->H + 2 * G;
  for (long b = 0; b < t->B; b++)
    for (long g = 0; g < G; g++) {
      const long row = (b * G + g) * t->K_max + t->lengths[b] - 1;
      memcpy((char *)layer->keys + row * size, k + (b * G + g) * size, (size_t)size);
      memcpy((char *)layer->values + row * size, qkv + (b * width + t->H + G + g) * size, (size_t)size);
    }
}

/* Writes t->out and t->residual, see Decoder, with set number i. Returns i, -1 without memory. */
EXPORT int covo_decoder(int i, int threads, const Decoder *t) {
  const long B = t->B, C = t->C, H = t->H, G = t->G, D = t->D, F = t->F, bytes = bytes_of(t->type), width = (H + 2 * G) * D;
  enum { NORMED, FIRST, SECOND, QKV, Q, K, ATTENDED, GATE_UP, GATED, BUFFERS };
  const long sizes[BUFFERS] = {C, C, C, width, H * D, G * D, H * D, 2 * F, F};
  long total = 0, offsets[BUFFERS];
  for (int n = 0; n < BUFFERS; n++) offsets[n] = total, total += round_up(sizes[n] * B * bytes, 64);
  char *memory = NULL, *buffers[BUFFERS];
  if (posix_memalign((void **)&memory, 64, (size_t)total + 64)) return -1;
  for (int n = 0; n < BUFFERS; n++) buffers[n] = memory + offsets[n];
  const void *x = t->x, *residual = NULL; /* the stream is their sum */
  int served = i;
  for (long n = 0; n < t->num_layers && served >= 0; n++) {
    const Layer *layer = t->layers + n;
    char *const normed = buffers[NORMED], *const qkv = buffers[QKV], *const attended = buffers[ATTENDED];
    const int last = n == t->num_layers - 1;
    covo_norm(i, threads, &(Norm){x, residual, layer->norm, normed, buffers[FIRST], B, C, t->eps, t->type});
    residual = residual ? buffers[FIRST] : x;
    served = multiply(i, threads, normed, &layer->qkv, qkv, B, width, C, t->type);
    Rotary rotary = {qkv, t->cosines, t->sines, buffers[Q], 1, B, H, D, 0, width, D, 0, t->type};
    covo_rotary(i, threads, &rotary);
    rotary.x = qkv + H * D * bytes, rotary.y = buffers[K], rotary.H = G;
    covo_rotary(i, threads, &rotary);
    write_rows(t, layer, buffers[K], qkv);
    if (served >= 0)
      served = covo_decode_attention(i, threads, buffers[Q], layer->keys, layer->values, t->lengths, attended, t->type, B, H,
                                     G, t->K_max, D, t->scale);
    if (served >= 0) served = multiply(i, threads, attended, &layer->o, t->out, B, C, H * D, t->type);
    char *const summed = last ? t->residual : buffers[SECOND];
    covo_norm(i, threads, &(Norm){t->out, residual, layer->post_norm, normed, summed, B, C, t->eps, t->type});
    if (served >= 0) served = multiply(i, threads, normed, &layer->gate_up, buffers[GATE_UP], B, 2 * F, C, t->type);
    covo_gate(i, threads, &(Gate){buffers[GATE_UP], buffers[GATED], B, F, t->type});
    if (served >= 0) served = multiply(i, threads, buffers[GATED], &layer->down, t->out, B, C, F, t->type);
    x = t->out;
    residual = summed;
  }
  free(memory);
  return served;
}
