// What every binding shares: addresses as pointers, and a Status as an exception.
#pragma once

#include <pybind11/pybind11.h>

#include "hwkern.h"

namespace hwkern::bindings {

namespace py = pybind11;

inline void check(Status status) {
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

// These bytes are about to be written: a layer whose weight they become has not been called yet (torch_ops.cpp).
void forget_weight(const void* weight);

// Launches release the GIL: a full launch queue blocks, and must not block other Python threads. So does CPU work.
template <typename F>
void run(F&& enqueue) {
  Status status;
  {
    py::gil_scoped_release release;
    status = enqueue();
  }
  check(status);
}

}  // namespace hwkern::bindings
