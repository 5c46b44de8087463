/* The threads of a parallel region, who meet between two parts of it. */
#pragma once
#include "meeting.h"
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

typedef meeting team;

/* By each thread of the team: returns when all have called it. */
static inline void meet(team *t) {
    int turn = arrive(t, omp_get_num_threads());
    while (!has_turned(t, turn)) continue;
}
