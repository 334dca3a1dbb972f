"""ONNX models for benchmarks/tensorrt.py: a linear, a BERT-like encoder, and their Q/DQ forms. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 17  # the newest that TensorRT 8.6 reads


class Graph:
    """Collects nodes and weights; every method returns the name of its result."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, Any] = {}
        self.rng = np.random.default_rng(seed)

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def constant(self, name: str, value: Any) -> str:
        self.weights[name] = value
        return name

    def normal(self, name: str, *shape: int, std: float = 0.02) -> str:
        return self.constant(name, self.rng.standard_normal(shape, dtype=np.float32) * np.float32(std))

    def linear(self, name: str, x: str, k: int, n: int, std: float = 0.02, bias: bool = True) -> str:
        y = self.op("MatMul", x, self.normal(f"{name}.weight", k, n, std=std), name=f"{name}.matmul")
        return self.op("Add", y, self.normal(f"{name}.bias", n), name=f"{name}.add") if bias else y

    def model(self, inputs: Sequence[Any], output: str, shape: Sequence[int | str]) -> ModelProto:
        last = next(node for node in self.nodes if output in node.output)
        last.output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            "model",
            list(inputs),
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def linear(n: int, k: int, seed: int = 0) -> ModelProto:
    """``y [M, N] = x [M, K] @ W + b`` in float32, M dynamic."""
    graph = Graph(seed)
    y = graph.linear("linear", "x", k, n)
    return graph.model([helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])], y, ["m", n])


def encoder(
    layers: int = 12, hidden: int = 768, heads: int = 12, inner: int = 3072, vocabulary: int = 1024, seed: int = 0
) -> ModelProto:
    """A BERT encoder with random weights: input_ids, attention_mask [batch, seq] → y [batch, seq, hidden].

    The default has BERT-base's layers. Its vocabulary is small: a lookup costs the same.
    """
    graph = Graph(seed)
    integers = lambda *values: np.array(values, np.int64)  # noqa: E731
    head = hidden // heads

    def normalize(name: str, x: str) -> str:
        scale = graph.constant(f"{name}.scale", np.ones(hidden, np.float32))
        shift = graph.constant(f"{name}.shift", np.zeros(hidden, np.float32))
        return graph.op("LayerNormalization", x, scale, shift, name=name, axis=-1, epsilon=1e-12)

    def split_heads(name: str, x: str, perm: list[int]) -> str:
        shape = graph.constant("heads", integers(0, 0, heads, head))
        return graph.op("Transpose", graph.op("Reshape", x, shape, name=f"{name}.heads"), name=f"{name}.t", perm=perm)

    mask = graph.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = graph.op("Unsqueeze", mask, graph.constant("mask_axes", integers(1, 2)))
    mask = graph.op("Sub", graph.constant("one", np.float32(1)), mask)
    mask = graph.op("Mul", mask, graph.constant("masked", np.float32(-10000)))
    x = graph.op("Gather", graph.normal("embedding", vocabulary, hidden, std=1.0), "input_ids")
    x = normalize("embedding.norm", x)
    for i in range(layers):
        p = f"layer.{i}"
        q = split_heads(f"{p}.q", graph.linear(f"{p}.query", x, hidden, hidden), [0, 2, 1, 3])
        k = split_heads(f"{p}.k", graph.linear(f"{p}.key", x, hidden, hidden), [0, 2, 3, 1])
        v = split_heads(f"{p}.v", graph.linear(f"{p}.value", x, hidden, hidden), [0, 2, 1, 3])
        scores = graph.op("Mul", graph.op("MatMul", q, k), graph.constant("scale", np.float32(1 / math.sqrt(head))))
        weights = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        context = graph.op("Reshape", context, graph.constant("joined", integers(0, 0, hidden)))
        x = normalize(f"{p}.norm1", graph.op("Add", x, graph.linear(f"{p}.out", context, hidden, hidden)))
        h = graph.linear(f"{p}.up", x, hidden, inner)
        erf = graph.op("Erf", graph.op("Div", h, graph.constant("sqrt2", np.float32(math.sqrt(2)))))
        h = graph.op("Mul", h, graph.op("Add", erf, "one"))
        h = graph.op("Mul", h, graph.constant("half", np.float32(0.5)))
        x = normalize(f"{p}.norm2", graph.op("Add", x, graph.linear(f"{p}.down", h, inner, hidden)))
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"])
        for name in ("input_ids", "attention_mask")
    ]
    return graph.model(ids, x, ["batch", "seq", hidden])


def with_qdq(model: ModelProto, scales: Mapping[str, float]) -> ModelProto:
    """The model with Q/DQ pairs, as TensorRT's own INT8 wants them: static per-tensor scales for activations.

    ``scales``: MatMul node name → scale of its input. Weights are float with per-channel Q/DQ pairs behind them.
    """
    made = ModelProto()
    made.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    zero = numpy_helper.from_array(np.zeros((), np.int8), "qdq.zero")
    made.graph.initializer.append(zero)
    nodes: list[NodeProto] = []
    pairs: dict[tuple[str, float], str] = {}

    def pair(x: str, scale: str, zeros: str, **attributes: Any) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [x, scale, zeros], [f"{x}.q"], f"{x}.quantize", **attributes))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{x}.q", scale, zeros], [f"{x}.dq"], f"{x}.dequantize", **attributes)
        )
        return f"{x}.dq"

    for node in made.graph.node:
        if node.name in scales:
            key = (node.input[0], scales[node.name])
            if key not in pairs:
                name = f"{node.input[0]}.scale"
                made.graph.initializer.append(numpy_helper.from_array(np.float32(key[1]), name))
                pairs[key] = pair(node.input[0], name, "qdq.zero")
            weight = node.input[1]
            value = numpy_helper.to_array(weights[weight])
            absmax = np.maximum(np.abs(value).max(axis=0), 1e-12).astype(np.float32)
            made.graph.initializer.append(numpy_helper.from_array(absmax / np.float32(127), f"{weight}.scale"))
            made.graph.initializer.append(numpy_helper.from_array(np.zeros(value.shape[1], np.int8), f"{weight}.zeros"))
            node.input[:] = [pairs[key], pair(weight, f"{weight}.scale", f"{weight}.zeros", axis=1)]
        nodes.append(node)
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(copies)
    return made
