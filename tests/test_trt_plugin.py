"""The TensorRT plugin libraries without a GPU and without TensorRT: trt_harness.cpp plays its part.

What needs one of TensorRT's own libraries is in test_trt_runtimes.py, what needs a GPU in test_trt_enqueue.py.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trt_harness as ht
from trt_harness import BF16, BOOL, CHW4, FLOAT, HALF, INT8, INT32, INT64, Field, Harness, Plugin, T, integer, text

import hwkern
from hwkern import _native, doctor

HEADERS = ht.header_folders()
CUDA = ht.cuda_include()
PLUGIN_HEADERS = {v: f for v, f in HEADERS.items() if int(v.split(".")[0]) >= 10}
LIBRARIES = sorted(_native.tensorrt_plugins().items())

HAS_NORM = hasattr(_native.extension(), "norm_quantize")
needs_norm = pytest.mark.skipif(not HAS_NORM, reason="this build of hwkern has no fused norm")

no_headers = "no NvInferRuntime.h of TensorRT 10 or newer here: name a folder in HWKERN_TENSORRT_HEADERS"


@pytest.fixture(
    scope="module", params=sorted(PLUGIN_HEADERS) or [pytest.param("", marks=pytest.mark.skip(reason=no_headers))]
)
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """The one binary, seen by a program that was compiled with another version's headers."""
    plugin = _native.tensorrt_plugins().get("libhwkern_trt.so")
    if plugin is None:
        pytest.skip("this build of hwkern has no libhwkern_trt.so: it comes with GPU kernels on Linux")
    if CUDA is None:
        pytest.skip("no cuda_runtime_api.h here, which NVIDIA's headers include")
    made = Harness(ht.compile_harness(PLUGIN_HEADERS[request.param], CUDA, tmp_path_factory.mktemp("trt")), plugin)
    yield made
    made.close()


@pytest.fixture
def create(harness: Harness) -> Iterator[Callable[..., Plugin]]:
    """LinearInt8 with in_features 100 and the fields given; destroyed after the test."""
    made: list[Plugin] = []

    def create(*fields: Field, op: str = "LinearInt8", in_features: int | None = 100) -> Plugin:
        first = [] if in_features is None or op != "LinearInt8" else [integer("in_features", in_features)]
        plugin = harness.create(op, *first, *fields)
        assert plugin is not None, harness.sentences
        made.append(plugin)
        return plugin

    yield create
    for plugin in made:
        plugin.destroy()


# ---- The libraries as files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "path"), LIBRARIES)
def test_library_exports_its_entry_points_only(name: str, path: Path) -> None:
    if not shutil.which("nm"):
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    common = {"setLoggerFinder", "hwkern_trt_version", "hwkern_trt_set_log", "hwkern_trt_last_error"}
    own = {"getCreators"}
    if name == "libhwkern_trt8.so":
        own = {"getPluginCreators", "hwkern_trt8_register", "hwkern_trt8_prefer_half"}
    assert {line.split()[0] for line in lines} == common | own


@pytest.mark.parametrize(("name", "path"), LIBRARIES)
def test_library_links_nothing_of_nvidia(name: str, path: Path) -> None:
    if not shutil.which("readelf"):
        pytest.skip("readelf (binutils) is not installed")
    listed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listed)
    assert needed
    assert not [n for n in needed if re.match(r"lib(nv|cuda|cud|cublas|tensorrt|torch|python)", n)], needed
    undefined = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    assert not re.search(r"getPluginRegistry|nvinfer|getLogger", undefined.stdout)


def test_plugins_are_listed_only_when_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        __file__ = str(tmp_path / "_C.so")

    monkeypatch.setattr(_native, "extension", Module)
    assert _native.tensorrt_plugins() == {}
    (tmp_path / "libhwkern_trt.so").write_bytes(b"")
    assert _native.tensorrt_plugins() == {"libhwkern_trt.so": tmp_path / "libhwkern_trt.so"}


