"""`hwkern bench` end to end on tiny models on the CPU: every row is there, right results only, budget, files, page."""

from __future__ import annotations

import copy
import csv
import importlib.util
import io
import json
import re
import shlex
import statistics
import struct
import subprocess
import sys
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

from hwkern import _cpu, _svg, cli, ops
from hwkern.bench import (
    accuracy,
    comparison,
    engine_child,
    engines,
    kernel_page,
    kernels,
    models,
    page,
    paths,
    settings,
    subjects,
    tables,
    traffic,
    verdicts,
)
from hwkern.bench.models import AbsentError

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install 'hwkern[demo]'"
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(model="tiny-bert", run="fp32", workloads="1x16", **more):
    names = tuple(filter(None, model.split(",")))
    return settings.Settings(
        "cpu", names, tuple(run.split(",")), tuple(map(settings.workload, workloads.split(","))),
        **{"seconds": 0.05, "bound_ms": 2000.0, "requests": 60, "max_rows": 4, "show": False,
           "keep": {"command": "hwkern bench", "commit": "abc"}, **more},
    )  # fmt: skip


def run(**chosen):
    kept = []
    made = comparison.Comparison(options(**chosen), lambda document: kept.append(copy.deepcopy(document)))
    document = made.run()
    assert kept[-1] == document
    return document


def by_path(document, workload=None):
    return {row["path"]: row for row in document["rows"] if workload in (None, row["workload"])}


@pytest.fixture(scope="module")
def measured():
    """One document with all kinds of rows."""
    torch.set_num_threads(1)
    return run(
        run="fp32,bf16,hwkern-patch,dynamic-fbgemm,bitsandbytes,trt-fp16,fp32+graph,torchao-fp8+compile",
        model="tiny-bert,tiny-llama", workloads="2x16,decode:2x8+3,traffic:2,traffic:0",
    )  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


@needs_transformers
def test_every_model_workload_and_path_has_exactly_one_row(measured):
    names = measured["settings"]["paths"]
    seen = [(r["model"], r["workload"], r["path"]) for r in measured["rows"]]
    assert len(seen) == len(set(seen))
    wanted = {("tiny-bert", w, p) for w in ("2x16", "traffic:2", "traffic:0") for p in names}
    wanted |= {("tiny-llama", w, p) for w in ("2x16", "decode:2x8+3") for p in names}
    wanted |= {
        ("tiny-bert", "decode:2x8+3", "all"),
        ("tiny-llama", "traffic:2", "all"),
        ("tiny-llama", "traffic:0", "all"),
    }
    assert set(seen) == wanted


@needs_transformers
def test_rows_hold_what_the_schema_says(measured):
    assert measured["schema"] == 1
    assert measured["benchmark"] == "comparison"
    for key in ("date", "command", "commit", "torch", "python", "cpu", "threads"):
        assert key in measured["environment"]
    for row in measured["rows"]:
        assert row["status"] in ("ok", "absent", "not run", "failed")
        if row["status"] != "ok":
            assert row["reason"]
            continue
        assert row["tokens_per_s"] > 0
        assert len(row["blocks"]) == (settings.TRAFFIC_BLOCKS if "bound_ms" in row else settings.BLOCKS)
        assert min(row["blocks"]) <= row["tokens_per_s"] <= 1.01 * max(row["blocks"]) or "bound_ms" in row
        assert row["noise"] >= 0.02
        assert row["spread"] >= 0
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p95"] <= row["latency_ms"]["p99"]
        assert row["weight_bytes"] > 0
        assert row["ratio"]["to"] == "fp32"
        assert row["accuracy"]["cosine"] > 0.99
        assert row["memory"] == {"steady": None, "peak": None}  # torch counts on GPUs only
        assert row["watts"] is None
    json.loads(json.dumps(measured, allow_nan=False))


@needs_transformers
def test_paths_that_cannot_run_say_why(measured):
    rows = by_path(measured, "2x16")
    assert rows["bitsandbytes"]["status"] == "absent"
    assert "NVIDIA" in rows["trt-fp16"]["reason"]
    assert "CUDA graphs" in rows["fp32+graph"]["reason"]
    assert rows["fp32"]["status"] == "ok"


@needs_transformers
def test_a_path_runs_with_the_models_and_workloads_it_is_asked_for():
    document = run(run="fp32,bf16@1x16,bf16+compile@tiny-llama", workloads="1x16,2x16")
    assert [(row["workload"], row["path"]) for row in document["rows"]] == [
        ("1x16", "fp32"), ("1x16", "bf16"), ("2x16", "fp32"),
    ]  # fmt: skip
    kept = run(workloads="1x16,2x16", model="tiny-bert,tiny-llama", kept_to={"2x16": ("tiny-llama",)})
    assert [(row["model"], row["workload"]) for row in kept["rows"]] == [
        ("tiny-bert", "1x16"), ("tiny-llama", "1x16"), ("tiny-llama", "2x16"),
    ]  # fmt: skip
    both = paths.path("fp16@8x512@decode:1x8+2@llama-1b")
    assert both.name == "fp16"
    assert both.wanted("llama-1b", "decode:1x8+2")
    assert not both.wanted("llama-1b", "8x128")
    assert not both.wanted("gpt2", "8x512")


def test_the_baseline_is_one_and_exact(measured):
    for row in measured["rows"]:
        if row["path"] == "fp32" and row["status"] == "ok":
            assert row["ratio"]["value"] == 1
            assert row["accuracy"]["cosine"] == pytest.approx(1, abs=1e-6)


@needs_transformers
def test_decoding_says_when_the_first_and_each_later_token_came(measured):
    row = by_path(measured, "decode:2x8+3")["fp32"]
    calls, first, later = row["latency_ms"], row["first_token_ms"], row["per_token_ms"]
    assert later["n"] == 2 * first["n"] == 2 * calls["n"]
    assert first["p50"] < calls["p50"]
    assert row["checked_cosine"] > 0.9999
    # 2 prompts, 3 new tokens each: 6 tokens a call.
    assert row["tokens_per_s"] == pytest.approx(6 / calls["p50"] * 1e3, rel=0.5)


@needs_transformers
def test_traffic_keeps_within_its_bound_and_shows_what_padding_costs(measured):
    profiled, exact = (by_path(measured, w)["fp32"] for w in ("traffic:2", "traffic:0"))
    for row in (profiled, exact):
        assert row["latency_ms"]["p95"] <= row["bound_ms"]
        assert 0 < row["input_share"] < 1
        assert row["requests_per_s"] > 0
        assert row["checked"]["requests"] == 60
        assert row["checked"]["p95_ms"] > 0
    assert len(profiled["tops"]) == 2
    assert exact["tops"] == []
    assert profiled["padding_waste"] > 0


@needs_transformers
def test_int8_weights_are_smaller(measured):
    rows = by_path(measured, "2x16")
    small = rows["dynamic-fbgemm"]["weight_bytes"]
    assert small < rows["bf16"]["weight_bytes"] < rows["fp32"]["weight_bytes"]


