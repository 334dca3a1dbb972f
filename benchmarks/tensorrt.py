"""hwkern's plugin against TensorRT's own FP32, FP16 and INT8 (Q/DQ): single linears and whole encoders.

Needs TensorRT (8.6 or newer) with a GPU, numpy and onnx; no torch.

    python benchmarks/tensorrt.py --json tensorrt.json               # linears, and an encoder of BERT-base's size
    python benchmarks/tensorrt.py --minilm FOLDER --plot out.svg      # FOLDER: from benchmarks/tensorrt_minilm.py

Linears: µs per enqueue inside a CUDA graph; as many copies of the engine take turns as keep the L2 cold. One profile
per M, float16 input and output for all. `kernel` is hwkern's own entry point without TensorRT, timed the same way.
Models: µs per enqueue inside a CUDA graph at each (batch, length), one copy; and the wall-clock latency of a Runner
call from numpy to numpy. All engines are timed in turn, in rounds with new memory: `rounds` has each one's median.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# This file's folder must not be searched for `tensorrt`: it would find this file.
_here = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _here]
sys.path.append(str(_here))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import tensorrt_models as models  # noqa: E402
import tensorrt_tables  # noqa: E402

sys.path.remove(str(_here))

import hwkern  # noqa: E402
import hwkern.tensorrt as ht  # noqa: E402
from hwkern import _native  # noqa: E402
from hwkern._console import print_table  # noqa: E402
from hwkern.bench import record  # noqa: E402
from hwkern.tensorrt import _api, _cuda, measure, planner  # noqa: E402
from hwkern.tensorrt.builder import keep_builder  # noqa: E402
from hwkern.tensorrt.packing import padded, quantize_weight  # noqa: E402
from hwkern.tensorrt.precision import convert  # noqa: E402

Rows = list[dict[str, Any]]

LINEARS = ((4096, 4096), (4096, 14336))  # N, K
M = "1,64,1024,8192;16,512,2048;4,256,4096"  # an engine for each group, a profile for each M
REQUESTS = ((1, 32), (1, 128), (8, 128), (32, 128), (8, 512))  # batch, length
VARIANTS = ("fp16", "qdq", "hwkern")
SECONDS = 0.08  # for each measurement on the GPU
LATENCY_SECONDS = 0.6  # for each engine and request, numpy to numpy
BLOCK = 8  # requests of one engine before the next engine's turn


# ---- engines -------------------------------------------------------------------------------------------------------


class OutOfTime(Exception):  # noqa: N818
    """The budget is used up: what is measured so far is the result."""


class Builder:
    """Builds with one timing cache and says how long it took."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.cache, self.api, self.level = arguments.cache, _api.find(), arguments.level
        self.until = time.monotonic() + arguments.budget
        self.folder, self.only = arguments.engines, arguments.build_only
        self.one_profile, self.layers = arguments.one_profile, arguments.layers

    def __call__(
        self, what: str, model: Callable[[], Any], profiles: Sequence[ht.Profile], precision: str, half_io: bool
    ) -> ht.Engine:
        """``model`` is called only when the engine is not in the folder."""
        kept = self._file(what, profiles, precision, half_io)
        if kept is not None and kept.is_file():
            return ht.Engine.load(kept)
        self.check()
        start = time.perf_counter()
        edit = self._half_io if half_io and not self.api.strongly_typed else None
        cache = None if self.api.rtx else self.cache
        engine = ht.build(
            model(), profiles, precision, timing_cache=cache, edit=edit, optimization_level=self.level,
            configure=self._configure if edit else None, path=kept,
        )  # fmt: skip
        print(f"built {what}: {time.perf_counter() - start:.1f} s, {len(engine.data) / 1e6:.1f} MB", flush=True)
        return engine

    def _file(self, what: str, profiles: Sequence[ht.Profile], precision: str, half_io: bool) -> Path | None:
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps([what, [p.to_dict() for p in profiles], precision, half_io, self.level, str(self.api)])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return Path(self.folder, re.sub("[^A-Za-z0-9]+", "-", what) + f"-{digest}.engine")

    def check(self) -> None:
        if time.monotonic() > self.until:
            raise OutOfTime

    def _half_io(self, network: Any) -> None:
        trt = self.api.module
        network.get_input(0).dtype = network.get_output(0).dtype = trt.float16
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        if any(layer.type == trt.LayerType.QUANTIZE for layer in layers):
            return
        for layer in layers:  # TensorRT 8.6 would time float32 kernels too, which never win and take most of the time
            if layer.type in (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.ELEMENTWISE):
                layer.precision = trt.float16
                layer.set_output_type(0, trt.float16)

    def _configure(self, config: Any) -> None:
        config.set_flag(self.api.module.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)


