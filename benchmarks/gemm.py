"""INT8 GEMM: D [M, N] = scale_m · scale_n · (A [M, K] · B [N, K]ᵀ) in bfloat16, against its peers.

Every shape is first checked: the raw int32 sum equals the reference's, for every config that is timed; and CUTLASS's
result has the same bits as ours. Ours is timed as a layer calls it: its weights are declared constant. Peers are
described in peers/products.py; one that cannot run is listed with the reason. CUTLASS is compiled on first use where
`pip install nvidia-cutlass` was run (peers/cutlass.py).

All peers multiply the same random matrices, quantized by the largest of each row: Gaussian ones, as a linear layer's
are, or with ``--data uniform`` uniform ones, whose bytes take all values equally often. What power a product takes
depends on its data, and at many rows its time on the power: beside large Gaussian rows stand uniform ones.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import timing
import torch
from peers import products

from hwkern import _native, hardware, ops
from hwkern._console import print_table
from hwkern._timing import layer_product
from hwkern.bench.kernels import wrong_elements
from hwkern.tune import product_configs

# Llama-3-8B's linear layers as (N, K): fused qkv, attention output, fused gate and up, down.
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
# BERT-base's: attention output, feed-forward up and down, fused qkv.
BERT_SHAPES = [(768, 768), (3072, 768), (768, 3072), (2304, 768)]
BERT_TOKENS = [512, 1024, 2048, 4096]
LAYERS = [(m, n, k) for n, k in SHAPES for m in TOKENS] + [(m, n, k) for n, k in BERT_SHAPES for m in BERT_TOKENS]
QUICK = [(m, 4096, 4096) for m in (1, 16, 64, 256, 1024, 4096)]
POWER_LIMITED = 2**34  # M · N · K from which on the uniform times stand beside the Gaussian ones


def check(a: torch.Tensor, b: torch.Tensor, config: int) -> None:
    """Leave with a sentence unless ``config`` gives the exact int32 product."""
    if wrong := wrong_elements(a, b, config):
        m, n = a.shape[0], b.shape[0]
        sys.exit(f"Wrong result: config {config} at M, N, K = {m}, {n}, {a.shape[1]} differs in {wrong} elements.")


def check_cutlass(problem: products.Problem, candidates: dict[str, list[peers.Call]]) -> None:
    """Leave with a sentence unless CUTLASS computes what we compute: else its time would be no comparison."""
    want = ops.int8_matmul(*problem.int8[0], None, torch.bfloat16)
    for name, calls in candidates.items():
        if not torch.equal(calls[0](), want):
            sys.exit(f"Wrong result: CUTLASS {name} differs from hwkern at {problem.m}×{problem.n}×{problem.k}.")


def ours(problem: products.Problem, config: int) -> list[peers.Call]:
    """Our product as a layer calls it."""
    return [functools.partial(layer_product, *operands, torch.bfloat16, config) for operands in problem.int8]


def beside(row: dict[str, Any], gpu: hardware.Gpu, data: str) -> dict[str, Any]:
    """The same row's chosen config, FP8 and best configuration of CUTLASS on other ``data``."""
    problem = products.Problem(row["m"], row["n"], row["k"], gpu, data)
    calls = {"hwkern": ours(problem, row["config"])}
    if "fp8" in row["peers_us"]:
        calls["fp8"] = products.fp8(problem)
    if "cutlass" in row["peers_us"]:
        calls["cutlass"] = products.cutlass_named(row["cutlass_config"], problem)
    us = {name: round(value, 3) for name, value in timing.cuda_us(calls).items()}
    return {"data": data, "us": us.pop("hwkern"), "peers_us": us}


def measure(
    m: int, n: int, k: int, configs: list[int], names: Sequence[str], gpu: hardware.Gpu, data: str
) -> dict[str, Any]:
    """One row: µs of the chosen config (or of every one in ``configs``) and of the peers called ``names``."""
    problem = products.Problem(m, n, k, gpu, data)
    for config in configs:
        check(*problem.int8[0][:2], config)
    calls = {f"config {config}": ours(problem, config) for config in configs}
    makers = {name: maker for name, maker in products.MAKERS.items() if name in names}
    found, absent = peers.collect(makers, problem)
    calls |= found
    best: dict[str, list[peers.Call]] = {}
    if "cutlass" in names:
        try:
            best = products.best_of(products.cutlass_candidates(problem))
        except peers.AbsentError as reason:
            absent["cutlass"] = str(reason)
        else:
            check_cutlass(problem, best)
            calls |= best
            # With launches that overlap, which nobody ships for these kernels: recorded beside, not instead.
            calls["cutlass_overlap"] = products.cutlass_named(next(iter(best)), problem, overlap=True)
    us = timing.cuda_us(calls)
    row: dict[str, Any] = {"m": m, "n": n, "k": k, "data": data}
    if best:
        row["cutlass_config"] = min(best, key=us.__getitem__)
        us["cutlass"] = min(us.pop(name) for name in best)
    native = _native.extension()
    device = (gpu.sm_count, gpu.compute, gpu.shared_bytes)
    chosen = native.gemm_choose(m, n, k, *device, b_is_constant=True)
    by_config = {config: us.pop(f"config {config}") for config in configs}
    floor = hardware.speed_of_light(m, n, k, gpu)
    time = by_config.get(chosen, by_config.get(ops.CHOOSE, min(by_config.values())))
    return row | {
        "config": chosen,
        "us": round(time, 3),
        "tops": round(floor.operations / time / 1e6, 1),
        "floor_us": round(floor.microseconds, 3),
        "bound": floor.bound,
        "peers_us": {name: round(value, 3) for name, value in us.items()},
        "absent": absent,
        "configs_us": {config: round(value, 3) for config, value in by_config.items() if config >= 0},
        "predicted_us": {
            config: round(native.gemm_predict_us(config, m, n, k, *device, b_is_constant=True), 3)
            for config in by_config
            if config >= 0
        },
    }


