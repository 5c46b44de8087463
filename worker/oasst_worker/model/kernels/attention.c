#include "attention.h"

/* See `attend_rows_of_step`. */
void attend(const step *s, scalar *qkv, scalar *cache, scalar *out) {
#pragma omp parallel num_threads(s->num_threads)
    attend_rows_of_step(s, qkv, cache, out);
}
