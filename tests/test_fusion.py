"""Fusion: merged products, norms and activations in one kernel with the quantization; checked, reversible, optional."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hwkern
from hwkern import _fused_linear, _fusion, _no_grad, ops, reference
from hwkern._back_off import _Recipes
from hwkern._recipes import Recipe
from hwkern.nn import Calibration, Int8Linear
from hwkern.nn.merged import EPILOGUE_TOKENS, Merged

transformers = pytest.importorskip("transformers")

HIDDEN = 128
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 256, "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64}
BERT = {**SIZES, "intermediate_size": 256, "vocab_size": 99, "max_position_embeddings": 64}
IMAGES = {**SIZES, "intermediate_size": 256, "image_size": 16, "patch_size": 4}
EVERY = ["*layer*", "*.h.*"]

CAUSAL = "causal attention without a mask"
LLAMA_FUSED = {
    "norm -> q_proj+k_proj+v_proj", "norm -> gate_proj+up_proj", "silu · up -> down_proj", "residuals", CAUSAL,
}  # fmt: skip
BERT_FUSED = {"query+key+value", "dense -> gelu"}
VIT_FUSED = {"norm -> q_proj+k_proj+v_proj", "norm -> fc1", "gelu -> fc2"}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(**{**LLAMA, **changes})
    config.pad_token_id = config.eos_token_id = None
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
    )


FAMILIES: dict[str, tuple[Any, set[str]]] = {
    "llama": (llama, LLAMA_FUSED),
    "llama with biases": (lambda: llama(attention_bias=True, mlp_bias=True), LLAMA_FUSED),
    "mistral": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)), LLAMA_FUSED),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)), LLAMA_FUSED),
    "qwen3": (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=32)), LLAMA_FUSED),
    "gemma": (
        lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA, head_dim=64)),
        {*LLAMA_FUSED - {"silu · up -> down_proj"}, "gelu_tanh · up -> down_proj"},
    ),
    "phi3": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA, pad_token_id=0)),
        {"norm -> qkv_proj", "norm -> gate_up_proj", "silu · up -> down_proj"},
    ),
    "phi": (
        lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**LLAMA)),
        {"norm -> q_proj+k_proj+v_proj+fc1"},
    ),
    "gpt2": (gpt2, {"norm -> c_attn", "norm -> c_fc", "gelu_tanh -> c_proj"}),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)), BERT_FUSED),
    "roberta": (lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**BERT)), BERT_FUSED),
    "electra": (lambda: transformers.ElectraModel(transformers.ElectraConfig(**BERT, embedding_size=64)), BERT_FUSED),
    "distilbert": (
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=99, dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=256)
        ),
        {"q_lin+k_lin+v_lin", "gelu -> lin2"},
    ),
    "opt": (
        lambda: transformers.OPTModel(
            transformers.OPTConfig(**SIZES, ffn_dim=256, vocab_size=99, word_embed_proj_dim=HIDDEN)
        ),
        {"norm -> q_proj+k_proj+v_proj", "norm -> fc1"},
    ),
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGES)), VIT_FUSED),
    "clip": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES, hidden_act="gelu")),
        VIT_FUSED,
    ),
}


def inputs_of(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    device = model.device
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16).to(device, dtype)}
    return {"input_ids": torch.randint(3, 99, (2, 7)).to(device)}


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**inputs)[0]


def patched(model: Any, **options: Any) -> hwkern.Report:
    names = [name for name, module in model.named_modules() if hwkern._layers.int8_class(module) is not None]
    inside = [name for name in names if any(part.isdigit() for part in name.split("."))]
    return hwkern.patch(model.eval(), include=inside, **options)


def patched_as(model: Any, schemes: dict[str, str], folded: bool = False) -> None:
    """Each layer of a Llama as the first ending of its name that fits says; ``folded``: its norms are divided."""
    recipes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scheme = next(scheme for ending, scheme in schemes.items() if name.endswith(ending))
            smooth = (2.0,) * module.in_features if folded and not name.endswith(("o_proj", "down_proj")) else ()
            calibration = Calibration(smooth=smooth, folded=bool(smooth))
            recipes[name] = Recipe(scheme, calibration, 16 if "/" in scheme else None)
    hwkern.patch(model.eval(), plan=_Recipes(recipes))


def fused_in(model: nn.Module) -> set[str]:
    return {str(fusion) for module in model.modules() if (fusion := _fusion.fusion_of(module)) is not None}


@pytest.fixture(autouse=True)
def _on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Merged, "everywhere", True)


# A block's second norm and its MLP, for few tokens.
FEW = ["then"] if _no_grad.IN_CPP else ["after_sum", "after_activation"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused operations that run, in order."""
    seen: list[str] = []
    for name in ("linear", "activated", "after_norm", "after_sum", "after_activation", "then"):
        original = getattr(Merged, name)

        def spy(self: Merged, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Merged, name, spy)
    return seen


def test_on_the_cpu_the_layers_stay_on_their_own(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(Merged, "everywhere", False)
    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    calls.clear()
    got = run(model, inputs)
    assert calls == []
    _fusion.unfuse(model)
    assert torch.equal(got, run(model, inputs))


# ---- the operators -------------------------------------------------------------------------------------------------


def weights(n: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    return ops.pad_weight(q), torch.rand(n, device=device) * 0.01 + 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_rounded"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 64), (5, 200, 100), (130, 136, 256)])
def test_norm_linear_has_the_bits_of_norm_quantize_and_a_matmul(
    dtype: torch.dtype, kind: str, m: int, n: int, k: int, device: str
) -> None:
    x = torch.randn(m, k, device=device).to(dtype)
    weight, scale = weights(n, k, device)
    gain = torch.randn(k, device=device).to(dtype)
    shift = torch.randn(k, device=device).to(dtype) if kind == "layer" else None
    bias = torch.randn(n, device=device).to(dtype)
    q = ops.norm_quantize(x, gain, shift, kind=kind, eps=1e-5)
    want = reference.int8_matmul(q.q, weight[:, :k], q.scale, scale, bias, dtype)
    assert torch.equal(_fused_linear.norm_linear(x, weight, scale, bias, gain, shift, kind, 1e-5)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "none"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 64), (5, 200, 100), (130, 136, 256)])
