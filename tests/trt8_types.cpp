// Asks libhwkern_trt8.so, argv[1], which types x may have, as TensorRT 8.6 does while it builds: a line for each state of
// hwkern_trt8_prefer_half().
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

using namespace nvinfer1;

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const auto creators = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(dlsym(library, "getPluginCreators"));
  const auto prefer_half = reinterpret_cast<void (*)(int32_t)>(dlsym(library, "hwkern_trt8_prefer_half"));
  if (!creators || !prefer_half) return 2;
  int32_t count, k = 64;
  const PluginField field("in_features", &k, PluginFieldType::kINT32, 1);
  PluginFieldCollection fields{1, &field};
  IPluginV2DynamicExt* plugin = nullptr;
  IPluginCreator* const* all = creators(count);
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(all[i]->getPluginName(), "LinearInt8"))
      plugin = static_cast<IPluginV2DynamicExt*>(all[i]->createPlugin("linear", &fields));
  if (!plugin) return 3;
  const auto say = [&] {
    const auto takes = [&](DataType type) {
      PluginTensorDesc tensors[4] = {};  // x, weight, weight_scale, y
      tensors[0].type = type;
      return plugin->supportsFormatCombination(0, tensors, 3, 1) ? 1 : 0;
    };
    std::printf("float32 %d float16 %d int8 %d\n", takes(DataType::kFLOAT), takes(DataType::kHALF),
                takes(DataType::kINT8));
  };
  say();
  for (const int on : {1, 1, 0, 0}) prefer_half(on), say();
  plugin->destroy();
}
