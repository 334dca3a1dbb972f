"""Many shapes, many runs, many launches in flight: the GEMM families and the layer against reference.py.

test_gemm.py has the edge shapes by name; here are all M of a decode batch, 10⁴ random shapes for each family of
kernels, the same bits in 100 runs, streams that run at once, and graphs that are replayed after their inputs changed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import torch
from kernel_helpers import FLOATS, POISON, REDUCED, Guarded, Verdicts, equal_bits, gemm, random_int8, same_bits
from test_gemm import RUNNABLE, all_configs, exact

from hwkern import ops, reference

POISON_INT32 = int.from_bytes(bytes([POISON] * 4), "little", signed=True)
SHAPES = 200 if REDUCED else 10_000
RUNS = 5 if REDUCED else 100

# (N, K): one column; tails in both; one tile exactly; K shorter than a pipeline stage, and longer than any pipeline.
LAYERS = [(72, 257), (257, 700)] if REDUCED else [(1, 40), (72, 17), (128, 128), (264, 257), (300, 1100), (512, 4096)]
MOST = 130  # the rows of every M test

#: Config ids of one family stand within one hundred: portable kernels, Hopper's large tiles, Hopper's split K.
FAMILIES = sorted({config["id"] // 100 for config in RUNNABLE})
families = pytest.mark.parametrize("family", FAMILIES)


def configs_of(family: int) -> list[int]:
    return [config["id"] for config in RUNNABLE if config["id"] // 100 == family]


# ---- every M ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
def test_every_m_gives_exact_sums_and_writes_no_row_past_its_end(config: int):
    steps = range(1, MOST + 1, 43) if REDUCED else range(1, MOST + 1)
    for n, k in LAYERS:
        a, b = random_int8(MOST, k), random_int8(n, k)
        # One output of MOST + 1 rows for each M, and one comparison for all of them.
        d = torch.full((len(steps), MOST + 1, n), POISON_INT32, dtype=torch.int32, device="cuda")
        want = d.clone()
        sums = exact(a, b)
        for i, m in enumerate(steps):
            want[i, :m] = sums[:m]
            out = Guarded.__new__(Guarded)  # a view of d instead of a buffer of its own
            out.matrix, out.pitch, out.body = d[i], n, d[i].view(-1)
            gemm(a[:m], b, out, config)
        wrong = (d != want).flatten(1).any(1).nonzero().flatten().tolist()
        assert not wrong, f"N, K = {n}, {k}: wrong for M = {[steps[i] for i in wrong]}"


# ---- random shapes ---------------------------------------------------------------------------------------------------


def random_size(chance: random.Random, most: int) -> int:
    """Small sizes as often as large ones, and every second one beside a multiple of 16: 1 … ``most``."""
    size = int(2 ** chance.uniform(0, most.bit_length()))
    if chance.random() < 0.5:
        size = (size + 15) // 16 * 16 + chance.choice((-1, 0, 0, 1))
    return max(1, min(size, most))


class Pool:
    """Random matrices as views of one buffer, with gaps between the rows: far cheaper than new ones."""

    def __init__(self, device: str, size: int, dtype: torch.dtype = torch.int8) -> None:
        if dtype == torch.int8:
            self.data = torch.randint(-128, 128, (size,), dtype=dtype, device=device)
        else:
            self.data = torch.randn(size, device=device).to(dtype)

    def matrix(self, chance: random.Random, rows: int, columns: int) -> torch.Tensor:
        """``[rows, columns]``; rows start at multiples of 16 elements."""
        pitch = -(-columns // 16) * 16 + 16 * chance.randrange(3)
        start = 16 * chance.randrange((self.data.numel() - rows * pitch) // 16)
        return self.data[start : start + rows * pitch].view(rows, pitch)[:, :columns]


@pytest.mark.gpu
@families
def test_random_shapes_give_the_reference_s_bits(family: int):
    """Sums with ==; with scales, bias, relu, residual and int8 output bit for bit: each float operation is one rounding
    in a fixed order. (gelu and silu are not one operation: test_epilogue.py has their tolerance.)"""
    chance, verdicts = random.Random(family), Verdicts()
    pool, ids = Pool("cuda", 1 << 25), configs_of(family)
    floats = {dtype: Pool("cuda", 1 << 20, dtype) for dtype in FLOATS}
    scales, out_scale = torch.rand(4096, device="cuda") * 0.01, torch.tensor(0.7, device="cuda")
    for number in range(SHAPES):
        m, n, k = random_size(chance, 700), random_size(chance, 1100), random_size(chance, 5000)
        if m * n * k > 1 << 28:
            k = max(1, (1 << 28) // (m * n))
        a, b = pool.matrix(chance, m, k), pool.matrix(chance, n, k)
        config = chance.choice(ids)
        dtype = chance.choice((torch.int32, *FLOATS, torch.int8))
        scale_m = scale_n = bias = residual = None
        activation, options = "none", {}
        if dtype != torch.int32:
            offset = chance.randrange(2000)
            scale_m, scale_n = scales[offset : offset + m], scales[offset + 1 : offset + 1 + n]
            if chance.random() < 0.5:
                bias = floats[chance.choice(FLOATS)].data[offset : offset + n]
            if chance.random() < 0.3:
                activation = "relu"
                options["activation"] = ops.ACTIVATIONS[activation]
            if chance.random() < 0.3 and m * (n + 48) < 1 << 20:
                residual = floats[chance.choice(FLOATS)].matrix(chance, m, n)
                options |= {
                    "residual": residual.data_ptr(), "ldr": residual.stride(0),
                    "residual_dtype": ops.DTYPES[residual.dtype],
                }  # fmt: skip
        if dtype == torch.int8:
            options["d_scale"] = out_scale.data_ptr()
        d = Guarded(m, n, dtype, pitch=n + chance.choice((0, 0, 1, 8)), offset=chance.choice((0, 0, 0, 1)))
        gemm(a, b, d, config, scale_m, scale_n, bias, **options)
        want = reference.int8_matmul(
            a, b, scale_m, scale_n, bias, dtype, activation, residual, out_scale if dtype == torch.int8 else None
        )
        where = f"shape {number}: config {config}, M, N, K = {m}, {n}, {k}, {dtype}, {activation}, {options}"
        verdicts.add(equal_bits(d.value, want), where)
        if number % 8 == 0:  # as slow as all of the rest
            verdicts.add(d.untouched_outside(), f"outside of {where}")
    verdicts.check()


def random_floats(chance: random.Random, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Gaussian rows of very different sizes; now and then one that is zero, holds NaN or ±inf, or one large value."""
    dtype = chance.choice(FLOATS)
    x = torch.randn(shape, device=device) * 10 ** chance.uniform(-4, 3)
    if chance.random() < 0.3:
        special = chance.choice((0.0, torch.nan, torch.inf, -torch.inf, 60_000.0))
        row, columns = chance.randrange(shape[0]), slice(None) if special == 0 else chance.randrange(shape[1])
        x[row, columns] = special
    return x.to(dtype)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_quantizations_give_the_reference_s_bits(device: str):
    chance, verdicts = random.Random(9), Verdicts()
    scales = torch.rand(30_000, device=device) * 0.05 + 1e-3
    for number in range(SHAPES // (1 if device == "cuda" else 5)):
        m, k = random_size(chance, 60), random_size(chance, 12_000 if device == "cuda" else 900)
        x = random_floats(chance, (m, k), device)
        size, axis = chance.choice(((None, 0), (1, 0), (m, 0), (k, -1)))
        scale = None if size is None else scales[number : number + size]
        where = f"shape {number}: M, K = {m}, {k}, {x.dtype}, {size} scales along {axis}"
        q, used = ops.quantize(x, scale, axis)
        want, wanted = reference.quantize(x, scale, axis)
        verdicts.add((q == want).all() & equal_bits(used, wanted), where)
    verdicts.check()


def check_random_layers(device: str, shapes: int, most: tuple[int, int, int]) -> None:
    chance, verdicts = random.Random(7), Verdicts()
    pool = Pool(device, 1 << 22)
    for number in range(shapes):
        m, n, k = (random_size(chance, size) for size in most)
        x = random_floats(chance, (m, k), device)
        weight = ops.pad_weight(pool.matrix(chance, n, k))
        scale = torch.rand(n, device=device) * 0.01
        bias = torch.randn(n, device=device).to(chance.choice(FLOATS)) if chance.random() < 0.5 else None
        where = f"shape {number}: M, N, K = {m}, {n}, {k}, {x.dtype}"
        got = ops.int8_linear(x, weight, scale, bias)
        verdicts.add(equal_bits(got, reference.int8_linear(x, weight[:, :k], scale, bias)), where)
    verdicts.check()


@pytest.mark.gpu
def test_random_layers_give_the_reference_s_bits():
    check_random_layers("cuda", SHAPES // 4, (500, 900, 3000))


def test_random_layers_on_the_cpu_give_the_reference_s_bits():
    """Both through the layer and, for the raw sums, through the product alone."""
    check_random_layers("cpu", SHAPES // 4, (40, 70, 300))
    chance, pool = random.Random(8), Pool("cpu", 1 << 20)
    for number in range(SHAPES):
        m, n, k = (random_size(chance, most) for most in (33, 50, 200))
        a, b = pool.matrix(chance, m, k), pool.matrix(chance, n, k)
        assert torch.equal(ops.int8_matmul(a, b), exact(a, b)), f"shape {number}: {m}, {n}, {k}"


# ---- the same bits in every run --------------------------------------------------------------------------------------


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (16, 512, 14336), (130, 257, 4095), (700, 1100, 900)])
def test_hundred_runs_give_the_same_bits(config: int, m: int, n: int, k: int):
    a, b = random_int8(m, k), random_int8(n, k)
    scale_m, scale_n = torch.rand(m, device="cuda"), torch.rand(n, device="cuda")
    d = torch.full((RUNS, m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
    for i in range(RUNS):
        out = Guarded.__new__(Guarded)
        out.matrix, out.pitch, out.body = d[i], n, d[i].view(-1)
        gemm(a, b, out, config, scale_m, scale_n)
    bits = d.view(torch.int16)
    assert bool((bits == bits[0]).all())
    assert same_bits(d[0], reference.int8_matmul(a, b, scale_m, scale_n, None, torch.bfloat16))


# ---- launches in flight ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@all_configs
def test_two_streams_with_products_of_their_own(config: int):
    """Different shapes, so that nothing that two launches might share could be right by chance."""
    problems = [(random_int8(65, 2000), random_int8(700, 2000)), (random_int8(40, 3000), random_int8(900, 3000))]
    wanted = [exact(a, b) for a, b in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(RUNS // 4 + 1):
        for stream, (a, b), kept in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(ops.int8_matmul(a, b, config=config))
    torch.cuda.synchronize()
    for want, kept in zip(wanted, results, strict=True):
        assert all(torch.equal(got, want) for got in kept)


def captured(call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    call()  # everything lazy happens before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
def test_a_graph_sees_inputs_that_changed_after_the_capture(config: int):
    m, n, k = 33, 200, 700
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = ops.pad_weight(random_int8(n, k)), torch.rand(n, device="cuda")
    graph, y = captured(lambda: ops.int8_linear(x, weight, scale, config=config))
    for _ in range(2 if REDUCED else 10):
        x.normal_()
        weight[:, :k] = random_int8(n, k)
        graph.replay()
        assert same_bits(y, reference.int8_linear(x, weight[:, :k], scale))


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("m", [3, 130])
def test_layers_that_feed_each_other_wait_for_each_other(config: int, m: int):
    """Launches may overlap: each layer reads what the one before wrote a moment ago, in memory that is used again."""
    k = 512  # a multiple of 16: no padding, so the weight is one for both
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    layers = [(ops.pad_weight(random_int8(k, k)), torch.rand(k, device="cuda") * 1e-3) for _ in range(4)]
    rounds = 1 if REDUCED else 5

    def run(linear: Callable[..., torch.Tensor]) -> torch.Tensor:
        y = x
        for weight, scale in layers * rounds:
            y = linear(y, weight, scale)
            y = linear(y, weight, scale)
            y = y.clamp(-3, 3) + x  # torch's own kernels in between
        return y

    graph, y = captured(lambda: run(functools.partial(ops.int8_linear, config=config)))
    for _ in range(2 if REDUCED else 10):
        x.normal_()
        graph.replay()
        assert same_bits(y, run(reference.int8_linear))


@pytest.mark.gpu
@all_configs
def test_operands_made_by_the_kernel_before_are_waited_for(config: int):
    """Both operands of int8_matmul, weights too, may be the output of the launch just before."""
    source_a, source_b = random_int8(70, 512), random_int8(300, 512)
    want = exact(source_a, source_b)

    def run() -> torch.Tensor:
        a, b = torch.zeros_like(source_a), torch.zeros_like(source_b)
        a.copy_(source_a)
        b.copy_(source_b)
        return ops.int8_matmul(a, b, config=config)

    graph, d = captured(lambda: torch.stack([run() for _ in range(RUNS // 5)]))
    graph.replay()
    assert bool((d == want).all())
