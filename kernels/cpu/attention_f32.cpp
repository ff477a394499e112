// Attention in float32 arithmetic, with AVX2 or AVX-512: of float32, and of bfloat16 where the CPU does not multiply it.
//
// For one head of one sequence, keys and values are copied once into the layout that the inner loops stream (K
// transposed, so that 16 keys fill a register). Then ROWS queries at a time: scores, softmax, weighted sum. All of a
// query's scores are kept, so there is one exponential a score and no rescaling.
#include "attention_batch.h"
#include "transpose.h"

namespace {

constexpr int ROWS = 6;  // queries a block: 6 x 2 accumulators leave registers for operands

template <typename V>
INLINE V power_of_e(V x) {
    if constexpr (sizeof(V) == 64)
        return (V)exp2_finely((__m512)(x * 1.44269504f));
    else
        return exp_(x);
}

// Scores of the query at `place`, in place: scaled, capped, biased, masked to what it sees, exponentials; returns 1 / their
// sum.
template <int W>
INLINE float softmax_row(const Shape& s, float* row, int place, Range keys, int begin, int end) {
    if (s.softcap != 0)
        for (int j = keys.begin; j < keys.end; j++) row[j] = s.softcap * std::tanh(row[j] * s.scale / s.softcap);
    if (s.bias.table) {
        const float *bias = s.bias.table + s.bias.middle - place, scale = s.scale_before_bias();
        for (int j = keys.begin; j < keys.end; j++) row[j] = row[j] * scale + bias[j];
    }
    const float factor = s.left_to_scale();
    const float low = -std::numeric_limits<float>::infinity();
    for (int j = begin; j < keys.begin; j++) row[j] = low;
    for (int j = keys.end; j < end; j++) row[j] = low;
    floats<W> top = floats<W>{} + low, total = {};
    for (int j = begin; j < end; j += W) {
        const floats<W> x = load<W>(row + j);
        top = x > top ? x : top;
    }
    const float peak = largest(top);
    for (int j = begin; j < end; j += W) {
        const floats<W> e = power_of_e((load<W>(row + j) - peak) * factor);
        total += e;
        store(row + j, e);
    }
    return 1.0f / sum(total);
}

// The two loops that take the time are written for registers of W floats, as wide as the level has them: then all of
// their sums stay in registers, 12 of which AVX2 has 16.

// Of N queries and BLOCK keys.
template <int W, int N>
INLINE void scores_block(const float* const* q, const float* keys, int head_size, float* const* out) {
    for (int first = 0; first < BLOCK; first += 2 * W) {
        floats<W> acc[N][2] = {};
        for (int d = 0; d < head_size; d++) {
            const auto one = load<W>(keys + d * BLOCK + first), other = load<W>(keys + d * BLOCK + first + W);
            for (int n = 0; n < N; n++) acc[n][0] += one * q[n][d], acc[n][1] += other * q[n][d];
        }
        for (int n = 0; n < N; n++)
            for (int w = 0; w < 2; w++) std::memcpy(out[n] + first + w * W, &acc[n][w], W * sizeof(float));
    }
}

// Of N queries, WIDTH registers of columns from `d` on.
template <int W, int WIDTH, int N>
INLINE void values_block(float* const* p, const float* values, int head_size, int begin, int end, float (*out)[256],
                         int d) {
    floats<W> acc[N][WIDTH] = {};
    for (int j = begin; j < end; j++) {
        floats<W> v[WIDTH];
        for (int w = 0; w < WIDTH; w++) v[w] = load<W>(values + int64_t(j) * head_size + d + w * W);
        for (int n = 0; n < N; n++)
            for (int w = 0; w < WIDTH; w++) acc[n][w] += v[w] * p[n][j];
    }
    for (int n = 0; n < N; n++)
        for (int w = 0; w < WIDTH; w++) std::memcpy(out[n] + d + w * W, &acc[n][w], W * sizeof(float));
}

template <typename T, int W>
struct Float32 {
    float* keys;    // [tokens / BLOCK][head_size][BLOCK]
    float* values;  // [tokens][head_size]
    float* rows;    // [ROWS][stride]: scores, then weights
    int stride;

