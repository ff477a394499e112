// Linear layers for x86-64 CPUs: in float32 with AVX2 or AVX-512, in bfloat16 with AVX-512 BF16, chosen at run time. The
// torch twins are in kernels/twins_cpu.py, the Python face is kernels/native_linear.py. Plain C ABI, single-threaded, as
// attention.cpp.
//
// Weights lie in panels of as many outputs as a block of sums is wide, in bfloat16 their inputs in pairs
// (kernels/panels.py): read in the order they lie in. A tile is as many tokens as fit into half of the second-level
// cache with their sums: they pass through all that follows the product (residual, norm) before the next tile begins.
// What is summed is float32; nothing between the product and the norm is rounded.
#include "linear.h"

#define APART __attribute__((noinline))  // inlined, its sums lose registers to the constants of what follows

namespace {

constexpr int ROWS = 6;           // tokens a block
constexpr int CACHE = 384 << 10;  // bytes a tile may take: panels pass through the same cache

// A type and a level: what its rows are made of, how many floats a register has and how many of those a panel is wide,
// how a block of sums [ROWS][COLUMNS] comes about (ROWS rows times a panel's weights, on top of its bias), and how sums
// go to rows. ROWS x WIDE sums, WIDE registers of weights and one of tokens have to fit into the registers there are.

// Sums of PIECE products are added up on their own: of thousands, one after the other, rounding would be what remains.
constexpr int PIECE = 256;

template <int W, int WIDE>
INLINE void multiply_f32(const float* const* rows, const float* weight, int inputs, const float* bias, float* to,
                         int64_t stride) {
    for (int begin = 0; begin < inputs; begin += PIECE) {
        floats<W> acc[ROWS][WIDE] = {};
        for (int i = begin; i < std::min(begin + PIECE, inputs); i++, weight += WIDE * W) {
            floats<W> b[WIDE];
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) b[w] = load<W>(weight + w * W);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; w++) acc[r][w] += b[w] * rows[r][i];
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) {
                float* sum = to + r * stride + w * W;
                store(sum, load<W>(begin ? sum : bias + w * W) + acc[r][w]);
            }
    }
}

struct Float32Avx512 {
    typedef float Element;
    static constexpr int W = 16, COLUMNS = 4 * W;

    static FOR_AVX512 APART void multiply(const float* const* rows, const float* weight, int inputs, const float* bias,
                                          float* to, int64_t stride) {
        multiply_f32<W, 4>(rows, weight, inputs, bias, to, stride);
    }

    template <Activation A>
    static FOR_AVX512 inline void put_active(float* to, const float* from) {
        const __m512 x = _mm512_loadu_ps(from);
        round_to(to, A == GELU ? (vec)gelu_finely(x) : activated<A>((vec)x));
    }
};

struct Float32Avx2 {
    typedef float Element;
    static constexpr int W = 8, COLUMNS = 2 * W;

    static FOR_AVX2 APART void multiply(const float* const* rows, const float* weight, int inputs, const float* bias,
                                        float* to, int64_t stride) {
        multiply_f32<W, 2>(rows, weight, inputs, bias, to, stride);
    }

    template <Activation A>
    static FOR_AVX2 inline void put_active(float* to, const float* from) {
        round_to(to, activated<A>(load<W>(from)));
    }
};

struct Bfloat16 {
    typedef uint16_t Element;
    static constexpr int W = LANES, WIDE = 4, COLUMNS = WIDE * W;

