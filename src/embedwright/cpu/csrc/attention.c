/* Computes attention within each text of a packed row, without a gradient.

   T tokens, H query heads, K key heads, R = H/K query heads that share a key head, d head dim.

   The R heads that share a key head are rows of one matrix, position by position. A tile holds up to NV vectors of
   rows, one row per lane. So the softmax needs no sum across lanes, and one number of a key or value serves all lanes.
   The softmax goes through the keys in blocks and keeps the largest score so far. */

#include "vectors.h"

#if LANES == 16 && defined(__AVX512BF16__) /* bfloat16 in pairs: exact products, float32 sums, twice the speed */
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define NV 3               /* vectors of rows in a tile */
#define WIDTH (NV * LANES) /* rows of a tile */
#define TILES 5            /* in one piece of work; they share the converted keys */
#define KEYS 128           /* in a block */
#if LANES == 16
#define AT_ONCE 8 /* keys, or columns of values: AT_ONCE x NV sums fit into the registers */
#else
#define AT_ONCE 4
#endif
#define NOTHING 1e30f /* minus this is a score with weight 0 */

/* ---- arithmetic */

/* adds a number, or a pair of bfloat16, times each lane */
INLINE vf multiply_add(vf sum, const float *one, vf x, int pairs) {
#if PAIRS
    int32_t pair;
    memcpy(&pair, one, sizeof pair);
    if (pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)x);
#endif
    (void)pairs;
    return sum + *one * x;
}

/* ---- one text */

typedef struct {
    const void *q, *k, *v;
    void *out;
    const int32_t *ends; /* texts + 1 */
    long q_head, q_token, k_head, k_token, v_head, v_token;
    long texts, kv_heads, shared, dim, behind, ahead, bf16;
    float scale;
    float *scratch;
    long next, worker;
} Attention;

long attention_scratch(long d) { /* floats of a thread */
    return 2 * TILES * d * WIDTH + 2 * KEYS * d + KEYS * WIDTH + 2 * TILES * WIDTH;
}

/* loads rows [first, first + LANES) of a text, transposed; with `pairs`, two neighbouring columns per lane */
INLINE void load_rows(const Attention *a, long token, long g, long first, long last, float *to, long width, int bf16) {
    vf x[LANES];
    const int pairs = PAIRS && bf16;
    const long columns = pairs ? a->dim / 2 : a->dim;
    for (long c = 0; c < columns; c += LANES) {
        for (int i = 0; i < LANES; i++) {
            long row = first + i < last ? first + i : last - 1;
            long at = (g * a->shared + row % a->shared) * a->q_head + (token + row / a->shared) * a->q_token;
            if (!pairs)
                x[i] = load(a->q, at + c, bf16);
            else if (c + LANES <= columns)
                x[i] = *(const vf_any *)((const uint16_t *)a->q + at + 2 * c);
            else
                x[i] = (vf){0}, memcpy(&x[i], (const uint16_t *)a->q + at + 2 * c, 2 * LANES);
        }
        transpose(x);
        for (int i = 0; i < LANES; i++) *(vf *)(to + (c + i) * width) = x[i];
    }
}

INLINE void store_rows(const Attention *a, long token, long g, long first, long last, const float *from, long width,
                       vf inverse, int bf16) {
    vf x[LANES];
    for (long c = 0; c < a->dim; c += LANES) {
        for (int i = 0; i < LANES; i++) x[i] = *(const vf *)(from + (c + i) * width) * inverse;
        transpose(x);
        for (long i = 0; i < LANES && first + i < last; i++) {
            long row = first + i, head = g * a->shared + row % a->shared;
            long at = ((token + row / a->shared) * a->shared * a->kv_heads + head) * a->dim;
            store(a->out, at + c, x[i], bf16);
        }
    }
}

