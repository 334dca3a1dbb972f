"""A float32 ONNX model in float16 or bfloat16, for strongly typed TensorRT (10 and newer, TensorRT-RTX).

Every float32 constant and every node's computation becomes half precision; the model's inputs and outputs keep their
types (a Cast each), and so do the scales of hwkern nodes and the operators in ``KEPT``, which index, count or turn
angles and would lose more than rounding. TensorRT's normalization and softmax accumulate in float32 by themselves.
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from hwkern.tensorrt import opdef
from hwkern.tensorrt.graph import infer_shapes, subgraphs

#: Operators that stay float32. float16 counts exactly to 2048 only, so positions and angles must not pass through it.
KEPT = frozenset({"Cos", "CumSum", "NonMaxSuppression", "Range", "Resize", "Sin", "Upsample"})

_FLOAT = TensorProto.FLOAT


def convert(model: ModelProto, element: int) -> int:
    """Convert in place to ``element`` (TensorProto.FLOAT16 or BFLOAT16); returns how many constants changed.

    Values beyond float16's range are cut to ±65504: masks are often written as the most negative float32, and as -inf
    they would turn a row without any token into NaN. A model that has no float32 in it stays as it is.
    """
    return _Converter(model, element).run()


class _Converter:
    def __init__(self, model: ModelProto, element: int) -> None:
        self.model, self.element = model, element
        self.dtype = helper.tensor_dtype_to_np_dtype(element)
        self.types = {name: kind for name, (kind, _) in infer_shapes(model).items()}
        self.scales = {
            name
            for node in opdef.hwkern_nodes(model)
            for role, name in opdef.inputs(node).items()
            if role in ("weight_scale", "input_scale", "cosine", "sine")
        }
        self.kept = _kept_constants(model.graph)
        self.changed = 0

    def run(self) -> int:
        main = self.model.graph
        for graph in opdef.graphs(main):
            for tensor in graph.initializer:
                if tensor.data_type == _FLOAT and tensor.name not in self.scales | self.kept:
                    self._tensor(tensor)
            self._nodes(graph)
            del graph.value_info[:]
            if graph is not main:
                for value in (*graph.input, *graph.output):
                    if value.type.tensor_type.elem_type == _FLOAT:
                        value.type.tensor_type.elem_type = self.element
        self._boundary(main)
        return self.changed

    def _tensor(self, tensor: TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(
                f"{tensor.name} is float32 and outside the model file: export the model in half precision, or save "
                "it in one file, for a strongly typed TensorRT."
            )
        value = numpy_helper.to_array(tensor)
        if self.element == TensorProto.FLOAT16:
            finite = np.isfinite(value)
            value = np.where(finite, np.clip(value, -65504, 65504), value)
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value.astype(self.dtype)), name))
        self.changed += 1

    def _nodes(self, graph: GraphProto) -> None:
        made: list[NodeProto] = []
        for node in graph.node:
            if node.op_type in KEPT and node.domain in ("", "ai.onnx"):
                made += self._around(node)
                continue
            if node.op_type == "Constant" and node.output[0] in self.kept:
                made.append(node)
                continue
            for a in node.attribute:
                if a.type == AttributeProto.TENSOR and a.t.data_type == _FLOAT:
                    self._tensor(a.t)
                elif a.name in ("to", "dtype") and a.type == AttributeProto.INT and a.i == _FLOAT:
                    a.i = self.element
                elif node.op_type == "Constant" and a.name in ("value_float", "value_floats"):
                    value = np.asarray(helper.get_attribute_value(a), np.float32)
                    a.Clear()
                    a.name, a.type = "value", AttributeProto.TENSOR
                    a.t.CopyFrom(numpy_helper.from_array(value, node.output[0]))
                    self._tensor(a.t)
            made.append(node)
        copies = [NodeProto.FromString(node.SerializeToString()) for node in made]
        del graph.node[:]
        graph.node.extend(copies)

    def _around(self, node: NodeProto) -> list[NodeProto]:
        """A kept node between casts. Its own constants stayed float32."""
        before, after = [], []
        for index, name in enumerate(node.input):
            if name and self.types.get(name) == _FLOAT and name not in self.kept:
                cast = f"{name}.float32.{node.output[0]}"
                before.append(helper.make_node("Cast", [name], [cast], to=_FLOAT))
                node.input[index] = cast
        for index, name in enumerate(node.output):
            if name and self.types.get(name, _FLOAT) == _FLOAT:
                inner = f"{name}.float32"
                node.output[index] = inner
                after.append(helper.make_node("Cast", [inner], [name], to=self.element))
        return [*before, node, *after]

    def _boundary(self, graph: GraphProto) -> None:
        casts: list[NodeProto] = []
        renames: dict[str, str] = {}
        initializers = {tensor.name for tensor in graph.initializer}
        for value in graph.input:
            if value.type.tensor_type.elem_type == _FLOAT and value.name not in initializers:
                renames[value.name] = f"{value.name}.half"
                casts.append(helper.make_node("Cast", [value.name], [f"{value.name}.half"], to=self.element))
        ends: list[NodeProto] = []
        for value in graph.output:
            if value.type.tensor_type.elem_type == _FLOAT:
                renames[value.name] = f"{value.name}.half"
                ends.append(helper.make_node("Cast", [f"{value.name}.half"], [value.name], to=_FLOAT))
        if not renames:
            return
        for inner in opdef.graphs(graph):
            for node in inner.node:
                node.input[:] = [renames.get(name, name) for name in node.input]
                node.output[:] = [renames.get(name, name) for name in node.output]
        copies = [NodeProto.FromString(node.SerializeToString()) for node in (*casts, *graph.node, *ends)]
        del graph.node[:]
        graph.node.extend(copies)


def _kept_constants(graph: GraphProto) -> set[str]:
    """Initializers and outputs of Constant nodes that only kept operators read, in any graph."""
    constants: set[str] = set()
    kept: set[str] = set()
    others: set[str] = set()

    def walk(inner: GraphProto) -> None:
        constants.update(tensor.name for tensor in inner.initializer)
        for node in inner.node:
            if node.op_type == "Constant":
                constants.update(node.output)
            (kept if node.op_type in KEPT else others).update(node.input)
            for body in subgraphs(node):
                walk(body)
        others.update(output.name for output in inner.output)

    walk(graph)
    return (kept - others) & constants
