"""The options of the GEMM's epilogue: activation, residual, int8 output; every config, both devices, gradients.

The maths is ``reference.int8_matmul``. Without gelu and silu the results have its bits. With them:

- an activation is within ``ulps`` = 2 (CUDA; GELU: 4) or 4 (CPU, torch's) units of float32 of ``|y|``, y its input;
- the sum with the residual is rounded once in float32 (½ ulp), the output once to its type (½ ulp of that type).
"""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from kernel_helpers import FLOATS, REDUCED, Guarded, equal_bits, gemm, random_int8, same_bits
from test_gemm import all_configs
from torch import Tensor

from hwkern import ops, reference

ACTIVATIONS = list(ops.ACTIVATIONS)
BIT_EXACT = ("none", "relu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ULPS = {"cpu": 4, "cuda": 4}


class Case:
    """A problem whose inputs of the activation spread over about [-6, 6], where activations bend."""

    def __init__(self, m: int, n: int, k: int, device: str, residual: torch.dtype | None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(device)

        def integers(*shape: int) -> Tensor:
            return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).to(device)

        self.a, self.b = integers(m, k), integers(n, k)
        self.scale_a = (random(m) + 0.5) * (2.5 / (74 * 74 * math.sqrt(k)))  # 74: the deviation of an int8
        self.scale_b = random(n) + 0.5
        self.bias = random(n) - 0.5
        self.residual = None if residual is None else (random(m, n) * 4 - 2).to(residual)
        self.out_scale = torch.tensor(0.03, device=device)

    def run(self, activation: str, out_dtype: torch.dtype, config: int = ops.CHOOSE) -> Tensor:
        out_scale = self.out_scale if out_dtype == torch.int8 else None
        return ops.int8_matmul(
            self.a, self.b, self.scale_a, self.scale_b, self.bias, out_dtype, config, activation, self.residual,
            out_scale,
        )  # fmt: skip

    @functools.cache  # noqa: B019  # cases are few; to compute what is expected takes ten times a launch and its check
    def expect(self, activation: str, out_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What a result must be: the value, whose bits it must have when there is no second, its largest distance."""
        if activation in BIT_EXACT:
            out_scale = self.out_scale if out_dtype == torch.int8 else None
            return reference.int8_matmul(
                self.a, self.b, self.scale_a, self.scale_b, self.bias, out_dtype, activation, self.residual, out_scale
            ), None  # fmt: skip
        y = reference.int8_matmul(self.a, self.b, self.scale_a, self.scale_b, self.bias).double()
        exact = exact_activation(y, activation)
        if self.residual is not None:
            exact = exact + self.residual.double()
        # One more unit of 2⁻²³ (both ½ ulp of the float32 sum and what is left of the second order).
        error = 2.0**-23 * (ULPS[y.device.type] * y.abs() + exact.abs())
        if out_dtype == torch.int8:
            scaled = (exact / self.out_scale.double()).clamp(-127, 127)
            # Two more roundings, of 1 / out_scale and of the product: 2⁻²³ of the value together; and to an integer.
            return scaled, 0.5 + error / self.out_scale.double() + 2.0**-23 * scaled.abs()
        if out_dtype != torch.float32:
            info = torch.finfo(out_dtype)
            exponent = (exact.abs() + error).clamp_min(info.tiny).log2().floor()
            error = error + 0.5 * 2.0 ** (exponent + math.log2(info.eps))
        return exact, error

    def right(self, got: Tensor, activation: str, out_dtype: torch.dtype) -> Tensor:
        """A bool on the device."""
        want, error = self.expect(activation, out_dtype)
        return equal_bits(got, want) if error is None else ((got.double() - want).abs() <= error).all()

    def check(self, got: Tensor, activation: str, out_dtype: torch.dtype) -> None:
        assert bool(self.right(got, activation, out_dtype))


@functools.cache
def case(m: int, n: int, k: int, device: str, residual: torch.dtype | None) -> Case:
    """The same for all configs."""
    return Case(m, n, k, device, residual, seed=m)


@functools.cache
def padded_rows(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of the case, their rows padded with garbage."""
    a, b = random_int8(m, k), random_int8(n, k)
    same = case(m, n, k, "cuda", None)
    a.copy_(same.a), b.copy_(same.b)
    return a, b


def exact_activation(y: Tensor, activation: str) -> Tensor:
    """In float64; torch's own functions, so that a slip in reference.py would show."""
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.int8], ids=str)
def test_every_combination(device: str, activation: str, out_dtype: torch.dtype):
    for residual in (None, *FLOATS):
        same = case(37, 72, 200, device, residual)
        same.check(same.run(activation, out_dtype), activation, out_dtype)


