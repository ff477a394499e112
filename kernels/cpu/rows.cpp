// What is done to rows around the products: embeddings, norms, gates, rotary positions, pooling. For x86-64 CPUs with AVX2 or
// AVX-512, chosen at run time. The torch twins are in kernels/reference/, the Python face is kernels/native_rows.py.
// Plain C ABI, single-threaded, as attention.cpp.
//
// Rows are float32 or bfloat16 and contiguous; their width is a multiple of 16. Arithmetic is float32 either way.
#include "rows.h"

namespace {

template <int W, typename From, typename To>
INLINE void normed(const Norm& n, const From* row, int width, To* out) {
    floats<W> sums = {}, squares = {};
    if (n.centred)
        for (int i = 0; i < width; i += W) sums += load<W>(row + i);
    const float mean = sum(sums) / width;
    for (int i = 0; i < width; i += W) {
        const floats<W> centred = load<W>(row + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / width + n.eps);
    for (int i = 0; i < width; i += W) {
        floats<W> y = (load<W>(row + i) - mean) * scale * load<W>(n.weight + i);
        if (n.bias) y += load<W>(n.bias + i);
        store(out + i, y);
    }
}

template <int W, typename T>
INLINE void norm_rows(const Norm& n, const T* x, const T* residual, int64_t rows, int width, T* out, T* total) {
    for (int64_t r = 0; r < rows; r++, x += width, out += width) {
        const T* row = x;
        if (residual) {
            for (int i = 0; i < width; i += W) store(total + i, load<W>(x + i) + load<W>(residual + i));
            row = total;
            residual += width;
            total += width;
        }
        normed<W>(n, row, width, out);
    }
}

// An embedding's rows [count, width], and which of them each token has; without `ids` the first.
struct Table {
    const void* rows;
    const int64_t* ids;
    int64_t count;
};

// Whether each table has the rows that the tokens ask for.
bool are_there(const Table* tables, int number, int64_t tokens) {
    for (int n = 0; n < number; n++) {
        if (!tables[n].ids && tokens && tables[n].count < 1) return false;
        for (int64_t t = 0; tables[n].ids && t < tokens; t++)
            if (tables[n].ids[t] < 0 || tables[n].ids[t] >= tables[n].count) return false;
    }
    return true;
}

// out [tokens, width] = norm(the sum of a token's rows). `room` is for one such sum.
template <int W, typename T>
INLINE void embed(const Norm& n, const Table* tables, int number, int64_t tokens, int width, float* room, T* out) {
    for (int64_t t = 0; t < tokens; t++, out += width) {
        std::memset(room, 0, width * sizeof(float));
        for (int k = 0; k < number; k++) {
            const T* row = static_cast<const T*>(tables[k].rows) + (tables[k].ids ? tables[k].ids[t] * width : 0);
            for (int i = 0; i < width; i += W) store(room + i, load<W>(room + i) + load<W>(row + i));
        }
        normed<W>(n, room, width, out);
    }
}

template <int W, Activation A, typename T>
INLINE void gate_rows(const T* gate, const T* up, int64_t stride, int64_t rows, int width, T* out) {
    for (int64_t r = 0; r < rows; r++, gate += stride, up += stride, out += width)
        for (int i = 0; i < width; i += W) store(out + i, activated<A>(load<W>(gate + i)) * load<W>(up + i));
}

template <int W, typename T>
INLINE void gate_rows(int activation, const T* gate, const T* up, int64_t stride, int64_t rows, int width, T* out) {
    if (activation == GELU) gate_rows<W, GELU>(gate, up, stride, rows, width, out);
    if (activation == GELU_TANH) gate_rows<W, GELU_TANH>(gate, up, stride, rows, width, out);
    if (activation == SILU) gate_rows<W, SILU>(gate, up, stride, rows, width, out);
}

template <int W, typename T>
INLINE void turn(const T* x, int64_t stride, int tokens, int heads, int size, int turned, const float* cosines,
                 const float* sines, T* out) {
    const int half = turned / 2;
    for (int t = 0; t < tokens; t++, x += stride, cosines += turned, sines += turned)
        for (int head = 0; head < heads; head++, out += size) {
            const T* from = x + int64_t(head) * size;
            for (int i = 0; i < half; i += W) {
                const floats<W> left = load<W>(from + i), right = load<W>(from + half + i);
                store(out + i, left * load<W>(cosines + i) - right * load<W>(sines + i));
                store(out + half + i, right * load<W>(cosines + half + i) + left * load<W>(sines + half + i));
            }
            if (out != from) std::memcpy(out + turned, from + turned, (size - turned) * sizeof(T));
        }
}

enum Pool { CLS, LAST, MEAN };

// Whether these sequences stand one behind the other among so many rows.
bool are_among(int64_t rows, const int32_t* cu_seqlens, int sequences) {
    return cu_seqlens[0] >= 0 && cu_seqlens[sequences] <= rows && std::is_sorted(cu_seqlens, cu_seqlens + sequences + 1);
}

// Each sequence's first row, last row or mean, its first `widths` components, the others 0, of unit length if so told;
// zeros for one of no tokens. out float32 [sequences, width].
template <int W, typename T>
INLINE void pool(const T* hidden, const int32_t* cu_seqlens, const int8_t* modes, const int32_t* widths,
                 const uint8_t* normalize, int sequences, int width, float* out) {
    for (int b = 0; b < sequences; b++, out += width) {
        int begin = cu_seqlens[b], end = cu_seqlens[b + 1];
        if (modes[b] == CLS) end = std::min(end, begin + 1);
        if (modes[b] == LAST) begin = std::max(begin, end - 1);
        std::memset(out, 0, width * sizeof(float));
        for (int t = begin; t < end; t++)
            for (int i = 0; i < width; i += W)
                store(out + i, load<W>(out + i) + load<W>(hidden + int64_t(t) * width + i));
        const int kept = std::clamp(widths[b], 0, width);
        std::memset(out + kept, 0, (width - kept) * sizeof(float));
        float factor = 1.0f / std::max(end - begin, 1);
        if (normalize[b]) {
            floats<W> squares = {};
            for (int i = 0; i < width; i += W) squares += load<W>(out + i) * factor * (load<W>(out + i) * factor);
            const float length = std::sqrt(sum(squares));
            factor /= length < 1e-12f ? 1e-12f : length;  // NaN stays
        }
        for (int i = 0; i < width; i += W) store(out + i, load<W>(out + i) * factor);
    }
}

// ── one of each for a type and a level ─────────────────────────────────────────────────────────────────────────────

#define AT_BOTH_LEVELS(name, body) \
    template <typename... Args> \
    FOR_AVX512 void name##_avx512(Args... args) { \
        body<16>(args...); \
    } \
    template <typename... Args> \
    FOR_AVX2 void name##_avx2(Args... args) { \
        body<8>(args...); \
    } \
    template <typename... Args> \
    void name##_at(int level, Args... args) { \
        level >= AVX512 ? name##_avx512<Args...>(args...) : name##_avx2<Args...>(args...); \
    }

