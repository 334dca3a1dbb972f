// What hwkern's TensorRT ops are, without TensorRT: fields, inputs, types, shapes, workspace, tactics, state, enqueue.
// plugin_v3.cpp and plugin_v2.cpp translate these to NVIDIA's two generations of plugin interfaces.
//
// LinearInt8: y = activation(x · Wᵀ + bias) + residual
//   inputs    x            [..., K]  float32, float16 or bfloat16
//             weight       [N, K16]  int8, K16 = K rounded up to 16, zeros in the padding; or the same bytes as int32
//                                    [N, K16 / 4], which TensorRT passes on untouched in every version. A constant
//             weight_scale [N]       float32
//             bias         [N]       float32, float16 or bfloat16  if has_bias
//             input_scale  [1], [K]  float32                  if has_input_scale (scheme w8a8_static, and only then)
//             residual     [..., N]  x's type                 if has_residual
//   output    y            [..., N]  x's type
//   w8a8_dynamic: one scale per row of x, computed on the fly.
//   w8a8_static:  q = clamp(rint(x · (1 / input_scale)), -127, 127) and y = sum · weight_scale + …: weight_scale holds
//                 float32(scale of the input · scale of the weight), the product made once when the model is written.
//                 An input_scale of [K] folds a smoothing vector into the same pass.
//   w8a16:        x stays as it is and is float16 or bfloat16; float32 sums, whose bits depend on the config, so that
//                 TensorRT is offered no tactics and every engine computes what torch does.
//
// NormLinearInt8: LinearInt8 of the normalised sum = x + skip, whose quantization costs no pass of its own
//   inputs    x [..., K], skip [..., K] of x's type if has_skip, norm_weight [K] and norm_bias [K] (if has_norm_bias) of
//             any float type, then weight … residual as above; input_scale is [1]
//   outputs   y as above, normed [..., K] if has_norm_output, sum [..., K] if has_sum_output, both of x's type
//   norm:     layer, rms or rms_rounded (see Norm in hwkern.h), with epsilon and norm_offset (1 for Gemma)
//
// GatedLinearInt8: LinearInt8 of round(round(gate(x[..., :K])) · x[..., K:]), in the pass that quantizes it
//   inputs    x [..., 2K], the halves of a gate-and-up product, then weight … residual as above; input_scale is [1]
//   gate:     an activation (see ActivationQuantize in hwkern.h)
//
// Attention: what lies between the product of q, k and v and the one that reads the heads (see Attention in hwkern.h)
//   inputs    x [B, L, (heads + 2·kv_heads)·head_dim] float16 or bfloat16; cosine, sine [..., L, head_dim] float32 if
//             has_rotary; mask of x's type if has_mask, whose dimensions are those of [B, heads, L, L] or 1, but the last
//   output    y [B, L, heads·head_dim]
//
// Quantize: x [..., K] → q [..., K] int8, scale [...] float32, one scale per row, the dynamic scheme of hwkern.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hwkern.h"

