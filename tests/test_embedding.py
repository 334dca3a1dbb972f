"""int8_embedding: rows of an int8 table on the CPU and on CUDA, against reference.py bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_helpers import FLOATS, REDUCED, Guarded, same_bits
from torch._dynamo import lookup_backend

from hwkern import _embedding, _native, _no_grad, ops, reference
from hwkern.nn import Int8Embedding
from hwkern.ops import DTYPES

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)

# H around a vector (4, 8), a padded row (16), a warp's row with one and with four vectors a lane, and a block's.
H = [1, 17, 300, 1032] if REDUCED else [1, 3, 4, 8, 15, 16, 17, 64, 127, 256, 300, 768, 1024, 1032, 2048, 4100, 5120]
# Tokens: one; no more than SMs; up to four an SM; more.
M = [1, 37] if REDUCED else [1, 7, 131, 500, 1300]


def table(rows: int, h: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[V, H]`` over the whole int8 range (no kernel may count on -127), scales from subnormal products to large."""
    weight = torch.randint(-128, 128, (rows, h), dtype=torch.int8)
    return weight, torch.logspace(-38, 4, rows)


@dtypes
@pytest.mark.parametrize("h", H)
@pytest.mark.sanitizer
def test_every_width_has_the_reference_s_bits(device: str, dtype: torch.dtype, h: int):
    weight, scale = table(211, h)
    packed = ops.pad_weight(weight)
    packed[:, h:] = 77  # what the padding holds is nobody's business
    for m in M:
        indices = torch.randint(0, 211, (m,))
        for kind in (torch.int64, torch.int32):
            y = ops.int8_embedding(indices.to(device, kind), packed.to(device), scale.to(device), dtype, h)
            assert same_bits(y.cpu(), reference.int8_embedding(indices, weight, scale, dtype))


@dtypes
def test_rows_wider_than_a_block_takes_at_once(device: str, dtype: torch.dtype):
    for h in (20000, 40000):
        weight, scale = table(5, h)
        indices = torch.tensor([4, 0, 2])
        y = ops.int8_embedding(indices.to(device), weight.to(device), scale.to(device), dtype)
        assert same_bits(y.cpu(), reference.int8_embedding(indices, weight, scale, dtype))


@dtypes
def test_it_is_the_dequantized_table_s_row(device: str, dtype: torch.dtype):
    """The very numbers that a head with the same int8 weight multiplies with."""
    weight, scale = (t.to(device) for t in ops.quantize(torch.randn(50, 64)))
    indices = torch.randint(0, 50, (9,), device=device)
    assert same_bits(
        ops.int8_embedding(indices, weight, scale, dtype), ops.dequantize(weight, scale, 0, dtype)[indices]
    )


@pytest.mark.sanitizer
def test_any_shape_and_strides_of_indices(device: str):
    weight, scale = (t.to(device) for t in table(40, 48))
    base = torch.randint(0, 40, (6, 10), device=device)
    for indices in (base, base.t(), base[:, ::3], base[0, 0], base[:0], base.view(2, 3, 10), base.expand(2, 6, 10)):
        y = ops.int8_embedding(indices, weight, scale)
        assert same_bits(y, reference.int8_embedding(indices, weight, scale))


def test_a_table_with_other_strides_is_taken(device: str):
    weight, scale = (t.to(device) for t in table(64, 64))
    indices = torch.tensor([0, 63, 5], device=device)
    for view in (weight.t(), weight[:, :32], weight.flatten()[5 : 5 + 63 * 64].view(63, 64)):
        rows = view.shape[0]
        y = ops.int8_embedding(indices.clamp_max(rows - 1), view, scale[:rows])
        assert same_bits(y, reference.int8_embedding(indices.clamp_max(rows - 1), view, scale[:rows]))


