"""The tables and the figure of benchmarks/tensorrt.py's results, for tables.py and plots.py."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

VARIANTS = {
    "fp32": "TensorRT FP32", "fp16": "TensorRT FP16", "qdq": "TensorRT INT8 (Q/DQ)", "hwkern": "rewritten, all linears",
    "norm": "rewritten, norms fused", "residual": "rewritten, residuals fused", "unmerged": "rewritten, not merged",
    "between": "rewritten, norms fused between int8", "attention": "rewritten, attention fused",
    "plain": "rewritten, activations apart", "half": "rewritten, the model in float16", "plan": "rewritten by plan",
}  # fmt: skip
COLOURS = {"hwkern": "#000000", "qdq": "#E69F00", "fp32": "#999999"}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def tables(document: Row) -> str:
    """Linears, the figures of merit, and a table for each model."""
    rows = document["rows"]
    parts = []
    linears = sorted((r for r in rows if r["what"] == "linear"), key=lambda r: (r["n"], r["k"], r["m"]))
    if linears:
        parts += [_linears(linears), _merits(document["geomeans"])]
    for name in dict.fromkeys(r["model"] for r in rows if r["what"] == "model"):
        parts.append(_model(name, [r for r in rows if r.get("model") == name]))
    return "\n\n".join(parts)


def _linears(rows: list[Row]) -> str:
    def time(row: Row, name: str) -> str:
        return f"{row[name]['p50']:.1f}" if name in row else "–"

    def ratio(row: Row, over: str, under: str, digits: int = 2) -> str:
        return f"{row[over]['p50'] / row[under]['p50']:.{digits}f}×" if over in row and under in row else "–"

    def spread(row: Row) -> str:
        rounds = [row[name].get("rounds", []) for name in ("hwkern", "kernel") if name in row]
        ratios = [engine / kernel for engine, kernel in zip(*rounds, strict=True)] if len(rounds) == 2 else []
        return f" ({min(ratios):.3f}–{max(ratios):.3f})" if ratios else ""

    def error(row: Row, name: str) -> str:
        return f"{100 * row['errors'][name]:.2f} %" if name in row["errors"] else "–"

    columns = ["M×N×K", "FP16, µs", "INT8 Q/DQ, µs", "plugin, µs", "vs FP16", "vs INT8", "over the bare kernel",
               "error of INT8", "error of the plugin"]  # fmt: skip
    cells = []
    for r in rows:
        line = [f"{r['m']}×{r['n']}×{r['k']}", *(time(r, name) for name in ("fp16", "qdq", "hwkern"))]
        line += [ratio(r, "fp16", "hwkern"), ratio(r, "qdq", "hwkern"), ratio(r, "hwkern", "kernel", 3) + spread(r)]
        cells.append([*line, error(r, "qdq"), error(r, "hwkern")])
    return markdown(columns, cells)


def _merits(geomeans: dict[str, float]) -> str:
    names = {"fp16": "TensorRT FP16", "qdq": "TensorRT INT8", "engine": "engine"}
    said = []
    for key, value in geomeans.items():
        first, _, rest = key.partition(" / ")
        if first == "engine":
            said.append(f"the engine takes {value:.3f}× the bare kernel ({rest.removeprefix('kernel, ')})")
        else:
            said.append(f"{value:.2f}× {names[first]} at {rest.removeprefix('hwkern, ').replace('m ', 'M ')}")
    return f"Geometric means: {'; '.join(said)}.".replace("<=", "≤").replace(">=", "≥")


def title(row: Row) -> str:
    """What a variant is in words: fp16, plan, or parts such as norm+unmerged."""
    if row["variant"] in VARIANTS:
        return VARIANTS[row["variant"]] + (f" ({row['plan']['chosen']})" if "plan" in row else "")
    parts = row["variant"].split("+")
    sizes = next((p.removeprefix("largest") for p in parts if p.startswith("largest")), "")
    words = [f"the {sizes if sizes != '1' else ''} largest".replace("  ", " ")] if sizes else []
    words += [VARIANTS[p].removeprefix("rewritten, ") for p in parts if not p.startswith("largest") and p != "hwkern"]
    return f"rewritten, {', '.join(words)}"


def _model(name: str, rows: list[Row]) -> str:
    """Two tables: on the GPU, and from numpy to numpy."""
    shapes = list(rows[0]["gpu_us"])
    heads = [s.replace("x", "×") for s in shapes]
    float_row = next((row for row in rows if row["variant"] == "fp16"), {})
    base, base_walls = float_row.get("gpu_us", {}), float_row.get("latency_us", {})
    has_cosine = any("cosine" in row for row in rows)
    gpu, calls = [], []
    for row in rows:
        line = [title(row)]
        for s in shapes:
            us = row["gpu_us"][s]["p50"]
            line.append(f"{us:.0f}" + (f" ({base[s]['p50'] / us:.2f}×)" if s in base else ""))
        line += [f"{row['engine_bytes'] / 1e6:.1f}", f"{row['device_bytes'] / 1e6:.0f}"]
        if has_cosine:
            found = row.get("cosine")
            line.append(f"{found['sentence_min']:.4f}, {found['token_min']:.4f}" if found else "–")
        gpu.append(line)
        latency = row["latency_us"]
        rates = [int(s.split("x")[0]) / latency[s]["p50"] * 1e6 for s in shapes]
        walls = []
        for s in shapes:
            p50, p95, p99 = (latency[s][p] for p in ("p50", "p95", "p99"))
            said = [f"{base_walls[s]['p50'] / p50:.2f}×"] * (s in base_walls)
            said += [f"{min(rounds):.0f}–{max(rounds):.0f}" for rounds in [latency[s].get("rounds")] if rounds]
            walls.append(f"{p50:.0f}" + f" ({'; '.join(said)})" * bool(said) + f" / {p95:.0f} / {p99:.0f}")
        calls.append([title(row), *walls, f"{max(rates):.0f}"])
    columns = [f"{name}, batch×length", *(f"{h}, GPU µs (times FP16)" for h in heads), "engine, MB", "device, MB"]
    columns += ["least cosine of a sentence, of a token"] * has_cosine
    wall = [
        "from numpy to numpy, p50 (times FP16; of the rounds) / p95 / p99",
        *(f"{h}, µs" for h in heads),
        "most sequences/s",
    ]
    return markdown(columns, gpu) + "\n\n" + markdown(wall, calls)


def figure(document: Row, plt: Any) -> Any:
    """Speed against FP16 over M, one panel per linear."""
    rows = [r for r in document["rows"] if r["what"] == "linear" and "fp16" in r]
    shapes = sorted({(r["n"], r["k"]) for r in rows})
    drawn, axes = plt.subplots(
        1, max(1, len(shapes)), figsize=(5.5 * max(1, len(shapes)), 3.8), squeeze=False, sharey=True
    )
    for axis, shape in zip(axes[0], shapes, strict=False):
        mine = sorted((r for r in rows if (r["n"], r["k"]) == shape), key=lambda r: r["m"])
        for name, label in (("hwkern", "hwkern plugin"), ("qdq", VARIANTS["qdq"]), ("fp32", VARIANTS["fp32"])):
            points = [(r["m"], r["fp16"]["p50"] / r[name]["p50"]) for r in mine if name in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label, color=COLOURS[name])
        axis.axhline(1.0, color="#56B4E9", linewidth=1, label="TensorRT FP16")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="rows (M)", title=f"{shape[0]} × {shape[1]}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times as fast as TensorRT FP16")
    if shapes:
        axes[0][0].legend(frameon=False, fontsize=9)
    return drawn
