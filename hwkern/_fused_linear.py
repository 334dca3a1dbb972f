"""What lies before a linear layer and the layer itself, in one operator: ``torch.ops.hwkern.norm_linear`` (residual
sum, norm, quantization, int8 product) and ``torch.ops.hwkern.activation_linear`` (activation or gate · up,
quantization, product, residual sum).

Two kernels each on CUDA, and the bits of ``norm_quantize`` or ``activation_quantize`` followed by ``int8_matmul``. The
product knows that its weights are constant, so its loads overlap the first kernel. No gradients: for inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from hwkern import _cpu, _fused, _weight_only, ops
from hwkern._checks import ACTIVATIONS, CHOOSE, DTYPES, FLOATS, ROW_ALIGNMENT, check_linear
from hwkern._choice import config_for, tuned
from hwkern._cuda import current_device, current_stream, extension, on_device
from hwkern._fused import NORMS, _check_activation, _check_norm
from hwkern._launch_cell import LaunchCell, cell_for, is_vector
from hwkern._no_grad import implement
from hwkern._tensors import contiguous, dtype_code, pointer, rows
from hwkern._tracing import dispatch_modes, profiling

_KINDS = {code: kind for kind, code in NORMS.items()}
_ACTIVATIONS = {code: activation for activation, code in ACTIVATIONS.items()}

_lib = Library("hwkern", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "norm_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? norm_weight=None, "
    'Tensor? norm_bias=None, str kind="rms", float eps=1e-06, float offset=0.0, Tensor? residual=None) '
    "-> (Tensor, Tensor)",
    tags=_TAGS,
)
_lib.define(
    "activation_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, "
    'str activation="silu", bool gated=False, Tensor? residual=None) -> Tensor',
    tags=_TAGS,
)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``int8_linear(norm(h), …)`` of ``h = x + residual``: ``x [..., K]`` -> ``[..., N]`` in x's dtype, and h.

    ``weight [N, K16]`` int8, ``weight_scale [N]`` and ``bias [N]`` as in ``hwkern.ops.int8_linear``; the norm as in
    ``hwkern.ops.norm_quantize``. Without a residual (like x) h has no elements.
    """
    return torch.ops.hwkern.norm_linear.default(
        x, weight, weight_scale, bias, norm_weight, norm_bias, kind, eps, offset, residual
    )


