"""Greedy back-off: the layers that cost most accuracy go back to float until the task's bound holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hwkern._originals import Place, room_beside
from hwkern._recipes import Recipe
from hwkern.metrics import Metric


@dataclass
class BackOff:
    """What the task said.

    Attributes:
        before, after: the metric of the original model and of the one with what is left of the recipes.
        first: the metric with all recipes.
        kept: layers that went back to float, worst first.
    """

    metric: str
    before: float
    first: float
    after: float
    kept: list[str] = field(default_factory=list)


@dataclass
class _Recipes:
    recipes: dict[str, Recipe]


def back_off(
    model: nn.Module,
    without: Callable[[Sequence[str]], dict[str, Recipe]],
    snr: Mapping[str, float],
    metric: Metric,
    batches: Sequence[Any],
    max_drop: float,
    step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Recipe], BackOff]:
    """Recipes within ``max_drop`` of the original's metric, and the account of it. The model comes back as it was.

    ``without(names)`` gives the recipes when those layers stay float; ``snr`` each layer's own figure.

    The order is that of the layers' own error, noisiest first; how many must go is found by bisection, so that a model
    of 200 layers takes 8 measurements. The number that is returned was measured to hold; where the metric is not
    monotonous, a smaller one might do too.
    """
    active = [name for name, recipe in without([]).items() if recipe.scheme != "keep"]
    order = sorted(active, key=lambda name: snr.get(name, 0.0))
    if metric.prepare is not None:
        metric.prepare(model, batches)
    before = metric(model, batches)
    measured: dict[int, float] = {}

    def value(kept: int) -> float:
        if kept not in measured:
            measured[kept] = before if kept == len(order) else value_with(model, without(order[:kept]), metric, batches)
            step()
        return measured[kept]

    def holds(kept: int) -> bool:
        return metric.drop(before, value(kept)) <= max_drop

    first = value(0) if order else before
    kept = 0
    if order and not holds(0):
        low, high = 0, len(order)  # fails, holds
        while high - low > 1:
            middle = (low + high) // 2
            if holds(middle):
                high = middle
            else:
                low = middle
        kept = high
    return without(order[:kept]), BackOff(metric.name, before, first, value(kept) if order else before, order[:kept])


def value_with(model: nn.Module, recipes: dict[str, Recipe], metric: Metric, batches: Sequence[Any]) -> float:
    """The metric of ``model`` under ``recipes``. It comes back as it was."""
    with patched(model, recipes):
        return metric(model, batches)


@contextlib.contextmanager
def patched(model: nn.Module, recipes: Mapping[str, Recipe], place: Place | None = None) -> Iterator[None]:
    """``model`` under ``recipes``, its float weights in ``place`` (by default :func:`trial_place`). It comes back as it
    was, with the plan of layers that were int8 before.
    """
    from hwkern.patch import patch, unpatch

    wanted = {name: recipe for name, recipe in recipes.items() if recipe.scheme != "keep"}
    plan = model.__dict__.get("_hwkern_plan")
    patch(model, originals=place or trial_place(model), plan=_Recipes(wanted))
    try:
        yield
    finally:  # by a predicate: a name may hold what means something in a pattern
        unpatch(model, include=lambda name, _: name in wanted)
        if plan is not None:
            model.__dict__["_hwkern_plan"] = plan


def trial_place(model: nn.Module) -> Place:
    """Where the float weights wait while a plan is tried: where they are, if a GPU has room for both, else the host."""
    weights = [p for p in model.parameters() if p.dim() == 2 and p.is_floating_point()]
    return "device" if room_beside(weights) else "host"  # of a host tensor that is the tensor itself
