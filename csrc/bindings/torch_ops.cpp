// The operators of inference (hwkern/_no_grad.py) as kernels of torch's dispatcher. A compiled decoding step is
// bound by the host, and an operator in Python takes 15–25 µs of it; one of these takes its launches and 3 µs.
//
// Nothing of torch is needed to build this: torch 2.10 and newer promise the C functions below not to change (its stable
// ABI), and they are looked up in the libraries that the process has loaded. A kernel gets its arguments in 64 bits
// each, owns the tensors among them, and leaves its result in the first place. It runs without the GIL.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/call.h"
#include "core/status.h"
#include "quant/fused.h"

namespace py = pybind11;
using namespace hwkern;

namespace {

using Value = uint64_t;  // torch's StableIValue
struct TorchTensor;
struct TorchLibrary;
struct TorchGuard;
using Kernel = void(Value* arguments, uint64_t inputs, uint64_t outputs);
constexpr Value kTorchAbi = Value{2} << 56 | Value{10} << 48;  // this file speaks as torch 2.10 did

// Every function returns 0, or an error that has been printed; the few that cannot fail return their result.
struct Torch {
  int32_t (*delete_tensor)(TorchTensor*);
  int32_t (*data_ptr)(TorchTensor*, void**);
  int32_t (*dim)(TorchTensor*, int64_t*);
  int32_t (*sizes)(TorchTensor*, int64_t**);
  int32_t (*strides)(TorchTensor*, int64_t**);
  int32_t (*dtype)(TorchTensor*, int32_t*);
  int32_t (*device_type)(TorchTensor*, int32_t*);
  int32_t (*device_index)(TorchTensor*, int32_t*);
  int32_t (*is_contiguous)(TorchTensor*, bool*);
  int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, TorchTensor**);
  int32_t (*copy)(TorchTensor*, TorchTensor*, int32_t);
  bool (*grad_mode)();
  int32_t (*cuda)();
  int32_t (*int8)();
  int32_t (*int32)();
  int32_t (*int64)();
  int32_t (*float32)();
  int32_t (*float16)();
  int32_t (*bfloat16)();
  int32_t (*init_impl)(const char*, const char*, const char*, uint32_t, TorchLibrary**);
  int32_t (*impl)(TorchLibrary*, const char*, Kernel*, uint64_t);
  int32_t (*stream)(int32_t, void**);
  int32_t (*create_guard)(int32_t, TorchGuard**);
  int32_t (*delete_guard)(TorchGuard*);
  int32_t (*delete_value)(Value*);  // from torch 2.13 on
} torch;

void check(int32_t error) {
  if (error) throw std::runtime_error("hwkern: torch refused a call; its own message is on stderr.");
}

void check(Status status) {
  if (status.code == StatusCode::kInvalidArgument) throw std::invalid_argument(status.what);
  if (!status.ok()) throw std::runtime_error(status.what);
}

void require(bool condition, const char* sentence) {
  if (!condition) throw std::invalid_argument(sentence);
}

// ---- tensors ---------------------------------------------------------------------------------------------------------

struct Delete {
  void operator()(TorchTensor* t) const { torch.delete_tensor(t); }
  void operator()(TorchGuard* g) const { torch.delete_guard(g); }
};

// A tensor that this file owns, or none.
struct Tensor {
  std::unique_ptr<TorchTensor, Delete> handle;
  void* data = nullptr;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0, device_type = 0, device = 0;
  bool contiguous = false;

  Tensor() = default;
  explicit Tensor(TorchTensor* owned) : handle(owned) {
    check(torch.data_ptr(owned, &data));
    check(torch.dim(owned, &dim));
    check(torch.sizes(owned, &sizes));
    check(torch.strides(owned, &strides));
    check(torch.dtype(owned, &dtype));
    check(torch.device_type(owned, &device_type));
    check(torch.device_index(owned, &device));
    check(torch.is_contiguous(owned, &contiguous));
  }
  explicit operator bool() const { return handle != nullptr; }
};