namespace hwkern::trt {

constexpr char kNamespace[] = "hwkern";
constexpr char kPluginVersion[] = "1";

// Bits: a field serves several.
enum class Kind : int32_t {
  kLinearInt8 = 1,
  kQuantize = 2,
  kNormLinearInt8 = 4,
  kGatedLinearInt8 = 8,
  kAttention = 16
};
enum LinearScheme : int32_t { kW8A8Dynamic = 0, kW8A8Static = 1, kW8A16 = 2 };

// Plain 32-bit members only: an Op is saved as it lies in memory.
struct Op {
  Kind kind = Kind::kLinearInt8;
  int32_t scheme = kW8A8Dynamic;
  int32_t activation = 0;  // Activation
  int32_t in_features = 0;  // K: the packed weight does not tell it
  int32_t out_features = 0;  // N, or 0: taken from the weight
  int32_t config = kChoose;  // a config id for every call, or kChoose
  int32_t constant_weights = 0;  // no layer computes the weight, its scales or the bias: Linear::weight_is_constant
  int32_t has_bias = 0, has_input_scale = 0, has_residual = 0;
  int32_t norm = 0;  // Norm, in NormLinearInt8
  int32_t has_norm_bias = 0, has_skip = 0, has_norm_output = 0, has_sum_output = 0;
  float epsilon = 0, norm_offset = 0;
  int32_t gate = 0;  // Activation, in GatedLinearInt8
  int32_t heads = 0, kv_heads = 0, head_dim = 0, causal = 0, has_rotary = 0, has_mask = 0;  // in Attention
  float scale = 0;
};

const char* name(Kind kind);

// The kinds of this build, `count` of them.
const Kind* kinds(int* count);

// ---- Creation: named fields in, a valid Op or a refusal out --------------------------------------------------------

enum class FieldType { kInt32, kInt64, kFloat32, kText, kOther };
struct Field {
  const char* name;
  const void* data;
  FieldType type;
  int32_t length;  // elements; a text's may or may not count a final NUL
};

// Field number `index` of a kind; name is null past the last.
struct FieldName {
  const char* name;
  FieldType type;
};
FieldName field_name(Kind kind, int index);

bool parse(Kind kind, const Field* fields, int32_t count, Op* op);

// ---- State in an engine --------------------------------------------------------------------------------------------

constexpr size_t kStateBytes = 8 + sizeof(Op) + 4;  // magic and version, the op, a checksum
constexpr char kStateField[] = "hwkern_state";
void save(const Op& op, unsigned char (&state)[kStateBytes]);
bool load(Kind kind, const void* state, size_t bytes, Op* op);

// One line that says everything about the op and the kernels: the timing cache's key and the inspector's text.
constexpr size_t kDescriptionBytes = 512;
void describe(const Op& op, char (&text)[kDescriptionBytes]);

// ---- Types and shapes ----------------------------------------------------------------------------------------------

constexpr int kMaxRank = 8;
constexpr DType kOtherType = static_cast<DType>(-1);
struct Tensor {
  DType type;
  int32_t rank;
  int64_t dims[kMaxRank];  // -1 where not known yet
};

// In the order in which an op takes those that it has.
enum class Input {
  kX,
  kSkip,
  kNormWeight,
  kNormBias,
  kWeight,
  kWeightScale,
  kBias,
  kInputScale,
  kResidual,
  kCosine,
  kSine,
  kMask
};
constexpr int kMaxInputs = 12, kMaxOutputs = 3;
int position(const Op& op, Input input);  // -1 when this op has no such input
int input_count(const Op& op);
int output_count(const Op& op);

// Whether input or output `index` (outputs follow the inputs) may have types[index], given those before it. No
// refusal: TensorRT asks about every type.
bool supports(const Op& op, int index, const DType* types);
DType output_type(const Op& op, int output, DType x);

// The dimensions of an output are those of x; the last becomes N, stays, becomes heads · head_dim, or goes away.
enum class LastDimension { kN, kK, kHeads, kNone };
LastDimension last_dimension(const Op& op, int output);

// Checks number, types, ranks and every dimension that is known; says what is wrong. check_shapes() leaves the types
// out.
bool check_count(const Op& op, int count);
bool check(const Op& op, const Tensor* inputs, int count);
bool check_shapes(const Op& op, const Tensor* inputs, int count);

int64_t row_count(const Tensor& x);  // the product of all but the last dimension; -1 when not known

// ---- Running -------------------------------------------------------------------------------------------------------

bool is_built(Kind kind);
bool scheme_is_built(int32_t scheme);
bool config_fits(const Op& op, int config_id);  // the id exists and computes this op
size_t workspace_bytes(const Op& op, int64_t m);

// A tactic is 0 or 1 for "the cost model chooses for every M", or a config id with the M that TensorRT timed it at: it
// holds for rows of about that number, and the cost model decides for others, which nobody timed.
constexpr int kMaxTactics = 8;
int tactics(const Op& op, int64_t m_min, int64_t m_opt, int64_t m_max, int64_t n, int32_t (&out)[kMaxTactics]);
int config_for(const Op& op, int32_t tactic, int64_t m);

// Capture-safe: no allocation, no synchronisation, nothing that outlives the call. `inputs` have passed check().
bool enqueue(const Op& op, int32_t tactic, const Tensor* tensors, const void* const* inputs, void* const* outputs,
             void* workspace, Stream stream);

}  // namespace hwkern::trt
