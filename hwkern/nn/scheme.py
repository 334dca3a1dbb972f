"""From an int8 layer to plain data and back: what checkpoints and plans write down of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hwkern.nn.calibrated import CalibratedInt8Conv1D, CalibratedInt8Linear
from hwkern.nn.conv1d import Int8Conv1D
from hwkern.nn.embedding import Int8Embedding
from hwkern.nn.linear import Int8Linear
from hwkern.nn.pack import dtype_name
from hwkern.nn.packed import PackedLayer
from hwkern.nn.weight_only import WeightOnlyInt8Conv1D, WeightOnlyInt8Linear
from hwkern.ops import FLOATS

#: Every class of int8 layer by the name that files use; for the float class that it replaces, in pairs.
CLASSES: dict[str, type[Int8Linear]] = {
    cls.__name__: cls
    for cls in (
        Int8Linear,
        Int8Conv1D,
        CalibratedInt8Linear,
        CalibratedInt8Conv1D,
        WeightOnlyInt8Linear,
        WeightOnlyInt8Conv1D,
    )
}
_DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


def describe(layer: PackedLayer) -> dict[str, Any]:
    """Everything about ``layer`` but its tensors, ready for JSON."""
    if isinstance(layer, Int8Embedding):
        return {
            "class": type(layer).__name__,
            "scheme": layer.scheme,
            "num_embeddings": layer.num_embeddings,
            "embedding_dim": layer.embedding_dim,
            "padding_idx": layer.padding_idx,
            "float_dtype": dtype_name(layer.float_dtype),
        }
    assert isinstance(layer, Int8Linear)
    bias = layer.bias
    return {
        "class": type(layer).__name__,
        "scheme": layer.scheme,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": None if bias is None else dtype_name(bias.dtype),
        "float_dtype": dtype_name(layer.float_dtype),
        **({"options": options} if (options := layer._options()) else {}),
    }


def build(data: Mapping[str, Any], device: torch.device | str = "meta") -> PackedLayer:
    """A layer of zeros from :func:`describe`'s data. ValueError, in words, for data that describe no layer."""
    try:
        if data["class"] == Int8Embedding.__name__:
            return _embedding(data, device)
        cls = CLASSES[data["class"]]
        bias, dtype = data["bias"], _DTYPES[data["float_dtype"]]
        sizes = (data["in_features"], data["out_features"])
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"sizes {sizes}")
        layer = cls(*sizes, bias=bias is not None, device=device, dtype=_DTYPES[bias] if bias is not None else dtype)
        layer.float_dtype = dtype
        layer._set_options(data.get("options", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no int8 layer is described by {dict(data)!r} ({type(error).__name__}: {error})") from error
    return layer


def _embedding(data: Mapping[str, Any], device: torch.device | str) -> Int8Embedding:
    sizes, padding = (data["num_embeddings"], data["embedding_dim"]), data["padding_idx"]
    if not all(isinstance(size, int) for size in sizes) or not (padding is None or isinstance(padding, int)):
        raise TypeError(f"sizes {sizes}, padding_idx {padding}")
    return Int8Embedding(*sizes, padding, device=device, dtype=_DTYPES[data["float_dtype"]])
