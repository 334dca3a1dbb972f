// A whole INT8 linear for Hopper (sm_90a) in one launch: y = epilogue(quantized(x) · weightᵀ), for a K of which BLOCK_M
// rows of int8 fit in shared memory (see hwkern.h for shapes, rounding and special values).
//
// A block quantizes BLOCK_M rows of x, or in a cluster its share of them and sends that to the others, into shared memory,
// laid out as wgmma reads it. There they stay while tiles of the weight pass: each block takes some of the tiles of
// BLOCK_N columns. The same bits as quantize and GEMM in two launches, without the int8 copy's way through memory.
//
//   all warps     quantize, a few whole rows a warp at a time, in registers between the maximum and the rounding
//   producer      an elected thread has the copy engine fill a ring of STAGES buffers with 128 bytes of K of BLOCK_N columns;
//                 of constant weights the first ones before the preceding kernel has ended
//   a warp        brings the column terms of the next epilogue
//   consumers     one or two warpgroups: each has a tile of its own and multiplies while the other writes (ping-pong)
//
// What bounds it: the way from x to the first wgmma is exposed. Of the 13.3 thousand cycles that passed before it in 401 at
// 4096×3072×768, when all rows were sent at once, rows took 6.5 to arrive, 1.9 to be rounded (150 instructions a row of 768
// and warp), and 4.9 to get to the other block of the cluster: the network between SMs carries 10 – 18 bytes a cycle and
// SM. So it wins where one wave of blocks fills the GPU, or few tiles hardly use it: see linear_choose.
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
#include "ptx/prefetch.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "quant/row.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 64, MMA_K = 32, BLOCK_K = kSm90BlockK;

template <int BLOCK_M_, int BLOCK_N_, int STAGES_, int K_TILES_, int CONSUMERS_, int CLUSTER_, int BLOCKS_>
struct Config {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, STAGES = STAGES_, CLUSTER = CLUSTER_;
  static constexpr int CONSUMERS = CONSUMERS_, BLOCKS_PER_SM = BLOCKS_, THREADS = (CONSUMERS + 1) * 128;
  static constexpr bool TURNS = CONSUMERS > 1;  // consumers multiply in turn
  static constexpr int K_MAX = K_TILES_ * BLOCK_K;
  static constexpr int SHARE = BLOCK_M / CLUSTER;  // rows that this block quantizes
  static constexpr int MMAS_M = BLOCK_M / MMA_M;  // of a tile
  static constexpr int ACCUMULATORS = BLOCK_N / 2;  // int32 registers a thread for each
  static constexpr int TILE_A = BLOCK_M * BLOCK_K, STAGE_BYTES = BLOCK_N * BLOCK_K;

  // For the epilogue (epilogue_sm90.cuh): a consumer stores alone, through a box of shared memory.
  static constexpr bool PINGPONG = true;
  static constexpr int OWN_BOXES = 1, NARROW = BLOCK_N;

  // Shared memory: the rows, the ring, the staging, the terms of two tiles, the scales, the barriers.
  static constexpr int RING = K_TILES_ * TILE_A, STAGING = RING + STAGES * STAGE_BYTES;
  static constexpr int TERMS = STAGING + CONSUMERS * kSm90BoxBytes, TERM_BYTES = sm90_term_bytes(BLOCK_N);
  static constexpr int SCALES = TERMS + 2 * TERM_BYTES, BARRIERS = SCALES + 4 * BLOCK_M;
  static constexpr int SHARED_BYTES = linear_sm90_shared_bytes(BLOCK_M, BLOCK_N, STAGES, K_TILES_, CONSUMERS);

  // What a consumer's registers are after the producer's warpgroup has given up most of its own.
  static constexpr int AT_ENTRY = 65536 / BLOCKS_PER_SM / THREADS / 8 * 8;
  static constexpr int FOR_PRODUCER = 40;
  static constexpr int FOR_CONSUMERS = (AT_ENTRY * (CONSUMERS + 1) - FOR_PRODUCER) / CONSUMERS / 8 * 8;
  static constexpr int CONSUMER_REGISTERS = FOR_CONSUMERS > 232 ? 232 : FOR_CONSUMERS;
  static constexpr bool MOVES_REGISTERS = AT_ENTRY < 232;

