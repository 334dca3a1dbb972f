"""Int8Embedding in a model: patch, plan, files, transformers; and the head that shares its weight."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_patch import Snapshot, reasons, statuses
from torch import nn

import hwkern
from hwkern import _tables, _whole, cli, ops, reference
from hwkern._choose import POLICIES, Candidate, choose
from hwkern._layers import find_layers
from hwkern._measure import Clock, Shape
from hwkern._recipes import Recipe
from hwkern.bench import models, paths
from hwkern.checkpoint import CheckpointError
from hwkern.nn import Int8Embedding, Int8Linear

ROWS, WIDTH = 1000, 300  # a width that is padded


class Net(nn.Module):
    """A table, a small one, a layer, and a head that may be tied."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.kinds = nn.Embedding(2, WIDTH)
        self.body = nn.Linear(WIDTH, 500)
        self.back = nn.Linear(500, WIDTH)
        self.lm_head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.kinds(ids % 2)
        return self.lm_head(x + self.back(self.body(x).relu()))


@pytest.fixture(autouse=True)
def any_cpu() -> Iterator[None]:
    """CPUs without an int8 dot product compute the same integers; let them take the same layers in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
        yield


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, ROWS, (2, 7))


def model_bytes(model: nn.Module) -> int:
    return hwkern.report(model).model_bytes_after


def assert_one_weight(model: Any) -> None:
    assert isinstance(model.embed, Int8Embedding)
    assert isinstance(model.lm_head, Int8Linear)
    assert model.embed.weight is model.lm_head.weight
    assert model.embed.weight_scale is model.lm_head.weight_scale


def snr(exact: torch.Tensor, found: torch.Tensor) -> float:
    exact, found = exact.detach().double(), found.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum()))


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_becomes_int8_and_gives_its_dequantized_rows(device: str, dtype: torch.dtype) -> None:
    table = nn.Embedding(50, 37, padding_idx=-1).to(device, dtype)
    layer = Int8Embedding.from_float(table)
    indices = torch.tensor([[0, 49], [7, 7]], device=device)
    q, scale = reference.quantize(table.weight.detach())
    assert torch.equal(layer(indices), reference.int8_embedding(indices, q, scale, dtype))
    assert torch.equal(layer(indices.int()), layer(indices))
    assert torch.equal(layer.to_float()(indices), layer(indices))
    assert not layer(torch.tensor(49, device=device)).any()  # the padding's row of zeros
    assert repr(layer) == "Int8Embedding(50, 37, padding_idx=49, weight=int8)"
    assert layer.to_float().padding_idx == layer.padding_idx == 49
    # Half a step of each row is all that rounding to int8 may cost.
    worst = (layer.to_float(torch.float32).weight - table.weight.float()).abs() - 0.5001 * scale.unsqueeze(1)
    assert bool((worst <= 0).all())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_norm": 1.0}, "max_norm = 1.0, which rewrites rows"),
        ({"sparse": True}, "sparse = True: it is there to be trained"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq = True"),
    ],
)
def test_what_rewrites_or_trains_the_table_keeps_it_float(options: dict[str, Any], sentence: str) -> None:
    table = nn.Embedding(ROWS, WIDTH, **options)
    with pytest.raises(ValueError, match=sentence):
        Int8Embedding.from_float(table)
    report = hwkern.patch(nn.Sequential(table), embeddings=True)
    assert sentence in report.left[0].reason


def test_tables_that_cannot_be_int8_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Embedding, not Linear"):
        Int8Embedding.from_float(nn.Linear(3, 3))
    bad = nn.Embedding(4, 20)
    with torch.no_grad():
        bad.weight[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or ±inf in 1 of 4 rows"):
        Int8Embedding.from_float(bad)
    with pytest.raises(ValueError, match="padding_idx = 4 is no row of 4"):
        Int8Embedding(4, 20, 4)
    with pytest.raises(RuntimeError, match="has no gradient"):
        Int8Embedding(4, 20).requires_grad_()


def test_moving_and_casting_keep_the_format() -> None:
    layer = Int8Embedding.from_float(nn.Embedding(50, 37))
    indices = torch.arange(9)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = layer.to(dtype)
        assert layer.weight.dtype == torch.int8
        assert layer.weight_scale.dtype == torch.float32
        assert layer(indices).dtype == dtype
    twin = pickle.loads(pickle.dumps(layer))
    for copied in (copy.deepcopy(layer), twin):
        assert torch.equal(copied(indices), layer(indices))
        assert copied.weight.data_ptr() != layer.weight.data_ptr()


def test_states_of_both_kinds_load() -> None:
    table = nn.Embedding(50, 37)
    layer = Int8Embedding.from_float(table)
    for state in (layer.state_dict(), table.state_dict()):
        empty = Int8Embedding(50, 37)
        empty.load_state_dict(state)
        assert torch.equal(empty.weight, layer.weight)
        assert torch.equal(empty.weight_scale, layer.weight_scale)
    with pytest.raises(RuntimeError, match=r"float weight has the shape \(50, 37\), but this layer needs \(51, 37\)"):
        Int8Embedding(51, 37).load_state_dict(table.state_dict())
    with pytest.raises(RuntimeError, match="no weight_scale"):
        Int8Embedding(50, 37).load_state_dict({"weight": layer.weight})


def test_an_index_outside_is_an_error(ids: torch.Tensor) -> None:
    layer = Int8Embedding.from_float(nn.Embedding(50, 37))
    with pytest.raises(IndexError, match="The index 50 is outside"):
        layer(torch.tensor([50]))


def test_threads_share_a_layer(device: str) -> None:
    layer = Int8Embedding.from_float(nn.Embedding(ROWS, 64).to(device))
    wanted = layer(torch.arange(ROWS, device=device))
    bad = []

    def work() -> None:
        for _ in range(50):
            indices = torch.randint(0, ROWS, (33,), device=device)
            if not torch.equal(layer(indices), wanted[indices]):
                bad.append(indices)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_compiles_without_a_break(device: str, tied: bool) -> None:
    model = Net(tied).to(device).eval()
    hwkern.patch(model, embeddings=True, originals="drop")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (3, 8):
            ids = torch.randint(0, ROWS, (2, tokens), device=device)
            assert torch.equal(compiled(ids), model(ids))


@pytest.mark.gpu
def test_a_model_runs_in_a_cuda_graph() -> None:
    model = Net(True, torch.bfloat16).cuda().eval()
    hwkern.patch(model, embeddings=True, originals="drop")
    ids = torch.randint(0, ROWS, (2, 7), device="cuda")
    with torch.no_grad():
        model(ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(ids)
        for _ in range(5):
            ids.copy_(torch.randint(0, ROWS, (2, 7)))
            graph.replay()
            assert torch.equal(y, model(ids))


# ---- patch and unpatch ----------------------------------------------------------------------------------------------


def test_embeddings_stay_float_unless_asked_for(ids: torch.Tensor) -> None:
    model = Net()
    assert "embed" not in statuses(hwkern.patch(model))
    assert type(model.embed) is nn.Embedding
    with pytest.raises(ValueError, match="It names an embedding: those count with embeddings=True"):
        hwkern.patch(Net(), include="emb*")


@pytest.mark.parametrize("originals", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(ids: torch.Tensor, tied: bool, dtype: torch.dtype, originals: Any) -> None:
    model = Net(tied, dtype).eval()
    before, exact = Snapshot(model), model(ids).detach()
    size = model_bytes(model)
    report = hwkern.patch(model, embeddings=True, originals=originals)
    assert statuses(report)["embed"] == "int8"
    assert reasons(report)["kinds"] == "too small to gain"
    assert statuses(report)["lm_head"] == ("int8" if tied else "left")
    assert snr(exact, model(ids)) > 30
    # Exactly: each int8 weight padded to 16 columns and 4 bytes a row instead of its float weight, and once where tied.
    wide = dtype.itemsize
    shapes = [(ROWS, WIDTH), (500, WIDTH), (WIDTH, 500)]
    saved = sum(n * k * wide - n * ops.padded(k) - 4 * n for n, k in shapes)
    assert report.model_bytes_after == size - saved
    assert "\nLayers: " in str(report)
    if tied:
        assert_one_weight(model)
    hwkern.unpatch(model)
    before.assert_same(model)
    assert torch.equal(model(ids), exact)


def test_the_tied_head_computes_what_it_does_with_an_embedding_of_its_own(ids: torch.Tensor) -> None:
    torch.manual_seed(1)
    model = Net(True).eval()
    parted = copy.deepcopy(model)
    parted.lm_head.weight = nn.Parameter(parted.lm_head.weight.detach().clone())
    hwkern.patch(model, embeddings=True)
    hwkern.patch(parted, embeddings=True, include=["embed", "lm_head", "body", "back"])
    assert parted.embed.weight is not parted.lm_head.weight
    assert torch.equal(model(ids), parted(ids))
    assert model_bytes(parted) - model_bytes(model) == ROWS * (ops.padded(WIDTH) + 4)


def test_a_table_whose_head_stays_float_stays_float(ids: torch.Tensor) -> None:
    for options in ({"exclude": "lm_head"}, {"include": ["embed", "body"]}):
        model = Net(True)
        report = hwkern.patch(model, embeddings=True, **options)
        assert reasons(report)["embed"] == "its weight is shared with 'lm_head', which stays float"
        assert model.embed.weight is model.lm_head.weight
    model = Net(True)
    report = hwkern.patch(model, embeddings=True, exclude="embed")
    assert reasons(report)["lm_head"] == "output head: its weight is shared with the embedding 'embed'" or (
        reasons(report)["lm_head"] == "output head: its rounding goes straight into the logits"
    )


def test_a_head_alone_leaves_the_float_table_beside_it_and_the_report_says_so(ids: torch.Tensor) -> None:
    model = Net(True)
    before, table = model_bytes(model), model.embed.weight
    report = hwkern.patch(model, include=["lm_head", "body"])
    assert isinstance(model.lm_head, Int8Linear)
    assert model.embed.weight is table
    said = "'lm_head' is int8 beside the float table of 'embed'"
    assert said in str(report)
    assert "embeddings=True" in report.note
    head, body = ROWS * (ops.padded(WIDTH) + 4), 500 * WIDTH * 4 - 500 * (ops.padded(WIDTH) + 4)
    assert report.model_bytes_after == before + head - body
    hwkern.unpatch(model)
    assert model.lm_head.weight is model.embed.weight is table
    assert said not in str(hwkern.patch(model, embeddings=True))
    assert said not in str(hwkern.patch(Net(False), include="lm_head"))


def test_half_of_a_pair_may_go_back_alone(ids: torch.Tensor) -> None:
    model = Net(True)
    exact = model.embed.weight.detach().clone()
    weight = model.embed.weight
    hwkern.patch(model, embeddings=True)
    hwkern.unpatch(model, include="embed")
    assert model.embed.weight is weight
    assert torch.equal(model.embed.weight, exact)
    assert isinstance(model.lm_head, Int8Linear)
    hwkern.unpatch(model)
    assert model.embed.weight is model.lm_head.weight is weight


def test_values_loaded_into_a_pair_take_the_float_weight_from_both() -> None:
    model, other = Net(True), Net(True)
    hwkern.patch(model, embeddings=True)
    model.load_state_dict(other.state_dict())
    for name in ("embed", "lm_head"):
        with pytest.raises(ValueError, match="the float weight is gone"):
            hwkern.unpatch(model, include=name)


def test_a_table_with_fewer_rows_at_the_same_address_is_seen() -> None:
    table = Int8Embedding.from_float(nn.Embedding(100, 32))
    last = torch.tensor([90])
    table(last)
    table.weight = nn.Parameter(table.weight.data[:50], requires_grad=False)
    table.weight_scale = table.weight_scale[:50]
    with pytest.raises(IndexError):
        table(last)


def test_what_a_user_put_on_the_table_travels_with_it(ids: torch.Tensor) -> None:
    model = Net()
    seen = []
    handle = model.embed.register_forward_hook(lambda *_: seen.append(1))
    model.embed.note = "mine"
    model.eval()
    hwkern.patch(model, embeddings=True)
    model(ids)
    assert seen == [1]
    assert model.embed.note == "mine"
    assert not model.embed.training
    handle.remove()
    hwkern.unpatch(model)
    model(ids)
    assert seen == [1]
    assert model.embed.note == "mine"


def test_a_subclass_with_a_forward_of_its_own_is_left() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    report = hwkern.patch(nn.Sequential(Scaled(ROWS, WIDTH)), embeddings=True)
    assert report.left[0].reason == "its class Scaled has a forward of its own"


def test_a_table_with_nan_is_left_and_says_so() -> None:
    model = Net(True)
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    report = hwkern.patch(model, embeddings=True)
    assert reasons(report)["embed"] == "its weight has NaN or ±inf in 1 of 1000 rows"
    assert model.embed.weight is model.lm_head.weight


def test_gradients_start_behind_the_table(ids: torch.Tensor) -> None:
    """As transformers' enable_input_require_grads has it, for adapters on a frozen model."""
    model = Net()
    hwkern.patch(model, embeddings=True)
    outputs = []
    model.embed.register_forward_hook(lambda _, __, y: outputs.append(y.requires_grad_(True)))
    model(ids).sum().backward()
    assert outputs[0].grad.isfinite().all()
    assert outputs[0].grad.any()


