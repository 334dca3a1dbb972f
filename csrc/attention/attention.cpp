// The front door of attention: checks the contract of hwkern.h, then launches.
#include "attention/attention.h"
#include "core/device.h"
#include "core/status.h"

namespace hwkern {

size_t attention_workspace_bytes(const Attention& p) {
  return p.cosine ? static_cast<size_t>(p.batch * p.length * p.kv_heads * p.dim) * 2 : 0;
}

static Status validate(const Attention& p, const void* workspace, size_t bytes) {
  if (p.batch < 0 || p.length < 1 || p.heads < 1 || p.kv_heads < 1)
    return invalid("attention: batch >= 0, length, heads and kv_heads >= 1 are needed");
  if (p.length > INT32_MAX / 2 || p.batch > 65535 || p.heads > 65535)  // the grid's y and z
    return invalid("attention: length must be below 2**30, batch and heads below 2**16");
  if (p.heads % p.kv_heads != 0) return invalid("attention: heads must be a multiple of kv_heads");
  if (p.dim != 32 && p.dim != 64 && p.dim != 128)
    return invalid("attention: heads of 32, 64 or 128 are what the kernel has");
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)
    return invalid("attention: qkv must be float16 or bfloat16");
  if (!p.qkv || !p.y || !p.cosine != !p.sine)
    return invalid("attention: qkv and y must not be null, cosine and sine must come together");
  if (!(p.scale > 0)) return invalid("attention: scale must be positive");
  if (p.causal && p.mask) return invalid("attention: causal or with a mask, not both");
  if (!is_aligned(p.qkv, 16) || !is_aligned(p.y, 16) || !is_aligned(p.cosine, 16) || !is_aligned(p.sine, 16))
    return invalid("attention: qkv, y, cosine and sine must start at multiples of 16 bytes");
  if (!is_aligned(p.mask, 2)) return invalid("attention: mask is not aligned to its own elements");
  if (bytes < attention_workspace_bytes(p) || (p.cosine && (!workspace || !is_aligned(workspace, 16))))
    return invalid("attention: the workspace is too small or not aligned to 16 bytes");
  return kSuccess;
}

Status attention(const Attention& p, void* workspace, size_t workspace_bytes, Stream stream) {
  if (p.batch == 0) return kSuccess;
  if (const Status status = validate(p, workspace, workspace_bytes); !status.ok()) return status;
  Device device;
  const Status status = current_device(&device);
  return status.ok() ? launch_attention(p, workspace, device, stream) : status;
}

}  // namespace hwkern
