// A linear layer, and what follows its product: the same for every instruction set.
#pragma once

#include "vector.h"

// Of rows of T: float32 or, as uint16_t, bfloat16.
template <typename T>
struct LinearOf {
    const T* weight;      // in panels (kernels/panels.py), zeros behind the last output
    const float* bias;    // of whole panels, zeros behind the last output and where there is none
    int inputs, outputs;  // of bfloat16 even; a multiple of 16
};

// What is done with a row of sums: out = norm(sum + residual) or, if `added` is set, norm(sum) + residual.
template <typename T>
struct FinishOf {
    const T* residual;        // [tokens, outputs] or null
    const float* weight;      // of the norm, float32 [outputs]; null: none
    const float* bias;        // or null
    float eps;
    int centred;              // LayerNorm, else RMSNorm
    int64_t residual_stride;  // elements from one token to the next
    int added;
};

typedef LinearOf<uint16_t> Linear;
typedef FinishOf<uint16_t> Finish;

// A layer in 8-bit integers (linear8.h).
struct Linear8 {
    const int8_t* weight;  // packed: [panels][inputs / 4][64][4], zeros behind the last output
    const float* step;     // this and the others [panels * 64], zeros behind the last output
    const float* sum;
    const float* bias;
    int inputs, outputs;  // multiples of 16
};

extern "C" {

// out [tokens, outputs] = activation(x · weightᵀ + bias); with `finish`, no activation, and the residual and norm it
// names. Strides in elements. `level` as `carpool_cpu_level` has it: below AVX512 panels of float32 are 16 columns wide,
// else 64; `int8` is multiplied in tiles from level AMX on. bfloat16 rows only from level AVX512_BF16 on; `amx`: of
// weights in tiles. Returned is what `in_memory` does.
int carpool_linear_f32(const LinearOf<float>* l, int activation, const FinishOf<float>* f, const float* x,
                       int64_t x_stride, int tokens, float* out, int64_t out_stride, int level);
int carpool_linear_bf16(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                        int tokens, uint16_t* out, int64_t out_stride);
int carpool_linear_amx(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                       int tokens, uint16_t* out, int64_t out_stride);
int carpool_linear_int8_f32(const Linear8* l, int activation, const FinishOf<float>* f, const float* x,
                            int64_t x_stride, int tokens, float* out, int64_t out_stride, int level);
int carpool_linear_int8_bf16(const Linear8* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                             int tokens, uint16_t* out, int64_t out_stride, int level);
}

namespace {

// GELU's polynomial below, its highest power first.
constexpr float GELU_OF[11] = {0.0014751065f, -0.0040094021f, 0.0047304527f, -0.0067765213f,
                               0.013521816f,  -0.021856056f,  0.030395293f,  -0.040530052f,
                               0.053233486f,  -0.073669322f,  0.14874836f};

template <Activation A>
FOR_BF16 inline __m512 active(__m512 x) {
    if (A != GELU) return (__m512)activated<A>((vec)x);
    // x times (1/2 + x p(x²)), with p fitted so that it is within 6e-6 everywhere, of |x| < 3 within 1e-3 relative, and
    // exact from 4.75 on: as near as bfloat16 can tell. It takes two thirds of what a power and a reciprocal do.
    constexpr float END = 4.75f;
    const __m512 above = _mm512_max_ps(_mm512_set1_ps(-END), x);  // in this order NaN stays
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(END), above);
    const __m512 v = _mm512_fmsub_ps(_mm512_mul_ps(t, t), _mm512_set1_ps(2 / (END * END)), _mm512_set1_ps(1.0f));
    __m512 p = _mm512_set1_ps(GELU_OF[0]);
#pragma GCC unroll 10
    for (int i = 1; i < 11; i++) p = _mm512_fmadd_ps(p, v, _mm512_set1_ps(GELU_OF[i]));
    return _mm512_mul_ps(above, _mm512_fmadd_ps(t, p, _mm512_set1_ps(0.5f)));
}

// For what stays float32: as `gelu_`, with AVX-512's power, and its reciprocal made exact by a step of Newton's.
FOR_AVX512 inline __m512 gelu_finely(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), magnitude = _mm512_abs_ps(x);
    const __m512 z = _mm512_mul_ps(magnitude, _mm512_set1_ps(0.70710678f));
    const __m512 whole = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one);
    __m512 t = _mm512_rcp14_ps(whole);
    t = _mm512_fmadd_ps(t, _mm512_fnmadd_ps(whole, t, one), t);
    __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
    const __m512 power = exp2_finely(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), power);
    return _mm512_fnmadd_ps(magnitude, tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

template <typename V>
FOR_BF16 inline void round_to(uint16_t* to, V x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
template <typename V>
INLINE void round_to(float* to, V x) {
    store(to, x);
}

// Into a row of T: as exact as such a row can tell.
template <Activation A>
FOR_AVX512 inline void put_active(float* to, __m512 x) {
    store(to, A == GELU ? (vec)gelu_finely(x) : activated<A>((vec)x));
}
template <Activation A>
FOR_BF16 inline void put_active(uint16_t* to, __m512 x) {
    round_to(to, active<A>(x));
}

// What `each` makes of W of a row's floats, from the i-th on, summed over the row. Four sums: one would wait for the
// one before it.
template <int W, typename Each>
INLINE float sum_of_row(int width, Each each) {
    floats<W> some[4] = {};
    int i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) some[n] += each(i + n * W);
    for (; i < width; i += W) some[0] += each(i);
    return sum((some[0] + some[1]) + (some[2] + some[3]));
}

// Rows of sums, [count][stride] float32, into rows of T, through registers of W floats.
template <int W, typename T>
INLINE void finish_rows(const FinishOf<T>& f, float* sums, int64_t stride, int width, int start, int count, T* out,
                        int64_t out_stride) {
    for (int t = 0; t < count; t++) {
        float* sum_of = sums + t * stride;
        T* to = out + (start + t) * out_stride;
        const T* residual = f.residual ? f.residual + (start + t) * f.residual_stride : nullptr;
        const auto added = [&](int i) __attribute__((always_inline)) {
            floats<W> x = load<W>(sum_of + i);
            if (!residual || f.added) return x;
            x += load<W>(residual + i);
            store(sum_of + i, x);
            return x;
        };
        const float total = sum_of_row<W>(width, added), mean = f.weight && f.centred ? total / width : 0.0f;
        const auto squared = [&](int i) __attribute__((always_inline)) {
            const floats<W> x = load<W>(sum_of + i) - mean;
            return x * x;
        };
        const float scale = f.weight ? 1.0f / std::sqrt(sum_of_row<W>(width, squared) / width + f.eps) : 1.0f;
        for (int i = 0; i < width; i += W) {
            floats<W> y = (load<W>(sum_of + i) - mean) * scale;
            if (f.weight) y *= load<W>(f.weight + i);
            if (f.bias) y += load<W>(f.bias + i);
            if (residual && f.added) y += load<W>(residual + i);
            round_to(to + i, y);
        }
    }
}

}  // namespace