def test_activation_linear_has_the_bits_of_activation_quantize_and_a_matmul(
    dtype: torch.dtype, gated: bool, activation: str, m: int, n: int, k: int, device: str
) -> None:
    x = torch.randn(m, 2 * k if gated else k, device=device).to(dtype)
    weight, scale = weights(n, k, device)
    q, token_scale = ops.activation_quantize(x, activation=activation, gated=gated)
    want = reference.int8_matmul(q, weight[:, :k], token_scale, scale, None, dtype)
    assert torch.equal(_fused_linear.activation_linear(x, weight, scale, None, activation, gated), want)


def test_rows_with_strides_and_no_rows(device: str) -> None:
    weight, scale = weights(48, 64, device)
    x = torch.randn(6, 200, device=device)[::2, 10:138]
    want = _fused_linear.activation_linear(x.contiguous(), weight, scale, None, "silu", True)
    assert torch.equal(_fused_linear.activation_linear(x, weight, scale, None, "silu", True), want)
    want, _ = _fused_linear.norm_linear(x[:, :64].clone(), weight, scale)
    assert torch.equal(_fused_linear.norm_linear(x[:, :64], weight, scale)[0], want)
    assert _fused_linear.norm_linear(x[:0, :64], weight, scale)[0].shape == (0, 48)
    assert _fused_linear.activation_linear(x[:0], weight, scale, gated=True).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_the_mlp_in_one_operator_has_the_bits_of_two(dtype: torch.dtype, gated: bool, device: str) -> None:
    k, wide = 96, 160
    x, residual = (torch.randn(2, 3, k, device=device).to(dtype) for _ in range(2))
    weight, scale = weights(2 * wide if gated else wide, k, device)
    last, last_scale = weights(k, wide, device)
    bias, norm = torch.randn(len(weight), device=device), torch.randn(k, device=device)
    given = (norm, None, "rms", 1e-5, 1.0)
    y, h = _fused_linear.norm_linear(x, weight, scale, bias, *given, residual)
    want = _fused_linear.activation_linear(y, last, last_scale, None, "silu", gated, h)
    codes = (norm, None, ops.NORMS["rms"], 1e-5, 1.0, False, ops.ACTIVATIONS["silu"], gated)
    arguments = (x, residual, weight, scale, bias, *codes, last, last_scale, None, False)
    call = torch.ops.hwkern.norm_mlp_no_grad.default
    with torch.no_grad():
        assert torch.equal(call(*arguments), want)
        strided = (torch.cat((t, t), -1)[..., :k] for t in (x, residual))
        assert torch.equal(call(*strided, *arguments[2:]), want)
        torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="no gradient"):
        call(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("m", "first_only", "last_only"), [(1, True, True), (6, True, False), (70, False, True)])
@pytest.mark.parametrize("wide", [100, 160])  # rows of 100 start at no multiple of 16 bytes
def test_the_mlp_in_one_operator_takes_weight_only_layers(
    dtype: torch.dtype, gated: bool, m: int, first_only: bool, last_only: bool, wide: int, device: str
) -> None:
    k = 96
    x, residual = (torch.randn(m, k, device=device).to(dtype) for _ in range(2))
    weight, scale = weights(2 * wide if gated else wide, k, device)
    last, last_scale = weights(k, wide, device)
    bias, norm = torch.randn(len(weight), device=device), torch.randn(k, device=device)
    given = (norm, None, "rms_rounded", 1e-5, 0.0)
    if first_only:
        found = ops.norm_quantize(x, norm, None, residual, None, *given[2:], True)
        y, h = ops.weight_only_linear(found.y, weight, scale, bias), found.h
    else:
        y, h = _fused_linear.norm_linear(x, weight, scale, bias, *given, residual)
    activated = torch.nn.functional.silu((y[:, :wide] if gated else y).float()).to(dtype)
    if gated:
        activated = activated * y[:, wide:]
    codes = (norm, None, ops.NORMS["rms_rounded"], 1e-5, 0.0, first_only, ops.ACTIVATIONS["silu"], gated)
    with torch.no_grad():
        got = torch.ops.hwkern.norm_mlp_no_grad.default(
            x, residual, weight, scale, bias, *codes, last, last_scale, None, last_only
        )
    if last_only:
        # The kernel's activation may be 4 float32 ulp off torch's, so that it rounds to the next value of dtype, and
        # gated its product then to the next again: 2 units of each term, and one of the result.
        want = reference.weight_only_linear(activated, last[:, :wide], last_scale, None, torch.float64) + h.double()
        terms = activated.double().abs() @ (last[:, :wide].double().abs() * last_scale.double()[:, None]).T
        assert bool(((got - want).abs() <= torch.finfo(dtype).eps * (2 * terms + want.abs())).all())
    else:
        assert torch.equal(got, _fused_linear.activation_linear(y, last, last_scale, None, "silu", gated, h))


def norm_operands(dtype: torch.dtype, kind: str, device: str) -> tuple[Any, ...]:
    """weight, scale, bias of a layer; gain, shift of the norm before it; inputs of many shapes and strides."""
    k = 100
    weight, scale = weights(48, k, device)
    gain, bias = torch.randn(k, device=device).to(dtype), torch.randn(48, device=device).to(dtype)
    wide = torch.randn(6, 2 * k, device=device).to(dtype)
    inputs = (wide[:, :k], wide[::2, k:], wide[:0, :k], wide[:, :k].reshape(2, 3, k).transpose(0, 1), wide[0, :k])
    return weight, scale, bias, gain, gain.flip(0) if kind == "layer" else None, inputs


