"""validate, report and their commands, on models small enough for a second."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import H100 as PROPERTIES
from torch import nn

import hwkern
from hwkern import _native, cli, hardware, metrics
from hwkern._survey import describe

K = 64
FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    return model, [torch.randn(32, 512), torch.randn(2, 512)]

def bare():
    return make()[0]

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_factory", None)


def pair() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    twin = copy.deepcopy(model)
    hwkern.patch(twin, include="*")
    return model, twin


# ---- validate -------------------------------------------------------------------------------------------------------


def test_both_models_side_by_side() -> None:
    model, twin = pair()
    batches = [torch.randn(8, K), torch.randn(3, K)]
    labels = [model(x).argmax(-1) for x in batches]
    found = hwkern.validate(model, twin, batches, metric=[metrics.top1(labels), metrics.cosine()], show=False)
    assert found.shapes == ["8×64", "3×64"]
    assert all(ms > 0 for ms in found.reference_ms + found.model_ms)
    assert all(25 < snr < 60 for snr in found.snr_db)
    assert all(0.99 < cosine < 1 for cosine in found.cosine)
    assert found.model_bytes < 0.3 * found.reference_bytes
    assert found.metrics["top-1"][0] == 1
    assert found.metrics["cosine"][0] == pytest.approx(1)
    text = str(found)
    assert "× as fast over all batches" in text
    assert "cosine: 1 -> 0.99" in text
    assert json.loads(json.dumps(found.to_dict()))["shapes"] == found.shapes


def test_a_copy_is_the_same_numbers() -> None:
    model, _ = pair()
    found = hwkern.validate(model, copy.deepcopy(model), [torch.randn(2, K)], show=False)
    assert found.snr_db == [math.inf]
    assert found.to_dict()["snr_db"] == [None]
    assert "same" in str(found)


def test_an_output_that_is_not_finite_is_not_the_same() -> None:
    model, twin = pair()
    with torch.no_grad():
        twin[2].bias[3] = math.nan
    found = hwkern.validate(model, twin, [torch.randn(2, K)], show=False)
    assert found.snr_db == [-math.inf]
    assert "-inf" in str(found)
    assert "same" not in str(found)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (data["snr_db"], data["cosine"]) == ([-1e9], [None])
    page = describe(hwkern.patch(model, include="*"), model, validation=found).to_html()
    assert "× as fast, but outputs that are not finite." in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"model": a["reference_model"]}, "one object"),
        (lambda a: {"batches": []}, "There are no batches"),
        (lambda a: {"metric": lambda m, b: math.nan}, "returned nan"),
        (lambda a: {"model": nn.Linear(K, K + 1)}, "differ in shape"),
    ],
)
def test_what_cannot_be_compared(change: Any, message: str) -> None:
    model, twin = pair()
    arguments: dict[str, Any] = {"reference_model": model, "model": twin, "batches": [torch.randn(2, K)], "show": False}
    with pytest.raises(ValueError, match=message):
        hwkern.validate(**{**arguments, **change(arguments)})


# ---- report ---------------------------------------------------------------------------------------------------------


def test_report_works_at_any_time_and_names_the_schemes() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(4, 4))
    fresh = hwkern.report(model)
    assert [layer.status for layer in fresh.layers] == ["left", "left", "left"]
    assert "hwkern.patch has not been here" in str(fresh)

    class Plan:
        def __init__(self) -> None:
            from hwkern._recipes import Recipe

            self.recipes = {"0": Recipe("w8a8"), "1": Recipe("w8a16")}

    hwkern.patch(model, plan=Plan())
    now = hwkern.report(model)
    assert [layer.scheme for layer in now.layers] == ["w8a8", "w8a16", ""]
    assert "already w8a16" in str(now)
    assert hwkern.Report.from_json(now.to_json()) == now
    with pytest.raises(TypeError, match="takes a torch"):
        hwkern.report(3)


# ---- the commands ---------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main([*arguments, "--device", "cpu"])
    return (code, *capsys.readouterr())


def test_plan_validate_and_report_a_factory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "plan", "my_factory:make", "--save", "plan.json", "--explain", "0")
    assert code == 0
    assert "Plan for Sequential" in out
    assert "0: Linear 512 → 512, float32. Calls × tokens: 1× 2, 1× 32" in out
    assert set(hwkern.Plan.load("plan.json").layers) == {"0", "2"}
    code, out, _ = run(capsys, "validate", "my_factory:make", "--plan", "plan.json", "--json")
    assert code == 0
    assert json.loads(out)["shapes"] == ["32×512", "2×512"]
    code, out, _ = run(capsys, "report", "my_factory:make")
    assert code == 0
    assert "2 layers swapped to int8" in out


def test_a_transformers_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "intermediate_size": 384, "num_attention_heads": 4, "vocab_size": 99}
    transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "bert")
    code, out, _ = run(capsys, "plan", str(tmp_path / "bert"), "--batch", "2x8", "--batch", "1x3", "--json")
    assert code == 0
    layers = {layer["names"][0]: layer for layer in json.loads(out)["layers"]}
    assert layers["encoder.layer.0.attention.output.dense"]["calls"] == {"3": 1, "16": 1}
    code, out, _ = run(capsys, "plan", str(tmp_path / "bert"), "--batch", "2x8", "--no-embeddings", "--json")
    assert not [layer for layer in json.loads(out)["layers"] if layer["kind"] == "Embedding"]
    code, out, _ = run(capsys, "validate", str(tmp_path / "bert"), "--batch", "2x8")
    assert code == 0
    assert "2×8" in out


def test_a_name_that_is_no_layer_costs_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """What took minutes to measure is printed and saved before the error."""
    code, out, err = run(capsys, "plan", "my_factory:make", "--save", "kept.json", "--explain", "nothing")
    assert (code, "Plan for Sequential" in out, "has no layer 'nothing'" in err) == (1, True, True)
    assert hwkern.Plan.load("kept.json").layers


def test_a_device_that_is_not_here_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "cuda_problem", lambda: "no driver.")
    for command in (["plan", "my_factory:make"], ["bench", "--models", "bert-base"]):
        assert cli.main([*command, "--device", "cuda"]) == 1
        assert capsys.readouterr().err.strip() == "--device cuda is not possible: no driver."
    monkeypatch.setattr(_native, "cuda_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "gpus", lambda: [hardware.gpu_from_properties(0, PROPERTIES)])
    assert cli.main(["plan", "my_factory:make", "--device", "cuda:2"]) == 1
    assert "this machine has 1 GPU(s), numbered from cuda:0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "no_such_module:make"], "module 'no_such_module' cannot be imported"),
        (["plan", "my_factory:absent"], "has no function 'absent'"),
        (["plan", "my_factory:wrong"], "gives int, not a torch.nn.Module"),
        (["plan", "my_factory:bare"], "takes something unknown: give package.module:factory"),
        (["plan", "."], "is neither a transformers folder"),
        (["plan", "my_factory:make", "--threads", "0"], "--threads 0"),
        (["plan", "my_factory:make", "--batch", "ax3"], "--batch ax3"),
        (["plan", "my_factory:make", "--save", "no/such/folder.json"], "there is no folder no/such"),
        (["validate", "my_factory:make", "--html", "no/such/folder.html"], "there is no folder no/such"),
        (["validate", "my_factory:make", "--plan", "none.json"], "none.json"),
        (["report", "my_factory:make", "--plan", "my_factory.py"], "is no plan"),
    ],
)
def test_a_wrong_command_is_a_sentence_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
