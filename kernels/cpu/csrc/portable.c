/* Plain C for machines without any of the sets: the compiler's vectors, if it finds some. */
#include "covo.h"

typedef float vector __attribute__((vector_size(32), aligned(4), may_alias)); /* may start at any element */

#define SET(name) portable_##name
#define TARGET
#define VECTOR vector
#define LANES 8
#define ZERO ((vector){0})
#define LOAD(p) (*(const vector *)(p))
#define STORE(p, v) (*(vector *)(p) = (v))
#define BROADCAST(f) ((vector){f, f, f, f, f, f, f, f})
#define FMA(a, b, c) ((a) * (b) + (c))
#define SUM(v) ((((v)[0] + (v)[1]) + ((v)[2] + (v)[3])) + (((v)[4] + (v)[5]) + ((v)[6] + (v)[7])))
#define PAIR(f, p, i) f((p)[i]), f((p)[i + 1])
#define EIGHT(f, p) ((vector){PAIR(f, p, 0), PAIR(f, p, 2), PAIR(f, p, 4), PAIR(f, p, 6)})
#define LOAD_BFLOAT16(p) EIGHT(from_bfloat16, p)
#define LOAD_FLOAT16(p) EIGHT(from_float16, p)
#define LOAD_INT8(p) EIGHT((float), p)
#define GROUP 2

static int portable_here(void) { return 1; }

#include "rows.h"

const Set PORTABLE = SET_OF_VECTORS("portable", NULL);
