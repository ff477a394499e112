// Attention within each sequence of a packed row, or to keys and values in the pages of a cache, for x86-64 CPUs. The
// torch twins and specification are in kernels/reference/attention.py; the Python face is kernels/native.py.
//
// Plain C ABI, single-threaded but for whose heads idle cores take (crew.h), no headers of torch or Python: it builds in
// seconds and fits any of them. Instruction sets are chosen per function, at run time; nothing here needs -march. What a
// set does is in a file of its own: attention_f32.cpp, attention_bf16.cpp, attention_amx.cpp. Sums are float32 in each.
//
// The queries of one head of keys are rows: a token's heads of the group stand together, then the next token's.
#include "attention.h"
#include "crew.h"

namespace {

template <typename T>
using Kernel = void (*)(const Shape&, const T*, const T*, const T*, T*, const Batch&);

// In parts of whole heads of keys.
template <typename T>
void in_parts(Kernel<T> kernel, int64_t least, const Shape& s, const T* q, const T* k, const T* v, T* o,
              const Batch& batch) {
    int64_t scores = 0;  // of a head; a causal one computes half of them
    for (int b = 0; b < batch.sequences; b++) scores += int64_t(batch.queries(b)) * batch.length(b);
    const int parts = parts_of(2 * scores * s.heads * s.head_size, s.kv_heads, least), size = s.head_size;
    if (parts <= 1) return kernel(s, q, k, v, o, batch);
    share(parts, [&](int i) {
        const int first = s.kv_heads * i / parts, count = s.kv_heads * (i + 1) / parts - first;
        const int group = s.heads / s.kv_heads;
        Shape part = s.from_head(first * group);
        part.heads = group * count, part.kv_heads = count;
        kernel(part, q + first * group * size, k + first * size, v + first * size, o + first * group * size, batch);
    });
}

}  // namespace

extern "C" {

int carpool_attention_f32(const float* q, const float* k, const float* v, float* o, const Batch* batch,
                          const Shape* shape, int level) {
    Kernel<float> kernel = attend_in_avx2;
    if (level >= AVX512) kernel = attend_in_avx512;
    return in_memory([&] { in_parts(kernel, LEAST, *shape, q, k, v, o, *batch); });
}

int carpool_attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* o, const Batch* batch,
                           const Shape* shape, int level) {
    Kernel<uint16_t> kernel = attend_in_avx2;
    if (level >= AVX512) kernel = attend_in_avx512;
    if (level >= AVX512_BF16) kernel = attend_in_lanes;
    if (level >= AMX) kernel = attend_in_tiles;
    const int64_t least = level >= AMX ? LEAST_IN_TILES : LEAST;
    return in_memory([&] { in_parts(kernel, least, *shape, q, k, v, o, *batch); });
}
}
