"""Which linear layers and embeddings a model holds, which of them ``patch`` takes, and why not the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn

from hwkern.nn import CalibratedInt8Linear, Int8Conv1D, Int8Embedding, Int8Linear
from hwkern.nn.conv1d import conv1d_class
from hwkern.nn.embedding import embedding_problem
from hwkern.nn.pack import dtype_name, weight_problem
from hwkern.nn.packed import PackedLayer
from hwkern.ops import FLOATS, cpu_int8_is_fast
from hwkern.report import Status

Predicate = Callable[[str, nn.Module], bool]
Selector = str | Predicate | Sequence[str | Predicate]

#: Layers with fewer weights than this stay float: quantizing x and rescaling y cost more than the product saves.
#: One CPU thread with VNNI, float32 time over int8 time at 16 / 64 tokens: 256 × 256 1.1 / 1.6 (0.8 / 1.2 on a busy
#: machine), 512 × 256 1.5 / 2.1 (1.1 / 1.5), 384 × 384 1.6 / 2.2, 768 × 768 2.0 / 2.5. One token gains from about
#: 768 × 768 on: 384 × 384 0.8, 768 × 768 1.2.
MIN_WEIGHTS = 2**17
#: Layers with fewer inputs or outputs than this stay float, for the same reason: at 16 / 512 tokens 32 inputs and 4096
#: outputs give 1.1 / 1.3, 4096 inputs and 32 outputs 1.7 / 1.0, 64 and 2048 either way at least 1.4.
MIN_FEATURES = 64


# ---- what the model holds -------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One linear layer (or embedding) of the model, with every place that holds it, and what becomes of it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)  # (parent, attribute)
    status: Status = "int8"
    reason: str = ""
    tied_to: str | None = None

    @property
    def weight(self) -> nn.Parameter | None:
        return self.module._parameters.get("weight")

    @property
    def is_embedding(self) -> bool:
        return _is_embedding(self.module)

    @property
    def now(self) -> Any:
        """The module that is in the model at this moment."""
        parent, attribute = self.slots[0]
        return parent._modules[attribute]


def find_layers(model: nn.Module, embeddings: bool = False) -> list[Layer]:
    """Every linear layer (float, int8 or quantized by somebody else), in the model's order; or embeddings as well."""
    found: dict[int, Layer] = {}
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for attribute, module in parent._modules.items():
            if module is None or not (_is_linear(module) or (embeddings and _is_embedding(module))):
                continue
            layer = found.setdefault(id(module), Layer(module))
            layer.names.append(f"{prefix}.{attribute}" if prefix else attribute)
            if not any(slot[0] is parent and slot[1] == attribute for slot in layer.slots):
                layer.slots.append((parent, attribute))
    return list(found.values())


def int8_class(module: nn.Module) -> type[Int8Linear] | None:
    """What can replace ``module``."""
    for cls in (Int8Conv1D, Int8Linear):
        if cls._replaces(module):
            return cls
    return None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Int8Linear) or int8_class(module) is not None or is_foreign(module)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, Int8Embedding))


def is_foreign(module: nn.Module) -> bool:
    """Whether this is a linear layer that another library (or torch itself) quantized."""
    cls = type(module)
    return "Linear" in cls.__name__ and cls.__module__.startswith(_FOREIGN)


_FOREIGN = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes.", "optimum.quanto", "auto_gptq.")


# ---- include and exclude --------------------------------------------------------------------------------------------


