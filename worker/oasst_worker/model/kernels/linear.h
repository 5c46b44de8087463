/* A linear layer: out = activation(x @ weight.T + bias) + residuals. WEIGHTS are FP32, BF16 or INT8.
 *
 * Every output is one sum over the inputs, in an order that depends on the kind of weights and the processor alone:
 *
 *   vectors  first to last in runs of WORDS_OF_A_RUN, whose sums join the total
 *   tiles    in steps of 16 words, first to last
 *
 * then come the bias, the activation, the residuals, all in fp32. So a row's bits depend neither on the rows beside
 * it nor on the number of threads.
 *
 * The weight lies in panels of PANEL outputs, [words, PANEL] each, the last one filled up with zeros: what the inner
 * loop reads stands in the order it reads it.
 *
 * int8: weight = value * scale of its output. Each row is scaled by its own largest input: x = (byte - 128) * scale
 * of the row. The sum of bytes * values is exact, and 128 * (sum of the output's values), the offset, is taken from
 * it.
 */
#pragma once
#include "activations.h"
#include "scalars.h"
#include "team.h"
#include "tiles.h"

#define VECTORS 2 /* Of a panel. */
#define PANEL (VECTORS * LANES)
#ifdef __AVX512F__
#define SUMS 24 /* Vectors of sums that there are registers for: of 12 rows by one panel, or of 6 by two ... */
#define PANELS_AT_ONCE 2
#else
#define SUMS 12 /* ... or of 6 by one. */
#define PANELS_AT_ONCE 1
#endif
#define PASS 192 /* Rows that pass over a run of a panel while it lies in the cache. */
#define PANELS_OF_A_TASK 4
#define WORDS_OF_A_RUN (256 / INPUTS_OF_A_WORD) /* Summed by themselves, then joined: less is rounded away. */
#define AHEAD 2048 /* Words: how far before its use a run is fetched that nobody passes over twice. */

typedef struct {
    int64_t inputs, outputs;
    int64_t num_words; /* Of a row: inputs / INPUTS_OF_A_WORD, and for bf16 and int8 rounded up to 16. */
    int64_t activation;
    int64_t gives_floats; /* The outputs are, rounded as scalars. */
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

/* Returns the row's scale; where that is NaN all its outputs will be. */
static float quantize(const linear *l, const scalar *x, uint8_t *quantized) {
    float scale = scale_of(x, l->inputs);
    for (int64_t i = 0; i < l->inputs; i += LANES) {
        int_vector whole = to_whole(load_some(x + i, l->inputs - i) / scale) + 128;
        *(bytes *)(quantized + i) = __builtin_convertvector(whole & 0xff, bytes);
    }
    return scale;
}
#endif

/* By the whole team: x [rows, inputs] as words. The scratch holds (num_words + 1) words of each row, then some to
 * spare. */
static operand into_words(team *all, const linear *l, int64_t rows, const scalar *x, word *scratch) {
#if WEIGHTS == INT8
    float *scales = (float *)(scratch + rows * l->num_words);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
        scales[row] = quantize(l, x + row * l->inputs, (uint8_t *)(scratch + row * l->num_words));
    meet(all);
    return (operand){scratch, scales};
#else
    if (l->inputs == l->num_words * INPUTS_OF_A_WORD) return (operand){(const word *)x, NULL};
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) {
        char *to = (char *)(scratch + row * l->num_words);
        int64_t size = l->inputs * sizeof(scalar);
        memcpy(to, x + row * l->inputs, size);
        memset(to + size, 0, l->num_words * sizeof(word) - size);
    }
    meet(all);
    return (operand){scratch, NULL};
#endif
}

/* `rows` rows against a run of `panels` neighbouring panels: the sums join the totals, [rows, panels * PANEL].
 * Meanwhile the processor fetches from `next` on, every `stride` bytes, in each panel. */
INLINED void multiply(
    int rows, int panels, int64_t num_words, int64_t all_words, const word *x, const word *run, const word *next,
    int64_t stride, word *totals) {
    int width = VECTORS * panels;
    sum_vector parts[SUMS];
    UNROLLED for (int i = 0; i < rows * width; i++) parts[i] = (sum_vector){0};
    for (int64_t i = 0; i < num_words; i++) {
        int_vector weights[VECTORS * PANELS_AT_ONCE];
        UNROLLED for (int p = 0; p < panels; p++) {
            UNROLLED for (int v = 0; v < VECTORS; v++)
                weights[p * VECTORS + v] = *(const word_vector *)(run + (p * all_words + i) * PANEL + v * LANES);
            __builtin_prefetch((const char *)(next + p * all_words * PANEL) + i * stride, 0, 2);
        }
        UNROLLED for (int row = 0; row < rows; row++) {
            word input = x[row * all_words + i];
            UNROLLED for (int v = 0; v < width; v++)
                parts[row * width + v] = accumulate(parts[row * width + v], input, weights[v]);
        }
    }
    UNROLLED for (int i = 0; i < rows * width; i++) *(sum_vector *)(totals + i * LANES) += parts[i];
}

static void multiply_rows(
    int64_t rows, int64_t panels, int64_t num_words, int64_t all_words, const word *x, const word *run,
    const word *next, int64_t stride, word *totals) {
#define CASE(r, p) case 16 * p + r: multiply(r, p, num_words, all_words, x, run, next, stride, totals); break;
    switch (16 * panels + rows) {
        CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1)
#if PANELS_AT_ONCE == 2
        CASE(7, 1) CASE(8, 1) CASE(9, 1) CASE(10, 1) CASE(11, 1) CASE(12, 1)
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
#endif
    }
