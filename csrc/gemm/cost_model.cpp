// The cost model: predicted microseconds of a config, from the tiles, the operations and the bytes of a problem.
//
// Constants were fitted to times measured on an H100 SXM (Llama-3-8B shapes, M 1 … 8192, benchmarks/gemm.py --tune-json):
//   mma.sync rows   45 shapes × 8 configs: the choice is 0.2 % slower than the best in the geometric mean, 6 % at worst
//   wgmma rows      28 shapes × 5 configs: 0.8 %, 5 % at worst
// Other GPUs are ranked with the same constants; they were not measured.
#include <algorithm>
#include <cmath>

#include "core/status.h"
#include "gemm/configs.h"

namespace hwkern {

namespace {

constexpr double kCyclesPerUs = 1700;

// Near the crossing of compute and memory time both limits are felt: the fourth root of the sum of fourth powers.
double smooth_max(double a, double b) { return std::sqrt(std::sqrt(a * a * a * a + b * b * b * b)); }

double bytes_moved(int64_t m, int64_t n, int64_t k) { return double(n) * k + double(m) * k + 2.0 * m * n; }

// One block a tile, several on an SM at once.
double predict_mma_sync(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kOpsPerCycle = 3180;  // int8 operations of one SM through mma.sync, all its warps busy
  constexpr double kWarpsToFill = 4.71;  // warps that one SM needs for that rate
  constexpr double kCyclesPerBuffer = 263;  // barrier and latency for each BLOCK_K step of a block that runs alone
  constexpr double kL2BytesPerCycle = 34.8;  // operands into one SM
  constexpr double kMemoryBytesPerUs = 2.72e6;
  constexpr double kFixedUs = 2.03;  // launch, first load, epilogue
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k;
  const double bytes = double(c.block_m + c.block_n) * c.block_k;
  const int warps = c.warps_m * c.warps_n * c.warps_k;
  // Cycles for one BLOCK_K step: of the SM's throughput, and of one block that has the SM for itself.
  const double shared = std::max(operations / kOpsPerCycle, bytes / kL2BytesPerCycle);
  const double alone = operations / (kOpsPerCycle * std::min(1.0, warps / kWarpsToFill)) + kCyclesPerBuffer;
  // The busiest SM runs its tiles `resident` at a time; the last round may hold fewer.
  const int64_t tiles = ceil_div(m, c.block_m) * ceil_div(n, c.block_n);
  const int64_t on_one_sm = ceil_div(tiles, device.sm_count);
  const int64_t fit = (device.shared_bytes + 1024) / (c.shared_bytes + 1024);  // 1 KB a block is the system's
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(c.blocks_per_sm, fit));
  auto round = [&](int64_t blocks) { return blocks == 0 ? 0.0 : std::max(blocks * shared, alone); };
  const double steps = double(ceil_div(k, c.block_k));
  const double cycles = steps * (double(on_one_sm / resident) * round(resident) + round(on_one_sm % resident));
  return smooth_max(kFixedUs + cycles / kCyclesPerUs, kFixedUs + bytes_moved(m, n, k) / kMemoryBytesPerUs);
}

// Persistent blocks, one an SM, in clusters that share B.
double predict_wgmma(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kOpsPerCycle = 7680;  // of 8192
  constexpr double kCyclesPerBuffer = 26.9;  // what a BLOCK_K step costs beside its limit
  constexpr double kL2BytesPerCycle = 41.3;  // operands into one SM while all load
  constexpr double kL2Alone = 0.21;  // the share of that cost that is left when few SMs load
  constexpr double kEpilogueCyclesPerColumn = 36;
  constexpr double kMemoryBytesPerUs = 2.63e6;
  constexpr double kFixedUs = 1.0, kClusterUs = 0.358;
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k;
  const double bytes = (c.block_m + double(c.block_n) / c.cluster) * c.block_k;
  const int64_t clusters = std::max(1, device.sm_count / c.cluster);
  const int64_t tiles = ceil_div(m, c.block_m * c.cluster) * ceil_div(n, c.block_n);  // of a whole cluster
  const int64_t waves = ceil_div(tiles, clusters);
  auto step = [&](int64_t busy_clusters) {
    const double busy = double(busy_clusters) / clusters;
    return std::max(operations / kOpsPerCycle, bytes / kL2BytesPerCycle * (kL2Alone + (1 - kL2Alone) * busy)) +
           kCyclesPerBuffer;
  };
  const double steps = double(ceil_div(k, c.block_k));
  const double cycles = steps * (double(waves - 1) * step(clusters) + step(tiles - (waves - 1) * clusters)) +
                        kEpilogueCyclesPerColumn * c.block_n * double(waves);
  const double compute_us = kFixedUs + cycles / kCyclesPerUs + (c.cluster > 1 ? kClusterUs : 0);
  return smooth_max(compute_us, kFixedUs + bytes_moved(m, n, k) / kMemoryBytesPerUs);
}

}  // namespace

double gemm_predict_us(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device,
                       [[maybe_unused]] bool b_is_constant) {
  if (m < 1 || n < 1 || k < 1) return 0;
  if (config.id >= kFirstSm90SplitId && config.id <= kLastSm90SplitId) return 1e9;
  return config.id >= kFirstSm90Id ? predict_wgmma(config, m, n, k, device) : predict_mma_sync(config, m, n, k, device);
}

}  // namespace hwkern
