// The GEMM of a whole INT8 linear for Hopper (sm_90a) that starts beside the quantize kernel before it: D = epilogue(A · Bᵀ)
// with TMA and wgmma (see hwkern.h for shapes and rounding).
//
// A block of gemm_sm90.cu takes all registers of an SM, so it comes when quantize's last block there has left, and its
// barriers, its tensor maps and the first weights, from a cold memory, are then what a layer waits for. A block of this
// kernel takes 41 thousand of 65536 registers: two producer warps in place of a warpgroup, and consumers that share a tile,
// read all column terms from shared memory and have 127 registers. So it is there beside quantize's last blocks, and has
// its first buffers' share of the weights and its column terms when the rows are complete.
//
//   producer   one thread has the copy engine fill a ring of STAGES buffers with 128 bytes of K: 128 rows of A, BLOCK_N of B
//   a warp     brings the scales and biases of the next tile
//   consumers  two warpgroups multiply, 64 rows of the tile each; 16-bit results go to shared memory, and from there to D
//              with the copy engine, under the next main loop
#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue_sm90.cuh"
#include "gemm/ring.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/elect.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32, BLOCK_K = kSm90BlockK, CONSUMERS = kSm90Consumers;
constexpr int PRODUCER_WARP = CONSUMERS * 4, TERMS_WARP = PRODUCER_WARP + 1, THREADS = (TERMS_WARP + 1) * 32;

template <int BLOCK_N_, int STAGES_>
struct Config {
  static constexpr int BLOCK_M = kSm90BlockM, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr int ACCUMULATORS = BLOCK_N / 2;
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K;

  // For the epilogue (epilogue_sm90.cuh): consumers share a tile, each has all boxes of its part.
  static constexpr int NARROW = BLOCK_N, BOXES = BLOCK_N / 64, OWN_BOXES = BOXES;

  // Shared memory: the ring, the boxes, the terms of two tiles, the barriers.
  static constexpr int STAGING = STAGES * STAGE_BYTES, TERMS = STAGING + CONSUMERS * BOXES * kSm90BoxBytes;
  static constexpr int TERM_BYTES = kColumnTermBytes * BLOCK_N + 4 * BLOCK_M;
  static constexpr int BARRIERS = TERMS + 2 * TERM_BYTES;
  static constexpr int SHARED_BYTES = linear_beside_shared_bytes(BLOCK_N, STAGES);
  static_assert(BARRIERS + 16 * STAGES + 32 <= SHARED_BYTES);
  static_assert(SHARED_BYTES + 1024 <= kSmSharedBytes - 8 * 1024, "some of quantize's blocks, 1 KB each, fit beside");
};

template <typename C>
struct Terms {
  float2 columns[C::BLOCK_N];
  float scale_m[C::BLOCK_M];
};

