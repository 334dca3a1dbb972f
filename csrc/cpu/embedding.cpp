// Rows of an int8 table on the CPU: plain loops that the compiler vectorises, once per instruction set. Same bits as the
// GPU's kernel.
#include <atomic>

#include "cpu/cpu.h"
#include "cpu/float_bits.h"
#include "cpu/parallel.h"
#include "quant/embedding.h"

namespace hwkern::cpu {
namespace {

struct Lookup : Embedding {
  std::atomic<bool>* outside;  // set when an index is

  HWKERN_INLINE int64_t index(int64_t i) const {
    return wide_indices ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
  }
};

constexpr int64_t kAhead = 4;  // rows: one of the table is seldom in a cache, and no two are neighbours

template <typename T>
HWKERN_INLINE void lookup_range(const Lookup& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t index = p.index(i);
    if (index < 0 || index >= p.n) {
      p.outside->store(true, std::memory_order_relaxed);
      return;
    }
    if (const int64_t next = i + kAhead < end ? p.index(i + kAhead) : -1; next >= 0 && next < p.n)
      for (int64_t c = 0; c < p.k; c += 64) __builtin_prefetch(p.weight + next * p.ldb + c);
    const int8_t* q = p.weight + index * p.ldb;
    const float scale = p.weight_scale[index];
    auto* y = static_cast<typename T::Bits*>(p.y) + i * p.ldy;
#pragma omp simd
    for (int64_t c = 0; c < p.k; ++c) y[c] = T::narrow(static_cast<float>(q[c]) * scale);
  }
}

HWKERN_CLONES void lookup_float32(const Lookup& p, int64_t begin, int64_t end) { lookup_range<Float32>(p, begin, end); }
HWKERN_CLONES void lookup_float16(const Lookup& p, int64_t begin, int64_t end) { lookup_range<Float16>(p, begin, end); }
HWKERN_CLONES void lookup_bfloat16(const Lookup& p, int64_t begin, int64_t end) {
  lookup_range<BFloat16>(p, begin, end);
}

}  // namespace

Status embedding(const Embedding& problem, int threads) {
  if (problem.m == 0) return kSuccess;
  if (const Status status = validate(problem); !status.ok()) return status;
  if (threads < 1) return invalid("embedding: at least one thread is needed");
  std::atomic<bool> outside{false};
  const Lookup p{problem, &outside};
  switch (p.y_dtype) {
    case DType::kFloat32: over_rows(lookup_float32, p, threads); break;
    case DType::kFloat16: over_rows(lookup_float16, p, threads); break;
    default: over_rows(lookup_bfloat16, p, threads);
  }
  return outside ? invalid("embedding: an index is outside of the table") : kSuccess;
}

}  // namespace hwkern::cpu
