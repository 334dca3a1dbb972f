"""Weight-only linear (W8A16): ``torch.ops.hwkern.weight_only_linear``, an int8 weight and 16-bit activations.

No activation is quantized, so the only error beside float32 rounding is that of the weight's own rounding to int8; for
few tokens, where reading the weight is all the time, it is as fast as int8 activations or faster.

On CUDA one kernel (csrc/gemm/w8a16.cu). On the CPU a float32 matmul over blocks of rows that are widened in the cache:
the fastest of the ways that keep float32 sums, but slower than a float32 layer, because the weight is widened in every
call (one thread, 4096×4096: 1.5–2.8 times at M >= 16, more below). torch's ``_weight_int8pack_mm`` is 5–40 times slower
in float32, and in bfloat16, where it is fast, it rounds the scale and the sum.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from hwkern._checks import CHOOSE, DTYPES, FLOATS, ROW_ALIGNMENT, check, check_linear, check_same_device
from hwkern._cuda import current_stream, extension, on_device
from hwkern._tensors import contiguous, dtype_code, pointer, rows

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # hwkern.h Activation

_CPU_BLOCK = 2**18  # weights that are widened at once: 1 MB of float32, which stays in a core's cache

_lib = Library("hwkern", "FRAGMENT")
_lib.define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, ScalarType? out_dtype=None, "
    'int config=-1, str activation="none", Tensor? residual=None) -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation((x @ weight.T) * weight_scale + bias) + residual`` with an int8 weight and float32 sums.

    Args:
        x: ``[..., K]`` float16 or bfloat16, on the CPU also float32; any strides.
        weight: ``[N, K16]`` int8 from :func:`hwkern.ops.pad_weight`, the same as for ``int8_linear``.
        weight_scale: ``[N]`` float32. bias: ``[N]`` of any float dtype.
        out_dtype: float32, float16 or bfloat16; x's dtype by default, autocast's under autocast.
        config: a config id of scheme ``"w8a16"`` (``hwkern._C.gemm_configs()``) or -1 to let the cost model choose;
            ignored on the CPU.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        residual: ``[..., N]`` of any float dtype, added after the activation.

    The products are exact; they are added in float32, in an order that depends on the config and the device, so results
    differ by float32 rounding between them; the same call gives the same bits in every run. NaN and ±inf in x reach the
    outputs of their row as in a float32 product. Gradients reach ``x`` (on the dequantized weight), ``bias`` and
    ``residual``.
    """
    return torch.ops.hwkern.weight_only_linear.default(
        x, weight, weight_scale, bias, out_dtype, config, activation, residual
    )


def _check(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str,
    residual: Tensor | None,
) -> torch.dtype:
    """The output's dtype, once everything fits together."""
    dtype = check_linear(x, weight, weight_scale, bias, out_dtype)
    check(
        x.dtype != torch.float32 or x.is_cpu,
        lambda: "x is torch.float32: on CUDA weight_only_linear takes float16 or bfloat16. Cast x, or use int8_linear.",
        TypeError,
    )
    check(
        activation in ACTIVATIONS,
        lambda: f"activation = {activation!r}: hwkern knows {', '.join(map(repr, ACTIVATIONS))}.",
    )
    if residual is not None:
        check_same_device(x=x, residual=residual)
        kind, shape = residual.dtype, (*x.shape[:-1], weight.shape[0])
        check(kind in FLOATS, lambda: f"residual is {kind}: float32, float16 or bfloat16.", TypeError)
        check(
            tuple(residual.shape) == shape,
            lambda: f"residual has shape {tuple(residual.shape)}, but the output's {shape} is needed.",
        )
    return dtype


