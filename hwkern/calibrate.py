"""From what a layer's inputs look like to how they are quantized: observers, smoothing, outlier columns; all measured.

Every choice here is made by the signal-to-noise ratio (dB) of the layer's output on rows of the user's own data:
``10 · log10(Σ y² / Σ (y - ŷ)²)`` with the float layer's y. 20 dB is a relative error of 10 %, 40 dB one of 1 %.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwkern import _batches, _fold, ops
from hwkern._back_off import BackOff, back_off
from hwkern._console import plain_table, progress
from hwkern._layers import Layer, Selection, Selector, find_layers, judge, tied
from hwkern._observe import Seen, observe
from hwkern._recipes import Recipe, float_rows, make
from hwkern.metrics import Function, Metric, as_metric
from hwkern.nn import Calibration
from hwkern.nn.pack import all_finite, quantize_weight

Observer = Literal["absmax", "percentile", "mse"]
OBSERVERS: tuple[Observer, ...] = ("absmax", "percentile", "mse")

#: Share of the values that a percentile keeps unclipped.
PERCENTILE = 0.9999
#: Values that a percentile or a squared error is taken over: 0.01 % of them are still a dozen.
VALUES = 2**17
#: What SmoothQuant's α is searched over; 0 leaves the whole difficulty to the inputs, 1 to the weights.
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Outlier columns that a side path may have: enough for the few dozen that large language models show.
OUTLIERS = 32
#: Smoothing that gains less than this much (dB) is noise of the sample, and left out.
WORTH_DB = 0.5
_CLIPS = tuple(i / 40 for i in range(40, 9, -1))  # of the range, tried for the least squared error


# ---- measuring ------------------------------------------------------------------------------------------------------


def snr_db(exact: Tensor, found: Tensor) -> float:
    """Signal-to-noise ratio in dB; inf for equal tensors, -inf for a result that is not finite."""
    exact, found = exact.detach().double(), found.detach().double()
    noise, signal = float((exact - found).square().sum()), float(exact.square().sum())
    if not math.isfinite(noise):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def token_db(exact: Tensor, found: Tensor) -> float:
    """Like :func:`snr_db`, with a noise-to-signal ratio for each token, of which the mean counts: ``[M, N]`` each.

    What a layer adds to the residual stream, and what the norm behind it makes of the sum, is of one size in all
    tokens; so a large token's noise counts relative to the token, and a small one's relative to the mean token:
    ``noise / (signal + mean signal)``. In a plain SNR the few tokens that are 20 times as large as the others outweigh
    all the rest. (all-MiniLM-L6-v2 lost more with an α chosen by that for the layers behind a GELU than with none.)
    """
    exact, found = exact.detach().double(), found.detach().double()
    noise, signal = (exact - found).square().sum(-1), exact.square().sum(-1)
    ratio = float((noise / (signal + signal.mean()).clamp_min(torch.finfo(torch.float64).tiny)).mean())
    if not math.isfinite(ratio):
        return -math.inf
    return math.inf if ratio == 0 else -10 * math.log10(ratio)


class Judge:
    """Measures candidates of one layer against the float layer, on the rows it saw."""

    def __init__(self, module: nn.Module, seen: Seen) -> None:
        assert seen.sample is not None
        self.module, self.seen = module, seen
        rows = float_rows(module)
        self.sample = seen.sample.to(rows.device)
        bias = module._parameters.get("bias")
        self.exact = F.linear(self.sample.float(), rows.float(), None if bias is None else bias.detach().float())

    def __call__(self, recipe: Recipe, figure: Callable[[Tensor, Tensor], float] = snr_db) -> float:
        """SNR in dB of the layer under ``recipe``, or another ``figure`` of (exact, found); inf for "keep"."""
        if recipe.scheme == "keep":
            return math.inf
        with torch.no_grad():
            layer = make(self.module, recipe)
            if not all_finite(layer.weight_scale):
                return -math.inf
            x = self.sample
            if recipe.calibration.folded:
                divisors = recipe.calibration.divisors(x.shape[-1], x.device)
                x = (x.float() / divisors).to(x.dtype)
            if recipe.scheme == "w8a16/w8a8":  # the worse of its two ways
                layer = make(self.module, replace(recipe, scheme="w8a8", max_tokens=None))
            return figure(self.exact, layer(x))


class TableJudge:
    """Measures an embedding's int8 table against the float one, on the rows that were looked up."""

    def __init__(self, module: nn.Module, seen: Seen) -> None:
        assert seen.sample is not None
        self.exact = float_rows(module)[seen.sample.to(float_rows(module).device)].float()

    def __call__(self, recipe: Recipe) -> float:
        """SNR in dB of the rows; inf for "keep". The same for every other scheme: it is the weight's own rounding."""
        if recipe.scheme == "keep":
            return math.inf
        q, scale = quantize_weight(self.exact)
        return snr_db(self.exact, ops.dequantize(q, scale)[:, : self.exact.shape[1]])


