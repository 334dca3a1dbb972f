// INT8 GEMM for Hopper (sm_90a) with few rows of A: D = epilogue(A · Bᵀ), limited by how fast B streams from memory.
//
// Swapped operands: ROWS rows of B are the M side of wgmma and TOKENS rows of A its N side, so that 8 tokens waste
// nothing. The SPLIT blocks of a cluster share one such tile and split K between them; a block's SPLITth of the sums is
// its own to finish. Sums are int32, so their order does not matter: the same bits in every run.
//
//   producer warp   fills a ring of STAGES buffers of 128 bytes of K by TMA. Constant weights are requested before
//                   the preceding kernel has ended (see Overlap in hwkern.h), the activations after.
//   consumers       a warpgroup for every 64 rows. Then each warp lays its sums out by token in shared memory, sends the
//                   other blocks of the cluster their shares with the copy engine, and finishes its own with 16-byte
//                   stores along N.
//
// What bounds it is bytes in flight: 3 TB/s × 1.5 µs of loaded latency are 4.5 MB, 34 KB an SM; the rings hold 64 KB and
// more in each of the BLOCKS_PER_SM blocks of an SM.
#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_K = 32, BLOCK_K = kSm90BlockK;
constexpr int SLAB_ROWS = 16;  // rows of B that one warp of a warpgroup accumulates
constexpr int VECTOR = 8;      // outputs of one token that one thread finishes at a time

template <int ROWS_, int TOKENS_, int SPLIT_, int STAGES_, int BLOCKS_, int HINT_ = 1>
struct Config {
  static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, SPLIT = SPLIT_, STAGES = STAGES_, BLOCKS_PER_SM = BLOCKS_;
  static constexpr bool HINT = HINT_;
  static constexpr int CONSUMERS = ROWS / 64, WARPS = CONSUMERS * 4, CONSUMER_THREADS = WARPS * 32;
  static constexpr int THREADS = CONSUMER_THREADS + 32;
  static constexpr int ACCUMULATORS = TOKENS / 2;  // int32 registers a thread
  static constexpr int BYTES_B = ROWS * BLOCK_K, BYTES_A = TOKENS * BLOCK_K, STAGE_BYTES = BYTES_B + BYTES_A;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;

  // A share: TOKENS / SPLIT tokens of all rows while that is whole groups of 8; else some warps' rows of one group.
  static constexpr int GROUPS = TOKENS / 8;
  static constexpr bool BY_TOKEN = GROUPS >= SPLIT;
  static constexpr int SHARES_PER_GROUP = BY_TOKEN ? 1 : SPLIT / GROUPS;
  static constexpr int SHARE_TOKENS = BY_TOKEN ? TOKENS / SPLIT : 8;
  static constexpr int SHARE_SLABS = WARPS / SHARES_PER_GROUP;
  static constexpr int PIECES = TOKENS / SHARE_TOKENS;  // of a warp's sums: each goes to one block
  static constexpr int PIECE_BYTES = SHARE_TOKENS * SLAB_ROWS * 4;

  static constexpr int STAGING_BYTES = ROWS * TOKENS * 4;  // over the ring, when it is done
  static constexpr int RECEIVE_BYTES = sm90_split_receive_bytes(ROWS, TOKENS, SPLIT);
  static constexpr bool OWN_RECEIVE = sm90_split_own_receive(ROWS, TOKENS, SPLIT);
  static constexpr int RECEIVE = OWN_RECEIVE ? (RING_BYTES > STAGING_BYTES ? RING_BYTES : STAGING_BYTES) : STAGING_BYTES;
  static constexpr int TERMS = sm90_split_data_bytes(ROWS, TOKENS, SPLIT, STAGES);  // offset of the token scales and the column terms
  static constexpr int BARRIERS = TERMS + TOKENS * 4 + ROWS * kColumnTermBytes;
  static constexpr int SHARED_BYTES = sm90_split_shared_bytes(ROWS, TOKENS, SPLIT, STAGES);

  static_assert(ROWS % 64 == 0 && TOKENS % 8 == 0 && TOKENS <= 256);
  static_assert(SHARE_TOKENS % 8 == 0 && SHARES_PER_GROUP <= WARPS && WARPS % SHARES_PER_GROUP == 0);
  static_assert(RECEIVE_BYTES == (SPLIT - 1) * SHARE_SLABS * PIECE_BYTES);
  static_assert(CONSUMER_THREADS % (2 * SHARE_SLABS) == 0, "a thread keeps its columns from token to token");
  static_assert(BLOCKS_PER_SM * (SHARED_BYTES + 1024) <= 233472, "228 KB an SM, 1 KB a block is the system's");
};

// A position in the ring: the buffer, and the parity of the phase that its barriers are in.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

struct Params {
  CUtensorMap weights, tokens;
  Gemm gemm;
};

// Where the sum of (token, row) of a warp's slab lies, in words. The exclusive-or spreads the 32 lanes of a fragment
// store (8 rows of every second token) over all banks; it stays inside two tokens' 128 bytes, and keeps 8 rows together.
__device__ __forceinline__ int slab_word(int token, int row) {
  return (token * SLAB_ROWS + row) ^ ((token >> 1 & 3) * VECTOR);
}

