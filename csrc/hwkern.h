// hwkern.h: the whole public interface of the kernels. No torch, no Python, no TensorRT.
//
// Every entry point takes raw device pointers, sizes and a stream, enqueues its work on that stream and returns.
// None of them allocates, synchronises, reads an environment variable, prints or changes the current device, so
// they may run inside a CUDA graph capture, a TensorRT enqueue or a pycuda program.
//
// Conventions, the same everywhere:
//   A [M, K]  activations, int8, row-major, leading dimension lda   (elements between rows)
//   B [N, K]  weights,     int8, row-major, leading dimension ldb   (torch's nn.Linear layout)
//   D [M, N]  output, row-major, leading dimension ldd
//   D[m, n] = round(((float)sum * scale_m[m]) * scale_n[n] + bias[n]),   sum = Σ_k A[m, k]·B[n, k], an exact int32
// Each float operation is one IEEE float32 operation in the order written (no fused multiply-add), and `round` is
// one rounding to the output type, so the result is the same bits on every GPU and on the CPU path. An activation and
// a residual may follow, before `round`: activation(…) + residual[m, n]; see Activation.
//
// Overlap (programmatic dependent launch, compute capability 9.0 and newer): kernels of this library that follow each
// other on a stream may start while their predecessor still runs. Each waits for it before it touches anything but
// constant weights, and lets its own successor start only after that wait, so everything that was enqueued before the
// predecessor has completed by then. One exception: the quantize kernel of a linear with constant weights lets its
// GEMM start at once (see quantize_per_token_kernel) unless that gains nothing (linear_product_waits).
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;  // cudaStream_t without CUDA's headers

namespace hwkern {

using Stream = CUstream_st*;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kInt32 = 4 };

enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument,    // a size, pointer, leading dimension or dtype that the contract excludes
  kUnsupportedDevice,  // the current GPU cannot run this kernel
  kCudaError,          // the CUDA runtime refused the launch; `what` is its own text
  kNotCompiled,        // this build has no CUDA kernels
};

// `what` points at a string with static lifetime: the sentence that the caller shows.
struct Status {
  StatusCode code;
  const char* what;
  constexpr bool ok() const { return code == StatusCode::kOk; }
};

// An int32 sum of K products, each at most 128·128 = 2¹⁴ in size, stays below 2³¹ while K < 2¹⁷.
constexpr int64_t kMaxK = (int64_t{1} << 17) - 1;

// Rows of A and B start at multiples of this many bytes: one cp.async or one ldmatrix row.
constexpr int64_t kRowAlignment = 16;

// What an epilogue may apply to y = sum · scales + bias. Computed in float32 with the GPU's exp (GELU: a fit, to
// 4 ulp of |y|; the others to 2), so with one of these the CPU path agrees to 4 float32 ulp before the rounding and not
// in every bit.
enum class Activation : int32_t {
  kNone = 0,
  kRelu = 1,      // max(y, 0); NaN stays NaN
  kGelu = 2,      // y · Φ(y) = 0.5·y·(1 + erf(y / √2))
  kGeluTanh = 3,  // 0.5·y·(1 + tanh(√(2/π)·(y + 0.044715·y³)))
  kSilu = 4,      // y / (1 + exp(-y))
};

// ---- GEMM ---------------------------------------------------------------------------------------------------------

// What a row of the config table computes: int8 activations (gemm), 16-bit ones (weight_only_linear), or a whole linear
// (linear alone), which it quantizes in its own launch, or whose quantize kernel it starts beside.
enum class Scheme : int32_t { kW8A8 = 0, kW8A16 = 1, kW8A8Linear = 2 };

// One row of the config table: an instantiation, a tuning candidate, a TensorRT tactic, a test parameter and a
// benchmark row. Ids live in caches and engines and are never reused.
struct GemmConfig {
  int id;
  const char* name;          // e.g. "sm80_128x256x128_s3"
  int min_compute, max_compute;  // compute capabilities it runs on, e.g. 80 … 999; code for sm_90a runs on 90 alone
  int block_m, block_n, block_k;
  int warps_m, warps_n, warps_k;
  int stages;
  int cluster;        // blocks along M that share the tile of B, or with kW8A8Linear the rows of x; 1 before Hopper
  int shared_bytes;          // dynamic shared memory of one block
  int blocks_per_sm;         // what the kernel is compiled for: its register budget allows this many at once
  Scheme scheme = Scheme::kW8A8;
  int split_k = 1;           // blocks of a cluster that split K between them
  int max_k = static_cast<int>(kMaxK);  // the largest K that it takes
};

