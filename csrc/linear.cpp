// Linear: quantize the activations per token into the workspace, then the GEMM, which may be one that starts beside quantize
// (linear_beside_sm90.cu); or both in one launch (linear_sm90.cu).
#include "core/device.h"
#include "core/status.h"
#include "gemm/configs.h"
#include "gemm/remember.h"
#include "hwkern.h"
#include "quant/kernels.h"

namespace hwkern {

// The workspace holds q [M, K16] int8 and then scale [M] float32; K16 is a multiple of 16, so the scales are aligned.
size_t linear_workspace_bytes(int64_t m, int64_t k) {
  return static_cast<size_t>(m * round_up(k, kRowAlignment) + m * static_cast<int64_t>(sizeof(float)));
}

constexpr double kLongProduct = int64_t{1} << 34;  // M·N·K: some 25 µs on an H100

// What linear_choose was measured with. Of float32 in and out two launches are the faster: 33.6 µs against 37.3 at
// 4096×3072×768, where bfloat16 takes 26.5 against 24.9.
static bool may_take_one_launch(const Linear& p) {
  return is_float(p.x_dtype) && size_of(p.x_dtype) == 2 && size_of(p.y_dtype) == 2 &&
         p.activation == Activation::kNone && !p.residual;
}

Status linear(const Linear& p, int config_id, void* workspace, size_t workspace_bytes, Stream stream) {
  if (p.m == 0) return kSuccess;
  if (p.m < 0 || p.k < 1) return invalid("linear: M >= 0 and K >= 1 are needed");
  if (!workspace || workspace_bytes < linear_workspace_bytes(p.m, p.k))
    return invalid("linear: the workspace is smaller than linear_workspace_bytes(M, K)");
  if (!is_aligned(workspace, kRowAlignment)) return invalid("linear: the workspace must be 16-byte aligned");
  const int64_t k16 = round_up(p.k, kRowAlignment);
  int8_t* q = static_cast<int8_t*>(workspace);
  float* scale = reinterpret_cast<float*>(q + p.m * k16);
  const Quantize quantize{p.x, q, scale, p.ldx, k16, p.m, p.k, p.x_dtype};
  Gemm product{q,   p.weight, scale, p.weight_scale, p.bias,    p.y,          k16,        p.ldb, p.ldy,
               p.m, p.n,      p.k,   p.bias_dtype,   p.y_dtype, p.activation, p.residual, p.ldr, p.residual_dtype};

  Device device;
  if (const Status status = current_device(&device); !status.ok()) return status;
  if (config_id == kChoose)
    config_id = may_take_one_launch(p) ? remembered<linear_choose>(p.m, p.n, p.k, device)
                                       : remembered<gemm_choose>(p.m, p.n, p.k, device, /*b_is_constant=*/true);
  const GemmConfig* config = gemm_config(config_id);
  bool beside = false;  // a GEMM of the linear's own, beside quantize
  if (config && config->scheme == Scheme::kW8A8Linear) {
    if (const Status status = validate_quantize(quantize); !status.ok()) return status;
    if (const Status status = validate_gemm(product); !status.ok()) return status;
    if (p.k > config->max_k)
      return invalid("linear: K is too large for this config, which keeps rows in shared memory: see its max_k");
    if (!gemm_runs_on(*config, device))
      return {StatusCode::kUnsupportedDevice,
              "linear: this config is for another GPU: see its compute capabilities and shared memory"};
    beside = config_id >= kFirstLinearBesideId;
    if (!beside) return launch_linear_sm90(p, *config, device.sm_count, stream);
  }

  const bool release_early = p.weight_is_constant && !(config && linear_product_waits(*config, p.m, p.n, p.k, device));
  const Status status = quantize_per_token(quantize, release_early, stream);
  if (!status.ok()) return status;
  if (beside) return launch_linear_beside_sm90(product, config_id, device.sm_count, stream);
  product.b_is_constant = true;  // the kernel before the GEMM is quantize's; before that one: weight_is_constant
  // The blocks of a large tile do not fit beside quantize's, so overlap hides little of a long GEMM's launch; and the layer
  // of 512×4096×14336 takes 61 µs with it, against 51 where a launch in between keeps them apart. Presumably the order
  // in which blocks come to the SMs, all at once or as quantize's leave, counts for what they share in L2.
  product.overlap = static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) < kLongProduct;
  return gemm(product, config_id, stream);
}

}  // namespace hwkern