@pytest.mark.parametrize("kind", ["layer", "rms", "rms_rounded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_s_operator_takes_weight_only_layers(dtype: torch.dtype, kind: str, device: str) -> None:
    weight, scale, bias, gain, shift, inputs = norm_operands(dtype, kind, device)
    call = torch.ops.hwkern.norm_linear_no_grad.default
    for x in inputs:
        y = ops.norm_quantize(x, gain, shift, None, None, kind, 1e-5, 0.0, True).y
        want = ops.weight_only_linear(y, weight, scale, bias)
        with torch.no_grad():
            got = call(x, weight, scale, bias, gain, shift, ops.NORMS[kind], 1e-5, 0.0, True)
        assert got.shape == want.shape
        assert torch.equal(got, want)
    arguments = (x, weight, scale, bias, gain, shift, ops.NORMS[kind], 1e-5, 0.0, True)
    with torch.no_grad():
        torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_rounded"])
def test_the_norm_s_operator_of_inference_has_the_bits_of_the_public_one(
    dtype: torch.dtype, kind: str, device: str
) -> None:
    weight, scale, bias, gain, shift, inputs = norm_operands(dtype, kind, device)
    call = torch.ops.hwkern.norm_linear_no_grad.default
    every_other = torch.stack((bias, bias), 1)[:, 0]  # stride 2
    for x in inputs:
        want, _ = _fused_linear.norm_linear(x, weight, scale, bias, gain, shift, kind, 1e-5)
        with torch.no_grad():
            got = call(x, weight, scale, every_other, gain, shift, ops.NORMS[kind], 1e-5, 0.0, False)
        assert got.shape == want.shape
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("wide", [100, 160])  # rows of 100 start at no multiple of 16 bytes
def test_the_activation_s_operator_of_inference_has_the_bits_of_the_public_one(
    dtype: torch.dtype, gated: bool, wide: int, device: str
) -> None:
    weight, scale = weights(48, wide, device)
    bias = torch.randn(48, device=device).to(dtype)
    columns = 2 * wide if gated else wide
    base = torch.randn(6, columns + 7, device=device).to(dtype)
    many = torch.randn(70, columns, device=device).to(dtype)
    rows = base[:, :columns]
    call = torch.ops.hwkern.activation_linear_no_grad.default
    for x in (rows, rows[::2], rows[:0], rows.reshape(2, 3, columns).transpose(0, 1), rows[0], many):
        for given in (None, torch.randn(*x.shape[:-1], 2 * 48, device=device).to(dtype)[..., ::2]):
            for name, code in ops.ACTIVATIONS.items():
                want = _fused_linear.activation_linear(x, weight, scale, bias, name, gated, given)
                with torch.no_grad():
                    got = call(x, code, gated, weight, scale, bias, given)
                assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
                assert torch.equal(got, want)
    arguments = (rows, ops.ACTIVATIONS["silu"], gated, weight, scale, None, None)
    with torch.no_grad():
        torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="no gradient"):
        call(*arguments)


@pytest.mark.gpu
def test_the_operators_of_inference_refuse_what_does_not_fit_and_keep_nothing_of_it() -> None:
    if not _no_grad.IN_CPP:
        pytest.skip("this torch has no stable C functions: the operators are Python")
    weight, scale = weights(48, 64, "cuda")
    x = torch.randn(2, 64, device="cuda")
    linear, norm = torch.ops.hwkern.linear_no_grad.default, torch.ops.hwkern.norm_linear_no_grad.default
    mlp = torch.ops.hwkern.norm_mlp_no_grad.default
    activated, silu = torch.ops.hwkern.activation_linear_no_grad.default, ops.ACTIVATIONS["silu"]
    one, two = torch.ones(48, device="cuda"), torch.ones(64, device="cuda")
    every_other = torch.ones(64, 2, device="cuda")[:, 0]
    last, last_scale = weights(64, 48, "cuda")
    plain = (None, two, None, ops.NORMS["rms"], 1e-5, 0.0, False, ops.ACTIVATIONS["silu"])
    wrong: list[tuple[Any, tuple[Any, ...], str]] = [
        (linear, (x[:, :40], weight, scale, None, False), "K16"),
        (linear, (x, weight.cpu(), scale, None, False), "one device"),
        (linear, (x, weight, scale.cpu(), None, False), "one device"),
        (linear, (x, weight, scale.double(), None, False), "float32"),
        (linear, (x, weight, scale, one[:40], False), "one element per row"),
        (linear, (x, weight.float(), scale, None, False), "int8"),
        (linear, (x.double(), weight, scale, None, False), "float32, float16 or bfloat16"),
        (linear, (x[0, 0], weight, scale, None, False), "scalar"),
        (norm, (x, weight, scale, None, one, None, 1, 1e-5, 0.0, False), "one element per row"),
        (norm, (x, weight, scale, None, two, None, 1, 1e-5, 0.0, True), "float16 or bfloat16"),
        (norm, (x, weight, scale, None, every_other, None, 1, 1e-5, 0.0, False), "contiguous"),
        (activated, (x, silu, True, weight, scale, None, None), "K16"),
        (activated, (x[:, :63], silu, True, weight, scale, None, None), "even last dimension"),
        (activated, (x, 99, False, weight, scale, None, None), "unknown activation"),
        (activated, (x, silu, False, weight, scale, None, x), "the residual"),
        (activated, (x, silu, False, weight, scale, None, x[:, :48].half()), "the residual"),
        (mlp, (x, x.half(), weight, scale, *plain, False, last, last_scale, None, False), "residual"),
        (mlp, (x, x[:1], weight, scale, *plain, False, last, last_scale, None, False), "residual"),
        (mlp, (x, x, weight, scale, *plain, True, last, last_scale, None, False), "K16"),
        (mlp, (x, x, weight, scale, *plain, False, *weights(32, 48, "cuda"), None, False), "the last layer's outputs"),
    ]
    with torch.no_grad():
        for call, arguments, sentence in wrong:
            with pytest.raises(ValueError, match=sentence):
                call(*arguments)
        del wrong, arguments
        held = [t.untyped_storage() for t in (x, weight, scale, one, two, last, last_scale)]
        counts = [torch._C._storage_Use_Count(s._cdata) for s in held]
        assert counts == [2] * len(held)  # the tensor, and the storage in `held`
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            linear(x, weight, scale, None, False), norm(x, weight, scale, None, two, None, 1, 1e-5, 0.0, False)
            mlp(x, x, weight, scale, *plain, False, last, last_scale, None, False)
            activated(x, silu, False, weight, scale, one, x[:, :48])
        assert torch.cuda.memory_allocated() == before


def test_a_wrong_weight_and_a_gradient_are_sentences(device: str) -> None:
    weight, scale = weights(48, 64, device)
    with pytest.raises(ValueError, match="x has K = 100"):
        _fused_linear.norm_linear(torch.randn(2, 100, device=device), weight, scale)
    with pytest.raises(ValueError, match="even last dimension"):
        _fused_linear.activation_linear(torch.randn(2, 65, device=device), weight, scale, gated=True)
    x = torch.randn(2, 64, device=device, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient"):
        _fused_linear.norm_linear(x, weight, scale)[0].sum().backward()


def test_the_operators_pass_torchs_own_checks(device: str) -> None:
    weight, scale = weights(48, 64, device)
    x = torch.randn(3, 128, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hwkern.norm_linear.default, (x[:, :64], weight, scale), test_utils=tests)
    torch.library.opcheck(
        torch.ops.hwkern.activation_linear.default, (x, weight, scale, None, "silu", True), test_utils=tests
    )


# ---- the families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_fused_and_computes_what_the_unfused_one_does(family: str, dtype: torch.dtype, device: str) -> None:
    make, expected = FAMILIES[family]
    model = make().to(device, dtype)
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    report = patched(model)
    assert fused_in(model) == expected
    assert all(f"{1 if what == CAUSAL else 2} × {what}" in report.fusion for what in expected)
    inputs = inputs_of(model, dtype)
    got = run(model, inputs)
    _fusion.unfuse(model)
    want = run(model, inputs)
    # The norm's float32 sums have another order, so some int8 values are a step away (float32), and a 16-bit norm may
    # round the other way first. Two layers, a few such steps: within a hundredth; another formula is off by about 1.
    assert (got - want).double().norm() / want.double().norm() < (0.01 if dtype == torch.float32 else 0.04)
    assert [name for name, _ in model.named_modules()] == names
    patched_keys = list(model.state_dict())
    assert [key for key in patched_keys if not key.endswith("weight_scale")] == keys


def encoder_decoder(model: Any) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": torch.randint(3, 99, (2, 5)).to(model.device)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 16, 40).to(model.device), **decoder}
    return {"input_ids": torch.randint(3, 99, (2, 7)).to(model.device), **decoder}


def t5(act: str) -> Any:
    config = transformers.T5Config(
        vocab_size=99, d_model=HIDDEN, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj=act
    )
    return transformers.T5Model(config)


def whisper() -> Any:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=HIDDEN, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=16,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, **sizes,
    )  # fmt: skip
    return transformers.WhisperModel(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: t5("relu"), {"norm -> q+k+v", "norm -> wi", "relu -> wo"}),
        (lambda: t5("gated-gelu"), {"norm -> q+k+v", "norm -> wi_0+wi_1", "gelu_tanh · up -> wo"}),
        (whisper, {"norm -> q_proj+k_proj+v_proj", "norm -> fc1"}),  # whose k has no bias, unlike q and v
    ],
    ids=["t5", "t5 gated", "whisper"],
)
def test_encoder_decoders_are_fused_in_both_halves(make: Any, expected: set[str], device: str) -> None:
    model = make().to(device)
    report = patched(model)
    assert fused_in(model) == expected
    assert all(f"4 × {what}" in report.fusion for what in expected)
    inputs = encoder_decoder(model)
    got = run(model, inputs)
    _fusion.unfuse(model)
    want = run(model, inputs)
    assert (got - want).double().norm() / want.double().norm() < 1e-2


