// Attention in bfloat16 with AVX-512 BF16: a pair of products and their float32 sum in each lane.
//
// Queries fill the registers (attention_lanes.h), 16 or 32 of them; keys and values come in as broadcasts: no key is
// multiplied in vain. Keys are read as they are; those of a long sequence from a copy, for a head's are thousands of bytes
// apart: a page each, and soon in no cache. Queries and results are transposed on the way, which costs a few percent.
// All of a query's scores are kept, so there is one exponential a score and no rescaling.
#include "attention_batch.h"
#include "attention_lanes.h"

namespace {

constexpr int KEYS = 8;    // keys of a block of scores, columns of a block of results
constexpr int NEAR = 512;  // tokens of a sequence whose keys are read where they lie

FOR_BF16 inline __m512bh pair_of(const uint16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

// Into [ceil(length / 2)][size][2] from `begin`, even, on: neighbouring tokens' values as pairs, a zero for the one
// that an odd end lacks.
FOR_BF16 void pair_rows(const uint16_t* from, const int64_t* at, int64_t stride, int begin, int length, int size,
                        uint16_t* to) {
    to += int64_t(begin) * size;
    for (int j = begin; j < length; j += 2) {
        const bool pair = j + 1 < length;
        const uint16_t *row = from + at[j] * stride, *next = pair ? from + at[j + 1] * stride : nullptr;
        for (int d = 0; d < size; d += LANES, to += 2 * LANES) {
            const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d));
            const __m256i other =
                pair ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(next + d)) : _mm256_setzero_si256();
            _mm512_storeu_si512(to, zipped(_mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1)));
        }
    }
}

// Up to QUERIES queries into [size / 2][QUERIES] pairs; zeros for those behind `count`.
FOR_BF16 void turn_queries(const uint16_t* from, const int64_t* at, int count, int size, int32_t* to) {
    for (int first = 0; first < count; first += LANES)
        for (int d = 0; d < size; d += 2 * LANES) {
            const int pairs = std::min(LANES, (size - d) / 2);
            ivec r[LANES];
            for (int i = 0; i < LANES; i++) {
                const __mmask16 there = first + i < count ? (1u << pairs) - 1 : 0;
                r[i] = (ivec)_mm512_maskz_loadu_epi32(there, there ? from + at[first + i] + d : from);
            }
            transpose(r);
            for (int i = 0; i < pairs; i++) _mm512_storeu_si512(to + (d / 2 + i) * QUERIES + first, (__m512i)r[i]);
        }
}

// Products of KEYS rows of `count` pairs of bfloat16, `step` apart, with WIDE registers of queries' pairs. Each lane's
// largest goes to `top`, where it is wanted: they are in registers here.
template <int WIDE>
FOR_BF16 inline void products(const uint16_t* const* rows, int64_t step, const int32_t* queries, int64_t query_step,
                              int count, float* out, __m512* top = nullptr) {
    __m512 acc[KEYS][WIDE];
    for (auto& row : acc)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i++) {
        __m512bh q[WIDE];
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) q[w] = (__m512bh)_mm512_loadu_si512(queries + i * query_step + w * LANES);
#pragma GCC unroll 8
        for (int n = 0; n < KEYS; n++) {
            const __m512bh x = pair_of(rows[n] + i * step);
#pragma GCC unroll 2
            for (int w = 0; w < WIDE; w++) acc[n][w] = _mm512_dpbf16_ps(acc[n][w], x, q[w]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < KEYS; n++)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) _mm512_storeu_ps(out + n * QUERIES + w * LANES, acc[n][w]);
    if (!top) return;
#pragma GCC unroll 2
    for (int w = 0; w < WIDE; w++) {
        top[w] = acc[0][w];
#pragma GCC unroll 8
        for (int n = 1; n < KEYS; n++) top[w] = _mm512_max_ps(top[w], acc[n][w]);
    }
}

FOR_BF16 inline __m512 lowest() { return _mm512_set1_ps(-std::numeric_limits<float>::infinity()); }

// Scores [keys][QUERIES] from key `begin` to `end`, of `count` queries at rising `places`: capped, biased, and -infinity
// where a query does not see the key. Each lane's largest goes to `top`.
template <int WIDE>
FOR_BF16 inline void settle(const Shape& s, float* scores, const int32_t* places, int count, int begin, int end,
                            int length, __m512* top) {
    for (int w = 0; w < WIDE; w++) top[w] = lowest();
    for (int j = begin; j < end; j++)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) {
            float* at = scores + int64_t(j) * QUERIES + w * LANES;
            __m512 x = _mm512_loadu_ps(at);
            if (s.softcap != 0) x = capped(s, x);
            if (s.bias.table && j < length) x = biased(s, x, j, places[0] + w * LANES, count - w * LANES);
            x = _mm512_mask_mov_ps(lowest(), who_sees(s, j, length, _mm512_loadu_si512(places + w * LANES)), x);
            _mm512_storeu_ps(at, x);
            top[w] = _mm512_max_ps(top[w], x);
        }
}

