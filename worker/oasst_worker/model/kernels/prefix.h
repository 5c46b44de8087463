/* The draw among a few tokens of a row, its most likely or its most typical ones, in double; the rest of the row
 * enters only as a sum. `model/shortcuts.py` does the same for many rows at once, by PyTorch's operators.
 *
 * A row is decided only if no comparison was so close that the rounding of the plain path (`model/warpers.py`) could
 * turn it. */
#pragma once
#include "vectors.h"
#include <math.h>

#define MOST_TOKENS 64
#define MASS_MARGIN 2e-6     /* Wider than the error of a sum of fp32 probabilities, ours or the plain path's. */
#define DISTANCE_MARGIN 2e-5 /* Wider than the error of an fp32 log-probability or entropy. */

enum { GREEDY, LIKELY, TYPICAL };

/* How a row is drawn, see `oasst/v1/generation.proto`. */
typedef struct {
    int64_t kind, top_k;
    double temperature, top_p, min_p, typical_p, uniform;
    double limit;   /* The highest logit must stay below, to fit fp32 after temperature. */
    double penalty; /* Divides the logits of ids seen, or multiplies them below 0. */
} spec;

typedef struct {
    int64_t id;
    float score;   /* After temperature. */
    double weight; /* e^(score - peak) */
} token;

/* Those that may still be drawn, the most likely first; of equals the highest id first, as the plain path orders
 * them. */
typedef struct {
    int64_t size, is_doubtful;
    double peak; /* The highest score of the whole row. */
    token tokens[MOST_TOKENS];
} prefix;

/* What the whole row weighs: the sums of w = e^depth and of w * depth, where depth = score - peak. */
typedef struct {
    double total, moment;
} row_weight;

static int has_filter(const spec *q) { return q->top_k > 0 || q->top_p < 1 || q->min_p > 0; }

/* Whether the draw depends on what all tokens of the row weigh. */
static int needs_sums(const spec *q) {
    return q->kind != GREEDY && !q->top_k && (q->top_p < 1 || !has_filter(q));
}

static int is_near(double a, double b, double margin) { return fabs(a - b) < margin; }

static void fill(prefix *p, const spec *q, double peak, int64_t size, const int64_t *ids, const float *x) {
    *p = (prefix){.peak = peak};
    for (int64_t i = 0; i < size; i++) {
        float score = x[ids[i]] / (float)q->temperature;
        token new = {ids[i], score, exp(score - peak)};
        int64_t place = p->size++;
        for (; place > 0; place--) {
            const token *before = p->tokens + place - 1;
            if (before->score > new.score || (before->score == new.score && before->id > new.id)) break;
            p->tokens[place] = *before;
        }
        p->tokens[place] = new;
    }
}

static double weight_of(const prefix *p) {
    double total = 0;
    for (int64_t i = 0; i < p->size; i++) total += p->tokens[i].weight;
    return total;
}

/* Those below the k-th highest score go; returns that, or -infinity if there are no k. */
static double keep_top_k(prefix *p, int64_t k) {
    if (k > p->size) return -INFINITY;
    double kth = p->tokens[k - 1].score;
    while (k < p->size && p->tokens[k].score >= kth) k++;
    p->size = k;
    return kth;
}

static void keep_top_p(prefix *p, double mass, double total) {
    double before = 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < p->size; i++) {
        p->is_doubtful |= is_near(before / total, mass, MASS_MARGIN);
        if (before / total < mass) kept++;
        before += p->tokens[i].weight;
    }
    p->size = kept;
}

static void keep_min_p(prefix *p, double least) {
    int64_t kept = 0;
    for (int64_t i = 0; i < p->size; i++) {
        p->is_doubtful |= is_near(p->tokens[i].weight, least, MASS_MARGIN * least);
        if (p->tokens[i].weight >= least) kept++;
    }
    p->size = kept;
}

/* Those whose information content is nearest to `entropy` stay, up to the mass, if all tokens weigh `total`; one is
 * there at least. Returns the largest distance kept, and in `farthest` the largest that was there. */
