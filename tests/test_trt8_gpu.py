"""libhwkern_trt8.so inside TensorRT 8.6 on a GPU: ONNX in, engine out, saved, loaded in a new process, run with pycuda.

Needs no torch, because TensorRT 8.6 lives in an old Python: without one, ``python -m pytest --noconftest -c /dev/null
tests/test_trt8_gpu.py``. Everything is compared bit for bit with the formula of csrc/hwkern.h, written in numpy: each
operation is one IEEE float32 operation there too. Where that is not so (activations, norms, weight-only sums), the bits
are those of hwkern's own entry points, which the other tests compare with the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip(
    "tensorrt_bindings", reason="TensorRT 8.6 (tensorrt_bindings) is not installed", exc_type=ImportError
)
onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)
cuda = pytest.importorskip("pycuda.driver", reason="pycuda is not installed", exc_type=ImportError)

from hwkern import _native  # noqa: E402  (after the skips)
from hwkern.tensorrt import _cuda  # noqa: E402
from hwkern.tensorrt.plugin import half_only  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

F16, F32 = np.float16, np.float32
LOGGER = trt.Logger(trt.Logger.WARNING)
N, K = 136, 100  # a tail of N, and K that needs padding


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    try:
        cuda.init()
        context = cuda.Device(0).retain_primary_context()
    except cuda.Error as error:
        pytest.skip(f"no GPU for TensorRT 8.6: {error}")
    if _native.tensorrt_plugins().get("libhwkern_trt8.so") is None:
        pytest.skip("this build of hwkern has no libhwkern_trt8.so")
    context.push()
    load()
    yield
    the_builder.cache_clear()  # before the context goes
    cuda.Context.pop()


def load() -> Any:
    plugin = ctypes.CDLL(str(_native.tensorrt_plugins()["libhwkern_trt8.so"]))
    assert plugin.hwkern_trt8_register() == 1
    return plugin


# ---- The formula of hwkern.h in numpy --------------------------------------------------------------------------------


def quantized(x: Any, scale: Any) -> Any:
    with np.errstate(invalid="ignore"):
        q = np.clip(np.rint(x.astype(F32) * (F32(1) / scale)), -127, 127)
    return np.where(np.isnan(q), 0, q).astype(np.int8)


def dynamic_scale(x: Any) -> Any:
    return np.maximum(np.abs(x.astype(F32)).max(-1, keepdims=True) / F32(127), F32(2.0**-126))


class Layer:
    """Weights of one LinearInt8, its ONNX node and its result in numpy."""

    def __init__(self, k: int = K, n: int = N, static: bool = False, bias: bool = True, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.k, self.n, self.static = k, n, static
        self.weight = np.zeros((n, -(-k // 16) * 16), np.int8)
        self.weight[:, :k] = generator.integers(-127, 128, (n, k))
        self.scale = (generator.random(n) * 0.01 + 0.001).astype(F32)
        self.bias = generator.standard_normal(n).astype(F32) if bias else None
        self.input_scale = np.array([0.03], F32)

    def __call__(self, x: Any) -> Any:
        s = self.input_scale if self.static else dynamic_scale(x)
        sums = (quantized(x, s).astype(np.int64) @ self.weight[:, : self.k].T.astype(np.int64)).astype(F32)
        y = (sums if self.static else sums * s) * self.scale
        return (y if self.bias is None else y + self.bias).astype(x.dtype)

    def node(self, name: str, x: str, y: str) -> tuple[Any, list[Any]]:
        # As INT32: 8.6 asks for a calibration scale of an INT8 constant.
        values = {"w": self.weight.view(np.int32), "s": self.scale}
        values |= {} if self.bias is None else {"b": self.bias}
        values |= {"i": self.input_scale} if self.static else {}
        constants = [onnx.numpy_helper.from_array(v, f"{name}.{key}") for key, v in values.items()]
        node = onnx.helper.make_node(
            "LinearInt8", [x, *(c.name for c in constants)], [y], name=name, domain="hwkern", plugin_namespace="hwkern",
            plugin_version="1", in_features=self.k, out_features=self.n, activation="none", config=-1, has_residual=0,
            scheme="w8a8_static" if self.static else "w8a8_dynamic", has_bias=int(self.bias is not None),
            has_input_scale=int(self.static), constant_weights=1,
        )  # fmt: skip
        return node, constants


def model(layers: list[Layer], dtype: Any) -> bytes:
    """The layers after each other on x [B, S, K]."""
    names = ["x", *(f"h{i}" for i in range(1, len(layers))), "y"]
    nodes, constants = [], []
    for i, layer in enumerate(layers):
        node, values = layer.node(f"layer{i}", names[i], names[i + 1])
        nodes.append(node)
        constants += values
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    io = [("x", layers[0].k), ("y", layers[-1].n)]
    infos = [onnx.helper.make_tensor_value_info(name, element, ["B", "S", size]) for name, size in io]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("hwkern", 1)]
    return bytes(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())


# ---- TensorRT 8.6 ----------------------------------------------------------------------------------------------------


@functools.cache
def the_builder() -> Any:
    """One for all tests: making it loads 0.8 GB of kernels."""
    return trt.Builder(LOGGER)


def build(
    data: bytes, dtype: Any, profiles: list[list[tuple[int, int]]], inputs: dict[str, int] | None = None
) -> bytes | None:
    """``inputs``: the last dimension of each; the profiles give the two before it."""
    builder = the_builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse(data):
        return None
    config = builder.create_builder_config()
    # Without cuBLAS and cuDNN: this machine may have stand-ins for them only.
    sources = trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    if dtype == F16:
        config.set_flag(trt.BuilderFlag.FP16)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, size in (inputs or {"x": K}).items():
            profile.set_shape(name, *((b, s, size) for b, s in shapes))
        config.add_optimization_profile(profile)
    # As ht.build() does: else 8.6 chooses float32 by its times, and beside others on the GPU it has.
    with half_only() if dtype == F16 else contextlib.nullcontext():
        engine = builder.build_serialized_network(network, config)
    return None if engine is None else bytes(engine)


ONE_PROFILE = [[(1, 1), (4, 16), (8, 64)]]


@functools.cache
def plain_engine() -> bytes:
    """One layer in float16."""
    data = build(model([Layer()], F16), F16, ONE_PROFILE)
    assert data is not None
    return data


class Execution:
    """One context with its own stream and buffers."""

    def __init__(self, engine: Any, rows: int, dtype: Any, k: int = K, n: int = N, profile: int = 0) -> None:
        self.context, self.stream = engine.create_execution_context(), cuda.Stream()
        self.dtype, self.n = np.dtype(dtype), n
        if profile:
            assert self.context.set_optimization_profile_async(profile, self.stream.handle)
        self.x = cuda.mem_alloc(rows * k * self.dtype.itemsize)
        self.y = cuda.mem_alloc(rows * n * self.dtype.itemsize)

    def set(self, x: Any) -> None:
        self.host = np.ascontiguousarray(x)
        cuda.memcpy_htod_async(self.x, self.host, self.stream)
        assert self.context.set_input_shape("x", x.shape)
        self.context.set_tensor_address("x", int(self.x))
        self.context.set_tensor_address("y", int(self.y))

    def enqueue(self) -> None:
        assert self.context.execute_async_v3(self.stream.handle)

    def get(self) -> Any:
        y = np.empty((*self.host.shape[:-1], self.n), self.dtype)
        cuda.memcpy_dtoh_async(y, self.y, self.stream)
        self.stream.synchronize()
        return y

    def __call__(self, x: Any) -> Any:
        self.set(x)
        self.enqueue()
        return self.get()


def loaded(engine: bytes) -> Any:
    made = trt.Runtime(LOGGER).deserialize_cuda_engine(engine)
    assert made is not None
    return made


def random(*shape: int, dtype: Any, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_engine_gives_the_bits_of_the_formula(dtype: Any, static: bool, bias: bool) -> None:
    layer = Layer(static=static, bias=bias)
    data = build(model([layer], dtype), dtype, ONE_PROFILE)
    assert data is not None
    run = Execution(loaded(data), 8 * 64, dtype)
    for b, s in ((1, 1), (3, 7), (4, 16), (8, 64)):
        x = random(b, s, K, dtype=dtype)
        x[0, 0, 0] = 50  # an outlier: the static scheme saturates
        assert np.array_equal(run(x), layer(x)), (b, s)


def test_several_layers_and_several_profiles() -> None:
    layers = [Layer(), Layer(N, N, static=True, seed=1), Layer(N, N, bias=False, seed=2)]
    profiles = [[(1, 1), (1, 8), (1, 16)], [(2, 16), (8, 64), (8, 64)]]
    data = build(model(layers, F16), F16, profiles)
    assert data is not None
    engine = loaded(data)
    for profile, shapes in enumerate(([(1, 1), (1, 16)], [(2, 16), (8, 64)])):
        run = Execution(engine, 8 * 64, F16, profile=profile)
        for b, s in shapes:
            x = random(b, s, K, dtype=F16)
            want = x
            for layer in layers:
                want = layer(want)
            assert np.array_equal(run(x), want), (profile, b, s)


def test_two_contexts_on_two_streams() -> None:
    layer = Layer()
    data = build(model([layer], F16), F16, [ONE_PROFILE[0], ONE_PROFILE[0]])
    assert data is not None
    engine = loaded(data)
    runs = [Execution(engine, 8 * 64, F16, profile=i) for i in range(2)]
    inputs = [random(8, 64, K, dtype=F16, seed=i) for i in range(2)]
    for run, x in zip(runs, inputs, strict=True):
        run.set(x)
    for _ in range(50):
        for run in runs:
            run.enqueue()
    for run, x in zip(runs, inputs, strict=True):
        assert np.array_equal(run.get(), layer(x))


def test_graph_capture_of_an_engine() -> None:
    layer = Layer()
    run = Execution(loaded(plain_engine()), 8 * 64, F16)
    run(random(4, 16, K, dtype=F16))  # TensorRT wants one call before a capture
    _cuda.begin_capture(run.stream.handle)
    run.enqueue()
    graph = _cuda.end_capture(run.stream.handle)
    for seed in (2, 3):
        x = random(4, 16, K, dtype=F16, seed=seed)
        cuda.memcpy_htod_async(run.x, x, run.stream)
        graph.launch(run.stream.handle)
        assert np.array_equal(run.get(), layer(x))
    graph.free()


def test_quantize_op() -> None:
    x_info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", "S", K])
    outputs = [("q", onnx.TensorProto.INT8, ["B", "S", K]), ("scale", onnx.TensorProto.FLOAT, ["B", "S"])]
    node = onnx.helper.make_node(
        "Quantize", ["x"], ["q", "scale"], domain="hwkern", plugin_namespace="hwkern", plugin_version="1"
    )
    graph = onnx.helper.make_graph([node], "g", [x_info], [onnx.helper.make_tensor_value_info(*o) for o in outputs])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("hwkern", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    builder = the_builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    assert trt.OnnxParser(network, LOGGER).parse(proto.SerializeToString())
    # 8.6 wants to know a range for every int8 tensor; the plugin's values do not depend on it.
    network.get_output(0).dynamic_range = (-127.0, 127.0)
    network.get_output(0).dtype = trt.int8
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.INT8)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((b, s, K) for b, s in ONE_PROFILE[0]))
    config.add_optimization_profile(profile)
    config.set_tactic_sources(1 << int(trt.TacticSource.JIT_CONVOLUTIONS))
    data = builder.build_serialized_network(network, config)
    assert data is not None
    context, stream = loaded(bytes(data)).create_execution_context(), cuda.Stream()
    x = random(3, 7, K, dtype=F32)
    q, scale = np.empty((3, 7, K), np.int8), np.empty((3, 7), F32)
    buffers = {name: cuda.mem_alloc(array.nbytes) for name, array in (("x", x), ("q", q), ("scale", scale))}
    cuda.memcpy_htod_async(buffers["x"], x, stream)
    assert context.set_input_shape("x", x.shape)
    for name, buffer in buffers.items():
        context.set_tensor_address(name, int(buffer))
    assert context.execute_async_v3(stream.handle)
    cuda.memcpy_dtoh_async(q, buffers["q"], stream)
    cuda.memcpy_dtoh_async(scale, buffers["scale"], stream)
    stream.synchronize()
    want = dynamic_scale(x)
    assert np.array_equal(scale, want[..., 0])
    assert np.array_equal(q, quantized(x, want))


def test_attention_gives_the_bits_of_the_entry_point() -> None:
    b, s, heads, kv_heads, dim = 2, 10, 4, 2, 32
    element = onnx.TensorProto.FLOAT16
    tables = {name: np.random.default_rng(2).random((1, 1, s, dim)).astype(F32) for name in ("cosine", "sine")}
    options: dict[str, dict[str, int]] = {
        "plain": {},
        "causal": {"causal": 1, "has_rotary": 1},
        "masked": {"has_mask": 1},
    }
    nodes = []
    for name, flags in options.items():
        inputs = ["x", *(tables if "has_rotary" in flags else ()), *(["mask"] if "has_mask" in flags else [])]
        nodes.append(onnx.helper.make_node(
            "Attention", inputs, [name], domain="hwkern", plugin_namespace="hwkern", plugin_version="1", heads=heads,
            kv_heads=kv_heads, head_dim=dim, scale=0.2, **{"causal": 0, "has_rotary": 0, "has_mask": 0} | flags,
        ))  # fmt: skip
    shapes = {"x": (b, s, (heads + 2 * kv_heads) * dim), "mask": (b, 1, 1, s)}
    graph = onnx.helper.make_graph(
        nodes, "g", [onnx.helper.make_tensor_value_info(name, element, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info(name, element, (b, s, heads * dim)) for name in options],
        [onnx.numpy_helper.from_array(value, name) for name, value in tables.items()],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("hwkern", 1)]
    data = build(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString(), F16, [])
    assert data is not None
    feed = {name: random(*shape, dtype=F16, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    at = {name: Buffer(value) for name, value in (feed | tables).items()}
    at |= {name: Buffer(np.zeros((b, s, heads * dim), F16)) for name in (*options, "want")}
    context, stream = loaded(data).create_execution_context(), cuda.Stream()
    for name in (*feed, *options):
        context.set_tensor_address(name, int(at[name]))
    assert context.execute_async_v3(stream.handle)
    stream.synchronize()
    scratch = Buffer(np.zeros(b * s * kv_heads * dim, F16))
    for name, flags in options.items():
        rotary, mask = ("has_rotary" in flags), ("has_mask" in flags)
        _native.extension().attention(
            int(at["x"]), int(at["cosine"]) if rotary else 0, int(at["sine"]) if rotary else 0,
            int(at["mask"]) if mask else 0, int(at["want"]), s, 0, 0, b, s, heads, kv_heads, dim, 0.2, 1,
            "causal" in flags, int(scratch), scratch.value.nbytes, 0,
        )  # fmt: skip
        assert at[name].get().tobytes() == at["want"].get().tobytes(), name


# ---- Every op: the bits of hwkern's own entry points -----------------------------------------------------------------

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")  # as hwkern.h counts them
NORMS = ("layer", "rms", "rms_rounded")
INPUTS = {"x": K, "skip": K, "halves": 2 * K, "residual": N}


class Buffer:
    """A numpy array's copy on the GPU."""

    def __init__(self, value: Any) -> None:
        self.value = np.ascontiguousarray(value)
        self.memory = cuda.mem_alloc(max(1, self.value.nbytes))
        cuda.memcpy_htod(self.memory, self.value)

    def __int__(self) -> int:
        return int(self.memory)

    def get(self) -> Any:
        cuda.Context.synchronize()
        found = np.empty_like(self.value)
        cuda.memcpy_dtoh(found, self.memory)
        return found


