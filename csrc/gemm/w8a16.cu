// Weight-only linear for sm_80 and newer: y = epilogue(x · Wᵀ), x in 16 bits and W in int8, with mma.sync m16n8k16 (see
// hwkern.h for shapes and rounding).
//
// For few tokens the time is that of reading the weights once, so everything serves the stream of weights:
//   - Weight rows are the mma's 16-row side (A) and tokens its 8-column side (B): one token wastes no memory traffic.
//   - The warps of a block share K, and so do the CLUSTER blocks of a cluster (Hopper), so that few rows a block keep
//     every SM busy and x is read once a block. Each warp has queues of its own in shared memory for weights and x, in
//     steps of 64 k, so the main loop has no block-wide barrier. Sums are added in a fixed order: the same bits always.
//   - The order of k in a sum is free as long as both operands agree. Lane 4·g + t of a warp takes bytes 16·t … 16·t + 15
//     of rows g and g + 8: word s of the 16 bytes goes into the s-th of four mma's, and x[k + 4·s … k + 4·s + 3] beside it.
//     So weights come in 16-byte loads, four rows to a wavefront, and need no ldmatrix.
//   - Blocks are persistent: the queues run ahead into the next tile while the sums of the last one are added. Launched
//     with overlap they are filled with weights before the preceding kernel has ended.
//
// int8 to 16 bits, two weights in 2.5 instructions: u = w + 128 (one xor for four), a byte permutation that puts u in
// the low mantissa bits, one fused multiply-add. In float16 0x6400 + u is 1024 + u. In bfloat16, with 7 bits of mantissa,
// 0x0000 + u is the subnormal u · 2⁻¹³³ (exactly, also for u >= 128: subnormals and the first normal binade have the same
// spacing); times 2¹²⁷ minus 2 that is w · 2⁻⁶, and the epilogue multiplies by 64.
#include "core/activation.cuh"
#include "core/float_types.cuh"
#include "core/launch.cuh"
#include "gemm/tensor_map.h"
#include "gemm/w8a16.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/elect.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"

namespace hwkern {
namespace {

constexpr int MMA_M = 16, MMA_N = 8, MMA_K = 16;
constexpr int STEP = kW8A16Step, STEP_MMAS = STEP / MMA_K;
constexpr int CHUNK = 16;  // bytes: one cp.async, and one lane's part of a weight row's step
constexpr int X_CHUNK = CHUNK / 2;  // values of x in as many bytes
constexpr int X_GROUP_BYTES = MMA_N * STEP * 2;  // a step of x for 8 tokens

template <typename X_, int BLOCK_M_, int BLOCK_N_, int WARPS_N_, int WARPS_K_, int STAGES_, int X_STAGES_, bool TMA_,
          int CLUSTER_, int BLOCKS_>
struct Config {
  using X = X_;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, WARPS_N = WARPS_N_, WARPS_K = WARPS_K_;
  static constexpr int STAGES = STAGES_, X_STAGES = X_STAGES_, CLUSTER = CLUSTER_, BLOCKS_PER_SM = BLOCKS_;
  static constexpr bool TMA = TMA_;

  static constexpr int WARPS = WARPS_N * WARPS_K, THREADS = WARPS * 32;
  static constexpr int WARP_N = BLOCK_N / WARPS_N;
  static constexpr int MMAS_W = WARP_N / MMA_M, MMAS_X = BLOCK_M / MMA_N;
  static constexpr int STRIDE = STEP * CLUSTER * WARPS_K;  // k from one step of a warp to the next

  static constexpr int STAGE_BYTES = WARP_N * STEP, X_STAGE_BYTES = MMAS_X * X_GROUP_BYTES;  // of one warp
  static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES, X_RING_BYTES = WARPS * X_STAGES * X_STAGE_BYTES;
  static constexpr int PIECE = kW8A16PieceTokens;
  static constexpr int PITCH = w8a16_pitch(BLOCK_N);
  static constexpr int PARTIAL_BYTES = WARPS_K * PIECE * PITCH * 4;
  static constexpr int EXCHANGE_BYTES = CLUSTER > 1 ? BLOCK_M * BLOCK_N * 4 : 0;  // of one of the two
  static constexpr int OWN_ROWS = BLOCK_N / CLUSTER;  // rows of the tile that one block of the cluster finishes
  static constexpr int TERMS_BYTES = BLOCK_N * 8;  // of one of the two
  static constexpr int SHARED_BYTES = w8a16_shared_bytes(BLOCK_M, BLOCK_N, WARPS_N, WARPS_K, STAGES, X_STAGES, CLUSTER);

