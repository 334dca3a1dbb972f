"""What hwkern.patch does to a model's layers: which become int8, what computes them, which stay and why."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hwkern.commands import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern report``."""
    models.add_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--plan", metavar="FILE", help="from `hwkern plan --save`; without one: hwkern.patch's defaults"
    )
    source.add_argument("--measure", action="store_true", help="plan here and now, with the balanced policy")
    parser.add_argument(
        "--embeddings", action="store_true", help="without a plan, which says it itself: make embeddings int8 as well"
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")


def run(arguments: argparse.Namespace) -> int:
    """Report; 1 with a sentence when it cannot be."""
    import hwkern
    from hwkern._survey import describe
    from hwkern.plan import Plan, plan

    try:
        models.check_target(arguments.html)
        planned = Plan.load(arguments.plan) if arguments.plan else None
        model, batches, _ = models.load(arguments)
        if arguments.measure:
            planned = plan(model, batches)
        made = hwkern.patch(model, plan=planned, originals="drop", embeddings=arguments.embeddings)
        found = describe(made, model)
        if arguments.html:
            Path(arguments.html).write_text(found.to_html(), encoding="utf-8")
    except (models.UsageError, ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found.to_json() if arguments.json else found)
    return 0
