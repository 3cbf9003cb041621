/* The functions that library.py calls: which sets there are, products, attention, what is computed row by row; and how they
 * use threads. */
#include "covo.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_THREADS 256

/* Best first. A machine is asked once; what it has does not change. */
static const Set *const SETS[] = {
#ifdef __x86_64__
    &AMX, &AVX512_BF16, &AVX512, &AVX2,
#endif
#ifdef __aarch64__
    &NEON_BF16, &NEON,
#endif
    &PORTABLE};
#define NUM_SETS ((int)(sizeof SETS / sizeof *SETS))

/* The name of set number i, or NULL past the last one. */
EXPORT const char *covo_set_name(int i) { return i < NUM_SETS ? SETS[i]->name : NULL; }

/* Whether this machine executes set number i. */
EXPORT int covo_set_here(int i) {
  static atomic_char known[NUM_SETS]; /* 0: nobody has asked; 1: it does not; 2: it does */
  if (!known[i]) known[i] = SETS[i]->here() ? 2 : 1;
  return known[i] == 2;
}

#ifndef COVO_SOURCES
#define COVO_SOURCES "unknown"
#endif

/* The digest of the sources that this library was built from. */
EXPORT const char *covo_sources(void) { return COVO_SOURCES; }

/* --- Threads ---------------------------------------------------------------------------------------------------------
 * PyTorch's own OpenMP team does the work if its runtime is given: a second team would compete with it for the cores,
 * because idle threads of both wait in a loop. A call costs 1 microsecond then. Without it, and in a child of a fork,
 * where that team is gone, threads are made for the call (10 microseconds each). */

typedef void (*Team)(void (*)(void *), void *, unsigned threads, unsigned flags); /* GOMP_parallel */
static Team team;

static void leave_team(void) { team = NULL; }

/* team: the address of GOMP_parallel, or NULL. Called once, before anything else. */
EXPORT void covo_use_team(Team found) {
  team = found;
  pthread_atfork(NULL, NULL, leave_team);
}

typedef struct {
  void (*work)(void *);
  void *job;
} Start;

static void *run_thread(void *start) {
  ((Start *)start)->work(((Start *)start)->job);
  return NULL;
}

void covo_parallel(void (*work)(void *), void *job, int threads) {
  pthread_t made[MAX_THREADS];
  Start start = {work, job};
  int count = 0;
  if (threads <= 1) work(job);
  else if (team) team(work, job, (unsigned)threads, 0);
  else {
    while (count < threads - 1 && !pthread_create(&made[count], NULL, run_thread, &start)) count++;
    work(job); /* takes what there is: a thread that could not be made is not missed */
    while (count) pthread_join(made[--count], NULL);
  }
}

/* --- Products ----------------------------------------------------------------------------------------------------- */

typedef struct {
  const Set *set;
  Linear linear;
  char *scratch;
  long scratch_bytes, units, step;
  long next_unit, next_row, next_scratch; /* taken by threads, one after the other */
} Product;

static void prepare(void *job) {
  Product *p = job;
  long unit;
  while ((unit = __atomic_fetch_add(&p->next_unit, 1, __ATOMIC_RELAXED)) < p->units)
    p->set->prepare(&p->linear, unit, unit + 1);
}

static long take_step(Product *p) { return __atomic_fetch_add(&p->next_row, p->step, __ATOMIC_RELAXED); }

static void multiply(void *job) {
  Product *p = job;
  const long N = p->linear.N;
  char *scratch = p->scratch + p->scratch_bytes * __atomic_fetch_add(&p->next_scratch, 1, __ATOMIC_RELAXED);
  long row = take_step(p), next = N;
  while (row < N) {
    if (p->set->asks_ahead) next = take_step(p);
    p->set->multiply(&p->linear, row, smaller(row + p->step, N), smaller(next, N), scratch);
    row = p->set->asks_ahead ? next : take_step(p);
  }
}

/* Writes y, see Linear, with the first set from number i on that serves. Returns its number, -1 without memory. */
EXPORT int covo_linear(int i, int threads, const void *x, int x_type, const void *weight, int weight_type,
                       const float *scale, const void *bias, void *y, long M, long N, long K) {
  Product p = {.linear = {x, weight, bias, scale, y, NULL, M, N, K, x_type, weight_type, x_type, N}};
  while (i < NUM_SETS - 1 && !(covo_set_here(i) && SETS[i]->serves(&p.linear))) i++;
  if (!M || !N) return i;
  p.set = SETS[i];
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  const long prepared = round_up(p.set->prepared_bytes(&p.linear), 64);
  p.scratch_bytes = round_up(p.set->scratch_bytes(&p.linear), 64);
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, (size_t)(prepared + threads * p.scratch_bytes + 64))) return -1;
  p.linear.prepared = memory;
  p.scratch = memory + prepared;
  p.units = p.set->units(&p.linear);
  p.step = p.set->step(&p.linear, threads);
  covo_parallel(prepare, &p, M * K < 65536 ? 1 : threads);
  covo_parallel(multiply, &p, (int)smaller(threads, (N + p.step - 1) / p.step));
  free(memory);
  return i;
}

