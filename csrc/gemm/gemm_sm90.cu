// INT8 GEMM for Hopper (sm_90a): D = epilogue(A · Bᵀ) with TMA and wgmma (see hwkern.h for shapes and rounding).
//
// Persistent blocks, one an SM, of three warpgroups. Of the first, one thread is the producer, which has the copy engine
// fill a ring of STAGES shared-memory buffers, BLOCK_K bytes deep, and one warp brings the column terms of the next
// epilogue. The other two multiply and write D, in one of two ways:
//
//   cooperative   both work on one tile, 64 rows each; nothing multiplies while they write it. Large tiles: the fewest
//                 bytes, and so the least energy, an operation.
//   ping-pong     each has a tile of its own and multiplies while the other writes its tile. The accumulators of a tile
//                 are one warpgroup's, so it has at most 128 × 128.
//
// Per k32 step a cooperative consumer's wgmma reads (64 + BLOCK_N)·32 bytes of shared memory for 2·64·BLOCK_N·32
// operations: 80 bytes a cycle at the peak rate for BLOCK_N = 256, of the 128 that there are.
#include <type_traits>

#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "gemm/ring.cuh"
#include "gemm/tensor_map.h"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32;
constexpr int CONSUMERS = 2, THREADS = (CONSUMERS + 1) * 128;
constexpr int64_t kStreamedBytes = 32 << 20;  // of D: the L2 of an H100 has 50 MB

template <int BLOCK_N_, int STAGES_, bool PINGPONG_>
struct Config {
  static constexpr int BLOCK_M = kSm90BlockM, BLOCK_N = BLOCK_N_, BLOCK_K = kSm90BlockK, STAGES = STAGES_;
  static constexpr bool PINGPONG = PINGPONG_;
  static constexpr int SHARERS = PINGPONG ? 1 : CONSUMERS;  // consumers of one buffer, and of one tile
  static constexpr int MMAS_M = BLOCK_M / MMA_M / SHARERS;  // of one consumer's part of a tile
  static constexpr int ACCUMULATORS = BLOCK_N / 2;  // int32 registers a thread for each: 64 · BLOCK_N / 128
  static constexpr int BYTES_A = BLOCK_M * BLOCK_K, BYTES_B = BLOCK_N * BLOCK_K, STAGE_BYTES = BYTES_A + BYTES_B;

  // Shared memory: the ring, the staging of eight warps, the column terms of one or two tiles, the barriers.
  static constexpr int PIECES = sm90_pieces(BLOCK_N, STAGES), STAGING_BYTES = PIECES * kSm90PieceBytes;
  static constexpr int STAGING = STAGES * STAGE_BYTES, COLUMNS = STAGING + CONSUMERS * 4 * STAGING_BYTES;
  static constexpr int COLUMN_BUFFERS = PINGPONG ? 2 : 1;
  static constexpr int BARRIERS = COLUMNS + COLUMN_BUFFERS * BLOCK_N * kColumnTermBytes;
  static constexpr int SHARED_BYTES = sm90_shared_bytes(BLOCK_N, STAGES, PINGPONG);

  static_assert(SHARED_BYTES <= 232448, "227 KB of shared memory a block");
  static_assert(BARRIERS + 16 * STAGES + 48 <= SHARED_BYTES);
  static_assert(MMAS_M * ACCUMULATORS <= 128, "more accumulators do not fit beside the epilogue's registers");
  static_assert(STAGE_BYTES % 1024 == 0, "the swizzle wants tiles at multiples of 1024 bytes");
};

struct Params {
  Boxes a, b;
  Gemm gemm;
  int group_rows;  // of TileOrder
  bool chunks;  // D consists of whole 16-byte chunks
  bool streams;  // D does not fit in L2: it leaves first, so that A and B stay
};

// The tiles of one block, in order: block, block + blocks, …
struct TileOrder {
  int tiles_m, tiles_n;
  int group_rows;  // rows of tiles that walk along N side by side, so that a wave of tiles is about square

