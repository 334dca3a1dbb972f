// bar.sync on a numbered barrier: a subset of the block's threads waits for each other.
#pragma once

namespace hwkern::ptx {

// THREADS: how many threads take part, a multiple of 32. Barrier 0 is __syncthreads'.
template <int BARRIER, int THREADS>
__device__ __forceinline__ void named_barrier_sync() {
  asm volatile("bar.sync %0, %1;\n" ::"n"(BARRIER), "n"(THREADS) : "memory");
}

// The same where the barrier's number is a variable.
template <int THREADS>
__device__ __forceinline__ void named_barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "n"(THREADS) : "memory");
}

}  // namespace hwkern::ptx
