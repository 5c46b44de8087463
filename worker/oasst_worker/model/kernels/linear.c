/* A linear layer, fp32: out = activation(x @ weight.T + bias) + residuals.
 *
 * Every output is one sum over the inputs, first to last in runs of RUN, then the bias, the activation, the residuals.
 * So a row's bits depend neither on the rows beside it nor on the number of threads.
 *
 * The weight lies in panels of PANEL outputs, [inputs, PANEL] each, the last one filled up with zeros: what the inner
 * loop reads stands in the order it reads it.
 */
#include "vectors.h"

#define PANEL (2 * LANES)
#ifdef __AVX512F__
#define GROUP 12 /* Rows that share a panel's loads: as many as there are registers for their sums. */
#else
#define GROUP 6
#endif
#define CHUNK (16 * GROUP)  /* Rows that pass over a panel while it lies in the cache. */
#define PANELS_OF_A_TASK 4
#define RUN 256 /* Inputs that are summed by themselves before they join the total: that much less is rounded away. */

enum { NONE, GELU, GELU_TANH };

typedef struct {
    int64_t inputs, outputs;
    int64_t activation;
    const float *panels;
    const float *bias; /* or NULL */
} layer;

int64_t panel_width(void) { return PANEL; }

/* Abramowitz and Stegun 7.1.26; the absolute error is below 2e-7. */
INLINED vector error_function(vector x) {
    int_vector sign = (int_vector)x & INT32_MIN;
    vector size = (vector)((int_vector)x & INT32_MAX);
    vector t = 1.0f / (1.0f + 0.3275911f * size);
    vector sum = spread(1.061405429f);
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    vector result = 1.0f - sum * t * exponential(-(size * size));
    return (vector)((int_vector)result | sign);
}

/* x / (1 + e^-2y), which is x (1 + tanh y) / 2; e^-|2y| never overflows. */
INLINED vector half_tanh(vector x, vector y) {
    vector e = exponential((vector)((int_vector)(2.0f * y) | INT32_MIN));
    return x * choose(y < 0.0f, e, spread(1.0f)) / (1.0f + e);
}

INLINED vector activate(int64_t kind, vector x) {
    if (kind == GELU) return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    if (kind == GELU_TANH) return half_tanh(x, 0.79788456f * (x + 0.044715f * x * x * x));
    return x;
}

INLINED void finish(
    const layer *l, vector sum, float *out, const float *residuals[2], int64_t row, int64_t output) {
    float values[LANES];
    int64_t size = min(l->outputs - output, LANES), at = row * l->outputs + output;
    for (int64_t i = 0; l->bias && i < size; i++) sum[i] += l->bias[output + i];
    *(loose_vector *)values = activate(l->activation, sum);
    for (int r = 0; r < 2; r++)
        for (int64_t i = 0; residuals[r] && i < size; i++) values[i] += residuals[r][at + i];
    for (int64_t i = 0; i < size; i++) out[at + i] = values[i];
}

/* `rows` rows against one panel. Meanwhile the processor fetches what lies `ahead` bytes behind it: the next panel. */
INLINED void multiply(
    int rows, const layer *l, const float *x, const float *panel, int64_t ahead, float *out, const float *residuals[2],
    int64_t row, int64_t output) {
    vector totals[GROUP * 2];
    for (int i = 0; i < rows * 2; i++) totals[i] = spread(0);
    x += row * l->inputs;
    for (int64_t start = 0; start < l->inputs; start += RUN) {
        int64_t end = min(start + RUN, l->inputs);
        vector sums[GROUP * 2];
        UNROLLED for (int i = 0; i < rows * 2; i++) sums[i] = spread(0);
        for (int64_t i = start; i < end; i++) {
            vector low = *(const loose_vector *)(panel + i * PANEL);
            vector high = *(const loose_vector *)(panel + i * PANEL + LANES);
            __builtin_prefetch((const char *)(panel + i * PANEL) + ahead, 0, 2);
            UNROLLED for (int r = 0; r < rows; r++) {
                sums[2 * r] += x[r * l->inputs + i] * low;
                sums[2 * r + 1] += x[r * l->inputs + i] * high;
            }
        }
        UNROLLED for (int i = 0; i < rows * 2; i++) totals[i] += sums[i];
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            if (output + half * LANES < l->outputs)
                finish(l, totals[2 * r + half], out, residuals, row + r, output + half * LANES);
}

static void multiply_rows(
    int64_t rows, const layer *l, const float *x, const float *panel, int64_t ahead, float *out,
    const float *residuals[2], int64_t row, int64_t output) {
#define CASE(n) \
    case n: multiply(n, l, x, panel, ahead, out, residuals, row, output); break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if GROUP > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* x [rows, inputs]; out and the residuals, which may be NULL, [rows, outputs]. */
void apply(
    const layer *l, int64_t num_threads, int64_t rows, const float *x, const float *first, const float *second,
    float *out) {
    const float *residuals[2] = {first, second};
    int64_t panels = (l->outputs + PANEL - 1) / PANEL;
    int64_t tasks = (panels + PANELS_OF_A_TASK - 1) / PANELS_OF_A_TASK, chunks = (rows + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t task = 0; task < tasks * chunks; task++) {
        int64_t from = task / tasks * CHUNK, size = min(rows - from, CHUNK);
        int64_t first_panel = task % tasks * PANELS_OF_A_TASK, end = min(first_panel + PANELS_OF_A_TASK, panels);
        /* Groups of nearly the same size: a small rest would leave registers idle. */
        int64_t groups = (size + GROUP - 1) / GROUP;
        for (int64_t panel = first_panel; panel < end; panel++)
            for (int64_t group = 0; group < groups; group++) {
                int64_t row = from + size * group / groups, next = from + size * (group + 1) / groups;
                /* The last group fetches ahead: the others still need the cache for themselves. */
                int64_t ahead = group + 1 < groups || panel + 1 == end ? 0 : l->inputs * PANEL * (int64_t)sizeof(float);
                multiply_rows(
                    next - row, l, x, l->panels + panel * l->inputs * PANEL, ahead, out, residuals, row,
                    panel * PANEL);
            }
    }
}
