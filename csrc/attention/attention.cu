// Attention of one fused q-k-v product, for sm_80 and newer: y = softmax(scale · q·kᵀ + mask) · v (see hwkern.h).
//
// It is here for TensorRT 8.6, which runs what lies between two plugins layer by layer or as compiled regions of its own:
// scores of L × L a head then travel through memory three times, and rotary embeddings, transposes and the copies of
// shared heads once each. Here scores stay in registers (FlashAttention's recurrence), and q, k and v are read where the
// product wrote them.
//
// A block owns BLOCK_M queries of one head, a warp 16 of them; keys and values come in tiles of BLOCK_N through two
// buffers each. Keys are rotated once, by a kernel before (they serve heads / kv_heads · L / BLOCK_M blocks), queries by
// their block.
#include "attention/attention.h"
#include "core/launch.cuh"
#include "ptx/approximate.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "quant/row.cuh"

namespace hwkern {
namespace {

constexpr int BLOCK_N = 64, WARP_M = 16, WARPS = 4, BLOCK_M = WARP_M * WARPS, THREADS = WARPS * 32;
constexpr int CHUNK = 8;  // 16-bit values of 16 bytes: one cp.async, one row of an ldmatrix matrix
constexpr float LOG2E = 1.4426950408889634f;

// Chunk c of a row's first half and its like of the second, turned as transformers' apply_rotary_pos_emb does:
// (a·cosine - b·sine, b·cosine + a·sine), the tables in float32.
template <typename T, int DIM>
__device__ __forceinline__ void rotate(const Attention& p, int64_t row, int c, uint4& first, uint4& second) {
  struct alignas(16) Eight {
    float v[CHUNK];
  };
  const auto load = [&](const float* table, int half) {
    return *reinterpret_cast<const Eight*>(table + row * DIM + half * DIM / 2 + c * CHUNK);
  };
  const Eight cosine[2] = {load(p.cosine, 0), load(p.cosine, 1)}, sine[2] = {load(p.sine, 0), load(p.sine, 1)};
  uint32_t* a = reinterpret_cast<uint32_t*>(&first);
  uint32_t* b = reinterpret_cast<uint32_t*>(&second);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[2], y[2], low[2], high[2];
    Word<T>::unpack(a[i], x);
    Word<T>::unpack(b[i], y);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = 2 * i + e;
      low[e] = x[e] * cosine[0].v[at] - y[e] * sine[0].v[at];
      high[e] = y[e] * cosine[1].v[at] + x[e] * sine[1].v[at];
    }
    a[i] = Word<T>::pack(low);
    b[i] = Word<T>::pack(high);
  }
}

// keys [B, L, kv_heads, D]: those of qkv, rotated. A thread has one chunk of the first half, and its like of the second.
template <typename T, int DIM>
__global__ void __launch_bounds__(256) rotate_keys_kernel(const Attention p, uint4* keys) {
  constexpr int CHUNKS = DIM / CHUNK;
  ptx::grid_wait();
  ptx::grid_release();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int c = static_cast<int>(i % (CHUNKS / 2));
  const int64_t head = i / (CHUNKS / 2);  // of all tokens
  if (head >= p.batch * p.length * p.kv_heads) return;
  const int64_t token = head / p.kv_heads;
  const int64_t all = p.heads + 2 * p.kv_heads;
  const uint4* from = static_cast<const uint4*>(p.qkv) + (token * all + p.heads + head % p.kv_heads) * CHUNKS;
  uint4 first = from[c], second = from[c + CHUNKS / 2];
  rotate<T, DIM>(p, token % p.length, c, first, second);
  keys[head * CHUNKS + c] = first;
  keys[head * CHUNKS + c + CHUNKS / 2] = second;
}

// Rows of DIM values in shared memory; chunks are swapped within a row, so that eight rows of one chunk lie in all banks.
template <int DIM>
__device__ __forceinline__ uint32_t offset(int row, int chunk) {
  const int swap = DIM == 32 ? (row >> 1) & 3 : row & 7;  // two rows of 32 fill the banks once
  return static_cast<uint32_t>(row * DIM * 2 + ((chunk ^ swap) << 4));
}