def test_a_failure_halfway_puts_the_tables_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(True)
    before = Snapshot(model)

    def stop(done: int, total: int, name: str) -> None:
        if done >= total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hwkern.patch(model, embeddings=True, progress=stop)
    before.assert_same(model)


def test_copies_pickles_and_casts_keep_the_pair_together(ids: torch.Tensor) -> None:
    model = Net(True).eval()
    hwkern.patch(model, embeddings=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_one_weight(twin)
        assert torch.equal(twin(ids), model(ids))
    twin = copy.deepcopy(model).half().bfloat16()
    assert_one_weight(twin)
    assert twin(ids).dtype == torch.bfloat16
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Net(True).eval()
    hwkern.patch(other, embeddings=True)
    other.load_state_dict(torch.load(buffer))
    assert_one_weight(other)
    assert torch.equal(other(ids), model(ids))


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back_keeps_the_pair_together(ids: torch.Tensor) -> None:
    model = Net(True).eval()
    hwkern.patch(model, embeddings=True)
    model.cuda()
    assert_one_weight(model)
    assert model.embed.weight.is_cuda
    assert torch.equal(model.cuda().embed(ids.cuda()).cpu(), model.cpu().embed(ids))
    assert_one_weight(model)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("most", [10**9, 200_000])
def test_saved_and_loaded_without_a_float_table(ids: torch.Tensor, tmp_path: Path, tied: bool, most: int) -> None:
    model = Net(tied, torch.bfloat16).eval()
    hwkern.patch(model, embeddings=True)
    hwkern.save(model, tmp_path, max_shard_bytes=most)
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert on_disk < model_bytes(model) + 20_000  # headers; a table written twice would be 300 000 more
    with torch.device("meta"):
        empty = Net(tied, torch.bfloat16).eval()
    twin = hwkern.load(tmp_path, empty)
    assert isinstance(twin.embed, Int8Embedding)
    if tied:
        assert_one_weight(twin)
    assert torch.equal(twin(ids), model(ids))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = Net()
    hwkern.patch(model, embeddings=True)
    hwkern.save(model, tmp_path)
    other = Net()
    other.embed = nn.Embedding(ROWS + 1, WIDTH)
    with pytest.raises(CheckpointError, match=r"'embed' is 1001 × 300 in the model, but 1000 × 300 in the files"):
        hwkern.load(tmp_path, other)
    other.embed = nn.Linear(WIDTH, ROWS, bias=False)
    with pytest.raises(CheckpointError, match="'embed' is a Linear in the model, which Int8Embedding cannot replace"):
        hwkern.load(tmp_path, other)
    hwkern.save(Net(), tmp_path)
    with pytest.raises(CheckpointError, match="int8 already, but the files hold a float one"):
        hwkern.load(tmp_path, model)


# ---- plans ----------------------------------------------------------------------------------------------------------


def candidate(name: str, few: float, many: float, snr_db: float = 40.0, size: int = 1) -> Candidate:
    return Candidate(Recipe(name), snr_db, size, {"eager": {1: few, 512: many}})


def test_a_table_is_taken_for_its_bytes_where_it_is_not_slower() -> None:
    calls = {1: 10, 512: 10}

    def chosen(few: float, many: float, policy: Any, snr_db: float = 40.0) -> tuple[str, str]:
        found, reason = choose(
            [candidate("keep", 10, 100, float("inf"), 4), candidate("int8", few, many, snr_db)], calls, 20, policy, True
        )
        return found.name, reason

    for policy in POLICIES:
        takes = policy != "accurate"
        assert chosen(10, 100, policy)[0] == ("int8" if takes else "keep")
        assert chosen(10.1, 101, policy)[0] == ("int8" if takes else "keep")  # within the noise of 2 %
        assert chosen(11.9, 101, policy)[0] == ("int8" if policy == "smallest" else "keep")  # 2 µs more
        assert chosen(12.5, 90, policy)[0] == "keep"  # slower for one token
        assert chosen(9, 103, policy)[0] == "keep"  # slower for many
        assert chosen(5, 50, policy, snr_db=19)[0] == "keep"
    assert chosen(9, 90, "balanced")[1] == "0.25× the bytes at 0.90× the time and 40.0 dB (balanced)"
    assert chosen(9, 90, "accurate")[1] == "memory alone is no reason to round it"
    assert "1.25× the time at 1 tokens" in chosen(12.5, 90, "balanced")[1]
    # What keeps a table that takes as long is its error, though nothing would be faster with it.
    assert (
        chosen(10, 100, "balanced", snr_db=19)[1] == "int8 would be 1.00× as fast, but has 19.0 dB of the 20 dB wanted"
    )


@pytest.fixture
def fast_tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Shape, int]]:
    """Invented times: int8 takes half of everything. Returns what was asked for."""
    asked: list[tuple[Shape, int]] = []

    def measure(self: Clock, shape: Shape, m: int, timings: Any) -> None:
        asked.append((shape, m))
        for timing in timings:
            for mode in self.modes:
                self._known[self._key(shape, m, timing, mode)] = (10.0 if timing == "keep" else 5.0) * m

    monkeypatch.setattr(Clock, "measure", measure)
    return asked


