// bar.sync on a numbered barrier: a subset of the block's threads waits for each other.
#pragma once

namespace hwkern::ptx {

// THREADS: how many threads take part, a multiple of 32. Barrier 0 is __syncthreads'.
template <int BARRIER, int THREADS>
__device__ __forceinline__ void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// The 128 threads of one warpgroup wait for each other on barrier `barrier` (1 … 15).
__device__ __forceinline__ void warpgroup_barrier_sync(int barrier) {
  asm volatile("bar.sync %0, 128;\n" ::"r"(barrier) : "memory");
}

}  // namespace hwkern::ptx