// `keys`: as qkv's, or rotated. `mask_pairs`: two neighbours of the mask from an even column on are one aligned word.
template <typename T, int DIM, bool CAUSAL, bool MASKED>
__global__ void __launch_bounds__(THREADS, DIM == 128            ? 2
                                           : DIM == 64 && MASKED ? 2
                                                                 : 3)
    attention_kernel(const Attention p, const T* keys, const int64_t key_pitch, const bool mask_pairs) {
  constexpr int CHUNKS = DIM / CHUNK, STEPS = DIM / 16, TILE_BYTES = BLOCK_N * DIM * 2;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t smem_q = ptx::shared_address(shared), smem_k = smem_q + BLOCK_M * DIM * 2;
  const uint32_t smem_v = smem_k + 2 * TILE_BYTES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = static_cast<int>(p.length), head = blockIdx.y,
            kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  // The last queries of a causal head see the most keys: they go first.
  const int m0 = static_cast<int>(CAUSAL ? gridDim.x - 1 - blockIdx.x : blockIdx.x) * BLOCK_M;
  const int64_t pitch = (p.heads + 2 * p.kv_heads) * DIM, first = int64_t(blockIdx.z) * length;
  const T* q = static_cast<const T*>(p.qkv) + first * pitch + head * DIM;
  const T* v = static_cast<const T*>(p.qkv) + first * pitch + (p.heads + p.kv_heads + kv_head) * DIM;
  const T* k = keys + first * key_pitch + kv_head * DIM;
  auto load = [&](uint32_t smem, const T* rows, int64_t row_pitch, int row0) {  // 64 rows; those past the end are zeros
    static_assert(BLOCK_M == BLOCK_N, "one loader for all tiles");
#pragma unroll
    for (int i = threadIdx.x; i < BLOCK_N * CHUNKS; i += THREADS) {
      const int row = i / CHUNKS, c = i % CHUNKS;
      const bool inside = row0 + row < length;
      ptx::cp_async_16(smem + offset<DIM>(row, c), rows + (inside ? row0 + row : 0) * row_pitch + c * CHUNK,
                       inside ? 16 : 0);
    }
  };
  auto at = [&](int row, int chunk) { return reinterpret_cast<uint4*>(shared + offset<DIM>(row, chunk)); };  // of q

  ptx::grid_wait();
  ptx::grid_release();
  const int all_tiles = (length + BLOCK_N - 1) / BLOCK_N;
  const int tiles = CAUSAL ? min(all_tiles, m0 / BLOCK_N + 1) : all_tiles;
  load(smem_q, q, pitch, m0);
  load(smem_k, k, key_pitch, 0);
  ptx::cp_async_commit();
  load(smem_v, v, pitch, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  if (p.cosine) {  // each warp its own rows
    for (int i = lane; i < WARP_M * CHUNKS / 2; i += 32) {
      const int row = warp * WARP_M + i / (CHUNKS / 2), c = i % (CHUNKS / 2);
      rotate<T, DIM>(p, min(m0 + row, length - 1), c, *at(row, c), *at(row, c + CHUNKS / 2));
    }
    __syncwarp();
  }
  uint32_t fragment_q[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
    ptx::ldmatrix_x4(fragment_q[s], smem_q + offset<DIM>(warp * WARP_M + (lane & 15), s * 2 + (lane >> 4)));

  // A lane has rows r and r + 8 of its warp's 16 (index h below), r = lane / 4, and of 8 columns two: 2·(lane % 4), + 1.
  float out[DIM / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  const int row0 = m0 + warp * WARP_M + lane / 4, column0 = (lane % 4) * 2;
  const float scale = p.scale * LOG2E;  // exp2 is what the hardware has

  // Invariant: tile t of k has arrived, that of v is on its way, and the other two buffers are read no more.
  for (int t = 0; t < tiles; ++t) {
    const uint32_t tile = (t & 1) * TILE_BYTES, next = TILE_BYTES - tile;
    if (t + 1 < tiles) load(smem_k + next, k, key_pitch, (t + 1) * BLOCK_N);
    ptx::cp_async_commit();

    float score[BLOCK_N / 8][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int n = 0; n < BLOCK_N / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(
            b, smem_k + tile + offset<DIM>(n * 16 + (lane & 7) + ((lane >> 4) << 3), s * 2 + ((lane >> 3) & 1)));
        ptx::mma_m16n8k16(T{}, score[2 * n], fragment_q[s], b[0], b[1]);
        ptx::mma_m16n8k16(T{}, score[2 * n + 1], fragment_q[s], b[2], b[3]);
      }

    const int n0 = t * BLOCK_N;
    if constexpr (MASKED) {
      const T* mask = static_cast<const T*>(p.mask) + blockIdx.z * p.mask_batch + head * p.mask_head;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const T* row = mask + min(row0 + h * 8, length - 1) * p.mask_row;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; ++j) {
          const int column = min(n0 + j * 8 + column0, length - (mask_pairs ? 2 : 1));
          float added[2];
          if (mask_pairs) {
            Word<T>::unpack(*reinterpret_cast<const uint32_t*>(row + column), added);
          } else {
            added[0] = to_float(row[column]), added[1] = to_float(row[min(column + 1, length - 1)]);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) score[j][2 * h + e] = score[j][2 * h + e] * scale + added[e] * LOG2E;
        }
      }
    }
    const float factor = MASKED ? 1.0f : scale;  // of the scores as they are now
    if ((CAUSAL && n0 + BLOCK_N > m0) || n0 + BLOCK_N > length) {
#pragma unroll
      for (int j = 0; j < BLOCK_N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = row0 + (e >> 1) * 8, column = n0 + j * 8 + column0 + (e & 1);
          if (column >= length || (CAUSAL && column > row)) score[j][e] = -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = largest[h];
#pragma unroll
      for (int j = 0; j < BLOCK_N / 8; ++j) top = fmaxf(top, fmaxf(score[j][2 * h], score[j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top * factor;  // a row that sees nothing yet
      const float shrink = ptx::exp2(largest[h] * factor - base);
      largest[h] = top;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < BLOCK_N / 8; ++j)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) sum += score[j][e] = ptx::exp2(score[j][e] * factor - base);
      total[h] = total[h] * shrink + sum;
#pragma unroll
      for (int d = 0; d < DIM / 8; ++d) out[d][2 * h] *= shrink, out[d][2 * h + 1] *= shrink;
    }

    ptx::cp_async_wait<1>();
    __syncthreads();  // v is there, for all
    if (t + 1 < tiles) load(smem_v + next, v, pitch, (t + 1) * BLOCK_N);
    ptx::cp_async_commit();
#pragma unroll
    for (int n = 0; n < BLOCK_N / 16; ++n) {
      uint32_t a[4];  // the accumulators of two score tiles are the A fragment of one
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = Word<T>::pack(&score[2 * n + e / 2][(e & 1) * 2]);
#pragma unroll
      for (int d = 0; d < STEPS; ++d) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, smem_v + tile + offset<DIM>(n * 16 + (lane & 15), d * 2 + (lane >> 4)));
        ptx::mma_m16n8k16(T{}, out[2 * d], a, b[0], b[1]);
        ptx::mma_m16n8k16(T{}, out[2 * d + 1], a, b[2], b[3]);
      }
    }
    ptx::cp_async_wait<1>();
    __syncthreads();
  }

  // Through the warp's own rows of q, so that stores are of 16 bytes.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = total[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int d = 0; d < DIM / 8; ++d) {
      const float pair[2] = {out[d][2 * h] * inverse, out[d][2 * h + 1] * inverse};
      reinterpret_cast<uint32_t*>(at(warp * WARP_M + lane / 4 + h * 8, d))[lane % 4] = Word<T>::pack(pair);
    }
  }
  __syncwarp();
  T* y = static_cast<T*>(p.y) + (first * p.heads + head) * DIM;
  for (int i = lane; i < WARP_M * CHUNKS; i += 32) {
    const int row = warp * WARP_M + i / CHUNKS, c = i % CHUNKS;
    if (m0 + row < length) *reinterpret_cast<uint4*>(y + (m0 + row) * p.heads * DIM + c * CHUNK) = *at(row, c);
  }
}

