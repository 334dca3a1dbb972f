"""Which TensorRT is here: its module, its version, and a logger that remembers what went wrong."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from types import ModuleType
from typing import Any

#: In the order in which they are looked for. tensorrt_lean runs engines and cannot build them.
MODULES = ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_lean")

INSTALL = "pip install tensorrt (NVIDIA's data-center and desktop GPUs) or pip install tensorrt_rtx (GeForce and RTX)"


class TensorRT:
    """One TensorRT module. ``version``: e.g. ``(8, 6, 1)``; ``rtx``: TensorRT-RTX (its own versions)."""

    def __init__(self, module: ModuleType) -> None:
        self.module: Any = module
        self.name = module.__name__
        self.version = tuple(int(part) for part in module.__version__.split(".")[:3])
        self.rtx = "rtx" in self.name
        self.lean = not hasattr(module, "Builder")
        self.log = _logger(self.module)

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.rtx else 'TensorRT'} {self.module.__version__} ({self.name})"

    @property
    def has_v3(self) -> bool:
        """Whether the plugin is an IPluginV3 there; TensorRT 8 has IPluginV2 alone."""
        return self.rtx or self.version >= (10,)

    @property
    def takes_int8_constants(self) -> bool:
        """Whether an INT8 constant may feed a plugin; elsewhere the same bytes go in as INT32."""
        return self.rtx or self.version >= (10, 1)

    @property
    def strongly_typed(self) -> bool:
        return self.rtx or self.version >= (10,)

    @property
    def registry(self) -> Any:
        return self.module.get_plugin_registry()


@functools.cache
def _wrap(name: str) -> TensorRT:
    module = importlib.import_module(name)
    if not hasattr(module, "ILogger"):
        raise ImportError(f"{getattr(module, '__file__', name)} is another module of this name, not NVIDIA's")
    return TensorRT(module)


def find(trt: ModuleType | str | None = None) -> TensorRT:
    """The TensorRT to use: the given module or name; else one that is imported already; else the first installed.

    Raises:
        ImportError: there is none, with what to install.
    """
    if trt is not None:
        return _wrap(trt if isinstance(trt, str) else trt.__name__)
    for name in MODULES:
        if hasattr(sys.modules.get(name), "ILogger"):
            return _wrap(name)
    errors = []
    for name in MODULES:
        try:
            return _wrap(name)
        except ImportError as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                errors.append(f"{name}: {error}")
    why = f" Found but not usable: {'; '.join(errors)}." if errors else ""
    raise ImportError(f"No TensorRT for this Python: {INSTALL}.{why}")


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and errors for exceptions; prints nothing unless ``verbose``."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.warnings: list[str] = []
            self.verbose = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.messages.append(message)
                del self.messages[:-20]
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)
                del self.warnings[:-3]
            if self.verbose and severity != trt.ILogger.Severity.VERBOSE:
                print(f"[TensorRT] {message}", file=sys.stderr)

        def take(self) -> str:
            """What has gone wrong since the last call, as one text."""
            text = "; ".join(dict.fromkeys(m.strip() for m in self.messages or self.warnings))
            self.messages.clear()
            self.warnings.clear()
            return text or "TensorRT gave no reason"

    return Log()


def rtx_problem(trt: TensorRT) -> str | None:
    """TensorRT-RTX's parser opens ``libtensorrt_rtx.so`` when it meets a plugin and aborts without it."""
    if not trt.rtx:
        return None
    try:
        ctypes.CDLL("libtensorrt_rtx.so")
    except OSError:
        return (
            "TensorRT-RTX's ONNX parser opens libtensorrt_rtx.so when it meets a plugin and aborts the process without "
            "it, and its wheel ships libtensorrt_rtx.so.1 only: start Python with a folder on LD_LIBRARY_PATH that has "
            "a link of that name (hwkern.tensorrt.plugin.rtx_library_folder() makes one; the command `hwkern trt` does "
            "both by itself)."
        )
    return None