AT_BOTH_LEVELS(norm, norm_rows)
AT_BOTH_LEVELS(embed, embed)
AT_BOTH_LEVELS(gate, gate_rows)
AT_BOTH_LEVELS(rotary, turn)
AT_BOTH_LEVELS(pool, pool)

}  // namespace

// Every function for float32 rows and, as uint16_t, for bfloat16 ones.
#define FOR_EACH_TYPE(T, suffix) \
    void carpool_norm_rows_##suffix(const Norm* n, const T* x, const T* residual, int64_t rows, int width, T* out, \
                                    T* total, int level) { \
        norm_at(level, *n, x, residual, rows, width, out, total); \
    } \
    /* 1, and nothing done, if a table does not have a row that is asked for. */ \
    int carpool_embed_rows_##suffix(const Norm* n, const Table* tables, int number, int64_t tokens, int width, \
                                    float* room, T* out, int level) { \
        if (!are_there(tables, number, tokens)) return 1; \
        embed_at(level, *n, tables, number, tokens, width, room, out); \
        return 0; \
    } \
    void carpool_gated_##suffix(int activation, const T* gate, const T* up, int64_t stride, int64_t rows, int width, \
                                T* out, int level) { \
        gate_at(level, activation, gate, up, stride, rows, width, out); \
    } \
    void carpool_rotary_##suffix(const T* x, int64_t stride, int tokens, int heads, int size, int turned, \
                                 const float* cosines, const float* sines, T* out, int level) { \
        rotary_at(level, x, stride, tokens, heads, size, turned, cosines, sines, out); \
    } \
    /* hidden [rows, width]. 1, and nothing done, if a sequence is not among them. */ \
    int carpool_pool_rows_##suffix(const T* hidden, int64_t rows, const int32_t* cu_seqlens, const int8_t* modes, \
                                   const int32_t* widths, const uint8_t* normalize, int sequences, int width, \
                                   float* out, int level) { \
        if (!are_among(rows, cu_seqlens, sequences)) return 1; \
        pool_at(level, hidden, cu_seqlens, modes, widths, normalize, sequences, width, out); \
        return 0; \
    }

extern "C" {
FOR_EACH_TYPE(float, f32)
FOR_EACH_TYPE(uint16_t, bf16)
}
