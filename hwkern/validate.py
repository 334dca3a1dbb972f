"""``validate``: the original model and the int8 one side by side, on the same batches: time, memory, accuracy."""

from __future__ import annotations

import math
import statistics
import sys
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._console import plain_table, progress
from hwkern._observe import evaluating
from hwkern.metrics import Function, Metric, as_metric

#: Calls of each model on each batch, in turn.
ROUNDS = 7
#: What stands in JSON for the -inf dB of outputs that are not finite.
NOT_FINITE_DB = -1e9


@dataclass
class Validation:
    """What :func:`validate` found. ``print`` it.

    Attributes:
        shapes: of the batches' first tensors.
        reference_ms, model_ms: median time of each batch, eager.
        reference_bytes, model_bytes: parameters and buffers, shared ones once.
        snr_db, cosine: of the main output of each batch against the reference's: signal-to-noise ratio, and the lowest
            cosine of any row.
        metrics: name → (reference, model, drop).
    """

    device: str
    shapes: list[str]
    reference_ms: list[float]
    model_ms: list[float]
    reference_bytes: int
    model_bytes: int
    snr_db: list[float]
    cosine: list[float]
    metrics: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Time of the reference over the model's, all batches together."""
        return sum(self.reference_ms) / sum(self.model_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: an infinite ratio and the cosine of NaN become None, -inf NOT_FINITE_DB."""
        data = asdict(self)
        data["snr_db"] = [None if value == math.inf else max(value, NOT_FINITE_DB) for value in self.snr_db]
        data["cosine"] = [value if math.isfinite(value) else None for value in self.cosine]
        return {**data, "speedup": self.speedup}

    def __str__(self) -> str:
        rows = [
            [shape, f"{a:.3f}", f"{b:.3f}", f"{a / b:.2f}×", "same" if snr == math.inf else f"{snr:.1f}", f"{c:.5f}"]
            for shape, a, b, snr, c in zip(
                self.shapes, self.reference_ms, self.model_ms, self.snr_db, self.cosine, strict=True
            )
        ]
        lines = [
            plain_table("", ["batch", "reference ms", "model ms", "speed", "dB", "lowest cosine"], rows).strip("\n"),
            f"On {self.device}, eager: {self.speedup:.2f}× as fast over all batches. Weights and buffers: "
            f"{self.reference_bytes / 1e6:.1f} -> {self.model_bytes / 1e6:.1f} MB "
            f"({self.model_bytes / max(1, self.reference_bytes):.2f}×).",
        ]
        lines += [f"{name}: {a:.6g} -> {b:.6g} ({drop:+.3g} worse)." for name, (a, b, drop) in self.metrics.items()]
        return "\n".join(lines)


def validate(
    reference_model: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Metric | Function | Sequence[Metric | Function] | None = None,
    show: bool = True,
) -> Validation:
    """Compare ``model`` (patched, planned or loaded) with ``reference_model`` (the original) on the user's batches.

    Both run on the device of ``model``, in eval mode, call by call in turn. ``metric``: one or several of
    ``(model, batches) -> float``, or of :mod:`hwkern.metrics`. Neither model is changed.

    Raises ValueError for batches that are empty or ragged, for one model given twice, models on different devices, and
    a metric that returns no finite number.
    """
    if reference_model is model:
        raise ValueError("Both models are one object: keep a copy of the original, or load it again.")
    device = _batches.device_of(model)
    if _batches.device_of(reference_model) != device:
        there = _batches.device_of(reference_model)
        raise ValueError(f"The reference is on {there}, the model on {device}: move one of them.")
    found = _batches.check(batches, device)
    given = metric if isinstance(metric, Sequence) else () if metric is None else (metric,)
    tasks = [task for task in map(as_metric, given) if task is not None]
    times: dict[str, list[float]] = {"reference": [], "model": []}
    snr, cosine = [], []
    with (
        torch.no_grad(),
        evaluating(reference_model),
        evaluating(model),
        progress("Comparing both models", len(found), show) as step,
    ):
        for batch in found:
            exact = _batches.main_output(_batches.call(reference_model, batch))
            mine = _batches.main_output(_batches.call(model, batch))
            snr.append(_snr(exact, mine))
            cosine.append(float(torch.cosine_similarity(exact.double(), mine.double(), dim=-1).min()))
            del exact, mine
            for name, ms in _times(reference_model, model, batch, device).items():
                times[name].append(ms)
            step()
    result = Validation(
        str(device),
        [_shape(batch) for batch in found],
        times["reference"],
        times["model"],
        tensor_bytes(reference_model),
        tensor_bytes(model),
        snr,
        cosine,
    )
    for task in tasks:
        if task.prepare is not None:
            task.prepare(reference_model, found)
        before, after = task(reference_model, found), task(model, found)
        result.metrics[task.name] = (before, after, task.drop(before, after))
    return result


def _snr(exact: Tensor, found: Tensor) -> float:
    from hwkern.calibrate import snr_db

    if exact.shape != found.shape:
        raise ValueError(f"The models' outputs differ in shape: {tuple(exact.shape)} and {tuple(found.shape)}.")
    return snr_db(exact, found)


def _times(reference: nn.Module, model: nn.Module, batch: Any, device: torch.device) -> dict[str, float]:
    samples: dict[str, list[float]] = {"reference": [], "model": []}
    pairs = [("reference", reference), ("model", model)]
    for turn in range(ROUNDS):
        for name, one in pairs if turn % 2 == 0 else reversed(pairs):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            _batches.call(one, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def _shape(batch: Any) -> str:
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, tuple) else [batch]
    )
    return "×".join(map(str, next(tuple(v.shape) for v in values if isinstance(v, Tensor))))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _CallableModule(types.ModuleType):
    """``hwkern.validate`` is the function, but importing this file binds that name to the module: both are called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Validation:
        return validate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