# ---- static ranges --------------------------------------------------------------------------------------------------


def static(
    seen: Seen, observer: Observer = "absmax", asymmetric: bool = False, base: Calibration | None = None
) -> Calibration:
    """``base`` (its smoothing and outlier columns) with a static per-tensor scale, and a zero point if ``asymmetric``.

    Args:
        observer: "absmax": nothing seen saturates; "percentile": 0.01 % of the values do; "mse": the range with the
            least squared error of the input.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer = {observer!r}: it must be one of {', '.join(OBSERVERS)}.")
    assert seen.low is not None
    assert seen.high is not None
    assert seen.sample is not None
    base = base or Calibration()
    device = seen.low.device
    divisors = base.divisors(seen.low.numel(), device)
    keep = torch.ones_like(divisors, dtype=torch.bool)
    keep[list(base.outliers)] = False
    low = float((seen.low / divisors)[keep].amin()) if bool(keep.any()) else 0.0
    high = float((seen.high / divisors)[keep].amax()) if bool(keep.any()) else 0.0
    if not asymmetric:
        high = max(high, -low)
        low = -high
    low, high = min(low, 0.0), max(high, 0.0)
    if observer != "absmax":
        values = (seen.sample.float() / divisors)[:, keep].flatten()
        values = values[:: max(1, values.numel() // VALUES)]
        low, high = _clipped(values, low, high, observer, asymmetric)
    return replace(base, **_affine(low, high, asymmetric))


def _affine(low: float, high: float, asymmetric: bool) -> dict[str, Any]:
    tiny = torch.finfo(torch.float32).tiny
    if not asymmetric:
        return {"scale": max(high / 127, tiny), "zero_point": 0}
    scale = max((high - low) / 254, tiny)
    return {"scale": scale, "zero_point": max(-127, min(127, round(-127 - low / scale)))}


def _clipped(values: Tensor, low: float, high: float, observer: str, asymmetric: bool) -> tuple[float, float]:
    if observer == "percentile":
        if not asymmetric:
            cut = _quantile(values.abs(), PERCENTILE)
            return -cut, cut
        return min(0.0, _quantile(values, 1 - PERCENTILE)), max(0.0, _quantile(values, PERCENTILE))

    def best(ranges: Sequence[tuple[float, float]]) -> int:
        """The range of the least squared error; all of them at once, because each wait for a GPU costs more than it."""
        found = [_affine(below, above, asymmetric) for below, above in ranges]
        scale = values.new_tensor([each["scale"] for each in found]).unsqueeze(1)
        zero = values.new_tensor([each["zero_point"] for each in found]).unsqueeze(1)
        q = (values / scale).round_().add_(zero).clamp_(-127, 127).sub_(zero)
        return int(q.mul_(scale).sub_(values).square_().sum(1).argmin())

    if not asymmetric:
        clip = _CLIPS[best([(low * clip, high * clip) for clip in _CLIPS])]
        return low * clip, high * clip
    high *= _CLIPS[best([(low, high * clip) for clip in _CLIPS])]
    low *= _CLIPS[best([(low * clip, high) for clip in _CLIPS])]
    return low, high


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 16 million values, and sorts anyway.
    return float(values.kthvalue(max(1, min(values.numel(), round(share * values.numel())))).values)


# ---- smoothing ------------------------------------------------------------------------------------------------------


def divisors(absmax: Tensor, weights: Sequence[Tensor], alpha: float) -> tuple[float, ...]:
    """SmoothQuant's ``max|x_k|^α / max|w_k|^(1-α)`` per column, normed to a geometric mean of 1.

    ``absmax [K]``; ``weights`` share the input, each ``[N, K]``. Columns that are zero throughout stay as they are.
    """
    x = absmax.float()
    w = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0).to(x.device)
    used = (x > 0) & (w > 0)
    s = torch.where(used, x.clamp_min(1e-30).pow(alpha) / w.clamp_min(1e-30).pow(1 - alpha), 1.0)
    if bool(used.any()):
        s = torch.where(used, s / s[used].log().mean().exp(), 1.0)
    return tuple(s.clamp(2.0**-20, 2.0**20).tolist())


def smooth(
    judges: Sequence[Judge], folded: bool, observer: Observer | None = None, asymmetric: bool = False
) -> tuple[Calibration, float]:
    """The best smoothing for layers that share an input, and its α; a plain calibration and 0.0 where none helps.

    The α whose worst layer is best wins, by :func:`token_db` of the scheme that the layers are to have: one scale for
    all tokens asks for another α than a scale for each. Without smoothing counts as a candidate.
    """
    absmax = judges[0].seen.absmax
    weights = [float_rows(judge.module) for judge in judges]

    def of_the_worst(base: Calibration) -> float:
        return min(
            max(judge(recipe, token_db) for recipe in schemes(judge.seen, base, observer, asymmetric))
            for judge in judges
        )

    best, best_alpha = Calibration(), 0.0
    least = of_the_worst(best) + WORTH_DB
    for alpha in ALPHAS:
        found = Calibration(smooth=divisors(absmax, weights, alpha), folded=folded)
        worst = of_the_worst(found)
        if worst > least:
            best, best_alpha, least = found, alpha, worst
    return best, best_alpha


def schemes(seen: Seen, base: Calibration, observer: Observer | None, asymmetric: bool) -> list[Recipe]:
    """W8A8 on top of ``base``: dynamic without an observer, else static, and with a zero point where it has one."""
    if observer is None:
        return [Recipe("w8a8", base)]
    found = [Recipe("w8a8-static", static(seen, observer, False, base))]
    if asymmetric and (shifted := static(seen, observer, True, base)).zero_point:
        found.append(Recipe("w8a8-asymmetric", shifted))
    return found


def outliers(judge: Judge, base: Calibration, count: int = OUTLIERS) -> Calibration:
    """``base`` with the ``count`` columns whose (divided) values reach farthest taken out of int8."""
    reach = judge.seen.absmax / base.divisors(judge.seen.absmax.numel(), judge.seen.absmax.device)
    count = min(count, reach.numel() // 2)
    if count < 1:
        return base
    return replace(base, outliers=tuple(sorted(reach.topk(count).indices.tolist())))


# ---- a whole model --------------------------------------------------------------------------------------------------


@dataclass
class Calibrated:
    """What :func:`calibrate` found: a recipe for each layer, and how good it is. ``hwkern.patch(model, plan=…)``."""

    recipes: dict[str, Recipe]
    snr: dict[str, float]  #: dB of the chosen recipe
    plain_snr: dict[str, float]  #: dB of dynamic W8A8 without any calibration
    alpha: dict[str, float] = field(default_factory=dict)  #: of the layers that are smoothed
    left: dict[str, str] = field(default_factory=dict)  #: layers that stay float, with the reason
    task: BackOff | None = None  #: what the metric said

    def __str__(self) -> str:
        rows = [
            [
                name,
                recipe.name,
                f"{self.plain_snr[name]:.1f}",
                f"{self.snr[name]:.1f}",
                f"{self.alpha[name]:.1f}" if name in self.alpha else "",
            ]
            for name, recipe in self.recipes.items()
        ]
        task = self.task
        said = [] if task is None else [f"{task.metric}: {task.before:.6g} -> {task.after:.6g}."]
        left = [f"{name} stays float: {why}." for name, why in self.left.items()]
        return "\n".join(
            [plain_table("", ["layer", "scheme", "plain dB", "dB", "α"], rows, 2).strip("\n"), *left, *said]
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    observer: Observer | None = None,
    asymmetric: bool = False,
    smoothing: bool = True,
    outlier_columns: int = 0,
    min_snr_db: float | None = None,
    metric: Metric | Function | None = None,
    max_metric_drop: float = 0.0,
    show: bool = True,
) -> Calibrated:
    """Find how each linear layer's input is best quantized, on the user's data. Changes nothing; times nothing.

    Args:
        batches: what the model is called with: tensors, tuples of arguments, or dicts.
        include, exclude: as in :func:`hwkern.patch`.
        observer: None for a scale per token at each call; "absmax", "percentile" or "mse" for a static one.
        asymmetric: static with a zero point, where that is better (inputs after ReLU or GELU).
        smoothing: SmoothQuant with α searched per layer; folded into the norm before the layer where the block's class
            proves it right, else a multiplication of the input.
        outlier_columns: columns of a layer that may run in float beside it, for layers still below ``min_snr_db``.
        min_snr_db: layers that stay below are left float.
        metric: ``(model, batches) -> float``, or one of :mod:`hwkern.metrics`: the task. The layers that cost most go
            back to float until the metric is at most ``max_metric_drop`` worse than the original model's.

    Raises ValueError for batches that are empty or ragged, and for a layer's input that is never finite.
    """
    layers, left = candidates(model, include, exclude)
    found = _batches.check(batches, _batches.device_of(model))
    with progress("Observing the layers' inputs", len(found), show) as step:
        seen = observe(model, layers, found, step)
    left |= unusable(layers, seen)
    result = Calibrated({}, {}, {}, left=left)
    usable = [layer for layer in layers if layer.names[0] not in left]
    for readers, folded in inputs(model, usable):
        names = [layer.names[0] for layer in readers]
        judges = [Judge(layer.module, seen[name]) for layer, name in zip(readers, names, strict=True)]
        base, alpha = Calibration(), 0.0
        if smoothing and _alone(readers, layers):
            base, alpha = smooth(judges, folded, observer, asymmetric)
        for name, judge_layer in zip(names, judges, strict=True):
            recipe, snr = _best(judge_layer, base, observer, asymmetric, outlier_columns, min_snr_db)
            result.plain_snr[name] = judge_layer(Recipe("w8a8"))
            result.recipes[name], result.snr[name] = recipe, snr
            if alpha:
                result.alpha[name] = alpha
    if min_snr_db is not None:
        for name, snr in list(result.snr.items()):
            if snr < min_snr_db:
                result.left[name] = f"{snr:.1f} dB is below {min_snr_db:g} dB"
                for table in (result.recipes, result.snr, result.plain_snr, result.alpha):
                    table.pop(name, None)
        consistent(result.recipes, _fold.groups(model))
    if (task := as_metric(metric)) is not None:
        groups = _fold.groups(model)

        def without(kept: Sequence[str]) -> dict[str, Recipe]:
            rest = {name: recipe for name, recipe in result.recipes.items() if name not in kept}
            consistent(rest, groups)
            return rest

        final, result.task = back_off(model, without, result.snr, task, found, max_metric_drop)
        for name in result.task.kept:
            result.left[name] = f"back to float for the {task.name}'s sake ({result.snr[name]:.1f} dB)"
            for table in (result.snr, result.plain_snr, result.alpha):
                table.pop(name, None)
        result.recipes = final
    return result


def _best(
    judge_layer: Judge,
    base: Calibration,
    observer: Observer | None,
    asymmetric: bool,
    outlier_columns: int,
    min_snr_db: float | None,
) -> tuple[Recipe, float]:
    def of(calibration: Calibration) -> list[Recipe]:
        return schemes(judge_layer.seen, calibration, observer, asymmetric)

    measured = [(judge_layer(recipe), i, recipe) for i, recipe in enumerate(of(base))]
    snr, _, recipe = max(measured, key=lambda entry: entry[:2])
    if outlier_columns and snr < (math.inf if min_snr_db is None else min_snr_db):
        beside = outliers(judge_layer, base, outlier_columns)
        measured = [(judge_layer(option), i, option) for i, option in enumerate(of(beside))]
        best = max(measured, key=lambda entry: entry[:2])
        if best[0] > snr + WORTH_DB:
            return best[2], best[0]
    return recipe, snr


def candidates(
    model: nn.Module, include: Selector | None, exclude: Selector | None, embeddings: bool = False
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that ``hwkern.patch`` would take, and the others with its reasons."""
    layers = find_layers(model, embeddings)
    wanted, unwanted = Selection("include", include), Selection("exclude", exclude)
    for selection in (wanted, unwanted):
        selection.check(layers, model)
    judge(model, layers, wanted, unwanted)
    left = {layer.names[0]: layer.reason or layer.status for layer in layers if layer.status != "int8"}
    return [layer for layer in layers if layer.status == "int8"], left


