// The config table: one row, one instantiation. gemm_sm80.cu expands the rows into kernels, configs.cpp into data.
#pragma once

#include <algorithm>

#include "hwkern.h"

// X(id, BLOCK_M, BLOCK_N, BLOCK_K, WARPS_M, WARPS_N, WARPS_K, STAGES, BLOCKS_PER_SM)
// Ids are never reused; a row that is dropped leaves a hole. 100 and up are kept for the sm_90a kernels,
// 200 and up for split-K ones, 300 and up for weight-only ones (w8a16.h), 400 and up for whole layers.
#define HWKERN_SM80_CONFIGS(X)       \
  X(0, 16, 32, 256, 1, 1, 4, 6, 3)   \
  X(1, 32, 64, 256, 1, 2, 2, 4, 2)   \
  X(2, 64, 64, 128, 2, 2, 1, 4, 3)   \
  X(3, 64, 128, 128, 2, 2, 1, 3, 3)  \
  X(4, 128, 128, 128, 2, 2, 1, 3, 2) \
  X(5, 128, 256, 128, 2, 4, 1, 3, 1) \
  X(6, 128, 256, 64, 2, 4, 1, 4, 1)  \
  X(7, 256, 128, 64, 4, 2, 1, 4, 1)

// X(id, BLOCK_N, STAGES, PINGPONG, BOXES, CLUSTER, NARROW): 128 rows and 128 bytes of K a tile; two consumer warpgroups
// share a tile, or each has its own (ping-pong). Each has shared memory for so many boxes of D. The blocks of a cluster
// share B. The last tiles have NARROW columns where that lets all blocks end at about the same time.
#define HWKERN_SM90_CONFIGS(X)     \
  X(103, 256, 4, false, 2, 1, 256) \
  X(104, 128, 6, false, 2, 1, 128) \
  X(105, 128, 6, true, 2, 1, 128)  \
  X(106, 192, 5, false, 1, 1, 192) \
  X(107, 192, 5, true, 1, 2, 128)  \
  X(108, 192, 5, true, 1, 1, 128)

// X(id, ROWS, TOKENS, SPLIT, STAGES, BLOCKS_PER_SM, RELEASE, PERSISTENT): a tile is ROWS of B and TOKENS of A; SPLIT blocks
// split its K. The next launch may start beside this one when RELEASE steps of 128 of K are left to ask for: all (kAtOnce),
// or few enough that its own first loads do not compete with these. PERSISTENT blocks take tile after tile. Ids that are
// missing had other ring sizes, or were not faster.
#define HWKERN_SM90_SPLIT_CONFIGS(X)       \
  X(201, 64, 16, 4, 7, 3, 8, false)        \
  X(206, 64, 32, 2, 9, 2, 16, false)       \
  X(209, 64, 64, 1, 7, 2, kAtOnce, false)  \
  X(215, 128, 16, 1, 6, 2, kAtOnce, false) \
  X(217, 128, 64, 2, 9, 1, 4, false)       \
  X(218, 128, 80, 2, 8, 1, 4, false)       \
  X(219, 64, 96, 1, 5, 2, 8, false)        \
  X(222, 64, 128, 1, 9, 1, 8, false)       \
  X(223, 128, 128, 1, 7, 1, 8, false)      \
  X(224, 64, 160, 2, 8, 1, 4, false)       \
  X(225, 128, 160, 1, 6, 1, 8, false)      \
  X(227, 64, 192, 2, 7, 1, 4, false)       \
  X(228, 128, 192, 2, 5, 1, 4, false)      \
  X(230, 64, 64, 1, 13, 1, 8, false)       \
  X(231, 64, 96, 1, 10, 1, 8, false)       \
  X(232, 64, 128, 2, 8, 1, 4, false)       \
  X(233, 64, 160, 1, 8, 1, 8, false)       \
  X(234, 64, 192, 1, 7, 1, 8, false)       \
  X(235, 64, 224, 1, 6, 1, 8, false)       \
  X(236, 64, 224, 2, 6, 1, 4, false)       \
  X(237, 128, 144, 1, 6, 1, 8, false)      \
  X(238, 128, 176, 1, 5, 1, 8, false)      \
  X(239, 128, 192, 1, 5, 1, 8, false)      \
  X(240, 128, 224, 1, 5, 1, 8, false)      \
  X(241, 128, 256, 1, 4, 1, 4, false)      \
  X(242, 128, 288, 1, 4, 1, 4, false)      \
  X(243, 128, 320, 1, 4, 1, 4, false)      \
  X(245, 64, 64, 2, 6, 2, 4, false)        \
  X(246, 64, 32, 4, 6, 3, 8, false)        \
  X(247, 64, 16, 2, 11, 2, 16, false)      \
  X(248, 64, 256, 2, 5, 1, 4, false)       \
  X(249, 64, 32, 1, 9, 2, kAtOnce, false)  \
  X(250, 128, 64, 1, 7, 1, 8, true)        \
  X(254, 128, 32, 1, 10, 1, 8, true)       \
  X(256, 128, 128, 1, 5, 1, 8, true)

