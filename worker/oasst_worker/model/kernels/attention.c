/* Attention of one layer over a paged KV cache, all sequences of a step in one parallel region.
 *
 * What a row gets depends on its own query and the keys and values up to its own position, and on nothing else: not
 * on the rows beside it, not on how its sequence was cut into chunks, not on where its blocks lie, not on the number
 * of threads. Every sum below has one order, written down here:
 *
 *   score(p)  over the head's dimensions, first to last
 *   softmax   position p in lane p % LANES, first to last, then the lanes as a tree
 *   output    over positions, first to last
 *
 * Grouping rows only shares loads. A position that a row may not see has weight 0 and adds nothing.
 *
 * The cache of a layer is [blocks, 2, heads, piece] (see `cache.h`): keys of a block lie by dimension, [head_dim,
 * BLOCK], so that a vector holds positions; values lie by position, [BLOCK, padded], so that a vector holds
 * dimensions. `padded` is head_dim rounded up to 16.
 *
 * ROWS_BF16 makes the kernel for bfloat16 tensors; sums are fp32 in both.
 */
#include "cache.h"
#include "step.h"
#include "team.h"

/* BLOCK, QUERIES and TILE are defined by whoever compiles this: positions of a block; rows of a prompt that share
 * loads, or blocks of one row's keys that are scored at once; rows of a prompt that one task takes. */
#define WIDE (BLOCK / LANES) /* Vectors that hold 16 numbers. */
_Static_assert(BLOCK == 16 && QUERIES == 4, "blend and attend are written out for these");
#if defined(__AVX512F__) && (defined(ROWS_BF16) || defined(KV_INT8))
#define MOST_QUERIES (2 * QUERIES) /* Numbers are widened as they are loaded, and there are registers for more rows. */
#else
#define MOST_QUERIES QUERIES
#endif

/* Rotates the halves of one head's first `rotary_dim` dimensions against each other. */
static void rotate(scalar *x, const float *cos, const float *sin, int64_t rotary_dim) {
    int64_t half = rotary_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float low = widen(x[i]), high = widen(x[i + half]);
        x[i] = narrow(low * cos[i] - high * sin[i]);
        x[i + half] = narrow(high * cos[i + half] + low * sin[i + half]);
    }
}

/* One row's head: query and key rotated, key and value in the cache. */
static void enter(const step *s, scalar *qkv, stored *cache, int64_t row, int64_t head, int64_t padded) {
    int64_t width = s->heads * s->head_dim, piece = size_of_piece(padded);
    scalar *query = qkv + row * 3 * width + head * s->head_dim, *key = query + width, *value = key + width;
    const float *cos = s->cos + s->positions[row] * s->rotary_dim, *sin = s->sin + s->positions[row] * s->rotary_dim;
    int64_t block = s->cells[row] / BLOCK, offset = s->cells[row] % BLOCK;
    stored *keys = cache + (block * 2 * s->heads + head) * piece, *values = keys + s->heads * piece;
    rotate(query, cos, sin, s->rotary_dim);
    rotate(key, cos, sin, s->rotary_dim);
    put(keys, offset, key, s->head_dim, offset, BLOCK);
    put(values, offset, value, s->head_dim, offset * padded, 1);
    memset(values + SCALES + offset * padded + s->head_dim, 0, (padded - s->head_dim) * sizeof(stored));
}

/* What one row reads of its head, a piece of a block after the other: keys, values, then the next head's keys. */
INLINED const stored *find_piece(
    const step *s, const stored *cache, const int64_t *blocks, int64_t num_blocks, int64_t head, int64_t size,
    int64_t number) {
    int64_t side = (number >= num_blocks) + (number >= 2 * num_blocks);
    int64_t block = blocks[min(number - side * num_blocks, num_blocks - 1)];
    return cache + ((2 * block + (side == 1)) * s->heads + head + (side == 2)) * size;
}

/* Scores of `rows` queries against `blocks` blocks of keys; scores[row] is where the first block's go. Meanwhile the
 * processor fetches the pieces `next`, as many, unless that is NULL. */
