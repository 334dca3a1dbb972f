"""``hwkern.report(model)``: what the layers are now, what computes them, and what the plan measured of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hwkern import _native, hardware
from hwkern._choose import Candidate
from hwkern._cpu import int8_is_fast
from hwkern._fusion import fusion_of
from hwkern._layers import find_layers
from hwkern.nn import CalibratedInt8Linear, Int8Embedding, Int8Linear, WeightOnlyInt8Linear
from hwkern.nn.packed import PackedLayer
from hwkern.nn.weight_only import FEW_TOKENS
from hwkern.patch import survey as survey_layers
from hwkern.plan import Plan, PlanError, PlannedLayer
from hwkern.report import LayerReport, Report, Timing


def survey(model: nn.Module, plan: Plan | None, validation: Any) -> Report:
    """See ``hwkern.report``."""
    return describe(survey_layers(model), model, plan, validation)


def describe(report: Report, model: nn.Module, plan: Plan | None = None, validation: Any = None) -> Report:
    """``report`` on ``model``, as ``hwkern.patch`` made it or a survey, with all that is known beside."""
    if plan is not None:
        plan.check_model(model)
    else:
        plan = _kept_plan(model)
    modules = {layer.names[0]: layer.module for layer in find_layers(model, embeddings=True)}
    planned = {name: layer for layer in plan.layers.values() for name in layer.names} if plan is not None else {}
    gpu = _gpu(plan)
    patched = any(layer.status in ("int8", "already") for layer in report.layers)
    counted: set[int] = set()
    layers = []
    for layer in report.layers:
        module = modules[layer.name]
        found = replace(layer, runs=_runs(module), float_bytes=_float_bytes(module, counted))
        if (entry := planned.get(layer.name)) is not None:
            found = _measured(found, entry, gpu, patched)
        elif plan is not None and layer.name in plan.left and layer.status == "left":
            found = replace(found, reason=plan.left[layer.name])
        layers.append(found)
    return replace(
        report,
        layers=tuple(layers),
        model=type(model).__name__,
        where=tuple(_where(modules.values())),
        fusion=report.fusion or _fusions(model),
        plan={} if plan is None else _summary(plan),
        validation={} if validation is None else validation.to_dict(),
    )


def _kept_plan(model: nn.Module) -> Plan | None:
    """The plan that ``hwkern.patch`` or ``hwkern.load`` left on the model; None when it was no plan (calibrate's)."""
    data = model.__dict__.get("_hwkern_plan")
    if not isinstance(data, dict):
        return None
    try:
        return Plan.from_dict(data)
    except PlanError:
        return None


def _summary(plan: Plan) -> dict[str, Any]:
    device = plan.device
    return {
        "device": plan._place,
        "kind": device.get("device"),
        "threads": device.get("threads"),
        "policy": plan.policy,
        "min_snr_db": plan.accuracy.min_snr_db,
        "seconds": plan.seconds,
        "whole": plan.whole,
        "task": plan.to_dict()["task"],
    }


# ---- one layer ------------------------------------------------------------------------------------------------------


def _measured(layer: LayerReport, entry: PlannedLayer, gpu: hardware.Gpu | None, patched: bool) -> LayerReport:
    """With the plan's figures; without them where a patched model has something else than the plan chose."""
    kept = layer.status == "left"
    choice, keep = entry.choice, entry.candidates[0]
    if kept and entry.chosen and patched:
        return replace(layer, verdict=f"the plan chose {choice.name}, but hwkern.patch was told to leave it")
    shared = layer.scheme == "int8" and entry.kind != "Embedding"  # of a head that shares the weight
    if not kept and layer.scheme != choice.recipe.scheme and not (shared and entry.chosen):
        return replace(layer, verdict=f"the plan chose {choice.name}, but the layer is {layer.scheme}")
    times = tuple(
        Timing(mode, m, calls, keep.us[mode][m], choice.us[mode][m], _floor(entry, choice, m, gpu))
        for mode in keep.us
        for m, calls in entry.calls.items()
        if not shared  # counted with the head
    )
    verdict = f"{choice.name}: {entry.reason}" if entry.chosen else entry.reason
    reason = layer.reason
    if kept:
        reason = f"float now; the plan would make it {choice.name}" if entry.chosen else entry.reason
    return replace(layer, reason=reason, verdict=verdict, snr_db=choice.snr_db if entry.chosen else None, times=times)


def _floor(entry: PlannedLayer, choice: Candidate, m: int, gpu: hardware.Gpu | None) -> float | None:
    """µs; None where a rate that it needs is not known (a CPU's, or a GPU's in float32)."""
    if gpu is None or gpu.bandwidth is None:
        return None
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[entry.dtype]
    scheme = choice.recipe.scheme
    if entry.kind == "Embedding":  # rows read and written
        return round(m * entry.k * ((width if scheme == "keep" else 1) + width) / gpu.bandwidth * 1e6, 3)
    weight_only = scheme == "w8a16" or (
        scheme == "w8a16/w8a8" and choice.recipe.max_tokens is not None and m <= choice.recipe.max_tokens
    )
    in_int8 = not weight_only and scheme != "keep"
    peak = gpu.int8_ops if in_int8 else gpu.fp16_flops if width == 2 else None
    if peak is None:
        return None
    b_bytes = width if scheme == "keep" else 1
    floor = hardware.speed_of_light(m, entry.n, entry.k, gpu, a_bytes=width, b_bytes=b_bytes, d_bytes=width, peak=peak)
    return round(floor.microseconds, 3)


def _float_bytes(module: nn.Module, counted: set[int]) -> int:
    """Of weight and bias as a float layer; tensors that an earlier layer counted are not counted again."""
    total = 0
    for name in ("weight", "bias"):
        tensor = module._parameters.get(name)
        if tensor is None or id(tensor) in counted or nn.parameter.is_lazy(tensor):
            continue
        counted.add(id(tensor))
        if isinstance(module, PackedLayer) and name == "weight":
            n, k = module._size()
            total += n * k * module.float_dtype.itemsize
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def _runs(module: nn.Module) -> str:
    """What computes ``module`` where its weight is now."""
    weight = module._parameters.get("weight")
    if weight is None:
        return type(module).__name__
    if weight.is_meta:
        return "nowhere yet: its tensors are on meta"
    if isinstance(module, Int8Embedding):
        return f"rows of the int8 table, widened as they are read, on {weight.device}"
    if not isinstance(module, Int8Linear):
        return f"torch, on {weight.device}"
    where = str(weight.device)
    if weight.is_cuda:
        return f"{_cuda_path(module)}{_fused(module)}, on {where}"
    if isinstance(module, WeightOnlyInt8Linear):
        return f"float32 product over weights widened block by block, on {where}"
    product = "torch._int_mm" if int8_is_fast() else "exact float32 products: this CPU has no exact int8 dot product"
    return f"{_inputs(module)}, {product}, on {where}"


def _cuda_path(module: Int8Linear) -> str:
    if isinstance(module, WeightOnlyInt8Linear):
        few = f"W8A16 kernel up to {FEW_TOKENS} tokens in 16 bits, else cuBLAS on the widened weight"
        if module.max_tokens is None:
            return few
        return f"{few}; above {module.max_tokens} tokens int8 × int8 kernels"
    return f"int8 × int8 kernels, {_inputs(module)}"


def _fused(module: Int8Linear) -> str:
    if module._part is None:
        return ""
    names = [e.attribute for e in module._part.merged.edges.values() if isinstance(e.child, Int8Linear)]
    return f", one product for {'+'.join(names)}" if len(names) > 1 else ", fused with what lies before it"


def _fusions(model: nn.Module) -> str:
    """What ``hwkern.patch`` fused, counted."""
    counts = Counter(str(fusion) for module in model.modules() if (fusion := fusion_of(module)) is not None)
    return f"Fused: {', '.join(f'{count} × {what}' for what, count in counts.items())}." if counts else ""


def _inputs(module: Int8Linear) -> str:
    if not isinstance(module, CalibratedInt8Linear):
        return "input quantized per token"
    parts = ["static input scale" if module.input_scale is not None else "input quantized per token"]
    if module.zero_point:
        parts.append(f"zero point {module.zero_point}")
    if module._gain() is not None:
        parts.append("input columns scaled")
    if module.outlier_index is not None:
        parts.append(f"{module.outlier_index.numel()} outlier columns in float beside")
    return ", ".join(parts)


# ---- the machine ----------------------------------------------------------------------------------------------------


def _gpu(plan: Plan | None) -> hardware.Gpu | None:
    """The GPU whose peaks the plan's times are to be held against: of this machine, and of the plan's name."""
    name = None if plan is None else plan.device.get("gpu")
    if name is None or _native.cuda_problem() is not None:
        return None
    return next((gpu for gpu in hardware.gpus() if gpu.name == name), None)


def _where(modules: Iterable[nn.Module]) -> list[str]:
    """Sentences: the devices, and what stands in the way of more."""
    weights = [w for module in modules if (w := module._parameters.get("weight")) is not None]
    devices = {str(weight.device) for weight in weights}
    lines = []
    problem = _native.cuda_problem()
    for device in sorted(devices):
        if device.startswith("cuda") and problem is None:
            index = torch.device(device).index or 0
            gpu = hardware.gpu(index)
            lines.append(f"{device} is {gpu.name}: hwkern's CUDA kernels run there.")
        elif device == "cpu":
            cpu = hardware.cpu()
            units = ", ".join(cpu.int8_units) or "no int8 units"
            threads = torch.get_num_threads()
            lines.append(f"cpu is {cpu.name} ({units}), {threads} thread{'' if threads == 1 else 's'} for torch.")
            if not int8_is_fast():
                lines.append("It has no exact int8 dot product: int8 layers compute in float32 and are no faster.")
    if problem is not None:
        lines.append(f"No GPU is used: {problem}")
    return lines
