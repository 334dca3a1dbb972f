"""``torch.ops.hwkern.int8_linear_static``: an int8 layer whose input scale was calibrated, not measured per call.

    q = clamp(rint(x * (1 / input_scale)) + zero_point, -127, 127)
    y = (q @ weight.T) * output_scale + bias

``output_scale [N]`` is the input's per-tensor scale times the weight's, one float32 product made once. With a zero
point the sum carries ``zero_point · Σ_k weight[n, k]`` too much; the caller takes that off in ``bias``
(:func:`zero_shift`). ``input_scale`` of ``[K]`` folds a smoothing vector into the same pass; a column of scale inf is
left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from hwkern import ops
from hwkern._autograd import gradients, remember
from hwkern._checks import check, check_bias, check_float, check_out_dtype, check_same_device, check_scale, padded
from hwkern.reference import QMAX

_lib = Library("hwkern", "FRAGMENT")
_lib.define(
    "int8_linear_static(Tensor x, Tensor weight, Tensor output_scale, Tensor input_scale, int zero_point=0, "
    "Tensor? bias=None, ScalarType? out_dtype=None, int config=-1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def int8_linear_static(
    x: Tensor,
    weight: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    zero_point: int = 0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = ops.CHOOSE,
) -> Tensor:
    """``nn.Linear`` with an int8 weight and a static quantization of ``x``; the formula is at the top of the file.

    Args:
        x: ``[..., K]`` float. weight: ``[N, K16]`` int8. output_scale: ``[N]`` float32.
        input_scale: float32, ``[1]`` or ``[K]``, positive. zero_point: in -127 … 127.
        bias: ``[N]`` of any float dtype; with a zero point it must hold the correction. out_dtype: x's by default.

    Values beyond the calibrated range saturate. NaN gives q = 0. Gradients reach ``x`` (straight-through) and ``bias``.
    """
    return torch.ops.hwkern.int8_linear_static.default(
        x, weight, output_scale, input_scale, zero_point, bias, out_dtype, config
    )


def zero_shift(weight: Tensor, output_scale: Tensor, zero_point: int) -> Tensor:
    """What takes a zero point off each output: ``-output_scale[n] · zero_point · Σ_k weight[n, k]``.

    ``[N]`` float32, from the exact integer sum.
    """
    if weight.is_meta:
        return torch.empty_like(output_scale)
    return output_scale * -(weight.sum(-1, dtype=torch.int64) * zero_point).float()


def quantize_affine(x: Tensor, input_scale: Tensor, zero_point: int) -> Tensor:
    """``clamp(rint(x * (1 / input_scale)) + zero_point, -127, 127)`` as int8 of x's shape; NaN gives 0."""
    if zero_point == 0:
        return torch.ops.hwkern.quantize.static(x, input_scale, -1)
    scaled = (x.float() * input_scale.reciprocal()).round_().add_(zero_point).clamp_(-QMAX, QMAX)
    return scaled.nan_to_num_(nan=0.0).to(torch.int8)


def _check(
    x: Tensor,
    weight: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    zero_point: int,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    check_float(x)
    k = x.shape[-1]
    check(
        weight.dtype == torch.int8 and weight.dim() == 2 and weight.shape[1] == padded(k),
        lambda: f"x has K = {k}: the weight must be int8 [N, {padded(k)}], not {weight.dtype} {tuple(weight.shape)}.",
    )
    check_same_device(x=x, weight=weight, output_scale=output_scale, input_scale=input_scale, bias=bias)
    check_scale(output_scale, weight.shape[:1], "output_scale")
    check_scale(input_scale, (1,) if input_scale.numel() == 1 else (k,), "input_scale")
    check(-QMAX <= zero_point <= QMAX, lambda: f"zero_point = {zero_point}: it must be within -127 … 127.")
    check_bias(bias, weight.shape[0])
    dtype = out_dtype or x.dtype
    check_out_dtype(dtype)
    return dtype


@register_fake("hwkern::int8_linear_static")
def _fake(
    x: Tensor,
    weight: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    zero_point: int = 0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = ops.CHOOSE,
) -> Tensor:
    dtype = _check(x, weight, output_scale, input_scale, zero_point, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _run(
    x: Tensor,
    weight: Tensor,
    output_scale: Tensor,
    input_scale: Tensor,
    zero_point: int = 0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = ops.CHOOSE,
) -> Tensor:
    dtype = _check(x, weight, output_scale, input_scale, zero_point, bias, out_dtype)
    q = quantize_affine(x, input_scale, zero_point)
    if q.shape[-1] != weight.shape[1]:
        q = torch.nn.functional.pad(q, (0, weight.shape[1] - q.shape[-1]))
    return torch.ops.hwkern.int8_matmul.default(q, weight, None, output_scale, bias, dtype, config)


_lib.impl("int8_linear_static", _run, "CompositeExplicitAutograd")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, output_scale, input_scale = inputs[:4]
    bias = inputs[5] if len(inputs) > 5 else None
    ctx.save_for_backward(weight, output_scale, input_scale)
    remember(ctx, x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, output_scale, input_scale = ctx.saved_tensors
    needs: tuple[bool, ...] = (*ctx.needs_input_grad, *(False,) * 8)
    grad_x, grad_bias = gradients(
        ctx, grad, weight, output_scale, for_x=needs[0], for_bias=needs[5], input_scale=input_scale
    )
    return grad_x, None, None, None, None, grad_bias, None, None


register_autograd("hwkern::int8_linear_static", _backward, setup_context=_setup_context)
