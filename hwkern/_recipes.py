"""What is to become of one layer: a scheme with its calibration, as data; and the int8 layer made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hwkern._layers import int8_class
from hwkern.nn import (
    CalibratedInt8Conv1D,
    CalibratedInt8Linear,
    Calibration,
    Int8Embedding,
    Int8Linear,
    WeightOnlyInt8Conv1D,
    WeightOnlyInt8Linear,
)
from hwkern.nn.calibrated import quantize_scaled
from hwkern.nn.pack import quantize_weight
from hwkern.nn.packed import PackedLayer

SCHEMES = ("keep", "w8a8", "w8a8-static", "w8a8-asymmetric", "w8a16", "w8a16/w8a8", "int8")


@dataclass(frozen=True)
class Recipe:
    """One layer's scheme.

    Attributes:
        scheme: one of ``SCHEMES``; "keep" is the float layer as it is, "int8" an embedding's table. An embedding that
            shares its weight with a linear layer has that layer's recipe: any but "keep" makes the table int8.
        calibration: of the input; plain for "keep", and for "w8a16" at most a folded smoothing.
        max_tokens: for "w8a16/w8a8" the most tokens that W8A16 takes.
    """

    scheme: str
    calibration: Calibration = Calibration()  # noqa: RUF009  # frozen
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """The scheme and what is around it: ``"w8a8-static+smooth+outliers"``."""
        parts = [self.scheme]
        if self.calibration.smooth:
            parts.append("folded" if self.calibration.folded else "smooth")
        if self.calibration.outliers:
            parts.append("outliers")
        return "+".join(parts)

    @property
    def timing(self) -> str:
        """The part of :attr:`name` that the time depends on: a folded vector costs nothing when the layer runs."""
        return self.name.replace("+folded", "")

    def check(self, k: int) -> None:
        """ValueError, in words, for a recipe that no layer of ``k`` inputs can have."""
        if self.scheme not in SCHEMES:
            raise ValueError(f"the scheme is {self.scheme!r}, not one of {', '.join(SCHEMES)}")
        self.calibration.check(k)
        static = self.scheme in ("w8a8-static", "w8a8-asymmetric")
        if static != (self.calibration.scale is not None):
            raise ValueError(f"{self.scheme} {'needs an' if static else 'has no'} input scale")
        if (self.scheme == "w8a8-asymmetric") != (self.calibration.zero_point != 0):
            raise ValueError(f"{self.scheme} with the zero point {self.calibration.zero_point}")
        if self.scheme in ("keep", "w8a16", "w8a16/w8a8", "int8") and not self.calibration.is_plain:
            raise ValueError(f"{self.scheme} takes no divided inputs and no outlier columns")
        tokens = self.max_tokens
        if (self.scheme == "w8a16/w8a8") != (tokens is not None) or (tokens is not None and tokens < 0):
            raise ValueError(f"{self.scheme} with max_tokens = {tokens}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"scheme": self.scheme, "calibration": self.calibration.to_dict(), "max_tokens": self.max_tokens}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse; KeyError, TypeError or ValueError for nonsense."""
        tokens = data["max_tokens"]
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
            raise ValueError(f"max_tokens = {tokens!r}")
        return cls(str(data["scheme"]), Calibration.from_dict(data["calibration"]), tokens)

    def unfolded(self) -> Recipe:
        """The same without a folded vector, for a layer whose norm stays as it is."""
        if not self.calibration.folded:
            return self
        return replace(self, calibration=replace(self.calibration, smooth=(), folded=False))


def make(module: nn.Module, recipe: Recipe) -> PackedLayer:
    """The int8 layer for a float layer, with the very same bias. Its ``weight_scale`` may hold NaN: look.

    The recipe's folded vector multiplies the weight; who divides the norm is another matter.
    """
    if isinstance(module, nn.Embedding):
        packed, scale = quantize_weight(module.weight.detach())
        return Int8Embedding._around(module, nn.Parameter(packed, requires_grad=False), scale)
    base = cast(type[Int8Linear], int8_class(module))
    weight = cast(nn.Parameter, module._parameters["weight"])
    bias = module._parameters.get("bias")
    rows = base._rows(weight.detach())
    calibration = recipe.calibration
    if not calibration.is_plain:
        calibrated = CalibratedInt8Conv1D if base._transposed else CalibratedInt8Linear
        return calibrated._from_rows(rows, bias, calibration)
    packed, scale = _quantized(rows, calibration)
    return around(module, recipe, nn.Parameter(packed, requires_grad=False), scale)


def around(module: nn.Module, recipe: Recipe, packed: nn.Parameter, scale: Tensor) -> PackedLayer:
    """:func:`make` with a plain recipe, on a weight that is packed already: for layers that share it."""
    if isinstance(module, nn.Embedding):
        return Int8Embedding._around(module, packed, scale)
    cls = base = cast(type[Int8Linear], int8_class(module))
    if recipe.scheme.startswith("w8a16"):
        cls = WeightOnlyInt8Conv1D if base._transposed else WeightOnlyInt8Linear
    weight, bias = cast(nn.Parameter, module._parameters["weight"]), module._parameters.get("bias")
    layer = cls._from_packed(base._rows(weight).shape[1], packed, scale, bias, weight.dtype)
    if isinstance(layer, WeightOnlyInt8Linear):
        layer.max_tokens = recipe.max_tokens
    return layer


def _quantized(rows: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    if not calibration.smooth:
        return quantize_weight(rows)
    return quantize_scaled(rows, calibration.divisors(rows.shape[1], rows.device), rows.device)


def float_rows(module: nn.Module) -> Tensor:
    """A float layer's (or embedding's) weight as ``[N, K]``, without a copy."""
    weight = cast(Tensor, module._parameters["weight"]).detach()
    base = int8_class(module)
    return weight if base is None else base._rows(weight)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's float weight."""
    return cast(Tensor, module._parameters["weight"]).dtype
