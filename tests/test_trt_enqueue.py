"""The IPluginV3 library on a GPU, run by trt_harness.cpp as TensorRT would: the same bits as torch's operators."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trt_harness as ht
from kernel_helpers import REDUCED, configs, runs_here, same_bits
from torch import Tensor
from trt_harness import Field, Harness, Plugin, T, integer, text

from hwkern import _native, ops

pytestmark = pytest.mark.gpu

TYPES = {
    torch.float32: ht.FLOAT,
    torch.float16: ht.HALF,
    torch.bfloat16: ht.BF16,
    torch.int8: ht.INT8,
    torch.int32: ht.INT32,
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 256
WHOLE_LINEARS = [row for row in configs("w8a8_linear") if runs_here(row)]

# (M, N, K): one row; odd K; tails in every dimension; many tiles.
SHAPES = [(1, 64, 100), (5, 130, 33)] if REDUCED else [(1, 64, 100), (5, 130, 33), (77, 512, 1000), (640, 1096, 2048)]


def harness_path(folder: Path) -> Path:
    headers = {v: f for v, f in ht.header_folders().items() if int(v.split(".")[0]) >= 10}
    cuda = ht.cuda_include()
    if not headers or cuda is None:
        pytest.skip("no NvInferRuntime.h of TensorRT 10 or newer here: name a folder in HWKERN_TENSORRT_HEADERS")
    return ht.compile_harness(headers[max(headers, key=lambda v: tuple(map(int, v.split("."))))], cuda, folder)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    plugin = _native.tensorrt_plugins().get("libhwkern_trt.so")
    if plugin is None:
        pytest.skip("this build of hwkern has no libhwkern_trt.so: it comes with GPU kernels on Linux")
    made = Harness(harness_path(tmp_path_factory.mktemp("trt")), plugin)
    yield made
    made.close()


class Layer:
    """Random inputs of one LinearInt8, and what torch makes of them."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, bias: torch.dtype | None = None) -> None:
        self.m, self.n, self.k = m, n, k
        self.x = torch.randn(m, k, device="cuda").to(dtype)
        q, self.scale = ops.quantize(torch.randn(n, k, device="cuda"))
        self.weight = ops.pad_weight(q)
        self.bias = None if bias is None else torch.randn(n, device="cuda").to(bias)

    def want(self, x: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return ops.int8_linear(self.x if x is None else x, self.weight, self.scale, self.bias, dtype)

    def inputs(self, int32: bool = False) -> list[Tensor]:
        weight = self.weight.view(torch.int32) if int32 else self.weight
        return [self.x, weight, self.scale, *([] if self.bias is None else [self.bias])]

    def fields(self) -> list[Field]:
        return [integer("in_features", self.k), integer("has_bias", int(self.bias is not None))]


def described(tensors: list[Tensor]) -> list[T]:
    return [T(TYPES[t.dtype], tuple(t.shape)) for t in tensors]


def prepare(plugin: Plugin, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[list[T], Tensor]:
    """What TensorRT does before the first enqueue: asks, configures, gives a workspace (here with guard bytes)."""
    tensors = described(inputs + outputs)
    assert all(plugin.supports(i, tensors) for i in range(len(tensors)))
    assert plugin.output_types([t.type for t in tensors[: len(inputs)]]) == [TYPES[t.dtype] for t in outputs]
    assert plugin.output_shapes(tensors[: len(inputs)]) == [tuple(t.shape) for t in outputs]
    assert plugin.configure(tensors, tensors, tensors, tensors)
    size = plugin.workspace(tensors)
    workspace = torch.full((size + GUARD,), 0xA5, dtype=torch.uint8, device="cuda")
    assert plugin.on_shape_change(tensors)
    return tensors, workspace


def enqueue(plugin: Plugin, inputs: list[Tensor], outputs: list[Tensor], tensors: list[T], workspace: Tensor) -> None:
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs]
    plugin.harness.sentences.clear()
    assert plugin.enqueue(tensors, *addresses, workspace.data_ptr(), stream), plugin.harness.sentences


def run(plugin: Plugin, inputs: list[Tensor], outputs: list[Tensor], tactic: int | None = None) -> None:
    tensors, workspace = prepare(plugin, inputs, outputs)
    if tactic is not None:
        plugin.set_tactic(tactic)
    enqueue(plugin, inputs, outputs, tensors, workspace)
    torch.cuda.synchronize()
    assert bool((workspace[-GUARD:] == 0xA5).all()), "the workspace was overrun"


def created(harness: Harness, op: str, *fields: Field) -> Plugin:
    plugin = harness.create(op, *fields)
    assert plugin is not None, harness.sentences
    return plugin


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


# ---- The same bits as torch ------------------------------------------------------------------------------------------


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int32", [False, True], ids=["int8", "int32"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dynamic_linear(harness: Harness, dtype: torch.dtype, int32: bool, m: int, n: int, k: int) -> None:
    for bias in (None, torch.float32, dtype):
        layer = Layer(m, n, k, dtype, bias)
        plugin = created(harness, "LinearInt8", *layer.fields())
        y = poisoned(m, n, dtype=dtype)
        run(plugin, layer.inputs(int32), [y])
        assert same_bits(y, layer.want()), bias
        plugin.destroy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (64, 4096, 4096), (1024, 4096, 4096), (512, 768, 768), (4096, 3072, 768)]
)
def test_every_tactic_gives_the_same_bits(harness: Harness, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    layer = Layer(m, n, k, dtype, torch.float16)
    plugin = created(harness, "LinearInt8", *layer.fields())
    prepare(plugin, layer.inputs(), [poisoned(m, n, dtype=dtype)])
    tactics = plugin.tactics()
    assert len(tactics) == len(set(tactics)) > 1, tactics
    offered = {tactic - 2 for tactic in tactics}  # one number of rows: 2 + the config's id
    for config in WHOLE_LINEARS:
        assert (config["id"] in offered) == (k <= config["max_k"]), tactics
    for tactic in (0, *tactics):
        y = poisoned(m, n, dtype=dtype)
        run(plugin, layer.inputs(), [y], tactic)
        assert same_bits(y, layer.want()), tactic
    plugin.destroy()


@pytest.mark.parametrize("m", [1, 64, 1000])
def test_layers_with_constant_weights_follow_each_other(harness: Harness, m: int) -> None:
    # The GEMM starts while its quantize kernel runs: it must not read what that, or the layer before, still writes.
    layers = [Layer(m, 1024, 1024, torch.float16, torch.float32) for _ in range(2)]
    plugins = [created(harness, "LinearInt8", *each.fields(), integer("constant_weights", 1)) for each in layers]
    x, middle, y = (poisoned(m, 1024, dtype=torch.float16) for _ in range(3))
    calls = []
    for plugin, layer, source, target in zip(plugins, layers, (x, middle), (middle, y), strict=True):
        inputs = [source, *layer.inputs()[1:]]
        calls.append((plugin, inputs, [target], *prepare(plugin, inputs, [target])))
    rounds = [torch.randn(m, 1024, device="cuda").half() for _ in range(8)]
    found = []
    for each in rounds:  # nothing waits in between
        x.copy_(each)
        for call in calls:
            enqueue(*call)
        found.append(y.clone())
    torch.cuda.synchronize()
    for each, result in zip(rounds, found, strict=True):
        assert same_bits(result, layers[1].want(layers[0].want(each)))
    for plugin in plugins:
        plugin.destroy()


def test_every_config_id_as_a_field(harness: Harness) -> None:
    for config in [row for row in configs("w8a8") if runs_here(row)] + WHOLE_LINEARS:
        layer = Layer(77, 264, min(1000, config["max_k"]), torch.bfloat16, torch.float32)
        plugin = created(harness, "LinearInt8", *layer.fields(), integer("config", config["id"]))
        y = poisoned(77, 264, dtype=torch.bfloat16)
        run(plugin, layer.inputs(), [y])
        assert plugin.tactics() == [], "a config that was asked for is not timed against others"
        assert same_bits(y, layer.want()), config["name"]
        plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [False, True], ids=["per tensor", "per column"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_static_linear(harness: Harness, dtype: torch.dtype, columns: bool, m: int, n: int, k: int) -> None:
    layer = Layer(m, n, k, dtype, torch.float32)
    scale = torch.rand(k if columns else 1, device="cuda") * 0.02 + 0.01
    output_scale = layer.scale * 0.02
    fields = [*layer.fields(), text("scheme", "w8a8_static"), integer("has_input_scale", 1)]
    plugin = created(harness, "LinearInt8", *fields)
    y = poisoned(m, n, dtype=dtype)
    run(plugin, [layer.x, layer.weight, output_scale, layer.bias, scale], [y])
    q = ops.pad_weight(ops.quantize(layer.x, scale, -1)[0])
    assert same_bits(y, ops.int8_matmul(q, layer.weight, None, output_scale, layer.bias, dtype))
    plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 33), (2, 3, 100), (64, 4096)])
