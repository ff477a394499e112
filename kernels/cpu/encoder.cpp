// All layers of an encoder in one call: for each one product for query, key and value, attention within the sequences,
// and three more products, with the norms, rotary positions and gates that stand between them, as the other files here
// compute them, to the bit. Their caller is spared a few hundred steps between them, which of a short text take longer
// than the arithmetic. The torch twin is in kernels/twins_cpu.py, the Python face is kernels/native_encoder.py. Plain C
// ABI.
#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace {

enum Laid { IN_PANELS, IN_TILES, IN_8_BITS };     // as kernels/native_encoder.py counts them
enum Gate { UNGATED, GATE_FIRST, GATE_SECOND };  // which half of what `up` makes goes through an activation

struct Product {
    const void* layer;  // LinearOf<T>, or Linear8
    int laid;           // a Laid
    int activation;     // an Activation
    int inputs, outputs;
};

// Norms without a weight are none. `before` and `between` are of what `joint` and `up` are to read; `attended` and `done`
// of what `out` and `down` made, each with what went into its block added before or, if `added` is set, behind the norm;
// `query` and `key` of each head.
struct EncoderLayer {
    Product joint, out, up, down;  // [heads + 2 kv_heads, width], [width, heads], [wide, width], [width, wide]
    Norm before, query, key, attended, between, done;
    Shape attention;       // over what `joint` makes
    int biased;            // whether by the encoder's bias
    int angles;            // by which query and key are turned; -1: they are not
    int gate, activation;  // a Gate: then half of `up`'s outputs go into `down`, and through which Activation
    int added;
};

// Rotary angles of each token, float32 [tokens, turned].
struct Angles {
    const float *cosines, *sines;
    int turned;
};

// Where keys and values are kept (kernels/layout.py), and whose come from there.
struct Kept {
    void* const* pages;  // of each layer those of its keys and those of its values, `rows` tokens each
    int64_t rows;
    const int64_t* slots;  // [tokens]
    int start;             // the token from which on all have a `past`
    const Batch* past;     // null for none
};

// The tokens that are read in the end, null for all: behind the last attention only those are computed.
struct Wanted {
    const int64_t* tokens;
    int count;

    bool are_among(int all) const {
        return count <= all && std::all_of(tokens, tokens + count, [&](int64_t token) { return 0 <= token && token < all; });
    }
};

int multiply(const Product& p, const FinishOf<float>* f, const float* x, int tokens, float* out, int level) {
    if (p.laid == IN_8_BITS)
        return carpool_linear_int8_f32(static_cast<const Linear8*>(p.layer), p.activation, f, x, p.inputs, tokens, out,
                                       p.outputs, level);
    return carpool_linear_f32(static_cast<const LinearOf<float>*>(p.layer), p.activation, f, x, p.inputs, tokens, out,
                              p.outputs, level);
}
int multiply(const Product& p, const Finish* f, const uint16_t* x, int tokens, uint16_t* out, int level) {
    if (p.laid == IN_8_BITS)
        return carpool_linear_int8_bf16(static_cast<const Linear8*>(p.layer), p.activation, f, x, p.inputs, tokens, out,
                                        p.outputs, level);
    auto kernel = p.laid == IN_TILES ? carpool_linear_amx : carpool_linear_bf16;
    return kernel(static_cast<const Linear*>(p.layer), p.activation, f, x, p.inputs, tokens, out, p.outputs);
}

#define OVERLOADED(name) \
    template <typename... Args> \
    auto name(const float* x, Args... args) { \
        return carpool_##name##_f32(x, args...); \
    } \
    template <typename... Args> \
    auto name(const uint16_t* x, Args... args) { \
        return carpool_##name##_bf16(x, args...); \
    }

OVERLOADED(attention)
OVERLOADED(rotary)

