"""The TensorRT paths: the torch model as ONNX, engines built and run in a process of their own.

The process may be another Python (``--tensorrt-python``), since TensorRT and torch need not live in one; and it can be
stopped at the budget's end, which a build inside this process cannot. It speaks JSON lines: see engine_child.py.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwkern import _batches, _native
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
            place = torch.arange(x.shape[1], device=x.device)
            later = place[None, :] > place[:, None]  # not triu: TensorRT 8.6 knows no Trilu
            options["attention_mask"] = (later.float() * -1e4)[None, None]
        found = _batches.main_output(self.module(**{name: x}, **options))
        if not self.pooled:
            return found
        assert attention_mask is not None
        weight = attention_mask.unsqueeze(-1).float()
        return (found * weight).sum(1) / weight.sum(1)


class _ByName(torch.autograd.Function):
    """A linear layer in the exported graph: a node with the layer's name, whose weights come later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, features: int) -> Tensor:
        return x.new_zeros(*x.shape[:-1], features)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, features: int) -> Any:
        found = g.op("hwkern_bench::Linear", x, name_s=name)
        sizes = x.type().sizes()  # None where an axis is dynamic
        if sizes is not None and None not in sizes:
            found.setType(x.type().with_sizes([*sizes[:-1], features]))
        return found


class _Placeholder(nn.Module):
    """Stands for a linear layer while the graph is traced."""

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.name, self.out_features = name, linear.out_features
        self.weight = linear.weight.detach().new_empty(0)  # models look at its dtype

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _ByName.apply(x, self.name, self.out_features)  # type: ignore[no-untyped-call]
        return found


def input_scales(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Linear layer (all but the head) → the scale of its input, absmax / 127 on ``inputs``, for TensorRT's own INT8."""
    from hwkern.bench.paths import linears

    chosen = linears(module)
    largest: dict[str, float] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: largest.__setitem__(
                name, max(largest.get(name, 0.0), float(args[0].abs().max()))
            )
        )
        for name, layer in chosen.items()
    ]
    try:
        with torch.inference_mode():
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: max(absmax, 1e-12) / 127 for name, absmax in largest.items()}


