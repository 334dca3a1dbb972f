"""make_plan and the builder's shared parts, without a GPU: engines and times are made up."""

from __future__ import annotations

import math
from typing import Any

import pytest

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx", reason="onnx is not installed", exc_type=ImportError)

from onnx_helpers import model, node, normal  # noqa: E402

import hwkern.tensorrt as ht  # noqa: E402
from hwkern.tensorrt import builder, opdef, planner  # noqa: E402
from hwkern.tensorrt.network import _dense  # noqa: E402

PROFILES = [ht.Profile({"x": (1, s, 512)}, {"x": (1, s, 512)}, {"x": (1, s, 512)}) for s in (16, 256)]


def two_linears() -> Any:
    """up: 512 → 1024, down: 1024 → 512."""
    nodes = [
        node("MatMul", ["x", "w"], ["t"], name="up"), node("Relu", ["t"], ["u"]),
        node("MatMul", ["u", "v"], ["y"], name="down"),
    ]  # fmt: skip
    return model(
        nodes, {"w": normal(512, 1024), "v": normal(1024, 512)}, ("batch", "length", 512), ("batch", "length", 512)
    )


class Machine:
    """A GPU whose int8 linears take ``factors[K]`` of the float ones' time and ``extra`` µs, and whose norms 3 µs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float], extra: float = 0.0) -> None:
        self.factors, self.extra, self.built = factors, extra, []
        monkeypatch.setattr(planner, "build", self.build)
        monkeypatch.setattr(planner.measure, "engine_us", self.engine_us)

    def build(self, source: Any, profiles: Any, **_: Any) -> ht.Engine:
        self.built.append(source)
        return ht.Engine(str(len(self.built) - 1).encode(), {})

    def engine_us(self, engine: ht.Engine, requests: Any, copies: int | None = None) -> list[float]:
        source = self.built[int(engine.data)]
        weights = {t.name: tuple(t.dims) for t in source.graph.initializer}
        times = []
        for request in requests:
            rows = math.prod(request["x"][:-1])
            time = 0.0
            for each in source.graph.node:
                if each.op_type == "MatMul":
                    time += rows / 10 * math.prod(weights[each.input[1]]) / 2**19
            for each in opdef.hwkern_nodes(source):
                n, k = weights[opdef.inputs(each)["weight"]]
                time += rows / 10 * n * k / 2**19 * self.factors[k] + self.extra
            time += 3 * sum(each.op_type == "LayerNormalization" for each in source.graph.node)
            times.append(time)
        return times


def three_linears() -> Any:
    """two_linears with a square one of 512 in front: two sizes."""
    made = two_linears()
    made.graph.node[0].input[0] = "s"
    made.graph.node.insert(0, node("MatMul", ["x", "z"], ["s"], name="square"))
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(512, 512), "z"))
    return made


def test_the_plan_takes_the_largest_sizes_when_small_ones_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 rows: 1.6 µs for a large linear, 0.8 for the square one, so that 0.5 µs more each is too much for it alone.
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5}, extra=0.5)
    engines: dict[str, ht.Engine] = {}
    plan = ht.make_plan(three_linears(), PROFILES[:1], engines=engines)
    assert plan == {"square": "float", "up": "w8a8_dynamic", "down": "w8a8_dynamic"}
    assert plan.measured["chosen"] == "largest"
    assert len(machine.built) == 3
    assert list(engines) == list(plan.measured["engines"]) == ["float", "all", "largest"]
    assert opdef.metadata(machine.built[-1])["nodes"] == plan
    text = str(plan)
    assert "times float" in text
    assert "chosen" in text
    report = ht.rewrite(three_linears(), plan=plan)
    assert [n.status for n in report.nodes] == ["left", "int8", "int8"]


def test_the_plan_is_all_float_when_every_int8_engine_is_slower_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice as fast, but 2 µs more for each: too much for the 16 rows of the first profile (3.2 µs of work).
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5}, extra=2.0)
    plan = ht.make_plan(two_linears(), PROFILES)
    assert set(plan.values()) == {"float"}
    assert plan.measured["chosen"] == "float"
    report = ht.rewrite(two_linears(), plan=plan)
    assert not report.swapped
    times = [machine.engine_us(ht.Engine(b"0", {}), [p.opt for p in PROFILES])]
    assert plan.measured["engines"]["float"] == times[0]


def test_the_plan_takes_all_when_all_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5})
    plan = ht.make_plan(three_linears(), PROFILES)
    assert set(plan.values()) == {"w8a8_dynamic"}
    assert len(machine.built) == 3


def normed() -> Any:
    """As two_linears, with a norm before the first."""
    made = two_linears()
    made.graph.node[0].input[0] = "n"
    made.graph.node.insert(0, node("LayerNormalization", ["x", "g"], ["n"]))
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(512), "g"))
    return made


def test_the_plan_says_whether_norms_are_fused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5})
    plan = ht.make_plan(normed(), PROFILES)
    assert plan.fuse_norm
    assert list(plan.measured["engines"]) == ["float", "all", "all, norms fused"]
    assert [n.op_type for n in opdef.hwkern_nodes(machine.built[-1])] == ["NormLinearInt8", "LinearInt8"]
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json"):
        assert [bool(n.norm) for n in ht.rewrite(normed(), plan=given).nodes] == [True, False]
        assert not any(n.norm for n in ht.rewrite(normed(), plan=given, fuse_norm=False).nodes)


def shared_input() -> Any:
    """Two products of the same x, added."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="a"), node("MatMul", ["x", "v"], ["b"], name="b"),
        node("Add", ["a", "b"], ["y"]),
    ]  # fmt: skip
    weights = {"w": normal(512, 512), "v": normal(512, 512)}
    return model(nodes, weights, ("batch", "length", 512), ("batch", "length", 512))


