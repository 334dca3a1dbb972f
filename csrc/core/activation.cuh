// The activations of hwkern.h on float32, for every kernel that ends or begins with one.
//
// Each result is within 2 ulp of |y| (GELU: 4), not of itself: where an activation is nearly 0 its relative error is larger.
#pragma once

#include "hwkern.h"
#include "ptx/approximate.cuh"

namespace hwkern {

// y · Φ(y) in 15 instructions, within 4 ulp of |y|; with erff, some 40, the kernels wait for them and not for memory.
// Φ(-u) = P(t) · exp(-u²/2), t = 1 / (1 + 0.33·u); P fitted for the smallest absolute error, 4.3e-8.
__device__ __forceinline__ float gelu(float y) {
  const float u = fabsf(y), t = ptx::reciprocal(__fmaf_rn(0.33f, u, 1.0f));
  float p = __fmaf_rn(-0.110919852f, t, 0.380103646f);
  p = __fmaf_rn(p, t, -0.097255724f);
  p = __fmaf_rn(p, t, 0.206786592f);
  p = __fmaf_rn(p, t, 0.121285294f);
  const float tail = __fmul_rn(__fmul_rn(p, t), ptx::exp2(__fmul_rn(__fmul_rn(u, -0.72134752f), u)));
  return __fmul_rn(y, y >= 0.0f ? __fsub_rn(1.0f, tail) : tail);
}

// y / (1 + exp(-x)). Relative to |y| an error of exp counts σ(1 - σ) ≤ ¼ of itself, so the fast exp and division do.
__device__ __forceinline__ float times_sigmoid(float y, float x) { return __fdividef(y, 1.0f + __expf(-x)); }

template <Activation A>
__device__ __forceinline__ float activated(float y) {
  if constexpr (A == Activation::kRelu) {
    return y < 0.0f ? 0.0f : y;
  } else if constexpr (A == Activation::kGelu) {
    return gelu(y);
  } else if constexpr (A == Activation::kGeluTanh) {
    // ½(1 + tanh u) = 1 / (1 + exp(-2u)), 2u = 2·√(2/π)·(y + 0.044715·y³)
    return times_sigmoid(y, y * (1.5957691f + 0.071354816f * y * y));
  } else if constexpr (A == Activation::kSilu) {
    return times_sigmoid(y, y);
  } else {
    return y;
  }
}

// In place; the choice is made once for all COUNT values.
template <int COUNT>
__device__ __forceinline__ void activate(Activation activation, float (&y)[COUNT]) {
  switch (activation) {
#define HWKERN_ACTIVATE(A) \
  case A: _Pragma("unroll") for (float& value : y) value = activated<A>(value); break;
    HWKERN_ACTIVATE(Activation::kRelu)
    HWKERN_ACTIVATE(Activation::kGelu)
    HWKERN_ACTIVATE(Activation::kGeluTanh)
    HWKERN_ACTIVATE(Activation::kSilu)
#undef HWKERN_ACTIVATE
    default: break;
  }
}

}  // namespace hwkern
