"""The INT8 GEMM kernels: every config id, edge shapes, the exact int32 sum, the roundings of hwkern.h, guard bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_helpers import (
    FLOATS,
    REDUCED,
    Guarded,
    configs,
    each_config,
    gemm,
    random_int8,
    runs_here,
    same_bits,
    ulp_distance,
)

from hwkern import _native, ops, reference

CONFIGS = configs("w8a8")
RUNNABLE = [row for row in CONFIGS if runs_here(row)]
all_configs = each_config(RUNNABLE)

# Around every tile edge (16, 32, 64, 80, 96, 128, 144, 160 … 352), tokens for two and three tiles of equal height, one
# element, odd sizes, K shorter than one chunk, one buffer, the ring.
M = (
    [5, 300]
    if REDUCED
    else [1, 2, 15, 16, 17, 31, 33, 64, 65, 81, 97, 127, 128, 129, 145, 161, 177, 193, 225, 257, 289, 321, 353, 390]
)
N = [72, 257] if REDUCED else [1, 7, 8, 31, 32, 33, 64, 72, 127, 128, 129, 255, 256, 257, 520]
K = [17, 700] if REDUCED else [1, 15, 16, 17, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257, 700, 1024, 4096]


def edge_shapes() -> list[tuple[int, int, int]]:
    """Every M, every N and every K at least once with small and with large partners, not the whole product."""
    shapes = {(m, n, k) for m, (n, k) in itertools.product(M, [(33, 129), (257, 700)])}
    shapes |= {(m, n, k) for n, (m, k) in itertools.product(N, [(17, 65), (130, 256)])}
    shapes |= {(m, n, k) for k, (m, n) in itertools.product(K, [(5, 40), (129, 136)])}
    return sorted(shapes)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return reference.int8_matmul(a, b, out_dtype=torch.int32)


def test_the_table_is_small_and_its_ids_are_unique():
    assert len([c for c in CONFIGS if c["min_compute"] == 80]) <= 8
    assert len({c["id"] for c in CONFIGS}) == len({c["name"] for c in CONFIGS}) == len(CONFIGS)


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
def test_int32_sums_are_exact_and_nothing_else_is_written(config: int):
    for m, n, k in edge_shapes():
        a, b = random_int8(m, k), random_int8(n, k)
        for pitch in (n + 3,) if REDUCED else (n, n + 3):
            d = Guarded(m, n, torch.int32, pitch)
            gemm(a, b, d, config)
            assert torch.equal(d.value, exact(a, b)), (m, n, k)
            d.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
def test_extreme_values_reach_the_largest_sums(config: int):
    k = ops.K_MAX
    for left, right in ((-128, -128), (-128, 127), (127, 127)):
        a = torch.full((3, k + 1), left, dtype=torch.int8, device="cuda")[:, :k]
        b = torch.full((5, k + 1), right, dtype=torch.int8, device="cuda")[:, :k]
        d = Guarded(3, 5, torch.int32)
        gemm(a, b, d, config)
        assert bool((d.value == left * right * k).all())


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_outputs_have_the_reference_s_bits(config: int, dtype: torch.dtype):
    shapes = (
        [(5, 40, 65), (130, 257, 700)] if REDUCED else [(1, 33, 17), (17, 7, 64), (129, 136, 4096), (130, 257, 700)]
    )
    for m, n, k in shapes:
        a, b = random_int8(m, k), random_int8(n, k)
        scale_m, scale_n = torch.rand(m, device="cuda") * 0.01, torch.rand(n, device="cuda") * 0.01
        for bias_dtype in (None, dtype) if REDUCED else (None, *FLOATS):
            bias = None if bias_dtype is None else torch.randn(n, device="cuda").to(bias_dtype)
            d = Guarded(m, n, dtype, pitch=n + n % 2)
            gemm(a, b, d, config, scale_m, scale_n, bias)
            assert same_bits(d.value, reference.int8_matmul(a, b, scale_m, scale_n, bias, dtype)), (m, n, k, bias_dtype)
            d.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_outputs_are_within_one_ulp_of_the_exact_value(config: int, dtype: torch.dtype):
    """Against float64. Scales and sums here are exact in float32 (|sum| < 2²⁴), so the roundings left are the two
    products (½ ulp of float32 each) and the output's (½ ulp of its type): 1.5 ulp for float32, else < 0.51."""
    a, b = random_int8(200, 512), random_int8(136, 512)
    scale_m, scale_n = torch.rand(200, device="cuda"), torch.rand(136, device="cuda")
    d = Guarded(200, 136, dtype)
    # The products reach 2²³ · 1; keep float16 in its range.
    scale_m *= 1e-3
    gemm(a, b, d, config, scale_m, scale_n)
    value = exact(a, b).double() * scale_m.double()[:, None] * scale_n.double()
    assert ulp_distance(d.value, value) <= (1.5 if dtype == torch.float32 else 0.51)


