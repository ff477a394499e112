// What attention in bfloat16 has in common, with AVX-512 BF16 and on AMX: the lanes of a register are queries, up to 32 of
// them, so a softmax runs down its lane and nothing is ever summed across one.
#pragma once

#include "attention.h"
#include "transpose.h"

namespace {

constexpr int QUERIES = 2 * LANES;  // of a block: floats from one key's scores to the next key's

// The `count` queries of one head of keys from row `first` on: their places in the sequence, rising, those of `lanes` lanes
// that have none as the last one's; and where their rows of query and out begin.
INLINE void find_rows(const Shape& s, int past, int first, int count, int lanes, int32_t* places, int64_t* from,
                      int64_t* to) {
    const int group = s.heads / s.kv_heads, size = s.head_size;
    for (int i = 0, token = first / group, head = first % group; i < count; i++) {
        places[i] = past + token, from[i] = token * s.q_stride + head * size, to[i] = token * s.o_stride + head * size;
        if (++head == group) head = 0, token++;
    }
    std::fill(places + count, places + lanes, places[count - 1]);
}

// Which of 16 queries, by their places, see key j.
FOR_BF16 inline __mmask16 who_sees(const Shape& s, int j, int length, __m512i query) {
    __mmask16 sees = j < length ? 0xffff : 0;
    if (s.causal) sees &= _mm512_cmpge_epi32_mask(query, _mm512_set1_epi32(j));
    if (s.window) sees &= _mm512_cmplt_epi32_mask(query, _mm512_set1_epi32(j + s.window));
    if (s.window) sees &= _mm512_cmpgt_epi32_mask(query, _mm512_set1_epi32(j - s.window));
    return sees;
}

// 16 products, scaled and capped.
FOR_BF16 inline __m512 capped(const Shape& s, __m512 x) {
    const vec wide = (vec)x * (s.scale / s.softcap);
    const vec e = exp_(-2.0f * abs_(wide));
    const vec tanh = (1.0f - e) / (1.0f + e);
    return (__m512)((ivec)(tanh * s.softcap) | ((ivec)wide & int32_t(0x80000000)));
}

// 16 scores of key j, capped ones or products, biased: those of the first `count` of 16 queries in a row, the first of
// them at `place`.
FOR_BF16 inline __m512 biased(const Shape& s, __m512 x, int j, int place, int count) {
    // In the table they stand the other way round, the last query's first.
    const __mmask16 there = 0xffff << (LANES - std::min(count, LANES));
    const __m512i turned = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 bias = _mm512_maskz_loadu_ps(there, s.bias.table + s.bias.middle + j - place - (LANES - 1));
    const __m512 scale = _mm512_set1_ps(s.scale_before_bias());
    return _mm512_fmadd_ps(x, scale, _mm512_permutexvar_ps(turned, bias));
}

// What is left to do to scores: from those to powers of two.
FOR_BF16 inline __m512 power(const Shape& s) { return _mm512_set1_ps(s.left_to_scale() * 1.44269504f); }

// Results [size][QUERIES] of 16 lanes, times what each is still to be multiplied by, to the rows `to` of the first `count`.
FOR_BF16 inline void put_lanes(const float* result, __m512 factor, int size, int count, const int64_t* to, uint16_t* o) {
    for (int d = 0; d < size; d += LANES) {
        ivec r[LANES];
        for (int i = 0; i < LANES; i++)
            r[i] = (ivec)_mm512_mul_ps(_mm512_loadu_ps(result + (d + i) * QUERIES), factor);
        transpose(r);
        for (int i = 0; i < std::min(LANES, count); i++)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(o + to[i] + d), (__m256i)_mm512_cvtneps_pbh((__m512)r[i]));
    }
}

}  // namespace
