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

typedef int8_t vb __attribute__((vector_size(LANES)));

INLINE vb narrow(vi x) { /* keeps the lowest byte of each */
#if LANES == 16 /* gcc takes 40 steps */
    return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, vb);
#endif
}

INLINE vf exp2_of(vf x) { /* to 1e-7; 0 below 2^-126; NaN stays NaN */
    vi tiny = x < -126.0f;
    x = choose(tiny, (vf){0} - 126.0f, x);
    vf whole = x + 12582912.0f; /* 1.5 x 2^23 puts the nearest integer into the last bits */
    vf f = x - (whole - 12582912.0f);
    vf p = 1.32764715e-3f * f + 9.67554133e-3f;
    p = p * f + 5.55071327e-2f;
    p = p * f + 2.40221197e-1f;
    p = p * f + 6.93146967e-1f;
    p = p * f + 1.0f;
    return (vf)(((vi)p + ((vi)whole << 23)) & ~tiny);
}

#if LANES == 16
#define LOW(a, b) \
    __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) \
    __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

INLINE void transpose(vf x[LANES]) { /* each round moves one bit of the row's number into the column's */
    vf y[LANES];
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = LOW(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = HIGH(x[i], x[i + LANES / 2]);
        }
        memcpy(x, y, sizeof y);
    }
}