// Softmax of settled scores, whose largest are `top`, from key `begin` to `end`, both even: every second row becomes the
// pairs of its and the next row's weights, not divided by their sums yet. 1 over those goes to `inverse`.
template <int WIDE>
FOR_BF16 inline void softmax_lanes(const Shape& s, float* scores, const __m512* top, int begin, int end,
                                   __m512* inverse) {
    const __m512 factor = power(s);
    __m512 total[WIDE];
    for (int w = 0; w < WIDE; w++) total[w] = _mm512_setzero_ps();
    for (int j = begin; j < end; j += 2)
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) {
            float* at = scores + int64_t(j) * QUERIES + w * LANES;
            // Not in one step, which rounds the largest score's own product: of scores beyond 2^31 that overflows.
            const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(at), top[w]);
            const __m512 next_below = _mm512_sub_ps(_mm512_loadu_ps(at + QUERIES), top[w]);
            const __m512 one = exp2_(_mm512_mul_ps(below, factor)), other = exp2_(_mm512_mul_ps(next_below, factor));
            total[w] = _mm512_add_ps(total[w], _mm512_add_ps(one, other));
            _mm512_storeu_si512(at, zipped((__m512i)_mm512_cvtne2ps_pbh(other, one)));
        }
    for (int w = 0; w < WIDE; w++) inverse[w] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[w]);
}

// Up to 16 * WIDE queries of one head of keys, from row `first` on, against all that they see.
template <int WIDE>
FOR_BF16 void attend_lanes(const Shape& s, const uint16_t* q, const uint16_t* const* keys, const uint16_t* values,
                           uint16_t* o, int past, int first, int count, int length, float* scores) {
    alignas(64) int32_t queries[128 * QUERIES], places[QUERIES];
    alignas(64) float result[256 * QUERIES];
    int64_t from[QUERIES], to[QUERIES];
    const int size = s.head_size;
    find_rows(s, past, first, count, WIDE * LANES, places, from, to);
    turn_queries(q, from, count, size, queries);
    const int begin = visible(s, places[0], length).begin & ~1;
    const int last = visible(s, places[count - 1], length).end, end = round_up(last, 2);
    const Range all_see = {visible(s, places[count - 1], length).begin, visible(s, places[0], length).end};
    const bool as_they_are = s.softcap == 0 && !s.bias.table;
    __m512 top[WIDE], inverse[WIDE];
    for (int w = 0; w < WIDE; w++) top[w] = lowest();
    for (int j = begin; j < last; j += KEYS) {
        const uint16_t* rows[KEYS];
        for (int n = 0; n < KEYS; n++) rows[n] = keys[std::min(j + n, last - 1)];
        const int stop = std::min(j + KEYS, end);
        __m512 of_block[WIDE];
        products<WIDE>(rows, 2, queries, QUERIES, size / 2, scores + int64_t(j) * QUERIES, of_block);
        if (!as_they_are || j < all_see.begin || stop > all_see.end)
            settle<WIDE>(s, scores, places, count, j, stop, length, of_block);
        for (int w = 0; w < WIDE; w++) top[w] = _mm512_max_ps(top[w], of_block[w]);
    }
    softmax_lanes<WIDE>(s, scores, top, begin, end, inverse);
    auto weights = reinterpret_cast<const int32_t*>(scores + int64_t(begin) * QUERIES);
    for (int d = 0; d < size; d += KEYS) {
        const uint16_t* columns[KEYS];
        for (int n = 0; n < KEYS; n++) columns[n] = values + (int64_t(begin / 2) * size + d + n) * 2;
        products<WIDE>(columns, 2 * size, weights, 2 * QUERIES, (end - begin) / 2, result + d * QUERIES);
    }
    for (int w = 0; w < WIDE; w++)
        put_lanes(result + w * LANES, inverse[w], size, count - w * LANES, to + w * LANES, o);
}

struct Bfloat16 {
    const uint16_t** keys;  // [tokens]: where each one's is
    uint16_t* copies;       // [tokens][head_size] of keys
    uint16_t* values;       // [tokens / 2][head_size][2]
    float* scores;          // [tokens][QUERIES]

    FOR_BF16 Bfloat16(int size, int longest) {
        static thread_local std::vector<const uint16_t*> keys_held;
        static thread_local std::vector<uint16_t> copies_held, values_held;
        static thread_local std::vector<float> scores_held;
        keys = scratch(keys_held, longest);
        copies = scratch(copies_held, size_t(size) * longest);
        values = scratch(values_held, size_t(size) * round_up(longest, 2));
        scores = scratch(scores_held, size_t(QUERIES) * (longest + KEYS));
    }

    FOR_BF16 void lay(const Shape& s, const uint16_t* k, const uint16_t* v, const int64_t* at, int begin, int length) {
        const bool copied = length > NEAR;
        for (int j = begin; j < length; j++) {
            keys[j] = k + at[j] * s.k_stride;
            if (!copied) continue;
            uint16_t* copy = copies + int64_t(j) * s.head_size;
            for (int d = 0; d < s.head_size; d += LANES)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(copy + d),
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys[j] + d)));
            keys[j] = copy;
        }
        pair_rows(v, at, s.v_stride, begin, length, s.head_size, values);
    }

    FOR_BF16 void attend(const Shape& s, const uint16_t* q, uint16_t* o, int past, int queries, int length) {
        const int rows = queries * (s.heads / s.kv_heads), most = s.window ? LANES : QUERIES;  // fewer: narrower in all
        for (int first = 0; first < rows; first += most) {
            const int count = std::min(most, rows - first);
            const auto tile = count > LANES ? attend_lanes<2> : attend_lanes<1>;
            tile(s, q, keys, values, o, past, first, count, length, scores);
        }
    }
};

}  // namespace

FOR_BF16 void attend_in_lanes(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                              const Batch& batch) {
    attend_batch<Bfloat16>(s, q, k, v, o, batch);
}
