"""Small drawings as SVG, and the page around them: no scripts, nothing fetched, light or dark as the reader has it.

The primitives return SVG text; the charts name their lines, bars and points where they are drawn, so that no legend is
needed. Colours are classes of ``STYLE``: ``was`` (grey, what there was), ``now`` (blue, ours), ``other`` (purple,
a third family), ``mark`` (orange, bounds and warnings), ``soft`` (secondary text).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH = 760  # of every drawing, in its own units; a page scales it to its column

# Okabe and Ito's blue, orange and purple, which colour-blind readers tell apart; the dark theme has lighter ones.
STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #5b6570; --line: #d9dee4; --paper: #ffffff; --card: #f5f7f9;
  --was: #a7b1bc; --now: #0072b2; --other: #a6447f; --mark: #c04a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa5b1; --line: #333b44; --paper: #14171a;
  --card: #1d2227; --was: #6a7580; --now: #56b4e9; --other: #e08fc0; --mark: #ff9d5c; } }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg .soft { fill: var(--soft); } svg .num { text-anchor: end; } svg .mid { text-anchor: middle; }
svg .bold { font-weight: 600; } svg .paper { fill: var(--paper); }
svg .was { fill: var(--was); } svg .now { fill: var(--now); } svg .other { fill: var(--other); }
svg .mark { fill: var(--mark); } svg .rest { fill: var(--line); }
svg line { stroke: var(--line); stroke-width: 1; } svg polyline { fill: none !important; stroke-width: 2; }
svg line.bound, svg polyline.bound { stroke: var(--mark); stroke-dasharray: 5 4; }
svg line.was, svg polyline.was { stroke: var(--was); } svg line.now, svg polyline.now { stroke: var(--now); }
svg line.other, svg polyline.other { stroke: var(--other); } svg line.ink { stroke: var(--ink); }
svg line.wide { stroke-width: 3; }
"""

PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.75rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; } p { margin: .25rem 0; } .soft { color: var(--soft); }
code { font-size: .9em; overflow-wrap: anywhere; } figure { margin: .75rem 0 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-bottom: .25rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; margin-top: .75rem; }
i.key { display: inline-block; width: 1.4em; height: .7em; margin: 0 .3em 0 1em; border-radius: 1px; }
i.was { background: var(--was); margin-left: 0; }
i.now { background: var(--now); } i.other { background: var(--other); }
th, td { text-align: right; padding: .35rem 0 .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.now td { color: var(--now); font-weight: 600; } tr.other td:first-child { color: var(--other); }
td.text { text-align: left; white-space: normal; }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words with their baseline at ``y``; class ``num`` ends at ``x``, ``mid`` is centred there."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def bar(x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> str:
    """A filled rectangle, at least half a unit wide; ``tip`` shows under the pointer."""
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}"'
    return f'<rect {place} class="{kind}">{inside}</rect>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def lines(points: Sequence[tuple[float, float]], kind: str = "") -> str:
    """A line through points."""
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, tip: str = "", radius: float = 4) -> str:
    """A point."""
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{inside}</circle>'


def drawing(height: float, title: str, description: str, body: Sequence[str], alone: bool = False) -> str:
    """The SVG element; ``alone``: a file of its own, with its colours in it."""
    space = 'xmlns="http://www.w3.org/2000/svg" ' if alone else ""
    head = f'<svg {space}viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    style = f'<style>{STYLE}</style><rect width="100%" height="100%" class="paper"/>' if alone else ""
    return (
        f'{head} aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{style}{''.join(body)}</svg>"
    )


