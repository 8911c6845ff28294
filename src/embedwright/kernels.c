/* What torch is slow at on CPUs: attention within short texts, norms, rotary positions, candidates of a search.

   GNU C with vector extensions, for gcc and clang on any processor; no header but libc's. Threads are torch's own: the
   caller hands in the `GOMP_parallel` of the OpenMP runtime that torch runs on, and every thread that it starts takes
   pieces of work from a shared count. All arithmetic is in float32, whatever the tensors are.

   T tokens, H query heads, K key heads, R = H/K query heads that share a key head, d head dim. */

#include <math.h>
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
#if LANES == 16 && defined(__AVX512BF16__) /* products of bfloat16 in pairs: exact, summed in float32, at twice the pace */
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef vf vf_any __attribute__((aligned(4), may_alias));
typedef vh vh_any __attribute__((aligned(2), may_alias));

typedef void (*Run)(void (*)(void *), void *, unsigned, unsigned);

static void parallel(Run run, long threads, void (*work)(void *), void *job) {
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

INLINE vf exp2_of(vf x) { /* to 1e-7; 0 below 2^-126; NaN stays NaN */
    vi tiny = x < -126.0f;
    x = choose(tiny, (vf){0} - 126.0f, x);
    vf whole = x + 12582912.0f; /* 1.5 x 2^23: the nearest whole number stands in the last bits */
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

INLINE vf multiply_add(vf sum, const float *one, vf x, int pairs) { /* a number, or a pair of bfloat16, times each lane */
#if PAIRS
    int32_t pair;
    memcpy(&pair, one, sizeof pair);
    if (pairs) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)x);
#endif
    (void)pairs;
    return sum + *one * x;
}

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

/* ---- attention

   The R heads that share a key head are rows of one matrix, position by position. A tile has up to NV vectors of rows,
   one lane each: so the softmax needs no sum across lanes, and keys and values are read as they lie, one number for all
   lanes. The softmax is made block by block of keys, with the largest score so far. */

#define NV 3                       /* vectors of rows in a tile */
#define WIDTH (NV * LANES)         /* rows of a tile */
#define TILES 5                    /* of one piece of work, which share the keys that are converted */
#define KEYS 128                   /* of a block */
#if LANES == 16
#define AT_ONCE 8 /* keys, or columns of values: with NV, the sums that fit into registers */
#else
#define AT_ONCE 4
#endif
#define NOTHING 1e30f /* minus this: a score that counts 0 */

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

static long per_worker(long d) { return 2 * TILES * d * WIDTH + 2 * KEYS * d + KEYS * WIDTH + 2 * TILES * WIDTH; }

long attention_scratch(long dim) { return per_worker(dim); } /* floats of a thread */

/* rows [first, first + LANES) of a text, transposed; with `pairs` two neighbouring columns to a lane */
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

INLINE void store_rows(
    const Attention *a, long token, long g, long first, long last, const float *from, long width, vf inverse, int bf16) {
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

/* s[j] = k[j] . q for n keys; k is filled up to a multiple of AT_ONCE; `columns` of numbers or of pairs */
INLINE void products(const float *k, const float *q, float *s, long n, long columns, int nv, int pairs) {
    for (long j = 0; j < n; j += AT_ONCE) {
        vf sum[AT_ONCE][NV] = {0};
        const float *key = k + j * columns;
        for (long c = 0; c < columns; c++) {
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
                for (int v = 0; v < nv; v++)
                    sum[i][v] = multiply_add(sum[i][v], key + i * columns + c, *(const vf *)(q + (c * nv + v) * LANES), pairs);
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
                    sum[i][v] = multiply_add(sum[i][v], values + j * d + c + i, *(const vf *)(s + (j * nv + v) * LANES), pairs);
        }
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; i++)
#pragma GCC unroll 3
            for (int v = 0; v < nv; v++) *(vf *)(o + ((c + i) * nv + v) * LANES) = sum[i][v];
    }
}

typedef struct {
    float *q, *o, *most, *sum; /* of a tile: (d, rows) twice, (rows) twice */
    long first, last;          /* rows of the text */
} Tile;

