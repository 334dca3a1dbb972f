// The cost model: predicted microseconds of a config, from the tiles, the operations and the bytes of a problem.
//
// Constants were fitted to times measured on an H100 SXM (Llama-3-8B shapes, M 1 … 8192, benchmarks/gemm.py --tune-json):
//   mma.sync rows   45 shapes × 8 configs: the choice is 0.2 % slower than the best in the geometric mean, 6 % at worst
//   wgmma rows      15 shapes (M 512 and more) × 4 configs: 0.9 %, 6 % at worst
// Other GPUs are ranked with the same constants; they were not measured.
#include <algorithm>
#include <cmath>

#include "core/status.h"
#include "gemm/configs.h"
#include "gemm/w8a16.h"

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

// Persistent blocks, one an SM. In ping-pong (four warps a tile) an epilogue runs beside the next tile's main loop.
double predict_wgmma(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kOpsPerCycle = 8143;  // of 8192
  constexpr double kL2BytesPerCycle = 221;  // what an operand byte costs while all SMs load: energy, so clock
  constexpr double kEpilogueCyclesPerColumn = 14.7, kHiddenEpilogue = 0.65;  // the latter in ping-pong
  constexpr double kMemoryBytesPerUs = 3.02e6;
  constexpr double kFixedUs = 0.56;
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k;
  const double bytes = double(c.block_m + c.block_n) * c.block_k;
  const int64_t tiles = ceil_div(m, c.block_m) * ceil_div(n, c.block_n);
  const int64_t waves = ceil_div(tiles, device.sm_count);
  auto step = [&](int64_t busy_blocks) {
    return operations / kOpsPerCycle + bytes / kL2BytesPerCycle * (double(busy_blocks) / device.sm_count);
  };
  const double steps = double(ceil_div(k, c.block_k));
  const double exposed = c.warps_m == 4 ? 1 + (1 - kHiddenEpilogue) * double(waves - 1) : double(waves);
  const double cycles =
      steps * (double(waves - 1) * step(device.sm_count) + step(tiles - (waves - 1) * device.sm_count)) +
      kEpilogueCyclesPerColumn * c.block_n * exposed;
  return smooth_max(kFixedUs + cycles / kCyclesPerUs, kFixedUs + bytes_moved(m, n, k) / kMemoryBytesPerUs);
}

}  // namespace

double gemm_predict_us(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device) {
  if (m < 1 || n < 1 || k < 1) return 0;
  if (config.scheme == Scheme::kW8A16) return predict_w8a16(config, m, n, k, device);
  return config.id >= kFirstSm90Id ? predict_wgmma(config, m, n, k, device) : predict_mma_sync(config, m, n, k, device);
}

}  // namespace hwkern