def planned(model: nn.Module, batches: list[Any], **options: Any) -> Any:
    return hwkern.plan(model, batches, save=False, show=False, verify=False, **options)


def test_a_plan_makes_the_table_int8_and_survives_its_file(
    ids: torch.Tensor, tmp_path: Path, fast_tables: list[tuple[Shape, int]]
) -> None:
    model = Net().eval()
    before = Snapshot(model)
    plan = planned(model, [(ids,), (ids[:, :3],)])
    before.assert_same(model)
    assert (Shape("Embedding", ROWS, WIDTH, torch.float32, False), 14) in fast_tables
    table = plan.layers["embed"]
    assert (table.kind, table.choice.name, table.calls) == ("Embedding", "int8", {6: 1, 14: 1})
    # The reference's own rounding of the rows that were looked up.
    rows = model.embed.weight.detach()[ids.unique()]
    assert table.choice.snr_db == pytest.approx(snr(rows, reference.dequantize(*reference.quantize(rows))), abs=0.01)
    assert plan.left["kinds"] == "too small to gain"
    assert plan.left["lm_head"] == "output head: its rounding goes straight into the logits"
    assert "embed: Embedding 1000 × 300, float32. Calls × tokens: 1× 6, 1× 14." in plan.explain("embed")
    plan.save(tmp_path / "plan.json")
    loaded = hwkern.Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    report = hwkern.patch(model, plan=loaded)
    assert isinstance(model.embed, Int8Embedding)
    assert statuses(report)["embed"] == "int8"
    rows_of = {layer.name: layer for layer in hwkern.report(model).layers}
    assert rows_of["embed"].snr_db == pytest.approx(table.choice.snr_db)
    assert rows_of["embed"].times
    assert rows_of["embed"].verdict.startswith("int8: ")


