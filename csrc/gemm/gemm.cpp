// The GEMM's front door: checks the contract of hwkern.h, chooses a config and launches it.
#include "core/device.h"
#include "core/status.h"
#include "gemm/configs.h"
#include "gemm/remember.h"

namespace hwkern {

static Status validate_options(const Gemm& p) {
  if (p.activation < Activation::kNone || p.activation > Activation::kSilu)
    return invalid("gemm: unknown activation; hwkern.h lists them");
  if (p.residual) {
    if (!is_float(p.residual_dtype)) return invalid("gemm: the residual must be float32, float16 or bfloat16");
    if (p.ldr < p.n) return invalid("gemm: the residual's leading dimension is shorter than its row");
    if (!is_aligned(p.residual, size_of(p.residual_dtype)))
      return invalid("gemm: the residual is not aligned to its own elements");
  }
  if ((p.d_dtype == DType::kInt8) != (p.d_scale != nullptr))
    return invalid("gemm: an int8 D needs d_scale, and no other D takes one");
  return kSuccess;
}

Status validate_gemm(const Gemm& p) {
  if (p.m < 0 || p.n < 1 || p.k < 1) return invalid("gemm: M >= 0, N >= 1 and K >= 1 are needed");
  if (p.k > kMaxK) return invalid("gemm: K must be below 2^17, or the int32 sum could overflow");
  if (p.m > INT32_MAX || p.n > INT32_MAX) return invalid("gemm: M and N must fit in 31 bits");
  if (p.lda < p.k || p.ldb < p.k || p.ldd < p.n) return invalid("gemm: a leading dimension is shorter than its row");
  if (p.lda % kRowAlignment || p.ldb % kRowAlignment || !is_aligned(p.a, kRowAlignment) ||
      !is_aligned(p.b, kRowAlignment))
    return invalid("gemm: rows of A and B must start at multiples of 16 bytes");
  if (!p.a || !p.b || !p.d) return invalid("gemm: A, B and D must not be null");
  if (p.d_dtype == DType::kInt32) {
    if (p.scale_m || p.scale_n || p.bias) return invalid("gemm: int32 output is the raw sum, without scales and bias");
    if (p.activation != Activation::kNone || p.residual)
      return invalid("gemm: int32 output is the raw sum, without activation and residual");
  } else if (!is_float(p.d_dtype) && p.d_dtype != DType::kInt8) {
    return invalid("gemm: D must be float32, float16, bfloat16, int8 or int32");
  }
  if (p.bias && !is_float(p.bias_dtype)) return invalid("gemm: bias must be float32, float16 or bfloat16");
  if (!is_aligned(p.d, size_of(p.d_dtype))) return invalid("gemm: D is not aligned to its own elements");
  return validate_options(p);
}

Status gemm(const Gemm& p, int config_id, Stream stream) {
  if (p.m == 0) return kSuccess;
  if (const Status status = validate_gemm(p); !status.ok()) return status;
  Device device;
  if (const Status status = current_device(&device); !status.ok()) return status;
  if (config_id == kChoose) config_id = remembered<gemm_choose>(p.m, p.n, p.k, device, p.b_is_constant);
  if (config_id < 0)
    return {StatusCode::kUnsupportedDevice,
            "gemm: no kernel for this GPU; hwkern needs compute capability 8.0 or newer"};
  const GemmConfig* config = gemm_config(config_id);
  if (!config || config->scheme != Scheme::kW8A8) return invalid("gemm: unknown config id; gemm_configs() lists them");
  if (!gemm_runs_on(*config, device))
    return {StatusCode::kUnsupportedDevice,
            "gemm: this config is for another GPU: see its compute capabilities and shared memory"};
  if (is_sm90_split(config_id)) return launch_gemm_sm90_split(p, config_id, device.sm_count, stream);
  return config_id >= kFirstSm90Id ? launch_gemm_sm90(p, config_id, device.sm_count, stream)
                                   : launch_gemm_sm80(p, config_id, device.compute, stream);
}

}  // namespace hwkern
