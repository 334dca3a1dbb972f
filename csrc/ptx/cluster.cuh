// Thread-block clusters (sm_90 and newer).
#pragma once

#include <cstdint>

namespace hwkern::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// The address in block `rank` of what lies at `smem` in this block.
__device__ __forceinline__ uint32_t cluster_address(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

// All threads of all blocks of the cluster wait for each other, in two halves: each thread arrives and waits in turn.
// Without a fence of ordinary memory (a MEMBAR.GPU): for hand-overs that carry no data or whose data an mbarrier orders.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;\n" ::: "memory"); }

// 16 bytes into the shared memory of another block; they count on that block's mbarrier. Addresses are cluster_address'es
// in the same block.
__device__ __forceinline__ void store_to_block(uint32_t remote, uint32_t remote_barrier, float4 v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(remote),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(remote_barrier)
      : "memory");
}
__device__ __forceinline__ void store_to_block(uint32_t remote, uint32_t remote_barrier, int4 v) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(remote),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(remote_barrier)
      : "memory");
}

}  // namespace hwkern::ptx
