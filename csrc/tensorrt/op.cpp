// The description of the ops: fields, state, types and shapes.
#include "tensorrt/op.h"

#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "core/status.h"
#include "tensorrt/log.h"

namespace hwkern::trt {

namespace {

constexpr const char* kSchemes[] = {"w8a8_dynamic", "w8a8_static", "w8a16"};
constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};  // in the order of Activation
constexpr int kSchemeCount = sizeof(kSchemes) / sizeof(kSchemes[0]);
constexpr int kActivationCount = sizeof(kActivations) / sizeof(kActivations[0]);

constexpr FieldName kLinearFields[] = {{"in_features", false},  {"out_features", false}, {"scheme", true},
                                       {"activation", true},    {"has_bias", false},     {"has_input_scale", false},
                                       {"has_residual", false}, {"config", false},       {nullptr, false}};
constexpr FieldName kQuantizeFields[] = {{nullptr, false}};

// The names as one sentence part: "none, relu, …".
void join(const char* const* names, int count, char* text, size_t bytes) {
  size_t used = 0;
  for (int i = 0; i < count && used < bytes; ++i)
    used += static_cast<size_t>(std::snprintf(text + used, bytes - used, "%s%s", i ? ", " : "", names[i]));
}

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

bool read_name(const Field& field, const char* const* names, int count, int32_t* value) {
  constexpr int32_t kLongest = 64;
  if (field.type != FieldType::kText || !field.data || field.length < 1 || field.length > kLongest)
    return refuse("field %s must be a string of 1 to %d characters", field.name, kLongest);
  char text[kLongest + 1] = "";
  std::memcpy(text, field.data, static_cast<size_t>(field.length));
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(text, names[i]) == 0) {
      *value = i;
      return true;
    }
  }
  char known[128];
  join(names, count, known, sizeof known);
  return refuse("field %s is \"%s\"; known are: %s", field.name, text, known);
}

bool is_flag(int32_t v) { return v == 0 || v == 1; }

