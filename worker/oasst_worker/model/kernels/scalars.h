/* What rows are made of: float, or bfloat16 with ROWS_BF16. Sums are fp32 in both. */
#pragma once
#include "vectors.h"

/* The bits of a bfloat16 are the upper half of a float's. */
INLINED float from_bf16(uint32_t bits) {
    float value;
    bits <<= 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#ifdef ROWS_BF16
typedef uint16_t scalar;
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINED float widen(scalar x) { return from_bf16(x); }

/* Rounded to the nearest, ties to even; a NaN stays one. */
INLINED scalar narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return (scalar)(bits >> 16 | 0x40);
    return (scalar)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINED vector load(const scalar *from) {
    return (vector)(__builtin_convertvector(*(const half_vector *)from, int_vector) << 16);
}

INLINED void store(scalar *to, vector x) {
    int_vector bits = (int_vector)x, rounded = bits + 0x7fff + (bits >> 16 & 1), is_number = x == x;
    bits = ((rounded & is_number) | ((bits | 0x400000) & ~is_number)) >> 16;
    *(half_vector *)to = __builtin_convertvector(bits, half_vector);
}
#else
typedef float scalar;

INLINED float widen(scalar x) { return x; }
INLINED scalar narrow(float x) { return x; }
INLINED vector load(const scalar *from) { return *(const loose_vector *)from; }
INLINED void store(scalar *to, vector x) { *(loose_vector *)to = x; }
#endif

/* The first `size` numbers, or as many as a vector holds; the other lanes are 0. */
INLINED vector load_some(const scalar *from, int64_t size) {
    if (size >= LANES) return load(from);
    scalar padded[LANES] = {0};
    for (int64_t i = 0; i < size; i++) padded[i] = from[i];
    return load(padded);
}

INLINED void store_some(scalar *to, vector x, int64_t size) {
    if (size >= LANES) {
        store(to, x);
        return;
    }
    scalar padded[LANES];
    store(padded, x);
    for (int64_t i = 0; i < size; i++) to[i] = padded[i];
}

/* The numbers as scalars hold them. */
INLINED vector rounded(vector x) {
    scalar held[LANES];
    store(held, x);
    return load(held);
}

/* As `store_some`, into floats. */
INLINED void store_rounded(float *to, vector x, int64_t size) {
    x = rounded(x);
    memcpy(to, &x, min(size, LANES) * sizeof(float));
}

/* `size` numbers as floats: where they lie if they are, in `scratch` otherwise. */
INLINED const float *widen_all(const scalar *from, int64_t size, float *scratch) {
#ifdef ROWS_BF16
    for (int64_t i = 0; i < size; i++) scratch[i] = widen(from[i]);
    return scratch;
#else
    return from;
#endif
}

/* What brings the largest of these numbers to 127 by division; NaN where one of them is not finite. */
INLINED float scale_of(const scalar *x, int64_t size) {
    vector highest = spread(0), nothing = spread(0);
    for (int64_t i = 0; i < size; i += LANES) {
        vector part = load_some(x + i, size - i), magnitude = (vector)((int_vector)part & INT32_MAX);
        highest = choose(magnitude > highest, magnitude, highest);
        nothing += part * 0.0f;
    }
    float peak = highest_of(highest);
    return (peak < 1e-30f ? 1.0f : peak / 127.0f) + sum_of(nothing);
}

/* Numbers of 8 bits rounded to whole ones, to even from the middle; in their last 8 bits. */
INLINED int_vector to_whole(vector x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: added to a small number it rounds it into its last bits. */
    return (int_vector)(x + shift);
}
