"""transformers: ``from_pretrained`` and ``save_pretrained`` of models with int8 layers, through its quantizer registry.

``import hwkern`` is enough: as soon as transformers' registry is there, this file adds the method "hwkern" to it. A
float checkpoint becomes int8 while it is loaded, layer by layer, with ``quantization_config=hwkern.HwkernConfig()``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hwkern import _fusion, _native
from hwkern._layers import find_layers
from hwkern._shards import FORMAT_VERSION, CheckpointError, check_version
from hwkern.nn.pack import all_finite, nonfinite_rows
from hwkern.nn.packed import PackedLayer
from hwkern.nn.scheme import describe

METHOD = "hwkern"


class HwkernConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model with hwkern's int8 layers.

    Args:
        layers: name → description of each int8 layer, as saved; None: the checkpoint is float, and the layers that
            :func:`hwkern.patch` would take become int8 while they are loaded.
        include, exclude, embeddings: for that choice, as in :func:`hwkern.patch`.
        format_version: of this description.
    """

    embeddings = False

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        embeddings: bool = False,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        check_version(format_version, "quantization_config")
        if unknown:
            raise ValueError(f"quantization_config has the unknown fields {sorted(unknown)}.")
        self.quant_method: Any = quant_method
        self.layers, self.include, self.exclude = layers, include, exclude
        if embeddings:  # else not in config.json, which an older hwkern may read
            self.embeddings = True
        self.format_version = format_version


class HwkernQuantizer(HfQuantizer):
    """What transformers calls before, while and after it loads a model with a :class:`HwkernConfig`."""

    requires_calibration = False
    quantization_config: HwkernConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """A sentence before anything is loaded, when the int8 kernels cannot run on a device of the map."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device == "disk":
                raise ValueError("device_map: hwkern cannot offload int8 layers to the disk.")
            gpu = isinstance(device, int) or str(device).startswith("cuda")
            if gpu and (problem := _native.cuda_problem()) is not None:
                raise RuntimeError(f"device_map puts int8 layers on {device!r}: {problem}")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hwkern.checkpoint import replacements
        from hwkern.patch import patch

        config = self.quantization_config
        if self.pre_quantized:
            if config.layers is None:
                raise CheckpointError("config.json says 'hwkern', but describes no layers.")
            for layer, int8 in replacements(model, config.layers):
                for parent, attribute in layer.slots:
                    parent._modules[attribute] = int8
        else:
            if config.embeddings:
                _tie(model)
            options: dict[str, Any] = {"include": config.include, "exclude": config.exclude}
            patch(model, originals="drop", embeddings=config.embeddings, **options)
            _ask_for_floats(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        name, _, last = param_name.rpartition(".")
        return last == "weight" and isinstance(model.get_submodule(name), PackedLayer)

    def get_quantize_ops(self) -> Any:
        from transformers.core_model_loading import ConversionOps

        class Quantize(ConversionOps):
            """One float weight, on its device already, to int8 and scale."""

            def convert(self, input_dict: dict[str, Any], *patterns: Any, model: Any = None, **kwargs: Any) -> Any:
                ((key, value),) = input_dict.items()
                weight = value[0] if isinstance(value, list) else value
                name = key.removesuffix(".weight")
                layer = model.get_submodule(name)
                made = layer._pack(layer._rows(weight), weight.device)
                if not all_finite(made["weight_scale"]):
                    raise CheckpointError(f"{key!r} has NaN or ±inf in {nonfinite_rows(made['weight_scale'])}.")
                layer.float_dtype = weight.dtype
                return {f"{name}.{part}": tensor for part, tensor in made.items()}

        return Quantize()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _share_scales(model)
        self.quantization_config.layers = described(model)
        for layer in find_layers(model, embeddings=True):
            module = layer.module
            if isinstance(module, PackedLayer):
                # transformers goes on where a file lacks some, and leaves what it has not read without values.
                tensors = {**module._parameters, **module._buffers}
                read = {key: t is None or getattr(t, "_is_hf_initialized", False) for key, t in tensors.items()}
                if lacking := [key for key in read if not read[key]]:
                    raise CheckpointError(
                        f"The files lack {' and '.join(lacking)} of the int8 layer {layer.names[0]!r}: "
                        + (
                            "config.json describes an int8 model, but the files may be a float one's."
                            if self.pre_quantized
                            else f"exclude it (exclude={layer.names[0]!r}), so that it starts as a float layer."
                        )
                    )
        _fusion.fuse(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        _fusion.unfuse(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as a configuration that was saved has it
        made: dict[int, nn.Parameter] = {}  # by the int8 weight: tied layers share the float one again
        layers = find_layers(model, embeddings=True)  # they hold the int8 weights, so that no id is used twice
        for layer in layers:
            if isinstance(layer.module, PackedLayer):
                restored = layer.module.to_float(dtype)
                restored.weight = made.setdefault(id(layer.module.weight), cast(nn.Parameter, restored.weight))
                for parent, attribute in layer.slots:
                    parent._modules[attribute] = restored
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """Before config.json is written: what the layers are now. Tensors: the state_dict."""
        self.quantization_config.layers = described(model)
        model.config.quantization_config = self.quantization_config  # another model's of the same config may have gone
        shared = [layer for layers in _sharing(model) for layer in layers[1:]]
        if not shared:
            return None, {}
        # transformers ties weights again when it reads them, but not buffers: in the files each layer has its own.
        state = model.state_dict()
        for name, module in model.named_modules():
            if any(module is layer for layer in shared):
                state[f"{name}.weight_scale"] = state[f"{name}.weight_scale"].clone()
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top, and biases

    @property
    def is_compileable(self) -> bool:
        return True


def _ask_for_floats(model: nn.Module) -> None:
    """Empty weights in the dtype in which the file's are to come to :meth:`HwkernQuantizer.get_quantize_ops`:
    transformers 5.0 … 5.17 (not 5.23) casts what it reads to the dtype of what is there, which would be int8.
    """
    for module in model.modules():
        if isinstance(module, PackedLayer) and (weight := module._parameters["weight"]) is not None:
            floats = torch.empty(weight.shape, dtype=module.float_dtype, device="meta")
            module._parameters["weight"] = nn.Parameter(floats, requires_grad=False)


def described(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The descriptions of the model's int8 layers by name."""
    layers = find_layers(model, embeddings=True)
    return {layer.names[0]: describe(layer.module) for layer in layers if isinstance(layer.module, PackedLayer)}


