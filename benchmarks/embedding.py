"""Embedding lookup in an int8 table against torch's in a 16-bit one, at random indices.

The last column is the share of the speed of light: rows read in int8 and written in 16 bits at the device's bandwidth.
"""

from __future__ import annotations

import functools
from typing import Any

import timing
import torch
from torch.nn import functional as F

from hwkern import ops, reference
from hwkern._console import print_table

TABLES = [(50257, 768), (128256, 2048), (128256, 4096)]  # GPT-2's, Llama-3.2-1B's, Llama-3-8B's
TOKENS = [1, 16, 512, 4096, 16384]
QUICK = [16, 4096]
SETS = 16  # of indices: the rows of one call are not in the cache for the next


def quantized(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A table as int8 and its scales, a part at a time."""
    parts = [ops.quantize(rows) for rows in table.split(2**14)]
    return torch.cat([q for q, _ in parts]), torch.cat([scale for _, scale in parts])


def measure(table: torch.Tensor, m: int, bandwidth: float) -> dict[str, Any]:
    """One row: this many tokens."""
    rows, width = table.shape
    q, scale = quantized(table)
    indices = [torch.randint(0, rows, (m,), device="cuda") for _ in range(SETS)]
    want = reference.int8_embedding(indices[0], q, scale, table.dtype)
    assert torch.equal(ops.int8_embedding(indices[0], q, scale, table.dtype), want), f"wrong at {m} of {rows} × {width}"
    cell = ops.TableCell()
    us = timing.cuda_us(
        {
            "ours": [
                functools.partial(ops.eager_embedding, i, q, scale, table.dtype, width, cell) for i in indices
            ],
            "torch": [functools.partial(F.embedding, i, table) for i in indices],
        }
    )  # fmt: skip
    floor = m * width * 3 / bandwidth * 1e6
    return {
        "rows": rows,
        "width": width,
        "m": m,
        "us": round(us["ours"], 3),
        "torch_us": round(us["torch"], 3),
        "speedup": round(us["torch"] / us["ours"], 3),
        "of_light": round(floor / us["ours"], 4),
    }


def main() -> None:
    """Measure, print, save."""
    arguments = timing.parser(__doc__).parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    if gpu.bandwidth is None:
        raise SystemExit(f"The bandwidth of {gpu.name} is not known.")
    found = []
    for rows, width in TABLES:
        table = torch.randn(rows, width, device="cuda", dtype=torch.float16)
        found += [measure(table, m, gpu.bandwidth) for m in (QUICK if arguments.quick else TOKENS)]
    print_table(
        f"Embedding lookup on {gpu.name}, float16 out",
        ["table", "tokens", "µs", "torch µs", "speedup", "of light"],
        [
            [
                f"{row['rows']} × {row['width']}", row["m"], f"{row['us']:.2f}", f"{row['torch_us']:.2f}",
                f"{row['speedup']:.2f}×", f"{row['of_light']:.0%}",
            ]
            for row in found
        ],
    )  # fmt: skip
    timing.save(arguments.json, timing.result("embedding", "cuda", arguments.commit, found))


if __name__ == "__main__":
    main()
