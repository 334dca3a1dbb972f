"""hwkern: INT8 Transformer inference on NVIDIA GPUs and on CPUs. ``hwkern.patch(model)`` is the main door."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hwkern import _hf_hook

if TYPE_CHECKING:
    from hwkern import hardware, metrics, nn, ops, report
    from hwkern.calibrate import calibrate
    from hwkern.checkpoint import CheckpointError, load, save
    from hwkern.explain import explain
    from hwkern.hf import HwkernConfig
    from hwkern.patch import patch, unpatch
    from hwkern.plan import Accuracy, Plan, PlanError, plan
    from hwkern.report import Report
    from hwkern.tune import tune, use_tuned
    from hwkern.validate import validate

try:
    __version__ = version("hwkern")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Accuracy",
    "CheckpointError",
    "HwkernConfig",
    "Plan",
    "PlanError",
    "Report",
    "__version__",
    "calibrate",
    "explain",
    "hardware",
    "load",
    "metrics",
    "nn",
    "ops",
    "patch",
    "plan",
    "report",
    "save",
    "tune",
    "unpatch",
    "use_tuned",
    "validate",
]

# Where each public name lives: a module, and the attribute in it or "" for the module itself. Resolved on first use, so
# that `import hwkern` needs no torch.
_NAMES = {
    "Accuracy": ("hwkern.plan", "Accuracy"),
    "CheckpointError": ("hwkern.checkpoint", "CheckpointError"),
    "HwkernConfig": ("hwkern.hf", "HwkernConfig"),
    "Plan": ("hwkern.plan", "Plan"),
    "PlanError": ("hwkern.plan", "PlanError"),
    "Report": ("hwkern.report", "Report"),
    "calibrate": ("hwkern.calibrate", "calibrate"),
    "explain": ("hwkern.explain", "explain"),
    "hardware": ("hwkern.hardware", ""),
    "load": ("hwkern.checkpoint", "load"),
    "metrics": ("hwkern.metrics", ""),
    "nn": ("hwkern.nn", ""),
    "ops": ("hwkern.ops", ""),
    "patch": ("hwkern.patch", "patch"),
    "plan": ("hwkern.plan", "plan"),
    "report": ("hwkern.report", ""),
    "save": ("hwkern.checkpoint", "save"),
    "tune": ("hwkern.tune", "tune"),
    "unpatch": ("hwkern.patch", "unpatch"),
    "use_tuned": ("hwkern.tune", "use_tuned"),
    "validate": ("hwkern.validate", "validate"),
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


_hf_hook.install()
