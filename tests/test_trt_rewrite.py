"""rewrite: what is found, what it becomes, that onnx's evaluator and ONNX Runtime agree with reference.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_helpers import ELEMENTS, evaluate, hwkern_ops, linear, model, node, normal, run  # noqa: E402

import hwkern.tensorrt as ht  # noqa: E402
from hwkern.nn.pack import quantize_weight as torch_quantize_weight  # noqa: E402
from hwkern.tensorrt import einsums, graph, opdef  # noqa: E402
from hwkern.tensorrt.packing import as_int32, pack, quantize_weight  # noqa: E402
from hwkern.tensorrt.precision import KEPT, convert  # noqa: E402

# Activations go through exp, erf and tanh: hwkern.h grants them 4 float32 ulp of values up to about 8.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 4e-6}


def rewritten(made: Any, **options: Any) -> tuple[Any, Any]:
    """(new model, report); the passed model must not change."""
    before = made.SerializeToString()
    report = ht.rewrite(made, **({"include": "*"} | options))
    assert made.SerializeToString() == before
    onnx.checker.check_model(report.model, full_check=True)
    return report.model, report


def check_both(made: Any, x: Any, wanted: Any, **close: Any) -> None:
    for y in (evaluate(made, {"x": x})[0], run(made, {"x": x})[0]):
        if close:
            np.testing.assert_allclose(y, wanted, **close)
        else:
            np.testing.assert_array_equal(y, wanted)


# ---- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 17), (64, 64), (130, 1000)])
def test_packing_has_the_bits_of_hwkern_patch(dtype: torch.dtype, n: int, k: int) -> None:
    w = torch.randn(n, k)
    w[0] = 0
    w[n // 2, 0] = 1e-42  # a denormal
    w = w.to(dtype)
    as_numpy = w.float().numpy() if dtype == torch.bfloat16 else w.numpy()
    packed, scale = quantize_weight(as_numpy)
    wanted, wanted_scale = torch_quantize_weight(w)
    np.testing.assert_array_equal(packed, wanted.numpy())
    np.testing.assert_array_equal(scale, wanted_scale.numpy())
    np.testing.assert_array_equal(as_int32(packed).view(np.int8), packed)
    np.testing.assert_array_equal(pack(packed[:, :k]), packed)


def test_packing_marks_rows_that_are_not_finite() -> None:
    w = normal(4, 8)
    w[1, 2], w[3, 0] = np.nan, -np.inf
    packed, scale = quantize_weight(w)
    assert np.isnan(scale).tolist() == [False, True, False, True]
    assert not packed[[1, 3]].any()


# ---- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 20, 21, 23])
def test_matmul_and_bias_at_every_opset(opset: int) -> None:
    w, b = normal(50, 33), normal(33, seed=1)
    made = model(
        [node("MatMul", ["x", "w"], ["t"], name="linear"), node("Add", ["b", "t"], ["y"])],
        {"w": w, "b": b}, ("batch", "length", 50), ("batch", "length", 33), opset=opset,
    )  # fmt: skip
    new, report = rewritten(made)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8"]
    assert (report.swapped[0].in_features, report.swapped[0].out_features, report.swapped[0].bias) == (50, 33, True)
    assert [i.name for i in new.graph.input] == ["x"]
    assert [d.dim_param for d in new.graph.input[0].type.tensor_type.shape.dim][:2] == ["batch", "length"]
    assert "w" not in [t.name for t in new.graph.initializer]
    x = normal(2, 5, 50, seed=2)
    x[0, 1] = 0
    check_both(new, x, linear(x, w.T, b))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models(dtype: str) -> None:
    w, b = normal(64, 48).astype(np.float16).astype(np.float32), normal(48, seed=1)
    made = model(
        [node("MatMul", ["x", "w"], ["t"]), node("Add", ["t", "b"], ["y"])],
        {"w": w, "b": b},
        y=("batch", 48),
        dtype=dtype,
    )
    new, report = rewritten(made)
    assert report.swapped[0].dtype == dtype
    x = normal(7, 64).astype(helper.tensor_dtype_to_np_dtype(ELEMENTS[dtype]))
    y = evaluate(new, {"x": x})[0]
    if dtype == "float16":
        check_both(new, x, linear(x, w.T.astype(np.float16), b.astype(np.float16)))
    else:
        half = w.astype(x.dtype).astype(np.float32)
        wanted = linear(x.astype(np.float32), half.T, b.astype(x.dtype).astype(np.float32)).astype(x.dtype)
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(("trans_b", "alpha", "beta"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (1, 0.5, 2.0)])
def test_gemm(trans_b: int, alpha: float, beta: float) -> None:
    w, b = normal(32, 64), normal(32, seed=1)
    made = model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=trans_b, alpha=alpha, beta=beta)],
        {"w": w if trans_b else np.ascontiguousarray(w.T), "b": b}, y=("batch", 32),
    )  # fmt: skip
    new, _ = rewritten(made)
    x = normal(5, 64, seed=3)
    check_both(new, x, linear(x, w * np.float32(alpha), b * np.float32(beta)))


@pytest.mark.parametrize(
    "chain",
    [
        [node("Transpose", ["w"], ["v"], perm=[1, 0])],
        [node("Identity", ["w"], ["u"]), node("Transpose", ["u"], ["v"])],
        [node("Reshape", ["w", "shape"], ["u"]), node("Transpose", ["u"], ["v"], perm=[1, 0])],
        [node("Cast", ["w"], ["u"], to=1), node("Transpose", ["u"], ["v"], perm=[1, 0])],
        [
            node("Unsqueeze", ["w", "axis"], ["t"]),
            node("Squeeze", ["t", "axis"], ["u"]),
            node("Transpose", ["u"], ["v"]),
        ],
        [node("Constant", [], ["u"], value=numpy_helper.from_array(normal(48, 64))), node("Transpose", ["u"], ["v"])],
    ],
)
def test_weights_behind_other_nodes(chain: list[Any]) -> None:
    w = normal(48, 64)
    weights = {"w": w, "shape": np.array([0, -1]), "axis": np.array([0])}
    made = model([*chain, node("MatMul", ["x", "v"], ["y"])], weights, y=("batch", 48))
    new, _ = rewritten(made)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8"]  # the chain had no other reader
    x = normal(3, 64, seed=1)
    check_both(new, x, linear(x, w))


def test_a_weight_with_leading_ones() -> None:
    w = normal(1, 64, 48)
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": w}, ("batch", "length", 64), ("batch", "length", 48))
    new, _ = rewritten(made)
    x = normal(2, 3, 64, seed=1)
    check_both(new, x, linear(x, w[0].T))
    # The product of a matrix with it has a dimension more than the matrix: not this op.
    left = ht.rewrite(model([node("MatMul", ["x", "w"], ["y"])], {"w": w}, y=(1, "batch", 48)), include="*")
    assert "more dimensions" in left.left[0].reason


def test_a_weight_shared_by_two_nodes_is_packed_once() -> None:
    w = normal(64, 64)
    made = model(
        [
            node("MatMul", ["x", "w"], ["t"], name="a"),
            node("Relu", ["t"], ["r"]),
            node("MatMul", ["r", "w"], ["y"], name="b"),
        ],
        {"w": w},
    )
    new, report = rewritten(made, fuse_activation=False)
    first, second = opdef.hwkern_nodes(new)
    assert first.input[1:3] == second.input[1:3]
    assert report.bytes_after < report.bytes_before / 3
    x = normal(4, 64, seed=1)
    check_both(new, x, linear(np.maximum(linear(x, w.T), 0), w.T))


def test_products_of_the_same_x_are_merged() -> None:
    w = {name: normal(64, n, seed=n) for name, n in (("q", 64), ("k", 32), ("v", 48))}
    b = {f"{name}b": normal(v.shape[1], seed=9) for name, v in w.items()}
    nodes = []
    for name in w:
        nodes.append(node("MatMul", ["x", name], [f"{name}t"], name=name))
        nodes.append(node("Add", [f"{name}t", f"{name}b"], [f"{name}y"]))
    nodes.append(node("Concat", ["qy", "ky", "vy"], ["y"], axis=-1))
    made = model(nodes, w | b, y=("batch", 144))
    new, report = rewritten(made)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8", "Split", "Concat"]
    assert all(n.merged == ("q", "k", "v") for n in report.swapped)
    apart, _ = rewritten(made, merge=False)
    assert [n.op_type for n in apart.graph.node].count("LinearInt8") == 3
    x = normal(5, 64, seed=1)
    wanted = np.concatenate([linear(x, w[name].T, b[f"{name}b"]) for name in w], -1)
    check_both(new, x, wanted)
    check_both(apart, x, wanted)


GELU_ERF = [
    node("Div", ["t", "root"], ["a"]), node("Erf", ["a"], ["b1"]), node("Add", ["b1", "one"], ["c"]),
    node("Mul", ["t", "c"], ["d"]), node("Mul", ["d", "half"], ["y"]),
]  # fmt: skip
GELU_ERF_TORCH = [
    node("Mul", ["t", "half"], ["a"]), node("Mul", ["t", "inverse"], ["b1"]), node("Erf", ["b1"], ["c"]),
    node("Add", ["one", "c"], ["d"]), node("Mul", ["a", "d"], ["y"]),
]  # fmt: skip
GELU_TANH = [
    node("Pow", ["t", "three"], ["a"]), node("Mul", ["a", "cubic"], ["b1"]), node("Add", ["t", "b1"], ["c"]),
    node("Mul", ["c", "slope"], ["d"]), node("Tanh", ["d"], ["e"]), node("Add", ["e", "one"], ["f"]),
    node("Mul", ["t", "half"], ["g"]), node("Mul", ["g", "f"], ["y"]),
]  # fmt: skip
CONSTANTS = {
    "root": 2**0.5, "inverse": 0.5**0.5, "one": 1.0, "half": 0.5, "three": 3.0, "cubic": 0.044715,
    "slope": (2 / np.pi) ** 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "nodes", "opset"),
    [
        ("relu", [node("Relu", ["t"], ["y"])], 17),
        ("gelu", GELU_ERF, 17),
        ("gelu", GELU_ERF_TORCH, 17),
        ("gelu", [node("Gelu", ["t"], ["y"])], 20),
        ("gelu_tanh", GELU_TANH, 17),
        ("gelu_tanh", [node("Gelu", ["t"], ["y"], approximate="tanh")], 20),
        ("silu", [node("Sigmoid", ["t"], ["a"]), node("Mul", ["t", "a"], ["y"])], 17),
    ],
)
def test_activations_are_recognised_by_what_they_compute(activation: str, nodes: list[Any], opset: int) -> None:
    w = normal(64, 64, std=0.3)
    constants = {name: np.float32(value) for name, value in CONSTANTS.items()}
    made = model([node("MatMul", ["x", "w"], ["t"]), *nodes], {"w": w} | constants, opset=opset)
    new, report = rewritten(made)
    assert report.swapped[0].activation == activation
    assert [n.op_type for n in new.graph.node] == ["LinearInt8"]
    x = normal(6, 64, seed=1)
    check_both(new, x, linear(x, w.T, activation=activation), **CLOSE)
    apart, _ = rewritten(made, fuse_activation=False)
    assert len(apart.graph.node) == 1 + len(nodes)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Tanh", ["t"], ["y"])],
        [node("Relu", ["t"], ["r"]), node("Add", ["r", "t"], ["y"])],
        [node("Sigmoid", ["t"], ["s"]), node("Mul", ["x", "s"], ["y"])],
        [node("Relu", ["t"], ["r"]), node("Mul", ["r", "half"], ["y"])],
    ],
)
def test_what_only_looks_like_an_activation_stays(nodes: list[Any]) -> None:
    w = normal(64, 64, std=0.3)
    made = model([node("MatMul", ["x", "w"], ["t"]), *nodes], {"w": w, "half": np.float32(0.5)})
    new, _ = rewritten(made)
    x = normal(6, 64, seed=1)
    # The same model with the int8 product in the MatMul's place.
    separate = model([node("Identity", ["z"], ["t"]), *nodes], {"half": np.float32(0.5)})
    separate.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 64]))
    wanted = run(separate, {"x": x, "z": linear(x, w.T)})[0]
    check_both(new, x, wanted, **CLOSE)


def test_an_activation_whose_input_is_an_output_too_stays() -> None:
    made = model([node("MatMul", ["x", "w"], ["t"]), node("Relu", ["t"], ["y"])], {"w": normal(64, 64)})
    made.graph.output.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["batch", 64]))
    new, report = rewritten(made)
    assert report.swapped[0].activation == "none"
    assert [o.name for o in new.graph.output] == ["y", "t"]


def test_a_residual_goes_into_the_node_when_asked() -> None:
    w, b = normal(64, 64), normal(64, seed=1)
    made = model(
        [node("MatMul", ["x", "w"], ["t"]), node("Add", ["t", "b"], ["u"]), node("Add", ["x", "u"], ["y"])],
        {"w": w, "b": b},
    )
    new, report = rewritten(made, fuse_residual=True)
    assert report.swapped[0].residual
    assert [n.op_type for n in new.graph.node] == ["LinearInt8"]
    assert [n.op_type for n in rewritten(made)[0].graph.node] == ["LinearInt8", "Add"]
    x = normal(6, 64, seed=2)
    check_both(new, x, linear(x, w.T, b) + x)


def _norm(x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(epsilon)) * weight
    return y if bias is None else y + bias


def normed_model(opset: int = 17, bias: bool = True, dtype: str = "float32") -> Any:
    """x and x @ v are added and normalized; two products and a residual read the result, a product the sum."""
    norm = ["sum", "g", "h"] if bias else ["sum", "g"]
    nodes = [
        node("MatMul", ["x", "v"], ["skip"], name="before"),
        node("Add", ["x", "skip"], ["sum"]),
        node("LayerNormalization", norm, ["n"], name="norm", epsilon=1e-3),
        node("MatMul", ["n", "w1"], ["a"], name="first"),
        node("MatMul", ["n", "w2"], ["b"], name="second"),
        node("Add", ["a", "b"], ["ab"]),
        node("Add", ["n", "ab"], ["nab"]),
        node("Add", ["nab", "sum"], ["y"]),
    ]
    weights = {name: normal(64, 64, seed=i, std=0.2) for i, name in enumerate(("v", "w1", "w2"))}
    return model(nodes, weights | {"g": normal(64, seed=5), "h": normal(64, seed=6)}, dtype=dtype, opset=opset), weights


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_goes_into_the_products_that_read_it(bias: bool) -> None:
    made, w = normed_model(bias=bias)
    g, h = normal(64, seed=5), normal(64, seed=6) if bias else None
    new, report = rewritten(made, fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8", "NormLinearInt8", "Split", "Add", "Add", "Add"]
    assert [n.norm for n in report.nodes] == ["", "norm", "norm"]
    fused = new.graph.node[1]
    assert opdef.inputs(fused)["skip"] == "skip"
    assert list(fused.output)[1:] == ["n", "sum"]
    assert opdef.attributes(fused)["epsilon"] == np.float32(1e-3)
    assert "norm" in str(report)
    x = normal(6, 64, seed=9)
    total = x + linear(x, w["v"].T)
    n = _norm(total, g, h, 1e-3)
    wanted = n + (linear(n, w["w1"].T) + linear(n, w["w2"].T)) + total
    # The two norms differ in their last bits, so now and then a value is rounded to the next int8: a step is
    # absmax / 127 of a row, times a weight, two products.
    step = 2 * np.abs(n).max() / 127 * max(np.abs(w[name]).max() for name in ("w1", "w2"))
    check_both(new, x, wanted, rtol=1e-5, atol=step)
    assert np.mean(np.abs(run(new, {"x": x})[0] - wanted) > 1e-4) < 0.05


def rms_nodes(square: str = "Pow", inverse: str = "Div", **other: Any) -> list[Any]:
    """x + x @ v, its RMS norm as exporters write it, and a product and a residual that read both."""
    names = {"power": "two", "one": "one", "epsilon": "epsilon", "mean": "m", "h": "s"} | other
    return [
        node("MatMul", ["x", "v"], ["skip"], name="before"),
        node("Add", ["x", "skip"], ["s"]),
        node(square, ["s", names["power"] if square == "Pow" else "s"], ["p"]),
        node("ReduceMean", ["p"], ["m"], axes=[-1], keepdims=1),
        node("Add", [names["mean"], names["epsilon"]], ["e"]),
        node("Sqrt", ["e"], ["r"]),
        node("Div", [names["one"], "r"], ["i"]) if inverse == "Div" else node("Reciprocal", ["r"], ["i"]),
        node("Mul", [names["h"], "i"], ["c"]),
        node("Cast", ["c"], ["cc"], to=TensorProto.FLOAT),
        node("Mul", ["g", "cc"], ["n"], name="norm"),
        node("MatMul", ["n", "w1"], ["a"], name="first"),
        node("Add", ["a", "n"], ["b"]),
        node("Add", ["b", "s"], ["y"]),
    ]


def rms_model(nodes: list[Any]) -> Any:
    weights = {name: normal(64, 64, seed=i, std=0.2) for i, name in enumerate(("v", "w1"))} | {"g": normal(64, seed=5)}
    numbers = {"two": 2.0, "three": 3.0, "one": 1.0, "epsilon": 1e-3, "negative": -1e-3}
    return model(nodes, weights | {name: np.array(v, np.float32) for name, v in numbers.items()}, opset=17)


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("inverse", ["Div", "Reciprocal"])
def test_an_rms_norm_goes_into_the_product_that_reads_it(square: str, inverse: str) -> None:
    made = rms_model(rms_nodes(square, inverse))
    new, report = rewritten(made, fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8", "NormLinearInt8", "Add", "Add"]
    assert [n.norm for n in report.nodes] == ["", "norm"]
    fused = new.graph.node[1]
    assert opdef.attributes(fused)["norm"] == "rms"
    assert opdef.attributes(fused)["epsilon"] == np.float32(1e-3)
    assert (list(fused.input)[:3], list(fused.output)[1:]) == (["x", "skip", "g"], ["n", "s"])
    x = normal(6, 64, seed=9)
    w, v, g = normal(64, 64, seed=1, std=0.2), normal(64, 64, seed=0, std=0.2), normal(64, seed=5)
    total = x + linear(x, v.T)
    n = total / np.sqrt((total * total).mean(-1, keepdims=True) + np.float32(1e-3)) * g
    wanted = linear(n, w.T) + n + total
    # As for the LayerNorm above: a last bit may round a value to the next int8.
    check_both(new, x, wanted, rtol=1e-5, atol=np.abs(n).max() / 127 * np.abs(w).max())
    assert np.mean(np.abs(run(new, {"x": x})[0] - wanted) > 1e-4) < 0.05


@pytest.mark.parametrize(
    "nodes",
    [
        rms_nodes(power="three"),  # not a square
        rms_nodes(one="two"),  # not the inverse of the root
        rms_nodes(epsilon="negative"),
        rms_nodes(h="x"),  # not what was squared
        [*rms_nodes()[:-1], node("Add", ["b", "i"], ["y"])],  # somebody else reads a part of the norm
        [*rms_nodes()[:3], node("ReduceMean", ["p"], ["m"], axes=[0], keepdims=1), *rms_nodes()[4:]],
    ],
)
def test_what_only_looks_like_an_rms_norm_stays(nodes: list[Any]) -> None:
    new, report = rewritten(rms_model(nodes), fuse_norm=True)
    assert [n.norm for n in report.nodes] == ["", ""]
    assert "ReduceMean" in [n.op_type for n in new.graph.node]


def test_norms_between_int8_products_alone() -> None:
    """x → up → + x → norm → down → + → norm → side: the second norm's sum comes from down, which stays float."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="up"), node("Add", ["a", "x"], ["s"]),
        node("LayerNormalization", ["s", "g"], ["n"], name="first"), node("MatMul", ["n", "v"], ["b"], name="down"),
        node("Add", ["b", "n"], ["t"]), node("LayerNormalization", ["t", "g"], ["o"], name="second"),
        node("MatMul", ["o", "u"], ["y"], name="side"),
    ]  # fmt: skip
    weights = {name: normal(512, 512) for name in "wvu"} | {"g": normal(512)}
    made = model(nodes, weights, ("m", 512), ("m", 512))

    def norms(**options: Any) -> list[str]:
        return [n.norm for n in ht.rewrite(made, **options).nodes]

    assert norms(fuse_norm=True) == ["", "first", "second"]
    assert norms(fuse_norm="between") == ["", "first", "second"]
    assert norms(fuse_norm=True, exclude="down") == ["", "", "second"]
    assert norms(fuse_norm="between", exclude="down") == ["", "", ""]
    assert norms(fuse_norm="between", exclude="up") == ["", "", "second"]
    plan = ht.Plan({"up": "w8a8_dynamic", "down": "w8a8_dynamic", "side": "float"}, fuse_norm="between")
    assert norms(plan=plan) == ["", "first", ""]
    with pytest.raises(ValueError, match="fuse_norm is 'never'"):
        ht.rewrite(made, plan={"nodes": {"up": "float"}, "fuse_norm": "never"})  # type: ignore[dict-item]


