"""How long a plan of a model of Llama-3-8B's size takes: with an empty cache, and again with the times it left there.

    python benchmarks/plan_time.py [--layers 32] [--json FILE]

The whole model (8.0 billion parameters with 32 layers, embedding and output head of 128 256 words) in bfloat16, random
weights drawn on the device. Planned for a prompt of 8×512 tokens and for decoding steps of 1 and 16. The exit code is 1
when the first plan of 32 layers took two minutes or more.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import timing
import torch
import transformers

import hwkern

SHAPES = ((8, 512), (1, 1), (16, 1))
MOST_SECONDS = 120.0


def made(layers: int, hidden: int, device: str) -> Any:
    """The model. bfloat16 from the start: in float32 it would be 32 GB."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 512), num_hidden_layers=layers, vocab_size=128256 * hidden // 4096,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def main() -> int:
    """Measure, print, save."""
    parser = timing.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="the model's width; all else in proportion")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda"):
        timing.need_cuda()
    torch.manual_seed(0)
    start = time.perf_counter()
    model = made(arguments.layers, arguments.hidden, arguments.device)
    batches = [
        {
            "input_ids": torch.randint(0, model.config.vocab_size, shape, device=arguments.device),
            "use_cache": False,
            "logits_to_keep": 1,
        }
        for shape in SHAPES
    ]
    row: dict[str, Any] = {"layers": arguments.layers, "hidden": arguments.hidden}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(f"{row['parameters'] / 1e9:.2f} billion parameters, made in {time.perf_counter() - start:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HWKERN_CACHE"] = cache
        for name in ("first", "again"):
            start = time.perf_counter()
            plan = hwkern.plan(model, batches, show=False)
            row[name] = {"seconds": round(time.perf_counter() - start, 2), "phases": plan.phases}
            row[name] |= {"measured": plan.measured, "reused": plan.reused}
            print(f"{name}: {row[name]['seconds']:.1f} s, {plan.phases}", flush=True)
            timing.save(arguments.json, timing.result("plan_time", arguments.device, arguments.commit, [row]))
    print(plan)
    return 1 if arguments.layers >= 32 and row["first"]["seconds"] >= MOST_SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
