// Rows of an int8 table, widened: y[m] = round(weight[indices[m]] · weight_scale[indices[m]]) (see hwkern.h).
//
// A token moves K·(1 + sizeof(T)) bytes where the float table moves K·2·sizeof(T): 3 against 4 bytes an element in 16
// bits, and what is read comes from random rows, half of it here. At 4096 tokens × 4096 that is 50 MB, 16.5 µs at
// 3.05 TB/s, against 67 MB and 22 µs. Few tokens are three latencies in a row: the index, the row, the store.
//
// A row belongs to a warp or a block. A thread's vectors are as wide as one 16-byte store of T, so that both a
// warp's loads and its stores are consecutive; loads of 16 bytes would make every other store instruction skip half of
// each sector.
#include "core/launch.cuh"
#include "ptx/grid.cuh"
#include "quant/kernels.h"
#include "quant/row.cuh"

// What assert() calls, which NDEBUG takes out.
extern "C" __device__ void __assert_fail(const char* assertion, const char* file, unsigned line, const char* function)
#if defined(__GLIBC__)
    noexcept
#endif
    ;

namespace hwkern {
namespace {

// blockDim = (threads of a row, rows of a block); blockDim.y > 1 only with blockDim.x == 32. WHOLE: rows of y are whole
// vectors, aligned, and blockDim.x · VECTORS vectors cover one. Otherwise (with VECTORS = 1) anything goes.
template <typename T, typename Index, int VECTORS, bool WHOLE>
__global__ void __launch_bounds__(MAX_THREADS, 1) embedding_kernel(const Embedding p) {
  constexpr int COUNT = RowVector<T>::COUNT;
  using Packed = Vector<int8_t, COUNT>;
  const int64_t m = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const uint32_t stride = blockDim.x * COUNT, first = threadIdx.x * COUNT;
  ptx::grid_wait();  // the indices may be what the kernel before this wrote
  ptx::grid_release();
  if (m >= p.m) return;

  const int64_t index = static_cast<const Index*>(p.indices)[m];
  if (index < 0 || index >= p.n) __assert_fail("0 <= index && index < num_embeddings", __FILE__, __LINE__, __func__);
  const int8_t* q = p.weight + index * p.ldb;
  const float scale = p.weight_scale[index];
  T* y = static_cast<T*>(p.y) + m * p.ldy;

  // Rows of the table are padded to 16 bytes, so that a vector which starts inside of one is there as a whole.
  auto load = [&](uint32_t c) { return *reinterpret_cast<const Packed*>(q + c); };
  auto store = [&](const Packed& in, uint32_t c) {
    float x[COUNT];
#pragma unroll
    for (int e = 0; e < COUNT; ++e) x[e] = __fmul_rn(float(in.v[e]), scale);
    RowVector<T> out;
    out.set(x);
    out.template store<WHOLE>(y, c, p.k, /*aligned=*/WHOLE);
  };
  if constexpr (WHOLE) {
    Packed row[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
      if (first + v * stride < p.k) row[v] = load(first + v * stride);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) store(row[v], first + v * stride);
  } else {
    for (uint32_t c = first; c < p.k; c += stride) store(load(c), c);
  }
}

template <typename T, typename Index>
Status launch_with(const Embedding& p, const Device& device, Stream stream) {
  constexpr int COUNT = RowVector<T>::COUNT;
  const int64_t row_vectors = ceil_div(p.k, COUNT);
  const bool whole = is_aligned(p.y, 16) && p.ldy % COUNT == 0 && p.k % COUNT == 0 && row_vectors <= 4 * MAX_THREADS;
  // Up to four rows an SM: one vector a thread, the shortest way. More: a warp a row while that takes at most 4 vectors a
  // lane (768 wide, 16384 tokens: 13.3 µs on an H100; in blocks 20.4), else two a thread (4096 wide: 73.0 µs, with one
  // 79.3, with four 78.1).
  int vectors = p.m <= 4 * device.sm_count ? 1 : row_vectors <= 4 * 32 ? 4 : 2;
  if (row_vectors > vectors * MAX_THREADS) vectors = 4;
  if (!whole) vectors = 1;
  dim3 block(32, 4);
  if (row_vectors > 32 * vectors) {
    const int64_t threads = round_up(ceil_div(row_vectors, vectors), 32);
    block = dim3(static_cast<unsigned>(threads < MAX_THREADS ? threads : MAX_THREADS));
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.m, block.y)));
  const Launch at{grid, block, /*shared_bytes=*/0, /*cluster=*/1, /*overlap=*/device.compute >= 90};
  if (!whole) return launch<embedding_kernel<T, Index, 1, false>>(at, stream, p);
  return vectors == 1   ? launch<embedding_kernel<T, Index, 1, true>>(at, stream, p)
         : vectors == 2 ? launch<embedding_kernel<T, Index, 2, true>>(at, stream, p)
                        : launch<embedding_kernel<T, Index, 4, true>>(at, stream, p);
}

}  // namespace

Status launch_embedding(const Embedding& p, const Device& device, Stream stream) {
  return with_float_type(p.y_dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.wide_indices ? launch_with<T, int64_t>(p, device, stream) : launch_with<T, int32_t>(p, device, stream);
  });
}

}  // namespace hwkern
