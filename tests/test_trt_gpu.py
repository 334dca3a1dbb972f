"""Engines with the plugin on a real GPU, by any full TensorRT (8.6, 10, 11): built, saved, loaded elsewhere, run.

Needs no torch: `python -m pytest --noconftest -c /dev/null tests/test_trt_gpu.py` in TensorRT's own environment.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import hwkern.tensorrt as ht  # noqa: E402
from hwkern import _native  # noqa: E402
from hwkern.tensorrt import _api, _cuda, opdef  # noqa: E402
from hwkern.tensorrt.builder import keep_builder  # noqa: E402
from hwkern.tensorrt.packing import QMAX, SCALE_MIN, quantize_weight  # noqa: E402

Array = Any


def problem() -> str | None:
    try:
        api = _api.find()
    except ImportError as error:
        return str(error)
    if api.rtx or api.lean:
        return f"{api} does not build engines for this test"
    return _native.cuda_problem()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(problem() is not None, reason=str(problem())),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def one_builder() -> Any:
    """All engines of this file by one IBuilder: making one loads all of TensorRT's kernels."""
    with keep_builder():
        yield


PROFILES = (
    ht.Profile({"x": (1, 1, 64)}, {"x": (1, 4, 64)}, {"x": (2, 8, 64)}),
    ht.Profile({"x": (1, 8, 64)}, {"x": (4, 64, 64)}, {"x": (8, 300, 64)}),
)


def reference(x: Array, weight: Array, scale: Array, bias: Array | None, activation: str = "none") -> Array:
    """hwkern/reference.py in numpy: every operation one float32 operation. ``weight [N, K]`` int8."""
    f = np.float32
    absmax = np.abs(x.astype(f)).max(-1)
    scale_m = np.maximum(absmax / QMAX, SCALE_MIN)
    q = np.clip(np.rint(x.astype(f) * (f(1) / scale_m)[..., None]), -QMAX, QMAX)
    total = q.astype(np.float64) @ weight.astype(np.float64).T  # exact: below 2⁵³
    y = total.astype(f) * scale_m[..., None] * scale
    if bias is not None:
        y = y + bias.astype(f)
    if activation == "relu":
        y = np.maximum(y, f(0))
    return y


def model(k: int, n: int, dtype: int, bias: bool = True, activation: str = "none", seed: int = 0) -> tuple[Any, ...]:
    """(ONNX model of one LinearInt8 over x [batch, length, K], int8 weight [N, K], its scale, the bias)."""
    rng = np.random.default_rng(seed)
    packed, scale = quantize_weight(rng.standard_normal((n, k), dtype=np.float32))
    shift = rng.standard_normal(n, dtype=np.float32) if bias else None
    variant = opdef.Variant(dtype, activation=activation, has_bias=bias)
    tensors = {"weight": packed, "weight_scale": scale, "bias": shift}
    node = opdef.make_node(variant, k, n, variant.inputs, "y", "linear")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", "length", k])],
        [helper.make_tensor_value_info("y", dtype, ["batch", "length", n])],
        [numpy_helper.from_array(tensors[name], name) for name in variant.inputs[1:]],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    opdef.add_functions(made, [variant])
    return made, packed[:, :k], scale, shift


def ulp(y: Array, dtype: Any) -> Array:
    """One unit in the last place of ``dtype`` at each value."""
    return np.spacing(np.abs(y).astype(dtype)).astype(np.float32)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """An engine of one float16 linear with two profiles, on disk."""
    made, weight, scale, bias = model(64, 96, TensorProto.FLOAT16)
    path = tmp_path_factory.mktemp("engine") / "linear.engine"
    return ht.build(made, PROFILES, "fp16", path=path), weight, scale, bias


