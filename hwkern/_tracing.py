"""Who sees a call: torch.compile for inference, an export, a tracer, a profiler."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

# What must see an operator go through the dispatcher: a dispatch mode, a functorch transform, a tracer, a profiler.
# Bound once: these run on every call of every layer.
dispatch_modes = torch._C._len_torch_dispatch_stack
functorch_level = torch._C._functorch.peek_interpreter_stack
tracing_state = torch._C._get_tracing_state
profiling = torch._C._autograd._profiler_enabled


def exporting() -> bool:
    """torch.export wants a graph over registered tensors, with the public operators.

    The flag is read and not ``torch.compiler.is_exporting()``, which dynamo takes for True in every compilation from
    torch 2.7 to 2.12 (before that there is neither).
    """
    return getattr(torch.compiler, "_is_exporting_flag", False) or not torch.compiler.is_dynamo_compiling()


def cast_dtype(x: Tensor) -> torch.dtype:
    """What autocast makes of ``x`` where it is on, else x's own dtype. (There is no autocast on the meta device.)"""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if not x.is_meta and torch.is_autocast_enabled(kind) else x.dtype


def compiles_inference(x: Tensor) -> bool:
    """Whether torch.compile traces a call in which no gradient is recorded and no dtype is cast."""
    return (
        is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type in ("cpu", "cuda")  # autocast knows no meta device
        and not torch.is_autocast_enabled(x.device.type)
        and not exporting()
    )
