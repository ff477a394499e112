// Rows of single tokens (token embeddings, steps of a process reward model), cut, normalised, cast. One warp a row.

// A row as it lies in global memory.
template <class T> struct Direct {
  const T* row;
  __device__ __forceinline__ float operator()(int column) const { return Element<T>::up(row[column]); }
};

// hidden [., columns]; rows [count], which of them, or null for the first `count`; widths and unit [count] → out
// [count, pitch], scales [count].
template <class T, class TO>
__global__ void gather_rows(const T* __restrict__ hidden, const int* __restrict__ rows, const int* __restrict__ widths,
                            const bool* __restrict__ unit, TO* __restrict__ out, float* __restrict__ scales, int count,
                            int columns, float eps) {
  const int r = warp_row();
  if (r >= count) return;
  const i64 place = rows == nullptr ? r : rows[r];
  const Direct<T> row{hidden + place * columns};
  finish_row<TO>(Warp{}, row, 1.f, max(0, min(widths[r], columns)), columns, unit[r], eps,
                 out + (i64)r * Output<TO>::pitch(columns), scales + r);
}

// ids [T], bounds [n + 1] → counts [n]: how many of a sequence's tokens are `tag`.
__global__ void step_count(const i64* __restrict__ ids, const int* __restrict__ bounds, int* __restrict__ counts, int n,
                           i64 tag) {
  const int b = warp_row(), lane = threadIdx.x & 31;
  if (b >= n) return;
  const int end = bounds[b + 1];
  int found = 0;
  for (int t = bounds[b]; t < end; t += 32)
    found += __popc(__ballot_sync(ALL_LANES, t + lane < end && ids[t + lane] == tag));
  if (lane == 0) counts[b] = found;
}

// The same, and starts [n + 1], the cumulative counts from 0 → rows [starts[n]]: where those tokens are, in order.
__global__ void step_fill(const i64* __restrict__ ids, const int* __restrict__ bounds, const int* __restrict__ starts,
                          int* __restrict__ rows, int n, i64 tag) {
  const int b = warp_row(), lane = threadIdx.x & 31;
  if (b >= n) return;
  const int end = bounds[b + 1];
  int next = starts[b];
  for (int t = bounds[b]; t < end; t += 32) {
    const bool hit = t + lane < end && ids[t + lane] == tag;
    const unsigned hits = __ballot_sync(ALL_LANES, hit);
    if (hit) rows[next + __popc(hits & ((1u << lane) - 1u))] = t + lane;
    next += __popc(hits);
  }
}
