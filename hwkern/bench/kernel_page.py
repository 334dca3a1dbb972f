"""The kernels' plots and page: a roofline, bars of the share of the speed of light and against peers, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hwkern import _svg
from hwkern._svg import Axis, Bar, Curve, Point
from hwkern.bench.tables import Row, number


def measured(document: Mapping[str, Any]) -> list[Row]:
    """Rows with figures."""
    return [row for row in document["rows"] if row["status"] == "ok"]


def name(row: Row) -> str:
    """Operator and size."""
    sizes = "×".join(str(row[key]) for key in ("m", "n", "k") if row.get(key) is not None)
    return f"{row['operator']} {sizes}"


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The table: µs, noise, TOPS or GB/s, the share of the speed of light, and each peer's time over ours."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers_us"]))
    heads = ["operator", "µs", "±", "TOPS", "GB/s", "of the speed of light", *(f"vs {peer}" for peer in peers)]
    cells = []
    for row in rows:
        light = f"{100 * row['of_light']:.0f} % ({row['bound']})" if row["of_light"] else "–"
        ratios = [row["peers_us"].get(peer) for peer in peers]
        cells.append(
            [
                name(row),
                number(row["us"]),
                "–" if row["noise"] is None else f"{100 * row['noise']:.0f} %",
                number(row["operations"] / row["us"] / 1e6) if row["operations"] else "–",
                number(row["bytes"] / row["us"] / 1e3),
                light,
                *("–" if us is None else f"{us / row['us']:.2f}×" for us in ratios),
            ]
        )
    return heads, cells


def roofline(document: Mapping[str, Any], alone: bool = False) -> str | None:
    """TOPS over operations per byte under the roofs of this GPU; None where the peaks are not known."""
    found = document["environment"]
    bandwidth, peak = found.get("bandwidth"), found.get("int8_ops")
    rows = [row for row in measured(document) if row["operations"]]
    if not (bandwidth and peak and rows):
        return None
    points = [
        Point(
            name(row).removeprefix("INT8 GEMM "), row["operations"] / row["bytes"], row["operations"] / row["us"] / 1e6,
            "now", False,
        )
        for row in rows
    ]  # fmt: skip
    low, high = 0.5 * min(p.x for p in points), 3 * max(p.x for p in points)
    ridge = peak / bandwidth
    roof = [(x, min(peak, x * bandwidth) / 1e12) for x in (low, min(ridge, high), high)]
    title = f"roof: {bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TOPS at {found['clock_mhz']:.0f} MHz"
    curves = [Curve(title, roof, "bound")]
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        mine = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        tokens = f"{mine[0]['m']} … {mine[-1]['m']}"
        line = [(row["operations"] / row["bytes"], row["operations"] / row["us"] / 1e6) for row in mine]
        curves.append(Curve(f"N × K = {n} × {k}, M = {tokens}", line, "now"))
    curves.sort(key=lambda curve: -curve.points[0][1])  # the names stand in the order of the lines
    x = Axis("INT8 operations per byte moved", low, high, True)
    y = Axis("TOPS", 0.5 * min(p.y for p in points), 2 * peak / 1e12, True)
    return _svg.plane(x, y, points, curves, "Roofline of the INT8 GEMM", alone)


def light(document: Mapping[str, Any], alone: bool = False) -> str | None:
    """Bars of the share of the speed of light; None where it is not known."""
    rows = [row for row in measured(document) if row["of_light"]]
    if not rows:
        return None
    made = [Bar(name(row), row["of_light"], f"{100 * row['of_light']:.0f} % {row['bound']}", "now") for row in rows]
    return _svg.bars(made, "Share of the speed of light", reference=1.0, alone=alone)


def products(document: Mapping[str, Any], alone: bool = False) -> str | None:
    """The GEMM's bars of :func:`_speed`."""
    return _speed([row for row in measured(document) if row["operations"]], alone)


def others(document: Mapping[str, Any], alone: bool = False) -> str | None:
    """The other operators' bars of :func:`_speed`."""
    return _speed([row for row in measured(document) if not row["operations"]], alone)


def _speed(rows: Sequence[Row], alone: bool) -> str | None:
    """Bars of how many times faster than the fastest peer of the same work."""
    made = []
    for row in rows:
        peers = {peer: us for peer, us in row["peers_us"].items() if peer != "stock alone"}
        if peers:
            best = min(peers, key=peers.__getitem__)
            ratio = peers[best] / row["us"]
            made.append(Bar(name(row), ratio, f"{ratio:.2f}× {best}", "now" if ratio >= 1 else "was"))
    return _svg.bars(made, "Times as fast as the fastest peer", reference=1.0, alone=alone) if made else None


DRAWINGS = {"roofline": roofline, "speed-of-light": light, "products": products, "others": others}
CAPTIONS = {
    "roofline": "Roofline of the INT8 GEMM (M×N×K)",
    "speed-of-light": "Share of the speed of light: the documented bound over the time; the dashed line is the bound",
    "products": "INT8 GEMM: times as fast as the fastest peer; the dashed line is a draw",
    "others": "Other operators: times as fast as stock and, where fused, our quantization behind it",
}


def plots(document: Mapping[str, Any]) -> dict[str, str]:
    """File name → SVG."""
    made = {f"kernels-{key}.svg": draw(document, True) for key, draw in DRAWINGS.items()}
    return {file: drawn for file, drawn in made.items() if drawn is not None}


def html(document: Mapping[str, Any]) -> str:
    """The whole page."""
    from hwkern.bench.page import figure, table, where

    machine, run = where(document)
    title = f"Kernels on {document['environment'].get('gpu') or document['environment'].get('cpu')}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(machine)}</p>",
        f"<p class='soft'><code>{escape(run)}</code></p>",
    ]
    for key, draw in DRAWINGS.items():
        if (drawn := draw(document)) is not None:
            parts.append(figure(CAPTIONS[key], drawn))
    parts.append(table(*columns(measured(document))))
    parts += [f"<p class='soft'>{escape(line)}</p>" for line in left_out(document)]
    return _svg.page(title, parts)


def left_out(document: Mapping[str, Any]) -> list[str]:
    """Sentences on rows without figures and on peers that could not run."""
    lines = [f"{row['status']}: {name(row)}: {row['reason']}" for row in document["rows"] if row["status"] != "ok"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in measured(document):
        for peer, reason in row["absent"].items():
            reasons.setdefault((peer, reason), []).append(name(row))
    return lines + [f"not measured: {peer}: {reason} ({len(at)} rows)" for (peer, reason), at in reasons.items()]
