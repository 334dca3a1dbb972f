// The description of the ops: fields, state, types and shapes.
#include "tensorrt/op.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "core/status.h"
#include "tensorrt/log.h"

namespace hwkern::trt {

namespace {

// In the order of their enums, ended by null.
constexpr const char* kSchemes[] = {"w8a8_dynamic", "w8a8_static", "w8a16", nullptr};
constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu", nullptr};
constexpr const char* kNorms[] = {"layer", "rms", "rms_rounded", nullptr};

template <size_t COUNT>
bool within(int32_t value, const char* const (&)[COUNT]) {
  return value >= 0 && value < static_cast<int32_t>(COUNT) - 1;
}

// A field: its name, the kinds that have it, and where in an Op it goes.
struct Entry {
  const char* name;
  int32_t kinds;
  int32_t Op::* integer;
  float Op::* real = nullptr;
  const char* const* names = nullptr;  // of a text: its number in this list is stored
};

constexpr int32_t kNormed = static_cast<int32_t>(Kind::kNormLinearInt8);
constexpr int32_t kGated = static_cast<int32_t>(Kind::kGatedLinearInt8);
constexpr int32_t kAttention = static_cast<int32_t>(Kind::kAttention);
constexpr int32_t kLinears = static_cast<int32_t>(Kind::kLinearInt8) | kNormed | kGated;

constexpr Entry kEntries[] = {
    {"in_features", kLinears, &Op::in_features},
    {"out_features", kLinears, &Op::out_features},
    {"scheme", kLinears, &Op::scheme, nullptr, kSchemes},
    {"activation", kLinears, &Op::activation, nullptr, kActivations},
    {"has_bias", kLinears, &Op::has_bias},
    {"has_input_scale", kLinears, &Op::has_input_scale},
    {"has_residual", kLinears, &Op::has_residual},
    {"config", kLinears, &Op::config},
    {"constant_weights", kLinears, &Op::constant_weights},
    {"norm", kNormed, &Op::norm, nullptr, kNorms},
    {"epsilon", kNormed, nullptr, &Op::epsilon},
    {"norm_offset", kNormed, nullptr, &Op::norm_offset},
    {"has_norm_bias", kNormed, &Op::has_norm_bias},
    {"has_skip", kNormed, &Op::has_skip},
    {"has_norm_output", kNormed, &Op::has_norm_output},
    {"has_sum_output", kNormed, &Op::has_sum_output},
    {"gate", kGated, &Op::gate, nullptr, kActivations},
    {"heads", kAttention, &Op::heads},
    {"kv_heads", kAttention, &Op::kv_heads},
    {"head_dim", kAttention, &Op::head_dim},
    {"scale", kAttention, nullptr, &Op::scale},
    {"causal", kAttention, &Op::causal},
    {"has_rotary", kAttention, &Op::has_rotary},
    {"has_mask", kAttention, &Op::has_mask},
};

bool serves(const Entry& entry, Kind kind) { return (entry.kinds & static_cast<int32_t>(kind)) != 0; }

bool read_int(const Field& field, int32_t* value) {
  if (!field.data || field.length != 1)
    return refuse("field %s must hold one integer, but has %d elements", field.name, field.length);
  int64_t wide;
  if (field.type == FieldType::kInt32) {
    int32_t narrow;
    std::memcpy(&narrow, field.data, sizeof narrow);
    wide = narrow;
  } else if (field.type == FieldType::kInt64) {
    std::memcpy(&wide, field.data, sizeof wide);
  } else {
    return refuse("field %s must be an integer (INT32)", field.name);
  }
  if (wide < INT32_MIN || wide > INT32_MAX) return refuse("field %s is %" PRId64 ", which is absurd", field.name, wide);
  *value = static_cast<int32_t>(wide);
  return true;
}

bool read_real(const Field& field, float* value) {
  if (!field.data || field.length != 1 || field.type != FieldType::kFloat32)
    return refuse("field %s must hold one float (FLOAT32)", field.name);
  std::memcpy(value, field.data, sizeof *value);
  return true;
}

bool read_name(const Field& field, const char* const* names, int32_t* value) {
  constexpr int32_t kLongest = 64;
  if (field.type != FieldType::kText || !field.data || field.length < 1 || field.length > kLongest)
    return refuse("field %s must be a string of 1 to %d characters", field.name, kLongest);
  char text[kLongest + 1] = "";
  std::memcpy(text, field.data, static_cast<size_t>(field.length));
  char known[128] = "";
  size_t used = 0;
  for (int32_t i = 0; names[i]; ++i) {
    if (std::strcmp(text, names[i]) == 0) {
      *value = i;
      return true;
    }
    if (used < sizeof known)
      used += static_cast<size_t>(std::snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", names[i]));
  }
  return refuse("field %s is \"%s\"; known are: %s", field.name, text, known);
}

bool is_flag(int32_t v) { return v == 0 || v == 1; }

bool validate_norm(const Op& op) {
  if (!(op.epsilon >= 0) || !std::isfinite(op.epsilon) || !std::isfinite(op.norm_offset))
    return refuse("NormLinearInt8: epsilon %g and norm_offset %g must be finite, epsilon not negative", op.epsilon,
                  op.norm_offset);
  if (!is_flag(op.has_norm_bias) || !is_flag(op.has_skip) || !is_flag(op.has_norm_output) ||
      !is_flag(op.has_sum_output))
    return refuse("has_norm_bias, has_skip, has_norm_output and has_sum_output must be 0 or 1");
  if (op.has_norm_bias && op.norm != 0) return refuse("NormLinearInt8: only the norm \"layer\" takes a bias");
  if (op.has_sum_output && !op.has_skip)
    return refuse("NormLinearInt8: without a skip the sum is x: has_sum_output is 1");
  return true;
}

constexpr int32_t kMaxHeads = 65535;  // a grid's second dimension

bool validate_attention(const Op& op) {
  if (op.heads < 1 || op.kv_heads < 1 || op.heads % op.kv_heads != 0 || op.heads > kMaxHeads)
    return refuse("Attention: heads %d must be a multiple of kv_heads %d, 1 to %d", op.heads, op.kv_heads, kMaxHeads);
  if (op.head_dim != 32 && op.head_dim != 64 && op.head_dim != 128)
    return refuse("Attention: head_dim is %d; the kernel has 32, 64 and 128", op.head_dim);
  if (!(op.scale > 0) || !std::isfinite(op.scale)) return refuse("Attention: scale %g must be positive", op.scale);
  if (!is_flag(op.causal) || !is_flag(op.has_rotary) || !is_flag(op.has_mask))
    return refuse("causal, has_rotary and has_mask must be 0 or 1");
  return !(op.causal && op.has_mask) || refuse("Attention: causal or with a mask, not both");
}

// The one place where an op is judged, whether it came from fields or from an engine.
bool validate(const Op& op) {
  if (op.kind == Kind::kQuantize) return true;
  if (op.kind == Kind::kAttention) return validate_attention(op);
  if (op.in_features == 0)
    return refuse("%s needs the field in_features: K, the number of columns of x", name(op.kind));
  if (op.in_features < 1 || op.in_features > kMaxK)
    return refuse("in_features is %d; it must be 1 to %" PRId64 " (2^17 - 1, or the int32 sum could overflow)",
                  op.in_features, kMaxK);
  if (op.out_features < 0) return refuse("out_features is %d; it must be positive", op.out_features);
  if (!is_flag(op.has_bias) || !is_flag(op.has_input_scale) || !is_flag(op.has_residual) ||
      !is_flag(op.constant_weights))
    return refuse("has_bias, has_input_scale, has_residual and constant_weights must be 0 or 1");
  const char* scheme = kSchemes[op.scheme];
  if ((op.scheme == kW8A8Static) != (op.has_input_scale == 1))
    return refuse(
        "the input_scale goes with the scheme w8a8_static and with no other; here the scheme is %s and "
        "has_input_scale is %d",
        scheme, op.has_input_scale);
  if (!scheme_is_built(op.scheme)) return refuse("this build of hwkern has no kernels for the scheme %s", scheme);
  if (op.config != kChoose && !config_fits(op, op.config))
    return refuse("config %d is no config id of this hwkern for %s with the scheme %s; -1 lets the cost model choose",
                  op.config, name(op.kind), scheme);
  if (op.kind != Kind::kLinearInt8 && op.scheme == kW8A16)
    return refuse("%s quantizes x: its scheme cannot be w8a16", name(op.kind));
  return op.kind != Kind::kNormLinearInt8 || validate_norm(op);
}

const char* dtype_name(DType t) {
  switch (t) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt8: return "int8";
    case DType::kInt32: return "int32";
  }
  return "another type";
}

}  // namespace

const char* name(Kind kind) {
  switch (kind) {
    case Kind::kLinearInt8: return "LinearInt8";
    case Kind::kQuantize: return "Quantize";
    case Kind::kNormLinearInt8: return "NormLinearInt8";
    case Kind::kGatedLinearInt8: return "GatedLinearInt8";
    case Kind::kAttention: return "Attention";
  }
  return "another op";
}

const Kind* kinds(int* count) {
  static constexpr Kind kAll[] = {Kind::kLinearInt8, Kind::kQuantize, Kind::kGatedLinearInt8, Kind::kAttention,
                                  Kind::kNormLinearInt8};
  *count = is_built(Kind::kNormLinearInt8) ? 5 : 4;  // the last may be absent
  return kAll;
}

FieldName field_name(Kind kind, int index) {
  for (const Entry& entry : kEntries)
    if (serves(entry, kind) && index-- == 0)
      return {entry.name, entry.names ? FieldType::kText : entry.real ? FieldType::kFloat32 : FieldType::kInt32};
  return {nullptr, FieldType::kOther};
}

bool parse(Kind kind, const Field* fields, int32_t count, Op* out) {
  Op op;
  op.kind = kind;
  if (count < 0 || (count > 0 && !fields)) return refuse("%s: the collection of fields is broken", name(kind));
  for (int32_t i = 0; i < count; ++i) {
    const Field& field = fields[i];
    if (!field.name) return refuse("%s: field %d has no name", name(kind), i);
    const Entry* found = nullptr;
    for (const Entry& entry : kEntries)
      if (serves(entry, kind) && std::strcmp(field.name, entry.name) == 0) found = &entry;
    if (!found) return refuse("%s has no field \"%.64s\"", name(kind), field.name);
    const bool ok = found->names  ? read_name(field, found->names, &(op.*found->integer))
                    : found->real ? read_real(field, &(op.*found->real))
                                  : read_int(field, &(op.*found->integer));
    if (!ok) return false;
  }
  if (!validate(op)) return false;
  *out = op;
  return true;
}

// ---- State: magic, version, the Op as it lies in memory, a checksum; little-endian like every GPU host -------------

namespace {

constexpr char kMagic[4] = {'H', 'W', 'K', 'T'};
constexpr uint32_t kStateVersion = 3;
constexpr size_t kOpOffset = 8, kSumOffset = kOpOffset + sizeof(Op);
static_assert(kSumOffset + sizeof(uint32_t) == kStateBytes && sizeof(Op) == 25 * 4, "an Op has no padding");

uint32_t fnv1a(const unsigned char* bytes, size_t count) {
  uint32_t hash = 2166136261u;
  for (size_t i = 0; i < count; ++i) hash = (hash ^ bytes[i]) * 16777619u;
  return hash;
}

}  // namespace

void save(const Op& op, unsigned char (&state)[kStateBytes]) {
  std::memcpy(state, kMagic, sizeof kMagic);
  std::memcpy(state + sizeof kMagic, &kStateVersion, sizeof kStateVersion);
  std::memcpy(state + kOpOffset, &op, sizeof op);
  const uint32_t sum = fnv1a(state, kSumOffset);
  std::memcpy(state + kSumOffset, &sum, sizeof sum);
}

bool load(Kind kind, const void* data, size_t bytes, Op* out) {
  const auto* state = static_cast<const unsigned char*>(data);
  if (!state || bytes < kOpOffset || std::memcmp(state, kMagic, sizeof kMagic) != 0)
    return refuse("%s: the engine's data for this op (%zu bytes) was not written by hwkern; rebuild the engine",
                  name(kind), bytes);
  uint32_t version;
  std::memcpy(&version, state + sizeof kMagic, sizeof version);
  if (version != kStateVersion)
    return refuse(
        "%s: the engine holds format %u of this op and this hwkern reads format %u; rebuild the engine, or "
        "load the hwkern that built it",
        name(kind), version, kStateVersion);
  uint32_t sum;
  if (bytes != kStateBytes || (std::memcpy(&sum, state + kSumOffset, sizeof sum), sum != fnv1a(state, kSumOffset)))
    return refuse("%s: the engine's data for this op is damaged (%zu bytes, %zu are expected); rebuild the engine",
                  name(kind), bytes, kStateBytes);
  Op op;
  std::memcpy(&op, state + kOpOffset, sizeof op);
  if (op.kind != kind)
    return refuse("%s: the engine's data is that of another op (%d)", name(kind), static_cast<int>(op.kind));
  if (!within(op.scheme, kSchemes) || !within(op.activation, kActivations) || !within(op.norm, kNorms) ||
      !within(op.gate, kActivations))
    return refuse(
        "%s: the engine asks for scheme %d, activation %d, norm %d and gate %d, which this hwkern does not know; load "
        "the hwkern that built it",
        name(kind), op.scheme, op.activation, op.norm, op.gate);
  if (!validate(op)) return false;
  *out = op;
  return true;
}

void describe(const Op& op, char (&text)[kDescriptionBytes]) {
  size_t used = static_cast<size_t>(std::snprintf(text, sizeof text, "hwkern %s %s", HWKERN_VERSION, name(op.kind)));
  for (const Entry& entry : kEntries) {
    if (!serves(entry, op.kind) || used >= sizeof text) continue;
    char* at = text + used;
    const size_t room = sizeof text - used;
    const int written = entry.names  ? std::snprintf(at, room, " %s=%s", entry.name, entry.names[op.*entry.integer])
                        : entry.real ? std::snprintf(at, room, " %s=%.9g", entry.name, op.*entry.real)
                                     : std::snprintf(at, room, " %s=%d", entry.name, op.*entry.integer);
    used += static_cast<size_t>(written);
  }
}

// ---- Types and shapes ----------------------------------------------------------------------------------------------

namespace {

bool has(const Op& op, Input input) {
  if (input == Input::kX) return true;
  if (op.kind == Kind::kQuantize) return false;
  if (input == Input::kCosine || input == Input::kSine) return op.has_rotary;
  if (input == Input::kMask) return op.has_mask;
  if (op.kind == Kind::kAttention) return false;
  const bool normed = op.kind == Kind::kNormLinearInt8;
  switch (input) {
    case Input::kSkip: return normed && op.has_skip;
    case Input::kNormWeight: return normed;
    case Input::kNormBias: return normed && op.has_norm_bias;
    case Input::kBias: return op.has_bias;
    case Input::kInputScale: return op.has_input_scale;
    case Input::kResidual: return op.has_residual;
    default: return true;  // the weight and its scale
  }
}

constexpr const char* kInputNames[kMaxInputs] = {"x",        "skip",         "norm_weight", "norm_bias",
                                                 "weight",   "weight_scale", "bias",        "input_scale",
                                                 "residual", "cosine",       "sine",        "mask"};

}  // namespace

int position(const Op& op, Input input) {
  if (!has(op, input)) return -1;
  int before = 0;
  for (int i = 0; i < static_cast<int>(input); ++i) before += has(op, static_cast<Input>(i));
  return before;
}

int input_count(const Op& op) {
  int count = 0;
  for (int i = 0; i < kMaxInputs; ++i) count += has(op, static_cast<Input>(i));
  return count;
}

int output_count(const Op& op) {
  if (op.kind == Kind::kQuantize) return 2;
  return op.kind == Kind::kNormLinearInt8 ? 1 + op.has_norm_output + op.has_sum_output : 1;
}

DType output_type(const Op& op, int output, DType x) {
  if (op.kind != Kind::kQuantize) return x;
  return output == 0 ? DType::kInt8 : DType::kFloat32;
}

LastDimension last_dimension(const Op& op, int output) {
  if (op.kind == Kind::kQuantize) return output == 0 ? LastDimension::kK : LastDimension::kNone;
  if (op.kind == Kind::kAttention) return LastDimension::kHeads;
  return output == 0 ? LastDimension::kN : LastDimension::kK;
}

bool supports(const Op& op, int index, const DType* types) {
  const int inputs = input_count(op);
  if (index < 0 || index >= inputs + output_count(op)) return false;
  const DType type = types[index];
  if (index >= inputs) return type == output_type(op, index - inputs, types[0]);
  Input input = Input::kX;
  for (int i = 0; i < kMaxInputs; ++i)
    if (position(op, static_cast<Input>(i)) == index) input = static_cast<Input>(i);
  switch (input) {
    case Input::kX:
      return is_float(type) && !((op.scheme == kW8A16 || op.kind == Kind::kAttention) && type == DType::kFloat32);
    case Input::kMask:
    case Input::kSkip:
    case Input::kResidual: return type == types[0];
    case Input::kNormWeight:
    case Input::kNormBias:
    case Input::kBias: return is_float(type);
    case Input::kWeight: return type == DType::kInt8 || type == DType::kInt32;
    case Input::kWeightScale:
    case Input::kCosine:
    case Input::kSine:
    case Input::kInputScale: return type == DType::kFloat32;
  }
  return false;
}

int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < x.rank; ++i) {
    if (x.dims[i] < 0) return -1;
    rows *= x.dims[i];
  }
  return rows;
}

