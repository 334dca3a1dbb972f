"""W8A8 with what calibration found: a static input scale, a zero point, a smoothing vector, outlier columns."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwkern import ops
from hwkern._static import int8_linear_static, zero_shift
from hwkern._tracing import cast_dtype
from hwkern.nn.conv1d import Int8Conv1D
from hwkern.nn.linear import Int8Linear
from hwkern.nn.pack import all_finite, nonfinite_rows, quantize_weight, row_chunks, weight_problem

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Calibration:
    """What is known about a layer's input ``x [..., K]`` before it runs.

    Attributes:
        scale: per-tensor scale of the (smoothed) input; None: measured per token at each call.
        zero_point: of the (smoothed) input, within -127 … 127; only with a scale.
        smooth: ``K`` positive divisors of the input's columns, which multiply the weight's columns; empty: none.
        outliers: columns that take no part in int8 and are multiplied in x's own dtype.
        folded: whether the divisors are in the preceding norm already, so that only the weight takes them.
    """

    scale: float | None = None
    zero_point: int = 0
    smooth: tuple[float, ...] = field(default=(), repr=False)
    outliers: tuple[int, ...] = ()
    folded: bool = False

    def __post_init__(self) -> None:
        # The very numbers that layers and files hold. Not through torch, which may be told to build on meta.
        object.__setattr__(self, "smooth", tuple(array("f", self.smooth)))

    @property
    def is_plain(self) -> bool:
        """Whether an :class:`Int8Linear` computes the same."""
        return self.scale is None and not self.outliers and (self.folded or not self.smooth)

    def check(self, k: int) -> None:
        """ValueError, with the offending value, for what a layer with ``k`` inputs cannot take."""
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"The input scale is {self.scale}: it must be positive and finite.")
        if not -127 <= self.zero_point <= 127 or (self.zero_point and self.scale is None):
            raise ValueError(f"The zero point is {self.zero_point}: within -127 … 127, and only with a static scale.")
        if self.smooth and len(self.smooth) != k:
            raise ValueError(f"The smoothing vector has {len(self.smooth)} elements, but the layer has {k} inputs.")
        if not all(0 < s < float("inf") for s in self.smooth):
            raise ValueError("The smoothing vector holds a value that is not positive and finite.")
        if len(set(self.outliers)) != len(self.outliers) or not all(0 <= i < k for i in self.outliers):
            raise ValueError(f"The outlier columns {self.outliers} are not distinct numbers within 0 … {k - 1}.")

    def divisors(self, k: int, device: torch.device | str) -> Tensor:
        """The smoothing vector ``[K]`` as float32; ones without one."""
        if not self.smooth:
            return torch.ones(k, dtype=torch.float32, device=device)
        return torch.tensor(self.smooth, dtype=torch.float32, device=device)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the vector as base64 of little-endian float32, because a plan holds one per layer."""
        return {
            "scale": self.scale,
            "zero_point": self.zero_point,
            "smooth": base64.b64encode(array("f", self.smooth).tobytes()).decode(),
            "outliers": list(self.outliers),
            "folded": self.folded,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`to_dict`; ValueError, KeyError or TypeError for nonsense."""
        smooth = array("f")
        smooth.frombytes(base64.b64decode(data["smooth"], validate=True))
        scale = None if data["scale"] is None else float(data["scale"])
        outliers = tuple(int(i) for i in data["outliers"])
        return cls(scale, int(data["zero_point"]), tuple(smooth), outliers, bool(data["folded"]))


class CalibratedInt8Linear(Int8Linear):
    """An :class:`Int8Linear` with a calibrated input. Any of the following is there or not:

    Attributes:
        input_scale: float32 ``[1]`` or (with smoothing or outliers) ``[K]``: the static scale of the input.
        zero_point: of the static quantization; an int.
        output_scale: ``[N]`` float32, the static per-tensor scale times ``weight_scale``.
        shift: ``[N]`` float32, what takes the zero point off the sums; added to the bias.
        input_multiplier: ``[K]`` float32, for a dynamic scale: x is multiplied by it before it is quantized
            (1 / smoothing; 0 for outlier columns).
        outlier_index, outlier_weight: ``[C]`` int64 and ``[N, C]`` float: columns that are multiplied in x's own dtype.
            Their number is fixed, so that a CUDA graph can hold the layer.

    ``weight`` is quantized from the float weight times the smoothing vector, with zeros in outlier columns.
    """

    input_scale: Tensor | None
    output_scale: Tensor | None
    shift: Tensor | None
    input_multiplier: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None
    _float32 = ("weight_scale", "input_scale", "output_scale", "shift", "input_multiplier")

    def _fill(
        self, in_features: int, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super()._fill(in_features, weight, scale, bias, dtype)
        self.zero_point = 0
        for name in ("input_scale", "output_scale", "shift", "input_multiplier", "outlier_index", "outlier_weight"):
            self.register_buffer(name, None)

    @classmethod
    def from_calibration(cls, linear: nn.Module, calibration: Calibration) -> Self:
        """The layer for a float layer and what is known of its input; the very same bias Parameter.

        Raises:
            TypeError, ValueError: as :meth:`Int8Linear.from_float`, or the calibration does not fit the layer.
        """
        if not cls._replaces(linear):
            raise TypeError(f"{cls.__name__}.from_calibration takes {cls._float_name}, not {type(linear).__name__}.")
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        problem = weight_problem(weight, cls._transposed)
        if problem is not None or weight is None:
            raise ValueError(f"This {type(linear).__name__} cannot become {cls.__name__}: {problem}.")
        layer = cls._from_rows(cls._rows(weight.detach()), bias, calibration)
        if not all_finite(layer.weight_scale):
            bad = nonfinite_rows(layer.weight_scale)
            raise ValueError(f"This {type(linear).__name__} cannot become {cls.__name__}: NaN or ±inf in {bad}.")
        return layer.train(linear.training)

    @classmethod
    def _from_rows(cls, rows: Tensor, bias: nn.Parameter | None, calibration: Calibration) -> Self:
        n, k = rows.shape
        calibration.check(k)
        device = rows.device
        layer = cls._from_packed(
            k,
            nn.Parameter(torch.empty(n, ops.padded(k), dtype=torch.int8, device=device), requires_grad=False),
            torch.empty(n, dtype=torch.float32, device=device),
            bias,
            rows.dtype,
        )
        divisors = calibration.divisors(k, device)
        multiplier = torch.ones_like(divisors) / divisors
        factor = None
        if calibration.folded:  # the norm divides already: from here on the weight simply is W · smooth
            factor, multiplier = divisors, torch.ones_like(divisors)
        if calibration.outliers:
            layer.outlier_index = torch.tensor(calibration.outliers, dtype=torch.int64, device=device)
            multiplier[layer.outlier_index] = 0
        uniform = calibration.folded or not calibration.smooth
        if calibration.scale is not None:
            layer.zero_point = calibration.zero_point
            scale = torch.full_like(divisors, calibration.scale) / multiplier
            layer.input_scale = scale[:1].clone() if uniform and not calibration.outliers else scale
            # With a divided input the per-tensor scale cannot be read off input_scale: remember it beside.
            layer._tensor_scale = calibration.scale
        elif not uniform or calibration.outliers:
            layer.input_multiplier = multiplier
        for name, tensor in layer._pack(rows, device, factor).items():
            if name == "weight":
                layer.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                layer._buffers[name] = tensor
        return layer

    _tensor_scale = 1.0

    @property
    def scheme(self) -> str:
        if self.input_scale is None:
            return "w8a8"
        return "w8a8-asymmetric" if self.zero_point else "w8a8-static"

    def _gain(self) -> Tensor | None:
        """``[K]``: by what x's columns are multiplied before they meet the int8 weight; None for 1 everywhere."""
        if self.input_multiplier is not None:
            return self.input_multiplier
        if self.input_scale is not None and self.input_scale.numel() > 1:
            return self._tensor_scale / self.input_scale
        return None

    def _pack(self, rows: Tensor, device: torch.device, factor: Tensor | None = None) -> dict[str, Tensor]:
        """``factor [K]``: multiplies the columns of ``rows`` first."""
        found: dict[str, Tensor] = {}
        if self.outlier_index is not None:
            index = self.outlier_index.to(device)
            side = rows.to(device)[:, index]
            found["outlier_weight"] = side if factor is None else (side.float() * factor[index]).to(rows.dtype)
        gain = self._gain()
        if gain is not None:  # an outlier column has gain 0, and weight 0
            gain = gain.to(device)
            inverse = torch.where(gain > 0, torch.ones_like(gain) / gain, 0.0)
            factor = inverse if factor is None else factor * inverse
        packed, scale = quantize_weight(rows, device) if factor is None else quantize_scaled(rows, factor, device)
        found |= {"weight": packed, "weight_scale": scale}
        if self.input_scale is not None:
            found["output_scale"] = scale * torch.full_like(scale, self._tensor_scale)
            if self.zero_point:
                found["shift"] = zero_shift(packed, found["output_scale"], self.zero_point)
        return found

    def _unpack(self, rows: slice) -> Tensor:
        found = super()._unpack(rows)
        gain = self._gain()
        if gain is not None:
            found = found * gain
        if self.outlier_index is not None and self.outlier_weight is not None:
            found[:, self.outlier_index] = self.outlier_weight[rows].float()
        return found

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in Int8Linear
        """``x [..., K]`` -> ``[..., N]`` in x's dtype (autocast's under autocast)."""
        x = input
        buffers, weight, bias = self._buffers, self.weight, self.bias
        scale = buffers["weight_scale"]
        if weight is None or scale is None:
            raise self._incomplete()
        input_scale, multiplier, index = buffers["input_scale"], buffers["input_multiplier"], buffers["outlier_index"]
        if input_scale is not None:
            shift = buffers["shift"]
            if shift is not None:
                bias = shift if bias is None else shift + bias  # type: ignore[assignment]
            output_scale: Any = buffers["output_scale"]
            y = int8_linear_static(x, weight, output_scale, input_scale, self.zero_point, bias, cast_dtype(x))
        else:
            scaled = x if multiplier is None else x * multiplier.to(x.dtype)
            y = ops.eager_linear(scaled, weight, scale, bias, self.in_features, self._cell)
        if index is not None:
            side: Any = buffers["outlier_weight"]
            y = y + F.linear(x.index_select(-1, index), side.to(x.dtype)).to(y.dtype)
        return y

    def _options(self) -> dict[str, Any]:
        def size(name: str) -> int | None:
            tensor = self._buffers[name]
            return None if tensor is None else tensor.shape[-1]

        return {
            "input_scale": size("input_scale"),
            "tensor_scale": self._tensor_scale,
            "zero_point": self.zero_point,
            "input_multiplier": size("input_multiplier"),
            "outliers": size("outlier_index"),
        }

    def _set_options(self, options: Mapping[str, Any]) -> None:
        n, k, device = self.out_features, self.in_features, self.weight.device
        self._tensor_scale, self.zero_point = float(options["tensor_scale"]), int(options["zero_point"])
        Calibration(self._tensor_scale, self.zero_point).check(k)
        if options["input_scale"] is not None:
            if options["input_scale"] not in (1, k):
                raise ValueError(f"input_scale has {options['input_scale']} elements, not 1 or {k}")
            self.input_scale = torch.ones(options["input_scale"], dtype=torch.float32, device=device)
            self.output_scale = torch.ones(n, dtype=torch.float32, device=device)
            if self.zero_point:
                self.shift = torch.zeros(n, dtype=torch.float32, device=device)
        if options["input_multiplier"] is not None:
            self.input_multiplier = torch.ones(k, dtype=torch.float32, device=device)
        if options["outliers"] is not None:
            count = int(options["outliers"])
            if not 0 < count <= k:
                raise ValueError(f"{count} outlier columns of {k}")
            self.outlier_index = torch.zeros(count, dtype=torch.int64, device=device)
            self.outlier_weight = torch.zeros(n, count, dtype=self.float_dtype, device=device)

    def extra_repr(self) -> str:
        columns = "" if self.outlier_index is None else f", outliers={self.outlier_index.numel()}"
        return f"{super().extra_repr()}, scheme={self.scheme}{columns}"


def quantize_scaled(rows: Tensor, factor: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """:func:`quantize_weight` of ``rows * factor`` in float32, a chunk at a time."""
    n, k = rows.shape
    packed = torch.zeros(n, ops.padded(k), dtype=torch.int8, device=device)
    scale = torch.empty(n, dtype=torch.float32, device=device)
    for part in row_chunks(n, k, device) if not (rows.is_meta or packed.is_meta) else ():
        packed[part, :k], scale[part] = ops.quantize(rows[part].to(device).float() * factor)
    return packed, scale


class CalibratedInt8Conv1D(CalibratedInt8Linear, Int8Conv1D):
    """:class:`CalibratedInt8Linear` in the place of transformers' ``Conv1D``."""