/* s[j] = k[j] . q for n keys; k has room up to a multiple of AT_ONCE; `columns` counts numbers, or pairs */
INLINE void products(const float *k, const float *q, float *s, long n, long columns, int nv, int pairs) {
    for (long j = 0; j < n; j += AT_ONCE) {
        vf sum[AT_ONCE][NV] = {0};
        const float *key = k + j * columns;
        for (long c = 0; c < columns; c++) {
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
                for (int v = 0; v < nv; v++)
                    sum[i][v] =
                        multiply_add(sum[i][v], key + i * columns + c, *(const vf *)(q + (c * nv + v) * LANES), pairs);
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
            for (int v = 0; v < nv; v++) *(vf *)(s + ((j + i) * nv + v) * LANES) = sum[i][v];
    }
}

/* o = o times `keep` + the sum of s[j] v[j] over n keys, or pairs of keys */
INLINE void weighted(const float *values, const float *s, float *o, long n, long d, const vf *keep, int nv, int pairs) {
    for (long c = 0; c < d; c += AT_ONCE) {
        vf sum[AT_ONCE][NV];
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
            for (int v = 0; v < nv; v++) sum[i][v] = *(const vf *)(o + ((c + i) * nv + v) * LANES) * keep[v];
        for (long j = 0; j < n; j++) {
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
                for (int v = 0; v < nv; v++)
                    sum[i][v] =
                        multiply_add(sum[i][v], values + j * d + c + i, *(const vf *)(s + (j * nv + v) * LANES), pairs);
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
            for (int v = 0; v < nv; v++) *(vf *)(o + ((c + i) * nv + v) * LANES) = sum[i][v];
    }
}

typedef struct {
    float *q, *o, *most, *sum; /* of a tile: (d, rows) twice, (rows) twice */
    long first, last, width;   /* rows of the text, and their number up to whole vectors */
} Tile;

/* attends from one tile to the keys [j0, j0 + n) of its text */
INLINE void block(const Attention *a, const Tile *t, const float *k, const float *values, float *s, long j0, long n,
                  int nv, int pairs) {
    const long from = t->first / a->shared, to = (t->last - 1) / a->shared; /* positions of the tile */
    const float scale = a->scale * 1.44269504f;                             /* for 2^x instead of e^x */
    vf keep[NV];
    if (j0 + n - 1 < from - a->behind || j0 > to + a->ahead) return;
    products(k, t->q, s, n, pairs ? a->dim / 2 : a->dim, nv, pairs);
    if (j0 < to - a->behind || j0 + n - 1 > from + a->ahead) {
        for (int v = 0; v < nv; v++) {
            vi position;
            for (int i = 0; i < LANES; i++) position[i] = (int32_t)((t->first + v * LANES + i) / a->shared);
            for (long j = 0; j < n; j++) {
                vi off = position - (int32_t)(j0 + j);
                vf *x = (vf *)(s + (j * nv + v) * LANES);
                *x = choose((off <= (int32_t)a->behind) & (-off <= (int32_t)a->ahead), *x, (vf){0} - NOTHING);
            }
        }
    }
    for (int v = 0; v < nv; v++) {
        vf *most = (vf *)(t->most + v * LANES), *sum = (vf *)(t->sum + v * LANES), now = *most, total = {0};
        for (long j = 0; j < n; j++) {
            vf x = *(vf *)(s + (j * nv + v) * LANES);
            now = choose(x > now, x, now);
        }
        for (long j = 0; j < n; j += 1 + pairs) {
            vf x = exp2_of((*(vf *)(s + (j * nv + v) * LANES) - now) * scale);
            if (pairs) { /* the rounded weights, not the exact ones, sum to 1 */
                vf y = j + 1 < n ? exp2_of((*(vf *)(s + ((j + 1) * nv + v) * LANES) - now) * scale) : (vf){0};
                vu low = bits16(x), high = bits16(y);
                total += (vf)(low << 16) + (vf)(high << 16);
                x = (vf)(low | high << 16);
            } else
                total += x;
            *(vf *)(s + (j / (1 + pairs) * nv + v) * LANES) = x;
        }
        keep[v] = exp2_of((*most - now) * scale); /* 0 for a row that has seen no key: its largest score is -NOTHING */
        *sum = *sum * keep[v] + total;
        *most = now;
    }
    weighted(values, s, t->o, (n + pairs) / (1 + pairs), a->dim, keep, nv, pairs);
}

/* converts n keys and values to float32, or to pairs: columns for keys, neighbouring keys for values */
INLINE void unpack(const Attention *a, long g, long token, long n, float *k, float *values, int bf16) {
    const long d = a->dim;
    for (long j = 0; j < n; j++) {
        long at_k = g * a->k_head + (token + j) * a->k_token, at_v = g * a->v_head + (token + j) * a->v_token;
        if (PAIRS && bf16) {
            memcpy(k + j * d / 2, (const uint16_t *)a->k + at_k, (size_t)d * 2);
            for (long c = 0; c < d; c += LANES) {
                vf x = load(a->v, at_v + c, 1), *pair = (vf *)(values + j / 2 * d + c);
                *pair = j % 2 ? (vf)((vu)*pair | (vu)x) : (vf)((vu)x >> 16);
            }
        } else
            for (long c = 0; c < d; c += LANES) {
                *(vf *)(k + j * d + c) = load(a->k, at_k + c, bf16);
                *(vf *)(values + j * d + c) = load(a->v, at_v + c, bf16);
            }
    }
}

INLINE void piece(const Attention *a, float *scratch, long token, long length, long g, long first, int bf16) {
    const long d = a->dim, rows = a->shared * length;
    const int pairs = PAIRS && bf16;
    float *k = scratch, *values = k + KEYS * d, *s = values + KEYS * d;
    Tile tiles[TILES];
    long count = 0;
    float *at = s + KEYS * WIDTH;
    for (long last; count < TILES && first < rows; first = last, count++, at += 2 * (d + 1) * WIDTH) {
        last = first + WIDTH < rows ? first + WIDTH : rows;
        long width = (last - first + LANES - 1) / LANES * LANES;
        Tile t = {at, at + d * WIDTH, at + 2 * d * WIDTH, at + (2 * d + 1) * WIDTH, first, last, width};
        for (long v = 0; v < width; v += LANES) {
            load_rows(a, token, g, first + v, last, t.q + v, width, bf16);
            *(vf *)(t.most + v) = (vf){0} - NOTHING;
            *(vf *)(t.sum + v) = (vf){0};
        }
        memset(t.o, 0, (size_t)(d * width) * sizeof(float));
        tiles[count] = t;
    }
    long begin = tiles[0].first / a->shared - a->behind, end = (tiles[count - 1].last - 1) / a->shared + a->ahead + 1;
    begin = begin < 0 ? 0 : begin;
    end = end > length ? length : end;
    for (long j0 = begin; j0 < end; j0 += KEYS) {
        long n = end - j0 < KEYS ? end - j0 : KEYS;
        unpack(a, g, token + j0, n, k, values, bf16);
        for (long i = 0; i < count; i++) switch (tiles[i].width / LANES) {
            case 1: block(a, &tiles[i], k, values, s, j0, n, 1, pairs); break;
            case 2: block(a, &tiles[i], k, values, s, j0, n, 2, pairs); break;
            default: block(a, &tiles[i], k, values, s, j0, n, 3, pairs);
            }
    }
    for (const Tile *t = tiles; t < tiles + count; t++)
        for (long v = 0; v < t->width; v += LANES)
            store_rows(a, token, g, t->first + v, t->last, t->o + v, t->width, 1.0f / *(vf *)(t->sum + v), bf16);
}

void attention(void *job) {
    Attention *a = job;
    float *scratch = a->scratch + take(&a->worker, 1) * attention_scratch(a->dim);
    long text = 0, before = 0; /* number of pieces before this text */
    for (long i = take(&a->next, 1);; i = take(&a->next, 1)) {
        long token, length, pieces;
        for (;; before += a->kv_heads * pieces, text++) { /* a thread's piece numbers only grow, so it never looks back */
            if (text == a->texts) return;
            token = a->ends[text], length = a->ends[text + 1] - token;
            pieces = (a->shared * length + TILES * WIDTH - 1) / (TILES * WIDTH);
            if (i < before + a->kv_heads * pieces) break;
        }
        long g = (i - before) / pieces, first = (i - before) % pieces * TILES * WIDTH;
        a->bf16 ? piece(a, scratch, token, length, g, first, 1) : piece(a, scratch, token, length, g, first, 0);
    }
}
