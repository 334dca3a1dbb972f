"""Reading and writing ONNX graphs: scopes, constants behind chains of nodes, tensors kept outside the file."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from hwkern.tensorrt.opdef import graphs

Array = NDArray[Any]

#: Tensors below this size stay in the model file when its data goes outside.
SMALL_BYTES = 1024
# Serialized protobuf messages end at 2 GB; a model that gets near keeps its weights outside.
_INLINE_LIMIT = 1_800_000_000
_ALIGNMENT = 4096  # lets a reader map each tensor's pages


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    for found in node.attribute:
        if found.name == name:
            return helper.get_attribute_value(found)
    return default


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The bodies that one node holds itself."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def used_names(graph: GraphProto) -> list[str]:
    """Every name that nodes of the graph read, once per use, with those of subgraphs; and the graph's outputs."""
    names = [name for node in graph.node for name in node.input]
    for node in graph.node:
        for inner in subgraphs(node):
            names += used_names(inner)
    return names + [output.name for output in graph.output]


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of the tensor's data."""
    bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 8 * _itemsize(tensor.data_type)
    return math.prod(tensor.dims) * bits // 8


def _itemsize(element: int) -> int:
    return 1 if element == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(element).itemsize


class TensorReader:
    """Reads tensors of one model, from the message or from the files beside it."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def location(self, tensor: TensorProto) -> tuple[Path, int, int]:
        """(file, offset, bytes) of a tensor outside the model file.

        Raises:
            ValueError: the place is outside the model's folder, or there is no folder.
            FileNotFoundError: no such file.
        """
        info = ExternalDataInfo(tensor)
        if self.folder is None:
            raise ValueError(
                f"{tensor.name} keeps its data in the file {info.location!r}: pass the model's path, not its bytes."
            )
        root = self.folder.resolve()
        path = (root / info.location).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"{tensor.name} keeps its data in {info.location!r}, outside the model's folder: refused.")
        if not path.is_file():
            raise FileNotFoundError(
                f"{tensor.name} keeps its data in {info.location!r}, which is not beside the model."
            )
        size = info.length if info.length else tensor_bytes(tensor)
        offset = info.offset or 0
        if offset + size > path.stat().st_size or size < tensor_bytes(tensor):
            raise ValueError(f"{path.name} is too short for {tensor.name}: the model's data file is damaged.")
        return path, offset, size

    def read(self, tensor: TensorProto) -> Array:
        """The values; memory-mapped when they are outside the model file."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        path, offset, _ = self.location(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor_bytes(tensor) == 0:
            return np.empty(tuple(tensor.dims), dtype)
        return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))


