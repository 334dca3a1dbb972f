"""``hwkern bench kernels``: GEMM, quantization and the fused operators against stock, and against the speed of light.

On a GPU: cold L2, CUDA-graph replays, peers in turn (hwkern._timing). On a CPU: eager calls in turn. Every operator is
compared with the reference before it is timed. benchmarks/ in the repository goes deeper into each; this is the
overview that ships with the package.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwkern import _timing, hardware, ops, reference
from hwkern._timing import Call
from hwkern.bench import products, record, settings
from hwkern.bench.limits import Budget
from hwkern.bench.models import AbsentError
from hwkern.bench.statistics import noise

EPS = 1e-5
#: Llama-3-8B's layers and BERT-base's as (N, K), and tokens.
SHAPES, TOKENS = ((4096, 4096), (28672, 4096), (4096, 14336), (3072, 768)), (1, 16, 64, 512, 4096)
CPU_SHAPES, CPU_TOKENS = ((768, 768), (3072, 768)), (1, 16, 128)
ROWS, CPU_ROWS = ((16, 4096), (4096, 4096)), ((16, 768), (128, 3072))
#: Blocks that the samples are cut into for the noise.
BLOCKS = 5
#: A result larger than this is checked on this many elements' worth of rows: float64 is slow.
CHECK_ELEMENTS = 1 << 20

Calls = list[Call]


# ---- what a user has without us -------------------------------------------------------------------------------------


def eager_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes in torch: absmax, divide, round, clamp, cast."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-30)
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def eager_static(x: Tensor, scale: Tensor) -> Tensor:
    """The same with a known scale, per tensor ``[1]`` or per column ``[K]``."""
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8)


def eager_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``q · scale`` per row, in torch."""
    return (q.float() * scale.unsqueeze(-1)).to(dtype)


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def add_llama_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual add before it."""
    h = x + residual
    return llama_norm(h, weight), h


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up of the two halves."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def then_quantize(call: Callable[[], Any]) -> Tensor:
    """The unfused pair: the norm or activation, then our quantization."""
    y = call()
    return ops.quantize(y[0] if isinstance(y, tuple) else y)[0]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """torch's fused kernel."""
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual add before it, a launch of its own."""
    h = x + residual
    return rms_norm(h, weight), h


def wrong_elements(a: Tensor, b: Tensor, config: int = ops.CHOOSE) -> int:
    """How many elements of the int32 product ``a [M, K] · b [N, K]ᵀ`` are not exact."""
    m, n = a.shape[0], b.shape[0]
    got = ops.int8_matmul(a, b, out_dtype=torch.int32, config=config)
    # First and last rows, and some in between: the tails are where a kernel goes wrong.
    count = max(2, min(m, CHECK_ELEMENTS // n))
    rows = torch.linspace(0, m - 1, count, device=a.device).round().long().unique()
    want = (a[rows].double() @ b.double().t()).to(torch.int32)  # exact: below 2⁵³
    return int((got[rows] != want).sum())


# ---- CPU times ------------------------------------------------------------------------------------------------------


def cpu_us(peers: Mapping[str, Call], seconds: float = 0.3, most: int = 200) -> dict[str, float]:
    """Median µs per call on one thread, peers called in turn: see :func:`cpu_samples`."""
    return {name: statistics.median(values) for name, values in cpu_samples(peers, seconds, most, 1).items()}


def cpu_samples(
    peers: Mapping[str, Call], seconds: float = 0.3, most: int = 200, threads: int | None = None
) -> dict[str, list[float]]:
    """µs of each call, peers called in turn. ``threads``: for as long as this lasts; None: torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            repeats = {}
            for name, call in peers.items():
                call()
                repeats[name] = max(5, min(most, math.ceil(seconds / max(1e-7, _call_seconds(call)))))
            samples: dict[str, list[float]] = {name: [] for name in peers}
            for turn in range(max(repeats.values())):
                for name, call in peers.items():
                    if turn < repeats[name]:
                        samples[name].append(_call_seconds(call) * 1e6)
    finally:
        torch.set_num_threads(before)
    return samples


def _call_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- the operators --------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """One operator at one size: our calls and the peers', one for each set of buffers.

    Attributes:
        operations: integer or float operations of one call; bytes: what it has to move at least.
        tensor: whether the operations are the tensor cores' (a product), else only the bytes bound it.
        absent: peers that cannot run, with the reason.
    """

    operator: str
    dtype: str
    m: int
    n: int | None
    k: int
    operations: int
    bytes: int
    ours: Calls
    peers: dict[str, Calls]
    tensor: bool = False
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> dict[str, Any]:
        return {"operator": self.operator, "dtype": self.dtype, "m": self.m, "n": self.n, "k": self.k}


