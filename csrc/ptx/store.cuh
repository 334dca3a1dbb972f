// Stores to global memory.
#pragma once

#include <cuda_runtime.h>

namespace hwkern::ptx {

// 16 bytes in one store. An assignment of a uint4 that was read from shared memory becomes four stores of 4 bytes where
// the compiler sees its members one by one.
__device__ __forceinline__ void store_global(uint4* D, uint4 A) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(D), "r"(A.x), "r"(A.y), "r"(A.z), "r"(A.w)
               : "memory");
}

}  // namespace hwkern::ptx
