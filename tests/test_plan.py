"""Planning: what is chosen from which numbers, what is measured once, what is refused; the model never changes."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import math
import multiprocessing
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_patch import Snapshot
from torch import nn

import hwkern
from hwkern import _back_off, _choose, _measure, _tables, _timing, _whole, metrics
from hwkern._choose import Candidate, choose, threshold
from hwkern._measure import Clock, Shape
from hwkern._recipes import Recipe
from hwkern.bench.subjects import captured
from hwkern.nn import CalibratedInt8Linear, Calibration, Int8Linear, WeightOnlyInt8Linear

planning = importlib.import_module("hwkern.plan")
CALLS = {1: 10, 512: 1}


def candidate(name: str, few: float, many: float, snr: float = 40.0, size: int = 1, **other: float) -> Candidate:
    recipe = Recipe(name) if name != "w8a16/w8a8" else Recipe(name, max_tokens=1)
    return Candidate(recipe, snr, size, {"eager": {1: few, 512: many}, **other})  # type: ignore[dict-item]


def keep(few: float = 10, many: float = 100) -> Candidate:
    return candidate("keep", few, many, math.inf, 4)


# ---- the choice, from numbers ---------------------------------------------------------------------------------------


def test_the_fastest_within_the_bound_is_chosen() -> None:
    fast, rough = candidate("w8a8", 5, 50), candidate("w8a8-static", 2, 20, snr=12)
    found, reason = choose([keep(), fast, rough], CALLS, 20, "fastest")
    assert found is fast
    assert reason == "2.00× as fast as the float layer at 40.0 dB (fastest)"
    assert rough.ruled_out == "12.0 dB is below 20 dB"


def test_nothing_slower_than_float_is_ever_chosen() -> None:
    for policy in _choose.POLICIES:
        for slower in (candidate("w8a8", 10.5, 105), candidate("w8a8", 10, 100), candidate("w8a8", 9.9, 99)):
            found, reason = choose([keep(), slower], CALLS, 20, policy)
            if policy != "smallest" or score_of(slower) > 1:
                assert found.name == "keep", (policy, reason)


def score_of(found: Candidate) -> float:
    return _choose.score(found, keep(), CALLS)


def test_faster_on_the_whole_but_slower_at_one_number_of_tokens_is_refused() -> None:
    mixed = candidate("w8a8", 12, 10)  # half the time over all calls
    found, reason = choose([keep(), mixed], CALLS, 20, "fastest")
    assert found.name == "keep"
    assert reason == "nothing is faster throughout: w8a8 takes 1.20× the time at 1 tokens (eager)"


def test_a_number_of_tokens_that_takes_no_time_does_not_matter() -> None:
    mixed = candidate("w8a8", 12, 50)
    assert choose([keep(), mixed], {1: 1, 512: 100}, 20, "fastest")[0] is mixed


def test_a_decoding_step_matters_however_short_it_is() -> None:
    mixed = candidate("w8a8", 12, 50)
    base = keep()
    base.us["eager"][512] = mixed.us["eager"][512] * 1000  # one token takes 0.02 % of the time, and half of the calls
    assert choose([base, mixed], {1: 10, 512: 10}, 20, "fastest")[0] is base
    assert choose([base, mixed], {1: 10, 512: 200}, 20, "fastest")[0] is mixed


def test_every_way_of_running_counts() -> None:
    base = keep()
    base.us["graph"] = {1: 8.0, 512: 100.0}
    eager_only = candidate("w8a8", 5, 50)
    eager_only.us["graph"] = {1: 9.0, 512: 50.0}
    found, reason = choose([base, eager_only], CALLS, 20, "fastest")
    assert found is base
    assert "1.12× the time at 1 tokens (graph)" in reason


def test_policies() -> None:
    def pool() -> list[Candidate]:
        return [
            keep(),
            candidate("w8a8-static", 5.0, 50, snr=30, size=3),
            candidate("w8a8", 5.2, 52, snr=36, size=2),
            candidate("w8a16", 8.0, 80, snr=43, size=2),
            candidate("w8a16/w8a8", 9.99, 99.9, snr=38, size=1),
        ]

    names = {policy: choose(pool(), CALLS, 20, policy)[0].name for policy in _choose.POLICIES}
    assert names == {"fastest": "w8a8-static", "balanced": "w8a8", "accurate": "w8a16", "smallest": "w8a16/w8a8"}


def test_a_kept_layer_says_what_it_missed() -> None:
    _, reason = choose([keep(), candidate("w8a8", 5, 50, snr=12.3)], CALLS, 20, "balanced")
    assert reason == "w8a8 would be 2.00× as fast, but has 12.3 dB of the 20 dB wanted"
    assert choose([keep()], CALLS, 20, "balanced")[1] == "nothing else is possible"
    assert choose([keep(), candidate("w8a8", 1, 1)], {}, 20, "balanced")[1] == "no batch reached it"


def test_threshold_splits_where_the_sum_of_times_is_least() -> None:
    sizes = {1: 5, 16: 5, 64: 5, 512: 5}
    few = Candidate(Recipe("w8a16"), 40, 1, {"eager": {1: 1, 16: 2, 64: 9, 512: 90}})
    many = Candidate(Recipe("w8a8"), 40, 1, {"eager": {1: 3, 16: 3, 64: 4, 512: 20}})
    assert threshold(few, many, sizes) == 16
    assert threshold(many, few, sizes) is None or threshold(many, few, sizes) == 0
    assert threshold(few, few, sizes) is None


# ---- planning on measured-looking numbers ---------------------------------------------------------------------------

K, N = 64, 96


class Net(nn.Module):
    """Two layers of one shape, one of another, one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, N)
        self.unused = nn.Linear(K, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).tanh())


#: µs per token and call, by recipe: what the fake device "measures".
SPEED = {"keep": 10.0, "w8a8": 5.0, "w8a8-static": 7.0, "w8a8-asymmetric": 7.0, "w8a16": 8.0}


