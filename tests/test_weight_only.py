"""The weight-only linear (W8A16): every config id, edge shapes, sums within their bound, guard bytes, overlap."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from kernel_helpers import FLOATS, REDUCED, Guarded, configs, each_config, random_int8, runs_here, same_bits
from torch import Tensor

from hwkern import _native, _tensors, _weight_only, ops, reference

HALVES = (torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
CONFIGS = configs("w8a16")
RUNNABLE = [row for row in CONFIGS if runs_here(row)]
all_configs = each_config(RUNNABLE)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)

# Around every tile edge in tokens (8, 16, 32, 64) and weight rows (32, 64); K around a 16-byte chunk, one step of 64,
# a round of steps (256 … 2048) and longer than every queue.
M = [1, 17] if REDUCED else [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70]
N = [33, 130] if REDUCED else [1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 520]
K = [17, 700] if REDUCED else [1, 15, 16, 17, 63, 64, 65, 129, 255, 257, 511, 700, 1000, 1024, 2047, 2049, 4097, 8192]


def edge_shapes() -> list[tuple[int, int, int]]:
    """Every M, every N and every K with small and with large partners, not the whole product."""
    shapes = {(m, n, k) for m, (n, k) in itertools.product(M, [(33, 129), (130, 1000)])}
    shapes |= {(m, n, k) for n, (m, k) in itertools.product(N, [(3, 65), (17, 700)])}
    shapes |= {(m, n, k) for k, (m, n) in itertools.product(K, [(1, 40), (19, 65)])}
    return sorted(shapes)


def allowed(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a result may lie from the exact value.

    K products, each exact in float32, summed in any order: at most (K - 1) · 2⁻²⁴ · Σ|x·w|. (Tensor cores add a group
    of at least 8 products with one truncation, 2⁻²³ of their size: K / 8 of those, so less in total.) The product with
    the scale, the bias, the activation (4 ulp, derivative below 1.13) and the residual: fewer than 12 · 2⁻²⁴ of their
    sizes. Then half an ulp of the output's type.
    """
    k = weight.shape[1]
    size = (x.double().abs() @ weight.double().abs().t()) * scale.double().abs()
    if bias is not None:
        size = size + bias.double().abs()
    info = torch.finfo(dtype)
    before = 1.13 * (k + 12) * 2.0**-24 * (size + exact.abs())
    return before + info.eps / 2 * (exact.abs() + before) + info.smallest_normal * info.eps / 2


def within_bound(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, **options) -> Tensor:
    """A bool for each element of ``y``."""
    exact = reference.weight_only_linear(x, weight, scale, bias, torch.float64, **options)
    return (y.double() - exact).abs() <= allowed(x, weight, scale, bias, exact, y.dtype)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, **options) -> None:
    wrong = ~within_bound(y, x, weight, scale, bias, **options)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first at {wrong.nonzero()[0].tolist()}"


