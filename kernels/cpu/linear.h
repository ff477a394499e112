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

// What is done with a row of sums: out = norm(sum + residual).
template <typename T>
struct FinishOf {
    const T* residual;        // [tokens, outputs] or null
    const float* weight;      // of the norm, float32 [outputs]; null: none
    const float* bias;        // or null
    float eps;
    int centred;              // LayerNorm, else RMSNorm
    int64_t residual_stride;  // elements from one token to the next
};

typedef LinearOf<uint16_t> Linear;
typedef FinishOf<uint16_t> Finish;

// A layer in 8-bit integers (linear8.cpp).
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
// else 64. bfloat16 rows only from level AVX512_BF16 on; `amx`: of weights in tiles. Returned is what `in_memory` does.
int carpool_linear_f32(const LinearOf<float>* l, int activation, const FinishOf<float>* f, const float* x,
                       int64_t x_stride, int tokens, float* out, int64_t out_stride, int level);
int carpool_linear_bf16(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                        int tokens, uint16_t* out, int64_t out_stride);
int carpool_linear_amx(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                       int tokens, uint16_t* out, int64_t out_stride);
int carpool_linear_int8_f32(const Linear8* l, int activation, const FinishOf<float>* f, const float* x,
                            int64_t x_stride, int tokens, float* out, int64_t out_stride);
int carpool_linear_int8_bf16(const Linear8* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                             int tokens, uint16_t* out, int64_t out_stride);
}

namespace {

template <Activation A>
FOR_BF16 inline __m512 active(__m512 x) {
    if (A != GELU) return (__m512)activated<A>((vec)x);
    // As `gelu_`, with the reciprocal and the power that AVX-512 has: as exact as bfloat16 can tell, in half the time.
    const __m512 one = _mm512_set1_ps(1.0f), magnitude = _mm512_abs_ps(x);
    const __m512 z = _mm512_mul_ps(magnitude, _mm512_set1_ps(0.70710678f));
    const __m512 whole = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one);
    const __m512 t = _mm512_rcp14_ps(whole);
    __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.5f * 0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
    const __m512 power = exp2_(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), power);
    return _mm512_fnmadd_ps(magnitude, tail, _mm512_max_ps(_mm512_setzero_ps(), x));
}

// The same for what stays float32: the reciprocal is made exact by a step of Newton's.
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

// Rows of sums, [count][stride] float32, into rows of T, through registers of W floats.
template <int W, typename T>
INLINE void finish_rows(const FinishOf<T>& f, float* sums, int64_t stride, int width, int start, int count, T* out,
                        int64_t out_stride) {
    for (int t = 0; t < count; t++) {
        float* sum_of = sums + t * stride;
        T* to = out + (start + t) * out_stride;
        const T* residual = f.residual ? f.residual + (start + t) * f.residual_stride : nullptr;
        floats<W> total = {}, squares = {};
        for (int i = 0; i < width; i += W) {
            floats<W> x = load<W>(sum_of + i);
            if (residual) x += load<W>(residual + i);
            store(sum_of + i, x);
            total += x;
        }
        const float mean = f.weight && f.centred ? sum(total) / width : 0.0f;
        float scale = 1.0f;
        if (f.weight) {
            for (int i = 0; i < width; i += W) {
                const floats<W> x = load<W>(sum_of + i) - mean;
                squares += x * x;
            }
            scale = 1.0f / std::sqrt(sum(squares) / width + f.eps);
        }
        for (int i = 0; i < width; i += W) {
            floats<W> y = (load<W>(sum_of + i) - mean) * scale;
            if (f.weight) y *= load<W>(f.weight + i);
            if (f.bias) y += load<W>(f.bias + i);
            round_to(to + i, y);
        }
    }
}

}  // namespace