def test_a_plan_takes_a_tied_pair_as_one_layer(ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]) -> None:
    model = Net(True).eval()
    plan = planned(model, [(ids,)])
    pair = plan.layers["embed"]
    assert pair.names == ("embed", "lm_head")
    assert (pair.kind, pair.lookups, pair.calls) == ("Linear", {14: 1}, {14: 1})
    assert pair.candidates[0].us["eager"][14] == 2 * 140  # the head's time and the table's
    assert pair.chosen
    assert pair.candidates[0].weight_bytes == ROWS * WIDTH * 4
    assert pair.choice.weight_bytes == ROWS * (ops.padded(WIDTH) + 4)
    assert hwkern.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).layers["embed"] == pair
    hwkern.patch(model, plan=plan)
    assert_one_weight(model)
    described = {layer.name: layer for layer in hwkern.report(model).layers}
    assert described["lm_head"].times
    assert not described["embed"].times  # counted with the head
    hwkern.unpatch(model)
    report = hwkern.patch(model, plan=plan, exclude="lm_head")
    assert reasons(report)["embed"] == "its weight is shared with 'lm_head', which stays float"
    assert not planned(Net(True).eval(), [(ids,)], embeddings=False).layers.keys() & {"embed", "lm_head"}


def test_policies_and_patterns_reach_the_tables(ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]) -> None:
    assert planned(Net().eval(), [(ids,)], policy="accurate").layers["embed"].choice.name == "keep"
    assert planned(Net().eval(), [(ids,)], policy="smallest").layers["embed"].choice.name == "int8"
    assert planned(Net().eval(), [(ids,)], exclude="emb*").left["embed"] == "excluded by 'emb*'"
    bound = hwkern.Accuracy(min_snr_db=60)
    kept = planned(Net().eval(), [(ids,)], accuracy=bound).layers["embed"]
    assert kept.choice.name == "keep"
    assert "of the 60 dB wanted" in kept.reason


