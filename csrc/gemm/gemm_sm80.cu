// INT8 GEMM for sm_80 and newer: D = epilogue(A · Bᵀ) with mma.sync m16n8k32 (see hwkern.h for shapes and rounding).
//
// A block computes a BLOCK_M × BLOCK_N tile of D. A ring of STAGES shared-memory buffers, each BLOCK_K bytes deep, is
// filled with cp.async, STAGES - 1 buffers ahead of the one that the warps multiply. WARPS_M × WARPS_N warps split the
// tile; WARPS_K > 1 splits the k-steps of each buffer between warps instead, for tiles too small to feed four warps
// (their int32 sums are added at the end, which is exact in any order).
#include <type_traits>

#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 32;
constexpr int CHUNK = 16;        // bytes: one cp.async, one row of an ldmatrix matrix
constexpr int GROUP_TILES_M = 8; // row tiles that run side by side, so that a column of B tiles is read from L2

template <int BLOCK_M_, int BLOCK_N_, int BLOCK_K_, int WARPS_M_, int WARPS_N_, int WARPS_K_, int STAGES_, int BLOCKS_>
struct Config {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = BLOCK_K_;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
  static constexpr int STAGES = STAGES_, BLOCKS_PER_SM = BLOCKS_;

  static constexpr int WARPS = WARPS_M * WARPS_N * WARPS_K, THREADS = WARPS * 32;
  static constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
  static constexpr int MMAS_M = WARP_M / MMA_M, MMAS_N = WARP_N / MMA_N;
  static constexpr int K_STEPS = BLOCK_K / MMA_K;

  static constexpr int CHUNKS_PER_ROW = BLOCK_K / CHUNK;
  static constexpr int ROWS_PER_PASS = THREADS / CHUNKS_PER_ROW;  // rows that all threads copy at once
  static constexpr int PASSES_A = BLOCK_M / ROWS_PER_PASS, PASSES_B = BLOCK_N / ROWS_PER_PASS;
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, BYTES_B = BLOCK_N * BLOCK_K, STAGE_BYTES = BYTES_A + BYTES_B;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
  static constexpr int SHARED_BYTES = sm80_shared_bytes(BLOCK_M, BLOCK_N, BLOCK_K, STAGES);  // the ring, column terms

  static_assert(WARP_M % MMA_M == 0 && WARP_N % 16 == 0, "a warp loads B fragments for 16 columns at a time");
  static_assert(K_STEPS % WARPS_K == 0 && STAGES >= 2);
  static_assert(BLOCK_K == 64 || BLOCK_K % 128 == 0, "the swizzle is written for these");
  static_assert(THREADS % CHUNKS_PER_ROW == 0 && BLOCK_M % ROWS_PER_PASS == 0 && BLOCK_N % ROWS_PER_PASS == 0);
  static_assert(WARPS_M * WARPS_N * kEpilogueBytes<WARP_N> <= RING_BYTES);
  static_assert((WARPS_K - 1) * BLOCK_M * BLOCK_N * 4 <= RING_BYTES);
};

// Byte offset of a 16-byte chunk in a buffer of BLOCK_K-byte rows. The exclusive-or spreads the 8 rows that one
// ldmatrix reads (same chunk, consecutive rows) over all 32 banks.
template <int BLOCK_K>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  const int key = BLOCK_K == 64 ? (row >> 1) & 3 : row & 7;
  return row * BLOCK_K + ((chunk ^ key) * CHUNK);
}

// One operand's share of a thread: rows row0, row0 + ROWS_PER_PASS, … of the tile, always the same 16-byte column.
template <int PASSES, int ROWS_PER_PASS, int BLOCK_K>
struct TileCopy {
  static_assert(ROWS_PER_PASS % 8 == 0, "the swizzle repeats every 8 rows, so passes differ by a constant");
  const int8_t* global;  // this thread's chunk in its first row, at k = 0
  int64_t pass_stride;  // bytes from one of its rows to the next
  uint32_t inside;  // bit i: row i is inside the matrix; outside nothing is read and zeros are stored
  int smem;  // the chunk's place in a buffer

  __device__ TileCopy(const int8_t* matrix, int64_t ld, int64_t row0, int64_t rows, int thread_row, int chunk)
      : global(matrix + (row0 + thread_row) * ld + chunk * CHUNK),
        pass_stride(ROWS_PER_PASS * ld),
        inside(0),
        smem(swizzle<BLOCK_K>(thread_row, chunk)) {
#pragma unroll
    for (int i = 0; i < PASSES; ++i) inside |= (row0 + thread_row + i * ROWS_PER_PASS < rows ? 1u : 0u) << i;
  }

