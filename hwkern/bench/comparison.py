"""The comparison itself: which model, workload and path come when, what a row keeps, and what the budget leaves out.

For each model all paths are made ready, then timed in turn, block by block: heat, clocks and neighbours are the same
for all, and ratios are taken block against block. The document is written after every workload. What does not fit into
the budget has a row that says so.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import math
import statistics as stats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import _batches, _timing
from hwkern.bench import accuracy, energy, engines, models, paths, record, settings, subjects, traffic
from hwkern.bench import statistics as noise
from hwkern.bench.limits import Budget, at_most
from hwkern.bench.models import AbsentError, Model
from hwkern.bench.paths import Path

#: Most of a model's or a workload's time that is kept for timing; what comes before gets the rest.
TIMING_PART = 0.4
#: Of the time before timing, the part for making a model's versions; the rest warms up, compiles and captures.
MAKE_PART = 0.6
#: How much more than its part by count a model may take of the run's time, and a workload of its model's.
FIRST = 1.5
#: Seconds over the budget after which a call that does not come back is given up.
GRACE = 1.0
#: Seconds of the calls between two looks at the energy counter.
GLANCE = 0.02
#: Requests of the real run that checks the simulated queue.
CHECK_REQUESTS = 200
#: Longest request of generated traffic.
MOST_TOKENS = 512

Row = dict[str, Any]


@dataclass
class Entry:
    """A path of the current model: ready, or the reason why not."""

    path: Path
    subject: subjects.Subject | None = None
    status: str = "ok"
    reason: str = ""
    accuracy: dict[str, Any] | None = None
    note: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timed:
    """A path of the current workload with its blocks."""

    entry: Entry
    memory: dict[str, int | None]
    checked: float | None
    blocks: list[subjects.Block] = field(default_factory=list)
    energy: energy.Stretch | None = None


class Comparison:
    """One run of ``hwkern bench``; ``document`` is what has been found so far."""

    def __init__(self, options: settings.Settings, keep: Callable[[dict[str, Any]], None]) -> None:
        self.options, self.keep = options, keep
        self.started = time.monotonic()
        self.budget = Budget(options.budget, options.started)
        names = options.paths or paths.DEFAULT_PATHS
        self.paths = [paths.path(name) for name in names]
        self.rows: list[Row] = []
        self.baseline = "fp16" if options.cuda else "fp32"
        self.engines: engines.Engines | None = None
        uuid = str(torch.cuda.get_device_properties(0).uuid) if options.cuda else None
        self.meter = energy.Meter(uuid)
        self.document: dict[str, Any] = {
            "schema": record.SCHEMA,
            "benchmark": "comparison",
            "environment": record.environment(options.device, options.keep["command"], options.keep.get("commit")),
            "settings": {
                "seconds": options.seconds, "blocks": options.blocks, "budget": options.budget, "seed": options.seed,
                "bound_ms": options.bound_ms, "requests": options.requests, "max_rows": options.max_rows,
                "baseline": self.baseline, "lengths": options.lengths.name if options.lengths else "log-normal",
                "paths": [p.name for p in self.paths],
                "tensorrt_level": options.tensorrt_level, "energy": self.meter.problem or "NVML",
            },
            "rows": self.rows,
        }  # fmt: skip

    # ---- the frame -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Everything, as far as the budget goes."""
        names = self.options.models or models.DEFAULT_MODELS
        try:
            self._start()
            rows = [self._wanted_rows(name) for name in names]
            for index, name in enumerate(names):
                # More for the first, which matter most; what one does not use is the next one's.
                self._model(name, self.budget.share(min(1.0, FIRST * rows[index] / sum(rows[index:]))))
                self._save()
        finally:
            if self.engines is not None:
                self.engines.close()
        self.document["settings"]["took"] = round(time.monotonic() - self.started, 1)
        self.document["environment"]["clocks_after"] = self.meter.clocks()
        self._save()
        return self.document

    def _wanted_rows(self, model: str) -> int:
        """How many rows a model is to have; without workloads, which come with its kind, how many paths it has."""
        options = self.options
        names = [w.name for w in options.workloads if model in options.kept_to.get(w.name, (model,))]
        return sum(path.wanted(model, name) for name in names for path in self.paths) or len(self.paths)

    def _engines(self) -> engines.Engines:
        if self.engines is None:
            options = self.options
            self.engines = engines.Engines(options.tensorrt_python, options.engines, options.tensorrt_level)
        return self.engines

    def _start(self) -> None:
        """What would otherwise fall on the first model's time: imports and the device's own start."""
        wants = any(path.is_engine and path.problem(self.options.device) is None for path in self.paths)
        if wants and not any(self._engines().keep.glob("*.engine")):
            self._engines().warm()  # beside the imports and the making of the models
        wanted = {
            paths.BASES[p.base].package
            for p in self.paths
            if p.problem(self.options.device) is None and not p.is_engine
        } - {""}
        with contextlib.suppress(TimeoutError), at_most(self.budget.left):
            for package in ("transformers", *sorted(wanted)):
                # Whoever needs it says why it cannot be had.
                with contextlib.suppress(Exception):
                    importlib.import_module(package)
            if self.options.cuda:
                a = torch.ones(256, 256, device=self.options.device)
                torch.mm(a, a).cpu()
                # cuBLAS keeps 32 MiB for every stream that a product ran on: not of the first path that has a graph.
                subjects.captured(lambda: torch.mm(a, a))
        # Collecting garbage now and then takes a fifth of a second with all that is imported.
        gc.collect()
        gc.freeze()

    def _save(self) -> None:
        self.keep(self.document)

    def _before_timing(self, budget: Budget, rows: int) -> Budget:
        """The part of a budget that is not needed to time so many rows."""
        if math.isinf(budget.left):
            return budget
        energy_too = 0.0 if self.meter.problem else 2 * energy.LEAST_SECONDS
        timing = min(TIMING_PART * budget.left, rows * (self.options.seconds + energy_too))
        return budget.share(1 - timing / max(budget.left, 1e-9))

    def _say(self, text: str) -> None:
        if self.options.show:
            print(f"{time.monotonic() - self.started:6.1f} s  {text}", file=sys.stderr, flush=True)

    def _row(self, model: str, workload: str, path: str, status: str, **rest: Any) -> None:
        self.rows.append({"model": model, "workload": workload, "path": path, "status": status, **rest})
        if status != "ok":
            self._say(f"  {workload} {path}: {status}: {rest.get('reason')}")

    # ---- one model -------------------------------------------------------------------------------------------------

    def _model(self, name: str, budget: Budget) -> None:
        self._say(f"{name} ({budget.left:.0f} s)" if self.options.budget else name)
        try:
            model = models.find(name)
        except Exception as error:  # a folder of another kind of model must not end the run
            status, rest = _failure(error)
            return self._row(name, "all", "all", status, **rest)
        if not self.options.cuda and model.parameters > models.CPU_PARAMETERS:
            size = f"{4e-9 * model.parameters:.0f} GB of float32 weights"
            return self._row(name, "all", "all", "absent", reason=f"{size}: minutes a row on a CPU")
        wanted, left = settings.workloads_of(model.kind, self.options.workloads, self.options.cuda)
        wanted = [each for each in wanted if name in self.options.kept_to.get(each.name, (name,))]
        for left_name, why in left.items():
            self._row(name, left_name, "all", "absent", reason=why)
        if not wanted:
            return None
        self.document["settings"].setdefault("models", {})[name] = model.title
        if budget.spent:
            return self._row(name, "all", "all", "not run", reason="budget")
        try:
            with at_most(budget.left):
                torch.manual_seed(self.options.seed)
                exact = model.make(self.options.device).requires_grad_(False)
                judge = accuracy.Judge(model, exact, self.options.seed, self.options.device)
        except Exception as error:
            status, rest = _failure(error)
            return self._row(name, "all", "all", status, **rest)
        making = self._before_timing(budget, len(self.paths) * len(wanted)).share(MAKE_PART)
        entries = self._entries(model, exact, judge, wanted, making)
        for index, workload in enumerate(wanted):
            part = min(1.0, FIRST / (len(wanted) - index))
            self._workload(model, workload, wanted, exact, entries, budget.share(part))
            self._save()
        del entries, exact, judge
        if self.engines is not None:
            self.engines.forget()
        gc.collect()
        if self.options.cuda:
            torch.cuda.empty_cache()
        return None

    def _entries(
        self, model: Model, exact: nn.Module, judge: accuracy.Judge, wanted: list[settings.Workload], budget: Budget
    ) -> list[Entry]:
        """Make every version of the model that its paths need, each once."""
        batches = functools.partial(model.plan_batches, wanted, self.options.seed, self.options.device)
        context = paths.Context(self.options.device, model, batches)
        made: dict[str, Entry] = {}
        found = []
        for path in self.paths:
            if not any(path.wanted(model.name, workload.name) for workload in wanted):
                continue
            if (problem := path.problem(self.options.device)) is not None:
                found.append(Entry(path, status="absent", reason=problem))
            elif path.is_engine:
                found.append(Entry(path))  # built for each workload: an engine is made for its shapes
            else:
                if path.base not in made:
                    made[path.base] = self._base(path, model, exact, judge, context, budget)
                base = made[path.base]
                subject = base.subject
                if isinstance(subject, subjects.TorchSubject):
                    subject = subjects.TorchSubject(
                        path, model, subject.module, subject.base_bytes, self.options.device
                    )
                found.append(Entry(path, subject, base.status, base.reason, base.accuracy, base.note))
        return found

    def _base(
        self, path: Path, model: Model, exact: nn.Module, judge: accuracy.Judge, context: paths.Context, budget: Budget
    ) -> Entry:
        base = paths.BASES[path.base]
        started = time.perf_counter()
        before = subjects.allocated(self.options.device)
        try:
            with at_most(budget.left), subjects.precision(base.tf32):
                module = base.make(exact, context)
                size = subjects.allocated(self.options.device) - before
                if module is exact:
                    size = _device_bytes(exact) if self.options.cuda else 0
                subject = subjects.TorchSubject(path, model, module, size, self.options.device)
                measured = judge.accuracy(module)
        except Exception as error:
            status, rest = _failure(error)
            return Entry(path, None, status, rest["reason"])
        note: dict[str, Any] = {"prepared_s": round(time.perf_counter() - started, 2)}
        if (plan := module.__dict__.get("_bench_plan")) is not None:
            note |= plan
        self._say(f"  {path.base}: made in {note['prepared_s']} s")
        return Entry(path, subject, accuracy=measured, note=note)

    # ---- one workload ----------------------------------------------------------------------------------------------

    def _workload(
        self, model: Model, workload: settings.Workload, every: list[settings.Workload], exact: nn.Module,
        entries: list[Entry], budget: Budget,
    ) -> None:  # fmt: skip
        options = self.options
        inputs: dict[str, Any] = {}
        stream: traffic.Traffic | None = None
        if isinstance(workload, settings.Traffic):
            stream = self._stream(workload)
        try:
            if isinstance(workload, settings.Decode):
                inputs = model.inputs(workload.rows, workload.prompt, options.seed, options.device)
            elif isinstance(workload, settings.Fixed):
                inputs = model.inputs(workload.rows, workload.length, options.seed, options.device)
            with torch.inference_mode():
                wanted = _reference(model, workload, exact, inputs)
        except Exception as error:  # more tokens than the model takes, or too many for its float32 weights' device
            status, rest = _failure(error)
            return self._row(model.name, workload.name, "all", status, **rest)
        ready: list[Timed] = []
        preparing = self._before_timing(budget, sum(entry.status == "ok" for entry in entries))
        try:
            for entry in entries:
                make = functools.partial(self._engine, model, workload, entry, exact, every, stream, inputs)
                timed = self._ready(model, workload, entry, make, inputs, stream, wanted, preparing)
                if timed is not None:
                    ready.append(timed)
            self._time(model, workload, ready, stream, budget)
            self.rows += self._finished(model, workload, ready, stream)
        finally:
            for timed in ready:
                assert timed.entry.subject is not None
                with contextlib.suppress(Exception):  # of a device that broke before
                    timed.entry.subject.release()
            if any(entry.path.compiled for entry in entries):
                torch._dynamo.reset()  # of all paths at once: not while one of them is still to be timed

    def _stream(self, workload: settings.Traffic) -> traffic.Traffic:
        options = self.options
        if options.lengths is not None:
            lengths = traffic.lengths_from(options.lengths, MOST_TOKENS)
        else:
            lengths = traffic.log_normal_lengths(options.requests, options.seed, MOST_TOKENS)
        arrivals = traffic.poisson_arrivals(len(lengths), options.seed + 1)
        tops = traffic.profiles(lengths, workload.profiles) if workload.profiles else ()
        return traffic.Traffic(lengths, arrivals, tops, options.max_rows)

    def _ready(
        self, model: Model, workload: settings.Workload, entry: Entry, make: Callable[[], subjects.Subject],
        inputs: dict[str, Any], stream: traffic.Traffic | None, wanted: Tensor | None, budget: Budget,
    ) -> Timed | None:  # fmt: skip
        """The entry, warm and checked; or a row that says why not."""
        where = (model.name, workload.name, entry.path.name)
        if not entry.path.wanted(model.name, workload.name):
            return None
        if entry.status != "ok":
            self._row(*where, entry.status, reason=entry.reason)
            return None
        started = time.perf_counter()
        try:
            with at_most(budget.left):
                if entry.path.is_engine:
                    entry.subject = make()
                assert entry.subject is not None
                entry.subject.prepare(workload, inputs, _shaped(stream, entry.path))
                output = entry.subject.output()
                checked = None
                if wanted is not None and output is not None:
                    if (problem := accuracy.wrong(wanted, output)) is not None:
                        raise RuntimeError(problem)
                    compared = accuracy.compare(wanted, output, model.kind != "encoder")
                    checked = compared["cosine"]
                    if entry.accuracy is None:
                        entry.accuracy = compared
                timed = Timed(entry, entry.subject.memory(), checked)
                self._say(f"  {workload.name} {entry.path.name}: ready after {time.perf_counter() - started:.1f} s")
                return timed
        except Exception as error:
            status, rest = _failure(error)
            self._row(*where, status, **rest)
            if entry.subject is not None:
                with contextlib.suppress(Exception):
                    entry.subject.release()
            return None

    def _engine(
        self, model: Model, workload: settings.Workload, entry: Entry, exact: nn.Module,
        wanted: list[settings.Workload], stream: traffic.Traffic | None, inputs: dict[str, Any],
    ) -> subjects.Subject:  # fmt: skip
        made = self._engines()
        check = model.check_inputs(self.options.seed, self.options.device)
        stream = _shaped(stream, entry.path)
        engine = made.engine(entry.path, model, exact, workload, wanted, stream, check, inputs, self.options.seed)
        entry.note = {"prepared_s": engine["build_s"]}
        if engine.get("engine_us"):
            entry.note["engine_us"] = engine["engine_us"]  # of each way to build it: see engine_child.py
        self.document["environment"]["tensorrt"] = made.version
        return engines.EngineSubject(made, engine)

    def _time(
        self, model: Model, workload: settings.Workload, ready: list[Timed], stream: traffic.Traffic | None,
        budget: Budget,
    ) -> None:  # fmt: skip
        """Blocks in turn, in changing order, while there is time, and then the energy of each. What breaks here leaves
        ``ready``."""
        options = self.options
        blocks = options.blocks if stream is None else settings.TRAFFIC_BLOCKS
        for turn in range(blocks):
            if turn and stream is None:  # a run that is ended from outside leaves what it had
                self.document["rows"] = self.rows + self._finished(model, workload, ready, stream)
                self._save()
                self.document["rows"] = self.rows
            orders = _timing.orders(len(ready)) or [[]]  # nothing is ready
            for position, timed in enumerate([ready[i] for i in orders[turn % len(orders)]]):
                if budget.spent:
                    return
                blocks_left = (blocks - turn) * len(ready) - position
                seconds = min(options.seconds / blocks, budget.left / blocks_left)
                assert timed.entry.subject is not None
                try:
                    with at_most(budget.left + GRACE):
                        if isinstance(workload, settings.Fixed):
                            timed.entry.subject.block(0.0)  # the caches are still those of the path before
                        timed.blocks.append(timed.entry.subject.block(seconds))
                except TimeoutError:
                    continue
                except Exception as error:
                    status, rest = _failure(error)
                    self._row(model.name, workload.name, timed.entry.path.name, status, **rest)
                    ready.remove(timed)
        if isinstance(workload, settings.Traffic):  # the device idles between batches
            return
        for timed in ready:
            if budget.spent:
                return
            with contextlib.suppress(Exception), at_most(budget.left):
                timed.energy = energy.stretch(self.meter, functools.partial(_tokens_of_a_glance, workload, timed))

    def _finished(
        self, model: Model, workload: settings.Workload, ready: list[Timed], stream: traffic.Traffic | None
    ) -> list[Row]:
        """The rows of what has been timed."""
        found: dict[str, tuple[list[float], Row]] = {}
        rows: list[Row] = []

        def keep(path: str, status: str, **rest: Any) -> None:
            rows.append({"model": model.name, "workload": workload.name, "path": path, "status": status, **rest})

        for timed in ready:
            path, subject = timed.entry.path, timed.entry.subject
            assert subject is not None
            if not timed.blocks:
                keep(path.name, "not run", reason="budget")
                continue
            try:
                if stream is not None:
                    rates, row = self._traffic_row(timed, _shaped(stream, path))
                else:
                    rates, row = _fixed_row(workload, timed.blocks)
            except Exception as error:
                keep(path.name, "failed", **_failure(error)[1])
                continue
            row |= {
                "blocks": [round(rate, 3) for rate in rates],
                "spread": _rounded(noise.spread(rates)),
                "noise": _rounded(noise.noise(rates)),
                "weight_bytes": subject.weight_bytes,
                "memory": timed.memory,
                "accuracy": timed.entry.accuracy,
                "checked_cosine": timed.checked,
                "watts": None if timed.energy is None else round(timed.energy.watts, 1),
                **timed.entry.note,
            }
            if timed.energy is not None:
                row["joules_per_token"] = round(timed.energy.joules / timed.energy.units, 7)
            found[path.name] = rates, row
        if self.baseline in found:
            base = found[self.baseline][0]
            for rates, row in found.values():
                value, uncertain = noise.ratio(rates, base)
                row["ratio"] = {"to": self.baseline, "value": round(value, 4), "noise": _rounded(uncertain)}
        for name, (_, row) in found.items():
            keep(name, "ok", **row)
        return rows

    def _traffic_row(self, timed: Timed, stream: traffic.Traffic | None) -> tuple[list[float], Row]:
        """Throughput under the bound for each block's table, and all else for the medians of the tables."""
        assert stream is not None
        bound = self.options.bound_ms / 1e3
        rates = []
        for block in timed.blocks:
            found = stream.capacity(traffic.Table(block.table), bound)
            if found is None:
                raise AbsentError(f"a single request takes longer than the bound of {self.options.bound_ms:g} ms")
            rates.append(found[0] * sum(stream.lengths) / len(stream.lengths))
        table = {shape: stats.median(block.table[shape] for block in timed.blocks) for shape in timed.blocks[0].table}
        inputs = {shape: stats.median(b.inputs[shape] for b in timed.blocks) for shape in table}
        service = traffic.Table(table)
        found = stream.capacity(service, bound)
        if found is None:
            raise AbsentError(f"a single request takes longer than the bound of {self.options.bound_ms:g} ms")
        rate, trial = found
        row = traffic.describe(stream, rate, trial)
        latency = {name: row.pop(f"{name}_ms") for name in ("p50", "p95", "p99")}
        row |= {
            "latency_ms": latency | {"n": len(trial.latencies)},
            "bound_ms": self.options.bound_ms,
            "input_share": round(sum(inputs.values()) / sum(table.values()), 4),
            "saturated_tokens_per_s": round(sum(stream.lengths) / stream.simulate(float("inf"), service).seconds, 1),
        }
        row["checked"] = self._real_run(timed, stream, rate)
        return rates, row

    def _real_run(self, timed: Timed, stream: traffic.Traffic, rate: float) -> Row:
        """The first requests served for real at the found rate, on the same clock: simulation against reality."""
        count = min(CHECK_REQUESTS, len(stream.lengths))
        part = traffic.Traffic(
            stream.lengths[:count], stream.arrivals[:count], stream.tops, stream.max_rows, stream.full_rows
        )
        subject = timed.entry.subject
        assert subject is not None

        def serve(requests: Any, rows: int, length: int) -> float:
            return subject.serve([[11] * stream.lengths[i] for i in requests], rows, length)[0]

        part.trial(rate, serve)  # numbers of rows that no block had: memory and libraries' choices come with the first
        real = part.trial(rate, serve)
        expected = part.simulate(rate, traffic.Table(timed.blocks[-1].table))
        return {
            "requests": count,
            "p95_ms": round(noise.quantile(real.latencies, 0.95) * 1e3, 3),
            "simulated_p95_ms": round(noise.quantile(expected.latencies, 0.95) * 1e3, 3),
        }


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _failure(error: BaseException) -> tuple[str, dict[str, Any]]:
    """``(status, {"reason"})`` of what went wrong on the way to a row."""
    if isinstance(error, TimeoutError):
        return "not run", {"reason": f"budget: {error}"}
    text = (str(error).strip().splitlines() or ["no text"])[0][:300]
    if isinstance(error, AbsentError):
        return "absent", {"reason": text}
    return "failed", {"reason": f"{type(error).__name__}: {text}"}


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else round(value, digits)


