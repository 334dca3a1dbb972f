"""A plan against the clock of the whole model: what layers gain alone must be a gain together, measured.

Three things show only there. Layers that cost host time slow an eager model down though each is faster alone: then
layers go back to float. Layers that are slower alone can be faster fused with their neighbours (q, k and v as one
product, the norm before them in the same kernel). And layers that are slower in eager calls alone, for the host's sake,
cost nothing where the model waits for the GPU or the others save the host more. Both are tried, and taken when the
model is faster by it, and slower in no way of running.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern._choose import LEAST_GAIN, Candidate, choose
from hwkern._choose import NOISE as LAYER_NOISE
from hwkern._console import progress
from hwkern._observe import evaluating
from hwkern._recipes import Recipe
from hwkern._timing import lower_quartile, warm_up_stream, without_gc
from hwkern.nn import Calibration

if TYPE_CHECKING:
    from hwkern.plan import Plan, PlannedLayer

#: Calls in one reading of the model's time: as many as fill the seconds, within these bounds.
ROUNDS = (5, 40)
SECONDS = 0.045
#: The model may be this much slower in a measurement before the plan is doubted.
NOISE = 0.015
#: And this much with a plan that is tried instead of the layers' own choices: nothing is lost where one is not taken.
TRIAL_NOISE = 0.005
#: What differs by more than this on the GPU's clock needs no second reading: two of one thing differ by 1.5 % there.
#: Eager calls may be held up by whatever else the machine does, and are read again.
CLEAR = 0.08
#: Then layers go back: those with less than the first gain, than the second, all. Small gains are the first suspects,
#: because their layers cost host time that a layer alone does not show.
SUSPECTS = (1.15, 1.5, float("inf"))
#: Layers whose time alone is more than this times the float layer's are not tried in the whole model.
FUSED_SLACK = 1.6
#: What lets several layers run as one product.
_TOGETHER = ("w8a8", "w8a16/w8a8")

Seconds = dict[str, list[float]]  # mode → of each distinct batch
Reading = tuple[Seconds, Seconds]  # without the plan, and with it


class Graphs:
    """What was captured, by the batch's place, to be replayed again when the model is timed again.

    Everything that the model held is held: a graph reads it where it was, and fused layers move their neighbours' bias.

    Attributes:
        last: the latest reading of the model as it was captured. What is compared with it next starts with that one:
            trials are read in turn with the model, which is read once between two of them and not twice.
    """

    def __init__(self) -> None:
        self.last: Seconds | None = None
        self._made: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._held: list[Tensor] = []

    def clear(self) -> None:
        """Give their memory back."""
        self._made.clear()
        self._held.clear()

    def of(self, place: Hashable, model: nn.Module, batch: Any, device: torch.device) -> torch.cuda.CUDAGraph | None:
        """The graph of one call; None for a model that no graph can hold."""
        if place not in self._made:
            made = _graph(model, batch, device, next(iter(self._made.values()), None))
            if made is None:
                return None
            self._made[place] = made
            for module in model.modules():
                values = (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values())
                self._held += [value.detach() for value in values if isinstance(value, Tensor)]
        return self._made[place]


def check_whole(
    result: Plan,
    model: nn.Module,
    batches: Sequence[Any],
    modes: Sequence[str],
    show: bool,
    holds: Callable[[Plan], bool] = lambda trial: True,
) -> None:
    """Time the model with and without the plan; try fused layers; send back what does not pay.

    ``holds``: whether the task holds with a plan that is to be taken instead of ``result``.
    """
    some = distinct(batches)
    graphs = Graphs()
    with progress("Timing the whole model", len(SUSPECTS) + 2, show) as step:
        found: list[tuple[float, Plan, Reading]] = []
        own: Reading | None = None  # of the result itself, where it is among the trials
        for alternatives in _trials(result, model):
            for trial in alternatives:
                reading = _compared(model, trial, some, modes, graphs, most=1 - LEAST_GAIN)
                same = trial.recipes == result.recipes
                own = reading if same else own
                unread = [mode for mode in modes if mode not in reading[0]]
                never_slower = _worst(reading) <= 1 + TRIAL_NOISE and fast(trial.layers.values(), unread)
                if never_slower and _mean(reading) <= 1 - LEAST_GAIN and (same or holds(trial)):
                    found.append((_mean(reading), trial, reading))
                    break
        if found:
            _, best, reading = min(found, key=lambda each: each[0])
            result.layers, result.task = best.layers, best.task
            _note(result, reading)
            return
        step()
        if not _chosen(result):
            return
        reading = _compared(model, result, some, modes, graphs, first=own)
        step()
        for gain in SUSPECTS:
            if _worst(reading) > 1 + NOISE:
                chosen = [layer for layer in result.layers.values() if layer.chosen]
                names = [layer.name for layer in chosen if layer.speedup() < gain]
                if names:
                    how = "slower" if len(names) == len(chosen) else "not faster"
                    others = send_back(result, names, f"the whole model was {how} with it")
                    if others and not holds(result):
                        send_back(result, others, "the task does not hold with it unfolded")
                        holds(result)  # its account
                    left = _chosen(result)
                    reading = _compared(model, result, some, modes, graphs) if left else (reading[0], reading[0])
            step()
    _note(result, reading)


def send_back(result: Plan, names: Sequence[str], why: str) -> list[str]:
    """These layers stay float; those of the same norm, which are returned, lose their folding."""
    norms, others = set(), []
    for layer in result.layers.values():
        if set(layer.names) & set(names):
            layer.choice.ruled_out = why
            layer.chosen, layer.reason = 0, why
            norms.add(layer.group)
    for layer in result.layers.values():
        if layer.group and layer.group in norms and layer.choice.recipe.calibration.folded:
            result._decide(layer, folded=False)
            others.append(layer.name)
    return others


def _chosen(result: Plan) -> list[str]:
    return [name for layer in result.layers.values() if layer.chosen for name in layer.names]


def _note(result: Plan, reading: Reading) -> None:
    before, after = reading
    if not before:  # with the plan it runs in none of the ways in which it runs without
        return
    texts = []
    for mode in before:
        old, new = sum(before[mode]), sum(after[mode])
        texts.append(f"{_NAMES[mode]}, all batches: {old * 1e3:.2f} -> {new * 1e3:.2f} ms ({old / new:.2f}×)")
    mode = next(iter(before))
    result.whole = {
        "before_ms": [round(s * 1e3, 4) for s in before[mode]],
        "after_ms": [round(s * 1e3, 4) for s in after[mode]],
        "modes": {m: [[round(s * 1e3, 4) for s in side[m]] for side in reading] for m in before},
        "text": f"Whole model, {'; '.join(texts)}.",
    }


_NAMES = {"eager": "eager", "graph": "CUDA graph"}


def note_tables(result: Plan, what: str, ratios: dict[str, list[float]]) -> None:
    """Tables became int8 after the model was read: the times with the plan, by mode and batch, times these ratios.

    A mode without ratios keeps the float tables' times, and the text says so.
    """
    modes: dict[str, Any] = result.whole["modes"]
    before = {mode: [ms / 1e3 for ms in old] for mode, (old, _) in modes.items()}
    after = {
        mode: [ms / 1e3 * ratio for ms, ratio in zip(new, ratios.get(mode, [1.0] * len(new)), strict=True)]
        for mode, (_, new) in modes.items()
    }
    _note(result, (before, after))
    rest = " and ".join(_NAMES[mode] for mode in modes if mode not in ratios)
    result.whole["text"] += f" With {what}" + (f"; the times of {rest} are without." if rest else ".")


# ---- layers together ------------------------------------------------------------------------------------------------


def _trials(result: Plan, model: nn.Module) -> list[list[Plan]]:
    """Other plans that the whole model may be faster with, and ``result`` itself where W8A8 throughout is among them
    and gives up what a layer alone is faster with.

    Of each list the first that holds counts. Not under "accurate" and "smallest", which ask for something else than
    speed.
    """
    if result.policy not in ("fastest", "balanced"):
        return []
    wide, together, plain = _together(result, model, True), _together(result, model, False), _plain_trial(result)
    lists = [_different([wide, together]), _different([plain])]
    own = plain is not None and any(
        layer.chosen and plain.layers[name].chosen != layer.chosen for name, layer in result.layers.items()
    )
    if plain is not None and any(trial.recipes == plain.recipes for trial in lists[0]):
        lists = [[plain, *(trial for trial in lists[0] if trial.recipes != plain.recipes)]]
    if own or (plain is not None and not lists[0] and _chosen(result)):
        lists.append([replace(result)])
    return [trials for trials in lists if trials]


def _different(trials: Sequence[Plan | None]) -> list[Plan]:
    """Without those that are none, or what one before is."""
    found: list[Plan] = []
    for trial in trials:
        if trial is not None and all(trial.recipes != other.recipes for other in found):
            found.append(trial)
    return found


def _plain_trial(result: Plan) -> Plan | None:
    """``result`` with W8A8 throughout, as ``hwkern.patch`` without a plan gives it, where that is accurate enough.

    What layers gain alone leaves out what they lose together: q in W8A8 beside k in W8A16 are two products where one
    was, and a layer that costs host time in an eager call stays float for all the prompts. Measured on Llama-3-8B
    width, 8×512: 4 % slower than W8A8 throughout. A folded smoothing stays. None where nothing changes.
    """
    held = set() if result.task is None else set(result.task.kept)
    trial = result._copy()
    changed = False
    for layer in trial.layers.values():
        plain = _w8a8(layer, result)
        if plain is None or plain is layer.choice or set(layer.names) & held or not layer.calls:
            continue
        layer.chosen, changed = layer.candidates.index(plain), True
        layer.reason = "the whole model is faster with W8A8 throughout"
    return trial if changed else None


def _w8a8(layer: PlannedLayer, result: Plan) -> Candidate | None:
    """W8A8 as it is fused, where that is accurate enough: with the chosen recipe's folded vector, if there is one.

    A norm is divided for all its readers, so what they share goes on. (Eight layers of Llama-3-8B's width on an H100, 1
    and 16 tokens in the graph of a compiled model: W8A16 behind divided norms, the faster one of a layer alone, has
    1.76 and 1.70 times bfloat16's speed, and W8A8, which is one kernel with the norm, 1.90 and 1.81.)
    """
    calibration = layer.choice.recipe.calibration
    wanted = Recipe(
        "w8a8", Calibration(smooth=calibration.smooth, folded=True) if calibration.folded else Calibration()
    )
    found = next((candidate for candidate in layer.candidates if candidate.recipe == wanted), None)
    return found if found is not None and found.snr_db >= result.accuracy.min_snr_db else None


def _together(result: Plan, model: nn.Module, wide: bool) -> Plan | None:
    """``result`` with W8A8 for every layer that could be fused and is within the bounds; None where nothing changes.

    ``wide``: also with layers that are float because they take the host longer in eager calls, and that are faster in a
    CUDA graph: whether the host is what the model waits for, and whether the other layers save more than these cost,
    only the whole model shows. (Two layers of Llama-3-8B size, H100, 128 tokens: ``o_proj`` alone takes 1.20 times the
    float layer's time in eager calls and 0.65 times in a graph; the eager model with it takes 0.82 times.)
    """
    from hwkern._fusion import could_fuse

    fusable = could_fuse(model)
    held = set() if result.task is None else set(result.task.kept)
    trial = result._copy()
    changed = False
    for layer in trial.layers.values():
        recipe = layer.choice.recipe
        if set(layer.names) & held or not layer.calls or recipe.scheme in _TOGETHER:
            continue
        plain = _w8a8(layer, result)
        if set(layer.names) & fusable and plain is not None:
            ratio, why = _slower(layer, plain), "faster with it fused to its neighbours"
            chosen = plain
        elif wide and layer.chosen == 0 and (chosen := _in_a_graph(layer, result)) is not layer.choice:
            ratio, why = _slower(layer, chosen), "faster with it, and not slower in eager calls"
        else:
            continue
        if ratio <= FUSED_SLACK:
            layer.chosen, changed = layer.candidates.index(chosen), True
            layer.reason = f"up to {ratio:.2f}× the float layer's time alone, but the whole model is {why}"
    return trial if changed else None


def _slower(layer: PlannedLayer, candidate: Candidate) -> float:
    """The most that it takes of the float layer's time, in any mode and for any number of tokens."""
    keep = layer.candidates[0]
    return max(candidate.us[mode][m] / keep.us[mode][m] for mode in keep.us for m in layer.calls)


def _in_a_graph(layer: PlannedLayer, result: Plan) -> Candidate:
    """What the layer would be if the model only ever ran in CUDA graphs; an embedding stays what it is."""
    plain = [c for c in layer.candidates if not c.recipe.calibration.folded]
    if layer.kind == "Embedding" or set(plain[0].us) != {"eager", "graph"}:
        return layer.choice
    alone = [replace(c, us={"graph": c.us["graph"]}) for c in plain]
    chosen, _ = choose(alone, layer.calls, result.accuracy.min_snr_db, result.policy)
    return plain[alone.index(chosen)]


def fast(layers: Iterable[PlannedLayer], modes: Sequence[str]) -> bool:
    """Whether no layer alone is slower in these modes, in which the whole model could not be timed."""
    return all(
        layer.choice.us[mode][m] <= layer.candidates[0].us[mode][m] * (1 + LAYER_NOISE)
        for layer in layers
        for mode in modes
        for m in layer.calls
    )


# ---- readings -------------------------------------------------------------------------------------------------------


def _worst(reading: Reading) -> float:
    """The largest of time with the plan over time without; inf where the model runs in no common mode with it."""
    return max(_ratios(reading), default=math.inf)


def _mean(reading: Reading) -> float:
    return statistics.mean(_ratios(reading) or [math.inf])


def _ratios(reading: Reading) -> list[float]:
    before, after = reading
    return [a / b for mode in before for a, b in zip(after[mode], before[mode], strict=True)]


def _compared(
    model: nn.Module,
    result: Plan,
    batches: Sequence[Any],
    modes: Sequence[str],
    graphs: Graphs,
    most: float = math.inf,
    first: Reading | None = None,
) -> Reading:
    """One reading; where that looks a little slower, the better of two, because one alone is off now and then.

    ``most``: the mean of the ratios above which the caller has no use for the plan. ``first``: a reading of this plan
    that there is already.
    """
    first = first or _reading(model, result, batches, modes, graphs)
    useless = "graph" in first[1] and _mean(first) > most + NOISE
    if _worst(first) <= 1 + NOISE or _clear(first) or useless:
        return first
    second = _reading(model, result, batches, modes, graphs)
    return _better(first[0], second[0]), _better(first[1], second[1])


def _clear(reading: Reading) -> bool:
    """Whether the GPU's clock says beyond doubt that the plan is slower, or that it is faster in every mode."""
    graph = {"graph": reading[0]["graph"]} if "graph" in reading[1] else {}
    return bool(graph) and (_worst((graph, reading[1])) > 1 + CLEAR or _worst(reading) < 1 - CLEAR)


def _better(one: Seconds, other: Seconds) -> Seconds:
    return {mode: [min(pair) for pair in zip(one[mode], other[mode], strict=True)] for mode in one if mode in other}


def _reading(model: nn.Module, result: Plan, batches: Sequence[Any], modes: Sequence[str], graphs: Graphs) -> Reading:
    """The model without the plan, before and after (the better counts), and with it. Not after where it is clear."""
    from hwkern._back_off import patched, trial_place

    place = trial_place(model)
    first = graphs.last or seconds(model, batches, modes, graphs)
    graphs.last = None
    if place != "device":  # the float weights leave the device, and come back to other addresses
        graphs.clear()
    with patched(model, result.recipes, place):
        after = seconds(model, batches, tuple(first), Graphs())
    before = {mode: first[mode] for mode in after if mode in first}
    if not _clear((before, after)):
        second = seconds(model, batches, tuple(after), graphs)
        before = _better(before, second)
        if second.keys() == first.keys():
            graphs.last = second
    return before, {mode: after[mode] for mode in before}


def seconds(model: nn.Module, batches: Sequence[Any], modes: Sequence[str], graphs: Graphs) -> Seconds:
    """Of each batch in each mode; without "graph" where the model cannot be captured, and then at least eager.

    What is captured is kept in ``graphs``, and what is there is replayed.
    """
    device = _batches.device_of(model)
    found: Seconds = {}
    with torch.no_grad(), evaluating(model):
        for mode in modes:
            times = []
            for i, batch in enumerate(batches):
                call: Callable[[], object] = functools.partial(_batches.call, model, batch)
                if mode == "graph":
                    graph = graphs.of(i, model, batch, device)
                    if graph is None:
                        break
                    call = graph.replay
                times.append(_undisturbed(call, device))
            else:
                found[mode] = times
    return found or seconds(model, batches, ("eager",), graphs)


def _undisturbed(call: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with without_gc():
        once()
        rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / max(once(), 1e-6))))
        samples = [once() for _ in range(rounds)]
    return lower_quartile(samples) if device.type == "cuda" else min(samples)


