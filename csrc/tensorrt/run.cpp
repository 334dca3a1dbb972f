// The ops at work: workspace, tactics, enqueue.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "core/device.h"
#include "core/status.h"
#include "tensorrt/log.h"
#include "tensorrt/op.h"

namespace hwkern::trt {

bool scheme_is_built(LinearScheme scheme) { return scheme != LinearScheme::kW8A16 || HWKERN_WEIGHT_ONLY; }

bool config_fits(LinearScheme scheme, int config_id) {
  const GemmConfig* config = gemm_config(config_id);
#if HWKERN_WEIGHT_ONLY
  return config && (config->scheme == Scheme::kW8A16) == (scheme == LinearScheme::kW8A16);
#else
  return config && scheme != LinearScheme::kW8A16;
#endif
}

size_t workspace_bytes(const Op& op, int64_t m) {
  if (op.kind == Kind::kQuantize || op.scheme == LinearScheme::kW8A16 || m <= 0) return 0;
  if (op.scheme == LinearScheme::kW8A8Static) return static_cast<size_t>(m * round_up(op.in_features, kRowAlignment));
  return linear_workspace_bytes(m, op.in_features);
}

// ---- Tactics -------------------------------------------------------------------------------------------------------

namespace {

// tactic = bucket · 4096 + 2 + config id; TensorRT keeps 0 for itself and 1 is the cost model. Bucket 0 holds for every
// M, bucket b for M within 2^((b - 1 ± 0.5) / 2): half an octave around the M that was timed.
constexpr int32_t kModel = 1, kFirstConfig = 2, kBucketStep = 4096;

// Alternatives that the model gives more than this times the time of its favourite are not worth TensorRT's timing.
constexpr double kWorthTiming = 1.6;
constexpr int kMaxTimed = 128;

int32_t bucket_of(int64_t m) {
  return m < 1 ? 1 : 1 + static_cast<int32_t>(std::lround(2.0 * std::log2(static_cast<double>(m))));
}

}  // namespace

int tactics(const Op& op, int64_t m_min, int64_t m_opt, int64_t m_max, int64_t n, int32_t (&out)[kMaxTactics]) {
  // Without a choice, or where engines are built on a machine without this GPU: the model, which needs no timing.
  Device device;
  if (op.kind != Kind::kLinearInt8 || op.scheme == LinearScheme::kW8A16 || op.config != kChoose || m_opt < 1 || n < 1 ||
      !current_device(&device).ok())
    return 0;
  const int favourite = gemm_choose(m_opt, n, op.in_features, device);
  if (favourite < 0) return 0;
  const double best = gemm_predict_us(*gemm_config(favourite), m_opt, n, op.in_features, device);
  const int32_t base = (m_min == m_max ? 0 : bucket_of(m_opt)) * kBucketStep + kFirstConfig;
  struct Timed {
    double us;
    int id;
  } timed[kMaxTimed];
  int rows, found = 0;
  const GemmConfig* configs = gemm_configs(&rows);
  for (int i = 0; i < rows && found < kMaxTimed; ++i) {
    if (configs[i].id == favourite || !config_fits(op.scheme, configs[i].id) || !gemm_runs_on(configs[i], device))
      continue;
    const double us = gemm_predict_us(configs[i], m_opt, n, op.in_features, device);
    if (us <= kWorthTiming * best) timed[found++] = {us, configs[i].id};
  }
  std::sort(timed, timed + found, [](const Timed& a, const Timed& b) { return a.us < b.us; });
  int count = 0;
  out[count++] = kModel;
  for (int i = 0; i < found && count < kMaxTactics; ++i) out[count++] = base + timed[i].id;
  return count;
}

int config_for(const Op& op, int32_t tactic, int64_t m) {
  if (op.config != kChoose) return op.config;
  if (tactic < kFirstConfig) return kChoose;
  const int32_t bucket = tactic / kBucketStep;
  if (bucket != 0 && bucket != bucket_of(m)) return kChoose;
  // An engine may come to another GPU or another hwkern: a config that is not for here is no reason to fail.
  Device device;
  const int id = tactic % kBucketStep - kFirstConfig;
  const bool runs =
      config_fits(op.scheme, id) && current_device(&device).ok() && gemm_runs_on(*gemm_config(id), device);
  return runs ? id : kChoose;
}

// ---- Enqueue -------------------------------------------------------------------------------------------------------

namespace {

Status run_quantize(const Tensor& x, const void* const* inputs, void* const* outputs, Stream stream) {
  const int64_t k = x.dims[x.rank - 1];
  return quantize_per_token(
      {inputs[0], static_cast<int8_t*>(outputs[0]), static_cast<float*>(outputs[1]), k, k, row_count(x), k, x.type},
      stream);
}

Status run_linear(const Op& op, int32_t tactic, const Tensor* tensors, const void* const* inputs, void* y,
                  void* workspace, Stream stream) {
  const auto input = [&](Input role) -> const void* {
    const int i = position(op, role);
    return i < 0 ? nullptr : inputs[i];
  };
  const int64_t m = row_count(tensors[0]), n = tensors[position(op, Input::kWeight)].dims[0], k = op.in_features;
  const int64_t k16 = round_up(k, kRowAlignment);
  const int config = config_for(op, tactic, m);
  const DType type = tensors[0].type;
  const int bias = position(op, Input::kBias);
  const DType bias_type = bias < 0 ? DType::kFloat32 : tensors[bias].type;
  const auto* weight = static_cast<const int8_t*>(input(Input::kWeight));
  const auto* weight_scale = static_cast<const float*>(input(Input::kWeightScale));

  if (op.scheme == LinearScheme::kW8A8Static) {
    auto* q = static_cast<int8_t*>(workspace);
    // The static scale is read, not written: Quantize has one pointer for both.
    auto* scale = const_cast<float*>(static_cast<const float*>(input(Input::kInputScale)));
    const Tensor& shape = tensors[position(op, Input::kInputScale)];
    const ScaleAxis axis = shape.rank == 1 && shape.dims[0] > 1 ? ScaleAxis::kColumn : ScaleAxis::kTensor;
    const Status status = quantize_static({inputs[0], q, scale, k, k16, m, k, type}, axis, stream);
    if (!status.ok()) return status;
    Gemm p{q, weight, nullptr, weight_scale, input(Input::kBias), y, k16, k16, n, m, n, k, bias_type, type};
    p.activation = op.activation;
    p.residual = input(Input::kResidual);
    p.ldr = n;
    p.residual_dtype = type;
    p.b_is_constant = true;  // or written before the quantize kernel above, whose successor starts only after its wait
    return gemm(p, config, stream);
  }

#if HWKERN_WEIGHT_ONLY
  if (op.scheme == LinearScheme::kW8A16) {
    WeightOnlyLinear p{inputs[0], weight, weight_scale, input(Input::kBias), y,   k, k16, n, m,
                       n,         k,      type,         bias_type,           type};
    p.activation = op.activation;
    p.residual = input(Input::kResidual);
    p.ldr = n;
    p.residual_dtype = type;
    return weight_only_linear(p, config, stream);  // weight_is_constant stays false: a model may compute its weight
  }
#endif
  Linear p{inputs[0], weight, weight_scale, input(Input::kBias), y, k, k16, n, m, n, k, type, bias_type, type};
  p.activation = op.activation;
  p.residual = input(Input::kResidual);
  p.ldr = n;
  p.residual_dtype = type;
  return linear(p, config, workspace, workspace_bytes(op, m), stream);
}

}  // namespace

bool enqueue(const Op& op, int32_t tactic, const Tensor* tensors, const void* const* inputs, void* const* outputs,
             void* workspace, Stream stream) {
  if (row_count(tensors[0]) == 0) return true;
  const Status status = op.kind == Kind::kQuantize
                            ? run_quantize(tensors[0], inputs, outputs, stream)
                            : run_linear(op, tactic, tensors, inputs, outputs[0], workspace, stream);
  return status.ok() || refuse("%s: %s", name(op.kind), status.what);
}

}  // namespace hwkern::trt