  // `bytes`: how many of this thread's 16 lie before K.
  __device__ __forceinline__ void issue(uint32_t buffer, int k0, int bytes) const {
    const int8_t* from = global + k0;
#pragma unroll
    for (int i = 0; i < PASSES; ++i, from += pass_stride)
      ptx::cp_async_16(buffer + smem + i * ROWS_PER_PASS * BLOCK_K, from, (inside >> i & 1) ? bytes : 0);
  }
};

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) gemm_sm80(const __grid_constant__ Gemm p) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int thread = threadIdx.x, lane_id = thread % 32, warp_id = thread / 32;
  const int warp_m = warp_id % C::WARPS_M, warp_n = warp_id / C::WARPS_M % C::WARPS_N;
  const int warp_k = warp_id / (C::WARPS_M * C::WARPS_N);

  // Which tile: groups of GROUP_TILES_M rows of tiles, column by column inside a group.
  const int tiles_m = static_cast<int>((p.m + C::BLOCK_M - 1) / C::BLOCK_M);
  const int tiles_n = static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N);
  const int group = blockIdx.x / (GROUP_TILES_M * tiles_n), in_group = blockIdx.x % (GROUP_TILES_M * tiles_n);
  const int group_rows = min(tiles_m - group * GROUP_TILES_M, GROUP_TILES_M);
  const int64_t m0 = int64_t(group * GROUP_TILES_M + in_group % group_rows) * C::BLOCK_M;
  const int64_t n0 = int64_t(in_group / group_rows) * C::BLOCK_N;

  const int thread_row = thread / C::CHUNKS_PER_ROW, chunk = thread % C::CHUNKS_PER_ROW;
  const TileCopy<C::PASSES_A, C::ROWS_PER_PASS, C::BLOCK_K> copy_a(p.a, p.lda, m0, p.m, thread_row, chunk);
  const TileCopy<C::PASSES_B, C::ROWS_PER_PASS, C::BLOCK_K> copy_b(p.b, p.ldb, n0, p.n, thread_row, chunk);
  const int k = static_cast<int>(p.k), k_tiles = (k + C::BLOCK_K - 1) / C::BLOCK_K;
  const uint32_t smem_base = ptx::shared_address(smem);

  auto load = [&](int k_tile) {
    const int k0 = k_tile * C::BLOCK_K, bytes = max(0, min(CHUNK, k - k0 - chunk * CHUNK));
    const uint32_t buffer = smem_base + k_tile % C::STAGES * C::STAGE_BYTES;
    copy_a.issue(buffer, k0, bytes);
    copy_b.issue(buffer + C::BYTES_A, k0, bytes);
  };

  ptx::grid_wait();
  ptx::grid_release();
  // Visible to all after the main loop's first barrier.
  float2* columns = reinterpret_cast<float2*>(smem + C::RING_BYTES);
  for (int n = thread; n < C::BLOCK_N; n += C::THREADS) columns[n] = column_terms(p, n0 + n);

  int32_t acc[C::MMAS_M][C::MMAS_N][4] = {};

  // ldmatrix rows of this lane: for A matrices (rows 0-7, 8-15) × (k 0-15, 16-31); for B, two column blocks of 8.
  const int row_a = warp_m * C::WARP_M + lane_id % 16, half_a = lane_id / 16;
  const int row_b = warp_n * C::WARP_N + lane_id % 8 + lane_id / 16 * 8, half_b = lane_id / 8 % 2;

  auto multiply = [&](int k_tile) {
    const uint32_t smem_a = smem_base + k_tile % C::STAGES * C::STAGE_BYTES, smem_b = smem_a + C::BYTES_A;
#pragma unroll
    for (int s = 0; s < C::K_STEPS / C::WARPS_K; ++s) {
      const int step = C::WARPS_K == 1 ? s : s * C::WARPS_K + warp_k;
      uint32_t a[C::MMAS_M][4], b[C::MMAS_N / 2][4];
#pragma unroll
      for (int i = 0; i < C::MMAS_M; ++i)
        ptx::ldmatrix_x4(a[i], smem_a + swizzle<C::BLOCK_K>(row_a + i * MMA_M, step * 2 + half_a));
#pragma unroll
      for (int j = 0; j < C::MMAS_N / 2; ++j)
        ptx::ldmatrix_x4(b[j], smem_b + swizzle<C::BLOCK_K>(row_b + j * 16, step * 2 + half_b));
#pragma unroll
      for (int i = 0; i < C::MMAS_M; ++i)
#pragma unroll
        for (int j = 0; j < C::MMAS_N; ++j)
          ptx::mma_m16n8k32_s8(acc[i][j], a[i], reinterpret_cast<const uint32_t (&)[2]>(b[j / 2][j % 2 * 2]));
    }
  };

