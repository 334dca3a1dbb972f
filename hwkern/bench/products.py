"""Peers of one GEMM, D [M, N] in bfloat16 unless its name says otherwise, each with ``sets`` buffer sets.

bf16, fp16, fp32   torch.mm (cuBLAS), the paths that int8 replaces; fp32 without TF32
int_mm             torch._int_mm (cuBLAS INT8): the raw int32 sum only, no scales, no 16-bit output
fp8                torch._scaled_mm with row-wise scales
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hwkern import _timing, hardware
from hwkern._timing import Call
from hwkern.bench.models import AbsentError

Operands = Sequence[tuple[Tensor, Tensor]]  # (a [M, K], b [N, K]) per buffer set


class Problem:
    """One shape with its buffers, made once and shared by the peers that can."""

    def __init__(self, m: int, n: int, k: int, gpu: hardware.Gpu) -> None:
        self.m, self.n, self.k, self.gpu = m, n, k, gpu

    @functools.cached_property
    def bytes(self) -> Operands:
        """int8 operands."""
        m, n, k = self.m, self.n, self.k
        sets = _timing.rotations(m * k + n * k + 2 * m * n, self.gpu.l2_bytes)
        random = functools.partial(_timing.random_int8, device="cuda")
        return [(random(m, k), random(n, k)) for _ in range(sets)]

    @functools.cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """float32 [M] and [N]."""
        scale_m, scale_n = (torch.rand(size, device="cuda") + 0.5 for size in (self.m, self.n))
        return scale_m, scale_n

    def floats(self, dtype: torch.dtype) -> Operands:
        """Gaussian operands."""
        m, n, k = self.m, self.n, self.k
        sets = _timing.rotations(dtype.itemsize * (m * k + n * k) + 2 * m * n, self.gpu.l2_bytes)
        random = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        return [(random(m, k).to(dtype), random(n, k).to(dtype)) for _ in range(sets)]


def floating(dtype: torch.dtype, problem: Problem) -> list[Call]:
    """cuBLAS in one float type."""
    return [functools.partial(torch.mm, a, b.t()) for a, b in problem.floats(dtype)]


def int_mm(problem: Problem) -> list[Call]:
    """cuBLAS INT8 as torch offers it."""
    if problem.m <= 16 or problem.k % 8 or problem.n % 8:
        raise AbsentError("torch._int_mm takes M > 16 and K and N in multiples of 8 only")
    return [functools.partial(torch._int_mm, a, b.t()) for a, b in problem.bytes]


def fp8(problem: Problem) -> list[Call]:
    """FP8 with row-wise scales."""
    if problem.gpu.compute < 89:
        raise AbsentError("FP8 needs compute capability 8.9")
    if problem.k % 16 or problem.n % 16:
        raise AbsentError("torch._scaled_mm takes K and N in multiples of 16 only")
    ones_m, ones_n = torch.ones(problem.m, 1, device="cuda"), torch.ones(1, problem.n, device="cuda")
    options: dict[str, Any] = {
        "scale_a": ones_m,
        "scale_b": ones_n,
        "out_dtype": torch.bfloat16,
        "use_fast_accum": True,
    }
    return [functools.partial(torch._scaled_mm, a, b.t(), **options) for a, b in problem.floats(torch.float8_e4m3fn)]


MAKERS: dict[str, Callable[[Problem], list[Call]]] = {
    "bf16": functools.partial(floating, torch.bfloat16),
    "int_mm": int_mm,
    "fp8": fp8,
}
