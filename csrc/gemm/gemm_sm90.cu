// INT8 GEMM for Hopper (sm_90a): D = epilogue(A · Bᵀ) with TMA and wgmma (see hwkern.h for shapes and rounding).
//
// Persistent blocks of three warpgroups: one thread of the first is the producer, which has the copy engine fill a ring
// of STAGES shared-memory buffers, BLOCK_K bytes deep; the other two multiply, 64 rows of the tile each, and write their
// part of D. Blocks run in clusters of CLUSTER along M: they share the tile of B, of which each loads its part and
// multicasts it to the others, so that L2 serves B once a cluster. The producer runs ahead into the next tile while the
// consumers are in their epilogue, and the two consumers drift apart by up to STAGES buffers, so that one multiplies
// while the other stores.
//
// Per k32 step a consumer's wgmma reads (64 + BLOCK_N)·32 bytes of shared memory for 2·64·BLOCK_N·32 operations:
// 80 bytes a cycle at the peak rate for BLOCK_N = 256, of the 128 that there are.
#include <cuda.h>

#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32;
constexpr int GROUP_TILES_M = 4;  // cluster tiles that walk along N side by side, so that B tiles are reused from L2

template <int BLOCK_N_, int CLUSTER_, int STAGES_>
struct Config {
  static constexpr int BLOCK_M = kSm90BlockM, BLOCK_N = BLOCK_N_, BLOCK_K = kSm90BlockK, CLUSTER = CLUSTER_,
                       STAGES = STAGES_;
  static constexpr int CONSUMERS = BLOCK_M / MMA_M, THREADS = (CONSUMERS + 1) * 128;
  static constexpr int ACCUMULATORS = BLOCK_N / 2;  // int32 registers a thread: 64 · BLOCK_N / 128
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, BYTES_B = BLOCK_N * BLOCK_K, STAGE_BYTES = BYTES_A + BYTES_B;
  static constexpr int ROWS_B = BLOCK_N / CLUSTER;  // rows of B that one block loads for the whole cluster

  static constexpr int RING_BYTES = STAGES * STAGE_BYTES, STAGING_BYTES = 2 * kSm90PieceBytes;  // of one warp
  static constexpr int COLUMN_BYTES = kColumnTermBytes * BLOCK_N;
  static constexpr int SHARED_BYTES = sm90_shared_bytes(BLOCK_N, STAGES);

  static_assert(SHARED_BYTES <= 232448, "227 KB of shared memory a block");
  static_assert(STAGING_BYTES >= EpilogueSlab<float, 16>::BYTES && STAGING_BYTES >= EpilogueSlab<__half, 32>::BYTES);
  static_assert(CONSUMERS == 2 && STAGE_BYTES % 1024 == 0, "the swizzle wants tiles at multiples of 1024 bytes");
  static_assert(ROWS_B <= 256 && ROWS_B % 8 == 0, "a TMA box has at most 256 rows; the swizzle's atoms have 8");
};

struct Params {
  CUtensorMap a, b, d;
  Gemm gemm;
  bool store_by_tma;  // D's rows are whole 16-byte chunks, so that `d` describes it
};

// The tiles of one cluster, in order: cluster_id, cluster_id + clusters, …
struct TileOrder {
  int tiles_m, tiles_n;  // in cluster tiles: CLUSTER · BLOCK_M rows, BLOCK_N columns

  __device__ int count() const { return tiles_m * tiles_n; }
  __device__ void locate(int tile, int* tile_m, int* tile_n) const {
    const int group = tile / (GROUP_TILES_M * tiles_n), in_group = tile % (GROUP_TILES_M * tiles_n);
    const int rows = min(tiles_m - group * GROUP_TILES_M, GROUP_TILES_M);
    *tile_m = group * GROUP_TILES_M + in_group % rows;
    *tile_n = in_group / rows;
  }
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

// A warp's 16 rows of D, in pieces of 64 bytes a row. `scale_m`: of the lane's rows group and group + 8.
template <typename T, int COLUMNS>
__device__ __forceinline__ void store_accumulators(const Params& params, const int32_t (&acc)[COLUMNS / 2],
                                                   const float (&scale_m)[2], int64_t m0, int64_t n0,
                                                   const float2* columns, uint8_t* staging) {
  constexpr int PIECE = 64 / sizeof(T);
  if (!params.store_by_tma) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c += PIECE)
      store_tile<T, 1, PIECE / 8>(params.gemm, reinterpret_cast<const int32_t (&)[1][PIECE / 8][4]>(acc[c / 2]), m0,
                                  n0 + c, columns + c, staging);
    return;
  }
  const int lane_id = threadIdx.x % 32, group = lane_id / 4, pair = lane_id % 4 * 2;
  // The copy engine reads the piece with the 64-byte swizzle: 16-byte chunk c of row r lies at chunk c ^ (r / 2 % 4). A
  // store instruction's 8 rows then touch all 32 banks.
  constexpr int CHUNK = 16 / sizeof(T);