#pragma unroll
  for (int s = 0; s < C::STAGES - 1; ++s) {
    if (s < k_tiles) load(s);
    ptx::cp_async_commit();
  }
  // Invariant at the top: groups for tiles k_tile … k_tile + STAGES - 2 have been committed, one a tile (empty past the
  // end, so that the count stays the same).
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::cp_async_wait<C::STAGES - 2>();  // this thread's part of tile k_tile has landed
    __syncthreads();  // everybody's has; and nobody reads tile k_tile - 1 any more
    if (k_tile + C::STAGES - 1 < k_tiles) load(k_tile + C::STAGES - 1);
    ptx::cp_async_commit();
    multiply(k_tile);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free: the epilogue uses its memory

  if constexpr (C::WARPS_K > 1) {
    // Warps with warp_k > 0 hand their sums over, lane by lane, to the warp with warp_k = 0.
    constexpr int OUTPUT_WARPS = C::WARPS_M * C::WARPS_N, WORDS = C::MMAS_M * C::MMAS_N * 4;
    int32_t* sums = reinterpret_cast<int32_t*>(smem);
    const int output_warp = warp_id % OUTPUT_WARPS;
    auto slot = [&](int from_k, int word) -> int32_t& {
      return sums[(((from_k - 1) * OUTPUT_WARPS + output_warp) * WORDS + word) * 32 + lane_id];
    };
    int32_t* flat = &acc[0][0][0];
    if (warp_k > 0)
#pragma unroll
      for (int word = 0; word < WORDS; ++word) slot(warp_k, word) = flat[word];
    __syncthreads();
    if (warp_k > 0) return;
#pragma unroll
    for (int from_k = 1; from_k < C::WARPS_K; ++from_k)
#pragma unroll
      for (int word = 0; word < WORDS; ++word) flat[word] += slot(from_k, word);
    // NOTE: the epilogue overwrites these slots. Slots are indexed by output warp, epilogue slabs too, but with other
    // sizes: wait until every output warp has read its own. Warps with warp_k > 0 have left, hence the named count.
    ptx::named_barrier_sync<1, OUTPUT_WARPS * 32>();
  }

  const int64_t warp_m0 = m0 + warp_m * C::WARP_M, warp_n0 = n0 + warp_n * C::WARP_N;
  const float2* warp_columns = columns + warp_n * C::WARP_N;
  void* slab = smem + (warp_n * C::WARPS_M + warp_m) * kEpilogueBytes<C::WARP_N>;
  if (has_options(p)) {
    store_tile_with_options(p, acc, warp_m0, warp_n0, warp_columns, slab);
    return;
  }
  switch (p.d_dtype) {
    case DType::kFloat32: store_tile<float>(p, acc, warp_m0, warp_n0, warp_columns, slab); break;
    case DType::kFloat16: store_tile<__half>(p, acc, warp_m0, warp_n0, warp_columns, slab); break;
    case DType::kBFloat16: store_tile<__nv_bfloat16>(p, acc, warp_m0, warp_n0, warp_columns, slab); break;
    default: store_tile<int32_t>(p, acc, warp_m0, warp_n0, warp_columns, slab); break;
  }
}

template <typename C>
Status launch_config(const Gemm& p, bool overlap, Stream stream) {
  const int64_t tiles = ceil_div(p.m, C::BLOCK_M) * ceil_div(p.n, C::BLOCK_N);
  if (tiles > INT32_MAX) return invalid("gemm: M x N is too large for one launch");
  return launch<gemm_sm80<C>>({dim3(static_cast<unsigned>(tiles)), dim3(C::THREADS), C::SHARED_BYTES, 1, overlap},
                              stream, p);
}

}  // namespace

Status launch_gemm_sm80(const Gemm& problem, int config_id, int compute, Stream stream) {
  const bool overlap = problem.overlap && compute >= 90;
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, overlap, stream);
    HWKERN_SM80_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("gemm: this id is not one of the sm80 kernels");
  }
}

}  // namespace hwkern
