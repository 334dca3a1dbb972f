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
    """relu, gelu (erf), gelu_tanh or silu: the exact value (by float64), rounded to y's dtype."""
    x = y.double()
    if activation == "relu":
        x = torch.where(x < 0, 0.0, x)
    elif activation == "gelu":
        x = x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    elif activation == "gelu_tanh":
        x = x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    elif activation == "silu":
        x = x / (1 + torch.exp(-x))
    return x.to(y.dtype)


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
    compute gelu (to 4 ulp of ``|y|``) and silu (to 2) in float32; everything else has these bits.
    """
    # float64 holds every integer up to 2⁵³, so this product is exact on every device.
    total = a.double() @ b.double().t()
    if out_dtype == torch.int32:
        return total.to(torch.int32)
    y = total.to(torch.int32).float()  # an integer's zero has no sign: 0 · -3 is -0.0 in float64
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


def _fold(v: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two): the upper half added to the lower until one element is left."""
    while v.shape[-1] > 1:
        half = v.shape[-1] // 2
        v = v[..., :half] + v[..., half:]
    return v[..., 0]


def _pad_to_multiple(v: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(v, (0, -v.shape[-1] % multiple))


def row_sum(v: Tensor, vector: int) -> Tensor:
    """``[..., K] -> [...]``: the float32 sum of a row in the one order that all kernels keep.

    Chunks of 32 · ``vector`` elements (``vector`` = 16 bytes of x's dtype; zeros beyond K), each folded over ``vector``
    and then over the 32; every 32nd chunk's sum added in the order of the row; the 32 totals folded.
    """
    chunks = _pad_to_multiple(v, 32 * vector).unflatten(-1, (-1, 32, vector))
    groups = _pad_to_multiple(_fold(_fold(chunks)), 32).unflatten(-1, (-1, 32))
    total = torch.zeros_like(groups[..., 0, :])
    for group in groups.unbind(-2):
        total = total + group
    return _fold(total) + 0.0  # a row of -0 sums to 0


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(y, h)`` in x's dtype, ``[..., K]``: ``h = x + residual``, and with ``r = 1 / sqrt(mean(h²) + eps)``

    - ``"rms"`` (torch.nn.RMSNorm; Gemma with ``offset`` 1): ``y = round((h * r) * (offset + weight))``;
    - ``"rms_rounded"`` (transformers' Llama, Qwen, Mistral, T5): ``y = round(round(h * r) * (offset + weight))``;
    - ``"layer"`` (torch.nn.LayerNorm): ``y = round(((h - mean) * r) * (offset + weight) + bias)``, r of ``h - mean``.

    ``round`` is one rounding to x's dtype, a mean is ``row_sum * (1 / K)``.
    """
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    centred = h.float()
    vector = 16 // x.dtype.itemsize
    one = torch.ones((), dtype=torch.float32, device=x.device)
    inverse_k = one / x.shape[-1]
    if kind == "layer":
        centred = centred - (row_sum(centred, vector) * inverse_k).unsqueeze(-1)
    variance = row_sum(centred * centred, vector) * inverse_k
    # In float64 and back: torch's float32 square root is not always the nearest float32 (2.13, on the CPU).
    r = one / (variance + torch.tensor(eps, dtype=torch.float32, device=x.device)).double().sqrt().float()
    y = centred * r.unsqueeze(-1)
    if kind == "rms_rounded":
        y = y.to(x.dtype).float()
    if weight is not None:
        y = y * (torch.tensor(offset, dtype=torch.float32, device=x.device) + weight.float())
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), h


def norm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(q, scale, h, y)``: :func:`norm`, then :func:`quantize` of y, per token or with one static scale."""
    y, h = norm(x, weight, bias, residual, kind, eps, offset)
    return *quantize(y, scale), h, y


def gated_activation(x: Tensor, up: Tensor | None, name: str) -> Tensor:
    """``round(round(activate(x)) * up)``, or without ``up`` ``round(activate(x))``, in x's dtype."""
    y = activate(x.float(), name).to(x.dtype)
    return y if up is None else (y.float() * up.float()).to(x.dtype)


def activation_quantize(
    x: Tensor, up: Tensor | None = None, name: str = "silu", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(q, scale)``: :func:`gated_activation`, then :func:`quantize`."""
    return quantize(gated_activation(x, up, name), scale)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation((x @ weight.T) * weight_scale + bias) + residual`` in float64, rounded once; ``weight [N, K]``.

    Float32 sums depend on their order, so here the kernels reproduce the value and not the bits: to
    ``K · 2⁻²⁴ · Σ|x·w| · weight_scale`` and the rounding to ``out_dtype``.
    """
    y = (x.double() @ weight.double().t()) * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.double()
    return y.to(out_dtype or x.dtype)


def int8_embedding(
    indices: Tensor, weight: Tensor, weight_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``weight[indices] * weight_scale[indices]`` in float32, rounded once; ``weight [V, H]``, any shape of indices."""
    rows = weight[indices.long()].float() * weight_scale[indices.long()].unsqueeze(-1)
    return rows.to(out_dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """A rotary embedding, rounded to x's dtype: ``x * cosine + cat(-x[D/2:], x[:D/2]) * sine``; ``x [B, L, H, D]``,
    float32 ``cosine`` and ``sine [L, D]``."""
    first, second = x.float().chunk(2, -1)
    crossed = torch.cat([-second, first], -1)
    return (x.float() * cosine[:, None] + crossed * sine[:, None]).to(x.dtype)


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    cosine: Tensor | None = None,
    sine: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q @ k.T + mask) @ v`` in float64, ``[B, L, heads, D]``; q and k are rotated first where there
    are cosine and sine. ``qkv [B, L, heads + 2 * kv_heads, D]``; each of kv_heads serves heads / kv_heads queries.

    The kernel's sums are float32 and its weights are rounded to x's dtype before they meet v, so it reproduces the
    value and not the bits.
    """
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
    if cosine is not None and sine is not None:
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    q, k, v = (t.transpose(1, 2).double().repeat_interleave(heads // t.shape[2], 1) for t in (q, k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)