  static_assert(BARRIERS + 16 * STAGES + 56 <= SHARED_BYTES);
  static_assert(BLOCKS_PER_SM * (SHARED_BYTES + 1024) <= 233472, "228 KB an SM, 1 KB a block is the system's");
  static_assert(MMAS_M * ACCUMULATORS <= 192 && SHARE % 8 == 0 && CONSUMERS <= 2);
  static_assert(FOR_PRODUCER < CONSUMER_REGISTERS);
  static_assert(TILE_A % 1024 == 0 && STAGE_BYTES % 1024 == 0, "the swizzle wants tiles at multiples of 1024 bytes");
};

struct Params {
  Sm90Params out;  // of which a and d are not used
  const void* x;
  int64_t ldx;
  DType x_dtype;
  bool rows_aligned, rows_whole;  // see RowVector
  int groups;  // blocks that share rows: each takes some tiles of columns
};

template <typename C>
struct Terms {
  float2 columns[C::BLOCK_N];
  int n0, unused[3];
};

// clamp(rint(x · inverse)) of four neighbours of a finite row, packed. 1.5·2²³ + v rounds v to an integer, half to even,
// which then is the low end of the sum's bits; |x · inverse| < 127.5 because inverse is that of the row's own scale. Half
// the cycles of a conversion, of which an SM does 16 a cycle.
__device__ __forceinline__ uint32_t rounded(const float* x, float inverse) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), 12582912.0f));
  return __byte_perm(__byte_perm(v[0], v[1], 0x0040), __byte_perm(v[2], v[3], 0x0040), 0x5410);
}

// Rows first … first + SHARE of the block's, as whole 128-byte rows of wgmma's tiles of A, and their scales. What would
// be a row beyond the share or beyond x is the last one again: no branches, and the same bytes twice do no harm.
// `send(row, count)`, for the rows that a warp has done, called by all of its threads.
template <typename C, typename T, bool WHOLE, typename Send>
__device__ __forceinline__ void quantize_rows(const Params& params, uint8_t* rows, float* scales, int64_t m0, int first,
                                              Send send) {
  using Row = RowVector<T>;
  constexpr int VECTORS = C::K_MAX * static_cast<int>(sizeof(T)) / 16 / 32;  // a lane's, of one row
  constexpr int WARPS = C::THREADS / 32, MOST = WHOLE ? (C::BLOCKS_PER_SM > 1 ? 12 : 18) / VECTORS : 1;
  constexpr int EVEN = (C::SHARE + WARPS - 1) / WARPS;
  constexpr int ROWS = EVEN < MOST ? EVEN : MOST;  // that a warp has under way at once
  constexpr int STRIDE = 32 * Row::COUNT;  // elements of all lanes' vectors
  static_assert(VECTORS * 512 == C::K_MAX * static_cast<int>(sizeof(T)) && ROWS > 0);
  const int warp_id = __shfl_sync(~0u, threadIdx.x / 32, 0), lane_id = threadIdx.x % 32;
  const int64_t last = params.out.gemm.m - 1;
  const T* x = static_cast<const T*>(params.x);
  const uint32_t k = static_cast<uint32_t>(params.out.gemm.k), columns = (k + BLOCK_K - 1) / BLOCK_K * BLOCK_K;
  const uint32_t column = lane_id * Row::COUNT, chunk = column % BLOCK_K / 16 * 16;
  uint8_t* tile = rows + column / BLOCK_K * C::TILE_A + column % 16;
#pragma unroll 1
  for (int r = warp_id * ROWS; r < C::SHARE; r += WARPS * ROWS) {
    Row kept[ROWS][VECTORS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t m = min(m0 + first + min(r + i, C::SHARE - 1), last);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        kept[i][v].template load<WHOLE>(x + m * params.ldx, column + v * STRIDE, k, params.rows_aligned);
    }
    uint32_t largest = 0;  // of row lane_id
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      Largest<T> of_row;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) of_row.add(kept[i][v]);
      const uint32_t all = __reduce_max_sync(~0u, of_row.bits());
      if (lane_id == i) largest = all;
    }
    const TokenScale token(largest);
    if (lane_id < ROWS) scales[first + min(r + lane_id, C::SHARE - 1)] = token.scale;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float inverse = __shfl_sync(~0u, token.inverse, i);
      const int row = first + min(r + i, C::SHARE - 1);
      uint8_t* out = tile + row * BLOCK_K + (chunk ^ (row % 8 * 16));
      const uint32_t finite = inverse == 0.0f ? 0 : ~0u;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        Vector<uint32_t, Row::COUNT / 4> packed;
        float values[Row::COUNT];
        kept[i][v].values(values);
