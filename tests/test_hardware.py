"""hwkern.hardware: peaks against NVIDIA's published figures, the roofline by hand, and machines that lack something."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from fake_gpu import H100

from hwkern import _native, hardware


def h100() -> hardware.Gpu:
    return hardware.gpu_from_properties(0, H100)


@pytest.mark.parametrize(
    ("compute", "sm_count", "boost_mhz", "int8_tops", "fp16_tflops"),
    [
        (80, 108, 1410, 624, 312),  # A100
        (86, 82, 1695, 284, 142),  # RTX 3090
        (87, 16, 1300, 85, 42.5),  # Jetson AGX Orin 64 GB
        (89, 128, 2520, 660.6, 330.3),  # RTX 4090
        (89, 142, 2520, 733, 366.5),  # L40S
        (90, 132, 1830, 1979, 989.4),  # H100 SXM
        (120, 170, 2407, 838, 419),  # RTX 5090
    ],
)
def test_rates_reproduce_the_published_peaks(compute, sm_count, boost_mhz, int8_tops, fp16_tflops):
    properties = H100 | {"compute": compute, "sm_count": sm_count, "clock_khz": boost_mhz * 1000}
    gpu = hardware.gpu_from_properties(0, properties)
    assert gpu.int8_ops == pytest.approx(int8_tops * 1e12, rel=0.01)
    assert gpu.fp16_flops == pytest.approx(fp16_tflops * 1e12, rel=0.01)


def test_peak_uses_the_clock_the_device_reports_and_the_datasheet_is_the_same_at_1830_mhz():
    gpu = h100()
    assert gpu.int8_ops == 132 * 8192 * 1.98e9
    assert gpu.int8_ops_at(1830) == pytest.approx(1979e12, rel=1e-3)


def test_bandwidth_is_memory_clock_times_two_times_bus_width():
    assert h100().bandwidth == pytest.approx(3.35e12, rel=1e-3)


def test_an_undocumented_gpu_has_no_peak_rather_than_a_guess():
    gpu = hardware.gpu_from_properties(0, H100 | {"compute": 103})
    assert (gpu.int8_ops, gpu.fp16_flops, gpu.int8_ops_at(1000)) == (None, None, None)
    assert gpu.supported


def test_an_integrated_gpu_without_a_memory_clock_has_no_bandwidth():
    assert hardware.gpu_from_properties(0, H100 | {"memory_clock_khz": 0}).bandwidth is None


def test_turing_is_too_old():
    assert not hardware.gpu_from_properties(0, H100 | {"compute": 75}).supported


def test_a_large_gemm_is_bound_by_compute():
    floor = hardware.speed_of_light(8192, 8192, 8192, h100())
    assert floor.bound == "compute"
    assert floor.operations == 2 * 8192**3
    assert floor.seconds == floor.compute_seconds == floor.operations / (132 * 8192 * 1.98e9)


def test_one_token_is_bound_by_reading_the_weights():
    floor = hardware.speed_of_light(1, 4096, 4096, h100())
    assert floor.bound == "memory"
    assert floor.bytes == 4096 + 4096 * 4096 + 2 * 4096
    assert floor.microseconds == pytest.approx(floor.bytes / 3.352e12 * 1e6, rel=1e-3)


def test_element_sizes_and_rates_can_be_given():
    floor = hardware.speed_of_light(2, 3, 5, h100(), a_bytes=2, b_bytes=0.5, d_bytes=4, peak=60, bandwidth=1)
    assert floor.bytes == round(2 * 5 * 2 + 3 * 5 * 0.5 + 2 * 3 * 4)
    assert floor.compute_seconds == 1.0
    assert floor.memory_seconds == floor.bytes


def test_without_a_known_peak_only_memory_counts():
    floor = hardware.speed_of_light(4096, 4096, 4096, hardware.gpu_from_properties(0, H100 | {"compute": 103}))
    assert (floor.bound, floor.compute_seconds) == ("memory", None)


def test_without_any_known_rate_the_error_says_what_to_pass():
    unknown = hardware.gpu_from_properties(0, H100 | {"compute": 103, "memory_clock_khz": 0})
    with pytest.raises(ValueError, match="pass peak= and bandwidth="):
        hardware.speed_of_light(1, 1, 1, unknown)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_empty_gemm_has_no_floor(shape):
    with pytest.raises(ValueError, match="at least 1"):
        hardware.speed_of_light(*shape, h100())


def fake_extension(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    extension = SimpleNamespace(cuda_status=lambda: (count, ""), device_properties=lambda i: H100)
    monkeypatch.setattr(_native, "extension", lambda: extension)


def test_gpus_are_numbered_like_cuda_numbers_them(monkeypatch):
    fake_extension(monkeypatch, 2)
    assert [gpu.index for gpu in hardware.gpus()] == [0, 1]
    assert hardware.gpu(1).to_dict()["name"] == H100["name"]


@pytest.mark.parametrize(("count", "sentence"), [(0, "this process sees none"), (2, "there are 2")])
def test_a_gpu_that_is_not_there(monkeypatch, count, sentence):
    fake_extension(monkeypatch, count)
    with pytest.raises(ValueError, match=sentence):
        hardware.gpu(7)


X86 = "processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\nflags\t\t: fpu avx2 avx512_vnni amx_int8 amx_tile\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU implementer\t: 0x41\n\n"


def test_int8_units_of_x86():
    assert hardware.parse_cpuinfo(X86 * 2) == ("Example CPU @ 2.00GHz", ("AMX-INT8", "AVX512-VNNI"))


def test_int8_units_of_arm():
    assert hardware.parse_cpuinfo(ARM) == ("", ("Arm I8MM", "Arm DotProd"))


def test_avx2_alone_is_no_int8_unit():
    assert hardware.parse_cpuinfo("model name : Old\nflags : sse2 avx2\n") == ("Old", ())


def test_this_cpu_has_a_name_and_cores():
    cpu = hardware.cpu()
    assert cpu.name
    assert cpu.cores >= 1
    assert isinstance(cpu.to_dict()["int8_units"], list)


def test_hardware_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from hwkern import hardware; print(hardware.cpu().cores)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_this_gpu_has_plausible_figures():
    gpu = hardware.gpu(0)
    assert gpu.supported
    assert 10 <= gpu.sm_count <= 256
    assert 500 <= gpu.clock_mhz <= 4000
    assert gpu.bandwidth is None or 1e11 < gpu.bandwidth < 2e13
