"""A Llama of Llama-3-8B's width, planned and patched, against float and other libraries: prefill and decode steps.

    python benchmarks/llama.py [--modes eager,graph] [--variants bf16,planned] [--layers 8] [--json FILE]

The body of the model (no embedding of 128 256 words and no output head, which stay in 16 bits in every variant) with
random weights; a decode step is one token for each sequence without a key-value cache, whose cost is the same in all.
Variants:

  bf16, fp16             the model as it is
  planned                hwkern.patch with the plan that hwkern.plan makes for these three batches
  patched                hwkern.patch without a plan: INT8 everywhere
  bitsandbytes           LLM.int8 without its outlier path, float16
  torchao_int8, _fp8     torchao's dynamic INT8 and FP8 (per row), bfloat16; made for torch.compile, slow without it

Modes: "eager" (calls from Python), "graph" (replays of a CUDA graph), "compile" (torch.compile, called from Python) and
"compiled_graph" (the graph of that). The first four variants are measured in turn, and ours compiled; then each peer in
turn with bf16, under a limit of its own, and listed with the reason where it cannot run; at last what else is to be
compiled. Each variant has ``--limit`` seconds to compile for a workload, and all have ``--budget``, of which inductor's
cache (TORCHINDUCTOR_CACHE_DIR) of an earlier run saves most. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import never_slower
import timing
import torch
import transformers
from peers import AbsentError, at_most

import hwkern
from hwkern.calibrate import snr_db

WORKLOADS = {"prefill 8x512": (8, 512), "decode batch 1": (1, 1), "decode batch 16": (16, 1)}
OURS = ("planned", "patched")
FLOATS = ("bf16", "fp16")
PEERS = ("bitsandbytes", "torchao_int8", "torchao_fp8")
MODES = ("eager", "graph", "compile", "compiled_graph")
# Prefill in every mode and decode as a graph against bf16, no mode below bf16, weights, seconds of a plan, of another.
TARGETS = {"prefill": 1.45, "decode": 1.6, "least": 1.0, "memory": 0.53, "first": 60.0, "again": 10.0}

START = time.monotonic()
Model = Any
Call = Callable[[], object]


class Bench:
    """The models that are there, their inputs, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        self.cuda = self.device.startswith("cuda")
        self.rows: list[dict[str, Any]] = []
        self.info: dict[str, Any] = {}
        hidden, heads = arguments.hidden, max(1, arguments.hidden // 128)
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4), num_hidden_layers=arguments.layers, vocab_size=1024,
        )  # fmt: skip
        torch.manual_seed(0)
        before = self.allocated()
        with torch.device(self.device):
            self.original: Model = transformers.LlamaModel(config).to(torch.bfloat16).eval().requires_grad_(False)
        self.gather()
        linear = {id(m.weight) for m in self.original.modules() if isinstance(m, torch.nn.Linear)}
        self.other = sum(2 * p.numel() for p in self.original.parameters() if id(p) not in linear)
        self.ids = {
            name: torch.randint(0, 1024, shape, device=self.device)
            for name, shape in WORKLOADS.items()
            if name in arguments.workloads
        }
        self.models: dict[str, Model] = {}
        self.snr: dict[str, dict[str, float]] = {}
        self.bytes = {"bf16": self.allocated() - before - self.other}
        with torch.no_grad():
            self.exact = {name: self.original(ids, use_cache=False)[0].float() for name, ids in self.ids.items()}

    def allocated(self) -> int:
        """Bytes of tensors on the device."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def gather(self) -> None:
        """Free what nobody holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def add(self, name: str) -> None:
        """Make one variant and note what its linear layers take on the device."""
        if name == "bf16":
            self.models[name] = self.original
            return
        self.gather()
        before = self.allocated()
        model = MAKERS[name](self, copy.deepcopy(self.original))
        self.gather()
        self.models[name] = model
        self.bytes[name] = self.allocated() - before - self.other

    def call(self, name: str, workload: str, forward: Model = None) -> Call:
        """One forward pass."""
        model, ids = self.models[name] if forward is None else forward, self.ids[workload]
        return lambda: model(ids, use_cache=False)[0]

    def check(self, name: str) -> dict[str, float]:
        """dB of each workload's output against bf16's; leaves with a sentence where one of ours is wrong."""
        if name in self.snr:
            return self.snr[name]
        with torch.no_grad():
            found = {w: round(snr_db(self.exact[w], self.call(name, w)().float()), 2) for w in self.ids}  # type: ignore[attr-defined]
        if name in OURS and min(found.values()) < 10:  # an error of 30 %: not rounding, but a mistake
            sys.exit(f"Wrong result: {name} has {found} dB.")
        self.snr[name] = found
        return found

    def row(self, name: str, workload: str, mode: str, **figures: Any) -> None:
        """Keep and print one row, with the seconds since the start."""
        print(f"{time.monotonic() - START:6.1f} s  ", end="")
        self.rows.append({"variant": name, "workload": workload, "mode": mode, **figures})
        if "absent" in figures:
            print(f"{name:16} {workload:16} {mode:15} absent: {figures['absent']}", flush=True)
        else:
            print(
                f"{name:16} {workload:16} {mode:15} {figures['ms']:9.3f} ms  {figures['ratio']:.2f}× bf16"
                f"  {figures['snr_db']:.1f} dB",
                flush=True,
            )

    def measure(
        self,
        names: list[str],
        mode: str,
        wrap: Callable[[str, str], Call],
        workload: str,
        limit: Callable[[], float] | None = None,
    ) -> None:
        """Rows of some variants in one mode, in turn with bf16; ``wrap`` makes the call of a variant and workload.

        ``limit``: the seconds that a variant has for its first call; ``--limit`` by default.
        """
        snr = {name: self.check(name) for name in names}
        calls: dict[str, Call] = {}
        absent: dict[str, str] = {}
        for name in dict.fromkeys(("bf16", *names)):
            try:
                with at_most(self.arguments.limit if limit is None else limit()):
                    calls[name] = wrap(name, workload)
                    with torch.no_grad():
                        calls[name]()
            except Exception as error:
                calls.pop(name, None)
                absent[name] = first_line(error)
        seconds = never_slower.in_turn(calls, self.cuda) if "bf16" in calls else {}
        for name in names:
            if name in seconds:
                self.row(
                    name, workload, mode, ms=round(seconds[name] * 1e3, 4), bf16_ms=round(seconds["bf16"] * 1e3, 4),
                    ratio=round(seconds["bf16"] / seconds[name], 4), snr_db=min(snr[name][workload], 999.0),
                )  # fmt: skip
            else:
                self.row(name, workload, mode, absent=absent.get(name) or f"bf16: {absent['bf16']}")
        self.save()

    def graph(self, name: str, workload: str, forward: Model = None) -> Call:
        """The replay of one forward pass."""
        model = self.models[name] if forward is None else forward
        return never_slower.graph(model, {"input_ids": self.ids[workload], "use_cache": False})  # type: ignore[dict-item]

    def save(self) -> None:
        """Write what there is."""
        document = timing.result("llama", self.device, self.arguments.commit, self.rows)
        floats = self.bytes["bf16"]
        memory = {
            name: {"bytes": size, "of_bf16": round(size / floats, 4)} for name, size in self.bytes.items() if floats
        }
        timing.save(self.arguments.json, {**document, **self.info, "linear_memory": memory})


