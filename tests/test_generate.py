"""Patched transformers models under torch.compile and in generate(): one graph, static caches, changing batch sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import hwkern
from hwkern._recipes import Recipe
from hwkern.nn import Int8Linear

transformers = pytest.importorskip("transformers")
SCHEMES = {
    "w8a8": Recipe("w8a8"),
    "w8a16": Recipe("w8a16"),
    "w8a16/w8a8": Recipe("w8a16/w8a8", max_tokens=12),
}


class Plan:
    """One recipe for every projection."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        self.recipes = {name: recipe for name in layers if name.endswith("_proj")}


def llama(scheme: str) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=99, max_position_embeddings=64)
    config.pad_token_id = config.eos_token_id = None
    model = transformers.LlamaForCausalLM(config).eval()
    hwkern.patch(model, plan=Plan(model, SCHEMES[scheme]))
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 7
    return model


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 99, (batch, tokens))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_patched_model_is_one_graph(scheme: str) -> None:
    model, x = llama(scheme), ids(2, 5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x, use_cache=False).logits, model(x, use_cache=False).logits)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16/w8a8"])
def test_changing_batch_sizes_compile_no_more_often_than_torchs_own_layers(scheme: str) -> None:
    def compilations(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for batch in (2, 3, 5, 2):
                compiled(ids(batch, 4), use_cache=False)
        return int(counter.frame_count)

    model = llama(scheme)
    mine = compilations(model)
    hwkern.unpatch(model)
    # Once for the first size, once for any size; a threshold within the sizes adds one for its other side.
    assert mine <= compilations(model) + (scheme == "w8a16/w8a8")


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_generate_gives_the_same_tokens_with_every_cache(scheme: str) -> None:
    model = llama(scheme)
    for batch, tokens in ((1, 6), (3, 4)):
        x = ids(batch, tokens)
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "do_sample": False}
        found = model.generate(x, **options)
        assert found.shape == (batch, tokens + 6)
        assert torch.equal(found, model.generate(x, **options, use_cache=False))
        assert torch.equal(found, model.generate(x, **options, cache_implementation="static", disable_compile=True))


def test_generate_with_a_static_cache_and_a_compiled_forward() -> None:
    model = llama("w8a8")
    x = ids(2, 4)
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(x, **options)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(x, **options, cache_implementation="static"), expected)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_decoding_with_a_growing_cache_compiles_no_more_often_than_torchs_own_layers(scheme: str) -> None:
    """The number of tokens falls from a prompt's to one, and the batch changes: M is 6, 3, 3 …, then 2 × the same."""

    def compilations(model: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        forward = model.forward
        model.forward = torch.compile(forward, backend=counter)
        try:
            for batch in (3, 5):
                x = ids(batch, 6)
                model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
        finally:
            model.forward = forward
        return int(counter.frame_count)

    model = llama(scheme)
    mine = compilations(model)
    hwkern.unpatch(model)
    theirs = compilations(model)
    assert theirs > 0
    assert mine <= theirs + (scheme == "w8a16/w8a8")


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_cuda_graph_of_a_patched_model_follows_its_inputs(scheme: str) -> None:
    model = llama(scheme).bfloat16().cuda()
    x = ids(3, 5).cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x, use_cache=False).logits
        for _ in range(3):
            x.copy_(ids(3, 5))
            graph.replay()
            assert torch.equal(y, model(x, use_cache=False).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_generate_on_the_gpu_with_a_static_cache_gives_eagers_tokens(scheme: str) -> None:
    """In float32: equal logits to rounding, so that no token hangs on the last bit of a bfloat16."""
    model = llama(scheme).cuda()
    for batch, tokens in ((1, 6), (3, 4)):
        x = ids(batch, tokens).cuda()
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 6, "do_sample": False}
        found = model.generate(x, **options, cache_implementation="static", disable_compile=True)
        assert torch.equal(found, model.generate(x, **options))


@pytest.mark.gpu
def test_a_decoding_step_with_a_static_cache_in_a_cuda_graph() -> None:
    """One graph of one step, replayed over positions that the step reads from memory, gives eager's logits."""
    model = llama("w8a16").bfloat16().cuda()

    def run(replayed: bool) -> list[torch.Tensor]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        token, position = ids(2, 1).cuda(), torch.zeros(1, 1, dtype=torch.int64, device="cuda")

        def step() -> torch.Tensor:
            return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        tokens = torch.randint(0, 99, (6, 2, 1), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            step()  # makes the cache's tensors
            graph = None
            if replayed:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = step()
            cache.reset()
            found = []
            for i, one in enumerate(tokens):
                token.copy_(one)
                position.fill_(i)
                if graph is None:
                    y = step()
                else:
                    graph.replay()
                found.append(y.clone())
        return found

    for mine, eager in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, eager)
