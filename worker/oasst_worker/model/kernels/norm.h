/* Layer norm, statistics in fp32: (x - mean) / sqrt(variance + epsilon) * weight + bias. */
#pragma once
#include "scalars.h"
#include "team.h"

typedef struct {
    const float *weight, *bias; /* [size] */
} norm;

/* Number i of a row is summed in lane i % LANES, first to last, then the lanes as a tree. */
static void normalize_row(const norm *n, int64_t size, float epsilon, const scalar *x, scalar *out) {
    int64_t whole = size / LANES * LANES;
    vector sum = spread(0), squares = spread(0);
    for (int64_t i = 0; i < size; i += LANES) sum += load_some(x + i, size - i);
    float mean = sum_of(sum) / size;
    for (int64_t i = 0; i < whole; i += LANES) {
        vector distance = load(x + i) - mean;
        squares += distance * distance;
    }
    for (int64_t i = whole; i < size; i++) squares[i - whole] += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    float scale = 1.0f / sqrtf(sum_of(squares) / size + epsilon);
    for (int64_t i = 0; i < whole; i += LANES) {
        vector weight = *(const loose_vector *)(n->weight + i), bias = *(const loose_vector *)(n->bias + i);
        store(out + i, (load(x + i) - mean) * scale * weight + bias);
    }
    for (int64_t i = whole; i < size; i++) out[i] = narrow((widen(x[i]) - mean) * scale * n->weight[i] + n->bias[i]);
}

/* By the whole team: x and out [rows, size]. */
static void normalize(
    team *all, const norm *n, int64_t rows, int64_t size, float epsilon, const scalar *x, scalar *out) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) normalize_row(n, size, epsilon, x + row * size, out + row * size);
    meet(all);
}
