"""What a model's linear layers really see: how many tokens in each call, and the values of their inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._layers import Layer

#: Rows of each layer's inputs that are kept to measure errors on. 256 rows give a signal-to-noise ratio to 0.1 dB.
ROWS = 256


@dataclass
class Seen:
    """One layer's calls over all batches.

    Attributes:
        calls: number of tokens M → how many calls had it.
        low, high: smallest and largest value of each input column, ``[K]`` float32.
        sample: rows of the inputs, ``[R, K]`` in their own dtype, R at most ``ROWS``; of an embedding some of the
            indices, each once.
        bad: calls whose input held NaN or ±inf; they count in ``calls`` only.
    """

    calls: Counter[int] = field(default_factory=Counter)
    low: Tensor | None = None
    high: Tensor | None = None
    sample: Tensor | None = None
    bad: int = 0

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each column, ``[K]``."""
        assert self.low is not None
        assert self.high is not None
        return torch.maximum(self.high, -self.low)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the inputs; None when the layer never ran."""
        return None if self.sample is None else self.sample.dtype


class Watch:
    """Forward hooks on layers; gone when the ``with`` block ends, however it ends."""

    def __init__(self, layers: Sequence[Layer], rows: int = ROWS) -> None:
        self.seen = {layer.names[0]: Seen() for layer in layers}
        self._layers = layers
        self._rows = rows
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for layer in self._layers:
            seen = self.seen[layer.names[0]]
            hook = self._lookups(seen) if layer.is_embedding else self._hook(seen)
            self._handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, seen: Seen) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or x.numel() == 0:
                return
            flat = x.detach().reshape(-1, x.shape[-1])
            seen.calls[math.prod(x.shape[:-1])] += 1
            # amin and amax in the input's dtype lose nothing: they are values of it.
            low, high = flat.amin(0).float(), flat.amax(0).float()
            if not bool((low.isfinite() & high.isfinite()).all()):
                seen.bad += 1
                return
            seen.low = low if seen.low is None else torch.minimum(seen.low, low)
            seen.high = high if seen.high is None else torch.maximum(seen.high, high)
            self._keep(seen, flat)

        return hook

    def _lookups(self, seen: Seen) -> Callable[..., None]:
        """Of an embedding: tokens are indices, and the sample is which ones."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            indices = args[0] if args else kwargs.get("input")
            if not isinstance(indices, Tensor) or indices.numel() == 0:
                return
            seen.calls[indices.numel()] += 1
            found = indices.detach().flatten()[: self._rows * 4]
            seen.sample = found.unique() if seen.sample is None else torch.cat([seen.sample, found]).unique()
            seen.sample = seen.sample[:: math.ceil(seen.sample.numel() / (self._rows * 16))]

        return hook

    def _keep(self, seen: Seen, flat: Tensor) -> None:
        """Every call adds rows evenly over its length; when there are too many, every second one goes."""
        step = max(1, math.ceil(flat.shape[0] * 4 / self._rows))  # a call adds at most a quarter
        rows = flat[::step].clone()
        seen.sample = rows if seen.sample is None else torch.cat([seen.sample, rows.to(seen.sample.dtype)])
        while seen.sample.shape[0] > self._rows:
            seen.sample = seen.sample[::2].clone()


def observe(
    model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any], step: Callable[[], None] = lambda: None
) -> dict[str, Seen]:
    """Run all batches and return what each layer saw, by its first name. The model's mode and weights stay."""
    with torch.no_grad(), evaluating(model), Watch(layers) as watch:
        for batch in batches:
            _batches.call(model, batch)
            step()
    return watch.seen


class evaluating:  # noqa: N801  # reads as a verb
    """``with evaluating(model):`` runs it in eval mode, and puts each module's own mode back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()

    def __exit__(self, *error: object) -> None:
        for module, training in self._modes:
            module.training = training