    static FOR_BF16 APART void multiply(const uint16_t* const* rows, const uint16_t* weight, int inputs,
                                        const float* bias, float* to, int64_t stride) {
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

    template <Activation A>
    static FOR_BF16 inline void put_active(uint16_t* to, const float* from) {
        round_to(to, active<A>(_mm512_loadu_ps(from)));
    }
};

template <typename P>
using Row = typename P::Element;

template <typename P>
inline int padded(const LinearOf<Row<P>>& l) {
    return round_up(l.outputs, P::COLUMNS);
}

template <typename P>
inline const Row<P>* panel(const LinearOf<Row<P>>& l, int column) {
    return l.weight + int64_t(column) * l.inputs;
}

// ROWS tokens' rows from `x` on; the last one again where there are no more than `count`.
template <typename T>
inline void point_at(const T** rows, const T* x, int64_t stride, int count) {
    for (int r = 0; r < ROWS; r++) rows[r] = x + std::min(r, count - 1) * stride;
}

// sums [round_up(count, ROWS), padded(l)] = x · weightᵀ + bias, of x [count, l.inputs].
template <typename P>
INLINE void add_up(const LinearOf<Row<P>>& l, const Row<P>* x, int64_t x_stride, int count, float* sums) {
    const int64_t stride = padded<P>(l);
    for (int column = 0; column < l.outputs; column += P::COLUMNS)
        for (int t = 0; t < count; t += ROWS) {
            const Row<P>* rows[ROWS];
            point_at(rows, x + t * x_stride, x_stride, count - t);
            P::multiply(rows, panel<P>(l, column), l.inputs, l.bias + column, sums + t * stride + column, stride);
        }
}

// out [count, outputs] = activation(x · weightᵀ + bias).
template <typename P, Activation A>
INLINE void apply(const LinearOf<Row<P>>& l, const Row<P>* x, int64_t x_stride, int count, Row<P>* out,
                  int64_t stride) {
    alignas(64) float sums[ROWS * P::COLUMNS];
    for (int column = 0; column < l.outputs; column += P::COLUMNS) {
        const int width = std::min(P::COLUMNS, l.outputs - column);
        for (int t = 0; t < count; t += ROWS) {
            const Row<P>* rows[ROWS];
            point_at(rows, x + t * x_stride, x_stride, count - t);
            P::multiply(rows, panel<P>(l, column), l.inputs, l.bias + column, sums, P::COLUMNS);
            for (int r = 0; r < std::min(ROWS, count - t); r++)
                for (int c = 0; c < width; c += P::W)
                    P::template put_active<A>(out + (t + r) * stride + column + c, sums + r * P::COLUMNS + c);
        }
    }
}

// Tokens a tile, of which each takes so many bytes; whole blocks.
inline int tile_of(int64_t bytes) { return std::max<int64_t>(CACHE / bytes, ROWS) / ROWS * ROWS; }

template <typename P>
INLINE void linear(const LinearOf<Row<P>>& l, int activation, const FinishOf<Row<P>>* f, const Row<P>* x,
                   int64_t x_stride, int tokens, Row<P>* out, int64_t out_stride) {
    static thread_local std::vector<float> held;
    const int tile = tile_of(int64_t(l.inputs) * sizeof(Row<P>) + (f ? padded<P>(l) * 4 : 0));
    for (int t = 0; t < tokens; t += tile) {
        const int count = std::min(tile, tokens - t);
        const Row<P>* from = x + t * x_stride;
        Row<P>* to = out + t * out_stride;
        if (f) {
            float* sums = scratch(held, size_t(tile) * padded<P>(l));
            add_up<P>(l, from, x_stride, count, sums);
            finish_rows<P::W>(*f, sums, padded<P>(l), l.outputs, t, count, out, out_stride);
        } else if (activation == GELU) {
            apply<P, GELU>(l, from, x_stride, count, to, out_stride);
        } else if (activation == GELU_TANH) {
            apply<P, GELU_TANH>(l, from, x_stride, count, to, out_stride);
        } else if (activation == SILU) {
            apply<P, SILU>(l, from, x_stride, count, to, out_stride);
        } else {
            apply<P, IDENTITY>(l, from, x_stride, count, to, out_stride);
        }
    }
}

FOR_AVX512 void in_f32_avx512(const LinearOf<float>& l, int activation, const FinishOf<float>* f, const float* x,
                              int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    linear<Float32Avx512>(l, activation, f, x, x_stride, tokens, out, out_stride);
}
FOR_AVX2 void in_f32_avx2(const LinearOf<float>& l, int activation, const FinishOf<float>* f, const float* x,
                          int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    linear<Float32Avx2>(l, activation, f, x, x_stride, tokens, out, out_stride);
}
FOR_BF16 void in_bf16(const Linear& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                      uint16_t* out, int64_t out_stride) {
    linear<Bfloat16>(l, activation, f, x, x_stride, tokens, out, out_stride);
}

}  // namespace

extern "C" {

// out [tokens, outputs] = activation(x · weightᵀ + bias); with `finish`, no activation, and the residual and norm it
// names. Strides in elements. Panels are 64 columns wide, of float32 below level AVX512 16.
void carpool_linear_f32(const LinearOf<float>* l, int activation, const FinishOf<float>* f, const float* x,
                        int64_t x_stride, int tokens, float* out, int64_t out_stride, int level) {
    const auto kernel = level >= AVX512 ? in_f32_avx512 : in_f32_avx2;
    kernel(*l, activation, f, x, x_stride, tokens, out, out_stride);
}

// Only from level AVX512_BF16 on.
void carpool_linear_bf16(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                         int tokens, uint16_t* out, int64_t out_stride) {
    in_bf16(*l, activation, f, x, x_stride, tokens, out, out_stride);
}
}
