"""The process with TensorRT: builds and times engines for engines.py. ``python -m hwkern.bench.engine_child``.

One JSON object a line on stdin, one answer a line on stdout: ``{"error": text}`` for what fails, ``{"absent": text}``
without TensorRT. Needs TensorRT, numpy and onnx; no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any


def hello() -> dict[str, Any]:
    """Which TensorRT this is."""
    from hwkern.tensorrt import _api

    try:
        return {"tensorrt": str(_api.find())}
    except ImportError as error:
        return {"absent": str(error)}


#: The ways to build one engine where TensorRT 8.6 leaves a choice; the fastest engine is taken. See ``ways``.
WHOLE, LAYERS, NORMS, ATTENTION = "whole", "layers", "norms", "attention"


def ways(model: Any, rewrite: bool) -> list[str]:
    """In which ways a float or Q/DQ model is to be built, by TensorRT 8.6.

    That hands a part of a model to its compiler only for the sake of a layer that nothing else runs: a
    LayerNormalization or an Einsum. engines.py puts Einsum nodes into a model without the former: ``whole`` builds it
    so, ``layers`` without. With hwkern's nodes the attention between them is compiled, or becomes a node too
    (``attention``), and the norms go into the products that read them (so there, and with ``norms``) or not
    (``layers``). No way is always the fastest.
    """
    if not any(node.op_type == "Einsum" for node in model.graph.node):
        return [WHOLE]
    return [ATTENTION, NORMS, LAYERS] if rewrite else [WHOLE, LAYERS]


def variant(model: Any, way: str, rewrite: bool) -> Any:
    """The model for one of its ways; a copy where it differs."""
    if rewrite:
        import hwkern.tensorrt as ht

        fuse_norm = True if way in (ATTENTION, NORMS) else None
        return ht.rewrite(model, fuse_norm=fuse_norm, fuse_attention=way == ATTENTION).model
    if way != LAYERS:
        return model
    made = type(model)()
    made.CopyFrom(model)
    for node in made.graph.node:
        if node.op_type == "Einsum":
            node.op_type = "MatMul"
            del node.attribute[:]
    return made


#: TensorRT's names of the layers that may run in half precision.
HALF_LAYERS = (
    "MATRIX_MULTIPLY", "ELEMENTWISE", "UNARY", "SOFTMAX", "REDUCE",
    "ACTIVATION", "SHUFFLE", "SLICE", "CONCATENATION", "GATHER",
)  # fmt: skip


def prefer_half(trt: Any) -> dict[str, Any]:
    """``edit`` and ``configure`` of hwkern.tensorrt.build for half precision where a layer may have it: what runs layer
    by layer is timed in half as many formats, each of which takes half a second to compile."""
    kinds = {getattr(trt.LayerType, name) for name in HALF_LAYERS}

    def edit(network: Any) -> None:
        int8: set[str] = set()  # what reads it is to run in int8
        for layer in map(network.get_layer, range(network.num_layers)):
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if layer.type == trt.LayerType.DEQUANTIZE:
                int8.update(each.name for each in outputs)
            if layer.type not in kinds or any(each is not None and each.name in int8 for each in inputs):
                continue
            if all(each.dtype == trt.float32 and not each.is_network_output for each in outputs):
                layer.precision = trt.float16
                for i in range(layer.num_outputs):
                    layer.set_output_type(i, trt.float16)

    def configure(config: Any) -> None:
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)

    return {"edit": edit, "configure": configure}


def build(message: dict[str, Any]) -> dict[str, Any]:
    """An engine file from an ONNX file, rewritten with hwkern's nodes if asked; of several ways the fastest engine.

    Each engine that is better than the ones before is saved at once, with what is returned in ``<engine>.found``: who
    is stopped leaves the best that it had.
    """
    import onnx

    import hwkern.tensorrt as ht
    from hwkern.tensorrt import _api, measure

    model: Any = onnx.load(message["onnx"])
    profiles = [
        ht.Profile(*({name: tuple(shape) for name, shape in each.items()} for each in three))
        for three in message["profiles"]
    ]
    api = _api.find()
    choice = ways(model, message["rewrite"]) if api.version < (10,) and not api.rtx else [WHOLE]
    shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim) for value in model.graph.input}
    if message["precision"] != "fp16" or not all(all(shape) for shape in shapes.values()):
        choice = choice[:1]  # without one shape there is no one time
    started = time.perf_counter()
    found: dict[str, Any] = {"engine": message["engine"], "engine_us": {}}
    problems = []
    built: list[list[Any]] = []
    for way in choice:
        made = variant(model, way, message["rewrite"])
        if list(made.graph.node) in built:  # a model without an attention or a norm that can be fused
            continue
        built.append(list(made.graph.node))
        cache = None if api.rtx else message["cache"].replace(".timing", f"-{way}.timing")  # TensorRT-RTX has none
        half = prefer_half(api.module) if way != WHOLE and message["precision"] == "fp16" else {}
        try:
            engine = ht.build(
                made, profiles or None, message["precision"], timing_cache=cache,
                optimization_level=message["level"], **half,
            )  # fmt: skip
        except RuntimeError as error:
            problems.append(error)
            continue
        if len(choice) > 1:
            found["engine_us"][way] = round(measure.engine_us(engine, [shapes], copies=1)[0], 1)
        if found.get("way") is None or found["engine_us"][way] < found["engine_us"][found["way"]]:
            found |= {"way": way, "engine_bytes": len(engine.data)}
            engine.save(message["engine"])
        found["build_s"] = round(time.perf_counter() - started, 1)
        with open(message["engine"] + ".found", "w", encoding="utf-8") as file:
            json.dump(found, file)
    if "way" not in found:
        raise problems[0]
    return found


def warm() -> dict[str, Any]:
    """Make the builder, which takes seconds: TensorRT 8.6 loads 1 GB of kernels for it."""
    from hwkern.tensorrt import _api, builder

    started = time.perf_counter()
    builder._new_builder(_api.find())
    return {"warm_s": round(time.perf_counter() - started, 1)}


class Prepared:
    """One engine, ready for its workload: a fixed batch in a CUDA graph on device memory, or requests from the host."""

    def __init__(self, message: dict[str, Any]) -> None:
        import numpy as np

        from hwkern.tensorrt import _cuda, measure
        from hwkern.tensorrt.builder import Engine
        from hwkern.tensorrt.runner import Runner

        self.context = _cuda.Context()
        with self.context.current():
            free, _ = _cuda.memory_info()
        self.shapes = [(int(rows), int(length)) for rows, length in message.get("shapes", [])]
        engine = Engine.load(message["engine"])
        if self.shapes:
            self.runner = Runner(engine, graphs=len(self.shapes) + 1)
            for rows, length in self.shapes:
                for _ in range(3):  # enqueued, captured, replayed
                    self.serve([[11] * length] * rows, rows, length)
        else:
            copies = measure.Copies(engine, 1)
            self.runner = copies.runners[0]
            x = np.load(message["inputs"])["x"]
            x = np.ascontiguousarray(x.astype(self.runner.inputs["x"].dtype))
            np.savez(message["output"], y=self.runner({"x": x})["y"].astype(np.float32))
            with self.context.current():
                (enqueue,), self._alive = copies.enqueues({"x": x.shape}, {"x": x.tobytes()})
                self.stream = _cuda.Stream()
                for _ in range(3):  # whatever is lazy happens before the capture
                    enqueue(self.stream.value)
                _cuda.synchronize(self.stream.value)
                _cuda.begin_capture(self.stream.value)
                try:
                    enqueue(self.stream.value)
                finally:
                    self.graph = _cuda.end_capture(self.stream.value)
        with self.context.current():
            self.device_bytes = free - _cuda.memory_info()[0]

    def calls(self, seconds: float) -> list[float]:
        """Seconds of each call, at least one, for about so long."""
        from hwkern.tensorrt import _cuda

        found: list[float] = []
        with self.context.current():
            until = time.perf_counter() + seconds
            while not found or time.perf_counter() < until:
                start = time.perf_counter()
                self.graph.launch(self.stream.value)
                _cuda.synchronize(self.stream.value)
                found.append(time.perf_counter() - start)
        return found

    def table(self, seconds: float) -> list[tuple[int, int, float, float]]:
        """(rows, length, seconds, of these before the engine's turn) of every shape: see traffic.measured."""
        from hwkern.bench.traffic import measured

        found = measured(self.shapes, self.serve, seconds)
        return [(rows, length, *times) for (rows, length), times in found.items()]

    def serve(self, requests: Sequence[Sequence[int]], rows: int, length: int) -> tuple[float, float]:
        """From lists of ids to the embeddings on the host: seconds, and those before the engine's turn."""
        import numpy as np

        start = time.perf_counter()
        x = np.zeros((rows, length), self.runner.inputs["x"].dtype)
        mask = np.zeros((rows, length), self.runner.inputs["mask"].dtype)
        for i, ids in enumerate(requests):
            x[i, : len(ids)] = ids
            mask[i, : len(ids)] = 1
        mask[len(requests) :] = 1
        prepared = time.perf_counter() - start
        self.runner({"x": x, "mask": mask})
        return time.perf_counter() - start, prepared

    def close(self) -> None:
        """Free the engine and its memory."""
        from hwkern.tensorrt import measure

        if not self.shapes:
            with self.context.current():
                measure.free(self._alive)
                self.graph.free()
                self.stream.free()
            self._alive = []
        self.runner.close()


class Server:
    """Answers messages; keeps prepared engines by their files."""

    def __init__(self) -> None:
        self._prepared: dict[str, Prepared] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to one message. KeyError for a message without a known ``do``."""
        do, engine = message["do"], message.get("engine", "")
        if do == "hello":
            return hello()
        if do == "warm":
            return warm()
        if do == "build":
            return build(message)
        if do == "prepare":
            self._prepared[engine] = Prepared(message)
            return {"device_bytes": self._prepared[engine].device_bytes}
        if do == "release":
            if engine in self._prepared:
                self._prepared.pop(engine).close()
            return {}
        prepared = self._prepared[engine]
        if do == "serve":
            seconds, inputs = prepared.serve(message["requests"], message["rows"], message["length"])
            return {"seconds": seconds, "inputs": inputs}
        if do == "block":
            if prepared.shapes:
                return {"table": prepared.table(message["seconds"])}
            return {"calls": prepared.calls(message["seconds"])}
        raise KeyError(do)


def main() -> None:
    """Answer until stdin ends."""
    # TensorRT prints to stdout: answers get a descriptor of their own, and everything else goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        server = Server()
        with _kept_builder():
            for line in sys.stdin:
                try:
                    answer = server.answer(json.loads(line))
                except ImportError as error:
                    answer = {"absent": str(error)}
                except Exception as error:  # the parent decides what to do about it
                    text = (str(error).strip().splitlines() or ["no text"])[0]
                    answer = {"error": f"{type(error).__name__}: {text}"}
                out.write(json.dumps(answer) + "\n")
                out.flush()


def _kept_builder() -> contextlib.AbstractContextManager[None]:
    """One builder for all engines of the process; nothing without what it needs."""
    try:
        from hwkern.tensorrt.builder import keep_builder
    except ImportError:  # the first message says so
        return contextlib.nullcontext()
    return keep_builder()


if __name__ == "__main__":
    main()
