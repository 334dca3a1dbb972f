"""The targets of the kernels on an H100, and what the result files say of each: ``targets.py [--results FOLDER]``.

A target is computed from the rows of the committed results and never typed in; what was not measured stays open. Unless
a target says otherwise it is a geometric mean over the layers of Llama-3-8B.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
LLAMA = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
BERT = {(768, 768), (3072, 768), (768, 3072), (2304, 768)}


@dataclass(frozen=True)
class Target:
    """One line: a figure that the results give, and what it must be and should be."""

    what: str
    file: str  # the stem of the result file, without the GPU's name
    must: float
    reach: float
    unit: str
    value: Callable[[Rows], float | None]
    at_most: bool = False  # the figure must be small, not large

    def holds(self, value: float, limit: float) -> bool:
        """Whether the figure is on the right side."""
        return value <= limit if self.at_most else value >= limit


def geomean(values: Iterable[float]) -> float | None:
    """None where there is none."""
    found = list(values)
    return statistics.geometric_mean(found) if found else None


def pick(rows: Rows, low: int, high: int, layers: set[tuple[int, int]] = LLAMA, kind: str | None = None) -> Rows:
    """The rows with M from ``low`` to ``high`` of these layers."""
    return [
        row
        for row in rows
        if low <= row.get("m", 0) <= high and (row["n"], row["k"]) in layers and row.get("kind", kind) == kind
    ]


def speedups(rows: Rows, peer: str) -> list[float]:
    """The peer's time over ours, where both were measured."""
    return [row["peers_us"][peer] / row["us"] for row in rows if row["peers_us"].get(peer)]


def device(rows: Rows, low: int, high: int, layers: set[tuple[int, int]] = LLAMA) -> Rows:
    """The rows of linear.py that time the GPU."""
    return pick(rows, low, high, layers, "device")


def each_m(rows: Rows) -> float | None:
    """The least over M of the geometric mean over the layers."""
    sizes = sorted({row["m"] for row in rows})
    means = [geomean(speedups([row for row in rows if row["m"] == m], "bf16")) for m in sizes]
    return min((mean for mean in means if mean is not None), default=None)


def slowest(rows: Rows) -> float | None:
    """µs of the slowest row."""
    return max((row["us"] for row in rows), default=None)


def least(values: Iterable[float]) -> float | None:
    """None where there is none."""
    return min(values, default=None)


def most(values: Iterable[float]) -> float | None:
    """None where there is none."""
    return max(values, default=None)


ANY = 1 << 30
TARGETS = (
    Target("GEMM, M 1024–8192, against CUTLASS's best", "gemm", 1.05, 1.12, "×",
           lambda rows: geomean(speedups(pick(rows, 1024, 8192), "cutlass"))),
    Target("GEMM, M 1024–8192, against fp8 row-wise, least of all shapes", "gemm", 1.0, 1.0, "×",
           lambda rows: least(speedups(pick(rows, 1024, 8192), "fp8"))),
    Target("GEMM, M 1024–8192", "gemm", 1430, 1550, " TOPS",
           lambda rows: geomean(row["tops"] for row in pick(rows, 1024, 8192))),
    Target("GEMM, 8192³", "gemm", 1480, 1600, " TOPS",
           lambda rows: most(row["tops"] for row in pick(rows, 8192, 8192, {(8192, 8192)}))),
    Target("GEMM, M 128–512, against CUTLASS's best", "gemm", 1.10, 1.20, "×",
           lambda rows: geomean(speedups(pick(rows, 128, 512), "cutlass"))),
    Target("GEMM, M 1–64, against CUTLASS's best", "gemm", 1.18, 1.30, "×",
           lambda rows: geomean(speedups(pick(rows, 1, 64), "cutlass"))),
    Target("GEMM, M 1–64, 28672×4096 (117 MB), slowest", "gemm", 42, 39, " µs",
           lambda rows: slowest(pick(rows, 1, 64, {(28672, 4096)})), at_most=True),
    Target("GEMM, M 1–64, 4096×4096, slowest", "gemm", 7.7, 6.3, " µs",
           lambda rows: slowest(pick(rows, 1, 64, {(4096, 4096)})), at_most=True),
    Target("layer with quantization against bf16, least M", "linear", 1.5, 1.5, "×",
           lambda rows: each_m(device(rows, 1, 8192))),
    Target("layer with quantization against bf16, M 1–8192", "linear", 1.65, 1.8, "×",
           lambda rows: geomean(speedups(device(rows, 1, 8192), "bf16"))),
    Target("W8A16 layer, M 1–16, against bf16", "weight_only", 1.7, 1.85, "×",
           lambda rows: geomean(speedups([row for row in rows if row.get("m", ANY) <= 16
                                          and (row.get("n"), row.get("k")) in LLAMA], "bf16"))),
    Target("largest t(M + 1) / t(M), M 1–512", "sweep", 1.15, 1.08, "×",
           lambda rows: most(row["worst"][0][0] for row in rows if row["worst"]), at_most=True),
    Target("quantize per token, 32 MB and more, of a copy's rate, least", "quantize", 0.90, 0.95, "×",
           lambda rows: least(row["of_copy"] for row in rows
                              if row["operator"] == "quantize per token" and row["bytes"] >= 32 << 20)),
    Target("norm with quantization, time over the norm's alone", "fused", 1.05, 1.0, "×",
           lambda rows: geomean(row["of_alone"] for row in rows if "Norm" in row["operator"]), at_most=True),
    Target("BERT's layers, M 512–4096, against bf16, least", "linear", 1.0, 1.0, "×",
           lambda rows: least(speedups(device(rows, 512, 4096, BERT), "bf16"))),
    Target("BERT's layers, M 4096, against bf16", "linear", 1.5, 1.7, "×",
           lambda rows: geomean(speedups(device(rows, 4096, 4096, BERT), "bf16"))),
)  # fmt: skip


def load(results: Path, stem: str, gpu: str) -> Rows:
    """The rows of one result file; none where there is no file."""
    path = results / f"{stem}-{gpu}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def lines(results: Path, gpu: str = "h100") -> list[list[str]]:
    """What, must, reach, measured, verdict: one row of text for each target."""
    found = []
    for target in TARGETS:
        value = target.value(load(results, target.file, gpu))
        sign = "≤" if target.at_most else "≥"

        def text(number: float, target: Target = target) -> str:
            return f"{number:.0f}{target.unit}" if abs(number) >= 100 else f"{number:.3g}{target.unit}"

        if value is None or math.isnan(value):
            measured, verdict = "–", "not measured"
        else:
            measured = f"{value:.0f}{target.unit}" if value >= 100 else f"{value:.3f}{target.unit}"
            met = "met" if target.holds(value, target.must) else "open"
            verdict = "reached" if target.holds(value, target.reach) else met
        found.append([target.what, f"{sign} {text(target.must)}", f"{sign} {text(target.reach)}", measured, verdict])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of JSON files")
    parser.add_argument("--gpu", default="h100", help="end of the files' names (default h100)")
    arguments = parser.parse_args()
    from hwkern._console import print_table

    columns = ["target", "must", "reach for", "measured", ""]
    print_table(f"Targets on {arguments.gpu}", columns, lines(arguments.results, arguments.gpu))


if __name__ == "__main__":
    main()
