// The float halves of an int8 layer on the CPU; torch multiplies in between. Same bits as the GPU's kernels.
#pragma once

#include "hwkern.h"

namespace hwkern::cpu {

// quantize_per_token of hwkern.h, on host pointers. `threads` is the most threads to use, at least
// 1; the others come from the OpenMP runtime that the process has loaded, and without one there are none.
Status quantize_rows(const Quantize& problem, int threads);

// norm_quantize of hwkern.h, on host pointers: the same bits.
Status norm_quantize(const NormQuantize& problem, int threads);

// y[m, n] = round(((float)sum[m, n] * scale_m[m]) * scale_n[n] + bias[n]), the output of hwkern.h's GEMM.
struct Rescale {
  const int32_t* sum;    // [M, N], dense
  const float* scale_m;  // [M], or null for 1
  const float* scale_n;  // [N], or null for 1
  const void* bias;      // [N] of bias_dtype, or null for none
  void* y;               // [M, N] of y_dtype, dense; may be sum itself when y is float32
  int64_t m, n;
  DType bias_dtype;      // kFloat32, kFloat16 or kBFloat16
  DType y_dtype;         // the same three
};

Status rescale(const Rescale& problem, int threads);

// embedding of hwkern.h, on host pointers: the same bits. An index outside [0, N) is kInvalidArgument, y then undefined.
Status embedding(const Embedding& problem, int threads);

}  // namespace hwkern::cpu
