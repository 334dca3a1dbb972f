// INT8 GEMM for Hopper (sm_90a): D = epilogue(A · Bᵀ) with TMA and wgmma (see hwkern.h for shapes and rounding).
//
// Persistent blocks, one an SM, of three warpgroups. Of the first, one thread is the producer, which has the copy engine
// fill a ring of STAGES shared-memory buffers, BLOCK_K bytes deep, and one warp brings the column terms of the next
// epilogue. The other two multiply and write D, in one of two ways:
//
//   cooperative   both work on one tile, 64 rows each; nothing multiplies while they turn their sums into D, so that is
//                 short: 16-bit results go to shared memory alone, half of them over the buffer of the ring that was read
//                 last, and the copy engine stores them under the next main loop. Large tiles: the fewest bytes, and so
//                 the least energy, an operation.
//   ping-pong     each has a tile of its own and multiplies while the other writes its tile. The accumulators of a tile
//                 are one warpgroup's, so it has at most 128 × 192. The last tiles of a block may have 128 columns, so
//                 that all blocks end at about the same time (sm90_columns).
//
// Loads are what large problems wait for: 132 blocks with 128 × 192 tiles ask L2 for 53 bytes a cycle each at the peak
// rate, more than it has. So those run in clusters of two, side by side along M, and each brings half of B for both: 37.
//
// Per k32 step a cooperative consumer's wgmma reads (64 + BLOCK_N)·32 bytes of shared memory for 2·64·BLOCK_N·32
// operations: 80 bytes a cycle at the peak rate for BLOCK_N = 256, of the 128 that there are.
#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue_sm90.cuh"
#include "gemm/ring.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/elect.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32;
constexpr int CONSUMERS = kSm90Consumers, THREADS = (CONSUMERS + 1) * 128;
constexpr int64_t kStreamedBytes = 32 << 20;  // of D: the L2 of an H100 has 50 MB
constexpr int64_t kKeptBytes = 20 << 20, kPassingBytes = 50 << 20;  // A stays in L2, B does not

template <int BLOCK_N_, int STAGES_, bool PINGPONG_, int OWN_BOXES_, int CLUSTER_, int NARROW_>
struct Config {
  static constexpr int BLOCK_M = kSm90BlockM, BLOCK_N = BLOCK_N_, BLOCK_K = kSm90BlockK, STAGES = STAGES_;
  static constexpr int NARROW = NARROW_;  // columns of the last tiles: BLOCK_N, or fewer (sm90_columns)
  static constexpr bool PINGPONG = PINGPONG_;
  static constexpr int CLUSTER = CLUSTER_;  // blocks that work side by side along M and bring a part of B each for all
  static constexpr int SHARERS = PINGPONG ? 1 : CONSUMERS;  // consumers of one buffer, and of one tile
  static constexpr int MMAS_M = BLOCK_M / MMA_M / SHARERS;  // of one consumer's part of a tile
  static constexpr int ACCUMULATORS = BLOCK_N / 2;  // int32 registers a thread for each: 64 · BLOCK_N / 128
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, BYTES_B = BLOCK_N * BLOCK_K, STAGE_BYTES = BYTES_A + BYTES_B;

  // A consumer's part of D as 16-bit numbers is BOXES of 64 × 64. When consumers share a tile, the copy engine stores
  // them: OWN_BOXES have shared memory of their own, the others borrow the buffer of the ring that was read last. In
  // ping-pong the same memory stages the rows of each warp.
  static constexpr int BOXES = MMAS_M * BLOCK_N / 64, OWN_BOXES = OWN_BOXES_;
  static constexpr int BORROWED = PINGPONG ? 0 : BOXES - OWN_BOXES;

  // Shared memory: the ring, the boxes, the terms of one or two tiles, the barriers.
  static constexpr int STAGING = STAGES * STAGE_BYTES, TERMS = STAGING + CONSUMERS * OWN_BOXES * kSm90BoxBytes;
  static constexpr int TERM_BUFFERS = PINGPONG ? 2 : 1, TERM_BYTES = sm90_term_bytes(BLOCK_N);
  static constexpr int BARRIERS = TERMS + TERM_BUFFERS * TERM_BYTES;
  static constexpr int SHARED_BYTES = sm90_shared_bytes(BLOCK_N, STAGES, PINGPONG, OWN_BOXES);

