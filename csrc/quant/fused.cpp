// The front doors of the fused operators: check the contract of hwkern.h, then launch.
#include "quant/fused.h"
#include "core/device.h"
#include "core/status.h"
#include "quant/kernels.h"

namespace hwkern {

Status validate(const NormQuantize& p) {
  if (p.m < 0 || p.k < 1) return invalid("norm_quantize: M >= 0 and K >= 1 are needed");
  if (p.m > INT32_MAX || p.ldq > INT32_MAX) return invalid("norm_quantize: M and ldq must fit in 31 bits");
  if (p.k > kMaxK) return invalid("norm_quantize: K must be below 2**17");
  if (!p.x || !p.q || !p.scale) return invalid("norm_quantize: x, q and scale must not be null");
  if (p.h && !p.residual) return invalid("norm_quantize: h is an output only with a residual; without one h is x");
  if (p.y && p.y == p.h) return invalid("norm_quantize: y and h are two outputs");
  if (p.ldx < p.k || p.ldq < p.k || (p.residual && p.ldr < p.k) || (p.h && p.ldh < p.k) || (p.y && p.ldy < p.k))
    return invalid("norm_quantize: a leading dimension is shorter than its row");
  if (p.norm != Norm::kLayer && p.norm != Norm::kRms && p.norm != Norm::kRmsRounded)
    return invalid("norm_quantize: unknown norm");
  if (p.bias && p.norm != Norm::kLayer) return invalid("norm_quantize: only the layer norm takes a bias");
  if (!is_float(p.x_dtype) || (p.weight && !is_float(p.weight_dtype)) || (p.bias && !is_float(p.bias_dtype)))
    return invalid("norm_quantize: x, weight and bias must be float32, float16 or bfloat16");
  const int64_t size = size_of(p.x_dtype);
  if (!is_aligned(p.x, size) || !is_aligned(p.residual, size) || !is_aligned(p.h, size) || !is_aligned(p.y, size) ||
      (p.weight && !is_aligned(p.weight, size_of(p.weight_dtype))) ||
      (p.bias && !is_aligned(p.bias, size_of(p.bias_dtype))))
    return invalid("norm_quantize: a tensor is not aligned to its own elements");
  return kSuccess;
}

static Status validate(const ActivationQuantize& p) {
  if (p.m < 0 || p.k < 1) return invalid("activation_quantize: M >= 0 and K >= 1 are needed");
  if (p.m > INT32_MAX || p.ldq > INT32_MAX) return invalid("activation_quantize: M and ldq must fit in 31 bits");
  if (p.k > kMaxK) return invalid("activation_quantize: K must be below 2**17");
  if (!p.x || !p.q || !p.scale) return invalid("activation_quantize: x, q and scale must not be null");
  if (p.ldx < p.k || p.ldq < p.k || (p.up && p.ldup < p.k))
    return invalid("activation_quantize: a leading dimension is shorter than its row");
  if (p.activation < Activation::kNone || p.activation > Activation::kSilu)
    return invalid("activation_quantize: unknown activation");
  if (!is_float(p.x_dtype)) return invalid("activation_quantize: x must be float32, float16 or bfloat16");
  if (!is_aligned(p.x, size_of(p.x_dtype)) || !is_aligned(p.up, size_of(p.x_dtype)))
    return invalid("activation_quantize: a tensor is not aligned to its own elements");
  return kSuccess;
}

// Validates, then launches on the current device.
template <typename Problem, typename Launch>
static Status on_device(const Problem& p, Launch launch) {
  if (p.m == 0) return kSuccess;
  if (const Status status = validate(p); !status.ok()) return status;
  Device device;
  const Status status = current_device(&device);
  return status.ok() ? launch(device) : status;
}

Status norm_quantize(const NormQuantize& p, Stream stream) {
  return on_device(p, [&](const Device& device) { return launch_norm_quantize(p, device, stream); });
}

Status activation_quantize(const ActivationQuantize& p, void* y, Stream stream) {
  return on_device(p, [&](const Device& device) { return launch_activation_quantize(p, y, device, stream); });
}

Status activation_quantize(const ActivationQuantize& p, Stream stream) {
  return activation_quantize(p, nullptr, stream);
}

}  // namespace hwkern
