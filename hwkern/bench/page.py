"""The comparison as plots and one self-contained HTML page, from the JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hwkern import _svg
from hwkern._svg import Axis, Bar, Point, Range
from hwkern.bench import tables
from hwkern.bench.paths import path as path_of
from hwkern.bench.tables import Row, number, value
from hwkern.bench.verdicts import padding, verdicts

KINDS = {"stock": "was", "hwkern": "now", "tensorrt": "other"}
KEY = (
    "<p class='soft'><i class='key was'></i>stock<i class='key now'></i>hwkern, in torch and in TensorRT"
    "<i class='key other'></i>TensorRT alone</p>"
)

#: The rows of the headline table and the bases that compete for each: the fastest of them stands for the row.
CLASSES = (
    ("FP32", ("fp32",)),
    ("FP16 / BF16", ("fp16", "bf16")),
    ("INT8, stock", ("bitsandbytes", "torchao-int8", "dynamic-fbgemm", "dynamic-onednn")),
    ("FP8, stock", ("torchao-fp8",)),
    ("INT8, hwkern", ("hwkern-patch", "hwkern-plan")),
    ("TensorRT", ("trt-fp32", "trt-fp16", "trt-int8")),
    ("TensorRT + hwkern", ("trt-hwkern",)),
)


def kind(row: Row) -> str:
    """The colour of a path: stock, ours, or TensorRT."""
    found = path_of(row["path"])
    return "now" if found.ours else KINDS[found.family]


def headline(rows: Sequence[Row]) -> list[tuple[str, Row | None]]:
    """The fastest path of each class; None for a class without any. Rows of classes that this device cannot have at all
    are left out by the caller."""
    found = []
    for name, bases in CLASSES:
        mine = [row for row in rows if path_of(row["path"]).base in bases]
        found.append((name, max(mine, key=lambda row: row["tokens_per_s"]) if mine else None))
    return found


def headline_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headline of one model and workload as a table; ratios are to the row of the document's baseline."""
    classes = headline(rows)
    known = {name: row for name, row in classes if row is not None}
    to = next((row["ratio"]["to"] for row in rows if row.get("ratio")), "fp32")
    base_name = next(name for name, bases in CLASSES if to in bases)
    base = known.get(base_name)
    per = "requests/s" if any("requests_per_s" in row for row in rows) else "tokens/s"
    if rows and rows[0]["workload"].isdigit():
        per = "images/s"
    heads = [
        "",
        "the fastest path of its kind",
        per,
        f"to {base_name}",
        "p50 ms",
        "p95 ms",
        "weights MB",
        "peak MB",
        "mJ/token",
        "cosine",
    ]
    cells = []
    for name, row in classes:
        if row is None:
            continue
        rate = row.get("requests_per_s") or row["tokens_per_s"]
        times = "–" if base is None else f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}×"
        accuracy = value(row, "accuracy.cosine")
        cells.append(
            [
                name,
                path_of(row["path"]).title,
                number(rate),
                times,
                number(value(row, "latency_ms.p50")),
                number(value(row, "latency_ms.p95")),
                number(row.get("weight_bytes"), 1e-6),
                number(value(row, "memory.peak"), 1e-6),
                number(row.get("joules_per_token"), 1e3),
                "–" if accuracy is None else f"{accuracy:.4f}",
            ]
        )
    return heads, cells


# ---- plots ----------------------------------------------------------------------------------------------------------


def throughput(rows: Sequence[Row], title: str, alone: bool = False) -> str:
    """Bars of tokens (images, requests) per second with their noise, fastest first."""
    unit = "requests_per_s" if "requests_per_s" in rows[0] else "tokens_per_s"
    made = []
    for row in rows:
        ratio = f"  {row['ratio']['value']:.2f}×" if row.get("ratio") else ""
        made.append(
            Bar(
                path_of(row["path"]).title, row[unit], f"{number(row[unit])}{ratio}", kind(row), row.get("noise") or 0.0
            )
        )
    return _svg.bars(made, title, alone=alone)


def latency(rows: Sequence[Row], title: str, alone: bool = False) -> str:
    """p50 as a dot, p95 and p99 as ticks; of decoding paths per token."""
    made = []
    for row in rows:
        found = row.get("per_token_ms") or row["latency_ms"]
        words = " / ".join(number(found[name]) for name in ("p50", "p95", "p99"))
        made.append(Range(path_of(row["path"]).title, [found[n] for n in ("p50", "p95", "p99")], words, kind(row)))
    return _svg.ranges(made, title, alone)


def memory(rows: Sequence[Row], title: str, alone: bool = False) -> str:
    """Peak device memory, or the weights where the device's memory is not known."""
    known = all(value(row, "memory.peak") is not None for row in rows)
    made = []
    for row in sorted(rows, key=lambda row: row["weight_bytes"]):
        size = value(row, "memory.peak") if known else row["weight_bytes"]
        words = f"{number(size, 1e-6)} MB" + (f", weights {number(row['weight_bytes'], 1e-6)}" if known else "")
        made.append(Bar(path_of(row["path"]).title, size, words, kind(row)))
    return _svg.bars(made, title, alone=alone)


def accuracy(rows: Sequence[Row], title: str, alone: bool = False) -> str | None:
    """Speed against error, 1 − cosine on a logarithmic axis, of the fastest way to launch each version; None where
    there is nothing to draw."""
    points = []
    fastest = {path_of(row["path"]).base: row for row in sorted(rows, key=lambda row: row["tokens_per_s"])}
    for row in fastest.values():
        cosine = value(row, "accuracy.cosine")
        if row.get("ratio") and cosine is not None and 1 - cosine > 1e-8:
            points.append(Point(path_of(row["path"]).title, row["ratio"]["value"], 1 - cosine, kind(row)))
    if len(points) < 2:
        return None
    worst, best = max(p.y for p in points), min(p.y for p in points)
    y = Axis("1 − cosine with float32 (lower is more accurate)", best / 3, worst * 3, True, "{:.0e}".format)
    x = Axis(f"times as fast as {rows[0]['ratio']['to']}", 0, 1.3 * max(p.x for p in points))
    return _svg.plane(x, y, points, [], title, alone)