// This thread's part of a block's share: always the same VECTOR columns of D, from `n` on, one token after the other.
// `columns`: their terms.
template <typename C>
__device__ __forceinline__ void store_share(const Gemm& p, const int32_t* own, const int32_t* received,
                                            const float* scale_m, const float2* columns, int64_t m0, int64_t n, int half) {
  const float inverse = inverse_d_scale(p);
#pragma unroll 1
  for (int t = threadIdx.x / (2 * C::SHARE_SLABS); t < C::SHARE_TOKENS; t += C::CONSUMER_THREADS / (2 * C::SHARE_SLABS)) {
    const int64_t m = m0 + t;
    if (m >= p.m) break;
    int32_t sums[VECTOR] = {};
    auto add = [&](const int32_t* slab) {
#pragma unroll
      for (int v = 0; v < VECTOR; v += 4) {
        const int4 part = *reinterpret_cast<const int4*>(slab + slab_word(t, half * VECTOR) + v);
        sums[v] += part.x, sums[v + 1] += part.y, sums[v + 2] += part.z, sums[v + 3] += part.w;
      }
    };
    add(own);
#pragma unroll
    for (int s = 0; s < C::SPLIT - 1; ++s) add(received + s * C::SHARE_SLABS * C::PIECE_BYTES / 4);
    if (p.d_dtype == DType::kInt32) {
      const bool aligned = p.ldd % 4 == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0;
      store_row(static_cast<int32_t*>(p.d) + m * p.ldd, n, p.n, aligned, sums, [](int32_t v) { return v; });
    } else {
      float y[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) y[v] = scaled(sums[v], scale_m[t], columns[v]);
      finish_row(p, y, m, n, inverse);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) gemm_sm90_split(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8;
  const uint32_t received = empty + C::STAGES * 8;  // the other blocks' sums of this block's share
  const uint32_t ready = received + 8;              // every block of the cluster is done with its ring
  const int warp_id = threadIdx.x / 32, lane_id = threadIdx.x % 32;
  const bool is_producer = warp_id == C::WARPS;

  const int rank = C::SPLIT > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int tile = blockIdx.x / C::SPLIT;
  const int tiles_m = static_cast<int>((p.m + C::TOKENS - 1) / C::TOKENS);
  const int token0 = tile % tiles_m * C::TOKENS, row0 = tile / tiles_m * C::ROWS;
  const int k_tiles = static_cast<int>((p.k + BLOCK_K - 1) / BLOCK_K);
  const int k_first = k_tiles * rank / C::SPLIT, k_count = k_tiles * (rank + 1) / C::SPLIT - k_first;

  auto load_weights = [&](int i, int stage) {
    const uint32_t barrier = full + stage * 8, smem = base + stage * C::STAGE_BYTES;
    ptx::mbarrier_arrive_expect(barrier, C::STAGE_BYTES);
    if (C::HINT && tiles_m == 1) {
      ptx::tma_load_once(smem, &params.weights, barrier, (k_first + i) * BLOCK_K, row0);
    } else {
      ptx::tma_load(smem, &params.weights, barrier, (k_first + i) * BLOCK_K, row0);
    }
  };
  auto load_tokens = [&](int i, int stage) {
    ptx::tma_load(base + stage * C::STAGE_BYTES + C::BYTES_B, &params.tokens, full + stage * 8, (k_first + i) * BLOCK_K,
                  token0);
  };

  int requested = 0;  // weights of the first buffers
  if (is_producer && lane_id == 0) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, C::CONSUMERS);
    }
    ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(ready, C::SPLIT);
    ptx::mbarrier_init_fence();
    if (p.b_is_constant)
      for (; requested < min(C::STAGES, k_count); ++requested) load_weights(requested, requested);
    if (C::SPLIT > 1) ptx::mbarrier_arrive_expect(received, C::RECEIVE_BYTES);
  }
  __syncthreads();
  if (C::SPLIT > 1) ptx::cluster_arrive_relaxed();  // this block's barriers can be used by the others

  if (is_producer) {
    if (lane_id == 0) {
      ptx::grid_wait();
      ptx::grid_release();
      RingPosition<C::STAGES> at;
      for (int i = 0; i < k_count; ++i, at.advance()) {
        ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
        if (i >= requested) load_weights(i, at.stage);
        load_tokens(i, at.stage);
      }
    }
    __syncwarp();
    if (C::SPLIT > 1) {
      ptx::cluster_wait();
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    }
    return;
  }

  // A thread's columns of D, in this block's share.
  const int part = threadIdx.x % (2 * C::SHARE_SLABS), slab = part / 2, half = part % 2;
  const int slab0 = rank % C::SHARES_PER_GROUP * C::SHARE_SLABS;
  const int first_token = rank / C::SHARES_PER_GROUP * C::SHARE_TOKENS;
  const int column = (slab0 + slab) * SLAB_ROWS + half * VECTOR;
  float* scale_m = reinterpret_cast<float*>(shared + C::TERMS);
  float2* columns = reinterpret_cast<float2*>(shared + C::TERMS + C::TOKENS * 4);
  if (!p.b_is_constant) ptx::grid_wait();
  if (threadIdx.x < C::ROWS) columns[threadIdx.x] = column_terms(p, row0 + threadIdx.x);
  if (p.b_is_constant) ptx::grid_wait();
  for (int t = threadIdx.x; t < C::TOKENS; t += C::CONSUMER_THREADS) scale_m[t] = row_scale(p, token0 + t);

  // NOTE: not zeroed here for a block that gets nothing of a short K: ptxas then serialises the wgmmas (C7515).
  int32_t acc[C::ACCUMULATORS];
  // Invariant: on entry to step i the wgmmas of step i - 1 may still run; its buffer is not yet released.
  RingPosition<C::STAGES> at;
  int previous = 0;
