// The ops at work: workspace, tactics, enqueue.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "core/device.h"
#include "core/status.h"
#include "tensorrt/log.h"
#include "tensorrt/op.h"

namespace hwkern::trt {

bool is_built(Kind kind) { return kind != Kind::kNormLinearInt8 || HWKERN_NORM_QUANTIZE; }

bool scheme_is_built(int32_t scheme) { return scheme != kW8A16 || HWKERN_WEIGHT_ONLY; }

// What linear() runs, which may quantize in the GEMM's launch (Scheme::kW8A8Linear).
static bool is_whole_linear(const Op& op) { return op.kind == Kind::kLinearInt8 && op.scheme == kW8A8Dynamic; }

bool config_fits(const Op& op, int config_id) {
  const GemmConfig* config = gemm_config(config_id);
  if (!config || op.in_features > config->max_k) return false;
  switch (config->scheme) {
    case Scheme::kW8A8: return op.scheme != kW8A16;
    case Scheme::kW8A16: return op.scheme == kW8A16;
    case Scheme::kW8A8Linear: return is_whole_linear(op);
  }
  return false;
}

// q [M, K16] int8, then, if they are not given, scales [M] float32: K16 is a multiple of 16, so they are aligned.
size_t workspace_bytes(const Op& op, int64_t m) {
  if (op.kind == Kind::kQuantize || op.scheme == kW8A16 || m <= 0) return 0;
  if (op.kind == Kind::kAttention) return op.has_rotary ? static_cast<size_t>(m * op.kv_heads * op.head_dim) * 2 : 0;
  if (op.scheme == kW8A8Static) return static_cast<size_t>(m * round_up(op.in_features, kRowAlignment));
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
  if (op.kind == Kind::kQuantize || op.kind == Kind::kAttention || op.scheme == kW8A16 || op.config != kChoose ||
      m_opt < 1 || n < 1 || !current_device(&device).ok())
    return 0;
  const int favourite = gemm_choose(m_opt, n, op.in_features, device, true);
  if (favourite < 0) return 0;
  const double best = gemm_predict_us(*gemm_config(favourite), m_opt, n, op.in_features, device, true);
  // The cost model's own choice is a tactic already; for 16-bit types it may be a whole linear in one launch.
  const bool model_may_differ = is_whole_linear(op) && linear_choose(m_opt, n, op.in_features, device) != favourite;
  const int32_t base = (m_min == m_max ? 0 : bucket_of(m_opt)) * kBucketStep + kFirstConfig;
  struct Timed {
    double us;
    int id;
  } timed[kMaxTimed];
  int rows, found = 0;
  const GemmConfig* configs = gemm_configs(&rows);
  for (int i = 0; i < rows && found < kMaxTimed; ++i) {
    if (!config_fits(op, configs[i].id) || !gemm_runs_on(configs[i], device)) continue;
    if (configs[i].id == favourite && !model_may_differ) continue;
    // The model knows the times of GEMMs alone. One launch took 0.89 to 1.13 times as long as two where
    // both were measured: worth timing always.
    const bool is_one_launch = configs[i].scheme == Scheme::kW8A8Linear;
    const double us = is_one_launch ? best : gemm_predict_us(configs[i], m_opt, n, op.in_features, device, true);
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
  const bool runs = config_fits(op, id) && current_device(&device).ok() && gemm_runs_on(*gemm_config(id), device);
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

// The inputs and outputs of one call by their roles.
struct Call {
  const Op& op;
  const Tensor* tensors;
  const void* const* inputs;
  void* const* outputs;
  void* workspace;

  const void* input(Input role) const {
    const int i = position(op, role);
    return i < 0 ? nullptr : inputs[i];
  }
  DType type(Input role) const {
    const int i = position(op, role);
    return i < 0 ? DType::kFloat32 : tensors[i].type;
  }
  DType x_type() const { return tensors[0].type; }
  int64_t m() const { return row_count(tensors[0]); }
  int64_t n() const { return tensors[position(op, Input::kWeight)].dims[0]; }
  int64_t k() const { return op.in_features; }
  int64_t k16() const { return round_up(op.in_features, kRowAlignment); }
  int8_t* q() const { return static_cast<int8_t*>(workspace); }
  // The scale of x: given, then it is read only (the structs have one pointer for both), or behind q.
  float* x_scale() const {
    return op.scheme == kW8A8Static ? const_cast<float*>(static_cast<const float*>(input(Input::kInputScale)))
                                    : reinterpret_cast<float*>(q() + m() * k16());
  }
};

// The second half of an op that has quantized x into the workspace itself.
Status multiply(const Call& c, int config, Stream stream) {
  Gemm p{};
  p.a = c.q(), p.lda = c.k16();
  p.b = static_cast<const int8_t*>(c.input(Input::kWeight)), p.ldb = c.k16();
  p.scale_m = c.op.scheme == kW8A8Static ? nullptr : c.x_scale();
  p.scale_n = static_cast<const float*>(c.input(Input::kWeightScale));
  p.bias = c.input(Input::kBias), p.bias_dtype = c.type(Input::kBias);
  p.d = c.outputs[0], p.d_dtype = c.x_type(), p.ldd = c.n();
  p.m = c.m(), p.n = c.n(), p.k = c.k();
  p.activation = static_cast<Activation>(c.op.activation);
  p.residual = c.input(Input::kResidual), p.residual_dtype = c.x_type(), p.ldr = c.n();
  p.b_is_constant = true;  // the kernel before is the one that quantized x
  return gemm(p, config, stream);
}

Status run_static(const Call& c, int config, Stream stream) {
  const Tensor& scale = c.tensors[position(c.op, Input::kInputScale)];
  const ScaleAxis axis = scale.rank == 1 && scale.dims[0] > 1 ? ScaleAxis::kColumn : ScaleAxis::kTensor;
  const Status status =
      quantize_static({c.inputs[0], c.q(), c.x_scale(), c.k(), c.k16(), c.m(), c.k(), c.x_type()}, axis, stream);
  return status.ok() ? multiply(c, config, stream) : status;
}

#if HWKERN_NORM_QUANTIZE
Status run_norm(const Call& c, int config, Stream stream) {
  NormQuantize p{};
  p.x = c.inputs[0], p.residual = c.input(Input::kSkip);
  p.weight = c.input(Input::kNormWeight), p.weight_dtype = c.type(Input::kNormWeight);
  p.bias = c.input(Input::kNormBias), p.bias_dtype = c.type(Input::kNormBias);
  p.y = c.op.has_norm_output ? c.outputs[1] : nullptr;
  p.h = c.op.has_sum_output ? c.outputs[1 + c.op.has_norm_output] : nullptr;
  p.q = c.q(), p.scale = c.x_scale(), p.is_static = c.op.scheme == kW8A8Static;
  p.ldx = p.ldr = p.ldh = p.ldy = c.k(), p.ldq = c.k16();
  p.m = c.m(), p.k = c.k(), p.x_dtype = c.x_type();
  p.eps = c.op.epsilon, p.offset = c.op.norm_offset, p.norm = static_cast<Norm>(c.op.norm);
  const Status status = norm_quantize(p, stream);
  return status.ok() ? multiply(c, config, stream) : status;
}
#else
Status run_norm(const Call&, int, Stream) { return invalid("this build of hwkern has no fused norm"); }
#endif

Status run_gated(const Call& c, int config, Stream stream) {
  ActivationQuantize p{};
  p.x = c.inputs[0];
  p.up = static_cast<const char*>(p.x) + c.k() * size_of(c.x_type());
  p.q = c.q(), p.scale = c.x_scale(), p.is_static = c.op.scheme == kW8A8Static;
  p.ldx = p.ldup = 2 * c.k(), p.ldq = c.k16();
  p.m = c.m(), p.k = c.k(), p.x_dtype = c.x_type();
  p.activation = static_cast<Activation>(c.op.gate);
  const Status status = activation_quantize(p, stream);
  return status.ok() ? multiply(c, config, stream) : status;
}

Status run_attention(const Call& c, Stream stream) {
  const Tensor& x = c.tensors[0];
  Attention p{};
  p.qkv = c.inputs[0], p.y = c.outputs[0], p.dtype = x.type;
  p.batch = x.dims[0], p.length = x.dims[1];
  p.heads = c.op.heads, p.kv_heads = c.op.kv_heads, p.dim = c.op.head_dim;
  p.scale = c.op.scale, p.causal = c.op.causal != 0;
  p.cosine = static_cast<const float*>(c.input(Input::kCosine));
  p.sine = static_cast<const float*>(c.input(Input::kSine));
  p.mask = c.input(Input::kMask);
  if (p.mask) {
    const Tensor& mask = c.tensors[position(c.op, Input::kMask)];
    int64_t* const strides[3] = {&p.mask_batch, &p.mask_head, &p.mask_row};
    int64_t stride = mask.dims[mask.rank - 1];
    for (int d = mask.rank - 2; d >= 0; stride *= mask.dims[d--])
      *strides[4 - mask.rank + d] = mask.dims[d] == 1 ? 0 : stride;
  }
  return attention(p, c.workspace, workspace_bytes(c.op, c.m()), stream);
}

// Linear and WeightOnlyLinear have the same members.
template <class Problem>
Problem linear_problem(const Call& c) {
  Problem p{};
  p.x = c.inputs[0], p.x_dtype = c.x_type(), p.ldx = c.k();
  p.weight = static_cast<const int8_t*>(c.input(Input::kWeight)), p.ldb = c.k16();
  p.weight_scale = static_cast<const float*>(c.input(Input::kWeightScale));
  p.bias = c.input(Input::kBias), p.bias_dtype = c.type(Input::kBias);
  p.y = c.outputs[0], p.y_dtype = c.x_type(), p.ldy = c.n();
  p.m = c.m(), p.n = c.n(), p.k = c.k();
  p.activation = static_cast<Activation>(c.op.activation);
  p.residual = c.input(Input::kResidual), p.residual_dtype = c.x_type(), p.ldr = c.n();
  p.weight_is_constant = c.op.constant_weights != 0;
  return p;
}

Status run(const Call& c, int32_t tactic, Stream stream) {
  if (c.op.kind == Kind::kAttention) return run_attention(c, stream);
  const int config = config_for(c.op, tactic, c.m());
  if (c.op.kind == Kind::kNormLinearInt8) return run_norm(c, config, stream);
  if (c.op.kind == Kind::kGatedLinearInt8) return run_gated(c, config, stream);
  if (c.op.scheme == kW8A8Static) return run_static(c, config, stream);
#if HWKERN_WEIGHT_ONLY
  if (c.op.scheme == kW8A16) return weight_only_linear(linear_problem<WeightOnlyLinear>(c), config, stream);
#endif
  return linear(linear_problem<Linear>(c), config, c.workspace, workspace_bytes(c.op, c.m()), stream);
}

}  // namespace

bool enqueue(const Op& op, int32_t tactic, const Tensor* tensors, const void* const* inputs, void* const* outputs,
             void* workspace, Stream stream) {
  if (row_count(tensors[0]) == 0) return true;
  const Status status = op.kind == Kind::kQuantize ? run_quantize(tensors[0], inputs, outputs, stream)
                                                   : run({op, tensors, inputs, outputs, workspace}, tactic, stream);
  return status.ok() || refuse("%s: %s", name(op.kind), status.what);
}

}  // namespace hwkern::trt