  __device__ int count() const { return tiles_m * tiles_n; }
  __device__ void locate(int tile, int* tile_m, int* tile_n) const {
    const int group = tile / (group_rows * tiles_n), in_group = tile % (group_rows * tiles_n);
    const int rows = min(tiles_m - group * group_rows, group_rows);
    *tile_m = group * group_rows + in_group % rows;
    *tile_n = in_group / rows;
  }
};

// Where one warp's 16 rows of D lie, and what scales them (of the lane's rows group and group + 8 of the fragments).
struct Part {
  int64_t m0, n0;
  float scale_m[2];
};

// A warp's staging: pieces of 16 rows of 128 bytes. 16-byte chunk c of row r lies at chunk c ^ (r % 8), so that neither
// fragments nor whole rows meet bank conflicts.
__device__ __forceinline__ int staged(int row, int chunk) { return row * 128 + (chunk ^ (row % 8)) * 16; }

// Two neighbours of a row as they are stored.
template <typename T, bool BIAS>
__device__ __forceinline__ Vector<T, 2> finished(int32_t sum0, int32_t sum1, float scale_m, float4 terms) {
  Vector<T, 2> out;
  if constexpr (BIAS || sizeof(T) == 4) {
    finish<T>(out.v, sum0, sum1, scale_m, {terms.x, terms.y}, {terms.z, terms.w});
  } else {  // an eighth of the epilogue's instructions less
    const float y0 = __fmul_rn(__fmul_rn(__int2float_rn(sum0), scale_m), terms.x);
    const float y1 = __fmul_rn(__fmul_rn(__int2float_rn(sum1), scale_m), terms.z);
    if constexpr (std::is_same_v<T, __half>) {
      *reinterpret_cast<__half2*>(out.v) = __floats2half2_rn(y0, y1);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(out.v) = __floats2bfloat162_rn(y0, y1);
    }
  }
  return out;
}

// A warp's rows of D through its staging, for params.chunks and no options. The stores are whole rows of 128 bytes and
// nobody waits for them.
template <typename C, typename T, bool BIAS>
__device__ __forceinline__ void store_rows(const Params& params, const int32_t (&acc)[C::ACCUMULATORS],
                                           const Part& part, const float2* columns, uint8_t* staging) {
  constexpr int PACK = 16 / sizeof(T), PIECE = 8 * PACK;  // columns of a chunk, of a piece
  const Gemm& p = params.gemm;
  const int lane_id = threadIdx.x % 32, group = lane_id / 4, pair = lane_id % 4 * 2, chunk = lane_id % 8;
  const int columns_left = static_cast<int>(p.n - part.n0) - chunk * PACK;  // from the lane's chunk on
  const int rows_left = static_cast<int>(min(p.m - part.m0, int64_t{16})) - lane_id / 8;
  T* d = static_cast<T*>(p.d) + (part.m0 + lane_id / 8) * p.ldd + part.n0 + chunk * PACK;
  // stmatrix: lane l gives row l % 16 of chunk l / 16. Chunk j more is an exclusive-or, because j is even.
  const uint32_t matrices = ptx::shared_address(staging) + staged(lane_id % 16, lane_id / 16);
#pragma unroll
  for (int c = 0; c < C::BLOCK_N; c += PIECE) {
    const int piece = c / PIECE % C::PIECES * kSm90PieceBytes;
    if (C::PIECES == 1) __syncwarp();  // the piece before has been read
#pragma unroll
    for (int j = 0; j < PIECE / 8; j += 2) {
      uint32_t words[2][2];  // two fragments, each with rows group and group + 8
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const float4 terms = *reinterpret_cast<const float4*>(&columns[c + (j + next) * 8 + pair]);  // of two columns
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = c / 2 + (j + next) * 4 + half * 2;
          const Vector<T, 2> values = finished<T, BIAS>(acc[i], acc[i + 1], part.scale_m[half], terms);
          if constexpr (sizeof(T) == 2) {
            words[next][half] = *reinterpret_cast<const uint32_t*>(&values);
          } else {
            const int at = staged(group + half * 8, (j + next) * 2 + pair / 4) + pair % 4 * 4;
            *reinterpret_cast<Vector<T, 2>*>(staging + piece + at) = values;
          }
        }
      }
      if constexpr (sizeof(T) == 2)
        ptx::stmatrix_x4((matrices ^ (j * 16)) + piece, {words[0][0], words[0][1], words[1][0], words[1][1]});
    }
    __syncwarp();
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      rows[i] = *reinterpret_cast<const uint4*>(staging + piece + staged(lane_id / 8 + i * 4, chunk));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i * 4 < rows_left && c < columns_left) {
        uint4* out = reinterpret_cast<uint4*>(d + i * 4 * p.ldd + c);
        if (params.streams) {
          __stcs(out, rows[i]);
        } else {
          *out = rows[i];
        }
      }
  }
  __syncwarp();
}

