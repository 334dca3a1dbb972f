"""Batches as users have them (a tensor, a tuple of arguments, a mapping of keyword arguments), and calling a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  #: a tensor, a tuple or list of arguments, or a mapping of keyword arguments


def check(batches: Iterable[Batch], device: torch.device) -> list[Batch]:
    """All batches with their tensors on ``device``.

    Raises ValueError, with the batch's number, for what is empty, ragged (lists instead of tensors), or no batch.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is one {type(batches).__name__}: it must be a list of batches (for a single one: [batch])."
        )
    found = [_moved(batch, f"batch {i}", device) for i, batch in enumerate(batches)]
    if not found:
        raise ValueError("There are no batches: hwkern measures on your own data, so it needs at least one.")
    return found


def _moved(batch: Batch, where: str, device: torch.device) -> Batch:
    if isinstance(batch, Mapping):
        moved: Batch = {str(k): _value(v, f"{where}[{k!r}]", device) for k, v in batch.items()}
        tensors = [v for v in moved.values() if isinstance(v, Tensor)]
    elif isinstance(batch, Tensor):
        moved = _value(batch, where, device)
        tensors = [moved]
    elif isinstance(batch, (tuple, list)):
        moved = tuple(_value(v, f"{where}[{i}]", device) for i, v in enumerate(batch))
        tensors = [v for v in moved if isinstance(v, Tensor)]
    else:
        raise ValueError(f"{where} is {type(batch).__name__}: a tensor, a tuple of arguments or a dict is needed.")
    if not tensors:
        raise ValueError(f"{where} holds no tensor.")
    return moved


def _value(value: Any, where: str, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.numel() == 0:
            raise ValueError(f"{where} is empty (shape {tuple(value.shape)}).")
        return value.to(device)
    if isinstance(value, (list, tuple)) and value and not any(isinstance(v, Tensor) for v in value):
        lengths = {len(v) for v in value if isinstance(v, Sequence) and not isinstance(v, str)}
        what = f"a ragged list (lengths {sorted(lengths)})" if len(lengths) > 1 else "a list"
        raise ValueError(f"{where} is {what}, not a tensor: pad it to one length and make a tensor of it.")
    return value


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one batch."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is. ValueError for one on meta or without parameters."""
    first = next(model.parameters(), None)
    if first is None or first.is_meta:
        raise ValueError("The model has no parameters with values: load it before it is measured.")
    return first.device


def main_output(output: Any) -> Tensor:
    """The tensor that a model's output is about: logits, hidden states, or the first float tensor in it."""
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(f"The model's output is a {type(output).__name__} without a float tensor: pass a metric.")
