// Plays TensorRT against a plugin library, through NVIDIA's own headers and nothing else of TensorRT: creates plugins
// from fields, asks what TensorRT asks, runs and serializes them. tests/trt_harness.py compiles and calls it.
//
// It may be compiled with headers of another version than the plugin: that is how one binary for 10.1 to 11.x is shown.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

using namespace nvinfer1;

struct HTensor {
  int32_t type, rank;
  int64_t dims[8];
};

namespace {

// A dimension: a number, or a symbol that the plugin may pass on and not look into. Symbols have negative values.
class Expression final : public IDimensionExpr {
 public:
  explicit Expression(int64_t v) : value(v), impl_(this) { mImpl = &impl_; }
  ~Expression() override = default;
  const int64_t value;

 private:
  struct Impl final : apiv::VDimensionExpr {
    explicit Impl(const Expression* e) : owner(e) {}
    bool isConstant() const override { return owner->value >= 0; }
    int64_t getConstantValue() const override { return owner->value; }
    bool isSizeTensor() const override { return false; }
    const Expression* owner;
  } impl_;
};

class Builder final : public IExprBuilder {
 public:
  Builder() : impl_(this) { mImpl = &impl_; }
  ~Builder() override = default;
  const IDimensionExpr* make(int64_t value) {
    made_.push_back(std::make_unique<Expression>(value));
    return made_.back().get();
  }

 private:
  struct Impl final : apiv::VExprBuilder {
    explicit Impl(Builder* b) : owner(b) {}
    IDimensionExpr const* constant(int64_t value) override { return owner->make(value); }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
      return owner->make(-99);
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
      return nullptr;
    }
    Builder* owner;
  } impl_;
  std::vector<std::unique_ptr<Expression>> made_;
};

class Context final : public IPluginResourceContext {
 public:
  IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

Dims dims_of(const HTensor& t) {
  Dims d{};
  d.nbDims = t.rank;
  for (int i = 0; i < t.rank; ++i) d.d[i] = t.dims[i];
  return d;
}

PluginTensorDesc desc_of(const HTensor& t, TensorFormat format = TensorFormat::kLINEAR) {
  return {dims_of(t), static_cast<DataType>(t.type), format, 1.0F};
}

template <class T>
T* capability(void* plugin, PluginCapabilityType type) {
  return static_cast<T*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}
IPluginV3OneBuild* build(void* p) { return capability<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(void* p) { return capability<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME); }
IPluginV3OneCore* core(void* p) { return capability<IPluginV3OneCore>(p, PluginCapabilityType::kCORE); }

struct Library {
  IPluginCreatorInterface* const* creators;
  int32_t count;
};

IPluginCreatorV3One* creator(const void* library, int index) {
  const auto* l = static_cast<const Library*>(library);
  IPluginCreatorInterface* c = l->creators[index];
  // As TensorRT does: the kind of interface is read, then the cast.
  const InterfaceInfo info = c->getInterfaceInfo();
  return std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1 ? static_cast<IPluginCreatorV3One*>(c)
                                                                                : nullptr;
}

std::vector<DynamicPluginTensorDesc> dynamic(const HTensor* descs, const HTensor* min, const HTensor* opt,
                                             const HTensor* max, int count) {
  std::vector<DynamicPluginTensorDesc> all(count);
  for (int i = 0; i < count; ++i) {
    all[i].desc = desc_of(descs[i]);
    all[i].min = dims_of(min[i]), all[i].opt = dims_of(opt[i]), all[i].max = dims_of(max[i]);
  }
  return all;
}

std::vector<PluginTensorDesc> fixed(const HTensor* tensors, int count) {
  std::vector<PluginTensorDesc> all;
  for (int i = 0; i < count; ++i) all.push_back(desc_of(tensors[i]));
  return all;
}

}  // namespace

