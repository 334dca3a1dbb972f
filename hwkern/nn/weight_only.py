"""W8A16: int8 weights and float activations, for few tokens; alone, or below a measured number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwkern import ops
from hwkern._no_grad import linear_no_grad
from hwkern._tracing import cast_dtype, compiles_inference
from hwkern.nn.conv1d import Int8Conv1D
from hwkern.nn.linear import Int8Linear


class WeightOnlyInt8Linear(Int8Linear):
    """An :class:`Int8Linear` that leaves ``x`` in its float dtype for up to ``max_tokens`` tokens.

    Attributes:
        max_tokens: for more rows than this in ``x`` (the product of its leading dimensions) the layer is an ordinary
            :class:`Int8Linear`; None: never. Both ways read the same int8 weight.
    """

    max_tokens: int | None = None

    @property
    def scheme(self) -> str:
        return "w8a16" if self.max_tokens is None else "w8a16/w8a8"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in Int8Linear
        """``x [..., K]`` -> ``[..., N]`` in x's dtype (autocast's under autocast)."""
        x = input
        if self._part is not None and x.shape[-1:] == (self._part.n,):
            return x[..., self._part.start : self._part.stop]
        if self.max_tokens is not None and math.prod(x.shape[:-1]) > self.max_tokens:
            return super().forward(x)
        # Straight from the dicts, as in Int8Linear.forward.
        parameters = self._parameters
        weight, scale, bias = parameters["weight"], self._buffers["weight_scale"], parameters["bias"]
        if weight is None or scale is None:
            raise self._incomplete()
        return weight_only(x, weight, scale, bias, self.in_features, self._cell)

    def _options(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens}

    def _set_options(self, options: Mapping[str, Any]) -> None:
        tokens = options["max_tokens"]
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise ValueError(f"max_tokens = {tokens!r}: a number of tokens, or None")
        self.max_tokens = tokens

    @classmethod
    def from_float(cls, linear: nn.Module, max_tokens: int | None = None) -> Any:
        """As :meth:`Int8Linear.from_float`, with the layer's ``max_tokens``."""
        layer = super().from_float(linear)
        layer._set_options({"max_tokens": max_tokens})
        return layer

    def extra_repr(self) -> str:
        tokens = "" if self.max_tokens is None else f", max_tokens={self.max_tokens}"
        return f"{super().extra_repr()}{tokens}"


class WeightOnlyInt8Conv1D(WeightOnlyInt8Linear, Int8Conv1D):
    """:class:`WeightOnlyInt8Linear` in the place of transformers' ``Conv1D``."""


# On CUDA, with more tokens than this multiplying is the limit, and cuBLAS on the widened weight the faster way.
FEW_TOKENS = 64


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``weight_only_linear`` is the way for ``x`` in this dtype, and not a matmul on the widened weight."""
    return x.is_cpu or (dtype != torch.float32 and math.prod(x.shape[:-1]) <= FEW_TOKENS)


def weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, k: int, cell: ops.LaunchCell
) -> Tensor:
    """``x @ (weight * weight_scale).T + bias`` in x's dtype (autocast's under autocast).

    :func:`hwkern.ops.weight_only_linear` on the CPU, and on CUDA for few tokens in a 16-bit dtype; else a matmul on the
    dequantized weight, which is rounded to that dtype. ``cell`` is the weight's own.
    """
    if (y := ops.eager_weight_only(x, weight, weight_scale, bias, k, cell, FEW_TOKENS)) is not None:
        return y
    dtype = cast_dtype(x)
    # The packed weight alone cannot tell K = 17 from K = 32: another K goes to the matmul, which refuses it.
    if x.shape[-1] == k and takes(x, dtype):
        if compiles_inference(x):
            return linear_no_grad(x, weight, weight_scale, bias, True)
        return ops.weight_only_linear(x, weight, weight_scale, bias)
    w = ops.dequantize(weight, weight_scale, 0, dtype)[:, :k]
    return F.linear(x.to(dtype), w, None if bias is None else bias.to(dtype))
