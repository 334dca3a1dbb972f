"""Measure instead of predict: ``hwkern.tune`` times the candidates of a layer on this GPU and uses the fastest.

Without this file the C++ cost model chooses every config. ``tune`` measures, keeps the times in the user's cache folder
(``_cache.py``) and makes ``ops`` use them in this process; a later process uses them after ``use_tuned()`` or with
HWKERN_TUNED=1 in its environment. M is tuned in steps (``_choice.EDGES``): a step is measured at both its ends, and a
config replaces the model's only if it is faster over the two by more than the noise.

Products and whole layers are measured apart, because quantize shifts what is fastest: its launch overlaps some products
more than others, and some configs quantize in the product's own launch. A layer's call takes the layer's choice; a
product alone, or behind a norm or an activation that quantizes, the product's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import types
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hwkern import _choice, _native, hardware
from hwkern._cache import Cache, device_stamp
from hwkern._choice import CHOOSE, EDGES, K_MAX, LAYER, PRODUCT
from hwkern._console import plain_table, progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    Target = nn.Module | Iterable[tuple[int, int]]

PRUNE = 2.0  # configs that the model predicts to be slower than its best by this factor are not measured
LEAST_CANDIDATES = 4  # but at least so many are
NOISE = 1.02  # two measurements of one kernel differ by up to 1 %; a change must be worth more
SECONDS = 0.004  # of replays for each candidate, after its capture of about the same length
#: Stock paths that can be timed beside ours: cuBLAS in bfloat16, which is a whole layer, and cuBLAS INT8, raw sums.
PEERS = {PRODUCT: ("bf16", "int_mm"), LAYER: ("bf16",)}

# ---- the cache's entries: "MxNxK dtype" or "MxNxK dtype layer" → {"configs": {id: µs}, "peers": {name: µs}} ---------


def cache_of(gpu: hardware.Gpu) -> Cache:
    return Cache("tune", device_stamp(gpu))


def entry_name(m: int, n: int, k: int, dtype: str, kind: str = PRODUCT) -> str:
    return f"{m}x{n}x{k} {dtype}" + (f" {kind}" if kind != PRODUCT else "")


def times_of(entry: Any, kind: str = "configs") -> dict[str, float]:
    """Name or config id → µs of one entry; what is no time is left out, like what is not there."""
    found = entry.get(kind) if isinstance(entry, dict) else None
    if not isinstance(found, dict):
        return {}
    # Up to an hour: JSON may hold integers that no float can.
    return {name: float(us) for name, us in found.items() if type(us) in (int, float) and 0 < us < 3.6e9}


def configs_of(entry: Any) -> dict[int, float]:
    return {int(name): us for name, us in times_of(entry).items() if name.isdecimal()}


def ends_of(step: int) -> tuple[int, int]:
    """The smallest and the largest M of a step."""
    return (EDGES[step - 1] + 1 if step else 1), EDGES[step]


def _choose(model: Sequence[int], times: Sequence[Mapping[int, float]]) -> int:
    """The config of one step, from the model's choice and the measured times at the step's ends; CHOOSE: the model's.

    The slowdown against the fastest of each end, multiplied over the ends, is least; and the model's own choices are
    beaten by more than the noise.
    """
    if not all(times):
        return CHOOSE
    common = set.intersection(*(set(end) for end in times))
    if not common or any(choice not in end for choice, end in zip(model, times, strict=True)):
        return CHOOSE
    cost = {config: math.prod(end[config] for end in times) for config in sorted(common)}
    best = min(cost, key=cost.__getitem__)
    of_model = math.prod(end[choice] for choice, end in zip(model, times, strict=True))
    return best if cost[best] * NOISE ** len(times) < of_model else CHOOSE


def _steps(gpu: hardware.Gpu, n: int, k: int, dtype: str, kind: str, entries: Mapping[str, Any]) -> tuple[int, ...]:
    """What ``_choice.tuned`` holds for one product or layer."""
    chosen = []
    for step in range(len(EDGES)):
        ends = sorted(set(ends_of(step)))
        times = [configs_of(entries.get(entry_name(m, n, k, dtype, kind))) for m in ends]
        model = [model_choice(m, n, k, gpu, dtype, kind) for m in ends] if all(times) else []
        chosen.append(_choose(model, times) if model else CHOOSE)
    return (*chosen, CHOOSE)


def _device(gpu: hardware.Gpu) -> tuple[int, int, int]:
    return gpu.sm_count, gpu.compute, gpu.shared_bytes


def model_choice(m: int, n: int, k: int, gpu: hardware.Gpu, dtype: str, kind: str = PRODUCT) -> int:
    native = _native.extension()
    if kind == LAYER and dtype != "float32":  # of float32 csrc/linear.cpp asks for a product
        return int(native.linear_choose(m, n, k, *_device(gpu)))
    return int(native.gemm_choose(m, n, k, *_device(gpu), b_is_constant=True))


# ---- use -----------------------------------------------------------------------------------------------------------


def use_tuned(on: bool = True) -> contextlib.AbstractContextManager[None]:
    """Take configs from earlier measurements (``on``) or from the cost model alone, from now on.

    As a context manager it puts back what was in use before: ``with hwkern.use_tuned(): ...``. Reads the cache folder
    for every GPU of this process; where there is nothing, the cost model goes on choosing.
    """
    before = dict(_choice.tuned)
    found: dict[_choice.Key, tuple[int, ...]] = {}
    for gpu in hardware.gpus() if on else []:
        entries = cache_of(gpu).read()
        for n, k, dtype, kind in sorted({parts[1:] for key in entries if (parts := _parts(key))}):
            found |= _activation(gpu, n, k, dtype, kind, entries)
    _choice.tuned.clear()
    _choice.tuned.update(found)

    @contextlib.contextmanager
    def restore() -> Iterator[None]:
        try:
            yield
        finally:
            _choice.tuned.clear()
            _choice.tuned.update(before)

    return restore()


def _parts(key: str) -> tuple[int, int, int, str, str] | None:
    """M, N, K, dtype and kind of an :func:`entry_name`; None of anything else."""
    shape, _, rest = key.partition(" ")
    dtype, _, kind = rest.partition(" ")
    sizes = shape.split("x")
    # Nine digits: what no kernel takes has eleven, and int() refuses some thousands.
    if len(sizes) != 3 or not all(size.isdecimal() and len(size) < 10 for size in sizes) or kind not in ("", LAYER):
        return None
    m, n, k = map(int, sizes)
    return (m, n, k, dtype, kind or PRODUCT) if min(m, n, k) > 0 else None


def _activation(
    gpu: hardware.Gpu, n: int, k: int, dtype: str, kind: str, entries: Mapping[str, Any]
) -> dict[_choice.Key, tuple[int, ...]]:
    """The row of ``_choice.tuned`` for one product or layer, or nothing where the cost model chooses throughout."""
    import torch

    steps = _steps(gpu, n, k, dtype, kind, entries)
    known = isinstance(getattr(torch, dtype, None), torch.dtype)
    return {(gpu.index, n, k, getattr(torch, dtype), kind): steps} if known and any(s != CHOOSE for s in steps) else {}


# ---- measure -------------------------------------------------------------------------------------------------------


def product_configs() -> list[dict[str, Any]]:
    """The rows of the config table for int8 · int8; those of weight-only layers have a choice of their own."""
    return _configs("w8a8")


def layer_configs() -> list[dict[str, Any]]:
    """The rows for whole layers alone: they quantize the activations in the product's own launch."""
    return _configs("w8a8_linear")


