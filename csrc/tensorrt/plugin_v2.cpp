// libhwkern_trt8.so: the ops of op.h as IPluginV2DynamicExt, for TensorRT 8.6, which has nothing newer.
//
// Two ways in: IPluginRegistry::loadLibrary (trtexec --dynamicPlugins) finds getPluginCreators(); a program that only
// opens the library calls hwkern_trt8_register(). Both put the creators under the namespace "hwkern", where the ONNX
// parser looks for a node with that plugin_namespace; REGISTER_TENSORRT_PLUGIN would put them under the empty one.
//
// This interface has no tactics: the cost model chooses a config for every M.
#include <dlfcn.h>

#include <atomic>
#include <initializer_list>
#include <new>

#include "tensorrt/adapt.h"
#include "tensorrt/entry_points.h"
#include "tensorrt/log.h"

namespace hwkern::trt {

namespace {

using namespace nvinfer1;

// Builds that want float16 now: see hwkern_trt8_prefer_half().
std::atomic<int32_t> builds_in_half{0};

class Plugin final : public IPluginV2DynamicExt {
 public:
  explicit Plugin(const Op& op, bool is_damaged = false) : op_(op), is_damaged_(is_damaged) {}

  AsciiChar const* getPluginType() const noexcept override { return name(op_.kind); }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(AsciiChar const*) noexcept override {}

  int32_t getNbOutputs() const noexcept override { return output_count(op_); }
  DataType getOutputDataType(int32_t output, DataType const* inputs, int32_t) const noexcept override {
    return from_dtype(output_type(op_, output, to_dtype(inputs[0])));
  }
  DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t count,
                                IExprBuilder& builder) noexcept override {
    // The only method that can refuse shapes before an engine runs, so the constants among them are looked at here.
    Tensor tensors[kMaxInputs] = {};
    for (int i = 0; i < count && i < kMaxInputs; ++i) {
      tensors[i] = {kOtherType, inputs[i].nbDims, {}};
      for (int j = 0; j < inputs[i].nbDims && j < kMaxRank; ++j)
        tensors[i].dims[j] = inputs[i].d[j]->isConstant() ? inputs[i].d[j]->getConstantValue() : -1;
    }
    DimsExprs shape{};
    if (!check_shapes(op_, tensors, count) || !output_shape(op_, output, inputs, count, builder, &shape))
      shape.nbDims = -1;
    return shape;
  }
  bool supportsFormatCombination(int32_t index, PluginTensorDesc const* tensors, int32_t inputs,
                                 int32_t) noexcept override {
    // 8.6 chooses types by timing. Biases and norm weights stay as the model has them, in float32, and so do results.
    if (index == position(op_, Input::kX) && tensors[index].type == DataType::kFLOAT && builds_in_half > 0)
      return false;
    for (const Input input : {Input::kBias, Input::kNormWeight, Input::kNormBias})
      if (index == position(op_, input) && tensors[index].type != DataType::kFLOAT) return false;
    return supports(op_, index, inputs, [&](int i) -> const PluginTensorDesc& { return tensors[i]; });
  }
  // Nothing can be refused here; what is wrong is said now, and enqueue() fails for the same reason.
  void configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {
    trt::check(op_, in, inputs);
  }
  size_t getWorkspaceSize(PluginTensorDesc const* in, int32_t, PluginTensorDesc const*,
                          int32_t) const noexcept override {
    return workspace_bytes(op_, row_count(to_tensor(in[0])));
  }
  int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    constexpr int32_t kModelChooses = 0;
    return !is_damaged_ && trt::check(op_, in, input_count(op_)) &&
                   trt::enqueue(op_, kModelChooses, in, inputs, outputs, workspace, stream)
               ? 0
               : 1;
  }

  int32_t initialize() noexcept override { return is_damaged_ ? 1 : 0; }
  void terminate() noexcept override {}
  void destroy() noexcept override { delete this; }
  IPluginV2DynamicExt* clone() const noexcept override { return new (std::nothrow) Plugin(op_, is_damaged_); }

  size_t getSerializationSize() const noexcept override { return kStateBytes; }
  void serialize(void* buffer) const noexcept override {
    unsigned char state[kStateBytes];
    save(op_, state);
    std::memcpy(buffer, state, sizeof state);
  }

