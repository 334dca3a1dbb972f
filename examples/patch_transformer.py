"""Patch a transformers model: what becomes INT8, how far the answers move, how fast it is, and back again.

    python examples/patch_transformer.py [FOLDER] [--batch 8] [--tokens 128]

FOLDER: a model that transformers' from_pretrained reads. Without one: BERT with four layers at random weights, which
needs no download.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers

import hwkern


def load(folder: str | None) -> Any:
    """The model, float16 on a GPU, float32 on a CPU."""
    if folder is not None:
        model = transformers.AutoModel.from_pretrained(folder)
    else:
        config = transformers.BertConfig(num_hidden_layers=4, vocab_size=1024)
        model = transformers.BertModel(config, add_pooling_layer=False)
    if torch.cuda.is_available():
        model = model.half().cuda()
    return model.eval()


def milliseconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Median of a few calls, the answer waited for."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        model(**batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = load(arguments.folder)
    ids = torch.randint(10, model.config.vocab_size, (arguments.batch, arguments.tokens), device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with torch.inference_mode():
        before, took = model(**batch).last_hidden_state, milliseconds(model, batch)

        print(hwkern.patch(model))  # the one line that matters

        after = model(**batch).last_hidden_state
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        print(f"\ncosine with the original's outputs: mean {cosine.mean():.5f}, lowest {cosine.min():.5f}")
        print(f"{took:.2f} ms before, {milliseconds(model, batch):.2f} ms after")

        hwkern.unpatch(model)
        print("the same bits after unpatch:", torch.equal(model(**batch).last_hidden_state, before))


if __name__ == "__main__":
    main()
