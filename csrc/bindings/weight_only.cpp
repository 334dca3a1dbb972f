// hwkern._C's weight-only functions: those of hwkern.h over plain integers.
#include "bindings/call.h"

namespace py = pybind11;
using namespace hwkern;
using hwkern::bindings::pointer;

namespace {

// On every layer's path, so a plain CPython function as `linear` is: 21 integers in the order read here.
PyObject* py_weight_only_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 21;
  if (count != kCount)
    return PyErr_Format(PyExc_TypeError, "weight_only_linear takes %zd integers, not %zd", kCount, count);
  int64_t v[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const auto dtype = [&](int i) { return static_cast<DType>(v[i]); };
  WeightOnlyLinear problem{};
  problem.x = pointer<void>(v[0]), problem.x_dtype = dtype(1), problem.ldx = v[2];
  problem.weight = pointer<int8_t>(v[3]), problem.ldb = v[4], problem.weight_is_constant = v[5] != 0;
  problem.weight_scale = pointer<float>(v[6]);
  problem.bias = pointer<void>(v[7]), problem.bias_dtype = dtype(8);
  problem.y = pointer<void>(v[9]), problem.y_dtype = dtype(10), problem.ldy = v[11];
  problem.m = v[12], problem.n = v[13], problem.k = v[14];
  problem.activation = static_cast<Activation>(v[15]);
  problem.residual = pointer<void>(v[16]), problem.residual_dtype = dtype(17), problem.ldr = v[18];
  const int config = static_cast<int>(v[19]);
  const Stream stream = pointer<CUstream_st>(v[20]);
  Status status;
  Py_BEGIN_ALLOW_THREADS;  // a full launch queue blocks, and must not block other Python threads
  status = weight_only_linear(problem, config, stream);
  Py_END_ALLOW_THREADS;
  if (status.ok()) Py_RETURN_NONE;
  PyErr_SetString(status.code == StatusCode::kInvalidArgument ? PyExc_ValueError : PyExc_RuntimeError, status.what);
  return nullptr;
}

PyMethodDef kMethod = {"weight_only_linear",
                       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_weight_only_linear)),
                       METH_FASTCALL, nullptr};

}  // namespace

void bind_weight_only(py::module_& m) {
  using py::operator""_a;
  m.attr("weight_only_linear") = py::reinterpret_steal<py::object>(PyCFunction_New(&kMethod, nullptr));
  m.def(
      "weight_only_choose",
      [](int64_t M, int64_t N, int64_t K, int sm_count, int compute, int shared_bytes) {
        return weight_only_choose(M, N, K, {sm_count, compute, shared_bytes});
      },
      "m"_a, "n"_a, "k"_a, "sm_count"_a, "compute"_a, "shared_bytes"_a);
}
