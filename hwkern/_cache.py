"""What was measured on this machine, kept in the user's cache folder and good for exactly the machine that measured it.

One JSON file per name and stamp. The stamp (GPU, driver, CUDA, versions) is part of the file's name and stands in the
file: after a change of any of them there simply is no entry. Reading never fails: a missing, corrupt or foreign file is
an empty cache. Writing merges with what other processes wrote, under a lock, and replaces the file in one step, so that
a reader sees the old or the new file and nothing between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import hwkern
from hwkern import _native, hardware

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: the last writer wins, and nothing is ever torn
    fcntl = None


def folder() -> Path:
    """Where hwkern keeps its files: ``HWKERN_CACHE``, or ``hwkern`` in the system's folder for a user's caches."""
    if chosen := os.environ.get("HWKERN_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hwkern"


def device_stamp(gpu: hardware.Gpu) -> dict[str, Any]:
    """Everything that a kernel's time on this GPU, or the meaning of a config id, may depend on."""
    native = _native.extension()
    driver, _ = native.driver_version()
    table = [(row["id"], row["name"]) for row in native.gemm_configs()]
    return {
        "gpu": gpu.name,
        "compute": gpu.compute,
        "sm_count": gpu.sm_count,
        "clock_mhz": gpu.clock_mhz,
        "driver": driver,
        "cuda": native.cuda_version,
        "hwkern": hwkern.__version__,
        "configs": hashlib.sha256(repr(table).encode()).hexdigest()[:12],
    }


class Cache:
    """A dictionary of plain JSON values that outlives the process."""

    def __init__(self, name: str, stamp: Mapping[str, Any], directory: Path | None = None) -> None:
        self.stamp = dict(stamp)
        digest = hashlib.sha256(json.dumps(self.stamp, sort_keys=True).encode()).hexdigest()[:12]
        self.path = (directory or folder()) / f"{name}-{digest}.json"

    def read(self) -> dict[str, Any]:
        """All entries; empty where the file is missing, unreadable, corrupt or made by another machine or version."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # ValueError: no JSON, no UTF-8
            return {}
        if not isinstance(document, dict) or document.get("stamp") != self.stamp:
            return {}
        entries = document.get("entries")
        return entries if isinstance(entries, dict) else {}

    def update(self, entries: Mapping[str, Any]) -> bool:
        """Add or replace entries; those of other processes stay. False where the folder cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                document = {"stamp": self.stamp, "entries": {**self.read(), **entries}}
                self._replace(json.dumps(document, indent=1))
        except OSError:
            return False
        return True

    def clear(self) -> None:
        """Forget all entries of this name and stamp."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with self.path.with_suffix(".lock").open("w") as handle:
            with contextlib.suppress(OSError):  # a file system without locks: as on Windows
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _replace(self, text: str) -> None:
        # Beside the target: a rename is atomic within one file system only.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
