// The front door of embedding: checks the contract of hwkern.h, then launches.
#include "quant/embedding.h"
#include "core/device.h"
#include "core/status.h"
#include "quant/kernels.h"

namespace hwkern {

Status validate(const Embedding& p) {
  if (p.m < 0 || p.n < 1 || p.k < 1) return invalid("embedding: M >= 0, N >= 1 and K >= 1 are needed");
  if (p.m > INT32_MAX || p.k > kMaxK) return invalid("embedding: M must fit in 31 bits, and K must be below 2**17");
  if (!p.indices || !p.weight || !p.weight_scale || !p.y)
    return invalid("embedding: indices, weight, weight_scale and y must not be null");
  if (p.ldb < round_up(p.k, kRowAlignment) || p.ldy < p.k)
    return invalid("embedding: a leading dimension is shorter than its row");
  if (!is_aligned(p.weight, kRowAlignment) || p.ldb % kRowAlignment != 0)
    return invalid("embedding: the rows of weight must start at multiples of 16 bytes");
  if (!is_float(p.y_dtype)) return invalid("embedding: y must be float32, float16 or bfloat16");
  if (!is_aligned(p.y, size_of(p.y_dtype)) || !is_aligned(p.indices, p.wide_indices ? 8 : 4) ||
      !is_aligned(p.weight_scale, 4))
    return invalid("embedding: a tensor is not aligned to its own elements");
  return kSuccess;
}

Status embedding(const Embedding& p, Stream stream) {
  if (p.m == 0) return kSuccess;
  if (const Status status = validate(p); !status.ok()) return status;
  Device device;
  const Status status = current_device(&device);
  return status.ok() ? launch_embedding(p, device, stream) : status;
}

}  // namespace hwkern