def test_a_plan_can_say_that_products_stay_apart(tmp_path: Any) -> None:
    scheme = "w8a8_dynamic"
    plan = ht.Plan({"a": scheme, "b": scheme}, merge=False)
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json"):
        assert [n.merged for n in ht.rewrite(shared_input(), plan=given).nodes] == [(), ()]
        assert [n.merged for n in ht.rewrite(shared_input(), plan=given, merge=True).nodes] == [("a", "b")] * 2
    assert [n.merged for n in ht.rewrite(shared_input(), plan=dict(plan)).nodes] == [("a", "b")] * 2


def test_largest_sizes_have_their_norms_fused_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = three_linears()  # square, then up, with a norm between: square stays float, so the norm does too
    made.graph.node[1].input[0] = "n"
    made.graph.node.insert(1, node("LayerNormalization", ["s", "g"], ["n"]))
    made.graph.initializer.append(onnx.numpy_helper.from_array(normal(512), "g"))
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5}, extra=0.5)
    plan = ht.make_plan(made, PROFILES[:1])
    assert list(plan.measured["engines"]) == ["float", "all", "all, norms fused", "largest, norms fused between"]
    assert [n.op_type for n in opdef.hwkern_nodes(machine.built[2])] == ["LinearInt8", "NormLinearInt8", "LinearInt8"]
    assert [n.op_type for n in opdef.hwkern_nodes(machine.built[3])] == ["LinearInt8", "LinearInt8"]


def test_a_quick_plan_takes_all_or_nothing_at_the_requests_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 µs more each: too much for 16 rows (3.2 µs of work), nothing for 256.
    machine = Machine(monkeypatch, {512: 0.9, 1024: 0.9}, extra=1.0)
    profile = ht.Profile({"x": (1, 1, 512)}, {"x": (1, 256, 512)}, {"x": (1, 256, 512)})
    assert set(ht.make_plan(two_linears(), [profile], quick=True).values()) == {"w8a8_dynamic"}
    assert len(machine.built) == 2
    requests = [{"x": (1, 16, 512)}, {"x": (1, 256, 512)}]
    assert set(ht.make_plan(two_linears(), [profile], quick=True, requests=requests).values()) == {"float"}


def test_a_plan_keeps_to_its_seconds_and_takes_engines_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5})
    said: list[str] = []
    plan = ht.make_plan(three_linears(), PROFILES, seconds=0.0, progress=said.append)
    assert list(plan.measured["engines"]) == ["float", "all"]
    assert len(machine.built) == 2
    assert "no time for the engine 'largest'" in said
    engines = {"float": ht.Engine(b"0", {}), "all": ht.Engine(b"1", {}), "largest": ht.Engine(b"1", {})}
    again = ht.make_plan(three_linears(), PROFILES, seconds=0.0, engines=engines)
    assert list(again.measured["engines"]) == ["float", "all", "largest"]
    assert len(machine.built) == 2


@pytest.mark.parametrize("known", [["float", "largest"], ["largest"], ["all", "largest"]])
def test_no_engine_is_built_for_want_of_one_that_is_there(monkeypatch: pytest.MonkeyPatch, known: list[str]) -> None:
    machine = Machine(monkeypatch, {512: 0.5, 1024: 0.5})
    ht.make_plan(three_linears(), PROFILES)
    numbers = {"float": b"0", "all": b"1", "largest": b"2"}
    engines = {name: ht.Engine(numbers[name], {}) for name in known}
    plan = ht.make_plan(three_linears(), PROFILES, seconds=0.0, engines=engines)
    assert set(plan.measured["engines"]) == {*known, "float"}
    assert len(machine.built) == 3 + ("float" not in known)  # without the float one nothing can be compared


def test_a_progress_that_stops_leaves_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, {512: 0.5, 1024: 0.5})
    engines: dict[str, ht.Engine] = {}

    def stop(text: str) -> None:
        if "largest" in text:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        ht.make_plan(three_linears(), PROFILES, progress=stop, engines=engines)
    assert set(engines) == {"float", "all"}
    assert getattr(builder._kept, "builders", None) is None


