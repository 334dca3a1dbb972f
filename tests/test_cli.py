"""The command line: what `hwkern doctor` says on machines that lack something, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_gpu import H100

import hwkern
import hwkern.ops  # with the real extension: `machine` puts another in its place
from hwkern import _native, cli, doctor

GPU = H100 | {"name": "Test GPU"}


@pytest.fixture
def machine(monkeypatch):
    """A machine made of stand-ins: `machine(native=..., system_gpus=[...])`. By default a CPU-only wheel, no GPU."""

    def make(system_gpus=(), gpus=(), message="", driver=(0, 0), **native):
        defaults = {
            "version": "9.9",
            "built_with_cuda": False,
            "cuda_version": "",
            "architectures": "",
            "cuda_status": lambda: (len(gpus), message),
            "driver_version": lambda: driver,
            "device_properties": lambda i: gpus[i],
        }
        extension = SimpleNamespace(**{**defaults, **native})
        monkeypatch.setattr(hwkern, "__version__", "9.9")
        monkeypatch.setattr(_native, "extension", lambda: extension)
        monkeypatch.setattr(_native, "cuda_problem", lambda: message or None)
        monkeypatch.setattr(doctor, "gpus_of_the_system", lambda: list(system_gpus))
        monkeypatch.setattr(doctor, "nvidia_smi", lambda query: [])

    make()
    return make


CUDA = {"built_with_cuda": True, "cuda_version": "13.0", "architectures": "80-real;90"}


def doctor_json(capsys, *arguments):
    code = cli.main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def sentence(found, subject):
    texts = [f["text"] for f in found["findings"] if f["subject"] == subject and f["level"] == "broken"]
    assert len(texts) == 1, found["findings"]
    return texts[0]


def test_a_cpu_machine_is_healthy(machine, capsys):
    code, found = doctor_json(capsys)
    assert (code, found["ok"]) == (0, True)
    assert found["self_check"] == {"cpu": True}
    assert found["torch"]["version"]


def test_the_table_names_everything_that_was_found(machine, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for subject in ("native module", "GPU", "torch", "CPU", "self-check cpu", "demo"):
        assert subject in out


def test_a_missing_extension_is_broken_and_says_how_to_reinstall(machine, monkeypatch, capsys):
    def missing():
        raise ImportError("hwkern._C cannot be loaded: reinstall hwkern.")

    monkeypatch.setattr(_native, "extension", missing)
    code, found = doctor_json(capsys)
    assert code == 1
    assert "reinstall" in sentence(found, "native module")


def test_an_extension_of_another_version_is_broken(machine, capsys):
    machine(version="1.0")
    code, found = doctor_json(capsys)
    assert code == 1
    assert "1.0" in sentence(found, "native module")
    assert "9.9" in sentence(found, "native module")


def test_a_gpu_with_a_wheel_without_cuda_is_broken(machine, capsys):
    machine(system_gpus=["Test GPU"])
    code, found = doctor_json(capsys)
    assert code == 1
    assert "without CUDA" in sentence(found, "GPU")
    assert "pip install ." in sentence(found, "GPU")


def test_a_driver_older_than_the_wheel_is_broken(machine, capsys):
    machine(system_gpus=["Test GPU"], message="driver is insufficient", driver=(12040, 13000), **CUDA)
    code, found = doctor_json(capsys)
    assert code == 1
    text = sentence(found, "driver")
    assert "12.4" in text
    assert "13.0" in text
    assert "580 or newer" in text


def test_a_driver_of_an_older_minor_version_is_fine(machine, monkeypatch, capsys):
    machine(system_gpus=["Test GPU"], gpus=[GPU], driver=(13000, 13010), **CUDA)
    code, found = doctor_json(capsys, "--no-check")
    levels = {f["subject"]: f["level"] for f in found["findings"]}
    assert levels["driver"] == "ok"
    assert levels["GPU cuda:0"] == "ok"
    assert code == (0 if levels["torch"] != "broken" else 1)


def test_a_gpu_that_cuda_cannot_see_is_broken(machine, capsys):
    machine(system_gpus=["Test GPU"], message="check CUDA_VISIBLE_DEVICES.", driver=(13000, 13000), **CUDA)
    code, found = doctor_json(capsys)
    assert code == 1
    assert "CUDA_VISIBLE_DEVICES" in sentence(found, "GPU")


def test_a_gpu_older_than_ampere_is_broken(machine, capsys):
    old = GPU | {"name": "Old GPU", "compute": 75}
    machine(system_gpus=["Old GPU"], gpus=[old], driver=(13000, 13000), **CUDA)
    code, found = doctor_json(capsys, "--no-check")
    assert code == 1
    assert "7.5" in sentence(found, "GPU cuda:0")


def test_a_gpu_is_found_without_proc_or_nvidia_smi(machine, capsys):
    machine(gpus=[GPU], driver=(13000, 13000), **CUDA)
    _, found = doctor_json(capsys, "--no-check")
    assert [gpu["name"] for gpu in found["gpus"]] == ["Test GPU"]


def test_a_cpu_torch_beside_a_gpu_is_said(machine, monkeypatch, capsys):
    import torch

    machine(system_gpus=["Test GPU"], gpus=[GPU], driver=(13000, 13000), **CUDA)
    monkeypatch.setattr(torch.version, "cuda", None)
    code, found = doctor_json(capsys, "--no-check")
    assert code == 0
    assert any("CPU build" in f["text"] for f in found["findings"] if f["level"] == "note")


def test_a_missing_torch_is_said_and_not_broken(machine, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found = doctor_json(capsys)
    assert code == 0
    assert any("hwkern[torch]" in f["text"] for f in found["findings"])


def test_wrong_arithmetic_is_broken(machine, monkeypatch, capsys):
    from hwkern import ops

    right = ops.int8_linear
    monkeypatch.setattr(ops, "int8_linear", lambda *arguments: right(*arguments) * 1.0001)
    code, found = doctor_json(capsys)
    assert code == 1
    assert found["self_check"]["cpu"] is False
    assert "is wrong here" in sentence(found, "self-check cpu")


def test_a_crash_in_the_self_check_is_a_finding(machine, monkeypatch, capsys):
    from hwkern import ops

    def crash(*arguments):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(ops, "int8_linear", crash)
    code, found = doctor_json(capsys)
    assert code == 1
    assert "illegal instruction" in sentence(found, "self-check cpu")


def test_missing_demo_packages_are_named_with_the_remedy(machine, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    code, found = doctor_json(capsys, "--no-check")
    assert code == 0
    assert any("pip install 'hwkern[demo]'" in f["text"] for f in found["findings"])


def test_brackets_survive_the_table(machine, monkeypatch, capsys):
    # rich reads [demo] as markup unless told otherwise.
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    cli.main(["doctor", "--no-check"])
    assert "hwkern[demo]" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hwkern {hwkern.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: hwkern" in capsys.readouterr().err


def test_help_and_doctor_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from hwkern import cli\n"
        "cli.main(['doctor', '--json'])\n"
        "cli.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_plain_tables_line_up():
    from hwkern._console import plain_table

    lines = plain_table("title", ["name", "µs"], [["a", "1.0"], ["long name", "12.5"]]).split("\n")
    assert lines == ["title", "name         µs", "---------  ----", "a           1.0", "long name  12.5"]


@pytest.mark.gpu
def test_this_gpu_passes_the_self_check():
    assert doctor.check_device("cuda:0") is None


def test_a_reader_who_leaves_early_is_no_traceback():
    command = [sys.executable, "-m", "hwkern.cli", "explain", "16", "4096", "4096", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1