def test_the_reference_s_activations_are_torch_s():
    y = torch.linspace(-20, 20, 10001)
    for activation in ACTIVATIONS:
        if activation not in BIT_EXACT:
            error = reference.activate(y, activation) - exact_activation(y.double(), activation)
            assert bool((error.abs() <= 2.0**-24 * y.abs()).all())  # ½ ulp
    assert torch.equal(reference.activate(y, "relu"), torch.relu(y))


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.int8], ids=str)
def test_all_configs_and_nothing_else_is_written(config: int, out_dtype: torch.dtype):
    """Tails in M and N, odd N (no 16-byte vectors), rows of D and of the residual that are longer than N."""
    shapes = [(5, 40, 65), (130, 257, 300)]
    if not REDUCED:
        shapes += [(1, 8, 16), (17, 7, 64), (129, 136, 4096), (300, 520, 1000)]
    for m, n, k in shapes:
        found: dict[str, Tensor] = {}
        for activation in ("relu", "gelu") if REDUCED else ACTIVATIONS:
            for residual, pad in ((None, 0), (torch.bfloat16, 0), (torch.float16, 8), (torch.float32, 3)):
                same = case(m, n, k, "cuda", residual)
                d = Guarded(m, n, out_dtype, pitch=n + pad)
                options = {"activation": ops.ACTIVATIONS[activation]}
                if residual is not None:
                    wide = torch.full((m, n + pad), math.nan, dtype=residual, device="cuda")
                    wide[:, :n] = same.residual
                    options |= {"residual": wide.data_ptr(), "ldr": n + pad, "residual_dtype": ops.DTYPES[residual]}
                if out_dtype == torch.int8:
                    options["d_scale"] = same.out_scale.data_ptr()
                a, b = padded_rows(m, n, k)
                gemm(a, b, d, config, same.scale_a, same.scale_b, same.bias, **options)
                found[f"{activation}, residual {residual}: value"] = same.right(d.value, activation, out_dtype)
                found[f"{activation}, residual {residual}: outside"] = d.untouched_outside()
        right = torch.stack(list(found.values())).tolist()  # one wait for all: each takes as long as a case
        assert all(right), ((m, n, k), [what for what, fine in zip(found, right, strict=True) if not fine])


@pytest.mark.gpu
@all_configs
def test_same_bits_in_every_run_and_on_every_tile(config: int):
    same = case(700, 1500, 512, "cuda", torch.bfloat16)
    first = same.run("gelu", torch.bfloat16, config)
    same.check(first, "gelu", torch.bfloat16)
    for _ in range(20):
        assert same_bits(same.run("gelu", torch.bfloat16, config), first)