#pragma unroll
        for (int e = 0; e < Row::COUNT; e += 4) packed.v[e / 4] = rounded(values + e, inverse) & finite;
        if (column + v * STRIDE < columns)
          *reinterpret_cast<decltype(packed)*>(out + v * (STRIDE / BLOCK_K) * C::TILE_A) = packed;
      }
    }
    ptx::fence_proxy_async();
    send(first + r, min(ROWS, C::SHARE - r));
  }
}

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) linear_sm90(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.out.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  // Arrays of barriers: a buffer of the ring is full, is empty; a tile's terms are there, are read; a consumer's turn. And
  // one for the rows.
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8, terms_full = empty + C::STAGES * 8,
                 terms_empty = terms_full + 16, turn = terms_empty + 16, rows_full = turn + 16;
  auto* all_terms = reinterpret_cast<Terms<C>*>(shared + C::TERMS);
  float* scales = reinterpret_cast<float*>(shared + C::SCALES);
  static_assert(sizeof(Terms<C>) == C::TERM_BYTES);

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4, lane_id = threadIdx.x % 32;
  const int rank = C::CLUSTER > 1 ? static_cast<int>(blockIdx.x % C::CLUSTER) : 0;
  const int row_block = blockIdx.x / params.groups, group = blockIdx.x % params.groups;
  const int m0 = row_block * C::BLOCK_M, tiles_n = static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N);
  const int first_tile = tiles_n * group / params.groups, tiles = tiles_n * (group + 1) / params.groups - first_tile;
  const int k_tiles = static_cast<int>((p.k + BLOCK_K - 1) / BLOCK_K);

  // One thread asks for buffers `from` … `to` - 1 of all that this block takes. No state is kept between two calls: it
  // would not fit in the registers beside the rows that are quantized in between.
  const int buffers = tiles * k_tiles, ahead = min(C::STAGES, buffers);
  auto produce = [&](int from, int to) {
    RingPosition<C::STAGES> at;
    at.skip(from);
    int row = (first_tile + from / k_tiles) * C::BLOCK_N, k_tile = from % k_tiles;
#pragma unroll 1
    for (int i = from; i < to; ++i, at.advance()) {
      const int64_t rows = p.n - row;
      const uint32_t barrier = full + at.stage * 8;
      ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
      ptx::mbarrier_arrive_expect(barrier, static_cast<int>(min(rows, int64_t{C::BLOCK_N})) * BLOCK_K);
      ptx::tma_load(base + C::RING + at.stage * C::STAGE_BYTES,
                    rows >= C::BLOCK_N ? &params.out.b.whole : &params.out.b.last, barrier, k_tile * BLOCK_K, row);
      if (++k_tile == k_tiles) k_tile = 0, row += C::BLOCK_N;
    }
  };

  if (warp == 0 && ptx::elect_one()) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 1);  // the producer; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, 1);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(terms_full + i * 8, 32);
      ptx::mbarrier_init(terms_empty + i * 8, 128);
      ptx::mbarrier_init(turn + i * 8, 1);
    }
    ptx::mbarrier_init(rows_full, 1);
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch_map(&params.out.b.whole);
    // The rows of the others in the cluster, and their scales.
    ptx::mbarrier_arrive_expect(rows_full, (C::CLUSTER - 1) * C::SHARE * (k_tiles * BLOCK_K + 4));
  }
  __syncthreads();
  if (C::CLUSTER > 1) ptx::cluster_arrive_relaxed();  // this block's barrier can be used by the others
  // The last warp has the fewest rows, in 401 and 406 none, so that nobody waits for its requests.
  constexpr int FIRST_PRODUCER = C::THREADS / 32 - 1;
  if (p.b_is_constant && warp == FIRST_PRODUCER && ptx::elect_one()) produce(0, ahead);
  // The terms of all tiles, into L2 alone, so that nobody waits here. Asked for after the rows, from a cold memory, they
  // cost a layer 2 – 7 % more; brought to shared memory here, 11 – 14 %, because the warp's rows came later.
  if (warp == 1 && p.b_is_constant) {
    for (int64_t n = int64_t{first_tile} * C::BLOCK_N + lane_id * 32;
         n < min(p.n, int64_t{first_tile + tiles} * C::BLOCK_N); n += 32 * 32) {
      ptx::prefetch_l2(p.scale_n + n);
      if (p.bias) ptx::prefetch_l2(static_cast<const uint8_t*>(p.bias) + n * (p.bias_dtype == DType::kFloat32 ? 4 : 2));
    }
  }
  __syncwarp();
  if (C::CLUSTER > 1) ptx::cluster_wait();  // the others have started
  ptx::grid_wait();
  ptx::grid_release();
  if (!p.b_is_constant && warp == FIRST_PRODUCER && ptx::elect_one()) produce(0, ahead);

  {
    const int first = rank * C::SHARE;
    // The same bytes to all others of the cluster.
    auto copy_to_others = [&](uint32_t from, int bytes) {
#pragma unroll 1
      for (int other = 1; other < C::CLUSTER; ++other) {
        const int to = (rank + other) % C::CLUSTER;
        ptx::bulk_copy_to_block(ptx::cluster_address(from, to), from, bytes, ptx::cluster_address(rows_full, to));
      }
    };
    // Each warp sends its own rows: the network is busy while other rows are still on their way from memory.
    auto send = [&](int row, int count) {
      __syncwarp();
      if (C::CLUSTER > 1 && ptx::elect_one()) {
#pragma unroll 1
        for (int k = 0; k < k_tiles; ++k) copy_to_others(base + k * C::TILE_A + row * BLOCK_K, count * BLOCK_K);
      }
      __syncwarp();
    };
    auto quantize_as = [&](auto type) {
      using T = decltype(type);
      if (params.rows_whole) return quantize_rows<C, T, true>(params, shared, scales, m0, first, send);
      return quantize_rows<C, T, false>(params, shared, scales, m0, first, send);
    };
    switch (params.x_dtype) {
      case DType::kFloat16: quantize_as(__half{}); break;
      case DType::kBFloat16: quantize_as(__nv_bfloat16{}); break;
      default: quantize_as(float{}); break;
    }
    ptx::fence_proxy_async();  // of the scales
    __syncthreads();
    if (C::CLUSTER > 1 && warp == 0 && ptx::elect_one()) copy_to_others(base + C::SCALES + first * 4, C::SHARE * 4);
    __syncwarp();
  }

  if (warpgroup == 0) {
    if constexpr (C::MOVES_REGISTERS) ptx::setmaxnreg_dec<C::FOR_PRODUCER>();
    if (C::CLUSTER > 1) ptx::cluster_arrive_relaxed();
    if (warp == 0) {
      if (ptx::elect_one()) produce(ahead, buffers);
    } else if (warp == 1) {
      int buffer = 0;
      uint32_t parity = 0;
      for (int i = 0; i < tiles; ++i) {
        const int n0 = (first_tile + i) * C::BLOCK_N;
        ptx::mbarrier_wait(terms_empty + buffer * 8, parity ^ 1);
        Terms<C>& terms = all_terms[buffer];
#pragma unroll 2
        for (int j = 0; j < C::BLOCK_N / 32; ++j)
          terms.columns[j * 32 + lane_id] = column_terms(p, n0 + j * 32 + lane_id);
        if (lane_id == 0) terms.n0 = n0;
        ptx::mbarrier_arrive(terms_full + buffer * 8);
        if (++buffer == 2) buffer = 0, parity ^= 1;
      }
    }
  } else {
    if constexpr (C::MOVES_REGISTERS) ptx::setmaxnreg_inc<C::CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    const bool leader = threadIdx.x % 128 == 0;
    uint8_t* staging = shared + C::STAGING + consumer * kSm90BoxBytes;
    RingPosition<C::STAGES> ring;
    if (C::TURNS && consumer == 1) ring.skip(k_tiles);
    if (C::CLUSTER > 1) {
      ptx::mbarrier_wait(rows_full, 0);
      __syncwarp();
      ptx::cluster_arrive_relaxed();  // this block has what it gets from the others
    }
    int previous = 0;  // the buffer of the step before
    int i = C::TURNS ? consumer : 0;
    for (uint32_t round = 0; i < tiles; i += C::TURNS ? 2 : 1, ++round) {
      // NOTE: a wait on a buffer only tells odd fills from even ones, so the consumer whose tile is the next must not
      // look before the other one has seen all of its own.
      if (C::TURNS) ptx::mbarrier_wait(turn + consumer * 8, (round & 1) ^ (consumer == 0));
      int32_t acc[C::MMAS_M][C::ACCUMULATORS];
      // Invariant: on entry to step k the wgmmas of step k - 1 may still run; its buffer is not yet released.
      for (int k = 0; k < k_tiles; ++k) {
        ptx::mbarrier_wait(full + ring.stage * 8, ring.parity);
        const uint64_t a = ptx::wgmma_descriptor(base + k * C::TILE_A);
        const uint64_t b = ptx::wgmma_descriptor(base + C::RING + ring.stage * C::STAGE_BYTES);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK_K / MMA_K; ++step)
#pragma unroll
          for (int part = 0; part < C::MMAS_M; ++part)
            ptx::wgmma_m64k32_s8(acc[part], a + (part * MMA_M * BLOCK_K + step * MMA_K) / 16, b + step * MMA_K / 16,
                                 k > 0 || step > 0);
        ptx::wgmma_commit();
        if (k > 0) {
          ptx::wgmma_wait<1>();
          if (leader) ptx::mbarrier_arrive(empty + previous * 8);
        }
        previous = ring.stage;
        ring.advance();
      }
      if (C::TURNS && leader) ptx::mbarrier_arrive(turn + (consumer ^ 1) * 8);

      uint32_t thread = threadIdx.x % 128;
      ptx::opaque(thread);  // nothing that the epilogue derives from it takes registers in the main loop
      const int warp_id = thread / 32, lane = thread % 32;
      const int buffer = i & 1;
      ptx::mbarrier_wait(terms_full + buffer * 8, i >> 1 & 1);
      const Terms<C>& terms = all_terms[buffer];
      Part parts[C::MMAS_M];
#pragma unroll
      for (int part = 0; part < C::MMAS_M; ++part) {
        const int row = part * MMA_M + warp_id * 16;
        parts[part] = {m0 + row, terms.n0, C::BLOCK_N, {scales[row + lane / 4], scales[row + lane / 4 + 8]}};
      }
      ptx::wgmma_wait<0>();
      if (leader) ptx::mbarrier_arrive(empty + previous * 8);
      const float unused[C::BLOCK_N / 4] = {};  // for consumers that share boxes
      store<C>(params.out, acc, parts, unused, terms.columns, staging, thread, 0, consumer);
      __syncwarp();
      ptx::mbarrier_arrive(terms_empty + buffer * 8);  // every thread, as in gemm_sm90.cu
      if (C::TURNS) ring.skip(k_tiles);  // the other consumer's tile
    }
  }
  __syncwarp();
  if (C::CLUSTER > 1) ptx::cluster_wait();  // the others have what they get from here