static double keep_typical(prefix *p, double mass, double total, double entropy, double *farthest) {
    double distances[MOST_TOKENS], sum = 0;
    int64_t order[MOST_TOKENS], last = 0;
    for (int64_t i = 0; i < p->size; i++) {
        int64_t place = i;
        distances[i] = fabs(p->peak + log(total) - p->tokens[i].score - entropy);
        for (; place > 0 && distances[order[place - 1]] > distances[i]; place--) order[place] = order[place - 1];
        order[place] = i;
    }
    for (int64_t i = 0; i < p->size; i++) {
        sum += p->tokens[order[i]].weight / total;
        p->is_doubtful |= is_near(sum, mass, MASS_MARGIN);
        if (sum < mass) last = i + 1 < p->size ? i + 1 : i;
    }
    double limit = distances[order[last]];
    float score = p->tokens[order[last]].score;
    *farthest = distances[order[p->size - 1]];
    int64_t kept = 0;
    for (int64_t i = 0; i < p->size; i++) {
        /* Equal scores have equal distances on both paths; only others can change sides. */
        p->is_doubtful |= p->tokens[i].score != score && is_near(distances[i], limit, DISTANCE_MARGIN);
        if (distances[i] <= limit) p->tokens[kept++] = p->tokens[i];
    }
    p->size = kept;
    return limit;
}

/* The entropy of those that are there, which weigh `total`. */
static double entropy_of(const prefix *p, double total) {
    double entropy = 0;
    for (int64_t i = 0; i < p->size; i++) {
        double share = p->tokens[i].weight / total;
        if (share > 0) entropy -= share * log(share);
    }
    return entropy;
}

/* The token at which the running sum passes the random number, if all tokens weigh `total`; returns whether that is
 * beyond doubt. */
static int64_t draw_token(const prefix *p, double uniform, double total, int64_t *id) {
    double target = uniform * total, sum = 0;
    int64_t drawn = 0, is_close = p->is_doubtful;
    for (int64_t i = 0; i < p->size; i++) {
        sum += p->tokens[i].weight;
        is_close |= fabs(sum - target) <= MASS_MARGIN * total;
        if (sum <= target) drawn = i + 1;
    }
    if (drawn == p->size) return 0;
    *id = p->tokens[drawn].id;
    return !is_close;
}

/* From the most likely tokens, with any filters or none. No token outside has a higher score than the lowest here,
 * unless the prefix is the whole row. Returns whether the token is decided. */
static int64_t draw_from_likely(prefix *p, const spec *q, const row_weight *all, int64_t is_whole, int64_t *id) {
    double outside = is_whole ? -INFINITY : p->tokens[p->size - 1].score;
    /* Closed once no token outside can be kept. */
    int64_t is_closed = is_whole;
    if (q->top_k) is_closed |= keep_top_k(p, q->top_k) > outside;
    double total = needs_sums(q) && !is_whole ? all->total : weight_of(p);
    if (q->top_p < 1) keep_top_p(p, q->top_p, total);
    if (q->min_p > 0) keep_min_p(p, q->min_p);
    if (!q->top_k && has_filter(q)) is_closed |= p->size && p->tokens[p->size - 1].score > outside;
    if (q->typical_p < 1 && p->size) {
        double kept = weight_of(p), farthest;
        keep_typical(p, q->typical_p, kept, entropy_of(p, kept), &farthest);
    }
    if (is_closed) return draw_token(p, q->uniform, weight_of(p), id);
    if (has_filter(q)) return 0;
    /* Equals of the lowest may lie outside, of any id. */
    while (p->size && p->tokens[p->size - 1].score <= outside) p->size--;
    return draw_token(p, q->uniform, total, id);
}

/* From the most typical tokens, without any other filter. */
static int64_t draw_from_typical(prefix *p, const spec *q, const row_weight *all, int64_t is_whole, int64_t *id) {
    double farthest, entropy = log(all->total) - all->moment / all->total;
    double limit = keep_typical(p, q->typical_p, all->total, entropy, &farthest);
    if (!is_whole && limit > farthest - DISTANCE_MARGIN) return 0;
    return draw_token(p, q->uniform, weight_of(p), id);
}
