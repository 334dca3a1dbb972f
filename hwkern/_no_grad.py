"""The operators of compiled inference: what a layer, a norm with its layers, or a norm with its MLP are in one call.

They have no gradient and look at nothing twice, because torch.compile has checked what it traced. A compiled decoding
step without a CUDA graph spends its time on the host, so on CUDA they are C++ kernels of torch's dispatcher
(csrc/bindings/torch_ops.cpp), which look torch's stable C functions up at run time; torch before 2.10 lacks some of
those and takes the Python below. The bits are those of the public operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from hwkern import _cpu, _fused_linear, _native, _weight_only, ops
from hwkern._checks import ACTIVATIONS
from hwkern._cuda import on_device
from hwkern._fused import NORMS

_KINDS = {code: kind for kind, code in NORMS.items()}
_ACTIVATIONS = {code: activation for activation, code in ACTIVATIONS.items()}

_lib = Library("hwkern", "FRAGMENT")
for _schema in (
    "linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, bool weight_only) -> Tensor",
    "norm_linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, int norm, float eps, float offset) -> Tensor",
    "norm_mlp_no_grad(Tensor x, Tensor residual, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? norm_weight, Tensor? norm_bias, int norm, float eps, float offset, int activation, bool gated, "
    "Tensor last_weight, Tensor last_scale, Tensor? last_bias) -> Tensor",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _without_grad(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(call)
    def guarded(*args: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("This operator of hwkern has no gradient: call it under torch.no_grad().")
        return call(*args)

    return guarded


def _linear(int8: Callable[..., Tensor], weight_only: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The bits of ``int8_linear`` or ``weight_only_linear``, in x's dtype."""

    def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, only: bool) -> Tensor:
        return (weight_only if only else int8)(x, weight, weight_scale, bias)

    return linear


def _norm_linear(norm_linear: Any) -> Callable[..., Tensor]:
    """The bits of ``norm_linear`` without a residual."""

    def linear(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm: int,
        eps: float,
        offset: float,
    ) -> Tensor:
        y, _ = norm_linear(x, weight, weight_scale, bias, norm_weight, norm_bias, _KINDS[norm], eps, offset)
        return y

    return linear


def _norm_mlp(norm_linear: Any, activation_linear: Any) -> Callable[..., Tensor]:
    """``norm_linear`` with a residual, then ``activation_linear`` with the sum as its residual."""

    def mlp(
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
        activation: int,
        gated: bool,
        last_weight: Tensor,
        last_scale: Tensor,
        last_bias: Tensor | None,
    ) -> Tensor:
        kind = _KINDS[norm]
        y, h = norm_linear(x, weight, weight_scale, bias, norm_weight, norm_bias, kind, eps, offset, residual)
        return activation_linear(y, last_weight, last_scale, last_bias, _ACTIVATIONS[activation], gated, h)

    return mlp


def _implement(key: str, wrap: Any, linear: Any, weight_only: Any, norm_linear: Any, activation_linear: Any) -> None:
    for name, call in (
        ("linear_no_grad", _linear(linear, weight_only)),
        ("norm_linear_no_grad", _norm_linear(norm_linear)),
        ("norm_mlp_no_grad", _norm_mlp(norm_linear, activation_linear)),
    ):
        _lib.impl(name, wrap(_without_grad(call)), key)


def _in_cpp() -> bool:
    """Whether the C++ kernels are there: a build with CUDA, and a torch with CUDA that has all they call."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        native = _native.extension()
    except ImportError:  # importing hwkern says nothing of that: using it does
        return False
    return native.built_with_cuda and native.register_torch_ops(
        str(folder / "libtorch_cpu.so"), str(folder / "libtorch_cuda.so")
    )


register_fake("hwkern::linear_no_grad", _linear(ops._linear_fake, _weight_only._fake))
register_fake("hwkern::norm_linear_no_grad", _norm_linear(_fused_linear._norm_fake))
register_fake("hwkern::norm_mlp_no_grad", _norm_mlp(_fused_linear._norm_fake, _fused_linear._activation_fake))
_implement(
    "CPU", lambda f: f, _cpu.linear, _weight_only._cpu, _fused_linear._norm_cpu, _fused_linear._activation_cpu
)
if not _in_cpp():
    _python: Any = (ops._linear_cuda, _weight_only._cuda, _fused_linear._norm_cuda, _fused_linear._activation_cuda)
    _implement("CUDA", on_device, *(call.__wrapped__ for call in _python))  # the device is made current once
for _name in ("linear_no_grad", "norm_linear_no_grad", "norm_mlp_no_grad"):
    _lib.impl(_name, fallthrough_kernel, "Autograd")  # torch's own, for the missing gradient, is in Python: 7 µs a call
