"""The CPU's quantize and rescale (csrc/cpu/): reference.py's bits, nothing written outside, on one thread and on many.

The compiled loops exist once per instruction set; whichever this CPU takes is tested here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kernel_helpers import FLOATS, same_bits
from torch import Tensor

import hwkern
from hwkern import _cpu, _native, ops, reference

_C = _native.extension()
DTYPES = ops.DTYPES
POISON = 0x5A
THREADS = (1, 2, 5)

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)
# Around the vectors of 4 … 64 elements and their tails.
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 384, 511, 512, 513, 1025]


def quantize_rows(x: Tensor, columns: int | None = None, threads: int = 1) -> tuple[Tensor, Tensor]:
    """The raw call on ``x [M, K]`` with any row stride; checks that nothing is written behind q and scale."""
    m, k = x.shape
    columns = k if columns is None else columns
    q = torch.full((m * columns + 64,), POISON, dtype=torch.int8)
    scale = torch.full((m + 16,), -1.0)
    _C.cpu_quantize_rows(
        x.data_ptr(), DTYPES[x.dtype], x.stride(0), m, k, q.data_ptr(), columns, scale.data_ptr(), threads
    )
    assert bool((q[m * columns :] == POISON).all())
    assert bool((scale[m:] == -1.0).all())
    return q[: m * columns].view(m, columns), scale[:m]


def rescale(
    total: Tensor,
    scale_m: Tensor | None,
    scale_n: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    threads: int = 1,
) -> Tensor:
    """The raw call on ``total [M, N]``; checks that nothing is written behind y."""
    m, n = total.shape
    y = torch.full((m * n + 64,), -7.0, dtype=dtype)
    pointers = [0 if t is None else t.data_ptr() for t in (scale_m, scale_n, bias)]
    bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
    _C.cpu_rescale(total.data_ptr(), *pointers, bias_dtype, y.data_ptr(), DTYPES[dtype], m, n, threads)
    assert bool((y[m * n :] == -7.0).all())
    return y[: m * n].view(m, n)


def expected_rescale(
    total: Tensor, scale_m: Tensor | None, scale_n: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    y = total.float()
    if scale_m is not None:
        y = y * scale_m[:, None]
    if scale_n is not None:
        y = y * scale_n
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def assert_quantized(got: tuple[Tensor, Tensor], x: Tensor) -> None:
    q, scale = reference.quantize(x)
    assert torch.equal(got[0][:, : x.shape[1]], q)
    assert not got[0][:, x.shape[1] :].any(), "the padding is not zero"
    assert same_bits(got[1], scale)


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


# ---- quantize ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("k", WIDTHS)
def test_any_row_length_and_padding(dtype: torch.dtype, k: int):
    for m, columns in ((1, k), (3, k + 1), (19, ops.padded(k))):
        x = (torch.randn(m, k) * torch.logspace(-6, 3, m)[:, None]).to(dtype)
        for threads in THREADS:
            assert_quantized(quantize_rows(x, columns, threads), x)


@dtypes
def test_a_row_stride_and_a_start_off_the_vector_grid(dtype: torch.dtype):
    base = torch.randn(9, 301).to(dtype)
    for x in (base[:, 1:], base[:, 3:290], base[2:, 5:6]):
        assert_quantized(quantize_rows(x, x.shape[1] + 3), x)


@dtypes
def test_special_values_poison_their_own_row_alone(dtype: torch.dtype):
    for k in (1, 17, 200):
        x = torch.randn(12, k).to(dtype)
        for row, value in enumerate((float("nan"), float("inf"), float("-inf"), -0.0, -float("nan"))):
            x[2 * row, row * (k - 1) // 4] = value
        x[11] = 0
        got = quantize_rows(x, ops.padded(k), 2)
        assert_quantized(got, x)
        assert got[1].isnan().nonzero().flatten().tolist() == [0, 2, 4, 8]


@dtypes
def test_the_largest_and_the_smallest_magnitudes(dtype: torch.dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal
    rows = [[info.max, -info.max, 1.0], [info.tiny, -info.tiny / 2, 0.0], [smallest, -smallest, 0.0], [-0.0, 0.0, 0.0]]
    x = torch.tensor(rows, dtype=torch.float64).to(dtype)
    assert_quantized(quantize_rows(x, 16), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_widened_exactly(dtype: torch.dtype):
    # One value a row: its magnitude is the scale, its sign q.
    x = all_halves(dtype)[:, None]
    assert_quantized(quantize_rows(x, 1), x)
    # All finite values in one row: their order of magnitude down to zero.
    finite = x[x.isfinite()][None]
    assert_quantized(quantize_rows(finite, finite.shape[1]), finite)
    # And as a bias, which shows every bit of them.
    bias = all_halves(dtype)
    got = rescale(torch.zeros(1, 2**16, dtype=torch.int32), None, None, bias, torch.float32)
    assert same_bits(got[0], bias.float() + 0.0)


def test_quotients_next_to_a_half_round_as_the_reference_does():
    # 127 a/b for all small a ≤ b: many are exactly half-way, or one rounding away from it.
    b = torch.arange(1, 255, dtype=torch.float32)
    x = torch.where(b[None] <= b[:, None], b[None], 0.0)
    assert_quantized(quantize_rows(x, 256), x)
    assert_quantized(quantize_rows(-x * 1e-30, 256), -x * 1e-30)


# ---- rescale -------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", WIDTHS)
def test_every_operation_rounds_by_itself(dtype: torch.dtype, n: int):
    m = 7
    total = torch.randint(-(2**31), 2**31 - 1, (m, n)).to(torch.int32)
    scale_m, scale_n = torch.rand(m) * 1e-3, torch.rand(n) * 1e-3
    for bias_dtype in FLOATS:
        # The bias is of the product's size, where a fused multiply-add would show.
        bias = (torch.randn(n) * 500).to(bias_dtype)
        for threads in THREADS:
            got = rescale(total, scale_m, scale_n, bias, dtype, threads)
            assert same_bits(got, expected_rescale(total, scale_m, scale_n, bias, dtype))


@dtypes
def test_what_is_absent_changes_nothing(dtype: torch.dtype):
    total = torch.randint(-100, 100, (5, 600)).to(torch.int32)
    scale_m, scale_n, bias = torch.rand(5), torch.rand(600), torch.randn(600)
    total[0], scale_n[:9], bias[:9] = 0, 0.0, -0.0
    for use in range(8):
        arguments = [t if use >> i & 1 else None for i, t in enumerate((scale_m, scale_n, bias))]
        assert same_bits(rescale(total, *arguments, dtype), expected_rescale(total, *arguments, dtype))


def test_float32_results_may_replace_the_sums():
    total = torch.randint(-(2**20), 2**20, (33, 700)).to(torch.int32)
    scale_m, scale_n, bias = torch.rand(33), torch.rand(700), torch.randn(700)
    want = expected_rescale(total, scale_m, scale_n, bias, torch.float32)
    _C.cpu_rescale(
        total.data_ptr(), scale_m.data_ptr(), scale_n.data_ptr(), bias.data_ptr(), 0, total.data_ptr(), 0, 33, 700, 3
    )
    assert same_bits(total.view(torch.float32), want)


def rounding_cases(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, the float32 half-way to the next one, and the float32 neighbours of both."""
    values = all_halves(dtype).float()
    values = values[values.isfinite()].sort().values
    halves = ((values[1:].double() + values[:-1].double()) / 2).float()
    top = values[-1].double() * (1 + torch.finfo(dtype).eps / 2)  # where rounding to infinity starts
    special = torch.tensor([float("inf"), float("nan"), -float("nan"), 1e38, 3e38, 1e-45, 5e-39, 1.5e-38, float(top)])
    around = torch.cat([values, halves, special, -special])
    inf = torch.tensor(float("inf"))
    return torch.cat([around, around.nextafter(inf), around.nextafter(-inf)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits_at_every_value_half_way_and_next_to_it(dtype: torch.dtype):
    exact = rounding_cases(dtype)
    # 0 + bias brings any float32 to the rounding, but for the sign of zero.
    got = rescale(torch.zeros(1, exact.numel(), dtype=torch.int32), None, None, exact, dtype)[0]
    assert same_bits(got, (exact + 0.0).to(dtype))
    assert torch.equal(got.isnan(), exact.isnan())


@dtypes
def test_a_nan_scale_makes_its_row_nan(dtype: torch.dtype):
    total = torch.ones(3, 40, dtype=torch.int32)
    y = rescale(total, torch.tensor([1.0, float("nan"), 2.0]), torch.ones(40), None, dtype)
    assert y.isnan().all(dim=1).tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()


# ---- the operators on top ------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@dtypes
def test_a_layer_large_enough_for_threads_has_the_reference_s_bits(dtype: torch.dtype):
    x, w, bias = torch.randn(3, 200, 300).to(dtype), torch.randn(250, 300), torch.randn(250).to(dtype)
    q, scale = reference.quantize(w)
    assert _cpu._threads(200 * 300) == 1
    assert _cpu._threads(600 * 300) == 2
    got = ops.int8_linear(x, ops.pad_weight(q), scale, bias)
    assert same_bits(got, reference.int8_linear(x, q, scale, bias))


@pytest.mark.usefixtures("two_threads")
def test_python_threads_may_call_at_once():
    linear = hwkern.nn.Int8Linear.from_float(torch.nn.Linear(300, 250))
    inputs = [torch.randn(400, 300) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def call(i: int) -> None:
        with torch.inference_mode():
            results[i] = linear(inputs[i])

    with torch.inference_mode():
        want = [linear(x) for x in inputs]
    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], want[i]) for i in range(4))