@pytest.mark.parametrize("device", DEVICES)
def test_special_values_pass_through(device: str):
    """NaN, inf and 1e30 stay, -1e30 becomes 0, as does relu(-inf); NaN and saturation in an int8 output."""
    a = torch.ones(1, 16, dtype=torch.int8, device=device)
    b = torch.ones(5, 16, dtype=torch.int8, device=device)
    bias = torch.tensor([math.nan, 1e30, -math.inf, -1e30, math.inf], device=device)
    for activation in ACTIVATIONS:
        y = ops.int8_matmul(a, b, bias=bias, activation=activation)[0]
        assert bool(y[0].isnan()), activation
        assert float(y[1]) == float(bias[1]), activation
        assert activation == "none" or float(y[3]) == 0, activation
        assert float(y[4]) == math.inf, activation
    assert float(ops.int8_matmul(a, b, bias=bias, activation="relu")[0, 2]) == 0
    one = torch.ones(1, device=device)
    q = ops.int8_matmul(a, b, bias=bias, out_dtype=torch.int8, out_scale=one)
    assert q.tolist() == [[0, 127, -127, -127, 127]]
    assert ops.int8_matmul(a, b, out_dtype=torch.int8, out_scale=one * math.nan).tolist() == [[0, 0, 0, 0, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_linear_applies_both(device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 70, generator=generator).to(device, dtype)
    q = torch.randint(-127, 128, (24, 70), dtype=torch.int8, generator=generator).to(device)
    scale, bias = (torch.rand(24, generator=generator) / 500).to(device), torch.randn(24, device=device)
    wide = torch.randn(2, 5, 48, device=device).to(dtype)
    for residual in (None, wide[..., :24].contiguous(), wide[..., ::2]):
        got = ops.int8_linear(x, ops.pad_weight(q), scale, bias, activation="relu", residual=residual)
        want = reference.int8_linear(x, q, scale, bias, activation="relu", residual=residual)
        assert same_bits(got, want)
    got = ops.int8_linear(x, ops.pad_weight(q), scale, bias, torch.float32, activation="silu")
    y = reference.int8_linear(x, q, scale, bias, torch.float32).double()
    assert bool(((got.double() - exact_activation(y, "silu")).abs() <= ULPS[device] * 2.0**-23 * y.abs()).all())
    assert ops.int8_linear(x[:, :0], ops.pad_weight(q), scale, activation="gelu").shape == (2, 0, 24)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_are_those_of_the_dequantized_layer(device: str, activation: str, with_residual: bool):
    """Against float64 autograd through the same float layer, its activation taken at the int8 layer's own y.

    float32 throughout: a product of 24 terms and the derivative, each good to a few 2⁻²⁴.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 70, generator=generator).to(device).requires_grad_()
    q = torch.randint(-127, 128, (24, 70), dtype=torch.int8, generator=generator).to(device)
    scale = (torch.rand(24, generator=generator) / 500).to(device)
    bias = torch.randn(24, generator=generator).to(device).requires_grad_()
    residual = torch.randn(6, 24, generator=generator).to(device).requires_grad_() if with_residual else None
    grad = torch.randn(6, 24, generator=generator).to(device)

    y = ops.int8_linear(x, ops.pad_weight(q), scale, bias, activation=activation, residual=residual)
    inputs = [x, bias] + ([residual] if residual is not None else [])
    got = torch.autograd.grad(y, inputs, grad)

    at = reference.int8_linear(x.detach(), q, scale, bias.detach()).double().requires_grad_()
    if activation == "none":
        (slope,) = torch.autograd.grad(at * 1, at, grad.double())
    else:
        value = torch.relu(at) if activation == "relu" else exact_activation(at, activation)
        (slope,) = torch.autograd.grad(value, at, grad.double())
    want = [slope @ (q.double() * scale.double()[:, None]), slope.sum(0), grad.double()]
    for left, right in zip(got, want, strict=False):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_well_formed(device: str):
    ns = torch.ops.hwkern
    x = torch.randn(3, 5, 70, device=device)
    weight = torch.randint(-127, 128, (8, 80), dtype=torch.int8, device=device)
    scale, bias = torch.rand(8, device=device), torch.randn(8, device=device, requires_grad=True)
    residual = torch.randn(3, 5, 8, device=device, requires_grad=True)
    torch.library.opcheck(ns.int8_linear.default, (x.requires_grad_(), weight, scale, bias, None, -1, "gelu", residual))
    q = torch.randint(-127, 128, (3, 5, 80), dtype=torch.int8, device=device)
    torch.library.opcheck(
        ns.int8_matmul.default,
        (q, weight, None, scale, None, torch.int8, -1, "silu", residual.detach(), torch.ones(1, device=device)),
    )
    compiled = torch.compile(lambda t: ops.int8_linear(t, weight, scale, None, None, -1, "relu"), backend="aot_eager")
    assert torch.equal(compiled(x.detach()), ops.int8_linear(x.detach(), weight, scale, activation="relu"))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_sets_the_output_and_leaves_the_residual(device: str):
    x = torch.randn(4, 64, device=device)
    weight = torch.randint(-127, 128, (8, 64), dtype=torch.int8, device=device)
    scale, residual = torch.rand(8, device=device) / 500, torch.randn(4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.int8_linear(x, weight, scale, activation="relu", residual=residual)
    assert same_bits(y, ops.int8_linear(x, weight, scale, None, torch.bfloat16, -1, "relu", residual))


@pytest.mark.parametrize("device", DEVICES)
def test_bad_options_are_refused_with_a_sentence(device: str):
    q = torch.ones(4, 16, dtype=torch.int8, device=device)
    one = torch.ones(1, device=device)
    residual = torch.zeros(4, 4, device=device)
    with pytest.raises(ValueError, match=re.escape("activation = 'tanh': hwkern knows 'none', 'relu'")):
        ops.int8_matmul(q, q, activation="tanh")
    with pytest.raises(ValueError, match=r"residual has shape \(4, 3\)"):
        ops.int8_matmul(q, q, residual=residual[:, :3])
    with pytest.raises(TypeError, match=r"residual is torch\.int8"):
        ops.int8_matmul(q, q, residual=q[:, :4])
    with pytest.raises(ValueError, match="raw sum"):
        ops.int8_matmul(q, q, out_dtype=torch.int32, activation="relu")
    with pytest.raises(ValueError, match="raw sum"):
        ops.int8_matmul(q, q, out_dtype=torch.int32, residual=residual)
    with pytest.raises(ValueError, match=r"out_scale comes with torch\.int8"):
        ops.int8_matmul(q, q, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"out_scale comes with torch\.int8"):
        ops.int8_matmul(q, q, out_dtype=torch.float32, out_scale=one)
    with pytest.raises(ValueError, match="out_scale has 2 elements"):
        ops.int8_matmul(q, q, out_dtype=torch.int8, out_scale=torch.ones(2, device=device))
    with pytest.raises(TypeError, match=r"out_scale is torch\.float64"):
        ops.int8_matmul(q, q, out_dtype=torch.int8, out_scale=one.double())
    y = ops.int8_matmul(q, q, residual=residual.requires_grad_())
    with pytest.raises(NotImplementedError, match="int8_matmul has no gradient"):
        y.sum().backward()


@pytest.mark.gpu
def test_the_kernels_refuse_bad_options_with_a_sentence():
    a, b = random_int8(4, 32), random_int8(8, 32)
    residual = torch.zeros(4, 8, device="cuda")
    d = Guarded(4, 8, torch.float32)
    for match, options in (
        ("unknown activation", {"activation": 5}),
        ("leading dimension", {"residual": residual.data_ptr(), "ldr": 7}),
        ("residual must be", {"residual": residual.data_ptr(), "ldr": 8, "residual_dtype": 3}),
        ("not aligned", {"residual": residual.data_ptr() + 2, "ldr": 8}),
        ("int8 D needs d_scale", {"d_scale": residual.data_ptr()}),
    ):
        with pytest.raises(ValueError, match=match):
            gemm(a, b, d, ops.CHOOSE, **options)
    with pytest.raises(ValueError, match="int8 D needs d_scale"):
        gemm(a, b, Guarded(4, 8, torch.int8), ops.CHOOSE)
    with pytest.raises(ValueError, match="raw sum"):
        gemm(a, b, Guarded(4, 8, torch.int32), ops.CHOOSE, activation=1)