/* --- Attention ---------------------------------------------------------------------------------------------------- */

typedef struct {
  const Set *set, *products; /* products: the set that multiplies queries and keys */
  Linear product;            /* what is equal in all of them */
  Attention attention;
  long piece_bytes; /* of the buffers of a thread */
  char *scratch;
  long next_piece, next_head, next_scratch;
} Attending;

/* The products of one kv head's queries with a chunk of its keys, then their weights and the weighted values. */
static void attend(void *job) {
  Attending *p = job;
  const Attention *t = &p->attention;
  const long R = t->H / t->G, bytes = bytes_of(t->type);
  float *scores = (float *)(p->scratch + p->piece_bytes * __atomic_fetch_add(&p->next_scratch, 1, __ATOMIC_RELAXED));
  Linear product = p->product;
  product.y = scores;
  product.prepared = scores + R * CHUNK;
  void *scratch = (char *)product.prepared + round_up(p->products->prepared_bytes(&product), 64);
  long piece;
  while ((piece = __atomic_fetch_add(&p->next_piece, 1, __ATOMIC_RELAXED)) < t->B * t->G * t->chunks) {
    const long chunk = piece % t->chunks, group = piece / t->chunks % t->G, slot = piece / t->chunks / t->G;
    const long count = smaller(CHUNK, t->lengths[slot] - chunk * CHUNK);
    if (count <= 0) continue;
    const long at = ((slot * t->G + group) * t->K_max + chunk * CHUNK) * t->D * bytes;
    const char *values = (const char *)t->values + at;
    for (long i = 0; i < count * t->D * bytes; i += 64) __builtin_prefetch(values + i, 0, 2);
    product.x = (const char *)t->query + (slot * t->H + group * R) * t->D * bytes;
    product.weight = (const char *)t->keys + at;
    product.N = count;
    p->products->prepare(&product, 0, p->products->units(&product));
    for (long n = 0, step = p->products->step(&product, 1); n < count; n += step)
      p->products->multiply(&product, n, smaller(n + step, count), smaller(n + step, count), scratch);
    p->set->weigh(t, values, count, scores, t->partial + piece * R * (t->D + 2));
  }
}

/* Puts the pieces of each query head together: each is weighted by how its largest score compares to the largest. */
static void unite(void *job) {
  Attending *p = job;
  const Attention *t = &p->attention;
  const long D = t->D, R = t->H / t->G;
  long head;
  while ((head = __atomic_fetch_add(&p->next_head, 1, __ATOMIC_RELAXED)) < t->B * t->H) {
    const long slot = head / t->H, group = head % t->H / R, chunks = (t->lengths[slot] + CHUNK - 1) / CHUNK;
    float *piece = t->partial + ((slot * t->G + group) * t->chunks * R + head % R) * (D + 2), *const first = piece;
    float largest = first[D], total = 0;
    for (long c = 0; c < chunks; c++, piece += R * (D + 2)) largest = largest < piece[D] ? piece[D] : largest;
    piece = first;
    for (long c = 0; c < chunks; c++, piece += R * (D + 2)) {
      const float factor = expf(piece[D] - largest);
      total += factor * piece[D + 1];
      for (long d = 0; d < D; d++) first[d] = factor * piece[d] + (c ? first[d] : 0);
    }
    for (long d = 0; d < D; d++) put(t->out, head * D + d, t->type, first[d] / total);
  }
}

/* Writes out, see Attention, with set number i; query and out are of the caches' type. Returns i, -1 without memory.
 * D: a multiple of 32. */
EXPORT int covo_decode_attention(int i, int threads, const void *query, const void *keys, const void *values,
                                 const long *lengths, void *out, int type, long B, long H, long G, long K_max, long D,
                                 float scale) {
  long longest = 0;
  for (long b = 0; b < B; b++) longest = lengths[b] > longest ? lengths[b] : longest;
  const long chunks = (longest + CHUNK - 1) / CHUNK, R = H / G;
  const size_t partial = (size_t)round_up(B * H * chunks * (D + 2) * 4, 64);
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  threads = (int)smaller(threads, B * G * chunks);
  /* The rows of the result have a place for each of a chunk's rows: N changes from piece to piece, their distance not. */
  Attending p = {.set = SETS[i], .attention = {query, keys, values, lengths, out, NULL, B, H, G, K_max, D, chunks, scale,
                                               type}};
  p.product = (Linear){.M = R, .N = CHUNK, .K = D, .x_type = type, .weight_type = type, .y_type = FLOAT32,
                       .y_stride = CHUNK};
  while (!covo_set_here(i) || !SETS[i]->serves(&p.product)) i++;
  p.products = SETS[i];
  p.piece_bytes = R * CHUNK * 4 + round_up(p.products->prepared_bytes(&p.product), 64) +
                  round_up(p.products->scratch_bytes(&p.product), 64);
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, partial + (size_t)(threads * p.piece_bytes) + 64)) return -1;
  p.attention.partial = (float *)memory;
  p.scratch = memory + partial;
  covo_parallel(attend, &p, threads);
  covo_parallel(unite, &p, chunks < 8 ? 1 : threads);
  free(memory);
  return i;
}

