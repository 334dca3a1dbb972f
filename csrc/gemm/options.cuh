// The options of the GEMM's epilogue: activation, residual and int8 output, on neighbours of a row of D.
//
//   y = (float)sum · scale_m · scale_n + bias      what every kernel has before it comes here
//   D = round(activation(y) + residual)            or, for an int8 D, clamp(rint(that · (1 / d_scale)), -127, 127)
//
// All dtypes are read at run time, so a kernel has one body for all combinations; it is entered only when has_options()
// says so, and should not be unrolled over the whole tile (activations take 10 – 25 instructions a value).
#pragma once

#include "core/activation.cuh"
#include "core/float_types.cuh"
#include "hwkern.h"
#include "ptx/convert.cuh"

namespace hwkern {

__host__ __device__ inline bool has_options(const Gemm& p) {
  return p.activation != Activation::kNone || p.residual || p.d_dtype == DType::kInt8;
}

// values[0 … COUNT) = row[n … n + COUNT), zeros from column `columns` on. One access of up to 16 bytes at a time where
// `aligned` (the row starts at a multiple of 16 bytes) and all are inside. n is a multiple of COUNT.
template <typename T, int COUNT>
__device__ __forceinline__ void load_row(const T* row, int64_t n, int64_t columns, bool aligned,
                                         float (&values)[COUNT]) {
  constexpr int WIDTH = COUNT * sizeof(T) > 16 ? 16 / sizeof(T) : COUNT;
  if (aligned && n + COUNT <= columns) {
#pragma unroll
    for (int i = 0; i < COUNT; i += WIDTH) {
      const auto vector = *reinterpret_cast<const Vector<T, WIDTH>*>(row + n + i);
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) values[i + e] = to_float(vector.v[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) values[e] = n + e < columns ? to_float(row[n + e]) : 0.0f;
  }
}

template <typename T, typename V, int COUNT, typename F>
__device__ __forceinline__ void store_row(T* row, int64_t n, int64_t columns, bool aligned, const V (&values)[COUNT],
                                          F round) {
  constexpr int WIDTH = COUNT * sizeof(T) > 16 ? 16 / sizeof(T) : COUNT;
  if (aligned && n + COUNT <= columns) {
#pragma unroll
    for (int i = 0; i < COUNT; i += WIDTH) {
      Vector<T, WIDTH> vector;
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) vector.v[e] = round(values[i + e]);
      *reinterpret_cast<Vector<T, WIDTH>*>(row + n + i) = vector;
    }
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; ++e)
      if (n + e < columns) row[n + e] = round(values[e]);
  }
}

// y += residual[m, n … n + COUNT).
template <int COUNT>
__device__ __forceinline__ void add_residual(const Gemm& p, float (&y)[COUNT], int64_t m, int64_t n) {
  float values[COUNT];
  auto load = [&](auto type) {
    using T = decltype(type);
    const T* residual = static_cast<const T*>(p.residual);
    const bool aligned = p.ldr * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(residual) % 16 == 0;
    load_row(residual + m * p.ldr, n, p.n, aligned, values);
  };
  switch (p.residual_dtype) {
    case DType::kFloat16: load(__half{}); break;
    case DType::kBFloat16: load(__nv_bfloat16{}); break;
    default: load(float{}); break;
  }
#pragma unroll
  for (int e = 0; e < COUNT; ++e) y[e] = __fadd_rn(y[e], values[e]);
}

// 1 / d_scale; 0 for a NaN, so that every result is 0.
__device__ __forceinline__ float inverse_d_scale(const Gemm& p) {
  if (p.d_dtype != DType::kInt8) return 0.0f;
  return __frcp_rn(*p.d_scale);
}

// clamp(rint(y · inverse), -127, 127), NaN to 0: __float2int_rn rounds half to even, saturates, and maps NaN to 0.
__device__ __forceinline__ int8_t quantized(float y, float inverse) {
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(__fmul_rn(y, inverse)))));
}

// Everything after y: D[m, n … n + COUNT), of which nothing is written outside [M, N]. n is a multiple of COUNT.
// `inverse`: of inverse_d_scale.
template <int COUNT>
__device__ __forceinline__ void finish_row(const Gemm& p, float (&y)[COUNT], int64_t m, int64_t n, float inverse) {
  if (m >= p.m) return;
  activate(p.activation, y);
  if (p.residual) add_residual(p, y, m, n);
  auto store = [&](auto type, auto round) {
    using T = decltype(type);
    T* d = static_cast<T*>(p.d);
    const bool aligned = p.ldd * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(d) % 16 == 0;
    store_row(d + m * p.ldd, n, p.n, aligned, y, round);
  };
  switch (p.d_dtype) {
    case DType::kFloat16: store(__half{}, [](float v) { return from_float<__half>(v); }); break;
    case DType::kBFloat16: store(__nv_bfloat16{}, [](float v) { return from_float<__nv_bfloat16>(v); }); break;
    case DType::kInt8: store(int8_t{}, [=](float v) { return quantized(v, inverse); }); break;
    default: store(float{}, [](float v) { return v; }); break;
  }
}

}  // namespace hwkern
