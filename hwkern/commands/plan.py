"""Measure which scheme is best for each layer of a model on this device, print it, and keep it as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from hwkern.commands import models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern plan``."""
    models.add_arguments(parser)
    parser.add_argument("--policy", default="balanced", choices=["fastest", "balanced", "accurate", "smallest"])
    parser.add_argument(
        "--mode",
        default="any",
        choices=["any", "eager", "graph"],
        help="how it will run on a GPU (default: any of them)",
    )
    parser.add_argument("--min-snr-db", type=float, default=20.0, metavar="DB", help="bound of each layer (default 20)")
    parser.add_argument(
        "--no-embeddings", dest="embeddings", action="store_false", help="leave embeddings, and heads that share one"
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    parser.add_argument(
        "--explain", metavar="LAYER", action="append", default=[], help="also print one layer's figures"
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan; 1 with a sentence when it cannot be."""
    from hwkern.plan import Accuracy, plan

    try:
        models.check_target(arguments.save)
        model, batches, _ = models.load(arguments)
        bounds = Accuracy(arguments.min_snr_db)
        options = {"policy": arguments.policy, "mode": arguments.mode, "embeddings": arguments.embeddings}
        found = plan(model, batches, accuracy=bounds, **options)
        print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)  # first: what took minutes
        if arguments.save:
            found.save(arguments.save)
        for name in arguments.explain:
            print(f"\n{found.explain(name)}", file=sys.stderr if arguments.json else sys.stdout)
    except (models.UsageError, ValueError, RuntimeError, OSError, KeyError) as error:
        print(error.args[0] if isinstance(error, KeyError) else error, file=sys.stderr)
        return 1
    return 0
