"""The JSON document of a benchmark: where it ran, one row per line, and the check that a file is what it says."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwkern import _native, hardware

SCHEMA = 1


def git_commit(folder: Path) -> str | None:
    """The checkout's commit, with "+" when tracked files are changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def nvidia_smi(index: int) -> dict[str, str]:
    """Driver, clocks (MHz) and power limit of one GPU, as nvidia-smi prints them; empty without it."""
    fields = ("driver_version", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def environment(device: str, command: str, commit: str | None = None, folder: Path | None = None) -> dict[str, Any]:
    """What a reader needs to judge a number: hardware, driver, clocks, versions, commit, command line, date.

    ``folder``: of a checkout that git is asked about when no commit is given.
    """
    import torch

    import hwkern

    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": command,
        "commit": commit or git_commit(folder or Path(__file__).parent),
        "hwkern": hwkern.__version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        gpu = hardware.gpu(torch.cuda.current_device())
        found |= {
            "gpu": gpu.name,
            "compute": gpu.compute,
            "sm_count": gpu.sm_count,
            "clock_mhz": gpu.clock_mhz,
            "int8_ops": gpu.int8_ops,
            "bandwidth": gpu.bandwidth,
            "l2_bytes": gpu.l2_bytes,
            "wheel_cuda": _native.extension().cuda_version,
            "nvidia_smi": nvidia_smi(gpu.index),
        }
    else:
        cpu = hardware.cpu()
        found |= {"cpu": cpu.name, "int8_units": list(cpu.int8_units), "threads": torch.get_num_threads()}
    return found


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document, one row per line, so that a later run differs only where numbers changed.

    At once or not at all: a run that is stopped leaves the last whole file.
    """
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    part.replace(path)
