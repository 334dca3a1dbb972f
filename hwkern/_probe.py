"""The check that a fusion must pass before it stays: each module, then the block, fused and unfused on random rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hwkern.nn.merged import Merged

#: A probe has two sequences of eight tokens, or more where the layers would leave so few in float.
_TOKENS = 8
#: The fused and the unfused block quantize values that are equal but for float32 rounding, so almost every int8 is the
#: same. Were each one step off, the relative error would be (max / 127) / rms of a row, 1/32 for a normal row of 4096
#: (its largest value is four times its rms). What the unfused block computes in several operations it rounds to its
#: dtype after each, up to eight for an activation (GPT-2's), which the fused kernel does once: eight units of the dtype
#: come on top. Another formula or another structure is off by about 1.
_TOLERANCE, _ROUNDINGS = 1 / 32, 8


class Fused(Protocol):
    """What a check needs of a fusion."""

    def parts(self) -> tuple[Merged, ...]:
        """The products that it computes."""

    def problem(self, module: nn.Module, x: Tensor) -> str:
        """What is wrong with the fused ``module`` on ``x``; empty when nothing is."""


def check(block: nn.Module, fused: Sequence[tuple[nn.Module, Fused]]) -> str:
    """Run each fused module and then the block, fused and unfused, on random rows. What is wrong, or nothing."""
    parts = list({id(part): part for _, fusion in fused for part in fusion.parts()}.values())
    if any(part.weight is None for part in parts):
        return "its tensors are not on one device"
    training = [module for module in block.modules() if module.training]
    try:
        for part in parts:
            part.everywhere = True  # what is fused on the GPU is checked on the CPU
        for module in training:
            module.training = False
        for module, fusion in fused:
            if module is not block and (problem := fusion.problem(module, _rows(module, fusion))):
                return f"{type(module).__name__}: {problem}"
        return _block_problem(block, parts)
    except Exception as error:  # a model's own code: there is no telling what it raises
        return f"it raised {type(error).__name__}: {error}"
    finally:
        for part in parts:
            del part.everywhere
        for module in training:
            module.training = True


def _rows(module: nn.Module, fusion: Fused) -> Tensor:
    """Normal values for the module's input, in the dtype that it computes in."""
    weight = module._parameters.get("weight")
    parts = fusion.parts()
    return _normal(parts, parts[0].members[0].float_dtype if weight is None else weight.dtype)


def _normal(parts: Sequence[Merged], dtype: torch.dtype) -> Tensor:
    """``[2, tokens, K]`` normal values for the first part, the same in every call."""
    first = parts[0]
    thresholds = [getattr(member, "max_tokens", None) or 0 for part in parts for member in part.members]
    tokens = max(_TOKENS, max(thresholds) // 2 + 1)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, tokens, first.k, generator=generator, device="cpu")
    return x.to(first.members[0].weight.device, dtype)


def _block_problem(block: nn.Module, parts: Sequence[Merged]) -> str:
    first = parts[0]
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), first.members[0].float_dtype)
    x = _normal(parts, dtype)
    call = _block_call(block, x, parts)
    if call is None:
        return "it could not be run on its own"
    fused, want = both_ways(call, parts)
    if type(fused) is not type(want):  # some versions return a tuple
        return f"it gives a {type(fused).__name__}, not a {type(want).__name__}"
    fused, want = (out if isinstance(out, Tensor) else out[0] for out in (fused, want))
    return distance_problem(fused, want, want - x)


def _block_call(block: Any, x: Tensor, parts: Sequence[Merged]) -> Callable[[], Any] | None:
    """How to call the block as its model does: on hidden states, for some with cosines and sines besides."""
    attention = getattr(block, "self_attn", None)
    head = getattr(attention, "rotary_ndims", getattr(attention, "head_dim", None))
    positions = torch.arange(x.shape[1], device=x.device)  # which some versions ask for
    calls: list[dict[str, Any]] = [{"attention_mask": None}, {}, {"cache_position": positions}]
    if isinstance(head, int):
        angle = torch.linspace(0, 3, x.shape[1] * (head // 2), device=x.device).view(1, x.shape[1], -1)
        angle = torch.cat([angle, angle], -1)
        rotations = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        calls.insert(0, {"attention_mask": None, "position_embeddings": rotations})
    for kwargs in calls:

        def call(kwargs: dict[str, Any] = kwargs) -> Any:
            return block(x, **kwargs)

        try:
            with _disabled(parts):
                call()
        except Exception:  # another signature: there is no telling what it raises
            continue
        return call
    return None


def product_problem(merged: Merged, product: Tensor, x: Tensor) -> str:
    """Whether each member's columns of ``product`` are what it gives for ``x``, to the last bit."""
    for member in merged.members:
        mine, want = member(product), member(x)
        if merged.in_float(x):  # W8A16 adds in an order that depends on the config, and so on N
            if problem := distance_problem(mine, want, want):
                return problem
        elif not torch.equal(mine, want):
            return "the merged product has other bits than its parts"
    return ""


class _disabled:  # noqa: N801  # a context manager
    def __init__(self, parts: Sequence[Merged]) -> None:
        self._parts = parts

    def __enter__(self) -> None:
        for part in self._parts:
            part.enabled = False

    def __exit__(self, *error: object) -> None:
        for part in self._parts:
            part.enabled = True


def both_ways(call: Callable[[], Any], parts: Sequence[Merged]) -> tuple[Any, Any]:
    """The result with and without fusion."""
    with _disabled(parts):
        want = call()
    return call(), want


def distance_problem(found: Tensor, want: Tensor, signal: Tensor) -> str:
    """Whether ``found`` is further from ``want`` than rounding explains, relative to ``signal``; in words."""
    if found.shape != want.shape or found.dtype != want.dtype:
        return f"it gives {tuple(found.shape)} {found.dtype}, not {tuple(want.shape)} {want.dtype}"
    error = float((found.double() - want.double()).norm() / signal.double().norm().clamp_min(1e-30))
    allowed = _TOLERANCE + _ROUNDINGS * torch.finfo(want.dtype).eps
    return "" if error <= allowed else f"it differs by {error:.2g} from the unfused one"