// torch's functions in C cannot hand their exceptions on, and those who make room and try again look for this class:
// Python's error, which torch passes on as it is, also out of a compiled model.
[[noreturn]] void throw_out_of_memory() {
  const py::gil_scoped_acquire gil;
  PyErr_SetString(
      py::module_::import("torch").attr("OutOfMemoryError").ptr(),
      "CUDA out of memory. torch has no room for a result or the workspace of hwkern; it has said on stderr "
      "how much it wanted.");
  throw py::error_already_set();
}

Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, int32_t device) {
  std::vector<int64_t> strides(dim);
  for (int64_t i = dim, stride = 1; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;  // as torch
  TorchTensor* t;
  if (torch.empty_strided(dim, sizes, strides.data(), dtype, torch.cuda(), device, &t)) throw_out_of_memory();
  return Tensor(t);
}

Tensor copy_of(const Tensor& t) {
  Tensor copy = empty(t.sizes, t.dim, t.dtype, t.device);
  check(torch.copy(copy.handle.get(), t.handle.get(), /*non_blocking=*/0));
  return copy;
}

DType dtype_of(const Tensor& t) {
  if (!t || t.dtype == torch.float32()) return DType::kFloat32;
  if (t.dtype == torch.float16()) return DType::kFloat16;
  if (t.dtype == torch.bfloat16()) return DType::kBFloat16;
  throw std::invalid_argument("hwkern takes float32, float16 or bfloat16.");
}

int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return torch.float32();
    case DType::kFloat16: return torch.float16();
    case DType::kBFloat16: return torch.bfloat16();
    default: throw std::invalid_argument("hwkern writes float32, float16 or bfloat16.");
  }
}

// The arguments of one call. `kinds` says what they are: t tensor, o optional tensor, v value. Every tensor is owned from
// the start, so that none leaks when an argument before it is refused.
class Arguments {
 public:
  Arguments(Value* values, const char* kinds) : values_(values) {
    for (size_t i = 0; kinds[i]; ++i) {
      if (kinds[i] == 't') owned_[i].reset(reinterpret_cast<TorchTensor*>(values[i]));
      auto* boxed = kinds[i] == 'o' ? reinterpret_cast<Value*>(values[i]) : nullptr;
      if (!boxed) continue;
      owned_[i].reset(reinterpret_cast<TorchTensor*>(*boxed));
      if (torch.delete_value)
        torch.delete_value(boxed);
      else
        delete boxed;
    }
  }

  Tensor tensor() {
    TorchTensor* t = owned_[index_].release();
    ++index_;
    return t ? Tensor(t) : Tensor();
  }
  int64_t integer() { return static_cast<int64_t>(values_[index_++]); }
  bool boolean() { return (values_[index_++] & 0xff) != 0; }
  float number() {
    double value;
    std::memcpy(&value, &values_[index_++], sizeof value);
    return static_cast<float>(value);
  }

 private:
  const Value* values_;
  size_t index_ = 0;
  std::array<std::unique_ptr<TorchTensor, Delete>, 20> owned_;
};

// ---- what the operators are made of ----------------------------------------------------------------------------------

// x [..., K]: rows of unit stride at one distance.
struct Rows {
  Tensor t;
  int64_t m = 1, k = 0, ld = 0;

  explicit Rows(Tensor given) : t(std::move(given)) {
    require(t.device_type == torch.cuda(), "hwkern needs all tensors on one device.");
    require(t.dim > 0, "x is a scalar: hwkern needs at least one dimension, [..., K].");
    if (!t.contiguous && !(t.dim == 2 && t.strides[1] == 1 && t.strides[0] >= t.sizes[1])) t = copy_of(t);
    for (int64_t i = 0; i + 1 < t.dim; ++i) m *= t.sizes[i];
    k = t.sizes[t.dim - 1];
    ld = t.contiguous ? k : t.strides[0];
  }
  // An output of n columns.
  Tensor output(int64_t n) const {
    std::vector<int64_t> sizes(t.sizes, t.sizes + t.dim);
    sizes.back() = n;
    return empty(sizes.data(), t.dim, t.dtype, t.device);
  }
};