def _configs(scheme: str) -> list[dict[str, Any]]:
    return [row for row in _native.extension().gemm_configs() if row["scheme"] == scheme]


def obstacle(row: Mapping[str, Any], k: int, gpu: hardware.Gpu) -> str:
    """Why a config cannot run a product or layer of this K on the GPU; empty if it can."""
    if gpu.compute < row["min_compute"]:
        return f"needs compute capability {row['min_compute'] / 10:.1f}"
    if gpu.compute > row["max_compute"]:
        return f"compiled for compute capability {row['max_compute'] / 10:.1f} only"
    if row["shared_bytes"] > gpu.shared_bytes:
        return f"needs {row['shared_bytes']} bytes of shared memory a block, there are {gpu.shared_bytes}"
    return f"takes K up to {row['max_k']}" if k > row["max_k"] else ""


def candidates(m: int, n: int, k: int, gpu: hardware.Gpu) -> dict[int, float]:
    """Config id → predicted µs of every product's config that runs on the GPU, fastest first."""
    native = _native.extension()
    found = {
        row["id"]: native.gemm_predict_us(row["id"], m, n, k, *_device(gpu), b_is_constant=True)
        for row in product_configs()
        if not obstacle(row, k, gpu)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def layer_candidates(k: int, gpu: hardware.Gpu) -> list[int]:
    """The ids of :func:`layer_configs` that run: few, and the cost model predicts no times for them."""
    return [row["id"] for row in layer_configs() if not obstacle(row, k, gpu)]


def _worth_measuring(m: int, n: int, k: int, gpu: hardware.Gpu, dtype: str, kind: str) -> list[int]:
    predicted = candidates(m, n, k, gpu)
    limit = PRUNE * min(predicted.values(), default=0)
    worth = [config for place, (config, us) in enumerate(predicted.items()) if place < LEAST_CANDIDATES or us <= limit]
    if kind == LAYER:
        worth += layer_candidates(k, gpu)
    model = model_choice(m, n, k, gpu, dtype, kind)
    return worth if model in worth else [*worth, model]


def measure(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    configs: Sequence[int],
    gpu: hardware.Gpu,
    kind: str = PRODUCT,
    peers: Sequence[str] = (),
) -> dict[str, dict[str, float]]:
    """µs of a product with scales, as a layer launches it, or of a whole layer, and of the peers that can run here.

    ``{"configs": {id: µs}, "peers": {name: µs}}``.
    """
    import torch

    from hwkern import ops
    from hwkern._timing import Call, cuda_us, layer_product, random_int8, rotations

    device = torch.device("cuda", gpu.index)
    with torch.cuda.device(device):
        sets = rotations(
            (dtype.itemsize if kind == LAYER else 1) * m * k + n * k + m * n * dtype.itemsize, gpu.l2_bytes
        )
        stored = ops.padded(k)  # rows of a packed weight and of quantized activations
        scale_m, scale_n = (torch.rand(size, device=device) + 0.5 for size in (m, n))
        normal = functools.partial(torch.randn, device=device)
        operands = [
            (
                normal(m, k, dtype=dtype) if kind == LAYER else random_int8(m, stored, device=device)[:, :k],
                random_int8(n, stored, device=device),
            )
            for _ in range(sets)
        ]

        def call(a: torch.Tensor, b: torch.Tensor, config: int) -> Call:
            if kind == LAYER:
                return functools.partial(ops.int8_linear, a, b, scale_n, config=config)
            return functools.partial(layer_product, a, b[:, :k], scale_m, scale_n, dtype, config)

        calls: dict[str, list[Call]] = {str(config): [call(a, b, config) for a, b in operands] for config in configs}
        if "bf16" in peers:
            sets = rotations(2 * (m * k + n * k + m * n), gpu.l2_bytes)
            half = functools.partial(normal, dtype=torch.bfloat16)
            calls["bf16"] = [functools.partial(torch.mm, half(m, k), half(n, k).t()) for _ in range(sets)]
        if "int_mm" in peers and m > 16 and k % 8 == 0 and n % 8 == 0:
            calls["int_mm"] = [
                functools.partial(torch._int_mm, a.contiguous(), b[:, :k].contiguous().t()) for a, b in operands
            ]
        us = {name: round(value, 3) for name, value in cuda_us(calls, SECONDS).items()}
    return {
        "configs": {str(config): us[str(config)] for config in configs},
        "peers": {name: us[name] for name in peers if name in us},
    }


@dataclass
class Step:
    """One product or layer at one step of M."""

    n: int
    k: int
    dtype: str
    kind: str  #: "product", of int8 matrices alone, or "layer", which quantizes its activations first
    m: tuple[int, int]  #: the smallest and the largest M
    model: tuple[int, ...]  #: what the cost model chooses at each end
    model_us: tuple[float, ...]
    config: int  #: what is used from now on; -1: the model's choice
    us: tuple[float, ...]  #: its times at the ends
    peers_us: dict[str, float] = field(default_factory=dict)  #: at the largest M

    @property
    def gain(self) -> float:
        """How many times faster than the model's choice, in the geometric mean over the ends."""
        ratio = math.prod(before / after for before, after in zip(self.model_us, self.us, strict=True))
        return float(ratio ** (1 / len(self.us)))


@dataclass(repr=False)
class Tuning:
    """What :func:`tune` found. ``print(tuning)`` shows the steps whose config changed."""

    gpu: str
    steps: list[Step]
    measured: int  #: points that were timed now
    known: int  #: points that the cache had
    file: str | None  #: where the times are kept; None: nowhere

    @property
    def changed(self) -> list[Step]:
        """The steps at which a measured config replaces the cost model's."""
        return [step for step in self.steps if step.config != CHOOSE]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            [
                f"{s.kind} {s.m[0]}–{s.m[1]}×{s.n}×{s.k}",
                "/".join(map(str, dict.fromkeys(s.model))),
                " / ".join(f"{us:.1f}" for us in s.model_us),
                str(s.config),
                " / ".join(f"{us:.1f}" for us in s.us),
                f"{s.gain:.2f}×",
            ]
            for s in self.changed
        ]
        head = f"Tuned on {self.gpu}: {self.measured} points measured, {self.known} known already; "
        head += f"{len(rows)} of {len(self.steps)} steps of M have a faster config than the cost model's."
        if self.file is None:
            head += " Not kept: the cache folder cannot be written, or save=False."
        faster = [
            f"{name} is faster at M = {s.m[1]} of {s.n}×{s.k}: {us:.1f} µs against the {s.kind}'s {s.us[-1]:.1f}."
            for s in self.steps
            for name, us in s.peers_us.items()
            if us < s.us[-1]
        ]
        table = [plain_table("", ["M×N×K", "model", "µs", "measured", "µs", "gain"], rows)] if rows else []
        return "\n".join([head, *table, *faster])

    __repr__ = __str__


