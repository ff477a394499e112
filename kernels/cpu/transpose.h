// Squares of 16 x 16 or 8 x 8 turned, and rows zipped into pairs.
#pragma once

#include "vector.h"

namespace {

// One round of a transposition of W x W: squares of SIDE are exchanged across the diagonal.
template <int SIDE, int W>
INLINE void exchange(ints<W>* r) {
    const ints<W> lane = lanes<W>(), odd = (lane & SIDE) != 0;
    const ints<W> left = (odd & (lane + W - SIDE)) | (~odd & lane);
    const ints<W> right = (odd & (lane + W)) | (~odd & (lane + SIDE));
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        if (i & SIDE) continue;
        const ints<W> one = r[i], other = r[i + SIDE];
        r[i] = __builtin_shuffle(one, other, left);
        r[i + SIDE] = __builtin_shuffle(one, other, right);
    }
}

template <int W = LANES>
INLINE void transpose(ints<W>* r) {
    exchange<1, W>(r);
    exchange<2, W>(r);
    exchange<4, W>(r);
    if constexpr (W == 16) exchange<8, W>(r);
}

// Neighbouring rows' bfloat16 as pairs: 16 of each.
FOR_BF16 inline __m512i zipped(__m512i one_then_other) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, one_then_other);
}

}  // namespace
