"""A whole layer on CUDA: Int8Linear (quantize, GEMM, bias; bfloat16 in and out) against nn.Linear, and the host's cost.

Two measurements. "device" replays CUDA graphs with a cold L2: the time a captured or compiled model sees. "host" calls
the modules eagerly at a size where the GPU has almost nothing to do: what Python and the dispatcher cost per call, the
time an eager model with small batches sees.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import gemm
import timing
import torch

import hwkern
from hwkern import hardware
from hwkern._console import print_table

HOST_FEATURES = 512
PEERS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check(linear: torch.nn.Linear, ours: torch.nn.Module, x: torch.Tensor) -> None:
    """Leave with a sentence unless the int8 layer is as close to the float one as rounding to 8 bits allows.

    Weights and activations each carry a uniform rounding error of at most half a step, 1/254 of the row's absmax; over
    Gaussian rows (absmax ≈ 3–4.5 σ) that is a relative error of about 1 % of the output's norm each. 3 % is generous.
    """
    want = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        sys.exit(f"Wrong result: Int8Linear differs from nn.Linear by {error:.1%} at {tuple(x.shape)}.")


def calls(
    make: Callable[[], torch.nn.Module], m: int, k: int, dtype: torch.dtype, sets: int
) -> list[Callable[[], object]]:
    """``sets`` independent layers with their own inputs, as calls."""
    return [functools.partial(make(), torch.randn(m, k, device="cuda", dtype=dtype)) for _ in range(sets)]


def measure_device(m: int, n: int, k: int, gpu: hardware.Gpu) -> dict[str, Any]:
    """One row of graph-replay times."""
    linear = torch.nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    ours = hwkern.nn.Int8Linear.from_float(linear)
    with torch.inference_mode():
        check(linear, ours, torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
    sets = timing.rotations(2 * m * k + n * k + 2 * m * n, gpu.l2_bytes)
    peers = {"hwkern": calls(lambda: copy.deepcopy(ours), m, k, torch.bfloat16, sets)}
    for name, dtype in PEERS.items():
        sets = timing.rotations(dtype.itemsize * (m * k + n * k + m * n), gpu.l2_bytes)
        peers[name] = calls(lambda dtype=dtype: copy.deepcopy(linear).to(dtype), m, k, dtype, sets)  # type: ignore[misc]
    us = {name: round(value, 3) for name, value in timing.cuda_us(peers).items()}
    floor = hardware.speed_of_light(m, n, k, gpu, a_bytes=2)
    return {"m": m, "n": n, "k": k, "us": us.pop("hwkern"), "floor_us": round(floor.microseconds, 3), "peers_us": us}


def measure_host() -> list[dict[str, Any]]:
    """Host µs per eager call of Int8Linear and nn.Linear, with and without autograd recording."""
    linear = torch.nn.Linear(HOST_FEATURES, HOST_FEATURES, device="cuda", dtype=torch.bfloat16)
    ours = hwkern.nn.Int8Linear.from_float(linear)
    x = torch.randn(1, HOST_FEATURES, device="cuda", dtype=torch.bfloat16)
    rows = []
    for mode, context in (("inference_mode", torch.inference_mode), ("grad", torch.enable_grad)):
        with context():
            us = timing.host_us({"hwkern": lambda: ours(x), "bf16": lambda: linear(x)})
        rows.append({"mode": mode, "us": round(us["hwkern"], 3), "linear_us": round(us["bf16"], 3)})
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--m", type=timing.integers, metavar="M,M", help="tokens (default 1 … 8192)")
    parser.add_argument("--shapes", type=timing.shapes, metavar="NxK,NxK", help="layers (default Llama-3-8B's)")
    parser.add_argument("--only", choices=["device", "host"], help="one of the two measurements")
    arguments = parser.parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    rows: list[dict[str, Any]] = []
    if arguments.only != "device":
        host = measure_host()
        print_table(
            f"Host cost of one eager call, {HOST_FEATURES}→{HOST_FEATURES} bfloat16, one token",
            ["mode", "Int8Linear µs", "nn.Linear µs", "Int8Linear / nn.Linear"],
            [[r["mode"], f"{r['us']:.1f}", f"{r['linear_us']:.1f}", f"{r['us'] / r['linear_us']:.2f}"] for r in host],
        )
        rows += [{"kind": "host", **row} for row in host]
    if arguments.only != "host":
        problems = gemm.QUICK if arguments.quick else [(m, n, k) for n, k in gemm.SHAPES for m in gemm.TOKENS]
        if arguments.m or arguments.shapes:
            problems = [(m, n, k) for n, k in arguments.shapes or gemm.SHAPES for m in arguments.m or gemm.TOKENS]
        device = []
        for m, n, k in problems:
            device.append(measure_device(m, n, k, gpu))
            print(device[-1], file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        print_table(
            f"Int8Linear on {gpu.name}, bfloat16 in and out; ratios above 1 mean that hwkern is faster",
            ["M×N×K", "µs", "speed of light", "vs bf16", "vs fp16", "vs fp32"],
            [
                [
                    f"{row['m']}×{row['n']}×{row['k']}",
                    f"{row['us']:.1f}",
                    f"{row['floor_us'] / row['us'] * 100:.0f} %",
                    *(timing.ratio(row["us"], row["peers_us"][peer]) for peer in PEERS),
                ]
                for row in device
            ],
        )
        rows += [{"kind": "device", **row} for row in device]
    timing.save(arguments.json, timing.result("linear", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
