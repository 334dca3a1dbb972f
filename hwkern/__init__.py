"""hwkern: INT8 Transformer inference on NVIDIA GPUs and on CPUs. ``hwkern.patch(model)`` is the main door."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwkern import hardware, nn, ops
    from hwkern.explain import explain
    from hwkern.patch import patch, unpatch
    from hwkern.report import Report
    from hwkern.tune import tune, use_tuned

try:
    __version__ = version("hwkern")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Report", "__version__", "explain", "hardware", "nn", "ops", "patch", "tune", "unpatch", "use_tuned",
]  # fmt: skip

# Where each public name lives: a module, and the attribute in it or "" for the module itself. Resolved on first use, so
# that `import hwkern` needs no torch.
_NAMES = {
    "Report": ("hwkern.report", "Report"),
    "explain": ("hwkern.explain", "explain"),
    "hardware": ("hwkern.hardware", ""),
    "nn": ("hwkern.nn", ""),
    "ops": ("hwkern.ops", ""),
    "patch": ("hwkern.patch", "patch"),
    "tune": ("hwkern.tune", "tune"),
    "unpatch": ("hwkern.patch", "unpatch"),
    "use_tuned": ("hwkern.tune", "use_tuned"),
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'hwkern' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _NAMES[name]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(f"hwkern.{name} needs PyTorch >= 2.4: pip install torch") from error
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
