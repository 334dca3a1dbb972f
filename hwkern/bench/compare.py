"""``hwkern bench --compare old.json new.json``: which rows got slower, faster or lost, beyond their measured noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwkern.bench.record import SCHEMA
from hwkern.bench.statistics import change

#: What must agree for two files to be compared row by row.
SAME = ("gpu", "cpu", "threads")
KEYS = {"comparison": ("model", "workload", "path"), "kernels": ("operator", "dtype", "m", "n", "k")}


class CompareError(ValueError):
    """A file that is no result, or two files that cannot be compared; the message is the sentence to show."""


@dataclass(frozen=True)
class Difference:
    """One row of both files; ``ratio`` above 1 is faster now."""

    name: str
    verdict: str  #: "slower", "faster", "same", "unknown" (too few blocks), "lost" or "new"
    ratio: float | None = None
    bound: float | None = None
    note: str = ""


def load(path: Path) -> dict[str, Any]:
    """A result of ``hwkern bench``. CompareError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompareError(f"{path}: {error}") from error
    if not isinstance(document, dict) or document.get("benchmark") not in KEYS or document.get("schema") != SCHEMA:
        raise CompareError(f"{path} is no result of `hwkern bench` with schema {SCHEMA}.")
    return document


def rate(row: Mapping[str, Any]) -> float | None:
    """What is compared, higher is better: tokens per second, or calls per second of a kernel; None: not measured."""
    if row.get("status", "ok") != "ok":
        return None
    return float(row["tokens_per_s"]) if "tokens_per_s" in row else 1e6 / float(row["us"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Every row of either file. CompareError when they are of different machines or benchmarks."""
    if old["benchmark"] != new["benchmark"]:
        raise CompareError(f"One file is of the benchmark {old['benchmark']!r}, the other of {new['benchmark']!r}.")
    for key in SAME:
        was, now = old["environment"].get(key), new["environment"].get(key)
        if was != now:
            raise CompareError(
                f"The files are of different machines: {key} {was!r} and {now!r}. That is no regression."
            )
    keys = KEYS[old["benchmark"]]

    def named(document: Mapping[str, Any]) -> dict[str, Any]:
        return {" ".join(str(row[key]) for key in keys if row.get(key) is not None): row for row in document["rows"]}

    before, after = named(old), named(new)
    found = []
    for name in {**before, **after}:
        was, now = (rate(side[name]) if name in side else None for side in (before, after))
        if was is None and now is None:
            continue
        if was is None:
            found.append(Difference(name, "new"))
        elif now is None:
            reason = after[name].get("reason", "") if name in after else "the row is not there"
            found.append(Difference(name, "lost", note=reason))
        else:
            ratio, bound, verdict = change(was, now, before[name].get("noise"), after[name].get("noise"))
            found.append(Difference(name, verdict, ratio, bound))
    return found


def ratios(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[int, list[Difference]]:
    """``(how many rows have a ratio in both files, those whose ratios differ by more than the noise of both)``."""
    keys = KEYS[old["benchmark"]]

    def named(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        rows = (row for row in document["rows"] if row.get("ratio") and row["path"] != row["ratio"]["to"])
        return {" ".join(str(row[key]) for key in keys): row["ratio"] for row in rows}

    before, after = named(old), named(new)
    both = [name for name in before if name in after]
    moved = []
    for name in both:
        was, now = before[name], after[name]
        ratio, bound, verdict = change(was["value"], now["value"], was["noise"], now["noise"])
        if verdict != "same":
            moved.append(Difference(name, verdict, ratio, bound, f"{was['value']:.3f}× to {now['value']:.3f}×"))
    return len(both), moved


def text(found: list[Difference], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What a reader wants to know: the rows beyond the noise, then the numbers of the others."""
    from hwkern._console import plain_table

    order = {"slower": 0, "lost": 1, "faster": 2, "new": 3}
    shown = sorted((d for d in found if d.verdict in order), key=lambda d: (order[d.verdict], d.ratio or 0))
    lines = []
    if shown:
        rows = [
            [
                d.name,
                d.verdict,
                "" if d.ratio is None else f"{d.ratio:.3f}×",
                "" if d.bound is None else f"± {100 * d.bound:.1f} %",
                d.note,
            ]
            for d in shown
        ]
        heads = ["row", "now", "rate, new / old", "noise of both", ""]
        lines.append(plain_table(_commits(old, new), heads, rows, left=2))
    else:
        lines.append(_commits(old, new))
    counts = {verdict: sum(d.verdict == verdict for d in found) for verdict in (*order, "same", "unknown")}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines.append(f"{len(found)} rows: {said or 'none'}.")
    if old["benchmark"] == "comparison":
        count, moved = ratios(old, new)
        words = "; ".join(f"{d.name} {d.note}" for d in moved)
        lines.append(
            f"Ratios: {count - len(moved)} of {count} agree within their noise." + (f" {words}." * bool(moved))
        )
    if counts["unknown"]:
        lines.append("Unknown: fewer than two blocks were timed, so that their noise is not known.")
    return "\n".join(lines)


def _commits(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    def of(document: Mapping[str, Any]) -> str:
        return str(document["environment"].get("commit") or "unknown commit")[:12]

    return f"{of(old)} -> {of(new)} on {new['environment'].get('gpu') or new['environment'].get('cpu')}"


def regressed(found: list[Difference]) -> bool:
    """Whether anything got slower beyond the noise, or is gone."""
    return any(d.verdict in ("slower", "lost") for d in found)