#undef CASE
}

/* Groups of nearly the same size: a small rest would leave registers idle. */
INLINED int64_t start_of_group(int64_t i, int64_t groups, int64_t size) { return size * i / groups; }

/* `size` rows against `num_panels` neighbouring panels: the totals. All rows pass over a run before the next one,
 * which they fetch in equal shares. */
static void sum_by_vectors(
    const linear *l, const word *x, int64_t size, int64_t panel, int64_t num_panels, word *totals) {
    int64_t width = num_panels * PANEL, group = SUMS / VECTORS / num_panels, groups = (size + group - 1) / group;
    int64_t stride = PANEL * (int64_t)sizeof(word) / groups;
    memset(totals, 0, size * width * sizeof(word));
    for (int64_t start = 0, end; start < l->num_words; start = end) {
        end = min(start + WORDS_OF_A_RUN, l->num_words);
        const word *run = l->panels + (panel * l->num_words + start) * PANEL;
        int64_t next_run = end < l->num_words ? panel * l->num_words + end : (panel + num_panels) * l->num_words;
        const word *next = groups == 1 ? run + AHEAD : l->panels + next_run * PANEL;
        for (int64_t i = 0; i < groups; i++) {
            int64_t from = start_of_group(i, groups, size), to = start_of_group(i + 1, groups, size);
            multiply_rows(
                to - from, num_panels, end - start, l->num_words, x + from * l->num_words + start, run,
                next + i * stride * (end - start) / (int64_t)sizeof(word), stride, totals + from * width);
        }
    }
}

/* The same by tiles, one panel. The last rows fetch what lies `ahead` bytes behind it: the others still need the
 * cache for themselves. */
static void sum_by_tiles(
    const linear *l, const word *x, int64_t size, int64_t panel, int64_t ahead, word *totals) {
    int64_t groups = (size + TILE_GROUP - 1) / TILE_GROUP;
    for (int64_t i = 0; i < groups; i++) {
        int64_t from = start_of_group(i, groups, size), to = start_of_group(i + 1, groups, size);
        multiply_tiles(
            to - from, l->num_words, x + from * l->num_words, l->panels + panel * l->num_words * PANEL,
            i + 1 < groups ? 0 : ahead, totals + from * PANEL);
    }
}

/* The sums of one row become its outputs from `output` on, as many as a vector holds. */
INLINED void finish(
    const linear *l, sum_vector total, const operand *x, const scalar *residuals[2], void *out, int64_t row,
    int64_t output) {
    int64_t size = l->outputs - output, at = row * l->outputs + output;
#if WEIGHTS == INT8
    vector value = __builtin_convertvector(total - *(const word_vector *)(l->offsets + output), vector);
    value *= x->scales[row] * *(const loose_vector *)(l->scales + output);
#else
    vector value = total;
#endif
    if (l->bias) value += *(const loose_vector *)(l->bias + output);
    value = activate(l->activation, value);
    for (int i = 0; i < 2; i++)
        if (residuals[i]) value += load_some(residuals[i] + at, size);
    if (l->gives_floats)
        store_rounded((float *)out + at, value, size);
    else
        store_some((scalar *)out + at, value, size);
}

/* The rows [row, row + size) against the panels [panel, end), which are PANELS_AT_ONCE at most. */
static void multiply_panels(
    const linear *l, const operand *x, int64_t row, int64_t size, int64_t panel, int64_t end, int64_t ahead,
    const scalar *residuals[2], void *out) {
    word totals[PASS * PANELS_AT_ONCE * PANEL] __attribute__((aligned(64)));
    const word *words = x->words + row * l->num_words;
    int64_t width = (end - panel) * PANEL, output = panel * PANEL;
    if (has_tiles)
        sum_by_tiles(l, words, size, panel, ahead, totals);
    else
        sum_by_vectors(l, words, size, panel, end - panel, totals);
    for (int64_t i = 0; i < size; i++)
        for (int64_t at = 0; at < width && output + at < l->outputs; at += LANES)
            finish(l, *(sum_vector *)(totals + i * width + at), x, residuals, out, row + i, output + at);
}

/* By the whole team. x [rows, inputs]; out and the residuals, which may be NULL, [rows, outputs]. */
static void apply_linear(
    team *all, const linear *l, int64_t rows, const scalar *x, word *scratch, const scalar *first,
    const scalar *second, void *out) {
    const scalar *residuals[2] = {first, second};
    operand operands = into_words(all, l, rows, x, scratch);
    int64_t panels = (l->outputs + PANEL - 1) / PANEL, panel_bytes = l->num_words * PANEL * (int64_t)sizeof(word);
    int64_t tasks = (panels + PANELS_OF_A_TASK - 1) / PANELS_OF_A_TASK, passes = (rows + PASS - 1) / PASS;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tasks * passes; task++) {
        int64_t from = task / tasks * PASS, size = min(rows - from, PASS);
        int64_t first_panel = task % tasks * PANELS_OF_A_TASK, end = min(first_panel + PANELS_OF_A_TASK, panels);
        /* Two panels at once load less for a product, but few rows would use half of the registers. */
        int64_t at_once = has_tiles || size <= SUMS / VECTORS ? 1 : PANELS_AT_ONCE;
        for (int64_t panel = first_panel; panel < end; panel += at_once)
            multiply_panels(
                l, &operands, from, size, panel, min(panel + at_once, end), panel + 1 < end ? panel_bytes : 0,
                residuals, out);
    }
    release_tiles();
    meet(all);
}
