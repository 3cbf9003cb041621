/* NEON, which every 64-bit Arm processor has. */
#include "covo.h"

#ifdef __aarch64__
#include <arm_neon.h>

#define SET(name) neon_##name
#define TARGET
#include "neon.inc.h"

static int neon_here(void) { return 1; }

#include "rows.h"

const Set NEON = SET_OF_VECTORS("neon", NULL);
#endif
