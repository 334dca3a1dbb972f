"""W8A8 checkpoints of the compressed-tensors format: what vLLM and llm-compressor read and write.

Per int8 layer: ``weight [N, K]`` int8, ``weight_scale [N, 1]`` (or one element), and for static activations
``input_scale [1]`` and, when asymmetric, ``input_zero_point [1]``. config.json's ``quantization_config`` says which
layers are which. NOTE: others clamp static activations to -128 … 127, hwkern to -127 … 127: a value at the very end of
the calibrated range may differ by one step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import ops
from hwkern._layers import find_layers
from hwkern._shards import CheckpointError, Shards, write
from hwkern._static import zero_shift
from hwkern.nn import CalibratedInt8Linear, Int8Embedding, Int8Linear, WeightOnlyInt8Linear
from hwkern.nn.pack import dtype_name

METHOD, FORMAT = "compressed-tensors", "int-quantized"
_DENSE_INT8 = ("int-quantized", "naive-quantized")

# ---- reading --------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a compressed-tensors folder. CheckpointError when there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} was not written by hwkern.save, and its config.json cannot be read ({error})."
        ) from error
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        method = found.get("quant_method") if isinstance(found, dict) else None
        hint = (
            "transformers' from_pretrained loads it (import hwkern first)."
            if method == "hwkern"
            else "hwkern.load reads what hwkern.save wrote, and compressed-tensors W8A8."
        )
        raise CheckpointError(f"{directory} is quantized with {method!r}: {hint}")
    return found


def read_plan(model: nn.Module, shards: Shards) -> Any:
    """A :class:`hwkern.checkpoint.LoadPlan` for such a folder."""
    from hwkern import checkpoint

    config = read_config(shards.directory)
    entries = shards.entries
    kinds = {layer.names[0]: type(layer.module).__name__ for layer in find_layers(model)}
    packed = [name for name in entries if name.endswith(("weight_packed", "weight_global_scale"))]
    if packed:
        raise CheckpointError(f"{shards.directory} holds {packed[0]!r}: not W8A8, but a packed format.")
    described: dict[str, dict[str, Any]] = {}
    sources: dict[str, Any] = {}
    taken: set[str] = set()
    for key, entry in entries.items():
        name, _, last = key.rpartition(".")
        if last != "weight" or entry.dtype != torch.int8:
            continue
        group = _group_of(name, kinds.get(name, "Linear"), config)
        described[name] = _describe(name, group, shards)
        layer_sources = dict(_sources(name, described[name]))
        sources |= layer_sources
        taken |= {n for source in layer_sources.values() for n in source.names}
    layers = checkpoint.replacements(model, described)
    unused = ("input_scale", "input_zero_point", "weight_zero_point")  # of dynamic or symmetric layers
    rest = {n: e for n, e in entries.items() if n not in taken and not n.endswith(unused)}
    sources |= {name: checkpoint.Source((name,)) for name in rest}
    owners = checkpoint._owners(model, layers)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, (module, attribute) in owners.items():
        tensor: Any = module._parameters.get(attribute, module._buffers.get(attribute))
        transient = attribute in module._non_persistent_buffers_set and not tensor.is_meta
        if name not in sources and id(tensor) in first:
            ties[name] = first[id(tensor)]
        elif not (transient and name not in sources):
            expected[name] = (tensor.dtype, tuple(tensor.shape))
        first.setdefault(id(tensor), name)
    made = {f"{layer.names[0]}.{key}" for layer, int8 in layers for key in (*int8._parameters, *int8._buffers)}
    found = {name: expected.get(name, (torch.int8, ())) for name in sources if name in made}
    found |= {name: (entry.dtype, entry.shape) for name, entry in rest.items()}
    checkpoint.compare(expected, found, shards.directory)
    return checkpoint.LoadPlan(model, layers, sources, ties)


def _matches(target: str, name: str, kind: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (kind, name) or (target == "Linear" and kind.endswith("Int8Linear"))


def _group_of(name: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config group of one int8 layer: a name or pattern counts before the name of a class."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("quantization_config: its config_groups are not those of a W8A8 model.")
    hits = [
        (target == kind, group)
        for group in groups.values()
        for target in group.get("targets") or []
        if _matches(target, name, kind)
    ]
    if not hits:
        raise CheckpointError(f"{name!r} is int8 in the files, but no group of quantization_config names it.")
    group = min(hits, key=lambda hit: hit[0])[1]
    weights = group.get("weights") or {}
    for key, allowed in {
        "num_bits": (8,),
        "type": ("int",),
        "symmetric": (True,),
        "strategy": ("channel", "tensor"),
        "dynamic": (False, None),
    }.items():
        if weights.get(key) not in allowed:
            raise CheckpointError(
                f"{name!r}: its weights have {key} = {weights.get(key)!r}, but hwkern reads {allowed[0]!r} only."
            )
    stored = group.get("format") or config.get("format")
    if stored not in _DENSE_INT8:
        raise CheckpointError(f"{name!r} has the format {stored!r}; hwkern reads {' and '.join(_DENSE_INT8)}.")
    return group


def _describe(name: str, group: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """As hwkern.nn.scheme.describe, from the group and the tensors' shapes."""
    entry, bias = shards.entries[f"{name}.weight"], shards.entries.get(f"{name}.bias")
    scale = shards.entries.get(f"{name}.weight_scale")
    if len(entry.shape) != 2 or scale is None or scale.shape not in ((entry.shape[0], 1), entry.shape[:1], (1,), ()):
        shape = None if scale is None else scale.shape
        raise CheckpointError(f"{name!r} has a weight of shape {entry.shape} and a weight_scale of {shape}.")
    float_dtype = dtype_name(scale.dtype if scale.dtype in ops.FLOATS else torch.float32)
    found: dict[str, Any] = {
        "class": "Int8Linear",
        "in_features": entry.shape[1],
        "out_features": entry.shape[0],
        "bias": None if bias is None else dtype_name(bias.dtype),
        "float_dtype": float_dtype,
    }
    inputs = group.get("input_activations")
    if inputs is None:
        return {**found, "class": "WeightOnlyInt8Linear", "options": {"max_tokens": None}}
    if inputs.get("num_bits") != 8 or inputs.get("type") != "int":
        raise CheckpointError(f"{name!r}: its inputs are {inputs.get('num_bits')} bits of {inputs.get('type')!r}.")
    if inputs.get("dynamic") is True:
        return found  # the scale per token that hwkern measures is finer than any other dynamic one
    if inputs.get("strategy") != "tensor" or f"{name}.input_scale" not in shards.entries:
        raise CheckpointError(f"{name!r}: static inputs need the strategy 'tensor' and an input_scale in the files.")
    scale_value = float(_value(shards, f"{name}.input_scale"))
    zero = 0 if inputs.get("symmetric", True) else round(float(_value(shards, f"{name}.input_zero_point")))
    options = {
        "input_scale": 1,
        "tensor_scale": scale_value,
        # A zero point of exactly -128 belongs to inputs that are never negative; hwkern's codes begin at -127.
        "zero_point": max(zero, -127),
        "input_multiplier": None,
        "outliers": None,
    }
    return {**found, "class": "CalibratedInt8Linear", "options": options}


