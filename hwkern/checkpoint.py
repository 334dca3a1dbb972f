"""``save`` and ``load``: a model with int8 layers as safetensors files, whole or not at all.

A folder holds ``model.safetensors`` (or numbered parts with Hugging Face's index). The header of the first part says,
under ``hwkern``, what each int8 layer is (:func:`hwkern.nn.scheme.describe`), which tensors are one and the same, which
buffers a state_dict leaves out, and the plan that made the model. :mod:`hwkern._shards` has the files' own checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hwkern import _fusion, _hf_hook, _native
from hwkern._layers import Layer, adopt, find_layers
from hwkern._originals import Original
from hwkern._shards import CheckpointError, Shards, write
from hwkern.nn import Int8Embedding, Int8Linear
from hwkern.nn.pack import dtype_name
from hwkern.nn.packed import PackedLayer
from hwkern.nn.scheme import build, describe

__all__ = ["CheckpointError", "load", "save"]

#: Bytes in one file at most; what the Hugging Face hub and network file systems take well.
MAX_SHARD_BYTES = 5 * 10**9


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: Literal["hwkern", "compressed-tensors"] = "hwkern",  # noqa: A002
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write ``model`` into a folder: int8 weights, float32 scales, and everything else it holds.

    Args:
        model: any module; what it holds as int8 layers is described, all other tensors are written as they are.
        directory: is made when it is missing. Files get their names when all are complete; what was there before of
            another save is replaced, other files stay. A transformers model writes its config.json as well.
        format: "hwkern", or "compressed-tensors" for W8A8 that vLLM serves too (docs/checkpoints.md).
        max_shard_bytes: a larger model becomes several files.

    Returns:
        The files with the weights.

    Raises:
        TypeError: the model holds something that is no dense tensor of a common dtype.
        ValueError: a tensor is on the meta device, or the format cannot express a layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hwkern.save takes a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(max_shard_bytes, int) or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes = {max_shard_bytes!r}: it must be a positive number of bytes.")
    if format == "compressed-tensors":
        from hwkern import _compressed_tensors

        return _compressed_tensors.save(model, Path(directory), max_shard_bytes)
    if format != "hwkern":
        raise ValueError(f"format = {format!r}: it must be 'hwkern' or 'compressed-tensors'.")
    folder = Path(directory)
    tensors, ties, transient = collect(model)
    folder.mkdir(parents=True, exist_ok=True)
    written = write(folder, tensors, manifest(model, ties, transient), max_shard_bytes)
    _write_config(model, folder)
    return written


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Fill ``model`` from a folder that :func:`save` wrote, or that holds a compressed-tensors W8A8 model.

    The linear layers that are int8 in the files become int8 layers; no float weight is ever made for them. Every file
    is checked (lengths, checksums, versions, names, shapes) before the first change to ``model``.

    Args:
        directory: the folder.
        model: the float model as it was before ``patch``, best built under ``torch.device("meta")``; None builds it
            from the folder's config.json (a transformers model).
        device: where the tensors go, straight from the file; by default where the model is, the CPU for one on meta.

    Returns:
        The same ``model``.

    Raises:
        CheckpointError (a ValueError): the files are missing, damaged, newer than this hwkern, or do not fit the model;
            missing, extra and wrong-shape tensors are named. The model is as before.
        RuntimeError: the int8 kernels cannot run on ``device``.
    """
    folder = Path(directory)
    if model is None:
        from hwkern import hf

        model = hf.empty_model(folder)
        device = "cpu" if device is None else device
    if not isinstance(model, nn.Module):
        raise TypeError(f"hwkern.load takes a torch.nn.Module, not {type(model).__name__}.")
    target = _device(model, device)
    shards = Shards(folder)
    if shards.manifest:
        plan = _native_plan(model, shards)
    else:
        from hwkern import _compressed_tensors

        plan = _compressed_tensors.read_plan(model, shards)
    _fusion.unfuse(model)
    try:
        plan.run(shards, target)
        model.to(target)  # buffers that no file holds
    finally:
        _fusion.fuse(model)
    _hf_hook.tell(model)
    return model


# ---- saving ---------------------------------------------------------------------------------------------------------


def collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """All parameters and buffers by name, each once; aliases → name; the names of non-persistent buffers."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    transient: list[str] = []
    first: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise TypeError(
                f"{prefix or 'The model'!r} ({type(module).__name__}) keeps state that is no tensor (get_extra_state), "
                "which a safetensors file cannot hold."
            )
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if id(tensor) in first:
                ties[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            if tensor.is_meta or tensor.layout != torch.strided:
                what = "is on the meta device, without values" if tensor.is_meta else f"has layout {tensor.layout}"
                raise ValueError(f"{name!r} {what}: there is nothing to save.")
            tensors[name] = tensor
            if key in module._non_persistent_buffers_set:
                transient.append(name)
    return tensors, ties, transient


def manifest(model: nn.Module, ties: Mapping[str, str], transient: Sequence[str]) -> dict[str, Any]:
    """What the first file's header says of the model."""
    import hwkern

    layers = {
        layer.names[0]: describe(layer.module)
        for layer in find_layers(model, embeddings=True)
        if isinstance(layer.module, PackedLayer)
    }
    plan = getattr(model, "_hwkern_plan", None)
    return {
        "hwkern": hwkern.__version__,
        "model": type(model).__name__,
        "layers": layers,
        "ties": dict(ties),
        "transient": list(transient),
        **({"plan": plan} if plan is not None else {}),
    }


