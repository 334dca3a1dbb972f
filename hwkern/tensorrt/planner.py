"""``make_plan``: which matrix multiplies of a model become int8 on this GPU, by measuring.

1. The float engine and those with all linears in int8, norms apart and norms fused, are built and timed at each
   request (by default each profile's ``opt``).
2. Every kind of linear in the model (sizes, bias, activation) is built alone, in the float precision and as int8,
   and timed for the number of rows that each profile gives it. Those that are faster in int8 are the winners.
3. Engines with the winners and with the clear winners only are built whole and timed like the first. The plan is
   the fastest of all that is nowhere slower than float; if there is none, the plan keeps everything float. So a model
   that is rewritten by its plan is never slower than TensorRT's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hwkern._console import plain_table
from hwkern.tensorrt import graph, measure, opdef
from hwkern.tensorrt.builder import Engine, build, keep_builder
from hwkern.tensorrt.profiles import Profile, Shape
from hwkern.tensorrt.rewriter import NodeReport, Selector, rewrite

#: A whole engine counts as not slower while it is within the noise of two measurements of the same engine.
NOISE = 1.005
_CLEAR = 1.15  # a clear winner is this much faster alone

Progress = Callable[[str], None]


class Plan(dict[str, str]):
    """Node name → scheme or "float", with what was measured; goes into ``rewrite(plan=…)``.

    ``fuse_norm``: whether LayerNormalizations go into the products that read them.
    """

    def __init__(
        self, nodes: Mapping[str, str], measured: Mapping[str, Any] | None = None, fuse_norm: bool = False
    ) -> None:
        super().__init__(nodes)
        self.measured: dict[str, Any] = dict(measured or {})
        self.fuse_norm = fuse_norm

    def to_dict(self) -> dict[str, Any]:
        return {"nodes": dict(self), "fuse_norm": self.fuse_norm, "measured": self.measured}

    def save(self, path: str | os.PathLike[str]) -> None:
        """As JSON, for ``rewrite(plan=path)``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        linears = [
            (f"{k} x {n}", ", ".join(extra), f"{m}", f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}")
            for (k, n, *extra), m, a, b in self.measured.get("linears", [])
        ]
        engines = [
            (name, *(f"{t:.1f}" for t in times), "chosen" if name == self.measured.get("chosen") else "")
            for name, times in self.measured.get("engines", {}).items()
        ]
        columns = [f"request {i}, us" for i in range(len(engines[0]) - 2)] if engines else []
        return "\n\n".join(
            [
                plain_table(
                    "each linear alone", ("in x out", "with", "rows", "float us", "int8 us", "faster"), linears
                ),
                plain_table("the whole engine", ("candidate", *columns, ""), engines),
            ]
        )


