"""Finds an activation function in a graph by what it computes, not by how it is written.

Exporters write GELU as Div-Erf-Add-Mul-Mul, in several orders, or as one node; SiLU as Sigmoid and Mul. Instead of a
pattern for each, the elementwise nodes that follow a tensor are evaluated on sample points and compared with the
activations that the plugin knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from hwkern.tensorrt.graph import attribute

Values = NDArray[np.float64]

# The longest form seen: tanh-GELU as Pow, Mul, Add, Mul, Tanh, Add, Mul, Mul, with a Cast or two.
_MOST_NODES = 14
_SAMPLES: Values = np.concatenate([np.linspace(-12, 12, 481), np.linspace(-0.5, 0.5, 101), [-60.0, 60.0]])
# Half of the largest gap between two activations (GELU and its tanh form differ by 4.7e-4), and above what constants in
# float16 (√½ is off by 4e-5) and bfloat16 change where the two are not told apart anyway.
_TOLERANCE = 2e-4


def _erf(x: Values) -> Values:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: Values) -> Values:
    return 1 / (1 + np.exp(-x))


def _gelu(x: Values) -> Values:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: Values) -> Values:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


KNOWN: dict[str, Callable[[Values], Values]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x: x * _sigmoid(x),
}

_UNARY: dict[str, Callable[[Values], Values]] = {
    "Cast": lambda x: x,
    "Erf": _erf,
    "Exp": np.exp,
    "Identity": lambda x: x,
    "Neg": np.negative,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
}
_BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}


def evaluate(node: NodeProto, inputs: Sequence[Values]) -> Values | None:
    """One elementwise node on sample values, or None when it is of another kind."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gelu":
        return (_gelu_tanh if attribute(node, "approximate", b"none") == b"tanh" else _gelu)(inputs[0])
    if node.op_type in _UNARY and len(inputs) == 1:
        return _UNARY[node.op_type](inputs[0])
    if node.op_type in _BINARY and len(inputs) == 2:
        return _BINARY[node.op_type](inputs[0], inputs[1])
    return None


def identify(values: Values) -> str | None:
    """The activation that gives these values on the sample points."""
    errors = {name: float(np.max(np.abs(values - f(_SAMPLES)))) for name, f in KNOWN.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= _TOLERANCE else None


def find(
    start: str,
    consumers: Mapping[str, Sequence[NodeProto]],
    scalar: Callable[[str], float | None],
    escapes: Callable[[str], bool],
) -> tuple[str, list[NodeProto]] | None:
    """The activation that follows the tensor ``start``, and its nodes in order; None when there is none.

    Args:
        consumers: name → the nodes of the same graph that read it.
        scalar: the value of a one-element constant, or None.
        escapes: whether a tensor is also read elsewhere (a subgraph, the graph's outputs).
    """
    values: dict[str, Values] = {start: _SAMPLES}
    taken: list[NodeProto] = []
    waiting = list(consumers.get(start, ()))
    with np.errstate(all="ignore"):
        while waiting and len(taken) < _MOST_NODES:
            node = waiting.pop(0)
            if any(node is t for t in taken):
                continue
            found = _inputs(node, values, scalar)
            result = evaluate(node, found) if found is not None and len(node.output) == 1 else None
            if result is None:
                continue  # perhaps later, when its other input has a value; the last check sees that it is missing
            taken.append(node)
            output = node.output[0]
            values[output] = result
            inside = [t for t in values if t != output]
            closed = not any(
                escapes(t) or any(not any(c is n for n in taken) for c in consumers.get(t, ())) for t in inside
            )
            if closed and (name := identify(result)) is not None:
                return name, taken
            waiting += consumers.get(output, ())
    return None


def _inputs(node: NodeProto, values: Mapping[str, Values], scalar: Callable[[str], float | None]) -> list[Any] | None:
    found: list[Any] = []
    for name in node.input:
        if name in values:
            found.append(values[name])
            continue
        constant = scalar(name) if name else None
        if constant is None:
            return None
        found.append(np.float64(constant))
    return found
