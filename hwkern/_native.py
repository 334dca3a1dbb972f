"""Finds the compiled extension ``hwkern._C`` and says in a sentence why its CUDA kernels cannot run. Needs no torch."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

REINSTALL = "reinstall hwkern (`pip install --force-reinstall --no-deps hwkern`, or `pip install -e .` in a checkout)"


@functools.cache
def extension() -> ModuleType:
    """The module ``hwkern._C``.

    Raises:
        ImportError: it is missing or cannot be loaded; the message says what to do.
    """
    try:
        from hwkern import _C
    except ImportError as error:
        raise ImportError(f"hwkern's compiled module hwkern._C cannot be loaded ({error}): {REINSTALL}.") from error
    return _C


@functools.cache
def cuda_problem() -> str | None:
    """Why hwkern's CUDA kernels cannot run in this process, as a sentence with the remedy; None when they can."""
    try:
        native = extension()
    except ImportError as error:
        return str(error)
    if not native.built_with_cuda:
        return (
            "this hwkern was built without CUDA kernels (HWKERN_CUDA=OFF): install a wheel with them, or build one "
            "with `pip install .` in a checkout (it fetches nvcc when the machine has none)."
        )
    count, message = native.cuda_status()
    if message:
        return f"the CUDA runtime finds no usable GPU ({message}): for GPU kernels, install or update NVIDIA's driver."
    if count == 0:
        return "the CUDA driver is there but shows no GPU: check CUDA_VISIBLE_DEVICES."
    return None


#: File name of each TensorRT plugin library, and the TensorRT that it is for.
TENSORRT_PLUGINS = {"libhwkern_trt.so": "TensorRT 10.1 and newer, TensorRT-RTX", "libhwkern_trt8.so": "TensorRT 8.6"}


def tensorrt_plugins() -> dict[str, Path]:
    """The TensorRT plugin libraries of this build, file name to path; empty when it has no GPU kernels.

    They lie beside ``hwkern._C``. Nothing is loaded.
    """
    folder = Path(getattr(extension(), "__file__", None) or "").parent
    return {name: folder / name for name in TENSORRT_PLUGINS if (folder / name).is_file()}