def test_a_norm_in_half_precision() -> None:
    made, _ = normed_model(dtype="float16")
    new, _ = rewritten(made, fuse_norm=True)
    apart, _ = rewritten(made)
    x = normal(6, 64, seed=9).astype(np.float16)
    a, b = (run(m, {"x": x})[0].astype(np.float32) for m in (new, apart))
    # float16 has 11 bits: an ulp of the norm (|n| < 8: 2⁻⁸) may move a value to the next int8 as above.
    assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_a_norm_and_a_sum_that_nobody_else_reads_are_not_written() -> None:
    nodes = [
        node("Add", ["x", "x"], ["s"]), node("LayerNormalization", ["s", "g"], ["n"]), node("MatMul", ["n", "w"], ["y"])
    ]  # fmt: skip
    new, _ = rewritten(model(nodes, {"w": normal(64, 64), "g": normal(64)}), fuse_norm=True)
    assert [(n.op_type, list(n.output)) for n in new.graph.node] == [("NormLinearInt8", ["y"])]


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([node("LayerNormalization", ["x", "g"], ["n"], axis=0)], {"g": normal(64)}),
        ([node("LayerNormalization", ["x", "g"], ["n", "mean"])], {"g": normal(64)}),
        ([node("LayerNormalization", ["x", "g"], ["n"])], {"g": normal(1)}),
    ],
    ids=["over all dimensions", "its mean is read", "one weight for all"],
)
def test_a_norm_that_the_kernel_does_not_compute_stays(nodes: list[Any], weights: dict[str, Any]) -> None:
    last = [node("MatMul", ["n", "w"], ["y"])]
    made = model([*nodes, *last], weights | {"w": normal(64, 64)}, x=(2, 64), y=(2, 64))
    if len(nodes[0].output) > 1:
        made.graph.output.append(onnx.helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, [2, 1]))
    if nodes[0].attribute:
        made.graph.initializer[0].CopyFrom(numpy_helper.from_array(normal(2, 64), "g"))
    new, _ = rewritten(made, fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["LayerNormalization", "LinearInt8"]


def test_a_sum_with_broadcasting_stays_before_its_norm() -> None:
    nodes = [
        node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), node("Add", ["x", "m"], ["s"]),
        node("LayerNormalization", ["s", "g"], ["n"]), node("MatMul", ["n", "w"], ["y"]),
    ]  # fmt: skip
    new, _ = rewritten(model(nodes, {"w": normal(64, 64), "g": normal(64)}), fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["ReduceMean", "Add", "NormLinearInt8"]


def test_a_sum_that_is_read_before_the_norm_stays() -> None:
    nodes = [
        node("MatMul", ["x", "v"], ["t"]), node("Add", ["x", "t"], ["s"]), node("Relu", ["s"], ["r"]),
        node("LayerNormalization", ["s", "g"], ["n"]), node("MatMul", ["n", "w"], ["u"]),
        node("Add", ["u", "r"], ["y"]),
    ]  # fmt: skip
    new, _ = rewritten(model(nodes, {"w": normal(64, 64), "v": normal(64, 64), "g": normal(64)}), fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["LinearInt8", "Add", "Relu", "NormLinearInt8", "Add"]


def test_the_sum_of_two_products_is_the_residual_of_one() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["x", "v"], ["b"]), node("Add", ["a", "b"], ["y"])
    ]  # fmt: skip
    w, v = normal(64, 64), normal(64, 64, seed=1)
    new, report = rewritten(model(nodes, {"w": w, "v": v}), fuse_residual=True)
    assert [n.residual for n in report.nodes] == [True, False]
    x = normal(6, 64, seed=2)
    check_both(new, x, linear(x, w.T) + linear(x, v.T))