def test_a_nan_scale_stays_in_its_row(device: str):
    weight, scale = (t.to(device) for t in table(4, 16))
    scale[2] = float("nan")
    y = ops.int8_embedding(torch.arange(4, device=device), weight, scale)
    assert y.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_an_index_outside_is_an_error_that_names_it_on_the_cpu(bad: int):
    weight, scale = table(40, 16)
    for indices in (torch.tensor([[1, bad], [2, 3]]), torch.full((70000,), bad)):
        with pytest.raises(
            IndexError, match=rf"The index {bad} is outside of this embedding: it has the rows 0 … 39\."
        ):
            ops.int8_embedding(indices, weight, scale)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    ["int8_embedding.default(indices, weight, scale)", "embedding_no_grad.default(indices, 16, weight, scale, 0)"],
)
def test_an_index_outside_is_a_device_assertion_on_cuda(call: str):
    """In a process of its own: an assertion ends the CUDA context."""
    code = f"""
        import torch
        import hwkern.ops
        weight, scale = torch.zeros(40, 16, dtype=torch.int8, device="cuda"), torch.ones(40, device="cuda")
        indices = torch.tensor([1, 40], device="cuda")
        with torch.no_grad():
            torch.ops.hwkern.{call}
        torch.cuda.synchronize()
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode != 0
    assert "device-side assert" in run.stderr
    assert "0 <= index && index < num_embeddings" in run.stdout + run.stderr


@pytest.mark.gpu
@dtypes
@pytest.mark.sanitizer
def test_nothing_past_the_output_is_written(dtype: torch.dtype):
    """Rows of y with a pitch, aligned and not: what lies between and around them stays."""
    for h, pitch, offset in ((64, 64, 0), (64, 72, 0), (64, 67, 0), (64, 64, 1), (61, 61, 0), (1000, 1024, 0)):
        weight, scale = (t.cuda() for t in table(29, h))
        packed = ops.pad_weight(weight)
        indices = torch.randint(0, 29, (33,), device="cuda")
        y = Guarded(33, h, dtype, pitch, offset)
        _native.extension().embedding(
            indices.data_ptr(), True, packed.data_ptr(), packed.shape[1], scale.data_ptr(), y.pointer(),
            DTYPES[dtype], pitch, 33, 29, h, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        y.assert_untouched_outside()
        assert same_bits(y.value.contiguous(), reference.int8_embedding(indices, weight, scale, dtype))


@pytest.mark.gpu
def test_a_graph_reads_the_indices_of_now_and_waits_for_who_writes_them():
    """Indices from the kernel before, and a linear behind: launches overlap and still see each other's results."""
    weight, scale = ops.quantize(torch.randn(1000, 512, device="cuda"))
    layer = ops.quantize(torch.randn(512, 512, device="cuda"))
    source = torch.zeros(64, dtype=torch.int64, device="cuda")

    def step() -> torch.Tensor:
        x = ops.int8_embedding(source + 1, weight, scale, torch.bfloat16)
        return ops.int8_linear(x, *layer)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for _ in range(20):
        source.copy_(torch.randint(0, 999, (64,)))
        graph.replay()
        x = reference.int8_embedding(source + 1, weight, scale, torch.bfloat16)
        assert same_bits(y, reference.int8_linear(x, *layer))


@pytest.mark.gpu
def test_a_table_beyond_32_bits_of_bytes():
    rows = 2**19 + 3  # × 4112 = 2.16e9 bytes: a row's offset needs 64 bits
    weight = torch.zeros(rows, 4112, dtype=torch.int8, device="cuda")
    weight[-1] = 5
    scale = torch.full((rows,), 0.5, device="cuda")
    y = ops.int8_embedding(torch.tensor([0, rows - 1], device="cuda"), weight, scale, torch.float16)
    assert y[0].eq(0).all()
    assert y[1].eq(2.5).all()


def test_arguments_that_cannot_be_are_refused(device: str):
    weight, scale = (t.to(device) for t in table(8, 16))
    indices = torch.zeros(2, dtype=torch.int64, device=device)
    for arguments, error, sentence in (
        ((indices.float(), weight, scale), TypeError, "indices are torch.float32"),
        ((indices, weight.float(), scale), TypeError, "weight is torch.float32"),
        ((indices, weight[0], scale), ValueError, r"weight has shape \(16,\)"),
        ((indices, weight[:, :12], scale), ValueError, "rows of 12 elements need a weight of 16 columns"),
        ((indices, weight, scale, None, 20), ValueError, "rows of 20 elements need a weight of 32 columns"),
        ((indices, weight, scale[:7]), ValueError, r"weight_scale has shape \(7,\)"),
        ((indices, weight, scale.half()), TypeError, "weight_scale is torch.float16"),
        ((indices, weight, scale, torch.float64), TypeError, "out_dtype = torch.float64"),
    ):
        with pytest.raises(error, match=sentence):
            ops.int8_embedding(*arguments)


