// The software tiles themselves, for tests to ask: one product, and what becomes of each of the mistakes.
#include "amx.h"

extern "C" {

// sum [16][16] += left · right as tiles configured so.
void soft_product(const TileConfig* config, float* sum, const uint16_t* left, const uint16_t* right) {
    alignas(64) TileConfig aligned = *config;
    tile_configure(aligned);
    tile_load<0>(sum, 64);
    tile_load<1>(left, 64);
    tile_load<2>(right, 64);
    tile_multiply<0, 1, 2>();
    tile_store<0>(sum, 64);
    tile_release();
}

// The same of bytes.
void soft_product_of_bytes(int32_t* sum, const uint8_t* left, const int8_t* right) {
    const Tiles tiles;
    tile_load<0>(sum, 64);
    tile_load_once<1>(left, 64);
    tile_load<2>(right, 64);
    tile_multiply_bytes<0, 1, 2>();
    tile_store<0>(sum, 64);
}

void soft_after_release(float* sum) {
    { const Tiles tiles; }
    tile_load<0>(sum, 64);
}

void soft_twice() {
    const Tiles tiles;
    const Tiles again;
}

void soft_onto_itself() {
    const Tiles tiles;
    tile_multiply<0, 0, 1>();
}
}
