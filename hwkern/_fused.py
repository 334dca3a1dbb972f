"""Norm or activation with the quantization that follows it, in one operator: ``torch.ops.hwkern.norm_quantize`` and
``torch.ops.hwkern.activation_quantize``.

On CUDA one kernel each. On the CPU the norm is a C++ loop with the same bits; the activation is torch's own, followed
by the C++ quantization. No gradients: these are for inference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_fake

from hwkern import _cpu
from hwkern._autograd import without_gradient
from hwkern._checks import ACTIVATIONS, DTYPES, FLOATS, check, check_float, check_k, check_same_device
from hwkern._cuda import current_stream, extension, on_device
from hwkern._tensors import contiguous, dtype_code, pointer, rows

NORMS = {"layer": 0, "rms": 1, "rms_rounded": 2}  # hwkern.h Norm

_lib = Library("hwkern", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "norm_quantize(Tensor x, Tensor? weight=None, Tensor? bias=None, Tensor? residual=None, Tensor? scale=None, "
    'str kind="rms", float eps=1e-06, float offset=0.0, bool return_y=False) -> (Tensor, Tensor, Tensor, Tensor)',
    tags=_TAGS,
)
_lib.define(
    "activation_quantize(Tensor x, Tensor? up=None, Tensor? scale=None, "
    'str activation="silu", bool gated=False) -> (Tensor, Tensor)',
    tags=_TAGS,
)


# ---- the Python face of the operators ------------------------------------------------------------------------------


class NormQuantized(NamedTuple):
    """What :func:`norm_quantize` gives: ``h`` is None without a residual, ``y`` unless it was asked for."""

    q: Tensor
    scale: Tensor
    h: Tensor | None
    y: Tensor | None


def norm_quantize(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    return_y: bool = False,
) -> NormQuantized:
    """Add ``residual``, normalise each row and quantize it: the norm and then ``hwkern.ops.quantize``, in one pass.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16. residual: None or like x.
        weight, bias: None or ``[K]`` of any float dtype; a bias only with ``kind="layer"``.
        scale: None for one dynamic scale per row, or float32 of one element.
        kind: ``"rms"`` (torch.nn.RMSNorm, Gemma), ``"rms_rounded"`` (transformers' Llama, Qwen, Mistral, T5: the
            normalised value is rounded to x's dtype before the weight) or ``"layer"``; see ``reference.norm``.
        eps: added to the mean square. offset: added to the weight; 1 for Gemma.
        return_y: also return the normalised rows in x's dtype.

    Returns:
        ``q`` int8 of x's shape; the float32 scale, ``x.shape[:-1]`` when dynamic, else the one that came in;
        ``h = x + residual`` rounded to x's dtype, the next residual; ``y``, what q was rounded from. Special values as
        in ``hwkern.ops.quantize``. The same bits on the CPU and on CUDA, whatever the batch.

    Has no gradient: backward through the scale, ``h`` or ``y`` is a NotImplementedError.
    """
    q, new_scale, h, y = without_gradient(
        torch.ops.hwkern.norm_quantize.default, x, weight, bias, residual, scale, kind, eps, offset, return_y
    )
    return NormQuantized(
        q, new_scale if scale is None else scale, None if residual is None else h, y if return_y else None
    )


def activation_quantize(
    x: Tensor,
    up: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantize ``activation(x)``, or ``activation(x) * up``: what lies between the two layers of an MLP.

    Args:
        x: ``[..., K]`` float32, float16 or bfloat16; with ``gated`` ``[..., 2K]``, the gate's columns and then up's.
        up: None or like x; not together with ``gated``.
        scale: None for one dynamic scale per row, or float32 of one element.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"`` or ``"none"``.

    Returns:
        ``q [..., K]`` int8 and the float32 scale (``x.shape[:-1]`` when dynamic, else the one that came in). The
        activation and the product are each rounded to x's dtype, as torch would store them, and then quantized as in
        ``hwkern.ops.quantize``. The activation itself is within 4 float32 ulp of the size of x, on the CPU and on CUDA.

    Has no gradient: backward through the scale is a NotImplementedError.
    """
    q, new_scale = without_gradient(torch.ops.hwkern.activation_quantize.default, x, up, scale, activation, gated)
    return q, new_scale if scale is None else scale


# ---- checks and fakes ----------------------------------------------------------------------------------------------


def _check_one_scale(scale: Tensor | None) -> None:
    if scale is not None:
        check(scale.dtype == torch.float32, lambda: f"scale is {scale.dtype}: scales are float32.", TypeError)
        check(
            scale.numel() == 1,
            lambda: f"scale has shape {tuple(scale.shape)}: one static scale for the whole tensor is needed.",
        )


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    check(t.dtype == x.dtype, lambda: f"{name} is {t.dtype}, but x is {x.dtype}: they must be the same.", TypeError)
    check(t.shape == x.shape, lambda: f"{name} has shape {tuple(t.shape)}, but x has {tuple(x.shape)}.")


def _check_vector(name: str, t: Tensor | None, k: int) -> None:
    if t is not None:
        check(t.dtype in FLOATS, lambda: f"{name} is {t.dtype}: float32, float16 or bfloat16.", TypeError)
        check(tuple(t.shape) == (k,), lambda: f"{name} has shape {tuple(t.shape)}, but ({k},) is needed.")


def _check_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, kind: str
) -> None:
    check_float(x)
    check_k(x.shape[-1])
    check(kind in NORMS, lambda: f"kind = {kind!r}: one of {', '.join(NORMS)}.")
    check(bias is None or kind == "layer", lambda: f'kind = {kind!r} takes no bias: only "layer" does.')
    check_same_device(x=x, weight=weight, bias=bias, residual=residual, scale=scale)
    _check_vector("weight", weight, x.shape[-1])
    _check_vector("bias", bias, x.shape[-1])
    if residual is not None:
        _check_like("residual", residual, x)
    _check_one_scale(scale)