@pytest.mark.parametrize("family", ["llama", "llama with biases", "bert", "vit"])
def test_the_merged_product_has_the_bits_of_its_parts(family: str, device: str) -> None:
    model = FAMILIES[family][0]().to(device)
    patched(model)
    merged = [part for m in model.modules() if (f := _fusion.fusion_of(m)) is not None for part in f.parts()]
    assert any(len(part.members) == 3 for part in merged)
    with torch.inference_mode():
        for part in merged:
            x = torch.randn(3, 5, part.k, device=device)
            if part.passes:
                product = part.linear(x)
                assert product.shape == (3, 5, part.n)
                for member in part.members:
                    assert torch.equal(member(product), member(x))


def test_the_fused_path_runs_and_launches_less(calls: list[str]) -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    calls.clear()
    run(model, inputs_of(model))
    assert calls == ["after_norm", *FEW]
    model = FAMILIES["bert"][0]()
    patched(model)
    calls.clear()
    run(model, inputs_of(model))
    assert calls == ["linear", "activated"] * 2


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_many_tokens_keep_residuals_and_activations_out_of_the_epilogue(
    family: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES[family][0]()
    patched(model)
    inputs = inputs_of(model)
    few = run(model, inputs)
    monkeypatch.setattr("hwkern.nn.merged.EPILOGUE_TOKENS", 13)  # of 2 × 7
    calls.clear()
    torch.testing.assert_close(run(model, inputs), few, rtol=1e-3, atol=1e-3)
    expected = {"llama": ["after_norm", "after_sum", "after_activation"], "bert": ["linear"]}[family]
    assert calls == expected * 2


def test_memory_is_not_doubled_and_state_dict_has_the_same_names_and_values() -> None:
    plain, model = llama(), llama()
    model.load_state_dict(plain.state_dict())
    patched(plain, fuse=False)
    report = patched(model)
    assert report.model_bytes_after == hwkern.report(plain).model_bytes_after
    mine, want = model.state_dict(), plain.state_dict()
    assert list(mine) == list(want)
    assert all(torch.equal(mine[key], want[key]) for key in want)
    attention = model.model.layers[0].self_attn
    storage = {
        attention.get_submodule(name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(storage) == 1
    merged = attention.q_proj._part.merged
    assert merged.weight.untyped_storage().data_ptr() in storage
    assert merged.weight.untyped_storage().nbytes() == sum(m.weight.numel() for m in merged.members)


# ---- off, and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral without a window", "qwen2", "qwen3", "gemma"])
def test_causal_attention_has_the_bits_of_transformers_and_looks_at_no_position(
    family: str, use_cache: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "mistral without a window":
        model: Any = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=None))
    else:
        model = FAMILIES[family][0]()
    patched(model.to(device, torch.bfloat16))
    inputs = {**inputs_of(model), "use_cache": use_cache}
    with monkeypatch.context() as patch:
        patch.setattr(_fusion.DecoderFusion, "only_causal", lambda *_: False)
        want = run(model, inputs)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", None)  # a call of it fails
    got = run(model, inputs)
    assert torch.equal(got, want)
    with torch.inference_mode():
        assert torch.equal(model(inputs["input_ids"], use_cache=use_cache).logits, want)


def test_a_layer_that_is_watched_or_replaced_gets_what_transformers_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    patched(model)
    inputs = {**inputs_of(model), "use_cache": False}
    want = run(model, inputs)
    seen: list[dict[str, Any]] = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda module, given, named: seen.append(named), with_kwargs=True)
    assert torch.equal(run(model, inputs), want)
    hook.remove()
    replaced = copy.deepcopy(model)
    other = replaced.model.layers[1] = type(layer).__bases__[1](replaced.config, 1).eval()
    plain = other.forward
    other.forward = lambda *given, **named: seen.append(named) or plain(*given, **named)
    run(replaced, inputs)
    assert len(seen) == 2
    assert not any(named["attention_mask"] is _fusion._NO_MASK for named in seen)
    assert not any("hwkern" in name for named in seen for name in named)


def test_one_flag_turns_it_off(calls: list[str]) -> None:
    model = llama()
    report = patched(model, fuse=False)
    assert report.fusion == ""
    assert not fused_in(model)
    run(model, inputs_of(model))
    assert calls == []
    fusion = hwkern.patch(model).fusion  # later
    assert fused_in(model)
    assert fusion == hwkern.report(model).fusion == hwkern.Report.from_json(hwkern.report(model).to_json()).fusion
    assert fusion in str(hwkern.report(model)).replace("\n", " ")
    hwkern.patch(model, fuse=False)
    assert not fused_in(model)


def test_unpatch_gives_every_module_its_class_and_bits_back() -> None:
    model = llama()
    inputs = inputs_of(model)
    before = run(model.eval(), inputs)
    classes = {name: type(module) for name, module in model.named_modules()}
    patched(model)
    hwkern.unpatch(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert not any("_fusion" in module.__dict__ or "_part" in module.__dict__ for module in model.modules())
    assert torch.equal(run(model, inputs), before)


def test_a_part_that_goes_back_to_float_leaves_the_others_fused() -> None:
    model = llama()
    patched(model)
    hwkern.unpatch(model, include="*.0.self_attn.k_proj")
    layers = model.model.layers
    assert _fusion.fusion_of(layers[0].input_layernorm) is None
    assert _fusion.fusion_of(layers[0].post_attention_layernorm) is not None
    assert _fusion.fusion_of(layers[1].input_layernorm) is not None
    run(model, inputs_of(model))


def test_an_error_while_fusing_leaves_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    classes = {name: type(module) for name, module in model.named_modules()}
    count = 0

    def interrupted(*args: Any) -> str:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(_fusion, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patched(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes


# ---- the probe -----------------------------------------------------------------------------------------------------


def test_a_norm_of_another_formula_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(norm, "forward", forward)
    model = llama()
    report = patched(model)
    assert not fused_in(model)
    assert "Not fused" in report.fusion
    assert "the norm's formula is another one" in str(report)
    run(model, inputs_of(model))


def test_an_mlp_of_another_formula_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = transformers.models.llama.modeling_llama.LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    monkeypatch.setattr(mlp, "forward", forward)
    model = llama()
    assert "LlamaMLP: it differs by" in patched(model).fusion
    assert not fused_in(model)


def test_an_attention_that_reads_the_norm_otherwise_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    original = attention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, *rest = original(self, hidden_states, *args, **kwargs)
        return (out + hidden_states[..., : out.shape[-1]], *rest)

    monkeypatch.setattr(attention, "forward", forward)
    model = llama()
    report = patched(model)
    assert "it differs by" in report.fusion
    assert not fused_in(model)
    assert report.fusion.count("model.layers.") == 2


def test_a_block_that_cannot_be_run_alone_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, *, secret, **kw: original(self, x, **kw))
    model = llama()
    assert "it could not be run on its own" in patched(model).fusion
    assert not fused_in(model)


def test_a_block_that_returns_a_tuple_keeps_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    block = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    original = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args, **kwargs: (original(self, *args, **kwargs),))
    model = llama()
    assert "it gives a Tensor, not a tuple" in patched(model).fusion
    out = model.model.layers[0](torch.randn(1, 3, HIDDEN), position_embeddings=(torch.ones(1, 3, 32),) * 2)
    assert isinstance(out, tuple)


def test_the_probe_leaves_training_modes_and_random_numbers_alone() -> None:
    model = llama().train()
    state = torch.get_rng_state()
    hwkern.patch(model, include="*_proj")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert fused_in(model)


# ---- when the parts must be on their own ---------------------------------------------------------------------------


def test_gradients_go_through_the_parts() -> None:
    model = llama(attention_bias=True)
    patched(model)
    inputs = inputs_of(model)
    model(**inputs).logits.sum().backward()
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.bias.grad is not None
    assert layer.input_layernorm.weight.grad is not None
    with torch.no_grad():
        before = run(model, inputs)
        layer.self_attn.k_proj.bias.add_(0.5)
        layer.self_attn.q_proj.bias.sub_(0.5)
        after = run(model, inputs)
        _fusion.unfuse(model)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, run(model, inputs), rtol=1e-3, atol=1e-3)


def test_hooks_see_the_layers_own_inputs_and_outputs() -> None:
    model = llama()
    patched(model)
    seen: list[tuple[int, int]] = []
    attention = model.model.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(
        lambda module, args, out: seen.append((args[0].shape[-1], out.shape[-1]))
    )
    run(model, inputs_of(model))
    assert seen == [(HIDDEN, HIDDEN // 2)]
    handle.remove()
    run(model, inputs_of(model))
    assert len(seen) == 1


@pytest.mark.parametrize("path", ["input_layernorm", "self_attn", "mlp", "post_attention_layernorm", "mlp.act_fn"])
def test_hooks_on_the_way_see_what_the_unfused_model_shows(path: str) -> None:
    model = llama()
    patched(model)
    seen: list[tuple[Any, ...]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((x, out if isinstance(out, Tensor) else out[0]))

    model.model.layers[0].get_submodule(path).register_forward_hook(hook, with_kwargs=True)
    inputs = inputs_of(model)
    run(model, inputs)
    _fusion.unfuse(model)
    run(model, inputs)
    (x, y), (want_x, want_y) = seen
    torch.testing.assert_close(x, want_x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y, want_y, rtol=1e-3, atol=1e-3)


def test_asking_for_hidden_states_gives_them_and_leaves_the_model_fused(calls: list[str]) -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    calls.clear()
    with torch.inference_mode():
        got = model(**inputs, output_hidden_states=True).hidden_states
        again = model(**inputs, output_hidden_states=True).hidden_states
    assert calls == ["after_norm", *FEW] * 2
    _fusion.unfuse(model)
    with torch.inference_mode():
        want = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 2
    for mine, second, other in zip(got, again, want, strict=True):
        assert torch.equal(mine, second)
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_a_replaced_attention_gets_the_norms_output() -> None:
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.seen = 0

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            self.seen = hidden_states.shape[-1]
            return self.base(hidden_states=hidden_states, **kwargs)

    model = llama()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    layer = model.model.layers[0]
    layer.self_attn = Wrapped(layer.self_attn)
    torch.testing.assert_close(run(model, inputs), want, rtol=1e-3, atol=1e-3)
    assert layer.self_attn.seen == HIDDEN


def test_a_replaced_layer_is_called(calls: list[str]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape[-1]
            return self.base_layer(x)

    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Wrapped(attention.q_proj)
    calls.clear()
    torch.testing.assert_close(run(model, inputs), want, rtol=1e-3, atol=1e-3)
    assert attention.q_proj.seen == HIDDEN
    assert calls == FEW


def test_a_layer_called_by_itself_takes_its_own_input() -> None:
    model = llama()
    patched(model)
    q = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, HIDDEN)
    with torch.no_grad():
        assert torch.equal(q(x), q(x.requires_grad_()).detach())
    with pytest.raises(ValueError, match="in_features = 128"):
        q(torch.randn(3, HIDDEN + 1))


def test_autocast_is_left_to_the_layers(calls: list[str]) -> None:
    model = llama()
    patched(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        run(model, inputs_of(model))
    assert calls == []


def test_layers_of_different_schemes_stay_apart() -> None:
    model = llama()
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]

    class Plan:
        recipes = {name: Recipe("w8a16" if name.endswith("k_proj") else "w8a8") for name in names}  # noqa: RUF012

    hwkern.patch(model.eval(), plan=Plan())
    assert fused_in(model) == LLAMA_FUSED - {"norm -> q_proj+k_proj+v_proj"}


@pytest.mark.parametrize("tokens", [4, 30])
def test_a_threshold_decides_for_all_together(tokens: int, device: str) -> None:
    model = llama().to(device, torch.bfloat16)
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]

    class Plan:
        recipes = {name: Recipe("w8a16/w8a8", max_tokens=16) for name in names}  # noqa: RUF012

    hwkern.patch(model.eval(), plan=Plan())
    assert fused_in(model) == LLAMA_FUSED
    x = {"input_ids": torch.randint(3, 99, (1, tokens)).to(device)}
    got = run(model, x)
    _fusion.unfuse(model)
    want = run(model, x)
    assert (got - want).double().norm() / want.double().norm() < 0.04


# ---- moving, copying, storing --------------------------------------------------------------------------------------


def is_merged(model: nn.Module) -> bool:
    parts = [part for m in model.modules() if (f := _fusion.fusion_of(m)) is not None for part in f.parts()]
    return bool(parts) and all(part.fresh() for part in parts)


def test_copies_and_pickles_are_fused_and_independent() -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_in(twin) == LLAMA_FUSED
        assert torch.equal(run(twin, inputs), want)
        assert is_merged(twin)
        with torch.no_grad():
            twin.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(run(twin, inputs), want)
        assert torch.equal(run(model, inputs), want)
        assert isinstance(twin.model.layers[0].input_layernorm, type(model.model.norm))


def test_torch_save_keeps_it(tmp_path: Path) -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(run(torch.load(buffer, weights_only=False), inputs), run(model, inputs))


def test_a_cast_and_a_move_keep_it_merged() -> None:
    model = llama(attention_bias=True)
    patched(model)
    for change in (lambda: model.bfloat16(), lambda: model.float(), lambda: model.to("cpu", torch.float64).float()):
        change()
        assert is_merged(model)
        run(model, inputs_of(model))


@pytest.mark.gpu
def test_a_move_to_the_gpu_and_back_keeps_it_merged() -> None:
    model = llama(attention_bias=True).bfloat16()
    patched(model)
    for device in ("cuda", "cpu", "cuda"):
        model.to(device)
        assert is_merged(model)
        run(model, inputs_of(model))


def test_other_weights_are_loaded_into_the_merged_memory() -> None:
    model, other = llama(), llama()
    patched(model)
    patched(other)
    inputs = inputs_of(model)
    want = run(other, inputs)
    for assign in (False, True):
        twin = copy.deepcopy(model)
        twin.load_state_dict(other.state_dict(), assign=assign)
        assert is_merged(twin)
        assert torch.equal(run(twin, inputs), want)
    float_state = llama().state_dict()
    model.load_state_dict(float_state)
    fresh = llama()
    fresh.load_state_dict(float_state)
    patched(fresh)
    assert torch.equal(run(model, inputs), run(fresh, inputs))


def usable(merged: Merged) -> bool:
    with torch.no_grad():
        return merged.usable(torch.zeros(1, merged.k))


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.down_proj"])  # one of three, and one alone
def test_a_weight_may_be_taken_away_and_given_back(name: str) -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    layer = model.model.layers[0].get_submodule(name)
    weight, merged = layer.weight, layer._part.merged
    assert usable(merged)
    layer.weight = None
    assert not usable(merged)
    with pytest.raises(RuntimeError, match=rf"in_features={merged.k}, .*its weight is None"):
        run(model, inputs)
    layer.weight = weight
    assert torch.equal(run(model, inputs), want)
    assert merged.fresh()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("way", ["assigned", "data"])
def test_a_float_weight_of_one_member_is_refused_and_leaves_the_others_as_they_are(name: str, way: str) -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    attention = model.model.layers[0].self_attn
    layer = attention.get_submodule(name)
    weight, merged = layer.weight, layer._part.merged
    other = torch.randn(layer.out_features, layer.in_features)
    if way == "assigned":
        layer.weight = nn.Parameter(other)
    else:  # behind its back
        weight, layer.weight.data = nn.Parameter(weight.detach().clone(), requires_grad=False), other
    with pytest.raises(TypeError, match=r"weight is torch\.float32: it must be int8"):
        run(model, inputs)
    assert not usable(merged)
    assert [member.weight.dtype for member in merged.members if member is not layer] == [torch.int8] * 2
    layer.weight = weight
    assert torch.equal(run(model, inputs), want)
    assert merged.fresh()


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_a_bias_of_another_length_is_refused(name: str) -> None:
    model = llama(num_hidden_layers=1, attention_bias=True)
    patched(model)
    layer = model.model.layers[0].self_attn.get_submodule(name)
    assert usable(layer._part.merged)
    layer.bias = nn.Parameter(torch.zeros(layer.out_features + 1))
    assert not usable(layer._part.merged)
    with pytest.raises(ValueError, match="bias has shape"):
        run(model, inputs_of(model))


def test_weights_swapped_behind_its_back_are_seen() -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    q = model.model.layers[0].self_attn.q_proj
    q.weight.data = torch.zeros_like(q.weight)
    assert not torch.equal(run(model, inputs), want)
    assert is_merged(model)


def test_save_and_load_fuse_again(tmp_path: Path) -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    hwkern.save(model, tmp_path)
    loaded = hwkern.load(tmp_path, llama().eval())
    assert fused_in(loaded) == LLAMA_FUSED
    assert torch.equal(run(loaded, inputs), want)
    hwkern.load(tmp_path, loaded)  # into a fused model
    assert is_merged(loaded)
    assert torch.equal(run(loaded, inputs), want)


def test_a_model_patched_on_meta_is_fused_by_the_next_patch() -> None:
    model = llama()
    state = model.state_dict()
    with torch.device("meta"):
        empty = llama()
    patched(empty)
    assert not fused_in(empty)
    empty.load_state_dict(state, assign=True)
    empty.model.rotary_emb = model.model.rotary_emb
    hwkern.patch(empty)
    assert fused_in(empty) == LLAMA_FUSED
    inputs = inputs_of(model)
    patched(model)
    assert torch.equal(run(empty, inputs), run(model, inputs))


def test_threads_share_a_model() -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    twin = copy.deepcopy(model)  # not merged yet: the first calls race for it
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(run(twin, inputs))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, want) for result in results)


# ---- torch.compile, export, graphs ---------------------------------------------------------------------------------


@pytest.fixture
def no_dynamo_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_dynamo_cache")
@pytest.mark.parametrize("family", ["llama", "llama with biases", "gpt2", "bert", "vit", "qwen2"])
def test_compiles_as_one_graph_with_the_fused_operators(family: str) -> None:
    model = FAMILIES[family][0]()
    patched(model)
    inputs = inputs_of(model)
    names: set[str] = set()

    def backend(graph: Any, example: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    want = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.equal(run(compiled, inputs), want)
    if "norm" in "".join(FAMILIES[family][1]):
        assert "hwkern.norm_linear_no_grad.default" in names
        assert {"hwkern.activation_linear_no_grad.default", "hwkern.norm_mlp_no_grad.default"} & names


MASKS = {
    "nothing given": ({}, {}, True),
    "a window": ({"sliding_window": 4}, {}, False),
    "eager attention": ({"attn_implementation": "eager"}, {}, None),
    "padding": ({}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}, False),
    "packed sequences": ({}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)}, False),
}


