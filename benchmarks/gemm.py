"""INT8 GEMM: D [M, N] = scale_m · scale_n · (A [M, K] · B [N, K]ᵀ) in bfloat16, against cuBLAS and the speed of light.

Every shape is first checked: the raw int32 sum equals the reference's, for every config that is timed. Peers:
  bf16    torch.mm on bfloat16 operands (cuBLAS), the path that int8 replaces
  int_mm  torch._int_mm (cuBLAS INT8): the raw int32 sum only, no scales, no 16-bit output; needs M > 16, K and N in 8s
  fp8     torch._scaled_mm with row-wise scales, bfloat16 out (compute capability 8.9 and newer)
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch

from hwkern import _native, hardware, ops
from hwkern._console import print_table

# Llama-3-8B's linear layers as (N, K): fused qkv, attention output, fused gate and up, down.
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
QUICK = [(m, 4096, 4096) for m in (1, 16, 64, 256, 1024, 4096)]
CHECK_ELEMENTS = 1 << 20  # a larger result is checked on this many elements' worth of rows (float64 is slow)


def check(a: torch.Tensor, b: torch.Tensor, config: int) -> None:
    """Leave with a sentence unless ``config`` gives the exact int32 product."""
    m, n = a.shape[0], b.shape[0]
    got = ops.int8_matmul(a, b, out_dtype=torch.int32, config=config)
    # First and last rows, and some in between: the tails are where a kernel goes wrong.
    count = max(2, min(m, CHECK_ELEMENTS // n))
    rows = torch.linspace(0, m - 1, count, device=a.device).round().long().unique()
    want = (a[rows].double() @ b.double().t()).to(torch.int32)  # exact: below 2⁵³
    if not torch.equal(got[rows], want):
        wrong = int((got[rows] != want).sum())
        sys.exit(f"Wrong result: config {config} at M, N, K = {m}, {n}, {a.shape[1]} differs in {wrong} elements.")


def peers(m: int, n: int, k: int, sets: int, compute: int) -> dict[str, list[Callable[[], object]]]:
    """The stock paths, each with ``sets`` buffer sets, in this torch and on this GPU."""
    cuda = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    halves = [(cuda(m, k), cuda(n, k)) for _ in range(sets)]
    found: dict[str, list[Callable[[], object]]] = {
        "bf16": [functools.partial(torch.mm, x, w.t()) for x, w in halves],
    }
    if m > 16 and k % 8 == 0 and n % 8 == 0:
        bytes_ = [
            (timing.random_int8(m, k, device="cuda"), timing.random_int8(n, k, device="cuda")) for _ in range(sets)
        ]
        found["int_mm"] = [functools.partial(torch._int_mm, a, b.t()) for a, b in bytes_]
    if compute >= 89 and k % 16 == 0 and n % 16 == 0:
        ones_m, ones_n = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
        fp8 = [(x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)) for x, w in halves]
        found["fp8"] = [
            functools.partial(
                torch._scaled_mm,
                x,
                w.t(),
                scale_a=ones_m,
                scale_b=ones_n,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for x, w in fp8
        ]
    return found


def measure(m: int, n: int, k: int, configs: list[int], with_peers: bool, gpu: hardware.Gpu) -> dict[str, Any]:
    """One row: µs of the chosen config (or of every one in ``configs``) and of the peers."""
    sets = timing.rotations(m * k + n * k + 2 * m * n, gpu.l2_bytes)
    a = [timing.random_int8(m, k, device="cuda") for _ in range(sets)]
    b = [timing.random_int8(n, k, device="cuda") for _ in range(sets)]
    scale_m, scale_n = (torch.rand(size, device="cuda") + 0.5 for size in (m, n))
    for config in configs:
        check(a[0], b[0], config)

    def ours(config: int) -> list[Callable[[], object]]:
        return [
            functools.partial(ops.int8_matmul, x, w, scale_m, scale_n, None, torch.bfloat16, config)
            for x, w in zip(a, b, strict=True)
        ]

    calls = {f"config {config}": ours(config) for config in configs}
    if with_peers:
        calls |= peers(m, n, k, timing.rotations(2 * (m * k + n * k + m * n), gpu.l2_bytes), gpu.compute)
    us = timing.cuda_us(calls)
    native = _native.extension()
    device = (gpu.sm_count, gpu.compute, gpu.shared_bytes)
    chosen = native.gemm_choose(m, n, k, *device)
    by_config = {config: us.pop(f"config {config}") for config in configs}
    floor = hardware.speed_of_light(m, n, k, gpu)
    best = by_config.get(chosen, by_config.get(ops.CHOOSE, min(by_config.values())))
    return {
        "m": m,
        "n": n,
        "k": k,
        "config": chosen,
        "us": round(best, 3),
        "tops": round(floor.operations / best / 1e6, 1),
        "floor_us": round(floor.microseconds, 3),
        "bound": floor.bound,
        "peers_us": {name: round(value, 3) for name, value in us.items()},
        "configs_us": {config: round(value, 3) for config, value in by_config.items() if config >= 0},
        "predicted_us": {
            config: round(native.gemm_predict_us(config, m, n, k, *device), 3) for config in by_config if config >= 0
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
        *(timing.ratio(us, row["peers_us"].get(peer)) for peer in ("bf16", "int_mm", "fp8")),
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
    parser.add_argument("--no-peers", action="store_true", help="hwkern only")
    parser.add_argument("--tune-json", metavar="PATH", type=Path, help="write measured and predicted µs per config")
    arguments = parser.parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    table = [row for row in _native.extension().gemm_configs() if row["scheme"] == "w8a8"]
    configs = [ops.CHOOSE]
    if arguments.configs or arguments.tune_json:
        fits = [
            row
            for row in table
            if row["min_compute"] <= gpu.compute <= row["max_compute"] and row["shared_bytes"] <= gpu.shared_bytes
        ]
        wanted = arguments.configs or "all"
        configs = [row["id"] for row in fits] if wanted == "all" else timing.integers(wanted)
    default = [(m, n, k) for n, k in SHAPES for m in TOKENS] + [(8192, 8192, 8192)]
    problems = QUICK if arguments.quick else default
    if arguments.m or arguments.shapes:
        problems = [(m, n, k) for n, k in arguments.shapes or SHAPES for m in arguments.m or TOKENS]

    rows = []
    for m, n, k in problems:
        rows.append(measure(m, n, k, configs, not arguments.no_peers, gpu))
        print(" ".join(text(rows[-1])), file=sys.stderr, flush=True)  # a long run shows where it is
        torch.cuda.empty_cache()
    print_table(
        f"INT8 GEMM on {gpu.name}: scales and bfloat16 out; ratios above 1 mean that hwkern is faster",
        ["M×N×K", "config", "µs", "TOPS", "speed of light", "vs bf16", "vs int_mm", "vs fp8"],
        [text(row) for row in rows],
    )
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