class Selection:
    """``include`` or ``exclude``: patterns and predicates on layers."""

    def __init__(self, role: str, selector: Selector | None) -> None:
        self.role = role
        self.given = selector is not None
        rules = () if selector is None else (selector,) if isinstance(selector, str) or callable(selector) else selector
        if not isinstance(rules, Sequence) or not all(isinstance(rule, str) or callable(rule) for rule in rules):
            raise TypeError(
                f"{role} = {selector!r}: it must be a name pattern, a predicate (name, module) -> bool, or a list of "
                "them."
            )
        self.rules = tuple(rules)

    def match(self, layer: Layer) -> str | None:
        """The rule that takes ``layer``, in words; None without one."""
        for rule in self.rules:
            for name in layer.names:
                if isinstance(rule, str):
                    if fnmatchcase(name, rule):
                        return repr(rule)
                elif rule(name, layer.module):
                    return getattr(rule, "__name__", "predicate")
        return None

    def reason(self, layer: Layer) -> str:
        """Why this selection leaves ``layer`` out; empty when it does not."""
        rule = self.match(layer)
        if self.role == "exclude":
            return f"excluded by {rule}" if rule else ""
        return "" if rule or not self.given else "not in include"

    def check(self, layers: Sequence[Layer], model: nn.Module) -> None:
        """ValueError for a pattern that matches no layer."""
        names = [name for layer in layers for name in layer.names]
        for rule in self.rules:
            if not isinstance(rule, str) or any(fnmatchcase(name, rule) for name in names):
                continue
            if any(fnmatchcase(name, rule) for layer in find_layers(model, True) for name in layer.names):
                hint = "It names an embedding: those count with embeddings=True."
            elif any(name.startswith(f"{rule}.") for name in names):
                hint = f"It names a module above them: write {rule + '.*'!r}."
            elif close := difflib.get_close_matches(rule, names, n=3, cutoff=0.5):
                hint = f"Close to it: {_listed(close)}."
            else:
                hint = f"There are: {_listed(names)}." if names else "The model has none."
            raise ValueError(f"{self.role} = {rule!r} matches no linear layer of this {type(model).__name__}. {hint}")


def _listed(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} … ({len(names)} in all)"


# ---- which layers, and why not --------------------------------------------------------------------------------------


def judge(model: nn.Module, layers: Sequence[Layer], wanted: Selection, unwanted: Selection) -> None:
    """Set ``status`` and ``reason`` of every layer."""
    elsewhere = _plain_references(model, layers)
    heads = _output_heads(model)
    tables: set[int] = set()  # weights of embeddings that are taken: heads that share one go with them
    for layer in sorted(layers, key=lambda layer: not layer.is_embedding):
        if isinstance(layer.module, PackedLayer):
            layer.status = "already"
            continue
        reason = unwanted.reason(layer) or wanted.reason(layer) or _impossible(layer, elsewhere)
        if not reason and not wanted.given:
            reason = _not_worth(layer, heads, tables)
        if reason:
            layer.status, layer.reason = "left", reason
        elif layer.is_embedding:
            tables.add(id(layer.weight))
    judge_ties(model, layers, keep=wanted.given)


def _impossible(layer: Layer, elsewhere: dict[int, str]) -> str:
    module = layer.module
    cls = type(module)
    if is_foreign(module):
        return f"it is quantized already ({cls.__name__})"
    for parent, attribute in layer.slots:
        bypass = _bypass(parent, attribute)
        if bypass:
            return bypass
    if id(module) in elsewhere:
        return f"also held in the plain attribute {elsewhere[id(module)]}, which cannot be swapped"
    if "parametrizations" in module._modules:
        return "its weight is parametrized (torch.nn.utils.parametrize): remove the parametrization first"
    if "weight" in module.__dict__:  # where the hooks of torch.nn.utils write it before every forward
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning): remove it first"
    problem = weight_problem(layer.weight, _is_transposed(module))
    if problem:
        return problem
    bias = module._parameters.get("bias")
    if bias is not None and bias.dtype not in FLOATS:
        return f"its bias is {dtype_name(bias.dtype)} (hwkern takes float32, float16 or bfloat16)"
    extra = (set(module._parameters) | set(module._buffers) | set(module._modules)) - {"weight", "bias"}
    if extra:
        return f"it carries more than a weight and a bias: {', '.join(sorted(extra))}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate's offloading does that): remove that first"
    if layer.is_embedding and (problem := embedding_problem(module)):
        return problem
    base = nn.Embedding if layer.is_embedding else conv1d_class() if _is_transposed(module) else nn.Linear
    if base is not None and (cls.forward is not base.forward or cls.__call__ is not base.__call__):
        return f"its class {cls.__name__} has a forward of its own"
    return ""


def _is_transposed(module: nn.Module) -> bool:
    cls = int8_class(module)
    return cls is not None and cls._transposed


