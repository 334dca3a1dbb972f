// The cost model: predicted microseconds of a config, from the tiles, the operations and the bytes of a problem.
//
// Constants were fitted to times measured on an H100 SXM (Llama-3-8B and BERT-base shapes, cold L2, graph replays):
//   mma.sync rows             45 shapes × 8 configs: the choice is 0.2 % slower than the best in the geometric mean, 6 % at
//                             worst; used before Hopper and after it
//   wgmma and split-K rows    114 shapes (M 1 … 8192), constant B, whole tiles of tokens: 1.2 %; 23 % at worst, at
//                             128×2304×768, where that is 0.6 µs
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
  constexpr double kMemoryBytesPerUs = 2.78e6;
  constexpr double kFixedUs = 1.7;  // first load, epilogue; with overlapping launches
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
  constexpr double kOpsPerCycle = 8192;
  constexpr double kL2BytesPerCycle = 248;  // what an operand byte costs while all SMs load: energy, so clock
  constexpr double kEpilogueCyclesPerColumn = 11.5, kHiddenEpilogue = 0.34;  // the latter in ping-pong
  // Few rows of A leave too little under way for the whole bandwidth: 28672×4096 takes 51 µs at 64 rows, 48 at 128.
  const double memory_bytes_per_us = m > 256 ? 3.2e6 : 2.65e6;
  constexpr double kFixedUs = 2.11;
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
  return smooth_max(kFixedUs + cycles / kCyclesPerUs, kFixedUs + bytes_moved(m, n, k) / memory_bytes_per_us);
}

// One block a tile and slice of K, several on an SM at once; the weights of the next launch may fill the tail of this one.
double predict_split(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device, bool b_is_constant) {
  constexpr double kFixedUs = 0.962;  // from the preceding kernel's end to the first wgmma, and the epilogue
  constexpr double kMemoryBytesPerUs = 2.79e6, kL2BytesPerUs = 11.55e6;  // L2: into all SMs
  constexpr double kSmBytesPerUs = 122e3;  // into one
  constexpr double kOpsPerCycle = 6206;
  constexpr double kBlockUs = 0.0515, kRoundUs = 0.922;  // start and end of a block; of all that run at once
  constexpr double kOutUs = 1.2;  // a tile of 8192 sums that one block finishes
  constexpr double kLateUs = 0.768;  // when the next launch does not fit beside this one, its blocks start late
  constexpr double kTailUs = 0.588;  // constant weights: what they fill of this launch's tail in that case
  constexpr double kClashUs = 0.51;  // otherwise all compete with this launch's and none fill its tail
  const int64_t blocks = ceil_div(m, c.block_m) * ceil_div(n, c.block_n) * c.split_k;
  const int64_t slots = int64_t{device.sm_count} * c.blocks_per_sm;
  // Clusters of 4 leave SMs of a GPC over: 96 of them did not run at once on 132 SMs with 3 blocks each, 64 did.
  const int64_t at_once = c.split_k < 4 ? slots : slots - slots / 16;
  const double on_one_sm = double(ceil_div(blocks, device.sm_count)), rounds = double(ceil_div(blocks, at_once));
  const double steps = double(ceil_div(ceil_div(k, c.block_k), c.split_k));
  const double bytes = double(c.block_m + c.block_n) * c.block_k * steps;
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k * steps;
  const double sm_us =
      on_one_sm * (std::max(bytes / kSmBytesPerUs, operations / kOpsPerCycle / kCyclesPerUs) + kBlockUs * c.split_k);
  const double stream_us =
      smooth_max(smooth_max(bytes_moved(m, n, k) / kMemoryBytesPerUs, double(blocks) * bytes / kL2BytesPerUs), sm_us);
  const double out_us =
      kOutUs * c.block_m * c.block_n / c.split_k / 8192 * std::min<double>(on_one_sm, c.blocks_per_sm);
  const bool next_fits = 2 * blocks <= slots;
  const double early_us = next_fits ? kClashUs : m <= c.block_m ? -kTailUs : 0;
  return kFixedUs + stream_us + out_us + kRoundUs * (rounds - 1) + (next_fits ? 0 : kLateUs) +
         (b_is_constant ? early_us : 0);
}

}  // namespace

double gemm_predict_us(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device,
                       bool b_is_constant) {
  if (m < 1 || n < 1 || k < 1) return 0;
  if (config.scheme == Scheme::kW8A16) return predict_w8a16(config, m, n, k, device);
  if (is_sm90_split(config.id)) return predict_split(config, m, n, k, device, b_is_constant);
  return config.id >= kFirstSm90Id ? predict_wgmma(config, m, n, k, device) : predict_mma_sync(config, m, n, k, device);
}

}  // namespace hwkern