@needs_transformers
@pytest.mark.parametrize(("model", "workload"), [("tiny-vit", "2"), ("tiny-gpt2", "decode:1x8+2")])
def test_images_and_conv1d_models_run(model, workload):
    rows = by_path(run(model=model, run="fp32,hwkern-patch,dynamic-fbgemm", workloads=workload))
    assert rows["fp32"]["status"] == "ok"
    if model == "tiny-gpt2":
        assert "Conv1D" in rows["dynamic-fbgemm"]["reason"]


@needs_transformers
def test_a_plan_says_which_schemes_it_chose():
    row = by_path(run(run="fp32,hwkern-plan"))["hwkern-plan"]
    assert row["status"] == "ok"
    linears = sum(count for scheme, count in row["plan"].items() if scheme not in ("int8", "keep"))  # of tables
    assert linears == (4 if _cpu.int8_is_fast() else 0)  # of twelve: the others are small
    assert sum(each["layers"] for each in row["plan_shapes"]) == sum(row["plan"].values())
    for each in row["plan_shapes"]:
        table = each["kind"].startswith("embeddings.")
        assert table or each["kind"] in ("intermediate.dense", "output.dense")
        assert each["chosen"] in each["us"]
        assert each["reason"]
        assert {"16"} == set(each["us"]["keep"])  # tokens of the workload 1x16


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_base(monkeypatch):
    def add(name, make):
        monkeypatch.setitem(paths.BASES, name, paths.Base(name, "stock", ("cpu",), make))

    return add


@needs_transformers
def test_a_path_that_computes_something_else_is_not_timed(with_base):
    def scrambled(model, context):
        made = copy.deepcopy(model)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
        return made

    with_base("scrambled", scrambled)
    row = by_path(run(run="fp32,scrambled"))["scrambled"]
    assert row["status"] == "failed"
    assert "wrong result: cosine" in row["reason"]
    assert "tokens_per_s" not in row


@needs_transformers
def test_a_path_that_breaks_does_not_stop_the_others(with_base):
    def broken(model, context):
        raise ZeroDivisionError("by nothing")

    def missing(model, context):
        raise AbsentError("pip install it")

    with_base("broken", broken)
    with_base("missing", missing)
    rows = by_path(run(run="broken,missing,fp32"))
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "ZeroDivisionError: by nothing")
    assert (rows["missing"]["status"], rows["missing"]["reason"]) == ("absent", "pip install it")
    assert rows["fp32"]["status"] == "ok"


@needs_transformers
def test_a_workload_that_the_model_itself_cannot_run_leaves_the_others():
    """tiny-gpt2 has 256 positions."""
    broken, fine = run(model="tiny-gpt2", workloads="1x300,1x4")["rows"]
    assert (broken["workload"], broken["path"], broken["status"]) == ("1x300", "all", "failed")
    assert "Error" in broken["reason"]
    assert (fine["workload"], fine["status"]) == ("1x4", "ok")


@needs_transformers
def test_what_cannot_be_made_leaves_the_other_models_and_workloads(tmp_path):
    """Inputs without room for them, and a transformers folder of a kind that is not known here."""
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}', encoding="utf-8")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text(
            "{}" if name.endswith("json") else "[PAD]\n[UNK]\n[CLS]\n[SEP]\n", encoding="utf-8"
        )
    document = run(model=f"{tmp_path},tiny-bert", workloads="999999999x99999,1x16")
    assert [(row["workload"], row["path"], row["status"]) for row in document["rows"]] == [
        ("all", "all", "failed"), ("999999999x99999", "all", "failed"), ("1x16", "fp32", "ok"),
    ]  # fmt: skip


