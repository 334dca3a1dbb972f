"""Int8Linear: ``nn.Linear`` with an int8 weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import ops
from hwkern.nn.pack import all_finite, nonfinite_rows, quantize_weight, row_chunks, weight_problem
from hwkern.nn.packed import PackedLayer
from hwkern.reference import SCALE_MIN

if TYPE_CHECKING:
    from typing_extensions import Self

    from hwkern.nn.merged import Part


class Int8Linear(PackedLayer):
    """``y = x @ weight.T + bias`` with an int8 weight; ``x`` is quantized per token inside.

    Attributes:
        weight: ``[N, K16]`` int8 (K16: ``in_features`` rounded up to 16, zeros in the padding). A Parameter, so that
            a weight shared by several layers stays shared under ``.to()``; it never takes a gradient.
        weight_scale: ``[N]`` float32 buffer, one scale per output channel. Stays float32 under ``.half()`` and so on.
        bias: ``[N]`` of any float dtype, or None. May be trained.
        float_dtype: the dtype that a float weight would have in this layer's place: the original's, or that of the
            last ``.half()``, ``.to(dtype)`` …; :meth:`to_float` and ``hwkern.unpatch`` return it.

    ``x`` is ``[..., K]`` in float32, float16 or bfloat16; the output has x's dtype (autocast's under autocast).
    Gradients reach ``x`` and ``bias``. The constructor makes a layer of zeros, to be filled by ``load_state_dict``;
    ``load_state_dict`` takes int8 states and, quantizing on the way, float states of the original layer.
    """

    bias: nn.Parameter | None
    # The layer's place among layers that are computed as one (hwkern.nn.merged); None: alone.
    _part: Part | None = None
    _scheme = "w8a8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: that of the bias, and ``float_dtype``; torch's default dtype when None."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        problem = weight_problem(torch.empty(out_features, in_features, dtype=dtype, device="meta"))
        if problem is not None:
            raise ValueError(f"{type(self).__name__}({in_features}, {out_features}) is not possible: {problem}.")
        packed = torch.zeros(out_features, ops.padded(in_features), dtype=torch.int8, device=device)
        scale = torch.full((out_features,), SCALE_MIN, dtype=torch.float32, device=device)
        new_bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._fill(in_features, nn.Parameter(packed, requires_grad=False), scale, new_bias, dtype)

    def _fill(
        self, in_features: int, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        self._hold(weight, scale, dtype)
        self.in_features = in_features
        self.out_features = weight.shape[0]
        self._cell = ops.LaunchCell()
        self.register_parameter("bias", bias)

    def _size(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def _from_packed(
        cls, in_features: int, weight: nn.Parameter, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> Self:
        """A layer around tensors that already exist (no copies, no checks); ``dtype`` is the float weight's."""
        layer = cls.__new__(cls)
        layer._fill(in_features, weight, scale, bias, dtype)
        return layer

    @classmethod
    def from_float(cls, linear: nn.Module) -> Self:
        """The int8 layer for a float layer, on its device, with the very same bias Parameter. ``linear`` is untouched.

        Raises:
            TypeError: ``linear`` is not a layer of the kind this class replaces.
            ValueError: its weight cannot become int8; the message says why.
        """
        if not cls._replaces(linear):
            raise TypeError(f"{cls.__name__}.from_float takes {cls._float_name}, not {type(linear).__name__}.")
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        problem = weight_problem(weight, cls._transposed)
        if problem is not None or weight is None:
            raise ValueError(f"This {type(linear).__name__} cannot become {cls.__name__}: {problem}.")
        rows = cls._rows(weight.detach())
        packed, scale = quantize_weight(rows)
        if not all_finite(scale):
            raise ValueError(
                f"This {type(linear).__name__} cannot become {cls.__name__}: its weight has NaN or ±inf in "
                f"{nonfinite_rows(scale)}."
            )
        parameter = nn.Parameter(packed, requires_grad=False)
        return cls._from_packed(rows.shape[1], parameter, scale, bias, weight.dtype).train(linear.training)

    _float_name = "an nn.Linear"

    @staticmethod
    def _replaces(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new float layer with the dequantized weight ``weight * weight_scale`` and a copy of the bias.

        ``dtype`` defaults to ``float_dtype``. This is the int8 weight in float, not the original weight: that one
        comes back with ``hwkern.unpatch``.
        """
        dtype = self.float_dtype if dtype is None else dtype
        linear = self._empty_float(dtype)
        with torch.no_grad():
            target = self._rows(linear.weight)
            for rows in row_chunks(self.out_features, self.in_features):
                target[rows] = self._unpack(rows)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def _empty_float(self, dtype: torch.dtype) -> Any:
        has_bias = self.bias is not None
        return nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias=has_bias, device=self.weight.device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's name, for calls by keyword
        """``x [..., K]`` -> ``[..., N]`` in x's dtype."""
        x = input
        if self._part is not None and x.shape[-1:] == (self._part.n,):  # the product of all parts: take mine
            return x[..., self._part.start : self._part.stop]
        # Straight from the dicts: nn.Module.__getattr__ costs 0.5 µs each time.
        parameters = self._parameters
        weight, scale, bias = parameters["weight"], self._buffers["weight_scale"], parameters["bias"]
        if weight is None or scale is None:
            raise self._incomplete()
        return ops.eager_linear(x, weight, scale, bias, self.in_features, self._cell)

    def extra_repr(self) -> str:
        """As nn.Linear's, plus the weight's dtype."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, weight=int8"

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezing works; asking for gradients is an error, because an int8 weight has none.

        Raises:
            RuntimeError: ``requires_grad`` is true.
        """
        if requires_grad:
            raise RuntimeError(
                "The weight of an Int8Linear is int8 and has no gradient, so the layer cannot be trained as a whole: "
                "train its bias (layer.bias.requires_grad_()), put an adapter (LoRA) on top, or hwkern.unpatch(model)."
            )
        return super().requires_grad_(False)

    # ---- layers that are computed as one --------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._part is not None:
            self._part.moved()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if self._part is not None and name in ("weight", "weight_scale", "bias"):
            self._part.moved()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._part is not None:
            self._part.moved()