def test_layers_that_are_called_by_keyword_are_planned_and_run(
    ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]
) -> None:
    class ByKeyword(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.back(input=self.body(input=self.embed(input=ids)).relu())

    model: Any = ByKeyword().eval()
    plan = planned(model, [(ids,)])
    for scheme in ("w8a8", "w8a8-static", "w8a16"):
        for name in ("body", "back"):
            layer = plan.layers[name]
            layer.chosen = next(i for i, each in enumerate(layer.candidates) if each.recipe.scheme == scheme)
        exact = model(ids)
        hwkern.patch(model, plan=plan)
        assert (model.embed.scheme, model.body.scheme, model.back.scheme) == ("int8", scheme, scheme)
        assert snr(exact, model(ids)) > 25  # three roundings to int8, each of some 40 dB, and static ranges
        hwkern.unpatch(model)


def test_a_plan_without_the_table_still_fits_the_model(ids: torch.Tensor) -> None:
    model = Net().eval()
    plan = planned(model, [(ids,)], embeddings=False)
    assert "embed" not in plan.layers
    assert "embed" not in plan.left
    assert "embed" not in statuses(hwkern.patch(model, plan=plan))


def test_a_head_that_no_batch_reached_keeps_the_table_it_shares(
    ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]
) -> None:
    class Headless(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.back(self.body(self.embed(ids)).relu())

    plan = planned(Headless(True).eval(), [(ids,)])
    assert plan.left["lm_head"] == "no batch reached it"
    assert plan.left["embed"] == "it shares its weight with 'lm_head': no batch reached it"
    assert planned(Headless().eval(), [(ids,)]).layers["embed"].choice.name == "int8"


class ReadsItsTable(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.back(self.body(self.embed(ids)).relu()), self.embed.weight)


class ReadsWhatItTies(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.back(self.body(self.embed(ids)).relu())
        return self.lm_head(x) + nn.functional.linear(x, self.embed.weight)


class CastsToItsTable(Net):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).to(self.embed.weight.dtype).to(self.body.bias.dtype)
        return self.lm_head(self.back(self.body(x).relu()))


@pytest.mark.parametrize(
    ("kind", "sentence"), [(ReadsItsTable, "the model does not run with it"), (CastsToItsTable, "output has")]
)
def test_a_model_that_reads_its_table_beside_calling_it_keeps_it(
    ids: torch.Tensor, fast_tables: list[tuple[Shape, int]], kind: Any, sentence: str
) -> None:
    model = kind().eval()
    before = Snapshot(model)
    table = planned(model, [(ids,)]).layers["embed"]
    assert table.choice.name == "keep"
    assert sentence in table.reason
    assert "it reads the weight itself" in table.reason
    before.assert_same(model)


def test_a_table_that_the_model_reads_is_not_chosen_later_either(
    ids: torch.Tensor, tmp_path: Path, fast_tables: list[tuple[Shape, int]]
) -> None:
    """Not under a task's bound, nor by the trials of the whole model, with the times of another GPU, or from a file."""
    bound = hwkern.Accuracy(max_metric_drop=0.5)
    batches = [(ids,)]
    task = hwkern.plan(
        ReadsItsTable().eval(), batches, accuracy=bound, metric=lambda *_: 1.0, verify=False, save=False, show=False
    )
    whole = hwkern.plan(ReadsWhatItTies(True).eval(), batches, save=False, show=False)
    model = ReadsItsTable().eval()
    plan = planned(model, batches)
    plan.save(tmp_path / "plan.json")
    for found in (task, whole, plan.for_device(model, show=False), hwkern.Plan.load(tmp_path / "plan.json")):
        found.decide()
        assert found.layers["embed"].choice.name == "keep"
        assert "it reads the weight itself" in found.layers["embed"].reason


def test_a_trial_of_the_whole_model_meets_no_table_that_the_model_reads(
    ids: torch.Tensor, slow_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that is slower alone is int8 in W8A8 throughout, and so is the table that it shares its weight with."""

    def seconds(model: nn.Module, *_: Any) -> dict[str, list[float]]:
        model(ids)
        return {"eager": [1.0 - 0.1 * sum(isinstance(module, Int8Linear) for module in model.modules())]}

    monkeypatch.setattr(_whole, "seconds", seconds)
    for kind, scheme in ((Net, "w8a8"), (ReadsWhatItTies, "keep")):
        model = kind(True).eval()
        plan = hwkern.plan(model, [(ids,)], save=False, show=False)
        assert plan.layers["embed"].choice.name == scheme
        assert plan.layers["body"].choice.name == "w8a8"
        assert ("it reads the weight itself" in plan.layers["embed"].reason) == (scheme == "keep")
        hwkern.patch(model, plan=plan)
        model(ids)


def test_another_device_s_plan_has_no_table_that_the_model_reads(ids: torch.Tensor, slow_tables: None) -> None:
    """Not even where lookups are slower here, so that only the other device's times ask for it."""
    plan = planned(ReadsItsTable().eval(), [(ids,)])
    assert [candidate.name for candidate in plan.layers["embed"].candidates] == ["keep"]
    assert [candidate.name for candidate in planned(Net().eval(), [(ids,)]).layers["embed"].candidates] != ["keep"]


# ---- tables that are slower alone, in the whole model ---------------------------------------------------------------


@pytest.fixture
def slow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented times of layers alone: int8 takes half of a float layer's time, of the head's three times as long, and
    an int8 lookup 1.2 of a float one's. The whole model's are the same with every plan."""

    def measure(self: Clock, shape: Shape, m: int, timings: Any) -> None:
        int8 = 12.0 if shape.kind == "Embedding" else 30.0 if shape.n == ROWS else 5.0
        for timing in timings:
            for mode in self.modes:
                self._known[self._key(shape, m, timing, mode)] = (10.0 if timing == "keep" else int8) * m

    monkeypatch.setattr(Clock, "measure", measure)
    monkeypatch.setattr(_whole, "seconds", lambda model, batches, *_: {"eager": [1.0] * len(batches)})


class Turns:
    """Stands in for ``_timing.in_turn``: the calls run, but how long they take is said beforehand.

    Attributes:
        ratios: of the readings, one after the other; the last one stays.
        seen: what kind of table each call of the last reading met.
        scatter: what every other call of an int8 lookup takes more.
        whole: what the calls as a whole take with int8 tables; their lookups alone make the ratio.
        beat: what every other call of the whole model takes more, with either kind of table.
    """

    def __init__(self, *ratios: float, scatter: float = 0.0, whole: float = 1.0, beat: float = 0.0) -> None:
        self.ratios, self.scatter, self.whole, self.beat = list(ratios), scatter, whole, beat
        self.readings = self.calls = 0
        self.model: Any = None
        self.seen: dict[str, str] = {}
        self.kind = "float"

    def __call__(self, calls: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        for self.kind, call in calls.items():
            for self.calls in range(5):
                call()
            self.seen[self.kind] = type(self.model.embed).__name__ if self.model is not None else ""
        self.readings += 1
        both = {"float": 1.0, "int8": self.whole}
        return {kind: [seconds + i % 2 * self.beat for i in range(5)] for kind, seconds in both.items()}

    def lookups(self) -> float:
        """Seconds of the host in a call's lookups: of the model's one second they are a tenth in float."""
        ratio = self.ratios[min(self.readings, len(self.ratios) - 1)]
        return 0.1 + (ratio - 1 + self.calls % 2 * self.scatter if self.kind == "int8" else 0)


def tried(turns: Turns, model: nn.Module, ids: torch.Tensor, **options: Any) -> Any:
    turns.model = model

    @contextlib.contextmanager
    def lookups(_: Any) -> Iterator[Any]:
        yield turns.lookups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tables, "in_turn", turns)
        patch.setattr(_tables.Tables, "lookups", lookups)
        return hwkern.plan(model, [(ids,), (ids[:, :3],)], save=False, show=False, **options)


@pytest.mark.parametrize(
    ("ratios", "scatter", "taken", "readings", "said"),
    [
        ([1.0], 0, True, 2, "1.000× (eager)"),  # one of each of the two batches: nothing scatters
        ([1.0, 1.008], 0, True, 2, "1.004× (eager)"),  # of the batches on average
        # 0.005 is three errors away when 0.01 / √n · √2 / 2 is a third of it: n ≥ 18 calls, five in a reading.
        ([1.0], 0.01, True, 8, "1.000× (eager)"),
        ([1.0], 0.1, True, 16, "1.000× (eager)"),  # never sure: what all calls say counts
        ([1.006], 0.1, False, 16, "1.006× the time with it, 1.006× at most (eager)"),
        ([1.006], 0, False, 2, "1.006× the time with it, 1.006× at most (eager)"),
        ([0.98, 1.016], 0, False, 2, "0.998× the time with it, 1.016× at most (eager)"),
    ],
)
def test_a_table_that_is_slower_alone_is_taken_where_the_whole_model_is_not(
    ids: torch.Tensor,
    slow_tables: None,
    ratios: list[float],
    scatter: float,
    taken: bool,
    readings: int,
    said: str,
) -> None:
    model, turns = Net().eval(), Turns(*ratios, scatter=scatter)
    before = Snapshot(model)
    plan = tried(turns, model, ids)
    before.assert_same(model)
    assert turns.seen == {"float": "Embedding", "int8": "Int8Embedding"}
    assert turns.readings == readings
    table = plan.layers["embed"]
    assert table.choice.name == ("int8" if taken else "keep")
    explained = plan.explain("embed")
    if taken:
        assert f"alone 1.20× the time, but the whole model takes {said} with it" in explained
        assert "int8 is smaller, and the whole model is not slower" in explained
        # One second with every plan: the tables' own trial makes the difference, of each batch.
        took = [round(1e3 * ratio, 4) for ratio in (ratios[0], ratios[-1])]
        assert (plan.whole["before_ms"], plan.whole["after_ms"]) == ([1000.0, 1000.0], took)
        assert plan.whole["modes"] == {"eager": [[1000.0, 1000.0], took]}
        assert f"eager, all batches: 2000.00 -> {sum(took):.2f} ms" in str(plan)
        assert f"With 1 more embedding in int8, by their own trial {said}." in str(plan)
        hwkern.patch(model, plan=plan)
        assert isinstance(model.embed, Int8Embedding)
        assert isinstance(model.body, Int8Linear)
    else:
        assert "int8 takes 1.20× the time" in explained  # why it was not taken at once
        assert f"; the whole model takes {said}" in explained
    assert hwkern.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).recipes == plan.recipes


def test_a_plan_for_another_gpu_says_which_tables_only_the_trial_took(
    ids: torch.Tensor, slow_tables: None, tmp_path: Path
) -> None:
    plan = tried(Turns(1.0), model := Net().eval(), ids)
    plan.device = {**plan.device, "gpu": "NVIDIA H200"}
    plan.for_device(model, show=False).save(tmp_path / "plan.json")
    again = hwkern.Plan.load(tmp_path / "plan.json")
    assert again.layers["embed"].choice.name == "keep"
    assert again.layers["body"].chosen
    had = "; NVIDIA H200 had int8 (0.26× the bytes at"
    assert had in again.explain("embed")
    assert "the whole model takes 1.000× (eager) with it); plan on this device to have the" in again.explain("embed")
    assert "had" not in again.explain("body") + again.explain("lm_head")  # int8 in both plans, and in neither


def test_policies_bounds_and_ties_hold_for_the_trial_too(ids: torch.Tensor, slow_tables: None) -> None:
    def kept(ratio: float = 0.9, tied: bool = False, **options: Any) -> tuple[bool, int]:
        turns = Turns(ratio)
        plan = tried(turns, Net(tied).eval(), ids, **options)
        return plan.layers["embed"].choice.name == "keep", turns.readings

    assert kept() == (False, 2)
    assert kept(policy="smallest") == (False, 2)
    assert kept(policy="fastest") == (False, 2)
    assert kept(1.002) == (False, 2)
    assert kept(1.002, policy="fastest") == (True, 2)  # within the noise, and not faster
    for options in (
        {"policy": "accurate"},
        {"accuracy": hwkern.Accuracy(min_snr_db=45)},
        {"verify": False},
        {"accuracy": hwkern.Accuracy(max_metric_drop=0.1), "metric": in_int8},
        {"tied": True},  # a float head's table
    ):
        assert kept(**options) == (True, 2 * ("metric" in options)), options


@pytest.mark.parametrize(
    ("whole", "beat", "taken", "readings"),
    [
        (1.014, 0, True, 2),
        (1.016, 0, False, 2),  # of calls that do not scatter
        (1.016, 0.1, True, 16),  # of calls that do: doubted as long as can be, and then within the noise
        (1.6, 0.1, False, 2),
    ],
)
def test_a_model_that_is_slower_beside_its_lookups_keeps_its_table(
    ids: torch.Tensor, slow_tables: None, whole: float, beat: float, taken: bool, readings: int
) -> None:
    turns = Turns(1.0, whole=whole, beat=beat)
    table = tried(turns, Net().eval(), ids)
    assert turns.readings == readings
    assert table.layers["embed"].choice.name == ("int8" if taken else "keep")
    said = f"takes {whole:.3f}× the time with it, more than its lookups account for (eager)"
    assert (said in table.explain("embed")) != taken


def test_lookups_are_timed_where_the_model_calls_them(ids: torch.Tensor) -> None:
    class Slow(nn.Embedding):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return super().forward(indices)

    class Late(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return super().forward(ids) + super().forward(ids)

    model = Late()
    model.embed = Slow(ROWS, WIDTH)
    layer = next(layer for layer in find_layers(model, embeddings=True) if layer.names[0] == "embed")
    packed = Int8Embedding.from_float(nn.Embedding(ROWS, WIDTH))
    tables = _tables.Tables([(layer, packed, model.embed)])
    before = Snapshot(model)
    with tables.lookups() as take:
        model(ids)
        assert 0.04 <= take() < 0.05 * 2  # two lookups, and nothing of what the model does beside them
        assert take() == 0
        tables.put("int8")
        model(ids)
        assert 0 < take() < 0.04
        tables.put("float")
    before.assert_same(model)
    assert not model.embed._forward_hooks
    assert not packed._forward_pre_hooks


def test_a_lookup_counts_once_in_a_patched_model(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float module and the int8 one in its place share their hooks, so that each hook would run twice."""
    model = Net()
    trial: Any = SimpleNamespace(recipes={"embed": Recipe("int8")})
    monkeypatch.setattr(_tables, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    with _tables._both_tables(model, trial, {"embed"}) as both, both.lookups() as take:
        for kind in ("float", "int8"):
            both.put(kind)
            model(ids)
            assert take() == 1  # two looks at the clock, one step apart


def test_a_table_that_went_back_for_another_reason_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]
) -> None:
    """It is not slower alone: the whole model was, with it or with others, and has sent it back."""
    seconds = {"Embedding": 1.0, "Int8Embedding": 1.1}
    monkeypatch.setattr(_whole, "seconds", lambda model, *_: {"eager": [seconds[type(model.embed).__name__]]})
    turns = Turns(1.0)
    table = tried(turns, Net().eval(), ids).layers["embed"]
    assert (table.choice.name, turns.readings) == ("keep", 0)
    assert "the whole model was" in table.reason


def test_a_table_that_the_task_sent_back_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, fast_tables: list[tuple[Shape, int]]
) -> None:
    monkeypatch.setattr(_whole, "seconds", lambda *_: {"eager": [1.0]})
    turns = Turns(1.0)
    bound = hwkern.Accuracy(max_metric_drop=0.1)
    table = tried(turns, Net().eval(), ids, accuracy=bound, metric=in_int8).layers["embed"]
    assert (table.choice.name, table.reason) == ("keep", "back to float for the in_int8's sake")
    assert turns.readings == 0