@pytest.mark.parametrize("there", [["libhwkern_trt.so"], []])
def test_doctor_says_which_plugins_are_there(there: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "tensorrt_plugins", lambda: {name: Path("lib") / name for name in there})
    lines = [f for f in doctor.diagnose(check=False).findings if f.subject == "TensorRT plugin"]
    assert len(lines) == 1
    assert lines[0].level == (doctor.OK if there else doctor.NOTE)
    assert ("TensorRT 10.1" if there else "HWKERN_CUDA=ON") in lines[0].text


SOURCES = {"8.6": "plugin_v2.cpp"} | dict.fromkeys(PLUGIN_HEADERS, "plugin_v3.cpp")


@pytest.mark.parametrize(
    "version", sorted(set(HEADERS) & set(SOURCES)) or [pytest.param("", marks=pytest.mark.skip(reason=no_headers))]
)
def test_adaptor_compiles_with_headers_of_this_version(version: str) -> None:
    if CUDA is None:
        pytest.skip("no cuda_runtime_api.h here, which NVIDIA's headers include")
    source = ht.ROOT / "csrc/tensorrt" / SOURCES[version]
    done = subprocess.run(
        ht.compile_command(HEADERS[version], CUDA, "-fsyntax-only", source), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("8.6" not in HEADERS or CUDA is None, reason=no_headers)
def test_builds_in_half_have_no_float32_to_choose(tmp_path: Path) -> None:
    library = dict(LIBRARIES).get("libhwkern_trt8.so")
    if library is None:
        pytest.skip("this build of hwkern has no libhwkern_trt8.so")
    program = tmp_path / "types"
    source = ht.ROOT / "tests/trt8_types.cpp"
    subprocess.run(ht.compile_command(HEADERS["8.6"], CUDA, source, "-o", program, "-ldl"), check=True)
    said = subprocess.run([program, library], capture_output=True, text=True, check=True).stdout.split("\n")
    free, half = "float32 1 float16 1 int8 0", "float32 0 float16 1 int8 0"
    assert said[:5] == [free, half, half, half, free]  # before, one build, two, one of them ended, none


# ---- Creation --------------------------------------------------------------------------------------------------------


def test_creators(harness: Harness) -> None:
    always = {"LinearInt8", "Quantize", "GatedLinearInt8", "Attention"}
    assert set(harness.creators()) == always | ({"NormLinearInt8"} if HAS_NORM else set())
    for i in harness.creators().values():
        assert harness.lib.h_creator_version(harness.library, i) == b"1"
        assert harness.lib.h_creator_namespace(harness.library, i) == b"hwkern"
    assert set(harness.field_names("LinearInt8")) == {
        *(
            "in_features",
            "out_features",
            "scheme",
            "activation",
            "has_bias",
            "has_input_scale",
            "has_residual",
            "config",
            "constant_weights",
        )
    }
    assert harness.field_names("Quantize") == []


def test_fields_may_come_as_int64_and_strings_without_a_final_nul(harness: Harness) -> None:
    plugin = harness.create(
        "LinearInt8",
        Field("in_features", struct.pack("<q", 64), ht.FIELD_INT64, 1),
        text("scheme", "w8a8_dynamic", final_nul=False),
        text("activation", "gelu", final_nul=True),
    )
    assert plugin is not None, harness.sentences
    assert "in_features=64 " in plugin.cache_id
    assert "activation=gelu " in plugin.cache_id
    assert hwkern.__version__ in plugin.cache_id or hwkern.__version__ == "0+unknown"
    plugin.destroy()


STATIC = [text("scheme", "w8a8_static"), integer("has_input_scale", 1)]
BAD_FIELDS: list[tuple[str, list[Field], str]] = [
    ("nothing", [], "needs the field in_features"),
    ("zero K", [integer("in_features", 0)], "needs the field in_features"),
    ("negative K", [integer("in_features", -100)], r"in_features is -100; it must be 1 to 131071"),
    ("K beyond int32 sums", [integer("in_features", 2**17)], r"in_features is 131072"),
    ("K beyond int32", [Field("in_features", struct.pack("<q", 2**40), ht.FIELD_INT64, 1)], "1099511627776.*absurd"),
    ("two K", [Field("in_features", b"\x40\0\0\0\x40\0\0\0", ht.FIELD_INT32, 2)], "one integer, but has 2"),
    ("no data", [Field("in_features", None, ht.FIELD_INT32, 1)], "one integer"),
    ("a float K", [Field("in_features", struct.pack("<f", 64), ht.FIELD_FLOAT32, 1)], "must be an integer"),
    ("a text K", [text("in_features", "64")], "integer"),
    ("negative N", [integer("in_features", 64), integer("out_features", -1)], "out_features is -1"),
    ("unknown scheme", [integer("in_features", 64), text("scheme", "w4a4")], '"w4a4"; known are: w8a8_dynamic, w8a8_'),
    ("scheme as number", [integer("in_features", 64), integer("scheme", 1)], "must be a string"),
    ("endless scheme", [integer("in_features", 64), text("scheme", "w" * 5000)], "must be a string of 1 to 64"),
    ("negative length", [integer("in_features", 64), Field("scheme", b"w8", ht.FIELD_CHAR, -5)], "must be a string"),
    ("unknown activation", [integer("in_features", 64), text("activation", "mish")], "known are: none, relu, gelu"),
    ("flag of 2", [integer("in_features", 64), integer("has_bias", 2)], "must be 0 or 1"),
    ("static without scale", [integer("in_features", 64), text("scheme", "w8a8_static")], "has_input_scale is 0"),
    ("scale without static", [integer("in_features", 64), integer("has_input_scale", 1)], "scheme is w8a8_dynamic"),
    ("unknown config", [integer("in_features", 64), integer("config", 99999)], "config 99999 is no config id"),
    ("config of weight-only", [integer("in_features", 64), integer("config", 300)], "for LinearInt8 with .* w8a8_dyn"),
    ("K beyond one launch's", [integer("in_features", 1000), integer("config", 401)], "config 401 is no config id"),
    (
        "one launch's config of static scales",
        [integer("in_features", 64), integer("config", 400), *STATIC],
        "config 400 is no config id of this hwkern for LinearInt8 with the scheme w8a8_static",
    ),
    ("unknown field", [integer("in_features", 64), integer("in_feature", 64)], 'no field "in_feature"'),
    ("too many fields", [integer("in_features", 64)] * 40, "broken"),
]


@pytest.mark.parametrize(("fields", "sentence"), [c[1:] for c in BAD_FIELDS], ids=[c[0] for c in BAD_FIELDS])
def test_bad_fields_are_refused_with_a_sentence(harness: Harness, fields: list[Field], sentence: str) -> None:
    assert harness.create("LinearInt8", *fields) is None
    assert len(harness.sentences) == 1
    assert re.search(sentence, harness.sentences[0]), harness.sentences[0]
    assert harness.last_error() == harness.sentences[0]


@pytest.mark.parametrize("runtime", [0, 1])
@pytest.mark.parametrize("null_collection", [0, 1])
def test_broken_field_collections_are_refused(harness: Harness, runtime: int, null_collection: int) -> None:
    harness.sentences.clear()
    assert not harness.lib.h_create_without_fields(
        harness.library, harness.creators()["LinearInt8"], runtime, null_collection
    )
    assert harness.sentences


def test_quantize_has_no_fields(harness: Harness) -> None:
    assert harness.create("Quantize", integer("in_features", 4)) is None
    plugin = harness.create("Quantize")
    assert plugin is not None
    plugin.destroy()


# ---- Types and shapes ------------------------------------------------------------------------------------------------

Create = Callable[..., Plugin]


def linear_tensors(
    x: T, n: int, k: int, bias: int | None = None, scale: tuple[int, ...] | None = None, residual: bool = False,
    int32: bool = False,
) -> list[T]:  # fmt: skip
    """Inputs and the output of LinearInt8."""
    k16 = -(-k // 16) * 16
    weight = T(INT32, (n, k16 // 4)) if int32 else T(INT8, (n, k16))
    tensors = [x, weight, T(FLOAT, (n,))]
    tensors += [T(bias, (n,))] if bias is not None else []
    tensors += [T(FLOAT, scale)] if scale is not None else []
    y = T(x.type, (*x.dims[:-1], n))
    return [*tensors, *([y] if residual else []), y]


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16])
@pytest.mark.parametrize("int32", [False, True])
def test_every_supported_type_is_taken_and_the_output_has_that_of_x(create: Create, dtype: int, int32: bool) -> None:
    plugin = create(integer("has_bias", 1), integer("has_residual", 1))
    tensors = linear_tensors(T(dtype, (2, 3, 100)), 64, 100, bias=FLOAT, residual=True, int32=int32)
    assert all(plugin.supports(i, tensors) for i in range(len(tensors)))
    assert plugin.output_types([t.type for t in tensors[:-1]]) == [dtype]


@pytest.mark.parametrize("wrong", [INT8, INT32, BOOL, INT64])
def test_other_types_are_not_taken(create: Create, wrong: int) -> None:
    plugin = create(integer("has_bias", 1), integer("has_residual", 1))
    tensors = linear_tensors(T(HALF, (2, 3, 100)), 64, 100, bias=FLOAT, residual=True)
    for i, tensor in enumerate(tensors):
        changed = [*tensors[:i], T(wrong, tensor.dims), *tensors[i + 1 :]]
        assert plugin.supports(i, changed) == (i == 1 and wrong in (INT8, INT32))


def test_mixed_float_types_and_other_layouts_are_not_taken(create: Create) -> None:
    plugin = create(integer("has_residual", 1))
    tensors = linear_tensors(T(HALF, (2, 3, 100)), 64, 100, residual=True)
    for i in (3, 4):
        changed = [*tensors[:i], T(BF16, tensors[i].dims), *tensors[i + 1 :]]
        assert not plugin.supports(i, changed), "residual and output have x's type"
    assert not any(plugin.supports(i, tensors, CHW4) for i in range(len(tensors)))
    assert not plugin.supports(0, tensors[:-1]), "one input too few"


@pytest.mark.parametrize("x", [(100,), (-1, 100), (2, -2, 100), (2, 3, 4, -3, 5, 6, 7, 100)])
def test_output_keeps_all_leading_dimensions(create: Create, x: tuple[int, ...]) -> None:
    plugin = create()
    tensors = linear_tensors(T(HALF, x), 64, 100)
    assert plugin.output_shapes(tensors[:-1]) == [(*x[:-1], 64)]


def test_weight_only_takes_16_bit_types_or_is_refused_with_a_sentence(harness: Harness, create: Create) -> None:
    if not hasattr(_native.extension(), "weight_only_linear"):
        assert harness.create("LinearInt8", integer("in_features", 100), text("scheme", "w8a16")) is None
        assert "no kernels for the scheme w8a16" in harness.sentences[0]
        return
    plugin = create(text("scheme", "w8a16"))
    for dtype, fine in ((HALF, True), (BF16, True), (FLOAT, False)):
        tensors = linear_tensors(T(dtype, (4, 100)), 64, 100)
        assert plugin.supports(0, tensors) == fine
        assert plugin.on_shape_change(tensors) == fine
    assert plugin.workspace(linear_tensors(T(HALF, (512, 100)), 64, 100)) == 0


def test_quantize_gives_int8_and_a_scale_per_row(create: Create) -> None:
    plugin = create(op="Quantize")
    assert plugin.output_types([BF16]) == [INT8, FLOAT]
    assert plugin.output_shapes([T(BF16, (-1, 7, 100))]) == [(-1, 7, 100), (-1, 7)]
    good = [T(BF16, (3, 100)), T(INT8, (3, 100)), T(FLOAT, (3,))]
    assert all(plugin.supports(i, good) for i in range(3))
    assert not plugin.supports(2, [*good[:2], T(HALF, (3,))])


def replaced(index: int, tensor: T) -> Callable[[list[T]], list[T]]:
    return lambda tensors: [*tensors[:index], tensor, *tensors[index + 1 :]]


BAD_TENSORS: list[tuple[str, Callable[[list[T]], list[T]], str]] = [
    ("one input too few", lambda t: [*t[:2], *t[3:]], "has 3 inputs, but its fields speak of 4"),
    ("x of another K", replaced(0, T(HALF, (4, 99))), "last dimension of x is 99, but in_features 100 needs 100"),
    ("x without dimensions", replaced(0, T(HALF, ())), "at least one dimension"),
    ("unpadded weight", replaced(1, T(INT8, (64, 100))), "100 columns of int8.*needs 112"),
    ("int32 weight unpadded", replaced(1, T(INT32, (64, 25))), "25 columns of int32.*needs 28"),
    ("weight of three dimensions", replaced(1, T(INT8, (1, 64, 112))), "two dimensions"),
    ("weight without rows", replaced(1, T(INT8, (0, 112))), "no rows"),
    ("weight in half", replaced(1, T(HALF, (64, 112))), "weight cannot be float16"),
    ("scale per tensor", replaced(2, T(FLOAT, (1,))), "weight_scale has 1 elements, but the rows of weight are 64"),
    ("scale with two dimensions", replaced(2, T(FLOAT, (64, 1))), "weight_scale must have one dimension"),
    ("bias of another N", replaced(3, T(HALF, (65,))), "bias has 65 elements"),
]


@pytest.mark.parametrize(("change", "sentence"), [c[1:] for c in BAD_TENSORS], ids=[c[0] for c in BAD_TENSORS])
def test_bad_shapes_are_refused_with_a_sentence(
    harness: Harness, create: Create, change: Callable[[list[T]], list[T]], sentence: str
) -> None:
    plugin = create(integer("has_bias", 1))
    good = linear_tensors(T(HALF, (4, 100)), 64, 100, bias=HALF)
    assert plugin.on_shape_change(good)
    assert plugin.configure(good, good, good, good)
    bad = [*change(good[:-1]), good[-1]]
    for call in (lambda: plugin.on_shape_change(bad), lambda: plugin.configure(bad, bad, bad, bad)):
        harness.sentences.clear()
        assert not call()
        assert re.search(sentence, harness.sentences[0]), harness.sentences


def test_input_scale_is_one_value_or_one_per_column(create: Create) -> None:
    plugin = create(text("scheme", "w8a8_static"), integer("has_input_scale", 1))
    for scale, fine in (((1,), True), ((), True), ((100,), True), ((64,), False), ((1, 1), False)):
        assert plugin.on_shape_change(linear_tensors(T(HALF, (4, 100)), 64, 100, scale=scale)) == fine, scale


def test_residual_must_have_the_shape_of_the_output(create: Create) -> None:
    plugin = create(integer("has_residual", 1))
    good = linear_tensors(T(HALF, (4, 100)), 64, 100, residual=True)
    assert plugin.on_shape_change(good)
    for dims in ((4, 100), (64,), (1, 64), (3, 64)):
        assert not plugin.on_shape_change([*good[:3], T(HALF, dims), good[4]]), dims


def test_out_features_is_compared_with_the_weight(create: Create) -> None:
    assert create(integer("out_features", 64)).on_shape_change(linear_tensors(T(HALF, (4, 100)), 64, 100))
    assert not create(integer("out_features", 65)).on_shape_change(linear_tensors(T(HALF, (4, 100)), 64, 100))


def test_wildcards_are_no_reason_to_refuse(create: Create) -> None:
    plugin = create()
    descs = linear_tensors(T(HALF, (-1, -1, 100)), 64, 100)
    low, opt, high = (linear_tensors(T(HALF, (b, s, 100)), 64, 100) for b, s in ((1, 1), (4, 32), (8, 64)))
    assert plugin.configure(descs, low, opt, high)
    # int8 [512, 112] and a float32 scale per row: what linear_workspace_bytes says of M = 512, K = 100.
    assert plugin.workspace(high) == 512 * 112 + 512 * 4
    assert len(set(plugin.tactics())) == len(plugin.tactics())
    assert all(t > 0 for t in plugin.tactics()), "0 is TensorRT's own"


def test_static_scheme_needs_no_room_for_scales(create: Create) -> None:
    plugin = create(text("scheme", "w8a8_static"), integer("has_input_scale", 1))
    assert plugin.workspace(linear_tensors(T(HALF, (512, 100)), 64, 100, scale=(1,))) == 512 * 112


# ---- NormLinearInt8 --------------------------------------------------------------------------------------------------


def real(name: str, value: float) -> Field:
    return Field(name, struct.pack("<f", value), ht.FIELD_FLOAT32, 1)


@needs_norm
def test_norm_linear_takes_its_inputs_in_order_and_gives_three_outputs(create: Create) -> None:
    flags = [integer(f"has_{name}", 1) for name in ("skip", "norm_bias", "bias", "norm_output", "sum_output")]
    plugin = create(integer("in_features", 100), real("epsilon", 1e-5), *flags, op="NormLinearInt8")
    x, vector = T(HALF, (2, -5, 100)), T(HALF, (100,))
    inputs = [x, x, vector, T(FLOAT, (100,)), T(INT8, (64, 112)), T(FLOAT, (64,)), T(HALF, (64,))]
    assert plugin.output_types([t.type for t in inputs]) == [HALF] * 3
    assert plugin.output_shapes(inputs) == [(2, -5, 64), (2, -5, 100), (2, -5, 100)]
    tensors = [*inputs, T(HALF, (2, -5, 64)), x, x]
    assert all(plugin.supports(i, tensors) for i in range(len(tensors)))
    for i, wrong in ((1, FLOAT), (2, INT8), (3, INT32), (4, HALF), (5, HALF), (8, FLOAT)):
        assert not plugin.supports(i, replaced(i, T(wrong, tensors[i].dims))(tensors)), i


@needs_norm
def test_different_norms_have_different_timing_cache_ids(create: Create) -> None:
    first = [integer("in_features", 2**17 - 1), integer("out_features", 2**31 - 1), text("activation", "gelu_tanh")]
    skip = integer("has_skip", 1)
    variants = [
        [],
        [real("epsilon", 1.2345678e-5)],
        [text("norm", "rms_rounded")],
        [skip],
        [skip, integer("has_sum_output", 1)],
    ]
    ids = [create(*first, *fields, op="NormLinearInt8").cache_id for fields in variants]
    assert len(set(ids)) == len(ids)


@needs_norm
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([real("epsilon", -1e-5)], "epsilon -1e-05"),
        ([real("epsilon", math.nan)], "must be finite"),
        ([real("norm_offset", math.inf)], "must be finite"),
        ([integer("epsilon", 1)], "one float"),
        ([text("norm", "group")], "known are: layer, rms, rms_rounded"),
        ([text("norm", "rms"), integer("has_norm_bias", 1)], 'only the norm "layer" takes a bias'),
        ([integer("has_sum_output", 1)], "without a skip the sum is x"),
        ([integer("has_skip", 3)], "must be 0 or 1"),
    ],
)
def test_bad_norms_are_refused_with_a_sentence(harness: Harness, fields: list[Field], sentence: str) -> None:
    assert harness.create("NormLinearInt8", integer("in_features", 64), *fields) is None
    assert sentence in harness.sentences[0]