#endif
}

template <typename C>
Status launch_config(const Linear& l, const GemmConfig& config, int sm_count, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Params params{};
  Gemm& p = params.out.gemm;
  p = {nullptr, l.weight, nullptr, l.weight_scale, l.bias,    l.y,          0,          l.ldb, l.ldy,
       l.m,     l.n,      l.k,     l.bias_dtype,   l.y_dtype, l.activation, l.residual, l.ldr, l.residual_dtype};
  p.b_is_constant = l.weight_is_constant;
  const int64_t element = size_of(l.y_dtype), x_element = size_of(l.x_dtype), count = 16 / x_element;
  params.out.chunks = l.n % 8 == 0 && l.ldy * element % 16 == 0 && is_aligned(l.y, 16);
  params.x = l.x, params.ldx = l.ldx, params.x_dtype = l.x_dtype;
  params.rows_aligned = is_aligned(l.x, 16) && l.ldx % count == 0;
  params.rows_whole = params.rows_aligned && l.k % count == 0;
  params.groups = linear_sm90_groups(config, l.m, l.n, sm_count);
  if (!make_boxes(&params.out.b, l.weight, l.n, l.k, l.ldb, C::BLOCK_N)) return kTensorMapRefused;
  const int64_t blocks = ceil_div(l.m, C::BLOCK_M) * params.groups;
  if (blocks > INT32_MAX || l.m > INT32_MAX - C::BLOCK_M || l.n > INT32_MAX - C::BLOCK_N)
    return invalid("linear: M x N is too large for one launch");
  return launch<linear_sm90<C>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(C::THREADS), C::SHARED_BYTES, C::CLUSTER, /*overlap=*/true}, stream,
      params);
}

}  // namespace

Status launch_linear_sm90(const Linear& problem, const GemmConfig& config, int sm_count, Stream stream) {
  switch (config.id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, config, sm_count, stream);
    HWKERN_LINEAR_SM90_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("linear: this id is not one of the one-launch kernels");
  }
}

}  // namespace hwkern