// X(id, BLOCK_M, BLOCK_N, STAGES, K_TILES, CONSUMERS, CLUSTER, BLOCKS_PER_SM): a whole linear in one launch
// (linear_sm90.cu), for K up to 128 · K_TILES. The blocks of a cluster share BLOCK_M rows of x.
#define HWKERN_LINEAR_SM90_CONFIGS(X) \
  X(400, 64, 64, 6, 6, 1, 4, 2)       \
  X(401, 128, 128, 6, 6, 2, 2, 1)     \
  X(406, 64, 192, 6, 6, 2, 2, 1)

// X(id, BLOCK_N, STAGES): tiles of 128 rows, in a kernel that starts beside quantize's (linear_beside_sm90.cu).
#define HWKERN_LINEAR_BESIDE_CONFIGS(X) \
  X(410, 128, 5)                        \
  X(411, 192, 4)

namespace hwkern {

constexpr int kColumnTermBytes = 8;  // float2: scale_n and bias of one column

// The ring of buffers, and the terms of BLOCK_N columns.
constexpr int sm80_shared_bytes(int block_m, int block_n, int block_k, int stages) {
  return stages * (block_m + block_n) * block_k + kColumnTermBytes * block_n;
}

constexpr int kFirstSm90Id = 100;
constexpr int kSm90BlockM = 128, kSm90BlockK = 128;
constexpr int kSm90Consumers = 2;
constexpr int kSm90BoxBytes = 64 * 128;  // 64 rows of 128 bytes of D

// What an epilogue needs of its tile: the column terms, and the corner.
constexpr int sm90_term_bytes(int block_n) { return kColumnTermBytes * block_n + 16; }
// The ring, the boxes of D, the terms of one or two tiles, two barriers a stage and six more.
constexpr int sm90_shared_bytes(int block_n, int stages, bool pingpong, int boxes) {
  return stages * (kSm90BlockM + block_n) * kSm90BlockK + kSm90Consumers * boxes * kSm90BoxBytes +
         (pingpong ? 2 : 1) * sm90_term_bytes(block_n) + 16 * stages + 48;
}

// N as columns of tiles: `wide` ones, then `narrow` ones; and how many columns of a row of tiles the busiest cluster gets
// when all wide tiles and then all narrow ones are dealt out in turn.
struct Sm90Columns {
  int wide, narrow;
  int64_t most;
};
Sm90Columns sm90_columns(int64_t tiles_m, int64_t n, int64_t clusters, int wide_columns, int narrow_columns);

constexpr int sm90_narrow(int id) {
#define HWKERN_NARROW(ID, BLOCK_N, STAGES, PINGPONG, BOXES, CLUSTER, NARROW) \
  if (id == ID) return NARROW;
  HWKERN_SM90_CONFIGS(HWKERN_NARROW)
#undef HWKERN_NARROW
  return 0;
}

constexpr bool sm90_split_persistent(int id) {
#define HWKERN_PERSISTENT(ID, ROWS, TOKENS, SPLIT, STAGES, BLOCKS, RELEASE, PERSISTENT) \
  if (id == ID) return PERSISTENT;
  HWKERN_SM90_SPLIT_CONFIGS(HWKERN_PERSISTENT)
#undef HWKERN_PERSISTENT
  return false;
}

constexpr int kFirstSm90SplitId = 200, kLastSm90SplitId = 299;
constexpr bool is_sm90_split(int id) { return id >= kFirstSm90SplitId && id <= kLastSm90SplitId; }

constexpr int kAtOnce = 1 << 20;  // more steps than any K has
constexpr int kSmSharedBytes = 233472;  // 228 KB an SM, of which the system takes 1 KB a block

// What a block receives: the other blocks' sums of its share of the tile.
constexpr int sm90_split_receive_bytes(int rows, int tokens, int split) {
  return rows * tokens * 4 / split * (split - 1);
}
// The token scales, the column terms, two barriers a stage and two more.
constexpr int sm90_split_term_bytes(int rows, int tokens, int stages) {
  return 4 * tokens + kColumnTermBytes * rows + 16 * stages + 16;
}
// The ring, and the block's own sums: over it, when it is done, or where the block has more tiles beside it.
constexpr int sm90_split_ring_bytes(int rows, int tokens, int stages, bool persistent) {
  const int ring = stages * (rows + tokens) * kSm90BlockK, sums = rows * tokens * 4;
  return persistent ? ring + sums : std::max(ring, sums);
}
// What is received has memory of its own where it fits, so that it can arrive while the ring is in use; else it lies over
// the ring.
constexpr bool sm90_split_own_receive(int rows, int tokens, int split, int stages, int blocks, bool persistent) {
  return blocks *
             (sm90_split_ring_bytes(rows, tokens, stages, persistent) + sm90_split_receive_bytes(rows, tokens, split) +
              sm90_split_term_bytes(rows, tokens, stages) + 1024) <=
         kSmSharedBytes;
}
constexpr int sm90_split_data_bytes(int rows, int tokens, int split, int stages, int blocks, bool persistent) {
  const int ring = sm90_split_ring_bytes(rows, tokens, stages, persistent);
  const int receive = sm90_split_receive_bytes(rows, tokens, split);
  return sm90_split_own_receive(rows, tokens, split, stages, blocks, persistent)
             ? ring + receive
             : std::max(ring, rows * tokens * 4 + receive);
}
constexpr int sm90_split_shared_bytes(int rows, int tokens, int split, int stages, int blocks, bool persistent) {
  return sm90_split_data_bytes(rows, tokens, split, stages, blocks, persistent) +
         sm90_split_term_bytes(rows, tokens, stages);
}

// The rows of x as int8, the ring, a consumer's staging, the terms of two tiles, the rows' scales, two barriers a stage and
// seven more.
constexpr int linear_sm90_shared_bytes(int block_m, int block_n, int stages, int k_tiles, int consumers) {
  return (k_tiles * block_m + stages * block_n) * kSm90BlockK + consumers * kSm90BoxBytes +
         2 * sm90_term_bytes(block_n) + 4 * block_m + 16 * stages + 64;
}

// The ring, two consumers' boxes of D, the terms of two tiles' columns and rows, two barriers a stage and four more.
constexpr int linear_beside_shared_bytes(int block_n, int stages) {
  return stages * (kSm90BlockM + block_n) * kSm90BlockK + kSm90Consumers * (block_n / 64) * kSm90BoxBytes +
         2 * (kColumnTermBytes * block_n + 4 * kSm90BlockM) + 16 * stages + 32;
}
constexpr int kFirstLinearBesideId = 410;

// Matrices B for which the split-K rows from 230 on were timed.
constexpr bool is_large(int64_t n, int64_t k) { return n * k >= int64_t{8} << 20; }

// How many blocks share the rows of one: a multiple of the cluster's, so that the busiest SM has the least to do.
int linear_sm90_groups(const GemmConfig& config, int64_t m, int64_t n, int sm_count);

// Whether the GEMM after quantize is better not started before the kernel that precedes quantize has ended.
bool linear_product_waits(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device);

Status validate_gemm(const Gemm& problem);  // the contract of hwkern.h

// One row of the table launched on `stream`; gemm.cpp has validated the problem and that the device can run the row.
Status launch_gemm_sm80(const Gemm& problem, int config_id, int compute, Stream stream);
Status launch_gemm_sm90(const Gemm& problem, int config_id, int sm_count, Stream stream);
Status launch_gemm_sm90_split(const Gemm& problem, int config_id, int sm_count, Stream stream);
// linear.cpp has validated the problem, and that K is not too large for the row.
Status launch_linear_sm90(const Linear& problem, const GemmConfig& config, int sm_count, Stream stream);
// The GEMM after quantize. It may read B, scale_n and bias before the kernel that precedes it has ended.
Status launch_linear_beside_sm90(const Gemm& product, int config_id, int sm_count, Stream stream);

}  // namespace hwkern
