// The fused operators: one function each, on the GPU and on the CPU, integers and floats in.
#include "bindings/call.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using namespace hwkern;
using namespace hwkern::bindings;

namespace {

// norm_quantize on the GPU and on the CPU take the same arguments but the last: a stream, or a number of threads.
template <typename F>
void bind_norm(py::module_& m, const char* name, const char* last_name, F call) {
  m.def(
      name,
      [call](uintptr_t x, int64_t ldx, int x_dtype, uintptr_t residual, int64_t ldr, uintptr_t weight, int weight_dtype,
             uintptr_t bias, int bias_dtype, uintptr_t h, int64_t ldh, uintptr_t y, int64_t ldy, uintptr_t q,
             int64_t ldq, uintptr_t scale, bool is_static, int64_t M, int64_t K, double eps, double offset, int norm,
             uintptr_t last) {
        const NormQuantize problem{pointer<void>(x),
                                   pointer<void>(residual),
                                   pointer<void>(weight),
                                   pointer<void>(bias),
                                   pointer<void>(h),
                                   pointer<void>(y),
                                   pointer<int8_t>(q),
                                   pointer<float>(scale),
                                   ldx,
                                   ldr,
                                   ldh,
                                   ldy,
                                   ldq,
                                   M,
                                   K,
                                   static_cast<float>(eps),
                                   static_cast<float>(offset),
                                   static_cast<DType>(x_dtype),
                                   static_cast<DType>(weight_dtype),
                                   static_cast<DType>(bias_dtype),
                                   static_cast<Norm>(norm),
                                   is_static};
        run([&] { return call(problem, last); });
      },
      py::arg("x"), py::arg("ldx"), py::arg("x_dtype"), py::arg("residual"), py::arg("ldr"), py::arg("weight"),
      py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("h"), py::arg("ldh"), py::arg("y"),
      py::arg("ldy"), py::arg("q"), py::arg("ldq"), py::arg("scale"), py::arg("is_static"), py::arg("m"), py::arg("k"),
      py::arg("eps"), py::arg("offset"), py::arg("norm"), py::arg(last_name));
}

void py_activation_quantize(uintptr_t x, int64_t ldx, int x_dtype, uintptr_t up, int64_t ldup, uintptr_t q, int64_t ldq,
                            uintptr_t scale, bool is_static, int64_t m, int64_t k, int activation, uintptr_t stream) {
  const ActivationQuantize problem{pointer<void>(x),
                                   pointer<void>(up),
                                   pointer<int8_t>(q),
                                   pointer<float>(scale),
                                   ldx,
                                   ldup,
                                   ldq,
                                   m,
                                   k,
                                   static_cast<DType>(x_dtype),
                                   static_cast<Activation>(activation),
                                   is_static};
  run([&] { return activation_quantize(problem, pointer<CUstream_st>(stream)); });
}

}  // namespace

void bind_fused(py::module_& m) {
  bind_norm(m, "norm_quantize", "stream", [](const NormQuantize& problem, uintptr_t stream) {
    return norm_quantize(problem, pointer<CUstream_st>(stream));
  });
  bind_norm(m, "cpu_norm_quantize", "threads", [](const NormQuantize& problem, uintptr_t threads) {
    return cpu::norm_quantize(problem, static_cast<int>(threads));
  });
  m.def("activation_quantize", &py_activation_quantize, py::arg("x"), py::arg("ldx"), py::arg("x_dtype"), py::arg("up"),
        py::arg("ldup"), py::arg("q"), py::arg("ldq"), py::arg("scale"), py::arg("is_static"), py::arg("m"),
        py::arg("k"), py::arg("activation"), py::arg("stream"));
}