@pytest.mark.gpu
@all_configs
def test_missing_scales_count_as_one(config: int):
    a, b = random_int8(20, 96), random_int8(24, 96)
    scale = torch.rand(20, device="cuda")
    d = Guarded(20, 24, torch.float32)
    gemm(a, b, d, config)
    assert torch.equal(d.value, exact(a, b).float())
    gemm(a, b, d, config, scale_m=scale)
    assert torch.equal(d.value, exact(a, b).float() * scale[:, None])


@pytest.mark.gpu
@all_configs
def test_rows_longer_than_k_and_outputs_off_the_16_byte_grid(config: int):
    a, b = random_int8(70, 100, pitch=160), random_int8(50, 100, pitch=112)
    for dtype in (torch.int32, torch.bfloat16):
        for offset in (0, 1):
            d = Guarded(70, 50, dtype, pitch=56, offset=offset)
            gemm(a, b, d, config)
            assert torch.equal(d.value, reference.int8_matmul(a, b, out_dtype=dtype))
            d.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
def test_more_tiles_than_the_gpu_runs_at_once(config: int):
    m, n, k = 1500, 3000, 256
    a, b = random_int8(m, k), random_int8(n, k)
    d = Guarded(m, n, torch.int32)
    gemm(a, b, d, config)
    assert torch.equal(d.value, exact(a, b))


@pytest.mark.gpu
@pytest.mark.sanitizer
@each_config([row for row in RUNNABLE if 100 <= row["id"] < 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16], ids=str)
def test_narrow_tiles_of_the_last_round_meet_the_wide_ones(config: int, dtype: torch.dtype):
    """On 132 SMs 107 and 108 cut these N into both widths: 16 × 192 and 8 × 128, 132 and 26, 88 and 40 tiles a row,
    the last tile ragged at both ends; and 4096 columns into narrow tiles alone. 108 cuts the last two after an odd
    number of wide tiles, so that 72 and 64 columns are left for the last narrow one, and not N % 128."""
    shapes = [
        (2000, 4033, 200),
        (300, 28670, 136),
        (300, 22001, 300),
        (1000, 4096, 700),
        (1000, 7304, 136),
        (630, 20480, 136),
    ]
    for m, n, k in shapes[2:3] if REDUCED else shapes:
        a, b = random_int8(m, k), random_int8(n, k)
        d = Guarded(m, n, dtype, pitch=n + 7)
        gemm(a, b, d, config)
        assert torch.equal(d.value, reference.int8_matmul(a, b, out_dtype=dtype)), (m, n, k)
        d.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("k", [64, 400, 1100])
def test_results_still_being_stored_outlive_the_next_tile_s_loads(config: int, k: int):
    """16-bit results may wait in a buffer that the next tiles' operands want: one, a few, and more buffers a tile."""
    m, n = 1900, 4104  # 15 × 17 tiles of 128 × 256: two a block on most GPUs, and ragged at both ends
    a, b = random_int8(m, k), random_int8(n, k)
    scale_m, scale_n = torch.rand(m, device="cuda") * 0.01, torch.rand(n, device="cuda") * 0.01
    for bias in (None, torch.randn(n, device="cuda")):
        d = Guarded(m, n, torch.bfloat16)
        gemm(a, b, d, config, scale_m, scale_n, bias)
        assert same_bits(d.value, reference.int8_matmul(a, b, scale_m, scale_n, bias, torch.bfloat16))
        d.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
def test_same_bits_in_every_run(config: int):
    a, b = random_int8(300, 1000), random_int8(260, 1000)
    scale_m, scale_n = torch.rand(300, device="cuda"), torch.rand(260, device="cuda")
    first = Guarded(300, 260, torch.bfloat16)
    gemm(a, b, first, config, scale_m, scale_n)
    for _ in range(100):
        again = Guarded(300, 260, torch.bfloat16)
        gemm(a, b, again, config, scale_m, scale_n)
        assert same_bits(first.value, again.value)


