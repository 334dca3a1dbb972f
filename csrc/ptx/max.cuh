// Maxima of packed 16-bit floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hwkern::ptx {

// In each half the larger of |a| and |b|, NaN if one is; its sign is that of a · b. One instruction from sm_86 on.
__device__ __forceinline__ uint32_t max_abs_f16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t d;
  asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  const __half2 d = __hmax2_nan(__habs2(*reinterpret_cast<const __half2*>(&a)), __habs2(*reinterpret_cast<const __half2*>(&b)));
  return *reinterpret_cast<const uint32_t*>(&d);
#endif
}
__device__ __forceinline__ uint32_t max_abs_bf16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t d;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;\n" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  const __nv_bfloat162 d = __hmax2_nan(__habs2(*reinterpret_cast<const __nv_bfloat162*>(&a)),
                                       __habs2(*reinterpret_cast<const __nv_bfloat162*>(&b)));
  return *reinterpret_cast<const uint32_t*>(&d);
#endif
}

}  // namespace hwkern::ptx
