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
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from hwkern._autograd import linear_backward, setup_linear
from hwkern._checks import ACTIVATIONS, CHOOSE, DTYPES, ROW_ALIGNMENT, check, check_linear
from hwkern._cpu import TORCH_ACTIVATIONS
from hwkern._cuda import current_stream, extension, on_device
from hwkern._launch_cell import cell_for
from hwkern._tensors import contiguous, dtype_code, is_constant, pointer, rows

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
    dtype = check_linear(x, weight, weight_scale, bias, out_dtype, activation, residual)
    check(
        x.dtype != torch.float32 or x.is_cpu,
        lambda: "x is torch.float32: on CUDA weight_only_linear takes float16 or bfloat16. Cast x, or use int8_linear.",
        TypeError,
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
    k = x.shape[-1] if x.dim() else 0
    if (
        out_dtype is None
        and residual is None
        and activation in ACTIVATIONS
        and x.dtype is not torch.float32
        and cell_for(x, k, weight, weight_scale, bias) is not None
    ):
        dtype = x.dtype
    else:
        dtype = _check(x, weight, weight_scale, bias, out_dtype, activation, residual)
    n, columns = weight.shape
    y = x.new_empty((*x.shape[:-1], n), dtype=dtype)
    if y.numel() == 0:
        return y
    if weight.is_contiguous() and weight.data_ptr() % ROW_ALIGNMENT == 0:
        constant = is_constant(weight)
    else:
        weight, constant = weight.clone(memory_format=torch.contiguous_format), False
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
        y = TORCH_ACTIVATIONS[activation](y)
        if residual is not None:
            y += residual.reshape(y.shape)
    return y.view(*x.shape[:-1], n).to(dtype)


_lib.impl("weight_only_linear", _cuda, "CUDA")
_lib.impl("weight_only_linear", _cpu, "CPU")


# ---- autograd: on the dequantized weight ---------------------------------------------------------------------------


register_autograd(
    "hwkern::weight_only_linear",
    linear_backward(torch.ops.hwkern.weight_only_linear.default),
    setup_context=setup_linear,
)


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
