/* What may follow a linear layer. */
#pragma once
#include "vectors.h"

enum { NONE, GELU, GELU_TANH };

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