@pytest.mark.usefixtures("no_dynamo_cache")
@pytest.mark.parametrize("case", MASKS)
def test_compiled_attention_has_a_mask_only_where_more_than_order_masks(case: str) -> None:
    changes, given, without = MASKS[case]
    config = transformers.MistralConfig(**{**LLAMA, "sliding_window": None, **changes})
    model = transformers.MistralForCausalLM(config)
    patched(model)
    assert CAUSAL in fused_in(model)
    inputs = {**inputs_of(model), **given, "use_cache": False}
    want = run(model, inputs)
    masks: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                masks.append((node.kwargs.get("attn_mask"), node.kwargs["is_causal"]))
        return graph.forward

    got = run(torch.compile(model, fullgraph=True, backend=backend), inputs)
    # The same float32 sums in another order, and rows that are quantized again: a value on the edge between two int8
    # moves by one step, 1/127 of the largest of its row.
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.abs().max()) / 127)
    if without is None:
        assert not masks  # a decoder that writes attention out needs its mask, and has one
    else:
        assert len(masks) == config.num_hidden_layers
        assert all((mask is None and causal) == without for mask, causal in masks)


@pytest.mark.usefixtures("no_dynamo_cache")
def test_merged_weights_have_fixed_addresses_so_that_graphs_need_not_copy_them() -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    fixed: list[bool] = []

    def backend(graph: Any, example: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "placeholder" and node.meta["example_value"].dtype in (torch.int8, torch.float32):
                fixed.append("_dynamo_static_input_type" in node.meta["tensor_dict"])
        return graph.forward

    run(torch.compile(model, fullgraph=True, backend=backend), inputs_of(model))
    assert len(fixed) > 10
    assert all(fixed)


@pytest.mark.usefixtures("no_dynamo_cache")
def test_a_compiled_fused_model_sees_a_replaced_weight() -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    inputs = inputs_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = run(compiled, inputs)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.roll(1, 0), requires_grad=False)
    layer.weight_scale = layer.weight_scale * 3
    got = run(compiled, inputs)
    _fusion.unfuse(model)
    assert not torch.equal(got, before)
    torch.testing.assert_close(got, run(model, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_dynamo_cache")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w8a16/w8a8"])
