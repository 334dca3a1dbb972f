"""The torch operators ``torch.ops.hwkern.*``: schemas, fakes, the CUDA implementation, autograd, autocast.

Shapes: ``x [..., K]`` in float32, float16 or bfloat16 with any strides; ``q [..., K]`` int8; ``weight [N, K16]`` int8
with K16 = K rounded up to a multiple of 16 and zeros in the padding; scales float32. ``reference.py`` states the
mathematics; the CUDA and the CPU implementation return the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, register_autograd, register_fake

from hwkern import _cpu, _no_grad, _weight_only
from hwkern._autograd import gradients, linear_backward, remember, setup_linear, without_gradient
from hwkern._checks import (
    ACTIVATIONS,
    CHOOSE,
    DTYPES,
    FLOATS,
    K_MAX,
    ROW_ALIGNMENT,
    check_float,
    check_int8,
    check_k,
    check_linear,
    check_matmul,
    check_out_dtype,
    check_static_scale,
    padded,
)
from hwkern._choice import LAYER, PRODUCT, config_for, tuned
from hwkern._cpu import int8_is_fast as cpu_int8_is_fast
from hwkern._cuda import current_device as _current_device
from hwkern._cuda import current_stream as _current_stream
from hwkern._cuda import extension as _cuda
from hwkern._cuda import on_device as _on_device
from hwkern._embedding import TableCell, eager_embedding, int8_embedding
from hwkern._fused import NORMS, NormQuantized, activation_quantize, norm_quantize
from hwkern._launch_cell import LaunchCell, cell_for
from hwkern._no_grad import IN_CPP, linear_no_grad
from hwkern._tensors import are_constant, contiguous, dtype_code, is_constant, pointer, rows
from hwkern._tracing import compiles_inference, dispatch_modes, functorch_level, profiling, tracing_state
from hwkern._weight_only import weight_only_linear

__all__ = [
    "ACTIVATIONS",
    "CHOOSE",
    "DTYPES",
    "FLOATS",
    "K_MAX",
    "NORMS",
    "LaunchCell",
    "NormQuantized",
    "TableCell",
    "activation_quantize",
    "cpu_int8_is_fast",
    "dequantize",
    "eager_embedding",
    "eager_linear",
    "eager_weight_only",
    "int8_embedding",
    "int8_linear",
    "int8_matmul",
    "norm_quantize",
    "pad_weight",
    "padded",
    "quantize",
    "weight_only_linear",
]

_lib = Library("hwkern", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define("quantize(Tensor x) -> (Tensor, Tensor)", tags=_TAGS)
_lib.define("quantize.static(Tensor x, Tensor scale, int axis=0) -> Tensor", tags=_TAGS)
_lib.define("dequantize(Tensor q, Tensor scale, int axis=0, ScalarType? out_dtype=None) -> Tensor", tags=_TAGS)
_lib.define(
    "int8_matmul(Tensor a, Tensor b, Tensor? scale_a=None, Tensor? scale_b=None, Tensor? bias=None, "
    'ScalarType? out_dtype=None, int config=-1, str activation="none", Tensor? residual=None, Tensor? out_scale=None) '
    "-> Tensor",
    tags=_TAGS,
)
_lib.define(
    "int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, ScalarType? out_dtype=None, "
    'int config=-1, str activation="none", Tensor? residual=None) -> Tensor',
    tags=_TAGS,
)


# ---- the Python face of the operators ------------------------------------------------------------------------------


def quantize(x: Tensor, scale: Tensor | None = None, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize to symmetric int8: ``q = clamp(rint(x * (1 / scale)), -127, 127)``.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16.
        scale: None for one dynamic scale per token (row), ``max(absmax / 127, 2**-126)``; else float32 of one element
            (per tensor), of ``x.shape[:-1]`` (``axis=0``, per row) or of ``[K]`` (``axis=-1``, per column).

    Returns:
        ``q`` int8 of x's shape and the float32 scale (``x.shape[:-1]`` when dynamic, else the one that came in).
        A row with NaN or ±inf gets scale NaN and q 0 when dynamic; with a static scale ±inf saturates and NaN gives 0.

    Has no gradient: backward through the scale is a NotImplementedError, in torch.func too (in a compiled function a
    warning of torch's); ``q`` is an integer, so that none goes through it. :func:`int8_linear` has one
    (straight-through).
    """
    if scale is None:
        found: tuple[Tensor, Tensor] = without_gradient(torch.ops.hwkern.quantize.default, x)
        return found
    return without_gradient(torch.ops.hwkern.quantize.static, x, scale, axis), scale


