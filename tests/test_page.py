"""hwkern.report: figures of the plan at the right layers, at any time; the page holds them all and fetches nothing."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hwkern
from hwkern import _survey, hardware
from hwkern._choose import Candidate
from hwkern._recipes import Recipe
from hwkern.plan import Accuracy, Plan, PlannedLayer
from hwkern.report import LayerReport, Report, Timing

N, K = 512, 512
GPU = hardware.Gpu(
    index=0, name="Test GPU", compute=90, sm_count=132, clock_mhz=1980.0, l2_bytes=1, memory_bytes=1,
    shared_bytes_per_sm=1, shared_bytes=1, bandwidth=1e12, int8_ops=1e15, fp16_flops=5e14,
)  # fmt: skip


@pytest.fixture(autouse=True)
def any_cpu() -> Iterator[None]:
    """CPUs without an int8 dot product compute the same integers; let them take the same layers in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
        yield


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(K, N), nn.Linear(N, K), nn.Linear(K, N), nn.Linear(K, 8))


def plan(device: str = "cpu", task: Any = None) -> Plan:
    """Layer 0 becomes int8, 1 W8A16, 2 is kept by measurement, 3 was too small."""

    def layer(name: str, chosen: int, reason: str) -> PlannedLayer:
        us = [{"eager": {1: a, 64: 10 * a}, "graph": {1: a / 2, 64: 5 * a}} for a in (100.0, 50.0, 80.0)]
        found = [
            Candidate(Recipe("keep"), float("inf"), 4 * N * K, us[0]),
            Candidate(Recipe("w8a8"), 38.5, N * K, us[1]),
            Candidate(Recipe("w8a16"), 44.0, N * K, us[2]),
        ]
        return PlannedLayer((name,), "Linear", N, K, "float32", True, {1: 3, 64: 2}, found, chosen, reason)

    layers = [layer("0", 1, "twice as fast"), layer("1", 2, "more accurate"), layer("2", 0, "nothing is faster: <&>")]
    from hwkern._measure import stamp

    where = stamp(torch.device("cpu")) if device == "cpu" else {"device": "cuda", "gpu": GPU.name}
    named = {each.name: each for each in layers}
    return Plan("Sequential", where, "balanced", Accuracy(20.0), named, {"3": "too small to gain"}, task)


def planned() -> tuple[nn.Module, Report]:
    made = model()
    hwkern.patch(made, plan=plan())
    return made, hwkern.report(made)


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_plan_that_the_model_was_patched_with() -> None:
    _, report = planned()
    first, second, third, fourth = report.layers
    assert first.times[0] == Timing("eager", 1, 3, 100.0, 50.0)
    assert [(t.mode, t.tokens, t.calls) for t in first.times] == [
        *(("eager", 1, 3), ("eager", 64, 2)),
        *(("graph", 1, 3), ("graph", 64, 2)),
    ]
    assert (first.snr_db, first.scheme, first.verdict) == (38.5, "w8a8", "w8a8: twice as fast")
    assert (second.snr_db, second.scheme, second.times[1].after_us) == (44.0, "w8a16", 800.0)
    assert (third.snr_db, third.status, third.reason) == (None, "left", "nothing is faster: <&>")
    assert all(time.before_us == time.after_us for time in third.times)
    assert (fourth.times, fourth.reason) == ((), "too small to gain")
    assert report.plan["policy"] == "balanced"


def test_float_bytes_are_those_before_the_patch_and_count_shared_tensors_once() -> None:
    made = model()
    made[2].weight = made[0].weight
    before = sum(p.numel() * 4 for p in made.parameters())
    hwkern.patch(made)
    report = hwkern.report(made)
    assert sum(layer.float_bytes for layer in report.layers) == before
    assert report.layers[2].float_bytes == 4 * N  # its bias


def test_without_a_plan_it_says_what_is_known() -> None:
    made = model()
    report = hwkern.report(made)
    assert [layer.runs for layer in report.layers] == ["torch, on cpu"] * 4
    assert not report.plan
    assert not any(layer.times or layer.verdict for layer in report.layers)
    assert any("threads for torch" in line or "thread for torch" in line for line in report.where)
    hwkern.patch(made)
    assert "input quantized per token" in hwkern.report(made).layers[0].runs


def test_a_plan_that_was_not_carried_out_is_shown_as_one() -> None:
    report = hwkern.report(model(), plan=plan())
    assert report.layers[0].reason == "float now; the plan would make it w8a8"
    assert report.layers[0].times[0].after_us == 50.0
    assert (report.layers[0].status, report.layers[0].scheme) == ("left", "")