INLINED void score(
    int rows, int blocks, float *const scores[], const float *const queries[], const stored *const keys[],
    const stored *const next[], int64_t head_dim, float scale) {
    vector sums[MOST_QUERIES * WIDE];
    UNROLLED for (int i = 0; i < rows * blocks * WIDE; i++) sums[i] = spread(0);
    for (int64_t i = 0; i < head_dim; i++)
        UNROLLED for (int block = 0; block < blocks; block++) {
            if (next && begins_line(i * BLOCK)) __builtin_prefetch(next[block] + SCALES + i * BLOCK);
            UNROLLED for (int v = 0; v < WIDE; v++) {
                vector key = load_stored(keys[block] + SCALES + i * BLOCK + v * LANES);
                UNROLLED for (int row = 0; row < rows; row++)
                    sums[(row * blocks + block) * WIDE + v] += queries[row][i] * key;
            }
        }
    UNROLLED for (int row = 0; row < rows; row++)
        UNROLLED for (int v = 0; v < blocks * WIDE; v++) {
            vector sum = sums[row * blocks * WIDE + v] * scale;
#ifdef KV_INT8
            sum *= *(const loose_vector *)((const float *)keys[v / WIDE] + v % WIDE * LANES);
#endif
            *(loose_vector *)(scores[row] + v * LANES) = sum;
        }
}

/* The same of one query, against all its keys. */
INLINED void score_one(
    const step *s, const stored *cache, const int64_t *blocks, int64_t num_blocks, int64_t head, int64_t size,
    const float *query, float *scores, float scale) {
    const stored *pieces[2 * QUERIES];
    for (int64_t block = 0; block < num_blocks; block += QUERIES, scores += QUERIES * BLOCK) {
        int64_t group = min(num_blocks - block, QUERIES);
        for (int64_t i = 0; i < 2 * group; i++) {
            int64_t number = block + (i < group ? i : QUERIES + i - group);
            pieces[i] = find_piece(s, cache, blocks, num_blocks, head, size, number);
        }
#define CASE(n) case n: score(1, n, &scores, &query, pieces, pieces + n, s->head_dim, scale); break;
        switch (group) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
    }
}

/* Scores become weights that sum to 1 over the positions [0, length), and 0 from there to `end`, a multiple of
 * BLOCK. */
static void soften(float *scores, int64_t length, int64_t end) {
    int64_t own_end = (length + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t p = length; p < own_end; p++) scores[p] = -INFINITY;
    vector highest = spread(-INFINITY), total = spread(0);
    for (int64_t p = 0; p < own_end; p += LANES) {
        vector x = *(loose_vector *)(scores + p);
        highest = choose(x > highest, x, highest);
    }
    float peak = highest_of(highest);
    for (int64_t p = 0; p < own_end; p += LANES) {
        vector weights = exponential(*(loose_vector *)(scores + p) - peak);
        total += weights;
        *(loose_vector *)(scores + p) = weights;
    }
    float share = 1.0f / sum_of(total);
    for (int64_t p = 0; p < own_end; p += LANES) *(loose_vector *)(scores + p) *= share;
    memset(scores + own_end, 0, (end - own_end) * sizeof(float));
}

/* `rows` rows' weighted sums of the values of positions [0, length): 16 * `parts` dimensions from `first` on. For a
 * single row the processor fetches what it reads QUERIES blocks later. */
INLINED void blend(
    int rows, int parts, const step *s, const stored *cache, const int64_t *blocks, int64_t length,
    float *const weights[], scalar *const outputs[], int64_t first, int64_t head, int64_t padded) {
    int64_t piece = size_of_piece(padded), num_blocks = (length + BLOCK - 1) / BLOCK;
    vector sums[MOST_QUERIES * WIDE];
    UNROLLED for (int i = 0; i < rows * parts * WIDE; i++) sums[i] = spread(0);
    for (int64_t block = 0; block < num_blocks; block++) {
        int64_t number = num_blocks + block, p = block * BLOCK, end = min(length - p, BLOCK);
        const stored *held = find_piece(s, cache, blocks, num_blocks, head, piece, number);
        const stored *values = held + SCALES + first;
        const stored *next = find_piece(s, cache, blocks, num_blocks, head, piece, number + QUERIES) + SCALES + first;
        const float *shares[MOST_QUERIES];
#ifdef KV_INT8
        float scaled[MOST_QUERIES][BLOCK];
        UNROLLED for (int row = 0; row < rows; row++) {
            UNROLLED for (int v = 0; v < WIDE; v++)
                *(loose_vector *)(scaled[row] + v * LANES) = *(loose_vector *)(weights[row] + p + v * LANES) *
                                                             *(const loose_vector *)((const float *)held + v * LANES);
            shares[row] = scaled[row];
        }
#else
        UNROLLED for (int row = 0; row < rows; row++) shares[row] = weights[row] + p;
#endif
        for (int64_t i = 0; i < end; i++)
            UNROLLED for (int v = 0; v < parts * WIDE; v++) {
                if (rows == 1 && begins_line(v * LANES)) __builtin_prefetch(next + i * padded + v * LANES);
                vector value = load_stored(values + i * padded + v * LANES);
                UNROLLED for (int row = 0; row < rows; row++)
                    sums[row * parts * WIDE + v] += shares[row][i] * value;
            }
    }
    int64_t size = min(s->head_dim - first, 16 * parts);
    for (int row = 0; row < rows; row++)
        for (int64_t i = 0; i < size; i++)
            outputs[row][first + i] = narrow(((float *)(sums + row * parts * WIDE))[i]);
}

