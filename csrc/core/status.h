// Status constants and the CUDA runtime's errors as Status.
#pragma once

#include "hwkern.h"

namespace hwkern {

constexpr Status kSuccess{StatusCode::kOk, ""};

constexpr Status invalid(const char* what) { return {StatusCode::kInvalidArgument, what}; }

constexpr bool is_float(DType t) { return t == DType::kFloat32 || t == DType::kFloat16 || t == DType::kBFloat16; }

constexpr int64_t size_of(DType t) {
  return t == DType::kInt8 ? 1 : (t == DType::kFloat16 || t == DType::kBFloat16) ? 2 : 4;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace hwkern