def test_a_layer_that_is_not_what_the_plan_chose_has_none_of_its_times() -> None:
    made = model()
    hwkern.patch(made, plan=plan(), exclude="1")
    second = hwkern.report(made).layers[1]
    assert (second.times, second.snr_db) == ((), None)
    assert "the plan chose w8a16" in second.verdict


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(hwkern.PlanError, match="another model"):
        hwkern.report(nn.Sequential(nn.Linear(K, N)), plan=plan())


def test_what_is_no_plan_on_the_model_is_no_obstacle() -> None:
    made = model()
    made.__dict__["_hwkern_plan"] = {"any": "data"}
    assert not hwkern.report(made).plan


def test_what_is_fused_is_said_after_patch_too() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}
    made = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=50)).eval()
    done = hwkern.patch(made)
    assert "2 × norm -> q_proj+k_proj+v_proj" in done.fusion
    assert hwkern.report(made).fusion == done.fusion
    assert done.fusion in hwkern.report(made).to_html().replace("&gt;", ">")
    layer = made.layers[1]
    assert _survey._fused(layer.self_attn.k_proj) == ", one product for q_proj+k_proj+v_proj"
    assert _survey._fused(layer.mlp.down_proj) == ", fused with what lies before it"
    assert _survey._fused(layer.self_attn.o_proj) == ""
    hwkern.patch(made, fuse=False)
    assert hwkern.report(made).fusion == ""


def test_layers_that_run_differently_have_rows_of_their_own() -> None:
    layers = tuple(
        LayerReport((f"{i}.{n}",), "Int8Linear", "already", "", 8, 8, "int8", "cuda:0", 64, 64, runs=runs)
        for i in range(2)
        for n, runs in (("q", "one product for q+k"), ("k", "one product for q+k"), ("o", "alone"))
    )
    words = Page(Report(layers, 1, 1).to_html()).words
    assert "{0,1}.{q,k}" in words or "{0-1}.{q,k}" in words
    assert "{0-1}.o" in words


def test_meta_layers_run_nowhere_yet() -> None:
    report = hwkern.report(model().to("meta"))
    assert report.layers[0].runs == "nowhere yet: its tensors are on meta"
    assert report.to_html()


@pytest.mark.parametrize(
    ("scheme", "m", "tokens", "microseconds"),
    [
        # bytes / 10¹² per second: x and y in 16 bits, the weight in 8, or 16 where it is kept.
        ("w8a8", 1, None, (2 * K + N * K + 2 * N) / 1e6),
        ("keep", 1, None, (2 * K + 2 * N * K + 2 * N) / 1e6),
        # operations / peak: int8's for W8A8, fp16's for what multiplies 16-bit numbers.
        ("w8a8", 8192, None, 2 * 8192 * N * K / 1e15 * 1e6),
        ("w8a16", 8192, None, 2 * 8192 * N * K / 5e14 * 1e6),
        ("w8a16/w8a8", 8192, 16, 2 * 8192 * N * K / 1e15 * 1e6),
        ("w8a16/w8a8", 8192, 8192, 2 * 8192 * N * K / 5e14 * 1e6),
    ],
)
def test_the_speed_of_light_is_that_of_the_scheme(scheme: str, m: int, tokens: int | None, microseconds: float) -> None:
    gpu = dataclasses.replace(GPU, bandwidth=1e12 if m == 1 else 1e15)
    choice = Candidate(Recipe(scheme, max_tokens=tokens), 40.0, N * K)
    entry = PlannedLayer(("x",), "Linear", N, K, "bfloat16", True, {m: 1}, [choice])
    assert _survey._floor(entry, choice, m, gpu) == pytest.approx(microseconds, abs=6e-4)  # kept to 1 ns


def test_no_speed_of_light_where_a_rate_is_not_known() -> None:
    choice = Candidate(Recipe("keep"), 40.0, N * K)
    entry = PlannedLayer(("x",), "Linear", N, K, "float32", True, {1: 1}, [choice])
    assert _survey._floor(entry, choice, 1, None) is None
    assert _survey._floor(entry, choice, 1, GPU) is None
    assert _survey._floor(dataclasses.replace(entry, dtype="bfloat16"), choice, 1, GPU) is not None


def test_json_comes_back_with_every_figure() -> None:
    made, _ = planned()
    check = hwkern.validate(model(), made, [torch.randn(3, K)], show=False)
    report = hwkern.report(made, validation=check)
    assert report.validation["speedup"] == check.speedup
    assert Report.from_json(report.to_json()) == report


def test_text_has_times_errors_and_reasons() -> None:
    text = str(planned()[1])
    # Layer 0: 3 calls of 100 µs and 2 of 1000 as float; half of it now.
    for part in ("eager 2300 -> 1150", "graph 1150 -> 575", "2.00×", "38.5", "nothing is faster", "policy balanced"):
        assert part in text


