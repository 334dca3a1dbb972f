"""Several int8 layers that read the same tensor, as one product: weights one below the other in one memory.

The members keep their names, Parameters and buffers, which become views, so that nothing is stored twice and
state_dict, ``to`` and loading go on as before. Whoever has computed the product of all of them passes it where the
tensor would have gone, and each member returns its own columns of it: no state between the calls, so that threads,
exceptions, CUDA graphs and torch.compile need no care.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from hwkern import _fused_linear, ops
from hwkern._no_grad import activation_linear_no_grad, norm_linear_no_grad, norm_mlp_no_grad, preferred
from hwkern._tracing import exporting, functorch_level, tracing_state
from hwkern.nn.linear import Int8Linear
from hwkern.nn.weight_only import WeightOnlyInt8Linear, takes, weight_only

_LOCK = threading.Lock()


class Held(nn.Module):
    """What a module holds beside its children: never registered as one, with all of its own attributes in ``__dict__``.

    A module only in torch.compile's eyes, whose guards pass over a module without looking as long as nothing was set in
    it; an object of any other class is looked through attribute by attribute at every call, and so is all above it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Edge(Held):
    """``parent.attribute`` is ``child``."""

    def __init__(self, parent: nn.Module, attribute: str, child: nn.Module) -> None:
        super().__init__()
        self.parent, self.attribute, self.child = parent, attribute, child


