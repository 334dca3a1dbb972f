// hwkern._C's embedding functions: those of hwkern.h and cpu.h over plain integers.
#include "bindings/call.h"
#include "cpu/cpu.h"

namespace py = pybind11;
using namespace hwkern;
using hwkern::bindings::pointer;

namespace {

// Few microseconds of work, so plain CPython functions as `linear` is: 12 integers in the order read here, of which the
// last is the stream, or the number of threads.
template <typename F>
PyObject* call(const char* name, PyObject* const* args, Py_ssize_t count, F run) {
  constexpr Py_ssize_t kCount = 12;
  if (count != kCount) return PyErr_Format(PyExc_TypeError, "%s takes %zd integers, not %zd", name, kCount, count);
  int64_t v[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    v[i] = PyLong_AsLongLong(args[i]);
    if (v[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  Embedding problem{};
  problem.indices = pointer<void>(v[0]), problem.wide_indices = v[1] != 0;
  problem.weight = pointer<int8_t>(v[2]), problem.ldb = v[3];
  problem.weight_scale = pointer<float>(v[4]);
  problem.y = pointer<void>(v[5]), problem.y_dtype = static_cast<DType>(v[6]), problem.ldy = v[7];
  problem.m = v[8], problem.n = v[9], problem.k = v[10];
  Status status;
  Py_BEGIN_ALLOW_THREADS;  // a full launch queue blocks, and must not block other Python threads
  status = run(problem, v[11]);
  Py_END_ALLOW_THREADS;
  if (status.ok()) Py_RETURN_NONE;
  PyErr_SetString(status.code == StatusCode::kInvalidArgument ? PyExc_ValueError : PyExc_RuntimeError, status.what);
  return nullptr;
}

PyObject* py_embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call("embedding", args, count, [](const Embedding& problem, int64_t stream) {
    return embedding(problem, pointer<CUstream_st>(stream));
  });
}

PyObject* py_cpu_embedding(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call("cpu_embedding", args, count, [](const Embedding& problem, int64_t threads) {
    return cpu::embedding(problem, static_cast<int>(threads));
  });
}

PyMethodDef kMethods[] = {
    {"embedding", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_embedding)), METH_FASTCALL, nullptr},
    {"cpu_embedding", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&py_cpu_embedding)), METH_FASTCALL,
     nullptr}};

}  // namespace

void bind_embedding(py::module_& m) {
  for (PyMethodDef& method : kMethods)
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}
