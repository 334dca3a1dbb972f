"""The command ``hwkern``: one function per subcommand, each in its own module and imported only when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import hwkern

#: Subcommand → (module, one-line help). A module has `add_arguments(parser)` and `run(arguments) -> exit code`.
COMMANDS = {
    "doctor": ("hwkern.doctor", "what runs where on this machine, and what to install or fix"),
    "demo": ("hwkern.demo", "patch a real sentence-embedding model and compare it with the original"),
    "bench": ("hwkern.commands.bench", "every way to run a model on this machine: speed, memory, energy, accuracy"),
    "explain": ("hwkern.explain", "which kernel a product of M, N and K takes, and why"),
    "trt": ("hwkern.tensorrt.cli", "models for TensorRT: rewrite, plan, export, build, run, bench, inspect"),
    "plan": ("hwkern.commands.plan", "the best scheme for each layer of a model, by measurement"),
    "report": ("hwkern.commands.report", "which layers of a model become int8, and why not the others"),
    "validate": ("hwkern.commands.validate", "a model and its int8 twin: time, memory, accuracy"),
}


def parser() -> argparse.ArgumentParser:
    """The whole argument parser; importing the subcommands' modules needs no torch."""
    top = argparse.ArgumentParser(prog="hwkern", description="INT8 Transformer inference on GPUs and CPUs.")
    top.add_argument("--version", action="version", version=f"hwkern {hwkern.__version__}")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = importlib.import_module(module)
        sub = commands.add_parser(name, help=text, description=command.__doc__)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 0 fine, 1 something is broken, 2 wrong usage."""
    arguments = parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `hwkern … | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
