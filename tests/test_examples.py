"""The examples run as a user would run them, and what they print holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_mlp_is_patched_and_close_to_float32():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "mlp.py"), "--batch", "16"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = dict(re.findall(r"^(float32|hwkern|torch static INT8) +([\d.]+)%", done.stdout, re.MULTILINE))
    assert float(errors["float32"]) == 0
    # Two layers, each about 1.2 % from rounding both operands to 8 bits (docs/numerics.md), the first halved by ReLU.
    assert 0.3 < float(errors["hwkern"]) < 2.5


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """An example as a user runs it."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_transformer_is_patched_and_comes_back():
    pytest.importorskip("transformers")
    done = run("patch_transformer.py", "--batch", 1, "--tokens", 8)
    assert done.returncode == 0, done.stderr
    assert "the same bits after unpatch: True" in done.stdout
    # Four layers of random weights: each linear's 1.2 % error is diluted by the residuals around it.
    assert float(re.search(r"lowest ([\d.]+)", done.stdout)[1]) > 0.99


def test_a_plan_meets_its_target_or_says_that_it_misses():
    pytest.importorskip("transformers")
    for target, verdict in ((1e6, "meets"), (1e-6, "misses")):
        done = run("plan_for_latency.py", "--target-ms", target, "--batch", 1, "--tokens", 8)
        assert done.returncode == 0, done.stderr
        assert f"{verdict} the target" in done.stdout
        tried = re.findall(r"^(accurate|balanced|fastest): ", done.stdout, re.MULTILINE)
        assert tried == (["accurate"] if verdict == "meets" else ["accurate", "balanced", "fastest"])


def test_a_classifier_keeps_its_top1_or_the_exit_code_says_so():
    done = run("validate_classifier.py")
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = map(float, re.search(r"held-out top-1: ([\d.]+)% -> ([\d.]+)%", done.stdout).groups())
    assert before > 80  # it has learned
    assert before - after <= 0.5
    # No model is this much better after rounding: the bound is missed, and said.
    done = run("validate_classifier.py", "--most-drop", 0)
    assert done.returncode == int("ABOVE" in done.stdout)


def test_a_patched_model_is_exported_with_the_profiles_of_its_traffic(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = run("export_tensorrt.py", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.onnx").is_file()
    # float32 norms and GELUs in another order may move a value across a rounding boundary: one step of 1/127 of a row's
    # largest, in one of 256 or 1024 inputs, is some 1e-4 of the output.
    assert float(re.search(r"relative error of ([\d.e-]+)", done.stdout)[1]) < 1e-3
    assert "chosen" in done.stdout
    assert re.search(r"^(engine: |no engine here: )", done.stdout, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and this machine has one")
def test_an_onnx_model_is_reported_on_without_a_gpu_too():
    pytest.importorskip("onnx")
    done = run("tensorrt_bert.py")
    assert done.returncode == 0, done.stderr
    assert "8 of 8 matrix multiplies are int8 now" in done.stdout
    assert "chosen" in done.stdout  # the profiles
    assert re.search(r"^no plan here, which is made by timing engines: .+$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 48), (16, 512, 256)])
def test_the_kernels_run_on_arrays_of_other_libraries(m, n, k):
    pytest.importorskip("numpy")
    done = run("kernels_without_torch.py", "--m", m, "--n", n, "--k", k)
    assert done.returncode == 0, done.stderr
    # Both operands rounded to 8 bits: 0.4 % to 0.6 % each over Gaussian rows.
    assert float(re.search(r"relative error ([\d.]+)%", done.stdout)[1]) < 1.5
    if "computed in numpy" not in done.stdout:
        # Outputs below 16 with 11 bits: the rounding to float16 may differ by one step of 2⁻⁷.
        assert float(re.search(r"largest difference to numpy ([\d.e-]+)", done.stdout)[1]) <= 2**-7
