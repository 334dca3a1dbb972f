// INT8 GEMM for Hopper (sm_90a) with few rows of A: D = epilogue(A · Bᵀ), limited by how fast B streams from memory.
//
// Swapped operands: ROWS rows of B are the M side of wgmma and TOKENS rows of A its N side, so that 8 tokens waste
// nothing. The SPLIT blocks of a cluster share one such tile and split K between them; a block's SPLITth of the sums is
// its own to finish. Sums are int32, so their order does not matter: the same bits in every run. More than TOKENS rows of
// A are tiles of equal height, so that no block has more to load than the others.
//
//   producers       two threads fill a ring of STAGES buffers of 128 bytes of K by TMA, one with weights, one with tokens.
//                   Constant weights are requested before the preceding kernel has ended (see Overlap in hwkern.h), the
//                   activations after.
//   consumers       a warpgroup for every 64 rows. Each warp sends the other blocks of the cluster their shares of its sums
//                   straight from registers and adds what it is sent to its own; laid out by token in shared memory, they
//                   are finished with 16-byte stores along N.
//
// Blocks of a row that is PERSISTENT take tile after tile: weights of the next one stream while the last one is finished.
//
// What bounds it is bytes in flight: 3 TB/s × 1.5 µs of loaded latency are 4.5 MB, 34 KB an SM; the rings hold 48 KB and
// more of weights.
#include <algorithm>

#include "core/launch.cuh"
#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "gemm/ring.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/elect.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_K = 32, BLOCK_K = kSm90BlockK;
constexpr int SLAB_ROWS = 16;  // rows of B that one warp of a warpgroup accumulates
constexpr int VECTOR = 8;  // outputs of one token that one thread finishes at a time

template <int ROWS_, int TOKENS_, int SPLIT_, int STAGES_, int BLOCKS_, int RELEASE_, bool PERSISTENT_>
struct Config {
  static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, SPLIT = SPLIT_;
  static constexpr int STAGES = STAGES_, BLOCKS_PER_SM = BLOCKS_;
  static constexpr int RELEASE = RELEASE_;
  static constexpr bool PERSISTENT = PERSISTENT_;
  static constexpr int CONSUMERS = ROWS / 64, WARPS = CONSUMERS * 4, CONSUMER_THREADS = WARPS * 32;
  // A wgmma and a box of the copy engine take at most 256 tokens: more are two of half the width.
  static constexpr int MMAS = TOKENS > 256 ? 2 : 1, MMA_N = TOKENS / MMAS;
  // Those sums want registers that the other threads give up: a whole warpgroup then, of which two warps produce.
  static constexpr bool WIDE = MMAS > 1;
  static constexpr int THREADS = CONSUMER_THREADS + (WIDE ? 128 : 64);
  static constexpr int BYTES_B = ROWS * BLOCK_K, BYTES_A = TOKENS * BLOCK_K, STAGE_BYTES = BYTES_B + BYTES_A;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;

  // A block's part of the sums: TOKENS / SPLIT tokens of all rows while that is whole groups of 8; else all tokens of
  // some warps' rows.
  static constexpr bool BY_TOKEN = TOKENS / 8 % SPLIT == 0;
  static constexpr int PART_TOKENS = BY_TOKEN ? TOKENS / SPLIT : TOKENS;
  static constexpr int PART_SLABS = BY_TOKEN ? WARPS : WARPS / SPLIT;
  static constexpr int PART_EIGHTS = PART_TOKENS / 8;
  static constexpr int PIECE_BYTES = PART_TOKENS * SLAB_ROWS * 4;

  // The block's own sums: over the ring when it is done, or beside it.
  static constexpr int STAGING_BYTES = ROWS * TOKENS * 4, STAGING = PERSISTENT ? RING_BYTES : 0;
  static constexpr int RECEIVE_BYTES = sm90_split_receive_bytes(ROWS, TOKENS, SPLIT);
  static constexpr bool OWN_RECEIVE = sm90_split_own_receive(ROWS, TOKENS, SPLIT, STAGES, BLOCKS_PER_SM, PERSISTENT);
  static constexpr int RECEIVE =
      OWN_RECEIVE ? (RING_BYTES > STAGING_BYTES ? RING_BYTES : STAGING_BYTES) : STAGING_BYTES;
  static constexpr int TERMS =
      sm90_split_data_bytes(ROWS, TOKENS, SPLIT, STAGES, BLOCKS_PER_SM, PERSISTENT);  // offset of the scales
  static constexpr int BARRIERS = TERMS + TOKENS * 4 + ROWS * kColumnTermBytes;
  static constexpr int SHARED_BYTES = sm90_split_shared_bytes(ROWS, TOKENS, SPLIT, STAGES, BLOCKS_PER_SM, PERSISTENT);