namespace {

bool differ(int64_t known, int64_t wanted) { return known >= 0 && wanted >= 0 && known != wanted; }

// A vector with one element for each of `count` things, or absent.
bool check_vector(const Op& op, const Tensor* inputs, Input input, int64_t count, const char* things) {
  const int i = position(op, input);
  if (i < 0) return true;
  const Tensor& t = inputs[i];
  const char* what = kInputNames[static_cast<int>(input)];
  if (t.rank != 1) return refuse("%s: %s must have one dimension, not %d", name(op.kind), what, t.rank);
  if (differ(t.dims[0], count))
    return refuse("%s: %s has %" PRId64 " elements, but %s %" PRId64, name(op.kind), what, t.dims[0], things, count);
  return true;
}

// A tensor with x's dimensions, but `last` as the last, or absent.
bool check_like_x(const Op& op, const Tensor* inputs, Input input, int64_t last) {
  const int i = position(op, input);
  if (i < 0) return true;
  const Tensor &x = inputs[0], &t = inputs[i];
  bool ok = t.rank == x.rank;
  for (int d = 0; ok && d < x.rank; ++d) ok = !differ(t.dims[d], d + 1 == x.rank ? last : x.dims[d]);
  return ok || refuse("%s: %s must have the dimensions of x with %" PRId64 " as the last", name(op.kind),
                      kInputNames[static_cast<int>(input)], last);
}

// x [B, L, …]; the tables' last two dimensions, and a mask's that are not 1.
bool check_attention(const Op& op, const Tensor* inputs) {
  const Tensor& x = inputs[0];
  const int64_t columns = (int64_t{op.heads} + 2 * op.kv_heads) * op.head_dim;
  if (x.rank != 3 || differ(x.dims[2], columns))
    return refuse("Attention: x must be [B, L, %" PRId64 "]: heads %d, kv_heads %d twice, of %d", columns, op.heads,
                  op.kv_heads, op.head_dim);
  for (const Input input : {Input::kCosine, Input::kSine}) {
    const int i = position(op, input);
    if (i < 0) continue;
    const Tensor& t = inputs[i];
    bool ok = t.rank >= 2 && !differ(t.dims[t.rank - 1], op.head_dim) && !differ(t.dims[t.rank - 2], x.dims[1]);
    for (int d = 0; ok && d + 2 < t.rank; ++d) ok = !differ(t.dims[d], 1);
    if (!ok) return refuse("Attention: %s must be [L, %d]", kInputNames[static_cast<int>(input)], op.head_dim);
  }
  if (const int i = position(op, Input::kMask); i >= 0) {
    const Tensor& t = inputs[i];
    const int64_t whole[4] = {x.dims[0], op.heads, x.dims[1], x.dims[1]};
    bool ok = t.rank >= 1 && t.rank <= 4;
    for (int d = 0; ok && d < t.rank; ++d) {
      const int64_t wanted = whole[4 - t.rank + d];
      ok = !differ(t.dims[d], wanted) || (t.dims[d] == 1 && d + 1 < t.rank);
    }
    if (!ok) return refuse("Attention: mask must have the dimensions of [B, heads, L, L], or 1 but for the last");
  }
  return true;
}

}  // namespace