/* `rows` neighbouring rows of one head attend, the first at `position`. */
INLINED void attend_rows(
    int rows, const step *s, const scalar *qkv, const stored *cache, scalar *out, float *scratch,
    const int64_t *blocks, int64_t row, int64_t position, int64_t head, int64_t padded) {
    int64_t width = s->heads * s->head_dim, piece = size_of_piece(padded);
    int64_t length = position + rows, num_blocks = (length + BLOCK - 1) / BLOCK;
    float scale = 1.0f / sqrtf((float)s->head_dim);
    const float *queries[MOST_QUERIES];
    scalar *outputs[MOST_QUERIES];
    float *scores[MOST_QUERIES], *next[MOST_QUERIES];
    for (int i = 0; i < rows; i++) {
        float *query = scratch + i * s->scratch_size;
        queries[i] = widen_all(qkv + (row + i) * 3 * width + head * s->head_dim, s->head_dim, query);
        outputs[i] = out + (row + i) * width + head * s->head_dim;
        scores[i] = next[i] = query + s->head_dim;
    }
    if (rows == 1)
        score_one(s, cache, blocks, num_blocks, head, piece, queries[0], scores[0], scale);
    else
        for (int64_t block = 0; block < num_blocks; block++) {
            const stored *keys = find_piece(s, cache, blocks, num_blocks, head, piece, block);
            score(rows, 1, next, queries, &keys, NULL, s->head_dim, scale);
            for (int i = 0; i < rows; i++) next[i] += BLOCK;
        }
    for (int i = 0; i < rows; i++) soften(scores[i], position + i + 1, num_blocks * BLOCK);
    int64_t first = 0;
    if (rows == 1)
        for (; first + 16 * QUERIES <= padded; first += 16 * QUERIES)
            blend(1, QUERIES, s, cache, blocks, length, scores, outputs, first, head, padded);
    for (; first < padded; first += 16)
        blend(rows, 1, s, cache, blocks, length, scores, outputs, first, head, padded);
}

static void attend_tile(
    const step *s, const scalar *qkv, const stored *cache, scalar *out, float *scratch, int64_t task, int64_t head,
    int64_t padded) {
    const span *own = s->spans + s->task_spans[task];
    const int64_t *blocks = s->blocks + own->first_block;
    int64_t i = s->task_rows[task], end = min(i + TILE, own->num_rows);
#define ATTEND(n) \
    for (; i + n <= end; i += n) \
        attend_rows(n, s, qkv, cache, out, scratch, blocks, own->first_row + i, own->start + i, head, padded);
    ATTEND(MOST_QUERIES) ATTEND(QUERIES) ATTEND(1)
#undef ATTEND
}

/* By the whole team: qkv [num_rows, 3, heads, head_dim] is rotated in place, its keys and values enter the layer's
 * cache, and every row attends to the positions up to its own: out [num_rows, heads, head_dim]. */
void attend_rows_of_step(team *all, const step *s, scalar *qkv, void *cache, scalar *out) {
    int64_t padded = (s->head_dim + 15) / 16 * 16;
    float *scratch = s->scratch + omp_get_thread_num() * 2 * QUERIES * s->scratch_size;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s->num_rows * s->heads; i++) enter(s, qkv, cache, i / s->heads, i % s->heads, padded);
    meet(all);
#pragma omp for schedule(dynamic, 2) nowait
    for (int64_t i = 0; i < s->num_tasks * s->heads; i++)
        attend_tile(s, qkv, cache, out, scratch, i / s->heads, i % s->heads, padded);
    meet(all);
}

/* See `attend_rows_of_step`. */
void attend(const step *s, scalar *qkv, stored *cache, scalar *out) {
    team all = {0};
#pragma omp parallel num_threads(s->num_threads)
    attend_rows_of_step(&all, s, qkv, cache, out);
}
