// Linear layers in bfloat16 on CPUs with AMX. What it computes is linear.cpp's.
//
// Weights lie in panels of 32 outputs, tile by tile: [panels][inputs / 32][2][16 pairs of inputs][16 outputs][2]
// (kernels/panels.py). A token tile is laid out in tiles of its own, [tokens / 16][inputs / 32][16][32], zeros behind
// what there is; that is read once for each panel (linear_tiles.h).
#include "linear_tiles.h"

namespace {

// What follows a product: `whole(t)` names a block whose sums are, those of the tokens from t on; some of its rows are
// written at each call, between the products of the block behind it, and all that are left by `finish`.
template <Activation A>
struct Activate {
    const float* sums;  // [tokens][BLOCK]
    uint16_t* out;      // [tokens, outputs]
    int64_t stride;
    int count, outputs, share;  // tokens; rows a call
    int column = 0;             // of the panel

    const float* from = nullptr;
    uint16_t* to = nullptr;
    int left = 0, width = 0;

    FOR_AMX INLINE void whole(int t) {
        from = sums + t * BLOCK, to = out + t * stride + column;
        left = std::min(BLOCK, count - t), width = std::min(BLOCK, outputs - column);
    }
    FOR_AMX INLINE void write(int rows) {
        for (; rows > 0 && left > 0; rows--, left--, from += BLOCK, to += stride)
            for (int c = 0; c < width; c += LANES) round_to(to + c, active<A>(_mm512_load_ps(from + c)));
    }
    FOR_AMX INLINE void operator()() { write(share); }
    FOR_AMX INLINE void finish() { write(left); }
};

// Where what follows takes whole rows, of all panels.
struct Wait {
    int column = 0;

    FOR_AMX INLINE void whole(int) {}
    FOR_AMX INLINE void operator()() {}
    FOR_AMX INLINE void finish() {}
};

// x [count, inputs] in tiles, zeros behind the last input and the last token of the last tile.
FOR_AMX void lay_rows(const uint16_t* x, int64_t stride, int count, int inputs, uint16_t* to) {
    for (int t = 0; t < round_up(count, SIDE); t += SIDE)
        for (int i = 0; i < inputs; i += DEPTH, to += TILE) {
            const __mmask32 there = uint32_t((uint64_t(1) << std::min(DEPTH, inputs - i)) - 1);
            for (int r = 0; r < SIDE; r++) {
                const __m512i row = t + r < count ? _mm512_maskz_loadu_epi16(there, x + (t + r) * stride + i)
                                                  : _mm512_setzero_si512();
                _mm512_store_si512(to + r * DEPTH, row);
            }
        }
}

// sums [round_up(count, 16)][stride], 32 columns of them = bias + x · panel.
template <typename Follow>
FOR_AMX INLINE void add_panel(const uint16_t* x, const uint16_t* panel, int steps, const float* bias, int count,
                              float* sums, int64_t stride, Follow& follow) {
    for (int k = 0; k < steps; k += CHUNK) {
        const int some = std::min(CHUNK, steps - k);
        const Operand left = {x + k * TILE, int64_t(steps) * TILE, TILE, 2 * DEPTH};
        const Operand right = {panel + int64_t(k) * 2 * TILE, TILE, 2 * TILE, 2 * DEPTH};
        const Ahead ahead(right.at + some * 2 * TILE, 2 * LINE, count);
        add_chunk(left, right, some, k ? nullptr : bias, count, sums, stride, k + some == steps, ahead, follow);
    }
}

// All panels; `sums` are of one of them, or of all side by side.
template <typename Follow>
FOR_AMX void add_panels(const Linear& l, const uint16_t* x, int count, float* sums, int64_t stride, bool all,
                        Follow& follow) {
    const int steps = (l.inputs + DEPTH - 1) / DEPTH;
    for (int column = 0; column < l.outputs; column += BLOCK) {
        follow.column = column;
        add_panel(x, l.weight + int64_t(column) * steps * DEPTH, steps, l.bias + column, count,
                  sums + (all ? column : 0), stride, follow);
    }
    follow.finish();
}

template <Activation A>
FOR_AMX void apply(const Linear& l, const uint16_t* x, int count, float* sums, uint16_t* out, int64_t stride) {
    Activate<A> follow = {sums, out, stride, count, l.outputs, rows_a_step((l.inputs + DEPTH - 1) / DEPTH)};
    add_panels(l, x, count, sums, BLOCK, false, follow);
}

auto apply_of(int activation) {
    return activation == GELU        ? apply<GELU>
           : activation == GELU_TANH ? apply<GELU_TANH>
           : activation == SILU      ? apply<SILU>
                                     : apply<IDENTITY>;
}

FOR_AMX void linear(const Linear& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                    uint16_t* out, int64_t out_stride) {
    static thread_local std::vector<uint16_t> laid_held;
    static thread_local std::vector<float> sums_held;
    const int inputs = round_up(l.inputs, DEPTH), outputs = f ? apart(l.outputs) : BLOCK;
    const int tile = std::min(tile_of(int64_t(inputs) * 2 + int64_t(outputs) * 4), round_up(tokens, BLOCK));
    uint16_t* laid = scratch(laid_held, size_t(tile) * inputs);
    float* sums = scratch(sums_held, size_t(tile) * outputs);
    const Tiles tiles;
    for (int t = 0; t < tokens; t += tile) {
        const int count = std::min(tile, tokens - t);
        lay_rows(x + t * x_stride, x_stride, count, l.inputs, laid);
        if (f) {
            Wait wait;
            add_panels(l, laid, count, sums, outputs, true, wait);
            finish_rows<LANES>(*f, sums, outputs, l.outputs, t, count, out, out_stride);
        } else {
            apply_of(activation)(l, laid, count, sums, out + t * out_stride, out_stride);
        }
    }
}

}  // namespace

extern "C" {

int carpool_linear_amx(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                       int tokens, uint16_t* out, int64_t out_stride) {
    return linear_in_parts(linear, LEAST_IN_TILES, BLOCK, BLOCK, round_up(l->inputs, DEPTH), *l, activation, f, x,
                           x_stride, tokens, out, out_stride);
}
}
