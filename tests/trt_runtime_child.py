"""Runs in a process of its own (test_trt_runtimes.py): one of NVIDIA's TensorRT packages with the plugin library.

``trt_runtime_child.py MODULE LIBRARY CHECK``; a failed assertion or a crash is the parent's failure.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any

import numpy as np

STATE = b"HWKT"


def text(value: bytes) -> Any:
    return np.frombuffer(value, np.int8)


def fields(trt: Any, **values: Any) -> Any:
    """A PluginFieldCollection: int, bytes (a text) or an array of bytes (a state)."""
    made = []
    for name, value in values.items():
        if isinstance(value, int):
            made.append(trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32))
        elif isinstance(value, bytes):
            made.append(trt.PluginField(name, text(value), trt.PluginFieldType.CHAR))
        else:
            made.append(trt.PluginField(name, value, trt.PluginFieldType.UNKNOWN))
    return trt.PluginFieldCollection(made)


def load_v3(trt: Any, library: str) -> Any:
    registry = trt.get_plugin_registry()
    assert registry.load_library(library) is not None
    names = {
        (c.name, c.plugin_namespace, c.plugin_version) for c in registry.all_creators if c.plugin_namespace == "hwkern"
    }
    assert {("LinearInt8", "hwkern", "1"), ("Quantize", "hwkern", "1")} <= names, names
    return registry


def create_v3(trt: Any, library: str) -> None:
    creator = load_v3(trt, library).get_creator("LinearInt8", "1", "hwkern")
    build, run = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME
    good = {"in_features": 100, "has_bias": 1, "scheme": b"w8a8_dynamic", "activation": b"gelu\0"}
    assert creator.create_plugin("node", fields(trt, **good), build) is not None
    for bad in ({}, {"in_features": -1}, {"in_features": 2**17}, {"in_features": 64, "scheme": b"w4a4"}):
        assert creator.create_plugin("node", fields(trt, **bad), build) is None, bad
    for state in (b"", STATE, STATE + bytes(44), bytes(48), STATE * 12, bytes(range(200))):
        data = np.frombuffer(state, np.uint8)
        assert creator.create_plugin("node", fields(trt, hwkern_state=data), run) is None, state
    print("created and refused in", trt.__version__)


def load_by_name(trt: Any, library: str) -> None:
    """hwkern.tensorrt.load_plugin under every name that a TensorRT module has, and without one; again is fine."""
    import hwkern.tensorrt as ht
    from hwkern.tensorrt import _api, plugin

    sys.modules["tensorrt_lean"] = trt  # what pip's package of that name imports; its wheel needs one of several others
    found = _api.find("tensorrt_lean")
    assert not plugin.is_loaded(found)
    assert str(ht.load_plugin("tensorrt_lean")) == library
    assert plugin.is_loaded(found)
    for name in ("tensorrt", "tensorrt_bindings"):
        sys.modules[name] = trt
    for again in ("tensorrt", "tensorrt_bindings", trt.__name__, trt, None):
        assert str(ht.load_plugin(again)) == library, again
    listed = [c.name for c in trt.get_plugin_registry().all_creators if c.plugin_namespace == "hwkern"]
    assert len(listed) == len(set(listed)), listed
    print("loaded once in", trt.__version__)


def create_v2(trt: Any, library: str) -> None:
    plugin = ctypes.CDLL(library)
    registry = trt.get_plugin_registry()
    assert plugin.hwkern_trt8_register() == 1
    assert plugin.hwkern_trt8_register() == 1, "again is fine"
    listed = [(c.name, c.plugin_namespace) for c in registry.plugin_creator_list if c.plugin_namespace == "hwkern"]
    assert {("LinearInt8", "hwkern"), ("Quantize", "hwkern")} <= set(listed), listed
    creator = registry.get_plugin_creator("LinearInt8", "1", "hwkern")
    made = creator.create_plugin("node", fields(trt, in_features=100, scheme=b"w8a8_dynamic", has_bias=1))
    assert made.plugin_type == "LinearInt8"
    assert made.num_outputs == 1
    state = bytes(made.serialize())
    assert state.startswith(STATE)
    assert bytes(creator.deserialize_plugin("node", state).serialize()) == state
    good = creator.deserialize_plugin("node", state)
    assert good.initialize() == 0
    cut = [state[:length] for length in range(len(state))]
    changed = [state[:at] + bytes([state[at] ^ 1]) + state[at + 1 :] for at in range(len(state))]
    for damaged in (*cut, *changed):  # 8.6 would crash on a null pointer: it gets a plugin that does not start
        assert creator.deserialize_plugin("node", damaged).initialize() != 0
        assert creator.deserialize_plugin("node", damaged).clone().initialize() != 0
    for bad in ({"in_features": -1}, {"in_features": 64, "activation": b"mish"}):
        assert creator.create_plugin("node", fields(trt, **bad)) is None
    print("created and refused in", trt.__version__)


def load_library_8(trt: Any, library: str) -> bool:
    """IPluginRegistry::loadLibrary, the way of trtexec --dynamicPlugins."""
    nvinfer = ctypes.CDLL("libnvinfer.so.8")
    if nvinfer.getInferLibVersion() != 8600:
        return trt.get_plugin_registry().load_library(library) is not None
    # NOTE: the registry of 8.6.0 has its virtual functions in another order than 8.6.1's headers and bindings, whose
    # load_library calls something else there. Its loadLibrary is the sixth.
    nvinfer.getPluginRegistry.restype = ctypes.c_void_p
    registry = ctypes.c_void_p(nvinfer.getPluginRegistry())
    functions = ctypes.cast(registry, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
    load = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(functions[5])
    return load(registry, library.encode()) is not None


def load_v2(trt: Any, library: str) -> None:
    registry = trt.get_plugin_registry()
    assert load_library_8(trt, library)
    listed = [(c.name, c.plugin_namespace) for c in registry.plugin_creator_list if c.plugin_namespace == "hwkern"]
    assert {("LinearInt8", "hwkern"), ("Quantize", "hwkern")} <= set(listed), listed
    print("loaded in", trt.__version__)


# ---- TensorRT-RTX builds engines without a GPU -----------------------------------------------------------------------


def model(dtype: int, k: int = 100, n: int = 64, int32: bool = False, **attributes: Any) -> bytes:
    """x [B, S, K] → LinearInt8 → Relu → LinearInt8 static → y [B, S, N]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    values = {"one": np.array([0.02], np.float32)}
    for name, columns in (("1", k), ("2", n)):
        weight = np.zeros((n, -(-columns // 16) * 16), np.int8)
        weight[:, :columns] = generator.integers(-127, 128, (n, columns))
        values["w" + name] = weight.view(np.int32) if int32 else weight
        values["s" + name] = generator.random(n, np.float32)
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    constants.append(helper.make_tensor("bias", dtype, [n], np.ones(n)))
    common = {"plugin_namespace": "hwkern", "plugin_version": "1", "domain": "hwkern", "has_residual": 0}
    common |= {"activation": "none", "out_features": n, "config": -1, "constant_weights": 1}
    dynamic = {"in_features": k, "scheme": "w8a8_dynamic", "has_bias": 1, "has_input_scale": 0} | common | attributes
    static = {"in_features": n, "scheme": "w8a8_static", "has_bias": 0, "has_input_scale": 1} | common
    nodes = [
        helper.make_node("LinearInt8", ["x", "w1", "s1", "bias"], ["h"], **dynamic),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("LinearInt8", ["r", "w2", "s2", "one"], ["y"], **static),
    ]
    graph = helper.make_graph(
        nodes,
        "two layers",
        [helper.make_tensor_value_info("x", dtype, ["B", "S", k])],
        [helper.make_tensor_value_info("y", dtype, ["B", "S", n])],
        constants,
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("hwkern", 1)]
    assert dtype in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return bytes(helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()) if onnx else b""


def build(trt: Any, data: bytes, k: int = 100) -> bytes | None:
    """An engine for four compute capabilities with two profiles, or None."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        return None
    config = builder.create_builder_config()
    for shapes in ([(1, 1), (1, 16), (2, 32)], [(2, 1), (8, 64), (16, 128)]):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((b, s, k) for b, s in shapes))
        config.add_optimization_profile(profile)
    targets = ("SM80", "SM86", "SM89", "SM120")
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        assert config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    engine = builder.build_serialized_network(network, config)
    return None if engine is None else bytes(engine)


def engines(trt: Any, library: str) -> None:
    from onnx import TensorProto

    load_v3(trt, library)
    for dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT):
        for int32 in (False, True):
            engine = build(trt, model(dtype, int32=int32))
            assert engine is not None, (dtype, int32)
            assert engine.count(STATE) >= 2, "the state of both layers"
            print("engine", TensorProto.DataType.Name(dtype), len(engine), "bytes")


def norm_engine(trt: Any, library: str) -> None:
    """x → NormLinearInt8 with a skip and all its outputs."""
    from onnx import TensorProto, helper, numpy_helper

    if load_v3(trt, library).get_creator("NormLinearInt8", "1", "hwkern") is None:
        print("no NormLinearInt8 in this build")
        return
    k, n, half = 100, 64, np.float16
    values = {"g": np.ones(k, half), "b": np.zeros(k, np.float32), "w": np.ones((n, 112), np.int8)}
    values |= {"s": np.ones(n, np.float32)}
    flags = dict.fromkeys(("has_bias", "has_input_scale", "has_residual"), 0)
    flags |= dict.fromkeys(("has_norm_bias", "has_skip", "has_norm_output", "has_sum_output"), 1)
    node = helper.make_node(
        "NormLinearInt8", ["x", "x", *values], ["y", "normed", "sum"], domain="hwkern", plugin_namespace="hwkern",
        plugin_version="1", in_features=k, out_features=n, scheme="w8a8_dynamic", activation="none", config=-1,
        constant_weights=1, norm="layer", epsilon=1e-12, norm_offset=0.0, **flags,
    )  # fmt: skip
    outputs = [("y", n), ("normed", k), ("sum", k)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["B", "S", size]) for name, size in outputs]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B", "S", k])
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("hwkern", 1)]
    graph = helper.make_graph([node], "g", [x], infos, constants)
    engine = build(trt, helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString())
    assert engine is not None
    assert STATE in engine
    print("engine with NormLinearInt8:", len(engine), "bytes")


def attention_engine(trt: Any, library: str) -> None:
    """x → Attention, whose output has a dimension that no input has."""
    from onnx import TensorProto, helper

    load_v3(trt, library)
    heads, kv_heads, dim = 4, 2, 64
    k = (heads + 2 * kv_heads) * dim
    node = helper.make_node(
        "Attention", ["x"], ["y"], domain="hwkern", plugin_namespace="hwkern", plugin_version="1", heads=heads,
        kv_heads=kv_heads, head_dim=dim, scale=0.125, causal=1, has_rotary=0, has_mask=0,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B", "S", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["B", "S", heads * dim])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("hwkern", 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    engine = build(trt, helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString(), k)
    assert engine is not None
    assert STATE in engine
    print("engine with Attention:", len(engine), "bytes")


def refusals(trt: Any, library: str) -> None:
    from onnx import TensorProto

    load_v3(trt, library)
    for wrong in ({"in_features": 116}, {"in_features": -3}, {"has_bias": 0}, {"out_features": 65}, {"scheme": "w4a4"}):
        assert build(trt, model(TensorProto.FLOAT16, **wrong)) is None, wrong
    assert build(trt, model(TensorProto.FLOAT16)) is not None, "the process still works"
    print("refused")


if __name__ == "__main__":
    module, path, check = sys.argv[1:]
    globals()[check](importlib.import_module(module), path)
