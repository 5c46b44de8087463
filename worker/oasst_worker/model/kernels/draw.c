/* The draws of a batch: penalties and bans on whole rows of logits, the few tokens among which a draw almost always
 * falls, and the draw among these.
 *
 * A row is one thread's: what it gets depends on that row alone. */
#include "prefix.h"
#include "team.h"

#define CHUNK (4 * LANES)
#define NUMBERS_OF_A_RUN 4096 /* Summed in fp32 before they join a sum in double. */
#define LOG_NOTHING (-80.0f)  /* e^-80 is nothing beside 1. */

/* Row i's ids are those from starts[i] to starts[i + 1]. */
typedef struct {
    int64_t num_rows, vocabulary;
    const spec *specs; /* [num_rows] */
    const int64_t *seen_starts, *seen, *moved_starts, *moved;
    const float *moves; /* What is added to the logit of each moved id, in this order. */
    const int64_t *banned;
    int64_t num_banned; /* In every row. */
} request;

/* [num_rows] each. */
typedef struct {
    int64_t *token_ids;  /* Of decided rows. */
    int64_t *is_decided; /* Whether the few tokens tell the draw beyond doubt. */
    int64_t *is_good;    /* Whether all logits were finite, and the highest is within its limit at the end. */
} answer;

/* What ranks a row's tokens. */
typedef struct {
    int64_t kind;
    float temperature, peak, depth; /* For TYPICAL: the depth at which a token is as surprising as the row on average. */
} ranking;

INLINED vector depth_of(vector logits, float temperature, float peak) {
    vector depth = logits / temperature - peak, nothing = spread(LOG_NOTHING);
    return choose(depth > nothing, depth, nothing);
}

INLINED vector rank(const ranking *r, vector logits) {
    if (r->kind == LIKELY) return logits;
    vector distance = depth_of(logits, r->temperature, r->peak) - r->depth;
    return choose(distance > 0, -distance, distance);
}

static int64_t is_finite(const float *x, int64_t size) {
    vector nothing = spread(0);
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) nothing += *(const loose_vector *)(x + i) * 0.0f;
    for (; i < size; i++) rest += x[i] * 0.0f;
    return sum_of(nothing) + rest == 0.0f;
}

/* An id may stand twice among those seen: all are read before one is written. */
static void penalize(float *x, const int64_t *ids, int64_t size, float penalty, float *scratch) {
    for (int64_t i = 0; i < size; i++) scratch[i] = x[ids[i]] < 0 ? x[ids[i]] * penalty : x[ids[i]] / penalty;
    for (int64_t i = 0; i < size; i++) x[ids[i]] = scratch[i];
}

INLINED vector load_or_nothing(const float *x, int64_t size) {
    if (size >= LANES) return *(const loose_vector *)x;
    vector padded = spread(-INFINITY);
    memcpy(&padded, x, size * sizeof(float));
    return padded;
}

/* The highest rank of each chunk; returns that of all. */
INLINED float find_peaks(const ranking *r, const float *x, int64_t size, float *peaks) {
    vector highest = spread(-INFINITY);
    for (int64_t start = 0; start < size; start += CHUNK) {
        vector peak = spread(-INFINITY);
        for (int64_t i = start, end = min(start + CHUNK, size); i < end; i += LANES) {
            vector ranks = rank(r, load_or_nothing(x + i, size - i));
            peak = choose(ranks > peak, ranks, peak);
        }
        *peaks++ = highest_of(peak);
        highest = choose(peak > highest, peak, highest);
    }
    return highest_of(highest);
}

static void sum_weights(
    const float *x, int64_t size, float temperature, float peak, double *all_weights, double *all_moments) {
    *all_weights = *all_moments = 0;
    for (int64_t start = 0; start < size; start += NUMBERS_OF_A_RUN) {
        vector total = spread(0), moment = spread(0);
        for (int64_t i = start, end = min(start + NUMBERS_OF_A_RUN, size); i < end; i += LANES) {
            vector depth = depth_of(load_or_nothing(x + i, size - i), temperature, peak), weight = exponential(depth);
            total += weight;
            moment += weight * depth;
        }
        *all_weights += sum_of(total);
        *all_moments += sum_of(moment);
    }
}

/* Enters a number among the highest `wanted`, of which `found` are there, best first: returns how many there are
 * then. Of equals the one that came first stays first. */
