"""The frame of every benchmark: arguments, host and CPU times, and a record of where it ran.

GPU times come from hwkern._timing: cold L2, CUDA-graph replays, peers in turn, medians. Launches inside a graph follow
each other as in a captured model; host cost is measured apart (``host_us``).
"""

from __future__ import annotations

import argparse
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hwkern import _native, _timing, hardware
from hwkern._timing import Call as Call
from hwkern._timing import capture as capture
from hwkern._timing import random_int8 as random_int8
from hwkern._timing import replay_seconds as replay_seconds
from hwkern._timing import rotations as rotations
from hwkern.bench import record
from hwkern.bench.kernels import cpu_us as cpu_us

#: hwkern._timing's, the GPU resting between replays.
cuda_us = functools.partial(_timing.cuda_us, rest=_timing.REST)

# ---- the host -------------------------------------------------------------------------------------------------------


def host_us(peers: Mapping[str, Call], blocks: int = 60, calls: int = 200) -> dict[str, float]:
    """Median host µs per eager call, peers in alternating blocks; CUDA is idle at the start of each block.

    The calls must be so small that the GPU finishes faster than the host launches; otherwise the launch queue fills
    and this measures the GPU.
    """
    samples: dict[str, list[float]] = {name: [] for name in peers}
    for block in range(blocks + 3):
        order = list(peers.items())
        for name, call in order if block % 2 == 0 else reversed(order):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            spent = time.perf_counter() - start
            if block >= 3:  # the first blocks warm up
                samples[name].append(spent * 1e6 / calls)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in samples.items()}


# ---- where it ran --------------------------------------------------------------------------------------------------


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """hwkern.bench.record's, with this script's command line, without the folders of this machine."""

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + equals + (Path(value).name if Path(value).is_absolute() else value)

    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shown, sys.argv[1:])])
    found = _looked_up(device, command, commit)
    return found if device.startswith("cuda") else found | {"threads": 1}


@functools.cache
def _looked_up(device: str, command: str, commit: str | None) -> dict[str, Any]:
    """Once, because files are written again and again and nvidia-smi takes a second."""
    return record.environment(device, command, commit, Path(__file__).parent)


def current_gpu() -> hardware.Gpu:
    """torch's current CUDA device."""
    return hardware.gpu(torch.cuda.current_device())


# ---- the frame of a benchmark --------------------------------------------------------------------------------------


class _Seconds(argparse.Action):
    """--seconds holds for every time that the benchmark takes without a duration of its own."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        _timing.REPLAY_SECONDS = values


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a few shapes only")
    made.add_argument(
        "--seconds", type=float, action=_Seconds, help=f"replays of each thing (default {_timing.REPLAY_SECONDS})"
    )
    made.add_argument("--json", metavar="PATH", type=Path, help="also write the result to this file")
    made.add_argument("--commit", help="commit to record (default: git's, in a checkout)")
    return made


def need_cuda() -> None:
    """Leave with a sentence unless CUDA kernels can run here."""
    problem = _native.cuda_problem()
    if problem is None and not torch.cuda.is_available():
        problem = f"torch {torch.__version__} sees no GPU."
    if problem is not None:
        sys.exit(f"This benchmark needs an NVIDIA GPU: {problem}")


def integers(text: str) -> list[int]:
    """ "1,16,64" → [1, 16, 64], for argparse."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    """ "6144x4096,4096x4096" → [(N, K), ...], for argparse."""
    pairs = [tuple(integers(part.replace("x", ","))) for part in text.split(",")]
    return [(n, k) for n, k in pairs]


Shape = tuple[int, int, int]  # M, N, K


def problems(
    arguments: argparse.Namespace,
    quick: list[Shape],
    default: list[Shape],
    shapes: list[tuple[int, int]],
    tokens: list[int],
) -> list[Shape]:
    """What to run: --m and --shapes, each completed from ``tokens`` and ``shapes``; --quick; or the default."""
    if arguments.m or arguments.shapes:
        return [(m, n, k) for n, k in arguments.shapes or shapes for m in arguments.m or tokens]
    return quick if arguments.quick else default


def result(benchmark: str, device: str, commit: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON document of one benchmark run: schema, name, environment and one dictionary per row."""
    return {"schema": record.SCHEMA, "benchmark": benchmark, "environment": environment(device, commit), "rows": rows}


def save(path: Path | None, document: dict[str, Any]) -> None:
    """hwkern.bench.record's, and say so; nothing without a path."""
    if path is not None:
        record.save(path, document)
        print(f"wrote {path}")


def print_absent(rows: Sequence[Mapping[str, Any]]) -> None:
    """Which peers are missing from which rows, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.get("absent", {}).items():
            reasons.setdefault((name, reason), []).append(f"{row['m']}×{row['n']}×{row['k']}")
    for (name, reason), places in reasons.items():
        where = "" if len(places) == len(rows) else f" ({len(places)} of {len(rows)} shapes, first {places[0]})"
        print(f"not measured: {name}{where}: {reason}")


def ratio(ours: float, peer: float | None) -> str:
    """ "1.32×": how many times faster ours is than the peer; "–" without a peer."""
    return "–" if peer is None else f"{peer / ours:.2f}×"
