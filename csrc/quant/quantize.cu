// Quantize float rows to int8: dynamic per token, or with static scales (formulas and special values in hwkern.h).
//
// Per token, a row is read once and kept in registers while its largest magnitude is found (see row.cuh for who reads
// what). What does not fit in registers is read a second time, from L2.
// A pass moves M·K·(sizeof(T) + 1) bytes; at 4096 × 4096 bfloat16 that is 50 MB, 16.5 µs at 3.05 TB/s.
#include "core/device.h"
#include "core/launch.cuh"
#include "ptx/grid.cuh"
#include "quant/kernels.h"
#include "quant/row.cuh"

namespace hwkern {
namespace {

// blockDim = (threads of a row, rows of a block); blockDim.y > 1 only with blockDim.x == 32. WHOLE: rows are whole (see
// RowVector) and fit in registers. Otherwise (with VECTORS = 1) anything goes. `once`: x leaves L2 first (whole rows alone).
//
// `release_early` is for the GEMM of a linear with constant weights, the only kernel that then follows. It may start, and
// stream weights, while kernel P before this one still runs. That is safe, because
//   - before its own grid_wait() it writes nothing and reads weights alone, which P does not write;
//   - that wait ends when this grid has completed, and this grid waits for P: so what P wrote is visible by then, and
//     what P read may be overwritten;
//   - it lets its own successor start only after that wait, so no third kernel ever runs beside P. Were every kernel to
//     release early, one could read weights beside the kernel that writes them, any number of launches before.
template <typename T, int VECTORS, bool WHOLE>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    quantize_per_token_kernel(const Quantize p, const bool rows_aligned, const bool release_early, const bool once) {
  using Row = RowVector<T>;
  if (release_early) ptx::grid_release();
  ptx::grid_wait();
  ptx::grid_release();
  const bool aligned = WHOLE || rows_aligned;
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (m >= p.m) return;
  const T* x = static_cast<const T*>(p.x) + m * p.ldx;
  int8_t* q = p.q + m * p.ldq;
  const uint32_t stride = blockDim.x * Row::COUNT, first = threadIdx.x * Row::COUNT;

  Row kept[VECTORS];
  Largest<T> largest;
  if (WHOLE && once) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) kept[v].load_once(x, first + v * stride, p.k);
  } else {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) kept[v].template load<WHOLE>(x, first + v * stride, p.k, aligned);
  }
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) largest.add(kept[v]);
  if constexpr (!WHOLE) {
    for (uint32_t c = first + VECTORS * stride; c < p.k; c += stride) {
      Row row;
      row.load(x, c, p.k, aligned);
      largest.add(row);
    }
  }
  const TokenScale token(row_max(largest.bits()));
  if (threadIdx.x == 0) p.scale[m] = token.scale;
  auto same = [&](int) { return token.inverse; };
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) kept[v].template quantize<WHOLE>(q, first + v * stride, p.ldq, aligned, same);
  if constexpr (!WHOLE) {
    for (uint32_t c = first + VECTORS * stride; c < p.ldq; c += stride) {
      Row row;
      row.load(x, c, p.k, aligned);
      row.quantize(q, c, p.ldq, aligned, same);
    }
  }
}

// One vector of STATIC_ROWS consecutive rows a thread, so that the 4 or 8 reciprocals of its columns, some 15 instructions
// each, are computed once for all of them; blockIdx.x walks the rows, blockIdx.y the columns.
constexpr int STATIC_ROWS = 4;

template <typename T, bool PER_COLUMN, bool WHOLE>
__global__ void __launch_bounds__(256)
    quantize_static_kernel(const Quantize p, ScaleAxis axis, const bool rows_aligned) {
  using Row = RowVector<T>;
  const bool aligned = WHOLE || rows_aligned;
  const uint32_t c = (blockIdx.y * blockDim.x + threadIdx.x) * Row::COUNT;
  if (c >= p.ldq) return;
  const T* x = static_cast<const T*>(p.x);
  const int64_t m0 = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * STATIC_ROWS;
  Row row[STATIC_ROWS];
#pragma unroll
  for (int r = 0; r < STATIC_ROWS; ++r)
    if (m0 + r < p.m) row[r].template load<WHOLE>(x + (m0 + r) * p.ldx, c, p.k, aligned);
  // While the rows are on their way:
  float inverse[Row::COUNT];  // of the columns; or one, of the tensor or the row
#pragma unroll
  for (int e = 0; e < (PER_COLUMN ? Row::COUNT : 1); ++e)
    inverse[e] = !PER_COLUMN || c + e < p.k ? __frcp_rn(p.scale[PER_COLUMN ? c + e : 0]) : 0.0f;
#pragma unroll
  for (int r = 0; r < STATIC_ROWS; ++r) {
    if (m0 + r >= p.m) break;
    if (!PER_COLUMN && axis == ScaleAxis::kRow) inverse[0] = __frcp_rn(p.scale[m0 + r]);
    row[r].template quantize<WHOLE>(p.q + (m0 + r) * p.ldq, c, p.ldq, aligned,
                                    [&](int e) { return inverse[PER_COLUMN ? e : 0]; });
  }
}

