/* The inputs of a product, as 32-bit words that hold one fp32, two bf16 or four int8 each, and what a word adds to a
 * sum. WEIGHTS says which; a row's inputs come as the same kind of words, int8 ones with 128 added (see `quantize`
 * in linear.h).
 *
 * Integer sums are exact, so any instruction gives the same. The order within a word of bf16 is the instruction's
 * own.
 */
#pragma once
#include "vectors.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define FP32 1
#define BF16 2
#define INT8 4
#define INPUTS_OF_A_WORD WEIGHTS

typedef int32_t word;
typedef int32_t word_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#if WEIGHTS == INT8
typedef int_vector sum_vector;
#else
typedef vector sum_vector;
#endif

#if LANES == 16
#define INTRINSIC(name) _mm512_##name
typedef __m512i raw;
#elif LANES == 8
#define INTRINSIC(name) _mm256_##name
typedef __m256i raw;
#elif defined(__x86_64__)
#define INTRINSIC(name) _mm_##name
typedef __m128i raw;
#endif

INLINED int_vector repeat(word x) { return x - (int_vector){0}; }

/* sum + x * weights, one word `x` of a row against the words of as many outputs as a vector has lanes. */
INLINED sum_vector accumulate(sum_vector sum, word x, int_vector weights) {
#if WEIGHTS == FP32
    return sum + (vector)repeat(x) * (vector)weights;
#elif WEIGHTS == BF16
#if defined(__AVX512BF16__) && LANES == 16
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)repeat(x), (__m512bh)weights);
#else
    sum += (vector)repeat(x << 16) * (vector)(weights << 16);
    return sum + (vector)repeat(x & ~0xffff) * (vector)(weights & ~0xffff);
#endif
#else
#if defined(__AVX512VNNI__) && LANES == 16
    return (sum_vector)_mm512_dpbusd_epi32((raw)sum, (raw)repeat(x), (raw)weights);
#elif defined(__AVXVNNI__) && LANES == 8
    return (sum_vector)_mm256_dpbusd_avx_epi32((raw)sum, (raw)repeat(x), (raw)weights);
#elif (defined(__AVX512BW__) && LANES == 16) || (defined(__AVX2__) && LANES == 8) || (defined(__SSE2__) && LANES == 4)
    /* Pairs of 16 bits: the even bytes, then the odd ones. */
    raw even = INTRINSIC(srai_epi16)(INTRINSIC(slli_epi16)((raw)weights, 8), 8);
    raw odd = INTRINSIC(srai_epi16)((raw)weights, 8);
    sum += (sum_vector)INTRINSIC(madd_epi16)(even, (raw)repeat(x & 0xff00ff));
    return sum + (sum_vector)INTRINSIC(madd_epi16)(odd, (raw)repeat(x >> 8 & 0xff00ff));
#else
    for (int byte = 0; byte < 4; byte++) sum += (x >> 8 * byte & 0xff) * (weights << (24 - 8 * byte) >> 24);
    return sum;
#endif
#endif
}
