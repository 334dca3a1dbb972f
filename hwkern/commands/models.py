"""A model and its batches, as the command line names them: a transformers folder, or ``package.module:factory``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """The arguments name nothing that can be used; the message is the sentence to show."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all of these subcommands take."""
    parser.add_argument(
        "model",
        help="a folder that transformers' from_pretrained reads, or package.module:factory, a function without "
        "arguments that returns a model, or a model and its list of batches",
    )
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--dtype", default=None, choices=["float32", "float16", "bfloat16"], help="default: as saved")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument(
        "--batch",
        action="append",
        metavar="BxS",
        help="a batch of B sequences of S random tokens, or of B random images; may be given several times "
        "(default: 1x16 and 8x128)",
    )
    parser.add_argument("--text", metavar="FILE", help="real text instead: one input per line, through the tokenizer")
    parser.add_argument("--json", action="store_true", help="print JSON")


def choose_device(wanted: str | None) -> tuple[str, str]:
    """``(device, why)``: "cpu" or "cuda:N", the best one or the wanted one. UsageError says why it cannot be."""
    import torch

    from hwkern import _native, hardware

    if wanted is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise UsageError(f"--device {wanted}: it must be cpu, cuda or cuda:N.")
    if wanted == "cpu":
        return "cpu", "as asked"
    index = int((wanted or "").partition(":")[2] or 0)
    problem = _native.cuda_problem()
    if problem is None and not torch.cuda.is_available():
        problem = f"torch {torch.__version__} sees no GPU: install a CUDA build of torch."
    if problem is None:
        gpus = hardware.gpus()
        if index >= len(gpus):
            raise UsageError(f"--device {wanted}: this machine has {len(gpus)} GPU(s), numbered from cuda:0.")
        if not gpus[index].supported:
            problem = f"{gpus[index].name} is older than compute capability 8.0."
    if wanted is None:
        return ("cuda:0", "the first GPU") if problem is None else ("cpu", f"no GPU: {problem}")
    if problem is not None:
        raise UsageError(f"--device {wanted} is not possible: {problem}")
    return f"cuda:{index}", "as asked"


def device_of(wanted: str | None) -> str:
    """:func:`choose_device`'s device; "cuda" where no index was named."""
    device, _ = choose_device(wanted)
    return device.partition(":")[0] if wanted is None else wanted


def check_target(file: str | None) -> None:
    """UsageError where a file cannot be written, to be asked before minutes of measuring."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"{file} cannot be written: there is no folder {Path(file).parent}.")


def load(arguments: argparse.Namespace) -> tuple[Any, list[Any], Callable[[], Any]]:
    """``(model, batches, load again)``; the last for a second, untouched copy. UsageError for what cannot be."""
    import torch

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: it must be at least 1.")
        torch.set_num_threads(arguments.threads)
    device = device_of(arguments.device)
    spec = arguments.model
    make = _factory(spec) if ":" in spec and not Path(spec).exists() else factory_of_folder(Path(spec), arguments.dtype)

    def again() -> tuple[Any, Any]:
        made = make()
        model, batches = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"{spec} gives {type(model).__name__}, not a torch.nn.Module.")
        if arguments.dtype is not None:
            model = model.to(getattr(torch, arguments.dtype))
        return model.to(device).eval(), batches

    model, batches = again()
    if arguments.text:
        batches = _text(Path(spec), Path(arguments.text))
    elif batches is None or arguments.batch:
        batches = [_random(model, shape) for shape in arguments.batch or ["1x16", "8x128"]]
    return model, list(batches), lambda: again()[0]


def _factory(spec: str) -> Callable[[], Any]:
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{spec}: the module {module!r} cannot be imported ({error}).") from error
    finally:
        sys.path.remove(os.getcwd())
    factory = getattr(found, name, None)
    if not callable(factory):
        raise UsageError(f"{spec}: {module} has no function {name!r}.")
    return factory


def factory_of_folder(folder: Path, dtype: str | None) -> Callable[[], Any]:
    """What loads the model of a transformers folder. UsageError when it is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(
            f"{folder} is neither a transformers folder (no config.json with architectures: {error!r}) nor "
            "package.module:factory."
        ) from error
    try:
        import transformers
    except ImportError as error:
        raise UsageError("A transformers folder needs transformers: pip install transformers") from error
    cls: Any = getattr(transformers, architecture, None)
    if cls is None:
        raise UsageError(f"transformers {transformers.__version__} has no {architecture!r}.")
    return lambda: cls.from_pretrained(str(folder), dtype=dtype or "auto")


def _random(model: Any, shape: str) -> Any:
    """A batch of random input of the kind the model says it takes."""
    import torch

    match = re.fullmatch(r"(\d+)(?:x(\d+))?", shape)
    if match is None or int(match[1]) < 1 or (match[2] is not None and int(match[2]) < 1):
        raise UsageError(f"--batch {shape}: it must be like 8x128 (sequences x tokens), or 8 (images).")
    size, length = int(match[1]), int(match[2] or 1)
    kind: Any = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    generator = torch.Generator().manual_seed(0)
    if kind == "input_ids" and isinstance(vocabulary := getattr(text, "vocab_size", None), int):
        ids = torch.randint(0, vocabulary, (size, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids
        return batch
    if kind == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        channels = getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(size, channels, side, side, generator=generator).to(dtype)}
    raise UsageError(
        f"{type(model).__name__} takes {kind or 'something unknown'}: give package.module:factory that returns the "
        "model and its batches."
    )


def _text(folder: Path, file: Path) -> list[Any]:
    try:
        import transformers

        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--text {file}: {error}") from error
    if not lines:
        raise UsageError(f"--text {file}: it has no line of text.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = min(int(tokenizer.model_max_length), 512)
    return [
        dict(tokenizer(lines[i : i + 8], padding=True, truncation=True, max_length=most, return_tensors="pt"))
        for i in range(0, len(lines), 8)
    ]
