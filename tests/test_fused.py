"""Norm + quantize and activation + quantize against reference.py, on the CPU and on CUDA.

The norm is exact to the bit, sums included, because their order is part of the contract. An activation is bounded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import FLOATS, REDUCED, Guarded, same_bits
from torch import Tensor

from hwkern import _native, ops, reference

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
kinds = pytest.mark.parametrize("kind", ops.NORMS)
activations = pytest.mark.parametrize("name", ops.ACTIVATIONS)

# K around a vector (4, 8), a warp's vectors (128, 256), four of those, a block's, and beyond what stays in registers.
K = [1, 264, 1030] if REDUCED else [1, 3, 8, 9, 256, 257, 768, 1025, 4096, 5000, 14336, 40000]


def batches(device: str, k: int) -> list[int]:
    """More rows than SMs take another launch shape than a few."""
    return [1, 6] if REDUCED else [1, 150] if device == "cuda" and k < 20000 else [1, 5]


def rand(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * spread).to(dtype)


def assert_norm(device: str, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """norm_quantize on the device has the bits of reference.py on the CPU."""

    def moved(t: Any) -> Any:
        # as_strided: .to() would make a view contiguous.
        if not isinstance(t, Tensor) or device == "cpu":
            return t
        base = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
        return base.as_strided(t.size(), t.stride(), t.storage_offset())

    q, scale, h, y = reference.norm_quantize(x, *args, **kwargs)
    got = ops.norm_quantize(moved(x), *map(moved, args), **{n: moved(t) for n, t in kwargs.items()}, return_y=True)
    assert got.y is not None
    assert same_bits(got.y.cpu(), y)
    assert torch.equal(got.q.cpu(), q)
    assert same_bits(got.scale.cpu(), scale)
    if got.h is not None:
        assert same_bits(got.h.cpu(), h)


@dtypes
@kinds
@pytest.mark.parametrize("k", K)
@pytest.mark.sanitizer
def test_norm_has_the_reference_s_bits(device: str, dtype: torch.dtype, kind: str, k: int):
    for m in batches(device, k):
        x, residual = rand(m, k, dtype=dtype, spread=3), rand(m, k, dtype=dtype)
        weight = rand(k, dtype=dtype)
        bias = rand(k, dtype=dtype) if kind == "layer" else None
        assert_norm(device, x, weight, bias, residual, kind=kind, eps=1e-5)
        assert_norm(device, x, weight, kind=kind)
    assert_norm(device, x, kind=kind, offset=3.0)  # without a weight there is nothing to offset
    assert_norm(device, x, weight, bias, residual, torch.tensor([0.02]), kind=kind, offset=1.0)


@dtypes
@kinds
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.sanitizer
def test_weights_of_every_dtype(device: str, dtype: torch.dtype, kind: str, weight_dtype: torch.dtype):
    for k in (40, 1000, 2048):
        weight, bias = rand(k, dtype=weight_dtype), rand(k, dtype=dtype)
        assert_norm(device, rand(3, k, dtype=dtype), weight, bias if kind == "layer" else None, kind=kind)


@dtypes
@kinds
def test_a_row_has_the_same_bits_in_every_batch(device: str, dtype: torch.dtype, kind: str):
    for k in (1000, 4096, 5000):
        x, weight = rand(150, k, dtype=dtype).to(device), rand(k, dtype=dtype).to(device)
        many = ops.norm_quantize(x, weight, kind=kind, return_y=True)
        for m in (0, 7, 149):
            one = ops.norm_quantize(x[m : m + 1], weight, kind=kind, return_y=True)
            assert torch.equal(one.y[0], many.y[m])
            assert torch.equal(one.q[0], many.q[m])


@dtypes
@kinds
@pytest.mark.parametrize("k", [1, 768, 4096])
def test_norm_is_the_model_s_own(device: str, dtype: torch.dtype, kind: str, k: int):
    """y against the same norm in float64, and torch's and transformers' modules against the same bound.

    u = 2⁻²⁴. The sum of squares: 2 roundings a square (of h - mean, of the product) and 14 + K/2¹² additions a term, so
    its relative error is below 20u here; r halves it and adds 3 (eps, root, quotient): 13u. Three products: 16u of
    |y - bias|, then the roundings to x's dtype: one, for rms_rounded two. mean: 15 additions and a product, 16u of
    mean |h|, which moves every h - mean. torch may sum in another order, but no longer chain: twice the bound is ample.
    """
    u, half_ulp, tiny = (
        2.0**-24,
        torch.finfo(dtype).eps / 2,
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
    )
    x, weight = rand(9, k, dtype=dtype, spread=2) + 0.5, rand(k, dtype=dtype)
    bias = rand(k, dtype=dtype) if kind == "layer" else None
    eps = 1e-5
    layer: torch.nn.Module
    if kind == "layer":
        assert bias is not None
        layer = torch.nn.LayerNorm(k, eps, dtype=dtype)
        layer.bias.data.copy_(bias)
    elif kind == "rms":
        layer = torch.nn.RMSNorm(k, eps, dtype=dtype)
    else:
        llama = pytest.importorskip("transformers.models.llama.modeling_llama")
        layer = llama.LlamaRMSNorm(k, eps).to(dtype)
    layer.weight.data.copy_(weight)
    h = x.double()
    mean = h.mean(-1, keepdim=True) if kind == "layer" else torch.zeros(9, 1, dtype=torch.float64)
    r = (((h - mean) ** 2).mean(-1, keepdim=True) + eps).rsqrt()
    product = (h - mean) * r * weight.double()
    want = product + (0 if bias is None else bias.double())
    moved = 16 * u * h.abs().mean(-1, keepdim=True) * r * weight.double().abs() if kind == "layer" else 0
    bound = 16 * u * product.abs() + moved
    # The mean's error enters the variance squared, and K = 1 gives h - mean = 0 exactly in every order.
    bound = bound + half_ulp * (want.abs() + (product.abs() if kind == "rms_rounded" else 0)) * (1 + 2**-6) + tiny
    with torch.inference_mode():
        got = ops.norm_quantize(
            x.to(device),
            weight.to(device),
            None if bias is None else bias.to(device),
            kind=kind,
            eps=eps,
            return_y=True,
        )
        theirs = layer.to(device)(x.to(device))
    assert bool(((got.y.cpu().double() - want).abs() <= bound).all())
    assert bool(((theirs.cpu().double() - want).abs() <= 2 * bound).all())
    # and what is quantized is that y, in the one formula that there is
    q, scale = reference.quantize(got.y.cpu())
    assert torch.equal(got.q.cpu(), q)
    assert torch.equal(got.scale.cpu(), scale)


@dtypes
def test_gemma_s_norm(device: str, dtype: torch.dtype):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    layer = gemma.GemmaRMSNorm(512, 1e-6).to(dtype)
    layer.weight.data.copy_(rand(512, spread=0.1))
    x = rand(20, 512, dtype=dtype)
    with torch.inference_mode():
        want = layer(x).double()
        got = ops.norm_quantize(x.to(device), layer.weight.data.to(device), offset=1.0, return_y=True).y
    # Each within half an ulp of x's dtype and 16 float32 roundings of the true value (see above), so twice that apart.
    bound = 2 * want.abs() * (torch.finfo(dtype).eps / 2 * (1 + 2**-6) + 16 * 2.0**-24) + 1e-7
    assert bool(((got.cpu().double() - want).abs() <= bound).all())


@dtypes
@kinds
@pytest.mark.parametrize("k", [5, 1000, 1024, 20000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.sanitizer
def test_nan_and_inf_stay_in_their_row(device: str, dtype: torch.dtype, kind: str, k: int, bad: float):
    x, residual = rand(4, k, dtype=dtype), rand(4, k, dtype=dtype)
    clean = ops.norm_quantize(x.to(device), residual=residual.to(device), kind=kind)
    for column in (0, k - 1):
        poisoned = x.clone()
        poisoned[2, column] = bad
        got = ops.norm_quantize(poisoned.to(device), residual=residual.to(device), kind=kind)
        # one NaN (h · r, or inf · 0) is enough
        assert got.scale[2].isnan()
        assert not got.q[2].any()
        others = [0, 1, 3]
        assert torch.equal(got.q[others], clean.q[others])
        assert torch.equal(got.scale[others], clean.scale[others])


@dtypes
@kinds
def test_zero_rows_one_element_and_extremes(device: str, dtype: torch.dtype, kind: str):
    info = torch.finfo(dtype)
    zeros = torch.zeros(3, 72, dtype=dtype)
    assert_norm(device, zeros, kind=kind)
    got = ops.norm_quantize(zeros.to(device), kind=kind)
    assert not got.q.any()
    assert bool((got.scale == reference.SCALE_MIN).all())
    assert ops.norm_quantize(zeros.to(device), kind=kind, eps=0.0).scale.isnan().all()  # 0 · (1 / 0), as in torch
    assert_norm(device, -zeros, kind=kind)
    assert_norm(device, torch.tensor([[2.5], [-0.25], [0.0]]).to(dtype), kind=kind)
    for size in (info.max, info.max / 4, info.smallest_normal, info.smallest_normal * info.eps, 1e-3):
        x = torch.tensor([[1.0, -0.5, 0.25, 0.125, -1.0] * 20]) * size
        assert_norm(device, x.to(dtype), kind=kind, eps=1e-30)
    # sums of squares beyond float32 give r = 0, and zeros, as torch does
    huge = torch.full((2, 64), 2.0**120).to(torch.float32)
    assert_norm(device, huge, kind=kind)


@dtypes
def test_any_strides_and_alignment(device: str, dtype: torch.dtype):
    base = rand(40, 521, dtype=dtype)
    for view in (base[:, 1:], base[::2], base[:, :400], base.t(), base[3:, 5:70], base.expand(2, 40, 521)):
        k = view.shape[-1]
        weight = rand(2 * k, dtype=dtype)[::2]
        assert_norm(device, view, weight, None, view, kind="rms_rounded")
        assert_norm(device, view, weight, weight, kind="layer")


def test_shapes_and_what_is_returned(device: str):
    x = rand(2, 3, 40).to(device)
    got = ops.norm_quantize(x)
    assert (got.q.shape, got.scale.shape, got.h, got.y) == (x.shape, (2, 3), None, None)
    scale = torch.tensor(0.1, device=device)
    got = ops.norm_quantize(x, residual=x, scale=scale, return_y=True)
    assert got.scale is scale
    assert got.h is not None
    assert torch.equal(got.h, x + x)
    assert got.y is not None
    assert got.y.shape == x.shape
    for result in (ops.norm_quantize(x[:0], residual=x[:0], return_y=True), ops.activation_quantize(x[:0], gated=True)):
        assert all(t.shape[0] == 0 for t in result)
    assert ops.activation_quantize(x, gated=True)[0].shape == (2, 3, 20)
    assert ops.activation_quantize(x, x)[1].shape == (2, 3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_norms_on_the_cpu(data: st.DataObject):
    dtype = data.draw(st.sampled_from(FLOATS))
    kind = data.draw(st.sampled_from(list(ops.NORMS)))
    m, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3000))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    spread = 2.0 ** data.draw(st.integers(-12, 12))
    maybe = lambda t: t if data.draw(st.booleans()) else None  # noqa: E731
    weight = maybe(rand(k, dtype=data.draw(st.sampled_from(FLOATS))))
    bias = maybe(rand(k, dtype=data.draw(st.sampled_from(FLOATS)))) if kind == "layer" else None
    assert_norm(
        "cpu", rand(m, k, dtype=dtype, spread=spread), weight, bias, maybe(rand(m, k, dtype=dtype)),
        maybe(torch.tensor(0.03)), kind=kind, eps=data.draw(st.sampled_from([0.0, 1e-6, 1e-2])),
        offset=data.draw(st.sampled_from([0.0, 1.0])),
    )  # fmt: skip


# ---- activation + quantize -----------------------------------------------------------------------------------------


def assert_activation(device: str, x: Tensor, up: Tensor | None, name: str, scale: Tensor | None = None) -> None:
    """q · scale against activation(x) · up in float64.

    activation: 4 float32 ulp of |x| (hwkern.h), 2⁻²¹. Then half an ulp of x's dtype for the result and for the product.
    q · scale: half a step, and 2⁻²² of the largest for the roundings of scale, its reciprocal and the product.
    relu and none are exact.
    """
    on_device = [None if t is None else t.to(device) for t in (x, up, scale)]
    q, got_scale = ops.activation_quantize(on_device[0], on_device[1], on_device[2], name)  # type: ignore[arg-type]
    q, got_scale = q.cpu(), got_scale.cpu()
    if name in ("relu", "none"):
        want_q, want_scale = reference.activation_quantize(x, up, name, scale)
        assert torch.equal(q, want_q)
        assert same_bits(got_scale, want_scale)
        return
    info = torch.finfo(x.dtype)
    half_ulp, tiny = info.eps / 2, info.smallest_normal * info.eps
    factor = torch.ones_like(x).double() if up is None else up.double()
    true = reference.activate(x.float(), name).double()  # itself rounded to float32: half an ulp
    error = 2.0**-21 * x.double().abs() + 2.0**-24 * true.abs()
    error = error + half_ulp * (true.abs() + error) + tiny
    true, error = true * factor, error * factor.abs()
    if up is not None:
        error = error + half_ulp * (true.abs() + error) + tiny
    largest, slack = true.abs().amax(-1), error.amax(-1)
    if scale is None:
        assert bool(((got_scale.double() * 127 - largest).abs() <= slack + 2.0**-23 * (largest + slack)).all())
    step = got_scale.double().reshape(-1, 1) if scale is None else scale.double()
    true = true.clamp(-127 * step, 127 * step)
    bound = step / 2 + error + 2.0**-22 * (127 * step)
    assert bool(((q.double() * step - true).abs() <= bound).all())


@dtypes
@activations
@pytest.mark.parametrize("k", K)
@pytest.mark.sanitizer
def test_activation_is_within_its_bound(device: str, dtype: torch.dtype, name: str, k: int):
    for m in batches(device, k):
        x, up = rand(m, k, dtype=dtype, spread=3), rand(m, k, dtype=dtype)
        assert_activation(device, x, None, name)
        assert_activation(device, x, up, name)
    assert_activation(device, x, up, name, torch.tensor([0.02]))
    assert_activation(device, x, None, name, torch.tensor([0.02]))


@dtypes
@activations
def test_activation_over_the_whole_range(device: str, dtype: torch.dtype, name: str):
    """Every exponent, both signs, one value a row so that each is measured against itself."""
    exponents = torch.arange(-20 if dtype == torch.float16 else -60, 16 if dtype == torch.float16 else 40)
    x = torch.cat([torch.exp2(exponents.float()) * 1.37, -torch.exp2(exponents.float()) * 1.37]).to(dtype)[:, None]
    assert_activation(device, x, None, name)
    # all-negative rows: the largest result is much smaller than the largest input
    assert_activation(device, -rand(50, 64, dtype=dtype, spread=4).abs(), None, name)


@dtypes
@activations
def test_gated_halves_are_the_two_tensors(device: str, dtype: torch.dtype, name: str):
    for f in (1, 37, 64, 3072):
        both = rand(5, 2 * f, dtype=dtype).to(device)
        gate, up = both[:, :f], both[:, f:]
        got, want = (
            ops.activation_quantize(both, activation=name, gated=True),
            ops.activation_quantize(gate, up, None, name),
        )
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        copies = ops.activation_quantize(gate.clone(), up.clone(), None, name)
        assert torch.equal(got[0], copies[0])
        assert torch.equal(got[1], copies[1])


@dtypes
@activations
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activation_of_nan_and_inf(device: str, dtype: torch.dtype, name: str, bad: float):
    x, up = rand(4, 100, dtype=dtype), rand(4, 100, dtype=dtype).abs() + 0.5
    clean = ops.activation_quantize(x.to(device), up.to(device), None, name)
    poisoned = x.clone()
    poisoned[2, 50] = bad
    q, scale = ops.activation_quantize(poisoned.to(device), up.to(device), None, name)
    assert scale[2].isnan()
    assert not q[2].any()
    assert torch.equal(q[[0, 1, 3]], clean[0][[0, 1, 3]])
    # with a static scale NaN is 0, infinity saturates, and the neighbours keep theirs
    q = ops.activation_quantize(poisoned.to(device), up.to(device), torch.tensor(0.01, device=device), name)[0]
    assert q[2, 50] == (127 if bad > 0 else 0)
    assert q[2].any()
    zeros = ops.activation_quantize(torch.zeros(2, 40, dtype=dtype, device=device), None, None, name)
    assert not zeros[0].any()
    assert bool((zeros[1] == reference.SCALE_MIN).all())


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_activations_on_the_cpu(data: st.DataObject):
    dtype = data.draw(st.sampled_from(FLOATS))
    m, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 700))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    x = rand(m, k, dtype=dtype, spread=2.0 ** data.draw(st.integers(-6, 5)))
    up = rand(m, k, dtype=dtype) if data.draw(st.booleans()) else None
    scale = torch.tensor(0.03) if data.draw(st.booleans()) else None
    assert_activation("cpu", x, up, data.draw(st.sampled_from(list(ops.ACTIVATIONS))), scale)


# ---- the operators -------------------------------------------------------------------------------------------------


def test_schemas_fakes_and_compile(device: str):
    x, w = rand(3, 40).to(device), rand(40).to(device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.hwkern.norm_quantize.default, (x, w, None, x, None, "rms", 1e-6, 0.0, True), test_utils=tests
    )
    torch.library.opcheck(torch.ops.hwkern.activation_quantize.default, (x, None, None, "silu", True), test_utils=tests)

    def block(x: Tensor) -> tuple[Tensor, ...]:
        normed = ops.norm_quantize(x, w, residual=x, kind="rms_rounded")
        assert normed.h is not None
        return (normed.q, normed.scale, *ops.activation_quantize(normed.h, gated=True))

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x), block(x), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_a_sentence(device: str):
    x = rand(4, 8).to(device)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        ops.norm_quantize(x.double())
    with pytest.raises(ValueError, match="kind = 'batch'"):
        ops.norm_quantize(x, kind="batch")
    with pytest.raises(ValueError, match='only "layer" does'):
        ops.norm_quantize(x, bias=x[0])
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), but \(8,\) is needed"):
        ops.norm_quantize(x, x[:, 0])
    with pytest.raises(TypeError, match=r"residual is torch\.float16, but x is torch\.float32"):
        ops.norm_quantize(x, residual=x.half())
    with pytest.raises(ValueError, match=r"residual has shape \(3, 8\)"):
        ops.norm_quantize(x, residual=x[:3])
    with pytest.raises(ValueError, match="one static scale for the whole tensor"):
        ops.norm_quantize(x, scale=x[0])
    with pytest.raises(TypeError, match="scales are float32"):
        ops.activation_quantize(x, scale=x[0, :1].half())
    with pytest.raises(ValueError, match="activation = 'swish'"):
        ops.activation_quantize(x, activation="swish")
    with pytest.raises(ValueError, match="even last dimension"):
        ops.activation_quantize(x[:, :7], gated=True)
    with pytest.raises(ValueError, match="up must then be None"):
        ops.activation_quantize(x, x, gated=True)
    with pytest.raises(ValueError, match="K = 131072"):
        ops.norm_quantize(torch.zeros(1, 2**17, device=device))


# ---- raw calls -----------------------------------------------------------------------------------------------------


def raw_norm(x: Tensor, m: int, k: int, q: Guarded, scale: Guarded, **changed: Any) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    arguments: dict[str, Any] = {
        "x": x.data_ptr(), "ldx": x.stride(0), "x_dtype": ops.DTYPES[x.dtype], "residual": 0, "ldr": k, "weight": 0,
        "weight_dtype": 0, "bias": 0, "bias_dtype": 0, "h": 0, "ldh": k, "y": 0, "ldy": k, "q": q.pointer(),
        "ldq": q.pitch, "scale": scale.pointer(), "is_static": False, "m": m, "k": k, "eps": 1e-6, "offset": 0.0,
        "norm": ops.NORMS["rms"], "stream": stream,
    }  # fmt: skip
    _native.extension().norm_quantize(**(arguments | changed))


@pytest.mark.gpu
@pytest.mark.sanitizer
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
def test_writes_its_rows_with_zero_padding_and_nothing_else(dtype: torch.dtype, offset: int):
    for m, k, ldq in [(5, 104, 112), (3, 1, 16), (130, 1027, 1040), (2, 2048, 2048), (150, 2048, 2064)]:
        x, residual = rand(m, k, dtype=dtype).cuda(), rand(m, k, dtype=dtype).cuda()
        want_q, want_scale, want_h, want_y = reference.norm_quantize(x.cpu(), residual=residual.cpu())
        q, scale = Guarded(m, ldq, torch.int8), Guarded(1, m, torch.float32)
        h, y = Guarded(m, k, dtype, k + 8, offset), Guarded(m, k, dtype, k + 16, offset)
        raw_norm(
            x, m, k, q, scale, residual=residual.data_ptr(), h=h.pointer(), ldh=h.pitch, y=y.pointer(), ldy=y.pitch
        )
        assert torch.equal(q.value[:, :k].cpu(), want_q)
        assert not q.value[:, k:].any()
        assert torch.equal(scale.value[0].cpu(), want_scale)
        assert torch.equal(h.value.cpu(), want_h)
        assert torch.equal(y.value.cpu(), want_y)
        for out in (q, scale, h, y):
            out.assert_untouched_outside()

        q, scale = Guarded(m, ldq, torch.int8), Guarded(1, m, torch.float32)
        _native.extension().activation_quantize(
            x.data_ptr(), k, ops.DTYPES[dtype], residual.data_ptr(), k, q.pointer(), ldq, scale.pointer(), False, m, k,
            ops.ACTIVATIONS["relu"], torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        want_q, want_scale = reference.activation_quantize(x.cpu(), residual.cpu(), "relu")
        assert torch.equal(q.value[:, :k].cpu(), want_q)
        assert not q.value[:, k:].any()
        assert torch.equal(scale.value[0].cpu(), want_scale)
        q.assert_untouched_outside()
        scale.assert_untouched_outside()


@pytest.mark.gpu
@pytest.mark.sanitizer
@dtypes
@pytest.mark.parametrize("k", [40, 1027, 2048, 40000])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_h_may_lie_over_an_input_and_y_over_x(dtype: torch.dtype, k: int, norm: str):
    m, name = 3, {"norm": ops.NORMS[norm]}
    x, residual = rand(m, k, dtype=dtype), rand(m, k, dtype=dtype)
    want_q, want_scale, want_h, want_y = reference.norm_quantize(x, residual=residual, kind=norm)
    for h_over in ("x", "residual"):
        a, b = x.cuda(), residual.cuda()
        over, y = (a, torch.empty_like(a)) if h_over == "x" else (b, a)
        q, scale = Guarded(m, k, torch.int8), Guarded(1, m, torch.float32)
        raw_norm(a, m, k, q, scale, residual=b.data_ptr(), h=over.data_ptr(), y=y.data_ptr(), **name)
        assert torch.equal(over.cpu(), want_h)
        assert torch.equal(y.cpu(), want_y)
        assert torch.equal(q.value.cpu(), want_q)
        assert torch.equal(scale.value[0].cpu(), want_scale)


@pytest.mark.gpu
def test_a_hundred_runs_have_the_same_bits():
    x, w = rand(300, 4096, dtype=torch.bfloat16).cuda(), rand(4096, dtype=torch.bfloat16).cuda()
    both = rand(300, 6144, dtype=torch.bfloat16).cuda()
    first, act = ops.norm_quantize(x, w, kind="layer"), ops.activation_quantize(both, gated=True)
    for _ in range(100):
        again, act_again = ops.norm_quantize(x, w, kind="layer"), ops.activation_quantize(both, gated=True)
        assert torch.equal(first.q, again.q)
        assert torch.equal(first.scale, again.scale)
        assert torch.equal(act[0], act_again[0])
        assert torch.equal(act[1], act_again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 1000])
def test_a_chain_of_overlapping_launches_waits_for_its_inputs(m: int):
    """Each launch reads what the one before wrote, and may start before it ends; also as replays of a graph."""
    start, w = rand(m, 2048, dtype=torch.float16), rand(2048, dtype=torch.float16)

    def chain(x: Tensor, w: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        h = x
        for _ in range(12):
            q, scale, h, y = norm(x, w, None, h, kind="rms_rounded")
            x = y
        return q, scale

    def on_gpu(*args: Any, **kwargs: Any) -> Any:
        return ops.norm_quantize(*args, **kwargs, return_y=True)

    x, weight = start.cuda(), w.cuda()
    for _ in range(2):
        on_gpu(x, weight, None, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x, weight, on_gpu)
    for turn in range(3):
        start = start.roll(turn, 0) * (1 - turn / 8)
        x.copy_(start)
        graph.replay()
        want = chain(start, w, reference.norm_quantize)
        assert torch.equal(out[0].cpu(), want[0])
        assert torch.equal(out[1].cpu(), want[1])
