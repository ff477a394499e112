// Attention within each sequence of a packed row, for x86-64 CPUs. The torch twin and specification is
// kernels/reference.py; the Python face is kernels/native.py.
//
// Plain C ABI, single-threaded, no headers of torch or Python: it builds in seconds and fits any of them. Instruction
// sets are chosen per function, at run time; nothing here needs -march.
//
// For one head of one sequence, keys and values are copied once into the layout that the inner loops stream
// (K transposed, so that 16 keys fill a register). Then ROWS queries at a time: scores, softmax, weighted sum. All of a
// row's scores are kept, so there is one exponential a score and no rescaling. Sums are float32.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16;  // floats in a 512-bit register
constexpr int ROWS = 6;    // queries a block: 6 x 2 accumulators leave registers for operands

struct Shape {
    int heads, kv_heads, head_size;
    int64_t q_stride, k_stride, v_stride, o_stride;  // elements from one token to the next
    float scale, softcap;                            // softcap 0: none
    int causal, window;                              // window 0: none; a token sees those less than `window` away
};

struct Range {
    int begin, end;
};

// Which keys query i sees.
inline Range visible(const Shape& s, int i, int length) {
    int begin = s.window ? std::max(0, i - s.window + 1) : 0;
    int end = s.causal ? i + 1 : s.window ? std::min(length, i + s.window) : length;
    return {begin, end};
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline uint16_t narrow(float x) {  // to bfloat16, to nearest even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = narrow(x); }

// Memory that grows to the largest sequence a thread has met and is then reused.
template <typename T>
T* scratch(std::vector<T>& held, size_t count) {
    if (held.size() < count + 64) held.resize(count + 64);
    auto address = reinterpret_cast<uintptr_t>(held.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

// Vectors of 16 floats; on AVX2 the compiler makes two registers of each.
typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));

#define INLINE inline __attribute__((always_inline))

INLINE vec splat(float x) { return vec{} + x; }
INLINE vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, 64);
    return v;
}

// e^x for x <= 0, to about 1e-7 relative; below -87 it is 0. Cephes' polynomial after Cody and Waite's reduction.
INLINE vec exp_(vec x) {
    ivec tiny = x < splat(-87.0f);
    vec clamped = (vec)((ivec)x & ~tiny);
    vec n = clamped * 1.44269504f;
    vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = n + rounder;
    vec whole = shifted - rounder;
    vec r = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = ((ivec)shifted - (ivec)rounder + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~tiny);
}

INLINE float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

