// The three float types of hwkern's inputs and outputs, and float32 as the type of all arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/status.h"

namespace hwkern {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// One rounding, to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float load_float(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat16: return to_float(static_cast<const __half*>(p)[i]);
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

// COUNT values of T that move as one access; 16 bytes at most.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  T v[COUNT];
};

// Calls f(T{}) with the C++ type of a float dtype: one instantiation for each.
template <typename F>
Status with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    default: return invalid("dtype: float32, float16 or bfloat16 is needed here");
  }
}

}  // namespace hwkern
