// A whole INT8 linear for Hopper (sm_90a) in one launch: y = epilogue(quantized(x) · weightᵀ), for a K of which no block of
// rows fits in shared memory (see hwkern.h for shapes, rounding and special values; linear_sm90.cu for short K).
//
// A cluster takes strips of 64 rows of x, one after the other; its blocks share the columns. Each block quantizes a part
// of a strip into the workspace, from where, in L2, all of them load it as A. What it is for: reading x takes the memory as
// long as the tensor cores take to multiply it, and here one strip is quantized while another is multiplied. The same bits
// as quantize and GEMM in two launches.
//
//   producer      one thread has the copy engine fill a ring of STAGES buffers with 128 bytes of K of a strip and of BLOCK_N
//                 columns; of constant weights the first ones before the preceding kernel has ended, and of every strip's
//                 weights as many as fit before its rows are there
//   quantizers    three warps take the block's part of every strip, a row a warp, in registers between the maximum and the
//                 rounding
//   consumers     two warpgroups quantize as well until their first strip is there, then each has a tile of its own and
//                 multiplies while the other writes (ping-pong)
//
// 384 threads: with 512 a thread would have 128 registers at entry, and m64n256 needs 154.
#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue_sm90.cuh"
#include "gemm/ring.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/opaque.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "quant/finite.cuh"
#include "quant/row.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32, BLOCK_K = kSm90BlockK;
constexpr int CONSUMERS = 2, THREADS = (1 + CONSUMERS) * 128, QUANTIZERS = 3;  // the latter are warps

template <int BLOCK_N_, int STAGES_, int CLUSTER_, int VECTORS_>
struct Config {
  static constexpr int BLOCK_M = MMA_M, BLOCK_N = BLOCK_N_, STAGES = STAGES_, CLUSTER = CLUSTER_;
  static constexpr int VECTORS = VECTORS_;  // of 16 bytes that a lane keeps of a row
  static constexpr int SHARE = (BLOCK_M + CLUSTER - 1) / CLUSTER;  // rows of a strip that this block quantizes
  static constexpr int MMAS_M = 1, ACCUMULATORS = BLOCK_N / 2;  // of a tile; int32 registers a thread
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, STAGE_BYTES = BYTES_A + BLOCK_N * BLOCK_K;

  // For the epilogue (epilogue_sm90.cuh): a consumer stores alone, through a box of shared memory.
  static constexpr bool PINGPONG = true;
  static constexpr int OWN_BOXES = 1, NARROW = BLOCK_N;

  // Shared memory: the ring, the staging, the terms of two tiles, the barriers.
  static constexpr int STAGING = STAGES * STAGE_BYTES, TERMS = STAGING + CONSUMERS * kSm90BoxBytes;
  static constexpr int BARRIERS = TERMS + CONSUMERS * BLOCK_N * kColumnTermBytes;
  static constexpr int SHARED_BYTES = linear_long_sm90_shared_bytes(BLOCK_N, STAGES);

  static_assert(SHARED_BYTES <= 232448, "227 KB of shared memory a block");
  static_assert(BARRIERS + 16 * STAGES + 16 + 8 * kLinearLongStrips <= SHARED_BYTES);
  static_assert(ACCUMULATORS <= 128 && STAGE_BYTES % 1024 == 0, "the swizzle wants tiles at multiples of 1024 bytes");
};

struct Params {
  Sm90Params out;  // of which d is not used
  const void* x;
  int8_t* q;  // [M, ldq] and
  float* scale;  // [M]: the workspace
  int64_t ldx, ldq;
  DType x_dtype;
  bool rows_aligned, rows_whole;  // see RowVector; whole rows are also kept in registers
  int strips;  // that a cluster takes
};

