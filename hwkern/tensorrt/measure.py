"""Timing engines on the GPU without torch: CUDA-graph replays of an engine with its weights and buffers out of the L2.

Engines are copied so that a round over all copies reads more than three times the L2 cache; each enqueue in the graph
runs another copy. What is measured is the time per enqueue inside a graph, as in a captured application.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hwkern import _native
from hwkern.tensorrt import _cuda
from hwkern.tensorrt._arrays import ITEM_BYTES
from hwkern.tensorrt.builder import Engine
from hwkern.tensorrt.profiles import Shape
from hwkern.tensorrt.runner import Runner

GRAPH_CALLS = 20  # at least this many enqueues in a graph: its own start and end are spread over them
SECONDS = 0.12  # spent on each measurement
ROUNDS = 5  # of rounds_us
_MOST_COPIES = 12


def rotations(bytes_per_call: float, l2_bytes: int) -> int:
    """How many copies keep the L2 cold: their total is at least three times the cache."""
    return max(1, min(_MOST_COPIES, math.ceil(3 * l2_bytes / max(1.0, bytes_per_call)) + 1))


class Copies:
    """Several copies of one engine, for cold weights."""

    def __init__(self, engine: Engine, count: int | None = None) -> None:
        first = Runner(engine, graphs=0)
        self.l2_bytes = int(_native.extension().device_properties(first.context.device_index())["l2_bytes"])
        count = rotations(len(engine.data), self.l2_bytes) if count is None else count
        self.runners = [first, *(Runner(engine, graphs=0) for _ in range(count - 1))]

    def close(self) -> None:
        for runner in self.runners:
            runner.close()

    def enqueues(
        self, shapes: Mapping[str, Shape], fill: Mapping[str, bytes] | None = None
    ) -> tuple[list[Callable[[int], None]], list[Any]]:
        """One function of a stream per copy that enqueues it with these input shapes, and what it needs kept alive.

        ``fill``: the bytes of inputs; others are zeros.
        """
        calls: list[Callable[[int], None]] = []
        alive: list[Any] = []
        for runner in self.runners:
            profile = runner.choose_profile(shapes)
            context = runner.engine.create_execution_context()
            stream = _cuda.Stream()
            if len(runner.profiles) > 1:
                context.set_optimization_profile_async(profile, stream.value)
                _cuda.synchronize(stream.value)
            for name, shape in shapes.items():
                context.set_input_shape(name, shape)
            buffers = {}
            for name, tensor in {**runner.inputs, **runner.outputs}.items():
                size = math.prod(context.get_tensor_shape(name)) * ITEM_BYTES[tensor.dtype]
                buffers[name] = _cuda.DeviceBuffer(size)
                _cuda.clear(buffers[name].pointer, size, stream.value)
                if alive and fill and name in fill:
                    _cuda.copy(buffers[name].pointer, alive[0][1][name].pointer, size, stream.value)
                elif fill and name in fill:
                    _cuda.to_device(buffers[name].pointer, _address(fill[name]), size, stream.value)
                context.set_tensor_address(name, buffers[name].pointer)
            _cuda.synchronize(stream.value)
            stream.free()

            calls.append(partial(_enqueue, context))
            alive.append((context, buffers))
        return calls, alive


def _enqueue(context: Any, stream: int) -> None:
    if not context.execute_async_v3(stream):
        raise RuntimeError("TensorRT could not run the engine.")


def _address(data: Any) -> int:
    import numpy as np

    return int(np.frombuffer(data, np.uint8).ctypes.data)


def free(alive: Sequence[Any]) -> None:
    for _, buffers in alive:
        for buffer in buffers.values():
            buffer.free()


def graph_us(calls: Sequence[Callable[[int], None]], seconds: float = SECONDS) -> dict[str, float]:
    """µs per call inside a CUDA graph of all of them: median, p95 and p99 over the replays."""
    return graphs_us([calls], seconds)[0]


def graphs_us(several: Sequence[Sequence[Callable[[int], None]]], seconds: float = SECONDS) -> list[dict[str, float]]:
    """:func:`graph_us` of several, replayed in turn: clock and temperature are the same for all."""
    return [summary(found) for found in _replays_us(several, seconds)]


def rounds_us(
    subjects: Sequence[Callable[[], tuple[Sequence[Callable[[int], None]], Callable[[], None]]]],
    seconds: float = SECONDS, rounds: int = ROUNDS,
) -> list[dict[str, Any]]:  # fmt: skip
    """:func:`graphs_us` of several in turn, again and again with new memory: where buffers lie moves a kernel of 8 µs
    by some percent, and a reading of one placement says nothing about the next.

    ``subjects``: each makes its calls, and what frees their memory. ``seconds``: for each of all rounds together.
    ``rounds`` in the result: the median of each.
    """
    found: list[list[list[float]]] = [[] for _ in subjects]
    for turn in range(rounds):
        order = range(len(subjects))[:: -1 if turn % 2 else 1]
        made = {i: subjects[i]() for i in order}
        for i, samples in zip(order, _replays_us([made[i][0] for i in order], seconds / rounds), strict=True):
            found[i].append(samples)
        for _, end in made.values():
            end()
    return [in_rounds(samples) for samples in found]


def in_rounds(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    """:func:`summary` of all samples, and the median of each round's."""
    medians = [statistics.median(each) for each in samples]
    return {**summary([us for each in samples for us in each]), "rounds": medians}


