"""The schemes of a layer: static, asymmetric, smoothed, with outlier columns, weight-only: their numbers and states."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from torch import nn

import hwkern
from hwkern import ops, reference
from hwkern._static import int8_linear_static
from hwkern.nn import CalibratedInt8Linear, Calibration, Int8Linear, WeightOnlyInt8Conv1D, WeightOnlyInt8Linear
from hwkern.nn.scheme import CLASSES, build, describe

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
K, N = 40, 24
SMOOTH = tuple(0.8 + i % 5 / 10 for i in range(K))
# For inputs within -1 … 1: divided by 0.8 they end at 1.25.
STATIC, SMOOTHED = 1 / 127, 1.25 / 127
CALIBRATIONS = {
    "static": Calibration(scale=STATIC),
    "asymmetric": Calibration(scale=1.2 / 254, zero_point=-85),  # -0.2 … 1
    "smooth": Calibration(smooth=SMOOTH),
    "smooth static": Calibration(scale=SMOOTHED, smooth=SMOOTH),
    "smooth asymmetric": Calibration(scale=1.5 / 254, zero_point=-85, smooth=SMOOTH),  # -0.25 … 1.25
    "outliers": Calibration(outliers=(3, 17)),
    "everything": Calibration(scale=SMOOTHED, zero_point=1, smooth=SMOOTH, outliers=(0, 39)),
}


def inputs(calibration: Calibration, m: int = 64) -> torch.Tensor:
    """What the calibration was made for: uniform in -1 … 1, or in -0.2 … 1."""
    return torch.rand(m, K) * 1.2 - 0.2 if calibration.zero_point < -1 else torch.rand(m, K) * 2 - 1


def linear(k: int = K, n: int = N, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def snr(exact: torch.Tensor, found: torch.Tensor) -> float:
    """10 · log10(signal power / error power), in dB."""
    exact, found = exact.detach().double(), found.detach().double()
    return 10 * math.log10(float(exact.square().sum() / (exact - found).square().sum().clamp_min(1e-300)))


# ---- the static operator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zero", [0, -127, 3, 127])
@pytest.mark.parametrize("columns", [1, K])
def test_static_linear_is_the_formula_bit_for_bit(device: str, dtype: torch.dtype, zero: int, columns: int) -> None:
    x = torch.randn(2, 5, K, device=device).to(dtype)
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    scale = torch.rand(N, device=device) / 100
    input_scale = torch.rand(columns, device=device) / 10 + 0.01
    bias = torch.randn(N, device=device)
    y = int8_linear_static(x, ops.pad_weight(weight), scale, input_scale, zero, bias)
    q = (x.float() * (1 / input_scale)).round() + zero
    q = q.clamp(-127, 127).to(torch.int8)
    assert torch.equal(y, reference.int8_matmul(q, weight, None, scale, bias, dtype))


def test_zero_shift_takes_the_zero_point_off_exactly() -> None:
    # With x on the grid of the quantizer nothing is rounded, so the asymmetric layer equals the symmetric product.
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    # Powers of two, so that scaling rounds nothing either.
    layer = CalibratedInt8Linear._from_rows(weight.float() / 64, None, Calibration(scale=0.125, zero_point=-100))
    x = torch.randint(-27, 228, (9, K)).float() * 0.125
    exact = x @ (layer.weight[:, :K].float() * layer.weight_scale[:, None]).t()
    # Three float32 roundings of values below |sum| · scale: 1e-6 relative of the largest term that is subtracted.
    assert torch.allclose(layer(x), exact, atol=3e-6 * float(layer.shift.abs().max() + exact.abs().max()), rtol=0)


@pytest.mark.parametrize("values", [torch.nan, torch.inf, -torch.inf])
def test_static_input_beyond_the_range_saturates_and_nan_is_the_zero_code(values: float) -> None:
    weight = torch.ones(1, 16, dtype=torch.int8)
    x = torch.zeros(1, 16)
    x[0, 3] = values
    y = int8_linear_static(x, weight, torch.ones(1), torch.ones(1), 0)
    assert y.item() == {torch.inf: 127, -torch.inf: -127}.get(values, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_point": 128}, "zero_point = 128"),
        ({"input_scale": torch.ones(2)}, "input_scale has shape"),
        ({"output_scale": torch.ones(N).half()}, "output_scale is torch.float16"),
        ({"weight": torch.zeros(N, K, dtype=torch.int8)}, r"int8 \[N, 48\]"),
    ],
)
def test_static_linear_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, K), "weight": torch.zeros(N, 48, dtype=torch.int8),
        "output_scale": torch.ones(N), "input_scale": torch.ones(1),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        int8_linear_static(**{**arguments, **change})  # type: ignore[arg-type]


def test_static_linear_passes_torchs_operator_checks() -> None:
    x = torch.randn(3, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True)
    arguments = (x, torch.randint(-9, 9, (N, 48), dtype=torch.int8), torch.rand(N), torch.rand(1), 3, bias)
    torch.library.opcheck(torch.ops.hwkern.int8_linear_static.default, arguments)


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", list(CALIBRATIONS))
def test_calibrated_layer_is_close_to_the_float_layer(device: str, name: str, dtype: torch.dtype) -> None:
    original = linear(dtype=dtype).to(device)
    x = inputs(CALIBRATIONS[name]).to(device, dtype)
    layer = CalibratedInt8Linear.from_calibration(original, CALIBRATIONS[name])
    assert layer.bias is original.bias
    assert layer(x).dtype == dtype
    # Uniform values rounded to 1/127 of their maximum: 20·log10(127·√12/√3) = 48 dB for x and for the weight, 45 dB for
    # both; a vector of divisors within 0.8 … 1.2 costs up to 3.5 dB of each, 16-bit results have 50 dB.
    assert snr(original(x), layer(x)) > 38


def test_weight_and_to_float_undo_smoothing_and_hold_the_outliers() -> None:
    original = linear()
    for calibration in CALIBRATIONS.values():
        layer = CalibratedInt8Linear.from_calibration(original, calibration)
        error = (layer.to_float().weight - original.weight).abs()
        # Half a step of each row, times what smoothing divides the column by.
        gain = torch.tensor(calibration.smooth or (1.0,) * K)
        assert bool((error <= 0.5001 * layer.weight_scale[:, None] / gain).all())
        if calibration.outliers:
            assert torch.equal(
                layer.to_float().weight[:, calibration.outliers], original.weight[:, calibration.outliers]
            )


def test_folded_smoothing_leaves_the_division_to_the_norm() -> None:
    original, x = linear(), torch.randn(16, K)
    powers = tuple(2.0 ** (i % 5 - 2) for i in range(K))  # that round nothing
    explicit = CalibratedInt8Linear.from_calibration(original, Calibration(smooth=powers))
    folded = CalibratedInt8Linear.from_calibration(original, Calibration(smooth=powers, folded=True))
    assert Calibration(smooth=powers, folded=True).is_plain
    assert folded.input_multiplier is None
    assert torch.equal(folded(x / torch.tensor(powers)), explicit(x))


def test_planted_outliers_break_the_plain_layer_and_not_the_side_path() -> None:
    original, x = linear(bias=False), torch.randn(64, K)
    x[:, 7] *= 300
    exact = original(x)
    plain = snr(exact[:, :], Int8Linear.from_float(original)(x))
    side = snr(exact, CalibratedInt8Linear.from_calibration(original, Calibration(outliers=(7,)))(x))
    assert side > plain + 20


@pytest.mark.parametrize("threshold", [None, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_only_up_to_its_number_of_tokens(device: str, threshold: int | None, dtype: torch.dtype) -> None:
    original = linear(dtype=dtype).to(device)
    layer = WeightOnlyInt8Linear.from_float(original, max_tokens=threshold)
    plain = Int8Linear.from_float(original)
    few, many = torch.randn(2, 2, K, device=device).to(dtype), torch.randn(5, K, device=device).to(dtype)
    # Only the weight is rounded: to 1/127 of the row's maximum, uniformly, which is 43 dB for uniform weights; 16-bit
    # results and weights add their own 2**-9.
    assert snr(original(few), layer(few)) > 38
    if threshold is None:
        assert snr(original(many), layer(many)) > 38
    else:
        assert torch.equal(layer(many), plain(many))


def test_weight_only_layer_compiles_once_for_each_side_of_its_threshold() -> None:
    layer = WeightOnlyInt8Linear.from_float(linear(), max_tokens=8)
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 3, 4, 7, 20, 30, 40):
        x = torch.randn(m, K)
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["static", "asymmetric", "smooth", "everything"])
def test_calibrated_layer_compiles_whole(name: str) -> None:
    layer = CalibratedInt8Linear.from_calibration(linear(), CALIBRATIONS[name])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, K)
    assert torch.equal(compiled(x), layer(x))


def test_gradients_of_x_and_bias_are_those_of_the_dequantized_layer() -> None:
    for layer in (
        CalibratedInt8Linear.from_calibration(linear(), CALIBRATIONS["smooth asymmetric"]),
        CalibratedInt8Linear.from_calibration(linear(), CALIBRATIONS["outliers"]),
        WeightOnlyInt8Linear.from_float(linear()),
    ):
        x = torch.randn(6, K, requires_grad=True)
        twin, same = layer.to_float(), x.detach().clone().requires_grad_()
        direction = torch.randn(6, N)
        (layer(x) * direction).sum().backward()
        (twin(same) * direction).sum().backward()
        assert torch.allclose(x.grad, same.grad, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.bias.grad, twin.bias.grad, rtol=1e-5, atol=1e-5)


def test_autocast_decides_the_dtype_of_every_scheme() -> None:
    layers = [
        CalibratedInt8Linear.from_calibration(linear(), CALIBRATIONS["static"]),
        CalibratedInt8Linear.from_calibration(linear(), CALIBRATIONS["smooth"]),
        WeightOnlyInt8Linear.from_float(linear()),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(layer(torch.randn(2, K)).dtype == torch.bfloat16 for layer in layers)


@pytest.mark.gpu
def test_a_cuda_graph_holds_every_scheme() -> None:
    originals = [linear(K, K, torch.bfloat16).cuda() for _ in range(len(CALIBRATIONS) + 2)]
    layers: list[nn.Module] = [
        CalibratedInt8Linear.from_calibration(o, c) for o, c in zip(originals, CALIBRATIONS.values(), strict=False)
    ]
    layers += [WeightOnlyInt8Linear.from_float(o, max_tokens=t) for o, t in zip(originals[-2:], (None, 3), strict=True)]
    x = torch.rand(8, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in layers:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                layer(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            for _ in range(2):
                x.uniform_(-1, 1)
                graph.replay()
                assert torch.equal(y, layer(x)), layer


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_only_around_the_dispatcher_gives_the_operators_bits(dtype: torch.dtype, bias: bool) -> None:
    layer = WeightOnlyInt8Linear.from_float(nn.Linear(K, K, bias=bias, dtype=dtype).cuda())

    def direct(x: torch.Tensor) -> torch.Tensor | None:
        return ops.eager_weight_only(x, layer.weight, layer.weight_scale, layer.bias, K, layer._cell, 64)

    shapes = ((1, K), (64, K), (3, 5, K), (1, 1, K), (2, 2, 2, K), (K,))
    cases = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    cases += [torch.randn(7, 2 * K, device="cuda", dtype=dtype)[:, :K], torch.randn(K, 7, device="cuda", dtype=dtype).T]
    with torch.no_grad():
        for x in cases:
            for _ in range(2):  # the first launch with a weight is another than the later ones
                y = direct(x)
                assert y is not None
                assert torch.equal(y, ops.weight_only_linear(x, layer.weight, layer.weight_scale, layer.bias))
        x = cases[0]
        layer.weight.copy_(-layer.weight)  # in place: the address stays, the values do not
        assert torch.equal(layer(x), ops.weight_only_linear(x, layer.weight, layer.weight_scale, layer.bias))
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)  # elsewhere
        assert torch.equal(layer(x), ops.weight_only_linear(x, layer.weight, layer.weight_scale, layer.bias))
        assert direct(torch.randn(65, K, device="cuda", dtype=dtype)) is None
        nothing = direct(torch.randn(0, K, device="cuda", dtype=dtype))
        assert nothing is None or nothing.shape == (0, K)  # the operator in C++ takes no rows, the launch does not
        assert direct(x.float()) is None
        assert direct(x[:, :-1]) is None
        with torch.autocast("cuda", dtype=dtype):
            assert direct(x) is None
    assert direct(x.clone().requires_grad_()) is None
    assert (direct(x) is None) == bias  # the bias records
    assert direct(x.cpu()) is None


# ---- states ---------------------------------------------------------------------------------------------------------


def every_scheme() -> list[Int8Linear]:
    original = linear()
    return [
        Int8Linear.from_float(original),
        WeightOnlyInt8Linear.from_float(original),
        WeightOnlyInt8Linear.from_float(original, max_tokens=3),
        *(CalibratedInt8Linear.from_calibration(original, c) for c in CALIBRATIONS.values()),
    ]


def test_description_and_state_rebuild_every_scheme() -> None:
    x = torch.randn(5, K)
    for layer in every_scheme():
        twin = build(json.loads(json.dumps(describe(layer))), "cpu")
        twin.load_state_dict(layer.state_dict())
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        assert twin.scheme == layer.scheme


def test_a_float_state_is_quantized_the_same_way_on_load() -> None:
    other = linear()
    for layer in every_scheme():
        calibrated = isinstance(layer, CalibratedInt8Linear)
        fresh = build(describe(layer), "cpu")
        calibration = {n: t for n, t in layer.state_dict().items() if n.startswith(("input", "outlier_index"))}
        fresh.load_state_dict(calibration, strict=False)  # what was found out about the input, not the weight
        fresh.load_state_dict({**calibration, **other.state_dict()})
        made = (
            next(
                c
                for c in CALIBRATIONS.values()
                if CalibratedInt8Linear.from_calibration(other, c)._options() == layer._options()
            )
            if calibrated
            else None
        )
        expected = CalibratedInt8Linear.from_calibration(other, made) if made else type(layer).from_float(other)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), (layer, name)


def test_copies_pickles_and_casts_keep_the_numbers() -> None:
    x = torch.rand(5, K)
    for layer in every_scheme():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
        half = copy.deepcopy(layer).half()
        floats = {name for name, buffer in half.named_buffers() if buffer.dtype == torch.float16}
        assert floats <= {"outlier_weight"}
        assert snr(layer(x), half(x.half())) > 30


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"class": "Int9Linear"},
        {"in_features": "40"},
        {"float_dtype": "int8"},
        {"in_features": 0},
        {"options": {"max_tokens": -1}},
        {"options": {"max_tokens": "all"}},
        {"options": []},
    ],
)
def test_a_description_of_no_layer_is_an_error_in_words(data: dict[str, object]) -> None:
    whole = describe(WeightOnlyInt8Linear.from_float(linear())) if data else {}
    with pytest.raises(ValueError, match=r"no int8 layer|not possible|max_tokens"):
        build({**whole, **data})


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (Calibration(scale=0.0), "must be positive"),
        (Calibration(scale=math.nan), "must be positive"),
        (Calibration(scale=1.0, zero_point=128), "zero point is 128"),
        (Calibration(zero_point=3), "only with a static scale"),
        (Calibration(smooth=(1.0,) * 3), "3 elements"),
        (Calibration(smooth=(1.0,) * (K - 1) + (0.0,)), "not positive"),
        (Calibration(outliers=(K,)), "outlier columns"),
        (Calibration(outliers=(1, 1)), "outlier columns"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(calibration: Calibration, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CalibratedInt8Linear.from_calibration(linear(), calibration)


def test_calibration_survives_json() -> None:
    for calibration in CALIBRATIONS.values():
        assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_conv1d_twins_of_every_scheme() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    original, x = conv1d(N, K), torch.randn(5, K)
    nn.init.normal_(original.weight)
    for name, cls in CLASSES.items():
        if not name.endswith("Conv1D"):
            continue
        made = cls.from_float(original)
        assert snr(original(x), made(x)) > 28
        assert made.to_float().weight.shape == (K, N)
    assert WeightOnlyInt8Conv1D.from_float(original).nf == N


def test_unpatch_leaves_nothing_of_a_scheme_behind() -> None:
    model = nn.Sequential(linear(512, 512))
    before = set(model[0].__dict__)
    hwkern.patch(model, include="*")
    hwkern.unpatch(model)
    assert set(model[0].__dict__) == before
