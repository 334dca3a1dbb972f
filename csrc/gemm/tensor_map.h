// Tensor maps: what the copy engine (TMA) is told of a matrix.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/status.h"

namespace hwkern {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, without linking libcuda; null when the driver does not have it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer)
                                                                         : nullptr;
  }();
  return function;
}

constexpr Status kNoTensorMaps{StatusCode::kUnsupportedDevice,
                               "gemm: the driver has no tensor maps; CUDA 12.0's driver or newer is needed"};
constexpr Status kTensorMapRefused = invalid("gemm: the driver refused a tensor map for these sizes and strides");

// A row-major matrix in boxes of `box_rows` rows × `box_bytes` (64 or 128), swizzled over that width.
inline bool make_map(CUtensorMap* map, CUtensorMapDataType type, int64_t element, const void* matrix, int64_t rows,
                     int64_t columns, int64_t ld, int box_rows, int box_bytes) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(ld * element)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes / element), static_cast<cuuint32_t>(box_rows)},
                   steps[] = {1, 1};
  return encode_tiled()(map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A matrix from row `first` on in boxes of some rows: `whole` ones, and the `last`, which ends with the matrix and may be
// all there is.
struct Boxes {
  CUtensorMap whole, last;
};

// NOTE: a box that reaches over the end would do (what is outside arrives as zeros), but the copy engine takes longer for
// a row outside than for one inside. What a short box leaves in shared memory of an earlier one only gives sums that
// nobody stores.
inline bool make_boxes(Boxes* boxes, const void* matrix, int64_t rows, int64_t columns, int64_t ld, int box_rows,
                       int64_t first = 0) {
  rows -= first;
  const int64_t left = rows - (ceil_div(rows, box_rows) - 1) * box_rows;
  auto make = [&](CUtensorMap* map, int64_t height) {
    return make_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, matrix, first + rows, columns, ld, static_cast<int>(height),
                    128);
  };
  if (!make(&boxes->last, left)) return false;
  boxes->whole = boxes->last;
  return rows <= box_rows || left == box_rows || make(&boxes->whole, box_rows);
}

}  // namespace hwkern