def test_opcheck(device: str):
    weight, scale = (t.to(device) for t in table(30, 17))
    arguments = (torch.randint(0, 30, (2, 3), device=device), ops.pad_weight(weight), scale, torch.bfloat16, 17)
    torch.library.opcheck(torch.ops.hwkern.int8_embedding.default, arguments)


def test_the_module_s_way_gives_the_operator_s_bits(device: str):
    weight, scale = table(30, 17)
    packed, scale = ops.pad_weight(weight).to(device), scale.to(device)
    for indices in (
        torch.randint(0, 30, (2, 3)),
        torch.randint(0, 30, (4, 5)).t(),
        torch.tensor(3),
        torch.zeros(0).int(),
    ):
        cell = ops.TableCell()
        for dtype in FLOATS:
            y = ops.eager_embedding(indices.to(device), packed, scale, dtype, 17, cell)
            assert same_bits(y.cpu(), reference.int8_embedding(indices, weight, scale.cpu(), dtype))
    with pytest.raises(ValueError, match="rows of 17 elements"):
        ops.eager_embedding(torch.zeros(1).long().to(device), packed[:, :16], scale, torch.float32, 17, ops.TableCell())


# ---- the operator of inference -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every call that the layer's way makes of the operator of inference."""
    found: list[tuple[Any, ...]] = []
    real = _embedding.embedding_no_grad

    def recorded(*arguments: Any) -> torch.Tensor:
        found.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(_embedding, "embedding_no_grad", recorded)
    return found


def inference(
    indices: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, h: int
) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = _no_grad.embedding_no_grad(indices, h, weight, scale, DTYPES[dtype])
    return y


@dtypes
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
@pytest.mark.sanitizer
def test_the_operator_of_inference_has_the_public_one_s_bits(device: str, dtype: torch.dtype, kind: torch.dtype):
    for h in (1, 17, 300, 1032, 4100):
        weight, scale = table(211, h)
        packed, scale = ops.pad_weight(weight).to(device), scale.to(device)
        base = torch.randint(0, 211, (6, 10), device=device, dtype=kind)
        many = torch.randint(0, 211, (1300,), device=device, dtype=kind)
        strided = (base.t(), base[:, ::3], base.expand(2, 6, 10), base[1:, 3:])
        for indices in (base, many, base[0, 0], base[:0], base[:, :0], *strided):
            y = inference(indices, packed, scale, dtype, h)
            want = ops.int8_embedding(indices, packed, scale, dtype, h)
            assert (y.dtype, y.shape, y.stride(), y.device) == (dtype, want.shape, want.stride(), want.device)
            assert same_bits(y, want)
            assert same_bits(y.cpu(), reference.int8_embedding(indices.cpu(), weight, scale.cpu(), dtype))


def test_the_operator_of_inference_takes_a_table_with_other_strides(device: str):
    weight, scale = (t.to(device) for t in table(64, 64))
    every_other = torch.stack((scale, scale), 1)[:, 0]
    indices = torch.tensor([0, 62, 5], device=device)
    for view in (weight.t(), weight[:, :32], weight.flatten()[5 : 5 + 63 * 64].view(63, 64)):
        rows, h = view.shape
        y = inference(indices, view, every_other[:rows], torch.float16, h)
        assert same_bits(y, reference.int8_embedding(indices, view, scale[:rows], torch.float16))


