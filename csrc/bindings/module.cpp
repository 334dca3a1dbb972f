// hwkern._C: the entry points of hwkern.h as Python functions over plain integers, and Status as exceptions.
#include <pybind11/pybind11.h>

#include "core/device.h"
#include "hwkern.h"

namespace py = pybind11;
using namespace hwkern;

namespace {

void check(Status status) {
  switch (status.code) {
    case StatusCode::kOk: return;
    case StatusCode::kInvalidArgument: throw py::value_error(status.what);
    default: throw std::runtime_error(status.what);
  }
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Launches release the GIL: a full launch queue blocks, and must not block other Python threads.
template <typename F>
void run(F&& enqueue) {
  Status status;
  {
    py::gil_scoped_release release;
    status = enqueue();
  }
  check(status);
}

void py_gemm(uintptr_t a, int64_t lda, uintptr_t b, int64_t ldb, uintptr_t scale_m, uintptr_t scale_n, uintptr_t bias,
             int bias_dtype, uintptr_t d, int64_t ldd, int d_dtype, int64_t m, int64_t n, int64_t k, int config,
             uintptr_t stream) {
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
                     static_cast<DType>(d_dtype)};
  run([&] { return gemm(problem, config, pointer<CUstream_st>(stream)); });
}

void py_linear(uintptr_t x, int x_dtype, int64_t ldx, uintptr_t weight, int64_t ldb, uintptr_t weight_scale,
               uintptr_t bias, int bias_dtype, uintptr_t y, int64_t ldy, int y_dtype, int64_t m, int64_t n, int64_t k,
               int config, uintptr_t workspace, size_t workspace_bytes, uintptr_t stream) {
  const Linear problem{pointer<void>(x),
                       pointer<int8_t>(weight),
                       pointer<float>(weight_scale),
                       pointer<void>(bias),
                       pointer<void>(y),
                       ldx,
                       ldb,
                       ldy,
                       m,
                       n,
                       k,
                       static_cast<DType>(x_dtype),
                       static_cast<DType>(bias_dtype),
                       static_cast<DType>(y_dtype)};
  run([&] { return linear(problem, config, pointer<void>(workspace), workspace_bytes, pointer<CUstream_st>(stream)); });
}

Quantize quantize_problem(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                          uintptr_t scale) {
  return {pointer<void>(x), pointer<int8_t>(q), pointer<float>(scale), ldx, ldq, m, k, static_cast<DType>(x_dtype)};
}

void py_quantize_per_token(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                           uintptr_t scale, uintptr_t stream) {
  const Quantize problem = quantize_problem(x, x_dtype, ldx, m, k, q, ldq, scale);
  run([&] { return quantize_per_token(problem, pointer<CUstream_st>(stream)); });
}

void py_quantize_static(uintptr_t x, int x_dtype, int64_t ldx, int64_t m, int64_t k, uintptr_t q, int64_t ldq,
                        uintptr_t scale, int axis, uintptr_t stream) {
  const Quantize problem = quantize_problem(x, x_dtype, ldx, m, k, q, ldq, scale);
  run([&] { return quantize_static(problem, static_cast<ScaleAxis>(axis), pointer<CUstream_st>(stream)); });
}

void py_dequantize(uintptr_t q, int64_t ldq, uintptr_t scale, uintptr_t y, int y_dtype, int64_t ldy, int64_t m,
                   int64_t k, int axis, uintptr_t stream) {
  const Dequantize problem{pointer<int8_t>(q),         pointer<float>(scale), pointer<void>(y), ldq, ldy, m, k,
                           static_cast<DType>(y_dtype)};
  run([&] { return dequantize(problem, static_cast<ScaleAxis>(axis), pointer<CUstream_st>(stream)); });
}

py::dict as_dict(const GemmConfig& c) {
  using py::operator""_a;
  return py::dict("id"_a = c.id, "name"_a = c.name, "min_compute"_a = c.min_compute, "block_m"_a = c.block_m,
                  "block_n"_a = c.block_n, "block_k"_a = c.block_k, "warps_m"_a = c.warps_m, "warps_n"_a = c.warps_n,
                  "warps_k"_a = c.warps_k, "stages"_a = c.stages, "shared_bytes"_a = c.shared_bytes,
                  "blocks_per_sm"_a = c.blocks_per_sm);
}

py::list configs() {
  int count;
  const GemmConfig* rows = gemm_configs(&count);
  py::list list;
  for (int i = 0; i < count; ++i) list.append(as_dict(rows[i]));
  return list;
}

double predict_us(int id, int64_t m, int64_t n, int64_t k, int sm_count, int compute, int shared_bytes) {
  const GemmConfig* config = gemm_config(id);
  if (!config) throw py::value_error("unknown config id " + std::to_string(id) + "; gemm_configs() lists them");
  return gemm_predict_us(*config, m, n, k, {sm_count, compute, shared_bytes});
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
      [](int64_t M, int64_t N, int64_t K, int sm_count, int compute, int shared_bytes) {
        return gemm_choose(M, N, K, {sm_count, compute, shared_bytes});
      },
      "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a);
  m.def("gemm_predict_us", &predict_us, "id"_a, "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a);

  m.def("gemm", &py_gemm);
  m.def("linear", &py_linear);
  m.def("linear_workspace_bytes", &linear_workspace_bytes, "m"_a, "k"_a);
  m.def("quantize_per_token", &py_quantize_per_token);
  m.def("quantize_static", &py_quantize_static);
  m.def("dequantize", &py_dequantize);
}
