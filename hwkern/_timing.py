"""GPU times that can be compared: cold L2, CUDA-graph replays, peers in turn, medians. Needs torch with CUDA to run.

A measured call is captured many times in one CUDA graph, each time on another set of buffers, so that the set is larger
than three times the L2 cache and every call starts with its operands in device memory. Events around a replay give the
time per call; peers are replayed in turn, each behind every other equally often (:func:`orders`), so that clock,
temperature and power are the same for all.
The benchmarks and the tuner measure with this and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from hwkern import _native, ops
from hwkern._checks import DTYPES

Call = Callable[[], object]

GRAPH_CALLS = 20  # at least this many calls in a graph: the replay's own start and end are spread over them
GRAPH_SECONDS = 0.01  # but no more than fit in this
REPLAY_SECONDS = 0.15  # time spent on each peer, on average
REST = 1.0  # behind each replay of a benchmark, in lengths of that replay: see cuda_samples
LEAST_TURNS, MOST_TURNS = 3, 200
BALANCED_PEERS = 8  # up to so many get whole rounds of orders(); more are candidates of a search, with few turns each
MAX_BUFFER_BYTES = 8 << 30  # rotating buffers never take more than this
_RANDOM = random.Random(0)


def rotations(bytes_per_call: float, l2_bytes: int, limit: int = MAX_BUFFER_BYTES) -> int:
    """How many buffer sets keep the L2 cold: their total is at least 3 × L2 (and at most ``limit`` bytes)."""
    wanted = math.ceil(3 * l2_bytes / max(1, bytes_per_call)) + 1
    return max(1, min(wanted, int(limit // max(1, bytes_per_call))))


def warm_up_stream() -> torch.cuda.Stream:
    """The current device's stream for captures and the calls ahead of them, behind all that was enqueued.

    Always the same, and where it can be the one that ``torch.cuda.graph`` captures on: cuBLAS keeps 32 MB of the device
    for every stream that a product ran on, for good, because a captured graph may read them. So what measures needs no
    more of them than a model that runs in CUDA graphs.
    """
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    return stream


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    default = torch.cuda.graph.default_capture_stream
    if default is None:  # as torch does it in its first capture
        default = torch.cuda.graph.default_capture_stream = torch.cuda.Stream(device)
    return default if default.device.index == device else torch.cuda.Stream(device)


def capture(calls: Sequence[Call], least: int = GRAPH_CALLS) -> tuple[torch.cuda.CUDAGraph, int]:
    """One CUDA graph that runs ``calls`` in order, again and again until there are ``least``; and how many.

    Fewer where so many would take longer than ``GRAPH_SECONDS``.
    """
    stream = warm_up_stream()
    with torch.cuda.stream(stream), torch.inference_mode():
        for call in calls:  # everything lazy (handles, workspaces, checks) happens before the capture
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, math.ceil(min(least, GRAPH_SECONDS / seconds) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.inference_mode():
        for _ in range(rounds):
            for call in calls:
                call()
    return graph, rounds * len(calls)


def cuda_us(
    peers: Mapping[str, Sequence[Call]],
    seconds: float | None = None,
    graph_calls: int = GRAPH_CALLS,
    rest: float = 0,
) -> dict[str, float]:
    """Median µs per call of each peer: see :func:`cuda_samples`."""
    return {name: statistics.median(values) for name, values in cuda_samples(peers, seconds, graph_calls, rest).items()}


def orders(count: int) -> list[list[int]]:
    """2 · ``count`` orders of as many peers: in all of them together each stands right behind every other twice.

    Williams' design: in 0, 1, -1, 2, -2, … modulo an even count every difference occurs once, so that the shifts of it
    have every pair once; for an odd count the same orders backwards make it even.
    """
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    shifts = [[(place + shift) % count for place in zigzag] for shift in range(count)]
    return shifts + [order[::-1] for order in shifts]


def cuda_samples(
    peers: Mapping[str, Sequence[Call]],
    seconds: float | None = None,
    graph_calls: int = GRAPH_CALLS,
    rest: float = 0,
) -> dict[str, list[float]]:
    """µs per call of each peer, one for each replay; a peer is a list of calls, one per buffer set.

    All peers are captured first, each ``graph_calls`` times or more, and then replayed in turn, as often as fit in
    ``seconds`` for each of them (by default ``REPLAY_SECONDS``), rests included, at least ``LEAST_TURNS`` times.

    What ran before has used up some of the power budget, or left some: on an H100 one kernel took 1495 µs
    (8192×28672×4096) in a fixed order and 1369 in its reverse. So up to ``BALANCED_PEERS`` peers take turns until each
    was replayed right behind every other equally often, and behind each replay the GPU idles ``rest`` times as long as
    that took. With a rest of 1 replays of 10 ms scatter by some 0.3 %, with none, at the power limit, by 3 to 10 %; one
    of 2 gives the times of 1.
    """
    if not peers:
        return {}
    seconds = REPLAY_SECONDS if seconds is None else seconds
    names, graphs = list(peers), [capture(calls, graph_calls) for calls in peers.values()]
    for graph, _ in graphs:
        graph.replay()
    mean_seconds = statistics.mean(replay_seconds(graph) for graph, _ in graphs)
    turns = max(LEAST_TURNS, min(MOST_TURNS, math.ceil(seconds / max(1e-6, (1 + rest) * mean_seconds))))
    rounds = orders(len(names))
    if len(names) <= BALANCED_PEERS:
        turns = math.ceil(turns / len(rounds)) * len(rounds)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        for peer in rounds[turn % len(rounds)]:
            graph, calls = graphs[peer]
            spent = replay_seconds(graph)
            samples[names[peer]].append(spent * 1e6 / calls)
            time.sleep(rest * spent)
    return samples


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Python's garbage collector does not run inside, for calls whose host time is taken.

    It strikes one of the calls that are compared, and the same one again and again, because the same calls make the
    same number of objects. (A small model against its own copy, 12 readings: the ratio's standard deviation is 1.6 %
    with it and 0.8 % without.)
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def lower_quartile(values: Sequence[float]) -> float:
    """What disturbs a call of a busy host only adds to its time: the quarter disturbed least repeats best.

    For whole models, whose calls take milliseconds of the host: benchmarks/never_slower.py has the figures.
    """
    return statistics.quantiles(values, n=4, method="inclusive")[0]


def in_turn(
    calls: Mapping[str, Call], device: torch.device, seconds: float, bounds: tuple[int, int], rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each call until ``device`` is done, in turn and in changing order.

    So many ``rounds``; or as many as fill ``seconds`` for each call, within the ``bounds``.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found: dict[str, list[float]] = {name: [] for name in calls}
    wanted, turn, order = bounds[0] if rounds is None else rounds, -2, list(calls)
    with torch.no_grad(), without_gc():
        while turn < wanted:
            # Drawn, because a fixed order can be in step with a beat of the host's; then backwards, so that each call
            # is first as often as the other.
            order = _RANDOM.sample(list(calls), len(calls)) if turn % 2 == 0 else order[::-1]
            for name in order:
                wait()
                start = time.perf_counter()
                calls[name]()
                wait()
                spent = time.perf_counter() - start
                if turn >= 0:
                    found[name].append(spent)
                elif turn == -1 and rounds is None:  # the first round warms up, the second says how many there will be
                    wanted = max(bounds[0], min(bounds[1], round(seconds / max(spent, 1e-6))))
            turn += 1
    return found


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def random_int8(rows: int, columns: int, *, device: str | torch.device) -> torch.Tensor:
    """What a linear layer multiplies: rows of standard normal numbers, quantized by the largest of each row.

    The largest of 4096 is at 3.7 standard deviations, so one is some 34 steps of the 127. A product's power, and at
    many rows its time, depends on its data: docs/kernels.md has uniform bytes beside these.
    """
    return ops.quantize(torch.randn(rows, columns, dtype=torch.bfloat16, device=device))[0]


def layer_product(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, config: int
) -> torch.Tensor:
    """``ops.int8_matmul`` as a layer launches it: ``b`` is known to be constant, so its loads may start early.

    ``a [M, K]`` and ``b [N, K]`` int8 on the current CUDA device, rows 16-byte aligned; the scales contiguous float32.
    """
    (m, k), n = a.shape, b.shape[0]
    d = torch.empty((m, n), dtype=dtype, device=a.device)
    _native.extension().gemm(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), scale_a.data_ptr(), scale_b.data_ptr(), 0, 0,
        d.data_ptr(), n, DTYPES[dtype], m, n, k, config, torch.cuda.current_stream().cuda_stream, b_is_constant=True,
    )  # fmt: skip
    return d
