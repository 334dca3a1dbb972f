"""The work behind ``hwkern.plan``: observe, find and time the candidates, choose, check against task and clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hwkern import _batches, _fold, _native
from hwkern._back_off import back_off, value_with
from hwkern._choose import Candidate, Mode, Policy, threshold, total
from hwkern._console import progress
from hwkern._layers import Layer, Selector, tied
from hwkern._measure import Clock, Shape, bucket, kept_layers, stamp
from hwkern._observe import Seen, observe
from hwkern._recipes import Recipe, dtype_of, float_rows
from hwkern._tables import try_smaller, try_tables, with_their_tables
from hwkern._whole import check_whole, send_back
from hwkern.calibrate import (
    OBSERVERS,
    WORTH_DB,
    Judge,
    TableJudge,
    candidates,
    inputs,
    outliers,
    smooth,
    static,
    unusable,
)
from hwkern.metrics import Function, Metric, as_metric
from hwkern.nn import Calibration
from hwkern.nn.conv1d import conv1d_class
from hwkern.nn.pack import dtype_name
from hwkern.ops import padded
from hwkern.plan import Accuracy, Plan, PlannedLayer


@dataclass
class _Unit:
    """A layer, or all layers that share one weight: they get one recipe."""

    layers: list[Layer]
    shape: Shape
    calls: dict[int, int]
    lookups: dict[int, int]
    judges: list[Judge | TableJudge]

    @property
    def name(self) -> str:
        return self.layers[0].names[0]

    def snr(self, recipe: Recipe) -> float:
        return min(judge(recipe) for judge in self.judges)


def make_plan(
    model: nn.Module,
    batches: Iterable[Any],
    accuracy: Accuracy,
    policy: Policy,
    metric: Metric | Function | None,
    include: Selector | None,
    exclude: Selector | None,
    verify: bool,
    save: bool,
    show: bool,
    mode: Mode = "any",
    embeddings: bool = True,
) -> Plan:
    """See :func:`hwkern.plan.plan`."""
    from hwkern.patch import _check_model

    watch = _Stopwatch()
    _check_model(model, "plan")
    task = as_metric(metric)
    device = _batches.device_of(model)
    if device.type == "cuda" and (problem := _native.cuda_problem()) is not None:
        raise RuntimeError(f"The model is on {device}, where hwkern cannot run: {problem}")
    layers, left = candidates(model, include, exclude, embeddings)
    found = _batches.check(batches, device)
    with progress("Observing the layers' inputs", len(found), show) as step:
        seen = observe(model, layers, found, step)
    left |= with_their_tables(layers, unusable(layers, seen))
    watch.lap("observing")
    units = _units([layer for layer in layers if layer.names[0] not in left], seen)
    with progress("Measuring errors on your data", len(units), show) as step:
        holding = task is not None and accuracy.max_metric_drop is not None
        recipes, groups = _candidates(model, units, accuracy, holding or policy == "accurate", step)
    for unit in units:
        unit.judges.clear()  # the samples of a large model are gigabytes
    seen.clear()
    watch.lap("errors")
    clock = Clock(device, save, mode)
    planned = _timed(units, recipes, groups, clock, show)
    watch.lap("timing layers")
    result = Plan(type(model).__name__, stamp(device), policy, accuracy, planned, left, mode=mode)
    result.decide()
    try_tables(result, model, found)
    if task is not None and accuracy.max_metric_drop is not None:
        _hold_task(result, model, task, found, accuracy.max_metric_drop, show)
        watch.lap("the task")
    if verify:
        bound = accuracy.max_metric_drop

        def holds(trial: Plan) -> bool:
            """Whether the task holds with it too; its account then says with what."""
            if task is None or bound is None or trial.task is None:
                return True
            try:
                after = value_with(model, trial.recipes, task, found)
            except ValueError:  # a metric that is no number with it
                return False
            trial.task = replace(trial.task, after=after)
            return task.drop(trial.task.before, after) <= bound

        check_whole(result, model, found, clock.modes, show, holds)
        try_smaller(result, model, found, clock.modes, show, holds)
        watch.lap("the whole model")
    result.phases, result.seconds = watch.laps, round(sum(watch.laps.values()), 3)
    result.measured, result.reused = clock.measured, clock.reused
    return result


class _Stopwatch:
    """Seconds of the steps of a plan, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _units(layers: Sequence[Layer], seen: dict[str, Seen]) -> list[_Unit]:
    units = []
    for group in tied(layers):
        linears = [layer for layer in group if not layer.is_embedding]
        module = (linears or group)[0].module
        n, k = float_rows(module).shape
        conv1d = conv1d_class()
        kind = "Conv1D" if conv1d is not None and isinstance(module, conv1d) else "Linear"
        if not linears:
            kind = "Embedding"
        dtype = dtype_of(module)
        bias = module._parameters.get("bias") is not None
        calls: dict[int, int] = {}
        lookups: dict[int, int] = {}
        judges: list[Judge | TableJudge] = []
        for layer in group:
            what = seen[layer.names[0]]
            numbers = lookups if layer.is_embedding and linears else calls
            for m, count in what.calls.items():
                numbers[m] = numbers.get(m, 0) + count
            if what.sample is not None:
                judges.append((TableJudge if layer.is_embedding else Judge)(layer.module, what))
        units.append(_Unit(list(group), Shape(kind, n, k, dtype, bias), bucket(calls), bucket(lookups), judges))
    return units


