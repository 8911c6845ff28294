/* Search: vectors in int8, which of their products may reach a score, and inner products in float64. */

#include "vectors.h"

INLINE vf part(const void *from, long i, long left) { /* loads 4-byte elements from i on; zeros past `left` of them */
    vf x = {0};
    if (left >= LANES) return *(const vf_any *)((const float *)from + i);
    memcpy(&x, (const float *)from + i, (size_t)left * sizeof(float));
    return x;
}

/* ---- int8 */

INLINE void put(int8_t *to, vb x, long left) { /* as many as are left */
    if (left >= LANES)
        memcpy(to, &x, LANES);
    else
        memcpy(to, &x, (size_t)left);
}

typedef struct {
    const float *vectors, *mean; /* rows of `width`; the mean is taken from every row */
    int8_t *out;                 /* times `scale`, it is about the row less the mean */
    float *scale, *moved, *lost; /* per row; squared lengths of the row less the mean, of what rounding took */
    long rows, width, next;
} Quantise;

static void quantise_row(const Quantise *z, long row) {
    const float *x = z->vectors + row * z->width, *mean = z->mean;
    const long width = z->width;
    int8_t *out = z->out + row * width;
    const vf nearest = (vf){0} + 0x1.8p23f; /* adding and subtracting it leaves the nearest whole number */
    vf largest = {0}, moved = {0}, lost = {0};
    for (long c = 0; c < width; c += LANES) {
        vf y = part(x, c, width - c) - part(mean, c, width - c), size = (vf)((vi)y & 0x7fffffff);
        largest = choose(size > largest, size, largest);
        moved += y * y;
    }
    float most = 0;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    const float scale = most > 1e-30f ? most / 127 : 0, times = most > 1e-30f ? 127 / most : 0;
    for (long c = 0; c < width; c += LANES) {
        const long left = width - c;
        vf y = part(x, c, left) - part(mean, c, left), shifted = y * times + nearest, off = y - (shifted - nearest) * scale;
        lost += off * off;
        put(out + c, narrow((vi)shifted), left);
    }
    z->scale[row] = scale;
    z->moved[row] = total(moved);
    z->lost[row] = total(lost);
}

void quantise(void *job) {
    Quantise *z = job;
    for (long first; (first = take(&z->next, ROWS)) < z->rows;)
        for (long row = first; row < first + ROWS && row < z->rows; row++) quantise_row(z, row);
}

/* ---- what may reach a score */

typedef struct {
    const int32_t *products;                  /* queries x columns */
    const float *scale, *length, *lost;       /* of a column */
    const float *factor, *off, *size, *limit; /* of a query */
    int8_t *reaches; /* queries x columns, 0 where product x factor x scale + off x length + size x lost < limit, else 1 */
    long count, columns, next;
} Reach;

void reach(void *job) {
    Reach *r = job;
    for (long q; (q = take(&r->next, 1)) < r->count;) {
        const float factor = r->factor[q], off = r->off[q], size = r->size[q], limit = r->limit[q];
        for (long c = 0; c < r->columns; c += LANES) {
            const long left = r->columns - c, at = q * r->columns + c;
            vf product = __builtin_convertvector((vi)part(r->products, at, left), vf);
            vf most = product * factor * part(r->scale, c, left) + off * part(r->length, c, left) +
                      size * part(r->lost, c, left);
            put(r->reaches + at, narrow(~(vi)(most < limit) & 1), left); /* NaN is a hit, too */
        }
    }
}

/* ---- inner products */

typedef double vd __attribute__((vector_size(64)));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE vd eight(const float *x) {
#if LANES == 16 /* gcc takes four steps */
    return (vd)_mm512_cvtps_pd((__m256)*(const vf8 *)x);
#else
    return __builtin_convertvector(*(const vf8 *)x, vd);
#endif
}

static float inner(const float *a, const float *b, long width) { /* of these two alone: copies score alike */
    vd even = {0}, odd = {0};
    double sum = 0;
    long i = 0;
    for (; i + 16 <= width; i += 16) {
        even += eight(a + i) * eight(b + i); /* exact: twice 24 bits */
        odd += eight(a + i + 8) * eight(b + i + 8);
    }
    for (; i < width; i++) sum += (double)a[i] * b[i];
    even += odd;
    for (int j = 0; j < 8; j++) sum += even[j];
    return (float)sum;
}

typedef struct {
    const float *queries, *documents; /* both rows of `width` */
    const int64_t *query, *document;  /* of a pair */
    float *out;
    long pairs, width, next;
} Dots;

void dots(void *job) {
    Dots *p = job;
    for (long first; (first = take(&p->next, ROWS)) < p->pairs;)
        for (long i = first; i < first + ROWS && i < p->pairs; i++)
            p->out[i] = inner(p->queries + p->query[i] * p->width, p->documents + p->document[i] * p->width, p->width);
}
