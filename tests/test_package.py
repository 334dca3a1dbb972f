"""What can break in packaging: what the extension links, what it imports, what the wheels hold, and the checkers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    # The loader is named because scripts/gpu-check has no suffix to tell it by.
    loader = importlib.machinery.SourceFileLoader(f"script_{Path(path).stem.replace('-', '_')}", str(ROOT / path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def extension() -> Path:
    from hwkern import _C

    return Path(_C.__file__)


# ---- The installed package -------------------------------------------------------------------------------------------


def test_extension_links_neither_torch_nor_cuda() -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    text = subprocess.run(["readelf", "-d", extension()], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|cud|nv|python)", name)], needed


def test_extension_exports_its_init_function_only() -> None:
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "--dynamic", "--defined-only", "--extern-only", "--format=posix", extension()]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in text.splitlines()]
    assert "PyInit__C" in names
    assert not [name for name in names if "hwkern" in name or name.startswith("cuda")], names


def test_imports_without_torch() -> None:
    # A None in sys.modules makes `import torch` fail as if it were not installed.
    code = """
import sys
sys.modules["torch"] = None
import hwkern, hwkern.hardware, hwkern._native
assert hwkern._native.extension().version == hwkern.__version__
try:
    hwkern.patch
except ImportError as error:
    assert "torch" in str(error).lower(), error
else:
    raise SystemExit("hwkern.patch came without torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_import_from_the_repository_root_finds_the_extension() -> None:
    # Python started there has the source folder on its path, which holds no compiled module.
    code = "import hwkern._C; print(hwkern._C.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == extension()


def test_versions_agree() -> None:
    import hwkern
    from hwkern import _C

    assert hwkern.__version__ == _C.version == version("hwkern")


def test_extension_tells_what_it_was_built_with() -> None:
    from hwkern import _C

    assert _C.built_with_cuda == bool(_C.architectures) == bool(_C.cuda_version)
    if _C.built_with_cuda:
        assert {"80", "90"} <= {entry.split("-")[0] for entry in _C.architectures.split(",")}


def test_package_is_typed_and_licensed() -> None:
    import hwkern

    assert any((Path(folder) / "py.typed").is_file() for folder in hwkern.__path__)
    assert [file for file in distribution("hwkern").files or [] if file.name == "LICENSE"]


# ---- The build backend: which compiler, and when it is fetched -------------------------------------------------------


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build backend on a machine without any CUDA compiler."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is needed to build, not to run")
    module = load("cmake/hwkern_build.py")
    for name in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_candidates", lambda: iter(()))
    return module


