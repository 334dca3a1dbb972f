"""Measured choices: which config wins, what the cache may hold, when ops uses it, and what explain says."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from fake_gpu import H100 as PROPERTIES

import hwkern
from hwkern import _choice, _native, cli, hardware, ops
from hwkern._choice import EDGES, LAYER, PRODUCT
from hwkern.ops import CHOOSE

tune_module, explain_module = (importlib.import_module(f"hwkern.{name}") for name in ("tune", "explain"))

GPU = hardware.gpu_from_properties(0, PROPERTIES)
explain, tune, use_tuned = explain_module.explain, tune_module.tune, hwkern.use_tuned


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """An empty cache folder and no measured choices, before and after."""
    monkeypatch.setenv("HWKERN_CACHE", str(tmp_path))
    monkeypatch.delenv("HWKERN_TUNED", raising=False)
    _choice.tuned.clear()
    yield
    _choice.tuned.clear()


@pytest.fixture
def machine(monkeypatch):
    """One H100 whose times are what a function says; returns the list of what was measured."""
    measured = []

    def give(us):
        def measure(m, n, k, dtype, configs, gpu, kind, peers):
            measured.append((m, n, k, kind))
            return {"configs": {str(c): us(c, kind) for c in configs}, "peers": dict.fromkeys(peers, 0.5)}

        for module in (tune_module, explain_module):
            monkeypatch.setattr(module, "measure", measure)
        return measured

    monkeypatch.setattr(_native, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(hardware, "gpus", lambda: [GPU])
    return give


def model(m, n, k):
    return _native.extension().gemm_choose(m, n, k, GPU.sm_count, GPU.compute, GPU.shared_bytes, b_is_constant=True)


def second_best(m, n, k):
    """A candidate of the shape that the model does not choose at either end of the step."""
    chosen = {model(end, n, k) for end in tune_module.ends_of(EDGES.index(m))}
    return next(c for c in tune_module.candidates(m, n, k, GPU) if c not in chosen)


# ---- the steps of M --------------------------------------------------------------------------------------------------


def test_the_steps_cover_every_m_once():
    assert list(EDGES) == sorted(set(EDGES))
    covered = [m for step in range(len(EDGES)) for m in (*tune_module.ends_of(step),)]
    assert covered[0] == 1
    for (_, high), (low, _) in zip(
        map(tune_module.ends_of, range(len(EDGES) - 1)), map(tune_module.ends_of, range(1, len(EDGES))), strict=True
    ):
        assert low == high + 1


@pytest.mark.parametrize(("m", "step"), [(1, 0), (2, 1), (8, 1), (9, 2), (128, 8), (129, 9), (8192, len(EDGES) - 1)])
def test_an_m_finds_its_step(m, step):
    _choice.tuned[0, 64, 32, torch.bfloat16, PRODUCT] = (*range(500, 500 + len(EDGES)), CHOOSE)
    assert _choice.config_for(0, m, 64, 32, torch.bfloat16) == 500 + step


def test_what_was_not_tuned_is_left_to_the_model():
    _choice.tuned[0, 64, 32, torch.bfloat16, PRODUCT] = (*range(500, 500 + len(EDGES)), CHOOSE)
    for device, m, n, k, dtype in [
        (1, 8, 64, 32, torch.bfloat16), (0, 8, 65, 32, torch.bfloat16), (0, 8, 64, 31, torch.bfloat16),
        (0, 8, 64, 32, torch.float16), (0, EDGES[-1] + 1, 64, 32, torch.bfloat16),
    ]:  # fmt: skip
        assert _choice.config_for(device, m, n, k, dtype) == CHOOSE


# ---- which config wins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ([{1: 10.0, 2: 8.0}, {1: 10.0, 2: 8.0}], 2),  # faster at both ends
        ([{1: 10.0, 2: 9.9}, {1: 10.0, 2: 9.9}], CHOOSE),  # within the noise
        ([{1: 10.0, 2: 5.0}, {1: 10.0, 2: 25.0}], CHOOSE),  # faster at one end, but slower over the two
        ([{1: 10.0, 2: 8.0}, {1: 10.0}], CHOOSE),  # not measured at the other end
        ([{2: 8.0}, {1: 10.0, 2: 8.0}], CHOOSE),  # the model's choice was not measured: no comparison
        ([{}, {1: 1.0}], CHOOSE),
    ],
)
def test_a_config_wins_only_where_it_is_faster_over_the_whole_step(times, winner):
    assert tune_module._choose([1, 1], times) == winner


# ---- tune ------------------------------------------------------------------------------------------------------------


def test_tune_measures_once_and_uses_the_fastest(machine):
    best = second_best(16, 4096, 4096)
    measured = machine(lambda config, kind: 5.0 if (config, kind) == (best, PRODUCT) else 10.0)
    found = tune([(4096, 4096)], m=[12], show=False)
    assert sorted(measured) == [(m, 4096, 4096, kind) for m in (9, 16) for kind in (LAYER, PRODUCT)]
    assert (found.measured, found.known) == (4, 0)
    assert [step.config for step in found.changed] == [best]
    assert math.isclose(found.changed[0].gain, 2.0)
    assert "1 of 2 steps" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["steps"][0]["config"] == best
    assert _choice.config_for(0, 12, 4096, 4096, torch.bfloat16) == best
    assert _choice.config_for(0, 17, 4096, 4096, torch.bfloat16) == CHOOSE

    again = tune([(4096, 4096)], m=[10, 16], show=False)
    assert (len(measured), again.measured, again.known) == (4, 0, 4)
    assert [step.config for step in again.changed] == [best]


def test_a_later_process_uses_the_times_when_asked(machine, monkeypatch):
    best = second_best(16, 4096, 4096)
    machine(lambda config, kind: 5.0 if (config, kind) == (best, PRODUCT) else 10.0)
    tune([(4096, 4096)], m=[16], dtype=torch.float16, show=False)
    _choice.tuned.clear()  # as in a new process
    _choice.ask()
    assert not _choice.tuned
    monkeypatch.setenv("HWKERN_TUNED", "1")
    _choice.ask()  # what importing hwkern does
    assert _choice.tuned  # so that the first launch asks
    assert _choice.config_for(0, 16, 64, 64, torch.float16) == CHOOSE
    assert _choice.config_for(0, 16, 4096, 4096, torch.float16) == best
    assert len(_choice.tuned) == 1
    with use_tuned(False):
        assert not _choice.tuned
    assert _choice.config_for(0, 16, 4096, 4096, torch.float16) == best
    use_tuned(False)
    assert not _choice.tuned


def test_asking_for_times_that_nobody_measured_changes_nothing(machine, monkeypatch):
    machine(lambda config, kind: 10.0)
    monkeypatch.setenv("HWKERN_TUNED", "1")
    _choice.ask()
    assert _choice.config_for(0, 16, 4096, 4096, torch.float16) == CHOOSE
    assert not _choice.tuned


def test_what_agrees_with_the_model_takes_no_room(machine):
    machine(lambda config, kind: 10.0)
    assert not tune([(4096, 4096)], m=[16], show=False).changed
    assert not _choice.tuned


def test_without_save_nothing_is_kept(machine, tmp_path):
    best = second_best(16, 512, 512)
    measured = machine(lambda config, kind: 5.0 if (config, kind) == (best, PRODUCT) else 10.0)
    found = tune([(512, 512)], m=[16], save=False, show=False)
    assert found.file is None
    assert not list(tmp_path.iterdir())
    assert _choice.config_for(0, 16, 512, 512, torch.bfloat16) == best
    tune([(512, 512)], m=[16], show=False)
    assert len(measured) == 8


@pytest.mark.parametrize(
    "entries",
    [
        {"nonsense": 1, "1x2 bfloat16": {}, "ax2x3 bfloat16": {}, "0x4096x4096 bfloat16": {}},
        {f"{m}x4096x4096 bfloat16": value for m, value in ((9, None), (16, [1]))},
        {f"{m}x4096x4096 bfloat16": {"configs": {"x": 1.0, "0": "fast", "1": -3}} for m in (9, 16)},
        {f"{m}x4096x4096 notype": {"configs": {"0": 1.0}} for m in (9, 16)},
        {f"{m}x4096x4096 cuda": {"configs": {"0": 1.0}} for m in (9, 16)},
        {f"{m}x4096x4096 bfloat16": {"configs": {"99999": 1.0}} for m in (9, 16)},
        {f"{m}x4096x4096 bfloat16": {"configs": {"0": 10**400, "1": True, "2": math.nan}} for m in (9, 16)},
        {f"{m}x4096x4096 bfloat16 song": {"configs": {"0": 1.0}} for m in (9, 16)},
        {f"{'9' * 5000}x4096x4096 bfloat16": {"configs": {"0": 1.0}}},
    ],
)
def test_entries_that_make_no_sense_are_a_miss(machine, entries):
    measured = machine(lambda config, kind: 10.0)
    tune_module.cache_of(GPU).update(entries)
    use_tuned()
    assert not _choice.tuned
    assert explain(16, 4096, 4096).chosen == model(16, 4096, 4096)
    tune([(4096, 4096)], m=[16], show=False)
    assert len(measured) == 4


def test_a_faster_peer_is_reported(machine):
    machine(lambda config, kind: 10.0)
    found = tune([(4096, 4096)], m=[16], peers=True, show=False)
    for kind in (PRODUCT, LAYER):
        assert f"bf16 is faster at M = 16 of 4096×4096: 0.5 µs against the {kind}'s 10.0." in str(found)
    assert "torch: bf16" in str(explain(16, 4096, 4096))


def test_tune_refuses_what_it_cannot_do(machine):
    machine(lambda config, kind: 10.0)
    with pytest.raises(ValueError, match="K of 1"):
        tune([(8, 0)], show=False)
    with pytest.raises(ValueError, match="K of 1"):
        tune([(8, ops.K_MAX + 1)], show=False)
    with pytest.raises(ValueError, match="int32"):
        tune([(8, 8)], dtype=torch.int32, show=False)
    with pytest.raises(ValueError, match=r"hwkern\.patch"):
        tune(torch.nn.Linear(8, 8), show=False)
    with pytest.raises(ValueError, match=r"hwkern\.patch"):  # int8, but on the CPU
        tune(hwkern.nn.Int8Linear.from_float(torch.nn.Linear(64, 64)), show=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and this machine has one")
def test_tune_without_a_gpu_says_why():
    with pytest.raises(RuntimeError, match="measures on a GPU"):
        tune([(8, 8)])


def test_the_module_may_stand_for_the_function(machine):
    machine(lambda config, kind: 10.0)
    assert tune_module([(64, 64)], m=[1], show=False).measured == 2
    assert explain_module(1, 64, 64).m == 1
    assert callable(hwkern.tune)
    assert callable(hwkern.explain)


# ---- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and this machine has one")
def test_explain_without_a_gpu_predicts_for_an_h100():
    found = explain(16, 4096, 4096)
    assert "no GPU here" in found.gpu
    assert found.chosen == model(16, 4096, 4096)
    assert found.candidates[0].id == found.chosen
    assert found.layer_chosen == tune_module.model_choice(16, 4096, 4096, GPU, "bfloat16", LAYER)
    assert all(c.measured_us is None and c.layer_us is None for c in found.candidates)
    assert {c.id for c in found.candidates if not c.predicted_us} == {r["id"] for r in tune_module.layer_configs()}
    assert f"→{'⇒' if found.layer_chosen == found.chosen else ' '} {found.chosen}" in str(found)
    with pytest.raises(RuntimeError, match="only on a GPU"):
        explain(16, 4096, 4096, measure_now=True)


def test_explain_shows_measured_times_and_what_they_mean(machine):
    best = second_best(16, 4096, 4096)
    machine(lambda config, kind: 5.0 if config == best else 10.0 + config / 1e5)
    found = explain(16, 4096, 4096, measure_now=True)
    assert found.chosen == model(16, 4096, 4096)  # nothing was tuned: ops still asks the model
    assert f"config {best} was measured 100" in found.reason
    assert next(c.id for c in found.candidates if c.measured_us) == best
    assert explain(16, 4096, 4096).candidates == found.candidates  # kept
    tune([(4096, 4096)], m=[16], show=False)
    tuned = explain(16, 4096, 4096)
    assert tuned.chosen == best
    assert "M = 9 … 16" in tuned.reason


def test_a_layer_is_measured_apart_from_its_product(machine):
    """4096×768×768: the model lets one launch quantize; say that here another one-launch config is the faster."""
    assert tune_module.model_choice(4096, 768, 768, GPU, "bfloat16", LAYER) == 406
    times = {(401, LAYER): 4.0, (406, LAYER): 5.0, (second_best(4096, 768, 768), PRODUCT): 5.0}
    machine(lambda config, kind: times.get((config, kind), 10.0))
    found = tune([(768, 768)], m=[4096], show=False)
    assert {(step.kind, step.config) for step in found.steps} == {
        (LAYER, 401), (PRODUCT, second_best(4096, 768, 768))
    }  # fmt: skip
    assert "layer 3073–4096×768×768" in str(found)
    assert _choice.config_for(0, 4000, 768, 768, torch.bfloat16, LAYER) == 401
    assert _choice.config_for(0, 4000, 768, 768, torch.bfloat16) == second_best(4096, 768, 768)
    explained = explain(4096, 768, 768)
    assert (explained.chosen, explained.layer_chosen) == (second_best(4096, 768, 768), 401)
    assert {c.id: c.layer_us for c in explained.candidates if c.id in (401, 406)} == {401: 4.0, 406: 5.0}
    assert all(c.measured_us is None for c in explained.candidates if c.id >= 401)
    assert "⇒ 401" in str(explained)
    _choice.tuned.clear()  # as in a new process
    assert "406 was" not in explain(4096, 768, 768).layer_reason
    assert "config 401 was measured 25.0% faster" in explain(4096, 768, 768).layer_reason
    use_tuned()
    assert _choice.config_for(0, 4000, 768, 768, torch.bfloat16, LAYER) == 401


def test_a_layer_whose_k_one_launch_cannot_take_is_not_measured_with_it(machine):
    asked = set()
    machine(lambda config, kind: asked.add((config, kind)) or 10.0)
    tune([(64, 1024)], m=[1], show=False)
    assert asked
    short = {row["id"]: row["max_k"] for row in tune_module.layer_configs() if row["max_k"] < 1024}
    assert short
    assert not [config for config, _ in asked if config in short]
    tune([(64, 768)], m=[1], show=False)
    assert {kind for config, kind in asked if config in short} == {LAYER}
    notes = {c.id: c.note for c in explain(1, 64, 1024).candidates}
    assert all(notes[config] == f"takes K up to {most}" for config, most in short.items())


def test_the_model_s_choice_of_a_layer_is_the_launch_s(machine):
    """csrc/linear.cpp lets one launch quantize 16-bit values only; of float32 it asks for the product's config."""
    assert tune_module.model_choice(512, 768, 768, GPU, "float32", LAYER) == model(512, 768, 768)
    machine(lambda config, kind: 10.0)
    assert not tune([(768, 768)], m=[512], dtype=torch.float32, show=False).changed
    assert explain(512, 768, 768, dtype="float32").layer_chosen == model(512, 768, 768)


