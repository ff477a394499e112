// Linear layers in 8-bit integers on CPUs with AMX. What it computes is linear8.cpp's, to the bit, and weights lie as
// there: of a panel [inputs / 4][64 outputs][4], 16 rows and 16 outputs are a tile. Inputs behind the last whole step of
// 64 are copied apart, since tiles are read whole.
//
// A token tile's levels are rows of bytes, zeros behind the last input: an odd number of cache lines, since of a power
// of two the rows of a tile would share a few sets of the cache.
#include "linear8.h"
#include "linear_tiles.h"

namespace {

constexpr int STEP = GROUP * SIDE;            // inputs that one product sums over
constexpr int COLUMNS = 4 * SIDE;             // outputs a panel
constexpr int PANEL_ROW = COLUMNS * GROUP;    // bytes
constexpr int STEP_BYTES = SIDE * PANEL_ROW;  // of a whole panel

alignas(64) constexpr int32_t ZEROS[BLOCK] = {};

// What the sums are worth, through an activation, into rows of T: as linear_amx.cpp's `Activate`.
template <typename T, Activation A>
struct Put {
    const Linear8& l;
    const Levels& levels;
    const int32_t* sums;  // [tokens][BLOCK]
    T* out;               // [tokens, outputs]
    int64_t stride;
    int count, share;  // tokens; rows a call
    int column = 0;    // the block's first

    const int32_t* from = nullptr;
    T* to = nullptr;
    int token = 0, left = 0, first = 0, width = 0;