def test_guards_on_layers_look_into_nothing_but_modules(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """From Python 3.12 on guards pass over what holds only modules, dicts, tensors and constants, all of it at once."""
    wrapper = getattr(pytest.importorskip("torch._dynamo.guards"), "GuardManagerWrapper", None)
    if not hasattr(wrapper, "find_tag_safe_roots"):
        pytest.skip("this torch looks at every attribute in any case")
    roots: list[Any] = []
    finalize = wrapper.finalize
    monkeypatch.setattr(wrapper, "finalize", lambda self: (roots.append(self.root), finalize(self)))
    model = llama().bfloat16()
    patched_as(model, {"": scheme})
    run(torch.compile(model, fullgraph=True, backend="eager"), inputs_of(model))

    def look(manager: Any) -> Iterator[tuple[str, type]]:
        if hasattr(manager, "get_key_value_managers"):  # of a dict; plain managers beside it
            below = [m for pair in manager.get_key_value_managers().values() for m in pair if m is not None]
        else:
            below = manager.get_child_managers()
        for one in below:
            yield one.get_source(), one.get_type_of_guarded_value()
            yield from look(one)

    inside = {source: kind for root in roots for source, kind in look(root) if "['layers']" in source}
    assert any("_fusion" in source for source in inside)
    assert any("_part" in source for source in inside)
    plain = (nn.Module, Tensor, dict, str, int, float, type, type(None))
    # What transformers' own checkpointing wrapper reads of the block's class belongs to float models too.
    odd = {s: kind for s, kind in inside.items() if not issubclass(kind, plain) and "type(" not in s}
    assert odd == {}


@pytest.mark.usefixtures("no_dynamo_cache")
def test_aot_compilation_of_a_fused_model() -> None:
    model = llama()
    patched(model)
    inputs = inputs_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_dynamo_cache")
def test_compiling_is_not_taken_for_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo answers torch.compiler.is_exporting() with True in every compilation, from torch 2.7 to 2.12."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling())
    model = llama(num_hidden_layers=1)
    patched(model)
    names: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "hwkern" in str(node.target))
        return graph.forward

    run(torch.compile(model, fullgraph=True, backend=backend), inputs_of(model))
    few = [f"hwkern.{name}_no_grad.default" for name in ("norm_linear", "linear", "norm_mlp")]
    assert names == few
    names.clear()
    many = {"input_ids": torch.randint(3, 99, (1, EPILOGUE_TOKENS + 1))}
    run(torch.compile(model, fullgraph=True, backend=backend, dynamic=False), many)
    assert names == [*few[:2], "hwkern.norm_linear.default", "hwkern.activation_linear_no_grad.default"]