  static_assert(SHARED_BYTES <= 232448, "227 KB of shared memory a block");
  static_assert(BARRIERS + 16 * STAGES + 48 <= SHARED_BYTES);
  static_assert(MMAS_M * ACCUMULATORS <= 192, "more accumulators do not fit beside the epilogue's registers");
  static_assert(STAGE_BYTES % 1024 == 0, "the swizzle wants tiles at multiples of 1024 bytes");
  static_assert(PINGPONG || MMAS_M == 1);
  static_assert(BORROWED >= 0 && CONSUMERS * BORROWED * kSm90BoxBytes <= STAGE_BYTES);
  static_assert(NARROW <= BLOCK_N && (NARROW == BLOCK_N || PINGPONG));
};

// The tiles of one block, in order: block, block + blocks, … In clusters all of this counts clusters: a tile of a cluster
// has its blocks' tiles one below the other. First come all tiles of BLOCK_N columns, then those of NARROW.
template <typename C>
struct TileOrder {
  int tiles_m, wide, narrow;  // rows of tiles; columns of tiles of either kind
  int group_rows;  // rows of tiles that walk along N side by side, so that a wave of tiles is about square

  __device__ int count() const { return tiles_m * (wide + narrow); }
  __device__ bool is_wide(int tile) const { return C::NARROW == C::BLOCK_N || tile < tiles_m * wide; }
  __device__ void locate(int tile, int* tile_m, int* n0) const {
    const bool in_wide = is_wide(tile);
    const int tiles_n = in_wide ? wide : narrow;
    if (!in_wide) tile -= tiles_m * wide;
    const int group = tile / (group_rows * tiles_n), in_group = tile % (group_rows * tiles_n);
    const int rows = min(tiles_m - group * group_rows, group_rows);
    *tile_m = group * group_rows + in_group % rows;
    *n0 = in_wide ? in_group / rows * C::BLOCK_N : wide * C::BLOCK_N + in_group / rows * C::NARROW;
  }
};

// What an epilogue needs of its tile, in shared memory.
template <typename C>
struct Terms {
  float2 columns[C::BLOCK_N];
  int m0, n0, columns_of_tile, unused;
};

