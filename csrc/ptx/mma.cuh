// mma.sync: warp-wide matrix multiply (sm_80 and newer).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// D[16×8] += A[16×16] · B[8×16]ᵀ, 16-bit floats in, float32 out; the first argument only names their type.
__device__ __forceinline__ void mma_m16n8k16(__half, float (&D)[4], const uint32_t (&A)[4], uint32_t B0, uint32_t B1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}
__device__ __forceinline__ void mma_m16n8k16(__nv_bfloat16, float (&D)[4], const uint32_t (&A)[4], uint32_t B0,
                                             uint32_t B1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(D[0]), "+f"(D[1]), "+f"(D[2]), "+f"(D[3])
      : "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3]), "r"(B0), "r"(B1));
}

}  // namespace hwkern::ptx
