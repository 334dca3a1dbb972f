"""One path of one model, ready to be timed: eager, compiled or captured, for each kind of workload.

A subject is prepared for one workload at a time: ``prepare`` warms up, compiles and captures, ``block`` times calls for
some seconds, ``release`` drops what was made for the workload. Every call ends with a wait for the device, as a server
has to wait for the answer.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hwkern import _batches, _timing
from hwkern.bench import settings
from hwkern.bench import traffic as queueing
from hwkern.bench.models import Model
from hwkern.bench.paths import BASES, Path

WARM_UP = 3
WARM_UP_SECONDS = 0.3


@dataclass
class Block:
    """What one block of calls took, in seconds.

    Attributes:
        calls: of each call.
        first, steps: of each generation: until its first token, and each later token.
        table: of each (rows, length) under traffic; inputs: the part of it that the host spends on input and output.
    """

    calls: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    table: dict[tuple[int, int], float] = field(default_factory=dict)
    inputs: dict[tuple[int, int], float] = field(default_factory=dict)


class Subject(Protocol):
    """What the engine of the comparison asks of a path."""

    weight_bytes: int

    def prepare(self, workload: settings.Workload, inputs: Mapping[str, Any], traffic: queueing.Traffic | None) -> None:
        """Get ready; raises what the path raises when it cannot."""

    def block(self, seconds: float) -> Block:
        """Time calls for about so long, at least one."""

    def output(self) -> Any:
        """The main output of the prepared workload's own call, on the host; None where there is nothing to compare."""

    def memory(self) -> dict[str, int | None]:
        """``steady`` and ``peak`` bytes of device memory of the prepared workload."""

    def serve(self, requests: Sequence[Sequence[int]], rows: int, length: int) -> tuple[float, float]:
        """Seconds that one batch of the prepared traffic took, and the part of it spent on input and output."""

    def release(self) -> None:
        """Drop what was made for the workload."""


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """float32 matrix products with or without TF32, for as long as the block lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def allocated(device: str) -> int:
    """Bytes of device memory that live tensors take; 0 on the CPU, where torch does not count."""
    if not device.startswith("cuda"):
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def slack(device: str) -> int:
    """Bytes that the allocator holds and no tensor uses; right after :func:`allocated` these are the graphs' pools."""
    return torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if device.startswith("cuda") else 0


def warm_up(call: Callable[[], object]) -> None:
    """Everything lazy happens before the timing: a few calls, fewer when they are slow."""
    until = time.perf_counter() + WARM_UP_SECONDS
    for _ in range(WARM_UP):
        call()
        if time.perf_counter() > until:
            return


