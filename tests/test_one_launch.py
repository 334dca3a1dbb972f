"""Linears that quantize their rows in the GEMM's launch or beside it: every such config id, the reference's bits.

The sums are integers and every other operation is one rounding in a fixed order, so all comparisons are exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_helpers import (
    FLOATS,
    REDUCED,
    Guarded,
    assert_a_chain_gives_the_bits_of_single_steps,
    configs,
    each_config,
    runs_here,
    same_bits,
)

from hwkern import _native, ops, reference
from hwkern._choice import K_MAX
from hwkern.ops import DTYPES

CONFIGS = configs("w8a8_linear")
H100 = (132, 90, 232448)
RUNNABLE = [row for row in CONFIGS if runs_here(row)]
all_configs = each_config(RUNNABLE)

# Around the edges of tiles (64, 128, 192 rows and columns), of a cluster's shares, of vectors and of buffers of K.
M = [5, 130] if REDUCED else [1, 2, 15, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 257]
N = [72, 257] if REDUCED else [1, 7, 8, 63, 64, 65, 127, 129, 191, 192, 193, 385, 577]
K = [17, 700] if REDUCED else [1, 2, 7, 8, 15, 17, 127, 128, 129, 255, 257, 384, 500, 640, 760, 767, 768]

# What does not fit in shared memory as whole rows.
LONG_K = [776, 2000] if REDUCED else [776, 1000, 1024, 1032, 1536, 1544, 2999, 3064, 3072]
MAX_K = {row["id"]: row["max_k"] for row in CONFIGS}


def edge_shapes(max_k: int) -> list[tuple[int, int, int]]:
    shapes = {(m, n, k) for m, (n, k) in itertools.product(M, [(33, 129), (257, 700)])}
    shapes |= {(m, n, k) for n, (m, k) in itertools.product(N, [(17, 65), (130, 256)])}
    shapes |= {(m, n, k) for k, (m, n) in itertools.product(K + LONG_K, [(5, 40), (129, 200)]) if k <= max_k}
    return sorted(shapes)


def packed(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight [N, K]`` int8 over the whole range, in rows padded to 16 bytes, and its scales."""
    weight = torch.randint(-128, 128, (n, -(-k // 16) * 16), dtype=torch.int8, device="cuda")
    weight[:, k:] = 0
    return weight, torch.rand(n, device="cuda") * 0.02 + 0.001


def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, y: Guarded, config: int,
    constant: bool = False, workspace: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The raw call: any leading dimension of x and y, nothing copied on the way."""
    (m, k), n = x.shape, weight.shape[0]
    if workspace is None:
        workspace = torch.empty(m * (k + 20), dtype=torch.int8, device="cuda")  # not less than linear_workspace_bytes
    _native.extension().linear(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), weight.data_ptr(), weight.stride(0), scale.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype], y.pointer(), y.pitch,
        DTYPES[y.matrix.dtype], m, n, k, config, workspace.data_ptr(), workspace.numel(),
        torch.cuda.current_stream().cuda_stream, 0, 0, 0, 0, constant,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("dtype", FLOATS)
def test_edge_shapes_have_the_reference_s_bits_and_write_nothing_else(config: int, dtype: torch.dtype):
    for number, (m, n, k) in enumerate(edge_shapes(MAX_K[config])):
        x = torch.randn(m, k, device="cuda").to(dtype)
        weight, scale = packed(n, k)
        bias = torch.randn(n, device="cuda").to(dtype) if number % 2 else None
        y = Guarded(m, n, FLOATS[number % 3], pitch=n + (0, 3, 8)[number % 3])
        linear(x, weight, scale, bias, y, config, constant=number % 4 < 2)
        want = reference.int8_linear(x, weight[:, :k], scale, bias, y.matrix.dtype)
        assert same_bits(y.value, want), (m, n, k)
        y.assert_untouched_outside()


@pytest.mark.gpu
@all_configs
def test_k_beyond_what_shared_memory_holds_is_refused(config: int):
    k = MAX_K[config] + 1
    if k > K_MAX:
        pytest.skip("it takes what int8_matmul takes")
    weight, scale = packed(8, k)
    with pytest.raises(ValueError, match="K is too large for this config"):
        linear(torch.randn(3, k, device="cuda"), weight, scale, None, Guarded(3, 8, torch.float32), config)


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_with_nan_or_inf_zero_rows_and_extreme_rows(config: int, dtype: torch.dtype):
    x = torch.randn(150, 300, device="cuda").to(dtype)
    x[3] = 0
    x[7, 299], x[64, 0], x[128, 17], x[149, 150] = float("nan"), float("inf"), -float("inf"), float("nan")
    x[9] *= torch.finfo(dtype).tiny
    x[10] = torch.finfo(dtype).max
    x[11] = torch.arange(300, device="cuda").to(dtype) - 150  # a scale of 150 / 127: halves round to even
    x[12] = (torch.arange(300, device="cuda") % 255 - 127).to(dtype) / 2
    x[12, 0] = 127.0  # a scale of 1: every second value is a tie
    weight, scale = packed(70, 300)
    y = Guarded(150, 70, torch.float32)
    linear(x, weight, scale, None, y, config)
    assert same_bits(y.value, reference.int8_linear(x, weight[:, :300], scale, None, torch.float32))


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_off_the_16_byte_grid(config: int, dtype: torch.dtype):
    for start, pitch in ((1, 301), (0, 303), (3, 320)):
        x = torch.randn(70 * pitch + 8, device="cuda").to(dtype)[start : start + 70 * pitch].view(70, pitch)[:, :300]
        weight, scale = packed(200, 300)
        y = Guarded(70, 200, dtype, offset=start)
        linear(x, weight, scale, None, y, config)
        assert same_bits(y.value, reference.int8_linear(x, weight[:, :300], scale)), (start, pitch)


@pytest.mark.gpu
@all_configs
def test_activation_and_residual(config: int):
    x = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    weight, scale = ops.quantize(torch.randn(330, 256, device="cuda"))
    residual = torch.randn(200, 330, device="cuda", dtype=torch.bfloat16)
    y = ops.int8_linear(x, weight, scale, config=config, activation="relu", residual=residual)
    assert same_bits(y, reference.int8_linear(x, weight, scale, activation="relu", residual=residual))


@pytest.mark.gpu
@all_configs
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(4096, 768, 768), (2000, 3072, 768), (9000, 400, 384), (513, 2304, 640), (4096, 768, 3072), (3001, 264, 1536)],
)
def test_a_hundred_runs_give_the_same_bits_over_many_tiles(config: int, m: int, n: int, k: int):
    if k > MAX_K[config]:
        pytest.skip("rows of this length do not fit")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight, scale = packed(n, k)
    bias = torch.randn(n, device="cuda")
    want = reference.int8_linear(x, weight, scale, bias)
    first = ops.int8_linear(x, weight, scale, bias, config=config)
    assert same_bits(first, want)
    for _ in range(5 if REDUCED else 99):
        assert torch.equal(
            ops.int8_linear(x, weight, scale, bias, config=config).view(torch.int16), first.view(torch.int16)
        )


@pytest.mark.gpu
@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("m", [5] if REDUCED else [1, 70, 300, 2048])
def test_a_chain_of_layers_gives_the_bits_of_single_steps(config: int, m: int):
    """Each layer reads what the one before wrote; launches overlap, in a graph too."""
    assert_a_chain_gives_the_bits_of_single_steps(config, m, width=160 if REDUCED else 768)


@pytest.mark.gpu
@all_configs
def test_what_an_older_call_left_in_the_workspace_is_not_taken(config: int):
    """Rows and scales of other calls lie there, and bytes that are NaN as scales."""
    weight, scale = packed(384, 768)
    workspace = torch.full((4096 * 788,), -1, dtype=torch.int8, device="cuda")
    xs = [torch.randn(m, 768, device="cuda", dtype=torch.bfloat16) for m in (4096, 4096, 1000, 4096, 70)]
    ys = [Guarded(x.shape[0], 384, torch.bfloat16) for x in xs]
    for x, y in zip(xs, ys, strict=True):  # nothing waits in between
        linear(x, weight, scale, None, y, config, constant=True, workspace=workspace)
    for x, y in zip(xs, ys, strict=True):
        assert same_bits(y.value, reference.int8_linear(x, weight, scale, None, torch.bfloat16))


@pytest.mark.gpu
@all_configs
def test_two_streams_with_layers_of_their_own(config: int):
    layers = [packed(768, 768) for _ in range(2)]
    xs = [torch.randn(1000, 768, device="cuda", dtype=torch.float16) for _ in range(2)]
    want = [ops.int8_linear(x, *layer, config=config) for x, layer in zip(xs, layers, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    kept: list[list[torch.Tensor]] = [[], []]
    for _ in range(3 if REDUCED else 30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                kept[i].append(ops.int8_linear(xs[i], *layers[i], config=config))
    torch.cuda.synchronize()
    assert all(same_bits(y, want[i]) for i in range(2) for y in kept[i])


@pytest.mark.parametrize(
    ("m", "n", "k", "chosen"),
    [
        (4096, 3072, 768, 401), (4096, 2304, 768, None), (4096, 768, 768, 406), (1024, 3072, 768, 410),
        (512, 768, 768, 230), (128, 3072, 768, 400), (64, 768, 768, None), (256, 3072, 768, None),
        (1024, 768, 768, None), (2048, 768, 768, None), (2048, 3072, 768, None), (3000, 3072, 768, None),
        (512, 3072, 768, 223), (512, 2304, 768, 234), (512, 768, 3072, 232), (1024, 2304, 768, None),
        (4096, 1536, 384, None), (2048, 768, 3072, 410), (4096, 768, 3072, 411),
        (8192, 768, 3072, 106), (1, 3072, 768, None), (1 << 20, 3072, 768, None),
    ],
)  # fmt: skip
def test_what_was_measured_to_be_faster_is_chosen(m: int, n: int, k: int, chosen: int | None):
    choose = _native.extension().linear_choose
    product = _native.extension().gemm_choose(m, n, k, *H100, True)
    assert choose(m, n, k, *H100) == (product if chosen is None else chosen)
    a100 = (108, 80, 166912)
    assert choose(m, n, k, *a100) == _native.extension().gemm_choose(m, n, k, *a100, True)


def test_a_product_of_int8_takes_none_of_them():
    choose = _native.extension().gemm_choose
    ids = {row["id"] for row in CONFIGS}
    for m, n, k in itertools.product((1, 64, 512, 4096), (768, 3072), (384, 768)):
        assert choose(m, n, k, *H100) not in ids
