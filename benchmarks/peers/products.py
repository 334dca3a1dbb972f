"""Peers of one GEMM, D [M, N] in bfloat16 unless its name says otherwise, each with ``sets`` buffer sets.

bf16, fp16, fp32   torch.mm (cuBLAS), the paths that int8 replaces; fp32 without TF32
int_mm             torch._int_mm (cuBLAS INT8): the raw int32 sum only, no scales, no 16-bit output
fp8                torch._scaled_mm with row-wise scales
cutlass            CUTLASS INT8 with row and column scales, the fastest of its configurations at this shape
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import timing
import torch
from torch import Tensor

from hwkern import hardware
from peers import AbsentError, Call, cutlass

NAMES = ("bf16", "int_mm", "fp8", "cutlass")
Operands = Sequence[tuple[Tensor, Tensor]]  # (a [M, K], b [N, K]) per buffer set


class Problem:
    """One shape with its buffers, made once and shared by the peers that can."""

    def __init__(self, m: int, n: int, k: int, gpu: hardware.Gpu) -> None:
        self.m, self.n, self.k, self.gpu = m, n, k, gpu

    @functools.cached_property
    def bytes(self) -> Operands:
        """int8 operands."""
        m, n, k = self.m, self.n, self.k
        sets = timing.rotations(m * k + n * k + 2 * m * n, self.gpu.l2_bytes)
        random = functools.partial(timing.random_int8, device="cuda")
        return [(random(m, k), random(n, k)) for _ in range(sets)]

    @functools.cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """float32 [M] and [N]."""
        scale_m, scale_n = (torch.rand(size, device="cuda") + 0.5 for size in (self.m, self.n))
        return scale_m, scale_n

    def floats(self, dtype: torch.dtype) -> Operands:
        """Gaussian operands."""
        m, n, k = self.m, self.n, self.k
        sets = timing.rotations(dtype.itemsize * (m * k + n * k) + 2 * m * n, self.gpu.l2_bytes)
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
    options = {"scale_a": ones_m, "scale_b": ones_n, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return [functools.partial(torch._scaled_mm, a, b.t(), **options) for a, b in problem.floats(torch.float8_e4m3fn)]


def cutlass_calls(index: int, swizzle: int, overlap: bool, problem: Problem) -> list[Call]:
    """One configuration of CUTLASS."""
    kernel = cutlass.Kernel(index)
    scale_m, scale_n = problem.scales

    def call(a: Tensor, b: Tensor) -> Tensor:
        d = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device="cuda")
        kernel(
            a.data_ptr(), b.data_ptr(), scale_m.data_ptr(), scale_n.data_ptr(), d.data_ptr(),
            problem.m, problem.n, problem.k, swizzle, overlap, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return d

    return [functools.partial(call, a, b) for a, b in problem.bytes]


def cutlass_candidates(problem: Problem) -> dict[str, list[Call]]:
    """Every configuration that takes the shape, with plain and with swizzled tile order where there are many tiles."""
    if problem.gpu.compute != 90:
        raise AbsentError("these CUTLASS kernels are for compute capability 9.0")
    if problem.k % 16 or problem.n % 8:
        raise AbsentError("CUTLASS takes K in multiples of 16 and N of 8 only")
    try:
        cutlass.load()
    except cutlass.UnavailableError as reason:
        raise AbsentError(str(reason)) from reason
    found = {}
    for index, config in enumerate(cutlass.CONFIGS):
        tiles = -(-problem.m // config.tile[0]) * -(-problem.n // config.tile[1])
        for swizzle in (1, 8) if tiles > problem.gpu.sm_count else (1,):
            calls = cutlass_calls(index, swizzle, False, problem)
            try:
                calls[0]()
            except RuntimeError:
                continue
            found[f"{config} swizzle {swizzle}"] = calls
    if not found:
        raise AbsentError("no CUTLASS configuration takes this shape")
    return found


def overlapped(name: str, problem: Problem) -> list[Call]:
    """The candidate called ``name`` with launches that overlap (programmatic dependent launch)."""
    config, swizzle = name.split(" swizzle ")
    index = next(i for i, known in enumerate(cutlass.CONFIGS) if str(known) == config)
    return cutlass_calls(index, int(swizzle), True, problem)


def best_of(candidates: dict[str, list[Call]], keep: int = 2) -> dict[str, list[Call]]:
    """The ``keep`` fastest in a short run."""
    us = timing.cuda_us(candidates, seconds=0.005, graph_calls=4)
    return {name: candidates[name] for name in sorted(us, key=us.__getitem__)[:keep]}


MAKERS: dict[str, Callable[[Problem], list[Call]]] = {
    "bf16": functools.partial(floating, torch.bfloat16),
    "int_mm": int_mm,
    "fp8": fp8,
}
