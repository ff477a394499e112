// Keys and values in pages: written token by token, gathered into packed rows. Elements of any type, moved 16 bytes at
// a time; `units` of them are one token's heads.

// keys and values [tokens, units]; slots [tokens], page * page_size + place of each token, or below 0 for nowhere; both
// caches [pages * page_size, units]. A thread a unit. Two tokens must not have one slot.
__global__ void kv_write(const uint4* __restrict__ keys, const uint4* __restrict__ values,
                         const i64* __restrict__ slots, uint4* __restrict__ key_cache, uint4* __restrict__ value_cache,
                         i64 tokens, i64 capacity, int units) {
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, t = at / units;
  if (t >= tokens) return;
  const i64 slot = slots[t];
  if (slot < 0 || slot >= capacity) return;
  const i64 to = slot * units + at % units;
  key_cache[to] = keys[at];
  value_cache[to] = values[at];
}

// Both caches as above; pages [n, most], the pages of each sequence in order; bounds [n + 1] of the packed rows → keys
// and values [bounds[n], units]. A thread a unit.
__global__ void kv_gather(const uint4* __restrict__ key_cache, const uint4* __restrict__ value_cache,
                          const int* __restrict__ pages, const int* __restrict__ bounds, uint4* __restrict__ keys,
                          uint4* __restrict__ values, i64 tokens, int n, int most, int page_size, int units) {
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, t = at / units;
  if (t >= tokens) return;
  const int b = last_not_after(Bounds{bounds}, n, t), place = (int)(t - bounds[b]);
  const i64 slot = (i64)pages[(i64)b * most + place / page_size] * page_size + place % page_size;
  const i64 from = slot * units + at % units;
  keys[at] = key_cache[from];
  values[at] = value_cache[from];
}
