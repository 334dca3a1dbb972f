"""``rewrite``: the matrix multiplies of an ONNX model with constant weights become hwkern's int8 linear."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

import hwkern
from hwkern._console import plain_table
from hwkern.tensorrt import activations, attention, einsums, opdef
from hwkern.tensorrt.graph import (
    Array,
    Constant,
    Constants,
    DataFile,
    Scope,
    TensorReader,
    all_tensors,
    attribute,
    infer_shapes,
    keeps_data_outside,
    load,
    save,
    subgraphs,
    tensor_bytes,
    used_names,
)
from hwkern.tensorrt.opdef import Variant
from hwkern.tensorrt.packing import K_MAX, pack, quantize_weight

Selector = str | Callable[[str], bool] | Sequence["str | Callable[[str], bool]"]
Plan = Mapping[str, str]
FuseNorm = Literal[True, False, "between"]

# As hwkern.patch: below, quantizing x and rescaling y cost more than the product saves.
MIN_WEIGHTS = 2**17
MIN_FEATURES = 64
OLDEST_OPSET = 13
_HEADS = ("lm_head", "embed_out")


@dataclass
class NodeReport:
    """One MatMul or Gemm."""

    name: str  # the node's name, or its output's when it has none
    op: str
    #: "int8": a hwkern node now; "left": as it was.
    status: Literal["int8", "left"]
    reason: str = ""
    in_features: int = 0
    out_features: int = 0
    dtype: str = ""
    scheme: str = ""
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    weight: str = ""  # the initializer or Constant that holds the float weight
    output: str = ""  # name of the tensor that the hwkern node (or its part of a merged one) gives
    merged: tuple[str, ...] = ()  # nodes that share this one's product, itself included
    norm: str = ""  # the LayerNormalization that went into the node
    gate: str = ""  # the activation of gate and up, whose product went into the node


@dataclass
class RewriteReport:
    """What :func:`rewrite` did; ``print(report)`` shows a table."""

    nodes: list[NodeReport] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)  # what the attentions that became one node each give
    bytes_before: int = 0  # all constants
    bytes_after: int = 0
    model: ModelProto | None = field(default=None, repr=False)  # with dst=None: the new model

    @property
    def swapped(self) -> list[NodeReport]:
        return [node for node in self.nodes if node.status == "int8"]

    @property
    def left(self) -> list[NodeReport]:
        return [node for node in self.nodes if node.status == "left"]

    def to_dict(self) -> dict[str, Any]:
        totals = {"swapped": len(self.swapped), "left": len(self.left)}
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        attentions = {"attentions": self.attentions} if self.attentions else {}
        return {**totals, **sizes, **attentions, "nodes": [asdict(node) for node in self.nodes]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        rows = []
        for node in self.nodes:
            size = f"{node.in_features} x {node.out_features}" if node.in_features else ""
            extra = [node.scheme] if node.scheme else []
            extra += ["bias"] * node.bias + [node.activation] * (node.activation != "none")
            extra += ["residual"] * node.residual + [f"one of {len(node.merged)}"] * bool(node.merged)
            extra += ["norm"] * bool(node.norm) + [f"gated ({node.gate})"] * bool(node.gate)
            rows.append((node.name, node.op, size, node.status, node.reason or ", ".join(extra)))
        title = (
            f"{len(self.swapped)} of {len(self.nodes)} matrix multiplies are int8 now; constants "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        ) + f"; {len(self.attentions)} attentions are one node each" * bool(self.attentions)
        return plain_table(title, ("node", "op", "in x out", "status", "how or why not"), rows, left=5)


def rewrite(
    src: str | os.PathLike[str] | bytes | ModelProto,
    dst: str | os.PathLike[str] | None = None,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    scheme: str = "w8a8_dynamic",
    fuse_activation: bool = True,
    fuse_residual: bool = False,
    fuse_norm: FuseNorm | None = None,
    fuse_attention: bool | None = None,
    merge: bool | None = None,
    functions: bool = True,
    int32_weights: bool = False,
) -> RewriteReport:
    """Replace every MatMul and Gemm with a constant weight that is worth it, in a float or Q/DQ ONNX model.

    A bias that is added right after, an activation and, if asked, a residual go into the new node; products of the same
    x are merged into one (q, k and v of an attention become one product and a Split). Everything else stays: names of
    inputs, outputs and remaining tensors, dynamic axes, other nodes. Weights are quantized per output channel to the
    bits that ``hwkern.patch`` gives.

    Args:
        src: path, bytes or ModelProto (which is not changed). Data outside the model file is read from beside it. An
            opset before 13 is converted to 13 first.
        dst: where to write; None keeps the result in ``report.model``. A model with outside data, or of more than
            1.8 GB, gets ``<dst>.data`` beside it.
        include, exclude: node names: a pattern as in fnmatch, a predicate ``(name) -> bool``, or a sequence of both.
            What ``include`` names is also taken when it is small or an output head. ``exclude`` wins.
        plan: node name → scheme or ``"float"``, or the path of a JSON file with that under ``"nodes"`` (see
            ``make_plan``). Nodes that it does not name stay float.
        scheme: ``"w8a8_dynamic"`` (x quantized per token), ``"w8a16"`` (int8 weights only). In Q/DQ models a static
            symmetric scale of x is kept as ``"w8a8_static"`` and int8 weights are taken as they are.
        fuse_activation: ReLU, GELU, tanh-GELU and SiLU right after the product go into the node. Where
            ``activation(gate) · up`` of two products of the same x leads to a third product alone, it goes into that
            one, and gate and up become one product.
        fuse_residual: so does an addition of a tensor of the same shape.
        fuse_norm: a LayerNormalization or RMS norm (and the addition before it) whose result the product reads goes
            into the node, which gives the normalized tensor and the sum to whoever else reads them. "between": only
            when what is normalized comes from an int8 product too. None: as the plan says, else no.
        fuse_attention: an attention whose q, k and v become one int8 product goes into a node of its own, with rotary
            embeddings, shared heads, scale and mask (a constant causal one is not read at all), where its heads have
            32, 64 or 128 columns. TensorRT runs that node in 16 bits: not for ``precision="fp32"``. None: as the plan
            says, else no.
        merge: merge products that share x. None: as the plan says, else yes.
        functions: add a body in standard ops, so that onnx's evaluator and ONNX Runtime run the file.
        int32_weights: store packed weights as INT32, for TensorRT 8.6 and 10.0 outside ``hwkern.tensorrt.build``
            (which does that by itself).

    Returns:
        A :class:`RewriteReport`: each matrix multiply, swapped or with the reason why not.

    Raises:
        ValueError: not an ONNX model, an opset that cannot be converted, an unknown scheme, a selector or plan that
            matches nothing.
        FileNotFoundError: a file is missing.
    """
    if scheme not in ("w8a8_dynamic", "w8a16"):
        raise ValueError(
            f"scheme = {scheme!r}: it must be 'w8a8_dynamic' or 'w8a16' (static scales come from Q/DQ nodes)."
        )
    model, reader = load(src)
    model = _at_least_opset_13(model)
    target = None if dst is None else Path(dst)
    data = None
    if keeps_data_outside(model):
        if target is None:
            raise ValueError("This model keeps its weights outside its file (or is over 1.8 GB): give dst, a path.")
        data = DataFile(target.with_name(target.name + ".data"))
    try:
        nodes, norms, attentions, merges = _plan(plan)
        norms = norms if fuse_norm is None else fuse_norm
        merge = merges if merge is None else merge
        job = _Rewriter(model, reader, data, fuse_activation, fuse_residual, norms, merge, int32_weights)
        job.fuse_attention = attentions if fuse_attention is None else fuse_attention
        job.choice = _Choice(include, exclude, nodes, scheme)
        report = job.run(functions)
        if target is not None:
            save(model, target, data, reader)
        else:
            report.model = model
    except BaseException:
        if data is not None:
            data.abandon()
        raise
    return report


def _at_least_opset_13(model: ModelProto) -> ModelProto:
    """The model, converted when it is older: the function bodies are written for 13 and newer."""
    opset = opdef.opset_version(model)
    if opset >= OLDEST_OPSET:
        return model
    sentence = f"The model uses opset {opset}: rewrite needs {OLDEST_OPSET} or newer"
    if keeps_data_outside(model):
        raise ValueError(f"{sentence}, and converts older models only when their weights are inside: export it anew.")
    try:
        return version_converter.convert_version(model, OLDEST_OPSET)
    except Exception as error:
        raise ValueError(f"{sentence}, and onnx cannot convert it ({error}): export it anew.") from error


# ---- which nodes ---------------------------------------------------------------------------------------------------


def _plan(plan: Plan | str | os.PathLike[str] | None) -> tuple[dict[str, str] | None, FuseNorm, bool, bool]:
    """(node name → scheme, whether norms are fused, whether attentions are, whether products of the same x are
    merged)."""
    if plan is None:
        return None, False, False, True
    if isinstance(plan, (str, os.PathLike)):
        plan = json.loads(Path(plan).read_text(encoding="utf-8"))
    if not isinstance(plan, Mapping):
        raise ValueError('A plan is a mapping of node names to schemes, or a JSON object with one under "nodes".')
    entries = plan.get("nodes", plan)
    if not isinstance(entries, Mapping):
        raise ValueError('A plan is a mapping of node names to schemes, or a JSON object with one under "nodes".')

    def option(name: str, default: bool) -> Any:
        return getattr(plan, name, default) if entries is plan else plan.get(name, default)

    norms = option("fuse_norm", False)
    for name, scheme in entries.items():
        if scheme not in (*opdef.SCHEMES, "float"):
            raise ValueError(f"plan: {name!r} → {scheme!r}: it must be 'float' or one of {', '.join(opdef.SCHEMES)}.")
    if norms not in (True, False, "between"):
        raise ValueError(f'plan: fuse_norm is {norms!r}: it must be true, false or "between".')
    chosen: FuseNorm = "between" if norms == "between" else bool(norms)
    return dict(entries), chosen, bool(option("fuse_attention", False)), bool(option("merge", True))


class _Choice:
    def __init__(
        self, include: Selector | None, exclude: Selector | None, plan: dict[str, str] | None, scheme: str
    ) -> None:
        self.include, self.exclude = self._entries("include", include), self._entries("exclude", exclude)
        self.plan, self.scheme = plan, scheme
        self.seen: list[str] = []

    @staticmethod
    def _entries(which: str, selector: Selector | None) -> list[str | Callable[[str], bool]] | None:
        if selector is None:
            return None
        entries = [selector] if isinstance(selector, str) or callable(selector) else list(selector)
        for entry in entries:
            if not (isinstance(entry, str) or callable(entry)):
                raise TypeError(f"{which} holds {entry!r}: it must be a name pattern or a predicate.")
        return entries

    @staticmethod
    def _matches(entries: Iterable[str | Callable[[str], bool]], name: str) -> bool:
        return any(fnmatchcase(name, e) if isinstance(e, str) else e(name) for e in entries)

    def named(self, name: str) -> bool:
        """Whether the user asked for this very node."""
        by_plan = self.plan is not None and self.plan.get(name, "float") != "float"
        return by_plan or (self.include is not None and self._matches(self.include, name))

    def problem(self, name: str) -> str:
        self.seen.append(name)
        if self.exclude is not None and self._matches(self.exclude, name):
            return "exclude names it"
        if self.include is not None and not self._matches(self.include, name):
            return "include does not name it"
        if self.plan is not None and self.plan.get(name, "float") == "float":
            return "the plan keeps it float" if name in self.plan else "the plan does not name it"
        return ""

    def scheme_of(self, name: str) -> str:
        return self.plan[name] if self.plan is not None else self.scheme

    def check(self) -> None:
        """Every pattern and every name of the plan matched something."""
        for which, entries in (("include", self.include), ("exclude", self.exclude)):
            for entry in entries or ():
                if isinstance(entry, str) and not any(fnmatchcase(name, entry) for name in self.seen):
                    raise ValueError(f"{which} = {entry!r} matches no MatMul or Gemm; there are: {self._some()}.")
        unknown = [name for name in self.plan or () if name not in self.seen]
        if unknown:
            raise ValueError(f"The plan names {unknown[0]!r}, but the model has: {self._some()}.")

    def _some(self) -> str:
        return ", ".join(self.seen[:6]) + (f" … ({len(self.seen)} in all)" if len(self.seen) > 6 else "")


# ---- one linear while it is taken out of the graph -----------------------------------------------------------------


class _LeftError(Exception):
    """A matrix multiply stays as it is; the text is the reason."""


@dataclass
class _Linear:
    report: NodeReport
    nodes: list[NodeProto]  # what it replaces: the product, and what is fused into it
    x: str
    weight: Constant  # [N, K] after `rows`
    rows: Callable[[Array], Array]  # the constant's value → [N, K]
    factor: float
    dtype: int
    output: str
    scheme: str
    input_scale: float | None = None
    bias: Constant | None = None
    bias_factor: float = 1.0
    activation: str = "none"
    residual: str = ""
    gate: str = ""  # x is the product of gate and up, before this activation
    rest: tuple[_Linear, ...] = ()  # what makes one product with it, for another node to split

    @property
    def product(self) -> NodeProto:
        return self.nodes[0]

    @property
    def n(self) -> int:
        return self.report.out_features

    @property
    def k(self) -> int:
        return self.report.in_features

    def variant(self, int32_weight: bool) -> Variant:
        return Variant(
            self.dtype, self.scheme, self.activation, self.bias is not None, bool(self.residual), int32_weight,
            gate=self.gate,
        )  # fmt: skip


@dataclass
class _Norm:
    """A LayerNormalization, or the nodes of an RMS norm, that go into the product which reads them."""

    nodes: list[NodeProto]  # the norm, its last node first, and the addition before it
    x: str
    skip: str
    weight: str
    bias: str
    epsilon: float
    output: str  # the normalized tensor, if somebody else reads it
    sum: str  # x + skip, likewise
    kind: str = "layer"

    @property
    def variant(self) -> opdef.Norm:
        return opdef.Norm(bool(self.bias), bool(self.skip), bool(self.output), bool(self.sum), self.kind)


class _Rewriter:
    choice: _Choice
    fuse_attention: bool = False
    taken: set[int]  # ids of this graph's additions that are in a product as its residual
    made: set[str]  # what this graph's int8 products give

    def __init__(
        self,
        model: ModelProto,
        reader: TensorReader,
        data: DataFile | None,
        fuse_activation: bool,
        fuse_residual: bool,
        fuse_norm: FuseNorm,
        merge: bool,
        int32_weights: bool,
    ) -> None:
        self.model, self.reader, self.data = model, reader, data
        self.fuse_activation, self.fuse_residual, self.fuse_norm = fuse_activation, fuse_residual, fuse_norm
        self.merge = merge
        self.int32_weights = int32_weights
        self.constants = Constants(reader, overridable=model.ir_version < 4)
        self.types = infer_shapes(model)
        self.names = self._all_names()
        self.packed: dict[tuple[Any, ...], tuple[str, str]] = {}
        self.stored: dict[tuple[Any, ...], str] = {}
        self.variants: list[Variant | opdef.Attention] = []
        self.gathered: set[str] = set()
        self.report = RewriteReport()

    def run(self, functions: bool) -> RewriteReport:
        self.report.bytes_before = sum(map(tensor_bytes, all_tensors(self.model)))
        self._note_embeddings(Scope(self.model.graph))
        self._graph(self.model.graph, None)
        self.choice.check()
        if self.variants:
            opdef.add_functions(self.model, self.variants)
            if not functions:
                opdef.strip_functions(self.model)
            opdef.set_metadata(self.model, self._metadata())
        self.report.bytes_after = sum(map(tensor_bytes, all_tensors(self.model)))
        return self.report

    def _metadata(self) -> dict[str, Any]:
        plan = {node.name: node.scheme or "float" for node in self.report.nodes}
        # Types are those of the model as it was: nobody knows what a hwkern node gives.
        products = einsums.find(self.model.graph, self.types)
        return {"hwkern": hwkern.__version__, "op_version": opdef.PLUGIN_VERSION, "nodes": plan, "products": products}

    # ---- finding ---------------------------------------------------------------------------------------------------

    def _graph(self, graph: GraphProto, parent: Scope | None) -> None:
        scope = Scope(graph, parent)
        for node in graph.node:
            for inner in subgraphs(node):
                self._graph(inner, scope)
        found: list[_Linear] = []
        reads, self.taken = _Reads(graph), set()
        for node in graph.node:
            if node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx"):
                report = NodeReport(node.name or node.output[0], node.op_type, "left")
                self.report.nodes.append(report)
                problem = self.choice.problem(report.name)
                try:
                    linear = self._linear(node, scope, report)
                    if problem:
                        raise _LeftError(problem)
                    self._worth(linear)
                except _LeftError as left:
                    report.reason = str(left)
                    continue
                self._fuse(linear, scope, reads)
                found.append(linear)
        if not found:
            return
        removed: list[NodeProto] = []
        placed: dict[int, list[NodeProto]] = {}  # id of a node → the nodes that come in its place
        if self.fuse_activation and self.merge:
            self._fuse_gates(found, scope, reads)
        if self.fuse_attention and self.merge:
            removed += self._fuse_attentions(found, scope, reads, placed)
        self.made = {linear.output for linear in found}
        normed: set[str] = set()  # a norm goes into one product
        taken = {id(node) for linear in found for node in linear.nodes}
        for group in self._groups(found):
            norm = self._norm(group, scope, reads, taken) if self.fuse_norm and group[0].x not in normed else None
            at, nodes = self._emit(group, norm)
            placed[id(at)] = nodes
            removed += [node for linear in group for node in linear.nodes]
            if norm is not None:
                normed.add(group[0].x)
                removed += norm.nodes
        gone = {id(node) for node in removed}
        nodes = [new for node in graph.node for new in placed.get(id(node), () if id(node) in gone else (node,))]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        inputs = [name for node in removed for name in node.input]
        del graph.node[:]
        graph.node.extend(copies)
        self._drop_unused(graph, parent, inputs)

    def _linear(self, node: NodeProto, scope: Scope, report: NodeReport) -> _Linear:
        """The product alone. Raises _LeftError."""
        if node.op_type == "Gemm":
            return self._gemm(node, scope, report)
        weight = self.constants.find(node.input[1], scope)
        if weight is None:
            if self.constants.find(node.input[0], scope) is not None:
                raise _LeftError("its constant is on the left")
            raise _LeftError("no constant weight")
        shape = weight.shape
        if len(shape) < 2:
            raise _LeftError("its weight is a vector")
        if math.prod(shape[:-2]) != 1:
            raise _LeftError(f"a batch of weights {shape}")
        k, n = shape[-2:]
        x_rank = self._rank(node.input[0])
        if x_rank == 1:
            raise _LeftError("its input is a vector")
        if len(shape) > 2 and (x_rank is None or x_rank < len(shape)):
            raise _LeftError(f"its weight {shape} has more dimensions than its input")

        def rows(a: Array) -> Array:
            return a.reshape(k, n).T

        return self._make(node, report, node.input[0], weight, rows, n, k, 1.0, scope)

    def _gemm(self, node: NodeProto, scope: Scope, report: NodeReport) -> _Linear:
        weight = self.constants.find(node.input[1], scope)
        if weight is None:
            raise _LeftError("no constant weight")
        if len(weight.shape) != 2:
            raise _LeftError(f"its weight has the shape {weight.shape}")
        if attribute(node, "transA", 0):
            raise _LeftError("transA: its input is read column by column")
        transposed = bool(attribute(node, "transB", 0))
        n, k = weight.shape if transposed else weight.shape[::-1]
        rows: Callable[[Array], Array] = (lambda a: a) if transposed else (lambda a: a.T)
        alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
        if not math.isfinite(alpha) or alpha == 0:
            raise _LeftError(f"alpha = {alpha}")
        bias = None
        if len(node.input) > 2 and node.input[2] and beta != 0:
            bias = self.constants.find(node.input[2], scope)
            if bias is None:
                raise _LeftError("its third input is not constant")
            if not _is_bias(bias, n, 2):
                raise _LeftError(f"its third input has the shape {bias.shape}, not one value per output")
        linear = self._make(node, report, node.input[0], weight, rows, n, k, alpha, scope)
        linear.bias, linear.bias_factor = bias, beta
        return linear

    def _make(
        self,
        node: NodeProto,
        report: NodeReport,
        x: str,
        weight: Constant,
        rows: Callable[[Array], Array],
        n: int,
        k: int,
        factor: float,
        scope: Scope,
    ) -> _Linear:
        report.in_features, report.out_features, report.weight = k, n, weight.root
        report.output = node.output[0]
        if weight.element not in opdef.FLOATS:
            raise _LeftError(f"its weight is {TensorProto.DataType.Name(weight.element).lower()}")
        report.dtype = opdef.FLOATS[weight.element]
        report.bias = False
        if n == 0 or k == 0:
            raise _LeftError("its weight is empty")
        if k > K_MAX:
            raise _LeftError(f"K = {k}: an int32 sum is exact only below 2**17")
        scheme = self.choice.scheme_of(report.name) if self._is_chosen(report.name) else self.choice.scheme
        linear = _Linear(report, [node], x, weight, rows, factor, weight.element, node.output[0], scheme)
        self._static_scale(linear, scope)
        return linear

    def _is_chosen(self, name: str) -> bool:
        return self.choice.plan is None or self.choice.plan.get(name, "float") != "float"

    def _static_scale(self, linear: _Linear, scope: Scope) -> None:
        """x behind QuantizeLinear, DequantizeLinear: take its static scale, or x itself where the scale is no use."""
        dq = scope.producers.get(linear.x)
        if dq is None or dq.op_type != "DequantizeLinear":
            if linear.scheme == "w8a8_static":
                raise _LeftError("the plan wants a static scale, but there is no Q/DQ pair on its input")
            return
        q = scope.producers.get(dq.input[0])
        if q is None or q.op_type != "QuantizeLinear":
            raise _LeftError("its input is dequantized from a tensor that no QuantizeLinear gives")
        if self._element(q.input[0]) not in (None, linear.dtype):
            raise _LeftError("its input has another type before it is quantized")
        scale = self.constants.scalar(q.input[1], scope)
        same = scale is not None and scale == self.constants.scalar(dq.input[1], scope)
        zero = self.constants.find(q.input[2], scope) if len(q.input) > 2 and q.input[2] else None
        symmetric = zero is not None and zero.element == TensorProto.INT8 and not zero.load().any()
        linear.x = q.input[0]
        if scale is not None and same and symmetric and scale > 0 and linear.scheme != "w8a16":
            linear.scheme, linear.input_scale = "w8a8_static", scale
        elif linear.scheme == "w8a8_static":
            raise _LeftError("the plan wants a static scale, but its input's scale is per channel or asymmetric")

    def _worth(self, linear: _Linear) -> None:
        """Raises _LeftError for what is better left as it is, unless the user names it."""
        report = linear.report
        if self.choice.named(report.name):
            return
        if report.in_features * report.out_features < MIN_WEIGHTS:
            raise _LeftError(f"small: fewer than {MIN_WEIGHTS} weights")
        if min(report.in_features, report.out_features) < MIN_FEATURES:
            raise _LeftError(f"small: fewer than {MIN_FEATURES} inputs or outputs")
        if linear.weight.root in self.gathered:
            raise _LeftError("an output head: it shares its weight with an embedding")
        if any(head in name for head in _HEADS for name in (report.name, report.weight)):
            raise _LeftError("an output head")

    def _note_embeddings(self, scope: Scope) -> None:
        for node in scope.graph.node:
            if node.op_type == "Gather" and (found := self.constants.find(node.input[0], scope)) is not None:
                self.gathered.add(found.root)
            for inner in subgraphs(node):
                self._note_embeddings(Scope(inner, scope))

    def _rank(self, name: str) -> int | None:
        _, dims = self.types.get(name, (0, None))
        return None if dims is None else len(dims)

    def _element(self, name: str) -> int | None:
        return self.types[name][0] or None if name in self.types else None

    # ---- fusing ----------------------------------------------------------------------------------------------------

    def _fuse(self, linear: _Linear, scope: Scope, reads: _Reads) -> None:
        if linear.bias is None:
            self._fuse_bias(linear, scope, reads)
        if self.fuse_activation and linear.scheme in opdef.SCHEMES:
            found = activations.find(
                linear.output, reads.consumers, lambda name: self.constants.scalar(name, scope), reads.escapes
            )
            if found is not None and not any(n.op_type == "Cast" for n in found[1]):
                linear.activation, nodes = found
                linear.nodes += nodes
                linear.output = nodes[-1].output[0]
        if self.fuse_residual:
            self._fuse_residual(linear, scope, reads)
        report = linear.report
        report.status, report.scheme, report.bias = "int8", linear.scheme, linear.bias is not None
        report.activation, report.residual, report.output = linear.activation, bool(linear.residual), linear.output

    def _fuse_bias(self, linear: _Linear, scope: Scope, reads: _Reads) -> None:
        node = reads.only_consumer(linear.output)
        if node is None or node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            return
        other = node.input[1] if node.input[0] == linear.output else node.input[0]
        bias = self.constants.find(other, scope)
        rank = self._rank(linear.output)
        if bias is not None and bias.element == linear.dtype and _is_bias(bias, linear.n, 2 if rank is None else rank):
            linear.bias = bias
            linear.nodes.append(node)
            linear.output = node.output[0]

    def _fuse_residual(self, linear: _Linear, scope: Scope, reads: _Reads) -> None:
        node = reads.only_consumer(linear.output)
        if node is None or node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            return
        other = node.input[1] if node.input[0] == linear.output else node.input[0]
        _, dims = self.types.get(linear.output, (0, None))
        kind, others = self.types.get(other, (0, None))
        if dims is None or dims != others or None in dims or kind != linear.dtype or other == linear.output:
            return
        if id(node) in self.taken:  # the sum of two products: the first has it
            return
        if self.constants.find(other, scope) is None:
            linear.residual = other
            linear.nodes.append(node)
            self.taken.add(id(node))
            linear.output = node.output[0]

    def _fuse_gates(self, found: list[_Linear], scope: Scope, reads: _Reads) -> None:
        """activation(gate) · up into the product that alone reads it, which splits the product of both then."""
        by_output = {linear.output: linear for linear in found}
        for down in found:
            node = scope.producers.get(down.x)
            if node is None or node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
                continue
            a, b = (by_output.get(name) for name in node.input)
            if a is None or b is None or a is b or down.scheme == "w8a16" or down.k != a.n or a.n != b.n:
                continue
            gate, up = (a, b) if b.activation == "none" else (b, a)
            alone = all(reads.only_consumer(linear.output) is node for linear in (a, b))
            if (
                alone
                and reads.only_consumer(down.x) is down.product
                and up.activation == "none"
                and self._kind(gate) == self._kind(up)
                and down.dtype == gate.dtype
                and not (gate.residual or up.residual)
            ):
                down.gate = down.report.gate = gate.activation
                gate.activation = gate.report.activation = "none"
                gate.nodes.append(node)
                down.x = self._one_product([gate, up], "gate_up")

    def _fuse_attentions(
        self, found: list[_Linear], scope: Scope, reads: _Reads, placed: dict[int, list[NodeProto]]
    ) -> list[NodeProto]:
        """Attention between products as a node each, which come into ``placed``; returns the nodes that go."""

        def private(nodes: list[NodeProto], last: str) -> bool:
            inside = {id(node) for node in nodes}
            names = [name for node in nodes for name in node.output if name and name != last]
            return all(
                not reads.escapes(name) and all(id(n) in inside for n in reads.consumers.get(name, ()))
                for name in names
            )

        by_output = {linear.output: linear for linear in found}
        order = {id(node): i for i, node in enumerate(scope.graph.node)}
        removed: list[NodeProto] = []
        for each in attention.Finder(scope, self.types, self.constants, reads.only_consumer, private).find():
            linears = [by_output.get(name) for name in (each.q, each.k, each.v)]
            group = [linear for linear in linears if linear is not None]
            tables = [self.constants.find(name, scope) for name in (each.cosine, each.sine) if name]
            if (
                len({id(linear) for linear in group}) != 3
                or len({self._kind(linear) for linear in group}) != 1
                or any(linear.activation != "none" or linear.residual or linear.rest for linear in group)
                or not all(reads.only_consumer(linear.output) for linear in group)
                or None in tables
            ):
                continue
            dtype = group[0].dtype
            variant = opdef.Attention(
                dtype, each.heads, each.kv_heads, each.dim, each.causal, bool(tables), bool(each.mask)
            )
            inputs = [self._one_product(group, "qkv")]
            for table in filter(None, tables):
                inputs.append(self._store(("table", table.key), f"{table.root}_table", partial(_float32, table)))
            inputs += [each.mask] * bool(each.mask)
            last = max(each.nodes, key=lambda node: order[id(node)])
            placed[id(last)] = [variant.node(inputs, each.y, self._unique(f"{each.y}_attention"), each.scale)]
            self.variants.append(variant)
            self.report.attentions.append(each.y)
            removed += each.nodes
        return removed

    def _one_product(self, group: list[_Linear], name: str) -> str:
        """The name of the product of these, in this order, which is not split."""
        output = self._unique(f"{group[0].output}_{name}")
        for linear in group:
            linear.output = linear.report.output = output
        group[0].rest = tuple(group[1:])
        return output

    def _norm(self, group: list[_Linear], scope: Scope, reads: _Reads, taken: set[int]) -> _Norm | None:
        """The norm over the last dimension that gives x, in the same graph."""
        first = group[0]
        if first.scheme == "w8a16" or first.residual:  # the residual is made after the norm, perhaps
            return None
        norm = self._layer_norm(first, scope, reads) or self._rms_norm(first, scope, reads)
        if norm is None or self._element(norm.x) != first.dtype:
            return None
        for name in filter(None, (norm.weight, norm.bias)):
            value = self.constants.find(name, scope)
            if value is None or tuple(value.shape) != (first.k,):
                return None
        norm.output = self._also_read(first.x, [linear.product for linear in group], reads)
        order = {id(n): i for i, n in enumerate(scope.graph.node)}
        inside = {id(node) for node in norm.nodes}
        add = next((n for n in scope.graph.node if norm.x in n.output), None)
        if (
            add is not None
            and add.op_type == "Add"
            and add.domain in ("", "ai.onnx")
            and id(add) not in taken  # by the product before it, as its bias or residual
            and not any(
                order[id(n)] < order[id(norm.nodes[0])] and id(n) not in inside for n in reads.consumers[norm.x]
            )
        ):
            (_, a), (_, b) = (self.types.get(name, (0, None)) for name in add.input)
            constant = any(self.constants.find(name, scope) is not None for name in add.input)
            if a is not None and a == b and None not in a and not constant:
                norm.sum = self._also_read(norm.x, norm.nodes, reads)
                norm.x, norm.skip = add.input
                norm.nodes.append(add)
        if self.fuse_norm == "between" and not {norm.x, norm.skip} & self.made:
            return None
        for linear in group:
            linear.report.norm = norm.nodes[0].name or norm.nodes[0].output[0]
        return norm

    def _layer_norm(self, first: _Linear, scope: Scope, reads: _Reads) -> _Norm | None:
        node = next((n for n in scope.graph.node if first.x in n.output), None)
        if (
            node is None
            or (node.op_type, node.domain) not in (("LayerNormalization", ""), ("LayerNormalization", "ai.onnx"))
            or first.x != node.output[0]
            or any(name and (name in reads.consumers or reads.escapes(name)) for name in node.output[1:])
            or attribute(node, "stash_type", TensorProto.FLOAT) != TensorProto.FLOAT
        ):
            return None
        rank, axis = self._rank(node.input[0]), attribute(node, "axis", -1)
        if axis != -1 and (rank is None or axis != rank - 1):
            return None
        weight, bias = [*node.input[1:], ""][:2]
        return _Norm([node], node.input[0], "", weight, bias, attribute(node, "epsilon", 1e-5), "", "")

    def _rms_norm(self, first: _Linear, scope: Scope, reads: _Reads) -> _Norm | None:
        """x = weight · h / sqrt(mean(h²) + epsilon), as exporters write it before ONNX had an operator for it, all in
        one float type; a cast of that type to itself may stand before the weight."""
        made = {name: node for node in scope.graph.node for name in node.output}
        nodes: list[NodeProto] = []
        if self.types.get(first.x, (None,))[0] != first.dtype:
            return None

        def by(name: str, *ops: str) -> NodeProto | None:
            """The node that gives ``name``, casts of one type to itself left out, if it is one of these."""
            node = made.get(name)
            while node is not None and node.op_type == "Cast" and attribute(node, "to", 0) == first.dtype:
                if self._element(node.input[0]) != first.dtype:
                    return None
                nodes.append(node)
                node = made.get(node.input[0])
            if node is None or node.op_type not in ops or node.domain not in ("", "ai.onnx"):
                return None
            nodes.append(node)
            return node

        def number(name: str) -> float | None:
            value = self.constants.find(name, scope)
            if value is None or int(np.prod(value.shape, dtype=np.int64)) != 1:
                return None
            return float(np.asarray(value.load()).reshape(-1)[0])

        def other(node: NodeProto, test: Callable[[str], bool]) -> tuple[str, str] | None:
            """(the input for which ``test`` holds, the other one)."""
            for i in (0, 1):
                if test(node.input[i]):
                    return node.input[i], node.input[1 - i]
            return None

        scaled = by(first.x, "Mul")
        split = None if scaled is None else other(scaled, lambda name: self.constants.find(name, scope) is not None)
        product = None if split is None else by(split[1], "Mul")
        if split is None or product is None:
            return None
        for inverse, h in (tuple(product.input), tuple(product.input)[::-1]):
            kept = list(nodes)
            divided = by(inverse, "Div", "Reciprocal")
            if divided is not None and divided.op_type == "Div" and number(divided.input[0]) != 1.0:
                divided = None
            root = None if divided is None else by(divided.input[-1], "Sqrt")
            total = None if root is None else by(root.input[0], "Add")
            parts = None if total is None else other(total, lambda name: number(name) is not None)
            mean = None if parts is None else by(parts[1], "ReduceMean")
            square = None if mean is None else by(mean.input[0], "Pow", "Mul")
            if (
                parts is not None
                and mean is not None
                and square is not None
                and self._last_axis(mean, scope)
                and attribute(mean, "keepdims", 1) == 1
            ):
                twice = square.op_type == "Mul" or number(square.input[1]) == 2.0
                same = square.input[0] == h and (square.op_type == "Pow" or square.input[1] == h)
                inside = {id(node) for node in nodes}
                private = all(
                    not reads.escapes(name) and all(id(n) in inside for n in reads.consumers.get(name, ()))
                    for node in nodes
                    if first.x not in node.output
                    for name in node.output
                )
                if twice and same and private and (epsilon := number(parts[0])) is not None and epsilon >= 0:
                    return _Norm(nodes, h, "", split[0], "", epsilon, "", "", "rms")
            nodes[:] = kept
        return None

    def _last_axis(self, node: NodeProto, scope: Scope) -> bool:
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and (value := self.constants.find(node.input[1], scope)) is not None:
            axes = np.asarray(value.load()).reshape(-1).tolist()
        rank = self._rank(node.input[0])
        return axes is not None and list(axes) in ([-1], [] if rank is None else [rank - 1])

    @staticmethod
    def _also_read(name: str, readers: Sequence[NodeProto], reads: _Reads) -> str:
        """The name, when others than these nodes read it."""
        others = [n for n in reads.consumers.get(name, ()) if not any(n is reader for reader in readers)]
        return name if others or reads.escapes(name) else ""

    def _groups(self, found: list[_Linear]) -> list[list[_Linear]]:
        """Linears of the same x and kind together, the rest alone; in graph order."""
        groups: dict[Any, list[_Linear]] = {}
        rest = {id(other) for linear in found for other in linear.rest}
        for linear in found:
            if linear.rest:
                groups[id(linear)] = [linear, *linear.rest]
            elif id(linear) not in rest:
                can = self.merge and linear.activation == "none" and not linear.residual
                groups.setdefault(self._kind(linear) if can else id(linear), []).append(linear)
        for group in groups.values():
            if len(group) > 1:
                for linear in group:
                    linear.report.merged = tuple(other.report.name for other in group)
        return list(groups.values())

    @staticmethod
    def _kind(linear: _Linear) -> tuple[Any, ...]:
        """What linears have in common that may be one product."""
        return (linear.x, linear.scheme, linear.dtype, linear.bias is not None, linear.input_scale, linear.k)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _emit(self, group: list[_Linear], norm: _Norm | None) -> tuple[NodeProto, list[NodeProto]]:
        """The nodes for one product (or several of the same x), and the node that they take the place of."""
        first = group[0]
        variant = first.variant(self.int32_weights)
        weight, scale = self._weight(group)
        inputs = [first.x] if norm is None else [name for name in (norm.x, norm.skip, norm.weight, norm.bias) if name]
        inputs += [weight, scale]
        if first.bias is not None:
            inputs.append(self._bias(group))
        if first.input_scale is not None:
            key = ("scale", first.input_scale)
            inputs.append(self._store(key, "input_scale", lambda: np.array([first.input_scale], np.float32)))
        if first.residual:
            inputs.append(first.residual)
        name = first.product.name or first.product.output[0]
        split: list[NodeProto] = []
        outputs, n, at = [first.output], first.n, first.nodes[-1]
        if len(group) > 1:
            n, at = sum(linear.n for linear in group), first.product
        if len(group) > 1 and not first.rest:
            outputs = [self._unique(f"{first.output}_merged")]
            sizes = self._store(
                ("sizes", *(linear.n for linear in group)),
                "split_sizes",
                lambda: np.array([linear.n for linear in group], np.int64),
            )
            parts = [linear.output for linear in group]
            split = [helper.make_node("Split", [*outputs, sizes], parts, name=self._unique(f"{name}_split"), axis=-1)]
        epsilon = 0.0
        if norm is not None:
            variant, epsilon, at = replace(variant, norm=norm.variant), norm.epsilon, norm.nodes[0]
            outputs += [name for name in (norm.output, norm.sum) if name]
        self.variants.append(variant)
        return at, [opdef.make_node(variant, first.k, n, inputs, outputs, name, epsilon), *split]

    def _weight(self, group: list[_Linear]) -> tuple[str, str]:
        parts_key = tuple((*linear.weight.key, linear.report.op, linear.factor, linear.n) for linear in group)
        key = (parts_key, group[0].input_scale)
        if key in self.packed:
            return self.packed[key]
        parts = [_packed(linear) for linear in group]
        weight = np.concatenate([p for p, _ in parts]) if len(parts) > 1 else parts[0][0]
        scale = np.concatenate([s for _, s in parts]) if len(parts) > 1 else parts[0][1]
        stem = group[0].weight.root
        if self.int32_weights:
            weight = weight.view(np.int32)
        if group[0].input_scale is not None:
            scale = scale * np.float32(group[0].input_scale)
        self.packed[key] = self._add(weight, f"{stem}_int8"), self._add(scale, f"{stem}_scale")
        return self.packed[key]

    def _bias(self, group: list[_Linear]) -> str:
        def value() -> Array:
            return np.concatenate([_bias_vector(linear) for linear in group])

        key = ("bias", *((linear.bias.key, linear.bias_factor, linear.n) for linear in group if linear.bias))
        first = group[0]
        assert first.bias is not None
        plain = len(group) == 1 and first.bias.shape == (first.n,) and first.bias_factor == 1.0
        if plain and first.bias.key[0] == "initializer" and len(first.bias.key) == 3:
            return first.bias.root  # as it is
        return self._store(key, f"{first.bias.root}_bias", value)

    def _store(self, key: tuple[Any, ...], name: str, value: Callable[[], Array]) -> str:
        if key not in self.stored:
            self.stored[key] = self._add(value(), name)
        return self.stored[key]

    def _add(self, value: Array, name: str) -> str:
        """A new initializer of the main graph (subgraphs see it too)."""
        tensor = self.model.graph.initializer.add()
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), self._unique(name)))
        if self.data is not None and value.nbytes > 1024:
            self.data.take(tensor, self.reader)
        return tensor.name

    def _all_names(self) -> set[str]:
        names: set[str] = set()
        for graph in opdef.graphs(self.model.graph):
            names |= {t.name for t in graph.initializer} | {v.name for v in (*graph.input, *graph.output)}
            for node in graph.node:
                names |= {node.name, *node.input, *node.output}
        return names

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.names:
            number += 1
            candidate = f"{name}_{number}"
        self.names.add(candidate)
        return candidate

    def _drop_unused(self, graph: GraphProto, parent: Scope | None, names: list[str]) -> None:
        """Remove what nobody reads any more of the nodes and initializers that gave ``names``."""
        waiting = list(dict.fromkeys(names))
        while waiting:
            used = set(used_names(graph))
            name = waiting.pop()
            if not name or name in used:
                continue
            producer = next((i for i, node in enumerate(graph.node) if name in node.output), None)
            if producer is not None:
                node = graph.node[producer]
                if not any(output in used for output in node.output):
                    waiting += node.input
                    del graph.node[producer]
                continue
            scope = Scope(graph, parent)
            while name not in scope.initializers and scope.parent is not None:
                scope = scope.parent
            if name in set(used_names(scope.graph)):
                continue
            for items in (scope.graph.initializer, scope.graph.input):
                if items is scope.graph.input and name not in scope.initializers:
                    continue
                for index, item in enumerate(items):
                    if item.name == name:
                        del items[index]
                        break


class _Reads:
    """Who reads which tensor of one graph."""

    def __init__(self, graph: GraphProto) -> None:
        self.consumers: dict[str, list[NodeProto]] = {}
        self.outside = {output.name for output in graph.output}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)
            for inner in subgraphs(node):
                self.outside.update(used_names(inner))

    def escapes(self, name: str) -> bool:
        return name in self.outside

    def only_consumer(self, name: str) -> NodeProto | None:
        found = self.consumers.get(name, [])
        if len(found) != 1 or name in self.outside or list(found[0].input).count(name) != 1:
            return None
        return found[0]


def _is_bias(constant: Constant, n: int, rank: int) -> bool:
    """Whether the constant broadcasts as one value per output channel and adds no dimension."""
    shape = constant.shape
    if len(shape) > rank or any(d != 1 for d in shape[:-1]):
        return False
    return not shape or shape[-1] in (1, n)


def _float32(constant: Constant) -> Array:
    return constant.load().astype(np.float32)


def _bias_vector(linear: _Linear) -> Array:
    assert linear.bias is not None
    value = linear.bias.load()
    if linear.bias_factor != 1.0:
        value = (value.astype(np.float32) * np.float32(linear.bias_factor)).astype(value.dtype)
    return np.broadcast_to(value.reshape(-1), (linear.n,))


def _packed(linear: _Linear) -> tuple[Array, Array]:
    """(packed weight, scale) of one linear: quantized here, or taken from its DequantizeLinear."""
    q = linear.weight.quantized
    if q is not None and linear.factor == 1.0:
        values = q.load()
        per_column = q.scale.size == 1 or _axis_is_rows(linear, q.axis)
        if per_column:
            rows = linear.rows(values)
            return pack(np.ascontiguousarray(rows)), np.broadcast_to(q.scale, (linear.n,)).astype(np.float32)
    weight = linear.rows(linear.weight.load())
    packed, scale = quantize_weight(weight, linear.factor)
    if not np.isfinite(scale).all():
        raise ValueError(
            f"The weight {linear.weight.root!r} of {linear.report.name} has NaN or ±inf: exclude it, or repair it."
        )
    return packed, scale


def _axis_is_rows(linear: _Linear, axis: int) -> bool:
    """Whether a scale along ``axis`` of the constant is one per output channel."""
    shape = linear.weight.shape
    probe = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
    rows = linear.rows(probe)
    return bool(rows.shape[0] == shape[axis] and (rows == np.arange(linear.n)[:, None]).all())