def plots(document: Mapping[str, Any]) -> dict[str, str]:
    """File name → SVG, each on its own."""
    if document["benchmark"] == "kernels":
        from hwkern.bench.kernel_page import plots as kernel_plots

        return kernel_plots(document)
    found = {}
    for model, workload, rows in tables.groups(document):
        stem = f"{model}-{workload}".replace(":", "-").replace("/", "-")
        found[f"{stem}-throughput.svg"] = throughput(rows, f"{model}, {workload}: throughput", True)
        found[f"{stem}-latency.svg"] = latency(rows, f"{model}, {workload}: latency", True)
    return found


# ---- the page -------------------------------------------------------------------------------------------------------


def figure(caption: str, drawn: str) -> str:
    """A drawing with what it shows."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>"


def table(heads: Sequence[str], cells: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """An HTML table; ``kinds``: a class for each row."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr class='{kinds[i] if kinds else ''}'>{''.join(f'<td>{escape(c)}</td>' for c in line)}</tr>"
        for i, line in enumerate(cells)
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def where(document: Mapping[str, Any]) -> list[str]:
    """Sentences on the machine and the run."""
    found = document["environment"]
    machine = found.get("gpu") or f"{found.get('cpu')}, {found.get('threads')} threads"
    parts = [str(machine)]
    smi = found.get("nvidia_smi") or {}
    if smi:
        parts.append(f"driver {smi.get('driver_version')}")
        parts.append(f"SM clock up to {smi.get('clocks.max.sm')} MHz, power limit {smi.get('power.limit')} W")
    parts += [f"torch {found['torch']}"] + ([found["tensorrt"]] if found.get("tensorrt") else [])
    return [
        ", ".join(parts) + ".",
        f"{found['date']}, commit {str(found.get('commit') or 'unknown')[:12]}: {found['command']}",
    ]


def html(document: Mapping[str, Any]) -> str:
    """The whole page."""
    if document["benchmark"] == "kernels":
        from hwkern.bench.kernel_page import html as kernel_html

        return kernel_html(document)
    machine, run = where(document)
    name = document["environment"].get("gpu") or document["environment"].get("cpu")
    parts = [f"<h1>Every way to run a model on {escape(str(name))}</h1>"]
    parts += [f"<p>{escape(machine)}</p>", f"<p class='soft'><code>{escape(run)}</code></p>", KEY]
    base, blocks = document["settings"]["baseline"], document["settings"]["blocks"]
    parts.append(
        f"<p class='soft'>Ratios are to {escape(path_of(base).title)}, block by block; each path was timed in up to "
        f"{blocks} blocks, in turn with the others. Whiskers and ± are what a second run may differ by. "
        "Random weights but where the model is said to be trained.</p>"
    )
    for model, workloads in tables.by_model(document).items():
        parts.append(f"<h2>{escape(tables.title(document, model))}</h2>")
        for workload, rows in workloads:
            parts += _workload(model, workload, rows)
        parts += [f"<p>{escape(sentence)}</p>" for sentence in padding(workloads)]
        rows = workloads[0][1]
        what = "Peak device memory, and of it the weights" if value(rows[0], "memory.peak") else "Weights and buffers"
        parts.append(figure(f"{what} ({workloads[0][0]})", memory(rows, f"{model}: memory")))
        if (drawn := accuracy(rows, f"{model}: speed and error")) is not None:
            parts.append(figure(f"Speed against error ({workloads[0][0]})", drawn))
    if missing := tables.left_out(document):
        parts.append("<h2>What was not measured</h2>")
        lines = "".join(
            f"<tr><td class='text'>{escape(status)}</td><td class='text'>{escape(reason)}</td>"
            f"<td class='text'>{escape('; '.join(places))}</td></tr>"
            for status, reason, places in missing
        )
        parts.append(f"<table><tbody>{lines}</tbody></table>")
    return _svg.page(f"hwkern bench: {name}", parts)


def _workload(model: str, workload: str, rows: Sequence[Row]) -> list[str]:
    title = f"{model}, {workload}"
    traffic = "padding_waste" in rows[0]
    if traffic:
        count = len(rows[0]["tops"])
        profiles = f"{count} profile{'s' if count != 1 else ''}" if count else "each batch padded to its longest"
        lengths = f" ({', '.join(map(str, rows[0]['tops']))} tokens)" if count else ""
        caption = (
            f"Requests per second with 95 % of the answers within {rows[0]['bound_ms']:g} ms: {profiles}{lengths}, "
            f"padding +{100 * rows[-1]['padding_waste']:.0f} %"
        )
    else:
        unit = "Images" if workload.isdigit() else "Generated tokens" if "per_token_ms" in rows[0] else "Tokens"
        caption = f"{unit} per second"
    times = "ms per token after the first" if "per_token_ms" in rows[0] else "Latency in ms"
    heads, cells = tables.columns(rows)
    said = [f"<p>{escape(sentence)}</p>" for sentence in verdicts(rows)]
    return [
        f"<h3>{escape(workload)}</h3>",
        *said,
        figure(caption, throughput(rows, f"{title}: throughput")),
        figure(f"{times}: p50 (dot) / p95 / p99 (ticks)", latency(rows, f"{title}: latency")),
        table(heads, cells, [kind(row) for row in rows]),
    ]
