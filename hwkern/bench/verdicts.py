"""What the rows of one model and workload say of hwkern beside the stock paths, a sentence for each framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwkern.bench import statistics as noise
from hwkern.bench.paths import path as path_of
from hwkern.bench.tables import Row, ratio, value

#: What is compared: its name, where it is in a row, and whether more is better.
MEASURES = (("throughput", "tokens_per_s", True), ("p50", "latency_ms.p50", False), ("weights", "weight_bytes", False))
AHEAD, LEVEL, BEHIND = "ahead of every stock path in", "within the noise in", "not ahead in"
#: Of a throughput of fewer than two blocks, whose noise is not known.
UNKNOWN = "timed too seldom to say in"


@dataclass(frozen=True)
class Lead:
    """One path of hwkern against the best that the stock paths have in one measure.

    Attributes:
        where: AHEAD, LEVEL or UNKNOWN (throughput alone has a noise), or BEHIND.
        text: the measure, how many times the other's value, and whose.
    """

    what: str
    where: str
    text: str


def leads(row: Row, stock: Sequence[Row]) -> list[Lead]:
    """In each measure, against the stock path that is best in it; throughput block by block."""
    found = []
    for what, key, more in MEASURES:
        if what == "p50" and "padding_waste" in row:
            continue  # under traffic each path has its p50 at a rate of its own
        best = (max if more else min)(stock, key=lambda other, key=key: value(other, key))  # type: ignore[misc]
        times, uncertain = value(row, key) / value(best, key), None
        if what == "throughput" and row.get("blocks") and best.get("blocks"):
            times, uncertain = noise.ratio(row["blocks"], best["blocks"])
        gain = times if more else 1 / times
        if what == "throughput" and uncertain is None:
            where = UNKNOWN
        elif noise.change(1.0, gain, uncertain or 0.0, 0.0)[2] == "same" and uncertain:
            where = LEVEL
        else:
            where = AHEAD if gain > 1 else BEHIND
        said = ratio(times, uncertain, 3 if what == "weights" else 2)
        found.append(Lead(what, where, f"{what} {said} that of {path_of(best['path']).title}"))
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """For each framework that has paths of both kinds: in what hwkern's path is ahead of all stock paths.

    Of hwkern's paths it is the fastest that is ahead in everything, or the fastest where none is.
    """
    found = []
    for framework, engine in (("torch", False), ("TensorRT", True)):
        here = [row for row in rows if path_of(row["path"]).is_engine == engine]
        stock = [row for row in here if not path_of(row["path"]).ours]
        ours = [(row, leads(row, stock)) for row in here if stock and path_of(row["path"]).ours]
        if not ours:
            continue
        mine, its = max(ours, key=lambda row: (all(lead.where == AHEAD for lead in row[1]), row[0]["tokens_per_s"]))
        said = [
            f"{where} {_and(names)}"
            for where in (AHEAD, LEVEL, UNKNOWN, BEHIND)
            if (names := [lead.what for lead in its if lead.where == where])
        ]
        texts = "; ".join(lead.text for lead in its)
        found.append(f"{framework}: {path_of(mine['path']).title} is {', '.join(said)}: {texts}.")
    return found


def padding(workloads: Sequence[tuple[str, Sequence[Row]]]) -> list[str]:
    """What the lengths to pad to are worth: of one model's workloads under traffic the first against each other one, by
    the path that serves the most requests in it."""
    traffic = [(name, rows) for name, rows in workloads if "padding_waste" in rows[0]]
    found = []
    for name, rows in traffic[1:]:
        known = {row["path"]: row for row in rows}
        both = [row for row in traffic[0][1] if row["path"] in known]
        if not both:
            continue
        one = max(both, key=lambda row: row["requests_per_s"])
        other = known[one["path"]]
        more = one["requests_per_s"] / other["requests_per_s"]
        waste = [f"(padding +{100 * row['padding_waste']:.0f} %)" for row in (one, other)]
        served = f"{path_of(one['path']).title} serves {more:.2f}× the requests with {traffic[0][0]} {waste[0]}"
        found.append(f"{served} that it serves with {name} {waste[1]}.")
    return found


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