def _bypass(parent: nn.Module, attribute: str) -> str:
    """Why the parent never calls this child's forward (or not always); empty when it does."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if isinstance(parent, nn.TransformerEncoderLayer) and attribute in ("linear1", "linear2"):
        return "nn.TransformerEncoderLayer's fast path reads its weight and does not call it"
    return ""


def _plain_references(model: nn.Module, layers: Sequence[Layer]) -> dict[int, str]:
    """Layers that a module also holds outside torch's registry (``self.x = [layer]``), with the attribute's name."""
    ids = {id(layer.module) for layer in layers}
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            held: Sequence[Any] = ()
            if isinstance(value, nn.Module):
                held = (value,)
            elif isinstance(value, (list, tuple, set, frozenset)):
                held = tuple(value)
            elif isinstance(value, dict):
                held = tuple(value.values())
            for item in held:
                if id(item) in ids:
                    found[id(item)] = f"{name}.{attribute}" if name else attribute
    return found


def _output_heads(model: nn.Module) -> set[int]:
    """The modules that transformers' models name as their output embeddings."""
    heads = set()
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            try:
                heads.add(id(cast(Any, module).get_output_embeddings()))
            except Exception:  # models without a head raise whatever they like
                continue
    return heads


def _not_worth(layer: Layer, heads: set[int], tables: set[int]) -> str:
    weight = cast(Tensor, layer.weight)
    if layer.is_embedding:
        return "too small to gain" if weight.numel() < MIN_WEIGHTS else ""
    head = id(layer.module) in heads or any(name.rsplit(".", 1)[-1] == "lm_head" for name in layer.names)
    if head and id(weight) not in tables:
        return "output head: its rounding goes straight into the logits"
    if weight.numel() < MIN_WEIGHTS or min(weight.shape) < MIN_FEATURES:
        return "too small to gain"
    if weight.device.type == "cpu" and not cpu_int8_is_fast():
        return "this CPU has no exact int8 dot product: INT8 would be slower than float32"
    return ""


def judge_ties(model: nn.Module, layers: Sequence[Layer], keep: bool) -> None:
    """Note who shares a weight with whom; unless ``keep``, a weight that one holder keeps as float stays so in all.

    That of an embedding does in any case: the int8 table would come on top of the float one.
    """
    by_module = {id(layer.module): layer for layer in layers}
    weights = {id(layer.weight) for layer in layers if layer.weight is not None}  # a shared bias stays a shared bias
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in weights:
                label = name if key == "weight" else f"{name}.{key}"
                holders.setdefault(id(parameter), []).append((label, module))
    for layer in layers:
        held_by = [] if layer.weight is None else holders.get(id(layer.weight), [])
        if held_by and held_by[0][1] is not layer.module:
            layer.tied_to = held_by[0][0]
    for held_by in holders.values():
        members = [by_module.get(id(module)) for _, module in held_by]
        floats = [i for i, member in enumerate(members) if member is None or member.status != "int8"]
        if not floats:
            continue
        name, module = held_by[floats[0]]
        embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for member in members:
            if member is not None and member.status == "int8" and (member.is_embedding or not keep):
                member.status = "left"
                member.reason = (
                    f"output head: its weight is shared with the embedding {name!r}"
                    if embedding and not member.is_embedding
                    else f"its weight is shared with {name!r}, which stays float"
                )


def tied(chosen: Sequence[Layer]) -> list[list[Layer]]:
    """Layers that share one weight Parameter (and its orientation) together."""
    groups: dict[tuple[int, bool], list[Layer]] = {}
    for layer in chosen:
        groups.setdefault((id(layer.weight), _is_transposed(layer.module)), []).append(layer)
    return list(groups.values())


# ---- a new module in an old one's place -----------------------------------------------------------------------------

# What a user can register on a module; torch keeps each kind in an instance attribute of this name.
_HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# The attributes of a linear layer without a user's additions; what goes beyond them travels with the layer.
_OWN = {
    *("nf", "nx", "max_tokens", "_tensor_scale", "_part"),
    *CalibratedInt8Linear(1, 1, device="meta").__dict__,
    *nn.Linear(1, 1, device="meta").__dict__,
    *Int8Embedding(1, 1, device="meta").__dict__,
    *nn.Embedding(1, 1, device="meta").__dict__,
}


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the hooks, the mode and the user's attributes of ``old``.

    The hook dicts are shared, not copied: the handles that users hold remove hooks from those very dicts.
    """
    for name in _HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    new.training = old.training
    for name, value in old.__dict__.items():
        if name not in _OWN:
            new.__dict__[name] = value
