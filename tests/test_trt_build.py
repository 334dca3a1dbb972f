"""build and load_plugin with real TensorRTs on a machine without a GPU: TensorRT-RTX builds engines there.

TensorRT-RTX's parser needs libtensorrt_rtx.so on LD_LIBRARY_PATH from the start of the process, and aborts without; so
each case is a Python of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)

from onnx_helpers import model, node, normal  # noqa: E402

import hwkern.tensorrt as ht  # noqa: E402
from hwkern import _native  # noqa: E402
from hwkern.tensorrt import _api, plugin  # noqa: E402

has_plugin = plugin.LIBRARIES["v3"] in _native.tensorrt_plugins()
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None or not has_plugin,
    reason="needs TensorRT-RTX (pip install tensorrt_rtx) and a hwkern built with the plugin",
)


def child(
    code: str, *arguments: Path | str, library: bool = True, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python, with TensorRT-RTX's link in place."""
    environment = dict(os.environ)
    if library:
        environment["LD_LIBRARY_PATH"] = str(plugin.rtx_library_folder())
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A two-layer perceptron with a residual, rewritten."""
    w, v, b = normal(256, 512, std=0.05), normal(512, 256, seed=1, std=0.05), normal(512, seed=2)
    nodes = [
        node("MatMul", ["x", "w"], ["t"], name="up"), node("Add", ["t", "b"], ["u"]), node("Relu", ["u"], ["r"]),
        node("MatMul", ["r", "v"], ["d"], name="down"), node("Add", ["x", "d"], ["y"]),
    ]  # fmt: skip
    made = model(nodes, {"w": w, "v": v, "b": b}, ("batch", "length", 256), ("batch", "length", 256))
    report = ht.rewrite(made, tmp_path / "m.onnx", include="*", fuse_residual=True)
    assert [n.status for n in report.nodes] == ["int8", "int8"]
    return tmp_path / "m.onnx"


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_engines_for_three_gpus_with_dynamic_shapes(encoder: Path, tmp_path: Path, precision: str) -> None:
    code = """
        import json, sys, hwkern.tensorrt as ht
        requests = [{"x": (1, n, 256)} for n in (3, 5, 100, 120)]
        engine = ht.build(sys.argv[1], ht.profiles_from(requests, 2), sys.argv[2], path=sys.argv[3],
                          compute_capabilities=["SM80", "SM89", "SM120"], trt="tensorrt_rtx")
        print(json.dumps(engine.metadata))
    """
    done = child(code, encoder, precision, tmp_path / "m.engine")
    metadata = json.loads(done.stdout.splitlines()[-1])
    assert metadata["plugin"] == "libhwkern_trt.so"
    assert metadata["precision"] == precision
    assert metadata["rewrite"]["nodes"] == {"up": "w8a8_dynamic", "down": "w8a8_dynamic"}
    assert len(metadata["profiles"]) == 2
    engine = ht.Engine.load(tmp_path / "m.engine")
    assert engine.metadata == metadata
    assert len(engine.data) == metadata["engine_bytes"] > 2 * 256 * 512


@needs_rtx
def test_the_two_line_case_and_progress(encoder: Path) -> None:
    code = """
        import sys, hwkern.tensorrt as ht
        engine = ht.build_engine(sys.argv[1])
        assert engine.metadata["profiles"][0]["max"] == {"x": [32, 512, 256]}, engine.metadata
        phases = set()
        ht.build(sys.argv[1], progress=lambda phase, step, steps: phases.add(phase))
        assert phases
        def stop(*_): raise KeyError("stop here")
        try:
            ht.build(sys.argv[1], progress=stop)
        except KeyError as error:
            print("stopped:", error)
    """
    assert "stopped: 'stop here'" in child(code, encoder).stdout


@needs_rtx
def test_the_plugin_can_be_embedded(encoder: Path) -> None:
    code = """
        import sys, hwkern.tensorrt as ht
        plain, embedded = ht.build(sys.argv[1]), ht.build(sys.argv[1], embed_plugin=True)
        library = ht.plugin_path().stat().st_size
        assert embedded.metadata["plugin_embedded"]
        assert len(embedded.data) > len(plain.data) + 0.9 * library, (len(embedded.data), len(plain.data), library)
    """
    child(code, encoder)


@needs_rtx
def test_without_the_link_there_is_a_sentence_and_no_abort(encoder: Path) -> None:
    done = child("import sys, hwkern.tensorrt as ht; ht.build(sys.argv[1])", encoder, library=False, check=False)
    assert done.returncode == 1
    assert "rtx_library_folder" in done.stderr


@needs_rtx
def test_the_command_line_restarts_itself_with_the_link(encoder: Path, tmp_path: Path) -> None:
    code = "import sys; from hwkern.cli import main; sys.exit(main(['trt', *sys.argv[1:]]))"
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    target = tmp_path / "cli.engine"
    shapes = ["--min", "x:1x1x256", "--opt", "x:1x16x256", "--max", "x:2x32x256", "--compute-capability", "SM89"]
    command = [sys.executable, "-c", code, "build", str(encoder), str(target), *shapes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "cli.engine.json").read_text())["profiles"][0]["opt"] == {"x": [1, 16, 256]}


@needs_rtx
def test_bad_requests_to_build(encoder: Path, tmp_path: Path) -> None:
    code = """
        import sys, hwkern.tensorrt as ht
        P = ht.Profile
        good = {"x": (1, 1, 256)}
        def refused(error, *args, **kwargs):
            try:
                ht.build(*args, **kwargs)
            except error as found:
                print(found)
            else:
                raise AssertionError(kwargs)
        refused(ValueError, sys.argv[1], precision="int4")
        refused(ValueError, sys.argv[1], [])
        refused(ValueError, sys.argv[1], P({"z": (1,)}, {"z": (1,)}, {"z": (1,)}))
        refused(ValueError, sys.argv[1], P({"x": (1, 1, 255)}, {"x": (1, 1, 255)}, {"x": (1, 1, 255)}))
        refused(ValueError, sys.argv[1], P({}, {}, {}))
        refused(ValueError, sys.argv[1], P(good, good, good), compute_capabilities=["SM90"])
        refused(ValueError, sys.argv[1], P(good, good, good), timing_cache="cache")
        refused(ValueError, b"junk")
        refused(FileNotFoundError, sys.argv[1] + ".none")
        refused(RuntimeError, sys.argv[2])
    """
    w = normal(64, 64)
    broken = model([node("NoSuchOp", ["x"], ["t"]), node("MatMul", ["t", "w"], ["y"])], {"w": w})
    onnx.save(broken, str(tmp_path / "broken.onnx"))
    lines = child(code, encoder, tmp_path / "broken.onnx").stdout.splitlines()
    for text in ("'int4'", "profiles is empty", "names 'z'", "255", "says nothing", "SM90", "no timing cache", "ONNX"):
        assert any(text in line for line in lines), (text, lines)
    assert any("cannot parse the model" in line and "NoSuchOp" in line for line in lines), lines


@needs_rtx
@pytest.mark.parametrize("name", ["tensorrt_rtx"])
def test_loading_the_plugin_twice(name: str) -> None:
    code = """
        import importlib, sys, hwkern.tensorrt as ht
        from hwkern.tensorrt import _api, plugin
        api = _api.find(sys.argv[1])
        assert not plugin.is_loaded(api)
        first = ht.load_plugin(sys.argv[1])
        assert plugin.is_loaded(api)
        assert ht.load_plugin(importlib.import_module(sys.argv[1])) == first == ht.load_plugin()
    """
    child(code, name)


@needs_rtx
@pytest.mark.parametrize(
    "change", ["k = -1", "k = 1 << 17", "k = 63", "scheme = 'w4'", "activation = 'swish2'", "bias = 1"]
)
def test_absurd_attributes_are_refused_with_a_sentence(change: str) -> None:
    code = """
        import sys, numpy as np
        from onnx import TensorProto as T, helper as h, numpy_helper as nh
        import hwkern.tensorrt as ht
        from hwkern.tensorrt import opdef
        k, scheme, activation, bias = 100, "w8a8_dynamic", "none", 0
        exec(sys.argv[1])
        node = opdef.make_node(opdef.Variant(T.FLOAT16), k, 64, ["x", "w", "s"], "y", "n")
        for a in node.attribute:
            if a.name == "scheme": a.s = scheme.encode()
            if a.name == "activation": a.s = activation.encode()
            if a.name == "has_bias": a.i = bias
        weights = [nh.from_array(np.zeros((64, 112), np.int8), "w"), nh.from_array(np.ones(64, np.float32), "s")]
        g = h.make_graph([node], "g", [h.make_tensor_value_info("x", T.FLOAT16, ["b", 100])],
                         [h.make_tensor_value_info("y", T.FLOAT16, ["b", 64])], weights)
        m = h.make_model(g, opset_imports=[h.make_opsetid("", 17), h.make_opsetid(node.domain, 1)], ir_version=8)
        try:
            ht.build(m)
        except RuntimeError as error:
            print("refused:", error)
    """
    assert "refused:" in child(code, change).stdout


# ---- without any TensorRT ------------------------------------------------------------------------------------------


def test_no_tensorrt_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_api, "MODULES", ("no_such_tensorrt",))
    with pytest.raises(ImportError, match="pip install tensorrt"):
        _api.find()


def test_no_plugin_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "LIBRARIES", {"v3": "libnone.so", "v2": "libnone8.so"})
    with pytest.raises(FileNotFoundError, match=r"libnone8\.so.*hwkern doctor"):
        ht.plugin_path(version=8)


def test_importing_loads_neither_torch_nor_onnx_nor_tensorrt() -> None:
    code = """
        import sys, hwkern, hwkern.tensorrt, hwkern.cli
        hwkern.cli.parser()
        loaded = {"torch", "onnx", "tensorrt", "tensorrt_rtx", "numpy"} & set(sys.modules)
        assert not loaded, loaded
        assert "build" in dir(hwkern.tensorrt)
    """
    child(code, library=False)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it has Engine"):
        ht.nothing  # noqa: B018


def test_engines_travel_with_their_metadata(tmp_path: Path) -> None:
    engine = ht.Engine(b"data", {"hwkern": "1"})
    assert engine.save(tmp_path / "e.engine") == engine.path
    again = ht.Engine.load(tmp_path / "e.engine")
    assert (again.data, again.metadata) == (b"data", {"hwkern": "1"})
    (tmp_path / "e.engine.json").unlink()
    assert ht.Engine.load(tmp_path / "e.engine").metadata == {}


def test_cli_rewrites_and_inspects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hwkern.cli import main

    made: Any = model([node("MatMul", ["x", "w"], ["y"], name="big")], {"w": normal(512, 512)}, ("b", 512), ("b", 512))
    onnx.save(made, str(tmp_path / "m.onnx"))
    report = tmp_path / "r.json"
    assert main(["trt", "rewrite", str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx"), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["swapped"] == 1
    assert main(["trt", "inspect", str(tmp_path / "o.onnx")]) == 0
    assert "w8a8_dynamic" in capsys.readouterr().out
    assert main(["trt", "rewrite", str(tmp_path / "none.onnx"), str(tmp_path / "o.onnx")]) == 1
    assert "none.onnx" in capsys.readouterr().err
    assert main(["trt", "build", str(tmp_path / "m.onnx"), str(tmp_path / "e"), "--min", "x:1"]) in (1, 2)
    assert main(["trt", "rewrite", str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx"), "--include", "zz"]) == 1
    assert "matches no MatMul" in capsys.readouterr().err


def test_cli_shapes() -> None:
    from hwkern.tensorrt.cli import UsageError, parse_shapes

    assert parse_shapes("x:1x128,a:b:4") == {"x": (1, 128), "a:b": (4,)}
    for text in ("x", "x:", ":1", "x:1xq", "x:1,"):
        with pytest.raises(UsageError, match="no shape"):
            parse_shapes(text)
