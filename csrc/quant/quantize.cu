// Quantize float rows to int8: dynamic per token, or with static scales (formulas and special values in hwkern.h).
//
// Per token, a row belongs to blockDim.x threads (one warp for short rows, a block for long ones), which read it once
// in 16-byte vectors, keep up to VECTORS of them each in registers, reduce the absolute maximum, and write the int8
// values. What does not fit in registers is read a second time, from L2.
// A pass moves M·K·(sizeof(T) + 1) bytes; at 4096 × 4096 bfloat16 that is 50 MB, 16.5 µs at 3.05 TB/s.
#include <cfloat>

#include "core/device.h"
#include "core/float_types.cuh"
#include "core/launch.cuh"
#include "ptx/convert.cuh"
#include "ptx/grid.cuh"
#include "quant/kernels.h"

namespace hwkern {
namespace {

constexpr float QMAX = 127.0f;
constexpr uint32_t INF_BITS = 0x7f800000u;

// |x| as an integer that orders like |x|, with NaN above infinity: a maximum over these loses no NaN (fmaxf would).
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// clamp(rint(x · inverse), -127, 127), NaN to 0. __float2int_rn rounds half to even, saturates, and maps NaN to 0.
__device__ __forceinline__ int quantized(float x, float inverse) {
  return max(-127, min(127, __float2int_rn(__fmul_rn(x, inverse))));
}

// One thread's 16 bytes of a row, as COUNT elements; `valid` of them lie inside the row, the rest count as zeros.
template <typename T>
struct RowVector {
  static constexpr int COUNT = 16 / sizeof(T);
  Vector<T, COUNT> raw;

  template <bool ALIGNED>
  __device__ __forceinline__ void load(const T* row, int64_t first, int64_t k) {
    if (ALIGNED && first + COUNT <= k) {
      raw = *reinterpret_cast<const Vector<T, COUNT>*>(row + first);
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e) raw.v[e] = first + e < k ? row[first + e] : from_float<T>(0.0f);
    }
  }

  __device__ __forceinline__ uint32_t max_magnitude(uint32_t so_far) const {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) so_far = max(so_far, magnitude(to_float(raw.v[e])));
    return so_far;
  }

  // `inverse(e)`: 1 / scale for element e of this vector. Writes only below `columns`.
  template <bool ALIGNED, typename F>
  __device__ __forceinline__ void store(int8_t* q, int64_t first, int64_t columns, F inverse) const {
    Vector<uint32_t, COUNT / 4> packed;
#pragma unroll
    for (int e = 0; e < COUNT; e += 4) {
      int v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = quantized(to_float(raw.v[e + i]), inverse(e + i));
      packed.v[e / 4] = ptx::pack_s8x4(v[0], v[1], v[2], v[3]);
    }
    if (ALIGNED && first + COUNT <= columns) {
      *reinterpret_cast<Vector<uint32_t, COUNT / 4>*>(q + first) = packed;
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e)
        if (first + e < columns) q[first + e] = static_cast<int8_t>(packed.v[e / 4] >> (e % 4 * 8));
    }
  }
};

// The maximum over the blockDim.x threads of this row; every thread gets it.
__device__ __forceinline__ uint32_t row_max(uint32_t v) {
  v = __reduce_max_sync(0xffffffffu, v);
  if (blockDim.x == 32) return v;  // several rows a block, a warp each
  __shared__ uint32_t of_warp[32];
  const int warp_id = threadIdx.x / 32, lane_id = threadIdx.x % 32;
  if (lane_id == 0) of_warp[warp_id] = v;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu, lane_id < blockDim.x / 32 ? of_warp[lane_id] : 0u);
}