@pytest.mark.gpu
def test_two_streams_at_once_do_not_disturb_each_other():
    a, b = random_int8(512, 2048), random_int8(512, 2048)
    expected = exact(a, b)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outputs = [[], []]
    for _ in range(20):
        for stream, results in zip(streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.int8_matmul(a, b))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for results in outputs for result in results)


@pytest.mark.gpu
def test_random_shapes_with_the_chosen_config():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20 if REDUCED else 300):
        m, n, k = (int(torch.randint(1, high, (), generator=generator)) for high in (300, 400, 900))
        a, b = random_int8(m, k), random_int8(n, k)
        d = Guarded(m, n, torch.int32)
        gemm(a, b, d, ops.CHOOSE)
        assert torch.equal(d.value, exact(a, b)), (m, n, k)
        d.assert_untouched_outside()


@pytest.mark.gpu
def test_empty_m_launches_nothing():
    d = Guarded(1, 8, torch.int32)
    a, b = random_int8(1, 16), random_int8(8, 16)
    gemm(a[:0], b, d, ops.CHOOSE)
    assert bool((d.buffer == 0xA5).all())


@pytest.mark.gpu
def test_bad_arguments_are_refused_with_a_sentence():
    a, b = random_int8(4, 32), random_int8(8, 32)
    d = Guarded(4, 8, torch.float32)
    with pytest.raises(ValueError, match="unknown config id"):
        gemm(a, b, d, 12345)
    with pytest.raises(ValueError, match="16 bytes"):
        gemm(a[:, 1:], b[:, 1:], d, ops.CHOOSE)
    raw = Guarded(4, 8, torch.int32)
    with pytest.raises(ValueError, match="raw sum"):
        gemm(a, b, raw, ops.CHOOSE, scale_n=torch.ones(8, device="cuda"))


def test_the_cost_model_prefers_small_tiles_for_few_rows_and_large_ones_for_many():
    """On an H100's numbers: 132 SMs, 227 KB of shared memory a block."""
    device = {"sm_count": 132, "compute": 90, "shared_bytes": 232448}
    by_id = {c["id"]: c for c in CONFIGS}
    native = _native.extension()

    def chosen(m: int) -> dict[str, int]:
        return by_id[native.gemm_choose(m=m, n=4096, k=4096, **device)]

    assert chosen(1)["block_m"] <= 32
    assert chosen(8192)["block_m"] * chosen(8192)["block_n"] >= 128 * 128


def test_few_rows_get_what_was_measured_to_be_fast_on_an_h100():
    """Persistent blocks where each has several tiles; for constant weights, times with scales that come from memory."""
    choose = _native.extension().gemm_choose
    h100 = (132, 90, 232448)
    assert [choose(m, 28672, 4096, *h100, True) for m in (1, 32, 64, 128)] == [254, 254, 250, 256]
    assert [choose(m, 28672, 4096, *h100, False) for m in (1, 32, 64)] == [215, 209, 209]
    for n, k in ((4096, 4096), (6144, 4096), (4096, 14336)):
        assert [choose(m, n, k, *h100, True) for m in (32, 64)] == [217, 217]
    assert choose(32, 4096, 4096, *h100, False) == 206
    # 136 and 148 tiles are a second one for a few blocks alone; none was timed with several tiles of tokens.
    for m, n, k in ((1, 17408, 5120), (1, 18944, 3584), (128, 17408, 8192), (128, 8192, 1024), (257, 10240, 14336)):
        assert choose(m, n, k, *h100, True) not in (250, 254, 256)


def test_a_gpu_with_little_shared_memory_gets_a_config_that_fits():
    """99 KB a block: compute capability 8.6, 8.9 and 12.0."""
    native = _native.extension()
    for m in (1, 64, 512, 4096):
        chosen = native.gemm_choose(m=m, n=4096, k=4096, sm_count=84, compute=86, shared_bytes=101376)
        assert next(c for c in CONFIGS if c["id"] == chosen)["shared_bytes"] <= 101376


def test_no_config_for_a_gpu_older_than_sm80():
    native = _native.extension()
    assert native.gemm_choose(m=1, n=8, k=16, sm_count=72, compute=75, shared_bytes=65536) == -1
