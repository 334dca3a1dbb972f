"""``export``: a patched torch model as ONNX, with hwkern nodes that hold the very bytes of its packed weights."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import NodeProto

import hwkern.ops  # noqa: F401  (the operators must be registered before torch.export sees the model)
from hwkern._layers import find_layers
from hwkern.nn import Int8Embedding
from hwkern.tensorrt import graph, opdef


def export(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 18,
    functions: bool = True,
) -> Path:
    """Export with torch.onnx's dynamo exporter; ``hwkern.patch``-ed layers become LinearInt8 nodes.

    A node has the packed weight, scale and bias of its layer, so the engine computes what eager torch computes, to the
    last bit of each linear (activation functions that torch computes apart excepted). Int8 embeddings become float
    tables with the same values, which every TensorRT can gather from.

    Args:
        model: any module, in eval mode; on the CPU or on CUDA.
        example_inputs: positional arguments as a sequence, or keyword arguments as a mapping.
        path: of the ONNX file; with large weights also ``<path>.data``.
        dynamic_shapes: as for ``torch.export.export``; None: all shapes are fixed.
        input_names, output_names: names in the ONNX model; default: torch's.
        opset: 18 or newer (TensorRT 8.6 reads up to 17: for it, export the float model with torch.onnx,
            ``dynamo=False`` and opset 17, and use ``rewrite``).
        functions: add the bodies that let onnx's evaluator and ONNX Runtime run the file.

    Returns:
        The path.

    Raises:
        ImportError: onnxscript is missing. Whatever torch.export raises for models that it cannot trace.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("hwkern.tensorrt.export needs onnxscript (torch's exporter does): pip install 'hwkern[onnx]'")
    is_mapping = isinstance(example_inputs, Mapping)
    target = Path(path)
    with torch.no_grad(), warnings.catch_warnings(), _float_tables(model):
        warnings.simplefilter("ignore")  # torch's own deprecations, while it exports
        program = torch.onnx.export(
            model,
            () if is_mapping else tuple(example_inputs),
            kwargs=dict(example_inputs) if is_mapping else None,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            custom_translation_table=_translations(),
        )
    assert program is not None
    program.save(str(target), external_data=_is_large(model))
    _finish(target, functions)
    return target


@contextlib.contextmanager
def _float_tables(model: torch.nn.Module) -> Iterator[None]:
    """The model with its int8 embeddings as float ones, which give the same bits."""
    tables = [layer for layer in find_layers(model, embeddings=True) if isinstance(layer.module, Int8Embedding)]
    try:
        for layer in tables:
            table = cast(Int8Embedding, layer.module).to_float().requires_grad_(False)
            for parent, attribute in layer.slots:
                parent._modules[attribute] = table
        yield
    finally:
        for layer in tables:
            for parent, attribute in layer.slots:
                parent._modules[attribute] = layer.module


def _is_large(model: torch.nn.Module) -> bool:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) > 1_500_000_000