class Device:
    """Stands in for ``_measure.measure``: no clock, and every call is noted."""

    def __init__(self, speed: dict[str, float] | None = None) -> None:
        self.speed = speed or SPEED
        self.calls: list[tuple[Shape, int, tuple[str, ...]]] = []

    def __call__(self, shape: Shape, m: int, timings: Any, device: Any, modes: Any) -> dict[tuple[str, str], float]:
        self.calls.append((shape, m, tuple(timings)))
        return {(name, "eager"): m * self.speed.get(name, self.speed["w8a8"]) for name in timings}


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(_measure, "measure", found)
    return found


BATCHES = [torch.randn(2, 3, K), torch.randn(5, K), torch.randn(6, K)]


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "Int8" in type(module).__name__}


def w8a16_is_fastest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "measure", lambda shape, m, names, device, modes: {
        (name, mode): {"keep": 10.0, "w8a8": 8.0, "w8a16": 6.0}.get(name, 9.0) for name in names for mode in modes
    })  # fmt: skip


def make(model: nn.Module | None = None, **options: Any) -> hwkern.Plan:
    settings = {"include": "*", "verify": False, "show": False, **options}
    return hwkern.plan(Net() if model is None else model, settings.pop("batches", BATCHES), **settings)


def test_each_shape_and_number_of_tokens_is_timed_once(device: Device) -> None:
    model = Net()
    before = Snapshot(model)
    found = make(model)
    before.assert_same(model)
    assert sorted((shape.n, m) for shape, m, _ in device.calls) == [(K, 5), (K, 6), (N, 5), (N, 6)]
    assert found.layers["a"].calls == {5: 1, 6: 2}
    assert found.left == {"unused": "no batch reached it"}
    assert {layer.choice.name for layer in found.layers.values()} == {"w8a8"}
    assert found.measured > 0
    assert found.reused == 0


def test_the_second_run_measures_nothing(device: Device) -> None:
    first, measured = make(), len(device.calls)
    second = make()
    assert len(device.calls) == measured
    assert second.measured == 0
    assert second.reused == first.measured
    make(batches=[torch.randn(9, K)])  # another number of tokens
    assert len(device.calls) == measured + 2


def test_a_damaged_cache_is_measured_again(device: Device, tmp_path: Path) -> None:
    make()
    (file,) = (tmp_path / "cache").glob("layers-*.json")
    measured = len(device.calls)
    for text in ("{", "[]", json.dumps({"stamp": 1, "entries": {}}), file.read_text().replace(": 5", ": -5")):
        file.write_text(text)
        make()
        assert len(device.calls) > measured
        measured = len(device.calls)