 private:
  const Op op_;
  const bool is_damaged_;  // made from an engine's data that load() refused: it neither starts nor runs
};

class Creator final : public IPluginCreator {
 public:
  explicit Creator(Kind kind) : kind_(kind), names_(kind) {}

  AsciiChar const* getPluginName() const noexcept override { return name(kind_); }
  AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }
  void setPluginNamespace(AsciiChar const*) noexcept override {}
  PluginFieldCollection const* getFieldNames() noexcept override { return &names_.collection; }

  IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* fields) noexcept override {
    Op op;
    return parse(kind_, fields, &op) ? new (std::nothrow) Plugin(op) : nullptr;
  }
  IPluginV2* deserializePlugin(AsciiChar const*, void const* state, size_t bytes) noexcept override {
    // NOTE: 8.6 crashes when it gets no plugin for what an engine holds (seen on an H100), so it always gets one.
    Op op;
    const bool is_good = load(kind_, state, bytes, &op);
    return new (std::nothrow) Plugin(op, !is_good);
  }

 private:
  const Kind kind_;
  FieldNames names_;
};

IPluginCreator* const* creators(int32_t* count) {
  static Creator linear(Kind::kLinearInt8), quantize(Kind::kQuantize), gated_linear(Kind::kGatedLinearInt8),
      attention(Kind::kAttention), norm_linear(Kind::kNormLinearInt8);
  static IPluginCreator* const all[] = {&linear, &quantize, &gated_linear, &attention, &norm_linear};  // as in kinds()
  kinds(count);
  return all;
}

// A function of the TensorRT that this process has loaded, whether its symbols are global or not. Nothing is loaded.
void* find(const char* symbol) {
  if (void* f = dlsym(RTLD_DEFAULT, symbol)) return f;
  for (const char* library : {"libnvinfer.so.8", "libnvinfer_lean.so.8"}) {
    if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
      void* f = dlsym(handle, symbol);
      dlclose(handle);  // gives back the count that dlopen took; the library stays
      if (f) return f;
    }
  }
  return nullptr;
}

bool register_creators() {
  const auto registry_of = reinterpret_cast<IPluginRegistry* (*)()>(find("getPluginRegistry"));
  const auto version_of = reinterpret_cast<int32_t (*)()>(find("getInferLibVersion"));
  if (!registry_of || !version_of)
    return refuse("no TensorRT 8 is loaded in this process: import tensorrt (or load libnvinfer.so.8) first");
  // The registry's virtual functions are called below, and they are those of 8.6 only.
  const int32_t version = version_of();
  if (version / 100 != 86)
    return refuse(
        "the loaded TensorRT says version %d; libhwkern_trt8.so is for 8.6 (8600 to 8699), "
        "libhwkern_trt.so for 10.1 and newer",
        version);
  IPluginRegistry* registry = registry_of();
  if (!registry) return refuse("TensorRT gives no plugin registry");
  int32_t count;
  IPluginCreator* const* all = creators(&count);
  for (int i = 0; i < count; ++i) {
    if (registry->getPluginCreator(all[i]->getPluginName(), kPluginVersion, kNamespace)) continue;
    if (!registry->registerCreator(*all[i], kNamespace))
      return refuse("TensorRT did not take the plugin %s into its registry", all[i]->getPluginName());
  }
  return true;
}

}  // namespace

}  // namespace hwkern::trt

// ---- Entry points --------------------------------------------------------------------------------------------------

// Puts the ops into the registry of the TensorRT 8.6 in this process; again and again is fine. 1 on success, else 0 and
// hwkern_trt_last_error() says why.
extern "C" HWKERN_EXPORT int32_t hwkern_trt8_register() { return hwkern::trt::register_creators(); }

// 1 before a build with BuilderFlag::kFP16, 0 after it: in between no op takes float32 for x. TensorRT would time both
// types and has taken float32, with conversions around it, while others used the GPU: 398 µs in place of 211 (linear of
// 8192×4096×4096 on an H100).
extern "C" HWKERN_EXPORT void hwkern_trt8_prefer_half(int32_t on) { hwkern::trt::builds_in_half += on ? 1 : -1; }

extern "C" HWKERN_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  return hwkern::trt::creators(&count);
}

extern "C" HWKERN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