    FOR_AMX INLINE void whole(int t) {
        from = sums + t * BLOCK, to = out + t * stride + column, token = t;
        left = std::min(BLOCK, count - t), first = column, width = std::min(BLOCK, l.outputs - column);
    }
    FOR_AMX INLINE void write(int rows) {
        for (; rows > 0 && left > 0; rows--, left--, token++, from += BLOCK, to += stride) {
            const __m512 height = _mm512_set1_ps(levels.height[token]), low = _mm512_set1_ps(levels.low[token]);
            for (int c = 0; c < width; c += LANES)
                put_active<A>(to + c, worth(l, first + c, _mm512_load_si512(from + c), height, low));
        }
    }
    FOR_AMX INLINE void operator()() { write(share); }
    FOR_AMX INLINE void finish() { write(left); }
};

// Where the 32 outputs from `column` on begin.
inline const int8_t* half_panel(const Linear8& l, int column) {
    const int half = column % COLUMNS;
    return l.weight + int64_t(column - half) * l.inputs + half * GROUP;
}

// sums [round_up(count, 16)][BLOCK] = levels · half a panel; `rest`: its last step, where that is not whole; `next`:
// what is multiplied then.
template <typename Follow>
FOR_AMX INLINE void add_half(const uint8_t* levels, int64_t row, const int8_t* half, const int8_t* rest,
                             const int8_t* next, int inputs, int count, int32_t* sums, Follow& follow) {
    const int whole = inputs / STEP;
    const auto left = [&](int k) { return OperandOf<uint8_t>{levels + k * STEP, SIDE * row, STEP, row}; };
    for (int k = 0; k < whole; k += CHUNK) {
        const int some = std::min(CHUNK, whole - k);
        const OperandOf<int8_t> right = {half + int64_t(k) * STEP_BYTES, STEP, STEP_BYTES, PANEL_ROW};
        const Ahead ahead(k + some < whole ? right.at + some * STEP_BYTES : next, PANEL_ROW, count);
        add_chunk(left(k), right, some, k ? nullptr : ZEROS, count, sums, BLOCK, !rest && k + some == whole, ahead,
                  follow);
    }
    if (!rest) return;
    const OperandOf<int8_t> right = {rest, STEP, 0, PANEL_ROW};
    const Ahead ahead(next, PANEL_ROW, count);
    add_chunk(left(whole), right, 1, whole ? nullptr : ZEROS, count, sums, BLOCK, true, ahead, follow);
}

template <typename T, Activation A>
FOR_AMX void apply(const Linear8& l, const Levels& levels, int64_t row, int count, int32_t* sums, T* out,
                   int64_t stride) {
    Put<T, A> follow = {l, levels, sums, out, stride, count, rows_a_step((l.inputs + STEP - 1) / STEP)};
    alignas(64) int8_t rest[STEP_BYTES];
    const int whole = l.inputs / STEP * STEP, behind = l.inputs - whole;
    std::memset(rest + behind * COLUMNS, 0, sizeof rest - behind * COLUMNS);
    for (int column = 0; column < l.outputs; column += BLOCK) {
        const int8_t* half = half_panel(l, column);
        if (column % COLUMNS == 0) std::memcpy(rest, half + int64_t(whole) * COLUMNS, behind * COLUMNS);
        follow.column = column;
        add_half(levels.of, row, half, behind ? rest + column % COLUMNS * GROUP : nullptr,
                 half_panel(l, column + BLOCK), l.inputs, count, sums, follow);
    }
    follow.finish();
}

template <typename T>
auto apply_of(int activation) {
    return activation == GELU        ? apply<T, GELU>
           : activation == GELU_TANH ? apply<T, GELU_TANH>
           : activation == SILU      ? apply<T, SILU>
                                     : apply<T, IDENTITY>;
}

template <typename T>
FOR_AMX void linear(const Linear8& l, int activation, const FinishOf<T>* f, const T* x, int64_t x_stride, int tokens,
                    T* out, int64_t out_stride) {
    static thread_local std::vector<uint8_t> held_levels;
    static thread_local std::vector<float> held_scales, held_rows;
    static thread_local std::vector<int32_t> held_sums;
    const int inputs = round_up(l.inputs, STEP), row = (inputs / LINE | 1) * LINE, stride = f ? apart(l.outputs) : 0;
    const int tile = std::min(tile_of(int64_t(row) + int64_t(stride) * 4), round_up(tokens, BLOCK));
    float* scales = scratch(held_scales, size_t(tile) * 2);
    const Levels levels = {scratch(held_levels, size_t(tile) * row), scales, scales + tile};
    int32_t* sums = scratch(held_sums, size_t(tile) * BLOCK);
    float* rows = scratch(held_rows, size_t(tile) * stride);
    const Tiles tiles;
    for (int t = 0; t < tokens; t += tile) {
        const int count = std::min(tile, tokens - t);
        for (int i = 0; i < count; i++) {
            uint8_t* to = levels.of + int64_t(i) * row;
            level(x + (t + i) * x_stride, l.inputs, to, &levels.height[i], &levels.low[i]);
            std::memset(to + l.inputs, 0, inputs - l.inputs);
        }
        if (f) {
            apply<float, IDENTITY>(l, levels, row, count, sums, rows, stride);
            finish_rows<LANES>(*f, rows, stride, l.outputs, t, count, out, out_stride);
        } else {
            apply_of<T>(activation)(l, levels, row, count, sums, out + t * out_stride, out_stride);
        }
    }
}

template <typename T>
int in_parts(const Linear8& l, int activation, const FinishOf<T>* f, const T* x, int64_t x_stride, int tokens, T* out,
             int64_t out_stride) {
    return linear_in_parts(linear<T>, LEAST_IN_TILES, COLUMNS, BLOCK, l.inputs, l, activation, f, x, x_stride, tokens,
                           out, out_stride);
}

}  // namespace

int linear8_in_tiles(const Linear8& l, int activation, const FinishOf<float>* f, const float* x, int64_t x_stride,
                     int tokens, float* out, int64_t out_stride) {
    return in_parts(l, activation, f, x, x_stride, tokens, out, out_stride);
}
int linear8_in_tiles(const Linear8& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                     uint16_t* out, int64_t out_stride) {
    return in_parts(l, activation, f, x, x_stride, tokens, out, out_stride);
}
