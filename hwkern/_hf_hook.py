"""Meets transformers without importing it: ``import hwkern`` alone lets ``from_pretrained`` know int8 checkpoints.

Without this, transformers would warn about an unknown method and read int8 weights as if they were float.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: transformers' module with the registry of quantizers.
REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def tell(model: Any) -> None:
    """After the layers of ``model`` changed: let transformers' ``save_pretrained`` know, where it is loaded."""
    if REGISTRY in sys.modules:
        _register()
        hf = sys.modules.get("hwkern.hf")
        if hf is not None:
            hf.sync(model)


def _register() -> None:
    # Without torch or the compiled module hwkern has no layers either; whoever uses them gets the sentence then.
    with contextlib.suppress(ImportError):
        importlib.import_module("hwkern.hf")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the registry as everybody else does, and has its loader register afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._loader.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()