void require_vector(const Tensor& t, int64_t n, const Tensor& x) {
  if (!t) return;
  require(t.device_type == x.device_type && t.device == x.device, "hwkern needs all tensors on one device.");
  require(t.dim == 1 && t.sizes[0] == n, "a scale, bias or norm vector does not have one element per row or column.");
  dtype_of(t);
}

// An int8 weight [N, K16] and its scale [N], for rows of k columns on x's device; copies where the kernels could not read
// them as they are.
struct Table {
  Tensor weight, scale;
  int64_t n, k, columns;
  bool copied = false;

  Table(Arguments& arguments, int64_t k, const Tensor& x)
      : weight(arguments.tensor()), scale(arguments.tensor()), k(k), columns(round_up(k, kRowAlignment)) {
    require(k >= 1 && k <= kMaxK, "the last dimension K must be in 1 … 2**17 - 1.");
    require(
        weight.dtype == torch.int8() && weight.dim == 2 && weight.sizes[1] == columns,
        "a weight must be int8 [N, K16], K rounded up to 16: check x's last dimension, or use hwkern.ops.pad_weight.");
    require(weight.device_type == x.device_type && weight.device == x.device,
            "hwkern needs all tensors on one device.");
    require(scale.dtype == torch.float32(), "a weight's scale must be float32.");
    n = weight.sizes[0];
    require_vector(scale, n, x);
    copy_unless(weight.contiguous && is_aligned(weight.data, kRowAlignment), weight);
    copy_unless(scale.contiguous, scale);
  }

 protected:
  void copy_unless(bool readable, Tensor& t) {
    if (!readable) t = copy_of(t), copied = true;
  }
};

// One layer's weight and scale, and its bias [N] or none.
struct Layer : Table {
  Tensor bias;

  Layer(Arguments& arguments, int64_t k, const Tensor& x) : Table(arguments, k, x), bias(arguments.tensor()) {
    require_vector(bias, n, x);
    copy_unless(!bias || bias.contiguous, bias);
  }
};

// Whether this weight belonged to an earlier call, so that a kernel may read it before its predecessor ends (hwkern.h,
// weight_is_constant). One place for each hash of an address: forgetting is safe. An allocator gives addresses again, so
// what our own kernels write is forgotten (forget_weight); torch's let no successor start before they end.
std::atomic<const void*>& place_of(const void* weight) {
  static std::array<std::atomic<const void*>, 4096> places{};
  const uint64_t hash = reinterpret_cast<uintptr_t>(weight) * 0x9E3779B97F4A7C15u;
  return places[hash >> 52];
}

bool seen(const void* weight) { return place_of(weight).exchange(weight, std::memory_order_relaxed) == weight; }

struct NormOf {
  Tensor weight, bias;
  Norm kind;
  float eps, offset;

  NormOf(Arguments& arguments, int64_t k, const Tensor& x)
      : weight(arguments.tensor()),
        bias(arguments.tensor()),
        kind(static_cast<Norm>(arguments.integer())),
        eps(arguments.number()),
        offset(arguments.number()) {
    for (const Tensor* t : {&weight, &bias}) {
      require_vector(*t, k, x);
      // A copy would be written by the kernel before the norm's, which that may not read (hwkern.h, NormQuantize).
      require(!*t || t->contiguous, "a norm's weight and bias must be contiguous.");
    }
  }
};

// The GPU and the stream of a call.
struct Place {
  std::unique_ptr<TorchGuard, Delete> guard;
  Stream stream;

  explicit Place(const Tensor& x) {
    if (torch.grad_mode())
      throw std::runtime_error("This operator of hwkern has no gradient: call it under torch.no_grad().");
    TorchGuard* created;
    check(torch.create_guard(x.device, &created));
    guard.reset(created);
    void* current;
    check(torch.stream(x.device, &current));
    stream = static_cast<Stream>(current);
  }
};

Tensor bytes(int64_t count, const Tensor& x) { return empty(&count, 1, torch.int8(), x.device); }