@needs_transformers
def test_a_path_that_breaks_while_it_is_timed_leaves_the_others(with_base):
    class Breaks(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.left = model, 20

        def forward(self, **inputs):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the device is gone")
            return self.model(**inputs)

    with_base("fragile", lambda model, context: Breaks(model))
    rows = by_path(run(run="fragile,fp32,bf16", seconds=1.0))
    assert (rows["fragile"]["status"], rows["fragile"]["reason"]) == ("failed", "RuntimeError: the device is gone")
    for name in ("fp32", "bf16"):
        assert rows[name]["status"] == "ok"
        assert len(rows[name]["blocks"]) == settings.BLOCKS


@pytest.fixture
def pretended_graphs(monkeypatch):
    """CUDA graphs on a CPU: the captured call itself, on the buffers that it was captured with."""
    monkeypatch.setattr(paths.Path, "problem", lambda self, device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def captured(call, pool=None):
        for _ in range(subjects.WARM_UP):
            call()
        return call

    monkeypatch.setattr(subjects, "captured", captured)


@needs_transformers
@pytest.mark.usefixtures("pretended_graphs")
@pytest.mark.parametrize("workload", ["2x16", "traffic:2", "decode:2x8+2", "decode:1x8+5"])
def test_captured_paths_run_on_fixed_buffers(workload):
    model = "tiny-llama" if workload.startswith("decode") else "tiny-bert"
    rows = by_path(run(run="fp32,fp32+graph", model=model, workloads=workload))
    row = rows["fp32+graph"]
    assert row["status"] == "ok", row
    if workload.startswith("traffic"):
        # Fixed shapes: the rows are padded too.
        assert row["padding_waste"] >= rows["fp32"]["padding_waste"]
    else:
        assert row["checked_cosine"] > 0.9999


@needs_transformers
@pytest.mark.usefixtures("pretended_graphs")
def test_captured_paths_need_profiles():
    row = by_path(run(run="fp32+graph", workloads="traffic:0"))["fp32+graph"]
    assert row["status"] == "absent"
    assert "fixed shapes" in row["reason"]


@needs_transformers
def test_served_answers_are_those_of_each_request_alone():
    model = models.find("tiny-bert")
    torch.manual_seed(0)
    module = model.make("cpu")
    subject = subjects.TorchSubject(paths.path("fp32"), model, module, 0, "cpu")
    stream = traffic.Traffic([5, 9], [0.0, 1.0], (16,), 4)
    subject.prepare(settings.workload("traffic:1"), {}, stream)
    requests = [[11, 12, 13, 14, 15], list(range(20, 29))]
    answers = []
    server = subject._serve
    right = server._answer
    server._answer = lambda inputs: answers.append(right(inputs)) or answers[-1]
    seconds, inputs = subject.serve(requests, 4, 16)
    assert 0 < inputs < seconds
    for row, ids in zip(answers[0], requests, strict=False):
        with torch.inference_mode():
            alone = module(input_ids=torch.tensor([ids])).last_hidden_state.mean(1)[0]
        assert torch.allclose(row, alone, atol=1e-5)


@needs_transformers
def test_a_bound_that_cannot_be_held_is_said():
    row = by_path(run(workloads="traffic:1", bound_ms=1e-3))["fp32"]
    assert row["status"] == "failed"
    assert "longer than the bound" in row["reason"]


@needs_transformers
def test_the_budget_ends_the_run_and_lists_what_was_left(with_base):
    def slow(model, context):
        time.sleep(60)

    with_base("slow", slow)
    import transformers  # noqa: F401  (its import is not what is timed)

    start = time.monotonic()
    document = run(run="fp32,slow,bf16", model="tiny-bert,tiny-llama", workloads="1x16,2x16", budget=6.0, seconds=30.0)
    assert time.monotonic() - start < 6 + 1.5  # one call, and what a busy machine adds
    rows = {(r["model"], r["workload"], r["path"]): r for r in document["rows"]}
    assert rows["tiny-bert", "1x16", "fp32"]["status"] == "ok"
    assert rows["tiny-bert", "1x16", "slow"]["status"] == "not run"
    assert all("budget" in r["reason"] for r in rows.values() if r["status"] == "not run")


def test_a_model_gets_time_by_its_rows_and_the_first_more(monkeypatch):
    shares = []
    monkeypatch.setattr(comparison.Comparison, "_start", lambda self: None)
    monkeypatch.setattr(comparison.Comparison, "_model", lambda self, name, budget: shares.append(budget.left))
    run(run="fp32,bf16@tiny-bert,hwkern-plan@1x16", model="tiny-bert,tiny-llama,tiny-vit", workloads="1x16,2x16",
        kept_to={"2x16": ("tiny-bert", "tiny-llama")}, budget=100.0)  # fmt: skip
    # Rows: 3 + 2, 2 + 1 and 2. Nobody used any of the 100 seconds: 1.5 · 5 of 10, 1.5 · 3 of 5, and all there is.
    assert shares == pytest.approx([75.0, 90.0, 100.0], abs=1.0)


@needs_transformers
def test_a_spent_budget_still_lists_every_model():
    document = run(model="tiny-bert,tiny-llama", budget=1.0, started=time.monotonic() - 5)
    assert [(r["model"], r["status"], r["reason"]) for r in document["rows"]] == [
        ("tiny-bert", "not run", "budget"), ("tiny-llama", "not run", "budget"),
    ]  # fmt: skip


@needs_transformers
def test_large_models_are_left_out_on_a_cpu():
    (row,) = run(model="llama-8b-8l")["rows"]
    assert row["status"] == "absent"
    assert "11 GB" in row["reason"]


def test_without_transformers_the_models_are_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (row,) = run(model="bert-base")["rows"]
    assert row["status"] == "absent"
    assert "pip install transformers" in row["reason"]


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="must be one of"):
        models.find("no-such-model")
    for name in ("fp99", "fp16+fast", "fp16+graph+graph", "trt-fp16+graph", ""):
        with pytest.raises(ValueError, match="must be one of"):
            paths.path(name)


def test_default_names_exist():
    for name in paths.DEFAULT_PATHS:
        assert paths.path(name).title
    assert {*models.DEFAULT_MODELS} <= {*models.MODELS, "minilm"}


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy_is_what_the_formulas_say():
    p, q = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]]), torch.tensor([[1.0, 1.5, -1.0], [0.0, 3.0, 0.0]])
    found = accuracy.compare(p, q, True)
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found["kl"] == pytest.approx(float(kl), abs=1e-6)
    assert found["top1"] == 0.5
    assert found["cosine_min"] == pytest.approx(float(torch.cosine_similarity(p[:1], q[:1])), abs=1e-6)
    assert found["vectors"] == 2
    assert "kl" not in accuracy.compare(p, q, False)
    assert "cosine 0." in accuracy.wrong(p, p.flip(-1)[:, [0, 1, 2]])
    assert accuracy.wrong(p, p) is None
    assert "shape" in accuracy.wrong(p, p[:1])
    assert accuracy.wrong(p, p * float("nan"))


@needs_transformers
def test_a_step_through_the_cache_is_a_plain_forward():
    model = models.find("tiny-llama")
    torch.manual_seed(0)
    module = model.make("cpu")
    subject = subjects.TorchSubject(paths.path("fp32"), model, module, 0, "cpu")
    inputs = model.inputs(2, 9, 0, "cpu")
    subject.prepare(settings.workload("decode:2x9+4"), inputs, None)
    subject.block(0.0)  # another generation before it changes nothing
    with torch.inference_mode():
        longer = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)
        want = module(input_ids=longer).logits[:, -1]
    # The same products in another order: float32 sums of 256 terms differ by about 256·2⁻²⁴ of logits around 1.
    assert torch.allclose(subject.output(), want, atol=1e-4)


@needs_transformers
def test_compiled_paths_give_the_same_and_are_timed():
    rows = by_path(run(run="fp32,fp32+compile", model="tiny-llama", workloads="2x16"))
    assert rows["fp32+compile"]["status"] == "ok", rows["fp32+compile"]
    assert rows["fp32+compile"]["checked_cosine"] > 0.9999


def test_tf32_is_switched_back(monkeypatch):
    before = torch.get_float32_matmul_precision()
    with subjects.precision(True):
        assert torch.get_float32_matmul_precision() == "high"
        with subjects.precision(False):
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(measured, tmp_path):
    from hwkern.commands import bench

    bench.write(measured, tmp_path)
    return tmp_path


@needs_transformers
def test_json_and_csv_hold_the_same_rows(measured, written):
    assert json.loads((written / "results.json").read_text(encoding="utf-8")) == measured
    lines = list(csv.DictReader(io.StringIO((written / "results.csv").read_text(encoding="utf-8"))))
    assert len(lines) == len(measured["rows"])
    for line, row in zip(lines, measured["rows"], strict=True):
        assert (line["model"], line["workload"], line["path"]) == (row["model"], row["workload"], row["path"])
        if row["status"] == "ok":
            assert float(line["tokens_per_s"]) == row["tokens_per_s"]
            assert float(line["latency_ms.p95"]) == row["latency_ms"]["p95"]
        else:
            assert line["reason"] == row["reason"]


@needs_transformers
def test_the_page_is_well_formed_and_fetches_nothing(measured, written):
    text = (written / "index.html").read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text.split("\n", 1)[1])  # behind the doctype; every element is closed
    assert tree.tag == "html"
    assert not re.search(r"<script|<link|<img|url\(|@import|src=", text)
    # Every measured row, and every reason, is on it.
    body = "".join(tree.itertext())
    for row in measured["rows"]:
        assert (paths.path(row["path"]).title if row["status"] == "ok" else row["reason"]) in body


@needs_transformers
def test_every_plot_is_a_drawing_of_its_own(written):
    files = sorted((written / "plots").iterdir())
    assert {"tiny-bert-2x16-throughput.svg", "tiny-llama-decode-2x8+3-latency.svg"} <= {f.name for f in files}
    for file in (file for file in files if file.suffix == ".svg"):
        tree = ElementTree.fromstring(file.read_text(encoding="utf-8"))
        assert tree.tag.endswith("svg")
        assert tree.findall("{http://www.w3.org/2000/svg}style")
        assert tree.findall("{http://www.w3.org/2000/svg}title")[0].text


