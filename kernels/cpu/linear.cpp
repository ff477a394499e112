// Linear layers in bfloat16, for x86-64 CPUs with AVX-512 BF16. The torch twins are in kernels/twins_cpu.py, the Python
// face is kernels/native_linear.py. Plain C ABI, single-threaded, as attention.cpp.
//
// Weights lie in panels of COLUMNS outputs, their inputs in pairs (kernels/panels.py): read in the order they lie in.
// A tile is as many tokens as fit into half of the second-level cache with their sums: they pass through all that
// follows the product (residual, norm) before the next tile begins. What is multiplied is bfloat16, what is summed
// float32; nothing between the product and the norm is rounded.
#include "vector.h"

namespace {

constexpr int ROWS = 6;  // tokens a block: 6 x 4 accumulators, 4 registers of weights, one of tokens
constexpr int WIDE = 4;  // registers that a panel is wide
constexpr int COLUMNS = WIDE * LANES;
constexpr int CACHE = 384 << 10;  // bytes a tile may take: panels pass through the same cache

struct Linear {
    const uint16_t* weight;  // packed: [panels][inputs / 2][COLUMNS][2], zeros behind the last output
    const float* bias;       // [panels * COLUMNS], zeros behind the last output and where there is none
    int inputs, outputs;     // even; a multiple of 16
};

// What is done with a row of sums: out = norm(sum + residual).
struct Finish {
    const uint16_t* residual;  // [tokens, outputs] or null
    const float* weight;       // of the norm, float32 [outputs]; null: none
    const float* bias;         // or null
    float eps;
    int centred;               // LayerNorm, else RMSNorm
    int64_t residual_stride;   // elements from one token to the next
};

inline int padded(const Linear& l) { return round_up(l.outputs, COLUMNS); }

// A block of sums, [ROWS][COLUMNS] at `to`: ROWS rows of `inputs` bfloat16 times a panel's weights, on top of its bias.
FOR_BF16 void multiply(const uint16_t* const* rows, const uint16_t* weight, int inputs, const float* bias, float* to,
                       int64_t stride) {
    __m512 acc[ROWS][WIDE];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_loadu_ps(bias + w * LANES);
    for (int i = 0; i < inputs; i += 2, weight += 2 * COLUMNS) {
        __m512bh b[WIDE];
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) b[w] = (__m512bh)_mm512_loadu_si512(weight + w * 2 * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            int32_t both;
            std::memcpy(&both, rows[r] + i, 4);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_dpbf16_ps(acc[r][w], a, b[w]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; w++) _mm512_storeu_ps(to + r * stride + w * LANES, acc[r][w]);
}

// ROWS tokens' rows from `x` on; the last one again where there are no more than `count`.
inline void point_at(const uint16_t** rows, const uint16_t* x, int64_t stride, int count) {
    for (int r = 0; r < ROWS; r++) rows[r] = x + std::min(r, count - 1) * stride;
}

// sums [round_up(count, ROWS), padded(l)] = x · weightᵀ + bias, of x [count, l.inputs].
FOR_BF16 void add_up(const Linear& l, const uint16_t* x, int64_t x_stride, int count, float* sums) {
    const int64_t stride = padded(l);
    for (int column = 0; column < l.outputs; column += COLUMNS) {
        const uint16_t* weight = l.weight + int64_t(column) * l.inputs;
        for (int t = 0; t < count; t += ROWS) {
            const uint16_t* rows[ROWS];
            point_at(rows, x + t * x_stride, x_stride, count - t);
            multiply(rows, weight, l.inputs, l.bias + column, sums + t * stride + column, stride);
        }
    }
}

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

FOR_BF16 inline void round_to(uint16_t* to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// out [count, outputs] = activation(x · weightᵀ + bias).
template <Activation A>
FOR_BF16 void apply(const Linear& l, const uint16_t* x, int64_t x_stride, int count, uint16_t* out, int64_t stride) {
    alignas(64) float sums[ROWS * COLUMNS];
    for (int column = 0; column < l.outputs; column += COLUMNS) {
        const uint16_t* weight = l.weight + int64_t(column) * l.inputs;
        const int width = std::min(COLUMNS, l.outputs - column);
        for (int t = 0; t < count; t += ROWS) {
            const uint16_t* rows[ROWS];
            point_at(rows, x + t * x_stride, x_stride, count - t);
            multiply(rows, weight, l.inputs, l.bias + column, sums, COLUMNS);
            for (int r = 0; r < std::min(ROWS, count - t); r++) {
                const float* row = sums + r * COLUMNS;
                uint16_t* to = out + (t + r) * stride + column;
                for (int c = 0; c < width; c += LANES) round_to(to + c, active<A>(_mm512_load_ps(row + c)));
            }
        }
    }
}

auto apply_of(int activation) {
    return activation == GELU        ? apply<GELU>
           : activation == GELU_TANH ? apply<GELU_TANH>
           : activation == SILU      ? apply<SILU>
                                     : apply<IDENTITY>;
}

// Rows of sums, [count][stride] float32, into bfloat16 rows.
FOR_BF16 void finish(const Finish& f, float* sums, int64_t stride, int width, int start, int count, uint16_t* out,
                     int64_t out_stride) {
    for (int t = 0; t < count; t++) {
        float* sum_of = sums + t * stride;
        uint16_t* to = out + (start + t) * out_stride;
        const uint16_t* residual = f.residual ? f.residual + (start + t) * f.residual_stride : nullptr;
        vec total = {}, squares = {};
        for (int i = 0; i < width; i += LANES) {
            vec x = load(sum_of + i);
            if (residual) x += load(residual + i);
            store(sum_of + i, x);
            total += x;
        }
        const float mean = f.weight && f.centred ? (float)_mm512_reduce_add_ps((__m512)total) / width : 0.0f;
        float scale = 1.0f;
        if (f.weight) {
            for (int i = 0; i < width; i += LANES) {
                const vec x = load(sum_of + i) - mean;
                squares += x * x;
            }
            scale = 1.0f / std::sqrt(_mm512_reduce_add_ps((__m512)squares) / width + f.eps);
        }
        for (int i = 0; i < width; i += LANES) {
            vec y = (load(sum_of + i) - mean) * scale;
            if (f.weight) y *= load(f.weight + i);
            if (f.bias) y += load(f.bias + i);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh((__m512)y));
        }
    }
}

// Tokens a tile, of which each takes so many bytes; whole blocks.
inline int tile_of(int64_t bytes) { return std::max<int64_t>(CACHE / bytes, ROWS) / ROWS * ROWS; }

FOR_BF16 void linear(const Linear& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                     uint16_t* out, int64_t out_stride) {
    static thread_local std::vector<float> held;
    const int tile = tile_of(int64_t(l.inputs) * 2 + (f ? padded(l) * 4 : 0));
    for (int t = 0; t < tokens; t += tile) {
        const int count = std::min(tile, tokens - t);
        if (f) {
            float* sums = scratch(held, size_t(tile) * padded(l));
            add_up(l, x + t * x_stride, x_stride, count, sums);
            finish(*f, sums, padded(l), l.outputs, t, count, out, out_stride);
        } else {
            apply_of(activation)(l, x + t * x_stride, x_stride, count, out + t * out_stride, out_stride);
        }
    }
}

}  // namespace

extern "C" {

// out [tokens, outputs] = activation(x · weightᵀ + bias); with `finish`, no activation, and the residual and norm it
// names. Strides in elements. Only at level AVX512_BF16.
void carpool_linear_bf16(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                         int tokens, uint16_t* out, int64_t out_stride) {
    linear(*l, activation, f, x, x_stride, tokens, out, out_stride);
}
}
