"""The TensorRT paths: the torch model as ONNX, engines built and run in a process of their own.

The process may be another Python (``--tensorrt-python``), since TensorRT and torch need not live in one; and it can be
stopped at the budget's end, which a build inside this process cannot. It speaks JSON lines: see engine_child.py.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import _batches
from hwkern.bench import settings
from hwkern.bench import traffic as queueing
from hwkern.bench.models import AbsentError, Model
from hwkern.bench.paths import Path as RunPath
from hwkern.bench.subjects import Block

#: The newest that TensorRT 8.6 reads.
OPSET = 17
#: ONNX files are protobuf messages, which end at 2 GB.
MOST_BYTES = 1_900_000_000


class Exported(nn.Module):
    """What is exported: ids (and their mask, under traffic) in, the main output or the mean embedding out."""

    def __init__(self, module: nn.Module, extra: Mapping[str, Any], pooled: bool, causal: bool) -> None:
        super().__init__()
        self.module, self.extra, self.pooled, self.causal = module, dict(extra), pooled, causal

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        name: str = getattr(self.module, "main_input_name")  # noqa: B009  (mypy takes it for a module)
        options = dict(self.extra)
        if attention_mask is not None:
            # transformers' own way to the additive mask takes 20 nodes and gives the same numbers.
            options["attention_mask"] = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        elif self.causal:  # transformers makes its own from operators that opset 17 lacks
            ones = torch.ones(x.shape[1], x.shape[1], device=x.device)
            options["attention_mask"] = (torch.triu(ones, 1) * -1e4)[None, None]
        found = _batches.main_output(self.module(**{name: x}, **options))
        if not self.pooled:
            return found
        assert attention_mask is not None
        weight = attention_mask.unsqueeze(-1).float()
        return (found * weight).sum(1) / weight.sum(1)


class FakeQuantized(nn.Module):
    """A linear layer with Q/DQ pairs, as TensorRT's own INT8 wants them: a static scale for its input, one per output
    channel for its weight."""

    def __init__(self, linear: nn.Linear, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.register_buffer("scales", linear.weight.detach().abs().amax(1).clamp_min(1e-12) / 127)
        self.register_buffer("zeros", torch.zeros(linear.out_features, dtype=torch.int32, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, 0, -128, 127)
        scales, zeros = self.get_buffer("scales"), self.get_buffer("zeros")
        weight = torch.fake_quantize_per_channel_affine(self.linear.weight, scales, zeros, 0, -128, 127)
        return nn.functional.linear(x, weight, self.linear.bias)


def fake_quantized(module: nn.Module, inputs: Mapping[str, Any]) -> nn.Module:
    """A copy with Q/DQ pairs at every linear layer but the head, calibrated (absmax) on ``inputs``."""
    from hwkern.bench.paths import linears

    made = copy.deepcopy(module)
    chosen = linears(made)
    largest: dict[str, float] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: largest.__setitem__(
                name, max(largest.get(name, 0.0), float(args[0].abs().max()))
            )
        )
        for name, layer in chosen.items()
    ]
    with torch.inference_mode():
        made(**inputs)
    for hook in hooks:
        hook.remove()
    for name, absmax in largest.items():
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, FakeQuantized(chosen[name], max(absmax, 1e-12) / 127))
    return made


def export(module: nn.Module, model: Model, inputs: Mapping[str, Any], file: Path, traffic: bool) -> None:
    """Write the float32 model (or its Q/DQ form) as ONNX with a dynamic batch and length."""
    if not hasattr(torch.onnx, "export"):
        raise AbsentError("this torch has no ONNX exporter")
    prepared = copy.deepcopy(module).cpu().eval()
    config: Any = getattr(prepared, "config", None)
    if config is not None:
        config._attn_implementation = "eager"
    x = next(iter(inputs.values()))[:2].cpu()
    arguments = (x, torch.ones_like(x)) if traffic else (x,)
    axes = {"x": {0: "batch"}} if model.kind == "image" else {"x": {0: "batch", 1: "length"}}
    names = ["x"]
    if traffic:
        names.append("mask")
        axes["mask"] = dict(axes["x"])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Exported(prepared, model.calls(), traffic, model.kind == "decoder"), arguments, str(file),
            input_names=names, output_names=["y"], dynamic_axes={**axes, "y": {0: "batch"}}, opset_version=OPSET,
            dynamo=False,
        )  # fmt: skip


class Child:
    """The process with TensorRT. ``ask`` sends a message and waits for its answer."""

    def __init__(self, python: str | None) -> None:
        self._python = python or sys.executable
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        package = str(Path(__file__).resolve().parent.parent.parent)
        # TensorRT 8.6's CUDA runtime loads every kernel at once by default: seconds for each engine.
        variables = {"PYTHONPATH": package}
        lazy = {"CUDA_MODULE_LOADING": "LAZY"}
        if self._python == sys.executable and importlib.util.find_spec("tensorrt_rtx") is not None:
            from hwkern.tensorrt.plugin import rtx_library_folder

            variables["LD_LIBRARY_PATH"] = str(rtx_library_folder())
        for name, value in variables.items():
            variables[name] = os.pathsep.join([value, *filter(None, [os.environ.get(name)])])
        try:
            return subprocess.Popen(
                [self._python, "-m", "hwkern.bench.engine_child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env={**lazy, **os.environ, **variables},
                cwd=tempfile.gettempdir(),  # -m puts it before PYTHONPATH: it may hold another hwkern
            )  # fmt: skip
        except OSError as error:
            raise AbsentError(f"--tensorrt-python {self._python} cannot be started: {error}") from error

    def ask(self, **message: Any) -> dict[str, Any]:
        """The answer. AbsentError when TensorRT is not there, RuntimeError with its words when it fails. A wait that is
        cut short (TimeoutError) ends the process."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError):
                raise AbsentError(f"{self._python} cannot run hwkern's TensorRT process") from error
            raise
        if not line:
            self.close()
            raise RuntimeError(f"the TensorRT process ended at {message['do']!r}")
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise AbsentError(answer["absent"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


class Engines:
    """Exports, engines and the process of one run; files live in a temporary folder."""

    def __init__(self, python: str | None) -> None:
        # A build that is stopped takes its process with it: engines that are ready live in another one.
        self.builder, self.child = Child(python), Child(python)
        self._folder = tempfile.TemporaryDirectory(prefix="hwkern-bench-")
        self.folder = Path(self._folder.name)
        self._files: dict[tuple[Any, ...], Path] = {}
        self._engines: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.version = ""

    def close(self) -> None:
        self.builder.close()
        self.child.close()
        self._folder.cleanup()

    def forget(self) -> None:
        """Between models."""
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()
        self._engines.clear()

    def engine(
        self, path: RunPath, model: Model, exact: nn.Module, workload: settings.Workload,
        wanted: Sequence[settings.Workload], traffic: queueing.Traffic | None, check: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """The engine for a workload: one for all fixed batches, one for each traffic; built on first use."""
        if isinstance(workload, settings.Decode):
            raise AbsentError("decoding with a cache is not exported: TensorRT runs fixed batches and traffic here")
        size = sum(p.numel() * 4 for p in exact.parameters())
        if size > MOST_BYTES:
            raise AbsentError(f"{size / 1e9:.1f} GB of float32 weights: one ONNX file ends at 2 GB")
        key = (path.name, workload.name if traffic is not None else "fixed")
        if key not in self._engines:
            self.version = self.builder.ask(do="hello")["tensorrt"]  # before seconds go into an export
            self._engines[key] = self.builder.ask(
                do="build",
                onnx=str(self._onnx(path, model, exact, traffic is not None, check)),
                precision="fp32" if path.base == "trt-fp32" else "fp16",
                rewrite=path.base == "trt-hwkern",
                profiles=_profiles(model, wanted, traffic),
                cache=str(self.folder / "timing.cache"),
                engine=str(self.folder / f"{len(self._engines)}-{path.base}.engine"),
            )
        return self._engines[key]

    def _onnx(self, path: RunPath, model: Model, exact: nn.Module, traffic: bool, check: Mapping[str, Any]) -> Path:
        quantized = path.base == "trt-int8"
        key = (quantized, traffic)
        if key not in self._files:
            file = self.folder / f"{model.name}-{int(quantized)}{int(traffic)}.onnx"
            export(fake_quantized(exact, check) if quantized else exact, model, check, file, traffic)
            self._files[key] = file
        return self._files[key]


def _profiles(
    model: Model, wanted: Sequence[settings.Workload], traffic: queueing.Traffic | None
) -> list[list[dict[str, list[int]]]]:
    """Each as [min, opt, max], by input name: the fixed shapes themselves; or each length of the traffic with every
    number of rows, tuned for half of the most."""
    if traffic is not None:
        found = []
        for top in traffic.tops:
            shapes = [[rows, top] for rows in (1, max(1, traffic.max_rows // 2), traffic.max_rows)]
            found.append([{"x": shape, "mask": shape} for shape in shapes])
        return found
    fixed = [each for each in wanted if isinstance(each, settings.Fixed)]
    side = int(model.extra.get("side", 0))
    shapes = [[each.rows, 3, side, side] if model.kind == "image" else [each.rows, each.length] for each in fixed]
    return [[{"x": shape}] * 3 for shape in shapes]


class EngineSubject:
    """A TensorRT engine in the other process, with the protocol of a subject."""

    def __init__(self, engines: Engines, engine: Mapping[str, Any]) -> None:
        self._engines, self._engine = engines, engine
        self.weight_bytes = int(engine["engine_bytes"])
        self._device_bytes: int | None = None
        self._traffic: queueing.Traffic | None = None
        self._answer: Tensor | None = None

    def prepare(self, workload: settings.Workload, inputs: Mapping[str, Any], traffic: queueing.Traffic | None) -> None:
        import numpy as np

        self._traffic = traffic
        child, folder = self._engines.child, self._engines.folder
        message: dict[str, Any] = {"do": "prepare", "engine": self._engine["engine"]}
        if traffic is not None:
            found = child.ask(**message, shapes=queueing.grid(traffic))
        else:
            np.savez(folder / "inputs.npz", x=next(iter(inputs.values())).cpu().numpy())
            found = child.ask(**message, inputs=str(folder / "inputs.npz"), output=str(folder / "output.npz"))
            self._answer = torch.from_numpy(np.load(folder / "output.npz")["y"]).float()
        self._device_bytes = found["device_bytes"]

    def block(self, seconds: float) -> Block:
        found = self._ask(do="block", seconds=seconds)
        if self._traffic is None:
            return Block(calls=found["calls"])
        rows = {(r, n): (total, inputs) for r, n, total, inputs in found["table"]}
        return Block(table={k: v[0] for k, v in rows.items()}, inputs={k: v[1] for k, v in rows.items()})

    def _ask(self, **message: Any) -> dict[str, Any]:
        return self._engines.child.ask(**message, engine=self._engine["engine"])

    def output(self) -> Tensor | None:
        return self._answer

    def memory(self) -> dict[str, int | None]:
        # TensorRT takes what it needs when the context is made.
        return {"steady": self._device_bytes, "peak": self._device_bytes}

    def serve(self, requests: Sequence[Sequence[int]], rows: int, length: int) -> tuple[float, float]:
        found = self._ask(do="serve", requests=[list(r) for r in requests], rows=rows, length=length)
        return found["seconds"], found["inputs"]

    def release(self) -> None:
        if self._device_bytes is not None:
            self._device_bytes = None
            self._ask(do="release")