def test_an_interrupt_while_timing_keeps_what_was_measured_and_the_model(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    before = Snapshot(model)

    def interrupted(*arguments: Any) -> Any:
        if len(device.calls) == 2:
            raise KeyboardInterrupt
        return device(*arguments)

    monkeypatch.setattr(_measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(model)
    before.assert_same(model)
    monkeypatch.setattr(_measure, "measure", device)
    make(model)
    assert len(device.calls) == 4  # the two that were missing


@pytest.mark.parametrize("stage", ["the whole model", "the task"])
def test_an_interrupt_while_the_model_is_tried_as_int8_puts_it_back(
    device: Device, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = Net()
    before = Snapshot(model)
    tried = []

    def interrupted(target: nn.Module, *arguments: Any) -> Any:
        if any(isinstance(m, Int8Linear) for m in target.modules()):
            tried.append(stage)
            raise KeyboardInterrupt
        return {"eager": [1.0] * len(arguments[0])} if stage == "the whole model" else 1.0

    options: dict[str, Any] = {"verify": True}
    if stage == "the whole model":
        monkeypatch.setattr(_whole, "seconds", interrupted)
    else:
        options |= {"metric": interrupted, "accuracy": hwkern.Accuracy(max_metric_drop=0.1)}
    with pytest.raises(KeyboardInterrupt):
        make(model, **options)
    assert tried
    before.assert_same(model)


def _fill(folder: str, numbers: range, threads: int, gate: Any) -> None:
    import os

    os.environ["HWKERN_CACHE"] = folder
    torch.set_num_threads(threads)  # part of the cache's stamp
    clock = Clock(torch.device("cpu"))
    gate.wait()
    for i in numbers:
        clock._cache.update({f"Linear 1x1 float32 {i} keep eager": float(i + 1)})  # type: ignore[union-attr]


def test_two_processes_write_one_cache_and_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    gate = context.Event()
    folder, threads = str(tmp_path / "cache"), torch.get_num_threads()
    workers = [
        context.Process(target=_fill, args=(folder, range(i * 20, i * 20 + 20), threads, gate)) for i in range(2)
    ]
    for worker in workers:
        worker.start()
    gate.set()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(Clock(torch.device("cpu"))._known) == 40


def test_few_tokens_and_many_get_one_layer_with_a_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(shape: Shape, m: int, timings: Any, device: Any, modes: Any) -> dict[tuple[str, str], float]:
        few = {"keep": 10.0, "w8a16": 4.0, "w8a8": 11.0}
        many = {"keep": 100.0, "w8a16": 130.0, "w8a8": 30.0}
        return {(name, "eager"): (few if m < 5 else many).get(name, 500.0) for name in timings}

    monkeypatch.setattr(_measure, "measure", measured)
    model = nn.Sequential(nn.Linear(K, N))
    found = make(model, batches=[torch.randn(1, K), torch.randn(2, K), torch.randn(64, K)])
    assert found.recipes["0"] == Recipe("w8a16/w8a8", max_tokens=2)
    hwkern.patch(model, plan=found)
    assert isinstance(model[0], WeightOnlyInt8Linear)
    assert model[0].max_tokens == 2


def test_a_layer_below_the_bound_stays_float_and_explain_says_why(device: Device) -> None:
    found = make(accuracy=hwkern.Accuracy(min_snr_db=60))
    assert all(recipe.scheme == "keep" for recipe in found.recipes.values())
    text = found.explain("b")
    assert "keep: w8a8" in text.replace("-static", "").replace("-asymmetric", "")
    assert "is below 60 dB" in text
    assert "← chosen" in text
    assert "Calls × tokens: 1× 5, 2× 6" in text
    assert found.explain("unused") == "unused: left as it is, no batch reached it."
    with pytest.raises(KeyError, match="has no layer 'bb'"):
        found.explain("bb")


def test_outliers_are_offered_help_only_where_they_need_it(device: Device) -> None:
    model = nn.Sequential(nn.Linear(K, N, bias=False), nn.Linear(N, N))
    model[0].weight.data[:, 7] /= 200
    x = torch.randn(64, K)
    x[:, 7] *= 800
    found = make(model, batches=[x])
    names = [c.name for c in found.layers["0"].candidates]
    assert {"w8a8+smooth", "w8a8+outliers"} <= set(names)
    assert not {"w8a8+smooth", "w8a8+outliers"} & {c.name for c in found.layers["1"].candidates}
    assert found.layers["0"].choice.snr_db > 20


def test_the_task_sends_layers_back_and_names_them(device: Device) -> None:
    model, x = Net(), torch.randn(32, K)
    exact = model(x).detach()

    def fragile(candidate: nn.Module, batches: Any) -> float:
        return 0.5 if isinstance(candidate.get_submodule("b"), Int8Linear) else 1.0

    before = Snapshot(model)
    accuracy = hwkern.Accuracy(max_metric_drop=0.01)
    found = make(model, batches=[x], accuracy=accuracy, metric=fragile)
    before.assert_same(model)
    assert "b" in found.task.kept
    assert (found.task.before, found.task.first, found.task.after) == (1.0, 0.5, 1.0)
    assert found.layers["b"].reason == "back to float for the fragile's sake"
    assert "back to float for it:" in str(found)
    hwkern.patch(model, plan=found)
    assert type(model.b) is nn.Linear
    assert torch.cosine_similarity(model(x), exact, dim=-1).min() > 0.99


@pytest.mark.parametrize(("smoothed", "taken"), [(7.0, "w8a8+smooth"), (9.9, "keep")])
def test_the_task_is_tried_with_the_accurate_recipes_before_layers_go_back(
    device: Device, smoothed: float, taken: str
) -> None:
    """W8A8 is within the layers' bound and not within the task's; smoothed it is, and worth it where it is faster."""
    device.speed = {**SPEED, "w8a8+smooth": smoothed, "w8a16": 12.0, "w8a8-static": 12.0}
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    x = torch.randn(64, K)
    x[:, 7] *= 8

    def fragile(candidate: nn.Module, batches: Any) -> float:
        return 0.5 if type(candidate.get_submodule("0")) is Int8Linear else 1.0

    found = make(model, batches=[x], accuracy=hwkern.Accuracy(max_metric_drop=0.1), metric=fragile)
    assert found.recipes["0"].name == taken
    assert found.task is not None
    assert (found.task.after, "0" in found.task.kept) == (1.0, taken == "keep")
    assert found.policy == ("balanced" if taken == "keep" else "accurate")
    again = found.for_device(model, show=False)  # the same device: nothing that the task was not tried with
    assert (again.recipes, again.policy) == (found.recipes, found.policy)
    assert make(model, batches=[x]).recipes["0"].name == "w8a8"
    careful = make(model, batches=[x], policy="accurate")
    assert careful.recipes["0"].name == ("w8a8+smooth" if smoothed < 9.7 else "w8a8")
    assert hwkern.Plan.from_dict(found.to_dict()).recipes == found.recipes


def test_accurate_recipes_that_the_metric_cannot_judge_cost_no_plan(device: Device) -> None:
    """The plan with float layers, which holds, stands; the other branch's NaN is not the user's problem."""
    device.speed = {**SPEED, "w8a8+smooth": 7.0, "w8a16": 12.0, "w8a8-static": 12.0}
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N))
    x = torch.randn(64, K)
    x[:, 7] *= 8

    def fragile(candidate: nn.Module, batches: Any) -> float:
        first = candidate.get_submodule("0")
        return float("nan") if isinstance(first, CalibratedInt8Linear) else 0.5 if type(first) is Int8Linear else 1.0

    found = make(model, batches=[x], accuracy=hwkern.Accuracy(max_metric_drop=0.1), metric=fragile)
    assert (found.recipes["0"].name, found.policy) == ("keep", "balanced")
    assert found.task is not None
    assert (found.task.after, found.task.kept) == (1.0, ["0"])


def test_tied_layers_are_planned_as_one(device: Device) -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    found = make(model, batches=[torch.randn(4, K)])
    assert found.layers["0"].names == ("0", "1")
    assert found.layers["0"].calls == {4: 2}
    hwkern.patch(model, plan=found)
    assert model[0].weight is model[1].weight
    assert type(model[1]) is Int8Linear


def test_layers_of_one_norm_are_folded_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_calibrate import IDS, llama, output

    model = llama()
    exact = output(model, IDS[0])

    def measured(shape: Shape, m: int, timings: Any, device: Any, modes: Any) -> dict[tuple[str, str], float]:
        # Nothing pays on the small key and value projections.
        slow = shape.n == 64
        return {(name, "eager"): 10.0 if name == "keep" else 20.0 if slow else 5.0 for name in timings}

    monkeypatch.setattr(_measure, "measure", measured)
    found = make(model, batches=IDS, include="*_proj", accuracy=hwkern.Accuracy(min_snr_db=10))
    recipes = {name.rsplit(".", 1)[-1]: recipe for name, recipe in found.recipes.items()}
    assert recipes["gate_proj"].calibration.folded
    assert recipes["up_proj"].calibration.folded
    assert recipes["k_proj"].scheme == "keep"
    assert not recipes["q_proj"].calibration.folded
    before = Snapshot(model)
    hwkern.patch(model, plan=found)
    assert torch.cosine_similarity(output(model, IDS[0]).flatten(), exact.flatten(), dim=0) > 0.99
    hwkern.unpatch(model)
    before.assert_same(model)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_saved_plan_is_the_same_plan(device: Device, tmp_path: Path) -> None:
    found = make()
    found.save(tmp_path / "plan.json")
    twin = hwkern.Plan.load(tmp_path / "plan.json")
    assert twin.to_dict() == found.to_dict()
    assert str(twin) == str(found)
    assert twin.explain("a") == found.explain("a")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["plan.json"]


def test_saving_a_patched_model_keeps_the_plan(device: Device, tmp_path: Path) -> None:
    model = Net()
    found = make(model)
    hwkern.patch(model, plan=found)
    hwkern.save(model, tmp_path / "m")
    with torch.device("meta"):
        fresh = Net()
    hwkern.load(tmp_path / "m", fresh)
    assert hwkern.Plan.from_dict(fresh._hwkern_plan).recipes == found.recipes


def edited(change: Any) -> Any:
    def apply(data: dict[str, Any]) -> None:
        change(data)

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=9), "format 9; this hwkern reads up to 1"),
        (lambda d: d.pop("layers"), "KeyError: 'layers'"),
        (lambda d: d.update(layers=[{}]), "KeyError"),
        (lambda d: d.update(policy="best"), "the policy is 'best'"),
        (lambda d: d["accuracy"].update(min_snr_db=math.nan), "min_snr_db = nan"),
        (lambda d: d["layers"][0].update(chosen=99), "layer 'a': ValueError: chosen = 99"),
        (lambda d: d["layers"][0].update(calls={"-3": 1}), "calls"),
        (lambda d: d["layers"][0]["candidates"].pop(0), "first candidate is not 'keep'"),
        (lambda d: d["layers"][0]["candidates"][1]["recipe"].update(scheme="int2"), "the scheme is 'int2'"),
        (lambda d: d["layers"][0]["candidates"][1].update(us={"eager": {"5": -1, "6": 1}}), "times of w8a8"),
        (lambda d: d["layers"][0]["candidates"][1].update(us={}), "different modes"),
        (lambda d: d["layers"][0]["candidates"][2]["recipe"]["calibration"].update(smooth="!"), "Error"),
        (lambda d: d["layers"][0]["candidates"][1].update(snr_db="loud"), "could not convert"),
        (lambda d: d["layers"][1].update(names=["a"]), "layer 'a': ValueError: it stands there twice"),
        (lambda d: d.update(whole={"before_ms": [1.0], "after_ms": [1.0]}), "KeyError: 'text'"),
        (lambda d: d.update(whole={"text": "", "before_ms": [1.0], "after_ms": []}), "of the whole model it says"),
        (lambda d: d["layers"][0].update(names=[-3.5]), "another model"),
    ],
)
def test_a_plan_edited_to_nonsense_is_refused_with_the_place(
    device: Device, tmp_path: Path, change: Any, message: str
) -> None:
    data = make().to_dict()
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(hwkern.PlanError, match=message):
        hwkern.patch(Net(), plan=hwkern.Plan.load(tmp_path / "plan.json"))


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for text in ("", "{", "[1]", '"x"'):
        file.write_text(text)
        with pytest.raises(hwkern.PlanError, match="is no plan"):
            hwkern.Plan.load(file)
    with pytest.raises(FileNotFoundError):
        hwkern.Plan.load(tmp_path / "none.json")