def _sets(moved: int, device: str) -> int:
    """Sets of buffers, so that each call finds a cold cache on a GPU."""
    if not device.startswith("cuda"):
        return 1
    return min(1000, _timing.rotations(moved, hardware.gpu(torch.cuda.current_device()).l2_bytes))


def product(m: int, n: int, k: int, device: str) -> Work:
    """INT8 GEMM with scales of rows and columns."""
    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    work = Work(
        "INT8 GEMM", str(dtype).removeprefix("torch."), m, n, k, 2 * m * n * k, m * k + n * k + m * n * dtype.itemsize,
        [], {}, tensor=True,
    )  # fmt: skip
    if cuda:
        problem = products.Problem(m, n, k, hardware.gpu(torch.cuda.current_device()))
        pairs = [(a, b) for a, b, _, _ in problem.int8]
        for name, maker in products.MAKERS.items():
            try:
                work.peers[name] = maker(problem)
                work.peers[name][0]()
            except AbsentError as reason:
                work.absent[name] = str(reason)
        work.ours = [
            functools.partial(_timing.layer_product, *operands, dtype, ops.CHOOSE) for operands in problem.int8
        ]
    else:
        a, b = (_timing.random_int8(size, k, device=device) for size in (m, n))
        scale_m, scale_n = torch.rand(m) + 0.5, torch.rand(n) + 0.5
        pairs = [(a, b)]
        x, w = torch.randn(m, k), torch.randn(n, k)
        work.peers = {
            "fp32": [functools.partial(F.linear, x, w)],
            "bf16": [functools.partial(F.linear, x.bfloat16(), w.bfloat16())],
        }
        work.ours = [functools.partial(ops.int8_matmul, a, b, scale_m, scale_n, None, dtype)]
    if wrong := wrong_elements(*pairs[0]):
        raise RuntimeError(f"wrong result: {wrong} elements of the int32 product")
    return work


def quantizations(m: int, k: int, device: str) -> Iterator[Work]:
    """Quantize per token, and dequantize."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    name, moved = str(dtype).removeprefix("torch."), m * k * (dtype.itemsize + 1) + 4 * m
    xs = [torch.randn(m, k, device=device, dtype=dtype) for _ in range(_sets(moved, device))]
    packed = [ops.quantize(x) for x in xs]
    want = reference.quantize(xs[0])
    if not (torch.equal(packed[0][0], want[0]) and torch.equal(packed[0][1], want[1])):
        raise RuntimeError("wrong result: quantize differs from the reference")
    yield Work(
        "quantize per token", name, m, None, k, 0, moved, [functools.partial(ops.quantize, x) for x in xs],
        {"eager torch": [functools.partial(eager_per_token, x) for x in xs]},
    )  # fmt: skip
    yield Work(
        "dequantize", name, m, None, k, 0, moved,
        [functools.partial(ops.dequantize, q, s, 0, dtype) for q, s in packed],
        {"eager torch": [functools.partial(eager_dequantize, q, s, dtype) for q, s in packed]},
    )  # fmt: skip


def fused(m: int, k: int, device: str) -> Iterator[Work]:
    """Norms and activations with the quantization behind them; the peer is stock's, then our quantize."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    name, moved = str(dtype).removeprefix("torch."), m * k * (dtype.itemsize + 1) + 4 * m
    count = _sets(moved, device)
    xs = [torch.randn(m, k, device=device, dtype=dtype) for _ in range(count)]
    both = [torch.randn(m, 2 * k, device=device, dtype=dtype) for _ in range(count)]
    w, b = (torch.randn(k, device=device, dtype=dtype) for _ in range(2))
    got = ops.norm_quantize(xs[0], w, None, None, kind="rms", eps=EPS)
    want = reference.norm_quantize(xs[0], w, None, None, kind="rms", eps=EPS)
    if not torch.equal(got.q, want[0]):
        raise RuntimeError("wrong result: norm_quantize differs from the reference")

    def then(calls: Calls) -> dict[str, Calls]:
        return {
            "stock, then quantize": [functools.partial(then_quantize, call) for call in calls],
            "stock alone": calls,
        }

    part = functools.partial
    yield Work(
        "RMSNorm + quantize", name, m, None, k, 0, moved,
        [part(ops.norm_quantize, x, w, kind="rms_rounded", eps=EPS) for x in xs],
        then([part(rms_norm, x, w) for x in xs]),
    )  # fmt: skip
    yield Work(
        "LayerNorm + quantize", name, m, None, k, 0, moved,
        [part(ops.norm_quantize, x, w, b, kind="layer", eps=EPS) for x in xs],
        then([part(F.layer_norm, x, (k,), w, b, EPS) for x in xs]),
    )  # fmt: skip
    yield Work(
        "silu · up + quantize", name, m, None, k, 0, moved + m * k * dtype.itemsize,
        [part(ops.activation_quantize, x, gated=True) for x in both], then([part(silu_mul, x) for x in both]),
    )  # fmt: skip


