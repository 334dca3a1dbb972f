"""Planned models against their originals, over architectures, sizes and batch shapes: no cell may be slower.

    python benchmarks/never_slower.py [--device cuda] [--models bert,gpt2] [--sizes base] [--first opt/small]
                                      [--limit S] [--json FILE] [--merge FILE]

Random weights from transformers' configs, four layers each. A model is planned once for all of its batch shapes,
patched, and timed against a second copy of the original, call by call in turn; on a GPU also as CUDA-graph replays.

A cell's ratio is that of the two lower quartiles: what disturbs a call (the host's other work, above all) only adds to
its time, so that the quarter that was disturbed least repeats best. (A small model against its own copy on a busy host,
220 cells of 20 rounds: the ratio's standard deviation is 48 % with medians and 3.6 % with quartiles; 180 rounds: 19 and
0.8 %.) A cell above 1.02 is read again in blocks, each with new copies of both models: where in the memory a model lies
makes up to 2 % by itself. It goes on until the ratio is three standard errors (from the blocks) away from 1.02, on
either side, or there are 24. That second reading counts, whatever it says; both are kept. A plan that swaps nothing
leaves a copy of the model: it is measured like any other, and shows how far two readings of one thing lie apart. The
exit code is 1 when a cell is above 1.02 or is missing.

The file is written after each model. --merge takes an earlier file of the same commit and machine, and measures only
the models that it lacks: a run that was stopped goes on, and one can be split.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timing
import torch
import transformers

import hwkern
from hwkern import _batches, _timing
from hwkern._timing import lower_quartile
from hwkern.bench.limits import at_most
from hwkern.bench.subjects import captured

LIMIT = 1.02
SHAPES = ((1, 16), (1, 128), (8, 64), (8, 256))
BATCHES = ((1, 1), (2, 1), (4, 1), (8, 1))  # of images, or of 30 seconds of sound
LEAST, MOST, SECONDS = 15, 60, 0.08  # rounds of a cell: as many as fill these seconds
BLOCKS = (6, 24)  # of so many rounds in a second reading: at least, at most
MODEL_SECONDS = 60.0  # a model that is not done by then is absent: it must not cost the others their rows

Inputs = dict[str, torch.Tensor]
Made = tuple[Any, Any, str]  # class, config, kind of input


def models() -> dict[str, Callable[[str], Made]]:
    """Architecture → (class, config, kind of input) for a size, "base" (768 wide) or "small" (384)."""
    t = transformers

    def width(size: str) -> int:
        return 768 if size == "base" else 384

    def common(size: str) -> dict[str, Any]:
        wide = width(size)
        return {
            "hidden_size": wide,
            "intermediate_size": 4 * wide,
            "num_attention_heads": wide // 64,
            "num_hidden_layers": 4,
            "vocab_size": 1000,
        }

    def gated(size: str) -> dict[str, Any]:
        wide = width(size)
        return {**common(size), "intermediate_size": 8 * wide // 3, "num_key_value_heads": wide // 192}

    def distilbert(size: str) -> Made:
        wide = width(size)
        sizes = {"dim": wide, "hidden_dim": 4 * wide, "n_heads": wide // 64, "n_layers": 4, "vocab_size": 1000}
        return t.DistilBertModel, t.DistilBertConfig(**sizes), "text"

    def gpt2(size: str) -> Made:
        wide = width(size)
        return t.GPT2Model, t.GPT2Config(n_embd=wide, n_head=wide // 64, n_layer=4, vocab_size=1000), "text"

    def opt(size: str) -> Made:
        wide = width(size)
        sizes = {"hidden_size": wide, "ffn_dim": 4 * wide, "num_attention_heads": wide // 64, "num_hidden_layers": 4}
        return t.OPTModel, t.OPTConfig(**sizes, vocab_size=1000, word_embed_proj_dim=wide), "text"

    def vit(size: str) -> Made:
        sizes = common(size)
        del sizes["vocab_size"]
        return t.ViTModel, t.ViTConfig(**sizes), "image"

    def whisper(size: str) -> Made:
        wide = width(size)
        sizes = {"d_model": wide, "encoder_ffn_dim": 4 * wide, "encoder_attention_heads": wide // 64}
        config = t.WhisperConfig(**sizes, encoder_layers=4)
        return t.models.whisper.modeling_whisper.WhisperEncoder, config, "audio"

    def t5(size: str) -> Made:
        wide = width(size)
        sizes = {"d_model": wide, "d_ff": 4 * wide, "num_heads": wide // 64, "num_layers": 4, "vocab_size": 1000}
        return t.T5EncoderModel, t.T5Config(**sizes), "text"

    return {
        "bert": lambda size: (t.BertModel, t.BertConfig(**common(size)), "text"),
        "gpt2": gpt2,
        "llama": lambda size: (t.LlamaModel, t.LlamaConfig(**gated(size)), "text"),
        "vit": vit,
        "t5": t5,
        "roberta": lambda size: (t.RobertaModel, t.RobertaConfig(**common(size)), "text"),
        "distilbert": distilbert,
        "qwen2": lambda size: (t.Qwen2Model, t.Qwen2Config(**gated(size)), "text"),
        # No sliding window, as in Mistral 7B from v0.2 on: with one, transformers copies from the CPU under capture.
        "mistral": lambda size: (t.MistralModel, t.MistralConfig(**gated(size), sliding_window=None), "text"),
        "phi": lambda size: (t.PhiModel, t.PhiConfig(**common(size)), "text"),
        "opt": opt,
        "whisper": whisper,
    }


def batch(kind: str, config: Any, shape: tuple[int, int], device: str, dtype: torch.dtype) -> Inputs:
    """Random input of one shape."""
    size, length = shape
    if kind == "image":
        return {"pixel_values": torch.randn(size, 3, 224, 224, device=device).to(dtype)}
    if kind == "audio":
        return {"input_features": torch.randn(size, config.num_mel_bins, 3000, device=device).to(dtype)}
    return {"input_ids": torch.randint(0, 1000, (size, length), device=device)}


def eager(model: torch.nn.Module, inputs: Inputs) -> Callable[[], object]:
    """One call from Python."""
    return lambda: model(**inputs)


def graph(model: torch.nn.Module, inputs: Inputs) -> Callable[[], object]:
    """The replay of a CUDA graph of one call."""
    with torch.no_grad():
        replay = captured(lambda: model(**inputs))
    return lambda: (replay(), model)[0]  # it holds the model, whose memory the graph reads


WAYS = {"eager": eager, "graph": graph}
Calls = dict[str, Callable[[], object]]
Samples = dict[str, list[float]]


def samples(calls: Calls, cuda: bool, rounds: int | None = None) -> Samples:
    """Seconds of each call, in turn and in changing order: so many rounds, or as many as fill ``SECONDS``."""
    return _timing.in_turn(calls, torch.device("cuda" if cuda else "cpu"), SECONDS, (LEAST, MOST), rounds)


def in_turn(calls: Calls, cuda: bool) -> dict[str, float]:
    """Median seconds of each call."""
    return {name: statistics.median(values) for name, values in samples(calls, cuda).items()}


def ratio(read: Samples) -> float:
    """Planned over original."""
    return lower_quartile(read["planned"]) / lower_quartile(read["original"])


def again(fresh: Callable[[], Calls], cuda: bool, rounds: int) -> tuple[Samples, float]:
    """A longer reading, in blocks of ``rounds`` with ``fresh`` calls each, and the standard error of its ratio.

    When it ends depends on how far the ratio is from ``LIMIT``, and not on which side.
    """
    found: Samples = {"original": [], "planned": []}
    held: list[Calls] = []  # so that the next ones lie elsewhere
    ratios: list[float] = []
    while True:
        held.append(fresh())
        block = samples(held[-1], cuda, rounds)
        for name, values in block.items():
            found[name] += values
        ratios.append(ratio(block))
        if len(ratios) >= BLOCKS[0]:
            error = statistics.stdev(ratios) / len(ratios) ** 0.5
            if len(ratios) >= BLOCKS[1] or abs(ratio(found) - LIMIT) > 3 * error:
                return found, error


def copies(models: dict[str, Any], way: Callable[[Any, Inputs], Callable[[], object]], inputs: Inputs) -> Calls:
    """Calls of new copies: models in other places of the memory take times that differ by up to 2 %."""
    return {which: way(copy.deepcopy(model), inputs) for which, model in models.items()}


def cells(name: str, size: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every cell of one model."""
    cls, config, kind = models()[name](size)
    cuda = device.startswith("cuda")
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device(device):
        original = cls(config).to(device, dtype).eval()
    planned = copy.deepcopy(original)
    shapes: tuple[tuple[int, int], ...] = SHAPES if kind == "text" else BATCHES
    batches = [batch(kind, config, shape, device, dtype) for shape in shapes]
    made = time.perf_counter() - start
    plan = hwkern.plan(planned, batches, show=False)
    hwkern.patch(planned, plan=plan, originals="drop")
    both = {"original": original, "planned": planned}
    before = time.perf_counter()
    found: list[dict[str, Any]] = []
    for shape, inputs in zip(shapes, batches, strict=True):
        with torch.no_grad():
            outputs = [_batches.main_output(model(**inputs)).float() for model in both.values()]
        error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
        if not error < 0.3:
            sys.exit(f"Wrong result: {name}/{size} at {shape} is {error:.1%} off after the plan.")
        del outputs

        row = {"model": name, "size": size, "shape": "x".join(map(str, shape))}
        for mode, way in WAYS.items() if cuda else (("eager", eager),):
            try:
                read, noise = samples({which: way(model, inputs) for which, model in both.items()}, cuda), None
            except RuntimeError as reason:
                found.append({**row, "mode": mode, "absent": str(reason).splitlines()[0]})
                continue
            first = ratio(read)
            if first > LIMIT:
                fresh = functools.partial(copies, both, way, inputs)
                read, noise = again(fresh, cuda, len(read["original"]))
            found.append(
                {
                    **row,
                    "mode": mode,
                    **{which: round(lower_quartile(values) * 1e3, 4) for which, values in read.items()},
                    "ratio": round(ratio(read), 4),
                    "first_ratio": round(first, 4),
                    "noise": None if noise is None else round(noise, 4),
                    "int8": sum(layer.chosen != 0 for layer in plan.layers.values()),
                    "layers": len(plan.layers) + len(plan.left),
                    "error": round(error.item(), 5),
                    "plan_seconds": plan.seconds,
                }
            )
    measured = time.perf_counter() - before
    print(f"{name}/{size}: made in {made:.1f} s, planned {plan.phases}, measured in {measured:.1f} s", flush=True)
    return found


