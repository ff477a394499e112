// The way of tokens through a linear layer, for kernels that multiply out of registers: linear.cpp and linear8.cpp give the
// products, each a type P of
//
//     Element, Layer   what rows are made of; weights in panels, of so many `inputs` and `outputs`
//     Tokens           rows of a tile as `multiply` reads them, `take`n from x; `bytes` of each are in cache
//     W, COLUMNS       floats of a register, and outputs of a panel
//     multiply<R>      sums [R][COLUMNS] of R tokens from the t-th on, with their bias, of the panel at a column
//     put_active<A>    W sums, through an activation, into a row
//
// A tile is as many tokens as fit into half of the second-level cache with their sums: they pass through all that follows
// the product (residual, norm) before the next tile begins. Nothing between the product and the norm is rounded.
#pragma once

#include <type_traits>

#include "linear.h"

#define APART __attribute__((noinline))  // inlined, its sums lose registers to the constants of what follows

namespace {

constexpr int ROWS = 6;           // tokens a block at most: 6 x 4 sums, 4 registers of weights, one of a token
constexpr int CACHE = 384 << 10;  // bytes a tile may take: panels pass through the same cache

// What AVX-512's products have in common.
struct Wide {
    static constexpr int W = LANES, WIDE = 4, COLUMNS = WIDE * W;

    template <Activation A>
    static FOR_AVX512 inline void put_active(float* to, const float* from) {
        ::put_active<A>(to, _mm512_loadu_ps(from));
    }
    template <Activation A>
    static FOR_BF16 inline void put_active(uint16_t* to, const float* from) {
        ::put_active<A>(to, _mm512_loadu_ps(from));
    }
};

template <typename P>
using Multiply = void (*)(const typename P::Layer&, int column, const typename P::Tokens&, int t, float* to,
                          int64_t stride);

template <typename P>
constexpr Multiply<P> MULTIPLY[ROWS + 1] = {
    nullptr,
    P::template multiply<1>,
    P::template multiply<2>,
    P::template multiply<3>,
    P::template multiply<4>,
    P::template multiply<5>,
    P::template multiply<6>,
};

// How many of the tokens that are left go into the next block: no block is much smaller than the others.
inline int block_of(int left) {
    const int blocks = (left + ROWS - 1) / ROWS;
    return (left + blocks - 1) / blocks;
}

// sums [count][stride] = x · weightᵀ + bias.
template <typename P>
INLINE void add_up(const typename P::Layer& l, const typename P::Tokens& tokens, int count, float* sums,
                   int64_t stride) {
    for (int column = 0; column < l.outputs; column += P::COLUMNS)
        for (int t = 0, block; t < count; t += block) {
            block = block_of(count - t);
            MULTIPLY<P>[block](l, column, tokens, t, sums + t * stride + column, stride);
        }
}

// out [count, outputs] = activation(x · weightᵀ + bias).
template <typename P, Activation A>
INLINE void apply(const typename P::Layer& l, const typename P::Tokens& tokens, int count, typename P::Element* out,
                  int64_t stride) {
    alignas(64) float sums[ROWS * P::COLUMNS];
    for (int column = 0; column < l.outputs; column += P::COLUMNS) {
        const int width = std::min(P::COLUMNS, l.outputs - column);
        for (int t = 0, block; t < count; t += block) {
            block = block_of(count - t);
            if constexpr (A == IDENTITY && std::is_same_v<typename P::Element, float>)
                if (width == P::COLUMNS) {
                    MULTIPLY<P>[block](l, column, tokens, t, out + t * stride + column, stride);
                    continue;
                }
            MULTIPLY<P>[block](l, column, tokens, t, sums, P::COLUMNS);
            for (int r = 0; r < block; r++)
                for (int c = 0; c < width; c += P::W)
                    P::template put_active<A>(out + (t + r) * stride + column + c, sums + r * P::COLUMNS + c);
        }
    }
}

// out [tokens, outputs] = activation(x · weightᵀ + bias), or what `f` makes of the sums.
template <typename P, typename T = typename P::Element>
INLINE void linear(const typename P::Layer& l, int activation, const FinishOf<T>* f, const T* x, int64_t x_stride,
                   int tokens, T* out, int64_t out_stride) {
    static thread_local std::vector<float> held;
    const int64_t stride = round_up(l.outputs, P::COLUMNS), bytes = P::bytes(l) + (f ? stride * 4 : 0);
    const int tile = std::min<int64_t>(std::max<int64_t>(CACHE / bytes, ROWS) / ROWS * ROWS, tokens);
    for (int t = 0; t < tokens; t += tile) {
        const int count = std::min(tile, tokens - t);
        const typename P::Tokens taken = P::take(l, x + t * x_stride, x_stride, count);
        T* to = out + t * out_stride;
        if (f) {
            float* sums = scratch(held, size_t(tile) * stride);
            add_up<P>(l, taken, count, sums, stride);
            finish_rows<P::W>(*f, sums, stride, l.outputs, t, count, out, out_stride);
        } else if (activation == GELU) {
            apply<P, GELU>(l, taken, count, to, out_stride);
        } else if (activation == GELU_TANH) {
            apply<P, GELU_TANH>(l, taken, count, to, out_stride);
        } else if (activation == SILU) {
            apply<P, SILU>(l, taken, count, to, out_stride);
        } else {
            apply<P, IDENTITY>(l, taken, count, to, out_stride);
        }
    }
}

}  // namespace
