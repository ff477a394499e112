// Tiles in software, under the names that kernels/cpu/amx.h gives the instructions: so the AMX kernels run, whole, on a
// CPU without AMX. After Intel's Software Developer's Manual, to the bit: sums in float32, even and odd halves of the
// pairs apart until the end of a product, subnormal numbers taken and given as zeros.
//
// What would be a fault there is noted, the instruction left out, and `carpool_tile_fault` tells of the first.
#pragma once

struct SoftTiles {
    TileConfig config;
    bool configured = false;
    alignas(64) uint8_t data[8][16][64];
    const char* fault = nullptr;
};

extern "C" inline SoftTiles* carpool_soft_tiles() {
    static thread_local SoftTiles tiles;
    return &tiles;
}

// The first fault since it was last asked, or null.
extern "C" inline __attribute__((used)) const char* carpool_tile_fault() {
    const char* fault = carpool_soft_tiles()->fault;
    carpool_soft_tiles()->fault = nullptr;
    return fault;
}

namespace {

inline bool tile_holds(bool allowed, const char* otherwise) {
    const char*& fault = carpool_soft_tiles()->fault;
    if (!allowed && !fault) fault = otherwise;
    return allowed;
}

inline void tile_configure(const TileConfig& config) {
    bool sound = reinterpret_cast<uintptr_t>(&config) % 64 == 0 && config.palette == 1 && config.start_row == 0;
    for (uint8_t byte : config.reserved) sound &= byte == 0;
    for (int t = 0; t < 16; t++) {
        const int rows = config.rows[t], bytes = config.row_bytes[t];
        sound &= t < 8 ? rows <= 16 && bytes <= 64 && bytes % 4 == 0 && (rows == 0) == (bytes == 0) : rows + bytes == 0;
    }
    SoftTiles& tiles = *carpool_soft_tiles();
    if (!tile_holds(sound, "a configuration that there is not")) return;
    tile_holds(!tiles.configured, "configured twice: the one before was not released");
    tiles.config = config;
    tiles.configured = true;
    std::memset(tiles.data, 0, sizeof tiles.data);
}

inline void tile_release() {
    tile_holds(carpool_soft_tiles()->configured, "released without being configured");
    carpool_soft_tiles()->configured = false;
}

inline bool tile_usable(int tile) {
    const SoftTiles& tiles = *carpool_soft_tiles();
    return tile_holds(tiles.configured, "a tile used while none are configured") &&
           tile_holds(tiles.config.rows[tile] > 0, "a tile used that has no rows");
}

template <int N>
void tile_zero() {
    if (tile_usable(N)) std::memset(carpool_soft_tiles()->data[N], 0, sizeof carpool_soft_tiles()->data[N]);
}

template <int N>
void tile_load(const void* from, int64_t stride) {
    if (!tile_usable(N)) return;
    SoftTiles& tiles = *carpool_soft_tiles();
    std::memset(tiles.data[N], 0, sizeof tiles.data[N]);
    for (int r = 0; r < tiles.config.rows[N]; r++)
        std::memcpy(tiles.data[N][r], static_cast<const char*>(from) + r * stride, tiles.config.row_bytes[N]);
}

template <int N>
void tile_load_once(const void* from, int64_t stride) {
    tile_load<N>(from, stride);
}

template <int N>
void tile_store(void* to, int64_t stride) {
    if (!tile_usable(N)) return;
    const SoftTiles& tiles = *carpool_soft_tiles();
    for (int r = 0; r < tiles.config.rows[N]; r++)
        std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[N][r], tiles.config.row_bytes[N]);
}

// The flags are read and written around the arithmetic, which the compiler must leave between them.
FOR_AVX512 __attribute__((noinline)) inline void tile_rows_multiply(SoftTiles& tiles, int sum, int left, int right) {
    const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
    for (int r = 0; r < tiles.config.rows[sum]; r++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < tiles.config.row_bytes[left] / 4; k++) {
            uint32_t pair;
            std::memcpy(&pair, tiles.data[left][r] + 4 * k, 4);
            const __m512i others = _mm512_load_si512(tiles.data[right][k]);
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair << 16))),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(others, 16)), even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair & 0xffff0000))),
                                  _mm512_castsi512_ps(_mm512_and_si512(others, high)), odd);
        }
        float* to = reinterpret_cast<float*>(tiles.data[sum][r]);
        const __mmask16 there = __mmask16((1u << tiles.config.row_bytes[sum] / 4) - 1);
        _mm512_mask_store_ps(to, there, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
    }
}

// The sums wrap around.
FOR_AVX512 inline void tile_rows_multiply_bytes(SoftTiles& tiles, int sum, int left, int right) {
    const __mmask16 there = __mmask16((1u << tiles.config.row_bytes[sum] / 4) - 1);
    for (int r = 0; r < tiles.config.rows[sum]; r++) {
        __m512i total = _mm512_load_si512(tiles.data[sum][r]);
        for (int k = 0; k < tiles.config.row_bytes[left]; k++) {
            const __m512i fours = _mm512_load_si512(tiles.data[right][k / 4]);
            const __m512i others = _mm512_srai_epi32(_mm512_sll_epi32(fours, _mm_cvtsi32_si128(24 - k % 4 * 8)), 24);
            const __m512i one = _mm512_set1_epi32(tiles.data[left][r][k]);
            total = _mm512_add_epi32(total, _mm512_mullo_epi32(one, others));
        }
        _mm512_mask_store_epi32(tiles.data[sum][r], there, total);
    }
}

// Whether these three, none of them another, may be multiplied.
inline bool tiles_fit(int sum, int left, int right) {
    if (!tile_usable(sum) || !tile_usable(left) || !tile_usable(right)) return false;
    const uint8_t* rows = carpool_soft_tiles()->config.rows;
    const uint16_t* bytes = carpool_soft_tiles()->config.row_bytes;
    const bool distinct = sum != left && sum != right && left != right;
    const bool fit = rows[sum] == rows[left] && bytes[left] == 4 * rows[right] && bytes[sum] == bytes[right];
    return tile_holds(distinct && fit, "a product of tiles that do not fit each other");
}

template <int SUM, int LEFT, int RIGHT>
void tile_multiply() {
    if (!tiles_fit(SUM, LEFT, RIGHT)) return;
    const unsigned flags = _mm_getcsr();
    _mm_setcsr((flags & ~_MM_ROUND_MASK) | _MM_FLUSH_ZERO_ON | 0x0040);  // 0x0040: subnormal operands are zeros
    tile_rows_multiply(*carpool_soft_tiles(), SUM, LEFT, RIGHT);
    _mm_setcsr(flags);
}

template <int SUM, int LEFT, int RIGHT>
void tile_multiply_bytes() {
    if (tiles_fit(SUM, LEFT, RIGHT)) tile_rows_multiply_bytes(*carpool_soft_tiles(), SUM, LEFT, RIGHT);
}

}  // namespace