def activation_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``int8_linear(activation(x), …) + residual``, or with ``gated`` of ``activation(x[..., :K]) * x[..., K:]``.

    The residual ``[..., N]`` is added in float32, before the one rounding to x's dtype.
    """
    return torch.ops.hwkern.activation_linear.default(x, weight, weight_scale, bias, activation, gated, residual)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            "norm_linear and activation_linear have no gradient: call them under torch.no_grad(), or use the norm and "
            "int8_linear."
        )


# ---- checks and fakes ----------------------------------------------------------------------------------------------


def _check_norm_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str,
    residual: Tensor | None,
) -> None:
    _check_norm(x, norm_weight, norm_bias, residual, None, kind)
    check_linear(x, weight, weight_scale, bias, None)


def _check_activation_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    residual: Tensor | None,
) -> int:
    k = _check_activation(x, None, None, activation, gated)
    check_linear(x[..., :k], weight, weight_scale, bias, None, residual=residual)
    return k


@register_fake("hwkern::norm_linear")
def _norm_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _refuse_gradients(x, weight_scale, bias, norm_weight, norm_bias, residual)
    _check_norm_linear(x, weight, weight_scale, bias, norm_weight, norm_bias, kind, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((0,) if residual is None else x.shape)


@register_fake("hwkern::activation_linear")
def _activation_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    _refuse_gradients(x, weight_scale, bias, residual)
    _check_activation_linear(x, weight, weight_scale, bias, activation, gated, residual)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ---- CUDA ----------------------------------------------------------------------------------------------------------


def launch_norm_linear(
    x: Tensor,
    weight: Tensor,
    cell: LaunchCell,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: int,
    eps: float,
    offset: float,
    residual: Tensor | None = None,
    h: Tensor | None = None,
) -> Tensor:
    """Two launches and two allocations. ``cell`` has read the weights; the norm's vectors are contiguous.

    With a residual, ``h`` (contiguous, like x) takes the sum.
    """
    shape = x.shape
    k, n, columns = shape[-1], cell.n, cell.columns
    y = x.new_empty((*shape[:-1], n))
    m = math.prod(shape[:-1])
    if m == 0:
        return y
    x, ldx = rows(x)
    ldr = k
    if residual is not None:
        residual, ldr = rows(residual)
    work = weight.new_empty(m * (columns + 4))  # as in hwkern.h's Linear: q [M, K16] int8, then scale [M] float32
    q = work.data_ptr()
    stream = current_stream(cell.device)
    extension().norm_quantize(
        x.data_ptr(), ldx, DTYPES[x.dtype], pointer(residual), ldr, pointer(norm_weight), dtype_code(norm_weight),
        pointer(norm_bias), dtype_code(norm_bias), pointer(h), k, 0, k, q, columns, q + m * columns, False, m, k, eps,
        offset, norm, stream,
    )  # fmt: skip
    return _product(q, m, n, k, columns, cell, y, stream)


def launch_activation_linear(
    x: Tensor,
    weight: Tensor,
    cell: LaunchCell,
    activation: int,
    gated: bool,
    residual: Tensor | None = None,
    after: int = 0,
) -> Tensor:
    """Two launches and two allocations. ``cell`` has read the weights. ``after``: an activation of the product."""
    shape = x.shape
    n, columns = cell.n, cell.columns
    k = shape[-1] // 2 if gated else shape[-1]
    y = x.new_empty((*shape[:-1], n))
    m = math.prod(shape[:-1])
    if m == 0:
        return y
    x, ldx = rows(x)
    work = weight.new_empty(m * (columns + 4))
    q, start = work.data_ptr(), x.data_ptr()
    stream = current_stream(cell.device)
    extension().activation_quantize(
        start, ldx, DTYPES[x.dtype], start + k * x.element_size() if gated else 0, ldx, q, columns, q + m * columns,
        False, m, k, activation, stream,
    )  # fmt: skip
    if residual is None:
        return _product(q, m, n, k, columns, cell, y, stream, (after,))
    residual, ldr = rows(residual)
    return _product(q, m, n, k, columns, cell, y, stream, (after, residual.data_ptr(), ldr, DTYPES[residual.dtype]))


def _product(
    q: int,
    m: int,
    n: int,
    k: int,
    columns: int,
    cell: LaunchCell,
    y: Tensor,
    stream: int,
    options: tuple[int, ...] = (),
) -> Tensor:
    config = config_for(cell.device, m, n, k, y.dtype) if tuned else CHOOSE
    extension().gemm(
        q, columns, cell.weight_pointer, columns, q + m * columns, cell.scale_pointer, cell.bias_pointer,
        0 if cell.bias_dtype is None else DTYPES[cell.bias_dtype], y.data_ptr(), n, DTYPES[y.dtype], m, n, k, config,
        stream, True, *options,
    )  # fmt: skip
    return y


def _is_vector(t: Tensor | None, k: int, device: int) -> bool:
    return t is None or (t.dtype in FLOATS and is_vector(t, k, device))


def _is_like(t: Tensor | None, x: Tensor) -> bool:
    return t is None or (t.dtype is x.dtype and t.shape == x.shape and t.get_device() == x.get_device())


def _is_row_of(t: Tensor, x: Tensor, n: int) -> bool:
    return t.dtype in FLOATS and t.shape[-1:] == (n,) and t.shape[:-1] == x.shape[:-1]


def _read(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> tuple[LaunchCell, tuple[Any, ...]]:
    """A cell of these tensors, or of copies that the kernels can take; the caller keeps them alive until the launch."""
    if not (weight.is_contiguous() and weight.data_ptr() % ROW_ALIGNMENT == 0):
        weight = weight.clone(memory_format=torch.contiguous_format)
    held = (weight, weight_scale.contiguous(), contiguous(bias))
    cell = LaunchCell()
    cell.read(*held)
    return cell, held


@on_device
def _norm_cuda(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _refuse_gradients(x, weight_scale, bias, norm_weight, norm_bias, residual)
    held: tuple[Any, ...] = (weight, weight_scale, bias)
    k = x.shape[-1] if x.dim() else 0
    cell = cell_for(x, k, weight, weight_scale, bias)
    if not (
        cell is not None
        and kind in NORMS
        and (norm_bias is None or kind == "layer")
        and _is_vector(norm_weight, k, cell.device)
        and _is_vector(norm_bias, k, cell.device)
        and _is_like(residual, x)
    ):
        _check_norm_linear(x, weight, weight_scale, bias, norm_weight, norm_bias, kind, residual)
        cell, held = _read(weight, weight_scale, bias)
        norm_weight, norm_bias = contiguous(norm_weight), contiguous(norm_bias)
    h = x.new_empty((0,) if residual is None else x.shape)
    sums = None if residual is None else h
    y = launch_norm_linear(x, held[0], cell, norm_weight, norm_bias, NORMS[kind], eps, offset, residual, sums)
    return y, h


@on_device
def _activation_cuda(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    _refuse_gradients(x, weight_scale, bias, residual)
    held: tuple[Any, ...] = (weight, weight_scale, bias)
    k = x.shape[-1] if x.dim() else 0
    cell = cell_for(x, k // 2 if gated else k, weight, weight_scale, bias)
    if not (
        cell is not None
        and not (gated and k % 2)
        and activation in ACTIVATIONS
        and (residual is None or (_is_row_of(residual, x, cell.n) and residual.get_device() == cell.device))
    ):
        _check_activation_linear(x, weight, weight_scale, bias, activation, gated, residual)
        cell, held = _read(weight, weight_scale, bias)
    return launch_activation_linear(x, held[0], cell, ACTIVATIONS[activation], gated, residual)


# ---- CPU -----------------------------------------------------------------------------------------------------------


def _norm_cpu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _refuse_gradients(x, weight_scale, bias, norm_weight, norm_bias, residual)
    _check_norm_linear(x, weight, weight_scale, bias, norm_weight, norm_bias, kind, residual)
    n, columns = weight.shape
    y, h = x.new_empty((*x.shape[:-1], n)), x.new_empty((0,) if residual is None else x.shape)
    if y.numel():
        k = x.shape[-1]
        m = y.numel() // n
        x, ldx = rows(x)
        residual, ldr = (None, k) if residual is None else rows(residual)
        norm_weight, norm_bias = contiguous(norm_weight), contiguous(norm_bias)
        q, scale = weight.new_empty((m, columns)), weight_scale.new_empty(m)
        _cpu._C.cpu_norm_quantize(
            x.data_ptr(), ldx, DTYPES[x.dtype], pointer(residual), ldr, pointer(norm_weight), dtype_code(norm_weight),
            pointer(norm_bias), dtype_code(norm_bias), 0 if residual is None else h.data_ptr(), k, 0, k, q.data_ptr(),
            columns, scale.data_ptr(), False, m, k, eps, offset, NORMS[kind], _cpu._threads(m * k),
        )  # fmt: skip
        _cpu._scaled_matmul(q, weight, scale, weight_scale, bias, y)
    return y, h


def _activation_cpu(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    _refuse_gradients(x, weight_scale, bias, residual)
    _check_activation_linear(x, weight, weight_scale, bias, activation, gated, residual)
    h = _activated(x, activation, gated)
    if residual is None:
        return _cpu.linear_unchecked(h, weight, weight_scale, bias, x.dtype)
    return _cpu.linear(h, weight, weight_scale, bias, residual=residual)


def _activated(x: Tensor, activation: str, gated: bool) -> Tensor:
    """``activation(x)``, or of the first half of its columns times the second, in x's dtype."""
    gate, up = x.chunk(2, -1) if gated else (x, None)
    # Contiguous: as in _fused._activation_cpu.
    y = _cpu.TORCH_ACTIVATIONS[activation](gate.float().contiguous()).to(x.dtype)
    return y if up is None else y * up