def variant_of(variant: str, model: Any, scales: dict[str, float]) -> Any:
    """The ONNX model of one variant: fp32, fp16, qdq, or how it is rewritten, as in norm+unmerged or largest1."""
    if variant in ("fp32", "fp16"):
        return model
    if variant == "qdq":
        return models.with_qdq(model, scales)
    count, options = None, {}
    for part in variant.split("+"):
        if part.startswith("largest"):
            count = int(part.removeprefix("largest"))
        else:
            options |= OPTIONS[part]
    if count is not None:
        options["plan"] = planner.Candidates(model).plan(count)[1]
    if not options.pop("half", False):
        return ht.rewrite(model, **options).model
    rewritten = ht.rewrite(model, **options).model
    convert(rewritten, onnx.TensorProto.FLOAT16)
    return rewritten


OPTIONS: dict[str, dict[str, Any]] = {
    "hwkern": {},
    "linear": {"include": "*"},
    "norm": {"fuse_norm": True},
    "between": {"fuse_norm": "between"},
    "attention": {"fuse_attention": True},
    "residual": {"fuse_residual": True},
    "unmerged": {"merge": False},
    "plain": {"fuse_activation": False},
    "half": {"half": True},  # the ONNX model itself in float16, instead of TensorRT's flag
}


def candidate(variant: str) -> str | None:
    """What make_plan calls this variant."""
    parts = set(variant.split("+"))
    if variant == "fp16":
        return planner.FLOAT
    counts = {part for part in parts if part.startswith("largest")}
    if not parts <= {"hwkern", "norm", "between", "attention", *counts}:
        return None
    count = min(counts, default="all").removeprefix("largest")
    name = count if count == "all" else "largest" if count == "1" else f"{count} largest"
    name += ", norms fused" if "norm" in parts else ", norms fused between" if "between" in parts else ""
    return name + ", attention fused" * ("attention" in parts)


# ---- linears -------------------------------------------------------------------------------------------------------


def bench_linears(
    build: Builder, linears: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]], variants: Sequence[str],
    rows: Rows, done: Callable[[], None],
) -> None:  # fmt: skip
    """One engine for each group of M, with a profile for each M: when the budget ends, whole groups are there."""
    found: dict[tuple[int, int, int], dict[str, Any]] = {}

    def row(n: int, k: int, m: int) -> dict[str, Any]:
        if (n, k, m) not in found:
            found[n, k, m] = {"what": "linear", "n": n, "k": k, "m": m, "errors": {}, "engine_bytes": {}}
            rows.append(found[n, k, m])
        return found[n, k, m]

    try:
        for ms in groups:
            for n, k in linears:
                model = _linear(n, k)
                some = np.random.default_rng(1).standard_normal((1024, k), dtype=np.float32).astype(np.float16)
                # The best that a static scale can do: calibrated on the very data that is measured.
                scale = float(np.abs(some).max()) / 127
                x = np.resize(some, (max(ms), k))
                engines: dict[str, ht.Engine] = {}
                errors: dict[str, dict[int, float]] = {}
                for variant in variants:
                    try:
                        engine = _linear_engine(build, variant, model, n, k, ms, scale)
                        if not build.only:
                            errors[variant] = _checked(engine, variant, model, x, ms)
                            engines[variant] = engine
                    except OutOfTime:
                        print(f"{variant} {n}x{k}: not built, the budget is used up", flush=True)
                    except RuntimeError as error:  # TensorRT cannot build or run it: the others count all the same
                        print(f"{variant} {n}x{k}: {error}", flush=True)
                for m, times in _time_linears(engines, model, n, k, ms, x) if engines else ():
                    row(n, k, m).update(times)
                    row(n, k, m)["errors"] = {variant: found[m] for variant, found in errors.items()}
                    row(n, k, m)["engine_bytes"] = {variant: len(engine.data) for variant, engine in engines.items()}
                    done()
    finally:
        for n, k in linears if not build.only else ():
            _show_linears(rows, n, k)


