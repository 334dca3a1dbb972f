"""The build backend: scikit-build-core, plus a CUDA compiler where the machine has none.

hwkern's kernels need nvcc. A machine that has one (12.6 or newer) uses it. On any other machine the backend asks the
installer for NVIDIA's nvcc wheels as build requirements, so that ``pip install .`` gives GPU kernels everywhere. A
CPU-only build happens on request alone (``HWKERN_CUDA=OFF``), never by itself: a missing compiler is an error.

Where a compiler is looked for, in this order; the first one that is new enough wins:
``CMAKE_CUDA_COMPILER`` (a CMake definition, taken as it is), ``$CUDACXX``, ``$CUDA_HOME``, ``$CUDA_PATH``, ``$PATH``,
``/usr/local/cuda``, the wheels in this Python environment.

Run as a script it serves the Makefile: ``hwkern_build.py requires`` prints the build requirements that an environment
without build isolation needs, ``hwkern_build.py cuda-requires`` the compiler's wheels when they are needed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

ConfigSettings = dict[str, "str | list[str]"]

MIN_NVCC = (12, 0)

# Exact pins of one CUDA release: nvcc's own wheel asks for its parts loosely, and parts of different releases do not
# work together. nvvm holds the compiler proper, crt and runtime the headers and the static runtime, cccl <cuda/std/…>.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
NVCC_WHEEL_MACHINES = ("x86_64", "aarch64")

REMEDIES = """\
Ways out:
  - install NVIDIA's CUDA toolkit (12.6 or newer), or point CUDACXX at its nvcc;
  - on Linux x86_64 and aarch64, install with build isolation (without --no-build-isolation), which fetches nvcc,
    or install it yourself: pip install {wheels}
  - build without GPU kernels: pip install . -Ccmake.define.HWKERN_CUDA=OFF"""


class Compiler(NamedTuple):
    path: Path
    version: tuple[int, int]


def _say(text: str) -> None:
    print(f"hwkern: {text}", file=sys.stderr, flush=True)


def _fail(text: str) -> SystemExit:
    # SystemExit: installers show the sentence, not a traceback.
    return SystemExit(f"hwkern: {text}\n{REMEDIES.format(wheels=' '.join(NVCC_WHEELS))}")


def cmake_definitions(config_settings: ConfigSettings | None) -> dict[str, str]:
    """Every CMake definition that the user has given, in any of the ways that scikit-build-core knows."""
    arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    arguments += os.environ.get("SKBUILD_CMAKE_ARGS", "").split(";")
    arguments += [f"-D{entry}" for entry in os.environ.get("SKBUILD_CMAKE_DEFINE", "").split(";") if entry]
    for key, value in (config_settings or {}).items():
        # Installers hand over a repeated setting as a list; the last one counts.
        values = [value] if isinstance(value, str) else list(value)
        name = key.removeprefix("skbuild.")
        if name == "cmake.args":
            arguments += [part for entry in values for part in entry.split(";")]
        elif name == "cmake.define":
            arguments += [f"-D{part}" for entry in values for part in entry.split(";") if part]
        elif name.startswith("cmake.define."):
            arguments += [f"-D{name.removeprefix('cmake.define.')}={entry}" for entry in values]

    definitions = {}
    follows_d = False
    for argument in arguments:
        text = argument if follows_d else argument.removeprefix("-D")
        if (follows_d or argument.startswith("-D")) and "=" in text:
            name, _, value = text.partition("=")
            definitions[name.partition(":")[0]] = value
        follows_d = argument == "-D"
    return definitions


def cuda_wanted(config_settings: ConfigSettings | None) -> bool:
    """Whether this build is to have CUDA kernels; CMake's words for false count as OFF."""
    value = cmake_definitions(config_settings).get("HWKERN_CUDA", "ON").upper()
    return not (value in {"", "0", "OFF", "NO", "FALSE", "N", "IGNORE", "NOTFOUND"} or value.endswith("-NOTFOUND"))


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """``(13, 0)`` for CUDA 13.0; None when this is no nvcc that runs."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _candidates() -> Iterator[tuple[str, Path]]:
    if cudacxx := os.environ.get("CUDACXX"):
        yield "CUDACXX", Path(shutil.which(cudacxx) or cudacxx)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            yield name, Path(home, "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield "PATH", Path(found)
    yield "/usr/local/cuda", Path("/usr/local/cuda/bin/nvcc")
    for folder in sys.path:
        yield "this Python environment", Path(folder, "nvidia", "cu13", "bin", "nvcc")


def find_compiler() -> Compiler | None:
    """The first CUDA compiler on this machine that is new enough."""
    for source, path in _candidates():
        if not path.is_file():
            if source in {"CUDACXX", "CUDA_HOME", "CUDA_PATH"}:
                _say(f"{source} is set, but there is no {path}; looking further.")
            continue
        version = nvcc_version(path)
        if version is None:
            _say(f"{path} (from {source}) does not run; looking further.")
        elif version < MIN_NVCC:
            _say(f"{path} (from {source}) is CUDA {version[0]}.{version[1]}, too old; {MIN_NVCC[0]}.0 is the oldest.")
        else:
            return Compiler(path, version)
    return None


def _cuda_requirements(config_settings: ConfigSettings | None) -> list[str]:
    if not cuda_wanted(config_settings):
        return []
    if "CMAKE_CUDA_COMPILER" in cmake_definitions(config_settings) or find_compiler():
        return []
    if sys.platform != "linux" or platform.machine() not in NVCC_WHEEL_MACHINES:
        raise _fail(f"no CUDA compiler found, and none can be fetched for {sys.platform} {platform.machine()}.")
    _say("no usable CUDA compiler on this machine; fetching nvcc 13.0 for this build.")
    return list(NVCC_WHEELS)


@contextlib.contextmanager
def _cuda_environment(config_settings: ConfigSettings | None) -> Iterator[None]:
    """CUDACXX, and LIBRARY_PATH where nvcc does not find its own libraries, for the duration of a build."""
    if not cuda_wanted(config_settings):
        _say("building without GPU kernels, as HWKERN_CUDA=OFF asks.")
        yield
        return
    if explicit := cmake_definitions(config_settings).get("CMAKE_CUDA_COMPILER"):
        _say(f"CUDA compiler: {explicit} (CMAKE_CUDA_COMPILER)")
        yield
        return
    compiler = find_compiler()
    if compiler is None:
        raise _fail("GPU kernels were asked for (HWKERN_CUDA=ON, the default), but there is no CUDA compiler here.")
    _say(f"CUDA compiler: {compiler.path} ({compiler.version[0]}.{compiler.version[1]})")

    before = dict(os.environ)
    os.environ["CUDACXX"] = str(compiler.path)
    libraries = compiler.path.parent.parent / "lib"
    if (libraries / "libcudart_static.a").is_file():
        # The wheels keep the static runtime in lib; nvcc and the linker look in lib64.
        paths = [str(libraries), os.environ.get("LIBRARY_PATH", "")]
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_wheel(config_settings), *_cuda_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: ConfigSettings | None = None) -> list[str]:
    return [*_backend.get_requires_for_build_editable(config_settings), *_cuda_requirements(config_settings)]


def build_wheel(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    with _cuda_environment(config_settings):
        return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: ConfigSettings | None = None, metadata_directory: str | None = None
) -> str:
    with _cuda_environment(config_settings):
        return _backend.build_editable(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    if sys.argv[1:] == ["requires"]:
        print(*_backend.get_requires_for_build_editable(None), sep="\n")
    elif sys.argv[1:] == ["cuda-requires"]:
        print(*_cuda_requirements(None), sep="\n")
    else:
        raise SystemExit(f"usage: {sys.argv[0]} requires | cuda-requires")
