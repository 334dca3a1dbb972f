// Hints to the L2 cache.
#pragma once

namespace hwkern::ptx {

// The line of global memory at `address` to L2. No read: L2 is where all SMs agree, so the line may still be written.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address) : "memory");
}
__device__ __forceinline__ void store_keep(void* address, int4 v) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
      "st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, policy;\n}\n" ::"l"(address),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

}  // namespace hwkern::ptx
