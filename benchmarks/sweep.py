"""Cliffs: the time of every M from 1 to 512, and where one token more costs more than its share.

t(M + 1) / t(M) should stay near 1: a batch that grows by one token must not fall off an edge of the tiles or of the
choice between kernels. Each M is timed briefly; wherever the ratio is above 1.05, or another config is chosen, both
sides are timed again at length, in turn, and those times count: apart, the clock is another for each (28672×4096 at M =
390 and 391, one config: 79.6 and 92.5 µs on an H100).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gemm
import timing
import torch

from hwkern import _native, hardware, ops
from hwkern._console import print_table

SECONDS = 0.001  # of replays at first (five replays at least), then where it matters:
AGAIN_SECONDS = 0.02
SUSPECT = 1.05

Steps = dict[int, float]  # M → t(M + 1) / t(M), of both sides timed in turn


def times(n: int, k: int, configs: Sequence[int], operator: str, gpu: hardware.Gpu) -> tuple[list[float], Steps]:
    """µs at M = 1 … as many as ``configs``, which are chosen there, and the steps read in turn.

    Of the product with scales, or of the whole layer; bfloat16 out.
    """
    most = len(configs)
    sets = timing.rotations(n * k, gpu.l2_bytes)
    weights = [timing.random_int8(n, ops.padded(k), device="cuda") for _ in range(sets)]
    scale_n, scale_m = (torch.rand(size, device="cuda") + 0.5 for size in (n, most))
    a = timing.random_int8(most, k, device="cuda")
    x = torch.randn(most, k, device="cuda", dtype=torch.bfloat16)

    def calls(m: int) -> list[timing.Call]:
        if operator == "linear":
            return [functools.partial(ops.int8_linear, x[:m], w, scale_n) for w in weights]
        return [
            functools.partial(ops.int8_matmul, a[:m], w[:, :k], scale_m[:m], scale_n, None, torch.bfloat16)
            for w in weights
        ]

    def pair(m: int) -> tuple[float, float]:
        found = timing.cuda_us({"one": calls(m), "more": calls(m + 1)}, AGAIN_SECONDS)
        return found["one"], found["more"]

    apart = [timing.cuda_us({"": calls(m)}, SECONDS, graph_calls=10)[""] for m in range(1, most + 1)]
    return recheck(apart, configs, pair)


def recheck(
    us: list[float], configs: Sequence[int], again: Callable[[int], tuple[float, float]]
) -> tuple[list[float], Steps]:
    """``us`` (of M = 1, 2, …) with both sides of every suspicious step timed again in turn, and those steps.

    A side of two suspicious steps keeps the time of the latter; each step is the ratio of its own pair.
    """
    found, steps = list(us), Steps()
    for m in range(1, len(us)):
        if us[m] / us[m - 1] > SUSPECT or configs[m] != configs[m - 1]:
            found[m - 1], found[m] = again(m)
            steps[m] = found[m] / found[m - 1]
    return found, steps


def worst(us: list[float], steps: Steps, count: int = 5) -> list[tuple[float, int]]:
    """The largest ``(t(M + 1) / t(M), M)``; where it was read in turn, as read in turn."""
    return sorted(((steps.get(m, us[m] / us[m - 1]), m) for m in range(1, len(us))), reverse=True)[:count]


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--most", type=int, default=512, metavar="M", help="the largest M (default 512)")
    parser.add_argument("--shapes", type=timing.shapes, metavar="NxK,NxK", help="layers (default Llama-3-8B's)")
    parser.add_argument("--operator", choices=["gemm", "linear"], default="gemm", help="the product, or a whole layer")
    arguments = parser.parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    native = _native.extension()
    rows: list[dict[str, Any]] = []
    layers = arguments.shapes or ([(4096, 4096)] if arguments.quick else gemm.SHAPES)
    for n, k in layers:
        device = (gpu.sm_count, gpu.compute, gpu.shared_bytes)
        chosen = [native.gemm_choose(m, n, k, *device) for m in range(1, arguments.most + 1)]
        us, steps = times(n, k, chosen, arguments.operator, gpu)
        rows.append(
            {
                "n": n, "k": k, "operator": arguments.operator, "us": [round(value, 3) for value in us],
                "configs": chosen, "worst": [[round(ratio, 4), m] for ratio, m in worst(us, steps)],
            }
        )  # fmt: skip
        print(rows[-1]["n"], rows[-1]["k"], rows[-1]["worst"], file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    print_table(
        f"Steps of one token on {gpu.name}, M = 1 … {arguments.most}: the five largest t(M + 1) / t(M) of each layer",
        ["N×K", "M → M + 1", "µs", "ratio", "configs"],
        [
            [
                f"{row['n']}×{row['k']}",
                f"{m} → {m + 1}",
                f"{row['us'][m - 1]:.2f} → {row['us'][m]:.2f}",
                f"{ratio:.3f}",
                " → ".join(map(str, dict.fromkeys(row["configs"][m - 1 : m + 1]))),
            ]
            for row in rows
            for ratio, m in row["worst"]
        ],
    )
    timing.save(arguments.json, timing.result("sweep", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