// What the rows before a product take: quantized, as a Linear's lie in its workspace, and behind those, where the layer
// is weight-only, in x's dtype.
int64_t quantized_bytes(int64_t m, const Layer& layer) {
  return round_up(static_cast<int64_t>(linear_workspace_bytes(m, layer.k)), kRowAlignment);
}
int64_t workspace_of(const Rows& x, const Layer& layer, bool weight_only) {
  return quantized_bytes(x.m, layer) + (weight_only ? x.m * layer.k * size_of(dtype_of(x.t)) : 0);
}

// A Linear or a WeightOnlyLinear of m rows.
template <typename Problem>
Problem whole(const void* x, int64_t ldx, int64_t m, const Layer& layer, bool constant, void* y, DType dtype) {
  Problem p{};
  p.x = x, p.ldx = ldx, p.x_dtype = dtype;
  p.weight = static_cast<int8_t*>(layer.weight.data), p.ldb = layer.columns;
  p.weight_scale = static_cast<float*>(layer.scale.data), p.weight_is_constant = constant;
  p.bias = layer.bias.data, p.bias_dtype = dtype_of(layer.bias);
  p.y = y, p.ldy = layer.n, p.y_dtype = dtype;
  p.m = m, p.n = layer.n, p.k = layer.k;
  return p;
}

// y = layer(rows) + residual, of m rows that our own kernel has just left in `workspace`: so the weight is constant.
void product(int8_t* workspace, int64_t m, const Layer& layer, bool weight_only, const void* residual, void* y,
             DType dtype, Stream stream) {
  const auto add = [&](auto& p) {
    if (residual) p.residual = residual, p.ldr = layer.n, p.residual_dtype = dtype;
  };
  if (weight_only) {
    auto p = whole<WeightOnlyLinear>(workspace + quantized_bytes(m, layer), layer.k, m, layer, true, y, dtype);
    add(p);
    return check(weight_only_linear(p, kChoose, stream));
  }
  Gemm p{};
  p.a = workspace, p.lda = layer.columns;
  p.scale_m = reinterpret_cast<float*>(workspace + m * layer.columns);
  p.b = static_cast<int8_t*>(layer.weight.data), p.ldb = layer.columns, p.b_is_constant = true;
  p.scale_n = static_cast<float*>(layer.scale.data);
  p.bias = layer.bias.data, p.bias_dtype = dtype_of(layer.bias);
  p.d = y, p.ldd = layer.n, p.d_dtype = dtype;
  p.m = m, p.n = layer.n, p.k = layer.k;
  add(p);
  check(gemm(p, kChoose, stream));
}

// y = layer(norm(h)) of h = x + residual, or of x.
void norm_product(const Rows& x, const Rows* residual, const NormOf& norm, const Layer& layer, bool weight_only,
                  int8_t* workspace, void* h, void* y, Stream stream) {
  const DType dtype = dtype_of(x.t);
  NormQuantize p{};
  p.x = x.t.data, p.ldx = x.ld, p.x_dtype = dtype;
  if (residual) p.residual = residual->t.data, p.ldr = residual->ld;
  p.weight = norm.weight.data, p.weight_dtype = dtype_of(norm.weight);
  p.bias = norm.bias.data, p.bias_dtype = dtype_of(norm.bias);
  p.h = h, p.ldh = p.ldy = x.k;
  p.y = weight_only ? workspace + quantized_bytes(x.m, layer) : nullptr;
  p.q = workspace, p.ldq = layer.columns;
  p.scale = reinterpret_cast<float*>(workspace + x.m * layer.columns);
  p.m = x.m, p.k = x.k;
  p.eps = norm.eps, p.offset = norm.offset, p.norm = norm.kind;
  check(norm_quantize(p, stream));
  product(workspace, x.m, layer, weight_only, nullptr, y, dtype, stream);
}

