// Quantize and rescale on the CPU: plain loops that the compiler vectorises, once per instruction set.
//
// NOTE: compiled (CMakeLists.txt) with -ffp-contract=off, because a fused multiply-add rounds once where the contract
// says twice, and with -fno-trapping-math, which changes no result but lets GCC compute both sides of a choice.
#include "cpu/cpu.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/status.h"
#include "cpu/float_bits.h"
#include "cpu/parallel.h"

namespace hwkern::cpu {
namespace {

// ---- Quantize -----------------------------------------------------------------------------------------------------

template <typename T>
HWKERN_INLINE void quantize_row(const typename T::Bits* x, int8_t* q, float* scale, int64_t k, int64_t ldq) {
  using Bits = typename T::Bits;
  // Magnitudes order like their bits, with infinity and then NaN on top: one integer maximum finds all three.
  Bits top = 0;
  for (int64_t i = 0; i < k; ++i) top = std::max(top, static_cast<Bits>(x[i] & T::kMagnitude));
  if (top >= T::kInfinity) {
    *scale = NAN;
    std::memset(q, 0, static_cast<size_t>(ldq));
    return;
  }
  *scale = std::max(T::widen(top) / 127.0f, FLT_MIN);
  const float inverse = 1.0f / *scale;
  // |x · inverse| < 127.5, so there is nothing to clamp. Adding 1.5 · 2²³ leaves no bits below 1, so the addition
  // rounds to the nearest (even) integer, which is then the low byte of the sum.
#pragma omp simd
  for (int64_t i = 0; i < k; ++i) q[i] = static_cast<int8_t>(to_bits(T::widen(x[i]) * inverse + 0x1.8p23f));
  std::memset(q + k, 0, static_cast<size_t>(ldq - k));
}

template <typename T>
HWKERN_INLINE void quantize_range(const Quantize& p, int64_t begin, int64_t end) {
  const auto* x = static_cast<const typename T::Bits*>(p.x);
  for (int64_t m = begin; m < end; ++m) quantize_row<T>(x + m * p.ldx, p.q + m * p.ldq, p.scale + m, p.k, p.ldq);
}

HWKERN_CLONES void quantize_float32(const Quantize& p, int64_t begin, int64_t end) {
  quantize_range<Float32>(p, begin, end);
}
HWKERN_CLONES void quantize_float16(const Quantize& p, int64_t begin, int64_t end) {
  quantize_range<Float16>(p, begin, end);
}
HWKERN_CLONES void quantize_bfloat16(const Quantize& p, int64_t begin, int64_t end) {
  quantize_range<BFloat16>(p, begin, end);
}

// ---- Rescale ------------------------------------------------------------------------------------------------------

template <typename T>
HWKERN_INLINE void widen_all(const void* from, float* to, int64_t n) {
  const auto* x = static_cast<const typename T::Bits*>(from);
  for (int64_t i = 0; i < n; ++i) to[i] = T::widen(x[i]);
}

HWKERN_INLINE void widen_bias(const Rescale& p, int64_t n0, float* to, int64_t n) {
  switch (p.bias_dtype) {
    case DType::kFloat16: return widen_all<Float16>(static_cast<const int16_t*>(p.bias) + n0, to, n);
    case DType::kBFloat16: return widen_all<BFloat16>(static_cast<const int16_t*>(p.bias) + n0, to, n);
    default: return widen_all<Float32>(static_cast<const int32_t*>(p.bias) + n0, to, n);
  }
}

constexpr int64_t kTile = 512;  // columns; their scales and biases, widened once, stay in the L1 cache for all rows

template <typename T>
HWKERN_INLINE void rescale_range(const Rescale& p, int64_t begin, int64_t end) {
  float scale[kTile], bias[kTile];
  for (int64_t n0 = 0; n0 < p.n; n0 += kTile) {
    const int64_t n = std::min(kTile, p.n - n0);
    // What is absent becomes what changes no bit: y · 1 and y + (-0).
    if (p.scale_n) {
      std::copy_n(p.scale_n + n0, n, scale);
    } else {
      std::fill_n(scale, n, 1.0f);
    }
    if (p.bias) {
      widen_bias(p, n0, bias, n);
    } else {
      std::fill_n(bias, n, -0.0f);
    }
    for (int64_t m = begin; m < end; ++m) {
      const float scale_m = p.scale_m ? p.scale_m[m] : 1.0f;
      const int32_t* sum = p.sum + m * p.n + n0;
      auto* y = static_cast<typename T::Bits*>(p.y) + m * p.n + n0;
#pragma omp simd  // also where y is sum
      for (int64_t i = 0; i < n; ++i) y[i] = T::narrow(static_cast<float>(sum[i]) * scale_m * scale[i] + bias[i]);
    }
  }
}

HWKERN_CLONES void rescale_float32(const Rescale& p, int64_t begin, int64_t end) {
  rescale_range<Float32>(p, begin, end);
}
HWKERN_CLONES void rescale_float16(const Rescale& p, int64_t begin, int64_t end) {
  rescale_range<Float16>(p, begin, end);
}
HWKERN_CLONES void rescale_bfloat16(const Rescale& p, int64_t begin, int64_t end) {
  rescale_range<BFloat16>(p, begin, end);
}

}  // namespace

Status quantize_rows(const Quantize& p, int threads) {
  if (p.m == 0) return kSuccess;
  if (p.m < 0 || p.k < 1) return invalid("quantize: M >= 0 and K >= 1 are needed");
  if (p.ldx < p.k || p.ldq < p.k) return invalid("quantize: a leading dimension is shorter than its row");
  if (!p.x || !p.q || !p.scale) return invalid("quantize: x, q and scale must not be null");
  if (threads < 1) return invalid("quantize: at least one thread is needed");
  switch (p.x_dtype) {
    case DType::kFloat32: over_rows(quantize_float32, p, threads); break;
    case DType::kFloat16: over_rows(quantize_float16, p, threads); break;
    case DType::kBFloat16: over_rows(quantize_bfloat16, p, threads); break;
    default: return invalid("quantize: x must be float32, float16 or bfloat16");
  }
  return kSuccess;
}

Status rescale(const Rescale& p, int threads) {
  if (p.m == 0 || p.n == 0) return kSuccess;
  if (p.m < 0 || p.n < 0) return invalid("rescale: M >= 0 and N >= 0 are needed");
  if (!p.sum || !p.y) return invalid("rescale: sum and y must not be null");
  if (p.bias && !is_float(p.bias_dtype)) return invalid("rescale: the bias must be float32, float16 or bfloat16");
  if (threads < 1) return invalid("rescale: at least one thread is needed");
  switch (p.y_dtype) {
    case DType::kFloat32: over_rows(rescale_float32, p, threads); break;
    case DType::kFloat16: over_rows(rescale_float16, p, threads); break;
    case DType::kBFloat16: over_rows(rescale_bfloat16, p, threads); break;
    default: return invalid("rescale: y must be float32, float16 or bfloat16");
  }
  return kSuccess;
}

}  // namespace hwkern::cpu
