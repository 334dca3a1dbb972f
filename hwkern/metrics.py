"""How good a model is at its task: top-1, perplexity, agreement of embeddings, or any function of yours.

A metric is called as ``metric(model, batches)`` and returns a number. Your own function counts as "higher is better";
wrap it in :class:`Metric` to say otherwise. A metric that compares with the original model has ``prepare``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwkern import _batches
from hwkern._observe import evaluating

Function = Callable[[nn.Module, Sequence[Any]], float]


@dataclass
class Metric:
    """A number for a model.

    Attributes:
        function: ``(model, batches) -> float``.
        name: for reports.
        higher_is_better: what a drop is.
        relative: whether a drop counts in parts of the original's value (perplexity) instead of absolutely (top-1).
        prepare: ``(model, batches)``, called once with the original model.
    """

    function: Function
    name: str = "metric"
    higher_is_better: bool = True
    relative: bool = False
    prepare: Callable[[nn.Module, Sequence[Any]], None] | None = None

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """The value. ValueError when it is no finite number."""
        with torch.no_grad(), evaluating(model):
            value = self.function(model, batches)
        try:
            found = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The metric {self.name!r} returned {value!r}, which is no number.") from error
        if not math.isfinite(found):
            raise ValueError(f"The metric {self.name!r} returned {found}: nothing can be decided by it.")
        return found

    def drop(self, before: float, after: float) -> float:
        """How much worse ``after`` is; negative when it is better."""
        lost = before - after if self.higher_is_better else after - before
        return lost / abs(before) if self.relative and before else lost


def as_metric(metric: Metric | Function | None) -> Metric | None:
    """A :class:`Metric` for a user's function. TypeError for what cannot be called."""
    if metric is None or isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise TypeError(f"metric is {type(metric).__name__}: a function (model, batches) -> float is needed.")
    return Metric(metric, getattr(metric, "__name__", "metric"))


def top1(labels: Sequence[Tensor]) -> Metric:
    """Share of right answers: argmax of the logits against ``labels``, one tensor of class numbers per batch."""

    def function(model: nn.Module, batches: Sequence[Any]) -> float:
        if len(labels) != len(batches):
            raise ValueError(f"top1 has labels for {len(labels)} batches, but there are {len(batches)}.")
        right = total = 0
        for batch, wanted in zip(batches, labels, strict=True):
            found = _batches.main_output(_batches.call(model, batch)).argmax(-1)
            if found.shape != wanted.shape:
                raise ValueError(
                    f"top1: the model gives {tuple(found.shape)} answers for {tuple(wanted.shape)} labels."
                )
            right += int((found == wanted.to(found.device)).sum())
            total += wanted.numel()
        return right / total

    return Metric(function, "top-1")


def perplexity() -> Metric:
    """``exp`` of the mean loss of each next token; batches are dicts with input_ids (and attention_mask), or ids."""

    def function(model: nn.Module, batches: Sequence[Any]) -> float:
        loss, count = 0.0, 0
        for batch in batches:
            ids = batch["input_ids"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            logits = _batches.main_output(_batches.call(model, batch)).float()
            wanted = ids[:, 1:].clone()
            if mask is not None:
                wanted[mask[:, 1:] == 0] = -100
            flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
            loss, count = loss + float(flat), count + int((wanted != -100).sum())
        return math.exp(min(loss / max(count, 1), 700.0))

    return Metric(function, "perplexity", higher_is_better=False, relative=True)


def pooled(model: nn.Module, batch: Any) -> Tensor:
    """Embeddings ``[B, D]`` of length 1: the mean over the tokens of the attention mask, or the output itself."""
    found = _batches.main_output(_batches.call(model, batch)).float()
    if found.dim() == 3:
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
        weight = torch.ones(found.shape[:2], device=found.device) if mask is None else mask.float()
        found = (found * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True)
    return F.normalize(found.flatten(1), dim=-1)


def cosine(embed: Callable[[nn.Module, Any], Tensor] = pooled) -> Metric:
    """Mean cosine between the embeddings of the original model and of this one; 1 for the original."""
    reference: list[Tensor] = []

    def prepare(model: nn.Module, batches: Sequence[Any]) -> None:
        reference[:] = _embeddings(model, batches, embed)

    def function(model: nn.Module, batches: Sequence[Any]) -> float:
        found = torch.cat(_embeddings(model, batches, embed))
        return float(F.cosine_similarity(found, torch.cat(reference), dim=-1).mean())

    return Metric(function, "cosine", prepare=prepare)


def neighbours(embed: Callable[[nn.Module, Any], Tensor] = pooled, k: int = 1) -> Metric:
    """Share of the ``k`` nearest neighbours (among all inputs) that stay the same; 1 for the original."""
    reference: list[Tensor] = []

    def nearest(model: nn.Module, batches: Sequence[Any]) -> Tensor:
        found = torch.cat(_embeddings(model, batches, embed))
        if len(found) <= k:
            raise ValueError(f"neighbours(k={k}) needs more than {k} inputs, but there are {len(found)}.")
        similar = found @ found.t()
        return similar.fill_diagonal_(-2).topk(k).indices

    def prepare(model: nn.Module, batches: Sequence[Any]) -> None:
        reference[:] = [nearest(model, batches)]

    def function(model: nn.Module, batches: Sequence[Any]) -> float:
        now = nearest(model, batches)
        return float((now.unsqueeze(-1) == reference[0].unsqueeze(-2)).any(-1).float().mean())

    return Metric(function, f"{k} nearest", prepare=prepare)


def _embeddings(model: nn.Module, batches: Sequence[Any], embed: Callable[[nn.Module, Any], Tensor]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [embed(model, batch).float().cpu() for batch in batches]