def _graph(
    model: nn.Module, batch: Any, device: torch.device, other: torch.cuda.CUDAGraph | None
) -> torch.cuda.CUDAGraph | None:
    """The graph of one call; None for a model that waits for the GPU in its forward, which no graph can hold.

    That is tried outside a capture first, because one that fails leaves torch's random numbers and allocator unusable
    on the device. Whoever asks there whether a capture is under way is told yes: transformers then skips its own waits.
    ``other``: a graph whose memory it may use, because nobody reads what either of them returns.
    """
    with torch.cuda.device(device):
        stream = warm_up_stream()
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream):
            _batches.call(model, batch)
            with warnings.catch_warnings():  # torch calls the switch a prototype at each use
                warnings.simplefilter("ignore")
                asked = torch.cuda.is_current_stream_capturing
                torch.cuda.set_sync_debug_mode("error")
                torch.cuda.is_current_stream_capturing = lambda: True
                try:
                    _batches.call(model, batch)
                except RuntimeError:
                    return None
                finally:
                    torch.cuda.is_current_stream_capturing = asked
                    torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, None if other is None else other.pool(), stream):
                _batches.call(model, batch)
        except RuntimeError:
            return None
    return graph


def distinct(batches: Sequence[Any]) -> list[Any]:
    """The first batch of each shape, four at most."""
    found: dict[str, Any] = {}
    for batch in batches:
        found.setdefault(_signature(batch), batch)
    return list(found.values())[:4]


def _signature(batch: Any) -> str:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
    return " ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else repr(v) for v in values)
