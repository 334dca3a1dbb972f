"""hwkern in TensorRT: ONNX rewrite, torch export, engine builder, runner. Importing this needs neither of them.

::

    import hwkern.tensorrt as ht
    report = ht.rewrite("bert.onnx", "bert-int8.onnx")
    engine = ht.build("bert-int8.onnx", profiles=ht.profiles_from(requests), precision="fp16")
    with ht.Runner(engine) as run:
        outputs = run({"input_ids": ids, "attention_mask": mask})
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwkern.tensorrt.builder import Engine, build, build_engine
    from hwkern.tensorrt.exporter import export
    from hwkern.tensorrt.network import swap
    from hwkern.tensorrt.planner import Plan, make_plan
    from hwkern.tensorrt.plugin import load_plugin, plugin_path
    from hwkern.tensorrt.profiles import Profile, Profiles, profiles_from
    from hwkern.tensorrt.rewriter import RewriteReport, rewrite
    from hwkern.tensorrt.runner import Runner
    from hwkern.tensorrt.runners import Runners

__all__ = [
    "Engine",
    "Plan",
    "Profile",
    "Profiles",
    "RewriteReport",
    "Runner",
    "Runners",
    "build",
    "build_engine",
    "export",
    "load_plugin",
    "make_plan",
    "plugin_path",
    "profiles_from",
    "rewrite",
    "swap",
]

_MODULES = {
    "builder": ("Engine", "build", "build_engine"),
    "exporter": ("export",),
    "network": ("swap",),
    "planner": ("Plan", "make_plan"),
    "plugin": ("load_plugin", "plugin_path"),
    "profiles": ("Profile", "Profiles", "profiles_from"),
    "rewriter": ("RewriteReport", "rewrite"),
    "runner": ("Runner",),
    "runners": ("Runners",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}
# What a missing package costs, and how to get it.
_PACKAGES = {"onnx": "onnx", "numpy": "onnx"}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'hwkern.tensorrt' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        module = importlib.import_module(f"hwkern.tensorrt.{_NAMES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ImportError(
            f"hwkern.tensorrt.{name} needs {error.name}: pip install 'hwkern[{_PACKAGES[error.name]}]'"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
