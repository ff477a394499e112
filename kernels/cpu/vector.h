// What the native kernels share: vectors of 16 floats, bfloat16, and the instruction sets that a function may be
// compiled for. The same source serves AVX2 and AVX-512: a function marked INLINE takes the set of whoever calls it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define FOR_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

namespace {

enum Level { NONE, AVX2, AVX512, AVX512_BF16 };

constexpr int LANES = 16;  // floats in a 512-bit register

typedef float vec __attribute__((vector_size(64), aligned(4)));  // on AVX2 the compiler makes two registers of each
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));  // 16 bfloat16

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline uint16_t narrow(float x) {  // to bfloat16, to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = narrow(x); }

// Memory that grows to the largest a thread has needed and is then reused; a cache line's alignment.
template <typename T>
T* scratch(std::vector<T>& held, size_t count) {
    if (held.size() < count + 64) held.resize(count + 64);
    auto address = reinterpret_cast<uintptr_t>(held.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

INLINE vec splat(float x) { return vec{} + x; }

INLINE vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, 64);
    return v;
}
INLINE vec load(const uint16_t* p) {
    hvec h;
    std::memcpy(&h, p, 32);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
}

INLINE void store(float* to, vec x) { std::memcpy(to, &x, 64); }
INLINE void store(uint16_t* to, vec x) {  // as `narrow`
    ivec bits = (ivec)x;
    ivec rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    ivec nan = x != x;
    hvec h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), hvec);
    std::memcpy(to, &h, 32);
}

// e^x for x <= 0, to about 1e-7 relative; below -87 it is 0. Cephes' polynomial after Cody and Waite's
// reduction.
INLINE vec exp_(vec x) {
    ivec tiny = x < splat(-87.0f);
    vec clamped = (vec)((ivec)x & ~tiny);
    vec n = clamped * 1.44269504f;
    vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = n + rounder;
    vec whole = shifted - rounder;
    vec r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = ((ivec)shifted - (ivec)rounder + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~tiny);
}

// 2^x; below -126 it stays there, and NaN stays NaN. To 3e-6, relative: little beside rounding to bfloat16.
FOR_BF16 inline __m512 exp2_(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    __m512 p = _mm512_set1_ps(0.013534168f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0520114612f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.241442756f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693003835f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);  // times 2^floor(x)
}

INLINE vec abs_(vec x) { return (vec)((ivec)x & 0x7fffffff); }

INLINE float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

INLINE float largest(vec v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// ── activations ────────────────────────────────────────────────────────────────────────────────────────────────────

enum Activation { IDENTITY, GELU, GELU_TANH, SILU };

// 1 / (1 + e^-x), without overflow on either side.
INLINE vec sigmoid_(vec x) {
    vec e = exp_(-abs_(x));
    vec numerator = (vec)(((ivec)e & (x < 0)) | ((ivec)splat(1.0f) & ~(x < 0)));
    return numerator / (1.0f + e);
}

// x times the normal distribution at x. erfc by Abramowitz and Stegun's 7.1.26, to 1.5e-7: in float32 that is as near
// as 1 + erf comes.
INLINE vec gelu_(vec x) {
    vec z = abs_(x) * 0.70710678f;
    vec t = 1.0f / (1.0f + z * 0.3275911f);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = p * t * exp_(-z * z) * 0.5f;  // the distribution at -|x|
    return (x > 0 ? x : vec{}) - abs_(x) * tail;
}

INLINE vec gelu_tanh_(vec x) { return x * sigmoid_(1.59576912f * (x + 0.044715f * x * x * x)); }

template <Activation A>
INLINE vec activated(vec x) {
    return A == GELU ? gelu_(x) : A == GELU_TANH ? gelu_tanh_(x) : A == SILU ? x * sigmoid_(x) : x;
}

}  // namespace
