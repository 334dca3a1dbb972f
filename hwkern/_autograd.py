"""The gradients that all int8 linears share: straight-through on the dequantized weight, which is frozen. And what has
none says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from hwkern._tracing import functorch_level


def remember(ctx: Any, x: Tensor, bias: Tensor | None) -> None:
    """What :func:`gradients` needs besides the weight."""
    ctx.x_dtype, ctx.k = x.dtype, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients(
    ctx: Any,
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    for_x: bool,
    for_bias: bool,
    input_scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of the bias. ``input_scale`` is divided out again where ``weight_scale`` has it multiplied in."""
    grad_x = grad_bias = None
    if for_x:
        w = torch.ops.hwkern.dequantize.default(weight, weight_scale, 0, grad.dtype)[:, : ctx.k]
        grad_x = grad @ w
        if input_scale is not None:
            grad_x = grad_x * input_scale.reciprocal().to(grad.dtype)
        grad_x = grad_x.to(ctx.x_dtype)
    if for_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_bias


def setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """``setup_context`` of an operator (x, weight, weight_scale, bias, out_dtype, config, activation, residual)."""
    # NOTE: trailing arguments left at their defaults are not listed (torch 2.13).
    x, weight, weight_scale, bias = (*inputs[:4], None)[:4]
    ctx.activation = inputs[6] if len(inputs) > 6 else "none"
    residual = inputs[7] if len(inputs) > 7 else None
    ctx.residual_dtype = None if residual is None else residual.dtype
    # An activation's derivative needs its input, which is cheaper to compute again than to write in float32.
    ctx.save_for_backward(weight, weight_scale, *(() if ctx.activation == "none" else (x, bias)))
    remember(ctx, x, bias)


def linear_backward(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of such an operator; ``operator`` computes an activation's input again."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs: tuple[bool, ...] = (*ctx.needs_input_grad, *(False,) * 8)
        if needs[2]:
            raise NotImplementedError(
                "weight_scale asks for a gradient: the int8 weight and its scale are frozen; train an adapter (LoRA) "
                "on top, or hwkern.unpatch(model) and train the float weight."
            )
        weight, weight_scale, *recompute = ctx.saved_tensors
        grad_residual = grad.to(ctx.residual_dtype) if needs[7] else None
        if recompute and (needs[0] or needs[3]):
            x, bias = recompute
            grad = _activation_backward(ctx.activation, grad, operator(x, weight, weight_scale, bias, torch.float32))
        grad_x, grad_bias = gradients(ctx, grad, weight, weight_scale, for_x=needs[0], for_bias=needs[3])
        return grad_x, None, None, grad_bias, None, None, None, grad_residual

    return backward


def _activation_backward(activation: str, grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` times the activation's derivative at the float32 ``y``; in grad's dtype."""
    aten, g = torch.ops.aten, grad.float()
    if activation == "relu":
        g = aten.threshold_backward(g, y, 0)
    elif activation == "silu":
        g = aten.silu_backward(g, y)
    else:
        g = aten.gelu_backward(g, y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return g.to(grad.dtype)


class _WithoutGradient(torch.autograd.Function):
    """An operator whose backward pass is an error; forward-mode derivatives are one by torch's own word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0].name()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{ctx.name} has no gradient: detach() its arguments, or use hwkern.ops.int8_linear.")


_refusing: Callable[..., Any] = _WithoutGradient.apply


def without_gradient(operator: Any, *arguments: Any) -> Any:
    """``operator(*arguments)``; where a gradient is recorded, its backward pass raises NotImplementedError.

    Torch by itself warns, and goes on without that part; torch.func.grad gives zeros. Not registered with the operator,
    because an autograd kernel in Python takes 8 – 12 µs of every call under no_grad. Torch's warning stays where it
    compiles: dynamo does not trace a Function that raises.
    """
    recorded = (
        torch.is_grad_enabled()
        and not is_compiling()
        and (functorch_level() is not None or any(isinstance(a, Tensor) and a.requires_grad for a in arguments))
    )
    return _refusing(operator, *arguments) if recorded else operator(*arguments)
