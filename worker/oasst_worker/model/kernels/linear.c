#include "linear.h"

/* Outputs of a panel. To be called once, before anything else. */
int64_t prepare(void) {
    ask_for_tiles();
    return PANEL;
}

/* See `apply_linear`. The scratch is [rows, words + 1] words. */
void apply(
    const linear *l, int64_t num_threads, int64_t rows, const scalar *x, word *scratch, const scalar *first,
    const scalar *second, scalar *out) {
#pragma omp parallel num_threads(num_threads)
    apply_linear(l, rows, x, scratch, first, second, out);
}