def png(drawn: str, zoom: float = 2) -> bytes:
    """A drawing that stands alone, as PNG in its light colours, ``zoom`` pixels to its unit.

    Raises:
        ImportError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError(f"PNG pictures need resvg-py: pip install resvg-py ({error})") from error
    light = dict(re.findall(r"(--\w+): (#\w+)", STYLE[: STYLE.index("@media")]))
    style = re.sub(r"@media[^{]*\{[^{}]*\{[^{}]*\} *\}", "", STYLE)
    style = re.sub(r"var\((--\w+)\)", lambda found: light[found[1]], style)  # resvg knows no variables
    style = re.sub(r"svg text \{[^}]*\}", f"svg text {{ fill: {light['--ink']}; font-size: 12px; }}", style)
    # A machine without fonts, as servers are, has those of matplotlib if that is there.
    plots = importlib.util.find_spec("matplotlib")
    fonts = [] if plots is None or plots.origin is None else [str(Path(plots.origin).parent / "mpl-data/fonts/ttf")]
    made: bytes = resvg_py.svg_to_bytes(
        svg_string=drawn.replace(STYLE, style), zoom=zoom, font_dirs=fonts, font_family="DejaVu Sans"
    )
    return bytes(made)


def page(title: str, parts: Sequence[str], style: str = PAGE_STYLE) -> str:
    """A whole HTML document of these parts; ``style`` is for what is no drawing."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


# ---- charts ---------------------------------------------------------------------------------------------------------

#: Units of a text's length per letter at 12 units of height: of the widest common system font, in bold.
LETTER = 8.0


@dataclass(frozen=True)
class Bar:
    """One bar: its name on the left, its value's words behind it; ``error``: a whisker of so much to both sides."""

    name: str
    value: float
    words: str
    kind: str
    error: float = 0.0


def bars(rows: Sequence[Bar], title: str, reference: float | None = None, alone: bool = False) -> str:
    """Horizontal bars from zero; ``reference``: a dashed line at this value."""
    left = 12 + LETTER * max(len(row.name) for row in rows)
    right = WIDTH - 12 - LETTER * max(len(row.words) for row in rows)
    scale = (right - left) / max(row.value * (1 + row.error) for row in rows)
    body = []
    for i, row in enumerate(rows):
        y = 4 + 22 * i
        kind = "num bold" if row.kind == "now" else "num"
        body.append(text(left - 8, y + 13, row.name, kind))
        body.append(bar(left, y + 2, row.value * scale, 15, row.kind, f"{row.name}: {row.words}"))
        end = left + row.value * scale
        if row.error:
            reach = row.value * row.error * scale
            body += [line(max(left, end - reach), y + 9.5, end + reach, y + 9.5, "ink")]
            end += reach
        body.append(text(end + 6, y + 13, row.words, "bold" if row.kind == "now" else "soft"))
    height = 8 + 22 * len(rows)
    if reference is not None:
        body.append(line(left + reference * scale, 2, left + reference * scale, height - 2, "bound"))
    spoken = "; ".join(f"{row.name} {row.words}" for row in rows)
    return drawing(height, title, spoken, body, alone)


@dataclass(frozen=True)
class Range:
    """One row of :func:`ranges`: ascending values, the first of which is a large dot and the others ticks."""

    name: str
    values: Sequence[float]
    words: str
    kind: str


#: A row that reaches this many times as far as the middle one would flatten all others: it is cut off at the edge.
FAR = 4