def earlier(path: Path, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run, of models without an absent row. Leaves with a sentence when it cannot go on."""
    document = json.loads(path.read_text(encoding="utf-8"))
    theirs = document["environment"]
    for key in ("commit", "gpu", "cpu", "threads", "torch"):
        if theirs.get(key) != environment.get(key):
            sys.exit(f"{path} cannot be merged: its {key} is {theirs.get(key)!r}, here {environment.get(key)!r}.")
    broken = {(row["model"], row["size"]) for row in document["rows"] if "ratio" not in row}
    return [row for row in document["rows"] if (row["model"], row["size"]) not in broken]


def show(row: dict[str, Any]) -> None:
    """One line."""
    where = f"{row['model']}/{row['size']}"
    line = f"{where:16} {row['shape']:6} {row['mode']:6}"
    if "absent" in row:
        print(f"{line} absent: {row['absent']}", flush=True)
        return
    note = " SLOWER" if row["ratio"] > LIMIT else ""
    twice = "" if row.get("noise") is None else f" ± {row['noise']:.3f} (first {row['first_ratio']:.3f})"
    times = f"{row['original']:9.3f} -> {row['planned']:9.3f} ms, ratio {row['ratio']:.3f}{twice}{note}"
    same = "" if row["int8"] else " (a copy of the original)"
    layers = f"int8 {row['int8']}/{row['layers']}{same}, error {row['error']:.1%}, plan {row['plan_seconds']:.1f} s"
    print(f"{line} {times}, {layers}", flush=True)


def main() -> int:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(models()), help="comma-separated (default: all)")
    parser.add_argument("--sizes", default="base,small", help="base, small or both (default)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default 1)")
    parser.add_argument("--first", default="", help="models to begin with, as in opt/small,whisper/base")
    parser.add_argument("--limit", type=float, help="seconds after which no further model is started")
    parser.add_argument("--merge", type=Path, help="an earlier run's file, to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cuda = arguments.device.startswith("cuda")
    if cuda:
        timing.need_cuda()
    names = arguments.models.split(",")
    if unknown := set(names) - set(models()):
        parser.error(f"unknown model {', '.join(sorted(unknown))}; there are {', '.join(models())}")
    if arguments.quick:
        names = names[:3]
    dtype = torch.bfloat16 if cuda else torch.float32
    start = time.monotonic()
    environment = timing.environment(arguments.device, arguments.commit)
    rows = [] if arguments.merge is None else earlier(arguments.merge, environment)
    done = {(row["model"], row["size"]) for row in rows}
    missing = []
    sizes = arguments.sizes.split(",")
    # First every architecture once, the sizes in turn; then the others.
    order = [(name, sizes[(i + turn) % len(sizes)]) for turn in range(len(sizes)) for i, name in enumerate(names)]
    first = [tuple(each.split("/")) for each in arguments.first.split(",") if each]
    if unknown := set(first) - set(order):
        parser.error(f"--first {', '.join(map('/'.join, unknown))}: not among the models and sizes to be measured")
    for name, size in [*first, *(each for each in order if each not in first)]:
        if (name, size) in done:
            continue
        if arguments.limit is not None and time.monotonic() - start > arguments.limit:
            missing.append(f"{name}/{size}")
            continue
        print(f"{name}/{size} after {time.monotonic() - start:.0f} s", flush=True)
        try:
            with at_most(MODEL_SECONDS if cuda else None):
                found = cells(name, size, arguments.device, dtype)
        except Exception as error:  # one model that fails must not cost the rows of the others
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"
            found = [{"model": name, "size": size, "shape": "all", "mode": "all", "absent": reason}]
        for row in found:
            rows.append(row)
            show(row)
        timing.save(arguments.json, timing.result("never_slower", arguments.device, arguments.commit, rows))
    measured = [row for row in rows if "ratio" in row]
    slower = [row for row in measured if row["ratio"] > LIMIT]
    worst = max((row["ratio"] for row in measured), default=0.0)
    absent = len(rows) - len(measured)
    print(
        f"{len(measured)} cells of {len({(row['model'], row['size']) for row in measured})} models, {len(slower)} "
        f"above {LIMIT}, worst {worst:.3f}, {absent} absent, {time.monotonic() - start:.0f} s."
    )
    if missing:
        print(f"No time left for {', '.join(missing)}.")
    return 1 if slower or absent or missing else 0


if __name__ == "__main__":
    sys.exit(main())
