/* Search: vectors in whole numbers, inner products in float64, and the best of what a coarse product lets through. */

#include "vectors.h"

INLINE vf part(const void *from, long i, long left) { /* of 4 bytes each, element i on; zeros beyond what is left */
    vf x = {0};
    if (left >= LANES) return *(const vf_any *)((const float *)from + i);
    memcpy(&x, (const float *)from + i, (size_t)left * sizeof(float));
    return x;
}

/* ---- whole numbers */

typedef int8_t vb __attribute__((vector_size(LANES)));

INLINE vb narrow(vi x) { /* the lowest bits of each */
#if LANES == 16 /* gcc takes 40 steps */
    return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, vb);
#endif
}

typedef struct {
    const float *vectors, *mean; /* rows of `width`; what is taken from every row */
    int8_t *out;                 /* times `scale` about a row less the mean */
    float *scale, *square, *moved, *lost; /* of a row; squared lengths: its own, less the mean, what rounding lost */
    long rows, width, next;
} Quantise;

INLINE float total(vf x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static void quantise_row(const Quantise *z, long row) {
    const float *x = z->vectors + row * z->width, *mean = z->mean;
    const long width = z->width;
    int8_t *out = z->out + row * width;
    const vf nearest = (vf){0} + 0x1.8p23f; /* added and taken away, it leaves the nearest whole number */
    vf largest = {0}, own = {0}, moved = {0}, lost = {0};
    for (long c = 0; c < width; c += LANES) {
        vf a = part(x, c, width - c), y = a - part(mean, c, width - c), size = (vf)((vi)y & 0x7fffffff);
        largest = choose(size > largest, size, largest);
        own += a * a;
        moved += y * y;
    }
    float most = 0;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    const float scale = most > 1e-30f ? most / 127 : 0, times = most > 1e-30f ? 127 / most : 0;
    for (long c = 0; c < width; c += LANES) {
        const long left = width - c;
        vf y = part(x, c, left) - part(mean, c, left), shifted = y * times + nearest, off = y - (shifted - nearest) * scale;
        lost += off * off;
        vb whole = narrow((vi)shifted);
        if (left >= LANES)
            memcpy(out + c, &whole, LANES);
        else
            memcpy(out + c, &whole, (size_t)left);
    }
    z->scale[row] = scale;
    z->square[row] = total(own);
    z->moved[row] = total(moved);
    z->lost[row] = total(lost);
}

static void quantise_work(void *job) {
    Quantise *z = job;
    for (long first; (first = take(&z->next, ROWS)) < z->rows;)
        for (long row = first; row < first + ROWS && row < z->rows; row++) quantise_row(z, row);
}

void quantise(Quantise *z, Run run, long threads) { parallel(run, threads, quantise_work, z); }

/* ---- inner products */

typedef double vd __attribute__((vector_size(64)));
typedef vd vd_any __attribute__((aligned(8), may_alias));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE vd eight(const float *x) {
#if LANES == 16 /* gcc takes four steps */
    return (vd)_mm512_cvtps_pd((__m256)*(const vf8 *)x);
#else
    return __builtin_convertvector(*(const vf8 *)x, vd);
#endif
}

static float inner(const double *a, const float *b, long width) { /* by these two alone: copies score alike */
    vd even = {0}, odd = {0};
    double sum = 0;
    long i = 0;
    for (; i + 16 <= width; i += 16) {
        even += *(const vd_any *)(a + i) * eight(b + i);
        odd += *(const vd_any *)(a + i + 8) * eight(b + i + 8);
    }
    for (; i < width; i++) sum += a[i] * b[i];
    even += odd;
    for (int j = 0; j < 8; j++) sum += even[j];
    return (float)sum;
}

typedef struct {
    const double *queries;
    const float *documents;          /* both rows of `width` */
    const int64_t *query, *document; /* of a pair */
    float *out;
    long pairs, width, next;
} Dots;

static void dots_work(void *job) {
    Dots *p = job;
    for (long first; (first = take(&p->next, ROWS)) < p->pairs;)
        for (long i = first; i < first + ROWS && i < p->pairs; i++)
            p->out[i] = inner(p->queries + p->query[i] * p->width, p->documents + p->document[i] * p->width, p->width);
}

void dots(Dots *p, Run run, long threads) { parallel(run, threads, dots_work, p); }

/* ---- the best */

typedef struct {
    const void *products;                 /* queries x columns, int32 where `whole`, else float32 */
    const float *scale, *length, *lost;   /* of a column */
    const float *factor, *off, *size, *shift; /* of a query: a score is at most product x factor x scale
                                                 + off x length + size x lost + shift */
    const double *queries;
    const float *documents; /* rows of `width`, of all columns */
    float *scores;          /* of a query: a heap of its `best`, no row below it worse than the one above it */
    int64_t *rows;
    long count, columns, width, best, first, whole, next, vain;
} Rank;

INLINE int worse(float score, int64_t row, float than, int64_t than_row) {
    return score < than || (score == than && row > than_row);
}

static void put(float *scores, int64_t *rows, long best, float score, int64_t row) { /* in the place of the worst */
    long at = 0;
    for (long child; (child = 2 * at + 1) < best; at = child) {
        if (child + 1 < best && worse(scores[child + 1], rows[child + 1], scores[child], rows[child])) child++;
        if (!worse(scores[child], rows[child], score, row)) break;
        scores[at] = scores[child];
        rows[at] = rows[child];
    }
    scores[at] = score;
    rows[at] = row;
}

#define PIECE 2048 /* columns that are passed before those that may be of the best are scored */

static float likely(const float *most, long found, long best) { /* what about `best` of them reach */
    float low = most[0], high = most[0];
    for (long i = 1; i < found; i++) {
        low = most[i] < low ? most[i] : low;
        high = most[i] > high ? most[i] : high;
    }
    for (int halved = 0; halved < 8; halved++) {
        const float middle = low + (high - low) / 2;
        int32_t reached = 0;
        for (long i = 0; i < found; i++) reached += most[i] >= middle;
        if (reached < best)
            high = middle;
        else
            low = middle;
    }
    return low;
}

INLINE long rank_row(const Rank *r, long q, int whole) {
    const double *query = r->queries + q * r->width;
    const float factor = r->factor[q], off = r->off[q], size = r->size[q], shift = r->shift[q];
    float *scores = r->scores + q * r->best, most_of[PIECE];
    int64_t *rows = r->rows + q * r->best;
    long noted[PIECE], vain = 0;
    for (long begin = 0; begin < r->columns; begin += PIECE) {
        const long end = begin + PIECE < r->columns ? begin + PIECE : r->columns;
        const float limit = scores[0] - shift;
        long found = 0;
        for (long c = begin; c < end; c += LANES) {
            long left = end - c;
            vf product = part(r->products, q * r->columns + c, left);
            if (whole) product = __builtin_convertvector((vi)product, vf);
            vf most = product * factor * part(r->scale, c, left) + off * part(r->length, c, left) +
                      size * part(r->lost, c, left);
            uint32_t hits = ~lanes_of((vi)(most < limit)); /* what is not a number is one, too */
            for (hits &= left < LANES ? (1u << left) - 1 : (1u << LANES) - 1; hits; hits &= hits - 1, found++) {
                noted[found] = c + __builtin_ctz(hits);
                most_of[found] = most[__builtin_ctz(hits)];
            }
        }
        for (int all = found <= 2 * r->best; all < 2; all++) { /* most of the others are worse than the likely ones */
            const float from = all ? limit : likely(most_of, found, r->best);
            for (long i = 0; i < found; i++) {
                if (noted[i] < 0 || most_of[i] < from || most_of[i] < scores[0] - shift) continue;
                float score = inner(query, r->documents + noted[i] * r->width, r->width);
                if (worse(scores[0], rows[0], score, r->first + noted[i]))
                    put(scores, rows, r->best, score, r->first + noted[i]);
                else
                    vain++;
                noted[i] = -1;
            }
        }
    }
    return vain;
}

static void rank_work(void *job) {
    Rank *r = job;
    long vain = 0;
    for (long q; (q = take(&r->next, 1)) < r->count;) vain += r->whole ? rank_row(r, q, 1) : rank_row(r, q, 0);
    __atomic_fetch_add(&r->vain, vain, __ATOMIC_RELAXED);
}

void rank(Rank *r, Run run, long threads) { parallel(run, threads, rank_work, r); }
