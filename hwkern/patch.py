"""``patch``: every linear layer that is worth it becomes an int8 layer, in place. ``unpatch``: back to the originals.

Both look first and raise before anything is touched; then they go layer by layer, so that the extra memory stays below
that of the largest layer (unless ``originals`` keeps the float weights where they are); and when something fails
half-way they put everything back.
"""

from __future__ import annotations

import errno
import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from hwkern import _fold, _fusion, _hf_hook, _native
from hwkern._layers import (
    Layer,
    Selection,
    Selector,
    adopt,
    find_layers,
    int8_class,
    is_foreign,
    judge,
    judge_ties,
    tied,
)
from hwkern._originals import (
    FloatWeight,
    Original,
    Place,
    Spool,
    free_disk,
    free_memory,
    is_alone,
    room_beside,
    spool_directory,
)
from hwkern._recipes import Recipe, around, float_rows, make
from hwkern.nn import Calibration
from hwkern.nn.pack import all_finite, dtype_name, nonfinite_rows
from hwkern.nn.packed import PackedLayer
from hwkern.report import LayerReport, Report

Originals = Literal["auto", "host", "disk", "device", "drop"]
Progress = Callable[[int, int, str], None]


def patch(
    model: nn.Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    originals: Originals = "auto",
    progress: Progress | None = None,
    plan: HasRecipes | None = None,
    allow_other_gpu: bool = False,
    fuse: bool = True,
    embeddings: bool = False,
) -> Report:
    """Replace the linear layers of ``model`` by int8 layers, in place.

    Swapped are ``nn.Linear`` and transformers' ``Conv1D`` with a float32, float16 or bfloat16 weight. Left alone by
    default: the output head (``lm_head`` and whatever shares its weight with an embedding), layers too small to gain
    (fewer than 2**17 weights, or than 64 inputs or outputs), and everything on a CPU without an exact int8 product.
    Left alone always: layers whose owner reads the weight itself (``nn.MultiheadAttention``,
    ``nn.TransformerEncoderLayer``), parametrized layers, subclasses with their own forward, weights with NaN or ±inf.
    The report gives the reason for each.

    Args:
        model: any module; on the CPU, on CUDA, or on ``meta`` (to be loaded afterwards).
        include: which layers to take: a pattern for their qualified names (``"encoder.*.dense"``, as in fnmatch), a
            predicate ``(name, module) -> bool``, or a sequence of both. What it names is also taken when it would be
            left as an output head, as too small, or for the CPU's sake. Default: all.
        exclude: which layers to leave, in the same form. Stronger than ``include``.
        originals: where the float weights stay for :func:`unpatch`: "host" (memory), "disk" (a temporary file that
            vanishes by itself), "device" (where they are: for trials, no memory is saved), "drop" (nowhere: unpatch
            becomes impossible; a GPU with room for both holds them until the last layer is int8), or "auto": host
            memory for a model on CUDA while there is room, the disk for one on the CPU.
        progress: called as ``progress(done, total, name)`` after each layer.
        plan: from :func:`hwkern.plan` or :func:`hwkern.calibrate`: which scheme each layer gets; what it does not name,
            or keeps, stays float. Norms that it divides come back with :func:`unpatch`.
        allow_other_gpu: a plan that was measured on another device is timed and decided again on this one, instead of
            being refused.
        fuse: let int8 layers that read the same tensor run as one product, and norms and activations before them in
            one kernel with the quantization, in models whose structure is known (docs/patch.md). Each fusion is run
            both ways on random rows and undone when they differ; the report says so. False undoes all.
        embeddings: make ``nn.Embedding`` tables int8 as well, and the output heads that share a weight with one: table
            and head are then one int8 tensor. ``include`` and ``exclude`` choose among them too. Off by default: it
            brings memory and next to no time, and code that reads ``embedding.weight`` instead of calling the layer
            would read int8. A plan says of its own which tables are int8. A head that ``include`` names becomes int8
            without it too, for its speed: the float table then stays beside it, and the report says so.

    Returns:
        A :class:`~hwkern.report.Report`; print it.

    Raises:
        TypeError, ValueError: the model, a pattern or an option cannot be used.
        RuntimeError: the model is on a device where the int8 kernels cannot run.
        OSError: the float weights find no room.

    After an error, whenever it strikes, the model is as it was before.
    """
    _check_model(model, "patch")
    if originals not in ("auto", "host", "disk", "device", "drop"):
        raise ValueError(f"originals = {originals!r}: it must be 'auto', 'host', 'disk', 'device' or 'drop'.")
    layers = find_layers(model, embeddings or plan is not None)
    wanted, unwanted = Selection("include", include), Selection("exclude", exclude)
    if allow_other_gpu and plan is not None and callable(again := getattr(plan, "for_device", None)):
        plan = cast(HasRecipes, again(model))
    if plan is not None:  # of the embeddings only those that it is about
        named = {*getattr(plan, "recipes", ()), *getattr(plan, "left", ())}
        layers = [layer for layer in layers if not layer.is_embedding or layer.names[0] in named]
    for selection in (wanted, unwanted):
        selection.check(layers, model)
    recipes = None if plan is None else _planned(model, layers, plan, wanted, unwanted)
    if recipes is None:
        judge(model, layers, wanted, unwanted)
    _refuse_integer_model(layers)
    chosen = [layer for layer in layers if layer.status == "int8"]
    _refuse_device(chosen)
    groups = tied(chosen)
    folds = _folds_of(model, recipes or {})
    spool = Spool(_place(originals, groups))
    before = _model_bytes(model)
    reports = _Reports(layers)

    def step(group: Sequence[Layer], journal: _Journal) -> None:
        plain = Recipe("int8" if all(layer.is_embedding for layer in group) else "w8a8")
        recipe = plain if recipes is None else recipes[group[0].names[0]]
        _swap(group, spool, journal, recipe)

    fused: list[str] = []

    def last(journal: _Journal) -> None:
        _divide(model, folds, journal)
        if not fuse:
            _fusion.unfuse(model)
            return
        journal.append(lambda: _fusion.unfuse(model))
        fused.append(_fusion.fuse(model))

    _transaction(groups, step, progress, last)
    if plan is not None and callable(to_dict := getattr(plan, "to_dict", None)):
        model.__dict__["_hwkern_plan"] = to_dict()
    if originals == "drop":
        for layer in chosen:
            if layer.status == "int8":
                layer.now._original.forget("it was dropped (originals='drop')")
    _hf_hook.tell(model)
    return Report(
        layers=reports.finish(),
        model_bytes_before=before,
        model_bytes_after=_model_bytes(model),
        originals=(originals if originals == "drop" else spool.place) if spool.bytes else "",
        originals_bytes=spool.bytes,
        note=_note(model, layers),
        fusion="".join(fused),
    )