# ---- which recipes, and how accurate each is ------------------------------------------------------------------------

_Measured = list[tuple[Recipe, float]]


def _candidates(
    model: nn.Module, units: Sequence[_Unit], accuracy: Accuracy, careful: bool, step: Callable[[], None]
) -> tuple[dict[str, _Measured], dict[str, str]]:
    """Recipes with their SNR for each unit, and the norm that each unit's folded recipes divide.

    ``careful``: with smoothing also where W8A8 is accurate enough without, though it costs a pass over the input.
    """
    by_name = {unit.name: unit for unit in units}
    alone = [unit.layers[0] for unit in units if len(unit.layers) == 1 and len(unit.layers[0].names) == 1]
    alone = [layer for layer in alone if not layer.is_embedding]
    norms = {name: group.norm_name for group in _fold.groups(model) for name in group.readers}
    found: dict[str, _Measured] = {}
    groups: dict[str, str] = {}
    for readers, foldable in inputs(model, alone):
        members = [by_name[layer.names[0]] for layer in readers]
        base = Calibration()
        if foldable:
            base, _ = smooth([cast(Judge, unit.judges[0]) for unit in members], folded=True)
        for unit in members:
            found[unit.name] = _family(unit, Calibration(), accuracy, careful and not base.smooth)
            if base.smooth:
                groups[unit.name] = norms[unit.name]
                found[unit.name] += _family(unit, base, accuracy, False)
            step()
    for unit in units:
        if unit.name not in found:  # shares its weight: nothing that depends on one layer's own input
            schemes = ("int8",) if unit.shape.kind == "Embedding" else ("w8a8", "w8a16")
            found[unit.name] = [(r, unit.snr(r)) for r in map(Recipe, schemes)]
            step()
    return found, groups


#: A zero point is tried where it makes the steps finer by what is worth a candidate.
_FINER = 10 ** (-WORTH_DB / 20)


def _family(unit: _Unit, base: Calibration, accuracy: Accuracy, careful: bool) -> _Measured:
    """The recipes on top of ``base`` (plain, or a folded smoothing); ``careful`` as above."""
    judge = cast(Judge, unit.judges[0])
    found: _Measured = []

    def add(*options: Recipe) -> float:
        """Keeps the most accurate of options that take the same time."""
        snr, _, recipe = max((judge(option), -i, option) for i, option in enumerate(options))
        found.append((recipe, snr))
        return snr

    dynamic = add(Recipe("w8a8", base))
    add(Recipe("w8a16", base))
    ranges = [static(judge.seen, observer, False, base) for observer in OBSERVERS]
    fixed = add(*(Recipe("w8a8-static", calibration) for calibration in ranges))
    shifted = [
        calibration
        for calibration, even in zip((static(judge.seen, o, True, base) for o in OBSERVERS), ranges, strict=True)
        if calibration.zero_point and cast(float, calibration.scale) < cast(float, even.scale) * _FINER
    ]
    if shifted:
        add(*(Recipe("w8a8-asymmetric", calibration) for calibration in shifted))
        if found[-1][1] <= fixed:
            found.pop()  # it costs at least as much time
    needed = dynamic < accuracy.min_snr_db and not base.smooth
    if needed or careful:
        explicit, _ = smooth([judge], folded=False)
        if explicit.smooth:
            add(Recipe("w8a8", explicit))
    if needed:
        beside = outliers(judge, Calibration())
        if beside.outliers:
            add(Recipe("w8a8", beside))
    return found