void norm_rows(const Norm& n, const float* x, int64_t rows, int width, float* out, int level) {
    carpool_norm_rows_f32(&n, x, nullptr, rows, width, out, nullptr, level);
}
void norm_rows(const Norm& n, const uint16_t* x, int64_t rows, int width, uint16_t* out, int level) {
    carpool_norm_rows_bf16(&n, x, nullptr, rows, width, out, nullptr, level);
}

void gated(int activation, const float* gate, const float* up, int64_t rows, int width, float* out, int level) {
    carpool_gated_f32(activation, gate, up, 2 * width, rows, width, out, level);
}
void gated(int activation, const uint16_t* gate, const uint16_t* up, int64_t rows, int width, uint16_t* out,
           int level) {
    carpool_gated_bf16(activation, gate, up, 2 * width, rows, width, out, level);
}

// What follows a product that ends a block; rows without gaps.
template <typename T>
FinishOf<T> onto(const T* residual, const Norm& norm, int added, int width) {
    return {residual, norm.weight, norm.bias, norm.eps, norm.centred, width, added};
}

// What `joint` made: each head of query and key through its norm, and turned, where it lies.
template <typename T>
void place_heads(const EncoderLayer& l, const Angles* angles, T* rows, int tokens, int level) {
    const Shape& s = l.attention;
    if (!l.query.weight && !l.key.weight && l.angles < 0) return;
    for (int t = 0; t < tokens; t++, rows += l.joint.outputs) {
        T* key = rows + int64_t(s.heads) * s.head_size;
        if (l.query.weight) norm_rows(l.query, rows, s.heads, s.head_size, rows, level);
        if (l.key.weight) norm_rows(l.key, key, s.kv_heads, s.head_size, key, level);
        if (l.angles < 0) continue;
        const Angles& a = angles[l.angles];
        const int64_t own = int64_t(t) * a.turned;
        rotary(static_cast<const T*>(rows), int64_t(l.joint.outputs), 1, s.heads + s.kv_heads, s.head_size, a.turned,
               a.cosines + own, a.sines + own, rows, level);
    }
}

// rows → mixed: of the tokens before `start` as `batch` has them, of the others out of their pages.
template <typename T>
int attend(const Shape& s, const T* rows, int tokens, const Batch* batch, const Kept* kept, void* const* pages,
           T* mixed, int level) {
    const int64_t keys = int64_t(s.heads) * s.head_size, own = int64_t(s.kv_heads) * s.head_size;
    const T *key = rows + keys, *value = key + own;
    if (!kept) return attention(rows, key, value, mixed, batch, &s, level);
    const auto bytes = [](const T* p) { return reinterpret_cast<const char*>(p); };
    T *key_pages = static_cast<T*>(pages[0]), *value_pages = static_cast<T*>(pages[1]);
    const int64_t stride = s.k_stride * sizeof(T);
    carpool_kv_write(bytes(key), bytes(value), stride, stride, kept->slots, tokens, own * sizeof(T),
                     reinterpret_cast<char*>(key_pages), reinterpret_cast<char*>(value_pages), kept->rows);
    const int start = kept->past ? kept->start : tokens;
    if (start && attention(rows, key, value, mixed, batch, &s, level)) return 1;
    if (!kept->past) return 0;
    Shape back = s;
    back.k_stride = back.v_stride = own;
    const T *k = key_pages, *v = value_pages;
    return attention(rows + start * s.q_stride, k, v, mixed + start * s.o_stride, kept->past, &back, level);
}

// Rows of `width` of the wanted tokens, one behind the other, and back to where they stood among all.
template <typename T>
void take(const Wanted& w, const T* from, int width, T* to) {
    for (int i = 0; i < w.count; i++) std::copy_n(from + w.tokens[i] * width, width, to + int64_t(i) * width);
}
template <typename T>
void lay(const Wanted& w, const T* from, int width, T* to) {
    for (int i = 0; i < w.count; i++) std::copy_n(from + int64_t(i) * width, width, to + w.tokens[i] * width);
}

