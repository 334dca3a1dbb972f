"""Embedding lookup in an int8 table against torch's in a float16 one, at random indices.

The GPU's time, and that of eager calls of the layers, host included. "of light": rows read in int8 and written in 16
bits at the device's bandwidth.
"""

from __future__ import annotations

import functools
from typing import Any

import timing
import torch
from torch import nn

from hwkern import reference
from hwkern._console import print_table
from hwkern._measure import eager_us
from hwkern.nn import Int8Embedding

TABLES = [(50257, 768), (128256, 2048), (128256, 4096)]  # GPT-2's, Llama-3.2-1B's, Llama-3-8B's
TOKENS = [1, 16, 512, 4096, 16384]
QUICK = [16, 4096]
SETS = 16  # of indices: the rows of one call are not in the cache for the next


def measure(table: nn.Embedding, packed: Int8Embedding, m: int, bandwidth: float) -> dict[str, Any]:
    """One row: this many tokens."""
    rows, width = packed.num_embeddings, packed.embedding_dim
    indices = [torch.randint(0, rows, (m,), device="cuda") for _ in range(SETS)]
    want = reference.int8_embedding(indices[0], packed.weight[:, :width], packed.weight_scale, packed.float_dtype)
    assert torch.equal(packed(indices[0]), want), f"wrong at {m} of {rows} × {width}"
    peers = {
        name: [functools.partial(layer, i) for i in indices] for name, layer in (("ours", packed), ("torch", table))
    }
    us = timing.cuda_us(peers)
    with torch.inference_mode():
        eager = eager_us(peers, torch.device("cuda"))
    return {
        "rows": rows,
        "width": width,
        "m": m,
        "us": round(us["ours"], 3),
        "torch_us": round(us["torch"], 3),
        "of_light": round(m * width * 3 / bandwidth * 1e6 / us["ours"], 4),
        "eager_us": round(eager["ours"], 3),
        "torch_eager_us": round(eager["torch"], 3),
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
        table = nn.Embedding.from_pretrained(torch.randn(rows, width, device="cuda", dtype=torch.float16))
        packed = Int8Embedding.from_float(table)
        found += [measure(table, packed, m, gpu.bandwidth) for m in (QUICK if arguments.quick else TOKENS)]
    print_table(
        f"Embedding lookup on {gpu.name}, float16 out",
        ["table", "tokens", "µs", "of light", "vs torch", "eager µs", "vs torch"],
        [
            [
                f"{row['rows']} × {row['width']}",
                str(row["m"]),
                f"{row['us']:.1f}",
                f"{row['of_light'] * 100:.0f} %",
                timing.ratio(row["us"], row["torch_us"]),
                f"{row['eager_us']:.1f}",
                timing.ratio(row["eager_us"], row["torch_eager_us"]),
            ]
            for row in found
        ],
    )
    timing.save(arguments.json, timing.result("embedding", "cuda", arguments.commit, found))


if __name__ == "__main__":
    main()