def test_a_residual_and_a_norm_do_not_take_the_same_addition() -> None:
    made, _ = normed_model()
    new, report = rewritten(made, fuse_norm=True, fuse_residual=True)
    assert report.nodes[0].residual
    assert not opdef.attributes(next(n for n in new.graph.node if n.op_type == "NormLinearInt8"))["has_skip"]


def gated_nodes(*act: Any, product: tuple[str, str] = ("h", "u"), **other: str) -> list[Any]:
    """down(activation(gate(x)) · up(x))."""
    return [
        node("MatMul", ["x", "wu"], ["u"], name="up"),
        node("MatMul", [other.get("gate_x", "x"), "wg"], ["g"], name="gate"),
        *(act or (node("Sigmoid", ["g"], ["s"]), node("Mul", ["g", "s"], ["h"]))),
        node("Mul", list(product), ["p"]), node("MatMul", [other.get("down_x", "p"), "wd"], ["y"], name="down"),
    ]  # fmt: skip


def gated_model(nodes: list[Any], dtype: str = "float32", **options: Any) -> Any:
    weights = {name: normal(64, 96, seed=i, std=0.2) for i, name in enumerate(("wg", "wu"))}
    return model(nodes, weights | {"wd": normal(96, 48, seed=2)}, ("m", 64), ("m", 48), dtype=dtype, **options)