def first_line(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, AbsentError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0][:200]}"


# ---- the variants ---------------------------------------------------------------------------------------------------


def planned(bench: Bench, model: Model) -> Model:
    """hwkern, by a plan; notes how long the plan took, and how long a second one, from the cache."""
    batches = [{"input_ids": ids, "use_cache": False} for ids in bench.ids.values()]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        plan = hwkern.plan(model, batches, show=False)
        seconds.append(round(time.perf_counter() - start, 2))
        print(f"{time.monotonic() - START:6.1f} s  a plan: {seconds[-1]} s, {plan.phases}", flush=True)
    print(plan, flush=True)
    print(f"{time.monotonic() - START:6.1f} s", flush=True)
    schemes: dict[str, int] = {}
    for layer in plan.layers.values():
        schemes[layer.choice.name] = schemes.get(layer.choice.name, 0) + 1
    bench.info["plan"] = {"first_seconds": seconds[0], "cached_seconds": seconds[1], "schemes": schemes}
    print(f"plan: {seconds[0]:.1f} s, again {seconds[1]:.1f} s; {schemes}", flush=True)
    hwkern.patch(model, plan=plan, originals="drop")
    return model


def patched(bench: Bench, model: Model) -> Model:
    """hwkern, INT8 everywhere."""
    hwkern.patch(model, originals="drop")
    return model