def code(dtype: Any) -> int:
    return {F32: 0, F16: 1}[dtype]


class Ops:
    """One graph with every op on x and skip [B, S, K], halves [B, S, 2K] and residual [B, S, N], and what the entry
    points make of it."""

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.layer = dtype, Layer()
        rng = np.random.default_rng(4)
        self.norm_weight, self.norm_bias = (rng.standard_normal(K).astype(F32) for _ in range(2))
        self.nodes: list[Any] = []
        self.outputs: list[tuple[str, int]] = []
        self.constants: dict[str, Any] = {
            "w": self.layer.weight.view(np.int32), "s": self.layer.scale, "b": self.layer.bias,
            "i": self.layer.input_scale, "nw": self.norm_weight, "nb": self.norm_bias,
        }  # fmt: skip
        schemes = ["w8a8_dynamic", "w8a8_static", *(["w8a16"] if dtype == F16 else [])]
        self.linears = [
            (scheme, activation, residual)
            for scheme in schemes
            for activation in range(len(ACTIVATIONS))
            for residual in (False, True)
        ]
        self.norms = [
            (norm, static, skip) for norm in range(len(NORMS)) for static in (False, True) for skip in (False, True)
        ]
        self.gates = [(gate, static) for gate in range(len(ACTIVATIONS)) for static in (False, True)]
        for number, (scheme, activation, residual) in enumerate(self.linears):
            static = scheme == "w8a8_static"
            names = ["x", "w", "s", "b", *(["i"] if static else []), *(["residual"] if residual else [])]
            self._node(
                "LinearInt8", f"linear{number}", names, [("y", N)], scheme=scheme, activation=ACTIVATIONS[activation],
                has_input_scale=int(static), has_residual=int(residual),
            )  # fmt: skip
        for number, (norm, static, skip) in enumerate(self.norms):
            layer = norm == 0
            names = ["x", *(["skip"] if skip else []), "nw", *(["nb"] if layer else []), "w", "s", "b"]
            self._node(
                "NormLinearInt8", f"norm{number}", [*names, *(["i"] if static else [])],
                [("y", N), ("normed", K), *([("sum", K)] if skip else [])],
                scheme="w8a8_static" if static else "w8a8_dynamic", activation="none", has_input_scale=int(static),
                has_residual=0, norm=NORMS[norm], epsilon=1e-5, norm_offset=0.0, has_norm_bias=int(layer),
                has_skip=int(skip), has_norm_output=1, has_sum_output=int(skip),
            )  # fmt: skip

        for number, (gate, static) in enumerate(self.gates):
            self._node(
                "GatedLinearInt8", f"gated{number}", ["halves", "w", "s", "b", *(["i"] if static else [])], [("y", N)],
                scheme="w8a8_static" if static else "w8a8_dynamic", activation="none", has_input_scale=int(static),
                has_residual=0, gate=ACTIVATIONS[gate],
            )  # fmt: skip

    def _node(self, op: str, name: str, inputs: list[str], outputs: list[tuple[str, int]], **fields: Any) -> None:
        common = {"in_features": K, "out_features": N, "config": -1, "constant_weights": 1, "has_bias": 1}
        common |= {"domain": "hwkern", "plugin_namespace": "hwkern", "plugin_version": "1"}
        names = [f"{name}.{o}" for o, _ in outputs]
        self.nodes.append(onnx.helper.make_node(op, inputs, names, name=name, **common, **fields))
        self.outputs += [(f"{name}.{o}", size) for o, size in outputs]

    def model(self) -> bytes:
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))

        def info(name: str, size: int) -> Any:
            return onnx.helper.make_tensor_value_info(name, element, ["B", "S", size])

        graph = onnx.helper.make_graph(
            self.nodes, "g", [info(*each) for each in INPUTS.items()],
            [info(*output) for output in self.outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )  # fmt: skip
        imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("hwkern", 1)]
        return bytes(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())

    def want(self, feed: dict[str, Any]) -> dict[str, Any]:
        """By the entry points that torch's operators call, on one [M, K]."""
        native, d, k16 = _native.extension(), code(self.dtype), self.layer.weight.shape[1]
        m = feed["x"].shape[0] * feed["x"].shape[1]
        at = {name: Buffer(value) for name, value in (self.constants | feed).items()}
        y, q = Buffer(np.zeros((m, N), self.dtype)), Buffer(np.zeros((m, k16), np.int8))
        row_scale, size = Buffer(np.zeros(m, F32)), int(native.linear_workspace_bytes(m, K))
        scratch = Buffer(np.zeros(size, np.uint8))
        w, s, b, x = int(at["w"]), int(at["s"]), int(at["b"]), int(at["x"])

        def product(activation: int, residual: bool, scale_m: int) -> Any:
            native.gemm(
                int(q), k16, w, k16, scale_m, s, b, 0, int(y), N, d, m, N, K, -1, 0, activation=activation,
                residual=int(at["residual"]) if residual else 0, ldr=N, residual_dtype=d,
            )  # fmt: skip
            return y.get()

        found = {}
        for number, (scheme, activation, residual) in enumerate(self.linears):
            r = int(at["residual"]) if residual else 0
            if scheme == "w8a8_static":
                native.quantize_static(x, d, K, m, K, int(q), k16, int(at["i"]), 0, 0)
                result = product(activation, residual, 0)
            elif scheme == "w8a16":
                native.weight_only_linear(
                    x, d, K, w, k16, 0, s, b, 0, int(y), d, N, m, N, K, activation, r, d, N, -1, 0
                )
                result = y.get()
            else:
                more = (activation, r, N, d, 0)
                native.linear(x, d, K, w, k16, s, b, 0, int(y), N, d, m, N, K, -1, int(scratch), size, 0, *more)
                result = y.get()
            found[f"linear{number}.y"] = result
        for number, (norm, static, skip) in enumerate(self.norms):
            normed, total = (Buffer(np.zeros((m, K), self.dtype)) for _ in range(2))
            native.norm_quantize(
                x, K, d, int(at["skip"]) if skip else 0, K, int(at["nw"]), 0, int(at["nb"]) if norm == 0 else 0, 0,
                int(total) if skip else 0, K, int(normed), K, int(q), k16, int(at["i"] if static else row_scale),
                static, m, K, 1e-5, 0.0, norm, 0,
            )  # fmt: skip
            found[f"norm{number}.y"] = product(0, False, 0 if static else int(row_scale))
            found[f"norm{number}.normed"] = normed.get()
            if skip:
                found[f"norm{number}.sum"] = total.get()
        halves = int(at["halves"])
        for number, (gate, static) in enumerate(self.gates):
            native.activation_quantize(
                halves, 2 * K, d, halves + K * np.dtype(self.dtype).itemsize, 2 * K, int(q), k16,
                int(at["i"] if static else row_scale), static, m, K, gate, 0,
            )  # fmt: skip
            found[f"gated{number}.y"] = product(0, False, 0 if static else int(row_scale))
        return found

    def feed(self, b: int, s: int) -> dict[str, Any]:
        return {name: random(b, s, size, dtype=self.dtype, seed=i) for i, (name, size) in enumerate(INPUTS.items())}

    def run(self, engine: Any, feed: dict[str, Any]) -> dict[str, Any]:
        context, stream = engine.create_execution_context(), cuda.Stream()
        b, s, _ = feed["x"].shape
        held = {name: Buffer(value) for name, value in feed.items()}
        held |= {name: Buffer(np.full((b, s, size), -7, self.dtype)) for name, size in self.outputs}
        for name in feed:
            assert context.set_input_shape(name, feed[name].shape)
        for name, buffer in held.items():
            context.set_tensor_address(name, int(buffer))
        assert context.execute_async_v3(stream.handle)
        stream.synchronize()
        return {name: held[name].get().reshape(b * s, -1) for name, _ in self.outputs}