@pytest.mark.parametrize("product", [("h", "u"), ("u", "h")])
@pytest.mark.parametrize(
    ("gate", "act"), [("silu", ()), ("gelu", (node("Gelu", ["g"], ["h"]),)), ("relu", (node("Relu", ["g"], ["h"]),))]
)
def test_gate_and_up_are_one_product_for_down_to_split(
    product: tuple[str, str], gate: str, act: tuple[Any, ...]
) -> None:
    new, report = rewritten(gated_model(gated_nodes(*act, product=product), opset=20))
    assert [n.op_type for n in new.graph.node] == ["LinearInt8", "GatedLinearInt8"]
    fused = opdef.attributes(new.graph.node[1])
    assert (fused["gate"], fused["in_features"], fused["out_features"]) == (gate, 96, 48)
    assert [(n.gate, n.activation, n.merged) for n in report.nodes] == [
        ("", "none", ("gate", "up")), ("", "none", ("gate", "up")), (gate, "none", ())
    ]  # fmt: skip
    assert f"gated ({gate})" in str(report)
    x, w = normal(6, 64, seed=9), [normal(64, 96, seed=i, std=0.2).T for i in (0, 1)]
    wanted = linear(linear(x, w[0], activation=gate) * linear(x, w[1]), normal(96, 48, seed=2).T)
    y = run(new, {"x": x})[0]
    # An activation's last bits (CLOSE) may move a value of p to the next int8: one step of a row, times a weight.
    step = np.abs(linear(x, w[0], activation=gate) * linear(x, w[1])).max() / 127 * np.abs(normal(96, 48, seed=2)).max()
    check_both(new, x, wanted, rtol=1e-5, atol=step)
    assert np.mean(np.abs(y - wanted) > 1e-4) < 0.05


