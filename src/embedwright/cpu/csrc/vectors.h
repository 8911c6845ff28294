/* Vector types and shared work for the kernels, which do what torch is slow at on CPUs.

   GNU C with vector extensions, for gcc and clang on any processor; no header but libc's. A kernel is a function of one
   pointer, to its struct, whose members `_run` in kernels.py fills in order. It is called on every thread at once, and
   each takes pieces of work from a shared count. Sums are in float32, whatever the tensors are. */

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define ROWS 16 /* in one piece of work */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));

INLINE long take(long *next, long count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

/* ---- vectors */

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE float total(vf x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

INLINE vf load(const void *from, long i, int bf16) { /* float32 or bfloat16, from element i on */
    if (!bf16) return *(const vf_any *)((const float *)from + i);
    return (vf)(__builtin_convertvector(*(const vh_any *)((const uint16_t *)from + i), vu) << 16);
}

INLINE vu bits16(vf x) { return ((vu)x + 0x7fff + (((vu)x >> 16) & 1)) >> 16; } /* to nearest, ties to even */

INLINE vf rounded(vf x, int bf16) { return bf16 ? (vf)(bits16(x) << 16) : x; }

INLINE void store(void *to, long i, vf x, int bf16) {
    if (bf16)
        *(vh_any *)((uint16_t *)to + i) = __builtin_convertvector(bits16(x), vh);
    else
        *(vf_any *)((float *)to + i) = x;
}
