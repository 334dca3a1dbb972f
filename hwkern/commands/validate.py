"""Compare a model with its int8 twin, patched by a plan or by default, on the same batches: time, memory, error."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hwkern.commands import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern validate``."""
    models.add_arguments(parser)
    parser.add_argument(
        "--plan", metavar="FILE", help="from `hwkern plan --save`; without one: hwkern.patch's defaults"
    )
    parser.add_argument(
        "--embeddings", action="store_true", help="without a plan, which says it itself: make embeddings int8 as well"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the report's page, with these figures in it")
    parser.add_argument("--allow-other-gpu", action="store_true", help="time a plan of another device again, here")


def run(arguments: argparse.Namespace) -> int:
    """Validate; 1 with a sentence when it cannot be."""
    import hwkern
    from hwkern._survey import describe
    from hwkern.plan import Plan
    from hwkern.validate import validate

    try:
        models.check_target(arguments.html)
        plan = Plan.load(arguments.plan) if arguments.plan else None
        model, batches, again = models.load(arguments)
        options = {"embeddings": arguments.embeddings, "allow_other_gpu": arguments.allow_other_gpu}
        report = hwkern.patch(model, plan=plan, originals="drop", **options)
        found = validate(again(), model, batches)
        if arguments.html:
            page = describe(report, model, validation=found).to_html()
            Path(arguments.html).write_text(page, encoding="utf-8")
    except (models.UsageError, ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    return 0
