// libhwkern_trt.so: the ops of op.h as IPluginV3, for TensorRT 10.1 to 11.x and TensorRT-RTX from 1.7 on, one binary.
//
// It links nothing of TensorRT and calls nothing of it but IExprBuilder::constant(), the first entry of its table in every
// version: TensorRT finds getCreators() by name and calls our virtual functions, whose tables are the same from 10.0.1 to
// 11.1. Keep it so: the tables of the logger, the logger finder and the plugin registry changed at 11.0, so a call to one
// of them would land in the wrong method.
#include <new>

#include "tensorrt/adapt.h"
#include "tensorrt/entry_points.h"
#include "tensorrt/log.h"

namespace hwkern::trt {

namespace {

using namespace nvinfer1;

constexpr int32_t kSuccessCode = 0, kFailureCode = 1;
int32_t code(bool ok) { return ok ? kSuccessCode : kFailureCode; }

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(const Op& op) : op_(op) {
    describe(op_, description_);
    save(op_, state_);
  }
  Plugin(const Plugin& other) : Plugin(other.op_) { tactic_ = other.tactic_; }
  Plugin& operator=(const Plugin&) = delete;

  // IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(*this); }

  // Core
  AsciiChar const* getPluginName() const noexcept override { return name(op_.kind); }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return output_count(op_); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t output_count_, const DataType* inputs,
                             int32_t input_count_) const noexcept override {
    if (output_count_ != output_count(op_) || !check_count(op_, input_count_)) return kFailureCode;
    for (int i = 0; i < output_count_; ++i) outputs[i] = from_dtype(output_type(op_, i, to_dtype(inputs[0])));
    return kSuccessCode;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
                          int32_t output_count_, IExprBuilder& builder) noexcept override {
    for (int i = 0; i < output_count_; ++i)
      if (!output_shape(op_, i, inputs, count, builder, &outputs[i])) return kFailureCode;
    return kSuccessCode;
  }

  bool supportsFormatCombination(int32_t index, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    return supports(op_, index, inputs, [&](int i) -> const PluginTensorDesc& { return tensors[i].desc; });
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                          int32_t) noexcept override {
    tactic_count_ = 0;
    if (!check(op_, in, inputs)) return kFailureCode;
    const auto rows = [&](const Dims& dims) { return row_count(to_tensor(dims, in[0].desc.type)); };
    const int weight = position(op_, Input::kWeight);
    if (weight >= 0)
      tactic_count_ =
          tactics(op_, rows(in[0].min), rows(in[0].opt), rows(in[0].max), in[weight].desc.dims.d[0], tactics_);
    return kSuccessCode;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                          int32_t) const noexcept override {
    return workspace_bytes(op_, row_count(to_tensor(in[0].max, in[0].desc.type)));
  }

  int32_t getNbTactics() noexcept override { return tactic_count_; }
  int32_t getValidTactics(int32_t* out, int32_t count) noexcept override {
    for (int i = 0; i < count && i < tactic_count_; ++i) out[i] = tactics_[i];
    return kSuccessCode;
  }
  char const* getTimingCacheID() noexcept override { return description_; }
  char const* getMetadataString() noexcept override { return description_; }

  // Runtime
  int32_t setTactic(int32_t tactic) noexcept override {
    tactic_ = tactic;
    return kSuccessCode;
  }
  int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const*,
                        int32_t) noexcept override {
    return code(check(op_, in, inputs));
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    return code(trt::enqueue(op_, tactic_, in, inputs, outputs, workspace, stream));
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  const Op op_;
  int32_t tactic_ = 0, tactic_count_ = 0;
  int32_t tactics_[kMaxTactics] = {};
  char description_[kDescriptionBytes];
  unsigned char state_[kStateBytes];
  PluginField field_{kStateField, state_, PluginFieldType::kUNKNOWN, static_cast<int32_t>(kStateBytes)};
  PluginFieldCollection fields_{1, &field_};
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(Kind kind) : kind_(kind), names_(kind) {}

  IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields,
                          TensorRTPhase phase) noexcept override {
    Op op;
    const bool ok = phase == TensorRTPhase::kRUNTIME ? load(fields, &op) : parse(kind_, fields, &op);
    return ok ? new (std::nothrow) Plugin(op) : nullptr;
  }
  PluginFieldCollection const* getFieldNames() noexcept override { return &names_.collection; }
  AsciiChar const* getPluginName() const noexcept override { return name(kind_); }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  bool load(PluginFieldCollection const* fields, Op* op) const {
    for (int i = 0; fields && fields->fields && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      if (field.name && std::strcmp(field.name, kStateField) == 0)
        return trt::load(kind_, field.data, field.length < 0 ? 0 : static_cast<size_t>(field.length), op);
    }
    return refuse("%s: the engine holds no data for this op; rebuild the engine", name(kind_));
  }

  const Kind kind_;
  FieldNames names_;
};

}  // namespace

}  // namespace hwkern::trt

// ---- The entry points that TensorRT looks up -----------------------------------------------------------------------

extern "C" HWKERN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using hwkern::trt::Creator;
  using hwkern::trt::Kind;
  static Creator linear(Kind::kLinearInt8), quantize(Kind::kQuantize), gated_linear(Kind::kGatedLinearInt8),
      attention(Kind::kAttention), norm_linear(Kind::kNormLinearInt8);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&linear, &quantize, &gated_linear, &attention,
                                                                &norm_linear};  // as in kinds()
  hwkern::trt::kinds(&count);
  return creators;
}

// TensorRT passes its logger finder to every plugin library. It is not kept: see the top of this file.
extern "C" HWKERN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