class Merged(Held):
    """One or more int8 layers with the same inputs, computed as one.

    Attributes:
        n, k: outputs of all together, and inputs.
        few: up to so many tokens the layers leave x in float (W8A16); -1 for W8A8.
        weight, scale, bias: ``[n, K16]`` int8, ``[n]`` float32, ``[n]`` or None. Frozen Parameters, because
            torch.compile takes the addresses of those as constant; ``weight`` is None until :meth:`merge`.
        passes: whether the product is passed to the members, which then return their columns of it.
        enabled: whether the members may be computed together; a probe turns it off to compare.
        everywhere: whether that goes for the CPU too, where nothing is gained: four layers of BERT's size on one
            thread take as long for 64 tokens and more (40 ms), and a tenth longer for one; a probe turns it on.
    """

    everywhere = False

    def __init__(self, edges: Sequence[Edge], passes: bool = True, quantized: bool = False) -> None:
        """``edges``: to each module that the tensor goes through, the layers among them."""
        super().__init__()
        members = [edge.child for edge in edges if isinstance(edge.child, Int8Linear)]
        self.members = tuple(members)
        self.passes = passes
        self.edges = dict(enumerate(edges))
        self.k = members[0].in_features
        self.n = sum(member.out_features for member in members)
        self.few = few_tokens(members, quantized)
        self.enabled = True
        self.weight: nn.Parameter | None = None
        self.scale: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.cell = ops.LaunchCell()
        self._addresses: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Without the tensors: a copy's members have memory of their own until they are merged at the first call."""
        return {**self.__dict__, "weight": None, "scale": None, "bias": None, "_addresses": ()}

    def adopt(self) -> None:
        """Let the members know, so that they take their columns and report when their tensors move."""
        stop = 0
        for member in self.members:
            start, stop = stop, stop + member.out_features
            member.__dict__["_part"] = Part(self, start, stop)

    def release(self) -> None:
        """The members are on their own again."""
        for member in self.members:
            member.__dict__.pop("_part", None)

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        found = []
        for member in self.members:
            parameters = member._parameters
            found += [parameters["weight"], member._buffers["weight_scale"]]
            if parameters["bias"] is not None:
                found.append(parameters["bias"])
        return found  # type: ignore[return-value]  # a weight and a scale are always there

    def packed(self) -> bool:
        """Whether each member has an int8 weight, scales and maybe a bias of its size: not once a weight was taken away
        (``layer.weight = None``) or a float one assigned. The member's own forward says so then.
        """
        return all(
            (weight := member.weight) is not None
            and (scale := member.weight_scale) is not None
            and (weight.dtype, tuple(weight.shape)) == (torch.int8, (n := member.out_features, ops.padded(self.k)))
            and (scale.dtype, tuple(scale.shape)) == (torch.float32, (n,))
            and (member.bias is None or tuple(member.bias.shape) == (n,))
            for member in self.members
        )

    def fresh(self) -> bool:
        """Whether the members' tensors, which are packed, are where :meth:`merge` put them."""
        return self.weight is not None and self._addresses == tuple([t.data_ptr() for t in self._tensors()])

    def merge(self) -> bool:
        """Move the members' tensors into one memory. False, and nothing changed, where they do not fit together."""
        biases = [member.bias for member in self.members]
        tensors = self._tensors() if self.packed() else []
        together = (
            bool(tensors)
            and (device := tensors[0].device).type != "meta"
            and all(t.device == device and t.is_contiguous() for t in tensors)
            and len({bias.dtype for bias in biases if bias is not None}) <= 1
        )
        if not together:
            self.weight = self.scale = self.bias = None
            return False
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            if self.fresh():  # another thread was faster
                return True
            if len(self.members) == 1:
                self.weight, self.bias = self.members[0].weight, biases[0]
                self.scale = nn.Parameter(self.members[0].weight_scale, requires_grad=False)
            else:
                self.weight = _join([member.weight for member in self.members])
                self.scale = _join([member.weight_scale for member in self.members])
                self.bias = _join_biases(self.members)
            self._addresses = tuple([t.data_ptr() for t in self._tensors()])
            # The bias of the product needs no gradient: `usable` is False where one is recorded.
            if self.weight.is_cuda:
                self.cell.read(self.weight, self.scale, self.bias)
        return True

    # ---- calls -----------------------------------------------------------------------------------------------------

    def usable(self, x: Tensor) -> bool:
        """Whether the product of all members may stand for theirs in this call.

        Not on the CPU, not where a gradient is recorded, under autocast, while exporting or tracing, when a member was
        replaced (LoRA) or has hooks, which must see its own input.
        """
        if not (x.is_cuda or self.everywhere) or not self.enabled:
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        if is_compiling():
            return self.weight is not None and not exporting() and self._intact()
        return (
            tracing_state() is None
            and functorch_level() is None
            and x.dtype in ops.FLOATS
            and self._intact()
            and (self.fresh() or self.merge())
        )

    def _intact(self) -> bool:
        for edge in self.edges.values():
            if edge.parent._modules.get(edge.attribute) is not edge.child or has_hooks(edge.child):
                return False
        return True

    def in_float(self, x: Tensor) -> bool:
        """Whether the layers leave this many tokens in float."""
        return self.few >= 0 and math.prod(x.shape[:-1]) <= self.few

    def in_one(self, x: Tensor) -> bool:
        """Whether the operators of inference, which compute a layer with its neighbours, take this many tokens."""
        return preferred() and (not self.in_float(x) or takes(x, x.dtype))

    def linear(self, x: Tensor) -> Tensor:
        """``x [..., K]`` -> ``[..., n]``, every member's outputs side by side."""
        weight, scale, bias = self._read()
        if self.in_float(x):
            return weight_only(x, weight, scale, bias, self.k, self.cell)
        return ops.eager_linear(x, weight, scale, bias, self.k, self.cell)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """``activation(linear(x))``, in the product's epilogue: rounded once. W8A8 alone."""
        weight, scale, bias = self._read()
        if not is_compiling() and _fused_linear.is_direct(x, self.cell):
            none, after = ops.ACTIVATIONS["none"], ops.ACTIVATIONS[activation]
            return _fused_linear.launch_activation_linear(x, weight, self.cell, none, gated=False, after=after)
        return ops.int8_linear(x, weight, scale, bias, activation=activation)

    def after_norm(
        self, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, kind: str, eps: float, offset: float
    ) -> Tensor:
        """``linear(norm(x))``; the norm as in ``ops.norm_quantize``."""
        weight, scale, bias = self._read()
        code, in_float = ops.NORMS[kind], self.in_float(x)
        if self.in_one(x):
            return norm_linear_no_grad(x, weight, scale, bias, norm_weight, norm_bias, code, eps, offset, in_float)
        if in_float:
            y: Any = ops.norm_quantize(x, norm_weight, norm_bias, None, None, kind, eps, offset, True).y
            return weight_only(y, weight, scale, bias, self.k, self.cell)
        if not is_compiling() and _fused_linear.is_direct(x, self.cell):
            return _fused_linear.launch_norm_linear(x, weight, self.cell, norm_weight, norm_bias, code, eps, offset)
        return _fused_linear.norm_linear(x, weight, scale, bias, norm_weight, norm_bias, kind, eps, offset)[0]

    def after_sum(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        kind: str,
        eps: float,
        offset: float,
    ) -> tuple[Tensor, Tensor]:
        """``linear(norm(h))`` and ``h = x + residual``. W8A8 alone."""
        weight, scale, bias = self._read()
        if not is_compiling() and _fused_linear.is_direct(x, self.cell):
            code, h = ops.NORMS[kind], x.new_empty(x.shape)
            y = _fused_linear.launch_norm_linear(
                x, weight, self.cell, norm_weight, norm_bias, code, eps, offset, residual, h
            )
            return y, h
        return _fused_linear.norm_linear(x, weight, scale, bias, norm_weight, norm_bias, kind, eps, offset, residual)

    def then(
        self,
        last: Merged,
        x: Tensor,
        residual: Tensor,
        norm: tuple[Tensor | None, Tensor | None, str, float, float],
        activation: str,
        gated: bool,
    ) -> Tensor:
        """``h + last(activation(linear(norm(h))))`` of ``h = x + residual``: few tokens that both take `in_one`.

        One operator: each has a dispatcher's way to go, which is what a decoding step spends its time on.
        """
        weight, scale, bias = self._read()
        norm_weight, norm_bias, kind, eps, offset = norm
        return norm_mlp_no_grad(
            x, residual, weight, scale, bias, norm_weight, norm_bias, ops.NORMS[kind], eps, offset,
            self.in_float(x), ops.ACTIVATIONS[activation], gated, *last._read(), last.in_float(x),
        )  # fmt: skip

    def after_activation(self, x: Tensor, activation: str, gated: bool, residual: Tensor | None = None) -> Tensor:
        """``linear(activation(x)) + residual``, or of ``activation(x[..., :K]) * x[..., K:]``. W8A8 alone."""
        weight, scale, bias = self._read()
        code = ops.ACTIVATIONS[activation]
        if preferred():
            return activation_linear_no_grad(x, code, gated, weight, scale, bias, residual)
        if not is_compiling() and _fused_linear.is_direct(x, self.cell):
            return _fused_linear.launch_activation_linear(x, weight, self.cell, code, gated, residual)
        return _fused_linear.activation_linear(x, weight, scale, bias, activation, gated, residual)

    def _read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight, self.scale, self.bias  # type: ignore[return-value]  # `usable` was asked first