class TorchSubject:
    """A torch model under one way of launching. Several subjects may share one model."""

    def __init__(self, path: Path, model: Model, module: nn.Module, base_bytes: int, device: str) -> None:
        self.path, self.model, self.module, self.device = path, model, module, device
        self.base_bytes = base_bytes  #: device memory of the model itself
        self.tf32 = BASES[path.base].tf32
        self.weight_bytes = _tensor_bytes(module)
        dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
        self.dtype = dtypes[0] if dtypes else torch.float32
        self._call: Callable[[], Any] | None = None
        self._serve: _Server | None = None
        self._generate: _Generation | None = None
        self._before = self._slack = 0

    # ---- the protocol ----------------------------------------------------------------------------------------------

    def prepare(self, workload: settings.Workload, inputs: Mapping[str, Any], traffic: queueing.Traffic | None) -> None:
        self._before, self._slack = allocated(self.device), slack(self.device)
        with self._running():
            if isinstance(workload, settings.Traffic):
                assert traffic is not None
                self._serve = _Server(self, traffic)
            elif isinstance(workload, settings.Decode):
                self._generate = _Generation(self, inputs["input_ids"], workload.new)
            else:
                cast = self.cast(inputs) | self.model.calls()
                self._call = self.launcher(lambda: self.forward(self.module_for_mode(), cast))
                warm_up(self._once)
            self.wait()

    def block(self, seconds: float) -> Block:
        found = Block()
        with self._running():
            if self._serve is not None:
                self._serve.block(seconds, found)
                return found
            until = time.perf_counter() + seconds
            while not found.calls or time.perf_counter() < until:
                if self._generate is not None:
                    self._generate.run(found)
                    continue
                start = time.perf_counter()
                self._once()
                found.calls.append(time.perf_counter() - start)
        return found

    def _once(self) -> None:
        assert self._call is not None
        self._call()
        self.wait()

    def output(self) -> Tensor | None:
        with self._running():
            if self._generate is not None:
                return self._generate.second_logits()
            return None if self._call is None else self._call().float().cpu()

    def memory(self) -> dict[str, int | None]:
        if not self.device.startswith("cuda"):
            return {"steady": None, "peak": None}
        with self._running():
            now = allocated(self.device)
            held = max(0, slack(self.device) - self._slack) if self.path.captured else 0
            torch.cuda.reset_peak_memory_stats()
            if self._serve is not None:
                self._serve.largest()
            elif self._generate is not None:
                self._generate.run(Block())
            elif self._call is not None:
                self._call()
            self.wait()
            peak = torch.cuda.max_memory_allocated() - now
        steady = self.base_bytes + now - self._before
        return {"steady": steady, "peak": steady + max(peak, held)}

    def serve(self, requests: Sequence[Sequence[int]], rows: int, length: int) -> tuple[float, float]:
        assert self._serve is not None
        with self._running():
            return self._serve.serve(requests, rows, length)

    def release(self) -> None:
        self._call = self._serve = self._generate = None
        allocated(self.device)

    # ---- for the workloads -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with torch.inference_mode(), precision(self.tf32):
            yield

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def cast(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels in the model's float type."""
        return {k: v.to(self.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}

    def forward(self, module: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        return _batches.main_output(module(**inputs))

    def module_for_mode(self, dynamic: bool | None = False) -> Callable[..., Any]:
        """The model, or its compiled form: one for each subject, so that no other's shapes are in its cache."""
        if not self.path.compiled:
            return self.module
        key = f"_compiled_{dynamic}"
        if key not in self.__dict__:
            self.__dict__[key] = torch.compile(self.module, dynamic=dynamic)
        return self.__dict__[key]

    def launcher(self, call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
        """``call`` itself, or a replay of it as one CUDA graph that gives the same tensor every time."""
        return captured(call, pool) if self.path.captured else call


def captured(call: Callable[[], Any], pool: Any = None) -> Callable[[], Any]:
    """Capture ``call``; what it returns then lives in the graph's memory."""
    stream = _timing.warm_up_stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _parts(tensor: Any) -> list[Tensor]:
    """The tensor; of one that is made of others, as torchao's quantized weights are, these."""
    if (flatten := getattr(tensor, "__tensor_flatten__", None)) is not None:
        return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]
    return [tensor]


def stored_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that tensors take, each byte once: tied weights and views of one storage share theirs."""
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    alone = 0
    for tensor in {id(part): part for each in tensors for part in _parts(each)}.values():
        size = int(tensor.numel()) * tensor.element_size()
        try:
            storage = tensor.untyped_storage().data_ptr()
        except (NotImplementedError, RuntimeError):  # without a storage of its own
            storage = 0
        if not storage or not tensor.is_contiguous():
            alone += size
            continue
        start = int(tensor.storage_offset()) * tensor.element_size()
        spans.setdefault((str(tensor.device), storage), []).append((start, start + size))
    for pieces in spans.values():
        end = 0
        for start, stop in sorted(pieces):
            alone += max(0, stop - max(start, end))
            end = max(end, stop)
    return alone


def _tensor_bytes(module: nn.Module) -> int:
    """Bytes of all weights, those of torch.ao's packed layers included."""
    plain = stored_bytes((*module.parameters(), *module.buffers()))
    packed = 0
    for each in module.modules():  # bitsandbytes keeps the scales of its weights beside them, in plain attributes
        scales = getattr(getattr(each, "state", None), "SCB", None)
        if scales is None:
            scales = getattr(getattr(each, "weight", None), "SCB", None)
        packed += 0 if scales is None else stored_bytes([scales])
    for each in module.modules():
        layer: Any = each
        if hasattr(layer, "_packed_params") and callable(getattr(layer, "weight", None)):
            weight, bias = layer.weight(), layer.bias()
            scales = weight.q_per_channel_scales() if weight.qscheme() == torch.per_channel_affine else torch.ones(1)
            packed += weight.numel() + 4 * scales.numel() + (0 if bias is None else 4 * bias.numel())
    return plain + packed


class _Generation:
    """Greedy decoding with transformers' static cache: a prefill, then one token at a time, all on fixed buffers."""

    def __init__(self, subject: TorchSubject, ids: Tensor, new: int) -> None:
        from transformers import StaticCache

        self.subject, self.ids, self.new = subject, ids, new
        self.token = ids[:, :1].clone()
        self.logits: Tensor | None = None
        module: Any = subject.module
        self.cache: Any = StaticCache(config=module.config, max_cache_len=ids.shape[1] + new + WARM_UP)
        # Prefill stays as it is under +compile, as in transformers' own generate; the graph takes both.
        self._ask(subject.module, ids)  # the cache gets its buffers
        self.reset()
        self._prefill = subject.launcher(lambda: self._ask(subject.module, self.ids, restart=True))
        for _ in range(WARM_UP):
            self._prefill()
        self._step = subject.launcher(lambda: self._ask(subject.module_for_mode(), self.token))
        for turn in range(WARM_UP):
            if turn % max(1, new - 1) == 0:
                self._prefill()
            self._step()

    def reset(self) -> None:
        """Forget all tokens; what stays in the buffers is masked."""
        for layer in self.cache.layers:
            if torch.is_tensor(getattr(layer, "cumulative_length", None)):
                layer.cumulative_length.zero_()
            else:
                layer.reset()

    def _ask(self, module: Callable[..., Any], ids: Tensor, restart: bool = False) -> Tensor:
        if restart:
            self.reset()
        logits = module(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits

    def run(self, block: Block) -> None:
        """One generation: a whole call, its first token, and each later one."""
        begin = last = time.perf_counter()
        self._prefill()
        self.subject.wait()
        now = time.perf_counter()
        block.first.append(now - last)
        for _ in range(self.new - 1):
            last = now
            self._step()
            self.subject.wait()
            now = time.perf_counter()
            block.steps.append(now - last)
        block.calls.append(now - begin)

    def second_logits(self) -> Tensor:
        """Logits after the prompt and one known token: a step through the cache, to compare with a plain forward."""
        self._prefill()
        self.token.copy_(self.ids[:, :1])
        return self._step()[:, -1].float().cpu()


class _Server:
    """Batches of requests, from lists of ids on the host to an answer on the host."""

    def __init__(self, subject: TorchSubject, traffic: queueing.Traffic) -> None:
        self.subject, self.traffic = subject, traffic
        self.shapes = queueing.grid(traffic)
        self._static: dict[tuple[int, int], tuple[dict[str, Tensor], Callable[[], Tensor]]] = {}
        self._module = subject.module_for_mode(dynamic=True)
        if subject.path.captured:
            pool = torch.cuda.graph_pool_handle()
            for rows, length in sorted(self.shapes, key=lambda s: s[0] * s[1], reverse=True):
                inputs = {
                    name: torch.ones(rows, length, dtype=torch.long, device=subject.device)
                    for name in ("input_ids", "attention_mask")
                }
                # One pool for all: the answer is copied away before the next graph runs.
                self._static[rows, length] = inputs, captured(lambda i=inputs: self._answer(i), pool)  # type: ignore[misc]
        for rows, length in self.shapes:
            self.serve([[11] * length] * rows, rows, length)

    def _answer(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mean over the tokens, ``[rows, hidden]``: what an embedding service returns."""
        hidden = self.subject.forward(self._module, inputs)
        weight = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def serve(self, requests: Sequence[Sequence[int]], rows: int, length: int) -> tuple[float, float]:
        start = time.perf_counter()
        fill = rows - len(requests)
        ids = [[*r, *([0] * (length - len(r)))] for r in requests] + [[0] * length] * fill
        mask = [[1] * len(r) + [0] * (length - len(r)) for r in requests] + [[1] * length] * fill
        host = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        prepared = time.perf_counter() - start
        if self._static:
            inputs, replay = self._static[rows, length]
            for name, value in host.items():
                inputs[name].copy_(value, non_blocking=True)
            answer = replay()
        else:
            answer = self._answer({name: value.to(self.subject.device) for name, value in host.items()})
        answer.cpu()  # waits
        return time.perf_counter() - start, prepared

    def block(self, seconds: float, found: Block) -> None:
        """Every shape, as often as there is time for."""
        for shape, (total, inputs) in queueing.measured(self.shapes, self.serve, seconds).items():
            found.table[shape], found.inputs[shape] = total, inputs

    def largest(self) -> None:
        rows, length = max(self.shapes, key=lambda s: s[0] * s[1])
        self.serve([[11] * length] * rows, rows, length)
