"""Read ptxas' report from a build log, print a table, fail on register spills and local memory.

    check_ptxas.py BUILD_LOG

A kernel that spills or keeps an array on its stack is several times slower than it looks in the source, and nothing
but this report tells.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture; memory in bytes."""

    name: str
    architecture: str
    stack: int = -1
    spill_stores: int = -1
    spill_loads: int = -1
    registers: int = -1
    shared: int = 0

    @property
    def problem(self) -> str | None:
        """Why this kernel may not ship; None when it may."""
        if min(self.stack, self.registers) < 0:
            return "ptxas' report on it is incomplete: is the log cut off, or its format new?"
        if self.spill_stores or self.spill_loads:
            return f"spills registers: {self.spill_stores} bytes stored, {self.spill_loads} bytes loaded"
        if self.stack:
            return f"keeps {self.stack} bytes of local memory on its stack"
        return None


def parse(log: str) -> list[Kernel]:
    """Every kernel of a build log, in order. Lines of other tools between ptxas' do no harm."""
    kernels: list[Kernel] = []
    properties: Kernel | None = None  # whom the line after "Function properties for" is about
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            kernels.append(Kernel(found[1], found[2]))
            properties = None
        elif found := re.search(r"Function properties for (\S+)", line):
            # Device functions that were not inlined have properties too; what they spill counts for the kernel above.
            properties = kernels[-1] if kernels else None
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if properties:
                stack, stores, loads = map(int, found.groups())
                properties.stack = max(properties.stack, stack)
                properties.spill_stores = max(properties.spill_stores, stores)
                properties.spill_loads = max(properties.spill_loads, loads)
        elif (found := re.search(r"Used (\d+) registers", line)) and kernels:
            kernels[-1].registers = int(found[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                kernels[-1].shared = int(shared[1])
    return kernels


def demangle(names: list[str]) -> list[str]:
    """C++ names without their argument lists; the mangled ones where c++filt is missing."""
    if not shutil.which("c++filt"):
        return names
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |hwkern::|\(anonymous namespace\)::", "", line) for line in text.splitlines()]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    kernels = parse(Path(arguments[0]).read_text(errors="replace"))
    if not kernels:
        print(f"{arguments[0]}: no kernel in it. Was everything compiled already, or without -Xptxas=-v?")
        return 1
    print(f"{'arch':8} {'registers':>9} {'static smem':>11} {'spills':>7}  kernel")
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        spills = kernel.spill_stores + kernel.spill_loads
        print(f"{kernel.architecture:8} {kernel.registers:9} {kernel.shared:11} {spills:7}  {name}")
    bad = [kernel for kernel in kernels if kernel.problem]
    for kernel in bad:
        print(f"FAILED {kernel.name} for {kernel.architecture}: {kernel.problem}")
    print(f"{len(kernels)} kernels, {len(bad)} with spills or local memory.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