#: Timed for every shape, candidate or not: another model of the same shapes then finds all it needs in the cache.
_ALWAYS = ("keep", "w8a8", "w8a16", "w8a8-static", "w8a8-asymmetric")
_TABLE = ("keep", "int8")

# ---- times ----------------------------------------------------------------------------------------------------------


def _timed(
    units: Sequence[_Unit], recipes: dict[str, _Measured], groups: dict[str, str], clock: Clock, show: bool
) -> dict[str, PlannedLayer]:
    wanted: dict[tuple[Shape, int], dict[str, None]] = {}
    for unit in units:
        for m in unit.calls:
            always = _TABLE if unit.shape.kind == "Embedding" else _ALWAYS
            names = wanted.setdefault((unit.shape, m), dict.fromkeys(always))
            names |= {recipe.timing: None for recipe, _ in recipes[unit.name]}
        for m in unit.lookups:
            wanted.setdefault((unit.shape.table, m), dict.fromkeys(_TABLE))
    with kept_layers(), progress("Timing layers", len(wanted), show) as step:
        for (shape, m), names in wanted.items():
            clock.measure(shape, m, list(names))
            step()
    return {unit.name: _planned(unit, recipes[unit.name], groups.get(unit.name, ""), clock) for unit in units}


def _planned(unit: _Unit, measured: _Measured, group: str, clock: Clock) -> PlannedLayer:
    shape = unit.shape

    def times(timing: str) -> dict[str, dict[int, float]]:
        return _times(clock, shape, unit.calls, unit.lookups, timing)

    found = [Candidate(Recipe("keep"), float("inf"), _float_bytes(unit), times("keep"))]
    found += [Candidate(r, snr, _int8_bytes(unit, r), times(r.timing)) for r, snr in measured]
    found += _dispatching(found, unit.calls)
    return PlannedLayer(
        names=tuple(layer.names[0] for layer in unit.layers),
        kind=shape.kind,
        n=shape.n,
        k=shape.k,
        dtype=dtype_name(shape.dtype),
        bias=shape.bias,
        calls=unit.calls,
        candidates=found,
        group=group,
        lookups=unit.lookups,
    )


def _times(
    clock: Clock, shape: Shape, calls: dict[int, int], lookups: dict[int, int], timing: str
) -> dict[str, dict[int, float]]:
    """Mode → tokens → µs of one call. What an embedding with the same weight takes is shared out over the calls."""

    def beside(mode: str) -> float:
        table = "keep" if timing == "keep" else "int8"
        spent = sum(clock.us(shape.table, m, table, mode) * count for m, count in lookups.items())
        return spent / max(1, sum(calls.values()))

    return {mode: {m: clock.us(shape, m, timing, mode) + beside(mode) for m in calls} for mode in clock.modes}


def _dispatching(found: Sequence[Candidate], calls: dict[int, int]) -> list[Candidate]:
    """W8A16 for few tokens and W8A8 for many, where each is the faster one somewhere: times and error follow."""
    made = []
    for few in (c for c in found if c.recipe.scheme == "w8a16"):
        many = next(
            (c for c in found if c.recipe == replace(few.recipe, scheme="w8a8")),
            None,
        )
        split = None if many is None else threshold(few, many, calls)
        if many is None or split is None:
            continue
        us = {mode: {m: (few if m <= split else many).us[mode][m] for m in calls} for mode in few.us}
        recipe = replace(few.recipe, scheme="w8a16/w8a8", max_tokens=split)
        made.append(Candidate(recipe, min(few.snr_db, many.snr_db), few.weight_bytes, us))
    return made


def _bias_bytes(unit: _Unit) -> int:
    biases = [cast("Tensor | None", layer.module._parameters.get("bias")) for layer in unit.layers]
    return sum(bias.numel() * bias.element_size() for bias in biases if bias is not None)


def _float_bytes(unit: _Unit) -> int:
    return unit.shape.n * unit.shape.k * unit.shape.dtype.itemsize + _bias_bytes(unit)


