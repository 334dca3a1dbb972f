"""Small ONNX models for tests, and running them on onnx's evaluator and on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hwkern import reference
from hwkern.tensorrt import opdef

node = helper.make_node
ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def model(
    nodes: Sequence[NodeProto],
    weights: Mapping[str, Any],
    x: Sequence[int | str] = ("batch", 64),
    y: Sequence[int | str] = ("batch", 64),
    dtype: str = "float32",
    opset: int = 17,
) -> ModelProto:
    """x → y, with these nodes and initializers (numpy arrays; float32 ones become ``dtype``)."""
    element = ELEMENTS[dtype]
    tensors = []
    for name, value in weights.items():
        value = np.asarray(value)
        if value.dtype == np.float32:
            value = value.astype(helper.tensor_dtype_to_np_dtype(element))
        tensors.append(numpy_helper.from_array(value, name))
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", element, list(x))],
        [helper.make_tensor_value_info("y", element, list(y))],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 22 else 10)


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(std)


def evaluate(made: ModelProto, feed: Mapping[str, Any]) -> list[Any]:
    """By onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    onnx.checker.check_model(made, full_check=True)
    return ReferenceEvaluator(made).run(None, dict(feed))


def run(made: ModelProto | str, feed: Mapping[str, Any]) -> list[Any]:
    """By ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed", exc_type=ImportError)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = made.SerializeToString() if isinstance(made, ModelProto) else made
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def linear(x: Any, weight: Any, bias: Any = None, activation: str = "none", scale: float | None = None) -> Any:
    """reference.py's int8 linear for numpy arrays; ``weight [N, K]`` float. ``scale``: a static one for x."""
    to = torch.from_numpy
    dtype = torch.float32 if x.dtype == np.float32 else torch.float16
    q_w, w_scale = reference.quantize(to(np.ascontiguousarray(weight)))
    rows = to(np.ascontiguousarray(x)).reshape(-1, x.shape[-1])
    if scale is None:
        q, x_scale = reference.quantize(rows)
        y = reference.int8_matmul(q, q_w, x_scale, w_scale)
    else:
        q, _ = reference.quantize(rows, torch.tensor([scale]))
        y = reference.int8_matmul(q, q_w, None, w_scale * torch.tensor(scale))
    if bias is not None:
        y = y + to(np.ascontiguousarray(bias)).float()
    functions = {
        "none": lambda t: t,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    return functions[activation](y).to(dtype).reshape(*x.shape[:-1], -1).numpy()


def hwkern_ops(made: ModelProto) -> list[dict[str, Any]]:
    return [opdef.attributes(n) for n in opdef.hwkern_nodes(made)]
