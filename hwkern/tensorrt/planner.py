"""``make_plan``: which matrix multiplies of a model become int8 on this GPU, by measuring.

TensorRT compiles what lies between two plugins as one, so a linear that is faster in int8 when it is alone may make
the model slower: only whole engines are compared. Candidates, each built and timed at each request (by default each
profile's ``opt``):

1. the float model; all linears in int8; the same with norms fused;
2. the linears with the largest weights only, those with the two largest sizes, …, norms fused between them: the rest,
   attention and its small projections, stays one piece that TensorRT can compile.

The plan is the fastest that is nowhere slower than float; if there is none, the plan keeps everything float. So a model
that is rewritten by its plan is never slower than TensorRT's own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from hwkern._console import plain_table
from hwkern.tensorrt import graph, measure, opdef
from hwkern.tensorrt.builder import Engine, build, keep_builder
from hwkern.tensorrt.profiles import Profile, Shape
from hwkern.tensorrt.rewriter import FuseNorm, Selector, rewrite

#: A whole engine counts as not slower while it is within the noise of two measurements of the same engine.
NOISE = 1.005
FLOAT = "float"

Progress = Callable[[str], None]


class Plan(dict[str, str]):
    """Node name → scheme or "float", with what was measured; goes into ``rewrite(plan=…)``.

    ``fuse_norm``, ``fuse_attention``, ``merge``: as ``rewrite`` takes them. ``fastest``: for each profile the candidate
    that is fastest there, "float" among them; for ``Runners``.
    """

    def __init__(
        self,
        nodes: Mapping[str, str],
        measured: Mapping[str, Any] | None = None,
        fuse_norm: FuseNorm = False,
        merge: bool = True,
        fuse_attention: bool = False,
    ) -> None:
        super().__init__(nodes)
        self.measured: dict[str, Any] = dict(measured or {})
        self.fuse_norm = fuse_norm
        self.fuse_attention = fuse_attention
        self.merge = merge

    @property
    def fastest(self) -> list[str]:
        return list(self.measured.get("fastest", []))

    def to_dict(self) -> dict[str, Any]:
        options = {"fuse_norm": self.fuse_norm, "fuse_attention": self.fuse_attention, "merge": self.merge}
        return {"nodes": dict(self), **options, "measured": self.measured}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, for ``rewrite(plan=path)``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        engines = self.measured.get("engines", {})
        base = engines.get(FLOAT, ())
        rows = []
        for name, times in engines.items():
            against = [f"{b / t:.2f}" for t, b in zip(times, base, strict=True)]
            chosen = "chosen" if name == self.measured.get("chosen") else ""
            rows.append((name, *(f"{t:.1f} ({r})" for t, r in zip(times, against, strict=True)), chosen))
        columns = [f"request {i}, us (times float)" for i in range(len(base))]
        return plain_table("the whole engine", ("candidate", *columns, ""), rows)


class Candidates:
    """The plans that are worth trying for a model: how many of its sizes are int8, and in which form."""

    def __init__(self, model: ModelProto, include: Selector | None = None, exclude: Selector | None = None) -> None:
        report = rewrite(_without_data(model), include=include, exclude=exclude, fuse_norm=True, fuse_attention=True)
        self.report = report
        by_name = {node.name: node for node in report.swapped}
        self.sizes: dict[int, dict[str, str]] = {}  # weights of a product, largest first → its nodes' schemes
        for node in report.swapped:
            size = node.in_features * sum(by_name[name].out_features for name in node.merged or (node.name,))
            self.sizes.setdefault(size, {})[node.name] = node.scheme
        self.sizes = dict(sorted(self.sizes.items(), reverse=True))
        self.has_norms = any(node.norm for node in report.swapped)
        self.has_attentions = bool(report.attentions)

    def plan(
        self, count: int | None = None, fuse_norm: FuseNorm = False, merge: bool = True, fuse_attention: bool = False
    ) -> tuple[str, Plan]:
        """The name and the plan with the ``count`` largest sizes in int8 (None: all, 0: everything float)."""
        count = len(self.sizes) if count is None else count
        nodes = {node.name: FLOAT for node in self.report.nodes}
        for schemes in list(self.sizes.values())[:count]:
            nodes |= schemes
        if count == 0:
            return FLOAT, Plan(nodes)
        name = "all" if count >= len(self.sizes) else "largest" if count == 1 else f"{count} largest"
        name += ", norms fused" * bool(fuse_norm) + " between" * (fuse_norm == "between")
        name += ", attention fused" * fuse_attention + ", not merged" * (not merge)
        return name, Plan(nodes, fuse_norm=fuse_norm, merge=merge, fuse_attention=fuse_attention)


def make_plan(
    onnx: str | os.PathLike[str] | bytes | ModelProto,
    profiles: Sequence[Profile],
    precision: str = "fp16",
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    requests: Sequence[Mapping[str, Shape]] | None = None,
    quick: bool = False,
    seconds: float | None = None,
    progress: Progress | None = None,
    engines: dict[str, Engine] | None = None,
    trt: ModuleType | str | None = None,
) -> Plan:
    """Measure on the GPU that is here which linears gain from int8. Takes as long as three to eight builds.

    Args:
        onnx: the float model. profiles, precision, timing_cache, workspace, optimization_level, trt: as for ``build``.
        include, exclude: as for ``rewrite``.
        requests: input shapes at which engines are timed; default: each profile's ``opt``.
        quick: all linears or none, norms and attention fused or apart: four builds at most.
        seconds: start no engine that would probably end later than this. The float one and one other are always
            there: built, if ``engines`` does not hold them.
        progress: called with a sentence at each step.
        engines: takes the engines as they are built, by candidate ("float", "all", …; ``plan.measured["chosen"]``
            names the plan's own), which saves building the chosen one again. Those that it holds are not built, and
            measured first.

    Returns:
        A :class:`Plan` for ``rewrite(plan=…)``; print it for the measurements.
    """
    profiles = list(profiles)
    if not profiles:
        raise ValueError("make_plan needs at least one profile: see profiles_from.")
    say = progress or (lambda text: None)
    settings: dict[str, Any] = {
        "precision": precision,
        "timing_cache": timing_cache,
        "workspace": workspace,
        "optimization_level": optimization_level,
        "trt": trt,
    }
    model, _ = graph.load(onnx if isinstance(onnx, (bytes, ModelProto)) else os.fspath(onnx))
    candidates = Candidates(model, include, exclude)
    shapes = [profile.opt for profile in profiles] if requests is None else list(requests)
    engines = {} if engines is None else engines
    plans: dict[str, Plan] = {}
    times: dict[str, list[float]] = {}
    started, longest = time.monotonic(), 0.0

    def measured(count: int | None, fuse_norm: FuseNorm = False, fuse_attention: bool = False) -> None:
        nonlocal longest
        name, plan = candidates.plan(count, fuse_norm, fuse_attention=fuse_attention)
        at = time.monotonic()
        enough = count != 0 and len(times) > 1
        if seconds is not None and enough and name not in engines and at - started + longest > seconds:
            say(f"no time for the engine {name!r}")
            return
        swapped = sum(scheme != FLOAT for scheme in plan.values())
        say(f"the engine {name!r}: {swapped} of {len(candidates.report.swapped)} linears in int8")
        if name not in engines:
            engines[name] = build(onnx if name == FLOAT else _rewritten(onnx, plan), profiles, **settings)
        times[name] = measure.engine_us(engines[name], shapes, copies=1)
        plans[name] = plan
        longest = max(longest, time.monotonic() - at)

    tried: list[tuple[int | None, FuseNorm, bool]] = [(0, False, False)]
    if candidates.sizes:
        # With attention fused nothing is left to compile: the quickest build, and the fastest engine where it applies.
        if candidates.has_attentions and precision != "fp32":
            tried.append((None, candidates.has_norms, True))
        tried += [(None, False, False), *([(None, True, False)] if candidates.has_norms else [])]
        between: FuseNorm = "between" if candidates.has_norms else False
        tried += [(count, between, False) for count in range(1, len(candidates.sizes)) if not quick]
    # Engines that are there cost no build, and with one of them nothing has to be built when the time is short.
    tried.sort(key=lambda each: candidates.plan(each[0], each[1], fuse_attention=each[2])[0] not in engines)
    with keep_builder():
        for candidate in tried:
            measured(*candidate)
    chosen = choose(times)
    plan = plans[chosen]
    fastest = _by_profile(times, shapes, profiles)
    plan.measured = {"engines": times, "chosen": chosen, "fastest": fastest, "precision": precision}
    return plan


def choose(times: Mapping[str, Sequence[float]]) -> str:
    """The candidate with the least sum of times relative to "float" among those that are nowhere slower."""
    base = times[FLOAT]
    fit = [
        name
        for name, values in times.items()
        if name == FLOAT or all(v <= b * NOISE for v, b in zip(values, base, strict=True))
    ]
    return min(fit, key=lambda name: sum(v / b for v, b in zip(times[name], base, strict=True)))


def _by_profile(
    times: Mapping[str, Sequence[float]], shapes: Sequence[Mapping[str, Shape]], profiles: Sequence[Profile]
) -> list[str]:
    """For each profile the fastest at its requests; a profile without any gets what is never slower than float."""
    of: dict[int, list[int]] = {}
    for at, shape in enumerate(shapes):
        fitting = [i for i, profile in enumerate(profiles) if profile.covers(shape)]
        if fitting:  # as the Runner chooses
            of.setdefault(min(fitting, key=lambda i: profiles[i].distance(shape)), []).append(at)
    found = []
    for index in range(len(profiles)):
        mine = of.get(index) or list(range(len(shapes)))
        found.append(choose({name: [values[i] for i in mine] for name, values in times.items()}))
    return found


def _rewritten(onnx: Any, plan: Plan) -> ModelProto:
    report = rewrite(onnx if isinstance(onnx, (bytes, ModelProto)) else _in_memory(os.fspath(onnx)), plan=plan)
    assert report.model is not None
    return report.model


def _in_memory(path: str) -> ModelProto:
    """The model with all its weights inside."""
    model, reader = graph.load(path)
    for tensor in graph.all_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            value = numpy_helper.from_array(np.ascontiguousarray(reader.read(tensor)), tensor.name)
            tensor.CopyFrom(value)
    return model


def _without_data(model: ModelProto) -> ModelProto:
    """The same graph with weights of zeros, to find out quickly and in little memory what would be swapped."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in graph.all_tensors(copy):
        if graph.tensor_bytes(tensor) > graph.SMALL_BYTES and tensor.data_type in opdef.FLOATS:
            size = graph.tensor_bytes(tensor)
            shape, kind, name = list(tensor.dims), tensor.data_type, tensor.name
            tensor.Clear()
            tensor.dims.extend(shape)
            tensor.data_type, tensor.name, tensor.raw_data = kind, name, bytes(size)
    return copy