  static_assert(RELEASE > 0, "a block that never says so holds the next launch back until it ends");
  static_assert(ROWS % 64 == 0 && TOKENS % (8 * MMAS) == 0 && TOKENS <= 384);
  static_assert(WARPS % SPLIT == 0 && SPLIT <= 8);
  static_assert(!PERSISTENT || (SPLIT == 1 && !WIDE));
  static_assert(!WIDE || (CONSUMERS == 2 && SPLIT == 1 && BLOCKS_PER_SM == 1));
  static_assert(RECEIVE_BYTES == (SPLIT - 1) * PART_SLABS * PIECE_BYTES);
  static_assert(CONSUMER_THREADS % (8 * PART_SLABS) == 0, "a thread keeps its columns from token to token");
  static_assert(BLOCKS_PER_SM * (SHARED_BYTES + 1024) <= kSmSharedBytes);
};

struct Params {
  Boxes weights, tokens;
  Gemm gemm;
  int tile_tokens, box_tokens;  // of a token tile, and of each box of one: all but the last have as many
  int tiles_m, tiles, k_tiles;
};

// The first row and token of a tile, and how many there are of both: the last tile's boxes end with the matrices.
struct Tile {
  int row0, token0, rows, tokens;
};

// Where the sum of (token, row) of a warp's slab lies, in words. The exclusive-or stays inside two tokens' 128 bytes and
// keeps 4 rows together. It spreads over all banks the lanes of a fragment's store (8 rows of every second token of 8)
// and each 8 lanes that load 16 bytes (every second 4 rows of 4 tokens).
__device__ __forceinline__ int slab_word(int token, int row) {
  const int key = token >> 1 & 3;
  return (token * SLAB_ROWS + row) ^ (key * 8 + (key & 1) * 4);
}

// What a thread finishes of its block's part: VECTOR columns of D from `n` on, of the tokens token, token + TOKEN_STEP, …
// below `tokens`. The sums of all the part's tokens in these columns lie in `slab`; `scale_m` and m0 belong to the part's
// first token, `columns` to n.
template <typename C>
struct Share {
  const int32_t* slab;
  const float* scale_m;
  const float2* columns;
  int64_t m0, n;
  int token, tokens, half;

  static constexpr int TOKEN_STEP = C::CONSUMER_THREADS / (8 * C::PART_SLABS) * 4;

  __device__ __forceinline__ void load(int t, int32_t (&sums)[VECTOR]) const {
#pragma unroll
    for (int v = 0; v < VECTOR; v += 4)
      *reinterpret_cast<int4*>(&sums[v]) = *reinterpret_cast<const int4*>(slab + slab_word(t, half * VECTOR + v));
  }

  template <typename T>
  __device__ __forceinline__ void store(const Gemm& p) const {
    constexpr int PACK = 16 / sizeof(T);  // elements of one 16-byte store
    float2 terms[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) terms[v] = columns[v];
    const bool vectors = p.ldd % PACK == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0 && n + VECTOR <= p.n;
    T* d = static_cast<T*>(p.d) + n;
#pragma unroll 2
    for (int t = token; t < tokens; t += TOKEN_STEP) {
      alignas(16) int32_t sums[VECTOR];
      load(t, sums);
      alignas(16) T values[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; v += 2)
        finish<T>(&values[v], sums[v], sums[v + 1], scale_m[t], terms[v], terms[v + 1]);
      T* out = d + (m0 + t) * p.ldd;
      if (vectors) {
#pragma unroll
        for (int v = 0; v < VECTOR; v += PACK)
          *reinterpret_cast<Vector<T, PACK>*>(out + v) = *reinterpret_cast<const Vector<T, PACK>*>(&values[v]);
      } else {
#pragma unroll
        for (int v = 0; v < VECTOR; ++v)
          if (n + v < p.n) out[v] = values[v];
      }
    }
  }

