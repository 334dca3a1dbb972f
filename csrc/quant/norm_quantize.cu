// RMSNorm or LayerNorm of each row, after adding a residual or not, straight to int8 (formulas in hwkern.h).
//
// A row is read once: h stays in registers while its sums are taken, becomes y there, and leaves as int8 (and as h and y
// when asked for). A pass moves M·K·(sizeof(T) + 1) bytes, the norm alone M·K·2·sizeof(T): 50 against 67 MB at
// 4096 × 4096 bfloat16. Rows too long for the registers are read again from L2, once for each sum and twice for y.
//
// The order of the sums is part of the contract and the same for every launch shape: a chunk is what a warp reads at
// once, 32 lanes of 16 bytes.
#include <type_traits>

#include "core/launch.cuh"
#include "ptx/grid.cuh"
#include "quant/kernels.h"
#include "quant/row.cuh"

namespace hwkern {
namespace {

// The upper half added to the lower until one is left.
template <int COUNT>
__device__ __forceinline__ float folded(float (&v)[COUNT]) {
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) v[i] = __fadd_rn(v[i], v[i + half]);
  return v[0];
}

__device__ __forceinline__ float plus_partner(float v, int distance) {
  return __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, distance));
}

// Folds each of COUNT (1, 2, 4) values over the 32 lanes; lane 32 / COUNT · i and those after it get the sum of v[i].
// In each of the first steps a lane hands over the half of the values that its partner keeps: 6 shuffles for 4 sums.
template <int COUNT>
__device__ __forceinline__ float folded_over_lanes(float (&v)[COUNT]) {
  const int lane_id = threadIdx.x % 32;
  int distance = 16;
#pragma unroll
  for (int half = COUNT / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane_id & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = __fadd_rn(kept, __shfl_xor_sync(0xffffffffu, given, distance));
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) v[0] = plus_partner(v[0], distance);
  return v[0];
}