    INLINE Float32(int size, int longest) : stride(round_up(longest, BLOCK)) {
        static thread_local std::vector<float> keys_held, values_held, rows_held;
        keys = scratch(keys_held, size_t(size) * stride);
        values = scratch(values_held, size_t(size) * longest);
        rows = scratch(rows_held, size_t(ROWS) * stride);
    }

    INLINE void lay(const Shape& s, const T* k, const T* v, const int64_t* at, int begin, int length) {
        const int size = s.head_size;
        for (int j = begin; j < length; j++)
            for (int d = 0; d < size; d += W)
                store(values + int64_t(j) * size + d, load<W>(v + at[j] * s.v_stride + d));
        for (int j = begin / W * W; j < round_up(length, BLOCK); j += W)
            for (int d = 0; d < size; d += W) {
                ints<W> r[W] = {};
                for (int i = 0; i < std::min(W, length - j); i++)
                    r[i] = (ints<W>)load<W>(k + at[j + i] * s.k_stride + d);
                transpose<W>(r);
                float* key = keys + int64_t(j / BLOCK * BLOCK) * size + j % BLOCK;
                for (int i = 0; i < W; i++) store(key + (d + i) * BLOCK, (floats<W>)r[i]);
            }
    }

    INLINE void attend(const Shape& s, const T* q, T* o, int past, int queries, int length) {
        const int size = s.head_size, group = s.heads / s.kv_heads;
        for (int i = 0; i < queries * group; i += ROWS) {
            float query[ROWS][256], result[ROWS][256];
            const float* qs[ROWS];
            float* row[ROWS];
            int token[ROWS], head[ROWS];
            const int count = std::min(ROWS, queries * group - i);
            for (int n = 0; n < ROWS; n++) {
                token[n] = (i + std::min(n, count - 1)) / group, head[n] = (i + std::min(n, count - 1)) % group;
                const T* from = q + token[n] * s.q_stride + head[n] * size;
                for (int d = 0; d < size; d += W) store(query[n] + d, load<W>(from + d));
                qs[n] = query[n];
                row[n] = rows + int64_t(n) * stride;
            }
            const int begin = visible(s, past + token[0], length).begin / BLOCK * BLOCK;
            const int end = round_up(visible(s, past + token[ROWS - 1], length).end, BLOCK);
            for (int j = begin; j < end; j += BLOCK) {
                float* out[ROWS];
                for (int n = 0; n < ROWS; n++) out[n] = row[n] + j;
                scores_block<W, ROWS>(qs, keys + int64_t(j) * size, size, out);
            }
            float inverse[ROWS];
            for (int n = 0; n < ROWS; n++)
                inverse[n] =
                    softmax_row<W>(s, row[n], past + token[n], visible(s, past + token[n], length), begin, end);
            const int last = std::min(end, length);
            int d = 0;
            for (; d + 2 * W <= size; d += 2 * W) values_block<W, 2, ROWS>(row, values, size, begin, last, result, d);
            for (; d < size; d += W) values_block<W, 1, ROWS>(row, values, size, begin, last, result, d);
            for (int n = 0; n < count; n++)
                for (int e = 0; e < size; e += W)
                    store(o + token[n] * s.o_stride + head[n] * size + e, load<W>(result[n] + e) * inverse[n]);
        }
    }
};

}  // namespace

FOR_AVX512 void attend_in_avx512(const Shape& s, const float* q, const float* k, const float* v, float* o,
                                 const Batch& batch) {
    attend_batch<Float32<float, 16>>(s, q, k, v, o, batch);
}
FOR_AVX512 void attend_in_avx512(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                                 const Batch& batch) {
    attend_batch<Float32<uint16_t, 16>>(s, q, k, v, o, batch);
}
FOR_AVX2 void attend_in_avx2(const Shape& s, const float* q, const float* k, const float* v, float* o,
                             const Batch& batch) {
    attend_batch<Float32<float, 8>>(s, q, k, v, o, batch);
}
FOR_AVX2 void attend_in_avx2(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                             const Batch& batch) {
    attend_batch<Float32<uint16_t, 8>>(s, q, k, v, o, batch);
}