def test_the_operator_of_inference_passes_torchs_own_checks_and_has_no_gradient(device: str):
    weight, scale = (t.to(device) for t in table(30, 17))
    indices = torch.randint(0, 30, (2, 3), device=device)
    call = torch.ops.hwkern.embedding_no_grad.default
    arguments = (indices, 17, ops.pad_weight(weight), scale, DTYPES[torch.bfloat16])
    for given in (indices, indices[:, :0], indices.t()):
        with torch.no_grad():
            torch.library.opcheck(call, (given, *arguments[1:]), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="has no gradient"):
        call(*arguments)


@pytest.mark.gpu
def test_the_operator_of_inference_refuses_what_does_not_fit_and_keeps_nothing_of_it():
    if not _no_grad.IN_CPP:
        pytest.skip("this torch has no stable C functions: the operators are Python")
    weight, scale = (t.cuda() for t in table(48, 64))
    indices = torch.randint(0, 48, (2, 3), device="cuda")
    call = _no_grad.embedding_no_grad
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((indices.float(), 64, weight, scale, 0), "int64 or int32"),
        ((indices.short(), 64, weight, scale, 0), "int64 or int32"),
        ((indices.cpu(), 64, weight, scale, 0), "one device"),
        ((indices, 64, weight.cpu(), scale, 0), "one device"),
        ((indices, 64, weight, scale.cpu(), 0), "one device"),
        ((indices, 40, weight, scale, 0), "K16"),
        ((indices, 0, weight, scale, 0), "K must be in"),
        ((indices, 2**17, weight, scale, 0), "K must be in"),
        ((indices, 64, weight.float(), scale, 0), "int8"),
        ((indices, 64, weight[0], scale, 0), "int8"),
        ((indices, 64, weight, scale.double(), 0), "float32"),
        ((indices, 64, weight, scale[:40], 0), "one element per row"),
        ((indices, 64, weight[:0], scale[:0], 0), "N >= 1"),
        ((indices, 64, weight, scale, DTYPES[torch.int8]), "float32, float16 or bfloat16"),
        ((indices, 64, weight, scale, -1), "float32, float16 or bfloat16"),
    ]
    with torch.no_grad():
        for arguments, sentence in wrong:
            with pytest.raises(ValueError, match=sentence):
                call(*arguments)
        del wrong, arguments
        with torch.enable_grad(), pytest.raises(RuntimeError, match="has no gradient"):
            call(indices, 64, weight, scale, 0)
        held = [t.untyped_storage() for t in (indices, weight, scale)]
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for given in (indices, indices.int(), indices.t(), indices[:0]):
            for _ in range(3):
                call(given, 64, weight, scale, 1)
        del given
        assert torch.cuda.memory_allocated() == before
        counts = [torch._C._storage_Use_Count(s._cdata) for s in held]
        assert counts == [2] * len(held)  # the tensor, and the storage in `held`


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_a_graph_of_the_operator_of_inference_reads_the_indices_of_now(kind: torch.dtype):
    weight, scale = ops.quantize(torch.randn(1000, 512, device="cuda"))
    source = torch.zeros(8, 16, dtype=kind, device="cuda")

    def step() -> list[torch.Tensor]:
        return [inference(i, weight, scale, torch.bfloat16, 512) for i in (source + 1, source.t())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(20):
        source.copy_(torch.randint(0, 999, (8, 16)))
        graph.replay()
        for y, indices in zip(found, (source + 1, source.t()), strict=True):
            assert same_bits(y, reference.int8_embedding(indices, weight, scale, torch.bfloat16))


@pytest.mark.gpu
def test_the_operator_of_inference_on_a_second_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    weight, scale = table(48, 64)
    indices = torch.randint(0, 48, (5,))
    y = inference(indices.to("cuda:1"), weight.to("cuda:1"), scale.to("cuda:1"), torch.float16, 64)
    assert y.device == torch.device("cuda:1")
    assert same_bits(y.cpu(), reference.int8_embedding(indices, weight, scale, torch.float16))
    assert torch.cuda.current_device() == 0


def test_cpp_takes_what_is_on_cuda_and_records_nothing(monkeypatch: pytest.MonkeyPatch):
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    on_cpu: Any = SimpleNamespace(is_cuda=False)
    monkeypatch.setattr(_embedding, "IN_CPP", True)
    assert not _embedding._takes_cpp(on_cuda)
    with torch.no_grad():
        assert _embedding._takes_cpp(on_cuda)
        assert not _embedding._takes_cpp(on_cpu)
        monkeypatch.setattr(_embedding, "IN_CPP", False)
        assert not _embedding._takes_cpp(on_cuda)


def test_the_module_s_way_asks_cpp_and_speaks_in_the_public_operator_s_errors(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[Any, ...]]
):
    """On the CPU, where the operator is Python: which one is called, and what is said when it refuses."""
    monkeypatch.setattr(_embedding, "_takes_cpp", lambda _: not torch.is_grad_enabled())
    weight, scale = table(30, 17)
    packed, indices, cell = ops.pad_weight(weight), torch.randint(0, 30, (4, 5)).t(), ops.TableCell()
    with torch.no_grad():
        for dtype in FLOATS:
            y = ops.eager_embedding(indices, packed, scale, dtype, 17, cell)
            assert same_bits(y, reference.int8_embedding(indices, weight, scale, dtype))
        assert [(arguments[1], arguments[4]) for arguments in calls] == [(17, DTYPES[dtype]) for dtype in FLOATS]
        with pytest.raises(ValueError, match="rows of 17 elements"):
            ops.eager_embedding(indices, packed[:, :16], scale, torch.float32, 17, cell)
        assert len(calls) == 4
        with pytest.raises(TypeError, match=r"out_dtype = torch\.float64"):
            ops.eager_embedding(indices, packed, scale, torch.float64, 17, cell)
    ops.eager_embedding(indices, packed, scale, torch.float32, 17, cell)
    assert len(calls) == 4