def call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    y: Guarded | Tensor,
    config: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    constant: bool = True,
) -> None:
    """The raw entry point. ``weight [N, K]``: a view of rows whose pitch is a multiple of 16."""
    out, address, pitch = (y.matrix, y.pointer(), y.pitch) if isinstance(y, Guarded) else (y, y.data_ptr(), y.stride(0))
    codes, none = ops.DTYPES, (0, 0)
    bias_at = none if bias is None else (bias.data_ptr(), codes[bias.dtype])
    residual_at = (0, 0, 0) if residual is None else (residual.data_ptr(), codes[residual.dtype], residual.stride(0))
    _native.extension().weight_only_linear(
        x.data_ptr(), codes[x.dtype], x.stride(0), weight.data_ptr(), weight.stride(0), constant, scale.data_ptr(),
        *bias_at, address, codes[out.dtype], pitch, x.shape[0], weight.shape[0], x.shape[1],
        _weight_only.ACTIVATIONS[activation], *residual_at, config, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip


def inputs(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(x [M, K], weight [N, K] with garbage in the padding of its rows, scale [N]) on the GPU."""
    x = torch.randn(m, k, device="cuda").to(dtype)
    return x, random_int8(n, k), torch.rand(n, device="cuda") * 0.01 + 0.001


# ---- the kernels, every config -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@halves
def test_edge_shapes_and_nothing_else_is_written(config: int, dtype: torch.dtype):
    for m, n, k in edge_shapes():
        x, weight, scale = inputs(m, n, k, dtype)
        y = Guarded(m, n, dtype, pitch=n + 3)
        call(x, weight, scale, y, config)
        assert_close(y.value, x, weight, scale)
        y.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
@halves
def test_every_weight_is_exact(config: int, dtype: torch.dtype):
    """One nonzero activation: no sum is rounded, and all 256 int8 values come through with the exact product's bits."""
    weight = torch.arange(-128, 128, device="cuda").to(torch.int8)[:, None].repeat(1, 80)
    one = torch.ones(256, device="cuda")
    for position in (0, 1, 6, 15, 37, 79):
        x = torch.zeros(3, 80, dtype=dtype, device="cuda")
        x[:, position] = torch.tensor([1.0, -0.3, 2**-8], device="cuda")
        y = torch.empty(3, 256, device="cuda")
        call(x, weight, one, y, config)
        assert torch.equal(y, x[:, position : position + 1].float() * weight[:, 0].float())


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
def test_x_off_the_16_byte_grid(config: int):
    for m, n, k in [(3, 40, 70)] if REDUCED else [(1, 40, 64), (3, 40, 70), (9, 65, 1025), (17, 33, 2048)]:
        base = torch.randn(m, k + 9, device="cuda").bfloat16()
        _, weight, scale = inputs(m, n, k)
        for offset in (0, 1, 4, 9):
            x = base[:, offset : offset + k]
            y = torch.full((m, n), float("nan"), device="cuda")
            call(x, weight, scale, y, config)
            assert_close(y, x, weight, scale)


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_activation_and_residual(config: int, dtype: torch.dtype):
    x, weight, scale = inputs(19, 70, 500)
    for activation, other in itertools.product(ACTIVATIONS, FLOATS):
        bias, residual = torch.randn(70, device="cuda").to(other), torch.randn(19, 75, device="cuda").to(other)[:, :70]
        y = Guarded(19, 70, dtype, pitch=71)
        call(x, weight, scale, y, config, bias, activation, residual)
        assert_close(y.value, x, weight, scale, bias, activation=activation, residual=residual)
        y.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
@halves
def test_nan_and_inf_spread_as_in_a_float_product(config: int, dtype: torch.dtype):
    x, weight, scale = inputs(11, 96, 300, dtype)
    weight[3] = 0  # 0 · inf is NaN
    x[1, 5], x[4, 299], x[7, 0], x[9, 20], x[9, 21] = (float(v) for v in ("nan", "inf", "-inf", "inf", "-inf"))
    y = torch.empty(11, 96, device="cuda")
    call(x, weight, scale, y, config)
    want = reference.weight_only_linear(x, weight, scale, None, torch.float32)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isposinf(), want.isposinf())
    assert torch.equal(y.isneginf(), want.isneginf())
    rows = [0, 2, 3, 5, 6, 8, 10]
    assert_close(y[rows], x[rows], weight, scale)


@pytest.mark.gpu
@all_configs
def test_more_tiles_than_the_gpu_runs_at_once(config: int):
    for m, n, k in ((150, 12000, 256), (2, 40000, 96)):
        x, weight, scale = inputs(m, n, k)
        y = torch.full((m, n), float("nan"), device="cuda")
        call(x, weight, scale, y, config)
        assert_close(y, x, weight, scale)


@pytest.mark.gpu
@all_configs
def test_same_bits_in_every_run(config: int):
    x, weight, scale = inputs(70, 1000, 3000)
    first = torch.empty(70, 1000, device="cuda")
    call(x, weight, scale, first, config)
    for _ in range(100):
        again = torch.full_like(first, float("nan"))
        call(x, weight, scale, again, config)
        assert torch.equal(first, again)


@pytest.mark.gpu
@all_configs
def test_layers_that_feed_each_other_while_they_overlap(config: int):
    """A captured chain whose buffers are used again, against the same calls with a wait after each: the same bits."""
    n = 1536
    layers = [(random_int8(n, n), torch.rand(n, device="cuda") * 4e-4) for _ in range(9)]
    for m in (1, 20):
        first = torch.randn(m, n, device="cuda").bfloat16()
        buffers = [torch.empty_like(first) for _ in range(3)]

        def run(overlapped: bool, first: Tensor = first, buffers: list[Tensor] = buffers) -> Tensor:
            x = first
            for i, (weight, scale) in enumerate(layers):
                y = buffers[i % 3]
                call(x, weight, scale, y, config, residual=x if i else None, constant=overlapped)
                if not overlapped:
                    torch.cuda.synchronize()
                x = y
            return x

        want = run(False).clone()
        assert want.isfinite().all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(True)
        for _ in range(20):
            for buffer in buffers:
                buffer.fill_(float("nan"))
            graph.replay()
            graph.replay()
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_each_other():
    x, weight, scale = inputs(5, 2048, 2048)
    want = ops.weight_only_linear(x, weight, scale)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.weight_only_linear(x, weight, scale))
    torch.cuda.synchronize()
    assert all(torch.equal(result, want) for result in results)


