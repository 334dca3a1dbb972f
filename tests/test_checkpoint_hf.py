"""transformers' own save and load, compressed-tensors files, and LoRA, all on a patched Llama of two small layers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hwkern
from hwkern.nn import CalibratedInt8Linear, Calibration, Int8Linear, WeightOnlyInt8Linear

transformers = pytest.importorskip("transformers")
safe = pytest.importorskip("safetensors.torch")

IDS = torch.arange(12).reshape(2, 6)
WHICH = "*_proj"


def config(**changes: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": True, **changes}
    )


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def read(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def model(floats: Path) -> Any:
    found = read(floats)
    hwkern.patch(found, include=WHICH)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(a: Any, b: Any) -> bool:
    kinds = [type(module) for module in a.modules()] == [type(module) for module in b.modules()]
    return kinds and torch.equal(logits(a), logits(b))


# ---- from_pretrained, save_pretrained -------------------------------------------------------------------------------


def test_save_pretrained_and_from_pretrained_of_a_patched_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    described = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "hwkern"
    assert len(described["layers"]) == 14
    twin = read(tmp_path / "a")
    assert same(twin, model)
    twin.save_pretrained(tmp_path / "b", max_shard_size="100kB")
    assert same(read(tmp_path / "b"), model)


def test_every_scheme_goes_through_from_pretrained(floats: Path, tmp_path: Path) -> None:
    model = read(floats)
    mlp, smooth = model.model.layers[0].mlp, tuple(0.5 + i % 3 for i in range(128))
    calibration = Calibration(scale=0.02, zero_point=7, smooth=smooth, outliers=(3,))
    mlp.up_proj = CalibratedInt8Linear.from_calibration(mlp.up_proj, calibration)
    mlp.gate_proj = WeightOnlyInt8Linear.from_float(mlp.gate_proj, max_tokens=5)
    hwkern.patch(model, include="*down_proj")
    model.save_pretrained(tmp_path / "a")
    assert same(read(tmp_path / "a"), model)


def test_a_config_that_two_models_share_describes_the_one_that_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    common = config()
    model, other = (transformers.LlamaForCausalLM(common).eval() for _ in range(2))
    for each in (model, other):
        hwkern.patch(each, include=WHICH)
    hwkern.unpatch(other)
    model.save_pretrained(tmp_path)
    assert same(read(tmp_path), model)


def test_unpatch_lets_transformers_save_a_float_model_again(model: Any, tmp_path: Path) -> None:
    hwkern.unpatch(model)
    model.save_pretrained(tmp_path / "a")
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    assert same(read(tmp_path / "a"), model)


def test_a_float_checkpoint_is_quantized_while_it_is_loaded(floats: Path, model: Any) -> None:
    assert same(read(floats, quantization_config=hwkern.HwkernConfig(include=WHICH)), model)


def test_files_are_read_in_float_to_be_quantized() -> None:
    """Some versions of transformers cast what they read to the dtype of the weight that is there."""
    from hwkern.hf import HwkernQuantizer

    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config()).to(torch.bfloat16)
    quantizer = HwkernQuantizer(hwkern.HwkernConfig(include=WHICH), pre_quantized=False)
    quantizer._process_model_before_weight_loading(empty)
    weights = [layer.weight for layer in empty.modules() if isinstance(layer, Int8Linear)]
    assert weights
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_what_the_files_lack_of_an_int8_layer_is_refused(model: Any, tmp_path: Path) -> None:
    """transformers only reports it, and would leave the layer with whatever its memory held."""
    name = "model.layers.0.self_attn.q_proj"
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: value for key, value in safe.load_file(file).items() if key != f"{name}.weight_scale"}
    safe.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(hwkern.CheckpointError, match=f"lack weight_scale of the int8 layer '{name}': .* a float one's"):
        read(tmp_path)


def test_a_layer_that_a_float_checkpoint_lacks_can_be_excluded(floats: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    file = floats / "model.safetensors"
    safe.save_file({k: v for k, v in safe.load_file(file).items() if name not in k}, file, {"format": "pt"})
    with pytest.raises(hwkern.CheckpointError, match=f"'{name}': exclude it"):
        read(floats, quantization_config=hwkern.HwkernConfig(include=WHICH))
    found = read(floats, quantization_config=hwkern.HwkernConfig(include=WHICH, exclude=name))
    assert type(found.get_submodule(name)) is nn.Linear
    assert isinstance(found.model.layers[1].mlp.up_proj, Int8Linear)


def test_device_map(model: Any, floats: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path / "a")
    assert same(read(tmp_path / "a", device_map={"": "cpu"}), model)
    assert same(read(floats, device_map="cpu", quantization_config=hwkern.HwkernConfig(include=WHICH)), model)
    with pytest.raises(ValueError, match="cannot offload int8 layers to the disk"):
        read(tmp_path / "a", device_map={"": "disk"})


def test_hwkern_save_writes_a_folder_that_from_pretrained_reads_too(model: Any, tmp_path: Path) -> None:
    hwkern.save(model, tmp_path / "a", max_shard_bytes=60_000)
    assert same(hwkern.load(tmp_path / "a"), model)
    assert same(read(tmp_path / "a"), model)


def test_importing_hwkern_first_is_enough(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    code = f"""
import sys, hwkern
assert "transformers" not in sys.modules and "torch" not in sys.modules
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "a")!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "Int8Linear"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_newer_description_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"]["format_version"] = 7
    file.write_text(json.dumps(data))
    with pytest.raises(hwkern.CheckpointError, match="format version 7"):
        read(tmp_path / "a")