def dequantize(q: Tensor, scale: Tensor, axis: int = 0, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * scale``, computed in float32 and rounded once to ``out_dtype``; scale shapes as in :func:`quantize`.

    Has no gradient to ``scale``: backward is a NotImplementedError.
    """
    found: Tensor = without_gradient(torch.ops.hwkern.dequantize.default, q, scale, axis, out_dtype)
    return found


def int8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """``activation(((a @ b.T) * scale_a[:, None]) * scale_b + bias) + residual``, rounded once to ``out_dtype``.

    The sum is the exact int32; everything after it is float32.

    Args:
        a: ``[..., K]`` int8. b: ``[N, K]`` int8.
        scale_a: ``a.shape[:-1]`` float32. scale_b: ``[N]`` float32. bias: ``[N]`` of any float dtype.
        out_dtype: float32 (default with a scale, bias, activation or residual), float16, bfloat16, int8 with
            ``out_scale``, or int32 (default without any of these): the raw sum.
        config: a config id (``hwkern._C.gemm_configs()``) or -1 to let the cost model choose; ignored on the CPU.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``; 2 ulp of float32.
        residual: of the output's shape and any float dtype, added after the activation.
        out_scale: float32 of one element: the result is ``clamp(rint(y * (1 / out_scale)), -127, 127)``.

    Has no gradient: :func:`int8_linear` has.
    """
    return torch.ops.hwkern.int8_matmul.default(
        a, b, scale_a, scale_b, bias, out_dtype, config, activation, residual, out_scale
    )


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``nn.Linear`` with an int8 weight: quantizes ``x`` per token, multiplies, rescales, adds the bias.

    Then ``activation(...) + residual``, if asked for, in float32 before the one rounding to ``out_dtype``.

    Args:
        x: ``[..., K]`` float. weight: ``[N, K16]`` from :func:`pad_weight`. weight_scale: ``[N]`` float32.
        bias: ``[N]`` of any float dtype. out_dtype: x's dtype by default, autocast's under autocast.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        residual: ``[..., N]`` of any float dtype.

    Gradients reach ``x`` (straight-through, on the dequantized weight), ``bias`` and ``residual``; an int8 weight has
    none. The backward pass of an activation computes its input again. Whether ``weight_scale`` is finite is not checked
    here, which would wait for the GPU; ``Int8Linear`` checks it once.
    """
    return torch.ops.hwkern.int8_linear.default(x, weight, weight_scale, bias, out_dtype, config, activation, residual)


def pad_weight(q: Tensor) -> Tensor:
    """Pack an int8 weight ``[N, K]`` as ``[N, K16]`` with zeros in the padding (a contiguous tensor)."""
    extra = padded(q.shape[1]) - q.shape[1]
    return (torch.nn.functional.pad(q, (0, extra)) if extra else q).contiguous()


# ---- fakes: shapes and dtypes for torch.compile and torch.export ---------------------------------------------------


@register_fake("hwkern::quantize")
def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_float(x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@register_fake("hwkern::quantize.static")
def _quantize_static_fake(x: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    check_float(x)
    check_static_scale(x, scale, axis)
    return x.new_empty(x.shape, dtype=torch.int8)


@register_fake("hwkern::dequantize")
def _dequantize_fake(q: Tensor, scale: Tensor, axis: int = 0, out_dtype: torch.dtype | None = None) -> Tensor:
    check_int8("q", q)
    check_static_scale(q, scale, axis)
    return q.new_empty(q.shape, dtype=out_dtype or torch.float32)


@register_fake("hwkern::int8_matmul")
def _matmul_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    dtype = check_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, out_scale)
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)


@register_fake("hwkern::int8_linear")
def _linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    dtype = check_linear(x, weight, weight_scale, bias, out_dtype, activation, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def _axis_code(scale: Tensor, axis: int) -> int:
    return 0 if scale.numel() == 1 else (1 if axis == 0 else 2)  # hwkern.h ScaleAxis


@_on_device
def _quantize_cuda(x: Tensor) -> tuple[Tensor, Tensor]:
    check_float(x)
    k = x.shape[-1]
    check_k(k)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if q.numel():
        x, ldx = rows(x)
        stream = _current_stream(x.get_device())
        m = x.numel() // k
        _cuda().quantize_per_token(x.data_ptr(), DTYPES[x.dtype], ldx, m, k, q.data_ptr(), k, scale.data_ptr(), stream)
    return q, scale


@_on_device
def _quantize_static_cuda(x: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    check_float(x)
    check_static_scale(x, scale, axis)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if q.numel():
        x, ldx = rows(x)
        k = x.shape[-1]
        scale = scale.contiguous()
        _cuda().quantize_static(
            x.data_ptr(), DTYPES[x.dtype], ldx, x.numel() // k, k, q.data_ptr(), k, scale.data_ptr(),
            _axis_code(scale, axis), _current_stream(x.get_device()),
        )  # fmt: skip
    return q


@_on_device
def _dequantize_cuda(q: Tensor, scale: Tensor, axis: int = 0, out_dtype: torch.dtype | None = None) -> Tensor:
    check_int8("q", q)
    check_static_scale(q, scale, axis)
    dtype = out_dtype or torch.float32
    check_out_dtype(dtype)
    y = torch.empty(q.shape, dtype=dtype, device=q.device)
    if y.numel():
        q, ldq = rows(q)
        k = q.shape[-1]
        scale = scale.contiguous()
        _cuda().dequantize(
            q.data_ptr(), ldq, scale.data_ptr(), y.data_ptr(), DTYPES[dtype], k, q.numel() // k, k,
            _axis_code(scale, axis), _current_stream(q.get_device()),
        )  # fmt: skip
    return y


def _aligned_rows(q: Tensor) -> tuple[Tensor, int]:
    """An int8 matrix with 16-byte aligned rows: itself, or a padded copy."""
    q, ld = rows(q)
    if ld % ROW_ALIGNMENT == 0 and q.data_ptr() % ROW_ALIGNMENT == 0:
        return q, ld
    k = q.shape[-1]
    copy = torch.empty((*q.shape[:-1], padded(k)), dtype=torch.int8, device=q.device)
    copy[..., :k] = q
    return copy, padded(k)


@_on_device
def _matmul_cuda(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    dtype = check_matmul(a, b, scale_a, scale_b, bias, out_dtype, activation, residual, out_scale)
    n, k = b.shape
    d = torch.empty((*a.shape[:-1], n), dtype=dtype, device=a.device)
    if d.numel():
        m = d.numel() // n
        a, lda = _aligned_rows(a)
        b, ldb = _aligned_rows(b)
        if tuned and config == CHOOSE:  # measured by hwkern.tune
            config = config_for(d.get_device(), m, n, k, dtype)
        scale_a, scale_b, bias = contiguous(scale_a), contiguous(scale_b), contiguous(bias)
        residual, ldr = (None, 0) if residual is None else rows(residual)
        _cuda().gemm(
            a.data_ptr(), lda, b.data_ptr(), ldb, pointer(scale_a), pointer(scale_b), pointer(bias), dtype_code(bias),
            d.data_ptr(), n, DTYPES[dtype], m, n, k, config, _current_stream(d.get_device()),
            activation=ACTIVATIONS[activation], residual=pointer(residual), ldr=ldr,
            residual_dtype=dtype_code(residual), d_scale=pointer(out_scale),
        )  # fmt: skip
    return d


@_on_device
def _linear_cuda(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    config: int = CHOOSE,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    cell = None
    if out_dtype is None and residual is None and activation in ACTIVATIONS and x.dim() > 0:
        dtype, cell = x.dtype, cell_for(x, x.shape[-1], weight, weight_scale, bias)
    if cell is None:
        dtype = check_linear(x, weight, weight_scale, bias, out_dtype, activation, residual)
        if not (weight.is_contiguous() and weight.data_ptr() % ROW_ALIGNMENT == 0):
            weight = weight.clone(memory_format=torch.contiguous_format)
        # `cell` holds addresses only: these names keep the copies alive until the launch.
        weight_scale, bias = weight_scale.contiguous(), contiguous(bias)
        cell = LaunchCell()
        cell.read(weight, weight_scale, bias)
    constant = are_constant(weight, weight_scale, bias)
    return _launch_cell(x, cell, weight, constant, dtype, config, ACTIVATIONS[activation], residual)


def _launch_cell(
    x: Tensor,
    cell: LaunchCell,
    weight: Tensor,
    constant: bool,
    dtype: torch.dtype,
    config: int = CHOOSE,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """One allocation for the output, one for the scratch, one call. ``weight``: int8 on the device."""
    shape = x.shape
    k, n, columns = shape[-1], cell.n, cell.columns
    if x.is_contiguous():
        ldx = k
    else:
        x, ldx = rows(x)
    if len(shape) == 2:
        m = shape[0]
        out: tuple[int, ...] = (m, n)
    else:
        m = math.prod(shape[:-1])
        out = (*shape[:-1], n)
    x_dtype = x.dtype
    y = x.new_empty(out) if dtype is x_dtype else x.new_empty(out, dtype=dtype)
    if m == 0 or n == 0:
        return y
    workspace_bytes = m * (columns + 4)  # hwkern.h linear_workspace_bytes: K16 int8 and one float32 a row
    workspace = weight.new_empty(workspace_bytes)
    if tuned and config == CHOOSE:  # measured by hwkern.tune
        whole = x_dtype is dtype and activation == 0 and residual is None  # as it was measured
        config = config_for(cell.device, m, n, k, dtype, LAYER if whole else PRODUCT)
    if residual is None:
        options = (activation, 0, 0, 0)
    else:
        residual, ldr = rows(residual)
        options = (activation, residual.data_ptr(), ldr, DTYPES[residual.dtype])
    cell.linear(
        x.data_ptr(), DTYPES[x_dtype], ldx, cell.weight_pointer, columns, cell.scale_pointer,
        cell.bias_pointer, 0 if cell.bias_dtype is None else DTYPES[cell.bias_dtype],
        y.data_ptr(), n, DTYPES[dtype], m, n, k, config,
        workspace.data_ptr(), workspace_bytes, _current_stream(cell.device), *options, constant,
    )  # fmt: skip
    return y


for _name, _on_cuda, _on_cpu in (
    ("quantize", _quantize_cuda, _cpu.quantize),
    ("quantize.static", _quantize_static_cuda, _cpu.quantize_static),
    ("dequantize", _dequantize_cuda, _cpu.dequantize),
    ("int8_matmul", _matmul_cuda, _cpu.matmul),
    ("int8_linear", _linear_cuda, _cpu.linear),
):
    _lib.impl(_name, _on_cuda, "CUDA")
    _lib.impl(_name, _on_cpu, "CPU")


# ---- for inference: without the gradient's kernel, which is one in Python --------------------------------------------


def _linear_no_grad(int8: Callable[..., Tensor], weight_only: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The bits of ``int8_linear`` or ``weight_only_linear``, in x's dtype."""

    def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, only: bool) -> Tensor:
        return (weight_only if only else int8)(x, weight, weight_scale, bias)

    return linear


_no_grad.implement(
    "linear_no_grad",
    _linear_no_grad(_linear_fake, _weight_only._fake),
    _linear_no_grad(_cpu.linear, _weight_only._cpu),
    _linear_no_grad(_linear_cuda.__wrapped__, _weight_only._cuda.__wrapped__),  # type: ignore[attr-defined]
)


# ---- autograd: straight-through on the dequantized weight ----------------------------------------------------------


register_autograd(
    "hwkern::int8_linear", linear_backward(torch.ops.hwkern.int8_linear.default), setup_context=setup_linear
)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise NotImplementedError(
        "int8_matmul has no gradient, neither to its scales nor to bias and residual: use int8_linear, or detach()."
    )


register_autograd("hwkern::int8_matmul", _matmul_backward)


class _EagerLinear(torch.autograd.Function):
    """The same gradient for :func:`eager_linear`, at a third of a registered operator's host cost.

    The weight and its scale come as a tuple, which autograd does not look into: neither takes part.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, frozen: tuple[Tensor, Tensor], cell: LaunchCell | None
    ) -> Tensor:
        ctx.frozen = frozen
        remember(ctx, x, bias)
        if cell is None:
            return _cpu.linear_unchecked(x, *frozen, bias, x.dtype)
        return _launch_cell(x, cell, frozen[0], False, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, weight_scale = ctx.frozen
        needs: tuple[bool, ...] = ctx.needs_input_grad
        grad_x, grad_bias = gradients(ctx, grad, weight, weight_scale, for_x=needs[0], for_bias=needs[1])
        return grad_x, grad_bias, None, None


_apply: Callable[..., Tensor] = _EagerLinear.apply


# ---- autocast: as nn.Linear, the output has autocast's dtype; x is quantized from its own dtype --------------------


def _autocast_linear(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
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
        dtype = torch.get_autocast_dtype(device_type) if out_dtype is None else out_dtype
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.hwkern.int8_linear.default(
                x, weight, weight_scale, bias, dtype, config, activation, residual
            )

    return linear


_lib.impl("int8_linear", _autocast_linear("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
_lib.impl("int8_linear", _autocast_linear("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")


# ---- the module's call ---------------------------------------------------------------------------------------------

# Bound once: these run on every call of every layer.
is_grad_enabled, is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled


def eager_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, k: int, cell: LaunchCell
) -> Tensor:
    """:func:`int8_linear` for ``Int8Linear.forward``: ``k`` is the layer's ``in_features``, ``cell`` its own.

    Goes around the dispatcher (20 µs of host time with autograd, against 17 for the whole of nn.Linear) where nothing
    would come of it.
    """
    if _is_plain(x, weight_scale, k):
        if x.is_cuda and not tuned and _takes_cpp():
            try:
                return linear_no_grad(x, weight, weight_scale, bias, False)
            except (ValueError, RuntimeError):  # the operator at the end speaks in torch's errors and in sentences
                pass
        records = is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if x.is_cuda:
            known, seen = cell.holds(weight, weight_scale, bias), is_constant(weight)  # of an earlier call, both
            if (known or cell.read(weight, weight_scale, bias)) and _fits_cuda(x, k, cell):
                if records:
                    return _apply(x, bias, (weight, weight_scale), cell)
                return _launch_cell(x, cell, weight, known and seen, x.dtype)
        elif x.is_cpu and not is_autocast_enabled("cpu") and _fits_cpu(weight, weight_scale, bias, k):
            if records:
                return _apply(x, bias, (weight, weight_scale), None)
            return _cpu.linear_unchecked(x, weight, weight_scale, bias, x.dtype)
    if compiles_inference(x) and not tuned and x.shape[-1] == k:
        return linear_no_grad(x, weight, weight_scale, bias, False)
    # The packed weight alone cannot tell K = 17 from K = 32. (Under torch.jit.trace sizes are tensors: not checked.)
    if tracing_state() is None and x.dim() > 0 and x.shape[-1] != k:
        raise ValueError(
            f"x has {x.shape[-1]} features in its last dimension (shape {tuple(x.shape)}), but this layer has "
            f"in_features = {k}."
        )
    return torch.ops.hwkern.int8_linear.default(x, weight, weight_scale, bias)


def eager_weight_only(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, k: int, cell: LaunchCell, most: int
) -> Tensor | None:
    """:func:`weight_only_linear` as ``WeightOnlyInt8Linear.forward`` calls it for up to ``most`` tokens on CUDA.

    One allocation and one launch. None where the public operator must be called: gradients, other devices and dtypes,
    more tokens.
    """
    if not (_is_plain(x, weight_scale, k) and x.is_cuda and x.dtype is not torch.float32):
        return None
    shape = x.shape
    m = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
    if m > most:
        return None
    if _takes_cpp():
        try:
            return linear_no_grad(x, weight, weight_scale, bias, True)
        except (ValueError, RuntimeError):  # the public operator speaks in torch's errors and in sentences
            return None
    if not (
        not (is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and (cell.holds(weight, weight_scale, bias) or cell.read(weight, weight_scale, bias))
        and _fits_cuda(x, k, cell)
    ):
        return None
    n = cell.n
    if m == 0 or n == 0:
        return None
    y = x.new_empty((*shape[:-1], n))
    if x.is_contiguous():
        ldx = k
    else:
        x, ldx = rows(x)
    dtype = DTYPES[x.dtype]
    # The first launch must not read the weight before the kernel ahead of it ends: that may have written it.
    cell.weight_only(
        x.data_ptr(), dtype, ldx, cell.weight_pointer, cell.columns, cell.used, cell.scale_pointer,
        cell.bias_pointer, 0 if cell.bias_dtype is None else DTYPES[cell.bias_dtype],
        y.data_ptr(), dtype, n, m, n, k, 0, 0, 0, 0, CHOOSE, _current_stream(cell.device),
    )  # fmt: skip
    cell.used = True
    return y


def _is_plain(x: Tensor, weight_scale: Tensor, k: int) -> bool:
    """Whether nobody needs to see the operator: a plain tensor that fits, and nobody compiling, tracing or profiling.

    The order of the checks is by cost: each attribute of a tensor takes 0.1 – 0.3 µs.
    """
    return (
        not is_compiling()
        and type(x) is Tensor
        and dispatch_modes() == 0
        and functorch_level() is None
        and tracing_state() is None
        and not profiling()
        and not weight_scale.requires_grad
        and x.dtype in FLOATS
        and x.shape[-1:] == (k,)
    )


def _takes_cpp() -> bool:
    """Whether a plain CUDA tensor goes to the C++ operators: half the host time of a launch from Python."""
    return IN_CPP and not is_grad_enabled() and not is_autocast_enabled("cuda")


def _fits_cuda(x: Tensor, k: int, cell: LaunchCell) -> bool:
    """Whether a launch can take x and the layer's tensors as ``cell`` knows them."""
    return (
        0 < k <= cell.columns < k + ROW_ALIGNMENT
        and x.get_device() == cell.device
        and (_is_only_gpu() or cell.device == _current_device())
        and not is_autocast_enabled("cuda")
    )


@functools.cache
def _is_only_gpu() -> bool:
    return torch.cuda.device_count() == 1


def _fits_cpu(weight: Tensor, weight_scale: Tensor, bias: Tensor | None, k: int) -> bool:
    """Whether ``check_linear`` would pass; cheap, so without a word on why not."""
    n, columns = weight.shape
    return (
        weight.dtype is torch.int8
        and 0 < k <= columns < k + ROW_ALIGNMENT
        and k <= K_MAX
        and columns % ROW_ALIGNMENT == 0
        and weight.is_cpu
        and weight_scale.is_cpu
        and weight_scale.numel() == n
        and weight_scale.dtype is torch.float32
        and (bias is None or (bias.is_cpu and bias.numel() == n and bias.dtype in FLOATS))
    )
