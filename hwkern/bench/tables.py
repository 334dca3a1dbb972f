"""The comparison as text and CSV, from the JSON document."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hwkern._console import plain_table
from hwkern.bench.paths import path as path_of

Row = Mapping[str, Any]

#: Columns of the CSV: a name, and where its value is in a row.
CSV_COLUMNS = (
    "model", "workload", "path", "status", "reason", "tokens_per_s", "noise", "ratio.to", "ratio.value", "ratio.noise",
    "latency_ms.p50", "latency_ms.p95", "latency_ms.p99", "first_token_ms.p50", "first_token_ms.p95",
    "per_token_ms.p50", "per_token_ms.p95", "weight_bytes", "memory.steady", "memory.peak", "joules_per_token", "watts",
    "accuracy.cosine", "accuracy.cosine_min", "accuracy.kl", "accuracy.top1", "accuracy.perplexity",
    "accuracy.perplexity_fp32", "requests_per_s", "padding_waste", "rows_per_batch", "input_share", "bound_ms",
)  # fmt: skip

KERNEL_COLUMNS = (
    "operator", "dtype", "m", "n", "k", "status", "reason", "us", "noise", "floor_us", "bound", "of_light",
    "operations", "bytes", "peers_us.bf16", "peers_us.fp32", "peers_us.int_mm", "peers_us.fp8", "peers_us.eager torch",
    "peers_us.stock, then quantize", "peers_us.stock alone",
)  # fmt: skip


def value(row: Row, dotted: str) -> Any:
    """``row["a"]["b"]`` for "a.b"; None where there is none."""
    found: Any = row
    for part in dotted.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def to_csv(document: Mapping[str, Any]) -> str:
    """One line per row, absent ones included."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = CSV_COLUMNS if document["benchmark"] == "comparison" else KERNEL_COLUMNS
    writer.writerow(names)
    for row in document["rows"]:
        writer.writerow(["" if (v := value(row, column)) is None else v for column in names])
    return out.getvalue()


def groups(document: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Row]]]:
    """``(model, workload, measured rows)`` in the document's order, fastest path first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in document["rows"]:
        if row["status"] == "ok":
            found.setdefault((row["model"], row["workload"]), []).append(row)
    for (model, workload), rows in found.items():
        yield model, workload, sorted(rows, key=lambda row: -row["tokens_per_s"])


def by_model(document: Mapping[str, Any]) -> dict[str, list[tuple[str, list[Row]]]]:
    """Model → its workloads with their rows, as :func:`groups` has them."""
    found: dict[str, list[tuple[str, list[Row]]]] = {}
    for model, workload, rows in groups(document):
        found.setdefault(model, []).append((workload, rows))
    return found


def number(found: float | None, scale: float = 1, digits: int = 3) -> str:
    """Three significant digits, thousands in full; "–" for None."""
    if found is None:
        return "–"
    scaled = found * scale
    if abs(scaled) >= 10 ** (digits - 1):
        return f"{scaled:,.0f}".replace(",", " ")
    return f"{scaled:.{digits}g}"


def ratio(times: float, uncertain: float | None, digits: int = 2) -> str:
    """A ratio with its noise where that is known."""
    return f"{times:.{digits}f}×" + ("" if uncertain is None else f" ± {100 * uncertain:.0f} %")


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table of one model and workload: heads and cells; columns that no row fills are left out."""
    decoding = any("per_token_ms" in row for row in rows)
    traffic = any("padding_waste" in row for row in rows)
    per = "requests/s" if traffic else "images/s" if rows and rows[0]["workload"].isdigit() else "tokens/s"
    base = next((row["ratio"]["to"] for row in rows if row.get("ratio")), "")

    def to_base(row: Row) -> str:
        if not (found := row.get("ratio")):
            return "–"
        return ratio(found["value"], None if row["path"] == found["to"] else found["noise"])

    def accuracy(name: str, form: str, scale: float = 1) -> Callable[[Row], str]:
        return lambda row: "–" if (v := value(row, f"accuracy.{name}")) is None else form.format(scale * v)

    every = {
        "path": lambda row: path_of(row["path"]).title,
        per: lambda row: number(row["requests_per_s"] if traffic else row["tokens_per_s"]),
        f"to {base}": to_base,
        "p50 ms": lambda row: number(value(row, "latency_ms.p50")),
        "p95": lambda row: number(value(row, "latency_ms.p95")),
        "p99": lambda row: number(value(row, "latency_ms.p99")),
        "first token ms": lambda row: number(value(row, "first_token_ms.p50")) if decoding else "–",
        "per token ms": lambda row: number(value(row, "per_token_ms.p50")) if decoding else "–",
        "weights MB": lambda row: number(row.get("weight_bytes"), 1e-6),
        "memory MB": lambda row: number(value(row, "memory.steady"), 1e-6),
        "peak MB": lambda row: number(value(row, "memory.peak"), 1e-6),
        "mJ/token": lambda row: number(row.get("joules_per_token"), 1e3),
        "padding": lambda row: f"+{100 * row['padding_waste']:.0f} %" if traffic else "–",
        "rows/batch": lambda row: number(row.get("rows_per_batch")),
        "cosine to FP32": accuracy("cosine", "{:.4f}"),
        "top-1": accuracy("top1", "{:.0f} %", 100),
        "perplexity": accuracy("perplexity", "{:.2f}"),
    }
    cells = {name: [of(row) for row in rows] for name, of in every.items()}
    kept = [name for name, column in cells.items() if any(cell != "–" for cell in column)]
    return kept, [list(line) for line in zip(*(cells[name] for name in kept), strict=True)]


def title(document: Mapping[str, Any], model: str) -> str:
    """The model's name, with what it is where the document says so."""
    words = document["settings"].get("models", {}).get(model)
    return f"{model}: {words}" if words else model


def left_out(document: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """``(status, reason, where)``: everything that has no figures, like reasons together."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            places = found.setdefault((row["status"], row.get("reason", "")), {})
            places.setdefault((row["path"], row["model"]), []).append(row["workload"])
    result = []
    for (status, reason), places in found.items():
        by_path: dict[str, dict[str, list[str]]] = {}
        for (path, model), workloads in places.items():
            by_path.setdefault(path, {})[model] = workloads
        where = []
        for path, by_model in by_path.items():
            models = "; ".join(f"{m} {', '.join(w)}" if w != ["all"] else m for m, w in by_model.items())
            where.append(f"{path} ({models})" if path != "all" else models)
        result.append((status, reason, where))
    return result


def text(document: Mapping[str, Any]) -> str:
    """All tables, then what was not measured."""
    if document["benchmark"] == "kernels":
        from hwkern.bench import kernel_page

        heads, cells = kernel_page.columns(kernel_page.measured(document))
        return "\n".join([plain_table("kernels", heads, cells), *kernel_page.left_out(document)])
    parts = []
    for model, workload, rows in groups(document):
        heads, cells = columns(rows)
        parts.append(plain_table(f"{model}, {workload}", heads, cells))
    for status, reason, where in left_out(document):
        parts.append(f"{status}: {reason}: {'; '.join(where)}")
    return "\n\n".join(parts)
