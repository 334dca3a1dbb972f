// How the Hopper GEMM (gemm_sm90.cu) writes D: a consumer warpgroup's 64 rows from its accumulators, through shared memory.
//
//   store_boxes   16-bit elements, consumers that share a tile: the copy engine stores
//   store_rows    32-bit elements, and everything in ping-pong: the warps store, whole rows of 128 bytes
//   store_any     options (options.cuh), and rows of D that are not whole 16-byte chunks
//
// C is the kernel's Config.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "gemm/configs.h"
#include "gemm/epilogue.cuh"
#include "gemm/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/store.cuh"
#include "ptx/tma.cuh"

namespace hwkern {

struct Sm90Params {
  Boxes a, b, b_narrow;  // b_narrow: where the config has narrow tiles
  CUtensorMap d;  // where D has 16-bit elements and `chunks`
  Gemm gemm;
  Sm90Columns columns;
  int group_rows;  // of TileOrder
  bool chunks;  // D consists of whole 16-byte chunks
  bool streams;  // D does not fit in L2: it leaves first, so that A and B stay
};

constexpr int kPieceBytes = 16 * 128;  // a warp's rows of a box

// Where one warp's 16 rows of D lie, and what scales them (of the lane's rows group and group + 8 of the fragments).
struct Part {
  int m0, n0, columns;  // the tile has so many columns: C::BLOCK_N or C::NARROW
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

// Consumers that share a tile, 16-bit elements, params.chunks, no options: boxes of 64 × 64 to shared memory, and from
// there to D with the copy engine, for which nobody waits before the next tile's first wgmmas run.
// NOTE: all 256 consumer threads meet here, so all must come this way.
template <typename C, typename T, bool BIAS>
__device__ __forceinline__ void store_boxes(const Sm90Params& params, const int32_t (&acc)[C::ACCUMULATORS],
                                            const Part& part, const float (&scale_n)[C::BLOCK_N / 4],
                                            const float2* columns, uint32_t own, int thread, uint32_t borrowed,
                                            int consumer) {
  const int lane_id = thread % 32, warp_id = thread / 32, pair = lane_id % 4 * 2;
  auto place = [&](int box) {
    return box < C::OWN_BOXES ? own + box * kSm90BoxBytes : borrowed + (box - C::OWN_BOXES) * kSm90BoxBytes;
  };
  // stmatrix: lane l gives row l % 16 of chunk l / 16. Chunk j more is an exclusive-or, because j is even.
  const uint32_t matrices = warp_id * kPieceBytes + staged(lane_id % 16, lane_id / 16);
#pragma unroll
  for (int box = 0; box < C::BOXES; ++box) {
    if (box == C::OWN_BOXES) ptx::named_barrier_sync<1, kSm90Consumers * 128>();  // both have read the borrowed buffer
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t words[2][2];  // two fragments, each with rows group and group + 8
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const int at = box * 8 + j + next;
        float4 terms = {scale_n[at * 2], 0, scale_n[at * 2 + 1], 0};  // of two columns
        if (BIAS) terms = *reinterpret_cast<const float4*>(&columns[at * 8 + pair]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = at * 4 + half * 2;
          const Vector<T, 2> values = finished<T, BIAS>(acc[i], acc[i + 1], part.scale_m[half], terms);
          words[next][half] = *reinterpret_cast<const uint32_t*>(&values);
        }
      }
      ptx::stmatrix_x4((matrices ^ (j * 16)) + place(box), {words[0][0], words[0][1], words[1][0], words[1][1]});
    }
    if (box + 1 == C::OWN_BOXES || box + 1 == C::BOXES) {
      ptx::fence_proxy_async();
      ptx::named_barrier_sync<128>(2 + consumer);
      if (thread == 0) {
#pragma unroll
        for (int ready = box < C::OWN_BOXES ? 0 : C::OWN_BOXES; ready <= box; ++ready) {
          if (params.streams) {
            ptx::tma_store_once(&params.d, place(ready), part.n0 + ready * 64, part.m0);
          } else {
            ptx::tma_store(&params.d, place(ready), part.n0 + ready * 64, part.m0);
          }
        }
        ptx::bulk_commit();
      }
    }
  }
}

