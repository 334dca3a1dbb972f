"""What every CUDA implementation needs: the current stream, the tensor's device made current, the extension."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwkern import _native

# Private since torch 1.x and the same in 2.4 … 2.13; the public spellings cost 5 µs a call. Absent from CPU builds.
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


def on_device(call: Callable[..., Any]) -> Callable[..., Any]:
    """Run a CUDA implementation with its first tensor's device current, as the CUDA runtime demands for a launch."""

    @functools.wraps(call)
    def guarded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        index = x.get_device()
        if index == current_device():
            return call(x, *args, **kwargs)
        with torch.cuda.device(index):
            return call(x, *args, **kwargs)

    return guarded


@functools.cache
def extension() -> Any:
    """The extension, once it is known that its kernels can run."""
    problem = _native.cuda_problem()
    if problem is not None:
        raise RuntimeError(f"hwkern cannot run on CUDA tensors: {problem}")
    return _native.extension()
