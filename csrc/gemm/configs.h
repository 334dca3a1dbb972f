// The config table: one row, one instantiation. gemm_sm80.cu expands the rows into kernels, configs.cpp into data.
#pragma once

#include "hwkern.h"

// X(id, BLOCK_M, BLOCK_N, BLOCK_K, WARPS_M, WARPS_N, WARPS_K, STAGES, BLOCKS_PER_SM)
// Ids are never reused; a row that is dropped leaves a hole. 100 and up are kept for the sm_90a kernels.
#define HWKERN_SM80_CONFIGS(X)       \
  X(0, 16, 32, 256, 1, 1, 4, 6, 3)   \
  X(1, 32, 64, 256, 1, 2, 2, 4, 2)   \
  X(2, 64, 64, 128, 2, 2, 1, 4, 3)   \
  X(3, 64, 128, 128, 2, 2, 1, 3, 3)  \
  X(4, 128, 128, 128, 2, 2, 1, 3, 2) \
  X(5, 128, 256, 128, 2, 4, 1, 3, 1) \
  X(6, 128, 256, 64, 2, 4, 1, 4, 1)  \
  X(7, 256, 128, 64, 4, 2, 1, 4, 1)

namespace hwkern {

// One row of the table launched on `stream`; gemm.cpp has validated the problem and that the device can run the row.
Status launch_gemm_sm80(const Gemm& problem, int config_id, Stream stream);

}  // namespace hwkern
