"""The ONNX face of the plugin's op: node, attributes, and a function body in standard ops.

``LinearInt8(x, weight, weight_scale[, bias][, input_scale][, residual]) -> y``

==============  =============================================================================
x               ``[..., K]`` float32, float16 or bfloat16
weight          ``[N, K16]`` int8 (K16: K rounded up to 16, zeros in the padding), or its bytes as INT32 ``[N, K16/4]``
weight_scale    ``[N]`` float32; ``w8a8_static``: times input_scale, so y = sum · weight_scale + bias
bias            ``[N]`` float32, float16 or bfloat16
input_scale     ``[1]`` or ``[K]`` float32: the static scale of x (scheme ``w8a8_static``)
residual        ``[..., N]`` of x's dtype
y               ``[..., N]`` of x's dtype
==============  =============================================================================

``NormLinearInt8(x[, skip], norm_weight[, norm_bias], weight, … as above) -> y[, normed][, sum]`` is LinearInt8 of
``normed = LayerNorm(x + skip)``: the norm's own pass quantizes it. ``skip``, ``normed`` and
``sum = x + skip`` are ``[..., K]`` of x's dtype; ``norm_weight`` and ``norm_bias`` ``[K]`` of any float type.

``GatedLinearInt8(x, weight, … as above) -> y`` is LinearInt8 of ``gate(x[..., :K]) · x[..., K:]``: x is ``[..., 2K]``,
the halves of a gate-and-up product.

``Attention(x[, cosine, sine][, mask]) -> y`` is what lies between the product of q, k and v and the one that reads the
heads: x ``[B, L, (heads + 2·kv_heads)·head_dim]``, float32 tables ``[..., L, head_dim]`` of a rotary embedding, a mask
that broadcasts to ``[B, heads, L, L]`` in x's dtype, y ``[B, L, heads·head_dim]``. TensorRT runs it in 16 bits alone.

Inputs that a node does not have are left out, not empty; ``has_bias``, ``has_input_scale`` and ``has_residual`` tell
which are there. The mathematics is ``hwkern/reference.py``'s.

TensorRT finds the plugin by the op's name and ``plugin_namespace``, and does not look at the domain. onnx's evaluator
and ONNX Runtime find the function body by domain and name; a body holds for one combination of dtype and inputs (ONNX
has no optional function inputs that a body can test), so each combination has a domain of its own below ``hwkern``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from hwkern.tensorrt.packing import ROW_ALIGNMENT

NAMESPACE = "hwkern"
PLUGIN_VERSION = "1"
OP = "LinearInt8"
NORM_OP = "NormLinearInt8"
GATED_OP = "GatedLinearInt8"
ATTENTION_OP = "Attention"
OPS = (OP, NORM_OP, GATED_OP, ATTENTION_OP)
CHOOSE = -1  # hwkern.h kChoose: the kernels' cost model (or TensorRT's timing) picks the config
SCHEMES = ("w8a8_dynamic", "w8a8_static", "w8a16")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
#: ONNX element types that x, y, bias and residual may have.
FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
METADATA_KEY = "hwkern"

# All of them on every node: TensorRT's parser warns about each one that is missing.
_ATTRIBUTES = (
    "in_features",
    "out_features",
    "scheme",
    "activation",
    "has_bias",
    "has_input_scale",
    "has_residual",
    "config",
    "constant_weights",
    "plugin_namespace",
    "plugin_version",
)


_NORM_ATTRIBUTES = (
    "norm",
    "epsilon",
    "norm_offset",
    "has_norm_bias",
    "has_skip",
    "has_norm_output",
    "has_sum_output",
)


@dataclass(frozen=True)
class Norm:
    """The norm of a NormLinearInt8. ``kind``: "layer", or "rms", which has no mean and no bias."""

    has_bias: bool = False
    has_skip: bool = False
    has_output: bool = False
    has_sum: bool = False
    kind: str = "layer"

    @property
    def inputs(self) -> list[str]:
        optional = [("skip", self.has_skip), ("norm_weight", True), ("norm_bias", self.has_bias)]
        return [name for name, there in optional if there]

    @property
    def outputs(self) -> list[str]:
        return ["normed"] * self.has_output + ["sum"] * self.has_sum


@dataclass(frozen=True)
class Variant:
    """What decides a function body: the node's dtype, options and inputs."""

    dtype: int  # ONNX element type of x and y
    scheme: str = "w8a8_dynamic"
    activation: str = "none"
    has_bias: bool = False
    has_residual: bool = False
    int32_weight: bool = False
    norm: Norm | None = None
    gate: str = ""  # the activation of a GatedLinearInt8

    @property
    def op(self) -> str:
        if self.gate:
            return GATED_OP
        return OP if self.norm is None else NORM_OP

    @property
    def has_input_scale(self) -> bool:
        return self.scheme == "w8a8_static"

    @property
    def domain(self) -> str:
        parts = [NAMESPACE, self.scheme, FLOATS[self.dtype]]
        parts += ["bias"] * self.has_bias
        parts += [self.activation] * (self.activation != "none")
        parts += ["residual"] * self.has_residual
        parts += ["int32"] * self.int32_weight
        parts += [f"gated_{self.gate}"] * bool(self.gate)
        if self.norm is not None:
            parts += ["norm" if self.norm.kind == "layer" else self.norm.kind, *self.norm.inputs, *self.norm.outputs]
        return ".".join(parts)

    @property
    def inputs(self) -> list[str]:
        optional = (("bias", self.has_bias), ("input_scale", self.has_input_scale), ("residual", self.has_residual))
        before = ["x"] if self.norm is None else ["x", *self.norm.inputs]
        return [*before, "weight", "weight_scale", *(name for name, there in optional if there)]

    @property
    def outputs(self) -> list[str]:
        return ["y"] if self.norm is None else ["y", *self.norm.outputs]

    @property
    def attributes(self) -> tuple[str, ...]:
        if self.gate:
            return (*_ATTRIBUTES, "gate")
        return _ATTRIBUTES if self.norm is None else (*_ATTRIBUTES, *_NORM_ATTRIBUTES)