def test_explain_says_why_a_config_cannot_run(monkeypatch, machine):
    machine(lambda config, kind: 10.0)
    small = hardware.gpu_from_properties(0, {**PROPERTIES, "compute": 86, "shared_bytes": 101_376, "sm_count": 84})
    monkeypatch.setattr(hardware, "gpus", lambda: [small])
    notes = {c.id: c.note for c in explain(64, 4096, 4096).candidates}
    table = {row["id"]: row for row in (*tune_module.product_configs(), *tune_module.layer_configs())}
    assert any("needs compute capability 9.0" in note for note in notes.values())
    assert all(bool(notes[i]) == (row["min_compute"] > 86 or row["shared_bytes"] > 101_376) for i, row in table.items())


def test_explain_of_a_gpu_that_runs_nothing(monkeypatch, machine):
    machine(lambda config, kind: 10.0)
    old = hardware.gpu_from_properties(0, {**PROPERTIES, "compute": 75})
    monkeypatch.setattr(hardware, "gpus", lambda: [old])
    monkeypatch.setattr(hardware, "speed_of_light", lambda *a, **o: hardware.Floor(1e-6, "memory", None, 1e-6, 1, 1))
    found = explain(64, 4096, 4096)
    assert found.chosen == CHOOSE
    assert "no kernel runs" in found.reason