// What the choice of a config depends on.
struct Device {
  int sm_count;
  int compute;               // e.g. 90
  int shared_bytes;          // the most dynamic shared memory that one block may ask for
};

struct Gemm {
  const int8_t* a;           // [M, K], rows 16-byte aligned
  const int8_t* b;           // [N, K], rows 16-byte aligned
  const float* scale_m;      // [M], or null for 1
  const float* scale_n;      // [N], or null for 1
  const void* bias;          // [N] of bias_dtype, or null for none
  void* d;                   // [M, N] of d_dtype
  int64_t lda, ldb, ldd;     // elements
  int64_t m, n, k;
  DType bias_dtype;          // kFloat32, kFloat16 or kBFloat16
  DType d_dtype;             // kFloat32, kFloat16, kBFloat16; kInt32: the raw sum, without scales and bias; kInt8
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // [M, N] of residual_dtype, added after the activation; null for none
  int64_t ldr = 0;
  DType residual_dtype = DType::kFloat32;
  const float* d_scale = nullptr;  // [1], with an int8 D and only then: D = clamp(rint(y · (1 / d_scale)), -127, 127)
  // B was not written by the kernel that precedes this call on the stream, so its loads may start before that kernel
  // ends (see Overlap). True of weights; false is always safe.
  bool b_is_constant = false;
  bool overlap = true;  // the kernel may start before the one that precedes it ends (see Overlap)
};

const GemmConfig* gemm_configs(int* count);
const GemmConfig* gemm_config(int id);  // null for an unknown id

// Whether the device can run the config at all (compute capability, shared memory).
bool gemm_runs_on(const GemmConfig& config, const Device& device);

// The id that the cost model predicts to be fastest among those that run on the device; -1 if none does.
// `b_is_constant`: as in Gemm.
int gemm_choose(int64_t m, int64_t n, int64_t k, const Device& device, bool b_is_constant = false);

// Predicted time in microseconds of one config in a row of such calls. Comparable between configs of one device.
double gemm_predict_us(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device,
                       bool b_is_constant = false);

constexpr int kChoose = -1;
Status gemm(const Gemm& problem, int config_id, Stream stream);

// ---- Quantize and dequantize --------------------------------------------------------------------------------------

// q = clamp(rint(x · (1 / scale)), -127, 127), rint to nearest even, float32 arithmetic.
// Per token: scale[m] = max(absmax_k |x[m, k]| / 127, FLT_MIN). A row that holds NaN or ±inf gets scale NaN and
// q = 0, so that every output computed from it is NaN and no other row is touched. An all-zero row gives zeros.
// Static scales: ±inf saturates to ±127, NaN becomes 0.
struct Quantize {
  const void* x;  // [M, K] of x_dtype, any alignment, K contiguous
  int8_t* q;  // [M, ldq]
  float* scale;  // [M] written (dynamic), or read: [M], [K] or [1] (static)
  int64_t ldx, ldq;  // elements; columns K … ldq-1 of q are written with zeros
  int64_t m, k;
  DType x_dtype;  // kFloat32, kFloat16 or kBFloat16
};

enum class ScaleAxis : int32_t { kTensor = 0, kRow = 1, kColumn = 2 };

Status quantize_per_token(const Quantize& problem, Stream stream);
Status quantize_static(const Quantize& problem, ScaleAxis axis, Stream stream);

// y[m, k] = round(q[m, k] · scale)
struct Dequantize {
  const int8_t* q;  // [M, K], K contiguous
  const float* scale;  // [1], [M] or [K]
  void* y;  // [M, K] of y_dtype
  int64_t ldq, ldy;
  int64_t m, k;
  DType y_dtype;
};

Status dequantize(const Dequantize& problem, ScaleAxis axis, Stream stream);

// ---- Fused: norm or activation, then quantize ---------------------------------------------------------------------

// What an unfused model in x's dtype would have quantized, without the trip through memory: each value that the model
// would have stored is rounded to x's dtype (`round` below) and then quantized as in Quantize, special values included.
// All else is float32, one IEEE operation each, in the order written.

