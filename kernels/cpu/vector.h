// What the native kernels share: vectors of floats, bfloat16, and the instruction sets that a function may be compiled
// for. The same source serves AVX2 and AVX-512: a function marked INLINE takes the set of whoever calls it, and where it
// is a template of W, the floats of a register, 8 or 16: of vectors wider than its registers the compiler makes scalars.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define FOR_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

namespace {

enum Level { NONE, AVX2, AVX512, AVX512_BF16, AMX };

constexpr int LANES = 16;  // floats in a 512-bit register

template <int W>
struct Register {
    typedef float floats __attribute__((vector_size(4 * W), aligned(4)));
    typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4)));
    typedef uint16_t halves __attribute__((vector_size(2 * W), aligned(2)));  // W bfloat16
};
template <int W>
using floats = typename Register<W>::floats;
template <int W>
using ints = typename Register<W>::ints;
template <typename V>
using ints_of = decltype(V{} < V{});

typedef floats<LANES> vec;
typedef ints<LANES> ivec;

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

// Memory that grows to the largest a thread has needed and is then reused; a cache line's alignment. Throws bad_alloc.
template <typename T>
T* scratch(std::vector<T>& held, size_t count) {
    if (held.size() < count + 64) held.resize(count + 64);
    auto address = reinterpret_cast<uintptr_t>(held.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// What a function of the C interface returns that needs such memory: 0, or 1 where there was none, and its results are
// not to be read. No exception crosses that interface.
template <typename F>
int in_memory(F compute) {
    try {
        compute();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

INLINE vec splat(float x) { return vec{} + x; }

template <int W = LANES>
INLINE floats<W> load(const float* p) {
    floats<W> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int W = LANES>
INLINE floats<W> load(const uint16_t* p) {
    typename Register<W>::halves h;
    std::memcpy(&h, p, sizeof h);
    return (floats<W>)(__builtin_convertvector(h, ints<W>) << 16);
}

template <typename V>
INLINE void store(float* to, V x) {
    std::memcpy(to, &x, sizeof x);
}
template <typename V>
INLINE void store(uint16_t* to, V x) {  // as `narrow`
    typedef ints_of<V> I;
    typedef typename Register<sizeof(V) / 4>::halves H;
    const I bits = (I)x, nan = x != x;
    const I rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
    const H h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), H);
    std::memcpy(to, &h, sizeof h);
}

// e^x for x <= 0, to about 1e-7 relative; below -87 it is 0. Cephes' polynomial after Cody and Waite's
// reduction.
template <typename V>
INLINE V exp_(V x) {
    typedef ints_of<V> I;
    const I tiny = x < V{} - 87.0f;
    const V clamped = (V)((I)x & ~tiny);
    const V n = clamped * 1.44269504f;
    const V rounder = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = n + rounder;
    const V whole = shifted - rounder;
    const V r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    V p = V{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I power = ((I)shifted - (I)rounder + 127) << 23;
    return (V)((I)(p * (V)power) & ~tiny);
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

// The same to 2e-7, for what stays float32.
FOR_AVX512 inline __m512 exp2_finely(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    __m512 p = _mm512_set1_ps(0.00187757649f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00898934054f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0558263174f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240153617f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693153073f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999999925f));
    return _mm512_scalef_ps(p, x);
}

template <typename V>
INLINE V abs_(V x) {
    return (V)((ints_of<V>)x & 0x7fffffff);
}

// 0, 1, 2, ...
template <int W>
INLINE ints<W> lanes() {
    if constexpr (W == 16)
        return ints<W>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    else
        return ints<W>{0, 1, 2, 3, 4, 5, 6, 7};
}

template <typename V>
INLINE float sum(V v) {
    constexpr int W = sizeof(V) / 4;
    for (int half = W / 2; half; half /= 2) v += __builtin_shuffle(v, lanes<W>() + half);  // counted modulo W
    return v[0];
}

template <typename V>
INLINE float largest(V v) {
    constexpr int W = sizeof(V) / 4;
    for (int half = W / 2; half; half /= 2) {
        const V other = __builtin_shuffle(v, lanes<W>() + half);
        v = other > v ? other : v;
    }
    return v[0];
}

// ── activations ────────────────────────────────────────────────────────────────────────────────────────────────────

enum Activation { IDENTITY, GELU, GELU_TANH, SILU };

// 1 / (1 + e^-x), without overflow on either side.
template <typename V>
INLINE V sigmoid_(V x) {
    typedef ints_of<V> I;
    const V e = exp_(-abs_(x));
    const V numerator = (V)(((I)e & (x < 0)) | ((I)(V{} + 1.0f) & ~(x < 0)));
    return numerator / (1.0f + e);
}

// x times the normal distribution at x. erfc by Abramowitz and Stegun's 7.1.26, to 1.5e-7: in float32 that is as near
// as 1 + erf comes.
template <typename V>
INLINE V gelu_(V x) {
    const V z = abs_(x) * 0.70710678f;
    const V t = 1.0f / (1.0f + z * 0.3275911f);
    V p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const V tail = p * t * exp_(-z * z) * 0.5f;  // the distribution at -|x|
    return (x > 0 ? x : V{}) - abs_(x) * tail;
}

template <typename V>
INLINE V gelu_tanh_(V x) {
    return x * sigmoid_(1.59576912f * (x + 0.044715f * x * x * x));
}

template <Activation A, typename V>
INLINE V activated(V x) {
    return A == GELU ? gelu_(x) : A == GELU_TANH ? gelu_tanh_(x) : A == SILU ? x * sigmoid_(x) : x;
}

}  // namespace