// What no one is to read shows where someone does.
void fill_with_nan(float* to, int64_t count) { std::fill_n(to, count, std::numeric_limits<float>::quiet_NaN()); }
void fill_with_nan(uint16_t* to, int64_t count) { std::fill_n(to, count, uint16_t(0x7fc0)); }

template <typename T>
int encode(const EncoderLayer* layers, int count, const Angles* angles, const Bias* bias, const T* x, int tokens,
           const Batch* batch, const Kept* kept, const Wanted* wanted, T* room, int64_t widest, int64_t other, T* out,
           int level) {
    const FinishOf<T>* plain = nullptr;
    if (wanted && !wanted->are_among(tokens)) return -1;
    T* rows = room;  // what `joint` makes and, when attention has read it, what `up` does
    T* read = rows + tokens * widest;  // what is read by the next product: normed, or mixed by attention
    T* attended = read + tokens * other;
    for (int i = 0; i < count; i++) {
        const EncoderLayer& l = layers[i];
        const Wanted* few = i + 1 == count ? wanted : nullptr;
        const int width = l.joint.inputs, wide = l.down.inputs, all = tokens;
        const auto normed = [&](const Norm& norm, const T* from) {
            if (norm.weight) norm_rows(norm, from, tokens, width, read, level);
            return norm.weight ? read : from;
        };
        if (multiply(l.joint, plain, normed(l.before, x), tokens, rows, level)) return 1;
        place_heads(l, angles, rows, tokens, level);
        Shape shape = l.attention;
        if (l.biased) shape.bias = *bias;
        if (attend<T>(shape, rows, tokens, batch, kept, kept ? kept->pages + 2 * i : nullptr, read, level))
            return 1;
        const T* mixed = read;
        if (few) {
            take(*few, read, l.out.inputs, rows);
            take(*few, x, width, read);
            mixed = rows, x = read, tokens = few->count;
        }
        const FinishOf<T> first = onto(x, l.attended, l.added, width), second = onto(attended, l.done, l.added, width);
        if (multiply(l.out, &first, mixed, tokens, attended, level) ||
            multiply(l.up, plain, normed(l.between, attended), tokens, rows, level))
            return 1;
        if (l.gate != UNGATED) {
            const T *one = rows, *two = rows + wide;
            gated(l.activation, l.gate == GATE_FIRST ? one : two, l.gate == GATE_FIRST ? two : one, tokens, wide, rows,
                  level);
        }
        if (multiply(l.down, &second, rows, tokens, few ? read : out, level)) return 1;
        if (few) {
            fill_with_nan(out, int64_t(all) * width);
            lay(*few, read, width, out);
        }
        x = out;  // read for the last time before it is written again
    }
    return 0;
}

}  // namespace

extern "C" {

// x [tokens, width] → out, of the same shape and apart from it, through `count` layers, one at least. `bias` is of those
// that are biased, null where none is. `batch` has all tokens, or those before the ones that have a past; `kept` is null
// where nothing is. With `wanted` the other rows of out are NaN. `room` has tokens * (widest + other + width) elements:
// `widest` is the most that `joint` or `up` make, `other` the most that any but `down` reads. bfloat16 from level
// AVX512_BF16 on. Returned is what `in_memory` does, or -1, and nothing done, where a token is wanted that there is not.
int carpool_encoder_f32(const EncoderLayer* layers, int count, const Angles* angles, const Bias* bias, const float* x,
                        int tokens, const Batch* batch, const Kept* kept, const Wanted* wanted, float* room,
                        int64_t widest, int64_t other, float* out, int level) {
    return encode(layers, count, angles, bias, x, tokens, batch, kept, wanted, room, widest, other, out, level);
}
int carpool_encoder_bf16(const EncoderLayer* layers, int count, const Angles* angles, const Bias* bias, const uint16_t* x,
                         int tokens, const Batch* batch, const Kept* kept, const Wanted* wanted, uint16_t* room,
                         int64_t widest, int64_t other, uint16_t* out, int level) {
    return encode(layers, count, angles, bias, x, tokens, batch, kept, wanted, room, widest, other, out, level);
}
}
