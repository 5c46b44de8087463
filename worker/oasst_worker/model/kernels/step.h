/* The rows of a step, sequence under sequence. */
#pragma once
#include <stdint.h>

/* The rows [first_row, first_row + num_rows) are the positions from `start` of one sequence, whose blocks are
 * blocks[first_block], blocks[first_block + 1] ... */
typedef struct {
    int64_t first_row, num_rows, start, first_block;
} span;

typedef struct {
    int64_t num_rows, num_tasks, num_threads;
    int64_t heads, head_dim, rotary_dim;
    int64_t scratch_size;      /* Floats of one row: a head's query, the longest sequence rounded up to BLOCK. */
    const float *cos, *sin;    /* [max_positions, rotary_dim] */
    const int64_t *positions;  /* [num_rows], in the sequence */
    const int64_t *cells;      /* [num_rows], block * BLOCK + offset: where each row's key and value go */
    const span *spans;
    const int64_t *blocks;
    const int64_t *task_spans; /* [num_tasks], a task takes the rows [task_rows, + TILE) of its span */
    const int64_t *task_rows;
    float *scratch;            /* [num_threads, 2 * QUERIES, scratch_size] */
} step;
