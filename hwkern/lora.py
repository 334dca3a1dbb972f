"""LoRA with peft on int8 layers: ``get_peft_model(model, hwkern.lora.prepare(LoraConfig(...)))``.

The adapter trains in float on top of the frozen int8 layer, whose gradient reaches the layers below. A merge adds the
adapter to the dequantized weight and quantizes the sum anew; what that rounding costs is kept and can be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hwkern.nn import Int8Linear
from hwkern.nn.pack import all_finite, row_chunks


@dataclass(frozen=True)
class MergeError:
    """What requantizing cost when adapters were merged into one int8 layer.

    Attributes:
        weight: Frobenius norm of (int8 weight after the merge - exact sum), over that of the exact sum.
        adapter: the same error over the norm of what the adapters added: above 1 most of the adapter drowned.
    """

    weight: float
    adapter: float


def prepare(config: Any) -> Any:
    """Let a ``peft.LoraConfig`` take int8 layers, and return it. Float layers of the model are as usual.

    Raises TypeError for another kind of config (DoRA and the other variants of LoRA need a float weight too).
    """
    if not hasattr(config, "_register_custom_module") or getattr(config, "use_dora", False):
        raise TypeError(f"hwkern.lora.prepare takes a peft.LoraConfig without use_dora, not {config!r}.")
    config._register_custom_module({Int8Linear: Int8LoraLinear})
    return config


def merge_errors(model: nn.Module) -> dict[str, MergeError]:
    """The error of the last merge into each int8 layer, by the layer's name."""
    found = {}
    for name, module in model.named_modules():
        error = module.__dict__.get("_merge_error")
        if error is not None:
            found[name.removesuffix(".base_layer")] = error
    return found


class Int8LoraLinear(LoraLinear):  # type: ignore[misc]  # peft is no dependency
    """peft's LoRA layer around an int8 layer of any scheme."""

    _before: dict[str, Tensor] | None = None  # the int8 tensors that the first merge replaced

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the int8 weight. ValueError, and nothing changed, when the sum is not finite."""
        # As in peft, an adapter that other layers have is no matter of this one.
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        if any(self.lora_bias[name] for name in names):
            raise ValueError("hwkern cannot merge lora_bias=True into an int8 layer.")
        base = self.get_base_layer()
        with torch.no_grad():
            delta = torch.stack([self._delta(name) for name in names]).sum(0)
            exact = torch.empty_like(delta)
            for rows in row_chunks(*exact.shape):
                exact[rows] = base._unpack(rows) + delta[rows]
            packed = base._pack(exact, exact.device)
            if not all_finite(packed["weight_scale"]):
                raise ValueError(f"The adapters {names} hold NaN or ±inf: nothing was merged.")
            tensors = {**base._parameters, **base._buffers}
            if self._before is None:
                self._before = {name: tensors[name].detach().clone() for name in packed}
            _fill(base, packed)
            lost = torch.zeros((), dtype=torch.float64, device=exact.device)
            for rows in row_chunks(*exact.shape):
                lost += (base._unpack(rows) - exact[rows]).double().square().sum()
            error, total, added = (float(t.sqrt()) for t in (lost, exact.double().square().sum(), _square(delta)))
        base.__dict__["_merge_error"] = MergeError(error / max(total, 1e-30), error / max(added, 1e-30))
        if base._original is not None:
            base._original.forget("a LoRA adapter was merged into it")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The very int8 weights of before the first merge: all adapters are taken out, as peft does."""
        if self._before is None:
            return
        base = self.get_base_layer()
        with torch.no_grad():
            _fill(base, self._before)
        base.__dict__.pop("_merge_error", None)
        self._before = None
        self.merged_adapters.clear()

    def _delta(self, name: str) -> Tensor:
        a, b = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
        return (b @ a) * self.scaling[name]  # [N, K], also where the layer replaces a Conv1D

    def __repr__(self) -> str:
        return "lora." + nn.Module.__repr__(self)


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _fill(layer: Int8Linear, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        (layer.weight if name == "weight" else layer.get_buffer(name)).copy_(tensor)
