/* Keys and values as the cache holds them: like the rows, or with KV_INT8 in 8 bits, those of each position and head
 * with a scale of their own (number = value * scale).
 *
 * A piece is the keys or the values of one block and head. With KV_INT8 the scales of its positions come first.
 */
#pragma once
#include "scalars.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef KV_INT8
typedef int8_t stored;
typedef int8_t stored_vector __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int16_t short_vector __attribute__((vector_size(2 * LANES)));
#define SCALES (BLOCK * (int64_t)sizeof(float)) /* What stands before the numbers, in units of them. */

INLINED vector load_stored(const stored *from) {
#ifdef __AVX512F__
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
#else
    /* By steps that are an instruction each: more at once compilers do number by number. */
    short_vector twice_as_wide = __builtin_convertvector(*(const stored_vector *)from, short_vector);
    return __builtin_convertvector(__builtin_convertvector(twice_as_wide, int_vector), vector);
#endif
}
#else
typedef scalar stored;
#define SCALES 0

INLINED vector load_stored(const stored *from) { return load(from); }
#endif

INLINED int64_t size_of_piece(int64_t padded) { return SCALES + BLOCK * padded; }

/* A line of the processor's cache is fetched at once: whether one begins at this number of a piece. */
INLINED int begins_line(int64_t number) { return number * (int64_t)sizeof(stored) % 64 == 0; }

/* The numbers of one position, to the piece's number `first` and on from there, `stride` apart. */
INLINED void put(stored *piece, int64_t position, const scalar *x, int64_t size, int64_t first, int64_t stride) {
    stored *to = piece + SCALES + first;
#ifdef KV_INT8
    float scale = scale_of(x, size);
    ((float *)piece)[position] = scale;
    for (int64_t i = 0; i < size; i += LANES) {
        int_vector whole = to_whole(load_some(x + i, size - i) / scale);
        for (int64_t lane = 0; lane < min(LANES, size - i); lane++) to[(i + lane) * stride] = (stored)whole[lane];
    }
#else
    (void)position;
    for (int64_t i = 0; i < size; i++) to[i * stride] = x[i];
#endif
}
