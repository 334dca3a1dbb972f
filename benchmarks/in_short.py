"""What README.md says of the results in sentences: computed from the committed files, so that it cannot go stale."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import targets
from targets import BERT, Rows, device, pick, speedups


def _range(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}"


def _sustained(rows: Rows) -> Rows:
    """What of these rows was also measured without rests."""
    return [{**row, **row["sustained"]} for row in rows if "sustained" in row]


def kernels(results: Path, gpu: str) -> str:
    """The GEMM and the whole layer against their peers, and how many targets are met."""
    gemm, linear = (targets.load(results, stem, gpu) for stem in ("gemm", "linear"))
    large = pick(gemm, 1024, 8192)
    hot = _sustained(large)
    layers, bert = device(linear, 1, 8192), device(linear, 1, 8192, BERT)
    needed = [speedups(large, "fp8"), speedups(large, "cutlass"), speedups(hot, "fp8"), speedups(hot, "cutlass")]
    if not all([*needed, layers, bert]):
        return f"*Not measured yet: gemm-{gpu}.json and linear-{gpu}.json do not hold all of it.*"
    fp8, _, hot_fp8, hot_cutlass = needed
    by_m = {row["m"]: speedups([each for each in layers if each["m"] == row["m"]], "bf16") for row in layers}
    where = min(by_m, key=lambda m: statistics.geometric_mean(by_m[m]))
    means = [
        f"{_mean(speedups(pick(gemm, low, high), 'cutlass'))} at M = {low} … {high}"
        for low, high in ((1, 64), (128, 512), (1024, 8192))
    ]
    gains, small = speedups(layers, "bf16"), speedups(bert, "bf16")
    verdicts = [line[4] for line in targets.lines(results, gpu)]
    met = sum(verdict in ("met", "reached") for verdict in verdicts)
    product = [_range(speedups(pick(gemm, 1, 8192), peer), digits) for peer, digits in (("bf16", 1), ("cutlass", 2))]
    return (
        f"Over the layers of an 8-billion-parameter model the GEMM is {product[0]} times as fast as bfloat16 cuBLAS. "
        f"Against CUTLASS's best INT8 kernel it is {product[1]} times as fast; the geometric means are {means[0]}, "
        f"{means[1]} and {means[2]}. Against FP8 row-wise it is {_range(fp8)} times as fast at M = 1024 … 8192. That "
        f"is with a rest after every replay; at the chip's power limit the two are {_mean(hot_cutlass)} and "
        f"{_range(hot_fp8)}. A layer with its quantization is {_range(gains, 1)} times as fast as bfloat16: "
        f"{_mean(gains)} times in the geometric mean, {_mean(by_m[where])} times at the M where the mean is least "
        f"({where}). Layers of BERT-base's size are {_range(small)} times as fast as bfloat16, {_mean(small)} times in "
        f"the geometric mean: there the quantization costs most of what the product gains. {met} of {len(verdicts)} "
        f"targets are met, {verdicts.count('open')} are open."
    )


def plans(results: Path, gpu: str) -> str:
    """How slow the slowest planned model is."""
    rows = [row for row in targets.load(results, "never_slower", gpu) if "ratio" in row]
    if not rows:
        return f"*Not measured yet: there is no benchmarks/results/never_slower-{gpu}.json.*"
    models = {(row["model"], row["size"]) for row in rows}
    return (
        f"{len(models)} models of {len({model for model, _ in models})} architectures at random weights: the slowest "
        f"of {len(rows)} planned cells took {max(row['ratio'] for row in rows):.3f} times the original's time. In "
        f"{sum(row['int8'] == 0 for row in rows)} of them the plan swaps nothing."
    )


SHORT: dict[str, Callable[[Path, str], str]] = {"kernels_in_short": kernels, "plans_in_short": plans}
