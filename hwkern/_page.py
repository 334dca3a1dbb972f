"""The HTML page of a report: one file, no scripts, nothing fetched; plots are inline SVG.

Every plot names its lines and bars where they are drawn, takes its colours from the page (light or dark as the reader's
system has it), and has a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from hwkern import _svg
from hwkern._svg import WIDTH, bar, line, text
from hwkern.report import (
    KEPT,
    LayerReport,
    Report,
    Timing,
    group_layers,
    modes,
    plan_lines,
    readable_bytes,
    total_us,
)

MOST = 40  # rows of a plot: the rest is summed up in a sentence

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; } .tile span { color: var(--soft); font-size: .85rem; }
figure { margin: .75rem 0 0; overflow-x: auto; } svg { min-width: 38rem; }
svg .nowtext { fill: var(--now); font-weight: 600; }
i.was, i.now { display: inline-block; width: 1.6em; height: .55em; background: var(--was); border-radius: 1px; }
i.now { background: var(--now); } td small { color: var(--soft); display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 46rem; font-size: .88rem; margin-top: .75rem; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td.num, th.num { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 11rem; } td.shade { text-align: right; padding-right: .6rem; }
td.shade { background: color-mix(in srgb, var(--now) calc(var(--share) * 55%), transparent); }
"""


def page(report: Report) -> str:
    """The whole document."""
    title = f"hwkern: {report.model or 'model'}"
    parts = [
        f"<h1>{escape(report.model or 'Model')}</h1>",
        *(
            f"<p>{escape(words)}</p>"
            for words in (*report.where, *plan_lines(report), report.fusion, report.note)
            if words
        ),
        _tiles(report),
    ]
    timed = any(layer.times for layer in report.layers)
    if not timed:
        parts.append(
            "<p class='soft'>Times, errors and numbers of tokens are not known: the model was not patched with a plan. "
            "<code>hwkern.plan(model, batches)</code> measures them.</p>"
        )
    for heading, section, needs_times in _SECTIONS:
        if timed or not needs_times:
            parts += [f"<h2>{heading}</h2>", section(report)]
    return _svg.page(title, parts, _STYLE)


# ---- at a glance ----------------------------------------------------------------------------------------------------


