// Linear layers in 8-bit integers: how rows become integers, the same for every instruction set.
//
//     x ≈ low + height q    q uint8 [tokens, inputs]; low, height of a token: its smallest x, a 255th of its range
//     W = step V            V int8 [outputs, inputs]; step of an output
//     x Wᵀ = height (q Vᵀ) step + low sum    sum = step Σ V of an output; q Vᵀ exact in int32
//
// A token's integers and sums are its own: who rides beside it changes no bit of them.
#pragma once

#include "linear.h"

namespace {

constexpr int GROUP = 4;  // inputs that one lane multiplies at a time

// What rounding made of a tile's tokens.
struct Levels {
    uint8_t* of;    // [tokens][inputs]
    float* height;  // what one level is worth, [tokens]
    float* low;     // what level 0 is, [tokens]
};

FOR_AVX512 inline __m512 wide(const float* p) { return _mm512_loadu_ps(p); }
FOR_AVX512 inline __m512 wide(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// A token's row to levels. Where a number or the range is not finite its height is NaN, and so is all that comes of it:
// some level is NaN then, of which the conversion makes a negative integer, and no level of another row is negative.
template <typename T>
FOR_AVX512 void level(const T* x, int inputs, uint8_t* to, float* height, float* low) {
    __m512 smallest = _mm512_set1_ps(std::numeric_limits<float>::infinity()), largest = -smallest;
    __m512i seen = _mm512_setzero_si512();  // bits that are set in any level
    for (int i = 0; i < inputs; i += LANES) {
        const __m512 v = wide(x + i);
        smallest = _mm512_min_ps(smallest, v);
        largest = _mm512_max_ps(largest, v);
    }
    *low = _mm512_reduce_min_ps(smallest);
    const float step = std::max((_mm512_reduce_max_ps(largest) - *low) / 255.0f, 1e-20f);
    const __m512 base = _mm512_set1_ps(*low), factor = _mm512_set1_ps(1.0f / step);
    const auto levels = [&](int i) FOR_AVX512 {
        const __m512i own = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(wide(x + i), base), factor));
        seen = _mm512_or_si512(seen, own);
        return own;
    };
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int i = 0;
    for (; i + 4 * LANES <= inputs; i += 4 * LANES) {
        const __m512i a = _mm512_packus_epi32(levels(i), levels(i + LANES));
        const __m512i b = _mm512_packus_epi32(levels(i + 2 * LANES), levels(i + 3 * LANES));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
    }
    for (; i < inputs; i += LANES)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(levels(i)));
    *height = _mm512_movepi32_mask(seen) ? std::numeric_limits<float>::quiet_NaN() : step;
}

// What the integer sums of 16 outputs from `c` on are worth, with their bias, of a token of that height and low.
FOR_AVX512 inline __m512 worth(const Linear8& l, int c, __m512i sums, __m512 height, __m512 low) {
    const __m512 start = _mm512_fmadd_ps(low, wide(l.sum + c), wide(l.bias + c));
    return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), height), wide(l.step + c), start);
}

}  // namespace

// linear8_amx.cpp: as the functions of the C interface.
int linear8_in_tiles(const Linear8& l, int activation, const FinishOf<float>* f, const float* x, int64_t x_stride,
                     int tokens, float* out, int64_t out_stride);
int linear8_in_tiles(const Linear8& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                     uint16_t* out, int64_t out_stride);
