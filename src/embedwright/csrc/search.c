/* Search: which scores reach their query's floor, and inner products in float64. */

#include "vectors.h"

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
                even += __builtin_convertvector(*(const vf8 *)(a + c), vd) *
                        __builtin_convertvector(*(const vf8 *)(b + c), vd);
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