SCHEMES = [
    {"": "w8a8"},
    {"": "w8a16"},
    {"down_proj": "w8a16", "": "w8a8"},
    {"down_proj": "w8a8", "": "w8a16"},
    {"o_proj": "w8a8", "": "w8a16/w8a8"},
]


@pytest.mark.usefixtures("no_dynamo_cache")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("schemes", SCHEMES, ids=str)
def test_every_scheme_is_three_operators_of_inference_a_block(schemes: dict[str, str], folded: bool) -> None:
    """A compiled decoding step spends its time on the host: what a plan may choose must not cost it more calls."""
    model = llama(num_hidden_layers=1).bfloat16()
    patched_as(model, schemes, folded)
    names: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "hwkern" in str(node.target))
        return graph.forward

    inputs = {"input_ids": torch.randint(3, 99, (1, 1))}
    with torch.no_grad():
        want = model(**inputs)[0]
        got = torch.compile(model, fullgraph=True, backend=backend)(**inputs)[0]
    assert names == [f"hwkern.{name}_no_grad.default" for name in ("norm_linear", "linear", "norm_mlp")]
    # In eager calls on the CPU W8A16 layers are apart, and round what lies between them: a few units of bfloat16.
    assert float((got - want).norm() / want.norm()) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("no_dynamo_cache")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # transformers' own
