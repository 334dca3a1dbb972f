"""hwkern.patch and unpatch: what is taken, what must survive, what is refused, and that nothing is ever lost."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import hwkern
from hwkern import _originals
from hwkern.nn import Int8Linear

implementation = importlib.import_module("hwkern.patch")
SIZE = 512  # SIZE × SIZE weights are worth swapping


class Net(nn.Module):
    """Two layers worth swapping, one too small, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZE, 2 * SIZE)
        self.down = nn.Linear(2 * SIZE, SIZE, bias=False)
        self.small = nn.Linear(SIZE, 8)
        self.lm_head = nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.up(x).relu())
        return torch.cat([self.small(x), self.lm_head(x)], -1)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, SIZE)


@pytest.fixture(autouse=True)
def any_cpu() -> Iterator[None]:
    """CPUs without an int8 dot product compute the same integers; let them take the same layers in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
        yield


class Snapshot:
    """Everything about a model that must be as before."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.order = [(name, list(module._parameters), list(module._modules)) for name, module in model.named_modules()]
        self.parameters = {
            name: (p.detach().clone(), p.stride(), p.requires_grad, p.dtype)
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        self.ties = [ids.index(i) for i in ids]

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert list(now.modules) == list(self.modules)
        assert all(now.modules[name] is module for name, module in self.modules.items())
        assert now.order == self.order
        assert now.ties == self.ties
        assert list(now.parameters) == list(self.parameters)
        for name, (value, *rest) in self.parameters.items():
            assert now.parameters[name][1:] == tuple(rest), name
            assert torch.equal(bits(now.parameters[name][0]), bits(value)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)  # so that NaN equals NaN


def statuses(report: hwkern.Report) -> dict[str, str]:
    return {layer.name: layer.status for layer in report.layers}


def reasons(report: hwkern.Report) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.left}


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("originals", ["auto", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_patch_and_unpatch_give_the_same_modules_bits_and_outputs(originals: str, dtype: torch.dtype) -> None:
    model, x = Net().to(dtype), torch.randn(5, SIZE, dtype=dtype)
    before, y = Snapshot(model), model(x)
    report = hwkern.patch(model, originals=originals)
    assert statuses(report) == {"up": "int8", "down": "int8", "small": "left", "lm_head": "left"}
    assert type(model.up) is Int8Linear
    assert torch.cosine_similarity(model(x).float(), y.float(), dim=-1).min() > 0.99
    assert statuses(hwkern.unpatch(model)) == {"up": "restored", "down": "restored"}
    before.assert_same(model)
    assert torch.equal(model(x), y)


def test_patching_twice_changes_nothing_and_says_so(x: torch.Tensor) -> None:
    model = Net()
    hwkern.patch(model)
    before = Snapshot(model)
    report = hwkern.patch(model)
    before.assert_same(model)
    assert report.note == "Already patched: 2 layers. Nothing was changed."
    assert [layer.name for layer in report.already] == ["up", "down"]
    assert not report.swapped
    hwkern.unpatch(model)
    assert type(model.up) is nn.Linear


def test_a_second_patch_takes_what_the_first_one_left() -> None:
    model = Net()
    before = Snapshot(model)
    hwkern.patch(model, include="up")
    report = hwkern.patch(model)
    assert statuses(report) == {"up": "already", "down": "int8", "small": "left", "lm_head": "left"}
    hwkern.unpatch(model)
    before.assert_same(model)


def test_unpatch_of_some_layers_only() -> None:
    model = Net()
    hwkern.patch(model)
    report = hwkern.unpatch(model, exclude="up")
    assert statuses(report) == {"up": "left", "down": "restored"}
    assert (type(model.up), type(model.down)) == (Int8Linear, nn.Linear)


def test_unpatch_of_a_model_that_was_never_patched_says_so() -> None:
    assert "nothing to do" in str(hwkern.unpatch(Net()))


def test_weights_in_any_memory_order_come_back_with_their_strides() -> None:
    model = nn.ModuleDict(
        {"t": nn.Linear(SIZE, SIZE), "gaps": nn.Linear(SIZE, SIZE), "expanded": nn.Linear(SIZE, SIZE)}
    )
    model["t"].weight = nn.Parameter(torch.randn(SIZE, SIZE).t())
    model["gaps"].weight = nn.Parameter(torch.randn(SIZE, SIZE + 3)[:, 1:-2])
    model["expanded"].weight = nn.Parameter(torch.randn(SIZE, 1).expand(SIZE, SIZE))
    before = Snapshot(model)
    assert len(hwkern.patch(model).swapped) == 3
    hwkern.unpatch(model)
    before.assert_same(model)


def test_the_parameter_object_comes_back_while_somebody_holds_it() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    held, attribute = model.up.weight, object()
    model.down.weight.requires_grad_(False).tag = attribute
    hwkern.patch(model)
    hwkern.unpatch(model)
    assert model.up.weight is held
    assert optimizer.param_groups[0]["params"][0] is held
    assert model.down.weight.tag is attribute
    assert not model.down.weight.requires_grad


def test_patching_inside_inference_mode_leaves_a_model_that_can_train(x: torch.Tensor) -> None:
    model = Net()
    with torch.inference_mode():
        hwkern.patch(model)
    model(x).sum().backward()
    assert model.up.bias.grad is not None
    with torch.inference_mode():
        hwkern.unpatch(model)
    model(x).sum().backward()
    assert model.up.weight.grad is not None


@pytest.mark.parametrize("originals", ["host", "disk", "device"])
def test_a_model_made_in_inference_mode_comes_back(originals: Literal["host", "disk", "device"]) -> None:
    """Its tensors take no requires_grad outside of that mode, where its weights become Parameters again."""
    with torch.inference_mode():
        model = Net()
    before = Snapshot(model)
    hwkern.patch(model, originals=originals)
    hwkern.unpatch(model)
    before.assert_same(model)


def test_progress_is_told_after_every_layer() -> None:
    calls = []
    hwkern.patch(Net(), progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, "up"), (2, 2, "down")]


# ---- which layers, and why not --------------------------------------------------------------------------------------


def named(**layers: nn.Module) -> nn.Module:
    """A model of one good layer and those given."""
    return nn.ModuleDict({"good": nn.Linear(SIZE, SIZE), **layers})


def reason_for(layer: nn.Module, **patch_options: object) -> str:
    model = named(other=layer)
    report = hwkern.patch(model, **patch_options)  # type: ignore[arg-type]
    assert type(model["good"]) is Int8Linear
    assert model["other"] is layer
    return reasons(report)["other"]


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class PlainSubclass(nn.Linear):
    pass


def big(**kwargs: object) -> nn.Linear:
    return nn.Linear(SIZE, SIZE, **kwargs)  # type: ignore[arg-type]


def with_weight(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(2, 2, device="meta", bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.out_features, layer.in_features = weight.shape
    return layer


def with_forward_replaced() -> nn.Linear:
    layer = big()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def with_submodule() -> nn.Linear:
    layer = big()
    layer.lora = nn.Linear(2, 2)
    return layer


def pruned() -> nn.Linear:
    layer = big()
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates weight_norm and spectral_norm by hooks
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(16, 16), "too small to gain"),
        (lambda: nn.Linear(2**16, 8), "too small to gain"),
        (lambda: parametrizations.weight_norm(big()), "parametrized"),
        (lambda: nn.utils.weight_norm(big()), "weight_norm"),
        (lambda: spectral_norm(big()), "spectral_norm"),
        (pruned, "pruning"),
        (lambda: with_weight(torch.zeros(SIZE, SIZE, dtype=torch.int8)), "int8: not a float weight"),
        (lambda: big(dtype=torch.float64), "float64"),
        (lambda: big(dtype=torch.complex64), "complex64"),
        (lambda: with_weight(torch.zeros(SIZE, SIZE, dtype=torch.float8_e4m3fn)), "float8_e4m3fn"),
        (lambda: nn.LazyLinear(SIZE), "run the model once"),
        (lambda: OwnForward(SIZE, SIZE), "OwnForward has a forward of its own"),
        (with_forward_replaced, "replaced on the instance"),
        (with_submodule, "carries more.*lora"),
        (lambda: with_weight(torch.zeros(2, 2**17)), "K = 131072"),
        (
            lambda: with_weight(torch.tensor([[1.0, torch.nan]]).expand(SIZE, 2).repeat(1, SIZE)),
            "NaN or ±inf in 512 of",
        ),
        (lambda: with_weight(torch.zeros(SIZE, 0)), "empty"),
    ],
)
def test_a_layer_that_is_left_has_its_reason_in_the_report(make: Callable[[], nn.Module], reason: str) -> None:
    assert re.search(reason, reason_for(make()))


