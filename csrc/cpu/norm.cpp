// Norm and quantize on the CPU, in the order of operations that hwkern.h fixes. See quantize.cpp for how it is compiled.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "core/status.h"
#include "cpu/cpu.h"
#include "cpu/float_bits.h"
#include "cpu/parallel.h"
#include "quant/fused.h"

namespace hwkern::cpu {
namespace {

constexpr int kLanes = 32;

// The sum of hwkern.h's order over `padded` floats: E consecutive ones folded, 32 of those folded, and the chunks' sums.
template <int E>
HWKERN_INLINE float ordered_sum(const float* v, int64_t padded) {
  float total[kLanes] = {};
  int64_t chunk = 0;
  for (int64_t c = 0; c < padded; c += kLanes * E, ++chunk) {
    float lane[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const float* e = v + c + l * E;
      if (E == 8) {
        lane[l] = ((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7]));
      } else {
        lane[l] = (e[0] + e[2]) + (e[1] + e[3]);
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    total[chunk % kLanes] += lane[0];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0] + 0.0f;
}

HWKERN_INLINE float widened(const void* p, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat16: return Float16::widen(static_cast<const int16_t*>(p)[i]);
    case DType::kBFloat16: return BFloat16::widen(static_cast<const int16_t*>(p)[i]);
    default: return static_cast<const float*>(p)[i];
  }
}

// What rows share: the weight and bias as float32 (1 and -0 where absent: neither changes a bit), and room for one row
// and one product of it, padded with zeros to whole chunks.
struct Scratch {
  std::vector<float> weight, bias, row, term;

  Scratch(const NormQuantize& p, int64_t padded) : weight(p.k), bias(p.k), row(padded), term(padded) {
    const float offset = p.weight ? p.offset : 0.0f;
    for (int64_t i = 0; i < p.k; ++i) {
      weight[i] = offset + (p.weight ? widened(p.weight, p.weight_dtype, i) : 1.0f);
      bias[i] = p.bias ? widened(p.bias, p.bias_dtype, i) : -0.0f;
    }
  }
};

template <typename T>
HWKERN_INLINE void norm_row(const NormQuantize& p, int64_t m, int64_t padded, Scratch& scratch) {
  using Bits = typename T::Bits;
  constexpr int E = 16 / sizeof(Bits);
  const int64_t k = p.k;
  float* h = scratch.row.data();
  float* term = scratch.term.data();
  const float* weight = scratch.weight.data();
  const float* bias = scratch.bias.data();
  const float inverse_k = 1.0f / static_cast<float>(k);

  const Bits* x = static_cast<const Bits*>(p.x) + m * p.ldx;
  if (p.residual) {
    const Bits* residual = static_cast<const Bits*>(p.residual) + m * p.ldr;
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) h[i] = T::widen(T::narrow(T::widen(x[i]) + T::widen(residual[i])));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < k; ++i) h[i] = T::widen(x[i]);
  }
  if (p.h) {
    Bits* out = static_cast<Bits*>(p.h) + m * p.ldh;
    for (int64_t i = 0; i < k; ++i) out[i] = T::narrow(h[i]);
  }
  if (p.norm == Norm::kLayer) {
    const float mean = ordered_sum<E>(h, padded) * inverse_k;
    for (int64_t i = 0; i < k; ++i) h[i] = h[i] - mean;
  }
  for (int64_t i = 0; i < k; ++i) term[i] = h[i] * h[i];
  const float r = 1.0f / std::sqrt(ordered_sum<E>(term, padded) * inverse_k + p.eps);

  const bool twice = p.norm == Norm::kRmsRounded;
  uint32_t top = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < k; ++i) {
    float n = h[i] * r;
    n = twice ? T::widen(T::narrow(n)) : n;
    const float y = T::widen(T::narrow(n * weight[i] + bias[i]));
    term[i] = y;
    top = std::max(top, to_bits(y) & 0x7fffffffu);
  }
  if (p.y) {
    Bits* out = static_cast<Bits*>(p.y) + m * p.ldy;
    for (int64_t i = 0; i < k; ++i) out[i] = T::narrow(term[i]);
  }

  float inverse;
  if (p.is_static) {
    inverse = 1.0f / p.scale[0];
  } else {
    const bool finite = top < 0x7f800000u;
    const float scale = std::max(from_bits(top) / 127.0f, FLT_MIN);
    p.scale[m] = finite ? scale : NAN;
    inverse = finite ? 1.0f / scale : 0.0f;
  }
  int8_t* q = p.q + m * p.ldq;
  for (int64_t i = 0; i < k; ++i) {
    // NaN, also that of an infinity times 0, becomes 0; the addition rounds to an integer, as in quantize.cpp.
    float v = term[i] * inverse;
    v = v > -127.0f ? v : (v == v ? -127.0f : 0.0f);
    v = v < 127.0f ? v : 127.0f;
    q[i] = static_cast<int8_t>(to_bits(v + 0x1.8p23f));
  }
  std::memset(q + k, 0, static_cast<size_t>(p.ldq - k));
}

template <typename T>
HWKERN_INLINE void norm_range(const NormQuantize& p, int64_t begin, int64_t end) {
  const int64_t padded = round_up(p.k, kLanes * 16 / sizeof(typename T::Bits));
  Scratch scratch(p, padded);
  for (int64_t m = begin; m < end; ++m) norm_row<T>(p, m, padded, scratch);
}

HWKERN_CLONES void norm_float32(const NormQuantize& p, int64_t begin, int64_t end) {
  norm_range<Float32>(p, begin, end);
}
HWKERN_CLONES void norm_float16(const NormQuantize& p, int64_t begin, int64_t end) {
  norm_range<Float16>(p, begin, end);
}
HWKERN_CLONES void norm_bfloat16(const NormQuantize& p, int64_t begin, int64_t end) {
  norm_range<BFloat16>(p, begin, end);
}

}  // namespace

Status norm_quantize(const NormQuantize& p, int threads) {
  if (p.m == 0) return kSuccess;
  if (const Status status = validate(p); !status.ok()) return status;
  if (threads < 1) return invalid("norm_quantize: at least one thread is needed");
  switch (p.x_dtype) {
    case DType::kFloat16: over_rows(norm_float16, p, threads); break;
    case DType::kBFloat16: over_rows(norm_bfloat16, p, threads); break;
    default: over_rows(norm_float32, p, threads); break;
  }
  return kSuccess;
}

}  // namespace hwkern::cpu