// blockDim = (threads of a row, rows of a block); blockDim.y > 1 only with blockDim.x == 32.
template <typename T, int VECTORS, bool ALIGNED>
__global__ void __launch_bounds__(1024) quantize_per_token_kernel(const Quantize p) {
  using Row = RowVector<T>;
  ptx::grid_wait();
  ptx::grid_release();
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= p.m) return;
  const T* x = static_cast<const T*>(p.x) + m * p.ldx;
  int8_t* q = p.q + m * p.ldq;
  const int64_t stride = int64_t(blockDim.x) * Row::COUNT, first = int64_t(threadIdx.x) * Row::COUNT;

  Row kept[VECTORS];
  uint32_t largest = 0;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template load<ALIGNED>(x, first + v * stride, p.k);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) largest = kept[v].max_magnitude(largest);
  for (int64_t c = first + VECTORS * stride; c < p.k; c += stride) {
    Row row;
    row.template load<ALIGNED>(x, c, p.k);
    largest = row.max_magnitude(largest);
  }
  largest = row_max(largest);

  const bool finite = largest < INF_BITS;
  const float scale = fmaxf(__fdiv_rn(__uint_as_float(largest), QMAX), FLT_MIN);
  const float inverse = finite ? __frcp_rn(scale) : 0.0f;
  if (threadIdx.x == 0) p.scale[m] = finite ? scale : __uint_as_float(0x7fc00000u);
  // In a row that is not finite the products are 0, or NaN, and both become 0.
  auto same = [&](int) { return inverse; };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template store<ALIGNED>(q, first + v * stride, p.ldq, same);
  for (int64_t c = first + VECTORS * stride; c < p.ldq; c += stride) {
    Row row;
    row.template load<ALIGNED>(x, c, p.k);
    row.template store<ALIGNED>(q, c, p.ldq, same);
  }
}

// One vector of STATIC_ROWS consecutive rows a thread, so that a column's reciprocals are computed once for all of them;
// blockIdx.x walks the rows, blockIdx.y the columns.
constexpr int STATIC_ROWS = 4;

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(256) quantize_static_kernel(const Quantize p, ScaleAxis axis) {
  using Row = RowVector<T>;
  const int64_t m0 = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * STATIC_ROWS;
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * Row::COUNT;
  if (c >= p.ldq) return;
  const T* x = static_cast<const T*>(p.x);
  Row row[STATIC_ROWS];
#pragma unroll
  for (int r = 0; r < STATIC_ROWS; ++r)
    if (m0 + r < p.m) row[r].template load<ALIGNED>(x + (m0 + r) * p.ldx, c, p.k);
  float of_column[Row::COUNT];  // the whole tensor's scale, again and again, when there is one
#pragma unroll
  for (int e = 0; e < Row::COUNT; ++e)
    of_column[e] = axis == ScaleAxis::kRow      ? 0.0f
                   : axis == ScaleAxis::kTensor ? __frcp_rn(p.scale[0])
                   : c + e < p.k                ? __frcp_rn(p.scale[c + e])
                                                : 0.0f;
#pragma unroll
  for (int r = 0; r < STATIC_ROWS; ++r) {
    if (m0 + r >= p.m) break;
    const float of_row = axis == ScaleAxis::kRow ? __frcp_rn(p.scale[m0 + r]) : 0.0f;
    row[r].template store<ALIGNED>(p.q + (m0 + r) * p.ldq, c, p.ldq,
                                   [&](int e) { return axis == ScaleAxis::kRow ? of_row : of_column[e]; });
  }
}

// Whether 16-byte loads of x and COUNT-byte stores of q stay aligned in every row.
template <typename T>
bool rows_aligned(const Quantize& p) {
  constexpr int COUNT = RowVector<T>::COUNT;
  return is_aligned(p.x, 16) && p.ldx % COUNT == 0 && is_aligned(p.q, COUNT) && p.ldq % COUNT == 0;
}

template <typename T, int VECTORS>
Status launch_rows(const Quantize& p, dim3 block, Stream stream) {
  Device device;
  if (const Status status = current_device(&device); !status.ok()) return status;
  Launch shape{dim3(static_cast<unsigned>(ceil_div(p.m, block.y))), block};
  shape.overlap = device.compute >= 90;
  return rows_aligned<T>(p) ? launch<quantize_per_token_kernel<T, VECTORS, true>>(shape, stream, p)
                            : launch<quantize_per_token_kernel<T, VECTORS, false>>(shape, stream, p);
}

