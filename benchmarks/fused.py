"""Norm + quantize and activation + quantize in one launch, against the norm or activation alone and against a copy.

Peers for a norm: torch's fused kernel (F.rms_norm, F.layer_norm) alone, and followed by ``hwkern.ops.quantize``; with
--compile also transformers' norm under torch.compile, seconds a shape. For an activation: eager torch, or with
--compile one kernel. "copy" moves the same bytes as our kernel, half of them read and half written. A row of a few kB
is partly in L2: there are at most 1000 sets of buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timing
import torch
import torch.nn.functional as F

from hwkern import ops, reference
from hwkern._console import print_table
from hwkern.bench.kernels import EPS, add_llama_norm, add_rms_norm, llama_norm, rms_norm, silu_mul, then_quantize

NORM_M, NORM_K = (1, 16, 512, 4096, 8192), (768, 1024, 4096, 8192)
ACTIVATION_M, ACTIVATION_K = (1, 16, 512, 4096, 8192), (3072, 14336)
QUICK_M, QUICK_K = (16, 4096), (4096,)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

COMPILE = False  # set by --compile
MAX_SETS = 1000

Calls = list[Callable[[], object]]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph per shape: what a compiled model of fixed shape runs."""
    return torch.compile(function, dynamic=False)


def peers(
    eager: tuple[str, Callable[..., Any]], model: Callable[..., Any], inputs: list[tuple[Any, ...]]
) -> dict[str, Calls]:
    """The eager peer, and with --compile the model's own code compiled, over all sets of inputs."""
    name, function = eager
    found: dict[str, Calls] = {name: [functools.partial(function, *given) for given in inputs]}
    if COMPILE:
        found["compiled"] = [functools.partial(compiled(model), *given) for given in inputs]
    return found


# ---- one row of the table ------------------------------------------------------------------------------------------


@functools.cache
def copy_us(bytes_moved: int, l2_bytes: int) -> float:
    """µs of one device copy that reads half of ``bytes_moved`` and writes the other half, cold L2."""
    half = max(16, bytes_moved // 2)
    sets = min(MAX_SETS, timing.rotations(2 * half, l2_bytes))
    buffers = [tuple(torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2)) for _ in range(sets)]
    return timing.cuda_us({"copy": [functools.partial(to.copy_, source) for to, source in buffers]})["copy"]


def row(
    operator: str, m: int, k: int, dtype: str, bytes_moved: int, l2_bytes: int, ours: Calls, alone: dict[str, Calls]
) -> dict[str, Any]:
    """Times ours, each peer alone, and the fastest peer with a quantization behind it."""
    us = timing.cuda_us({"ours": ours} | alone)
    peer = min(alone, key=lambda name: us[name])
    pair = timing.cuda_us({"pair": [functools.partial(then_quantize, call) for call in alone[peer]]})["pair"]
    copy = copy_us(bytes_moved, l2_bytes)
    return {
        "operator": operator,
        "m": m,
        "k": k,
        "dtype": dtype,
        "us": round(us["ours"], 3),
        "bytes": bytes_moved,
        "copy_us": round(copy, 3),
        "of_copy": round(copy / us["ours"], 4),
        "peers_us": {name: round(us[name], 3) for name in alone},
        "alone": peer,
        "of_alone": round(us["ours"] / us[peer], 4),  # the target: at most 1.05
        "unfused_us": round(pair, 3),
    }


