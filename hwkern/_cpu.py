"""The operators on the CPU: the same bits as on CUDA, on top of torch's integer matmul."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hwkern._checks import (
    CHOOSE,
    check_float,
    check_int8,
    check_k,
    check_linear,
    check_matmul,
    check_out_dtype,
    check_static_scale,
)
from hwkern.reference import QMAX, SCALE_MIN, expand_scale

# Partial sums of this many products are exact in float32: 127² · 1040 < 2²⁴.
_EXACT_K = 1040


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


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [M, K] @ b [N, K].T`` as an exact int32 ``[M, N]`` on the CPU."""
    # NOTE: torch._int_mm is wrong for K = 1 on every CPU (torch 2.13).
    if a.shape[1] > 1 and int8_is_fast():
        return torch._int_mm(a, b.t())
    return float_matmul(a, b)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Row ranges of about 2¹⁶ elements a thread, so that several passes over one range stay in the L2 cache."""
    step = max(1, (torch.get_num_threads() << 16) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _quantize_rows(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` to ``q [M, columns]``, zeros from K on, and ``scale [M]``."""
    m, k = x.shape
    q = torch.empty(m, columns, dtype=torch.int8)
    q[:, k:] = 0
    scale = torch.empty(m)
    for rows in _row_blocks(m, k):
        block = x[rows].float()
        # Two reductions: aminmax along a dimension is not vectorised (25 times slower, torch 2.13), and |x| is a pass.
        absmax = torch.maximum(block.amax(-1), block.amin(-1).neg_())
        torch.div(absmax, torch.full_like(absmax, QMAX), out=absmax)
        torch.clamp_min(absmax, SCALE_MIN, out=scale[rows])
        scaled = (block * scale[rows].reciprocal().unsqueeze(-1)).round_().clamp_(-QMAX, QMAX)
        finite = absmax.isfinite()
        if not finite.all():
            scale[rows].masked_fill_(~finite, torch.nan)
            scaled.masked_fill_(~finite.unsqueeze(-1), 0.0)
        q[rows, :k] = scaled
    return q, scale


def _rescale(
    total: Tensor, scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The shared epilogue of hwkern.h on ``total [M, N]``: ``((sum * scale_m) * scale_n) + bias``, rounded once."""
    out = torch.empty(total.shape, dtype=dtype)
    bias = None if bias is None else bias.float()
    for rows in _row_blocks(*total.shape):
        y = total[rows].float()
        if scale_a is not None:
            y.mul_(scale_a[rows].unsqueeze(-1))
        if scale_b is not None:
            y.mul_(scale_b)
        if bias is not None:
            y.add_(bias)
        out[rows] = y
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    check_float(x)
    check_k(x.shape[-1])
    q, scale = _quantize_rows(x.reshape(-1, x.shape[-1]), x.shape[-1])
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


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
) -> Tensor:
    dtype = check_matmul(a, b, scale_a, scale_b, bias, out_dtype)
    shape = (*a.shape[:-1], b.shape[0])
    if a.numel() == 0 or b.shape[0] == 0:
        return torch.empty(shape, dtype=dtype)
    total = integer_matmul(a.reshape(-1, a.shape[-1]), b)
    if dtype != torch.int32:
        scale_a = None if scale_a is None else scale_a.reshape(-1)
        total = _rescale(total, scale_a, scale_b, bias, dtype)
    return total.reshape(shape)


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
) -> Tensor:
    dtype = check_linear(x, weight, weight_scale, bias, out_dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    if x.numel() == 0 or weight.shape[0] == 0:
        return torch.empty(shape, dtype=dtype)
    k = x.shape[-1]
    q, scale = _quantize_rows(x.reshape(-1, k), weight.shape[1])
    return _rescale(integer_matmul(q, weight), scale, weight_scale, bias, dtype).reshape(shape)