def text(row: dict[str, Any]) -> list[str]:
    """A row of the main table."""
    us = row["us"]
    return [
        f"{row['m']}×{row['n']}×{row['k']}",
        str(row["config"]),
        f"{us:.1f}",
        f"{row['tops']:.0f}",
        f"{row['floor_us'] / us * 100:.0f} % {row['bound']}",
        *(timing.ratio(us, row["peers_us"].get(peer)) for peer in products.NAMES),
    ]


def config_text(row: dict[str, Any], ids: list[int]) -> list[str]:
    """A row of ``--configs``: measured / predicted µs of every config; * marks the model's choice, ! the fastest."""
    fastest = min(row["configs_us"], key=row["configs_us"].__getitem__)
    cells = []
    for config in ids:
        mark = ("*" if config == row["config"] else "") + ("!" if config == fastest else "")
        us = row["configs_us"].get(config)
        cells.append("–" if us is None else f"{mark}{us:.1f} / {row['predicted_us'][config]:.1f}")
    return [f"{row['m']}×{row['n']}×{row['k']}", *cells]


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--m", type=timing.integers, metavar="M,M", help="tokens (default 1 … 8192)")
    parser.add_argument("--shapes", type=timing.shapes, metavar="NxK,NxK", help="layers (default Llama-3-8B's)")
    parser.add_argument("--configs", metavar="all|ID,ID", help="time these configs instead of the chosen one")
    parser.add_argument("--peers", default=",".join(products.NAMES), help="of these (default all); '' for hwkern only")
    parser.add_argument(
        "--data", choices=products.DATA, default="gaussian", help="what is multiplied (default gaussian)"
    )
    parser.add_argument("--library", help="CUTLASS's kernels, built elsewhere by peers/cutlass.py")
    parser.add_argument("--tune-json", metavar="PATH", type=Path, help="write measured and predicted µs per config")
    arguments = parser.parse_args()
    timing.need_cuda()
    if arguments.library:
        os.environ["HWKERN_CUTLASS_LIBRARY"] = arguments.library
    names = [name for name in arguments.peers.split(",") if name]
    if unknown := set(names) - set(products.NAMES):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; there are {', '.join(products.NAMES)}")
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    table = product_configs()
    configs = [ops.CHOOSE]
    if arguments.configs or arguments.tune_json:
        fits = [
            row
            for row in table
            if row["min_compute"] <= gpu.compute <= row["max_compute"] and row["shared_bytes"] <= gpu.shared_bytes
        ]
        wanted = arguments.configs or "all"
        configs = [row["id"] for row in fits] if wanted == "all" else timing.integers(wanted)
    problems = timing.problems(arguments, QUICK, [*LAYERS, (8192, 8192, 8192)], SHAPES, TOKENS)

    rows = []
    for m, n, k in problems:
        rows.append(measure(m, n, k, configs, names, gpu, arguments.data))
        if arguments.data == "gaussian" and m * n * k >= POWER_LIMITED:
            rows[-1]["beside"] = beside(rows[-1], gpu, "uniform")
        print(" ".join(text(rows[-1])), file=sys.stderr, flush=True)  # a long run shows where it is
        torch.cuda.empty_cache()
    print_table(
        f"INT8 GEMM on {gpu.name}: scales and bfloat16 out; ratios above 1 mean that hwkern is faster",
        ["M×N×K", "config", "µs", "TOPS", "speed of light", *(f"vs {name}" for name in products.NAMES)],
        [text(row) for row in rows],
    )
    if found := [row | row["beside"] for row in rows if "beside" in row]:
        print_table(
            f"The same on {found[0]['data']} data",
            ["M×N×K", "config", "µs", "vs fp8", "vs cutlass"],
            [
                [*text(row)[:3], *(timing.ratio(row["us"], row["peers_us"].get(peer)) for peer in ("fp8", "cutlass"))]
                for row in found
            ],
        )
    timing.print_absent(rows)
    if configs != [ops.CHOOSE]:
        print_table(
            "µs measured / predicted per config; * the model's choice, ! the fastest",
            ["M×N×K", *map(str, configs)],
            [config_text(row, configs) for row in rows],
        )
        print("\n".join(f"  {row['id']} {row['name']}" for row in table if row["id"] in configs))
    document = timing.result("gemm", "cuda", arguments.commit, rows)
    timing.save(arguments.json, document)
    if arguments.tune_json:
        arguments.tune_json.write_text(json.dumps({**document, "configs": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
