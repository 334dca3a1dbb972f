"""export: a patched torch model as ONNX with the very bytes of its packed weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)
pytest.importorskip("onnxscript", reason="onnxscript is not installed", exc_type=ImportError)

from onnx import numpy_helper  # noqa: E402
from onnx_helpers import evaluate, run  # noqa: E402

import hwkern  # noqa: E402
import hwkern.tensorrt as ht  # noqa: E402
from hwkern.tensorrt import opdef  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it exports


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Sequential(nn.Linear(512, 384), nn.ReLU(), nn.Linear(384, 400, bias=False)).to(dtype).eval()
    hwkern.patch(made, include="*")
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_exported_model_gives_torchs_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    made = perceptron(dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(3, 5, 512, dtype=dtype)
    path = ht.export(made, (x,), tmp_path / "m.onnx", ({0: batch},), input_names=["x"], output_names=["y"])
    exported = onnx.load(str(path))
    nodes = opdef.hwkern_nodes(exported)
    assert [opdef.attributes(n)["in_features"] for n in nodes] == [512, 384]
    weights = {t.name: numpy_helper.to_array(t) for t in exported.graph.initializer}
    first: Any = made[0]  # type: ignore[index]
    np.testing.assert_array_equal(weights[nodes[0].input[1]], first.weight.numpy())
    np.testing.assert_array_equal(weights[nodes[0].input[2]], first.weight_scale.numpy())
    for rows in (3, 7):
        x = torch.randn(rows, 5, 512, dtype=dtype)
        with torch.no_grad():
            y = made(x).numpy()
        np.testing.assert_array_equal(evaluate(exported, {"x": x.numpy()})[0], y)
        by_runtime = run(str(path), {"x": x.numpy()})[0]
        if dtype == torch.float32:
            np.testing.assert_array_equal(by_runtime, y)
        else:  # ONNX Runtime leaves out the rounding to float16 between two layers, which moves some integers by 1
            assert np.abs(by_runtime - y).max() <= 0.01 * np.abs(y).max()


def test_an_int8_table_is_exported_as_a_float_one_with_its_values(tmp_path: Path) -> None:
    made = nn.Sequential(nn.Embedding(700, 200), nn.Linear(200, 700, bias=False)).eval()
    made[1].weight = made[0].weight  # type: ignore[union-attr]
    hwkern.patch(made, embeddings=True, include="*")
    ids = torch.randint(0, 700, (3, 5))
    path = ht.export(made, (ids,), tmp_path / "m.onnx", input_names=["ids"], output_names=["y"])
    assert isinstance(made[0], hwkern.nn.Int8Embedding)
    assert made[0].weight is made[1].weight
    with torch.no_grad():
        np.testing.assert_array_equal(evaluate(onnx.load(str(path)), {"ids": ids.numpy()})[0], made(ids).numpy())


def test_a_calibrated_layer_keeps_its_static_scale(tmp_path: Path) -> None:
    from hwkern.nn.calibrated import CalibratedInt8Linear, Calibration

    layer = CalibratedInt8Linear.from_calibration(nn.Linear(256, 192), Calibration(scale=0.03)).eval()
    x = torch.randn(7, 256)
    path = ht.export(layer, (x,), tmp_path / "m.onnx", input_names=["x"])
    exported = onnx.load(str(path))
    attributes = opdef.attributes(opdef.hwkern_nodes(exported)[0])
    assert (attributes["scheme"], attributes["has_input_scale"]) == ("w8a8_static", 1)
    with torch.no_grad():
        y = layer(x).numpy()
    np.testing.assert_array_equal(evaluate(exported, {"x": x.numpy()})[0], y)
    np.testing.assert_array_equal(run(str(path), {"x": x.numpy()})[0], y)
    shifted = CalibratedInt8Linear.from_calibration(nn.Linear(256, 192), Calibration(scale=0.03, zero_point=5)).eval()
    with pytest.raises(Exception, match="zero point 5"):
        ht.export(shifted, (x,), tmp_path / "m.onnx")


def test_a_weight_only_layer(tmp_path: Path) -> None:
    from hwkern import _weight_only  # noqa: F401  (registers the operator)
    from hwkern.nn.weight_only import WeightOnlyInt8Linear

    layer = WeightOnlyInt8Linear.from_float(nn.Linear(256, 192)).eval()
    x = torch.randn(7, 256)
    path = ht.export(layer, (x,), tmp_path / "m.onnx", input_names=["x"])
    assert [opdef.attributes(n)["scheme"] for n in opdef.hwkern_nodes(onnx.load(str(path)))] == ["w8a16"]
    with torch.no_grad():
        y = layer(x).numpy()
    # float32 sums of 256 products in an order of ONNX Runtime's own
    np.testing.assert_allclose(run(str(path), {"x": x.numpy()})[0], y, rtol=1e-5, atol=1e-4)


def test_keyword_inputs_and_a_float_model(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.linear(a) * b

    path = ht.export(Scaled().eval(), {"a": torch.randn(2, 64), "b": torch.randn(2, 64)}, tmp_path / "m.onnx")
    assert not opdef.hwkern_nodes(onnx.load(str(path)))


def test_autocast_is_refused_with_a_sentence(tmp_path: Path) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            layer = self.inner[0]  # type: ignore[index]
            return hwkern.ops.int8_linear(x, layer.weight, layer.weight_scale, None, torch.bfloat16)  # type: ignore[union-attr]

    with pytest.raises(Exception, match=r"another dtype than its input|half\(\)"):
        ht.export(Cast().eval(), (torch.randn(2, 512),), tmp_path / "m.onnx")


def test_without_onnxscript_there_is_a_sentence() -> None:
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "onnxscript" else find(name, *a)
import hwkern.tensorrt as ht, torch
try:
    ht.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), "none.onnx")
except ImportError as error:
    assert "pip install 'hwkern[onnx]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