// Rows first, first + step, … below end as int8, and their scales: a warp's part of a strip. Rows that are whole are kept in
// registers, and while one is rounded the next is on its way. 16-bit types alone, and one copy of the loop for both: with
// two of them registers did not suffice.
template <typename C>
__device__ __forceinline__ void quantize_whole_rows(const Params& params, int first, int end, int step, int lane_id) {
  using Row = RowVector<__half>;
  constexpr uint32_t STRIDE = 32 * Row::COUNT;
  const uint32_t k = static_cast<uint32_t>(params.out.gemm.k), ldq = static_cast<uint32_t>(params.ldq);
  const uint32_t column = lane_id * Row::COUNT;
  const __half* x = static_cast<const __half*>(params.x);
  Row kept[2][C::VECTORS];
  auto load = [&](Row (&row)[C::VECTORS], int m) {
    if (m >= end) return;
#pragma unroll
    for (int v = 0; v < C::VECTORS; ++v)
      row[v].template load<true>(x + m * params.ldx, column + v * STRIDE, k, true);
  };
  auto quantize_as = [&](auto type, const Row (&row)[C::VECTORS], int m) {
    using T = decltype(type);
    Largest<T> largest;
#pragma unroll
    for (int v = 0; v < C::VECTORS; ++v) largest.add(RowVector<T>{row[v].raw});
    const TokenScale token(__reduce_max_sync(~0u, largest.bits()));
    if (lane_id == 0) params.scale[m] = token.scale;
    const uint32_t finite = token.inverse == 0.0f ? 0 : ~0u;
    int8_t* q = params.q + m * params.ldq;
#pragma unroll
    for (int v = 0; v < C::VECTORS; ++v) {
      float values[Row::COUNT];
      RowVector<T>{row[v].raw}.values(values);
      if (column + v * STRIDE < ldq)
        *reinterpret_cast<uint2*>(q + column + v * STRIDE) = {rounded(values, token.inverse) & finite,
                                                              rounded(values + 4, token.inverse) & finite};
    }
  };
  const bool is_half = params.x_dtype == DType::kFloat16;
  auto quantize = [&](const Row (&row)[C::VECTORS], int m) {
    if (m >= end) return;
    is_half ? quantize_as(__half{}, row, m) : quantize_as(__nv_bfloat16{}, row, m);
  };
  load(kept[0], first), load(kept[1], first + step);
#pragma unroll 1
  for (int m = first; m < end; m += 2 * step) {
    quantize(kept[0], m), load(kept[0], m + 2 * step);
    quantize(kept[1], m + step), load(kept[1], m + 3 * step);
  }
}

