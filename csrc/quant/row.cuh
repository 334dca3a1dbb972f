// One row of floats in registers, its largest magnitude, its scale, and its int8 values: what every kernel here shares.
//
// A row belongs to blockDim.x threads: one warp for short rows, a block for long ones. Each reads vectors of 16 bytes,
// blockDim.x vectors apart, so that a warp's access is 512 consecutive bytes.
#pragma once

#include <cfloat>
#include <type_traits>

#include "core/float_types.cuh"
#include "hwkern.h"
#include "ptx/convert.cuh"
#include "ptx/opaque.cuh"
#include "ptx/prefetch.cuh"

namespace hwkern {

constexpr float QMAX = 127.0f;
constexpr uint32_t INF_BITS = 0x7f800000u;

// |x| as an integer that orders like |x|, with NaN above infinity: a maximum over these loses no NaN (fmaxf would).
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Four neighbours: clamp(rint(x · inverse), -127, 127), NaN to 0. __float2int_rn rounds half to even, saturates, and
// maps NaN to 0; the packing saturates at 127.
__device__ __forceinline__ uint32_t quantized(const float* x, const float (&inverse)[4]) {
  int v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = max(-127, __float2int_rn(__fmul_rn(x[i], inverse[i])));
  return ptx::pack_s8x4(v[0], v[1], v[2], v[3]);
}

// The elements of one 32-bit word: one float32, or two of a 16-bit type, the first in the low half.
template <typename T>
struct Word {
  static constexpr int COUNT = 4 / sizeof(T);

  static __device__ __forceinline__ void unpack(uint32_t word, float* x) {
    if constexpr (std::is_same_v<T, float>) {
      x[0] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
      x[0] = pair.x, x[1] = pair.y;
    } else {
      x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
    }
  }

  // One rounding each, to nearest even.
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    if constexpr (std::is_same_v<T, float>) {
      return __float_as_uint(x[0]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(x[0], x[1]);
      return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
  }

  // Elementwise. Two 16-bit values in half an instruction each, and the same bits as in float32 and then rounded: 24 bits
  // are 2·11 + 2. NOTE: all but a bfloat16 product below 2⁻¹²⁶, which float32 rounds as well, and so may differ by 1 ulp.
  static __device__ __forceinline__ uint32_t sum(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, float>) {
      return __float_as_uint(__fadd_rn(__uint_as_float(a), __uint_as_float(b)));
    } else {
      return pair(__hadd2_rn(as_pair(a), as_pair(b)));
    }
  }
  static __device__ __forceinline__ uint32_t product(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, float>) {
      return __float_as_uint(__fmul_rn(__uint_as_float(a), __uint_as_float(b)));
    } else {
      return pair(__hmul2_rn(as_pair(a), as_pair(b)));
    }
  }
  // The larger of |a| and |b|, NaN if one is.
  static __device__ __forceinline__ uint32_t max_magnitude(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, float>) {
      return max(a, b & 0x7fffffffu);
    } else {
      return pair(__hmax2_nan(as_pair(a), __habs2(as_pair(b))));
    }
  }

 private:
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  static __device__ __forceinline__ Pair as_pair(uint32_t word) { return *reinterpret_cast<const Pair*>(&word); }
  static __device__ __forceinline__ uint32_t pair(Pair v) { return *reinterpret_cast<const uint32_t*>(&v); }
};

// One thread's 16 bytes of a row, as COUNT elements; what lies beyond the row counts as zeros. They stay packed: as
// separate 16-bit values they would take twice the registers.
//
// `aligned`: the row starts at a multiple of its vector's bytes. WHOLE: it is also a whole number of vectors.
template <typename T>
struct RowVector {
  static constexpr int COUNT = 16 / sizeof(T);
  using Words = Vector<uint32_t, 4>;
  Words raw;

  template <bool WHOLE = false>
  __device__ __forceinline__ void load(const T* row, uint32_t first, uint32_t k, bool aligned) {
    raw = {};
    if (WHOLE) {
      if (first < k) raw = *reinterpret_cast<const Words*>(row + first);
    } else if (aligned && first + COUNT <= k) {
      raw = *reinterpret_cast<const Words*>(row + first);
    } else {
      using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
      const Bits* bits = reinterpret_cast<const Bits*>(row);
#pragma unroll
      for (int e = 0; e < COUNT; ++e) {
        const uint32_t element = first + e < k ? bits[first + e] : 0;
        raw.v[e / Word<T>::COUNT] |= element << (e % Word<T>::COUNT * 16);
      }
    }
  }

  // load<true> of what is read once and should leave L2 before anything else does.
  __device__ __forceinline__ void load_once(const T* row, uint32_t first, uint32_t k) {
    raw = {};
    if (first >= k) return;
    const uint4 v = ptx::load_once(row + first);
    raw = {v.x, v.y, v.z, v.w};
  }

  template <bool WHOLE = false>
  __device__ __forceinline__ void store(T* row, uint32_t first, uint32_t k, bool aligned) const {
    if (WHOLE) {
      if (first < k) *reinterpret_cast<Words*>(row + first) = raw;
    } else if (aligned && first + COUNT <= k) {
      *reinterpret_cast<Words*>(row + first) = raw;
    } else {
      using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
      Bits* bits = reinterpret_cast<Bits*>(row);
#pragma unroll
      for (int e = 0; e < COUNT; ++e)
        if (first + e < k) bits[first + e] = static_cast<Bits>(raw.v[e / Word<T>::COUNT] >> (e % Word<T>::COUNT * 16));
    }
  }