# ---- another model, another device ----------------------------------------------------------------------------------


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(K, K)


class Shorter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(K, K)


def wider() -> Net:
    model = Net()
    model.c = nn.Linear(K, N + 1)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Longer, r"another model \(Net\): this Longer has the layer 'more'"),
        (Shorter, "knows the layer 'b', which this Shorter has not"),
        (wider, "'c' is 64 → 96 float32 in it, but 64 → 97 float32 here"),
        (lambda: Net().bfloat16(), "'a' is 64 → 64 float32 in it, but 64 → 64 bfloat16 here"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_difference(device: Device, other: Any, message: str) -> None:
    found, model = make(), other()
    before = Snapshot(model)
    with pytest.raises(hwkern.PlanError, match=message):
        hwkern.patch(model, plan=found)
    before.assert_same(model)


def test_a_plan_for_another_gpu_is_refused_or_timed_again(device: Device) -> None:
    model = Net()
    found = make(model)
    found.device = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "compute": 90, "sm_count": 132}
    before = Snapshot(model)
    with pytest.raises(hwkern.PlanError, match=r"gpu 'NVIDIA H100 80GB HBM3'.*here.*allow_other_gpu=True"):
        hwkern.patch(model, plan=found)
    before.assert_same(model)
    device.speed = {**SPEED, "w8a8": 50.0, "w8a8-static": 50.0, "w8a8-asymmetric": 50.0}
    for file in Path(_measure.Cache("x", {}).path.parent).glob("layers-*"):
        file.unlink()
    report = hwkern.patch(model, plan=found, allow_other_gpu=True)
    assert {type(layer).__name__ for layer in (model.a, model.b, model.c)} == {"WeightOnlyInt8Linear"}
    assert len(report.swapped) == 3


def test_a_model_on_meta_can_be_patched_with_a_plan_and_loaded(device: Device, tmp_path: Path) -> None:
    model = Net()
    found = make(model)
    with torch.device("meta"):
        empty = Net()
    hwkern.patch(empty, plan=found)
    assert type(empty.a) is Int8Linear
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    hwkern.patch(model, plan=found)
    assert torch.equal(empty(BATCHES[0]), model(BATCHES[0]))


