"""Check the rules of the source tree that no compiler checks: ``check_tree.py [ROOT]``.

- inline assembly lives in csrc/ptx/ and nowhere else;
- csrc/ below bindings/ and tensorrt/ knows nothing of torch, Python or TensorRT;
- no file names a path of somebody's machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
ASSEMBLY = re.compile(r"\b(?:asm|__asm__)\b\s*(?:volatile\b|__volatile__\b|\()")
FOREIGN_INCLUDE = re.compile(r"#\s*include\s*[<\"](torch/|ATen/|c10/|pybind11/|Python\.h|NvInfer)")
# Homes and the mounts that development machines tend to have; anywhere but in a URL or a longer name.
MACHINE_PATH = re.compile(r"(?<![\w./:~-])/(?:home|root|work|Users|mnt|farm)/[\w.]")


def files(root: Path) -> list[Path]:
    """What git tracks or would track; every file where there is no git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found = [root / name for name in listed.stdout.split("\0") if name]
    else:
        found = [path for path in root.rglob("*") if ".git" not in path.parts]
    return sorted(path for path in found if path.is_file())


def problems(root: Path) -> Iterator[str]:
    """``path:line: sentence`` for every broken rule below ``root``."""
    for path in files(root):
        relative = path.relative_to(root)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a binary file
        folder = relative.parts[1] if relative.parts[0] == "csrc" and len(relative.parts) > 2 else ""
        is_source = relative.parts[0] == "csrc" and relative.suffix in SOURCE_SUFFIXES
        for number, line in enumerate(lines, 1):
            where = f"{relative}:{number}"
            if is_source and folder != "ptx" and ASSEMBLY.search(line.partition("//")[0]):
                yield f"{where}: inline assembly belongs in csrc/ptx/"
            if is_source and folder not in {"bindings", "tensorrt"} and (found := FOREIGN_INCLUDE.search(line)):
                yield f"{where}: csrc/ is free of torch, Python and TensorRT below bindings/ and tensorrt/: {found[1]}"
            if found := MACHINE_PATH.search(line):
                yield f"{where}: a path of somebody's machine: {line[found.start() :].split()[0]}"


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parent.parent
    found = list(problems(root))
    print(*found, f"{len(files(root))} files, {len(found)} broken rules.", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
