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

struct Launch {
  dim3 grid, block;
  int shared_bytes = 0;
  int cluster = 1;       // blocks along x that form a cluster (sm_90 and newer)
  // The kernel may start while its predecessor on the stream still runs: it calls ptx::grid_wait() before it touches
  // anything that the predecessor could write or read. Only for compute capability 9.0 and newer.
  bool overlap = false;
  // As little L1 and as much shared memory as there is, though the kernel takes none. NOTE: an SM must be empty before the
  // split changes, so a kernel that has another one keeps blocks of the next, which may start early, from its SMs.
  bool most_shared = false;
};

// A driver older than the runtime does not know the attribute of `most_shared`.
inline bool driver_splits_launches() {
  static const bool yes = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12060;
  }();
  return yes;
}

template <auto kernel, typename... Args>
Status launch(const Launch& shape, Stream stream, const Args&... args) {
  if (const Status status = allow_shared_memory<kernel>(shape.shared_bytes); !status.ok()) return status;
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.overlap) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.most_shared && driver_splits_launches()) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attribute.val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  }
  return status_of(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace hwkern
