"""Arrays of any library as pointers: torch, CuPy, pycuda, numba, numpy, and whatever speaks DLPack."""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: dtype names that engines use → bytes per element.
ITEM_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1,
}  # fmt: skip

_CUDA_DEVICES = (2, 13)  # DLPack: kDLCUDA, kDLCUDAManaged


@dataclass
class Array:
    """A dense array in memory. ``owner`` keeps it alive."""

    kind: str  # "numpy", "torch", "cupy", "pycuda" or "device" (anything else on the GPU)
    pointer: int
    shape: tuple[int, ...]
    dtype: str
    on_device: bool
    owner: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 8)


def describe(name: str, value: Any, dtype: str) -> Array:
    """``value`` as an :class:`Array` of ``dtype``.

    int64 indices become int32 where the engine wants that (TensorRT 8.6) and the reverse, and bool goes as uint8 or
    int8; every other difference of type is an error, because it would be a silent loss.

    Raises:
        TypeError: no array, or of another dtype.
        ValueError: an array with gaps, where only the caller can copy it.
    """
    if _is_torch(value):
        return _torch(name, value, dtype)
    if isinstance(value, (np.ndarray, np.generic, bool, int, float, list, tuple)):
        return _numpy(name, np.asarray(value), dtype)
    if hasattr(value, "__cuda_array_interface__"):
        return _cuda_array(name, value, dtype)
    if hasattr(value, "__dlpack__"):
        return _dlpack(name, value, dtype)
    if hasattr(value, "__array__"):
        return _numpy(name, np.asarray(value), dtype)
    raise TypeError(
        f"{name} is a {type(value).__name__}: a Runner takes torch tensors, numpy, CuPy and pycuda arrays, and what "
        "has __cuda_array_interface__ or __dlpack__."
    )


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _other_dtype(name: str, has: str, wants: str) -> TypeError:
    return TypeError(f"{name} is {has}, but the engine takes {wants}: convert it first.")


def _narrows(has: str, wants: str) -> bool:
    return (has, wants) in {("int64", "int32"), ("int32", "int64"), ("bool", "uint8"), ("bool", "int8")}


def _torch(name: str, value: Any, dtype: str) -> Array:
    import torch

    has = str(value.dtype).removeprefix("torch.")
    if has != dtype:
        if not _narrows(has, dtype):
            raise _other_dtype(name, has, dtype)
        value = value.to(getattr(torch, dtype))
    value = value.detach().contiguous()
    if value.is_cuda:
        return Array("torch", value.data_ptr(), tuple(value.shape), dtype, True, value)
    if value.device.type != "cpu":
        raise TypeError(f"{name} is on {value.device}: a Runner takes CUDA and CPU tensors.")
    return Array("torch", value.data_ptr(), tuple(value.shape), dtype, False, value)


@functools.cache
def _name(dtype: np.dtype[Any]) -> str:
    """dtype.name, which numpy puts together anew each time (5 µs)."""
    return dtype.name


def _numpy(name: str, value: NDArray[Any], dtype: str) -> Array:
    has = _name(value.dtype)
    if has != dtype:
        if has == "float64" and value.ndim == 0 and dtype.startswith("float"):
            pass  # a Python number
        elif not _narrows(has, dtype):
            raise _other_dtype(name, has, dtype)
        value = value.astype(dtype)
    value = np.ascontiguousarray(value).reshape(value.shape)
    return Array("numpy", value.ctypes.data, value.shape, dtype, False, value)


def _cuda_array(name: str, value: Any, dtype: str) -> Array:
    kind = _kind(value)
    has = np.dtype(value.__cuda_array_interface__["typestr"]).name
    if has != dtype:
        # CuPy and pycuda know astype; bfloat16 comes as two anonymous bytes.
        if _narrows(has, dtype) and hasattr(value, "astype"):
            value = value.astype(dtype)
        elif not (dtype == "bfloat16" and has in ("uint16", "int16", "void16")):
            raise _other_dtype(name, has, dtype)
    interface = value.__cuda_array_interface__
    shape, item = tuple(interface["shape"]), ITEM_BYTES[dtype]
    strides = interface.get("strides")
    if strides is not None and not _is_dense(shape, [s // item for s in strides]):
        if kind != "cupy":
            raise ValueError(f"{name} has gaps between its elements (strides {strides}): pass a contiguous array.")
        cupy: Any = sys.modules["cupy"]
        return _cuda_array(name, cupy.ascontiguousarray(value), dtype)
    pointer = interface["data"][0] or 0
    return Array(kind, int(pointer), shape, dtype, True, value)


def _kind(value: Any) -> str:
    module = type(value).__module__.partition(".")[0]
    return module if module in ("cupy", "pycuda") else "device"


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DL_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


def _dlpack(name: str, value: Any, dtype: str) -> Array:
    # The capsule is not consumed: it frees the tensor when it goes, and `owner` keeps it.
    capsule = value.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _DLTensor.from_address(get(capsule, b"dltensor"))
    code = _DL_CODES.get(tensor.code, f"type {tensor.code} of ")
    has = "bool" if code == "bool" else f"{code}{tensor.bits}"
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides and not _is_dense(shape, [tensor.strides[i] for i in range(tensor.ndim)]):
        raise ValueError(f"{name} has gaps between its elements: pass a contiguous array.")
    if tensor.device_type not in _CUDA_DEVICES:
        return _numpy(name, np.from_dlpack(value), dtype)
    if has != dtype:
        raise _other_dtype(name, has, dtype)
    pointer = int(tensor.data or 0) + tensor.byte_offset
    return Array("device", pointer, shape, dtype, True, (capsule, value))


# ---- outputs -------------------------------------------------------------------------------------------------------


class DeviceArray:
    """A result on the GPU for callers whose library is not known; ``__cuda_array_interface__`` (version 3)."""

    def __init__(self, shape: tuple[int, ...], dtype: str, buffer: Any) -> None:
        self.shape, self.dtype, self._buffer = shape, dtype, buffer
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": numpy_dtype(dtype).str,
            "data": (buffer.pointer, False),
            "strides": None,
            "version": 3,
        }

    def __del__(self) -> None:
        self._buffer.release()


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype; bfloat16 is ml_dtypes' where that is installed, else its bits as uint16."""
    if dtype != "bfloat16":
        return np.dtype(dtype)
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(np.uint16)
    return np.dtype(ml_dtypes.bfloat16)


def new_device_array(kind: str, like: Any, shape: tuple[int, ...], dtype: str, allocate: Any) -> Array:
    """An uninitialised array on the GPU of the same library as an input (``like``, of ``kind``)."""
    made: Any
    if kind == "torch":
        import torch

        made = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device if like.is_cuda else "cuda")
        return Array(kind, made.data_ptr(), shape, dtype, True, made)
    if kind == "cupy":
        cupy: Any = sys.modules["cupy"]
        made = cupy.empty(shape, numpy_dtype(dtype))
        return Array(kind, made.data.ptr, shape, dtype, True, made)
    if kind == "pycuda":
        from pycuda.gpuarray import empty

        made = empty(shape, numpy_dtype(dtype))
        return Array(kind, int(made.gpudata), shape, dtype, True, made)
    made = DeviceArray(shape, dtype, allocate(math.prod(shape) * ITEM_BYTES[dtype]))
    return Array("device", made.__cuda_array_interface__["data"][0], shape, dtype, True, made)