def unpatch(model: nn.Module, *, include: Selector | None = None, exclude: Selector | None = None) -> Report:
    """Put the original modules back, in place: the same objects, with bit-identical weights.

    They come back on the device where their int8 layers are now, with the hooks and the ``training`` flag of now, and
    with the bias of now. ``include`` and ``exclude`` choose int8 layers as in :func:`patch`.

    Raises:
        ValueError: a float weight is gone (``originals="drop"``, a model out of a pickle, other weights loaded since);
            ``Int8Linear.to_float()`` still turns such a layer into a float one.
        TypeError: ``model`` is not a module, or a pattern is none.
    """
    _check_model(model, "unpatch")
    layers = [layer for layer in find_layers(model, True) if isinstance(layer.module, PackedLayer)]
    wanted, unwanted = Selection("include", include), Selection("exclude", exclude)
    for selection in (wanted, unwanted):
        selection.check(layers, model)
    chosen = []
    for layer in layers:
        reason = unwanted.reason(layer) or wanted.reason(layer)
        if reason:
            layer.status, layer.reason = "left", reason
        else:
            layer.status = "restored"
            chosen.append(layer)
    _refuse_lost(chosen)
    _refuse_half_folds(model, chosen)
    before = _model_bytes(model)
    reports = _Reports(layers)
    fused = _fusion.is_fused(model)
    _fusion.unfuse(model)

    def last(journal: _Journal) -> None:
        _unfold(model, chosen, journal)
        if fused:  # what is left of it
            _fusion.fuse(model)

    try:
        _transaction([[layer] for layer in chosen], _restore, None, last)
    except BaseException:
        if fused:
            _fusion.fuse(model)
        raise
    model.__dict__.pop("_hwkern_plan", None)
    for layer in chosen:
        cast(PackedLayer, layer.module)._original = None
    _hf_hook.tell(model)
    return Report(
        layers=reports.finish(),
        model_bytes_before=before,
        model_bytes_after=_model_bytes(model),
        note="" if layers else "The model has no int8 layers: nothing to do.",
    )