@pytest.mark.gpu
def test_random_shapes_with_the_chosen_config():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20 if REDUCED else 200):
        m, n, k = (int(torch.randint(1, high, (), generator=generator)) for high in (100, 700, 3000))
        x, weight, scale = inputs(m, n, k)
        y = Guarded(m, n, torch.bfloat16)
        call(x, weight, scale, y, ops.CHOOSE)
        assert_close(y.value, x, weight, scale)
        y.assert_untouched_outside()


@pytest.mark.gpu
def test_a_weight_that_the_preceding_kernel_writes():
    """The first call with a tensor may not read it early: `quantize` lets its successor start before it has ended."""
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    source = torch.randn(2, 8192, 4096, device="cuda").bfloat16()
    quantized = [ops.quantize(w) for w in source]
    want = [ops.weight_only_linear(x, *pair) for pair in quantized]
    del quantized
    for i in range(20):
        weight, scale = ops.quantize(source[i % 2])
        assert torch.equal(ops.weight_only_linear(x, weight, scale), want[i % 2])
        del weight, scale  # so that the next one, of other values, gets the same memory


@pytest.mark.gpu
def test_bad_arguments_are_refused_with_a_sentence():
    x, weight, scale = inputs(2, 8, 32)
    y = torch.empty(2, 8, device="cuda")
    w8a8 = next(c["id"] for c in _native.extension().gemm_configs() if c["scheme"] == "w8a8")
    with pytest.raises(ValueError, match="not the id of a weight-only config"):
        call(x, weight, scale, y, w8a8)
    with pytest.raises(ValueError, match="not the id of a weight-only config"):
        call(x, weight, scale, y, 12345)
    with pytest.raises(ValueError, match="16-byte aligned"):
        call(x, random_int8(8, 48)[:, 1:33], scale, y, ops.CHOOSE)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        call(x.float(), weight, scale, y, ops.CHOOSE)
    with pytest.raises(ValueError, match="unknown config id"):
        ops.int8_linear(x, weight, scale, config=CONFIGS[0]["id"])
    with pytest.raises(TypeError, match="Cast x"):
        ops.weight_only_linear(x.float(), weight, scale)


# ---- the table and the choice --------------------------------------------------------------------------------------

H100 = {"sm_count": 132, "compute": 90, "shared_bytes": 232448}


def test_the_table_has_portable_rows_for_every_gpu():
    assert all(300 <= c["id"] < 400 for c in CONFIGS)
    assert len(CONFIGS) <= 12
    small = [
        c for c in CONFIGS if c["min_compute"] == 80 and c["shared_bytes"] <= 101376
    ]  # compute capability 8.6, 12.0
    assert {c["block_m"] for c in small} == {8, 16, 32}


def test_the_choice_stays_within_the_scheme_and_the_device():
    native = _native.extension()
    by_id = {c["id"]: c for c in CONFIGS}
    for m in (1, 8, 9, 16, 17, 64, 512, 4096):
        for n, k in ((4096, 4096), (28672, 4096), (64, 64), (1, 1)):
            assert native.weight_only_choose(m=m, n=n, k=k, **H100) in by_id
            assert native.gemm_choose(m=m, n=n, k=k, **H100) not in by_id
            ada = by_id[native.weight_only_choose(m=m, n=n, k=k, sm_count=84, compute=89, shared_bytes=101376)]
            assert ada["min_compute"] == 80
            assert ada["shared_bytes"] <= 101376
    assert native.weight_only_choose(m=1, n=8, k=16, sm_count=72, compute=75, shared_bytes=65536) == -1
    assert by_id[native.weight_only_choose(m=1, n=4096, k=4096, **H100)]["block_m"] == 8
    assert by_id[native.weight_only_choose(m=16, n=4096, k=4096, **H100)]["block_m"] == 16