@pytest.mark.parametrize(
    ("dtype", "precision"), [(TensorProto.FLOAT16, "fp16"), (TensorProto.FLOAT, "fp32"), (TensorProto.BFLOAT16, "bf16")]
)
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(("k", "n", "bias"), [(64, 96, True), (100, 33, False), (1, 1, True), (1000, 256, True)])
def test_an_engine_gives_the_reference(dtype: int, precision: str, activation: str, k: int, n: int, bias: bool) -> None:
    if precision == "bf16" and not _api.find().strongly_typed:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    made, weight, scale, shift = model(k, n, dtype, bias, activation)
    profile = ht.Profile({"x": (1, 1, k)}, {"x": (2, 16, k)}, {"x": (4, 64, k)})
    with ht.Runner(ht.build(made, profile, precision)) as run:
        for batch, length in ((1, 1), (2, 16), (4, 63)):
            wire = helper.tensor_dtype_to_np_dtype(dtype)
            x = np.random.default_rng(length).standard_normal((batch, length, k), dtype=np.float32).astype(wire)
            y = run({"x": x})["y"]
            wanted = reference(x, weight, scale, shift, activation)
            # One rounding to the output type; the same float32 value gives the same bits.
            np.testing.assert_array_equal(y.astype(np.float32), wanted.astype(wire).astype(np.float32))


