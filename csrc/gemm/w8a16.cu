// Weight-only linear for sm_80 and newer: y = epilogue(x · Wᵀ), x in 16 bits and W in int8, with mma.sync m16n8k16 (see
// hwkern.h for shapes and rounding).
//
// For few tokens the time is that of reading the weights once, so everything serves the stream of weights:
//   - Weight rows are the mma's 16-row side (A) and tokens its 8-column side (B): one token wastes no memory traffic.
//   - A lane copies with cp.async the 16 bytes that it will multiply itself: row g of 16, bytes 16·t … 16·t + 15 of a
//     64-byte step, for lane 4·g + t. Shared memory is a queue of STAGES steps private to each lane, so that the main
//     loop has no barrier at all. The order of k in a sum is free as long as both operands agree: word s of the 16 bytes
//     goes into the s-th of four mma's, and x[k + 4·s … k + 4·s + 3] beside it, which a lane finds in 32 bytes of x.
//   - The block's warps share K, and so do the CLUSTER blocks of a cluster (Hopper), so that few rows a block keep every
//     SM busy and x is read once a block. Their sums are added in a fixed order: the same bits in every run.
//   - Blocks are persistent: the queue runs ahead into the next tile while the sums of the last one are added. Launched
//     with overlap it is filled with weights before the preceding kernel has ended.
//
// int8 to 16 bits, two weights in 2.5 instructions: u = w + 128 (one xor for four), a byte permutation that puts u in
// the low mantissa bits, one fused multiply-add. In float16 0x6400 + u is 1024 + u. In bfloat16, with 7 bits of mantissa,
// 0x0000 + u is the subnormal u · 2⁻¹³³ (exactly, also for u >= 128: subnormals and the first normal binade have the same
// spacing); times 2¹²⁷ minus 2 that is w · 2⁻⁶, and the epilogue multiplies by 64.
#include "core/activation.cuh"
#include "core/float_types.cuh"
#include "core/launch.cuh"
#include "gemm/w8a16.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
constexpr int CHUNK = 16;                      // bytes of a weight row that one lane takes of a step
constexpr int STEP = kW8A16StepBytes;          // bytes of a weight row that a warp takes at once
constexpr int STEP_MMAS = STEP / MMA_K;

template <typename X_, int BLOCK_M_, int BLOCK_N_, int WARPS_N_, int WARPS_K_, int STAGES_, int CLUSTER_, int BLOCKS_>
struct Config {
  using X = X_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
  static constexpr int STAGES = STAGES_, CLUSTER = CLUSTER_, BLOCKS_PER_SM = BLOCKS_;

  static constexpr int WARPS = WARPS_N * WARPS_K, THREADS = WARPS * 32;
  static constexpr int WARP_N = BLOCK_N / WARPS_N;
  static constexpr int MMAS_W = WARP_N / MMA_M, MMAS_X = BLOCK_M / MMA_N;
  static constexpr int SLICES = CLUSTER * WARPS_K;  // warps that share the K of one row

  static constexpr int STAGE_BYTES = WARP_N * STEP;  // of one warp
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
  static constexpr int PIECE = BLOCK_M < kW8A16PieceTokens ? BLOCK_M : kW8A16PieceTokens;
  static constexpr int PITCH = w8a16_pitch(BLOCK_N);
  static constexpr int PARTIAL_BYTES = WARPS_K * PIECE * PITCH * 4;
  static constexpr int EXCHANGE_BYTES = CLUSTER > 1 ? BLOCK_M * BLOCK_N * 4 : 0;  // of one of the two
  static constexpr int OWN_ROWS = BLOCK_N / CLUSTER;  // rows of the tile that one block of the cluster finishes
  static constexpr int TERMS_BYTES = BLOCK_N * 8;  // of one of the two
  static constexpr int SHARED_BYTES = w8a16_shared_bytes(BLOCK_M, BLOCK_N, WARPS_K, STAGES, CLUSTER);