enum class Norm : int32_t {
  kLayer = 0,  // y = round(((h - mean) · r) · w + b): torch.nn.LayerNorm
  kRms = 1,  // y = round((h · r) · w): torch.nn.RMSNorm, Gemma (with offset 1)
  kRmsRounded = 2,  // y = round(round(h · r) · w): transformers' Llama, Qwen, Mistral, T5
};

// h = round(x + residual), or x; r = 1 / sqrt(sum(h²) / K + eps), for kLayer of h - mean with mean = sum(h) / K;
// w = offset + weight, or 1 without a weight. A missing bias adds nothing.
//
// The sum has one fixed order, so that its bits depend on the row alone and not on M, an alignment or the GPU: with
// E = 16 / sizeof(x) and fold(v) adding the upper half of v to the lower until one element is left, the row is padded
// with zeros to chunks of 32·E; each is folded over E, then over the 32; of the chunks' sums every 32nd are added in
// order of the row, and the 32 totals folded. Its relative error is below (14 + K / 2¹²) · 2⁻²⁴.
struct NormQuantize {
  const void* x;  // [M, K] of x_dtype, any alignment, K contiguous, K <= kMaxK
  const void* residual;  // [M, K] of x_dtype, or null
  const void* weight;  // [K] of weight_dtype, or null; not written by the kernel that precedes this call
  const void* bias;  // [K] of bias_dtype, or null; kLayer only
  void* h;  // [M, K] of x_dtype, with a residual and only then; may be x or residual itself; or null
  void* y;  // [M, K] of x_dtype, may be x itself when h is not; or null
  int8_t* q;  // [M, ldq]; columns K … ldq-1 are written with zeros
  float* scale;  // [M] written; or with is_static read: [1]
  int64_t ldx, ldr, ldh, ldy, ldq;
  int64_t m, k;
  float eps, offset;
  DType x_dtype, weight_dtype, bias_dtype;  // kFloat32, kFloat16 or kBFloat16
  Norm norm;
  bool is_static;
};

Status norm_quantize(const NormQuantize& problem, Stream stream);

// y = round(activation(x)), or gated: y = round(round(activation(x)) · up). The halves of a [M, 2K] gate-and-up product
// are x and up = x + K with the same leading dimension. An activation is within 4 float32 ulp of the size of x before it
// is rounded; kNone and kRelu are exact.
struct ActivationQuantize {
  const void* x;  // [M, K] of x_dtype, any alignment, K contiguous, K <= kMaxK
  const void* up;  // [M, K] of x_dtype, or null
  int8_t* q;  // [M, ldq]; columns K … ldq-1 are written with zeros
  float* scale;  // [M] written; or with is_static read: [1]
  int64_t ldx, ldup, ldq;
  int64_t m, k;
  DType x_dtype;  // kFloat32, kFloat16 or kBFloat16
  Activation activation;
  bool is_static;
};

Status activation_quantize(const ActivationQuantize& problem, Stream stream);

// ---- Linear: quantize x per token, then GEMM ----------------------------------------------------------------------

struct Linear {
  const void* x;  // [M, K] of x_dtype
  const int8_t* weight;  // [N, ldb], ldb = K rounded up to 16, padding zero
  const float* weight_scale;  // [N]
  const void* bias;  // [N] of bias_dtype, or null
  void* y;  // [M, N] of y_dtype, dense rows of ldy elements
  int64_t ldx, ldb, ldy;
  int64_t m, n, k;
  DType x_dtype, bias_dtype, y_dtype;
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // [M, N] of residual_dtype, added after the activation; null for none
  int64_t ldr = 0;
  DType residual_dtype = DType::kFloat32;
  // weight, weight_scale and bias were not written by the kernel that precedes this call, so that their loads may start
  // before that kernel ends. True from a layer's second call on; false is always safe.
  bool weight_is_constant = false;
};

// Bytes of device scratch for one call: the int8 activations and their scales. Any 16-byte aligned buffer will do.
size_t linear_workspace_bytes(int64_t m, int64_t k);
// The id of the fastest way to a whole linear with 16-bit x and y and no options: of a row of Scheme::kW8A8Linear, or the
// GEMM's (gemm_choose) after a launch for quantize; -1 if none runs.
int linear_choose(int64_t m, int64_t n, int64_t k, const Device& device);