class Part(Held):
    """Which columns of a :class:`Merged` are a member's; ``n`` is the width by which it knows the product."""

    def __init__(self, merged: Merged, start: int, stop: int) -> None:
        super().__init__()
        self.merged, self.start, self.stop = merged, start, stop
        self.n = merged.n if merged.passes else -1

    def moved(self) -> None:
        """A member's tensors were replaced: merge them anew, once all of them are in their new place."""
        merged = self.merged
        if not (merged.packed() and merged.fresh()):
            merged.merge()


def _join(tensors: Sequence[Tensor]) -> nn.Parameter:
    """One tensor that holds all of these, which become views of it. The Tensor objects stay who they are."""
    whole = torch.cat([t.detach() for t in tensors])
    start = 0
    for t in tensors:
        t.data = whole[start : start + t.shape[0]]
        start += t.shape[0]
    return nn.Parameter(whole, requires_grad=False)


def _join_biases(members: Sequence[Int8Linear]) -> nn.Parameter | None:
    """As :func:`_join`; a member without a bias gets -0.0, which changes no sum."""
    first = next((member.bias for member in members if member.bias is not None), None)
    if first is None:
        return None
    return _join([first.new_full((m.out_features,), -0.0) if m.bias is None else m.bias for m in members])


def few_tokens(members: Sequence[Int8Linear], quantized: bool) -> int:
    """:attr:`Merged.few` of these members. Of layers with thresholds of their own, the largest layer's counts.

    ``quantized``: the kernel before the product quantizes anyway, so that W8A8 is the faster way for few tokens too
    (one token through 8 layers of Llama-3-8B's width on an H100: 1.39 ms, with W8A16 1.51 ms). Layers with a threshold
    take both ways, so W8A8 is within their bound; a layer that is W8A16 throughout stays so.
    """
    largest = max(members, key=lambda member: member.out_features)
    if not isinstance(largest, WeightOnlyInt8Linear):
        return -1
    if largest.max_tokens is None:
        return 2**62
    return -1 if quantized else largest.max_tokens


def go_together(members: Sequence[Int8Linear]) -> bool:
    """Whether layers of these schemes may be computed as one: W8A8 with or without a threshold, or W8A16 all."""
    only = {isinstance(member, WeightOnlyInt8Linear) and member.max_tokens is None for member in members}
    return len(only) == 1


#: For more tokens than this a residual or an activation is a kernel of its own, not a part of the product's epilogue,
#: during which nothing multiplies. 8 layers of Llama-3-8B's width on an H100, two runs, 21.4 ms unfused in both: 8 ×
#: 512 tokens take 16.9 ms with the last residual in the epilogue and 15.7 ms with no residual fused at all; one token
#: with a cache of 640, as a CUDA graph, 1.36 and 1.39 ms.
EPILOGUE_TOKENS = 64


def is_few(x: Tensor) -> bool:
    """Whether ``x [..., K]`` has so few tokens that the epilogue is the place for what follows the product."""
    return math.prod(x.shape[:-1]) <= EPILOGUE_TOKENS


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or replaces this module's calls.

    The hooks that transformers leaves in a model once it was asked for hidden states look at outputs only.
    """
    # Not from __dict__, where torch.compile would put guards on the dicts; on empty hooks it puts none.
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" in module.__dict__:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(_module_of(hook) != "transformers.utils.output_capturing" for hook in hooks.values())


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", "") or ""
