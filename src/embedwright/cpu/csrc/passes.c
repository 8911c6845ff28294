/* Norms and rotary positions, in one pass each. */

#include "vectors.h"

#include <math.h>

typedef struct {
    const void *x, *weight;
    void *out;
    long rows, dim, bf16, plus_one; /* Gemma multiplies by 1 + weight in float32; the others round before the weight */
    float eps;
    long next;
} Norm;

INLINE void norm_rows(const Norm *n, long first, long last, int bf16) {
    for (long at = first * n->dim; at < last * n->dim; at += n->dim) {
        vf squares = {0};
        for (long c = 0; c < n->dim; c += LANES) squares += load(n->x, at + c, bf16) * load(n->x, at + c, bf16);
        float scale = 1.0f / sqrtf(total(squares) / (float)n->dim + n->eps);
        for (long c = 0; c < n->dim; c += LANES) {
            vf x = load(n->x, at + c, bf16) * scale, weight = load(n->weight, c, bf16);
            store(n->out, at + c, n->plus_one ? x * (weight + 1.0f) : rounded(x, bf16) * weight, bf16);
        }
    }
}

void norm(void *job) {
    Norm *n = job;
    for (long first; (first = take(&n->next, ROWS)) < n->rows;) {
        long last = first + ROWS < n->rows ? first + ROWS : n->rows;
        n->bf16 ? norm_rows(n, first, last, 1) : norm_rows(n, first, last, 0);
    }
}

typedef struct {
    void *q, *k; /* rotated in place */
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

void rotary(void *job) {
    Rotary *r = job;
    for (long first; (first = take(&r->next, ROWS)) < r->tokens;)
        for (long t = first; t < first + ROWS && t < r->tokens; t++)
            for (long h = 0; h < r->heads + r->kv_heads; h++) {
                int query = h < r->heads;
                void *x = query ? r->q : r->k;
                long at = query ? h * r->q_head + t * r->q_token : (h - r->heads) * r->k_head + t * r->k_token;
                r->bf16 ? turn(r, x, at, t, 1) : turn(r, x, at, t, 0);
            }
}
