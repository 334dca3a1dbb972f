// mma.sync: warp-wide integer matrix multiply (sm_80 and newer).
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// D[16×8] += A[16×32] · B[8×32]ᵀ, int8 in, int32 out. Wraps on overflow, which K < 2¹⁷ excludes.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&D)[4], const uint32_t (&A)[4], const uint32_t (&B)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(D[0]), "+r"(D[1]), "+r"(D[2]), "+r"(D[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B[0]), "r"(B[1]));
}

}  // namespace hwkern::ptx