# ---- errors before anything is touched ------------------------------------------------------------------------------


def _check_model(model: object, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"hwkern.{verb} takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, PackedLayer):
        raise ValueError(
            f"The model itself is an {type(model).__name__}, which cannot be replaced in place: use its to_float()."
        )
    if (cls := int8_class(model)) is not None:
        raise ValueError(
            f"The model itself is a {type(model).__name__}, which cannot be replaced in place: use "
            f"hwkern.nn.{cls.__name__}.from_float(layer), or put it into an nn.Sequential."
        )
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "The model"
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{where} was compiled (torch.compile): its code has the present layers built in. "
                f"{verb.capitalize()} the plain model first, then compile it."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a TorchScript module: {verb} the plain model, then script or trace it.")
        if type(module).__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"{where} is wrapped in {type(module).__name__}, which keeps its own record of the parameters: "
                f"{verb} the model before wrapping it."
            )


def _refuse_integer_model(layers: Sequence[Layer]) -> None:
    if not layers or any(layer.status in ("int8", "already") for layer in layers):
        return
    integer = [layer for layer in layers if _has_integer_weight(layer)]
    if len(integer) == len(layers):
        raise ValueError(
            f"This is an integer model: all of its {len(layers)} linear layers are quantized already, for example "
            f"{integer[0].names[0]!r} ({type(integer[0].module).__name__}). hwkern quantizes float weights: load the "
            "float model."
        )


def _has_integer_weight(layer: Layer) -> bool:
    weight = layer.weight
    integer = weight is not None and not weight.is_floating_point() and not weight.is_complex()
    return integer or is_foreign(layer.module)


def _refuse_device(chosen: Sequence[Layer]) -> None:
    for layer in chosen:
        device = cast(Tensor, layer.weight).device
        if device.type in ("cpu", "meta"):
            continue
        problem = _native.cuda_problem() if device.type == "cuda" else "hwkern has kernels for CUDA and for the CPU."
        if problem is not None:
            raise RuntimeError(
                f"The model is on {device} (layer {layer.names[0]!r}), where hwkern cannot run: {problem} "
                "On the CPU it runs: model.cpu()."
            )


def _refuse_lost(chosen: Sequence[Layer]) -> None:
    lost = []
    for layer in chosen:
        module = cast(PackedLayer, layer.module)
        original = module._original
        if original is None:
            lost.append((layer, "the layer was made without hwkern.patch"))
        elif original.weight is None:
            lost.append((layer, original.gone))
        elif original.weight.gone:
            lost.append((layer, original.weight.gone))
        elif original.weight.is_meta and not module.weight.is_meta:
            lost.append((layer, "the model was patched on the meta device, without values"))
    if lost:
        layer, why = lost[0]
        count = f"{len(lost)} of {len(chosen)} int8 layers" if len(chosen) > 1 else "The int8 layer"
        raise ValueError(
            f"{count} cannot go back, because the float weight is gone: {why} (for example {layer.names[0]!r}). "
            "The int8 weight as float is layer.to_float(); to keep the float weights, patch with originals='host' or "
            "'disk'."
        )


# ---- plans ----------------------------------------------------------------------------------------------------------


class HasRecipes(Protocol):
    """What ``patch`` needs of a plan: name → recipe. It may have ``check(model)``, which raises, and ``to_dict()``."""

    @property
    def recipes(self) -> dict[str, Recipe]: ...