// y = layer(activation(x)) + residual, or of activation(x[:, :K]) · x[:, K:] when gated; x's rows are of unit stride.
void activation_product(const void* x, int64_t ldx, int64_t m, Activation activation, bool gated, const Layer& layer,
                        bool weight_only, const void* residual, int8_t* workspace, void* y, DType dtype,
                        Stream stream) {
  ActivationQuantize p{};
  p.x = x, p.ldx = p.ldup = ldx, p.x_dtype = dtype;
  p.up = gated ? static_cast<const int8_t*>(x) + layer.k * size_of(dtype) : nullptr;
  p.q = workspace, p.ldq = layer.columns;
  p.scale = reinterpret_cast<float*>(workspace + m * layer.columns);
  p.m = m, p.k = layer.k, p.activation = activation;
  check(activation_quantize(p, weight_only ? workspace + quantized_bytes(m, layer) : nullptr, stream));
  product(workspace, m, layer, weight_only, residual, y, dtype, stream);
}

// ---- the operators ---------------------------------------------------------------------------------------------------

// linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, bool weight_only) -> Tensor
Tensor linear_no_grad(Arguments& arguments) {
  const Rows x(arguments.tensor());
  const Layer layer(arguments, x.k, x.t);
  const bool weight_only = arguments.boolean();
  const Place place(x.t);
  Tensor y = x.output(layer.n);
  if (x.m == 0 || layer.n == 0) return y;
  const bool constant = !layer.copied && seen(layer.weight.data);
  const DType dtype = dtype_of(x.t);
  if (weight_only) {
    const auto p = whole<WeightOnlyLinear>(x.t.data, x.ld, x.m, layer, constant, y.data, dtype);
    check(weight_only_linear(p, kChoose, place.stream));
    return y;
  }
  const int64_t size = workspace_of(x, layer, false);
  const Tensor workspace = bytes(size, x.t);
  const auto p = whole<Linear>(x.t.data, x.ld, x.m, layer, constant, y.data, dtype);
  check(linear(p, kChoose, workspace.data, static_cast<size_t>(size), place.stream));
  return y;
}

// norm_linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? norm_weight,
//                     Tensor? norm_bias, int norm, float eps, float offset, bool weight_only) -> Tensor
Tensor norm_linear_no_grad(Arguments& arguments) {
  const Rows x(arguments.tensor());
  const Layer layer(arguments, x.k, x.t);
  const NormOf norm(arguments, x.k, x.t);
  const bool weight_only = arguments.boolean();
  const Place place(x.t);
  Tensor y = x.output(layer.n);
  if (x.m == 0 || layer.n == 0) return y;
  const Tensor workspace = bytes(workspace_of(x, layer, weight_only), x.t);
  norm_product(x, nullptr, norm, layer, weight_only, static_cast<int8_t*>(workspace.data), nullptr, y.data,
               place.stream);
  return y;
}

// norm_mlp_no_grad(Tensor x, Tensor residual, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? norm_weight,
//          Tensor? norm_bias, int norm, float eps, float offset, bool weight_only, int activation, bool gated,
//          Tensor last_weight, Tensor last_scale, Tensor? last_bias, bool last_weight_only) -> Tensor
Tensor norm_mlp_no_grad(Arguments& arguments) {
  const Rows x(arguments.tensor()), residual(arguments.tensor());
  require(residual.t.device == x.t.device, "hwkern needs all tensors on one device.");
  const Layer inputs(arguments, x.k, x.t);
  const NormOf norm(arguments, x.k, x.t);
  const bool weight_only = arguments.boolean();
  const auto activation = static_cast<Activation>(arguments.integer());
  const bool gated = arguments.boolean();
  const Layer last(arguments, gated ? inputs.n / 2 : inputs.n, x.t);
  const bool last_weight_only = arguments.boolean();
  require(residual.t.dtype == x.t.dtype && residual.m == x.m && residual.k == x.k && last.n == x.k &&
              inputs.n == (gated ? 2 * last.k : last.k),
          "norm_mlp_no_grad: the residual and the last layer's outputs are of x's shape and dtype, and the first layer "
          "has as "
          "many outputs as the last one inputs, or twice as many when gated.");
  const Place place(x.t);
  Tensor y = x.output(x.k);
  if (x.m == 0) return y;
  // One allocation: what the norm adds up to, the first product, and the rows that stand before either product.
  const DType dtype = dtype_of(x.t);
  const int64_t row = size_of(dtype);
  const int64_t sums = round_up(x.m * x.k * row, kRowAlignment), wide = round_up(x.m * inputs.n * row, kRowAlignment);
  const Tensor scratch =
      bytes(sums + wide + std::max(workspace_of(x, inputs, weight_only), workspace_of(x, last, last_weight_only)), x.t);
  auto* h = static_cast<int8_t*>(scratch.data);
  int8_t *first = h + sums, *workspace = first + wide;
  norm_product(x, &residual, norm, inputs, weight_only, workspace, h, first, place.stream);
  activation_product(first, inputs.n, x.m, activation, gated, last, last_weight_only, h, workspace, y.data, dtype,
                     place.stream);
  return y;
}

