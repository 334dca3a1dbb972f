"""Attention as one node: what rewrite finds, and that the node computes what the graph did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_helpers import ELEMENTS, evaluate, node, normal, run  # noqa: E402

import hwkern.tensorrt as ht  # noqa: E402
from hwkern import reference  # noqa: E402
from hwkern.tensorrt import attention, opdef, planner  # noqa: E402
from hwkern.tensorrt.precision import convert  # noqa: E402

BATCH, LENGTH, WIDTH, DIM = 2, 10, 48, 64


class Graph:
    """An attention over x [B, L, WIDTH], written in one of exporters' ways."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, dim: int = DIM, length: int = LENGTH) -> None:
        self.heads, self.kv_heads, self.dim, self.length = heads, kv_heads, dim, length
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.inputs = {"x": (TensorProto.FLOAT, [BATCH, length, WIDTH])}

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"t{len(self.nodes)}"
        self.nodes.append(node(kind, list(inputs), [output], name=f"{kind}.{output}", **attributes))
        return output

    def const(self, name: str, value: Any, kind: Any = np.float32) -> str:
        self.weights[name] = np.asarray(value, kind)
        return name

    def ints(self, *values: int) -> str:
        return self.const("i" + "_".join(map(str, values)), values, np.int64)

    def project(self, name: str, heads: int, x: str = "x") -> str:
        """[B, L, heads, dim] of a product."""
        size = heads * self.dim
        weight = self.const(f"w{name}", normal(WIDTH, size, seed=len(self.weights), std=0.2))
        y = self.op("Add", self.op("MatMul", x, weight), self.const(f"b{name}", normal(size, seed=90)), name=name)
        return self.op("Reshape", y, self.ints(0, 0, heads, self.dim))

    def heads_of(self, name: str, heads: int, **rotary: Any) -> str:
        x = self.op("Transpose", self.project(name, heads), perm=[0, 2, 1, 3])
        return self.rotated(x, **rotary) if rotary else x

    def rotated(self, x: str, half: int | None = None, sign: str = "Neg") -> str:
        half, angle = half or self.dim // 2, normal(self.length, self.dim, seed=7)
        tables = [self.const(f, value[None, None]) for f, value in (("cos", np.cos(angle)), ("sin", np.sin(angle)))]
        low = self.op("Slice", x, self.ints(0), self.ints(half), self.ints(3), self.ints(1))
        high = self.op("Slice", x, self.ints(half), self.ints(2**62), self.ints(3), self.ints(1))
        crossed = self.op("Concat", self.op(sign, high), low, axis=-1)
        return self.op("Add", self.op("Mul", x, tables[0]), self.op("Mul", crossed, tables[1]))

    def repeated(self, x: str) -> str:
        groups = self.heads // self.kv_heads
        shape = self.ints(BATCH, self.kv_heads, groups, self.length, self.dim)
        x = self.op("Expand", self.op("Unsqueeze", x, self.ints(2)), shape)
        return self.op("Reshape", x, self.ints(BATCH, self.heads, self.length, self.dim))

    def causal(self, hidden: float = -1e4) -> str:
        return self.const("causal", np.triu(np.full((self.length,) * 2, hidden), 1)[None, None])

    def attend(self, q: str, k: str, v: str, mask: str = "", scale: str = "Mul", transposed: bool = False) -> str:
        k = k if transposed else self.op("Transpose", k, perm=[0, 1, 3, 2])
        root = math.sqrt(self.dim)
        if scale == "both":  # as torch's scaled_dot_product_attention is exported
            by = self.const("by", root**-0.5)
            q, k = self.op("Mul", q, by), self.op("Mul", by, k)
        scores = self.op("MatMul", q, k)
        if scale != "both":
            scores = self.op(scale, scores, self.const("root", root if scale == "Div" else 1 / root))
        if mask:
            scores = self.op("Add", scores, mask)
        context = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        joined = self.op("Transpose", context, perm=[0, 2, 1, 3])
        return self.op("Reshape", joined, self.ints(0, 0, self.heads * self.dim), name="heads")

    def model(self, y: str = "heads", opset: int = 17, dtype: str = "float32") -> Any:
        out = self.const("wo", normal(self.heads * self.dim, 32, seed=99, std=0.2))
        self.op("MatMul", y, out, name="y")
        element = ELEMENTS[dtype]
        inputs = [
            helper.make_tensor_value_info(name, element if kind == TensorProto.FLOAT else kind, shape)
            for name, (kind, shape) in self.inputs.items()
        ]
        kinds = {np.dtype(np.float32): helper.tensor_dtype_to_np_dtype(element)}
        weights = [numpy_helper.from_array(v.astype(kinds.get(v.dtype, v.dtype)), n) for n, v in self.weights.items()]
        graph = helper.make_graph(
            self.nodes, "g", inputs, [helper.make_tensor_value_info("y", element, [BATCH, self.length, 32])], weights
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def plain(**options: Any) -> Graph:
    graph = Graph()
    q, k, v = (graph.heads_of(name, 4) for name in "qkv")
    graph.attend(q, k, v, **options)
    return graph


def llama() -> Graph:
    """Shared heads, rotary embedding, a constant causal mask."""
    graph = Graph(heads=4, kv_heads=2)
    q, k = (graph.heads_of(name, heads, half=32) for name, heads in (("q", 4), ("k", 2)))
    v = graph.heads_of("v", 2)
    graph.attend(q, graph.repeated(k), graph.repeated(v), mask=graph.causal())
    return graph


def bert() -> Graph:
    """Keys transposed with their heads in one step; a mask that is computed."""
    graph = Graph()
    graph.inputs["mask"] = (TensorProto.FLOAT, [BATCH, 1, 1, LENGTH])
    q, v = graph.heads_of("q", 4), graph.heads_of("v", 4)
    k = graph.op("Transpose", graph.project("k", 4), perm=[0, 2, 3, 1])
    graph.attend(q, k, v, mask=graph.op("Mul", "mask", graph.const("hidden", -1e4)), transposed=True)
    return graph


def einsum() -> Graph:
    graph = plain()
    for each in graph.nodes:
        if each.op_type == "MatMul" and not each.input[1].startswith("w"):
            each.op_type = "Einsum"
            each.attribute.append(helper.make_attribute("equation", "abij,abjk->abik"))
    return graph


def feeds(made: Any, dtype: str = "float32") -> dict[str, Any]:
    found = {}
    for value in made.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        x = (np.arange(LENGTH) > 6) * np.ones(shape) if value.name == "mask" else normal(*shape, seed=3)
        found[value.name] = x.astype(helper.tensor_dtype_to_np_dtype(ELEMENTS[dtype]))
    return found


def both(made: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(the model with attention apart, fused, the report)."""
    apart = ht.rewrite(made, include="*", **options).model
    report = ht.rewrite(made, include="*", fuse_attention=True, **options)
    onnx.checker.check_model(report.model, full_check=True)
    return apart, report.model, report


@pytest.mark.parametrize(
    ("graph", "flags"),
    [
        (plain(), (4, 4, 0, 0, 0)), (plain(scale="Div"), (4, 4, 0, 0, 0)), (plain(scale="both"), (4, 4, 0, 0, 0)),
        (llama(), (4, 2, 1, 1, 0)), (bert(), (4, 4, 0, 0, 1)), (einsum(), (4, 4, 0, 0, 0)),
    ],
    ids=["plain", "divided", "scaled on both sides", "llama", "bert", "einsum"],
)  # fmt: skip
def test_an_attention_becomes_one_node_that_computes_the_same(graph: Graph, flags: tuple[int, ...]) -> None:
    made = graph.model()
    apart, fused, report = both(made)
    kinds = [n.op_type for n in fused.graph.node if opdef.is_hwkern(n)]
    assert kinds == ["LinearInt8", "Attention", "LinearInt8"]
    assert {n.op_type for n in fused.graph.node if not opdef.is_hwkern(n)} <= {"Mul"}  # what makes bert's mask
    assert (report.attentions, "1 attentions are one node each" in str(report)) == (["heads"], True)
    found = opdef.attributes(next(n for n in fused.graph.node if n.op_type == "Attention"))
    names = ("heads", "kv_heads", "causal", "has_rotary", "has_mask")
    assert tuple(found[name] for name in names) == flags
    assert found["scale"] == pytest.approx(1 / 8)
    feed = feeds(made)
    wanted = evaluate(apart, feed)[0]
    for y in (evaluate(fused, feed)[0], run(fused, feed)[0]):
        # Sums in another order move a value to the next int8 now and then: a step of a row, times a weight.
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=0.05)
        assert np.mean(np.abs(y - wanted) > 1e-4) < 0.05


def test_products_that_are_merged_already_come_in_the_attentions_order() -> None:
    graph = Graph()
    v, k, q = (graph.heads_of(name, 4) for name in "vkq")
    graph.attend(q, k, v)
    made = graph.model()
    apart, fused, _ = both(made)
    product = next(n for n in fused.graph.node if n.op_type == "LinearInt8")
    merged = numpy_helper.to_array(next(t for t in fused.graph.initializer if t.name == product.input[2]))
    weights = [np.abs(graph.weights[f"w{name}"]).max(0) / np.float32(127) for name in "qkv"]
    np.testing.assert_allclose(merged, np.concatenate(weights), rtol=1e-6)
    feed = feeds(made)
    np.testing.assert_allclose(run(fused, feed)[0], evaluate(apart, feed)[0], rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_models(dtype: str) -> None:
    made = llama().model(dtype=dtype)
    _, fused, report = both(made)
    assert report.attentions == ["heads"]
    tables = {t.name: t.data_type for t in fused.graph.initializer if t.name.endswith("_table")}
    assert sorted(tables.values()) == [TensorProto.FLOAT] * 2
    single = llama().model()
    y = evaluate(fused, feeds(made, dtype))[0].astype(np.float32)
    wanted = evaluate(single, feeds(single))[0]
    # bfloat16 keeps 8 bits of x, the scores and the heads; int8 7 of what is multiplied: some percent of the whole.
    assert np.linalg.norm(y - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_the_nodes_body_is_the_reference(kind: str) -> None:
    heads, kv_heads, dim, length = 6, 2, 32, 9
    causal, mask = kind == "causal", kind == "mask"
    variant = opdef.Attention(TensorProto.FLOAT, heads, kv_heads, dim, causal, has_rotary=causal, has_mask=mask)
    shapes = {
        "x": [2, length, 10 * dim],
        "cosine": [length, dim],
        "sine": [length, dim],
        "mask": [2, 1, length, length],
    }
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in variant.inputs]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, length, heads * dim])
    graph = helper.make_graph([variant.node(variant.inputs, "y", "a", 0.3)], "g", infos, [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    opdef.add_functions(made, [variant])
    feed = {name: normal(*shapes[name], seed=i) for i, name in enumerate(variant.inputs)}
    options = {name: torch.from_numpy(feed[name]) for name in variant.inputs[1:]}
    parts = torch.from_numpy(feed["x"]).unflatten(-1, (-1, dim))
    want = reference.attention(parts, heads, kv_heads, 0.3, causal, **options).flatten(2).numpy()
    for found in (evaluate(made, feed)[0], run(made, feed)[0]):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_conversion_to_half_keeps_the_tables_of_the_rotary_embedding() -> None:
    _, fused, _ = both(llama().model())
    opdef.strip_functions(fused)
    convert(fused, TensorProto.FLOAT16)
    kinds = {t.name: t.data_type for t in fused.graph.initializer}
    attention = next(n for n in fused.graph.node if n.op_type == "Attention")
    assert [kinds[name] for name in attention.input[1:]] == [TensorProto.FLOAT] * 2


def test_without_being_asked_the_attention_stays() -> None:
    model = ht.rewrite(plain().model(), include="*").model
    assert "Softmax" in [n.op_type for n in model.graph.node]


def _head_size() -> Graph:
    graph = Graph(dim=48)
    graph.attend(*(graph.heads_of(name, 4) for name in "qkv"))
    return graph


def _edited(edit: Any, graph: Graph | None = None) -> Graph:
    graph = graph or llama()
    edit(graph)
    return graph


def _also_read(graph: Graph) -> None:
    softmax = next(n for n in graph.nodes if n.op_type == "Softmax")
    graph.op("Relu", softmax.output[0])


def _other_half(graph: Graph) -> None:
    graph.weights["i32"] = np.array([16], np.int64)


def _values_scaled(graph: Graph) -> None:
    at = next(n for n in graph.nodes if n.op_type == "Softmax")
    context = next(n for n in graph.nodes if n.input and n.input[0] == at.output[0])
    graph.nodes.insert(graph.nodes.index(context), node("Mul", [context.input[1], "half"], ["halved"]))
    graph.const("half", 0.5)
    context.input[1] = "halved"


def _one_rotation(*keep: Any) -> Graph:
    """The same angles for every token: tables that are not [L, D]."""
    graph = llama()
    for name in ("cos", "sin"):
        graph.weights[name] = graph.weights[name][keep]
    return graph


def _softmax_over_queries(graph: Graph) -> None:
    next(n for n in graph.nodes if n.op_type == "Softmax").attribute[0].i = 2


@pytest.mark.parametrize(
    "graph",
    [
        _head_size(), _edited(_also_read), _edited(_other_half), _edited(_values_scaled),
        _edited(_softmax_over_queries), _one_rotation(..., slice(1), slice(None)), _one_rotation(0, 0, 0),
    ],
    ids=["heads of 48", "the weights are read", "other halves", "values are scaled", "softmax over queries",
         "one rotation", "one rotation without a row"],
)  # fmt: skip
def test_what_is_another_attention_stays(graph: Graph) -> None:
    report = ht.rewrite(graph.model(), include="*", fuse_attention=True)
    assert report.attentions == []
    assert "Softmax" in [n.op_type for n in report.model.graph.node]


@pytest.mark.parametrize(
    ("equation", "is_product"),
    [("abij,abjk->abik", True), ("bhqd, bhdk -> bhqk", True), ("abij,abkj->abik", False), ("abij,acjk->abik", False),
     ("abii,abik->abik", False), ("abij,abjk->abki", False), ("abij->abji", False), ("", False)],
)  # fmt: skip
def test_einsums_that_are_products(equation: str, is_product: bool) -> None:
    assert attention._is_product(equation) == is_product


def test_a_plan_says_whether_attentions_are_fused(tmp_path: Path) -> None:
    made = plain().model()
    candidates = planner.Candidates(made, include="*")
    assert candidates.has_attentions
    name, plan = candidates.plan(fuse_attention=True)
    assert name == "all, attention fused"
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json"):
        assert ht.rewrite(made, plan=given).attentions == ["heads"]
        assert ht.rewrite(made, plan=given, fuse_attention=False).attentions == []
    assert ht.rewrite(made, plan=candidates.plan()[1]).attentions == []
    small = Graph()
    small.attend(*(small.heads_of(name, 4) for name in "qkv"))
    assert not planner.Candidates(small.model(y=small.op("Relu", "heads")), exclude="*").has_attentions


def test_a_float_product_among_the_three_leaves_the_attention() -> None:
    names = [n.name for n in plain().nodes if n.op_type == "MatMul"]
    for options in ({"exclude": names[1]}, {"merge": False}):
        report = ht.rewrite(plain().model(), include="*", fuse_attention=True, **options)
        assert report.attentions == []


@pytest.mark.parametrize(("hidden", "causal"), [(-1e4, 1), (-3.4e38, 1), (-np.inf, 1), (-5.0, 0)])
def test_a_mask_is_causal_only_where_it_hides(hidden: float, causal: int) -> None:
    graph = Graph()
    q, k, v = (graph.heads_of(name, 4) for name in "qkv")
    graph.attend(q, k, v, mask=graph.causal(hidden))
    _, fused, _ = both(graph.model())
    found = opdef.attributes(next(n for n in fused.graph.node if n.op_type == "Attention"))
    assert (found["causal"], found["has_mask"]) == (causal, 1 - causal)
