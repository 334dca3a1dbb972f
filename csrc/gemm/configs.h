// The config table: one row, one instantiation. gemm_sm80.cu expands the rows into kernels, configs.cpp into data.
#pragma once

#include "hwkern.h"

// X(id, BLOCK_M, BLOCK_N, BLOCK_K, WARPS_M, WARPS_N, WARPS_K, STAGES, BLOCKS_PER_SM)
// Ids are never reused; a row that is dropped leaves a hole. 100 and up are kept for the sm_90a kernels,
// 300 and up for weight-only ones (w8a16.h).
#define HWKERN_SM80_CONFIGS(X)       \
  X(0, 16, 32, 256, 1, 1, 4, 6, 3)   \
  X(1, 32, 64, 256, 1, 2, 2, 4, 2)   \
  X(2, 64, 64, 128, 2, 2, 1, 4, 3)   \
  X(3, 64, 128, 128, 2, 2, 1, 3, 3)  \
  X(4, 128, 128, 128, 2, 2, 1, 3, 2) \
  X(5, 128, 256, 128, 2, 4, 1, 3, 1) \
  X(6, 128, 256, 64, 2, 4, 1, 4, 1)  \
  X(7, 256, 128, 64, 4, 2, 1, 4, 1)

// X(id, BLOCK_N, STAGES, PINGPONG): 128 rows and 128 bytes of K a tile; two consumer warpgroups share a tile, or each has
// its own (ping-pong). 100 … 102 were clusters of two.
#define HWKERN_SM90_CONFIGS(X) \
  X(103, 256, 4, false)        \
  X(104, 128, 6, false)        \
  X(105, 128, 6, true)         \
  X(106, 192, 5, false)

namespace hwkern {

constexpr int kColumnTermBytes = 8;  // float2: scale_n and bias of one column

// The ring of buffers, and the terms of BLOCK_N columns.
constexpr int sm80_shared_bytes(int block_m, int block_n, int block_k, int stages) {
  return stages * (block_m + block_n) * block_k + kColumnTermBytes * block_n;
}

constexpr int kFirstSm90Id = 100;
constexpr int kSm90BlockM = 128, kSm90BlockK = 128;
constexpr int kSm90PieceBytes = 16 * 128;  // what a warp lays out for its stores at a time: 16 rows of 128 bytes

// The ring, the column terms of one or two tiles, two barriers a stage and six more.
constexpr int sm90_ring_bytes(int block_n, int stages) { return stages * (kSm90BlockM + block_n) * kSm90BlockK; }
constexpr int sm90_control_bytes(int block_n, int stages, bool pingpong) {
  return (pingpong ? 2 : 1) * kColumnTermBytes * block_n + 16 * stages + 48;
}
// Pieces of staging for each of the eight warps: two where they fit into 227 KB.
constexpr int sm90_pieces(int block_n, int stages) {
  return sm90_ring_bytes(block_n, stages) + 8 * 2 * kSm90PieceBytes + sm90_control_bytes(block_n, stages, true) <=
                 232448
             ? 2
             : 1;
}
constexpr int sm90_shared_bytes(int block_n, int stages, bool pingpong) {
  return sm90_ring_bytes(block_n, stages) + 8 * sm90_pieces(block_n, stages) * kSm90PieceBytes +
         sm90_control_bytes(block_n, stages, pingpong);
}

// One row of the table launched on `stream`; gemm.cpp has validated the problem and that the device can run the row.
Status launch_gemm_sm80(const Gemm& problem, int config_id, Stream stream);
Status launch_gemm_sm90(const Gemm& problem, int config_id, int sm_count, Stream stream);

}  // namespace hwkern
