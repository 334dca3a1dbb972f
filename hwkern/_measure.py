"""Times of one layer under each recipe on this device, for each number of tokens, kept in the user's cache.

Two ways of running are measured on a GPU, because a layer can be faster in one and slower in the other: "eager" (calls
one after the other from Python, whichever of host and GPU is slower) and "graph" (replays of a CUDA graph, the GPU's
own time). On a CPU there is "eager" only. Peers run in turn, so that clock, heat and neighbours are the same for all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hwkern
from hwkern import hardware
from hwkern._cache import Cache, device_stamp
from hwkern._recipes import Recipe, make
from hwkern._timing import rotations, without_gc
from hwkern.calibrate import OUTLIERS
from hwkern.nn import Calibration
from hwkern.nn.conv1d import conv1d_class
from hwkern.nn.pack import dtype_name

#: What of a stamp says that two machines are different ones for a plan.
IDENTITY = ("device", "gpu", "compute", "sm_count", "cpu")

ROUNDS = 9  # samples of each peer, of which the median counts
PEER_SECONDS = 0.1  # for all samples of one peer, but at least three
HOPELESS = 1.5  # times the float layer's time: such a peer is sampled twice only
SAMPLE_SECONDS = 4e-4  # a sample on the CPU has as many calls as fill this
EAGER_CALLS = 50  # on a GPU a sample has at most so many, and one wait at its end
EAGER_SECONDS = 3e-3  # and fewer, but three, when they would take longer than this
GPU_SETS = 24  # of weights at most: layers so small that these fit into the L2 stay there in their models too
LOOKUPS = 8  # sets of indices that an embedding's calls rotate over
GRAPH_SECONDS = 0.005  # of replays for each peer; five replays of at least 20 calls in any case
CPU_BYTES = 2**25  # weights that the CPU's calls rotate over: a model's other layers push a layer's out of the caches


@dataclass(frozen=True)
class Shape:
    """What a layer's time depends on, besides the recipe."""

    kind: str  #: "Linear", "Conv1D" or "Embedding" (of n rows)
    n: int
    k: int
    dtype: torch.dtype
    bias: bool

    @property
    def key(self) -> str:
        """For the cache."""
        return f"{self.kind} {self.n}x{self.k} {dtype_name(self.dtype)}{' bias' if self.bias else ''}"

    @property
    def table(self) -> Shape:
        """Of the embedding that has the same weight."""
        return Shape("Embedding", self.n, self.k, self.dtype, False)

    def inputs(self, m: int, device: torch.device) -> torch.Tensor:
        """Random ones for ``m`` tokens."""
        if self.kind == "Embedding":
            return torch.randint(0, self._rows(device), (m,), device=device)
        return torch.randn(m, self.k, device=device).to(self.dtype)

    def _rows(self, device: torch.device) -> int:
        """Of an embedding that is timed: enough that no cache holds them (256 MB in int8 on a GPU), not all of 1 GB."""
        return min(self.n, max(1, 2 ** (28 if device.type == "cuda" else 26) // self.k))

    def float_layer(self, device: torch.device) -> nn.Module:
        """A float layer of this shape, random weights."""
        with torch.device(device):
            if self.kind == "Embedding":
                table = torch.empty(self._rows(device), self.k, dtype=self.dtype).normal_()
                return nn.Embedding.from_pretrained(table)
            if self.kind == "Conv1D":
                cls: Any = conv1d_class()
                layer = cls(self.n, self.k)
            else:
                layer = nn.Linear(self.k, self.n, bias=self.bias)
        return layer.to(self.dtype).requires_grad_(False)


def stamp(device: torch.device) -> dict[str, Any]:
    """What times on ``device`` hold for."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return {"device": "cuda", **device_stamp(hardware.gpu(index)), "torch": torch.__version__}
    cpu = hardware.cpu()
    return {
        "device": "cpu",
        "cpu": cpu.name,
        "int8_units": list(cpu.int8_units),
        "threads": torch.get_num_threads(),
        "hwkern": hwkern.__version__,
        "torch": torch.__version__,
    }


def modes_of(device: torch.device, mode: str = "any") -> tuple[str, ...]:
    """The ways of running that are measured there, of those that a plan is for. A CPU has no graphs: "eager"."""
    if device.type != "cuda":
        return ("eager",)
    return ("eager", "graph") if mode == "any" else (mode,)


def stand_in(timing: str, k: int) -> Recipe:
    """A recipe that takes the time of ``timing`` (:attr:`Recipe.timing`) on a layer of ``k`` inputs."""
    scheme, *extra = timing.split("+")
    calibration = Calibration(
        scale=0.05 if scheme in ("w8a8-static", "w8a8-asymmetric") else None,
        zero_point=-20 if scheme == "w8a8-asymmetric" else 0,
        smooth=(1.5,) * k if "smooth" in extra else (),
        outliers=tuple(range(min(OUTLIERS, k // 2))) if "outliers" in extra else (),
    )
    return Recipe(scheme, calibration)


class Clock:
    """Times recipes on one device, through the cache: each (shape, tokens, recipe, mode) is measured once."""

    def __init__(self, device: torch.device, save: bool = True, mode: str = "any") -> None:
        self.device, self.modes = device, modes_of(device, mode)
        self._cache = Cache("layers", stamp(device)) if save else None
        self._known: dict[str, Any] = self._cache.read() if self._cache else {}
        self.measured = 0
        self.reused = 0

    def _key(self, shape: Shape, m: int, timing: str, mode: str) -> str:
        return f"{shape.key} {m} {timing} {mode}"

    def missing(self, shape: Shape, m: int, timings: Iterable[str]) -> list[str]:
        """Which recipes the cache has no usable time for."""
        wanted = dict.fromkeys(timings)
        return [t for t in wanted if any(not self._has(self._key(shape, m, t, mode)) for mode in self.modes)]

    def _has(self, key: str) -> bool:
        value = self._known.get(key)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9

    def measure(self, shape: Shape, m: int, timings: Sequence[str]) -> None:
        """Make sure that all ``timings`` are known, and keep them at once: a run that is stopped loses nothing.

        When one is missing, all are measured, so that what will be compared was measured side by side.
        """
        if not self.missing(shape, m, timings):
            self.reused += len(timings)
            return
        names = list(dict.fromkeys(timings))
        found = measure(shape, m, names, self.device, self.modes)
        entries = {self._key(shape, m, name, mode): round(us, 3) for (name, mode), us in found.items()}
        self._known |= entries
        self.measured += len(names)
        if self._cache is not None:
            self._cache.update(entries)

    def us(self, shape: Shape, m: int, timing: str, mode: str) -> float:
        """The time in µs of one call."""
        return float(self._known[self._key(shape, m, timing, mode)])


def measure(
    shape: Shape, m: int, timings: Sequence[str], device: torch.device, modes: Sequence[str]
) -> dict[tuple[str, str], float]:
    """µs per call of each recipe in each of the modes."""
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        weight_bytes = shape.n * shape.k * shape.dtype.itemsize
        xs = [shape.inputs(m, device)]
        if shape.kind == "Embedding":  # the rows of one call would be in the caches for the next
            xs += [shape.inputs(m, device) for _ in range(LOOKUPS - 1)]
        if device.type == "cuda":
            gpu = hardware.gpu(torch.cuda.current_device() if device.index is None else device.index)
            sets = min(GPU_SETS, rotations(weight_bytes / 2, gpu.l2_bytes))
        else:
            sets = max(1, min(4, CPU_BYTES // weight_bytes))
        peers: dict[str, list[Callable[[], object]]] = {
            name: [
                functools.partial(layers[i % len(layers)], xs[i % len(xs)]) for i in range(max(len(layers), len(xs)))
            ]
            for name, layers in layer_sets(shape, tuple(timings), device, sets).items()
        }
        found: dict[tuple[str, str], float] = {}
        if "eager" in modes:
            with without_gc():
                found |= {(name, "eager"): us for name, us in eager_us(peers, device).items()}
        if "graph" in modes:
            from hwkern._timing import cuda_us

            found |= {(name, "graph"): us for name, us in cuda_us(peers, GRAPH_SECONDS).items()}
        return found


@functools.lru_cache(maxsize=1)
def layer_sets(shape: Shape, timings: tuple[str, ...], device: torch.device, sets: int) -> dict[str, list[nn.Module]]:
    """So many layers of each recipe. Those of the last shape are kept for its next number of tokens: to make them takes
    longer than to time them.
    """
    floats = [shape.float_layer(device) for _ in range(sets)]
    return {
        name: list(floats) if name == "keep" else [make(f, stand_in(name, shape.k)) for f in floats] for name in timings
    }


@contextlib.contextmanager
def kept_layers() -> Iterator[None]:
    """Around measurements: nothing of :func:`layer_sets` is kept longer."""
    try:
        yield
    finally:
        layer_sets.cache_clear()


def eager_us(peers: dict[str, list[Callable[[], object]]], device: torch.device) -> dict[str, float]:
    """Median µs per call over rounds in which every peer has its turn."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def sample(calls: Iterable[Callable[[], object]], count: int) -> float:
        wait()
        start = time.perf_counter()
        for call in itertools.islice(calls, count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    rings = {name: itertools.cycle(calls) for name, calls in peers.items()}
    counts, rounds = {}, {}
    first = None
    for name, ring in rings.items():
        sample(ring, 1)
        once = sample(ring, 2)
        first = once if first is None else first
        # Seconds that long calls take are better spent elsewhere, above all on what is far slower than the first peer.
        rounds[name] = 2 if once > HOPELESS * first else max(3, min(ROUNDS, round(PEER_SECONDS / max(once, 1e-7))))
        if device.type == "cuda":
            counts[name] = max(3, min(EAGER_CALLS, round(EAGER_SECONDS / max(once, 1e-7))))
        else:
            counts[name] = max(1, min(200, round(SAMPLE_SECONDS / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(ROUNDS):
        for name in peers if turn % 2 == 0 else reversed(list(peers)):
            if turn < rounds[name]:
                samples[name].append(sample(rings[name], counts[name]))
    return {name: statistics.median(values) * 1e6 for name, values in samples.items()}


def bucket(calls: dict[int, int], most: int = 6) -> dict[int, int]:
    """Tokens → calls, with few different numbers of tokens: when there are many, up to the next power of two."""
    if len(calls) <= most:
        return dict(sorted(calls.items()))
    found: dict[int, int] = {}
    for m, count in sorted(calls.items()):
        up = 1 << (m - 1).bit_length()
        found[up] = found.get(up, 0) + count
    return found
