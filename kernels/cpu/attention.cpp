// Attention within each sequence of a packed row, or to keys and values in the pages of a cache, for x86-64 CPUs. The
// torch twin and specification is kernels/reference.py; the Python face is kernels/native.py.
//
// Plain C ABI, single-threaded but for whose heads idle cores take (crew.h), no headers of torch or Python: it builds in
// seconds and fits any of them. Instruction sets are chosen per function, at run time; nothing here needs -march.
//
// For one head of one sequence in float32, keys and values are copied once into the layout that the inner loops stream
// (K transposed, so that 16 keys fill a register). Then ROWS queries at a time: scores, softmax, weighted sum. In
// bfloat16, queries fill the registers instead: see below. Either way all of a query's scores are kept, so there is one
// exponential a score and no rescaling. Sums are float32.
//
// The queries of one head of keys are rows: a token's heads of the group stand together, then the next token's. What
// sequences in pages have in common with the one before them is still laid out from there, and is not copied again.
#include "attention.h"
#include "crew.h"
#include "transpose.h"

#ifndef CARPOOL_SOURCES
#define CARPOOL_SOURCES ""
#endif

namespace {

constexpr int ROWS = 6;           // queries a block in float32: 6 x 2 accumulators leave registers for operands
constexpr int BLOCK = 2 * LANES;  // keys a block in float32
// Queries of a windowed sequence that every head is through with before the next ones begin: their rows, and those of
// the keys they see, stay in a cache. A multiple of every block of queries: so those are the same as without.
constexpr int PIECE = 384;

template <typename V>
INLINE V power_of_e(V x) {
    if constexpr (sizeof(V) == 64)
        return (V)exp2_finely((__m512)(x * 1.44269504f));
    else
        return exp_(x);
}

// Scores of one query, in place: scaled, capped, masked to what it sees, exponentials; returns 1 / their sum.
template <int W>
INLINE float softmax_row(const Shape& s, float* row, Range keys, int begin, int end) {
    if (s.softcap != 0)
        for (int j = keys.begin; j < keys.end; j++) row[j] = s.softcap * std::tanh(row[j] * s.scale / s.softcap);
    const float factor = s.softcap != 0 ? 1.0f : s.scale;
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

// ── float32 arithmetic, for any CPU ─────────────────────────────────────────────────────────────────────────────────

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
                inverse[n] = softmax_row<W>(s, row[n], visible(s, past + token[n], length), begin, end);
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

// ── bfloat16 products (AVX-512 BF16): a pair of products and their float32 sum in each lane ─────────────────────────
//
// The lanes are queries, 16 or 32 of them; keys and values come in as broadcasts. So a softmax runs down its lane and
// nothing is ever summed across one, and no key is multiplied in vain. Keys are read as they are; those of a long
// sequence from a copy, for a head's are thousands of bytes apart: a page each, and soon in no cache. Queries and
// results are transposed on the way, which costs a few percent.

constexpr int KEYS = 8;              // keys of a block of scores, columns of a block of results
constexpr int QUERIES = 2 * LANES;   // of a block; floats from one key's scores to the next key's
constexpr int NEAR = 512;            // tokens of a sequence whose keys are read where they lie

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

// Products of KEYS rows of `size` bfloat16, or of pairs `row_stride` apart, with WIDE registers of queries' pairs.
template <int WIDE>
FOR_BF16 inline void products(const uint16_t* const* rows, int64_t step, const int32_t* queries, int64_t query_step,
                              int count, float* out) {
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
}

// Which of 16 queries, by their places, see key j.
FOR_BF16 inline __mmask16 who_sees(const Shape& s, int j, __m512i query) {
    __mmask16 sees = 0xffff;
    if (s.causal) sees &= _mm512_cmpge_epi32_mask(query, _mm512_set1_epi32(j));
    if (s.window) sees &= _mm512_cmplt_epi32_mask(query, _mm512_set1_epi32(j + s.window));
    if (s.window) sees &= _mm512_cmpgt_epi32_mask(query, _mm512_set1_epi32(j - s.window));
    return sees;
}

// Softmax of scores [keys][QUERIES] from key `begin` to `end`, both even, of WIDE registers of queries at rising
// `places`: every second row becomes the pairs of its and the next row's weights, not divided by their sums yet. 1 over
// those goes to `inverse`.
template <int WIDE>
FOR_BF16 inline void softmax_lanes(const Shape& s, float* scores, const int32_t* places, int begin, int end, int length,
                                   __m512* inverse) {
    const __m512 low = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const Range all_see = {visible(s, places[WIDE * LANES - 1], length).begin, visible(s, places[0], length).end};
    __m512 top[WIDE], total[WIDE];
    for (int w = 0; w < WIDE; w++) top[w] = low, total[w] = _mm512_setzero_ps();
    for (int j = begin; j < end; j++) {
        const bool masked = j < all_see.begin || j >= all_see.end;
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; w++) {
            float* at = scores + int64_t(j) * QUERIES + w * LANES;
            __m512 x = _mm512_loadu_ps(at);
            if (s.softcap != 0) {
                const vec wide = (vec)x * (s.scale / s.softcap);
                const vec e = exp_(-2.0f * abs_(wide));
                const vec tanh = (1.0f - e) / (1.0f + e);
                x = (__m512)((ivec)(tanh * s.softcap) | ((ivec)wide & int32_t(0x80000000)));
            }
            const __m512i place = _mm512_loadu_si512(places + w * LANES);
            if (masked) x = j < length ? _mm512_mask_mov_ps(low, who_sees(s, j, place), x) : low;
            if (masked || s.softcap != 0) _mm512_storeu_ps(at, x);
            top[w] = _mm512_max_ps(top[w], x);
        }
    }
    const __m512 factor = _mm512_set1_ps((s.softcap != 0 ? 1.0f : s.scale) * 1.44269504f);  // to powers of two
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
    const int size = s.head_size, group = s.heads / s.kv_heads;
    for (int i = 0, token = first / group, head = first % group; i < count; i++) {
        places[i] = past + token, from[i] = token * s.q_stride + head * size, to[i] = token * s.o_stride + head * size;
        if (++head == group) head = 0, token++;
    }
    std::fill(places + count, places + WIDE * LANES, places[count - 1]);
    turn_queries(q, from, count, size, queries);
    const int begin = visible(s, places[0], length).begin & ~1;
    const int last = visible(s, places[count - 1], length).end, end = round_up(last, 2);
    for (int j = begin; j < last; j += KEYS) {
        const uint16_t* rows[KEYS];
        for (int n = 0; n < KEYS; n++) rows[n] = keys[std::min(j + n, last - 1)];
        products<WIDE>(rows, 2, queries, QUERIES, size / 2, scores + int64_t(j) * QUERIES);
    }
    __m512 inverse[WIDE];
    softmax_lanes<WIDE>(s, scores, places, begin, end, length, inverse);
    auto weights = reinterpret_cast<const int32_t*>(scores + int64_t(begin) * QUERIES);
    for (int d = 0; d < size; d += KEYS) {
        const uint16_t* columns[KEYS];
        for (int n = 0; n < KEYS; n++) columns[n] = values + (int64_t(begin / 2) * size + d + n) * 2;
        products<WIDE>(columns, 2 * size, weights, 2 * QUERIES, (end - begin) / 2, result + d * QUERIES);
    }
    for (int w = 0; w < WIDE; w++)
        for (int d = 0; d < size; d += LANES) {
            ivec r[LANES];
            for (int i = 0; i < LANES; i++)
                r[i] = (ivec)_mm512_mul_ps(_mm512_loadu_ps(result + (d + i) * QUERIES + w * LANES), inverse[w]);
            transpose(r);
            for (int i = 0; i < std::min(LANES, count - w * LANES); i++)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(o + to[w * LANES + i] + d),
                                    (__m256i)_mm512_cvtneps_pbh((__m512)r[i]));
        }
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

// ── whole batches ───────────────────────────────────────────────────────────────────────────────────────────────────

// Sequences from `first` to before `end`, of which each begins where the one before it does: head by head of the keys,
// and only what differs is laid out anew. Of one that has a run of its own, queries `from` to `to`. `at`: room for the
// row of each token of one.
template <typename Path, typename T>
INLINE void attend_run(const Shape& s, Path& path, const T* q, const T* k, const T* v, T* o, const Batch& batch,
                       int first, int end, int from, int to, int64_t* at) {
    const int group = s.heads / s.kv_heads, size = s.head_size;
    for (int kv = 0; kv < s.kv_heads; kv++) {
        int laid = 0;  // from this token on
        for (int b = first; b < end; b++) {
            const int64_t start = batch.cu_seqlens[b] + from;
            const int queries = std::min(batch.queries(b), to) - from;
            const int past = batch.length(b) - batch.queries(b) + from;
            const int begin = visible(s, past, batch.length(b)).begin / BLOCK * BLOCK;
            const int seen = visible(s, past + queries - 1, batch.length(b)).end;
            const int length = std::min(round_up(seen, BLOCK), batch.length(b));  // for those who are here
            int fresh = b == first ? 0 : batch.shared(b) & ~1;  // bfloat16 lays pairs
            if (fresh <= begin || begin < laid) fresh = laid = begin;
            if (kv == 0 || end - first > 1)
                for (int j = fresh; j < length; j++) at[j] = batch.row(b, j);
            path.lay(s, k + kv * size, v + kv * size, at, fresh, length);
            path.attend(s, q + start * s.q_stride + kv * group * size, o + start * s.o_stride + kv * group * size, past,
                        queries, length);
        }
    }
}

template <typename Path, typename T>
INLINE void attend_batch(const Shape& s, const T* q, const T* k, const T* v, T* o, const Batch& batch) {
    static thread_local std::vector<int64_t> at_held;
    int longest = 0;
    for (int b = 0; b < batch.sequences; b++) longest = std::max(longest, batch.length(b));
    int64_t* at = scratch(at_held, longest);
    Path path(s.head_size, longest);
    for (int first = 0, end; first < batch.sequences; first = end) {
        for (end = first + 1; end < batch.sequences && batch.shared(end); end++) {
        }
        const int queries = batch.queries(first), piece = s.window && end == first + 1 ? PIECE : longest;
        for (int from = 0; from < queries; from += piece)
            attend_run(s, path, q, k, v, o, batch, first, end, from, from + piece, at);
    }
}

template <typename T>
using Kernel = void (*)(const Shape&, const T*, const T*, const T*, T*, const Batch&);

template <typename T>
FOR_AVX512 void in_f32_avx512(const Shape& s, const T* q, const T* k, const T* v, T* o, const Batch& batch) {
    attend_batch<Float32<T, 16>>(s, q, k, v, o, batch);
}
template <typename T>
FOR_AVX2 void in_f32_avx2(const Shape& s, const T* q, const T* k, const T* v, T* o, const Batch& batch) {
    attend_batch<Float32<T, 8>>(s, q, k, v, o, batch);
}
FOR_BF16 void in_bf16(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                      const Batch& batch) {
    attend_batch<Bfloat16>(s, q, k, v, o, batch);
}

// In parts of whole heads of keys.
template <typename T>
void in_parts(Kernel<T> kernel, int64_t least, const Shape& s, const T* q, const T* k, const T* v, T* o, const Batch& batch) {
    int64_t scores = 0;  // of a head; a causal one computes half of them
    for (int b = 0; b < batch.sequences; b++) scores += int64_t(batch.queries(b)) * batch.length(b);
    const int parts = parts_of(2 * scores * s.heads * s.head_size, s.kv_heads, least), size = s.head_size;
    if (parts <= 1) return kernel(s, q, k, v, o, batch);
    share(parts, [&](int i) {
        const int first = s.kv_heads * i / parts, count = s.kv_heads * (i + 1) / parts - first;
        const int group = s.heads / s.kv_heads;
        Shape part = s;
        part.heads = group * count, part.kv_heads = count;
        kernel(part, q + first * group * size, k + first * size, v + first * size, o + first * group * size, batch);
    });
}

}  // namespace

