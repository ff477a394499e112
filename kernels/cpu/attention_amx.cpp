// Attention in bfloat16 on CPUs with AMX. What it computes is attention.cpp's; so is the order of rows.
//
// Lanes are queries (attention_lanes.h): scores lie [key][query], and weights come out as the pairs of keys that the
// second product wants. On the left of both products stand the keys [16 keys][32 of head_size] and the values turned [16
// of head_size][32 keys]: laid out as tiles once for each head of keys, zeros where a head or a sequence ends within one.
//
// Scores of KEYS keys at a time stay in the first-level cache; what came before is scaled down when a larger score turns
// up. Up to KEYS keys there is one such block, and no scaling.
#include "amx.h"
#include "attention_lanes.h"

#include <new>

namespace {

constexpr int KEYS = 256;  // a block: 32 KB of scores
constexpr int HEAD = 256;  // the largest size

// Shorter sequences leave most of a tile empty. Counted in instructions, not measured: 8 tokens of 32 are 256 products
// of AVX-512, which cost less than laying out their tiles; 16 are 1,024, which cost more.
constexpr int FEWEST = 16;

// Keys and values of one head of one sequence, in tiles.
struct Laid {
    uint16_t* keys;    // [tokens / 16][deep][16][32]
    uint16_t* values;  // [tokens / 32][2 * deep][16][32]
    int deep;          // tiles that hold a key

    const uint16_t* keys_at(int j) const { return keys + int64_t(j / SIDE) * deep * TILE; }
    const uint16_t* values_at(int j, int d) const {
        return values + (int64_t(j / DEPTH) * 2 * deep + d / SIDE) * TILE;
    }
};

// Tokens from `begin`, a multiple of 32, to `length`, token j from row at[j].
FOR_AMX void lay_keys(const Laid& laid, const Shape& s, const uint16_t* k, const int64_t* at, int begin, int length) {
    for (int j = begin; j < round_up(length, DEPTH); j += SIDE)
        for (int i = 0; i < SIDE; i++)
            for (int d = 0; d < laid.deep; d++) {
                const int left = j + i < length ? std::min(DEPTH, s.head_size - d * DEPTH) : 0;
                const __mmask32 there = uint32_t((uint64_t(1) << left) - 1);
                const uint16_t* from = left ? k + at[j + i] * s.k_stride + d * DEPTH : k;
                uint16_t* to = laid.keys + (int64_t(j / SIDE) * laid.deep + d) * TILE + i * DEPTH;
                _mm512_store_si512(to, _mm512_maskz_loadu_epi16(there, from));
            }
}

FOR_AMX void lay_values(const Laid& laid, const Shape& s, const uint16_t* v, const int64_t* at, int begin, int length) {
    for (int j = begin; j < length; j += DEPTH)
        for (int d = 0; d < 2 * laid.deep; d++) {
            ivec pairs[SIDE];  // of tokens, in 16 columns
            for (int p = 0; p < SIDE; p++) {
                __m256i half[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                for (int e = 0; e < 2; e++) {
                    const int token = j + 2 * p + e;
                    if (token >= length || d * SIDE >= s.head_size) continue;
                    const uint16_t* from = v + at[token] * s.v_stride + d * SIDE;
                    half[e] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
                }
                pairs[p] = (ivec)zipped(_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1));
            }
            transpose(pairs);
            uint16_t* to = laid.values + (int64_t(j / DEPTH) * 2 * laid.deep + d) * TILE;
            for (int i = 0; i < SIDE; i++) _mm512_store_si512(to + i * DEPTH, (__m512i)pairs[i]);
        }
}

// Up to 16 * WIDE queries of one head of keys, and what is known of them so far.
template <int WIDE>
struct Block {
    alignas(64) int32_t queries[HEAD / 2 * QUERIES];  // [pairs of head_size][QUERIES]
    alignas(64) float scores[KEYS * QUERIES];         // then weights, as pairs [KEYS / 2][QUERIES]
    alignas(64) float result[HEAD * QUERIES];         // [head_size][QUERIES], not divided by `total` yet
    alignas(64) float top[QUERIES], total[QUERIES];   // largest score, sum of weights
    int32_t places[QUERIES];                          // in the sequence, rising
    int64_t from[QUERIES], to[QUERIES];               // of rows of query and out
    int count;

    void find(const Shape& s, int past, int first, int rows) {
        count = rows;
        find_rows(s, past, first, count, QUERIES, places, from, to);
        std::fill(top, top + QUERIES, std::numeric_limits<float>::lowest());  // finite: less itself it is 0
        std::fill(total, total + QUERIES, 0.0f);
    }