def export(
    module: nn.Module, model: Model, inputs: Mapping[str, Any], file: Path, traffic: bool, fixed: bool = False,
    scales: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write the float32 model as ONNX.

    With a dynamic batch and length, or with the very shape of the inputs (``fixed``), which spares a decoder's graph
    all computing with shapes. ``scales``: with Q/DQ pairs at these layers.

    torch's exporter compares and copies all weights several times, a minute for two gigabytes. So it gets the model
    without the weights of the linear layers, and these are put into its graph.
    """
    if not hasattr(torch.onnx, "export"):
        raise AbsentError("this torch has no ONNX exporter")
    try:
        import onnx
    except ImportError as error:
        raise AbsentError(f"pip install onnx ({error})") from error
    layers = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    prepared = copy.deepcopy(module, {id(layer): _Placeholder(name, layer) for name, layer in layers.items()}).eval()
    config: Any = getattr(prepared, "config", None)
    if config is not None:
        config._attn_implementation = "eager"
    x = next(iter(inputs.values()))
    x = x if fixed else x[:2]
    arguments = (x, torch.ones_like(x)) if traffic else (x,)
    axes = {"x": {0: "batch"}} if model.kind == "image" else {"x": {0: "batch", 1: "length"}}
    names = ["x"]
    if traffic:
        names.append("mask")
        axes["mask"] = dict(axes["x"])
    part = file.with_name(f"{file.name}.{os.getpid()}")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Exported(prepared, model.calls(), traffic, model.kind == "decoder"), arguments, str(part),
            input_names=names, output_names=["y"], dynamic_axes=None if fixed else {**axes, "y": {0: "batch"}},
            opset_version=OPSET, dynamo=False, custom_opsets={"hwkern_bench": 1},
        )  # fmt: skip
    graph = onnx.load(str(part))
    if fixed:
        _fold(graph)
    _put_weights(graph, layers, scales or {})
    if fixed:
        _drop_casts(graph)
    _compile_whole(graph)
    part.write_bytes(graph.SerializeToString())
    part.replace(file)


def _fold(model: Any) -> None:
    """Compute what depends on constants alone (a decoder's mask, the sines of its positions) here: torch's exporter
    leaves it in the graph, and TensorRT 8.6 then compiles kernels for it."""
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found: dict[str, Any] = {}
    nodes = []
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        constant = node.op_type == "Constant" or (inputs and all(name in known for name in inputs))
        if not constant or node.domain or any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            nodes.append(node)
            continue
        values = ReferenceEvaluator(node, opsets={"": OPSET}).run(None, {name: known[name] for name in inputs})
        known |= dict(zip(node.output, values, strict=True))
        found |= dict(zip(node.output, values, strict=True))
    read = {name for node in nodes for name in node.input}
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name in read & found.keys():
        model.graph.initializer.append(numpy_helper.from_array(found[name], name))
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)


def _drop_casts(model: Any) -> None:
    """Casts of a type to itself, which transformers' norms leave in a float32 model."""
    from hwkern.tensorrt.graph import attribute, infer_shapes

    types = infer_shapes(model)
    same: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
        if node.op_type == "Cast" and types.get(node.input[0], (0,))[0] == attribute(node, "to"):
            same[node.output[0]] = node.input[0]
        else:
            nodes.append(node)
    if same.keys().isdisjoint(value.name for value in model.graph.output):
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _compile_whole(model: Any) -> None:
    """Products of two computed tensors as Einsum in a model without a LayerNormalization, for all engines alike.

    Without either TensorRT 8.6 runs a model layer by layer, and the build, which compiles every chain of pointwise
    operators for every memory format, takes minutes (two layers of Llama-3.2-1B: not ready after 80 s). The process
    that builds tries them in turn: see ``ways`` in engine_child.py.
    """
    from onnx import helper

    from hwkern.tensorrt import einsums
    from hwkern.tensorrt.graph import infer_shapes

    if any(node.op_type == "LayerNormalization" for node in model.graph.node):
        return
    products = einsums.find(model.graph, infer_shapes(model))
    for node in model.graph.node:
        if node.op_type == "MatMul" and (rank := products.get(node.name)) is not None:
            batch = "abcdefgh"[: rank - 2]
            node.op_type = "Einsum"
            node.attribute.append(helper.make_attribute("equation", f"{batch}ij,{batch}jk->{batch}ik"))


def _put_weights(model: Any, layers: Mapping[str, nn.Linear], scales: Mapping[str, float]) -> None:
    """Each placeholder becomes a MatMul and an Add, behind Q/DQ pairs where it has a scale."""
    import numpy as np
    from onnx import TensorProto, helper

    graph = model.graph
    nodes: list[Any] = []

    def constant(name: str, value: Tensor | float, kind: int = TensorProto.FLOAT) -> str:
        values = value if isinstance(value, Tensor) else torch.tensor(value)
        array = values.detach().to("cpu").numpy().astype(np.float32 if kind == TensorProto.FLOAT else np.int8)
        graph.initializer.append(helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True))
        return name

    def quantized(what: str, name: str, scale: Tensor | float, axis: int | None = None) -> str:
        zeros = torch.zeros_like(scale) if isinstance(scale, Tensor) else 0.0
        pair = [constant(f"{name}.scale", scale), constant(f"{name}.zero", zeros, TensorProto.INT8)]
        extra: dict[str, Any] = {} if axis is None else {"axis": axis}
        for kind, source, result in (
            ("QuantizeLinear", what, f"{name}.q"), ("DequantizeLinear", f"{name}.q", f"{name}.dq")
        ):  # fmt: skip
            nodes.append(helper.make_node(kind, [source, *pair], [result], f"{name}/{kind}", **extra))
        return f"{name}.dq"

    inputs: dict[str, str] = {}  # layers that share an input share its pair
    for node in graph.node:
        if node.domain != "hwkern_bench":
            nodes.append(node)
            continue
        name = node.attribute[0].s.decode()
        layer, source = layers[name], node.input[0]
        weight = constant(f"{name}.weight", layer.weight.t().contiguous())
        if name in scales:
            if source not in inputs:
                inputs[source] = quantized(source, f"{name}.x", scales[name])
            source = inputs[source]
            weight = quantized(weight, weight, layer.weight.abs().amax(1).clamp_min(1e-12) / 127, axis=1)
        product = node.output[0] if layer.bias is None else f"{name}.product"
        nodes.append(helper.make_node("MatMul", [source, weight], [product], f"{name}/MatMul"))
        if layer.bias is not None:
            bias = constant(f"{name}.bias", layer.bias)
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], f"{name}/Add"))
    del graph.node[:]
    graph.node.extend(nodes)
    for index, opset in enumerate(model.opset_import):
        if opset.domain == "hwkern_bench":
            del model.opset_import[index]
            break


class Child:
    """The process with TensorRT. ``ask`` sends a message and waits for its answer."""

    def __init__(self, python: str | None) -> None:
        self._python = python or sys.executable
        self._process: subprocess.Popen[str] | None = None
        self._unread = 0  # answers to what was told

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

    def tell(self, **message: Any) -> None:
        """Send a message whose answer nobody waits for: the next ``ask`` waits until it is done."""
        with contextlib.suppress(AbsentError, BrokenPipeError):  # the next question finds out
            if self._process is None:
                self._process = self._start()
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            self._unread += 1

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
            while self._unread and process.stdout.readline():
                self._unread -= 1
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
        self._unread = 0
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None


