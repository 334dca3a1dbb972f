"""Quantize and dequantize, on the CPU and on CUDA, against reference.py bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import FLOATS, REDUCED, Guarded, same_bits

from hwkern import _native, ops, reference

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)

# K around a vector (4, 8), a warp's rows, 4 vectors a lane, a block's, and beyond what a block keeps in registers.
K = [1, 300, 1030] if REDUCED else [1, 3, 7, 8, 9, 127, 255, 256, 257, 512, 1000, 1024, 1025, 4096, 5000, 16384, 40000]


def assert_same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(got[0].cpu(), want[0].cpu())
    assert same_bits(got[1].cpu(), want[1].cpu())


@dtypes
@pytest.mark.parametrize("k", K)
@pytest.mark.sanitizer
def test_per_token_has_the_reference_s_bits(device: str, dtype: torch.dtype, k: int):
    for m in (1, 5, 67):
        x = (torch.randn(m, k) * torch.logspace(-6, 3, m).unsqueeze(1)).to(dtype)
        assert_same(ops.quantize(x.to(device)), reference.quantize(x))


@dtypes
def test_half_way_values_round_to_even(device: str, dtype: torch.dtype):
    # absmax 127 makes the scale exactly 1.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, 64.5]]).to(dtype)
    q, scale = ops.quantize(x.to(device))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 64, 64]]
    assert scale.tolist() == [1.0]


@dtypes
@pytest.mark.parametrize("k", [5, 100, 3000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.sanitizer
def test_a_row_with_nan_or_inf_gets_a_nan_scale_and_leaves_its_neighbours_alone(
    device: str, dtype: torch.dtype, k: int, bad: float
):
    x = torch.randn(4, k).to(dtype)
    clean = ops.quantize(x.to(device))
    for column in (0, k // 2, k - 1):
        poisoned = x.clone()
        poisoned[2, column] = bad
        q, scale = ops.quantize(poisoned.to(device))
        assert scale[2].isnan()
        assert not q[2].any()
        others = [0, 1, 3]
        assert torch.equal(q[others], clean[0][others])
        assert torch.equal(scale[others], clean[1][others])


@dtypes
@pytest.mark.parametrize("m", [1, 133, 300, 529])
def test_every_way_to_share_out_a_row(device: str, dtype: torch.dtype, m: int):
    """A warp or a block a row, one or four vectors a thread: on a GPU it depends on the rows, too (see RowShape)."""
    for k in (96, 1024, 4096):
        x = torch.randn(m, k).to(dtype)
        assert_same(ops.quantize(x.to(device)), reference.quantize(x))


@dtypes
def test_an_all_zero_row_gives_zeros(device: str, dtype: torch.dtype):
    q, scale = ops.quantize(torch.zeros(3, 70, dtype=dtype, device=device))
    assert not q.any()
    assert bool((scale == reference.SCALE_MIN).all())
    assert not ops.dequantize(q, scale).any()


def test_the_smallest_and_the_largest_floats_stay_finite(device: str):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[1e-45, 0.0, -1e-45], [largest, -largest, 1.0], [1e-38, 5e-39, 0.0]])
    got = ops.quantize(x.to(device))
    assert got[1].isfinite().all()
    assert_same(got, reference.quantize(x))


@dtypes
def test_any_strides_and_alignment(device: str, dtype: torch.dtype):
    base = torch.randn(40, 261).to(dtype)
    for view in (base[:, 1:], base[::2], base[:, :200], base.t(), base[3:, 5:70], base.expand(2, 40, 261)):
        on_device = base.to(device)
        moved = on_device.as_strided(view.size(), view.stride(), view.storage_offset())
        assert_same(ops.quantize(moved), reference.quantize(view))


@dtypes
@pytest.mark.parametrize("k", K)
@pytest.mark.sanitizer
def test_static_scales_of_every_shape(device: str, dtype: torch.dtype, k: int):
    x = torch.randn(37, k).to(dtype)
    x[0, 0] = float("inf")
    x[1, -1] = float("-inf")
    x[2, 0] = float("nan")
    cases = [(torch.tensor(0.013), 0), (torch.tensor([0.02]), 0), (torch.rand(37) * 0.03 + 1e-3, 0)]
    cases.append((torch.rand(k) * 0.03 + 1e-3, -1))
    for scale, axis in cases:
        q, _ = ops.quantize(x.to(device), scale.to(device), axis)
        assert torch.equal(q.cpu(), reference.quantize(x, scale, axis)[0])
    assert q[0, 0] == 127
    assert q[1, -1] == -127
    assert q[2, 0] == 0


@dtypes
@pytest.mark.parametrize("k", K)
@pytest.mark.sanitizer
def test_dequantize_has_the_reference_s_bits(device: str, dtype: torch.dtype, k: int):
    q = torch.randint(-128, 128, (37, k), dtype=torch.int8)
    for scale, axis in ((torch.tensor(0.013), 0), (torch.rand(37), 0), (torch.rand(k), -1)):
        y = ops.dequantize(q.to(device), scale.to(device), axis, dtype)
        assert same_bits(y.cpu(), reference.dequantize(q, scale, axis, dtype))


def test_dequantize_of_views(device: str):
    q = torch.randint(-128, 128, (37, 100), dtype=torch.int8, device=device)
    scale = torch.rand(37, device=device)
    assert torch.equal(ops.dequantize(q[:, 3:50], scale), reference.dequantize(q[:, 3:50], scale))
    assert torch.equal(ops.dequantize(q.t(), scale, -1), reference.dequantize(q.t(), scale, -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(1e-30, 1e30), st.sampled_from(FLOATS[::2]))
def test_round_trip_error_is_at_most_half_a_step(m: int, k: int, magnitude: float, dtype: torch.dtype):
    """|x - q·scale| <= scale/2, plus the float32 roundings of the division and the products (2⁻²² of absmax)."""
    x = (torch.randn(m, k) * magnitude).to(dtype)
    q, scale = ops.quantize(x)
    error = (x.double() - q.double() * scale.double()[:, None]).abs()
    bound = scale.double() / 2 + x.double().abs().amax(-1) * 2**-22
    assert bool((error <= bound[:, None]).all())


def test_three_dimensions_and_empty_batches(device: str):
    x = torch.randn(2, 3, 40, device=device)
    q, scale = ops.quantize(x)
    assert q.shape == x.shape
    assert scale.shape == (2, 3)
    q, scale = ops.quantize(x[:0])
    assert q.shape == (0, 3, 40)
    assert scale.shape == (0, 3)
    assert ops.quantize(x[:0], torch.tensor(1.0, device=device))[0].shape == (0, 3, 40)
    assert ops.dequantize(q, scale).shape == (0, 3, 40)


@pytest.mark.gpu
@pytest.mark.sanitizer
@dtypes
def test_writes_its_rows_with_zero_padding_and_nothing_else(dtype: torch.dtype):
    for m, k, ldq in [(5, 100, 112), (3, 1, 16), (130, 1027, 1040)]:
        x = torch.randn(m, k, device="cuda").to(dtype)
        q, scale = Guarded(m, ldq, torch.int8), Guarded(1, m, torch.float32)
        _native.extension().quantize_per_token(
            x.data_ptr(), ops.DTYPES[dtype], k, m, k, q.pointer(), ldq, scale.pointer(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        want_q, want_scale = reference.quantize(x.cpu())
        assert torch.equal(q.value[:, :k].cpu(), want_q)
        assert not q.value[:, k:].any()
        assert torch.equal(scale.value[0].cpu(), want_scale)
        q.assert_untouched_outside()
        scale.assert_untouched_outside()


def test_bad_input_is_a_sentence(device: str):
    x = torch.randn(4, 8, device=device)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        ops.quantize(x.double())
    with pytest.raises(TypeError, match=r"q is torch\.float32"):
        ops.dequantize(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"shape \(8,\), but \(4,\) is needed"):
        ops.quantize(x, torch.ones(8, device=device))
    with pytest.raises(TypeError, match="scales are float32"):
        ops.quantize(x, torch.ones(4, device=device, dtype=torch.float16))
    with pytest.raises(ValueError, match="axis = 1"):
        ops.quantize(x, torch.ones(4, device=device), 1)
    with pytest.raises(ValueError, match="K must be at least 1"):
        ops.quantize(x[:, :0])
    with pytest.raises(ValueError, match="K = 131072"):
        ops.quantize(torch.zeros(1, 2**17, device=device))