def _check_activation(x: Tensor, up: Tensor | None, scale: Tensor | None, activation: str, gated: bool) -> int:
    """How many columns the result has."""
    check_float(x)
    check(activation in ACTIVATIONS, lambda: f"activation = {activation!r}: one of {', '.join(ACTIVATIONS)}.")
    check(not (gated and up is not None), lambda: "gated means that x holds the gate and up: up must then be None.")
    check(
        not gated or x.shape[-1] % 2 == 0,
        lambda: f"gated needs an even last dimension, the gate and up, but x has shape {tuple(x.shape)}.",
    )
    check_same_device(x=x, up=up, scale=scale)
    if up is not None:
        _check_like("up", up, x)
    _check_one_scale(scale)
    k = x.shape[-1] // 2 if gated else x.shape[-1]
    check_k(k)
    return k


def _norm_outputs(x: Tensor, residual: Tensor | None, scale: Tensor | None, return_y: bool) -> tuple[Tensor, ...]:
    """q, scale, h and y; an operator has no optional results, so what is not wanted has no elements."""
    nothing = (0,)
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1] if scale is None else nothing, dtype=torch.float32, device=x.device),
        torch.empty(nothing if residual is None else x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape if return_y else nothing, dtype=x.dtype, device=x.device),
    )


def _activation_outputs(x: Tensor, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((*x.shape[:-1], k), dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1] if scale is None else (0,), dtype=torch.float32, device=x.device),
    )


@register_fake("hwkern::norm_quantize")
def _norm_fake(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    return_y: bool = False,
) -> tuple[Tensor, ...]:
    _check_norm(x, weight, bias, residual, scale, kind)
    return _norm_outputs(x, residual, scale, return_y)


@register_fake("hwkern::activation_quantize")
def _activation_fake(
    x: Tensor, up: Tensor | None = None, scale: Tensor | None = None, activation: str = "silu", gated: bool = False
) -> tuple[Tensor, Tensor]:
    return _activation_outputs(x, scale, _check_activation(x, up, scale, activation, gated))


# ---- CUDA and CPU --------------------------------------------------------------------------------------------------


def _norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    return_y: bool = False,
) -> tuple[Tensor, ...]:
    _check_norm(x, weight, bias, residual, scale, kind)
    q, new_scale, h, y = outputs = _norm_outputs(x, residual, scale, return_y)
    if q.numel() == 0:
        return outputs
    k = x.shape[-1]
    m = q.numel() // k
    x, ldx = rows(x)
    ldr = k
    if residual is not None:
        residual, ldr = rows(residual)
    weight, bias, scale = contiguous(weight), contiguous(bias), contiguous(scale)
    if x.is_cuda:
        call, last = extension().norm_quantize, current_stream(x.get_device())
    else:
        call, last = _cpu._C.cpu_norm_quantize, _cpu._threads(m * k)
    call(
        x.data_ptr(), ldx, DTYPES[x.dtype], pointer(residual), ldr, pointer(weight), dtype_code(weight),
        pointer(bias), dtype_code(bias), 0 if residual is None else h.data_ptr(), k, y.data_ptr() if return_y else 0, k,
        q.data_ptr(), k, pointer(new_scale if scale is None else scale), scale is not None, m, k, eps, offset,
        NORMS[kind], last,
    )  # fmt: skip
    return outputs


@on_device
def _activation_cuda(
    x: Tensor, up: Tensor | None = None, scale: Tensor | None = None, activation: str = "silu", gated: bool = False
) -> tuple[Tensor, Tensor]:
    k = _check_activation(x, up, scale, activation, gated)
    q, new_scale = outputs = _activation_outputs(x, scale, k)
    if q.numel() == 0:
        return outputs
    x, ldx = rows(x)
    up_pointer, ldup = (x.data_ptr() + k * x.element_size() if gated else 0), ldx
    if up is not None:
        up, ldup = rows(up)
        up_pointer = up.data_ptr()
    scale = contiguous(scale)
    extension().activation_quantize(
        x.data_ptr(), ldx, DTYPES[x.dtype], up_pointer, ldup, q.data_ptr(), k,
        pointer(new_scale if scale is None else scale), scale is not None, q.numel() // k, k,
        ACTIVATIONS[activation], current_stream(x.get_device()),
    )  # fmt: skip
    return outputs


def _activation_cpu(
    x: Tensor, up: Tensor | None = None, scale: Tensor | None = None, activation: str = "silu", gated: bool = False
) -> tuple[Tensor, Tensor]:
    k = _check_activation(x, up, scale, activation, gated)
    q, new_scale = outputs = _activation_outputs(x, scale, k)
    if q.numel() == 0:
        return outputs
    if gated:
        x, up = x[..., :k], x[..., k:]
    # Contiguous, because torch computes strided elements with other functions, an ulp apart.
    y = _cpu.TORCH_ACTIVATIONS[activation](x.float().contiguous()).to(x.dtype)
    if up is not None:
        y = y * up  # exact in float32 for the 16-bit types, then one rounding
    if scale is None:
        _cpu._quantize_rows(y, q.view(-1, k), new_scale)
    else:
        q.copy_(_cpu.quantize_static(y, scale))
    return outputs


_lib.impl("norm_quantize", on_device(_norm), "CUDA")
_lib.impl("norm_quantize", _norm, "CPU")
_lib.impl("activation_quantize", _activation_cuda, "CUDA")
_lib.impl("activation_quantize", _activation_cpu, "CPU")
