/* A linear layer: out = activation(x @ weight.T + bias) + residuals. WEIGHTS are FP32, BF16 or INT8.
 *
 * Every output is one sum over the inputs, in an order that depends on the kind of weights and the processor alone:
 *
 *   vectors  first to last in runs of RUN words, whose sums join the total
 *   tiles    in steps of 16 words, first to last
 *
 * then come the bias, the activation, the residuals, all in fp32. So a row's bits depend neither on the rows beside it
 * nor on the number of threads.
 *
 * The weight lies in panels of PANEL outputs, [words, PANEL] each, the last one filled up with zeros: what the inner
 * loop reads stands in the order it reads it.
 *
 * int8: weight = value * scale of its output. Each row is scaled by its own largest input: x = (byte - 128) * scale of
 * the row. The sum of bytes * values is exact, and 128 * (sum of the output's values), the offset, is taken from it.
 */
#pragma once
#include "activations.h"
#include "scalars.h"
#include "tiles.h"

#define PANEL (2 * LANES)
#ifdef __AVX512F__
#define GROUP 12 /* Rows that share a panel's loads: as many as there are registers for their sums. */
#else
#define GROUP 6
#endif
#define LARGEST_GROUP (GROUP > TILE_GROUP ? GROUP : TILE_GROUP)
#define PASS 192 /* Rows that pass over a panel while it lies in the cache. */
#define PANELS_OF_A_TASK 4
#define RUN (256 / INPUTS_OF_A_WORD) /* Words summed by themselves before they join: that much less is rounded away. */

typedef struct {
    int64_t inputs, outputs;
    int64_t words; /* Of a row: inputs / INPUTS_OF_A_WORD, and for bf16 and int8 rounded up to 16. */
    int64_t activation;
    const word *panels;
    const float *bias;   /* These three: of each output, filled up to whole panels. The bias may be NULL. */
    const float *scales; /* int8 only. */
    const word *offsets; /* int8 only. */
} linear;

/* A step's rows as words, and what turns their sums into numbers again. */
typedef struct {
    const word *words;   /* [rows, words] */
    const float *scales; /* [rows], int8 only. */
} operand;

#if WEIGHTS == INT8
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* The row's scale; a row that holds an infinity or a NaN gets a NaN, and so do all its outputs. */
static float quantize(const linear *l, const scalar *x, uint8_t *quantized) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: added to a small number it rounds it, to even, into its last bits. */
    vector highest = spread(0), nothing = spread(0);
    for (int64_t i = 0; i < l->inputs; i += LANES) {
        vector part = load_some(x + i, l->inputs - i), size = (vector)((int_vector)part & INT32_MAX);
        highest = choose(size > highest, size, highest);
        nothing += part * 0.0f;
    }
    float peak = highest_of(highest), scale = peak < 1e-30f ? 1.0f : peak / 127.0f;
    for (int64_t i = 0; i < l->inputs; i += LANES) {
        int_vector whole = (int_vector)(load_some(x + i, l->inputs - i) / scale + shift) + 128;
        *(bytes *)(quantized + i) = __builtin_convertvector(whole & 0xff, bytes);
    }
    return scale + sum_of(nothing);
}
#endif

/* By the whole team: x [rows, inputs] as words. The scratch holds (words + 1) words of each row, then some to spare. */
static operand into_words(const linear *l, int64_t rows, const scalar *x, word *scratch) {
#if WEIGHTS == INT8
    float *scales = (float *)(scratch + rows * l->words);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        scales[row] = quantize(l, x + row * l->inputs, (uint8_t *)(scratch + row * l->words));
    return (operand){scratch, scales};
#else
    if (l->inputs == l->words * INPUTS_OF_A_WORD) return (operand){(const word *)x, NULL};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        char *to = (char *)(scratch + row * l->words);
        int64_t size = l->inputs * sizeof(scalar);
        memcpy(to, x + row * l->inputs, size);
        memset(to + size, 0, l->words * sizeof(word) - size);
    }
    return (operand){scratch, NULL};
#endif
}

