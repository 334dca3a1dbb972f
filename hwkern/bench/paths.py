"""The ways to run a model: a base (float type or quantizer) and how it is launched (eager, compiled, captured).

``fp16``, ``hwkern-plan+compile``, ``bf16+compile+graph``: what stands behind ``+`` are the ways of launching;
``bf16+compile@8x512@bert-base`` runs with this workload and this model only. The TensorRT paths (``trt-…``) live in
engines.py.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hwkern import _native
from hwkern.bench import settings
from hwkern.bench.models import AbsentError, Model

MODES = ("compile", "graph")


@dataclass(frozen=True)
class Base:
    """One version of a model's weights and layers.

    Attributes:
        title: for tables. family: "stock", "hwkern" or "tensorrt".
        where: "cuda", "cpu" or both.
        make: ``(float32 model, context) -> model``; may raise AbsentError. It must not change the float32 model.
        tf32: whether float32 products may round their operands to TF32.
    """

    title: str
    family: str
    where: tuple[str, ...]
    make: Callable[[nn.Module, Context], nn.Module]
    tf32: bool = False
    package: str = ""  #: what `make` imports


@dataclass(frozen=True)
class Context:
    """What a maker may need besides the model."""

    device: str
    model: Model
    batches: Callable[[], Sequence[Any]]  #: for hwkern.plan, made by whoever needs them: there may be no room


def _cast(dtype: torch.dtype) -> Callable[[nn.Module, Context], nn.Module]:
    return lambda model, _: copy.deepcopy(model).to(dtype)


def _same(model: nn.Module, _: Context) -> nn.Module:
    return model


def hwkern_dtype(device: str) -> torch.dtype:
    """What hwkern's layers take and give: float16 on a GPU, as FP16 which they are compared with; float32 on a CPU."""
    return torch.float16 if device.startswith("cuda") else torch.float32


def _patched(model: nn.Module, context: Context) -> nn.Module:
    import hwkern

    _need_kernels(context)
    made = copy.deepcopy(model).to(hwkern_dtype(context.device))
    if not hwkern.patch(made, originals="drop", embeddings=True).swapped:
        raise AbsentError("hwkern.patch leaves every layer of this model as it is: nothing to compare")
    return made


def _planned(model: nn.Module, context: Context) -> nn.Module:
    import hwkern

    _need_kernels(context)
    made = copy.deepcopy(model).to(hwkern_dtype(context.device))
    batches = [
        {k: v.to(hwkern_dtype(context.device)) if torch.is_tensor(v) and v.is_floating_point() else v
         for k, v in batch.items()}
        for batch in context.batches()
    ]  # fmt: skip
    plan = hwkern.plan(made, batches, show=False)
    hwkern.patch(made, plan=plan, originals="drop")
    made.__dict__["_bench_plan"] = {
        "plan": schemes(plan), "plan_shapes": shapes(plan), "plan_whole": plan.whole.get("text", ""),
    }  # fmt: skip
    return made


def schemes(plan: Any) -> dict[str, int]:
    """Scheme → number of layers that a plan gives it."""
    found: dict[str, int] = {}
    for recipe in plan.recipes.values():
        found[recipe.name] = found.get(recipe.name, 0) + 1
    return dict(sorted(found.items()))


