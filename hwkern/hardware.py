"""What this machine is: GPUs with their peak rates, the CPU with its integer units, and speed-of-light maths.

Needs neither torch nor a GPU. Rates are per second, sizes in bytes, clocks in MHz; what NVIDIA does not document is
``None``, never a guess.

A peak here is a bound: documented operations per SM and clock, times SMs, times the *highest clock the device
reports*. Datasheets quote a lower boost clock. An H100 SXM reports 1980 MHz, which gives 132 · 8192 · 1.98e9 = 2141e12
INT8 operations per second, while the datasheet's 1979e12 is the same product at 1830 MHz. 2010e12 has been measured
on one in short bursts, so the datasheet's number is not a bound and "percent of speed of light" against it could pass
100. A long run is held below both by the power limit; :meth:`Gpu.int8_ops_at` gives the peak at a measured clock.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import _native

#: Oldest compute capability that hwkern's kernels run on: cp.async and mma.sync m16n8k32 for int8 came with it.
MIN_COMPUTE = 80


@dataclass(frozen=True)
class TensorRates:
    """Dense tensor-core operations (a multiply and an add count as two) per SM and clock."""

    int8: int
    fp16: int


# Each row follows from NVIDIA's own figures: dense peak / (SMs × boost clock), which comes out within 1 % of a power
# of two. The fp16 rate is the tensor core's own; GeForce cards halve it when accumulating in float32.
#   compute   product: SMs, boost MHz, INT8 TOPS, FP16 TFLOPS (dense)                    source
TENSOR_RATES: dict[int, TensorRates] = {
    80: TensorRates(4096, 2048),  # A100: 108, 1410, 624, 312                            A100 architecture whitepaper
    86: TensorRates(2048, 1024),  # RTX 3090: 82, 1695, 284, 142                         GA102 architecture whitepaper
    87: TensorRates(4096, 2048),  # Jetson AGX Orin 64 GB: 16, 1300, 85, 43              AGX Orin technical brief
    89: TensorRates(2048, 1024),  # RTX 4090: 128, 2520, 660.6, 330.3                    Ada architecture whitepaper
    90: TensorRates(8192, 4096),  # H100 SXM: 132, 1830, 1979, 989.4                     H100 architecture whitepaper
    100: TensorRates(16384, 8192),  # B200: 148, 1850, 4500, 2250                        HGX B200 datasheet
    120: TensorRates(2048, 1024),  # RTX 5090: 170, 2407, 838, 419                       RTX Blackwell whitepaper
}
# Left out on purpose: 103 (B300: its INT8 rate is far below B200's and not published per SM), 110 and 121 (no INT8
# figure apart from FP4 and FP8 ones).


@dataclass(frozen=True)
class Gpu:
    """One CUDA device, as the driver and NVIDIA's documents describe it."""

    index: int
    name: str
    compute: int  #: compute capability times ten, e.g. 90
    sm_count: int
    clock_mhz: float  #: highest SM clock the device reports
    l2_bytes: int
    memory_bytes: int
    shared_bytes_per_sm: int
    shared_bytes: int  #: most shared memory that one block may have
    bandwidth: float | None  #: bytes/s of device memory: memory clock × 2 (double data rate) × bus width
    int8_ops: float | None  #: dense INT8 tensor operations/s at ``clock_mhz``
    fp16_flops: float | None  #: dense FP16/BF16 tensor operations/s at ``clock_mhz``

    @property
    def supported(self) -> bool:
        """Whether hwkern's kernels run on this device."""
        return self.compute >= MIN_COMPUTE

    def int8_ops_at(self, clock_mhz: float) -> float | None:
        """Dense INT8 tensor operations/s at another clock, for example the one measured under load."""
        rates = TENSOR_RATES.get(self.compute)
        return None if rates is None else rates.int8 * self.sm_count * clock_mhz * 1e6

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def gpu_from_properties(index: int, properties: dict[str, Any]) -> Gpu:
    """A :class:`Gpu` from the native module's ``device_properties``: clocks in kHz, the bus width in bits."""
    compute, sm_count = int(properties["compute"]), int(properties["sm_count"])
    clock_mhz = properties["clock_khz"] / 1e3
    rates = TENSOR_RATES.get(compute)
    per_second = sm_count * clock_mhz * 1e6
    # Integrated GPUs report no memory clock of their own.
    bandwidth = properties["memory_clock_khz"] * 1e3 * 2 * properties["memory_bus_bits"] / 8
    return Gpu(
        index=index,
        name=str(properties["name"]),
        compute=compute,
        sm_count=sm_count,
        clock_mhz=clock_mhz,
        l2_bytes=int(properties["l2_bytes"]),
        memory_bytes=int(properties["memory_bytes"]),
        shared_bytes_per_sm=int(properties["shared_bytes_per_sm"]),
        shared_bytes=int(properties["shared_bytes"]),
        bandwidth=bandwidth or None,
        int8_ops=rates.int8 * per_second if rates and per_second else None,
        fp16_flops=rates.fp16 * per_second if rates and per_second else None,
    )


