"""What test_gemm_stress.py does with products, with all else: linears in one launch, weight-only linears, fused
kernels, embeddings. All M of a decode batch, 10⁴ random shapes of each against reference.py, the same bits in 100 runs,
streams that run at once, and graphs that are replayed after their inputs changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_one_launch as one_launch
import test_weight_only as weight_only
import torch
from kernel_helpers import FLOATS, REDUCED, Guarded, Verdicts, equal_bits, same_bits
from test_fused import assert_activation
from test_gemm_stress import MOST, RUNS, SHAPES, Pool, captured, random_floats, random_size
from torch import Tensor

from hwkern import ops, reference
from hwkern._fused_linear import activation_linear, norm_linear

# ---- every M ---------------------------------------------------------------------------------------------------------

# (N, K): tails in both; more than a tile, K past a buffer; K as long as one launch takes.
LAYERS = [(72, 17), (264, 257), (300, 768)]
EVERY_M = range(1, MOST + 1, 43 if REDUCED else 1)


@pytest.mark.gpu
@one_launch.all_configs
def test_every_m_in_one_launch(config: int):
    verdicts = Verdicts()
    for n, k in LAYERS:
        x = torch.randn(MOST, k, device="cuda", dtype=torch.bfloat16)
        weight, scale = one_launch.packed(n, k)
        want = reference.int8_linear(x, weight[:, :k], scale)  # rows are quantized each for itself
        for m in EVERY_M:
            y = Guarded(m, n, torch.bfloat16)
            one_launch.linear(x[:m], weight, scale, None, y, config, constant=m % 2 == 0)
            verdicts.add(equal_bits(y.value, want[:m]) & y.untouched_outside(), f"M, N, K = {m}, {n}, {k}")
    verdicts.check()


@pytest.mark.gpu
@weight_only.all_configs
def test_every_m_weight_only(config: int):
    verdicts = Verdicts()
    for n, k in LAYERS:
        x, weight, scale = weight_only.inputs(MOST, n, k)
        for m in EVERY_M:
            y = Guarded(m, n, torch.bfloat16)
            weight_only.call(x[:m], weight, scale, y, config)
            near = weight_only.within_bound(y.value, x[:m], weight, scale, None).all()
            verdicts.add(near & y.untouched_outside(), f"M, N, K = {m}, {n}, {k}")
    verdicts.check()


# ---- random shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_random_linears_in_one_launch_give_the_reference_s_bits():
    chance, pool, verdicts = random.Random(4), Pool("cuda", 1 << 22), Verdicts()
    for number in range(SHAPES):
        config = chance.choice(one_launch.RUNNABLE)
        m, n, k = (random_size(chance, most) for most in (700, 900, min(config["max_k"], 2000)))
        x = random_floats(chance, (m, k), "cuda")
        weight = ops.pad_weight(pool.matrix(chance, n, k))
        scale = torch.rand(n, device="cuda") * 0.01
        bias = torch.randn(n, device="cuda").to(chance.choice(FLOATS)) if chance.random() < 0.5 else None
        y = Guarded(m, n, chance.choice(FLOATS), pitch=n + chance.choice((0, 0, 1, 8)), offset=chance.choice((0, 1)))
        one_launch.linear(x, weight, scale, bias, y, config["id"], constant=chance.random() < 0.5)
        want = reference.int8_linear(x, weight[:, :k], scale, bias, y.matrix.dtype)
        where = f"shape {number}: config {config['id']}, M, N, K = {m}, {n}, {k}, {x.dtype}"
        verdicts.add(equal_bits(y.value, want), where)
        if number % 8 == 0:  # as slow as all of the rest
            verdicts.add(y.untouched_outside(), f"outside of {where}")
    verdicts.check()


@pytest.mark.gpu
def test_random_weight_only_linears_are_within_their_bound():
    chance, pool, verdicts = random.Random(3), Pool("cuda", 1 << 24), Verdicts()
    for number in range(SHAPES):
        config = chance.choice(weight_only.RUNNABLE)["id"]
        m, n, k = (random_size(chance, most) for most in (130, 700, 5000))
        x = (torch.randn(m, k, device="cuda") * 10 ** chance.uniform(-3, 1)).to(chance.choice(weight_only.HALVES))
        weight, scale = pool.matrix(chance, n, k), torch.rand(n, device="cuda") * 0.01 + 1e-4
        bias = torch.randn(n, device="cuda").to(chance.choice(FLOATS)) if chance.random() < 0.5 else None
        options = {"activation": chance.choice(weight_only.ACTIVATIONS), "residual": None}
        if chance.random() < 0.3:
            options["residual"] = torch.randn(m, n, device="cuda").to(chance.choice(FLOATS))
        y = Guarded(m, n, chance.choice(FLOATS), pitch=n + chance.choice((0, 0, 1, 8)))
        weight_only.call(x, weight, scale, y, config, bias, **options)
        where = f"shape {number}: config {config}, M, N, K = {m}, {n}, {k}, {x.dtype}"
        verdicts.add(weight_only.within_bound(y.value, x, weight, scale, bias, **options).all(), where)
        if number % 8 == 0:
            verdicts.add(y.untouched_outside(), f"outside of {where}")
    verdicts.check()


def shapes_on(device: str) -> int:
    return SHAPES if device == "cuda" else SHAPES // 10


def test_random_norms_and_activations_give_the_reference_s_bits(device: str):
    """(gelu and silu have a bound instead: every hundredth shape, because assert_activation waits for each.)"""
    chance, verdicts = random.Random(5), Verdicts()
    for number in range(shapes_on(device)):
        m, k = random_size(chance, 40), random_size(chance, 6000)
        m = max(1, min(m, (1 << 15) // k))
        dtype, static = chance.choice(FLOATS), chance.random() < 0.3
        scale = torch.full((1,), 10 ** chance.uniform(-3, 0), device=device) if static else None
        x = (torch.randn(m, k, device=device) * 2 ** chance.uniform(-10, 8)).to(dtype)
        other = torch.randn(m, k, device=device).to(dtype) if chance.random() < 0.5 else None
        where = f"shape {number}: M, K = {m}, {k}, {dtype}"
        if number % 100 == 0:
            on_cpu = [None if t is None else t.cpu() for t in (other, scale)]
            assert_activation(device, x.cpu(), on_cpu[0], chance.choice(("gelu", "gelu_tanh", "silu")), on_cpu[1])
        elif chance.random() < 0.4:
            name = chance.choice(("none", "relu"))
            q, used = ops.activation_quantize(x, other, scale, name)
            want, wanted = reference.activation_quantize(x, other, name, scale)
            verdicts.add(equal_bits(q, want) & equal_bits(used, wanted), f"{where}, {name}")
        else:
            kind = chance.choice(list(ops.NORMS))
            weight, bias = (
                torch.randn(k, device=device).to(chance.choice(FLOATS)) if wanted and chance.random() < 0.8 else None
                for wanted in (True, kind == "layer")
            )
            options = {"kind": kind, "eps": chance.choice((0.0, 1e-6, 1e-2)), "offset": chance.choice((0.0, 1.0))}
            got = ops.norm_quantize(x, weight, bias, other, scale, return_y=True, **options)
            want, wanted, h, y = reference.norm_quantize(x, weight, bias, other, scale, **options)
            verdict = equal_bits(got.q, want) & equal_bits(got.scale, wanted) & equal_bits(got.y, y)
            verdicts.add(verdict if got.h is None else verdict & equal_bits(got.h, h), f"{where}, {options}")
    verdicts.check()


def test_random_fused_linears_give_the_reference_s_bits(device: str):
    """norm_linear and activation_linear (relu: the others' bits are not given), their residuals and gates."""
    chance, pool, verdicts = random.Random(6), Pool(device, 1 << 22), Verdicts()
    with torch.inference_mode():
        for number in range(shapes_on(device)):
            m, n, k = (random_size(chance, most) for most in (130, 300, 900))
            if device == "cpu":
                m = min(m, 20)
            dtype, gated = chance.choice(FLOATS), chance.random() < 0.5
            weight = ops.pad_weight(pool.matrix(chance, n, k))
            scale = torch.rand(n, device=device) * 0.01
            bias = torch.randn(n, device=device).to(dtype) if chance.random() < 0.5 else None

            def rand(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, device=device).to(dtype)

            where = f"shape {number}: M, N, K = {m}, {n}, {k}, {dtype}"
            if chance.random() < 0.5:
                x, residual = rand(m, 2 * k if gated else k), rand(m, n) if chance.random() < 0.5 else None
                y = activation_linear(x, weight, scale, bias, "relu", gated, residual)
                inner = reference.gated_activation(x[:, :k], x[:, k:] if gated else None, "relu")
                want = reference.int8_linear(inner, weight[:, :k], scale, bias, dtype, residual=residual)
            else:
                x, residual = rand(m, k), rand(m, k) if chance.random() < 0.5 else None
                kind, norm_weight = chance.choice(list(ops.NORMS)), rand(k)
                norm_bias = rand(k) if kind == "layer" else None
                y, h = norm_linear(x, weight, scale, bias, norm_weight, norm_bias, kind, residual=residual)
                inner, sums = reference.norm(x, norm_weight, norm_bias, residual, kind)
                if residual is not None:
                    verdicts.add(equal_bits(h, sums), f"the sums of {where}")
                want = reference.int8_linear(inner, weight[:, :k], scale, bias)
            verdicts.add(equal_bits(y, want), where)
    verdicts.check()


def test_random_lookups_give_the_reference_s_bits(device: str):
    chance, pool, verdicts = random.Random(10), Pool(device, 1 << 22), Verdicts()
    scales = torch.randn(4000, device=device) * 0.01
    for number in range(shapes_on(device)):
        tokens, rows, h = (random_size(chance, most) for most in (600, 3000, 3000))
        rows, tokens = max(1, min(rows, (1 << 21) // h)), max(1, min(tokens, (1 << 19) // h))
        packed = pool.matrix(chance, rows, ops.padded(h))  # what the padding holds is nobody's business
        weight = packed[:, :h]
        indices = torch.randint(0, rows, (tokens,), device=device)
        indices = indices.to(chance.choice((torch.int32, torch.int64)))
        dtype, scale = chance.choice(FLOATS), scales[number % 1000 : number % 1000 + rows]
        y = ops.int8_embedding(indices, packed, scale, dtype, h)
        want = reference.int8_embedding(indices, weight, scale, dtype)
        verdicts.add(equal_bits(y, want), f"shape {number}: {tokens} of {rows}×{h}, {dtype}")
    verdicts.check()


# ---- the same bits in every run, streams at once, graphs whose inputs changed --------------------------------------


@dataclass
class Case:
    """One kind of launch with inputs of its own."""

    change: Callable[[], object]  #: other inputs, in the same memory
    call: Callable[[], Tensor]
    check: Callable[[Tensor], object]  #: raises AssertionError where a result is not that of the inputs of now


Maker = Callable[[str, int], Case]  # device and a number that makes inputs and shapes differ


def linear_case(config: int) -> Maker:
    def make(device: str, number: int) -> Case:
        m, n, k = 133 + 60 * number, 520 - 8 * number, 400 + 16 * number
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        weight, scale = ops.quantize(torch.randn(n, k, device=device))

        def check(y: Tensor) -> None:
            assert same_bits(y, reference.int8_linear(x, weight, scale))

        return Case(x.normal_, lambda: ops.int8_linear(x, weight, scale, config=config), check)

    return make


def weight_only_case(config: int) -> Maker:
    def make(device: str, number: int) -> Case:
        m, n, k = 5 + 30 * number, 1000 + 72 * number, 2064 - 500 * number
        x = torch.randn(m, k, device=device, dtype=torch.float16)
        weight, scale = reference.quantize(torch.randn(n, k, device=device))
        packed, y = ops.pad_weight(weight), torch.empty(m, n, device=device)

        def call() -> Tensor:
            if device == "cpu":
                return ops.weight_only_linear(x, packed, scale, out_dtype=torch.float32)
            weight_only.call(x, packed[:, :k], scale, y, config)
            return y.clone()

        return Case(x.normal_, call, lambda got: weight_only.assert_close(got, x, weight, scale))

    return make


def fused_case(kind: str) -> Maker:
    def make(device: str, number: int) -> Case:
        m, n, k = 70 + 100 * number, 300, 776 + 8 * number
        x = torch.randn(m, 2 * k if kind == "activation" else k, device=device, dtype=torch.bfloat16)
        weight, scale = ops.quantize(torch.randn(n, k, device=device))
        packed, gain = ops.pad_weight(weight), torch.randn(k, device=device, dtype=torch.bfloat16)

        def call() -> Tensor:
            with torch.inference_mode():
                if kind == "activation":
                    return activation_linear(x, packed, scale, None, "relu", gated=True)
                return norm_linear(x, packed, scale, None, gain, residual=x)[0]

        def check(y: Tensor) -> None:
            if kind == "activation":
                inner = reference.gated_activation(x[:, :k], x[:, k:], "relu")
            else:
                inner = reference.norm(x, gain, residual=x)[0]
            assert same_bits(y, reference.int8_linear(inner, weight, scale))

        return Case(x.normal_, call, check)

    return make


def lookup_case(device: str, number: int) -> Case:
    weight, scale = ops.quantize(torch.randn(900, 512 + 96 * number, device=device))
    indices = torch.randint(0, 900, (333,), device=device)

    def check(y: Tensor) -> None:
        assert same_bits(y, reference.int8_embedding(indices, weight, scale, torch.bfloat16))

    return Case(
        lambda: indices.random_(0, 900), lambda: ops.int8_embedding(indices, weight, scale, torch.bfloat16), check
    )


CASES: dict[str, Maker] = {
    **{row["name"]: linear_case(row["id"]) for row in one_launch.RUNNABLE},
    **{row["name"]: weight_only_case(row["id"]) for row in weight_only.RUNNABLE},
    "activation_linear": fused_case("activation"),
    "norm_linear": fused_case("norm"),
    "lookup": lookup_case,
}
cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)


@cases
def test_results_follow_the_inputs_in_every_run(make: Maker, device: str):
    case = make(device, 0)
    for _ in range(2):
        case.change()
        first = case.call()
        case.check(first)
        for _ in range(RUNS if device == "cuda" else 2):
            assert same_bits(case.call(), first)


@pytest.mark.gpu
@cases
def test_two_streams_with_calls_of_their_own(make: Maker):
    """Different shapes, so that nothing that two launches might share could be right by chance."""
    both = [make("cuda", number) for number in range(2)]
    streams = [torch.cuda.Stream() for _ in both]
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(RUNS // 4 + 1):
        for stream, case, kept in zip(streams, both, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(case.call())
    torch.cuda.synchronize()
    for case, kept in zip(both, results, strict=True):
        case.check(kept[0])
        assert all(same_bits(got, kept[0]) for got in kept)


@pytest.mark.gpu
@pytest.mark.sanitizer
@cases
def test_a_graph_sees_inputs_that_changed_after_the_capture(make: Maker):
    case = make("cuda", 1)
    graph, y = captured(case.call)
    for _ in range(3):
        case.change()
        graph.replay()
        case.check(y)
