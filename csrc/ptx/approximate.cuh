// The special-function unit's reciprocal and power of two: one instruction each, subnormals flushed to zero.
#pragma once

namespace hwkern::ptx {

// 1 / x within 1 ulp; 0 for an infinite x.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}

// 2^x within 2 ulp.
__device__ __forceinline__ float exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace hwkern::ptx
