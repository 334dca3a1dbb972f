"""What ``hwkern.patch`` did, and what a model's layers are: one dataclass per layer, totals; as text, JSON and HTML.

``hwkern.report(model)`` says at any time what runs where, what was measured, and why something fell back.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import rich.box
import rich.console
import rich.table
import rich.text

Status = Literal["int8", "already", "left", "restored"]

_STATUS_TEXT = {"int8": "int8", "already": "already int8", "left": "left", "restored": "float again"}
#: Where the float weights are kept for unpatch, in words.
KEPT = {"host": "in host memory", "disk": "in a temporary file", "device": "where they were"}
_SCHEMA = 2
_WIDTH = 100


@dataclass(frozen=True)
class Timing:
    """What the plan measured of one layer: one way of running, one number of tokens."""

    #: "eager" (calls from Python) or "graph" (replays of a CUDA graph).
    mode: str
    tokens: int
    #: How many calls the plan's batches made with so many tokens.
    calls: int
    #: µs of one call: the float layer's, and that of the scheme which was chosen.
    before_us: float
    after_us: float
    #: The least µs that this GPU could take for the chosen scheme; None where its peaks are not known.
    floor_us: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One linear layer of the model, or an embedding (of in_features rows, and out_features columns)."""

    #: Every qualified name under which the model holds the layer; more than one when it is shared.
    names: tuple[str, ...]
    #: The float class, e.g. "Linear".
    kind: str
    #: "int8": swapped now; "already": was int8 before; "left": stays as it is; "restored": float again (unpatch).
    status: Status
    #: Why it was left; empty otherwise.
    reason: str
    in_features: int
    out_features: int
    #: Of the weight before the call, e.g. "float32".
    dtype: str
    device: str
    #: Weight, scale and bias, without what an earlier layer of the report shares and counts.
    bytes_before: int
    bytes_after: int
    #: The layer or embedding whose weight Parameter this one shares.
    tied_to: str | None = None
    #: How an int8 layer computes: "w8a8", "w8a8-static", "w8a16", …; empty for a float one.
    scheme: str = ""
    #: What computes the layer where it is now, e.g. "CUDA kernels, int8 × int8"; from ``hwkern.report(model)``.
    runs: str = ""
    #: What its tensors take (or took) as a float layer; 0 where an earlier layer counts them, or nobody asked.
    float_bytes: int = 0
    #: The plan's reason for the scheme, or for keeping the float layer; empty without a plan.
    verdict: str = ""
    #: Signal-to-noise ratio of the layer's output on the plan's data; None: not measured, or the same numbers.
    snr_db: float | None = None
    times: tuple[Timing, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Report:
    """The outcome of ``hwkern.patch`` or ``hwkern.unpatch``. ``print(report)`` shows a table of at most 100 columns."""

    layers: tuple[LayerReport, ...] = ()
    #: All parameters and buffers of the model, each counted once.
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    #: Where the float weights are kept for unpatch: "host" (memory), "disk" (a temporary file), "device" (where they
    #: were), "drop" or "" (none).
    originals: str = ""
    originals_bytes: int = 0
    #: What else there is to say, e.g. that every layer was patched before.
    note: str = ""
    #: Class of the model; from ``hwkern.report(model)``, like the two below.
    model: str = ""
    #: Sentences: what runs on which device, and what is missing for more.
    where: tuple[str, ...] = ()
    #: Of the plan that the model was patched with: "policy", "min_snr_db", "device", "kind" (of it), "threads",
    #: "seconds", "whole" (the model's own times) and "task"; empty without one.
    plan: dict[str, Any] = field(default_factory=dict)
    #: What ``hwkern.validate`` measured, as plain data, where it was given.
    validation: dict[str, Any] = field(default_factory=dict)
    #: Which neighbours were fused into one operator, and which were not because a check failed.
    fusion: str = ""
    #: Version of the JSON layout.
    schema: int = field(default=_SCHEMA, repr=False)

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that this call made int8."""
        return self._with("int8")

    @property
    def already(self) -> tuple[LayerReport, ...]:
        """The layers that were int8 before the call."""
        return self._with("already")

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The linear layers that stay as they are, each with a reason."""
        return self._with("left")

    @property
    def restored(self) -> tuple[LayerReport, ...]:
        """The layers that ``unpatch`` made float again."""
        return self._with("restored")

    @property
    def bytes_before(self) -> int:
        """Bytes of all linear layers before the call, tied weights counted once."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all linear layers after the call, tied weights counted once."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def what(self) -> str:
        """What its layers are: "linear layers", or just "layers" where embeddings are among them."""
        return "layers" if any("Embedding" in layer.kind for layer in self.layers) else "linear layers"

    def _with(self, status: Status) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == status)

    # ---- JSON ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, totals included."""
        totals = {
            "swapped": len(self.swapped),
            "already": len(self.already),
            "left": len(self.left),
            "restored": len(self.restored),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return {**asdict(self), "totals": totals}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON; :meth:`from_json` reads it back."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is no JSON, or no report of this version of hwkern.
        """
        data = json.loads(text)
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != _SCHEMA:
            raise ValueError(f"This is not a hwkern report of layout {_SCHEMA} (its layout is {schema!r}).")
        data.pop("totals", None)
        try:
            layers = tuple(_layer(layer) for layer in data.pop("layers"))
            return cls(layers=layers, **{**data, "where": tuple(data["where"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"This is not a complete hwkern report: {error}.") from error

    # ---- HTML ------------------------------------------------------------------------------------------------------

    def to_html(self) -> str:
        """One self-contained page (no scripts, nothing fetched): what runs where and why, with plots of what is known.

        The same report gives the same page.
        """
        from hwkern._page import page

        return page(self)

    # ---- text ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The totals in a few sentences."""
        lines = []
        if self.already and not self.swapped:
            lines.append(f"{_count(len(self.already), 'layer')} int8 already, {len(self.left)} left as they are.")
        elif self.swapped or self.left:
            lines.append(f"{_count(len(self.swapped), 'layer')} swapped to int8, {len(self.left)} left as they are.")
        if self.restored:
            lines.append(f"{_count(len(self.restored), 'layer')} float again.")
        if self.layers and (self.swapped or self.restored):
            lines.append(
                f"{self.what.capitalize()}: {readable_bytes(self.bytes_before)} -> {readable_bytes(self.bytes_after)}. "
                f"Whole model: {readable_bytes(self.model_bytes_before)} -> {readable_bytes(self.model_bytes_after)}."
            )
        if self.originals_bytes:
            lines.append(
                "The float weights were dropped: unpatch is not possible."
                if self.originals == "drop"
                else f"Kept for unpatch: {readable_bytes(self.originals_bytes)} " + KEPT[self.originals] + "."
            )
        lines += [text for text in (self.fusion, self.note) if text]
        lines += self.where
        lines += plan_lines(self)
        return "\n".join(lines) or "The model has no linear layers: nothing to do."

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterable[rich.console.RenderableType]:
        changed = [layer for layer in self.layers if layer.status != "left"]
        if changed:
            yield _table(changed, "", 38, ("was", "now", "bytes"), _changed_cells)
        if self.left:
            yield _table(self.left, "Left as they are:", 30, ("dtype", "bytes", "why"), _left_cells)
        if timed := [layer for layer in self.layers if layer.times]:
            yield _table(timed, "As the plan measured them:", 30, ("µs, all calls", "speed", "dB"), _timed_cells)
        yield rich.text.Text(self.summary())

    def __str__(self) -> str:
        console = rich.console.Console(
            file=io.StringIO(), width=_WIDTH, color_system=None, force_terminal=False, highlight=False
        )
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _changed_cells(group: Sequence[LayerReport]) -> tuple[str, ...]:
    before, after = sum(layer.bytes_before for layer in group), sum(layer.bytes_after for layer in group)
    sizes = readable_bytes(before) if before == after else f"{readable_bytes(before)} -> {readable_bytes(after)}"
    scheme = group[0].scheme
    now = _STATUS_TEXT[group[0].status]
    if scheme not in ("", "w8a8", "int8"):
        now = f"{now.removesuffix(' int8')} {scheme}"
    return group[0].dtype, now, sizes


def _left_cells(group: Sequence[LayerReport]) -> tuple[str, ...]:
    return group[0].dtype, readable_bytes(sum(layer.bytes_after for layer in group)), group[0].reason


def _timed_cells(group: Sequence[LayerReport]) -> tuple[str, ...]:
    parts = [(mode, *total_us(group, mode)) for mode in modes(group)]
    times = "\n".join(f"{mode} {before:.0f} -> {after:.0f}" for mode, before, after in parts)
    speed = "\n".join(f"{before / after:.2f}×" for _, before, after in parts)
    worst = min((layer.snr_db for layer in group if layer.snr_db is not None), default=None)
    return times, speed, "" if worst is None else f"{worst:.1f}"


def modes(layers: Sequence[LayerReport]) -> list[str]:
    """The ways of running that the plan measured, in its order."""
    return list(dict.fromkeys(time.mode for layer in layers for time in layer.times))


def total_us(layers: Sequence[LayerReport], mode: str) -> tuple[float, float]:
    """µs of all calls that the plan's batches made of these layers: as float layers, and as they were chosen."""
    found = [time for layer in layers for time in layer.times if time.mode == mode]
    return sum(t.before_us * t.calls for t in found), sum(t.after_us * t.calls for t in found)


def plan_lines(report: Report) -> list[str]:
    """What the plan and the validation say of the whole model, in sentences."""
    lines = []
    plan, check = report.plan, report.validation
    if plan:
        lines.append(
            f"Planned on {plan['device']}: policy {plan['policy']}, at least {plan['min_snr_db']:g} dB for each layer."
        )
        if plan["whole"]:
            lines.append(str(plan["whole"]["text"]))
        if task := plan["task"]:
            back = f"; back to float for it: {', '.join(task['kept'])}" if task["kept"] else ""
            lines.append(f"{task['metric']}: {task['before']:.6g} -> {task['after']:.6g}{back}.")
    if check:
        from hwkern.validate import NOT_FINITE_DB

        worst = min((db for db in check["snr_db"] if db is not None), default=math.inf)
        same = "the same numbers in every batch" if math.isinf(worst) else f"at least {worst:.1f} dB in every batch"
        if worst <= NOT_FINITE_DB:
            same = "but outputs that are not finite"
        lines.append(f"Validated on {check['device']}: {check['speedup']:.2f}× as fast, {same}.")
        lines += [f"{name}: {a:.6g} -> {b:.6g}." for name, (a, b, _) in check["metrics"].items()]
    return lines


def _layer(data: dict[str, Any]) -> LayerReport:
    times = tuple(Timing(**time) for time in data["times"])
    return LayerReport(**{**data, "names": tuple(data["names"]), "times": times})


def _table(
    layers: Sequence[LayerReport],
    title: str,
    name_width: int,
    columns: Sequence[str],
    cells: Callable[[Sequence[LayerReport]], tuple[str, ...]],
) -> rich.table.Table:
    """One row for each group of like layers: name, number, sizes, then ``columns`` with what ``cells`` says."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left", title_style=""
    )
    table.add_column("layer", overflow="fold")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("in × out", justify="right", no_wrap=True)
    for column in columns:
        right = column in ("bytes", "µs, all calls", "speed", "dB")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "why", overflow="fold")
    for pattern, group in group_layers(layers):
        sizes = f"{group[0].in_features} × {group[0].out_features}"
        row = (_wrap(pattern, name_width), str(len(group)), sizes, *cells(group))
        style = "green" if group[0].status in ("int8", "restored") else ""
        table.add_row(*(rich.text.Text(cell) for cell in row), style=style)
    return table


def group_layers(layers: Sequence[LayerReport]) -> list[tuple[str, list[LayerReport]]]:
    """Layers that differ only in numbers within their names, or in the last part of them, in model order.

    Returns pairs such as ``("h.{0-11}.attn.{q,k,v}", [36 layers])``; a pattern covers exactly the layers beside it.
    """
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        *parents, last = ("#" if part.isdigit() else part for part in layer.name.split("."))
        shape = (*parents, "#" if last == "#" else "*")
        same = (
            layer.kind,
            layer.status,
            layer.reason,
            layer.dtype,
            layer.device,
            layer.scheme,
            layer.runs,
            len(layer.names),
        )
        groups.setdefault((shape, *same, layer.in_features, layer.out_features), []).append(layer)
    return [row for group in groups.values() for row in _rows(group)]


def _rows(group: list[LayerReport]) -> Iterator[tuple[str, list[LayerReport]]]:
    """One row when the names' parts form a full grid, else one for each value of the first part that varies."""
    parts = [layer.name.split(".") for layer in group]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    if len(group) == math.prod(len(column) for column in columns):
        yield _label(group[0], ".".join(map(_braces, columns))), group
        return
    varying = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[varying]:
        yield from _rows([layer for layer, part in zip(group, parts, strict=True) if part[varying] == value])


def _label(layer: LayerReport, pattern: str) -> str:
    extra = len(layer.names) - 1
    return f"{pattern} (+{_count(extra, 'alias', 'es')})" if extra else pattern


def _braces(values: Sequence[str]) -> str:
    """``[q]`` -> ``q``, ``[q, k]`` -> ``{q,k}``, ``[0, 1, 2, 5]`` -> ``{0-2,5}``."""
    if len(values) == 1:
        return values[0]
    if not values[0].isdigit():
        return "{" + ",".join(values) + "}"
    runs = []
    for _, run in itertools.groupby(enumerate(sorted(map(int, values))), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return "{" + ",".join(runs) + "}"


def _wrap(name: str, width: int) -> str:
    """Break a long name after a dot or a comma."""
    lines = [""]
    for piece in re.split(r"(?<=[.,])", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def readable_bytes(number: int) -> str:
    """``12345678`` -> ``12.3 MB`` (powers of 1000)."""
    if number < 1000:
        return f"{number} B"
    value, unit = float(number), "B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007
        value /= 1000
        if value < 999.5:
            break
    return f"{value:.3g} {unit}"


class _CallableModule(types.ModuleType):
    """``hwkern.report`` is this module; called with a model, it says what the model's layers are now."""

    def __call__(self, model: Any, *, plan: Any = None, validation: Any = None) -> Report:
        """What every linear layer of ``model`` is now, what computes it, and why; changes nothing, at any time.

        Args:
            model: patched or not, on any device.
            plan: the :class:`~hwkern.plan.Plan` to take times and errors from; by default the one that the model was
                patched with.
            validation: what :func:`hwkern.validate` returned, to be part of the report.

        Raises:
            TypeError: ``model`` is no module.
            PlanError: ``plan`` is for another model.
        """
        from hwkern._survey import survey

        return survey(model, plan, validation)


sys.modules[__name__].__class__ = _CallableModule
