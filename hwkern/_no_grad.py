"""The operators of inference: what a layer is in one call, alone, with the norm or activation before it, or with the
whole MLP; and a lookup.

They have no gradient, and whoever calls them has made sure that none is recorded. A decoding step without a CUDA graph
spends its time on the host, so on CUDA they are C++ kernels of torch's dispatcher (csrc/bindings/torch_ops.cpp), which
look torch's stable C functions up at run time. Torch before 2.10 lacks some of those: there they are Python, and only
compiled models, which cannot go around the dispatcher, call them. The bits are those of the public operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, fallthrough_kernel, register_fake

from hwkern import _native
from hwkern._choice import tuned
from hwkern._cuda import on_device

_lib = Library("hwkern", "FRAGMENT")
for _schema in (
    "linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, bool weight_only) -> Tensor",
    "norm_linear_no_grad(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, int norm, float eps, float offset, bool weight_only) -> Tensor",
    "norm_mlp_no_grad(Tensor x, Tensor residual, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? norm_weight, Tensor? norm_bias, int norm, float eps, float offset, bool weight_only, int activation, "
    "bool gated, Tensor last_weight, Tensor last_scale, Tensor? last_bias, bool last_weight_only) -> Tensor",
    "activation_linear_no_grad(Tensor x, int activation, bool gated, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, Tensor? residual) -> Tensor",
    "embedding_no_grad(Tensor indices, int dim, Tensor weight, Tensor weight_scale, int dtype) -> Tensor",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# Bound once: `torch.ops.hwkern.x` costs an eager call three look-ups, and a compiled one as many guards.
linear_no_grad: Any = torch.ops.hwkern.linear_no_grad.default
norm_linear_no_grad: Any = torch.ops.hwkern.norm_linear_no_grad.default
norm_mlp_no_grad: Any = torch.ops.hwkern.norm_mlp_no_grad.default
activation_linear_no_grad: Any = torch.ops.hwkern.activation_linear_no_grad.default
embedding_no_grad: Any = torch.ops.hwkern.embedding_no_grad.default


def _register_in_cpp() -> bool:
    folder = Path(torch.__file__).parent / "lib"
    try:
        native = _native.extension()
    except ImportError:  # using hwkern says why, importing it does not
        return False
    return bool(
        native.built_with_cuda
        and hasattr(native, "register_torch_ops")  # a checkout whose module was built before it
        and native.register_torch_ops(str(folder / "libtorch_cpu.so"), str(folder / "libtorch_cuda.so"))
    )


IN_CPP = _register_in_cpp()


def preferred() -> bool:
    """Whether these are the fastest way to what the caller may compute without a gradient."""
    return not tuned and (IN_CPP or is_compiling())  # C++ knows nothing of hwkern.tune's choices


def _without_grad(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(call)
    def guarded(*args: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("This operator of hwkern has no gradient: call it under torch.no_grad().")
        return call(*args)

    return guarded


def implement(name: str, fake: Callable[..., Tensor], cpu: Callable[..., Tensor], cuda: Callable[..., Tensor]) -> None:
    """Register all of one operator. ``cuda``: where it is not in C++; runs with x's device current."""
    register_fake(f"hwkern::{name}", fake)
    _lib.impl(name, _without_grad(cpu), "CPU")
    if not IN_CPP:
        _lib.impl(name, on_device(_without_grad(cuda)), "CUDA")
    _lib.impl(name, fallthrough_kernel, "Autograd")  # torch's own, for the missing gradient, is in Python: 7 µs a call
