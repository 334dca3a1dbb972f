"""Embeddings in a plan: tables and the heads that share their weight, whether the model can do with int8 ones, and
whether it takes longer with them.

A lookup in an int8 table reads half of the bytes, and takes the host longer in an eager call: by up to two microseconds
alone, by more in a model, where its code is cold. Two int8 tables cost a small BERT on an H100 1.2 ± 0.4 % of 2.1 ms in
eager calls, one cost an OPT 0.0 ± 0.3 %; both gained 1 % in CUDA graphs. So the whole model is asked.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._choose import score
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
SECONDS, ROUNDS = 0.24, (3, 160)
#: So many such readings, and the second number where int8 tables seem to take longer; all calls count together. One
#: reading's mean ratio scatters by some 0.7 % in eager calls from a busy host, by 0.1 % in graphs (H100).
READINGS = (2, 4)


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
    """Run the first batch with the tables that the plan makes int8; where the model cannot, it keeps them all."""
    from hwkern._back_off import _Recipes, _swapped, trial_place
    from hwkern.patch import patch, unpatch

    layers = [
        layer for layer in result.layers.values() if layer.chosen and (layer.lookups or layer.kind == "Embedding")
    ]
    if not layers:
        return
    recipes = {name: layer.choice.recipe for layer in layers for name in layer.names}
    with torch.no_grad(), evaluating(model):
        exact = _exact(model, batches[0])
        patch(model, originals=trial_place(model), plan=_Recipes(recipes))
        try:
            problem = _problem(model, batches[0], exact)
        finally:
            unpatch(model, include=[name for name in _swapped(model) if name in recipes])
    if problem:
        _give_up(result, [layer.name for layer in layers], problem)


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
    mode that the model can be timed in, and with policy "fastest" on average not longer at all. Not with "accurate". A
    table that shares its weight with a head goes with that. ``holds``: whether the task holds with a plan that is to be
    taken instead of ``result``.
    """
    from hwkern._whole import distinct

    held = set() if result.task is None else set(result.task.kept)
    tables = {
        layer.name: candidate
        for layer in result.layers.values()
        if layer.kind == "Embedding" and layer.calls and not layer.chosen and not set(layer.names) & held
        for candidate in layer.candidates[1:]
        if candidate.snr_db >= result.accuracy.min_snr_db
    }
    if not tables or result.policy == "accurate":
        return
    trial = result._copy()
    for name, candidate in tables.items():
        trial.layers[name].chosen = trial.layers[name].candidates.index(candidate)
    places = {name for first in tables for name in trial.layers[first].names}
    with _both_tables(model, trial, places) as put, torch.no_grad(), evaluating(model):
        put("float")
        exact = _exact(model, batches[0])
        put("int8")
        problem = _problem(model, batches[0], exact)
        ratios = {} if problem else _ratios(model, put, distinct(batches), modes, show)
    if problem:
        _give_up(result, list(tables), problem)
        return
    if why := _slower(trial, tables, ratios, modes) or ("" if holds(trial) else "the task does not hold with it"):
        for name, candidate in tables.items():
            candidate.ruled_out = why
            result.layers[name].reason += f"; {why}"
        return
    said = ", ".join(f"{statistics.mean(each):.3f}× ({mode})" for mode, each in ratios.items())
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
        count = f"{len(tables)} more embedding{'s' if len(tables) > 1 else ''}"
        result.whole["text"] += f" With {count} in int8 {said} of that."


def _slower(trial: Plan, tables: Iterable[str], ratios: Mapping[str, Sequence[float]], modes: Sequence[str]) -> str:
    """In what the whole model is slower with int8 tables, or they are where it could not be timed; empty if nowhere."""
    from hwkern._whole import fast

    if not ratios or not fast([trial.layers[name] for name in tables], [mode for mode in modes if mode not in ratios]):
        return "slower alone, in a way of running in which the whole model cannot be timed"
    for mode, each in ratios.items():
        if _longer(each):
            mean = statistics.mean(each)
            return f"the whole model takes {mean:.3f}× the time with it, {max(each):.3f}× at most ({mode})"
    mean = statistics.mean(ratio for each in ratios.values() for ratio in each)
    if trial.policy == "fastest" and mean > 1:
        return f"the whole model takes {mean:.3f}× the time with it (fastest)"
    return ""