_lib.impl("norm_linear", _norm_cuda, "CUDA")
_lib.impl("norm_linear", _norm_cpu, "CPU")
_lib.impl("activation_linear", _activation_cuda, "CUDA")
_lib.impl("activation_linear", _activation_cpu, "CPU")


@dataclass
class _Way:
    """One device's implementations (or the fakes) of what the operators of inference are made of."""

    norm_linear: Any
    activation_linear: Any
    norm_quantize: Any
    weight_only: Any

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm: int,
        eps: float,
        offset: float,
        weight_only: bool,
    ) -> Tensor:
        """The bits of ``norm_linear`` without a residual; or of the norm, then ``weight_only_linear``."""
        given = (norm_weight, norm_bias, _KINDS[norm], eps, offset)
        return self._first(x, None, weight, weight_scale, bias, given, weight_only)[0]

    def mlp(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm: int,
        eps: float,
        offset: float,
        weight_only: bool,
        activation: int,
        gated: bool,
        last_weight: Tensor,
        last_scale: Tensor,
        last_bias: Tensor | None,
        last_weight_only: bool,
    ) -> Tensor:
        """The same with a residual, then ``activation_linear`` (or W8A16) with the sum as its residual."""
        given = (norm_weight, norm_bias, _KINDS[norm], eps, offset)
        y, h = self._first(x, residual, weight, weight_scale, bias, given, weight_only)
        last, name = (last_weight, last_scale, last_bias), _ACTIVATIONS[activation]
        if last_weight_only:
            return self.weight_only(_activated(y, name, gated), *last, residual=h)
        return self.activation_linear(y, *last, name, gated, h)

    def _first(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        norm: tuple[Tensor | None, Tensor | None, str, float, float],
        weight_only: bool,
    ) -> tuple[Tensor, Tensor]:
        if not weight_only:
            return self.norm_linear(x, weight, weight_scale, bias, *norm, residual)
        norm_weight, norm_bias, *rest = norm
        _, _, h, y = self.norm_quantize(x, norm_weight, norm_bias, residual, None, *rest, True)
        return self.weight_only(y, weight, weight_scale, bias), h


