// The one epilogue of every GEMM kernel: int32 sums in mma.sync fragments to D in global memory.
//
//   D[m, n] = round(((float)sum * scale_m[m]) * scale_n[n] + bias[n])      or the raw sum for an int32 D
//
// What depends on n is brought to shared memory once a tile (column_terms). A warp then takes its part of the tile in
// slabs of 16 rows: scales it in registers, lays it out row-major in a piece of shared memory of its own, and writes
// whole rows with 16-byte stores. No other warp is involved, so __syncwarp is enough.
// Activation, residual and int8 output (options.cuh) are applied to whole rows of float32 in that shared memory.
#pragma once

#include <type_traits>

#include "core/float_types.cuh"
#include "gemm/options.cuh"
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

// scale_n and bias of one column, as float2 in shared memory. Neutral where there is none: 1, and -0 (adding +0 would
// turn a -0 into +0).
__device__ __forceinline__ float2 column_terms(const Gemm& p, int64_t n) {
  if (n >= p.n) return {1.0f, -0.0f};
  return {p.scale_n ? p.scale_n[n] : 1.0f, p.bias ? load_float(p.bias, p.bias_dtype, n) : -0.0f};
}

__device__ __forceinline__ float row_scale(const Gemm& p, int64_t m) {
  return p.scale_m && m < p.m ? p.scale_m[m] : 1.0f;
}

// __fmul_rn and __fadd_rn are never contracted into a fused multiply-add: hwkern.h fixes the roundings.
__device__ __forceinline__ float scaled(int32_t sum, float scale_m, float2 column) {
  return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(sum), scale_m), column.x), column.y);
}

// Two neighbours of a row; the packed conversions round each to nearest even.
template <typename T>
__device__ __forceinline__ void finish(T* out, int32_t sum0, int32_t sum1, float scale_m, float2 column0,
                                       float2 column1) {
  if constexpr (std::is_same_v<T, int32_t>) {
    *reinterpret_cast<int2*>(out) = {sum0, sum1};
  } else {
    const float y0 = scaled(sum0, scale_m, column0), y1 = scaled(sum1, scale_m, column1);
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float2*>(out) = {y0, y1};
    } else if constexpr (std::is_same_v<T, __half>) {
      *reinterpret_cast<__half2*>(out) = __floats2half2_rn(y0, y1);
    } else {
      *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(y0, y1);
    }
  }
}

