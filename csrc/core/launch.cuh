// Launching a kernel, and what the runtime says of it, as a Status.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "core/status.h"

namespace hwkern {

inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return kSuccess;
  cudaGetLastError();  // reported here: later calls start clean
  return {StatusCode::kCudaError, cudaGetErrorString(error)};
}

// Above 48 KB of dynamic shared memory a kernel needs an attribute, set once a device.
template <auto kernel>
Status allow_shared_memory(int shared_bytes) {
  if (shared_bytes > 48 * 1024) {
    static std::atomic<uint64_t> raised{0};  // bit i: done on device i
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    const uint64_t bit = uint64_t{1} << (index & 63);
    if (error == cudaSuccess && (index > 63 || !(raised.load(std::memory_order_relaxed) & bit))) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      if (error == cudaSuccess) raised.fetch_or(bit, std::memory_order_relaxed);
    }
    if (error != cudaSuccess) return status_of(error);
  }
  return kSuccess;
}

template <auto kernel, typename... Args>
Status launch(dim3 grid, dim3 block, int shared_bytes, Stream stream, const Args&... args) {
  if (const Status status = allow_shared_memory<kernel>(shared_bytes); !status.ok()) return status;
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
  return status_of(cudaPeekAtLastError());
}

// The same in clusters of `cluster` blocks along x (sm_90 and newer).
template <auto kernel, typename... Args>
Status launch_clusters(int cluster, dim3 grid, dim3 block, int shared_bytes, Stream stream, const Args&... args) {
  if (const Status status = allow_shared_memory<kernel>(shared_bytes); !status.ok()) return status;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return status_of(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace hwkern