/* the keys [j0, j0 + n) of a text for one tile */
INLINE void block(
    const Attention *a, const Tile *t, const float *k, const float *values, float *s, long j0, long n, int nv, int pairs) {
    const long from = t->first / a->shared, to = (t->last - 1) / a->shared; /* positions of the tile */
    const float scale = a->scale * 1.44269504f;                             /* of 2^x, not e^x */
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
            if (pairs) { /* of the weights as they are rounded, the sum is 1 */
                vf y = j + 1 < n ? exp2_of((*(vf *)(s + ((j + 1) * nv + v) * LANES) - now) * scale) : (vf){0};
                vu low = bits16(x), high = bits16(y);
                total += (vf)(low << 16) + (vf)(high << 16);
                x = (vf)(low | high << 16);
            } else
                total += x;
            *(vf *)(s + (j / (1 + pairs) * nv + v) * LANES) = x;
        }
        keep[v] = exp2_of((*most - now) * scale); /* 0 for a row that had seen nothing: NOTHING was its largest score */
        *sum = *sum * keep[v] + total;
        *most = now;
    }
    weighted(values, s, t->o, (n + pairs) / (1 + pairs), a->dim, keep, nv, pairs);
}

/* n keys and values into float32, or into pairs: of columns for keys, of neighbouring keys for values */
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
        Tile t = {at, at + d * WIDTH, at + 2 * d * WIDTH, at + (2 * d + 1) * WIDTH, first, last};
        long width = (last - first + LANES - 1) / LANES * LANES;
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
        for (long i = 0; i < count; i++) switch ((tiles[i].last - tiles[i].first + LANES - 1) / LANES) {
            case 1: block(a, &tiles[i], k, values, s, j0, n, 1, pairs); break;
            case 2: block(a, &tiles[i], k, values, s, j0, n, 2, pairs); break;
            default: block(a, &tiles[i], k, values, s, j0, n, 3, pairs);
            }
    }
    for (long i = 0; i < count; i++) {
        long width = (tiles[i].last - tiles[i].first + LANES - 1) / LANES * LANES;
        for (long v = 0; v < width; v += LANES)
            store_rows(a, token, g, tiles[i].first + v, tiles[i].last, tiles[i].o + v, width,
                       1.0f / *(vf *)(tiles[i].sum + v), bf16);
    }
}

static void attention_work(void *job) {
    Attention *a = job;
    float *scratch = a->scratch + take(&a->worker, 1) * per_worker(a->dim);
    long text = 0, before = 0; /* pieces of work before this text */
    for (long i = take(&a->next, 1);; i = take(&a->next, 1)) {
        long token, length, pieces;
        for (;; before += a->kv_heads * pieces, text++) { /* numbers only grow: no thread looks back */
            if (text == a->texts) return;
            token = a->ends[text], length = a->ends[text + 1] - token;
            pieces = (a->shared * length + TILES * WIDTH - 1) / (TILES * WIDTH);
            if (i < before + a->kv_heads * pieces) break;
        }
        long g = (i - before) / pieces, first = (i - before) % pieces * TILES * WIDTH;
        if (a->bf16)
            piece(a, scratch, token, length, g, first, 1);
        else
            piece(a, scratch, token, length, g, first, 0);
    }
}

void attention(Attention *a, Run run, long threads) { parallel(run, threads, attention_work, a); }

/* ---- norms, rotary positions, gates: one pass each, in pieces of ROWS rows */

#define ROWS 16

typedef struct {
    const void *x, *weight;
    void *out;
    long rows, dim, bf16, plus_one; /* Gemma: times 1 + weight, in float32; others round in between, as they do */
    float eps;
    long next;
} Norm;

INLINE void norm_rows(const Norm *n, long first, long last, int bf16) {
    for (long at = first * n->dim; at < last * n->dim; at += n->dim) {
        vf squares = {0};
        float sum = 0;
        for (long c = 0; c < n->dim; c += LANES) squares += load(n->x, at + c, bf16) * load(n->x, at + c, bf16);
        for (int i = 0; i < LANES; i++) sum += squares[i];
        float scale = 1.0f / sqrtf(sum / (float)n->dim + n->eps);
        for (long c = 0; c < n->dim; c += LANES) {
            vf x = load(n->x, at + c, bf16) * scale, weight = load(n->weight, c, bf16);
            store(n->out, at + c, n->plus_one ? x * (weight + 1.0f) : rounded(x, bf16) * weight, bf16);
        }
    }
}

static void norm_work(void *job) {
    Norm *n = job;
    for (long first; (first = take(&n->next, ROWS)) < n->rows;) {
        long last = first + ROWS < n->rows ? first + ROWS : n->rows;
        if (n->bf16)
            norm_rows(n, first, last, 1);
        else
            norm_rows(n, first, last, 0);
    }
}

void norm(Norm *n, Run run, long threads) { parallel(run, threads, norm_work, n); }