#pragma unroll
  for (int c = 0; c < COLUMNS; c += PIECE) {
    uint8_t* piece = staging + c / PIECE % 2 * kSm90PieceBytes;
    if (lane_id == 0) ptx::bulk_wait_read<1>();  // the store of two pieces ago has left this half
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PIECE / 8; ++j) {
      const float4 terms = *reinterpret_cast<const float4*>(&columns[c + j * 8 + pair]);  // of two columns
      const int column = j * 8 + pair,
                offset = ((column / CHUNK) ^ (group / 2 % 4)) * 16 + column % CHUNK * int(sizeof(T));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t (&sums)[4] = reinterpret_cast<const int32_t (&)[4]>(acc[(c / 8 + j) * 4]);
        finish<T>(reinterpret_cast<T*>(piece + (group + half * 8) * 64 + offset), sums[half * 2], sums[half * 2 + 1],
                  scale_m[half], {terms.x, terms.y}, {terms.z, terms.w});
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_id == 0) {
      ptx::tma_store(&params.d, ptx::shared_address(piece), static_cast<int>(n0 + c), static_cast<int>(m0));
      ptx::bulk_commit();
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::THREADS, 1) gemm_sm90(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + C::RING_BYTES + C::CONSUMERS * (4 * C::STAGING_BYTES + C::COLUMN_BYTES);
  const uint32_t empty = full + C::STAGES * 8;

  const int warpgroup = threadIdx.x / 128, warp_id = threadIdx.x / 32 % 4;
  const uint32_t rank = C::CLUSTER > 1 ? ptx::cluster_rank() : 0;
  const TileOrder order{static_cast<int>((p.m + C::CLUSTER * C::BLOCK_M - 1) / (C::CLUSTER * C::BLOCK_M)),
                        static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N)};
  const int first_tile = blockIdx.x / C::CLUSTER, tile_step = gridDim.x / C::CLUSTER;
  const int k_tiles = static_cast<int>((p.k + C::BLOCK_K - 1) / C::BLOCK_K);

  if (threadIdx.x == 0) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // this block's producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, C::CONSUMERS * C::CLUSTER);  // every consumer of every block that is written to
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.a);
    ptx::tma_prefetch_map(&params.b);
  }
  if constexpr (C::CLUSTER > 1) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  ptx::grid_wait();
  ptx::grid_release();

  RingPosition<C::STAGES> at;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) {
      for (int tile = first_tile; tile < order.count(); tile += tile_step) {
        int tile_m, tile_n;
        order.locate(tile, &tile_m, &tile_n);
        const int row_a = (tile_m * C::CLUSTER + rank) * C::BLOCK_M;
        const int row_b = tile_n * C::BLOCK_N + rank * C::ROWS_B;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.advance()) {
          ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);  // free in every block of the cluster
          const uint32_t barrier = full + at.stage * 8, smem_a = base + at.stage * C::STAGE_BYTES;
          const uint32_t smem_b = smem_a + C::BYTES_A + rank * C::ROWS_B * C::BLOCK_K;
          ptx::mbarrier_arrive_expect(barrier, C::STAGE_BYTES);
          ptx::tma_load(smem_a, &params.a, barrier, k_tile * C::BLOCK_K, row_a);
          if constexpr (C::CLUSTER > 1) {
            ptx::tma_load_multicast(smem_b, &params.b, barrier, k_tile * C::BLOCK_K, row_b, (1 << C::CLUSTER) - 1);
          } else {
            ptx::tma_load(smem_b, &params.b, barrier, k_tile * C::BLOCK_K, row_b);
          }
        }
      }
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = warpgroup - 1;
    uint8_t* staging = shared + C::RING_BYTES + (consumer * 4 + warp_id) * C::STAGING_BYTES;
    // Each consumer has its own column terms, so that they need not wait for each other.
    float2* columns = reinterpret_cast<float2*>(shared + C::RING_BYTES + C::CONSUMERS * 4 * C::STAGING_BYTES +
                                                consumer * C::COLUMN_BYTES);
    auto release = [&](int stage) {
      if (threadIdx.x % 128 < C::CLUSTER) ptx::mbarrier_arrive_cluster(empty + stage * 8, threadIdx.x % 128);
    };
    for (int tile = first_tile; tile < order.count(); tile += tile_step) {
      int tile_m, tile_n;
      order.locate(tile, &tile_m, &tile_n);
      const int64_t m0 = int64_t(tile_m * C::CLUSTER + rank) * C::BLOCK_M + consumer * MMA_M + warp_id * 16;
      const int64_t n0 = int64_t(tile_n) * C::BLOCK_N;
      // Loads that would otherwise delay the epilogue. The first barrier keeps the last tile's readers of `columns` and
      // this tile's writers apart, the one behind the main loop the writers and the readers.
      const int row = threadIdx.x % 32 / 4;
      const float scale_m[] = {row_scale(p, m0 + row), row_scale(p, m0 + row + 8)};
      ptx::warpgroup_barrier_sync(1 + consumer);
      for (int n = threadIdx.x % 128; n < C::BLOCK_N; n += 128) columns[n] = column_terms(p, n0 + n);
      int32_t acc[C::ACCUMULATORS];
      // Invariant: on entry to step k_tile the wgmmas of step k_tile - 1 may still run; its buffer is not yet released.
      int previous = 0;
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
        ptx::mbarrier_wait(full + at.stage * 8, at.parity);
        const uint32_t smem_a = base + at.stage * C::STAGE_BYTES + consumer * MMA_M * C::BLOCK_K;
        const uint64_t a = ptx::wgmma_descriptor(smem_a);
        const uint64_t b = ptx::wgmma_descriptor(base + at.stage * C::STAGE_BYTES + C::BYTES_A);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < C::BLOCK_K / MMA_K; ++step)
          ptx::wgmma_m64k32_s8(acc, a + step * MMA_K / 16, b + step * MMA_K / 16, k_tile > 0 || step > 0);
        ptx::wgmma_commit();
        if (k_tile > 0) {
          ptx::wgmma_wait<1>();
          release(previous);
        }
        previous = at.stage;
        at.advance();
      }
      ptx::wgmma_wait<0>();
      release(previous);

      ptx::warpgroup_barrier_sync(1 + consumer);
      switch (p.d_dtype) {
#define HWKERN_STORE(DTYPE, T) \
  case DTYPE: store_accumulators<T, C::BLOCK_N>(params, acc, scale_m, m0, n0, columns, staging); break;
        HWKERN_STORE(DType::kFloat32, float)
        HWKERN_STORE(DType::kFloat16, __half)
        HWKERN_STORE(DType::kBFloat16, __nv_bfloat16)
        HWKERN_STORE(DType::kInt32, int32_t)
#undef HWKERN_STORE
        default: break;
      }
    }
    ptx::bulk_wait_read<0>();  // shared memory stays until the copy engine has read it
  }
  // No block leaves while another may still write to its memory or arrive on its barriers.
  if constexpr (C::CLUSTER > 1) ptx::cluster_sync();
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, without linking libcuda; null when the driver does not have it.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer)
                                                                         : nullptr;
  }();
  return function;
}