@needs_norm
def test_norm_linear_checks_the_shapes_of_skip_and_norm(harness: Harness, create: Create) -> None:
    plugin = create(integer("in_features", 100), integer("has_skip", 1), op="NormLinearInt8")
    x = T(HALF, (4, 100))
    good = [x, x, T(HALF, (100,)), T(INT8, (64, 112)), T(FLOAT, (64,)), T(HALF, (4, 64))]
    assert plugin.on_shape_change(good), harness.sentences
    assert plugin.workspace(good) == 4 * 112 + 4 * 4
    for i, dims, sentence in ((1, (3, 100), "skip must have"), (2, (64,), "norm_weight has 64 elements")):
        assert not plugin.on_shape_change(replaced(i, T(HALF, dims))(good))
        assert sentence in harness.sentences[-1]


# ---- GatedLinearInt8 -------------------------------------------------------------------------------------------------


def test_gated_linear_reads_two_halves(harness: Harness, create: Create) -> None:
    plugin = create(integer("in_features", 100), text("gate", "silu"), integer("has_residual", 1), op="GatedLinearInt8")
    inputs = [T(HALF, (2, 3, 200)), T(INT8, (64, 112)), T(FLOAT, (64,)), T(HALF, (2, 3, 64))]
    tensors = [*inputs, T(HALF, (2, 3, 64))]
    assert all(plugin.supports(i, tensors) for i in range(len(tensors)))
    assert plugin.output_types([t.type for t in inputs]) == [HALF]
    assert plugin.output_shapes(inputs) == [(2, 3, 64)]
    assert plugin.on_shape_change(tensors), harness.sentences
    assert plugin.workspace(tensors) == 6 * 112 + 6 * 4  # of what is quantized: K columns
    assert not plugin.on_shape_change(replaced(0, T(HALF, (2, 3, 100)))(tensors))
    assert "the last dimension of x is 100, but in_features 100 needs 200" in harness.sentences[-1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([text("gate", "mish")], "known are: none, relu"),
        ([text("scheme", "w8a16")], "GatedLinearInt8 quantizes x: its scheme cannot be w8a16"),
        ([text("scheme", "w8a8_static")], "has_input_scale is 0"),
        ([integer("config", 400)], "config 400 is no config id of this hwkern for GatedLinearInt8"),
    ],
)
def test_bad_gates_are_refused_with_a_sentence(harness: Harness, fields: list[Field], sentence: str) -> None:
    assert harness.create("GatedLinearInt8", integer("in_features", 64), *fields) is None
    assert sentence in harness.sentences[0]