def _planned(
    model: nn.Module, layers: Sequence[Layer], plan: HasRecipes, wanted: Selection, unwanted: Selection
) -> dict[str, Recipe]:
    """The recipes of the layers that become int8, and every layer's status. ValueError for a plan that does not fit."""
    if not isinstance(getattr(plan, "recipes", None), dict):
        raise TypeError(f"plan is {type(plan).__name__}: pass what hwkern.plan or hwkern.calibrate returned.")
    if callable(check := getattr(plan, "check", None)):
        check(model)
    names = {name: layer for layer in layers for name in layer.names}
    unknown = [name for name in plan.recipes if name not in names]
    if unknown:
        raise ValueError(f"The plan names the layer {unknown[0]!r}, which this {type(model).__name__} has not.")
    judge(model, layers, Selection("include", "*"), Selection("exclude", None))  # what is impossible stays so
    recipes = {}
    for layer in layers:
        recipe = plan.recipes.get(layer.names[0])
        if layer.status != "int8":
            if recipe is not None and recipe.scheme != "keep" and layer.status != "already":
                raise ValueError(f"The plan makes {layer.names[0]!r} int8, but {layer.reason}.")
            continue
        reason = unwanted.reason(layer) or wanted.reason(layer)
        if not reason and recipe is None:
            reason = "not in the plan"
        elif not reason and recipe is not None and recipe.scheme == "keep":
            reason = "the plan keeps it"
        if reason or recipe is None:
            layer.status, layer.reason = "left", reason
            continue
        try:
            recipe.check(float_rows(layer.module).shape[1])
        except ValueError as error:
            raise ValueError(f"The plan for {layer.names[0]!r} cannot be: {error}.") from error
        if recipe.calibration != Calibration() and cast(Tensor, layer.weight).is_meta:
            raise ValueError(
                f"{layer.names[0]!r} is on the meta device, where its calibrated scale would be lost: load it first."
            )
        recipes[layer.names[0]] = recipe
    judge_ties(model, layers, keep=True)  # exclude may have parted a head from its embedding
    for layer in layers:
        if layer.status != "int8":
            recipes.pop(layer.names[0], None)
    for group in tied([layer for layer in layers if layer.status == "int8"]):
        found = {recipes[layer.names[0]] for layer in group}
        if len(group) > 1 and (len(found) > 1 or not all(r.calibration == Calibration() for r in found)):
            raise ValueError(f"The plan for {group[0].names[0]!r} differs from that of a layer with the same weight.")
    return recipes


def _folds_of(model: nn.Module, recipes: dict[str, Recipe]) -> list[tuple[_fold.Group, Tensor]]:
    """The norms to divide. ValueError when a plan folds what this model's structure does not allow."""
    wanted = {name for name, recipe in recipes.items() if recipe.calibration.folded}
    folds = []
    for group in _fold.groups(model) if wanted else []:
        vectors = {recipes[name].calibration.smooth for name in group.readers if name in wanted}
        if not vectors:
            continue
        if len(vectors) > 1 or not wanted.issuperset(group.readers):
            raise ValueError(
                f"The plan divides {group.norm_name!r} for some of its readers only ({', '.join(group.readers)}): plan "
                "without include and exclude, or for the same layers."
            )
        wanted -= set(group.readers)
        folds.append((group, recipes[group.readers[0]].calibration.divisors(len(next(iter(vectors))), "cpu")))
    if wanted:
        raise ValueError(f"The plan folds smoothing before {min(wanted)!r}, where this model has no norm for it.")
    return folds


def _divide(model: nn.Module, folds: Sequence[tuple[_fold.Group, Tensor]], journal: _Journal) -> None:
    for group, divisors in folds:
        fold = _fold.Fold(group, divisors)
        journal.append(functools.partial(_take_back, model, fold))
        fold.apply()
        _folds(model).append(fold)


def _folds(model: nn.Module) -> list[_fold.Fold]:
    """The norms of the model that are divided."""
    found: list[_fold.Fold] = model.__dict__.setdefault("_hwkern_folds", [])
    return found


def _take_back(model: nn.Module, fold: _fold.Fold) -> None:
    fold.undo()
    left = [other for other in _folds(model) if other is not fold]
    model.__dict__["_hwkern_folds"] = left
    if not left:
        del model.__dict__["_hwkern_folds"]


def _unfold(model: nn.Module, chosen: Sequence[Layer], journal: _Journal) -> None:
    """Give the norms of restored layers their own values back."""
    names = {name for layer in chosen for name in layer.names}
    for fold in [fold for fold in model.__dict__.get("_hwkern_folds", []) if names & set(fold.readers)]:
        journal.append(functools.partial(_divide_again, model, fold, fold.values()))
        _take_back(model, fold)


def _divide_again(model: nn.Module, fold: _fold.Fold, values: Sequence[Tensor]) -> None:
    fold.put(values)
    if fold not in _folds(model):
        _folds(model).append(fold)


def _refuse_half_folds(model: nn.Module, chosen: Sequence[Layer]) -> None:
    names = {name for layer in chosen for name in layer.names}
    for fold in model.__dict__.get("_hwkern_folds", []):
        if names & set(fold.readers) and not names.issuperset(fold.readers):
            raise ValueError(
                f"{fold.name!r} was divided for all of its readers ({', '.join(fold.readers)}): unpatch them together."
            )