@dataclass(frozen=True)
class Attention:
    """What decides an Attention's function body."""

    dtype: int  # ONNX element type of x and y
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    has_rotary: bool = False
    has_mask: bool = False

    op = ATTENTION_OP

    @property
    def domain(self) -> str:
        parts = [NAMESPACE, "attention", FLOATS[self.dtype], f"{self.heads}_{self.kv_heads}_{self.head_dim}"]
        return ".".join([*parts, *["causal"] * self.causal, *self.inputs[1:]])

    @property
    def inputs(self) -> list[str]:
        return ["x", *["cosine", "sine"] * self.has_rotary, *["mask"] * self.has_mask]

    def node(self, inputs: Sequence[str], output: str, name: str, scale: float) -> NodeProto:
        return helper.make_node(
            self.op, list(inputs), [output], name=name, domain=self.domain, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, scale=scale, causal=int(self.causal), has_rotary=int(self.has_rotary),
            has_mask=int(self.has_mask), plugin_namespace=NAMESPACE, plugin_version=PLUGIN_VERSION,
        )  # fmt: skip


def make_node(
    variant: Variant,
    in_features: int,
    out_features: int,
    inputs: Sequence[str],
    outputs: str | Sequence[str],
    name: str,
    epsilon: float = 0.0,
) -> NodeProto:
    """The node; ``inputs`` and ``outputs`` in the order of the variant's. ``epsilon``: of the norm."""
    fields: dict[str, Any] = {}
    if (norm := variant.norm) is not None:
        fields = {"norm": norm.kind, "epsilon": epsilon, "norm_offset": 0.0}
        fields |= {"has_norm_bias": int(norm.has_bias), "has_skip": int(norm.has_skip)}
        fields |= {"has_norm_output": int(norm.has_output), "has_sum_output": int(norm.has_sum)}
    if variant.gate:
        fields = {"gate": variant.gate}
    return helper.make_node(
        variant.op,
        list(inputs),
        [outputs] if isinstance(outputs, str) else list(outputs),
        name=name,
        domain=variant.domain,
        in_features=in_features,
        out_features=out_features,
        scheme=variant.scheme,
        activation=variant.activation,
        has_bias=int(variant.has_bias),
        has_input_scale=int(variant.has_input_scale),
        has_residual=int(variant.has_residual),
        config=CHOOSE,
        constant_weights=1,
        plugin_namespace=NAMESPACE,
        plugin_version=PLUGIN_VERSION,
        **fields,
    )