_linear = functools.cache(models.linear)


def _linear_engine(
    build: Builder, variant: str, model: Any, n: int, k: int, ms: Sequence[int], scale: float
) -> ht.Engine:
    def made() -> Any:
        return variant_of("linear" if variant == "hwkern" else variant, model, {"linear.matmul": scale})

    precision = "fp32" if variant == "fp32" else "fp16"
    profiles = [_fixed("x", (m, k)) for m in ms]
    what = f"{variant} {n}x{k}, M = {', '.join(map(str, ms))}"
    try:
        return build(what, made, profiles, precision, variant != "fp32")
    except RuntimeError as error:
        if variant != "qdq":
            raise
        print(f"qdq with float16 input and output: {error}\nqdq with float32:", flush=True)
        return build(what, made, profiles, precision, False)


def _checked(engine: ht.Engine, variant: str, model: Any, x: Any, ms: Sequence[int]) -> dict[int, float]:
    """Its errors; RuntimeError where ours are wrong."""
    errors = _linear_errors(engine, model, x, ms)
    print(f"{variant}: relative errors {', '.join(f'{e:.5f}' for e in errors.values())}", flush=True)
    if variant == "hwkern" and max(errors.values()) > 0.02:
        raise RuntimeError(f"wrong results, relative errors {errors}: not timed")
    return errors