#pragma unroll 1
  for (int i = 0; i < k_count; ++i) {
    ptx::mbarrier_wait(full + at.stage * 8, at.parity);
    const uint32_t buffer = base + at.stage * C::STAGE_BYTES;
    const uint64_t a = ptx::wgmma_descriptor(buffer + warp_id / 4 * 64 * BLOCK_K);
    const uint64_t b = ptx::wgmma_descriptor(buffer + C::BYTES_B);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < BLOCK_K / MMA_K; ++step)
      ptx::wgmma_m64k32_s8(acc, a + step * MMA_K / 16, b + step * MMA_K / 16, i > 0 || step > 0);
    ptx::wgmma_commit();
    if (i > 0) {
      ptx::wgmma_wait<1>();
      if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + previous * 8);
    }
    previous = at.stage;
    at.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // the ring is free

  // D's fragment of a warp: lane (group, pair) holds rows group, group + 8 of tokens pair, pair + 1 of every 8.
  int32_t* staging = reinterpret_cast<int32_t*>(shared);
  int32_t* own_slab = staging + warp_id * C::TOKENS * SLAB_ROWS;
  const int group = lane_id / 4, pair = lane_id % 4 * 2;
#pragma unroll
  for (int j = 0; j < C::GROUPS; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      own_slab[j * 8 * SLAB_ROWS + slab_word(pair + e % 2, group + e / 2 * 8)] = k_count > 0 ? acc[j * 4 + e] : 0;

  if (C::SPLIT > 1) {
    ptx::cluster_wait();  // the others have started
    if (!C::OWN_RECEIVE) {
      if (threadIdx.x < C::SPLIT) ptx::mbarrier_arrive_cluster(ready, threadIdx.x);
      ptx::mbarrier_wait(ready, 0);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    // Piece i of this warp's sums goes to one block, which keeps a slot for each of the others.
    const int to = lane_id * C::SHARES_PER_GROUP + warp_id / C::SHARE_SLABS;
    if (lane_id < C::PIECES && to != rank) {
      const int slot = rank < to ? rank : rank - 1;
      const uint32_t target = base + C::RECEIVE + (slot * C::SHARE_SLABS + warp_id % C::SHARE_SLABS) * C::PIECE_BYTES;
      ptx::bulk_copy_to_block(ptx::cluster_address(target, to), ptx::shared_address(own_slab) + lane_id * C::PIECE_BYTES,
                              C::PIECE_BYTES, ptx::cluster_address(received, to));
    }
  }
  ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // this block's own sums lie there
  if (C::SPLIT > 1) {
    __syncwarp();
    ptx::mbarrier_wait(received, 0);
    __syncwarp();
    ptx::cluster_arrive_relaxed();  // the others' copies have been read
  }

  store_share<C>(p, staging + ((slab0 + slab) * C::TOKENS + first_token) * SLAB_ROWS,
                 reinterpret_cast<const int32_t*>(shared + C::RECEIVE) + slab * C::PIECE_BYTES / 4, scale_m + first_token,
                 columns + column, token0 + first_token, row0 + column, half);
  // The copies that the others read lie in this block's memory: it stays until all have arrived there.
  if (C::SPLIT > 1) {
    __syncwarp();
    ptx::cluster_wait();
  }
#endif
}

template <typename C>
Status launch_config(const Gemm& p, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Params params;
  params.gemm = p;
  if (!make_map(&params.weights, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.n, p.k, p.ldb, C::ROWS, BLOCK_K) ||
      !make_map(&params.tokens, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.a, p.m, p.k, p.lda, C::TOKENS, BLOCK_K))
    return kTensorMapRefused;
  const int64_t blocks = ceil_div(p.m, C::TOKENS) * ceil_div(p.n, C::ROWS) * C::SPLIT;
  if (blocks > INT32_MAX) return invalid("gemm: M x N is too large for one launch");
  return launch<gemm_sm90_split<C>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(C::THREADS), C::SHARED_BYTES, C::SPLIT, /*overlap=*/true}, stream,
      params);
}

}  // namespace

Status launch_gemm_sm90_split(const Gemm& problem, int config_id, Stream stream) {
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, stream);
    HWKERN_SM90_SPLIT_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("gemm: this id is not one of the sm90 split-K kernels");
  }
}

}  // namespace hwkern
