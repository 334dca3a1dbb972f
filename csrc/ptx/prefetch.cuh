// What is known to be read soon, or only once.
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// The line at `at` into L2; nobody waits for it.
__device__ __forceinline__ void prefetch_l2(const void* at) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(at) : "memory");
}

// 16 bytes that are the first to leave L2, and do not stay in L1 (sm_80 and newer).
__device__ __forceinline__ uint4 load_once(const void* at) {
  uint4 v;
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], policy;\n}\n"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(at)
      : "memory");
  return v;
}

}  // namespace hwkern::ptx
