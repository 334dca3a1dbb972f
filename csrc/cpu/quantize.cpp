// Quantize and rescale on the CPU: plain loops that the compiler vectorises, once per instruction set.
//
// NOTE: compiled (CMakeLists.txt) with -ffp-contract=off, because a fused multiply-add rounds once where the contract
// says twice, and with -fno-trapping-math, which changes no result but lets GCC compute both sides of a choice.
#include "cpu/cpu.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>

#include "core/status.h"
#include "cpu/float_bits.h"

// CMake sets HWKERN_CPU_CLONES where the compiler and the C library can choose a version of a function at load time.
#if HWKERN_CPU_CLONES
#define HWKERN_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define HWKERN_CLONES
#endif

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

// ---- Rows over threads --------------------------------------------------------------------------------------------

// libgomp's entry point, which Clang's and Intel's runtimes have too: run(data) on up to `threads` threads.
using Parallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP runtime that the process has loaded already: torch's. Its workers wait actively between two operators of a
// model, so a pool of our own would fight them for the cores, and a second OpenMP runtime would bring one.
Parallel loaded_openmp() {
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return parallel;
}

template <typename Problem>
struct Shares {
  void (*run)(const Problem&, int64_t begin, int64_t end);
  const Problem& problem;
  int64_t share;
  std::atomic<int64_t> next;

  // Every thread takes shares until none is left, however many threads there are.
  static void take(void* data) {
    auto& self = *static_cast<Shares*>(data);
    for (int64_t begin; (begin = self.next.fetch_add(self.share)) < self.problem.m;)
      self.run(self.problem, begin, std::min(begin + self.share, self.problem.m));
  }
};

// run(problem, begin, end) over all rows.
template <typename Problem>
void over_rows(void (*run)(const Problem&, int64_t, int64_t), const Problem& problem, int threads) {
  const Parallel parallel = threads > 1 ? loaded_openmp() : nullptr;
  if (!parallel) return run(problem, 0, problem.m);
  Shares<Problem> shares{run, problem, ceil_div(problem.m, threads), {0}};
  parallel(Shares<Problem>::take, &shares, static_cast<unsigned>(threads), 0);
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
