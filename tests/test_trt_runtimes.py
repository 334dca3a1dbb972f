"""The plugin libraries inside NVIDIA's own TensorRT packages, without a GPU.

Packages: ``tensorrt_rtx`` (1.7 and newer; builds engines; needs onnx), ``tensorrt_lean`` (10.x and 11.x),
``tensorrt_bindings`` with libnvinfer.so.8 beside it (8.6). They are looked for in this Python and in the folders of
``HWKERN_TENSORRT_PACKAGES`` (a list like PATH), each made by ``pip install --target``: two versions of a package cannot
live in one environment. Every check runs in its own process: a plugin that is wrong takes the process with it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwkern import _native

CHILD = Path(__file__).with_name("trt_runtime_child.py")


def found(package: str, needs: str = "") -> list[Path]:
    """Folders with the package (and a file matching ``needs``)."""
    folders = [Path(p) for p in os.environ.get("HWKERN_TENSORRT_PACKAGES", "").split(os.pathsep) if p]
    folders += [Path(p) for p in sys.path if p]
    return [f for f in folders if (f / package).is_dir() and (not needs or any(f.glob(needs)))]


def cases(package: str, needs: str = "") -> list[object]:
    folders = found(package, needs)
    if not folders:
        reason = f"{package} is not installed here, nor in a folder of HWKERN_TENSORRT_PACKAGES"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(folder, id=folder.name) for folder in folders]


def run(folder: Path, module: str, library: str, check: str, libraries: list[Path]) -> str:
    path = _native.tensorrt_plugins().get(library)
    if path is None:
        pytest.skip(f"this build of hwkern has no {library}")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
        "LD_LIBRARY_PATH": os.pathsep.join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(CHILD), module, str(path), check],
        capture_output=True, text=True, check=False, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout
    return done.stdout + done.stderr


@pytest.mark.parametrize("folder", cases("tensorrt_lean_bindings"))
def test_lean_runtime_loads_creates_and_refuses(folder: Path) -> None:
    run(folder, "tensorrt_lean_bindings", "libhwkern_trt.so", "create_v3", [])


@pytest.mark.parametrize("folder", cases("tensorrt_lean_bindings"))
def test_lean_runtime_is_found_under_every_name(folder: Path) -> None:
    run(folder, "tensorrt_lean_bindings", "libhwkern_trt.so", "load_by_name", [])


def needs_onnx(folder: Path) -> None:
    if not (folder / "onnx").is_dir() and importlib.util.find_spec("onnx") is None:
        pytest.skip("onnx is not installed, which makes the models of this test")


def rtx(folder: Path, tmp_path: Path, check: str) -> str:
    # TensorRT-RTX 1.7's parser opens libtensorrt_rtx.so, the wheel has libtensorrt_rtx.so.1, and it aborts without.
    library = next((folder / "tensorrt_rtx_libs").glob("libtensorrt_rtx.so.*"))
    (tmp_path / "libtensorrt_rtx.so").symlink_to(library)
    return run(folder, "tensorrt_rtx", "libhwkern_trt.so", check, [tmp_path])


@pytest.mark.parametrize("folder", cases("tensorrt_rtx", "tensorrt_rtx_libs/libtensorrt_rtx.so.*"))
def test_rtx_loads_creates_and_refuses(folder: Path, tmp_path: Path) -> None:
    rtx(folder, tmp_path, "create_v3")


@pytest.mark.parametrize("folder", cases("tensorrt_rtx", "tensorrt_rtx_libs/libtensorrt_rtx.so.*"))
def test_rtx_builds_engines_for_four_gpus_with_dynamic_shapes(folder: Path, tmp_path: Path) -> None:
    needs_onnx(folder)
    said = rtx(folder, tmp_path, "engines")
    assert said.count("engine ") == 6
    assert "hwkern TensorRT plugin:" not in said
    assert "not found in plugin node" not in said, "a field that the model does not have"


@pytest.mark.parametrize("folder", cases("tensorrt_rtx", "tensorrt_rtx_libs/libtensorrt_rtx.so.*"))
def test_rtx_builds_an_engine_with_a_fused_norm(folder: Path, tmp_path: Path) -> None:
    needs_onnx(folder)
    said = rtx(folder, tmp_path, "norm_engine")
    if not hasattr(_native.extension(), "norm_quantize"):
        pytest.skip("this build of hwkern has no fused norm")
    assert "engine with NormLinearInt8" in said
    assert "not found in plugin node" not in said


@pytest.mark.parametrize("folder", cases("tensorrt_rtx", "tensorrt_rtx_libs/libtensorrt_rtx.so.*"))
def test_rtx_builds_an_engine_with_attention(folder: Path, tmp_path: Path) -> None:
    needs_onnx(folder)
    said = rtx(folder, tmp_path, "attention_engine")
    assert "engine with Attention" in said
    assert "not found in plugin node" not in said


@pytest.mark.parametrize("folder", cases("tensorrt_rtx", "tensorrt_rtx_libs/libtensorrt_rtx.so.*"))
def test_rtx_gets_sentences_and_no_crash_from_absurd_models(folder: Path, tmp_path: Path) -> None:
    needs_onnx(folder)
    said = rtx(folder, tmp_path, "refusals")
    for sentence in (
        "last dimension of x is 100, but in_features 116 needs 116",
        "in_features is -3",
        "has 4 inputs, but its fields speak of 3",
        "weight has 64 rows, but out_features is 65",
        'field scheme is "w4a4"; known are',
    ):
        assert "hwkern TensorRT plugin: " in said
        assert sentence in said, said


@pytest.mark.parametrize("check", ["create_v2", "load_v2"])
@pytest.mark.parametrize("folder", cases("tensorrt_bindings", "libnvinfer.so.8"))
def test_tensorrt_8_registers_creates_and_refuses(folder: Path, check: str) -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("tensorrt_bindings 8.6.1 is looked for in Python 3.11")
    run(folder, "tensorrt_bindings", "libhwkern_trt8.so", check, [folder])