  __device__ __forceinline__ void store_with_options(const Gemm& p) const {
    const float inverse = inverse_d_scale(p);
#pragma unroll 1
    for (int t = token; t < tokens; t += TOKEN_STEP) {
      alignas(16) int32_t sums[VECTOR];
      load(t, sums);
      float y[VECTOR];
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) y[v] = scaled(sums[v], scale_m[t], columns[v]);
      finish_row(p, y, m0 + t, n, inverse);
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) gemm_sm90_split(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const Gemm& p = params.gemm;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + C::BARRIERS, empty = full + C::STAGES * 8;
  const uint32_t received = empty + C::STAGES * 8;  // the other blocks' sums of this block's share
  const uint32_t ready = received + 8;  // every block of the cluster is done with its ring
  const int warp_id = threadIdx.x / 32, lane_id = threadIdx.x % 32;

  const int rank = C::SPLIT > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int first_tile = blockIdx.x / C::SPLIT, stride = gridDim.x;
  auto tile_at = [&](int tile) {
    // All token tiles of a row tile follow each other, so that memory is read once. Few tokens need no division.
    const int row_tile = params.tiles_m == 1 ? tile : tile / params.tiles_m;
    const int row0 = row_tile * C::ROWS, token0 = (tile - row_tile * params.tiles_m) * params.tile_tokens;
    return Tile{row0, token0, static_cast<int>(min(p.n - row0, int64_t{C::ROWS})),
                static_cast<int>(min(p.m - token0, int64_t{params.tile_tokens}))};
  };
  auto another = [&](int& tile) { return C::PERSISTENT && (tile += stride) < params.tiles; };
  const int k_first = params.k_tiles * rank / C::SPLIT, k_count = params.k_tiles * (rank + 1) / C::SPLIT - k_first;

  if (warp_id == C::WARPS && ptx::elect_one()) {
    for (int s = 0; s < C::STAGES; ++s) {
      ptx::mbarrier_init(full + s * 8, 2);  // the producers; the rest is bytes
      ptx::mbarrier_init(empty + s * 8, C::CONSUMERS);
    }
    ptx::mbarrier_init(received, 1);
    ptx::mbarrier_init(ready, C::SPLIT);
    ptx::mbarrier_init_fence();
    if (C::SPLIT > 1) ptx::mbarrier_arrive_expect(received, C::RECEIVE_BYTES);
  }
  __syncthreads();
  if (C::SPLIT > 1) ptx::cluster_arrive_relaxed();  // this block's barriers can be used by the others

  if (warp_id >= C::WARPS) {
    if (C::WIDE) ptx::setmaxnreg_dec<24>();
    RingPosition<C::STAGES> at;
    // NOTE: the time that these threads take for a step bounds the kernel where steps are short. One thread for both
    // operands, not elected (see elect_one), took 0.2 – 0.3 µs a step.
    if (warp_id == C::WARPS && ptx::elect_one()) {
      if (!p.b_is_constant) ptx::grid_wait();
      int index = first_tile;
      do {
        const Tile tile = tile_at(index);
        const CUtensorMap* map = tile.rows < C::ROWS ? &params.weights.last : &params.weights.whole;
#pragma unroll 1
        for (int i = 0; i < k_count; ++i, at.advance()) {
          const uint32_t barrier = full + at.stage * 8, smem = base + at.stage * C::STAGE_BYTES;
          ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
          ptx::mbarrier_arrive_expect(barrier, tile.rows * BLOCK_K);
          if (params.tiles_m == 1) {
            ptx::tma_load_once(smem, map, barrier, (k_first + i) * BLOCK_K, tile.row0);
          } else {
            ptx::tma_load(smem, map, barrier, (k_first + i) * BLOCK_K, tile.row0);
          }
        }
      } while (another(index));
    } else if (warp_id == C::WARPS + 1 && ptx::elect_one()) {
      ptx::tma_prefetch_map(&params.tokens.whole);
      ptx::grid_wait();
      const int tiles = C::PERSISTENT ? (params.tiles - first_tile - 1) / stride + 1 : 1;
      int left = k_count * tiles;  // steps to ask for
      if (left < C::RELEASE) ptx::grid_release();
      int index = first_tile;
      do {
        const Tile tile = tile_at(index);
        auto map_of = [&](int box) {
          return tile.tokens - box * C::MMA_N < params.box_tokens ? &params.tokens.last : &params.tokens.whole;
        };
#pragma unroll 1
        for (int i = 0; i < k_count; ++i, at.advance()) {
          const uint32_t barrier = full + at.stage * 8, smem = base + at.stage * C::STAGE_BYTES + C::BYTES_B;
          if (left-- == C::RELEASE) ptx::grid_release();
          ptx::mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
          ptx::mbarrier_arrive_expect(barrier, tile.tokens * BLOCK_K);
          ptx::tma_load(smem, map_of(0), barrier, (k_first + i) * BLOCK_K, tile.token0);
          if (C::WIDE && tile.tokens > C::MMA_N)
            ptx::tma_load(smem + C::MMA_N * BLOCK_K, map_of(1), barrier, (k_first + i) * BLOCK_K,
                          tile.token0 + C::MMA_N);
        }
      } while (another(index));
    }
    __syncwarp();
    if (C::SPLIT > 1) ptx::cluster_wait();
    return;
  }

  if (C::WIDE) ptx::setmaxnreg_inc<232>();
  RingPosition<C::STAGES> at;
  int index = first_tile;
  do {
    const Tile tile = tile_at(index);
    // Asked for here and waited for after the main loop.
    float2 my_column{};
    float my_scales[(C::TOKENS - 1) / C::CONSUMER_THREADS + 1];
    if (!p.b_is_constant) ptx::grid_wait();
    if (threadIdx.x < C::ROWS) my_column = column_terms(p, tile.row0 + threadIdx.x);
    if (p.b_is_constant) ptx::grid_wait();
#pragma unroll
    for (int t = 0; t < C::TOKENS; t += C::CONSUMER_THREADS)
      my_scales[t / C::CONSUMER_THREADS] =
          t + threadIdx.x < C::TOKENS ? row_scale(p, tile.token0 + t + threadIdx.x) : 0;

    // NOTE: not zeroed here for a block that gets nothing of a short K: ptxas then serialises the wgmmas (C7515).
    int32_t acc[C::MMAS][C::MMA_N / 2];
    // Invariant: on entry to step i the wgmmas of step i - 1 may still run; its buffer is not yet released.
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
#pragma unroll
        for (int j = 0; j < C::MMAS; ++j)
          ptx::wgmma_m64k32_s8(acc[j], a + step * MMA_K / 16, b + (j * C::MMA_N * BLOCK_K + step * MMA_K) / 16,
                               i > 0 || step > 0);
      ptx::wgmma_commit();
      if (i > 0) {
        ptx::wgmma_wait<1>();
        if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + previous * 8);
      }
      previous = at.stage;
      at.advance();
    }
    ptx::wgmma_wait<0>();
    if (C::PERSISTENT) {
      if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive(empty + previous * 8);
      ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // the tile before is finished
    }
    float* scale_m = reinterpret_cast<float*>(shared + C::TERMS);
    float2* columns = reinterpret_cast<float2*>(shared + C::TERMS + C::TOKENS * 4);
    if (threadIdx.x < C::ROWS) columns[threadIdx.x] = my_column;
#pragma unroll
    for (int t = 0; t < C::TOKENS; t += C::CONSUMER_THREADS)
      if (t + threadIdx.x < C::TOKENS) scale_m[t + threadIdx.x] = my_scales[t / C::CONSUMER_THREADS];