def _tokens_of_a_glance(workload: settings.Fixed | settings.Decode, timed: Timed) -> float:
    """Calls for a moment; how many tokens they were."""
    assert timed.entry.subject is not None
    return float(workload.tokens * len(timed.entry.subject.block(GLANCE).calls))


def _device_bytes(module: nn.Module) -> int:
    from hwkern.validate import tensor_bytes

    return tensor_bytes(module)


def _shaped(stream: traffic.Traffic | None, path: Path) -> traffic.Traffic | None:
    """The stream as this path serves it: captured graphs and engines have fixed shapes."""
    if stream is None or not (path.captured or path.is_engine):
        return stream
    if not stream.tops:
        raise AbsentError("traffic:0 pads each batch to its own length, but a captured graph has fixed shapes")
    return traffic.Traffic(stream.lengths, stream.arrivals, stream.tops, stream.max_rows, True)


def _reference(model: Model, workload: settings.Workload, exact: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """float32's answer to the call that a subject's ``output`` makes."""
    if isinstance(workload, settings.Traffic):
        return None
    with subjects.precision(False):
        if isinstance(workload, settings.Decode):
            ids = inputs["input_ids"]
            longer = torch.cat([ids, ids[:, :1]], 1)
            return _batches.main_output(exact(input_ids=longer, **model.calls()))[:, -1].float().cpu()
        return _batches.main_output(exact(**inputs, **model.calls())).float().cpu()


def _fixed_row(workload: settings.Workload, blocks: list[subjects.Block]) -> tuple[list[float], Row]:
    """Tokens a second of each block, and the row's times. Of a generation the tokens are the new ones."""
    assert not isinstance(workload, settings.Traffic)
    rates = [workload.tokens * len(block.calls) / sum(block.calls) for block in blocks]
    row: Row = {"tokens_per_s": round(stats.median(rates), 2), "latency_ms": noise.summary(_all(blocks, "calls"))}
    if isinstance(workload, settings.Decode):
        row["first_token_ms"] = noise.summary(_all(blocks, "first"))
        row["per_token_ms"] = noise.summary(_all(blocks, "steps"))
    return rates, row


def _all(blocks: list[subjects.Block], name: str) -> list[float]:
    return [value for block in blocks for value in getattr(block, name)]