def _write_config(model: nn.Module, folder: Path) -> None:
    """A transformers model's config.json, so that the folder alone says what model it is."""
    config = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    from hwkern import hf

    hf.sync(model)
    cast(Any, config).architectures = [type(model).__name__]
    cast(Any, config).save_pretrained(folder)


# ---- loading --------------------------------------------------------------------------------------------------------


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        found = next((t.device for t in (*model.parameters(), *model.buffers()) if not t.is_meta), torch.device("cpu"))
    else:
        found = torch.device(device)
    if found.type == "meta":
        raise ValueError("hwkern.load needs a device with memory: device='meta' would load nothing.")
    if found.type != "cpu":
        problem = _native.cuda_problem() if found.type == "cuda" else "hwkern has kernels for CUDA and for the CPU."
        if problem is not None:
            raise RuntimeError(f"hwkern.load cannot put int8 layers on {found}: {problem}")
    return found


@dataclass
class Source:
    """Where a tensor of the model comes from: file entries, and how they become the tensor."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] | None = None  # of the entries' tensors on the device; None: the one entry as it is


@dataclass
class LoadPlan:
    """Everything that a load will change, checked before anything is read."""

    model: nn.Module
    layers: list[tuple[Layer, PackedLayer]]  # to be put in, on the meta device so far
    sources: dict[str, Source]  # tensor name in the model → where from
    ties: dict[str, str]
    recipe: Any = None  # the plan that made the model, as data

    def run(self, shards: Shards, device: torch.device) -> None:
        """Read all, then commit. CheckpointError leaves the model as it was."""
        owners = _owners(self.model, self.layers)
        check_attributes(self.model)
        loaded: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, source in self.sources.items():
                read = dict(shards.read(source.names, device))
                tensors = [read[n] for n in source.names]
                loaded[name] = tensors[0] if source.make is None else source.make(*tensors)
            bad = [name for name, t in loaded.items() if name.endswith("weight_scale") and not _finite(t)]
            if bad:
                raise CheckpointError(f"{shards.directory}: {bad[0]!r} holds NaN or ±inf.")
            self._commit(owners, loaded)

    def _commit(self, owners: Mapping[str, tuple[nn.Module, str]], loaded: Mapping[str, Tensor]) -> None:
        new: dict[str, Tensor] = {}
        for name, tensor in loaded.items():
            module, key = owners[name]
            old = module._parameters.get(key)
            if key in module._parameters:
                grad = old is not None and old.requires_grad and tensor.is_floating_point()
                new[name] = nn.Parameter(tensor, requires_grad=grad)
            else:
                new[name] = tensor
        for alias, name in self.ties.items():
            new[alias] = new[name]
        undo: list[Callable[[], None]] = []
        try:
            for layer, int8 in self.layers:
                old_module = layer.module
                adopt(int8, old_module)
                for parent, attribute in layer.slots:
                    undo.append(_restore(parent._modules, attribute, parent._modules[attribute]))
                    parent._modules[attribute] = int8
                int8._original = Original(None, None, "the layer was loaded from a file, without a float weight")
            for name, tensor in new.items():
                module, key = owners[name]
                table: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
                undo.append(_restore(table, key, table[key]))
                table[key] = tensor
            if self.recipe is not None:
                self.model.__dict__["_hwkern_plan"] = self.recipe
        except BaseException:  # Ctrl-C between two assignments
            for step in reversed(undo):
                step()
            raise


def _restore(table: dict[str, Any], key: str, value: object) -> Callable[[], None]:
    return lambda: table.__setitem__(key, value)


def _finite(scale: Tensor) -> bool:
    return not scale.is_floating_point() or bool(scale.isfinite().all())


def _owners(model: nn.Module, layers: Sequence[tuple[Layer, PackedLayer]]) -> dict[str, tuple[nn.Module, str]]:
    """Tensor name → (module, key) of the model as it will be, aliases included."""
    new = {id(layer.module): int8 for layer, int8 in layers}
    owners: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        module = new.get(id(module), module)
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    owners[f"{prefix}.{key}" if prefix else key] = (module, key)
    return owners


def replacements(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> list[tuple[Layer, PackedLayer]]:
    """For each described int8 layer, the model's layer and its successor on meta; CheckpointError without one."""
    by_name = {name: layer for layer in find_layers(model, embeddings=True) for name in layer.names}
    found = []
    for name, data in described.items():
        layer = by_name.get(name)
        if layer is None:
            raise CheckpointError(
                f"The files hold an int8 layer {name!r}, but the model has no linear layer or embedding there."
            )
        try:
            int8 = build(data)
        except ValueError as error:
            raise CheckpointError(f"The layer {name!r} of the files: {error}.") from error
        _check_sizes(name, layer, int8)
        found.append((layer, int8))
    described_ids = {id(layer.module) for layer, _ in found}
    for name, layer in by_name.items():
        if isinstance(layer.module, PackedLayer) and id(layer.module) not in described_ids:
            raise CheckpointError(
                f"The model's layer {name!r} is int8 already, but the files hold a float one: load into the float "
                "model."
            )
    return found


