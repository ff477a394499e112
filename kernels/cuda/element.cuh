// What all kernels share: element types, 16-byte vectors, sums over a warp and a block, and how a row is written out.
//
// The files of this folder are one translation unit, this one first (kernels/cuda_table.py joins them). NVRTC compiles
// it with no host headers but the two below, so there is no INFINITY and no std:: here.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef long long i64;
#define ALL_LANES 0xffffffffu
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

// ── elements ─────────────────────────────────────────────────────────────────────────────────────────────────────

// V: elements in 16 bytes; up: to float32, exact; down: from float32, to nearest, ties to even.
template <class T> struct Element;
template <> struct Element<float> {
  static constexpr int V = 4;
  static __device__ __forceinline__ float up(float x) { return x; }
  static __device__ __forceinline__ float down(float x) { return x; }
};
template <> struct Element<__half> {
  static constexpr int V = 8;
  static __device__ __forceinline__ float up(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half down(float x) { return __float2half_rn(x); }
};
template <> struct Element<__nv_bfloat16> {
  static constexpr int V = 8;
  static __device__ __forceinline__ float up(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 down(float x) { return __float2bfloat16_rn(x); }
};

// 16 bytes as one load or store and as elements.
template <class T> union Vector {
  uint4 bits;
  T element[Element<T>::V];
  __device__ Vector() {}
};

// `from` must be 16-byte aligned.
template <class T> __device__ __forceinline__ void load_vector(const T* from, float (&to)[Element<T>::V]) {
  Vector<T> v;
  v.bits = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < Element<T>::V; ++i) to[i] = Element<T>::up(v.element[i]);
}

template <class T> __device__ __forceinline__ void store_vector(T* to, const float (&from)[Element<T>::V]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < Element<T>::V; ++i) v.element[i] = Element<T>::down(from[i]);
  *reinterpret_cast<uint4*>(to) = v.bits;
}

// The larger of two; a NaN wins, as in torch, where fmaxf would drop it.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// ── sums and maxima ──────────────────────────────────────────────────────────────────────────────────────────────

// Over the 32 lanes; the result is in all of them.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(ALL_LANES, v, step);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v = larger(v, __shfl_xor_sync(ALL_LANES, v, step));
  return v;
}

// The threads that work on one row together: who this one is among them, and their sums.
struct Warp {
  static __device__ __forceinline__ int rank() { return threadIdx.x & 31; }
  static __device__ __forceinline__ int size() { return 32; }
  __device__ __forceinline__ float sum(float v) const { return warp_sum(v); }
  __device__ __forceinline__ float max(float v) const { return warp_max(v); }
};

// A block of whole warps. `shared` holds 33 floats: one a warp and the result. Two calls may follow each other: the
// second writes the warps' places when all have passed the first one's last barrier, and the result's place only
// after its own first barrier, when all have read it.
struct Block {
  float* shared;
  static __device__ __forceinline__ int rank() { return threadIdx.x; }
  static __device__ __forceinline__ int size() { return blockDim.x; }
  __device__ __forceinline__ float sum(float v) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    v = warp_sum(v);
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    if (warp == 0) {
      v = warp_sum(lane < warps ? shared[lane] : 0.f);
      if (lane == 0) shared[32] = v;
    }
    __syncthreads();
    return shared[32];
  }
  __device__ __forceinline__ float max(float v) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    v = warp_max(v);
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    if (warp == 0) {
      v = warp_max(lane < warps ? shared[lane] : NEGATIVE_INFINITY);
      if (lane == 0) shared[32] = v;
    }
    __syncthreads();
    return shared[32];
  }
};

// Which row this warp works on, where a block has a row a warp.
__device__ __forceinline__ int warp_row() { return blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); }

// ── rows out ─────────────────────────────────────────────────────────────────────────────────────────────────────

// How a row of `columns` components is written: row(c) * factor for c < width, 0 behind. Signed bytes are whole numbers
// to be multiplied by the row's scale, unsigned bytes have one bit a component; `pitch` is a row's size in elements.
template <class TO> struct Output {
  static constexpr bool SCALED = false;
  static __device__ __forceinline__ int pitch(int columns) { return columns; }
  template <class Row>
  static __device__ __forceinline__ void write(const Row& row, int width, int columns, float factor, TO* out, int first,
                                               int step) {
    for (int c = first; c < columns; c += step) out[c] = Element<TO>::down(c < width ? row(c) * factor : 0.f);
  }
};
template <> struct Output<signed char> {
  static constexpr bool SCALED = true;
  static __device__ __forceinline__ int pitch(int columns) { return columns; }
  template <class Row>
  static __device__ __forceinline__ void write(const Row& row, int width, int columns, float factor, signed char* out,
                                               int first, int step) {
    for (int c = first; c < columns; c += step) {
      const int whole = c < width ? __float2int_rn(row(c) * factor) : 0;
      out[c] = (signed char)max(-127, min(127, whole));
    }
  }
};
// The first component is the highest bit; set from 0 upwards. A thread makes whole bytes, so that none is shared.
template <> struct Output<unsigned char> {
  static constexpr bool SCALED = false;
  static __device__ __forceinline__ int pitch(int columns) { return (columns + 7) / 8; }
  template <class Row>
  static __device__ __forceinline__ void write(const Row& row, int width, int columns, float factor, unsigned char* out,
                                               int first, int step) {
    for (int byte = first; byte < pitch(columns); byte += step) {
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = 8 * byte + i;
        bits = 2 * bits + (c < width && row(c) >= 0.f);
      }
      out[byte] = (unsigned char)bits;
    }
  }
};

// Cuts a row to `width`, gives it unit length if `unit`, casts and writes it: row(c) * factor are its components. All
// threads of the group call it. `scale` gets what whole numbers are to be multiplied by; it is 1 for all but int8.
template <class TO, class Group, class Row>
__device__ __forceinline__ void finish_row(const Group& group, const Row& row, float factor, int width, int columns,
                                           bool unit, float eps, TO* out, float* scale) {
  float squares = 0.f, most = 0.f;
  for (int c = group.rank(); c < width; c += group.size()) {
    const float v = row(c);
    squares += (v * factor) * (v * factor);
    if (Output<TO>::SCALED) most = larger(most, fabsf(v));
  }
  if (unit) factor /= fmaxf(sqrtf(group.sum(squares)), eps);
  float of_one = 1.f;
  if (Output<TO>::SCALED) {
    // The largest becomes 127, whatever the length, which is in the scale alone. A row of zeros has scale 0; a NaN
    // cannot be said in a byte, so the scale says it.
    most = group.max(most);
    of_one = most * factor / 127.f;
    factor = 127.f / fmaxf(most, 1e-30f);
  }
  Output<TO>::write(row, width, columns, factor, out, group.rank(), group.size());
  if (group.rank() == 0) *scale = of_one;
}

// ── packed rows ──────────────────────────────────────────────────────────────────────────────────────────────────

// The last b of 0 … n - 1 with start(b) <= place, where start nowhere falls and start(0) <= place.
template <class Start> __device__ __forceinline__ int last_not_after(const Start& start, int n, i64 place) {
  int low = 0, high = n;
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    if (start(middle) <= place) low = middle;
    else high = middle;
  }
  return low;
}

// Where sequence b begins.
struct Bounds {
  const int* bounds;
  __device__ __forceinline__ i64 operator()(int b) const { return bounds[b]; }
};
