// The one epilogue of every GEMM kernel: int32 sums in mma.sync fragments to D in global memory.
//
//   D[m, n] = round(((float)sum * scale_m[m]) * scale_n[n] + bias[n])      or the raw sum for an int32 D
//
// A warp takes its tile in slabs of 16 rows: scales it in registers, lays it out row-major in a piece of shared memory
// of its own, and writes whole rows with 16-byte stores. No other warp is involved, so __syncwarp is enough.
#pragma once

#include <type_traits>

#include "core/float_types.cuh"
#include "hwkern.h"

namespace hwkern {

template <typename T, int WARP_N>
struct EpilogueSlab {
  static constexpr int ROWS = 16;
  // The padding puts the 8 rows that a fragment store touches into different banks: 4·g + t for 2-byte elements
  // (one word a lane), 8·g + 2·t for 4-byte ones (two words a lane).
  static constexpr int PITCH = WARP_N + 8;
  static constexpr int BYTES = ROWS * PITCH * static_cast<int>(sizeof(T));
};

// Shared memory that one warp needs, for the largest element type.
template <int WARP_N>
constexpr int kEpilogueBytes = EpilogueSlab<float, WARP_N>::BYTES;

template <typename T>
__device__ __forceinline__ T finish(int32_t sum, float scale_m, float scale_n, float bias) {
  // __fmul_rn and __fadd_rn are never contracted into a fused multiply-add: hwkern.h fixes the roundings.
  return from_float<T>(__fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), scale_m), scale_n), bias));
}

template <>
__device__ __forceinline__ int32_t finish<int32_t>(int32_t sum, float, float, float) {
  return sum;
}

// acc[i][j] is the m16n8 fragment at rows 16·i, columns 8·j of the warp's tile, whose corner is D[m0, n0].
template <typename T, int MMAS_M, int MMAS_N>
__device__ __forceinline__ void store_tile(const Gemm& p, const int32_t (&acc)[MMAS_M][MMAS_N][4], int64_t m0,
                                           int64_t n0, void* smem_warp) {
  constexpr int WARP_N = MMAS_N * 8;
  using Slab = EpilogueSlab<T, WARP_N>;
  constexpr int VECTOR = 16 / sizeof(T);
  constexpr int VECTORS_PER_ROW = WARP_N / VECTOR;
  static_assert(Slab::ROWS * VECTORS_PER_ROW % 32 == 0, "a slab is whole warps of vectors");

  const int lane_id = threadIdx.x % 32;
  const int group = lane_id / 4,
            pair = lane_id % 4 * 2;  // a lane's rows (group, group + 8) and columns (pair, pair + 1)
  T* slab = static_cast<T*>(smem_warp);
  T* d = static_cast<T*>(p.d);
  const bool vectors_aligned = p.ldd % VECTOR == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0;

  float scale_n[MMAS_N][2], bias[MMAS_N][2];
  if constexpr (!std::is_same_v<T, int32_t>) {
#pragma unroll
    for (int j = 0; j < MMAS_N; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int64_t n = n0 + j * 8 + pair + c;
        scale_n[j][c] = p.scale_n && n < p.n ? p.scale_n[n] : 1.0f;
        // -0 is the neutral element of addition (0 is not: -0 + 0 = 0), so that no bias means no change.
        bias[j][c] = p.bias && n < p.n ? load_float(p.bias, p.bias_dtype, n) : -0.0f;
      }
  }

#pragma unroll
  for (int i = 0; i < MMAS_M; ++i) {
    const int64_t m_slab = m0 + i * 16;
    if (m_slab >= p.m) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group + half * 8;
      const float scale_m = p.scale_m && m_slab + row < p.m ? p.scale_m[m_slab + row] : 1.0f;
#pragma unroll
      for (int j = 0; j < MMAS_N; ++j) {
        Vector<T, 2> two;
#pragma unroll
        for (int c = 0; c < 2; ++c) two.v[c] = finish<T>(acc[i][j][half * 2 + c], scale_m, scale_n[j][c], bias[j][c]);
        *reinterpret_cast<Vector<T, 2>*>(&slab[row * Slab::PITCH + j * 8 + pair]) = two;
      }
    }
    __syncwarp();
#pragma unroll
    for (int v = lane_id; v < Slab::ROWS * VECTORS_PER_ROW; v += 32) {
      const int row = v / VECTORS_PER_ROW, column = v % VECTORS_PER_ROW * VECTOR;
      const int64_t m = m_slab + row, n = n0 + column;
      if (m >= p.m || n >= p.n) continue;
      const auto values = *reinterpret_cast<const Vector<T, VECTOR>*>(&slab[row * Slab::PITCH + column]);
      T* out = d + m * p.ldd + n;
      if (vectors_aligned && n + VECTOR <= p.n) {
        *reinterpret_cast<Vector<T, VECTOR>*>(out) = values;
      } else {
#pragma unroll
        for (int e = 0; e < VECTOR; ++e)
          if (n + e < p.n) out[e] = values.v[e];
      }
    }
    __syncwarp();
  }
}

}  // namespace hwkern
