#include "attention.h"

/* See `attend_rows_of_step`. */
void attend(const step *s, scalar *qkv, stored *cache, scalar *out) {
    team all = {0};
#pragma omp parallel num_threads(s->num_threads)
    attend_rows_of_step(&all, s, qkv, cache, out);
}
