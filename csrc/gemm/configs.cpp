// The config table as data, and the choice from it.
#include "gemm/configs.h"

#include <algorithm>
#include <numeric>

#include "core/status.h"
#include "gemm/w8a16.h"

namespace hwkern {

namespace {

constexpr int kAnyNewer = 999;

#define HWKERN_SM80_ROW(ID, BM, BN, BK, WM, WN, WK, STAGES, BLOCKS)                                          \
  GemmConfig{ID, "sm80_" #BM "x" #BN "x" #BK "_s" #STAGES, 80,    kAnyNewer, BM, BN, BK, WM, WN, WK, STAGES, \
             1,  sm80_shared_bytes(BM, BN, BK, STAGES),    BLOCKS},
// A ping-pong tile is four warps' alone.
#define HWKERN_SM90_ROW(ID, BN, STAGES, PINGPONG, BOXES, CLUSTER, NARROW)      \
  GemmConfig{ID,                                                               \
             !PINGPONG     ? "sm90_128x" #BN "x128_s" #STAGES                  \
             : CLUSTER > 1 ? "sm90_128x" #BN "x128_s" #STAGES "_pp_c" #CLUSTER \
                           : "sm90_128x" #BN "x128_s" #STAGES "_pp",           \
             90,                                                               \
             90,                                                               \
             kSm90BlockM,                                                      \
             BN,                                                               \
             kSm90BlockK,                                                      \
             PINGPONG ? 4 : 8,                                                 \
             1,                                                                \
             1,                                                                \
             STAGES,                                                           \
             CLUSTER,                                                          \
             sm90_shared_bytes(BN, STAGES, PINGPONG, BOXES),                   \
             1},
// ROWS of B are BLOCK_N of the table, TOKENS of A its BLOCK_M.
#define HWKERN_SM90_SPLIT_ROW(ID, ROWS, TOKENS, SPLIT, STAGES, BLOCKS, RELEASE, PERSISTENT) \
  GemmConfig{ID,                                                                            \
             "sm90_" #TOKENS "x" #ROWS "x128_k" #SPLIT "_s" #STAGES,                        \
             90,                                                                            \
             90,                                                                            \
             TOKENS,                                                                        \
             ROWS,                                                                          \
             kSm90BlockK,                                                                   \
             1,                                                                             \
             ROWS / 16,                                                                     \
             1,                                                                             \
             STAGES,                                                                        \
             1,                                                                             \
             sm90_split_shared_bytes(ROWS, TOKENS, SPLIT, STAGES, BLOCKS, PERSISTENT),      \
             BLOCKS,                                                                        \
             Scheme::kW8A8,                                                                 \
             SPLIT},
// A cluster or the copy engine needs Hopper or newer.
#define HWKERN_W8A16_ROW(ID, BM, BN, WN, WK, STAGES, X_STAGES, TMA, CLUSTER, BLOCKS) \
  GemmConfig{ID,                                                                     \
             "w8a16_" #BM "x" #BN "_k" #WK "_c" #CLUSTER "_s" #STAGES,               \
             TMA || CLUSTER > 1 ? 90 : 80,                                           \
             kAnyNewer,                                                              \
             BM,                                                                     \
             BN,                                                                     \
             kW8A16Step,                                                             \
             1,                                                                      \
             WN,                                                                     \
             WK,                                                                     \
             STAGES,                                                                 \
             CLUSTER,                                                                \
             w8a16_shared_bytes(BM, BN, WN, WK, STAGES, X_STAGES, CLUSTER),          \
             BLOCKS,                                                                 \
             Scheme::kW8A16},
#define HWKERN_LINEAR_SM90_ROW(ID, BM, BN, STAGES, K_TILES, CONSUMERS, CLUSTER, BLOCKS) \
  GemmConfig{ID,                                                                        \
             "linear_" #BM "x" #BN "x128_s" #STAGES "_c" #CLUSTER,                      \
             90,                                                                        \
             90,                                                                        \
             BM,                                                                        \
             BN,                                                                        \
             kSm90BlockK,                                                               \
             4,                                                                         \
             1,                                                                         \
             1,                                                                         \
             STAGES,                                                                    \
             CLUSTER,                                                                   \
             linear_sm90_shared_bytes(BM, BN, STAGES, K_TILES, CONSUMERS),              \
             BLOCKS,                                                                    \
             Scheme::kW8A8Linear,                                                       \
             1,                                                                         \
             K_TILES * kSm90BlockK},
#define HWKERN_LINEAR_BESIDE_ROW(ID, BN, STAGES)        \
  GemmConfig{ID,                                        \
             "linear_128x" #BN "x128_s" #STAGES "_two", \
             90,                                        \
             90,                                        \
             kSm90BlockM,                               \
             BN,                                        \
             kSm90BlockK,                               \
             8,                                         \
             1,                                         \
             1,                                         \
             STAGES,                                    \
             1,                                         \
             linear_beside_shared_bytes(BN, STAGES),    \
             1,                                         \
             Scheme::kW8A8Linear},
constexpr GemmConfig kConfigs[] = {
    HWKERN_SM80_CONFIGS(HWKERN_SM80_ROW) HWKERN_SM90_CONFIGS(HWKERN_SM90_ROW)
        HWKERN_SM90_SPLIT_CONFIGS(HWKERN_SM90_SPLIT_ROW) HWKERN_W8A16_CONFIGS(HWKERN_W8A16_ROW)
            HWKERN_LINEAR_SM90_CONFIGS(HWKERN_LINEAR_SM90_ROW) HWKERN_LINEAR_BESIDE_CONFIGS(HWKERN_LINEAR_BESIDE_ROW)};
#undef HWKERN_SM80_ROW
#undef HWKERN_SM90_ROW
#undef HWKERN_SM90_SPLIT_ROW
#undef HWKERN_W8A16_ROW
#undef HWKERN_LINEAR_SM90_ROW
#undef HWKERN_LINEAR_BESIDE_ROW

constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

// What was timed of the split-K rows, and the model fitted to: at most four tiles of few tokens, and none mostly empty; two
// rounds of blocks, and one for more than 512 tokens, where tiles of more than 224 were left out; rows from 230 on with
// large matrices alone; persistent ones for one tile of tokens, where blocks have 1.7 tiles in the mean, not where a few of
// them have a second one.
bool split_fits(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device) {
  if (config.block_m < 64 && m > 4 * config.block_m) return false;
  if (5 * config.block_m > 13 * std::max<int64_t>(m, 24)) return false;
  if (config.id >= 230 && !is_large(n, k)) return false;
  const int64_t blocks = ceil_div(m, config.block_m) * ceil_div(n, config.block_n) * config.split_k;
  const int64_t slots = int64_t{device.sm_count} * config.blocks_per_sm;
  if (sm90_split_persistent(config.id) && (2 * blocks < 3 * slots || m > config.block_m)) return false;
  return m <= 512 ? blocks <= 2 * slots : blocks <= slots && config.block_m <= 224;
}

}  // namespace

const GemmConfig* gemm_configs(int* count) {
  *count = kConfigCount;
  return kConfigs;
}

const GemmConfig* gemm_config(int id) {
  for (const GemmConfig& config : kConfigs)
    if (config.id == id) return &config;
  return nullptr;
}

bool gemm_runs_on(const GemmConfig& config, const Device& device) {
  return device.compute >= config.min_compute && device.compute <= config.max_compute &&
         device.shared_bytes >= config.shared_bytes;
}

// Narrow tiles fill the last round: 16 rows of tiles × 4096 columns on 66 clusters are six tiles of 192 for some (1152
// columns), but four of 192 and two of 128 for each of 64 (1024) if a quarter of the columns is in narrow ones.
Sm90Columns sm90_columns(int64_t tiles_m, int64_t n, int64_t clusters, int wide_columns, int narrow_columns) {
  const int64_t all = ceil_div(n, wide_columns);
  Sm90Columns best{static_cast<int>(all), 0, ceil_div(tiles_m * all, clusters) * wide_columns};
  if (narrow_columns == wide_columns) return best;
  const int64_t step = std::gcd(wide_columns, narrow_columns), least = ceil_div(tiles_m * n, clusters * step) * step;
  for (int64_t wide = all - 1; wide >= 0 && best.most > least; --wide) {
    const int64_t narrow = ceil_div(n - wide * wide_columns, narrow_columns);
    // `longer` clusters have a wide tile more than the others, which are the first to get narrow ones.
    const int64_t each = tiles_m * wide / clusters, longer = tiles_m * wide % clusters, others = clusters - longer;
    const int64_t narrow_tiles = tiles_m * narrow, left = std::max<int64_t>(0, narrow_tiles - others);
    const int64_t most_others = each * wide_columns + ceil_div(narrow_tiles, clusters) * narrow_columns;
    const int64_t most_longer = longer > 0 ? (each + 1) * wide_columns + ceil_div(left, clusters) * narrow_columns : 0;
    const int64_t most = std::max(most_others, most_longer);
    if (most < best.most) best = {static_cast<int>(wide), static_cast<int>(narrow), most};
  }
  return best;
}

int gemm_choose(int64_t m, int64_t n, int64_t k, const Device& device, bool b_is_constant) {
  int best = -1;
  double best_us = 0;
  for (const GemmConfig& config : kConfigs) {
    if (config.scheme != Scheme::kW8A8 || !gemm_runs_on(config, device)) continue;
    // On Hopper no mma.sync row was the fastest at any of 132 shapes; their predictions are for other GPUs.
    if (device.compute == 90 && config.id < kFirstSm90Id) continue;
    if (is_sm90_split(config.id) && !split_fits(config, m, n, k, device)) continue;
    const double us = gemm_predict_us(config, m, n, k, device, b_is_constant);
    if (best < 0 || us < best_us) best = config.id, best_us = us;
  }
  return best;
}

}  // namespace hwkern