template <typename C>
__global__ void __launch_bounds__(THREADS, 1) gemm_sm90(const __grid_constant__ Sm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  // Arrays of barriers: a buffer of the ring is full, is empty; a tile's terms are there, are read; a consumer's turn.
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8, terms_full = empty + C::STAGES * 8,
                 terms_empty = terms_full + 16, turn = terms_empty + 16;
  auto* all_terms = reinterpret_cast<Terms<C>*>(shared + C::TERMS);
  static_assert(sizeof(Terms<C>) == C::TERM_BYTES);

  // From a shuffle, so that the compiler knows it to be the same in all lanes: addresses stay in uniform registers.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int rank = C::CLUSTER > 1 ? static_cast<int>(blockIdx.x % C::CLUSTER) : 0;
  constexpr int CLUSTER_M = C::CLUSTER * C::BLOCK_M;
  const TileOrder<C> order{static_cast<int>((p.m + CLUSTER_M - 1) / CLUSTER_M), params.columns.wide,
                           params.columns.narrow, params.group_rows};
  const int first_tile = blockIdx.x / C::CLUSTER, tile_step = gridDim.x / C::CLUSTER, tiles = order.count();
  const int k_tiles = static_cast<int>((p.k + C::BLOCK_K - 1) / C::BLOCK_K);

  if (threadIdx.x == 0) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, C::SHARERS * C::CLUSTER);  // B goes into all blocks' buffers
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(terms_full + i * 8, 32);
      ptx::mbarrier_init(terms_empty + i * 8, C::SHARERS * 128);
      ptx::mbarrier_init(turn + i * 8, 1);
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.a.whole);
    ptx::tma_prefetch_map(&params.b.whole);
  }
  __syncthreads();
  if (C::CLUSTER > 1) ptx::cluster_arrive_relaxed(), ptx::cluster_wait();
  ptx::grid_wait();
  ptx::grid_release();

  RingPosition<C::STAGES> at;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<40>();
    const int warp_id = __shfl_sync(~0u, threadIdx.x / 32, 0), lane_id = threadIdx.x % 32;
    if (warp_id == 0 && ptx::elect_one()) {
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        int tile_m, n0;
        order.locate(tile, &tile_m, &n0);
        const bool is_wide = order.is_wide(tile);
        // This block's rows of A, and its part of B's, which all blocks of the cluster get. What there is of a box: all,
        // the matrix's last rows, or nothing.
        const int columns = is_wide ? C::BLOCK_N : C::NARROW, part = columns / C::CLUSTER;
        const Boxes& boxes_b = is_wide ? params.b : params.b_narrow;
        const int row_a = tile_m * CLUSTER_M + rank * C::BLOCK_M, row_b = n0 + rank * part;
        const int64_t rows_a = p.m - row_a, rows_b = p.n - row_b, rows_all_b = p.n - n0;
        const CUtensorMap *a = rows_a >= C::BLOCK_M ? &params.a.whole : &params.a.last,
                          *b = rows_b >= part ? &boxes_b.whole : &boxes_b.last;
        const uint32_t part_b = C::BYTES_A + rank * part * C::BLOCK_K;
        const int bytes =
            static_cast<int>(max(min(rows_a, int64_t{C::BLOCK_M}), int64_t{0}) + min(rows_all_b, int64_t{columns})) *
            C::BLOCK_K;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.advance()) {
          ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
          const uint32_t barrier = full + at.stage * 8, smem_a = base + at.stage * C::STAGE_BYTES;
          ptx::mbarrier_arrive_expect(barrier, bytes);
          if (C::CLUSTER == 1) {
            ptx::tma_load(smem_a, a, barrier, k_tile * C::BLOCK_K, row_a);
            ptx::tma_load(smem_a + part_b, b, barrier, k_tile * C::BLOCK_K, row_b);
          } else {
            if (rows_a > 0) ptx::tma_load(smem_a, a, barrier, k_tile * C::BLOCK_K, row_a);
            if (rows_b > 0)
              ptx::tma_load_multicast(smem_a + part_b, b, barrier, k_tile * C::BLOCK_K, row_b, (1 << C::CLUSTER) - 1);
          }
        }
      }
    } else if (warp_id == 1) {
      int buffer = 0;
      uint32_t parity = 0;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        int tile_m, n0;
        order.locate(tile, &tile_m, &n0);
        float2 columns[C::BLOCK_N / 32];
#pragma unroll
        for (int i = 0; i < C::BLOCK_N / 32; ++i) columns[i] = column_terms(p, n0 + i * 32 + lane_id);
        ptx::mbarrier_wait(terms_empty + buffer * 8, parity ^ 1);
        Terms<C>& terms = all_terms[buffer];
#pragma unroll
        for (int i = 0; i < C::BLOCK_N / 32; ++i) terms.columns[i * 32 + lane_id] = columns[i];
        if (lane_id == 0) {
          terms.m0 = tile_m * CLUSTER_M + rank * C::BLOCK_M, terms.n0 = n0;
          terms.columns_of_tile = order.is_wide(tile) ? C::BLOCK_N : C::NARROW;
        }
        ptx::mbarrier_arrive(terms_full + buffer * 8);
        if (++buffer == C::TERM_BUFFERS) buffer = 0, parity ^= 1;
      }
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = warpgroup - 1, buffer = C::PINGPONG ? consumer : 0;
    const bool leader = threadIdx.x % 128 == 0;
    uint8_t* own = shared + C::STAGING + consumer * C::OWN_BOXES * kSm90BoxBytes;
    const Terms<C>& terms = all_terms[buffer];
    auto release = [&](int stage) {
      if constexpr (C::CLUSTER == 1) {
        ptx::mbarrier_arrive(empty + stage * 8);
      } else {
#pragma unroll
        for (int block = 0; block < C::CLUSTER; ++block) ptx::mbarrier_arrive_cluster(empty + stage * 8, block);
      }
    };
    int previous = -1;  // the buffer of the step before
    int tile = first_tile + (C::PINGPONG ? consumer * tile_step : 0);
    if (C::PINGPONG && consumer == 1) at.skip(k_tiles);
    for (uint32_t parity = 0; tile < tiles; tile += tile_step * (C::PINGPONG ? 2 : 1), parity ^= 1) {
      // NOTE: a wait on a buffer only tells odd fills from even ones, so the consumer whose tile is the next must not
      // look before the other one has seen all of its own.
      if (C::PINGPONG) ptx::mbarrier_wait(turn + consumer * 8, parity ^ (consumer == 0));
      int32_t acc[C::MMAS_M][C::ACCUMULATORS];
      // Invariant: on entry to step k_tile the wgmmas of step k_tile - 1 may still run; its buffer is not yet released.
      auto multiply = [&](auto columns) {
        constexpr int ACCUMULATORS = decltype(columns)::value / 2;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
          ptx::mbarrier_wait(full + at.stage * 8, at.parity);
          const uint32_t smem_a = base + at.stage * C::STAGE_BYTES + (C::PINGPONG ? 0 : consumer * MMA_M * C::BLOCK_K);
          const uint64_t a = ptx::wgmma_descriptor(smem_a);
          const uint64_t b = ptx::wgmma_descriptor(base + at.stage * C::STAGE_BYTES + C::BYTES_A);
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < C::BLOCK_K / MMA_K; ++step)
#pragma unroll
            for (int i = 0; i < C::MMAS_M; ++i)
              ptx::wgmma_m64k32_s8(reinterpret_cast<int32_t (&)[ACCUMULATORS]>(acc[i]),
                                   a + (i * MMA_M * C::BLOCK_K + step * MMA_K) / 16, b + step * MMA_K / 16,
                                   k_tile > 0 || step > 0);
          ptx::wgmma_commit();
          if (k_tile > 0) {
            ptx::wgmma_wait<1>();
            if (leader) release(previous);
          } else if (!C::PINGPONG) {  // the boxes of the tile before have left: their memory is free again
            if (leader) ptx::bulk_wait_read<0>();
            if (C::BORROWED > 0 && leader && previous >= 0) release(previous);
            ptx::named_barrier_sync<128>(2 + consumer);
          }
          previous = at.stage;
          at.advance();
        }
      };
      if (C::NARROW < C::BLOCK_N && !order.is_wide(tile)) {
        multiply(std::integral_constant<int, C::NARROW>{});
      } else {
        multiply(std::integral_constant<int, C::BLOCK_N>{});
      }
      if (C::PINGPONG && leader) ptx::mbarrier_arrive(turn + (consumer ^ 1) * 8);

      uint32_t thread = threadIdx.x % 128;
      ptx::opaque(thread);  // nothing that the epilogue derives from it takes registers in the main loop
      const int warp_id = thread / 32, lane_id = thread % 32;
      // What the epilogue reads first, while the last wgmmas run.
      ptx::mbarrier_wait(terms_full + buffer * 8, parity);
      float scale_n[C::BLOCK_N / 4];  // of the lane's columns
      if (!C::PINGPONG) {
#pragma unroll
        for (int j = 0; j < C::BLOCK_N / 8; ++j) {
          const float4 two = *reinterpret_cast<const float4*>(&terms.columns[j * 8 + lane_id % 4 * 2]);
          scale_n[j * 2] = two.x, scale_n[j * 2 + 1] = two.z;
        }
      }
      Part parts[C::MMAS_M];