def in_int8(model: nn.Module, batches: Any) -> float:
    """A task that int8 tables, and nothing else, make worse."""
    return 0.0 if any(isinstance(module, Int8Embedding) for module in model.modules()) else 1.0


def test_a_trial_of_tables_leaves_the_model_as_it_was_whatever_happens(
    ids: torch.Tensor, slow_tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(Turns):
        def __call__(self, calls: dict[str, Any], *_: Any) -> dict[str, list[float]]:
            calls["float"]()
            raise KeyboardInterrupt

    model = Net().eval()
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        tried(Stops(1.0), model, ids)
    before.assert_same(model)
    with monkeypatch.context() as patch:  # before the first call, while its layers are looked for
        patch.setattr(_tables, "find_layers", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tried(Turns(1.0), model, ids)
    before.assert_same(model)
    for kind, sentence in ((ReadsItsTable, "the model does not run with it"), (CastsToItsTable, "output has")):
        reader = kind().eval()
        turns, before = Turns(1.0), Snapshot(reader)
        table = tried(turns, reader, ids).layers["embed"]
        before.assert_same(reader)
        assert turns.readings == 0
        assert sentence in table.reason
        assert [candidate.name for candidate in table.candidates] == ["keep"]


def test_a_table_in_several_places_is_tried_in_all_of_them(ids: torch.Tensor, slow_tables: None) -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Embedding(ROWS, WIDTH)
            self.second.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            places.append((type(self.embed).__name__, type(self.second).__name__))
            return super().forward(ids) + self.second(ids).sum()

    places: list[tuple[str, str]] = []
    model = Twice().eval()
    plan = tried(Turns(1.0), model, ids)
    assert set(places) == {("Embedding", "Embedding"), ("Int8Embedding", "Int8Embedding")}
    assert plan.layers["embed"].names == ("embed", "second")
    hwkern.patch(model, plan=plan)
    assert model.embed.weight is model.second.weight


@pytest.mark.parametrize(("graph", "captured", "taken"), [(1.0, True, True), (1.02, True, False), (1.0, False, False)])
def test_tables_are_tried_in_every_way_of_running(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, slow_tables: None, graph: float, captured: bool, taken: bool
) -> None:
    """In graphs too; where the model cannot be captured, no lookup alone may be slower in one."""
    made = []

    class Graph:
        def replay(self) -> None:
            made.append("replay")

    class ByMode(Turns):
        def __call__(self, calls: dict[str, Any], *rest: Any) -> dict[str, list[float]]:
            self.whole = graph if hasattr(calls["int8"], "__self__") else 1.0
            return super().__call__(calls, *rest)

    def of(self: Any, place: Any, model: Any, batch: Any, device: Any) -> Graph | None:
        made.append((place[1], type(model.embed).__name__))
        return Graph() if captured else None

    monkeypatch.setattr("hwkern._measure.modes_of", lambda device, mode="any": ("eager", "graph"))
    monkeypatch.setattr(_whole.Graphs, "of", of)
    plan = tried(ByMode(1.0), Net().eval(), ids)
    assert (plan.layers["embed"].choice.name == "int8") == taken
    assert made[0] == ("float", "Embedding")
    if captured:
        assert ("int8", "Int8Embedding") in made
    else:
        assert "in which the whole model cannot be timed" in plan.explain("embed")


def test_graphs_are_not_timed_where_a_lookup_alone_is_not_slower_in_one(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor, slow_tables: None
) -> None:
    measure = Clock.measure

    def faster_in_a_graph(self: Clock, shape: Shape, m: int, timings: Any) -> None:
        measure(self, shape, m, timings)
        if shape.kind == "Embedding":
            self._known[self._key(shape, m, "int8", "graph")] = 5.0 * m

    monkeypatch.setattr(Clock, "measure", faster_in_a_graph)
    monkeypatch.setattr("hwkern._measure.modes_of", lambda device, mode="any": ("eager", "graph"))
    monkeypatch.setattr(_whole.Graphs, "of", lambda *_: pytest.fail("nothing asks for a graph"))
    plan = tried(Turns(1.0), Net().eval(), ids)
    assert plan.layers["embed"].choice.name == "int8"
    assert "the whole model takes 1.000× (eager) with it" in plan.explain("embed")


def test_times_of_a_way_of_running_in_which_tables_were_not_tried_are_said_to_be_without_them(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> None:
    plan = planned(Net().eval(), [(ids,)])
    plan.whole = {"modes": {"eager": [[4.0, 2.0], [2.0, 1.0]], "graph": [[4.0, 2.0], [1.0, 1.0]]}}
    _whole.note_tables(plan, "2 more embeddings in int8", {"eager": [1.01, 0.99]})
    assert plan.whole["modes"] == {"eager": [[4.0, 2.0], [2.02, 0.99]], "graph": [[4.0, 2.0], [1.0, 1.0]]}
    assert (plan.whole["before_ms"], plan.whole["after_ms"]) == ([4.0, 2.0], [2.02, 0.99])
    assert plan.whole["text"] == (
        "Whole model, eager, all batches: 6.00 -> 3.01 ms (1.99×); CUDA graph, all batches: 6.00 -> 2.00 ms (3.00×). "
        "With 2 more embeddings in int8; the times of CUDA graph are without."
    )


def test_the_command_line_decides_about_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "tables_factory.py").write_text(
        "import torch\nfrom test_embedding_layers import Net, ROWS\n"
        "def make():\n    return Net(True).eval(), [(torch.randint(0, ROWS, (2, 4)),)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for arguments, expected in (
        (["report", "tables_factory:make"], "2 layers swapped to int8"),
        (["report", "tables_factory:make", "--embeddings"], "4 layers swapped to int8"),
        (["validate", "tables_factory:make", "--embeddings"], "0.26×"),
        (["plan", "tables_factory:make"], "\nembed "),
        (["plan", "tables_factory:make", "--no-embeddings"], "\nbody "),
    ):
        assert cli.main([*arguments, "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert expected in out, arguments
        assert ("\nembed " in out) == (expected == "\nembed ") or arguments[0] == "report"


def test_the_bench_s_rows_have_int8_tables() -> None:
    context = paths.Context("cpu", models.MODELS["tiny-bert"], list)
    model = transformers.BertModel(
        transformers.BertConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=1, vocab_size=1000)
    ).eval()
    made: Any = paths.BASES["hwkern-patch"].make(model, context)
    assert isinstance(made.embeddings.word_embeddings, Int8Embedding)
    assert type(model.embeddings.word_embeddings) is nn.Embedding


def test_times_of_a_table_are_measured(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    clock = Clock(torch.device(device), save=False, mode="any")
    shape = Shape("Embedding", 400, 64, torch.float32, False)
    clock.measure(shape, 5, ["keep", "int8"])
    for mode in clock.modes:
        assert 0 < clock.us(shape, 5, "int8", mode) < 1e5
        assert 0 < clock.us(shape, 5, "keep", mode) < 1e5


# ---- transformers ---------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def llama(tied: bool) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1100, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=1100, n_positions=64)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def opt() -> Any:
    config = transformers.OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1100,
        word_embed_proj_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=1100
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


def t5() -> Any:
    config = transformers.T5Config(d_model=128, d_ff=256, d_kv=32, num_layers=2, num_heads=4, vocab_size=1100)
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


MODELS = {"llama": lambda: llama(False), "llama tied": lambda: llama(True), "gpt2": gpt2, "opt": opt, "bert": bert}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str) -> None:
    model = MODELS[name]()
    before = Snapshot(model)
    with torch.no_grad():
        exact = model(IDS).logits.float()
        report = hwkern.patch(model, embeddings=True)
        table = model.get_input_embeddings()
        assert isinstance(table, Int8Embedding)
        head = model.get_output_embeddings()
        if name == "llama":
            assert statuses(report)["lm_head"] == "left"
        else:
            assert isinstance(head, Int8Linear)
            assert head.weight is table.weight
            assert head.weight_scale is table.weight_scale
        assert snr(exact, model(IDS).logits.float()) > 20
        with pytest.raises(TypeError, match="Int8Embedding"):
            model.resize_token_embeddings(1200)
    hwkern.unpatch(model)
    before.assert_same(model)


def test_t5_s_one_table_in_four_places() -> None:
    model = t5()
    before = Snapshot(model)
    hwkern.patch(model, embeddings=True)
    weights = [model.shared.weight, model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight]
    assert all(weight is model.lm_head.weight for weight in weights)
    assert model.lm_head.weight.dtype == torch.int8
    with torch.no_grad():
        assert model(input_ids=IDS, decoder_input_ids=IDS).logits.isfinite().all()
    hwkern.unpatch(model)
    before.assert_same(model)


def test_a_plan_for_t5_takes_all_four_places(fast_tables: list[tuple[Shape, int]]) -> None:
    model = t5()
    plan = planned(model, [{"input_ids": IDS, "decoder_input_ids": IDS}])
    places = next(layer for layer in plan.layers.values() if "lm_head" in layer.names)
    assert places.chosen, places.reason
    hwkern.patch(model, plan=plan)
    assert model.shared.weight is model.lm_head.weight
    assert model.lm_head.weight.dtype == torch.int8


@pytest.mark.parametrize("tied", [False, True])
def test_generate(tied: bool) -> None:
    model = llama(tied)
    hwkern.patch(model, embeddings=True)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    assert plain.shape[1] > IDS.shape[1]
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), plain)


def read_back(model: Any, folder: Path, **options: Any) -> Any:
    """As from_pretrained makes it: .to(bfloat16) has rounded buffers that it does not."""
    model.save_pretrained(folder / "float")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "float", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_and_from_pretrained(tied: bool, tmp_path: Path) -> None:
    model = read_back(llama(tied), tmp_path)
    hwkern.patch(model, embeddings=True)
    with torch.no_grad():
        wanted = model(IDS).logits
        model.save_pretrained(tmp_path / "a")
        hwkern.save(model, tmp_path / "b")
        for twin in (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b"),
            hwkern.load(tmp_path / "b"),
        ):
            assert isinstance(twin.get_input_embeddings(), Int8Embedding)
            assert torch.equal(twin(IDS).logits, wanted)
            if tied:
                assert twin.lm_head.weight is twin.model.embed_tokens.weight
                assert twin.lm_head.weight_scale.data_ptr() == twin.model.embed_tokens.weight_scale.data_ptr()
    model.dequantize()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_float_checkpoint_becomes_int8_while_it_is_read(tied: bool, tmp_path: Path) -> None:
    found = read_back(llama(tied), tmp_path, quantization_config=hwkern.HwkernConfig(embeddings=True))
    model = read_back(llama(tied), tmp_path)
    hwkern.patch(model, embeddings=True)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, model(IDS).logits)
    assert model_bytes(found) == model_bytes(model)


def test_compressed_tensors_hold_a_float_table(tmp_path: Path) -> None:
    model = read_back(llama(False), tmp_path)
    hwkern.patch(model, embeddings=True, include=["*_proj", "*embed_tokens"])
    assert isinstance(model.model.embed_tokens, Int8Embedding)
    hwkern.save(model, tmp_path, format="compressed-tensors")
    twin = hwkern.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
    tied = llama(True)
    hwkern.patch(tied, embeddings=True)
    with pytest.raises(ValueError, match="it shares its int8 weight with an embedding"):
        hwkern.save(tied, tmp_path, format="compressed-tensors")