// The one place where an op is judged, whether it came from fields or from an engine.
bool validate(const Op& op) {
  if (op.kind == Kind::kQuantize) return true;
  if (op.in_features == 0) return refuse("LinearInt8 needs the field in_features: K, the number of columns of x");
  if (op.in_features < 1 || op.in_features > kMaxK)
    return refuse("in_features is %d; it must be 1 to %" PRId64 " (2^17 - 1, or the int32 sum could overflow)",
                  op.in_features, kMaxK);
  if (op.out_features < 0) return refuse("out_features is %d; it must be positive", op.out_features);
  if (!is_flag(op.has_bias) || !is_flag(op.has_input_scale) || !is_flag(op.has_residual))
    return refuse("has_bias, has_input_scale and has_residual must be 0 or 1");
  if ((op.scheme == LinearScheme::kW8A8Static) != (op.has_input_scale == 1))
    return refuse(
        "the input_scale goes with the scheme w8a8_static and with no other; here the scheme is %s and "
        "has_input_scale is %d",
        kSchemes[static_cast<int>(op.scheme)], op.has_input_scale);
  const char* scheme = kSchemes[static_cast<int>(op.scheme)];
  if (!scheme_is_built(op.scheme)) return refuse("this build of hwkern has no kernels for the scheme %s", scheme);
  if (op.config != kChoose && !config_fits(op.scheme, op.config))
    return refuse("config %d is no config id of this hwkern for the scheme %s; -1 lets the cost model choose",
                  op.config, scheme);
  return true;
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

const char* name(Kind kind) { return kind == Kind::kLinearInt8 ? "LinearInt8" : "Quantize"; }

const FieldName* field_names(Kind kind) { return kind == Kind::kLinearInt8 ? kLinearFields : kQuantizeFields; }

bool same(const Op& a, const Op& b) { return std::memcmp(&a, &b, sizeof(Op)) == 0; }
static_assert(sizeof(Op) == 9 * sizeof(int32_t), "same() and save() copy an Op as integers without padding");

bool parse(Kind kind, const Field* fields, int32_t count, Op* out) {
  Op op;
  op.kind = kind;
  if (count < 0 || (count > 0 && !fields)) return refuse("%s: the collection of fields is broken", name(kind));
  int32_t scheme = 0, activation = 0;
  for (int32_t i = 0; i < count; ++i) {
    const Field& field = fields[i];
    if (!field.name) return refuse("%s: field %d has no name", name(kind), i);
    const auto is = [&](const char* text) { return kind == Kind::kLinearInt8 && std::strcmp(field.name, text) == 0; };
    bool ok;
    if (is("in_features")) {
      ok = read_int(field, &op.in_features);
    } else if (is("out_features")) {
      ok = read_int(field, &op.out_features);
    } else if (is("scheme")) {
      ok = read_name(field, kSchemes, kSchemeCount, &scheme);
    } else if (is("activation")) {
      ok = read_name(field, kActivations, kActivationCount, &activation);
    } else if (is("has_bias")) {
      ok = read_int(field, &op.has_bias);
    } else if (is("has_input_scale")) {
      ok = read_int(field, &op.has_input_scale);
    } else if (is("has_residual")) {
      ok = read_int(field, &op.has_residual);
    } else if (is("config")) {
      ok = read_int(field, &op.config);
    } else {
      ok = refuse("%s has no field \"%.64s\"", name(kind), field.name);
    }
    if (!ok) return false;
  }
  op.scheme = static_cast<LinearScheme>(scheme);
  op.activation = static_cast<Activation>(activation);
  if (!validate(op)) return false;
  *out = op;
  return true;
}

// ---- State: magic, version, the Op as integers, a checksum; little-endian like every GPU host ----------------------

namespace {

constexpr char kMagic[4] = {'H', 'W', 'K', 'T'};
constexpr uint32_t kStateVersion = 1;
constexpr size_t kOpOffset = 8, kSumOffset = kOpOffset + sizeof(Op);
static_assert(kSumOffset + sizeof(uint32_t) == kStateBytes);

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
  if (static_cast<uint32_t>(op.scheme) >= kSchemeCount || static_cast<uint32_t>(op.activation) >= kActivationCount)
    return refuse(
        "%s: the engine asks for scheme %d and activation %d, which this hwkern does not know; load the "
        "hwkern that built it",
        name(kind), static_cast<int>(op.scheme), static_cast<int>(op.activation));
  if (!validate(op)) return false;
  *out = op;
  return true;
}

void describe(const Op& op, char* text, size_t bytes) {
  if (op.kind == Kind::kQuantize) {
    std::snprintf(text, bytes, "hwkern %s Quantize", HWKERN_VERSION);
    return;
  }
  std::snprintf(text, bytes, "hwkern %s LinearInt8 K=%d scheme=%s activation=%s bias=%d residual=%d config=%d",
                HWKERN_VERSION, op.in_features, kSchemes[static_cast<int>(op.scheme)],
                kActivations[static_cast<int>(op.activation)], op.has_bias, op.has_residual, op.config);
}

// ---- Types and shapes ----------------------------------------------------------------------------------------------

int position(const Op& op, Input input) {
  if (input == Input::kX) return 0;
  if (op.kind == Kind::kQuantize) return -1;
  switch (input) {
    case Input::kX: return 0;
    case Input::kWeight: return 1;
    case Input::kWeightScale: return 2;
    case Input::kBias: return op.has_bias ? 3 : -1;
    case Input::kInputScale: return op.has_input_scale ? 3 + op.has_bias : -1;
    case Input::kResidual: return op.has_residual ? 3 + op.has_bias + op.has_input_scale : -1;
  }
  return -1;
}

int input_count(const Op& op) {
  return op.kind == Kind::kQuantize ? 1 : 3 + op.has_bias + op.has_input_scale + op.has_residual;
}

int output_count(const Op& op) { return op.kind == Kind::kQuantize ? 2 : 1; }

DType output_type(const Op& op, int output, DType x) {
  if (op.kind == Kind::kLinearInt8) return x;
  return output == 0 ? DType::kInt8 : DType::kFloat32;
}

bool supports(const Op& op, int index, const DType* types) {
  const int inputs = input_count(op);
  if (index < 0 || index >= inputs + output_count(op)) return false;
  const DType type = types[index];
  if (index >= inputs) return type == output_type(op, index - inputs, types[0]);
  const bool is_16_bit = op.kind == Kind::kLinearInt8 && op.scheme == LinearScheme::kW8A16;
  if (index == position(op, Input::kX)) return is_float(type) && !(is_16_bit && type == DType::kFloat32);
  if (index == position(op, Input::kWeight)) return type == DType::kInt8 || type == DType::kInt32;
  if (index == position(op, Input::kBias)) return is_float(type);
  if (index == position(op, Input::kResidual)) return type == types[0];
  return type == DType::kFloat32;  // the scales
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

bool check_vector(const char* what, const Tensor& t, int64_t n) {
  if (t.rank != 1) return refuse("LinearInt8: %s must have one dimension, not %d", what, t.rank);
  if (differ(t.dims[0], n))
    return refuse("LinearInt8: %s has %" PRId64 " elements, but the weight has %" PRId64 " rows", what, t.dims[0], n);
  return true;
}

}  // namespace

bool check_count(const Op& op, int count) {
  return count == input_count(op) ||
         refuse("%s has %d inputs, but its fields speak of %d (has_bias %d, has_input_scale %d, has_residual %d)",
                name(op.kind), count, input_count(op), op.has_bias, op.has_input_scale, op.has_residual);
}

bool check(const Op& op, const Tensor* inputs, int count) {
  constexpr const char* kNames[] = {"x", "weight", "weight_scale", "bias", "input_scale", "residual"};
  if (!check_count(op, count)) return false;
  DType types[kMaxInputs];
  for (int i = 0; i < count; ++i) types[i] = inputs[i].type;
  for (int role = 0; role < kMaxInputs; ++role) {
    const int i = position(op, static_cast<Input>(role));
    if (i >= 0 && !supports(op, i, types))
      return refuse("%s: input %s cannot be %s here (x is %s)", name(op.kind), kNames[role], dtype_name(types[i]),
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

  if (differ(k, op.in_features))
    return refuse("LinearInt8: the last dimension of x is %" PRId64 ", but in_features is %d", k, op.in_features);
  const Tensor& weight = inputs[position(op, Input::kWeight)];
  if (weight.rank != 2) return refuse("LinearInt8: weight must have two dimensions, [N, K16], not %d", weight.rank);
  const int64_t k16 = round_up(op.in_features, kRowAlignment);
  const bool may_be_int32 = weight.type == DType::kInt32 || (weight.type == kOtherType && weight.dims[1] == k16 / 4);
  const int64_t pitch = may_be_int32 ? k16 / 4 : k16;
  if (differ(weight.dims[1], pitch))
    return refuse("LinearInt8: weight has %" PRId64 " columns of %s; in_features %d needs %" PRId64
                  " (K rounded up to 16%s)",
                  weight.dims[1], dtype_name(weight.type), op.in_features, pitch,
                  weight.type == DType::kInt32 ? ", four int8 in each int32" : "");
  const int64_t n = weight.dims[0];
  if (n == 0) return refuse("LinearInt8: weight has no rows");
  if (op.out_features && differ(n, op.out_features))
    return refuse("LinearInt8: weight has %" PRId64 " rows, but out_features is %d", n, op.out_features);
  if (!check_vector("weight_scale", inputs[position(op, Input::kWeightScale)], n)) return false;
  if (op.has_bias && !check_vector("bias", inputs[position(op, Input::kBias)], n)) return false;
  if (op.has_input_scale) {
    const Tensor& scale = inputs[position(op, Input::kInputScale)];
    if (scale.rank > 1 || (scale.rank == 1 && differ(scale.dims[0], 1) && differ(scale.dims[0], op.in_features)))
      return refuse("LinearInt8: input_scale must hold one float32, or one for each of the %d columns of x",
                    op.in_features);
  }
  if (op.has_residual) {
    const Tensor& residual = inputs[position(op, Input::kResidual)];
    bool ok = residual.rank == x.rank;
    for (int i = 0; ok && i < x.rank; ++i) ok = !differ(residual.dims[i], i + 1 == x.rank ? n : x.dims[i]);
    if (!ok) return refuse("LinearInt8: residual must have the shape of the output, x's with N as the last dimension");
  }
  return true;
}

}  // namespace hwkern::trt