#pragma unroll
      for (int i = 0; i < C::MMAS_M; ++i) {
        const int m0 = terms.m0 + (C::PINGPONG ? i : consumer) * MMA_M + warp_id * 16;
        parts[i] = {
            m0, terms.n0, terms.columns_of_tile, {row_scale(p, m0 + lane_id / 4), row_scale(p, m0 + lane_id / 4 + 8)}};
      }
      ptx::wgmma_wait<0>();
      if (C::BORROWED == 0 && leader) release(previous);
      store<C>(params, acc, parts, scale_n, terms.columns, own, thread,
               base + previous * C::STAGE_BYTES + consumer * C::BORROWED * kSm90BoxBytes, consumer);
      __syncwarp();
      ptx::mbarrier_arrive(terms_empty + buffer * 8);  // every thread: racecheck does not see what __syncwarp orders
      if (C::PINGPONG) at.skip(k_tiles);  // the other consumer's tile
    }
    if (!C::PINGPONG && leader) ptx::bulk_wait_read<0>();  // shared memory lives as long as the block
  }
  __syncwarp();
  if (C::CLUSTER > 1) ptx::cluster_arrive_relaxed(), ptx::cluster_wait();  // the others' copies and arrivals reach here
#endif
}

template <typename C>
Status launch_config(const Gemm& p, int sm_count, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Sm90Params params;
  params.gemm = p;
  const int64_t element = size_of(p.d_dtype);
  params.chunks = p.n % 8 == 0 && p.ldd * element % 16 == 0 && is_aligned(p.d, 16);
  params.streams = p.m * p.n * element > kStreamedBytes;
  if (!make_boxes(&params.a, p.a, p.m, p.k, p.lda, C::BLOCK_M) ||
      !make_boxes(&params.b, p.b, p.n, p.k, p.ldb, C::BLOCK_N / C::CLUSTER))
    return kTensorMapRefused;
  if (!C::PINGPONG && params.chunks && element == 2 &&
      !make_map(&params.d, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, p.d, p.m, p.n, p.ldd, MMA_M, 128))
    return kTensorMapRefused;
  constexpr int CLUSTER_M = C::CLUSTER * C::BLOCK_M;
  const int64_t tiles_m = ceil_div(p.m, CLUSTER_M), clusters = sm_count / C::CLUSTER;
  params.columns = sm90_columns(tiles_m, p.n, clusters, C::BLOCK_N, C::NARROW);
  // NOTE: narrow tiles begin where the wide ones end, which need not be at a multiple of NARROW: so does what their last
  // box has. A box of another height than the producer expects, and the consumers wait for ever.
  if (params.columns.narrow > 0 && !make_boxes(&params.b_narrow, p.b, p.n, p.k, p.ldb, C::NARROW / C::CLUSTER,
                                               int64_t{params.columns.wide} * C::BLOCK_N))
    return kTensorMapRefused;
  const int64_t tiles = tiles_m * (params.columns.wide + params.columns.narrow);
  if (tiles > INT32_MAX / 2 || p.m > INT32_MAX - CLUSTER_M || p.n > INT32_MAX - C::BLOCK_N)
    return invalid("gemm: M x N is too large for one launch");
  int64_t rows = 1;
  while ((rows + 1) * (rows + 1) * CLUSTER_M <= clusters * C::BLOCK_N) ++rows;
  // Side by side, all rows of tiles take B from memory once: 2048×28672×4096 126 MB, not 240 in two groups; 0.5 % of time.
  if (p.m * p.k <= kKeptBytes && p.n * p.k > kPassingBytes) rows = tiles_m;
  params.group_rows = static_cast<int>(ceil_div(tiles_m, ceil_div(tiles_m, rows)));
  const unsigned blocks = static_cast<unsigned>((tiles < clusters ? tiles : clusters) * C::CLUSTER);
  return launch<gemm_sm90<C>>({dim3(blocks), dim3(THREADS), C::SHARED_BYTES, C::CLUSTER, p.overlap}, stream, params);
}

}  // namespace

Status launch_gemm_sm90(const Gemm& problem, int config_id, int sm_count, Stream stream) {
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, sm_count, stream);
    HWKERN_SM90_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("gemm: this id is not one of the sm90 kernels");
  }
}

}  // namespace hwkern
