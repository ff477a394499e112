// Linear layers for x86-64 CPUs: in float32 with AVX2 or AVX-512, in bfloat16 with AVX-512 BF16, chosen at run time. The
// torch twins are in kernels/twins_cpu.py, the Python face is kernels/native_linear.py. Plain C ABI; single-threaded, but
// for whom a call falls into parts (crew.h).
//
// Weights lie in panels of as many outputs as a block of sums is wide, in bfloat16 their inputs in pairs
// (kernels/panels.py): read in the order they lie in. What is summed is float32.
#include "linear_blocks.h"
#include "linear_shares.h"

namespace {

// Rows of T as they lie in memory.
template <typename T>
struct RowsOf {
    typedef T Element;
    typedef LinearOf<T> Layer;

    struct Tokens {
        const T* x;
        int64_t stride;
    };

    static int64_t bytes(const Layer& l) { return int64_t(l.inputs) * sizeof(T); }
    static Tokens take(const Layer&, const T* x, int64_t stride, int) { return {x, stride}; }
};

// Sums of PIECE products are added up on their own: of thousands, one after the other, rounding would be what remains.
constexpr int PIECE = 256;

template <int R, int W, int WIDE>
INLINE void multiply_f32(const LinearOf<float>& l, int column, const RowsOf<float>::Tokens& tokens, int t, float* to,
                         int64_t stride) {
    const float *weight = l.weight + int64_t(column) * l.inputs, *bias = l.bias + column;
    const float* row = tokens.x + t * tokens.stride;
    for (int begin = 0; begin < l.inputs; begin += PIECE) {
        const int end = std::min(begin + PIECE, l.inputs);
        floats<W> acc[R][WIDE] = {};
        for (int i = begin; i < end; i++, weight += WIDE * W) {
            floats<W> b[WIDE];
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) b[w] = load<W>(weight + w * W);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; w++) acc[r][w] += b[w] * row[r * tokens.stride + i];
        }
        float* sum = to;
        asm("" : "+r"(sum));  // else gcc finds all of these addresses beforehand, and room for them on the stack
#pragma GCC unroll 6
        for (int r = 0; r < R; r++, sum += stride)
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++)
                store(sum + w * W, load<W>((begin ? sum : bias) + w * W) + acc[r][w]);
    }
}

struct Float32Avx512 : RowsOf<float>, Wide {
    template <int R>
    static FOR_AVX512 APART void multiply(const Layer& l, int column, const Tokens& tokens, int t, float* to,
                                          int64_t stride) {
        multiply_f32<R, W, WIDE>(l, column, tokens, t, to, stride);
    }
};

struct Float32Avx2 : RowsOf<float> {
    static constexpr int W = 8, WIDE = 2, COLUMNS = WIDE * W;

    template <int R>
    static FOR_AVX2 APART void multiply(const Layer& l, int column, const Tokens& tokens, int t, float* to,
                                        int64_t stride) {
        multiply_f32<R, W, WIDE>(l, column, tokens, t, to, stride);
    }

    template <Activation A>
    static FOR_AVX2 inline void put_active(float* to, const float* from) {
        store(to, activated<A>(load<W>(from)));
    }
};

struct Bfloat16 : RowsOf<uint16_t>, Wide {
    template <int R>
    static FOR_BF16 APART void multiply(const Layer& l, int column, const Tokens& tokens, int t, float* to,
                                        int64_t stride) {
        const uint16_t *weight = l.weight + int64_t(column) * l.inputs, *row = tokens.x + t * tokens.stride;
        __m512 acc[R][WIDE];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_loadu_ps(l.bias + column + w * LANES);
        for (int i = 0; i < l.inputs; i += 2, weight += 2 * COLUMNS) {
            __m512bh b[WIDE];
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) b[w] = (__m512bh)_mm512_loadu_si512(weight + w * 2 * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                int32_t both;
                std::memcpy(&both, row + r * tokens.stride + i, 4);
                const __m512bh a = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; w++) acc[r][w] = _mm512_dpbf16_ps(acc[r][w], a, b[w]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int w = 0; w < WIDE; w++) _mm512_storeu_ps(to + r * stride + w * LANES, acc[r][w]);
    }
};

FOR_AVX512 void in_f32_avx512(const LinearOf<float>& l, int activation, const FinishOf<float>* f, const float* x,
                              int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    linear<Float32Avx512>(l, activation, f, x, x_stride, tokens, out, out_stride);
}
FOR_AVX2 void in_f32_avx2(const LinearOf<float>& l, int activation, const FinishOf<float>* f, const float* x,
                          int64_t x_stride, int tokens, float* out, int64_t out_stride) {
    linear<Float32Avx2>(l, activation, f, x, x_stride, tokens, out, out_stride);
}
FOR_BF16 void in_bf16(const Linear& l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride, int tokens,
                      uint16_t* out, int64_t out_stride) {
    linear<Bfloat16>(l, activation, f, x, x_stride, tokens, out, out_stride);
}

}  // namespace

extern "C" {

int carpool_linear_f32(const LinearOf<float>* l, int activation, const FinishOf<float>* f, const float* x,
                       int64_t x_stride, int tokens, float* out, int64_t out_stride, int level) {
    const bool wide = level >= AVX512;
    const auto kernel = wide ? in_f32_avx512 : in_f32_avx2;
    const int panel = wide ? Float32Avx512::COLUMNS : Float32Avx2::COLUMNS;
    return linear_in_parts(kernel, LEAST, panel, ROWS, l->inputs, *l, activation, f, x, x_stride, tokens, out, out_stride);
}

int carpool_linear_bf16(const Linear* l, int activation, const Finish* f, const uint16_t* x, int64_t x_stride,
                        int tokens, uint16_t* out, int64_t out_stride) {
    return linear_in_parts(in_bf16, LEAST, Bfloat16::COLUMNS, ROWS, l->inputs, *l, activation, f, x, x_stride, tokens,
                           out, out_stride);
}
}
