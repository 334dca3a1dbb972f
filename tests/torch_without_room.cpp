// What csrc/bindings/torch_ops.cpp looks up in torch, with the CPU in CUDA's place and no memory to be had: its operators
// then come to the allocation of their results, and no further, on a machine without a GPU. All that is not here is
// torch's own, because this library is linked with libtorch_cpu.
#include <dlfcn.h>

#include <cstdint>

extern "C" {
int32_t aoti_torch_device_type_cuda() { return 0; }  // the CPU's
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**) {
  return 1;
}
int32_t aoti_torch_library_init_impl(const char* name, const char*, const char* file, uint32_t line, void** library) {
  using Init = int32_t (*)(const char*, const char*, const char*, uint32_t, void**);
  return reinterpret_cast<Init>(dlsym(RTLD_NEXT, "aoti_torch_library_init_impl"))(name, "CPU", file, line, library);
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
}