// SAME: rows are whole (see RowVector) and fit in registers; weight and bias are absent, or of x's dtype and aligned; an
// offset comes only with kRms. Otherwise (with VECTORS = 1) anything goes.
template <typename T, Norm NORM, int VECTORS, bool SAME>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    norm_quantize_kernel(const NormQuantize p, const float inverse_k, const bool rows_aligned) {
  using Row = RowVector<T>;
  constexpr int COUNT = Row::COUNT;
  constexpr bool LAYER = NORM == Norm::kLayer;
  extern __shared__ float smem[];  // one float a chunk, for LAYER two
  const bool aligned = SAME || rows_aligned;
  const uint32_t warp_id = threadIdx.x / 32, lane_id = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const uint32_t k = p.k, stride = blockDim.x * COUNT, first = threadIdx.x * COUNT;
  const uint32_t rest = first + VECTORS * stride;  // where what does not fit in registers begins
  const uint32_t chunks = (k + 32 * COUNT - 1) / (32 * COUNT);

  // An absent weight is 1 and an absent bias -0: neither changes a bit.
  const float offset = p.weight ? p.offset : 0.0f;
  auto load_same = [&](Row& row, const void* from, uint32_t c, float absent) {
    if (from) {
      row.template load<SAME>(static_cast<const T*>(from), c, k, true);
    } else {
      float same[COUNT];
#pragma unroll
      for (int e = 0; e < COUNT; ++e) same[e] = absent;
      row.set(same);
    }
  };
  Row weight[VECTORS];
  auto load_weight = [&] {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) load_same(weight[v], p.weight, first + v * stride, 1.0f);
  };
  // Weights are constant: they may come while the kernel before still runs. With 4 vectors a thread the registers are
  // needed for the loads of h first, and other blocks hide the wait.
  if (SAME && VECTORS == 1) load_weight();
  ptx::grid_wait();
  ptx::grid_release();
  if (m >= p.m) return;  // a whole warp, and only where no other warp works on its row

  const T* x = static_cast<const T*>(p.x) + m * p.ldx;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + m * p.ldr : nullptr;
  T* h_out = p.h ? static_cast<T*>(p.h) + m * p.ldh : nullptr;
  T* y_out = p.y ? static_cast<T*>(p.y) + m * p.ldy : nullptr;

  // ---- h, and what is summed over it
  auto load_h = [&](Row& row, uint32_t c) {
    row.load(x, c, k, aligned);
    if (!residual) return;
    Row other;
    other.load(residual, c, k, aligned);
    row.add(other);
    if (h_out) row.store(h_out, c, k, aligned);
  };
  // NOTE: once h is written it may lie over x or the residual, so what is read again comes from there.
  auto load_h_again = [&](Row& row, uint32_t c) {
    if (h_out) {
      row.load(h_out, c, k, aligned);
    } else {
      load_h(row, c);
    }
  };
  // One vector's part of Σ term(h).
  auto sum_of = [&](const Row& row, uint32_t c, auto term) {
    float t[COUNT];
    row.values(t);
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      t[e] = term(t[e]);
      if (!SAME && c + e >= k) t[e] = 0.0f;
    }
    const float sum = folded(t);
    return c < k ? sum : 0.0f;
  };
  // Σ term(h) over the row. `of_vector`: the parts in registers; `load`: how the others are read.
  auto row_sum = [&](float (&of_vector)[VECTORS], float* of_chunk, auto load, auto term) {
    float total = folded_over_lanes(of_vector);
    if (blockDim.x == 32) {  // at most VECTORS chunks, one in each 32 / VECTORS lanes
#pragma unroll
      for (int distance = 16; distance > 16 / VECTORS; distance /= 2) total = plus_partner(total, distance);
      return __fadd_rn(total, 0.0f);
    }
    if (lane_id % (32 / VECTORS) == 0) {
      const uint32_t chunk = lane_id / (32 / VECTORS) * warps + warp_id;
      if (chunk < chunks) of_chunk[chunk] = total;
    }
    if constexpr (!SAME) {
      for (uint32_t c = rest; c - lane_id * COUNT < k; c += stride) {
        Row row;
        load(row, c);
        float part[1] = {sum_of(row, c, term)};
        total = folded_over_lanes(part);
        if (lane_id == 0) of_chunk[c / (32 * COUNT)] = total;
      }
    }
    __syncthreads();
    total = 0.0f;
#pragma unroll 1
    for (uint32_t i = lane_id; i < chunks; i += 32) total = __fadd_rn(total, of_chunk[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total = plus_partner(total, distance);
    return __fadd_rn(total, 0.0f);
  };

  Row kept[VECTORS];
  float of_vector[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template load<SAME>(x, first + v * stride, k, aligned);
  if (residual) {  // all loads before the first sum
    Row other[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) other[v].template load<SAME>(residual, first + v * stride, k, aligned);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      kept[v].add(other[v]);
      if (h_out) kept[v].template store<SAME>(h_out, first + v * stride, k, aligned);
    }
  }
  float mean = 0.0f;
  if constexpr (LAYER) {
    auto itself = [](float h) { return h; };
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) of_vector[v] = sum_of(kept[v], first + v * stride, itself);
    mean = __fmul_rn(row_sum(of_vector, smem + chunks, load_h, itself), inverse_k);
  }
  auto centred = [&](float h) { return LAYER ? __fsub_rn(h, mean) : h; };
  auto square = [&](float h) { return __fmul_rn(centred(h), centred(h)); };
  if (SAME && VECTORS > 1) load_weight();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].stay_packed();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) of_vector[v] = sum_of(kept[v], first + v * stride, square);
  const float squares =
      LAYER ? row_sum(of_vector, smem, load_h_again, square) : row_sum(of_vector, smem, load_h, square);
  const float r = __frcp_rn(__fsqrt_rn(__fadd_rn(__fmul_rn(squares, inverse_k), p.eps)));

  // ---- h becomes y; beyond the row it stays 0
  // Weights or biases at c, as float32.
  auto affine = [&](float (&w)[COUNT], const void* from, DType dtype, uint32_t c, float absent) {
    if constexpr (SAME) {
      Row row;
      load_same(row, from, c, absent);
      row.values(w);
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e) w[e] = from && c + e < k ? load_float(from, dtype, c + e) : absent;
    }
  };
  auto normalise = [&](Row& row, uint32_t c, const Row& its_weight) {
    if (c >= k) return;
    float y[COUNT], w[COUNT];
    row.values(y);
#pragma unroll
    for (int e = 0; e < COUNT; ++e) y[e] = __fmul_rn(centred(y[e]), r);
    if (SAME && NORM == Norm::kRmsRounded) {
      row.set(y);
      row.multiply(its_weight);
    } else {
      if (NORM == Norm::kRmsRounded) {
        row.set(y);
        row.values(y);
      }
      if (SAME) {
        its_weight.values(w);
      } else {
        affine(w, p.weight, p.weight_dtype, c, 1.0f);
      }
#pragma unroll
      for (int e = 0; e < COUNT; ++e)
        y[e] = __fmul_rn(y[e], SAME && NORM != Norm::kRms ? w[e] : __fadd_rn(offset, w[e]));
      if (LAYER) {
        affine(w, p.bias, p.bias_dtype, c, -0.0f);
#pragma unroll
        for (int e = 0; e < COUNT; ++e) y[e] = __fadd_rn(y[e], w[e]);
      }
#pragma unroll
      for (int e = 0; e < COUNT; ++e)
        if (!SAME && c + e >= k) y[e] = 0.0f;
      row.set(y);
    }
    if (y_out) row.template store<SAME>(y_out, c, k, aligned);
  };
  Largest<T> largest;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].stay_packed();
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    normalise(kept[v], first + v * stride, weight[v]);
    largest.add(kept[v]);
  }
  if constexpr (!SAME) {
    for (uint32_t c = rest; c < k; c += stride) {
      if (p.is_static && !y_out) break;
      Row row;
      load_h_again(row, c);
      normalise(row, c, weight[0]);
      largest.add(row);
    }
  }

  // ---- y to int8
  float inverse;
  if (p.is_static) {
    inverse = __frcp_rn(p.scale[0]);
  } else {
    const TokenScale token(row_max(largest.bits()));
    if (threadIdx.x == 0) p.scale[m] = token.scale;
    inverse = token.inverse;
  }
  int8_t* q = p.q + m * p.ldq;
  auto same = [&](int) { return inverse; };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template quantize<SAME>(q, first + v * stride, p.ldq, aligned, same);
  if constexpr (!SAME) {
    for (uint32_t c = rest; c < p.ldq; c += stride) {
      Row row;
      if (y_out) {  // NOTE: it may lie over x
        row.load(y_out, c, k, aligned);
      } else {
        load_h_again(row, c);
        normalise(row, c, weight[0]);
      }
      row.quantize(q, c, p.ldq, aligned, same);
    }
  }
}