@functools.cache
def engine_of_every_op(dtype: Any) -> bytes:
    data = build(Ops(dtype).model(), dtype, ONE_PROFILE, inputs=INPUTS)
    assert data is not None
    return data


def compare_every_op(engine: Any, dtype: Any, shapes: Any = ((1, 1), (3, 7), (8, 64))) -> None:
    ops = Ops(dtype)
    for b, s in shapes:
        feed = ops.feed(b, s)
        want, found = ops.want(feed), ops.run(engine, feed)
        assert set(want) == set(found)
        wrong = [name for name in want if want[name].tobytes() != found[name].tobytes()]
        assert not wrong, (b, s, wrong)


@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_op_gives_the_bits_of_the_entry_points(dtype: Any) -> None:
    compare_every_op(loaded(engine_of_every_op(dtype)), dtype)


NEW_PROCESS = """
import sys; sys.path.insert(0, {tests!r})
import test_trt8_gpu as t, trt_runtime_child as child
t.cuda.init(); t.cuda.Device(0).retain_primary_context().push()
try:
    {load}
    engine = t.trt.Runtime(t.LOGGER).deserialize_cuda_engine(open({path!r}, "rb").read())
    if {expected!r} == "refused":
        assert t.refused(engine)
    else:
        layer, x = t.Layer(), t.random(4, 16, t.K, dtype=t.F16)
        assert t.np.array_equal(t.Execution(engine, 64, t.F16)(x), layer(x))
    print({expected!r})
finally:
    t.cuda.Context.pop()
"""