def tune(
    target: Target,
    m: Iterable[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    peers: bool = False,
    save: bool = True,
    show: bool = True,
) -> Tuning:
    """Measure which config is fastest for each layer on this GPU, and for its product, and use it from now on.

    Args:
        target: a model with ``Int8Linear`` layers on a GPU (after ``hwkern.patch``), or layer shapes ``[(N, K), …]``.
        m: numbers of tokens to tune for; the whole step of M around each is tuned. All of 1 … 8192 by default.
        dtype: the output's; by default each layer's own, or bfloat16 for shapes.
        device: the GPU; by default the layer's, or the current one for shapes.
        peers: time stock bfloat16 and cuBLAS INT8 too, and say where one is faster. They are never run in our place:
            an int8 layer holds no bfloat16 weight, and cuBLAS INT8 gives sums without scales.
        save: keep the times for later processes: see :func:`use_tuned`.
        show: a progress bar on stderr.

    In use in this process, that is; for later ones see ``save``. Takes about 0.4 s for each point that the cache does
    not have; a layer has four points a step, two of them of its product alone. Raises RuntimeError without a usable
    GPU, and ValueError for shapes that no kernel takes and for a model without int8 layers on a GPU.
    """
    problem = _native.cuda_problem()
    if problem is not None:
        raise RuntimeError(f"hwkern.tune measures on a GPU: {problem}")
    wanted = None if m is None else sorted({min(bisect_left(EDGES, size), len(EDGES) - 1) for size in m})
    numbers = range(len(EDGES)) if wanted is None else wanted
    layers = _layers(target, dtype, device)
    gpus = {index: hardware.gpu(index) for index, *_ in layers}
    caches = {index: cache_of(gpu) for index, gpu in gpus.items()}
    known = {index: cache.read() for index, cache in caches.items()}

    def is_missing(index: int, m: int, n: int, k: int, data: torch.dtype, kind: str) -> bool:
        entry = known[index].get(entry_name(m, n, k, _name(data), kind))
        enough = set(_worth_measuring(m, n, k, gpus[index], _name(data), kind)) <= set(configs_of(entry))
        return not enough or (peers and "bf16" not in times_of(entry, "peers"))

    wanted_points = {
        (index, rows, n, k, data, kind)
        for index, n, k, data in layers
        for number in numbers
        for rows in ends_of(number)
        for kind in (PRODUCT, LAYER)
    }
    points = [point for point in sorted(wanted_points, key=str) if is_missing(*point)]
    saved = True
    with progress(f"Measuring {len(points)} points", len(points), show and bool(points)) as advance:
        for index, rows, n, k, data, kind in points:
            configs = _worth_measuring(rows, n, k, gpus[index], _name(data), kind)
            entry = {entry_name(rows, n, k, _name(data), kind): measure(
                rows, n, k, data, configs, gpus[index], kind, PEERS[kind] if peers else ()
            )}  # fmt: skip
            known[index] |= entry
            if save:  # at once: a run that is stopped loses nothing
                saved = caches[index].update(entry) and saved
            advance()

    steps = []
    for (index, n, k, data), kind in itertools.product(layers, (PRODUCT, LAYER)):
        _choice.tuned.update(_activation(gpus[index], n, k, _name(data), kind, known[index]))
        steps += [_step(gpus[index], n, k, _name(data), kind, number, known[index]) for number in numbers]
    file = ", ".join(str(cache.path) for cache in caches.values()) if save and saved else None
    return Tuning(
        ", ".join(gpu.name for gpu in gpus.values()), steps, len(points), len(wanted_points) - len(points), file
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step(gpu: hardware.Gpu, n: int, k: int, dtype: str, kind: str, number: int, entries: Mapping[str, Any]) -> Step:
    ends = sorted(set(ends_of(number)))
    model = tuple(model_choice(m, n, k, gpu, dtype, kind) for m in ends)
    entry = [entries.get(entry_name(m, n, k, dtype, kind)) for m in ends]
    times = [configs_of(e) for e in entry]
    chosen = _choose(model, times)
    model_us = tuple(time[choice] for choice, time in zip(model, times, strict=True))
    us = model_us if chosen == CHOOSE else tuple(time[chosen] for time in times)
    return Step(n, k, dtype, kind, ends_of(number), model, model_us, chosen, us, times_of(entry[-1], "peers"))


def _layers(
    target: Target, dtype: torch.dtype | None, device: torch.device | str | int | None
) -> list[tuple[int, int, int, torch.dtype]]:
    """(device index, N, K, output dtype) of every different layer."""
    import torch

    from hwkern import ops
    from hwkern.nn import Int8Linear

    if isinstance(target, torch.nn.Module):
        found = {
            (layer.weight.get_device(), layer.weight.shape[0], layer.in_features, dtype or layer.float_dtype)
            for layer in target.modules()
            if isinstance(layer, Int8Linear) and layer.weight.is_cuda
        }
        if not found:
            raise ValueError(
                "hwkern.tune found no int8 layer on a GPU in this model: hwkern.patch(model.cuda()) first."
            )
    else:
        if device is None:
            index = torch.cuda.current_device()
        else:
            index = device if isinstance(device, int) else torch.device(device).index or 0
        found = {(index, int(n), int(k), dtype or torch.bfloat16) for n, k in target}
    for _, n, k, data in found:
        if n < 1 or not 1 <= k <= K_MAX:
            raise ValueError(f"hwkern.tune takes N of at least 1 and K of 1 … {K_MAX}, not N = {n}, K = {k}.")
        if data not in ops.FLOATS:
            raise ValueError(f"hwkern.tune takes float32, float16 and bfloat16, not {data}.")
    return sorted(found, key=str)


class _CallableModule(types.ModuleType):
    """``hwkern.tune`` is the function, but importing this file binds that name to the module: let both be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tuning:
        return tune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