def test_different_gates_have_different_timing_cache_ids(create: Create) -> None:
    first = integer("in_features", 64)
    ids = [create(first, text("gate", gate), op="GatedLinearInt8").cache_id for gate in ("none", "silu", "gelu_tanh")]
    assert len(set(ids)) == len(ids)


# ---- Attention -------------------------------------------------------------------------------------------------------


def attention_fields(**values: int) -> list[Field]:
    fields = {"heads": 4, "kv_heads": 2, "head_dim": 64} | values
    return [*(integer(name, value) for name, value in fields.items()), real("scale", 0.125)]


def test_attention_takes_a_merged_product_tables_and_a_mask(harness: Harness, create: Create) -> None:
    plugin = create(*attention_fields(has_rotary=1, has_mask=1), op="Attention")
    x, table = T(HALF, (2, 10, 512)), T(FLOAT, (1, 1, 10, 64))
    tensors = [x, table, table, T(HALF, (2, 1, 1, 10)), T(HALF, (2, 10, 256))]
    assert plugin.output_types([t.type for t in tensors[:4]]) == [HALF]
    assert plugin.output_shapes(tensors[:4]) == [(2, 10, 256)]
    assert all(plugin.supports(i, tensors) for i in range(5))
    for i, wrong in ((0, FLOAT), (1, HALF), (3, FLOAT), (4, FLOAT)):
        assert not plugin.supports(i, replaced(i, T(wrong, tensors[i].dims))(tensors)), i
    assert plugin.on_shape_change(tensors), harness.sentences
    assert plugin.workspace(tensors) == 2 * 10 * 2 * 64 * 2  # rotated keys
    assert plugin.tactics() == []
    for i, dims, sentence in (
        (0, (2, 10, 500), "x must be"), (0, (20, 512), "x must be"), (1, (1, 1, 9, 64), "cosine must be"),
        (2, (2, 1, 10, 64), "sine must be"), (3, (3, 1, 1, 10), "mask must have"), (3, (10, 1), "mask must have"),
    ):  # fmt: skip
        assert not plugin.on_shape_change(replaced(i, T(tensors[i].type, dims))(tensors))
        assert sentence in harness.sentences[-1]
    for dims in ((10,), (10, 10), (1, 4, 10, 10)):
        assert plugin.on_shape_change(replaced(3, T(HALF, dims))(tensors)), harness.sentences


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ([], "heads 0 must be a multiple"),
        (attention_fields(kv_heads=3), "heads 4 must be a multiple of kv_heads 3"),
        (attention_fields(heads=2**17), "1 to 65535"),
        (attention_fields(head_dim=80), "head_dim is 80"),
        ([*attention_fields(), real("scale", -1.0)], "scale -1 must be positive"),
        ([*attention_fields(), real("scale", math.inf)], "must be positive"),
        (attention_fields(causal=1, has_mask=1), "causal or with a mask"),
        (attention_fields(has_rotary=2), "must be 0 or 1"),
        (attention_fields(in_features=4), 'no field "in_features"'),
    ],
)
def test_bad_attentions_are_refused_with_a_sentence(harness: Harness, fields: list[Field], sentence: str) -> None:
    assert harness.create("Attention", *fields) is None
    assert sentence in harness.sentences[0]