def test_a_drawing_becomes_a_picture_with_its_words():
    pytest.importorskip("resvg_py")
    bars = _svg.bars([_svg.Bar("ours", 2.0, "2 /s", "now"), _svg.Bar("theirs", 1.0, "1 /s", "was")], "t", alone=True)
    plain = re.sub(r"<text[^>]*>[^<]*</text>", "", bars)
    picture, without_words = _svg.png(bars), _svg.png(plain)
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">2I", picture[16:24]) == (2 * _svg.WIDTH, 2 * 52)  # two bars of 22 and a margin of 8
    if importlib.util.find_spec("matplotlib") or any(Path("/usr/share/fonts").glob("**/*.ttf")):
        assert len(picture) > len(without_words) + 500  # letters


def test_without_resvg_the_svgs_are_written_and_the_remedy_is_said(monkeypatch, tmp_path, capsys):
    from hwkern.commands import bench

    monkeypatch.setitem(sys.modules, "resvg_py", None)
    row = {"model": "m", "workload": "1x16", "path": "fp32", "status": "ok", "tokens_per_s": 1.0, "weight_bytes": 4,
           "latency_ms": {"p50": 1.0, "p95": 1.0, "p99": 1.0}}  # fmt: skip
    document = {
        "benchmark": "comparison", "schema": 1, "rows": [row], "settings": {"baseline": "fp32", "blocks": 5},
        "environment": {"cpu": "c", "threads": 1, "torch": "2", "date": "d", "command": "c"},
    }  # fmt: skip
    bench.write(document, tmp_path)
    assert {file.suffix for file in (tmp_path / "plots").iterdir()} == {".svg"}
    assert "pip install resvg-py" in capsys.readouterr().err


@needs_transformers
def test_the_text_lists_what_was_not_measured(measured):
    text = tables.text(measured)
    assert "tiny-bert, traffic:2" in text
    assert "absent: CUDA graphs need an NVIDIA GPU" in text
    assert "± " in text


@needs_transformers
def test_the_headline_takes_the_fastest_of_each_kind(measured):
    rows = [
        r for r in measured["rows"] if r["status"] == "ok" and r["workload"] == "2x16" and r["model"] == "tiny-bert"
    ]
    found = dict(page.headline(rows))
    assert found["FP32"]["path"] == "fp32"
    assert found["TensorRT"] is None
    stock = found["INT8, stock"]
    assert stock["tokens_per_s"] == max(r["tokens_per_s"] for r in rows if r["path"].startswith("dynamic"))
    heads, cells = page.headline_cells(rows)
    assert all(len(line) == len(heads) for line in cells)
    assert [line[0] for line in cells][:2] == ["FP32", "FP16 / BF16"]


def said(**paths):
    """The verdicts on rows of (blocks, p50, weights) by path."""
    return verdicts.verdicts([
        {"path": name.replace("_", "-"), "blocks": blocks, "tokens_per_s": statistics.median(blocks),
         "latency_ms": {"p50": p50}, "weight_bytes": weights}
        for name, (blocks, p50, weights) in paths.items()
    ])  # fmt: skip


def test_a_verdict_is_on_the_path_that_is_ahead_in_everything():
    steady, quick, stock = [20.0] * 11, [21.0] * 11, [10.0] * 11
    found = said(fp16=(stock, 8.0, 200), bitsandbytes=([5.0] * 11, 9.0, 110), hwkern_patch=(steady, 4.0, 100),
                 hwkern_plan=(quick, 3.9, 120))  # fmt: skip
    assert found == [
        "torch: hwkern.patch is ahead of every stock path in throughput, p50 and weights: throughput 2.00× ± 2 % that "
        "of torch FP16; p50 0.50× that of torch FP16; weights 0.909× that of bitsandbytes LLM.int8."
    ]


def test_a_lead_within_the_noise_is_none():
    # Block against block: the third to the ninth of the ratios are 1.0 and 1.2, around a median of 1.1.
    ours = [8.0, 8.0, 10.0, 10.0, 11.0, 11.0, 11.0, 12.0, 12.0, 14.0, 14.0]
    found = said(trt_int8=([10.0] * 11, 8.0, 100), trt_hwkern=(ours, 8.0, 90))
    assert found == [
        "TensorRT: TensorRT + hwkern is ahead of every stock path in weights, within the noise in throughput, not "
        "ahead in p50: throughput 1.10× ± 18 % that of TensorRT INT8 (Q/DQ); p50 1.00× that of TensorRT INT8 (Q/DQ); "
        "weights 0.900× that of TensorRT INT8 (Q/DQ)."
    ]


def test_a_lead_of_one_block_is_not_known():
    """A run that its budget cut short has rows of one block, whose noise nobody knows."""
    (found,) = said(fp16=([10.0], 8.0, 200), hwkern_patch=([11.0], 7.0, 100))
    assert found.startswith("torch: hwkern.patch is ahead of every stock path in p50 and weights, timed too seldom to")


def test_without_a_stock_path_of_its_framework_there_is_no_verdict():
    assert said(hwkern_plan=([2.0, 2.0], 1.0, 1), trt_fp16=([1.0, 1.0], 1.0, 2)) == []


def test_the_worth_of_padding_lengths_is_said_for_the_path_that_serves_most():
    def traffic(rates, waste):
        return [{"path": path, "requests_per_s": rate, "padding_waste": waste} for path, rate in rates.items()]

    both = [
        ("4x32", [{"path": "fp16"}]),
        ("traffic:4", traffic({"hwkern-plan+graph": 300.0, "fp16": 200.0, "bf16": 400.0}, 0.37)),
        ("traffic:1", traffic({"hwkern-plan+graph": 100.0, "fp16": 90.0}, 3.36)),
    ]
    assert verdicts.padding(both) == [
        "hwkern.plan, CUDA graph serves 3.00× the requests with traffic:4 (padding +37 %) that it serves with "
        "traffic:1 (padding +336 %)."
    ]
    assert verdicts.padding(both[:2]) == []


def test_numbers_keep_three_digits():
    assert [tables.number(v) for v in (None, 0.01234, 1.5, 99.96, 123.4, 12345.6)] == [
        "–", "0.0123", "1.5", "100", "123", "12 346",
    ]  # fmt: skip


# ---- the command line ------------------------------------------------------------------------------------------------


