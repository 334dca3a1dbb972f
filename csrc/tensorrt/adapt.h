// NVIDIA's types to ours; the same text compiles against the headers of TensorRT 8.6 and of 10 and newer.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>

#include "tensorrt/log.h"
#include "tensorrt/op.h"

namespace hwkern::trt {

inline DType to_dtype(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: return DType::kFloat32;
    case nvinfer1::DataType::kHALF: return DType::kFloat16;
    case nvinfer1::DataType::kINT8: return DType::kInt8;
    case nvinfer1::DataType::kINT32: return DType::kInt32;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::DataType::kBF16: return DType::kBFloat16;
#endif
    default: return kOtherType;
  }
}

inline nvinfer1::DataType from_dtype(DType type) {
  switch (type) {
    case DType::kFloat16: return nvinfer1::DataType::kHALF;
    case DType::kInt8: return nvinfer1::DataType::kINT8;
    case DType::kInt32: return nvinfer1::DataType::kINT32;
#if NV_TENSORRT_MAJOR >= 10
    case DType::kBFloat16: return nvinfer1::DataType::kBF16;
#endif
    default: return nvinfer1::DataType::kFLOAT;
  }
}

inline Tensor to_tensor(const nvinfer1::Dims& dims, nvinfer1::DataType type) {
  Tensor tensor{to_dtype(type), dims.nbDims < 0 ? 0 : dims.nbDims, {}};
  for (int i = 0; i < tensor.rank && i < kMaxRank; ++i) tensor.dims[i] = dims.d[i];
  return tensor;
}

inline Tensor to_tensor(const nvinfer1::PluginTensorDesc& t) { return to_tensor(t.dims, t.type); }
inline Tensor to_tensor(const nvinfer1::DynamicPluginTensorDesc& t) { return to_tensor(t.desc.dims, t.desc.type); }

// check() and enqueue() on the arrays that TensorRT passes. At most kMaxInputs are looked at: check() has compared the
// count before enqueue() comes.
template <class Desc>
bool check(const Op& op, const Desc* inputs, int count) {
  Tensor tensors[kMaxInputs] = {};
  for (int i = 0; i < count && i < kMaxInputs; ++i) tensors[i] = to_tensor(inputs[i]);
  return check(op, tensors, count);
}

inline bool enqueue(const Op& op, int32_t tactic, const nvinfer1::PluginTensorDesc* descs, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) {
  Tensor tensors[kMaxInputs] = {};
  for (int i = 0; i < input_count(op); ++i) tensors[i] = to_tensor(descs[i]);
  return enqueue(op, tactic, tensors, inputs, outputs, workspace, stream);
}

// Whether TensorRT may hand over tensor `index` as described; `desc(i)` gives the i-th description.
template <class GetDesc>
bool supports(const Op& op, int index, int inputs, const GetDesc& desc) {
  if (inputs != input_count(op) || index < 0 || index >= kMaxInputs + kMaxOutputs) return false;
  if (desc(index).format != nvinfer1::TensorFormat::kLINEAR) return false;
  DType types[kMaxInputs + kMaxOutputs];
  for (int i = 0; i <= index; ++i) types[i] = to_dtype(desc(i).type);
  return supports(op, index, types);
}

// The expressions of x's dimensions themselves. Of TensorRT only IExprBuilder::constant() is called, for Attention: the
// first method of that interface from 8.6 to 11.1.
inline bool output_shape(const Op& op, int output, const nvinfer1::DimsExprs* inputs, int count,
                         nvinfer1::IExprBuilder& builder, nvinfer1::DimsExprs* shape) {
  if (!check_count(op, count)) return false;
  const nvinfer1::DimsExprs& x = inputs[0];
  if (x.nbDims < 1) return refuse("%s: x needs at least one dimension, [..., K]", name(op.kind));
  *shape = x;
  const LastDimension last = last_dimension(op, output);
  if (last == LastDimension::kN) shape->d[x.nbDims - 1] = inputs[position(op, Input::kWeight)].d[0];
  if (last == LastDimension::kHeads) shape->d[x.nbDims - 1] = builder.constant(op.heads * op.head_dim);
  if (last == LastDimension::kNone) --shape->nbDims;
  return true;
}

inline FieldType to_field_type(nvinfer1::PluginFieldType type) {
  switch (type) {
    case nvinfer1::PluginFieldType::kINT32: return FieldType::kInt32;
    case nvinfer1::PluginFieldType::kFLOAT32: return FieldType::kFloat32;
    case nvinfer1::PluginFieldType::kCHAR: return FieldType::kText;
#if NV_TENSORRT_MAJOR >= 10
    case nvinfer1::PluginFieldType::kINT64: return FieldType::kInt64;
#endif
    default: return FieldType::kOther;
  }
}

constexpr int kMaxFields = 32;

inline bool parse(Kind kind, const nvinfer1::PluginFieldCollection* collection, Op* op) {
  Field fields[kMaxFields];
  const int count = collection ? collection->nbFields : 0;
  if (count < 0 || count > kMaxFields || (count > 0 && !collection->fields)) return parse(kind, nullptr, -1, op);
  for (int i = 0; i < count; ++i) {
    const nvinfer1::PluginField& f = collection->fields[i];
    fields[i] = {f.name, f.data, to_field_type(f.type), f.length};
  }
  return parse(kind, fields, count, op);
}

// What a creator tells of its fields; one object per kind, alive as long as the library.
struct FieldNames {
  nvinfer1::PluginField fields[kMaxFields];
  nvinfer1::PluginFieldCollection collection{0, fields};
  explicit FieldNames(Kind kind) {
    for (FieldName f = field_name(kind, 0); f.name; f = field_name(kind, collection.nbFields))
      fields[collection.nbFields++] = {f.name, nullptr,
                                       f.type == FieldType::kText      ? nvinfer1::PluginFieldType::kCHAR
                                       : f.type == FieldType::kFloat32 ? nvinfer1::PluginFieldType::kFLOAT32
                                                                       : nvinfer1::PluginFieldType::kINT32,
                                       1};
  }
  FieldNames(const FieldNames&) = delete;
  FieldNames& operator=(const FieldNames&) = delete;
};

}  // namespace hwkern::trt
