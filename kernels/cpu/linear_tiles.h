// The way of tokens through a linear layer in tiles: linear_amx.cpp and linear8_amx.cpp lay out the operands, and say
// what follows the sums.
//
// Blocks of 32 tokens and 32 outputs: CHUNK steps of a panel stay in the first-level cache while all blocks of a tile
// of tokens pass by, and sums wait in memory for the next chunk. What follows the sums of a block is done between the
// products of the one behind it.
//
// Rows of a tile are summed apart and always in this order: a token's result does not depend on the others.
#pragma once

#include "amx.h"
#include "linear_shares.h"

namespace {

constexpr int BLOCK = 2 * SIDE;  // tokens and outputs of a block
constexpr int CHUNK = 12;        // steps: 24 KB of weights, half of the first-level cache
constexpr int CACHE = 1 << 20;   // bytes a token tile may take, half of the second-level cache
constexpr int MOST = 256;        // tokens a tile: more bring nothing
constexpr int LINE = 64;         // bytes of a cache line
constexpr int PAIRS = 16;        // of lines of weights that a step of a block reads

// Tokens a tile, of which each takes so many bytes; whole blocks.
inline int tile_of(int64_t bytes) {
    return std::min<int64_t>(std::max<int64_t>(CACHE / bytes, BLOCK), MOST) / BLOCK * BLOCK;
}

// Floats from one row of sums to the next: an odd number of lines. With a power of two the rows of a tile would share
// a few sets of the first-level cache.
inline int apart(int outputs) { return round_up(outputs, BLOCK) + SIDE; }

// Weights that come next, a few lines of them a step: when the blocks of `count` tokens have passed by, they are in the
// second-level cache. Two lines lie together, and such pairs so many `bytes` from each other. What is not there does no
// harm.
struct Ahead {
    const char* at;
    int pairs, bytes;

    Ahead(const void* next, int bytes, int count) : at(static_cast<const char*>(next)), bytes(bytes) {
        const int blocks = (count + BLOCK - 1) / BLOCK;
        pairs = (PAIRS + blocks - 1) / blocks;
    }
    INLINE void operator()() {
        for (int i = 0; i < pairs; i++, at += bytes) {
            _mm_prefetch(at, _MM_HINT_T1);
            _mm_prefetch(at + LINE, _MM_HINT_T1);
        }
    }
};

// A block of sums, at most [32][32]: += x · panel, or that and a row of 32 to start from, where there is one.
template <int TALL, typename L, typename R, typename S, typename Follow>
FOR_AMX INLINE void add_block(OperandOf<L> x, OperandOf<R> panel, int steps, const S* start, S* sums, int64_t stride,
                              Ahead& ahead, Follow& follow) {
    if (start)
        load_sums<TALL, 2>(start, 0);
    else
        load_sums<TALL, 2>(sums, stride);
    auto meanwhile = [&]() FOR_AMX { ahead(), follow(); };
    add_products<TALL, 2, true>(x, panel, steps, meanwhile);
    follow.finish();  // it may be these sums that it still reads
    store_sums<TALL, 2>(sums, stride);
}

// The same for all blocks of `count` tokens: sums [round_up(count, 16)][stride], 32 columns of them. `last`: they are
// whole then.
template <typename L, typename R, typename S, typename Follow>
FOR_AMX INLINE void add_chunk(OperandOf<L> x, OperandOf<R> panel, int steps, const S* start, int count, S* sums,
                              int64_t stride, bool last, Ahead ahead, Follow& follow) {
    for (int t = 0; t < count; t += BLOCK, x.at += 2 * x.beside) {
        const auto add = count - t > SIDE ? add_block<2, L, R, S, Follow> : add_block<1, L, R, S, Follow>;
        add(x, panel, steps, start, sums + t * stride, stride, ahead, follow);
        if (last) follow.whole(t);
    }
}

// Rows that follow is to take a call, so that a block's are through when the next block's steps are.
inline int rows_a_step(int steps) { return (BLOCK + std::min(CHUNK, steps) - 1) / std::min(CHUNK, steps); }

}  // namespace
