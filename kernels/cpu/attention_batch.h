// The way of a batch through attention, for kernels that take one head of one sequence at a time: attention_f32.cpp and
// attention_bf16.cpp give the arithmetic, each a type Path of
//
//     Path(size, longest)   room for one head of the longest sequence
//     lay                   keys and values from a token on, into the layout that its inner loops stream
//     attend                queries, over all that is laid
//
// What sequences in pages have in common with the one before them is still laid out from there, and is not copied again.
#pragma once

#include "attention.h"

namespace {

constexpr int BLOCK = 2 * LANES;  // keys that are begun together: what is laid begins with a whole block of them
// Queries of a windowed sequence that every head is through with before the next ones begin: their rows, and those of
// the keys they see, stay in a cache. A multiple of every block of queries: so those are the same as without.
constexpr int PIECE = 384;

// Sequences from `first` to before `end`, of which each begins where the one before it does: head by head of the keys,
// and only what differs is laid out anew. Of one that has a run of its own, queries `from` to `to`. `at`: room for the
// row of each token of one.
template <typename Path, typename T>
INLINE void attend_run(const Shape& s, Path& path, const T* q, const T* k, const T* v, T* o, const Batch& batch,
                       int first, int end, int from, int to, int64_t* at) {
    const int group = s.heads / s.kv_heads, size = s.head_size;
    for (int kv = 0; kv < s.kv_heads; kv++) {
        const Shape own = s.from_head(kv * group);
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
            path.attend(own, q + start * s.q_stride + kv * group * size, o + start * s.o_stride + kv * group * size,
                        past, queries, length);
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

}  // namespace
