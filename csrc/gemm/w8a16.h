// The weight-only (W8A16) rows of the config table: w8a16.cu expands them into kernels, w8a16.cpp into data.
#pragma once

#include "hwkern.h"

// X(id, BLOCK_M, BLOCK_N, WARPS_N, WARPS_K, STAGES, CLUSTER, BLOCKS_PER_SM)
// BLOCK_M tokens and BLOCK_N weight rows a tile; CLUSTER · WARPS_K warps share the tile's K.
#define HWKERN_W8A16_CONFIGS(X)   \
  X(300, 8, 16, 1, 8, 10, 1, 2)   \
  X(301, 8, 32, 1, 8, 5, 1, 2)    \
  X(302, 8, 32, 1, 8, 5, 2, 2)    \
  X(303, 8, 64, 1, 8, 2, 4, 2)    \
  X(304, 8, 64, 2, 4, 5, 4, 2)    \
  X(305, 8, 64, 2, 4, 5, 2, 2)    \
  X(306, 8, 32, 1, 8, 3, 2, 3)    \
  X(307, 8, 64, 4, 4, 5, 4, 2)    \
  X(310, 16, 16, 1, 8, 8, 1, 2)   \
  X(311, 16, 32, 1, 8, 4, 1, 2)   \
  X(312, 16, 32, 1, 8, 5, 2, 2)   \
  X(313, 16, 64, 1, 8, 2, 4, 2)   \
  X(314, 16, 64, 2, 4, 5, 4, 2)   \
  X(315, 16, 64, 2, 4, 5, 2, 2)   \
  X(320, 32, 64, 2, 4, 4, 1, 1)   \
  X(321, 32, 64, 2, 4, 4, 2, 1)   \
  X(322, 32, 64, 2, 4, 4, 4, 1)   \
  X(330, 64, 64, 2, 4, 4, 1, 1)   \
  X(331, 64, 128, 4, 2, 4, 1, 1)

namespace hwkern {

constexpr int kFirstW8A16Id = 300;
constexpr int kW8A16StepBytes = 64;    // of a weight row that a warp takes at once: 16 a lane
constexpr int kW8A16PieceTokens = 16;  // tokens whose partial sums are added at once

// Floats between two tokens of partial sums: 2·t·pitch + g are 32 banks for the lanes (g, t) of a fragment.
constexpr int w8a16_pitch(int block_n) { return block_n + 4; }

// The ring, the partial sums of the warps, those of the cluster's blocks and the column terms (twice), two barriers.
constexpr int w8a16_shared_bytes(int block_m, int block_n, int warps_k, int stages, int cluster) {
  const int piece = block_m < kW8A16PieceTokens ? block_m : kW8A16PieceTokens;
  return warps_k * stages * block_n * kW8A16StepBytes + warps_k * piece * w8a16_pitch(block_n) * 4 +
         (cluster > 1 ? 2 * block_m * block_n * 4 : 0) + 2 * block_n * 8 + 16;
}

// Predicted microseconds of a weight-only row; see gemm_predict_us.
double predict_w8a16(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device);

// One row of the table launched on `stream`; w8a16.cpp has validated the problem and that the device can run the row.
Status launch_w8a16(const WeightOnlyLinear& problem, int config_id, const Device& device, Stream stream);

}  // namespace hwkern