def test_a_subclass_without_its_own_forward_is_taken() -> None:
    model = named(other=PlainSubclass(SIZE, SIZE))
    assert len(hwkern.patch(model).swapped) == 2
    hwkern.unpatch(model)
    assert type(model["other"]) is PlainSubclass


def test_a_cpu_without_int8_units_keeps_its_float_layers_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: False)
    model = Net()
    report = hwkern.patch(model)
    assert not report.swapped
    assert reasons(report)["up"] == "this CPU has no exact int8 dot product: INT8 would be slower than float32"
    assert [layer.name for layer in hwkern.patch(model, include="up").swapped] == ["up"]


def test_multihead_attention_still_works_because_its_projection_is_left() -> None:
    model = named(attention=nn.MultiheadAttention(SIZE, 4, batch_first=True))
    x = torch.randn(2, 3, SIZE)
    y = model["attention"](x, x, x)[0]
    report = hwkern.patch(model, include="*")
    assert reasons(report) == {"attention.out_proj": "nn.MultiheadAttention reads its weight and never calls it"}
    assert torch.equal(model["attention"](x, x, x)[0], y)


@pytest.mark.parametrize("fast_path", [False, True])
def test_torchs_transformer_layers_run_with_and_without_their_fast_path(fast_path: bool) -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(SIZE, 4, SIZE, batch_first=True), 2, enable_nested_tensor=False
            ),
            "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(SIZE, 4, SIZE, batch_first=True), 1),
        }
    ).eval()
    x = torch.randn(2, 5, SIZE)
    with torch.inference_mode(fast_path):
        y = model["encoder"](x), model["decoder"](x, x)
        report = hwkern.patch(model, include="*")
        assert [layer.name for layer in report.swapped] == ["decoder.layers.0.linear1", "decoder.layers.0.linear2"]
        assert "fast path" in reasons(report)["encoder.layers.0.linear1"]
        assert torch.equal(model["encoder"](x), y[0])
        assert torch.cosine_similarity(model["decoder"](x, x), y[1], dim=-1).min() > 0.99