def is_hwkern(node: NodeProto) -> bool:
    return node.op_type in OPS and (node.domain == NAMESPACE or node.domain.startswith(NAMESPACE + "."))


def inputs(node: NodeProto) -> dict[str, str]:
    """What each input of a hwkern node is: "weight" → its name. A wrong number is for the plugin to refuse."""
    variant = attention_of if node.op_type == ATTENTION_OP else variant_of
    return dict(zip(variant(node, TensorProto.FLOAT).inputs, node.input, strict=False))


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values, strings as str."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def variant_of(node: NodeProto, dtype: int, int32_weight: bool = False) -> Variant:
    """The variant of an existing hwkern node; the dtype is its x's."""
    found = attributes(node)
    return Variant(
        dtype=dtype,
        scheme=found["scheme"],
        activation=found["activation"],
        has_bias=bool(found["has_bias"]),
        has_residual=bool(found["has_residual"]),
        int32_weight=int32_weight,
        gate=found.get("gate", ""),
        norm=None
        if node.op_type != NORM_OP
        else Norm(
            has_bias=bool(found["has_norm_bias"]),
            has_skip=bool(found["has_skip"]),
            has_output=bool(found["has_norm_output"]),
            has_sum=bool(found["has_sum_output"]),
            kind=str(found["norm"]),
        ),
    )


def attention_of(node: NodeProto, dtype: int) -> Attention:
    """The variant of an existing Attention; the dtype is its x's."""
    found = attributes(node)
    flags = {name: bool(found[name]) for name in ("causal", "has_rotary", "has_mask")}
    return Attention(dtype, found["heads"], found["kv_heads"], found["head_dim"], **flags)


# ---- the function body ---------------------------------------------------------------------------------------------


class _Body:
    """Collects nodes; every method returns the name of its result."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def constant(self, value: float | int | list[int], element: int) -> str:
        dims = [len(value)] if isinstance(value, list) else []
        values = value if isinstance(value, list) else [value]
        return self.op("Constant", value=helper.make_tensor("value", element, dims, values))

    def floating(self, value: float) -> str:
        return self.constant(value, TensorProto.FLOAT)

    def integers(self, *values: int) -> str:
        return self.constant(list(values), TensorProto.INT64)

    def cast(self, x: str, element: int) -> str:
        return self.op("Cast", x, to=element)

    def reduce(self, op_type: str, x: str) -> str:
        """ReduceMax or ReduceMean over each row."""
        if self.opset >= 18:
            return self.op(op_type, x, self.integers(-1), keepdims=1)
        return self.op(op_type, x, axes=[-1], keepdims=1)

    def attribute(self, name: str, kind: str) -> str:
        """The node's attribute as a scalar tensor; ``kind``: "value_int" or "value_float"."""
        scalar = self.op("Constant")
        element = AttributeProto.INT if kind == "value_int" else AttributeProto.FLOAT
        self.nodes[-1].attribute.append(AttributeProto(name=kind, ref_attr_name=name, type=element))
        return scalar

    def in_features(self) -> str:
        """The attribute as a tensor ``[1]``."""
        return self.op("Reshape", self.attribute("in_features", "value_int"), self.integers(1))


def _int8_weight(body: _Body, variant: Variant) -> str:
    """``weight [N, K16 or K16/4]`` as int32 values ``[N, K]``."""
    if not variant.int32_weight:
        packed = body.cast("weight", TensorProto.INT32)
    else:
        # Four bytes of an int32, lowest first. Integer Mod takes the divisor's sign, so each byte comes out as 0 … 255.
        rest, pieces = "weight", []
        size = body.constant(256, TensorProto.INT32)
        half = body.constant(128, TensorProto.INT32)
        for _ in range(4):
            byte = body.op("Mod", rest, size)
            signed = body.op("Sub", body.op("Mod", body.op("Add", byte, half), size), half)
            pieces.append(body.op("Unsqueeze", signed, body.integers(2)))
            rest = body.op("Div", body.op("Sub", rest, byte), size)
        packed = body.op("Reshape", body.op("Concat", *pieces, axis=2), body.integers(0, -1))
    return body.op("Slice", packed, body.integers(0), body.in_features(), body.integers(1))


