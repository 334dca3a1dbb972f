// Saturating packs of int32 into int8 (sm_72 and newer).
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// Four int32 to four int8 in memory order a, b, c, d, each saturated to [-128, 127].
__device__ __forceinline__ uint32_t pack_s8x4(int a, int b, int c, int d) {
  uint32_t high, packed;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;\n" : "=r"(high) : "r"(d), "r"(c));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;\n" : "=r"(packed) : "r"(b), "r"(a), "r"(high));
  return packed;
}

}  // namespace hwkern::ptx
