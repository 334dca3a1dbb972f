// hwkern._C's attention functions: those of hwkern.h over plain integers.
#include "bindings/call.h"

namespace py = pybind11;
using namespace hwkern;
using hwkern::bindings::pointer;

void bind_attention(py::module_& m) {
  using py::operator""_a;
  m.def(
      "attention",
      [](uintptr_t qkv, uintptr_t cosine, uintptr_t sine, uintptr_t mask, uintptr_t y, int64_t mask_batch,
         int64_t mask_head, int64_t mask_row, int64_t batch, int64_t length, int64_t heads, int64_t kv_heads,
         int64_t dim, float scale, int dtype, bool causal, uintptr_t workspace, size_t workspace_bytes,
         uintptr_t stream) {
        const Attention problem{pointer<void>(qkv),
                                pointer<float>(cosine),
                                pointer<float>(sine),
                                pointer<void>(mask),
                                pointer<void>(y),
                                mask_batch,
                                mask_head,
                                mask_row,
                                batch,
                                length,
                                heads,
                                kv_heads,
                                dim,
                                scale,
                                static_cast<DType>(dtype),
                                causal};
        bindings::run([&] {
          return attention(problem, pointer<void>(workspace), workspace_bytes, pointer<CUstream_st>(stream));
        });
      },
      "qkv"_a, "cosine"_a, "sine"_a, "mask"_a, "y"_a, "mask_batch"_a, "mask_head"_a, "mask_row"_a, "batch"_a,
      "length"_a, "heads"_a, "kv_heads"_a, "dim"_a, "scale"_a, "dtype"_a, "causal"_a, "workspace"_a,
      "workspace_bytes"_a, "stream"_a);
}