// `config_id`: of a row of Scheme::kW8A8 (two launches) or kW8A8Linear (one, which leaves the workspace alone, or two).
Status linear(const Linear& problem, int config_id, void* workspace, size_t workspace_bytes, Stream stream);

// ---- Weight-only linear (W8A16): int8 weights, 16-bit activations -------------------------------------------------

// y[m, n] = round(activation((sum · weight_scale[n]) + bias[n]) + residual[m, n]),   sum = Σ_k x[m, k]·weight[n, k]
// The products are exact (an int8 is exact in both 16-bit types) and are added in float32 in an order that the config
// fixes: the same bits in every run, other bits with another config. NaN and ±inf propagate as in a float32 product.
// NOTE: for bfloat16 the sums are kept at 1/64 of their value, so products below 2⁻¹²⁰ may lose bits as subnormals.
struct WeightOnlyLinear {
  const void* x;  // [M, K] of x_dtype, any alignment, K contiguous
  const int8_t* weight;  // [N, ldb], ldb >= K rounded up to 16, rows 16-byte aligned; what lies past K is not used
  const float* weight_scale;  // [N]
  const void* bias;  // [N] of bias_dtype, or null
  void* y;  // [M, N] of y_dtype, dense rows of ldy elements
  int64_t ldx, ldb, ldy;
  int64_t m, n, k;
  DType x_dtype;  // kFloat16 or kBFloat16
  DType bias_dtype, y_dtype;  // kFloat32, kFloat16 or kBFloat16
  Activation activation = Activation::kNone;
  const void* residual = nullptr;  // [M, N] of residual_dtype, added after the activation; null for none
  int64_t ldr = 0;
  DType residual_dtype = DType::kFloat32;
  bool weight_is_constant = false;  // as Gemm::b_is_constant
};

// The id, among the rows of Scheme::kW8A16, that the cost model predicts to be fastest on the device; -1 if none runs.
int weight_only_choose(int64_t m, int64_t n, int64_t k, const Device& device);
Status weight_only_linear(const WeightOnlyLinear& problem, int config_id, Stream stream);

// ---- Attention between two linears: 16 bits in and out ----------------------------------------------------------------

// y[b, i, h] = Σ_j softmax_j(scale · q[b, i, h]·k[b, j, g] + mask[b, h, i, j]) · v[b, j, g],   g = h / (heads / kv_heads)
// q and k are rotated first if there are cosine and sine: x · cosine + (-second half of x, first half of x) · sine, rounded
// to dtype. Sums and exponentials are float32, weights are rounded to dtype before they meet v. A query whose keys are all
// masked by -inf gives NaN, as softmax does.
struct Attention {
  const void* qkv;  // [batch, length, heads + 2 · kv_heads, dim] of dtype: the queries of a token, its keys, its values
  const float* cosine;  // [length, dim], or null
  const float* sine;  // like cosine
  const void* mask;  // of dtype, or null; its last dimension is dense
  void* y;  // [batch, length, heads, dim] of dtype
  int64_t mask_batch, mask_head, mask_row;  // elements from one batch, head, query to the next; 0 where they share it
  int64_t batch, length, heads, kv_heads, dim;  // dim: 32, 64 or 128; heads is a multiple of kv_heads
  float scale;
  DType dtype;  // kFloat16 or kBFloat16
  bool causal;  // query i sees keys 0 … i; without a mask
};

size_t attention_workspace_bytes(const Attention& problem);  // device scratch for one call, 16-byte aligned
Status attention(const Attention& problem, void* workspace, size_t workspace_bytes, Stream stream);

// ---- Embedding: rows of an int8 table -----------------------------------------------------------------------------

// y[m, k] = round((float)weight[indices[m], k] * weight_scale[indices[m]])
// An index outside [0, N) is a device-side assertion, as in torch: the launch returns kOk, and the next call that waits
// for the GPU returns cudaErrorAssert.
struct Embedding {
  const void* indices;  // [M], int64 or int32
  const int8_t* weight;  // [N, ldb], rows 16-byte aligned, ldb >= K rounded up to 16: the layout of Linear::weight
  const float* weight_scale;  // [N]
  void* y;  // [M, K] of y_dtype
  int64_t ldb, ldy;  // elements
  int64_t m, n, k;
  bool wide_indices;  // int64; else int32
  DType y_dtype;  // kFloat32, kFloat16 or kBFloat16
};

Status embedding(const Embedding& problem, Stream stream);

}  // namespace hwkern