@dataclass
class _Kind:
    """Linears that cost the same: one measurement for all."""

    key: tuple[Any, ...]  # (k, n, "bias", "gelu" …)
    names: list[str] = field(default_factory=list)
    rows: tuple[int, ...] = ()  # for each profile


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
    progress: Progress | None = None,
    engines: dict[str, Engine] | None = None,
    trt: ModuleType | str | None = None,
) -> Plan:
    """Measure on the GPU that is here which linears gain from int8. Takes about as long as six builds of the model.

    Args:
        onnx: the float model. profiles, precision, timing_cache, workspace, optimization_level, trt: as for ``build``.
        include, exclude: as for ``rewrite``.
        requests: input shapes at which whole engines are timed; default: each profile's ``opt``.
        quick: leave out steps 2 and 3, so that all linears are int8 or none is: three builds.
        progress: called with a sentence at each step.
        engines: takes the whole engines as they are built, by candidate ("float", "all", …; ``plan.measured["chosen"]``
            names the plan's own), which saves building the chosen one again.

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
    report = rewrite(_without_data(model), include=include, exclude=exclude, fuse_norm=True)
    kinds = _kinds(model, report.swapped, profiles)
    schemes = {node.name: node.scheme for node in report.swapped}
    others = {node.name: "float" for node in report.nodes}
    shapes = [profile.opt for profile in profiles] if requests is None else list(requests)
    candidates: dict[str, tuple[dict[str, str], bool]] = {}
    times: dict[str, list[float]] = {}

    def measured(name: str, nodes: dict[str, str], norms: bool = False) -> None:
        if (name != "float" and not nodes) or (nodes, norms) in candidates.values():
            return
        say(f"the engine {name!r}: {len(nodes)} of {len(schemes)} linears in int8")
        source = onnx if name == "float" else _rewritten(onnx, Plan({**others, **nodes}, fuse_norm=norms))
        engine = build(source, profiles, **settings)
        times[name] = measure.engine_us(engine, shapes, copies=1)
        candidates[name] = nodes, norms
        if engines is not None:
            engines[name] = engine

    gains: dict[int, float] = {}
    linears = []
    with keep_builder():
        measured("float", {})
        measured("all", schemes)
        if any(node.norm for node in report.nodes):
            measured("all, norms fused", schemes, norms=True)
        ints = {name: t for name, t in times.items() if name != "float"}
        norms = bool(ints) and candidates[_fastest(ints, times["float"])][1]
        for index, kind in enumerate(() if quick else kinds):
            say(f"{kind.key[0]} x {kind.key[1]}, {len(kind.names)} times, {kind.rows} rows")
            alone = list(zip(*_time_alone(kind, settings), strict=True))
            gains[index] = min(a / b for a, b in alone)
            linears += [(list(kind.key), m, a, b) for m, (a, b) in zip(kind.rows, alone, strict=True)]
        for name, least in () if quick else (("winners", 1.0), ("clear winners", _CLEAR)):
            won = [kind for index, kind in enumerate(kinds) if gains[index] >= least]
            measured(name, {n: schemes[n] for kind in won for n in kind.names}, norms)
    chosen = choose(times)
    nodes, norms = candidates[chosen]
    found = {"linears": linears, "engines": times, "chosen": chosen, "precision": precision}
    return Plan({**others, **nodes}, found, norms)


def choose(times: Mapping[str, Sequence[float]]) -> str:
    """The candidate with the least total among those that are at no profile slower than "float"."""
    base = times["float"]
    fit = [
        name
        for name, values in times.items()
        if name == "float" or all(v <= b * NOISE for v, b in zip(values, base, strict=True))
    ]
    return _fastest({name: times[name] for name in fit}, base)


def _fastest(times: Mapping[str, Sequence[float]], base: Sequence[float]) -> str:
    """The least sum of times relative to ``base``."""
    return min(times, key=lambda name: sum(v / b for v, b in zip(times[name], base, strict=True)))


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


def _kinds(model: ModelProto, nodes: Sequence[NodeReport], profiles: Sequence[Profile]) -> list[_Kind]:
    rows = _rows(model, nodes, profiles)
    kinds: dict[Any, _Kind] = {}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        group = node.merged or (node.name,)
        if node.name != group[0]:
            continue
        total = sum(by_name[name].out_features for name in group)
        extra = ["bias"] * node.bias + [node.activation] * (node.activation != "none")
        key = (node.in_features, total, *extra)
        kind = kinds.setdefault((key, rows[node.name]), _Kind(key, [], rows[node.name]))
        kind.names += group
    return list(kinds.values())


def _rows(model: ModelProto, nodes: Sequence[NodeReport], profiles: Sequence[Profile]) -> dict[str, tuple[int, ...]]:
    """How many rows each linear's x has at every profile's opt; by the names of dynamic axes where they are known."""
    types = graph.infer_shapes(model)
    inputs = {value.name: value for value in model.graph.input}
    found = {}
    for node in nodes:
        source = next(
            n for g in opdef.graphs(model.graph) for n in g.node if (n.name or n.output[0]) == node.name and n.input
        )
        _, dims = types.get(source.input[0], (0, None))
        counts = []
        for profile in profiles:
            sizes: dict[str, int] = {}
            for name, shape in profile.opt.items():
                axes = inputs[name].type.tensor_type.shape.dim if name in inputs else ()
                sizes.update({axis.dim_param: d for axis, d in zip(axes, shape, strict=False) if axis.dim_param})
            known = [sizes.get(d, 0) if isinstance(d, str) else d for d in (dims or (None,))[:-1]]
            # Axes without a name: as many rows as the largest dynamic input has elements.
            largest = max((math.prod(s) for s in profile.opt.values()), default=1)
            counts.append(math.prod(known) if known and all(known) else largest)  # type: ignore[arg-type]
        found[node.name] = tuple(counts)
    return found


def _time_alone(kind: _Kind, settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """µs of the linear alone for each number of rows: in float, in int8."""
    model = _linear(kind.key)
    profiles = [Profile({"x": (m, kind.key[0])}, {"x": (m, kind.key[0])}, {"x": (m, kind.key[0])}) for m in kind.rows]
    requests: list[dict[str, Shape]] = [{"x": (m, kind.key[0])} for m in kind.rows]
    int8 = rewrite(model, include="*").model
    assert int8 is not None
    return (
        measure.engine_us(build(model, profiles, **settings, edit=_half_io(settings)), requests),
        measure.engine_us(build(int8, profiles, **settings, edit=_half_io(settings)), requests),
    )


def _half_io(settings: Mapping[str, Any]) -> Callable[[Any], object]:
    """Let the lonely linear read and write the precision that it has inside a model, not the ONNX file's float32."""
    from hwkern.tensorrt import _api

    api = _api.find(settings["trt"])

    def edit(network: Any) -> None:
        if not api.strongly_typed and settings["precision"] == "fp16":
            network.get_input(0).dtype = network.get_output(0).dtype = api.module.float16

    return edit