def test_quantize(harness: Harness, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, device="cuda").to(dtype)
    x[..., 0, 5] = torch.inf
    q, scale = torch.full_like(x, 77, dtype=torch.int8), poisoned(*shape[:-1], dtype=torch.float32)
    plugin = created(harness, "Quantize")
    run(plugin, [x], [q, scale])
    want_q, want_scale = ops.quantize(x)
    assert torch.equal(q, want_q)
    assert same_bits(scale, want_scale)
    plugin.destroy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_activation_and_residual(harness: Harness, dtype: torch.dtype, activation: str, residual: bool) -> None:
    m, n, k = 77, 264, 1000
    layer = Layer(m, n, k, dtype, torch.float32)
    plugin = created(
        harness, "LinearInt8", *layer.fields(), text("activation", activation), integer("has_residual", int(residual))
    )
    r = torch.randn(m, n, device="cuda").to(dtype)
    y = poisoned(m, n, dtype=dtype)
    run(plugin, [*layer.inputs(), *([r] if residual else [])], [y])
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    before = layer.want(dtype=torch.float32).double()
    want = functions[activation](before) + (r.double() if residual else 0)
    # One rounding to the output type is half an ulp of |want|. Before it: an activation within 4 ulp and
    # four float32 operations, 8 · 2⁻²³ of the largest number involved, |before| + |residual|.
    size = before.abs() + (r.double().abs() if residual else 0)
    tolerance = torch.finfo(dtype).eps * want.abs() * 0.5 + 8 * 2.0**-23 * size + torch.finfo(dtype).smallest_normal
    assert bool(((y.double() - want).abs() <= tolerance).all())
    plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_weight_only_linear(harness: Harness, dtype: torch.dtype, bias: torch.dtype, m: int, n: int, k: int) -> None:
    layer = Layer(m, n, k, dtype, bias)
    plugin = harness.create("LinearInt8", *layer.fields(), text("scheme", "w8a16"))
    if plugin is None:
        assert not hasattr(_native.extension(), "weight_only_linear"), "the plugin was built without what hwkern has"
        pytest.skip("this build of hwkern has no weight-only kernels")
    y, again = poisoned(m, n, dtype=dtype), poisoned(m, n, dtype=dtype)
    for out in (y, again):
        run(plugin, layer.inputs(), [out])
    assert plugin.tactics() == [], "the order of the sums, and so the bits, would depend on TensorRT's timing"
    assert same_bits(y, again)
    x, w = layer.x.double(), layer.weight[:, :k].double()
    want = (x @ w.T) * layer.scale.double() + (0 if layer.bias is None else layer.bias.double())
    # The products are exact; a float32 sum of K of them errs by K · 2⁻²⁴ of Σ|x·w| at most. Then the scale and the
    # bias, 2⁻²⁴ each of what they make, and half an ulp of the output type.
    size = (x.abs() @ w.abs().T) * layer.scale.double()
    tolerance = (k + 2) * 2.0**-24 * size + 2.0**-23 * want.abs() + torch.finfo(dtype).eps * 0.5 * want.abs()
    assert bool(((y.double() - want).abs() <= tolerance + torch.finfo(dtype).smallest_normal).all())
    plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", ["layer", "rms", "rms_rounded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES[:3])