# ---- the operator, on the CPU and on CUDA --------------------------------------------------------------------------


def layer(device: str, n: int = 48, k: int = 70) -> tuple[Tensor, Tensor, Tensor]:
    """(q [N, K], packed weight [N, K16], scale [N])"""
    q, scale = reference.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)))
    return q.to(device), ops.pad_weight(q).to(device), scale.to(device)


@halves
@pytest.mark.parametrize("shape", [(1, 70), (70,), (5, 70), (2, 3, 70), (0, 70), (2, 0, 70)], ids=str)
def test_operator_on_any_shape(device: str, dtype: torch.dtype, shape: tuple[int, ...]):
    q, weight, scale = layer(device)
    x = torch.randn(shape, device=device).to(dtype)
    for bias, out_dtype in itertools.product((None, torch.randn(48, device=device)), (None, *FLOATS)):
        y = ops.weight_only_linear(x, weight, scale, bias, out_dtype)
        assert y.shape == (*shape[:-1], 48)
        assert y.dtype == (out_dtype or dtype)
        if y.numel():
            assert_close(y.reshape(-1, 48), x.reshape(-1, 70), q, scale, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_with_options(device: str, activation: str):
    q, weight, scale = layer(device)
    x = torch.randn(4, 3, 70, device=device).half()
    bias, residual = torch.randn(48, device=device).half(), torch.randn(4, 48, 3, device=device).transpose(1, 2)
    y = ops.weight_only_linear(x, weight, scale, bias, torch.float32, ops.CHOOSE, activation, residual)
    flat = residual.reshape(12, 48)
    assert_close(y.view(12, 48), x.view(12, 70), q, scale, bias, activation=activation, residual=flat)


def test_views_of_every_kind(device: str):
    q, weight, scale = layer(device)
    base = torch.randn(70, 300, device=device).bfloat16()
    for x in (base.t(), base.t()[::3], torch.randn(4, 141, device=device).half()[:, 71:]):
        assert_close(ops.weight_only_linear(x, weight, scale), x, q, scale)
    strided = torch.empty(48, 160, dtype=torch.int8, device=device)[:, :80]
    strided.copy_(weight)
    x = torch.randn(3, 70, device=device).bfloat16()
    assert same_bits(ops.weight_only_linear(x, strided, scale), ops.weight_only_linear(x, weight, scale))


@pytest.mark.parametrize("k", [1, 15, 17, 1000])
def test_float32_on_the_cpu(k: int):
    q, weight, scale = layer("cpu", 600, k)
    x = torch.randn(3, k)
    y = ops.weight_only_linear(x, weight, scale)
    assert y.dtype == torch.float32
    assert_close(y, x, q, scale)


def test_nan_and_inf_on_both_devices(device: str):
    q, weight, scale = layer(device)
    x = torch.randn(4, 70, device=device).bfloat16()
    x[1, 3], x[2, 69] = float("nan"), float("inf")
    y, want = ops.weight_only_linear(x, weight, scale), reference.weight_only_linear(x, q, scale)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert y[[0, 3]].isfinite().all()


def test_bad_input_is_a_sentence(device: str):
    _, weight, scale = layer(device)
    x = torch.randn(4, 70, device=device).bfloat16()
    with pytest.raises(ValueError, match="which needs a weight of 64 columns"):
        ops.weight_only_linear(x[:, :64], weight, scale)
    with pytest.raises(ValueError, match=r"activation = 'tanh': hwkern knows 'none', 'relu'"):
        ops.weight_only_linear(x, weight, scale, activation="tanh")
    with pytest.raises(ValueError, match=r"residual has shape \(4, 47\), but the output's \(4, 48\) is needed"):
        ops.weight_only_linear(x, weight, scale, residual=x[:, :47])
    with pytest.raises(TypeError, match=r"residual is torch\.int64"):
        ops.weight_only_linear(x, weight, scale, residual=torch.zeros(4, 48, dtype=torch.int64, device=device))


def test_opcheck(device: str):
    _, weight, scale = layer(device)
    x, bias = torch.randn(3, 5, 70, device=device).bfloat16(), torch.randn(48, device=device)
    op = torch.ops.hwkern.weight_only_linear.default
    torch.library.opcheck(op, (x, weight, scale))
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, scale, bias.clone().requires_grad_()))
    residual = torch.randn(3, 5, 48, device=device).requires_grad_()
    torch.library.opcheck(op, (x, weight, scale, bias, None, -1, "silu", residual))