  __device__ __forceinline__ void values(float (&x)[COUNT]) const {
#pragma unroll
    for (int w = 0; w < 4; ++w) Word<T>::unpack(raw.v[w], x + w * Word<T>::COUNT);
  }

  __device__ __forceinline__ void set(const float (&x)[COUNT]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) raw.v[w] = Word<T>::pack(x + w * Word<T>::COUNT);
  }

  // Between two passes over a row: without it the compiler keeps what it unpacked, and what it made of that, in registers.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (uint32_t& word : raw.v) ptx::opaque(word);
  }

  __device__ __forceinline__ void add(const RowVector& other) {
#pragma unroll
    for (int w = 0; w < 4; ++w) raw.v[w] = Word<T>::sum(raw.v[w], other.raw.v[w]);
  }
  __device__ __forceinline__ void multiply(const RowVector& other) {
#pragma unroll
    for (int w = 0; w < 4; ++w) raw.v[w] = Word<T>::product(raw.v[w], other.raw.v[w]);
  }

  // `inverse(e)`: 1 / scale for element e of this vector. Writes only below `columns`.
  template <bool WHOLE = false, typename F>
  __device__ __forceinline__ void quantize(int8_t* q, uint32_t first, uint32_t columns, bool aligned, F inverse) const {
    using Packed = Vector<uint32_t, COUNT / 4>;
    float x[COUNT];
    values(x);
    Packed packed;
#pragma unroll
    for (int e = 0; e < COUNT; e += 4)
      packed.v[e / 4] = quantized(x + e, {inverse(e), inverse(e + 1), inverse(e + 2), inverse(e + 3)});
    if (WHOLE) {
      if (first < columns) *reinterpret_cast<Packed*>(q + first) = packed;
    } else if (aligned && first + COUNT <= columns) {
      *reinterpret_cast<Packed*>(q + first) = packed;
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e)
        if (first + e < columns) q[first + e] = static_cast<int8_t>(packed.v[e / 4] >> (e % 4 * 8));
    }
  }
};

// The largest magnitude in the vectors that were added.
template <typename T>
struct Largest {
  uint32_t word = 0;

  __device__ __forceinline__ void add(const RowVector<T>& row) {
#pragma unroll
    for (int w = 0; w < 4; ++w) word = Word<T>::max_magnitude(word, row.raw.v[w]);
  }
  __device__ __forceinline__ uint32_t bits() const {
    float x[Word<T>::COUNT];
    Word<T>::unpack(word, x);
    return Word<T>::COUNT == 1 ? magnitude(x[0]) : max(magnitude(x[0]), magnitude(x[Word<T>::COUNT - 1]));
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

// The scale of a row with this largest magnitude. In a row that is not finite the inverse is 0, so the products are 0
// or NaN, and both become 0.
struct TokenScale {
  float scale, inverse;

  __device__ __forceinline__ explicit TokenScale(uint32_t largest) {
    const bool finite = largest < INF_BITS;
    const float s = fmaxf(__fdiv_rn(__uint_as_float(largest), QMAX), FLT_MIN);
    inverse = finite ? __frcp_rn(s) : 0.0f;
    scale = finite ? s : __uint_as_float(0x7fc00000u);
  }
};

// How many threads and vectors a row gets, where all of it is kept in registers (`whole`, see RowVector):
// a warp while that takes at most 4 vectors a lane, then as many warps as 4 vectors a thread take. No more rows than SMs
// leave most of the GPU idle: then a vector a thread, for the shortest way from load to store. Rows that are not whole,
// or longer than that, get a vector a thread and go round.
// NOTE: kernels are compiled for MAX_THREADS, and so for 64 registers, 8 blocks of 128 threads an SM. With 76 registers, 6
// blocks, RMSNorm of 4096 × 4096 bfloat16 took 21.7 µs on an H100 where a copy of the same bytes takes 18.5.
constexpr int MAX_THREADS = 1024;

struct RowShape {
  bool whole;
  int vectors;  // a thread: 4 or 1
  dim3 block, grid;

  // `few_rows`: up to how many rows are few, beyond one an SM, where a row takes a block.
  RowShape(bool aligned_rows, int64_t m, int64_t row_vectors, int sm_count, int few_rows = 0) {
    whole = aligned_rows && row_vectors <= 4 * MAX_THREADS;
    const bool few = m <= sm_count || (m <= few_rows && row_vectors > 4 * 32);
    vectors = !whole || row_vectors <= 32 || (few && row_vectors <= MAX_THREADS) ? 1 : 4;
    if (row_vectors <= 32 * vectors) {
      block = dim3(32, 4);
    } else {
      const int64_t threads = round_up(ceil_div(row_vectors, vectors), 32);
      block = dim3(static_cast<unsigned>(threads < MAX_THREADS ? threads : MAX_THREADS));
    }
    grid = dim3(static_cast<unsigned>(ceil_div(m, block.y)));
  }
};

}  // namespace hwkern