@pytest.mark.gpu
def test_a_layer_s_lookup_without_a_gradient_is_one_call_of_cpp(calls: list[tuple[Any, ...]]):
    weight, scale = table(30, 17)
    packed, on_gpu = ops.pad_weight(weight).cuda(), scale.cuda()
    cell = ops.TableCell()
    for indices in (torch.randint(0, 30, (2, 3)), torch.randint(0, 30, (4, 5)).int().t(), torch.zeros(0).long()):
        calls.clear()
        with torch.no_grad():
            y = ops.eager_embedding(indices.cuda(), packed, on_gpu, torch.bfloat16, 17, cell)
        assert same_bits(y.cpu(), reference.int8_embedding(indices, weight, scale, torch.bfloat16))
        assert len(calls) == _no_grad.IN_CPP
    with torch.no_grad(), pytest.raises(TypeError, match=r"indices are torch\.float32"):
        ops.eager_embedding(torch.zeros(1, device="cuda"), packed, on_gpu, torch.bfloat16, 17, cell)


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_break(device: str, dynamic: bool, grad: bool):
    """And without a gradient to the operator of inference."""
    torch._dynamo.reset()  # it counts what all of these compile against one limit
    weight, scale = (t.to(device) for t in table(30, 32))
    names: set[str] = set()

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        names.update(str(node.target) for node in graph.graph.nodes if "hwkern" in str(node.target))
        compiled: Callable[..., Any] = lookup_backend("aot_eager")(graph, example)
        return compiled

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def step(indices: torch.Tensor) -> torch.Tensor:
        return ops.eager_embedding(indices, weight, scale, torch.float32, 32, ops.TableCell()) + 1

    for m in (3, 4, 9):
        indices = torch.randint(0, 30, (2, m), device=device)
        with torch.set_grad_enabled(grad):
            assert torch.equal(step(indices), reference.int8_embedding(indices, weight, scale) + 1)
    assert names == {"hwkern.int8_embedding.default" if grad else "hwkern.embedding_no_grad.default"}


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_the_public_operator(strict: bool):
    layer = Int8Embedding.from_float(torch.nn.Embedding(30, 17))
    indices = torch.randint(0, 30, (2, 3))
    with torch.no_grad():
        graph = torch.export.export(layer, (indices,), strict=strict).graph
    names = [str(node.target) for node in graph.nodes if "hwkern" in str(node.target)]
    assert names == ["hwkern.int8_embedding.default"]
