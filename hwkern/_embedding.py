"""Embedding lookup in an int8 table: ``torch.ops.hwkern.int8_embedding``, rows of ``weight * weight_scale``.

The table has the layout of an int8 linear's weight (``[V, H16]``, one scale a row), so an output head that shares its
weight with the embedding shares the int8 tensor and the scales as well. On CUDA one kernel (csrc/quant/embedding.cu),
on the CPU csrc/cpu/embedding.cpp; both give the bits of ``reference.int8_embedding``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, register_fake

from hwkern import _native
from hwkern._autograd import without_gradient
from hwkern._checks import (
    DTYPES,
    FLOATS,
    ROW_ALIGNMENT,
    check,
    check_int8,
    check_k,
    check_out_dtype,
    check_same_device,
    check_scale,
    padded,
)
from hwkern._cpu import _threads
from hwkern._cuda import current_device, current_stream, extension, on_device
from hwkern._no_grad import IN_CPP, embedding_no_grad, implement
from hwkern._tracing import compiles_inference, dispatch_modes, functorch_level, profiling, tracing_state

_C = _native.extension()

is_grad_enabled = torch.is_grad_enabled  # bound once: it runs on every call of every layer

_lib = Library("hwkern", "FRAGMENT")
_lib.define(
    "int8_embedding(Tensor indices, Tensor weight, Tensor weight_scale, ScalarType? out_dtype=None, int? dim=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def int8_embedding(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> Tensor:
    """``(weight * weight_scale[:, None])[indices]``, a product in float32 and one rounding to ``out_dtype``.

    Args:
        indices: int64 or int32, any shape.
        weight: ``[V, H16]`` int8 from :func:`hwkern.ops.pad_weight`, as for ``int8_linear``.
        weight_scale: ``[V]`` float32.
        out_dtype: float32 (default), float16 or bfloat16.
        dim: H, where the rows are padded; by default they are not.

    Returns:
        ``[*indices.shape, H]``.

    An index outside of 0 … V - 1 is an IndexError on the CPU, and on CUDA a device-side assertion, as in
    ``torch.nn.functional.embedding``. Has no gradient, because the table is frozen: backward to ``weight_scale`` is a
    NotImplementedError.
    """
    found: Tensor = without_gradient(
        torch.ops.hwkern.int8_embedding.default, indices, weight, weight_scale, out_dtype, dim
    )
    return found


def _check(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype | None, dim: int | None
) -> tuple[torch.dtype, int]:
    """The output's dtype and H."""
    check(
        indices.dtype in (torch.int64, torch.int32),
        lambda: f"indices are {indices.dtype}: they must be int64 or int32.",
        TypeError,
    )
    check_int8("weight", weight)
    check(weight.dim() == 2, lambda: f"weight has shape {tuple(weight.shape)}: it must be [V, H16].")
    columns = weight.shape[1]
    k = columns if dim is None else dim
    check_k(k)
    check(
        padded(k) == columns,
        lambda: (
            f"rows of {k} elements need a weight of {padded(k)} columns (rounded up to 16), but it has {columns}: pass "
            "dim=, or pack the weight with hwkern.ops.pad_weight."
        ),
    )
    check_same_device(indices=indices, weight=weight, weight_scale=weight_scale)
    check_scale(weight_scale, weight.shape[:1], "weight_scale")
    dtype = out_dtype or torch.float32
    check_out_dtype(dtype)
    return dtype, k


