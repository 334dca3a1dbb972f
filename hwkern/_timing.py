"""GPU times that can be compared: cold L2, CUDA-graph replays, peers in turn, medians. Needs torch with CUDA to run.

A measured call is captured many times in one CUDA graph, each time on another set of buffers, so that the set is larger
than three times the L2 cache and every call starts with its operands in device memory. Events around a replay give the
time per call; peers are replayed in turn, in changing order, so that clock, temperature and power are the same for all.
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

from hwkern import _native
from hwkern._checks import DTYPES

Call = Callable[[], object]

GRAPH_CALLS = 20  # at least this many calls in a graph: the replay's own start and end are spread over them
GRAPH_SECONDS = 0.02  # but no more than fit in this: power and clock have settled by then
REPLAY_SECONDS = 0.15  # time spent on each peer
MAX_BUFFER_BYTES = 8 << 30  # rotating buffers never take more than this


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
    peers: Mapping[str, Sequence[Call]], seconds: float | None = None, graph_calls: int = GRAPH_CALLS
) -> dict[str, float]:
    """Median µs per call of each peer: see :func:`cuda_samples`."""
    return {name: statistics.median(values) for name, values in cuda_samples(peers, seconds, graph_calls).items()}


def cuda_samples(
    peers: Mapping[str, Sequence[Call]], seconds: float | None = None, graph_calls: int = GRAPH_CALLS
) -> dict[str, list[float]]:
    """µs per call of each peer, one for each replay; a peer is a list of calls, one per buffer set.

    All peers are captured first, each ``graph_calls`` times or more, and then replayed in turn, in changing order,
    ``seconds`` (by default ``REPLAY_SECONDS``) or five times each, whichever is longer.
    """
    seconds = REPLAY_SECONDS if seconds is None else seconds
    graphs = {name: capture(calls, graph_calls) for name, calls in peers.items()}
    replays = {}
    for name, (graph, _) in graphs.items():
        graph.replay()
        replays[name] = max(5, min(200, math.ceil(seconds / max(1e-6, replay_seconds(graph)))))
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    # Each turn in another order, the same in every run. What ran before a replay has used up some of the power budget,
    # or left some: on an H100 one kernel took 1495 µs (8192×28672×4096) in a fixed order and 1369 in its reverse.
    order, shuffle = list(graphs), random.Random(0).shuffle
    for turn in range(max(replays.values(), default=0)):
        shuffle(order)
        for name in order:
            graph, calls = graphs[name]
            if turn < replays[name]:
                samples[name].append(replay_seconds(graph) * 1e6 / calls)
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


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def random_int8(*shape: int, device: str | torch.device) -> torch.Tensor:
    """Uniform over the symmetric int8 range: the switching activity, and so the power, of real data."""
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


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
