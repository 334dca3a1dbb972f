"""Quantize and dequantize against a device copy of the same number of bytes, and against the eager torch chain.

Two yardsticks. "copy" moves the same bytes as the kernel (half of them read, half written), launch included: what a
perfect kernel of this size can hope for. "large copy" is one copy of 1 GiB: the bandwidth of the memory itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timing
import torch

from hwkern import ops, reference
from hwkern._console import print_table
from hwkern.bench.kernels import eager_dequantize, eager_per_token, eager_static

SHAPES = [(1, 4096), (64, 4096), (512, 4096), (4096, 4096), (8192, 4096), (4096, 14336), (16384, 8192)]
QUICK = [(64, 4096), (4096, 4096)]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGE_COPY_BYTES = 1 << 30


def copy_us(bytes_moved: int, l2_bytes: int) -> float:
    """µs of one device copy that reads half of ``bytes_moved`` and writes the other half, cold L2."""
    half = max(16, bytes_moved // 2)
    sets = timing.rotations(2 * half, l2_bytes)
    buffers = [tuple(torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2)) for _ in range(sets)]
    return timing.cuda_us({"copy": [functools.partial(to.copy_, source) for to, source in buffers]})["copy"]


def check(m: int, k: int, dtype: torch.dtype) -> None:
    """Assert that every operator gives the reference's bits."""
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    q, scale = ops.quantize(x)
    want_q, want_scale = reference.quantize(x)
    assert torch.equal(q, want_q), f"quantize per token is wrong at {m}×{k} {dtype}"
    assert torch.equal(scale, want_scale), f"the scale per token is wrong at {m}×{k} {dtype}"
    for static in (scale.max().reshape(1), torch.rand(k, device="cuda") / 20 + 0.01):
        got, _ = ops.quantize(x, static, axis=-1)
        assert torch.equal(got, reference.quantize(x, static, axis=-1)[0]), f"static is wrong at {m}×{k} {dtype}"
    want = reference.dequantize(q, scale, 0, dtype)
    assert torch.equal(ops.dequantize(q, scale, 0, dtype), want), f"dequantize is wrong at {m}×{k} {dtype}"


def measure(m: int, k: int, name: str, large_bandwidth: float, l2_bytes: int) -> list[dict[str, Any]]:
    """One row per operator at this shape and dtype."""
    dtype = DTYPES[name]
    check(m, k, dtype)
    moved = m * k * (dtype.itemsize + 1)
    sets = timing.rotations(moved, l2_bytes)
    xs = [torch.randn(m, k, device="cuda", dtype=dtype) for _ in range(sets)]
    packed = [ops.quantize(x) for x in xs]
    tensor_scale, column_scale = torch.full((1,), 0.03, device="cuda"), torch.full((k,), 0.03, device="cuda")
    work: dict[str, tuple[int, list[Callable[[], object]], list[Callable[[], object]]]] = {
        "quantize per token": (
            moved + 4 * m,
            [functools.partial(ops.quantize, x) for x in xs],
            [functools.partial(eager_per_token, x) for x in xs],
        ),
        "quantize per tensor": (
            moved,
            [functools.partial(ops.quantize, x, tensor_scale) for x in xs],
            [functools.partial(eager_static, x, tensor_scale) for x in xs],
        ),
        "quantize per channel": (
            moved + 4 * k,
            [functools.partial(ops.quantize, x, column_scale, -1) for x in xs],
            [functools.partial(eager_static, x, column_scale) for x in xs],
        ),
        "dequantize per token": (
            moved + 4 * m,
            [functools.partial(ops.dequantize, q, scale, 0, dtype) for q, scale in packed],
            [functools.partial(eager_dequantize, q, scale, dtype) for q, scale in packed],
        ),
    }
    copy = copy_us(moved, l2_bytes)
    rows = []
    for operator, (bytes_moved, ours, eager) in work.items():
        us = timing.cuda_us({"ours": ours, "eager": eager})
        bandwidth = bytes_moved / us["ours"] * 1e6
        rows.append(
            {
                "operator": operator,
                "m": m,
                "k": k,
                "dtype": name,
                "us": round(us["ours"], 3),
                "bytes": bytes_moved,
                "bandwidth": round(bandwidth / 1e9, 1),  # GB/s
                "copy_us": round(copy, 3),
                "of_copy": round(copy * bytes_moved / moved / us["ours"], 4),
                "of_large_copy": round(bandwidth / large_bandwidth, 4),
                "eager_us": round(us["eager"], 3),
            }
        )
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--dtypes", default="float32,float16,bfloat16", help="comma-separated")
    arguments = parser.parse_args()
    timing.need_cuda()
    torch.manual_seed(0)
    gpu = timing.current_gpu()
    large = LARGE_COPY_BYTES * 2 / copy_us(LARGE_COPY_BYTES * 2, gpu.l2_bytes) * 1e6
    rows = []
    for name in arguments.dtypes.split(","):
        for m, k in QUICK if arguments.quick else SHAPES:
            rows += measure(m, k, name, large, gpu.l2_bytes)
            torch.cuda.empty_cache()
    print_table(
        f"Quantize on {gpu.name}; a 1 GiB copy moves {large / 1e12:.2f} TB/s",
        ["operator", "dtype", "M×K", "µs", "GB/s", "of a copy", "of a large copy", "vs eager"],
        [
            [
                row["operator"],
                row["dtype"],
                f"{row['m']}×{row['k']}",
                f"{row['us']:.1f}",
                f"{row['bandwidth']:.0f}",
                f"{row['of_copy'] * 100:.0f} %",
                f"{row['of_large_copy'] * 100:.0f} %",
                timing.ratio(row["us"], row["eager_us"]),
            ]
            for row in rows
        ],
        left=3,
    )
    timing.save(arguments.json, timing.result("quantize", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