def test_norm_linear(
    harness: Harness, dtype: torch.dtype, norm: str, static: bool, skip: bool, m: int, n: int, k: int
) -> None:
    if "NormLinearInt8" not in harness.creators():
        assert not hasattr(_native.extension(), "norm_quantize"), "the plugin was built without what hwkern has"
        pytest.skip("this build of hwkern has no fused norm")
    layer = Layer(m, n, k, dtype, torch.float32)
    has_bias = norm == "layer"
    fields = {"has_skip": skip, "has_norm_bias": has_bias, "has_norm_output": 1, "has_sum_output": skip}
    fields |= {"has_input_scale": static}
    plugin = created(
        harness,
        "NormLinearInt8",
        *layer.fields(),
        *(integer(name, int(value)) for name, value in fields.items()),
        text("norm", norm),
        text("scheme", "w8a8_static" if static else "w8a8_dynamic"),
        Field("epsilon", struct.pack("<f", 1e-5), ht.FIELD_FLOAT32, 1),
        Field("norm_offset", struct.pack("<f", 1.0), ht.FIELD_FLOAT32, 1),
    )
    r = torch.randn(m, k, device="cuda").to(dtype) if skip else None
    weight = torch.randn(k, device="cuda").to(dtype)
    bias = torch.randn(k, device="cuda") if has_bias else None
    scale = torch.full((1,), 0.03, device="cuda") if static else None
    before = [layer.x, r, weight, bias, layer.weight, layer.scale, layer.bias, scale]
    inputs = [t for t in before if t is not None]
    after = [poisoned(m, n, dtype=dtype), poisoned(m, k, dtype=dtype), *([poisoned(m, k, dtype=dtype)] if skip else [])]
    run(plugin, inputs, after)

    y, normed, *rest = after
    total = layer.x if r is None else (layer.x.float() + r.float()).to(dtype)
    assert all(same_bits(t, total) for t in rest)
    # The linear is that of the normalised rows as they are stored, bit for bit.
    if scale is None:
        assert same_bits(y, layer.want(normed))
    else:
        q = ops.pad_weight(ops.quantize(normed, scale, -1)[0])
        assert same_bits(y, ops.int8_matmul(q, layer.weight, None, layer.scale, layer.bias, dtype))
    # The norm itself, in float64. A float32 sum of K terms added in chunks errs by less than 32 · 2⁻²⁴ (hwkern.h says
    # E + 12 + K / 2¹²) of the sum of magnitudes, the few operations after it by 2⁻²⁴ each; h - mean may cancel, which
    # leaves the error of the mean. Then one rounding to x's type, or two.
    h, eps = total.double(), torch.finfo(dtype).eps
    centred = h - h.mean(-1, keepdim=True) if has_bias else h
    scaled = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    want = scaled * (1.0 + weight.double()) + (0 if bias is None else bias.double())
    size = (scaled.abs() + scaled.abs().mean(-1, keepdim=True)) * (1.0 + weight.double()).abs()
    tolerance = 64 * 2.0**-24 * (size + want.abs()) + eps * (want.abs() if norm == "rms_rounded" else 0.5 * want.abs())
    assert bool(((normed.double() - want).abs() <= tolerance + torch.finfo(dtype).smallest_normal).all())
    plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gate", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES[:3])