void attend_in_lanes(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                     const Batch& batch) {
    in_bf16(s, q, k, v, o, batch);
}

extern "C" {

// Of which sources this was made: as kernels/native.py digests them.
const char* carpool_cpu_sources() { return CARPOOL_SOURCES; }

int carpool_has_amx();  // amx.cpp

// The best instruction set this CPU has for the kernels: 0 none that serves, 1 AVX2, 2 AVX-512, 3 AVX-512 BF16, 4 that and
// AMX in bfloat16.
int carpool_cpu_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return carpool_has_amx() > 0 ? 4 : 3;
}

int carpool_attention_f32(const float* q, const float* k, const float* v, float* o, const Batch* batch,
                          const Shape* shape, int level) {
    Kernel<float> kernel = level >= AVX512 ? in_f32_avx512<float> : in_f32_avx2<float>;
    return in_memory([&] { in_parts(kernel, LEAST, *shape, q, k, v, o, *batch); });
}

int carpool_attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, const Batch* batch,
                           const Shape* shape, int level) {
    Kernel<uint16_t> kernel = level >= AMX           ? attend_in_tiles
                              : level == AVX512_BF16 ? in_bf16
                              : level == AVX512      ? in_f32_avx512<uint16_t>
                                                     : in_f32_avx2<uint16_t>;
    const int64_t least = level >= AMX ? LEAST_IN_TILES : LEAST;
    return in_memory([&] { in_parts(kernel, least, *shape, q, k, v, o, *batch); });
}

