"""Make the virtual environment of the Makefile: ``make_venv.py FOLDER CONSTRAINTS``.

Needs nothing but Python. When the interpreter that runs this has torch already, the environment uses that torch
instead of downloading another; CONSTRAINTS is written to say which one pip must be content with.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 4)
MIN_PIP = (23, 1)


def version_tuple(text: str) -> tuple[int, ...]:
    """``"2.13.0+cpu" -> (2, 13, 0)``"""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def torch_here() -> tuple[str, Path] | None:
    """Version and site-packages folder of the running interpreter's torch, if it is new enough."""
    try:
        torch = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    if version_tuple(torch.version) < MIN_TORCH:
        print(f"This Python's torch {torch.version} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}; installing another.")
        return None
    return torch.version, Path(str(torch.locate_file(""))).resolve()


def main() -> None:
    if sys.version_info < MIN_PYTHON:
        raise SystemExit(
            f"hwkern needs Python 3.10 or newer; this is {sys.version.split()[0]}. Name another: make PYTHON=python3.12"
        )
    folder, constraints = Path(sys.argv[1]), Path(sys.argv[2])
    print(f"Making {folder} with Python {sys.version.split()[0]} ...", flush=True)
    try:
        venv.create(folder, with_pip=True, clear=False)
    except (subprocess.CalledProcessError, ImportError) as error:
        raise SystemExit(
            f"Python could not make a virtual environment ({error}). On Debian and Ubuntu: apt install python3-venv; "
            "or use this Python as it is: make VENV=0"
        ) from error
    python = folder / "bin" / "python"
    pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout.split()[
        1
    ]
    if version_tuple(pip) < MIN_PIP:
        subprocess.run([python, "-m", "pip", "install", "-q", "--upgrade", "pip"], check=True)

    pins = Path(__file__).resolve().parent.parent.joinpath("constraints.txt").read_text()
    if found := torch_here():
        version, site_packages = found
        print(f"Using torch {version} from {site_packages}.")
        purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (purelib / "hwkern_outer_torch.pth").write_text(f"{site_packages}\n")
        pins = re.sub(r"(?m)^torch==.*$", f"torch=={version}", pins)
    constraints.parent.mkdir(parents=True, exist_ok=True)
    constraints.write_text(pins)


if __name__ == "__main__":
    main()
