// Programmatic dependent launch: where a kernel waits for its predecessor on the stream, and lets its successor start.
// Both do nothing before sm_90, and in a kernel that was launched without overlap.
#pragma once

namespace hwkern::ptx {

// Until the preceding grid has completed and its writes are visible.
__device__ __forceinline__ void grid_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// From here on the next kernel's blocks may be scheduled, once every block has said so or ended. Call it after
// grid_wait(): then whatever precedes this kernel has completed before the next one runs a single instruction.
__device__ __forceinline__ void grid_release() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace hwkern::ptx