def test_dequantize_gives_float_layers(model: Any) -> None:
    before = logits(model)
    model.dequantize()
    assert not [module for module in model.modules() if isinstance(module, Int8Linear)]
    # Activations are no longer rounded: close, but not the same.
    assert torch.cosine_similarity(logits(model).float(), before.float(), dim=-1).min() > 0.99


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def test_compressed_tensors_layout_is_the_one_others_read(model: Any, tmp_path: Path) -> None:
    hwkern.save(model, tmp_path, format="compressed-tensors")
    tensors = safe.load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.weight"].shape == (128, 200)  # not padded
    assert tensors[f"{name}.weight"].dtype == torch.int8
    assert tensors[f"{name}.weight_scale"].shape == (128, 1)
    assert "lm_head.weight" not in tensors
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "int-quantized",
        ["lm_head"],
    )
    (group,) = found["config_groups"].values()
    assert len(group["targets"]) == 14
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert group["input_activations"]["dynamic"] is True


def test_compressed_tensors_comes_back_with_the_same_bits(model: Any, tmp_path: Path) -> None:
    layers = model.model.layers
    hwkern.unpatch(model, include=["*.0.mlp.*"])
    mlp = layers[0].mlp
    mlp.up_proj = CalibratedInt8Linear.from_calibration(mlp.up_proj, Calibration(scale=0.03))
    mlp.down_proj = CalibratedInt8Linear.from_calibration(mlp.down_proj, Calibration(scale=0.01, zero_point=-100))
    hwkern.save(model, tmp_path, format="compressed-tensors", max_shard_bytes=100_000)
    twin = hwkern.load(tmp_path)
    assert type(twin.model.layers[0].mlp.gate_proj) is nn.Linear
    assert same(twin, model)
    assert same(hwkern.load(tmp_path, read_empty()), model)


def read_empty() -> Any:
    # Not .to(bfloat16), which would round the rotary frequencies.
    return transformers.LlamaForCausalLM._from_config(config(), dtype=torch.bfloat16).eval()