def _longer(ratios: Sequence[float]) -> bool:
    """Whether the batches take longer than is given for half of a table's bytes."""
    from hwkern._whole import NOISE, TRIAL_NOISE

    return statistics.mean(ratios) > 1 + TRIAL_NOISE or max(ratios) > 1 + NOISE


@contextlib.contextmanager
def _both_tables(model: nn.Module, trial: Plan, tables: Container[str]) -> Iterator[Callable[[str], None]]:
    """The model by the trial's recipes; what it gives puts the "int8" or the "float" tables into their places."""
    from hwkern._back_off import _Recipes, _swapped, trial_place
    from hwkern.patch import _put_back, _set, patch, unpatch

    recipes = {name: recipe for name, recipe in trial.recipes.items() if recipe.scheme != "keep"}
    swapped: list[tuple[Layer, PackedLayer, nn.Module | None]] = []

    def put(kind: str) -> None:
        for layer, int8, plain in swapped:
            _set(layer, int8 if kind == "int8" else cast(nn.Module, plain))

    patch(model, originals=trial_place(model), plan=_Recipes(recipes))
    try:
        swapped += [
            (layer, layer.module, layer.module._original.module)
            for layer in find_layers(model, embeddings=True)
            if layer.names[0] in tables and isinstance(layer.module, PackedLayer) and layer.module._original is not None
        ]
        for layer, int8, plain in swapped:
            _put_back(layer, cast(nn.Module, plain), int8)  # with its weight
        yield put
    finally:  # float tables that are in their places are the model's own
        unpatch(model, include=[name for name in _swapped(model) if name in recipes])


def _ratios(
    model: nn.Module, put: Callable[[str], None], batches: Sequence[Any], modes: Sequence[str], show: bool
) -> dict[str, list[float]]:
    """Mode → time with int8 tables over time with float ones, of each batch; without "graph" where there is none."""
    from hwkern._whole import Graphs

    device, graphs = _batches.device_of(model), Graphs()
    found: dict[str, list[float]] = {}
    with progress("Trying int8 tables", len(modes), show) as step:
        for mode in modes:
            samples: list[dict[str, list[float]]] = [{"float": [], "int8": []} for _ in batches]
            calls = _calls(model, put, batches, mode, graphs)
            for turn in range(READINGS[1] if calls else 0):
                for both, known in zip(calls, samples, strict=True):
                    for kind, values in in_turn(both, device, SECONDS / len(batches), ROUNDS).items():
                        known[kind] += values
                found[mode] = [lower_quartile(known["int8"]) / lower_quartile(known["float"]) for known in samples]
                if turn + 1 >= READINGS[0] and not _longer(found[mode]):
                    break
            step()
    return found


def _calls(
    model: nn.Module, put: Callable[[str], None], batches: Sequence[Any], mode: str, graphs: Graphs
) -> list[dict[str, Callable[[], object]]]:
    """Of each batch a call with either kind of table; none at all where the model cannot be captured."""
    found = []
    for i, batch in enumerate(batches):
        both: dict[str, Callable[[], object]] = {}
        for kind in ("float", "int8"):
            if mode == "eager":
                both[kind] = functools.partial(_call, model, put, kind, batch)
                continue
            put(kind)
            graph = graphs.of((i, kind), model, batch, _batches.device_of(model))
            if graph is None:
                return []
            both[kind] = graph.replay
        found.append(both)
    return found


def _call(model: nn.Module, put: Callable[[str], None], kind: str, batch: Any) -> None:
    put(kind)
    _batches.call(model, batch)
