/* Vectors, and threads, of the kernels: what torch is slow at on CPUs.

   GNU C with vector extensions, for gcc and clang on any processor; no header but libc's. Threads are torch's own: the
   caller hands in the `GOMP_parallel` of the OpenMP runtime that torch runs on, and every thread that it starts takes
   pieces of work from a shared count. Sums are in float32, whatever the tensors are. */

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
#define ROWS 16 /* of a piece of work */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));

typedef void (*Run)(void (*)(void *), void *, unsigned, unsigned);

static inline void parallel(Run run, long threads, void (*work)(void *), void *job) {
    if (threads > 1)
        run(work, job, (unsigned)threads, 0);
    else
        work(job);
}

INLINE long take(long *next, long count) { return __atomic_fetch_add(next, count, __ATOMIC_RELAXED); }

/* ---- vectors */

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE uint32_t lanes_of(vi mask) { /* a bit for each lane */
#if LANES == 16
    return _mm512_movepi32_mask((__m512i)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

INLINE vf load(const void *from, long i, int bf16) { /* of float32 or bfloat16, element i on */
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
