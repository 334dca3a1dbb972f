// hwkern._C: the entry points of hwkern.h as Python functions over plain integers, and Status as exceptions.
#include "bindings/call.h"
#include "core/device.h"
#include "cpu/cpu.h"
#include "hwkern.h"

namespace py = pybind11;
using namespace hwkern;
using namespace hwkern::bindings;

void bind_attention(py::module_& m);
void bind_embedding(py::module_& m);

void bind_fused(py::module_& m);

void bind_torch_ops(py::module_& m);

void bind_weight_only(py::module_& m);

namespace {

void py_gemm(uintptr_t a, int64_t lda, uintptr_t b, int64_t ldb, uintptr_t scale_m, uintptr_t scale_n, uintptr_t bias,
             int bias_dtype, uintptr_t d, int64_t ldd, int d_dtype, int64_t m, int64_t n, int64_t k, int config,
             uintptr_t stream, bool b_is_constant, int activation, uintptr_t residual, int64_t ldr, int residual_dtype,
             uintptr_t d_scale) {
  const Gemm problem{pointer<int8_t>(a),
                     pointer<int8_t>(b),
                     pointer<float>(scale_m),
                     pointer<float>(scale_n),
                     pointer<void>(bias),
                     pointer<void>(d),
                     lda,
                     ldb,
                     ldd,
                     m,
                     n,
                     k,
                     static_cast<DType>(bias_dtype),
                     static_cast<DType>(d_dtype),
                     static_cast<Activation>(activation),
                     pointer<void>(residual),
                     ldr,
                     static_cast<DType>(residual_dtype),
                     pointer<float>(d_scale),
                     b_is_constant};
  run([&] { return gemm(problem, config, pointer<CUstream_st>(stream)); });
}

// The one function on every layer's path, so without pybind11's dispatcher (1 µs for 18 arguments): a plain CPython
// function of 23 integers, in the order of `problem` below.
PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 23;
  if (count != kCount) return PyErr_Format(PyExc_TypeError, "linear takes %zd integers, not %zd", kCount, count);
  int64_t v[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const auto dtype = [&](int i) { return static_cast<DType>(v[i]); };
  const Linear problem{/*x*/ pointer<void>(v[0]),
                       /*weight*/ pointer<int8_t>(v[3]),
                       /*weight_scale*/ pointer<float>(v[5]),
                       /*bias*/ pointer<void>(v[6]),
                       /*y*/ pointer<void>(v[8]),
                       /*ldx*/ v[2],
                       /*ldb*/ v[4],
                       /*ldy*/ v[9],
                       /*m*/ v[11],
                       /*n*/ v[12],
                       /*k*/ v[13],
                       /*x_dtype*/ dtype(1),
                       /*bias_dtype*/ dtype(7),
                       /*y_dtype*/ dtype(10),
                       /*activation*/ static_cast<Activation>(v[18]),
                       /*residual*/ pointer<void>(v[19]),
                       /*ldr*/ v[20],
                       /*residual_dtype*/ dtype(21),
                       /*weight_is_constant*/ v[22] != 0};
  try {
    run([&] {
      return linear(problem, static_cast<int>(v[14]), pointer<void>(v[15]), static_cast<size_t>(v[16]),
                    pointer<CUstream_st>(v[17]));
    });
  } catch (const py::value_error& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef kLinearMethod = {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_linear)),
                             METH_FASTCALL, nullptr};

Quantize quantize_problem(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                          uintptr_t scale) {
  return {pointer<void>(x), pointer<int8_t>(q), pointer<float>(scale), ldx, ldq, m, k, static_cast<DType>(x_dtype)};
}

void py_quantize_per_token(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                           uintptr_t scale, uintptr_t stream) {
  const Quantize problem = quantize_problem(x, x_dtype, ldx, m, k, q, ldq, scale);
  forget_weight(problem.q);
  run([&] { return quantize_per_token(problem, pointer<CUstream_st>(stream)); });
}

void py_quantize_static(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                        uintptr_t scale, int axis, uintptr_t stream) {
  const Quantize problem = quantize_problem(x, x_dtype, ldx, m, k, q, ldq, scale);
  forget_weight(problem.q);
  run([&] { return quantize_static(problem, static_cast<ScaleAxis>(axis), pointer<CUstream_st>(stream)); });
}

void py_dequantize(uintptr_t q, int64_t ldq, uintptr_t scale, uintptr_t y, int y_dtype, int64_t ldy, int64_t m,
                   int64_t k, int axis, uintptr_t stream) {
  const Dequantize problem{pointer<int8_t>(q),         pointer<float>(scale), pointer<void>(y), ldq, ldy, m, k,
                           static_cast<DType>(y_dtype)};
  run([&] { return dequantize(problem, static_cast<ScaleAxis>(axis), pointer<CUstream_st>(stream)); });
}

void py_cpu_quantize_rows(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                          uintptr_t scale, int threads) {
  const Quantize problem = quantize_problem(x, x_dtype, ldx, m, k, q, ldq, scale);
  run([&] { return cpu::quantize_rows(problem, threads); });
}

void py_cpu_rescale(uintptr_t sum, uintptr_t scale_m, uintptr_t scale_n, uintptr_t bias, int bias_dtype, uintptr_t y,
                    int y_dtype, int64_t m, int64_t n, int threads) {
  const cpu::Rescale problem{pointer<int32_t>(sum),
                             pointer<float>(scale_m),
                             pointer<float>(scale_n),
                             pointer<void>(bias),
                             pointer<void>(y),
                             m,
                             n,
                             static_cast<DType>(bias_dtype),
                             static_cast<DType>(y_dtype)};
  run([&] { return cpu::rescale(problem, threads); });
}

const char* scheme_name(Scheme scheme) {
  return scheme == Scheme::kW8A16 ? "w8a16" : scheme == Scheme::kW8A8Linear ? "w8a8_linear" : "w8a8";
}

py::dict as_dict(const GemmConfig& c) {
  using py::operator""_a;
  return py::dict("id"_a = c.id, "name"_a = c.name, "min_compute"_a = c.min_compute, "max_compute"_a = c.max_compute,
                  "cluster"_a = c.cluster, "block_m"_a = c.block_m, "block_n"_a = c.block_n, "block_k"_a = c.block_k,
                  "warps_m"_a = c.warps_m, "warps_n"_a = c.warps_n, "warps_k"_a = c.warps_k, "stages"_a = c.stages,
                  "shared_bytes"_a = c.shared_bytes, "blocks_per_sm"_a = c.blocks_per_sm,
                  "scheme"_a = scheme_name(c.scheme), "split_k"_a = c.split_k, "max_k"_a = c.max_k);
}

py::list configs() {
  int count;
  const GemmConfig* rows = gemm_configs(&count);
  py::list list;
  for (int i = 0; i < count; ++i) list.append(as_dict(rows[i]));
  return list;
}

double predict_us(int id, int64_t m, int64_t n, int64_t k, int sm_count, int compute, int shared_bytes,
                  bool b_is_constant) {
  const GemmConfig* config = gemm_config(id);
  if (!config) throw py::value_error("unknown config id " + std::to_string(id) + "; gemm_configs() lists them");
  return gemm_predict_us(*config, m, n, k, {sm_count, compute, shared_bytes}, b_is_constant);
}

py::tuple cuda_status() {
  std::string message;
  const int count = device_count(&message);
  return py::make_tuple(count, message);
}

py::tuple versions() {
  int driver, runtime;
  driver_version(&driver, &runtime);
  return py::make_tuple(driver, runtime);
}

py::dict properties(int index) {
  using py::operator""_a;
  DeviceProperties d;
  check(device_properties(index, &d));
  return py::dict("name"_a = d.name, "compute"_a = d.compute, "sm_count"_a = d.sm_count, "clock_khz"_a = d.clock_khz,
                  "memory_clock_khz"_a = d.memory_clock_khz, "memory_bus_bits"_a = d.memory_bus_bits,
                  "l2_bytes"_a = d.l2_bytes, "memory_bytes"_a = d.memory_bytes,
                  "shared_bytes_per_sm"_a = d.shared_bytes_per_sm, "shared_bytes"_a = d.shared_bytes);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using py::operator""_a;
  m.doc() = "hwkern's kernels over raw device pointers: integers in, exceptions out. See csrc/hwkern.h.";
  m.attr("version") = HWKERN_VERSION;
  m.attr("built_with_cuda") = bool(HWKERN_CUDA);
  m.attr("cuda_version") = HWKERN_CUDA_VERSION;
  m.attr("architectures") = HWKERN_ARCHITECTURES;

  m.def("cuda_status", &cuda_status, "(number of GPUs, '' or the runtime's sentence why there is none)");
  m.def("driver_version", &versions, "(driver, runtime) as CUDA numbers them, e.g. 13000; 0 when absent");
  m.def("device_properties", &properties, "index"_a);

  m.def("gemm_configs", &configs);
  m.def(
      "gemm_choose",
      [](int64_t M, int64_t N, int64_t K, int sm_count, int compute, int shared_bytes, bool b_is_constant) {
        return gemm_choose(M, N, K, {sm_count, compute, shared_bytes}, b_is_constant);
      },
      "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a, "b_is_constant"_a = false);
  m.def(
      "linear_choose",
      [](int64_t M, int64_t N, int64_t K, int sm_count, int compute, int shared_bytes) {
        return linear_choose(M, N, K, {sm_count, compute, shared_bytes});
      },
      "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a);
  m.def("gemm_predict_us", &predict_us, "id"_a, "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a,
        "b_is_constant"_a = false);

  m.def("gemm", &py_gemm, "a"_a, "lda"_a, "b"_a, "ldb"_a, "scale_m"_a, "scale_n"_a, "bias"_a, "bias_dtype"_a, "d"_a,
        "ldd"_a, "d_dtype"_a, "m"_a, "n"_a, "k"_a, "config"_a, "stream"_a, "b_is_constant"_a = false,
        "activation"_a = 0, "residual"_a = 0, "ldr"_a = 0, "residual_dtype"_a = 0, "d_scale"_a = 0);
  m.attr("linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&kLinearMethod, nullptr));
  bind_weight_only(m);
  m.def("linear_workspace_bytes", &linear_workspace_bytes, "m"_a, "k"_a);
  m.def("quantize_per_token", &py_quantize_per_token);
  m.def("quantize_static", &py_quantize_static);
  m.def("dequantize", &py_dequantize);

  m.def("cpu_quantize_rows", &py_cpu_quantize_rows);
  m.def("cpu_rescale", &py_cpu_rescale);

  bind_attention(m);
  bind_embedding(m);
  bind_fused(m);
  bind_torch_ops(m);
}
