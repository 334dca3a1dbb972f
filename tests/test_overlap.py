"""Kernels that start while their predecessor still runs (Hopper and newer; elsewhere plain stream order).

Every test enqueues without a synchronisation and compares with the same calls one at a time, bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import (
    REDUCED,
    Guarded,
    assert_a_chain_gives_the_bits_of_single_steps,
    gemm,
    random_int8,
    same_bits,
)
from test_gemm import all_configs

from hwkern import _native, ops, reference
from hwkern.ops import DTYPES

pytestmark = pytest.mark.gpu

ROUNDS = 3 if REDUCED else 20


def quantize(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
    """The kernel alone, into buffers that exist."""
    _native.extension().quantize_per_token(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.shape[0], x.shape[1], q.data_ptr(), q.stride(0),
        scale.data_ptr(), torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip


@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("m", [5] if REDUCED else [1, 40, 300])
def test_a_chain_of_layers_gives_the_bits_of_single_steps(config: int, m: int):
    """Each layer reads what the one before wrote, and all share one workspace."""
    assert_a_chain_gives_the_bits_of_single_steps(config, m, width=160 if REDUCED else 1056)


@all_configs
def test_weights_declared_constant_change_no_bit_and_the_rest_is_waited_for(config: int):
    """A, the row scales and D belong to the kernel before, which is long; only B is constant."""
    m, n, k = 33, 200, 700
    b = random_int8(n, k)
    big = torch.randn(4096, 704, device="cuda")
    q, scale = torch.zeros(4096, 704, dtype=torch.int8, device="cuda"), torch.zeros(4096, device="cuda")
    for _ in range(ROUNDS):
        x = torch.randn(4096, 704, device="cuda")
        d = Guarded(m, n, torch.float32)
        torch.cuda.synchronize()
        quantize(big, q, scale)
        quantize(x, q, scale)
        gemm(q[-m:, :k], b, d, config, scale[-m:], b_is_constant=True)
        want_q, want_scale = reference.quantize(x[-m:])
        assert same_bits(d.value, reference.int8_matmul(want_q[:, :k], b, want_scale, None, None, torch.float32))
        d.assert_untouched_outside()


def test_a_layer_packed_right_before_its_first_call():
    """The kernel that writes the weights directly precedes the layer, and takes longer to run than the next two take to
    start. New tensors each time: from its second call on a layer's weights count as constant."""
    n = k = 1024 if REDUCED else 4096
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    for _ in range(ROUNDS):
        weight, scale = torch.zeros(n, k, dtype=torch.int8, device="cuda"), torch.zeros(n, device="cuda")
        source = torch.randn(n, k, device="cuda")
        torch.cuda.synchronize()
        quantize(source, weight, scale)
        y = ops.int8_linear(x, weight, scale)
        assert same_bits(y, reference.int8_linear(x, *reference.quantize(source)))


@pytest.mark.sanitizer
@all_configs
@pytest.mark.parametrize("m", [5] if REDUCED else [1, 40, 300])
def test_a_layer_with_constant_weights_waits_for_all_else(config: int, m: int):
    """Its GEMM may start before the kernel ahead of the layer has ended. That one, which is long, writes the layer's x
    and reads what the layer overwrites: y (as its residual) and the workspace (as its A)."""
    k, n, long = 208, 208, 1024 if REDUCED else 16384
    weight, weight_scale = ops.quantize(torch.randn(n, k, device="cuda"))
    bias = torch.randn(n, device="cuda")
    workspace = torch.zeros(m * max(long, k + 4), dtype=torch.int8, device="cuda")
    a, b = workspace[: m * long].view(m, long), random_int8(k, long)
    x, y = Guarded(m, k, torch.float32), torch.zeros(m, n, device="cuda")
    for _ in range(ROUNDS):
        first_a, first_y = random_int8(m, long), torch.randn(m, n, device="cuda")
        a.copy_(first_a)
        y.copy_(first_y)
        torch.cuda.synchronize()
        gemm(a, b, x, ops.CHOOSE, residual=y.data_ptr(), ldr=n, residual_dtype=DTYPES[y.dtype])
        _native.extension().linear(
            x.pointer(), DTYPES[torch.float32], k, weight.data_ptr(), k, weight_scale.data_ptr(), bias.data_ptr(),
            DTYPES[bias.dtype], y.data_ptr(), n, DTYPES[y.dtype], m, n, k, config, workspace.data_ptr(),
            workspace.numel(), torch.cuda.current_stream().cuda_stream, 0, 0, 0, 0, True,
        )  # fmt: skip
        want_x = reference.int8_matmul(first_a, b, residual=first_y)
        assert same_bits(x.value, want_x)
        assert same_bits(y, reference.int8_linear(want_x, weight, weight_scale, bias))