def test_a_calibrated_layer_cannot_be_made_on_meta_where_its_scale_would_be_lost() -> None:
    class Fixed:
        def __init__(self) -> None:
            self.recipes = {"a": Recipe("w8a8-static", Calibration(scale=0.1))}

    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match=r"'a' is on the meta device.*load it first"):
        hwkern.patch(empty, plan=Fixed())


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "There are no batches"),
        ({"batches": [[[1, 2], [3]]]}, "not a tensor"),
        ({"policy": "best"}, "policy = 'best'"),
        ({"accuracy": hwkern.Accuracy(max_metric_drop=0.1)}, "max_metric_drop needs a metric"),
        ({"include": "nothing"}, "matches no linear layer"),
        (
            {"metric": lambda m, b: math.nan, "accuracy": hwkern.Accuracy(max_metric_drop=0.1)},
            "returned nan: nothing can be decided",
        ),
    ],
)
def test_what_cannot_be_planned_is_an_error_and_the_model_is_as_before(
    device: Device, options: dict[str, Any], message: str
) -> None:
    model = Net()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=message):
        make(model, **options)
    before.assert_same(model)


@pytest.mark.parametrize(
    "bounds",
    [
        {"min_snr_db": math.nan}, {"min_snr_db": "20"}, {"max_metric_drop": -1.0}, {"max_metric_drop": math.nan},
        {"max_metric_drop": "little"},
    ],
)  # fmt: skip
def test_bounds_that_cannot_be(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        hwkern.Accuracy(**bounds)


def test_a_model_without_values_or_already_compiled_cannot_be_planned() -> None:
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ValueError, match="no parameters with values"):
        make(empty)
    with pytest.raises(ValueError, match="was compiled"):
        make(torch.compile(Net()))


def test_a_model_that_raises_is_left_without_hooks() -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make(model, batches=[torch.randn(2, K + 1)])
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- with a real clock ----------------------------------------------------------------------------------------------


def test_a_real_plan_on_this_cpu_is_never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 512))
    before = Snapshot(model)
    batches = [torch.randn(64, 512), torch.randn(2, 512)]
    found = hwkern.plan(model, batches, include="*", show=False)
    before.assert_same(model)
    for layer in found.layers.values():
        if layer.chosen:
            assert _choose.worst(layer.choice, layer.candidates[0], layer.calls)[0] <= 1 + _choose.NOISE
            assert layer.speedup() >= 1 / (1 - _choose.LEAST_GAIN)
            assert layer.choice.snr_db >= 20
    if found.whole:
        for was, now in zip(found.whole["before_ms"], found.whole["after_ms"], strict=True):
            assert now <= was * (1 + _whole.NOISE)
    again = hwkern.plan(model, batches, include="*", show=False)
    assert again.measured == 0
    assert again.seconds < 10


