"""Disassemble the extension and check that the kernels are made of the instructions that they were written for.

    check_sass.py EXTENSION.so [--cuobjdump PATH]      disassembles
    check_sass.py --sass DUMP.txt                      reads `cuobjdump --dump-sass` output

A product's kernel must use the tensor cores on int8 (IMMA; Hopper's own kernels: wgmma, IGMMA), asynchronous copies to
shared memory (LDGSTS; TMA: UTMALDG) and, for mma.sync, ldmatrix (LDSM); a weight-only one the tensor cores on 16 bits
(HMMA). No kernel may touch local memory (LDL, STL). Every architecture asked for must have all kernels meant for it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Every group needs one of its instructions.
MMA_SYNC = (("IMMA",), ("LDGSTS", "UTMALDG"), ("LDSM",))
WGMMA = (("IGMMA",), ("UTMALDG",))
WEIGHT_ONLY = (("HMMA",), ("LDGSTS", "UTMALDG"))
LOCAL_MEMORY = ("LDL", "STL")
GENERAL, HOPPER = ("sm_80", "sm_90"), ("sm_90a",)
#: Name: architectures that must have it, and what it is made of.
KERNELS = {
    "gemm_sm80": (GENERAL, MMA_SYNC),
    "gemm_sm90": (HOPPER, WGMMA),
    "gemm_sm90_split": (HOPPER, WGMMA),
    "linear_sm90": (HOPPER, WGMMA),
    "linear_beside_sm90": (HOPPER, WGMMA),
    "w8a16": (GENERAL, WEIGHT_ONLY),
}
# In a mangled name the length stands before the kernel's own name (9gemm_sm80), not before the file's, which is in
# the anonymous namespace's (_12_gemm_sm80_cu).
NAME = re.compile(r"\d(" + "|".join(sorted(KERNELS, key=len, reverse=True)) + ")(?![a-z0-9_])")


def functions(dump: str) -> Iterator[tuple[str, str, set[str]]]:
    """``(architecture, mangled name, opcodes)`` of every function in a cuobjdump listing."""
    architecture = where = name = ""
    opcodes: set[str] = set()
    for line in dump.splitlines():
        if found := re.search(r"\b(?:arch = |code for )(sm_\w+)", line):
            architecture = found[1]
        if found := re.match(r"\s*Function : (\S+)", line):
            if name:
                yield where, name, opcodes
            where, name, opcodes = architecture, found[1], set()
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            opcodes.add(found[1])
    if name:
        yield where, name, opcodes


def problems(dump: str, architectures: list[str]) -> Iterator[str]:
    """One sentence for everything that is wrong with a listing."""
    missing = {(kernel, a) for kernel, (meant_for, _) in KERNELS.items() for a in meant_for if a in architectures}
    for architecture, name, opcodes in functions(dump):
        if local := opcodes.intersection(LOCAL_MEMORY):
            yield f"{name} for {architecture} uses local memory ({', '.join(sorted(local))})."
        found = NAME.search(name)
        if not found or (found[1] == "w8a16" and "STG" not in opcodes):  # its rows for Hopper are empty before it
            continue
        missing.discard((found[1], architecture))
        for group in KERNELS[found[1]][1]:
            if not opcodes.intersection(group):
                yield f"{name} for {architecture} has no {' or '.join(group)}."
    for kernel, architecture in sorted(missing):
        yield f"no kernel {kernel} for {architecture} in the extension."


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extension", nargs="?", type=Path)
    parser.add_argument("--sass", type=Path, help="a listing that exists already")
    parser.add_argument("--cuobjdump", default=shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump")
    parser.add_argument("--architectures", default="sm_80,sm_90,sm_90a")
    options = parser.parse_args(arguments)
    if (options.extension is None) == (options.sass is None):
        parser.error("give the extension or --sass")
    if options.sass:
        dump = options.sass.read_text()
    elif shutil.which(options.cuobjdump):
        command = [options.cuobjdump, "--dump-sass", options.extension]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        print(f"no cuobjdump at {options.cuobjdump}: install the CUDA toolkit, or nvidia-cuda-cuobjdump and -nvdisasm.")
        return 1
    found = list(problems(dump, options.architectures.split(",")))
    for problem in found:
        print(f"FAILED {problem}")
    print(f"{sum(1 for _ in functions(dump))} functions disassembled, {len(found)} problems.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
