/* Linear layers in int8: rows rotated and rounded to int8, and products of int8 with sums in int32. */

#include "vectors.h"

#include <math.h>

#if LANES == 16 && defined(__AVX512VNNI__)

/* ---- rows */

typedef struct {
    const void *x;
    int8_t *out; /* times `scale`, it is about the row, rotated */
    float *scale;
    int32_t *total; /* of a row of `out` */
    long rows, dim, bf16, block;
    long next;
} Rounding;

#define FLIP(x, n) /* sums and differences of the numbers that stand n apart */ \
    x = x * choose((lane & n) != 0, (vf){0} - 1, (vf){0} + 1) + \
        __builtin_shufflevector(x, x, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n, 8 ^ n, 9 ^ n, 10 ^ n, \
                                11 ^ n, 12 ^ n, 13 ^ n, 14 ^ n, 15 ^ n)

INLINE void rotate(vf *y, long count) { /* by the Hadamard matrix of 16 x count numbers, times the root of its size */
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long i = 0; i < count; i++) {
        FLIP(y[i], 1);
        FLIP(y[i], 2);
        FLIP(y[i], 4);
        FLIP(y[i], 8);
    }
    for (long apart = 1; apart < count; apart *= 2)
        for (long i = 0; i < count; i++)
            if (!(i & apart)) {
                vf a = y[i], b = y[i + apart];
                y[i] = a + b, y[i + apart] = a - b;
            }
}

INLINE void round_row(const Rounding *z, long row, int bf16) {
    const long n = z->dim / LANES, at = row * z->dim;
    vf y[n];
    __m512i largest = _mm512_setzero_si512();
    vi sum = {0};
    for (long i = 0; i < n; i++) y[i] = load(z->x, at + i * LANES, bf16);
    if (z->block == 64)
        for (long i = 0; i < n; i += 4) rotate(y + i, 4);
    else if (z->block > 1)
        for (long i = 0; i < n; i += z->block / LANES) rotate(y + i, z->block / LANES);
    for (long i = 0; i < n; i++) /* read as integers, sizes keep their order, and NaN is the largest */
        largest = _mm512_max_epi32(largest, (__m512i)((vi)y[i] & 0x7fffffff));
    const int32_t bits = _mm512_reduce_max_epi32(largest);
    float most;
    memcpy(&most, &bits, sizeof most);
    const int nothing = most <= 1e-30f;
    const float times = nothing ? 0 : 127 / most;
    for (long i = 0; i < n; i++) { /* adding 1.5 x 2^23 leaves the nearest integer in the last bits */
        vi nearest = (vi)(y[i] * times + 0x1.8p23f) - 0x4b400000;
        vb q = narrow(nearest);
        sum += nearest;
        memcpy(z->out + at + i * LANES, &q, LANES);
    }
    z->scale[row] = nothing ? 0 : most / 127 / sqrtf((float)z->block);
    z->total[row] = _mm512_reduce_add_epi32((__m512i)sum);
}

void rounding(void *job) {
    Rounding *z = job;
    for (long first; (first = take(&z->next, ROWS)) < z->rows;)
        for (long row = first; row < first + ROWS && row < z->rows; row++)
            z->bf16 ? round_row(z, row, 1) : round_row(z, row, 0);
}

/* ---- products */

#define TILE 6       /* rows; with VECTORS, the sums fill 24 of 32 registers */
#define VECTORS 4    /* of outputs */
#define AT_ONCE 384  /* rows in one piece of work, which packs its weights once */

typedef struct {
    const int8_t *x; /* rows x inputs */
    const float *x_scale;
    const int32_t *x_total;
    const int8_t *weight, *other; /* outputs x inputs; with `other`, out is activation(x weight) * (x other) */
    const float *scale, *other_scale, *bias; /* of an output; no bias: 0 */
    void *out;
    uint8_t *scratch; /* 64 bytes for each input and thread */
    long rows, inputs, outputs, bf16, gelu;
    long next, worker;
} Product;