    // D's fragment of a warp: lane (group, pair) holds rows group, group + 8 of tokens pair, pair + 1 of every 8. Sums travel
    // as they lie in registers, 16 bytes a lane and 8 tokens.
    auto sums_of = [&](int eight) {
      const int32_t* of = &acc[eight * 8 / C::MMA_N][eight * 8 % C::MMA_N / 2];
      return k_count > 0 ? int4{of[0], of[1], of[2], of[3]} : int4{};
    };
    const int part_warp = warp_id % C::PART_SLABS;
    if (C::SPLIT > 1) {
      ptx::cluster_wait();  // the others have started
      if (!C::OWN_RECEIVE) {
        ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // the ring is free
        if (threadIdx.x < C::SPLIT) ptx::mbarrier_arrive_cluster(ready, threadIdx.x);
        ptx::mbarrier_wait(ready, 0);
      }
      // To each block those that it finishes; a block keeps a slot for each of the others.
#pragma unroll
      for (int to = 0; to < C::SPLIT; ++to) {
        if (to == rank || (!C::BY_TOKEN && to != warp_id / C::PART_SLABS)) continue;
        const int slot = rank < to ? rank : rank - 1;
        const uint32_t target = ptx::cluster_address(
            base + C::RECEIVE + (slot * C::PART_SLABS + part_warp) * C::PIECE_BYTES + lane_id * 16, to);
#pragma unroll
        for (int j = 0; j < C::PART_EIGHTS; ++j)
          ptx::store_to_block(target + j * 512, ptx::cluster_address(received, to),
                              sums_of((C::BY_TOKEN ? to * C::PART_EIGHTS : 0) + j));
      }
    }
    if (!C::PERSISTENT && (C::SPLIT == 1 || C::OWN_RECEIVE))
      ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // the ring is free
    if (C::SPLIT > 1) ptx::mbarrier_wait(received, 0);
    int32_t* staging = reinterpret_cast<int32_t*>(shared + C::STAGING);
    int32_t* warp_slab = staging + part_warp * C::PART_TOKENS * SLAB_ROWS;
    const int group = lane_id / 4, pair = lane_id % 4 * 2;
#pragma unroll
    for (int part = 0; part < C::SPLIT; ++part) {
      if (part != (C::BY_TOKEN ? rank : 0) || (!C::BY_TOKEN && warp_id / C::PART_SLABS != rank)) continue;
#pragma unroll
      for (int j = 0; j < C::PART_EIGHTS; ++j) {
        int4 sum = sums_of(part * C::PART_EIGHTS % (C::TOKENS / 8) + j);
#pragma unroll
        for (int slot = 0; slot < C::SPLIT - 1; ++slot) {
          const int4 other = *reinterpret_cast<const int4*>(
              shared + C::RECEIVE + (slot * C::PART_SLABS + part_warp) * C::PIECE_BYTES + j * 512 + lane_id * 16);
          sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
        }
        int32_t* eight = warp_slab + j * 8 * SLAB_ROWS;
        eight[slab_word(pair, group)] = sum.x;
        eight[slab_word(pair + 1, group)] = sum.y;
        eight[slab_word(pair, group + 8)] = sum.z;
        eight[slab_word(pair + 1, group + 8)] = sum.w;
      }
    }
    ptx::named_barrier_sync<1, C::CONSUMER_THREADS>();  // the sums of the block's part lie there

