// Linear layers in 8-bit integers (linear8.h), for x86-64 CPUs with AVX-512 VNNI. The torch twins are in
// kernels/twins_cpu.py, the Python face is kernels/native_linear8.py. Plain C ABI, as linear.cpp.
//
// Rows are float32 or bfloat16. A tile of tokens is rounded to integers once, while it is in cache, and multiplied by
// one panel of weights after another; sums become float32 as they leave the registers.
#include "linear8.h"
#include "linear_blocks.h"
#include "linear_shares.h"

// bfloat16 rows need AVX512_BF16 as well. It is allowed everywhere, since no compiler uses it unless told: what is
// instantiated for float32 runs without it.
#define FOR_INT8 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")))

extern "C" int carpool_has_amx_int8();  // amx.cpp

namespace {

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
                _mm512_storeu_ps(to + r * stride + w * LANES, worth(l, c, (__m512i)acc[r][w], height, low));
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
             int64_t out_stride, int level) {
    if (level >= AMX && carpool_has_amx_int8())
        return linear8_in_tiles(l, activation, f, x, x_stride, tokens, out, out_stride);
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
                            int64_t x_stride, int tokens, float* out, int64_t out_stride, int level) {
    return in_parts(*l, activation, f, x, x_stride, tokens, out, out_stride, level);
}
int carpool_linear_int8_bf16(const Linear8* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                             int tokens, uint16_t* out, int64_t out_stride, int level) {
    return in_parts(*l, activation, f, x, x_stride, tokens, out, out_stride, level);
}
}