# ---- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Counts tags, collects text and addresses; fails on tags that do not nest."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_self_contained_and_well_formed() -> None:
    text = planned()[1].to_html()
    page = Page(text)
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_plot_has_a_title_a_description_and_stays_inside() -> None:
    plots = re.findall(r"<svg.*?</svg>", planned()[1].to_html(), re.DOTALL)
    assert len(plots) == 5  # times in two modes, accuracy, memory, tokens
    for plot in plots:
        root = ET.fromstring(plot)
        assert root.attrib["role"] == "img"
        assert root.find("title") is not None
        assert root.findtext("desc")
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for box in root.iter("rect"):
            x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
            assert x >= 0
            assert x + w <= width + 0.2  # coordinates are written to a tenth
            assert y >= 0
            assert y + h <= height
        for words in root.iter("text"):
            assert 0 <= float(words.attrib["y"]) <= height


def test_bars_have_the_lengths_of_their_times() -> None:
    plot = re.findall(r"<svg.*?</svg>", planned()[1].to_html(), re.DOTALL)[0]
    bars = [float(box.attrib["width"]) for box in ET.fromstring(plot).iter("rect")]
    # Layers 0, 1 and 2: as float the same time each; then half of it, 80 %, and all of it.
    assert bars == pytest.approx([760, 380, 760, 608, 760, 760], abs=0.1)


def test_names_and_reasons_cannot_break_the_page() -> None:
    bad = "<b>&\"'</svg>"
    time = Timing("eager", 1, 1, 2, 1)
    layer = LayerReport(
        (bad,), bad, "left", bad, 1, 1, "float32", "cpu", 4, 4, None, bad, bad, 4, bad, 30.0, (time,)
    )  # fmt: skip
    report = Report((layer,), 4, 4, note=bad, model=bad, where=(bad,), plan={**planned()[1].plan, "device": bad})
    page = Page(report.to_html())
    assert "b" not in page.tags[page.tags.index("main") :][:3]
    assert page.words.count(bad) >= 5


def test_the_page_of_any_report() -> None:
    assert "no linear layers" in Page(Report().to_html()).words
    made = nn.Sequential(nn.Linear(K, N))
    assert "not known" in Page(hwkern.report(made).to_html()).words
    assert "0.25×" in Page(hwkern.patch(made).to_html()).words  # 512² bytes instead of 4 · 512², and the scales
    assert "linear layers are int8" in Page(hwkern.unpatch(made).to_html()).words


def test_many_layers_are_summed_up_in_a_sentence() -> None:
    layers = tuple(
        LayerReport((f"l{chr(97 + i % 26)}{i}",), "Int8Linear", "already", "", 8 + i, 8, "int8", "cpu", 64, 64,
                    scheme="w8a8", snr_db=30.0, times=(Timing("eager", 1, 1, 1.0 + i, 1.0),))
        for i in range(60)
    )  # fmt: skip
    words = Page(Report(layers, 1, 1, plan=planned()[1].plan).to_html()).words
    assert "20 more rows" in words
    # 1 … 20 of 1 … 60: the smallest.
    assert f"{round(sum(range(1, 21)) / sum(range(1, 61)) * 100)} %" in words


def test_the_same_report_gives_the_same_page() -> None:
    _, report = planned()
    assert report.to_html() == Report.from_json(report.to_json()).to_html()


def test_shares_of_the_speed_of_light_are_in_the_page() -> None:
    time = Timing("graph", 16, 1, 20.0, 10.0, floor_us=7.0)
    _, report = planned()
    layer = dataclasses.replace(report.layers[0], times=(time,))
    words = Page(dataclasses.replace(report, layers=(layer,)).to_html()).words
    assert "70 %" in words
    assert "20 µs → 10 µs" in words


# ---- the command ----------------------------------------------------------------------------------------------------


def factory() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return model(), [torch.randn(4, K)]


def test_the_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hwkern import cli

    monkeypatch.setenv("HWKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    target = tmp_path / "page.html"
    spec = f"{Path(__file__).stem}:factory"
    assert cli.main(["report", spec, "--device", "cpu", "--measure", "--html", str(target)]) == 0
    assert "policy balanced" in capsys.readouterr().out
    assert "Tokens in a call" in Page(target.read_text(encoding="utf-8")).words
    assert cli.main(["validate", spec, "--device", "cpu", "--html", str(target)]) == 0
    assert "validated on the whole model" in Page(target.read_text(encoding="utf-8")).words
    assert cli.main(["report", spec, "--device", "cpu", "--html", str(tmp_path / "no" / "folder.html")]) == 1
    assert "there is no folder" in capsys.readouterr().err