def bench(capsys, *arguments):
    code = cli.main(["bench", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


@needs_transformers
def test_the_command_measures_writes_and_draws_again(tmp_path, capsys):
    common = ("--models", "tiny-bert", "--workloads", "1x16", "--paths", "fp32,bf16", "--seconds", 0.02, "--quiet")
    code, out, err = bench(capsys, *common, "--device", "cpu", "--out", tmp_path / "a", "--commit", "abc")
    assert code == 0, err
    assert "tiny-bert, 1x16" in out
    document = json.loads((tmp_path / "a" / "results.json").read_text(encoding="utf-8"))
    assert document["environment"]["commit"] == "abc"
    assert "hwkern bench --models tiny-bert" in document["environment"]["command"]
    assert str(tmp_path) not in json.dumps(document)
    code, again, _ = bench(capsys, "--from-json", tmp_path / "a" / "results.json", "--out", tmp_path / "b")
    assert code == 0
    assert again.replace("/b/", "/a/") == out
    for name in ("results.json", "results.csv", "index.html", "table.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_list_names_everything(capsys):
    code, out, _ = bench(capsys, "--list")
    assert code == 0
    for name in (*models.DEFAULT_MODELS, *paths.DEFAULT_PATHS, "traffic:4"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--paths", "fp99"], "path 'fp99'"),
        (["--models", "nothing"], "model 'nothing'"),
        (["--workloads", "9q"], "workload '9q'"),
        (["--seconds", "-1"], "--seconds -1.0"),
        (["--max-batch", "0"], "--max-batch 0"),
        (["--device", "tpu"], "--device tpu"),
        (["--threads", "0"], "--threads 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--p95-ms", "0"], "--p95-ms 0.0"),
        (["--models", "tests"], "model 'tests'"),
        (["--models", "tiny-bert", "--workloads", "1x16@tiny-brt"], "workload '1x16@tiny-brt': there is no model"),
        (["--paths", "fp32@tiny-bert@1x16q"], "path 'fp32@tiny-bert@1x16q': there is no model or workload '1x16q'"),
        (["--lengths", "no-such-file"], "no-such-file"),
        (["--lengths", __file__], "test_bench.py:1 is no JSON"),
        (["--out", __file__], "test_bench.py"),
    ],
)
def test_options_that_cannot_be_are_a_sentence(capsys, arguments, words):
    """Before anything is measured: what has been cannot be lost then."""
    code, _, err = bench(capsys, *arguments)
    assert code == 1
    assert words in err
    assert "Traceback" not in err
    assert " s  " not in err  # of the progress


def test_a_workload_may_be_kept_to_several_models(monkeypatch, capsys):
    from hwkern.bench.comparison import Comparison

    chosen = []
    monkeypatch.setattr(Comparison, "__init__", lambda self, options, keep: chosen.append(options))
    monkeypatch.setattr(Comparison, "run", lambda self: (_ for _ in ()).throw(ValueError("enough")))
    words = "1x8@tiny-bert,1x8@tiny-gpt2,1x16@tiny-bert,1x16,1x32@tiny-bert,1x32@tiny-gpt2@tiny-llama"
    bench(capsys, "--models", "tiny-bert,tiny-gpt2,tiny-llama,tiny-bert", "--workloads", words, "--device", "cpu")
    (options,) = chosen
    assert options.models == ("tiny-bert", "tiny-gpt2", "tiny-llama")
    assert [each.name for each in options.workloads] == ["1x8", "1x16", "1x32"]
    assert options.kept_to == {"1x8": ("tiny-bert", "tiny-gpt2")}
    # The same lists, of models and workloads that another run has.
    bench(capsys, "--models", "tiny-gpt2", "--paths", "fp32@tiny-bert@1x8", "--workloads", words, "--device", "cpu")
    assert chosen[1].kept_to["1x16"] == ("tiny-bert", "tiny-gpt2")


@pytest.mark.parametrize(
    "file",
    sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("bench-*.json")),
    ids=lambda file: file.stem,
)
def test_the_commands_of_the_results_still_run(monkeypatch, capsys, tmp_path, file):
    """As far as to the first measurement."""
    from hwkern.bench import kernels
    from hwkern.bench.comparison import Comparison

    def enough(*_):
        raise ValueError("enough")

    monkeypatch.setattr(Comparison, "__init__", enough)
    monkeypatch.setattr(kernels, "run", enough)
    environment = json.loads(file.read_text(encoding="utf-8"))["environment"]
    _, *words = shlex.split(environment["command"])
    assert words[0] == "bench"
    code, _, err = bench(capsys, *words[1:], "--device", "cpu", "--out", tmp_path)
    assert (code, err) == (1, "enough\n")


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "CPU_SHAPES", ((64, 48),))
    monkeypatch.setattr(kernels, "CPU_TOKENS", (3,))
    monkeypatch.setattr(kernels, "CPU_ROWS", ((4, 64),))