def _int8_bytes(unit: _Unit, recipe: Recipe) -> int:
    shape, calibration = unit.shape, recipe.calibration
    size = shape.n * padded(shape.k) + 4 * shape.n + _bias_bytes(unit)
    size += calibration.scale is not None and 4 * shape.n + 4  # output_scale, input_scale
    size += calibration.zero_point != 0 and 4 * shape.n
    size += bool(calibration.smooth) and not calibration.folded and 4 * shape.k
    return size + len(calibration.outliers) * (8 + shape.n * shape.dtype.itemsize)


# ---- the task -------------------------------------------------------------------------------------------------------


def _hold_task(
    result: Plan, model: nn.Module, task: Metric, batches: Sequence[Any], max_drop: float, show: bool
) -> None:
    """Send layers back to float until the task holds; or, where that is faster, take the accurate recipes first.

    The plan's policy is then "accurate", so that whatever decides again, on another GPU or without a folding, does it
    by what the task was tried with. Tables stay what they were. Not with "smallest", which does not ask for time.
    """
    _send_back_for(result, model, task, batches, max_drop, show)
    if result.task is None or not result.task.kept or result.policy not in ("balanced", "fastest"):
        return
    accurate = result._copy(policy="accurate")
    accurate.decide()
    for name, layer in result.layers.items():
        if layer.kind == "Embedding":
            accurate.layers[name] = replace(layer)
    faster = _us(accurate) < _us(result)  # what goes back only adds time
    if faster:
        try:
            _send_back_for(accurate, model, task, batches, max_drop, show)
        except ValueError:  # a metric that is no number with them
            faster = False
    if faster and _us(accurate) < _us(result):
        result.layers, result.task, result.policy = accurate.layers, accurate.task, accurate.policy
    else:
        _settle(result)


def _send_back_for(
    result: Plan, model: nn.Module, task: Metric, batches: Sequence[Any], max_drop: float, show: bool
) -> None:
    snr = {name: layer.choice.snr_db for layer in result.layers.values() for name in layer.names}

    def without(kept: Sequence[str]) -> dict[str, Recipe]:
        trial = result._copy()
        send_back(trial, kept, "")  # for its recipes only
        return trial.recipes

    with progress(f"Holding {task.name}", max(1, len(snr).bit_length()), show) as step:
        _, result.task = back_off(model, without, snr, task, batches, max_drop, step)
    _settle(result)


def _settle(result: Plan) -> None:
    """Decide again, with what the task sends back: trials have written reasons of their own."""
    result.decide()
    if result.task is not None:
        send_back(result, result.task.kept, f"back to float for the {result.task.metric}'s sake")


def _us(result: Plan) -> float:
    """Of all layers' calls, by their own times."""
    layers = result.layers.values()
    return sum(total(times, layer.calls) for layer in layers for times in layer.choice.us.values())


# ---- another device -------------------------------------------------------------------------------------------------


def retime(old: Plan, model: nn.Module, show: bool) -> Plan:
    """``old`` with every candidate timed where ``model`` is, and chosen anew; errors and calls stay.

    Without batches the whole model cannot be timed: what was int8 because that is not slower, though slower alone, goes
    back to float, and its reason says so.
    """
    device = _batches.device_of(model)
    clock = Clock(device, mode=old.mode)
    layers = {}
    wanted = sum(len(layer.calls) for layer in old.layers.values())
    with kept_layers(), progress("Timing layers", wanted, show) as step:
        for name, layer in old.layers.items():
            dtype = getattr(torch, layer.dtype)
            shape = Shape(layer.kind, layer.n, layer.k, dtype, layer.bias)
            plain = [c for c in layer.candidates if c.recipe.scheme != "w8a16/w8a8"]
            for m in layer.calls:
                clock.measure(shape, m, [c.recipe.timing for c in plain])
                step()
            for m in layer.lookups:
                clock.measure(shape.table, m, _TABLE)
            timed = [replace(c, us=_times(clock, shape, layer.calls, layer.lookups, c.recipe.timing)) for c in plain]
            layers[name] = replace(layer, candidates=[*timed, *_dispatching(timed, layer.calls)], chosen=0)
    made = replace(old, device=stamp(device), layers=layers, whole={}, measured=clock.measured, reused=clock.reused)
    _settle(made)
    for name, layer in made.layers.items():
        if old.layers[name].chosen and not layer.chosen:
            layer.reason += f"; {old._place} had {old.layers[name].choice.name} ({old.layers[name].reason})"
            layer.reason += "; plan on this device to have the whole model tried with it"
    return made