def test_a_layer_held_in_a_plain_attribute_too_is_left() -> None:
    model = named(other=big())
    model.unregistered = [model["other"]]
    assert reasons(hwkern.patch(model)) == {
        "other": "also held in the plain attribute unregistered, which cannot be swapped"
    }


class Tied(nn.Module):
    """A language model's shape: an embedding, and a head with its weight under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SIZE, SIZE)
        self.body = nn.Linear(SIZE, SIZE)
        self.decoder = nn.Linear(SIZE, SIZE)
        self.decoder.weight = self.embed.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.body(self.embed(i)))


def test_the_head_tied_to_an_embedding_is_left_and_stays_tied() -> None:
    model = Tied()
    report = hwkern.patch(model)
    assert reasons(report) == {"decoder": "output head: its weight is shared with the embedding 'embed'"}
    assert report.left[0].tied_to == "embed"
    assert model.decoder.weight is model.embed.weight


def test_the_tied_head_is_taken_when_named_and_is_tied_again_after_unpatch() -> None:
    model = Tied()
    before, weight = Snapshot(model), model.embed.weight
    assert [layer.name for layer in hwkern.patch(model, include="decoder").swapped] == ["decoder"]
    assert model.embed.weight is weight
    twin = copy.deepcopy(model)
    hwkern.unpatch(model)
    before.assert_same(model)
    hwkern.unpatch(twin)
    assert twin.decoder.weight is twin.embed.weight
    assert twin.decoder.weight is not weight


def test_the_head_that_a_model_names_is_left() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.to_logits = big(), big()

        def get_output_embeddings(self) -> nn.Module:
            return self.to_logits

    assert reasons(hwkern.patch(Model())) == {"to_logits": "output head: its rounding goes straight into the logits"}


# ---- include and exclude --------------------------------------------------------------------------------------------


def test_patterns_predicates_and_lists_of_both_choose_layers() -> None:
    for include, exclude, taken in (
        ("up", None, ["up"]),
        ("*", None, ["up", "down", "small", "lm_head"]),
        (None, "up", ["down"]),
        (["u*", "lm_head"], None, ["up", "lm_head"]),
        (lambda name, module: module.bias is None, None, ["down"]),
        (["up", lambda name, module: name == "small"], None, ["up", "small"]),
        ("*", lambda name, module: isinstance(module, nn.Linear) and module.out_features == SIZE, ["up", "small"]),
    ):
        report = hwkern.patch(Net(), include=include, exclude=exclude)
        assert [layer.name for layer in report.swapped] == taken
    assert reasons(hwkern.patch(Net(), exclude=["up", "d*"])) == {
        "up": "excluded by 'up'",
        "down": "excluded by 'd*'",
        "small": "too small to gain",
        "lm_head": "output head: its rounding goes straight into the logits",
    }
    assert reasons(hwkern.patch(Net(), include="up"))["down"] == "not in include"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"include": "lm_heat"}, r"include = 'lm_heat' matches no linear layer of this Net\. Close to it: 'lm_head'"),
        ({"exclude": ["up", "zzz"]}, r"exclude = 'zzz' matches no linear layer.*There are: 'up', 'down', 'small'"),
        ({"originals": "cloud"}, r"originals = 'cloud': it must be 'auto', 'host', 'disk', 'device' or 'drop'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_close_names(options, sentence: str) -> None:
    model = Net()
    before = Snapshot(model)
    with pytest.raises(ValueError, match=sentence):
        hwkern.patch(model, **options)
    before.assert_same(model)


def test_a_pattern_that_names_a_parent_is_told_how_to_reach_its_layers() -> None:
    with pytest.raises(ValueError, match=r"names a module above them: write 'encoder\.\*'"):
        hwkern.patch(nn.ModuleDict({"encoder": Net()}), include="encoder")


def test_selectors_of_the_wrong_type_are_refused() -> None:
    for wrong in (3, [3], {"up"}):
        with pytest.raises(TypeError, match="name pattern, a predicate"):
            hwkern.patch(Net(), include=wrong)


# ---- models that are refused before anything is touched -------------------------------------------------------------


def compiled_inside() -> nn.Module:
    model = nn.Sequential(Net())
    model[0].up.compile(backend="eager")
    return model


def quantized() -> nn.Module:
    return nn.Sequential(with_weight(torch.zeros(SIZE, SIZE, dtype=torch.int8)), nn.ReLU())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: "model", TypeError, "takes a torch.nn.Module, not str"),
        (lambda: nn.Linear(SIZE, SIZE), ValueError, r"model itself is a Linear.*Int8Linear\.from_float"),
        (lambda: Int8Linear(SIZE, SIZE), ValueError, "model itself is an Int8Linear.*to_float"),
        (lambda: torch.compile(Net(), backend="eager"), ValueError, "compiled.*then compile it"),
        (compiled_inside, ValueError, "'0.up' was compiled"),
        (lambda: torch.jit.trace(Net(), torch.zeros(1, SIZE)), ValueError, "TorchScript"),
        (lambda: nn.DataParallel(Net()), ValueError, "wrapped in DataParallel"),
        (quantized, ValueError, "integer model.*all of its 1 linear layers.*'0'.*load the float model"),
    ],
)
def test_models_that_cannot_be_patched_are_refused_with_the_remedy(
    make: Callable[[], nn.Module], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=f"(?s){sentence}"):
        hwkern.patch(make())


def test_a_model_on_cuda_without_kernels_is_refused_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU needed: the layer only says that it is on one.
    model = Net()
    before = Snapshot(model)
    monkeypatch.setattr(hwkern._native, "cuda_problem", lambda: "no driver here: install one.")
    monkeypatch.setattr(nn.Parameter, "device", torch.device("cuda", 0), raising=False)
    with pytest.raises(RuntimeError, match=r"on cuda:0 \(layer 'up'\).*no driver here.*model\.cpu\(\)"):
        hwkern.patch(model)
    monkeypatch.undo()
    before.assert_same(model)


def test_a_model_without_linear_layers_is_no_error() -> None:
    report = hwkern.patch(nn.Sequential(nn.Conv1d(3, 3, 3), nn.ReLU()))
    assert report.layers == ()
    assert "no linear layers" in str(report)


# ---- what must survive ----------------------------------------------------------------------------------------------


def test_a_shared_module_stays_shared() -> None:
    layer = big()
    model = nn.ModuleDict({"a": layer, "inner": nn.Sequential(layer, nn.ReLU()), "b": layer})
    before = Snapshot(model)
    report = hwkern.patch(model)
    assert [entry.names for entry in report.layers] == [("a", "b", "inner.0")]
    assert model["a"] is model["b"] is model["inner"][0]
    assert isinstance(model["a"], Int8Linear)
    hwkern.unpatch(model)
    before.assert_same(model)


def test_tied_weights_are_quantized_once_and_stay_tied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(big(), big(), big())
    model[2].weight = model[0].weight
    before = Snapshot(model)
    calls = []
    real = implementation.make
    monkeypatch.setattr(implementation, "make", lambda *layer: calls.append(1) or real(*layer))
    report = hwkern.patch(model)
    assert len(calls) == 2
    assert report.layers[2].tied_to == "0"
    assert report.layers[2].bytes_before == report.layers[2].bytes_after == 4 * SIZE  # the bias
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half()):
        assert patched[0].weight is patched[2].weight
        assert patched[0].weight_scale is patched[2].weight_scale
        assert patched[0].weight is not patched[1].weight
    twin = copy.deepcopy(model)
    for patched in (model, twin):
        hwkern.unpatch(patched)
        assert patched[0].weight is patched[2].weight
    before.assert_same(model)
    assert twin[0].weight is not model[0].weight


def test_a_weight_tied_to_a_layer_that_stays_float_stays_float() -> None:
    model = nn.Sequential(big(), big(), big())
    model[2].weight = model[0].weight
    report = hwkern.patch(model, exclude="0")
    assert reasons(report) == {"0": "excluded by '0'", "2": "its weight is shared with '0', which stays float"}
    assert model[0].weight is model[2].weight
    assert [layer.name for layer in hwkern.patch(model, include="2").swapped] == ["2"]


def test_hooks_keep_working_and_their_handles_keep_removing(x: torch.Tensor) -> None:
    model = Net()
    calls: list[str] = []
    handles = [
        model.up.register_forward_hook(lambda *_: calls.append("forward")),
        model.up.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True),
        model.up.register_full_backward_hook(lambda *_: calls.append("backward")),
        model.up.register_forward_hook(lambda *_: calls.append("always"), always_call=True),
        model.up.register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]
    hwkern.patch(model)
    model(x.requires_grad_()).sum().backward()
    assert sorted(calls) == ["always", "backward", "forward", "pre"]
    model.state_dict()
    assert "state" in calls
    late = model.up.register_forward_hook(lambda *_: calls.append("late"))
    handles[0].remove()
    hwkern.unpatch(model)
    calls.clear()
    model(x).sum().backward()
    assert sorted(calls) == ["always", "backward", "late", "pre"]
    for handle in (*handles, late):
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    model.state_dict()
    assert calls == []


def test_mode_bias_and_the_users_attributes_travel_both_ways() -> None:
    model = Net()
    model.up.eval()
    model.up.tag = "mine"
    model.up.bias.requires_grad_(False)
    bias = model.up.bias
    hwkern.patch(model)
    assert (model.up.training, model.down.training, model.up.tag) == (False, True, "mine")
    assert model.up.bias is bias
    assert not model.up.bias.requires_grad
    model.eval()
    model.up.tag, model.up.late = "changed", 1
    hwkern.unpatch(model)
    assert (model.down.training, model.up.tag, model.up.late) == (False, "changed", 1)
    assert model.up.bias is bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_trained_bias_and_a_changed_dtype_are_those_of_now_after_unpatch(dtype: torch.dtype, x: torch.Tensor) -> None:
    model = Net()
    weight = model.up.weight.detach().clone()
    hwkern.patch(model)
    model.up.bias.data.fill_(7)
    model.to(dtype)
    hwkern.unpatch(model)
    assert (model.up.bias == 7).all()
    assert torch.equal(model.up.weight, weight.to(dtype))
    assert model.down.weight.dtype == dtype  # no bias to tell it by
    assert model(x.to(dtype)).dtype == dtype


@pytest.mark.gpu
def test_a_model_patched_on_the_cpu_comes_back_on_the_gpu_and_the_other_way_round() -> None:
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        model = Net().to(here)
        weight = model.up.weight.detach().clone()
        hwkern.patch(model)
        model.to(there)
        hwkern.unpatch(model)
        assert model.up.weight.device.type == there
        assert torch.equal(model.up.weight.cpu(), weight.cpu())


def test_copies_unpatch_on_their_own_without_touching_each_other(x: torch.Tensor) -> None:
    for originals in ("host", "disk"):
        model = Net()
        y = model(x)
        hwkern.patch(model, originals=originals)
        twin = copy.deepcopy(model)
        hwkern.unpatch(model)
        assert isinstance(twin.up, Int8Linear)
        with torch.no_grad():
            model.up.weight.zero_()
        hwkern.unpatch(twin)
        assert torch.equal(twin(x), y)
        assert twin.up is not model.up


def test_a_pickled_model_runs_but_cannot_go_back_and_says_why(x: torch.Tensor) -> None:
    model = Net()
    float_size = len(pickle.dumps(model))
    hwkern.patch(model)
    data = pickle.dumps(model)
    assert len(data) < float_size / 2
    loaded = pickle.loads(data)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match=r"2 of 2 int8 layers cannot go back.*pickle.*'up'.*to_float\(\)"):
        hwkern.unpatch(loaded)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_state_dict_round_trip_into_another_patched_model(x: torch.Tensor) -> None:
    model, other = Net(), Net()
    hwkern.patch(model)
    hwkern.patch(other)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


def test_loading_other_weights_ends_the_way_back_but_the_same_ones_do_not() -> None:
    model, other = Net(), Net()
    hwkern.patch(model)
    model.load_state_dict(model.state_dict())
    hwkern.unpatch(model)
    hwkern.patch(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.up.weight, Int8Linear.from_float(other.up).weight)
    with pytest.raises(ValueError, match="other weights were loaded"):
        hwkern.unpatch(model)
    assert isinstance(model.up, Int8Linear)


@pytest.mark.parametrize("float_state", [False, True])
def test_a_meta_model_can_be_patched_and_then_loaded(float_state: bool, x: torch.Tensor) -> None:
    real = Net()
    float_weights = real.state_dict()
    with torch.device("meta"):
        model = Net()
    report = hwkern.patch(model)
    assert statuses(report) == {"up": "int8", "down": "int8", "small": "left", "lm_head": "left"}
    assert report.originals == ""
    hwkern.patch(real)
    model.load_state_dict(float_weights if float_state else real.state_dict(), assign=True)
    assert torch.equal(model(x), real(x))
    with pytest.raises(ValueError, match="float weight is gone"):
        hwkern.unpatch(model)


def test_a_meta_model_goes_back_to_meta_but_not_to_memory() -> None:
    with torch.device("meta"):
        model = Net()
    hwkern.patch(model)
    hwkern.unpatch(model)
    assert model.up.weight.is_meta
    assert type(model.up) is nn.Linear
    hwkern.patch(model)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match="patched on the meta device"):
        hwkern.unpatch(model)


def test_drop_leaves_no_way_back_and_no_memory(x: torch.Tensor) -> None:
    model = Net()
    weight = weakref.ref(model.up.weight.untyped_storage())
    report = hwkern.patch(model, originals="drop")
    gc.collect()
    assert weight() is None
    assert "unpatch is not possible" in str(report)
    with pytest.raises(ValueError, match=r"dropped \(originals='drop'\).*originals='host' or 'disk'"):
        hwkern.unpatch(model)
    assert isinstance(model.up, Int8Linear)
    assert model(x).shape == (5, 8 + SIZE)


def test_drop_on_a_gpu_with_room_copies_nothing_to_the_host(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    places = []
    real = implementation.Spool
    monkeypatch.setattr(implementation, "Spool", lambda place: (places.append(place), real(place))[1])
    monkeypatch.setattr(implementation, "room_beside", lambda weights: True)
    model = Net()
    weight = weakref.ref(model.up.weight.untyped_storage())
    report = hwkern.patch(model, originals="drop")
    gc.collect()
    assert places == ["device"]
    assert report.originals == "drop"
    assert weight() is None
    with pytest.raises(ValueError, match=r"dropped \(originals='drop'\)"):
        hwkern.unpatch(model)
    monkeypatch.setattr(implementation, "room_beside", lambda weights: False)
    hwkern.patch(Net(), originals="drop")
    assert places[1] != "device"


@pytest.mark.parametrize(("share", "room"), [(1.0, 40), (0.5, 30), (0.2, 0), (None, 40)])
def test_room_on_a_gpu_is_what_torch_may_take_of_it(
    monkeypatch: pytest.MonkeyPatch, share: float | None, room: int
) -> None:
    """100 bytes, of which others hold 40 and this process 30: 20 in tensors, 10 unused. Half of the GPU is 50."""
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    if share is None:  # a torch that does not tell
        monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction", raising=False)
    else:
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share, raising=False)
    assert _originals.free_on(device) == room


@pytest.mark.gpu
def test_dropped_weights_leave_the_gpu_and_never_see_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(4)))
    hwkern.patch(copy.deepcopy(model))  # what is made once and kept is there before the counting
    before = torch.cuda.memory_allocated()
    copied = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t, *a: (copied.append(t.numel()), real(t, *a))[1])
    hwkern.patch(model, originals="drop")
    assert max(copied, default=0) < 2048 * 2048
    saved = before - torch.cuda.memory_allocated()
    assert saved == pytest.approx(4 * 2048 * 2048, rel=0.02)  # of two bytes a weight one stays, and a scale a row


# ---- nothing is lost when something fails ---------------------------------------------------------------------------


def six_layers() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(6)))
    model[4].weight = model[1].weight
    return model


def failing(error: BaseException, at: int) -> Iterator[None]:
    yield from [None] * at
    raise error


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("originals", ["host", "disk", "device", "drop"])
@pytest.mark.parametrize("place", ["quantize", "store", "progress"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_failure_halfway_leaves_the_model_exactly_as_it_was(
    error: BaseException, originals: str, place: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = six_layers()
    before = Snapshot(model)
    step = failing(error, at)
    options = {}
    if place == "progress":
        options["progress"] = lambda *_: next(step)
    else:
        name = {"quantize": "make", "store": "_store"}[place]
        real = getattr(implementation, name)
        monkeypatch.setattr(implementation, name, lambda *args: (next(step), real(*args))[1])
    with pytest.raises(type(error)):
        hwkern.patch(model, originals=originals, **options)
    before.assert_same(model)
    monkeypatch.undo()
    assert len(hwkern.patch(model).swapped) == 6


def test_a_failure_halfway_through_unpatch_leaves_the_patched_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = six_layers()
    original = Snapshot(model)
    hwkern.patch(model)
    before = Snapshot(model)
    step = failing(KeyboardInterrupt(), 3)
    real = _originals.FloatWeight.restore
    monkeypatch.setattr(_originals.FloatWeight, "restore", lambda *args: (next(step), real(*args))[1])
    with pytest.raises(KeyboardInterrupt):
        hwkern.unpatch(model)
    monkeypatch.undo()
    before.assert_same(model)
    hwkern.unpatch(model)
    original.assert_same(model)


def test_a_full_disk_is_noticed_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = Snapshot(model)
    monkeypatch.setattr(implementation, "free_disk", lambda: 1000)
    with pytest.raises(OSError, match=r"need 0\.00 GB.*set TMPDIR.*originals='host'"):
        hwkern.patch(model, originals="disk")
    before.assert_same(model)
    assert hwkern.patch(model).originals == "host"  # "auto" finds a way


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_halfway_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = Snapshot(model)
    monkeypatch.setattr(_originals.os, "pwritev", lambda _, *args: os.write(full, args[0][0]))
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=r"could not be kept in .*No space left.*TMPDIR"):
            hwkern.patch(model, originals="disk")
    finally:
        os.close(full)
    before.assert_same(model)


def test_the_temporary_file_has_no_name_and_honours_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(_originals.tempfile, "tempdir", None)
    model = Net()
    hwkern.patch(model, originals="disk")
    assert list(tmp_path.iterdir()) == []
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _is_open(fd)]
    assert any(file.startswith(str(tmp_path)) for file in files)
    hwkern.unpatch(model)
    gc.collect()
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and _is_open(fd)]
    assert not any(file.startswith(str(tmp_path)) for file in files)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patching_takes_less_extra_memory_than_the_largest_layer_and_gives_the_rest_back(dtype: str) -> None:
    script = textwrap.dedent(
        f"""
        import ctypes, torch, hwkern
        from torch import nn
        from hwkern import _layers
        torch.set_num_threads(1)
        _layers.cpu_int8_is_fast = lambda: True
        # Freed blocks go back to the system at once, so that the resident size is what is in use.
        ctypes.CDLL(None).mallopt(-3, 1 << 16)

        def memory(key):
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

        def layer(n, k):
            layer = nn.utils.skip_init(nn.Linear, k, n, dtype=torch.{dtype})
            nn.init.constant_(layer.weight, 0.5)
            nn.init.constant_(layer.bias, 0.5)
            return layer

        hwkern.patch(nn.Sequential(layer(512, 512)))  # what is loaded at first use is not the model's
        model = nn.Sequential(*(layer(2048, 2048) for _ in range(16)), layer(4096, 2048))
        largest = model[16].weight.nbytes
        total = sum(p.nbytes for p in model.parameters())
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # VmHWM starts again from the present
        before = memory("VmRSS")
        report = hwkern.patch(model)
        peak, after = memory("VmHWM") - before, before - memory("VmRSS")
        assert len(report.swapped) == 17 and report.originals == "disk", report
        freed = report.model_bytes_before - report.model_bytes_after
        print(largest, peak, freed, after)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    largest, peak, freed, given_back = map(int, run.stdout.split())
    margin = 2**21  # page tables, Python's own objects
    assert peak <= largest + margin
    assert given_back >= freed - margin


# ---- the name -------------------------------------------------------------------------------------------------------


def test_hwkern_patch_can_be_called_whatever_was_imported_first() -> None:
    for first in (
        "import hwkern.patch",
        "from hwkern.patch import unpatch",
        "import hwkern; hwkern.patch; import hwkern.patch",
    ):
        code = f"{first}; import torch; print(hwkern.patch(torch.nn.Sequential(torch.nn.ReLU())).layers)"
        run = subprocess.run(
            [sys.executable, "-c", f"import hwkern; {code}"], capture_output=True, text=True, timeout=120
        )
        assert run.stdout == "()\n", run.stderr