@pytest.mark.usefixtures("few_kernels")
def test_kernels_are_measured_and_drawn(tmp_path):
    kept = []
    document = kernels.run(options(seconds=0.05), kept.append)
    rows = document["rows"]
    assert [r["operator"] for r in rows] == [
        "INT8 GEMM", "quantize per token", "dequantize", "RMSNorm + quantize", "LayerNorm + quantize",
        "silu · up + quantize",
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "ok"
        assert row["us"] > 0
        assert row["noise"] >= 0.02
        assert row["peers_us"]
        assert row["of_light"] is None  # a CPU's peaks are not documented
    assert rows[0]["operations"] == 2 * 3 * 64 * 48
    ElementTree.fromstring(page.html(document).split("\n", 1)[1])
    assert "INT8 GEMM 3×64×48" in tables.text(document)
    assert len(tables.to_csv(document).splitlines()) == 1 + len(rows)


@pytest.mark.usefixtures("few_kernels")
def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = ops.int8_matmul

    def off_by_one(*arguments, **more):
        total = right(*arguments, **more)
        total.view(-1)[-1] += 1
        return total

    monkeypatch.setattr(ops, "int8_matmul", off_by_one)
    row = kernels.run(options(), lambda _: None)["rows"][0]
    assert row["status"] == "failed"
    assert "1 elements" in row["reason"]


def test_an_error_without_words_does_not_end_the_kernels(monkeypatch):
    def failing(*_):
        raise RuntimeError

    where = {"operator": "INT8 GEMM", "m": 1, "n": 16, "k": 16}
    monkeypatch.setattr(kernels, "everything", lambda device: [(where, failing)])
    (row,) = kernels.run(options(), lambda document: None)["rows"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError")


@pytest.mark.usefixtures("few_kernels")
def test_kernels_obey_the_budget():
    document = kernels.run(options(budget=1.0, started=time.monotonic() - 2), lambda _: None)
    assert {row["status"] for row in document["rows"]} == {"not run"}
    assert len(document["rows"]) == 3


def test_the_roofline_holds_every_product():
    row = {"operator": "INT8 GEMM", "dtype": "bfloat16", "m": 16, "n": 4096, "k": 4096, "status": "ok", "us": 7.0,
           "noise": 0.02, "peers_us": {"bf16": 14.0}, "absent": {"fp8": "no"}, "operations": 2 * 16 * 4096**2,
           "bytes": 4096**2 + 16 * 4096 * 3, "floor_us": 5.1, "bound": "memory", "of_light": 0.73}  # fmt: skip
    environment = {"gpu": "G", "bandwidth": 3.35e12, "int8_ops": 2.1e15, "clock_mhz": 1980.0, "torch": "2", "date": "d",
                   "command": "c"}  # fmt: skip
    document = {"schema": 1, "benchmark": "kernels", "environment": environment, "rows": [row, {**row, "m": 4096}]}
    assert set(kernel_page.plots(document)) == {
        "kernels-roofline.svg", "kernels-speed-of-light.svg", "kernels-products.svg",
    }  # fmt: skip
    drawn = kernel_page.roofline(document)
    assert drawn.count("<circle") == 2
    assert "3.35 TB/s" in drawn
    assert "fp8: no (2 rows)" in "".join(kernel_page.left_out(document))


# ---- drawings --------------------------------------------------------------------------------------------------------

NASTY = 'a < b & "c" > d\'s'


def test_drawings_are_well_formed_whatever_the_names():
    axes = _svg.Axis(NASTY, 1e-6, 1.0, True), _svg.Axis(NASTY, 0, 3)
    drawn = [
        _svg.bars([_svg.Bar(NASTY, 2.0, NASTY, "now", 0.1), _svg.Bar("b", 1.0, "", "was")], NASTY, 1.0, True),
        _svg.ranges([_svg.Range(NASTY, [1.0, 2.0, 9.0], NASTY, "other"), _svg.Range("x", [3.0], "", "was")], NASTY),
        _svg.plane(
            *axes, [_svg.Point(NASTY, 1e-3, 1.5, "now")], [_svg.Curve(NASTY, [(1e-5, 1), (0.5, 2)], "bound")], NASTY
        ),
    ]
    for each in drawn:
        ElementTree.fromstring(each)
    ElementTree.fromstring(_svg.page(NASTY, drawn).split("\n", 1)[1])


def test_names_of_points_do_not_cover_each_other():
    axes = _svg.Axis("x", 0, 1), _svg.Axis("y", 0, 1)
    names = [f"point {i}" for i in range(8)]
    tree = ElementTree.fromstring(_svg.plane(*axes, [_svg.Point(n, 0.5, 0.5, "now") for n in names], [], "t"))
    levels = [float(e.get("y")) for e in tree.iter() if e.text in names and e.tag.endswith("text")]
    assert len(levels) == 8
    assert all(abs(a - b) >= 12 for i, a in enumerate(levels) for b in levels[:i])
    assert float(tree.get("viewBox").split()[3]) > max(levels)


def test_names_of_points_in_a_row_cover_no_point_and_are_led_to():
    axes = _svg.Axis("x", 0, 1), _svg.Axis("y", 0, 1)
    names = [f"a rather long name {i}" for i in range(9)]
    points = [_svg.Point(name, 0.1 * i, 0.5, "now") for i, name in enumerate(names)]
    tree = ElementTree.fromstring(_svg.plane(*axes, points, [], "t"))
    words = {e.text: (float(e.get("x")), float(e.get("y"))) for e in tree.iter() if e.text in names}
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in tree.iter() if e.tag.endswith("circle")]
    assert len(words) == len(dots) == 9
    for name, (x, y) in words.items():  # letters are some 10 units high
        assert not any(x < px < x + _svg.LETTER * len(name) and y - 10 < py < y + 2 for px, py in dots)
    leads = [e for e in tree.iter() if e.get("class") == "was" and e.tag.endswith("line")]
    far = [name for name, (_, y) in words.items() if abs(y - 4 - dots[0][1]) > 14]
    assert len(leads) == len(far) > 2
    assert {(float(e.get("x1")), float(e.get("y1"))) for e in leads} <= set(dots)


def test_the_longest_bar_and_its_words_stay_inside():
    rows = [
        _svg.Bar("a rather long name of a path", 5.0, "some words behind it", "now", 0.2),
        _svg.Bar("b", 1.0, "c", "was"),
    ]
    tree = ElementTree.fromstring(_svg.bars(rows, "t"))
    for element in tree.iter():
        if element.tag.endswith("rect"):
            assert float(element.get("x")) >= 0
            assert float(element.get("x")) + float(element.get("width")) <= _svg.WIDTH
        if element.text == rows[0].words and element.tag.endswith("text"):
            assert float(element.get("x")) + _svg.LETTER * len(rows[0].words) <= _svg.WIDTH + 1


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (0, 7.3, False), (-2, 2, False), (3e-6, 0.5, True)])
def test_ticks_are_round_and_inside(low, high, log):
    ticks = _svg.Axis("", low, high, log).ticks()
    assert 2 <= len(ticks) <= 12
    assert low - 1e-9 <= min(ticks) <= max(ticks) <= high + 1e-9


# ---- TensorRT --------------------------------------------------------------------------------------------------------


def test_an_interpreter_that_is_not_there_is_an_absent_path():
    child = engines.Child("/no/such/python")
    with pytest.raises(AbsentError, match="cannot be started"):
        child.ask(do="hello")


def test_a_process_without_tensorrt_says_so(monkeypatch, tmp_path):
    # An interpreter that finds no TensorRT: site-packages are switched off.
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    child = engines.Child(str(script))
    try:
        with pytest.raises(AbsentError, match=r"(?i)tensorrt|No module named"):
            child.ask(do="hello")
    finally:
        child.close()


