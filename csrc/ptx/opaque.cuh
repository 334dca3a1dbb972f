// Hides from the compiler where a value came from.
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// What was computed from `value` before this is computed anew after it, and takes no registers in between.
__device__ __forceinline__ void opaque(uint32_t& value) { asm volatile("" : "+r"(value)); }

}  // namespace hwkern::ptx