def _translations() -> dict[Any, Any]:
    import onnxscript

    domain = onnxscript.values.Opset(opdef.NAMESPACE, 1)

    def node(
        scheme: str, x: Any, weight: Any, scale: Any, bias: Any, input_scale: Any, residual: Any, out_dtype: Any,
        config: int, activation: str,
    ) -> Any:  # fmt: skip
        k = x.shape[-1] if x.shape is not None else None
        if not isinstance(k, int):
            raise ValueError(f"The last dimension of a hwkern linear's input is {k} in the export: it must be fixed.")
        if out_dtype is not None and int(out_dtype) != int(x.dtype):
            raise ValueError(
                "A hwkern linear whose output has another dtype than its input (autocast) cannot be exported: cast the "
                "model with .half() or .bfloat16() instead."
            )
        inputs = [x, weight, scale, *(t for t in (bias, input_scale, residual) if t is not None)]
        return onnxscript.values.Op(domain, opdef.OP, _schema(len(inputs)))(
            *inputs,
            in_features=k,
            out_features=int(weight.shape[0]),
            scheme=scheme,
            activation=activation,
            has_bias=int(bias is not None),
            has_input_scale=int(input_scale is not None),
            has_residual=int(residual is not None),
            config=config,
            constant_weights=1,
            plugin_namespace=opdef.NAMESPACE,
            plugin_version=opdef.PLUGIN_VERSION,
        )

    def int8_linear(
        x: Any, weight: Any, weight_scale: Any, bias: Any = None, out_dtype: Any = None, config: int = opdef.CHOOSE,
        activation: str = "none", residual: Any = None,
    ) -> Any:  # fmt: skip
        return node("w8a8_dynamic", x, weight, weight_scale, bias, None, residual, out_dtype, config, activation)

    def weight_only_linear(
        x: Any, weight: Any, weight_scale: Any, bias: Any = None, out_dtype: Any = None, config: int = opdef.CHOOSE,
        activation: str = "none", residual: Any = None,
    ) -> Any:  # fmt: skip
        return node("w8a16", x, weight, weight_scale, bias, None, residual, out_dtype, config, activation)

    def int8_linear_static(
        x: Any, weight: Any, output_scale: Any, input_scale: Any, zero_point: int = 0, bias: Any = None,
        out_dtype: Any = None, config: int = opdef.CHOOSE,
    ) -> Any:  # fmt: skip
        if zero_point:
            raise ValueError(
                f"A static layer with the zero point {zero_point} has no TensorRT kernel: calibrate symmetrically."
            )
        return node("w8a8_static", x, weight, output_scale, bias, input_scale, None, out_dtype, config, "none")

    found: dict[Any, Any] = {torch.ops.hwkern.int8_linear.default: int8_linear}
    for translation in (int8_linear_static, weight_only_linear):  # each where its kind of layer is in use
        operator = getattr(torch.ops.hwkern, translation.__name__, None)
        if operator is not None:
            found[operator.default] = translation
    return found


def _schema(inputs: int) -> Any:
    """An operator schema for torch's exporter: any types, since torch has checked them."""
    schema = onnx.defs.OpSchema
    floats = [f"tensor({name})" for name in ("float", "float16", "bfloat16")]
    kinds = {"T": floats, **{f"T{i}": [*floats, "tensor(int8)"] for i in range(1, inputs)}}
    integers = (
        "in_features",
        "out_features",
        "has_bias",
        "has_input_scale",
        "has_residual",
        "config",
        "constant_weights",
    )
    texts = ("scheme", "activation", "plugin_namespace", "plugin_version")
    attributes = [(name, schema.AttrType.INT) for name in integers] + [(name, schema.AttrType.STRING) for name in texts]
    return schema(
        opdef.OP,
        opdef.NAMESPACE,
        1,
        inputs=[schema.FormalParameter(f"input{i}", f"T{i}" if i else "T") for i in range(inputs)],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[(name, allowed, "") for name, allowed in kinds.items()],
        attributes=[schema.Attribute(name, kind, required=True) for name, kind in attributes],
    )


def _finish(path: Path, functions: bool) -> None:
    """Give each node the domain of its variant, add the bodies, and write the file again."""
    model, _ = graph.load(path)
    types = graph.infer_shapes(model)
    nodes = opdef.hwkern_nodes(model)
    variants = []
    for node in nodes:
        variants.append(opdef.variant_of(node, _element(node, types)))
        node.domain = variants[-1].domain
    kept = [entry for entry in model.opset_import if entry.domain != opdef.NAMESPACE]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if nodes:
        opdef.add_functions(model, variants)
        if not functions:
            opdef.strip_functions(model)
        plan = {node.name: opdef.attributes(node)["scheme"] for node in nodes}
        opdef.set_metadata(model, {"op_version": opdef.PLUGIN_VERSION, "nodes": plan, "exported": True})
    part = path.with_name(path.name + ".part")
    part.write_bytes(model.SerializeToString())
    part.replace(path)


def _element(node: NodeProto, types: Mapping[str, Any]) -> int:
    """The element type of a node's x: torch wrote every type into value_info."""
    for name in (node.input[0], node.output[0]):
        kind, _ = types.get(name, (0, None))
        if kind in opdef.FLOATS:
            return int(kind)
    raise ValueError(f"{node.name}: the exported model does not tell the type of {node.input[0]}.")