// A row-major matrix in boxes of `box_rows` rows × `box_bytes` (64 or 128), swizzled over that width.
bool make_map(CUtensorMap* map, CUtensorMapDataType type, int64_t element, const void* matrix, int64_t rows,
              int64_t columns, int64_t ld, int box_rows, int box_bytes) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(ld * element)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes / element), static_cast<cuuint32_t>(box_rows)},
                   steps[] = {1, 1};
  return encode_tiled()(map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

CUtensorMapDataType map_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default: return CU_TENSOR_MAP_DATA_TYPE_INT32;
  }
}

template <typename C>
Status launch_config(const Gemm& p, int sm_count, Stream stream) {
  if (!encode_tiled())
    return {StatusCode::kUnsupportedDevice,
            "gemm: the driver has no tensor maps; CUDA 12.0's driver or newer is needed"};
  Params params;
  params.gemm = p;
  const int64_t element = size_of(p.d_dtype);
  // NOTE: the copy engine clips a row at 16 bytes, not at the element: N must fill them.
  params.store_by_tma = p.n * element % 16 == 0 && p.ldd * element % 16 == 0 && is_aligned(p.d, 16);
  bool mapped = make_map(&params.a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.a, p.m, p.k, p.lda, C::BLOCK_M, 128) &&
                make_map(&params.b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.n, p.k, p.ldb, C::ROWS_B, 128);
  if (params.store_by_tma)
    mapped = mapped && make_map(&params.d, map_type(p.d_dtype), element, p.d, p.m, p.n, p.ldd, 16, 64);
  if (!mapped) return invalid("gemm: the driver refused a tensor map for these sizes and strides");
  const int64_t tiles = ceil_div(p.m, C::BLOCK_M * C::CLUSTER) * ceil_div(p.n, C::BLOCK_N);
  const int64_t clusters = sm_count / C::CLUSTER;
  const unsigned blocks = static_cast<unsigned>((tiles < clusters ? tiles : clusters) * C::CLUSTER);
  return launch<gemm_sm90<C>>({dim3(blocks), dim3(C::THREADS), C::SHARED_BYTES, C::CLUSTER, /*overlap=*/true}, stream,
                              params);
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