// The same for every other row, which is read twice.
template <typename C, typename T>
__device__ __forceinline__ void quantize_any_rows(const Params& params, int first, int end, int step, int lane_id) {
  using Row = RowVector<T>;
  constexpr uint32_t STRIDE = 32 * Row::COUNT;
  const uint32_t k = static_cast<uint32_t>(params.out.gemm.k), ldq = static_cast<uint32_t>(params.ldq);
#pragma unroll 1
  for (int m = first; m < end; m += step) {
    const T* x = static_cast<const T*>(params.x) + m * params.ldx;
    Row row;
    Largest<T> largest;
#pragma unroll 1
    for (uint32_t c = lane_id * Row::COUNT; c < k; c += STRIDE) {
      row.load(x, c, k, params.rows_aligned);
      largest.add(row);
    }
    const TokenScale token(__reduce_max_sync(~0u, largest.bits()));
    if (lane_id == 0) params.scale[m] = token.scale;
#pragma unroll 1
    for (uint32_t c = lane_id * Row::COUNT; c < ldq; c += STRIDE) {
      row.load(x, c, k, params.rows_aligned);
      row.quantize(params.q + m * params.ldq, c, ldq, params.rows_aligned, [&](int) { return token.inverse; });
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(THREADS, 1) linear_long_sm90(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.out.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  // Arrays of barriers: a buffer of the ring is full, is empty; a consumer's turn; a strip is quantized.
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8, turn = empty + C::STAGES * 8,
                 ready = turn + 16;

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), lane_id = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x % C::CLUSTER);
  const int tiles_n = static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N), m = static_cast<int>(p.m);
  const int first_row = static_cast<int>(blockIdx.x / C::CLUSTER) * params.strips * C::BLOCK_M;
  const int strips = min(params.strips, (m - first_row + C::BLOCK_M - 1) / C::BLOCK_M);
  const int columns = (tiles_n - rank + C::CLUSTER - 1) / C::CLUSTER;  // tiles of a strip that this block takes
  const int tiles = strips * columns, k_tiles = static_cast<int>((p.k + BLOCK_K - 1) / BLOCK_K);
  // The last strip that consumer 1 quantizes: a consumer stops before its first tile, so that strip 0 has eleven warps a
  // block, and strip 1 seven where no block has more than a tile of each.
  const int last_strip_1 = tiles_n <= C::CLUSTER ? 1 : 0;
  auto warps_of = [&](int strip) { return QUANTIZERS + (strip == 0 ? 8 : strip <= last_strip_1 ? 4 : 0); };

  auto rows_of = [&](int strip) { return min(m - first_row - strip * C::BLOCK_M, C::BLOCK_M); };
  auto load_b = [&](int strip, int n0, int k_tile, int stage) {  // and tells what A is going to bring
    const int rows = static_cast<int>(p.n) - n0;
    ptx::mbarrier_arrive_expect(full + stage * 8, (rows_of(strip) + min(rows, C::BLOCK_N)) * BLOCK_K);
    ptx::tma_load(base + stage * C::STAGE_BYTES + C::BYTES_A,
                  rows >= C::BLOCK_N ? &params.out.b.whole : &params.out.b.last, full + stage * 8, k_tile * BLOCK_K, n0);
  };
  auto load_a = [&](int strip, int k_tile, int stage) {
    ptx::tma_load(base + stage * C::STAGE_BYTES,
                  rows_of(strip) >= C::BLOCK_M ? &params.out.a.whole : &params.out.a.last, full + stage * 8,
                  k_tile * BLOCK_K, first_row + strip * C::BLOCK_M);
  };
  const int ahead = columns > 0 ? min(C::STAGES, k_tiles) : 0;

  if (threadIdx.x == 0) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, 1);
    }
    for (int i = 0; i < CONSUMERS; ++i) ptx::mbarrier_init(turn + i * 8, 1);
    for (int i = 0; i < kLinearLongStrips; ++i) ptx::mbarrier_init(ready + i * 8, C::CLUSTER * warps_of(i));
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.out.b.whole);
    ptx::tma_prefetch_map(&params.out.a.whole);
    if (p.b_is_constant)
      for (int s = 0; s < ahead; ++s) load_b(0, rank * C::BLOCK_N, s, s);
  }
  __syncthreads();
  ptx::cluster_arrive_relaxed(), ptx::cluster_wait();  // all barriers can be used
  ptx::grid_wait();
  ptx::grid_release();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp == 0) {
    if (lane_id == 0) {
      if (!p.b_is_constant)
        for (int s = 0; s < ahead; ++s) load_b(0, rank * C::BLOCK_N, s, s);
      RingPosition<C::STAGES> at;
      for (int strip = 0; strip < strips; ++strip)
        for (int column = 0; column < columns; ++column) {
          const int n0 = (rank + column * C::CLUSTER) * C::BLOCK_N;
          int k_tile = 0;
          if (column == 0) {  // weights of the first buffers, then their rows
            RingPosition<C::STAGES> from = at;
            for (int s = 0; s < ahead; ++s, at.advance())
              if (strip > 0) {
                ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
                load_b(strip, n0, s, at.stage);
              }
            ptx::mbarrier_wait(ready + strip * 8, 0);
            ptx::fence_cluster();
            ptx::fence_proxy_async_all();
            for (; k_tile < ahead; ++k_tile, from.advance()) load_a(strip, k_tile, from.stage);
          }
          for (; k_tile < k_tiles; ++k_tile, at.advance()) {
            ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
            load_b(strip, n0, k_tile, at.stage);
            load_a(strip, k_tile, at.stage);
          }
        }
    }
  } else {
    // Quantize: of strip s its rows rank · SHARE … of the strip, one a warp at a time.
    const int last_strip = min(warpgroup == 0 ? strips : warpgroup == 1 ? 1 : last_strip_1 + 1, strips) - 1;
    // Consumer 1's warps come before consumer 0's, which leave first.
    const int quantizer = (warpgroup == 0 ? -1 : warpgroup == 2 ? QUANTIZERS : QUANTIZERS + 4) + warp % 4;
    for (int strip = 0; strip <= last_strip; ++strip) {
      const int warps = warps_of(strip);
      const int strip_row = first_row + strip * C::BLOCK_M, end = min((rank + 1) * C::SHARE, C::BLOCK_M);
      const int from = strip_row + rank * C::SHARE + quantizer, to = min(strip_row + end, m);
      auto quantize_as = [&](auto type) {
        return quantize_any_rows<C, decltype(type)>(params, from, to, warps, lane_id);
      };
      if (params.rows_whole) {
        quantize_whole_rows<C>(params, from, to, warps, lane_id);
      } else {
        switch (params.x_dtype) {
          case DType::kFloat16: quantize_as(__half{}); break;
          case DType::kBFloat16: quantize_as(__nv_bfloat16{}); break;
          default: quantize_as(float{}); break;
        }
      }
      ptx::fence_proxy_async_all();  // the copy engine reads what was written here
      ptx::fence_cluster();
      __syncwarp();
      if (lane_id < C::CLUSTER) ptx::mbarrier_arrive_cluster(ready + strip * 8, lane_id);
      __syncwarp();
    }
    if (warpgroup > 0) {
      const int consumer = warpgroup - 1;
      const bool leader = threadIdx.x % 128 == 0;
      uint8_t* staging = shared + C::STAGING + consumer * kSm90BoxBytes;
      auto* terms = reinterpret_cast<float2*>(shared + C::TERMS) + consumer * C::BLOCK_N;  // of the tile's columns
      RingPosition<C::STAGES> ring;
      if (consumer == 1) ring.skip(k_tiles);
      int previous = 0;  // the buffer of the step before
      int i = consumer;
      for (uint32_t round = 0; i < tiles; i += 2, ++round) {
        // NOTE: a wait on a buffer only tells odd fills from even ones, so the consumer whose tile is the next must not
        // look before the other one has seen all of its own.
        const int n0 = (rank + i % columns * C::CLUSTER) * C::BLOCK_N;
        for (int j = threadIdx.x % 128; j < C::BLOCK_N; j += 128) terms[j] = column_terms(p, n0 + j);
        ptx::named_barrier_sync<128>(1 + consumer);
        ptx::mbarrier_wait(turn + consumer * 8, (round & 1) ^ (consumer == 0));
        int32_t acc[1][C::ACCUMULATORS];
        // Invariant: on entry to step k the wgmmas of step k - 1 may still run; its buffer is not yet released.
        for (int k = 0; k < k_tiles; ++k) {
          ptx::mbarrier_wait(full + ring.stage * 8, ring.parity);
          const uint32_t smem_a = base + ring.stage * C::STAGE_BYTES;
          const uint64_t a = ptx::wgmma_descriptor(smem_a), b = ptx::wgmma_descriptor(smem_a + C::BYTES_A);
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < BLOCK_K / MMA_K; ++step)
            ptx::wgmma_m64k32_s8(acc[0], a + step * MMA_K / 16, b + step * MMA_K / 16, k > 0 || step > 0);
          ptx::wgmma_commit();
          if (k > 0) {
            ptx::wgmma_wait<1>();
            if (leader) ptx::mbarrier_arrive(empty + previous * 8);
          }
          previous = ring.stage;
          ring.advance();
        }
        if (leader) ptx::mbarrier_arrive(turn + (consumer ^ 1) * 8);

        uint32_t thread = threadIdx.x % 128;
        ptx::opaque(thread);  // nothing that the epilogue derives from it takes registers in the main loop
        const int warp_id = thread / 32, lane = thread % 32;
        const int row = first_row + i / columns * C::BLOCK_M + warp_id * 16;
        // NOTE: past L1, which may hold the line from before the other rows' scales were written.
        auto scale = [&](int at) { return at < m ? __ldcg(params.scale + at) : 1.0f; };
        const Part parts[1] = {{row, n0, C::BLOCK_N, {scale(row + lane / 4), scale(row + lane / 4 + 8)}}};
        ptx::wgmma_wait<0>();
        if (leader) ptx::mbarrier_arrive(empty + previous * 8);
        const float unused[C::BLOCK_N / 4] = {};  // for consumers that share boxes
        store<C>(params.out, acc, parts, unused, terms, staging, thread, 0, consumer);
        ptx::named_barrier_sync<128>(1 + consumer);  // all have read the terms
        ring.skip(k_tiles);  // the other consumer's tile
      }
    }
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed(), ptx::cluster_wait();  // the others' arrivals reach here
#endif
}