def fake_python(tmp_path, body):
    """An interpreter whose answers are ``body``'s: a stand-in for a slow or dying TensorRT."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport sys, json, time\nfor line in sys.stdin:\n    {body}\n", encoding="utf-8"
    )
    script.chmod(0o755)
    return engines.Child(str(script))


def test_a_build_without_end_is_stopped_with_its_process(tmp_path):
    from hwkern.bench.limits import at_most

    child = fake_python(tmp_path, "time.sleep(60)")
    with pytest.raises(TimeoutError), at_most(0.5):
        child.ask(do="build")
    assert child._process is None


def test_a_process_that_dies_is_a_failure_and_starts_again(tmp_path):
    child = fake_python(tmp_path, "sys.exit(3)")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ended at 'build'"):
            child.ask(do="build")


def test_what_the_process_answers_comes_out(tmp_path):
    child = fake_python(
        tmp_path, "print(json.dumps({'error': 'ValueError: no'} if 'bad' in line else {'x': 1}), flush=True)"
    )
    try:
        assert child.ask(do="good") == {"x": 1}
        with pytest.raises(RuntimeError, match="ValueError: no"):
            child.ask(do="bad")
    finally:
        child.close()


def test_the_engines_profiles_are_the_workloads():
    model, image = models.MODELS["tiny-bert"], models.MODELS["tiny-vit"]
    fixed = [settings.workload(t) for t in ("1x32", "8x64", "traffic:2")]
    assert engines._profiles(model, fixed, None) == [[{"x": [1, 32]}] * 3, [{"x": [8, 64]}] * 3]
    assert engines._profiles(image, [settings.workload("4")], None) == [[{"x": [4, 3, 32, 32]}] * 3]
    stream = traffic.Traffic([9, 20], [0.0, 1.0], (10, 20), 8)
    shape = lambda rows, top: {"x": [rows, top], "mask": [rows, top]}  # noqa: E731
    assert engines._profiles(model, fixed, stream) == [[shape(r, t) for r in (1, 4, 8)] for t in (10, 20)]


@needs_transformers
@pytest.mark.parametrize("name", ["tiny-bert", "tiny-vit", "tiny-gpt2", "tiny-llama"])
def test_the_exported_model_computes_what_torch_computes(name, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = models.find(name)
    torch.manual_seed(0)
    module = model.make("cpu").requires_grad_(False)
    inputs = model.check_inputs(0, "cpu")
    x = next(iter(inputs.values()))[:3]
    x = x if model.kind == "image" else x[:, :21]
    with torch.inference_mode():
        want = module(**{module.main_input_name: x}, **model.calls())[0]
    engines.export(module, model, inputs, tmp_path / "float.onnx", False)
    (got,) = ort.InferenceSession(tmp_path / "float.onnx").run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)
    if name == "tiny-gpt2":
        return  # its layers are Conv1D
    scales = engines.input_scales(module, inputs)
    engines.export(module, model, inputs, tmp_path / "qdq.onnx", False, scales=scales)
    (got,) = ort.InferenceSession(tmp_path / "qdq.onnx").run(None, {"x": x.numpy()})
    # Static per-tensor scales: 8 bits over the absmax of a whole batch cost a few percent.
    assert 0.99 < accuracy.compare(want, torch.from_numpy(got), False)["cosine"] < 1
    import onnx

    ops_in = [node.op_type for node in onnx.load(tmp_path / "qdq.onnx").graph.node]
    layers = len(paths.linears(module))
    # One for each weight; inputs that several layers share have one between them.
    assert layers < ops_in.count("QuantizeLinear") <= 2 * layers
    assert ops_in.count("QuantizeLinear") == ops_in.count("DequantizeLinear")
    if model.kind == "encoder":
        engines.export(module, model, inputs, tmp_path / "pooled.onnx", True)
        mask = torch.ones_like(x)
        mask[0, 9:] = 0
        (got,) = ort.InferenceSession(tmp_path / "pooled.onnx").run(None, {"x": x.numpy(), "mask": mask.numpy()})
        with torch.inference_mode():
            alone = module(input_ids=x[:1, :9]).last_hidden_state.mean(1)
        assert torch.allclose(torch.from_numpy(got[:1]), alone, atol=1e-4)


def test_waiting_for_an_engine_ends_with_its_maker(tmp_path):
    file = tmp_path / "x.building"
    engines._wait_for(file)  # nobody makes it
    maker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file.write_text(str(maker.pid))
        done = []
        waiting = threading.Thread(target=lambda: done.append(engines._wait_for(file)))
        waiting.start()
        time.sleep(0.5)
        assert not done
        file.unlink()
        waiting.join(5)
        assert done
        file.write_text(str(maker.pid))
    finally:
        maker.kill()
        maker.wait()
    engines._wait_for(file)  # its maker died


def test_weights_are_counted_once_however_they_share_memory():
    model = nn.Module()
    table = nn.Parameter(torch.zeros(10, 8, dtype=torch.float16))  # 160 bytes
    model.embed, model.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    model.embed.weight = model.head.weight = table  # tied as one Parameter
    model.register_buffer("rows", table.detach()[2:7])  # a view, as merged layers have them
    model.register_buffer("again", table.detach().view(-1)[70:])  # ends where the table does
    assert subjects.stored_bytes([*model.parameters(), *model.buffers()]) == 160
    model.register_buffer("codes", torch.zeros(3, 4, dtype=torch.int8))
    model.tied = nn.Module()
    model.tied.register_buffer("codes", model.codes.view(4, 3))  # another tensor, the same storage
    assert subjects._tensor_bytes(model) == 160 + 12
    model.register_buffer("part", model.codes.new_zeros(9)[2:5])  # 3 of 9 bytes: the rest belongs to others
    assert subjects._tensor_bytes(model) == 160 + 12 + 3
    # Two Parameters that overlap by a half: 6 floats of which 2 are in both.
    base = torch.zeros(6)
    assert subjects.stored_bytes([base[:4], base[2:], base.new_zeros(0), base[:4]]) == 24
    assert subjects.stored_bytes([torch.zeros(4, 6).t()]) == 96  # not contiguous


@needs_transformers
@pytest.mark.parametrize("quantized", [False, True])
def test_every_way_to_build_a_decoders_engine_computes_the_same(tmp_path, quantized):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = models.find("tiny-llama")
    torch.manual_seed(0)
    module = model.make("cpu").requires_grad_(False)
    inputs = model.inputs(2, 24, 0, "cpu")
    scales = engines.input_scales(module, inputs) if quantized else None
    engines.export(module, model, inputs, tmp_path / "m.onnx", False, True, scales)
    graph = onnx.load(str(tmp_path / "m.onnx"))
    x = inputs["input_ids"].numpy()
    with torch.inference_mode():
        exact = module(**inputs, **model.calls()).logits

    def kinds(one):
        return [node.op_type for node in one.graph.node]

    def run(one):
        return torch.from_numpy(ReferenceEvaluator(one).run(None, {"x": x})[0])

    # q·kᵀ and p·v of two layers; the mask and the positions' sines are constants by now.
    assert kinds(graph).count("Einsum") == 4
    assert not {"Sin", "Cos", "Where", "Greater", "ConstantOfShape"} & set(kinds(graph))
    assert engine_child.ways(graph, False) == ["whole", "layers"]
    plain = engine_child.variant(graph, "layers", False)
    assert kinds(plain).count("Einsum") == 0
    assert kinds(graph).count("Einsum") == 4  # a copy
    assert kinds(graph).count("QuantizeLinear") == (22 if quantized else 0)  # 14 weights, 4 inputs of each layer
    if quantized:
        return  # onnx's evaluator has no DequantizeLinear of this opset
    whole = run(graph)
    torch.testing.assert_close(whole, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(plain), whole, rtol=1e-5, atol=1e-5)
    assert engine_child.ways(graph, True) == ["attention", "norms", "layers"]
    apart, fused = (engine_child.variant(graph, way, True) for way in ("layers", "norms"))
    # gate and up are large enough: each layer's second norm goes into the first of them.
    counted = ("LinearInt8", "GatedLinearInt8", "NormLinearInt8", "ReduceMean")
    assert [kinds(apart).count(kind) for kind in counted] == [2, 2, 0, 5]
    assert [kinds(fused).count(kind) for kind in counted] == [0, 2, 2, 3]
    # The norms differ in their last bits, so that now and then a value is rounded to the next int8.
    torch.testing.assert_close(run(fused), run(apart), rtol=1e-2, atol=1e-2)


def test_the_fastest_of_the_ways_becomes_the_engine(monkeypatch, tmp_path):
    onnx = pytest.importorskip("onnx")
    from hwkern import tensorrt as ht
    from hwkern.tensorrt import _api, measure
    from hwkern.tensorrt.builder import Engine

    value = onnx.helper.make_tensor_value_info("x", 1, [2, 3, 3])
    node = onnx.helper.make_node("Einsum", ["x", "x"], ["y"], equation="aij,ajk->aik")
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [2, 3, 3])])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    times: dict[str, float | None] = {}
    built = []

    def build(model, profiles, precision, *, timing_cache, **options):
        way = "whole" if model.graph.node[0].op_type == "Einsum" else "layers"
        built.append((way, timing_cache, "edit" in options))
        if times[way] is None:
            raise RuntimeError(f"TensorRT cannot build it {way}")
        return Engine(way.encode() * 2, {})

    api = types.SimpleNamespace(version=(8, 6, 1), rtx=False, module=fake_layers())
    monkeypatch.setattr(_api, "find", lambda *_: api)
    monkeypatch.setattr(ht, "build", build)
    monkeypatch.setattr(
        measure, "engine_us", lambda engine, shapes, copies: [times[engine.data[: len(engine.data) // 2].decode()]]
    )
    message = {
        "onnx": str(tmp_path / "m.onnx"), "rewrite": False, "profiles": [], "precision": "fp16", "level": 2,
        "cache": str(tmp_path / "m.timing"), "engine": str(tmp_path / "m.engine"),
    }  # fmt: skip
    for whole, layers, best in ((2.0, 1.0, "layers"), (1.0, 2.0, "whole"), (None, 2.0, "layers"), (1.0, None, "whole")):
        times |= {"whole": whole, "layers": layers}
        found = engine_child.build(message)
        assert found["way"] == best
        assert (tmp_path / "m.engine").read_bytes() == best.encode() * 2
        assert found["engine_bytes"] == 2 * len(best)
        assert found["engine_us"] == {way: us for way, us in times.items() if us is not None}
        assert json.loads((tmp_path / "m.engine.found").read_text()) == found
    assert built[:2] == [
        ("whole", str(tmp_path / "m-whole.timing"), False),
        ("layers", str(tmp_path / "m-layers.timing"), True),
    ]
    times |= {"whole": None, "layers": None}
    with pytest.raises(RuntimeError, match="cannot build it whole"):
        engine_child.build(message)
    api.version = (10, 3, 0)  # compiles by itself
    times |= {"whole": 1.0}
    built.clear()
    assert engine_child.build(message)["way"] == "whole"
    assert len(built) == 1


def fake_layers():
    """Of a TensorRT module what prefer_half reads."""
    names = [*engine_child.HALF_LAYERS, "DEQUANTIZE"]
    kinds = types.SimpleNamespace(**{name: name for name in names})
    flags = types.SimpleNamespace(PREFER_PRECISION_CONSTRAINTS="prefer")
    return types.SimpleNamespace(LayerType=kinds, BuilderFlag=flags, float16="half", float32="float")


def test_half_is_preferred_where_a_layer_may_have_it():
    trt = fake_layers()

    class Layer:
        def __init__(self, kind, dtype, reads=(), output=False):
            self.type, self.precision, self.set = kind, None, {}
            self.inputs = [None if name is None else types.SimpleNamespace(name=name) for name in reads]
            self.outputs = [types.SimpleNamespace(dtype=dtype, is_network_output=output, name=f"{kind} out")]
            self.num_inputs, self.num_outputs = len(self.inputs), 1

        def get_input(self, i):
            return self.inputs[i]

        def get_output(self, i):
            return self.outputs[i]

        def set_output_type(self, i, dtype):
            self.set[i] = dtype

    product, *others = layers = [
        Layer("MATRIX_MULTIPLY", "float", ("x", None)), Layer("CONSTANT", "float"), Layer("SHUFFLE", "int32"),
        Layer("ELEMENTWISE", "float", output=True), Layer("DEQUANTIZE", "float"),
        Layer("MATRIX_MULTIPLY", "float", ("x", "DEQUANTIZE out")),  # is to run in int8
    ]  # fmt: skip
    flags: list[str] = []
    options = engine_child.prefer_half(trt)
    options["edit"](types.SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__))
    options["configure"](types.SimpleNamespace(set_flag=flags.append))
    assert (product.precision, product.set) == ("half", {0: "half"})
    assert all(layer.precision is None and not layer.set for layer in others)
    assert flags == ["prefer"]


def test_what_is_told_is_done_before_the_next_question(tmp_path):
    """A child that answers with the number of the message: the answer to what was told is not taken for another's."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\nexec " + sys.executable + " -c 'import sys, json\n"
        'for n, line in enumerate(sys.stdin): print(json.dumps({"n": n, **json.loads(line)}), flush=True)\'\n'
    )
    script.chmod(0o755)
    child = engines.Child(str(script))
    try:
        child.tell(do="warm")
        assert child.ask(do="hello") == {"n": 1, "do": "hello"}
        assert child.ask(do="build") == {"n": 2, "do": "build"}
        child.tell(do="warm")
        child.tell(do="warm")
        assert child.ask(do="hello") == {"n": 5, "do": "hello"}
        child.tell(do="warm")
        child.close()
        assert child.ask(do="hello")["n"] == 0  # a new process owes nothing
    finally:
        child.close()
    nowhere = engines.Child(str(tmp_path / "none"))
    nowhere.tell(do="warm")  # whoever asks learns why
    with pytest.raises(AbsentError, match="cannot be started"):
        nowhere.ask(do="hello")