class Engines:
    """Exports, engines and the process of one run; files live in a temporary folder.

    Engines and timing caches that live in ``keep`` serve later runs too: building takes minutes, and the same engine
    gives the same figures. Each has beside it what it was built from, and is taken only for the very same. A file
    ``….building`` with the number of a process says that this process makes the engine just now.
    """

    def __init__(self, python: str | None, keep: Path | None = None, level: int | None = None) -> None:
        # A build that is stopped takes its process with it: engines that are ready live in another one.
        self.builder, self.child = Child(python), Child(python)
        self._folder = tempfile.TemporaryDirectory(prefix="hwkern-bench-")
        self.folder = Path(self._folder.name)
        self.keep = self.folder if keep is None else keep.resolve()
        self.keep.mkdir(parents=True, exist_ok=True)
        self.level = level
        self._files: dict[tuple[Any, ...], Path] = {}
        self._engines: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.version = ""

    def warm(self) -> None:
        """Have the builder's process load TensorRT's kernels meanwhile."""
        self.builder.tell(do="warm")

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
        inputs: Mapping[str, Any], seed: int,
    ) -> dict[str, Any]:  # fmt: skip
        """The engine for a workload: one for all fixed batches (of a decoder, for each), one for each traffic; built on
        first use. ``check``: the batch that Q/DQ scales are calibrated on; ``inputs``: the fixed batch to be timed."""
        if isinstance(workload, settings.Decode):
            raise AbsentError("decoding with a cache is not exported: TensorRT runs fixed batches and traffic here")
        size = sum(p.numel() * 4 for p in exact.parameters())
        if size > MOST_BYTES:
            raise AbsentError(f"{size / 1e9:.1f} GB of float32 weights: one ONNX file ends at 2 GB")
        fixed = model.kind == "decoder"
        part = workload.name if traffic is not None or fixed else "fixed"
        key = (path.base, part)
        if key in self._engines:
            return self._engines[key]
        name = "".join(c if c.isalnum() else "-" for c in f"{model.name}-{part}-{path.base}")
        # Before seconds go into an export. The weights are those that the seed gives, or those of the folder.
        self.version = self.child.ask(do="hello")["tensorrt"]
        built_from = {
            "model": model.name, "size": size, "seed": seed, "path": path.base, "level": self.level,
            "profiles": [] if fixed else _profiles(model, wanted, traffic), "batch": part if fixed else "",
            "tensorrt": self.version, "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            "hwkern": _plugin_digest() if path.base == "trt-hwkern" else "",
        }  # fmt: skip
        recipe, engine = self.keep / f"{name}.json", self.keep / f"{name}.engine"
        _wait_for(self.keep / f"{name}.building")
        kept = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() and engine.is_file() else {}
        if kept.get("built_from") != built_from:
            building = self.keep / f"{name}.building"
            building.write_text(str(os.getpid()), encoding="utf-8")
            try:
                onnx = self._onnx(path, model, exact, part, inputs if fixed else check, traffic is not None, fixed)
                found = self.builder.ask(
                    do="build",
                    onnx=str(onnx),
                    precision="fp32" if path.base == "trt-fp32" else "fp16",
                    rewrite=path.base == "trt-hwkern",
                    profiles=built_from["profiles"],
                    level=self.level,
                    cache=str(self.keep / f"{name}.timing"),
                    engine=str(engine),
                )
                kept = {"built_from": built_from, "found": found}
                recipe.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            finally:
                building.unlink(missing_ok=True)
        self._engines[key] = kept["found"] | {"engine": str(engine)}
        return self._engines[key]

    def _onnx(
        self, path: RunPath, model: Model, exact: nn.Module, part: str, inputs: Mapping[str, Any], traffic: bool,
        fixed: bool,
    ) -> Path:  # fmt: skip
        quantized = path.base == "trt-int8"
        key = (quantized, part)
        if key not in self._files:
            file = self.folder / f"{model.name}-{len(self._files)}.onnx"
            export(exact, model, inputs, file, traffic, fixed, input_scales(exact, inputs) if quantized else None)
            self._files[key] = file
        return self._files[key]


def _wait_for(building: Path) -> None:
    """Until the process that makes an engine is done with it, or is no more."""
    while building.is_file():
        try:
            os.kill(int(building.read_text(encoding="utf-8")), 0)
        except (OSError, ValueError):
            return
        time.sleep(0.2)


def _plugin_digest() -> str:
    """Of the plugin libraries: an engine with hwkern's nodes is of the kernels that it was timed with."""
    digest = hashlib.sha256()
    for library in sorted(_native.tensorrt_plugins().values()):
        digest.update(library.read_bytes())
    return digest.hexdigest()[:16]


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
