// What stands between a backbone's matrix products: residual and norm, rotary positions, gated activation.

// x [rows, columns], rows of whole vectors; residual the same or null; weight [columns]; bias [columns] or null →
// out: norm(x + residual) * weight + bias; sum: x + residual, if not null. `centred`: LayerNorm, else RMSNorm. One
// block a row, which it keeps in dynamic shared memory: columns floats.
template <class T>
__global__ void norm_rows(const T* __restrict__ x, const T* __restrict__ residual, const float* __restrict__ weight,
                          const float* __restrict__ bias, T* __restrict__ out, T* __restrict__ sum, int columns,
                          int centred, float eps) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  __shared__ float shared[33];
  constexpr int V = Element<T>::V;
  const Block block{shared};
  const int vectors = columns / V;
  const i64 row = (i64)blockIdx.x * columns;
  // Component c of vector k at [c][k]: neighbouring threads, neighbouring words. A thread reads what it wrote itself.
  float* kept = reinterpret_cast<float*>(smem_raw);
  float total = 0.f;
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    float v[V];
    load_vector<T>(x + row + k * V, v);
    if (residual != nullptr) {
      float more[V];
      load_vector<T>(residual + row + k * V, more);
      // Rounded as the sum that the next layer adds to is: both see the same row.
#pragma unroll
      for (int i = 0; i < V; ++i) v[i] = Element<T>::up(Element<T>::down(v[i] + more[i]));
    }
    if (sum != nullptr) store_vector<T>(sum + row + k * V, v);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      kept[i * vectors + k] = v[i];
      total += v[i];
    }
  }
  const float mean = centred ? block.sum(total) / (float)columns : 0.f;
  float squares = 0.f;
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float v = kept[i * vectors + k] - mean;
      squares += v * v;
    }
  }
  const float factor = 1.f / sqrtf(block.sum(squares) / (float)columns + eps);
  for (int k = threadIdx.x; k < vectors; k += blockDim.x) {
    float v[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      v[i] = (kept[i * vectors + k] - mean) * factor * weight[k * V + i];
      if (bias != nullptr) v[i] += bias[k * V + i];
    }
    store_vector<T>(out + row + k * V, v);
  }
}

// x [T, heads, size], heads without gaps, a token every `stride` elements; cosines and sines [T, turned] → out
// [T, heads, size]: the first `turned` components of each head turned, the left half into the right one, the rest as
// they are. A thread a pair, or a component of the rest.
template <class T, class TC>
__global__ void rotary(const T* __restrict__ x, const TC* __restrict__ cosines, const TC* __restrict__ sines,
                       T* __restrict__ out, i64 tokens, int heads, int size, int turned, i64 stride) {
  const int half = turned / 2, each = size - half;  // threads a head
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  const i64 t = at / ((i64)heads * each);
  if (t >= tokens) return;
  const int left = (int)(at % ((i64)heads * each)), head = left / each, c = left % each;
  const T* from = x + t * stride + (i64)head * size;
  T* to = out + (t * heads + head) * size;
  if (c >= half) {
    to[c + half] = from[c + half];
    return;
  }
  const Direct<TC> cosine{cosines + t * turned}, sine{sines + t * turned};
  const float a = Element<T>::up(from[c]), b = Element<T>::up(from[c + half]);
  to[c] = Element<T>::down(a * cosine(c) - b * sine(c));
  to[c + half] = Element<T>::down(b * cosine(c + half) + a * sine(c + half));
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

__device__ __forceinline__ float activated(float x, int activation) {
  if (activation == SILU) return x / (1.f + expf(-x));
  if (activation == GELU) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

// both [rows, 2 * columns], gate and up beside each other, columns of whole vectors → out [rows, columns]:
// activation(gate) * up. A thread a vector.
template <class T>
__global__ void gated(const T* __restrict__ both, T* __restrict__ out, i64 rows, int columns, int activation,
                      int gate_first) {
  constexpr int V = Element<T>::V;
  const int vectors = columns / V;
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = at / vectors;
  if (row >= rows) return;
  const i64 left = row * 2 * columns + at % vectors * V;
  float gate[V], up[V];
  load_vector<T>(both + left + (gate_first ? 0 : columns), gate);
  load_vector<T>(both + left + (gate_first ? columns : 0), up);
#pragma unroll
  for (int i = 0; i < V; ++i) gate[i] = activated(gate[i], activation) * up[i];
  store_vector<T>(out + at * V, gate);
}
