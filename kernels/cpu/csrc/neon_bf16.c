/* NEON with products of bfloat16 pairs (BFDOT): both products are added and then added to a float32 sum; without FEAT_EBF16
 * they round to odd and subnormal inputs and sums count as zero. */
#include "covo.h"

#if defined __aarch64__ && defined __clang__ && __clang_major__ < 16
/* Those compilers have no such attribute for a function. */
static int never(void) { return 0; }
const Set NEON_BF16 = {.name = "neon_bf16", .here = never};
#elif defined __aarch64__
#include <arm_neon.h>
#include <sys/auxv.h>

#ifndef HWCAP2_BF16
#define HWCAP2_BF16 (1 << 14)
#endif

#define SET(name) neon_bf16_##name
#define TARGET __attribute__((target("arch=armv8.2-a+bf16")))
#include "neon.inc.h"
#define DOT_VECTOR neon_pairs
#define DOT_LANES 16
#define LOAD_DOT(p) neon_pairs_at(p)
#define DOT(sums, x, w) neon_dot(sums, x, w)

typedef struct {
  bfloat16x8_t low, high;
} neon_pairs;

INLINE TARGET neon_pairs neon_pairs_at(const uint16_t *p) {
  return (neon_pairs){vreinterpretq_bf16_u16(vld1q_u16(p)), vreinterpretq_bf16_u16(vld1q_u16(p + 8))};
}
INLINE TARGET float32x4x2_t neon_dot(float32x4x2_t sums, neon_pairs x, neon_pairs w) {
  return neon_both(vbfdotq_f32(sums.val[0], x.low, w.low), vbfdotq_f32(sums.val[1], x.high, w.high));
}

static int neon_bf16_here(void) { return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0; }

#include "rows.h"

const Set NEON_BF16 = SET_OF_VECTORS("neon_bf16", NULL);
#endif
