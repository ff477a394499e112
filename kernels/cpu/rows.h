// What is done to rows between the products: the functions of rows.cpp, and the norms they take.
#pragma once

#include "vector.h"

// Weight and bias float32 [width], bias or none; LayerNorm if `centred`, else RMSNorm.
struct Norm {
    const float* weight;
    const float* bias;
    float eps;
    int centred;
};

extern "C" {

// out = norm(x + residual), which may be x; the sum, rounded as the rows are, goes to `total`, which may be `out`.
// Without a residual that is null, and `total` is not looked at.
void carpool_norm_rows_f32(const Norm* n, const float* x, const float* residual, int64_t rows, int width, float* out,
                           float* total, int level);
void carpool_norm_rows_bf16(const Norm* n, const uint16_t* x, const uint16_t* residual, int64_t rows, int width,
                            uint16_t* out, uint16_t* total, int level);

// out [rows, width] = activation(gate) * up; the two, `stride` elements from one row to the next, may lie beside each
// other in rows that begin where `out` does.
void carpool_gated_f32(int activation, const float* gate, const float* up, int64_t stride, int64_t rows, int width,
                       float* out, int level);
void carpool_gated_bf16(int activation, const uint16_t* gate, const uint16_t* up, int64_t stride, int64_t rows,
                        int width, uint16_t* out, int level);

// x [tokens, heads, size] with `stride` elements from one token to the next, cosines and sines float32 [tokens,
// turned]; out contiguous, of one token it may be x. The left half of the first `turned` columns, a multiple of 32, is
// turned into the right one.
void carpool_rotary_f32(const float* x, int64_t stride, int tokens, int heads, int size, int turned,
                        const float* cosines, const float* sines, float* out, int level);
void carpool_rotary_bf16(const uint16_t* x, int64_t stride, int tokens, int heads, int size, int turned,
                         const float* cosines, const float* sines, uint16_t* out, int level);
}