    FOR_AMX void turn(const uint16_t* q, int size, int deep) {
        for (int w = 0; w < WIDE; w++)
            for (int d = 0; d < deep; d++) {
                ivec r[SIDE];
                const uint32_t there = uint32_t((uint64_t(1) << std::min(DEPTH, size - d * DEPTH)) - 1);
                for (int i = 0; i < SIDE; i++) {
                    const int row = w * SIDE + i;
                    r[i] = (ivec)(row < count ? _mm512_maskz_loadu_epi16(there, q + from[row] + d * DEPTH)
                                              : _mm512_setzero_si512());
                }
                transpose(r);
                for (int i = 0; i < SIDE; i++)
                    _mm512_store_si512(queries + (d * SIDE + i) * QUERIES + w * SIDE, (__m512i)r[i]);
            }
    }

    // Pairs [.][QUERIES] on the right of a product.
    static Operand right(const void* pairs) {
        return {static_cast<const uint16_t*>(pairs), 2 * SIDE, 2 * SIDE * QUERIES, 4 * QUERIES};
    }

    // Of `keys` keys from j on, a multiple of 32.
    FOR_AMX void score(const Laid& laid, int j, int keys) {
        auto nothing = [] {};
        for (int i = 0; i < keys; i += DEPTH) {
            zero_sums();
            const Operand left = {laid.keys_at(j + i), laid.deep * TILE, TILE, 2 * DEPTH};
            add_products<2, WIDE, false>(left, right(queries), laid.deep, nothing);
            store_sums<2, WIDE>(scores + i * QUERIES, QUERIES);
        }
    }

    // Scores of keys that not all of these queries see, where one does not.
    FOR_AMX void hide(const Shape& s, int j, int keys, int length) {
        const Range all = {visible(s, places[WIDE * SIDE - 1], length).begin, visible(s, places[0], length).end};
        const __m512 low = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int i = 0; i < keys; i++) {
            if (j + i >= all.begin && j + i < all.end) i = std::min(all.end - j, keys);
            for (int w = 0; w < WIDE && i < keys; w++) {
                float* at = scores + i * QUERIES + w * SIDE;
                const __mmask16 sees = who_sees(s, j + i, length, _mm512_loadu_si512(places + w * SIDE));
                _mm512_store_ps(at, _mm512_mask_mov_ps(low, sees, _mm512_load_ps(at)));
            }
        }
    }

    // Four at a time, of 16 queries: one maximum would wait for the one before it.
    FOR_AMX static __m512 largest(const float* lane, int keys) {
        __m512 top[4];
        for (int n = 0; n < 4; n++) top[n] = _mm512_load_ps(lane + n * QUERIES);
        for (int i = 4; i < keys; i += 4)
            for (int n = 0; n < 4; n++) top[n] = _mm512_max_ps(top[n], _mm512_load_ps(lane + (i + n) * QUERIES));
        return _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    }

    // Scores of `keys` keys from j on are capped, biased and hidden, and what came before them is scaled to the largest.
    FOR_AMX void rank(const Shape& s, int j, int keys, int length) {
        if (s.softcap != 0)
            for (int i = 0; i < keys * QUERIES; i += QUERIES)
                for (int n = i; n < i + WIDE * LANES; n += LANES)
                    _mm512_store_ps(scores + n, capped(s, _mm512_load_ps(scores + n)));
        if (s.bias.table)
            for (int i = 0; i < std::min(keys, length - j); i++)
                for (int w = 0; w < WIDE; w++) {
                    float* at = scores + i * QUERIES + w * SIDE;
                    _mm512_store_ps(at, biased(s, _mm512_load_ps(at), j + i, places[0] + w * SIDE, count - w * SIDE));
                }
        hide(s, j, keys, length);
        for (int w = 0; w < WIDE; w++) {
            const __m512 before = _mm512_load_ps(top + w * SIDE);
            const __m512 now = _mm512_max_ps(before, largest(scores + w * SIDE, keys));
            if (_mm512_cmp_ps_mask(before, now, _CMP_EQ_OQ) == 0xffff) continue;
            const __m512 less = exp2_(_mm512_mul_ps(_mm512_sub_ps(before, now), power(s)));
            _mm512_store_ps(top + w * SIDE, now);
            _mm512_store_ps(total + w * SIDE, _mm512_mul_ps(_mm512_load_ps(total + w * SIDE), less));
            for (int d = 0; d < s.head_size; d++) {
                float* at = result + d * QUERIES + w * SIDE;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), less));
            }
        }
    }

    // Scores of 32 keys, the block's i-th and those behind it, become weights, and count in `total`.
    FOR_AMX void weigh(const Shape& s, int i) {
        const __m512 factor = power(s);
        for (int w = 0; w < WIDE; w++) {
            const float* from = scores + i * QUERIES + w * SIDE;
            float* to = scores + i / 2 * QUERIES + w * SIDE;
            const __m512 highest = _mm512_load_ps(top + w * SIDE);
            __m512 sum = _mm512_load_ps(total + w * SIDE);
            for (int n = 0; n < DEPTH; n += 2, from += 2 * QUERIES, to += QUERIES) {
                const __m512 one = _mm512_sub_ps(_mm512_load_ps(from), highest);
                const __m512 other = _mm512_sub_ps(_mm512_load_ps(from + QUERIES), highest);
                const __m512 first = exp2_(_mm512_mul_ps(one, factor)), second = exp2_(_mm512_mul_ps(other, factor));
                sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
                _mm512_store_si512(to, zipped((__m512i)_mm512_cvtne2ps_pbh(second, first)));
            }
            _mm512_store_ps(total + w * SIDE, sum);
        }
    }

    // result += weights of `keys` keys from j on times their values. Weights are made on the way, those of the next keys
    // while these are multiplied: they take longer than the products.
    FOR_AMX void add_values(const Shape& s, const Laid& laid, int j, int keys) {
        int made = 0;
        auto make = [&]() FOR_AMX {
            if (made < keys) weigh(s, made), made += DEPTH;
        };
        make();
        for (int d = 0; d < laid.deep * DEPTH; d += DEPTH) {
            load_sums<2, WIDE>(result + d * QUERIES, QUERIES);
            const Operand left = {laid.values_at(j, d), TILE, 2 * laid.deep * TILE, 2 * DEPTH};
            add_products<2, WIDE, false>(left, right(scores), keys / DEPTH, make);
            store_sums<2, WIDE>(result + d * QUERIES, QUERIES);
        }
    }

    FOR_AMX void write(uint16_t* o, int size) {
        for (int w = 0; w < WIDE; w++) {
            const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(total + w * SIDE));
            put_lanes(result + w * SIDE, inverse, size, count - w * SIDE, to + w * SIDE, o);
        }
    }

    FOR_AMX void attend(const Shape& s, const Laid& laid, const uint16_t* q, uint16_t* o, int past, int first, int rows,
                        int length) {
        find(s, past, first, rows);
        turn(q, s.head_size, laid.deep);
        std::fill(result, result + laid.deep * DEPTH * QUERIES, 0.0f);
        const int begin = visible(s, places[0], length).begin / DEPTH * DEPTH;
        const int end = round_up(visible(s, places[count - 1], length).end, DEPTH);
        for (int j = begin; j < end; j += KEYS) {
            const int keys = std::min(KEYS, end - j);
            score(laid, j, keys);
            rank(s, j, keys, length);
            add_values(s, laid, j, keys);
        }
        write(o, s.head_size);
    }
};