def shapes(plan: Any) -> list[dict[str, Any]]:
    """For each kind of layer in a plan (its name within its block, its size and what it became): how many there are,
    why the first is what it is, and µs of every recipe by tokens (as one CUDA graph where that was measured)."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in plan.layers.values():
        where = re.split(r"(?:^|\.)\d+\.", layer.name)[-1]
        kind = (where, layer.n, layer.k, layer.choice.name, layer.choice.recipe.max_tokens)
        if kind in found:
            found[kind]["layers"] += len(layer.names)
            continue
        us = {}
        for candidate in layer.candidates:
            if candidate.us:
                times = candidate.us.get("graph") or next(iter(candidate.us.values()))
                us[candidate.name] = {str(tokens): round(value, 2) for tokens, value in sorted(times.items())}
        found[kind] = {
            "kind": where, "n": layer.n, "k": layer.k, "layers": len(layer.names), "chosen": layer.choice.name,
            "max_tokens": layer.choice.recipe.max_tokens, "reason": layer.reason, "us": us,
        }  # fmt: skip
    return list(found.values())


def _need_kernels(context: Context) -> None:
    if context.device.startswith("cuda") and (problem := _native.cuda_problem()) is not None:
        raise AbsentError(problem)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that a quantizer takes: all but the language head, which hwkern leaves too."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {name: module for name, module in found.items() if module is not head}
    if not found:
        raise AbsentError("this model has no nn.Linear but its head (GPT-2's layers are transformers' Conv1D)")
    return found


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _bitsandbytes(model: nn.Module, context: Context) -> nn.Module:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise AbsentError(f"pip install bitsandbytes ({error})") from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    made = copy.deepcopy(model).half()
    for name, linear in linears(made).items():
        # On meta, or the layer is filled with first values on the CPU: half a second for each large one.
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=0.0,
            device="meta",
        )  # fmt: skip
        weight = bnb.nn.Int8Params(linear.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = weight.to(context.device)  # from the CPU, because that is where it quantizes
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        _replace(made, name, layer.requires_grad_(False).eval())
    return made


def _torchao(config: str, options: dict[str, Any], least_compute: int) -> Callable[[nn.Module, Context], nn.Module]:
    def make(model: nn.Module, context: Context) -> nn.Module:
        try:
            from torchao.quantization import PerRow, quant_api, quantize_
        except ImportError as error:
            raise AbsentError(f"pip install torchao ({error})") from error
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < least_compute:
            raise AbsentError(f"FP8 needs compute capability {least_compute / 10}")
        made = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
        chosen = set(linears(made))
        arguments = {k: PerRow() if v == "PerRow" else v for k, v in options.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(made, getattr(quant_api, config)(**arguments), filter_fn=lambda _, name: name in chosen)
        return made

    return make


def _dynamic(engine: str) -> Callable[[nn.Module, Context], nn.Module]:
    """torch.ao's dynamic quantization of nn.Linear."""

    def make(model: nn.Module, context: Context) -> nn.Module:
        try:
            from torch.ao.quantization import quantize_dynamic
        except ImportError as error:
            raise AbsentError(f"torch {torch.__version__} has no torch.ao.quantization any more ({error})") from error
        if engine not in torch.backends.quantized.supported_engines:
            raise AbsentError(f"this build of torch has no {engine} kernels")
        linears(model)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, and says so at every step
                return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        finally:
            torch.backends.quantized.engine = before

    return make


BOTH = ("cuda", "cpu")
BASES: dict[str, Base] = {
    "fp32": Base("torch FP32", "stock", BOTH, _same),
    "tf32": Base("torch TF32", "stock", ("cuda",), _same, tf32=True),
    "fp16": Base("torch FP16", "stock", ("cuda",), _cast(torch.float16)),
    "bf16": Base("torch BF16", "stock", BOTH, _cast(torch.bfloat16)),
    "dynamic-fbgemm": Base("torch.ao dynamic INT8, fbgemm", "stock", ("cpu",), _dynamic("fbgemm")),
    "dynamic-onednn": Base("torch.ao dynamic INT8, oneDNN", "stock", ("cpu",), _dynamic("onednn")),
    "bitsandbytes": Base("bitsandbytes LLM.int8", "stock", ("cuda",), _bitsandbytes, package="bitsandbytes"),
    "torchao-int8": Base(
        "torchao INT8", "stock", ("cuda",),
        _torchao("Int8DynamicActivationInt8WeightConfig", {"set_inductor_config": False}, 80),
        package="torchao.quantization",
    ),
    "torchao-fp8": Base(
        "torchao FP8", "stock", ("cuda",),
        _torchao(
            "Float8DynamicActivationFloat8WeightConfig", {"granularity": "PerRow", "set_inductor_config": False}, 89
        ),
        package="torchao.quantization",
    ),
    "hwkern-patch": Base("hwkern.patch", "hwkern", BOTH, _patched),
    "hwkern-plan": Base("hwkern.plan", "hwkern", BOTH, _planned),
}  # fmt: skip