/* Up to GROUP rows against one panel. Meanwhile the processor fetches what lies `ahead` bytes behind it. */
INLINED void multiply(
    int rows, int64_t num_words, const word *x, const word *panel, int64_t ahead, word *out) {
    sums totals[GROUP * 2] = {0};
    for (int64_t start = 0; start < num_words; start += RUN) {
        int64_t end = min(start + RUN, num_words);
        sums parts[GROUP * 2];
        UNROLLED for (int i = 0; i < rows * 2; i++) parts[i] = (sums){0};
        for (int64_t i = start; i < end; i++) {
            int_vector low = *(const words *)(panel + i * PANEL), high = *(const words *)(panel + i * PANEL + LANES);
            __builtin_prefetch((const char *)(panel + i * PANEL) + ahead, 0, 2);
            UNROLLED for (int row = 0; row < rows; row++) {
                word input = x[row * num_words + i];
                parts[2 * row] = accumulate(parts[2 * row], input, low);
                parts[2 * row + 1] = accumulate(parts[2 * row + 1], input, high);
            }
        }
        UNROLLED for (int i = 0; i < rows * 2; i++) totals[i] += parts[i];
    }
    memcpy(out, totals, rows * PANEL * sizeof(word));
}

static void multiply_rows(
    int64_t rows, int64_t num_words, const word *x, const word *panel, int64_t ahead, word *out) {
#define CASE(n) case n: multiply(n, num_words, x, panel, ahead, out); break;
    if (has_tiles)
        multiply_tiles(rows, num_words, x, panel, ahead, out);
    else
        switch (rows) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if GROUP > 6
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
#undef CASE
}

/* The sums of one row become its outputs from `output` on, as many as a vector holds. */
INLINED void finish(
    const linear *l, sums total, const operand *x, const scalar *residuals[2], scalar *out, int64_t row,
    int64_t output) {
    int64_t size = l->outputs - output, at = row * l->outputs + output;
#if WEIGHTS == INT8
    vector value = __builtin_convertvector(total - *(const words *)(l->offsets + output), vector);
    value *= x->scales[row] * *(const loose_vector *)(l->scales + output);
#else
    vector value = total;
#endif
    if (l->bias) value += *(const loose_vector *)(l->bias + output);
    value = activate(l->activation, value);
    for (int i = 0; i < 2; i++)
        if (residuals[i]) value += load_some(residuals[i] + at, size);
    store_some(out + at, value, size);
}

/* The rows [row, row + size) against one panel. */
static void multiply_panel(
    const linear *l, const operand *x, int64_t row, int64_t size, int64_t panel, int64_t ahead,
    const scalar *residuals[2], scalar *out) {
    word totals[LARGEST_GROUP * PANEL] __attribute__((aligned(64)));
    multiply_rows(size, l->words, x->words + row * l->words, l->panels + panel * l->words * PANEL, ahead, totals);
    for (int64_t i = 0; i < size; i++)
        for (int64_t half = 0; half < PANEL; half += LANES)
            if (panel * PANEL + half < l->outputs)
                finish(l, *(sums *)(totals + i * PANEL + half), x, residuals, out, row + i, panel * PANEL + half);
}

/* By the whole team. x [rows, inputs]; out and the residuals, which may be NULL, [rows, outputs]. */
static void apply_linear(
    const linear *l, int64_t rows, const scalar *x, word *scratch, const scalar *first, const scalar *second,
    scalar *out) {
    const scalar *residuals[2] = {first, second};
    operand operands = into_words(l, rows, x, scratch);
    int64_t panels = (l->outputs + PANEL - 1) / PANEL, group = has_tiles ? TILE_GROUP : GROUP;
    int64_t tasks = (panels + PANELS_OF_A_TASK - 1) / PANELS_OF_A_TASK, passes = (rows + PASS - 1) / PASS;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks * passes; task++) {
        int64_t from = task / tasks * PASS, size = min(rows - from, PASS);
        int64_t first_panel = task % tasks * PANELS_OF_A_TASK, end = min(first_panel + PANELS_OF_A_TASK, panels);
        /* Groups of nearly the same size: a small rest would leave registers idle. */
        int64_t groups = (size + group - 1) / group;
        for (int64_t panel = first_panel; panel < end; panel++)
            for (int64_t i = 0; i < groups; i++) {
                int64_t row = from + size * i / groups, next = from + size * (i + 1) / groups;
                /* The last group fetches ahead: the others still need the cache for themselves. */
                int64_t ahead = i + 1 < groups || panel + 1 == end ? 0 : l->words * PANEL * (int64_t)sizeof(word);
                multiply_panel(l, &operands, row, next - row, panel, ahead, residuals, out);
            }
    }
    release_tiles();
}