template <typename T, int DIM>
Status launch_dim(const Attention& p, void* workspace, const Device& device, Stream stream) {
  const bool overlap = device.compute >= 90;
  const T* keys = static_cast<const T*>(p.qkv) + p.heads * DIM;
  int64_t key_pitch = (p.heads + 2 * p.kv_heads) * DIM;
  if (p.cosine) {
    const int64_t threads = p.batch * p.length * p.kv_heads * (DIM / CHUNK / 2);
    const Launch at{dim3(static_cast<unsigned>(ceil_div(threads, 256))), dim3(256), 0, 1, overlap};
    const Status status = launch<rotate_keys_kernel<T, DIM>>(at, stream, p, static_cast<uint4*>(workspace));
    if (!status.ok()) return status;
    keys = static_cast<const T*>(workspace), key_pitch = p.kv_heads * DIM;
  }
  constexpr int SHARED_BYTES = (BLOCK_M + 4 * BLOCK_N) * DIM * 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.length, BLOCK_M)), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  const Launch at{grid, dim3(THREADS), SHARED_BYTES, 1, overlap};
  const bool pairs = is_aligned(p.mask, 4) && (p.length | p.mask_batch | p.mask_head | p.mask_row) % 2 == 0;
  if (p.causal) return launch<attention_kernel<T, DIM, true, false>>(at, stream, p, keys, key_pitch, pairs);
  return p.mask ? launch<attention_kernel<T, DIM, false, true>>(at, stream, p, keys, key_pitch, pairs)
                : launch<attention_kernel<T, DIM, false, false>>(at, stream, p, keys, key_pitch, pairs);
}

}  // namespace

Status launch_attention(const Attention& p, void* workspace, const Device& device, Stream stream) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    return p.dim == 32   ? launch_dim<T, 32>(p, workspace, device, stream)
           : p.dim == 64 ? launch_dim<T, 64>(p, workspace, device, stream)
                         : launch_dim<T, 128>(p, workspace, device, stream);
  };
  return p.dtype == DType::kFloat16 ? with(__half{}) : with(__nv_bfloat16{});
}

}  // namespace hwkern