// The same for every problem, 32 columns of float32 at a time. Destroys acc: accumulators move down, so that one copy of
// the code, which is long, serves all of them (a register array cannot be indexed by a variable).
template <typename C>
__device__ __forceinline__ void store_any(const Gemm& p, int32_t (&acc)[C::ACCUMULATORS], const Part& part,
                                          const float2* columns, uint8_t* staging) {
  constexpr int PIECE = 32, COUNT = 8;  // columns of a piece; values that a lane takes at a time
  const int lane_id = threadIdx.x % 32, group = lane_id / 4, pair = lane_id % 4 * 2;
  const bool raw = p.d_dtype == DType::kInt32;
  const float inverse = inverse_d_scale(p);
#pragma unroll 1
  for (int c = 0; c < C::BLOCK_N; c += PIECE) {
#pragma unroll
    for (int j = 0; j < PIECE / 8; ++j) {
      const float4 terms = *reinterpret_cast<const float4*>(&columns[c + j * 8 + pair]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t sum0 = acc[j * 4 + half * 2], sum1 = acc[j * 4 + half * 2 + 1];
        const float y0 = scaled(sum0, part.scale_m[half], {terms.x, terms.y}),
                    y1 = scaled(sum1, part.scale_m[half], {terms.z, terms.w});
        *reinterpret_cast<float2*>(staging + staged(group + half * 8, j * 2 + pair / 4) + pair % 4 * 4) = {
            raw ? __int_as_float(sum0) : y0, raw ? __int_as_float(sum1) : y1};
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int v = lane_id; v < 16 * PIECE / COUNT; v += 32) {
      const int row = v / (PIECE / COUNT), column = v % (PIECE / COUNT) * COUNT;
      const int64_t m = part.m0 + row, n = part.n0 + c + column;
      float y[COUNT];
#pragma unroll
      for (int e = 0; e < COUNT; e += 4)
        *reinterpret_cast<float4*>(&y[e]) = *reinterpret_cast<const float4*>(staging + staged(row, (column + e) / 4));
      if (!raw) {
        finish_row(p, y, m, n, inverse);
      } else if (m < p.m) {
#pragma unroll
        for (int e = 0; e < COUNT; ++e)
          if (n + e < p.n) static_cast<int32_t*>(p.d)[m * p.ldd + n + e] = __float_as_int(y[e]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = PIECE / 2; i < C::ACCUMULATORS; ++i) acc[i - PIECE / 2] = acc[i];
  }
}

template <typename C>
__device__ __forceinline__ void store(const Params& params, int32_t (&acc)[C::ACCUMULATORS], const Part& part,
                                      const float2* columns, uint8_t* staging) {
  const Gemm& p = params.gemm;
  if (!params.chunks || has_options(p)) return store_any<C>(p, acc, part, columns, staging);
  auto store_as = [&](auto type) {
    using T = decltype(type);
    if (sizeof(T) == 4 || p.bias) {
      store_rows<C, T, true>(params, acc, part, columns, staging);
    } else if constexpr (sizeof(T) == 2) {
      store_rows<C, T, false>(params, acc, part, columns, staging);
    }
  };
  switch (p.d_dtype) {
    case DType::kFloat32: return store_as(float{});
    case DType::kFloat16: return store_as(__half{});
    case DType::kBFloat16: return store_as(__nv_bfloat16{});
    default: return store_as(int32_t{});
  }
}

template <typename C>
__global__ void __launch_bounds__(THREADS, 1) gemm_sm90(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  // Arrays of barriers: a buffer of the ring is full, is empty; column terms are there, are read; a consumer's turn.
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8, columns_full = empty + C::STAGES * 8,
                 columns_empty = columns_full + 16, turn = columns_empty + 16;
  float2* columns = reinterpret_cast<float2*>(shared + C::COLUMNS);

  const int warpgroup = threadIdx.x / 128, warp_id = threadIdx.x / 32 % 4, lane_id = threadIdx.x % 32;
  const TileOrder order{static_cast<int>((p.m + C::BLOCK_M - 1) / C::BLOCK_M),
                        static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N), params.group_rows};
  const int first_tile = blockIdx.x, tile_step = gridDim.x, tiles = order.count();
  const int k_tiles = static_cast<int>((p.k + C::BLOCK_K - 1) / C::BLOCK_K);

  if (threadIdx.x == 0) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, C::SHARERS);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(columns_full + i * 8, 32);
      ptx::mbarrier_init(columns_empty + i * 8, C::SHARERS * 4);
      ptx::mbarrier_init(turn + i * 8, 1);
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.a.whole);
    ptx::tma_prefetch_map(&params.b.whole);
  }
  __syncthreads();
  ptx::grid_wait();
  ptx::grid_release();

  RingPosition<C::STAGES> at;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == 0) {
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        int tile_m, tile_n;
        order.locate(tile, &tile_m, &tile_n);
        const int row_a = tile_m * C::BLOCK_M, row_b = tile_n * C::BLOCK_N;
        const bool whole_a = p.m - row_a >= C::BLOCK_M, whole_b = p.n - row_b >= C::BLOCK_N;
        const CUtensorMap *a = whole_a ? &params.a.whole : &params.a.last,
                          *b = whole_b ? &params.b.whole : &params.b.last;
        const int bytes = (whole_a ? C::BYTES_A : static_cast<int>(p.m - row_a) * C::BLOCK_K) +
                          (whole_b ? C::BYTES_B : static_cast<int>(p.n - row_b) * C::BLOCK_K);
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.advance()) {
          ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
          const uint32_t barrier = full + at.stage * 8, smem_a = base + at.stage * C::STAGE_BYTES;
          ptx::mbarrier_arrive_expect(barrier, bytes);
          ptx::tma_load(smem_a, a, barrier, k_tile * C::BLOCK_K, row_a);
          ptx::tma_load(smem_a + C::BYTES_A, b, barrier, k_tile * C::BLOCK_K, row_b);
        }
      }
    } else if (warp_id == 1) {
      int buffer = 0;
      uint32_t parity = 0;
      for (int tile = first_tile; tile < tiles; tile += tile_step) {
        int tile_m, tile_n;
        order.locate(tile, &tile_m, &tile_n);
        float2 terms[C::BLOCK_N / 32];
#pragma unroll
        for (int i = 0; i < C::BLOCK_N / 32; ++i)
          terms[i] = column_terms(p, int64_t(tile_n) * C::BLOCK_N + i * 32 + lane_id);
        ptx::mbarrier_wait(columns_empty + buffer * 8, parity ^ 1);
#pragma unroll
        for (int i = 0; i < C::BLOCK_N / 32; ++i) columns[buffer * C::BLOCK_N + i * 32 + lane_id] = terms[i];
        ptx::mbarrier_arrive(columns_full + buffer * 8);
        if (++buffer == C::COLUMN_BUFFERS) buffer = 0, parity ^= 1;
      }
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    const int consumer = warpgroup - 1, buffer = C::PINGPONG ? consumer : 0;
    const bool leader = threadIdx.x % 128 == 0;
    uint8_t* staging = shared + C::STAGING + (consumer * 4 + warp_id) * C::STAGING_BYTES;
    const float2* terms = columns + buffer * C::BLOCK_N;
    Part parts[C::MMAS_M];
    auto find_parts = [&](int tile) {  // also loads the row scales
      int tile_m, tile_n;
      order.locate(tile, &tile_m, &tile_n);
#pragma unroll
      for (int i = 0; i < C::MMAS_M; ++i) {
        Part& part = parts[i];
        part.m0 = int64_t(tile_m) * C::BLOCK_M + (C::PINGPONG ? i : consumer) * MMA_M + warp_id * 16;
        part.n0 = int64_t(tile_n) * C::BLOCK_N;
        part.scale_m[0] = row_scale(p, part.m0 + lane_id / 4),
        part.scale_m[1] = row_scale(p, part.m0 + lane_id / 4 + 8);
      }
    };
    int tile = first_tile;
    if (C::PINGPONG && consumer == 1) tile += tile_step, at.skip(k_tiles);
    for (uint32_t parity = 0; tile < tiles; tile += tile_step * (C::PINGPONG ? 2 : 1), parity ^= 1) {
      // NOTE: a wait on a buffer only tells odd fills from even ones, so the consumer whose tile is the next must not
      // look before the other one has seen all of its own.
      if (C::PINGPONG) ptx::mbarrier_wait(turn + consumer * 8, parity ^ (consumer == 0));
      int32_t acc[C::MMAS_M][C::ACCUMULATORS];
      // Invariant: on entry to step k_tile the wgmmas of step k_tile - 1 may still run; its buffer is not yet released.
      int previous = 0;
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
            ptx::wgmma_m64k32_s8(acc[i], a + (i * MMA_M * C::BLOCK_K + step * MMA_K) / 16, b + step * MMA_K / 16,
                                 k_tile > 0 || step > 0);
        ptx::wgmma_commit();
        if (k_tile > 0) {
          ptx::wgmma_wait<1>();
          if (leader) ptx::mbarrier_arrive(empty + previous * 8);
        } else {
          find_parts(tile);  // here, where the wgmmas have enough to do
        }
        previous = at.stage;
        at.advance();
      }
      if (C::PINGPONG && leader) ptx::mbarrier_arrive(turn + (consumer ^ 1) * 8);
      ptx::wgmma_wait<0>();
      if (leader) ptx::mbarrier_arrive(empty + previous * 8);

      ptx::mbarrier_wait(columns_full + buffer * 8, parity);
#pragma unroll
      for (int i = 0; i < C::MMAS_M; ++i) store<C>(params, acc[i], parts[i], terms, staging);
      __syncwarp();
      if (lane_id == 0) ptx::mbarrier_arrive(columns_empty + buffer * 8);
      if (C::PINGPONG) at.skip(k_tiles);  // the other consumer's tile
    }
  }
