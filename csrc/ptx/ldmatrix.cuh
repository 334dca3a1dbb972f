// ldmatrix: four 8-row × 16-byte matrices from shared memory into mma fragments.
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// Lane l gives the address of row l % 8 of matrix l / 8; D[i] is this lane's 4 bytes of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&D)[4], uint32_t smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(D[0]), "=r"(D[1]), "=r"(D[2]), "=r"(D[3])
               : "r"(smem_row));
}

}  // namespace hwkern::ptx
