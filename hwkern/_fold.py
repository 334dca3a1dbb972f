"""Folding a smoothing vector into the norm before the layers, where structure proves that nobody else reads it.

A transformer block with the norm first ("pre-norm") feeds the norm's output to its projections and to nothing else, so
the norm may divide by s what the projections multiply by s. Which blocks are so is a matter of their class: a table,
not a guess. BERT's blocks add the norm's output to the residual, so they are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Class of block → (norm, the layers that read it and are all that do), as paths below the block.
_LLAMA = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
STRUCTURES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "GPT2Block": (("ln_1", ("attn.c_attn",)), ("ln_2", ("mlp.c_fc",))),
    "ViTLayer": (
        ("layernorm_before", ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
        ("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),  # transformers ≥ 5.20
        ("layernorm_after", ("intermediate.dense",)),
        ("layernorm_after", ("mlp.fc1",)),
    ),
}
#: Norms that end in ``… * weight (+ bias)``. Gemma's, which multiplies by 1 + weight, is not among them.
_NORMS = ("LayerNorm", "RMSNorm", "LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


@dataclass
class Group:
    """A norm and the layers that read its output, which nothing else does."""

    norm_name: str
    norm: nn.Module
    readers: tuple[str, ...]


def groups(model: nn.Module) -> list[Group]:
    """Every norm of ``model`` whose division its readers can make good."""
    uses: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return [group for group in _candidates(model) if all(uses[id(p)] == 1 for p in _parameters(group.norm))]


def _candidates(model: nn.Module) -> Iterator[Group]:
    for name, block in model.named_modules():
        if not type(block).__module__.startswith("transformers.models."):
            continue
        for norm_path, paths in STRUCTURES.get(type(block).__name__, ()):
            norm = _get(block, norm_path)
            readers = [_get(block, path) for path in paths]
            if norm is None or any(reader is None for reader in readers) or not _is_plain(norm):
                continue
            prefix = f"{name}." if name else ""
            yield Group(prefix + norm_path, norm, tuple(prefix + path for path in paths))


def _get(module: nn.Module, path: str) -> nn.Module | None:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Module) else None


def _is_plain(norm: nn.Module) -> bool:
    parameters = set(norm._parameters) - {"weight", "bias"}
    return type(norm).__name__ in _NORMS and not parameters and not norm._modules and bool(list(_parameters(norm)))


def _parameters(norm: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in (norm._parameters.get("weight"), norm._parameters.get("bias")) if p is not None)


class Fold:
    """One norm that is divided; can be undone bit for bit while nobody loads other values into it."""

    def __init__(self, group: Group, divisors: Tensor) -> None:
        self.norm, self.name, self.readers = group.norm, group.norm_name, group.readers
        self._before = self.values()
        self._after = [(p.float() / divisors.to(p.device)).to(p.dtype) for p in self._before]

    def values(self) -> list[Tensor]:
        """What the norm's weight and bias are now."""
        return [p.detach().clone() for p in _parameters(self.norm)]

    def put(self, values: Sequence[Tensor]) -> None:
        """Give them these, in place."""
        for p, value in zip(_parameters(self.norm), values, strict=True):
            with torch.no_grad():
                p.copy_(value)

    def apply(self) -> None:
        """Divide them."""
        self.put(self._after)

    def undo(self) -> None:
        """Put the norm's own values back; leaves it alone when others were loaded since."""
        for p, before, after in zip(_parameters(self.norm), self._before, self._after, strict=True):
            with torch.no_grad():
                if torch.equal(p, after.to(p.device, p.dtype)):
                    p.copy_(before)