# ---- memory ---------------------------------------------------------------------------------------------------------


def _place(originals: Originals, groups: Sequence[Sequence[Layer]]) -> Place:
    """Host or disk, with room for all float weights. OSError before anything is touched when there is none."""
    weights = [cast(Tensor, group[0].weight) for group in groups]
    weights = [weight for weight in weights if not weight.is_meta]
    need = sum(weight.numel() * weight.element_size() for weight in weights)
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    if not weights:
        return "host"
    if originals in ("host", "device"):
        return cast(Place, originals)
    if originals == "drop" and room_beside(weights):
        return "device"  # until nothing can fail any more: the way to the host and back takes longer than all the rest
    if originals != "disk" and not on_cpu and need < free_memory() * 3 // 4:
        return "host"
    free = free_disk()
    if need < free:
        return "disk"
    if originals != "disk" and on_cpu:
        return "host"  # takes no more memory than the model does now
    raise OSError(
        errno.ENOSPC,
        f"The float weights need {need / 1e9:.2f} GB, but {spool_directory()} has only {free / 1e9:.2f} GB left: set "
        "TMPDIR to a folder with more room, or pass originals='host' to keep them in memory",
    )


def _model_bytes(model: nn.Module) -> int:
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


# ---- the swap -------------------------------------------------------------------------------------------------------

# What was done, as functions that undo it. An entry is written before its change and may run when that never happened.
_Journal = list[Callable[[], None]]


def _transaction(
    groups: Sequence[Sequence[Layer]],
    step: Callable[[Sequence[Layer], _Journal], None],
    progress: Progress | None,
    last: Callable[[_Journal], None] = lambda journal: None,
) -> None:
    """Run ``step`` on every group, then ``last``; when one fails (or the user interrupts), undo all and raise."""
    journal: _Journal = []
    total = sum(len(group) for group in groups)
    done = 0
    try:
        # Outside inference mode, because tensors made inside it could never again take part in training.
        with torch.inference_mode(False), torch.no_grad():
            for group in groups:
                step(group, journal)
                done += len(group)
                if progress is not None:
                    progress(done, total, group[-1].names[0])
            last(journal)
    except BaseException:
        with torch.inference_mode(False), torch.no_grad():
            _undo(journal)
        raise


def _undo(journal: _Journal) -> None:
    failure: Exception | None = None
    while journal:
        try:
            journal.pop()()
        except Exception as error:  # one lost layer must not cost the others
            failure = error
    if failure is not None:
        raise RuntimeError("hwkern failed, and could not put every layer back as it was.") from failure


def _swap(group: Sequence[Layer], spool: Spool, journal: _Journal, recipe: Recipe) -> None:
    """Make the layers of one tied group int8. Frees the float weight, unless somebody else holds it."""
    weight = cast(nn.Parameter, group[0].weight)
    made = make(group[0].module, recipe)
    if not all_finite(made.weight_scale):
        bad = nonfinite_rows(made.weight_scale, "rows" if group[0].is_embedding else "output channels")
        for layer in group:
            layer.status, layer.reason = "left", f"its weight has NaN or ±inf in {bad}"
        return
    stored = _store(weight, spool)
    for layer in group:
        module = layer.module
        new = made
        if layer is not group[0]:
            # A plain recipe (plans give tied layers no other): weight and scale are all there is, and shared.
            new = around(module, recipe, made.weight, made.weight_scale)
        adopt(new, module)
        new._original = Original(module, stored, bias_alone=is_alone(module._parameters.get("bias")))
        journal.append(functools.partial(_put_back, layer, module, new))
        module._parameters["weight"] = None
        _set(layer, new)


def _store(weight: nn.Parameter, spool: Spool) -> FloatWeight:
    try:
        return FloatWeight(weight, spool)
    except OSError as error:
        raise OSError(
            error.errno,
            f"The float weights could not be kept in {spool_directory()} ({error.strerror}): set TMPDIR to a folder "
            "with more room, or pass originals='host' to keep them in memory",
        ) from error


def _restore(group: Sequence[Layer], journal: _Journal) -> None:
    """Put the float module of one int8 layer back."""
    (layer,) = group
    int8 = cast(PackedLayer, layer.module)
    module = cast(nn.Module, cast(Original, int8._original).module)

    def undo() -> None:
        module._parameters["weight"] = None
        _set(layer, int8)

    journal.append(undo)
    _put_back(layer, module, int8)


