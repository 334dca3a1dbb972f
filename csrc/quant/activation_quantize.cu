// activation(x), or activation(x) · up, of each row straight to int8 (formulas in hwkern.h).
//
// A row is read once; its results stay in registers between the maximum and the rounding. Gated, a pass moves
// M·K·(2·sizeof(T) + 1) bytes where torch's chain moves 2·sizeof(T) to silu, 3·sizeof(T) to the product and
// sizeof(T) + 1 to the quantization: 5 against 13 bytes an element in bfloat16. Rows too long for the registers are
// read, and computed, a second time.
#include "core/activation.cuh"
#include "core/launch.cuh"
#include "ptx/grid.cuh"
#include "quant/kernels.h"
#include "quant/row.cuh"

namespace hwkern {
namespace {

// x becomes the activation of x, rounded to T, and with `up` the product, rounded again. One choice a vector: hoisted over
// several, their values are all alive at once and do not fit in the registers.
template <typename T, bool GATED>
__device__ __forceinline__ void apply(Activation activation, RowVector<T>& x, const RowVector<T>& up) {
  float y[RowVector<T>::COUNT];
  x.values(y);
  activate(activation, y);
  x.set(y);
  if (GATED) x.multiply(up);
  x.stay_packed();
}

// `dense`: y [M, K], which is stored as well, or null. blockDim = (threads of a row, rows of a block); blockDim.y > 1 only
// with blockDim.x == 32. WHOLE: rows are whole (see RowVector) and fit in registers. Otherwise (with VECTORS = 1) anything
// goes.
template <typename T, bool GATED, int VECTORS, bool WHOLE>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    activation_quantize_kernel(const ActivationQuantize p, T* const dense, const bool rows_aligned) {
  using Row = RowVector<T>;
  const bool aligned = WHOLE || rows_aligned;
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const uint32_t stride = blockDim.x * Row::COUNT, first = threadIdx.x * Row::COUNT;
  ptx::grid_wait();
  ptx::grid_release();
  if (m >= p.m) return;  // a whole warp, and only where no other warp works on its row

  const T* x = static_cast<const T*>(p.x) + m * p.ldx;
  const T* up = GATED ? static_cast<const T*>(p.up) + m * p.ldup : nullptr;
  Row kept[VECTORS], factor[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    kept[v].template load<WHOLE>(x, first + v * stride, p.k, aligned);
    if (GATED) factor[v].template load<WHOLE>(up, first + v * stride, p.k, aligned);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) apply<T, GATED>(p.activation, kept[v], factor[v]);
  T* y = dense + m * p.k;
  auto store = [&](const Row& row, uint32_t c) {
    if (dense) row.template store<WHOLE>(y, c, p.k, aligned);
  };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) store(kept[v], first + v * stride);
  auto apply_again = [&](uint32_t c) {
    Row row, its_factor;
    row.load(x, c, p.k, aligned);
    if (GATED) its_factor.load(up, c, p.k, aligned);
    apply<T, GATED>(p.activation, row, its_factor);
    return row;
  };

  float inverse;
  if (p.is_static) {
    inverse = __frcp_rn(p.scale[0]);
  } else {
    Largest<T> largest;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) largest.add(kept[v]);
    if constexpr (!WHOLE) {
      for (uint32_t c = first + VECTORS * stride; c < p.k; c += stride) largest.add(apply_again(c));
    }
    const TokenScale token(row_max(largest.bits()));
    if (threadIdx.x == 0) p.scale[m] = token.scale;
    inverse = token.inverse;
  }
  int8_t* q = p.q + m * p.ldq;
  auto same = [&](int) { return inverse; };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template quantize<WHOLE>(q, first + v * stride, p.ldq, aligned, same);
  if constexpr (!WHOLE) {
    for (uint32_t c = first + VECTORS * stride; c < p.ldq; c += stride) {
      const Row row = apply_again(c);
      row.quantize(q, c, p.ldq, aligned, same);
      store(row, c);
    }
  }
}

template <typename T, bool GATED>
Status launch_activation(const ActivationQuantize& p, T* y, const Device& device, Stream stream) {
  constexpr int COUNT = RowVector<T>::COUNT;
  const int64_t vectors = ceil_div(p.ldq, COUNT);
  const bool aligned = is_aligned(p.x, 16) && p.ldx % COUNT == 0 && is_aligned(p.q, COUNT) && p.ldq % COUNT == 0 &&
                       (!GATED || (is_aligned(p.up, 16) && p.ldup % COUNT == 0)) &&
                       (!y || (is_aligned(y, 16) && p.k % COUNT == 0));
  const RowShape shape(aligned && p.k % COUNT == 0, p.m, vectors, device.sm_count);
  const Launch at{shape.grid, shape.block, 0, 1, device.compute >= 90};
  if (!shape.whole) return launch<activation_quantize_kernel<T, GATED, 1, false>>(at, stream, p, y, aligned);
  return shape.vectors == 1 ? launch<activation_quantize_kernel<T, GATED, 1, true>>(at, stream, p, y, true)
                            : launch<activation_quantize_kernel<T, GATED, 4, true>>(at, stream, p, y, true);
}

}  // namespace

Status launch_activation_quantize(const ActivationQuantize& p, void* y, const Device& device, Stream stream) {
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    T* dense = static_cast<T*>(y);
    return p.up ? launch_activation<T, true>(p, dense, device, stream)
                : launch_activation<T, false>(p, dense, device, stream);
  });
}

}  // namespace hwkern