bool check_count(const Op& op, int count) {
  return count == input_count(op) ||
         refuse(
             "%s has %d inputs, but its fields speak of %d (has_bias %d, has_input_scale %d, has_residual %d, "
             "has_skip %d, has_norm_bias %d, has_rotary %d, has_mask %d)",
             name(op.kind), count, input_count(op), op.has_bias, op.has_input_scale, op.has_residual, op.has_skip,
             op.has_norm_bias, op.has_rotary, op.has_mask);
}

bool check(const Op& op, const Tensor* inputs, int count) {
  if (!check_count(op, count)) return false;
  DType types[kMaxInputs];
  for (int i = 0; i < count; ++i) types[i] = inputs[i].type;
  for (int input = 0; input < kMaxInputs; ++input) {
    const int i = position(op, static_cast<Input>(input));
    if (i >= 0 && !supports(op, i, types))
      return refuse("%s: input %s cannot be %s here (x is %s)", name(op.kind), kInputNames[input], dtype_name(types[i]),
                    dtype_name(types[0]));
  }
  return check_shapes(op, inputs, count);
}

bool check_shapes(const Op& op, const Tensor* inputs, int count) {
  if (!check_count(op, count)) return false;
  const Tensor& x = inputs[0];
  if (x.rank < 1) return refuse("%s: x needs at least one dimension, [..., K]", name(op.kind));
  const int64_t k = x.dims[x.rank - 1];
  if (k == 0) return refuse("%s: the last dimension of x is 0", name(op.kind));
  if (op.kind == Kind::kQuantize) return true;
  if (op.kind == Kind::kAttention) return check_attention(op, inputs);

  const int64_t columns = (op.kind == Kind::kGatedLinearInt8 ? 2 : 1) * int64_t{op.in_features};
  if (differ(k, columns))
    return refuse("%s: the last dimension of x is %" PRId64 ", but in_features %d needs %" PRId64, name(op.kind), k,
                  op.in_features, columns);
  const Tensor& weight = inputs[position(op, Input::kWeight)];
  if (weight.rank != 2)
    return refuse("%s: weight must have two dimensions, [N, K16], not %d", name(op.kind), weight.rank);
  const int64_t k16 = round_up(op.in_features, kRowAlignment);
  const bool is_int32 = weight.type == DType::kInt32 || (weight.type == kOtherType && weight.dims[1] == k16 / 4);
  const int64_t pitch = is_int32 ? k16 / 4 : k16;
  if (differ(weight.dims[1], pitch))
    return refuse("%s: weight has %" PRId64 " columns of %s; in_features %d needs %" PRId64 " (K rounded up to 16%s)",
                  name(op.kind), weight.dims[1], dtype_name(weight.type), op.in_features, pitch,
                  is_int32 ? ", four int8 in each int32" : "");
  const int64_t n = weight.dims[0];
  if (n == 0) return refuse("%s: weight has no rows", name(op.kind));
  if (op.out_features && differ(n, op.out_features))
    return refuse("%s: weight has %" PRId64 " rows, but out_features is %d", name(op.kind), n, op.out_features);
  if (op.has_input_scale) {
    const Tensor& scale = inputs[position(op, Input::kInputScale)];
    const int64_t most = op.kind == Kind::kLinearInt8 ? columns : 1;
    if (scale.rank > 1 || (scale.rank == 1 && differ(scale.dims[0], 1) && differ(scale.dims[0], most)))
      return refuse("%s: input_scale must hold one float32%s", name(op.kind),
                    most > 1 ? ", or one for each column of x" : "");
  }
  constexpr const char* kRows = "the rows of weight are";
  constexpr const char* kColumns = "the columns of x are";
  return check_vector(op, inputs, Input::kWeightScale, n, kRows) && check_vector(op, inputs, Input::kBias, n, kRows) &&
         check_vector(op, inputs, Input::kNormWeight, op.in_features, kColumns) &&
         check_vector(op, inputs, Input::kNormBias, op.in_features, kColumns) &&
         check_like_x(op, inputs, Input::kSkip, op.in_features) && check_like_x(op, inputs, Input::kResidual, n);
}

}  // namespace hwkern::trt