def _tiles(report: Report) -> str:
    int8 = [layer for layer in report.layers if _is_int8(layer)]
    tiles = [(f"{len(int8)} of {len(report.layers)}", f"{report.what} are int8")]
    before, after = _model_bytes(report)
    if before != after:
        tiles.append((f"{after / before:.2f}×", f"memory: {readable_bytes(before)} → {readable_bytes(after)}"))
    if report.validation:
        tiles.append((f"{report.validation['speedup']:.2f}×", "as fast, validated on the whole model"))
    elif whole := report.plan.get("whole"):
        old, new = sum(whole["before_ms"]), sum(whole["after_ms"])
        tiles.append((f"{old / new:.2f}×", f"as fast, whole model: {old:.3g} → {new:.3g} ms"))
    for mode in modes(report.layers):
        was, now = total_us(report.layers, mode)
        tiles.append((f"{was / now:.2f}×", f"as fast, the {report.what} alone ({mode})"))
    worst = [layer.snr_db for layer in report.layers if layer.snr_db is not None]
    if worst:
        tiles.append((f"{min(worst):.1f} dB", "the least accurate int8 layer"))
    return (
        '<div class="tiles">'
        + "".join(f"<div class='tile'><b>{a}</b><span>{b}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _is_int8(layer: LayerReport) -> bool:
    return layer.status in ("int8", "already")


def _model_bytes(report: Report) -> tuple[int, int]:
    """Of the whole model: as a float model, and now."""
    gained = sum(layer.float_bytes - layer.bytes_after for layer in report.layers if layer.float_bytes)
    if gained:
        return report.model_bytes_after + gained, report.model_bytes_after
    return report.model_bytes_before, report.model_bytes_after


# ---- plots ----------------------------------------------------------------------------------------------------------


def _figure(height: float, title: str, description: str, body: Sequence[str]) -> str:
    return f"<figure>{_svg.drawing(height, title, description, body)}</figure>"


def _latency(report: Report) -> str:
    timed = [layer for layer in report.layers if layer.times]
    parts = []
    for mode in modes(timed):
        rows = [(name, len(group), *total_us(group, mode)) for name, group in group_layers(timed)]
        rows.sort(key=lambda row: -row[2])
        parts.append(
            f"<p class='soft'>{_MODES[mode]}. {_KEY} Sums over a row's layers and all calls of the plan's batches.</p>"
        )
        parts.append(_bars(rows[:MOST], mode))
        if more := rows[MOST:]:
            share = sum(row[2] for row in more) / sum(row[2] for row in rows)
            parts.append(f"<p class='soft'>{len(more)} more rows with {_percent(share)} of the float layers' time.</p>")
    return "".join(parts)


_MODES = {
    "eager": "<b>Eager</b>: calls from Python, one after the other; whichever of host and device is slower",
    "graph": "<b>CUDA graph</b>: replays with cold caches, the GPU's own time",
}


_KEY = "<i class='was'></i> float layer, <i class='now'></i> as it was chosen."


def _bars(rows: Sequence[tuple[str, int, float, float]], mode: str) -> str:
    """One row each: the name, the times, and two bars."""
    longest = max(max(row[2], row[3]) for row in rows)
    body, y = [], 0.0
    for name, count, before, after in rows:
        number = f"{count} × " if count > 1 else ""
        faster = f"{before / after:.2f}×" if before != after else "float"
        body.append(text(0, y + 13, f"{number}{_shortened(name, 66)}"))
        body.append(text(WIDTH - 52, y + 13, f"{_us(before)} → {_us(after)}", "num soft"))
        body.append(text(WIDTH, y + 13, faster, "num nowtext" if after < before else "num soft"))
        was, now = before / longest * WIDTH, after / longest * WIDTH
        body.append(bar(0, y + 19, was, 7, "was", f"float: {_us(before)}"))
        body.append(bar(0, y + 27, now, 7, "now", f"now: {_us(after)}"))
        y += 46
    return _figure(y, f"Time of the layers, {mode}", _spoken(rows), body)


def _spoken(rows: Sequence[tuple[str, int, float, float]]) -> str:
    return "; ".join(f"{name}: {_us(before)} as float, {_us(after)} now" for name, _, before, after in rows[:12])


def _accuracy(report: Report) -> str:
    measured = [(i, layer) for i, layer in enumerate(report.layers) if layer.snr_db is not None]
    if not measured:
        return "<p class='soft'>No layer is int8.</p>"
    bound = float(report.plan.get("min_snr_db", 20.0))
    values = [layer.snr_db for _, layer in measured if layer.snr_db is not None]
    low = 10 * math.floor((min(bound, *values) - 2) / 10)
    high = 10 * math.ceil((max(bound, *values) + 2) / 10)
    left, top, height = 44.0, 16.0, 220.0

    def x(i: int) -> float:
        return left + (i + 0.5) / len(report.layers) * (WIDTH - left)

    def y(db: float) -> float:
        return top + (high - db) / (high - low) * height

    body = []
    for db in range(low, high + 1, 10):
        body += [line(left, y(db), WIDTH, y(db)), text(left - 6, y(db) + 4, f"{db} dB", "num soft")]
    body += [line(left, y(bound), WIDTH, y(bound), "bound")]
    body += [text(WIDTH, y(bound) + (14 if bound > low else -5), f"bound {bound:g} dB", "num mark")]
    for i, layer in measured:
        assert layer.snr_db is not None
        tip = escape(f"{layer.name}: {layer.snr_db:.1f} dB, {layer.scheme or 'planned'}")
        place = f'cx="{x(i):.1f}" cy="{y(layer.snr_db):.1f}" r="3.5"'
        body.append(f'<circle {place} class="now"><title>{tip}</title></circle>')
    worst_i, worst = min(measured, key=lambda pair: pair[1].snr_db or 0.0)
    assert worst.snr_db is not None
    end = "num" if x(worst_i) > WIDTH / 2 else ""
    shift = -8 if end else 8
    body.append(
        text(x(worst_i) + shift, y(worst.snr_db) + 14, f"{_shortened(worst.name, 60)}: {worst.snr_db:.1f} dB", end)
    )
    floats = len(report.layers) - len(measured)
    body.append(text(left, top + height + 20, "first layer", "soft"))
    body.append(text(WIDTH, top + height + 20, "last layer", "num soft"))
    spoken = (
        f"{len(measured)} int8 layers between {min(values):.1f} and {max(values):.1f} dB; the bound is {bound:g} dB"
    )
    note = (
        "<p class='soft'>Signal-to-noise ratio of each int8 layer's output on the plan's data, in the model's order; "
        "20 dB is a relative error of 10 %, 40 dB of 1 %."
        + (f" {_many(floats, 'layer')} in float {'has' if floats == 1 else 'have'} no dot." if floats else "")
        + "</p>"
    )
    return note + _figure(top + height + 28, "Accuracy of the int8 layers", spoken, body)


def _memory(report: Report) -> str:
    before, after = _model_bytes(report)
    if not before:
        return "<p class='soft'>The model holds no tensors.</p>"
    linear_after = sum(layer.bytes_after for layer in report.layers)
    rest = report.model_bytes_after - linear_after
    body = []
    for y, name, size, kind in ((0, "as a float model", before, "was"), (52, "now", after, "now")):
        scale = (WIDTH - 4) / max(before, after)
        linear = (size - rest) * scale
        body.append(text(0, y + 13, f"{name}: {readable_bytes(size)}"))
        body.append(bar(0, y + 19, linear, 22, kind, f"{report.what}: {readable_bytes(size - rest)}"))
        body.append(bar(linear, y + 19, rest * scale, 22, "rest", f"everything else: {readable_bytes(rest)}"))
    body.append(
        text(0, 110, f"coloured: {report.what}, {readable_bytes(before - rest)} → {readable_bytes(linear_after)}; "
              f"pale: everything else, {readable_bytes(rest)}", "soft")
    )  # fmt: skip
    kept = ""
    if report.originals_bytes and report.originals != "drop":
        place = KEPT[report.originals]
        kept = f"<p class='soft'>Beside it {readable_bytes(report.originals_bytes)} {place}, for unpatch.</p>"
    spoken = f"{readable_bytes(before)} as a float model, {readable_bytes(after)} now"
    return kept + _figure(118, "Memory of weights and buffers", spoken, body)


def _light(report: Report) -> str:
    """A table that is its own plot: rows of layers, columns of tokens; times, and the share as number and shade."""
    timed = [layer for layer in report.layers if layer.times]
    mode = modes(timed)[-1]
    tokens = sorted({t.tokens for layer in timed for t in layer.times})
    heads = "".join(f"<th class='num'>{_many(m, 'token')}</th>" for m in tokens)
    rows = []
    for name, group in group_layers(timed):
        times = {t.tokens: t for t in group[0].times if t.mode == mode}
        cells = "".join(_cell(times.get(m)) for m in tokens)
        scheme = group[0].scheme or "float"
        rows.append(f"<tr><td class='name'>{escape(name)}</td><td>{escape(scheme)}</td>{cells}</tr>")
    if any(t.floor_us is not None for layer in timed for t in layer.times):
        note = (
            "The least time that this GPU could take, by its documented peak and bandwidth, over the time measured: "
            "the stronger the colour, the nearer; 100 % cannot be reached."
        )
    elif report.plan.get("kind") == "cpu":
        note = "Not known: the plan was made on a CPU, whose peak rates are not documented."
    else:
        note = f"Not known: the plan was made on {escape(report.plan['device'])}, which is not here."
    how = f"<p class='soft'>{note} One call of one layer ({_NAMES[mode]}), float → as chosen.</p>"
    head = f"<tr><th>layer</th><th>scheme</th>{heads}</tr>"
    return f"{how}<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


_NAMES = {"eager": "eager", "graph": "CUDA graph"}


def _cell(time: Timing | None) -> str:
    if time is None:
        return "<td></td>"
    times = f"{_us(time.before_us)} → {_us(time.after_us)}"
    if time.floor_us is None:
        return f"<td class='num'>{times}</td>"
    share = time.floor_us / time.after_us
    shade = f"style='--share:{min(1.0, share):.2f}'"
    return f"<td class='shade' {shade}>{_percent(share)}<small>{times}</small></td>"


def _tokens(report: Report) -> str:
    timed = [layer for layer in report.layers if layer.times]
    mode = modes(timed)[0]
    calls: dict[int, int] = {}
    spent: dict[int, float] = {}
    for layer in timed:
        for t in layer.times:
            if t.mode == mode:
                calls[t.tokens] = calls.get(t.tokens, 0) + t.calls
                spent[t.tokens] = spent.get(t.tokens, 0.0) + t.calls * t.before_us
    sizes = sorted(calls)
    most, whole = max(calls.values()), sum(spent.values())
    step = WIDTH / len(sizes)
    width = min(90.0, step * 0.7)
    body = [line(0, 160, WIDTH, 160)]
    for i, m in enumerate(sizes):
        x = (i + 0.5) * step
        tall = calls[m] / most * 120
        share = f"{_percent(spent[m] / whole)} of the time"
        body.append(
            bar(
                x - width / 2,
                160 - tall,
                width,
                tall,
                "now",
                f"{_many(m, 'token')}: {_many(calls[m], 'call')}, {share}",
            )
        )
        body.append(text(x, 152 - tall, _many(calls[m], "call"), "mid"))
        body.append(text(x, 177, _many(m, "token"), "mid"))
        body.append(text(x, 194, share, "mid soft"))
    spoken = "; ".join(f"{_many(m, 'token')}: {_many(calls[m], 'call')}" for m in sizes)
    note = (
        "<p class='soft'>Calls of linear layers in the plan's batches, by tokens in a call (M); below, their share of "
        "the float layers' time.</p>"
    )
    return note + _figure(200, "Calls by number of tokens", spoken, body)


# ---- what ran where, and why ----------------------------------------------------------------------------------------


def _where(report: Report) -> str:
    if not report.layers:
        return "<p class='soft'>The model has no linear layers.</p>"
    rows = []
    for name, group in group_layers(report.layers):
        layer = group[0]
        count = str(len(group)) if len(group) > 1 else ""
        scheme = layer.scheme or "float"
        worst = min(group, key=lambda each: math.inf if each.snr_db is None else each.snr_db)
        why = layer.reason or worst.verdict
        if len({each.verdict for each in group}) > 1 and not layer.reason:
            why = f"{why}, the least accurate of them"
        cells = (
            f"<td class='name'>{escape(name)}</td><td class='num'>{count}</td>"
            f"<td class='num'>{layer.in_features} × {layer.out_features}</td><td>{escape(scheme)}</td>"
            f"<td>{escape(layer.runs or layer.device)}</td><td>{escape(why)}</td>"
        )
        rows.append(f"<tr>{cells}</tr>")
    head = (
        "<tr><th>layer</th><th class='num'>n</th><th class='num'>in × out</th><th>scheme</th><th>runs as</th>"
        "<th>why</th></tr>"
    )
    return f"<div class='scroll'><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"


# Heading, what is below it, and whether that needs a plan's times.
_SECTIONS: list[tuple[str, Callable[[Report], str], bool]] = [
    ("Time of each layer, before and after", _latency, True),
    ("Accuracy of each layer", _accuracy, True),
    ("Memory", _memory, False),
    ("Share of the speed of light", _light, True),
    ("Tokens in a call", _tokens, True),
    ("What runs where, and why", _where, False),
]


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return "under 1 %" if 0 < share < 0.01 else f"{share * 100:.0f} %"


def _us(us: float) -> str:
    return f"{us:.3g} µs" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"


def _shortened(name: str, most: int) -> str:
    """With an ellipsis in the middle."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"