def test_a_whole_model_that_is_not_faster_keeps_its_layers(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        int8 = sum(isinstance(module, Int8Linear) for module in model.modules())
        calls.append(int8)
        return {"eager": [1.0 + 0.5 * int8]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    model = Net()
    before = Snapshot(model)
    found = make(model, verify=True)
    before.assert_same(model)
    assert max(calls) == 3
    assert all(recipe.scheme == "keep" for recipe in found.recipes.values())
    assert found.layers["a"].reason == "the whole model was slower with it"


def test_a_plan_with_which_the_model_cannot_be_captured_is_none(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the memory runs out for the planned model's graph alone: that is timed eagerly, the float one not."""

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        return {"eager" if any(isinstance(m, Int8Linear) for m in model.modules()) else "graph": [1.0]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    model = Net()
    before = Snapshot(model)
    found = make(model, verify=True)
    before.assert_same(model)
    assert found.whole == {}
    assert all(recipe.scheme == "keep" for recipe in found.recipes.values())


def test_one_slow_reading_of_the_whole_model_is_not_believed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([1.0, 1.03, 1.0, 0.9, 1.0])  # float, int8, float, int8, float

    monkeypatch.setattr(_whole, "seconds", lambda *_: {"eager": [next(readings)]})
    found = make(Net(), verify=True)
    assert any(recipe.scheme != "keep" for recipe in found.recipes.values())
    assert found.whole["before_ms"] == [1000.0]
    assert found.whole["after_ms"] == [900.0]
    assert next(readings, None) is None


@pytest.mark.parametrize(
    ("graph", "eager", "calls"),
    [
        (1.1, 1.0, [0, 3]),  # slower on the GPU's clock
        (0.9, 0.9, [0, 3]),  # faster everywhere
        (0.9, 1.1, [0, 3, 0, 3, 0]),  # the host may have been held up
        (None, 1.1, [0, 3, 0, 3, 0]),
        (None, 0.9, [0, 3, 0]),
    ],
)
def test_a_reading_that_is_clear_is_not_repeated(
    device: Device, monkeypatch: pytest.MonkeyPatch, graph: float | None, eager: float, calls: list[int]
) -> None:
    int8 = []

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        int8.append(sum(isinstance(module, Int8Linear) for module in model.modules()))
        found = {"eager": [eager if int8[-1] else 1.0]}
        return found if graph is None else found | {"graph": [graph if int8[-1] else 1.0]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    found = make(Net(), verify=True)
    assert int8 == calls
    assert any(recipe.scheme != "keep" for recipe in found.recipes.values()) == (max(graph or 0.0, eager) < 1)


def test_a_graph_is_captured_once_and_holds_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[tuple[Any, Any]] = []

    def graph(model: nn.Module, batch: Any, device: torch.device, other: Any) -> Any:
        captured.append((batch, other))
        return None if batch == "waits" else f"graph of {batch}"

    monkeypatch.setattr(_whole, "_graph", graph)
    model, cpu = nn.Linear(2, 2), torch.device("cpu")
    graphs = _whole.Graphs()
    assert graphs.of(0, model, "a", cpu) == graphs.of(0, model, "a", cpu) == "graph of a"
    assert graphs.of(1, model, "b", cpu) == "graph of b"
    assert graphs.of(2, model, "waits", cpu) is None
    assert captured == [("a", None), ("b", "graph of a"), ("waits", "graph of a")]
    address = model.bias.data_ptr()
    model.bias.data = torch.zeros(2)  # as fusing does
    assert address in {tensor.data_ptr() for tensor in graphs._held}
    graphs.clear()
    assert graphs.of(0, model, "c", cpu) == "graph of c"
    assert captured[-1] == ("c", None)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=1, num_attention_heads=6, intermediate_size=768, vocab_size=50
    )
    return transformers.BertModel(config).eval()


IDS = [{"input_ids": torch.arange(12).reshape(2, 6)}]


@pytest.mark.parametrize(("ratio", "taken"), [(0.9, True), (0.98, False), (1.05, False)])
def test_layers_that_are_slower_alone_are_taken_where_the_model_is_faster_with_them_fused(
    device: Device, monkeypatch: pytest.MonkeyPatch, ratio: float, taken: bool
) -> None:
    model = bert()

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        int8 = any(isinstance(module, Int8Linear) for module in model.modules())
        return {"eager": [ratio if int8 else 1.0]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    monkeypatch.setattr(_measure, "measure", lambda shape, m, names, device, modes: {
        (name, mode): 10.0 if name == "keep" else 11.0 for name in names for mode in modes
    })  # fmt: skip
    before = Snapshot(model)
    found = hwkern.plan(model, IDS, show=False, save=False, embeddings=False)
    before.assert_same(model)
    chosen = {name for name, recipe in found.recipes.items() if recipe.scheme != "keep"}
    fused = {"query", "key", "value", "intermediate.dense"}
    assert {name.removeprefix("encoder.layer.0.").removeprefix("attention.self.") for name in chosen} == (
        fused if taken else set()
    )
    if taken:
        assert "1.10× the float layer's time alone" in found.explain("encoder.layer.0.attention.self.query")
        assert found.whole["after_ms"] == [900.0]
        assert hwkern.Plan.from_dict(found.to_dict()).recipes == found.recipes
    for options in ({"policy": "accurate"}, {"accuracy": hwkern.Accuracy(min_snr_db=60)}, {"verify": False}):
        kept = hwkern.plan(model, IDS, show=False, save=False, embeddings=False, **options)
        assert all(recipe.scheme == "keep" for recipe in kept.recipes.values())


def test_trials_of_the_whole_model_leave_no_trace_in_it(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the modules, nor in what they hold, nor in how their tensors lie in memory: the very model comes back."""
    model = bert()
    original = copy.deepcopy(model)
    tried: list[Any] = []

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        tried.append(sum(isinstance(module, Int8Linear) for module in model.modules()))
        return {"eager": [1.2 if tried[-1] else 1.0]}

    monkeypatch.setattr(_whole, "seconds", seconds)

    def in_turn(calls: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        tried.append("tables")
        for call in list(calls.values()) * 2:
            call()
        return {"float": [1.0] * 2, "int8": [2.0] * 2}

    monkeypatch.setattr(_tables, "in_turn", in_turn)
    monkeypatch.setattr(_measure, "measure", lambda shape, m, names, device, modes: {
        (name, mode): 10.0 if name == "keep" else 11.0 for name in names for mode in modes
    })  # fmt: skip
    found = hwkern.plan(model, IDS, show=False, save=False)
    assert tried.count("tables") == 1  # twice the time, and nothing scatters
    assert max(each for each in tried if each != "tables") == 7
    assert not hwkern.patch(model, plan=found).swapped
    del model.__dict__["_hwkern_plan"]
    for (name, before), (_, after) in zip(original.named_modules(), model.named_modules(), strict=True):
        assert type(after) is type(before), name
        assert list(after.__dict__) == list(before.__dict__), name
        for hooks in (key for key in before.__dict__ if "hooks" in key):
            assert after.__dict__[hooks] == before.__dict__[hooks], (name, hooks)
    for (name, before), (_, after) in zip(original.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(after, before), name
        assert after.untyped_storage().nbytes() == after.numel() * after.element_size(), name


def test_trials_undo_themselves_whatever_the_layers_are_called(device: Device) -> None:
    """And only themselves: what was int8 before, and the plan that it came from, is the user's."""
    model: Any = nn.Sequential()
    for name in ("0", "a[b]", "x*", "x1"):
        model.add_module(name, nn.Linear(512, 512))
    hwkern.patch(model, plan=SimpleNamespace(recipes={"x1": Recipe("w8a8")}, to_dict=lambda: {"any": "data"}))
    before = Snapshot(model)
    with _back_off.patched(model, dict.fromkeys(("0", "a[b]", "x*"), Recipe("w8a8"))):
        assert all(isinstance(layer, Int8Linear) for layer in model)
    before.assert_same(model)
    assert model._hwkern_plan == {"any": "data"}


@pytest.mark.parametrize(
    ("fused", "plain", "swapped"),
    [(0.9, 0.8, 7), (0.8, 0.9, 4), (1.05, 0.8, 7), (0.9, 1.05, 4), (1.05, 1.05, 0)],
)
def test_w8a8_throughout_is_taken_where_the_whole_model_is_fastest_with_it(
    device: Device, monkeypatch: pytest.MonkeyPatch, fused: float, plain: float, swapped: int
) -> None:
    """Every layer is slower alone; four of the seven can be fused. So no plan is slower than patch without one."""
    model = bert()

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        int8 = sum(isinstance(module, Int8Linear) for module in model.modules())
        return {"eager": [{0: 1.0, 4: fused, 7: plain}[int8]]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    monkeypatch.setattr(_measure, "measure", lambda shape, m, names, device, modes: {
        (name, mode): 10.0 if name == "keep" else 11.0 for name in names for mode in modes
    })  # fmt: skip
    before = Snapshot(model)
    found = hwkern.plan(model, IDS, show=False, save=False)
    before.assert_same(model)
    assert sum(recipe.scheme == "w8a8" for recipe in found.recipes.values()) == swapped
    if swapped:
        assert found.whole["after_ms"] == [1000.0 * min(fused, plain)]
    if swapped == 7:
        assert "W8A8 throughout" in found.explain("encoder.layer.0.output.dense")
        assert hwkern.Plan.from_dict(found.to_dict()).recipes == found.recipes


@pytest.mark.parametrize(
    ("eager", "graph", "taken"),
    [(0.9, 0.8, True), (1.004, 0.8, True), (1.01, 0.8, False), (1.2, 0.8, False), (0.9, 1.05, False)],
)
def test_layers_that_cost_the_host_time_are_taken_where_the_whole_model_is_slower_in_neither_way(
    monkeypatch: pytest.MonkeyPatch, eager: float, graph: float, taken: bool
) -> None:
    """Each is slower in eager calls and faster in a CUDA graph; only the whole model shows which of them matters."""
    times = {"keep": (10.0, 10.0), "w8a16": (12.0, 6.0)}  # eager, graph

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        int8 = any(isinstance(module, Int8Linear) for module in model.modules())
        return {"eager": [eager if int8 else 1.0], "graph": [graph if int8 else 1.0]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    monkeypatch.setattr(_measure, "modes_of", lambda device, mode="any": ("eager", "graph"))
    monkeypatch.setattr(_measure, "measure", lambda shape, m, names, device, modes: {
        (name, mode): times.get(name, (30.0, 30.0))[mode == "graph"] for name in names for mode in modes
    })  # fmt: skip
    found = make(Net(), verify=True)
    assert {recipe.scheme for recipe in found.recipes.values()} == {"w8a16" if taken else "keep"}
    if taken:
        assert "1.20× the float layer's time alone, but the whole model is faster with it" in found.explain("a")
    alone = make(Net(), verify=False)
    assert {recipe.scheme for recipe in alone.recipes.values()} == {"keep"}


def test_a_faster_plan_for_the_whole_model_must_hold_the_task_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' own choices hold it, W8A8 throughout is faster and does not."""

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        return {"eager": [1.0 if not kinds(model) else 0.7 if kinds(model) == {"Int8Linear"} else 0.8]}

    def task(model: nn.Module, batches: Any) -> float:
        return 0.5 if kinds(model) == {"Int8Linear"} else 1.0

    monkeypatch.setattr(_whole, "seconds", seconds)
    w8a16_is_fastest_alone(monkeypatch)
    held = make(Net(), verify=True, metric=task, accuracy=hwkern.Accuracy(max_metric_drop=0.1))
    assert {recipe.name for recipe in held.recipes.values()} == {"w8a16"}
    assert held.task is not None
    assert held.task.after == 1.0
    loose = make(Net(), verify=True, metric=task, accuracy=hwkern.Accuracy(max_metric_drop=0.6))
    assert {recipe.name for recipe in loose.recipes.values()} == {"w8a8"}
    assert loose.task is not None
    assert loose.task.after == 0.5


def test_a_trial_that_the_task_has_no_number_for_is_not_taken(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' own choices have one, so the user's metric is not to blame, and their plan stands."""

    def task(model: nn.Module, batches: Any) -> float:
        return math.nan if kinds(model) == {"Int8Linear"} else 1.0

    monkeypatch.setattr(
        _whole, "seconds", lambda model, *_: {"eager": [0.7 if kinds(model) == {"Int8Linear"} else 0.9]}
    )
    w8a16_is_fastest_alone(monkeypatch)
    found = make(Net(), verify=True, metric=task, accuracy=hwkern.Accuracy(max_metric_drop=0.1))
    assert {recipe.name for recipe in found.recipes.values()} == {"w8a16"}


def test_a_plan_that_takes_nothing_leaves_the_very_model(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.speed = {"keep": 1.0, "w8a8": 2.0}
    monkeypatch.setattr(_whole, "seconds", lambda *_: {"eager": [1.0]})
    model = Net()
    before, modules = Snapshot(model), [(type(module), id(module)) for module in model.modules()]
    found = make(model, verify=True)
    assert not hwkern.patch(model, plan=found, originals="drop").swapped
    before.assert_same(model)
    assert [(type(module), id(module)) for module in model.modules()] == modules


def test_w8a8_throughout_is_held_against_the_layers_own_choices(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the layers' choices need no fusing, the whole model still says which of the two it is."""

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        found = kinds(model)
        return {"eager": [1.0 if not found else 0.7 if found == {"Int8Linear"} else 0.8]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    w8a16_is_fastest_alone(monkeypatch)
    found = make(Net(), verify=True)
    assert {recipe.name for recipe in found.recipes.values()} == {"w8a8"}
    assert found.whole["after_ms"] == [700.0]
    assert {r.name for r in make(Net(), verify=False).recipes.values()} == {"w8a16"}


def test_the_layers_own_choices_that_were_tried_are_not_read_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too small a gain for a trial, none of which is taken: what was read says too that the plan is not slower."""
    read: list[set[str]] = []

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        read.append(kinds(model))
        return {"eager": [1.0 if not read[-1] else 1.1 if read[-1] == {"Int8Linear"} else 0.98]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    w8a16_is_fastest_alone(monkeypatch)
    found = make(Net(), verify=True)
    assert {recipe.name for recipe in found.recipes.values()} == {"w8a16"}
    assert found.whole["after_ms"] == [980.0]
    assert read.count({"WeightOnlyInt8Linear"}) == 1


@pytest.mark.parametrize("best", ["Int8Linear", "WeightOnlyInt8Linear"])
def test_layers_behind_a_divided_norm_are_tried_in_w8a8_with_the_same_vector(
    monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    """Alone W8A16 is the fastest; together W8A8 may be, which is one kernel with the norm. The smoothing is free."""
    from test_calibrate import IDS, llama

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        found = kinds(model)
        return {"eager": [1.0 if not found else 0.7 if found == {best} else 0.8]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    w8a16_is_fastest_alone(monkeypatch)
    model = llama()
    found, alone = (
        make(model, batches=IDS, include="*_proj", verify=verify, accuracy=hwkern.Accuracy(min_snr_db=10))
        for verify in (True, False)
    )
    folded = {name: recipe.calibration for name, recipe in alone.recipes.items() if recipe.calibration.folded}
    assert len(folded) == 5
    assert {recipe.scheme for recipe in alone.recipes.values()} == {"w8a16"}
    scheme = {"Int8Linear": "w8a8", "WeightOnlyInt8Linear": "w8a16"}[best]
    assert {recipe.scheme for recipe in found.recipes.values()} == {scheme}
    assert {name: r.calibration for name, r in found.recipes.items() if r.calibration.folded} == folded


def test_a_plan_for_one_way_of_running_says_so_and_comes_back() -> None:
    model = Net()
    found = make(model, mode="graph")
    assert (found.mode, hwkern.Plan.from_dict(found.to_dict()).mode) == ("graph", "graph")
    old = found.to_dict()
    del old["mode"]  # written before there was one
    assert hwkern.Plan.from_dict(old).mode == "any"
    with pytest.raises(hwkern.PlanError, match="mode"):
        hwkern.Plan.from_dict({**old, "mode": "fast"})
    with pytest.raises(ValueError, match="mode = 'compiled'"):
        make(model, mode="compiled")
    assert _measure.modes_of(torch.device("cuda"), "any") == ("eager", "graph")
    assert _measure.modes_of(torch.device("cuda"), "graph") == ("graph",)
    assert _measure.modes_of(torch.device("cpu"), "graph") == ("eager",)


def test_perplexity_and_top1_are_accepted_by_plan(device: Device) -> None:
    x = torch.randn(16, K)
    model = Net()
    labels = [model(x).argmax(-1)]
    found = make(model, batches=[x], metric=metrics.top1(labels), accuracy=hwkern.Accuracy(max_metric_drop=0.2))
    assert found.task.before == 1.0
    assert copy.copy(found.task).metric == "top-1"


@pytest.mark.gpu
def test_a_plan_on_the_gpu_measures_both_ways_of_running() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)).bfloat16().cuda()
    batches = [torch.randn(m, 2048, dtype=torch.bfloat16) for m in (1, 2048)]
    found = hwkern.plan(model, batches, show=False)
    assert set(found.layers["0"].candidates[0].us) == {"eager", "graph"}
    exact = model(batches[1].cuda())
    hwkern.patch(model, plan=found)
    y = model(batches[1].cuda())
    assert torch.cosine_similarity(y.float(), exact.float(), dim=-1).min() > 0.99


@pytest.mark.gpu
def test_a_plan_leaves_no_memory_of_the_gpu_behind() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).bfloat16().cuda()
    batches = [torch.randn(m, 1024, dtype=torch.bfloat16) for m in (1, 512)]
    taken = []
    for _ in range(3):
        hwkern.plan(model, batches, show=False)
        gc.collect()
        taken.append(torch.cuda.memory_allocated())
    assert taken[2] == taken[0]  # cuBLAS's workspace of a stream, 32 MB, came with the first


@pytest.mark.gpu
def test_a_plan_takes_no_memory_that_graphs_of_the_model_do_not_take() -> None:
    """cuBLAS's workspaces, 32 MB for each stream."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).bfloat16().cuda()
    x = torch.randn(512, 1024, dtype=torch.bfloat16, device="cuda")
    model(x)
    captured(lambda: model(x))()
    before = torch.cuda.memory_allocated()
    hwkern.plan(model, [x], show=False)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_captures_and_their_warm_up_are_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: int = 0) -> None:
            self.device, self.waited = torch.device("cuda", device), 0

        def wait_stream(self, other: object) -> None:
            self.waited += 1

    device = 0
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    _timing._stream.cache_clear()
    try:
        first = _timing.warm_up_stream()
        assert _timing.warm_up_stream() is first is torch.cuda.graph.default_capture_stream
        assert first.waited == 2
        device = 1
        assert _timing.warm_up_stream().device.index == 1
        assert torch.cuda.graph.default_capture_stream is first
    finally:
        _timing._stream.cache_clear()


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_is_planned_without_a_graph_and_random_numbers_go_on() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2048, 2048)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if float(x.flatten()[0]) > -1e9 else x

    model = Waits().bfloat16().cuda()
    found = hwkern.plan(model, [torch.randn(512, 2048, dtype=torch.bfloat16)], show=False)
    assert set(found.layers["inner"].candidates[0].us) == {"eager", "graph"}
    assert not found.whole or set(found.whole["modes"]) == {"eager"}
    assert torch.randn(3, device="cuda").isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_a_planned_transformer_is_not_slower_in_either_way_of_running() -> None:
    model = bert().bfloat16().cuda()
    batches = [{"input_ids": torch.randint(0, 50, shape)} for shape in ((1, 8), (8, 128))]
    found = hwkern.plan(model, batches, show=False)
    if found.whole:
        assert set(found.whole["modes"]) == {"eager", "graph"}
        for before, after in found.whole["modes"].values():
            assert all(now <= was * (1 + _whole.NOISE) for was, now in zip(before, after, strict=True))
    graph_only = hwkern.plan(model, batches, show=False, mode="graph")
    assert set(graph_only.layers["encoder.layer.0.output.dense"].candidates[0].us) == {"graph"}
    assert graph_only.measured == 0  # what the first plan timed holds for it too


def test_layers_made_for_timing_are_made_once_for_a_shape_and_not_kept() -> None:
    shape = Shape("Linear", 48, 32, torch.float32, True)
    _measure.layer_sets.cache_clear()
    with _measure.kept_layers():
        for m in (1, 4):
            found = _measure.measure(shape, m, ["keep", "w8a8"], torch.device("cpu"), ("eager",))
            assert set(found) == {("keep", "eager"), ("w8a8", "eager")}
        assert (_measure.layer_sets.cache_info().misses, _measure.layer_sets.cache_info().hits) == (1, 1)
    assert _measure.layer_sets.cache_info().currsize == 0
