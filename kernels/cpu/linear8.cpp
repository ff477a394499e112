// Linear layers in 8-bit integers, for x86-64 CPUs with AVX-512 VNNI. The torch twins are in kernels/twins_cpu.py, the
// Python face is kernels/native_linear8.py. Plain C ABI, as linear.cpp.
//
//     x ≈ low + height q    q uint8 [tokens, inputs]; low, height of a token: its smallest x, a 255th of its range
//     W = step V            V int8 [outputs, inputs]; step of an output
//     x Wᵀ = height (q Vᵀ) step + low sum    sum = step Σ V of an output; q Vᵀ exact in int32
//
// Rows are float32 or bfloat16. A tile of tokens is rounded to integers once, while it is in cache, and multiplied by
// one panel of weights after another; sums become float32 as they leave the registers. A token's integers and sums are
// its own: who rides beside it changes no bit of them.
#include "linear_blocks.h"
#include "linear_shares.h"

// bfloat16 rows need AVX512_BF16 as well. It is allowed everywhere, since no compiler uses it unless told: what is
// instantiated for float32 runs without it.
#define FOR_INT8 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")))

namespace {

constexpr int GROUP = 4;  // inputs that one lane multiplies at a time

// What rounding made of a tile's tokens.
struct Levels {
    uint8_t* of;    // [tokens][inputs]
    float* height;  // what one level is worth, [tokens]
    float* low;     // what level 0 is, [tokens]
};

FOR_INT8 inline __m512 wide(const float* p) { return _mm512_loadu_ps(p); }
FOR_INT8 inline __m512 wide(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// A token's row to levels. Where a number or the range is not finite its height is NaN, and so is all that comes of it:
// some level is NaN then, of which the conversion makes a negative integer, and no level of another row is negative.
template <typename T>
FOR_INT8 void level(const T* x, int inputs, uint8_t* to, float* height, float* low) {
    __m512 smallest = _mm512_set1_ps(std::numeric_limits<float>::infinity()), largest = -smallest;
    __m512i seen = _mm512_setzero_si512();  // bits that are set in any level
    for (int i = 0; i < inputs; i += LANES) {
        const __m512 v = wide(x + i);
        smallest = _mm512_min_ps(smallest, v);
        largest = _mm512_max_ps(largest, v);
    }
    *low = _mm512_reduce_min_ps(smallest);
    const float step = std::max((_mm512_reduce_max_ps(largest) - *low) / 255.0f, 1e-20f);
    const __m512 base = _mm512_set1_ps(*low), factor = _mm512_set1_ps(1.0f / step);
    const auto levels = [&](int i) FOR_INT8 {
        const __m512i own = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(wide(x + i), base), factor));
        seen = _mm512_or_si512(seen, own);
        return own;
    };
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    int i = 0;
    for (; i + 4 * LANES <= inputs; i += 4 * LANES) {
        const __m512i a = _mm512_packus_epi32(levels(i), levels(i + LANES));
        const __m512i b = _mm512_packus_epi32(levels(i + 2 * LANES), levels(i + 3 * LANES));
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
    }
    for (; i < inputs; i += LANES)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(levels(i)));
    *height = _mm512_movepi32_mask(seen) ? std::numeric_limits<float>::quiet_NaN() : step;
}

// Rows of T.
template <typename T>
struct Int8 : Wide {
    typedef T Element;
    typedef Linear8 Layer;
    typedef Levels Tokens;

    static int64_t bytes(const Linear8& l) { return l.inputs; }

    static FOR_INT8 Levels take(const Linear8& l, const T* x, int64_t stride, int count) {
        static thread_local std::vector<uint8_t> held_levels;
        static thread_local std::vector<float> held_scales;
        float* scales = scratch(held_scales, size_t(count) * 2);
        const Levels levels = {scratch(held_levels, size_t(count) * l.inputs), scales, scales + count};
        for (int t = 0; t < count; t++)
            level(x + t * stride, l.inputs, levels.of + int64_t(t) * l.inputs, &levels.height[t], &levels.low[t]);
        return levels;
    }

    template <int R>
    static FOR_INT8 APART void multiply(const Linear8& l, int column, const Levels& levels, int t, float* to,
                                        int64_t stride) {
        const int8_t* weight = l.weight + int64_t(column) * l.inputs;
        const uint8_t* row = levels.of + int64_t(t) * l.inputs;
        ivec acc[R][WIDE];  // with __m512i gcc 12 stores every sum it makes
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) acc[r][w] = ivec{};
        for (int i = 0; i < l.inputs; i += GROUP, weight += GROUP * COLUMNS) {
            __m512i b[WIDE];
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) b[w] = _mm512_loadu_si512(weight + w * GROUP * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t group;
                std::memcpy(&group, row + int64_t(r) * l.inputs + i, GROUP);
                const __m512i a = _mm512_set1_epi32(group);
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; w++) acc[r][w] = (ivec)_mm512_dpbusd_epi32((__m512i)acc[r][w], a, b[w]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const __m512 height = _mm512_set1_ps(levels.height[t + r]), low = _mm512_set1_ps(levels.low[t + r]);
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) {
                const int c = column + w * LANES;
                const __m512 start = _mm512_fmadd_ps(low, wide(l.sum + c), wide(l.bias + c));
                const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)acc[r][w]), height);
                _mm512_storeu_ps(to + r * stride + w * LANES, _mm512_fmadd_ps(y, wide(l.step + c), start));
            }
        }
    }
};

template <typename T>
FOR_INT8 void in_int8(const Linear8& l, int activation, const FinishOf<T>* f, const T* x, int64_t x_stride, int tokens,
                      T* out, int64_t out_stride) {
    linear<Int8<T>>(l, activation, f, x, x_stride, tokens, out, out_stride);
}

template <typename T>
int in_parts(const Linear8& l, int activation, const FinishOf<T>* f, const T* x, int64_t x_stride, int tokens, T* out,
             int64_t out_stride) {
    return linear_in_parts(in_int8<T>, LEAST, Int8<T>::COLUMNS, ROWS, l.inputs, l, activation, f, x, x_stride, tokens,
                           out, out_stride);
}

}  // namespace

extern "C" {

// Whether this CPU multiplies 8-bit integers as the functions below do.
int carpool_cpu_multiplies_int8() {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

int carpool_linear_int8_f32(const Linear8* l, int activation, const FinishOf<float>* f, const float* x,
                            int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    return in_parts(*l, activation, f, x, x_stride, tokens, out, out_stride);
}
int carpool_linear_int8_bf16(const Linear8* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                             int tokens, uint16_t* out, int64_t out_stride) {
    return in_parts(*l, activation, f, x, x_stride, tokens, out, out_stride);
}
}
