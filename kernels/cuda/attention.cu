// Attention within each sequence of a packed row, keys and values in packed rows too or in pages. Softmax as it goes:
// no more scores are held than a block's registers take.
//
// A block has a tile of one head's queries and goes over KEYS keys at a time. Its threads are 16 x 16: thread (x, y)
// has queries y + 16 i and keys x + 16 j of the scores, then the same queries and columns 4 x + 64 j of the sums. It
// multiplies float32 from shared memory, 4 components a load, which lasts for 16 products; no tensor cores.

#define KEYS 64
#define SLAB 32          // columns that lie together in shared memory
#define SLAB_PITCH 36    // words from slab to slab: 8 threads' vectors down a column or along a row meet in no bank
#define WEIGHT_PITCH 80  // words from a query's weights to the next one's: 16 weights of each of two fill the banks
#define ATTENTION_THREADS 256

// W: the widest head, 64, 128 or 256 columns.
template <int W> struct Tile {
  static constexpr int ROWS = W > 128 ? 2 : 4;  // queries of a thread
  static constexpr int QUERIES = 16 * ROWS;     // of a block; kernels/cuda_table.py has the same
  static constexpr int VALUES = 2048 / W;       // keys whose values are in shared memory at once
};

// Where column c of a row lies in a tile of rows of COLUMNS.
template <int COLUMNS> __device__ __forceinline__ int place_in_tile(int row, int c) {
  return (row * (COLUMNS / SLAB) + c / SLAB) * SLAB_PITCH + c % SLAB;
}

__device__ __forceinline__ float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }

// One head of the tokens of one sequence: token t in row first + t or, given its pages, in those.
template <class T> struct Tokens {
  const T* head;
  int stride, first;
  const int* pages;
  int page_size;
  __device__ __forceinline__ const T* operator()(int t) const {
    if (pages == nullptr) return head + (i64)(first + t) * stride;
    return head + ((i64)pages[t / page_size] * page_size + t % page_size) * stride;
  }
};

// COUNT tokens from `first` on into a tile, COLUMNS columns from `column` on; 0 from token `end` and from column `size`
// on.
template <class T, int COUNT, int COLUMNS>
__device__ __forceinline__ void stage(const Tokens<T>& tokens, int first, int end, int column, int size, float* tile) {
  constexpr int V = Element<T>::V, ACROSS = COLUMNS / V;
#pragma unroll 1  // else addresses take the registers that sums need
  for (int at = threadIdx.x; at < COUNT * ACROSS; at += ATTENTION_THREADS) {
    const int token = at / ACROSS, c = at % ACROSS * V;
    float x[V];
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = 0.f;
    if (first + token < end && column + c < size) load_vector<T>(tokens(first + token) + column + c, x);
    float* to = tile + place_in_tile<COLUMNS>(token, c);
#pragma unroll
    for (int i = 0; i < V; i += 4) *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
  }
}

// Four neighbouring elements of an output, written at once.
template <class T> struct __align__(4 * sizeof(T)) Four {
  T element[4];
};

// Where the tiles of sequence b begin among those of all, as the chunks of pooling do.
template <int QUERIES> struct FirstTile {
  const int* bounds;
  __device__ __forceinline__ i64 operator()(int b) const { return bounds[b] / QUERIES + b; }
};

// Over the 16 threads that have the same queries.
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int step = 8; step; step >>= 1) v = larger(v, __shfl_xor_sync(ALL_LANES, v, step));
  return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int step = 8; step; step >>= 1) v += __shfl_xor_sync(ALL_LANES, v, step);
  return v;
}