def test_a_product_of_two_products_has_the_gate_none() -> None:
    nodes = gated_nodes(node("Neg", ["x"], ["unused"]), product=("g", "u"))
    new, _ = rewritten(gated_model(nodes))
    assert [opdef.attributes(n).get("gate") for n in new.graph.node if opdef.is_hwkern(n)] == [None, "none"]
    x, w = normal(6, 64, seed=9), [normal(64, 96, seed=i, std=0.2).T for i in (0, 1)]
    check_both(new, x, linear(linear(x, w[0]) * linear(x, w[1]), normal(96, 48, seed=2).T))


def test_a_gate_in_half_precision_is_stored_in_it() -> None:
    new, _ = rewritten(gated_model(gated_nodes(), dtype="float16"))
    x, w = (
        normal(6, 64, seed=9).astype(np.float16),
        [normal(64, 96, seed=i, std=0.2).astype(np.float16).T for i in (0, 1)],
    )
    g = linear(x, w[0])
    h = (g.astype(np.float32) / (1 + np.exp(-g.astype(np.float32)))).astype(np.float16)
    wanted = linear(h * linear(x, w[1]), normal(96, 48, seed=2).astype(np.float16).T)
    # silu's last float32 bits may move a stored float16 by one, and its int8 by one.
    assert np.mean(evaluate(new, {"x": x})[0] != wanted) < 0.05


def test_a_norm_before_gate_and_up_goes_into_their_product() -> None:
    nodes = [node("LayerNormalization", ["x", "n"], ["t"]), *gated_nodes()]
    for each in nodes[1:3]:
        each.input[0] = "t"
    made = gated_model(nodes, opset=17)
    made.graph.initializer.append(numpy_helper.from_array(normal(64), "n"))
    new, _ = rewritten(made, fuse_norm=True)
    assert [n.op_type for n in new.graph.node] == ["NormLinearInt8", "GatedLinearInt8"]


@pytest.mark.parametrize(
    ("nodes", "options", "kinds"),
    [
        ([*gated_nodes(), node("Relu", ["p"], ["z"])], {}, ["Mul", "Relu"]),  # somebody else reads the product
        ([*gated_nodes(), node("Relu", ["u"], ["z"])], {}, ["Mul", "Relu"]),  # or one of its factors
        ([node("Relu", ["x"], ["t"]), *gated_nodes(gate_x="t")], {}, ["Relu", "Mul"]),  # of another x
        ([*gated_nodes(node("Relu", ["g"], ["h"]))[:-1], node("Relu", ["p"], ["q"]), gated_nodes(down_x="q")[-1]], {},
         ["Mul", "Relu"]),
        (gated_nodes(node("Relu", ["g"], ["h"]), node("Relu", ["u"], ["v"]), product=("h", "v")), {}, ["Mul"]),
        (gated_nodes(node("Relu", ["g"], ["h"]), product=("h", "h")), {}, ["Mul"]),
        (gated_nodes(), {"exclude": "up"}, ["MatMul", "Mul"]),
        (gated_nodes(), {"merge": False}, ["Mul"]),
        (gated_nodes(), {"fuse_activation": False}, ["Sigmoid", "Mul", "Mul"]),
        (gated_nodes(), {"scheme": "w8a16"}, ["Mul"]),
    ],
)  # fmt: skip
def test_what_is_no_gate_stays(nodes: list[Any], options: dict[str, Any], kinds: list[str]) -> None:
    new, report = rewritten(gated_model(nodes), **options)
    assert [n.gate for n in report.nodes] == [""] * len(report.nodes)
    assert [n.op_type for n in new.graph.node if not opdef.is_hwkern(n) and n.op_type != "Split"] == kinds


def test_subgraphs() -> None:
    """Linears in the branches of an If, with weights of the outer graph and of the branch."""
    outer, inner = normal(64, 64), normal(64, 64, seed=1)
    info = helper.make_tensor_value_info
    branches = [
        helper.make_graph([node("MatMul", ["x", "w"], ["a"], name="outer")], "then", [], [info("a", 1, ["batch", 64])]),
        helper.make_graph(
            [node("MatMul", ["x", "v"], ["b"], name="inner")], "else", [], [info("b", 1, ["batch", 64])],
            [numpy_helper.from_array(inner, "v")],
        ),
    ]  # fmt: skip
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0), node("Greater", ["s", "zero"], ["c"]),
        node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]  # fmt: skip
    new, report = rewritten(model(nodes, {"w": outer, "zero": np.float32(0)}))
    assert {n.name for n in report.swapped} == {"outer", "inner"}
    names = {t.name for g in opdef.graphs(new.graph) for t in g.initializer}
    assert not names & {"w", "v"}
    x = np.abs(normal(3, 64, seed=2))
    check_both(new, x, linear(x, outer.T))
    check_both(new, -x, linear(-x, inner.T))


def test_a_weight_that_others_read_stays_for_them() -> None:
    w = normal(64, 64)
    made = model(
        [node("MatMul", ["x", "w"], ["t"]), node("Add", ["t", "w"], ["y"])],
        {"w": w},
        ("batch", 64, 64),
        ("batch", 64, 64),
    )
    new, _ = rewritten(made)
    assert "w" in [t.name for t in new.graph.initializer]
    x = normal(2, 64, 64, seed=1)
    check_both(new, x, linear(x, w.T) + w)


# ---- Q/DQ ----------------------------------------------------------------------------------------------------------