def _quantized(body: _Body, variant: Variant, x: str) -> tuple[str, str]:
    """(int8 values of x as float32, scale per row; none with a static scale, which weight_scale has in it)."""
    dynamic_scale = ""
    if variant.has_input_scale:
        scale = "input_scale"
    else:
        largest = body.op("Div", body.reduce("ReduceMax", body.op("Abs", x)), body.floating(127.0))
        scale = body.op("Max", largest, body.floating(2.0**-126))
        # 0, or NaN for a row that holds NaN or ±inf.
        marker = body.op("ReduceSum", body.op("Mul", x, body.floating(0.0)), body.integers(-1), keepdims=1)
        scale = dynamic_scale = body.op("Add", scale, marker)
    scaled = body.op("Mul", x, body.op("Div", body.floating(1.0), scale))
    q = body.op("Clip", body.op("Round", scaled), body.floating(-127.0), body.floating(127.0))
    return body.op("Where", body.op("IsNaN", scaled), body.floating(0.0), q), dynamic_scale


def _activation(body: _Body, name: str, y: str) -> str:
    one, half = body.floating(1.0), body.floating(0.5)
    if name == "relu":
        return body.op("Max", y, body.floating(0.0))
    if name == "gelu":
        erf = body.op("Erf", body.op("Mul", y, body.floating(math.sqrt(0.5))))
        return body.op("Mul", body.op("Mul", half, y), body.op("Add", one, erf))
    if name == "gelu_tanh":
        cube = body.op("Mul", body.op("Mul", y, y), y)
        inner = body.op("Add", y, body.op("Mul", body.floating(0.044715), cube))
        tanh = body.op("Tanh", body.op("Mul", body.floating(math.sqrt(2 / math.pi)), inner))
        return body.op("Mul", body.op("Mul", half, y), body.op("Add", one, tanh))
    return body.op("Div", y, body.op("Add", one, body.op("Exp", body.op("Neg", y))))  # silu


def function(variant: Variant | Attention, opset: int) -> FunctionProto:
    """The body for one variant in the standard ops of ``opset`` (13 or newer)."""
    if isinstance(variant, Attention):
        return _attention(variant, opset)
    body = _Body(opset)
    # No casts from float32 to itself: ONNX Runtime 1.32 loses the input of such a cast when it inlines a function.
    is_float = variant.dtype == TensorProto.FLOAT
    x = "x" if is_float else body.cast("x", TensorProto.FLOAT)
    if variant.norm is not None:
        x = _normed(body, variant, x)
    if variant.gate:
        x = _gated(body, variant, x)
    weight = _int8_weight(body, variant)
    if variant.scheme == "w8a16":
        w = body.cast(body.op("Transpose", weight, perm=[1, 0]), TensorProto.FLOAT)
        y = body.op("MatMul", x, w)
    else:
        # uint8 around 128 on both sides: ONNX Runtime's int8 × int8 saturates on CPUs without VNNI, this never does.
        q, scale = _quantized(body, variant, x)
        middle = body.constant(128, TensorProto.UINT8)
        a = body.cast(body.op("Add", q, body.floating(128.0)), TensorProto.UINT8)
        shifted = body.op("Add", weight, body.constant(128, TensorProto.INT32))
        b = body.op("Transpose", body.cast(shifted, TensorProto.UINT8), perm=[1, 0])
        y = body.cast(body.op("MatMulInteger", a, b, middle, middle), TensorProto.FLOAT)
        if scale:
            y = body.op("Mul", y, scale)
    y = body.op("Mul", y, "weight_scale")
    if variant.has_bias:
        y = body.op("Add", y, body.cast("bias", TensorProto.FLOAT))
    if variant.activation != "none":
        y = _activation(body, variant.activation, y)
    if variant.has_residual:
        y = body.op("Add", y, "residual" if is_float else body.cast("residual", TensorProto.FLOAT))
    if not is_float:
        body.cast(y, variant.dtype)
    body.nodes[-1].output[0] = "y"
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(
        variant.domain, variant.op, variant.inputs, variant.outputs, body.nodes, imports, variant.attributes
    )


