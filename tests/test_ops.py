"""The torch operators: same bits as reference.py on CPU and CUDA, and good citizens of torch."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import FLOATS, same_bits
from torch import Tensor

from hwkern import _cpu, _launch_cell, _native, _no_grad, ops, reference

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def eager_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return ops.eager_linear(x, weight, scale, bias, x.shape[-1], ops.LaunchCell())


def linear_inputs(device: str, n: int = 48, k: int = 70, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(q weight [N, K], packed weight [N, K16], scale [N])."""
    generator = torch.Generator().manual_seed(seed)
    q, scale = reference.quantize(torch.randn(n, k, generator=generator))
    return q.to(device), ops.pad_weight(q).to(device), scale.to(device)


# ---- results -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1, 70), (70,), (5, 70), (2, 3, 70), (130, 70), (0, 70), (2, 0, 70)], ids=str)
@pytest.mark.sanitizer
def test_linear_has_the_reference_s_bits(device: str, dtype: torch.dtype, shape: tuple[int, ...]):
    q, weight, scale = linear_inputs(device)
    x = torch.randn(shape, device=device).to(dtype)
    for bias in (None, torch.randn(48, device=device), torch.randn(48, device=device).to(dtype)):
        for out_dtype in (None, torch.float32, torch.bfloat16):
            y = ops.int8_linear(x, weight, scale, bias, out_dtype)
            assert y.shape == (*shape[:-1], 48)
            # The oracle runs on the CPU: IEEE arithmetic in the order written, whatever the GPU does.
            cpu = (t if t is None else t.cpu() for t in (x, q, scale, bias))
            if x.numel():
                assert same_bits(y.cpu(), reference.int8_linear(*cpu, out_dtype))


@pytest.mark.parametrize("k", [1, 15, 16, 17, 33, 1041, 5000])
def test_linear_with_any_k(device: str, k: int):
    q, weight, scale = linear_inputs(device, n=9, k=k)
    x = torch.randn(6, k)
    assert same_bits(ops.int8_linear(x.to(device), weight, scale).cpu(), reference.int8_linear(x, q.cpu(), scale.cpu()))


def test_nan_and_inf_rows_become_nan_rows_and_no_others_change(device: str):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(6, 70, device=device)
    clean = ops.int8_linear(x, weight, scale)
    x[1, 3], x[4, 69] = float("nan"), float("inf")
    y = ops.int8_linear(x, weight, scale)
    assert y[[1, 4]].isnan().all()
    assert torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
    assert not ops.int8_linear(torch.zeros(2, 70, device=device), weight, scale).any()


@pytest.mark.parametrize("k", [1, 2, 16, 70, 2100])
def test_matmul_sums_are_exact_at_the_extremes(device: str, k: int):
    """±127 and -128 everywhere: what saturates in 16-bit products, on CPUs without VNNI."""
    for m in (1, 3, 70):
        for left, right in ((127, 127), (-128, 127), (-128, -128)):
            a = torch.full((m, k), left, dtype=torch.int8, device=device)
            b = torch.full((19, k), right, dtype=torch.int8, device=device)
            assert bool((ops.int8_matmul(a, b) == left * right * k).all())
        a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
        b = torch.randint(-128, 128, (19, k), dtype=torch.int8, device=device)
        assert torch.equal(ops.int8_matmul(a, b), reference.int8_matmul(a, b, out_dtype=torch.int32))


def test_the_cpu_fallback_is_exact_too():
    for k in (1, 1040, 1041, 4096):
        a = torch.full((3, k), -127, dtype=torch.int8)
        b = torch.randint(-127, 128, (5, k), dtype=torch.int8)
        b[0] = 127
        assert torch.equal(_cpu.float_matmul(a, b), reference.int8_matmul(a, b, out_dtype=torch.int32))


