// Scores of pairs: cosine of two vectors, MaxSim of two sets of vectors.

// a [., columns], b [., columns], rows of whole vectors; in_a and in_b [pairs] → out [pairs]: cosine of rows in_a[p] and
// in_b[p], each length at least eps. One warp a pair.
template <class T>
__global__ void cosine_pairs(const T* __restrict__ a, const T* __restrict__ b, const int* __restrict__ in_a,
                             const int* __restrict__ in_b, float* __restrict__ out, int pairs, int columns, float eps) {
  constexpr int V = Element<T>::V;
  const int p = warp_row(), lane = threadIdx.x & 31;
  if (p >= pairs) return;
  const T *one = a + (i64)in_a[p] * columns, *other = b + (i64)in_b[p] * columns;
  float dot = 0.f, squares_a = 0.f, squares_b = 0.f;
  for (int c = lane * V; c < columns; c += 32 * V) {
    float x[V], y[V];
    load_vector<T>(one + c, x);
    load_vector<T>(other + c, y);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dot += x[i] * y[i];
      squares_a += x[i] * x[i];
      squares_b += y[i] * y[i];
    }
  }
  dot = warp_sum(dot);
  const float length_a = fmaxf(sqrtf(warp_sum(squares_a)), eps), length_b = fmaxf(sqrtf(warp_sum(squares_b)), eps);
  if (lane == 0) out[p] = dot / length_a / length_b;
}

// MaxSim multiplies tiles of QUERY_TILE by DOCUMENT_TILE tokens, DEPTH components at a time, from shared memory: a
// block of 16 x 16 threads, each 2 x 4 products. Tiles lie there by component, padded by one: neither what a warp
// writes (8 tokens' vectors of 8, or 4 of 4) nor the rows it reads meet in a bank.
#define QUERY_TILE 32
#define DOCUMENT_TILE 64
#define DEPTH 32

// Tokens first … first + TILE - 1 of rows [., columns], components from `depth` on, into `tile`; 0 behind both ends.
template <class T, int TILE>
__device__ __forceinline__ void load_tile(const T* __restrict__ rows, i64 first, i64 end, int columns, int depth,
                                          float (&tile)[DEPTH][TILE + 1]) {
  constexpr int V = Element<T>::V, ACROSS = DEPTH / V;
  for (int at = threadIdx.x; at < TILE * ACROSS; at += blockDim.x) {
    const int token = at / ACROSS, c = at % ACROSS * V;
    float x[V];
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = 0.f;
    if (first + token < end && depth + c < columns) load_vector<T>(rows + (first + token) * columns + depth + c, x);
#pragma unroll
    for (int i = 0; i < V; ++i) tile[c + i][token] = x[i];
  }
}

// queries and documents [., columns], rows of whole vectors; their bounds, one more each than there are; in_queries and
// in_documents [pairs] → out [pairs]: the sum over the query's tokens of the largest product with any token of the
// document's, 0 if either has none. One block a pair.
template <class T>
__global__ void maxsim(const T* __restrict__ queries, const int* __restrict__ query_bounds,
                       const T* __restrict__ documents, const int* __restrict__ document_bounds,
                       const int* __restrict__ in_queries, const int* __restrict__ in_documents,
                       float* __restrict__ out, int columns) {
  __shared__ float query[DEPTH][QUERY_TILE + 1];
  __shared__ float document[DEPTH][DOCUMENT_TILE + 1];
  __shared__ float shared[33];
  const int q = in_queries[blockIdx.x], d = in_documents[blockIdx.x];
  const i64 first_q = query_bounds[q], end_q = query_bounds[q + 1];
  const i64 first_d = document_bounds[d], end_d = document_bounds[d + 1];
  const int x = threadIdx.x & 15, y = threadIdx.x >> 4;  // document tokens x + 16 j, query tokens y + 16 i of the tiles
  float total = 0.f;
  for (i64 tq = first_q; tq < end_q; tq += QUERY_TILE) {
    float best[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
    for (i64 td = first_d; td < end_d; td += DOCUMENT_TILE) {
      float dot[2][4] = {};
      for (int depth = 0; depth < columns; depth += DEPTH) {
        load_tile<T, QUERY_TILE>(queries, tq, end_q, columns, depth, query);
        load_tile<T, DOCUMENT_TILE>(documents, td, end_d, columns, depth, document);
        __syncthreads();
#pragma unroll 8
        for (int c = 0; c < DEPTH; ++c) {
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) dot[i][j] += query[c][y + 16 * i] * document[c][x + 16 * j];
        }
        __syncthreads();  // the tiles are read, and may be written again
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (td + x + 16 * j < end_d) best[i] = larger(best[i], dot[i][j]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 8; step; step >>= 1) best[i] = larger(best[i], __shfl_xor_sync(ALL_LANES, best[i], step));
      if (x == 0 && tq + y + 16 * i < end_q) total += best[i];
    }
  }
  total = Block{shared}.sum(total);
  if (threadIdx.x == 0) out[blockIdx.x] = end_d > first_d ? total : 0.f;
}