# ---- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op", ["LinearInt8", "Quantize", "GatedLinearInt8", "Attention", pytest.param("NormLinearInt8", marks=needs_norm)]
)
def test_state_makes_the_same_plugin_again(harness: Harness, create: Create, op: str) -> None:
    linear = [integer("has_bias", 1), text("activation", "silu"), integer("config", 3)]
    normed = [integer("in_features", 100), real("epsilon", 1e-6), text("norm", "rms"), *linear]
    gated = [integer("in_features", 100), text("gate", "gelu"), *linear]
    known = {"LinearInt8": linear, "NormLinearInt8": normed, "GatedLinearInt8": gated, "Attention": attention_fields()}
    fields = known.get(op, [])
    plugin = create(*fields, op=op)
    name, state = plugin.serialize()
    for copy in (harness.restore(op, state, name), plugin.clone(), plugin.attach()):
        assert copy is not None, harness.sentences
        assert copy.serialize() == (name, state)
        assert copy.cache_id == plugin.cache_id
        copy.destroy()


def test_different_plugins_have_different_timing_cache_ids(create: Create) -> None:
    variants = [
        [],
        [integer("has_bias", 1)],
        [text("activation", "relu")],
        [integer("config", 2)],
        [integer("constant_weights", 1)],
    ]
    ids = [create(*fields).cache_id for fields in variants] + [create(op="Quantize").cache_id]
    assert len(set(ids)) == len(ids)


