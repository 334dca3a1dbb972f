// The front doors of quantize and dequantize: check the contract of hwkern.h, then launch.
#include "core/status.h"
#include "quant/kernels.h"

namespace hwkern {

Status validate_quantize(const Quantize& p) {
  if (p.m < 0 || p.k < 1) return invalid("quantize: M >= 0 and K >= 1 are needed");
  if (p.m > INT32_MAX || p.ldq > INT32_MAX) return invalid("quantize: M and the row length must fit in 31 bits");
  if (p.ldx < p.k || p.ldq < p.k) return invalid("quantize: a leading dimension is shorter than its row");
  if (!p.x || !p.q || !p.scale) return invalid("quantize: x, q and scale must not be null");
  if (!is_float(p.x_dtype)) return invalid("quantize: x must be float32, float16 or bfloat16");
  if (!is_aligned(p.x, size_of(p.x_dtype))) return invalid("quantize: x is not aligned to its own elements");
  return kSuccess;
}

static Status validate(const Dequantize& p) {
  if (p.m < 0 || p.k < 1) return invalid("dequantize: M >= 0 and K >= 1 are needed");
  if (p.m > INT32_MAX || p.k > INT32_MAX) return invalid("dequantize: M and K must fit in 31 bits");
  if (p.ldq < p.k || p.ldy < p.k) return invalid("dequantize: a leading dimension is shorter than its row");
  if (!p.q || !p.scale || !p.y) return invalid("dequantize: q, scale and y must not be null");
  if (!is_float(p.y_dtype)) return invalid("dequantize: y must be float32, float16 or bfloat16");
  if (!is_aligned(p.y, size_of(p.y_dtype))) return invalid("dequantize: y is not aligned to its own elements");
  return kSuccess;
}

Status quantize_per_token(const Quantize& p, bool release_early, Stream stream) {
  if (p.m == 0) return kSuccess;
  const Status status = validate_quantize(p);
  return status.ok() ? launch_quantize_per_token(p, release_early, stream) : status;
}

Status quantize_per_token(const Quantize& p, Stream stream) { return quantize_per_token(p, false, stream); }

Status quantize_static(const Quantize& p, ScaleAxis axis, Stream stream) {
  if (p.m == 0) return kSuccess;
  const Status status = validate_quantize(p);
  return status.ok() ? launch_quantize_static(p, axis, stream) : status;
}

Status dequantize(const Dequantize& p, ScaleAxis axis, Stream stream) {
  if (p.m == 0) return kSuccess;
  const Status status = validate(p);
  return status.ok() ? launch_dequantize(p, axis, stream) : status;
}

}  // namespace hwkern
