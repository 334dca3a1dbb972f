"""What hwkern.patch does to a model's layers: which become int8, which stay and why."""

from __future__ import annotations

import argparse
import sys

from hwkern.commands import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern report``."""
    models.add_arguments(parser)
    parser.add_argument(
        "--plan", metavar="FILE", help="from `hwkern plan --save`; without one: hwkern.patch's defaults"
    )


def run(arguments: argparse.Namespace) -> int:
    """Report; 1 with a sentence when it cannot be."""
    import hwkern
    from hwkern.plan import Plan

    try:
        plan = Plan.load(arguments.plan) if arguments.plan else None
        model, _, _ = models.load(arguments)
        found = hwkern.patch(model, plan=plan, originals="drop")
    except (models.UsageError, ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found.to_json() if arguments.json else found)
    return 0
