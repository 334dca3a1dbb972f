"""Peers of one nn.Linear, quantization of the activations included where the peer quantizes them.

  bf16, fp16, fp32      nn.Linear (cuBLAS); fp32 without TF32
  bitsandbytes          LLM.int8 without the outlier path, float16 in and out: the type that it computes in
  compiled_int8         per-token quantization, torch._int_mm and the scales, under torch.compile
  torchao_int8          torchao's dynamic INT8 (W8A8), under torch.compile
  torchao_weight_only   torchao's INT8 weights with bfloat16 activations, under torch.compile
  torchao_fp8           torchao's dynamic FP8 with row-wise scales, under torch.compile

Each compiled peer costs ten seconds of compilation a shape, so they are asked for by name (``--peers``). They get
torch.compile's own settings: torchao's would search kernels for minutes a shape.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import Tensor, nn

from hwkern import hardware
from peers import AbsentError, Call

QUICK = ("bf16", "fp16", "fp32", "bitsandbytes")
SLOW = ("compiled_int8", "torchao_int8", "torchao_weight_only", "torchao_fp8")
NAMES = (*QUICK, *SLOW)


class Problem:
    """One shape and the float layer that every peer starts from."""

    def __init__(self, m: int, n: int, k: int, gpu: hardware.Gpu) -> None:
        self.m, self.n, self.k, self.gpu = m, n, k, gpu
        self.linear = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)

    def sets(self, x_bytes: float, weight_bytes: float) -> int:
        """Buffer sets that keep the L2 cold."""
        moved = x_bytes * (self.m * self.k + self.m * self.n) + weight_bytes * self.n * self.k
        return timing.rotations(moved, self.gpu.l2_bytes)

    def x(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Fresh Gaussian activations."""
        return torch.randn(self.m, self.k, device="cuda", dtype=dtype)

    def copies(self, layer: nn.Module, dtype: torch.dtype, sets: int) -> list[Call]:
        """``sets`` copies of a layer, each with an input of its own."""
        return [functools.partial(copy.deepcopy(layer), self.x(dtype)) for _ in range(sets)]


def floating(dtype: torch.dtype, problem: Problem) -> list[Call]:
    """nn.Linear in one float type."""
    linear = copy.deepcopy(problem.linear).to(dtype)
    return problem.copies(linear, dtype, problem.sets(dtype.itemsize, dtype.itemsize))


def bitsandbytes(problem: Problem) -> list[Call]:
    """LLM.int8 without outliers."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise AbsentError(f"pip install bitsandbytes ({error})") from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    float16 = copy.deepcopy(problem.linear).half()
    calls: list[Call] = []
    for _ in range(problem.sets(2, 1)):
        layer = bnb.nn.Linear8bitLt(problem.k, problem.n, has_fp16_weights=False, threshold=0.0)
        layer.load_state_dict(float16.state_dict())
        calls.append(functools.partial(layer.half().to("cuda").requires_grad_(False).eval(), problem.x(torch.float16)))
    return calls


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` under torch.compile for one shape. What other shapes left behind is dropped first."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """What one writes by hand: quantize per token, multiply, scale, add."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-30)
    q = (x.float() / scale).round().clamp(-127, 127).to(torch.int8)
    return (torch._int_mm(q, weight.t()).float() * scale * weight_scale + bias).to(x.dtype)


def compiled_int8(problem: Problem) -> list[Call]:
    """torch.compile around torch._int_mm."""
    if problem.m <= 16 or problem.k % 8 or problem.n % 8:
        raise AbsentError("torch._int_mm takes M > 16 and K and N in multiples of 8 only")
    run = compiled(quantized_linear)
    weight = problem.linear.weight.detach().float()
    scale = weight.abs().amax(1) / 127
    q = (weight / scale[:, None]).round().to(torch.int8)
    bias = problem.linear.bias.detach()
    return [functools.partial(run, problem.x(), q.clone(), scale, bias) for _ in range(problem.sets(2, 1))]


def torchao(config: str, options: dict[str, Any], problem: Problem) -> list[Call]:
    """One of torchao's configurations."""
    try:
        from torchao.quantization import PerRow, quant_api, quantize_
    except ImportError as error:
        raise AbsentError(f"pip install torchao ({error})") from error
    if options.get("granularity") == "PerRow":
        options = {**options, "granularity": PerRow()}
    model = nn.Sequential(copy.deepcopy(problem.linear).requires_grad_(False))
    quantize_(model, getattr(quant_api, config)(**options))
    run = compiled(nn.functional.linear)
    calls: list[Call] = []
    for _ in range(problem.sets(2, 1)):
        layer = copy.deepcopy(model[0])
        calls.append(functools.partial(run, problem.x(), layer.weight, layer.bias))
    return calls


MAKERS: dict[str, Callable[[Problem], list[Call]]] = {
    "bf16": functools.partial(floating, torch.bfloat16),
    "fp16": functools.partial(floating, torch.float16),
    "fp32": functools.partial(floating, torch.float32),
    "bitsandbytes": bitsandbytes,
    "compiled_int8": compiled_int8,
    "torchao_int8": functools.partial(torchao, "Int8DynamicActivationInt8WeightConfig", {"set_inductor_config": False}),
    "torchao_weight_only": functools.partial(torchao, "Int8WeightOnlyConfig", {"set_inductor_config": False}),
    "torchao_fp8": functools.partial(
        torchao,
        "Float8DynamicActivationFloat8WeightConfig",
        {"granularity": "PerRow", "set_inductor_config": False},
    ),
}  # fmt: skip
