// float32, float16 and bfloat16 as bits, in integer operations that every instruction set has in vectors.
//
// Each type gives kMagnitude (all bits but the sign), kInfinity, widen (exact) and narrow (one rounding, to nearest
// even; NaN stays NaN). None of it depends on the compiler's half type or on the mode for subnormals.
#pragma once

#include <cstdint>
#include <cstring>

// Callers are compiled once per instruction set: a function that is not inlined would keep the lowest one.
#define HWKERN_INLINE __attribute__((always_inline)) inline

namespace hwkern::cpu {

HWKERN_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

HWKERN_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Bits are signed: magnitudes are never negative, and SSE2 has the maximum of int16 but not of uint16.
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
  static HWKERN_INLINE float widen(Bits x) { return from_bits(static_cast<uint32_t>(x)); }
  static HWKERN_INLINE Bits narrow(float y) { return static_cast<Bits>(to_bits(y)); }
};

struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInfinity = 0x7f80;
  static HWKERN_INLINE float widen(Bits x) { return from_bits(uint32_t{static_cast<uint16_t>(x)} << 16); }
  static HWKERN_INLINE Bits narrow(float y) {
    const uint32_t u = to_bits(y);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet = (u >> 16) | 0x40;
    return static_cast<Bits>((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
  }
};

struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kMagnitude = 0x7fff, kInfinity = 0x7c00;
  static constexpr uint32_t kRebias = uint32_t{127 - 15} << 23;  // between the exponents of float16 and float32

  static HWKERN_INLINE float widen(Bits x) {
    const uint32_t u = static_cast<uint16_t>(x), a = u & 0x7fff;
    const uint32_t normal = (a << 13) + kRebias;
    const uint32_t special = normal + kRebias;  // infinity and NaN: the exponent becomes 255
    const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(a)) * 0x1p-24f);
    const uint32_t finite = a < 0x0400 ? subnormal : normal;
    return from_bits((a < 0x7c00 ? finite : special) | ((u & 0x8000) << 16));
  }

  static HWKERN_INLINE Bits narrow(float y) {
    const uint32_t u = to_bits(y), a = u & 0x7fffffff;
    const uint32_t normal = (a - kRebias + 0x0fff + ((a >> 13) & 1)) >> 13;
    // In [0.5, 1) the last place is 2⁻²⁴, float16's smallest step: the addition rounds, the difference is the result.
    const uint32_t subnormal = to_bits(from_bits(a) + 0.5f) - to_bits(0.5f);
    uint32_t r = a < 0x38800000 ? subnormal : normal;  // 2⁻¹⁴
    r = a >= 0x477ff000 ? 0x7c00 : r;                  // 65520, half-way between the largest float16 and 2¹⁶
    r = a > 0x7f800000 ? 0x7e00 : r;                   // NaN
    return static_cast<Bits>(r | ((u >> 16) & 0x8000));
  }
};

}  // namespace hwkern::cpu
