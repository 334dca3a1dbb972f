"""What is to be run: workloads by name, and the options of ``hwkern bench``. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Blocks of each row, in turn with those of the other rows; their spread is the noise (see statistics.py).
BLOCKS = 11
#: Under traffic, where a block is a whole table of batches.
TRAFFIC_BLOCKS = 5
FIXED = re.compile(r"(\d+)(?:x(\d+))?")
DECODE = re.compile(r"decode:(\d+)x(\d+)\+(\d+)")
TRAFFIC = re.compile(r"traffic(?::(\d+))?")


@dataclass(frozen=True)
class Fixed:
    """One forward pass: ``rows`` sequences of ``length`` tokens, or ``rows`` images (``length`` 0)."""

    rows: int
    length: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.length}" if self.length else str(self.rows)

    @property
    def tokens(self) -> int:
        """Per call; images count as one each."""
        return self.rows * max(1, self.length)


@dataclass(frozen=True)
class Decode:
    """Greedy generation: ``rows`` prompts of ``prompt`` tokens, then ``new`` tokens each, the first by the prefill."""

    rows: int
    prompt: int
    new: int

    @property
    def name(self) -> str:
        return f"decode:{self.rows}x{self.prompt}+{self.new}"

    @property
    def tokens(self) -> int:
        """Generated per call."""
        return self.rows * self.new


@dataclass(frozen=True)
class Traffic:
    """A stream of requests, batched as they come; ``profiles`` lengths to pad to (0: each batch to its longest)."""

    profiles: int = 4

    @property
    def name(self) -> str:
        return f"traffic:{self.profiles}"


Workload = Fixed | Decode | Traffic


def workload(text: str) -> Workload:
    """``8x128``, ``32`` (images), ``decode:1x128+32``, ``traffic:4``. ValueError for anything else."""
    if (match := FIXED.fullmatch(text)) and int(match[1]) and match[2] != "0":
        return Fixed(int(match[1]), int(match[2] or 0))
    if (match := DECODE.fullmatch(text)) and int(match[1]) and int(match[2]) and int(match[3]) > 1:
        return Decode(int(match[1]), int(match[2]), int(match[3]))
    if match := TRAFFIC.fullmatch(text):
        return Traffic(int(match[1] or 4))
    raise ValueError(
        f"workload {text!r}: it must be like 8x128 (sequences x tokens), 32 (images), decode:1x128+32 (prompts x "
        "tokens + new tokens, at least 2) or traffic:4 (profiles)."
    )


#: Kind of model → default workloads, on a GPU and on a CPU.
DEFAULTS = {
    "encoder": (("1x32", "8x128", "32x128", "traffic:1", "traffic:4"), ("1x32", "8x128", "traffic:1", "traffic:4")),
    "decoder": (("8x512", "decode:1x128+32", "decode:16x128+32"), ("1x64", "decode:1x32+8")),
    "image": (("1", "32"), ("1", "4")),
}
#: Kinds of workload that a kind of model takes.
TAKES = {"encoder": (Fixed, Traffic), "decoder": (Fixed, Decode), "image": (Fixed,)}


def workloads_of(kind: str, wanted: tuple[Workload, ...], cuda: bool) -> tuple[list[Workload], dict[str, str]]:
    """``(what is run, what is not and why)`` for one model."""
    if not wanted:
        return [workload(text) for text in DEFAULTS[kind][0 if cuda else 1]], {}
    run, left = [], {}
    for each in wanted:
        if not isinstance(each, TAKES[kind]):
            left[each.name] = {
                Decode: "only models with a language head generate",
                Traffic: "the traffic workload is for encoders: a decoder under traffic needs continuous batching",
                Fixed: "",
            }[type(each)]
        elif isinstance(each, Fixed) and bool(each.length) == (kind == "image"):
            left[each.name] = "images have no length" if kind == "image" else "sequences need a length, as in 8x128"
        else:
            run.append(each)
    return run, left


@dataclass(frozen=True)
class Settings:
    """The options of one run.

    Attributes:
        models, paths: names; empty: the defaults of the device.
        workloads: empty: the defaults of each model.
        kept_to: workload's name → the models that it is for; without an entry: all.
        seconds: measured time of each row, all blocks together.
        budget: seconds of the whole run; None: no limit.
        bound_ms: of the 95th percentile in the traffic workload.
        lengths: JSON lines of request lengths, instead of log-normal ones.
        tensorrt_python: interpreter for the TensorRT paths; None: this one.
        tensorrt_level: of the builder's effort, 0 … 5; None: TensorRT's default.
        engines: folder in which engines are kept for later runs; None: they are built anew.
    """

    device: str
    models: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    workloads: tuple[Workload, ...] = ()
    kept_to: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: float = 1.5
    blocks: int = BLOCKS
    budget: float | None = None
    seed: int = 0
    bound_ms: float = 50.0
    requests: int = 2000
    max_rows: int = 32
    lengths: Path | None = None
    tensorrt_python: str | None = None
    tensorrt_level: int | None = None
    engines: Path | None = None
    show: bool = True
    started: float | None = None  #: time.monotonic() that the budget counts from
    keep: dict[str, str] = field(default_factory=dict)  #: for the record: commit, command

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")