// Everything else without options: a warp's rows of D through its staging. The stores are whole rows of 128 bytes and nobody waits for them.
template <typename C, typename T, bool BIAS>
__device__ __forceinline__ void store_rows(const Sm90Params& params, const int32_t (&acc)[C::ACCUMULATORS],
                                           const Part& part, const float2* columns, uint8_t* staging, int lane_id) {
  constexpr int PACK = 16 / sizeof(T), PIECE = 8 * PACK;  // columns of a chunk, of a piece
  const Gemm& p = params.gemm;
  const int group = lane_id / 4, pair = lane_id % 4 * 2, chunk = lane_id % 8;
  const int columns_left = static_cast<int>(p.n - part.n0) - chunk * PACK;  // from the lane's chunk on
  const int rows_left = static_cast<int>(p.m) - part.m0 - lane_id / 8;
  T* d = static_cast<T*>(p.d) + int64_t{part.m0 + lane_id / 8} * p.ldd + part.n0 + chunk * PACK;
  // stmatrix: lane l gives row l % 16 of chunk l / 16. Chunk j more is an exclusive-or, because j is even.
  const uint32_t matrices = ptx::shared_address(staging) + staged(lane_id % 16, lane_id / 16);
#pragma unroll
  for (int c = 0; c < C::BLOCK_N; c += PIECE) {
    if (C::NARROW < C::BLOCK_N && c == C::NARROW && part.columns == C::NARROW) break;  // a narrow tile ends here
    const int piece = c / PIECE % C::OWN_BOXES * kPieceBytes;
    if (C::OWN_BOXES == 1) __syncwarp();  // the piece before has been read
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
          ptx::store_global(out, rows[i]);
        }
      }
  }
  __syncwarp();
}

// The same for every problem, 32 columns of float32 at a time. Destroys acc: accumulators move down, so that one copy of
// the code, which is long, serves all of them (a register array cannot be indexed by a variable).
template <typename C>
__device__ __forceinline__ void store_any(const Gemm& p, int32_t (&acc)[C::ACCUMULATORS], const Part& part,
                                          const float2* columns, uint8_t* staging, int lane_id) {
  constexpr int PIECE = 32, COUNT = 8;  // columns of a piece; values that a lane takes at a time
  const int group = lane_id / 4, pair = lane_id % 4 * 2;
  const bool raw = p.d_dtype == DType::kInt32;
  const float inverse = inverse_d_scale(p);
#pragma unroll 1
  for (int c = 0; c < (C::NARROW < C::BLOCK_N ? part.columns : C::BLOCK_N); c += PIECE) {
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

// A consumer's part of the tile; `thread` of its 128.
template <typename C>
__device__ __forceinline__ void store(const Sm90Params& params, int32_t (&acc)[C::MMAS_M][C::ACCUMULATORS],
                                      const Part (&parts)[C::MMAS_M], const float (&scale_n)[C::BLOCK_N / 4],
                                      const float2* columns, uint8_t* own, int thread, uint32_t borrowed,
                                      int consumer) {
  const Gemm& p = params.gemm;
  uint8_t* staging = own + thread / 32 * C::OWN_BOXES * kPieceBytes;
  auto each = [&](auto store_part) {
#pragma unroll
    for (int i = 0; i < C::MMAS_M; ++i) store_part(i);
  };
  if (!params.chunks || has_options(p))
    return each([&](int i) { store_any<C>(p, acc[i], parts[i], columns, staging, thread % 32); });
  auto store_as = [&](auto type) {
    using T = decltype(type);
    if constexpr (!C::PINGPONG && sizeof(T) == 2) {
      if (p.bias) {
        store_boxes<C, T, true>(params, acc[0], parts[0], scale_n, columns, ptx::shared_address(own), thread, borrowed,
                                consumer);
      } else {
        store_boxes<C, T, false>(params, acc[0], parts[0], scale_n, columns, ptx::shared_address(own), thread, borrowed,
                                 consumer);
      }
    } else if constexpr (sizeof(T) == 4 && C::MMAS_M * C::ACCUMULATORS > 128) {
      each([&](int i) { store_any<C>(p, acc[i], parts[i], columns, staging, thread % 32); });
    } else if constexpr (sizeof(T) == 4) {
      each([&](int i) { store_rows<C, T, true>(params, acc[i], parts[i], columns, staging, thread % 32); });
    } else if (p.bias) {
      each([&](int i) { store_rows<C, T, true>(params, acc[i], parts[i], columns, staging, thread % 32); });
    } else {
      each([&](int i) { store_rows<C, T, false>(params, acc[i], parts[i], columns, staging, thread % 32); });
    }
  };
  switch (p.d_dtype) {
    case DType::kFloat32: return store_as(float{});
    case DType::kFloat16: return store_as(__half{});
    case DType::kBFloat16: return store_as(__nv_bfloat16{});
    default: return store_as(int32_t{});
  }
}

}  // namespace hwkern