// Whether 16-byte loads of x and COUNT-byte stores of q stay aligned in every row.
template <typename T>
bool rows_aligned(const Quantize& p) {
  constexpr int COUNT = RowVector<T>::COUNT;
  return is_aligned(p.x, 16) && p.ldx % COUNT == 0 && is_aligned(p.q, COUNT) && p.ldq % COUNT == 0;
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

// So many bytes of x are marked to leave L2 first; presumably they drive the int8 rows out otherwise. A layer of
// 4096×768×3072 took 26.8 µs, not 28.9, and 1024×4096×14336 91.1, not 93.5; but 2048×4096×4096 (17 MB) 58.4, not 56.4, and
// 64×4096×14336 25.4, not 24.5. More than 29 MB were not measured in a layer.
constexpr int64_t kOnceBytes = 24 << 20, kMostOnceBytes = 32 << 20;

// Rows and bytes of x for which the GEMM's first blocks should come beside this kernel's (see Launch::most_shared). Layers:
// 1024×768×768 5.2 µs, not 6.1, 64×4096×4096 8.6, not 9.7; but 16×4096×4096 7.8, not 7.5. Of many bytes L1 holds what is
// under way: 4096 × 3072 alone 12.9 µs, not 12.5.
constexpr int kManyRows = 32;
constexpr int64_t kFewBytes = 8 << 20;

}  // namespace

Status launch_quantize_per_token(const Quantize& p, bool release_early, Stream stream) {
  Device device;
  if (const Status status = current_device(&device); !status.ok()) return status;
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = rows_aligned<T>(p);
    // A layer of 256 and 512 × 4096 × 4096 takes 0.7 µs less with one vector a thread than with four.
    const RowShape shape(aligned && p.k % RowVector<T>::COUNT == 0, p.m, ceil_div(p.ldq, RowVector<T>::COUNT),
                         device.sm_count, /*few_rows=*/4 * device.sm_count);
    const int64_t bytes = p.m * p.k * static_cast<int64_t>(sizeof(T));
    const bool overlap = device.compute >= 90, once = bytes >= kOnceBytes && bytes < kMostOnceBytes;
    const Launch at{shape.grid,    shape.block, /*shared_bytes=*/0,
                    /*cluster=*/1, overlap,     /*most_shared=*/overlap && p.m > kManyRows && bytes <= kFewBytes};
    if (!shape.whole)
      return launch<quantize_per_token_kernel<T, 1, false>>(at, stream, p, aligned, release_early, once);
    return shape.vectors == 1 ? launch<quantize_per_token_kernel<T, 1, true>>(at, stream, p, true, release_early, once)
                              : launch<quantize_per_token_kernel<T, 4, true>>(at, stream, p, true, release_early, once);
  });
}

Status launch_quantize_static(const Quantize& p, ScaleAxis axis, Stream stream) {
  return with_float_type(p.x_dtype, [&](auto zero) {
    using T = decltype(zero);
    const VectorGrid g(ceil_div(p.m, STATIC_ROWS), ceil_div(p.ldq, RowVector<T>::COUNT));
    if (!g.fits()) return invalid("quantize: a row is too long for one launch");
    const bool aligned = rows_aligned<T>(p), whole = aligned && p.k % RowVector<T>::COUNT == 0;
    const Launch at{g.grid, g.block};
    if (axis == ScaleAxis::kColumn)
      return whole ? launch<quantize_static_kernel<T, true, true>>(at, stream, p, axis, true)
                   : launch<quantize_static_kernel<T, true, false>>(at, stream, p, axis, aligned);
    return whole ? launch<quantize_static_kernel<T, false, true>>(at, stream, p, axis, true)
                 : launch<quantize_static_kernel<T, false, false>>(at, stream, p, axis, aligned);
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
