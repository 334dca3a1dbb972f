"""The other ways to compute the same product or layer: each gives calls to time, or says why it cannot run here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import timing
from timing import Call

from hwkern.bench.limits import at_most as at_most
from hwkern.bench.models import AbsentError as AbsentError


def collect(
    makers: Mapping[str, Callable[[Any], list[Call]]], problem: Any, limit: float | None = None
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """Call each maker: ``(the calls by name, the reasons of the peers that gave none)``.

    Each is captured once, alone: a peer that breaks, cannot be captured or takes more than ``limit`` seconds is listed
    with its error like one that is missing, and does not end the run of the others.
    """
    found, absent = {}, {}
    for name, make in makers.items():
        start = time.monotonic()
        try:
            with at_most(limit):
                calls = make(problem)
                timing.capture(calls[:1], least=1)
            found[name] = calls
        except AbsentError as reason:
            absent[name] = str(reason)
        except Exception as error:
            first = (str(error).strip().splitlines() or ["no text"])[0]
            absent[name] = f"{type(error).__name__}: {first}"
        if time.monotonic() - start > 1:  # a long run shows where it is
            print(f"  {name}: {time.monotonic() - start:.0f} s to prepare", file=sys.stderr, flush=True)
    return found, absent
