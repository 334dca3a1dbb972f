// The config table as data, and the cost model that chooses from it.
#include "gemm/configs.h"

#include <algorithm>
#include <cmath>

#include "core/status.h"

namespace hwkern {

namespace {

#define HWKERN_ROW(ID, BM, BN, BK, WM, WN, WK, STAGES, BLOCKS)                                                      \
  GemmConfig{                                                                                                       \
      ID,    "sm80_" #BM "x" #BN "x" #BK "_s" #STAGES, 80, BM, BN, BK, WM, WN, WK, STAGES, STAGES * (BM + BN) * BK, \
      BLOCKS},
constexpr GemmConfig kConfigs[] = {HWKERN_SM80_CONFIGS(HWKERN_ROW)};
#undef HWKERN_ROW

constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

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
  return device.compute >= config.min_compute && device.shared_bytes >= config.shared_bytes;
}

// Fitted to 45 shapes × 8 configs measured on an H100 SXM (M 1 … 8192, benchmarks/gemm.py --tune-json): the choice is
// 0.2 % slower than the best config in the geometric mean and 6 % at worst, predictions are within 10 % (one σ).
// Other GPUs are ranked with the same constants; they were not measured.
namespace model {
constexpr double kOpsPerCycle = 3180;      // int8 operations of one SM through mma.sync, all its warps busy
constexpr double kWarpsToFill = 4.71;      // warps that one SM needs for that rate
constexpr double kCyclesPerBuffer = 263;   // barrier and latency for each BLOCK_K step of a block that runs alone
constexpr double kL2BytesPerCycle = 34.8;  // operands into one SM
constexpr double kCyclesPerUs = 1700;
constexpr double kMemoryBytesPerUs = 2.72e6;
constexpr double kFixedUs = 2.03;          // launch, first load, epilogue
}  // namespace model

double gemm_predict_us(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k;
  const double bytes = double(c.block_m + c.block_n) * c.block_k;
  const int warps = c.warps_m * c.warps_n * c.warps_k;
  // Cycles for one BLOCK_K step: of the SM's throughput, and of one block that has the SM for itself.
  const double shared = std::max(operations / model::kOpsPerCycle, bytes / model::kL2BytesPerCycle);
  const double alone =
      operations / (model::kOpsPerCycle * std::min(1.0, warps / model::kWarpsToFill)) + model::kCyclesPerBuffer;
  // The busiest SM runs its tiles `resident` at a time; the last round may hold fewer.
  const int64_t tiles = ceil_div(m, c.block_m) * ceil_div(n, c.block_n);
  const int64_t on_one_sm = ceil_div(tiles, device.sm_count);
  const int64_t fit = (device.shared_bytes + 1024) / (c.shared_bytes + 1024);  // 1 KB a block is the system's
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(c.blocks_per_sm, fit));
  auto round = [&](int64_t blocks) { return blocks == 0 ? 0.0 : std::max(blocks * shared, alone); };
  const double steps = double(ceil_div(k, c.block_k));
  const double cycles = steps * (double(on_one_sm / resident) * round(resident) + round(on_one_sm % resident));
  const double compute_us = model::kFixedUs + cycles / model::kCyclesPerUs;
  const double memory_us = model::kFixedUs + (double(n) * k + double(m) * k + 2.0 * m * n) / model::kMemoryBytesPerUs;
  // The fourth root of the sum of fourth powers, a smooth maximum: near the crossing both limits are felt.
  const double c2 = compute_us * compute_us, m2 = memory_us * memory_us;
  return std::sqrt(std::sqrt(c2 * c2 + m2 * m2));
}

int gemm_choose(int64_t m, int64_t n, int64_t k, const Device& device) {
  int best = -1;
  double best_us = 0;
  for (const GemmConfig& config : kConfigs) {
    if (!gemm_runs_on(config, device)) continue;
    const double us = gemm_predict_us(config, m, n, k, device);
    if (best < 0 || us < best_us) best = config.id, best_us = us;
  }
  return best;
}

}  // namespace hwkern