def test_no_truncated_or_changed_state_is_accepted(harness: Harness, create: Create) -> None:
    _, state = create(integer("has_bias", 1)).serialize()
    bad = [state[:n] for n in range(len(state))] + [state + b"\0", state * 2, os.urandom(len(state))]
    bad += [
        bytes(b ^ (bit if i == at else 0) for i, b in enumerate(state)) for at in range(len(state)) for bit in (1, 128)
    ]
    for data in bad:
        plugin = harness.restore("LinearInt8", data)
        assert plugin is None, data
        assert harness.sentences
        assert "rebuild the engine" in harness.sentences[0]


def test_a_newer_state_is_named_as_such(harness: Harness, create: Create) -> None:
    _, state = create().serialize()
    assert harness.restore("LinearInt8", state[:4] + struct.pack("<I", 99) + state[8:] + b"more") is None
    assert "holds format 99 of this op and this hwkern reads format 3" in harness.sentences[0]


def checksummed(state: bytes) -> bytes:
    """``state`` with a checksum that fits (FNV-1a), as a malicious or broken writer could make it."""
    value = 2166136261
    for byte in state[:-4]:
        value = ((value ^ byte) * 16777619) % 2**32
    return state[:-4] + struct.pack("<I", value)


def test_state_with_a_good_checksum_is_still_judged(harness: Harness, create: Create) -> None:
    _, state = create().serialize()
    assert checksummed(state) == state
    for offset, value in (
        (8, 2),
        (12, 7),
        (12, -1),
        (16, 99),
        (20, -5),
        (20, 2**20),
        (20, 0),
        (24, -1),
        (28, 5555),
        (32, 2),
        (36, 3),
        (48, 9),
    ):
        bad = checksummed(state[:offset] + struct.pack("<i", value) + state[offset + 4 :])
        assert harness.restore("LinearInt8", bad) is None, (offset, value)
        assert harness.sentences


def test_state_under_another_name_or_of_another_op_is_refused(harness: Harness, create: Create) -> None:
    _, state = create().serialize()
    assert harness.restore("LinearInt8", state, name="weights") is None
    assert "holds no data" in harness.sentences[0]
    assert harness.restore("Quantize", state) is None
    assert "another op" in harness.sentences[0]
