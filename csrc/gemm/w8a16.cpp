// The weight-only linear's front door: checks the contract of hwkern.h, chooses a config and launches it.
#include "gemm/w8a16.h"

#include <algorithm>

#include "core/device.h"
#include "core/status.h"

namespace hwkern {

static Status validate(const WeightOnlyLinear& p) {
  if (p.m < 0 || p.n < 1 || p.k < 1) return invalid("weight_only_linear: M >= 0, N >= 1 and K >= 1 are needed");
  if (p.k > kMaxK) return invalid("weight_only_linear: K must be below 2^17, as for every packed weight");
  if (p.m > INT32_MAX || p.n > INT32_MAX) return invalid("weight_only_linear: M and N must fit in 31 bits");
  if (p.ldx < p.k || p.ldy < p.n || (p.residual && p.ldr < p.n))
    return invalid("weight_only_linear: a leading dimension is shorter than its row");
  if (p.ldb < round_up(p.k, kRowAlignment) || p.ldb % kRowAlignment || !is_aligned(p.weight, kRowAlignment))
    return invalid("weight_only_linear: weight rows must be K rounded up to 16 bytes long, and 16-byte aligned");
  if (!p.x || !p.weight || !p.weight_scale || !p.y)
    return invalid("weight_only_linear: x, weight, weight_scale and y must not be null");
  if (p.x_dtype != DType::kFloat16 && p.x_dtype != DType::kBFloat16)
    return invalid("weight_only_linear: x must be float16 or bfloat16");
  if (!is_float(p.y_dtype)) return invalid("weight_only_linear: y must be float32, float16 or bfloat16");
  if ((p.bias && !is_float(p.bias_dtype)) || (p.residual && !is_float(p.residual_dtype)))
    return invalid("weight_only_linear: bias and residual must be float32, float16 or bfloat16");
  if (p.activation < Activation::kNone || p.activation > Activation::kSilu)
    return invalid("weight_only_linear: unknown activation; hwkern.h lists them");
  if (!is_aligned(p.x, size_of(p.x_dtype)) || !is_aligned(p.y, size_of(p.y_dtype)) ||
      (p.residual && !is_aligned(p.residual, size_of(p.residual_dtype))))
    return invalid("weight_only_linear: x, y and the residual must be aligned to their own elements");
  return kSuccess;
}

// Fitted by hand to times measured on an H100 SXM (Llama-3-8B shapes): rows 300 and 301 at M = 1 and 8 within 6 %, rows
// 302, 304, 305 and 306 at M = 16 … 64 within 28 %. Other GPUs were not measured.
double predict_w8a16(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kFixedUs = 2.1;             // launch, first x, last sums
  constexpr double kMemoryBytesPerUs = 2.71e6;
  constexpr double kLatencyUs = 2.0;           // loaded: one SM takes what its queues hold in so long
  constexpr double kBusyBytesPerUs = 40e3,
                   kTwiceBusyBytesPerUs = 50e3;  // what one SM multiplies; a byte of x counts 1½
  constexpr double kTileUs = 0.15;  // adding the sums of a tile
  const double cluster_us = c.cluster > 1 ? 0.1 * c.cluster * c.block_m / 8 : 0;  // and over a cluster
  const int64_t tiles = ceil_div(m, c.block_m) * ceil_div(n, c.block_n);
  const int64_t rounds = ceil_div(tiles, std::max(1, device.sm_count / c.cluster));
  const double steps =
      double(rounds * ceil_div(k, int64_t(c.block_k) * c.warps_k * c.cluster));  // of the busiest block
  const double weights = double(c.block_n) * c.block_k * c.warps_k;  // of one step
  const double x = double(c.block_m) * c.block_k * 2 * c.warps_n * c.warps_k;
  const bool two_blocks = m > 8 && c.cluster == 1 && c.blocks_per_sm > 1 && tiles > device.sm_count;
  const double load_us = kLatencyUs / c.stages / (two_blocks ? 2 : 1);
  const double multiply_us = (weights + 1.5 * x) / (two_blocks ? kTwiceBusyBytesPerUs : kBusyBytesPerUs);
  const double sm_us = steps * std::max(load_us, multiply_us) + double(rounds) * (kTileUs + cluster_us);
  // The small last term prefers, of two rows that wait for memory, the one that has less to do.
  return kFixedUs + std::max(double(n) * double(k) / kMemoryBytesPerUs, sm_us) + 0.02 * sm_us;
}

int weight_only_choose(int64_t m, int64_t n, int64_t k, const Device& device) {
  int count, best = -1;
  double best_us = 0;
  const GemmConfig* configs = gemm_configs(&count);
  for (int i = 0; i < count; ++i) {
    if (configs[i].scheme != Scheme::kW8A16 || !gemm_runs_on(configs[i], device)) continue;
    const double us = predict_w8a16(configs[i], m, n, k, device);
    if (best < 0 || us < best_us) best = configs[i].id, best_us = us;
  }
  return best;
}

Status weight_only_linear(const WeightOnlyLinear& p, int config_id, Stream stream) {
  if (p.m == 0) return kSuccess;
  if (const Status status = validate(p); !status.ok()) return status;
  Device device;
  if (const Status status = current_device(&device); !status.ok()) return status;
  if (config_id == kChoose) config_id = weight_only_choose(p.m, p.n, p.k, device);
  if (config_id < 0)
    return {StatusCode::kUnsupportedDevice,
            "weight_only_linear: no kernel for this GPU; hwkern needs compute capability 8.0 or newer"};
  const GemmConfig* config = gemm_config(config_id);
  if (!config || config->scheme != Scheme::kW8A16)
    return invalid("weight_only_linear: not the id of a weight-only config; gemm_configs() lists them");
  if (!gemm_runs_on(*config, device))
    return {StatusCode::kUnsupportedDevice,
            "weight_only_linear: this config is for another GPU: see its compute capabilities and shared memory"};
  return launch_w8a16(p, config_id, device, stream);
}

}  // namespace hwkern
