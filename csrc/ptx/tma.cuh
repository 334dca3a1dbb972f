// TMA: tiles of a row-major matrix between global and shared memory, described by a tensor map (sm_90 and newer).
#pragma once

#include <cstdint>

namespace hwkern::ptx {

__device__ __forceinline__ void tma_prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// The tile at (row, column) into `smem`; its bytes count on `barrier`. What lies outside the matrix arrives as zeros.
__device__ __forceinline__ void tma_load(uint32_t smem, const void* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// tma_load into every block of the cluster named in `blocks` (a bit each), at the same offsets of tile and barrier.
__device__ __forceinline__ void tma_load_multicast(uint32_t smem, const void* map, uint32_t barrier, int column,
                                                   int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// tma_load, marked as the first to leave L2: for what is read once.
__device__ __forceinline__ void tma_load_once(uint32_t smem, const void* map, uint32_t barrier, int column, int row) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], policy;\n}\n" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The tile in `smem` to (row, column); what lies outside the matrix is not written. One thread; part of its bulk group.
__device__ __forceinline__ void tma_store(const void* map, uint32_t smem, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map), "r"(smem),
               "r"(column), "r"(row)
               : "memory");
}

// tma_store, marked as the first to leave L2: for what nobody reads soon.
__device__ __forceinline__ void tma_store_once(const void* map, uint32_t smem, int column, int row) {
  asm volatile(
      "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], policy;\n}\n" ::"l"(
          map),
      "r"(smem), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Waits until at most PENDING of this thread's bulk groups still have to read their shared memory.
template <int PENDING>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(PENDING) : "memory");
}

// Shared memory of this block into `remote`, an address of another block of the cluster; its bytes count on the barrier at
// `remote_barrier` there. Addresses and `bytes` are multiples of 16. The source must stay until that barrier completes.
__device__ __forceinline__ void bulk_copy_to_block(uint32_t remote, uint32_t smem, uint32_t bytes,
                                                   uint32_t remote_barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(remote),
      "r"(smem), "r"(bytes), "r"(remote_barrier)
      : "memory");
}

// Makes this thread's ordinary writes to shared memory visible to the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

}  // namespace hwkern::ptx
