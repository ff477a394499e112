// What translated PTX calls: registers as C++ variables, addresses of shared memory as offsets into the block's.
#pragma once
#include "shim.h"

#define EMU_PTX static inline __attribute__((always_inline))
namespace emu {
// The thread-local block, by way of the one array of it that every module has.
extern char* shared_base;
}
extern thread_local unsigned char emu_dynamic[];

template <class To, class From> EMU_PTX To ptx_as(From from) {
  if constexpr (std::is_same_v<To, From>) return from;
  else if constexpr (sizeof(To) == sizeof(From) && !std::is_same_v<To, bool>) return emu_bits<To>(from);
  else return static_cast<To>(from);
}
EMU_PTX float ptx_ftz(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
// min and max give the operand that is a number, and know -0 from 0.
EMU_PTX float ptx_min(float a, float b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
EMU_PTX float ptx_max(float a, float b) { return a != a ? b : b != b ? a : a > b || (a == b && std::signbit(b)) ? a : b; }
EMU_PTX float ptx_saturate(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
EMU_PTX float ptx_from_half(uint16_t h) { return float(emu_bits<_Float16>(h)); }
EMU_PTX uint16_t ptx_to_half(float f) { return emu_bits<uint16_t>(_Float16(f)); }
EMU_PTX uint16_t ptx_to_bfloat16(float f) { return __float2bfloat16_rn(f).v; }
EMU_PTX float ptx_from_bfloat16(uint16_t b) { return emu_bits<float>(uint32_t(b) << 16); }
// Rounded towards -inf: the product is exact in a double, the sum nearly so.
static float ptx_fma_down(float a, float b, float c) {
  double sum = double(a) * double(b) + double(c);
  float f = float(sum);
  return double(f) > sum ? nextafterf(f, -__builtin_inff()) : f;
}
// Towards 0; the sum of two is exact in a double but for what is far below a float's last place.
static float ptx_add_towards_zero(float a, float b) {
  double sum = double(a) + double(b);
  float f = float(sum);
  return fabs(double(f)) > fabs(sum) ? nextafterf(f, 0.f) : f;
}
template <class To> EMU_PTX To ptx_to_integer(float x) {  // clamps; NaN is 0
  if (x != x) return 0;
  double low = double(std::numeric_limits<To>::min()), high = double(std::numeric_limits<To>::max());
  return double(x) <= low ? std::numeric_limits<To>::min() : double(x) >= high ? std::numeric_limits<To>::max() : To(x);
}
template <class T> EMU_PTX T ptx_shift_left(T x, uint32_t by) { return by >= 8 * sizeof(T) ? T(0) : T(x << by); }
template <class T> EMU_PTX T ptx_shift_right(T x, uint32_t by) {
  return by >= 8 * sizeof(T) ? T(std::is_signed_v<T> && x < 0 ? -1 : 0) : T(x >> by);
}
template <class W, class T> EMU_PTX T ptx_high(T a, T b) { return T((W(a) * W(b)) >> (8 * sizeof(T))); }
// Bytes of b:a picked by four selectors of four bits; the selector's high bit spreads the byte's sign.
EMU_PTX uint32_t ptx_permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint64_t both = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t s = selectors >> (4 * i) & 15, byte = both >> (8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
EMU_PTX uint32_t ptx_extract(uint32_t x, uint32_t at, uint32_t width) {
  return width == 0 || at > 31 ? 0 : x >> at & (width >= 32 ? ~0u : (1u << width) - 1);
}
EMU_PTX int32_t ptx_extract(int32_t x, uint32_t at, uint32_t width) {
  if (width == 0) return 0;
  uint32_t low = at > 31 ? 0u : uint32_t(x) >> at;
  if (at > 31) return x < 0 ? -1 : 0;
  if (at + width >= 32) return x >> at;
  low &= (1u << width) - 1;
  return low >> (width - 1) & 1 ? int32_t(low | ~0u << width) : int32_t(low);
}
EMU_PTX uint32_t ptx_insert(uint32_t a, uint32_t b, uint32_t at, uint32_t width) {
  if (width == 0 || at > 31) return b;
  uint32_t mask = (width >= 32 ? ~0u : (1u << width) - 1) << at;
  return (a << at & mask) | (b & ~mask);
}
EMU_PTX uint32_t ptx_funnel_left(uint32_t low, uint32_t high, uint32_t by) { return by & 31 ? high << (by & 31) | low >> (32 - (by & 31)) : high; }
EMU_PTX uint32_t ptx_funnel_right(uint32_t low, uint32_t high, uint32_t by) { return by & 31 ? low >> (by & 31) | high << (32 - (by & 31)) : low; }
