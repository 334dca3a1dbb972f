"""``plan``: which scheme for which layer on this device, by measured time and measured error on the user's batches.

``hwkern.plan(model, batches)`` measures and touches nothing; ``print(plan)``, ``plan.explain(layer)``, ``plan.save``;
``hwkern.patch(model, plan=plan)`` carries it out.
"""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from hwkern._back_off import BackOff
from hwkern._choose import MODES, POLICIES, Candidate, Mode, Policy, choose, score, total
from hwkern._console import plain_table
from hwkern._layers import Selector, find_layers
from hwkern._recipes import Recipe
from hwkern.metrics import Function, Metric

#: Of the JSON layout; a newer one is refused.
PLAN_FORMAT = 1


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit this model or device."""


@dataclass(frozen=True)
class Accuracy:
    """What a plan must hold.

    Attributes:
        min_snr_db: least signal-to-noise ratio of any int8 layer's output, in dB (20: a relative error of 10 %).
        max_metric_drop: most that the metric may get worse; in the metric's own unit, or relative (perplexity).
    """

    min_snr_db: float = 20.0
    max_metric_drop: float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.min_snr_db, (int, float)) and math.isfinite(self.min_snr_db)):
            raise ValueError(f"min_snr_db = {self.min_snr_db!r}: it must be a number.")
        drop = self.max_metric_drop
        if drop is not None and not (isinstance(drop, (int, float)) and drop >= 0):
            raise ValueError(f"max_metric_drop = {drop!r}: it must be a number of at least 0.")


@dataclass
class PlannedLayer:
    """One layer (or several that share a weight): what was seen, what was measured, what was chosen."""

    names: tuple[str, ...]
    kind: str
    n: int
    k: int
    dtype: str
    bias: bool
    calls: dict[int, int]  #: tokens → calls over all batches
    candidates: list[Candidate]  #: the first is "keep"
    chosen: int = 0
    reason: str = ""
    group: str = ""  #: the norm that folding would divide for this layer and its siblings
    lookups: dict[int, int] = field(default_factory=dict)  #: of embeddings that share the weight: tokens → calls

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def choice(self) -> Candidate:
        return self.candidates[self.chosen]

    def speedup(self) -> float:
        """The float layer's time over the chosen one's, over all calls and modes."""
        return 1 / score(self.choice, self.candidates[0], self.calls) if self.calls else 1.0


@dataclass
class Plan:
    """The outcome of :func:`plan`."""

    model: str  #: class of the model
    device: dict[str, Any]  #: what the times hold for
    policy: Policy
    accuracy: Accuracy
    layers: dict[str, PlannedLayer]
    left: dict[str, str]  #: linear layers that were never candidates, with the reason
    task: BackOff | None = None
    whole: dict[str, Any] = field(default_factory=dict)  #: the model's own time before and with the plan
    seconds: float = 0.0
    measured: int = 0  #: recipes timed now
    reused: int = 0  #: recipes whose times the cache had
    mode: Mode = "any"  #: the way of running that it is for
    phases: dict[str, float] = field(default_factory=dict)  #: what the seconds went to

    # ---- what hwkern.patch uses ------------------------------------------------------------------------------------

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Name → recipe, the kept layers included."""
        return {name: layer.choice.recipe for layer in self.layers.values() for name in layer.names}

    def check(self, model: nn.Module) -> None:
        """PlanError, with the difference, when this plan is for another model or another device."""
        self.check_model(model)
        first = next(model.parameters(), None)
        if first is None or first.is_meta:
            return
        from hwkern._measure import IDENTITY, stamp

        here = stamp(first.device)
        different = [key for key in IDENTITY if here.get(key) != self.device.get(key)]
        if different:
            mine = ", ".join(f"{key} {self.device.get(key)!r}" for key in different)
            theirs = ", ".join(f"{key} {here.get(key)!r}" for key in different)
            raise PlanError(
                f"The plan was measured on another device: {mine}, here {theirs}. Plan again, or pass "
                "allow_other_gpu=True to have its candidates timed here."
            )

    def check_model(self, model: nn.Module) -> None:
        """PlanError when the model's linear layers are not those of the plan. Embeddings that it lacks stay float."""
        from hwkern.patch import _sizes

        found = {layer.names[0]: layer for layer in find_layers(model, embeddings=True)}
        known = {name for layer in self.layers.values() for name in layer.names} | set(self.left)
        if missing := [name for name in known if name not in found]:
            raise PlanError(
                f"The plan is for another model ({self.model}): it knows the layer {sorted(missing)[0]!r}, which this "
                f"{type(model).__name__} has not ({len(missing)} such layers)."
            )
        if extra := [name for name, layer in found.items() if name not in known and not layer.is_embedding]:
            raise PlanError(
                f"The plan is for another model ({self.model}): this {type(model).__name__} has the layer "
                f"{extra[0]!r}, which it does not know ({len(extra)} such layers)."
            )
        for layer in self.layers.values():
            for name in layer.names:
                module = found[name].module
                weight: Any = module._parameters.get("weight")
                here = (*_sizes(module), str(weight.dtype).removeprefix("torch.") if weight is not None else "")
                if here != (layer.n, layer.k, layer.dtype) and here[2] != "int8":
                    raise PlanError(
                        f"The plan is for another model: {name!r} is {layer.k} → {layer.n} {layer.dtype} in it, but "
                        f"{here[1]} → {here[0]} {here[2]} here."
                    )

    def for_device(self, model: nn.Module, show: bool = True) -> Plan:
        """This plan with its candidates timed again where ``model`` is now, and chosen anew.

        By their own times alone: the whole model is not run, which takes batches, and so a new plan. Of a layer or
        table that goes back to float, :meth:`explain` says why it was int8.
        """
        from hwkern._planner import retime

        self.check_model(model)
        return retime(self, model, show)

    def decide(self) -> None:
        """Choose for every layer, from the numbers that are there. Layers of one norm are folded together or not."""
        for layer in self.layers.values():
            self._decide(layer, folded=True)
        groups: dict[str, list[PlannedLayer]] = {}
        for layer in self.layers.values():
            if layer.group:
                groups.setdefault(layer.group, []).append(layer)
        for members in groups.values():
            if not all(member.choice.recipe.calibration.folded for member in members):
                for member in members:
                    self._decide(member, folded=False)

    def _copy(self, **changes: Any) -> Plan:
        """One whose layers can be decided otherwise; their candidates are the same ones."""
        return replace(self, layers={name: replace(layer) for name, layer in self.layers.items()}, **changes)

    def _decide(self, layer: PlannedLayer, folded: bool) -> None:
        """``folded``: whether, where there are candidates with a divided norm, only those count (or none of them)."""
        if len(layer.candidates) == 1 and layer.reason:  # it was decided for good, and why
            return
        divided = [c for c in layer.candidates[1:] if c.recipe.calibration.folded]
        plain = [c for c in layer.candidates[1:] if not c.recipe.calibration.folded]
        pool, rest = (divided, plain) if folded and divided else (plain, divided)
        chosen, layer.reason = choose(
            [layer.candidates[0], *pool],
            layer.calls,
            self.accuracy.min_snr_db,
            self.policy,
            for_bytes=layer.kind == "Embedding",
        )
        for candidate in rest:
            candidate.ruled_out = "the norm is divided" if folded and divided else "the norm stays as it is"
        layer.chosen = layer.candidates.index(chosen)

    # ---- what people read ------------------------------------------------------------------------------------------

    def explain(self, name: str) -> str:
        """The candidates of one layer with their times and errors, and why the choice fell as it did."""
        layer = next((layer for layer in self.layers.values() if name in layer.names), None)
        if layer is None:
            if name in self.left:
                return f"{name}: left as it is, {self.left[name]}."
            import difflib

            close = difflib.get_close_matches(name, [*self.layers, *self.left], n=3, cutoff=0.3)
            raise KeyError(f"The plan has no layer {name!r}; close to it: {', '.join(close) or 'none'}.")
        keep = layer.candidates[0]
        rows = []
        for candidate in sorted(layer.candidates, key=lambda c: score(c, keep, layer.calls) if layer.calls else 1.0):
            times = [f"{candidate.us[mode][m]:.1f}" for mode in keep.us for m in layer.calls]
            ratio = f"{score(candidate, keep, layer.calls):.2f}" if layer.calls else ""
            snr = "" if math.isinf(candidate.snr_db) else f"{candidate.snr_db:.1f}"
            why = "← chosen" if candidate is layer.choice else candidate.ruled_out
            rows.append([candidate.name, *times, ratio, snr, f"{candidate.weight_bytes / 1e6:.2f}", why])
        heads = [f"{mode} µs, M={m}" for mode in keep.us for m in layer.calls]
        calls = ", ".join(f"{count}× {m}" for m, count in layer.calls.items()) or "none"
        size = f"{layer.n} × {layer.k}" if layer.kind == "Embedding" else f"{layer.k} → {layer.n}"
        if layer.lookups:
            calls += "; its embedding's: " + ", ".join(f"{count}× {m}" for m, count in layer.lookups.items())
        title = (
            f"{', '.join(layer.names)}: {layer.kind} {size}, {layer.dtype}. Calls × tokens: {calls}.\n"
            f"{layer.choice.name}: {layer.reason}."
        )
        table = plain_table("", ["scheme", *heads, "of float", "dB", "MB", ""], rows)
        return f"{title}\n{table.lstrip()}"

    @property
    def _place(self) -> str:
        """The name of the device that it was measured on."""
        return str(self.device.get("gpu") or self.device.get("cpu") or self.device.get("device"))

    def __str__(self) -> str:
        rows: dict[tuple[str, ...], list[PlannedLayer]] = {}
        for layer in self.layers.values():
            sides = (layer.n, layer.k) if layer.kind == "Embedding" else (layer.k, layer.n)
            key = (layer.choice.name, f"{sides[0]} × {sides[1]}", layer.dtype)
            rows.setdefault(key, []).append(layer)
        cells = []
        for (name, size, dtype), members in rows.items():
            keep = sum(total(times, m.calls) for m in members for times in m.candidates[0].us.values())
            now = sum(total(times, m.calls) for m in members for times in m.choice.us.values())
            snr = min(m.choice.snr_db for m in members)
            example = members[0].name if len(members) == 1 else f"{members[0].name} … ({len(members)})"
            gain = f"{keep / now:.2f}×" if now else ""
            cells.append([example, size, dtype, name, gain, "" if math.isinf(snr) else f"{snr:.1f}"])
        lines = [
            f"Plan for {self.model} on {self._place}, policy {self.policy}, at least {self.accuracy.min_snr_db:g} dB:",
            plain_table("", ["layer", "in × out", "dtype", "scheme", "speed", "worst dB"], cells, 4).strip("\n"),
        ]
        before = sum(layer.candidates[0].weight_bytes for layer in self.layers.values())
        after = sum(layer.choice.weight_bytes for layer in self.layers.values())
        int8 = sum(layer.chosen != 0 for layer in self.layers.values())
        kept = len(self.layers) - int8
        lines.append(
            f"{int8} layers int8, {kept} kept by measurement, {len(self.left)} left; their weights "
            f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB."
        )
        if self.whole:
            lines.append(str(self.whole["text"]))
        if self.task is not None:
            task = self.task
            back = f"; back to float for it: {', '.join(task.kept)}" if task.kept else ""
            lines.append(f"{task.metric}: {task.before:.6g} -> {task.after:.6g}{back}.")
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        known = f"{self.measured} times measured, {self.reused} known"
        lines.append(f"Took {self.seconds:.1f} s{f' ({spent})' if spent else ''}: {known}.")
        return "\n".join(lines)

    # ---- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""

        def candidate(c: Candidate) -> dict[str, Any]:
            us = {mode: {str(m): value for m, value in times.items()} for mode, times in c.us.items()}
            snr = None if math.isinf(c.snr_db) and c.snr_db > 0 else max(c.snr_db, -1e9)
            return {
                "recipe": c.recipe.to_dict(),
                "snr_db": snr,
                "weight_bytes": c.weight_bytes,
                "us": us,
                "ruled_out": c.ruled_out,
            }

        layers = []
        for layer in self.layers.values():
            data = {
                key: getattr(layer, key) for key in ("kind", "n", "k", "dtype", "bias", "chosen", "reason", "group")
            }
            data |= {"names": list(layer.names), "calls": {str(m): count for m, count in layer.calls.items()}}
            if layer.lookups:
                data["lookups"] = {str(m): count for m, count in layer.lookups.items()}
            layers.append({**data, "candidates": [candidate(c) for c in layer.candidates]})
        return {
            "format": PLAN_FORMAT,
            "model": self.model,
            "device": self.device,
            "policy": self.policy,
            "accuracy": asdict(self.accuracy),
            "layers": layers,
            "left": self.left,
            "task": None if self.task is None else asdict(self.task),
            "whole": self.whole,
            "seconds": self.seconds,
            "measured": self.measured,
            "reused": self.reused,
            "mode": self.mode,
            "phases": self.phases,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; whole or not at all."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`. PlanError, with the place, for anything that no plan is."""
        where = "the plan"
        try:
            version = data["format"]
            if not isinstance(version, int) or version > PLAN_FORMAT:
                raise PlanError(f"The plan has the format {version!r}; this hwkern reads up to {PLAN_FORMAT}.")
            if data["policy"] not in POLICIES:
                raise ValueError(f"the policy is {data['policy']!r}")
            mode = data.get("mode", "any")
            if mode not in MODES:
                raise ValueError(f"the mode is {mode!r}")
            layers = {}
            for entry in data["layers"]:
                where = f"layer {entry['names'][0]!r}"
                layer = _layer(entry)
                if layer.name in layers:
                    raise ValueError("it stands there twice")
                layers[layer.name] = layer
            where = "the plan"
            task = None if data["task"] is None else BackOff(**data["task"])
            return cls(
                model=str(data["model"]),
                device=dict(data["device"]),
                policy=data["policy"],
                accuracy=Accuracy(**data["accuracy"]),
                layers=layers,
                left={str(name): str(why) for name, why in data["left"].items()},
                task=task,
                whole=_whole(data["whole"]),
                seconds=float(data["seconds"]),
                measured=int(data["measured"]),
                reused=int(data["reused"]),
                mode=mode,
                phases={str(name): float(value) for name, value in data.get("phases", {}).items()},
            )
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            raise PlanError(f"This is no plan: {where}: {type(error).__name__}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote. PlanError for a file that is none."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{os.fspath(path)} is no plan: it is no JSON ({error}).") from error
        if not isinstance(data, dict):
            raise PlanError(f"{os.fspath(path)} is no plan: it is a {type(data).__name__}.")
        return cls.from_dict(data)


def _whole(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was read of the whole model, where anything was: a sentence, and ms of every batch before and after."""
    whole = dict(data)
    if whole:
        sides = [[float(ms) for ms in whole[key]] for key in ("before_ms", "after_ms")]
        if not isinstance(whole["text"], str) or not all(side and 0 < sum(side) < math.inf for side in sides):
            raise ValueError(f"of the whole model it says {whole}")
    return whole


def _layer(data: Mapping[str, Any]) -> PlannedLayer:
    n, k = int(data["n"]), int(data["k"])
    calls = {int(m): int(count) for m, count in data["calls"].items()}
    lookups = {int(m): int(count) for m, count in data.get("lookups", {}).items()}
    if min(n, k) < 1 or any(m < 1 or count < 1 for m, count in (*calls.items(), *lookups.items())):
        raise ValueError(f"sizes {n} × {k}, calls {calls}, lookups {lookups}")
    candidates = []
    for entry in data["candidates"]:
        recipe = Recipe.from_dict(entry["recipe"])
        recipe.check(k)
        us = {mode: {int(m): float(value) for m, value in times.items()} for mode, times in entry["us"].items()}
        for mode, times in us.items():
            if set(times) != set(calls) or not all(0 < value < math.inf for value in times.values()):
                raise ValueError(f"times of {recipe.name} ({mode}): {times} for the calls {calls}")
        snr = math.inf if entry["snr_db"] is None else float(entry["snr_db"])
        if math.isnan(snr):
            raise ValueError(f"snr_db of {recipe.name} is NaN")
        candidates.append(Candidate(recipe, snr, int(entry["weight_bytes"]), us, str(entry["ruled_out"])))
    if not candidates or candidates[0].recipe.scheme != "keep":
        raise ValueError("its first candidate is not 'keep'")
    if len({frozenset(c.us) for c in candidates}) > 1:
        raise ValueError("its candidates were timed in different modes")
    chosen = int(data["chosen"])
    if not 0 <= chosen < len(candidates):
        raise ValueError(f"chosen = {chosen} of {len(candidates)} candidates")
    names = tuple(str(name) for name in data["names"])
    text = (str(data["kind"]), n, k, str(data["dtype"]), bool(data["bias"]))
    return PlannedLayer(names, *text, calls, candidates, chosen, str(data["reason"]), str(data["group"]), lookups)


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    accuracy: Accuracy | None = None,
    policy: Policy = "balanced",
    mode: Mode = "any",
    metric: Metric | Function | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    verify: bool = True,
    save: bool = True,
    show: bool = True,
    embeddings: bool = True,
) -> Plan:
    """Find the best scheme for every linear layer on this device, for these batches. Touches nothing.

    Runs the batches once and notes how many tokens each layer gets and what its inputs look like; times the float layer
    and every int8 scheme for each distinct size once (the times are kept for later processes); measures each
    scheme's error on the layer's own inputs; and chooses. A layer stays float unless a scheme within the bound is
    faster by measurement, at every number of tokens that matters and, on a GPU, both eager and in a CUDA graph; or
    unless the whole model, measured likewise, is faster with it: with the layer fused to its neighbours, or with one
    that only costs the host more time in eager calls.

    Args:
        batches: what the model is called with: tensors, tuples of arguments, or dicts. Their numbers of tokens are
            what the plan is made for.
        accuracy: the bounds; 20 dB for each layer by default.
        policy: "fastest", "balanced" (the most accurate within 5 % of the fastest), "accurate" (the fastest within 1 dB
            of the most accurate that is still faster than float), or "smallest".
        mode: how the model will run on a GPU: "eager" (calls from Python), "graph" (in CUDA graphs, or compiled to
            them), or "any": slower in neither.
        metric: with ``accuracy.max_metric_drop``: layers go back to float until the task's own figure holds.
        include, exclude: as in :func:`hwkern.patch`.
        verify: time the whole model with and without the plan at the end, drop what does not pay, and try there what
            only the whole model can tell.
        save: keep the measured times in the user's cache folder.
        show: progress bars on stderr.
        embeddings: plan them too: a table becomes int8 for the memory where its rows hold the bound and looking them up
            is not slower, or the whole model is not (with ``verify``; not with policy "accurate"). One that shares its
            weight with the output head is planned with it, as one layer; where it is kept, so is the head. False leaves
            both alone.

    Raises:
        ValueError: batches that are empty or ragged, a metric that returns NaN, options that cannot be.
        RuntimeError: the model is on a GPU where the kernels cannot run.
    """
    from hwkern._planner import make_plan

    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: it must be one of {', '.join(POLICIES)}.")
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: it must be one of {', '.join(MODES)}.")
    bounds = accuracy or Accuracy()
    if bounds.max_metric_drop is not None and metric is None:
        raise ValueError("max_metric_drop needs a metric: pass metric=, a function (model, batches) -> float.")
    return make_plan(model, batches, bounds, policy, metric, include, exclude, verify, save, show, mode, embeddings)


class _CallableModule(types.ModuleType):
    """``hwkern.plan`` is the function, but importing this file binds that name to the module: both can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        return plan(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
