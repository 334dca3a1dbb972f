"""Plots of the committed results: TOPS, bytes per second and the ratio to bfloat16 over M, one column per layer.

    python benchmarks/plots.py [--results FOLDER] [--out FOLDER]

Reads gemm-*.json, linear-*.json, sweep-*.json and tensorrt*.json and writes one SVG for each into docs/plots, with
matplotlib (`pip install hwkern[bench]`); and what `hwkern bench` draws for its results (bench-*.json), which needs
none. The same file gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorrt_tables

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
ENOUGH = 6  # values of M; BERT's four are left to the tables

# Ours and each peer keep their colour in every plot. Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = {
    "hwkern": "#000000", "bf16": "#0072B2", "fp16": "#56B4E9", "fp32": "#999999", "int_mm": "#E69F00",
    "fp8": "#009E73", "cutlass": "#D55E00", "bitsandbytes": "#CC79A7", "compiled_int8": "#E69F00",
    "torchao_int8": "#F0E442", "torchao_weight_only": "#8C6D31", "torchao_fp8": "#009E73",
}  # fmt: skip


def layers(rows: list[Row]) -> list[tuple[int, int]]:
    """(N, K) with enough values of M for a curve, in the file's order."""
    found = dict.fromkeys((row["n"], row["k"]) for row in rows)
    return [nk for nk in found if sum((row["n"], row["k"]) == nk for row in rows) >= ENOUGH]


def times(row: Row) -> dict[str, float]:
    """µs by name, ours first; CUTLASS's variant with overlapping launches is left to the tables."""
    names = {name: us for name, us in row["peers_us"].items() if us and name in COLOURS}
    return {"hwkern": row["us"], **names}


def tops(row: Row, us: float, name: str) -> float:
    """10¹² operations a second."""
    return 2 * row["m"] * row["n"] * row["k"] / us / 1e6


def width(name: str) -> int:
    """Bytes of one operand element."""
    return {"bf16": 2, "fp16": 2, "fp32": 4}.get(name, 1)


def terabytes(row: Row, us: float, name: str) -> float:
    """10¹² bytes a second, each operand and the result crossing memory once: torch._int_mm's result has 4 bytes."""
    m, n, k = row["m"], row["n"], row["k"]
    result = {"fp32": 4, "int_mm": 4}.get(name, 2)
    return ((m * k + n * k) * width(name) + m * n * result) / us / 1e6


def ratio(row: Row, us: float, name: str) -> float:
    """How many times faster than bfloat16."""
    return row["peers_us"]["bf16"] / us


PANELS: list[tuple[str, Callable[[Row, float, str], float]]] = [
    ("TOPS", tops),
    ("TB/s", terabytes),
    ("times as fast as bfloat16", ratio),
]


def curves(document: dict[str, Any], plt: Any) -> Any:
    """The figure of a gemm or linear result: a row of panels for each measure, a column for each layer."""
    rows = [row for row in document["rows"] if row.get("kind", "device") == "device"]
    columns = layers(rows)
    figure, axes = plt.subplots(
        len(PANELS), len(columns), figsize=(3.6 * len(columns), 8.4), squeeze=False, sharex="col", sharey="row"
    )
    for column, (n, k) in enumerate(columns):
        here = sorted((row for row in rows if (row["n"], row["k"]) == (n, k)), key=lambda row: row["m"])
        axes[0][column].set_title(f"N × K = {n} × {k}", fontsize=9)
        for axis, (title, measure) in zip((line[column] for line in axes), PANELS, strict=True):
            for name in COLOURS:
                points = [(row["m"], measure(row, us, name)) for row in here if (us := times(row).get(name))]
                if points and not (measure is ratio and name == "bf16"):
                    axis.plot(
                        *zip(*points, strict=True), marker=".", label=name, color=COLOURS[name],
                        linewidth=2 if name == "hwkern" else 1, zorder=3 if name == "hwkern" else 2,
                    )  # fmt: skip
            if measure is ratio:
                axis.axhline(1, color=COLOURS["bf16"], linewidth=1)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title)
        axes[-1][column].set_xlabel("M (tokens)")
        axes[-1][column].xaxis.set_major_formatter("{x:.0f}")
    for line in axes:  # once all columns are drawn: they share the scale
        line[0].set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def sweep(document: dict[str, Any], plt: Any) -> Any:
    """The figure of a sweep: µs over every M, one line for each layer."""
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for row in document["rows"]:
        axis.plot(range(1, len(row["us"]) + 1), row["us"], label=f"{row['n']} × {row['k']}", linewidth=1)
    axis.set_xlabel("M (tokens)")
    axis.set_ylabel("µs")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(title="N × K", frameon=False, fontsize=9)
    return figure


FIGURES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "gemm": curves, "linear": curves, "sweep": sweep, "tensorrt": tensorrt_tables.figure,
}  # fmt: skip


def draw(path: Path, out: Path, plt: Any) -> Path:
    """Draw one result file; returns the picture's path."""
    document = json.loads(path.read_text(encoding="utf-8"))
    figure = FIGURES[document["benchmark"]](document, plt)
    where = document["environment"]
    figure.text(
        0.005, 0.005, f"{where.get('gpu', '')}, {where['date']}, commit {str(where.get('commit'))[:12]}", fontsize=7
    )
    figure.tight_layout(rect=(0, 0.02, 1, 0.95))
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{path.stem}.svg"
    # No date and fixed ids: the picture changes only where its numbers do.
    figure.savefig(target, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return target


def draw_bench(name: str, document: dict[str, Any], out: Path) -> None:
    """The plots of `hwkern bench`, each with the file's name before its own."""
    from hwkern.bench import page

    out.mkdir(parents=True, exist_ok=True)
    for file, drawn in page.plots(document).items():
        (out / f"{name}-{file}").write_text(drawn + "\n", encoding="utf-8")
        print(out / f"{name}-{file}")


def main() -> None:
    """Draw every result that there is a figure for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots", help="folder for the pictures")
    arguments = parser.parse_args()
    for path in sorted(arguments.results.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("benchmark") in ("comparison", "kernels") and not path.stem.endswith("-again"):
            draw_bench(path.stem, document, arguments.out)
    try:
        import matplotlib
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("Plots need matplotlib: pip install matplotlib (or hwkern[bench]).")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "hwkern", "svg.fonttype": "none", "font.family": "sans-serif"}
    for path in sorted(arguments.results.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.get("benchmark") in FIGURES and any(row.get("what") != "model" for row in document["rows"]):
            print(draw(path, arguments.out, plt))


if __name__ == "__main__":
    main()
