"""The operators on the CPU: the same bits as on CUDA, with csrc/cpu/ around torch's integer matmul."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from hwkern import _native
from hwkern._checks import (
    CHOOSE,
    DTYPES,
    check_float,
    check_int8,
    check_k,
    check_linear,
    check_matmul,
    check_out_dtype,
    check_static_scale,
)
from hwkern._tensors import contiguous, dtype_code, pointer, rows
from hwkern.reference import QMAX, expand_scale

_C = _native.extension()

# Partial sums of this many products are exact in float32: 127² · 1040 < 2²⁴.
_EXACT_K = 1040

# What a thread must get for waking it to pay: 10 µs of work or more.
_THREAD_ELEMENTS = 2**15


@functools.cache
def int8_is_fast() -> bool:
    """Whether ``torch._int_mm`` is exact on this CPU, seen by running it once on the values that saturate elsewhere.

    CPUs with VNNI or AMX accumulate int8 products in int32. On others torch (2.13) adds pairs of products in 16 bits,
    which saturates silently; there hwkern multiplies in float32, exact but no faster than a float32 layer.
    """
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 16, 32), (5, 40, 96), (33, 64, 1040), (64, 256, 512)):
        a = torch.full((m, k), QMAX, dtype=torch.int8)
        b = torch.randint(-QMAX, QMAX + 1, (n, k), dtype=torch.int8, generator=generator)
        b[::2] = QMAX
        for left in (a, -a):
            if not torch.equal(torch._int_mm(left, b.t()), float_matmul(left, b)):
                return False
    return True


def float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact int32 product through float32 over chunks of K."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    for start in range(0, a.shape[1], _EXACT_K):
        chunk = slice(start, start + _EXACT_K)
        total += (a[:, chunk].float() @ b[:, chunk].float().t()).to(torch.int32)
    return total


def integer_matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a [M, K] @ b [N, K].T`` as exact int32 sums into ``out [M, N]``."""
    # NOTE: torch._int_mm is wrong for K = 1 on every CPU (torch 2.13).
    if a.shape[1] > 1 and int8_is_fast():
        torch._int_mm(a, b.t(), out=out)
    else:
        out.copy_(float_matmul(a, b))


def _threads(elements: int) -> int:
    """How many threads a pass over so many elements is worth, up to torch's number."""
    return 1 if elements < 2 * _THREAD_ELEMENTS else min(torch.get_num_threads(), elements // _THREAD_ELEMENTS)


def _quantize_rows(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """``x [..., K]`` of M rows into ``q [M, columns]``, zeros from K on, and ``scale [M]``; none of the sizes is 0."""
    m, columns = q.shape
    x, ldx = rows(x)
    k = x.shape[-1]
    _C.cpu_quantize_rows(
        x.data_ptr(), DTYPES[x.dtype], ldx, m, k, q.data_ptr(), columns, scale.data_ptr(), _threads(m * k)
    )


def _scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None, y: Tensor
) -> None:
    """``((sum * scale_a) * scale_b) + bias`` of ``a [M, K]`` and ``b [N, K]``, rounded once into ``y [..., N]``."""
    m, n = a.shape[0], b.shape[0]
    if y.dtype is torch.float32:  # the results replace the sums in place: half the memory to touch
        total = y.view(torch.int32)
        if total.dim() != 2:
            total = total.view(m, n)
    else:
        total = torch.empty((m, n), dtype=torch.int32)
    integer_matmul(a, b, total)
    scale_a, scale_b, bias = contiguous(scale_a), contiguous(scale_b), contiguous(bias)
    _C.cpu_rescale(
        total.data_ptr(), pointer(scale_a), pointer(scale_b), pointer(bias), dtype_code(bias),
        y.data_ptr(), DTYPES[y.dtype], m, n, _threads(m * n),
    )  # fmt: skip


# Of whole float32 tensors, each in a tensor of its own.
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),  # F.gelu (torch 2.13) gives NaN for inf
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def _apply_options(y: Tensor, activation: str, residual: Tensor | None) -> None:
    """activation and residual on the float32 ``y``, in place. Activations by torch: within 4 ulp of the GPU's."""
    if activation != "none":
        y.copy_(TORCH_ACTIVATIONS[activation](y))
    if residual is not None:
        y += residual  # to float32 is exact


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    check_float(x)
    k = x.shape[-1]
    check_k(k)
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32)
    if q.numel():
        _quantize_rows(x, q.view(-1, k), scale)
    return q, scale


def quantize_static(x: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    check_float(x)
    check_static_scale(x, scale, axis)
    q = (x.float() * expand_scale(scale.reciprocal(), x, axis)).round_().clamp_(-QMAX, QMAX).nan_to_num_(nan=0.0)
    return q.to(torch.int8).reshape(x.shape).contiguous()


def dequantize(q: Tensor, scale: Tensor, axis: int = 0, out_dtype: torch.dtype | None = None) -> Tensor:
    check_int8("q", q)
    check_static_scale(q, scale, axis)
    dtype = out_dtype or torch.float32
    check_out_dtype(dtype)
    return (q.float() * expand_scale(scale, q, axis)).to(dtype).reshape(q.shape).contiguous()


def matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    dtype = check_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, out_scale)
    with_options = activation != "none" or residual is not None or out_scale is not None
    y = torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.float32 if with_options else dtype)
    if y.numel() == 0:
        return y.to(dtype)
    a = a.reshape(-1, a.shape[-1])
    if dtype == torch.int32:
        integer_matmul(a, b, y.view(a.shape[0], b.shape[0]))
    else:
        _scaled_matmul(a, b, scale_a, scale_b, bias, y)
    if with_options:
        _apply_options(y, activation, residual)
    return y.to(dtype) if out_scale is None else quantize_static(y, out_scale.reshape(1))


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    dtype = check_linear(x, weight, weight_scale, bias, out_dtype, activation, residual)
    if activation == "none" and residual is None:
        return linear_unchecked(x, weight, weight_scale, bias, dtype)
    y = linear_unchecked(x, weight, weight_scale, bias, torch.float32)
    _apply_options(y, activation, residual)
    return y.to(dtype)


def linear_unchecked(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`linear` for arguments that ``check_linear`` would pass, in as few torch calls as possible."""
    *leading, _ = x.shape
    n, columns = weight.shape
    # new_empty without a dtype: half the cost of torch.empty with one.
    y = x.new_empty((*leading, n)) if dtype is x.dtype else x.new_empty((*leading, n), dtype=dtype)
    if y.numel():
        m = math.prod(leading)
        q, scale = weight.new_empty((m, columns)), weight_scale.new_empty(m)
        _quantize_rows(x, q, scale)
        _scaled_matmul(q, weight, scale, weight_scale, bias, y)
    return y
