"""Patched transformers models: five families with random weights run, generate, save, load, compile and go back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hwkern
from hwkern.nn import Int8Conv1D, Int8Linear

transformers = pytest.importorskip("transformers", minversion="4.41")

HIDDEN = 384  # the smallest square layer that is worth swapping
VOCAB = 500


@pytest.fixture(autouse=True)
def any_cpu() -> Iterator[None]:
    """CPUs without an int8 dot product compute the same integers; let them take the same layers in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwkern._layers.cpu_int8_is_fast", lambda: True)
        yield


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length))


def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=6, intermediate_size=2 * HIDDEN
    )
    return transformers.BertForMaskedLM(config), {"input_ids": tokens()}


def gpt2() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=6, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens()}


def llama() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=2 * HIDDEN,
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens()}


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=64, d_ff=2 * HIDDEN, num_layers=2, num_heads=6, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": tokens(),
        "decoder_input_ids": tokens(length=5),
    }


def vit() -> tuple[Any, dict[str, torch.Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=2 * HIDDEN,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs).logits


# family -> (model, swapped layers, the layers left by default and their reason)
FAMILIES = {
    "bert": (bert, 13, {"cls.predictions.decoder": "output head"}),
    "gpt2": (gpt2, 8, {"lm_head": "output head"}),
    "llama": (llama, 14, {"lm_head": "output head"}),
    "t5": (t5, 32, {"lm_head": "output head"}),
    "vit": (vit, 12, {"classifier": "too small to gain"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_family_is_patched_runs_close_to_the_original_and_comes_back(
    family: str, dtype: torch.dtype, device: str
) -> None:
    make, swapped, left = FAMILIES[family]
    model, inputs = make()
    model.to(device, dtype)
    inputs = {
        key: value.to(device, dtype if value.is_floating_point() else value.dtype) for key, value in inputs.items()
    }
    before = logits(model, inputs)
    modules = dict(model.named_modules())
    report = hwkern.patch(model)
    assert len(report.swapped) == swapped
    assert {layer.name: layer.reason.split(":")[0] for layer in report.left} == left
    after = logits(model, inputs)
    assert after.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(after.float().flatten(0, -2), before.float().flatten(0, -2), dim=-1)
    assert cosine.min() > 0.99
    assert not torch.equal(after, before)  # the int8 layers were really called
    hwkern.unpatch(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("make", [gpt2, t5])
def test_the_tied_head_stays_tied(make: Callable[[], Any]) -> None:
    model, _ = make()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    hwkern.patch(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_gpt2s_conv1d_becomes_int8_and_keeps_its_names() -> None:
    model, _ = gpt2()
    hwkern.patch(model)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, Int8Conv1D)
    assert (layer.nf, layer.nx) == (3 * HIDDEN, HIDDEN)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generate_works_and_is_the_same_twice(make: Callable[[], Any]) -> None:
    model, inputs = make()
    hwkern.patch(model.eval())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(inputs["input_ids"])
    first = model.generate(**inputs, attention_mask=mask, **options)
    assert first.shape == (2, 18)
    assert torch.equal(first, model.generate(**inputs, attention_mask=mask, **options))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_state_dict_loads_into_another_patched_model_and_into_a_meta_model(make: Callable[[], Any]) -> None:
    model, inputs = make()
    other, _ = make()
    with torch.device("meta"):
        empty, _ = make()
    float_state = copy.deepcopy(model.state_dict())
    for m in (model, other, empty):
        hwkern.patch(m)
    want = logits(model, inputs)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, inputs), want)
    other.load_state_dict(float_state, strict=True)
    assert torch.equal(logits(other, inputs), want)
    buffers = {name for name, buffer in empty.named_buffers() if buffer.is_meta and name not in model.state_dict()}
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name in buffers:  # what the model computes itself is in no state_dict
        parent, _, attribute = name.rpartition(".")
        setattr(empty.get_submodule(parent), attribute, model.get_buffer(name))
    empty.tie_weights()
    hwkern.patch(empty)  # fuses, which takes values to check it with
    assert torch.equal(logits(empty, inputs), want)


@pytest.mark.parametrize("make", [bert, llama])
def test_compiles_without_graph_breaks_and_gives_the_eager_result(make: Callable[[], Any]) -> None:
    model, inputs = make()
    hwkern.patch(model.eval())
    want = logits(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        got = compiled(**inputs).logits
    # The int8 layers give the same bits; torch may reorder the float operations between them.
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_inductor_compiles_a_patched_layer_stack() -> None:
    model, _ = bert()
    hwkern.patch(model.eval())
    block = model.bert.encoder.layer[0].intermediate
    assert isinstance(block.dense, Int8Linear)
    x = torch.randn(2, 7, HIDDEN)
    torch._dynamo.reset()
    with torch.inference_mode():
        got = torch.compile(block, fullgraph=True)(x)
        torch.testing.assert_close(got, block(x), rtol=1e-5, atol=1e-5)  # inductor's erf differs in the last bits