def _check_sizes(name: str, layer: Layer, int8: PackedLayer) -> None:
    module: Any = layer.module
    if layer.is_embedding != isinstance(int8, Int8Embedding):
        raise CheckpointError(
            f"The layer {name!r} is a {type(module).__name__} in the model, which {type(int8).__name__} cannot replace."
        )
    if isinstance(int8, Int8Embedding):
        here, there = (f"{n} × {k}" for n, k in ((module.num_embeddings, module.embedding_dim), int8._size()))
        if here != there:
            raise CheckpointError(f"The embedding {name!r} is {here} in the model, but {there} in the files.")
        return
    assert isinstance(int8, Int8Linear)
    names = ("nf", "nx") if hasattr(module, "nf") else ("out_features", "in_features")
    n, k = (getattr(module, attribute, None) for attribute in names)
    if (n, k) != (int8.out_features, int8.in_features):
        raise CheckpointError(
            f"The layer {name!r} is {k} → {n} in the model, but {int8.in_features} → {int8.out_features} in the files."
        )
    if (module._parameters.get("bias") is None) != (int8.bias is None):
        with_bias, without = ("files", "model") if int8.bias is not None else ("model", "files")
        raise CheckpointError(f"The layer {name!r} has a bias in the {with_bias}, but none in the {without}.")
    fits = isinstance(module, Int8Linear) or int8._replaces(module)
    if not fits or getattr(type(module), "_transposed", int8._transposed) != int8._transposed:
        raise CheckpointError(
            f"The layer {name!r} is a {type(module).__name__} in the model, which {type(int8).__name__} cannot replace."
        )


def compare(
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    directory: Path,
) -> None:
    """CheckpointError that names what is missing, extra, or of another shape or kind of dtype."""
    lines = []
    for title, names in (
        ("missing in the files", [n for n in expected if n not in found]),
        ("extra in the files", [n for n in found if n not in expected]),
    ):
        if names:
            lines.append(f"{title}: {_listed(names)}")
    for name in expected.keys() & found.keys():
        (dtype, shape), (file_dtype, file_shape) = expected[name], found[name]
        if shape != file_shape:
            lines.append(f"{name!r} has the shape {shape} in the model, but {file_shape} in the files")
        elif dtype != file_dtype and not (dtype.is_floating_point and file_dtype.is_floating_point):
            lines.append(f"{name!r} is {dtype_name(dtype)} in the model, but {dtype_name(file_dtype)} in the files")
    if lines:
        more = f" (and {len(lines) - 6} more)" if len(lines) > 6 else ""
        raise CheckpointError(f"{directory} does not fit the model: {'; '.join(lines[:6])}{more}.")


def _listed(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} … ({len(names)} in all)"


def _native_plan(model: nn.Module, shards: Shards) -> LoadPlan:
    data = shards.manifest
    try:
        described = dict(data["layers"])
        ties = {str(alias): str(name) for alias, name in dict(data["ties"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{shards.directory}: its description is damaged ({error!r}).") from error
    layers = replacements(model, described)
    owners = _owners(model, layers)
    expected = {}
    for name, (module, key) in owners.items():
        tensor = cast(Tensor, module._parameters.get(key, module._buffers.get(key)))
        expected[name] = (tensor.dtype, tuple(tensor.shape))
    found = {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()}
    for alias, name in ties.items():
        if name not in found:
            raise CheckpointError(f"{shards.directory} says that {alias!r} is {name!r}, which it lacks.")
        found[alias] = found[name]
    compare(expected, found, shards.directory)
    _check_exact(expected, found, layers, shards.directory)
    return LoadPlan(model, layers, {name: Source((name,)) for name in shards.entries}, ties, data.get("plan"))


def _check_exact(
    expected: Mapping[str, Any], found: Mapping[str, Any], layers: Sequence[tuple[Layer, PackedLayer]], folder: Path
) -> None:
    """Scales are float32 and nothing else: a cast file would compute something else without a word."""
    for layer, int8 in layers:
        for key in int8._float32:
            name = f"{layer.names[0]}.{key}"
            if name in expected and found[name][0] != torch.float32:
                raise CheckpointError(f"{folder}: {name!r} is {dtype_name(found[name][0])}, but scales are float32.")


def check_attributes(model: nn.Module) -> None:
    """CheckpointError for a tensor on meta that no file can fill, because it is a plain attribute."""
    for prefix, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(
                    f"{f'{prefix}.{key}' if prefix else key!r} of the model is a plain tensor attribute on the meta "
                    "device, which no checkpoint holds: build the model on the CPU instead."
                )
