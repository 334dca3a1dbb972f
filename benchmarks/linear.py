"""A whole layer on CUDA: Int8Linear (quantize, GEMM, bias; bfloat16 in and out) against its peers; the host's cost.

Two measurements. "device" replays CUDA graphs with a cold L2: the time a captured or compiled model sees. "host" calls
the modules eagerly at a size where the GPU has almost nothing to do: what Python and the dispatcher cost per call, the
time an eager model with small batches sees. Peers are described in peers/layers.py; the compiled ones cost seconds
each, so they run where --peers names them. A peer that cannot run is listed with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import gemm
import peers
import timing
import torch
from peers import layers

import hwkern
from hwkern import hardware
from hwkern._console import print_table

HOST_FEATURES = 512


def check(linear: torch.nn.Linear, ours: torch.nn.Module, x: torch.Tensor) -> None:
    """Leave with a sentence unless the int8 layer is as close to the float one as rounding to 8 bits allows.

    Weights and activations each carry a uniform rounding error of at most half a step, 1/254 of the row's absmax; over
    Gaussian rows (absmax ≈ 3–4.5 σ) that is a relative error of about 1 % of the output's norm each. 3 % is generous.
    """
    want = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    error = ((ours(x).float() - want).norm() / want.norm()).item()
    if not error < 0.03:
        sys.exit(f"Wrong result: Int8Linear differs from nn.Linear by {error:.1%} at {tuple(x.shape)}.")


def measure_device(m: int, n: int, k: int, gpu: hardware.Gpu, names: Sequence[str], limit: float) -> dict[str, Any]:
    """One row of graph-replay times."""
    problem = layers.Problem(m, n, k, gpu)
    ours = hwkern.nn.Int8Linear.from_float(problem.linear)
    with torch.inference_mode():
        check(problem.linear, ours, problem.x())
    calls = {"hwkern": problem.copies(ours, torch.bfloat16, problem.sets(2, 1))}
    found, absent = peers.collect({name: layers.MAKERS[name] for name in names}, problem, limit)
    us = {name: round(value, 3) for name, value in timing.cuda_us(calls | found).items()}
    floor = hardware.speed_of_light(m, n, k, gpu, a_bytes=2)
    return {
        "m": m, "n": n, "k": k, "us": us.pop("hwkern"), "floor_us": round(floor.microseconds, 3), "bound": floor.bound,
        "peers_us": us, "absent": absent,
    }  # fmt: skip


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
    parser.add_argument(
        "--peers",
        default=",".join(layers.QUICK),
        help=f"of {', '.join(layers.NAMES)}, or `all` (default: the first four, which compile nothing)",
    )
    parser.add_argument("--limit", type=float, default=45, help="seconds that one peer may take to prepare a shape")
    parser.add_argument("--only", choices=["device", "host"], help="one of the two measurements")
    arguments = parser.parse_args()
    timing.need_cuda()
    names = list(layers.NAMES) if arguments.peers == "all" else [name for name in arguments.peers.split(",") if name]
    if unknown := set(names) - set(layers.NAMES):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; there are {', '.join(layers.NAMES)}")
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
        device = []
        for m, n, k in timing.problems(arguments, gemm.QUICK, gemm.LAYERS, gemm.SHAPES, gemm.TOKENS):
            device.append(measure_device(m, n, k, gpu, names, arguments.limit))
            print(device[-1], file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
        print_table(
            f"Int8Linear on {gpu.name}, bfloat16 in and out; ratios above 1 mean that hwkern is faster",
            ["M×N×K", "µs", "speed of light", *(f"vs {name}" for name in names)],
            [
                [
                    f"{row['m']}×{row['n']}×{row['k']}",
                    f"{row['us']:.1f}",
                    f"{row['floor_us'] / row['us'] * 100:.0f} %",
                    *(timing.ratio(row["us"], row["peers_us"].get(name)) for name in names),
                ]
                for row in device
            ],
        )
        timing.print_absent(device)
        rows += [{"kind": "device", **row} for row in device]
    timing.save(arguments.json, timing.result("linear", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