def ours(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_per_tensor_scale_a_class_target_and_bfloat16_scales_are_read(model: Any, tmp_path: Path) -> None:
    """As llm-compressor writes them: targets by class, scales in the model's dtype."""
    hwkern.save(model, tmp_path, format="compressed-tensors")
    file = tmp_path / "model.safetensors"
    tensors = safe.load_file(file)
    data = ours(tmp_path)
    (group,) = data["quantization_config"]["config_groups"].values()
    group["targets"] = ["Linear"]
    del group["format"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    for name in list(tensors):
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].bfloat16()
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.tensor([0.001])
    safe.save_file(tensors, file)
    twin = hwkern.load(tmp_path)
    layer = twin.model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight_scale, torch.full((200,), 0.001))
    other = twin.model.layers[0].mlp.down_proj
    assert torch.equal(other.weight_scale, model.model.layers[0].mlp.down_proj.weight_scale.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=4), "num_bits = 4"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="group"), "strategy = 'group'"),
        (lambda q: q["config_groups"]["group_0"].update(format="pack-quantized"), "format 'pack-quantized'"),
        (lambda q: q["config_groups"]["group_0"].update(targets=["re:nothing"]), "no group of quantization_config"),
        (lambda q: q["config_groups"]["group_0"]["input_activations"].update(dynamic=False), "strategy 'tensor'"),
        (lambda q: q["config_groups"]["group_0"]["input_activations"].update(num_bits=16), "inputs are 16 bits"),
        (lambda q: q.update(config_groups=[]), "no group|config_groups"),
        (lambda q: q.update(quant_method="awq"), "quantized with 'awq'"),
        (lambda q: q.update(quant_method="hwkern"), "from_pretrained loads it"),
    ],
)
def test_compressed_tensors_that_hwkern_cannot_run_are_refused(
    model: Any, tmp_path: Path, change: Any, message: str
) -> None:
    hwkern.save(model, tmp_path, format="compressed-tensors")
    data = ours(tmp_path)
    change(data["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(data))
    fresh = read_empty()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(hwkern.CheckpointError, match=message):
        hwkern.load(tmp_path, fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_a_missing_scale_and_a_cut_file_are_refused(model: Any, tmp_path: Path) -> None:
    hwkern.save(model, tmp_path, format="compressed-tensors")
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-4])
    with pytest.raises(hwkern.CheckpointError, match="cut short"):
        hwkern.load(tmp_path)
    file.write_bytes(raw)
    tensors = safe.load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    safe.save_file(tensors, file)
    with pytest.raises(hwkern.CheckpointError, match=r"up_proj' has a weight .* weight_scale of None"):
        hwkern.load(tmp_path)


def test_layers_that_the_format_cannot_hold_are_named(model: Any, tmp_path: Path) -> None:
    mlp = model.model.layers[0].mlp
    for made, why in (
        (WeightOnlyInt8Linear.from_float(nn.Linear(200, 128)), "W8A16"),
        (CalibratedInt8Linear.from_calibration(nn.Linear(200, 128), Calibration(outliers=(1,))), "outlier"),
    ):
        mlp.down_proj = made
        with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.down_proj' cannot be written .*{why}"):
            hwkern.save(model, tmp_path, format="compressed-tensors")
    with pytest.raises(ValueError, match="needs a transformers model"):
        hwkern.save(nn.Sequential(mlp.down_proj), tmp_path, format="compressed-tensors")
    with pytest.raises(ValueError, match="no int8 layer"):
        hwkern.save(read_empty(), tmp_path, format="compressed-tensors")


def test_the_librarys_own_reader_agrees(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    hwkern.save(model, tmp_path, format="compressed-tensors")
    twin = read(tmp_path)
    logits(twin)  # decompresses
    name = "model.layers.0.self_attn.q_proj"
    weight = twin.get_submodule(name).weight
    exact = model.get_submodule(name).to_float(torch.float32).weight
    # The library multiplies in bfloat16: half a unit of the scale and half of the product, 2**-8 in all.
    assert torch.allclose(weight.float(), exact, rtol=2**-7, atol=0)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora_trains_and_merges_with_its_error_reported(model: Any) -> None:
    peft = pytest.importorskip("peft")
    from hwkern import lora

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(
            model, lora.prepare(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
        )
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
        frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
        losses = []
        for _ in range(30):
            loss = adapted(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.6 * losses[0]
        assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)
        adapted.eval()
        before = logits(adapted)
        adapted.merge_adapter()
        merged = logits(adapted)
        errors = lora.merge_errors(adapted)
        assert len(errors) == 4
        for error in errors.values():
            assert 0 < error.weight < 0.02  # a 1/254 of each row's maximum, uniformly
            assert error.adapter < 1
        assert torch.cosine_similarity(merged.float(), before.float(), dim=-1).min() > 0.99
        adapted.unmerge_adapter()
        assert torch.equal(logits(adapted), before)
        plain = adapted.merge_and_unload()
        assert torch.equal(logits(plain), merged)
        assert not [n for n, _ in plain.named_modules() if "lora" in n]
        with pytest.raises(ValueError, match="LoRA adapter was merged"):
            hwkern.unpatch(plain)


def test_adapters_merged_one_after_the_other_are_all_taken_out(model: Any) -> None:
    """And each layer merges the adapters that it has: "two" knows no down_proj."""
    peft = pytest.importorskip("peft")
    from hwkern import lora

    def adapter(*targets: str) -> Any:
        return lora.prepare(peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = logits(model)
        adapted = peft.get_peft_model(model, adapter("q_proj", "down_proj"), adapter_name="one")
        adapted.add_adapter("two", adapter("q_proj"))
        adapted.merge_adapter(["one"])
        adapted.merge_adapter(["two"])
        layer = "base_model.model.model.layers.0"
        assert adapted.get_submodule(f"{layer}.self_attn.q_proj").merged_adapters == ["one", "two"]
        assert adapted.get_submodule(f"{layer}.mlp.down_proj").merged_adapters == ["one"]
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted), plain)