def test_gated_linear(harness: Harness, dtype: torch.dtype, gate: str, static: bool, m: int, n: int, k: int) -> None:
    layer = Layer(m, n, k, dtype, torch.float32)
    x = torch.randn(m, 2 * k, device="cuda").to(dtype)
    scale = torch.full((1,), 0.03, device="cuda") if static else None
    fields = [text("scheme", "w8a8_static"), integer("has_input_scale", 1)] if static else []
    plugin = created(harness, "GatedLinearInt8", *layer.fields(), text("gate", gate), *fields)
    y = poisoned(m, n, dtype=dtype)
    run(plugin, [x, *layer.inputs()[1:], *([] if scale is None else [scale])], [y])
    q, row_scale = ops.activation_quantize(x, scale=scale, activation=gate, gated=True)
    a, row_scale = ops.pad_weight(q), None if static else row_scale
    assert same_bits(y, ops.int8_matmul(a, layer.weight, row_scale, layer.scale, layer.bias, dtype))
    plugin.destroy()


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "causal, rotary", "mask"])
@pytest.mark.parametrize("mask_shape", [(10,), (30, 30), (4, 1, 30), (2, 1, 1, 30), (2, 4, 30, 30)])
def test_attention(harness: Harness, dtype: torch.dtype, kind: str, mask_shape: tuple[int, ...]) -> None:
    batch, length, heads, kv_heads, dim = 2, mask_shape[-1], 4, 2, 64
    x = torch.randn(batch, length, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)
    has_rotary, has_mask = kind == "causal, rotary", kind == "mask"
    fields = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "causal": int(has_rotary)}
    fields |= {"has_rotary": int(has_rotary), "has_mask": int(has_mask)}
    scale = Field("scale", struct.pack("<f", 0.1), ht.FIELD_FLOAT32, 1)
    plugin = created(harness, "Attention", *(integer(name, value) for name, value in fields.items()), scale)
    tables = [torch.rand(length, dim, device="cuda") for _ in range(2 * has_rotary)]
    masks = [torch.randn(mask_shape, device="cuda").to(dtype) for _ in range(has_mask)]
    y, want = (poisoned(batch, length, heads * dim, dtype=dtype) for _ in range(2))
    run(plugin, [x, *tables, *masks], [y])
    workspace = torch.empty(batch * length * kv_heads * dim * 2, dtype=torch.uint8, device="cuda")
    whole = masks[0].expand(batch, heads, length, length).contiguous() if masks else None
    strides = whole.stride()[:3] if whole is not None else (0, 0, 0)
    _native.extension().attention(
        x.data_ptr(), *([t.data_ptr() for t in tables] or (0, 0)), 0 if whole is None else whole.data_ptr(),
        want.data_ptr(), *strides, batch, length, heads, kv_heads, dim, 0.1, 1 if dtype == torch.float16 else 2,
        has_rotary, workspace.data_ptr(), workspace.numel(), torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert same_bits(y, want)
    plugin.destroy()


# ---- Many rows, contexts, streams, graphs ----------------------------------------------------------------------------


def test_dynamic_profile_and_shapes_far_from_the_timed_one(harness: Harness) -> None:
    layer = Layer(2048, 512, 768, torch.float16, torch.float16)
    plugin = created(harness, "LinearInt8", *layer.fields())

    def tensors(m: int) -> list[T]:
        return described([layer.x[: max(m, 0)], *layer.inputs()[1:], layer.x.new_empty(max(m, 0), 512)])

    def unknown(t: list[T]) -> list[T]:
        return [T(t[0].type, (-1, 768)), *t[1:-1], T(t[-1].type, (-1, 512))]

    assert plugin.configure(unknown(tensors(1)), tensors(1), tensors(512), tensors(2048))
    workspace = torch.empty(plugin.workspace(tensors(2048)), dtype=torch.uint8, device="cuda")
    for tactic in plugin.tactics():
        plugin.set_tactic(tactic)
        for m in (1, 7, 500, 512, 530, 2048):
            y = poisoned(m, 512, dtype=torch.float16)
            assert plugin.on_shape_change(tensors(m))
            enqueue(plugin, [layer.x[:m], *layer.inputs()[1:]], [y], tensors(m), workspace)
            assert same_bits(y, layer.want(layer.x[:m])), (tactic, m)
    plugin.destroy()


@pytest.mark.parametrize("tactic", [2 + 1234, 2 + 4095 - 2, 2**31 - 1, -7])
def test_a_tactic_of_another_hwkern_is_no_failure(harness: Harness, tactic: int) -> None:
    layer = Layer(64, 512, 768, torch.float16)
    plugin = created(harness, "LinearInt8", *layer.fields())
    y = poisoned(64, 512, dtype=torch.float16)
    run(plugin, layer.inputs(), [y], tactic)
    assert same_bits(y, layer.want())
    plugin.destroy()


def test_restored_from_an_engine(harness: Harness) -> None:
    layer = Layer(64, 512, 768, torch.float16, torch.float16)
    plugin = created(harness, "LinearInt8", *layer.fields())
    name, state = plugin.serialize()
    plugin.destroy()
    restored = harness.restore("LinearInt8", state, name)
    assert restored is not None
    context = restored.attach()
    restored.destroy()
    y = poisoned(64, 512, dtype=torch.float16)
    run(context, layer.inputs(), [y])
    assert same_bits(y, layer.want())
    context.destroy()


def test_no_rows(harness: Harness) -> None:
    layer = Layer(0, 64, 100, torch.float16)
    plugin = created(harness, "LinearInt8", *layer.fields())
    run(plugin, layer.inputs(), [poisoned(0, 64, dtype=torch.float16)])
    plugin.destroy()


def test_two_contexts_on_two_streams(harness: Harness) -> None:
    layers = [Layer(m, 2048, 2048, torch.float16, torch.float16) for m in (16, 300)]
    plugin = created(harness, "LinearInt8", *layers[0].fields())
    contexts = [plugin.attach() for _ in layers]
    plugin.destroy()
    ready = []
    for layer, context in zip(layers, contexts, strict=True):
        y = poisoned(layer.m, layer.n, dtype=torch.float16)
        ready.append((layer, context, y, *prepare(context, layer.inputs(), [y])))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(50):
        for stream, (layer, context, y, tensors, workspace) in zip(streams, ready, strict=True):
            with torch.cuda.stream(stream):
                enqueue(context, layer.inputs(), [y], tensors, workspace)
    torch.cuda.synchronize()
    for layer, context, y, *_ in ready:
        assert same_bits(y, layer.want())
        context.destroy()


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a8_static"])
def test_graph_capture_and_replay_on_new_inputs(harness: Harness, scheme: str) -> None:
    layer = Layer(64, 1024, 1024, torch.float16, torch.float16)
    static = scheme == "w8a8_static"
    scale = torch.full((1,), 0.02, device="cuda")
    plugin = created(harness, "LinearInt8", *layer.fields(), text("scheme", scheme), integer("has_input_scale", static))
    inputs = [*layer.inputs(), *([scale] if static else [])]
    y = poisoned(64, 1024, dtype=torch.float16)
    tensors, workspace = prepare(plugin, inputs, [y])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # a chain: each waits for the one before, and reuses its workspace
            enqueue(plugin, inputs, [y], tensors, workspace)
    for _ in range(3):
        layer.x.normal_()
        graph.replay()
        q = ops.quantize(layer.x, scale, -1)[0]
        want = (
            ops.int8_matmul(q, layer.weight, None, layer.scale, layer.bias, torch.float16) if static else layer.want()
        )
        assert same_bits(y, want)
    plugin.destroy()


def test_the_first_call_of_a_process_may_be_captured(harness: Harness, tmp_path: Path) -> None:
    # TensorRT may capture enqueue while it times tactics, before any other call: nothing may be set up lazily there.
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import trt_harness as ht, test_trt_enqueue as t
from pathlib import Path
from hwkern import _native
plugin_path = _native.tensorrt_plugins()["libhwkern_trt.so"]
harness = ht.Harness(t.harness_path(Path({str(tmp_path)!r})), plugin_path)
for m in (4, 1024):
    x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
    weight = torch.randint(-127, 128, (512, 512), dtype=torch.int8, device="cuda")
    scale = torch.rand(512, device="cuda")
    plugin = harness.create("LinearInt8", ht.integer("in_features", 512))
    y = torch.empty(m, 512, device="cuda", dtype=torch.float16)
    tensors, workspace = t.prepare(plugin, [x, weight, scale], [y])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        t.enqueue(plugin, [x, weight, scale], [y], tensors, workspace)
    graph.replay()
    assert t.same_bits(y, t.ops.int8_linear(x, weight, scale))
harness.close()
print("same bits")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.endswith("same bits\n"), done.stderr