def qdq_model(symmetric: bool = True, per_channel: bool = True, stored: str = "float") -> tuple[Any, Any, Any]:
    """A linear that somebody else quantized: (model, weight [K, N] on the int8 grid, scale of x)."""
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (64, 48)).astype(np.int8)
    q[0] = 127  # so that quantizing the float weight again gives the same integers
    scales = (rng.random(48, dtype=np.float32) + 0.5) / 64 if per_channel else np.array([0.01], np.float32)
    w = q.astype(np.float32) * scales
    zero = np.int8(0) if symmetric else np.int8(3)
    weights: dict[str, Any] = {"sx": np.float32(0.02), "zx": zero, "sw": scales if per_channel else scales[0]}
    weights["zw"] = np.zeros(48 if per_channel else (), np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]), node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
    ]  # fmt: skip
    if stored == "float":
        weights["w"] = w
        nodes.append(node("QuantizeLinear", ["w", "sw", "zw"], ["wq"], axis=1))
    else:
        weights["wq"] = q
    nodes += [
        node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], axis=1),
        node("MatMul", ["xd", "wd"], ["y"], name="m"),
    ]
    return model(nodes, weights, y=("batch", 48)), w, 0.02


@pytest.mark.parametrize("stored", ["float", "int8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_qdq_becomes_a_static_linear_with_the_same_integers(stored: str, per_channel: bool) -> None:
    made, w, _ = qdq_model(per_channel=per_channel, stored=stored)
    new, report = rewritten(made)
    assert report.swapped[0].scheme == "w8a8_static"
    assert [n.op_type for n in new.graph.node] == ["LinearInt8"]
    x = normal(9, 64, seed=1)
    # Q/DQ in float: x on its grid times w on its grid. The int8 sum is exact; float32 sums of 64 products are not.
    grid = np.clip(np.rint(x / np.float32(0.02)), -127, 127) * np.float32(0.02)
    check_both(new, x, grid @ w, rtol=2e-6, atol=2e-5)


def test_an_asymmetric_input_scale_becomes_dynamic() -> None:
    made, _, _ = qdq_model(symmetric=False)
    new, report = rewritten(made)
    assert report.swapped[0].scheme == "w8a8_dynamic"
    assert hwkern_ops(new)[0]["has_input_scale"] == 0
    with pytest.raises(ValueError, match="must be 'w8a8_dynamic' or 'w8a16'"):
        ht.rewrite(made, scheme="w8a8_static")
    left = ht.rewrite(made, plan={"m": "w8a8_static"})
    assert "asymmetric" in left.left[0].reason


# ---- what stays ----------------------------------------------------------------------------------------------------


def reason(nodes: list[Any], weights: dict[str, Any], **shapes: Any) -> str:
    report = ht.rewrite(model(nodes, weights, **shapes), include="*")
    assert [n.status for n in report.nodes] == ["left"]
    return report.nodes[0].reason


def test_what_is_left_and_why() -> None:
    w = normal(64, 64)
    assert reason([node("MatMul", ["x", "x"], ["y"])], {}, x=(64, 64), y=(64, 64)) == "no constant weight"
    assert reason([node("MatMul", ["w", "x"], ["y"])], {"w": w}, x=(64, 8), y=(64, 8)) == "its constant is on the left"
    assert reason([node("MatMul", ["x", "w"], ["y"])], {"w": w[0]}, y=("batch",)) == "its weight is a vector"
    assert reason([node("MatMul", ["x", "w"], ["y"])], {"w": w}, x=(64,), y=(64,)) == "its input is a vector"
    batch = reason([node("MatMul", ["x", "w"], ["y"])], {"w": normal(3, 64, 8)}, x=(3, 5, 64), y=(3, 5, 8))
    assert batch == "a batch of weights (3, 64, 8)"
    assert "transA" in reason([node("Gemm", ["x", "w"], ["y"], transA=1)], {"w": w}, x=(64, 5), y=(5, 64))
    assert "third input" in reason([node("Gemm", ["x", "w", "x"], ["y"])], {"w": w})
    assert "alpha" in reason([node("Gemm", ["x", "w"], ["y"], alpha=0.0)], {"w": w})
    wide = reason([node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros((2**17, 1), np.float32)}, x=(1, 2**17), y=(1, 1))
    assert "2**17" in wide


def test_small_and_head_are_left_unless_named() -> None:
    made = model([node("MatMul", ["x", "w"], ["y"], name="m")], {"w": normal(64, 64)})
    assert "small" in ht.rewrite(made).left[0].reason
    assert ht.rewrite(made, include="m").swapped
    big = {"w": normal(512, 512)}
    head = model([node("MatMul", ["x", "w"], ["y"], name="/lm_head/MatMul")], big, ("b", 512), ("b", 512))
    assert "head" in ht.rewrite(head).left[0].reason
    nodes = [
        node("Cast", ["x"], ["i"], to=7), node("Gather", ["w", "i"], ["e"]), node("Transpose", ["w"], ["v"]),
        node("MatMul", ["e", "v"], ["y"], name="m"),
    ]  # fmt: skip
    tied = model(nodes, big, ("b", 4), ("b", 4, 512))
    assert "embedding" in ht.rewrite(tied).left[0].reason
    assert ht.rewrite(model([node("MatMul", ["x", "w"], ["y"])], big, ("b", 512), ("b", 512))).swapped


def test_include_exclude_and_plan(tmp_path: Path) -> None:
    weights = {name: normal(64, 64, seed=i) for i, name in enumerate("abc")}
    nodes = [
        node("MatMul", [x, name], [y], name=f"layer.{name}")
        for x, name, y in (("x", "a", "s"), ("s", "b", "t"), ("t", "c", "y"))
    ]
    made = model(nodes, weights)

    def swapped(**options: Any) -> list[str]:
        return [n.name[-1] for n in ht.rewrite(made, **options).swapped]

    assert swapped(include="layer.*") == ["a", "b", "c"]
    assert swapped(include=["layer.a", lambda name: name.endswith("c")]) == ["a", "c"]
    assert swapped(include="*", exclude="*.b") == ["a", "c"]
    plan = {"layer.a": "w8a8_dynamic", "layer.b": "float"}
    assert swapped(plan=plan) == ["a"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"nodes": plan}))
    assert swapped(plan=path) == ["a"]
    assert "does not name it" in ht.rewrite(made, plan=plan).left[1].reason
    for options, text in (
        ({"include": "layer.z"}, "matches no MatMul"),
        ({"exclude": "z"}, "matches no MatMul"),
        ({"plan": {"layer.z": "float"}}, "The plan names 'layer.z'"),
        ({"plan": {"layer.a": "int3"}}, "'int3'"),
        ({"scheme": "int4"}, "scheme = 'int4'"),
    ):
        with pytest.raises(ValueError, match=text):
            ht.rewrite(made, **options)
    with pytest.raises(TypeError, match="must be a name pattern"):
        ht.rewrite(made, include=[3])  # type: ignore[list-item]