// The first sequence of a batch in pages that does not fit itself, or all `queries`, or a cache of `pages`; -1: none.
int carpool_paged_fault(const Batch* batch, int64_t queries, int64_t pages) {
    const int32_t* bounds = batch->cu_seqlens;
    for (int b = 0; b < batch->sequences; b++) {
        const int64_t own = int64_t(bounds[b + 1]) - bounds[b], length = batch->key_lengths[b];
        const int64_t used = (length + batch->page_size - 1) / batch->page_size;
        if ((b == 0 && bounds[b] != 0) || bounds[b + 1] > queries || own < 0 || own > length) return b;
        if (used > batch->most_pages) return b;
        for (int64_t i = 0; i < used; i++)
            if (batch->pages_of(b)[i] < 0 || batch->pages_of(b)[i] >= pages) return b;
    }
    return batch->sequences && bounds[batch->sequences] != queries ? batch->sequences - 1 : -1;
}

void carpool_kv_write(const char* keys, const char* values, int64_t k_stride, int64_t v_stride, const int64_t* slots,
                      int64_t tokens, int64_t bytes, char* key_cache, char* value_cache, int64_t rows) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0 || slots[t] >= rows) continue;
        std::memcpy(key_cache + slots[t] * bytes, keys + t * k_stride, bytes);
        std::memcpy(value_cache + slots[t] * bytes, values + t * v_stride, bytes);
    }
}
}