def fake_nvcc(folder: Path, release: str) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("settings", "variables"),
    [
        ({"cmake.define.HWKERN_CUDA": "OFF"}, {}),
        ({"cmake.define.HWKERN_CUDA": ["ON", "off"]}, {}),
        ({"skbuild.cmake.define.HWKERN_CUDA": "0"}, {}),
        ({"cmake.args": "-GNinja;-DHWKERN_CUDA=OFF"}, {}),
        ({"cmake.args": ["-GNinja", "-DHWKERN_CUDA:BOOL=FALSE"]}, {}),
        (None, {"CMAKE_ARGS": "-DHWKERN_CUDA:BOOL=OFF -DOTHER=1"}),
        (None, {"CMAKE_ARGS": "-D HWKERN_CUDA=OFF"}),
        (None, {"SKBUILD_CMAKE_ARGS": "-DOTHER=1;-DHWKERN_CUDA=NO"}),
        (None, {"SKBUILD_CMAKE_DEFINE": "OTHER=1;HWKERN_CUDA=OFF"}),
    ],
)
def test_cuda_off_is_understood_however_it_is_said(
    backend: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str | list[str]] | None,
    variables: dict[str, str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not backend.cuda_wanted(settings)
    assert not [name for name in backend.get_requires_for_build_wheel(settings) if name.startswith("nvidia")]


def test_a_build_without_a_compiler_fetches_every_pinned_part(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    for requires in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        fetched = [name for name in requires({"cmake.define.HWKERN_CUDA": "ON"}) if name.startswith("nvidia")]
        assert fetched == backend.NVCC_WHEELS
        assert all("==" in name for name in fetched)


def test_a_platform_without_compiler_wheels_is_an_error_with_remedies(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.platform, "machine", lambda: "riscv64")
    with pytest.raises(SystemExit, match=r"riscv64[\s\S]*HWKERN_CUDA=OFF"):
        backend.get_requires_for_build_wheel()


def test_cuda_asked_for_and_impossible_is_never_a_cpu_wheel(backend: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no CUDA compiler here[\s\S]*isolation[\s\S]*HWKERN_CUDA=OFF"):
        backend.build_wheel(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_old_compiler_is_named_and_passed_over(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = fake_nvcc(tmp_path / "old", "11.8"), fake_nvcc(tmp_path / "new", "12.4")
    monkeypatch.setattr(backend, "_candidates", lambda: iter([("PATH", old)]))
    assert backend.find_compiler() is None
    assert re.search(r"old/nvcc.*11\.8, too old", capfd.readouterr().err)
    monkeypatch.setattr(backend, "_candidates", lambda: iter([("PATH", old), ("CUDA_HOME", new)]))
    assert backend.find_compiler() == (new, (12, 4))


def test_the_compiler_of_cuda_home_comes_before_the_one_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is needed to build, not to run")
    module = load("cmake/hwkern_build.py")
    (tmp_path / "home" / "bin").mkdir(parents=True)
    (tmp_path / "path").mkdir()
    at_home = fake_nvcc(tmp_path / "home" / "bin", "12.1")
    fake_nvcc(tmp_path / "path", "12.2")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert module.find_compiler() == (at_home, (12, 1))


# ---- The checkers fail on what they are there for --------------------------------------------------------------------

PTXAS = """\
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
ptxas info    : Function properties for _Z6kernelv
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 360 bytes cmem[0]
"""


@pytest.mark.parametrize(("stack", "stores", "loads", "code"), [(0, 0, 0, 0), (8, 0, 0, 1), (0, 4, 0, 1), (0, 0, 4, 1)])
def test_check_ptxas_fails_on_spills_and_local_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stack: int, stores: int, loads: int, code: int
) -> None:
    log = tmp_path / "build.log"
    # The second kernel is always fine: one bad kernel among good ones must be enough.
    log.write_text(
        PTXAS.format(stack=stack, stores=stores, loads=loads)
        + PTXAS.replace("_Z6kernelv", "_Z5otherv").format(stack=0, stores=0, loads=0)
    )
    assert load("scripts/check_ptxas.py").main([str(log)]) == code
    assert ("FAILED _Z6kernelv" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize("text", ["", "ninja: no work to do.\n", PTXAS.splitlines()[0]])
def test_check_ptxas_fails_on_a_log_without_a_whole_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "build.log").write_text(text)
    assert load("scripts/check_ptxas.py").main([str(tmp_path / "build.log")]) == 1


def sass(architecture: str, kernel: str, *opcodes: str) -> str:
    body = "".join(f"        /*{i:04x}*/  @!P0 {opcode} R1, R2 ;  /* 0x0 */\n" for i, opcode in enumerate(opcodes))
    name = f"_ZN6hwkern12_GLOBAL__N__9_12_gemm_sm80_cu{len(kernel)}{kernel}I6ConfigEEv4Gemm"
    return f"\tcode for {architecture}\n\t\tFunction : {name}\n{body}"


MMA_SYNC = ("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "IMMA.16832.S8.S8", "STG.E.128")
WGMMA = ("UTMALDG.2D", "IGMMA.64x128x32.S8.S8", "STG.E.128")
WEIGHT_ONLY = ("LDGSTS.E.BYPASS.128", "HMMA.16816.F32", "STG.E")
HOPPER_KERNELS = ("gemm_sm90", "gemm_sm90_split", "linear_sm90", "linear_beside_sm90")
SASS = {
    **{(architecture, "gemm_sm80"): MMA_SYNC for architecture in ("sm_80", "sm_90")},
    **{(architecture, "w8a16"): WEIGHT_ONLY for architecture in ("sm_80", "sm_90")},
    **{("sm_90a", kernel): WGMMA for kernel in HOPPER_KERNELS},
}


def sass_of(changed: dict[tuple[str, str], tuple[str, ...] | None]) -> str:
    """A listing of all kernels, but those that ``changed`` names of other instructions; without those of None."""
    return "".join(sass(*where, *opcodes) for where, opcodes in (SASS | changed).items() if opcodes is not None)


@pytest.mark.parametrize(
    ("listing", "complaint"),
    [
        (sass_of({}), None),
        ("", "no kernel gemm_sm80 for sm_80"),
        *((sass_of({(where, kernel): None}), f"no kernel {kernel} for {where}") for where, kernel in SASS),
        (sass_of({("sm_90", "gemm_sm80"): MMA_SYNC[:2]}), "sm_90 has no IMMA"),
        (sass_of({("sm_80", "gemm_sm80"): MMA_SYNC[1:]}), "sm_80 has no LDGSTS"),
        (sass_of({("sm_80", "gemm_sm80"): (MMA_SYNC[0], *MMA_SYNC[2:])}), "sm_80 has no LDSM"),
        (sass_of({("sm_90", "gemm_sm80"): (*MMA_SYNC, "STL.64")}), "local memory (STL)"),
        # mma.sync in a kernel that was written for wgmma is half as fast
        *(
            (sass_of({("sm_90a", kernel): (*MMA_SYNC, "UTMALDG.2D")}), "sm_90a has no IGMMA")
            for kernel in HOPPER_KERNELS
        ),
        (sass_of({("sm_90a", "linear_sm90"): WGMMA[1:]}), "sm_90a has no UTMALDG"),
        (sass_of({("sm_90", "w8a16"): ("UTMALDG.2D", "HMMA.16816.F32", "STG.E")}), None),
        (sass_of({("sm_90", "w8a16"): ("UTMALDG.2D", "FFMA", "STG.E")}), "has no HMMA"),
        (sass_of({}) + sass("sm_80", "w8a16", "EXIT"), None),
        (sass_of({("sm_80", "w8a16"): ("EXIT",)}), "no kernel w8a16 for sm_80"),
        (sass_of({}) + sass("sm_90", "quantize_per_token_kernel", "LDL"), "local memory (LDL)"),
    ],
)
def test_check_sass_finds_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listing: str, complaint: str | None
) -> None:
    (tmp_path / "dump.txt").write_text(listing)
    assert load("scripts/check_sass.py").main(["--sass", str(tmp_path / "dump.txt")]) == bool(complaint)
    assert (complaint or "0 problems") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("csrc/gemm/gemm.cuh", 'asm volatile("exit;");', "inline assembly"),
        ("csrc/gemm/gemm.cu", '  __asm__("exit;");', "inline assembly"),
        ("csrc/ptx/mma.cuh", 'asm volatile("exit;");', None),
        ("csrc/gemm/gemm.cu", "// the asm is in csrc/ptx (not here)", None),
        ("csrc/core/a.h", "#include <torch/extension.h>", "torch/"),
        ("csrc/core/a.h", '#  include "pybind11/pybind11.h"', "pybind11/"),
        ("csrc/gemm/a.cpp", "#include <NvInfer.h>", "NvInfer"),
        ("csrc/bindings/module.cpp", "#include <pybind11/pybind11.h>", None),
        ("csrc/tensorrt/plugin.cpp", "#include <NvInferRuntime.h>", None),
        ("docs/a.md", "see /" + "home/somebody/notes", "somebody's machine"),
        ("Makefile", "OUT := /" + "work/out", "somebody's machine"),
        ("docs/a.md", "https://example.org/" + "home/page and ./wo" + "rk/a and ~/" + "work/b", None),
    ],
)
def test_check_tree_finds_the_planted_line(tmp_path: Path, path: str, line: str, complaint: str | None) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(f"// first line\n{line}\n")
    found = list(load("scripts/check_tree.py").problems(tmp_path))
    if complaint is None:
        assert not found
    else:
        assert len(found) == 1
        assert found[0].startswith(f"{path}:2: ")
        assert complaint in found[0]


WHEEL = [
    "hwkern/__init__.py",
    "hwkern/py.typed",
    "hwkern/_C.cpython-311-x86_64-linux-gnu.so",
    "hwkern-1.dist-info/METADATA",
    "hwkern-1.dist-info/entry_points.txt",
    "hwkern-1.dist-info/licenses/LICENSE",
]


@pytest.mark.parametrize(
    ("names", "complaints"),
    [
        (WHEEL, []),
        ([*WHEEL, "csrc/hwkern.h"], ["csrc/hwkern.h does not belong in it"]),
        ([*WHEEL, "hwkern/libhwkern_sm80.a"], ["hwkern/libhwkern_sm80.a does not belong in it"]),
        ([name for name in WHEEL if "_C" not in name], ["nothing like hwkern/_C.*.so in it"]),
        ([name for name in WHEEL if "LICENSE" not in name], ["nothing like hwkern-*.dist-info/licenses/LICENSE in it"]),
    ],
)
def test_check_dist_finds_strangers_and_gaps(tmp_path: Path, names: list[str], complaints: list[str]) -> None:
    wheel = tmp_path / "hwkern-1-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    assert list(load("scripts/check_dist.py").wheel_problems(wheel)) == complaints


def test_check_dist_wants_one_sdist_and_one_wheel(tmp_path: Path) -> None:
    assert load("scripts/check_dist.py").main([str(tmp_path)]) == 1


def test_check_dist_refuses_a_wheel_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("scripts/check_dist.py")
    monkeypatch.setattr(module, "MAX_WHEEL_BYTES", 100)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name in WHEEL:
            archive.writestr(name, "x" * 100)
    assert any("MB, over" in problem for problem in module.wheel_problems(tmp_path / "a.whl"))


def test_gpu_check_goes_on_after_a_failure_and_ends_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("scripts/gpu-check")
    planted = {"build": "raise SystemExit(3)", "test": "print('3 passed in 1s')"}
    for stage, code in planted.items():
        step = [sys.executable, "-c", code]
        monkeypatch.setattr(module, stage, lambda runner, stage=stage, step=step: runner.run(stage, "step", step, 60))
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--only", "test,build", "--out", str(tmp_path)])
    assert module.main() == 1
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[:3] for line in table[1:3]] == [["build", "step", "FAILED"], ["test", "step", "ok"]]
    assert "exit 3" in table[1]
    assert "3 passed" in table[2]
    assert "1 ok, 1 failed" in table[3]
    assert [row["ok"] for row in json.loads((tmp_path / "summary.json").read_text())["results"]] == [False, True]


def test_gpu_check_takes_a_run_that_only_skipped_for_a_failure(tmp_path: Path) -> None:
    module = load("scripts/gpu-check")
    runner = module.Runner(tmp_path)
    assert not runner.run("test", "gpu", [sys.executable, "-c", "print('5 skipped in 1s')"], 60, module.PASSED)
    assert runner.run("test", "gpu", [sys.executable, "-c", "print('5 passed in 1s')"], 60, module.PASSED)


def test_gpu_check_refuses_an_unknown_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--only", "tests", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        load("scripts/gpu-check").main()