@pytest.mark.parametrize("strict", [False, True])
def test_export_holds_the_registered_weights(strict: bool) -> None:
    model = llama(num_hidden_layers=1)
    patched(model)
    x = torch.randint(3, 99, (1, 5))

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        program = torch.export.export(Logits(), (x,), strict=strict)
        assert not any("norm_linear" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), model(x).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate_with_a_static_cache(family: str, device: str) -> None:
    model = FAMILIES[family][0]().to(device)
    patched(model)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    x = torch.randint(3, 99, (2, 5)).to(device)
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 5, "do_sample": False}
    found = model.generate(x, **options)
    static = model.generate(x, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, static)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_cuda_graph_replays_a_fused_model(family: str) -> None:
    model = FAMILIES[family][0]().cuda().bfloat16()
    patched(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(**inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(**inputs)[0]
        inputs["input_ids"].copy_(torch.randint(3, 99, (2, 7)))
        graph.replay()
        torch.cuda.synchronize()
    # transformers looks at the mask unless a stream captures, and then drops a mask of ones: that is another attention
    # kernel, with other last bits. Told that one does, it takes the captured one's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        want = run(model, inputs)
    assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_direct_launches_have_the_operators_bits(family: str) -> None:
    model = FAMILIES[family][0]().cuda().bfloat16()
    patched(model)
    inputs = inputs_of(model)
    want = run(model, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused_linear, "is_direct", lambda x, cell: False)
        assert torch.equal(run(model, inputs), want)


def test_int8_layers_without_a_known_block_are_left_alone() -> None:
    model = nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
    report = hwkern.patch(model, include="*")
    assert report.fusion == ""
    assert isinstance(model[1], Int8Linear)
    assert not fused_in(model)
