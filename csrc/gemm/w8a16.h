// The weight-only (W8A16) rows of the config table: w8a16.cu expands them into kernels, w8a16.cpp into data.
#pragma once

#include "hwkern.h"

// X(id, BLOCK_M, BLOCK_N, WARPS_N, WARPS_K, STAGES, X_STAGES, TMA, CLUSTER, BLOCKS_PER_SM)
// BLOCK_M tokens and BLOCK_N weight rows a tile; CLUSTER · WARPS_K warps share the tile's K. Each has a queue of STAGES
// steps of weights and one of X_STAGES steps of x. TMA: the copy engine brings the weights (Hopper and newer).
// The portable rows fit in 99 KB of shared memory, what a block may have on compute capability 8.6, 8.9 and 12.0.
// BLOCK_N 48, because with 64 two blocks of 16 tokens do not fit on an SM.
#define HWKERN_W8A16_CONFIGS(X)       \
  X(300, 8, 32, 1, 8, 3, 3, 0, 1, 2)  \
  X(301, 8, 64, 1, 8, 2, 2, 1, 4, 2)  \
  X(302, 16, 32, 1, 8, 2, 2, 0, 1, 2) \
  X(303, 16, 48, 1, 8, 2, 2, 1, 4, 2) \
  X(304, 32, 64, 1, 4, 2, 2, 0, 1, 2) \
  X(305, 32, 64, 1, 4, 3, 2, 1, 4, 2) \
  X(306, 16, 64, 1, 8, 3, 3, 1, 2, 1)

namespace hwkern {

constexpr int kW8A16Step = 64;         // k that a warp takes at once: 16 a lane
constexpr int kW8A16PieceTokens = 8;   // tokens whose partial sums are added at once

// Floats between two tokens of partial sums: 2·t·pitch + g are 32 banks for the lanes (g, t) of a fragment.
constexpr int w8a16_pitch(int block_n) { return block_n + 4; }

// The queues of weights and of x, the partial sums of the warps, those of the cluster's blocks and the column terms
// (twice), the barriers.
constexpr int w8a16_shared_bytes(int block_m, int block_n, int warps_n, int warps_k, int stages, int x_stages,
                                 int cluster) {
  const int warps = warps_n * warps_k;
  return warps_k * stages * block_n * kW8A16Step + warps * x_stages * block_m * kW8A16Step * 2 +
         warps_k * kW8A16PieceTokens * w8a16_pitch(block_n) * 4 + (cluster > 1 ? 2 * block_m * block_n * 4 : 0) +
         2 * block_n * 8 + 16 + warps * stages * 8;
}

// Predicted microseconds of a weight-only row; see gemm_predict_us.
double predict_w8a16(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device);

// One row of the table launched on `stream`; w8a16.cpp has validated the problem and that the device can run the row.
Status launch_w8a16(const WeightOnlyLinear& problem, int config_id, const Device& device, Stream stream);

}  // namespace hwkern
