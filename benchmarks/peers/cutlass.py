"""CUTLASS's INT8 GEMM with row and column scales, compiled from the headers that `pip install nvidia-cutlass` brings.

``python benchmarks/peers/cutlass.py`` compiles only and prints where the library lies. It needs nvcc (PATH, or
CUDA_HOME) and takes one to two minutes of one core and 4 GB for each of the ten configurations; the result is kept in
the user's cache folder under a name made of the source, the options and the version of CUTLASS. ``--library PATH``, or
HWKERN_CUTLASS_LIBRARY in the environment, names a library that was built elsewhere.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("cutlass_int8.cu")


class Config(NamedTuple):
    """A row of the table: CTA tile and cluster (M, N, K), kernel schedule."""

    tile: tuple[int, int, int]
    cluster: tuple[int, int, int]
    schedule: str  # "" is KernelTmaWarpSpecialized

    def __str__(self) -> str:
        tile, cluster = (",".join(map(str, sizes)) for sizes in (self.tile, self.cluster))
        return f"{tile}/{cluster}/{self.schedule or 'WS'}"


# Each of the first nine was the fastest at one shape or another on an H100. The place in the list is the id.
CONFIGS = (
    Config((64, 64, 256), (1, 8, 1), ""),
    Config((64, 128, 256), (1, 1, 1), "Pingpong"),
    Config((64, 128, 256), (1, 4, 1), ""),
    Config((64, 128, 128), (2, 1, 1), "Pingpong"),
    Config((128, 128, 128), (2, 1, 1), "Pingpong"),
    Config((128, 128, 128), (1, 2, 1), "Cooperative"),
    Config((128, 256, 128), (1, 2, 1), "Cooperative"),
    Config((128, 256, 128), (2, 1, 1), "Cooperative"),
    Config((256, 128, 128), (2, 1, 1), "Cooperative"),
    Config((64, 64, 256), (1, 1, 1), ""),
)
OPTIONS = (
    "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-diag-suppress=177,20012",
    "-gencode=arch=compute_90a,code=sm_90a", "-DCUTLASS_ENABLE_GDC_FOR_SM90",
)  # fmt: skip


class UnavailableError(Exception):
    """Why there is no library, and what to do."""


def headers() -> Path:
    """The folder that holds include/ and tools/ of the installed package."""
    found = importlib.util.find_spec("cutlass_library")
    folder = Path(found.origin).parent / "source" if found and found.origin else None
    if folder is None or not (folder / "include" / "cutlass" / "cutlass.h").is_file():
        raise UnavailableError("CUTLASS's headers are not here: pip install nvidia-cutlass")
    return folder


def nvcc() -> str:
    """The compiler's path."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        raise UnavailableError("nvcc is not on PATH and not below CUDA_HOME: install the CUDA toolkit")
    return found


def cache_folder() -> Path:
    """Where compiled peers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hwkern" / "peers"


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command[:1] + command[-3:])}` failed: {done.stderr.strip()[-400:]}")


def build() -> Path:
    """Compile what is not in the cache; returns the library's path. Raises UnavailableError."""
    source, compiler = headers(), nvcc()
    version = importlib.metadata.version("nvidia-cutlass")
    stamp = hashlib.sha256(repr((SOURCE.read_bytes(), OPTIONS, CONFIGS, version)).encode()).hexdigest()[:16]
    library = cache_folder() / f"cutlass-{version}-{stamp}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    print(f"compiling {len(CONFIGS)} configurations of CUTLASS {version} into {library} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def compile_one(index: int) -> str:
            config = CONFIGS[index]
            # nvcc splits -D at commas, so the parameters are a file.
            lines = {
                "ID": index, "TILE": ",".join(map(str, config.tile)),
                "CLUSTER": ",".join(map(str, config.cluster)), "SCHEDULE": config.schedule,
            }  # fmt: skip
            unit, made = folder / f"{index}.cu", folder / f"{index}.o"
            text = "".join(f"#define PEER_{name} {value}\n" for name, value in lines.items())
            unit.write_text(f'{text}#include "{SOURCE.name}"\n', encoding="utf-8")
            include = [f"-I{path}" for path in (SOURCE.parent, source / "include", source / "tools/util/include")]
            run([compiler, *OPTIONS, *include, "-c", str(unit), "-o", str(made)])
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(CONFIGS))))
        partial = library.with_suffix(f".{os.getpid()}")
        run([compiler, "-shared", *objects, "-o", str(partial)])
        partial.replace(library)
    return library


@functools.cache
def load(path: str | None = None) -> ctypes.CDLL:
    """The library, built where needed. Raises UnavailableError."""
    path = path or os.environ.get("HWKERN_CUTLASS_LIBRARY") or str(build())
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}") from error


class Kernel:
    """One configuration, called with device addresses: see cutlass_int8.cu."""

    def __init__(self, index: int) -> None:
        self.config = CONFIGS[index]
        self.function = getattr(load(), f"cutlass_int8_{index}")
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.function.argtypes = [pointer] * 5 + [integer] * 5 + [pointer]
        self.function.restype = integer

    def __call__(
        self, a: int, b: int, scale_m: int, scale_n: int, d: int, m: int, n: int, k: int, swizzle: int, overlap: bool,
        stream: int,
    ) -> None:  # fmt: skip
        """Enqueue one product; a RuntimeError with CUTLASS's status where it refuses."""
        status = self.function(a, b, scale_m, scale_n, d, m, n, k, swizzle, overlap, stream)
        if status:
            raise RuntimeError(f"CUTLASS {self.config} refused {m}×{n}×{k} (cutlass::Status {-1 - status})")


def main() -> None:
    """Compile and say where."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        print(build())
    except UnavailableError as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
