// The matrix unit of Intel's servers from Sapphire Rapids on: eight tiles of 16 rows of 64 bytes, and an instruction that
// adds the product of two of them to a third. Here is what the kernels ask of it, and the one loop that takes their time.
//
// The instructions are written as assembly: gcc's own tile loads do not tell the compiler that they read memory, so that
// stores may sink below them. Here every load and store of a tile is a barrier to the compiler. It also needs no target
// attribute; that the CPU has tiles and the kernel lends them is asked once, by `carpool_has_amx`.
#pragma once

#include "vector.h"

#define FOR_AMX FOR_BF16  // all else that these kernels use; every CPU with tiles has it

extern "C" {

// 1 where this process may use tiles for bfloat16, 0 where the CPU has none, -1 where it has and the kernel refuses them.
int carpool_has_amx();
// Whether it may use them for 8-bit integers too.
int carpool_has_amx_int8();
}

// As `ldtilecfg` reads it.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#ifdef CARPOOL_SOFT_TILES
#include CARPOOL_SOFT_TILES  // the same names in software, for tests on CPUs without tiles
#else
namespace {

INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void tile_release() { asm volatile("tilerelease"); }

template <int N>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(N));
}

// Rows of 64 bytes, `stride` bytes from one to the next.
template <int N>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(N), "r"(from), "r"(stride) : "memory");
}
// The same of what passes by: it is not to drive others out of the first-level cache.
template <int N>
INLINE void tile_load_once(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(N), "r"(from), "r"(stride) : "memory");
}
template <int N>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(N), "r"(to), "r"(stride) : "memory");
}

// SUM [16 rows][16 float32] += LEFT [16 rows][32 bfloat16] · RIGHT [16 pairs of rows][16 columns][2 bfloat16]
template <int SUM, int LEFT, int RIGHT>
INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

// SUM [16 rows][16 int32] += LEFT [16 rows][64 uint8] · RIGHT [16 fours of rows][16 columns][4 int8]
template <int SUM, int LEFT, int RIGHT>
INLINE void tile_multiply_bytes() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

}  // namespace
#endif

namespace {

constexpr int SIDE = 16;             // rows of a tile, and float32, pairs of bfloat16 or fours of bytes a row
constexpr int DEPTH = 2 * SIDE;      // bfloat16 a row: what one product sums over
constexpr int TILE = SIDE * DEPTH;   // bfloat16 a tile

// Holds the tiles, all of them whole, while it lives. Who called may have had them configured otherwise, or will.
struct Tiles {
    Tiles() {
        TileConfig config;
        std::fill(config.row_bytes, config.row_bytes + 8, uint16_t(64));
        std::fill(config.rows, config.rows + 8, uint8_t(SIDE));
        tile_configure(config);
    }
    ~Tiles() { tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Tiles side by side, and those that follow them along what is summed over.
template <typename T>
struct OperandOf {
    const T* at;
    int64_t beside, next;  // elements from a tile to the one beside it, to the next
    int64_t row_bytes;     // from one of its rows to the next
};
typedef OperandOf<uint16_t> Operand;

// TALL x WIDE tiles of sums, at most 2 x 2, in tiles 0 to 3: float32 or int32, `stride` of them from one row to the
// next. Stride 0 has every row alike.
template <int TALL, int WIDE, typename S>
INLINE void load_sums(const S* from, int64_t stride) {
    const int64_t bytes = stride * 4;
    tile_load<0>(from, bytes);
    if (WIDE > 1) tile_load<1>(from + SIDE, bytes);
    if (TALL > 1) tile_load<2>(from + SIDE * stride, bytes);
    if (TALL > 1 && WIDE > 1) tile_load<3>(from + SIDE * stride + SIDE, bytes);
}

template <int TALL, int WIDE, typename S>
INLINE void store_sums(S* to, int64_t stride) {
    const int64_t bytes = stride * 4;
    tile_store<0>(to, bytes);
    if (WIDE > 1) tile_store<1>(to + SIDE, bytes);
    if (TALL > 1) tile_store<2>(to + SIDE * stride, bytes);
    if (TALL > 1 && WIDE > 1) tile_store<3>(to + SIDE * stride + SIDE, bytes);
}

INLINE void zero_sums() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
}

template <int SUM, int LEFT, int RIGHT>
INLINE void multiply_add(Operand, Operand) {
    tile_multiply<SUM, LEFT, RIGHT>();
}
template <int SUM, int LEFT, int RIGHT>
INLINE void multiply_add(OperandOf<uint8_t>, OperandOf<int8_t>) {
    tile_multiply_bytes<SUM, LEFT, RIGHT>();
}

template <int N, bool ONCE>
INLINE void load_left(const void* from, int64_t stride) {
    ONCE ? tile_load_once<N>(from, stride) : tile_load<N>(from, stride);
}

// sums += left · right over `steps` tiles, doing `meanwhile` after each: vector instructions of the block before fill
// the gaps that the matrix unit leaves. With 2 x 2 sums there is one load a product, the least that eight tiles allow.
// ONCE: the left side passes by, the right one is to stay in the first-level cache.
template <int TALL, int WIDE, bool ONCE, typename L, typename R, typename Meanwhile>
FOR_AMX INLINE void add_products(OperandOf<L> left, OperandOf<R> right, int steps, Meanwhile& meanwhile) {
    for (int i = 0; i < steps; i++, left.at += left.next, right.at += right.next) {
        tile_load<6>(right.at, right.row_bytes);
        load_left<4, ONCE>(left.at, left.row_bytes);
        multiply_add<0, 4, 6>(left, right);
        if (WIDE > 1) {
            tile_load<7>(right.at + right.beside, right.row_bytes);
            multiply_add<1, 4, 7>(left, right);
        }
        if (TALL > 1) {
            load_left<5, ONCE>(left.at + left.beside, left.row_bytes);
            multiply_add<2, 5, 6>(left, right);
        }
        if (TALL > 1 && WIDE > 1) multiply_add<3, 5, 7>(left, right);
        meanwhile();
    }
}

}  // namespace