def test_weight_only() -> None:
    w = normal(64, 48)
    new, _ = rewritten(model([node("MatMul", ["x", "w"], ["y"])], {"w": w}, y=("batch", 48)), scheme="w8a16")
    packed, scale = quantize_weight(w.T)
    x = normal(5, 64, seed=1)
    # float32 sums of 64 products of ±4 · 127, in an order of the evaluator's own: 64 · 2⁻²⁴ relative to their sizes.
    check_both(new, x, (x @ packed.T.astype(np.float32)) * scale, rtol=1e-5, atol=1e-4)


def test_int32_weights_are_the_same_bytes() -> None:
    w = normal(64, 48)
    made = model([node("MatMul", ["x", "w"], ["y"])], {"w": w}, y=("batch", 48))
    plain, _ = rewritten(made)
    new, _ = rewritten(made, int32_weights=True)
    x = normal(5, 64, seed=1)
    check_both(new, x, linear(x, w.T))
    assert opdef.view_weights_as_int32(plain) == 1
    of = {
        name: {t.name: t for t in m.graph.initializer}[m.graph.node[0].input[1]]
        for name, m in (("a", plain), ("b", new))
    }
    assert of["a"].dims == of["b"].dims == [48, 16]
    np.testing.assert_array_equal(numpy_helper.to_array(of["a"]), numpy_helper.to_array(of["b"]))


def test_a_weight_with_nan_is_refused() -> None:
    w = normal(64, 64)
    w[3, 3] = np.nan
    with pytest.raises(ValueError, match="'w' of m has NaN"):
        ht.rewrite(model([node("MatMul", ["x", "w"], ["y"], name="m")], {"w": w}), include="*")


# ---- files ---------------------------------------------------------------------------------------------------------


def two_layers() -> tuple[Any, Any, Any]:
    w, v = normal(64, 128), normal(128, 64, seed=1)
    nodes = [node("MatMul", ["x", "w"], ["t"]), node("Tanh", ["t"], ["u"]), node("MatMul", ["u", "v"], ["y"])]
    return model(nodes, {"w": w, "v": v}), w, v


def test_data_outside_the_file(tmp_path: Path) -> None:
    made, w, v = two_layers()
    source = tmp_path / "in"
    source.mkdir()
    onnx.save(made, str(source / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=16)
    target = tmp_path / "out" / "m.onnx"
    target.parent.mkdir()
    report = ht.rewrite(source / "m.onnx", target, include="*")
    assert len(report.swapped) == 2
    assert target.with_name("m.onnx.data").is_file()
    assert target.stat().st_size < 2 * 64 * 128  # the packed weights are in the other file
    assert not list(target.parent.glob("*.part"))
    onnx.checker.check_model(str(target))
    x = normal(3, 64, seed=2)
    wanted = linear(np.tanh(linear(x, w.T)), v.T)
    np.testing.assert_allclose(run(str(target), {"x": x})[0], wanted, rtol=1e-5, atol=1e-4)  # tanh differs by an ulp
    half = ht.rewrite(source / "m.onnx", tmp_path / "half.onnx", plan={"t": "w8a8_dynamic", "y": "float"})
    assert len(half.swapped) == 1
    assert run(str(tmp_path / "half.onnx"), {"x": x})[0].shape == (3, 64)


def test_damaged_or_foreign_data_files_are_refused(tmp_path: Path) -> None:
    made, _, _ = two_layers()
    onnx.save(made, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=16)
    data = (tmp_path / "m.data").read_bytes()
    with pytest.raises(ValueError, match="give dst"):
        ht.rewrite(tmp_path / "m.onnx", include="*")
    with pytest.raises(ValueError, match="pass the model's path"):
        ht.rewrite((tmp_path / "m.onnx").read_bytes(), tmp_path / "o.onnx", include="*")
    (tmp_path / "m.data").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="too short"):
        ht.rewrite(tmp_path / "m.onnx", tmp_path / "o.onnx", include="*")
    (tmp_path / "m.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.data"):
        ht.rewrite(tmp_path / "m.onnx", tmp_path / "o.onnx", include="*")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]
    model_with_path = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
    for tensor in model_with_path.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"
    onnx.save(model_with_path, str(tmp_path / "evil.onnx"))
    with pytest.raises(ValueError, match="outside the model's folder"):
        ht.rewrite(tmp_path / "evil.onnx", tmp_path / "o.onnx", include="*")


def test_models_beyond_two_gigabytes_are_not_read_at_once(tmp_path: Path) -> None:
    """A 2.2 GB weight in a sparse data file: nothing but its own rows is in memory, and it ends as 0.55 GB outside."""
    k, n = 8192, 65536
    made = model([node("MatMul", ["x", "w"], ["y"])], {}, ("batch", k), ("batch", n))
    tensor = made.graph.initializer.add()
    tensor.name, tensor.data_type = "w", TensorProto.FLOAT
    tensor.dims.extend([k, n])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", str(4 * k * n))):
        tensor.external_data.add(key=key, value=value)
    with (tmp_path / "w.data").open("wb") as file:
        file.truncate(4 * k * n)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    # Only the graph work, not the quantization of a billion zeros: 20 s that would show nothing more.
    left = ht.rewrite(tmp_path / "m.onnx", tmp_path / "o.onnx", exclude="*")
    assert left.bytes_before == 4 * k * n
    assert left.left[0].in_features == k


@pytest.mark.parametrize("data", [b"", b"not onnx", b"\x08"])
def test_what_is_no_model(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ONNX"):
        ht.rewrite(data)
    with pytest.raises(FileNotFoundError):
        ht.rewrite(tmp_path / "none.onnx")


def test_old_opsets_are_converted() -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["t"]), node("Squeeze", ["t"], ["y"], axes=[1])],
        {"w": normal(64, 64)},
        ("b", 1, 64),
        ("b", 64),
        opset=11,
    )
    new, _ = rewritten(made)
    assert opdef.opset_version(new) == 13
    assert run(new, {"x": normal(2, 1, 64)})[0].shape == (2, 64)


def test_rewriting_twice_changes_nothing() -> None:
    made, _, _ = two_layers()
    new, _ = rewritten(made)
    again = ht.rewrite(new)
    assert again.nodes == []
    assert again.model.SerializeToString() == new.SerializeToString()


def test_report_and_metadata() -> None:
    made, _, _ = two_layers()
    new, report = rewritten(made, exclude="y")
    assert "1 of 2 matrix multiplies" in str(report)
    assert json.loads(report.to_json())["swapped"] == 1
    assert opdef.metadata(new)["nodes"] == {"t": "w8a8_dynamic", "y": "float"}