def test_another_process_loads_the_engine(engine: tuple[Any, ...], tmp_path: Path) -> None:
    built, weight, scale, bias = engine
    x = np.random.default_rng(0).standard_normal((2, 7, 64), dtype=np.float32).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    code = f"""
        import numpy as np, hwkern.tensorrt as ht
        with ht.Runner({str(built.path)!r}) as run:
            np.save({str(tmp_path / "y.npy")!r}, run({{"x": np.load({str(tmp_path / "x.npy")!r})}})["y"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, env=dict(os.environ))
    wanted = reference(x, weight, scale, bias).astype(np.float16)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)


def test_metadata_beside_the_engine(engine: tuple[Any, ...]) -> None:
    again = ht.Engine.load(engine[0].path)
    assert again.metadata == engine[0].metadata
    assert again.metadata["plugin"].startswith("libhwkern_trt")
    assert again.metadata["gpu"]["compute"] >= 80
    assert len(again.metadata["profiles"]) == 2


def test_profiles_graphs_and_repeated_shapes(engine: tuple[Any, ...]) -> None:
    built, weight, scale, bias = engine
    with ht.Runner(built, graphs=4) as run:
        assert len(run.profiles) == 2
        for number in range(3):
            for batch, length in ((1, 4), (2, 8), (8, 300), (1, 8), (3, 9), (2, 1), (8, 299)):
                x = (
                    np.random.default_rng(number)
                    .standard_normal((batch, length, 64), dtype=np.float32)
                    .astype(np.float16)
                )
                wanted = reference(x, weight, scale, bias).astype(np.float16)
                np.testing.assert_array_equal(run({"x": x})["y"], wanted)
        with pytest.raises(ValueError, match="nearest is number 1"):
            run({"x": np.zeros((8, 301, 64), np.float16)})


def test_map_gives_the_same_in_order(engine: tuple[Any, ...]) -> None:
    built, weight, scale, bias = engine
    rng = np.random.default_rng(3)
    xs = [rng.standard_normal((1 + i % 4, 8 + i, 64), dtype=np.float32).astype(np.float16) for i in range(24)]
    with ht.Runner(built) as run:
        for x, outputs in zip(xs, run.map({"x": x} for x in xs), strict=True):
            np.testing.assert_array_equal(outputs["y"], reference(x, weight, scale, bias).astype(np.float16))


def test_threads_have_contexts_of_their_own(engine: tuple[Any, ...]) -> None:
    built, weight, scale, bias = engine
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            rng = np.random.default_rng(seed)
            for i in range(12):
                x = rng.standard_normal((1 + i % 2, 1 + i % 8, 64), dtype=np.float32).astype(np.float16)
                np.testing.assert_array_equal(run({"x": x})["y"], reference(x, weight, scale, bias).astype(np.float16))
        except BaseException as error:
            failures.append(error)

    with ht.Runner(built) as run:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures


def test_pycuda_arrays_stay_on_the_gpu(engine: tuple[Any, ...]) -> None:
    pytest.importorskip("pycuda")
    importlib.import_module("pycuda.autoprimaryctx")
    from pycuda import gpuarray

    built, weight, scale, bias = engine
    with ht.Runner(built) as run:
        for number in range(4):  # direct, captured, replayed
            x = np.random.default_rng(number).standard_normal((2, 8, 64), dtype=np.float32).astype(np.float16)
            y = run({"x": gpuarray.to_gpu(x)})["y"]
            assert isinstance(y, gpuarray.GPUArray)
            np.testing.assert_array_equal(y.get(), reference(x, weight, scale, bias).astype(np.float16))
        target = gpuarray.empty((2, 8, 96), np.float16)
        assert run({"x": gpuarray.to_gpu(x)}, outputs={"y": target})["y"] is target
        np.testing.assert_array_equal(target.get(), reference(x, weight, scale, bias).astype(np.float16))


def test_large_gpu_arrays_run_without_copies(engine: tuple[Any, ...]) -> None:
    built, weight, scale, bias = engine
    x = np.random.default_rng(0).standard_normal((8, 300, 64), dtype=np.float32).astype(np.float16)
    with ht.Runner(built, graphs=0) as run, run.context.current():
        buffer = _cuda.DeviceBuffer(x.nbytes)
        _cuda.to_device(buffer.pointer, x.ctypes.data, x.nbytes, 0)
        _cuda.synchronize(0)

        class Held:
            __cuda_array_interface__ = {  # noqa: RUF012
                "shape": x.shape, "typestr": "<f2", "data": (buffer.pointer, False), "strides": None, "version": 3,
            }  # fmt: skip

        y = run({"x": Held()})["y"].__cuda_array_interface__
        found = np.empty(y["shape"], np.float16)
        _cuda.synchronize(0)
        _cuda.to_host(found.ctypes.data, y["data"][0], found.nbytes, 0)
        _cuda.synchronize(0)
    np.testing.assert_array_equal(found, reference(x, weight, scale, bias).astype(np.float16))


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_truncated_engine_is_refused(engine: tuple[Any, ...], size: int) -> None:
    with pytest.raises(ValueError, match=r"empty|does not take this engine"):
        ht.Runner(engine[0].data[:size])


def test_rewritten_model_with_merged_products(tmp_path: Path) -> None:
    """A float model with q, k, v and GELU: rewritten, built, run, against its own float32 mathematics."""
    rng = np.random.default_rng(0)
    w = {name: rng.standard_normal((256, 256), dtype=np.float32) * np.float32(0.05) for name in ("q", "k", "v", "o")}
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}.y"], name=name) for name in ("q", "k", "v")]
    nodes += [
        helper.make_node("Add", ["q.y", "k.y"], ["s"]),
        helper.make_node("Mul", ["s", "v.y"], ["t"]),
        helper.make_node("MatMul", ["t", "o"], ["o.y"], name="o"),
        helper.make_node("Relu", ["o.y"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 256])],
        [numpy_helper.from_array(value, name) for name, value in w.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, str(tmp_path / "float.onnx"))
    report = ht.rewrite(tmp_path / "float.onnx", tmp_path / "int8.onnx", include="*")
    assert [len(node.merged) for node in report.swapped] == [3, 3, 3, 0]
    profile = ht.Profile({"x": (1, 256)}, {"x": (32, 256)}, {"x": (128, 256)})
    x = rng.standard_normal((50, 256), dtype=np.float32)
    wanted = np.maximum(((x @ w["q"] + x @ w["k"]) * (x @ w["v"])) @ w["o"], 0)
    with ht.Runner(ht.build(tmp_path / "int8.onnx", profile, "fp16")) as run:
        y = run({"x": x})["y"]
    # int8 keeps 7 bits of each operand: 1/(127·√12)·√2 ≈ 0.3 % of absmax, about 1 % of the whole, three times.
    assert np.sqrt(np.mean((y - wanted) ** 2) / np.mean(wanted**2)) < 0.04


def test_network_surgery(tmp_path: Path) -> None:
    """ht.swap on an INetworkDefinition gives what rewrite gives."""
    rng = np.random.default_rng(1)
    w, b = rng.standard_normal((256, 512), dtype=np.float32), rng.standard_normal(512, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"], name="linear"), helper.make_node("Add", ["t", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 512])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    reports = []
    profile = ht.Profile({"x": (1, 1, 256)}, {"x": (2, 16, 256)}, {"x": (4, 32, 256)})
    engine = ht.build(made, profile, "fp32", edit=lambda network: reports.append(ht.swap(network)))
    assert [node.status for node in reports[0].nodes] == ["int8"]
    x = rng.standard_normal((2, 5, 256), dtype=np.float32)
    packed, scale = quantize_weight(w.T)
    with ht.Runner(engine) as run:
        y = run({"x": x})["y"]
    np.testing.assert_allclose(y, reference(x, packed, scale, b), rtol=1e-6, atol=1e-5)  # TensorRT's own addition
