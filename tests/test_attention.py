"""The attention kernel: every head size, mask and rotary embedding against float64, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hwkern import _native, reference

FLOATS = [torch.float16, torch.bfloat16]
DTYPES = {torch.float16: 1, torch.bfloat16: 2}  # as hwkern.h counts them


def call(
    qkv: Tensor, heads: int, kv_heads: int, *, causal: bool = False, mask: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """y, with a guard behind it that must stay as it is."""
    batch, length, width = qkv.shape
    dim = width // (heads + 2 * kv_heads)
    guard = 64
    y = torch.full((batch * length * heads * dim + guard,), 7.0, dtype=qkv.dtype, device=qkv.device)
    size = batch * length * kv_heads * dim * 2 if tables else 0
    workspace = torch.full((size + guard,), 0xA5, dtype=torch.uint8, device=qkv.device)
    strides = [0, 0, 0]
    if mask is not None:
        strides = [0 if mask.shape[i] == 1 else mask.stride(i) for i in range(3)]
    _native.extension().attention(
        qkv.data_ptr(), *((t.data_ptr() for t in tables) if tables else (0, 0)), 0 if mask is None else mask.data_ptr(),
        y.data_ptr(), *strides, batch, length, heads, kv_heads, dim, dim**-0.5, DTYPES[qkv.dtype], causal,
        workspace.data_ptr(), size, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert bool((y[-guard:] == 7.0).all()), "y was overrun"
    assert bool((workspace[-guard:] == 0xA5).all()), "the workspace was overrun"
    return y[:-guard].view(batch, length, heads, dim)


def check(y: Tensor, qkv: Tensor, heads: int, kv_heads: int, **options: Any) -> None:
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    scale = parts.shape[-1] ** -0.5
    tables = options.pop("tables", None) or (None, None)
    want = reference.attention(parts, heads, kv_heads, scale, cosine=tables[0], sine=tables[1], **options)
    magnitudes = torch.cat([parts[:, :, :-kv_heads], parts[:, :, -kv_heads:].abs()], 2)
    size = reference.attention(magnitudes, heads, kv_heads, scale, cosine=tables[0], sine=tables[1], **options)
    # A weight is rounded to the type once (eps / 2 of it) before it meets v, and y once. Scores and exponentials are
    # float32: |score| below 40 with D = 128 terms is off by 40·128·2⁻²⁴ = 3e-4 at most, of the size of the weight.
    # Rotated: another order of two operations rounds q or k to the neighbour now and then, eps of one term of a score
    # of some units.
    tolerance = (torch.finfo(qkv.dtype).eps * (2 if tables[0] is None else 6) + 3e-4) * size
    worst = ((y.double() - want).abs() / tolerance).max()
    assert bool(worst <= 1), float(worst)


def inputs(batch: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(batch * length + heads + dim)
    return torch.randn(batch, length, (heads + 2 * kv_heads) * dim, device="cuda").to(dtype)


# (B, L, H, kv heads): one token; a whole tile; tails; several tiles with shared heads.
SHAPES = [(1, 1, 1, 1), (1, 64, 2, 2), (2, 100, 4, 2), (1, 333, 3, 1), (2, 512, 8, 2)]


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "kv_heads"), SHAPES)
def test_attention(
    dtype: torch.dtype, dim: int, causal: bool, rotary: bool, batch: int, length: int, heads: int, kv_heads: int
) -> None:
    qkv = inputs(batch, length, heads, kv_heads, dim, dtype)
    angle = torch.rand(length, dim, device="cuda") * 6
    options: dict[str, Any] = {"causal": causal, "tables": (angle.cos(), angle.sin()) if rotary else None}
    check(call(qkv, heads, kv_heads, **options), qkv, heads, kv_heads, **options)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("length", [2, 99, 100, 193])  # odd ones have no pairs of neighbours
@pytest.mark.parametrize("kind", ["keys", "queries", "heads", "whole"])
def test_masks_are_added_however_they_broadcast(dtype: torch.dtype, dim: int, length: int, kind: str) -> None:
    batch, heads, kv_heads = 2, 4, 2
    qkv = inputs(batch, length, heads, kv_heads, dim, dtype)
    rows, of_heads, of_batch = int(kind != "keys"), int(kind in ("heads", "whole")), int(kind in ("keys", "whole"))
    shape = (batch**of_batch, heads**of_heads, length**rows, length)
    mask = (torch.randn(shape, device="cuda") * 2).to(dtype)
    mask[..., length // 2 + 1 :] = -1e4  # hidden, as exporters write it
    check(call(qkv, heads, kv_heads, mask=mask), qkv, heads, kv_heads, mask=mask)


@pytest.mark.gpu
def test_large_scores_and_keys_that_only_some_queries_see() -> None:
    qkv = inputs(1, 130, 2, 2, 64, torch.float16)
    qkv[..., : 4 * 64] *= 4  # scores of some hundred: all weight on few keys
    mask = torch.zeros(1, 1, 130, 130, device="cuda", dtype=torch.float16)
    mask[..., :70, 60:] = -torch.inf  # whole tiles that the first queries do not see
    y = call(qkv, 2, 2, mask=mask)
    wanted = call(qkv[:, :60].contiguous(), 2, 2)
    assert bool(torch.isfinite(y).all())
    # The same sums, but the scale comes before the mask: float32 scores of some hundred differ by 100·2⁻²³, weights by
    # as much, and a few values of y by one ulp.
    torch.testing.assert_close(y[:, :60], wanted, rtol=2.0**-9, atol=2.0**-11)
    mask[..., 3, :] = -torch.inf  # nothing to see: NaN, as softmax gives it, and in that row alone
    y = call(qkv, 2, 2, mask=mask)
    assert bool(y[:, 3].isnan().all())
    assert bool(torch.isfinite(y[:, [*range(3), *range(4, 130)]]).all())


@pytest.mark.gpu
def test_attentions_follow_each_other_without_waiting() -> None:
    # The keys of one are rotated while the one before may still read its own.
    layers = [inputs(2, 200, 4, 2, 64, torch.float16) for _ in range(2)]
    layers[1] = layers[1] * 0.5
    angle = torch.rand(200, 64, device="cuda")
    options: dict[str, Any] = {"causal": True, "tables": (angle.cos(), angle.sin())}
    wanted = [call(each, 4, 2, **options) for each in layers]
    for _ in range(5):
        for each, want in zip(layers, wanted, strict=True):
            assert torch.equal(call(each, 4, 2, **options), want)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dim": 80}, "heads of 32, 64 or 128"), ({"heads": 3}, "a multiple of kv_heads"), ({"length": 0}, "length"),
        ({"dtype": 0}, "float16 or bfloat16"), ({"scale": 0.0}, "scale must be positive"),
        ({"scale": math.nan}, "scale must be positive"), ({"qkv": 0}, "must not be null"),
        ({"cosine": 1024}, "must come together"), ({"qkv": 1026}, "multiples of 16 bytes"),
        ({"causal": True, "mask": 4096}, "causal or with a mask"), ({"mask": 4097}, "mask is not aligned"),
        ({"cosine": 4100, "sine": 8192}, "multiples of 16 bytes"),
        ({"cosine": 4096, "sine": 8192}, "workspace is too small"), ({"batch": 65536}, "below 2"),
    ],
)  # fmt: skip
def test_what_the_contract_excludes_is_refused(change: dict[str, Any], sentence: str) -> None:
    good = {
        "qkv": 1024, "cosine": 0, "sine": 0, "mask": 0, "y": 2048, "mask_batch": 0, "mask_head": 0, "mask_row": 0,
        "batch": 1, "length": 8, "heads": 4, "kv_heads": 2, "dim": 64, "scale": 0.125, "dtype": 1, "causal": False,
        "workspace": 0, "workspace_bytes": 0, "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        _native.extension().attention(**good | change)


def test_no_requests_are_no_work() -> None:
    _native.extension().attention(0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 4, 2, 64, 0.125, 1, False, 0, 0, 0)