/* Packs LANES rows of weights: four inputs of each output side by side, plus 128, since one factor has no sign. */
INLINE void pack(const int8_t *from, long inputs, uint8_t *to, long step) {
    for (long k = 0; k < inputs; k += 4 * LANES) {
        vf x[LANES];
        const long left = inputs - k < 4 * LANES ? inputs - k : 4 * LANES;
        for (int i = 0; i < LANES; i++) {
            x[i] = (vf){0};
            if (left == 4 * LANES)
                x[i] = *(const vf_any *)(from + i * inputs + k);
            else
                memcpy(&x[i], from + i * inputs + k, (size_t)left);
        }
        transpose(x);
        for (long i = 0; i < left / 4; i++) *(vi *)(to + (k / 4 + i) * step) = (vi)x[i] ^ (int32_t)0x80808080;
    }
}

INLINE vf gate(vf x, long gelu) { /* silu, or gelu in its form with tanh: x times a logistic function */
    vf y = (gelu ? x * (x * x * 0.044715f + 1.0f) * -1.5957691f : -x) * 1.44269504f;
    return x / (exp2_of(choose(y > 126.0f, (vf){0} + 126.0f, y)) + 1.0f);
}

INLINE void tile(const Product *p, const uint8_t *panel, long first, long last, long column, int nv, int gated) {
    vi sum[TILE][VECTORS] = {0};
    const int8_t *x[TILE];
    const int per = gated ? nv / 2 : nv;
    for (int r = 0; r < TILE; r++) x[r] = p->x + (first + r < last ? first + r : last - 1) * p->inputs;
    for (long k = 0; k < p->inputs; k += 4) {
#pragma GCC unroll 6
        for (int r = 0; r < TILE; r++) {
            int32_t four;
            memcpy(&four, x[r] + k, sizeof four);
            const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                sum[r][v] = (vi)_mm512_dpbusd_epi32((__m512i)sum[r][v], *(const __m512i *)(panel + 64 * (k / 4 * nv + v)), row);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < TILE; r++) {
        const long row = first + r;
        if (row >= last) continue;
        const int32_t off = 128 * p->x_total[row];
        const float scale = p->x_scale[row];
#pragma GCC unroll 4
        for (int v = 0; v < per; v++) {
            const long c = column + v * LANES;
            vf y = __builtin_convertvector(sum[r][v] - off, vf) * (load(p->scale, c, 0) * scale);
            if (gated)
                y = gate(y, p->gelu) *
                    (__builtin_convertvector(sum[r][v + per] - off, vf) * (load(p->other_scale, c, 0) * scale));
            else if (p->bias)
                y += load(p->bias, c, 0);
            store(p->out, row * p->outputs + c, y, (int)p->bf16);
        }
    }
}

INLINE void strip(const Product *p, uint8_t *panel, long first, long last, long column, int nv, int gated, int fresh) {
    const int per = gated ? nv / 2 : nv;
    for (int v = 0; v < nv && fresh; v++)
        pack((v < per ? p->weight : p->other) + (column + v % per * LANES) * p->inputs, p->inputs, panel + 64 * v, 64 * nv);
    for (long row = first; row < last; row += TILE) tile(p, panel, row, last, column, nv, gated);
}

void product(void *job) {
    Product *p = job;
    uint8_t *panel = p->scratch + take(&p->worker, 1) * p->inputs * 64;
    const long per = p->other ? VECTORS / 2 : VECTORS, width = per * LANES;
    const long strips = (p->outputs + width - 1) / width, pieces = (p->rows + AT_ONCE - 1) / AT_ONCE;
    const long each = ((p->rows + pieces - 1) / pieces + TILE - 1) / TILE * TILE;
    long packed = -1;
    for (long i; (i = take(&p->next, 1)) < strips * pieces;) {
        const long column = i / pieces * width, first = i % pieces * each;
        const long last = first + each < p->rows ? first + each : p->rows, left = (p->outputs - column) / LANES;
        const long nv = left < per ? left : per;
        const int fresh = column != packed;
        packed = column;
        switch (nv + (p->other ? 4 : 0)) {
        case 1: strip(p, panel, first, last, column, 1, 0, fresh); break;
        case 2: strip(p, panel, first, last, column, 2, 0, fresh); break;
        case 3: strip(p, panel, first, last, column, 3, 0, fresh); break;
        case 4: strip(p, panel, first, last, column, 4, 0, fresh); break;
        case 5: strip(p, panel, first, last, column, 2, 1, fresh); break;
        default: strip(p, panel, first, last, column, 4, 1, fresh);
        }
    }
}
#endif