def _time_linears(
    engines: dict[str, ht.Engine], model: Any, n: int, k: int, ms: Sequence[int], x: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(rows, times by variant), the engines and the kernel alone in turn: the same clock and temperature."""
    # Cold weights: so many copies that a round reads more than three times the L2.
    held = {
        variant: measure.Copies(engine, measure.rotations(n * k * {"fp32": 4, "fp16": 2}.get(variant, 1), _l2_bytes()))
        for variant, engine in engines.items()
    }
    with next(iter(held.values())).runners[0].context.current():
        bare = BareLinear(model) if "hwkern" in held else None
        try:
            for m in ms:
                subjects = [functools.partial(_calls, copies, {"x": x[:m]}) for copies in held.values()]
                names = list(held)
                if bare is not None:
                    subjects.append(functools.partial(bare.calls, x[:m]))
                    names.append("kernel")
                times = dict(zip(names, measure.rounds_us(subjects, SECONDS), strict=True))
                print(f"  {m}: {', '.join(f'{name} {_rounds(t)}' for name, t in times.items())} us", flush=True)
                yield m, times
        finally:
            if bare is not None:
                bare.free()
    for copies in held.values():
        copies.close()


def _calls(copies: measure.Copies, feed: dict[str, Any]) -> tuple[list[Callable[[int], None]], Callable[[], None]]:
    """The enqueues of one request, and what frees their buffers."""
    fill = {n: np.ascontiguousarray(a.astype(copies.runners[0].inputs[n].dtype)) for n, a in feed.items()}
    calls, alive = copies.enqueues({n: a.shape for n, a in fill.items()}, fill)
    return calls, functools.partial(measure.free, alive)


def _rounds(times: dict[str, Any]) -> str:
    return f"{times['p50']:.2f} ({min(times['rounds']):.2f}-{max(times['rounds']):.2f})"


def _l2_bytes() -> int:
    return int(_native.extension().device_properties(0)["l2_bytes"])


def _fixed(name: str, shape: tuple[int, ...]) -> ht.Profile:
    return ht.Profile({name: shape}, {name: shape}, {name: shape})


def _engines_us(
    engines: Sequence[ht.Engine], feeds: dict[tuple[int, int], dict[str, Any]]
) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """For each request the times of all engines in turn, one copy of each."""
    held = [measure.Copies(engine, 1) for engine in engines]
    times = {}
    try:
        with held[0].runners[0].context.current():
            for key, feed in feeds.items():
                subjects = [functools.partial(_calls, copies, feed) for copies in held]
                times[key] = measure.rounds_us(subjects, SECONDS)
                print(f"  {key}: {', '.join(map(_rounds, times[key]))} us", flush=True)
    finally:
        for copies in held:
            copies.close()
    return times


def _linear_errors(engine: ht.Engine, model: Any, x: Any, ms: Sequence[int]) -> dict[int, float]:
    """For each M the relative error (root mean squares) of the first and last 16 rows against float32 mathematics."""
    weight, bias = _weights(model)
    errors = {}
    with ht.Runner(engine, graphs=0) as run:
        for m in ms:
            kept = sorted({*range(min(m, 16)), *range(max(0, m - 16), m)})
            wanted = x[kept].astype(np.float32) @ weight.T + bias
            y = run({"x": x[:m].astype(run.inputs["x"].dtype)})["y"][kept].astype(np.float32)
            errors[m] = float(np.sqrt(np.mean((y - wanted) ** 2) / np.mean(wanted**2)))
    return errors


def _weights(model: Any) -> tuple[Any, Any]:
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return found["linear.weight"].T, found["linear.bias"]


class BareLinear:
    """hwkern's linear without TensorRT: float16 in and out, the same weights, copies in turn."""

    def __init__(self, model: Any) -> None:
        self.native = _native.extension()
        weight, bias = _weights(model)
        packed, scales = quantize_weight(weight)
        self.n, self.k = weight.shape
        self.held: list[Any] = []
        self.weights = [self.put(packed) for _ in range(measure.rotations(packed.nbytes, _l2_bytes()))]
        self.scale, self.bias = self.put(scales), self.put(bias.astype(np.float16))

    def put(self, array: Any) -> int:
        array = np.ascontiguousarray(array)
        at = self.new(array.nbytes)
        _cuda.to_device(at, array.ctypes.data, array.nbytes, 0)
        _cuda.synchronize(0)
        return at

    def new(self, size: int) -> int:
        buffer = _cuda.DeviceBuffer(size)
        self.held.append(buffer)
        return int(buffer.pointer)

    def calls(self, x: Any) -> tuple[list[Callable[[int], None]], Callable[[], None]]:
        """The calls, one for each copy of the weights, and what frees their buffers."""
        m, n, k = len(x), self.n, self.k
        made: list[Callable[[int], None]] = []
        kept = len(self.held)
        size = int(self.native.linear_workspace_bytes(m, k))
        first = self.put(x)
        for w in self.weights:
            at, y, scratch = self.new(x.nbytes), self.new(m * n * 2), self.new(size)
            _cuda.copy(at, first, x.nbytes, 0)
            # hwkern.h Linear: x, weight, scale, bias, y; dtype 1: float16; no activation or residual; constant weights
            arguments = (at, 1, k, w, padded(k), self.scale, self.bias, 1, y, n, 1, m, n, k, -1, scratch, size)
            made.append(lambda stream, a=arguments: self.native.linear(*a, stream, 0, 0, 0, 0, 1))
        _cuda.synchronize(0)
        return made, functools.partial(self.free, kept)

    def free(self, kept: int = 0) -> None:
        """All buffers but the first ``kept``."""
        for buffer in self.held[kept:]:
            buffer.free()
        del self.held[kept:]


def _show_linears(rows: Rows, n: int, k: int) -> None:
    mine = sorted((r for r in rows if r["what"] == "linear" and (r["n"], r["k"]) == (n, k)), key=lambda r: r["m"])
    names = [v for v in ("fp32", *VARIANTS, "kernel") if any(v in r for r in mine)]
    peers = [v for v in ("fp16", "qdq") if v in names]
    table = []
    for r in mine:
        ours = r["hwkern"]["p50"] if "hwkern" in r else None
        times = [f"{r[v]['p50']:.1f}" if v in r else "" for v in names]
        ratios = [f"{r[v]['p50'] / ours:.2f}x" if v in r and ours else "" for v in peers]
        over = f"{ours / r['kernel']['p50']:.3f}" if "kernel" in r and ours else ""
        errors = [f"{r['errors'][v]:.5f}" if v in r["errors"] else "" for v in (*peers, "hwkern")]
        table.append((str(r["m"]), *times, *ratios, over, *errors))
    heads = [f"vs {v}" for v in peers]
    heads += ["over kernel", *(f"error of {v}" for v in (*peers, "hwkern"))]
    print_table(f"{n} x {k}, us per enqueue", ("M", *names, *heads), table)


def geomeans(rows: Rows) -> dict[str, float]:
    """The figures of merit over both linears."""
    found = {}
    for name, keep in (("m <= 64", lambda m: m <= 64), ("m >= 512", lambda m: m >= 512)):
        chosen = [r for r in rows if r["what"] == "linear" and keep(r["m"]) and "hwkern" in r]
        for peer in ("fp16", "qdq"):
            ratios = [r[peer]["p50"] / r["hwkern"]["p50"] for r in chosen if peer in r]
            if ratios:
                found[f"{peer} / hwkern, {name}"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    over = [
        r["hwkern"]["p50"] / r["kernel"]["p50"]
        for r in rows
        if r["what"] == "linear" and "hwkern" in r and "kernel" in r
    ]
    if over:
        found["engine / kernel, geomean"] = math.exp(sum(map(math.log, over)) / len(over))
        found["engine / kernel, worst"] = max(over)
    return found


# ---- models --------------------------------------------------------------------------------------------------------


def bench_model(
    build: Builder, name: str, model: Callable[[], Any], inputs: Callable[[int, int], dict[str, Any]],
    scales: dict[str, float], rows: Rows, requests: Sequence[tuple[int, int]], variants: Sequence[str],
    done: Callable[[], None], wanted: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """``wanted``: inputs and the float32 output to compare with (``inputs.<name>``, ``y``).

    The variant "plan" is chosen by make_plan among the variants that are there and what else it builds. One that is
    there is not measured again.
    """
    feeds = {request: inputs(*request) for request in requests}
    profiles = [ht.profiles_from([feed])[0] for feed in feeds.values()]
    if build.one_profile:
        profiles = list(ht.profiles_from(list(feeds.values()), 1))
    shapes = [{n: tuple(a.shape) for n, a in feed.items()} for feed in feeds.values()]
    if wanted is not None:
        check = _as_request(wanted, max(requests))
    made: dict[str, ht.Engine] = {}

    def engine_of(variant: str) -> ht.Engine:
        if variant not in made:
            precision = "fp32" if variant == "fp32" else "fp16"
            made[variant] = build(
                f"{name} {variant}", lambda: variant_of(variant, model(), scales), profiles, precision, False
            )
        return made[variant]

    mine: list[dict[str, Any]] = []
    engines: list[ht.Engine] = []
    planned: list[tuple[dict[str, Any], dict[str, Any]]] = []  # the plan's row, and that of the engine which it chose
    for variant in variants:
        try:
            row: dict[str, Any] = {"what": "model", "model": name, "variant": variant}
            if variant == "plan":
                if build.only:
                    continue
                known = {n: e for v, e in made.items() if (n := candidate(v)) is not None}
                engine, row["plan"] = _planned(build, model(), profiles, shapes, known)
            else:
                engine = engine_of(variant)
            if build.only:
                continue
            chosen = [other for other, each in zip(mine, engines, strict=True) if each is engine]
            if chosen:
                planned.append((row, chosen[0]))
                continue
            row["engine_bytes"] = len(engine.data)
            mine.append(row)
            engines.append(engine)
        except OutOfTime:
            print(f"{name} {variant}: not built, the budget is used up", flush=True)
        except RuntimeError as error:
            print(f"{name} {variant}: {error}", flush=True)
    if not mine:
        return
    for key, times in _engines_us(engines, feeds).items():
        for row, found in zip(mine, times, strict=True):
            row.setdefault("gpu_us", {})[f"{key[0]}x{key[1]}"] = found
    with contextlib.ExitStack() as stack:
        runs = []
        for row, engine in zip(mine, engines, strict=True):
            free, _ = _memory()  # the kernels are loaded by now: what is left is the engine's own
            run = stack.enter_context(ht.Runner(engine))
            for feed in feeds.values():
                run(feed)
            row["device_bytes"] = free - _memory()[0]
            if wanted is not None:
                y = run(check)["y"][:, : wanted["y"].shape[1]]
                row["cosine"] = _cosine(y, wanted["y"][: len(y)], wanted["inputs.attention_mask"][: len(y)])
                print(f"{name} {row['variant']}: cosine to torch in float32 {row['cosine']}", flush=True)
            runs.append(run)
        for (b, s), feed in feeds.items():
            for row, found in zip(mine, _latencies([run.engine for run in runs], feed), strict=True):
                row.setdefault("latency_us", {})[f"{b}x{s}"] = found
            print(f"  {b}x{s}: {', '.join(_rounds(row['latency_us'][f'{b}x{s}']) for row in mine)} us", flush=True)
    rows += [*mine, *(chosen | row for row, chosen in planned)]
    done()
    if build.layers:
        for row, engine in zip(mine, engines, strict=True):
            _show_layers(f"{name} {row['variant']}", engine, shapes, requests)
    _show_models(rows, name, requests)


def _planned(
    build: Builder, model: Any, profiles: Sequence[ht.Profile], shapes: Sequence[Any], engines: dict[str, ht.Engine]
) -> tuple[ht.Engine, dict[str, Any]]:
    """The engine that make_plan chooses, and what it measured."""
    if planner.FLOAT not in engines or len(engines) < 2:
        build.check()  # make_plan would build what is missing
    start = time.perf_counter()

    def said(text: str) -> None:
        print(f"  {time.perf_counter() - start:.1f} s: {text}", flush=True)

    plan = ht.make_plan(
        model, profiles, timing_cache=build.cache, optimization_level=build.level, requests=shapes,
        seconds=max(0.0, build.until - time.monotonic()), progress=said, engines=engines,
    )  # fmt: skip
    print(plan, f"\nplanned in {time.perf_counter() - start:.0f} s", flush=True)
    return engines[plan.measured["chosen"]], plan.measured


def _show_layers(title: str, engine: ht.Engine, shapes: Sequence[Any], requests: Sequence[tuple[int, int]]) -> None:
    """Where the time goes at the first and the last request."""
    for request, shape in {requests[0]: shapes[0], requests[-1]: shapes[-1]}.items():
        found = measure.layers_us(engine, shape)
        total = sum(us for _, us in found)
        table = [(f"{us:.1f}", layer[:150]) for layer, us in sorted(found, key=lambda e: -e[1])[:48]]
        print_table(f"{title} {request}: {len(found)} layers, {total:.0f} us one by one", ("us", "layer"), table)


def _as_request(wanted: dict[str, Any], request: tuple[int, int]) -> dict[str, Any]:
    """The texts as one request: the first of them, padded (the mask is 0 there) to its length."""
    batch, length = request
    found = {}
    for name, value in wanted.items():
        if name.startswith("inputs."):
            rows = np.zeros((batch, length), value.dtype)
            rows[:, : value.shape[1]] = value[:batch]
            found[name.removeprefix("inputs.")] = rows
    return found


def _memory() -> tuple[int, int]:
    with _cuda.Context().current():
        return _cuda.memory_info()


def _latencies(engines: Sequence[Any], feed: dict[str, Any]) -> list[dict[str, Any]]:
    """Wall-clock µs of a Runner call from numpy to numpy, for each engine.

    Engines in turn, a few requests each, so that what the host does meanwhile meets all of them; and in rounds with new
    Runners, because page-locked memory lies nearer to the GPU or farther from it for as long as it lives.
    """
    samples: list[list[list[float]]] = [[] for _ in engines]
    for turn in range(measure.ROUNDS):
        with contextlib.ExitStack() as stack:
            runs = [(i, stack.enter_context(ht.Runner(engine))) for i, engine in enumerate(engines)]
            for i, run in runs:
                samples[i].append([])
                for _ in range(3):  # enqueued, captured, replayed
                    run(feed)
            until = time.perf_counter() + LATENCY_SECONDS * len(runs) / measure.ROUNDS
            while time.perf_counter() < until:
                for i, run in runs[:: -1 if turn % 2 else 1]:
                    for _ in range(BLOCK):
                        start = time.perf_counter()
                        run(feed)
                        samples[i][-1].append((time.perf_counter() - start) * 1e6)
    return [measure.in_rounds(each) for each in samples]


def _cosine(y: Any, wanted: Any, mask: Any) -> dict[str, float]:
    """Of every token's vector, and of every sentence's mean over its tokens: the least and the mean."""
    y, wanted = y.astype(np.float64), wanted.astype(np.float64)

    def cosines(a: Any, b: Any) -> Any:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    keep = mask.astype(bool)
    tokens = cosines(y, wanted)[keep]
    weights = mask[..., None] / mask.sum(1)[:, None, None]
    sentences = cosines((y * weights).sum(1), (wanted * weights).sum(1))
    return {
        "token_min": float(tokens.min()), "token_mean": float(tokens.mean()),
        "sentence_min": float(sentences.min()), "sentence_mean": float(sentences.mean()),
    }  # fmt: skip


def _show_models(rows: Rows, name: str, requests: Sequence[tuple[int, int]]) -> None:
    mine = [r for r in rows if r["what"] == "model" and r["model"] == name]
    keys = [f"{b}x{s}" for b, s in requests]
    for kind, title in (
        ("gpu_us", "us per enqueue in a CUDA graph"),
        ("latency_us", "us from numpy to numpy, p50 / p95 / p99"),
    ):
        table = []
        for r in mine:
            cells = [
                f"{r[kind][k]['p50']:.0f}"
                if kind == "gpu_us"
                else " / ".join(f"{r[kind][k][p]:.0f}" for p in ("p50", "p95", "p99"))
                for k in keys
            ]
            rate = max(b / r["latency_us"][f"{b}x{s}"]["p50"] * 1e6 for b, s in requests)
            cosine = f"{r['cosine']['sentence_min']:.4f}" if "cosine" in r else ""
            table.append(
                (
                    r["variant"],
                    *cells,
                    f"{rate:.0f}",
                    f"{r['engine_bytes'] / 1e6:.1f}",
                    f"{r['device_bytes'] / 1e6:.0f}",
                    cosine,
                )
            )
        heads = ("variant", *keys, "requests/s", "engine MB", "device MB", "cosine")
        print_table(f"{name}: {title}", heads, table)


# ---- the frame -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    native = _native.extension()
    gpu = native.device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hwkern": hwkern.__version__,
        "tensorrt": str(_api.find()),
        "python": platform.python_version(),
        "gpu": gpu["name"],
        "compute": gpu["compute"],
        "wheel_cuda": native.cuda_version,
        "nvidia_smi": record.nvidia_smi(0),
        "command": shlex.join(["python", "benchmarks/tensorrt.py", *(Path(a).name for a in sys.argv[1:])]),
    }


def save(path: Path, document: dict[str, Any]) -> None:
    """One row per line."""
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n', encoding="utf-8")
    print(f"wrote {path}", flush=True)


def plot(document: dict[str, Any], path: Path) -> None:
    """Speed against FP16 over M (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = tensorrt_tables.figure(document, plt)
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here, after each section")
    parser.add_argument("--plot", type=Path, help="also draw it (needs matplotlib)")
    parser.add_argument("--from-json", type=Path, help="draw an old result instead of measuring")
    parser.add_argument("--cache", type=Path, help="timing cache file")
    parser.add_argument("--level", type=int, help="TensorRT's builder_optimization_level for all engines")
    parser.add_argument("--one-profile", action="store_true", help="models: one profile over all requests")
    parser.add_argument("--engines", type=Path, help="folder of engines: those in it are not built again")
    parser.add_argument("--build-only", action="store_true", help="fill --engines and measure nothing")
    parser.add_argument("--layers", action="store_true", help="models: show the time of each layer")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no engine is started")
    parser.add_argument("--commit", help="commit to record")
    parser.add_argument("--sections", default="linears,minilm,bert", help="which to run")
    parser.add_argument("--m", default=M, help="rows of the linears: groups with an engine each, a;b, of rows, 1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of fp32, fp16, qdq, hwkern")
    parser.add_argument(
        "--model-variants", default="fp16,qdq,norm,norm+attention,plan",
        help="also fp32, and ways to rewrite: attention, residual, unmerged, plain, half, largest1 …, joined by +",
    )  # fmt: skip
    parser.add_argument("--linears", default=";".join(f"{n}x{k}" for n, k in LINEARS), help="N x K")
    parser.add_argument("--requests", default=",".join(f"{b}x{s}" for b, s in REQUESTS), help="batch x length")
    parser.add_argument("--minilm", type=Path, help="folder with minilm.onnx, minilm.npz and scales.json")
    parser.add_argument("--bert-scales", type=Path, help="scales.json of the encoder, for Q/DQ")
    arguments = parser.parse_args()
    if arguments.from_json:
        plot(json.loads(arguments.from_json.read_text()), arguments.plot)
        return 0
    if (problem := _native.cuda_problem()) is not None:
        sys.exit(f"This benchmark needs an NVIDIA GPU: {problem}")
    sections = arguments.sections.split(",")
    requests = [(int(b), int(s)) for b, s in (r.split("x") for r in arguments.requests.split(","))]
    build, rows = Builder(arguments), []
    document = {
        "schema": 1,
        "benchmark": "tensorrt",
        "environment": environment() | {"commit": arguments.commit, "level": arguments.level},
        "rows": rows,
    }
    print(document["environment"], flush=True)

    def done() -> None:
        document["geomeans"] = geomeans(rows)
        if arguments.json:
            save(arguments.json, document)

    rng = np.random.default_rng(2)

    def ids(vocabulary: int, names: Sequence[str]) -> Callable[[int, int], dict[str, Any]]:
        def make(batch: int, length: int) -> dict[str, Any]:
            feed = {name: np.zeros((batch, length), np.int32) for name in names}
            feed["input_ids"] = rng.integers(1, vocabulary, (batch, length), dtype=np.int32)
            feed["attention_mask"] = np.ones((batch, length), np.int32)
            return feed

        return make

    try:
        with keep_builder():
            if "linears" in sections:
                groups = [[int(m) for m in group.split(",")] for group in arguments.m.split(";")]
                linears = [(int(n), int(k)) for n, k in (each.split("x") for each in arguments.linears.split(";"))]
                bench_linears(build, linears, groups, arguments.variants.split(","), rows, done)
                print(geomeans(rows), flush=True)
            chosen = arguments.model_variants.split(",")
            if "minilm" in sections and arguments.minilm:
                wanted = dict(np.load(arguments.minilm / "minilm.npz"))
                scales = json.loads((arguments.minilm / "scales.json").read_text())
                names = ["input_ids", "attention_mask", "token_type_ids"]
                model = functools.cache(lambda: onnx.load(str(arguments.minilm / "minilm.onnx")))
                bench_model(build, "MiniLM", model, ids(1000, names), scales, rows, requests, chosen, done, wanted)
            if "bert" in sections:
                model = functools.cache(models.encoder)
                scales = json.loads(arguments.bert_scales.read_text()) if arguments.bert_scales else {}
                kept = [v for v in chosen if v != "qdq" or scales]
                names = ["input_ids", "attention_mask"]
                bench_model(
                    build, "BERT-base (random weights)", model, ids(1000, names), scales, rows, requests, kept, done
                )
    except OutOfTime:
        print("The budget is used up.")
    done()
    if arguments.plot:
        plot(document, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