INLINED int64_t insert(float own, int64_t id, int64_t found, int64_t wanted, float *numbers, int64_t *ids) {
    int64_t place = found < wanted ? found++ : wanted - 1;
    for (; place > 0 && numbers[place - 1] < own; place--)
        numbers[place] = numbers[place - 1], ids[place] = ids[place - 1];
    numbers[place] = own, ids[place] = id;
    return found;
}

/* The `wanted` tokens of the highest rank, or as many as there are; returns their number. So many chunks have a peak
 * of at least the lowest of the `wanted` highest peaks, so a token below that is none of them: few chunks are looked
 * into. */
INLINED int64_t select(
    const ranking *r, const float *x, int64_t size, const float *peaks, int64_t wanted, float *ranks, int64_t *ids) {
    int64_t chunks = (size + CHUNK - 1) / CHUNK, found = 0;
    for (int64_t i = 0; i < chunks; i++)
        if (found < wanted || peaks[i] > ranks[wanted - 1]) found = insert(peaks[i], i, found, wanted, ranks, ids);
    float least = found == wanted ? ranks[wanted - 1] : -INFINITY;
    found = 0;
    for (int64_t start = 0; start < size; start += CHUNK) {
        if (!(*peaks++ >= least)) continue;
        for (int64_t at = start, end = min(start + CHUNK, size); at < end; at += LANES) {
            vector group = rank(r, load_or_nothing(x + at, size - at));
            for (int64_t i = 0; i < min(LANES, end - at); i++)
                if (found < wanted ? group[i] >= least && group[i] > -INFINITY : group[i] > ranks[wanted - 1])
                    found = insert(group[i], at + i, found, wanted, ranks, ids);
        }
    }
    return found;
}

static void draw_row(const request *r, const answer *a, int64_t row, float *x, float *scratch) {
    const spec *q = r->specs + row;
    int64_t size = r->vocabulary, first_seen = r->seen_starts[row], ids[MOST_TOKENS], *id = a->token_ids + row;
    float *peaks = scratch, ranks[MOST_TOKENS];
    int64_t was_finite = is_finite(x, size);
    penalize(x, r->seen + first_seen, r->seen_starts[row + 1] - first_seen, q->penalty, scratch);
    for (int64_t i = r->moved_starts[row]; i < r->moved_starts[row + 1]; i++) x[r->moved[i]] += r->moves[i];
    for (int64_t i = 0; i < r->num_banned; i++) x[r->banned[i]] = -INFINITY;

    ranking likely = {LIKELY};
    float highest = find_peaks(&likely, x, size, peaks);
    a->is_good[row] = was_finite && fabsf(highest) < (float)q->limit;
    a->is_decided[row] = *id = 0;
    if (!a->is_good[row]) return;
    int64_t wanted = min(size, q->kind == GREEDY ? 1 : MOST_TOKENS);
    if (q->kind == GREEDY) {
        select(&likely, x, size, peaks, wanted, ranks, ids);
        *id = ids[0], a->is_decided[row] = 1;
        return;
    }
    prefix found;
    row_weight all = {0};
    float temperature = q->temperature, peak = highest / temperature;
    if (q->kind == TYPICAL || needs_sums(q)) sum_weights(x, size, temperature, peak, &all.total, &all.moment);
    ranking typical = {TYPICAL, temperature, peak, all.moment / all.total};
    const ranking *by = q->kind == TYPICAL ? &typical : &likely;
    if (q->kind == TYPICAL) find_peaks(by, x, size, peaks);
    int64_t count = select(by, x, size, peaks, wanted, ranks, ids), is_whole = count < wanted || wanted == size;
    fill(&found, q, peak, count, ids, x);
    a->is_decided[row] = (q->kind == TYPICAL ? draw_from_typical : draw_from_likely)(&found, q, &all, is_whole, id);
}

static int64_t are_within(const int64_t *ids, int64_t count, int64_t vocabulary) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary) return 0;
    return 1;
}

/* The logits [num_rows, vocabulary] have penalties and bans applied afterwards. The scratch [num_threads,
 * scratch_size] has room for a number for each id that a row has seen, and for one for each chunk. Returns 0, and
 * does nothing, where an id is none of the vocabulary. */
int64_t draw(
    const request *r, const answer *a, float *logits, int64_t num_threads, float *scratch, int64_t scratch_size) {
    if (!are_within(r->seen, r->seen_starts[r->num_rows], r->vocabulary)) return 0;
    if (!are_within(r->moved, r->moved_starts[r->num_rows], r->vocabulary)) return 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t row = 0; row < r->num_rows; row++)
        draw_row(r, a, row, logits + row * r->vocabulary, scratch + omp_get_thread_num() * scratch_size);
    return 1;
}
