"""Peers of one GEMM, D [M, N] in bfloat16 unless its name says otherwise, each with ``sets`` buffer sets.

bf16, fp16, fp32   torch.mm (cuBLAS), the paths that int8 replaces; fp32 without TF32
int_mm             torch._int_mm (cuBLAS INT8): the raw int32 sum only, no scales, no 16-bit output
fp8                torch._scaled_mm with row-wise scales

All of them, and ours, multiply the same random matrices, each in the form that its path brings them to: INT8 and FP8 by
the largest of each row. At many rows a GPU is limited by power, and what power a product takes depends on its data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hwkern import _timing, hardware, ops
from hwkern._timing import Call
from hwkern.bench.models import AbsentError

#: What the matrices are filled with, in place. Rows of a layer's activations and weights are near to Gaussian.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x.normal_(),
    "uniform": lambda x: x.uniform_(-1, 1),
}
E4M3_MAX = 448.0


class Problem:
    """One shape with its buffers, made once and shared by the peers that can; ``data`` is a name in ``DATA``."""

    device = "cuda"

    def __init__(self, m: int, n: int, k: int, gpu: hardware.Gpu, data: str = "gaussian") -> None:
        self.m, self.n, self.k, self.gpu = m, n, k, gpu
        self.fill = DATA[data]

    def sets(self, itemsize: int = 1) -> int:
        """Buffer sets that keep the L2 cold, for operands of ``itemsize`` bytes an element."""
        m, n, k = self.m, self.n, self.k
        return _timing.rotations(itemsize * (m * k + n * k) + 2 * m * n, self.gpu.l2_bytes)

    @functools.cached_property
    def floats(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The matrices ``(a [M, K], b [N, K])`` of each set in bfloat16, which all peers start from."""
        empty = functools.partial(torch.empty, dtype=torch.bfloat16, device=self.device)
        return [
            (self.fill(empty(self.m, self.k)), self.fill(empty(self.n, self.k))) for _ in range(self.sets(itemsize=1))
        ]

    @functools.cached_property
    def int8(self) -> Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """``(a, b, scale_a [M], scale_b [N])`` of each set: int8 by absmax / 127 of each row."""
        quantized = [(*ops.quantize(a), *ops.quantize(b)) for a, b in self.floats]
        return [(a, b, scale_a, scale_b) for a, scale_a, b, scale_b in quantized]


def floating(dtype: torch.dtype, problem: Problem) -> list[Call]:
    """cuBLAS in one float type."""
    sets = problem.floats[: problem.sets(dtype.itemsize)]
    return [functools.partial(torch.mm, a.to(dtype), b.to(dtype).t()) for a, b in sets]


def int_mm(problem: Problem) -> list[Call]:
    """cuBLAS INT8 as torch offers it."""
    if problem.m <= 16 or problem.k % 8 or problem.n % 8:
        raise AbsentError("torch._int_mm takes M > 16 and K and N in multiples of 8 only")
    return [functools.partial(torch._int_mm, a, b.t()) for a, b, _, _ in problem.int8]


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 by absmax / 448 of each row, and that scale, float32 ``[rows, 1]``."""
    scale = x.abs().amax(1, keepdim=True).float() / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def fp8(problem: Problem) -> list[Call]:
    """FP8 with row-wise scales."""
    if problem.gpu.compute < 89:
        raise AbsentError("FP8 needs compute capability 8.9")
    if problem.k % 16 or problem.n % 16:
        raise AbsentError("torch._scaled_mm takes K and N in multiples of 16 only")
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    calls: list[Call] = []
    for floats in problem.floats:
        (a, scale_a), (b, scale_b) = map(to_fp8, floats)
        calls.append(functools.partial(torch._scaled_mm, a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), **options))
    return calls


MAKERS: dict[str, Callable[[Problem], list[Call]]] = {
    "bf16": functools.partial(floating, torch.bfloat16),
    "int_mm": int_mm,
    "fp8": fp8,
}