def everything(device: str) -> Iterator[tuple[dict[str, Any], Callable[[], Sequence[Work]]]]:
    """``(name and size, what makes the work)`` in the order of importance."""
    cuda = device.startswith("cuda")
    for m in TOKENS if cuda else CPU_TOKENS:
        for n, k in SHAPES if cuda else CPU_SHAPES:
            where = {"operator": "INT8 GEMM", "m": m, "n": n, "k": k}
            yield where, lambda m=m, n=n, k=k: [product(m, n, k, device)]  # type: ignore[misc]
    for m, k in ROWS if cuda else CPU_ROWS:
        yield {"operator": "quantize", "m": m, "k": k}, lambda m=m, k=k: list(quantizations(m, k, device))  # type: ignore[misc]
        yield {"operator": "fused", "m": m, "k": k}, lambda m=m, k=k: list(fused(m, k, device))  # type: ignore[misc]


# ---- the run --------------------------------------------------------------------------------------------------------


def measure(work: Work, device: str, seconds: float) -> dict[str, Any]:
    """One row: µs, noise, peers, and the share of the speed of light."""
    if device.startswith("cuda"):
        samples = _timing.cuda_samples({"hwkern": work.ours, **work.peers}, seconds, rest=_timing.REST)
    else:
        samples = cpu_samples({"hwkern": work.ours[0], **{n: c[0] for n, c in work.peers.items()}}, seconds)
    us = {name: statistics.median(values) for name, values in samples.items()}
    mine = samples["hwkern"]
    # Samples of a block lie far from each other in time, as peers are timed in turn; of few each is a block.
    blocks = [statistics.median(mine[i::BLOCKS]) for i in range(BLOCKS)] if len(mine) >= 2 * BLOCKS else mine
    row = work.where | {
        "status": "ok",
        "us": round(us.pop("hwkern"), 3),
        "noise": None if (found := noise(blocks)) is None else round(found, 5),
        "peers_us": {name: round(value, 3) for name, value in us.items()},
        "absent": work.absent,
        "operations": work.operations,
        "bytes": work.bytes,
    }
    floor, bound = _floor(work, device)
    return row | {"floor_us": floor, "bound": bound, "of_light": floor and round(floor / row["us"], 4)}


def _floor(work: Work, device: str) -> tuple[float | None, str | None]:
    """Least µs by the documented peaks, and which of them; None on a CPU, whose peaks are not documented."""
    if not device.startswith("cuda"):
        return None, None
    gpu = hardware.gpu(torch.cuda.current_device())
    bounds = []
    if gpu.bandwidth:
        bounds.append((work.bytes / gpu.bandwidth, "memory"))
    if work.tensor and gpu.int8_ops:
        bounds.append((work.operations / gpu.int8_ops, "compute"))
    if not bounds:
        return None, None
    seconds, bound = max(bounds)
    return round(seconds * 1e6, 3), bound


def run(options: settings.Settings, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All operators, within the budget; ``keep`` gets the document after each size."""
    budget = Budget(options.budget, options.started)
    torch.manual_seed(options.seed)
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "schema": record.SCHEMA,
        "benchmark": "kernels",
        "environment": record.environment(options.device, options.keep["command"], options.keep.get("commit")),
        "settings": {"seconds": options.seconds, "budget": options.budget, "seed": options.seed},
        "rows": rows,
    }
    for where, make in everything(options.device):
        if budget.spent:
            rows.append(where | {"status": "not run", "reason": "budget"})
            continue
        try:
            for work in make():
                rows.append(measure(work, options.device, min(options.seconds / 10, budget.left)))
        except (RuntimeError, AbsentError) as error:
            rows.append(where | {"status": "failed", "reason": (str(error).splitlines() or [type(error).__name__])[0]})
        if options.show:
            print(f"{rows[-1]['operator']} {where}: {rows[-1].get('us', rows[-1].get('reason'))}", file=sys.stderr)
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        keep(document)
    keep(document)
    return document
