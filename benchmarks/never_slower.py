"""Planned models against their originals, over architectures and batch shapes: no cell may be slower.

    python benchmarks/never_slower.py [--device cuda] [--models bert,gpt2] [--json FILE]

Random weights from transformers' configs. Each model is planned once for all of its batch shapes, patched, and timed
against a second copy of the original, call by call in turn; on a GPU also as CUDA-graph replays. The exit code is 1
when a cell is above 1.02.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import hwkern

LIMIT = 1.02
ROUNDS = 15
SHAPES = ((1, 16), (1, 128), (8, 64), (8, 256))


def models() -> dict[str, Callable[[], tuple[Any, Any, str]]]:
    """Name → (class, config, kind of input)."""
    t = transformers
    small = {"num_hidden_layers": 4, "vocab_size": 1000}
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **small}
    llama = {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        **small,
    }
    return {
        "bert": lambda: (t.BertModel, t.BertConfig(**wide), "text"),
        "bert-small": lambda: (
            t.BertModel,
            t.BertConfig(**small, hidden_size=384, intermediate_size=1536, num_attention_heads=12),
            "text",
        ),
        "roberta": lambda: (t.RobertaModel, t.RobertaConfig(**wide), "text"),
        "distilbert": lambda: (t.DistilBertModel, t.DistilBertConfig(n_layers=3, vocab_size=1000), "text"),
        "gpt2": lambda: (t.GPT2Model, t.GPT2Config(n_layer=4, vocab_size=1000), "text"),
        "llama": lambda: (t.LlamaModel, t.LlamaConfig(**llama), "text"),
        "qwen2": lambda: (t.Qwen2Model, t.Qwen2Config(**llama), "text"),
        "mistral": lambda: (t.MistralModel, t.MistralConfig(**llama), "text"),
        "phi": lambda: (t.PhiModel, t.PhiConfig(**wide), "text"),
        "opt": lambda: (
            t.OPTModel,
            t.OPTConfig(**small, hidden_size=768, ffn_dim=3072, num_attention_heads=12, word_embed_proj_dim=768),
            "text",
        ),
        "vit": lambda: (t.ViTModel, t.ViTConfig(num_hidden_layers=4), "image"),
        "whisper": lambda: (
            t.models.whisper.modeling_whisper.WhisperEncoder,
            t.WhisperConfig(encoder_layers=4, d_model=512, encoder_ffn_dim=2048, encoder_attention_heads=8),
            "audio",
        ),
        "t5": lambda: (t.T5EncoderModel, t.T5Config(num_layers=4, vocab_size=1000), "text"),
    }


def batch(kind: str, config: Any, shape: tuple[int, int], device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    size, length = shape
    if kind == "image":
        return {"pixel_values": torch.randn(size, 3, 224, 224, device=device).to(dtype)}
    if kind == "audio":
        return {"input_features": torch.randn(min(size, 2), config.num_mel_bins, 3000, device=device).to(dtype)}
    return {"input_ids": torch.randint(0, 1000, (size, length), device=device)}


def graph(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            model(**inputs)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(captured):
        model(**inputs)
    return captured.replay


def in_turn(calls: dict[str, Callable[[], object]], cuda: bool) -> dict[str, float]:
    """Median seconds of each call."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        for turn in range(ROUNDS):
            for name in calls if turn % 2 == 0 else reversed(list(calls)):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                calls[name]()
                if cuda:
                    torch.cuda.synchronize()
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def cells(name: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every cell of one model."""
    cls, config, kind = models()[name]()
    torch.manual_seed(0)
    original = cls(config).to(device, dtype).eval()
    planned = copy.deepcopy(original)
    shapes = SHAPES if kind == "text" else ((1, 1), (8, 1))
    batches = [batch(kind, config, shape, device, dtype) for shape in shapes]
    plan = hwkern.plan(planned, batches, show=False)
    hwkern.patch(planned, plan=plan, originals="drop")
    report = hwkern.validate(original, planned, batches[:1], show=False)
    found = []
    for shape, inputs in zip(shapes, batches, strict=True):
        both = {"original": lambda i=inputs: original(**i), "planned": lambda i=inputs: planned(**i)}
        modes: dict[str, dict[str, Callable[[], object]]] = {"eager": both}
        if device.startswith("cuda"):
            modes["graph"] = {"original": graph(original, inputs), "planned": graph(planned, inputs)}
        for mode, calls in modes.items():
            ms = {which: seconds * 1e3 for which, seconds in in_turn(calls, device.startswith("cuda")).items()}
            found.append(
                {
                    "model": name,
                    "shape": "x".join(map(str, shape)),
                    "mode": mode,
                    **ms,
                    "ratio": ms["planned"] / ms["original"],
                    "int8": sum(layer.chosen != 0 for layer in plan.layers.values()),
                    "layers": len(plan.layers),
                    "snr_db": report.snr_db[0],
                    "plan_seconds": plan.seconds,
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", help="comma-separated (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    rows = []
    for name in arguments.models.split(",") if arguments.models else models():
        for row in cells(name, arguments.device, dtype):
            rows.append(row)
            note = " SLOWER" if row["ratio"] > LIMIT else ""
            where = f"{row['model']:11} {row['shape']:6} {row['mode']:6}"
            times = f"{row['original']:9.3f} -> {row['planned']:9.3f} ms, ratio {row['ratio']:.3f}{note}"
            layers = f"int8 {row['int8']}/{row['layers']}, {row['snr_db']:.1f} dB, plan {row['plan_seconds']:.1f} s"
            print(f"{where} {times}, {layers}", flush=True)
    slower = [row for row in rows if row["ratio"] > LIMIT]
    print(f"{len(rows)} cells, {len(slower)} above {LIMIT}.")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