// The block of a kernel with one vector a thread, and the grid that covers `m` rows of `vectors` vectors.
struct VectorGrid {
  dim3 block, grid;
  VectorGrid(int64_t m, int64_t vectors) {
    const int width = vectors >= 256 ? 256 : vectors > 64 ? 128 : 32;
    block = dim3(width, 256 / width);
    grid = dim3(static_cast<unsigned>(ceil_div(m, block.y)), static_cast<unsigned>(ceil_div(vectors, width)));
  }
  bool fits() const { return grid.y <= 65535; }
};

// y = round(q · scale), VECTOR elements a thread.
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(256) dequantize_kernel(const Dequantize p, ScaleAxis axis) {
  constexpr int COUNT = 16 / sizeof(T);
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * COUNT;
  if (m >= p.m || c >= p.k) return;
  const int8_t* q = p.q + m * p.ldq + c;
  T* y = static_cast<T*>(p.y) + m * p.ldy + c;
  const float of_row = axis == ScaleAxis::kColumn ? 0.0f : p.scale[axis == ScaleAxis::kRow ? m : 0];
  auto value = [&](int8_t v, int e) {
    return from_float<T>(__fmul_rn(float(v), axis == ScaleAxis::kColumn ? p.scale[c + e] : of_row));
  };
  if (ALIGNED && c + COUNT <= p.k) {
    const auto in = *reinterpret_cast<const Vector<int8_t, COUNT>*>(q);
    Vector<T, COUNT> out;
#pragma unroll
    for (int e = 0; e < COUNT; ++e) out.v[e] = value(in.v[e], e);
    *reinterpret_cast<Vector<T, COUNT>*>(y) = out;
  } else {
    for (int e = 0; e < COUNT && c + e < p.k; ++e) y[e] = value(q[e], e);
  }
}

}  // namespace

Status launch_quantize_per_token(const Quantize& p, Stream stream) {
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t vectors = ceil_div(p.ldq, RowVector<T>::COUNT);
    // A warp a row while that keeps at most 4 vectors a lane; then as many warps as 4 vectors a thread take.
    if (vectors <= 32) return launch_rows<T, 1>(p, dim3(32, 4), stream);
    if (vectors <= 128) return launch_rows<T, 4>(p, dim3(32, 4), stream);
    const int64_t threads = round_up(ceil_div(vectors, 4), 32);
    return launch_rows<T, 4>(p, dim3(static_cast<unsigned>(threads < 1024 ? threads : 1024)), stream);
  });
}

Status launch_quantize_static(const Quantize& p, ScaleAxis axis, Stream stream) {
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const VectorGrid g(ceil_div(p.m, STATIC_ROWS), ceil_div(p.ldq, RowVector<T>::COUNT));
    if (!g.fits()) return invalid("quantize: a row is too long for one launch");
    return rows_aligned<T>(p) ? launch<quantize_static_kernel<T, true>>({g.grid, g.block}, stream, p, axis)
                              : launch<quantize_static_kernel<T, false>>({g.grid, g.block}, stream, p, axis);
  });
}

Status launch_dequantize(const Dequantize& p, ScaleAxis axis, Stream stream) {
  return with_float_type(p.y_dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int COUNT = 16 / sizeof(T);
    const VectorGrid g(p.m, ceil_div(p.k, COUNT));
    if (!g.fits()) return invalid("dequantize: a row is too long for one launch");
    const bool aligned = is_aligned(p.q, COUNT) && p.ldq % COUNT == 0 && is_aligned(p.y, 16) && p.ldy % COUNT == 0;
    return aligned ? launch<dequantize_kernel<T, true>>({g.grid, g.block}, stream, p, axis)
                   : launch<dequantize_kernel<T, false>>({g.grid, g.block}, stream, p, axis);
  });
}

}  // namespace hwkern
