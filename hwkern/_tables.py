"""Embeddings in a plan: tables and the heads that share their weight, whether the model can do with int8 ones, and
whether it takes longer with them.

A lookup in an int8 table reads half of the bytes, and in an eager call takes the host about as long as torch's: what it
adds to a model, or saves, is a few microseconds, which no timing of a model's calls shows. (By such timings two tables
cost a small BERT on an H100 1.2 ± 0.4 % of 2.1 ms, when lookups were in Python, and one cost an OPT 0.0 ± 0.3 %.) So
where a table is slower alone the model is run as planned, and its lookups are timed inside of it, where their code is
cold.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._choose import Candidate, score, slower_lookups
from hwkern._console import progress
from hwkern._layers import Layer, find_layers, tied
from hwkern._observe import evaluating
from hwkern._timing import in_turn, lower_quartile
from hwkern.nn.packed import PackedLayer

if TYPE_CHECKING:
    from hwkern._whole import Graphs
    from hwkern.plan import Plan

#: The model's output with int8 tables must have this signal-to-noise ratio (dB). A table's own rounding costs some
#: 40 dB; what falls below this reads the table's weight, or its dtype, somewhere beside calling it.
LEAST_DB = 10.0
ROWS = 64  # of the output, some more at most
#: The model is timed with tables of both kinds in turn, call by call: so many seconds of each for all
#: batches, and so many calls of a batch.
SECONDS, ROUNDS = 0.12, (5, 160)
#: So many such readings at most, whose calls count together; they end when the ratios are so many standard errors away
#: from what is allowed.
READINGS, SURE = 8, 3.0


def with_their_tables(layers: Sequence[Layer], unusable: dict[str, str]) -> dict[str, str]:
    """``unusable`` for layers that share a weight with an embedding: all of them, or none.

    A table that no batch reached goes with what shares its weight (T5 holds one table in four places, and calls two).
    """
    found = dict(unusable)
    for group in tied(layers):
        if not any(layer.is_embedding for layer in group) or len(group) < 2:
            continue
        names = [layer.names[0] for layer in group]
        reached = any(layer.is_embedding and layer.names[0] not in unusable for layer in group)
        for layer in group:
            if layer.is_embedding and reached and unusable.get(layer.names[0]) == "no batch reached it":
                del found[layer.names[0]]
        if bad := next((name for name in names if name in found), None):
            for name in names:
                found.setdefault(name, f"it shares its weight with {bad!r}: {found[bad]}")
    return found


def _sample(output: Any) -> Tensor:
    """Some rows of the main output as float32, so that the logits of a long prompt fit beside the model."""
    found = _batches.main_output(output)
    rows = found.reshape(-1, found.shape[-1]) if found.dim() else found.reshape(1, 1)
    return rows[:: max(1, rows.shape[0] // ROWS)].float()


def try_tables(result: Plan, model: nn.Module, batches: Sequence[Any]) -> None:
    """Run the first batch with int8 tables: all that the plan has, and then all others that it may come to have, in a
    trial of the whole model or on another device. Where the model cannot, they stay float, all of them.
    """
    from hwkern._back_off import patched

    tables = [layer for layer in result.layers.values() if layer.lookups or layer.kind == "Embedding"]
    chosen = {layer.name: layer.choice for layer in tables if layer.chosen}
    others = {
        layer.name: candidate
        for layer in tables
        if not layer.chosen and layer.calls and not (layer.kind == "Embedding" and result.policy == "accurate")
        for candidate in layer.candidates[1:]
        if candidate.snr_db >= result.accuracy.min_snr_db
    }
    with torch.no_grad(), evaluating(model):
        exact = _exact(model, batches[0]) if chosen or others else None
        for trial in (chosen, others):
            if not trial:
                continue
            recipes = {name: each.recipe for first, each in trial.items() for name in result.layers[first].names}
            with patched(model, recipes):
                problem = _problem(model, batches[0], exact)
            if problem:
                _give_up(result, list(trial), problem)


def _exact(model: nn.Module, batch: Any) -> Tensor | None:
    """Some of its output with float tables; None without a float tensor: then only whether it runs at all counts."""
    try:
        return _sample(_batches.call(model, batch))
    except ValueError:
        return None


def _problem(model: nn.Module, batch: Any, exact: Tensor | None) -> str:
    """Why the model, with int8 tables, cannot do with them; empty where it can."""
    from hwkern.calibrate import snr_db

    try:
        output = _batches.call(model, batch)
        if exact is not None and bool(exact.isfinite().all()):
            found = snr_db(exact, _sample(output))
            return f"the model's output has {found:.1f} dB with it" if found < LEAST_DB else ""
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
        first = (str(error).splitlines() or [""])[0]
        return f"the model does not run with it ({type(error).__name__}: {first[:100]})"
    return ""


def _give_up(result: Plan, names: Sequence[str], problem: str) -> None:
    """They stay float for good: no other times, no bound and no trial of the whole model may choose one again."""
    from hwkern._whole import send_back

    send_back(result, names, f"{problem}: it reads the weight itself")
    for name in names:
        del result.layers[name].candidates[1:]


# ---- for their bytes ------------------------------------------------------------------------------------------------


def try_smaller(
    result: Plan,
    model: nn.Module,
    batches: Sequence[Any],
    modes: Sequence[str],
    show: bool,
    holds: Callable[[Plan], bool],
) -> None:
    """Make the tables int8 that alone are slower so, where the whole model, as planned, is not: for half of the bytes.

    All of them or none: where the batches take no more than 0.5 % longer on average and none more than 1.5 %, in each
    mode in which a lookup alone is slower and that the model can be timed in, and with policy "fastest" on average not
    longer at all. Not with "accurate". A table that shares its weight with a head goes with that. ``holds``: whether
    the task holds with a plan that is to be taken instead of ``result``.
    """
    from hwkern._whole import distinct, note_tables

    held = set() if result.task is None else set(result.task.kept)
    tables: dict[str, Candidate] = {}
    slower: set[str] = set()
    for layer in result.layers.values():
        if layer.kind != "Embedding" or not layer.calls or layer.chosen or set(layer.names) & held:
            continue
        for candidate in layer.candidates[1:]:
            # What is not slower alone and not chosen went back to float for another reason.
            where = slower_lookups(candidate, layer.candidates[0], layer.calls, result.policy)
            if where and candidate.snr_db >= result.accuracy.min_snr_db:
                tables[layer.name] = candidate
                slower.update(where)
    if not tables or result.policy == "accurate":
        return
    modes = [mode for mode in modes if mode in slower]
    trial = result._copy()
    for name, candidate in tables.items():
        trial.layers[name].chosen = trial.layers[name].candidates.index(candidate)
    places = {name for first in tables for name in trial.layers[first].names}
    with _both_tables(model, trial, places) as both, torch.no_grad(), evaluating(model):
        effects = _effects(model, both, distinct(batches), modes, show)
    if why := _slower(trial, tables, effects, modes) or ("" if holds(trial) else "the task does not hold with it"):
        for name, candidate in tables.items():
            candidate.ruled_out = why
            result.layers[name].reason += f"; {why}"
        return
    said = ", ".join(f"{_mean(each):.3f}× ({mode})" for mode, each in effects.items())
    for name, candidate in tables.items():
        layer = trial.layers[name]
        keep = layer.candidates[0]
        candidate.ruled_out, keep.ruled_out = "", f"{candidate.name} is smaller, and the whole model is not slower"
        layer.reason = (
            f"{candidate.weight_bytes / keep.weight_bytes:.2f}× the bytes at {candidate.snr_db:.1f} dB; alone "
            f"{score(candidate, keep, layer.calls):.2f}× the time, but the whole model takes {said} with it"
        )
    result.layers, result.task = trial.layers, trial.task
    if result.whole:  # timed with the float tables
        what = f"{len(tables)} more embedding{'s' if len(tables) > 1 else ''} in int8, by their own trial {said}"
        note_tables(result, what, {mode: [effect.ratio for effect in each] for mode, each in effects.items()})


def _slower(trial: Plan, tables: Iterable[str], effects: Mapping[str, Sequence[Effect]], modes: Sequence[str]) -> str:
    """In what the whole model is slower with int8 tables, or they are where it could not be timed; empty if nowhere."""
    from hwkern._whole import fast

    unread = [mode for mode in modes if mode not in effects]
    if not effects or not fast([trial.layers[name] for name in tables], unread):
        return "slower alone, in a way of running in which the whole model cannot be timed"
    for mode, each in effects.items():
        if _longer(each):
            most = max(effect.ratio for effect in each)
            return f"the whole model takes {_mean(each):.3f}× the time with it, {most:.3f}× at most ({mode})"
        if _doubted(each, SURE):
            whole = statistics.mean(effect.whole for effect in each)
            return f"the whole model takes {whole:.3f}× the time with it, more than its lookups account for ({mode})"
    mean = _mean([effect for each in effects.values() for effect in each])
    if trial.policy == "fastest" and mean > 1:
        return f"the whole model takes {mean:.3f}× the time with it (fastest)"
    return ""


# ---- how long the model takes with either kind ----------------------------------------------------------------------


@dataclass
class Effect:
    """What int8 tables make of the time of one batch.

    Attributes:
        ratio: the model's time with them over that with float ones; of eager calls it is taken from the lookups, which
            is where they differ: ``1 + (lookups in int8 - lookups in float) / model``. (An H100's host beside other
            work: its standard error was 0.03 to 0.4 %, and the calls' own ratios were off by up to 20 %.)
        error: its standard error.
        whole: the ratio of the calls themselves.
        whole_error: its standard error.
    """

    ratio: float
    error: float
    whole: float
    whole_error: float


@dataclass
class _Samples:
    """Seconds of one batch's calls with one kind of table, all and in the lookups alone."""

    whole: list[float] = field(default_factory=list)
    lookups: list[float] = field(default_factory=list)


def _effect(plain: _Samples, int8: _Samples) -> Effect:
    model = lower_quartile(plain.whole)
    change = lower_quartile(int8.lookups) - lower_quartile(plain.lookups)
    return Effect(
        1 + change / model,
        _error(plain.lookups, int8.lookups) / model,
        lower_quartile(int8.whole) / model,
        _error(plain.whole, int8.whole) / model,
    )


def _error(*both: Sequence[float]) -> float:
    """The standard error of a difference of lower quartiles: of a normal one it is the quartiles' distance over √n."""
    found = []
    for values in both:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        found.append((high - low) / math.sqrt(len(values)))
    return math.hypot(*found)


def _mean(effects: Sequence[Effect]) -> float:
    return statistics.mean(effect.ratio for effect in effects)


def _longer(effects: Sequence[Effect], errors: float = 0.0) -> bool:
    """Whether the batches take longer than is given for half of a table's bytes, by so many standard errors."""
    from hwkern._whole import NOISE, TRIAL_NOISE

    error = errors * math.hypot(*(effect.error for effect in effects)) / len(effects)
    return _mean(effects) - error > 1 + TRIAL_NOISE or any(
        effect.ratio - errors * effect.error > 1 + NOISE for effect in effects
    )


def _doubted(effects: Sequence[Effect], errors: float = 0.0) -> bool:
    """Whether the calls as a whole say, by so many standard errors, that something beside the lookups is slower."""
    from hwkern._whole import NOISE

    error = errors * math.hypot(*(effect.whole_error for effect in effects)) / len(effects)
    return statistics.mean(effect.whole for effect in effects) - error > 1 + NOISE


def _settled(effects: Sequence[Effect]) -> bool:
    """Whether more readings would change nothing."""
    slower = _longer(effects, SURE) or _doubted(effects, SURE)
    return slower or not (_longer(effects, -SURE) or _doubted(effects))


class Tables:
    """The tables of a model that is patched with a trial's recipes, of both kinds.

    Attributes:
        places: of each the layer, the int8 and the float module.
    """

    def __init__(self, places: Sequence[tuple[Layer, PackedLayer, nn.Module]]) -> None:
        self.places = places

    def put(self, kind: str) -> None:
        """The "int8" or the "float" ones into their places."""
        from hwkern.patch import _set

        for layer, int8, plain in self.places:
            _set(layer, int8 if kind == "int8" else plain)

    @contextlib.contextmanager
    def lookups(self) -> Iterator[Callable[[], float]]:
        """What it gives tells the host's seconds inside of them since it was last asked."""
        spent = [0.0]

        def enter(*_: Any) -> None:
            spent[0] -= time.perf_counter()

        def leave(*_: Any) -> None:
            spent[0] += time.perf_counter()

        def take() -> float:
            seconds, spent[0] = spent[0], 0.0
            return seconds

        # One of each pair is enough where they share their hooks, as after a patch: each would count twice.
        modules = {id(module._forward_hooks): module for _, *both in self.places for module in both}.values()
        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave) for module in modules]
        try:
            yield take
        finally:
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def _both_tables(model: nn.Module, trial: Plan, tables: Container[str]) -> Iterator[Tables]:
    """The model by the trial's recipes, with these tables of both kinds; it comes back as it was."""
    from hwkern._back_off import patched
    from hwkern.patch import _put_back

    with patched(model, trial.recipes):  # float tables that are in their places in the end are the model's own
        places = [
            (layer, layer.module, cast(nn.Module, layer.module._original.module))
            for layer in find_layers(model, embeddings=True)
            if layer.names[0] in tables and isinstance(layer.module, PackedLayer) and layer.module._original is not None
        ]
        for layer, int8, plain in places:
            _put_back(layer, plain, int8)  # with its weight
        yield Tables(places)