def bitsandbytes(bench: Bench, model: Model) -> Model:
    """LLM.int8, float16, no outlier path."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise AbsentError(f"pip install bitsandbytes ({error})") from error
    model = model.half()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                # On meta, or the layer is filled with first values on the CPU: half a second for each of these.
                layer = bnb.nn.Linear8bitLt(
                    child.in_features, child.out_features, bias=False, has_fp16_weights=False, threshold=0.0,
                    device="meta",
                )  # fmt: skip
                weight = bnb.nn.Int8Params(child.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
                layer.weight = weight.to(bench.device)  # from the CPU, because that is where it quantizes
                setattr(parent, name, layer.requires_grad_(False).eval())
    return model


def torchao(config: str, options: dict[str, Any]) -> Callable[[Bench, Model], Model]:
    """One of torchao's dynamic quantizations."""

    def make(bench: Bench, model: Model) -> Model:
        try:
            from torchao.quantization import PerRow, quant_api, quantize_
        except ImportError as error:
            raise AbsentError(f"pip install torchao ({error})") from error
        given = {**options, "granularity": PerRow()} if options.get("granularity") == "PerRow" else options
        quantize_(model, getattr(quant_api, config)(**given))
        return model

    return make


MAKERS: dict[str, Callable[[Bench, Model], Model]] = {
    "fp16": lambda bench, model: model.half(),
    "planned": planned,
    "patched": patched,
    "bitsandbytes": bitsandbytes,
    "torchao_int8": torchao("Int8DynamicActivationInt8WeightConfig", {"set_inductor_config": False}),
    "torchao_fp8": torchao(
        "Float8DynamicActivationFloat8WeightConfig", {"granularity": "PerRow", "set_inductor_config": False}
    ),
}


# ---- the run --------------------------------------------------------------------------------------------------------


def plain_modes(bench: Bench, names: list[str], modes: list[str]) -> None:
    """Eager calls and graph replays."""
    wraps: dict[str, Callable[[str, str], Call]] = {"eager": bench.call, "graph": bench.graph}
    for mode, workload in itertools.product(("eager", "graph"), bench.ids):
        if mode in modes:
            bench.measure(names, mode, wraps[mode], workload)


class Compiled:
    """torch.compile of the variants, each in turn with bf16, which is compiled once for each workload.

    Bounded: a variant has ``--limit`` seconds for a workload and all of them together ``--budget``. What takes longer
    is a row with that reason, and is not tried again.
    """

    def __init__(self, bench: Bench, modes: list[str]) -> None:
        # One entry for each variant and workload, all of the same function's code.
        torch._dynamo.config.cache_size_limit = 64  # the older of its two names
        self.bench, self.modes = bench, modes
        self.forwards: dict[str, Model] = {}
        self.late: dict[tuple[str, str], str] = {}  # what was not ready in time, and that

    def left(self) -> float:
        """Seconds that the next compilation may take."""
        budget = math.inf if self.bench.arguments.budget is None else self.bench.arguments.budget
        return min(self.bench.arguments.limit, budget - (time.monotonic() - START))

    def forward(self, which: str, workload: str) -> Model:
        """The compiled model, if it was ready in time."""
        if (which, workload) in self.late:
            raise AbsentError(self.late[which, workload])
        if which not in self.forwards:
            self.forwards[which] = torch.compile(self.bench.models[which], fullgraph=True, dynamic=False)
        return self.forwards[which]

    def call(self, which: str, workload: str) -> Call:
        """One forward pass."""
        return self.bench.call(which, workload, self.forward(which, workload))

    def replay(self, which: str, workload: str) -> Call:
        """The replay of one forward pass."""
        return self.bench.graph(which, workload, self.forward(which, workload))

    def rows(self, names: list[str]) -> None:
        """Measure these variants."""
        for workload in self.bench.ids:
            if "compile" in self.modes:
                self.bench.measure(names, "compile", self.call, workload, self.left)
                rows = [row for row in self.bench.rows if row["mode"] == "compile" and "absent" in row]
                self.late.update({(row["variant"], row["workload"]): row["absent"] for row in rows})
            if "compiled_graph" in self.modes:
                self.bench.measure(names, "compiled_graph", self.replay, workload, self.left)