def _linear(key: tuple[Any, ...]) -> ModelProto:
    k, n, *extra = key
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((k, n), dtype=np.float32) * np.float32(0.02)}
    nodes: list[NodeProto] = [helper.make_node("MatMul", ["x", "w"], ["t0"], name="linear")]

    def then(op: str, *inputs: str) -> None:
        nodes.append(helper.make_node(op, list(inputs), [f"t{len(nodes)}"]))

    if "bias" in extra:
        weights["b"] = np.zeros(n, np.float32)
        then("Add", "t0", "b")
    y = f"t{len(nodes) - 1}"
    constants = {"one": 1.0, "half": 0.5, "root": math.sqrt(0.5), "cube": 0.044715, "slope": math.sqrt(2 / math.pi)}
    weights.update({name: np.float32(value) for name, value in constants.items()})
    if "relu" in extra:
        then("Relu", y)
    elif "silu" in extra:
        then("Sigmoid", y)
        then("Mul", y, f"t{len(nodes) - 1}")
    elif "gelu" in extra:
        then("Mul", y, "root")
        then("Erf", f"t{len(nodes) - 1}")
        then("Add", f"t{len(nodes) - 1}", "one")
        then("Mul", f"t{len(nodes) - 1}", y)
        then("Mul", f"t{len(nodes) - 1}", "half")
    elif "gelu_tanh" in extra:
        then("Mul", y, y)
        then("Mul", f"t{len(nodes) - 1}", y)
        then("Mul", f"t{len(nodes) - 1}", "cube")
        then("Add", f"t{len(nodes) - 1}", y)
        then("Mul", f"t{len(nodes) - 1}", "slope")
        then("Tanh", f"t{len(nodes) - 1}")
        then("Add", f"t{len(nodes) - 1}", "one")
        then("Mul", f"t{len(nodes) - 1}", y)
        then("Mul", f"t{len(nodes) - 1}", "half")
    last = nodes[-1].output[0]
    made = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