// activation_linear_no_grad(Tensor x, int activation, bool gated, Tensor weight, Tensor weight_scale, Tensor? bias,
//                           Tensor? residual) -> Tensor
Tensor activation_linear_no_grad(Arguments& arguments) {
  const Rows x(arguments.tensor());
  const auto activation = static_cast<Activation>(arguments.integer());
  const bool gated = arguments.boolean();
  require(!gated || x.k % 2 == 0, "gated: x needs an even last dimension, the gate's columns and then the others'.");
  const Layer layer(arguments, gated ? x.k / 2 : x.k, x.t);
  Tensor residual = arguments.tensor();
  const Place place(x.t);
  Tensor y = x.output(layer.n);
  require(!residual || (residual.device_type == x.t.device_type && residual.device == x.t.device &&
                        residual.dtype == x.t.dtype && residual.dim == y.dim &&
                        std::equal(y.sizes, y.sizes + y.dim, residual.sizes)),
          "the residual must have the output's shape, dtype and device.");
  if (x.m == 0 || layer.n == 0) return y;
  if (residual && !residual.contiguous) residual = copy_of(residual);
  const Tensor workspace = bytes(workspace_of(x, layer, false), x.t);
  activation_product(x.t.data, x.ld, x.m, activation, gated, layer, false, residual.data,
                     static_cast<int8_t*>(workspace.data), y.data, dtype_of(x.t), place.stream);
  return y;
}

// embedding_no_grad(Tensor indices, int dim, Tensor weight, Tensor weight_scale, int dtype) -> Tensor
Tensor embedding_no_grad(Arguments& arguments) {
  Tensor indices = arguments.tensor();
  const int64_t k = arguments.integer();
  require(indices.device_type == torch.cuda(), "hwkern needs all tensors on one device.");
  require(indices.dtype == torch.int64() || indices.dtype == torch.int32(), "indices must be int64 or int32.");
  const Table table(arguments, k, indices);
  const auto dtype = static_cast<DType>(arguments.integer());
  const Place place(indices);
  if (!indices.contiguous) indices = copy_of(indices);
  std::vector<int64_t> sizes(indices.sizes, indices.sizes + indices.dim);
  Embedding p{};
  p.m = 1;
  for (const int64_t size : sizes) p.m *= size;
  sizes.push_back(k);
  Tensor y = empty(sizes.data(), indices.dim + 1, torch_dtype(dtype), indices.device);
  p.indices = indices.data, p.wide_indices = indices.dtype == torch.int64();
  p.weight = static_cast<int8_t*>(table.weight.data), p.ldb = table.columns;
  p.weight_scale = static_cast<float*>(table.scale.data);
  p.y = y.data, p.ldy = k, p.y_dtype = dtype;
  p.n = table.n, p.k = k;
  check(embedding(p, place.stream));
  return y;
}

struct Operator {
  const char* name;
  const char* kinds;
  Tensor (*call)(Arguments&);
};