  static_assert(MMAS_W * MMA_M == WARP_N && MMAS_X * MMA_N == BLOCK_M && PIECE == MMA_N && STRIDE > 0);
  static_assert(BLOCK_N <= THREADS && OWN_ROWS % 4 == 0, "four rows of a token go to one block at once");
  static_assert(STAGES >= 2 && X_STAGES >= 2 && (TMA || STAGES == X_STAGES), "without TMA one cp.async group has both");
  static_assert(RING_BYTES + X_RING_BYTES + PARTIAL_BYTES + 2 * EXCHANGE_BYTES + 2 * TERMS_BYTES + 16 +
                    WARPS * STAGES * 8 ==
                SHARED_BYTES);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

struct Params {
  CUtensorMap weight;  // in boxes of WARP_N rows × STEP bytes, with the 64-byte swizzle; only for TMA
  WeightOnlyLinear p;
};

// Four weights, k in order, as two registers of an A fragment.
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
  const __nv_bfloat162 bias = __nv_bfloat162(__ushort_as_bfloat16(0xc000), __ushort_as_bfloat16(0xc000));  // -2
  uint32_t words[2] = {__byte_perm(u, 0, 0x4140), __byte_perm(u, 0, 0x4342)};
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(words);
  pairs[0] = __hfma2(pairs[0], scale, bias);
  pairs[1] = __hfma2(pairs[1], scale, bias);
  *low = words[0], *high = words[1];
}

// What `widen` has divided the weights by.
__device__ __forceinline__ float widen_unit(__half) { return 1.0f; }
__device__ __forceinline__ float widen_unit(__nv_bfloat16) { return 64.0f; }

// A position in the sequence of a block's steps: tiles first, first + by, …, each in `steps` steps.
struct Cursor {
  int tile_n, tile_m, step = 0;
  __device__ __forceinline__ void advance(int steps, int by_n, int by_m, int tiles_m) {
    if (++step < steps) return;
    step = 0, tile_n += by_n, tile_m += by_m;
    if (tile_m >= tiles_m) tile_m -= tiles_m, ++tile_n;
  }
};

// `sum` to y[m, n]; `terms`: weight_scale and bias of column n.
__device__ __forceinline__ void finish(const WeightOnlyLinear& p, int64_t m, int64_t n, float sum, float2 terms) {
  float value[1] = {__fadd_rn(__fmul_rn(sum, terms.x), terms.y)}, &y = value[0];
  if (p.activation != Activation::kNone) activate(p.activation, value);
  if (p.residual) y = __fadd_rn(y, load_float(p.residual, p.residual_dtype, m * p.ldr + n));
  const int64_t i = m * p.ldy + n;
  switch (p.y_dtype) {
    case DType::kFloat16: static_cast<__half*>(p.y)[i] = from_float<__half>(y); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(p.y)[i] = from_float<__nv_bfloat16>(y); break;
    default: static_cast<float*>(p.y)[i] = y;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::THREADS, C::BLOCKS_PER_SM) w8a16(const __grid_constant__ Params params) {
  if constexpr (kHopper || (C::CLUSTER == 1 && !C::TMA)) {
    using X = typename C::X;
    const WeightOnlyLinear& p = params.p;
    extern __shared__ __align__(1024) uint8_t smem[];
    float* partials = reinterpret_cast<float*>(smem + C::RING_BYTES + C::X_RING_BYTES);
    uint8_t* exchange = reinterpret_cast<uint8_t*>(partials) + C::PARTIAL_BYTES;
    float2* all_terms = reinterpret_cast<float2*>(exchange + 2 * C::EXCHANGE_BYTES);
    const uint32_t exchange_barriers = ptx::shared_address(all_terms + 2 * C::BLOCK_N);

    const int thread = threadIdx.x, lane_id = thread % 32, warp_id = thread / 32;
    const int warp_n = warp_id % C::WARPS_N, warp_k = warp_id / C::WARPS_N;
    const int group = lane_id / 4, quad = lane_id % 4;
    const int rank = C::CLUSTER > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
    const uint32_t ring = ptx::shared_address(smem) + warp_id * C::STAGES * C::STAGE_BYTES;
    uint8_t* x_slots = smem + C::RING_BYTES + warp_id * C::X_STAGES * C::X_STAGE_BYTES;
    const uint32_t x_ring = ptx::shared_address(x_slots);
    const uint32_t full = exchange_barriers + 16 + warp_id * C::STAGES * 8;  // this warp's barriers, one a stage

    const int tiles_m = static_cast<int>((p.m + C::BLOCK_M - 1) / C::BLOCK_M);
    const int tiles_n = static_cast<int>((p.n + C::BLOCK_N - 1) / C::BLOCK_N);
    const int first = blockIdx.x / C::CLUSTER, by = gridDim.x / C::CLUSTER;
    const int by_n = by / tiles_m, by_m = by % tiles_m;
    // Every warp takes the same number of steps of a tile; x is zero in those past K.
    const int k_end = static_cast<int>(p.k), steps = (k_end + C::STRIDE - 1) / C::STRIDE;
    const int k_first = (rank * C::WARPS_K + warp_k) * STEP;

    if constexpr (C::TMA) {
      if (lane_id == 0) {
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s) ptx::mbarrier_init(full + s * 8, 1);
        ptx::mbarrier_init_fence();
      }
      __syncwarp();
    }
    if constexpr (C::CLUSTER > 1) {
      if (thread == 0) {
        ptx::mbarrier_init(exchange_barriers, 1);
        ptx::mbarrier_init(exchange_barriers + 8, 1);
        ptx::mbarrier_init_fence();
      }
      ptx::cluster_arrive_relaxed();
    }

    // One step of weights into its place in the queue, rows of 64 bytes. What lies past N or K is not used.
    const int swizzled = quad ^ (group / 2 % 4);  // where 16-byte chunk `quad` lies in rows group, group + 8, …
    Cursor w_next{first / tiles_m, first % tiles_m};
    int w_stage = 0;
    auto load_w = [&] {
      if (w_next.tile_n >= tiles_n) return;
      const int64_t row0 = int64_t(w_next.tile_n) * C::BLOCK_N + warp_n * C::WARP_N;
      const int k = k_first + w_next.step * C::STRIDE;
      if constexpr (C::TMA) {
        if (ptx::elect_one()) {
          ptx::mbarrier_arrive_expect(full + w_stage * 8, C::STAGE_BYTES);
          ptx::tma_load(ring + w_stage * C::STAGE_BYTES, &params.weight, full + w_stage * 8, k, static_cast<int>(row0));
        }
      } else {
        const int rows = k + quad * CHUNK < k_end ? static_cast<int>(p.n - row0 - group) : 0;
        const int8_t* from = p.weight + (row0 + group) * p.ldb + k + quad * CHUNK;
        const uint32_t to = ring + w_stage * C::STAGE_BYTES + group * STEP + swizzled * CHUNK;
#pragma unroll
        for (int i = 0; i < 2 * C::MMAS_W; ++i, from += 8 * p.ldb)
          if (i * 8 < rows) ptx::cp_async_16(to + i * 8 * STEP, from, CHUNK);
      }
      w_next.advance(steps, by_n, by_m, tiles_m);
      if (++w_stage == C::STAGES) w_stage = 0;
    };

    // One step of x: 128 bytes a token, the 16-byte chunk c at c ^ (token % 2), so that the two tokens whose fragments a
    // wavefront reads lie in different banks. Tokens past M are left out: they only make sums that nobody stores.
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % CHUNK == 0 && p.ldx % X_CHUNK == 0;
    const int x_token = lane_id / 8, x_chunk = lane_id % 8;
    Cursor x_next = w_next;
    int x_stage = 0, x_tokens = 0;  // tokens from this lane's first on
    const X* x_row = nullptr;
    auto locate_x = [&] {
      const int64_t m = int64_t(x_next.tile_m) * C::BLOCK_M + x_token;
      x_tokens = static_cast<int>(p.m - m);
      x_row = static_cast<const X*>(p.x) + m * p.ldx;
    };
    auto load_x = [&] {
      if (x_next.tile_n < tiles_n) {
        const int k = k_first + x_next.step * C::STRIDE + x_chunk * X_CHUNK;
        const X* from = x_row + k;
        const uint32_t to = x_stage * C::X_STAGE_BYTES + x_token * (STEP * 2) + (x_chunk ^ (x_token % 2)) * CHUNK;
        const bool whole = aligned && k + X_CHUNK <= k_end;
#pragma unroll
        for (int i = 0; i < 2 * C::MMAS_X; ++i, from += 4 * p.ldx) {
          if (i * 4 >= x_tokens) continue;
          if (whole) {
            ptx::cp_async_16(x_ring + to + i * 4 * STEP * 2, from, CHUNK);
          } else {
            uint16_t* out = reinterpret_cast<uint16_t*>(x_slots + to + i * 4 * STEP * 2);
#pragma unroll 1
            for (int e = 0; e < X_CHUNK; ++e) out[e] = k + e < k_end ? reinterpret_cast<const uint16_t*>(from)[e] : 0;
          }
        }
        const int tile_m = x_next.tile_m;
        x_next.advance(steps, by_n, by_m, tiles_m);
        if (x_next.tile_m != tile_m) locate_x();
        if (++x_stage == C::X_STAGES) x_stage = 0;
      }
      ptx::cp_async_commit();  // empty past the end, so that the count of groups stays the same
    };

    locate_x();
    if constexpr (C::TMA) {
      if (!p.weight_is_constant) ptx::grid_wait();
#pragma unroll
      for (int s = 0; s < C::STAGES; ++s) load_w();
      ptx::grid_wait();
#pragma unroll
      for (int s = 0; s < C::X_STAGES; ++s) load_x();
    } else {
      ptx::grid_wait();
#pragma unroll
      for (int s = 0; s < C::STAGES; ++s) load_w(), load_x();
    }
    bool released = false;

    float acc[C::MMAS_W][C::MMAS_X][4] = {};
    float2 own_terms = {};
    if constexpr (C::CLUSTER > 1) ptx::cluster_wait();  // the other blocks' barriers are there

    Cursor at{first / tiles_m, first % tiles_m};
    int stage = 0, read_x_stage = 0, parity = 0;
    uint32_t phase = 0;
    // Invariant at the top: weights of this step and the STAGES - 1 after it have been asked for, x of this step and the
    // X_STAGES - 1 after it, one cp.async group a step.
    while (at.tile_n < tiles_n) {
      const int64_t n0 = int64_t(at.tile_n) * C::BLOCK_N, m0 = int64_t(at.tile_m) * C::BLOCK_M;
      if (at.step == 0 && thread < C::BLOCK_N && n0 + thread < p.n)
        own_terms = {p.weight_scale[n0 + thread], p.bias ? load_float(p.bias, p.bias_dtype, n0 + thread) : -0.0f};
      if (!released && w_next.tile_n >= tiles_n) {
        released = true;  // the last weights are on their way: time for those of the next kernel
        ptx::grid_release();
      }
      ptx::cp_async_wait<C::X_STAGES - 1>();
      if constexpr (C::TMA) ptx::mbarrier_wait(full + stage * 8, phase);
      __syncwarp();  // all lanes' copies are there

      uint4 x[C::MMAS_X][2];
#pragma unroll
      for (int j = 0; j < C::MMAS_X; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          x[j][h] = *reinterpret_cast<const uint4*>(x_slots + read_x_stage * C::X_STAGE_BYTES + j * X_GROUP_BYTES +
                                                    group * (STEP * 2) + ((quad * 2 + h) ^ (group % 2)) * CHUNK);
      const uint8_t* w = smem + (warp_id * C::STAGES + stage) * C::STAGE_BYTES + group * STEP + swizzled * CHUNK;
#pragma unroll
      for (int r = 0; r < C::MMAS_W; ++r) {
        const uint4 upper = *reinterpret_cast<const uint4*>(w + r * MMA_M * STEP);
        const uint4 lower = *reinterpret_cast<const uint4*>(w + (r * MMA_M + 8) * STEP);
        const uint32_t words[2][STEP_MMAS] = {{upper.x, upper.y, upper.z, upper.w},
                                              {lower.x, lower.y, lower.z, lower.w}};
#pragma unroll
        for (int s = 0; s < STEP_MMAS; ++s) {
          uint32_t a[4];
          widen(X{}, words[0][s], &a[0], &a[2]);
          widen(X{}, words[1][s], &a[1], &a[3]);
#pragma unroll
          for (int j = 0; j < C::MMAS_X; ++j) {
            const uint4& v = x[j][s / 2];
            ptx::mma_m16n8k16(X{}, acc[r][j], a, s % 2 == 0 ? v.x : v.z, s % 2 == 0 ? v.y : v.w);
          }
        }
      }
      __syncwarp();  // all have read the places that are filled next
      load_w();
      load_x();
      if (++stage == C::STAGES) stage = 0, phase ^= 1;
      if (++read_x_stage == C::X_STAGES) read_x_stage = 0;
      const bool tile_is_done = at.step == steps - 1;
      at.advance(steps, by_n, by_m, tiles_m);
      if (!tile_is_done) continue;

      // The tile's sums: of the warps, then of the cluster's blocks, each in order.
      float2* terms = all_terms + parity % 2 * C::BLOCK_N;
      if (thread < C::BLOCK_N) terms[thread] = own_terms;
      const int tokens = static_cast<int>(min(int64_t{C::BLOCK_M}, p.m - m0));
      const uint32_t barrier = exchange_barriers + parity % 2 * 8;
      uint8_t* received = exchange + parity % 2 * C::EXCHANGE_BYTES;
      if constexpr (C::CLUSTER > 1)
        if (thread == 0) ptx::mbarrier_arrive_expect(barrier, C::EXCHANGE_BYTES);
#pragma unroll
      for (int piece = 0; piece < C::MMAS_X; ++piece) {
        float* warp_partials = partials + warp_k * C::PIECE * C::PITCH + warp_n * C::WARP_N;
#pragma unroll
        for (int r = 0; r < C::MMAS_W; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e)  // row g or g + 8, token 2·t or 2·t + 1
            warp_partials[(quad * 2 + e % 2) * C::PITCH + r * MMA_M + e / 2 * 8 + group] = acc[r][piece][e];
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
        // which it sends after a __syncthreads that follows these reads.
      }
      ++parity;
#pragma unroll
      for (int r = 0; r < C::MMAS_W; ++r)
#pragma unroll
        for (int j = 0; j < C::MMAS_X; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][j][e] = 0;
    }
    ptx::cp_async_wait<0>();
  }
}

template <typename C>
Status launch_config(const WeightOnlyLinear& p, const Device& device, Stream stream) {
  const int64_t tiles = ceil_div(p.m, C::BLOCK_M) * ceil_div(p.n, C::BLOCK_N);
  if (tiles > INT32_MAX / 2) return invalid("weight_only_linear: M x N is too large for one launch");
  Params params{{}, p};
  if constexpr (C::TMA) {
    if (!encode_tiled()) return kNoTensorMaps;
    if (!make_map(&params.weight, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.weight, p.n, round_up(p.k, kRowAlignment), p.ldb,
                  C::WARP_N, STEP))
      return kTensorMapRefused;
  }
  // One block an SM for up to 8 tokens: the other half of its shared memory is for the next kernel's. With more tokens,
  // when multiplying is the limit, all that fit (row 303 at 16×28672×4096: 45.9 µs, with one 65.1). No more clusters than share the tiles evenly: 96 tiles on
  // 33 clusters are 32 times three.
  const int64_t clusters =
      std::max<int64_t>(1, int64_t(device.sm_count) * (p.m > 8 ? C::BLOCKS_PER_SM : 1) / C::CLUSTER);
  const int64_t grid =
      (C::CLUSTER > 1 ? ceil_div(tiles, ceil_div(tiles, clusters)) : std::min(tiles, clusters)) * C::CLUSTER;
  Launch shape{dim3(static_cast<unsigned>(grid)), dim3(C::THREADS), C::SHARED_BYTES, C::CLUSTER};
  shape.overlap = device.compute >= 90;
  return launch<w8a16<C>>(shape, stream, params);
}

}  // namespace

Status launch_w8a16(const WeightOnlyLinear& problem, int config_id, const Device& device, Stream stream) {
  const bool half = problem.x_dtype == DType::kFloat16;
  switch (config_id) {
#define HWKERN_CASE(ID, ...)                                                          \
  case ID:                                                                            \
    return half ? launch_config<Config<__half, __VA_ARGS__>>(problem, device, stream) \
                : launch_config<Config<__nv_bfloat16, __VA_ARGS__>>(problem, device, stream);
    HWKERN_W8A16_CONFIGS(HWKERN_CASE)
#undef HWKERN_CASE
    default: return invalid("weight_only_linear: this id is not one of the weight-only kernels");
  }
}

}  // namespace hwkern