// query [T, N, size], key and value [., N / group, size], each with its strides from token to token and head to head;
// bounds [n + 1] of the queries' sequences; blocks of tiles by heads → out [T, N, size] without gaps.
// key_lengths [n]: the queries are the last of so many tokens; or null: they are all. pages [n, most] of page_size
// tokens hold the keys and values; or null: they lie in rows as the queries do. seen [n]: keys from there on are not
// looked at; or null. left, right: how far before and behind itself a token sees. A score is query · key * scale;
// limited by softcap if that is above 0; plus bias [N, reach], whose middle is distance 0, unless null. sinks [N]: the
// score of one more key, of no value; or null. A query that sees no key gives zeros.
template <class T, int W>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention(const T* __restrict__ query, const T* __restrict__ key, const T* __restrict__ value, T* __restrict__ out,
              const int* __restrict__ bounds, const int* __restrict__ key_lengths, const int* __restrict__ pages,
              const int* __restrict__ seen, const float* __restrict__ bias, const float* __restrict__ sinks, int n,
              int group, int size, int most, int page_size, int reach, int query_stride, int query_head,
              int key_stride, int key_head, int value_stride, int value_head, int left, int right, float scale,
              float softcap) {
  constexpr int ROWS = Tile<W>::ROWS, QUERIES = Tile<W>::QUERIES, VALUES = Tile<W>::VALUES;
  __shared__ __align__(16) float rows[64 * WEIGHT_PITCH];  // a slab of queries and one of keys; after those, weights
  __shared__ __align__(16) float values[2048 / SLAB * SLAB_PITCH];
  const FirstTile<QUERIES> tile{bounds};
  const int b = last_not_after(tile, n, blockIdx.x), begin = bounds[b], queries = bounds[b + 1] - begin;
  const int first = (int)(blockIdx.x - tile(b)) * QUERIES, head = blockIdx.y;
  if (first >= queries) return;  // the same for all threads of the block
  const int length = key_lengths == nullptr ? queries : key_lengths[b], past = length - queries;
  const int end = seen == nullptr ? length : min(length, seen[b]);
  const int* own_pages = pages == nullptr ? nullptr : pages + (i64)b * most;
  const Tokens<T> own{query + (i64)head * query_head, query_stride, begin, nullptr, 1};
  const Tokens<T> keys{key + (i64)(head / group) * key_head, key_stride, begin, own_pages, page_size};
  const Tokens<T> contents{value + (i64)(head / group) * value_head, value_stride, begin, own_pages, page_size};
  const int x = threadIdx.x & 15, y = threadIdx.x >> 4;
  const float factor = softcap > 0.f ? scale / softcap : scale;

  float sum[ROWS][W / 16], most_yet[ROWS], total[ROWS];  // total: this thread's share
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
#pragma unroll
    for (int c = 0; c < W / 16; ++c) sum[i][c] = 0.f;
    most_yet[i] = sinks == nullptr ? NEGATIVE_INFINITY : sinks[head];
    total[i] = sinks == nullptr || x ? 0.f : 1.f;
  }

  // Keys that none of the tile's queries sees are passed over.
  const int stop = min(end, past + min(first + QUERIES, queries) + right);
  for (int s = max(0, past + first - left); s < stop; s += KEYS) {
    float score[ROWS][4];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] = 0.f;
    for (int column = 0; column < size; column += SLAB) {
      stage<T, QUERIES, SLAB>(own, first, queries, column, size, rows);
      stage<T, KEYS, SLAB>(keys, s, stop, column, size, rows + QUERIES * SLAB_PITCH);
      __syncthreads();
#pragma unroll 1
      for (int c = 0; c < SLAB; c += 4) {
        float4 k[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) k[j] = four(rows + (QUERIES + x + 16 * j) * SLAB_PITCH + c);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const float4 q = four(rows + (y + 16 * i) * SLAB_PITCH + c);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            score[i][j] += q.x * k[j].x + q.y * k[j].y + q.z * k[j].z + q.w * k[j].w;
        }
      }
      __syncthreads();  // the slabs are read, and may be written again
    }

#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int place = past + first + y + 16 * i, low = place - left;
      const int high = place < length ? min(place + right, stop - 1) : -1;  // the last key that it sees
      float most_now = most_yet[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] *= factor;
      if (softcap > 0.f) {
#pragma unroll
        for (int j = 0; j < 4; ++j) score[i][j] = softcap * tanhf(score[i][j]);
      }
      if (bias != nullptr) {
        const float* of_place = bias + (i64)head * reach + reach / 2 - place;
#pragma unroll
        for (int j = 0, t = s + x; j < 4; ++j, t += 16)
          if (t >= low && t <= high) score[i][j] += of_place[t];
      }
#pragma unroll
      for (int j = 0, t = s + x; j < 4; ++j, t += 16) {
        if (t < low || t > high) score[i][j] = NEGATIVE_INFINITY;
        most_now = larger(most_now, score[i][j]);
      }
      most_now = row_max(most_now);
      // Until the first key is seen any base will do: all weights are 0.
      const float base = most_now == NEGATIVE_INFINITY ? 0.f : most_now, kept = __expf(most_yet[i] - base);
      most_yet[i] = most_now;
      total[i] *= kept;
#pragma unroll
      for (int c = 0; c < W / 16; ++c) sum[i][c] *= kept;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = __expf(score[i][j] - base);
        total[i] += weight;
        rows[(y + 16 * i) * WEIGHT_PITCH + x + 16 * j] = weight;
      }
    }

    for (int k = 0; k < KEYS && s + k < stop; k += VALUES) {
      stage<T, VALUES, W>(contents, s + k, stop, 0, size, values);
      __syncthreads();  // the weights are there, too
#pragma unroll 1
      for (int at = 0; at < VALUES; at += 4) {
        float weight[ROWS][4];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const float4 w = four(rows + (y + 16 * i) * WEIGHT_PITCH + k + at);
          weight[i][0] = w.x, weight[i][1] = w.y, weight[i][2] = w.z, weight[i][3] = w.w;
        }
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
          for (int j = 0; j < W / 64; ++j) {
            const float4 v = four(values + place_in_tile<W>(at + t, 4 * x + 64 * j));
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
              sum[i][4 * j] += weight[i][t] * v.x;
              sum[i][4 * j + 1] += weight[i][t] * v.y;
              sum[i][4 * j + 2] += weight[i][t] * v.z;
              sum[i][4 * j + 3] += weight[i][t] * v.w;
            }
          }
      }
      __syncthreads();  // values and weights are read, and may be written again
    }
  }

#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const float all = row_sum(total[i]), share = all == 0.f ? 0.f : 1.f / all;
    if (first + y + 16 * i >= queries) continue;
    T* to = out + ((i64)(begin + first + y + 16 * i) * gridDim.y + head) * size;
#pragma unroll
    for (int j = 0; j < W / 64; ++j) {
      const int c = 4 * x + 64 * j;
      if (c >= size) continue;
      Four<T> elements;
#pragma unroll
      for (int e = 0; e < 4; ++e) elements.element[e] = Element<T>::down(sum[i][4 * j + e] * share);
      *reinterpret_cast<Four<T>*>(to + c) = elements;
    }
  }
}
