// Pooling of packed rows: first, last or mean of each sequence's tokens, cut, normalised, cast. One block a sequence.
//
// A sequence of thousands of tokens would leave all but one multiprocessor idle, so means can be taken in two passes:
// `pool_split` sums CHUNK tokens a block, `pool_rows` then sums the chunks.

enum Mode { CLS = 0, LAST = 1, MEAN = 2 };
#define CHUNK 64  // tokens; kernels/cuda_table.py has the same
#define MOST_LANES 32

// A row in shared memory, laid out so that neither the vectors written nor the components read meet in a bank:
// component c of vector k lies at [c][k], with a pitch that is an odd multiple of 32 / V words.
template <int V> struct Staged {
  float* base;
  int pitch;
  __device__ __forceinline__ Staged(float* base, int vectors)
      : base(base), pitch((((vectors + 32 / V - 1) / (32 / V)) | 1) * (32 / V)) {}
  __device__ __forceinline__ float operator()(int column) const { return base[(column % V) * pitch + column / V]; }
};

// Sums rows first … end - 1 of `rows` [., columns], their first `vectors` vectors, into `to`; all threads call it.
// The threads are `across` columns of vectors times as many lanes of tokens as there are left for, each with a staged
// row of its own, which are then summed. The caller must have V * pitch * lanes floats there.
template <class T>
__device__ __forceinline__ void sum_rows(const T* __restrict__ rows, i64 first, i64 end, int columns, int vectors,
                                         const Staged<Element<T>::V>& to) {
  constexpr int V = Element<T>::V;
  const int across = max(1, min(vectors, (int)blockDim.x));
  const int lanes = min((int)blockDim.x / across, MOST_LANES), lane = threadIdx.x / across;
  for (int k = threadIdx.x % across; k < vectors && lane < lanes; k += across) {
    float sum[V];
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = 0.f;
#pragma unroll 4
    for (i64 t = first + lane; t < end; t += lanes) {
      float x[V];
      load_vector<T>(rows + t * columns + k * V, x);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) to.base[(lane * V + i) * to.pitch + k] = sum[i];
  }
  __syncthreads();
  if (lanes > 1) {
    for (int place = threadIdx.x; place < V * vectors; place += blockDim.x) {
      const int at = place / vectors * to.pitch + place % vectors;
      float sum = to.base[at];
      for (int other = 1; other < lanes; ++other) sum += to.base[other * V * to.pitch + at];
      to.base[at] = sum;
    }
    __syncthreads();
  }
}

// Where the chunks of sequence b begin among those of all. A sequence has at most one chunk more than its tokens have
// room for in the packed row, hence the b: no two sequences' chunks overlap, and there are T / CHUNK + B places.
struct FirstChunk {
  const int* bounds;
  __device__ __forceinline__ i64 operator()(int b) const { return bounds[b] / CHUNK + b; }
};

// hidden [T, columns]; bounds [n + 1], a sequence's first token and its end; modes and widths [n] → partial
// [T / CHUNK + n, columns]: sums of chunks of the sequences whose mode is MEAN, as far as their width goes, the rest is
// left as it is. One block a chunk.
template <class T>
__global__ void pool_split(const T* __restrict__ hidden, const int* __restrict__ bounds,
                           const signed char* __restrict__ modes, const int* __restrict__ widths,
                           float* __restrict__ partial, int n, int columns) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  constexpr int V = Element<T>::V;
  const FirstChunk chunk{bounds};
  const int b = last_not_after(chunk, n, blockIdx.x);
  const i64 first = bounds[b] + (blockIdx.x - chunk(b)) * CHUNK, end = min(first + CHUNK, (i64)bounds[b + 1]);
  if (modes[b] != MEAN || first >= end) return;  // the same for all threads of the block
  const int vectors = (max(0, min(widths[b], columns)) + V - 1) / V;
  const Staged<V> sum(reinterpret_cast<float*>(smem_raw), vectors);
  sum_rows<T>(hidden, first, end, columns, vectors, sum);
  for (int c = threadIdx.x; c < vectors * V; c += blockDim.x) partial[(i64)blockIdx.x * columns + c] = sum(c);
}

// hidden [T, columns], rows of whole vectors; bounds [n + 1]; modes, widths and unit [n]; partial null, or what
// `pool_split` made → out [n, pitch], scales [n]. Sequences without tokens give zeros.
template <class T, class TO>
__global__ void pool_rows(const T* __restrict__ hidden, const int* __restrict__ bounds,
                          const signed char* __restrict__ modes, const int* __restrict__ widths,
                          const bool* __restrict__ unit, const float* __restrict__ partial, TO* __restrict__ out,
                          float* __restrict__ scales, int columns, float eps) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  __shared__ float shared[33];
  constexpr int V = Element<T>::V, W = Element<float>::V;
  float* staged = reinterpret_cast<float*>(smem_raw);
  const int b = blockIdx.x, mode = modes[b], width = max(0, min(widths[b], columns));
  i64 first = bounds[b], end = bounds[b + 1];
  if (mode == CLS) end = min(end, first + 1);
  else if (mode == LAST) first = max(first, end - 1);
  const float share = 1.f / (float)max(end - first, (i64)1);
  TO* row_out = out + (i64)b * Output<TO>::pitch(columns);
  if (partial != nullptr && mode == MEAN) {
    const i64 chunk = FirstChunk{bounds}(b);
    const int vectors = (width + W - 1) / W;
    const Staged<W> row(staged, vectors);
    sum_rows<float>(partial, chunk, chunk + (end - first + CHUNK - 1) / CHUNK, columns, vectors, row);
    finish_row<TO>(Block{shared}, row, share, width, columns, unit[b], eps, row_out, scales + b);
  } else {
    const int vectors = (width + V - 1) / V;
    const Staged<V> row(staged, vectors);
    sum_rows<T>(hidden, first, end, columns, vectors, row);
    finish_row<TO>(Block{shared}, row, share, width, columns, unit[b], eps, row_out, scales + b);
  }
}