extern "C" {

int h_version() { return NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR; }

void* h_load(const char* path) {
  void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return nullptr;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  const auto get = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
  if (!get || !set_finder) return nullptr;
  set_finder(nullptr);
  auto* library = new Library;
  library->creators = get(library->count);
  return library;
}

int h_creator_count(const void* library) { return static_cast<const Library*>(library)->count; }
const char* h_creator_name(const void* library, int i) { return creator(library, i)->getPluginName(); }
const char* h_creator_version(const void* library, int i) { return creator(library, i)->getPluginVersion(); }
const char* h_creator_namespace(const void* library, int i) { return creator(library, i)->getPluginNamespace(); }
int h_field_count(const void* library, int i) { return creator(library, i)->getFieldNames()->nbFields; }
const char* h_field_name(const void* library, int i, int f) {
  return creator(library, i)->getFieldNames()->fields[f].name;
}

void* h_create(const void* library, int i, int at_runtime, int count, const char* const* names, const int32_t* types,
               const void* const* data, const int32_t* lengths) {
  std::vector<PluginField> fields;
  for (int f = 0; f < count; ++f)
    fields.emplace_back(names[f], data[f], static_cast<PluginFieldType>(types[f]), lengths[f]);
  const PluginFieldCollection collection{count, fields.data()};
  return creator(library, i)
      ->createPlugin("node", &collection, at_runtime ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}
void* h_create_without_fields(const void* library, int i, int at_runtime, int null_collection) {
  const PluginFieldCollection broken{3, nullptr};
  return creator(library, i)
      ->createPlugin("node", null_collection ? nullptr : &broken,
                     at_runtime ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}

void* h_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
void* h_attach(void* plugin) {
  Context context;
  return runtime(plugin)->attachToContext(&context);
}
void h_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

const char* h_name(void* plugin) { return core(plugin)->getPluginName(); }
int h_output_count(void* plugin) { return build(plugin)->getNbOutputs(); }
const char* h_cache_id(void* plugin) { return build(plugin)->getTimingCacheID(); }

int h_output_types(void* plugin, const int32_t* in, int inputs, int32_t* out, int outputs) {
  std::vector<DataType> from(inputs), to(outputs);
  for (int i = 0; i < inputs; ++i) from[i] = static_cast<DataType>(in[i]);
  const int code = build(plugin)->getOutputDataTypes(to.data(), outputs, from.data(), inputs);
  for (int i = 0; i < outputs; ++i) out[i] = static_cast<int32_t>(to[i]);
  return code;
}

int h_output_shapes(void* plugin, const HTensor* in, int inputs, HTensor* out, int outputs) {
  Builder builder;
  std::vector<DimsExprs> from(inputs), to(outputs);
  for (int i = 0; i < inputs; ++i) {
    from[i].nbDims = in[i].rank;
    for (int j = 0; j < in[i].rank; ++j) from[i].d[j] = builder.make(in[i].dims[j]);
  }
  const int code = build(plugin)->getOutputShapes(from.data(), inputs, nullptr, 0, to.data(), outputs, builder);
  for (int i = 0; code == 0 && i < outputs; ++i) {
    out[i].rank = to[i].nbDims;
    for (int j = 0; j < to[i].nbDims; ++j) out[i].dims[j] = static_cast<const Expression*>(to[i].d[j])->value;
  }
  return code;
}

int h_supports(void* plugin, int index, const HTensor* tensors, int inputs, int outputs, int format) {
  std::vector<DynamicPluginTensorDesc> all = dynamic(tensors, tensors, tensors, tensors, inputs + outputs);
  all[index].desc.format = static_cast<TensorFormat>(format);
  return build(plugin)->supportsFormatCombination(index, all.data(), inputs, outputs);
}

int h_configure(void* plugin, const HTensor* descs, const HTensor* min, const HTensor* opt, const HTensor* max,
                int inputs, int outputs) {
  const auto all = dynamic(descs, min, opt, max, inputs + outputs);
  return build(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
}

size_t h_workspace(void* plugin, const HTensor* descs, const HTensor* min, const HTensor* opt, const HTensor* max,
                   int inputs, int outputs) {
  const auto all = dynamic(descs, min, opt, max, inputs + outputs);
  return build(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
}

int h_tactics(void* plugin, int32_t* out, int capacity) {
  const int count = build(plugin)->getNbTactics();
  return count > capacity || build(plugin)->getValidTactics(out, count) != 0 ? -1 : count;
}

int h_set_tactic(void* plugin, int tactic) { return runtime(plugin)->setTactic(tactic); }

int h_on_shape_change(void* plugin, const HTensor* tensors, int inputs, int outputs) {
  const auto all = fixed(tensors, inputs + outputs);
  return runtime(plugin)->onShapeChange(all.data(), inputs, all.data() + inputs, outputs);
}

int h_enqueue(void* plugin, const HTensor* tensors, int inputs, int outputs, const void* const* in, void* const* out,
              void* workspace, void* stream) {
  const auto all = fixed(tensors, inputs + outputs);
  return runtime(plugin)->enqueue(all.data(), all.data() + inputs, in, out, workspace,
                                  static_cast<cudaStream_t>(stream));
}

// The one field that is serialized: its name in `name`, its bytes in `data`; returns how many, -1 for anything else.
int h_serialize(void* plugin, char* name, void* data, int capacity) {
  const PluginFieldCollection* fields = runtime(plugin)->getFieldsToSerialize();
  if (!fields || fields->nbFields != 1 || fields->fields[0].type != PluginFieldType::kUNKNOWN ||
      fields->fields[0].length > capacity)
    return -1;
  std::strcpy(name, fields->fields[0].name);
  std::memcpy(data, fields->fields[0].data, static_cast<size_t>(fields->fields[0].length));
  return fields->fields[0].length;
}

}  // extern "C"