def test_conversion_to_half_precision_keeps_scales_and_inputs() -> None:
    w, b = normal(64, 64), normal(64, seed=1)
    made = model(
        [
            node("MatMul", ["x", "w"], ["t"]), node("Add", ["t", "b"], ["u"]), node("Softmax", ["u"], ["v"]),
            node("Mul", ["v", "big"], ["y"]),
        ],
        {"w": w, "b": b, "big": np.float32(-3e38)},
    )  # fmt: skip
    new, _ = rewritten(made)
    convert(new, TensorProto.FLOAT16)
    types = {t.name: t.data_type for t in new.graph.initializer}
    linear_node = opdef.hwkern_nodes(new)[0]
    assert types[linear_node.input[1]] == TensorProto.INT8
    assert types[linear_node.input[2]] == TensorProto.FLOAT
    assert types[linear_node.input[3]] == TensorProto.FLOAT16
    assert [v.type.tensor_type.elem_type for v in (*new.graph.input, *new.graph.output)] == [1, 1]
    big = next(t for t in new.graph.initializer if t.name == "big")
    assert numpy_helper.to_array(big) == np.float16(-65504)


def test_what_stays_float32_reads_float32() -> None:
    """Also what no other operator reads: an angle, and the scales of a Resize as a Constant node."""
    scales = numpy_helper.from_array(np.array([1, 1.3333334], np.float32))
    made = model(
        [
            helper.make_node("Constant", [], ["scales"], value=scales),
            node("Mul", ["x", "w"], ["angle"]), node("Cos", ["angle"], ["c"]), node("Sin", ["angle"], ["s"]),
            node("Add", ["c", "s"], ["a"]), node("Resize", ["a", "", "scales"], ["y"], mode="linear"),
        ],
        {"w": np.float32(1.1)}, y=("batch", 85),
    )  # fmt: skip
    convert(made, TensorProto.FLOAT16)
    # Resize's scales are float32 by its definition, which strict inference holds it to.
    types = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True).graph.value_info
    found = {value.name: value.type.tensor_type.elem_type for value in types}
    for each in made.graph.node:
        if each.op_type in KEPT:
            assert {found[name] for name in each.input if name} == {TensorProto.FLOAT}, each.op_type
    assert found["angle"] == TensorProto.FLOAT16
    constant = next(each for each in made.graph.node if each.op_type == "Constant")
    assert numpy_helper.to_array(constant.attribute[0].t)[1] == np.float32(1.3333334)


# ---- models of others ----------------------------------------------------------------------------------------------


def _packaged(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    root = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    return sorted(root.rglob(pattern)) if root else []


OTHERS = {package: _packaged(package, "*.onnx") for package in ("rapidocr_onnxruntime", "magika", "silero_vad")}


@pytest.mark.parametrize("package", OTHERS)
def test_models_of_others_go_through_unharmed(package: str) -> None:
    if not OTHERS[package]:
        pytest.skip(f"{package} is not installed")
    for path in OTHERS[package]:
        feed = _feed(path)
        wanted = run(str(path), feed)
        for options in ({}, {"include": "*"}):
            try:
                report = ht.rewrite(path, **options)  # type: ignore[arg-type]
            except ValueError as error:
                assert "matches no MatMul" in str(error)  # noqa: PT017  (no matrix multiply at all)
                continue
            assert report.model is not None
            assert [v.name for v in report.model.graph.output] == [v.name for v in graph.load(path)[0].graph.output]
            for a, b in zip(wanted, run(report.model, feed), strict=True):
                assert a.shape == b.shape
                if a.size and a.dtype.kind == "f":
                    # int8 keeps about 1 % of each product; these models have a handful in a row.
                    assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(a) + 1e-6, (path.name, options)


def _feed(path: Path) -> dict[str, Any]:
    """Inputs that each of these models takes."""
    rng = np.random.default_rng(0)
    fixed = {"batch": 1, "sequence": 576, "sequence_length": 2}
    feed = {}
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        kind = value.type.tensor_type
        dims = [d.dim_value or fixed.get(d.dim_param, 0) for d in kind.shape.dim]
        if value.name == "x":  # an image
            dims = [1, 3, 64 if "det" in path.name else 48, 192]
        elif value.name == "sr":
            feed["sr"] = np.array(16000, np.int64)
            continue
        elif value.name == "input" and not all(dims):
            dims = [1, 576]
        dims = [d or 1 for d in dims]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind == "f":
            feed[value.name] = (rng.standard_normal(dims) * 0.1).astype(dtype)
        else:
            feed[value.name] = rng.integers(0, 256, dims).astype(dtype)
    return feed


def attention(leading: tuple[str | int, ...] = ("batch", 2)) -> Any:
    """y = (x·W) · xᵀ · x over [batch, heads, length, 512]."""
    nodes = [
        node("MatMul", ["x", "w"], ["q"], name="query"), node("Transpose", ["x"], ["k"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q", "k"], ["s"], name="scores"), node("MatMul", ["s", "x"], ["y"]),
    ]  # fmt: skip
    shape = (*leading, "length", 512)
    return model(nodes, {"w": normal(512, 512)}, shape, shape)


def test_products_of_computed_tensors_become_einsums_and_matmuls_again() -> None:
    made = ht.rewrite(attention()).model
    assert opdef.metadata(made)["products"] == {"scores": 4, "y": 4}
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 512), dtype=np.float32)
    before = made.SerializeToString()
    want = evaluate(made, {"x": x})
    assert einsums.put(made) == 2
    assert [n.op_type for n in made.graph.node] == ["LinearInt8", "Transpose", "Einsum", "Einsum"]
    for got, one in zip(evaluate(made, {"x": x}), want, strict=True):
        np.testing.assert_allclose(got, one, rtol=1e-4, atol=1e-4 * np.abs(one).max())
    einsums.take_back(made)
    assert made.SerializeToString() == before


def test_products_that_a_norm_follows_stay_unless_it_is_in_a_hwkern_node() -> None:
    made = attention()
    made.graph.node[3].output[0] = "o"
    made.graph.node.extend([node("LayerNormalization", ["o", "g"], ["n"]), node("MatMul", ["n", "v"], ["y"])])
    made.graph.initializer.extend(
        onnx.numpy_helper.from_array(normal(*s), n) for n, s in (("g", (512,)), ("v", (512, 512)))
    )
    assert einsums.put(ht.rewrite(made).model) == 0
    assert einsums.put(ht.rewrite(made, fuse_norm=True).model) == 2


def test_what_an_einsum_would_not_broadcast_stays() -> None:
    types = {"a": (1, ("b", 1, "s", 8)), "c": (1, ("b", 4, 8, "s")), "d": (1, (4, 8, 9)), "e": (1, ("u", "v", 8, 9))}
    nodes = [node("MatMul", [left, right], [left + right]) for left, right in ("ac", "ad", "ae", "ce", "aw")]
    graph = onnx.helper.make_graph(nodes, "g", [], [], [onnx.numpy_helper.from_array(normal(8, 8), "w")])
    assert einsums.find(graph, types) == {"ce": 4}  # 4 against a size that is not known, on both sides