@dtypes
def test_matmul_with_scales_and_bias(device: str, dtype: torch.dtype):
    a = torch.randint(-127, 128, (2, 33, 100), dtype=torch.int8, device=device)
    b = torch.randint(-127, 128, (21, 100), dtype=torch.int8, device=device)
    scale_a, scale_b = torch.rand(2, 33, device=device), torch.rand(21, device=device)
    bias = torch.randn(21, device=device).to(dtype)
    for args in ((scale_a, scale_b, bias), (None, scale_b, None), (scale_a, None, bias), (None, None, bias)):
        y = ops.int8_matmul(a, b, *args, out_dtype=dtype)
        assert same_bits(y.cpu(), reference.int8_matmul(*(t if t is None else t.cpu() for t in (a, b, *args)), dtype))


def test_views_of_every_kind(device: str):
    q, weight, scale = linear_inputs(device)
    base = torch.randn(70, 300, device=device)
    for x in (base.t(), base.t()[::3], base[:, :280].reshape(-1, 70)[1::2], torch.randn(4, 141, device=device)[:, 71:]):
        assert x.shape[-1] == 70
        want = reference.int8_linear(x.cpu(), q.cpu(), scale.cpu())
        assert same_bits(ops.int8_linear(x, weight, scale).cpu(), want)
    a = torch.randint(-127, 128, (100, 80), dtype=torch.int8, device=device)
    for left, right in ((a.t(), a.t()), (a[:, 3:50], a[5:9, 3:50]), (a[1:], a[:, :])):
        assert torch.equal(ops.int8_matmul(left, right), reference.int8_matmul(left, right, out_dtype=torch.int32))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_is_a_sentence(device: str):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(4, 70, device=device)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        ops.int8_linear(torch.ones(4, 70, dtype=torch.int64, device=device), weight, scale)
    with pytest.raises(ValueError, match="x has K = 64 features, which needs a weight of 64 columns"):
        ops.int8_linear(x[:, :64], weight, scale)
    with pytest.raises(TypeError, match=r"weight is torch\.float32: it must be int8"):
        ops.int8_linear(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"weight_scale has shape \(7,\), but \(48,\) is needed"):
        ops.int8_linear(x, weight, scale[:7])
    with pytest.raises(ValueError, match=r"bias has shape \(1,\)"):
        ops.int8_linear(x, weight, scale, torch.ones(1, device=device))
    with pytest.raises(TypeError, match=r"out_dtype = torch\.float64"):
        ops.int8_linear(x, weight, scale, out_dtype=torch.float64)
    big = torch.zeros(1, 2**17, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="K = 131072: an int32 sum is exact only below"):
        ops.int8_matmul(big, big)
    with pytest.raises(ValueError, match="raw sum"):
        ops.int8_matmul(weight, weight, scale_b=scale, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a has K = 80 but b has K = 70"):
        ops.int8_matmul(weight, weight[:, :70])


@pytest.mark.gpu
def test_mixed_devices_are_a_sentence():
    _, weight, scale = linear_inputs("cuda")
    with pytest.raises(ValueError, match=r"x on cpu, weight on cuda:0.*move them"):
        ops.int8_linear(torch.randn(4, 70), weight, scale)
    with pytest.raises(ValueError, match="one device"):
        eager_linear(torch.randn(4, 70), weight, scale, None)
    with pytest.raises(ValueError, match="one device"):
        eager_linear(torch.randn(4, 70, device="cuda"), weight.cpu(), scale.cpu(), None)


# ---- torch's own checks --------------------------------------------------------------------------------------------


@dtypes
def test_opcheck(device: str, dtype: torch.dtype):
    q, weight, scale = linear_inputs(device)
    x = torch.randn(3, 5, 70, device=device).to(dtype)
    bias = torch.randn(48, device=device).to(dtype)
    ns = torch.ops.hwkern
    for args in ((x,), (x.transpose(0, 1),)):
        torch.library.opcheck(ns.quantize.default, args)
    for s, axis in ((torch.tensor(0.1), 0), (torch.rand(3, 5) + 0.1, 0), (torch.rand(70) + 0.1, -1)):
        torch.library.opcheck(ns.quantize.static, (x, s.to(device), axis))
        torch.library.opcheck(ns.dequantize.default, (q.new_ones(3, 5, 70), s.to(device), axis, dtype))
    torch.library.opcheck(ns.int8_matmul.default, (q, q))
    torch.library.opcheck(ns.int8_matmul.default, (q, q, scale, scale, bias, dtype))
    torch.library.opcheck(ns.int8_linear.default, (x, weight, scale))
    torch.library.opcheck(ns.int8_linear.default, (x.clone().requires_grad_(), weight, scale, bias.requires_grad_()))


class Layer(torch.nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.q, weight, scale = linear_inputs(device)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = torch.nn.Parameter(torch.randn(48, device=device))
        self.cell = ops.LaunchCell()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(eager_linear(x * 2, self.weight, self.scale, self.bias))


def test_compile_fullgraph_with_a_dynamic_batch(device: str):
    layer = Layer(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (3, 4, 9, 1):
            x = torch.randn(m, 70, device=device)
            assert torch.equal(compiled(x), layer(x))
    x = torch.randn(5, 70, device=device, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_export_with_a_dynamic_batch(device: str):
    layer = Layer(device)
    batch = torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(4, 70, device=device),), dynamic_shapes=({0: batch},))
    assert any("hwkern.int8_linear" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(11, 70, device=device)
    assert torch.equal(program.module()(x), layer(x))


def test_jit_trace_sees_the_operator(device: str):
    layer = Layer(device)
    traced = torch.jit.trace(layer, torch.randn(4, 70, device=device))
    assert "hwkern::int8_linear" in str(traced.graph)


def test_gradient_of_x_is_the_dequantized_weight_s(device: str):
    q, weight, scale = linear_inputs(device)
    x = torch.randn(2, 3, 70, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)
    for call in (lambda: ops.int8_linear(x, weight, scale, bias), lambda: eager_linear(x, weight, scale, bias)):
        grad = torch.randn(2, 3, 48, device=device)
        grad_x, grad_bias = torch.autograd.grad(call(), (x, bias), grad)
        torch.testing.assert_close(grad_x, grad @ reference.dequantize(q, scale))
        torch.testing.assert_close(grad_bias, grad.sum((0, 1)))


def test_gradient_of_the_scale_is_an_error_that_says_why(device: str):
    _, weight, scale = linear_inputs(device)
    y = eager_linear(torch.randn(2, 70, device=device), weight, scale.requires_grad_(), None)
    with pytest.raises(NotImplementedError, match="frozen; train an adapter"):
        y.sum().backward()


def test_gradient_of_the_weight_is_an_error(device: str):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(2, 70, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        torch.autograd.grad(ops.int8_linear(x, weight, scale).sum(), weight)


def test_inference_mode_and_no_grad(device: str):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(4, 70, device=device)
    want = ops.int8_linear(x, weight, scale)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(ops.int8_linear(x, weight, scale), want)
            assert torch.equal(eager_linear(x, weight, scale, None), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_output_dtype(device: str, dtype: torch.dtype):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(4, 70, device=device)
    for call in (ops.int8_linear, eager_linear):
        with torch.autocast(device, dtype=dtype):
            y = call(x, weight, scale, None)
        assert same_bits(y, ops.int8_linear(x, weight, scale, out_dtype=dtype))
        with torch.autocast(device, dtype=dtype), torch.autocast(device, enabled=False):
            assert call(x, weight, scale, None).dtype == torch.float32


def test_the_profiler_sees_the_operator(device: str):
    _, weight, scale = linear_inputs(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        eager_linear(torch.randn(4, 70, device=device), weight, scale, None)
    assert any(event.key == "hwkern::int8_linear" for event in profile.key_averages())


def test_fake_tensors_take_the_dispatcher(device: str):
    _, weight, scale = linear_inputs(device)
    x = torch.randn(4, 70, device=device)
    with torch._subclasses.FakeTensorMode() as mode:
        y = eager_linear(*(mode.from_tensor(t) for t in (x, weight, scale)), None)
    assert type(y) is torch._subclasses.FakeTensor
    assert y.shape == (4, 48)


def test_functional_transforms_are_refused_by_torch_not_computed_wrongly(device: str):
    _, weight, scale = linear_inputs(device)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda v: eager_linear(v, weight, scale, None).sum())(torch.randn(4, 70, device=device))


def norm_quantized(what: str) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return getattr(ops.norm_quantize(x, weight, residual=x, return_y=True), what)

    return call


# Of (x [4, 70], vector [70]): float results of operators without a gradient.
WITHOUT_GRADIENT = {
    "quantize": lambda x, vector: ops.quantize(x)[1],
    "quantize, then dequantize": lambda x, vector: ops.dequantize(*ops.quantize(x)),
    "dequantize": lambda x, vector: ops.dequantize(torch.ones_like(x, dtype=torch.int8), x[:, 0]),
    "dequantize columns": lambda x, vector: ops.dequantize(torch.ones_like(x, dtype=torch.int8), vector * x[0], -1),
    **{f"norm_quantize {what}": norm_quantized(what) for what in ("scale", "h", "y")},
    "norm_quantize to the weight": lambda x, vector: norm_quantized("y")(x.detach(), vector * x[0]),
    "activation_quantize": lambda x, vector: ops.activation_quantize(x)[1],
    "int8_embedding": lambda x, vector: ops.int8_embedding(
        torch.arange(4, device=x.device), torch.ones(4, 16, dtype=torch.int8, device=x.device), x[:, 0]
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, of vmap over any operator
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_what_has_no_gradient_says_so_wherever_one_is_asked_for(device: str, name: str):
    call, vector = WITHOUT_GRADIENT[name], torch.rand(70, device=device) + 1
    x = torch.rand(4, 70, device=device, requires_grad=True)
    y = call(x, vector)
    with torch.no_grad():
        want = call(x, vector)
    assert torch.equal(y, want)
    assert not want.requires_grad
    for loss in (y.sum(), (x + 1).sum() + y.sum()):  # nor is a part of a gradient missing
        with pytest.raises(NotImplementedError, match="has no gradient"):
            loss.backward()
    plain = x.detach()
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        several = plain if transform is torch.func.grad else plain[None]
        with pytest.raises(NotImplementedError, match="has no gradient"):
            transform(lambda v: call(v, vector).sum())(several)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda v: call(v, vector), (plain,), (plain,))
    assert torch.equal(torch.func.vmap(lambda v: call(v, vector))(plain[None])[0], want)


def test_int8_values_are_not_differentiable_and_need_no_gradient_of_what_made_them(device: str):
    x = torch.randn(4, 70, device=device, requires_grad=True)
    q, scale = ops.quantize(x)
    assert not q.requires_grad
    assert not ops.quantize(x, torch.ones(1, device=device))[0].requires_grad
    (q.float().sum() * x + scale.detach().sum()).sum().backward()
    assert torch.equal(x.grad, q.float().sum().expand_as(x))


@pytest.mark.filterwarnings("ignore:At pre-dispatch tracing")  # torch 2.4's export, of any operator
def test_what_has_no_gradient_is_compiled_and_exported_all_the_same(device: str):
    class Quantize(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(70, device=device))

        def forward(self, x: Tensor) -> Tensor:
            return ops.dequantize(*ops.quantize(x * self.factor))

    module, x = Quantize(), torch.randn(4, 70, device=device)
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    for strict in (True, False):
        program = torch.export.export(module, (x,), strict=strict)
        assert "hwkern.quantize.default" in str(program.graph)
        assert torch.equal(program.module()(x), module(x))


def test_layers_survive_copy_and_pickle(device: str):
    layer = Layer(device)
    x = torch.randn(4, 70, device=device)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(layer)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), layer(x))


# ---- CUDA only -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@dtypes
def test_cuda_and_cpu_give_the_same_bits(dtype: torch.dtype):
    _, weight, scale = linear_inputs("cpu", n=777, k=1000)
    x, bias = torch.randn(333, 1000).to(dtype), torch.randn(777).to(dtype)
    on_cuda = ops.int8_linear(*(t.cuda() for t in (x, weight, scale, bias)))
    assert same_bits(on_cuda.cpu(), ops.int8_linear(x, weight, scale, bias))


@pytest.mark.gpu
def test_cuda_graph_replays_with_changed_inputs():
    _, weight, scale = linear_inputs("cuda")
    x = torch.randn(33, 70, device="cuda")
    eager_linear(x, weight, scale, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = eager_linear(x, weight, scale, None)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, ops.int8_linear(x, weight, scale))


@pytest.mark.gpu
def test_work_is_queued_on_the_current_stream():
    """A slow kernel that fills x first: on another stream the linear would read x before it."""
    _, weight, scale = linear_inputs("cuda")
    stream = torch.cuda.Stream()
    target = torch.randn(64, 70, device="cuda")
    want = ops.int8_linear(target, weight, scale)
    x = torch.zeros_like(target)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(target)
        y = eager_linear(x, weight, scale, None)
    stream.synchronize()
    assert torch.equal(y, want)


def test_a_bias_cast_twice_back_to_its_first_address_is_read_again(monkeypatch: pytest.MonkeyPatch):
    """Only addresses and dtypes are compared, so tensors of the CPU can stand for CUDA's."""
    monkeypatch.setattr(_launch_cell, "extension", lambda: SimpleNamespace(linear=None, weight_only_linear=None))
    _, weight, scale = linear_inputs("cpu")
    memory = torch.zeros(48)
    cell = ops.LaunchCell()
    assert not cell.holds(weight, scale, memory)
    assert cell.read(weight, scale, memory)
    assert cell.holds(weight, scale, memory)
    half = memory.view(torch.bfloat16)[:48]
    assert half.data_ptr() == memory.data_ptr()
    assert not cell.holds(weight, scale, half)
    assert not cell.holds(weight, scale, None)
    assert not cell.holds(weight, scale.clone(), memory)
    assert not cell.holds(weight.clone(), scale, memory)
    assert cell.read(weight, scale, None)
    assert cell.holds(weight, scale, None)
    assert not cell.holds(weight, scale, memory)


def test_a_cell_takes_only_what_the_checks_would_pass_and_the_kernels_can_read(monkeypatch: pytest.MonkeyPatch):
    """What it takes is launched without another look: nothing that the checks refuse may be among it."""
    monkeypatch.setattr(_launch_cell, "extension", lambda: SimpleNamespace(linear=None, weight_only_linear=None))
    x, weight, scale, bias = torch.randn(3, 64), torch.ones(48, 64, dtype=torch.int8), torch.ones(48), torch.ones(48)
    takes = _launch_cell.cell_for
    assert takes(x, 64, weight, scale, bias)
    assert takes(x.half(), 64, weight, scale, None)
    assert takes(x[:, :50], 50, weight, scale, bias)  # K = 50 has 64 columns
    known = takes(x, 64, weight, scale, None)
    assert known is takes(x.half(), 64, weight, scale, None)  # of the same tensors: remembered
    assert known is not takes(x, 64, weight, scale.clone(), None)
    assert known is not takes(x, 64, weight.clone(), scale, None)
    for wrong in (
        (x.double(), 64, weight, scale, bias),
        (x.double(), 64, weight, scale, None),
        (x[:, :48], 48, weight, scale, None),
        (x[:, :0], 0, weight, scale, None),
        (x.to(torch.int8), 64, weight, scale, bias),
        (x[:, :48], 48, weight, scale, bias),
        (x[:, :0], 0, weight[:, :0], scale, bias),
        (torch.randn(3, ops.K_MAX + 1), ops.K_MAX + 1, torch.ones(2, ops.K_MAX + 1, dtype=torch.int8), scale[:2], None),
        (x, 64, weight.float(), scale, bias),
        (x, 64, weight[0], scale, bias),
        (x, 64, weight.t().contiguous().t(), scale, bias),
        (x, 64, torch.ones(48 * 64 + 1, dtype=torch.int8)[1:].view(48, 64), scale, bias),
        (x, 64, weight, scale.double(), bias),
        (x, 64, weight, scale[:1], bias),
        (x, 64, weight, scale[:1], None),
        (x, 64, weight, torch.ones(96)[::2], bias),
        (x, 64, weight, scale, bias[:47]),
        (x, 64, weight, scale, bias.double()),
        (x, 64, weight, scale, torch.ones(96)[::2]),
    ):
        assert takes(*wrong) is None, [getattr(w, "shape", w) for w in wrong]
    known = takes(x, 64, weight, scale, None)
    weight.data = weight.data.clone()  # elsewhere
    moved = takes(x, 64, weight, scale, None)
    assert moved is not known
    assert moved.weight_pointer == weight.data_ptr()
    kept = weight.data, scale.data
    for other in (
        (kept[0].t(), kept[1]),
        (kept[0].view(torch.uint8), kept[1]),
        (kept[0], kept[1].view(torch.int32)),
        (kept[0], kept[1][:1].expand(48)),
        (kept[0], kept[1][:, None]),
    ):  # in place, at the same addresses
        assert takes(x, 64, weight, scale, None)
        weight.data, scale.data = other
        assert takes(x, 64, weight, scale, None) is None
        weight.data, scale.data = kept
    scale.data = scale.data[:40]  # at the same address
    assert takes(x, 64, weight, scale, None) is None
    weight.data = weight.data[:40]
    assert takes(x, 64, weight, scale, None).n == 40
    remembered = len(_launch_cell._cells)
    del weight, wrong
    assert len(_launch_cell._cells) == remembered - 1


def test_a_layer_s_weight_counts_as_constant_from_its_second_call_on(monkeypatch: pytest.MonkeyPatch):
    """A CUDA graph is captured after one call, as a rule: what that call does not know stays unknown in the graph."""

    class Cell:  # holds() as LaunchCell's: false until read() was called
        read_once = False

        def holds(self, *tensors: Tensor | None) -> bool:
            return self.read_once

        def read(self, *tensors: Tensor | None) -> bool:
            self.read_once = True
            return True

    launched: list[bool] = []
    monkeypatch.setattr(ops, "_is_plain", lambda *_: True)
    monkeypatch.setattr(ops, "_fits_cuda", lambda *_: True)
    monkeypatch.setattr(ops, "_launch_cell", lambda x, cell, weight, constant, dtype: launched.append(constant))
    x = SimpleNamespace(is_cuda=True, requires_grad=False, dtype=torch.bfloat16)
    cell, scale = Cell(), torch.ones(2)
    for weight in (torch.zeros(2, 16, dtype=torch.int8), torch.zeros(2, 16, dtype=torch.int8)):
        cell.read_once = False
        for _ in range(3):
            ops.eager_linear(x, weight, scale, None, 16, cell)  # type: ignore[arg-type]
    assert launched == [False, True, True] * 2


def test_the_operators_of_inference_are_in_cpp_where_torch_has_what_they_call():
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    native = _native.extension()
    assert (native.built_with_cuda and torch.version.cuda is not None and version >= (2, 10)) == _no_grad.IN_CPP
    assert not native.register_torch_ops("/nowhere/libtorch_cpu.so", "/nowhere/libtorch_cuda.so")


WITHOUT_ROOM = """
import ctypes, sys, torch
from hwkern import _fused_linear, _native
ctypes.CDLL(sys.argv[1])
assert _native.extension().register_torch_ops(sys.argv[1], sys.argv[1])
x, weight, scale = torch.randn(2, 16), torch.ones(16, 16, dtype=torch.int8), torch.ones(16)
calls = {
    "linear": (x, weight, scale, None, False),
    "norm_linear": (x, weight, scale, None, None, None, 1, 1e-6, 0.0, False),
    "norm_mlp": (x, x, weight, scale, None, None, None, 1, 1e-6, 0.0, False, 4, False, weight, scale, None, False),
    "activation_linear": (x, 4, False, weight, scale, None, None),
    "embedding": (torch.tensor([1]), 16, weight, scale, 0),
}
for name, arguments in calls.items():
    operator = getattr(torch.ops.hwkern, name + "_no_grad").default
    for call in (operator, torch.compile(lambda *given: operator(*given), backend="aot_eager")):
        try:
            with torch.no_grad():
                call(*arguments)
        except RuntimeError as error:
            print(name, type(error).__name__, *error.args)
"""


def test_no_room_in_an_operator_in_cpp_is_torch_s_own_error(tmp_path: Path):
    """Who makes room and tries again catches torch.OutOfMemoryError, or looks for the first words of its message."""
    if not _native.extension().built_with_cuda or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        pytest.skip("its operators of inference are in Python here")
    compiler, folder = os.environ.get("CXX", "c++"), Path(torch.__file__).parent / "lib"
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    source, library = Path(__file__).with_name("torch_without_room.cpp"), tmp_path / "torch_without_room.so"
    subprocess.run(
        [compiler, "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", source, "-o", library,
         "-Wl,--no-as-needed", f"-L{folder}", "-ltorch_cpu", f"-Wl,-rpath,{folder}"], check=True,
    )  # fmt: skip
    command = [sys.executable, "-c", WITHOUT_ROOM, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line.split("memory.")[0] for line in done.stdout.splitlines()]
    names = ("linear", "norm_linear", "norm_mlp", "activation_linear", "embedding")
    assert said == [f"{name} OutOfMemoryError CUDA out of " for name in names for _ in range(2)]


@pytest.mark.parametrize("only", [False, True])
def test_the_operator_of_inference_has_the_bits_of_the_differentiable_ones(device: str, only: bool):
    x = torch.randn(5, 70, device=device, dtype=torch.bfloat16)
    weight, scale = ops.pad_weight(torch.randint(-127, 128, (48, 70), dtype=torch.int8)).to(device), torch.rand(48)
    scale, bias = scale.to(device), torch.randn(48, device=device)
    call = torch.ops.hwkern.linear_no_grad.default
    with torch.no_grad():
        want = (ops.weight_only_linear if only else ops.int8_linear)(x, weight, scale, bias)
        assert torch.equal(call(x, weight, scale, bias, only), want)
        torch.library.opcheck(call, (x, weight, scale, bias, only), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="has no gradient"):
        call(x, weight, scale, bias, only)


@pytest.mark.gpu
def test_a_layer_s_new_addresses_are_seen():
    """The cell remembers addresses; each of the three tensors may move, or be replaced, between two calls."""
    layer = Layer("cuda")
    x = torch.randn(5, 70, device="cuda")
    layer(x)
    for name in ("weight", "scale", "bias"):
        tensor = getattr(layer, name)
        keep_the_old_address_taken = tensor.data
        tensor.data = torch.roll(tensor.data, 1, 0)
        want = torch.relu(ops.int8_linear(x * 2, layer.weight, layer.scale, layer.bias))
        assert torch.equal(layer(x), want), name
        del keep_the_old_address_taken
    layer.cell = ops.LaunchCell()
    layer.bias = None
    assert torch.equal(layer(x), torch.relu(ops.int8_linear(x * 2, layer.weight, layer.scale)))


@pytest.mark.gpu
def test_a_second_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    _, weight, scale = linear_inputs("cpu")
    x = torch.randn(64, 70)
    want = ops.int8_linear(x, weight, scale)
    assert torch.cuda.current_device() == 0
    y = eager_linear(x.to("cuda:1"), weight.to("cuda:1"), scale.to("cuda:1"), None)
    assert y.device == torch.device("cuda:1")
    assert same_bits(y.cpu(), want)
    q, s = ops.quantize(x.to("cuda:1"))
    assert same_bits(ops.dequantize(q, s).cpu(), ops.dequantize(*ops.quantize(x)))
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_every_config_id_through_the_operator():
    import test_gemm

    q, weight, scale = linear_inputs("cuda", n=200, k=300)
    x = torch.randn(150, 300, device="cuda")
    want = reference.int8_linear(x.cpu(), q.cpu(), scale.cpu())
    for config in test_gemm.RUNNABLE:
        assert same_bits(ops.int8_linear(x, weight, scale, config=config["id"]).cpu(), want)
    with pytest.raises(ValueError, match="unknown config id"):
        ops.int8_linear(x, weight, scale, config=999)


def test_importing_ops_twice_in_two_interpreters_is_harmless():
    code = "import hwkern.ops, torch; print(torch.ops.hwkern.int8_linear.default)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hwkern.int8_linear" in result.stdout