constexpr Operator kLinear{"linear_no_grad", "tttov", linear_no_grad};
constexpr Operator kNormLinear{"norm_linear_no_grad", "tttooovvvv", norm_linear_no_grad};
constexpr Operator kNormMlp{"norm_mlp_no_grad", "ttttooovvvvvvttov", norm_mlp_no_grad};
constexpr Operator kActivationLinear{"activation_linear_no_grad", "tvvttoo", activation_linear_no_grad};
constexpr Operator kEmbedding{"embedding_no_grad", "tvttv", embedding_no_grad};

template <const Operator& op>
void kernel(Value* values, uint64_t, uint64_t) {
  Arguments arguments(values, op.kinds);
  values[0] = reinterpret_cast<Value>(op.call(arguments).handle.release());
}

template <const Operator& op>
void implement(TorchLibrary* library) {
  check(torch.impl(library, op.name, kernel<op>, kTorchAbi));
}

// Looks the functions up in libtorch_cpu and libtorch_cuda, which are loaded; false when this torch has not all of them.
bool find_torch(const std::string& cpu_path, const std::string& cuda_path) {
  void* const cpu = dlopen(cpu_path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* const cuda = dlopen(cuda_path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!cpu || !cuda) return false;
  const auto find = [](void* library, const char* name, auto& function) {
    return (function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name))) != nullptr;
  };
  find(cpu, "torch_delete_stable_ivalue", torch.delete_value);
  return find(cpu, "aoti_torch_delete_tensor_object", torch.delete_tensor) &&
         find(cpu, "aoti_torch_get_data_ptr", torch.data_ptr) && find(cpu, "aoti_torch_get_dim", torch.dim) &&
         find(cpu, "aoti_torch_get_sizes", torch.sizes) && find(cpu, "aoti_torch_get_strides", torch.strides) &&
         find(cpu, "aoti_torch_get_dtype", torch.dtype) && find(cpu, "aoti_torch_get_device_type", torch.device_type) &&
         find(cpu, "aoti_torch_get_device_index", torch.device_index) &&
         find(cpu, "aoti_torch_is_contiguous", torch.is_contiguous) &&
         find(cpu, "aoti_torch_empty_strided", torch.empty_strided) && find(cpu, "aoti_torch_copy_", torch.copy) &&
         find(cpu, "aoti_torch_grad_mode_is_enabled", torch.grad_mode) &&
         find(cpu, "aoti_torch_device_type_cuda", torch.cuda) && find(cpu, "aoti_torch_dtype_int8", torch.int8) &&
         find(cpu, "aoti_torch_dtype_int32", torch.int32) && find(cpu, "aoti_torch_dtype_int64", torch.int64) &&
         find(cpu, "aoti_torch_dtype_float32", torch.float32) && find(cpu, "aoti_torch_dtype_float16", torch.float16) &&
         find(cpu, "aoti_torch_dtype_bfloat16", torch.bfloat16) &&
         find(cpu, "aoti_torch_library_init_impl", torch.init_impl) && find(cpu, "torch_library_impl", torch.impl) &&
         find(cuda, "aoti_torch_get_current_cuda_stream", torch.stream) &&
         find(cuda, "aoti_torch_create_cuda_guard", torch.create_guard) &&
         find(cuda, "aoti_torch_delete_cuda_guard", torch.delete_guard);
}

bool register_torch_ops(const std::string& cpu_path, const std::string& cuda_path) {
  if (!find_torch(cpu_path, cuda_path)) return false;
  TorchLibrary* library;  // kept for good: its end would take the kernels away
  check(torch.init_impl("hwkern", "CUDA", "hwkern", 0, &library));
  implement<kLinear>(library), implement<kNormLinear>(library), implement<kNormMlp>(library);
  implement<kActivationLinear>(library), implement<kEmbedding>(library);
  return true;
}

}  // namespace

void hwkern::bindings::forget_weight(const void* weight) {
  place_of(weight).compare_exchange_strong(weight, nullptr, std::memory_order_relaxed);
}

void bind_torch_ops(py::module_& m) {
  m.def("register_torch_ops", &register_torch_ops, py::arg("libtorch_cpu"), py::arg("libtorch_cuda"));
}
