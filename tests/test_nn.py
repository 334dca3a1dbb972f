"""Int8Linear as a module: its numbers, its states, what must survive .to(), pickle and copies, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

from hwkern import ops, reference
from hwkern._recipes import Recipe, make
from hwkern.nn import Calibration, Int8Conv1D, Int8Embedding, Int8Linear
from hwkern.nn.pack import quantize_weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STATIC = Calibration(scale=0.03)


def linear(k: int = 40, n: int = 24, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def expected(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    return reference.int8_linear(x, layer.weight[:, : layer.in_features], layer.weight_scale, layer.bias)


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (24, 40), (7, 17), (3, 4000), (700, 33)])
def test_packed_weight_is_the_reference_quantization_with_zero_padding(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, k).to(dtype)
    packed, scale = quantize_weight(weight)
    q, s = reference.quantize(weight)
    assert packed.shape == (n, ops.padded(k))
    assert torch.equal(packed[:, :k], q)
    assert torch.equal(scale, s)
    assert not packed[:, k:].any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_reference_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    layer = Int8Linear.from_float(linear(bias=bias, dtype=dtype))
    x = torch.randn(2, 5, 40).to(dtype)
    assert torch.equal(layer(x), expected(layer, x))
    assert layer(x).dtype == dtype


def test_weight_in_another_memory_order_packs_the_same() -> None:
    plain = linear()
    other = linear()
    other.weight = nn.Parameter(plain.weight.detach().t().contiguous().t())
    assert other.weight.stride() == (1, 24)
    assert torch.equal(Int8Linear.from_float(plain).weight, Int8Linear.from_float(other).weight)


def test_no_rows_and_noncontiguous_rows() -> None:
    layer = Int8Linear.from_float(linear())
    assert layer(torch.randn(0, 40)).shape == (0, 24)
    x = torch.randn(40, 6).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_bias_is_the_very_same_parameter() -> None:
    original = linear()
    assert Int8Linear.from_float(original).bias is original.bias
    assert Int8Linear.from_float(linear(bias=False)).bias is None


def test_to_float_is_the_dequantized_weight() -> None:
    layer = Int8Linear.from_float(linear(dtype=torch.bfloat16))
    back = layer.to_float(torch.float32)
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, reference.dequantize(layer.weight[:, :40], layer.weight_scale))
    assert torch.equal(back.bias, layer.bias.float())
    assert back.bias is not layer.bias
    assert layer.to_float().weight.dtype == torch.bfloat16


def test_from_float_keeps_the_mode_and_leaves_the_original_alone() -> None:
    original = linear().eval()
    before = original.weight.clone()
    assert not Int8Linear.from_float(original).training
    assert torch.equal(original.weight, before)


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_reach_x_and_bias_but_not_the_weight() -> None:
    layer = Int8Linear.from_float(linear())
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 24) @ layer_weight(layer))  # only the order of sums may differ
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))
    assert layer.weight.grad is None


def test_asking_for_the_weights_gradient_says_why_not() -> None:
    layer = Int8Linear.from_float(linear())
    with pytest.raises(RuntimeError, match=r"int8 and has no gradient.*unpatch"):
        layer.requires_grad_()
    with pytest.raises(RuntimeError, match="floating point"):  # torch's own sentence
        layer.weight.requires_grad_()
    assert not any(p.requires_grad for p in layer.requires_grad_(False).parameters())


def test_asking_for_the_scales_gradient_says_why_not() -> None:
    layer = Int8Linear.from_float(linear())
    layer.weight_scale.requires_grad_()
    with pytest.raises(NotImplementedError, match="weight_scale"):
        layer(torch.randn(2, 40)).sum().backward()


# ---- .to() and friends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.type(torch.float16), torch.float16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.double(), torch.float64),
    ],
)
def test_changing_the_dtype_changes_the_bias_but_neither_weight_nor_scale(convert, dtype: torch.dtype) -> None:
    layer = Int8Linear.from_float(linear())
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    model = convert(nn.Sequential(layer))
    assert model[0] is layer
    assert torch.equal(layer.weight, weight)
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight_scale, scale)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == dtype
    assert layer.float_dtype == dtype
    assert layer.to_float().weight.dtype == dtype


def tied_pair() -> nn.Sequential:
    a = Int8Linear.from_float(linear(40, 40))
    b = Int8Linear._from_packed(40, a.weight, a.weight_scale, None, torch.float32)
    return nn.Sequential(a, b)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.share_memory(), copy.deepcopy])
def test_layers_that_share_a_weight_share_weight_and_scale_afterwards(move) -> None:
    a, b = move(tied_pair())
    assert a.weight is b.weight
    assert a.weight_scale is b.weight_scale


@pytest.mark.gpu
def test_layers_that_share_a_weight_share_it_on_the_gpu() -> None:
    a, b = tied_pair().cuda()
    assert a.weight is b.weight
    assert a.weight_scale is b.weight_scale
    assert a.weight_scale.device.type == "cuda"


def test_to_empty_gives_a_layer_of_the_same_layout() -> None:
    layer = Int8Linear.from_float(linear()).to("meta")
    assert layer.weight.is_meta
    assert layer.weight_scale.is_meta
    layer = layer.to_empty(device="cpu")
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert layer.weight.shape == (24, 48)


# ---- copies and states ----------------------------------------------------------------------------------------------


def same(a: Int8Linear, b: Int8Linear) -> bool:
    x = torch.randn(4, a.in_features)
    return torch.equal(a(x), b(x)) and list(a.state_dict()) == list(b.state_dict())


def test_pickle_copy_and_torch_save_give_the_same_layer() -> None:
    layer = Int8Linear.from_float(linear())
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert same(layer, torch.load(buffer, weights_only=False))


def test_state_dict_round_trip() -> None:
    layer = Int8Linear.from_float(linear())
    state = layer.state_dict()
    assert {key: value.dtype for key, value in state.items()} == {
        "weight": torch.int8,
        "weight_scale": torch.float32,
        "bias": torch.float32,
    }
    empty = Int8Linear(40, 24)
    assert not empty(torch.randn(2, 40)).any()
    empty.load_state_dict(state)
    assert same(layer, empty)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = Int8Linear(40, 24)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(layer, other)


@pytest.mark.parametrize("assign", [False, True])
def test_float_state_is_quantized_while_it_loads(assign: bool) -> None:
    original = linear()
    layer = Int8Linear(40, 24)
    layer.load_state_dict(original.state_dict(), assign=assign)
    assert same(layer, Int8Linear.from_float(original))


@pytest.mark.parametrize("float_state", [False, True])
def test_meta_layer_is_filled_by_load_state_dict_with_assign(float_state: bool) -> None:
    original = linear(dtype=torch.bfloat16)
    wanted = Int8Linear.from_float(original)
    layer = Int8Linear(40, 24, device="meta")
    layer.load_state_dict((original if float_state else wanted).state_dict(), assign=True)
    assert not layer.weight.is_meta
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(layer(x), wanted(x))


def broken(key: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(Int8Linear.from_float(linear()).state_dict())
    del state[key]
    if value is not None:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (broken("weight", torch.zeros(24, 40, dtype=torch.int8)), r"shape \(24, 40\).*needs \(24, 48\)"),
        (broken("weight", torch.zeros(24, 48, dtype=torch.int32)), "weight is int32"),
        (broken("weight", torch.zeros(24, 48)), "weight is float32 next to a weight_scale"),
        (broken("weight", None), "has weight_scale but no weight"),
        (broken("weight_scale", None), "has weight but no weight_scale"),
        (broken("weight_scale", torch.zeros(24, dtype=torch.bfloat16)), "weight_scale is bfloat16.*cast"),
        (broken("weight_scale", torch.zeros(23)), r"weight_scale has the shape \(23,\)"),
        (broken("weight_scale", torch.full((24,), torch.nan)), "NaN or ±inf in 24 of 24"),
        ({"weight": torch.zeros(23, 40), "bias": torch.zeros(24)}, r"shape \(23, 40\).*needs \(24, 40\)"),
        ({"weight": torch.full((24, 40), torch.inf), "bias": torch.zeros(24)}, "NaN or ±inf"),
        ({"weight": torch.zeros(24, 40).double(), "bias": torch.zeros(24)}, "weight is float64"),
        ({"weight": torch.zeros(24, 40)}, "Missing key.*bias"),
        ({}, "Missing key.*weight.*bias.*weight_scale"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_states_that_do_not_fit_are_refused_with_a_sentence(state, sentence: str, assign: bool) -> None:
    layer = Int8Linear.from_float(linear())
    with pytest.raises(RuntimeError, match=f"(?s){sentence}"):
        nn.ModuleDict({"fc": layer}).load_state_dict(
            {f"fc.{key}": value for key, value in state.items()}, assign=assign
        )


def test_unexpected_keys_are_reported() -> None:
    layer = Int8Linear.from_float(linear())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict({**layer.state_dict(), "extra": torch.zeros(1)})


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [39, 41, 33, 48])
def test_x_of_another_width_is_refused_even_when_it_pads_to_the_same_width(k: int) -> None:
    layer = Int8Linear.from_float(linear())
    with pytest.raises(ValueError, match=rf"x has {k} features.*in_features = 40"):
        layer(torch.randn(2, k))


def test_integer_x_and_float64_x_are_refused() -> None:
    layer = Int8Linear.from_float(linear())
    for dtype in (torch.int8, torch.int64, torch.float64):
        with pytest.raises(TypeError, match=str(dtype)):
            layer(torch.zeros(2, 40, dtype=dtype))


def test_tensors_on_different_devices_are_refused_with_both_devices() -> None:
    layer = Int8Linear.from_float(linear())
    with pytest.raises(ValueError, match=r"one device.*x on meta.*weight on cpu"):
        layer(torch.randn(2, 40, device="meta"))


@pytest.mark.parametrize("what", ["weight", "weight_scale"])
@pytest.mark.parametrize(
    "recipe", [Recipe("w8a8"), Recipe("w8a16"), Recipe("w8a16/w8a8", max_tokens=16), Recipe("w8a8", STATIC)]
)
def test_a_layer_whose_weight_was_taken_away_says_so(recipe: Recipe, what: str) -> None:
    layer = make(linear(), recipe)
    x = torch.randn(2, 40)
    want, tensor = layer(x), getattr(layer, what)
    setattr(layer, what, None)
    with pytest.raises(RuntimeError, match=rf"^{type(layer).__name__}\(in_features=40, .*its {what} is None"):
        layer(x)
    setattr(layer, what, tensor)
    assert torch.equal(layer(x), want)


def test_a_table_whose_weight_was_taken_away_says_so() -> None:
    layer = Int8Embedding.from_float(nn.Embedding(9, 40))
    layer.weight = None
    with pytest.raises(RuntimeError, match=r"^Int8Embedding\(9, 40, .*its weight is None"):
        layer(torch.tensor([1, 2]))


@pytest.mark.gpu
def test_cpu_tensor_to_a_cuda_layer_is_refused_with_both_devices() -> None:
    layer = Int8Linear.from_float(linear().cuda())
    with pytest.raises(ValueError, match=r"one device.*x on cpu.*weight on cuda"):
        layer(torch.randn(2, 40))
    with pytest.raises(ValueError, match=r"one device.*x on cuda.*weight on cpu"):
        layer.cpu()(torch.randn(2, 40, device="cuda"))


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (torch.zeros(2, 2**17), "K = 131072 inputs.*2\\*\\*17"),
        (torch.zeros(2, 4, dtype=torch.int8), "int8: not a float weight"),
        (torch.zeros(2, 4, dtype=torch.float64), "float64"),
        (torch.zeros(2, 4, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 4, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0], [torch.inf, 0.0]]), "NaN or ±inf in 2 of 3"),
        (torch.zeros(0, 4), "empty"),
        (torch.zeros(4), "not two dimensions"),
    ],
)
def test_weights_that_cannot_become_int8_are_refused_with_the_reason(weight: torch.Tensor, sentence: str) -> None:
    layer = nn.Linear(4, 2, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=sentence):
        Int8Linear.from_float(layer)


def test_largest_k_is_accepted() -> None:
    layer = Int8Linear.from_float(nn.Linear(2**17 - 1, 1))
    x = torch.full((1, 2**17 - 1), 3.0)
    assert torch.equal(layer(x), expected(layer, x))


def test_other_things_than_linear_layers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Linear, not Embedding"):
        Int8Linear.from_float(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="not possible: K = 131072"):
        Int8Linear(2**17, 4)
    with pytest.raises(ValueError, match="not initialised"):
        Int8Linear.from_float(nn.LazyLinear(4))


# ---- torch.compile and transformers' Conv1D -------------------------------------------------------------------------


def test_compiles_without_graph_breaks() -> None:
    layer = Int8Linear.from_float(linear()).requires_grad_(False)
    x = torch.randn(3, 40)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("recipe", "dtype", "operator"),
    [
        (Recipe("w8a8"), torch.float32, "int8_linear.default"),
        (Recipe("w8a16"), torch.bfloat16, "weight_only_linear.default"),
        (Recipe("w8a16"), torch.float32, "dequantize.default"),  # no kernel takes float32 as it is
        (Recipe("w8a16/w8a8", max_tokens=2), torch.float32, "int8_linear.default"),
        (Recipe("w8a8-static", Calibration(scale=0.05)), torch.float32, "int8_linear_static.default"),
    ],
)
def test_a_layer_without_values_exports(recipe: Recipe, dtype: torch.dtype, operator: str) -> None:
    """On the meta device, which autocast does not know."""
    layer = nn.Sequential(make(nn.Linear(32, 48, dtype=dtype), recipe).to("meta"))
    x = torch.randn(4, 32, device="meta", dtype=dtype)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,))
        assert (layer(x).shape, layer(x).dtype) == ((4, 48), dtype)
    assert f"torch.ops.hwkern.{operator}" in str(exported.graph)


def test_exports() -> None:
    layer = Int8Linear.from_float(linear()).requires_grad_(False)
    x = torch.randn(3, 40)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=1, max=64)}})
    x = torch.randn(7, 40)
    assert torch.equal(exported.module()(x), layer(x))


def test_conv1d_is_a_linear_layer_with_a_transposed_weight() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    original = conv1d(24, 40)
    nn.init.normal_(original.bias)
    layer = Int8Conv1D.from_float(original)
    twin = linear()
    twin.weight, twin.bias = nn.Parameter(original.weight.detach().t()), original.bias
    x = torch.randn(2, 3, 40)
    assert torch.equal(layer(x), Int8Linear.from_float(twin)(x))
    assert (layer.nx, layer.nf, layer.in_features, layer.out_features) == (40, 24, 40, 24)
    back = layer.to_float()
    assert type(back) is conv1d
    assert torch.equal(back.weight.t(), layer_weight(layer))
    assert torch.equal(back.bias, original.bias)
    loaded = Int8Conv1D(40, 24)
    loaded.load_state_dict(original.state_dict())
    assert same(layer, loaded)
    with pytest.raises(RuntimeError, match=r"needs \(40, 24\)"):
        loaded.load_state_dict(twin.state_dict())
    with pytest.raises(TypeError, match="takes a transformers Conv1D, not Linear"):
        Int8Conv1D.from_float(linear())


def layer_weight(layer: Int8Linear) -> torch.Tensor:
    return reference.dequantize(layer.weight[:, : layer.in_features], layer.weight_scale)


def test_without_transformers_nothing_is_a_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    with pytest.raises(TypeError, match="takes a transformers Conv1D"):
        Int8Conv1D.from_float(linear())


def test_repr_names_the_sizes() -> None:
    assert repr(Int8Linear(40, 24)) == "Int8Linear(in_features=40, out_features=24, bias=True, weight=int8)"