  static_assert(MMAS_W * MMA_M == WARP_N && MMAS_X * MMA_N == BLOCK_M && BLOCK_M % PIECE == 0 && PIECE % MMA_N == 0);
  static_assert(SLICES >= WARPS_K && STAGES >= 2);
  static_assert(BLOCK_N <= THREADS && OWN_ROWS % 4 == 0, "four rows of a token go to one block at once");
  static_assert(RING_BYTES + PARTIAL_BYTES + 2 * EXCHANGE_BYTES + 2 * TERMS_BYTES + 16 == SHARED_BYTES);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMaxCluster = 1;
#else
constexpr int kMaxCluster = 16;
#endif

// Four weights, k in order, as the two registers of an A fragment.
__device__ __forceinline__ void widen(__half, uint32_t w, uint32_t* low, uint32_t* high) {
  const uint32_t u = w ^ 0x80808080u;
  const __half2 bias = __float2half2_rn(1152.0f);
  uint32_t words[2] = {__byte_perm(u, 0x64646464u, 0x4140), __byte_perm(u, 0x64646464u, 0x4342)};
  __half2* pairs = reinterpret_cast<__half2*>(words);
  pairs[0] = __hsub2(pairs[0], bias);
  pairs[1] = __hsub2(pairs[1], bias);
  *low = words[0], *high = words[1];
}
__device__ __forceinline__ void widen(__nv_bfloat16, uint32_t w, uint32_t* low, uint32_t* high) {
  const uint32_t u = w ^ 0x80808080u;
  const __nv_bfloat162 scale = __nv_bfloat162(__ushort_as_bfloat16(0x7f00), __ushort_as_bfloat16(0x7f00));  // 2¹²⁷
  const __nv_bfloat162 bias = __nv_bfloat162(__ushort_as_bfloat16(0xc000), __ushort_as_bfloat16(0xc000));   // -2
  uint32_t words[2] = {__byte_perm(u, 0, 0x4140), __byte_perm(u, 0, 0x4342)};
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(words);
  pairs[0] = __hfma2(pairs[0], scale, bias);
  pairs[1] = __hfma2(pairs[1], scale, bias);
  *low = words[0], *high = words[1];
}

// What `widen` has divided the weights by.
__device__ __forceinline__ float widen_unit(__half) { return 1.0f; }
__device__ __forceinline__ float widen_unit(__nv_bfloat16) { return 64.0f; }

// This lane's 16 values of x for each of the warp's MMAS_X groups of 8 tokens, in the order of k; zeros past K and M.
// `row`: x[token, 0] of the lane's token in the first group. `tokens`: how many tokens there are from that one on.
template <int MMAS_X>
struct Activations {
  uint4 v[MMAS_X][2];