def _tie(model: Any) -> None:
    """Weights that will be one already are, so that patch sees which head shares a table. (Within from_pretrained,
    ``tie_weights`` itself does nothing until everything is read.)"""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        owner, _, key = target.rpartition(".")
        model.get_submodule(owner)._parameters[key] = model.get_parameter(source)


def _sharing(model: nn.Module) -> list[list[PackedLayer]]:
    """The int8 layers that share one weight, together."""
    groups: dict[int, list[PackedLayer]] = {}
    for module in model.modules():
        if isinstance(module, PackedLayer):
            groups.setdefault(id(module.weight), []).append(module)
    return [group for group in groups.values() if len(group) > 1]


def _share_scales(model: nn.Module) -> None:
    """Layers whose weight was tied while they were read get one scale as well: the one that the files hold."""
    for group in _sharing(model):
        scales = [layer.weight_scale for layer in group]
        scale = next((scale for scale in scales if getattr(scale, "_is_hf_initialized", False)), scales[0])
        for layer in group:
            layer.weight_scale = scale


def register() -> None:
    """Add "hwkern" to transformers' registries; twice does nothing."""
    if not hasattr(auto, "AUTO_QUANTIZER_MAPPING") or not hasattr(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        return  # a transformers without a registry (before 4.38)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, HwkernConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, HwkernQuantizer)


def sync(model: nn.Module) -> None:
    """Let ``save_pretrained`` know of the int8 layers that a transformers model has now, or no longer has."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(model, "save_pretrained", None)) or config is None:
        return
    layers = described(model)
    current = getattr(config, "quantization_config", None)
    ours = isinstance(current, HwkernConfig)
    if layers and (current is None or ours):
        config.quantization_config = HwkernConfig(layers)
        model.__dict__["hf_quantizer"] = HwkernQuantizer(config.quantization_config, pre_quantized=True)
    elif not layers and ours:
        del config.quantization_config
        model.__dict__.pop("hf_quantizer", None)


def empty_model(folder: Path) -> nn.Module:
    """The transformers model that a folder's config.json describes, on meta; buffers that no file holds are real."""
    import transformers

    from hwkern.checkpoint import check_attributes

    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = data["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no config.json that names a transformers model ({type(error).__name__}: {error}): build the "
            "float model yourself and call hwkern.load(folder, model)."
        ) from error
    cls: Any = getattr(transformers, str(architecture), None)
    if cls is None:
        raise CheckpointError(f"transformers {transformers.__version__} has no {architecture!r}.")
    config = cls.config_class.from_pretrained(str(folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        with torch.device("meta"):
            model: Any = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    _fill_transient_buffers(model)
    check_attributes(model)
    return model.eval()


def _fill_transient_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, positions) get their values from the model's own code."""
    for name, module in model.named_modules():
        keys = [key for key in module._non_persistent_buffers_set if module._buffers.get(key) is not None]
        keys = [key for key in keys if module._buffers[key].is_meta]
        if not keys:
            continue
        for key in keys:
            empty = torch.empty_like(module._buffers[key], device="cpu")
            mark = (
                math.nan if empty.is_floating_point() else (torch.iinfo(empty.dtype).min if not _is_bool(empty) else 0)
            )
            module._buffers[key] = empty.fill_(mark)
        with torch.no_grad():
            model._init_weights(module)
        for key in keys:
            buffer = module._buffers[key]
            stale = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
            if not _is_bool(buffer) and bool(stale.any()):
                raise CheckpointError(
                    f"The buffer {name}.{key} is in no file, and {type(model).__name__} does not initialise it: build "
                    "the model on the CPU and call hwkern.load(folder, model)."
                )


def _is_bool(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bool


register()
