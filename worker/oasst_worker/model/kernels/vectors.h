/* Vectors as wide as the processor's, and the functions the kernels share. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define UNROLLED _Pragma("GCC unroll 16")
#define INLINED static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t int_vector __attribute__((vector_size(4 * LANES)));

INLINED int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

INLINED vector spread(float x) { return x - (vector){0}; }

INLINED vector choose(int_vector mask, vector yes, vector no) {
    return (vector)(((int_vector)yes & mask) | ((int_vector)no & ~mask));
}

/* e^x for x <= 0; 0 far below. x = n ln 2 + r, e^r by its Taylor series up to r^7 (|r| <= ln 2 / 2: 1 ulp or so). */
INLINED vector exponential(vector x) {
    const vector lowest = spread(-87.0f);
    int_vector is_nothing = x < lowest;
    x = choose(is_nothing, lowest, x);
    int_vector whole = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, int_vector);
    vector n = __builtin_convertvector(whole, vector);
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector e = spread(1.98412698e-4f);
    e = e * r + 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return choose(is_nothing, spread(0), e * (vector)((whole + 127) << 23));
}

INLINED float sum_of(vector x) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) x[lane] += x[lane + width];
    return x[0];
}

INLINED float highest_of(vector x) {
    for (int lane = 1; lane < LANES; lane++) x[0] = x[lane] > x[0] ? x[lane] : x[0];
    return x[0];
}