  template <typename X>
  __device__ __forceinline__ void load(const X* row, int64_t ldx, int tokens, int k, int k_end, bool aligned) {
#pragma unroll
    for (int j = 0; j < MMAS_X; ++j) {
      const X* from = row + j * MMA_N * ldx + k;
      v[j][0] = v[j][1] = uint4{0, 0, 0, 0};
      if (j * MMA_N >= tokens || k >= k_end) continue;
      if (aligned && k + CHUNK <= k_end) {
        v[j][0] = reinterpret_cast<const uint4*>(from)[0];
        v[j][1] = reinterpret_cast<const uint4*>(from)[1];
      } else {
        const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
        uint32_t* words = reinterpret_cast<uint32_t*>(v[j]);
#pragma unroll
        for (int e = 0; e < CHUNK; ++e)
          if (k + e < k_end) words[e / 2] |= uint32_t(bits[e]) << (e % 2 * 16);
      }
    }
  }
  // The two B registers of mma `s` of the step.
  __device__ __forceinline__ uint32_t low(int j, int s) const { return s % 2 == 0 ? v[j][s / 2].x : v[j][s / 2].z; }
  __device__ __forceinline__ uint32_t high(int j, int s) const { return s % 2 == 0 ? v[j][s / 2].y : v[j][s / 2].w; }
};

// `sum` to y[m, n]; `terms`: weight_scale and bias of column n.
__device__ __forceinline__ void finish(const WeightOnlyLinear& p, int64_t m, int64_t n, float sum, float2 terms) {
  float y = __fadd_rn(__fmul_rn(sum, terms.x), terms.y);
  if (p.activation != Activation::kNone) y = activate(p.activation, y);
  if (p.residual) y = __fadd_rn(y, load_float(p.residual, p.residual_dtype, m * p.ldr + n));
  const int64_t i = m * p.ldy + n;
  switch (p.y_dtype) {
    case DType::kFloat16: static_cast<__half*>(p.y)[i] = from_float<__half>(y); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(p.y)[i] = from_float<__nv_bfloat16>(y); break;
    default: static_cast<float*>(p.y)[i] = y;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) w8a16(const __grid_constant__ WeightOnlyLinear p) {
  using X = typename C::X;
  if constexpr (C::CLUSTER <= kMaxCluster) {
    extern __shared__ __align__(128) uint8_t smem[];
    float* partials = reinterpret_cast<float*>(smem + C::RING_BYTES);
    uint8_t* exchange = smem + C::RING_BYTES + C::PARTIAL_BYTES;
    float2* all_terms = reinterpret_cast<float2*>(exchange + 2 * C::EXCHANGE_BYTES);
    const uint32_t barriers = ptx::shared_address(all_terms + 2 * C::BLOCK_N);

    const int thread = threadIdx.x, lane_id = thread % 32, warp_id = thread / 32;
    const int warp_n = warp_id % C::WARPS_N, warp_k = warp_id / C::WARPS_N;
    const int group = lane_id / 4, quad = lane_id % 4;
    const int rank = C::CLUSTER > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
    const int first_tile = blockIdx.x / C::CLUSTER, tile_step = gridDim.x / C::CLUSTER;

    const int tiles_m = static_cast<int>((p.m + C::BLOCK_M - 1) / C::BLOCK_M);
    const int tiles = tiles_m * static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N);
    const int own_tiles = (tiles - first_tile + tile_step - 1) / tile_step;
    // Every warp takes the same number of steps of a tile, those past K as zeros.
    constexpr int STRIDE = STEP * C::SLICES;
    const int k_end = static_cast<int>(p.k), steps = (k_end + STRIDE - 1) / STRIDE;
    const int k_first = (rank * C::WARPS_K + warp_k) * STEP + quad * CHUNK;
    const int total = own_tiles * steps;

    if constexpr (C::CLUSTER > 1) {
      if (thread == 0) {
        ptx::mbarrier_init(barriers, 1);
        ptx::mbarrier_init(barriers + 8, 1);
        ptx::mbarrier_init_fence();
      }
      ptx::cluster_arrive_relaxed();
    }

    // The queue: slot `stage` of this lane, chunk c at 512·c. Loads run STAGES - 1 steps ahead of the multiplication.
    const uint32_t queue = ptx::shared_address(smem) + warp_id * C::STAGES * C::STAGE_BYTES + lane_id * CHUNK;
    int load_tile = first_tile, load_step = 0, load_stage = 0, load_rows = 0;
    const int8_t* load_from = nullptr;
    auto load_next = [&] {
      if (load_tile < tiles) {
        if (load_step == 0) {
          const int64_t row = int64_t(load_tile / tiles_m) * C::BLOCK_N + warp_n * C::WARP_N + group;
          load_rows = static_cast<int>(p.n - row);  // from this lane's first row on
          load_from = p.weight + row * p.ldb + k_first;
        }
        const int rows = k_first + load_step * STRIDE < k_end ? load_rows : 0;
        const int8_t* from = load_from;
#pragma unroll
        for (int c = 0; c < 2 * C::MMAS_W; ++c, from += 8 * p.ldb)
          ptx::cp_async_16(queue + load_stage * C::STAGE_BYTES + c * 512, from, c * 8 < rows ? CHUNK : 0);
        load_from += STRIDE;
        if (++load_step == steps) load_step = 0, load_tile += tile_step;
        if (++load_stage == C::STAGES) load_stage = 0;
      }
      ptx::cp_async_commit();  // empty past the end, so that the count of groups stays the same
    };

    if (!p.weight_is_constant) ptx::grid_wait();
#pragma unroll
    for (int s = 0; s < C::STAGES - 1; ++s) load_next();
    ptx::grid_wait();
    ptx::grid_release();

    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.ldx % 8 == 0;
    int next_tile = first_tile, next_step = 0, next_tokens = 0;  // of the x that load_x brings
    const X* next_row = nullptr;
    auto load_x = [&](Activations<C::MMAS_X>& x) {
      if (next_tile >= tiles) return;
      if (next_step == 0) {
        const int64_t m = int64_t(next_tile % tiles_m) * C::BLOCK_M + group;
        next_tokens = static_cast<int>(p.m - m);
        next_row = static_cast<const X*>(p.x) + m * p.ldx;
      }
      x.load(next_row, p.ldx, next_tokens, k_first + next_step * STRIDE, k_end, aligned);
      if (++next_step == steps) next_step = 0, next_tile += tile_step;
    };

    float acc[C::MMAS_W][C::MMAS_X][4] = {};
    float2 own_terms = {};
    Activations<C::MMAS_X> x, x_next = {};
    load_x(x);
    if constexpr (C::CLUSTER > 1) ptx::cluster_wait();  // the other blocks' barriers are there

    int tile = first_tile, step = 0, stage = 0, parity = 0;
    int64_t n0 = 0, m0 = 0;
    // Invariant at the top: STAGES - 1 groups from this step on have been committed, and x holds this step's tokens.
    for (int i = 0; i < total; ++i) {
      load_x(x_next);
      if (step == 0) {
        n0 = int64_t(tile / tiles_m) * C::BLOCK_N, m0 = int64_t(tile % tiles_m) * C::BLOCK_M;
        if (thread < C::BLOCK_N && n0 + thread < p.n)
          own_terms = {p.weight_scale[n0 + thread], p.bias ? load_float(p.bias, p.bias_dtype, n0 + thread) : -0.0f};
      }
      ptx::cp_async_wait<C::STAGES - 2>();
      load_next();  // into the slot that the last step has read

      const uint8_t* slot = smem + (warp_id * C::STAGES + stage) * C::STAGE_BYTES + lane_id * CHUNK;
#pragma unroll
      for (int r = 0; r < C::MMAS_W; ++r) {
        const uint4 upper = *reinterpret_cast<const uint4*>(slot + r * 1024);
        const uint4 lower = *reinterpret_cast<const uint4*>(slot + r * 1024 + 512);
        const uint32_t words[2][STEP_MMAS] = {{upper.x, upper.y, upper.z, upper.w}, {lower.x, lower.y, lower.z, lower.w}};
#pragma unroll
        for (int s = 0; s < STEP_MMAS; ++s) {
          uint32_t a[4];
          widen(X{}, words[0][s], &a[0], &a[2]);
          widen(X{}, words[1][s], &a[1], &a[3]);
#pragma unroll
          for (int j = 0; j < C::MMAS_X; ++j) ptx::mma_m16n8k16(X{}, acc[r][j], a, x.low(j, s), x.high(j, s));
        }
      }
      x = x_next;
      if (++stage == C::STAGES) stage = 0;
      if (++step < steps) continue;

      // The tile's sums: of the warps, then of the cluster's blocks, each in order.
      float2* terms = all_terms + parity % 2 * C::BLOCK_N;
      if (thread < C::BLOCK_N) terms[thread] = own_terms;
      const int tokens = static_cast<int>(min(int64_t{C::BLOCK_M}, p.m - m0));
      const uint32_t barrier = barriers + parity % 2 * 8;
      uint8_t* received = exchange + parity % 2 * C::EXCHANGE_BYTES;
      if constexpr (C::CLUSTER > 1)
        if (thread == 0) ptx::mbarrier_arrive_expect(barrier, C::EXCHANGE_BYTES);
#pragma unroll
      for (int piece = 0; piece < C::BLOCK_M / C::PIECE; ++piece) {
        float* warp_partials = partials + warp_k * C::PIECE * C::PITCH + warp_n * C::WARP_N;
#pragma unroll
        for (int r = 0; r < C::MMAS_W; ++r)
#pragma unroll
          for (int j = 0; j < C::PIECE / MMA_N; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e)  // row g or g + 8, token 2·t or 2·t + 1
              warp_partials[(j * MMA_N + quad * 2 + e % 2) * C::PITCH + r * MMA_M + e / 2 * 8 + group] =
                  acc[r][piece * (C::PIECE / MMA_N) + j][e];
        __syncthreads();
        if constexpr (C::CLUSTER == 1) {
          for (int i = thread; i < C::PIECE * C::BLOCK_N; i += C::THREADS) {
            const int token = i / C::BLOCK_N, row = i % C::BLOCK_N;
            if (piece * C::PIECE + token >= tokens || n0 + row >= p.n) continue;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < C::WARPS_K; ++w) sum += partials[(w * C::PIECE + token) * C::PITCH + row];
            finish(p, m0 + piece * C::PIECE + token, n0 + row, sum * widen_unit(X{}), terms[row]);
          }
        } else {
          for (int i = thread; i < C::PIECE * C::BLOCK_N / 4; i += C::THREADS) {
            const int token = i / (C::BLOCK_N / 4), row = i % (C::BLOCK_N / 4) * 4;
            float4 sum = {};
#pragma unroll
            for (int w = 0; w < C::WARPS_K; ++w) {
              const float4 v = *reinterpret_cast<const float4*>(&partials[(w * C::PIECE + token) * C::PITCH + row]);
              sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            const int owner = row / C::OWN_ROWS;
            const int place = (rank * C::BLOCK_M + piece * C::PIECE + token) * C::OWN_ROWS + row % C::OWN_ROWS;
            ptx::store_to_block(ptx::cluster_address(ptx::shared_address(received) + place * 4, owner),
                                ptx::cluster_address(barrier, owner), sum);
          }
        }
        __syncthreads();  // the next piece, or the next tile, overwrites the partial sums
      }
      if constexpr (C::CLUSTER > 1) {
        ptx::mbarrier_wait(barrier, parity / 2 % 2);
        for (int i = thread; i < tokens * C::OWN_ROWS; i += C::THREADS) {
          const int row = rank * C::OWN_ROWS + i % C::OWN_ROWS;
          float sum = 0;
#pragma unroll
          for (int b = 0; b < C::CLUSTER; ++b)
            sum += reinterpret_cast<const float*>(received)[b * C::BLOCK_M * C::OWN_ROWS + i];
          if (n0 + row < p.n) finish(p, m0 + i / C::OWN_ROWS, n0 + row, sum * widen_unit(X{}), terms[row]);
        }
        // NOTE: two tiles later others write here again: after they have received this block's sums of the next tile,
        // which it sends after a __syncthreads that follows these reads. The same holds for the terms.
      }
      ++parity;
#pragma unroll
      for (int r = 0; r < C::MMAS_W; ++r)
#pragma unroll
        for (int j = 0; j < C::MMAS_X; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][j][e] = 0;
      step = 0, tile += tile_step;
    }
    ptx::cp_async_wait<0>();
  }
}

template <typename C>
Status launch_config(const WeightOnlyLinear& p, const Device& device, Stream stream) {
  const int64_t tiles = ceil_div(p.m, C::BLOCK_M) * ceil_div(p.n, C::BLOCK_N);
  if (tiles > INT32_MAX / 2) return invalid("weight_only_linear: M x N is too large for one launch");
  // One block an SM, and no more clusters than share the tiles evenly: 96 tiles on 33 clusters are 32 times three.
  const int64_t clusters = std::max(1, device.sm_count / C::CLUSTER), rounds = ceil_div(tiles, clusters);
  const int64_t grid = (C::CLUSTER > 1 ? ceil_div(tiles, rounds) : std::min(tiles, clusters)) * C::CLUSTER;
  Launch shape{dim3(static_cast<unsigned>(grid)), dim3(C::THREADS), C::SHARED_BYTES, C::CLUSTER};
  shape.overlap = device.compute >= 90;
  return launch<w8a16<C>>(shape, stream, p);
}

}  // namespace

Status launch_w8a16(const WeightOnlyLinear& problem, int config_id, const Device& device, Stream stream) {
  const bool half = problem.x_dtype == DType::kFloat16;
  switch (config_id) {
#define HWKERN_CASE(ID, ...)                                                                 \
  case ID:                                                                                   \
    return half ? launch_config<Config<__half, __VA_ARGS__>>(problem, device, stream)        \
                : launch_config<Config<__nv_bfloat16, __VA_ARGS__>>(problem, device, stream);
    HWKERN_W8A16_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("weight_only_linear: this id is not one of the weight-only kernels");
  }
}

}  // namespace hwkern