def test_sizes_are_nested_and_the_largest_come_first() -> None:
    found = planner.Candidates(three_linears())
    assert list(found.sizes) == [512 * 1024, 512 * 512]
    assert found.plan(0) == ("float", {"square": "float", "up": "float", "down": "float"})
    assert found.plan(1)[0] == "largest"
    name, plan = found.plan(None, fuse_norm=True, merge=False)
    assert name == "all, norms fused, not merged"
    assert (plan.fuse_norm, plan.merge) == (True, False)
    assert not planner.Candidates(three_linears(), exclude="*").sizes


def test_each_profile_has_its_fastest_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 µs more for each linear: too much for the 16 rows of the first profile, nothing for the 256 of the second.
    Machine(monkeypatch, {512: 0.5, 1024: 0.5}, extra=2.0)
    plan = ht.make_plan(two_linears(), PROFILES)
    assert plan.measured["chosen"] == "float"
    assert plan.fastest == ["float", "all"]
    only_small = ht.make_plan(two_linears(), PROFILES, requests=[PROFILES[0].opt])
    assert only_small.fastest == ["float", "float"]  # nothing was measured at the second
    assert ht.Plan({"up": "float"}).fastest == []


def test_choose_allows_noise_and_no_more() -> None:
    assert planner.choose({"float": [10.0, 10.0], "all": [5.0, 10.0 * planner.NOISE]}) == "all"
    assert planner.choose({"float": [10.0, 10.0], "all": [1.0, 10.1]}) == "float"
    assert planner.choose({"float": [10.0], "all": [9.0], "largest": [8.0]}) == "largest"


def test_a_builder_is_kept_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(builder, "_make_builder", lambda api: made.append(object()) or made[-1])
    api: Any = type("Api", (), {"name": "trt"})
    assert builder._new_builder(api) is not builder._new_builder(api)
    with builder.keep_builder():
        first = builder._new_builder(api)
        with builder.keep_builder():
            assert builder._new_builder(api) is first
        assert builder._new_builder(api) is first
    assert builder._new_builder(api) is not first


def test_a_build_that_fails_with_einsums_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["q"], name="query"), node("Transpose", ["x"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["y"], name="scores"),
    ]  # fmt: skip
    shape = ("batch", "length", 512)
    made = ht.rewrite(model(nodes, {"w": normal(512, 512)}, shape, ("batch", "length", "length"))).model
    seen: list[list[str]] = []

    class Fake:
        """TensorRT 8.6 that cannot build an Einsum, if it is told so."""

        name, version, rtx, lean, strongly_typed, takes_int8_constants = "trt", (8, 6), False, False, False, False
        has_v3, refuses = False, True
        module = type("Module", (), {"__version__": "8.6.0"})
        log = type("Log", (), {"verbose": False, "take": lambda self: ""})()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            seen.append([n.op_type for n in network.graph.node])
            return None if self.refuses and "Einsum" in seen[-1] else b"engine"

    fake = Fake()
    monkeypatch.setattr(builder._api, "find", lambda trt=None: fake)
    monkeypatch.setattr(builder, "load_plugin", lambda module: None)
    monkeypatch.setattr(builder, "plugin_path", lambda module: None)
    monkeypatch.setattr(builder, "last_error", lambda path: "")
    monkeypatch.setattr(builder, "_parsed", lambda api, model, source: (fake, model, None))
    monkeypatch.setattr(builder, "_config", lambda *_: None)
    monkeypatch.setattr(builder, "_add_profiles", lambda *_: [])
    assert ht.build(made).data == b"engine"
    assert seen == [["LinearInt8", "Transpose", "Einsum"], ["LinearInt8", "Transpose", "MatMul"]]
    fake.refuses = False
    ht.build(made)
    ht.build(made, einsum=False)
    assert seen[2:] == [["LinearInt8", "Transpose", "Einsum"], ["LinearInt8", "Transpose", "MatMul"]]
    fake.version = (10, 1)  # compiles all that lies between plugins by itself
    ht.build(made)
    assert seen[4:] == [["LinearInt8", "Transpose", "MatMul"]]


def test_weights_of_bindings_for_numpy_1() -> None:
    value = np.arange(24, dtype=np.float32)
    # What TensorRT 8.6 gives under numpy 2: the right address and length, strides of 0.
    broken = np.lib.stride_tricks.as_strided(value, (24,), (0,))
    assert np.array_equal(_dense(broken, (2, 3, 4)), value.reshape(2, 3, 4))
    assert _dense(broken, (5, 5)) is None
    assert _dense(object(), (24,)) is None  # TensorRT's own Weights: no numpy type for bfloat16
    assert _dense(np.float32([7.0]), ()) == 7.0
