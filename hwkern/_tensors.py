"""What a native call needs of a tensor: addresses, dtype codes, rows of unit stride, what is constant."""

from __future__ import annotations

import weakref

from torch import Tensor

from hwkern._checks import DTYPES


def pointer(t: Tensor | None) -> int:
    """The address of the first element; 0 for None, as hwkern.h has it."""
    return 0 if t is None else t.data_ptr()


def dtype_code(t: Tensor | None) -> int:
    """hwkern.h's DType; 0 for None, which nobody reads then."""
    return 0 if t is None else DTYPES[t.dtype]


def contiguous(t: Tensor | None) -> Tensor | None:
    """``t`` itself, or a contiguous copy."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` with rows of unit stride at one common distance, and that distance in elements (copied only if needed)."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x, x.stride(0)
    x = x.contiguous()
    return x, x.shape[-1]


_seen: dict[int, weakref.ref[Tensor]] = {}


def is_constant(t: Tensor) -> bool:
    """Whether this very tensor belonged to an earlier call.

    Then a kernel may read it before the preceding kernel on the stream has ended (hwkern.h, weight_is_constant). The
    first call must not: the kernel before it may be one of ours that writes the tensor and has let us start early.
    """
    key = id(t)
    known = _seen.get(key)
    if known is not None and known() is t:
        return True
    _seen[key] = weakref.ref(t, lambda _: _seen.pop(key, None))
    return False


def are_constant(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> bool:
    """:func:`is_constant` of all that a GEMM reads early."""
    known = is_constant(weight) & is_constant(weight_scale)
    return known if bias is None else known & is_constant(bias)