def _bare(call: Any) -> Any:
    """Without the switch to x's device, which the operator does once."""
    return call.__wrapped__


def _activation(call: Any) -> Any:
    """``activation_linear_no_grad`` of the public operator's implementation: the activation comes as a number."""

    def linear(
        x: Tensor,
        activation: int,
        gated: bool,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Any:
        return call(x, weight, weight_scale, bias, _ACTIVATIONS[activation], gated, residual)

    return linear


_ways = (
    _Way(_norm_fake, _activation_fake, _fused._norm_fake, _weight_only._fake),
    _Way(_norm_cpu, _activation_cpu, _fused._norm, _weight_only._cpu),
    _Way(_bare(_norm_cuda), _bare(_activation_cuda), _fused._norm, _bare(_weight_only._cuda)),
)
implement("norm_linear_no_grad", *(way.linear for way in _ways))
implement("norm_mlp_no_grad", *(way.mlp for way in _ways))
implement("activation_linear_no_grad", *(_activation(way.activation_linear) for way in _ways))

# torch's own kernel for a missing gradient is one in Python, 7 µs of every call, and speaks in the backward pass only.
_lib.impl("norm_linear", fallthrough_kernel, "Autograd")
_lib.impl("activation_linear", fallthrough_kernel, "Autograd")


# ---- the modules' calls --------------------------------------------------------------------------------------------


def is_direct(x: Tensor, cell: LaunchCell) -> bool:
    """Whether a launch may go around the dispatcher, as in ``ops.eager_linear``: a plain CUDA tensor, nobody watching.

    The caller has made sure that no gradient is recorded and that ``cell`` is up to date.
    """
    return (
        type(x) is Tensor
        and x.is_cuda
        and dispatch_modes() == 0
        and not profiling()
        and x.get_device() == cell.device
        and (ops._is_only_gpu() or cell.device == current_device())
    )
