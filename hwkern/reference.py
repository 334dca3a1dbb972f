"""The mathematics of hwkern in plain torch: the oracle of every test, on any device, with no regard for speed.

Every float operation below is one IEEE float32 operation, so the kernels (CUDA and CPU) reproduce these results bit
for bit. Shapes: ``x [..., K]``, ``weight [N, K]``, ``q`` like ``x``; scales are float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QMAX = 127
#: Smallest scale: the smallest normal float32, so that ``1 / scale`` is finite and an all-zero row stays zero.
SCALE_MIN = torch.finfo(torch.float32).tiny


def token_scale(x: Tensor) -> Tensor:
    """``[..., K] -> [...]``: ``max(absmax / 127, SCALE_MIN)`` per row; NaN for a row that holds NaN or ±inf."""
    absmax = x.float().abs().amax(-1)
    # A tensor divisor: torch may multiply by the reciprocal of a Python scalar, which is not the same rounding.
    scale = (absmax / torch.full_like(absmax, QMAX)).clamp_min(SCALE_MIN)
    return torch.where(absmax.isfinite(), scale, torch.nan)


def expand_scale(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """Broadcast a scale against ``x``: one element for the whole tensor, else ``axis`` 0 (rows) or -1 (columns)."""
    if scale.numel() == 1 or axis == -1:
        return scale
    return scale.reshape(*x.shape[:-1], 1)


def quantize(x: Tensor, scale: Tensor | None = None, axis: int = 0) -> tuple[Tensor, Tensor]:
    """``q = clamp(rint(x * (1 / scale)), -127, 127)``, round half to even; dynamic per token without a scale.

    With a NaN scale, and where ``x`` is NaN, ``q`` is 0.
    """
    if scale is None:
        scale, axis = token_scale(x), 0
    inverse = torch.ones_like(scale) / scale
    scaled = x.float() * expand_scale(inverse, x, axis)
    q = scaled.round().clamp(-QMAX, QMAX)
    return torch.where(q.isnan(), 0.0, q).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor, axis: int = 0, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale`` in float32, rounded once to ``out_dtype``."""
    return (q.float() * expand_scale(scale, q, axis)).to(out_dtype)


def activate(y: Tensor, activation: str) -> Tensor:
    """relu, gelu (erf), gelu_tanh or silu of a float32 ``y``: the exact value (by float64), rounded to float32."""
    x = y.double()
    if activation == "relu":
        return torch.where(y < 0, 0.0, y)
    if activation == "gelu":
        return (x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))).float()
    if activation == "gelu_tanh":
        return (x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).float()
    if activation == "silu":
        return (x / (1 + torch.exp(-x))).float()
    return y


def int8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """``activation(((sum * scale_a) * scale_b) + bias) + residual``, ``sum[m, n] = Σ_k a[m, k]·b[n, k]`` exact.

    Rounded once to ``out_dtype``; int32 gives the raw sum, int8 the result quantized with ``out_scale``. The kernels
    compute gelu and silu in float32, to 2 ulp of ``|y|``; everything else has these bits.
    """
    # float64 holds every integer up to 2⁵³, so this product is exact on every device.
    total = a.double() @ b.double().t()
    if out_dtype == torch.int32:
        return total.to(torch.int32)
    y = total.float()
    if scale_a is not None:
        y = y * scale_a.reshape(*a.shape[:-1], 1)
    if scale_b is not None:
        y = y * scale_b
    if bias is not None:
        y = y + bias.float()
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.float()
    if out_scale is not None:
        return quantize(y, out_scale.reshape(1))[0]
    return y.to(out_dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Quantize ``x`` per token, multiply by the int8 ``weight [N, K]``, rescale, add the bias, round once."""
    q, scale = quantize(x)
    return int8_matmul(q, weight, scale, weight_scale, bias, out_dtype or x.dtype, activation, residual)
