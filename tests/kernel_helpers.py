"""Raw calls of the CUDA kernels on buffers with guard bytes: what `ops` never shows, a kernel must still respect."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hwkern import _native, ops
from hwkern.ops import DTYPES

#: Under compute-sanitizer a launch costs a thousand times more: tests marked ``sanitizer`` then use fewer shapes.
REDUCED = os.environ.get("HWKERN_REDUCED") == "1"

GUARD = 512  # bytes before and after every output
POISON = 0xA5

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def configs(scheme: str) -> list[dict[str, Any]]:
    """The rows of the config table of one scheme."""
    return [row for row in _native.extension().gemm_configs() if row["scheme"] == scheme]


def runs_here(config: dict[str, Any]) -> bool:
    """Whether this machine's GPU is one that the config is for; without a GPU the gpu marker skips anyway."""
    if not torch.cuda.is_available():
        return True
    properties = torch.cuda.get_device_properties(0)
    fits = config["shared_bytes"] <= properties.shared_memory_per_block_optin
    return fits and config["min_compute"] <= 10 * properties.major + properties.minor <= config["max_compute"]


def each_config(rows: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """Parametrizes a test with ``config``, an id of each row."""
    return pytest.mark.parametrize("config", [row["id"] for row in rows], ids=[row["name"] for row in rows])


def assert_a_chain_gives_the_bits_of_single_steps(config: int, m: int, width: int) -> None:
    """Each layer reads what the one before wrote, and launches overlap: as if all were waited for, in a graph too."""
    x = torch.randn(m, width, device="cuda", dtype=torch.bfloat16)
    layers = [ops.quantize(torch.randn(width, width, device="cuda")) for _ in range(3)]

    def chain(wait: bool) -> Tensor:
        y = x
        for weight, scale in layers * 2:
            y = ops.int8_linear(y, weight, scale, config=config)
            if wait:
                torch.cuda.synchronize()
        return y

    rounds = 3 if REDUCED else 20
    expected = chain(wait=True)
    for _ in range(rounds):
        assert same_bits(chain(wait=False), expected)
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:
        return  # under a sanitizer every tensor is a cudaMalloc of its own, which no capture allows
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(wait=False)
    for _ in range(rounds):
        y.zero_()
        graph.replay()
        assert same_bits(y, expected)


class Guarded:
    """An output ``[rows, columns]`` with row pitch ``pitch``, poisoned, between guard bytes."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, pitch: int | None = None, offset: int = 0) -> None:
        self.rows, self.columns, self.pitch = rows, columns, pitch or columns
        self.offset = GUARD + offset * dtype.itemsize
        payload = rows * self.pitch * dtype.itemsize
        self.buffer = torch.full((self.offset + payload + GUARD,), POISON, dtype=torch.uint8, device="cuda")
        self.body = self.buffer[self.offset : self.offset + payload]
        self.matrix = self.body.view(dtype).view(rows, self.pitch)

    @property
    def value(self) -> Tensor:
        return self.matrix[:, : self.columns]

    def pointer(self) -> int:
        return self.body.data_ptr()

    def untouched_outside(self) -> Tensor:
        """Whether guards and the padding between rows still hold the poison: a bool on the GPU, for many at once."""
        outside = self.buffer.clone()
        inner = outside[self.offset : self.offset + self.body.numel()].view(self.matrix.dtype).view(self.matrix.shape)
        inner[:, : self.columns].view(torch.uint8).fill_(POISON)
        return (outside == POISON).all()

    def assert_untouched_outside(self) -> None:
        assert bool(self.untouched_outside()), "bytes outside the output were written"


def random_int8(rows: int, columns: int, pitch: int | None = None) -> Tensor:
    """``[rows, columns]`` with values over the whole int8 range; the padding of each row holds garbage, not zeros."""
    pitch = pitch or -(-columns // 16) * 16
    return torch.randint(-128, 128, (rows, pitch), dtype=torch.int8, device="cuda")[:, :columns]


def gemm(
    a: Tensor,
    b: Tensor,
    d: Guarded,
    config: int,
    scale_m: Tensor | None = None,
    scale_n: Tensor | None = None,
    bias: Tensor | None = None,
    **options: int,
) -> None:
    """``options``: further keyword arguments of ``_C.gemm``."""

    def pointer(t: Tensor | None) -> int:
        return 0 if t is None else t.data_ptr()

    _native.extension().gemm(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), pointer(scale_m), pointer(scale_n),
        pointer(bias), 0 if bias is None else DTYPES[bias.dtype], d.pointer(), d.pitch, DTYPES[d.matrix.dtype],
        a.shape[0], b.shape[0], a.shape[1], config, torch.cuda.current_stream().cuda_stream, **options,
    )  # fmt: skip


class Verdicts:
    """Whether many things are true, asked of the GPU in one go: waiting for each takes longer than a small launch.

    The first that is false is named by :meth:`check`, or a few hundred later.
    """

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, str]] = []

    def add(self, verdict: Tensor, where: str) -> None:
        """``verdict``: a bool on any device."""
        self._found.append((verdict, where))
        if len(self._found) >= 256:
            self.check()

    def check(self) -> None:
        """AssertionError if any of those added since the last check is false."""
        found, self._found = self._found, []
        verdicts = torch.stack([verdict for verdict, _ in found]).tolist() if found else []
        wrong = [where for good, (_, where) in zip(verdicts, found, strict=True) if not good]
        assert not wrong, f"{len(wrong)} of {len(found)} are wrong, first {wrong[0]}"


def equal_bits(x: Tensor, y: Tensor) -> Tensor:
    """Equal bit for bit, where every NaN counts as the same: a bool on their device."""
    assert x.shape == y.shape, (x.shape, y.shape)
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    if not x.is_floating_point():
        return (x == y).all()
    x, y = torch.where(x.isnan(), torch.zeros_like(x), x), torch.where(y.isnan(), torch.zeros_like(y), y)
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    return (x.contiguous().view(width) == y.contiguous().view(width)).all()


def same_bits(x: Tensor, y: Tensor) -> bool:
    """:func:`equal_bits`, and the same shape and dtype."""
    return x.shape == y.shape and x.dtype == y.dtype and bool(equal_bits(x, y))


def ulp_distance(value: Tensor, exact: Tensor) -> float:
    """The largest ``|value - exact| / ulp``, where ulp is the output type's spacing at ``exact`` (float64)."""
    info = torch.finfo(value.dtype)
    exponent = exact.abs().clamp_min(info.tiny).log2().floor()
    ulp = 2.0 ** (exponent + math.log2(info.eps))
    return float(((value.double() - exact).abs() / ulp).max())