template <typename C>
Status launch_config(const Linear& l, int sm_count, int8_t* q, float* scale, int64_t ldq, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Params params{};
  Gemm& p = params.out.gemm;
  p = {q,   l.weight, scale, l.weight_scale, l.bias,    l.y,          ldq,        l.ldb, l.ldy,
       l.m, l.n,      l.k,   l.bias_dtype,   l.y_dtype, l.activation, l.residual, l.ldr, l.residual_dtype};
  p.b_is_constant = l.weight_is_constant;
  const int64_t element = size_of(l.y_dtype), count = 16 / size_of(l.x_dtype);
  params.out.chunks = l.n % 8 == 0 && l.ldy * element % 16 == 0 && is_aligned(l.y, 16);
  params.x = l.x, params.ldx = l.ldx, params.x_dtype = l.x_dtype;
  params.q = q, params.scale = scale, params.ldq = ldq;
  params.rows_aligned = is_aligned(l.x, 16) && l.ldx % count == 0;
  params.rows_whole = count == 8 && params.rows_aligned && l.k % count == 0 && ldq <= C::VECTORS * 32 * count;
  const int64_t clusters = linear_long_sm90_clusters(C::CLUSTER, l.m, sm_count);
  params.strips = static_cast<int>(ceil_div(ceil_div(l.m, C::BLOCK_M), clusters));
  if (params.strips > kLinearLongStrips || l.n > INT32_MAX - C::BLOCK_N)
    return invalid("linear: M x N is too large for one launch");
  if (!make_boxes(&params.out.a, q, l.m, l.k, ldq, C::BLOCK_M) ||
      !make_boxes(&params.out.b, l.weight, l.n, l.k, l.ldb, C::BLOCK_N))
    return kTensorMapRefused;
  const int64_t blocks = ceil_div(l.m, C::BLOCK_M * params.strips) * C::CLUSTER;
  return launch<linear_long_sm90<C>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(THREADS), C::SHARED_BYTES, C::CLUSTER, /*overlap=*/true}, stream,
      params);
}

}  // namespace

Status launch_linear_long_sm90(const Linear& problem, int config_id, int sm_count, int8_t* q, float* scale, int64_t ldq,
                               Stream stream) {
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, sm_count, q, scale, ldq, stream);
    HWKERN_LINEAR_LONG_SM90_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("linear: this id is not one of the one-launch kernels");
  }
}

}  // namespace hwkern
