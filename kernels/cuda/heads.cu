// What stands behind a head: activations of logits, and weights of a sparse embedding.

enum Kind { IDENTITY = 0, SIGMOID = 1, SOFTMAX = 2 };

// logits [rows, columns], kinds [rows] → out [rows, columns] of (logit - mean) / sigma, as each row's kind says. One
// warp a row.
template <class T>
__global__ void activate_rows(const T* __restrict__ logits, const signed char* __restrict__ kinds,
                              float* __restrict__ out, int rows, int columns, float mean, float sigma) {
  const int r = warp_row(), lane = threadIdx.x & 31;
  if (r >= rows) return;
  const Direct<T> row{logits + (i64)r * columns};
  out += (i64)r * columns;
  const int kind = kinds[r];
  if (kind == SOFTMAX) {
    float most = NEGATIVE_INFINITY, sum = 0.f;
    for (int c = lane; c < columns; c += 32) most = larger(most, (row(c) - mean) / sigma);
    most = warp_max(most);
    for (int c = lane; c < columns; c += 32) sum += expf((row(c) - mean) / sigma - most);
    sum = warp_sum(sum);
    for (int c = lane; c < columns; c += 32) out[c] = expf((row(c) - mean) / sigma - most) / sum;
  } else {
    for (int c = lane; c < columns; c += 32) {
      const float v = (row(c) - mean) / sigma;
      out[c] = kind == SIGMOID ? 1.f / (1.f + expf(-v)) : v;
    }
  }
}

// logits [T, columns], bounds [n + 1] → out [n, columns]: over a sequence's tokens the maximum of log(1 + relu(logit)),
// or their sum if `sums`; the logarithm is taken twice if `twice`. A thread a component, so that a warp reads a line;
// blocks of columns by sequences. Rows need not be aligned: vocabularies have odd sizes.
template <class T>
__global__ void sparse_rows(const T* __restrict__ logits, const int* __restrict__ bounds, float* __restrict__ out,
                            int columns, int sums, int twice) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  const int end = bounds[blockIdx.y + 1];
  float weight = 0.f;
  if (sums) {
    for (i64 t = bounds[blockIdx.y]; t < end; ++t) {
      const float v = log1pf(larger(0.f, Element<T>::up(logits[t * columns + c])));
      weight += twice ? log1pf(v) : v;
    }
  } else {
    // The logarithm rises throughout: it can be taken of the maximum.
#pragma unroll 4
    for (i64 t = bounds[blockIdx.y]; t < end; ++t) weight = larger(weight, Element<T>::up(logits[t * columns + c]));
    weight = log1pf(weight);
    if (twice) weight = log1pf(weight);
  }
  out[(i64)blockIdx.y * columns + c] = weight;
}