@register_fake("hwkern::int8_embedding")
def _fake(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> Tensor:
    dtype, k = _check(indices, weight, weight_scale, out_dtype, dim)
    return weight.new_empty((*indices.shape, k), dtype=dtype)


def _packed(weight: Tensor) -> Tensor:
    """``weight`` as the kernels read it: itself, or a copy."""
    if weight.is_contiguous() and weight.data_ptr() % ROW_ALIGNMENT == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


@on_device
def _cuda(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> Tensor:
    dtype, k = _check(indices, weight, weight_scale, out_dtype, dim)
    y = torch.empty((*indices.shape, k), dtype=dtype, device=weight.device)
    if y.numel():
        indices, weight, weight_scale = indices.contiguous(), _packed(weight), weight_scale.contiguous()
        _launch(indices, weight, weight_scale, y, k)
    return y


def _launch(indices: Tensor, weight: Tensor, weight_scale: Tensor, y: Tensor, k: int) -> None:
    n, columns = weight.shape
    extension().embedding(
        indices.data_ptr(), indices.dtype is torch.int64, weight.data_ptr(), columns, weight_scale.data_ptr(),
        y.data_ptr(), DTYPES[y.dtype], k, indices.numel(), n, k, current_stream(y.get_device()),
    )  # fmt: skip


def _cpu(
    indices: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> Tensor:
    dtype, k = _check(indices, weight, weight_scale, out_dtype, dim)
    y = torch.empty((*indices.shape, k), dtype=dtype)
    if y.numel():
        indices, weight, weight_scale = indices.contiguous(), _packed(weight), weight_scale.contiguous()
        n, columns = weight.shape
        m = indices.numel()
        try:
            _C.cpu_embedding(
                indices.data_ptr(), indices.dtype is torch.int64, weight.data_ptr(), columns, weight_scale.data_ptr(),
                y.data_ptr(), DTYPES[dtype], k, m, n, k, _threads(m * k),
            )  # fmt: skip
        except ValueError as error:
            _raise_outside(indices, n, error)
    return y


def _raise_outside(indices: Tensor, n: int, error: Exception) -> None:
    bad = indices[(indices < 0) | (indices >= n)]
    if bad.numel() == 0:
        raise error
    raise IndexError(
        f"The index {int(bad.flatten()[0])} is outside of this embedding: it has the rows 0 … {n - 1}."
    ) from None


_lib.impl("int8_embedding", _cuda, "CUDA")
_lib.impl("int8_embedding", _cpu, "CPU")

_dtype_of = {code: dtype for dtype, code in DTYPES.items()}


def _no_grad(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator of inference, of the public one's implementation: it is told the dtype as hwkern.h's number."""

    def embedding(indices: Tensor, dim: int, weight: Tensor, weight_scale: Tensor, dtype: int) -> Tensor:
        return call(indices, weight, weight_scale, _dtype_of[dtype], dim)

    return embedding


implement(
    "embedding_no_grad",
    _no_grad(_fake),
    _no_grad(_cpu),
    _no_grad(_cuda.__wrapped__),  # type: ignore[attr-defined]
)


# ---- the module's call ---------------------------------------------------------------------------------------------


class TableCell:
    """What a lookup needs of one layer's table and scales, read once and good while they stay where they are."""

    __slots__ = ("columns", "device", "empty", "n", "native", "scale", "weight")

    def __init__(self) -> None:
        self.weight = self.scale = -1  # addresses
        self.n = self.columns = 0
        self.device = -2  # -1: the CPU
        self.native: Any = None
        # Of the output's dtype, where the table is: new_empty of it takes half of what torch.empty does.
        self.empty = torch.empty(0, device="meta")

    def __reduce__(self) -> tuple[type[TableCell], tuple[()]]:
        return TableCell, ()  # a copy of the layer has other addresses

    def read(self, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, k: int) -> bool:
        """False where the kernels cannot take the tensors as they are, or the operator would object."""
        n, columns = weight.shape
        device = weight.get_device()
        ready = (
            weight.dtype is torch.int8
            and weight_scale.dtype is torch.float32
            and tuple(weight_scale.shape) == (n,)
            and (weight.is_cuda or weight.is_cpu)
            and weight_scale.get_device() == device
            and weight_scale.device.type == weight.device.type
            and weight.is_contiguous()
            and weight_scale.is_contiguous()
            and weight.data_ptr() % ROW_ALIGNMENT == 0
            and columns == padded(k)
        )
        if ready:
            self.weight, self.scale = weight.data_ptr(), weight_scale.data_ptr()
            self.n, self.columns, self.device = n, columns, device
            self.native = _C if weight.is_cpu else extension()
            self.empty = torch.empty(0, dtype=dtype, device=weight.device)
        return ready


def _takes_cpp(indices: Tensor) -> bool:
    """Whether a lookup that nobody needs to see goes to the C++ operator."""
    return IN_CPP and indices.is_cuda and not is_grad_enabled()


def eager_embedding(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, k: int, cell: TableCell
) -> Tensor:
    """:func:`int8_embedding` for ``Int8Embedding.forward``: around it where nobody needs to see it."""
    if (
        # as ops._is_plain
        not is_compiling()
        and type(indices) is Tensor
        and dispatch_modes() == 0
        and functorch_level() is None
        and tracing_state() is None
        and not profiling()
        and dtype in FLOATS
    ):
        if _takes_cpp(indices):
            try:
                return embedding_no_grad(indices, k, weight, weight_scale, DTYPES[dtype])
            except (ValueError, RuntimeError):  # the operator at the end speaks in torch's errors and in sentences
                pass
        elif (y := _from_cell(indices, weight, weight_scale, dtype, k, cell)) is not None:
            return y
    if compiles_inference(indices) and dtype in FLOATS:
        return embedding_no_grad(indices, k, weight, weight_scale, DTYPES[dtype])
    return torch.ops.hwkern.int8_embedding.default(indices, weight, weight_scale, dtype, k)


def _from_cell(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, k: int, cell: TableCell
) -> Tensor | None:
    """The rows by way of ``cell``; None where its kernel cannot take the tensors as they are."""
    if (
        ((wide := indices.dtype is torch.int64) or indices.dtype is torch.int32)
        and (m := indices.numel())
        and indices.is_contiguous()
        and (
            (
                cell.weight == weight.data_ptr()
                and cell.scale == weight_scale.data_ptr()
                and cell.n == weight.shape[0]
                and cell.empty.dtype is dtype
            )
            or cell.read(weight, weight_scale, dtype, k)
        )
        and indices.get_device() == (device := cell.device)
    ):
        if device >= 0 and device == current_device():
            y = cell.empty.new_empty((*indices.shape, k))
            cell.native.embedding(
                indices.data_ptr(), wide, cell.weight, cell.columns, cell.scale, y.data_ptr(), DTYPES[dtype], k,
                m, cell.n, k, current_stream(device),
            )  # fmt: skip
            return y
        if device < 0 and indices.is_cpu:
            y = cell.empty.new_empty((*indices.shape, k))
            try:
                cell.native.cpu_embedding(
                    indices.data_ptr(), wide, cell.weight, cell.columns, cell.scale, y.data_ptr(), DTYPES[dtype], k,
                    m, cell.n, k, _threads(m * k),
                )  # fmt: skip
            except ValueError as error:
                _raise_outside(indices, cell.n, error)
            return y
    return None
