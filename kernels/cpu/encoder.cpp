// All layers of a BERT in one call: for each one product for query, key and value, attention within the sequences, and
// three more products with what follows them, as linear*.cpp and attention.cpp compute them, to the bit. Their caller is
// spared a few hundred steps between them, which of a short text take longer than the arithmetic. The torch twin is in
// kernels/twins_cpu.py, the Python face is kernels/native_encoder.py. Plain C ABI.
#include "attention.h"
#include "linear.h"

namespace {

enum Laid { IN_PANELS, IN_TILES, IN_8_BITS };  // as kernels/native_encoder.py counts them

struct Product {
    const void* layer;  // LinearOf<T>, or Linear8
    int laid;           // a Laid
    int activation;     // an Activation
};

// A LayerNorm; weight and bias float32.
struct Norm {
    const float *weight, *bias;
    float eps;
};

struct EncoderLayer {
    Product joint, out, up, down;  // [3 width, width], [width, width], [wide, width], [width, wide]
    Norm attended, done;           // behind `out` and `down`, each of the sum with what went into its block
    Shape attention;               // over what `joint` makes; out of it come rows of `width`
};

int multiply(const Product& p, const FinishOf<float>* f, const float* x, int64_t inputs, int tokens, float* out,
             int64_t outputs, int level) {
    if (p.laid == IN_8_BITS)
        return carpool_linear_int8_f32(static_cast<const Linear8*>(p.layer), p.activation, f, x, inputs, tokens, out,
                                       outputs, level);
    return carpool_linear_f32(static_cast<const LinearOf<float>*>(p.layer), p.activation, f, x, inputs, tokens, out,
                              outputs, level);
}
int multiply(const Product& p, const Finish* f, const uint16_t* x, int64_t inputs, int tokens, uint16_t* out,
             int64_t outputs, int level) {
    if (p.laid == IN_8_BITS)
        return carpool_linear_int8_bf16(static_cast<const Linear8*>(p.layer), p.activation, f, x, inputs, tokens, out,
                                        outputs, level);
    auto kernel = p.laid == IN_TILES ? carpool_linear_amx : carpool_linear_bf16;
    return kernel(static_cast<const Linear*>(p.layer), p.activation, f, x, inputs, tokens, out, outputs);
}

int attend(const float* q, const float* k, const float* v, float* o, const Batch* batch, const Shape* s, int level) {
    return carpool_attention_f32(q, k, v, o, batch, s, level);
}
int attend(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, const Batch* batch, const Shape* s,
           int level) {
    return carpool_attention_bf16(q, k, v, o, batch, s, level);
}

// norm(residual + row); rows without gaps.
template <typename T>
FinishOf<T> onto(const T* residual, const Norm& norm, int width) {
    return {residual, norm.weight, norm.bias, norm.eps, 1, width};
}

template <typename T>
int encode(const EncoderLayer* layers, int count, int width, int wide, const T* x, int tokens, const Batch* batch,
           T* room, T* out, int level) {
    const FinishOf<T>* plain = nullptr;
    T* rows = room;  // what `joint` makes and, when attention has read it, what `up` does
    T* mixed = rows + int64_t(tokens) * std::max(3 * width, wide);
    T* attended = mixed + int64_t(tokens) * width;
    for (int i = 0; i < count; i++) {
        const EncoderLayer& l = layers[i];
        const FinishOf<T> first = onto(x, l.attended, width), second = onto(attended, l.done, width);
        if (multiply(l.joint, plain, x, width, tokens, rows, 3 * width, level) ||
            attend(rows, rows + width, rows + 2 * width, mixed, batch, &l.attention, level) ||
            multiply(l.out, &first, mixed, width, tokens, attended, width, level) ||
            multiply(l.up, plain, attended, width, tokens, rows, wide, level) ||
            multiply(l.down, &second, rows, wide, tokens, out, width, level))
            return 1;
        x = out;  // read for the last time before it is written again
    }
    return 0;
}

}  // namespace

extern "C" {

// x [tokens, width] → out, of the same shape and apart from it, through `count` layers, one at least, whose feed-forward
// blocks are `wide`. `room` has tokens * (max(3 width, wide) + 2 width) elements. bfloat16 from level AVX512_BF16 on.
// Returned is what `in_memory` does.
int carpool_encoder_f32(const EncoderLayer* layers, int count, int width, int wide, const float* x, int tokens,
                        const Batch* batch, float* room, float* out, int level) {
    return encode(layers, count, width, wide, x, tokens, batch, room, out, level);
}
int carpool_encoder_bf16(const EncoderLayer* layers, int count, int width, int wide, const uint16_t* x, int tokens,
                         const Batch* batch, uint16_t* room, uint16_t* out, int level) {
    return encode(layers, count, width, wide, x, tokens, batch, room, out, level);
}
}
