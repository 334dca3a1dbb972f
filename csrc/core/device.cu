#include "core/device.h"

#include <cuda_runtime.h>

#include <atomic>

#include "core/launch.cuh"

namespace hwkern {

int device_count(std::string* message) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // a failed query must not show up in somebody else's check
  // No device at all is an answer, not a failure. The runtime gives one code for "no driver" and "driver too old".
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (error == cudaErrorInsufficientDriver && driver == 0) {
    *message = "no NVIDIA driver is loaded on this machine";
  } else {
    *message = error == cudaSuccess || error == cudaErrorNoDevice ? "" : cudaGetErrorString(error);
  }
  return error == cudaSuccess ? count : 0;
}

void driver_version(int* driver, int* runtime) {
  *driver = *runtime = 0;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  cudaGetLastError();
}

static int attribute(cudaDeviceAttr attr, int index) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, attr, index) == cudaSuccess ? value : 0;
}

static Device describe(int index) {
  return {
      attribute(cudaDevAttrMultiProcessorCount, index),
      attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, index),
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
}

Status device_properties(int index, DeviceProperties* out) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) return status_of(error);
  const Device device = describe(index);
  *out = {properties.name,
          device.compute,
          device.sm_count,
          attribute(cudaDevAttrClockRate, index),
          attribute(cudaDevAttrMemoryClockRate, index),
          attribute(cudaDevAttrGlobalMemoryBusWidth, index),
          attribute(cudaDevAttrL2CacheSize, index),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
          device.shared_bytes,
          properties.totalGlobalMem};
  return kSuccess;
}

Status current_device(Device* device) {
  constexpr int kCached = 64;
  static Device cache[kCached];
  static std::atomic<bool> known[kCached];
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return status_of(error);
  if (index >= kCached) {
    *device = describe(index);
    return kSuccess;
  }
  // Two threads may fill the same entry at once: they write the same values.
  if (!known[index].load(std::memory_order_acquire)) {
    cache[index] = describe(index);
    known[index].store(true, std::memory_order_release);
  }
  *device = cache[index];
  return kSuccess;
}

}  // namespace hwkern
