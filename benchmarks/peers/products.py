"""Peers of one GEMM, D [M, N] in bfloat16 unless its name says otherwise, each with ``sets`` buffer sets.

cutlass            CUTLASS INT8 with row and column scales, the fastest of its configurations at this shape
the others         hwkern/bench/products.py
"""

from __future__ import annotations

import functools

import timing
import torch
from torch import Tensor

from hwkern.bench.products import DATA as DATA
from hwkern.bench.products import MAKERS as MAKERS
from hwkern.bench.products import Problem as Problem
from hwkern.bench.products import fp8 as fp8
from peers import AbsentError, Call, cutlass

NAMES = ("bf16", "int_mm", "fp8", "cutlass")


def cutlass_calls(index: int, swizzle: int, overlap: bool, problem: Problem) -> list[Call]:
    """One configuration of CUTLASS."""
    kernel = cutlass.Kernel(index)

    def call(a: Tensor, b: Tensor, scale_m: Tensor, scale_n: Tensor) -> Tensor:
        d = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device="cuda")
        kernel(
            a.data_ptr(), b.data_ptr(), scale_m.data_ptr(), scale_n.data_ptr(), d.data_ptr(),
            problem.m, problem.n, problem.k, swizzle, overlap, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        return d

    return [functools.partial(call, *operands) for operands in problem.int8]


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


def cutlass_named(name: str, problem: Problem, overlap: bool = False) -> list[Call]:
    """The candidate called ``name``; ``overlap``: with launches that overlap (programmatic dependent launch)."""
    config, swizzle = name.split(" swizzle ")
    index = next(i for i, known in enumerate(cutlass.CONFIGS) if str(known) == config)
    return cutlass_calls(index, int(swizzle), overlap, problem)


def best_of(candidates: dict[str, list[Call]], keep: int = 2) -> dict[str, list[Call]]:
    """The ``keep`` fastest in a short run."""
    us = timing.cuda_us(candidates, seconds=0.005, graph_calls=4)
    return {name: candidates[name] for name in sorted(us, key=us.__getitem__)[:keep]}
