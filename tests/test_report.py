"""The report: totals that count shared bytes once, a table that stays readable, JSON that comes back."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator

import pytest
import rich.console
import torch
from torch import nn

import hwkern
from hwkern.report import LayerReport, Report, group_layers


@pytest.fixture(autouse=True)
def any_cpu() -> Iterator[None]:
    """CPUs without an int8 dot product compute the same integers; let them take the same layers in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
        yield


def layer(name: str, status: str = "int8", reason: str = "", **changes: object) -> LayerReport:
    base = LayerReport(
        names=(name,),
        kind="Linear",
        status=status,  # type: ignore[arg-type]
        reason=reason,
        in_features=768,
        out_features=3072,
        dtype="float32",
        device="cpu",
        bytes_before=4000,
        bytes_after=1000,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def bert_like(depth: int = 12) -> Report:
    layers = []
    for i in range(depth):
        for part in ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense"):
            layers.append(layer(f"bert.encoder.layer.{i}.{part}"))
    reason = "output head: its weight is shared with the embedding 'bert.embeddings.word_embeddings'"
    layers.append(layer("cls.predictions.decoder", "left", reason, bytes_after=4000, tied_to="bert.embeddings"))
    return Report(tuple(layers), 10**9, 3 * 10**8, "disk", 48 * 4000, "")


def test_twelve_alike_layers_take_one_row_each_and_the_table_fits_100_columns() -> None:
    text = str(bert_like())
    assert "bert.encoder.layer.{0-11}.attention. " in text
    assert "  self.{query,key}\n" in text
    assert len(text.splitlines()) <= 20
    assert max(map(len, text.splitlines())) <= 100
    assert "48 layers swapped to int8, 1 left as they are." in text
    assert "Whole model: 1 GB -> 300 MB." in text


def test_long_names_and_reasons_wrap_instead_of_vanishing() -> None:
    name = ".".join(f"block_with_a_long_name_{c}" for c in "abcdef")
    text = str(Report((layer(name, "left", "because " * 20), layer(name))))
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("because") == 20
    assert all(text.count(f"long_name_{c}") == 2 for c in "abc")


def test_a_pattern_never_covers_layers_that_are_not_there() -> None:
    names = [f"layer.{i}.expert.{j}.up" for i in range(3) for j in range(4) if (i, j) != (1, 2)]
    rows = group_layers([layer(name) for name in names])
    assert [(pattern, len(group)) for pattern, group in rows] == [
        ("layer.0.expert.{0-3}.up", 4),
        ("layer.1.expert.{0-1,3}.up", 3),
        ("layer.2.expert.{0-3}.up", 4),
    ]
    rows = group_layers([layer("h.0.q"), layer("h.0.k"), layer("h.1.k"), layer("h.1.q"), layer("h.2.q")])
    assert [(pattern, len(group)) for pattern, group in rows] == [("h.0.{q,k}", 2), ("h.1.{k,q}", 2), ("h.2.q", 1)]
    rows = group_layers([layer("h.0.a"), layer("h.1.a", in_features=5), layer("h.2.a"), layer("h.10.a"), layer("h2.a")])
    assert [pattern for pattern, _ in rows] == ["h.{0,2,10}.a", "h.1.a", "h2.a"]


def test_layers_that_differ_in_size_or_fate_stay_apart() -> None:
    layers = [layer("q"), layer("k"), layer("v", out_features=5), layer("0"), layer("1"), layer("2", "left", "no")]
    assert [pattern for pattern, _ in group_layers(layers)] == ["{q,k}", "v", "{0-1}", "2"]
    assert [pattern for pattern, _ in group_layers([layer("a.q"), layer("b.q")])] == ["a.q", "b.q"]


def test_a_shared_module_shows_how_many_other_names_it_has() -> None:
    ((pattern, _),) = group_layers([layer("a", names=("a", "b", "c"))])
    assert pattern == "a (+2 aliases)"


def test_json_comes_back_as_the_same_report() -> None:
    report = bert_like()
    assert Report.from_json(report.to_json()) == report
    data = json.loads(report.to_json())
    assert data["totals"] == {
        "swapped": 48,
        "already": 0,
        "left": 1,
        "restored": 0,
        "bytes_before": 49 * 4000,
        "bytes_after": 48 * 1000 + 4000,
    }


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "layers": [{}]}'])
def test_json_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="This is not a"):
        Report.from_json(text)


def test_an_empty_report_says_that_there_was_nothing_to_do() -> None:
    assert str(Report()) == "The model has no linear layers: nothing to do."


def test_text_has_no_colour_codes_and_a_terminal_gets_them() -> None:
    assert "\x1b" not in str(bert_like())
    stream = io.StringIO()
    rich.console.Console(file=stream, force_terminal=True, color_system="standard", width=120).print(bert_like())
    assert "\x1b[32m" in stream.getvalue()


def test_bytes_are_those_of_the_model_and_count_shared_tensors_once() -> None:
    model = nn.Sequential(
        nn.Linear(512, 512), nn.Linear(512, 512), nn.Embedding(10, 512), nn.Linear(512, 500, bias=False)
    )
    model[1].weight = model[0].weight
    model.append(model[3])

    def size() -> int:
        tensors = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        return sum(t.nbytes for t in tensors.values() if t is not None)

    before = size()
    report = hwkern.patch(model)
    assert (report.model_bytes_before, report.model_bytes_after) == (before, size())
    embedding = 10 * 512 * 4
    assert (report.bytes_before, report.bytes_after) == (before - embedding, size() - embedding)
    assert report.bytes_after == (512 * 512 + 4 * 512) + 2 * 4 * 512 + (500 * 512 + 4 * 500)
    assert report.originals_bytes == (512 * 512 + 500 * 512) * 4
    assert [entry.names for entry in report.layers] == [("0",), ("1",), ("3", "4")]
    back = hwkern.unpatch(model)
    assert (back.bytes_before, back.bytes_after) == (report.bytes_after, report.bytes_before)


def test_a_lazy_layer_has_no_bytes_yet() -> None:
    report = hwkern.patch(nn.Sequential(nn.LazyLinear(8), nn.Linear(512, 512)))
    assert report.layers[0].bytes_before == 0
    assert "run the model once" in report.left[0].reason


def test_sizes_and_dtypes_are_those_of_the_float_layer() -> None:
    report = hwkern.patch(nn.Sequential(nn.Linear(400, 500, dtype=torch.bfloat16)))
    (entry,) = report.layers
    assert (entry.kind, entry.in_features, entry.out_features, entry.dtype, entry.device) == (
        "Linear",
        400,
        500,
        "bfloat16",
        "cpu",
    )