def unusable(layers: Sequence[Layer], seen: Mapping[str, Seen]) -> dict[str, str]:
    """Layers that cannot be measured, with the reason."""
    found = {}
    for layer in layers:
        name = layer.names[0]
        if not seen[name].calls:
            found[name] = "no batch reached it"
        elif seen[name].sample is None:
            found[name] = "its input held NaN or ±inf in every call"
        elif not bool(float_rows(layer.module).isfinite().all()):
            found[name] = "its weight holds NaN or ±inf"
    return found


def inputs(model: nn.Module, layers: Sequence[Layer]) -> list[tuple[list[Layer], bool]]:
    """The layers in groups that share an input whose norm can be divided (True), and all others one by one (False)."""
    by_name = {layer.names[0]: layer for layer in layers}
    found: list[tuple[list[Layer], bool]] = []
    for group in _fold.groups(model):
        if all(name in by_name for name in group.readers):
            found.append(([by_name.pop(name) for name in group.readers], True))
    return found + [([layer], False) for layer in by_name.values()]


def _alone(readers: Sequence[Layer], layers: Sequence[Layer]) -> bool:
    """Whether none of the layers shares its weight: a vector for one would be wrong for the other."""
    ids = {id(layer.module) for layer in readers}
    return all(len(group) == 1 and len(group[0].names) == 1 for group in tied(layers) if id(group[0].module) in ids)


def consistent(recipes: dict[str, Recipe], groups: Sequence[_fold.Group]) -> None:
    """A norm is divided for all of its readers or for none: turn a vector that lost a reader into an explicit one."""
    for group in groups:
        members = [recipes.get(name) for name in group.readers]
        vectors = {m.calibration.smooth for m in members if m is not None and m.calibration.folded}
        if vectors and (len(vectors) > 1 or any(m is None or not m.calibration.folded for m in members)):
            for name in group.readers:
                if name in recipes and recipes[name].calibration.folded:
                    recipes[name] = explicit(recipes[name])


def explicit(recipe: Recipe) -> Recipe:
    """A folded recipe for a norm that stays as it is."""
    if recipe.scheme.startswith("w8a16"):
        return recipe.unfolded()
    return replace(recipe, calibration=replace(recipe.calibration, folded=False))


class _CallableModule(types.ModuleType):
    """``hwkern.calibrate`` is the function, but importing this file binds that name to the module: both are called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Calibrated:
        return calibrate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
