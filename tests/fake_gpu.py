"""The native module's ``device_properties`` of a GPU that is not there."""

from __future__ import annotations

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "compute": 90,
    "sm_count": 132,
    "clock_khz": 1_980_000,
    "memory_clock_khz": 2_619_000,
    "memory_bus_bits": 5120,
    "l2_bytes": 50 << 20,
    "memory_bytes": 80 << 30,
    "shared_bytes_per_sm": 233_472,
    "shared_bytes": 232_448,
}