def refused(engine: Any) -> bool:
    """No engine, no context, or an enqueue that fails."""
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        return True
    x, y = cuda.mem_alloc(64 * K * 2), cuda.mem_alloc(64 * N * 2)
    context.set_input_shape("x", (4, 16, K))
    context.set_tensor_address("x", int(x))
    context.set_tensor_address("y", int(y))
    return not context.execute_async_v3(cuda.Stream().handle)


WAYS = ("register", "load_library", "no plugin", "truncated", "damaged plugin data")


@pytest.fixture(scope="module")
def new_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One for each way, all at once: each loads TensorRT anew, which takes seconds."""
    folder = tmp_path_factory.mktemp("engines")
    library = str(_native.tensorrt_plugins()["libhwkern_trt8.so"])
    load_library = f"assert child.load_library_8(t.trt, {library!r})"
    started = {}
    for how in WAYS:
        data = plain_engine()
        if how == "truncated":
            data = data[: len(data) // 2]
        if how == "damaged plugin data":
            at = data.index(b"HWKT") + 12
            data = data[:at] + b"\x77" + data[at + 1 :]
        path = folder / how
        path.write_bytes(data)
        source = NEW_PROCESS.format(
            tests=str(Path(__file__).parent),
            load={"load_library": load_library, "no plugin": "pass"}.get(how, "t.load()"),
            path=str(path),
            expected="same bits" if how in ("register", "load_library") else "refused",
        )
        pipe = subprocess.PIPE
        started[how] = subprocess.Popen([sys.executable, "-c", source], stdout=pipe, stderr=pipe, text=True)
    return started


@pytest.mark.parametrize("how", WAYS)
def test_saved_engine_in_a_new_process(new_processes: dict[str, Any], how: str) -> None:
    done = new_processes[how]
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {stdout}{stderr}"
    assert stdout.strip().endswith("same bits" if how in ("register", "load_library") else "refused")
    if how == "damaged plugin data":
        assert "damaged" in stderr


@pytest.mark.parametrize("wrong", [{"k": 64}, {"bias": False}])
def test_a_wrong_model_is_refused_and_the_process_lives(wrong: dict[str, Any]) -> None:
    layer = Layer()
    node, constants = layer.node("layer", "x", "y")
    for attribute in node.attribute:
        if "k" in wrong and attribute.name == "in_features":
            attribute.i = wrong["k"]
        if "bias" in wrong and attribute.name == "has_bias":
            attribute.i = 0
    infos = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["B", "S", s]) for n, s in (("x", K), ("y", N))
    ]
    graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:], constants)
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("hwkern", 1)]
    data = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    assert build(data, F32, ONE_PROFILE) is None
    assert build(model([layer], F32), F32, ONE_PROFILE) is not None