@dataclass
class Scope:
    """One graph while it is looked at: names → initializers and producers, and the graph around it."""

    graph: GraphProto
    parent: Scope | None = None
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.inputs = {value.name for value in self.graph.input}

    def find(self, name: str) -> tuple[Scope, TensorProto | NodeProto] | None:
        """What gives ``name`` its value, in this graph or one around it; None for a graph input."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.producers:
                return scope, scope.producers[name]
            if name in scope.initializers:
                return scope, scope.initializers[name]
            if name in scope.inputs:
                return None
            scope = scope.parent
        return None


@dataclass(frozen=True)
class Quantized:
    """A constant that a DequantizeLinear with a symmetric int8 input gives: value = q · scale."""

    load: Callable[[], Array]  # int8, of the constant's shape
    scale: Array  # float32, one element or one per index of `axis`
    axis: int


@dataclass(frozen=True)
class Constant:
    """A constant value behind any chain of shape-only and casting nodes; read on demand."""

    shape: tuple[int, ...]
    element: int  # ONNX element type
    load: Callable[[], Array]
    key: tuple[Any, ...]  # equal keys, equal values
    root: str  # name of the initializer or node output it comes from
    quantized: Quantized | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Constants:
    """Finds constants. ``overridable``: initializers that are graph inputs too count as constants."""

    def __init__(self, reader: TensorReader, overridable: bool) -> None:
        self.reader, self.overridable = reader, overridable

    def find(self, name: str, scope: Scope) -> Constant | None:
        """The constant called ``name``, or None when it depends on an input."""
        found = scope.find(name) if name else None
        if found is None:
            return None
        home, source = found
        if isinstance(source, TensorProto):
            if name in home.inputs and not self.overridable:
                return None
            return self._tensor(source, ("initializer", id(home.graph), name), name)
        return self._node(source, home)

    def scalar(self, name: str, scope: Scope) -> float | None:
        """The value of a one-element float or integer constant."""
        found = self.find(name, scope)
        if found is None or found.size != 1 or found.element == TensorProto.STRING:
            return None
        return float(found.load().astype(np.float64).reshape(()))

    def _tensor(self, tensor: TensorProto, key: tuple[Any, ...], root: str) -> Constant:
        return Constant(tuple(tensor.dims), tensor.data_type, lambda: self.reader.read(tensor), key, root)

    def _node(self, node: NodeProto, scope: Scope) -> Constant | None:
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return self._constant_node(node, scope)
        if node.op_type not in _STEPS:
            return None
        inputs = [self.find(name, scope) if name else None for name in node.input]
        if not inputs or inputs[0] is None or any(i is None and n for i, n in zip(inputs, node.input, strict=True)):
            return None
        return _STEPS[node.op_type](node, inputs)

    def _constant_node(self, node: NodeProto, scope: Scope) -> Constant | None:
        key = ("node", id(scope.graph), node.output[0])
        for a in node.attribute:
            if a.ref_attr_name:
                return None
            if a.name == "value":
                return self._tensor(a.t, key, node.output[0])
            if a.name in ("value_float", "value_floats", "value_int", "value_ints"):
                kind = np.float32 if "float" in a.name else np.int64
                value: Array = np.asarray(helper.get_attribute_value(a), kind)
                element = TensorProto.FLOAT if "float" in a.name else TensorProto.INT64
                return Constant(value.shape, element, partial(_same, value), key, node.output[0])
        return None


def _same(value: Array) -> Array:
    return value


# ---- one function per op that a constant may pass through -----------------------------------------------------------

_Inputs = Sequence[Constant | None]


def _derived(
    source: Constant, step: tuple[Any, ...], shape: Sequence[int], change: Callable[[Array], Array]
) -> Constant:
    return Constant(
        tuple(shape), source.element, lambda: change(source.load()), (*source.key, step), source.root, source.quantized
    )


def _first(inputs: _Inputs) -> Constant:
    assert inputs[0] is not None
    return inputs[0]


def _identity(node: NodeProto, inputs: _Inputs) -> Constant | None:
    return _first(inputs)


def _transpose(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source = _first(inputs)
    perm = tuple(attribute(node, "perm", reversed(range(len(source.shape)))))
    made = _derived(source, ("T", perm), [source.shape[i] for i in perm], lambda a: a.transpose(perm))
    if source.quantized is None:
        return made
    q = source.quantized
    axis = perm.index(q.axis) if q.scale.size > 1 else 0
    moved = Quantized(lambda: q.load().transpose(perm), q.scale, axis)
    return Constant(made.shape, made.element, made.load, made.key, made.root, moved)


def _reshaped(source: Constant, shape: Sequence[int]) -> Constant | None:
    if math.prod(shape) != source.size:
        return None
    target = tuple(shape)
    made = _derived(source, ("R", target), target, lambda a: a.reshape(target))
    if source.quantized is None:
        return made
    q = source.quantized
    without_ones = [d for d in source.shape if d != 1] == [d for d in target if d != 1]
    moved = None
    if q.scale.size == 1:
        moved = Quantized(lambda: q.load().reshape(target), q.scale, 0)
    elif without_ones:  # only ones came or went, so the scale's axis is where its length is, counted without ones
        rank = len([d for d in source.shape[: q.axis] if d != 1])
        axis = [i for i, d in enumerate(target) if d != 1][rank]
        moved = Quantized(lambda: q.load().reshape(target), q.scale, axis)
    return Constant(made.shape, made.element, made.load, made.key, made.root, moved)


def _reshape(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source = _first(inputs)
    if len(inputs) < 2 or inputs[1] is None:
        return None
    shape = [int(d) for d in inputs[1].load().reshape(-1)]
    if not attribute(node, "allowzero", 0):
        if any(d == 0 and i >= len(source.shape) for i, d in enumerate(shape)):
            return None
        shape = [source.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    if -1 in shape:
        known = math.prod(d for d in shape if d != -1)
        shape[shape.index(-1)] = source.size // max(1, known)
    return _reshaped(source, shape)


def _axes(node: NodeProto, inputs: _Inputs, rank: int) -> list[int] | None:
    axes = attribute(node, "axes")
    if axes is None and len(inputs) > 1 and inputs[1] is not None:
        axes = inputs[1].load().reshape(-1)
    return None if axes is None else [int(a) % rank for a in axes]


def _squeeze(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source = _first(inputs)
    axes = _axes(node, inputs, max(1, len(source.shape)))
    return _reshaped(source, [d for i, d in enumerate(source.shape) if not (d == 1 if axes is None else i in axes)])


def _unsqueeze(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source = _first(inputs)
    count = len(attribute(node, "axes", ())) or (inputs[1].size if len(inputs) > 1 and inputs[1] else 0)
    axes = _axes(node, inputs, len(source.shape) + count)
    if axes is None:
        return None
    rest = iter(source.shape)
    return _reshaped(source, [1 if i in axes else next(rest) for i in range(len(source.shape) + count)])


def _flatten(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source = _first(inputs)
    axis = attribute(node, "axis", 1) % (len(source.shape) + 1)
    return _reshaped(source, [math.prod(source.shape[:axis]), math.prod(source.shape[axis:])])


def _cast(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source, to = _first(inputs), attribute(node, "to")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(to)
    except KeyError:
        return None
    key = (*source.key, ("C", to))
    return Constant(source.shape, to, lambda: source.load().astype(dtype), key, source.root, source.quantized)


def _along(values: Array, axis: int, rank: int) -> Array:
    """Scales or zero points shaped to broadcast against a tensor of ``rank``."""
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def _dequantize(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source, scale = _first(inputs), inputs[1] if len(inputs) > 1 else None
    zero = inputs[2] if len(inputs) > 2 else None
    if scale is None or len(scale.shape) > 1 or attribute(node, "block_size", 0):
        return None
    rank = len(source.shape)
    axis = attribute(node, "axis", 1) % max(1, rank) if scale.size > 1 else 0
    scales = scale.load().astype(np.float32).reshape(-1)
    zeros = zero.load().astype(np.float32).reshape(-1) if zero is not None else np.zeros(1, np.float32)

    def load() -> Array:
        return (source.load().astype(np.float32) - _along(zeros, axis, rank)) * _along(scales, axis, rank)

    symmetric = source.element == TensorProto.INT8 and not zeros.any()
    quantized = Quantized(source.load, scales, axis) if symmetric else None
    return Constant(source.shape, scale.element, load, (*source.key, ("DQ", scale.key)), source.root, quantized)


def _quantize(node: NodeProto, inputs: _Inputs) -> Constant | None:
    source, scale = _first(inputs), inputs[1] if len(inputs) > 1 else None
    zero = inputs[2] if len(inputs) > 2 else None
    element = zero.element if zero is not None else attribute(node, "output_dtype", 0) or TensorProto.UINT8
    if scale is None or len(scale.shape) > 1 or element not in (TensorProto.INT8, TensorProto.UINT8):
        return None
    rank = len(source.shape)
    axis = attribute(node, "axis", 1) % max(1, rank) if scale.size > 1 else 0
    dtype = np.int8 if element == TensorProto.INT8 else np.uint8
    bounds = np.iinfo(dtype)

    def load() -> Array:
        scales = _along(scale.load().astype(np.float32).reshape(-1), axis, rank)
        zeros = _along(zero.load().astype(np.float32).reshape(-1), axis, rank) if zero is not None else np.float32(0)
        return np.clip(np.rint(source.load().astype(np.float32) / scales) + zeros, bounds.min, bounds.max).astype(dtype)

    return Constant(source.shape, element, load, (*source.key, ("Q", scale.key)), source.root)


_STEPS: dict[str, Callable[[NodeProto, _Inputs], Constant | None]] = {
    "Cast": _cast,
    "DequantizeLinear": _dequantize,
    "Flatten": _flatten,
    "Identity": _identity,
    "QuantizeLinear": _quantize,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


# ---- shapes --------------------------------------------------------------------------------------------------------


def infer_shapes(model: ModelProto) -> dict[str, tuple[int, tuple[int | str | None, ...] | None]]:
    """name → (element type, dims or None) for the main graph and all others, as far as ONNX can tell.

    Works on a copy without the weights, so models of any size are fine. An entry is missing where nothing is known.
    """
    skeleton = ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    graph = skeleton.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    known = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and tensor_bytes(tensor) <= SMALL_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in known:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    # A model that ONNX cannot type (custom ops, broken shapes) is rewritten with what it tells itself. With its shape
    # arithmetic followed (data_prop), a tensor that was reshaped keeps the names of its dynamic axes.
    for follow in (True, False):
        with contextlib.suppress(Exception):
            skeleton = onnx.shape_inference.infer_shapes(skeleton, data_prop=follow)
            break
    found: dict[str, tuple[int, tuple[int | str | None, ...] | None]] = {}
    for inner in graphs(skeleton.graph):
        for value in (*inner.input, *inner.value_info, *inner.output):
            kind = value.type.tensor_type
            if value.type.HasField("tensor_type"):
                dims = None
                if kind.HasField("shape"):
                    dims = tuple(
                        d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in kind.shape.dim
                    )
                found[value.name] = (kind.elem_type, dims)
        for tensor in inner.initializer:
            found[tensor.name] = (tensor.data_type, tuple(tensor.dims))
    return found


# ---- files ---------------------------------------------------------------------------------------------------------


def all_tensors(model: ModelProto) -> list[TensorProto]:
    """Every initializer and every tensor in a Constant node, at any depth."""
    found = []
    for graph in graphs(model.graph):
        found += graph.initializer
        found += [a.t for node in graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    return found


def load(source: str | os.PathLike[str] | bytes | ModelProto) -> tuple[ModelProto, TensorReader]:
    """The model without the tensors that are outside its file, and a reader for all its tensors. Never changes a
    ModelProto that is passed in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not an ONNX model.
    """
    folder = None
    try:
        if isinstance(source, ModelProto):
            model = ModelProto()
            model.CopyFrom(source)
        elif isinstance(source, bytes):
            model = onnx.load_from_string(source)
        else:
            folder = Path(source).parent
            model = onnx.load(os.fspath(source), load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        name = "the bytes" if isinstance(source, bytes) else str(source)
        raise ValueError(f"{name} cannot be read as an ONNX model ({error}).") from error
    if not model.HasField("graph") or not model.graph.node:
        raise ValueError("This is no ONNX model with a graph (or an empty one): there is nothing to work on.")
    return model, TensorReader(folder)


class DataFile:
    """The file beside a model that holds its tensors; written once, from front to back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.{id(self)}.part")  # also marks the tensors that are in it already
        self._file: BinaryIO = self.part.open("wb")

    def take(self, tensor: TensorProto, reader: TensorReader) -> None:
        """Move the tensor's data into the file."""
        offset = -(-self._file.tell() // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(offset)
        if tensor.data_location == TensorProto.EXTERNAL:
            source, start, size = reader.location(tensor)
            with source.open("rb") as data:
                data.seek(start)
                _copy(data, self._file, size)
        else:
            size = self._file.write(tensor.raw_data or numpy_helper.to_array(tensor).tobytes())
            for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(name)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.part.name), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)

    def holds(self, tensor: TensorProto) -> bool:
        return any(e.key == "location" and e.value == self.part.name for e in tensor.external_data)

    def finish(self, tensors: Sequence[TensorProto]) -> None:
        """Close the file, give it its name, and let the tensors in it know."""
        self._file.close()
        self.part.replace(self.path)
        for tensor in filter(self.holds, tensors):
            next(e for e in tensor.external_data if e.key == "location").value = self.path.name

    def abandon(self) -> None:
        self._file.close()
        self.part.unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    left = size
    while left:
        block = source.read(min(left, 1 << 24))
        if not block:
            raise ValueError("the model's data file ends too early.")
        target.write(block)
        left -= len(block)


def keeps_data_outside(model: ModelProto) -> bool:
    """Whether the model has its weights in files beside it, or is too big for anything else."""
    tensors = all_tensors(model)
    return any(t.data_location == TensorProto.EXTERNAL for t in tensors) or (
        sum(tensor_bytes(t) for t in tensors) > _INLINE_LIMIT
    )


def save(model: ModelProto, path: Path, data: DataFile | None, reader: TensorReader) -> None:
    """Write the model; with ``data``, every tensor of more than ``SMALL_BYTES`` goes there (some may already be)."""
    if data is not None:
        tensors = all_tensors(model)
        for tensor in tensors:
            outside = tensor.data_location == TensorProto.EXTERNAL
            big = tensor_bytes(tensor) > SMALL_BYTES and tensor.data_type != TensorProto.STRING
            if (outside and not data.holds(tensor)) or (not outside and big):
                data.take(tensor, reader)
        data.finish(tensors)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(model.SerializeToString())
    shutil.move(part, path)