def gpus() -> list[Gpu]:
    """Every CUDA device of this process, in CUDA's order; empty without a driver or in a wheel without CUDA.

    Raises ImportError when the native module is missing.
    """
    extension = _native.extension()
    count, _ = extension.cuda_status()
    return [gpu_from_properties(i, extension.device_properties(i)) for i in range(count)]


def gpu(index: int = 0) -> Gpu:
    """The CUDA device ``index``; a ValueError says which there are."""
    found = gpus()
    if not 0 <= index < len(found):
        devices = f"there are {len(found)}, numbered from 0" if found else "this process sees none"
        raise ValueError(f"There is no CUDA device {index}: {devices}. `hwkern doctor` says why.")
    return found[index]


@dataclass(frozen=True)
class Floor:
    """The least time that a GEMM can take, and why."""

    seconds: float
    bound: str  #: "compute" or "memory", whichever is longer
    compute_seconds: float | None  #: None: the peak of this device is not documented, so only memory counts
    memory_seconds: float | None
    operations: int
    bytes: int

    @property
    def microseconds(self) -> float:
        """``seconds`` in µs."""
        return self.seconds * 1e6


def speed_of_light(
    m: int,
    n: int,
    k: int,
    device: Gpu,
    *,
    a_bytes: float = 1,
    b_bytes: float = 1,
    d_bytes: float = 2,
    peak: float | None = None,
    bandwidth: float | None = None,
) -> Floor:
    """The floor of ``D [m, n] = A [m, k] · B [n, k]ᵀ``: max(operations / peak, bytes / bandwidth).

    Each operand crosses device memory once. ``*_bytes`` are bytes per element (int8 in and 16 bits out by default);
    ``peak`` (operations/s) defaults to the device's INT8 rate and ``bandwidth`` (bytes/s) to its memory's.
    Raises ValueError for a size below 1 and where neither rate is known.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"speed_of_light needs m, n and k of at least 1, not {m}, {n} and {k}.")
    operations = 2 * m * n * k
    moved = round(m * k * a_bytes + n * k * b_bytes + m * n * d_bytes)
    peak = peak or device.int8_ops
    bandwidth = bandwidth or device.bandwidth
    compute = operations / peak if peak else None
    memory = moved / bandwidth if bandwidth else None
    known = [(t, bound) for t, bound in ((compute, "compute"), (memory, "memory")) if t is not None]
    if not known:
        raise ValueError(
            f"Neither the INT8 peak nor the bandwidth of {device.name} (compute capability {device.compute}) is known: "
            "pass peak= and bandwidth=."
        )
    seconds, bound = max(known)
    return Floor(seconds, bound, compute, memory, operations, moved)


# ---- The CPU ------------------------------------------------------------------------------------------------------

#: /proc/cpuinfo flag → name, best first. All of them add int8 products into int32 without saturating on the way.
CPU_INT8_UNITS = {
    "amx_int8": "AMX-INT8",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "i8mm": "Arm I8MM",
    "asimddp": "Arm DotProd",
}


@dataclass(frozen=True)
class Cpu:
    """The host processor."""

    name: str
    machine: str  #: e.g. x86_64, aarch64
    cores: int  #: logical cores this process may use
    int8_units: tuple[str, ...]  #: names from ``CPU_INT8_UNITS``, best first; empty: none found

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "int8_units": list(self.int8_units)}


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """``(model name, int8 units)`` from the text of /proc/cpuinfo (x86: `flags`, Arm: `Features`)."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    units = tuple(label for flag, label in CPU_INT8_UNITS.items() if flag in present)
    return (name.group(1).strip() if name else ""), units


def cpu() -> Cpu:
    """The CPU, from /proc/cpuinfo; on a system without it the name only."""
    try:
        name, units = parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        name, units = "", ()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpu(name or platform.processor() or platform.machine(), platform.machine(), cores, units)