@needs_transformers
def test_kept_engines_are_taken_for_the_very_same_only(monkeypatch, tmp_path):
    asked = []

    def ask(self, **message):
        asked.append(message["do"])
        if message["do"] == "build":
            Path(message["engine"]).write_bytes(b"engine")
        return {"tensorrt": "TensorRT 8"} if message["do"] == "hello" else {"engine_bytes": 6, "build_s": 1.0}

    monkeypatch.setattr(engines.Child, "ask", ask)
    monkeypatch.setattr(engines, "export", lambda *_, **__: None)
    model = models.find("tiny-llama")
    module = model.make("cpu").requires_grad_(False)
    x = model.inputs(1, 16, 0, "cpu")

    def build(seed, path="trt-fp16", level=None):
        made = engines.Engines(None, tmp_path, level)
        asked.clear()
        try:
            work = settings.workload("1x16")
            found = made.engine(paths.path(path), model, module, work, [work], None, x, x, seed)
            assert Path(found["engine"]).read_bytes() == b"engine"
        finally:
            made.close()
        return asked.count("build")

    assert build(0) == 1
    assert build(0) == 0
    assert build(0, level=2) == 1  # another builder's effort
    assert build(1, level=2) == 1  # other weights
    assert build(1, "trt-fp32", 2) == 1
    assert build(1, "trt-fp32", 2) == 0
    (tmp_path / "tiny-llama-1x16-trt-fp32.engine").unlink()
    assert build(1, "trt-fp32", 2) == 1
    assert not list(tmp_path.glob("*.building"))


@needs_transformers
def test_engines_are_built_in_another_process(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnx")
    made = engines.Engines(None)
    try:
        model = models.find("tiny-bert")
        module = model.make("cpu").requires_grad_(False)
        fixed = [settings.workload("1x32")]
        check = model.check_inputs(0, "cpu")
        arguments = (model, module, fixed[0], fixed, None, check, check, 0)
        found = made.engine(paths.path("trt-fp16"), *arguments)
        assert Path(found["engine"]).stat().st_size == found["engine_bytes"]
        assert made.engine(paths.path("trt-fp16"), *arguments) is found
        assert "RTX" in made.version
        with pytest.raises(AbsentError, match="decoding"):
            made.engine(paths.path("trt-fp16"), model, module, settings.workload("decode:1x8+2"), *arguments[3:])
    finally:
        made.close()
    assert not made.folder.exists()