INLINE float largest(vec v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

// Scores of one query, in place: scaled, capped, masked to what it sees, exponentials; returns 1 / their sum.
INLINE float softmax_row(const Shape& s, float* row, Range keys, int begin, int end) {
    if (s.softcap != 0)
        for (int j = keys.begin; j < keys.end; j++) row[j] = s.softcap * std::tanh(row[j] * s.scale / s.softcap);
    const float factor = s.softcap != 0 ? 1.0f : s.scale;
    const float low = -std::numeric_limits<float>::infinity();
    for (int j = begin; j < keys.begin; j++) row[j] = low;
    for (int j = keys.end; j < end; j++) row[j] = low;
    vec top = splat(low);
    for (int j = begin; j < end; j += LANES) {
        vec x = load(row + j);
        top = x > top ? x : top;
    }
    const float peak = largest(top);
    vec total = {};
    for (int j = begin; j < end; j += LANES) {
        vec e = exp_((load(row + j) - peak) * factor);
        total += e;
        std::memcpy(row + j, &e, 64);
    }
    return 1.0f / sum(total);
}

// ── float32 arithmetic, for any CPU ─────────────────────────────────────────────────────────────────────────────────

template <int WIDTH, int N>
INLINE void scores_block(const float* const* q, const float* keys, int head_size, int padded, float* const* out) {
    vec acc[N][WIDTH] = {};
    for (int d = 0; d < head_size; d++) {
        vec k[WIDTH];
        for (int w = 0; w < WIDTH; w++) k[w] = load(keys + int64_t(d) * padded + w * LANES);
        for (int n = 0; n < N; n++)
            for (int w = 0; w < WIDTH; w++) acc[n][w] += k[w] * q[n][d];
    }
    for (int n = 0; n < N; n++)
        for (int w = 0; w < WIDTH; w++) std::memcpy(out[n] + w * LANES, &acc[n][w], 64);
}

template <int WIDTH, int N>
INLINE void values_block(float* const* p, const float* values, int head_size, int begin, int end, float (*out)[256],
                         int d) {
    vec acc[N][WIDTH] = {};
    for (int j = begin; j < end; j++) {
        vec v[WIDTH];
        for (int w = 0; w < WIDTH; w++) v[w] = load(values + int64_t(j) * head_size + d + w * LANES);
        for (int n = 0; n < N; n++)
            for (int w = 0; w < WIDTH; w++) acc[n][w] += v[w] * p[n][j];
    }
    for (int n = 0; n < N; n++)
        for (int w = 0; w < WIDTH; w++) std::memcpy(out[n] + d + w * LANES, &acc[n][w], 64);
}

template <typename T>
INLINE void sequence_f32(const Shape& s, const T* q, const T* k, const T* v, T* o, int length) {
    static thread_local std::vector<float> keys_held, values_held, rows_held;
    const int size = s.head_size, padded = round_up(length, 2 * LANES);
    float* keys = scratch(keys_held, size_t(size) * padded);
    float* values = scratch(values_held, size_t(length) * size);
    float* rows = scratch(rows_held, size_t(ROWS) * padded);
    const int group = s.heads / s.kv_heads;
    for (int kv = 0; kv < s.kv_heads; kv++) {
        for (int j = 0; j < length; j++)
            for (int d = 0; d < size; d++) {
                keys[int64_t(d) * padded + j] = widen(k[j * s.k_stride + kv * size + d]);
                values[int64_t(j) * size + d] = widen(v[j * s.v_stride + kv * size + d]);
            }
        for (int d = 0; d < size; d++)
            for (int j = length; j < padded; j++) keys[int64_t(d) * padded + j] = 0;
        for (int head = kv * group; head < (kv + 1) * group; head++) {
            for (int i = 0; i < length; i += ROWS) {
                float query[ROWS][256], result[ROWS][256];
                const float* qs[ROWS];
                float* row[ROWS];
                const int count = std::min(ROWS, length - i);
                for (int n = 0; n < ROWS; n++) {
                    const T* from = q + (i + std::min(n, count - 1)) * s.q_stride + head * size;
                    for (int d = 0; d < size; d++) query[n][d] = widen(from[d]);
                    qs[n] = query[n];
                    row[n] = rows + int64_t(n) * padded;
                }
                const int begin = visible(s, i, length).begin / (2 * LANES) * (2 * LANES);
                const int end = round_up(visible(s, i + count - 1, length).end, 2 * LANES);
                for (int j = begin; j < end; j += 2 * LANES) {
                    float* out[ROWS];
                    for (int n = 0; n < ROWS; n++) out[n] = row[n] + j;
                    scores_block<2, ROWS>(qs, keys + j, size, padded, out);
                }
                float inverse[ROWS];
                for (int n = 0; n < ROWS; n++)
                    inverse[n] = softmax_row(s, row[n], visible(s, i + std::min(n, count - 1), length), begin, end);
                const int last = std::min(end, length);
                int d = 0;
                for (; d + 2 * LANES <= size; d += 2 * LANES)
                    values_block<2, ROWS>(row, values, size, begin, last, result, d);
                for (; d < size; d += LANES) values_block<1, ROWS>(row, values, size, begin, last, result, d);
                for (int n = 0; n < count; n++)
                    for (int e = 0; e < size; e++)
                        store(o + (i + n) * s.o_stride + head * size + e, result[n][e] * inverse[n]);
            }
        }
    }
}

#define FOR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define FOR_AVX2 __attribute__((target("avx2,fma")))

FOR_AVX512 void f32_avx512(const Shape& s, const float* q, const float* k, const float* v, float* o, int n) {
    sequence_f32(s, q, k, v, o, n);
}
FOR_AVX2 void f32_avx2(const Shape& s, const float* q, const float* k, const float* v, float* o, int n) {
    sequence_f32(s, q, k, v, o, n);
}
FOR_AVX512 void bf16_avx512(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, int n) {
    sequence_f32(s, q, k, v, o, n);
}
FOR_AVX2 void bf16_avx2(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, int n) {
    sequence_f32(s, q, k, v, o, n);
}

// ── bfloat16 products (AVX-512 BF16): a pair of products and their float32 sum in each lane ───────────────────────────

#define FOR_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

FOR_BF16 inline __m512bh pair_of(const uint16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

FOR_BF16 void bf16_native(const Shape& s, const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                          int length) {
    static thread_local std::vector<uint16_t> keys_held, values_held, weights_held;
    static thread_local std::vector<float> rows_held;
    const int size = s.head_size, padded = round_up(length, 2 * LANES);
    uint16_t* keys = scratch(keys_held, size_t(size) * padded);      // [size / 2][padded][2]
    uint16_t* values = scratch(values_held, size_t(size) * padded);  // [padded / 2][size][2]
    float* rows = scratch(rows_held, size_t(ROWS) * padded);
    uint16_t* weights = scratch(weights_held, size_t(ROWS) * padded);
    const int group = s.heads / s.kv_heads;
    for (int kv = 0; kv < s.kv_heads; kv++) {
        for (int j = 0; j < padded; j++) {
            const bool real = j < length;
            const uint16_t* key = k + j * s.k_stride + kv * size;
            const uint16_t* value = v + j * s.v_stride + kv * size;
            auto* to = reinterpret_cast<uint32_t*>(keys) + j;
            uint16_t* into = values + int64_t(j / 2) * size * 2 + j % 2;
            for (int d = 0; d < size; d += 2) {
                uint32_t both = 0;
                if (real) std::memcpy(&both, key + d, 4);
                to[int64_t(d / 2) * padded] = both;
                into[2 * d] = real ? value[d] : 0;
                into[2 * d + 2] = real ? value[d + 1] : 0;
            }
        }
        for (int head = kv * group; head < (kv + 1) * group; head++) {
            for (int i = 0; i < length; i += ROWS) {
                const int count = std::min(ROWS, length - i);
                const uint16_t* qs[ROWS];
                for (int n = 0; n < ROWS; n++) qs[n] = q + (i + std::min(n, count - 1)) * s.q_stride + head * size;
                const int begin = visible(s, i, length).begin / (2 * LANES) * (2 * LANES);
                const int end = round_up(visible(s, i + count - 1, length).end, 2 * LANES);
                for (int j = begin; j < end; j += 2 * LANES) {
                    __m512 acc[ROWS][2];
                    for (auto& pair : acc) pair[0] = pair[1] = _mm512_setzero_ps();
                    for (int d = 0; d < size; d += 2) {
                        const uint16_t* from = keys + (int64_t(d / 2) * padded + j) * 2;
                        __m512bh k0 = (__m512bh)_mm512_loadu_si512(from);
                        __m512bh k1 = (__m512bh)_mm512_loadu_si512(from + 2 * LANES);
                        for (int n = 0; n < ROWS; n++) {
                            __m512bh x = pair_of(qs[n] + d);
                            acc[n][0] = _mm512_dpbf16_ps(acc[n][0], x, k0);
                            acc[n][1] = _mm512_dpbf16_ps(acc[n][1], x, k1);
                        }
                    }
                    for (int n = 0; n < ROWS; n++) {
                        _mm512_storeu_ps(rows + int64_t(n) * padded + j, acc[n][0]);
                        _mm512_storeu_ps(rows + int64_t(n) * padded + j + LANES, acc[n][1]);
                    }
                }
                float inverse[ROWS];
                for (int n = 0; n < ROWS; n++) {
                    float* row = rows + int64_t(n) * padded;
                    inverse[n] = softmax_row(s, row, visible(s, i + std::min(n, count - 1), length), begin, end);
                    for (int j = begin; j < end; j += LANES)
                        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + int64_t(n) * padded + j),
                                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row + j)));
                }
                for (int d = 0; d < size; d += 2 * LANES) {
                    const bool wide = d + LANES < size;
                    __m512 acc[ROWS][2];
                    for (auto& pair : acc) pair[0] = pair[1] = _mm512_setzero_ps();
                    for (int j = begin; j < end; j += 2) {
                        const uint16_t* from = values + (int64_t(j / 2) * size + d) * 2;
                        __m512bh v0 = (__m512bh)_mm512_loadu_si512(from);
                        __m512bh v1 = wide ? (__m512bh)_mm512_loadu_si512(from + 2 * LANES) : v0;
                        for (int n = 0; n < ROWS; n++) {
                            __m512bh x = pair_of(weights + int64_t(n) * padded + j);
                            acc[n][0] = _mm512_dpbf16_ps(acc[n][0], x, v0);
                            acc[n][1] = _mm512_dpbf16_ps(acc[n][1], x, v1);
                        }
                    }
                    for (int n = 0; n < count; n++) {
                        uint16_t* to = o + (i + n) * s.o_stride + head * size + d;
                        const __m512 factor = _mm512_set1_ps(inverse[n]);
                        for (int w = 0; w < 1 + wide; w++)
                            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + w * LANES),
                                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(acc[n][w], factor)));
                    }
                }
            }
        }
    }
}