def verdicts(bench: Bench) -> bool:
    """Print each target with its figure; whether all that were measured hold."""
    mine = [row for row in bench.rows if row["variant"] == "planned" and "ratio" in row]
    graphs = [row for row in mine if row["mode"].endswith("graph")]
    figures: list[tuple[str, float | None, float, bool]] = []

    def least(rows: list[dict[str, Any]]) -> float | None:
        return min((row["ratio"] for row in rows), default=None)

    for what, where, rows in (("prefill", "any mode", mine), ("decode", "CUDA graphs", graphs)):
        ratio = least([row for row in rows if row["workload"].startswith(what)])
        figures.append((f"{what}, {where}, against bf16, least", ratio, TARGETS[what], False))
    figures.append(("any mode against bf16, least", least(mine), TARGETS["least"], False))
    if bench.bytes["bf16"] and "planned" in bench.bytes:
        figures.append(("weight memory", bench.bytes["planned"] / bench.bytes["bf16"], TARGETS["memory"], True))
    plan = bench.info.get("plan", {})
    figures.append(("seconds of the first plan", plan.get("first_seconds"), TARGETS["first"], True))
    figures.append(("seconds of the second plan", plan.get("cached_seconds"), TARGETS["again"], True))
    fine = True
    for what, value, limit, at_most_ in figures:
        if value is None:
            continue
        holds = value <= limit if at_most_ else value >= limit
        fine &= holds
        print(f"{'ok  ' if holds else 'OPEN'} {what}: {value:.2f} ({'at most' if at_most_ else 'at least'} {limit})")
    return fine


def main() -> int:
    """Measure, print, save; 1 when a target does not hold."""
    parser = timing.parser(__doc__)
    variants = (*FLOATS, *OURS, *PEERS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", default=",".join(variants), help="comma-separated (default: all)")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated (default: all)")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated (default: all)")
    parser.add_argument(
        "--compile", default="bf16,planned", help="variants for the compiled modes (default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="width; 4096 is Llama-3-8B's")
    parser.add_argument("--budget", type=float, help="seconds since the start after which nothing more is compiled")
    parser.add_argument("--limit", type=float, default=40, help="seconds that one peer or compilation may take")
    arguments = parser.parse_args()
    arguments.workloads = arguments.workloads.split(",")
    names, modes = arguments.variants.split(","), arguments.modes.split(",")
    to_compile = [name for name in arguments.compile.split(",") if {"compile", "compiled_graph"} & set(modes)]
    for given, known in ((names, variants), (modes, MODES), (arguments.workloads, tuple(WORKLOADS))):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.device.startswith("cuda"):
        timing.need_cuda()
    else:
        modes = [mode for mode in modes if not mode.endswith("graph")]
    if "HWKERN_CACHE" not in os.environ:  # the first plan must be one
        folder = tempfile.TemporaryDirectory(prefix="hwkern-llama-")
        os.environ["HWKERN_CACHE"] = folder.name
    bench = Bench(arguments)
    print(f"{time.monotonic() - START:6.1f} s  the model is there", flush=True)
    bench.add("bf16")
    together = [name for name in names if name not in PEERS]
    for name in together:
        if name != "bf16":
            bench.add(name)
    bench.save()
    compiled = Compiled(bench, modes)
    ours = [name for name in to_compile if name in ("bf16", *OURS) and name in bench.models]
    plain_modes(bench, together, modes)
    if ours:
        compiled.rows(ours)
    for name in (name for name in names if name in PEERS):
        try:
            with at_most(arguments.limit):
                bench.add(name)
        except Exception as error:
            bench.row(name, "all", "all", absent=first_line(error))
            continue
        plain_modes(bench, [name], modes)
        if name not in to_compile:
            del bench.models[name]
            bench.gather()
    for name in to_compile:
        if name not in ours and name in bench.models:
            compiled.rows([name])
    return 0 if verdicts(bench) else 1


if __name__ == "__main__":
    sys.exit(main())
