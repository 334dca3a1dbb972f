"""Fusion: which neighbours in a model become one operator, and the forwards that do it.

A fused module keeps its identity, parameters, hooks and name; only its class becomes a subclass with another forward,
which asks at every call whether the fusion may be used and otherwise is the class's own forward:

- a norm computes its readers too (one kernel for norm and quantization, one product for q, k and v) and returns their
  outputs side by side; each reader takes its columns (``hwkern.nn.merged``),
- an attention without a norm of its own before it (BERT) computes q, k and v at its entrance,
- an MLP computes gate and up as one product, then activation, product and quantization in one kernel,
- a dense layer with its activation (BERT's intermediate) has it in the product's epilogue, for few tokens,
- a block (Llama's) hands its residual to the second norm's kernel and, for few tokens, to the last product's epilogue,
- a decoder tells its blocks when nothing but order masks their tokens, which then need no mask.

Which class is built so is a table (:mod:`hwkern._structures`), not a guess; and every block is run both ways on random
rows before it stays (:mod:`hwkern._probe`).
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from hwkern import ops
from hwkern._probe import both_ways, check, distance_problem, product_problem
from hwkern._structures import ACTIVATIONS, ATTENTIONS, BLOCKS, DECODERS, DENSE, MLPS, NORMS, RESIDUALS, Mlp
from hwkern._tracing import exporting, tracing_state
from hwkern.nn import Int8Conv1D, Int8Linear, WeightOnlyInt8Conv1D, WeightOnlyInt8Linear
from hwkern.nn.merged import Edge, Held, Merged, go_together, has_hooks, is_few

_MEMBERS = (Int8Linear, Int8Conv1D, WeightOnlyInt8Linear, WeightOnlyInt8Conv1D)


# ---- forwards ------------------------------------------------------------------------------------------------------


class _Fused:
    """What every fused class has: it pickles as its base class and the fusion beside."""

    _fusion: Any
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin, base = type(self).__bases__
        return _revive, (mixin, base), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _FusedNorm(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        f: NormFusion = self._fusion
        weight = cast(Any, self).weight
        module = cast(nn.Module, self)
        if f.readers.usable(x) and (weight is None or x.dtype == weight.dtype) and not has_hooks(module):
            return f.run(module, x)
        return super().forward(x)  # type: ignore[misc]


class _FusedAttention(_Fused):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        f: AttentionFusion = self._fusion
        if hidden_states.shape[-1] == f.readers.k and f.readers.usable(hidden_states):
            hidden_states = f.readers.linear(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


class _FusedMlp(_Fused):
    def forward(self, x: Tensor) -> Tensor:
        f: MlpFusion = self._fusion
        module = cast(nn.Module, self)
        if f.usable(module, x):
            if x.shape[-1] != f.inputs.n:  # the norm may have computed them already
                x = f.inputs.linear(x)
            x = f.output.after_activation(x, f.activation, f.gated)
            return module._modules[f.dropout](x) if f.dropout else x  # type: ignore[misc]
        return super().forward(x)  # type: ignore[misc]


class _FusedBlock(_Fused):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        f: BlockFusion = self._fusion
        modules = cast(Any, self)._modules
        if kwargs.pop(_CAUSAL, False):
            kwargs["attention_mask"] = None
        norm, mlp = modules[f.norm], modules[f.mlp]
        if args or not f.usable(norm, mlp, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x = modules[f.attention](hidden_states=modules[f.first](hidden_states), **kwargs)[0]
        last: MlpFusion = mlp._fusion
        if last.in_one(x):
            given = norm._fusion.arguments(norm)
            return last.inputs.then(last.output, x, hidden_states, given, last.activation, last.gated)
        product, h = norm._fusion.run_sum(norm, x, hidden_states)
        if is_few(h):
            return last.output.after_activation(product, last.activation, last.gated, h)
        return h + last.output.after_activation(product, last.activation, last.gated)


#: The keyword by which a decoder tells its blocks that token i of each row sees tokens 0 … i.
_CAUSAL = "hwkern_causal"
#: What transformers hands to the blocks then: four dimensions, so it makes nothing of it and looks at no position.
_NO_MASK = torch.empty(1, 1, 0, 0)


class _FusedDecoder(_Fused):
    """Causal attention without a mask.

    transformers looks whether positions start anew within a row (packed sequences). Eager, it waits for the GPU, sees
    that they do not and leaves the mask away. In torch.compile and in a CUDA graph it cannot look, and so makes a mask
    of [rows, length, length], with which SDPA computes what lies behind a query too, of keys and values copied for each
    head. Without the caller's positions there is nothing to look for. Two layers of Llama-3.2-1B's width, 8 × 512
    tokens, compiled in a CUDA graph on an H100: 1.12 ms, with the mask 1.27.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        f: DecoderFusion = self._fusion
        if f.only_causal(self, args, kwargs):
            kwargs |= {_CAUSAL: True, "attention_mask": _NO_MASK}
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class _FusedDense(_Fused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        f: DenseFusion = self._fusion
        # Where a norm has computed the layer already, x is its output.
        if (
            f.dense.usable(hidden_states)
            and f.intact(cast(nn.Module, self))
            and hidden_states.shape[-1] == f.dense.k
            and is_few(hidden_states)
            and not f.dense.in_float(hidden_states)
        ):
            return f.dense.activated(hidden_states, f.activation)
        return super().forward(hidden_states)  # type: ignore[misc]


@functools.cache
def _fused_class(mixin: Any, base: Any) -> type:
    """``base`` with another forward, and its name: others (and the plans) know classes by their names."""
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return types.new_class(base.__name__, (mixin, base), exec_body=lambda namespace: namespace.update(body))


def _revive(mixin: type, base: type) -> Any:
    cls: Any = _fused_class(mixin, base)
    return cls.__new__(cls)


class _Fusion(Held):
    def __post_init__(self) -> None:
        super().__init__()


@dataclass(eq=False, repr=False)
class NormFusion(_Fusion):
    """A norm and everything that reads it."""

    readers: Merged
    kind: str
    eps: str
    offset: float

    mixin = _FusedNorm

    def parts(self) -> tuple[Merged, ...]:
        return (self.readers,)

    def arguments(self, norm: Any) -> tuple[Tensor | None, Tensor | None, str, float, float]:
        """Weight, bias, kind, eps and offset, as the operators take them."""
        return norm.weight, norm._parameters.get("bias"), self.kind, getattr(norm, self.eps), self.offset

    def run(self, norm: Any, x: Tensor) -> Tensor:
        return self.readers.after_norm(x, *self.arguments(norm))

    def run_sum(self, norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The readers' product for ``h = x + residual``, and h."""
        return self.readers.after_sum(x, residual, *self.arguments(norm))

    def problem(self, norm: nn.Module, x: Tensor) -> str:
        """The kernel's norm against the module's; and the product of all readers, which has the very bits of each."""
        want = type(norm).__bases__[1].forward(norm, x)  # type: ignore[attr-defined]
        weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
        eps = getattr(norm, self.eps)
        y = cast(Tensor, ops.norm_quantize(x, weight, bias, None, None, self.kind, eps, self.offset, True).y)
        # Both round twice at most (normalised, weighted) from float32 values that differ by their sums' rounding:
        # relative to the largest value of the row, (64 + K/64) steps of 2⁻²⁴ bounds both orders of summation.
        unit = torch.finfo(x.dtype).eps
        slack = (64 + x.shape[-1] / 64) * 2.0**-24
        allowed = 2 * unit * want.float().abs() + slack * want.float().abs().amax(-1, keepdim=True)
        if want.dtype != x.dtype or not bool(((y.float() - want.float()).abs() <= allowed).all()):
            return "the norm's formula is another one"
        return product_problem(self.readers, self.run(norm, x), y)

    def __str__(self) -> str:
        return f"norm -> {_names(self.readers)}"


@dataclass(eq=False, repr=False)
class AttentionFusion(_Fusion):
    """An attention whose projections read its argument."""

    readers: Merged

    mixin = _FusedAttention

    def parts(self) -> tuple[Merged, ...]:
        return (self.readers,)

    def problem(self, module: nn.Module, x: Tensor) -> str:
        return product_problem(self.readers, self.readers.linear(x), x)

    def __str__(self) -> str:
        return _names(self.readers)


@dataclass(eq=False, repr=False)
class MlpFusion(_Fusion):
    """An MLP: its input layers, the activation, its output layer."""

    inputs: Merged
    output: Merged
    name: str  # of the activation's attribute
    module: nn.Module
    activation: str
    gated: bool
    dropout: str

    mixin = _FusedMlp

    def parts(self) -> tuple[Merged, ...]:
        return (self.inputs, self.output)

    def usable(self, mlp: nn.Module, x: Tensor) -> bool:
        """Whether all of it may be fused in this call."""
        return self.intact(mlp, x) and not self.output.in_float(x)

    def intact(self, mlp: nn.Module, x: Tensor) -> bool:
        """Whether nothing but the layers' way to take so many tokens could keep them from it."""
        same = mlp._modules.get(self.name) is self.module and not has_hooks(self.module)
        return same and not mlp.training and self.inputs.usable(x) and self.output.usable(x)

    def in_one(self, x: Tensor) -> bool:
        """Whether all of it, and the norm before it, is one operator: in any scheme."""
        return is_few(x) and self.inputs.in_one(x) and self.output.in_one(x)

    def problem(self, mlp: nn.Module, x: Tensor) -> str:
        fused, want = both_ways(lambda: cast(Tensor, mlp(x)), self.parts())
        return distance_problem(fused, want, want)

    def __str__(self) -> str:
        gate = " · up" if self.gated else ""
        return f"{self.activation}{gate} -> {_names(self.output)}"


@dataclass(eq=False, repr=False)
class DenseFusion(_Fusion):
    """A dense layer and its activation."""

    dense: Merged
    name: str
    module: nn.Module
    activation: str

    mixin = _FusedDense

    def parts(self) -> tuple[Merged, ...]:
        return (self.dense,)

    def intact(self, module: nn.Module) -> bool:
        return module._modules.get(self.name) is self.module and not has_hooks(self.module)

    def problem(self, module: nn.Module, x: Tensor) -> str:
        fused, want = both_ways(lambda: cast(Tensor, module(x)), self.parts())
        return distance_problem(fused, want, want)

    def __str__(self) -> str:
        return f"{_names(self.dense)} -> {self.activation}"


@dataclass(eq=False, repr=False)
class BlockFusion(_Fusion):
    """A block of which the second norm and the MLP are fused: the residual goes through their kernels."""

    first: str
    attention: str
    norm: str
    mlp: str

    mixin = _FusedBlock

    def parts(self) -> tuple[Merged, ...]:
        return ()

    def usable(self, norm: Any, mlp: Any, x: Tensor) -> bool:
        """Whether the residual may go through the kernels in this call."""
        if has_hooks(norm) or has_hooks(mlp) or not (isinstance(norm, _FusedNorm) and isinstance(mlp, _FusedMlp)):
            return False
        readers, last = norm._fusion.readers, mlp._fusion
        weight = cast(Any, norm).weight
        return (
            readers is last.inputs
            and not last.dropout
            and x.dtype == weight.dtype
            and last.intact(mlp, x)
            and (last.in_one(x) or not (readers.in_float(x) or last.output.in_float(x)))
        )

    def problem(self, block: nn.Module, x: Tensor) -> str:
        """Nothing: the block is run both ways in any case."""
        return ""

    def __str__(self) -> str:
        return "residuals"


@dataclass(eq=False, repr=False)
class DecoderFusion(_Fusion):
    """A model of causal blocks, all of them fused."""

    mixin = _FusedDecoder

    def parts(self) -> tuple[Merged, ...]:
        return ()

    def only_causal(self, model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether token i of each row sees tokens 0 … i in a call with these arguments, and SDPA computes it."""
        given = ("attention_mask", "position_ids", "past_key_values", "cache_position", "is_causal")
        config = model.config
        return (
            len(args) <= 1  # input_ids
            and all(kwargs.get(name) is None for name in given)
            and config._attn_implementation == "sdpa"  # without a mask the others see all tokens
            and getattr(config, "is_causal", True)
            and not getattr(config, "use_bidirectional_attention", False)
            and getattr(config, "sliding_window", None) is None
            and tracing_state() is None
            and not (is_compiling() and exporting())
            and all(isinstance(layer, _FusedBlock) and not has_hooks(cast(Any, layer)) for layer in model.layers)
        )

    def problem(self, model: nn.Module, x: Tensor) -> str:
        """Nothing: its blocks see the same tokens."""
        return ""

    def __str__(self) -> str:
        return "causal attention without a mask"


Fusion = NormFusion | AttentionFusion | MlpFusion | DenseFusion | BlockFusion | DecoderFusion


def _names(merged: Merged) -> str:
    return "+".join(e.attribute for e in merged.edges.values() if isinstance(e.child, Int8Linear))


# ---- fuse and unfuse -----------------------------------------------------------------------------------------------


def fuse(model: nn.Module) -> str:
    """Fuse what the tables know and the probes confirm; what is fused already stays. Says what was done.

    An exception, Ctrl-C included, leaves nothing of this call behind.
    """
    done: list[nn.Module] = []
    failed: list[str] = []
    try:
        with torch.inference_mode(False), torch.no_grad():
            grouped = {id(t) for m in model.modules() if (f := fusion_of(m)) for p in f.parts() for t in p._tensors()}
            for name, block in _blocks(model):
                made = []
                for module, fusion in _found(block, grouped):
                    done.append(module)
                    _set(module, fusion)
                    made.append(module)
                if not made:
                    continue
                problem = check(block, [(module, cast(Fusion, fusion_of(module))) for module in made])
                if problem:
                    for module in made:
                        _unset(module)
                    failed.append(f"{name or type(model).__name__}: {problem}")
            for module in model.modules():
                if fusion_of(module) is None and _is_decoder(module):
                    done.append(module)
                    _set(module, DecoderFusion())
    except BaseException:
        for module in done:
            _unset(module)
        raise
    lines = [text] if (text := summary(model)) else []
    if failed:
        more = f" (and {len(failed) - 3} more)" if len(failed) > 3 else ""
        lines.append(f"Not fused, because the check failed: {'; '.join(failed[:3])}{more}.")
    return "\n".join(lines)


def summary(model: nn.Module) -> str:
    """What is fused in ``model``, in a sentence; empty when nothing is."""
    counts = Counter(str(fusion) for module in model.modules() if (fusion := fusion_of(module)) is not None)
    return "Fused: " + ", ".join(f"{count} × {what}" for what, count in counts.items()) + "." if counts else ""


def could_fuse(model: nn.Module) -> set[str]:
    """Names of the layers that :func:`fuse` may take, once they are int8 and go together."""
    found: set[str] = set()
    for name, module in model.named_modules():
        cls = type(module).__name__
        paths: tuple[str, ...] = ()
        if _is_of(module, BLOCKS):
            paths += tuple(path for _, readers in BLOCKS[cls] for path in readers)
        if _is_of(module, ATTENTIONS):
            paths += ATTENTIONS[cls]
        if _is_of(module, MLPS):
            paths += (*MLPS[cls].inputs, MLPS[cls].output)
        if _is_of(module, DENSE):
            paths += DENSE[cls][:1]
        found.update(f"{name}.{path}" if name else path for path in paths)
    return found


def is_fused(model: nn.Module) -> bool:
    """Whether any module of ``model`` is fused."""
    return any(isinstance(module, _Fused) for module in model.modules())


def unfuse(model: nn.Module) -> None:
    """Every module computes for itself again. The int8 tensors stay where they are."""
    fused = [module for module in model.modules() if fusion_of(module) is not None]
    for module in fused:
        _unset(module)


def fusion_of(module: nn.Module) -> Fusion | None:
    """The fusion of a fused module; None for any other."""
    return cast(Any, module)._fusion if isinstance(module, _Fused) else None


def _set(module: nn.Module, fusion: Fusion) -> None:
    for part in fusion.parts():
        part.adopt()
        part.merge()
    module.__dict__["_fusion"] = fusion
    module.__class__ = _fused_class(fusion.mixin, cast(Any, type(module)))


def _unset(module: nn.Module) -> None:
    fusion = fusion_of(module)
    if fusion is None:
        return
    module.__class__ = type(module).__bases__[1]
    del module.__dict__["_fusion"]
    for part in fusion.parts():
        part.release()


# ---- what can be fused ---------------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if _is_of(module, BLOCKS))


def _is_of(module: nn.Module, table: dict[str, Any]) -> bool:
    """Whether this is transformers' own class of one of these names (a fused module's is that it was made of)."""
    cls = type(module)
    return cls.__name__ in table and cls.__module__.startswith("transformers.models.")


def _found(block: nn.Module, grouped: set[int]) -> Iterator[tuple[nn.Module, Fusion]]:
    """The modules of one block that can be fused, each with its fusion. ``grouped``: tensors that are taken."""
    of_inputs: dict[int, Merged] = {}  # first member → the product that a norm computes
    norms = BLOCKS[type(block).__name__]
    if not getattr(block, "do_layer_norm_before", True):  # some of OPT's sizes have their norms behind
        norms = ()
    for norm_path, paths in norms:
        norm = _get(block, norm_path)
        readers = _merged(block, paths, grouped, quantized=True)
        if norm is None or fusion_of(norm) is not None or readers is None:
            continue
        fusion = _norm_fusion(norm, readers)
        if fusion is None:
            continue
        _take(readers, grouped)
        of_inputs[id(readers.members[0])] = readers
        yield norm, fusion
    for module in block.modules():
        name = type(module).__name__
        if fusion_of(module) is not None:
            continue
        if _is_of(module, ATTENTIONS):
            readers = _merged(module, ATTENTIONS[name], grouped)
            if readers is not None:
                _take(readers, grouped)
                yield module, AttentionFusion(readers)
        elif _is_of(module, MLPS):
            if (mlp := _mlp_fusion(module, MLPS[name], of_inputs, grouped)) is not None:
                yield module, mlp
        elif _is_of(module, DENSE):
            path, activation = DENSE[name]
            found = _merged(module, (path,), grouped, passes=False)
            act = _activation(module, activation)
            if found is not None and act is not None:
                _take(found, grouped)
                yield module, DenseFusion(found, activation, module._modules[activation], act)  # type: ignore[arg-type]
    name = type(block).__name__
    if name in RESIDUALS and fusion_of(block) is None:
        attention, second, last = RESIDUALS[name]
        if all(fusion_of(cast(nn.Module, block._modules[path])) is not None for path in (second, last)):
            yield block, BlockFusion(BLOCKS[name][0][0], attention, second, last)


def _is_decoder(model: Any) -> bool:
    """Whether all blocks of a causal decoder are fused, and would get :data:`_NO_MASK` as it is."""
    return (
        _is_of(model, DECODERS)
        and len(model.layers) > 0
        and all(isinstance(fusion_of(layer), BlockFusion) for layer in model.layers)
        and _keeps_masks(model.config)
    )


def _keeps_masks(config: Any) -> bool:
    """Whether this version of transformers leaves a mask of four dimensions alone."""
    try:
        from transformers.masking_utils import create_causal_mask

        # By position: what comes first is the model's input, and its name and that of the two last differ by version.
        return create_causal_mask(config, _NO_MASK[0], _NO_MASK, None, None) is _NO_MASK
    except Exception:  # another version's: there is no telling what it raises
        return False


def _norm_fusion(norm: nn.Module, readers: Merged) -> NormFusion | None:
    cls = type(norm)
    known = cls in (nn.LayerNorm, getattr(nn, "RMSNorm", None)) or cls.__module__.startswith("transformers.models.")
    if cls.__name__ not in NORMS or not known:
        return None
    kind, eps, offset = NORMS[cls.__name__]
    if norm._modules or set(norm._parameters) - {"weight", "bias"} or not isinstance(getattr(norm, eps, None), float):
        return None
    vectors = [p for p in norm._parameters.values() if p is not None]
    if any(tuple(p.shape) != (readers.k,) or p.dtype not in ops.FLOATS or not p.is_contiguous() for p in vectors):
        return None
    return NormFusion(readers, kind, eps, offset)


def _mlp_fusion(mlp: nn.Module, spec: Mlp, of_inputs: dict[int, Merged], grouped: set[int]) -> MlpFusion | None:
    first = mlp._modules.get(spec.inputs[0])
    inputs = of_inputs.get(id(first)) or _merged(mlp, spec.inputs, grouped)
    output = _merged(mlp, (spec.output,), grouped, passes=False, quantized=True)
    activation = _activation(mlp, spec.activation)
    if inputs is None or output is None or activation is None:
        return None
    if inputs.n != output.k * (2 if spec.gated else 1):
        return None
    _take(inputs, grouped)
    _take(output, grouped)
    module = cast(nn.Module, mlp._modules[spec.activation])
    return MlpFusion(inputs, output, spec.activation, module, activation, spec.gated, spec.dropout)


def _activation(parent: nn.Module, attribute: str) -> str | None:
    module = parent._modules.get(attribute)
    if module is None or has_hooks(module):
        return None
    name = ACTIVATIONS.get(type(module).__name__)
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return name


def _merged(
    root: nn.Module, paths: Sequence[str], grouped: set[int], passes: bool = True, quantized: bool = False
) -> Merged | None:
    """The layers at these paths as one; None when they are not all int8 layers that go together."""
    edges: dict[str, Edge] = {}
    members = []
    for path in paths:
        parent, below = root, ""
        for attribute in path.split("."):
            child = parent._modules.get(attribute)
            if child is None:
                return None
            below += f".{attribute}"
            edges[below] = Edge(parent, attribute, child)
            parent = child
        if type(parent) not in _MEMBERS:
            return None
        members.append(cast(Int8Linear, parent))
    tensors = [t for member in members for t in (member.weight, member.weight_scale, member.bias) if t is not None]
    if (
        not go_together(members)
        or len({member.in_features for member in members}) > 1
        or any(has_hooks(edge.child) for edge in edges.values())
        or any(id(t) in grouped or t.is_meta for t in tensors)
        or len({id(t) for t in tensors}) < len(tensors)
        or len({member.bias.dtype for member in members if member.bias is not None}) > 1
    ):
        return None
    merged = Merged(list(edges.values()), passes, quantized)
    if passes and merged.n == merged.k:
        return None  # a member could not tell the product from an input of its own
    return merged


def _take(merged: Merged, grouped: set[int]) -> None:
    grouped.update(id(t) for t in merged._tensors())


def _get(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None