@register_fake("hwkern::weight_only_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    dtype = _check(x, weight, weight_scale, bias, out_dtype, activation, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# ---- CUDA ----------------------------------------------------------------------------------------------------------

_seen: dict[int, weakref.ref[Tensor]] = {}


def _is_constant(weight: Tensor) -> bool:
    """Whether this very tensor was the weight of an earlier call.

    Then the kernel may read it before the preceding kernel on the stream has ended (hwkern.h, weight_is_constant). The
    first call must not: the kernel before it may be one of ours that writes the weight and has let us start early.
    """
    key = id(weight)
    known = _seen.get(key)
    if known is not None and known() is weight:
        return True
    _seen[key] = weakref.ref(weight, lambda _: _seen.pop(key, None))
    return False


@on_device
def _cuda(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    dtype = _check(x, weight, weight_scale, bias, out_dtype, activation, residual)
    n, columns = weight.shape
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    if weight.is_contiguous() and weight.data_ptr() % ROW_ALIGNMENT == 0:
        constant = _is_constant(weight)
    else:
        weight, constant = weight.clone(memory_format=torch.contiguous_format), False
    k = x.shape[-1]
    x, ldx = rows(x)
    weight_scale, bias = weight_scale.contiguous(), contiguous(bias)
    residual, ldr = (None, 0) if residual is None else rows(residual)
    extension().weight_only_linear(
        x.data_ptr(), DTYPES[x.dtype], ldx, weight.data_ptr(), columns, constant, weight_scale.data_ptr(),
        pointer(bias), dtype_code(bias), y.data_ptr(), DTYPES[dtype], n, y.numel() // n, n, k,
        ACTIVATIONS[activation], pointer(residual), dtype_code(residual), ldr, config, current_stream(y.get_device()),
    )  # fmt: skip
    return y


# ---- CPU -----------------------------------------------------------------------------------------------------------


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(y)
    if activation == "gelu":
        return 0.5 * y * (1 + torch.erf(y * 0.5**0.5))  # torch.nn.functional.gelu (torch 2.13) gives NaN for inf
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(y, approximate="tanh")
    return torch.nn.functional.silu(y) if activation == "silu" else y


def _cpu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    dtype = _check(x, weight, weight_scale, bias, out_dtype, activation, residual)
    k, n = x.shape[-1], weight.shape[0]
    x_rows = x.reshape(math.prod(x.shape[:-1]), k).float()
    y = torch.empty(x_rows.shape[0], n)
    if y.numel():
        step = max(16, _CPU_BLOCK // k)
        for start in range(0, n, step):
            block = slice(start, start + step)
            torch.mm(x_rows, weight[block, :k].float().t(), out=y[:, block])
        y *= weight_scale
        if bias is not None:
            y += bias  # to float32 is exact
        y = _activate(y, activation)
        if residual is not None:
            y += residual.reshape(y.shape)
    return y.view(*x.shape[:-1], n).to(dtype)


_lib.impl("weight_only_linear", _cuda, "CUDA")
_lib.impl("weight_only_linear", _cpu, "CPU")


# ---- autograd: on the dequantized weight ---------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # NOTE: trailing arguments left at their defaults are not listed (torch 2.13).
    x, weight, weight_scale, bias = (*inputs[:4], None)[:4]
    ctx.activation = inputs[6] if len(inputs) > 6 else "none"
    residual = inputs[7] if len(inputs) > 7 else None
    ctx.x_dtype, ctx.k = x.dtype, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    # An activation's derivative needs its input, which is cheaper to compute again than to write in float32.
    ctx.save_for_backward(weight, weight_scale, *(() if ctx.activation == "none" else (x, bias)))


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


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs: tuple[bool, ...] = (*ctx.needs_input_grad, *(False,) * 8)
    if needs[2]:
        raise NotImplementedError(
            "weight_scale asks for a gradient: the int8 weight and its scale are frozen; train an adapter (LoRA) on "
            "top, or hwkern.unpatch(model) and train the float weight."
        )
    weight, weight_scale, *recompute = ctx.saved_tensors
    grad_x = grad_bias = None
    grad_residual = grad.to(ctx.residual_dtype) if needs[7] else None
    if recompute and (needs[0] or needs[3]):
        x, bias = recompute
        y = torch.ops.hwkern.weight_only_linear.default(x, weight, weight_scale, bias, torch.float32)
        grad = _activation_backward(ctx.activation, grad, y)
    if needs[0]:
        w = torch.ops.hwkern.dequantize.default(weight, weight_scale, 0, grad.dtype)[:, : ctx.k]
        grad_x = (grad @ w).to(ctx.x_dtype)
    if needs[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, grad_residual


register_autograd("hwkern::weight_only_linear", _backward, setup_context=_setup_context)


# ---- autocast: as nn.Linear, x is cast to autocast's dtype, which is the output's too ------------------------------


def _autocast(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    keys = torch._C.DispatchKeySet(key)

    def linear(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        config: int = CHOOSE,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.hwkern.weight_only_linear.default(
                x.to(dtype), weight, weight_scale, bias, out_dtype or dtype, config, activation, residual
            )

    return linear


_lib.impl("weight_only_linear", _autocast("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
_lib.impl("weight_only_linear", _autocast("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
