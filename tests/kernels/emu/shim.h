// CUDA C for g++: the words of the language, the types and the functions that kernels use, as one fiber a thread sees them.
#pragma once
#include "runtime.h"
#include <algorithm>
#include <cmath>
#include <limits>
#include <cstring>

// ---- words ----
#define __global__
#define __device__
#define __host__
#define __constant__ static const
// The thread-local block of the module is the block's shared memory: one OS thread runs all blocks, one after the other.
// Each array apart from the next, so that one element too far is outside.
#define __shared__ thread_local __attribute__((aligned(256)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emu::current->tid)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
static constexpr int warpSize = 32;

// ---- vectors ----
#define EMU_VECTORS(type, name, small, large)                              \
  struct alignas(small) name##2 { type x, y; };                            \
  struct alignas(large) name##4 { type x, y, z, w; };                      \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }  \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned, uint, 8, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)

// ---- barriers, votes, shuffles ----
// The line of the call is its identity; its address is none, as g++ may copy a call.
#define EMU_LINE int line = __builtin_LINE()
EMU_CALL inline void __syncthreads(EMU_LINE) { emu::wait_for_block(emu::SYNC, 0, line); }
EMU_CALL inline int __syncthreads_or(int p, EMU_LINE) { emu::wait_for_block(emu::SYNC_OR, p, line); return emu::block_or; }
EMU_CALL inline int __syncthreads_and(int p, EMU_LINE) { emu::wait_for_block(emu::SYNC_AND, p, line); return emu::block_and; }
EMU_CALL inline int __syncthreads_count(int p, EMU_LINE) { emu::wait_for_block(emu::SYNC_COUNT, p, line); return emu::block_count; }
EMU_CALL inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_LINE) { emu::wait_for_warp(emu::SYNCWARP, mask, 0, -1, 0, line); }
EMU_CALL inline unsigned __ballot_sync(unsigned mask, int p, EMU_LINE) { emu::wait_for_warp(emu::BALLOT, mask, 0, -1, p, line); return unsigned(emu::current->got); }
EMU_CALL inline int __any_sync(unsigned mask, int p, EMU_LINE) { emu::wait_for_warp(emu::ANY, mask, 0, -1, p, line); return emu::current->got != 0; }
EMU_CALL inline int __all_sync(unsigned mask, int p, EMU_LINE) { emu::wait_for_warp(emu::ALL, mask, 0, -1, p, line); return emu::current->got != 0; }
namespace emu {
template <class T> EMU_UNSEEN inline T exchange(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  wait_for_warp(SHUFFLE, mask, bits, source, 0, line);
  T got;
  memcpy(&got, &current->got, sizeof(T));
  return got;
}
}  // namespace emu
// width lanes form a section; who would read beyond it reads itself.
template <class T> EMU_CALL T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_LINE) {
  int lane = emu::current->lane;
  return emu::exchange(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), line);
}
template <class T> EMU_CALL T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, EMU_LINE) {
  int lane = emu::current->lane, source = lane ^ with;
  return emu::exchange(mask, v, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, line);
}
template <class T> EMU_CALL T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
  int lane = emu::current->lane, source = lane + int(by);
  return emu::exchange(mask, v, source >= (lane & ~(width - 1)) + width ? lane : source, line);
}
template <class T> EMU_CALL T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_LINE) {
  int lane = emu::current->lane, source = lane - int(by);
  return emu::exchange(mask, v, source < (lane & ~(width - 1)) ? lane : source, line);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

// ---- atomics: one OS thread runs all; the checker is told ----
#ifdef EMU_CHECK
extern "C" void emu_note_atomic(void* p, unsigned n, void* pc);
#else
static inline void emu_note_atomic(void*, unsigned, void*) {}
#endif
#define EMU_ATOMIC(name, result)                                            \
  template <class T, class U> EMU_CALL T name(T* p, U value) {              \
    emu_note_atomic(p, sizeof(T), __builtin_return_address(0));             \
    T old = *p, v = T(value);                                               \
    *p = result;                                                            \
    return old;                                                             \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicMax, v > old ? v : old)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicOr, old | v)

// ---- bits ----
template <class To, class From> static inline To emu_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
static inline float __uint_as_float(unsigned u) { return emu_bits<float>(u); }
static inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }
static inline float __int_as_float(int i) { return emu_bits<float>(i); }
static inline int __float_as_int(float f) { return emu_bits<int>(f); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
template <class T> static inline T __ldg(const T* p) { return *p; }

// ---- numbers; macros where the C library has declared the name ----
using std::isinf;
using std::isnan;
using std::max;
using std::min;
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Never contracted into a fused multiply-add.
__attribute__((optimize("fp-contract=off"), noinline)) static float __fmul_rn(float a, float b) { return a * b; }
__attribute__((optimize("fp-contract=off"), noinline)) static float __fadd_rn(float a, float b) { return a + b; }
static inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
static inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline float __int2float_rn(int x) { return float(x); }

// ---- 16-bit floats, rounded as in cuda_fp16.h and cuda_bf16.h ----
struct __half { _Float16 v; };
struct __nv_bfloat16 { unsigned short v; };
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;
static inline float __half2float(__half h) { return float(h.v); }
static inline __half __float2half_rn(float f) { return {_Float16(f)}; }
static inline __half __float2half(float f) { return {_Float16(f)}; }
static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(unsigned(b.v) << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  unsigned u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
static inline __half __ushort_as_half(unsigned short u) { return emu_bits<__half>(u); }
static inline unsigned short __half_as_ushort(__half h) { return emu_bits<unsigned short>(h); }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return {u}; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.v; }