def _value(shards: Shards, name: str) -> Tensor:
    if name not in shards.entries:
        raise CheckpointError(f"{shards.directory} lacks {name!r}.")
    ((_, tensor),) = shards.read([name], torch.device("cpu"))
    if tensor.numel() != 1:
        raise CheckpointError(f"{name!r} has the shape {tuple(tensor.shape)}, not one element.")
    return tensor.double().reshape(())


def _sources(name: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    from hwkern.checkpoint import Source

    n = data["out_features"]
    weight, scale, bias = (f"{name}.{key}" for key in ("weight", "weight_scale", "bias"))
    options = data.get("options", {})
    tensor_scale, zero = options.get("tensor_scale"), options.get("zero_point", 0)

    def row_scale(stored: Tensor) -> Tensor:
        return stored.float().reshape(-1).expand(n).contiguous()

    def output_scale(stored: Tensor) -> Tensor:
        row = row_scale(stored)
        return row * torch.full_like(row, tensor_scale)

    yield weight, Source((weight,), ops.pad_weight)
    yield scale, Source((scale,), row_scale)
    if data["bias"] is not None:
        yield bias, Source((bias,))
    if tensor_scale is not None:
        yield f"{name}.input_scale", Source((f"{name}.input_scale",), lambda t: t.float().reshape(1))
        yield f"{name}.output_scale", Source((scale,), output_scale)
        if zero:
            yield f"{name}.shift", Source((weight, scale), lambda w, s: zero_shift(w, output_scale(s), zero))


# ---- writing --------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path, max_shard_bytes: int) -> list[Path]:
    """Write the model so that vLLM serves it: unpadded int8 weights, scales ``[N, 1]``, config.json."""
    from hwkern import checkpoint

    if not callable(getattr(getattr(model, "config", None), "to_dict", None)):
        raise ValueError("format='compressed-tensors' needs a transformers model: its config.json says what it is.")
    tensors, _, transient = checkpoint.collect(model)  # tied tensors once: those who read the config tie them again
    for name in transient:
        del tensors[name]
    groups: dict[str, dict[str, Any]] = {}
    ignored = []
    layers = find_layers(model, embeddings=True)
    tables = {id(layer.weight) for layer in layers if isinstance(layer.module, Int8Embedding)}
    for layer in layers:
        module, name = layer.module, layer.names[0]
        if layer.is_embedding:
            if isinstance(module, Int8Embedding) and tensors.pop(f"{name}.weight_scale", None) is not None:
                tensors[f"{name}.weight"] = module.to_float().weight.detach()  # vLLM has float tables only
            continue
        if id(module._parameters.get("weight")) in tables:
            raise ValueError(
                f"{name!r} cannot be written as compressed-tensors: it shares its int8 weight with an embedding, and "
                "the format's readers tie a head to a float table. Patch it without embeddings."
            )
        if not isinstance(module, Int8Linear):
            ignored.append(name)
            continue
        group = _group(name, module)
        groups.setdefault(json.dumps(group), group)["targets"].append(name)
        tensors |= _layer_tensors(name, module)
        for extra in ("output_scale", "shift"):
            tensors.pop(f"{name}.{extra}", None)
    if not groups:
        raise ValueError("The model has no int8 layer: hwkern.patch it first.")
    config: dict[str, Any] = dict(getattr(model, "config").to_dict())  # noqa: B009
    config["architectures"] = [type(model).__name__]
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    config["dtype"] = config["torch_dtype"] = dtype_name(dtype)  # the second is its name before transformers 5
    config["quantization_config"] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = write(folder, tensors, {}, max_shard_bytes, plain=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    return written


def _group(name: str, module: Int8Linear) -> dict[str, Any]:
    def arguments(strategy: str, dynamic: bool, symmetric: bool = True) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "int",
            "symmetric": symmetric,
            "strategy": strategy,
            "dynamic": dynamic,
            "group_size": None,
            "block_structure": None,
            "actorder": None,
            "observer": None if dynamic else "minmax",
            "observer_kwargs": {},
        }

    problem = ""
    if module._transposed:
        problem = "it replaces a transformers Conv1D, whose weight lies the other way"
    elif isinstance(module, WeightOnlyInt8Linear):
        problem = "it is W8A16 for some numbers of tokens, which the format cannot hold next to W8A8"
    elif isinstance(module, CalibratedInt8Linear) and (module._gain() is not None or module.outlier_index is not None):
        problem = "it divides its inputs or has outlier columns, which the format cannot express"
    if problem:
        raise ValueError(f"{name!r} cannot be written as compressed-tensors: {problem}. Patch it with plain W8A8.")
    static = isinstance(module, CalibratedInt8Linear) and module.input_scale is not None
    symmetric = not getattr(module, "zero_point", 0)
    return {
        "targets": [],
        "weights": arguments("channel", False),
        "input_activations": arguments("tensor", False, symmetric) if static else arguments("token", True),
        "output_activations": None,
        "format": FORMAT,
    }


def _layer_tensors(name: str, module: Int8Linear) -> dict[str, Tensor]:
    found = {
        f"{name}.weight": module.weight.detach()[:, : module.in_features],
        f"{name}.weight_scale": module.weight_scale.unsqueeze(-1),
    }
    if isinstance(module, CalibratedInt8Linear) and module.input_scale is not None:
        found[f"{name}.input_scale"] = module.input_scale
        if module.zero_point:
            found[f"{name}.input_zero_point"] = torch.tensor([module.zero_point], dtype=torch.int8)
    return found