def norms(m: int, k: int, dtype: str, l2_bytes: int) -> list[dict[str, Any]]:
    """RMSNorm, RMSNorm after a residual add, and LayerNorm."""
    t = DTYPES[dtype]
    moved = m * k * (t.itemsize + 1) + 4 * m
    sets = min(MAX_SETS, timing.rotations(moved, l2_bytes))
    xs = [torch.randn(m, k, device="cuda", dtype=t) for _ in range(sets)]
    residuals = [torch.randn(m, k, device="cuda", dtype=t) for _ in range(sets)]
    w, b = torch.randn(k, device="cuda", dtype=t), torch.randn(k, device="cuda", dtype=t)
    for kind, bias in (("rms", None), ("rms_rounded", None), ("layer", b)):
        got = ops.norm_quantize(xs[0][:64], w, bias, residuals[0][:64], kind=kind, eps=EPS)
        want = reference.norm_quantize(xs[0][:64], w, bias, residuals[0][:64], kind=kind, eps=EPS)
        assert torch.equal(got.q, want[0]), f"norm_quantize {kind} is wrong at {m}×{k} {dtype}"
    part = functools.partial
    pairs = list(zip(xs, residuals, strict=True))
    return [
        row(
            "RMSNorm", m, k, dtype, moved, l2_bytes,
            [part(ops.norm_quantize, x, w, kind="rms_rounded", eps=EPS) for x in xs],
            peers(("F.rms_norm", rms_norm), llama_norm, [(x, w) for x in xs]),
        ),
        row(
            "add, RMSNorm", m, k, dtype, moved + 2 * m * k * t.itemsize, l2_bytes,
            [part(ops.norm_quantize, x, w, None, r, kind="rms_rounded", eps=EPS) for x, r in pairs],
            peers(("add, F.rms_norm", add_rms_norm), add_llama_norm, [(x, r, w) for x, r in pairs]),
        ),
        row(
            "LayerNorm", m, k, dtype, moved, l2_bytes,
            [part(ops.norm_quantize, x, w, b, kind="layer", eps=EPS) for x in xs],
            peers(("F.layer_norm", F.layer_norm), F.layer_norm, [(x, (k,), w, b, EPS) for x in xs]),
        ),
    ]  # fmt: skip


def activations(m: int, k: int, dtype: str, l2_bytes: int) -> list[dict[str, Any]]:
    """silu(gate) · up, and GELU."""
    t = DTYPES[dtype]
    moved = m * k * (t.itemsize + 1) + 4 * m
    sets = min(MAX_SETS, timing.rotations(moved, l2_bytes))
    both = [torch.randn(m, 2 * k, device="cuda", dtype=t) for _ in range(sets)]
    gates = [x[:, :k].contiguous() for x in both]
    # An ulp of the activation may move a value across a rounding boundary, so q may differ by 1.
    got, want = ops.activation_quantize(both[0][:64], gated=True), reference.quantize(silu_mul(both[0][:64]))
    assert int((got[0].int() - want[0].int()).abs().max()) <= 1, f"activation_quantize is wrong at {m}×{k} {dtype}"
    part = functools.partial
    return [
        row(
            "silu · up", m, k, dtype, moved + m * k * t.itemsize, l2_bytes,
            [part(ops.activation_quantize, x, gated=True) for x in both],
            peers(("eager", silu_mul), silu_mul, [(x,) for x in both]),
        ),
        row(
            "gelu", m, k, dtype, moved, l2_bytes,
            [part(ops.activation_quantize, x, activation="gelu") for x in gates],
            peers(("F.gelu", F.gelu), F.gelu, [(x,) for x in gates]),
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated")
    parser.add_argument("--compile", action="store_true", help="also torch.compile's kernels; seconds a shape")
    arguments = parser.parse_args()
    global COMPILE
    COMPILE = arguments.compile
    timing.need_cuda()
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 1000  # one graph per shape and dtype
    l2 = timing.current_gpu().l2_bytes
    rows = []
    for dtype in arguments.dtypes.split(","):
        for m in QUICK_M if arguments.quick else NORM_M:
            for k in QUICK_K if arguments.quick else NORM_K:
                rows += norms(m, k, dtype, l2)
        for m in QUICK_M if arguments.quick else ACTIVATION_M:
            for k in ACTIVATION_K:
                rows += activations(m, k, dtype, l2)
                torch.cuda.empty_cache()
    print_table(
        f"Norm or activation with quantization on {timing.current_gpu().name}",
        ["operator", "dtype", "M×K", "µs", "of a copy", "alone", "µs", "ours / alone", "faster than the two"],
        [
            [
                r["operator"],
                r["dtype"],
                f"{r['m']}×{r['k']}",
                f"{r['us']:.1f}",
                f"{r['of_copy'] * 100:.0f} %",
                r["alone"],
                f"{r['peers_us'][r['alone']]:.1f}",
                f"{r['of_alone']:.2f}",
                timing.ratio(r["us"], r["unfused_us"]),
            ]
            for r in rows
        ],
        left=3,
    )
    timing.save(arguments.json, timing.result("fused", "cuda", arguments.commit, rows))


if __name__ == "__main__":
    main()