/* --- Attention of many queries ---------------------------------------------------------------------------------------- */

typedef struct {
  const Set *set;
  Attend attend;
  long parts, rows; /* of the queries of a head, and how many a part has */
  long scratch_bytes;
  char *scratch;
  long next_unit, next_scratch;
} Many;

static void attend_many(void *job) {
  Many *p = job;
  const Attend *t = &p->attend;
  char *scratch = p->scratch + p->scratch_bytes * __atomic_fetch_add(&p->next_scratch, 1, __ATOMIC_RELAXED);
  long unit, packed = -1;
  while ((unit = __atomic_fetch_add(&p->next_unit, 1, __ATOMIC_RELAXED)) < t->B * t->H * p->parts) {
    const long head = unit / p->parts, first = unit % p->parts * p->rows;
    p->set->attends->attend(t, head / t->H, head % t->H, first, smaller(first + p->rows, t->S), head != packed, scratch);
    packed = head;
  }
}

/* Whether set number i has attention of many queries. */
EXPORT int covo_attends(int i) { return SETS[i]->attends != NULL; }

/* Writes t->out, see Attend, with set number i, which has it. Returns i, -1 without memory. */
EXPORT int covo_attention(int i, int threads, const Attend *t) {
  if (!t->B || !t->S || !t->H) return i;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  /* A head's keys are packed by each thread that has queries of it, so heads are cut only where they are few. */
  const long wanted = threads == 1 ? 1 : (4 * threads + t->B * t->H - 1) / (t->B * t->H);
  Many p = {.set = SETS[i], .attend = *t, .rows = round_up((t->S + wanted - 1) / wanted, SETS[i]->attends->step)};
  p.parts = (t->S + p.rows - 1) / p.rows;
  p.scratch_bytes = round_up(p.set->attends->bytes(t), 64);
  threads = (int)smaller(threads, t->B * t->H * p.parts);
  if (posix_memalign((void **)&p.scratch, 64, (size_t)(threads * p.scratch_bytes))) return -1;
  covo_parallel(attend_many, &p, threads);
  free(p.scratch);
  return i;
}

/* --- What is computed row by row: the anti-aliased activation, transforms of convolutions, what lies between products ---- */

typedef struct {
  Row *by;
  const void *job;
  long rows, next_row;
} EachRow;

static void take_rows(void *job) {
  EachRow *p = job;
  long row;
  while ((row = __atomic_fetch_add(&p->next_row, 1, __ATOMIC_RELAXED)) < p->rows) p->by(p->job, row);
}

static void each_row(Row *by, const void *job, long rows, int threads) {
  EachRow p = {by, job, rows, 0};
  if (rows > 0) covo_parallel(take_rows, &p, (int)smaller(smaller(threads, MAX_THREADS), rows));
}

/* Writes t->y, see Snake, with set number i. */
EXPORT void covo_snake(int i, int threads, const Snake *t) {
  each_row(SETS[i]->snake, t, snake_length(t) > 0 ? t->rows : 0, threads);
}

/* Write t->products, or t->signal, see Winograd, with set number i. */
EXPORT void covo_winograd_signal(int i, int threads, const Winograd *t) {
  each_row(SETS[i]->winograd_signal, t, t->tiles ? t->B * t->C : 0, threads);
}
EXPORT void covo_winograd_results(int i, int threads, const Winograd *t) {
  each_row(SETS[i]->winograd_results, t, t->tiles ? t->B * t->C : 0, threads);
}

#define FEW 32768 /* elements that a second thread would be told of as late as one has done them */

/* Write t->normed and t->summed, or t->y, see Norm, Rotary and Gate, with set number i. */
EXPORT void covo_norm(int i, int threads, const Norm *t) {
  each_row(SETS[i]->norm, t, t->rows, t->rows * t->C < FEW ? 1 : threads);
}
EXPORT void covo_rotary(int i, int threads, const Rotary *t) {
  each_row(SETS[i]->rotary, t, t->B * t->S, t->B * t->S * t->H * t->D < FEW ? 1 : threads);
}
EXPORT void covo_gate(int i, int threads, const Gate *t) {
  each_row(SETS[i]->gate, t, t->rows, t->rows * t->F < FEW ? 1 : threads);
}
