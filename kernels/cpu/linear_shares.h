// A linear layer's call in parts that idle cores take: of its tokens or, where those are few, of its outputs, so that no
// core reads all of the weights for a handful of tokens. Either part is what the kernel computes of it alone.
#pragma once

#include "crew.h"
#include "linear.h"

namespace {

constexpr int FEW = 24;  // tokens a part below which reading the weights shows

// The outputs from `begin`, where a panel does, to before `end`; each lies in `deep` elements.
template <typename T>
inline LinearOf<T> outputs_of(const LinearOf<T>& l, int begin, int end, int deep) {
    return {l.weight + int64_t(begin) * deep, l.bias + begin, l.inputs, end - begin};
}

inline Linear8 outputs_of(const Linear8& l, int begin, int end, int deep) {
    return {l.weight + int64_t(begin) * deep, l.step + begin, l.sum + begin, l.bias + begin, l.inputs, end - begin};
}

// What follows the sums of such outputs, where that is no norm: it would want whole rows.
template <typename T>
inline FinishOf<T> outputs_of(const FinishOf<T>& f, int begin) {
    FinishOf<T> part = f;
    if (f.residual) part.residual += begin;
    return part;
}

template <typename T>
inline FinishOf<T> tokens_of(const FinishOf<T>& f, int begin) {
    FinishOf<T> part = f;
    if (f.residual) part.residual += begin * f.residual_stride;
    return part;
}

// `panel` outputs lie together, in `deep` elements each; a part of many tokens is whole blocks of `block`;
// none is below `least`. Returned is what `in_memory` does.
template <typename Layer, typename T, typename Kernel>
int linear_in_parts(Kernel kernel, int64_t least, int panel, int block, int deep, const Layer& l, int activation,
                    const FinishOf<T>* f, const T* x, int64_t x_stride, int tokens, T* out, int64_t out_stride) {
    const bool by_tokens = (f && f->weight) || tokens >= FEW * (idle_cores() + 1);  // a norm wants whole rows
    const int count = by_tokens ? tokens : l.outputs, together = by_tokens ? block : panel;
    const int parts = parts_of(int64_t(tokens) * l.inputs * l.outputs, (count + together / 2) / together, least);
    if (parts <= 1) return in_memory([&] { kernel(l, activation, f, x, x_stride, tokens, out, out_stride); });
    const int even = (count + parts - 1) / parts, piece = by_tokens && even < FEW ? even : round_up(even, together);
    const auto part = [&](int i) {
        const int begin = i * piece, end = std::min(begin + piece, count);
        if (!by_tokens) {
            const FinishOf<T> finish = f ? outputs_of(*f, begin) : FinishOf<T>{};
            kernel(outputs_of(l, begin, end, deep), activation, f ? &finish : nullptr, x, x_stride, tokens, out + begin,
                   out_stride);
            return;
        }
        const FinishOf<T> finish = f ? tokens_of(*f, begin) : FinishOf<T>{};
        kernel(l, activation, f ? &finish : nullptr, x + begin * x_stride, x_stride, end - begin,
               out + begin * out_stride, out_stride);
    };
    return in_memory([&] { share((count + piece - 1) / piece, part); });
}

}  // namespace
