"""One layer on one CPU thread: Int8Linear (float32 in and out) against nn.Linear and torch's dynamic quantization.

Peers: float32 and bfloat16 nn.Linear, and `fbgemm`, torch.ao.quantization.quantize_dynamic, where torch still has it.
One thread, so that the numbers do not depend on what else the machine is doing; medians, peers called in turn.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import timing
import torch

import hwkern
from hwkern import hardware, ops, reference
from hwkern._console import print_table

# (N, K): all-MiniLM-L6-v2's attention and two feed-forward layers, BERT-base's, and a large one.
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (1024, 4096)]
TOKENS = [1, 16, 256]
QUICK = ([(384, 384), (1024, 4096)], [16])


def check(linear: torch.nn.Linear, ours: torch.nn.Module, x: torch.Tensor) -> None:
    """Leave with a sentence unless the layer gives the reference's bits."""
    weight, scale = reference.quantize(linear.weight.detach())
    if not torch.equal(ours(x), reference.int8_linear(x, weight, scale, linear.bias.detach())):
        sys.exit(f"Wrong result: Int8Linear differs from the reference at {tuple(x.shape)} × {tuple(weight.shape)}.")


def fbgemm(linear: torch.nn.Linear) -> torch.nn.Module | None:
    """The layer as torch's own dynamic quantization makes it; None where this torch cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), dtype=torch.qint8)
        except (AttributeError, RuntimeError, ImportError):  # removed, or built without a quantized engine
            return None


def measure(m: int, n: int, k: int) -> dict[str, Any]:
    """One row."""
    linear = torch.nn.Linear(k, n)
    ours = hwkern.nn.Int8Linear.from_float(linear)
    x = torch.randn(m, k)
    with torch.inference_mode():
        check(linear, ours, x)
    half = torch.nn.Linear(k, n, dtype=torch.bfloat16)
    peers: dict[str, timing.Call] = {
        "hwkern": functools.partial(ours, x),
        "fp32": functools.partial(linear, x),
        "bf16": functools.partial(half, x.bfloat16()),
    }
    dynamic = fbgemm(linear)
    if dynamic is not None:
        peers["fbgemm"] = functools.partial(dynamic, x)
    us = {name: round(value, 2) for name, value in timing.cpu_us(peers).items()}
    return {"m": m, "n": n, "k": k, "us": us.pop("hwkern"), "peers_us": us}


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--m", type=timing.integers, metavar="M,M", help="tokens (default 1,16,256)")
    parser.add_argument("--shapes", type=timing.shapes, metavar="NxK,NxK", help="layers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers, tokens = QUICK if arguments.quick else (SHAPES, TOKENS)
    layers, tokens = arguments.shapes or layers, arguments.m or tokens
    rows = [measure(m, n, k) for n, k in layers for m in tokens]
    cpu = hardware.cpu()
    print_table(
        f"Int8Linear on one thread of {cpu.name} ({', '.join(cpu.int8_units) or 'no int8 units'}); "
        "ratios above 1 mean that hwkern is faster",
        ["M×N×K", "µs", "vs float32", "vs bfloat16", "vs fbgemm dynamic"],
        [
            [
                f"{row['m']}×{row['n']}×{row['k']}",
                f"{row['us']:.0f}",
                *(timing.ratio(row["us"], row["peers_us"].get(peer)) for peer in ("fp32", "bf16", "fbgemm")),
            ]
            for row in rows
        ],
    )
    if not ops.cpu_int8_is_fast():
        print("This CPU has no exact int8 units: hwkern multiplies in float32 here (docs/numerics.md).")
    timing.save(arguments.json, timing.result("cpu_linear", "cpu", arguments.commit, rows))


if __name__ == "__main__":
    main()
