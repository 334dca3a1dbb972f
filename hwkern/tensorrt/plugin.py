"""Finding and loading hwkern's plugin library."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hwkern import _native
from hwkern.tensorrt import _api, opdef
from hwkern.tensorrt._api import TensorRT

LIBRARIES = {"v3": "libhwkern_trt.so", "v2": "libhwkern_trt8.so"}
_BUILT = {
    "v3": "with GPU kernels, on Linux",
    "v2": "when CMake finds the headers of TensorRT 8.6 (HWKERN_TENSORRT8_INCLUDE_DIR)",
}

_lock = threading.Lock()
_handles: list[Any] = []  # a plugin library is never unloaded: engines hold pointers into it


def plugin_path(trt: ModuleType | str | None = None, *, version: int | None = None) -> Path:
    """The library to load: ``libhwkern_trt.so`` for TensorRT ≥ 10.1 and TensorRT-RTX, ``libhwkern_trt8.so`` for 8.6.

    Args:
        trt: the TensorRT module; default: the one that is here, or TensorRT ≥ 10 when there is none.
        version: the major version instead (8, 10, 11), for a TensorRT that is not installed in this Python.

    Raises:
        FileNotFoundError: this hwkern was built without it.
    """
    if version is None:
        try:
            kind = "v3" if _api.find(trt).has_v3 else "v2"
        except ImportError:
            if trt is not None:
                raise
            kind = "v3"
    else:
        kind = "v3" if version >= 10 else "v2"
    path = _native.tensorrt_plugins().get(LIBRARIES[kind])
    if path is None:
        raise FileNotFoundError(
            f"hwkern's TensorRT plugin ({LIBRARIES[kind]}) is not in this installation: it is built {_BUILT[kind]}; "
            "`hwkern doctor` tells what this wheel has. To fix it, "
            f"{_native.REINSTALL}."
        )
    return path


def is_loaded(trt: TensorRT) -> bool:
    """Whether the registry already knows the op, whoever loaded it."""
    registry = trt.registry
    if registry is None:
        return False
    get = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
    return get(opdef.OP, opdef.PLUGIN_VERSION, opdef.NAMESPACE) is not None


def load_plugin(trt: ModuleType | str | None = None) -> Path:
    """Load the plugin into TensorRT's registry, once; calling it again does nothing. ``build`` and ``Runner`` call it.

    Args:
        trt: a TensorRT module or its name (``tensorrt``, ``tensorrt_rtx``, ``tensorrt_lean``, ``tensorrt_bindings``);
            default: the one that is imported, or the first that is installed.

    Returns:
        The library's path.

    Raises:
        ImportError: no TensorRT.
        FileNotFoundError: this hwkern has no plugin library.
        RuntimeError: TensorRT does not take it; the message says why and what to do.
    """
    found = _api.find(trt)
    with _lock:
        path = plugin_path(found.module)
        if not is_loaded(found):
            _check_version(found)
            found.log.take()
            (_load_v3 if found.has_v3 else _load_v2)(found, path)
            if not is_loaded(found):
                raise RuntimeError(f"{found} does not take {path.name}: {found.log.take()}; {last_error(path)}")
    return path


def _check_version(trt: TensorRT) -> None:
    old = not trt.rtx and (trt.version < (8, 6) or (9,) <= trt.version < (10, 1))
    if old or (trt.rtx and trt.version < (1, 1)):
        raise RuntimeError(f"{trt} cannot load hwkern's plugin: it needs TensorRT 8.6, 10.1 or newer, or TensorRT-RTX.")


def _load_v3(trt: TensorRT, path: Path) -> None:
    # NOTE: load_library returns None on failure and never raises; the caller looks into the registry.
    handle = trt.registry.load_library(str(path))
    if handle is not None:
        _handles.append(handle)


def _load_v2(trt: TensorRT, path: Path) -> None:
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise RuntimeError(f"{path} cannot be loaded into {trt}: {error}") from error
    _handles.append(library)
    library.hwkern_trt8_register.restype = ctypes.c_int32
    library.hwkern_trt8_register()


@contextlib.contextmanager
def half_only() -> Iterator[None]:
    """While it is open, libhwkern_trt8.so offers TensorRT 8.6 float16 alone for x, and so for what follows from it.

    With BuilderFlag.FP16, 8.6 would time float32 too, and beside others on the GPU it has taken it: 1.9 times as slow.
    Nothing happens where this hwkern has no such library.
    """
    path = _native.tensorrt_plugins().get(LIBRARIES["v2"])
    if path is None:
        yield
        return
    library = ctypes.CDLL(str(path))
    library.hwkern_trt8_prefer_half(1)
    try:
        yield
    finally:
        library.hwkern_trt8_prefer_half(0)


def last_error(path: Path) -> str:
    """The plugin's own last sentence on what it refused; "" when there is none."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return str(error)
    library.hwkern_trt_last_error.restype = ctypes.c_size_t
    library.hwkern_trt_last_error.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    buffer = ctypes.create_string_buffer(2048)
    library.hwkern_trt_last_error(buffer, len(buffer))
    return buffer.value.decode(errors="replace")


def gpu_problem(index: int = 0) -> str | None:
    """Why the plugin's kernels cannot run on the GPU, as a sentence; None when they can."""
    problem = _native.cuda_problem()
    if problem is not None:
        return problem
    properties = _native.extension().device_properties(index)
    if properties["compute"] < 80:
        return (
            f"{properties['name']} has compute capability {properties['compute'] / 10}: hwkern's INT8 kernels need 8.0 "
            "(Ampere) or newer. Build the engine from the float model there."
        )
    return None


def rtx_library_folder() -> Path:
    """A folder with the link ``libtensorrt_rtx.so`` that TensorRT-RTX's parser looks for; put it on LD_LIBRARY_PATH.

    Raises:
        FileNotFoundError: TensorRT-RTX's libraries are not installed.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs") or importlib.util.find_spec("tensorrt_rtx")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        for library in sorted(Path(place).glob("libtensorrt_rtx.so.*")):
            folder = Path(tempfile.gettempdir()) / f"hwkern-tensorrt-rtx-{library.stat().st_ino}"
            folder.mkdir(mode=0o700, exist_ok=True)
            link = folder / "libtensorrt_rtx.so"
            if not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(library)
            return folder
    raise FileNotFoundError("TensorRT-RTX's libraries are not here: pip install tensorrt_rtx")