def test_compile_with_a_dynamic_batch(device: str):
    _, weight, scale = layer(device)
    compiled = torch.compile(lambda x: ops.weight_only_linear(x * 2, weight, scale), fullgraph=True, dynamic=True)
    for m in (3, 4, 9):
        x = torch.randn(m, 70, device=device).bfloat16()
        assert torch.equal(compiled(x), ops.weight_only_linear(x * 2, weight, scale))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dequantized_weight(device: str, activation: str):
    q, weight, scale = layer(device)
    w = reference.dequantize(q, scale)
    functions = {
        "none": lambda y: y,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    x = torch.randn(2, 3, 70, device=device).bfloat16().requires_grad_()
    bias, residual = (torch.randn(shape, device=device).requires_grad_() for shape in ((48,), (2, 3, 48)))
    grad = torch.randn(2, 3, 48, device=device)
    y = ops.weight_only_linear(x, weight, scale, bias, torch.float32, ops.CHOOSE, activation, residual)
    got = torch.autograd.grad(y, (x, bias, residual), grad)
    want = torch.autograd.grad(functions[activation](x.float() @ w.t() + bias) + residual, (x, bias, residual), grad)
    for g, wanted in zip(got, want, strict=True):
        # Another order of summation moves the activation's input by K · 2⁻²⁴ · Σ|x·w|, with K = 70 and Σ|x·w| < 100,
        # and its derivative by as much; in bfloat16 it may turn a rounding.
        tolerance = max(70 * 2.0**-24 * 100, 2 * torch.finfo(g.dtype).eps)
        torch.testing.assert_close(g, wanted.to(g.dtype), rtol=tolerance, atol=tolerance)


def test_gradient_of_the_scale_is_an_error_that_says_why(device: str):
    _, weight, scale = layer(device)
    y = ops.weight_only_linear(torch.randn(2, 70, device=device).half(), weight, scale.requires_grad_())
    with pytest.raises(NotImplementedError, match="frozen; train an adapter"):
        y.sum().backward()


@halves
def test_autocast_casts_x_as_a_linear_layer_does(device: str, dtype: torch.dtype):
    _, weight, scale = layer(device)
    x = torch.randn(4, 70, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = ops.weight_only_linear(x, weight, scale)
        wide = ops.weight_only_linear(x, weight, scale, out_dtype=torch.float32)
    assert same_bits(y.detach(), ops.weight_only_linear(x.detach().to(dtype), weight, scale))
    assert wide.dtype == torch.float32
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_only_a_tensor_seen_before_counts_as_constant():
    weight = torch.zeros(2, 16, dtype=torch.int8)
    assert not _tensors.is_constant(weight)
    assert _tensors.is_constant(weight)
    assert not _tensors.is_constant(weight[:])  # a view is another tensor, and may be of another's memory
    gc.collect()
    known = len(_tensors._seen)
    del weight
    gc.collect()
    assert len(_tensors._seen) == known - 1


def test_a_layer_is_constant_when_all_that_is_read_early_was_seen():
    weight, scale, bias = torch.zeros(2, 16, dtype=torch.int8), torch.ones(2), torch.zeros(2)
    assert not _tensors.are_constant(weight, scale, None)
    assert _tensors.are_constant(weight, scale, None)
    assert not _tensors.are_constant(weight, scale, bias)  # and from here on the bias is known too
    assert _tensors.are_constant(weight, scale, bias)
    assert not _tensors.are_constant(weight, torch.ones(2), bias)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"activation": 99}, "unknown activation"), ({"residual": 18, "residual_dtype": 0, "ldr": 16}, "aligned")],
)
def test_the_entry_point_refuses_what_the_kernel_cannot_read(wrong: dict[str, int], sentence: str) -> None:
    """Before it looks for a GPU: none of these addresses is read."""
    problem = {
        "x": 16, "x_dtype": 1, "ldx": 16, "weight": 16, "ldb": 16, "weight_is_constant": 0, "weight_scale": 16,
        "bias": 0, "bias_dtype": 0, "y": 16, "y_dtype": 1, "ldy": 16, "m": 1, "n": 16, "k": 16, "activation": 0,
        "residual": 0, "residual_dtype": 0, "ldr": 0, "config": ops.CHOOSE, "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        _native.extension().weight_only_linear(*(problem | wrong).values())