typedef struct {
    void *q, *k; /* turned in place */
    const void *cosine, *sine;
    long q_head, q_token, k_head, k_token, tokens, heads, kv_heads, dim, bf16, next;
} Rotary;

INLINE void turn(const Rotary *r, void *x, long at, long token, int bf16) {
    const long half = r->dim / 2, t = token * r->dim;
    for (long c = 0; c < half; c += LANES) {
        vf a = load(x, at + c, bf16), b = load(x, at + half + c, bf16);
        vf other = b * load(r->cosine, t + half + c, bf16) + a * load(r->sine, t + half + c, bf16);
        store(x, at + c, a * load(r->cosine, t + c, bf16) - b * load(r->sine, t + c, bf16), bf16);
        store(x, at + half + c, other, bf16);
    }
}

static void rotary_work(void *job) {
    Rotary *r = job;
    for (long first; (first = take(&r->next, ROWS)) < r->tokens;)
        for (long t = first; t < first + ROWS && t < r->tokens; t++)
            for (long h = 0; h < r->heads + r->kv_heads; h++) {
                int query = h < r->heads;
                void *x = query ? r->q : r->k;
                long at = query ? h * r->q_head + t * r->q_token : (h - r->heads) * r->k_head + t * r->k_token;
                if (r->bf16)
                    turn(r, x, at, t, 1);
                else
                    turn(r, x, at, t, 0);
            }
}

void rotary(Rotary *r, Run run, long threads) { parallel(run, threads, rotary_work, r); }

/* ---- search: which scores reach their query's floor, and inner products in float64 */

typedef struct {
    const void *scores;    /* queries x columns */
    const float *floors;   /* of a query */
    int64_t *counts;       /* of a query: hits, written where `values` is null, else where its hits begin */
    float *values;         /* of hits, query by query */
    int64_t *columns_of;   /* of hits */
    long queries, columns, bf16, next;
} Scan;

INLINE void scan_row(const Scan *s, long q, int bf16) {
    const float floor = s->floors[q];
    const long start = q * s->columns;
    int64_t found = s->values ? s->counts[q] : 0;
    for (long c = 0; c < s->columns; c += LANES) {
        vf x = {0};
        long left = s->columns - c, width = bf16 ? 2 : 4;
        if (left >= LANES)
            x = load(s->scores, start + c, bf16);
        else {
            char last[sizeof x] = {0};
            memcpy(last, (const char *)s->scores + (start + c) * width, (size_t)(left * width));
            x = load(last, 0, bf16);
        }
        uint32_t hits = lanes_of((vi)(x >= floor)) & (left < LANES ? (1u << left) - 1 : ~0u);
        if (!s->values)
            found += __builtin_popcount(hits);
        else
            for (; hits; hits &= hits - 1, found++) {
                s->values[found] = x[__builtin_ctz(hits)];
                s->columns_of[found] = c + __builtin_ctz(hits);
            }
    }
    if (!s->values) s->counts[q] = found;
}

static void scan_work(void *job) {
    Scan *s = job;
    for (long q; (q = take(&s->next, 1)) < s->queries;)
        if (s->bf16)
            scan_row(s, q, 1);
        else
            scan_row(s, q, 0);
}

void scan(Scan *s, Run run, long threads) { parallel(run, threads, scan_work, s); }

typedef double vd __attribute__((vector_size(64)));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    const float *queries, *documents; /* rows of `width` */
    const int64_t *query, *document;  /* of a pair */
    float *out;
    long pairs, width, next;
} Dots;

static void dots_work(void *job) { /* a sum depends on its two vectors alone: copies score alike */
    Dots *p = job;
    for (long first; (first = take(&p->next, ROWS)) < p->pairs;)
        for (long i = first; i < first + ROWS && i < p->pairs; i++) {
            const float *a = p->queries + p->query[i] * p->width, *b = p->documents + p->document[i] * p->width;
            vd even = {0}, odd = {0};
            double sum = 0;
            long c = 0;
            for (; c + 16 <= p->width; c += 16) {
                even += __builtin_convertvector(*(const vf8 *)(a + c), vd) * __builtin_convertvector(*(const vf8 *)(b + c), vd);
                odd += __builtin_convertvector(*(const vf8 *)(a + c + 8), vd) *
                       __builtin_convertvector(*(const vf8 *)(b + c + 8), vd);
            }
            for (; c < p->width; c++) sum += (double)a[c] * b[c];
            even += odd;
            for (int j = 0; j < 8; j++) sum += even[j];
            p->out[i] = (float)sum;
        }
}

void dots(Dots *p, Run run, long threads) { parallel(run, threads, dots_work, p); }