def _replays_us(several: Sequence[Sequence[Callable[[int], None]]], seconds: float) -> list[list[float]]:
    """µs per call of every replay."""
    stream = _cuda.Stream()
    start, end = _cuda.Event(timing=True), _cuda.Event(timing=True)
    graphs = [_captured(calls, stream) for calls in several]

    def replay(graph: _cuda.Graph) -> float:
        start.record(stream.value)
        graph.launch(stream.value)
        end.record(stream.value)
        end.synchronize()
        return end.milliseconds_since(start)

    for graph, _ in graphs:
        replay(graph)
    slowest = max(replay(graph) for graph, _ in graphs)
    repeats = max(7, min(300, math.ceil(seconds * 1e3 / max(1e-3, slowest))))
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats):
        for found, (graph, count) in zip(samples, graphs, strict=True):
            found.append(replay(graph) * 1e3 / count)
    for graph, _ in graphs:
        graph.free()
    for event in (start, end):
        event.free()
    stream.free()
    return samples


def _captured(calls: Sequence[Callable[[int], None]], stream: _cuda.Stream) -> tuple[_cuda.Graph, int]:
    """(a graph of at least GRAPH_CALLS calls, how many)."""
    for call in calls:  # whatever is lazy happens before the capture
        call(stream.value)
    _cuda.synchronize(stream.value)
    rounds = max(1, math.ceil(GRAPH_CALLS / len(calls)))
    _cuda.begin_capture(stream.value)
    try:
        for _ in range(rounds):
            for call in calls:
                call(stream.value)
    finally:
        graph = _cuda.end_capture(stream.value)
    return graph, rounds * len(calls)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    return {"p50": statistics.median(ordered), "p95": at(0.95), "p99": at(0.99)}


def engine_us(engine: Engine, shapes: Sequence[Mapping[str, Shape]], copies: int | None = None) -> list[float]:
    """Median µs of an engine for each set of input shapes, cold."""
    held = Copies(engine, copies)
    try:
        times = []
        with held.runners[0].context.current():
            for each in shapes:
                calls, alive = held.enqueues(each)
                times.append(graph_us(calls)["p50"])
                free(alive)
    finally:
        held.close()
    return times


def layers_us(engine: Engine, shapes: Mapping[str, Shape], rounds: int = 20) -> list[tuple[str, float]]:
    """(layer, mean µs) in the engine's order, by TensorRT's profiler: each layer alone, with its launch.

    Their sum is more than the engine takes; it shows which layers the time goes into.
    """
    held = Copies(engine, 1)
    runner = held.runners[0]
    found: dict[str, float] = {}

    class Profiler(runner.api.module.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.counts = False

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            if self.counts:
                found[layer] = found.get(layer, 0.0) + milliseconds * 1e3 / rounds

    profiler = Profiler()
    try:
        with runner.context.current():
            calls, alive = held.enqueues(shapes)
            alive[0][0].profiler = profiler
            stream = _cuda.Stream()
            for turn in range(rounds + 3):
                profiler.counts = turn >= 3
                calls[0](stream.value)
                _cuda.synchronize(stream.value)
            stream.free()
            free(alive)
    finally:
        held.close()
    return list(found.items())