def _normed(body: _Body, variant: Variant, x: str) -> str:
    """The norm of float32 ``x`` (+ skip), as float32; gives the outputs ``normed`` and ``sum`` on the way."""
    assert variant.norm is not None
    is_float = variant.dtype == TensorProto.FLOAT

    def rounded(value: str, name: str, wanted: bool) -> str:
        """``value`` as x's type holds it, which is also the output ``name``."""
        if not is_float:
            value = body.cast(value, variant.dtype)
        if wanted:
            body.nodes[-1].output[0] = value = name
        return value if is_float else body.cast(value, TensorProto.FLOAT)

    h = x
    if variant.norm.has_skip:
        skip = "skip" if is_float else body.cast("skip", TensorProto.FLOAT)
        h = rounded(body.op("Add", x, skip), "sum", variant.norm.has_sum)
    centred = h if variant.norm.kind == "rms" else body.op("Sub", h, body.reduce("ReduceMean", h))
    variance = body.reduce("ReduceMean", body.op("Mul", centred, centred))
    deviation = body.op("Sqrt", body.op("Add", variance, body.attribute("epsilon", "value_float")))

    def parameter(name: str) -> str:
        return name if is_float else body.cast(name, TensorProto.FLOAT)

    y = body.op("Mul", body.op("Div", centred, deviation), parameter("norm_weight"))
    if variant.norm.has_bias:
        y = body.op("Add", y, parameter("norm_bias"))
    return rounded(y, "normed", variant.norm.has_output)


