// The pages of a cache of keys and values: whether a batch's tables lead into it, and tokens written to it. The Python face
// is kernels/native_pages.py; attention reads them by way of `Batch`.
#include "attention.h"

extern "C" {

// The first sequence of a batch in pages that does not fit itself, or all `queries`, or a cache of `pages`; -1: none.
int carpool_paged_fault(const Batch* batch, int64_t queries, int64_t pages) {
    const int32_t* bounds = batch->cu_seqlens;
    for (int b = 0; b < batch->sequences; b++) {
        const int64_t own = int64_t(bounds[b + 1]) - bounds[b], length = batch->key_lengths[b];
        const int64_t used = (length + batch->page_size - 1) / batch->page_size;
        if ((b == 0 && bounds[b] != 0) || bounds[b + 1] > queries || own < 0 || own > length) return b;
        if (used > batch->most_pages) return b;
        for (int64_t i = 0; i < used; i++)
            if (batch->pages_of(b)[i] < 0 || batch->pages_of(b)[i] >= pages) return b;
    }
    return batch->sequences && bounds[batch->sequences] != queries ? batch->sequences - 1 : -1;
}

void carpool_kv_write(const char* keys, const char* values, int64_t k_stride, int64_t v_stride, const int64_t* slots,
                      int64_t tokens, int64_t bytes, char* key_cache, char* value_cache, int64_t rows) {
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0 || slots[t] >= rows) continue;
        std::memcpy(key_cache + slots[t] * bytes, keys + t * k_stride, bytes);
        std::memcpy(value_cache + slots[t] * bytes, values + t * v_stride, bytes);
    }
}
}