#endif
}

template <typename C>
Status launch_config(const Gemm& p, int sm_count, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Params params;
  params.gemm = p;
  if (!make_boxes(&params.a, p.a, p.m, p.k, p.lda, C::BLOCK_M) ||
      !make_boxes(&params.b, p.b, p.n, p.k, p.ldb, C::BLOCK_N))
    return kTensorMapRefused;
  const int64_t tiles_m = ceil_div(p.m, C::BLOCK_M), tiles = tiles_m * ceil_div(p.n, C::BLOCK_N);
  if (tiles > INT32_MAX / 2) return invalid("gemm: M x N is too large for one launch");
  const int64_t element = size_of(p.d_dtype);
  params.chunks = p.n % 8 == 0 && p.ldd * element % 16 == 0 && is_aligned(p.d, 16);
  params.streams = p.m * p.n * element > kStreamedBytes;
  int64_t rows = 1;
  while ((rows + 1) * (rows + 1) * C::BLOCK_M <= int64_t{sm_count} * C::BLOCK_N) ++rows;
  params.group_rows = static_cast<int>(ceil_div(tiles_m, ceil_div(tiles_m, rows)));
  const unsigned blocks = static_cast<unsigned>(tiles < sm_count ? tiles : sm_count);
  return launch<gemm_sm90<C>>({dim3(blocks), dim3(THREADS), C::SHARED_BYTES, 1, p.overlap}, stream, params);
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