def _attention(variant: Attention, opset: int) -> FunctionProto:
    body = _Body(opset)
    is_float = variant.dtype == TensorProto.FLOAT
    dim, groups = variant.head_dim, variant.heads // variant.kv_heads

    def stored(value: str) -> str:
        """As x's type holds it, in float32."""
        return value if is_float else body.cast(body.cast(value, variant.dtype), TensorProto.FLOAT)

    def heads(x: str, count: int, rotated: bool) -> str:
        """[B, L, count · D] → [B, H, L, D]"""
        x = body.op("Transpose", body.op("Reshape", x, body.integers(0, 0, count, dim)), perm=[0, 2, 1, 3])
        if rotated:
            half, last = body.integers(dim // 2), body.integers(-1)
            low = body.op("Slice", x, body.integers(0), half, last)
            high = body.op("Neg", body.op("Slice", x, half, body.integers(dim), last))
            crossed = body.op("Concat", high, low, axis=-1)
            x = stored(body.op("Add", body.op("Mul", x, "cosine"), body.op("Mul", crossed, "sine")))
        if count < variant.heads:
            x = body.op("Tile", body.op("Unsqueeze", x, body.integers(2)), body.integers(1, 1, groups, 1, 1))
            x = body.op("Reshape", x, body.integers(0, variant.heads, -1, dim))
        return x

    sizes = [count * dim for count in (variant.heads, variant.kv_heads, variant.kv_heads)]
    x, parts, at = "x" if is_float else body.cast("x", TensorProto.FLOAT), [], 0
    for size in sizes:
        parts.append(body.op("Slice", x, body.integers(at), body.integers(at + size), body.integers(2)))
        at += size
    q, k = (heads(x, n, variant.has_rotary) for x, n in zip(parts, (variant.heads, variant.kv_heads), strict=False))
    scores = body.op("MatMul", q, body.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = body.op("Mul", scores, body.attribute("scale", "value_float"))
    if variant.has_mask:
        scores = body.op("Add", scores, "mask" if is_float else body.cast("mask", TensorProto.FLOAT))
    if variant.causal:
        length = body.op("Gather", body.op("Shape", "x"), body.constant(1, TensorProto.INT64))
        place = body.op("Range", body.constant(0, TensorProto.INT64), length, body.constant(1, TensorProto.INT64))
        later = body.op(
            "Less", body.op("Unsqueeze", place, body.integers(1)), body.op("Unsqueeze", place, body.integers(0))
        )
        scores = body.op("Where", later, body.floating(-math.inf), scores)
    weights = stored(body.op("Softmax", scores, axis=-1))
    y = body.op("Transpose", body.op("MatMul", weights, heads(parts[2], variant.kv_heads, False)), perm=[0, 2, 1, 3])
    y = body.op("Reshape", y, body.integers(0, 0, sizes[0]))
    if not is_float:
        body.cast(y, variant.dtype)
    body.nodes[-1].output[0] = "y"
    imports = [helper.make_opsetid("", opset)]
    attributes_ = ("heads", "kv_heads", "head_dim", "scale", "causal", "has_rotary", "has_mask")
    return helper.make_function(
        variant.domain, variant.op, variant.inputs, ["y"], body.nodes, imports,
        (*attributes_, "plugin_namespace", "plugin_version"),
    )  # fmt: skip


def _gated(body: _Body, variant: Variant, x: str) -> str:
    """gate(first half of float32 ``x``) · second half, each stored in x's type."""

    def stored(value: str) -> str:
        if variant.dtype == TensorProto.FLOAT:
            return value
        return body.cast(body.cast(value, variant.dtype), TensorProto.FLOAT)

    k, last = body.in_features(), body.integers(-1)
    first = body.op("Slice", x, body.integers(0), k, last)
    second = body.op("Slice", x, k, body.op("Add", k, k), last)
    if variant.gate != "none":
        first = stored(_activation(body, variant.gate, first))
    return stored(body.op("Mul", first, second))


# ---- whole models --------------------------------------------------------------------------------------------------


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and the bodies of its If, Loop and Scan nodes, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)
            elif attribute.type == AttributeProto.GRAPHS:
                for inner in attribute.graphs:
                    yield from graphs(inner)


def opset_version(model: ModelProto) -> int:
    """The version of ONNX's own operators that the model uses; 0 when it uses none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def hwkern_nodes(model: ModelProto) -> list[NodeProto]:
    return [node for graph in graphs(model.graph) for node in graph.node if is_hwkern(node)]


def add_functions(model: ModelProto, variants: Sequence[Variant | Attention]) -> None:
    """Add the bodies (once each) and import their domains."""
    there = {(f.domain, f.name) for f in model.functions}
    domains = {entry.domain for entry in model.opset_import}
    for variant in dict.fromkeys(variants):
        if (variant.domain, variant.op) not in there:
            model.functions.append(function(variant, opset_version(model)))
        if variant.domain not in domains:
            model.opset_import.append(helper.make_opsetid(variant.domain, 1))
            domains.add(variant.domain)
    model.ir_version = max(model.ir_version, 8)  # functions came with IR version 8


def strip_functions(model: ModelProto) -> None:
    """Remove the bodies: TensorRT 10.0 … 10.2 would import a body in the plugin's place."""
    kept = [f for f in model.functions if not (f.name in OPS and f.domain.startswith(NAMESPACE + "."))]
    del model.functions[:]
    model.functions.extend(kept)


def view_weights_as_int32(model: ModelProto) -> int:
    """Retype the packed weights to INT32 ``[N, K16/4]``, in place and without touching a byte; returns how many.

    For TensorRT before 10.1. Drops the function bodies, which are written for int8.
    """
    names = {inputs(node).get("weight") for node in hwkern_nodes(model)}
    changed = 0
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.name in names and tensor.data_type == TensorProto.INT8:
                n, k16 = tensor.dims
                if k16 % ROW_ALIGNMENT:
                    raise ValueError(
                        f"{tensor.name} has {k16} columns: a packed weight has a multiple of {ROW_ALIGNMENT}."
                    )
                if tensor.data_location != TensorProto.EXTERNAL and not tensor.raw_data:
                    tensor.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
                    del tensor.int32_data[:]
                tensor.data_type = TensorProto.INT32
                tensor.dims[:] = [n, k16 // 4]
                changed += 1
    if changed:
        strip_functions(model)
    return changed


def set_metadata(model: ModelProto, value: dict[str, Any]) -> None:
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(value)
            return
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(value))


def metadata(model: ModelProto) -> dict[str, Any]:
    """What hwkern wrote into the model, or {}."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            found: dict[str, Any] = json.loads(entry.value)
            return found
    return {}
