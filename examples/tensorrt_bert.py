"""From a float ONNX model to an INT8 TensorRT engine that is never slower than FP16: rewrite by plan, build, run.

    python examples/tensorrt_bert.py model.onnx

Needs a GPU, TensorRT (8.6 or newer) and `pip install 'hwkern[onnx]'`. Without an argument a small encoder with random
weights takes the model's place. Without a GPU it ends after the report and the profiles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

import hwkern.tensorrt as ht


def small_encoder(hidden: int = 512, layers: int = 4) -> ModelProto:
    """Feed-forward blocks with residuals: x [batch, length, hidden] → y."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for i in range(layers):
        for name, shape in ((f"up{i}", (hidden, 4 * hidden)), (f"down{i}", (4 * hidden, hidden))):
            value = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            weights.append(numpy_helper.from_array(value, name))
        nodes.append(helper.make_node("MatMul", [x, f"up{i}"], [f"u{i}"], name=f"up{i}"))
        nodes.append(helper.make_node("Relu", [f"u{i}"], [f"r{i}"]))
        nodes.append(helper.make_node("MatMul", [f"r{i}", f"down{i}"], [f"d{i}"], name=f"down{i}"))
        nodes.append(helper.make_node("Add", [x, f"d{i}"], ["y" if i == layers - 1 else f"x{i}"]))
        x = f"x{i}"
    shape = ["batch", "length", hidden]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def requests_for(model: ModelProto, lengths: list[int]) -> list[dict[str, tuple[int, ...]]]:
    """Shapes as traffic would bring them: batches of 1 and 8, some lengths. Replace by a log of your own."""
    found = []
    for batch in (1, 8):
        for length in lengths:
            request = {}
            for value in model.graph.input:
                dims = value.type.tensor_type.shape.dim
                free = iter((batch, length))
                request[value.name] = tuple(d.dim_value or next(free, length) for d in dims)
            found.append(request)
    return found


def main() -> None:
    import onnx

    model = onnx.load(sys.argv[1]) if len(sys.argv) > 1 else small_encoder()
    print(ht.rewrite(model))  # what could be swapped

    profiles = ht.profiles_from(requests_for(model, [16, 32, 64, 128, 256]), max_profiles=2)
    print(profiles)
    try:
        plan = ht.make_plan(model, profiles, "fp16", progress=print)
    except (ImportError, FileNotFoundError, RuntimeError) as error:  # no TensorRT, no plugin, no GPU
        print(f"no plan here, which is made by timing engines: {error}")
        return
    print(plan)

    int8 = ht.rewrite(model, plan=plan).model
    engine = ht.build(int8, profiles, "fp16", path=Path("model.engine"))
    with ht.Runner(engine) as run:
        inputs: dict[str, Any] = {}
        for name, tensor in run.inputs.items():
            shape = run.profiles[0].opt.get(name, tensor.shape)
            inputs[name] = np.ones(shape, tensor.dtype)
        for name, value in run(inputs).items():
            print(name, value.shape, value.dtype)


if __name__ == "__main__":
    main()
