"""The frame of every benchmark: arguments, host and CPU times, and a record of where it ran.

GPU times come from hwkern._timing: cold L2, CUDA-graph replays, peers in turn, medians. Launches inside a graph follow
each other as in a captured model; host cost is measured apart (``host_us``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hwkern
from hwkern import _native, _timing, hardware
from hwkern._timing import Call as Call
from hwkern._timing import capture as capture
from hwkern._timing import cuda_us as cuda_us
from hwkern._timing import random_int8 as random_int8
from hwkern._timing import replay_seconds as replay_seconds
from hwkern._timing import rotations as rotations

SCHEMA = 1


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


# ---- CPU -----------------------------------------------------------------------------------------------------------


def cpu_us(peers: Mapping[str, Call], seconds: float = 0.3, most: int = 200) -> dict[str, float]:
    """Median µs per call on one thread, peers called in turn. The caller's number of threads is restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            repeats = {}
            for name, call in peers.items():
                call()
                repeats[name] = max(5, min(most, math.ceil(seconds / max(1e-7, _call_seconds(call)))))
            samples: dict[str, list[float]] = {name: [] for name in peers}
            for turn in range(max(repeats.values())):
                for name, call in peers.items():
                    if turn < repeats[name]:
                        samples[name].append(_call_seconds(call) * 1e6)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in samples.items()}


def _call_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- where it ran --------------------------------------------------------------------------------------------------


def git_commit() -> str | None:
    """The checkout's commit, with "+" when tracked files are changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def nvidia_smi(index: int) -> dict[str, str]:
    """Driver, clocks (MHz) and power limit of one GPU, as nvidia-smi prints them; empty without it."""
    fields = ("driver_version", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """What a reader needs to judge a number: hardware, driver, clocks, versions, commit, command line, date."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        # Without the folders of this machine.
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])]),
        "commit": commit or git_commit(),
        "hwkern": hwkern.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        gpu = current_gpu()
        found |= {
            "gpu": gpu.name,
            "compute": gpu.compute,
            "sm_count": gpu.sm_count,
            "clock_mhz": gpu.clock_mhz,
            "int8_ops": gpu.int8_ops,
            "bandwidth": gpu.bandwidth,
            "l2_bytes": gpu.l2_bytes,
            "wheel_cuda": _native.extension().cuda_version,
            "nvidia_smi": nvidia_smi(gpu.index),
        }
    else:
        cpu = hardware.cpu()
        found |= {"cpu": cpu.name, "int8_units": list(cpu.int8_units), "threads": 1}
    return found


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
    return {"schema": SCHEMA, "benchmark": benchmark, "environment": environment(device, commit), "rows": rows}


def save(path: Path | None, document: dict[str, Any]) -> None:
    """Write the document, one row per line, so that a later run differs only where numbers changed."""
    if path is None:
        return
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
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