// All queries of one sequence. `at`: the row of each of its tokens.
FOR_AMX void attend_sequence(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                             const int64_t* at, int queries, int length) {
    static thread_local std::vector<uint16_t> keys_held, values_held;
    static thread_local std::vector<char> block_held;
    const int group = s.heads / s.kv_heads, size = s.head_size, deep = (size + DEPTH - 1) / DEPTH;
    const size_t tokens = round_up(length, DEPTH);
    const Laid laid = {scratch(keys_held, tokens * deep * DEPTH), scratch(values_held, tokens * deep * DEPTH), deep};
    char* memory = scratch(block_held, std::max(sizeof(Block<1>), sizeof(Block<2>)));
    const int begin = visible(s, length - queries, length).begin / DEPTH * DEPTH;
    for (int kv = 0; kv < s.kv_heads; kv++) {
        lay_keys(laid, s, k + kv * size, at, begin, length);
        lay_values(laid, s, v + kv * size, at, begin, length);
        const Shape own = s.from_head(kv * group);
        const uint16_t* head_q = q + kv * group * size;
        uint16_t* head_o = o + kv * group * size;
        for (int first = 0; first < queries * group; first += QUERIES) {
            const int rows = std::min(QUERIES, queries * group - first);
            const int past = length - queries;
            if (rows > SIDE)
                (new (memory) Block<2>)->attend(own, laid, head_q, head_o, past, first, rows, length);
            else
                (new (memory) Block<1>)->attend(own, laid, head_q, head_o, past, first, rows, length);
        }
    }
}

// A batch's sequences from `first` to before `end`.
inline Batch part(const Batch& batch, int first, int end) {
    Batch some = batch;
    some.cu_seqlens += first;
    some.sequences = end - first;
    if (batch.pages) some.pages = batch.pages_of(first), some.key_lengths += first;
    return some;
}

}  // namespace

void attend_in_tiles(const Shape& shape, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                     const Batch& batch) {
    static thread_local std::vector<int64_t> at_held;
    const Tiles tiles;
    for (int b = 0, end; b < batch.sequences; b = end) {
        for (end = b; end < batch.sequences && batch.length(end) < FEWEST; end++) {
        }
        if (end > b) {
            const Batch some = part(batch, b, end);
            attend_in_lanes(shape, q, k, v, o, some);
            continue;
        }
        end = b + 1;
        const int queries = batch.queries(b), length = batch.length(b);
        if (!queries) continue;
        int64_t* at = scratch(at_held, length);
        for (int j = 0; j < length; j++) at[j] = batch.row(b, j);
        const int64_t start = batch.cu_seqlens[b];
        attend_sequence(shape, q + start * shape.q_stride, k, v, o + start * shape.o_stride, at, queries, length);
    }
}
