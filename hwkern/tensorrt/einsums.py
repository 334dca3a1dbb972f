"""Products of two computed tensors as Einsum, so that TensorRT 8.6 compiles what lies between two plugins.

TensorRT 8.6 hands a part of a network to its compiler only where a layer is in it that nothing else runs: a
LayerNormalization, for one, which may have gone into a plugin; or an Einsum. Without one, the attention between two
plugins runs layer by layer. Seen on an H100, two layers of BERT-base's size, 1/8/32 requests of 128 tokens: 119, 214,
578 µs with MatMul and 98, 181, 468 µs with Einsum.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, ModelProto, NodeProto, helper

from hwkern.tensorrt import opdef

Types = Mapping[str, tuple[int, "tuple[int | str | None, ...] | None"]]


def find(graph: GraphProto, types: Types) -> dict[str, int]:
    """The MatMul nodes of which both inputs are computed and have as many leading dimensions: name → rank."""
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    found = {}
    for node in graph.node:
        if node.op_type != "MatMul" or constants & set(node.input):
            continue
        a, b = (types.get(name, (0, None))[1] for name in node.input)
        if a is not None and b is not None and len(a) == len(b) > 2 and _matches(a[:-2], b[:-2]):
            found[_key(node)] = len(a)
    return found


def put(model: ModelProto) -> int:
    """Make Einsum nodes of what ``rewrite`` found; returns how many. Those that lead to a LayerNormalization without a
    hwkern node between are compiled with it as they are, and stay."""
    found = opdef.metadata(model).get("products", {})
    compiled: set[str] = set()  # tensors from which it is
    for node in reversed(model.graph.node):
        leads = node.op_type == "LayerNormalization" or not compiled.isdisjoint(node.output)
        if leads and not opdef.is_hwkern(node):
            compiled.update(node.input)
    count = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and _key(node) in found and compiled.isdisjoint(node.output):
            batch = "abcdefgh"[: found[_key(node)] - 2]
            node.op_type = "Einsum"
            node.attribute.append(helper.make_attribute("equation", f"{batch}ij,{batch}jk->{batch}ik"))
            count += 1
    return count


def take_back(model: ModelProto) -> None:
    """Undo :func:`put`."""
    found = opdef.metadata(model).get("products", {})
    for node in model.graph.node:
        if node.op_type == "Einsum" and _key(node) in found:
            node.op_type = "MatMul"
            del node.attribute[:]


def _key(node: NodeProto) -> str:
    return node.name or node.output[0]


def _matches(a: tuple[int | str | None, ...], b: tuple[int | str | None, ...]) -> bool:
    """Whether leading dimensions may be the same: Einsum does not broadcast. Dimensions that are not known may."""
    if len(a) > 8:
        return False
    known = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    return not any((isinstance(x, int) and isinstance(y, int)) or 1 in (x, y) for x, y in known)