// acc[i][j] is the m16n8 fragment at rows 16·i, columns 8·j of the warp's tile, whose corner is D[m0, n0].
// `columns`: the terms of column n0 and on. `smem_warp`: kEpilogueBytes of this warp's own.
template <typename T, int MMAS_M, int MMAS_N>
__device__ __forceinline__ void store_tile(const Gemm& p, const int32_t (&acc)[MMAS_M][MMAS_N][4], int64_t m0,
                                           int64_t n0, const float2* columns, void* smem_warp) {
  constexpr int WARP_N = MMAS_N * 8;
  using Slab = EpilogueSlab<T, WARP_N>;
  constexpr int VECTOR = 16 / sizeof(T);
  constexpr int VECTORS_PER_ROW = WARP_N / VECTOR;
  static_assert(Slab::ROWS * VECTORS_PER_ROW % 32 == 0, "a slab is whole warps of vectors");

  const int lane_id = threadIdx.x % 32;
  const int group = lane_id / 4, pair = lane_id % 4 * 2;  // a lane's rows (group, group + 8), columns (pair, pair + 1)
  T* slab = static_cast<T*>(smem_warp);
  T* d = static_cast<T*>(p.d);
  const bool vectors_aligned = p.ldd % VECTOR == 0 && reinterpret_cast<uintptr_t>(p.d) % 16 == 0;

  float scale_m[MMAS_M][2];
#pragma unroll
  for (int i = 0; i < MMAS_M; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) scale_m[i][half] = row_scale(p, m0 + i * 16 + group + half * 8);

#pragma unroll
  for (int i = 0; i < MMAS_M; ++i) {
    const int64_t m_slab = m0 + i * 16;
    if (m_slab >= p.m) break;
#pragma unroll
    for (int j = 0; j < MMAS_N; ++j) {
      const float4 terms = *reinterpret_cast<const float4*>(&columns[j * 8 + pair]);  // of two columns
#pragma unroll
      for (int half = 0; half < 2; ++half)
        finish<T>(&slab[(group + half * 8) * Slab::PITCH + j * 8 + pair], acc[i][j][half * 2], acc[i][j][half * 2 + 1],
                  scale_m[i][half], {terms.x, terms.y}, {terms.z, terms.w});
    }
    __syncwarp();
#pragma unroll
    for (int v = lane_id; v < Slab::ROWS * VECTORS_PER_ROW; v += 32) {
      const int row = v / VECTORS_PER_ROW, column = v % VECTORS_PER_ROW * VECTOR;
      const int64_t m = m_slab + row, n = n0 + column;
      const auto values = *reinterpret_cast<const Vector<T, VECTOR>*>(&slab[row * Slab::PITCH + column]);
      if (m >= p.m) continue;
      T* out = d + m * p.ldd + n;
      if (vectors_aligned && n + VECTOR <= p.n) {
        *reinterpret_cast<Vector<T, VECTOR>*>(out) = values;
      } else {
#pragma unroll 1
        for (int e = 0; e < VECTOR && n + e < p.n; ++e) out[e] = slab[row * Slab::PITCH + column + e];
      }
    }
    __syncwarp();
  }
}

// store_tile for a problem with options. Destroys acc: rows of fragments move up, so that one copy of the code, which is
// long, serves all of them (a register array cannot be indexed by a variable).
template <int MMAS_M, int MMAS_N>
__device__ __forceinline__ void store_tile_with_options(const Gemm& p, int32_t (&acc)[MMAS_M][MMAS_N][4], int64_t m0,
                                                        int64_t n0, const float2* columns, void* smem_warp) {
  constexpr int WARP_N = MMAS_N * 8, COUNT = 8;  // values that a lane takes at a time
  using Slab = EpilogueSlab<float, WARP_N>;
  const int lane_id = threadIdx.x % 32, group = lane_id / 4, pair = lane_id % 4 * 2;
  float* slab = static_cast<float*>(smem_warp);
  const float inverse = inverse_d_scale(p);
#pragma unroll 1
  for (int i = 0; i < MMAS_M && m0 + i * 16 < p.m; ++i) {
    const int64_t m_slab = m0 + i * 16;
    const float scale_m[] = {row_scale(p, m_slab + group), row_scale(p, m_slab + group + 8)};
#pragma unroll
    for (int j = 0; j < MMAS_N; ++j) {
      const float4 terms = *reinterpret_cast<const float4*>(&columns[j * 8 + pair]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        finish<float>(&slab[(group + half * 8) * Slab::PITCH + j * 8 + pair], acc[0][j][half * 2],
                      acc[0][j][half * 2 + 1], scale_m[half], {terms.x, terms.y}, {terms.z, terms.w});
    }
    __syncwarp();
#pragma unroll 1
    for (int v = lane_id; v < Slab::ROWS * WARP_N / COUNT; v += 32) {
      const int row = v / (WARP_N / COUNT), column = v % (WARP_N / COUNT) * COUNT;
      float y[COUNT];
      load_row(&slab[row * Slab::PITCH], column, WARP_N, true, y);
      finish_row(p, y, m_slab + row, n0 + column, inverse);
    }
    __syncwarp();
#pragma unroll
    for (int next = 1; next < MMAS_M; ++next)
#pragma unroll
      for (int j = 0; j < MMAS_N; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[next - 1][j][e] = acc[next][j][e];
  }
}

}  // namespace hwkern
