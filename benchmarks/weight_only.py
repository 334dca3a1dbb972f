"""Weight-only linear (W8A16): bfloat16 x [M, K], int8 weights [N, K], bfloat16 y, against cuBLAS in bfloat16.

For few tokens the weights' one pass through memory is all the time, so beside the ratio each row tells the bytes per
second and their share of the memory's rate. Every config that is timed is first checked against float64.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import gemm
import timing
import torch

from hwkern import _native, hardware, ops, reference
from hwkern._console import print_table

TOKENS = [1, 2, 4, 8, 16, 32, 64]
QUICK = [(m, 4096, 4096) for m in (1, 8, 16)]
CHECK_ROWS = 4096  # weight rows that the check looks at (float64 is slow)


def check(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, config: int) -> None:
    """Leave with a sentence unless ``config`` is as near to the exact result as float32 sums of K products must be.

    The bound: K · 2⁻²⁴ · Σ|x·w| · scale, and one rounding to float32.
    """
    got = ops.weight_only_linear(x, weight, scale, out_dtype=torch.float32, config=config)
    # First and last rows, and some in between: the tails are where a kernel goes wrong.
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), CHECK_ROWS), device=x.device).round().long().unique()
    m, k = x.shape
    some = weight[rows, :k].int()
    exact = reference.weight_only_linear(x, some, scale[rows], None, torch.float64)
    size = reference.weight_only_linear(x.abs(), some.abs(), scale[rows], None, torch.float64)
    if not bool(((got[:, rows].double() - exact).abs() <= (k + 4) * 2.0**-24 * size).all()):
        sys.exit(f"Wrong result: config {config} at M, N, K = {m}, {len(weight)}, {k}.")


def measure(m: int, n: int, k: int, configs: list[int], gpu: hardware.Gpu) -> dict[str, Any]:
    """One row: µs of the chosen config (or of every one in ``configs``) and of cuBLAS."""
    halves = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    moved = n * k + 2 * m * k + 2 * m * n
    scale = torch.rand(n, device="cuda") * 0.01 + 0.001
    pairs = [
        (halves(m, k), ops.pad_weight(timing.random_int8(n, k, device="cuda")))
        for _ in range(timing.rotations(moved, gpu.l2_bytes))
    ]  # fmt: skip
    for config in configs:
        check(*pairs[0], scale, config)

    def ours(config: int) -> list[Callable[[], object]]:
        return [functools.partial(ops.weight_only_linear, x, w, scale, config=config) for x, w in pairs]

    calls = {f"config {config}": ours(config) for config in configs}
    wide = [(halves(m, k), halves(n, k)) for _ in range(timing.rotations(2 * n * k, gpu.l2_bytes))]
    us = timing.cuda_us({**calls, "bf16": [functools.partial(torch.mm, x, w.t()) for x, w in wide]})
    native, device = _native.extension(), (gpu.sm_count, gpu.compute, gpu.shared_bytes)
    chosen = native.weight_only_choose(m, n, k, *device)
    by_config = {config: us[f"config {config}"] for config in configs}
    best = by_config.get(chosen, by_config.get(ops.CHOOSE, min(by_config.values())))
    return {
        "m": m,
        "n": n,
        "k": k,
        "config": chosen,
        "us": round(best, 3),
        "tb_per_s": round(moved / best / 1e6, 3),
        "bandwidth_share": round(moved / best * 1e6 / gpu.bandwidth, 3),
        "peers_us": {"bf16": round(us["bf16"], 3)},
        "configs_us": {config: round(value, 3) for config, value in by_config.items() if config >= 0},
        "predicted_us": {c: round(native.gemm_predict_us(c, m, n, k, *device), 3) for c in configs if c >= 0},
    }


def text(row: dict[str, Any]) -> list[str]:
    """A row of the table; with ``--configs`` µs measured / predicted of each, * the chosen one."""
    cells = [
        f"{'*' if config == row['config'] else ''}{us:.1f} / {row['predicted_us'][config]:.1f}"
        for config, us in row["configs_us"].items()
    ]
    return [
        f"{row['m']}×{row['n']}×{row['k']}",
        str(row["config"]),
        f"{row['us']:.2f}",
        f"{row['tb_per_s']:.2f}",
        f"{row['bandwidth_share']:.0%}",
        timing.ratio(row["us"], row["peers_us"]["bf16"]),
        *cells,
    ]


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--m", type=timing.integers, metavar="M,M", help="tokens (default 1 … 64)")
    parser.add_argument("--shapes", type=timing.shapes, metavar="NxK,NxK", help="layers (default Llama-3-8B's)")
    parser.add_argument("--configs", metavar="all|ID,ID", help="time these configs instead of the chosen one")
    arguments = parser.parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    configs = [ops.CHOOSE]
    if arguments.configs == "all":
        configs = [
            row["id"]
            for row in _native.extension().gemm_configs()
            if row["scheme"] == "w8a16"
            and row["min_compute"] <= gpu.compute <= row["max_compute"]
            and row["shared_bytes"] <= gpu.shared_bytes
        ]
    elif arguments.configs:
        configs = timing.integers(arguments.configs)
    problems = QUICK if arguments.quick else [(m, n, k) for n, k in gemm.SHAPES for m in TOKENS]
    if arguments.m or arguments.shapes:
        problems = [(m, n, k) for n, k in arguments.shapes or gemm.SHAPES for m in arguments.m or TOKENS]

    rows = []
    for m, n, k in problems:
        rows.append(measure(m, n, k, configs, gpu))
        print(" ".join(text(rows[-1])), file=sys.stderr, flush=True)  # a long run shows where it is
        torch.cuda.empty_cache()
    ids = [str(config) for config in configs if config >= 0]
    print_table(
        f"Weight-only linear on {gpu.name}, bfloat16 in and out; a ratio above 1 means that hwkern is faster",
        ["M×N×K", "config", "µs", "TB/s", "of bandwidth", "vs bf16", *ids],
        [text(row) for row in rows],
    )
    timing.save(arguments.json, timing.result("weight_only", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