template <typename T, Norm NORM>
Status launch_norm(const NormQuantize& p, const Device& device, Stream stream) {
  constexpr int COUNT = RowVector<T>::COUNT;
  const int64_t vectors = ceil_div(p.ldq, COUNT);
  auto rows_aligned = [](const void* base, int64_t ld) { return is_aligned(base, 16) && ld % COUNT == 0; };
  const bool aligned = rows_aligned(p.x, p.ldx) && is_aligned(p.q, COUNT) && p.ldq % COUNT == 0 &&
                       (!p.residual || rows_aligned(p.residual, p.ldr)) && (!p.h || rows_aligned(p.h, p.ldh)) &&
                       (!p.y || rows_aligned(p.y, p.ldy));
  const bool same = aligned && p.k % COUNT == 0 && (NORM == Norm::kRms || !p.weight || p.offset == 0.0f) &&
                    (!p.weight || (p.weight_dtype == p.x_dtype && is_aligned(p.weight, 16))) &&
                    (!p.bias || (p.bias_dtype == p.x_dtype && is_aligned(p.bias, 16)));
  const RowShape shape(same, p.m, vectors, device.sm_count);
  const int sums = (NORM == Norm::kLayer ? 2 : 1) * static_cast<int>(ceil_div(p.k, 32 * COUNT));
  const Launch at{shape.grid, shape.block, sums * static_cast<int>(sizeof(float)), 1, device.compute >= 90};
  const float inverse_k = 1.0f / static_cast<float>(p.k);
  if (!shape.whole) return launch<norm_quantize_kernel<T, NORM, 1, false>>(at, stream, p, inverse_k, aligned);
  return shape.vectors == 1 ? launch<norm_quantize_kernel<T, NORM, 1, true>>(at, stream, p, inverse_k, true)
                            : launch<norm_quantize_kernel<T, NORM, 4, true>>(at, stream, p, inverse_k, true);
}

}  // namespace

Status launch_norm_quantize(const NormQuantize& p, const Device& device, Stream stream) {
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.norm == Norm::kLayer) return launch_norm<T, Norm::kLayer>(p, device, stream);
    // In float32 the inner rounding does nothing.
    if constexpr (!std::is_same_v<T, float>)
      if (p.norm == Norm::kRmsRounded) return launch_norm<T, Norm::kRmsRounded>(p, device, stream);
    return launch_norm<T, Norm::kRms>(p, device, stream);
  });
}

}  // namespace hwkern