@dtypes
def test_the_module_s_direct_call_equals_the_operator(dtype: torch.dtype):
    linear = hwkern.nn.Int8Linear.from_float(torch.nn.Linear(70, 33, dtype=dtype))
    for x in (torch.randn(70), torch.randn(2, 5, 70), torch.randn(0, 70), torch.randn(70, 6).t(), torch.randn(9, 99)):
        x = x.to(dtype)[..., :70]
        with torch.no_grad():
            want = ops.int8_linear(x, linear.weight, linear.weight_scale, linear.bias)
            got = linear(x)
        assert got.is_contiguous()
        assert got._base is None
        assert same_bits(got, want)


def test_tensors_on_other_devices_are_refused_by_name():
    linear = hwkern.nn.Int8Linear.from_float(torch.nn.Linear(32, 16))
    linear.weight_scale = linear.weight_scale.to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match="weight_scale on meta"):
        linear(torch.randn(4, 32))


def test_a_cpu_without_int8_dot_products_gives_the_same_bits():
    # Read by oneDNN at start, hence a process of its own: there torch._int_mm saturates, and hwkern must not use it.
    program = """
import torch
from hwkern import ops, reference
x, w, bias = torch.randn(37, 129), torch.randn(65, 129), torch.randn(65)
q, scale = reference.quantize(w)
assert torch.equal(ops.int8_linear(x, ops.pad_weight(q), scale, bias), reference.int8_linear(x, q, scale, bias))
a, b = torch.full((5, 96), 127, dtype=torch.int8), torch.full((40, 96), 127, dtype=torch.int8)
assert torch.equal(ops.int8_matmul(a, b), reference.int8_matmul(a, b, out_dtype=torch.int32))
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(hwkern.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, check=True, timeout=300)


# ---- what is refused -----------------------------------------------------------------------------------------------

X = torch.zeros(4, 8)
Q = torch.zeros(4, 8, dtype=torch.int8)
S = torch.zeros(8)
GOOD_QUANTIZE = (X.data_ptr(), 0, 8, 4, 8, Q.data_ptr(), 8, S.data_ptr(), 1)
GOOD_RESCALE = (X.data_ptr(), S.data_ptr(), S.data_ptr(), S.data_ptr(), 0, X.data_ptr(), 0, 4, 8, 1)


@pytest.mark.parametrize(
    ("position", "value", "sentence"),
    [
        (0, 0, "must not be null"),
        (1, 3, "x must be float32"),
        (1, 9, "x must be float32"),
        (2, 7, "shorter than its row"),
        (3, -1, "M >= 0"),
        (4, 0, "K >= 1"),
        (5, 0, "must not be null"),
        (6, 7, "shorter than its row"),
        (7, 0, "must not be null"),
        (8, 0, "at least one thread"),
    ],
)
def test_bad_arguments_of_quantize(position: int, value: int, sentence: str):
    arguments = list(GOOD_QUANTIZE)
    arguments[position] = value
    with pytest.raises(ValueError, match=sentence):
        _C.cpu_quantize_rows(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "sentence"),
    [
        (0, 0, "must not be null"),
        (4, 3, "bias must be float32"),
        (5, 0, "must not be null"),
        (6, 4, "y must be float32"),
        (7, -1, "M >= 0"),
        (8, -1, "N >= 0"),
        (9, 0, "at least one thread"),
    ],
)
def test_bad_arguments_of_rescale(position: int, value: int, sentence: str):
    arguments = list(GOOD_RESCALE)
    arguments[position] = value
    with pytest.raises(ValueError, match=sentence):
        _C.cpu_rescale(*arguments)


def test_no_rows_or_no_columns_are_no_work():
    _C.cpu_quantize_rows(0, 0, 8, 0, 8, 0, 8, 0, 1)
    _C.cpu_rescale(0, 0, 0, 0, 0, 0, 0, 0, 8, 1)
    _C.cpu_rescale(0, 0, 0, 0, 0, 0, 0, 8, 0, 1)