def _effects(
    model: nn.Module, tables: Tables, batches: Sequence[Any], modes: Sequence[str], show: bool
) -> dict[str, list[Effect]]:
    """Mode → what int8 tables do to each batch; without "graph" where there is none."""
    from hwkern._whole import Graphs

    graphs = Graphs()  # until the last replay: it holds what they read
    found: dict[str, list[Effect]] = {}
    with progress("Trying int8 tables", len(modes), show) as step:
        for mode in modes:
            if mode == "eager":
                with tables.lookups() as take:
                    found[mode] = _read(model, [_eager_calls(model, tables, batch, take) for batch in batches])
            elif calls := _replays(model, tables, batches, graphs):
                found[mode] = _read(model, calls)
            step()
    return found


#: Kind of table → a call; and the seconds that its calls' lookups took, one after the other. Of graphs there are none:
#: there the whole calls are exact enough.
_Calls = tuple[dict[str, Callable[[], object]], dict[str, list[float]]]


def _read(model: nn.Module, calls: Sequence[_Calls]) -> list[Effect]:
    """Of each batch: as many readings as it takes to be sure."""
    device = _batches.device_of(model)
    samples = [{"float": _Samples(), "int8": _Samples()} for _ in calls]
    effects: list[Effect] = []
    for _ in range(READINGS):
        for (both, lookups), known in zip(calls, samples, strict=True):
            for kind, values in in_turn(both, device, SECONDS / len(calls), ROUNDS).items():
                known[kind].whole += values
                known[kind].lookups += lookups[kind][-len(values) :] if lookups else values
        effects = [_effect(known["float"], known["int8"]) for known in samples]
        if _settled(effects):
            break
    return effects


def _eager_calls(model: nn.Module, tables: Tables, batch: Any, take: Callable[[], float]) -> _Calls:
    lookups: dict[str, list[float]] = {"float": [], "int8": []}

    def call(kind: str) -> None:
        tables.put(kind)
        take()
        _batches.call(model, batch)
        lookups[kind].append(take())

    return {kind: functools.partial(call, kind) for kind in lookups}, lookups


def _replays(model: nn.Module, tables: Tables, batches: Sequence[Any], graphs: Graphs) -> list[_Calls]:
    """None at all where the model cannot be captured."""
    found: list[_Calls] = []
    for i, batch in enumerate(batches):
        both: dict[str, Callable[[], object]] = {}
        for kind in ("float", "int8"):
            tables.put(kind)
            graph = graphs.of((i, kind), model, batch, _batches.device_of(model))
            if graph is None:
                return []
            both[kind] = graph.replay
        found.append((both, {}))
    return found