    // 8 lanes take 4 tokens of 16 columns, neighbouring groups of 8 neighbouring columns.
    const int slab = threadIdx.x / 8 % C::PART_SLABS, half = threadIdx.x % 2;
    const int slab0 = C::BY_TOKEN ? 0 : rank * C::PART_SLABS, first_token = C::BY_TOKEN ? rank * C::PART_TOKENS : 0;
    const int column = (slab0 + slab) * SLAB_ROWS + half * VECTOR;
    const Share<C> mine{staging + slab * C::PART_TOKENS * SLAB_ROWS,
                        scale_m + first_token,
                        columns + column,
                        tile.token0 + first_token,
                        tile.row0 + column,
                        static_cast<int>(threadIdx.x / (8 * C::PART_SLABS) * 4 + threadIdx.x / 2 % 4),
                        min(tile.tokens - first_token, C::PART_TOKENS),
                        half};
    if (has_options(p)) {
      mine.store_with_options(p);
    } else {
      switch (p.d_dtype) {
        case DType::kFloat32: mine.template store<float>(p); break;
        case DType::kFloat16: mine.template store<__half>(p); break;
        case DType::kBFloat16: mine.template store<__nv_bfloat16>(p); break;
        default: mine.template store<int32_t>(p); break;
      }
    }
  } while (another(index));
#endif
}

template <typename C>
Status launch_config(const Gemm& p, int sm_count, Stream stream) {
  if (!encode_tiled()) return kNoTensorMaps;
  Params params;
  params.gemm = p;
  params.tiles_m = static_cast<int>(ceil_div(p.m, C::TOKENS));
  params.tile_tokens = C::WIDE ? C::TOKENS : static_cast<int>(ceil_div(p.m, params.tiles_m));
  params.box_tokens = C::WIDE ? C::MMA_N : params.tile_tokens;
  if (!make_boxes(&params.weights, p.b, p.n, p.k, p.ldb, C::ROWS) ||
      !make_boxes(&params.tokens, p.a, p.m, p.k, p.lda, params.box_tokens))
    return kTensorMapRefused;
  params.k_tiles = static_cast<int>(ceil_div(p.k, BLOCK_K));
  const int64_t tiles = params.tiles_m * ceil_div(p.n, C::ROWS), slots = int64_t{sm_count} * C::BLOCKS_PER_SM;
  const int64_t blocks = (C::PERSISTENT ? std::min(tiles, slots) : tiles) * C::SPLIT;
  if (tiles * C::SPLIT > INT32_MAX - slots) return invalid("gemm: M x N is too large for one launch");
  params.tiles = static_cast<int>(tiles);
  return launch<gemm_sm90_split<C>>(
      {dim3(static_cast<unsigned>(blocks)), dim3(C::THREADS), C::SHARED_BYTES, C::SPLIT, p.overlap}, stream, params);
}

}  // namespace

Status launch_gemm_sm90_split(const Gemm& problem, int config_id, int sm_count, Stream stream) {
  switch (config_id) {
#define HWKERN_CASE(ID, ...) \
  case ID: return launch_config<Config<__VA_ARGS__>>(problem, sm_count, stream);
    HWKERN_SM90_SPLIT_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("gemm: this id is not one of the sm90 split-K kernels");
  }
}

}  // namespace hwkern
