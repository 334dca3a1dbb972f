"""``swap``: hwkern's int8 linear in the place of matrix multiplies of an INetworkDefinition that somebody holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwkern.tensorrt import _api, opdef
from hwkern.tensorrt._api import TensorRT
from hwkern.tensorrt.packing import K_MAX, as_int32, quantize_weight
from hwkern.tensorrt.plugin import load_plugin
from hwkern.tensorrt.rewriter import MIN_FEATURES, MIN_WEIGHTS, NodeReport, RewriteReport, Selector, _Choice

Array = NDArray[Any]


@dataclass
class SwapReport(RewriteReport):
    """As after ``rewrite``. Keep it until the engine is built: TensorRT reads the new weights from here."""

    weights: list[Array] = field(default_factory=list, repr=False)


def swap(
    network: Any,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    trt: ModuleType | str | None = None,
) -> SwapReport:
    """Replace matrix multiplies with a constant weight (and the bias that is added next), in place.

    For a network that was not made from ONNX, or that ``build(edit=…)`` hands out; else ``rewrite`` sees more. Names of
    the network's inputs and outputs stay. The old layers stay too, without consumers: the builder drops them.

    Args:
        network: an INetworkDefinition of TensorRT 8.6 or ≥ 10.1.
        include, exclude: layer names, as for ``rewrite``; ``include`` also takes small ones.

    Returns:
        :class:`SwapReport`: to be kept alive until the engine is built.

    Raises:
        RuntimeError: the plugin cannot be loaded, or TensorRT-RTX, whose Python interface adds no plugins (use
            ``rewrite``).
    """
    api = _api.find(trt)
    if not (hasattr(network, "add_plugin_v3") or hasattr(network, "add_plugin_v2")):
        raise RuntimeError(f"{api} adds no plugins to a network from Python: use hwkern.tensorrt.rewrite on the ONNX.")
    load_plugin(api.module)
    return _Swap(api, network, _Choice(include, exclude, None, "w8a8_dynamic")).run()


class _LeftError(Exception):
    """A layer stays as it is; the text is the reason."""


def _dense(value: Any, shape: tuple[int, ...]) -> Array | None:
    """A constant layer's weights in its shape; None where numpy has no such type (bfloat16, without ml_dtypes)."""
    if not isinstance(value, np.ndarray) or value.size != math.prod(shape):
        return None
    # NOTE: TensorRT 8.6's bindings were compiled against numpy 1. Under numpy 2 they read the item size from the wrong
    # place, and their arrays have the right address, type and length but strides of 0.
    strides = [value.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return np.lib.stride_tricks.as_strided(value, shape, strides, writeable=False)


class _Swap:
    def __init__(self, api: TensorRT, network: Any, choice: _Choice) -> None:
        self.api, self.trt, self.network, self.choice = api, api.module, network, choice
        self.layers = [network.get_layer(i) for i in range(network.num_layers)]
        self.producers = {layer.get_output(i).name: layer for layer in self.layers for i in range(layer.num_outputs)}
        self.consumers: dict[str, list[tuple[Any, int]]] = {}
        for layer in self.layers:
            for i in range(layer.num_inputs):
                if (tensor := layer.get_input(i)) is not None:
                    self.consumers.setdefault(tensor.name, []).append((layer, i))
        self.report = SwapReport()

    def run(self) -> SwapReport:
        for layer in self.layers:
            if layer.type == self.trt.LayerType.MATRIX_MULTIPLY:
                report = NodeReport(layer.name, "MatrixMultiply", "left")
                self.report.nodes.append(report)
                problem = self.choice.problem(layer.name)
                try:
                    if problem:
                        raise _LeftError(problem)
                    self._replace(layer, report)
                except _LeftError as left:
                    report.reason = str(left)
        self.choice.check()
        return self.report

    def _replace(self, layer: Any, report: NodeReport) -> None:
        layer.__class__ = self.trt.IMatrixMultiplyLayer
        weight = self._constant(layer.get_input(1))
        if weight is None:
            raise _LeftError("no constant weight")
        operation = self.trt.MatrixOperation
        if layer.op0 != operation.NONE or layer.op1 not in (operation.NONE, operation.TRANSPOSE):
            raise _LeftError(f"its operands are taken as {layer.op0} and {layer.op1}")
        if weight.ndim < 2 or math.prod(weight.shape[:-2]) != 1:
            raise _LeftError(f"its weight has the shape {weight.shape}")
        if weight.dtype.name not in opdef.FLOATS.values():
            raise _LeftError(f"its weight is {weight.dtype.name}")
        rows = weight.reshape(weight.shape[-2:])
        rows = rows.T if layer.op1 == operation.NONE else rows
        n, k = (int(d) for d in rows.shape)
        report.out_features, report.in_features = n, k
        if k > K_MAX:
            raise _LeftError(f"K = {k}: an int32 sum is exact only below 2**17")
        if not self.choice.named(report.name) and (n * k < MIN_WEIGHTS or min(n, k) < MIN_FEATURES):
            raise _LeftError(f"small: fewer than {MIN_WEIGHTS} weights or {MIN_FEATURES} inputs or outputs")
        packed, scale = quantize_weight(rows)
        if not np.isfinite(scale).all():
            raise _LeftError("its weight has NaN or ±inf")
        old = layer.get_output(0)
        bias, old = self._bias(old, n)
        inputs = [layer.get_input(0), self._add(packed if self.api.takes_int8_constants else as_int32(packed))]
        inputs.append(self._add(scale))
        if bias is not None:
            inputs.append(self._add(bias))
        new = self._plugin(f"{layer.name}.int8", inputs, k, n, bias is not None)
        self._hand_over(old, new)
        self.report.bytes_before += weight.nbytes
        self.report.bytes_after += packed.nbytes + scale.nbytes
        report.status, report.scheme, report.bias, report.dtype = "int8", "w8a8_dynamic", bias is not None, "float32"

    # ---- reading ---------------------------------------------------------------------------------------------------

    def _constant(self, tensor: Any) -> Array | None:
        """The value behind a constant layer and reshapes that TensorRT's parser puts after it."""
        layer = self.producers.get(tensor.name)
        if layer is None:
            return None
        if layer.type == self.trt.LayerType.CONSTANT:
            layer.__class__ = self.trt.IConstantLayer
            return _dense(layer.weights, tuple(layer.shape))
        if layer.type in (self.trt.LayerType.IDENTITY, getattr(self.trt.LayerType, "CAST", None)):
            return self._constant(layer.get_input(0))
        if layer.type == self.trt.LayerType.SHUFFLE and layer.num_inputs == 1:
            value = self._constant(layer.get_input(0))
            return None if value is None else self._shuffled(layer, value)
        return None

    def _shuffled(self, layer: Any, value: Array) -> Array | None:
        layer.__class__ = self.trt.IShuffleLayer
        first, second = tuple(layer.first_transpose), tuple(layer.second_transpose)
        value = value.transpose(first[: value.ndim])
        target = tuple(layer.get_output(0).shape)
        if second[: len(target)] != tuple(range(len(target))):
            return None  # a transpose after a reshape: TensorRT's parsers do not make one for weights
        return value.reshape(target) if math.prod(target) == value.size and min(target, default=1) > 0 else None

    def _bias(self, tensor: Any, n: int) -> tuple[Array | None, Any]:
        """(the bias that is added next, the sum) or (None, the product)."""
        found = self.consumers.get(tensor.name, [])
        if len(found) != 1 or tensor.is_network_output or found[0][0].type != self.trt.LayerType.ELEMENTWISE:
            return None, tensor
        layer, index = found[0]
        layer.__class__ = self.trt.IElementWiseLayer
        if layer.op != self.trt.ElementWiseOperation.SUM:
            return None, tensor
        value = self._constant(layer.get_input(1 - index))
        if value is None or value.size != n or value.shape[-1:] != (n,):
            return None, tensor
        return np.ascontiguousarray(value.reshape(n).astype(np.float32)), layer.get_output(0)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def _add(self, value: Array) -> Any:
        self.report.weights.append(value)
        return self.network.add_constant(value.shape, self.trt.Weights(value)).get_output(0)

    def _plugin(self, name: str, inputs: list[Any], k: int, n: int, has_bias: bool) -> Any:
        trt = self.trt
        numbers = {
            "in_features": k, "out_features": n, "has_bias": int(has_bias), "has_input_scale": 0, "has_residual": 0,
            "config": opdef.CHOOSE, "constant_weights": 1,
        }  # fmt: skip
        texts = {"scheme": "w8a8_dynamic", "activation": "none"}
        fields = [trt.PluginField(f, np.array([v], np.int32), trt.PluginFieldType.INT32) for f, v in numbers.items()]
        for f, v in texts.items():
            data = np.frombuffer(v.encode() + b"\0", np.int8)
            fields.append(trt.PluginField(f, data, trt.PluginFieldType.CHAR))
        collection = trt.PluginFieldCollection(fields)
        key = (opdef.OP, opdef.PLUGIN_VERSION, opdef.NAMESPACE)
        if hasattr(self.network, "add_plugin_v3"):
            creator = self.api.registry.get_creator(*key)
            plugin = creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
            layer = self.network.add_plugin_v3(inputs, [], plugin) if plugin is not None else None
        else:
            creator = self.api.registry.get_plugin_creator(*key)
            plugin = creator.create_plugin(name, collection)
            layer = self.network.add_plugin_v2(inputs, plugin) if plugin is not None else None
        if layer is None:
            raise RuntimeError(f"{self.api} does not take the plugin for {name}: {self.api.log.take()}")
        layer.name = name
        return layer.get_output(0)

    def _hand_over(self, old: Any, new: Any) -> None:
        """Everything that read ``old`` reads ``new``, the network's outputs included."""
        for layer, index in self.consumers.get(old.name, []):
            layer.set_input(index, new)
        self.consumers[new.name] = self.consumers.pop(old.name, [])
        if old.is_network_output:
            name = old.name
            self.network.unmark_output(old)
            old.name = f"{name}.float"
            new.name = name
            self.network.mark_output(new)