def ranges(rows: Sequence[Range], title: str, alone: bool = False) -> str:
    """From each row's first value to its last, from zero; one far beyond the others ends at the edge, marked."""
    left = 12 + LETTER * max(len(row.name) for row in rows)
    right = WIDTH - 30 - LETTER * max(len(row.words) for row in rows)
    ends = sorted(row.values[-1] for row in rows)
    most = min(ends[-1], FAR * ends[len(ends) // 2])
    scale = (right - left) / most
    body = [line(left, 0, left, 8 + 22 * len(rows))]
    for i, row in enumerate(rows):
        y = 4 + 22 * i + 9.5
        first, *others = (left + min(value, most) * scale for value in row.values)
        cut = "› " if row.values[-1] > most else ""
        body.append(text(left - 8, y + 3.5, row.name, "num bold" if row.kind == "now" else "num"))
        if others:
            body.append(line(first, y, others[-1], y, f"{row.kind} wide"))
            body += [line(x, y - 5, x, y + 5, row.kind) for x in others]
        body.append(dot(first, y, row.kind, f"{row.name}: {row.words}", 5))
        body.append(text((others or [first])[-1] + 10, y + 3.5, cut + row.words, "soft"))
    spoken = "; ".join(f"{row.name} {row.words}" for row in rows)
    return drawing(8 + 22 * len(rows), title, spoken, body, alone)


@dataclass(frozen=True)
class Point:
    """One point of :func:`plane`."""

    name: str
    x: float
    y: float
    kind: str
    shown: bool = True  #: its name beside it; else only under the pointer


@dataclass(frozen=True)
class Curve:
    """A line of :func:`plane` with its name at its end."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str


@dataclass(frozen=True)
class Axis:
    """An axis of :func:`plane`: its title, its ends, and whether it is logarithmic."""

    title: str
    low: float
    high: float
    log: bool = False
    form: Callable[[float], str] = "{:g}".format

    def place(self, value: float) -> float:
        """0 … 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values between the ends: powers of ten, or steps of 1, 2 or 5."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**i for i in range(first, last + 1)]
        rough = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
        return [step * i for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def plane(x: Axis, y: Axis, points: Sequence[Point], curves: Sequence[Curve], title: str, alone: bool = False) -> str:
    """Points and curves over two axes, each named beside it. A name that would cover another or a point moves up or
    down; a line leads to it."""
    left, right, top, bottom = 62.0, WIDTH - 10.0, 22.0, 330.0

    def at(px: float, py: float) -> tuple[float, float]:
        return left + x.place(px) * (right - left), bottom - y.place(py) * (bottom - top)

    body = [text(left, 13, y.title, "soft"), text(right, bottom + 34, x.title, "num soft")]
    for value in x.ticks():
        px, _ = at(value, y.low)
        body += [line(px, top, px, bottom), text(px, bottom + 16, x.form(value), "mid soft")]
    for value in y.ticks():
        _, py = at(x.low, value)
        body += [line(left, py, right, py), text(left - 7, py + 4, y.form(value), "num soft")]
    taken: list[tuple[float, float, float]] = []
    dots = [at(point.x, point.y) for point in points]

    def free(start: float, end: float, level: float) -> bool:
        return not any(abs(level - other) < 13 and start < e and s < end for s, e, other in taken) and not any(
            start - 4 < dx < end + 4 and level - 14 < dy < level + 6 for dx, dy in dots
        )

    def name(words: str, px: float, level: float, kind: str) -> None:
        wide = LETTER * len(words)
        start = px + 8 if px + 8 + wide < right else px - 8 - wide
        steps = (sign * 13 * step for step in range(100) for sign in (1, -1))
        moved = next(d for d in steps if level + d > top + 8 and free(start, start + wide, level + d))
        taken.append((start, start + wide, level + moved))
        if abs(moved) > 13:
            body.append(line(px, level - 4, start - 2 if start > px else start + wide + 2, level + moved - 4, "was"))
        body.append(text(start, level + moved, words, kind))

    for curve in curves:
        body.append(lines([at(*point) for point in curve.points], curve.kind))
    for point in sorted(points, key=lambda p: at(p.x, p.y)[1]):
        px, py = at(point.x, point.y)
        body.append(dot(px, py, point.kind, f"{point.name}: {x.form(point.x)}, {y.form(point.y)}"))
    for curve in curves:
        if curve.kind == "bound":
            px, py = at(*curve.points[-1])
            name(curve.name, px, py - 8, "soft")
        else:  # below its start, where what rises leaves room
            px, py = at(*curve.points[0])
            name(curve.name, px, py + 18, "soft")
    for point in sorted(points, key=lambda p: at(p.x, p.y)[1]):
        if point.shown:
            px, py = at(point.x, point.y)
            name(point.name, px, py + 4, "bold" if point.kind == "now" else "")
    spoken = "; ".join(f"{p.name} at {x.form(p.x)}, {y.form(p.y)}" for p in points)
    lowest = max([bottom + 40, *(level + 8 for _, _, level in taken)])
    return drawing(lowest, title, spoken, body, alone)