// NOTE: the bound of 480 threads, of which there are 320, limits it to 136 registers.
template <typename C>
__global__ void __launch_bounds__(480, 1) linear_beside_sm90(const __grid_constant__ Sm90Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  // Arrays of barriers: a buffer of the ring is full, is empty; a tile's terms are there, are read.
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8, terms_full = empty + C::STAGES * 8,
                 terms_empty = terms_full + 16;
  auto* all_terms = reinterpret_cast<Terms<C>*>(shared + C::TERMS);
  static_assert(sizeof(Terms<C>) == C::TERM_BYTES);

  const int warp_id = __shfl_sync(~0u, threadIdx.x / 32, 0), lane_id = threadIdx.x % 32;
  // All columns of a row of tiles follow each other: with 768 columns and more, some 24 rows of tiles at most are read at a time.
  const int tiles_n = static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N);
  const int tiles = static_cast<int>((p.m + C::BLOCK_M - 1) / C::BLOCK_M) * tiles_n;
  const int k_tiles = static_cast<int>((p.k + BLOCK_K - 1) / BLOCK_K);

  if (warp_id == PRODUCER_WARP && ptx::elect_one()) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, CONSUMERS);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(terms_full + i * 8, 32);
      ptx::mbarrier_init(terms_empty + i * 8, CONSUMERS * 128);
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.a.whole);
  }
  __syncthreads();

  if (warp_id == PRODUCER_WARP) {
    if (ptx::elect_one()) {
      RingPosition<C::STAGES> at;
      int early = min(C::STAGES, k_tiles);  // buffers that get their part of B before A is there
#pragma unroll 1
      for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, early = 0) {
        const int m0 = tile / tiles_n * C::BLOCK_M, n0 = tile % tiles_n * C::BLOCK_N;
        const int64_t rows_a = min(p.m - m0, int64_t{C::BLOCK_M}), rows_b = min(p.n - n0, int64_t{C::BLOCK_N});
        const CUtensorMap *a = rows_a == C::BLOCK_M ? &params.a.whole : &params.a.last,
                          *b = rows_b == C::BLOCK_N ? &params.b.whole : &params.b.last;
        auto load_b = [&](int stage, int k_tile) {
          ptx::mbarrier_arrive_expect(full + stage * 8, static_cast<int>(rows_a + rows_b) * BLOCK_K);
          ptx::tma_load(base + stage * C::STAGE_BYTES + C::BYTES_A, b, full + stage * 8, k_tile * BLOCK_K, n0);
        };
        for (int s = 0; s < early; ++s) load_b(s, s);
        if (early > 0) ptx::grid_wait();
#pragma unroll 1
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.advance()) {
          if (k_tile >= early) {
            ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
            load_b(at.stage, k_tile);
          }
          ptx::tma_load(base + at.stage * C::STAGE_BYTES, a, full + at.stage * 8, k_tile * BLOCK_K, m0);
        }
      }
    }
  } else if (warp_id == TERMS_WARP) {
    int i = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++i) {
      const int m0 = tile / tiles_n * C::BLOCK_M, n0 = tile % tiles_n * C::BLOCK_N, buffer = i & 1;
      ptx::mbarrier_wait(terms_empty + buffer * 8, (i >> 1 & 1) ^ 1);
      Terms<C>& terms = all_terms[buffer];
#pragma unroll
      for (int j = 0; j < C::BLOCK_N / 32; ++j)
        terms.columns[j * 32 + lane_id] = column_terms(p, n0 + j * 32 + lane_id);
      if (i == 0) ptx::grid_wait(), ptx::grid_release();
#pragma unroll
      for (int j = 0; j < C::BLOCK_M / 32; ++j) terms.scale_m[j * 32 + lane_id] = row_scale(p, m0 + j * 32 + lane_id);
      ptx::mbarrier_arrive(terms_full + buffer * 8);
    }
  } else {
    const int consumer = warp_id / 4;
    const bool leader = threadIdx.x % 128 == 0;
    uint8_t* own = shared + C::STAGING + consumer * C::OWN_BOXES * kSm90BoxBytes;
    RingPosition<C::STAGES> at;
    int previous = 0, i = 0;  // the buffer of the step before; the tile's number
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++i) {
      int32_t acc[C::ACCUMULATORS];
      // Invariant: on entry to step k_tile the wgmmas of step k_tile - 1 may still run; its buffer is not yet released.
#pragma unroll 1
      for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
        ptx::mbarrier_wait(full + at.stage * 8, at.parity);
        const uint32_t smem = base + at.stage * C::STAGE_BYTES;
        const uint64_t a = ptx::wgmma_descriptor(smem + consumer * MMA_M * BLOCK_K);
        const uint64_t b = ptx::wgmma_descriptor(smem + C::BYTES_A);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / MMA_K; ++step)
          ptx::wgmma_m64k32_s8(acc, a + step * MMA_K / 16, b + step * MMA_K / 16, k_tile > 0 || step > 0);
        ptx::wgmma_commit();
        if (k_tile > 0) {
          ptx::wgmma_wait<1>();
          if (leader) ptx::mbarrier_arrive(empty + previous * 8);
        }
        previous = at.stage;
        at.advance();
      }

      uint32_t thread = threadIdx.x % 128;
      ptx::opaque(thread);  // nothing that the epilogue derives from it takes registers in the main loop
      const int row = consumer * MMA_M + thread / 32 * 16;  // of the tile, the warp's first
      ptx::mbarrier_wait(terms_full + (i & 1) * 8, i >> 1 & 1);
      const Terms<C>& terms = all_terms[i & 1];
      const float* scale_m = &terms.scale_m[row + thread % 32 / 4];
      const Part part{
          tile / tiles_n * C::BLOCK_M + row, tile % tiles_n * C::BLOCK_N, C::BLOCK_N, {scale_m[0], scale_m[8]}};
      ptx::wgmma_wait<0>();
      if (leader) {
        ptx::mbarrier_arrive(empty + previous * 8);
        ptx::bulk_wait_read<0>();  // the boxes of the tile before have left
      }
      ptx::named_barrier_sync<128>(2 + consumer);
      auto boxes = [&](auto type) {
        const float unused[C::BLOCK_N / 4] = {};  // columns' scales in registers
        store_boxes<C, decltype(type), /*BIAS=*/true>(params, acc, part, unused, terms.columns,
                                                      ptx::shared_address(own), thread, 0, consumer);
      };
      if (params.chunks && !has_options(p) && p.d_dtype == DType::kBFloat16) {
        boxes(__nv_bfloat16{});
      } else if (params.chunks && !has_options(p) && p.d_dtype == DType::kFloat16) {
        boxes(__half{});
      } else {
        store_any<C>(p, acc, part, terms.columns, own + thread / 32 * C::OWN_BOXES * kPieceBytes, thread % 32);
      }
      __syncwarp();
      ptx::mbarrier_arrive(terms_empty + (i & 1) * 8);  // every thread, as in gemm_sm90.cu
    }
    if (leader) ptx::bulk_wait_read<0>();  // shared memory lives as long as the block
  }
#endif
}

template <typename C>
Status launch_config(const Gemm& p, int sm_count, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Sm90Params params{};
  params.gemm = p;
  const int64_t element = size_of(p.d_dtype);
  params.chunks = p.n % 8 == 0 && p.ldd * element % 16 == 0 && is_aligned(p.d, 16);
  if (!make_boxes(&params.a, p.a, p.m, p.k, p.lda, C::BLOCK_M) ||
      !make_boxes(&params.b, p.b, p.n, p.k, p.ldb, C::BLOCK_N))
    return kTensorMapRefused;
  if (params.chunks && element == 2 &&
      !make_map(&params.d, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, p.d, p.m, p.n, p.ldd, MMA_M, 128))
    return kTensorMapRefused;
  const int64_t tiles = ceil_div(p.m, C::BLOCK_M) * ceil_div(p.n, C::BLOCK_N);
  if (tiles > INT32_MAX / 2 || p.m > INT32_MAX - C::BLOCK_M || p.n > INT32_MAX - C::BLOCK_N)
    return invalid("linear: M x N is too large for one launch");
  return launch<linear_beside_sm90<C>>({dim3(static_cast<unsigned>(tiles < sm_count ? tiles : sm_count)), dim3(THREADS),
                                        C::SHARED_BYTES, /*cluster=*/1, /*overlap=*/true},
                                       stream, params);
}

}  // namespace

Status launch_linear_beside_sm90(const Gemm& product, int config_id, int sm_count, Stream stream) {
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(product, sm_count, stream);
    HWKERN_LINEAR_BESIDE_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("linear: this id is not one of the kernels that start beside quantize");
  }
}

}  // namespace hwkern