#: TensorRT's own precisions and hwkern inside it: see engines.py.
ENGINES = {
    "trt-fp32": "TensorRT FP32",
    "trt-fp16": "TensorRT FP16",
    "trt-int8": "TensorRT INT8 (Q/DQ)",
    "trt-hwkern": "TensorRT + hwkern",
}

#: Every path by default; what compiles or builds for long comes late.
DEFAULT_PATHS = (
    "fp32", "tf32", "fp16", "bf16", "dynamic-fbgemm", "dynamic-onednn", "bitsandbytes", "hwkern-patch", "hwkern-plan",
    "fp16+graph", "bf16+graph", "hwkern-patch+graph", "hwkern-plan+graph", "trt-fp16", "trt-hwkern", "trt-fp32",
    "trt-int8", "bf16+compile", "bf16+compile+graph", "hwkern-plan+compile", "hwkern-plan+compile+graph",
    "torchao-int8+compile", "torchao-fp8+compile", "torchao-fp8+compile+graph",
)  # fmt: skip


@dataclass(frozen=True)
class Path:
    """A name taken apart."""

    name: str
    base: str
    compiled: bool
    captured: bool
    only: tuple[str, ...] = ()  #: workloads and models that it is for; without one of a kind: all of the kind

    @property
    def is_engine(self) -> bool:
        return self.base in ENGINES

    @property
    def family(self) -> str:
        return "tensorrt" if self.is_engine else BASES[self.base].family

    @property
    def ours(self) -> bool:
        """Whether hwkern's kernels run it, in torch or in TensorRT."""
        return self.base.startswith(("hwkern-", "trt-hwkern"))

    @property
    def title(self) -> str:
        """For tables: "torch BF16, compiled, CUDA graph"."""
        head = ENGINES[self.base] if self.is_engine else BASES[self.base].title
        return head + (", compiled" if self.compiled else "") + (", CUDA graph" if self.captured else "")

    def wanted(self, model: str, workload: str) -> bool:
        """Whether it is to run with this model and workload."""
        for name, kind in ((model, False), (workload, True)):
            chosen = [each for each in self.only if is_workload(each) == kind]
            if chosen and name not in chosen:
                return False
        return True

    def problem(self, device: str) -> str | None:
        """Why this path cannot run on ``device`` whatever the model; None: it may."""
        kind = device.split(":")[0]
        if self.is_engine:
            return None if kind == "cuda" else "TensorRT needs an NVIDIA GPU"
        if self.captured and kind != "cuda":
            return "CUDA graphs need an NVIDIA GPU"
        if kind not in (where := BASES[self.base].where):
            return f"runs on {where[0]} only" if where[0] == "cpu" else f"{BASES[self.base].title} is for NVIDIA GPUs"
        if self.compiled and kind == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs triton on a GPU: pip install triton"
        return None


def is_workload(name: str) -> bool:
    """Whether a workload is called so."""
    try:
        settings.workload(name)
    except ValueError:
        return False
    return True


def path(name: str) -> Path:
    """The path called ``name``. ValueError for an unknown one."""
    name, *only = name.split("@")
    base, *modes = name.split("+")
    known = base in BASES or (base in ENGINES and not modes)
    if not known or len(set(modes)) != len(modes) or any(mode not in MODES for mode in modes):
        raise ValueError(
            f"path {name!r}: it must be one of {', '.join([*BASES, *ENGINES])}; all but TensorRT's may have "
            "+compile, +graph or +compile+graph behind, and @ with a workload or a model to run with that one only."
        )
    return Path(name, base, "compile" in modes, "graph" in modes, tuple(only))