def _put_back(layer: Layer, module: nn.Module, int8: PackedLayer) -> None:
    original = cast(Original, int8._original)
    stored = cast(FloatWeight, original.weight)
    module._parameters["weight"] = stored.restore(int8.weight.device, int8.float_dtype)
    if "bias" in int8._parameters:
        module._parameters["bias"] = bias = int8._parameters["bias"]
        if bias is not None and original.bias_alone and not is_alone(bias):
            bias.data = bias.data.clone()
    adopt(module, int8)
    _set(layer, module)


def _set(layer: Layer, module: nn.Module) -> None:
    # Not setattr: the registry's order must stay, and a parent's own __setattr__ has no say in this.
    for parent, attribute in layer.slots:
        parent._modules[attribute] = module


# ---- the report -----------------------------------------------------------------------------------------------------


def survey(model: nn.Module) -> Report:
    """What the linear layers (and int8 embeddings) of ``model`` are now; ``hwkern.report(model)``. Changes nothing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"hwkern.report takes a torch.nn.Module, not {type(model).__name__}.")
    layers = [
        layer
        for layer in find_layers(model, embeddings=True)
        if not layer.is_embedding or isinstance(layer.module, PackedLayer)
    ]
    judge(model, layers, Selection("include", None), Selection("exclude", None))
    for layer in layers:
        if layer.status == "int8":
            layer.status, layer.reason = "left", "float: hwkern.patch has not been here, or left it"
    total = _model_bytes(model)
    note = "" if layers else "The model has no linear layers."
    return Report(_Reports(layers).finish(), total, total, note=note, fusion=_fusion.summary(model))


class _Reports:
    """Remembers sizes and dtypes before the change, and writes the lines of the report after it."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._before = _facts(layers)

    def finish(self) -> tuple[LayerReport, ...]:
        return tuple(
            LayerReport(
                names=tuple(layer.names),
                status=layer.status,
                reason=layer.reason,
                tied_to=layer.tied_to,
                bytes_before=before.pop("bytes"),
                bytes_after=after["bytes"],
                scheme=layer.now.scheme if isinstance(layer.now, PackedLayer) else "",
                **before,
            )
            for layer, before, after in zip(self._layers, self._before, _facts(self._layers), strict=True)
        )


def _facts(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Kind, sizes, dtype, device and bytes of each layer as it is now; a tensor that several share is counted once."""
    seen: set[int] = set()
    facts = []
    for layer in layers:
        module = layer.now
        weight = module._parameters.get("weight")
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        n, k = _sizes(module)
        facts.append(
            {
                "kind": type(module).__name__,
                "in_features": n if layer.is_embedding else k,
                "out_features": k if layer.is_embedding else n,
                "dtype": "" if weight is None else dtype_name(weight.dtype),
                "device": "" if weight is None else str(weight.device),
                "bytes": sum(_bytes(tensor) for tensor in tensors if id(tensor) not in seen),
            }
        )
        seen.update(map(id, tensors))
    return facts


def _bytes(tensor: Tensor) -> int:
    if nn.parameter.is_lazy(tensor):  # a lazy module's, without a shape yet
        return 0
    return tensor.numel() * tensor.element_size()


def _sizes(module: nn.Module) -> tuple[int, int]:
    """``(outputs, inputs)``, of an embedding ``(rows, columns)``: the weight as a linear layer would hold it."""
    names = ("nf", "nx") if hasattr(module, "nf") else ("out_features", "in_features")
    if hasattr(module, "num_embeddings"):
        names = ("num_embeddings", "embedding_dim")
    n, k = (cast(int, getattr(module, name, 0)) for name in names)
    return n, k


def _note(model: nn.Module, layers: Sequence[Layer]) -> str:
    lines = []
    if already := sum(layer.status == "already" for layer in layers):
        nothing = " Nothing was changed." if all(layer.status != "int8" for layer in layers) else ""
        lines.append(f"Already patched: {already} layer{'' if already == 1 else 's'}.{nothing}")
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    lines += [
        f"{layer.names[0]!r} is int8 beside the float table of {layer.tied_to!r}, whose weight it was: with "
        "embeddings=True they are one int8 tensor."
        for layer in layers
        if layer.status == "int8" and not layer.is_embedding and layer.tied_to in tables
    ]
    return " ".join(lines)


class _CallableModule(types.ModuleType):
    """``hwkern.patch`` is the function, but importing this file binds that name to the module: let both be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return patch(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