template <typename T>
using Kernel = void (*)(const Shape&, const T*, const T*, const T*, T*, int);

template <typename T>
void each_sequence(Kernel<T> kernel, const Shape& s, const T* q, const T* k, const T* v, T* o, const int32_t* cu_seqlens,
                   int sequences) {
    for (int b = 0; b < sequences; b++) {
        const int64_t start = cu_seqlens[b];
        kernel(s, q + start * s.q_stride, k + start * s.k_stride, v + start * s.v_stride, o + start * s.o_stride,
               cu_seqlens[b + 1] - cu_seqlens[b]);
    }
}

}  // namespace

extern "C" {

// The best instruction set this CPU has for the kernels: 0 none that serves, 1 AVX2, 2 AVX-512, 3 AVX-512 BF16.
int carpool_cpu_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
}

// query [T, heads, head_size], key and value [T, kv_heads, head_size], out as query; strides in elements, heads and
// head_size contiguous. head_size is a multiple of 16, at most 256. cu_seqlens int32 [sequences + 1]. `level` as above.
void carpool_attention_f32(const float* q, const float* k, const float* v, float* o, const int32_t* cu_seqlens,
                           int sequences, const Shape* shape, int level) {
    each_sequence<float>(level >= 2 ? f32_avx512 : f32_avx2, *shape, q, k, v, o, cu_seqlens, sequences);
}

void carpool_attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o,
                            const int32_t* cu_seqlens, int sequences, const Shape* shape, int level) {
    Kernel<uint16_t> kernel = level >= 3 ? bf16_native : level == 2 ? bf16_avx512 : bf16_avx2;
    each_sequence<uint16_t>(kernel, *shape, q, k, v, o, cu_seqlens, sequences);
}
}
