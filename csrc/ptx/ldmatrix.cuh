// ldmatrix, stmatrix: four 8-row × 16-byte matrices between shared memory and mma fragments.
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8; D[i] is this lane's 4 bytes of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&D)[4], uint32_t smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(D[0]), "=r"(D[1]), "=r"(D[2]), "=r"(D[3])
               : "r"(smem_row));
}

// Each matrix transposed: what comes down a column of 2-byte elements.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&D)[4], uint32_t smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(D[0]), "=r"(D[1]), "=r"(D[2]), "=r"(D[3])
               : "r"(smem_row));
}

// The way back (sm_90 and newer): lane l gives the address of row l % 8 of matrix l / 8, whose 4 bytes of this lane are D[i].
__device__ __forceinline__ void stmatrix_x4(uint32_t smem_row, const uint32_t (&D)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(smem_row), "r"(D[0]),
               "r"(D[1]), "r"(D[2]), "r"(D[3])
               : "memory");
#endif
}

}  // namespace hwkern::ptx
