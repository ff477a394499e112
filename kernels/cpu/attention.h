// What attention is asked for, and of whom: the same for every instruction set.
#pragma once

#include "vector.h"

// Float32 [heads, stride], for heads that have keys of their own: what is added to the score of a key that stands d tokens
// behind its query is table[., middle + d]. Without a table nothing is.
struct Bias {
    const float* table;
    int64_t stride, middle;
};

struct Shape {
    int heads, kv_heads, head_size;
    int64_t q_stride, k_stride, v_stride, o_stride;  // elements from one token to the next
    float scale, softcap;                            // softcap 0: none
    int causal, window;                              // window 0: none; a token sees those less than `window` away
    Bias bias;

    // What a product, capped or not, is to be multiplied with before a bias is added: a cap comes with the scale.
    float scale_before_bias() const { return softcap != 0 ? 1.0f : scale; }

    // What a score is still to be multiplied with once it is capped and biased.
    float left_to_scale() const { return bias.table ? 1.0f : scale_before_bias(); }

    // The same for heads from the n-th on.
    Shape from_head(int n) const {
        Shape rest = *this;
        if (bias.table) rest.bias.table += n * bias.stride;
        return rest;
    }
};

// Whose tokens are whose. Queries stand one sequence behind the other; so do keys and values, unless they are in pages:
// then a sequence has `key_lengths` of them, and its queries are the last of its tokens.
struct Batch {
    const int32_t* cu_seqlens;  // [sequences + 1]
    const int32_t* pages;       // [sequences, most_pages], null for none
    const int32_t* key_lengths;
    int sequences, most_pages, page_size;

    int queries(int b) const { return cu_seqlens[b + 1] - cu_seqlens[b]; }
    int length(int b) const { return pages ? key_lengths[b] : queries(b); }
    const int32_t* pages_of(int b) const { return pages + int64_t(b) * most_pages; }

    // In which row a token's keys and values are.
    int64_t row(int b, int token) const {
        if (!pages) return cu_seqlens[b] + token;
        return int64_t(pages_of(b)[token / page_size]) * page_size + token % page_size;
    }

    // How many tokens at its beginning lie where those of the sequence before it do.
    int shared(int b) const {
        if (!pages || b == 0 || !queries(b) || !queries(b - 1)) return 0;
        const int most = std::min(length(b), length(b - 1));
        const int32_t *own = pages_of(b), *before = pages_of(b - 1);
        int tokens = 0;
        for (int i = 0; tokens < most && own[i] == before[i]; i++) tokens += page_size;
        return std::min(tokens, most);
    }
};

struct Range {
    int begin, end;
};

// Which keys the query at place i sees.
inline Range visible(const Shape& s, int i, int length) {
    int begin = s.window ? std::max(0, i - s.window + 1) : 0;
    int end = s.causal ? i + 1 : s.window ? std::min(length, i + s.window) : length;
    return {begin, end};
}

extern "C" {

// query [T, heads, head_size], key and value [rows, kv_heads, head_size], out as query; strides in elements, heads and
// head_size contiguous. head_size is a multiple of 16, at most 256. Keys and values in pages are attended causally.
// `level` as `carpool_cpu_level` has it. Returned is what `in_memory` does.
int carpool_attention_f32(const float* q, const float* k, const float* v, float* o, const Batch* batch,
                          const Shape* shape, int level);
int carpool_attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, const Batch* batch,
                           const Shape* shape, int level);

// Tokens of `bytes` each, strides in bytes, into the rows of both caches that `slots` name; those out of range are left
// out.
void carpool_kv_write(const char* keys, const char* values, int64_t k_stride, int64_t v_stride, const int64_t* slots,
                      int64_t tokens, int64_t bytes, char* key_cache, char* value_cache, int64_t rows);
}

// The same of one instruction set, by this thread alone: `avx2` and `avx512` in float32 arithmetic, `lanes` with AVX-512
// BF16, `tiles` on AMX.
void attend_in_avx2(const Shape& shape, const float* q, const float* k, const float* v, float* o, const Batch& batch);
void attend_in_avx2(const Shape& shape, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                    const Batch& batch);
void attend_in_avx512(const Shape& shape, const float* q, const float* k, const float* v, float* o, const Batch& batch);
void attend_in_avx512(const Shape& shape, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                      const Batch& batch);
void attend_in_lanes(const Shape& shape, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                     const Batch& batch);
void attend_in_tiles(const Shape& shape, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                     const Batch& batch);
