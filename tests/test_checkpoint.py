"""save and load: the same bits back, straight to the device, strict about every name and byte, all or nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schemes import CALIBRATIONS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hwkern
from hwkern import _shards
from hwkern.nn import CalibratedInt8Linear, Int8Linear, WeightOnlyInt8Linear

K, N = 40, 24


class Net(nn.Module):
    """Tied and shared layers, persistent and other buffers, a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(N, K)
        self.a, self.b, self.c, self.d = (nn.Linear(K, K, bias=i % 2 == 0) for i in range(4))
        self.b.weight = self.a.weight
        self.shared = nn.ModuleList([self.c, self.c])
        self.norm = nn.BatchNorm1d(K)
        self.head = nn.Linear(K, N, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(K).float().cos(), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.table
        for layer in (self.a, self.b, *self.shared, self.d):
            x = self.norm(layer(x)).tanh()
        return self.head(x)


def patched() -> Net:
    """One layer of each scheme next to float ones."""
    model = Net().eval()
    nn.init.normal_(model.norm.running_mean)
    hwkern.patch(model, include=["a", "b", "c"])
    model.d = CalibratedInt8Linear.from_calibration(model.d, CALIBRATIONS["everything"])
    model.extra = nn.Sequential(WeightOnlyInt8Linear.from_float(nn.Linear(K, N), max_tokens=7))
    return model


def empty() -> Net:
    with torch.device("meta"):
        model = Net()
        model.extra = nn.Sequential(nn.Linear(K, N))
    return model.eval()


IDS = torch.arange(N)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hwkern.save(patched(), tmp_path)
    return tmp_path


def state(model: nn.Module) -> dict[str, Any]:
    """Bits and identities of everything in the model."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        **{name: (id(t), t.device, t.dtype, None if t.is_meta else t.clone()) for name, t in tensors.items()},
        **{f"module {name}": id(module) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state(model)
    assert list(now) == list(before)
    for name, was in before.items():
        if isinstance(was, int):
            assert now[name] == was, name
        else:
            assert now[name][:3] == was[:3], name
            assert was[3] is None or torch.equal(now[name][3], was[3]), name


# ---- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [10**9, 3000, 1])
@pytest.mark.parametrize("target", ["meta", "cpu"])
def test_a_loaded_model_has_the_same_bits_ties_and_schemes(tmp_path: Path, most: int, target: str) -> None:
    model = patched()
    files = hwkern.save(model, tmp_path, max_shard_bytes=most)
    assert (len(files) == 1) == (most == 10**9)
    fresh = empty()
    if target == "cpu":
        fresh = fresh.to_empty(device="cpu")
    twin = hwkern.load(tmp_path, fresh)
    assert twin is fresh
    assert torch.equal(twin(IDS), model(IDS))
    x = torch.randn(9, K)
    assert torch.equal(twin.extra(x), model.extra(x))
    assert twin.a.weight is twin.b.weight
    assert twin.shared[0] is twin.shared[1] is twin.c
    assert twin.head.weight is twin.embed.weight
    for name, module in model.named_modules():
        assert type(twin.get_submodule(name)) is type(module)
    mine, theirs = dict(model.named_buffers()), dict(twin.named_buffers())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_bfloat16_model_comes_back_as_bfloat16(tmp_path: Path) -> None:
    model = patched().bfloat16()
    hwkern.save(model, tmp_path)
    twin = hwkern.load(tmp_path, empty())
    assert twin.a.bias.dtype == twin.head.weight.dtype == torch.bfloat16
    assert twin.a.float_dtype == torch.bfloat16
    assert twin.a.weight_scale.dtype == torch.float32
    assert torch.equal(twin(IDS), model(IDS))


def test_other_programs_can_read_the_file(saved: Path) -> None:
    safe = pytest.importorskip("safetensors.torch")
    found = safe.load_file(saved / "model.safetensors")
    model = hwkern.load(saved, empty())
    assert torch.equal(found["d.weight"], model.d.weight)
    assert found["a.weight"].dtype == torch.int8


class Watch(TorchDispatchMode):
    """Notes every float tensor as large as the layer's weight that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.seen.append(tensor.numel())
        return out


def test_loading_makes_no_float_weight(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    hwkern.patch(model, include="*")
    hwkern.save(model, tmp_path)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(256, 256))
    with Watch() as watch:
        hwkern.load(tmp_path, fresh)
    assert watch.seen
    assert max(watch.seen) <= 256


def test_a_loaded_layer_cannot_be_unpatched_and_says_why(saved: Path) -> None:
    model = hwkern.load(saved, empty())
    with pytest.raises(ValueError, match="was loaded from a file"):
        hwkern.unpatch(model)


def test_hooks_and_mode_of_the_target_stay(saved: Path) -> None:
    model, calls = empty().train(), []
    model.a.register_forward_hook(lambda *_: calls.append("a"))
    hwkern.load(saved, model)
    assert model.a.training
    model.eval()(IDS)
    assert calls == ["a"]


def test_saving_again_with_fewer_parts_leaves_none_of_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    hwkern.save(patched(), tmp_path, max_shard_bytes=1000)
    model = patched()
    hwkern.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]
    assert torch.equal(hwkern.load(tmp_path, empty())(IDS), model(IDS))


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    hwkern.save(model, tmp_path)
    written = _shards._write_file

    def interrupted(path: Path, tensors: Any, manifest: Any) -> None:
        if "00002" in path.name:
            raise KeyboardInterrupt
        written(path, tensors, manifest)

    monkeypatch.setattr(_shards, "_write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hwkern.save(patched(), tmp_path, max_shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(hwkern.load(tmp_path, empty())(IDS), model(IDS))


def test_the_plan_travels_with_the_model(tmp_path: Path) -> None:
    model = patched()
    model.__dict__["_hwkern_plan"] = {"any": "data"}
    hwkern.save(model, tmp_path)
    assert hwkern.load(tmp_path, empty())._hwkern_plan == {"any": "data"}


# ---- what does not fit ----------------------------------------------------------------------------------------------


def refused(folder: Path, model: nn.Module, message: str) -> None:
    before = state(model)
    with pytest.raises(hwkern.CheckpointError, match=message):
        hwkern.load(folder, model)
    assert_untouched(model, before)


def rewrite(path: Path, change: Any) -> None:
    """Change the header of a safetensors file; its data stay."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    own = json.loads(header["__metadata__"]["hwkern"])
    change(header, own)
    header["__metadata__"]["hwkern"] = json.dumps(own)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def test_every_truncation_is_noticed_and_loads_nothing(saved: Path) -> None:
    file = saved / "model.safetensors"
    raw = file.read_bytes()
    for size in (0, 5, 8, 100, 3000, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:size])
        refused(saved, empty(), "damaged|cut short")
    file.write_bytes(raw + b"x")
    refused(saved, empty(), "longer than")


def test_a_flipped_bit_anywhere_is_noticed_and_loads_nothing(saved: Path) -> None:
    file = saved / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for place in (8 + length, (8 + length + len(raw)) // 2, len(raw) - 1):
        file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        refused(saved, empty(), "checksum differs")
    file.write_bytes(raw[:20] + b"\xff" + raw[21:])
    refused(saved, empty(), "damaged")


def test_a_newer_format_names_both_versions(saved: Path) -> None:
    rewrite(saved / "model.safetensors", lambda header, own: own.update(format_version=99))
    refused(saved, empty(), r"format version 99; hwkern .* reads up to 1: update hwkern")


def test_parts_of_different_saves_are_not_mixed(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    files = hwkern.save(patched(), one, max_shard_bytes=4000)
    hwkern.save(patched(), two, max_shard_bytes=4000)
    (one / files[1].name).write_bytes((two / files[1].name).read_bytes())
    refused(one, empty(), "different saves")
    files[2].unlink()
    refused(one, empty(), "names 'model-00003.*not in the folder")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, empty(), "no checkpoint to load")
    refused(tmp_path / "nowhere", empty(), "is not a folder")


def model_with(change: Any) -> nn.Module:
    model = empty()
    with torch.device("meta"):
        change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "new", nn.Linear(3, 4)), r"missing in the files: 'new\.weight', 'new\.bias'"),
        (lambda m: delattr(m, "norm"), r"extra in the files: 'norm\.weight'"),
        (
            lambda m: setattr(m, "embed", nn.Embedding(N + 1, K)),
            r"'embed.weight' has the shape \(25, 40\) in the model",
        ),
        (lambda m: setattr(m, "a", nn.Linear(K, K + 1)), "'a' is 40 → 41 in the model, but 40 → 40 in the files"),
        (lambda m: setattr(m, "a", nn.Identity()), "int8 layer 'a', but the model has no linear layer"),
        (lambda m: setattr(m, "b", nn.Linear(K, K)), "'b' has a bias in the model, but none in the files"),
        (lambda m: setattr(m, "table", torch.zeros(K, dtype=torch.int64)), "'table' is int64 in the model"),
        (lambda m: setattr(m, "plain", torch.zeros(3)), "plain tensor attribute on the meta device"),
        (lambda m: setattr(m, "head", Int8Linear(K, N)), "'head' is int8 already"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(saved: Path, change: Any, message: str) -> None:
    refused(saved, model_with(change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, own: own["layers"]["a"].update({"class": "Int9"}), "layer 'a' of the files: no int8 layer"),
        (lambda header, own: own["layers"].pop("a"), r"'a\.weight' is float32 in the model, but int8|does not fit"),
        (lambda header, own: own.pop("layers"), "description is damaged"),
        (lambda header, own: own["ties"].update(x="y"), "says that 'x' is 'y'"),
        (lambda header, own: own.update(parts=2), "lacks part 2 of 2"),
        (lambda header, own: own["crc32"].pop("a.weight"), "checksums name other tensors"),
        (lambda header, own: header["a.weight"].update(shape=[1, 2]), "do not fit its shape"),
        (lambda header, own: header["a.weight"].update(dtype="I3"), "damaged"),
    ],
)
def test_an_edited_header_is_refused(saved: Path, change: Any, message: str) -> None:
    rewrite(saved / "model.safetensors", change)
    refused(saved, empty(), message)


def test_scales_of_another_dtype_are_refused(tmp_path: Path) -> None:
    model = patched()
    model.a._buffers["weight_scale"] = model.a.weight_scale.half()
    hwkern.save(model, tmp_path)
    refused(tmp_path, empty(), "'a.weight_scale' is float16, but scales are float32")


def test_a_scale_of_nan_is_refused(tmp_path: Path) -> None:
    model = patched()
    model.a.weight_scale[3] = torch.nan
    hwkern.save(model, tmp_path)
    refused(tmp_path, empty(), "NaN")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        hwkern.save(empty(), tmp_path)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        hwkern.save(object(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format = 'gguf'"):
        hwkern.save(patched(), tmp_path, format="gguf")  # type: ignore[arg-type]
    for size in (0, "2MB"):
        with pytest.raises(ValueError, match="positive number of bytes"):
            hwkern.save(patched(), tmp_path, max_shard_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="complex64"):
        hwkern.save(nn.Linear(2, 2, dtype=torch.complex64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_device_without_memory_or_kernels(saved: Path) -> None:
    with pytest.raises(ValueError, match="would load nothing"):
        hwkern.load(saved, empty(), device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="cannot put int8 layers on cuda"):
            hwkern.load(saved, empty(), device="cuda")


@pytest.mark.gpu
def test_straight_to_the_gpu(saved: Path) -> None:
    model = hwkern.load(saved, empty(), device="cuda")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    # The norms differ between devices in their last bits, which may move a value to the next int8 step.
    here, there = hwkern.load(saved, empty())(IDS), model(IDS.cuda()).cpu()
    assert torch.cosine_similarity(here, there, dim=-1).min() > 0.999