def test_the_command_prints_the_table_and_json(capsys):
    assert cli.main(["explain", "16", "4096", "4096"]) == 0
    out = capsys.readouterr().out
    assert "predicted µs" in out
    assert "speed of light" in out
    assert cli.main(["explain", "16", "4096", "4096", "--json", "--dtype", "float16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["m"], found["dtype"]) == (16, "float16")
    assert cli.main(["explain", "0", "4096", "4096"]) == 2
    assert "M and N of at least 1" in capsys.readouterr().err


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_ops_ask_the_table_when_it_is_not_empty():
    """With an id that no kernel has: the refusal shows that the launch took it."""
    x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    layer = hwkern.nn.Int8Linear.from_float(torch.nn.Linear(64, 48, device="cuda", dtype=torch.bfloat16))
    a, b = (torch.ones(size, 64, dtype=torch.int8, device="cuda") for size in (3, 48))
    scale = torch.ones(48, device="cuda")
    layer(x)
    for kind in (PRODUCT, LAYER):
        _choice.tuned[torch.cuda.current_device(), 48, 64, torch.bfloat16, kind] = (12345,) * (len(EDGES) + 1)
    for call in (
        lambda: layer(x),
        lambda: torch.ops.hwkern.int8_linear(x, layer.weight, layer.weight_scale),
        lambda: ops.int8_linear(x, layer.weight, layer.weight_scale, activation="relu"),
        lambda: ops.int8_matmul(a, b, None, scale, out_dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="unknown config id"):
            call()
    ops.int8_matmul(
        a, b, None, scale, out_dtype=torch.bfloat16, config=0
    )  # named by the caller: the table is not asked
    _choice.tuned.clear()
    layer(x)


@pytest.mark.gpu
def test_tune_of_a_patched_model_keeps_its_results():
    model = torch.nn.Sequential(torch.nn.Linear(512, 768), torch.nn.GELU(), torch.nn.Linear(768, 512))
    model = model.to("cuda", torch.bfloat16)
    hwkern.patch(model)
    x = torch.randn(40, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        before = model(x)
        found = tune(model, m=[40], peers=True, show=False)
        assert {(step.n, step.k) for step in found.steps} == {(768, 512), (512, 768)}
        assert found.measured == 8
        assert all(us > 0 for step in found.steps for us in step.us)
        assert torch.equal(model(x), before)  # every config gives the same bits
    again = tune(model, m=[40], peers=True, show=False)
    assert again.measured == 0
    assert explain(48, 768, 512).candidates[0].measured_us


@pytest.mark.gpu
def test_explain_measures_every_candidate_that_runs():
    found = explain(33, 300, 200, measure_now=True)
    assert all((c.measured_us is None) == (c.predicted_us is None) for c in found.candidates)
    runnable = [
        *tune_module.candidates(33, 300, 200, hardware.gpu()),
        *tune_module.layer_candidates(200, hardware.gpu()),
    ]
    assert {c.id for c in found.candidates if c.layer_us} == set(runnable)
    assert explain(33, 300, 200).candidates == found.candidates
